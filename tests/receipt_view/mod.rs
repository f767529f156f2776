//! What commands read of receipts that are held, whichever ledger has them.

use postrider_actors::ports::console::receipts::{ReceiptFilter, ReceiptView};
use postrider_actors::{
    model::{
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey, ReceiptReject, RejectedText},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Arrival, ReceiptLedger},
};

const NOW: UnixMs = UnixMs(1_700_000_000_000);

/// Three sources for two destinations, each with six receipts without a message and three rejects.
async fn fill(ledger: &dyn ReceiptLedger) {
    for (source, destination) in [("s", "d"), ("t", "d"), ("u", "e")] {
        let event = |number: u8| EventId::named(source, &number.to_string());
        let receipt = |number| Receipt {
            event: event(number),
            key: ReceiptKey::Provider(format!("p-{number}").into()),
            state: MessageState::Failed,
            at: None,
            facts: ReceiptFacts::default(),
        };
        let reject = |number| ReceiptReject {
            event: event(number),
            at: None,
            place: format!("{source}:{number}"),
            reason: "no status".to_owned(),
            text: RejectedText::of_receipt(format!("{{\"number\":{number}}}").as_bytes()),
        };
        let arrival = Arrival {
            source: source.into(),
            destination: destination.into(),
            receipts: (0..6).map(receipt).collect(),
            rejects: (10..13).map(reject).collect(),
            cursor: None,
            at: NOW,
        };
        ledger.take(arrival).await.unwrap();
    }
    while ledger.waiting().await.unwrap() > 0 {
        ledger.apply(100, usize::MAX, NOW).await.unwrap();
    }
    assert_eq!(ledger.orphan(UnixMs(NOW.0 + 1), 9).await, Ok(9));
}

pub(crate) async fn what_is_held_is_listed_by_source_and_destination(
    ledger: &dyn ReceiptLedger,
    view: &dyn ReceiptView,
) {
    fill(ledger).await;
    for (source, destination, found) in [
        (None, None, 9),
        (Some("t"), None, 3),
        (None, Some("d"), 6),
        (Some("s"), Some("d"), 3),
        (Some("s"), Some("e"), 0),
        (Some("nobody"), None, 0),
        (None, Some("nowhere"), 0),
    ] {
        let which =
            ReceiptFilter { source: source.map(str::to_owned), destination: destination.map(str::to_owned) };
        let parked = view.parked(&which, 99).await.unwrap();
        let orphans = view.orphans(&which, 99).await.unwrap();
        assert_eq!(parked.len() + orphans.len(), 2 * found, "{which:?}");
        for held in parked.iter().chain(&orphans) {
            assert!(source.is_none_or(|wanted| wanted == &*held.source), "{which:?}");
            assert!(destination.is_none_or(|wanted| wanted == &*held.destination), "{which:?}");
        }
        let rejects = view.rejects(&which, 99).await.unwrap();
        assert_eq!(rejects.len(), found, "{which:?}");
        for reject in &rejects {
            assert!(reject.place.starts_with(&*reject.source) && reject.text.is_whole, "{reject:?}");
            assert!(source.is_none_or(|wanted| wanted == &*reject.source), "{which:?}");
        }
        // The limit is one of what is wanted, not of what is looked through.
        let one = view.parked(&which, 1).await.unwrap().len() + view.orphans(&which, 1).await.unwrap().len();
        assert!(one <= 2 && (one > 0) == (found > 0), "{which:?}");
        assert_eq!(view.rejects(&which, 1).await.unwrap().len(), found.min(1), "{which:?}");
    }
}
