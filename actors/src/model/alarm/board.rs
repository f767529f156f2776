//! Every alarm of a process: each kind is watched for each of its subjects by itself, so that a second destination that fails
//! is not hidden by the first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::{Alarm, AlarmEvent, AlarmKind, AlarmRule, Reading};
use crate::model::time::{MonoMs, UnixMs};

/// Subjects of one kind that are watched each by itself: a metric has a series for each. Of the others the worst counts.
pub const SUBJECTS_MAX: usize = 32;

/// The subject of all beyond those.
pub const OTHERS: &str = "others";

/// How a subject stands now.
#[derive(Clone, Debug, PartialEq)]
pub struct Watched {
    /// What is watched.
    pub kind: AlarmKind,
    /// The destination, the feed, or `FEED: FILE`; empty where it is about all.
    pub subject: String,
    /// How bad it is.
    pub reading: Reading,
    /// What is wrong, for the operator; may be empty where the reading says it.
    pub cause: String,
}

/// Alarms that were cleared and are remembered.
pub const CLEARED_MAX: usize = 100;

/// An alarm that is raised, or was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlarmNote {
    /// Its kind, as operators see it.
    pub alarm: String,
    /// See [`Watched::subject`].
    pub subject: String,
    /// `warning` or `critical`.
    pub severity: String,
    /// When it was raised.
    pub since: UnixMs,
    /// The reading that raised it; `None` if that was not known.
    pub value: Option<f64>,
    /// Readings above this are too high.
    pub threshold: f64,
    /// What both are in.
    pub unit: String,
    /// What is wrong, as it was said last.
    pub cause: String,
    /// What to do.
    pub remedy: String,
    /// When it was cleared, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cleared: Option<UnixMs>,
}

/// What commands and the page are shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AlarmNotes {
    /// Those that are raised, by kind and subject.
    pub raised: Vec<AlarmNote>,
    /// Those that were cleared last, the latest first.
    pub cleared: Vec<AlarmNote>,
}

/// What has become of an alarm.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its kind.
    pub kind: AlarmKind,
    /// Whether it was raised, with that reading, or cleared.
    pub event: AlarmEvent,
    /// What was said of it; where it is cleared, last.
    pub alarm: AlarmNote,
}

#[derive(Clone, Debug)]
struct Entry {
    alarm: Alarm,
    raised: Option<AlarmNote>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct AlarmBoard {
    rules: [AlarmRule; AlarmKind::ALL.len()],
    entries: BTreeMap<(AlarmKind, String), Entry>,
    cleared: VecDeque<AlarmNote>,
}

impl AlarmBoard {
    /// Nothing is raised. The rules are in the order of [`AlarmKind::ALL`].
    pub fn new(rules: [AlarmRule; AlarmKind::ALL.len()]) -> Self {
        Self { rules, entries: BTreeMap::new(), cleared: VecDeque::new() }
    }

    /// Other rules from now on; what is raised stays so until its new rule clears it.
    pub fn set_rules(&mut self, rules: [AlarmRule; AlarmKind::ALL.len()]) {
        self.rules = rules;
        for ((kind, _), entry) in &mut self.entries {
            entry.alarm.set_rule(self.rules[*kind as usize]);
        }
    }

    /// Takes all that is watched at `now`, which is `wall` for operators. What is not watched any more reads 0. What has
    /// changed.
    pub fn look(&mut self, now: MonoMs, wall: UnixMs, watched: Vec<Watched>) -> Vec<Change> {
        let watched = self.bounded(watched);
        let is_watched: BTreeSet<_> = watched.iter().map(|one| (one.kind, one.subject.clone())).collect();
        let gone = self.entries.keys().filter(|key| !is_watched.contains(key));
        let gone = gone.map(|(kind, subject)| Watched {
            kind: *kind,
            subject: subject.clone(),
            reading: Some(0.0),
            cause: String::new(),
        });
        let mut all: Vec<_> = gone.chain(watched).collect();
        all.sort_by(|left, right| (left.kind, &left.subject).cmp(&(right.kind, &right.subject)));
        let changes = all.into_iter().filter_map(|one| self.look_at(now, wall, one)).collect();
        // An alarm that is not raised and has nothing to wait for is as good as a new one.
        self.entries.retain(|_, entry| entry.alarm != Alarm::new(*entry.alarm.rule()));
        changes
    }

    fn look_at(&mut self, now: MonoMs, wall: UnixMs, watched: Watched) -> Option<Change> {
        let Watched { kind, subject, reading, cause } = watched;
        let rule = self.rules[kind as usize];
        let new = || Entry { alarm: Alarm::new(rule), raised: None };
        let entry = self.entries.entry((kind, subject.clone())).or_insert_with(new);
        let event = entry.alarm.look(now, reading);
        if let Some(raised) = entry.raised.as_mut().filter(|_| !cause.is_empty()) {
            raised.cause.clone_from(&cause);
        }
        let event = event?;
        let alarm = match event {
            AlarmEvent::Raised(value) => entry
                .raised
                .insert(AlarmNote {
                    alarm: kind.as_str().to_owned(),
                    remedy: kind.remedy(&subject),
                    subject,
                    severity: kind.severity().to_owned(),
                    since: wall,
                    value,
                    threshold: rule.threshold,
                    unit: kind.unit().to_owned(),
                    cause,
                    cleared: None,
                })
                .clone(),
            AlarmEvent::Cleared(_) => {
                let note = AlarmNote { cleared: Some(wall), ..entry.raised.take()? };
                self.cleared.truncate(CLEARED_MAX - 1);
                self.cleared.push_front(note.clone());
                note
            }
        };
        Some(Change { kind, event, alarm })
    }

    /// Not more than so many subjects of a kind: those that are raised or about to be, then the worst.
    fn bounded(&self, watched: Vec<Watched>) -> Vec<Watched> {
        let mut kinds: BTreeMap<AlarmKind, Vec<Watched>> = BTreeMap::new();
        for one in watched {
            kinds.entry(one.kind).or_default().push(one);
        }
        let mut all = Vec::new();
        for (kind, mut of_kind) in kinds {
            if of_kind.len() > SUBJECTS_MAX {
                let is_known = |one: &Watched| self.entries.contains_key(&(kind, one.subject.clone()));
                let height = |one: &Watched| one.reading.unwrap_or(f64::INFINITY);
                of_kind.sort_by(|left, right| {
                    let known = is_known(right).cmp(&is_known(left));
                    known.then(height(right).total_cmp(&height(left)))
                });
                let others = of_kind.split_off(SUBJECTS_MAX);
                let worst = others.iter().max_by(|left, right| height(left).total_cmp(&height(right)));
                let reading = worst.and_then(|one| one.reading);
                let cause = format!("{} more", others.len());
                of_kind.push(Watched { kind, subject: OTHERS.into(), reading, cause });
            }
            all.append(&mut of_kind);
        }
        all
    }

    /// Those that are raised, by kind and subject.
    pub fn raised(&self) -> Vec<AlarmNote> {
        self.entries.values().filter_map(|entry| entry.raised.clone()).collect()
    }

    /// What is raised, and what was.
    pub fn notes(&self) -> AlarmNotes {
        AlarmNotes { raised: self.raised(), cleared: self.cleared.iter().cloned().collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const AT: UnixMs = UnixMs(1_000_000);

    fn board() -> AlarmBoard {
        let rule = AlarmRule {
            threshold: 10.0,
            clear_at: 5.0,
            raise_after: Duration::ZERO,
            clear_after: Duration::from_secs(2),
        };
        AlarmBoard::new([rule; AlarmKind::ALL.len()])
    }

    fn watched(subject: &str, reading: f64) -> Watched {
        Watched {
            kind: AlarmKind::Breaker,
            subject: subject.into(),
            reading: Some(reading),
            cause: format!("{reading} at {subject}"),
        }
    }

    fn look(board: &mut AlarmBoard, second: u64, all: &[(&str, f64)]) -> Vec<(bool, String)> {
        let all = all.iter().map(|(subject, reading)| watched(subject, *reading)).collect();
        let changes = board.look(MonoMs(second * 1000), UnixMs(AT.0 + second * 1000), all);
        let is_raised = |change: &Change| matches!(change.event, AlarmEvent::Raised(_));
        changes.iter().map(|change| (is_raised(change), change.alarm.subject.clone())).collect()
    }

    fn subjects(board: &AlarmBoard) -> Vec<String> {
        board.raised().into_iter().map(|raised| raised.subject).collect()
    }

    #[test]
    fn each_subject_is_raised_and_cleared_by_itself_and_once() {
        let mut board = board();
        assert_eq!(look(&mut board, 0, &[("a", 11.0), ("b", 9.0)]), [(true, "a".into())]);
        assert_eq!(look(&mut board, 1, &[("a", 8.0), ("b", 12.0)]), [(true, "b".into())]);
        assert_eq!(look(&mut board, 2, &[("a", 8.0), ("b", 12.0)]), []);
        let raised = &board.raised()[0];
        assert_eq!((raised.since, raised.value, &*raised.cause), (AT, Some(11.0), "8 at a"));
        assert!(!raised.remedy.is_empty());
        // What is not watched any more reads 0, and takes its time like any other.
        assert_eq!(look(&mut board, 3, &[("a", 1.0)]), []);
        assert_eq!(look(&mut board, 5, &[("a", 1.0)]), [(false, "a".into()), (false, "b".into())]);
        assert!(board.raised().is_empty() && board.entries.is_empty(), "nothing is kept of it");
        let cleared: Vec<_> =
            board.notes().cleared.into_iter().map(|note| (note.subject, note.cleared)).collect();
        let at = Some(UnixMs(AT.0 + 5_000));
        assert_eq!(
            cleared,
            [("b".to_owned(), at), ("a".to_owned(), at)],
            "but in the list of those that were"
        );
    }

    #[test]
    fn a_cleared_alarm_says_what_was_said_last() {
        let mut board = board();
        look(&mut board, 0, &[("a", 11.0)]);
        look(&mut board, 1, &[("a", 12.0)]);
        look(&mut board, 2, &[]);
        let changes = board.look(MonoMs(4_000), AT, Vec::new());
        assert_eq!(changes.len(), 1);
        assert_eq!((changes[0].event, &*changes[0].alarm.cause), (AlarmEvent::Cleared(0.0), "12 at a"));
    }

    #[test]
    fn new_rules_keep_what_is_raised() {
        let mut board = board();
        look(&mut board, 0, &[("a", 11.0)]);
        let rule = AlarmRule { threshold: 100.0, clear_at: 10.0, ..board.rules[0] };
        board.set_rules([rule; AlarmKind::ALL.len()]);
        assert_eq!(look(&mut board, 1, &[("a", 20.0), ("b", 20.0)]), []);
        assert_eq!(subjects(&board), ["a"]);
    }

    #[test]
    fn subjects_are_bounded_and_what_is_raised_stays_by_name() {
        let mut board = board();
        look(&mut board, 0, &[("first", 11.0)]);
        let names: Vec<_> = (0..100).map(|nth| format!("s{nth:02}")).collect();
        let mut all: Vec<_> = names.iter().map(|name| (name.as_str(), 20.0)).collect();
        all.push(("first", 11.0));
        assert_eq!(look(&mut board, 1, &all).len(), SUBJECTS_MAX, "31 by name, and the others");
        let raised = board.raised();
        assert_eq!(raised.len(), SUBJECTS_MAX + 1);
        assert!(raised.iter().any(|raised| raised.subject == "first"));
        let others = raised.iter().find(|raised| raised.subject == OTHERS).unwrap();
        assert_eq!(others.cause, "69 more");
        assert!(board.entries.len() <= SUBJECTS_MAX + 1);
    }

    #[test]
    fn i8_of_cleared_alarms_the_last_are_remembered() {
        let mut board = board();
        for nth in 0..2 * CLEARED_MAX as u64 {
            look(&mut board, nth * 10, &[("a", 11.0)]);
            look(&mut board, nth * 10 + 1, &[]);
            assert_eq!(look(&mut board, nth * 10 + 4, &[]), [(false, "a".into())]);
        }
        let cleared = board.notes().cleared;
        assert_eq!(cleared.len(), CLEARED_MAX);
        let last = UnixMs(AT.0 + (2 * CLEARED_MAX as u64 - 1) * 10_000);
        assert_eq!(cleared[0].since, last, "the latest first");
    }

    proptest! {
        /// Each subject's history is that of an alarm of its own.
        #[test]
        fn subjects_do_not_disturb_each_other(
            readings in prop::collection::vec(prop::collection::vec(prop::option::of(0.0f64..20.0), 3), 1..60),
        ) {
            let mut board = board();
            let mut alone = [Alarm::new(board.rules[0]); 3];
            for (second, readings) in readings.iter().enumerate() {
                let now = MonoMs(second as u64 * 1000);
                let of = |nth: usize| Watched {
                    kind: AlarmKind::Breaker,
                    subject: nth.to_string(),
                    reading: readings[nth],
                    cause: String::new(),
                };
                let changes = board.look(now, AT, (0..3).map(of).collect());
                let expected = alone.iter_mut().zip(readings).filter_map(|(alarm, reading)| alarm.look(now, *reading));
                prop_assert_eq!(changes.iter().map(|change| change.event).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
                prop_assert_eq!(board.raised().len(), alone.iter().filter(|alarm| alarm.is_active()).count());
            }
        }
    }
}
