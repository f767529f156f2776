use std::{collections::BTreeSet, time::Duration};

use postrider_settings::Keys as _;
use proptest::prelude::*;

use super::*;
use crate::model::batch::Rows;

fn limits(max_rows: usize, max_size: usize, linger: Duration) -> FeedQueue {
    FeedQueue { max_rows, max_size, linger, ..FeedQueue::declared() }
}

const BATCH: BatchLimits = BatchLimits { max_messages: 3, max_bytes: 200 };

fn entry(id: usize, body: &str, received: u64) -> Entry {
    let mut parser = EntryParser::new("id".into(), 1000, 10_000);
    let ack = AckId(format!("{id}#{received}").into());
    Entry::read(format!("e{id}"), ack, body.as_bytes(), &mut parser, MonoMs(received))
}

/// An entry of `rows` rows; every `bad`-th is invalid.
fn array(id: usize, rows: usize, bad: usize) -> Entry {
    let row = |row: usize| {
        if bad > 0 && row.is_multiple_of(bad) { "0".to_owned() } else { format!("{{\"id\":\"{id}-{row}\"}}") }
    };
    entry(id, &format!("[{}]", (0..rows).map(row).collect::<Vec<_>>().join(",")), 0)
}

/// Every row that steps bring: number and what it is. Panics where a step is not what a store accepts.
fn rows_of(steps: &[IntakeStep], mut before: Checkpoint) -> Vec<(u64, Result<Vec<u8>, String>)> {
    let mut rows = Vec::new();
    for step in steps {
        let mut brought = Vec::new();
        for cut in &step.cuts {
            let decoded = Rows::decode(cut.payload.clone()).unwrap();
            assert_eq!((decoded.len(), decoded.row(0)), (cut.count as usize, cut.first_row));
            brought.extend((0..decoded.len()).map(|at| (decoded.row(at), Ok(decoded.bytes(at).to_vec()))));
        }
        brought.extend(step.rejects.iter().map(|reject| (reject.row, Err(reject.reason.clone()))));
        brought.sort();
        let after = step.checkpoint;
        assert_eq!(after.rows - before.rows, brought.len() as u64, "I1 at the gate");
        assert_eq!(after.rejected - before.rejected, step.rejects.len() as u64);
        assert!(after.offset >= before.offset);
        assert!(step.rejects.is_sorted_by_key(|reject| reject.row));
        assert!(brought.iter().all(|(row, _)| (before.rows + 1..=after.rows).contains(row)));
        rows.extend(brought);
        before = after;
    }
    rows
}

fn unlimited() -> StepLimits {
    StepLimits { cuts: usize::MAX, bytes: usize::MAX }
}

#[test]
fn identity_depends_on_ids_bodies_and_their_order() {
    let (a, b) = (|| entry(1, "{\"id\":1}", 5), || entry(2, "{\"id\":2}", 6));
    let digest = content_digest(&[a(), b()]);
    assert_eq!(digest, content_digest(&[entry(1, "{\"id\":1}", 99), b()]), "not on when or how they came");
    for other in [
        vec![b(), a()],
        vec![a()],
        vec![a(), entry(3, "{\"id\":2}", 6)],
        vec![a(), entry(2, "{\"id\":3}", 6)],
    ] {
        assert_ne!(digest, content_digest(&other));
    }
}

#[test]
fn an_entry_that_comes_twice_waits_once_and_is_acknowledged_by_its_latest_delivery() {
    let mut accumulator = Accumulator::new(limits(9, 9_999, Duration::from_secs(1)), 9);
    assert_eq!(accumulator.push(entry(1, "{\"id\":1}", 0)), None);
    let again = entry(1, "{\"id\":1}", 500);
    let (first, latest) = (AckId("1#0".into()), again.ack.clone());
    assert_eq!(accumulator.push(again), Some(first));
    assert_eq!(accumulator.deadline(), Some(MonoMs(1000)), "it has waited since it first came");
    let taken = accumulator.take();
    assert_eq!(taken.iter().map(|entry| entry.ack.clone()).collect::<Vec<_>>(), [latest]);
    assert_eq!(accumulator.push(entry(1, "{\"id\":1}", 600)), None, "what was taken may come again");
}

#[test]
fn one_oversize_entry_is_taken_alone_and_blocks_nobody() {
    let mut accumulator = Accumulator::new(limits(5, usize::MAX, Duration::from_secs(1)), 9);
    for entry in [array(1, 2, 0), array(2, 50, 0), array(3, 2, 0)] {
        accumulator.push(entry);
    }
    assert!(accumulator.is_full());
    let ids = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.id).collect::<Vec<_>>();
    assert_eq!(ids(accumulator.take()), ["e1"]);
    assert_eq!(ids(accumulator.take()), ["e2"]);
    assert!(!accumulator.is_full());
    assert_eq!(ids(accumulator.take()), ["e3"]);
    assert!(accumulator.is_empty() && accumulator.take().is_empty() && !accumulator.is_due(MonoMs(u64::MAX)));
}

#[test]
fn rejects_never_pile_up_behind_a_batch_that_does_not_fill() {
    let bad = vec!["0"; 3 * STEP_REJECTS_MAX].join(",");
    let entries = [entry(1, &format!("[{{\"id\":1}},{bad},{{\"id\":2}}]"), 0)];
    let steps = steps(&entries, Checkpoint::default(), BATCH, unlimited());
    assert!(steps.len() >= 3);
    assert!(steps.iter().all(|step| step.rejects.len() <= STEP_REJECTS_MAX));
    assert_eq!(rows_of(&steps, Checkpoint::default()).len(), 3 * STEP_REJECTS_MAX + 2);
}

#[test]
fn entries_without_rows_make_a_file_that_can_be_closed() {
    let steps = steps(&[entry(1, "[]", 0)], Checkpoint::default(), BATCH, unlimited());
    assert_eq!(steps.len(), 1);
    assert_eq!(steps[0].checkpoint, Checkpoint { offset: 2, ..Checkpoint::default() });
}

#[test]
fn nothing_that_is_printed_shows_a_row() {
    let entries = vec![entry(1, "[{\"id\":\"secret-77\"},\"secret-77\"]", 0)];
    let steps = steps(&entries, Checkpoint::default(), BATCH, unlimited());
    let file = QueueFile { entries, steps };
    assert!(!format!("{file:?}").contains("secret-77"));
}

proptest! {
    /// Rows, bytes, entries, minutes and time: whatever comes, in whatever order, is taken once, in order, and no
    /// later than the linger, and no file is larger than the limits unless one entry is.
    #[test]
    fn everything_accumulated_is_taken_once_within_the_limits(
        sizes in prop::collection::vec((0usize..8, 0u64..50, 0u64..4), 1..60), rows in 1usize..20,
        bytes in 1usize..3000, minutes_max in 1usize..5, linger in 0u64..100,
    ) {
        let mut accumulator = Accumulator::new(limits(rows, bytes, Duration::from_millis(linger)), minutes_max);
        let minutes = |entries: &mut dyn Iterator<Item = &Entry>| {
            entries.map(|entry| minute_of(entry.sent_at)).collect::<BTreeSet<_>>().len()
        };
        let mut now = 0;
        let mut order = Vec::new();
        let mut check = |taken: Vec<Entry>, now: u64, linger_kept: bool| {
            assert!(!taken.is_empty());
            let sum = |size: fn(&Entry) -> usize| taken.iter().map(size).sum::<usize>();
            let one = taken.len() == 1;
            assert!(one || (sum(|entry| entry.rows.len()) <= rows && sum(Entry::held_bytes) <= bytes));
            assert!(taken.len() <= rows && minutes(&mut taken.iter()) <= minutes_max);
            assert!(!linger_kept || taken.iter().all(|entry| now <= entry.received.0 + linger));
            order.extend(taken.into_iter().map(|entry| entry.id));
        };
        for (id, &(size, gap, minute)) in sizes.iter().enumerate() {
            // The loop's timer: it wakes at each deadline before the next entry comes.
            while let Some(deadline) = accumulator.deadline().filter(|deadline| deadline.0 <= now + gap) {
                assert!(deadline.0 == 0 || !accumulator.is_due(MonoMs(deadline.0 - 1)));
                assert!(accumulator.is_due(deadline));
                check(accumulator.take(), deadline.0, true);
            }
            now += gap;
            let mut next = array(id, size, 0);
            next.received = MonoMs(now);
            next.sent_at = UnixMs(minute * 60_000);
            accumulator.push(next);
            while accumulator.is_due(MonoMs(now)) {
                check(accumulator.take(), now, true);
            }
            let waiting: Vec<_> = accumulator.waiting.iter().collect();
            prop_assert!(waiting.len() < rows && minutes(&mut waiting.iter().copied()) <= minutes_max);
            prop_assert!(waiting.iter().map(|entry| entry.rows.len()).sum::<usize>() < rows);
            prop_assert!(waiting.iter().map(|entry| entry.held_bytes()).sum::<usize>() < bytes);
        }
        while !accumulator.is_empty() {
            check(accumulator.take(), 0, false);
        }
        prop_assert_eq!(order, (0..sizes.len()).map(|id| format!("e{id}")).collect::<Vec<_>>());
        prop_assert_eq!((accumulator.rows, accumulator.bytes, accumulator.acks.len()), (0, 0, 0));
    }

    /// However steps are cut, they bring every row once, and each file fits into one step or is one entry.
    #[test]
    fn files_hold_every_row_of_every_entry_once(
        entries in prop::collection::vec((0usize..30, 0usize..5), 0..12), cuts in 1usize..8, bytes in 1usize..400,
    ) {
        let make = || entries.iter().enumerate().map(|(id, &(rows, bad))| array(id, rows, bad)).collect::<Vec<_>>();
        let files = files(make(), BATCH, StepLimits { cuts, bytes });
        let mut seen = Vec::new();
        for file in files {
            prop_assert!(file.steps.len() == 1 || file.entries.len() == 1);
            for step in &file.steps {
                let held: usize = step.cuts.iter().map(|cut| cut.payload.len()).sum();
                prop_assert!(step.cuts.len() <= cuts && (held <= bytes || step.cuts.len() == 1));
            }
            let rows = rows_of(&file.steps, Checkpoint::default());
            let whole = rows_of(&steps(&file.entries, Checkpoint::default(), BATCH, unlimited()), Checkpoint::default());
            prop_assert_eq!(rows, whole);
            let last = file.steps.last().unwrap().checkpoint;
            prop_assert_eq!(last.offset, file.entries.iter().map(|entry| entry.body_bytes).sum::<u64>());
            prop_assert_eq!(last.rows, file.entries.iter().map(|entry| entry.rows.len() as u64).sum::<u64>());
            seen.extend(file.entries);
        }
        prop_assert_eq!(seen, make());
    }

    /// A crash after any step, and other limits after the restart: the rest is what was left.
    #[test]
    fn a_file_is_resumed_behind_its_checkpoint(
        rows in 1usize..60, bad in 0usize..5, cuts in 1usize..4, stop in 0usize..20, cuts_after in 1usize..4,
        max_messages in 1u32..7,
    ) {
        let entries = [array(1, rows, bad)];
        let first = steps(&entries, Checkpoint::default(), BATCH, StepLimits { cuts, bytes: usize::MAX });
        let whole = rows_of(&first, Checkpoint::default());
        let stored = &first[..stop.min(first.len() - 1)];
        let resume = stored.last().map(|step| step.checkpoint).unwrap_or_default();
        let batch = BatchLimits { max_messages, ..BATCH };
        let rest = steps(&entries, resume, batch, StepLimits { cuts: cuts_after, bytes: usize::MAX });
        let mut all = rows_of(stored, Checkpoint::default());
        all.extend(rows_of(&rest, resume));
        prop_assert_eq!(all, whole);
        prop_assert_eq!(rest.last().unwrap().checkpoint, first.last().unwrap().checkpoint);
    }
}
