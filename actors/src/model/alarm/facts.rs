//! What a daemon knows of its own work at one moment, and which alarms that is about.

use std::time::Duration;

use super::{AlarmKind, Reading, board::Watched};

/// See the module. What is `None` is not known, which is never 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Whether open messages could be counted.
    pub is_counted: bool,
    /// By destination.
    pub destinations: Vec<DestinationFacts>,
    /// By feed.
    pub feeds: Vec<FeedFacts>,
    /// Per cent of the batches offered to the queue that it did not take, within the window.
    pub queue_failures_percent: f64,
    /// How long the batch that is due for longest has been so.
    pub overdue: Option<Duration>,
    /// Batches that can't be read, if they are counted.
    pub quarantined: u64,
    /// The fullest disk, and how many per cent of it are used.
    pub disk: Option<(String, u64)>,
    /// Files that will not be done in time, as `FEED: FILE`, each with the reason to say so.
    pub late: Vec<(String, String)>,
    /// Restarts of actors within the window, with their names.
    pub restarts: Vec<(String, u64)>,
}

/// What is known of a destination.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DestinationFacts {
    /// Its name.
    pub name: String,
    /// Messages without a final state.
    pub open: u64,
    /// The feeds whose intake waits for it.
    pub holds_up: Vec<String>,
    /// Per cent of its attempts that failed within the window.
    pub failures_percent: f64,
    /// Messages given up within the window.
    pub dead: u64,
    /// Attempts that could not begin on this machine within the window.
    pub shortages: u64,
    /// Messages whose final receipt did not come in time, within the window.
    pub receipts_overdue: u64,
    /// Why it seems to be used wrongly.
    pub suspicion: Option<String>,
    /// Why its address is not allowed.
    pub blocked: Option<String>,
    /// For how long its circuit breaker has been open.
    pub out_for: Option<Duration>,
}

/// What is known of a feed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FeedFacts {
    /// Its name.
    pub name: String,
    /// Why it takes no files.
    pub parked: Option<String>,
    /// Its files that can't be taken, read, rendered, moved away or reported, each with the reason …
    pub held: Vec<(String, String)>,
    /// … and those that wait for an operator because their canary failed.
    pub canaries: Vec<(String, String)>,
    /// Files that failed within the window.
    pub failed: u64,
    /// Files that were closed within the window and whose counts do not add up.
    pub unbalanced: u64,
}

/// What the alarms are about, whether it is bad or not. What has nothing to say is left out: it reads 0.
pub fn watched(facts: &Facts) -> Vec<Watched> {
    let mut all = Vec::new();
    let mut say = |kind, subject: &str, reading: Reading, cause: String| {
        if reading != Some(0.0) {
            all.push(Watched { kind, subject: subject.to_owned(), reading, cause });
        }
    };
    let all_of_it = "";
    if !facts.is_counted {
        say(AlarmKind::Depth, all_of_it, None, "open messages can't be counted".into());
    }
    for destination in &facts.destinations {
        let DestinationFacts { name, open, holds_up, suspicion, blocked, out_for, .. } = destination;
        let holds =
            if holds_up.is_empty() { String::new() } else { format!("holds up {}", holds_up.join(", ")) };
        if facts.is_counted {
            say(AlarmKind::Depth, name, Some(*open as f64), holds);
        }
        let mut count = |kind, count: f64| say(kind, name, Some(count), String::new());
        count(AlarmKind::Failures, destination.failures_percent);
        count(AlarmKind::Dead, destination.dead as f64);
        count(AlarmKind::Shortage, destination.shortages as f64);
        count(AlarmKind::Receipts, destination.receipts_overdue as f64);
        count(AlarmKind::Breaker, out_for.map_or(0.0, |out| out.as_secs_f64()));
        for (kind, why) in [(AlarmKind::Suspects, suspicion), (AlarmKind::Blocked, blocked)] {
            if let Some(why) = why {
                say(kind, name, Some(1.0), why.clone());
            }
        }
    }
    for feed in &facts.feeds {
        if let Some(why) = &feed.parked {
            say(AlarmKind::Feeds, &feed.name, Some(1.0), why.clone());
        }
        for (kind, files) in [(AlarmKind::Files, &feed.held), (AlarmKind::Canary, &feed.canaries)] {
            for (file, why) in files {
                say(kind, &format!("{}: {file}", feed.name), Some(1.0), why.clone());
            }
        }
        let failed = "files could not be used, or not to their end".to_owned();
        say(AlarmKind::Files, &feed.name, Some(feed.failed as f64), failed);
        let unbalanced = "rows and their states do not add up".to_owned();
        say(AlarmKind::Balance, &feed.name, Some(feed.unbalanced as f64), unbalanced);
    }
    say(AlarmKind::Failures, "queue", Some(facts.queue_failures_percent), String::new());
    say(AlarmKind::Latency, all_of_it, facts.overdue.map(|age| age.as_secs_f64()), String::new());
    say(AlarmKind::Damage, all_of_it, Some(facts.quarantined as f64), String::new());
    if let Some((path, used)) = &facts.disk {
        say(AlarmKind::Disk, path, Some(*used as f64), String::new());
    }
    for (file, why) in &facts.late {
        say(AlarmKind::Late, file, Some(1.0), why.clone());
    }
    for (actor, restarts) in &facts.restarts {
        say(AlarmKind::Restarts, actor, Some(*restarts as f64), String::new());
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn about(facts: &Facts) -> Vec<(AlarmKind, String, Reading, String)> {
        watched(facts).into_iter().map(|one| (one.kind, one.subject, one.reading, one.cause)).collect()
    }

    /// A daemon on which all is well.
    fn quiet() -> Facts {
        let destination = DestinationFacts { name: "support".into(), ..DestinationFacts::default() };
        let feed = FeedFacts { name: "alerts".into(), ..FeedFacts::default() };
        Facts {
            is_counted: true,
            destinations: vec![destination],
            feeds: vec![feed],
            overdue: Some(Duration::ZERO),
            ..Facts::default()
        }
    }

    #[test]
    fn a_daemon_on_which_all_is_well_has_nothing_to_say() {
        assert_eq!(about(&quiet()), []);
    }

    #[test]
    fn what_is_not_known_is_not_0() {
        let facts = Facts { is_counted: false, overdue: None, ..quiet() };
        let all = about(&facts);
        let kinds: Vec<_> = all.iter().map(|(kind, _, reading, _)| (*kind, *reading)).collect();
        assert_eq!(kinds, [(AlarmKind::Depth, None), (AlarmKind::Latency, None)]);
    }

    #[test]
    fn f71_a_deep_destination_says_which_feeds_it_holds_up() {
        let mut facts = quiet();
        facts.destinations[0].open = 900;
        facts.destinations[0].holds_up = vec!["a".into(), "b".into()];
        let depth = (AlarmKind::Depth, "support".to_owned(), Some(900.0), "holds up a, b".to_owned());
        assert_eq!(about(&facts), [depth]);
    }

    #[test]
    fn each_file_is_a_subject_and_says_why_it_is_held() {
        let mut facts = quiet();
        facts.feeds[0].held = vec![("a.csv".into(), "it lacks `name`".into())];
        facts.feeds[0].canaries = vec![("b.csv".into(), "31 % 404".into())];
        facts.feeds[0].failed = 2;
        let all = about(&facts);
        let expected = [
            (AlarmKind::Files, "alerts: a.csv", 1.0, "it lacks `name`"),
            (AlarmKind::Canary, "alerts: b.csv", 1.0, "31 % 404"),
            (AlarmKind::Files, "alerts", 2.0, "files could not be used, or not to their end"),
        ];
        let expected = expected
            .map(|(kind, subject, reading, why)| (kind, subject.to_owned(), Some(reading), why.to_owned()));
        assert_eq!(all, expected);
    }

    #[test]
    fn a_disk_and_a_late_file_are_subjects_too() {
        let late = vec![("alerts: a.csv".to_owned(), "done at 10:00".to_owned())];
        let facts = Facts { disk: Some(("/srv".into(), 97)), late, ..quiet() };
        let disk = (AlarmKind::Disk, "/srv".to_owned(), Some(97.0), String::new());
        let late = (AlarmKind::Late, "alerts: a.csv".to_owned(), Some(1.0), "done at 10:00".to_owned());
        assert_eq!(about(&facts), [disk, late]);
    }

    proptest! {
        /// Nothing is said of a destination that is not about one of its own facts, and each kind at most once.
        #[test]
        fn each_destination_says_each_kind_once(
            many in prop::collection::vec((0u64..3, 0u64..3, 0u64..3, any::<bool>(), any::<bool>()), 1..6),
        ) {
            let destinations = many.iter().enumerate().map(|(nth, &(open, dead, out, is_suspect, is_blocked))| {
                DestinationFacts {
                    name: nth.to_string(),
                    open,
                    dead,
                    out_for: (out > 0).then(|| Duration::from_secs(out)),
                    suspicion: is_suspect.then(|| "401".into()),
                    blocked: is_blocked.then(|| "10.0.0.1".into()),
                    ..DestinationFacts::default()
                }
            });
            let facts = Facts { destinations: destinations.collect(), ..quiet() };
            let all = about(&facts);
            let expected: usize = many.iter().map(|&(open, dead, out, is_suspect, is_blocked)| {
                [open > 0, dead > 0, out > 0, is_suspect, is_blocked].iter().filter(|bad| **bad).count()
            }).sum();
            prop_assert_eq!(all.len(), expected);
            let mut names: Vec<_> = all.iter().map(|(kind, subject, ..)| (*kind, subject.clone())).collect();
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), expected);
        }
    }
}
