//! The canary: a file's first messages go ahead of the others, and what became of them decides about the rest.
//!
//! The file is held from some row on ([`FileHold`]). While its first messages go, the hold's cause is `Canary`; once all of
//! them were tried and few enough failed, it is `Ramp`, and the row moves on; in the end nothing is held. If too many fail,
//! it is `Errors` and everything waits for an operator. The hold itself is the whole state of this machine: it outlives the
//! process, and an operator may end it at any time.

use std::collections::BTreeMap;

use postrider_settings::Canary;

use super::{
    codec::Damaged,
    file::DestinationCounts,
    finish::percent,
    hold::{FileHold, HoldCause, HoldChange, shortened},
    ledger::{Record, codec},
    outcome::Reason,
    state::MessageState,
    time::UnixMs,
};

/// With fewer messages tried nothing is judged, unless the canary has no more: the first of them may meet a connection that
/// is just being made, a receiver that wakes up.
const TRIED_MIN: u64 = 30;

/// The rate grows in so many steps, each twice as large as the one before: from the size of the canary to a thousand times
/// of that.
const RAMP_STEPS: u64 = 10;

/// Reasons that a hold names, the most frequent first.
const REASONS_MAX: usize = 4;

/// What the reasons of its holds begin with while it goes on.
pub const PREFIX: &str = "canary: ";

/// The standard normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.959_963_985;

/// What became of messages that went ahead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// How many there are.
    pub messages: u64,
    /// With a recorded attempt.
    pub tried: u64,
    /// Of which an attempt failed, whatever became of them since.
    pub failed: u64,
    /// Those, by why and with which status the first attempt failed; 0: no answer.
    pub reasons: BTreeMap<(Reason, u16), u64>,
    /// Those that were given up, by why the last attempt failed.
    pub dead: BTreeMap<(Reason, u16), u64>,
}

impl Trial {
    /// Adds what is recorded of a batch, with its history.
    pub fn add<'a>(
        &mut self,
        record: &Record,
        history: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(), Damaged> {
        let mut firsts: BTreeMap<u32, (u32, u32, Reason, u16)> = BTreeMap::new();
        let mut lasts = firsts.clone();
        for chunk in history {
            for failure in codec::decode_history(chunk)? {
                let attempt = failure.attempt;
                let this = (failure.drive, failure.attempt_number, attempt.reason, attempt.status);
                let first = firsts.entry(failure.index).or_insert(this);
                *first = (*first).min(this);
                let last = lasts.entry(failure.index).or_insert(this);
                *last = (*last).max(this);
            }
        }
        for (index, (_, _, reason, status)) in &firsts {
            if (*index as usize) < record.len() {
                self.failed += 1;
                *self.reasons.entry((*reason, *status)).or_default() += 1;
            }
        }
        let is_dead = |index: &u32| record.states.get(*index as usize) == MessageState::Dead;
        for (_, (_, _, reason, status)) in
            lasts.iter().filter(|(index, _)| (**index as usize) < record.len() && is_dead(index))
        {
            *self.dead.entry((*reason, *status)).or_default() += 1;
        }
        self.messages += record.len() as u64;
        let is_tried = |index: &usize| {
            record.states.get(*index) != MessageState::Accepted || firsts.contains_key(&(*index as u32))
        };
        self.tried += (0..record.len()).filter(is_tried).count() as u64;
        Ok(())
    }

    /// Whether what is recorded of a batch says that attempts of it failed, so that its history is worth a look.
    pub fn needs_history(record: &Record) -> bool {
        let is_failing = |index: usize| {
            matches!(record.states.get(index), MessageState::Retrying | MessageState::Dead)
                || record.tries.get(index).is_some_and(|tries| *tries > 1)
        };
        (0..record.len()).any(is_failing)
    }

    /// As far as counts say it: without reasons, and what failed and was sent since counts as sent.
    pub fn of_counts(counts: &DestinationCounts) -> Self {
        let failed = counts.dead + counts.retrying;
        Self { messages: counts.accepted, tried: counts.sent + failed, failed, ..Self::default() }
    }

    fn is_bad(&self, settings: &Canary) -> bool {
        self.tried >= TRIED_MIN.min(self.messages)
            && wilson_lower(self.failed, self.tried) * 100.0 > f64::from(settings.max_error_percent)
    }

    fn why(&self, settings: &Canary) -> String {
        let Self { tried, failed, .. } = self;
        let at_least = wilson_lower(*failed, *tried) * 100.0;
        let mut reasons: Vec<_> = self.reasons.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let word = |((reason, status), count): &(&(Reason, u16), &u64)| match status {
            0 => format!("{} × {count}", reason.as_str()),
            status => format!("{} {status} × {count}", reason.as_str()),
        };
        let words: Vec<_> = reasons.iter().take(REASONS_MAX).map(word).collect();
        let by_reason = if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) };
        let percent = percent(*failed, *tried);
        shortened(&format!(
            "{percent} % of the first {tried} messages failed{by_reason}; that is at least {at_least:.1} % (95 %), and \
             canary.max_error_percent is {}",
            settings.max_error_percent
        ))
    }
}

/// The lower bound of Wilson's score interval for the share of `failed` among `tried`, at 95 %.
pub fn wilson_lower(failed: u64, tried: u64) -> f64 {
    if failed == 0 || tried == 0 {
        return 0.0;
    }
    let n = tried as f64;
    let share = failed.min(tried) as f64 / n;
    let square = Z * Z;
    let middle = share + square / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + square / (4.0 * n * n)).sqrt();
    ((middle - half) / (1.0 + square / n)).max(0.0)
}

/// How a file stands while its messages wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Rows read so far.
    pub rows: u64,
    /// Messages that they became at the destination.
    pub accepted: u64,
    /// Whether no more will come.
    pub is_closed: bool,
}

impl Extent {
    /// The row that about `messages` messages are before.
    fn row_after(self, messages: u64) -> u64 {
        let rows = u128::from(messages) * u128::from(self.rows.max(1)) / u128::from(self.accepted.max(1));
        u64::try_from(rows).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// How many messages of a file go first, by what is known of its length.
pub fn size(settings: &Canary, accepted: u64) -> u64 {
    u64::from(settings.messages).max(accepted.saturating_mul(settings.percent.into()) / 100)
}

/// The hold that lets a file's first messages go: those before `from_row`.
pub fn first_hold(settings: &Canary, from_row: u64, now: UnixMs) -> FileHold {
    let reason = format!("{PREFIX}its first {} messages go ahead of the others", settings.messages);
    FileHold { since: now, from_row, cause: HoldCause::Canary, reason }
}

/// What becomes of a hold that waits for its canary, by what became of the messages that go ahead; `None`: nothing yet.
pub fn judge(
    settings: &Canary,
    hold: &FileHold,
    extent: Extent,
    trial: &Trial,
    now: UnixMs,
) -> Option<HoldChange> {
    if !hold.cause.passes() {
        return None;
    }
    if !settings.enabled {
        return Some(HoldChange::Pass);
    }
    if trial.is_bad(settings) {
        // All of it: what failed and is to be tried again would only fail again.
        let (cause, reason) = (HoldCause::Errors, trial.why(settings));
        return Some(HoldChange::Judge(FileHold { since: now, from_row: 0, cause, reason }));
    }
    let ramp_ms = u64::try_from(settings.ramp.as_millis()).unwrap_or(u64::MAX);
    let first = size(settings, extent.accepted);
    let wider = extent.row_after(first);
    let (since, may_go) = match hold.cause {
        HoldCause::Canary if trial.tried < trial.messages || trial.messages == 0 => return None,
        HoldCause::Canary if trial.messages < first.min(extent.accepted) && wider > hold.from_row => {
            // It turned out to be a longer file: the canary grows with it.
            let reason = format!("{PREFIX}its first {first} messages go ahead of the others");
            return Some(HoldChange::Judge(FileHold { from_row: wider, reason, ..hold.clone() }));
        }
        HoldCause::Canary => (now, first.saturating_mul(2)),
        _ => {
            let step = now.since(hold.since).as_millis() as u64 * RAMP_STEPS / ramp_ms.max(1);
            let factor = if step >= RAMP_STEPS { u64::MAX } else { 2 << step };
            (hold.since, first.saturating_mul(factor))
        }
    };
    if ramp_ms == 0 || may_go == u64::MAX || (extent.is_closed && may_go >= extent.accepted) {
        return Some(HoldChange::Pass);
    }
    let from_row = extent.row_after(may_go).max(hold.from_row);
    let reason = "its canary went well: the others follow, more and more of them".to_owned();
    let next = FileHold { since, from_row, cause: HoldCause::Ramp, reason };
    (next != *hold).then_some(HoldChange::Judge(next))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use postrider_settings::Keys as _;
    use proptest::prelude::*;

    use super::*;

    fn settings() -> Canary {
        Canary { ramp: Duration::from_secs(10), ..Canary::declared() }
    }

    fn trial(messages: u64, tried: u64, failed: u64) -> Trial {
        let reasons = [((Reason::Status, 503), failed)].into_iter().filter(|(_, count)| *count > 0).collect();
        Trial { messages, tried, failed, reasons, ..Trial::default() }
    }

    fn closed(accepted: u64) -> Extent {
        Extent { rows: accepted, accepted, is_closed: true }
    }

    const NOW: UnixMs = UnixMs(1_000_000);

    fn at(ms: u64) -> UnixMs {
        UnixMs(NOW.0 + ms)
    }

    #[test]
    fn wilson_s_bound_is_that_of_the_tables() {
        for (failed, tried, expected) in [
            (0, 200, 0.0),
            (1, 1, 0.2065),
            (10, 200, 0.0274),
            (60, 200, 0.2408),
            (200, 200, 0.9812),
            (0, 0, 0.0),
        ] {
            let found = wilson_lower(failed, tried);
            assert!((found - expected).abs() < 5e-4, "{failed} of {tried}: {found}");
        }
    }

    #[test]
    fn b14_too_many_failures_hold_the_file_with_their_reasons() {
        let hold = first_hold(&settings(), 201, NOW);
        let mut bad = trial(200, 200, 60);
        bad.reasons = [((Reason::Status, 503), 50), ((Reason::Timeout, 0), 10)].into();
        let Some(HoldChange::Judge(held)) = judge(&settings(), &hold, closed(1_000_000), &bad, at(5)) else {
            panic!("it is held")
        };
        assert_eq!((held.cause, held.from_row, held.since), (HoldCause::Errors, 0, at(5)));
        let words = "30 % of the first 200 messages failed: status 503 × 50, timeout × 10; that is at least 24.1 % (95 %), and \
                     canary.max_error_percent is 10";
        assert_eq!(held.reason, words);
        assert_eq!(judge(&settings(), &held, closed(1_000_000), &bad, at(9)), None, "an operator goes on");
    }

    #[test]
    fn b14_a_canary_is_as_large_as_its_file_turns_out_to_need() {
        let hold = first_hold(&settings(), 201, NOW);
        assert_eq!(judge(&settings(), &hold, closed(1_000_000), &trial(200, 199, 0), NOW), None);
        let good = trial(200, 200, 0);
        let Some(HoldChange::Judge(wider)) = judge(&settings(), &hold, closed(1_000_000), &good, NOW) else {
            panic!("it grows")
        };
        assert_eq!((wider.cause, wider.from_row), (HoldCause::Canary, 10_001));
        let good = trial(10_000, 10_000, 0);
        let Some(HoldChange::Judge(ramp)) = judge(&settings(), &wider, closed(1_000_000), &good, NOW) else {
            panic!("it went well")
        };
        assert_eq!((ramp.cause, ramp.from_row), (HoldCause::Ramp, 20_001));
        assert_eq!(judge(&settings(), &ramp, closed(1_000_000), &good, at(999)), None);
        let Some(HoldChange::Judge(later)) = judge(&settings(), &ramp, closed(1_000_000), &good, at(3_000))
        else {
            panic!("more follow")
        };
        assert_eq!((later.since, later.from_row), (NOW, 160_001));
        assert_eq!(judge(&settings(), &ramp, closed(1_000_000), &good, at(10_000)), Some(HoldChange::Pass));
    }

    /// Where most of the first rows were rejected, there are fewer messages before the edge than it is meant to have.
    #[test]
    fn b14_a_canary_that_can_t_grow_is_large_enough() {
        let hold = first_hold(&settings(), 10_001, NOW);
        let few = trial(300, 300, 0);
        let Some(HoldChange::Judge(ramp)) = judge(&settings(), &hold, closed(1_000_000), &few, NOW) else {
            panic!("it goes on")
        };
        assert_eq!(ramp.cause, HoldCause::Ramp);
    }

    #[test]
    fn who_switches_it_off_holds_nothing_any_more() {
        let off = Canary { enabled: false, ..settings() };
        let hold = first_hold(&off, 201, NOW);
        assert_eq!(judge(&off, &hold, closed(9), &trial(200, 0, 0), NOW), Some(HoldChange::Pass));
        let at_once = Canary { ramp: Duration::ZERO, ..settings() };
        let good = trial(200, 200, 0);
        assert_eq!(judge(&at_once, &hold, closed(10_000), &good, NOW), Some(HoldChange::Pass));
    }

    proptest! {
        #[test]
        fn the_bound_is_a_share_below_what_was_seen_and_grows_with_it(tried in 1u64..100_000, share in 0.0f64..1.0) {
            let failed = (tried as f64 * share) as u64;
            let bound = wilson_lower(failed, tried);
            prop_assert!((0.0..=1.0).contains(&bound));
            prop_assert!(bound <= failed as f64 / tried as f64);
            prop_assert!(wilson_lower(failed + 1, tried.max(failed + 1)) >= bound);
        }

        /// However the file is read and whatever its canary does: rows are let go in order and never taken back but all at
        /// once; what is well ends in nothing held, what is not in a hold.
        #[test]
        fn b14_it_comes_to_an_end_and_never_takes_a_row_back(
            accepted in 1u64..3_000_000, read_ms in 0u64..5_000, messages in 1u32..5_000, percent in 0u32..=100,
            percent_failing in 0u64..=100, step_ms in 1u64..700, ramp_s in 0u64..40,
        ) {
            let settings = Canary {
                enabled: true, messages, percent, min_rows: 1, max_error_percent: 5, ramp: Duration::from_secs(ramp_s),
            };
            let mut hold = first_hold(&settings, u64::from(messages) + 1, NOW);
            let mut ended = None;
            let mut now = 0;
            while now < read_ms + 200_000 {
                now += step_ms;
                let rows = if now >= read_ms { accepted } else { (accepted * now / read_ms).max(1) };
                let extent = Extent { rows, accepted: rows, is_closed: now >= read_ms };
                let ahead = (hold.from_row - 1).min(rows);
                let trial = trial(ahead, ahead, ahead * percent_failing / 100);
                match judge(&settings, &hold, extent, &trial, at(now)) {
                    None => {}
                    Some(HoldChange::Judge(next)) if next.cause == HoldCause::Errors => {
                        ended = Some(next.cause);
                        break;
                    }
                    Some(change @ HoldChange::Judge(_)) => {
                        let next = change.apply(Some(&hold)).expect("it changes something").expect("to another hold");
                        prop_assert!(next.from_row >= hold.from_row && next.cause >= hold.cause);
                        prop_assert!(next != hold);
                        hold = next;
                    }
                    Some(HoldChange::Pass) => {
                        ended = Some(HoldCause::Ramp);
                        break;
                    }
                    Some(other) => prop_assert!(false, "{other:?}"),
                }
            }
            prop_assert!(ended.is_some(), "still {hold:?}");
            if percent_failing == 0 {
                prop_assert_eq!(ended, Some(HoldCause::Ramp));
            }
            if percent_failing >= 30 && accepted >= 30 && messages >= 30 {
                prop_assert_eq!(ended, Some(HoldCause::Errors));
            }
        }
    }
}
