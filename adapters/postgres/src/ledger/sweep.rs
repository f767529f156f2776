//! Timed work: joining again, giving up, expiring, listing changes, retiring. Each call is a bounded step and skips
//! what another worker has locked.

use std::sync::Mutex;

use postrider_actors::{
    model::{
        call::FailureKind,
        ids::{FileId, MessageId},
        state::MessageState,
        time::UnixMs,
    },
    ports::StatusChange,
};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{
    Shared,
    error::Failure,
    values::{self, Day, unix},
    waiting::{return_sql, state},
};

/// Parked receipts per look whether their message is known.
const WINDOW: i64 = 1000;

/// Looks per call.
const WINDOWS_MAX: u32 = 20;

/// The number of the parked receipt up to which they were looked at in this round.
#[derive(Default)]
pub(super) struct Rejoining(Mutex<i64>);

/// OFFSET: a look per receipt, never a walk over all messages.
const REJOIN: &str = return_sql!(
    "FOR UPDATE SKIP LOCKED",
    "SELECT p.number FROM receipt_parked p \
      WHERE p.number > $1 AND p.number <= $2 AND NOT p.orphan \
        AND (EXISTS (SELECT FROM files f, messages m \
                      WHERE f.file = p.file AND m.day = f.day AND m.file = f.file \
                        AND m.row = p.row AND m.destination = p.destination OFFSET 0) \
             OR EXISTS (SELECT FROM messages m \
                         WHERE m.destination = p.destination AND m.provider_id = p.provider_id OFFSET 0)) \
      ORDER BY p.number LIMIT $3"
);

const ORPHAN: &str = "
UPDATE receipt_parked SET orphan = true
 WHERE number = ANY (ARRAY(SELECT number FROM receipt_parked WHERE NOT orphan AND since < $1
                            ORDER BY since, number LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// By the index of what was not looked at. A row that another transaction has locked is skipped, and met
/// again the next time. `$6` is sent, `$7` expired.
const EXPIRE: &str = "
WITH looked_at AS (
    SELECT day, file, row, state = $6 AND reported = 0 AS is_due, reported = 0 AND state IN ($6, $7) AS is_open FROM messages
     WHERE destination = $1 AND sweep = 0 AND recorded_at < $2
     ORDER BY recorded_at LIMIT $3
       FOR UPDATE SKIP LOCKED
), swept AS (
    UPDATE messages m SET
           sweep = CASE WHEN is_open THEN 1 ELSE 2 END,
           state = CASE WHEN is_due THEN $7 ELSE state END,
           updated_at = CASE WHEN is_due THEN $4 ELSE updated_at END
      FROM looked_at l
     WHERE m.day = l.day AND m.file = l.file AND m.row = l.row AND m.destination = $1
    RETURNING m.file, m.row, m.provider_id, is_due
), changes AS (
    INSERT INTO status_changes (file, row, at, destination, before, state, provider_id)
    SELECT file, row, $4, $1, $6, $7, provider_id FROM swept WHERE is_due AND $5
)
SELECT count(*), count(*) FILTER (WHERE is_due) FROM swept";

/// Steps of one call to [`Shared::expire`]: most rows have their receipt and are only looked at.
const SWEEPS_MAX: usize = 100;

impl Shared {
    pub(super) async fn rejoin(&self, limit: usize) -> Result<usize, Failure> {
        let mut position = *self.rejoining.0.lock().expect("nobody panics while holding it");
        let mut is_last_round = position == 0;
        let mut rejoined = 0;
        for _ in 0..WINDOWS_MAX {
            let Some(end) = self.window_end(position).await? else {
                position = 0;
                if is_last_round {
                    break;
                }
                is_last_round = true;
                continue;
            };
            let left = clamp(limit - rejoined);
            let rows = self.read(REJOIN, &[&position, &end, &left]).await?;
            rejoined += rows.first().map_or(0, |row| row.get::<_, i64>(0) as usize);
            if rejoined >= limit {
                break; // there may be more in this window
            }
            position = end;
        }
        *self.rejoining.0.lock().expect("nobody panics while holding it") = position;
        Ok(rejoined)
    }

    /// The last of the next parked receipts after `position`.
    async fn window_end(&self, position: i64) -> Result<Option<i64>, Failure> {
        let query = "SELECT max(number) FROM \
                     (SELECT number FROM receipt_parked WHERE number > $1 AND NOT orphan ORDER BY number LIMIT $2) w";
        Ok(self.read(query, &[&position, &WINDOW]).await?.first().and_then(|row| row.get(0)))
    }

    pub(super) async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, Failure> {
        self.write(ORPHAN, &[&values::time(before), &clamp(limit)]).await
    }

    pub(super) async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, Failure> {
        let Some(destination) =
            self.names.destination_id(&self.connections, self.timeouts, destination).await?
        else {
            return Ok(0);
        };
        let (before, at) = (values::time(before), values::time(at));
        let (sent, expired_state) = (MessageState::Sent as i16, MessageState::Expired as i16);
        let mut expired = 0;
        for _ in 0..SWEEPS_MAX {
            let step = limit - expired;
            let rows_max = clamp(step);
            let parameters: [&(dyn ToSql + Sync); 7] =
                [&destination, &before, &rows_max, &at, &self.keep_changes, &sent, &expired_state];
            let rows = self.read(EXPIRE, &parameters).await?;
            let (looked_at, due) =
                rows.first().map_or((0, 0), |row| (row.get::<_, i64>(0), row.get::<_, i64>(1)));
            expired += due as usize;
            if expired >= limit || (looked_at as usize) < step {
                break;
            }
        }
        Ok(expired)
    }

    pub(super) async fn changes(
        &self,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<StatusChange>, Failure> {
        let query = "SELECT c.number, c.file, c.row, c.destination, d.name, c.provider_id, c.before, c.state, c.at \
                       FROM status_changes c JOIN destinations d ON d.id = c.destination \
                      WHERE c.number > $1 ORDER BY c.number LIMIT $2";
        let after = after.map_or(0, |after| i64::try_from(after).unwrap_or(i64::MAX));
        let rows = self.read(query, &[&after, &clamp(limit)]).await?;
        let change = |row: &Row| {
            Ok(StatusChange {
                number: row.get::<_, i64>(0).cast_unsigned(),
                id: MessageId {
                    file: FileId(row.get::<_, Uuid>(1).into_bytes()),
                    row: row.get::<_, i64>(2).cast_unsigned(),
                },
                destination: self.names.destination_name(row.get(3), row.get(4)),
                provider_id: row.get(5),
                before: state(row.get(6))?,
                state: state(row.get(7))?,
                at: unix(row.get(8)),
            })
        };
        rows.iter().map(change).collect()
    }

    pub(super) async fn forget_changes(&self, numbers: &[u64]) -> Result<(), Failure> {
        if numbers.is_empty() {
            return Ok(());
        }
        let mut numbers: Vec<_> = numbers.iter().map(|number| number.cast_signed()).collect();
        numbers.sort_unstable();
        self.write("DELETE FROM status_changes WHERE number = ANY($1)", &[&numbers]).await.map(drop)
    }

    pub(super) async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, Failure> {
        // Ahead, so that midnight is no moment at which all wait for one.
        self.read("SELECT make_partition(current_date), make_partition(current_date + 1)", &[]).await?;
        let mut retired = self.retire_partition(Day::of(before), limit).await?;
        let before = values::time(before);
        for delete in [
            "DELETE FROM receipt_parked WHERE ctid = ANY (ARRAY(SELECT ctid FROM receipt_parked \
              WHERE orphan AND since < $1 ORDER BY since LIMIT $2 FOR UPDATE SKIP LOCKED))",
            "DELETE FROM receipt_rejects WHERE ctid = ANY (ARRAY(SELECT ctid FROM receipt_rejects \
              WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED))",
            "DELETE FROM receipt_events WHERE ctid = ANY (ARRAY(SELECT ctid FROM receipt_events \
              WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED))",
        ] {
            if retired < limit {
                retired += self.write(delete, &[&before, &clamp(limit - retired)]).await?;
            }
        }
        Ok(retired)
    }

    /// Forgets files of the oldest partition that is due, and drops it when it has none left: what is recorded of
    /// such a file from then on goes into a partition of its own day.
    async fn retire_partition(&self, before: Day, limit: usize) -> Result<usize, Failure> {
        let rows = self.read("SELECT first_day FROM partitions_due($1) LIMIT 1", &[&before]).await?;
        let Some(first_day) = rows.first().map(|row| row.get::<_, Day>(0)) else { return Ok(0) };
        let forget = "DELETE FROM files WHERE file = ANY (ARRAY(SELECT file FROM files WHERE day = $1 LIMIT $2 \
                      FOR UPDATE SKIP LOCKED))";
        let forgotten = self.write(forget, &[&first_day, &clamp(limit)]).await?;
        self.files.forget();
        if forgotten >= limit {
            return Ok(forgotten);
        }
        match self.read("SELECT drop_partition($1, $2)", &[&first_day, &before]).await {
            Ok(rows) => {
                let about = rows.first().map_or(0, |row| row.get::<_, i64>(0));
                Ok(forgotten + usize::try_from(about).unwrap_or(0))
            }
            // Somebody reads the table just now, most likely: the next step tries again.
            Err(Failure(busy)) if busy.kind == FailureKind::Unavailable => {
                tracing::info!(why = busy.why, "an old partition could not be dropped; retrying later");
                Ok(forgotten)
            }
            Err(error) => Err(error),
        }
    }

    /// One statement that is a transaction of its own; how many rows it wrote.
    async fn write(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<usize, Failure> {
        let held = self.connections.hold().await?;
        let written = self
            .within(async {
                let statement = held.client().prepare_cached(sql).await?;
                held.client().execute(&statement, parameters).await.map_err(Failure::of_commit)
            })
            .await?;
        held.keep();
        Ok(written as usize)
    }

    async fn read(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Failure> {
        let held = self.connections.hold().await?;
        let rows = self
            .within(async {
                let statement = held.client().prepare_cached(sql).await?;
                held.client().query(&statement, parameters).await.map_err(Failure::of_commit)
            })
            .await?;
        held.keep();
        Ok(rows)
    }
}

fn clamp(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
