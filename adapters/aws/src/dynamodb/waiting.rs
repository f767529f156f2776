//! What a process knows to wait for delivery without asking: what it has appended or left to be tried again, and what
//! its sweeps have found. Bounded; what does not fit is found by a sweep when there is room.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use postrider_actors::{
    model::{
        fairness::{LeaseTurns, Listed},
        ids::{BatchId, FileId},
        priority::Priority,
        time::UnixMs,
    },
    ports::{DueBatch, DueQuery, FirstTurns, Hint, Origin, Want},
};

use super::{payload::PayloadId, record::StoredBatch};

/// Entries that are remembered, some 200 bytes each.
const ENTRIES_MAX: usize = 20_000;

/// … and of one destination: one that is down must not take the room of the others. Nor must a large file take that of a
/// small one: where there is no room, the file with the most gives one up.
const DESTINATION_MAX: usize = 5_000;

/// A batch that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) batch: DueBatch,
    pub(super) file: FileId,
    pub(super) first_row: u64,
    /// How urgent its file was when its rows were accepted.
    pub(super) priority: Priority,
    /// Whether a message of it was tried before.
    pub(super) is_retry: bool,
    /// Since when it does: a stamp, another one each time.
    pub(super) created: u64,
    /// When it is to be looked at, by the store's time: this process has others look later then.
    pub(super) look_at: UnixMs,
    /// What it carries, and until when that is kept.
    pub(super) payload: (PayloadId, UnixMs),
}

impl Waiting {
    /// Of a record that nobody has.
    pub(super) fn of(
        stored: &StoredBatch,
        due: UnixMs,
        created: u64,
        look_at: UnixMs,
        origin: Origin,
    ) -> Self {
        let (id, destination) = (stored.id, stored.destination.clone());
        let (lane, open) = (lane_of(stored.file), stored.record.open_count());
        let batch = DueBatch { id, destination, lane, open, due, origin };
        Self {
            batch,
            file: stored.file,
            first_row: stored.rows.row(0),
            priority: stored.priority,
            is_retry: stored.record.is_retry(),
            created,
            look_at,
            payload: (stored.payload, stored.kept_until),
        }
    }

    fn place(&self) -> DueOrder {
        (self.batch.due, self.created, self.batch.id)
    }
}

/// Batches of one file go one behind the other, where the queue keeps an order.
fn lane_of(file: FileId) -> u32 {
    let [a, b, c, d, ..] = file.0;
    u32::from_le_bytes([a, b, c, d])
}

/// In a destination: the oldest due first, then in the order in which they began to wait.
type DueOrder = (UnixMs, u64, BatchId);

/// What waits of one destination.
#[derive(Default)]
struct Places {
    all: BTreeSet<DueOrder>,
    /// By file, and whether they are retries.
    queues: HashMap<(FileId, bool), BTreeSet<DueOrder>>,
}

impl Places {
    fn insert(&mut self, waiting: &Waiting) {
        self.all.insert(waiting.place());
        self.queues.entry((waiting.file, waiting.is_retry)).or_default().insert(waiting.place());
    }

    fn remove(&mut self, waiting: &Waiting) {
        self.all.remove(&waiting.place());
        let queue = (waiting.file, waiting.is_retry);
        if let Some(places) = self.queues.get_mut(&queue) {
            places.remove(&waiting.place());
            if places.is_empty() {
                self.queues.remove(&queue);
            }
        }
    }

    /// The last of the longest queue, if that is longer than the one that `waiting` would join.
    fn to_give_up(&self, waiting: &Waiting) -> Option<BatchId> {
        let own = self.queues.get(&(waiting.file, waiting.is_retry)).map_or(0, BTreeSet::len);
        let longest = self.queues.values().max_by_key(|queue| queue.len())?;
        longest.last().filter(|_| longest.len() > own + 1).map(|(.., id)| *id)
    }
}

/// All that waits, as far as it is known.
#[derive(Default)]
pub(super) struct WaitingList {
    entries: HashMap<BatchId, Waiting>,
    places: HashMap<Arc<str>, Places>,
    /// Whose turn it is where a worker takes what goes ahead.
    turns: HashMap<Arc<str>, LeaseTurns<FileId>>,
    times: BTreeSet<(UnixMs, BatchId)>,
    looks: BTreeSet<(UnixMs, BatchId)>,
}

impl WaitingList {
    /// Takes in a batch; what was known of it since before then is out of date.
    pub(super) fn insert(&mut self, waiting: Waiting) {
        let DueBatch { id, due, ref destination, .. } = waiting.batch;
        if self.created(id).is_some_and(|known| known >= waiting.created) {
            return;
        }
        self.remove(id);
        let places = self.places.entry(destination.clone()).or_default();
        if self.entries.len() >= ENTRIES_MAX || places.all.len() >= DESTINATION_MAX {
            let Some(other) = places.to_give_up(&waiting) else { return };
            self.remove(other);
        }
        self.places.entry(destination.clone()).or_default().insert(&waiting);
        self.times.insert((due, id));
        self.looks.insert((waiting.look_at, id));
        self.entries.insert(id, waiting);
    }

    /// Forgets a batch: somebody has it, or it is done.
    pub(super) fn remove(&mut self, id: BatchId) {
        let Some(waiting) = self.entries.remove(&id) else { return };
        let destination = &waiting.batch.destination;
        self.times.remove(&(waiting.batch.due, id));
        self.looks.remove(&(waiting.look_at, id));
        if let Some(places) = self.places.get_mut(destination) {
            places.remove(&waiting);
            if places.all.is_empty() {
                self.places.remove(destination);
                self.turns.remove(destination);
            }
        }
    }

    /// Forgets a batch as it was known since `created` or before.
    pub(super) fn remove_until(&mut self, id: BatchId, created: u64) {
        if self.created(id).is_some_and(|known| known <= created) {
            self.remove(id);
        }
    }

    pub(super) fn created(&self, id: BatchId) -> Option<u64> {
        self.entries.get(&id).map(|waiting| waiting.created)
    }

    /// Up to `limit` batches that others would look at by `now`.
    pub(super) fn to_be_kept(&self, now: UnixMs, limit: usize) -> Vec<Waiting> {
        let looks = self.looks.iter().take_while(|(at, _)| *at <= now).take(limit);
        looks.map(|(_, id)| self.entries[id].clone()).collect()
    }

    /// Others look at a batch later, which is known since `created`.
    pub(super) fn kept(&mut self, id: BatchId, created: u64, look_at: UnixMs) {
        let Some(waiting) = self.entries.get_mut(&id).filter(|known| known.created == created) else {
            return;
        };
        self.looks.remove(&(waiting.look_at, id));
        waiting.look_at = look_at;
        self.looks.insert((look_at, id));
    }

    /// What is asked for, of each destination the oldest due first, but for what waits because its file is held.
    pub(super) fn due(&self, query: &DueQuery<'_>, waits: impl Fn(&Waiting) -> bool) -> Vec<DueBatch> {
        let mut due = Vec::new();
        for (destination, limit) in query.wants {
            let places = self.places.get(destination).into_iter().flat_map(|places| &places.all);
            let places = places.take_while(|(at, ..)| *at <= query.due_by).map(|(.., id)| &self.entries[id]);
            let places = places.filter(|waiting| !waits(waiting)).take(*limit);
            due.extend(places.map(|waiting| waiting.batch.clone()));
        }
        due
    }

    /// What goes ahead of what a worker has, but for what waits because its file is held; `priority_of` says how urgent a
    /// batch is.
    pub(super) fn first_turns(
        &mut self,
        want: &Want,
        due_by: UnixMs,
        waits: impl Fn(&Waiting) -> bool,
        priority_of: impl Fn(&Waiting) -> Priority,
    ) -> Vec<Hint> {
        let (Some(first), Some(places)) = (&want.first_turns, self.places.get(&want.destination)) else {
            return Vec::new();
        };
        let is_asked = |file: &FileId, is_retry: bool| {
            if is_retry { first.retries } else { !first.besides.contains(file) }
        };
        let queues = places.queues.iter().filter(|((file, is_retry), _)| is_asked(file, *is_retry));
        let first_of = |queue: &BTreeSet<DueOrder>| {
            let due = queue.iter().take_while(|(at, ..)| *at <= due_by);
            due.map(|(.., id)| &self.entries[id]).find(|waiting| !waits(waiting))
        };
        let mut found: Vec<_> = queues.filter_map(|(_, queue)| first_of(queue)).collect();
        found.sort_unstable_by_key(|waiting| waiting.place());
        let lane = |is_retry| {
            let of_it = found.iter().filter(move |waiting| waiting.is_retry == is_retry);
            let hint = |waiting: &&Waiting| Hint { batch: waiting.batch.id, due: waiting.batch.due };
            let due = |waiting: &&Waiting| waiting.batch.open as usize;
            Listed::new(
                of_it.map(|waiting| (waiting.file, priority_of(waiting), hint(waiting), due(waiting))),
                1,
            )
        };
        let (mut retries, mut fresh) = (lane(true), lane(false));
        let turns = self.turns.entry(want.destination.clone()).or_default();
        let batches = want.batches.min(FirstTurns::BATCHES_MAX);
        let Ok(chosen) = turns.choose(&mut retries, &mut fresh, usize::MAX, batches);
        chosen
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When the next one is due, but for those that are closed.
    pub(super) fn next_due(&self, is_closed: impl Fn(&Waiting) -> bool) -> Option<UnixMs> {
        self.times.iter().find(|(_, id)| !is_closed(&self.entries[id])).map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(number: u16, destination: &str, due: u64, created: u64) -> Waiting {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_be_bytes());
        let batch = DueBatch {
            id: BatchId(id),
            destination: destination.into(),
            lane: 0,
            open: 1,
            due: UnixMs(due),
            origin: Origin::Fresh,
        };
        let payload = ("0".repeat(32).parse().unwrap(), UnixMs(0));
        Waiting {
            batch,
            file: FileId([1; 16]),
            first_row: 1,
            priority: Priority::Normal,
            is_retry: false,
            created,
            look_at: UnixMs(due + 5),
            payload,
        }
    }

    /// The numbers of the batches that go ahead, for who has files 1 and `retries`.
    fn first_turns(list: &mut WaitingList, retries: bool, batches: usize) -> Vec<u8> {
        let first_turns = Some(FirstTurns { besides: vec![FileId([1; 16])], retries });
        let want = Want { first_turns, ..Want::new("d", 0, batches) };
        let priority = |waiting: &Waiting| waiting.priority;
        let hints = list.first_turns(&want, UnixMs(50), |waiting| waiting.first_row == 7, priority);
        hints.into_iter().map(|hint| hint.batch.0[1]).collect()
    }

    #[test]
    fn b11_what_goes_ahead_is_the_first_due_of_each_other_file_and_a_retry_if_asked_for() {
        let mut list = WaitingList::default();
        for (number, file, due) in [(1, 1, 1), (2, 2, 40), (3, 2, 30), (4, 3, 10), (5, 4, 60), (6, 5, 20)] {
            let file = FileId([file; 16]);
            list.insert(Waiting { file, ..waiting(number, "d", due, 1) });
        }
        list.insert(Waiting { is_retry: true, ..waiting(7, "d", 5, 1) });
        list.insert(Waiting { file: FileId([6; 16]), first_row: 7, ..waiting(8, "d", 5, 1) });
        assert_eq!(first_turns(&mut list, false, 9), [4, 6, 3], "4 is not due, 8 is held");
        assert_eq!(first_turns(&mut list, true, 9).first(), Some(&7));
        list.insert(Waiting { priority: Priority::Urgent, file: FileId([9; 16]), ..waiting(9, "d", 50, 1) });
        assert_eq!(first_turns(&mut list, false, 1), [9], "the most urgent");
        for number in 1..=9 {
            list.remove(waiting(number, "d", 0, 0).batch.id);
        }
        assert!(first_turns(&mut list, true, 9).is_empty() && list.turns.is_empty());
    }

    #[test]
    fn b11_a_large_file_does_not_take_the_room_of_a_small_one() {
        let mut list = WaitingList::default();
        for number in 0..6_000 {
            list.insert(waiting(number, "d", u64::from(number), 1));
        }
        let small = Waiting { file: FileId([2; 16]), ..waiting(9_000, "d", 9_000, 1) };
        list.insert(small.clone());
        assert_eq!((list.entries.len(), list.created(small.batch.id)), (DESTINATION_MAX, Some(1)));
        assert_eq!(list.next_due(|_| false), Some(UnixMs(0)), "the last of the large file has given way");
        assert_eq!(list.created(waiting(4_999, "d", 0, 0).batch.id), None);
    }

    fn due(list: &WaitingList, due_by: u64, wants: &[(&str, usize)]) -> Vec<u64> {
        let wants: Vec<_> = wants.iter().map(|(name, limit)| (Arc::from(*name), *limit)).collect();
        let query = DueQuery { process: "node-1", due_by: UnixMs(due_by), wants: &wants, confirm: &[] };
        list.due(&query, |_| false).into_iter().map(|batch| batch.due.0).collect()
    }

    #[test]
    fn of_each_destination_the_oldest_due_comes_first_and_nothing_of_the_others() {
        let mut list = WaitingList::default();
        for (number, destination, at) in [(1, "d", 30), (2, "d", 10), (3, "e", 20), (4, "d", 11), (5, "f", 1)]
        {
            list.insert(waiting(number, destination, at, u64::from(number)));
        }
        assert_eq!(due(&list, 20, &[("d", 9), ("e", 9)]), [10, 11, 20]);
        assert_eq!(due(&list, 99, &[("d", 2), ("g", 9)]), [10, 11]);
        assert_eq!(list.next_due(|_| false), Some(UnixMs(1)));
        list.remove(waiting(5, "f", 1, 5).batch.id);
        list.remove(waiting(2, "d", 10, 2).batch.id);
        assert_eq!((list.next_due(|_| false), due(&list, 99, &[("d", 9)])), (Some(UnixMs(11)), vec![11, 30]));
    }

    /// Another process has redriven what is known here as due in an hour, and is gone.
    #[test]
    fn i9_what_began_to_wait_later_counts() {
        let mut list = WaitingList::default();
        list.insert(waiting(1, "d", 3_600, 7));
        list.insert(waiting(1, "d", 99, 6));
        assert_eq!(list.next_due(|_| false), Some(UnixMs(3_600)), "it was read before");
        list.insert(waiting(1, "d", 10, 8));
        assert_eq!((list.next_due(|_| false), due(&list, 99, &[("d", 9)])), (Some(UnixMs(10)), vec![10]));
        let id = waiting(1, "d", 0, 0).batch.id;
        list.remove_until(id, 7);
        assert_eq!(list.created(id), Some(8), "a late answer tells of the time before");
        list.remove_until(id, 8);
        assert_eq!((list.created(id), list.next_due(|_| false), list.places.len()), (None, None, 0));
    }

    #[test]
    fn what_others_would_look_at_is_kept() {
        let mut list = WaitingList::default();
        for number in 1..=3 {
            list.insert(waiting(number, "d", 10 * u64::from(number), 1));
        }
        let keep = |list: &WaitingList, now| -> Vec<u64> {
            list.to_be_kept(UnixMs(now), 2).into_iter().map(|waiting| waiting.batch.due.0).collect()
        };
        assert_eq!((keep(&list, 14), keep(&list, 99)), (vec![], vec![10, 20]));
        let first = waiting(1, "d", 10, 1).batch.id;
        list.kept(first, 2, UnixMs(200));
        assert_eq!(keep(&list, 99), [10, 20], "that was another time");
        list.kept(first, 1, UnixMs(200));
        assert_eq!(keep(&list, 99), [20, 30]);
        list.remove(first);
        assert_eq!((keep(&list, 999), list.looks.len()), (vec![20, 30], 2));
    }

    #[test]
    fn i8_one_destination_does_not_take_the_room_of_the_others() {
        let mut list = WaitingList::default();
        for number in 0..=DESTINATION_MAX as u16 {
            list.insert(waiting(number, "d", 1, 1));
        }
        list.insert(waiting(u16::MAX, "e", 1, 1));
        assert_eq!(due(&list, 9, &[("d", usize::MAX)]).len(), DESTINATION_MAX);
        assert_eq!(due(&list, 9, &[("e", 9)]).len(), 1);
        for number in DESTINATION_MAX as u16 + 1..50_000 {
            list.insert(waiting(number, &format!("d{}", number % 50), 1, 1));
        }
        assert_eq!(list.entries.len(), ENTRIES_MAX);
    }
}
