//! What an operator's commands read: answers that take more than one read. Snapshots of different moments are put
//! together; while work goes on, counts of one answer may be a few messages apart.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::{
    model::{
        batch::Rows,
        canary::Trial,
        codec,
        file::FileReport,
        ids::{BatchId, FileId, MessageId},
        ledger,
    },
    ports::{Dispatch, Fetched, PageQuery, StoreError},
};

use super::{
    item::{BATCHES, BODY, Damaged, FILE, Item, NAME, Reading, SK, payload_damaged, text},
    keys,
    record::{Records, StoredBatch},
    state::Shared,
};
use postrider_actors::ports::console::{
    Delivery, DestinationView, Fate, FileSelector, MessageReport, Position, Search,
};

/// Entries of one page of the outstanding batches.
const PAGE: usize = 1_000;

/// Steps of a file that are looked at together, some 200 bytes each.
const STEPS: usize = 100;

/// A step of a file: where its batches are found.
struct Step {
    last_row: u64,
    /// The first rows of each destination's batches.
    firsts: BTreeMap<String, Vec<u64>>,
}

impl Step {
    fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        let row = reading.text(SK)?.strip_prefix(keys::STEP_PREFIX).ok_or(Damaged(SK))?;
        Ok(Self {
            last_row: u64::from_str_radix(row, 16).map_err(|_| Damaged(SK))?,
            firsts: serde_json::from_str(reading.text(BATCHES)?).map_err(|_| Damaged(BATCHES))?,
        })
    }
}

/// Between the file's place and the row in the position of a search.
const SEPARATOR: char = '\n';

impl Shared {
    /// The ids of up to `limit` files in the order in which they were stored, the latest first; those with `name`, or
    /// all.
    pub(super) async fn file_ids(&self, name: Option<&str>, limit: usize) -> Result<Vec<FileId>, StoreError> {
        let mut ids = Vec::new();
        let mut from = None;
        while ids.len() < limit {
            let mut call = self
                .calls
                .in_partition(keys::FILES_PK, "", [])
                .scan_index_forward(false)
                .set_exclusive_start_key(from);
            if let Some(name) = name {
                call = call
                    .filter_expression("#Name = :Name")
                    .expression_attribute_names("#Name", NAME)
                    .expression_attribute_values(":Name", text(name));
            } else {
                // No more than are asked for: with a filter a page may bring few of those it reads.
                call = call.limit(i32::try_from(limit - ids.len()).unwrap_or(i32::MAX));
            }
            let (items, next) = self.calls.query("listing files", call).await?;
            for item in &items {
                ids.push(Reading(item).file_id(FILE)?);
            }
            from = next;
            if from.is_none() {
                break;
            }
        }
        ids.truncate(limit);
        Ok(ids)
    }

    /// Up to `limit` files that `selector` names, the latest first.
    pub(super) async fn files_of(
        &self,
        selector: &FileSelector,
        limit: usize,
    ) -> Result<Vec<FileReport>, StoreError> {
        let ids = match selector {
            FileSelector::Id(id) => vec![*id],
            FileSelector::Name(name) => self.file_ids(Some(name), limit).await?,
        };
        let looks = self.look_at_all(ids).await?;
        self.reports_of(looks, limit).await
    }

    /// What there is to say of destinations apart from counts: which are disabled, and what is outstanding.
    pub(super) async fn destination_views(&self) -> Result<BTreeMap<String, DestinationView>, StoreError> {
        let mut views: BTreeMap<String, DestinationView> = BTreeMap::new();
        for name in self.known_destinations().await? {
            views.entry(name).or_default();
        }
        let (_, cluster) = self.read_cluster().await?;
        for (name, since) in &cluster.disabled {
            views.entry(name.clone()).or_default().disabled = Some((since.at, since.reason.clone()));
        }
        for (name, limits) in &cluster.limits {
            views.entry(name.clone()).or_default().limits = *limits;
        }
        let mut cursor = None;
        loop {
            let query = PageQuery { dispatch: Dispatch::Outstanding, destination: None, limit: PAGE, cursor };
            let page = self.page(query).await?;
            for entry in page.entries {
                let view = views.entry(entry.destination.to_string()).or_default();
                view.outstanding += 1;
                let due = view.next_due.map_or(entry.not_before, |due| due.min(entry.not_before));
                view.next_due = Some(due);
            }
            cursor = page.next;
            if cursor.is_none() {
                return Ok(views);
            }
        }
    }

    /// What became of `id` at each destination of its file.
    pub(super) async fn message(&self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        let Some(file) = self.read_file(id.file).await? else { return Ok(Vec::new()) };
        if id.row == 0 || id.row > file.checkpoint.rows {
            return Ok(Vec::new());
        }
        let report = |fate| MessageReport { id, file_name: file.record.name.clone(), fate };
        let mut reports = Vec::new();
        let step = self.steps(id.file, id.row, 1).await?.pop();
        for destination in &file.record.destinations {
            // The batch that begins at the row or before it.
            let firsts = step.as_ref().and_then(|step| step.firsts.get(destination));
            let firsts = firsts.map_or(&[][..], Vec::as_slice);
            let Some(&first) = firsts.iter().rfind(|&&first| first <= id.row) else { continue };
            let batch = BatchId::derive(id.file, destination, first);
            if let Some(delivery) = self.delivery(id.row, batch).await? {
                reports.push(report(Fate::Message(delivery)));
            }
        }
        if reports.is_empty() {
            reports.extend(self.not_accepted(id).await?.map(report));
        }
        Ok(reports)
    }

    /// Up to `limit` steps of a file from the one with `row` on: where their batches begin.
    async fn steps(&self, id: FileId, row: u64, limit: usize) -> Result<Vec<Step>, StoreError> {
        let range = [(":first", keys::step_sk(row)), (":last", keys::step_sk(u64::MAX))];
        let call = self
            .calls
            .in_partition(keys::file_pk(id), "Sk BETWEEN :first AND :last", range)
            .limit(i32::try_from(limit).unwrap_or(i32::MAX));
        let (items, _) = self.calls.query("looking for a file's batches", call).await?;
        Ok(items.iter().map(Step::read).collect::<Result<_, _>>()?)
    }

    /// What became of the messages of a file at a destination, of the batches that begin before row `before`.
    pub(super) async fn trial(
        &self,
        id: FileId,
        destination: &str,
        before: u64,
    ) -> Result<Trial, StoreError> {
        let mut ids = Vec::new();
        let mut from = 0;
        while from < before {
            let steps = self.steps(id, from, STEPS).await?;
            let firsts = steps.iter().filter_map(|step| step.firsts.get(destination)).flatten();
            let ahead = firsts.filter(|first| **first < before);
            ids.extend(ahead.map(|first| BatchId::derive(id, destination, *first)));
            match steps.last() {
                Some(last) if steps.len() == STEPS => from = last.last_row + 1,
                _ => break,
            }
        }
        let mut known = Records::new();
        self.look_up_all(&mut known, ids, false).await?;
        let mut trial = Trial::default();
        for (id, stored) in known {
            let Some(StoredBatch { record, .. }) = stored else { continue };
            let history = if Trial::needs_history(&record) {
                let pk = keys::batch_pk(id);
                self.calls.partition("reading attempts", &pk, keys::HISTORY_PREFIX).await?
            } else {
                Vec::new()
            };
            let chunks =
                history.iter().map(|chunk| Reading(chunk).bytes(BODY)).collect::<Result<Vec<_>, _>>()?;
            trial.add(&record, chunks).map_err(|_| Damaged(BODY))?;
        }
        Ok(trial)
    }

    async fn delivery(&self, row: u64, id: BatchId) -> Result<Option<Delivery>, StoreError> {
        let mut known = Records::new();
        self.look_up_all(&mut known, [id], false).await?;
        let Some(StoredBatch { destination, rows, record, .. }) = known.remove(&id).flatten() else {
            return Ok(None);
        };
        let Some((index, fate)) = rows.find(row).and_then(|index| Some((index, record.fate(index)?))) else {
            return Ok(None);
        };
        let mut fetched = self.get(&[id]).await?;
        let recipient = match fetched.pop() {
            Some((_, Fetched::Batch(batch))) => {
                let rows = Rows::decode(batch.payload.clone()).map_err(payload_damaged)?;
                let cells = batch.header.layout.read(rows.bytes(index)).map_err(payload_damaged)?;
                Some(cells.recipient.to_owned())
            }
            Some((id, Fetched::Unprocessed)) => {
                return Err(StoreError::Retryable(format!("batch {id} was not read")));
            }
            Some((_, Fetched::Missing)) | None => None,
        };
        let history = self.history(id).await?;
        let chunks = history.iter().map(|chunk| Reading(chunk).bytes(BODY)).collect::<Result<Vec<_>, _>>()?;
        let failed = ledger::codec::failures_of(chunks, index as u32).map_err(|_| Damaged(BODY))?;
        Ok(Some(Delivery::of(destination.to_string(), recipient, fate, failed)))
    }

    /// The items of all failed attempts of a batch.
    pub(super) async fn history(&self, id: BatchId) -> Result<Vec<Item>, StoreError> {
        self.calls.partition("reading attempts", &keys::batch_pk(id), keys::HISTORY_PREFIX).await
    }

    /// Whether a row was rejected or left out as a duplicate.
    async fn not_accepted(&self, id: MessageId) -> Result<Option<Fate>, StoreError> {
        let rejects = self.rejects(id.file, id.row - 1, 1).await?;
        if let Some(reject) = rejects.into_iter().find(|reject| reject.row == id.row) {
            return Ok(Some(Fate::Rejected { line: reject.line, reason: reject.reason }));
        }
        let mut from = None;
        loop {
            let range = [(":first", keys::duplicates_sk(id.row)), (":last", keys::duplicates_sk(u64::MAX))];
            let call = self
                .calls
                .in_partition(keys::file_pk(id.file), "Sk BETWEEN :first AND :last", range)
                .limit(4)
                .set_exclusive_start_key(from);
            let (items, next) = self.calls.query("reading duplicate rows", call).await?;
            for item in &items {
                let rows =
                    codec::decode_row_numbers(Reading(item).bytes(BODY)?).map_err(|_| Damaged(BODY))?;
                if rows.binary_search(&id.row).is_ok() {
                    return Ok(Some(Fate::Duplicate));
                }
                // Chunks are in order, and what a crash left behind repeats them: the next begins later.
                if rows.first().is_some_and(|&first| first > id.row) {
                    return Ok(None);
                }
            }
            from = next;
            if from.is_none() {
                return Ok(None);
            }
        }
    }

    /// Goes on with a search. Every row of a file goes to all its destinations, so the batches of the first
    /// one hold all there is.
    pub(super) async fn search(
        &self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, StoreError> {
        let mut left = batches;
        while left > 0 && search.found.len() < limit {
            let (after_file, row) = search.position.0.split_once(SEPARATOR).unwrap_or_default();
            let (after_file, row) = (after_file.to_owned(), row.parse::<u64>().ok());
            let Some((at, id)) = self.file_at(file, &after_file, row.is_some()).await? else {
                return Ok(false);
            };
            let file = self.read_file(id).await?;
            let destination = file.as_ref().and_then(|file| file.record.destinations.first());
            let found = match destination {
                Some(destination) => self.batches_from(id, destination, row.unwrap_or(0), left).await?,
                None => BTreeMap::new(),
            };
            let ids: Vec<_> = found.values().copied().collect();
            self.search_batches(search, recipient, &ids, limit).await?;
            let is_last = found.len() < left;
            left = left.saturating_sub(found.len());
            search.batches += found.len() as u64;
            let next = found.last_key_value().filter(|_| !is_last).map(|(first, _)| (first + 1).to_string());
            search.position = Position(format!("{at}{SEPARATOR}{}", next.unwrap_or_default()));
        }
        Ok(search.found.len() < limit)
    }

    /// The file that a search is at: the one that stands at `after` if it is not finished, else the next.
    /// With its place.
    async fn file_at(
        &self,
        only: Option<FileId>,
        after: &str,
        is_within: bool,
    ) -> Result<Option<(String, FileId)>, StoreError> {
        if let Some(only) = only {
            let place = only.to_string();
            return Ok((after.is_empty() || is_within).then_some((place, only)));
        }
        let from = if is_within { after.to_owned() } else { format!("{after}\u{1}") };
        let call = self.calls.in_partition(keys::FILES_PK, "Sk >= :from", [(":from", from)]).limit(1);
        let (items, _) = self.calls.query("looking for a file", call).await?;
        let place = |item: &Item| -> Result<_, Damaged> {
            let reading = Reading(item);
            Ok((reading.text(SK)?.to_owned(), reading.file_id(FILE)?))
        };
        Ok(items.first().map(place).transpose()?)
    }

    /// At least `limit` batches of a file for a destination, by their first rows, from `row` on; fewer if there are no more.
    pub(super) async fn batches_from(
        &self,
        id: FileId,
        destination: &str,
        row: u64,
        limit: usize,
    ) -> Result<BTreeMap<u64, BatchId>, StoreError> {
        let mut found: BTreeMap<u64, BatchId> = BTreeMap::new();
        let mut from = row;
        while found.len() < limit {
            let steps = self.steps(id, from, STEPS).await?;
            let firsts = steps.iter().filter_map(|step| step.firsts.get(destination)).flatten();
            let firsts = firsts.filter(|first| **first >= row);
            found.extend(firsts.map(|&first| (first, BatchId::derive(id, destination, first))));
            match steps.last() {
                Some(last) if steps.len() == STEPS => from = last.last_row + 1,
                _ => break,
            }
        }
        Ok(found)
    }

    async fn search_batches(
        &self,
        search: &mut Search,
        recipient: &str,
        batches: &[BatchId],
        limit: usize,
    ) -> Result<(), StoreError> {
        let finder = memchr::memmem::Finder::new(recipient.as_bytes());
        for (id, fetched) in self.get(batches).await? {
            let batch = match fetched {
                Fetched::Batch(batch) => batch,
                // Archived.
                Fetched::Missing => continue,
                Fetched::Unprocessed => {
                    return Err(StoreError::Retryable(format!("batch {id} was not read")));
                }
            };
            let looked = search.look_through(&finder, &batch.header, &batch.payload, limit);
            looked.map_err(payload_damaged)?;
        }
        Ok(())
    }

    /// The recipients of rows, each with the batch that holds it, in their order.
    pub(super) async fn recipients(&self, wanted: &[(BatchId, u64)]) -> Result<Vec<String>, StoreError> {
        let mut ids: Vec<_> = wanted.iter().map(|(batch, _)| *batch).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut batches = HashMap::new();
        for (id, fetched) in self.get(&ids).await? {
            match fetched {
                Fetched::Batch(batch) => {
                    let rows = Rows::decode(batch.payload.clone()).map_err(payload_damaged)?;
                    batches.insert(id, (batch, rows));
                }
                Fetched::Missing => {}
                Fetched::Unprocessed => {
                    return Err(StoreError::Retryable(format!("batch {id} was not read")));
                }
            }
        }
        let recipient = |(id, row): &(BatchId, u64)| {
            let gone = || StoreError::Permanent(format!("row {row} of batch {id} is gone"));
            let (batch, rows) = batches.get(id).ok_or_else(gone)?;
            let index = rows.find(*row).ok_or_else(gone)?;
            let cells = batch.header.layout.read(rows.bytes(index)).map_err(payload_damaged)?;
            Ok(cells.recipient.to_owned())
        };
        wanted.iter().map(recipient).collect()
    }
}
