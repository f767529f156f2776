//! Whether many messages fail for good because of a slip of the operator: a wrong secret, address or template (F68).
//!
//! A permanent failure (4xx that is not retried, a redirect, a body that can't be rendered) that neither this file nor this
//! configuration has had before is *undecided*: its message is neither given up nor tried again until it is known whether
//! the destination is used wrongly. It is when such failures are `percent` of the file's part of the last 500 attempts, of
//! 20 attempts at least. Then the destination is *suspect*: it is paused, and all undecided messages stay open. A failure
//! that stays below that for 500 attempts is *ordinary* for the file: its messages are dead at once.
//!
//! What began before a new configuration, or before an operator resumed the destination, is judged by neither.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use crate::model::{ids::FileId, outcome::Reason};

/// Attempts that are looked back on.
const WINDOW: usize = 500;

/// Attempts of a file that a share is taken of.
const ATTEMPTS_MIN: usize = 20;

/// What the reason of a destination that is paused for this begins with.
pub const SUSPECT: &str = "suspect configuration";

/// Kinds of failures that are remembered, of all files: the latest (I8).
const KINDS_MAX: usize = 256;

/// How messages fail for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PermanentFailure {
    /// The HTTP status, 0 without an answer.
    pub status: u16,
    /// Why.
    reason: u8,
}

impl PermanentFailure {
    /// By what an outcome says.
    pub fn new(status: u16, reason: Reason) -> Self {
        Self { status, reason: reason as u8 }
    }
}

impl fmt::Display for PermanentFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, Reason::from_byte(self.reason)) {
            (0, Some(Reason::Render)) => f.write_str("the body can't be rendered"),
            (0, reason) => f.write_str(reason.map_or("unknown", Reason::as_str)),
            (status, _) => write!(f, "status {status}"),
        }
    }
}

/// What a permanent failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The message is dead.
    Ordinary,
    /// It is not known yet.
    Undecided,
    /// The destination is used wrongly; the message stays open.
    Suspect,
    /// It says nothing of the destination as it is used now; the message stays open.
    Outdated,
}

/// Why a destination is suspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// The most frequent failure.
    pub failure: PermanentFailure,
    /// Attempts that failed for good …
    pub failed: usize,
    /// … of so many.
    pub attempts: usize,
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failure, failed, attempts } = self;
        write!(f, "{SUSPECT}: {failed} of {attempts} messages failed for good ({failure})")
    }
}

/// What is known of one destination since its configuration was read.
#[derive(Clone, Debug, Default)]
pub struct Storm {
    /// The share that is too much; 0 switches it off.
    percent: u8,
    /// The last attempts: of which file, and how each failed.
    recent: VecDeque<(FileId, Option<PermanentFailure>)>,
    /// Attempts so far.
    attempts: u64,
    /// After how many attempts a failure of a file was seen first.
    seen: BTreeMap<(FileId, PermanentFailure), u64>,
    suspicion: Option<Suspicion>,
    /// How often the destination has got another configuration, or was resumed.
    epoch: u32,
}

impl Storm {
    /// With a share in percent that is too much; 0 switches it off.
    pub fn new(percent: u8) -> Self {
        Self { percent, ..Self::default() }
    }

    /// Nothing is held against the destination from now on, and nothing that began before counts.
    pub fn renew(&mut self, percent: u8) {
        *self = Self { epoch: self.epoch.wrapping_add(1), ..Self::new(percent) };
    }

    /// What an attempt that begins now is judged by.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Why the destination is suspect, if it is.
    pub fn suspicion(&self) -> Option<&Suspicion> {
        self.suspicion.as_ref()
    }

    /// An attempt at a message of `file` that began in `epoch` ended, and whether for good. What that means.
    pub fn ended(&mut self, epoch: u32, file: FileId, failure: Option<PermanentFailure>) -> Judgement {
        if epoch != self.epoch {
            return if failure.is_some() { Judgement::Outdated } else { Judgement::Ordinary };
        }
        self.attempts += 1;
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back((file, failure));
        let Some(failure) = failure else { return Judgement::Ordinary };
        if self.judge(epoch, file, failure) == Judgement::Undecided {
            self.suspect(file);
        }
        self.judge(epoch, file, failure)
    }

    /// What such a failure of that file, of an attempt that began in `epoch`, means by now.
    pub fn judge(&mut self, epoch: u32, file: FileId, failure: PermanentFailure) -> Judgement {
        if epoch != self.epoch {
            return Judgement::Outdated;
        }
        if self.percent == 0 {
            return Judgement::Ordinary;
        }
        let attempts = self.attempts;
        self.seen.entry((file, failure)).or_insert(attempts);
        if self.seen.len() > KINDS_MAX
            && let Some(oldest) = self.seen.iter().min_by_key(|(_, first)| **first).map(|(kind, _)| *kind)
        {
            self.seen.remove(&oldest);
        }
        if self.suspicion.is_some() {
            Judgement::Suspect
        } else if self.is_ordinary(file, failure) {
            Judgement::Ordinary
        } else {
            Judgement::Undecided
        }
    }

    fn is_ordinary(&self, file: FileId, failure: PermanentFailure) -> bool {
        self.seen.get(&(file, failure)).is_some_and(|first| self.attempts - first >= WINDOW as u64)
    }

    fn suspect(&mut self, file: FileId) {
        let of_file = self.recent.iter().filter(|(of, _)| *of == file).map(|(_, failure)| *failure);
        let (mut attempts, mut counts) = (0, BTreeMap::new());
        for failure in of_file {
            attempts += 1;
            if let Some(failure) = failure.filter(|failure| !self.is_ordinary(file, *failure)) {
                *counts.entry(failure).or_insert(0) += 1;
            }
        }
        let failed: usize = counts.values().sum();
        if attempts >= ATTEMPTS_MIN && failed * 100 >= attempts * usize::from(self.percent) {
            let most = counts.into_iter().max_by_key(|(_, count)| *count);
            self.suspicion = most.map(|(failure, _)| Suspicion { failure, failed, attempts });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: FileId = FileId([1; 16]);
    const OTHER: FileId = FileId([2; 16]);

    fn status(status: u16) -> PermanentFailure {
        PermanentFailure::new(status, Reason::Status)
    }

    /// The messages that are dead by the time it is decided: those judged ordinary.
    fn dead(storm: &mut Storm, file: FileId, count: usize, failure: impl Fn(usize) -> u16) -> usize {
        (0..count)
            .filter(|&nth| match failure(nth) {
                200 => storm.ended(0, file, None) == Judgement::Suspect,
                code => storm.ended(0, file, Some(status(code))) == Judgement::Ordinary,
            })
            .count()
    }

    #[test]
    fn f68_a_wrong_secret_or_address_is_found_within_20_attempts_and_kills_nothing() {
        for code in [401, 403, 404, 302] {
            let mut storm = Storm::new(20);
            assert_eq!(dead(&mut storm, FILE, 19, |_| code), 0);
            assert_eq!(storm.suspicion(), None);
            assert_eq!(dead(&mut storm, FILE, 1, |_| code), 0);
            let suspicion = storm.suspicion().unwrap();
            assert_eq!((suspicion.failed, suspicion.attempts, suspicion.failure.status), (20, 20, code));
        }
        let mut storm = Storm::new(20);
        let failure = PermanentFailure::new(0, Reason::Render);
        (0..20).for_each(|_| assert_ne!(storm.ended(0, FILE, Some(failure)), Judgement::Ordinary));
        let text = storm.suspicion().unwrap().to_string();
        assert_eq!(
            text,
            "suspect configuration: 20 of 20 messages failed for good (the body can't be rendered)"
        );
    }

    #[test]
    fn f68_one_that_begins_in_the_middle_is_found_before_500_attempts_more() {
        let mut storm = Storm::new(20);
        assert_eq!(dead(&mut storm, FILE, 5_000, |nth| if nth % 50 == 0 { 404 } else { 200 }), 90);
        // The receiver's usual 2 % go on, and somebody revokes the secret.
        let failed = (1..1_000).find(|_| storm.ended(0, FILE, Some(status(401))) == Judgement::Suspect);
        assert_eq!(failed, Some(100));
        assert_eq!(storm.suspicion().unwrap().failure.status, 401);
    }

    #[test]
    fn a_failure_of_which_no_attempt_counts_becomes_ordinary_too() {
        // One message of each bundle, and none of them is the one that stands for its bundle.
        let mut storm = Storm::new(20);
        let mut judged = (0..600).map(|_| {
            storm.ended(0, FILE, None);
            storm.judge(0, FILE, status(404))
        });
        assert_eq!(judged.find(|judged| *judged != Judgement::Undecided), Some(Judgement::Ordinary));
    }

    #[test]
    fn failures_that_are_usual_for_a_receiver_are_no_storm_and_another_file_is_looked_at_anew() {
        let mut storm = Storm::new(20);
        let of_first = dead(&mut storm, FILE, 2_000, |nth| if nth % 10 == 0 { 404 } else { 200 });
        assert_eq!((of_first, storm.suspicion()), (150, None));
        assert_eq!(dead(&mut storm, OTHER, 20, |_| 404), 0);
        assert!(storm.suspicion().is_some());
        let mut off = Storm::new(0);
        assert_eq!((dead(&mut off, FILE, 100, |_| 404), off.suspicion()), (100, None));
    }

    #[test]
    fn f68_what_began_before_the_destination_was_resumed_kills_nothing() {
        let mut storm = Storm::new(20);
        assert_eq!(dead(&mut storm, FILE, 20, |_| 401), 0);
        storm.renew(20);
        assert_eq!(storm.judge(0, FILE, status(401)), Judgement::Outdated);
        for _ in 0..100 {
            assert_eq!(storm.ended(0, FILE, Some(status(401))), Judgement::Outdated);
        }
        assert_eq!(storm.suspicion(), None, "nor is it held against the new one");
        assert_eq!(storm.ended(storm.epoch(), FILE, Some(status(401))), Judgement::Undecided);
    }

    proptest! {
        #[test]
        fn nothing_is_given_up_before_its_failure_is_known_to_be_ordinary_and_memory_is_bounded(
            percent in 1u8..=100,
            steps in prop::collection::vec((0u8..3, 0u8..4), 1..2_000),
        ) {
            let mut storm = Storm::new(percent);
            let mut first = BTreeMap::new();
            for (nth, (file, code)) in steps.into_iter().enumerate() {
                let file = FileId([file; 16]);
                let failure = (code != 0).then(|| status(400 + u16::from(code)));
                let judged = storm.ended(0, file, failure);
                if let Some(failure) = failure {
                    let seen = *first.entry((file, failure)).or_insert(nth);
                    prop_assert!(judged != Judgement::Ordinary || nth - seen >= WINDOW);
                    prop_assert_eq!(judged == Judgement::Suspect, storm.suspicion().is_some());
                }
                prop_assert!(storm.recent.len() <= WINDOW && storm.seen.len() <= KINDS_MAX);
            }
        }
    }
}
