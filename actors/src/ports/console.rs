//! What an operator's commands ask of a store, with or without a running daemon.
//!
//! Blocking: a command does one thing after the other. Every call is bounded by its arguments, and a long
//! walk takes many calls, so that a slow reader blocks nothing. An engine's adapter
//! implements the two traits; `app::console` chooses by the configuration.

mod orders;
pub mod receipts;

pub use orders::{AUDIT_LINES_MAX, AuditLine, FilesAt, FilesCount, Order, OrderedFiles};

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use memchr::memmem::Finder;

use crate::{
    model::{
        batch::{BatchHeader, PayloadError, Rendering, Rows},
        file::{DestinationCounts, FileReport, Reject},
        ids::{BatchId, FileId, MessageId},
        ledger,
        limits::SetLimits,
        outcome::{Attempt, DeathCause, Reason},
        state::MessageState,
        time::UnixMs,
    },
    ports::StoreError,
};

/// What commands read. Each answer is a snapshot of its own.
pub trait View {
    /// Up to `limit` files, the latest first; those that `selector` names, or all.
    fn files(&mut self, selector: Option<&FileSelector>, limit: usize)
    -> Result<Vec<FileReport>, StoreError>;

    /// How much an order of this would be about.
    fn count_files(&mut self, of: &FilesAt) -> Result<FilesCount, StoreError>;

    /// How many files there are.
    fn file_totals(&mut self) -> Result<FileTotals, StoreError>;

    /// How many messages have no final state yet.
    fn depth(&mut self) -> Result<u64, StoreError>;

    /// Every destination that the store knows, by name.
    fn destinations(&mut self) -> Result<BTreeMap<String, DestinationView>, StoreError>;

    /// Up to `limit` dead letters after `position`, in an order that is the engine's own but always the
    /// same. None only if there are no more.
    fn dead(
        &mut self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError>;

    /// How many dead letters match a filter. It looks at each, and holds none.
    fn count_dead(&mut self, filter: &DeadFilter) -> Result<u64, StoreError>;

    /// The recipients of dead letters, in their order.
    fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError>;

    /// Up to `limit` rejected rows of a file after row `after`, in order.
    fn rejects(&mut self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError>;

    /// What became of one message at each destination of its file, or why its row is not a message. Empty if
    /// the file is not known or its row was not read (yet).
    fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError>;

    /// Up to `limit` lines of what operators ordered, the latest first.
    fn audit(&mut self, limit: usize) -> Result<Vec<AuditLine>, StoreError>;

    /// Continues a search for `recipient` through up to `batches` more batches, `limit` messages at
    /// most in all. Whether there is more to look at. It reads every payload it passes.
    fn search(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, StoreError>;
}

/// What commands change, with or without a running daemon.
pub trait Operate {
    /// Sends up to `limit` dead letters again that match `filter`; how many. It only makes them due again:
    /// delivery keeps its rates. If it fails, what was redriven before stays so.
    fn redrive(&mut self, filter: &DeadFilter, limit: usize, now: UnixMs) -> Result<usize, StoreError>;

    /// The same with new bodies, made by what `renderings` has for their destinations, for those that were never sent
    /// (`Record::keeps_bodies`); others stay dead. With `dry_run` nothing is changed.
    fn rerender(
        &mut self,
        filter: &DeadFilter,
        renderings: &BTreeMap<String, Rendering>,
        limit: usize,
        now: UnixMs,
        dry_run: bool,
    ) -> Result<Rerendered, StoreError>;

    /// Carries out an order, and adds its line if that changes anything; of how many files at how many destinations it did,
    /// together.
    fn order(&mut self, order: &Order, by: &str, at: UnixMs) -> Result<usize, StoreError>;

    /// Adds a line for what takes many calls.
    fn note(&mut self, line: &AuditLine) -> Result<(), StoreError>;
}

/// What became of dead letters that were to be sent with new bodies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rerendered {
    /// They are sent again.
    pub redriven: usize,
    /// They stay dead: they may have been received.
    pub refused: usize,
}

/// Where a walk continues. Opaque: only the engine that made it reads it. The default is the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position(pub String);

/// Files by what an operator calls them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileSelector {
    /// The one with this id.
    Id(FileId),
    /// All with this name: the same name may be dropped with new content (F19).
    Name(String),
}

impl From<&str> for FileSelector {
    /// 32 hex digits are an id; anything else is a name.
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Id)
    }
}

/// How many files there are, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTotals {
    /// Being read.
    pub ingesting: u64,
    /// Closed, with messages that are not settled.
    pub open: u64,
    /// Closed and settled.
    pub settled: u64,
    /// Of those that are closed: could not be used, or not to their end.
    pub failed: u64,
}

/// The state of a destination.
#[derive(Clone, Debug, Default)]
pub struct DestinationView {
    /// Since when it is disabled, and why.
    pub disabled: Option<(UnixMs, String)>,
    /// What is set for it.
    pub limits: SetLimits,
    /// Over all files.
    pub counts: DestinationCounts,
    /// Batches that are not due yet; where another queue carries them, all that it has not accepted.
    pub outstanding: u64,
    /// Batches that are due and wait for a worker; `None` if only the queue knows, which does not count by destination.
    pub queued: Option<u64>,
    /// Batches that a worker has, or had when the daemon ended; `None` likewise.
    pub leased: Option<u64>,
    /// When the earliest outstanding batch is due.
    pub next_due: Option<UnixMs>,
    /// Batches that are damaged and set aside (F61); `None` from a store that sets none aside.
    pub quarantined: Option<u64>,
}

/// Which dead letters; all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct DeadFilter {
    /// Of one file, or of all with one name.
    pub file: Option<FileSelector>,
    /// Of one destination.
    pub destination: Option<String>,
    /// Whose last attempt failed for this reason.
    pub reason: Option<Reason>,
    /// Whose last attempt was answered with this status.
    pub status: Option<u16>,
    /// That were given up for this cause.
    pub cause: Option<DeathCause>,
    /// That were given up before.
    pub before: Option<UnixMs>,
    /// That were given up then or later.
    pub since: Option<UnixMs>,
}

impl DeadFilter {
    /// Whether it asks for a message whose last attempt this was, and that was given up for `cause`. Its file and
    /// destination are for the engine to find.
    pub fn takes(&self, last: &Attempt, cause: DeathCause) -> bool {
        self.reason.is_none_or(|reason| last.reason == reason)
            && self.status.is_none_or(|status| last.status == status)
            && self.cause.is_none_or(|wanted| cause == wanted)
            && self.before.is_none_or(|before| last.at < before)
            && self.since.is_none_or(|since| last.at >= since)
    }
}

/// A message that was given up.
#[derive(Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where a walk that has seen it continues.
    pub position: Position,
    /// The file its row came from.
    pub file: FileId,
    /// That file's name.
    pub file_name: String,
    /// Where it was to go.
    pub destination: String,
    /// Its row.
    pub row: u64,
    /// Attempts that were made in its last drive.
    pub attempts: u32,
    /// The last of them.
    pub last: Attempt,
    /// Why there is no other.
    pub cause: DeathCause,
    /// What the destination itself said of it: a table's words, or the first line of a receiver's answer.
    pub detail: Option<String>,
    /// The batch that holds it.
    pub batch: BatchId,
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeadLetter({}_{} to {})", self.file, self.row, self.destination)
    }
}

/// What became of a row: a message at one destination, or none at all.
#[derive(Clone)]
pub struct MessageReport {
    /// The message.
    pub id: MessageId,
    /// The name of the file it came from.
    pub file_name: String,
    /// What became of it.
    pub fate: Fate,
}

impl fmt::Debug for MessageReport {
    /// No recipient (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageReport").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What became of a row.
#[derive(Clone)]
pub enum Fate {
    /// It was refused.
    Rejected {
        /// The line it starts on.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// It was left out.
    Duplicate,
    /// It is a message.
    Message(Delivery),
}

/// The state of a message's delivery to one destination.
#[derive(Clone)]
pub struct Delivery {
    /// Where it goes.
    pub destination: String,
    /// Who gets it; `None` once its payload was archived.
    pub recipient: Option<String>,
    /// Its state: `accepted`, `retrying`, `dead`, `sent`…
    pub state: MessageState,
    /// When its row was accepted, or last redriven.
    pub accepted_at: UnixMs,
    /// How often it was redriven.
    pub drive: u32,
    /// Every failed attempt, the oldest first.
    pub failed: Vec<Attempt>,
    /// The HTTP status and time of the 2xx, if it was sent.
    pub sent: Option<(u16, UnixMs)>,
    /// Why it was given up, if it was.
    pub cause: Option<DeathCause>,
    /// What the destination said of it then.
    pub detail: Option<String>,
    /// When the next attempt may be made, if there will be one.
    pub not_before: Option<UnixMs>,
    /// When its body was made anew, if it was.
    pub rendered_at: Option<UnixMs>,
}

impl Delivery {
    /// Of what a batch's record and its history say.
    pub fn of(
        destination: String,
        recipient: Option<String>,
        fate: ledger::Fate,
        failed: Vec<Attempt>,
    ) -> Self {
        let ledger::Fate { state, accepted_at, drive, sent, death, not_before, rendered_at, .. } = fate;
        let (cause, detail) = death.map(|death| (death.cause, death.detail)).unzip();
        let detail = detail.flatten().map(String::from);
        Self {
            destination,
            recipient,
            state,
            accepted_at,
            drive,
            failed,
            sent,
            cause,
            detail,
            not_before,
            rendered_at,
        }
    }
}

/// A walk over what was accepted, in search of a recipient.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Where it continues.
    pub position: Position,
    /// Batches looked at so far.
    pub batches: u64,
    /// Messages found so far.
    pub found: Vec<MessageId>,
}

impl Search {
    /// Looks through what a batch carries for the recipient that `finder` finds; `limit` messages at most in all.
    pub fn look_through(
        &mut self,
        finder: &Finder<'_>,
        header: &BatchHeader,
        payload: &Bytes,
        limit: usize,
    ) -> Result<(), PayloadError> {
        // Most payloads are left without decoding them.
        if finder.find(payload).is_none() {
            return Ok(());
        }
        let rows = Rows::decode(payload.clone())?;
        for index in 0..rows.len() {
            let is_asked_for = header.layout.read(rows.bytes(index))?.recipient.as_bytes() == finder.needle();
            if is_asked_for && self.found.len() < limit {
                self.found.push(header.message_id(rows.row(index)));
            }
        }
        Ok(())
    }
}
