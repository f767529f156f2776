//! `DispatchSource`: what is outstanding, and marking it as dispatched.
//!
//! What this process appended or left to be tried again it knows ([`super::fresh`]). The index is only swept, now and
//! then, for what nobody else will dispatch: batches of a process that is gone, and whatever did not fit. A sweep reads
//! a bounded number of pages and the next one goes on where it stopped.
//!
//! A mark names since when the batch was outstanding: by the time it is written, a worker may have claimed the batch
//! and left it to be tried again, and that is to be dispatched once more.

use std::{collections::HashMap, sync::Arc};

use aws_sdk_dynamodb::types::AttributeValue;
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{
        ids::BatchId,
        time::{MonoMs, UnixMs},
    },
    ports::{Fetched, ItemOutcome, OutboxEntry, OutstandingQuery, StoreError},
};

use super::{
    calls::{Got, PARALLEL_CALLS, Stated},
    item::{
        COUNT, DELIVERY_TIME, DUE, Damaged, Item, OUTSTANDING_CREATED_TIME, OWNER, PK, Reading, SK, TOPIC,
        number, text,
    },
    record::{Stored, Waiting},
    schema,
    state::Shared,
};

/// Pages per segment in one sweep.
const PAGES_MAX: usize = 4;

/// Entries that a query for one shard of one destination looks at.
const SHARD_PAGE: i32 = 100;

/// Where the sweeps stand.
#[derive(Default)]
pub(super) struct Sweep {
    last: Option<MonoMs>,
    /// Where each segment goes on; `None`: at its beginning.
    segments: Vec<Option<Item>>,
    /// Something of this process's own was dropped before the pass under way or the next one began.
    own: bool,
}

/// An entry of the index.
struct Swept {
    entry: OutboxEntry,
    created: u64,
    owner: String,
}

impl Swept {
    fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        let entry = OutboxEntry {
            id: reading.batch_of_key()?,
            destination: reading.text(TOPIC)?.into(),
            count: reading.number(COUNT)?,
            not_before: reading.time(DUE)?,
            batch: None,
        };
        let created = reading.number(OUTSTANDING_CREATED_TIME)?;
        Ok(Self { entry, created, owner: reading.maybe_text(OWNER)?.unwrap_or_default().to_owned() })
    }
}

/// Whose entries a sweep takes.
struct Wanted<'a> {
    due_by: UnixMs,
    /// Of other processes only what is older, in microseconds.
    created_by: u64,
    own: bool,
    except: &'a [Arc<str>],
}

impl Shared {
    /// Segments of a scan.
    pub(super) fn segments(&self) -> u16 {
        self.settings.scan_concurrency.max(1)
    }

    pub(super) async fn outstanding(
        &self,
        query: OutstandingQuery<'_>,
    ) -> Result<Vec<OutboxEntry>, StoreError> {
        let OutstandingQuery { due_by, limit, except } = query;
        self.sweep_if_due(due_by, limit, except).await?;
        let mut entries = self.fresh().due(due_by, limit, except);
        let missing: Vec<_> =
            entries.iter().filter(|entry| entry.batch.is_none()).map(|entry| entry.id).collect();
        if missing.is_empty() {
            return Ok(entries);
        }
        let mut fetched: HashMap<_, _> = self.get(&missing).await?.into_iter().collect();
        for entry in &mut entries {
            match fetched.remove(&entry.id) {
                Some(Fetched::Batch(batch)) => entry.batch = Some(batch),
                Some(Fetched::Missing) => {
                    self.fresh().remove(entry.id);
                }
                Some(Fetched::Unprocessed) | None => {}
            }
        }
        // What could not be read this time is offered the next time.
        entries.retain(|entry| entry.batch.is_some());
        Ok(entries)
    }

    async fn sweep_if_due(
        &self,
        due_by: UnixMs,
        limit: usize,
        except: &[Arc<str>],
    ) -> Result<(), StoreError> {
        // One at a time; who comes meanwhile gets what is known.
        let Ok(mut sweep) = self.sweep.try_lock() else { return Ok(()) };
        let now = self.clock.mono();
        if sweep.last.is_some_and(|last| now.since(last) < self.settings.sweep_interval) {
            return Ok(());
        }
        sweep.own |= self.fresh().take_dropped();
        let created_by = self
            .clock
            .wall()
            .0
            .saturating_sub(self.settings.sweep_after.as_millis() as u64)
            .saturating_mul(1_000);
        let wanted = Wanted { due_by, created_by, own: sweep.own, except };
        let mut found = Vec::new();
        let is_whole = match self.scan(&mut sweep, &wanted, limit, &mut found).await {
            Ok(is_whole) => is_whole,
            Err(error) => {
                // Not again at once.
                sweep.last = Some(now);
                return Err(error);
            }
        };
        if is_whole {
            sweep.own = false;
        } else if !except.is_empty() && found.len() < limit {
            // Those that can't be dispatched crowd the index: the others are asked for by name.
            self.query_others(&wanted, limit, &mut found).await?;
        }
        sweep.last = Some(self.clock.mono());
        drop(sweep);
        let taken = self.take_found(found).await;
        if taken.is_err() && wanted.own {
            self.fresh().note_dropped();
        }
        taken
    }

    /// Scans on, at most [`PAGES_MAX`] pages per segment. Whether every segment came to its end.
    async fn scan(
        &self,
        sweep: &mut Sweep,
        wanted: &Wanted<'_>,
        limit: usize,
        found: &mut Vec<Swept>,
    ) -> Result<bool, StoreError> {
        let segments = self.segments();
        sweep.segments.resize(segments.into(), None);
        let mut open: Vec<_> = (0..segments).collect();
        for _ in 0..PAGES_MAX {
            let pages = open.iter().map(|&segment| {
                self.scan_page(segment, sweep.segments[usize::from(segment)].clone(), wanted)
            });
            let pages: Vec<_> =
                stream::iter(pages.collect::<Vec<_>>()).buffered(segments.into()).collect().await;
            let mut still_open = Vec::new();
            for (&segment, page) in open.iter().zip(pages) {
                let (entries, next) = page?;
                found.extend(entries);
                if next.is_some() {
                    still_open.push(segment);
                }
                sweep.segments[usize::from(segment)] = next;
            }
            open = still_open;
            if open.is_empty() || found.len() >= limit {
                break;
            }
        }
        Ok(open.is_empty())
    }

    async fn scan_page(
        &self,
        segment: u16,
        from: Option<Item>,
        wanted: &Wanted<'_>,
    ) -> Result<(Vec<Swept>, Option<Item>), StoreError> {
        let mut call = self
            .calls
            .client
            .scan()
            .table_name(&self.calls.tables.ledger)
            .index_name(schema::OUTSTANDING_ALL_TOPICS)
            .segment(segment.into())
            .total_segments(self.segments().into())
            .limit(self.settings.page_size.max(1).into())
            .set_exclusive_start_key(from);
        let (filter, names, values) = wanted.filter(self, true);
        call = call.filter_expression(filter);
        call = call.set_expression_attribute_names(Some(names)).set_expression_attribute_values(Some(values));
        let output = self.calls.scan("sweeping the outbox", call).await?;
        Ok((read(&output.items.unwrap_or_default(), wanted), output.last_evaluated_key))
    }

    /// Asks for the other destinations, each shard of theirs from its oldest on.
    async fn query_others(
        &self,
        wanted: &Wanted<'_>,
        limit: usize,
        found: &mut Vec<Swept>,
    ) -> Result<(), StoreError> {
        let others = self.settings.destinations.iter().filter(|name| !wanted.except.contains(name));
        let keys: Vec<_> = others
            .flat_map(|name| (0..self.settings.shards).map(|shard| schema::topic_shard_key(name, shard)))
            .collect();
        let mut pages =
            stream::iter(keys).map(|key| self.query_shard(key, wanted)).buffer_unordered(PARALLEL_CALLS);
        while let Some(page) = pages.next().await {
            found.extend(page?);
            if found.len() >= limit {
                break;
            }
        }
        Ok(())
    }

    async fn query_shard(&self, key: String, wanted: &Wanted<'_>) -> Result<Vec<Swept>, StoreError> {
        // In a query the range key can't be filtered by.
        let (filter, names, mut values) = wanted.filter(self, false);
        values.insert(":shard".into(), text(key));
        let call = self
            .calls
            .client
            .query()
            .table_name(&self.calls.tables.ledger)
            .index_name(schema::OUTSTANDING)
            .key_condition_expression("TopicShard = :shard")
            .filter_expression(filter)
            .set_expression_attribute_names(Some(names))
            .set_expression_attribute_values(Some(values))
            .limit(SHARD_PAGE);
        let (items, _) = self.calls.query("looking for a destination's batches", call).await?;
        Ok(read(&items, wanted).into_iter().filter(|swept| wanted.takes(self, swept)).collect())
    }

    /// Remembers what a sweep found, as it stands now: the index is behind.
    async fn take_found(&self, found: Vec<Swept>) -> Result<(), StoreError> {
        let news: Vec<_> = {
            let fresh = self.fresh();
            found.into_iter().filter(|swept| !fresh.contains(swept.entry.id, swept.created)).collect()
        };
        if news.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = news.iter().map(|swept| Stored::key(swept.entry.id)).collect();
        let attributes = [PK, SK, OUTSTANDING_CREATED_TIME, DUE];
        let ledger = &self.calls.tables.ledger;
        let records =
            self.calls.get_many("looking at swept batches", ledger, &keys, Some(&attributes)).await?;
        for (swept, record) in news.into_iter().zip(records) {
            // What is missing has been deleted; what was not looked at is found again by the next sweep.
            let Got::Item(record) = record else { continue };
            let reading = Reading(&record);
            // Without one it was dispatched or claimed meanwhile.
            if let Some(created) = reading.maybe_number(OUTSTANDING_CREATED_TIME)? {
                let entry = OutboxEntry { not_before: reading.time(DUE)?, ..swept.entry };
                self.fresh().found(entry, created);
            }
        }
        Ok(())
    }

    /// Takes note that a batch is outstanding again: this process dispatches it when it is due.
    pub(super) fn waits(&self, stored: &Stored, waiting: Waiting) {
        let entry = OutboxEntry {
            id: stored.id,
            destination: stored.destination.clone(),
            count: stored.rows.len() as u32,
            not_before: waiting.due,
            batch: None,
        };
        self.fresh().again(entry, waiting.created);
    }

    pub(super) async fn mark_dispatched(&self, ids: &[BatchId]) -> Vec<(BatchId, ItemOutcome)> {
        let table = &self.calls.tables.ledger;
        let statement = format!(
            "UPDATE \"{table}\" SET {DELIVERY_TIME}=? REMOVE {OUTSTANDING_CREATED_TIME} \
             WHERE {PK}=? AND {SK}=? AND {OUTSTANDING_CREATED_TIME}=?"
        );
        let mut distinct: Vec<BatchId> = Vec::with_capacity(ids.len());
        let mut statements = Vec::with_capacity(ids.len());
        let mut marked = Vec::with_capacity(ids.len());
        let mut unknown = Vec::new();
        // In the order asked for, so that batches of one file are dispatched in their order.
        for &id in ids {
            if distinct.contains(&id) {
                continue;
            }
            distinct.push(id);
            let Some(created) = self.fresh().take_offered(id) else {
                unknown.push(id);
                continue;
            };
            let key = [text(schema::batch_pk(id)), text(schema::BATCH_SK)];
            let parameters = [number(self.stamp())].into_iter().chain(key).chain([number(created)]);
            statements.push((statement.clone(), parameters.collect()));
            marked.push((id, created));
        }
        let answers = self.calls.execute("marking batches as dispatched", statements).await;
        let mut outcomes: HashMap<BatchId, ItemOutcome> = HashMap::new();
        for ((id, created), answer) in marked.into_iter().zip(answers) {
            match answer {
                Stated::Done => {
                    self.fresh().remove_created(id, created);
                    outcomes.insert(id, ItemOutcome::Ok);
                }
                Stated::Refused => {
                    self.fresh().remove_created(id, created);
                    unknown.push(id);
                }
                Stated::Failed(outcome) => {
                    self.fresh().offered(id, created);
                    outcomes.insert(id, outcome);
                }
            }
        }
        // What is known here is stored.
        unknown.retain(|&id| {
            let is_known = self.cached_record(id).is_some();
            if is_known {
                outcomes.insert(id, ItemOutcome::Ok);
            }
            !is_known
        });
        outcomes.extend(self.look_for(&unknown).await);
        ids.iter().map(|id| (*id, outcomes[id].clone())).collect()
    }

    /// Batches that are not outstanding as they were: marked or claimed before, or not there at all?
    async fn look_for(&self, ids: &[BatchId]) -> Vec<(BatchId, ItemOutcome)> {
        if ids.is_empty() {
            return Vec::new();
        }
        let keys: Vec<_> = ids.iter().map(|id| Stored::key(*id)).collect();
        let table = &self.calls.tables.ledger;
        let found = self.calls.get_many("looking for batches", table, &keys, Some(&[PK, SK])).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let outcome = super::calls::outcome(error);
                return ids.iter().map(|id| (*id, outcome.clone())).collect();
            }
        };
        let outcome = |id: BatchId, got| match got {
            Got::Item(_) => ItemOutcome::Ok,
            Got::Missing => ItemOutcome::Permanent(format!("no batch {id} is stored")),
            Got::Unprocessed => ItemOutcome::Retryable("the batch was not looked for".into()),
        };
        ids.iter().zip(found).map(|(&id, got)| (id, outcome(id, got))).collect()
    }
}

type Filter = (String, HashMap<String, String>, HashMap<String, AttributeValue>);

impl Wanted<'_> {
    /// The filter that the service applies; the time of creation only where it may be filtered by.
    fn filter(&self, shared: &Shared, by_created: bool) -> Filter {
        let mut names = HashMap::from([("#Due".to_owned(), DUE.to_owned())]);
        let mut values = HashMap::from([(":due".to_owned(), number(self.due_by.0))]);
        let mut filter = String::from("#Due <= :due");
        if by_created {
            names.insert("#Created".into(), OUTSTANDING_CREATED_TIME.into());
            names.insert("#Owner".into(), OWNER.into());
            values.insert(":old".into(), number(self.created_by));
            values.insert(":node".into(), text(format!("{}-", shared.node)));
            values.insert(":me".into(), text(&shared.settings.process));
            // An earlier life of this process dispatches nothing any more.
            filter.push_str(" AND (#Created <= :old OR (begins_with(#Owner, :node) AND #Owner <> :me)");
            filter.push_str(if self.own { " OR #Owner = :me)" } else { ")" });
        }
        (filter, names, values)
    }

    /// The same rule, for where the service can't apply it.
    fn takes(&self, shared: &Shared, swept: &Swept) -> bool {
        let me = &shared.settings.process;
        swept.created <= self.created_by
            || (swept.owner != *me && swept.owner.starts_with(&format!("{}-", shared.node)))
            || (self.own && swept.owner == *me)
    }
}

/// Reads entries of an index, those left out that can't be dispatched now.
fn read(items: &[Item], wanted: &Wanted<'_>) -> Vec<Swept> {
    let mut entries = Vec::with_capacity(items.len());
    for item in items {
        match Swept::read(item) {
            Ok(swept) if wanted.except.contains(&swept.entry.destination) => {}
            Ok(swept) => entries.push(swept),
            Err(error) => {
                tracing::error!(%error, "an entry of the outbox's index can't be read and is left out");
            }
        }
    }
    entries
}
