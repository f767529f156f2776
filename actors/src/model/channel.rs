//! The queue of one destination as one process sees it: which hints it sends, when it asks for the depth, what it has
//! received and not claimed yet, what it has to delete. Pure: time comes in as an argument.
//!
//! - The queue is *shallow* (B19): at most twice the leases wanted are visible, the backlog stays in the store. So what
//!   is paused, slow or down costs its destination a few entries and the others nothing (F43).
//! - What was sent and is still due counts as waiting in the queue. A depth that is too small for it says that entries
//!   are gone: claimed by others, so that the store is asked to look at their batches anew, or lost (purged, past their
//!   retention, taken to the dead letters). What is due after all is sent again, each time after twice as long. An
//!   unknown depth sends nothing again.
//! - What was found in the store, left by another process or an earlier life, may be in the queue already: it is sent
//!   only once the depth is known and leaves room, and the oldest found are taken for those that are there.
//! - An entry is deleted when its batch is claimed, or its claim refused (B18); where the transport keeps order, only
//!   when the lease ends, for until then the next of its lane must not come.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    backoff::Backoff,
    hint::{DueBatch, Handle, Hint, Origin, Outgoing, QueueDepth, Received, TransportLimits},
    ids::BatchId,
    time::{MonoMs, UnixMs},
};

/// Entries that are kept visible though no worker here wants them now: another machine's may.
const SPARE: usize = 20;

/// Messages of a batch before any was seen.
const MESSAGES_AT_FIRST: usize = 100;

/// Visible entries, however much is wanted.
const WINDOW_MAX: usize = 1_000;

/// Entries that a delay policy holds back at the same time. They alone may make the queue deeper.
const DELAYED_MAX: usize = 1_000;

/// How long a worker's wish holds: it asks again at least every half second.
const ASKED_FOR: Duration = Duration::from_secs(2);

/// For how long the window goes by the most that was wanted.
const PEAK_FOR: Duration = Duration::from_secs(5);

/// How long a received entry waits for a worker before it is given back.
const STOCK_FOR: Duration = Duration::from_secs(4);

/// An entry that is due this soon waits in stock, which is cheaper and more exact than hiding it.
const SOON: Duration = Duration::from_secs(2);

/// How long an entry is waited for before the depth has to explain it, doubled each time that it was sent again …
const CHECK_AFTER: Duration = Duration::from_secs(10);
const CHECK_CAP: Duration = Duration::from_mins(10);

/// Between two looks at the depth; doubled while they change nothing.
const DEPTH_EVERY: Duration = Duration::from_secs(1);
const DEPTH_CAP: Duration = Duration::from_secs(5);

/// Batches that the store is asked to look at anew in one go.
const CONFIRM_MAX: usize = 100;

/// How long a depth is good for sending what was found.
const DEPTH_FRESH: Duration = Duration::from_secs(15);

/// Between two looks into the store where there is no room, for what others have claimed.
const FULL_LOOK: Duration = Duration::from_secs(5);

/// How long a delete waits for others: ten go in one call.
const DELETE_LINGER: Duration = Duration::from_secs(1);

/// Handles that wait to be deleted. Beyond, the oldest come again, are refused by the store and deleted then.
const DELETES_MAX: usize = 1_000;

/// The waits after calls that failed: full jitter below a bound that doubles.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));

/// A call to the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Call {
    /// Sending entries.
    Send,
    /// Receiving entries.
    Receive,
    /// Hiding entries that were received.
    Hide,
    /// Deleting them.
    Delete,
    /// Counting what is there.
    Depth,
}

const CALLS: usize = 5;

/// How often a call has failed in a row, and until when it is not made again.
#[derive(Debug, Default)]
struct Failing {
    failures: u32,
    until: MonoMs,
}

/// A hint that was sent and is not known to have been claimed.
#[derive(Debug)]
struct Sent {
    /// When its batch became due: sent for that, and not for a later time.
    due: UnixMs,
    at: MonoMs,
    visible_at: MonoMs,
    times: u32,
    /// The depth is too small for it.
    lost: bool,
}

/// A count of entries.
fn entries(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl Sent {
    fn check_after(&self) -> Duration {
        CHECK_AFTER.saturating_mul(1 << self.times.saturating_sub(1).min(16)).min(CHECK_CAP)
    }
}

/// A batch that may be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stocked {
    /// Which one.
    pub hint: Hint,
    /// The entry that brought it; `None` for one that an earlier life of this process holds, or that goes ahead of others.
    pub handle: Option<Handle>,
    since: MonoMs,
    ready: MonoMs,
    /// Who has asked the store for it without an answer: it may be his already, and nobody else's.
    asker: Option<Arc<str>>,
}

impl Stocked {
    /// A batch that is to be claimed without an entry.
    pub fn without_entry(hint: Hint, now: MonoMs) -> Self {
        Self { hint, handle: None, since: now, ready: now, asker: None }
    }
}

/// How a claim ended, as far as the queue is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// It is leased.
    Granted,
    /// Its entry says nothing (more): another has it, it is settled, gone, or due later.
    Refused,
}

/// A depth that was read, and is yet to be held against what is due.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: MonoMs,
    depth: QueueDepth,
    doubt: bool,
}

/// What the last depth came down to.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: MonoMs,
    /// Entries that this process has not sent, as far as they were not received since.
    foreign: usize,
}

/// What a worker wants.
#[derive(Clone, Copy, Debug)]
struct Ask {
    messages: usize,
    leases: usize,
    at: MonoMs,
}

/// What the store is to be asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Up to how many due batches.
    pub limit: usize,
    /// What is to be looked at anew: hints of these were sent, and the queue does not hold as many.
    pub confirm: Vec<BatchId>,
}

/// One destination's queue.
#[derive(Debug)]
pub struct Channel {
    limits: TransportLimits,
    /// Nothing is sent and nothing received: the destination is paused or disabled.
    held: bool,
    asks: BTreeMap<Arc<str>, Ask>,
    /// Messages of a batch, as seen last: workers want messages, entries are batches.
    messages: usize,
    peak: (usize, MonoMs),
    sent: HashMap<BatchId, Sent>,
    /// Claimed since the store was asked last for what is due: its answer may list them.
    claimed: HashSet<BatchId>,
    looked: Option<MonoMs>,
    sendings: u64,
    to_send: VecDeque<(Outgoing, Duration)>,
    /// Something was found that may be in the queue already.
    found: bool,
    /// More is due than there was room for: others may have claimed what was sent.
    full: bool,
    /// The outcome of a send is unknown.
    doubt: bool,
    reading: Option<Reading>,
    seen: Option<Seen>,
    depth: Option<QueueDepth>,
    depth_wait: Duration,
    depth_at: MonoMs,
    stock: VecDeque<Stocked>,
    hides: Vec<(Handle, Duration)>,
    deletes: VecDeque<(Handle, MonoMs)>,
    failing: [Failing; CALLS],
}

impl Channel {
    /// Before anything was sent.
    pub fn new(limits: TransportLimits) -> Self {
        Self {
            limits,
            held: false,
            asks: BTreeMap::new(),
            messages: MESSAGES_AT_FIRST,
            peak: (0, MonoMs(0)),
            sent: HashMap::new(),
            claimed: HashSet::new(),
            looked: None,
            sendings: 0,
            to_send: VecDeque::new(),
            found: false,
            full: false,
            doubt: false,
            reading: None,
            seen: None,
            depth: None,
            depth_wait: DEPTH_EVERY,
            depth_at: MonoMs(0),
            stock: VecDeque::new(),
            hides: Vec::new(),
            deletes: VecDeque::new(),
            failing: Default::default(),
        }
    }

    /// Whether the destination is held.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    // What is wanted.

    /// A worker wants so many messages more, in up to so many leases; none, if either is zero.
    pub fn ask(&mut self, holder: &Arc<str>, messages: usize, leases: usize, now: MonoMs) {
        self.asks.retain(|_, ask| now.since(ask.at) < ASKED_FOR);
        if messages == 0 || leases == 0 {
            self.asks.remove(holder);
        } else {
            let leases = leases.min(WINDOW_MAX);
            self.asks.insert(holder.clone(), Ask { messages, leases, at: now });
        }
        let wanted = self.wanted(now);
        if wanted >= self.peak.0 || now.since(self.peak.1) >= PEAK_FOR {
            self.peak = (wanted, now);
        }
    }

    /// How many leases workers here want and have not got.
    pub fn wanted(&self, now: MonoMs) -> usize {
        let fresh = self.asks.values().filter(|ask| now.since(ask.at) < ASKED_FOR);
        fresh.map(|ask| self.leases_for(ask.messages).min(ask.leases)).sum()
    }

    /// How many leases bring so many messages, as far as is known: an entry does not say what it brings.
    pub fn leases_for(&self, messages: usize) -> usize {
        messages.div_ceil(self.messages)
    }

    /// A lease brought so many messages.
    pub fn brought(&mut self, messages: usize) {
        self.messages = messages.max(1);
    }

    /// How many entries may be visible (B19).
    fn window(&self, now: MonoMs) -> usize {
        if self.held {
            return 0;
        }
        let peak = if now.since(self.peak.1) < PEAK_FOR { self.peak.0 } else { 0 };
        (2 * peak.max(self.wanted(now))).clamp(SPARE, WINDOW_MAX)
    }

    // Sending.

    /// Entries sent that are taken to be in the queue: visible, and delayed.
    fn waiting(&self, now: MonoMs) -> (usize, usize) {
        let live = self.sent.values().filter(|sent| !sent.lost);
        let (visible, delayed): (Vec<_>, Vec<_>) = live.partition(|sent| sent.visible_at <= now);
        (visible.len(), delayed.len())
    }

    /// How many more entries may be sent.
    fn room(&self, now: MonoMs, delay: Duration) -> usize {
        let (visible, delayed) = self.waiting(now);
        let room = self.window(now).saturating_sub(visible);
        if delay.is_zero() {
            room.saturating_sub(delayed)
        } else if room > 0 {
            DELAYED_MAX.saturating_sub(delayed)
        } else {
            0
        }
    }

    /// Entries of others in the queue, if that was looked at lately.
    fn foreign(&self, now: MonoMs) -> Option<usize> {
        self.seen.filter(|seen| now.since(seen.at) < DEPTH_FRESH).map(|seen| seen.foreign)
    }

    /// What the store is to be asked for; `None`: nothing, for nothing could be sent. To be called right before it is
    /// asked.
    pub fn to_list(&mut self, now: MonoMs, delay: Duration) -> Option<Listing> {
        self.claimed.clear();
        let room = self.room(now, delay);
        let is_due = self.reading.is_some() || self.looked.is_none_or(|at| now.since(at) >= FULL_LOOK);
        if self.held || !self.may(Call::Send, now) || (room == 0 && !is_due) {
            return None;
        }
        self.looked = Some(now);
        let (foreign, confirm) = match &self.reading {
            Some(reading) => {
                let known = self.known_at(reading.at);
                let missing = known.len().saturating_sub(entries(reading.depth.total()));
                let confirm = known.into_iter().take(missing.min(CONFIRM_MAX)).collect();
                (entries(reading.depth.total()), confirm)
            }
            None => (self.foreign(now).unwrap_or(0), Vec::new()),
        };
        Some(Listing { limit: self.sent.len() + room + foreign.min(WINDOW_MAX) + 1, confirm })
    }

    /// What had been sent at `at` and is taken to be in the queue, the oldest first.
    fn known_at(&self, at: MonoMs) -> Vec<BatchId> {
        let known = self.sent.iter().filter(|(_, sent)| !sent.lost && sent.at <= at);
        let mut known: Vec<_> = known.map(|(id, sent)| (sent.at, *id)).collect();
        known.sort_unstable();
        known.into_iter().map(|(_, id)| id).collect()
    }

    /// Takes in what the store answered, of `asked` batches that it was asked for, and puts hints on their way; `delay`
    /// is how long the policy holds them back.
    pub fn listed(&mut self, due: &[DueBatch], asked: usize, delay: Duration, now: MonoMs, wall: UnixMs) {
        let before = self.waiting(now).0;
        self.forget_claimed(due, asked);
        if let Some(reading) = self.reading.take() {
            self.explain(reading);
        }
        if self.waiting(now).0 < before {
            // It moves: worth another look soon.
            self.look_soon(now);
        }
        let room = self.room(now, delay);
        let chosen = self.choose(due, room, now);
        self.full = chosen.len() > room;
        // S2.1: full calls, or all there is. A queue that is almost full waits until there is room for a call.
        let entries = self.limits.entries.max(1);
        let room = match room / entries {
            _ if chosen.len() <= room => room,
            0 if self.waiting(now).0 > 0 => return,
            0 => room,
            calls => calls * entries,
        };
        for (batch, times) in chosen.into_iter().take(room) {
            let visible_at = now.after(delay);
            self.sent.insert(batch.id, Sent { due: batch.due, at: now, visible_at, times, lost: false });
            let hint = Hint { batch: batch.id, due: batch.due.max(wall.after(delay)) };
            self.sendings += 1;
            let outgoing = Outgoing { hint, sending: self.sendings, lane: batch.lane };
            self.to_send.push_back((outgoing, delay.min(self.limits.delay)));
        }
    }

    /// Which of the batches that are due are to be sent, and for the how manieth time: up to one more than there is room
    /// for.
    fn choose<'a>(&mut self, due: &'a [DueBatch], room: usize, now: MonoMs) -> Vec<(&'a DueBatch, u32)> {
        let foreign = self.foreign(now);
        // Of what was found, so many are there already. While its own process keeps the queue filled, nobody else does.
        let mut explained = foreign.unwrap_or(usize::MAX);
        let window = self.window(now);
        let visible = self.waiting(now).0 + foreign.unwrap_or(0);
        let may_send_found = visible < window.div_ceil(4);
        self.found = false;
        let mut chosen = Vec::new();
        for batch in due {
            if self.claimed.contains(&batch.id) {
                continue;
            }
            if batch.origin == Origin::Mine {
                self.stock_mine(batch, now);
                continue;
            }
            let mut times = 1;
            match self.sent.get(&batch.id) {
                Some(sent) if sent.due == batch.due && !sent.lost => continue,
                Some(sent) if sent.due == batch.due => times = sent.times + 1,
                None if batch.origin == Origin::Found => {
                    self.found = true;
                    if explained > 0 {
                        explained = explained.saturating_sub(1);
                        continue;
                    }
                    // The window is for all that is visible, whoever sent it.
                    if !may_send_found || visible + chosen.len() >= window {
                        continue;
                    }
                }
                Some(_) | None => {}
            }
            if chosen.len() <= room {
                chosen.push((batch, times));
            }
        }
        if let Some(open) = due.iter().map(|batch| batch.open as usize).sum::<usize>().checked_div(due.len())
        {
            self.brought(open);
        }
        chosen
    }

    /// What was sent and is not due any more has been claimed by somebody.
    fn forget_claimed(&mut self, due: &[DueBatch], asked: usize) {
        let listed: HashSet<_> = due.iter().map(|batch| batch.id).collect();
        let last = if due.len() < asked { None } else { due.last().map(|batch| batch.due) };
        self.sent.retain(|id, sent| listed.contains(id) || last.is_some_and(|last| sent.due >= last));
    }

    /// Entries to send in one call, all with the same delay.
    pub fn take_sends(&mut self, now: MonoMs) -> Option<(Vec<Outgoing>, Duration)> {
        let delay = self.to_send.front().map(|(_, delay)| *delay).filter(|_| self.may(Call::Send, now))?;
        let same = self.to_send.iter().take_while(|(_, other)| *other == delay).count();
        let call = self.to_send.drain(..same.min(self.limits.entries.max(1)));
        Some((call.map(|(entry, _)| entry).collect(), delay))
    }

    /// These entries were not sent: the store lists their batches again.
    pub fn unsent(&mut self, batch: BatchId) {
        self.sent.remove(&batch);
    }

    /// Nobody knows whether some entries were sent: the depth decides.
    pub fn doubt(&mut self) {
        self.doubt = true;
    }

    // The depth.

    /// Whether the depth has to be known now.
    pub fn wants_depth(&self, now: MonoMs) -> bool {
        let is_old = |sent: &Sent| !sent.lost && now.since(sent.visible_at) >= sent.check_after();
        !self.held
            && now >= self.depth_at
            && self.may(Call::Depth, now)
            && ((self.found && self.foreign(now).is_none_or(|foreign| foreign > 0))
                || self.doubt
                || self.full
                || self.sent.values().any(is_old))
    }

    /// The depth changes: it is asked for again soon, if it has to be known.
    fn look_soon(&mut self, now: MonoMs) {
        self.depth_wait = DEPTH_EVERY;
        self.depth_at = self.depth_at.min(now.after(DEPTH_EVERY));
    }

    /// Takes in a depth that was asked for at `asked`; `None`: it is unknown, and nothing is sent by it. What follows is
    /// seen once the store has said what is still due: what others have claimed since is no loss.
    pub fn depth_read(&mut self, depth: Option<QueueDepth>, asked: MonoMs) {
        self.depth = depth;
        self.depth_at = asked.after(self.depth_wait);
        self.depth_wait = (self.depth_wait * 2).min(DEPTH_CAP);
        self.seen = None;
        if let Some(depth) = depth {
            let doubt = std::mem::take(&mut self.doubt);
            self.reading = Some(Reading { at: asked, depth, doubt });
        }
    }

    /// Holds a depth against what was sent and is still due.
    fn explain(&mut self, reading: Reading) {
        let Reading { at, depth, doubt } = reading;
        let known = self.known_at(at);
        let missing = known.len().saturating_sub(entries(depth.total()));
        let foreign = entries(depth.visible + depth.delayed).saturating_sub(known.len());
        for id in known.into_iter().take(missing) {
            // What is not old may not be counted yet: SQS's numbers are approximate.
            if let Some(sent) = self.sent.get_mut(&id)
                && (doubt || at.since(sent.visible_at) >= sent.check_after())
            {
                sent.lost = true;
            }
        }
        self.seen = Some(Seen { at, foreign });
    }

    /// The depth as it was known last: a diagnostic.
    pub fn last_depth(&self) -> Option<QueueDepth> {
        self.depth
    }

    // Receiving.

    /// How many entries are to be received now; zero: none.
    pub fn to_receive(&self, now: MonoMs) -> usize {
        if self.held || !self.may(Call::Receive, now) {
            return 0;
        }
        self.wanted(now).saturating_sub(self.stock.len()).min(self.limits.entries)
    }

    /// Takes in what was received. Whether a worker could have some of it now.
    pub fn received(&mut self, entries: Vec<Received>, now: MonoMs, wall: UnixMs) -> bool {
        let (mut ready, mut look_soon) = (false, false);
        for Received { hint, handle } in entries {
            if !self.sent.contains_key(&hint.batch)
                && let Some(seen) = &mut self.seen
            {
                seen.foreign = seen.foreign.saturating_sub(1);
                look_soon = true;
            }
            let early = hint.due.since(wall);
            if early > SOON {
                // S2.5: it says itself that it is too early, which needs no claim.
                self.hides.push((handle, early.min(self.limits.hidden)));
                continue;
            }
            ready |= early.is_zero();
            let ready = now.after(early);
            self.stock.push_back(Stocked { hint, handle: Some(handle), since: now, ready, asker: None });
        }
        if look_soon {
            self.look_soon(now);
        }
        ready
    }

    fn stock_mine(&mut self, batch: &DueBatch, now: MonoMs) {
        let is_there = |stocked: &Stocked| stocked.handle.is_none() && stocked.hint.batch == batch.id;
        if self.stock.len() < WINDOW_MAX && !self.stock.iter().any(is_there) {
            let hint = Hint { batch: batch.id, due: batch.due };
            self.stock.push_back(Stocked::without_entry(hint, now));
        }
    }

    /// Up to `limit` batches for `holder` to claim, each once.
    pub fn take(&mut self, limit: usize, holder: &str, now: MonoMs) -> Vec<Stocked> {
        let mut taken: Vec<Stocked> = Vec::new();
        if self.held {
            return taken;
        }
        let mut kept = VecDeque::new();
        while let Some(stocked) = self.stock.pop_front() {
            if let Some(same) = taken.iter_mut().find(|other| other.hint.batch == stocked.hint.batch) {
                // Doubled. The later handle counts, should it be the same entry once more.
                let spare = match &stocked.handle {
                    Some(_) => std::mem::replace(&mut same.handle, stocked.handle),
                    None => None,
                };
                self.delete(spare, now);
            } else if taken.len() < limit
                && stocked.ready <= now
                && stocked.asker.as_deref().is_none_or(|asker| asker == holder)
            {
                taken.push(stocked);
            } else {
                kept.push_back(stocked);
            }
        }
        self.stock = kept;
        taken
    }

    /// Takes in how the claim of a batch that was taken has ended. Its entry is returned where it has to be kept until
    /// the lease ends.
    pub fn claimed(&mut self, stocked: Stocked, claimed: Claimed, now: MonoMs) -> Option<Handle> {
        self.sent.remove(&stocked.hint.batch);
        self.claimed.insert(stocked.hint.batch);
        if claimed == Claimed::Granted && self.limits.keeps_order {
            return stocked.handle;
        }
        self.delete(stocked.handle, now);
        None
    }

    /// The store could not say whether `holder` may have them.
    pub fn put_back(&mut self, stocked: Vec<Stocked>, holder: &Arc<str>) {
        for stocked in stocked.into_iter().rev() {
            self.stock.push_front(Stocked { asker: Some(holder.clone()), ..stocked });
        }
    }

    /// Gives back what no worker has taken for a while; everything, at the end.
    pub fn give_back(&mut self, now: MonoMs, all: bool) {
        let hides = &mut self.hides;
        self.stock.retain(|stocked| {
            let is_kept = !all && now.since(stocked.since) < STOCK_FOR;
            if !is_kept {
                hides.extend(stocked.handle.clone().map(|handle| (handle, Duration::ZERO)));
            }
            is_kept
        });
    }

    // Hiding and deleting.

    /// Hides an entry for so long.
    pub fn hide(&mut self, handle: Handle, hidden: Duration) {
        self.hides.push((handle, hidden.min(self.limits.hidden)));
    }

    /// Entries to hide in one call.
    pub fn take_hides(&mut self, now: MonoMs) -> Vec<(Handle, Duration)> {
        if !self.may(Call::Hide, now) {
            // Its time runs out by itself.
            let kept = self.hides.len().saturating_sub(DELETES_MAX);
            self.hides.drain(..kept);
            return Vec::new();
        }
        let count = self.hides.len().min(self.limits.entries.max(1));
        self.hides.drain(..count).collect()
    }

    /// Deletes an entry, soon.
    pub fn delete(&mut self, handle: Option<Handle>, now: MonoMs) {
        self.deletes.extend(handle.map(|handle| (handle, now)));
        if self.deletes.len() > DELETES_MAX {
            self.deletes.pop_front();
        }
    }

    /// Entries to delete in one call, once there are enough for one or they have waited for long enough; `all`: now.
    pub fn take_deletes(&mut self, now: MonoMs, all: bool) -> Vec<Handle> {
        let entries = self.limits.entries.max(1);
        let is_due = self.deletes.len() >= entries
            || self.deletes.front().is_some_and(|(_, at)| all || now.since(*at) >= DELETE_LINGER);
        if !is_due || !self.may(Call::Delete, now) {
            return Vec::new();
        }
        self.deletes.drain(..self.deletes.len().min(entries)).map(|(handle, _)| handle).collect()
    }

    // Trouble.

    /// Whether a call may be made now.
    pub fn may(&self, call: Call, now: MonoMs) -> bool {
        let failing = &self.failing[call as usize];
        failing.failures == 0 || now >= failing.until
    }

    /// A call has failed; `jitter` is in `0.0..1.0`. Whether that is news.
    pub fn failed(&mut self, call: Call, now: MonoMs, jitter: f64) -> bool {
        let failing = &mut self.failing[call as usize];
        failing.failures += 1;
        failing.until = now.after(BACKOFF.wait(failing.failures, jitter));
        failing.failures == 1
    }

    /// A call was answered. Whether that is news.
    pub fn worked(&mut self, call: Call) -> bool {
        std::mem::take(&mut self.failing[call as usize]).failures > 0
    }
}

#[cfg(test)]
mod tests;
