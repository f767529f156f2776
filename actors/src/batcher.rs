//! Batcher: cuts a feed's rows into batches and appends them to the outbox together with the
//! checkpoint. While one append waits for its sync, the next one collects.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;
use postrider_settings::Canary;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    flow::{Bells, Progress, insist},
    messages::{FileClosed, Letter, ParsedRows},
    metrics::{FeedMetrics, StoredRows},
    model::{
        batch::NewBatch,
        builder::{BatchBuilder, Cut},
        canary,
        file::{Checkpoint, FileState, ReadEnd, Reject},
        formats::Position,
        hold::HoldChange,
        ids::FileId,
        table::MAPPING_TYPE,
        time::MonoMs,
    },
    ports::{Append, AppendLimits, Appended, Clock, HoldStep, Outbox, StoreError},
    reading::{FeedSettings, FileInProgress},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// The longest that a row waits for others to fill its batch. Files fill batches as fast as they are read: only their
/// last one waits.
const LINGER: Duration = Duration::from_millis(50);

/// Rejected rows that may wait for an accepted one before a checkpoint is forced.
const WAITING_REJECTS_MAX: usize = 1000;

/// What a batcher works with.
#[derive(Clone)]
pub struct BatcherSetup {
    /// The feed's settings.
    pub feed: Arc<FeedSettings>,
    /// Where batches go.
    pub outbox: Arc<dyn Outbox>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when batches were appended.
    pub appended: Bells,
    /// What is counted.
    pub metrics: FeedMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct Batcher {
    setup: BatcherSetup,
    fault: Fault,
    files: HashMap<FileId, FileProgress>,
    draining: bool,
}

/// What the next append will hold.
#[derive(Default)]
struct AppendDraft {
    batches: Vec<NewBatch>,
    rejects: Vec<Reject>,
    duplicates: Vec<u64>,
    end: Option<ReadEnd>,
    /// What waits with it, or does no longer.
    hold: Option<HoldStep>,
    /// How far the file is read with it.
    checkpoint: Checkpoint,
    bytes: usize,
    permits: Vec<OwnedSemaphorePermit>,
}

impl AppendDraft {
    fn rows(&self) -> StoredRows {
        // Each row is there once per destination.
        let first = self.batches.first().map(|batch| &batch.header.destination);
        let of_first = self.batches.iter().filter(|batch| Some(&batch.header.destination) == first);
        StoredRows {
            accepted: of_first.map(|batch| u64::from(batch.count)).sum(),
            rejected: self.rejects.len() as u64,
            duplicates: self.duplicates.len() as u64,
        }
    }
}

struct FileProgress {
    file: Arc<FileInProgress>,
    builder: BatchBuilder,
    /// Rejected rows and duplicates after the last cut.
    rejects: Vec<Reject>,
    duplicates: Vec<u64>,
    /// The checkpoint behind the draft.
    checkpoint: Checkpoint,
    read: Position,
    fed: MonoMs,
    /// What is to be appended, one step each; the last one still grows.
    drafts: VecDeque<AppendDraft>,
    /// Messages that are yet to go ahead of the others (B14); `None`: they have, or the file has no canary.
    ahead: Option<u64>,
    /// Whether something may wait for them.
    may_wait: bool,
    appending: bool,
    /// Whether something was appended.
    started: bool,
}

impl Batcher {
    fn append(&mut self, id: FileId, context: &mut Context<Self>) {
        let Some(progress) = self.files.get_mut(&id).filter(|file| !file.appending) else { return };
        let Some(draft) = progress.drafts.pop_front() else { return };
        progress.appending = true;
        let file = progress.file.clone();
        let rows = draft.rows();
        let ends = draft.end.is_some();
        let state = match draft.end {
            Some(ReadEnd::Closed(state)) => state,
            Some(ReadEnd::SetAside) | None => FileState::Ingesting,
        };
        let closed = state.is_closed();
        let append = Append {
            file: file.record.clone(),
            batches: draft.batches,
            rejects: draft.rejects,
            duplicates: draft.duplicates,
            checkpoint: draft.checkpoint,
            state: state.clone(),
            hold: draft.hold,
            at: self.setup.clock.wall(),
            entries: Vec::new(),
        };
        let (metrics, at, is_first) = (self.setup.metrics.clone(), append.at, !progress.started);
        progress.started = true;
        let (setup, permits) = (self.setup.clone(), draft.permits);
        let work = async move {
            failpoint!("append.before");
            let store = || setup.outbox.append(append.clone());
            let result = match insist("appending to the outbox", &*setup.clock, &setup.progress, store).await
            {
                Ok(Appended::Stored) => Ok(()),
                Ok(Appended::Known(_)) => {
                    Err(StoreError::Permanent("a file's rows come from no queue's entries".into()))
                }
                Err(error) => Err(error),
            };
            failpoint!("append.after");
            if result.is_ok() {
                metrics.appended(rows);
                if is_first {
                    metrics.started(at.since(file.record.claimed_at));
                }
                metrics.closed(&state, at);
            }
            drop(permits); // the parser may continue: these rows are in the outbox
            if closed && result.is_ok() {
                // A watcher that is gone finds the file among the claimed ones when it is back.
                let _ = file.watcher.send(FileClosed { file: file.clone() }).await;
            }
            result
        };
        context.spawn(work.into_actor(self).map(move |result, this, context| match result {
            Ok(()) => {
                this.setup.appended.ring();
                if ends {
                    this.files.remove(&id); // nothing refers to a file that is set aside, so it is
                } else if let Some(progress) = this.files.get_mut(&id) {
                    progress.appending = false;
                    this.append(id, context);
                }
                this.stop_if_drained(context);
            }
            Err(error) => this.fault.fail(context, format!("appending to the outbox: {error}")),
        }));
    }

    fn stop_if_drained(&self, context: &mut Context<Self>) {
        if self.draining && !self.files.values().any(|file| file.appending || !file.drafts.is_empty()) {
            context.stop();
        }
    }

    /// Sends on what has waited for longer than the linger.
    fn flush_lingering(&mut self, context: &mut Context<Self>) {
        let now = self.setup.clock.mono();
        let linger = LINGER;
        let mut flushed = Vec::new();
        for (&id, file) in &mut self.files {
            if !file.builder.is_empty() && now.since(file.fed) >= linger {
                file.flush(&self.setup);
                flushed.push(id);
            }
        }
        for id in flushed {
            self.append(id, context);
        }
    }
}

/// How many messages of a file are yet to go ahead of the others, behind what is stored of it.
fn messages_ahead(settings: &Canary, resume: Checkpoint) -> Option<u64> {
    let stored = resume.rows - resume.rejected - resume.duplicates;
    u64::from(settings.messages).checked_sub(stored).filter(|left| settings.enabled && *left > 0)
}

impl FileProgress {
    fn new(file: Arc<FileInProgress>, resume: Checkpoint, setup: &BatcherSetup) -> Self {
        Self {
            file,
            builder: BatchBuilder::new(setup.feed.batch),
            rejects: Vec::new(),
            duplicates: Vec::new(),
            checkpoint: resume,
            read: Position { offset: resume.offset, rows: resume.rows, line: 1 },
            fed: setup.clock.mono(),
            drafts: VecDeque::new(),
            ahead: messages_ahead(&setup.feed.canary, resume),
            may_wait: resume.rows > 0,
            appending: false,
            started: false,
        }
    }

    fn take(&mut self, rows: ParsedRows, setup: &BatcherSetup) {
        let ParsedRows { file: _, mut block, duplicates, resume, read, end, permit } = rows;
        let min_rows = setup.feed.canary.min_rows;
        if matches!(end, Some(ReadEnd::Closed(_))) && read.rows < min_rows {
            self.ahead = None; // it turns out to be small before anything had to wait
        }
        self.duplicates.extend(duplicates.iter().filter(|&&row| row > resume.rows));
        // First, because a cut takes along what was rejected before its last row.
        let rejects = std::mem::take(&mut block.rejects);
        self.rejects.extend(rejects.into_iter().filter(|reject| reject.row > resume.rows));
        for (row, bytes) in block.iter() {
            if row.row <= resume.rows || duplicates.binary_search(&row.row).is_ok() {
                continue;
            }
            if let Some(cut) = self.builder.push(row, bytes) {
                self.add(&cut, setup);
            }
            if let Some(left) = &mut self.ahead {
                *left -= 1;
                if *left == 0 {
                    self.cut_canary(row.row + 1, setup);
                }
            }
        }
        if read.rows >= self.checkpoint.rows {
            self.read = read;
        }
        self.fed = setup.clock.mono();
        if let Some(end) = end {
            self.flush(setup);
            let end = match end {
                ReadEnd::Closed(state) => ReadEnd::Closed(self.verdict(state)),
                ReadEnd::SetAside => ReadEnd::SetAside,
            };
            if matches!(end, ReadEnd::Closed(_)) && self.may_wait && self.checkpoint.rows < min_rows {
                // It was not known how long the file is.
                self.hold(HoldChange::Pass, setup);
            }
            self.last_draft().end = Some(end);
        } else if self.rejects.len() + self.duplicates.len() > WAITING_REJECTS_MAX || self.builder.is_empty()
        {
            self.flush(setup);
        }
        // Rows that still wait in the builder are bounded by a batch and need no permit.
        if let Some(draft) = self.drafts.back_mut() {
            draft.permits.push(permit);
        }
    }

    /// The canary ends here: what comes behind it waits (B14), at the file's webhooks. The step that holds it comes before
    /// any of that.
    fn cut_canary(&mut self, next_row: u64, setup: &BatcherSetup) {
        (self.ahead, self.may_wait) = (None, true);
        if let Some(cut) = self.builder.cut() {
            self.add(&cut, setup);
        }
        let hold = canary::first_hold(&setup.feed.canary, next_row, setup.clock.wall());
        self.hold(HoldChange::Hold(hold), setup);
    }

    fn hold(&mut self, change: HoldChange, setup: &BatcherSetup) {
        if !setup.feed.canary.enabled {
            return;
        }
        let webhooks = self.file.headers().iter().filter(|header| header.content_type != MAPPING_TYPE);
        let destinations: Vec<_> = webhooks.map(|header| header.destination.as_str().into()).collect();
        if !destinations.is_empty() {
            self.last_draft().hold = Some(HoldStep { destinations, change });
        }
    }

    /// A file without a single usable row has failed (F25).
    fn verdict(&self, state: FileState) -> FileState {
        let Checkpoint { rows, rejected, .. } = self.checkpoint;
        if state == FileState::Ingested && rejected > 0 && rejected == rows {
            return FileState::Failed(format!(
                "none of its {rows} rows can be used; the rejects file says why"
            ));
        }
        state
    }

    fn add(&mut self, cut: &Cut, setup: &BatcherSetup) {
        let accepted_at = setup.clock.wall();
        let copies = self.file.headers().len();
        if let Some(draft) = self.drafts.back()
            && !draft.has_room(copies, copies * cut.payload.len(), &setup.outbox.append_limits())
        {
            self.drafts.push_back(AppendDraft { checkpoint: self.checkpoint, ..AppendDraft::default() });
        }
        let headers = self.file.headers().iter();
        let mut batches: Vec<_> = headers.map(|header| cut.batch(header.clone(), accepted_at)).collect();
        let draft = self.last_draft();
        draft.bytes += copies * cut.payload.len();
        draft.batches.append(&mut batches);
        self.advance(cut.offset, cut.last_row);
    }

    fn last_draft(&mut self) -> &mut AppendDraft {
        if self.drafts.is_empty() {
            self.drafts.push_back(AppendDraft { checkpoint: self.checkpoint, ..AppendDraft::default() });
        }
        self.drafts.back_mut().expect("one was pushed")
    }

    /// Cuts what the builder holds and moves the checkpoint to the end of what was read.
    fn flush(&mut self, setup: &BatcherSetup) {
        if let Some(cut) = self.builder.cut() {
            self.add(&cut, setup);
        }
        if self.read.rows > self.checkpoint.rows {
            self.advance(self.read.offset, self.read.rows);
        }
    }

    fn advance(&mut self, offset: u64, rows: u64) {
        let rejects = self.rejects.partition_point(|reject| reject.row <= rows);
        let duplicates = self.duplicates.partition_point(|&row| row <= rows);
        let rejects: Vec<_> = self.rejects.drain(..rejects).collect();
        let duplicates: Vec<_> = self.duplicates.drain(..duplicates).collect();
        self.checkpoint = Checkpoint {
            offset,
            rows,
            rejected: self.checkpoint.rejected + rejects.len() as u64,
            duplicates: self.checkpoint.duplicates + duplicates.len() as u64,
        };
        let checkpoint = self.checkpoint;
        let draft = self.last_draft();
        draft.rejects.extend(rejects);
        draft.duplicates.extend(duplicates);
        draft.checkpoint = checkpoint;
    }
}

impl AppendDraft {
    /// Whether so many more batches and bytes may travel with it. The first ones always may.
    fn has_room(&self, batches: usize, bytes: usize, limits: &AppendLimits) -> bool {
        self.batches.is_empty()
            || (self.batches.len() + batches <= limits.batches && self.bytes + bytes <= limits.bytes)
    }
}

impl Stage for Batcher {
    const NAME: &'static str = "batcher";
    /// Parsers hold a permit for every block on its way here, so the mailbox never holds more than
    /// those; the capacity only has to be no smaller.
    const MAILBOX: usize = 64;

    type Setup = BatcherSetup;

    fn new(setup: BatcherSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault, files: HashMap::new(), draining: false }
    }
}

impl Actor for Batcher {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let tick = LINGER.clamp(Duration::from_millis(5), Duration::from_secs(1));
        context.run_interval(tick, Self::flush_lingering);
    }
}

impl Handler<Letter<ParsedRows>> for Batcher {
    type Result = ();

    fn handle(&mut self, letter: Letter<ParsedRows>, context: &mut Self::Context) {
        let rows = letter.open();
        failpoint!("panic.batcher");
        let id = rows.file.record.id;
        let setup = &self.setup;
        let progress =
            self.files.entry(id).or_insert_with(|| FileProgress::new(rows.file.clone(), rows.resume, setup));
        progress.take(rows, setup);
        self.append(id, context);
    }
}

impl Handler<Drain> for Batcher {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        self.draining = true;
        let ids: Vec<_> = self.files.keys().copied().collect();
        for id in ids {
            if let Some(file) = self.files.get_mut(&id) {
                file.flush(&self.setup);
            }
            self.append(id, context);
        }
        self.stop_if_drained(context);
    }
}
