//! What is known of the messages that were in flight when a process died (B17): who is charged with it, and who is not.

use std::{collections::BTreeMap, time::Duration};

use super::record::Record;
use crate::model::{ids::BatchId, time::UnixMs};

/// A suspect is not begun before its new process has lived this long: it must not keep the others from being sent.
/// Where crashes are made on purpose, one after the other, nobody waits half a minute for each.
const SUSPECTS_WAIT: Duration = Duration::from_secs(if cfg!(feature = "failpoints") { 5 } else { 30 });

/// And this much longer for each further death that it was in flight in: the least charged first.
const SUSPECTS_STEP: Duration = Duration::from_secs(5);

/// Deaths in which a message was in flight, from which on it is sent while nothing else of its process is: that holds
/// everybody up, so twice may be bad luck (F73).
const EXCLUSIVE_DEATHS: u8 = 3;

/// Whether a message that was in flight in so many deaths is sent alone.
pub fn is_exclusive(deaths: u8) -> bool {
    deaths >= EXCLUSIVE_DEATHS
}

/// What was in flight in a process when it died.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence(Option<BTreeMap<BatchId, Vec<Option<u32>>>>);

impl Evidence {
    /// Nothing is known: another machine's process, or a machine that lost its power.
    pub fn unknown() -> Self {
        Self(None)
    }

    /// All that was in flight: messages by batch and index; `None` if it is not known which messages of
    /// the batch: they travelled in one statement.
    pub fn of(in_flight: impl IntoIterator<Item = (BatchId, Option<u32>)>) -> Self {
        let mut by_batch: BTreeMap<BatchId, Vec<Option<u32>>> = BTreeMap::new();
        for (batch, index) in in_flight {
            by_batch.entry(batch).or_default().push(index);
        }
        Self(Some(by_batch))
    }

    /// How many messages were in flight, if it is known.
    pub fn len(&self) -> Option<usize> {
        self.0.as_ref().map(|by_batch| by_batch.values().map(Vec::len).sum())
    }

    /// Whether it is known that nothing was in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

impl Record {
    /// Ends whatever lease there is, whose holder died with its process. Where it is known what was in flight, only
    /// those messages are charged, and wait for a while; the batch's others are no suspects.
    pub fn lose_by(&mut self, evidence: &Evidence, batch: BatchId, now: UnixMs) {
        let Evidence(Some(by_batch)) = evidence else { return self.lose() };
        let in_flight = by_batch.get(&batch).map(Vec::as_slice).unwrap_or_default();
        let Some(in_flight) = in_flight.iter().copied().collect::<Option<Vec<_>>>() else {
            return self.lose();
        };
        if self.holder.is_some() {
            self.charge(&in_flight, evidence.len() == Some(1));
            for index in in_flight {
                self.amend(index as usize, |exception| {
                    let more = SUSPECTS_STEP * u32::from(exception.losses.saturating_sub(1));
                    exception.not_before = exception.not_before.max(now.after(SUSPECTS_WAIT + more));
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ledger::Deadline;

    const BATCH: BatchId = BatchId([1; 16]);

    fn leased() -> Record {
        let mut record = Record::new(4, UnixMs(0), UnixMs(0));
        record.lease("w", Deadline(9), Deadline(0), UnixMs(0));
        record
    }

    fn charges(record: &Record) -> Vec<(u32, u8, u8)> {
        record.exceptions.iter().map(|(index, e)| (*index, e.losses, e.losses_alone)).collect()
    }

    #[test]
    fn only_what_was_in_flight_is_charged_and_waits() {
        let mut record = leased();
        let evidence = Evidence::of([(BATCH, Some(2)), (BATCH, Some(0)), (BatchId([2; 16]), Some(1))]);
        record.lose_by(&evidence, BATCH, UnixMs(1_000));
        assert_eq!(charges(&record), [(0, 1, 0), (2, 1, 0)]);
        assert_eq!((record.due_of(2), record.due_of(1)), (UnixMs(1_000).after(SUSPECTS_WAIT), UnixMs(0)));
        assert_eq!((record.losses, &record.holder), (0, &None));
        // One that was in flight again, this time by itself.
        record.lease("w", Deadline(9), Deadline(0), UnixMs(40_000));
        record.lose_by(&Evidence::of([(BATCH, Some(2))]), BATCH, UnixMs(50_000));
        assert_eq!(charges(&record), [(0, 1, 0), (2, 2, 1)]);
        assert_eq!(
            record.due_of(2),
            UnixMs(50_000).after(SUSPECTS_WAIT + SUSPECTS_STEP),
            "the least charged first"
        );
        assert!(is_exclusive(3) && !is_exclusive(2));
    }

    #[test]
    fn without_evidence_the_batch_goes_one_by_one() {
        let whole = Evidence::of([(BATCH, None), (BATCH, Some(1))]);
        for evidence in [Evidence::unknown(), whole] {
            let mut record = leased();
            record.lose_by(&evidence, BATCH, UnixMs(1_000));
            assert_eq!((record.losses, charges(&record)), (1, vec![]));
        }
        let mut free = Record::new(4, UnixMs(0), UnixMs(0));
        free.lose_by(&Evidence::of([(BATCH, Some(1))]), BATCH, UnixMs(1_000));
        assert_eq!(free, Record::new(4, UnixMs(0), UnixMs(0)), "it was not leased");
    }

    #[test]
    fn nothing_in_flight_charges_nothing() {
        let mut record = leased();
        record.lose_by(&Evidence::of([]), BATCH, UnixMs(1_000));
        assert_eq!((record.losses, charges(&record), record.due()), (0, vec![], Some(UnixMs(0))));
    }
}
