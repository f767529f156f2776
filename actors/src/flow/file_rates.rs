use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use crate::model::{
    batch::BatchHeader,
    bucket::{Bucket, MICRO},
    ids::FileId,
    roster::Answer,
    terms::Rate,
    time::MonoMs,
};

/// How much of a second's messages may go at once: the tenth part, at least one.
const BURST_PART: u64 = 10;

/// The rates that feeds and files have at a destination, beside its own. They are this process's, and one for all of its
/// workers. Clones are the same one.
#[derive(Clone, Default)]
pub struct FileRates(Arc<Mutex<Known>>);

/// Those that a worker holds; the others are forgotten.
type Known = HashMap<Key, Weak<Mutex<Bucket>>>;

/// Whose rate it is, where.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    destination: String,
    of: Of,
    rate: Rate,
}

#[derive(PartialEq, Eq, Hash)]
enum Of {
    Feed(String),
    File(FileId),
}

impl fmt::Debug for FileRates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRates").finish_non_exhaustive()
    }
}

impl FileRates {
    /// The rate of the batches with this header, if they have one.
    pub fn of(&self, header: &BatchHeader, now: MonoMs) -> Option<FileRate> {
        let rate = header.terms.rate?;
        let of = if rate.of_feed { Of::Feed(header.feed.clone()) } else { Of::File(header.file) };
        let key = Key { destination: header.destination.clone(), of, rate };
        // Changed by infallible steps only.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = known.get(&key).and_then(Weak::upgrade).unwrap_or_else(|| {
            known.retain(|_, bucket| bucket.strong_count() > 0);
            let mut bucket = Bucket::empty(now);
            let per_s = u64::from(rate.per_s);
            bucket.set(per_s * 1_000, (per_s / BURST_PART).max(1) * MICRO, now);
            let bucket = Arc::new(Mutex::new(bucket));
            known.insert(key, Arc::downgrade(&bucket));
            bucket
        });
        Some(FileRate { bucket, per_s: rate.per_s })
    }
}

/// The rate of a file, or of all files of a feed, at a destination.
#[derive(Clone, Debug)]
pub struct FileRate {
    bucket: Arc<Mutex<Bucket>>,
    per_s: u32,
}

impl FileRate {
    /// Messages that it lets through in `time`.
    pub fn messages_in(&self, time: Duration) -> usize {
        usize::try_from(u64::from(self.per_s).saturating_mul(time.as_secs())).unwrap_or(usize::MAX)
    }

    /// Asks whether up to `messages` may go, as far as this lets them through; spent is what goes. Else how long it takes until
    /// one may.
    pub fn ask(
        &self,
        now: MonoMs,
        messages: usize,
        ask: impl FnOnce(usize) -> Answer,
    ) -> Result<Answer, Duration> {
        let mut bucket = self.lock();
        let mut left = *bucket;
        left.take(1, now)?;
        let more = (1..messages).take_while(|_| left.take(1, now).is_ok()).count();
        let answer = ask(1 + more);
        if let Answer::Granted(count) = answer {
            left = *bucket;
            if left.take(u32::try_from(count).unwrap_or(u32::MAX), now).is_ok() {
                *bucket = left;
            }
        }
        Ok(answer)
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // Replaced as a whole.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::testing::fixtures;

    fn header(content: u8, of_feed: bool) -> BatchHeader {
        let file = fixtures::file("feed", content, &["d"]);
        let mut header = (*fixtures::header(&file, "d")).clone();
        header.terms.rate = Some(Rate { per_s: 100, of_feed });
        header
    }

    /// How many go until `to`, asked every millisecond.
    fn passed(rate: &FileRate, from: u64, to: u64) -> usize {
        let goes = |at| (0..50).take_while(|_| rate.ask(MonoMs(at), 1, Answer::Granted).is_ok()).count();
        (from..to).map(goes).sum()
    }

    #[test]
    fn a_file_has_its_rate_to_itself_and_the_files_of_a_feed_share_theirs() {
        let rates = FileRates::default();
        let start = MonoMs(0);
        let of = |header: &BatchHeader| rates.of(header, start).unwrap();
        let (first, second) = (of(&header(1, false)), of(&header(2, false)));
        assert_eq!((passed(&first, 1, 1_001), passed(&second, 1, 1_001)), (100, 100));
        let (third, fourth) = (of(&header(3, true)), of(&header(4, true)));
        assert_eq!(passed(&third, 1, 501) + passed(&fourth, 501, 1_001), 100);
        // What lay idle is no more than a tenth of a second's.
        assert_eq!(passed(&first, 9_000, 9_001), 10);
        assert!(rates.of(&fixtures::header(&fixtures::file("feed", 5, &["d"]), "d"), start).is_none());
    }

    #[test]
    fn what_does_not_go_spends_nothing_and_what_nobody_holds_is_forgotten() {
        let rates = FileRates::default();
        let rate = rates.of(&header(1, false), MonoMs(0)).unwrap();
        assert_eq!(rate.ask(MonoMs(0), 5, Answer::Granted), Err(Duration::from_millis(10)));
        for _ in 0..9 {
            assert_eq!(rate.ask(MonoMs(10), 5, |_| Answer::Refused), Ok(Answer::Refused));
        }
        assert_eq!(rate.ask(MonoMs(10), 5, Answer::Granted), Ok(Answer::Granted(1)));
        assert!(rate.ask(MonoMs(10), 5, Answer::Granted).is_err());
        assert_eq!(rate.messages_in(Duration::from_secs(10)), 1_000);
        drop(rate);
        drop(rates.of(&header(2, false), MonoMs(20)));
        assert_eq!(rates.0.lock().unwrap().len(), 1);
    }
}
