//! Reading rejected receipts again, after their source's mapping was fixed. Not an actor: a command does it, with or
//! without a running daemon.
//!
//! Rejects are read in steps, each settled as a whole. What fits now goes into the inbox, where reconcilers find it
//! like any other receipt. Whatever is cut off or fails may be repeated: what was taken is recognised.

use std::sync::Arc;

use crate::{
    model::{receipt::EventId, receipt_format::ReceiptFormat},
    ports::{Clock, ReceiptRejects, Reread, StoreError},
};

/// Rejects of one step: some megabytes at most.
const STEP: usize = 256;

/// The results of reading rejects again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RereadCounts {
    /// They are in the inbox.
    pub taken: u64,
    /// They had come in the meantime.
    pub known: u64,
    /// Their status is ignored.
    pub ignored: u64,
    /// They still can't be read.
    pub rejected: u64,
    /// They can't be read again: no receipt, or not all of it, was kept.
    pub incomplete: u64,
}

impl RereadCounts {
    /// How many left the rejects.
    pub fn settled(&self) -> u64 {
        self.taken + self.known + self.ignored
    }
}

/// Reads the rejects of `format`'s source again, whose receipts are about messages to `destination`, until `limit`
/// of them have left the rejects. Adds to `counts`.
pub async fn reread(
    store: &dyn ReceiptRejects,
    format: &ReceiptFormat,
    destination: &Arc<str>,
    limit: u64,
    clock: &dyn Clock,
    counts: &mut RereadCounts,
) -> Result<(), StoreError> {
    let end = counts.settled().saturating_add(limit);
    let mut after: Option<EventId> = None;
    while counts.settled() < end {
        let rejects = store.rejects(format.source(), after, STEP).await?;
        let Some(last) = rejects.last() else { break };
        let is_last = rejects.len() < STEP;
        after = Some(last.event);
        let mut reread = Reread {
            source: format.source().clone(),
            destination: destination.clone(),
            receipts: Vec::new(),
            ignored: Vec::new(),
            rejected: Vec::new(),
            at: clock.wall(),
        };
        for reject in rejects {
            if counts.settled() + (reread.receipts.len() + reread.ignored.len()) as u64 >= end {
                break;
            }
            if !reject.text.is_whole {
                counts.incomplete += 1;
                continue;
            }
            match format.read_again(&reject) {
                Ok(Some(receipt)) => reread.receipts.push((reject.event, receipt)),
                Ok(None) => reread.ignored.push(reject.event),
                Err(reason) => reread.rejected.push((reject.event, reason)),
            }
        }
        let (ignored, rejected) = (reread.ignored.len() as u64, reread.rejected.len() as u64);
        if !reread.receipts.is_empty() || ignored + rejected > 0 {
            let taken = store.settle_rejects(reread).await?;
            counts.taken += taken.new;
            counts.known += taken.known;
            counts.ignored += ignored;
            counts.rejected += rejected;
        }
        if is_last {
            break;
        }
    }
    Ok(())
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{
        model::{
            receipt_format::{Around, FieldPath, ReadReceipts, ReceiptMapping, StatusMeaning, UnknownStatus},
            time::UnixMs,
        },
        ports::{Arrival, ReceiptLedger as _},
        testing::{FakeClock, MemoryReceipts, RowReader as _},
    };

    fn format(words: &[(&str, StatusMeaning)]) -> ReceiptFormat {
        let path = |text: &str| FieldPath::parse(text).unwrap();
        let words = words.iter().chain(&[("ok", StatusMeaning::Delivered)]);
        let mapping = ReceiptMapping {
            message_id: None,
            provider_id: Some(path("id")),
            event_id: None,
            status: path("status"),
            time: None,
            carrier: None,
            response: None,
            sent_at: None,
            price: None,
            statuses: words.map(|(word, meaning)| ((*word).to_owned(), *meaning)).collect(),
            otherwise: UnknownStatus::Reject,
        };
        ReceiptFormat::new("s".into(), mapping).unwrap()
    }

    fn arrival(read: ReadReceipts) -> Arrival {
        let ReadReceipts { receipts, rejects, .. } = read;
        Arrival {
            source: "s".into(),
            destination: "d".into(),
            receipts,
            rejects,
            cursor: None,
            at: UnixMs(1),
        }
    }

    /// So many receipts of each word.
    fn read(format: &ReceiptFormat, words: &[&str], receipts: usize) -> ReadReceipts {
        let mut read = ReadReceipts::default();
        for word in words {
            for number in 0..receipts {
                let text = format!(r#"{{"id":"{word}-{number}","status":"{word}"}}"#);
                format.read_into(text.as_bytes(), Around::default(), || number.to_string(), &mut read);
            }
        }
        read
    }

    async fn again(ledger: &MemoryReceipts, format: &ReceiptFormat, limit: u64) -> RereadCounts {
        let mut counts = RereadCounts::default();
        let clock = FakeClock::at(UnixMs(9));
        reread(ledger, format, &"d".into(), limit, &clock, &mut counts).await.unwrap();
        counts
    }

    const FIXED: &[(&str, StatusMeaning)] =
        &[("lost", StatusMeaning::Failed), ("seen", StatusMeaning::Ignored)];

    #[tokio::test]
    async fn what_fits_now_is_taken_once_and_the_rest_stays() {
        let ledger = MemoryReceipts::new();
        let (broken, fixed) = (format(&[]), format(FIXED));
        let mut came = read(&broken, &["lost", "seen", "gone", "ok"], 300);
        assert_eq!((came.rejects.len(), came.receipts.len()), (900, 300));
        came.rejects.push(broken.reject(b"[", "e".into(), "not JSON".into()));
        ledger.take(arrival(came)).await.unwrap();

        let nothing = RereadCounts { rejected: 900, incomplete: 1, ..RereadCounts::default() };
        assert_eq!(again(&ledger, &broken, u64::MAX).await, nothing);
        let all = RereadCounts { taken: 300, ignored: 300, rejected: 300, incomplete: 1, known: 0 };
        assert_eq!(again(&ledger, &fixed, u64::MAX).await, all);
        assert_eq!(ledger.waiting().await, Ok(600));
        assert_eq!(ledger.tally().await.rejects, 301);
        let rest = RereadCounts { rejected: 300, incomplete: 1, ..RereadCounts::default() };
        assert_eq!(again(&ledger, &fixed, u64::MAX).await, rest);

        // Whoever brings the same again brings nothing new, whichever mapping reads it.
        let taken = ledger.take(arrival(read(&fixed, &["lost", "gone"], 300))).await.unwrap();
        assert_eq!((taken.new, taken.known, taken.rejected), (0, 300, 0));
        let taken = ledger.take(arrival(read(&broken, &["lost", "gone"], 300))).await.unwrap();
        assert_eq!((taken.new, taken.known, taken.rejected), (0, 0, 0));
    }

    #[tokio::test]
    async fn what_came_meanwhile_by_its_source_is_known() {
        let ledger = MemoryReceipts::new();
        let fixed = format(FIXED);
        ledger.take(arrival(read(&format(&[]), &["lost"], 10))).await.unwrap();
        ledger.take(arrival(read(&fixed, &["lost"], 4))).await.unwrap();
        let counts = again(&ledger, &fixed, u64::MAX).await;
        assert_eq!(counts, RereadCounts { taken: 6, known: 4, ..RereadCounts::default() });
        assert_eq!((ledger.waiting().await, ledger.tally().await.rejects), (Ok(10), 0));
    }

    #[tokio::test]
    async fn a_limit_counts_what_leaves_the_rejects_and_what_stays_holds_nothing_up() {
        let ledger = MemoryReceipts::new();
        let fixed = format(FIXED);
        ledger.take(arrival(read(&format(&[]), &["gone", "lost", "seen"], 400))).await.unwrap();
        let mut left = 800;
        while left > 0 {
            let counts = again(&ledger, &fixed, 300).await;
            assert_eq!(counts.settled(), left.min(300));
            left -= counts.settled();
        }
        assert_eq!((ledger.waiting().await, ledger.tally().await.rejects), (Ok(400), 400));
        assert_eq!(again(&ledger, &fixed, 0).await, RereadCounts::default());
    }

    #[tokio::test]
    async fn an_answer_that_is_lost_costs_nothing() {
        let ledger = MemoryReceipts::new();
        let fixed = format(FIXED);
        ledger.take(arrival(read(&format(&[]), &["lost"], 300))).await.unwrap();
        ledger.lose_answers(1);
        let (clock, mut counts) = (FakeClock::at(UnixMs(9)), RereadCounts::default());
        let lost = reread(&ledger, &fixed, &"d".into(), 999, &clock, &mut counts).await;
        assert!(matches!(lost, Err(StoreError::Unknown(_))), "{lost:?}");
        again(&ledger, &fixed, u64::MAX).await;
        assert_eq!((ledger.waiting().await, ledger.tally().await.rejects), (Ok(300), 0));
    }
}
