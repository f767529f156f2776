//! What this process has received and not handed out: which entries are kept, which are given back and for how
//! long they are hidden then. Pure: time comes in as an argument.
//!
//! A queue is one line for all destinations, and an entry that is received is hidden from everybody. So that a
//! destination which is slow, paused or disabled never blocks the others (F43), each has a *shelf* of its own:
//!
//! - Receiving goes on only while a worker wants more than its shelf holds, whatever that brings.
//! - A destination is *served here* while a worker asks for it or has leases of it. Its shelf keeps up to
//!   `shelf_max` entries (or as many as are wanted); they are hidden anew as long as they lie there.
//! - What is not served here, or is too much for its shelf, is given back at once and hidden for a while that
//!   doubles with each receive. So entries that nobody wants move out of the way of those that somebody
//!   does, and cost few calls.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use postrider_actors::model::{
    ids::BatchId,
    time::{MonoMs, UnixMs},
};

use super::{calls::ENTRIES_MAX, envelope::Entry};

/// How long an ask counts that is not repeated. Workers that want more ask every 500 ms.
const ASK_TTL: Duration = Duration::from_secs(2);

/// How long an entry may lie on the shelf before another process gets the chance to have it.
const KEEP_MAX: Duration = Duration::from_mins(2);

/// An entry with less time than this until it is visible again is not handed out: it comes again.
const HAND_OUT_MIN: Duration = Duration::from_millis(500);

/// The longest that an unwanted entry is hidden, if its destination is not served here. It is also the longest
/// that a destination which is enabled again waits for it.
const UNSERVED_MAX: Duration = Duration::from_mins(15);

/// The same for one whose shelf is full. The shelf bridges the time until some of them are back.
const FULL_MAX: Duration = Duration::from_mins(5);

/// How a message is named towards SQS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Receipt {
    /// The message's id: the same at every receive.
    pub(crate) message: String,
    /// The latest receive's handle.
    pub(crate) handle: String,
}

/// A received entry.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) entry: Entry,
    pub(crate) receipt: Receipt,
    /// How often it was received, this time included.
    pub(crate) receives: u32,
    /// When it was sent, by the service's clock.
    pub(crate) sent_at: UnixMs,
    /// When it was received.
    pub(crate) at: MonoMs,
    /// Until when it is hidden from others.
    pub(crate) hidden_until: MonoMs,
    /// When it may be delivered.
    pub(crate) due: MonoMs,
}

impl Received {
    fn destination(&self) -> &str {
        &self.entry.batch.header.destination
    }

    fn bytes(&self) -> usize {
        self.entry.batch.payload.len() + 1_024
    }
}

/// Why an entry is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    /// Nobody here asks for its destination.
    Unserved,
    /// There are enough of its destination.
    Full,
    /// It has been here for long enough.
    Aged,
}

impl Back {
    /// How long to hide the entry: doubling with each receive up to a cap, at random in the upper half so that
    /// entries don't come back together. `jitter` is in `0.0..1.0`.
    pub(crate) fn hide(self, receives: u32, jitter: f64) -> Duration {
        let cap = match self {
            Self::Unserved => UNSERVED_MAX,
            Self::Full => FULL_MAX,
            Self::Aged => Duration::from_secs(1),
        };
        let doublings = receives.saturating_sub(1).min(20);
        let bound = Duration::from_secs(1 << doublings).min(cap);
        bound.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }
}

/// Bounds on what is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StockLimits {
    /// Entries per destination, unless more are wanted.
    pub(crate) shelf_max: usize,
    /// Bytes of all entries; one entry may always be kept.
    pub(crate) bytes_max: usize,
    /// For how long an entry is hidden at a receive.
    pub(crate) visibility: Duration,
}

struct Ask {
    at: MonoMs,
    wants: Vec<(Arc<str>, usize)>,
}

/// The shelves, and who wants what.
pub(crate) struct Stock {
    limits: StockLimits,
    shelves: BTreeMap<Arc<str>, Vec<Received>>,
    asks: HashMap<Arc<str>, Ask>,
    /// Destinations that the store gives no claims for, until then.
    blocked: HashMap<Arc<str>, MonoMs>,
    bytes: usize,
}

/// What a sweep found.
#[derive(Default)]
pub(crate) struct Sweep {
    /// To give back.
    pub(crate) back: Vec<(Received, Back)>,
    /// To hide anew, for the whole visibility timeout.
    pub(crate) hide: Vec<Receipt>,
    /// When the next entry is due that is not yet.
    pub(crate) next_due: Option<MonoMs>,
}

impl Stock {
    pub(crate) fn new(limits: StockLimits) -> Self {
        Self { limits, shelves: BTreeMap::new(), asks: HashMap::new(), blocked: HashMap::new(), bytes: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shelves.is_empty()
    }

    /// `holder` wants so many batches; replaces what it wanted before.
    pub(crate) fn ask(&mut self, holder: &Arc<str>, wants: Vec<(Arc<str>, usize)>, now: MonoMs) {
        self.asks.retain(|_, ask| now.since(ask.at) < ASK_TTL);
        self.asks.insert(holder.clone(), Ask { at: now, wants });
    }

    /// The store gives no claims on this destination's batches for now: it is disabled, or the store is busy.
    pub(crate) fn block(&mut self, destination: &str, until: MonoMs, now: MonoMs) {
        self.blocked.retain(|_, until| *until > now);
        self.blocked.insert(destination.into(), until);
    }

    fn is_blocked(&self, destination: &str, now: MonoMs) -> bool {
        self.blocked.get(destination).is_some_and(|until| *until > now)
    }

    fn wanted(&self, destination: &str, now: MonoMs) -> usize {
        let asks = self.asks.values().filter(|ask| now.since(ask.at) < ASK_TTL);
        let wants = asks.flat_map(|ask| &ask.wants).filter(|(name, _)| **name == *destination);
        wants.map(|(_, count)| count).sum()
    }

    /// How many receives of ten would be of use now.
    pub(crate) fn receives_wanted(&self, now: MonoMs) -> usize {
        if self.bytes >= self.limits.bytes_max {
            return 0;
        }
        let mut wanted: BTreeMap<&str, usize> = BTreeMap::new();
        for ask in self.asks.values().filter(|ask| now.since(ask.at) < ASK_TTL) {
            for (destination, count) in &ask.wants {
                *wanted.entry(destination).or_default() += count;
            }
        }
        let unmet = wanted.into_iter().filter(|(destination, _)| !self.is_blocked(destination, now));
        let unmet = unmet.map(|(destination, count)| {
            count.saturating_sub(self.shelves.get(destination).map_or(0, Vec::len))
        });
        unmet.sum::<usize>().div_ceil(ENTRIES_MAX)
    }

    /// Keeps an entry, or gives it back and says why. `has_leases` tells whether workers here hold leases of a destination.
    pub(crate) fn offer(
        &mut self,
        received: Received,
        has_leases: impl Fn(&str) -> bool,
        now: MonoMs,
    ) -> Option<(Received, Back)> {
        let destination = received.destination();
        let wanted = self.wanted(destination, now);
        if self.is_blocked(destination, now) || (wanted == 0 && !has_leases(destination)) {
            return Some((received, Back::Unserved));
        }
        let kept = self.shelves.get(destination).map_or(0, Vec::len);
        let full = kept >= self.limits.shelf_max.max(wanted);
        if full || (self.bytes > 0 && self.bytes + received.bytes() > self.limits.bytes_max) {
            return Some((received, Back::Full));
        }
        self.put(received);
        None
    }

    fn put(&mut self, received: Received) {
        self.bytes += received.bytes();
        let destination: Arc<str> = received.destination().into();
        self.shelves.entry(destination).or_default().push(received);
    }

    /// Puts back what was taken and could not be claimed.
    pub(crate) fn restock(&mut self, received: impl IntoIterator<Item = Received>) {
        received.into_iter().for_each(|received| self.put(received));
    }

    /// The entry of `batch`, if it is here.
    pub(crate) fn find_mut(&mut self, batch: BatchId) -> Option<&mut Received> {
        self.shelves.values_mut().flatten().find(|received| received.entry.batch.id == batch)
    }

    /// Takes up to `limit` due entries, not more than wanted of each destination, oldest due first.
    pub(crate) fn take(
        &mut self,
        wants: &BTreeMap<Arc<str>, usize>,
        limit: usize,
        now: MonoMs,
    ) -> Vec<Received> {
        let mut taken: Vec<Received> = Vec::new();
        for (destination, &want) in wants {
            if self.is_blocked(destination, now) {
                continue;
            }
            let Some(shelf) = self.shelves.get_mut(destination) else { continue };
            // What is visible again is another receiver's.
            shelf.retain(|received| received.hidden_until > now.after(HAND_OUT_MIN));
            shelf.sort_by_key(|received| received.entry.batch.not_before); // stable: then by arrival
            let ready = shelf.iter().filter(|received| received.due <= now).count();
            let count = want.min(ready).min(limit - taken.len());
            let mut left = count;
            taken.extend(shelf.extract_if(.., |received| {
                let takes = left > 0 && received.due <= now;
                left -= usize::from(takes);
                takes
            }));
        }
        self.tidy();
        taken
    }

    /// Looks at all entries: see [`Sweep`].
    pub(crate) fn sweep(&mut self, has_leases: impl Fn(&str) -> bool, now: MonoMs) -> Sweep {
        let mut sweep = Sweep::default();
        let destinations: Vec<_> = self.shelves.keys().cloned().collect();
        for destination in destinations {
            let blocked = self.is_blocked(&destination, now);
            let served = !blocked && (self.wanted(&destination, now) > 0 || has_leases(&destination));
            let Some(shelf) = self.shelves.get_mut(&destination) else { continue };
            for mut received in std::mem::take(shelf) {
                if received.hidden_until <= now {
                    continue;
                }
                if !served {
                    sweep.back.push((received, Back::Unserved));
                } else if now.since(received.at) > KEEP_MAX {
                    sweep.back.push((received, Back::Aged));
                } else {
                    if received.hidden_until.since(now) < self.limits.visibility / 2 {
                        received.hidden_until = now.after(self.limits.visibility);
                        sweep.hide.push(received.receipt.clone());
                    }
                    if received.due > now {
                        sweep.next_due =
                            Some(sweep.next_due.map_or(received.due, |due| due.min(received.due)));
                    }
                    shelf.push(received);
                }
            }
        }
        self.tidy();
        sweep
    }

    /// Takes everything.
    pub(crate) fn clear(&mut self) -> Vec<Received> {
        self.bytes = 0;
        std::mem::take(&mut self.shelves).into_values().flatten().collect()
    }

    fn tidy(&mut self) {
        self.shelves.retain(|_, shelf| !shelf.is_empty());
        self.bytes = self.shelves.values().flatten().map(Received::bytes).sum();
    }
}
