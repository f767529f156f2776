//! `postrider dead summary`: dead letters by what they have in common.

use std::{cmp::Reverse, collections::BTreeMap, fmt::Write as _};

use postrider_actors::{
    model::{
        ids::FileId,
        outcome::{DeathCause, Reason},
        time::UnixMs,
    },
    ports::console::{DeadFilter, DeadLetter, Position, View},
};
use serde_json::{Value, json};

use crate::cli::table::{PAGE, cut, number, status, table, text, time};
use postrider_actors::model::finish::Thousands;

/// Groups that are told apart; whatever comes beyond them is counted together.
pub(super) const GROUPS_MAX: usize = 10_000;

/// What dead letters have in common.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    reason: Reason,
    status: u16,
    cause: &'static str,
    destination: String,
    file: FileId,
}

/// Of one kind.
struct Group {
    file_name: String,
    messages: u64,
    first_at: UnixMs,
    last_at: UnixMs,
    /// What the destination said of one of them.
    detail: Option<String>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Summary {
    groups: BTreeMap<Key, Group>,
    /// Of groups that did not fit.
    others: u64,
}

impl Summary {
    /// Looks at every dead letter that matches.
    pub(super) fn of(view: &mut dyn View, filter: &DeadFilter) -> anyhow::Result<Self> {
        let mut summary = Self::default();
        let mut position = Position::default();
        loop {
            let letters = view.dead(filter, &position, PAGE)?;
            let Some(last) = letters.last() else { return Ok(summary) };
            position.clone_from(&last.position);
            for letter in &letters {
                summary.add(letter);
            }
        }
    }

    pub(super) fn add(&mut self, letter: &DeadLetter) {
        let key = Key {
            reason: letter.last.reason,
            status: letter.last.status,
            cause: DeathCause::as_str(letter.cause),
            destination: letter.destination.clone(),
            file: letter.file,
        };
        if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&key) {
            self.others += 1;
            return;
        }
        let at = letter.last.at;
        let group = self.groups.entry(key).or_insert_with(|| Group {
            file_name: letter.file_name.clone(),
            messages: 0,
            first_at: at,
            last_at: at,
            detail: None,
        });
        group.messages += 1;
        (group.first_at, group.last_at) = (group.first_at.min(at), group.last_at.max(at));
        if group.detail.is_none() {
            group.detail.clone_from(&letter.detail);
        }
    }

    fn total(&self) -> u64 {
        self.groups.values().map(|group| group.messages).sum::<u64>() + self.others
    }

    /// The largest first.
    fn sorted(&self) -> Vec<(&Key, &Group)> {
        let mut groups: Vec<_> = self.groups.iter().collect();
        groups.sort_by_key(|(_, group)| Reverse(group.messages));
        groups
    }

    pub(super) fn json(&self, limit: usize) -> Value {
        let group = |(key, group): (&Key, &Group)| {
            json!({
                "messages": group.messages,
                "reason": key.reason.as_str(),
                "status": (key.status != 0).then_some(key.status),
                "cause": key.cause,
                "destination": key.destination,
                "file": key.file.to_string(),
                "file_name": group.file_name,
                "first_at": time(group.first_at),
                "last_at": time(group.last_at),
                "detail": group.detail,
            })
        };
        let groups: Vec<_> = self.sorted().into_iter().take(limit).map(group).collect();
        json!({
            "total": self.total(),
            "cut": groups.len() < self.groups.len() || self.others > 0,
            "groups": groups,
        })
    }

    pub(super) fn rendered(&self, limit: usize) -> String {
        let header =
            ["messages", "reason", "status", "cause", "destination", "file", "first", "last", "detail"];
        let row = |(key, group): &(&Key, &Group)| {
            vec![
                number(Thousands(group.messages)),
                text(key.reason.as_str()),
                number(status(key.status)),
                text(key.cause),
                text(&key.destination),
                text(&group.file_name),
                text(time(group.first_at)),
                text(time(group.last_at)),
                text(group.detail.as_deref().unwrap_or("-")),
            ]
        };
        let groups = self.sorted();
        let shown = limit.min(groups.len());
        let mut rendered = table(&header, groups[..shown].iter().map(row));
        // Writing to a String can't fail.
        let _ = writeln!(rendered, "\n{} dead letters", Thousands(self.total()));
        rendered += &cut(shown, groups.len() as u64, "groups");
        if self.others > 0 {
            let others = Thousands(self.others);
            let _ = writeln!(rendered, "{others} of them are of other groups, which are not told apart.");
        }
        rendered
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{ids::BatchId, outcome::Attempt};

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
            detail: None,
            batch: BatchId([2; 16]),
        };
        let mut summary = Summary::default();
        for row in 1..=10 {
            summary.add(&letter(row, if row % 5 == 0 { 422 } else { 404 }));
        }
        let shown = summary.rendered(1);
        assert!(shown.contains(" 8 ") || shown.contains("\n8 "), "{shown}");
        assert!(shown.contains("404") && !shown.contains("422"), "{shown}");
        assert!(shown.contains("Showing 1 of 2 groups") && shown.contains("10 dead letters"), "{shown}");
        let json = summary.json(9);
        assert_eq!((&json["total"], &json["groups"][1]["messages"]), (&10.into(), &2.into()));
        assert_eq!(json["groups"][1]["first_at"], "1970-01-01T00:00:00.005Z");
        for status in 0..u16::try_from(GROUPS_MAX).unwrap() + 5 {
            summary.add(&letter(1, status));
        }
        assert_eq!(summary.groups.len(), GROUPS_MAX);
        assert_eq!(summary.json(1)["total"], 10 + GROUPS_MAX as u64 + 5);
        assert!(summary.others > 0 && summary.rendered(1).contains("other groups"), "{}", summary.others);
    }
}
