use std::collections::HashMap;

use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        outcome::{DeathCause, Reason},
    },
    ports::console::DeadLetter,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Time, message::answered};

/// A message that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Dead {
    /// As in the header `webhook-id`.
    pub(crate) id: String,
    pub(crate) file: String,
    pub(crate) file_name: String,
    pub(crate) row: u64,
    pub(crate) destination: String,
    /// When it was given up.
    pub(crate) at: Time,
    pub(crate) attempts: u32,
    /// Of the last answer; `null`: there was none.
    pub(crate) status: Option<u16>,
    /// Why the last attempt failed.
    pub(crate) reason: &'static str,
    /// Why there was no other.
    pub(crate) cause: &'static str,
    /// What the destination said of it: the first line of its last answer, or a table's words.
    pub(crate) detail: Option<String>,
    pub(crate) recipient: String,
}

impl Dead {
    /// With its recipient, which has to be looked up.
    pub(crate) fn of(letter: &DeadLetter, recipient: String) -> Self {
        Self {
            id: MessageId { file: letter.file, row: letter.row }.to_string(),
            file: letter.file.to_string(),
            file_name: letter.file_name.clone(),
            row: letter.row,
            destination: letter.destination.clone(),
            at: letter.last.at.into(),
            attempts: letter.attempts,
            status: answered(letter.last),
            reason: letter.last.reason.as_str(),
            cause: letter.cause.as_str(),
            detail: letter.detail.clone(),
            recipient,
        }
    }
}

/// Dead letters that have everything in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct DeadGroup {
    pub(crate) file: String,
    pub(crate) file_name: String,
    pub(crate) destination: String,
    pub(crate) reason: &'static str,
    pub(crate) status: Option<u16>,
    pub(crate) cause: &'static str,
    pub(crate) messages: u64,
    pub(crate) first_at: Time,
    pub(crate) last_at: Time,
    /// Of one of them.
    pub(crate) detail: Option<String>,
}

impl DeadGroup {
    /// Of one letter.
    pub(crate) fn of(letter: &DeadLetter) -> Self {
        Self {
            file: letter.file.to_string(),
            file_name: letter.file_name.clone(),
            destination: letter.destination.clone(),
            reason: letter.last.reason.as_str(),
            status: answered(letter.last),
            cause: letter.cause.as_str(),
            messages: 1,
            first_at: letter.last.at.into(),
            last_at: letter.last.at.into(),
            detail: letter.detail.clone(),
        }
    }

    /// One more.
    fn add(&mut self, letter: &DeadLetter) {
        let at = Time(letter.last.at);
        self.messages += 1;
        self.first_at = self.first_at.min(at);
        self.last_at = self.last_at.max(at);
        if self.detail.is_none() {
            self.detail.clone_from(&letter.detail);
        }
    }
}

/// Dead letters, counted by what they have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct DeadGroups {
    /// All that match.
    pub(crate) total: u64,
    /// The largest first.
    pub(crate) groups: Vec<DeadGroup>,
    /// Whether there are more of them, or letters that were not looked at.
    pub(crate) cut: bool,
}

/// Groups that are told apart; whatever comes beyond them is counted together.
pub(crate) const GROUPS_KEPT: usize = 10_000;

/// What letters of one group have in common.
type GroupKey = (FileId, String, Reason, u16, DeathCause);

/// Counts dead letters by what they have in common.
#[derive(Debug, Default)]
pub(crate) struct DeadTally {
    groups: HashMap<GroupKey, DeadGroup>,
    total: u64,
    /// Of groups that did not fit.
    pub(crate) others: u64,
}

impl DeadTally {
    /// One more.
    pub(crate) fn add(&mut self, letter: &DeadLetter) {
        self.total += 1;
        let last = letter.last;
        let key = (letter.file, letter.destination.clone(), last.reason, last.status, letter.cause);
        if let Some(group) = self.groups.get_mut(&key) {
            group.add(letter);
        } else if self.groups.len() < GROUPS_KEPT {
            self.groups.insert(key, DeadGroup::of(letter));
        } else {
            self.others += 1;
        }
    }

    /// How many there were.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Groups that were told apart.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The `limit` largest groups. `is_cut`: there are letters that were not looked at.
    pub(crate) fn largest(self, limit: usize, is_cut: bool) -> DeadGroups {
        let cut = is_cut || self.groups.len() > limit || self.others > 0;
        let mut groups: Vec<_> = self.groups.into_values().collect();
        groups.sort_by(|one, other| {
            other.messages.cmp(&one.messages).then_with(|| one.file_name.cmp(&other.file_name))
        });
        groups.truncate(limit);
        DeadGroups { total: self.total, groups, cut }
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::{
        model::{ids::BatchId, outcome::Attempt, time::UnixMs},
        ports::console::Position,
    };

    use super::*;

    #[test]
    fn groups_are_counted_the_largest_first_and_no_more_are_kept_than_fit() {
        let letter = |row: u64, status: u16| DeadLetter {
            position: Position::default(),
            file: FileId([1; 16]),
            file_name: "a.csv".into(),
            destination: "d".into(),
            row,
            attempts: 1,
            last: Attempt { at: UnixMs(row), status, reason: Reason::Status },
            cause: DeathCause::Permanent,
            detail: (row == 6).then(|| "no such user".to_owned()),
            batch: BatchId([2; 16]),
        };
        let tally = || {
            let mut tally = DeadTally::default();
            for row in 1..=10 {
                tally.add(&letter(row, if row % 5 == 0 { 422 } else { 404 }));
            }
            tally
        };
        let DeadGroups { total, groups, cut } = tally().largest(9, false);
        assert_eq!((total, cut, groups.len()), (10, false, 2));
        assert_eq!((groups[0].messages, groups[0].status), (8, Some(404)));
        assert_eq!(groups[0].detail.as_deref(), Some("no such user"), "of whichever has one");
        assert_eq!((groups[1].first_at, groups[1].last_at), (Time(UnixMs(5)), Time(UnixMs(10))));
        let first = tally().largest(1, false);
        assert!(first.cut && first.groups.len() == 1, "{first:?}");
        assert!(tally().largest(9, true).cut);
        let mut many = tally();
        for status in 0..u16::try_from(GROUPS_KEPT).unwrap() + 5 {
            many.add(&letter(1, status));
        }
        assert_eq!((many.groups(), many.total()), (GROUPS_KEPT, 10 + GROUPS_KEPT as u64 + 5));
        assert!(many.others > 0 && many.largest(GROUPS_KEPT, false).cut);
    }
}
