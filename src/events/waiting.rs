//! Events that have not left yet: few, in order, and no more than one raise of the same alarm per minute, however often it
//! changes its mind.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use postrider_actors::{
    model::{alarm::board::AlarmNote, time::MonoMs},
    sweeper::SettledFile,
};

use super::Event;

/// Alarms that wait: every alarm with every subject could be raised and cleared.
const ALARMS_MAX: usize = 1_000;

/// Files that wait: as many as settle at once where many small ones were dropped.
const FILES_MAX: usize = 10_000;

/// Between two raises of the same alarm.
const REPEAT_PAUSE: Duration = Duration::from_mins(1);

/// What there is to send.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// This.
    Event(Event),
    /// Something at that time.
    At(MonoMs),
    /// Nothing.
    Nothing,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// When each may go.
    alarms: VecDeque<(MonoMs, AlarmNote)>,
    files: VecDeque<SettledFile>,
    /// When alarms were reported as raised, by kind and subject: those of the last minute.
    raised: BTreeMap<(String, String), MonoMs>,
}

fn subject(note: &AlarmNote) -> (String, String) {
    (note.alarm.clone(), note.subject.clone())
}

impl Waiting {
    /// Takes an event. `false`: there is no room.
    pub(crate) fn push(&mut self, now: MonoMs, event: Event) -> bool {
        match event {
            Event::Alarm(note) => self.push_alarm(now, note),
            Event::Settled(file) => {
                let has_room = self.files.len() < FILES_MAX;
                if has_room {
                    self.files.push_back(file);
                }
                has_room
            }
        }
    }

    fn push_alarm(&mut self, now: MonoMs, note: AlarmNote) -> bool {
        self.raised.retain(|_, at| now.since(*at) < REPEAT_PAUSE);
        let is_raised = note.cleared.is_none();
        let is_same = |other: &AlarmNote| other.alarm == note.alarm && other.subject == note.subject;
        if let Some(at) = self.alarms.iter().rposition(|(_, other)| is_same(other)) {
            let (due, before) = &self.alarms[at];
            // Its end was not reported yet, or it is over before its repetition was: for who hears of it nothing has changed.
            let cancels = if is_raised { before.cleared.is_some() } else { *due > now };
            if cancels {
                self.alarms.remove(at);
                return true;
            }
        }
        if self.alarms.len() >= ALARMS_MAX {
            return false;
        }
        let last = self.raised.get(&subject(&note)).filter(|_| is_raised);
        self.alarms.push_back((last.map_or(now, |at| at.after(REPEAT_PAUSE)), note));
        true
    }

    /// Takes what goes first: alarms, then files.
    pub(crate) fn take(&mut self, now: MonoMs) -> Next {
        let due = self.alarms.iter().position(|(due, _)| *due <= now);
        if let Some((_, note)) = due.and_then(|at| self.alarms.remove(at)) {
            if note.cleared.is_none() {
                self.raised.insert(subject(&note), now);
            }
            return Next::Event(Event::Alarm(note));
        }
        if let Some(file) = self.files.pop_front() {
            return Next::Event(Event::Settled(file));
        }
        self.alarms.iter().map(|(due, _)| *due).min().map_or(Next::Nothing, Next::At)
    }

    /// Whether something may go now.
    pub(crate) fn is_due(&self, now: MonoMs) -> bool {
        !self.files.is_empty() || self.alarms.iter().any(|(due, _)| *due <= now)
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::time::UnixMs;
    use proptest::prelude::*;

    use super::*;

    fn note(subject: &str, is_raised: bool) -> AlarmNote {
        let [Event::Alarm(note), ..] = Event::samples() else { panic!("the first is an alarm") };
        AlarmNote { subject: subject.into(), cleared: (!is_raised).then_some(UnixMs(9)), ..note }
    }

    fn push(waiting: &mut Waiting, second: u64, subject: &str, is_raised: bool) -> bool {
        waiting.push(MonoMs(second * 1_000), Event::Alarm(note(subject, is_raised)))
    }

    /// What goes at that second.
    fn taken(waiting: &mut Waiting, second: u64) -> Vec<(String, bool)> {
        let mut taken = Vec::new();
        while let Next::Event(Event::Alarm(note)) = waiting.take(MonoMs(second * 1_000)) {
            taken.push((note.subject, note.cleared.is_none()));
        }
        taken
    }

    #[test]
    fn events_go_in_order_alarms_first() {
        let mut waiting = Waiting::default();
        let [_, _, settled] = Event::samples();
        assert!(waiting.push(MonoMs(0), settled.clone()));
        for (subject, is_raised) in [("a", true), ("b", true), ("a", false)] {
            assert!(push(&mut waiting, 0, subject, is_raised));
        }
        assert!(waiting.is_due(MonoMs(0)));
        let expected = [("a".to_owned(), true), ("b".to_owned(), true), ("a".to_owned(), false)];
        for (subject, is_raised) in expected {
            assert_eq!(waiting.take(MonoMs(0)), Next::Event(Event::Alarm(note(&subject, is_raised))));
        }
        assert_eq!(waiting.take(MonoMs(0)), Next::Event(settled));
        assert_eq!(waiting.take(MonoMs(0)), Next::Nothing);
    }

    #[test]
    fn an_alarm_that_flaps_is_reported_once_a_minute_and_as_it_stands() {
        let mut waiting = Waiting::default();
        let mut heard = Vec::new();
        for second in 0..150 {
            push(&mut waiting, second, "a", second % 2 == 0);
            heard.extend(taken(&mut waiting, second).into_iter().map(|(_, is_raised)| (second, is_raised)));
        }
        // It is raised in every even second and cleared in the next.
        assert_eq!(heard, [(0, true), (1, false), (60, true), (61, false), (120, true), (121, false)]);
        push(&mut waiting, 150, "a", true);
        assert_eq!(taken(&mut waiting, 150), []);
        assert_eq!(waiting.take(MonoMs(150_000)), Next::At(MonoMs(180_000)));
        assert_eq!(taken(&mut waiting, 180), [("a".to_owned(), true)], "it stays raised");
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut waiting = Waiting::default();
        let kept = (0..3 * ALARMS_MAX).filter(|nth| push(&mut waiting, 0, &nth.to_string(), true)).count();
        assert_eq!(kept, ALARMS_MAX);
        let [_, _, settled] = Event::samples();
        let kept = (0..2 * FILES_MAX).filter(|_| waiting.push(MonoMs(0), settled.clone())).count();
        assert_eq!(kept, FILES_MAX);
    }

    proptest! {
        /// Whatever happens to one alarm and however slowly events leave: raises and clears take turns, and in the end what
        /// was heard is how it stands.
        #[test]
        fn what_is_heard_takes_turns_and_ends_as_it_is(changes in prop::collection::vec((0u64..90, any::<bool>()), 1..60)) {
            let mut waiting = Waiting::default();
            let (mut heard, mut now, mut is_raised) = (Vec::new(), 0, false);
            for (pause, takes) in changes {
                now += pause;
                is_raised = !is_raised;
                prop_assert!(push(&mut waiting, now, "a", is_raised));
                if takes {
                    heard.extend(taken(&mut waiting, now));
                }
            }
            heard.extend(taken(&mut waiting, now + 60));
            let expected: Vec<_> = (0..heard.len()).map(|nth| ("a".to_owned(), nth % 2 == 0)).collect();
            prop_assert_eq!(&heard, &expected);
            prop_assert_eq!(heard.last().is_some_and(|(_, is_raised)| *is_raised), is_raised);
        }
    }
}
