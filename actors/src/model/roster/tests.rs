use std::{
    collections::HashSet,
    ops::{Deref, DerefMut},
};

use super::{destination::RETRIES_HERE_MAX, *};
use crate::model::outcome::{Attempt, Reason};
use proptest::prelude::*;

const NOW: UnixMs = UnixMs(1_000_000);
const SENT: Report = Report::Verdict(Verdict::Sent { at: NOW, status: 200 });

fn later(ms: u64) -> UnixMs {
    UnixMs(NOW.0 + ms)
}

fn token(batch: u8) -> LeaseToken {
    LeaseToken { batch: BatchId([batch; 16]), fence: 1 }
}

/// A batch whose messages have no order.
fn incoming(
    token: LeaseToken,
    file: FileId,
    priority: Priority,
    pace: Pace,
    open: Vec<OpenMessage>,
) -> Incoming {
    Incoming { token, file, priority, pace, open, keys: HashMap::new() }
}

/// A roster, and a limit on messages in flight to each destination and to all.
struct Limited {
    roster: Roster,
    each: Vec<usize>,
    all: usize,
    /// Whether retries may go.
    retries: bool,
    not_these: HashSet<LeaseToken>,
}

impl Deref for Limited {
    type Target = Roster;

    fn deref(&self) -> &Roster {
        &self.roster
    }
}

impl DerefMut for Limited {
    fn deref_mut(&mut self) -> &mut Roster {
        &mut self.roster
    }
}

/// What may go.
struct Room {
    each: Vec<bool>,
    retries: bool,
    not_these: HashSet<LeaseToken>,
    without: HashSet<usize>,
}

impl Admission for Room {
    fn ask(&mut self, destination: usize, batch: LeaseToken, is_retry: bool, messages: usize) -> Answer {
        if !self.each[destination] {
            Answer::Refused
        } else if self.not_these.contains(&batch) {
            Answer::NotThis
        } else if is_retry && !self.retries {
            Answer::NoRetries
        } else {
            Answer::Granted(messages)
        }
    }

    fn has_none(&mut self, destination: usize) {
        self.without.insert(destination);
    }
}

impl Limited {
    /// Takes over a batch of the one file that most tests have.
    fn add(
        &mut self,
        destination: usize,
        token: LeaseToken,
        pace: Pace,
        open: Vec<OpenMessage>,
        now: UnixMs,
    ) {
        let (file, priority) = (FileId([0; 16]), Priority::Normal);
        self.roster.add(destination, incoming(token, file, priority, pace, open), now);
    }

    fn ask(&mut self, now: UnixMs) -> (Vec<Pick>, HashSet<usize>) {
        let is_full = self.roster.in_flight() >= self.all;
        let has_room = |(at, limit): (usize, &usize)| !is_full && self.roster.in_flight_to(at) < *limit;
        let each = self.each.iter().enumerate().map(has_room).collect();
        let not_these = self.not_these.clone();
        let mut room = Room { each, retries: self.retries, not_these, without: HashSet::new() };
        let mut picks = Vec::new();
        self.roster.pick(now, &mut room, &mut picks);
        (picks, room.without)
    }

    fn pick(&mut self, now: UnixMs) -> Option<Pick> {
        let (picks, _) = self.ask(now);
        assert!(picks.len() <= 1, "{picks:?}");
        picks.first().copied()
    }

    /// One that went alone.
    fn report(&mut self, pick: Pick, report: Report, group: usize, now: UnixMs) -> bool {
        self.roster.ended(pick.destination);
        self.roster.report(pick, report, group, now)
    }
}

fn limited(all: usize, unrecorded_max: usize, each: &[usize]) -> Limited {
    bundling(all, unrecorded_max, each, &vec![1; each.len()])
}

fn bundling(all: usize, unrecorded_max: usize, each: &[usize], bundles: &[usize]) -> Limited {
    let roster = Roster::new(unrecorded_max, bundles.iter().copied());
    Limited { roster, each: each.to_vec(), all, retries: true, not_these: HashSet::new() }
}

fn roster(each: &[usize]) -> Limited {
    limited(1_000, 100_000, each)
}

/// Messages that were never tried and are due.
fn fresh(indexes: impl IntoIterator<Item = u32>) -> Vec<OpenMessage> {
    let message = |index| OpenMessage { not_before: NOW, index, drive: 0, tries: 0 };
    indexes.into_iter().map(message).collect()
}

fn failed(not_before: UnixMs) -> Report {
    let attempt = Attempt { at: NOW, status: 503, reason: Reason::Status };
    Report::Verdict(Verdict::Retry { attempt, not_before })
}

/// Records all that is ready; what it was.
fn record(roster: &mut Limited) -> Vec<Ready> {
    let ready = roster.take_ready(0, NOW, Duration::ZERO);
    for ready in &ready {
        roster.recorded(ready.token, ready.verdicts.len());
    }
    ready
}

fn pick(roster: &mut Limited, now: UnixMs) -> Pick {
    roster.pick(now).expect("there is one to send")
}

/// Picks and answers everything that can be sent now.
fn send_all(roster: &mut Limited, now: UnixMs, mut report: impl FnMut(Pick) -> Report) -> Vec<Pick> {
    let picks: Vec<_> = std::iter::from_fn(|| roster.pick(now)).collect();
    for &pick in &picks {
        roster.report(pick, report(pick), usize::MAX, now);
    }
    picks
}

#[test]
fn a_batch_of_which_nothing_may_go_keeps_no_other_away() {
    let mut roster = roster(&[9]);
    // Two of one file and one of another, twice.
    for (file, batch, tries) in [(1, 0, 0), (1, 1, 0), (2, 2, 0), (1, 3, 1), (2, 4, 1)] {
        let mut batch = of_file(file, Priority::Normal, batch, 1);
        batch.open[0].tries = tries;
        roster.roster.add(0, batch, NOW);
    }
    roster.not_these = [token(0), token(1), token(3)].into();
    let picked: Vec<_> = std::iter::from_fn(|| roster.pick(NOW)).map(|pick| pick.token).collect();
    assert_eq!(picked, [token(4), token(2)]);
    assert_eq!((roster.waiting(0), roster.waiting_in(token(0)), roster.waiting_in(token(2))), (3, 1, 0));
    assert_eq!(roster.ask(NOW), (Vec::new(), HashSet::from([0])), "they wait for no permit");
    roster.not_these.clear();
    assert_eq!(std::iter::from_fn(|| roster.pick(NOW)).count(), 3);
}

#[test]
fn a_slow_destination_holds_only_its_own_permits() {
    let mut roster = roster(&[4, 4]);
    roster.add(0, token(0), Pace::Together, fresh(0..100), NOW);
    roster.add(1, token(1), Pace::Together, fresh(0..100), NOW);
    let stuck: Vec<_> = std::iter::from_fn(|| roster.pick(NOW)).collect();
    assert_eq!(stuck.len(), 8);
    for _ in 0..96 {
        let pick = stuck.iter().find(|pick| pick.destination == 1).copied().unwrap();
        roster.report(pick, SENT, 500, NOW); // destination 0 never answers
        let next = roster.pick(NOW);
        assert!(next.is_none_or(|next| next.destination == 1));
    }
    assert_eq!(roster.waiting(1), 0);
}

#[test]
fn under_a_global_limit_destinations_share_evenly() {
    let mut roster = limited(1, 10_000, &[64, 64, 64]);
    for destination in 0..3 {
        roster.add(destination, token(destination as u8), Pace::Together, fresh(0..1000), NOW);
    }
    let mut served = [0; 3];
    for _ in 0..480 {
        let pick = pick(&mut roster, NOW);
        served[pick.destination] += 1;
        roster.report(pick, SENT, usize::MAX, NOW);
    }
    assert!(served.iter().all(|&served| (150..=176).contains(&served)), "{served:?}");
}

#[test]
fn f44_retries_that_may_not_go_yet_hold_up_no_first_attempt() {
    let mut roster = roster(&[64]);
    let mut open = fresh(0..4);
    open[0].tries = 1;
    open[1].tries = 2;
    roster.add(0, token(0), Pace::Together, open, NOW);
    assert_eq!(roster.waiting(0), 4);
    roster.retries = false;
    let sent: Vec<_> = send_all(&mut roster, NOW, |_| SENT).iter().map(|pick| pick.index).collect();
    assert_eq!(sent, [2, 3]);
    assert_eq!(roster.ask(NOW), (vec![], HashSet::new()), "they wait");
    assert_eq!((roster.waiting(0), roster.returnable()), (2, vec![]));
    roster.retries = true;
    let sent: Vec<_> = send_all(&mut roster, NOW, |_| SENT).iter().map(|pick| pick.attempt).collect();
    assert_eq!(sent, [2, 3]);
    assert!(record(&mut roster)[0].ends);
    roster.remove(token(0));
    assert_eq!(roster.ask(NOW), (vec![], HashSet::from([0])), "nothing waits");
}

#[test]
fn f69_what_may_not_go_is_not_picked_and_nothing_waits_for_it() {
    let mut roster = roster(&[0, 8]);
    roster.add(0, token(0), Pace::Together, fresh(0..100), NOW);
    roster.add(1, token(1), Pace::Together, fresh(0..100), NOW);
    let picks = send_all(&mut roster, NOW, |_| SENT);
    assert!(picks.len() == 8 && picks.iter().all(|pick| pick.destination == 1), "{picks:?}");
    assert_eq!((roster.in_flight(), roster.waiting(0)), (0, 100));
}

#[test]
fn suspects_go_alone() {
    let mut roster = roster(&[64]);
    roster.add(0, token(0), Pace::Alone, fresh([3, 5]), NOW);
    let first = pick(&mut roster, NOW);
    assert_eq!((first.index, roster.pick(NOW)), (3, None));
    roster.report(first, SENT, 500, NOW);
    assert_eq!(pick(&mut roster, NOW).index, 5);
    assert_eq!(roster.waiting(0), 0, "they keep nobody waiting");
}

#[test]
fn b17_a_suspect_is_marked_before_it_begins() {
    let mut roster = roster(&[64]);
    roster.add(0, token(0), Pace::AloneMarked, fresh([1, 2]), NOW);
    assert_eq!(roster.pick(NOW), None, "not before it is marked");
    let mark = |verdicts, ends, begins| Ready { token: token(0), verdicts, ends, begins };
    assert_eq!(roster.take_ready(0, NOW, Duration::ZERO), [mark(vec![], false, Some(1))]);
    assert_eq!(roster.take_ready(0, NOW, Duration::ZERO), [], "once");
    assert_eq!(roster.pick(NOW), None, "the ledger has not answered");
    roster.recorded(token(0), 0);
    let first = pick(&mut roster, NOW);
    assert_eq!((first.index, roster.pick(NOW)), (1, None));
    assert_eq!(
        roster.take_ready(0, NOW, Duration::ZERO),
        [],
        "the next is not marked while this one is in flight"
    );
    assert!(roster.report(first, SENT, 500, NOW), "the next message waits for the record: now");
    assert_eq!(roster.pick(NOW), None);
    // The commit that records one marks the next.
    let ready = record(&mut roster);
    assert_eq!((ready[0].verdicts.len(), ready[0].begins, ready[0].ends), (1, Some(2), false));
    let second = pick(&mut roster, NOW);
    assert_eq!(second.index, 2);
    // Even one that is due again at once is tried under another lease.
    assert!(roster.report(second, failed(NOW), 500, NOW));
    let ready = record(&mut roster);
    assert_eq!((ready[0].verdicts.len(), ready[0].begins, ready[0].ends), (1, None, true));
}

#[test]
fn i6_unrecorded_outcomes_stop_the_lanes() {
    let mut roster = limited(8, 10, &[64]);
    roster.add(0, token(0), Pace::Together, fresh(0..100), NOW);
    let mut sent = 0;
    while let Some(pick) = roster.pick(NOW) {
        roster.report(pick, SENT, usize::MAX, NOW);
        sent += 1;
    }
    assert_eq!(sent, 10);
    record(&mut roster);
    assert!(roster.pick(NOW).is_some());
}

#[test]
fn a_held_destination_gives_its_batches_back_when_the_last_lane_reported() {
    let mut roster = roster(&[64, 64]);
    roster.add(0, token(0), Pace::Together, fresh([0, 1]), NOW);
    roster.add(1, token(1), Pace::Together, fresh([0]), NOW);
    let pick = roster.pick(NOW).unwrap();
    assert_eq!(pick.destination, 0);
    roster.stop(Some(0));
    assert_eq!(roster.returnable(), []);
    roster.report(pick, Report::Unsent, 500, NOW);
    assert_eq!(roster.returnable(), [token(0)]);
    roster.remove(token(0));
    assert_eq!(roster.pick(NOW).unwrap().destination, 1);
}

#[test]
fn b9_what_is_due_again_soon_is_tried_under_the_same_lease_and_before_the_rest() {
    let mut roster = roster(&[1]);
    roster.add(0, token(0), Pace::Together, fresh([0, 1, 2, 3]), NOW);
    let first = pick(&mut roster, NOW);
    let due = later(2_000);
    assert!(!roster.report(first, failed(due), 500, NOW));
    assert_eq!(roster.next_due(), Some(due));
    let second = pick(&mut roster, later(1_999));
    assert_eq!(second.index, 1, "not before it is due");
    roster.report(second, SENT, 500, later(1_999));
    let again = pick(&mut roster, due);
    assert_eq!((again.index, again.token, again.drive, again.attempt), (0, token(0), 0, 2));
    assert_eq!(roster.next_due(), None);
    roster.report(again, SENT, 500, due);
    assert_eq!(pick(&mut roster, due).index, 2);
    // Both attempts are reported, in their order.
    let reported: Vec<_> = roster
        .take_ready(0, NOW, Duration::ZERO)
        .pop()
        .unwrap()
        .verdicts
        .iter()
        .map(|reported| (reported.index, reported.attempt))
        .collect();
    assert_eq!(reported, [(0, 1), (1, 1), (0, 2)]);
}

#[test]
fn b9_a_retry_goes_before_batches_that_were_leased_since() {
    let mut roster = roster(&[1]);
    roster.add(0, token(0), Pace::Together, fresh([7]), NOW);
    let first = pick(&mut roster, NOW);
    roster.report(first, failed(later(1_000)), 500, NOW);
    roster.add(0, token(1), Pace::Together, fresh(0..9), NOW);
    assert_eq!(roster.waiting(0), 9, "what is not due does not count");
    let other = pick(&mut roster, NOW);
    assert_eq!(other.token, token(1));
    roster.report(other, SENT, 500, NOW);
    assert_eq!(pick(&mut roster, later(1_000)).token, token(0));
    // So does a batch that comes back for a retry.
    let mut open = fresh([4]);
    open[0].tries = 3;
    roster.add(0, token(2), Pace::Together, open, later(1_000));
    roster.report(Pick { index: 7, attempt: 2, ..first }, SENT, 500, later(1_000));
    let next = pick(&mut roster, later(1_000));
    assert_eq!((next.token, next.attempt), (token(2), 4));
}

#[test]
fn a_batch_with_more_to_say_is_recorded_when_it_says_much_or_has_waited() {
    let mut roster = roster(&[64]);
    for (id, rows) in [(0, 2), (1, 4), (2, 1)] {
        roster.add(0, token(id), Pace::Together, fresh(0..rows), NOW);
    }
    let picks: Vec<_> = std::iter::from_fn(|| roster.pick(NOW)).collect();
    roster.report(picks[0], failed(later(1_000)), 500, NOW);
    for pick in &picks[2..5] {
        roster.report(*pick, SENT, 500, later(10));
    }
    let taken = |roster: &mut Limited, group, waited: u64| {
        let ready = roster.take_ready(group, later(waited), Duration::from_millis(100));
        let mut taken: Vec<_> =
            ready.iter().map(|ready| (ready.token, ready.verdicts.len(), ready.ends)).collect();
        taken.sort_by_key(|(token, ..)| token.batch);
        taken
    };
    assert_eq!(taken(&mut roster, 0, 20), [], "all have something in flight");
    roster.report(picks[6], SENT, 500, later(20));
    assert_eq!(taken(&mut roster, 3, 20), [(token(1), 3, false), (token(2), 1, true)]);
    roster.report(picks[1], SENT, 500, later(30));
    assert_eq!(taken(&mut roster, 0, 90), [], "nothing is in flight, but a retry is to come");
    roster.report(picks[5], SENT, 500, later(90));
    assert_eq!(taken(&mut roster, 0, 100), [(token(0), 2, false), (token(1), 1, true)]);
}

#[test]
fn many_small_batches_do_not_wait_for_a_whole_group() {
    let mut roster = roster(&[64]);
    for id in 0..40 {
        roster.add(0, token(id), Pace::Together, fresh([0]), NOW);
    }
    let one = |roster: &mut Limited| {
        let pick = pick(roster, NOW);
        roster.report(pick, SENT, 500, NOW)
    };
    assert!((0..31).all(|_| !one(&mut roster)));
    assert!(one(&mut roster));
    assert_eq!(record(&mut roster).len(), 32);
    assert!(!one(&mut roster), "it counts from there");
    // A worker that drains waits for nothing else.
    let last = pick(&mut roster, NOW);
    roster.stop(None);
    assert!(roster.report(last, SENT, 500, NOW));
}

#[test]
fn b9_a_lease_ends_when_nothing_is_in_flight_and_nothing_is_due_soon() {
    let mut roster = roster(&[64]);
    roster.add(0, token(0), Pace::Together, fresh([0, 1, 2]), NOW);
    let picks: Vec<_> = std::iter::from_fn(|| roster.pick(NOW)).collect();
    assert!(!roster.report(picks[0], failed(later(10_000)), 500, NOW), "soon enough");
    assert!(!roster.report(picks[1], failed(later(10_001)), 500, NOW), "late, but one is in flight");
    let ready = record(&mut roster);
    assert_eq!((ready[0].verdicts.len(), ready[0].ends), (2, false));
    assert!(!roster.report(picks[2], SENT, 500, NOW), "one is due soon");
    let ready = record(&mut roster);
    assert_eq!((ready[0].verdicts.len(), ready[0].ends), (1, false));
    assert_eq!((roster.returnable(), roster.next_due()), (vec![], Some(later(10_000))));
    let again = pick(&mut roster, later(10_000));
    roster.report(again, failed(later(40_000)), 500, later(10_000));
    let ready = record(&mut roster);
    assert_eq!((ready[0].verdicts.len(), ready[0].ends), (1, true));
    assert_eq!(roster.returnable(), [token(0)]);
    roster.remove(token(0));
    assert!(roster.is_empty() && roster.next_due().is_none());
}

#[test]
fn b10_only_what_is_due_is_sent_and_what_is_due_late_is_left_alone() {
    let mut roster = roster(&[64]);
    let mut open = fresh(0..3);
    open[1].not_before = later(5_000);
    open[2].not_before = later(60_000);
    roster.add(0, token(0), Pace::Together, open, NOW);
    assert_eq!((roster.waiting(0), roster.next_due()), (1, Some(later(5_000))));
    assert_eq!(send_all(&mut roster, NOW, |_| SENT).len(), 1);
    assert!(!record(&mut roster)[0].ends);
    assert_eq!(send_all(&mut roster, later(5_000), |_| SENT)[0].index, 1);
    assert!(record(&mut roster)[0].ends, "the third comes with another lease");
}

#[test]
fn i8_messages_that_wait_here_are_bounded() {
    let mut roster = roster(&[100_000]);
    let count = RETRIES_HERE_MAX as u32 + 10;
    roster.add(0, token(0), Pace::Together, fresh(0..count), NOW);
    roster.all = 100_000;
    assert_eq!(send_all(&mut roster, NOW, |_| failed(later(1_000))).len() as u32, count);
    record(&mut roster);
    let again = send_all(&mut roster, later(1_000), |_| SENT);
    assert_eq!(again.len(), RETRIES_HERE_MAX);
    assert!(record(&mut roster)[0].ends, "the others come with another lease");
}

#[test]
fn i8_batches_that_stay_only_to_be_tried_again_are_bounded() {
    let mut roster = roster(&[1_000]);
    let count = RETRYING_BATCHES_MAX as u8 + 6;
    for batch in 0..count {
        roster.add(0, token(batch), Pace::Together, fresh([0]), NOW);
    }
    assert_eq!(roster.held(0), usize::from(count));
    // With more batches held than may stay, none stays.
    send_all(&mut roster, NOW, |_| failed(later(1_000)));
    let ready = record(&mut roster);
    assert!(ready.len() == usize::from(count) && ready.iter().all(|ready| ready.ends));
    for batch in 0..count {
        roster.remove(token(batch));
    }
    for batch in 0..RETRYING_BATCHES_MAX as u8 {
        roster.add(0, token(batch), Pace::Together, fresh([0]), NOW);
    }
    send_all(&mut roster, NOW, |_| failed(later(1_000)));
    assert!(record(&mut roster).iter().all(|ready| !ready.ends));
    assert_eq!(send_all(&mut roster, later(1_000), |_| SENT).len(), RETRYING_BATCHES_MAX);
}

#[test]
fn what_is_not_to_be_sent_at_all_is_recorded_with_the_rest() {
    let mut roster = roster(&[64]);
    let open = fresh([0, 1]);
    let dead = crate::model::retry::poisoned(NOW);
    roster.add(0, token(0), Pace::Together, vec![open[1]], NOW);
    roster.conclude(token(0), open[0].verdict(dead));
    roster.conclude(token(9), open[0].verdict(dead)); // gone meanwhile
    let pick = pick(&mut roster, NOW);
    let ready = record(&mut roster);
    assert_eq!(
        (ready.len(), &ready[0].verdicts[..], ready[0].ends),
        (1, &[open[0].verdict(dead)][..], false)
    );
    roster.report(pick, SENT, 500, NOW);
    assert!(record(&mut roster)[0].ends);
    // A batch of which nothing is to be sent.
    roster.add(0, token(1), Pace::Together, Vec::new(), NOW);
    roster.conclude(token(1), open[0].verdict(dead));
    let ready = record(&mut roster);
    assert_eq!((ready[0].token, ready[0].ends), (token(1), true));
    roster.remove(token(0));
    roster.remove(token(1));
    assert!(roster.is_empty() && roster.unrecorded == 0);
}

#[test]
fn what_waits_of_a_lost_or_held_batch_is_not_sent() {
    let mut roster = roster(&[64, 64]);
    for destination in 0..2 {
        roster.add(destination, token(destination as u8), Pace::Together, fresh([0]), NOW);
    }
    send_all(&mut roster, NOW, |_| failed(later(1_000)));
    record(&mut roster);
    roster.remove(token(0));
    roster.stop(Some(1));
    assert_eq!(roster.returnable(), [token(1)]);
    assert_eq!(roster.pick(later(1_000)), None);
    // Leased again, under a new fence, what the old lease left here is not its.
    let again = LeaseToken { fence: 2, ..token(1) };
    roster.add(1, again, Pace::Together, fresh([0]), later(1_000));
    assert_eq!(pick(&mut roster, later(1_000)).token, again);
    assert_eq!(roster.pick(later(9_000)), None);
}

/// The indexes of the messages of each request that may go now.
fn requests(roster: &mut Limited, now: UnixMs) -> Vec<Vec<u32>> {
    let requests = std::iter::from_fn(|| Some(roster.ask(now).0).filter(|picks| !picks.is_empty()));
    requests.map(|picks| picks.iter().map(|pick| pick.index).collect()).collect()
}

#[test]
fn a_bundle_has_messages_of_one_batch_and_takes_one_permit() {
    let mut roster = bundling(1_000, 1_000, &[4], &[3]);
    roster.add(0, token(0), Pace::Together, fresh(0..5), NOW);
    roster.add(0, token(1), Pace::Together, fresh(0..4), NOW);
    assert_eq!(requests(&mut roster, NOW), [vec![0, 1, 2], vec![3, 4], vec![0, 1, 2], vec![3]]);
    assert_eq!((roster.in_flight_to(0), roster.in_flight(), roster.waiting(0)), (4, 9, 0));
    roster.ended(0);
    assert_eq!(roster.in_flight_to(0), 3);
}

#[test]
fn i6_a_bundle_is_no_larger_than_the_window_has_room_for() {
    let mut roster = bundling(1_000, 5, &[64], &[3]);
    roster.add(0, token(0), Pace::Together, fresh(0..9), NOW);
    assert_eq!(requests(&mut roster, NOW), [vec![0, 1, 2], vec![3, 4]]);
}

#[test]
fn retries_share_no_bundle_with_first_attempts_and_suspects_share_none() {
    let mut roster = bundling(1_000, 1_000, &[64], &[10]);
    let mut open = fresh(0..8);
    open[1].tries = 1;
    open[4].tries = 2;
    roster.add(0, token(0), Pace::Together, open, NOW);
    roster.keep_apart(token(0), [5]);
    roster.add(0, token(1), Pace::Alone, fresh([0, 1]), NOW);
    let expected = [vec![1, 4], vec![0, 2, 3], vec![5], vec![6, 7], vec![0]];
    assert_eq!(requests(&mut roster, NOW), expected);
}

#[test]
fn b16_what_was_not_tried_goes_again_in_row_order_under_the_same_lease() {
    let mut roster = bundling(1_000, 1_000, &[64], &[4]);
    roster.add(0, token(0), Pace::Together, fresh(0..6), NOW);
    let (picks, _) = roster.ask(NOW);
    roster.ended(0);
    for &pick in picks.iter().rev() {
        let report = if pick.index == 1 { SENT } else { Report::Unsent };
        roster.roster.report(pick, report, usize::MAX, NOW);
    }
    assert_eq!((roster.waiting(0), roster.in_flight()), (5, 0));
    assert_eq!(requests(&mut roster, NOW), [vec![0, 2, 3, 4], vec![5]]);
}

/// A batch of `file` that goes at full pace.
fn of_file(file: u8, priority: Priority, batch: u8, messages: u32) -> Incoming {
    let (file, pace) = (FileId([file; 16]), Pace::Together);
    incoming(token(batch), file, priority, pace, fresh(0..messages))
}

/// Sends `messages`, one at a time; how many of them were of each batch.
fn shares(roster: &mut Limited, messages: usize) -> HashMap<LeaseToken, usize> {
    let mut shares = HashMap::new();
    for _ in 0..messages {
        let pick = pick(roster, NOW);
        roster.report(pick, SENT, usize::MAX, NOW);
        *shares.entry(pick.token).or_default() += 1;
    }
    shares
}

#[test]
fn b11_a_small_file_that_is_leased_later_goes_at_once() {
    let mut roster = roster(&[1]);
    for batch in 0..4 {
        roster.roster.add(0, of_file(1, Priority::Normal, batch, 500), NOW);
    }
    shares(&mut roster, 700);
    assert_eq!(roster.files_with(0, 1_300), [FileId([1; 16])]);
    assert_eq!(roster.files_with(0, 1_301), []);
    roster.roster.add(0, of_file(2, Priority::Normal, 9, 2), NOW);
    let first = pick(&mut roster, NOW);
    assert_eq!(first.token, token(9));
    roster.report(first, SENT, usize::MAX, NOW);
    assert_eq!(shares(&mut roster, 2)[&token(9)], 1, "the other one every other time");
    assert_eq!(roster.files_with(0, 1), [FileId([1; 16])], "nothing of it waits any more");
}

#[test]
fn b11_leased_files_share_by_weight_and_by_what_is_ordered_meanwhile() {
    let mut roster = roster(&[1]);
    roster.roster.add(0, of_file(1, Priority::Urgent, 1, 3_000), NOW);
    roster.roster.add(0, of_file(2, Priority::Normal, 2, 3_000), NOW);
    roster.roster.add(0, of_file(3, Priority::Bulk, 3, 3_000), NOW);
    let got = shares(&mut roster, 21 * 50);
    let of = |got: &HashMap<_, usize>, batch| got[&token(batch)];
    assert!(of(&got, 1).abs_diff(800) <= 16 && of(&got, 2).abs_diff(200) <= 4, "{got:?}");
    assert!(of(&got, 3).abs_diff(50) <= 1, "{got:?}");
    roster.prioritize(0, FileId([3; 16]), Priority::Urgent);
    roster.prioritize(0, FileId([7; 16]), Priority::Urgent); // nothing of it is here
    let got = shares(&mut roster, 200);
    assert!(of(&got, 1).abs_diff(80) <= 3 && of(&got, 3).abs_diff(80) <= 3, "{got:?}");
}

#[test]
fn b11_retries_go_first_and_first_attempts_get_their_fifth() {
    let mut roster = roster(&[2]);
    let mut again = of_file(1, Priority::Bulk, 1, 1_000);
    for message in &mut again.open {
        message.tries = 1;
    }
    roster.roster.add(0, again, NOW);
    assert!(roster.has_retries(0));
    roster.roster.add(0, of_file(2, Priority::Urgent, 2, 1_000), NOW);
    assert_eq!(pick(&mut roster, NOW).attempt, 2);
    let got = shares(&mut roster, 500);
    assert!(got[&token(2)].abs_diff(100) <= 1, "{got:?}");
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Pick,
    Report(u8),
    Record,
    Wait,
}

fn any_step() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::Pick),
        2 => any::<u8>().prop_map(Action::Report),
        1 => Just(Action::Record),
        1 => Just(Action::Wait),
    ]
}

/// What the roster must know, in the plainest form.
struct Books {
    roster: Limited,
    now: UnixMs,
    /// Requests in flight.
    flying: Vec<Vec<Pick>>,
    seen: HashSet<(LeaseToken, u32, u32)>,
    /// The messages that are not settled yet, by batch: with their recorded tries.
    open: HashMap<LeaseToken, HashMap<u32, u32>>,
}

impl Books {
    fn pick(&mut self) -> bool {
        let (picks, _) = self.roster.ask(self.now);
        for pick in &picks {
            assert!(self.seen.insert((pick.token, pick.index, pick.attempt)), "twice: {pick:?}");
            assert!(pick.attempt == 1 || self.seen.contains(&(pick.token, pick.index, pick.attempt - 1)));
            assert_eq!(pick.token, picks[0].token);
        }
        assert!(picks.len() <= BUNDLES[picks.first().map_or(0, |pick| pick.destination)]);
        let any = !picks.is_empty();
        self.flying.extend(any.then_some(picks));
        any
    }

    fn report(&mut self, picks: &[Pick], byte: u8) {
        self.roster.ended(picks[0].destination);
        for (&pick, byte) in picks.iter().zip(byte..=u8::MAX) {
            let report = match byte % 4 {
                0 if pick.attempt < 4 => failed(UnixMs(self.now.0 + u64::from(byte) * 20)),
                2 => {
                    self.seen.remove(&(pick.token, pick.index, pick.attempt));
                    Report::Unsent
                }
                _ => SENT,
            };
            self.roster.roster.report(pick, report, 3, self.now);
        }
    }

    /// Records what is ready and removes what is over; what was put off comes with another lease.
    fn record(&mut self) {
        for ready in self.roster.take_ready(0, NOW, Duration::ZERO) {
            self.roster.recorded(ready.token, ready.verdicts.len());
            let open = self.open.get_mut(&ready.token).unwrap();
            for reported in &ready.verdicts {
                let tries = open.get_mut(&reported.index).expect("it was open");
                *tries += 1;
                assert_eq!(reported.attempt, *tries, "in their order");
                if matches!(reported.verdict, Verdict::Sent { .. }) {
                    open.remove(&reported.index);
                }
            }
            if ready.ends || open.is_empty() {
                let in_flight = self.flying.iter().any(|picks| picks[0].token == ready.token);
                assert!(!in_flight, "a lease ends when nothing is in flight");
                self.roster.remove(ready.token);
            }
        }
    }
}

/// Messages of a request to each destination.
const BUNDLES: [usize; 3] = [1, 4, 3];

proptest! {
    #[test]
    fn every_attempt_is_made_once_and_the_books_balance(
        batches in prop::collection::vec((0usize..3, 0u8..4, 1u32..20), 1..12),
        steps in prop::collection::vec(any_step(), 0..600),
    ) {
        let mut books = Books {
            roster: bundling(5, 9, &[1, 2, 64], &BUNDLES),
            now: NOW,
            flying: Vec::new(),
            seen: HashSet::new(),
            open: HashMap::new(),
        };
        for (nth, &(destination, losses, count)) in batches.iter().enumerate() {
            let token = token(nth as u8);
            let (file, pace, open) = (FileId([nth as u8 % 4; 16]), Pace::of(losses), fresh(0..count));
            let priority = Priority::from_byte(nth as u8 % 3).unwrap();
            books.roster.roster.add(destination, incoming(token, file, priority, pace, open), NOW);
            books.open.insert(token, (0..count).map(|index| (index, 0)).collect());
        }
        for step in steps {
            match step {
                Action::Pick => drop(books.pick()),
                Action::Report(byte) if !books.flying.is_empty() => {
                    let picks = books.flying.remove(usize::from(byte) % books.flying.len());
                    books.report(&picks, byte % 128);
                }
                Action::Report(_) => {}
                Action::Record => books.record(),
                Action::Wait => books.now.0 += 700,
            }
            prop_assert!(books.flying.len() <= 5);
            prop_assert_eq!(books.roster.in_flight(), books.flying.iter().map(Vec::len).sum::<usize>());
            prop_assert!(books.roster.unrecorded <= 9);
        }
        for _ in 0..10_000 {
            if books.roster.is_empty() {
                break;
            }
            books.now.0 += 700;
            while books.pick() {}
            for picks in std::mem::take(&mut books.flying) {
                for pick in &picks {
                    books.roster.roster.report(*pick, SENT, 3, books.now);
                }
                books.roster.ended(picks[0].destination);
            }
            books.record();
        }
        prop_assert!(books.roster.is_empty());
        prop_assert_eq!(books.roster.unrecorded, 0);
        prop_assert_eq!(books.roster.next_due(), None);
        for slot in &books.roster.destinations {
            prop_assert_eq!((slot.in_flight, slot.held, slot.waiting), (0, 0, 0));
            prop_assert!(slot.fresh.turns.is_empty() && slot.retries.turns.is_empty());
        }
        // What was not sent was put off: tried once at least.
        for (token, open) in &books.open {
            for index in open.keys() {
                prop_assert!(books.seen.contains(&(*token, *index, 1)));
            }
        }
    }
}
