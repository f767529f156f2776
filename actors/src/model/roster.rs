//! Which message a worker sends next: its leased batches, served by deficit round-robin between
//! destinations (design §9), within the limits on concurrency and on unrecorded outcomes (I6).
//!
//! Lanes (the worker's sending tasks) ask for a message, send it, report the verdict, and ask again. A
//! destination that is slow fills only its own permits; the others go on.
//!
//! A failed message that is due again soon is tried again under the same lease (B9), before what has not been tried:
//! it waits in its destination's queue of retries, and its batch stays until nothing of it is in flight or due soon.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use super::{
    ids::BatchId,
    lease::{LeaseToken, OpenMessage},
    ledger::MessageVerdict,
    outcome::Verdict,
    suspect::Pace,
    time::UnixMs,
};

/// Messages that one destination may send in its turn while others wait.
const QUANTUM: u32 = 16;

/// A message that is due again within this is tried again under the same lease (B9).
const RETRY_HERE: Duration = Duration::from_secs(10);

/// Messages of one destination that may wait for that; beyond it their batches are given back, to come again when
/// they are due.
const RETRIES_HERE_MAX: usize = 4_096;

/// Batches of one destination in hand above which none stays only to be tried again: each holds its open rows in
/// memory (I8).
const RETRYING_BATCHES_MAX: usize = 64;

/// A worker's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RosterLimits {
    /// Messages in flight to all destinations together.
    pub concurrency: usize,
    /// Outcomes that may wait for the ledger, messages in flight included: the window of I6.
    pub unrecorded: usize,
}

/// A message that a lane has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pick {
    /// Index of the destination.
    pub destination: usize,
    /// Its batch.
    pub token: LeaseToken,
    /// Its index in the batch.
    pub index: u32,
    /// Its drive.
    pub drive: u32,
    /// Which attempt of that drive this is, from 1.
    pub attempt: u32,
}

/// What became of a picked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Record this.
    Verdict(Verdict),
    /// It was not sent, or its destination is gone: nothing is recorded and the message stays open.
    Unsent,
}

/// What is to be recorded of one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Its lease.
    pub token: LeaseToken,
    /// New facts, in the order in which they became known.
    pub verdicts: Vec<MessageVerdict>,
    /// Nothing more is to be done here: the lease ends with this.
    pub ends: bool,
    /// The message that is begun by itself once that is recorded (B17).
    pub begins: Option<u32>,
}

#[derive(Debug)]
struct Batch {
    token: LeaseToken,
    destination: usize,
    pace: Pace,
    /// Messages to send, in row order but for retries, which are first.
    open: VecDeque<OpenMessage>,
    /// Messages that wait to be tried again here.
    later: u32,
    in_flight: u32,
    /// Verdicts that wait for the ledger.
    ready: Vec<MessageVerdict>,
    /// Verdicts that the ledger is recording.
    recording: u32,
    /// The message that the ledger is marking as begun …
    marking: Option<u32>,
    /// … or has marked.
    marked: Option<u32>,
    /// No more picks: the destination is held, the lease is lost, or the worker drains.
    stopped: bool,
}

impl Batch {
    /// One message at a time, and where each is to be recorded, not before it is marked as begun.
    fn is_blocked(&self) -> bool {
        match self.pace {
            Pace::Together => false,
            Pace::Alone => self.in_flight > 0,
            Pace::AloneMarked => {
                let next = self.open.front().map(|message| message.index);
                self.in_flight > 0 || next != self.marked || self.recording > 0
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.ready.is_empty() && self.recording == 0 && self.marking.is_none()
    }

    /// Whether nothing is left to begin here.
    fn is_exhausted(&self) -> bool {
        self.stopped || (self.open.is_empty() && self.later == 0)
    }

    /// The message that is to be marked as begun next.
    fn to_mark(&self) -> Option<u32> {
        let waits = self.pace == Pace::AloneMarked && self.in_flight == 0 && !self.stopped;
        let next = self.open.front().map(|message| message.index).filter(|_| waits && self.marking.is_none());
        next.filter(|next| self.marked != Some(*next))
    }
}

/// A message that waits to be tried again under the same lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Later {
    message: OpenMessage,
    batch: BatchId,
    fence: u64,
}

#[derive(Debug, Default)]
struct Destination {
    concurrency: usize,
    in_flight: usize,
    /// Batches with open messages: those with retries, then the others in the order in which they were leased.
    queue: VecDeque<BatchId>,
    /// Messages that wait to be tried again here, the earliest due first.
    later: BinaryHeap<Reverse<Later>>,
    held: usize,
    /// Open messages of batches that go at full pace.
    waiting: usize,
    deficit: u32,
}

/// The state machine. It knows no payload, no clock and no task.
#[derive(Debug)]
pub struct Roster {
    limits: RosterLimits,
    destinations: Vec<Destination>,
    batches: HashMap<BatchId, Batch>,
    turn: usize,
    in_flight: usize,
    unrecorded: usize,
}

impl Roster {
    /// A roster for destinations with these limits on messages in flight.
    pub fn new(limits: RosterLimits, concurrency: &[usize]) -> Self {
        let destinations =
            concurrency.iter().map(|&concurrency| Destination { concurrency, ..Destination::default() });
        Self {
            limits,
            destinations: destinations.collect(),
            batches: HashMap::new(),
            turn: 0,
            in_flight: 0,
            unrecorded: 0,
        }
    }

    /// Takes over a leased batch. `open` are its open messages, in row order; what is not due soon is left alone
    /// (B10).
    pub fn add(
        &mut self,
        destination: usize,
        token: LeaseToken,
        pace: Pace,
        open: Vec<OpenMessage>,
        now: UnixMs,
    ) {
        // Leased again after a loss that this worker has not noticed yet: the old lease is over.
        if let Some(stale) = self.batches.get(&token.batch).map(|batch| batch.token) {
            self.remove(stale);
        }
        let slot = &mut self.destinations[destination];
        let is_retry = open.iter().any(|message| message.tries > 0 || message.drive > 0);
        let (due, later): (Vec<_>, Vec<_>) = open.into_iter().partition(|message| message.not_before <= now);
        let mut batch = Batch {
            token,
            destination,
            pace,
            open: due.into(),
            later: 0,
            in_flight: 0,
            ready: Vec::new(),
            recording: 0,
            marking: None,
            marked: None,
            stopped: false,
        };
        slot.held += 1;
        if pace == Pace::Together {
            slot.waiting += batch.open.len();
        }
        for message in later {
            slot.keep_for_later(&mut batch, message, now);
        }
        if !batch.open.is_empty() {
            if is_retry {
                slot.queue.push_front(token.batch);
            } else {
                slot.queue.push_back(token.batch);
            }
        }
        self.batches.insert(token.batch, batch);
    }

    /// A verdict on a message of a batch in hand that is not to be sent at all: it is condemned, or can't be read.
    pub fn conclude(&mut self, token: LeaseToken, verdict: MessageVerdict) {
        if let Some(batch) = self.batches.get_mut(&token.batch) {
            batch.ready.push(verdict);
            self.unrecorded += 1;
        }
    }

    /// How many batches of a destination are in hand.
    pub fn held(&self, destination: usize) -> usize {
        self.destinations[destination].held
    }

    /// Messages of a destination that are in flight.
    pub fn in_flight_to(&self, destination: usize) -> usize {
        self.destinations[destination].in_flight
    }

    /// Messages of a destination that wait for their first pick here and may be sent at full pace. Suspects don't
    /// count: they must not keep their neighbours waiting.
    pub fn waiting(&self, destination: usize) -> usize {
        self.destinations[destination].waiting
    }

    /// The leases in hand.
    pub fn tokens(&self) -> Vec<LeaseToken> {
        self.batches.values().map(|batch| batch.token).collect()
    }

    /// Messages in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// When the next message that waits to be tried again is due; `None` if none waits.
    pub fn next_due(&self) -> Option<UnixMs> {
        let due = |slot: &Destination| slot.later.peek().map(|Reverse(later)| later.message.not_before);
        self.destinations.iter().filter_map(due).min()
    }

    /// The next message to send at `now`, if limits and permits allow one.
    pub fn pick(&mut self, now: UnixMs) -> Option<Pick> {
        if self.in_flight >= self.limits.concurrency || self.unrecorded >= self.limits.unrecorded {
            return None;
        }
        for _ in 0..self.destinations.len() {
            if let Some(pick) = self.pick_from(self.turn, now) {
                let slot = &mut self.destinations[self.turn];
                slot.deficit = slot.deficit.saturating_sub(1);
                slot.in_flight += 1;
                self.in_flight += 1;
                self.unrecorded += 1;
                if slot.deficit == 0 {
                    self.pass_turn();
                }
                return Some(pick);
            }
            // A destination that can't use its turn does not save it up.
            self.destinations[self.turn].deficit = 0;
            self.pass_turn();
        }
        None
    }

    fn pass_turn(&mut self) {
        self.turn = (self.turn + 1) % self.destinations.len();
        self.destinations[self.turn].deficit += QUANTUM;
    }

    /// Moves what is due again to the front of its batch, and its batch to the front of the queue.
    fn promote(&mut self, destination: usize, now: UnixMs) {
        let slot = &mut self.destinations[destination];
        while let Some(Reverse(later)) = slot.later.peek().copied()
            && later.message.not_before <= now
        {
            slot.later.pop();
            let batch = self.batches.get_mut(&later.batch).filter(|batch| batch.token.fence == later.fence);
            let Some(batch) = batch else { continue };
            batch.later -= 1;
            if !batch.stopped {
                batch.open.push_front(later.message);
                slot.waiting += usize::from(batch.pace == Pace::Together);
                if slot.queue.front() != Some(&later.batch) {
                    slot.queue.push_front(later.batch);
                }
            }
        }
    }

    fn pick_from(&mut self, destination: usize, now: UnixMs) -> Option<Pick> {
        if self.destinations[destination].in_flight >= self.destinations[destination].concurrency {
            return None;
        }
        self.promote(destination, now);
        let slot = &mut self.destinations[destination];
        let mut at = 0;
        while let Some(id) = slot.queue.get(at).copied() {
            // A batch may stand here twice: once for its retries, once in the order of leases.
            let Some(batch) = self.batches.get_mut(&id).filter(|batch| !batch.open.is_empty()) else {
                slot.queue.remove(at);
                continue;
            };
            if batch.stopped {
                slot.queue.remove(at);
                continue;
            }
            if batch.is_blocked() {
                at += 1;
                continue;
            }
            let message = batch.open.pop_front().expect("an open message was just seen");
            batch.marked = None;
            batch.in_flight += 1;
            slot.waiting -= usize::from(batch.pace == Pace::Together);
            if batch.open.is_empty() {
                slot.queue.remove(at);
            }
            let OpenMessage { index, drive, tries, .. } = message;
            return Some(Pick { destination, token: batch.token, index, drive, attempt: tries + 1 });
        }
        None
    }

    /// Takes note of what became of a picked message. Whether outcomes should be recorded now: `group` of them
    /// wait, or a batch waits for nothing else.
    pub fn report(&mut self, pick: Pick, report: Report, group: usize, now: UnixMs) -> bool {
        let slot = &mut self.destinations[pick.destination];
        slot.in_flight -= 1;
        self.in_flight -= 1;
        let batch = self.batches.get_mut(&pick.token.batch).filter(|batch| batch.token == pick.token);
        let Some(batch) = batch else {
            self.unrecorded -= 1;
            return false;
        };
        batch.in_flight -= 1;
        let Report::Verdict(verdict) = report else {
            self.unrecorded -= 1;
            return false;
        };
        let Pick { index, drive, attempt, .. } = pick;
        batch.ready.push(MessageVerdict { index, drive, attempt, verdict });
        if let Verdict::Retry { not_before, .. } = verdict
            && batch.pace == Pace::Together
            && slot.held <= RETRYING_BATCHES_MAX
        {
            slot.keep_for_later(batch, OpenMessage { not_before, index, drive, tries: attempt }, now);
        }
        let waited_for = batch.pace == Pace::AloneMarked;
        let last = batch.is_exhausted() && batch.in_flight == 0;
        waited_for || last || self.unrecorded - self.in_flight >= group
    }

    /// Hands out all that waits for recording.
    pub fn take_ready(&mut self) -> Vec<Ready> {
        let mut taken = Vec::new();
        for batch in self.batches.values_mut() {
            let begins = batch.to_mark();
            if batch.ready.is_empty() && begins.is_none() {
                continue;
            }
            batch.recording += batch.ready.len() as u32;
            batch.marking = begins;
            let verdicts = std::mem::take(&mut batch.ready);
            let ends = batch.in_flight == 0 && batch.is_exhausted();
            taken.push(Ready { token: batch.token, verdicts, ends, begins });
        }
        taken
    }

    /// `count` verdicts of a batch are recorded, and what was to be marked is.
    pub fn recorded(&mut self, token: LeaseToken, count: usize) {
        self.unrecorded -= count;
        if let Some(batch) = self.batches.get_mut(&token.batch).filter(|batch| batch.token == token) {
            batch.recording -= count as u32;
            batch.marked = batch.marking.take().or(batch.marked);
        }
    }

    /// Forgets a batch that is complete, or whose lease is lost. Lanes still sending its messages
    /// may report them; nothing comes of it.
    pub fn remove(&mut self, token: LeaseToken) {
        if self.batches.get(&token.batch).is_some_and(|batch| batch.token == token) {
            let batch = self.batches.remove(&token.batch).expect("it was just seen");
            self.unrecorded -= batch.ready.len();
            let slot = &mut self.destinations[batch.destination];
            slot.held -= 1;
            slot.waiting -= batch.waiting();
            slot.queue.retain(|&id| id != token.batch);
            if batch.later > 0 {
                slot.later.retain(|Reverse(later)| later.batch != token.batch);
            }
        }
    }

    /// No more picks for a destination (it is held), or for all (the worker drains).
    pub fn stop(&mut self, destination: Option<usize>) {
        for batch in self.batches.values_mut() {
            if destination.is_none_or(|destination| destination == batch.destination) {
                self.destinations[batch.destination].waiting -= batch.waiting();
                batch.stopped = true;
            }
        }
    }

    /// Batches that nothing more will happen to here: to be given back.
    pub fn returnable(&self) -> Vec<LeaseToken> {
        let returnable = |batch: &&Batch| batch.is_idle() && batch.is_exhausted();
        self.batches.values().filter(returnable).map(|batch| batch.token).collect()
    }

    /// Whether nothing is in hand.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.in_flight == 0
    }
}

impl Batch {
    /// What of it counts as waiting at its destination.
    fn waiting(&self) -> usize {
        if self.pace == Pace::Together && !self.stopped { self.open.len() } else { 0 }
    }
}

impl Destination {
    /// Keeps a message of `batch` that is due soon, if there is room.
    fn keep_for_later(&mut self, batch: &mut Batch, message: OpenMessage, now: UnixMs) {
        let is_soon = message.not_before.since(now) <= RETRY_HERE;
        if is_soon && !batch.stopped && self.later.len() < RETRIES_HERE_MAX {
            batch.later += 1;
            let (id, fence) = (batch.token.batch, batch.token.fence);
            self.later.push(Reverse(Later { message, batch: id, fence }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
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

    fn roster(concurrency: &[usize]) -> Roster {
        Roster::new(RosterLimits { concurrency: 1000, unrecorded: 100_000 }, concurrency)
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
    fn record(roster: &mut Roster) -> Vec<Ready> {
        let ready = roster.take_ready();
        for ready in &ready {
            roster.recorded(ready.token, ready.verdicts.len());
        }
        ready
    }

    fn pick(roster: &mut Roster, now: UnixMs) -> Pick {
        roster.pick(now).expect("there is one to send")
    }

    /// Picks and answers everything that can be sent now.
    fn send_all(roster: &mut Roster, now: UnixMs, mut report: impl FnMut(Pick) -> Report) -> Vec<Pick> {
        let picks: Vec<_> = std::iter::from_fn(|| roster.pick(now)).collect();
        for &pick in &picks {
            roster.report(pick, report(pick), usize::MAX, now);
        }
        picks
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
        let mut roster = Roster::new(RosterLimits { concurrency: 1, unrecorded: 10_000 }, &[64, 64, 64]);
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
        assert_eq!(roster.take_ready(), [mark(vec![], false, Some(1))]);
        assert_eq!(roster.take_ready(), [], "once");
        assert_eq!(roster.pick(NOW), None, "the ledger has not answered");
        roster.recorded(token(0), 0);
        let first = pick(&mut roster, NOW);
        assert_eq!((first.index, roster.pick(NOW)), (1, None));
        assert_eq!(roster.take_ready(), [], "the next is not marked while this one is in flight");
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
        let mut roster = Roster::new(RosterLimits { concurrency: 8, unrecorded: 10 }, &[64]);
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
        // Both attempts are told, in their order.
        let told: Vec<_> = roster
            .take_ready()
            .pop()
            .unwrap()
            .verdicts
            .iter()
            .map(|told| (told.index, told.attempt))
            .collect();
        assert_eq!(told, [(0, 1), (1, 1), (0, 2)]);
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
        // So does a batch that comes to be tried again.
        let mut open = fresh([4]);
        open[0].tries = 3;
        roster.add(0, token(2), Pace::Together, open, later(1_000));
        roster.report(Pick { index: 7, attempt: 2, ..first }, SENT, 500, later(1_000));
        let next = pick(&mut roster, later(1_000));
        assert_eq!((next.token, next.attempt), (token(2), 4));
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
        assert!(
            roster.report(again, failed(later(40_000)), 500, later(10_000)),
            "nothing is left to wait for"
        );
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
        roster.limits.concurrency = 100_000;
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
        // With more in hand than may stay, none does.
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
        assert!(roster.report(pick, SENT, 500, NOW));
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

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Pick,
        Report(u8),
        Record,
        Wait,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Pick),
            2 => any::<u8>().prop_map(Step::Report),
            1 => Just(Step::Record),
            1 => Just(Step::Wait),
        ]
    }

    /// What the roster must know, in the plainest form.
    struct Books {
        roster: Roster,
        now: UnixMs,
        flying: Vec<Pick>,
        seen: HashSet<(LeaseToken, u32, u32)>,
        /// The messages that are not settled yet, by batch: with their recorded tries.
        open: HashMap<LeaseToken, HashMap<u32, u32>>,
    }

    impl Books {
        fn pick(&mut self) -> bool {
            let Some(pick) = self.roster.pick(self.now) else { return false };
            assert!(self.seen.insert((pick.token, pick.index, pick.attempt)), "twice: {pick:?}");
            assert!(pick.attempt == 1 || self.seen.contains(&(pick.token, pick.index, pick.attempt - 1)));
            self.flying.push(pick);
            true
        }

        fn report(&mut self, pick: Pick, byte: u8) {
            let report = match byte % 4 {
                0 if pick.attempt < 4 => failed(UnixMs(self.now.0 + u64::from(byte) * 20)),
                _ => SENT,
            };
            self.roster.report(pick, report, 3, self.now);
        }

        /// Records what is ready and removes what is over; what was put off comes with another lease.
        fn record(&mut self) {
            for ready in self.roster.take_ready() {
                self.roster.recorded(ready.token, ready.verdicts.len());
                let open = self.open.get_mut(&ready.token).unwrap();
                for told in &ready.verdicts {
                    let tries = open.get_mut(&told.index).expect("it was open");
                    *tries += 1;
                    assert_eq!(told.attempt, *tries, "in their order");
                    if matches!(told.verdict, Verdict::Sent { .. }) {
                        open.remove(&told.index);
                    }
                }
                if ready.ends || open.is_empty() {
                    let in_flight = self.flying.iter().any(|pick| pick.token == ready.token);
                    assert!(!in_flight, "a lease ends when nothing is in flight");
                    self.roster.remove(ready.token);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_attempt_is_made_once_and_the_books_balance(
            batches in prop::collection::vec((0usize..3, 0u8..4, 1u32..20), 1..12),
            steps in prop::collection::vec(any_step(), 0..600),
        ) {
            let limits = RosterLimits { concurrency: 5, unrecorded: 9 };
            let mut books = Books {
                roster: Roster::new(limits, &[1, 2, 64]),
                now: NOW,
                flying: Vec::new(),
                seen: HashSet::new(),
                open: HashMap::new(),
            };
            for (nth, &(destination, losses, count)) in batches.iter().enumerate() {
                let token = token(nth as u8);
                books.roster.add(destination, token, Pace::of(losses), fresh(0..count), NOW);
                books.open.insert(token, (0..count).map(|index| (index, 0)).collect());
            }
            for step in steps {
                match step {
                    Step::Pick => drop(books.pick()),
                    Step::Report(byte) if !books.flying.is_empty() => {
                        let pick = books.flying.remove(usize::from(byte) % books.flying.len());
                        books.report(pick, byte);
                    }
                    Step::Report(_) => {}
                    Step::Record => books.record(),
                    Step::Wait => books.now.0 += 700,
                }
                prop_assert!(books.flying.len() <= 5);
                prop_assert_eq!(books.roster.in_flight(), books.flying.len());
                prop_assert!(books.roster.unrecorded <= 9);
            }
            for _ in 0..10_000 {
                if books.roster.is_empty() {
                    break;
                }
                books.now.0 += 700;
                while books.pick() {}
                for pick in std::mem::take(&mut books.flying) {
                    books.report(pick, 1);
                }
                books.record();
            }
            prop_assert!(books.roster.is_empty());
            prop_assert_eq!(books.roster.unrecorded, 0);
            prop_assert_eq!(books.roster.next_due(), None);
            for slot in &books.roster.destinations {
                prop_assert_eq!((slot.in_flight, slot.held, slot.waiting), (0, 0, 0));
            }
            // What was not sent was put off: tried once at least.
            for (token, open) in &books.open {
                for index in open.keys() {
                    prop_assert!(books.seen.contains(&(*token, *index, 1)));
                }
            }
        }
    }
}
