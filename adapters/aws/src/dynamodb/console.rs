//! An operator's commands on DynamoDB. They block on a runtime of their own: a command has no other.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::{
    model::{
        file::FileReport,
        ids::{FileId, MessageId},
        time::UnixMs,
    },
    ports::StoreError,
};
use tokio::runtime::Runtime;

use super::{
    DynamoStore,
    dead::{DeadPlace, DeadQuery},
};
use postrider_actors::ports::console::{
    DeadFilter, DeadLetter, DestinationView, FileSelector, FileTotals, MessageReport, Operate, Position,
    Search, View,
};

/// The store behind commands.
pub struct Console {
    runtime: Runtime,
    store: DynamoStore,
    /// Files that were settled when they were looked at: what is counted of them changes only by a redrive.
    settled: HashMap<FileId, FileReport>,
    /// Names of files that were asked for.
    names: HashMap<FileId, String>,
}

impl Console {
    /// Commands on `store`, whose client was made on `runtime`.
    pub fn new(runtime: Runtime, store: DynamoStore) -> Self {
        Self { runtime, store, settled: HashMap::new(), names: HashMap::new() }
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

    /// A filter as queries, one per file if it names files.
    fn queries(&self, filter: &DeadFilter) -> Result<Vec<DeadQuery>, StoreError> {
        let query = |file| DeadQuery {
            file,
            destination: filter.destination.clone(),
            reason: filter.reason,
            cause: filter.cause,
            before: filter.before,
            since: filter.since,
        };
        let mut files = match &filter.file {
            None => return Ok(vec![query(None)]),
            Some(FileSelector::Id(id)) => vec![*id],
            Some(FileSelector::Name(name)) => {
                self.runtime.block_on(self.store.shared.file_ids(Some(name), usize::MAX))?
            }
        };
        // As the list is: by file.
        files.sort_unstable_by_key(ToString::to_string);
        files.dedup();
        Ok(files.into_iter().map(|file| query(Some(file))).collect())
    }

    fn name(&mut self, file: FileId) -> Result<String, StoreError> {
        if let Some(name) = self.names.get(&file) {
            return Ok(name.clone());
        }
        let stored = self.runtime.block_on(self.store.shared.read_file(file))?;
        let name = stored.map(|stored| stored.record.name).unwrap_or_default();
        self.names.insert(file, name.clone());
        Ok(name)
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
        let after: Option<DeadPlace> = if position.0.is_empty() { None } else { Some(position.0.parse()?) };
        let mut found = Vec::new();
        for query in self.queries(filter)? {
            if found.len() >= limit {
                break;
            }
            // A walk that is beyond a file finds nothing more in it.
            let letters = self.store.shared.dead_letters(&query, after.as_ref(), limit - found.len());
            found.extend(self.runtime.block_on(letters)?);
        }
        let mut letters = Vec::with_capacity(found.len());
        for letter in found {
            letters.push(DeadLetter {
                position: Position(letter.place.to_string()),
                file: letter.file,
                file_name: self.name(letter.file)?,
                destination: letter.destination,
                row: letter.row,
                attempts: letter.attempts,
                last: letter.last,
                cause: letter.cause,
                detail: letter.detail.map(Into::into),
                batch: letter.batch,
            });
        }
        Ok(letters)
    }

    fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError> {
        let wanted: Vec<_> = letters.iter().map(|letter| (letter.batch, letter.row)).collect();
        self.runtime.block_on(self.store.shared.recipients(&wanted))
    }

    fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        self.runtime.block_on(self.store.shared.message(id))
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
        let mut redriven = 0;
        for query in self.queries(filter)? {
            redriven += self.runtime.block_on(self.store.shared.redrive(&query, limit - redriven, now))?;
        }
        Ok(redriven)
    }

    fn enable(&mut self, name: &str) -> Result<bool, StoreError> {
        self.runtime.block_on(self.store.shared.enable(name))
    }

    fn disable(&mut self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        self.runtime.block_on(self.store.shared.disable(name, reason, at))
    }
}
