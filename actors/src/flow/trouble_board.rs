use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    model::{
        time::{MonoMs, UnixMs},
        trouble::{FILES_MAX, FeedTroubles, Trouble, Troubles},
    },
    ports::Clock,
};

/// How long a destination's trouble is remembered. Its workers try again every two seconds: what none of them has met
/// for so long is over.
const DESTINATION_MEMORY: Duration = Duration::from_secs(10);

/// The troubles of all feeds and destinations: what stages, and who restarts them, want an operator to see. The daemon's
/// alarms, metrics and `postrider status` are made from it. It outlives the actors.
#[derive(Clone)]
pub struct TroubleBoard {
    clock: Arc<dyn Clock>,
    all: Arc<Mutex<AllNotes>>,
}

#[derive(Default)]
struct AllNotes {
    feeds: BTreeMap<Arc<str>, Notes>,
    /// With when each was met last.
    destinations: BTreeMap<Arc<str>, (Trouble, MonoMs)>,
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
    /// Who judges canaries, of files that wait for an operator.
    Judge,
}

#[derive(Default)]
struct Notes {
    parked: BTreeMap<Speaker, Trouble>,
    held: BTreeMap<Speaker, BTreeMap<String, Trouble>>,
}

impl TroubleBoard {
    /// No trouble yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, all: Arc::default() }
    }

    /// What `speaker` says of `feed`.
    pub fn of(&self, feed: Arc<str>, speaker: Speaker) -> FeedNotes {
        FeedNotes { board: self.clone(), feed, speaker }
    }

    /// `destination` can't be sent to, because of `reason`. Whether that is news.
    pub fn meet(&self, destination: &Arc<str>, reason: impl Display) -> bool {
        let (now, at) = (self.clock.wall(), self.clock.mono());
        let mut all = self.lock();
        all.forget_destinations(at);
        let is_news = !all.destinations.contains_key(destination);
        let (trouble, met) = all.destinations.entry(destination.clone()).or_insert_with(|| (since(now), at));
        trouble.reason = reason.to_string();
        *met = at;
        is_news
    }

    /// What has troubles, with them.
    pub fn all(&self) -> Troubles {
        let now = self.clock.mono();
        let mut all = self.lock();
        all.forget_destinations(now);
        let feeds = all.feeds.iter().map(|(feed, notes)| (feed.to_string(), notes.troubles()));
        let destinations =
            all.destinations.iter().map(|(name, (trouble, _))| (name.to_string(), trouble.clone()));
        Troubles {
            feeds: feeds.filter(|(_, troubles)| !troubles.is_empty()).collect(),
            destinations: destinations.collect(),
        }
    }

    /// The files of a feed that `speaker` says are held, by name.
    pub fn held_by(&self, feed: &str, speaker: Speaker) -> BTreeSet<String> {
        let all = self.lock();
        let held = all.feeds.get(feed).and_then(|notes| notes.held.get(&speaker));
        held.into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// Forgets what these have said: they are no more, and what follows them says what it finds.
    pub fn forget(&self, speakers: &[Speaker]) {
        for notes in self.lock().feeds.values_mut() {
            notes.parked.retain(|speaker, _| !speakers.contains(speaker));
            notes.held.retain(|speaker, _| !speakers.contains(speaker));
        }
    }

    fn lock(&self) -> MutexGuard<'_, AllNotes> {
        // Notes are replaced as a whole.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AllNotes {
    fn forget_destinations(&mut self, now: MonoMs) {
        self.destinations.retain(|_, (_, met)| now.since(*met) < DESTINATION_MEMORY);
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
        let mut all = self.board.lock();
        let parked = &mut all.feeds.entry(self.feed.clone()).or_default().parked;
        let is_news = !parked.contains_key(&self.speaker);
        let trouble = parked.entry(self.speaker).or_insert_with(|| since(now));
        reason.clone_into(&mut trouble.reason);
        is_news
    }

    /// The feed takes files again, as far as this speaker knows. Whether that is news.
    pub fn resume(&self) -> bool {
        let mut all = self.board.lock();
        all.feeds.get_mut(&self.feed).is_some_and(|notes| notes.parked.remove(&self.speaker).is_some())
    }

    /// These files, and no others, are held, each for its reason.
    pub fn hold(&self, files: impl IntoIterator<Item = (String, String)>) {
        let now = self.board.clock.wall();
        let mut all = self.board.lock();
        let held = all.feeds.entry(self.feed.clone()).or_default().held.entry(self.speaker).or_default();
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
        assert!(board.all().feeds.is_empty());
        assert!(watcher.park("no directory") && supervisor.park("it panics"));
        clock.advance(Duration::from_secs(1));
        assert!(!watcher.park("still none"), "parked before");
        let trouble = |board: &TroubleBoard| board.all().feeds["a"].parked.clone();
        assert_eq!(trouble(&board), Some(Trouble { since: UnixMs(1_000), reason: "still none".into() }));
        assert!(watcher.resume() && !watcher.resume());
        assert_eq!(trouble(&board).map(|trouble| trouble.reason), Some("it panics".into()));
        assert!(supervisor.resume());
        assert_eq!(board.all(), Troubles::default());
    }

    #[test]
    fn a_destination_s_trouble_is_over_when_nobody_meets_it() {
        let clock = Arc::new(FakeClock::at(UnixMs(1_000)));
        let board = TroubleBoard::new(clock.clone());
        let name: Arc<str> = "support".into();
        assert!(board.meet(&name, "first"));
        clock.advance(DESTINATION_MEMORY / 2);
        assert!(!board.meet(&name, "second"), "known");
        clock.advance(DESTINATION_MEMORY.saturating_sub(Duration::from_millis(1)));
        let expected = Trouble { since: UnixMs(1_000), reason: "second".into() };
        assert_eq!(board.all().destinations, [("support".to_owned(), expected)].into());
        clock.advance(Duration::from_millis(1));
        assert!(board.all().destinations.is_empty());
        assert!(board.meet(&name, "again"), "news");
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
        let held = &board.all().feeds["a"].held;
        let since: Vec<_> = held.iter().map(|(name, trouble)| (name.as_str(), trouble.since.0)).collect();
        assert_eq!(since, [("x", 1_000), ("z", 2_000)]);
        assert_eq!(held["x"].reason, "other");
        assert_eq!(board.held_by("a", Speaker::Watcher), ["x".to_owned(), "z".to_owned()].into());
        assert!(
            board.held_by("a", Speaker::Judge).is_empty() && board.held_by("b", Speaker::Watcher).is_empty()
        );
        board.forget(&[Speaker::Sweeper, Speaker::Supervisor]);
        assert_eq!(board.all().feeds.len(), 1, "the watcher has said it");
        board.forget(&[Speaker::Watcher]);
        assert_eq!(board.all(), Troubles::default());
        notes.hold((0..2 * FILES_MAX).map(|n| file(&n.to_string(), "why")));
        assert_eq!(board.all().feeds["a"].held.len(), FILES_MAX);
    }
}
