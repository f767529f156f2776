//! Recording a worker's verdicts on messages, and what else ends them or opens them again: a cancel, a time that is over, a redrive.

use std::collections::BTreeMap;

use super::record::{Death, Record, Sent};
use crate::model::{
    outcome::{Attempt, Verdict},
    state::MessageState,
    time::UnixMs,
};

/// The most that a batch keeps of its destination's words on dead messages, in bytes: a record is written whole. What
/// has no room is left out; the reason is always there.
const DETAILS_BYTES_MAX: usize = 64 * 1024;

/// The longest words of a destination that are kept with a dead letter, in bytes; longer ones are cut.
pub const DETAIL_BYTES_MAX: usize = 500;

/// What is to be recorded of one message: it names message, drive and attempt, so that repeating it changes nothing
/// (B5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageVerdict {
    /// The message's index in the batch.
    pub index: u32,
    /// Its drive.
    pub drive: u32,
    /// Which attempt of that drive it was, from 1. A message that was given up without one has the number of the one
    /// that was not made.
    pub attempt: u32,
    /// Its verdict.
    pub verdict: Verdict,
}

/// Everything that a worker reports of one batch.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// The fence it worked under.
    pub fence: u64,
    /// New facts.
    pub verdicts: &'a [MessageVerdict],
    /// What destinations themselves said of dead messages, by index.
    pub details: &'a BTreeMap<u32, Box<str>>,
    /// The worker has nothing more to do for it: its lease ends, whatever is left.
    pub ends: bool,
    /// The message that it begins next, by itself, once that is recorded (B17).
    pub begins: Option<u32>,
}

/// What a change does to the counts of a file at a destination (B8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountChange {
    /// Messages accepted.
    pub accepted: i64,
    /// Messages sent.
    pub sent: i64,
    /// Messages given up.
    pub dead: i64,
    /// Open messages that were tried or redriven.
    pub retrying: i64,
    /// Messages whose time was over.
    pub unsent: i64,
    /// Messages cancelled.
    pub cancelled: i64,
}

impl CountChange {
    /// Of a message that goes from one state to another.
    pub fn of(before: MessageState, after: MessageState) -> Self {
        let mut change = Self::default();
        change.add_one(before, -1);
        change.add_one(after, 1);
        change
    }

    fn add_one(&mut self, state: MessageState, sign: i64) {
        match state {
            MessageState::Accepted => {}
            MessageState::Retrying => self.retrying += sign,
            MessageState::Unsent => self.unsent += sign,
            MessageState::Cancelled => self.cancelled += sign,
            MessageState::Dead => self.dead += sign,
            MessageState::Sent | MessageState::Expired | MessageState::Failed | MessageState::Delivered => {
                self.sent += sign;
            }
        }
    }

    /// How many open messages more there are.
    pub fn depth(&self) -> i64 {
        self.accepted - self.settled()
    }

    /// How many messages more need no delivery.
    pub fn settled(&self) -> i64 {
        self.sent + self.dead + self.unsent + self.cancelled
    }

    /// Whether nothing is counted differently.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for CountChange {
    fn add_assign(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.sent += other.sent;
        self.dead += other.dead;
        self.retrying += other.retrying;
        self.unsent += other.unsent;
        self.cancelled += other.cancelled;
    }
}

/// A failed attempt, for the history of a batch (B3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The message's index in the batch.
    pub index: u32,
    /// Its drive.
    pub drive: u32,
    /// Which attempt of that drive, from 1.
    pub attempt_number: u32,
    /// When and why it failed.
    pub attempt: Attempt,
}

/// What recording changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The counts of its file at its destination.
    pub counts: CountChange,
    /// Failed attempts that are new, to be appended to the batch's history.
    pub failures: Vec<Failure>,
    /// Messages that are dead now, by index; the record has their deaths.
    pub died: Vec<u32>,
    /// Messages that are dead no more.
    pub rose: Vec<u32>,
    /// When the last of what changed a state happened; `None` if no state was changed.
    pub last_at: Option<UnixMs>,
    /// Whether the lease was current: failures of another's are not recorded.
    pub was_current: bool,
}

impl Changes {
    fn note(&mut self, before: MessageState, after: MessageState, at: UnixMs) {
        self.counts += CountChange::of(before, after);
        self.last_at = self.last_at.max(Some(at));
    }
}

/// A verdict about a message that the batch does not have.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("index {index} is out of range in a batch of {messages} messages")]
pub struct Rejected {
    /// The index.
    pub index: u32,
    /// How many messages the batch has.
    pub messages: usize,
}

impl Record {
    /// Records a worker's word. Nothing is changed if it is refused.
    ///
    /// A 2xx is a fact whoever reports it, and always recorded. Failures are recorded only under the current fence,
    /// and only of the attempt that comes next in the message's current drive, so that a repetition changes nothing
    /// (B5). The lease ends when nothing is open any more, or when the worker says so.
    pub fn settle(&mut self, standing: Standing<'_>) -> Result<Changes, Rejected> {
        let messages = self.len();
        let indexes = standing.verdicts.iter().map(|message| message.index).chain(standing.begins);
        if let Some(index) = indexes.into_iter().find(|&index| index as usize >= messages) {
            return Err(Rejected { index, messages });
        }
        let was_current = self.is_current(standing.fence);
        let mut changes = Changes { was_current, ..Changes::default() };
        let mut progress = false;
        for message in standing.verdicts {
            let changed = match message.verdict {
                Verdict::Sent { at, status } => self.record_sent(message, at, status, &mut changes),
                Verdict::Retry { .. } | Verdict::Dead { .. } if !was_current => false,
                Verdict::Retry { attempt, not_before } => {
                    self.record_failure(message, attempt, &mut changes, |this, changes| {
                        this.record_retry(message.index as usize, attempt.at, not_before, changes);
                    })
                }
                Verdict::Dead { attempt, cause } => {
                    let detail = standing.details.get(&message.index).map(|detail| &**detail);
                    self.record_failure(message, attempt, &mut changes, |this, changes| {
                        let death = Death { attempt, cause, detail: None };
                        this.record_death(message.index as usize, death, detail, changes);
                    })
                }
            };
            progress |= changed;
        }
        if was_current {
            if progress {
                self.losses = 0;
                self.begun = None;
            }
            if standing.begins.is_some() {
                self.begun = standing.begins;
            }
            if standing.ends || self.is_settled() {
                self.holder = None;
                self.begun = None;
            }
        }
        Ok(changes)
    }

    fn record_sent(
        &mut self,
        message: &MessageVerdict,
        at: UnixMs,
        status: u16,
        changes: &mut Changes,
    ) -> bool {
        let index = message.index as usize;
        let before = self.states.get(index);
        if before >= MessageState::Sent {
            return false;
        }
        self.states.set(index, MessageState::Sent);
        let messages = self.len();
        if self.sent.is_empty() {
            self.sent = vec![Sent::default(); messages];
        }
        let after_ms = u64::try_from(at.since(self.accepted_at).as_millis()).unwrap_or(u64::MAX);
        self.sent[index] = Sent { status, after_ms };
        if message.drive == self.drive(index) {
            self.tries[index] = self.tries[index].max(tries(message.attempt));
        }
        if before == MessageState::Dead {
            changes.rose.push(message.index);
        }
        self.amend(index, |exception| {
            exception.not_before = UnixMs(0);
            exception.death = None;
            (exception.losses, exception.losses_alone) = (0, 0);
        });
        changes.note(before, MessageState::Sent, at);
        true
    }

    /// Records a failed attempt, if it is the one that comes next; whether it is.
    fn record_failure(
        &mut self,
        message: &MessageVerdict,
        attempt: Attempt,
        changes: &mut Changes,
        record: impl FnOnce(&mut Self, &mut Changes),
    ) -> bool {
        let index = message.index as usize;
        let is_next = self.states.get(index).is_open()
            && message.drive == self.drive(index)
            && message.attempt == u32::from(self.tries[index]) + 1;
        if !is_next {
            return false;
        }
        self.tries[index] = tries(message.attempt);
        self.amend(index, |exception| (exception.losses, exception.losses_alone) = (0, 0));
        let (index, drive, attempt_number) = (message.index, message.drive, message.attempt);
        changes.failures.push(Failure { index, drive, attempt_number, attempt });
        record(self, changes);
        true
    }

    fn record_retry(&mut self, index: usize, at: UnixMs, not_before: UnixMs, changes: &mut Changes) {
        let before = self.states.get(index);
        self.states.set(index, MessageState::Retrying);
        self.except(index, |exception| exception.not_before = not_before);
        changes.note(before, MessageState::Retrying, at);
    }

    fn record_death(&mut self, index: usize, mut death: Death, detail: Option<&str>, changes: &mut Changes) {
        let before = self.states.get(index);
        self.states.set(index, MessageState::Dead);
        if let Some(detail) = detail {
            let detail = &detail[..detail.floor_char_boundary(DETAIL_BYTES_MAX)];
            // What is there already takes no more room.
            if self.details().any(|known| known == detail)
                || self.details().map(str::len).sum::<usize>() + detail.len() <= DETAILS_BYTES_MAX
            {
                death.detail = Some(detail.into());
            }
        }
        let at = death.attempt.at;
        self.except(index, |exception| {
            exception.not_before = UnixMs(0);
            exception.death = Some(death);
        });
        changes.died.push(index as u32);
        changes.note(before, MessageState::Dead, at);
    }

    fn details(&self) -> impl Iterator<Item = &str> {
        let deaths = self.exceptions.values().filter_map(|exception| exception.death.as_ref());
        deaths.filter_map(|death| death.detail.as_deref())
    }

    /// Ends every open message as one that is never sent: [`MessageState::Cancelled`] or [`MessageState::Unsent`]. The
    /// fence and the lease stay: a 2xx to what is in flight is a fact and recorded.
    pub fn end_open(&mut self, state: MessageState, at: UnixMs) -> Changes {
        debug_assert!(matches!(state, MessageState::Cancelled | MessageState::Unsent), "{state:?}");
        let mut changes = Changes::default();
        for index in 0..self.len() {
            let before = self.states.get(index);
            if before.is_open() {
                self.states.set(index, state);
                self.amend(index, |exception| exception.not_before = UnixMs(0));
                changes.note(before, state, at);
            }
        }
        changes
    }

    /// Opens the dead messages at `indexes` again, in a new round of delivery whose age counts from `at`; others are
    /// left as they are. The fence stays (B6): a worker that has the batch goes on.
    pub fn redrive(&mut self, indexes: impl IntoIterator<Item = u32>, at: UnixMs) -> Changes {
        let mut changes = Changes::default();
        for index in indexes {
            let place = index as usize;
            if place >= self.len() || self.states.get(place) != MessageState::Dead {
                continue;
            }
            self.states.set(place, MessageState::Retrying);
            self.tries[place] = 0;
            self.except(place, |exception| {
                exception.death = None;
                exception.drive += 1;
                exception.redriven_at = Some(at);
                exception.not_before = at;
            });
            changes.rose.push(index);
            changes.note(MessageState::Dead, MessageState::Retrying, at);
        }
        changes
    }
}

/// An attempt's number as a record has it.
fn tries(attempt: u32) -> u8 {
    u8::try_from(attempt).unwrap_or(u8::MAX)
}
