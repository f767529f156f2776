//! What is due (B20): this process's own from memory ([`super::waiting`]), what others left from the index.
//!
//! Each batch that is not done stands in the index `OutstandingAllTopics` at the time when somebody should look at it: a
//! while after it is due, so that its own process has sent a hint of it by then. A sweep reads what has to be looked at,
//! with one query per shard, and looks at the records: the index is behind.
//!
//! - What this process knows to wait it keeps for a while longer, before others look: one conditional write.
//! - A batch that somebody works on is looked at again when his claim runs out.
//! - What nobody has is taken over: one process wins it, lists it as due, and goes on so while nobody claims it. So what
//!   a queue has lost goes out again by itself, and a hint is sent by one process at a time.

use std::time::Duration;

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{ids::BatchId, ledger::is_earlier_life, time::UnixMs},
    ports::{DestinationDepth, DueBatch, DueQuery, Hint, Origin, StoreError, Want},
};

use super::{
    cache::lock,
    calls::StatementOutcome,
    change::{Change, Statement, When},
    index::{IndexCount, IndexEntry, count, read},
    item::{LOOK_AT, OWNER, SHARD, VERSION, number, text, time},
    keys,
    record::{Records, StoredBatch},
    state::Shared,
    waiting::Waiting,
};

/// Batches that one sweep keeps: 40 calls.
const KEPT_MAX: usize = 1_000;

/// Entries of the index, over all shards, that a sweep reads whole: some 100 KB, 13 read units.
const WHOLE_MAX: usize = 400;

/// Pages of each shard that the first sweep of a process reads, in search of what its last life left.
const FIRST_PAGES_MAX: usize = 8;

/// How long a count of all that waits stands, for each page that it took.
const COUNT_AGE_PER_PAGE: Duration = Duration::from_secs(2);

impl Shared {
    pub(super) async fn due(&self, query: DueQuery<'_>) -> Result<Vec<DueBatch>, StoreError> {
        self.sweep_if_due(query.process).await?;
        self.confirm(query.confirm).await?;
        if self.waiting().is_empty() {
            return Ok(Vec::new());
        }
        let cluster = self.cluster_state().await?;
        let waits = |waiting: &Waiting| {
            let (file, destination) = (waiting.file, &waiting.batch.destination);
            cluster.hold_of(file, destination, waiting.first_row).is_some()
                || self.is_closed(file, destination, query.due_by)
        };
        Ok(self.waiting().due(&query, waits))
    }

    pub(super) async fn first_turns(&self, want: &Want, due_by: UnixMs) -> Result<Vec<Hint>, StoreError> {
        if self.waiting().is_empty() {
            return Ok(Vec::new());
        }
        let cluster = self.cluster_state().await?;
        if cluster.disabled.contains_key(&*want.destination) {
            return Ok(Vec::new());
        }
        let waits = |waiting: &Waiting| {
            let (file, destination) = (waiting.file, &waiting.batch.destination);
            cluster.hold_of(file, destination, waiting.first_row).is_some()
                || self.is_closed(file, destination, due_by)
        };
        let priority = |waiting: &Waiting| {
            let ordered = cluster.priority_of(waiting.file, &waiting.batch.destination);
            ordered.unwrap_or(waiting.priority)
        };
        Ok(self.waiting().first_turns(want, due_by, waits, priority))
    }

    /// Forgets which of these batches somebody has, or are done.
    async fn confirm(&self, ids: &[BatchId]) -> Result<(), StoreError> {
        let mut known = Records::new();
        self.look_up(&mut known, ids.iter().copied(), false).await?;
        for (id, stored) in known {
            let waits =
                stored.is_some_and(|stored| stored.record.holder.is_none() && !stored.record.is_settled());
            if !waits {
                self.waiting().remove(id);
            }
        }
        Ok(())
    }

    async fn sweep_if_due(&self, process: &str) -> Result<(), StoreError> {
        // One at a time; who comes meanwhile gets what is known.
        let Ok(mut sweep) = self.sweep.try_lock() else { return Ok(()) };
        let now = self.clock.mono();
        let is_first = match sweep.last {
            Some(last) if now.since(last) < self.settings.sweep_interval => return Ok(()),
            last => last.is_none(),
        };
        // Not again at once if it fails.
        let before = sweep.last.replace(now);
        let swept = async {
            if is_first {
                let found = self.left_by_last_life(process).await?;
                self.look_at_found(found, process).await?;
            }
            self.keep_what_waits().await?;
            let (found, is_large) = self.to_be_looked_at(process, sweep.is_large).await?;
            sweep.is_large = is_large;
            self.look_at_found(found, process).await
        };
        let swept = swept.await;
        if is_first && swept.is_err() {
            sweep.last = before;
        }
        swept
    }

    /// Reads every shard, a page of each; whether that is much. As long as it is little it reads all there is, which counts
    /// what waits without a further call.
    async fn to_be_looked_at(
        &self,
        process: &str,
        is_large: bool,
    ) -> Result<(Vec<IndexEntry>, bool), StoreError> {
        let now = self.store_now();
        let pages = (0..self.settings.all_shards()).map(|shard| async move {
            let call = self
                .all_of_shard(keys::OUTSTANDING_ALL_TOPICS, shard)
                .limit(self.settings.page_size.max(1).into());
            let call = if is_large {
                call.key_condition_expression("#Shard = :shard AND #LookAt <= :now")
                    .expression_attribute_names("#LookAt", LOOK_AT)
                    .expression_attribute_values(":now", time(now))
            } else {
                call
            };
            self.calls.query("sweeping the outbox", call).await
        });
        let pages = stream::iter(pages.collect::<Vec<_>>()).buffered(self.settings.all_shards() as usize);
        let pages: Vec<_> = pages.collect().await;
        let (mut found, mut is_whole) = (Vec::new(), !is_large);
        for page in pages {
            let (items, next) = page?;
            is_whole &= next.is_none();
            found.extend(read(&items));
        }
        if is_whole {
            let until = self.clock.mono().after(self.settings.sweep_interval * 2);
            *lock(&self.counted) = Some((until, count(&found, self.clock.wall())));
        }
        let is_large = if is_large { found.len() > WHOLE_MAX } else { !is_whole || found.len() > WHOLE_MAX };
        let is_left_to_others = |swept: &IndexEntry| {
            swept.owner != self.settings.process
                && !is_earlier(&swept.owner, process)
                && swept.look_at.after(self.settings.take_over_after) > now
        };
        let waiting = self.waiting();
        found.retain(|swept| {
            swept.look_at <= now && !is_left_to_others(swept) && waiting.created(swept.id).is_none()
        });
        Ok((found, is_large))
    }

    /// What an earlier life of this process left is taken up at once, however long others would leave it.
    async fn left_by_last_life(&self, process: &str) -> Result<Vec<IndexEntry>, StoreError> {
        let mut found = Vec::new();
        for shard in 0..self.settings.all_shards() {
            let mut from = None;
            for _ in 0..FIRST_PAGES_MAX {
                let node = process.rsplit_once('-').map_or(process, |(node, _)| node);
                let call = self
                    .all_of_shard(keys::OUTSTANDING_ALL_TOPICS, shard)
                    .filter_expression("begins_with(#Owner, :node)")
                    .expression_attribute_names("#Owner", OWNER)
                    .expression_attribute_values(":node", text(format!("{node}-")))
                    .set_exclusive_start_key(from);
                let (items, next) = self.calls.query("looking for what the last life left", call).await?;
                found.extend(read(&items).into_iter().filter(|swept| is_earlier(&swept.owner, process)));
                from = next;
                if from.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Has others look later at what this process lists as due. What somebody else looks after by now is listed no more.
    async fn keep_what_waits(&self) -> Result<(), StoreError> {
        let now = self.store_now();
        let known = self.waiting().to_be_kept(now, KEPT_MAX);
        self.keep_payloads(known.iter().map(|known| (known.batch.id, known.payload.0, known.payload.1)))
            .await?;
        let look_at = now.after(self.settings.kept_for);
        let keep = |known: &Waiting| {
            Change::of(&self.calls.tables.ledger, StoredBatch::key(known.batch.id))
                .set(LOOK_AT, time(look_at))
                .when(When::Is(OWNER, text(&*self.settings.process)))
                .when(When::Exists(LOOK_AT))
                .statement()
        };
        let kept = self.calls.execute("keeping what is due", known.iter().map(keep).collect()).await;
        let mut waiting = self.waiting();
        for (Waiting { batch, created, .. }, answer) in known.into_iter().zip(kept) {
            match answer {
                StatementOutcome::Done => waiting.kept(batch.id, created, look_at),
                StatementOutcome::Refused => waiting.remove_until(batch.id, created),
                StatementOutcome::Failed(_) => {} // tried again by the next sweep
            }
        }
        Ok(())
    }

    /// A change that lets others look at a batch at another time, if nobody has changed that meanwhile.
    fn look_later(&self, id: BatchId, seen: UnixMs, at: UnixMs) -> Change<'_> {
        Change::of(&self.calls.tables.ledger, StoredBatch::key(id))
            .set(LOOK_AT, time(at))
            .when(When::Is(LOOK_AT, time(seen)))
    }

    /// Looks at the records of what a sweep found, and takes over what nobody has.
    async fn look_at_found(&self, found: Vec<IndexEntry>, process: &str) -> Result<(), StoreError> {
        if found.is_empty() {
            return Ok(());
        }
        let mut known = Records::new();
        self.look_up(&mut known, found.iter().map(|swept| swept.id), false).await?;
        let now = self.store_now();
        let mut statements: Vec<Statement> = Vec::new();
        let mut taken: Vec<Option<Waiting>> = Vec::new();
        let mut payloads = Vec::new();
        for swept in &found {
            // What is missing is gone or was not read; what is settled, the index does not know yet.
            let Some(Some(stored)) = known.get(&swept.id) else { continue };
            let Some(due) = stored.record.due() else { continue };
            payloads.push((stored.id, stored.payload, stored.kept_until));
            let (look_at, waiting) = match &stored.record.holder {
                Some(holder) => {
                    let until = UnixMs(holder.until.0).after(self.settings.clock_margin);
                    let is_mine = is_earlier(&holder.name, process);
                    if until >= now && !is_mine {
                        (until.after(self.settings.grace), None)
                    } else {
                        let origin = if is_mine { Origin::Mine } else { Origin::Found };
                        (now.after(self.settings.kept_for), Some((due.min(now), origin)))
                    }
                }
                None => (due.max(now).after(self.settings.kept_for), Some((due, Origin::Found))),
            };
            let mut change = self
                .look_later(swept.id, swept.look_at, look_at)
                .when(When::Is(VERSION, number(stored.version)));
            if waiting.is_some() {
                change = change.set(OWNER, text(&*self.settings.process));
            }
            statements.push(change.statement());
            let created = self.stamp();
            taken.push(waiting.map(|(due, origin)| Waiting::of(stored, due, created, look_at, origin)));
        }
        self.keep_payloads(payloads).await?;
        let answers = self.calls.execute("taking over what is due", statements).await;
        let mut waiting = self.waiting(); // no further call is made
        for (taken, answer) in taken.into_iter().zip(answers) {
            // Refused: another process was faster. What was not answered is found again.
            if let (Some(taken), StatementOutcome::Done) = (taken, answer) {
                waiting.insert(taken);
            }
        }
        Ok(())
    }

    /// Every destination's messages by where they stand.
    pub(super) async fn depths(&self, now: UnixMs) -> Result<Vec<DestinationDepth>, StoreError> {
        Ok(self.counted(now).await?.depths)
    }

    pub(super) async fn count_outstanding(&self) -> Result<u64, StoreError> {
        Ok(self.counted(self.clock.wall()).await?.outstanding)
    }

    /// All that stands in the index, as a sweep has counted it, or read now. It costs what there is to read, so the answer
    /// stands for longer the more that is.
    async fn counted(&self, now: UnixMs) -> Result<IndexCount, StoreError> {
        let asked = self.clock.mono();
        if let Some((until, known)) = &*lock(&self.counted)
            && asked < *until
        {
            return Ok(known.clone());
        }
        let shards = (0..self.settings.all_shards()).map(|shard| self.whole_shard(shard));
        let shards = stream::iter(shards.collect::<Vec<_>>()).buffered(self.settings.all_shards() as usize);
        let shards: Vec<_> = shards.collect().await;
        let (mut entries, mut pages) = (Vec::new(), 1);
        for shard in shards {
            let (found, read) = shard?;
            entries.extend(found);
            pages = pages.max(read);
        }
        let counted = count(&entries, now);
        // One page is looked at anew each time.
        let stands = COUNT_AGE_PER_PAGE * (pages - 1).min(1_000);
        *lock(&self.counted) = Some((asked.after(stands), counted.clone()));
        Ok(counted)
    }

    async fn whole_shard(&self, shard: u32) -> Result<(Vec<IndexEntry>, u32), StoreError> {
        let (mut entries, mut from, mut pages) = (Vec::new(), None, 0);
        loop {
            let call = self.all_of_shard(keys::OUTSTANDING_ALL_TOPICS, shard).set_exclusive_start_key(from);
            let (items, next) = self.calls.query("counting what waits", call).await?;
            pages += 1;
            entries.extend(read(&items));
            from = next;
            if from.is_none() {
                return Ok((entries, pages));
            }
        }
    }

    /// A query for all of a shard of an index over all destinations.
    pub(super) fn all_of_shard(&self, index: &str, shard: u32) -> QueryFluentBuilder {
        self.calls
            .client
            .query()
            .table_name(&self.calls.tables.ledger)
            .index_name(index)
            .key_condition_expression("#Shard = :shard")
            .expression_attribute_names("#Shard", SHARD)
            .expression_attribute_values(":shard", number(shard))
    }
}

/// Whether a name is that of an earlier life of `process`, or of a worker of one.
fn is_earlier(name: &str, process: &str) -> bool {
    let life = name.split('/').next().unwrap_or_default();
    is_earlier_life(&format!("{life}/"), &format!("{process}/"))
}
