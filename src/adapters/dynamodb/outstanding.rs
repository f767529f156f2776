//! `Outbox::outstanding` and `mark_dispatched`.
//!
//! What this process appended it knows ([`super::fresh`]). The index is only swept, now and then, for what
//! nobody else will dispatch: batches of a process that is gone, retries that were not remembered, and
//! whatever did not fit. A sweep reads a bounded number of pages and the next one goes on where it stopped.

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
        COUNT, DELIVERY_TIME, Damaged, FENCE, Item, MESSAGE_ID, NOT_BEFORE, OUTSTANDING_CREATED_TIME, OWNER,
        Reading, TOPIC, item, number, text,
    },
    record::Record,
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
            id: reading.batch_id(MESSAGE_ID)?,
            destination: reading.text(TOPIC)?.into(),
            count: reading.number(COUNT)?,
            not_before: reading.time(NOT_BEFORE)?,
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
        let OutstandingQuery { due_by, limit, with_batches, except } = query;
        self.sweep_if_due(due_by, limit, except).await?;
        let mut entries = self.fresh().due(due_by, limit, except);
        if !with_batches {
            return Ok(entries);
        }
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
        self.take_found(found).await
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
            .table_name(&self.calls.tables.outbox)
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
            .table_name(&self.calls.tables.outbox)
            .index_name(schema::OUTSTANDING)
            .key_condition_expression("TopicShard = :shard")
            .filter_expression(filter)
            .set_expression_attribute_names(Some(names))
            .set_expression_attribute_values(Some(values))
            .limit(SHARD_PAGE);
        let (items, _) = self.calls.query("looking for a destination's batches", call).await?;
        Ok(read(&items, wanted).into_iter().filter(|swept| wanted.takes(self, swept)).collect())
    }

    /// Remembers what a sweep found, unless it has moved on: the index is behind, and a batch that was
    /// claimed is dispatched though it may not be marked.
    async fn take_found(&self, found: Vec<Swept>) -> Result<(), StoreError> {
        let news: Vec<_> = {
            let fresh = self.fresh();
            found.into_iter().filter(|swept| !fresh.contains(swept.entry.id)).collect()
        };
        if news.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = news.iter().map(|swept| Record::key(swept.entry.id)).collect();
        let ledger = &self.calls.tables.ledger;
        let records = self
            .calls
            .get_many(
                "looking at swept batches",
                ledger,
                &keys,
                Some(&[super::item::PK, super::item::SK, FENCE]),
            )
            .await?;
        let mut dispatched = Vec::new();
        for (swept, record) in news.into_iter().zip(records) {
            match record {
                Got::Item(record) if Reading(&record).number::<u64>(FENCE)? > 0 => {
                    dispatched.push(swept.entry.id);
                }
                Got::Item(_) => self.fresh().found(swept.entry, swept.created),
                // Left behind by a delete; or not looked at, and found again by the next sweep.
                Got::Missing | Got::Unprocessed => {}
            }
        }
        self.mark_dispatched(&dispatched).await;
        Ok(())
    }

    pub(super) async fn mark_dispatched(&self, ids: &[BatchId]) -> Vec<(BatchId, ItemOutcome)> {
        let table = &self.calls.tables.outbox;
        let mut distinct = ids.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let statement = format!(
            "UPDATE \"{table}\" SET {DELIVERY_TIME}=? REMOVE {OUTSTANDING_CREATED_TIME} \
             WHERE {MESSAGE_ID}=? AND {OUTSTANDING_CREATED_TIME} IS NOT MISSING"
        );
        // In the order asked for, so that batches of one file are dispatched in their order.
        let mut stamps: HashMap<BatchId, u64> = HashMap::new();
        for &id in ids {
            stamps.entry(id).or_insert_with(|| self.stamp());
        }
        let statements = distinct
            .iter()
            .map(|id| (statement.clone(), vec![number(stamps[id]), text(id.to_string())]))
            .collect();
        let answers = self.calls.execute("marking batches as dispatched", statements).await;
        let mut outcomes: HashMap<BatchId, ItemOutcome> = HashMap::new();
        let mut refused = Vec::new();
        for (&id, answer) in distinct.iter().zip(answers) {
            match answer {
                Stated::Done => {
                    self.dispatched(id);
                    outcomes.insert(id, ItemOutcome::Ok);
                }
                Stated::Refused => refused.push(id),
                Stated::Failed(outcome) => {
                    outcomes.insert(id, outcome);
                }
            }
        }
        outcomes.extend(self.judge_refused(&refused).await);
        ids.iter().map(|id| (*id, outcomes[id].clone())).collect()
    }

    fn dispatched(&self, id: BatchId) {
        self.fresh().remove(id);
        super::state::lock(&self.expiring).marked(id);
    }

    /// Batches that are not outstanding: marked before, or not there at all?
    async fn judge_refused(&self, refused: &[BatchId]) -> Vec<(BatchId, ItemOutcome)> {
        if refused.is_empty() {
            return Vec::new();
        }
        let keys: Vec<_> = refused.iter().map(|id| item([(MESSAGE_ID, text(id.to_string()))])).collect();
        let table = &self.calls.tables.outbox;
        let found = self.calls.get_many("looking for batches", table, &keys, Some(&[MESSAGE_ID])).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let outcome = super::calls::outcome(error);
                return refused.iter().map(|id| (*id, outcome.clone())).collect();
            }
        };
        let mut outcomes = Vec::with_capacity(refused.len());
        for (&id, got) in refused.iter().zip(found) {
            let outcome = match got {
                Got::Item(_) => ItemOutcome::Ok,
                Got::Missing => ItemOutcome::Permanent(format!("no batch {id} is stored")),
                Got::Unprocessed => ItemOutcome::Retryable("the batch was not looked for".into()),
            };
            if !matches!(outcome, ItemOutcome::Retryable(_)) {
                self.dispatched(id);
            }
            outcomes.push((id, outcome));
        }
        outcomes
    }
}

type Filter = (String, HashMap<String, String>, HashMap<String, AttributeValue>);

impl Wanted<'_> {
    /// The filter that the service applies; the time of creation only where it may be filtered by.
    fn filter(&self, shared: &Shared, by_created: bool) -> Filter {
        let mut names = HashMap::from([("#NotBefore".to_owned(), NOT_BEFORE.to_owned())]);
        let mut values = HashMap::from([(":due".to_owned(), number(self.due_by.0))]);
        let mut filter = String::from("#NotBefore <= :due");
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
