//! The outbox as a whole: pages, many at once, deleting, counting, archiving.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{ids::BatchId, time::UnixMs},
    ports::{Cursor, Dispatch, Fetched, ItemOutcome, OutboxEntry, Page, PageQuery, StoreError},
};
use serde::{Deserialize, Serialize};

use super::{
    calls::StatementOutcome,
    change::Change,
    item::{
        COUNT, DELIVERY_TIME, DIGEST, DUE, Damaged, Item, OUTSTANDING_CREATED_TIME, PK, Reading, SK, TOPIC,
        TOPIC_SHARD, item, number, text,
    },
    keys,
    payload::PayloadId,
    record::{Records, StoredBatch, kept_until},
    state::Shared,
};

/// Shards of a listing that are looked at together.
const SHARDS_AT_ONCE: usize = 8;

/// More than any configuration has: a cursor with more was not made by this listing.
const SHARDS_MAX: u32 = 10_000;

/// Pages of one step of archiving.
const ARCHIVE_PAGES_MAX: usize = 20;

/// A listing's place, in the cursor as base64 of JSON: shard by shard of one destination after the other, in
/// the order of their names. In a shard batches stand in the order of their times, so a file's batches, which
/// are all in one shard, come in theirs.
#[derive(Clone, Serialize, Deserialize)]
struct ListingPlace {
    version: u32,
    dispatched: bool,
    /// The only one that is listed.
    destination: Option<String>,
    /// How many shards there are: other settings do not change a listing under way.
    shards: u32,
    topic: String,
    shard: u32,
    /// Identity and time of the last one that was listed of this shard.
    after: Option<(String, u64)>,
}

const PLACE_VERSION: u32 = 1;

impl ListingPlace {
    fn time_attribute(&self) -> &'static str {
        if self.dispatched { DELIVERY_TIME } else { OUTSTANDING_CREATED_TIME }
    }

    fn cursor(&self) -> Result<Cursor, StoreError> {
        let json = serde_json::to_vec(self).map_err(|error| StoreError::Permanent(error.to_string()))?;
        Ok(Cursor(URL_SAFE_NO_PAD.encode(json)))
    }

    fn read(cursor: &Cursor) -> Option<Self> {
        let json = URL_SAFE_NO_PAD.decode(&cursor.0).ok()?;
        let place: Self = serde_json::from_slice(&json).ok()?;
        (place.version == PLACE_VERSION && (1..=SHARDS_MAX).contains(&place.shards)).then_some(place)
    }

    /// The shards from this place on.
    fn walk(&self, topics: &[String]) -> Vec<Self> {
        let mut walk = Vec::new();
        for topic in topics.iter().filter(|topic| **topic >= self.topic) {
            let first = if *topic == self.topic { self.shard } else { 0 };
            for shard in first..self.shards {
                let here = *topic == self.topic && shard == self.shard;
                let after = self.after.clone().filter(|_| here);
                walk.push(Self { topic: topic.clone(), shard, after, ..self.clone() });
            }
        }
        walk
    }
}

/// An entry of an index, with its time.
type TimedEntry = (u64, OutboxEntry);

impl Shared {
    pub(super) async fn page(&self, query: PageQuery) -> Result<Page, StoreError> {
        let dispatched = query.dispatch == Dispatch::Dispatched;
        let destination = query.destination.as_deref();
        let place = match &query.cursor {
            Some(cursor) => ListingPlace::read(cursor)
                .filter(|place| (place.dispatched, place.destination.as_deref()) == (dispatched, destination))
                .ok_or_else(|| {
                    StoreError::Permanent("the cursor is from another listing; start without one".into())
                })?,
            None => ListingPlace {
                version: PLACE_VERSION,
                dispatched,
                destination: destination.map(str::to_owned),
                shards: self.settings.keys.shards,
                topic: destination.unwrap_or_default().to_owned(),
                shard: 0,
                after: None,
            },
        };
        if query.limit == 0 {
            return Ok(Page { entries: Vec::new(), next: query.cursor });
        }
        // The seed's lesson: five destinations of twenty shards are a hundred calls for nothing. If all there
        // is fits into the page, a few queries bring it.
        if query.cursor.is_none()
            && destination.is_none()
            && let Some(all) = self.list_all(&place, query.limit).await?
        {
            return Ok(Page { entries: all, next: None });
        }
        let topics: Vec<_> = match destination {
            Some(destination) => vec![destination.to_owned()],
            None => self.known_destinations().await?,
        };
        self.page_of(&place.walk(&topics), query.limit).await
    }

    /// Everything on one side, by time, if it is no more than `limit`: one query per shard.
    async fn list_all(
        &self,
        place: &ListingPlace,
        limit: usize,
    ) -> Result<Option<Vec<OutboxEntry>>, StoreError> {
        let pages = (0..self.settings.all_shards()).map(|shard| {
            let call = if place.dispatched {
                let more = i32::try_from(limit + 1).unwrap_or(i32::MAX);
                self.all_of_shard(keys::DELIVERED_ALL_TOPICS, shard).limit(more)
            } else {
                // It holds what somebody has claimed, too.
                self.all_of_shard(keys::OUTSTANDING_ALL_TOPICS, shard)
                    .filter_expression("attribute_exists(#Created)")
                    .expression_attribute_names("#Created", OUTSTANDING_CREATED_TIME)
            };
            self.calls.query("listing batches", call)
        });
        let pages = stream::iter(pages.collect::<Vec<_>>()).buffered(self.settings.all_shards() as usize);
        let pages: Vec<_> = pages.collect().await;
        let mut all = Vec::new();
        for page in pages {
            let (items, next) = page?;
            all.extend(entries(&items, place.time_attribute())?);
            if next.is_some() || all.len() > limit {
                return Ok(None);
            }
        }
        all.sort_by_key(|(time, entry)| (*time, entry.id));
        Ok(Some(all.into_iter().map(|(_, entry)| entry).collect()))
    }

    /// Fills a page from the shards of a walk, in their order.
    async fn page_of(&self, walk: &[ListingPlace], limit: usize) -> Result<Page, StoreError> {
        let mut listed: Vec<OutboxEntry> = Vec::new();
        let mut last: Option<ListingPlace> = None;
        for places in walk.chunks(SHARDS_AT_ONCE) {
            let room = limit - listed.len();
            // One more than there is room for: a cursor never leads to nothing.
            let pages: Vec<_> = places.iter().map(|place| self.shard_page(place, room + 1)).collect();
            let pages: Vec<_> = stream::iter(pages).buffered(SHARDS_AT_ONCE).collect().await;
            for (place, page) in places.iter().zip(pages) {
                for (time, entry) in page? {
                    if listed.len() == limit {
                        let last = last.expect("a full page has a last entry");
                        return Ok(Page { entries: listed, next: Some(last.cursor()?) });
                    }
                    last = Some(ListingPlace { after: Some((entry.id.to_string(), time)), ..place.clone() });
                    listed.push(entry);
                }
            }
        }
        Ok(Page { entries: listed, next: None })
    }

    /// Up to `limit` entries of one shard.
    async fn shard_page(&self, place: &ListingPlace, limit: usize) -> Result<Vec<TimedEntry>, StoreError> {
        let key = keys::topic_shard_key(&place.topic, place.shard);
        let start = place.after.as_ref().map(|(id, time)| {
            item([
                (PK, text(format!("{}{id}", keys::BATCH_PREFIX))),
                (SK, text(keys::BATCH_SK)),
                (place.time_attribute(), number(*time)),
                (TOPIC_SHARD, text(&*key)),
            ])
        });
        let call = self
            .calls
            .client
            .query()
            .table_name(&self.calls.tables.ledger)
            .index_name(if place.dispatched { keys::DELIVERED } else { keys::OUTSTANDING })
            .key_condition_expression("TopicShard = :shard")
            .expression_attribute_values(":shard", text(&*key))
            .limit(i32::try_from(limit).unwrap_or(i32::MAX));
        // A page may also end at a megabyte.
        let (mut found, mut from) = (Vec::new(), start);
        loop {
            let call = call.clone().set_exclusive_start_key(from);
            let (items, next) = self.calls.query("listing a destination's batches", call).await?;
            found.extend(entries(&items, place.time_attribute())?);
            from = next;
            if from.is_none() || found.len() >= limit {
                found.truncate(limit);
                return Ok(found);
            }
        }
    }

    pub(super) async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError> {
        let mut known = Records::new();
        let unread = self.look_up(&mut known, ids.iter().copied(), true).await?;
        let stored: Vec<_> = known.values().flatten().collect();
        let mut fetched = self.payloads_of(&stored).await?;
        fetched.extend(unread.into_iter().map(|id| (id, Fetched::Unprocessed)));
        // Each may be asked for twice; a batch without a record has none.
        Ok(ids.iter().map(|id| (*id, fetched.get(id).cloned().unwrap_or(Fetched::Missing))).collect())
    }

    /// Takes batches that need nothing any more out of the indexes. What they carried is left to expire: others may
    /// share it.
    pub(super) async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut known = Records::new();
        self.look_up_all(&mut known, ids.iter().copied(), false).await?;
        let mut outcomes: HashMap<BatchId, ItemOutcome> = HashMap::new();
        let mut going = Vec::new();
        for (id, stored) in known {
            // There is nothing to archive, or nobody knows what it needs.
            let Some(stored) = stored else {
                outcomes.insert(id, ItemOutcome::Ok);
                continue;
            };
            match stored.record.why_kept() {
                Some(why) => {
                    outcomes.insert(id, ItemOutcome::Permanent(format!("batch {id} is kept: {why}")));
                }
                None => going.push(id),
            }
        }
        let ledger = &self.calls.tables.ledger;
        let archive = |id: &BatchId| {
            Change::of(ledger, StoredBatch::key(*id)).remove(TOPIC_SHARD).remove(DELIVERY_TIME).statement()
        };
        let archived = self.calls.execute("archiving batches", going.iter().map(archive).collect()).await;
        for (id, answer) in going.into_iter().zip(archived) {
            self.forget_record(id);
            let outcome = match answer {
                // Refused: the record does not exist, so there is nothing to archive.
                StatementOutcome::Done | StatementOutcome::Refused => ItemOutcome::Ok,
                StatementOutcome::Failed(outcome) => outcome,
            };
            outcomes.insert(id, outcome);
        }
        Ok(ids.iter().map(|id| (*id, outcomes[id].clone())).collect())
    }

    pub(super) async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut progress = self.archive.lock().await;
        let mut removed = 0;
        for _ in 0..ARCHIVE_PAGES_MAX {
            if removed >= limit {
                break;
            }
            // What was delivered before then was accepted before; what is needed yet is passed over.
            let call = self
                .all_of_shard(keys::DELIVERED_ALL_TOPICS, progress.shard)
                .key_condition_expression("#Shard = :shard AND #DeliveryTime < :before")
                .expression_attribute_names("#DeliveryTime", DELIVERY_TIME)
                .expression_attribute_values(":before", number(before.0.saturating_mul(1_000)))
                .limit(i32::try_from(limit - removed).unwrap_or(i32::MAX).clamp(1, 1_000))
                .set_exclusive_start_key(progress.from.take());
            let (items, next) = self.calls.query("looking for old batches", call).await?;
            let found: Vec<(BatchId, PayloadId, UnixMs)> = items
                .iter()
                .map(|item| {
                    let reading = Reading(item);
                    Ok((keys::batch_of_key(item)?, reading.text(DIGEST)?.parse()?, kept_until(item)?))
                })
                .collect::<Result<_, Damaged>>()?;
            let ids: Vec<_> = found.iter().map(|(id, ..)| *id).collect();
            let outcomes = self.delete(&ids).await?;
            removed += outcomes.iter().filter(|(_, outcome)| *outcome == ItemOutcome::Ok).count();
            let is_kept = |(_, (_, outcome)): &(_, &(_, ItemOutcome))| *outcome != ItemOutcome::Ok;
            let kept = found.into_iter().zip(&outcomes).filter(is_kept).map(|(found, _)| found);
            self.keep_payloads(kept).await?;
            progress.from = next;
            if progress.from.is_none() {
                progress.shard = (progress.shard + 1) % self.settings.all_shards();
                if progress.shard == 0 {
                    break;
                }
            }
        }
        Ok(removed)
    }
}

/// Entries of an index and their times.
fn entries(items: &[Item], time: &'static str) -> Result<Vec<TimedEntry>, Damaged> {
    let entry = |item: &Item| {
        let reading = Reading(item);
        let entry = OutboxEntry {
            id: keys::batch_of_key(item)?,
            destination: reading.text(TOPIC)?.into(),
            count: reading.number(COUNT)?,
            not_before: reading.time(DUE)?,
        };
        Ok((reading.number(time)?, entry))
    };
    items.iter().map(entry).collect()
}
