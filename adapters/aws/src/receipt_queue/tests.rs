//! Over the fake queue, which fails and repeats itself.

use std::collections::BTreeMap;

use postrider_actors::{
    model::{
        receipt::{EventId, Receipt, ReceiptKey},
        receipt_format::{FieldPath, ReceiptMapping, StatusMeaning, UnknownStatus},
        time::UnixMs,
    },
    ports::{Arrival, Clock, ReceiptLedger},
    testing::{FakeClock, IntakeFaults, MemoryIntake, MemoryReceipts},
};

use super::*;

pub(crate) fn format(source: &str) -> ReceiptFormat {
    let path = |text: &str| FieldPath::parse(text).unwrap();
    let mapping = ReceiptMapping {
        message_id: None,
        provider_id: Some(path("id")),
        event_id: None,
        status: path("status"),
        time: Some(path("at")),
        carrier: None,
        response: None,
        sent_at: None,
        price: None,
        statuses: BTreeMap::from([
            ("ok".to_owned(), StatusMeaning::Delivered),
            ("seen".to_owned(), StatusMeaning::Ignored),
        ]),
        otherwise: UnknownStatus::Reject,
    };
    ReceiptFormat::new(source.into(), mapping).unwrap()
}

struct World {
    clock: Arc<FakeClock>,
    queue: Arc<MemoryIntake>,
    source: QueueReceipts,
}

fn world(faults: IntakeFaults, receipts: usize) -> World {
    let clock = Arc::new(FakeClock::at(UnixMs(1)));
    let queue = Arc::new(MemoryIntake::new(clock.clone(), Duration::from_secs(30), faults, 7));
    let limits = QueueReceiptsLimits { receipts, entry_receipts: 3 };
    World { source: QueueReceipts::new(queue.clone(), format("q"), limits), clock, queue }
}

fn body(number: usize) -> String {
    format!(r#"{{"id":"p-{number}","status":"ok"}}"#)
}

fn keys(receipts: &[Receipt]) -> Vec<String> {
    let key = |receipt: &Receipt| match &receipt.key {
        ReceiptKey::Provider(id) => id.to_string(),
        ReceiptKey::Message(id) => id.to_string(),
    };
    let mut keys: Vec<_> = receipts.iter().map(key).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test(start_paused = true)]
async fn a_look_gathers_many_entries_and_no_more_than_it_may() {
    let world = world(IntakeFaults::default(), 200);
    for number in 0..450 {
        world.queue.put(&number.to_string(), body(number));
    }
    let mut looks = Vec::new();
    while !world.queue.is_empty() {
        let polled = world.source.poll(None, Duration::from_secs(20)).await.unwrap();
        looks.push(polled.receipts.len());
        assert_eq!(polled.acks.len(), polled.receipts.len());
        world.source.acknowledge(&polled.acks).await.unwrap();
    }
    assert_eq!(looks, [200, 200, 50]);
    let empty = world.source.poll(None, Duration::from_secs(1)).await.unwrap();
    assert!(empty.receipts.is_empty() && empty.acks.is_empty() && empty.cursor.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_entry_is_one_receipt_or_several_bare_or_in_a_notification() {
    let world = world(IntakeFaults::default(), 100);
    let notification = |message: &str| {
        serde_json::json!({"Type": "Notification", "TopicArn": "arn:aws:sns:x", "Message": message})
            .to_string()
    };
    world.queue.put("a", body(1));
    world.queue.put("b", format!("[{}, {}]", body(2), body(3)));
    world.queue.put("c", notification(&body(4)));
    world.queue.put("d", notification(&format!("[{}]", body(5))));
    world.queue.put("e", r#"{"id":"p-6","status":"seen"}"#);
    let polled = world.source.poll(None, Duration::ZERO).await.unwrap();
    assert_eq!(keys(&polled.receipts), ["p-1", "p-2", "p-3", "p-4", "p-5"]);
    assert_eq!((polled.rejects.len(), polled.ignored, polled.acks.len()), (0, 1, 5));
    let bare = polled.receipts.iter().find(|receipt| keys(&[(*receipt).clone()]) == ["p-4"]).unwrap();
    assert_eq!(
        bare.event,
        EventId::of_text("q", body(4).as_bytes()),
        "wrapped or not, it is the same receipt"
    );
}

#[tokio::test(start_paused = true)]
async fn f48_f52_a_bad_body_is_rejected_by_its_entrys_id_and_goes() {
    let world = world(IntakeFaults::default(), 100);
    world.queue.put("good", body(1));
    world.queue.put("text", "hello");
    world.queue.put("binary", &b"\xff\0"[..]);
    world.queue.put("half", format!("[{}, {{\"id\":\"p-2\",\"status\":\"?\"}}]", body(3)));
    world.queue.put("many", format!("[{0},{0},{0},{0}]", body(4)));
    world.queue.put("empty", "");
    world.queue.put("cut", "{\"id\":\"p-5\",\"status\":");
    let polled = world.source.poll(None, Duration::ZERO).await.unwrap();
    assert_eq!(keys(&polled.receipts), ["p-1", "p-3"]);
    let mut places: Vec<_> = polled.rejects.iter().map(|reject| &*reject.place).collect();
    places.sort_unstable();
    assert_eq!(places, ["binary", "cut", "empty", "half[1]", "many", "text"]);
    let many = polled.rejects.iter().find(|reject| reject.place == "many").unwrap();
    assert!(many.reason.contains("4 receipts") && many.reason.contains('3'), "{}", many.reason);
    world.source.acknowledge(&polled.acks).await.unwrap();
    assert!(world.queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn f48_every_receipt_is_taken_once_whatever_the_queue_does() {
    let faults = IntakeFaults { duplicate: 0.2, delete_fails: 0.6, delete_unknown: 0.2, unavailable: 0.1 };
    let world = world(faults, 100);
    for number in 0..1_000 {
        world.queue.put(&number.to_string(), body(number));
    }
    let ledger = MemoryReceipts::new();
    let (mut new, mut known) = (0, 0);
    for _ in 0..2_000 {
        if world.queue.is_empty() {
            break;
        }
        let Ok(polled) = world.source.poll(None, Duration::from_millis(10)).await else { continue };
        let arrival = Arrival {
            source: "q".into(),
            destination: "d".into(),
            receipts: polled.receipts,
            rejects: polled.rejects,
            cursor: polled.cursor,
            at: world.clock.wall(),
        };
        let taken = ledger.take(arrival).await.unwrap();
        (new, known) = (new + taken.new, known + taken.known);
        world.source.acknowledge(&polled.acks).await.unwrap();
        world.clock.advance(Duration::from_secs(31)); // what was not deleted comes again
    }
    assert!(world.queue.is_empty());
    assert_eq!((new, ledger.waiting().await), (1_000, Ok(1_000)));
    assert!(known > 0, "some came again");
}
