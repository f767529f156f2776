use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use crate::{
    model::{ids::BatchId, time::UnixMs},
    ports::{Handle, Hint, ItemOutcome, Outgoing, QueueDepth, Received, StoreError, Transport},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than any case takes.
const LONG: Duration = Duration::from_mins(10);

/// The contract of a transport. `make` gives one and the names of two empty queues of it.
pub async fn transport<F: Future<Output = (Arc<dyn Transport>, [String; 2])>>(make: impl Fn() -> F) {
    what_is_sent_is_received_and_each_queue_is_for_itself(make().await).await;
    what_is_received_is_hidden_and_comes_again(make().await).await;
    what_is_given_back_comes_at_once_and_under_another_handle(make().await).await;
    what_is_deleted_is_gone(make().await).await;
    a_delay_holds_entries_back(make().await).await;
    the_depth_counts_what_is_there(make().await).await;
    a_lane_comes_in_order(make().await).await;
    limits_are_real(make().await).await;
}

type Subject = (Arc<dyn Transport>, [String; 2]);

fn outgoing(number: u8, lane: u32) -> Outgoing {
    let due = UnixMs(1_700_000_000_000 + u64::from(number));
    Outgoing { hint: Hint { batch: BatchId([number; 16]), due }, sending: number.into(), lane }
}

async fn send(transport: &Arc<dyn Transport>, queue: &str, entries: &[Outgoing]) {
    let outcomes = transport.send(queue, entries, Duration::ZERO).await.unwrap();
    assert_eq!(outcomes, vec![ItemOutcome::Ok; entries.len()]);
}

/// Receives until there are so many, or patience has ended.
async fn receive(
    transport: &Arc<dyn Transport>,
    queue: &str,
    count: usize,
    hidden: Duration,
) -> Vec<Received> {
    let started = tokio::time::Instant::now();
    let mut received = Vec::new();
    while received.len() < count && started.elapsed() < PATIENCE {
        let max = (count - received.len()).min(transport.limits().entries);
        received.extend(transport.receive(queue, max, Duration::from_secs(1), hidden).await.unwrap());
    }
    received
}

async fn assert_empty(transport: &Arc<dyn Transport>, queue: &str) {
    let received = transport.receive(queue, 1, Duration::ZERO, LONG).await.unwrap();
    assert_eq!(received, []);
}

fn handles(received: &[Received]) -> Vec<Handle> {
    received.iter().map(|received| received.handle.clone()).collect()
}

async fn what_is_sent_is_received_and_each_queue_is_for_itself((transport, [one, other]): Subject) {
    let sent: Vec<_> = (1..=7).map(|number| outgoing(number, number.into())).collect();
    send(&transport, &one, &sent).await;
    assert_empty(&transport, &other).await;
    let received = receive(&transport, &one, 7, LONG).await;
    let hints: BTreeSet<_> = received.iter().map(|received| received.hint).collect();
    assert_eq!(hints, sent.iter().map(|sent| sent.hint).collect());
    assert_eq!(handles(&received).into_iter().collect::<BTreeSet<_>>().len(), 7);
    assert_empty(&transport, &one).await;
}

async fn what_is_received_is_hidden_and_comes_again((transport, [queue, _]): Subject) {
    send(&transport, &queue, &[outgoing(1, 1)]).await;
    let first = receive(&transport, &queue, 1, Duration::from_secs(2)).await;
    assert_eq!(first.len(), 1);
    assert_empty(&transport, &queue).await;
    let again = receive(&transport, &queue, 1, LONG).await;
    assert_eq!(again[0].hint, first[0].hint);
}

async fn what_is_given_back_comes_at_once_and_under_another_handle((transport, [queue, _]): Subject) {
    send(&transport, &queue, &[outgoing(1, 1)]).await;
    let first = receive(&transport, &queue, 1, LONG).await;
    let given = transport.hide(&queue, &[(first[0].handle.clone(), Duration::ZERO)]).await;
    assert_eq!(given, Ok(vec![ItemOutcome::Ok]));
    let again = receive(&transport, &queue, 1, LONG).await;
    assert_eq!(again[0].hint, first[0].hint);
    assert_ne!(again[0].handle, first[0].handle);
    // Hidden for a while only.
    let hidden = transport.hide(&queue, &[(again[0].handle.clone(), Duration::from_secs(2))]).await;
    assert_eq!(hidden, Ok(vec![ItemOutcome::Ok]));
    assert_empty(&transport, &queue).await;
    assert_eq!(receive(&transport, &queue, 1, LONG).await.len(), 1);
}

async fn what_is_deleted_is_gone((transport, [queue, _]): Subject) {
    let sent: Vec<_> = (1..=3).map(|number| outgoing(number, number.into())).collect();
    send(&transport, &queue, &sent).await;
    let received = receive(&transport, &queue, 3, Duration::from_secs(2)).await;
    let deleted = transport.delete(&queue, &handles(&received[..2])).await;
    assert_eq!(deleted, Ok(vec![ItemOutcome::Ok; 2]));
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let left = receive(&transport, &queue, 1, LONG).await;
    assert_eq!(left[0].hint, received[2].hint);
    assert_empty(&transport, &queue).await;
}

async fn a_delay_holds_entries_back((transport, [queue, _]): Subject) {
    if transport.limits().delay.is_zero() {
        return;
    }
    let sent = transport.send(&queue, &[outgoing(1, 1)], Duration::from_secs(2)).await;
    assert_eq!(sent, Ok(vec![ItemOutcome::Ok]));
    assert_empty(&transport, &queue).await;
    assert_eq!(receive(&transport, &queue, 1, LONG).await.len(), 1);
}

async fn the_depth_counts_what_is_there((transport, [queue, other]): Subject) {
    assert_eq!(transport.depth(&queue).await, Ok(QueueDepth::default()));
    let sent: Vec<_> = (1..=3).map(|number| outgoing(number, number.into())).collect();
    send(&transport, &queue, &sent).await;
    assert_eq!(receive(&transport, &queue, 1, LONG).await.len(), 1);
    let depth = transport.depth(&queue).await.unwrap();
    assert_eq!(depth, QueueDepth { visible: 2, in_flight: 1, delayed: 0 });
    assert_eq!(transport.depth(&other).await, Ok(QueueDepth::default()));
}

async fn a_lane_comes_in_order((transport, [queue, _]): Subject) {
    if !transport.limits().keeps_order {
        return;
    }
    send(&transport, &queue, &[outgoing(1, 7), outgoing(2, 7), outgoing(3, 8)]).await;
    // Repeated, they are there once.
    send(&transport, &queue, &[outgoing(1, 7), outgoing(2, 7)]).await;
    let numbers = |received: &[Received]| -> BTreeSet<u8> {
        received.iter().map(|received| received.hint.batch.0[0]).collect()
    };
    let first = receive(&transport, &queue, 1, LONG).await;
    let mut all = first.clone();
    while numbers(&all) != [1, 3].into() {
        let more = receive(&transport, &queue, 1, LONG).await;
        assert!(!more.is_empty() && !numbers(&more).contains(&2), "{more:?}");
        all.extend(more);
    }
    assert_empty(&transport, &queue).await;
    let done: Vec<_> = all.iter().filter(|received| received.hint.batch.0[0] == 1).cloned().collect();
    transport.delete(&queue, &handles(&done)).await.unwrap();
    assert_eq!(numbers(&receive(&transport, &queue, 1, LONG).await), [2].into());
}

async fn limits_are_real((transport, [queue, _]): Subject) {
    let limits = transport.limits();
    let many: Vec<_> = (0..=limits.entries).map(|number| outgoing(number as u8, 1)).collect();
    let refused = transport.send(&queue, &many, Duration::ZERO).await;
    assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
    assert_eq!(transport.depth(&queue).await, Ok(QueueDepth::default()));
    let none = transport.delete(&queue, &[]).await;
    assert!(none.is_ok_and(|outcomes| outcomes.is_empty()));
}
