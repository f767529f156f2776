//! Which of the messages that wait for one destination go next (B11): retries or first attempts, then of which file.
//!
//! Fair queueing by virtual time. Each file has a *turn*, a number; the smallest goes next, and each message that goes
//! moves its file's turn on. Whoever was away comes back at the turn that is being served now: nobody saves up, and nobody is made to pay
//! for having had the destination to itself. A file that comes anew goes ahead of those that were served before, every
//! other time, so that it is on its way at once and the others are too.
//!
//! Priorities share in the same way, by weight ([`weight`]): a hundred files that are bulk get together what one of them
//! would get, and none is ever starved.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, VecDeque},
    hash::Hash,
};

use super::priority::{Priority, weight};

/// Of so many messages that go where both lanes wait, one was never tried: a destination that fails for a while must not
/// keep new messages waiting for as long as it is tried again. The other four are retries, for they waited before.
pub const FRESH_ONE_IN: u64 = 5;

/// Turns of files that don't wait are remembered up to this many, beside one for each that waits.
const REMEMBERED_MAX: usize = 512;

/// How a destination is shared between retries and first attempts. It outlasts a lease, so that small ones are shared as
/// well: a worker that has room for one batch at a time would lease nothing but retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneShare {
    /// Retries that went ahead of first attempts, and were not made up for yet.
    ahead: u64,
}

impl LaneShare {
    /// Whether it is the turn of `messages` first attempts, where retries wait too.
    pub fn is_fresh(self, messages: usize) -> bool {
        self.ahead >= (FRESH_ONE_IN - 1) * messages as u64
    }

    /// So many messages of one lane went while both waited.
    pub fn took(&mut self, is_fresh: bool, messages: usize) {
        let messages = messages as u64;
        self.ahead = if is_fresh {
            self.ahead.saturating_sub((FRESH_ONE_IN - 1) * messages)
        } else {
            self.ahead.saturating_add(messages)
        };
    }
}

/// Whose turn it is among the files that wait in one lane.
#[derive(Debug)]
pub struct FileTurns<F> {
    /// One for each priority.
    lines: [Line<F>; 3],
    /// The turn of the priority that was served last.
    now: u64,
    arrivals: u64,
    /// Files that wait.
    waiting: usize,
    /// Messages of the only one that waits which its turn does not count yet: nobody compares it with another.
    uncounted: usize,
}

/// The files of one priority.
#[derive(Debug)]
struct Line<F> {
    /// The priority's own turn among those with something waiting.
    turn: u64,
    /// The turn of the file that was served last.
    now: u64,
    /// Files that wait for the first time since they came, in the order in which they did …
    newcomers: BTreeSet<(u64, F)>,
    /// … and those that were served, by turn.
    served: BTreeSet<(u64, u64, F)>,
    /// Whether a newcomer went last: then one of the others is next.
    newcomer_went: bool,
    seats: HashMap<F, Seat>,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug)]
struct Seat {
    turn: u64,
    waits: Waits,
}

#[derive(Clone, Copy, Debug)]
enum Waits {
    No,
    /// Since then.
    Newcomer(u64),
    Served(u64),
}

impl<F> Default for Line<F> {
    fn default() -> Self {
        Self {
            turn: 0,
            now: 0,
            newcomers: BTreeSet::new(),
            served: BTreeSet::new(),
            newcomer_went: false,
            seats: HashMap::new(),
        }
    }
}

impl<F> Default for FileTurns<F> {
    fn default() -> Self {
        Self { lines: Default::default(), now: 0, arrivals: 0, waiting: 0, uncounted: 0 }
    }
}

impl<F: Copy + Ord + Hash> Line<F> {
    fn is_empty(&self) -> bool {
        self.newcomers.is_empty() && self.served.is_empty()
    }

    fn waits(&self, file: F) -> bool {
        self.seats.get(&file).is_some_and(|seat| !matches!(seat.waits, Waits::No))
    }

    fn arrive(&mut self, file: F, arrival: u64) {
        let turn = self.seats.get(&file).map_or(0, |seat| seat.turn);
        let seat = if turn > self.now {
            // It was served a moment ago, and goes on where it was.
            self.served.insert((turn, arrival, file));
            Seat { turn, waits: Waits::Served(arrival) }
        } else {
            self.newcomers.insert((arrival, file));
            Seat { turn: self.now, waits: Waits::Newcomer(arrival) }
        };
        self.seats.insert(file, seat);
    }

    /// Whether it waited.
    fn leave(&mut self, file: F) -> bool {
        let Some(seat) = self.seats.get_mut(&file) else { return false };
        let was_there = match std::mem::replace(&mut seat.waits, Waits::No) {
            Waits::No => false,
            Waits::Newcomer(arrival) => self.newcomers.remove(&(arrival, file)),
            Waits::Served(arrival) => self.served.remove(&(seat.turn, arrival, file)),
        };
        if !was_there {
            return false;
        }
        if seat.turn <= self.now {
            self.seats.remove(&file);
        } else if self.seats.len() > REMEMBERED_MAX + self.newcomers.len() + self.served.len() {
            self.seats.retain(|_, seat| !matches!(seat.waits, Waits::No));
        }
        true
    }

    fn served(&mut self, file: F, messages: u64, arrival: u64) {
        let Some(seat) = self.seats.get_mut(&file) else { return };
        match seat.waits {
            Waits::No => return,
            Waits::Newcomer(since) => {
                self.newcomers.remove(&(since, file));
                seat.turn = seat.turn.max(self.now);
                self.newcomer_went = true;
            }
            Waits::Served(since) => {
                self.served.remove(&(seat.turn, since, file));
                self.newcomer_went = false;
            }
        }
        self.now = self.now.max(seat.turn);
        seat.turn += messages;
        seat.waits = Waits::Served(arrival);
        self.served.insert((seat.turn, arrival, file));
    }

    fn order(&self) -> impl Iterator<Item = F> {
        let newcomers = || self.newcomers.iter().map(|(_, file)| *file);
        let (before, after) = if self.newcomer_went { (0, usize::MAX) } else { (usize::MAX, 0) };
        let served = self.served.iter().map(|(.., file)| *file);
        newcomers().take(before).chain(served).chain(newcomers().take(after))
    }
}

impl<F: Copy + Ord + Hash> FileTurns<F> {
    /// Something of `file` waits, which has this priority now.
    pub fn arrive(&mut self, file: F, priority: Priority) {
        if self.lines[priority as usize].waits(file) {
            return;
        }
        self.leave(file);
        self.count();
        self.waiting += 1;
        self.arrivals += 1;
        let line = &mut self.lines[priority as usize];
        if line.is_empty() {
            line.turn = line.turn.max(self.now);
        }
        line.arrive(file, self.arrivals);
    }

    /// Nothing of `file` waits any more.
    pub fn leave(&mut self, file: F) {
        self.count();
        self.waiting -= self.lines.iter_mut().map(|line| usize::from(line.leave(file))).sum::<usize>();
    }

    /// So many messages of `file`, which waits, go now.
    pub fn served(&mut self, file: F, messages: usize) {
        if self.waiting == 1 {
            self.uncounted += messages.max(1);
        } else {
            self.take_turn(file, messages);
        }
    }

    /// Counts what the only file that waits has had: its last message as a turn of its own, so that whoever comes next does
    /// not make it pay for the others.
    fn count(&mut self) {
        let messages = std::mem::take(&mut self.uncounted);
        if messages > 0
            && let Some(file) = self.first()
        {
            if messages > 1 {
                self.take_turn(file, messages - 1);
            }
            self.take_turn(file, 1);
        }
    }

    fn take_turn(&mut self, file: F, messages: usize) {
        const SCALE: u64 = weight(Priority::Urgent);
        let Some(at) = self.lines.iter().position(|line| line.waits(file)) else { return };
        let priority = [Priority::Bulk, Priority::Normal, Priority::Urgent][at];
        let messages = messages.max(1) as u64;
        self.arrivals += 1;
        let line = &mut self.lines[at];
        self.now = self.now.max(line.turn);
        line.turn += messages * (SCALE / weight(priority));
        line.served(file, messages, self.arrivals);
    }

    /// The files that wait, in the order in which they would go.
    pub fn order(&self) -> impl Iterator<Item = F> {
        let mut lines = [2, 1, 0];
        lines.sort_by_key(|&at| (self.lines[at].turn, Reverse(at)));
        lines.into_iter().flat_map(|at| self.lines[at].order())
    }

    /// The file whose turn it is.
    fn first(&self) -> Option<F> {
        self.order().next()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(Line::is_empty)
    }

    /// None waits any more.
    fn leave_all(&mut self) {
        while let Some(file) = self.first() {
            self.leave(file);
        }
    }
}

/// What could be leased of one lane of a destination.
pub trait Waiting<F> {
    /// A batch.
    type Batch;
    /// Why it can't be said.
    type Error;

    /// The files of which something is due, each with its priority; the order is that of newcomers.
    fn files(&mut self) -> Result<Vec<(F, Priority)>, Self::Error>;

    /// The next batch of a file, the one that has been due for longest first, and how many of its messages are due.
    fn next(&mut self, file: F) -> Result<Option<(Self::Batch, usize)>, Self::Error>;
}

/// How a destination's leases are shared, from one call to the next.
#[derive(Debug)]
pub struct LeaseTurns<F> {
    share: LaneShare,
    retries: FileTurns<F>,
    fresh: FileTurns<F>,
}

impl<F> Default for LeaseTurns<F> {
    fn default() -> Self {
        Self { share: LaneShare::default(), retries: FileTurns::default(), fresh: FileTurns::default() }
    }
}

impl<F: Copy + Ord + Hash> LeaseTurns<F> {
    /// Chooses batches until `messages` of theirs are due, and at most `batches`. No more is read of a lane than is
    /// chosen, and one beyond.
    pub fn choose<B, E>(
        &mut self,
        retries: &mut impl Waiting<F, Batch = B, Error = E>,
        fresh: &mut impl Waiting<F, Batch = B, Error = E>,
        messages: usize,
        batches: usize,
    ) -> Result<Vec<B>, E> {
        for (file, priority) in retries.files()? {
            self.retries.arrive(file, priority);
        }
        for (file, priority) in fresh.files()? {
            self.fresh.arrive(file, priority);
        }
        let chosen = self.choose_of(retries, fresh, messages, batches);
        self.retries.leave_all();
        self.fresh.leave_all();
        chosen
    }

    fn choose_of<B, E>(
        &mut self,
        retries: &mut impl Waiting<F, Batch = B, Error = E>,
        fresh: &mut impl Waiting<F, Batch = B, Error = E>,
        messages: usize,
        batches: usize,
    ) -> Result<Vec<B>, E> {
        let (mut chosen, mut sum) = (Vec::new(), 0);
        let (mut next_retry, mut next_fresh) = (None, None);
        while chosen.len() < batches && sum < messages {
            head(&mut next_retry, &mut self.retries, retries)?;
            head(&mut next_fresh, &mut self.fresh, fresh)?;
            let both = next_retry.is_some() && next_fresh.is_some();
            let is_fresh = match &next_fresh {
                Some((_, _, due)) => !both || self.share.is_fresh(*due),
                None => false,
            };
            let (next, turns) = if is_fresh {
                (&mut next_fresh, &mut self.fresh)
            } else {
                (&mut next_retry, &mut self.retries)
            };
            let Some((file, batch, due)) = next.take() else { break };
            if both {
                self.share.took(is_fresh, due);
            }
            turns.served(file, due);
            sum += due;
            chosen.push(batch);
        }
        Ok(chosen)
    }
}

/// Looks for the batch of a lane whose turn it is, unless that is known.
fn head<F: Copy + Ord + Hash, W: Waiting<F>>(
    next: &mut Option<(F, W::Batch, usize)>,
    turns: &mut FileTurns<F>,
    lane: &mut W,
) -> Result<(), W::Error> {
    while next.is_none() {
        let Some(file) = turns.first() else { break };
        match lane.next(file)? {
            Some((batch, due)) => *next = Some((file, batch, due)),
            None => turns.leave(file),
        }
    }
    Ok(())
}

/// A lane whose due batches are known, in the order in which they became due.
#[derive(Debug)]
pub struct Listed<F, B> {
    files: Vec<(F, Priority)>,
    batches: HashMap<F, VecDeque<(B, usize)>>,
}

impl<F: Copy + Eq + Hash, B> Listed<F, B> {
    /// Batches with their files and priorities, and how many of their messages are due. Up to `each` of one file.
    pub fn new(due: impl IntoIterator<Item = (F, Priority, B, usize)>, each: usize) -> Self {
        let (mut files, mut batches) = (Vec::new(), HashMap::<F, VecDeque<_>>::new());
        for (file, priority, batch, due) in due {
            let of_file = batches.entry(file).or_insert_with(|| {
                files.push((file, priority));
                VecDeque::new()
            });
            if of_file.len() < each {
                of_file.push_back((batch, due));
            }
        }
        Self { files, batches }
    }
}

impl<F: Copy + Eq + Hash, B> Waiting<F> for Listed<F, B> {
    type Batch = B;
    type Error = std::convert::Infallible;

    fn files(&mut self) -> Result<Vec<(F, Priority)>, Self::Error> {
        Ok(std::mem::take(&mut self.files))
    }

    fn next(&mut self, file: F) -> Result<Option<(B, usize)>, Self::Error> {
        Ok(self.batches.get_mut(&file).and_then(VecDeque::pop_front))
    }
}

#[cfg(test)]
mod tests;
