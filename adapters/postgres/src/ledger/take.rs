//! Taking receipts into the inbox, or among the rejects.
//!
//! Arrivals of one source that wait for each other are taken together, in one transaction (group commit): a request costs its
//! share of a sync, not a sync. Each is answered by itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::{
        call::FailureKind,
        receipt::{EventId, Receipt, ReceiptReject},
        time::UnixMs,
    },
    ports::{Arrival, SourceCursor, Taken},
};
use tokio::sync::oneshot;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{Shared, connect, error::Failure, values, waiting::put};

/// Receipts per transaction (F53): some megabytes, some tens of milliseconds. Also what is taken together.
const PART: usize = 4096;

/// Rejects per transaction: they bring their texts, some megabytes at most.
const REJECTS_PART: usize = 256;

/// How exact a source's `receipts_at` is: whoever moves it holds its row until the commit, and others wait.
const NOTE_EVERY_MS: u64 = 1000;

/// One event of each id that is known: see `EventId::same_id`. LIMIT: a mapping may give every receipt the same id; and a look into
/// the index per id.
const KNOWN_IDS: &str = "
SELECT l.event FROM unnest($2::uuid[], $3::uuid[]) AS k (least, greatest),
       LATERAL (SELECT event FROM receipt_events WHERE source = $1 AND event BETWEEN k.least AND k.greatest LIMIT 1) l";

/// Those of these events that are known. OFFSET: a look into the index per event.
const KNOWN_EVENTS: &str = "
SELECT l.event FROM unnest($2::uuid[]) AS k (event),
       LATERAL (SELECT event FROM receipt_events WHERE source = $1 AND event = k.event OFFSET 0) l";

/// Events that were looked for and not found. To insert them and to look for conflicts takes three times as long, so that is
/// for those who have met one.
const REMEMBER: &str = "
INSERT INTO receipt_events (source, event, at) SELECT $1, event, $3 FROM unnest($2::uuid[]) event RETURNING event";
const REMEMBER_NEW: &str = "
INSERT INTO receipt_events (source, event, at) SELECT $1, event, $3 FROM unnest($2::uuid[]) event
    ON CONFLICT DO NOTHING RETURNING event";

/// Those that are new. One whose event is known was taken before, when it could be read. OFFSET: a look into the index per
/// reject.
const REJECT: &str = "
INSERT INTO receipt_rejects (source, event, at, happened_at, is_whole, place, reason, text)
SELECT $1, r.event, $2, r.happened_at, r.is_whole, r.place, r.reason, r.text
  FROM unnest($3::uuid[], $4::timestamptz[], $5::boolean[], $6::text[], $7::text[], $8::text[])
    AS r (event, happened_at, is_whole, place, reason, text)
 WHERE NOT EXISTS (SELECT FROM receipt_events e WHERE e.source = $1 AND e.event = r.event OFFSET 0)
    ON CONFLICT DO NOTHING
RETURNING event";

const NOTE: &str = "
UPDATE sources SET destination = $2, cursor = coalesce($3, cursor), receipts_at = coalesce($4, receipts_at),
       cursor_at = coalesce($5, cursor_at)
 WHERE id = $1";

/// Postgres' manual, appendix A.
const UNIQUE_VIOLATION: &str = "23505";

/// What sources bring, until it is taken. Only callers that wait for their answer have something in here.
#[derive(Default)]
pub(super) struct Sources(Mutex<HashMap<Arc<str>, Source>>);

#[derive(Default)]
struct Source {
    waiting: VecDeque<Job>,
    /// Whether a task takes what waits.
    is_served: bool,
    known: Option<KnownSource>,
}

/// What the row of a source says. Its number never changes.
#[derive(Clone, Copy)]
struct KnownSource {
    id: i32,
    /// As this process noted it, which is when others may have noted more.
    destination: Option<i32>,
    receipts_at: UnixMs,
}

/// An arrival that waits for its turn.
struct Job {
    arrival: Arrival,
    answer: oneshot::Sender<Result<Taken, Failure>>,
}

impl Sources {
    fn with<T>(&self, source: &Arc<str>, work: impl FnOnce(&mut Source) -> T) -> T {
        let mut sources: MutexGuard<'_, HashMap<_, _>> =
            self.0.lock().expect("nobody panics while holding it");
        work(sources.entry(Arc::clone(source)).or_default())
    }

    /// The next arrivals that are taken together; none: the source is served no more.
    fn next(&self, source: &Arc<str>) -> Vec<Job> {
        self.with(source, |source| {
            let mut jobs: Vec<Job> = Vec::new();
            let (mut receipts, mut rejects) = (0, 0);
            while let Some(Job { arrival, .. }) = source.waiting.front() {
                (receipts, rejects) = (receipts + arrival.receipts.len(), rejects + arrival.rejects.len());
                let is_too_much = receipts > PART || rejects > REJECTS_PART;
                let fits = |first: &Job| !is_too_much && first.arrival.destination == arrival.destination;
                if !jobs.first().is_none_or(fits) {
                    break;
                }
                jobs.extend(source.waiting.pop_front());
            }
            source.is_served = !jobs.is_empty();
            jobs
        })
    }
}

/// Ends the service of a source that ends by a panic.
struct Service<'a> {
    sources: &'a Sources,
    source: &'a Arc<str>,
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.sources.with(self.source, |source| {
                source.is_served = false;
                // They get no answer, and their callers know what that means.
                source.waiting.clear();
            });
        }
    }
}

impl Shared {
    /// Waits its turn, and for those that are taken with it. A caller that goes away cuts off nobody.
    pub(super) async fn take(self: &Arc<Self>, arrival: Arrival) -> Result<Taken, Failure> {
        let (answer, answered) = oneshot::channel();
        let source = Arc::clone(&arrival.source);
        let is_served = self.sources.with(&source, |source| {
            source.waiting.push_back(Job { arrival, answer });
            std::mem::replace(&mut source.is_served, true)
        });
        if !is_served {
            let shared = Arc::clone(self);
            tokio::spawn(async move { shared.serve(&source).await });
        }
        let lost = |_| Err(Failure::new(FailureKind::Unknown, "the task that took the receipts has failed"));
        answered.await.unwrap_or_else(lost)
    }

    /// Takes what waits, until nothing does: whoever comes then begins anew.
    async fn serve(&self, source: &Arc<str>) {
        let _service = Service { sources: &self.sources, source };
        loop {
            let jobs = self.sources.next(source);
            if jobs.is_empty() {
                return;
            }
            self.take_jobs(jobs).await;
        }
    }

    async fn take_jobs(&self, mut jobs: Vec<Job>) {
        jobs.retain(|job| !job.answer.is_closed());
        if jobs.is_empty() {
            return;
        }
        let arrivals: Vec<_> = jobs.iter().map(|job| &job.arrival).collect();
        match self.take_together(&arrivals).await {
            Ok(taken) => {
                for (job, taken) in jobs.into_iter().zip(taken) {
                    // A caller that is gone wants no answer.
                    let _ = job.answer.send(Ok(taken));
                }
            }
            // One of them is refused, and the others have nothing to do with it.
            Err(failure) if failure.is_refusal() && jobs.len() > 1 => {
                for job in jobs {
                    let taken = self.take_together(&[&job.arrival]).await;
                    let _ = job.answer.send(taken.map(|taken| taken[0]));
                }
            }
            Err(failure) => {
                for job in jobs {
                    let _ = job.answer.send(Err(failure.0.clone().into()));
                }
            }
        }
    }

    /// Arrivals of one source for one destination; what of each is new.
    async fn take_together(&self, arrivals: &[&Arrival]) -> Result<Vec<Taken>, Failure> {
        let first = arrivals[0];
        let known = self.known_source(&first.source, &first.destination).await?;
        let mut seen = HashSet::new();
        let receipts = arrivals.iter().flat_map(|arrival| &arrival.receipts);
        let receipts: Vec<_> = receipts.filter(|receipt| seen.insert(receipt.event)).collect();
        let mut seen = HashSet::new();
        let rejects = arrivals.iter().flat_map(|arrival| &arrival.rejects);
        let mut rejects: Vec<_> = rejects.filter(|reject| seen.insert(reject.event)).collect();
        rejects.sort_by_key(|reject| reject.event);
        let has_receipts = !receipts.is_empty() || !rejects.is_empty();
        let cursor = arrivals.iter().rev().find_map(|arrival| arrival.cursor.as_ref());
        let at = arrivals.iter().map(|arrival| arrival.at).max().unwrap_or(first.at);

        let parts = receipts.len().div_ceil(PART).max(rejects.len().div_ceil(REJECTS_PART)).max(1);
        let mut new = NewEvents::default();
        for part in 0..parts {
            let part = TakePart {
                known,
                receipts: receipts.chunks(PART).nth(part).unwrap_or_default(),
                rejects: rejects.chunks(REJECTS_PART).nth(part).unwrap_or_default(),
                cursor: cursor.filter(|_| part + 1 == parts),
                receipts_at: has_receipts.then_some(at),
                at,
            };
            self.take_part(&first.source, &part, &mut new).await?;
        }
        Ok(arrivals.iter().map(|arrival| new.of(arrival)).collect())
    }

    async fn take_part(
        &self,
        source: &Arc<str>,
        part: &TakePart<'_>,
        new: &mut NewEvents,
    ) -> Result<(), Failure> {
        match self.take_part_with(source, part, new, Others::Unexpected).await {
            // Another process took some of them at the same time.
            Err(Failure(failure)) if failure.code.as_deref() == Some(UNIQUE_VIOLATION) => {
                self.take_part_with(source, part, new, Others::Expected).await
            }
            taken => taken,
        }
    }

    async fn take_part_with(
        &self,
        source: &Arc<str>,
        part: &TakePart<'_>,
        new: &mut NewEvents,
        others: Others,
    ) -> Result<(), Failure> {
        let TakePart { known: (known, destination), cursor, at, .. } = *part;
        let is_old = |receipts_at: &UnixMs| receipts_at.0.abs_diff(known.receipts_at.0) >= NOTE_EVERY_MS;
        let is_noted = known.destination == Some(destination);
        let receipts_at = part.receipts_at.filter(|receipts_at| is_old(receipts_at) || !is_noted);
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        let at = values::time(at);
        let (events, rejects) = self
            .within(async {
                let mut events = BTreeMap::new();
                if !part.receipts.is_empty() {
                    let wanted = part.receipts.iter().map(|receipt| receipt.event);
                    events = remember(&transaction, known.id, wanted, at, others).await?;
                    let is_new = |receipt: &&Receipt| events.contains_key(&receipt.event);
                    let fresh: Vec<_> = part.receipts.iter().copied().filter(is_new).collect();
                    put(&transaction, known.id, destination, &fresh).await?;
                }
                let rejects = reject(&transaction, known.id, part.rejects, at).await?;
                if cursor.is_some() || receipts_at.is_some() || !is_noted {
                    // Last: whoever takes for the same source waits here, with nothing held that we need.
                    let note = transaction.prepare_cached(NOTE).await?;
                    let cursor = cursor.map(|SourceCursor(cursor)| cursor);
                    let (receipts_at, cursor_at) = (receipts_at.map(values::time), cursor.map(|_| at));
                    let values: [&(dyn ToSql + Sync); 5] =
                        [&known.id, &destination, &cursor, &receipts_at, &cursor_at];
                    transaction.execute(&note, &values).await?;
                }
                Ok((events, rejects))
            })
            .await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        new.events.extend(events);
        new.rejects.extend(rejects);
        self.sources.with(source, |source| {
            let receipts_at = receipts_at.unwrap_or(known.receipts_at);
            source.known = Some(KnownSource { destination: Some(destination), receipts_at, ..known });
        });
        Ok(())
    }

    /// A source, and the number of its destination; both get a number if they have none.
    async fn known_source(&self, name: &Arc<str>, destination: &str) -> Result<(KnownSource, i32), Failure> {
        let destination =
            self.names.destination_ids(&self.connections, self.timeouts, [destination]).await?[destination];
        if let Some(known) = self.sources.with(name, |source| source.known) {
            return Ok((known, destination));
        }
        let held = self.connections.hold().await?;
        let id = self
            .within(async {
                let client = held.client();
                let find = client.prepare_cached("SELECT id FROM sources WHERE name = $1").await?;
                if let Some(row) = client.query_opt(&find, &[&&**name]).await? {
                    return Ok(row.get(0));
                }
                let insert = "INSERT INTO sources (name, destination) VALUES ($1, $2) ON CONFLICT DO NOTHING";
                client.execute(insert, &[&&**name, &destination]).await?;
                Ok(client.query_one(&find, &[&&**name]).await?.get(0))
            })
            .await?;
        held.keep();
        Ok((KnownSource { id, destination: None, receipts_at: UnixMs(0) }, destination))
    }

    /// The same, by their numbers.
    pub(super) async fn source_id(&self, name: &Arc<str>, destination: &str) -> Result<(i32, i32), Failure> {
        let (known, destination) = self.known_source(name, destination).await?;
        Ok((known.id, destination))
    }

    pub(super) async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, Failure> {
        let held = self.connections.hold().await?;
        let query = "SELECT cursor FROM sources WHERE name = $1";
        let row = self.within(async { Ok(held.client().query_opt(query, &[&source]).await?) }).await?;
        held.keep();
        Ok(row.and_then(|row| row.get::<_, Option<String>>(0)).map(SourceCursor))
    }

    /// What a query counts.
    pub(super) async fn depth(&self, query: &'static str) -> Result<u64, Failure> {
        let held = self.connections.hold().await?;
        let row = self.within(async { Ok(held.client().query_one(query, &[]).await?) }).await?;
        held.keep();
        Ok(row.get::<_, i64>(0).cast_unsigned())
    }
}

/// What one transaction takes.
struct TakePart<'a> {
    known: (KnownSource, i32),
    receipts: &'a [&'a Receipt],
    rejects: &'a [&'a ReceiptReject],
    cursor: Option<&'a SourceCursor>,
    /// When receipts or rejects came, if any did.
    receipts_at: Option<UnixMs>,
    at: UnixMs,
}

/// What was not known before.
#[derive(Default)]
pub(super) struct NewEvents {
    /// With each whether its id was.
    events: BTreeMap<EventId, bool>,
    rejects: HashSet<EventId>,
}

impl NewEvents {
    /// Of receipts that were remembered.
    pub(super) fn remembered(events: BTreeMap<EventId, bool>) -> Self {
        Self { events, rejects: HashSet::new() }
    }

    /// What of these receipts is new: the first of each event.
    pub(super) fn count<'a>(&mut self, receipts: impl IntoIterator<Item = &'a Receipt>) -> Taken {
        let mut taken = Taken::default();
        for receipt in receipts {
            let Some(is_id_known) = self.events.remove(&receipt.event) else {
                taken.known += 1;
                continue;
            };
            taken.new += 1;
            taken.reused_ids += u64::from(is_id_known);
            // Whatever else is new under this id comes second.
            let (least, greatest) = receipt.event.same_id();
            for (_, is_id_known) in self.events.range_mut(least..=greatest) {
                *is_id_known = true;
            }
        }
        taken
    }

    fn of(&mut self, arrival: &Arrival) -> Taken {
        let rejected = arrival.rejects.iter().filter(|reject| self.rejects.remove(&reject.event)).count();
        Taken { rejected: rejected as u64, ..self.count(&arrival.receipts) }
    }
}

/// Whether others may remember the same events at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    /// Nearly never: it fails if they do.
    Unexpected,
    /// It happens.
    Expected,
}

/// Makes events known; those that were not, and whether their id was.
pub(super) async fn remember(
    transaction: &Transaction<'_>,
    source: i32,
    events: impl Iterator<Item = EventId>,
    at: SystemTime,
    others: Others,
) -> Result<BTreeMap<EventId, bool>, Failure> {
    let uuid = |event: EventId| Uuid::from_bytes(event.0);
    // In order: two that take the same wait for each other in one direction.
    let events: BTreeSet<EventId> = events.collect();
    let ids: BTreeSet<_> = events.iter().map(|event| event.same_id()).collect();
    let (least, greatest): (Vec<_>, Vec<_>) =
        ids.into_iter().map(|(least, greatest)| (uuid(least), uuid(greatest))).unzip();
    let look = transaction.prepare_cached(KNOWN_IDS).await?;
    let mut known = found(&transaction.query(&look, &[&source, &least, &greatest]).await?);
    let id = |event: &EventId| event.same_id().0;
    let known_ids: HashSet<_> = known.iter().map(id).collect();
    let is_id_known = |event: EventId| known_ids.contains(&id(&event));
    let unsure: Vec<_> =
        events.difference(&known).copied().filter(|event| is_id_known(*event)).map(uuid).collect();
    if !unsure.is_empty() {
        let look = transaction.prepare_cached(KNOWN_EVENTS).await?;
        known.append(&mut found(&transaction.query(&look, &[&source, &unsure]).await?));
    }
    let new: Vec<_> = events.difference(&known).copied().map(uuid).collect();
    if new.is_empty() {
        return Ok(BTreeMap::new());
    }
    let insert = match others {
        Others::Unexpected => REMEMBER,
        Others::Expected => REMEMBER_NEW,
    };
    let insert = transaction.prepare_cached(insert).await?;
    let rows = transaction.query(&insert, &[&source, &new, &at]).await?;
    Ok(found(&rows).into_iter().map(|event| (event, is_id_known(event))).collect())
}

/// Keeps rejects; those that are new.
async fn reject(
    transaction: &Transaction<'_>,
    source: i32,
    rejects: &[&ReceiptReject],
    at: SystemTime,
) -> Result<BTreeSet<EventId>, Failure> {
    if rejects.is_empty() {
        return Ok(BTreeSet::new());
    }
    let all = || rejects.iter();
    let events: Vec<_> = all().map(|reject| Uuid::from_bytes(reject.event.0)).collect();
    let happened: Vec<_> = all().map(|reject| reject.at.map(values::time)).collect();
    let whole: Vec<_> = all().map(|reject| reject.text.is_whole).collect();
    let places: Vec<_> = all().map(|reject| values::text(&reject.place)).collect();
    let reasons: Vec<_> = all().map(|reject| values::text(&reject.reason)).collect();
    let texts: Vec<_> = all().map(|reject| values::text(&reject.text.text)).collect();
    let statement = transaction.prepare_cached(REJECT).await?;
    let values: [&(dyn ToSql + Sync); 8] =
        [&source, &at, &events, &happened, &whole, &places, &reasons, &texts];
    Ok(found(&transaction.query(&statement, &values).await?))
}

/// The events that a query found.
fn found(rows: &[Row]) -> BTreeSet<EventId> {
    rows.iter().map(|row| EventId(row.get::<_, Uuid>(0).into_bytes())).collect()
}
