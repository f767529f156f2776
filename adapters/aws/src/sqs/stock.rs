//! What this process has received and not handed out: which entries are kept, which are given back and for how
//! long they are hidden then. Pure: time comes in as an argument.
//!
//! A queue is one line for all destinations, and an entry that is received is hidden from everybody. So that a
//! destination which is slow, paused or disabled never blocks the others (F43), each has a *shelf* of its own:
//!
//! - Receiving goes on only while a worker wants more than its shelf holds, whatever that brings.
//! - A destination is *served here* while a worker asks for it or has leases of it. Its shelf keeps up to
//!   `shelf_max` entries (or as many as are wanted); they are hidden anew as long as they lie there.
//! - What is not served here, or is too much for its shelf, is given back at once and hidden for a quarter of
//!   the time that this has been so: a second at first, up to 15 minutes. So entries that nobody wants move out
//!   of the way of those that somebody does, cost few calls, and come back soon after a short pause.
//! - A destination that the store gives no claims for (it is disabled) is left alone in the same manner.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::RangeInclusive,
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

/// How long a destination is left alone that the store gave no claim for, at least and at most.
const BLOCKED: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_mins(1);

/// Which part of the time that an entry has been unwanted it is hidden for, as a divisor.
const PATIENCE_DIVISOR: u32 = 4;

/// Destinations that something is remembered of. Entries may name any destination; those that were heard of least
/// recently are forgotten.
const REMEMBERED_MAX: usize = 1_024;

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

/// Why an entry is not kept, and for how long that has been so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    /// Nobody here asks for its destination, or the store gives no claims for it.
    Unserved(Duration),
    /// There are enough of its destination.
    Full(Duration),
    /// It has been here for long enough, or can't be loaded now.
    Aged,
}

impl Back {
    /// How long to hide the entry; at random in the upper half, so that entries don't come back together.
    /// `jitter` is in `0.0..1.0`. (How often it was received says little: lost and released leases count too.)
    pub(crate) fn hide(self, jitter: f64) -> Duration {
        let (age, cap) = match self {
            Self::Unserved(age) => (age, UNSERVED_MAX),
            Self::Full(age) => (age, FULL_MAX),
            Self::Aged => (Duration::ZERO, FULL_MAX),
        };
        let bound = (age / PATIENCE_DIVISOR).clamp(Duration::from_secs(1), cap);
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

/// How many of a batch's messages are due, before any batch of its destination was leased.
const DUE_USUAL: usize = 100;

/// What is wanted of one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Enough once so many messages are due …
    pub(crate) messages: usize,
    /// … and never more batches than this.
    pub(crate) batches: usize,
}

impl Wanted {
    pub(crate) fn add(&mut self, messages: usize, batches: usize) {
        self.messages = self.messages.saturating_add(messages);
        self.batches = self.batches.saturating_add(batches);
    }

    /// A batch is one less to get, and so many messages of it.
    pub(crate) fn got(&mut self, messages: usize) {
        self.messages = self.messages.saturating_sub(messages);
        self.batches = self.batches.saturating_sub(1);
    }

    fn is_met(self) -> bool {
        self.messages == 0 || self.batches == 0
    }

    /// How many batches that are, where so many messages of each are due.
    fn batches_of(self, due: usize) -> usize {
        self.batches.min(self.messages.div_ceil(due.max(1)))
    }
}

struct Ask {
    at: MonoMs,
    wants: BTreeMap<Arc<str>, Wanted>,
}

/// The shelves, and who wants what.
pub(crate) struct Stock {
    limits: StockLimits,
    shelves: BTreeMap<Arc<str>, Vec<Received>>,
    asks: HashMap<Arc<str>, Ask>,
    /// What is remembered of destinations.
    known: HashMap<Arc<str>, Known>,
    bytes: usize,
}

/// What is remembered of a destination.
#[derive(Clone, Copy)]
struct Known {
    /// When it was served last, or when it was first heard of.
    served: MonoMs,
    /// When its shelf had room last.
    roomy: MonoMs,
    /// Since when the store gives no claims for it, and until when it is left alone.
    refused: Option<(MonoMs, MonoMs)>,
    /// How many messages were due of the batch that was leased last.
    due: usize,
    /// When it was last heard of.
    heard: MonoMs,
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
        Self { limits, shelves: BTreeMap::new(), asks: HashMap::new(), known: HashMap::new(), bytes: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shelves.is_empty()
    }

    fn known(&mut self, destination: &str, now: MonoMs) -> &mut Known {
        if !self.known.contains_key(destination) && self.known.len() >= REMEMBERED_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.heard).map(|(name, _)| name.clone());
            oldest.map(|name| self.known.remove(&name));
        }
        let fresh = Known { served: now, roomy: now, refused: None, due: DUE_USUAL, heard: now };
        let known = self.known.entry(destination.into()).or_insert(fresh);
        known.heard = now;
        known
    }

    /// `holder` wants so much; replaces what it wanted before.
    pub(crate) fn ask(&mut self, holder: &Arc<str>, mut wants: BTreeMap<Arc<str>, Wanted>, now: MonoMs) {
        wants.retain(|_, wanted| !wanted.is_met());
        for destination in wants.keys() {
            self.known(destination, now).served = now;
        }
        self.asks.retain(|_, ask| now.since(ask.at) < ASK_TTL);
        self.asks.insert(holder.clone(), Ask { at: now, wants });
    }

    /// The store gives no claims on this destination's batches for now: it is disabled, or the store is busy. It
    /// is left alone for a while, the longer the longer this goes on. Returns why its entries go back.
    pub(crate) fn refuse(&mut self, destination: &str, now: MonoMs) -> Back {
        let known = self.known(destination, now);
        let since = known.refused.map_or(now, |(since, _)| since);
        let age = now.since(since);
        let pause = (age / PATIENCE_DIVISOR).clamp(*BLOCKED.start(), *BLOCKED.end());
        known.refused = Some((since, now.after(pause)));
        Back::Unserved(age)
    }

    /// The store gives claims on this destination's batches; so many messages were due of one.
    pub(crate) fn grant(&mut self, destination: &str, due: usize, now: MonoMs) {
        let known = self.known(destination, now);
        (known.refused, known.due) = (None, due);
    }

    fn is_blocked(&self, destination: &str, now: MonoMs) -> bool {
        self.known.get(destination).and_then(|known| known.refused).is_some_and(|(_, until)| until > now)
    }

    /// Why entries of the destination are not kept at all, if so.
    fn unserved(&mut self, destination: &str, has_leases: bool, now: MonoMs) -> Option<Back> {
        let blocked = self.is_blocked(destination, now);
        let served = has_leases || self.wanted(destination, now) > 0;
        let known = self.known(destination, now);
        if served {
            known.served = now;
        }
        match known.refused {
            Some((since, _)) if blocked => Some(Back::Unserved(now.since(since))),
            _ if served => None,
            _ => Some(Back::Unserved(now.since(known.served))),
        }
    }

    /// How many batches are wanted of a destination, as far as that can be told.
    fn wanted(&self, destination: &str, now: MonoMs) -> usize {
        let due = self.known.get(destination).map_or(DUE_USUAL, |known| known.due);
        let asks = self.asks.values().filter(|ask| now.since(ask.at) < ASK_TTL);
        asks.filter_map(|ask| ask.wants.get(destination)).map(|wanted| wanted.batches_of(due)).sum()
    }

    /// How many receives of ten would be of use now.
    pub(crate) fn receives_wanted(&self, now: MonoMs) -> usize {
        if self.bytes >= self.limits.bytes_max {
            return 0;
        }
        let asks = self.asks.values().filter(|ask| now.since(ask.at) < ASK_TTL);
        let wanted: BTreeSet<&str> = asks.flat_map(|ask| ask.wants.keys()).map(|name| &**name).collect();
        let unmet =
            wanted.into_iter().filter(|destination| !self.is_blocked(destination, now)).map(|destination| {
                let kept = self.shelves.get(destination).map_or(0, Vec::len);
                self.wanted(destination, now).saturating_sub(kept)
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
        if let Some(back) = self.unserved(destination, has_leases(destination), now) {
            return Some((received, back));
        }
        let wanted = self.wanted(destination, now);
        let kept = self.shelves.get(destination).map_or(0, Vec::len);
        let full = kept >= self.limits.shelf_max.max(wanted);
        let full = full || (self.bytes > 0 && self.bytes + received.bytes() > self.limits.bytes_max);
        let known = self.known(destination, now);
        if full {
            let age = now.since(known.roomy);
            return Some((received, Back::Full(age)));
        }
        known.roomy = now;
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

    /// Takes up to `limit` due entries, not more than wanted of each destination, oldest due first. Each counts with
    /// all of its messages: who claims them sees how many are due, and takes more.
    pub(crate) fn take(
        &mut self,
        wants: &BTreeMap<Arc<str>, Wanted>,
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
            let (mut want, mut room) = (want, limit - taken.len());
            taken.extend(shelf.extract_if(.., |received| {
                let takes = room > 0 && !want.is_met() && received.due <= now;
                if takes {
                    want.got(received.entry.batch.count as usize);
                    room -= 1;
                }
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
            let unserved = self.unserved(&destination, has_leases(&destination), now);
            let Some(shelf) = self.shelves.get_mut(&destination) else { continue };
            for mut received in std::mem::take(shelf) {
                if received.hidden_until <= now {
                    continue;
                }
                if let Some(back) = unserved {
                    sweep.back.push((received, back));
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

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_actors::model::{
        batch::{BatchHeader, NewBatch, RowLayout},
        ids::FileId,
    };
    use proptest::prelude::*;

    const LIMITS: StockLimits =
        StockLimits { shelf_max: 3, bytes_max: 100_000, visibility: Duration::from_mins(1) };

    fn received(number: u8, destination: &str, at: u64, due: u64) -> Received {
        let header = BatchHeader {
            feed: "feed".into(),
            destination: destination.into(),
            file: FileId([1; 16]),
            layout: RowLayout::Lines,
            template: None,
            content_type: String::new(),
        };
        let id = BatchId([number; 16]);
        let batch = NewBatch {
            id,
            header: header.into(),
            first_row: 1,
            count: 1,
            accepted_at: UnixMs(0),
            not_before: UnixMs(number.into()),
            payload: vec![0; 10].into(),
        };
        Received {
            entry: Entry { batch, by_reference: false },
            receipt: Receipt { message: number.to_string(), handle: String::new() },
            receives: 1,
            sent_at: UnixMs(0),
            at: MonoMs(at),
            hidden_until: MonoMs(at + 60_000),
            due: MonoMs(due),
        }
    }

    fn wants(of: &[(&str, usize)]) -> BTreeMap<Arc<str>, Wanted> {
        of.iter().map(|&(name, batches)| (name.into(), Wanted { messages: usize::MAX, batches })).collect()
    }

    fn asked(of: &[(&str, usize)]) -> Stock {
        let mut stock = Stock::new(LIMITS);
        stock.ask(&"w".into(), wants(of), MonoMs(0));
        stock
    }

    fn take(stock: &mut Stock, of: &[(&str, usize)], now: u64) -> Vec<u8> {
        stock.take(&wants(of), 10, MonoMs(now)).iter().map(|received| received.entry.batch.id.0[0]).collect()
    }

    #[test]
    fn receives_follow_what_is_wanted_and_is_not_there() {
        let mut stock = asked(&[("d", 11), ("e", 1)]);
        assert_eq!(stock.receives_wanted(MonoMs(0)), 2);
        assert!(stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0)).is_none());
        assert!(stock.offer(received(2, "d", 0, 0), |_| false, MonoMs(0)).is_none());
        assert_eq!(stock.receives_wanted(MonoMs(0)), 1, "nine of d, one of e");
        stock.ask(&"w".into(), wants(&[]), MonoMs(0));
        assert_eq!(stock.receives_wanted(MonoMs(0)), 0);
        stock.ask(&"w".into(), wants(&[("d", 9)]), MonoMs(0));
        assert_eq!(stock.receives_wanted(MonoMs(1_999)), 1);
        assert_eq!(stock.receives_wanted(MonoMs(2_000)), 0, "an ask that is not repeated runs out");
    }

    #[test]
    fn each_destination_has_a_shelf_of_its_own_and_what_is_too_much_goes_back() {
        let mut stock = asked(&[("d", 1), ("e", 1)]);
        for number in 0..3 {
            assert!(stock.offer(received(number, "d", 0, 0), |_| false, MonoMs(0)).is_none());
        }
        let back = stock.offer(received(3, "d", 0, 0), |_| false, MonoMs(1_000)).expect("the shelf is full");
        assert_eq!(back.1, Back::Full(Duration::from_secs(1)));
        assert!(stock.offer(received(4, "e", 0, 0), |_| false, MonoMs(0)).is_none(), "e is not d");
        let back = stock.offer(received(5, "f", 0, 0), |_| false, MonoMs(0)).expect("nobody asks for f");
        assert_eq!(back.1, Back::Unserved(Duration::ZERO));
        assert!(
            stock.offer(received(6, "g", 0, 0), |name| name == "g", MonoMs(0)).is_none(),
            "served: leases"
        );
        assert_eq!(take(&mut stock, &[("d", 2), ("e", 5)], 0), [0, 1, 4]);
    }

    #[test]
    fn enough_is_enough_by_messages_too() {
        let mut stock = Stock::new(StockLimits { shelf_max: 20, ..LIMITS });
        let some: BTreeMap<Arc<str>, _> = [("d".into(), Wanted { messages: 25, batches: 99 })].into();
        stock.ask(&"w".into(), some.clone(), MonoMs(0));
        assert_eq!(stock.receives_wanted(MonoMs(0)), 1, "a batch may have a hundred");
        for number in 0..15 {
            let mut received = received(number, "d", 0, 0);
            received.entry.batch.count = 10;
            assert!(stock.offer(received, |_| true, MonoMs(0)).is_none());
        }
        assert_eq!(stock.take(&some, 10, MonoMs(0)).len(), 3);
        assert_eq!(stock.take(&BTreeMap::new(), 10, MonoMs(0)).len(), 0);
        // Of each only one was due.
        stock.grant("d", 1, MonoMs(0));
        assert_eq!(stock.receives_wanted(MonoMs(0)), 2, "25 batches are wanted, 12 are here");
        let met: BTreeMap<Arc<str>, _> = [("d".into(), Wanted { messages: 0, batches: 99 })].into();
        assert!(stock.take(&met, 10, MonoMs(0)).is_empty());
        stock.ask(&"w".into(), met, MonoMs(0));
        assert_eq!(stock.receives_wanted(MonoMs(0)), 0);
    }

    #[test]
    fn bytes_are_bounded_too() {
        let mut stock = Stock::new(StockLimits { bytes_max: 1_500, ..LIMITS });
        stock.ask(&"w".into(), wants(&[("d", 5)]), MonoMs(0));
        assert!(stock.offer(received(0, "d", 0, 0), |_| false, MonoMs(0)).is_none());
        assert!(matches!(
            stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0)),
            Some((_, Back::Full(_)))
        ));
        let all = [("d", 5)];
        assert_eq!(take(&mut stock, &all, 0), [0]);
        assert!(stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0)).is_none(), "there is room again");
    }

    #[test]
    fn what_is_not_due_or_about_to_be_visible_is_not_handed_out() {
        let mut stock = asked(&[("d", 9)]);
        stock.offer(received(1, "d", 0, 500), |_| false, MonoMs(0));
        stock.offer(received(2, "d", 0, 0), |_| false, MonoMs(0));
        assert_eq!(take(&mut stock, &[("d", 9)], 499), [2]);
        assert_eq!(stock.sweep(|_| false, MonoMs(499)).next_due, Some(MonoMs(500)));
        assert_eq!(take(&mut stock, &[("d", 9)], 500), [1]);
        stock.offer(received(3, "d", 0, 0), |_| false, MonoMs(0));
        assert!(take(&mut stock, &[("d", 9)], 59_600).is_empty());
        assert!(stock.is_empty(), "it comes again");
    }

    #[test]
    fn what_lies_on_the_shelf_is_kept_hidden_and_given_back_in_the_end() {
        let mut stock = asked(&[("d", 1)]);
        stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0));
        let busy = |_: &str| true;
        assert!(stock.sweep(busy, MonoMs(30_000)).hide.is_empty());
        assert_eq!(stock.sweep(busy, MonoMs(30_001)).hide.len(), 1);
        assert!(stock.sweep(busy, MonoMs(31_000)).hide.is_empty(), "once per half of its timeout");
        assert_eq!(stock.sweep(busy, MonoMs(90_000)).hide.len(), 1);
        let sweep = stock.sweep(busy, MonoMs(120_001));
        assert!(
            matches!(sweep.back[..], [(_, Back::Aged)]) && stock.is_empty(),
            "another process may want it"
        );
    }

    #[test]
    fn what_nobody_asks_for_any_more_is_given_back() {
        let mut stock = asked(&[("d", 1)]);
        stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0));
        assert!(stock.sweep(|_| false, MonoMs(1_999)).back.is_empty());
        let sweep = stock.sweep(|_| false, MonoMs(2_000));
        assert!(matches!(sweep.back[..], [(_, Back::Unserved(_))]) && stock.is_empty());
    }

    #[test]
    fn a_refused_destination_is_left_alone_the_longer_the_longer_it_is_refused() {
        let mut stock = asked(&[("d", 5)]);
        stock.offer(received(1, "d", 0, 0), |_| false, MonoMs(0));
        assert_eq!(stock.refuse("d", MonoMs(0)), Back::Unserved(Duration::ZERO));
        assert!(take(&mut stock, &[("d", 5)], 499).is_empty());
        assert_eq!(stock.receives_wanted(MonoMs(499)), 0);
        assert_eq!(stock.sweep(|_| true, MonoMs(499)).back.len(), 1, "others may have it meanwhile");
        stock.ask(&"w".into(), wants(&[("d", 5)]), MonoMs(500));
        assert_eq!(stock.receives_wanted(MonoMs(500)), 1, "tried again");
        assert_eq!(stock.refuse("d", MonoMs(100_000)), Back::Unserved(Duration::from_secs(100)));
        stock.ask(&"w".into(), wants(&[("d", 5)]), MonoMs(124_999));
        assert_eq!(stock.receives_wanted(MonoMs(124_999)), 0);
        assert_eq!(stock.receives_wanted(MonoMs(125_000)), 1);
        stock.grant("d", 1, MonoMs(125_000));
        assert_eq!(stock.refuse("d", MonoMs(125_001)), Back::Unserved(Duration::ZERO), "from the beginning");
    }

    #[test]
    fn unwanted_entries_are_hidden_for_a_quarter_of_the_time_that_they_were_unwanted() {
        let hide = |back: Back, jitter| back.hide(jitter).as_secs_f64();
        let unserved = |seconds| Back::Unserved(Duration::from_secs(seconds));
        for (age, expected) in [(0, 1.0), (4, 1.0), (40, 10.0), (3_600, 900.0), (1_000_000, 900.0)] {
            assert!((hide(unserved(age), 1.0) - expected).abs() < 0.01, "{age}");
            assert!((hide(unserved(age), 0.0) - expected / 2.0).abs() < 0.01, "{age}");
        }
        assert!((hide(Back::Full(Duration::from_hours(9)), 1.0) - 300.0).abs() < 0.01);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut stock = asked(&[("d", 1)]);
        for number in 0..3_000u64 {
            stock.offer(received(1, &format!("foreign-{number}"), 0, 0), |_| false, MonoMs(number));
        }
        assert_eq!(stock.known.len(), REMEMBERED_MAX);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled_and_bounds_hold(
            steps in prop::collection::vec((0u8..4, 0usize..3, 0u64..3_000), 1..120),
        ) {
            let names = ["a", "b", "c"];
            let mut stock = Stock::new(LIMITS);
            let (mut number, mut now) = (0u8, 0u64);
            let (mut offered, mut gone) = (0usize, 0usize);
            for (step, which, wait) in steps {
                now += wait;
                match step {
                    0 => stock.ask(&"w".into(), wants(&[(names[which], 2)]), MonoMs(now)),
                    1 => {
                        offered += 1;
                        number = number.wrapping_add(1);
                        gone += usize::from(stock.offer(received(number, names[which], now, now), |_| false, MonoMs(now)).is_some());
                    }
                    2 => {
                        let taken = take(&mut stock, &[(names[which], 2)], now);
                        prop_assert!(taken.len() <= 2);
                        gone += taken.len();
                    }
                    _ => gone += stock.sweep(|_| false, MonoMs(now)).back.len(),
                }
                let kept: usize = stock.shelves.values().map(Vec::len).sum();
                prop_assert!(stock.shelves.values().all(|shelf| shelf.len() <= LIMITS.shelf_max));
                // Entries whose visibility has run out are forgotten: they are the queue's again.
                prop_assert!(kept + gone <= offered);
                prop_assert!(now > 58_000 || kept + gone == offered);
                prop_assert_eq!(stock.bytes, stock.shelves.values().flatten().map(Received::bytes).sum::<usize>());
            }
        }
    }
}
