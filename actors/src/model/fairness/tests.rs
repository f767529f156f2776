use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Serves messages one by one to whose turn it is, all of whom have enough; how many each got.
fn serve(turns: &mut FileTurns<u32>, messages: usize) -> BTreeMap<u32, usize> {
    let mut got = BTreeMap::new();
    for _ in 0..messages {
        let file = turns.order().next().expect("somebody waits");
        turns.served(file, 1);
        *got.entry(file).or_default() += 1;
    }
    got
}

fn next(turns: &FileTurns<u32>) -> u32 {
    turns.order().next().expect("somebody waits")
}

#[test]
fn b11_a_file_that_comes_goes_ahead_of_those_that_were_served() {
    let mut turns = FileTurns::default();
    for large in 0..5 {
        turns.arrive(large, Priority::Normal);
    }
    for _ in 0..10_000 {
        let file = next(&turns);
        turns.served(file, 500);
    }
    turns.arrive(9, Priority::Normal);
    assert_eq!(next(&turns), 9, "its first turn is now");
    let got = serve(&mut turns, 6_000);
    let is_even = |got: &usize| got.abs_diff(1_000) <= 500;
    assert!(got.len() == 6 && got.values().all(is_even), "but for the last turns of 500: {got:?}");
}

#[test]
fn b11_files_that_keep_coming_leave_the_others_every_other_message() {
    let mut turns = FileTurns::default();
    turns.arrive(0, Priority::Normal);
    let mut of_old = 0;
    for newcomer in 1..=1_000 {
        turns.arrive(newcomer, Priority::Normal);
        let file = next(&turns);
        turns.served(file, 1);
        of_old += usize::from(file == 0);
        if file != 0 {
            turns.leave(file);
        }
    }
    assert!((490..=510).contains(&of_old), "{of_old}");
}

#[test]
fn b11_priorities_share_by_weight_however_many_files_each_has() {
    for files in [1, 3, 100] {
        let mut turns = FileTurns::default();
        for file in 0..files {
            turns.arrive(1_000 + file, Priority::Bulk);
            turns.arrive(2_000 + file, Priority::Normal);
        }
        turns.arrive(3_000, Priority::Urgent);
        let got = serve(&mut turns, 21 * 300);
        let of = |from: u32| got.range(from..from + 1_000).map(|(_, got)| got).sum::<usize>();
        assert!(of(1_000).abs_diff(300) <= 2, "{files}: {} bulk", of(1_000));
        assert!(of(2_000).abs_diff(1_200) <= 8, "{files}: {} normal", of(2_000));
        assert!(of(3_000).abs_diff(4_800) <= 32, "{files}: {} urgent", of(3_000));
        let each: Vec<_> = got.range(2_000..3_000).map(|(_, got)| *got).collect();
        // While a hundred come at once, every other message is of those that were served before.
        assert!(each.iter().all(|got| got.abs_diff(1_200 / each.len()) <= 7), "{each:?}");
    }
}

#[test]
fn b11_nobody_saves_up_while_away_and_nobody_pays_for_having_been_alone() {
    let mut turns = FileTurns::default();
    turns.arrive(1, Priority::Normal);
    turns.arrive(2, Priority::Normal);
    serve(&mut turns, 10);
    turns.leave(2);
    serve(&mut turns, 100_000);
    turns.arrive(2, Priority::Normal);
    let got = serve(&mut turns, 100);
    assert!(got[&1].abs_diff(got[&2]) <= 1, "{got:?}");
    // Nor does a priority.
    turns.arrive(3, Priority::Bulk);
    let got = serve(&mut turns, 500);
    assert!(got[&3].abs_diff(100) <= 1, "{got:?}");
}

#[test]
fn b11_another_priority_holds_from_the_next_message_on() {
    let mut turns = FileTurns::default();
    turns.arrive(1, Priority::Normal);
    turns.arrive(2, Priority::Normal);
    serve(&mut turns, 1_000);
    turns.arrive(2, Priority::Urgent);
    let got = serve(&mut turns, 100);
    assert!(got[&2].abs_diff(80) <= 4, "{got:?}");
    turns.arrive(2, Priority::Bulk);
    let got = serve(&mut turns, 100);
    assert!(got[&2].abs_diff(20) <= 5, "{got:?}");
    turns.leave(2);
    assert_eq!(serve(&mut turns, 10), [(1, 10)].into());
    turns.leave(1);
    assert!(turns.is_empty() && turns.order().next().is_none());
}

#[test]
fn i8_files_that_are_gone_are_forgotten() {
    let mut turns = FileTurns::default();
    for file in 0..20_000 {
        turns.arrive(file, Priority::Normal);
        turns.served(file, 1 + file as usize % 700);
        turns.leave(file);
        turns.leave(file);
    }
    let known: usize = turns.lines.iter().map(|line| line.seats.len()).sum();
    assert!(turns.is_empty() && known <= REMEMBERED_MAX + 1, "{known}");
}

proptest! {
    /// Whatever comes, goes and is served: who waits all the time gets its share, less what one turn of the others is.
    #[test]
    fn b11_nobody_is_starved(
        steps in prop::collection::vec((0u32..12, 0u8..3, any::<bool>(), 1usize..50), 200..600),
        mine in 0u8..3,
    ) {
        let mine = Priority::from_byte(mine).unwrap();
        let mut turns = FileTurns::default();
        turns.arrive(99, mine);
        let (mut got, mut all, mut since) = (0, 0, 0);
        for (file, priority, comes, messages) in steps {
            let priority = Priority::from_byte(priority).unwrap();
            if comes { turns.arrive(file, priority) } else { turns.leave(file) }
            let next = next(&turns);
            turns.served(next, messages);
            all += messages;
            if next == 99 { got += messages; since = 0 } else { since += messages }
            // At worst all others, the newcomers among them too, have a turn of 50 each, at the weight of its priority.
            let files = 13;
            let bound = 4 * 50 * files * 21 / weight(mine) as usize + 2 * 21 * 50;
            prop_assert!(since <= bound, "{since} messages of others, {bound} at most");
            let in_order: Vec<_> = turns.order().collect();
            let distinct: std::collections::BTreeSet<_> = in_order.iter().collect();
            prop_assert_eq!(distinct.len(), in_order.len(), "each once");
            prop_assert!(in_order.contains(&99));
        }
        prop_assert!(got > 0 || all <= 4 * 50 * 13 * 21);
    }
}

proptest! {
    /// It makes no difference whether what a file gets that waits alone is counted at once or when another comes.
    #[test]
    fn b11_who_waits_alone_is_counted_as_if_others_did(
        steps in prop::collection::vec((0u32..4, 0u8..3, 0u8..5, 1usize..50), 1..200),
    ) {
        let (mut late, mut at_once) = (FileTurns::default(), FileTurns::default());
        for (file, priority, what, messages) in steps {
            let priority = Priority::from_byte(priority).unwrap();
            let next = late.order().next();
            for turns in [&mut late, &mut at_once] {
                match (what, next) {
                    (0, _) => turns.arrive(file, priority),
                    (1, _) => turns.leave(file),
                    (_, Some(next)) => turns.served(next, messages),
                    (_, None) => {}
                }
            }
            at_once.count();
            prop_assert!(late.order().eq(at_once.order()));
            let waiting = late.order().count();
            prop_assert_eq!((late.waiting, at_once.uncounted), (waiting, 0));
        }
    }
}

/// A lane with as many batches as one likes of one file.
struct Endless(bool, usize);

impl Waiting<u32> for Endless {
    type Batch = bool;
    type Error = std::convert::Infallible;

    fn files(&mut self) -> Result<Vec<(u32, Priority)>, Self::Error> {
        Ok(vec![(1, Priority::Normal)])
    }

    fn next(&mut self, _: u32) -> Result<Option<(bool, usize)>, Self::Error> {
        Ok(Some((self.0, self.1)))
    }
}

/// Leases until `leases` batches are chosen, `batches` at a time, where of both kinds are as many as one likes: which
/// are retries.
fn shared(due: usize, messages: usize, batches: usize, leases: usize) -> Vec<bool> {
    let mut turns = LeaseTurns::default();
    let mut chosen = Vec::new();
    while chosen.len() < leases {
        let Ok(some) = turns.choose(&mut Endless(true, due), &mut Endless(false, due), messages, batches);
        assert!(!some.is_empty() && some.len() <= batches);
        assert!((some.len() - 1) * due < messages, "enough is enough");
        chosen.extend(some);
    }
    chosen
}

#[test]
fn b11_retries_come_first_and_the_others_get_their_fifth() {
    for due in [1, 3, 500] {
        for (messages, batches) in [(1, 1), (usize::MAX, 1), (10, 3), (1_000, 64), (usize::MAX, 7)] {
            let chosen = shared(due, messages, batches, 1_000);
            assert!(chosen[0], "a retry comes first");
            let fresh = chosen.iter().filter(|is_retry| !**is_retry).count();
            let expected = chosen.len() / FRESH_ONE_IN as usize;
            assert!(fresh.abs_diff(expected) <= 1, "{fresh} of {}, {messages} {batches}", chosen.len());
        }
    }
}

fn listed(batches: impl IntoIterator<Item = (u32, usize)>, each: usize) -> Listed<u32, (u32, usize)> {
    let batch = |(nth, (file, due))| (file, Priority::Normal, (file, nth), due);
    Listed::new(batches.into_iter().enumerate().map(batch), each)
}

#[test]
fn b11_one_lane_alone_takes_all_and_owes_nothing() {
    let mut turns = LeaseTurns::default();
    let lane = |count| listed((0..count).map(|_| (1, 10)), usize::MAX);
    let none = || lane(0);
    let mut count = |retries: usize, fresh: usize, messages, batches| {
        let Ok(chosen) = turns.choose(&mut lane(retries), &mut lane(fresh), messages, batches);
        assert_eq!(turns.share, LaneShare::default(), "nobody to share with");
        chosen.len()
    };
    assert_eq!((count(9, 0, 85, 99), count(0, 9, 25, 99), count(9, 0, usize::MAX, 4)), (9, 3, 4));
    assert_eq!((count(0, 0, 9, 9), count(9, 9, 0, 9), count(9, 9, 9, 0)), (0, 0, 0));
    let Ok(chosen) = LeaseTurns::<u32>::default().choose(&mut none(), &mut none(), 9, 9);
    assert!(chosen.is_empty());
}

#[test]
fn b11_a_small_file_behind_a_large_one_is_leased_with_the_next_batch() {
    let mut turns = LeaseTurns::default();
    let large = || (0..1_000).map(|_| (1, 500));
    for _ in 0..10 {
        let Ok(chosen) = turns.choose(&mut listed([], 1), &mut listed(large(), usize::MAX), 1_000, 64);
        assert_eq!(chosen, [(1, 0), (1, 1)]);
    }
    let fresh = large().chain([(2, 2)]);
    let Ok(chosen) = turns.choose(&mut listed([], 1), &mut listed(fresh, usize::MAX), 1_000, 64);
    assert_eq!(chosen, [(2, 1_000), (1, 0), (1, 1)]);
    // Each file's first turn, and no more.
    let fresh = large().chain([(2, 2), (2, 2), (3, 2)]);
    let Ok(chosen) = turns.choose(&mut listed([], 1), &mut listed(fresh, 1), usize::MAX, 64);
    let files: Vec<_> = chosen.into_iter().map(|(file, _)| file).collect();
    assert_eq!(files.len(), 3, "{files:?}");
}
