//! Which message a worker sends next: its leased batches, served by deficit round-robin between
//! destinations (design §9), and in a destination by [`fairness`](super::fairness), within the limit on unrecorded
//! outcomes (I6). Whether a destination may have one more in flight is for [`Admission`] to decide: a message is picked only when it may go at once, so that nothing that waits holds up what
//! could go (F69).
//!
//! The worker's senders (its sending tasks) ask for the messages of a request, send them, report the verdicts, and ask again.
//! Where a destination takes bundles, a request has several messages of one batch; elsewhere it has one.
//!
//! A failed message that is due again soon is tried again under the same lease (B9), before what has not been tried:
//! it waits in its destination's queue of retries, and its batch stays until nothing of it is in flight or due soon.
//! Where a destination keeps an [order](super::order), it stays until all of its messages have ended: see `in_order`.

mod batch;
mod destination;
mod in_order;
mod lane;

use std::{
    collections::{BTreeSet, BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use super::{
    ids::{BatchId, FileId},
    lease::{LeaseToken, OpenMessage},
    ledger::MessageVerdict,
    outcome::Verdict,
    priority::Priority,
    suspect::Pace,
    time::UnixMs,
};
use batch::Batch;
pub use batch::Pick;
use destination::DestinationQueue;
use in_order::Order;

/// Messages that one destination may send in its turn while others wait.
const QUANTUM: u32 = 16;

/// With more held batches of a destination than this, none is kept only for its retries: each has its open rows in
/// memory (I8).
const RETRYING_BATCHES_MAX: usize = 64;

/// Batches that nothing is left to do for are recorded once there are so many, however few outcomes they have: others
/// wait for their place.
const ENDED_BATCHES_MAX: usize = 32;

/// Decides whether messages may go at once.
pub trait Admission {
    /// Whether a request with up to `messages` of a batch may go to its destination; if so, it goes.
    fn ask(&mut self, destination: usize, batch: LeaseToken, is_retry: bool, messages: usize) -> Answer;

    /// Nothing of a destination could go.
    fn has_none(&mut self, destination: usize);
}

/// See [`Admission::ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It goes, with so many: one at least.
    Granted(usize),
    /// No retry may go; a first attempt may.
    NoRetries,
    /// Nothing of this batch may go, and it waits for nothing of its destination; of others it may.
    NotThis,
    /// Nothing may go.
    Refused,
}

/// A leased batch, as it is taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Its lease.
    pub token: LeaseToken,
    /// Its file …
    pub file: FileId,
    /// … and how urgent that is.
    pub priority: Priority,
    /// How its messages go.
    pub pace: Pace,
    /// Its open messages, in row order.
    pub open: Vec<OpenMessage>,
    /// The key of each, by index, where the destination keeps an order; then batches come in that order.
    pub keys: HashMap<u32, u64>,
}

/// What became of a picked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Record this.
    Verdict(Verdict),
    /// It was not tried: nothing is recorded. It goes again from here, unless its batch is stopped.
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

/// How a lane answers who asks it for a message.
enum Asked {
    /// So many messages go.
    Picked(usize),
    /// None of it may go now, though something waits.
    Waits,
    /// Nothing may go to the destination now.
    Refused,
    /// Nothing waits.
    Empty,
}

/// The state machine. It knows no payload, no clock and no task.
#[derive(Debug)]
pub struct Roster {
    /// Outcomes that may wait for the ledger, messages in flight included: the window of I6.
    unrecorded_max: usize,
    destinations: Vec<DestinationQueue>,
    batches: HashMap<BatchId, Batch>,
    turn: usize,
    /// Messages in flight.
    in_flight: usize,
    unrecorded: usize,
    /// Batches that came to their end since outcomes were last handed out for recording.
    ended: usize,
}

impl Roster {
    /// A roster for destinations that take so many messages in a request. Outcomes of which `unrecorded_max` may wait for the
    /// ledger include those in flight.
    pub fn new(unrecorded_max: usize, bundles: impl IntoIterator<Item = usize>) -> Self {
        let destination = |bundle| DestinationQueue { bundle, ..DestinationQueue::default() };
        Self {
            unrecorded_max,
            destinations: bundles.into_iter().map(destination).collect(),
            batches: HashMap::new(),
            turn: 0,
            in_flight: 0,
            unrecorded: 0,
            ended: 0,
        }
    }

    /// Messages of a destination go in the order of their keys from now on. None waits for longer than `longest_wait` to be
    /// tried again.
    pub fn keep_order(&mut self, destination: usize, longest_wait: Duration) {
        self.destinations[destination].order = Some(Order::new(longest_wait));
    }

    /// What a batch that keeps an order is still held for, ascending, if all else of it is recorded.
    pub fn held_for(&self, token: LeaseToken) -> Option<Vec<u32>> {
        let batch = self.batches.get(&token.batch).filter(|batch| batch.token == token && batch.is_idle())?;
        batch.in_order.as_ref().map(|in_order| in_order.open())
    }

    /// Whether batches of a destination are yet to be given back: all of them, for what is younger would go ahead of those
    /// that are. What is younger still must not be leased before they are leased again.
    pub fn is_giving_back(&self, destination: usize) -> bool {
        self.batches.values().any(|batch| batch.destination == destination && batch.stopped)
    }

    /// A message has ended: the next of its key has its turn.
    fn pass_on(&mut self, id: BatchId, index: u32) {
        let Some(batch) = self.batches.get_mut(&id) else { return };
        let slot = &mut self.destinations[batch.destination];
        let key = batch.in_order.as_mut().and_then(|in_order| in_order.end(index));
        let (Some(key), Some(order)) = (key, &mut slot.order) else { return };
        if let Some((id, index)) = order.leave(key, (id, index))
            && let Some(batch) = self.batches.get_mut(&id)
            && let Some(message) = batch.in_order.as_mut().and_then(|in_order| in_order.unblock(index))
        {
            slot.wait(batch, message);
        }
    }

    /// Takes over a leased batch. What of it is not due soon is left alone (B10).
    pub fn add(&mut self, destination: usize, batch: Incoming, now: UnixMs) {
        let Incoming { token, file, priority, pace, mut open, keys } = batch;
        // Leased again after a loss that this worker has not noticed yet: the old lease is over.
        if let Some(stale) = self.batches.get(&token.batch).map(|batch| batch.token) {
            self.stop_batch(stale);
            self.remove(stale);
        }
        // What was asked for before the others were stopped goes back with them.
        let goes_back = self.destinations[destination].order.is_some() && self.is_giving_back(destination);
        let slot = &mut self.destinations[destination];
        let is_redriven = open.iter().any(|message| message.drive > 0);
        let order = slot.order.as_mut();
        let in_order = order.map(|order| Box::new(order.admit(token.batch, keys, &mut open)));
        let (due, later): (Vec<_>, Vec<_>) = open.into_iter().partition(|message| message.not_before <= now);
        let is_again = |message: &OpenMessage| pace == Pace::Together && message.tries > 0;
        let (again, open): (VecDeque<_>, VecDeque<_>) = due.into_iter().partition(is_again);
        let mut batch = Batch {
            token,
            destination,
            file,
            priority,
            pace,
            open,
            again,
            later: 0,
            in_flight: 0,
            ready: Vec::new(),
            ready_since: now,
            recording: 0,
            marking: None,
            marked: None,
            stopped: false,
            apart: BTreeSet::new(),
            in_order,
        };
        slot.held += 1;
        slot.waiting += batch.waiting();
        for message in later {
            slot.keep_for_later(&mut batch, message, now);
        }
        if !batch.again.is_empty() {
            slot.retries.push(&batch, false);
        }
        if !batch.open.is_empty() {
            slot.fresh.push(&batch, is_redriven);
        }
        self.batches.insert(token.batch, batch);
        if goes_back {
            self.stop(Some(destination));
        }
    }

    /// These messages of a held batch share no request with others.
    pub fn keep_apart(&mut self, token: LeaseToken, indexes: impl IntoIterator<Item = u32>) {
        if let Some(batch) = self.batches.get_mut(&token.batch).filter(|batch| batch.token == token) {
            batch.apart.extend(indexes);
        }
    }

    /// A verdict on a message of a held batch that won't be sent at all: it is condemned, or can't be read.
    pub fn conclude(&mut self, token: LeaseToken, verdict: MessageVerdict) {
        if let Some(batch) = self.batches.get_mut(&token.batch) {
            batch.ready.push(verdict);
            self.unrecorded += 1;
        }
    }

    /// How many batches of a destination are held.
    pub fn held(&self, destination: usize) -> usize {
        self.destinations[destination].held
    }

    /// Requests to a destination that are in flight.
    pub fn in_flight_to(&self, destination: usize) -> usize {
        self.destinations[destination].in_flight
    }

    /// Messages of a destination that wait for their first pick here and may be sent at full pace. Suspects don't
    /// count: they must not keep their neighbours waiting.
    pub fn waiting(&self, destination: usize) -> usize {
        self.destinations[destination].waiting
    }

    /// Those of one batch.
    pub fn waiting_in(&self, token: LeaseToken) -> usize {
        self.batches.get(&token.batch).filter(|batch| batch.token == token).map_or(0, Batch::waiting)
    }

    /// The files of which at least so many messages wait here for their first turn, at a destination.
    pub fn files_with(&self, destination: usize, messages: usize) -> Vec<FileId> {
        let open = |id: &BatchId| self.batches.get(id).map_or(0, |batch| batch.open.len());
        let lane = &self.destinations[destination].fresh;
        let has_enough = |queue: &VecDeque<BatchId>| queue.iter().map(open).sum::<usize>() >= messages;
        lane.files.iter().filter(|(_, queue)| has_enough(queue)).map(|(file, _)| *file).collect()
    }

    /// Whether a retry that is due waits here, at a destination.
    pub fn has_retries(&self, destination: usize) -> bool {
        !self.destinations[destination].retries.turns.is_empty()
    }

    /// A file is so urgent from now on, at a destination.
    pub fn prioritize(&mut self, destination: usize, file: FileId, priority: Priority) {
        let of_it = |batch: &&mut Batch| batch.destination == destination && batch.file == file;
        for batch in self.batches.values_mut().filter(of_it) {
            batch.priority = priority;
        }
        let slot = &mut self.destinations[destination];
        for lane in [&mut slot.fresh, &mut slot.retries] {
            if lane.files.contains_key(&file) {
                lane.turns.arrive(file, priority);
            }
        }
    }

    /// The held leases.
    pub fn tokens(&self) -> Vec<LeaseToken> {
        self.batches.values().map(|batch| batch.token).collect()
    }

    /// Messages that are picked and not reported yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// When the next message that waits to be tried again is due; `None` if none waits.
    pub fn next_due(&self) -> Option<UnixMs> {
        self.destinations.iter().filter_map(DestinationQueue::next_due).min()
    }

    /// Puts the messages to send next at `now` into `picks`, which is empty: those of one request. It stays empty if
    /// none may go.
    pub fn pick(&mut self, now: UnixMs, admission: &mut impl Admission, picks: &mut Vec<Pick>) {
        debug_assert!(picks.is_empty(), "the messages of one request");
        let room = self.unrecorded_max.saturating_sub(self.unrecorded);
        if room == 0 {
            return;
        }
        for _ in 0..self.destinations.len() {
            self.pick_from(self.turn, now, room, admission, picks);
            if !picks.is_empty() {
                let slot = &mut self.destinations[self.turn];
                slot.deficit = slot.deficit.saturating_sub(picks.len() as u32);
                slot.in_flight += 1;
                self.in_flight += picks.len();
                self.unrecorded += picks.len();
                if slot.deficit == 0 {
                    self.pass_turn();
                }
                return;
            }
            // A destination that can't use its turn does not save it up.
            self.destinations[self.turn].deficit = 0;
            self.pass_turn();
        }
    }

    fn pass_turn(&mut self) {
        self.turn = (self.turn + 1) % self.destinations.len();
        self.destinations[self.turn].deficit += QUANTUM;
    }

    fn pick_from(
        &mut self,
        destination: usize,
        now: UnixMs,
        room: usize,
        admission: &mut impl Admission,
        picks: &mut Vec<Pick>,
    ) {
        let slot = &mut self.destinations[destination];
        slot.promote(&mut self.batches, now);
        let max = slot.bundle.min(room);
        let both = !slot.retries.turns.is_empty() && !slot.fresh.turns.is_empty();
        let fresh_first = both && slot.share.is_fresh(1);
        let mut waits = false;
        for is_fresh in [fresh_first, !fresh_first] {
            match self.pick_in(destination, is_fresh, max, admission, picks) {
                Asked::Picked(count) => {
                    if both {
                        self.destinations[destination].share.took(is_fresh, count);
                    }
                    return;
                }
                Asked::Refused => return,
                Asked::Waits => waits = true,
                Asked::Empty => {}
            }
        }
        if !waits {
            admission.has_none(destination);
        }
    }

    /// A request to a destination has ended. What became of its messages is reported of each.
    pub fn ended(&mut self, destination: usize) {
        self.destinations[destination].in_flight -= 1;
    }

    /// The next messages of one lane that may go: of the file whose turn it is, of its first batch that is not blocked.
    fn pick_in(
        &mut self,
        destination: usize,
        is_fresh: bool,
        max: usize,
        admission: &mut impl Admission,
        picks: &mut Vec<Pick>,
    ) -> Asked {
        let slot = &mut self.destinations[destination];
        let (mut skipped, mut at, mut asked) = (0, 0, Asked::Empty);
        loop {
            let lane = if is_fresh { &mut slot.fresh } else { &mut slot.retries };
            let Some((file, id)) = lane.nth(skipped, at) else { return asked };
            let Some(id) = id else {
                (skipped, at) = (skipped + 1, 0);
                continue;
            };
            let queue =
                |batch: &Batch| if is_fresh { batch.open.front() } else { batch.again.front() }.copied();
            let batch = self.batches.get_mut(&id).filter(|batch| !batch.stopped);
            let Some((batch, first)) = batch.and_then(|batch| queue(batch).map(|first| (batch, first)))
            else {
                lane.remove(file, id);
                continue;
            };
            if is_fresh && batch.is_blocked() {
                at += 1;
                continue;
            }
            let messages = batch.bundle(if is_fresh { &batch.open } else { &batch.again }, max);
            match admission.ask(destination, batch.token, first.tries > 0, messages) {
                Answer::Granted(count) => {
                    for _ in 0..count {
                        let queue = if is_fresh { &mut batch.open } else { &mut batch.again };
                        let message = queue.pop_front().expect("no more were asked for than there are");
                        picks.push(slot.begin(batch, message));
                    }
                    let lane = if is_fresh { &mut slot.fresh } else { &mut slot.retries };
                    lane.turns.served(file, count);
                    if queue(batch).is_none() {
                        lane.remove(file, id);
                    }
                    return Asked::Picked(count);
                }
                // Another batch of its file has the same rate.
                Answer::NotThis => (skipped, at) = (skipped + 1, 0),
                // All of a lane of retries is retries.
                Answer::NoRetries if !is_fresh => return Asked::Waits,
                Answer::NoRetries => (at, asked) = (at + 1, Asked::Waits),
                Answer::Refused => return Asked::Refused,
            }
        }
    }

    /// Takes note of what became of a picked message. Whether outcomes should be recorded now: `group` of them
    /// wait, or many batches for their end, or a suspect for its turn, or the worker for its own end.
    pub fn report(&mut self, pick: Pick, report: Report, group: usize, now: UnixMs) -> bool {
        let slot = &mut self.destinations[pick.destination];
        self.in_flight -= 1;
        let batch = self.batches.get_mut(&pick.token.batch).filter(|batch| batch.token == pick.token);
        let Some(batch) = batch else {
            self.unrecorded -= 1;
            return false;
        };
        batch.in_flight -= 1;
        let Pick { index, drive, attempt, .. } = pick;
        let Report::Verdict(verdict) = report else {
            self.unrecorded -= 1;
            slot.put_back(batch, OpenMessage { not_before: now, index, drive, tries: attempt - 1 });
            return false;
        };
        if batch.ready.is_empty() {
            batch.ready_since = now;
        }
        batch.ready.push(MessageVerdict { index, drive, attempt, verdict });
        if let Verdict::Retry { not_before, .. } = verdict
            && ((batch.pace == Pace::Together && slot.held <= RETRYING_BATCHES_MAX)
                || batch.in_order.is_some())
        {
            slot.keep_for_later(batch, OpenMessage { not_before, index, drive, tries: attempt }, now);
        }
        let waited_for = batch.pace == Pace::AloneMarked;
        let ends = batch.is_exhausted() && batch.in_flight == 0;
        self.ended += usize::from(ends);
        let is_awaited = waited_for || (ends && batch.stopped) || self.ended >= ENDED_BATCHES_MAX;
        if batch.in_order.is_some() && !matches!(verdict, Verdict::Retry { .. }) {
            self.pass_on(pick.token.batch, index);
        }
        is_awaited || self.unrecorded - self.in_flight >= group
    }

    /// Hands out what is to be recorded: of batches that nothing more will come of, or whose outcomes have waited for
    /// `patience`; then of those with the most outcomes, until there are `group`. A record costs the same however much
    /// it says, and a batch with retries has something to say for as long as they last.
    pub fn take_ready(&mut self, group: usize, now: UnixMs, patience: Duration) -> Vec<Ready> {
        self.ended = 0;
        let mut taken = Vec::new();
        let mut growing = BinaryHeap::new();
        for (&id, batch) in &mut self.batches {
            let ends = batch.in_flight == 0 && batch.is_exhausted();
            // What seems to be yet to come was noted by a clock that was ahead (F9).
            let is_old = batch.ready_since > now || now.since(batch.ready_since) >= patience;
            if ends || is_old || batch.pace == Pace::AloneMarked {
                taken.extend(batch.take_ready());
            } else {
                growing.push((batch.ready.len(), id));
            }
        }
        let mut count: usize = taken.iter().map(|ready: &Ready| ready.verdicts.len()).sum();
        while count < group
            && let Some((more, id)) = growing.pop()
        {
            count += more;
            taken.extend(self.batches.get_mut(&id).and_then(Batch::take_ready));
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

    /// Forgets a batch that is complete, or whose lease is lost. Senders that still have its
    /// messages may report them; such reports are ignored.
    pub fn remove(&mut self, token: LeaseToken) {
        if self.batches.get(&token.batch).is_some_and(|batch| batch.token == token) {
            let batch = self.batches.remove(&token.batch).expect("it was just seen");
            self.unrecorded -= batch.ready.len();
            let slot = &mut self.destinations[batch.destination];
            slot.held -= 1;
            slot.waiting -= batch.waiting();
            slot.fresh.remove(batch.file, token.batch);
            slot.retries.remove(batch.file, token.batch);
            if batch.later > 0 {
                slot.forget_later(token.batch);
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
        for (index, slot) in self.destinations.iter_mut().enumerate() {
            if destination.is_none_or(|destination| destination == index)
                && let Some(order) = &mut slot.order
            {
                order.end();
            }
        }
    }

    /// No more picks for a batch: its file is held. Where an order is kept, for none of its destination.
    pub fn stop_batch(&mut self, token: LeaseToken) {
        let Some(batch) = self.batches.get_mut(&token.batch).filter(|batch| batch.token == token) else {
            return;
        };
        if batch.in_order.is_some() {
            let destination = batch.destination;
            self.stop(Some(destination));
        } else {
            self.destinations[batch.destination].waiting -= batch.waiting();
            batch.stopped = true;
        }
    }

    /// Batches that nothing more will happen to here: to be given back.
    pub fn returnable(&self) -> Vec<LeaseToken> {
        let returnable = |batch: &&Batch| batch.is_idle() && batch.is_exhausted();
        self.batches.values().filter(returnable).map(|batch| batch.token).collect()
    }

    /// Whether it holds no batch and nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.in_flight == 0
    }
}

impl Batch {
    /// Its part of [`Roster::take_ready`].
    fn take_ready(&mut self) -> Option<Ready> {
        let begins = self.to_mark();
        if self.ready.is_empty() && begins.is_none() {
            return None;
        }
        self.recording += self.ready.len() as u32;
        self.marking = begins;
        let verdicts = std::mem::take(&mut self.ready);
        let ends = self.in_flight == 0 && self.is_exhausted();
        Some(Ready { token: self.token, verdicts, ends, begins })
    }

    /// What of it counts as waiting at its destination.
    fn waiting(&self) -> usize {
        if self.pace == Pace::Together && !self.stopped { self.open.len() + self.again.len() } else { 0 }
    }
}

#[cfg(test)]
mod order_tests;
#[cfg(test)]
mod tests;
