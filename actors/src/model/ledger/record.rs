//! What is recorded of a batch, and what can be read off it.

use std::collections::BTreeMap;

use crate::model::{
    batch::StateVector,
    outcome::{Attempt, DeathCause},
    state::MessageState,
    time::UnixMs,
};

/// Milliseconds by the clock that a store's leases go by: the monotonic one within a process, the wall among
/// several machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deadline(pub u64);

/// Who has a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// One name per worker and generation, unique among all processes that share the store.
    pub name: String,
    /// Until then, unless extended.
    pub until: Deadline,
}

/// The row numbers of a batch's messages, in order (B1). Most batches have no gaps and cost two numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowNumbers {
    /// All rows from `first` on.
    Whole {
        /// The first message's row.
        first: u64,
        /// How many messages.
        count: u32,
    },
    /// Rows with gaps between them: some were rejected, or are duplicates.
    Gaps(Vec<u64>),
}

impl RowNumbers {
    /// The numbers as they are, which ascend; at least one.
    pub fn of(numbers: Vec<u64>) -> Self {
        match numbers[..] {
            [first, .., last] | [first @ last] if last - first + 1 == numbers.len() as u64 => {
                Self::Whole { first, count: numbers.len() as u32 }
            }
            _ => Self::Gaps(numbers),
        }
    }

    /// How many messages.
    pub fn len(&self) -> usize {
        match self {
            Self::Whole { count, .. } => *count as usize,
            Self::Gaps(rows) => rows.len(),
        }
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row of the message at `index`, which must be one of the batch.
    pub fn row(&self, index: usize) -> u64 {
        match self {
            Self::Whole { first, .. } => first + index as u64,
            Self::Gaps(rows) => rows[index],
        }
    }

    /// The index of the message of `row`.
    pub fn find(&self, row: u64) -> Option<usize> {
        match self {
            Self::Whole { first, count } => {
                row.checked_sub(*first).filter(|index| *index < u64::from(*count)).map(|index| index as usize)
            }
            Self::Gaps(rows) => rows.binary_search(&row).ok(),
        }
    }
}

/// The 2xx that a message was answered with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// The HTTP status.
    pub status: u16,
    /// When the answer came, in milliseconds after the batch was accepted; 0 for a clock that was set back.
    pub after_ms: u64,
}

/// Why and how a message was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Its last attempt.
    pub attempt: Attempt,
    /// Why there is no other.
    pub cause: DeathCause,
    /// What the destination itself said of it: a table's words, the first line of a receiver's answer.
    pub detail: Option<Box<str>>,
}

/// What only some messages need (B1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exception {
    /// No attempt before then; 0 if it has no due time of its own.
    pub not_before: UnixMs,
    /// The round of delivery: 0, +1 at each redrive.
    pub drive: u32,
    /// When it was last redriven.
    pub redriven_at: Option<UnixMs>,
    /// While it is dead.
    pub death: Option<Death>,
    /// Deaths of the process in which it was in flight, since it was last recorded (B17) …
    pub losses: u8,
    /// … and those of them in which it alone was.
    pub losses_alone: u8,
}

impl Exception {
    /// Whether there is nothing to say.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// When the bodies of a batch's messages were made anew last; the default: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The batch's latest lease by then.
    pub fence: u64,
    /// When.
    pub at: UnixMs,
}

/// What is recorded of a batch for its whole life. Its payload, row numbers, file and destination never change and
/// are the store's to keep beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// When its rows were accepted. Never changed: times of sending are offsets to it, and ages run from it.
    pub accepted_at: UnixMs,
    /// When a message may be tried that has no due time of its own.
    pub not_before: UnixMs,
    /// Which lease of it is the latest; grows with every one.
    pub fence: u64,
    /// Who has it, while it is leased.
    pub holder: Option<Holder>,
    /// Leases in a row that were lost without progress and without evidence of what was in flight (B17). See
    /// `model::suspect`.
    pub losses: u8,
    /// When an operator had the bodies of its messages made anew last.
    pub rendered: Rendered,
    /// The message that was begun by itself after two such losses, and is not recorded yet (B17).
    pub begun: Option<u32>,
    /// The state of each message.
    pub states: StateVector,
    /// Attempts of each message in its current drive, at most 255.
    pub tries: Vec<u8>,
    /// The 2xx of each message whose state says that it was sent, 0 for the others; empty while none was.
    pub sent: Vec<Sent>,
    /// What only some messages need, by index.
    pub exceptions: BTreeMap<u32, Exception>,
}

/// The state of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Its state.
    pub state: MessageState,
    /// When its row was accepted, or last redriven.
    pub accepted_at: UnixMs,
    /// How often it was redriven.
    pub drive: u32,
    /// Attempts in this drive.
    pub tries: u32,
    /// The HTTP status and time of the 2xx, if it was sent.
    pub sent: Option<(u16, UnixMs)>,
    /// Why it was given up, if it was.
    pub death: Option<Death>,
    /// When the next attempt may be made, if there will be one.
    pub not_before: Option<UnixMs>,
    /// When its body was made anew, if it was.
    pub rendered_at: Option<UnixMs>,
}

impl Record {
    /// Of a batch that is new.
    pub fn new(count: u32, accepted_at: UnixMs, not_before: UnixMs) -> Self {
        Self {
            accepted_at,
            not_before,
            fence: 0,
            holder: None,
            losses: 0,
            rendered: Rendered::default(),
            begun: None,
            states: StateVector::accepted(count),
            tries: vec![0; count as usize],
            sent: Vec::new(),
            exceptions: BTreeMap::new(),
        }
    }

    /// How many messages.
    pub fn len(&self) -> usize {
        self.states.0.len()
    }

    /// Whether it has none; no batch is so.
    pub fn is_empty(&self) -> bool {
        self.states.0.is_empty()
    }

    /// The indexes of the messages that still need delivery.
    pub fn open(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).filter(|&index| self.states.get(index).is_open())
    }

    /// How many messages still need delivery.
    pub fn open_count(&self) -> u32 {
        self.open().count() as u32
    }

    /// Whether nothing is left to do for it (B6: judged from the record, never from a worker's view).
    pub fn is_settled(&self) -> bool {
        self.open().next().is_none()
    }

    /// Whether a message of it is dead, so that a redrive would need its payload.
    pub fn has_dead(&self) -> bool {
        self.states.0.contains(&(MessageState::Dead as u8))
    }

    /// Whether an open message of it has been tried or redriven: its place is the lane of retries (B11).
    pub fn is_retry(&self) -> bool {
        self.open().any(|index| self.states.get(index) == MessageState::Retrying)
    }

    /// When the open message at `index` may be tried.
    pub fn due_of(&self, index: usize) -> UnixMs {
        let own = self.exceptions.get(&(index as u32)).map_or(UnixMs(0), |exception| exception.not_before);
        own.max(self.not_before)
    }

    /// When its first open message may be tried; `None` if none is open.
    pub fn due(&self) -> Option<UnixMs> {
        let own = |(index, exception): (&u32, &Exception)| {
            self.states.get(*index as usize).is_open().then_some(exception.not_before)
        };
        // Most messages have no due time of their own; then nothing is earlier than the batch's.
        let (with_own, first) = self
            .exceptions
            .iter()
            .filter_map(own)
            .fold((0, UnixMs(u64::MAX)), |(count, first), not_before| (count + 1, first.min(not_before)));
        match self.open_count() {
            0 => None,
            open if open > with_own => Some(self.not_before),
            _ => Some(first.max(self.not_before)),
        }
    }

    /// Makes due at `now` what would have to wait until after `latest`: no wait is as long, so it was set by a clock that
    /// was ahead (F9). Whether there was any.
    pub fn cut_waits(&mut self, latest: UnixMs, now: UnixMs) -> bool {
        let own = self.exceptions.values_mut().map(|exception| {
            // A suspect's has nothing to do with the destination's schedule.
            let latest = latest.max(now.after(exception.suspect_wait()));
            (&mut exception.not_before, latest)
        });
        let late = own.chain([(&mut self.not_before, latest)]);
        let late = late.filter(|(not_before, latest)| **not_before > *latest);
        late.map(|(not_before, _)| *not_before = now).count() > 0
    }

    /// The drive of the message at `index`.
    pub fn drive(&self, index: usize) -> u32 {
        self.exceptions.get(&(index as u32)).map_or(0, |exception| exception.drive)
    }

    /// When the message at `index` was accepted, or last redriven: what its age counts from.
    pub fn since(&self, index: usize) -> UnixMs {
        let exception = self.exceptions.get(&(index as u32));
        exception.and_then(|exception| exception.redriven_at).unwrap_or(self.accepted_at)
    }

    /// Changes what only some messages need; what says nothing any more is dropped.
    pub(super) fn except(&mut self, index: usize, change: impl FnOnce(&mut Exception)) {
        let exception = self.exceptions.entry(index as u32).or_default();
        change(exception);
        if exception.is_empty() {
            self.exceptions.remove(&(index as u32));
        }
    }

    /// The same for a message that may need nothing; most do.
    pub(super) fn amend(&mut self, index: usize, change: impl FnOnce(&mut Exception)) {
        if self.exceptions.contains_key(&(index as u32)) {
            self.except(index, change);
        }
    }

    /// What became of the message at `index`; `None` if the batch has no such message.
    pub fn fate(&self, index: usize) -> Option<Fate> {
        let tries = *self.tries.get(index)?;
        let state = self.states.get(index);
        let sent = self.sent.get(index).filter(|_| state >= MessageState::Sent);
        Some(Fate {
            state,
            accepted_at: self.since(index),
            drive: self.drive(index),
            tries: tries.into(),
            sent: sent.map(|sent| (sent.status, UnixMs(self.accepted_at.0.saturating_add(sent.after_ms)))),
            death: self.exceptions.get(&(index as u32)).and_then(|exception| exception.death.clone()),
            not_before: state.is_open().then(|| self.due_of(index)),
            rendered_at: Some(self.rendered.at).filter(|at| *at > UnixMs(0)),
        })
    }

    /// Why its payload must be kept; `None` if it may go.
    pub fn why_kept(&self) -> Option<&'static str> {
        if !self.is_settled() {
            Some("it is not settled")
        } else if self.has_dead() {
            Some("a message of it is dead, and a redrive would need its payload")
        } else {
            None
        }
    }
}
