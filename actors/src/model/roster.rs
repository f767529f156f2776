//! Which message a worker sends next: its leased batches, served by deficit round-robin between
//! destinations (design §9), within the limits on concurrency and on unrecorded outcomes (I6).
//!
//! Lanes (the worker's sending tasks) ask for a message, send it, report the verdict, and ask again. A
//! destination that is slow fills only its own permits; the others go on.

use std::collections::{HashMap, VecDeque};

use super::{ids::BatchId, lease::LeaseToken, outcome::Verdict, suspect::Pace};

/// Messages that one destination may send in its turn while others wait.
const QUANTUM: u32 = 16;

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
}

/// What became of a picked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Record this.
    Verdict(Verdict),
    /// It was not sent, or its destination is gone: nothing is recorded and the message stays open.
    Unsent,
}

#[derive(Debug)]
struct Batch {
    token: LeaseToken,
    destination: usize,
    pace: Pace,
    /// Indexes to send, in row order.
    open: VecDeque<u32>,
    in_flight: u32,
    /// Verdicts that wait for the ledger.
    ready: Vec<(u32, Verdict)>,
    /// Verdicts that the ledger is recording.
    recording: u32,
    /// Messages that came back unsent: the batch can't complete here.
    unsent: bool,
    /// No more picks: the destination is held, the lease is lost, or the worker drains.
    stopped: bool,
}

impl Batch {
    /// One message at a time, and where each is to be recorded, not before the last is.
    fn is_blocked(&self) -> bool {
        match self.pace {
            Pace::Together => false,
            Pace::Alone => self.in_flight > 0,
            Pace::AloneRecorded | Pace::Condemn => {
                self.in_flight > 0 || !self.ready.is_empty() || self.recording > 0
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.ready.is_empty() && self.recording == 0
    }
}

#[derive(Debug, Default)]
struct Destination {
    concurrency: usize,
    in_flight: usize,
    /// Batches with open messages, in the order in which they were leased.
    queue: VecDeque<BatchId>,
    held: usize,
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

    /// Takes over a leased batch. `open` are the indexes to send, in row order.
    pub fn add(&mut self, destination: usize, token: LeaseToken, pace: Pace, open: Vec<u32>) {
        // Leased again after a loss that this worker has not noticed yet: the old lease is over.
        if let Some(stale) = self.batches.get(&token.batch).map(|batch| batch.token) {
            self.remove(stale);
        }
        let slot = &mut self.destinations[destination];
        slot.queue.push_back(token.batch);
        slot.held += 1;
        let batch = Batch {
            token,
            destination,
            pace,
            open: open.into(),
            in_flight: 0,
            ready: Vec::new(),
            recording: 0,
            unsent: false,
            stopped: false,
        };
        self.batches.insert(token.batch, batch);
    }

    /// The first open message of a condemned batch, which is to be recorded as poison, unsent.
    pub fn condemn(&mut self, token: LeaseToken, verdict: Verdict) {
        if let Some(batch) = self.batches.get_mut(&token.batch)
            && let Some(index) = batch.open.pop_front()
        {
            batch.ready.push((index, verdict));
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

    /// How many of a destination's batches still have messages to begin and may be sent at full
    /// pace. Suspects don't count: they must not keep their neighbours waiting.
    pub fn waiting(&self, destination: usize) -> usize {
        let queue = self.destinations[destination].queue.iter();
        queue.filter(|&id| self.batches.get(id).is_some_and(|batch| batch.pace == Pace::Together)).count()
    }

    /// The leases in hand.
    pub fn tokens(&self) -> Vec<LeaseToken> {
        self.batches.values().map(|batch| batch.token).collect()
    }

    /// Messages in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Outcomes that wait to be recorded, messages in flight not included.
    pub fn ready(&self) -> usize {
        self.batches.values().map(|batch| batch.ready.len()).sum()
    }

    /// The next message to send, if limits and permits allow one.
    pub fn pick(&mut self) -> Option<Pick> {
        if self.in_flight >= self.limits.concurrency || self.unrecorded >= self.limits.unrecorded {
            return None;
        }
        for _ in 0..self.destinations.len() {
            if let Some(pick) = self.pick_from(self.turn) {
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

    fn pick_from(&mut self, destination: usize) -> Option<Pick> {
        let slot = &mut self.destinations[destination];
        if slot.in_flight >= slot.concurrency {
            return None;
        }
        let mut at = 0;
        while let Some(id) = slot.queue.get(at).copied() {
            let Some(batch) = self.batches.get_mut(&id) else {
                slot.queue.remove(at);
                continue;
            };
            if batch.stopped || batch.open.is_empty() {
                slot.queue.remove(at);
                continue;
            }
            if batch.is_blocked() {
                at += 1;
                continue;
            }
            let index = batch.open.pop_front().expect("an open message was just seen");
            batch.in_flight += 1;
            if batch.open.is_empty() {
                slot.queue.remove(at);
            }
            return Some(Pick { destination, token: batch.token, index });
        }
        None
    }

    /// Takes a lane's report. Returns whether the outcomes that wait have become many enough to be
    /// recorded now: `group` of them, or any that another message waits for.
    pub fn report(&mut self, pick: Pick, report: Report, group: usize) -> bool {
        self.in_flight -= 1;
        self.destinations[pick.destination].in_flight -= 1;
        let Some(batch) = self.batches.get_mut(&pick.token.batch).filter(|batch| batch.token == pick.token)
        else {
            self.unrecorded -= 1;
            return false;
        };
        batch.in_flight -= 1;
        match report {
            Report::Verdict(verdict) => batch.ready.push((pick.index, verdict)),
            Report::Unsent => {
                batch.unsent = true;
                self.unrecorded -= 1;
            }
        }
        let waited_for = batch.is_blocked() && !batch.open.is_empty();
        let last = batch.open.is_empty() && batch.in_flight == 0;
        waited_for || last || self.unrecorded - self.in_flight >= group
    }

    /// Hands out every waiting verdict for recording.
    pub fn take_ready(&mut self) -> Vec<(LeaseToken, Vec<(u32, Verdict)>)> {
        let mut taken = Vec::new();
        for batch in self.batches.values_mut().filter(|batch| !batch.ready.is_empty()) {
            batch.recording += batch.ready.len() as u32;
            taken.push((batch.token, std::mem::take(&mut batch.ready)));
        }
        taken
    }

    /// `count` verdicts of a batch are recorded.
    pub fn recorded(&mut self, token: LeaseToken, count: usize) {
        self.unrecorded -= count;
        if let Some(batch) = self.batches.get_mut(&token.batch).filter(|batch| batch.token == token) {
            batch.recording -= count as u32;
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
            slot.queue.retain(|&id| id != token.batch);
        }
    }

    /// No more picks for a destination (it is held), or for all (the worker drains).
    pub fn stop(&mut self, destination: Option<usize>) {
        for batch in self.batches.values_mut() {
            if destination.is_none_or(|destination| destination == batch.destination) {
                batch.stopped = true;
            }
        }
    }

    /// Batches that nothing more will happen to here: to be given back.
    pub fn returnable(&self) -> Vec<LeaseToken> {
        let returnable =
            |batch: &&Batch| batch.is_idle() && (batch.stopped || (batch.unsent && batch.open.is_empty()));
        self.batches.values().filter(returnable).map(|batch| batch.token).collect()
    }

    /// Whether nothing is in hand.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.in_flight == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::UnixMs;
    use proptest::prelude::*;

    const SENT: Report = Report::Verdict(Verdict::Sent { at: UnixMs(1), status: 200 });

    fn token(batch: u8) -> LeaseToken {
        LeaseToken { batch: BatchId([batch; 16]), fence: 1 }
    }

    fn roster(concurrency: &[usize]) -> Roster {
        Roster::new(RosterLimits { concurrency: 1000, unrecorded: 1000 }, concurrency)
    }

    #[test]
    fn a_slow_destination_holds_only_its_own_permits() {
        let mut roster = roster(&[4, 4]);
        roster.add(0, token(0), Pace::Together, (0..100).collect());
        roster.add(1, token(1), Pace::Together, (0..100).collect());
        let stuck: Vec<_> = std::iter::from_fn(|| roster.pick()).collect();
        assert_eq!(stuck.len(), 8);
        for _ in 0..96 {
            let pick = stuck.iter().find(|pick| pick.destination == 1).copied().unwrap();
            roster.report(pick, SENT, 500); // destination 0 never answers
            let next = roster.pick();
            assert!(next.is_none_or(|next| next.destination == 1));
        }
        assert_eq!(roster.waiting(1), 0);
    }

    #[test]
    fn under_a_global_limit_destinations_share_evenly() {
        let mut roster = Roster::new(RosterLimits { concurrency: 1, unrecorded: 10_000 }, &[64, 64, 64]);
        for destination in 0..3 {
            roster.add(destination, token(destination as u8), Pace::Together, (0..1000).collect());
        }
        let mut served = [0; 3];
        for _ in 0..480 {
            let pick = roster.pick().unwrap();
            served[pick.destination] += 1;
            roster.report(pick, SENT, usize::MAX);
        }
        assert!(served.iter().all(|&served| (150..=176).contains(&served)), "{served:?}");
    }

    #[test]
    fn suspects_go_alone_and_later_each_waits_for_the_record() {
        let mut roster = roster(&[64]);
        roster.add(0, token(0), Pace::Alone, vec![3, 5]);
        let first = roster.pick().unwrap();
        assert_eq!((first.index, roster.pick()), (3, None));
        roster.report(first, SENT, 500);
        assert_eq!(roster.pick().unwrap().index, 5);

        roster.add(0, token(1), Pace::AloneRecorded, vec![1, 2]);
        let first = roster.pick().unwrap();
        assert!(roster.report(first, SENT, 500), "the next message waits for the record: now");
        assert_eq!(roster.pick(), None);
        let ready: Vec<_> = roster.take_ready();
        assert_eq!(roster.pick(), None, "not before it is recorded");
        for (token, verdicts) in ready {
            roster.recorded(token, verdicts.len());
        }
        assert_eq!(roster.pick().unwrap().index, 2);
    }

    #[test]
    fn i6_unrecorded_outcomes_stop_the_lanes() {
        let mut roster = Roster::new(RosterLimits { concurrency: 8, unrecorded: 10 }, &[64]);
        roster.add(0, token(0), Pace::Together, (0..100).collect());
        let mut sent = 0;
        while let Some(pick) = roster.pick() {
            roster.report(pick, SENT, usize::MAX);
            sent += 1;
        }
        assert_eq!(sent, 10);
        for (token, verdicts) in roster.take_ready() {
            roster.recorded(token, verdicts.len());
        }
        assert!(roster.pick().is_some());
    }

    #[test]
    fn a_held_destination_gives_its_batches_back_when_the_last_lane_reported() {
        let mut roster = roster(&[64, 64]);
        roster.add(0, token(0), Pace::Together, vec![0, 1]);
        roster.add(1, token(1), Pace::Together, vec![0]);
        let pick = roster.pick().unwrap();
        assert_eq!(pick.destination, 0);
        roster.stop(Some(0));
        assert_eq!(roster.returnable(), []);
        roster.report(pick, Report::Unsent, 500);
        assert_eq!(roster.returnable(), [token(0)]);
        roster.remove(token(0));
        assert_eq!(roster.pick().unwrap().destination, 1);
    }

    proptest! {
        #[test]
        fn every_message_is_picked_once_and_the_books_balance(
            batches in prop::collection::vec((0usize..3, 0u8..4, 1u32..20), 1..12),
            steps in prop::collection::vec(0u8..6, 0..600),
        ) {
            let mut roster = Roster::new(RosterLimits { concurrency: 5, unrecorded: 9 }, &[1, 2, 64]);
            let mut open = HashMap::new();
            for (nth, &(destination, losses, count)) in batches.iter().enumerate() {
                let token = token(nth as u8);
                roster.add(destination, token, Pace::of(u32::from(losses), 5), (0..count).collect());
                open.insert(token, count);
            }
            let mut flying: Vec<Pick> = Vec::new();
            let mut seen = std::collections::HashSet::new();
            let settle = |roster: &mut Roster, open: &mut HashMap<LeaseToken, u32>| {
                for (token, verdicts) in roster.take_ready() {
                    roster.recorded(token, verdicts.len());
                    let left = open.get_mut(&token).unwrap();
                    *left -= verdicts.len() as u32;
                    if *left == 0 {
                        roster.remove(token);
                    }
                }
            };
            for step in steps {
                match step {
                    0..=2 => if let Some(pick) = roster.pick() {
                        prop_assert!(seen.insert((pick.token, pick.index)));
                        flying.push(pick);
                    },
                    3..=4 => if !flying.is_empty() {
                        roster.report(flying.remove(0), SENT, 3);
                    },
                    _ => settle(&mut roster, &mut open),
                }
                prop_assert!(flying.len() <= 5);
                prop_assert_eq!(roster.in_flight(), flying.len());
                prop_assert!(roster.unrecorded <= 9);
            }
            for _ in 0..10_000 {
                if roster.is_empty() {
                    break;
                }
                while let Some(pick) = roster.pick() {
                    prop_assert!(seen.insert((pick.token, pick.index)));
                    flying.push(pick);
                }
                for pick in flying.drain(..) {
                    roster.report(pick, SENT, 3);
                }
                settle(&mut roster, &mut open);
            }
            prop_assert!(roster.is_empty());
            prop_assert_eq!(roster.unrecorded, 0);
            prop_assert_eq!(seen.len() as u32, batches.iter().map(|batch| batch.2).sum::<u32>());
        }
    }
}
