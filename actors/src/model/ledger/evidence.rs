//! What is known of the messages that were in flight when a process died (B17): who is charged with it, who is not,
//! and when one that is charged is begun again.

use std::{collections::BTreeMap, time::Duration};

use super::record::{Exception, Record};
use crate::model::{ids::BatchId, suspect::is_condemned, time::UnixMs};

/// A suspect is not begun before the process that has its batch has lived this long: it must not keep the others from
/// being sent, nor be charged for one kill after another.
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
    /// those messages are charged; the batch's others are no suspects.
    pub fn lose_by(&mut self, evidence: &Evidence, batch: BatchId) {
        let Evidence(Some(by_batch)) = evidence else { return self.lose() };
        let in_flight = by_batch.get(&batch).map(Vec::as_slice).unwrap_or_default();
        let Some(in_flight) = in_flight.iter().copied().collect::<Option<Vec<_>>>() else {
            return self.lose();
        };
        if self.holder.is_some() {
            self.charge(&in_flight, evidence.len() == Some(1));
        }
    }

    /// Whether a message of it was in flight when a process died, and is not recorded since.
    pub fn has_suspects(&self) -> bool {
        self.exceptions.values().any(|exception| exception.losses > 0)
    }

    /// Holds the suspects back for the beginning of the life of the process that was born at `born`; not those that are
    /// condemned, because they are not sent.
    pub(super) fn hold_suspects(&mut self, born: UnixMs) {
        let waits =
            |exception: &&mut Exception| exception.losses > 0 && !is_condemned(exception.losses_alone);
        for exception in self.exceptions.values_mut().filter(waits) {
            exception.not_before = exception.not_before.max(born.after(exception.suspect_wait()));
        }
    }
}

impl Exception {
    /// How long the message waits in a process' life for having been in flight when others died.
    pub(super) fn suspect_wait(&self) -> Duration {
        let more = |before: u8| SUSPECTS_WAIT + SUSPECTS_STEP * u32::from(before);
        self.losses.checked_sub(1).map_or(Duration::ZERO, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ledger::Deadline;

    const BATCH: BatchId = BatchId([1; 16]);

    fn leased() -> Record {
        let mut record = Record::new(4, UnixMs(0), UnixMs(0));
        record.lease("w", Deadline(9), Deadline(0), UnixMs(0), UnixMs(0));
        record
    }

    fn charges(record: &Record) -> Vec<(u32, u8, u8)> {
        record.exceptions.iter().map(|(index, e)| (*index, e.losses, e.losses_alone)).collect()
    }

    #[test]
    fn only_what_was_in_flight_is_charged_and_waits() {
        let mut record = leased();
        let evidence = Evidence::of([(BATCH, Some(2)), (BATCH, Some(0)), (BatchId([2; 16]), Some(1))]);
        record.lose_by(&evidence, BATCH);
        assert_eq!(charges(&record), [(0, 1, 0), (2, 1, 0)]);
        assert_eq!((record.losses, &record.holder), (0, &None));
        // One that was in flight again, this time by itself.
        record.lease("w", Deadline(9), Deadline(0), UnixMs(40_000), UnixMs(0));
        record.lose_by(&Evidence::of([(BATCH, Some(2))]), BATCH);
        assert_eq!(charges(&record), [(0, 1, 0), (2, 2, 1)]);
        assert!(is_exclusive(3) && !is_exclusive(2));
    }

    #[test]
    fn f09_a_suspect_waits_its_time_whatever_the_schedule_and_no_longer_whatever_the_clock() {
        let mut record = leased();
        record.lose_by(&Evidence::of([(BATCH, Some(2))]), BATCH);
        let (born, schedule) = (UnixMs(1_000_000), Duration::from_secs(1));
        record.lease("w", Deadline(9), Deadline(0), born, born);
        record.release(record.fence);
        assert!(!record.cut_waits(born.after(schedule), born), "the schedule's waits are shorter");
        assert_eq!(record.due_of(2), born.after(SUSPECTS_WAIT));
        let set_back = UnixMs(500_000);
        assert!(record.cut_waits(set_back.after(schedule), set_back));
        assert_eq!(record.due_of(2), set_back);
    }

    #[test]
    fn suspects_wait_for_a_process_that_lives_and_the_least_charged_begin_first() {
        let mut record = leased();
        record.lose_by(&Evidence::of([(BATCH, Some(2)), (BATCH, Some(0))]), BATCH);
        let born = UnixMs(1_000_000);
        record.lease("w", Deadline(9), Deadline(0), born, born);
        assert_eq!((record.due_of(2), record.due_of(1)), (born.after(SUSPECTS_WAIT), UnixMs(0)));
        // It was killed before they were begun: the next process makes them wait as long again.
        record.lose_by(&Evidence::of([]), BATCH);
        let born = UnixMs(2_000_000);
        record.lease("w", Deadline(9), Deadline(0), born, born);
        assert_eq!(record.due_of(2), born.after(SUSPECTS_WAIT));
        record.lose_by(&Evidence::of([(BATCH, Some(2))]), BATCH);
        record.lease("w", Deadline(9), Deadline(0), born, born);
        let begins = [record.due_of(0), record.due_of(2)];
        assert_eq!(begins, [born.after(SUSPECTS_WAIT), born.after(SUSPECTS_WAIT + SUSPECTS_STEP)]);
        // A process that has lived for long begins them at once.
        record.release(record.fence);
        let later = born.after(SUSPECTS_WAIT * 10);
        record.lease("w", Deadline(9), Deadline(0), later, born);
        assert!(record.due_of(2) < later);
    }

    #[test]
    fn without_evidence_the_batch_goes_one_by_one() {
        let whole = Evidence::of([(BATCH, None), (BATCH, Some(1))]);
        for evidence in [Evidence::unknown(), whole] {
            let mut record = leased();
            record.lose_by(&evidence, BATCH);
            assert_eq!((record.losses, charges(&record)), (1, vec![]));
        }
        let mut free = Record::new(4, UnixMs(0), UnixMs(0));
        free.lose_by(&Evidence::of([(BATCH, Some(1))]), BATCH);
        assert_eq!(free, Record::new(4, UnixMs(0), UnixMs(0)), "it was not leased");
    }

    #[test]
    fn nothing_in_flight_charges_nothing() {
        let mut record = leased();
        record.lose_by(&Evidence::of([]), BATCH);
        assert_eq!((record.losses, charges(&record), record.due()), (0, vec![], Some(UnixMs(0))));
    }
}
