use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    model::{
        time::UnixMs,
        trouble::{FILES_MAX, FeedTroubles, Trouble},
    },
    ports::Clock,
};

/// The troubles of all feeds: what the stages of a feed, and who restarts them, want an operator to see. The daemon's
/// alarms, metrics and `postrider status` are made from it. It outlives the actors.
#[derive(Clone)]
pub struct TroubleBoard {
    clock: Arc<dyn Clock>,
    feeds: Arc<Mutex<BTreeMap<Arc<str>, Notes>>>,
}

/// Who speaks of a feed's troubles. Each has notes of its own: what one takes back says nothing of the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Speaker {
    /// The file watcher.
    Watcher,
    /// The sweeper, of reports.
    Sweeper,
    /// The feed's supervisor, of restarts that don't help.
    Supervisor,
}

#[derive(Default)]
struct Notes {
    parked: BTreeMap<Speaker, Trouble>,
    held: BTreeMap<Speaker, BTreeMap<String, Trouble>>,
}

impl TroubleBoard {
    /// No trouble yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, feeds: Arc::default() }
    }

    /// What `speaker` says of `feed`.
    pub fn of(&self, feed: Arc<str>, speaker: Speaker) -> FeedNotes {
        FeedNotes { board: self.clone(), feed, speaker }
    }

    /// The feeds that have troubles, with them.
    pub fn all(&self) -> BTreeMap<Arc<str>, FeedTroubles> {
        let feeds = self.lock();
        let troubles = feeds.iter().map(|(feed, notes)| (feed.clone(), notes.troubles()));
        troubles.filter(|(_, troubles)| !troubles.is_empty()).collect()
    }

    /// Forgets what these have said: they are no more, and what follows them says what it finds.
    pub fn forget(&self, speakers: &[Speaker]) {
        for notes in self.lock().values_mut() {
            notes.parked.retain(|speaker, _| !speakers.contains(speaker));
            notes.held.retain(|speaker, _| !speakers.contains(speaker));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Notes>> {
        // Notes are replaced as a whole.
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notes {
    fn troubles(&self) -> FeedTroubles {
        let held = self.held.values().flatten();
        FeedTroubles {
            parked: self.parked.values().next().cloned(),
            held: held.map(|(name, trouble)| (name.clone(), trouble.clone())).take(FILES_MAX).collect(),
        }
    }
}

/// One speaker's notes on one feed.
#[derive(Clone)]
pub struct FeedNotes {
    board: TroubleBoard,
    feed: Arc<str>,
    speaker: Speaker,
}

impl FeedNotes {
    /// The feed.
    pub fn feed(&self) -> &Arc<str> {
        &self.feed
    }

    /// The feed takes no files, because of `reason`. Whether that is news.
    pub fn park(&self, reason: &str) -> bool {
        let now = self.board.clock.wall();
        let mut feeds = self.board.lock();
        let parked = &mut feeds.entry(self.feed.clone()).or_default().parked;
        let is_news = !parked.contains_key(&self.speaker);
        let trouble = parked.entry(self.speaker).or_insert_with(|| since(now));
        reason.clone_into(&mut trouble.reason);
        is_news
    }

    /// The feed takes files again, as far as this speaker knows. Whether that is news.
    pub fn resume(&self) -> bool {
        let mut feeds = self.board.lock();
        feeds.get_mut(&self.feed).is_some_and(|notes| notes.parked.remove(&self.speaker).is_some())
    }

    /// These files, and no others, are held, each for its reason.
    pub fn hold(&self, files: impl IntoIterator<Item = (String, String)>) {
        let now = self.board.clock.wall();
        let mut feeds = self.board.lock();
        let held = feeds.entry(self.feed.clone()).or_default().held.entry(self.speaker).or_default();
        let mut before = std::mem::take(held);
        *held = files
            .into_iter()
            .take(FILES_MAX)
            .map(|(name, reason)| {
                let since = before.remove(&name).map_or(now, |trouble| trouble.since);
                (name, Trouble { since, reason })
            })
            .collect();
    }
}

fn since(now: UnixMs) -> Trouble {
    Trouble { since: now, reason: String::new() }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::FakeClock;

    #[test]
    fn each_speaker_takes_back_what_it_said_itself() {
        let clock = Arc::new(FakeClock::at(UnixMs(1_000)));
        let board = TroubleBoard::new(clock.clone());
        let watcher = board.of("a".into(), Speaker::Watcher);
        let supervisor = board.of("a".into(), Speaker::Supervisor);
        assert!(board.all().is_empty());
        assert!(watcher.park("no directory") && supervisor.park("it panics"));
        clock.advance(Duration::from_secs(1));
        assert!(!watcher.park("still none"), "parked before");
        let trouble = |board: &TroubleBoard| board.all()["a"].parked.clone();
        assert_eq!(trouble(&board), Some(Trouble { since: UnixMs(1_000), reason: "still none".into() }));
        assert!(watcher.resume() && !watcher.resume());
        assert_eq!(trouble(&board).map(|trouble| trouble.reason), Some("it panics".into()));
        assert!(supervisor.resume());
        assert!(board.all().is_empty());
    }

    #[test]
    fn a_file_keeps_the_time_since_when_it_is_held() {
        let clock = Arc::new(FakeClock::at(UnixMs(1_000)));
        let board = TroubleBoard::new(clock.clone());
        let notes = board.of("a".into(), Speaker::Watcher);
        let file = |name: &str, reason: &str| (name.to_owned(), reason.to_owned());
        notes.hold([file("x", "why"), file("y", "why")]);
        clock.advance(Duration::from_secs(1));
        notes.hold([file("x", "other"), file("z", "why")]);
        let held = &board.all()["a"].held;
        let since: Vec<_> = held.iter().map(|(name, trouble)| (name.as_str(), trouble.since.0)).collect();
        assert_eq!(since, [("x", 1_000), ("z", 2_000)]);
        assert_eq!(held["x"].reason, "other");
        board.forget(&[Speaker::Sweeper, Speaker::Supervisor]);
        assert_eq!(board.all().len(), 1, "the watcher has said it");
        board.forget(&[Speaker::Watcher]);
        assert!(board.all().is_empty());
        notes.hold((0..2 * FILES_MAX).map(|n| file(&n.to_string(), "why")));
        assert_eq!(board.all()["a"].held.len(), FILES_MAX);
    }
}
