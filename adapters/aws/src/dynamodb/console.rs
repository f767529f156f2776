//! An operator's commands on DynamoDB. They block on a runtime of their own: a command has no other.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::{
    model::{
        batch::Rendering,
        file::{FileReport, Reject},
        hold::{FileHold, HoldChange},
        ids::{FileId, MessageId},
        time::UnixMs,
    },
    ports::StoreError,
};
use tokio::runtime::Runtime;

use super::DynamoStore;
use postrider_actors::ports::console::{
    AuditLine, DeadFilter, DeadLetter, DestinationView, FileSelector, FileTotals, FilesAt, FilesCount,
    MessageReport, Operate, Order, Position, Rerendered, Search, View,
};

/// Dead letters that are counted at once.
const DEAD_PAGE: usize = 1_000;

/// The store behind commands.
pub struct Console {
    runtime: Runtime,
    store: DynamoStore,
    /// Files that were settled when they were looked at: what is counted of them changes only by a redrive.
    settled: HashMap<FileId, FileReport>,
}

impl Console {
    /// Commands on `store`, whose client was made on `runtime`.
    pub fn new(runtime: Runtime, store: DynamoStore) -> Self {
        Self { runtime, store, settled: HashMap::new() }
    }

    /// Every file. Each that is open costs a read, each that is settled one for the whole command.
    fn all_files(&mut self) -> Result<Vec<FileReport>, StoreError> {
        let Self { runtime, store, settled, .. } = self;
        runtime.block_on(async {
            let ids = store.shared.file_ids(None, usize::MAX).await?;
            let open: Vec<_> = ids.iter().copied().filter(|id| !settled.contains_key(id)).collect();
            let mut reports: Vec<FileReport> = Vec::with_capacity(ids.len());
            for look in store.shared.look_at_all(open).await? {
                reports.push(look.report);
            }
            reports.extend(settled.values().cloned());
            let done = reports.iter().filter(|report| report.settled_at.is_some());
            settled.extend(done.map(|report| (report.file.id, report.clone())).collect::<Vec<_>>());
            Ok(reports)
        })
    }
}

impl View for Console {
    fn files(
        &mut self,
        selector: Option<&FileSelector>,
        limit: usize,
    ) -> Result<Vec<FileReport>, StoreError> {
        let shared = &self.store.shared;
        match selector {
            None => self.runtime.block_on(shared.latest_files(limit)),
            Some(selector) => self.runtime.block_on(shared.files_of(selector, limit)),
        }
    }

    fn count_files(&mut self, of: &FilesAt) -> Result<FilesCount, StoreError> {
        self.runtime.block_on(self.store.shared.count_files(of))
    }

    fn file_totals(&mut self) -> Result<FileTotals, StoreError> {
        let mut totals = FileTotals::default();
        for report in self.all_files()? {
            let count = match (report.state.is_closed(), report.settled_at) {
                (false, _) => &mut totals.ingesting,
                (true, None) => &mut totals.open,
                (true, Some(_)) => &mut totals.settled,
            };
            *count += 1;
            totals.failed += u64::from(report.state.reason().is_some());
        }
        Ok(totals)
    }

    fn depth(&mut self) -> Result<u64, StoreError> {
        let shared = &self.store.shared;
        let open = self.runtime.block_on(shared.depth.read(&shared.calls, shared.clock.mono()))?;
        Ok(open.values().sum())
    }

    fn destinations(&mut self) -> Result<BTreeMap<String, DestinationView>, StoreError> {
        let mut views = self.runtime.block_on(self.store.shared.destination_views())?;
        for report in self.all_files()? {
            for (name, counts) in report.destinations {
                let sum = &mut views.entry(name).or_default().counts;
                sum.accepted += counts.accepted;
                sum.sent += counts.sent;
                sum.dead += counts.dead;
                sum.retrying += counts.retrying;
                sum.unsent += counts.unsent;
                sum.cancelled += counts.cancelled;
            }
        }
        Ok(views)
    }

    fn dead(
        &mut self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.runtime.block_on(self.store.dead_letters(filter, position, limit))
    }

    fn count_dead(&mut self, filter: &DeadFilter) -> Result<u64, StoreError> {
        let (mut count, mut position) = (0, Position::default());
        loop {
            let letters = self.dead(filter, &position, DEAD_PAGE)?;
            count += letters.len() as u64;
            let Some(last) = letters.last() else { return Ok(count) };
            position.clone_from(&last.position);
        }
    }

    fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError> {
        let wanted: Vec<_> = letters.iter().map(|letter| (letter.batch, letter.row)).collect();
        self.runtime.block_on(self.store.shared.recipients(&wanted))
    }

    fn rejects(&mut self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.runtime.block_on(self.store.shared.rejects(file, after, limit))
    }

    fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        self.runtime.block_on(self.store.shared.message(id))
    }

    fn audit(&mut self, limit: usize) -> Result<Vec<AuditLine>, StoreError> {
        self.runtime.block_on(self.store.shared.audit(limit))
    }

    fn search(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, StoreError> {
        self.runtime.block_on(self.store.shared.search(search, recipient, file, batches, limit))
    }
}

impl Operate for Console {
    fn redrive(&mut self, filter: &DeadFilter, limit: usize, now: UnixMs) -> Result<usize, StoreError> {
        self.runtime.block_on(self.store.redrive(filter, limit, now))
    }

    fn rerender(
        &mut self,
        filter: &DeadFilter,
        renderings: &BTreeMap<String, Rendering>,
        limit: usize,
        now: UnixMs,
        dry_run: bool,
    ) -> Result<Rerendered, StoreError> {
        let shared = &self.store.shared;
        self.runtime.block_on(shared.rerender(filter, renderings, limit, now, dry_run))
    }

    fn order(&mut self, order: &Order, by: &str, at: UnixMs) -> Result<usize, StoreError> {
        let shared = &self.store.shared;
        self.runtime.block_on(async {
            let changed = match order {
                Order::Pause { destination, reason } => {
                    usize::from(shared.disable(destination, reason, at).await?)
                }
                Order::Resume { destination } => usize::from(shared.enable(destination).await?),
                Order::Limit { destination, change } => {
                    usize::from(shared.limit(destination, *change).await?)
                }
                Order::Hold { of, reason } => {
                    shared.change_holds(of, &HoldChange::Hold(FileHold::by_operator(at, reason))).await?
                }
                Order::Release { of } => shared.change_holds(of, &HoldChange::Release).await?,
                Order::Priority { of, priority } => shared.change_priorities(of, *priority).await?,
                // The daemons do the rest.
                Order::Cancel { of, reason } => {
                    shared.change_holds(of, &HoldChange::Hold(FileHold::cancelled(at, reason))).await?
                }
            };
            if changed > 0 {
                shared.note(&order.line(by, at)).await?;
            }
            Ok(changed)
        })
    }

    fn note(&mut self, line: &AuditLine) -> Result<(), StoreError> {
        self.runtime.block_on(self.store.shared.note(line))
    }
}
