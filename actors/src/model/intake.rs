//! How the entries of an inbound queue become files.
//!
//! Entries are accumulated across polls until there are enough rows, bytes or entries, or the oldest has
//! waited for the linger. What was accumulated is one *queue file*: its identity is the digest of the
//! entries' ids and bodies, its rows are numbered through, and it is appended and closed in one step, so
//! that either all of its entries are taken or none.
//!
//! An entry whose rows don't fit into one step is a queue file of its own. Its identity depends on nothing
//! but itself, so it is resumed behind its checkpoint like a dropped file; the last step takes the entry.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    sync::Arc,
};

use postrider_settings::FeedQueue;
use sha2::{Digest as _, Sha256};

use super::{
    builder::{BatchBuilder, BatchLimits, Cut},
    entries::minute_of,
    file::{Checkpoint, Reject},
    formats::{
        ParsedRow,
        entry::{EntryParser, EntryRow, EntryRows},
    },
    time::{MonoMs, UnixMs},
};

/// Rejected rows that one step may bring, so that no step is unbounded.
pub const STEP_REJECTS_MAX: usize = 1000;

/// What one delivery of an entry is extended, released or deleted by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AckId(pub Arc<str>);

impl fmt::Debug for AckId {
    /// Who has it can delete the entry.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AckId(..)")
    }
}

/// An entry that was received and read.
#[derive(PartialEq, Eq)]
pub struct Entry {
    /// The queue's own id for it.
    pub id: String,
    /// This delivery of it.
    pub ack: AckId,
    /// SHA-256 of its body.
    pub digest: [u8; 32],
    /// How long the body was.
    pub body_bytes: u64,
    /// What it brings.
    pub rows: EntryRows,
    /// When it was sent, the same at every delivery.
    pub sent_at: UnixMs,
    /// How often it was delivered; 0 if the queue does not say.
    pub receives: u32,
    /// When it came.
    pub received: MonoMs,
}

impl fmt::Debug for Entry {
    /// Counts, never rows (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("id", &self.id).field("rows", &self.rows.len()).finish_non_exhaustive()
    }
}

impl Entry {
    /// What `body` brings.
    pub fn read(id: String, ack: AckId, body: &[u8], parser: &mut EntryParser, received: MonoMs) -> Self {
        let (digest, rows) = (Sha256::digest(body).into(), parser.parse(body));
        let body_bytes = body.len() as u64;
        Self { id, ack, digest, body_bytes, rows, sent_at: UnixMs(0), receives: 0, received }
    }

    /// With when it was sent, and how often it was delivered.
    #[must_use]
    pub fn delivered(mut self, sent_at: UnixMs, receives: u32) -> Self {
        (self.sent_at, self.receives) = (sent_at, receives);
        self
    }

    fn held_bytes(&self) -> usize {
        size_of::<Self>() + self.id.len() + self.ack.0.len() + self.rows.held_bytes()
    }
}

/// Entries that wait for others.
#[derive(Debug)]
pub struct Accumulator {
    /// Rows of a file, and bytes of memory for its entries, unless one entry has more; how long an entry waits.
    limits: FeedQueue,
    /// In how many minutes the entries of a file may have been sent.
    minutes_max: usize,
    /// In the order in which they came.
    waiting: VecDeque<Entry>,
    /// The latest delivery of each.
    acks: HashMap<String, AckId>,
    rows: usize,
    bytes: usize,
}

impl Accumulator {
    /// Nothing waits.
    ///
    /// Entries without rows must not pile up either, so a file has no more of them than rows may be in it.
    pub fn new(limits: FeedQueue, minutes_max: usize) -> Self {
        Self { limits, minutes_max, waiting: VecDeque::new(), acks: HashMap::new(), rows: 0, bytes: 0 }
    }

    /// Adds an entry. If it waits already it was delivered twice: the later delivery's ack id counts, and
    /// the earlier one is returned.
    pub fn push(&mut self, entry: Entry) -> Option<AckId> {
        if let Some(ack) = self.acks.get_mut(&entry.id) {
            return Some(std::mem::replace(ack, entry.ack));
        }
        self.acks.insert(entry.id.clone(), entry.ack.clone());
        self.rows += entry.rows.len();
        self.bytes += entry.held_bytes();
        self.waiting.push_back(entry);
        None
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether waiting longer would bring nothing: a limit is reached.
    pub fn is_full(&self) -> bool {
        let FeedQueue { max_rows, max_size, .. } = self.limits;
        let is_full = self.rows >= max_rows || self.bytes >= max_size || self.waiting.len() >= max_rows;
        !self.is_empty() && (is_full || self.has_many_minutes())
    }

    /// Whether not all that waits fits into one file.
    fn has_many_minutes(&self) -> bool {
        // Nearly always there is no such limit, or fewer entries than minutes are allowed.
        self.waiting.len() > self.minutes_max && {
            let minutes: BTreeSet<_> = self.waiting.iter().map(|entry| minute_of(entry.sent_at)).collect();
            minutes.len() > self.minutes_max
        }
    }

    /// When the oldest entry has waited for the linger; `None` if nothing waits.
    pub fn deadline(&self) -> Option<MonoMs> {
        self.waiting.front().map(|oldest| oldest.received.after(self.limits.linger))
    }

    /// Whether a file is to be made at `now`.
    pub fn is_due(&self, now: MonoMs) -> bool {
        self.is_full() || self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Takes the oldest entries, as many as the limits of a file allow; at least one if any waits.
    pub fn take(&mut self) -> Vec<Entry> {
        let (mut rows, mut bytes) = (0, 0);
        let mut minutes = BTreeSet::new();
        let mut taken = Vec::new();
        while let Some(entry) = self.waiting.front() {
            rows += entry.rows.len();
            bytes += entry.held_bytes();
            minutes.insert(minute_of(entry.sent_at));
            let fits = rows <= self.limits.max_rows
                && bytes <= self.limits.max_size
                && taken.len() < self.limits.max_rows
                && minutes.len() <= self.minutes_max;
            if !fits && !taken.is_empty() {
                break;
            }
            let mut entry = self.waiting.pop_front().expect("it was looked at");
            self.rows -= entry.rows.len();
            self.bytes -= entry.held_bytes();
            entry.ack = self.acks.remove(&entry.id).expect("every entry that waits has its ack id here");
            taken.push(entry);
        }
        taken
    }
}

/// SHA-256 of the entries' ids and bodies, in order: what a queue file's identity is derived from.
pub fn content_digest(entries: &[Entry]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for entry in entries {
        hash.update((entry.id.len() as u64).to_le_bytes());
        hash.update(&entry.id);
        hash.update(entry.digest);
    }
    hash.finalize().into()
}

/// What one step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Cuts: batches, each destination's counted once.
    pub cuts: usize,
    /// Bytes of their payloads and of rejected rows. One cut or one rejected row may always be in a step.
    pub bytes: usize,
}

/// Rows of a queue file that are appended together.
#[derive(PartialEq, Eq)]
pub struct IntakeStep {
    /// The accepted rows.
    pub cuts: Vec<Cut>,
    /// The rejected ones.
    pub rejects: Vec<Reject>,
    /// How far the file is read with them.
    pub checkpoint: Checkpoint,
}

impl fmt::Debug for IntakeStep {
    /// Counts, never rows (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step")
            .field("cuts", &self.cuts.len())
            .field("rejects", &self.rejects.len())
            .field("checkpoint", &self.checkpoint)
            .finish()
    }
}

/// Lays a queue file out in steps, those behind `resume`: usually one. The last one always comes and
/// reaches to the file's end. Entries that need more than one step have to be parted, unless there is
/// only one.
pub fn steps(
    entries: &[Entry],
    resume: Checkpoint,
    batch: BatchLimits,
    limits: StepLimits,
) -> Vec<IntakeStep> {
    let mut layout = Layout {
        limits,
        steps: Vec::new(),
        growing: IntakeStep { cuts: Vec::new(), rejects: Vec::new(), checkpoint: resume },
        bytes: 0,
        rejects: VecDeque::new(),
        waiting_bytes: 0,
    };
    let mut builder = BatchBuilder::new(batch);
    let (mut number, mut offset) = (0, 0);
    for (entry, line) in entries.iter().zip(1..) {
        for row in entry.rows.iter() {
            number += 1;
            if number <= resume.rows {
                continue;
            }
            match row {
                EntryRow::Accepted(bytes) => {
                    if let Some(cut) = builder.push(ParsedRow { row: number, end: 0, offset }, bytes) {
                        layout.add(cut);
                    }
                }
                EntryRow::Rejected(row) => {
                    let (reason, raw) = (row.reason.clone(), row.raw.clone());
                    layout.waiting_bytes += raw.len();
                    layout.rejects.push_back(Reject { row: number, line, reason, raw });
                    // Else one batch that never fills would tie any number of them to one step.
                    if layout.has_many_rejects() {
                        if let Some(cut) = builder.cut() {
                            layout.add(cut);
                        }
                        layout.add_rejects_before(u64::MAX);
                    }
                }
            }
        }
        offset += entry.body_bytes;
    }
    if let Some(cut) = builder.cut() {
        layout.add(cut);
    }
    layout.finish(offset, number)
}

/// What entries are stored as.
#[derive(Debug)]
pub struct QueueFile {
    /// Whose rows it has, in order.
    pub entries: Vec<Entry>,
    /// From the beginning. More than one only if there is one entry.
    pub steps: Vec<IntakeStep>,
}

/// Makes files of entries: one, or as many as it takes for each to fit into one step.
pub fn files(entries: Vec<Entry>, batch: BatchLimits, limits: StepLimits) -> Vec<QueueFile> {
    let mut files = Vec::new();
    let mut groups = vec![entries];
    while let Some(mut entries) = groups.pop() {
        if entries.is_empty() {
            continue;
        }
        let steps = steps(&entries, Checkpoint::default(), batch, limits);
        if steps.len() > 1 && entries.len() > 1 {
            groups.push(entries.split_off(entries.len() / 2));
            groups.push(entries);
        } else {
            files.push(QueueFile { entries, steps });
        }
    }
    files
}

/// Steps in the making.
struct Layout {
    limits: StepLimits,
    steps: Vec<IntakeStep>,
    growing: IntakeStep,
    bytes: usize,
    /// Rejected rows behind the checkpoint …
    rejects: VecDeque<Reject>,
    /// … and how many bytes they hold.
    waiting_bytes: usize,
}

impl Layout {
    fn has_many_rejects(&self) -> bool {
        self.rejects.len() >= STEP_REJECTS_MAX || self.waiting_bytes > self.limits.bytes / 2
    }

    fn add(&mut self, cut: Cut) {
        self.add_rejects_before(cut.first_row);
        let between = self.rejects.iter().take_while(|reject| reject.row < cut.last_row);
        let len = cut.payload.len() + between.map(|reject| reject.raw.len()).sum::<usize>();
        if self.growing.cuts.len() >= self.limits.cuts || self.bytes + len > self.limits.bytes {
            self.close();
        }
        self.bytes += cut.payload.len();
        let (offset, last_row) = (cut.offset, cut.last_row);
        self.growing.cuts.push(cut);
        self.growing.checkpoint.offset = self.growing.checkpoint.offset.max(offset);
        self.growing.checkpoint.rows = last_row;
        // Those between its rows can't stay behind the checkpoint.
        while let Some(reject) = self.rejects.pop_front_if(|reject| reject.row < last_row) {
            self.count_reject(reject);
        }
    }

    fn add_rejects_before(&mut self, row: u64) {
        while let Some(reject) = self.rejects.pop_front_if(|reject| reject.row < row) {
            if self.growing.rejects.len() >= STEP_REJECTS_MAX
                || self.bytes + reject.raw.len() > self.limits.bytes
            {
                self.close();
            }
            self.growing.checkpoint.rows = reject.row;
            self.count_reject(reject);
        }
    }

    fn count_reject(&mut self, reject: Reject) {
        self.waiting_bytes -= reject.raw.len();
        self.bytes += reject.raw.len();
        self.growing.checkpoint.rejected += 1;
        self.growing.rejects.push(reject);
    }

    /// Begins a new step, if the growing one holds anything.
    fn close(&mut self) {
        if self.growing.cuts.is_empty() && self.growing.rejects.is_empty() {
            return;
        }
        let checkpoint = self.growing.checkpoint;
        let next = IntakeStep { cuts: Vec::new(), rejects: Vec::new(), checkpoint };
        self.steps.push(std::mem::replace(&mut self.growing, next));
        self.bytes = 0;
    }

    fn finish(mut self, offset: u64, rows: u64) -> Vec<IntakeStep> {
        self.add_rejects_before(u64::MAX);
        self.growing.checkpoint.offset = offset;
        self.growing.checkpoint.rows = rows;
        self.steps.push(self.growing);
        self.steps
    }
}

#[cfg(test)]
mod tests;
