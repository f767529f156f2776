//! Batches of one destination that wait to be written together, and how long a table that can't take rows is
//! left alone. It knows no clock and no task.

use std::{collections::VecDeque, time::Duration};

use postrider_settings::Group;

use crate::model::{backoff::Backoff, bisect::RefusedShare, time::MonoMs};

/// Until a table that could not take rows is tried again.
const COOL: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(15));

/// Payload bytes of a group, unless one batch alone has more: a few times what a batch has by default.
const BYTES_MAX: usize = 4 << 20;

/// Batches that wait for one statement: a queue feed may make a batch of every entry.
const BATCHES_MAX: usize = 256;

#[derive(Debug)]
struct ShelvedBatch<B> {
    batch: B,
    since: MonoMs,
    rows: usize,
    bytes: usize,
    /// It is written together with nothing.
    alone: bool,
    /// Its rows are made as those of the batch before it.
    alike: bool,
}

/// What waits for one destination.
#[derive(Debug)]
pub(super) struct Shelf<B> {
    settings: Group,
    waiting: VecDeque<ShelvedBatch<B>>,
    rows: usize,
    /// Groups that are being written.
    writing: usize,
    /// Rows of the batch that came last: what the next ones are taken to have.
    usual_rows: usize,
    /// What the table refused of the last groups.
    pub(super) refused: RefusedShare,
    /// Groups in a row that the table could not take …
    failures: u32,
    /// … and until when it is left alone.
    cold_until: MonoMs,
}

impl<B> Shelf<B> {
    pub(super) fn new(settings: Group) -> Self {
        let usual_rows = settings.max_rows.max(1);
        Self {
            settings,
            waiting: VecDeque::new(),
            rows: 0,
            writing: 0,
            usual_rows,
            refused: RefusedShare::default(),
            failures: 0,
            cold_until: MonoMs(0),
        }
    }

    pub(super) fn writing(&self) -> usize {
        self.writing
    }

    /// Puts a batch behind the others. `is_alike` says whether another one's rows are made the same way.
    pub(super) fn put(
        &mut self,
        now: MonoMs,
        batch: B,
        rows: usize,
        bytes: usize,
        alone: bool,
        is_alike: impl Fn(&B) -> bool,
    ) {
        let alike = self.waiting.back().is_some_and(|last| is_alike(&last.batch));
        self.rows += rows;
        self.usual_rows = rows.max(1);
        self.waiting.push_back(ShelvedBatch { batch, since: now, rows, bytes, alone, alike });
    }

    /// Takes away what `is_gone`.
    pub(super) fn remove(&mut self, is_gone: impl Fn(&B) -> bool) -> Vec<B> {
        let mut removed = Vec::new();
        while let Some(at) = self.waiting.iter().position(|waiting| is_gone(&waiting.batch)) {
            if let Some(gone) = self.waiting.remove(at) {
                self.rows -= gone.rows;
                removed.push(gone.batch);
            }
            // Whether its successor is like its new predecessor is not known.
            if let Some(next) = self.waiting.get_mut(at) {
                next.alike = false;
            }
        }
        removed
    }

    /// Takes away everything.
    pub(super) fn clear(&mut self) -> Vec<B> {
        self.rows = 0;
        self.waiting.drain(..).map(|waiting| waiting.batch).collect()
    }

    /// One, as a probe, while the table takes nothing.
    fn writing_max(&self, concurrency: usize) -> usize {
        if self.failures > 0 { concurrency.min(1) } else { concurrency }
    }

    /// How many batches to ask for: enough for the groups that may be written next, few while the table takes
    /// nothing.
    pub(super) fn room(&self, now: MonoMs, concurrency: usize) -> usize {
        if self.failures > 0 {
            return usize::from(self.waiting.is_empty() && now >= self.cold_until);
        }
        let rows = self.settings.max_rows.saturating_mul(concurrency + 1);
        let by_rows = rows.saturating_sub(self.rows).div_ceil(self.usual_rows);
        let by_count = BATCHES_MAX.saturating_sub(self.waiting.len());
        // Refilled when half used up, so that a lease is worth its transaction.
        if self.rows > rows / 2 { 0 } else { by_rows.min(by_count) }
    }

    /// Takes the next group if it is full or its time has come, and counts it as being written.
    pub(super) fn cut(&mut self, now: MonoMs, concurrency: usize) -> Option<Vec<B>> {
        if self.writing >= self.writing_max(concurrency) || now < self.cold_until {
            return None;
        }
        let first = self.waiting.front()?;
        let (mut count, mut rows, mut bytes) = (0, 0, 0);
        let mut is_full = first.alone;
        for waiting in &self.waiting {
            rows += waiting.rows;
            bytes += waiting.bytes;
            let fits = rows <= self.settings.max_rows && bytes <= BYTES_MAX;
            if count > 0 && (!fits || waiting.alone || !waiting.alike || first.alone) {
                is_full = true;
                break;
            }
            count += 1;
        }
        is_full |= rows >= self.settings.max_rows || bytes >= BYTES_MAX;
        // Nothing more is asked for: there is nothing to wait for.
        is_full |= self.waiting.len() >= BATCHES_MAX || self.failures > 0;
        if !is_full && now.since(first.since) < self.settings.linger {
            return None;
        }
        self.writing += 1;
        let group: Vec<_> = self.waiting.drain(..count).collect();
        self.rows -= group.iter().map(|waiting| waiting.rows).sum::<usize>();
        Some(group.into_iter().map(|waiting| waiting.batch).collect())
    }

    /// When there may be a group to cut without any event; `None` if a running one has to end first.
    pub(super) fn due(&self, concurrency: usize) -> Option<MonoMs> {
        if self.writing >= self.writing_max(concurrency) {
            return None;
        }
        self.waiting.front().map(|first| first.since.after(self.settings.linger).max(self.cold_until))
    }

    /// A group has been written, or what of it could not be has been recorded. `took_rows` is `None` if no statement
    /// was made. `jitter`, in `0.0..1.0`, spreads the next attempts of several workers.
    pub(super) fn done(&mut self, now: MonoMs, took_rows: Option<bool>, jitter: f64) {
        self.writing -= 1;
        match took_rows {
            None => {}
            Some(true) => self.failures = 0,
            Some(false) => {
                self.failures = self.failures.saturating_add(1);
                let bound = COOL.bound(self.failures);
                self.cold_until = now.after(bound.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROWS_MAX: usize = 100;

    /// A thousandth of what a group may have: small numbers in what follows are of these.
    const BYTES: usize = BYTES_MAX / 1_000;

    fn shelf() -> Shelf<u32> {
        Shelf::new(Group { max_rows: ROWS_MAX, linger: Duration::from_millis(200) })
    }

    fn put(shelf: &mut Shelf<u32>, now: u64, batch: u32, rows: usize, bytes: usize) {
        shelf.put(MonoMs(now), batch, rows, bytes, false, |_| true);
    }

    #[test]
    fn s4_2_batches_wait_for_rows_bytes_or_their_time() {
        let mut shelf = shelf();
        put(&mut shelf, 0, 1, 40, 10);
        put(&mut shelf, 50, 2, 40, 10);
        assert_eq!(shelf.cut(MonoMs(199), 9), None);
        assert_eq!(shelf.due(9), Some(MonoMs(200)));
        assert_eq!(shelf.cut(MonoMs(200), 9), Some(vec![1, 2]), "by its time");
        for batch in 3..6 {
            put(&mut shelf, 300, batch, 40, 10);
        }
        assert_eq!(shelf.cut(MonoMs(300), 9), Some(vec![3, 4]), "by rows");
        put(&mut shelf, 300, 6, 1, BYTES_MAX);
        assert_eq!(shelf.cut(MonoMs(300), 9), Some(vec![5]), "by bytes");
        put(&mut shelf, 300, 7, 500, 5 * BYTES_MAX);
        assert_eq!(shelf.cut(MonoMs(300), 9), Some(vec![6]));
        assert_eq!(shelf.cut(MonoMs(300), 9), Some(vec![7]), "larger than a group by itself");
        for batch in 0..BATCHES_MAX as u32 {
            assert_eq!(shelf.cut(MonoMs(400), 9), None);
            put(&mut shelf, 400, batch, 0, 1);
        }
        assert_eq!(shelf.cut(MonoMs(400), 9).map(|group| group.len()), Some(BATCHES_MAX), "by their number");
    }

    #[test]
    fn unlike_and_suspect_batches_go_alone() {
        let mut shelf = shelf();
        put(&mut shelf, 0, 1, 1, 1);
        shelf.put(MonoMs(0), 2, 1, 1, false, |_| false);
        shelf.put(MonoMs(0), 3, 1, 1, true, |_| true);
        put(&mut shelf, 0, 4, 1, 1);
        let groups: Vec<_> = std::iter::from_fn(|| shelf.cut(MonoMs(0), 9)).collect();
        assert_eq!(groups, [vec![1], vec![2], vec![3]]);
        assert_eq!(shelf.clear(), [4]);
    }

    #[test]
    fn a_table_that_takes_nothing_is_left_alone_and_probed_by_one_group() {
        let mut shelf = shelf();
        for batch in 0..3 {
            put(&mut shelf, 0, batch, 100, 10);
        }
        assert!(shelf.cut(MonoMs(0), 2).is_some() && shelf.cut(MonoMs(0), 2).is_some());
        assert_eq!(shelf.cut(MonoMs(0), 2), None, "two at a time");
        shelf.done(MonoMs(0), Some(false), 1.0);
        assert_eq!(shelf.due(2), None, "the other one is still being written");
        shelf.done(MonoMs(0), None, 1.0);
        assert_eq!(shelf.cut(MonoMs(249), 2), None);
        assert_eq!(shelf.due(2), Some(MonoMs(250)));
        assert_eq!(shelf.cut(MonoMs(250), 2), Some(vec![2]));
        put(&mut shelf, 250, 3, 100, 10);
        assert_eq!(shelf.cut(MonoMs(250), 2), None, "one alone, until it is known to go well");
        assert_eq!(shelf.room(MonoMs(250), 2), 0);
        let mut now = 250;
        for failures in 0..40 {
            shelf.done(MonoMs(now), Some(false), 1.0);
            let due = shelf.due(2).unwrap();
            assert!(due.0 - now <= 15_000, "bounded after {failures}");
            assert_eq!(shelf.cut(MonoMs(due.0 - 1), 2), None);
            now = due.0;
            assert!(shelf.cut(MonoMs(now), 2).is_some());
            put(&mut shelf, now, 9, 100, 10);
        }
        shelf.done(MonoMs(now), Some(true), 1.0);
        put(&mut shelf, now, 9, 100, 10);
        assert!(shelf.cut(MonoMs(now), 2).is_some() && shelf.cut(MonoMs(now), 2).is_some());
    }

    proptest! {
        #[test]
        fn every_batch_leaves_once_and_in_order(sizes in prop::collection::vec((0usize..150, 0usize..1_500), 1..40)) {
            let mut shelf = shelf();
            let mut left = Vec::new();
            for (batch, (rows, bytes)) in sizes.iter().enumerate() {
                put(&mut shelf, batch as u64, batch as u32, *rows, *bytes * BYTES);
                while let Some(group) = shelf.cut(MonoMs(batch as u64), usize::MAX - 1) {
                    let rows: usize = group.iter().map(|batch| sizes[*batch as usize].0).sum();
                    prop_assert!(group.len() == 1 || rows <= ROWS_MAX);
                    left.extend(group);
                }
            }
            while let Some(group) = shelf.cut(MonoMs(10_000), usize::MAX - 1) {
                left.extend(group);
            }
            prop_assert_eq!(left, (0..sizes.len() as u32).collect::<Vec<_>>());
            prop_assert_eq!(shelf.rows, 0);
        }
    }
}
