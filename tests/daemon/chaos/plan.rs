//! What happens, and when: pure, from a seed, so that a failure can be had again.

use std::{ops::Range, time::Duration};

use crate::crash::Random;

/// Something that happens to the daemon or its surroundings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Event {
    /// `kill -9`.
    Kill,
    /// SIGTERM, as by `systemctl restart`.
    Terminate,
    /// SIGHUP, with these settings.
    Reload(Settings),
    /// A disk has neither a byte nor a name left.
    Fill(Disk),
    Free(Disk),
    /// The wall clock is set: so many seconds off the real one.
    Wall(i64),
    Receiver(Manner),
    /// The daemon may open so many files beside those that it has open; `None`: as many as it likes.
    Descriptors(Option<u64>),
    Drop(Dropping),
    /// A file that nobody may read can be read from now on.
    Unlock(usize),
    /// A file that was dropped is removed, if it is still there.
    Vanish(usize),
}

/// What a reload changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Settings {
    pub(super) concurrency: i64,
    pub(super) rate_per_s: i64,
    pub(super) paused: bool,
    pub(super) deliveries: i64,
    pub(super) parsers: i64,
    pub(super) batch: i64,
}

impl Settings {
    /// Those of the start and of the end. None has a wider window of repeats (I6).
    pub(super) const USUAL: Self =
        Self { concurrency: 8, rate_per_s: 0, paused: false, deliveries: 2, parsers: 2, batch: 50 };
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Disk {
    /// Of one feed alone, whose files have to be copied.
    Feed,
    /// Of the state and of the other feeds.
    State,
}

/// How the receiver does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Manner {
    Well,
    /// It answers so many per cent with 503.
    Fails(u64),
    /// It takes connections and requests, and answers nothing.
    Hangs,
    /// Its connections are reset, and there is no other.
    Away,
}

/// A file that is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Dropping {
    pub(super) number: usize,
    pub(super) feed: &'static str,
    pub(super) rows: usize,
    pub(super) sort: Sort,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sort {
    Good,
    /// Some of its rows are bad.
    BadRows,
    /// The bytes of an earlier good one.
    Again(usize),
    /// Compressed, and cut off.
    CutOff,
    /// Without the column that it needs.
    NoColumn,
    /// It can't be read for a while.
    Locked,
    /// Removed soon after the drop.
    Vanishing,
    /// Removed as soon as it is claimed.
    Lost,
}

/// The feeds; the last one has a disk of its own.
pub(super) const FEEDS: [&str; 3] = ["alerts", "news", "apart"];

struct Planner {
    random: Random,
    end_ms: u64,
    events: Vec<(Duration, Event)>,
}

impl Planner {
    fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.random.below(range.end - range.start)
    }

    fn add(&mut self, at_ms: u64, event: Event) {
        self.events.push((Duration::from_millis(at_ms.min(self.end_ms)), event));
    }

    /// Again and again something that takes no time.
    fn strokes(&mut self, gap_ms: Range<u64>, mut stroke: impl FnMut(&mut Self, u64)) {
        let mut at = self.within(0..gap_ms.end);
        while at < self.end_ms {
            stroke(self, at);
            at += self.within(gap_ms.clone());
        }
    }

    /// Again and again something that passes, at the latest at the end.
    fn spells(
        &mut self,
        gap_ms: Range<u64>,
        length_ms: Range<u64>,
        after: Event,
        mut spell: impl FnMut(&mut Random) -> Event,
    ) {
        let mut at = self.within(0..gap_ms.end);
        while at < self.end_ms {
            let event = spell(&mut self.random);
            self.add(at, event);
            at += self.within(length_ms.clone());
            self.add(at, after);
            at += self.within(gap_ms.clone());
        }
    }

    fn drops(&mut self) {
        let mut number = 0;
        let mut good: Vec<Dropping> = Vec::new();
        self.strokes(300..2_000, |planner, at| {
            let random = &mut planner.random;
            let feed = FEEDS[random.below(FEEDS.len() as u64) as usize];
            let many = if random.below(20) == 0 { 1_000 } else { 120 };
            let rows = 1 + random.below(many) as usize;
            let earlier: Vec<_> = good.iter().filter(|earlier| earlier.feed == feed).collect();
            let sort = match random.below(16) {
                0 | 1 => Sort::BadRows,
                2 | 3 if !earlier.is_empty() => {
                    Sort::Again(earlier[random.below(earlier.len() as u64) as usize].number)
                }
                4 => Sort::CutOff,
                5 => Sort::NoColumn,
                6 => Sort::Locked,
                7 => Sort::Vanishing,
                8 => Sort::Lost,
                _ => Sort::Good,
            };
            let dropping = Dropping { number, feed, rows, sort };
            planner.add(at, Event::Drop(dropping));
            match sort {
                Sort::Good => good.push(dropping),
                Sort::Locked => {
                    let until = at + planner.within(500..5_000);
                    planner.add(until, Event::Unlock(number));
                }
                Sort::Vanishing => {
                    let until = at + planner.within(0..700);
                    planner.add(until, Event::Vanish(number));
                }
                _ => {}
            }
            number += 1;
        });
    }
}

/// Everything at once, for so long. Whatever began has passed at the end.
pub(super) fn plan(seed: u64, length: Duration) -> Vec<(Duration, Event)> {
    let end_ms = u64::try_from(length.as_millis()).expect("a test ends");
    let mut planner = Planner { random: Random(seed), end_ms, events: Vec::new() };
    planner.strokes(1_500..6_000, |planner, at| {
        let event = if planner.random.below(5) < 3 { Event::Kill } else { Event::Terminate };
        planner.add(at, event);
    });
    planner.strokes(1_000..5_000, |planner, at| {
        let below = |planner: &mut Planner, limit| i64::try_from(planner.random.below(limit)).expect("few");
        let settings = Settings {
            concurrency: 1 + below(planner, Settings::USUAL.concurrency as u64),
            rate_per_s: [0, 0, 50, 300][below(planner, 4) as usize],
            paused: below(planner, 5) == 0,
            deliveries: 1 + below(planner, 3),
            parsers: 1 + below(planner, 3),
            batch: 10 + below(planner, 90),
        };
        planner.add(at, Event::Reload(settings));
    });
    for disk in [Disk::State, Disk::Feed] {
        planner.spells(2_000..8_000, 300..3_000, Event::Free(disk), |_| Event::Fill(disk));
    }
    planner.spells(2_000..8_000, 1_000..6_000, Event::Wall(0), |random| {
        let steps = [90, 3_600, 93_600];
        let seconds = steps[random.below(steps.len() as u64) as usize];
        Event::Wall(if random.below(2) == 0 { seconds } else { -seconds })
    });
    planner.spells(1_500..6_000, 500..4_000, Event::Receiver(Manner::Well), |random| {
        Event::Receiver(match random.below(4) {
            0 => Manner::Hangs,
            1 => Manner::Away,
            2 => Manner::Fails(100),
            _ => Manner::Fails(10 + random.below(80)),
        })
    });
    planner.spells(2_000..8_000, 500..3_000, Event::Descriptors(None), |random| {
        Event::Descriptors(Some(random.below(12)))
    });
    planner.drops();
    planner.events.sort_by_key(|(at, _)| *at);
    planner.events
}

#[test]
fn a_seed_is_a_plan_and_what_begins_passes() {
    let length = Duration::from_secs(20);
    for seed in 0..200 {
        let events = plan(seed, length);
        assert_eq!(events, plan(seed, length));
        assert_ne!(events, plan(seed + 1, length));
        assert!(events.iter().all(|(at, _)| *at <= length));
        let last =
            |is_it: fn(&Event) -> bool| events.iter().rfind(|(_, event)| is_it(event)).map(|found| found.1);
        let disk = |is_it| last(is_it).expect("eight seconds are the longest gap");
        assert_eq!(
            disk(|event| matches!(event, Event::Fill(Disk::State) | Event::Free(Disk::State))),
            Event::Free(Disk::State)
        );
        assert_eq!(
            disk(|event| matches!(event, Event::Fill(Disk::Feed) | Event::Free(Disk::Feed))),
            Event::Free(Disk::Feed)
        );
        assert_eq!(last(|event| matches!(event, Event::Wall(_))), Some(Event::Wall(0)));
        assert_eq!(last(|event| matches!(event, Event::Receiver(_))), Some(Event::Receiver(Manner::Well)));
        assert_eq!(last(|event| matches!(event, Event::Descriptors(_))), Some(Event::Descriptors(None)));
        assert!(events.iter().any(|(_, event)| matches!(event, Event::Kill | Event::Terminate)));
    }
}
