//! What is the embedded ledger's own; what every ledger must do is in `tests/conformance_store.rs`.

use std::path::Path;

use postrider_actors::model::receipt::{ReceiptReject, RejectedText};

use super::*;
use postrider_actors::ports::console::receipts::{GAP_AGES, ReceiptFilter, ReceiptView as _};

use crate::exit_on_fatal;

const NOW: UnixMs = UnixMs(1_700_000_000_000);

fn open(dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(dir, exit_on_fatal(|| {})).unwrap()
}

fn id(row: u64) -> MessageId {
    MessageId { file: FileId([1; 16]), row }
}

fn sent(row: u64, at: UnixMs) -> MessageRecord {
    MessageRecord {
        id: id(row),
        destination: "d".into(),
        feed: "f".into(),
        recipient: format!("user-{row}").into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(format!("p-{row}").into()),
        accepted_at: at,
        at,
    }
}

fn receipt(row: u64, state: MessageState) -> Receipt {
    Receipt {
        event: EventId::named("s", &format!("{row} {state:?}")),
        key: ReceiptKey::Provider(format!("p-{row}").into()),
        state,
        at: Some(NOW),
        facts: ReceiptFacts::default(),
    }
}

fn arrival(receipts: Vec<Receipt>) -> Arrival {
    Arrival {
        source: "s".into(),
        destination: "d".into(),
        receipts,
        rejects: Vec::new(),
        cursor: None,
        at: NOW,
    }
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        store.record(vec![sent(1, NOW)]).await.unwrap();
        let receipts = vec![receipt(1, MessageState::Delivered), receipt(2, MessageState::Failed)];
        let cursor = Some(SourceCursor("12".to_owned()));
        store.take(Arrival { cursor, ..arrival(receipts) }).await.unwrap();
    }
    {
        let store = open(dir.path());
        assert_eq!(store.waiting().await, Ok(2));
        assert_eq!(store.cursor("s").await, Ok(Some(SourceCursor("12".to_owned()))));
        let applied = store.apply(10, usize::MAX, NOW).await.unwrap();
        assert_eq!((applied.matched, applied.parked), (1, 1));
    }
    let store = open(dir.path());
    store.record(vec![sent(2, NOW)]).await.unwrap();
    assert_eq!(store.apply(10, usize::MAX, NOW).await.unwrap().matched, 1);
    let view = ReceiptViewer::open(dir.path()).unwrap();
    let states = [view.message(id(1)).await.unwrap()[0].state, view.message(id(2)).await.unwrap()[0].state];
    assert_eq!(states, [MessageState::Delivered, MessageState::Failed]);
}

#[tokio::test]
async fn changes_are_kept_only_for_who_asked_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.record(vec![sent(1, NOW), sent(2, NOW)]).await.unwrap();
    store.take(arrival(vec![receipt(1, MessageState::Failed)])).await.unwrap();
    assert_eq!(store.apply(10, usize::MAX, NOW).await.unwrap().changed, 1);
    assert_eq!(store.expire("d", UnixMs(NOW.0 + 1), 10, NOW).await, Ok(1));
    assert_eq!(store.changes(None, 10).await, Ok(Vec::new()));
    store.keep_changes(true);
    store.take(arrival(vec![receipt(1, MessageState::Delivered)])).await.unwrap();
    store.apply(10, usize::MAX, NOW).await.unwrap();
    assert_eq!(store.changes(None, 10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_provider_that_gives_one_id_to_all_costs_one_row_per_receipt() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let same = |row| MessageRecord { provider_id: Some("p-0".into()), ..sent(row, NOW) };
    store.record((1..=3).map(same).collect()).await.unwrap();
    store.take(arrival(vec![receipt(0, MessageState::Delivered)])).await.unwrap();
    assert_eq!(store.apply(10, usize::MAX, NOW).await.unwrap().changed, 1);
    let view = ReceiptViewer::open(dir.path()).unwrap();
    for (row, state) in [(1, MessageState::Sent), (2, MessageState::Sent), (3, MessageState::Delivered)] {
        assert_eq!(view.message(id(row)).await.unwrap()[0].state, state);
    }
}

#[tokio::test]
async fn what_has_no_receipt_is_listed_by_age() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = ReceiptViewer::open(dir.path()).unwrap();
    assert_eq!(view.gaps("d", NOW, None, 10).await, Ok(Vec::new()), "an unknown destination");
    let ago = |hours: u64| UnixMs(NOW.0 - hours * 60 * 60 * 1_000);
    // Two at one time, so that the place within it counts.
    let ages = [0, 1, 5, 6, 24, 24, 71, 72, 100];
    store.record((1..).zip(ages).map(|(row, hours)| sent(row, ago(hours))).collect()).await.unwrap();
    store
        .take(arrival(vec![receipt(1, MessageState::Sent), receipt(7, MessageState::Delivered)]))
        .await
        .unwrap();
    store.apply(10, usize::MAX, NOW).await.unwrap();
    assert_eq!(store.expire("d", ago(71), 10, NOW).await, Ok(2));

    assert_eq!(GAP_AGES.len(), 6);
    assert_eq!(view.gap_ages("d", NOW).await, Ok([1, 2, 1, 2, 0, 2]));
    assert_eq!(view.gap_ages("e", NOW).await, Ok([0; 6]));
    for page in [1, 2, 3, 100] {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let gaps = view.gaps("d", ago(1), after.as_ref(), page).await.unwrap();
            assert!(gaps.len() <= page);
            let Some(last) = gaps.last() else { break };
            after = Some(last.place());
            found.extend(gaps);
        }
        let rows: Vec<_> = found.iter().map(|gap| gap.id.row).collect();
        assert_eq!(rows, [9, 8, 5, 6, 4, 3], "the oldest first, {page} at a time");
        let states: Vec<_> = found.iter().take(3).map(|gap| gap.state).collect();
        assert_eq!(states, [MessageState::Expired, MessageState::Expired, MessageState::Sent]);
        assert_eq!(found[0].provider_id.as_deref(), Some("p-9"));
    }
}

#[tokio::test]
async fn what_is_held_is_listed_by_source() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let later = UnixMs(NOW.0 + 1_000);
    let text = RejectedText::of_receipt(b"{\"id\":\"p-1\"}");
    let reject = ReceiptReject {
        event: EventId::named("s", "x"),
        at: None,
        place: "a.csv:3".to_owned(),
        reason: "no status".to_owned(),
        text: text.clone(),
    };
    let rejects = vec![reject];
    store
        .take(Arrival {
            rejects,
            ..arrival(vec![receipt(1, MessageState::Failed), receipt(2, MessageState::Failed)])
        })
        .await
        .unwrap();
    store.apply(10, usize::MAX, NOW).await.unwrap();
    store.orphan(later, 1).await.unwrap();
    let cursor = Some(SourceCursor("7".to_owned()));
    let more = vec![receipt(3, MessageState::Delivered)];
    store
        .take(Arrival { source: "t".into(), cursor: cursor.clone(), at: later, ..arrival(more) })
        .await
        .unwrap();

    let view = ReceiptViewer::open(dir.path()).unwrap();
    let all = ReceiptFilter::default();
    let parked = view.parked(&all, 10).await.unwrap();
    assert_eq!((parked.len(), &*parked[0].source, &*parked[0].destination), (1, "s", "d"));
    assert_eq!(parked[0].key, ReceiptKey::Provider("p-2".into()));
    assert_eq!((parked[0].state, parked[0].since), (MessageState::Failed, NOW));
    let orphans = view.orphans(&all, 10).await.unwrap();
    assert_eq!(
        orphans.iter().map(|orphan| &orphan.key).collect::<Vec<_>>(),
        [&ReceiptKey::Provider("p-1".into())]
    );
    let rejects = view.rejects(&all, 10).await.unwrap();
    assert_eq!((rejects.len(), &*rejects[0].place, &*rejects[0].reason), (1, "a.csv:3", "no status"));
    assert_eq!(rejects[0].text, text);
    let sources = view.sources().await.unwrap();
    let counts = |at: usize| (&*sources[at].name, sources[at].waiting, sources[at].parked);
    assert_eq!((sources.len(), counts(0), counts(1)), (2, ("s", 0, 1), ("t", 1, 0)));
    assert_eq!((sources[0].receipts_at, sources[0].cursor_at), (Some(NOW), None));
    assert_eq!((sources[1].receipts_at, sources[1].cursor_at), (Some(later), Some(later)));
    assert_eq!((&sources[0].cursor, &sources[1].cursor), (&None, &cursor));

    store.record(vec![sent(5, NOW)]).await.unwrap();
    let counts = view.counts(Some(FileId([1; 16]))).await.unwrap();
    assert_eq!((counts.len(), counts[0].state, counts[0].messages), (1, MessageState::Sent, 1));
    assert_eq!(view.counts(None).await, Ok(counts));
    assert_eq!(view.counts(Some(FileId([2; 16]))).await, Ok(Vec::new()));
}
