//! Receipts out of the inbox, into the rows of their messages.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::{
        ids::FileId,
        receipt::{Receipt, ReceiptKey, Standing, fold},
        time::UnixMs,
    },
    ports::Applied,
};
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    values::{self, Day},
    waiting::{self, Columns, Waiting, columns},
};

/// The oldest first, up to `$1` of them or the first that together have more than `$2` bytes. The lock is on all
/// that were looked at, until the end of the transaction.
const TAKE_OUT: &str = concat!(
    "
WITH looked_at AS (
    SELECT number, bytes FROM receipt_inbox ORDER BY number LIMIT $1 FOR UPDATE SKIP LOCKED
), taken AS (
    SELECT number FROM (
        SELECT number, sum(bytes) OVER (ORDER BY number) - bytes AS before FROM looked_at) summed
     WHERE before <= $2
)
DELETE FROM receipt_inbox WHERE number = ANY (ARRAY(SELECT number FROM taken)) RETURNING number, ",
    columns!()
);

/// The messages of provider ids, in the partitions of `$3` to before `$4`: of several the latest, for a provider that
/// uses an id again means the newer one, and a receipt is about one message.
///
/// OFFSET keeps the inner query as it is: a look into the index per id. A table that was never analyzed (a new
/// partition in its first minute) looks as if another plan were cheap, and that one takes minutes.
const FIND: &str = "
SELECT DISTINCT ON (k.n) k.n, m.day, m.file, m.row
  FROM unnest($2::text[]) WITH ORDINALITY AS k (provider_id, n),
       LATERAL (SELECT day, file, row, accepted_at FROM messages
                 WHERE destination = $1 AND provider_id = k.provider_id AND day >= $3 AND day < $4
                OFFSET 0) m
 ORDER BY k.n, m.day DESC, m.accepted_at DESC, m.file DESC, m.row DESC";

/// Locks the rows of one partition in everybody's order (F50), joins them with the standings under that lock, and
/// writes those that say something else now. Told is which rows there are, and what changed.
///
/// An interim receipt (state 3) makes no message sent: that is for the receiver's 2xx to say (I2).
const JOIN: &str = "
WITH incoming AS (
    SELECT * FROM unnest($2::uuid[], $3::bigint[], $4::integer[], $5::smallint[], $6::timestamptz[], $7::uuid[],
                         $8::smallint[], $9::text[], $10::text[], $11::text[], $12::timestamptz[], $13::bigint[])
             WITH ORDINALITY
          AS r (file, row, destination, state, at, event, told, status, carrier, response, sent_at, price, n)
), locked AS (
    SELECT m.file, m.row, m.destination, r.n, m.provider_id, m.state AS state_before, m.told AS told_before,
           CASE WHEN r.state > 3 THEN greatest(m.state, r.state) ELSE m.state END AS state,
           m.told | r.told AS told,
           m.receipt_event IS NULL
               OR (r.state, coalesce(r.at, 'epoch'), r.event)
                > (m.receipt_state, coalesce(m.receipt_at, 'epoch'), m.receipt_event) AS is_greater,
           r.state AS receipt_state, r.at AS receipt_at, r.event AS receipt_event,
           r.status, r.carrier, r.response, r.sent_at, r.price
      FROM incoming r
      JOIN messages m ON m.day = $1 AND m.file = r.file AND m.row = r.row AND m.destination = r.destination
     ORDER BY m.file, m.row, m.destination
       FOR UPDATE OF m
), written AS (
    UPDATE messages m SET
           state = l.state,
           told = l.told,
           updated_at = $14,
           receipt_state = CASE WHEN l.is_greater THEN l.receipt_state ELSE m.receipt_state END,
           receipt_at = CASE WHEN l.is_greater THEN l.receipt_at ELSE m.receipt_at END,
           receipt_event = CASE WHEN l.is_greater THEN l.receipt_event ELSE m.receipt_event END,
           provider_status = CASE WHEN l.is_greater THEN l.status ELSE m.provider_status END,
           carrier = CASE WHEN l.is_greater THEN l.carrier ELSE m.carrier END,
           response = CASE WHEN l.is_greater THEN l.response ELSE m.response END,
           provider_sent_at = CASE WHEN l.is_greater THEN l.sent_at ELSE m.provider_sent_at END,
           price = CASE WHEN l.is_greater THEN l.price * 0.00000001 ELSE m.price END
      FROM locked l
     WHERE m.day = $1 AND m.file = l.file AND m.row = l.row AND m.destination = l.destination
       AND (l.is_greater OR l.told <> l.told_before)
), changes AS (
    INSERT INTO status_changes (file, row, at, destination, before, state, provider_id)
    SELECT file, row, $14, destination, state_before, state, provider_id
      FROM locked WHERE $15 AND state <> state_before
)
SELECT n, state <> state_before, told = 3 AND told_before <> 3 FROM locked";

/// A row, in everybody's order.
type Place = (Reverse<Day>, FileId, i64, i32);

/// What a batch says of one row, and by which keys.
struct Target {
    standing: Standing,
    keys: Vec<(i32, ReceiptKey)>,
}

impl Shared {
    pub(super) async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, Failure> {
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        let applied = self.within(self.apply_with(&transaction, receipts, bytes, at)).await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        Ok(applied)
    }

    async fn apply_with(
        &self,
        transaction: &Transaction<'_>,
        receipts: usize,
        bytes: usize,
        at: UnixMs,
    ) -> Result<Applied, Failure> {
        let (limit, bytes) = (clamp(receipts), clamp(bytes));
        let statement = transaction.prepare_cached(TAKE_OUT).await?;
        let rows = transaction.query(&statement, &[&limit, &bytes]).await?;
        let taken = rows.iter().map(Waiting::read).collect::<Result<Vec<_>, _>>()?;
        let mut applied = Applied::default();
        if taken.is_empty() {
            return Ok(applied);
        }
        let targets = targets(transaction, &taken).await?;
        let mut known: BTreeSet<(i32, ReceiptKey)> = BTreeSet::new();
        let mut targets = targets.into_iter().peekable();
        while let Some(((Reverse(day), ..), _)) = targets.peek() {
            let day = *day;
            let mut partition = Vec::new();
            while let Some(target) = targets.next_if(|((Reverse(other), ..), _)| *other == day) {
                partition.push(target);
            }
            let joined = self.join(transaction, day, &partition, at).await?;
            for (index, has_changed, is_conflict) in joined {
                applied.changed += u64::from(has_changed);
                applied.conflicts += u64::from(is_conflict);
                known.extend(partition[index].1.keys.iter().cloned());
            }
        }
        let is_known =
            |waiting: &&Waiting| known.contains(&(waiting.destination, waiting.receipt.key.clone()));
        let parked: Vec<_> = taken.iter().filter(|waiting| !is_known(waiting)).collect();
        waiting::park(transaction, &parked, at).await?;
        applied.parked = parked.len() as u64;
        applied.matched = (taken.len() - parked.len()) as u64;
        Ok(applied)
    }

    /// Which of `rows` there are, by index; whether its state changed; whether it is a conflict from now on.
    async fn join(
        &self,
        transaction: &Transaction<'_>,
        day: Day,
        rows: &[(Place, Target)],
        at: UnixMs,
    ) -> Result<Vec<(usize, bool, bool)>, Failure> {
        let best: Vec<&Receipt> = rows.iter().map(|(_, target)| &target.standing.best).collect();
        let c = Columns::of(&best);
        let files: Vec<_> = rows.iter().map(|((_, file, ..), _)| values::file(*file)).collect();
        let numbers: Vec<_> = rows.iter().map(|((_, _, row, _), _)| *row).collect();
        let destinations: Vec<_> = rows.iter().map(|((.., destination), _)| *destination).collect();
        let told: Vec<_> =
            rows.iter().map(|(_, Target { standing, .. })| i16::from(standing.told.0)).collect();
        let statement = transaction.prepare_cached(JOIN).await?;
        let joined = transaction
            .query(
                &statement,
                &[
                    &day,
                    &files,
                    &numbers,
                    &destinations,
                    &c.states,
                    &c.ats,
                    &c.events,
                    &told,
                    &c.statuses,
                    &c.carriers,
                    &c.responses,
                    &c.sent_ats,
                    &c.prices,
                    &values::time(at),
                    &self.keep_changes,
                ],
            )
            .await?;
        // Ordinality counts from 1.
        Ok(joined.iter().map(|row| (row.get::<_, i64>(0) as usize - 1, row.get(1), row.get(2))).collect())
    }
}

fn clamp(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// What the batch says of each row that may be there. Rows are not locked, and those of our ids may not exist.
async fn targets(
    transaction: &Transaction<'_>,
    taken: &[Waiting],
) -> Result<BTreeMap<Place, Target>, Failure> {
    let mut by_destination: BTreeMap<i32, Vec<Receipt>> = BTreeMap::new();
    for waiting in taken {
        by_destination.entry(waiting.destination).or_default().push(waiting.receipt.clone());
    }
    let days = days(transaction, taken).await?;
    let mut targets: BTreeMap<Place, Target> = BTreeMap::new();
    for (destination, receipts) in by_destination {
        let standings = fold(receipts);
        let provider_ids = standings.keys().filter_map(|key| match key {
            ReceiptKey::Provider(id) => Some(values::text(id)),
            ReceiptKey::Message(_) => None,
        });
        let found = find(transaction, destination, provider_ids.collect()).await?;
        for (key, standing) in standings {
            let place = match &key {
                ReceiptKey::Message(id) => days.get(&id.file).map(|day| (*day, id.file, values::row(id.row))),
                ReceiptKey::Provider(id) => found.get(&**id).copied(),
            };
            let Some((day, file, row)) = place else { continue };
            // By our id and by the provider's id: one row, one standing.
            if let Some(target) = targets.get_mut(&(Reverse(day), file, row, destination)) {
                target.standing.merge(standing);
                target.keys.push((destination, key));
            } else {
                let target = Target { standing, keys: vec![(destination, key)] };
                targets.insert((Reverse(day), file, row, destination), target);
            }
        }
    }
    Ok(targets)
}

/// The partitions of the files that receipts name.
async fn days(transaction: &Transaction<'_>, taken: &[Waiting]) -> Result<HashMap<FileId, Day>, Failure> {
    let files: BTreeSet<_> = taken
        .iter()
        .filter_map(|waiting| match waiting.receipt.key {
            ReceiptKey::Message(id) => Some(id.file),
            ReceiptKey::Provider(_) => None,
        })
        .collect();
    if files.is_empty() {
        return Ok(HashMap::new());
    }
    let files: Vec<_> = files.into_iter().map(values::file).collect();
    let query = transaction.prepare_cached("SELECT file, day FROM files WHERE file = ANY($1)").await?;
    let rows = transaction.query(&query, &[&files]).await?;
    Ok(rows.iter().map(|row| (FileId(row.get::<_, Uuid>(0).into_bytes()), row.get(1))).collect())
}

/// The rows that provider ids name. Most receipts are about what was sent in the latest two partitions: only what is
/// not there is looked for in all others, so that their number does not matter.
async fn find(
    transaction: &Transaction<'_>,
    destination: i32,
    mut missing: Vec<Cow<'_, str>>,
) -> Result<HashMap<String, (Day, FileId, i64)>, Failure> {
    let mut found = HashMap::new();
    if missing.is_empty() {
        return Ok(found);
    }
    let latest =
        "SELECT first_day FROM partitions WHERE first_day <= current_date ORDER BY first_day DESC LIMIT 2";
    let latest = transaction.query(&transaction.prepare_cached(latest).await?, &[]).await?;
    let mut bounds: Vec<Day> = vec![Day::LATEST];
    bounds.extend(latest.iter().map(|row| row.get::<_, Day>(0)));
    bounds.push(Day::EARLIEST);
    let statement = transaction.prepare_cached(FIND).await?;
    for pair in bounds.windows(2) {
        let (before, from) = (pair[0], pair[1]);
        let rows = transaction.query(&statement, &[&destination, &missing, &from, &before]).await?;
        for row in rows {
            let id = &missing[row.get::<_, i64>(0) as usize - 1];
            found.insert(
                id.clone().into_owned(),
                (row.get(1), FileId(row.get::<_, Uuid>(2).into_bytes()), row.get(3)),
            );
        }
        missing.retain(|id| !found.contains_key(&**id));
        if missing.is_empty() {
            break;
        }
    }
    Ok(found)
}
