use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::Arrival,
    testing::{FakeClock, MemoryReceipts},
};

use super::*;

const NOW: UnixMs = UnixMs(1_709_208_000_123);

struct World {
    clock: Arc<FakeClock>,
    ledger: Arc<MemoryReceipts>,
    intake: Arc<StatusChangeIntake>,
}

fn id(row: u64) -> MessageId {
    MessageId { file: FileId([1; 16]), row }
}

impl World {
    /// So many messages that were delivered: a change each.
    async fn new(messages: u64) -> Self {
        let clock = Arc::new(FakeClock::at(NOW));
        let ledger = Arc::new(MemoryReceipts::keeping_changes());
        let record = |row| MessageRecord {
            id: id(row),
            destination: "sms".into(),
            feed: "f".into(),
            recipient: "r".into(),
            state: MessageState::Sent,
            attempts: 1,
            status: 200,
            reason: None,
            detail: None,
            provider_id: (row % 2 == 1).then(|| format!("p-{row}").into()),
            accepted_at: NOW,
            at: NOW,
        };
        ledger.record((1..=messages).map(record).collect()).await.unwrap();
        let receipt = |row: u64| Receipt {
            event: EventId::named("s", &row.to_string()),
            key: ReceiptKey::Message(id(row)),
            state: MessageState::Delivered,
            at: None,
            facts: ReceiptFacts::default(),
        };
        let arrival = Arrival {
            source: "s".into(),
            destination: "sms".into(),
            receipts: (1..=messages).map(receipt).collect(),
            rejects: Vec::new(),
            cursor: None,
            at: NOW,
        };
        ledger.take(arrival).await.unwrap();
        while ledger.apply(1_000, 1 << 20, NOW).await.unwrap().total() > 0 {}
        Self::over(clock, ledger)
    }

    fn over(clock: Arc<FakeClock>, ledger: Arc<MemoryReceipts>) -> Self {
        let intake = Arc::new(StatusChangeIntake::new(ledger.clone(), clock.clone()));
        Self { clock, ledger, intake }
    }

    async fn receive(&self, limit: usize) -> Vec<IntakeEntry> {
        self.intake.receive(limit, Duration::ZERO).await.unwrap()
    }

    async fn left(&self) -> usize {
        self.ledger.changes(None, 10_000).await.unwrap().len()
    }
}

fn acks(entries: &[IntakeEntry]) -> Vec<AckId> {
    entries.iter().map(|entry| entry.ack.clone()).collect()
}

fn ids(entries: &[IntakeEntry]) -> Vec<&str> {
    entries.iter().map(|entry| &*entry.id).collect()
}

#[tokio::test(start_paused = true)]
async fn a_change_has_the_state_before_and_after() {
    let world = World::new(2).await;
    let entries = world.receive(10).await;
    let body = |entry: &IntakeEntry| serde_json::from_slice::<serde_json::Value>(&entry.body).unwrap();
    let mut bodies: Vec<_> = entries.iter().map(body).collect();
    bodies.sort_by_key(|body| body["message_id"].to_string());
    let expected = |row: u64, provider_id: Option<&str>| {
        serde_json::json!({
            "message_id": id(row).to_string(),
            "destination": "sms",
            "provider_id": provider_id,
            "before": "sent",
            "state": "delivered",
            "at": "2024-02-29T12:00:00.123Z",
        })
    };
    assert_eq!(bodies, [expected(1, Some("p-1")), expected(2, None)]);
    assert!(entries.iter().all(|entry| entry.receives == 0), "the feed looks whether it knows them");
}

#[tokio::test(start_paused = true)]
async fn several_pollers_get_every_change_once_and_deleting_forgets_it() {
    let world = World::new(2_345).await;
    let mut pollers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let intake = world.intake.clone();
        pollers.spawn(async move {
            let mut seen = Vec::new();
            loop {
                let entries = intake.receive(10, Duration::from_secs(2)).await.unwrap();
                if entries.is_empty() {
                    return seen;
                }
                let outcomes = intake.delete(&acks(&entries)).await.unwrap();
                assert!(outcomes.iter().all(|outcome| *outcome == ItemOutcome::Ok));
                seen.extend(entries.into_iter().map(|entry| entry.id));
            }
        });
    }
    let mut seen = pollers.join_all().await.concat();
    assert_eq!(seen.len(), 2_345);
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((seen.len(), world.left().await), (2_345, 0));
    assert_eq!(world.intake.depth().await, Ok(QueueDepth { visible: 0, in_flight: 0, delayed: 0 }));
}

#[tokio::test(start_paused = true)]
async fn what_is_handed_out_stays_hidden_until_it_is_returned_or_times_out() {
    let world = World::new(3).await;
    let first = world.receive(10).await;
    assert_eq!(first.len(), 3);
    assert_eq!(world.receive(10).await.len(), 0);
    let one = acks(&first[..1]);
    assert_eq!(world.intake.release(&one).await.unwrap(), [ItemOutcome::Ok]);
    let again = world.receive(10).await;
    assert_eq!(ids(&again), ids(&first[..1]));
    assert!(
        matches!(world.intake.extend(&one).await.unwrap()[0], ItemOutcome::Permanent(_)),
        "an old delivery"
    );
    // One of the others is extended, one is not.
    world.clock.advance(VISIBILITY / 2);
    assert_eq!(world.intake.extend(&acks(&first[1..2])).await.unwrap(), [ItemOutcome::Ok]);
    world.clock.advance(VISIBILITY / 2);
    let late = world.receive(10).await;
    assert_eq!(ids(&late), [ids(&first)[0], ids(&first)[2]]);
    assert_eq!(world.intake.depth().await.unwrap().total(), 3);
    // An earlier delivery deletes too, and doing it twice is harmless.
    for _ in 0..2 {
        assert_eq!(world.intake.delete(&acks(&first)).await.unwrap(), [const { ItemOutcome::Ok }; 3]);
    }
    world.clock.advance(VISIBILITY * 2);
    assert_eq!((world.receive(10).await.len(), world.left().await), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_restart_hands_out_again_what_was_not_deleted_by_the_same_id() {
    let world = World::new(20).await;
    let first = world.receive(20).await;
    world.intake.delete(&acks(&first[..15])).await.unwrap();
    let restarted = World::over(world.clock.clone(), world.ledger.clone());
    let again = restarted.receive(100).await;
    assert_eq!(ids(&again), ids(&first[15..]));
}

#[tokio::test(start_paused = true)]
async fn f49_a_ledger_that_is_away_loses_no_change() {
    let world = World::new(5).await;
    world.ledger.set_down(true);
    assert!(world.intake.receive(10, Duration::ZERO).await.is_err());
    world.ledger.set_down(false);
    let entries = world.receive(10).await;
    world.ledger.set_down(true);
    assert!(world.intake.delete(&acks(&entries)).await.is_err());
    world.ledger.set_down(false);
    world.ledger.lose_answers(1);
    let _ = world.intake.delete(&acks(&entries)).await; // done, but the answer is lost
    assert_eq!(world.left().await, 0);
    assert_eq!(world.intake.delete(&acks(&entries)).await.unwrap().len(), 5);
    world.clock.advance(VISIBILITY * 2);
    assert_eq!(world.receive(10).await.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_empty_look_waits_and_is_ended_by_a_change() {
    let world = World::new(0).await;
    let begun = tokio::time::Instant::now();
    assert_eq!(world.intake.receive(10, Duration::from_secs(3)).await.unwrap().len(), 0);
    assert_eq!(begun.elapsed(), Duration::from_secs(3));
    for strange in ["", "x", "x.1", "1"] {
        let outcomes = world.intake.delete(&[AckId(strange.into())]).await.unwrap();
        assert!(matches!(outcomes[0], ItemOutcome::Permanent(_)), "{strange}");
    }
}
