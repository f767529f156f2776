//! A hold: a fact of a file at one destination (B11). It says which of the file's messages wait though they are due, since
//! when and why. It is one row, however many messages wait, and no batch is changed by it.

use serde::{Deserialize, Serialize};

use super::{
    batch::BatchHeader,
    ids::FileId,
    time::{UnixMs, as_rfc3339},
};

/// Bytes of a reason that are kept: where several machines share a store, each of them reads it every second.
pub const REASON_MAX: usize = 256;

/// Who holds messages. A later one outweighs an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum HoldCause {
    /// The file's first messages go ahead of the others.
    Canary = 0,
    /// They went well: the others follow, more and more of them.
    Ramp = 1,
    /// They did not.
    Errors = 2,
    /// An operator.
    Operator = 3,
    /// An operator, for ever: what is open is being cancelled.
    Cancelled = 4,
}

impl HoldCause {
    /// Reads back what was stored.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Canary, Self::Ramp, Self::Errors, Self::Operator, Self::Cancelled]
            .into_iter()
            .find(|cause| *cause as u8 == byte)
    }

    /// Whether the messages go on by themselves, if all goes well.
    pub fn passes(self) -> bool {
        matches!(self, Self::Canary | Self::Ramp)
    }
}

/// Why messages of a file wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHold {
    /// Since when.
    #[serde(with = "as_rfc3339")]
    pub since: UnixMs,
    /// Batches whose first row is this one or a later one wait.
    pub from_row: u64,
    /// Who holds them.
    pub cause: HoldCause,
    /// Why, for the operator.
    pub reason: String,
}

impl FileHold {
    /// Of all messages, by an operator.
    pub fn by_operator(since: UnixMs, reason: &str) -> Self {
        Self { since, from_row: 0, cause: HoldCause::Operator, reason: shortened(reason) }
    }

    /// Of all messages, for ever.
    pub fn cancelled(since: UnixMs, reason: &str) -> Self {
        Self { cause: HoldCause::Cancelled, ..Self::by_operator(since, reason) }
    }

    /// Whether the batch that begins with `first_row` waits.
    pub fn covers(&self, first_row: u64) -> bool {
        first_row >= self.from_row
    }
}

/// A reason, cut to what is kept of it.
pub fn shortened(reason: &str) -> String {
    reason[..reason.floor_char_boundary(REASON_MAX)].to_owned()
}

/// A file that is held at a destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldFile {
    /// The file.
    pub file: FileId,
    /// Its feed.
    pub feed: String,
    /// Its name.
    pub name: String,
    /// The destination.
    pub destination: String,
    /// What is held, and why.
    pub hold: FileHold,
}

impl HeldFile {
    /// Whether it makes the batch with this header and first row wait.
    pub fn covers(&self, header: &BatchHeader, first_row: u64) -> bool {
        self.file == header.file && self.destination == header.destination && self.hold.covers(first_row)
    }
}

/// A change of a hold. Repeating it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldChange {
    /// These messages wait from now on. The first hold by one cause stands; one that outweighs it replaces it.
    Hold(FileHold),
    /// The canary's word: only if the file still waits for it.
    Judge(FileHold),
    /// The canary's last word: nothing waits for it any more.
    Pass,
    /// An operator's: nothing waits any more, whoever held it. What is cancelled stays so.
    Release,
    /// Every message of it has ended, cancelled or because its time was over: there is nothing to hold any more.
    Ended,
}

impl HoldChange {
    /// What holds with this change instead of `current`; `None` if it changes nothing.
    pub fn apply(&self, current: Option<&FileHold>) -> Option<Option<FileHold>> {
        let waits_for_canary = current.is_some_and(|hold| hold.cause.passes());
        let is_cancelled = current.is_some_and(|hold| hold.cause == HoldCause::Cancelled);
        match self {
            Self::Hold(new) => current.is_none_or(|hold| hold.cause < new.cause).then(|| Some(new.clone())),
            Self::Judge(new) => (waits_for_canary && current != Some(new)).then(|| Some(new.clone())),
            Self::Pass => waits_for_canary.then_some(None),
            Self::Release => (current.is_some() && !is_cancelled).then_some(None),
            Self::Ended => current.is_some().then_some(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAUSES: [HoldCause; 5] =
        [HoldCause::Canary, HoldCause::Ramp, HoldCause::Errors, HoldCause::Operator, HoldCause::Cancelled];

    fn hold(cause: HoldCause, from_row: u64) -> FileHold {
        FileHold { since: UnixMs(7), from_row, cause, reason: "why".into() }
    }

    #[test]
    fn what_an_operator_says_outweighs_the_canary_and_not_the_other_way_round() {
        let by_operator = hold(HoldCause::Operator, 0);
        let canary = hold(HoldCause::Canary, 201);
        assert_eq!(
            HoldChange::Hold(by_operator.clone()).apply(Some(&canary)),
            Some(Some(by_operator.clone()))
        );
        for change in [
            HoldChange::Hold(canary.clone()),
            HoldChange::Hold(FileHold { since: UnixMs(9), ..by_operator.clone() }),
            HoldChange::Judge(hold(HoldCause::Errors, 201)),
            HoldChange::Pass,
        ] {
            assert_eq!(change.apply(Some(&by_operator)), None, "{change:?}");
        }
        assert_eq!(HoldChange::Release.apply(Some(&by_operator)), Some(None));
    }

    #[test]
    fn the_canary_says_nothing_of_a_file_that_was_released() {
        for change in [HoldChange::Judge(hold(HoldCause::Errors, 201)), HoldChange::Pass, HoldChange::Release]
        {
            assert_eq!(change.apply(None), None);
        }
    }

    #[test]
    fn every_change_made_twice_changes_nothing_the_second_time() {
        let causes = CAUSES;
        let holds: Vec<_> = causes.into_iter().map(|cause| hold(cause, 5)).collect();
        let changes =
            holds.iter().cloned().flat_map(|hold| [HoldChange::Hold(hold.clone()), HoldChange::Judge(hold)]);
        for change in changes.chain([HoldChange::Pass, HoldChange::Release, HoldChange::Ended]) {
            for current in holds.iter().map(Some).chain([None]) {
                if let Some(next) = change.apply(current) {
                    assert_eq!(change.apply(next.as_ref()), None, "{change:?} over {current:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_cancelled_is_not_released() {
        let cancelled = hold(HoldCause::Cancelled, 0);
        let change = HoldChange::Hold(cancelled.clone());
        assert_eq!(change.apply(Some(&hold(HoldCause::Operator, 0))), Some(Some(cancelled.clone())));
        for change in [HoldChange::Release, HoldChange::Pass, HoldChange::Hold(hold(HoldCause::Operator, 0))]
        {
            assert_eq!(change.apply(Some(&cancelled)), None, "{change:?}");
        }
        assert_eq!(HoldChange::Ended.apply(Some(&cancelled)), Some(None));
    }

    #[test]
    fn a_cause_reads_back() {
        for cause in CAUSES {
            assert_eq!(HoldCause::from_byte(cause as u8), Some(cause));
        }
        assert_eq!(HoldCause::from_byte(5), None);
    }
}
