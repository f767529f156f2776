//! `postrider dead summary`: dead letters by what they have in common.

use std::fmt::Write as _;

use postrider_actors::{
    model::finish::Thousands,
    ports::console::{DeadFilter, Position, View},
};

use crate::{
    cli::table::{PAGE, cut, number, status, table, text, time},
    shapes::{DeadGroup, DeadTally},
};

/// Looks at every dead letter that matches.
pub(super) fn tally(view: &mut dyn View, filter: &DeadFilter) -> anyhow::Result<DeadTally> {
    let (mut tally, mut position) = (DeadTally::default(), Position::default());
    loop {
        let letters = view.dead(filter, &position, PAGE)?;
        let Some(last) = letters.last() else { return Ok(tally) };
        position.clone_from(&last.position);
        for letter in &letters {
            tally.add(letter);
        }
    }
}

pub(super) fn rendered(tally: DeadTally, limit: usize) -> String {
    let header = ["messages", "reason", "status", "cause", "destination", "file", "first", "last", "detail"];
    let row = |group: &DeadGroup| {
        vec![
            number(Thousands(group.messages)),
            text(group.reason),
            number(status(group.status.unwrap_or_default())),
            text(group.cause),
            text(&group.destination),
            text(&group.file_name),
            text(time(group.first_at.0)),
            text(time(group.last_at.0)),
            text(group.detail.as_deref().unwrap_or("-")),
        ]
    };
    let (all, others) = (tally.groups(), tally.others);
    let largest = tally.largest(limit, false);
    let mut rendered = table(&header, largest.groups.iter().map(row));
    // Writing to a String can't fail.
    let _ = writeln!(rendered, "\n{} dead letters", Thousands(largest.total));
    rendered += &cut(largest.groups.len(), all as u64, "groups");
    if others > 0 {
        let others = Thousands(others);
        let _ = writeln!(rendered, "{others} of them are of other groups, which are not told apart.");
    }
    rendered
}

#[cfg(test)]
mod tests {
    use postrider_actors::{
        model::{
            ids::{BatchId, FileId},
            outcome::{Attempt, DeathCause, Reason},
            time::UnixMs,
        },
        ports::console::DeadLetter,
    };

    use super::*;

    #[test]
    fn it_says_what_it_leaves_out() {
        let mut tally = DeadTally::default();
        for row in 1..=10 {
            let status = if row % 5 == 0 { 422 } else { 404 };
            tally.add(&DeadLetter {
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
            });
        }
        tally.others = 7;
        let shown = rendered(tally, 1);
        assert!(shown.contains("404") && !shown.contains("422"), "{shown}");
        assert!(shown.contains("Showing 1 of 2 groups") && shown.contains("10 dead letters"), "{shown}");
        assert!(shown.contains("7 of them are of other groups"), "{shown}");
    }
}
