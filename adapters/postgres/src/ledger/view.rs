//! What commands read. Their statements may read much, so they go over connections that plan for that.

use std::{collections::HashMap, fmt, time::SystemTime};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        outcome::Reason,
        receipt::{EventId, Price, ReceiptFacts, RejectedText, ReportedStates},
        state::MessageState,
        time::UnixMs,
    },
    ports::{SourceCursor, StoreError},
};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{
    OpenError, PostgresSettings, Timeouts,
    connect::{self, Connections},
    error::Failure,
    schema,
    settings::Purpose,
    values::{self, Day, unix},
    waiting::{self, WaitingReceipt, columns},
};
use postrider_actors::ports::console::receipts::{
    AppliedReceipt, GAP_AGES, Gap, GapPlace, HeldReceipt, MessageRow, ReceiptFilter, ReceiptView,
    RejectedReceipt, SourceRow, StateCount,
};

/// The ledger as commands see it.
pub struct PostgresView {
    connections: Connections,
    timeouts: Timeouts,
}

impl fmt::Debug for PostgresView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresView").finish_non_exhaustive()
    }
}

const MESSAGE: &str = "
SELECT m.row, d.name AS destination, f.feed, m.recipient, m.state, m.recorded, m.attempts, m.status, m.reason, m.detail,
       m.provider_id, m.accepted_at, m.recorded_at, m.updated_at, m.reported, m.receipt_state, m.receipt_at,
       m.receipt_event, m.provider_status, m.carrier, m.response, m.provider_sent_at,
       (m.price * 100000000)::bigint AS price
  FROM files f
  JOIN messages m ON m.day = f.day AND m.file = f.file
  JOIN destinations d ON d.id = m.destination
 WHERE f.file = $1 AND f.day = $2 AND m.day = $2 AND m.row = $3
 ORDER BY d.name";

/// The states of messages without a final receipt.
const WITHOUT_RECEIPT: [i16; 2] =
    [MessageState::WITHOUT_RECEIPT[0] as i16, MessageState::WITHOUT_RECEIPT[1] as i16];

/// Gaps that the sweeper has looked at or not, in the order of the index.
macro_rules! gaps_of {
    ($sweep:literal) => {
        concat!(
            "(SELECT m.file, m.row, m.state, m.provider_id, m.recorded_at FROM messages m \
               WHERE m.destination = (SELECT id FROM destinations WHERE name = $1) AND m.sweep = ",
            $sweep,
            " AND m.reported = 0 AND m.state = ANY ($7) AND m.recorded_at < $2 \
                 AND (m.recorded_at, m.file, m.row) > ($3, $4, $5) \
               ORDER BY m.recorded_at, m.file, m.row LIMIT $6)"
        )
    };
}

const GAPS: &str =
    concat!(gaps_of!("0"), " UNION ALL ", gaps_of!("1"), " ORDER BY recorded_at, file, row LIMIT $6");

/// `width_bucket` counts from 1, and what is older than the last bound is in the last class.
const GAP_AGES_OF: &str = "
SELECT width_bucket(greatest(extract(epoch FROM $2 - m.recorded_at), 0)::double precision, $3::double precision[]),
       count(*)
  FROM messages m JOIN destinations d ON d.id = m.destination
 WHERE d.name = $1 AND m.sweep < 2 AND m.reported = 0 AND m.state = ANY ($4)
 GROUP BY 1";

const REJECTS: &str = "
SELECT s.name, r.place, r.reason, r.at, r.text, r.is_whole
  FROM (SELECT * FROM receipt_rejects
         WHERE ($1::text IS NULL OR source = (SELECT id FROM sources WHERE name = $1))
           AND ($2::text IS NULL OR source IN (SELECT s.id FROM sources s JOIN destinations d ON d.id = s.destination
                                                WHERE d.name = $2))
         ORDER BY at DESC LIMIT $3) r
  JOIN sources s ON s.id = r.source
 ORDER BY r.at DESC, r.place";

impl PostgresView {
    /// Connects, and refuses a schema that is not this program's.
    pub async fn open(settings: &PostgresSettings) -> Result<Self, OpenError> {
        let connections = Connections::new(settings, Purpose::Look)?;
        let held = connections.hold().await.map_err(|error| OpenError::Unreachable(error.0.to_string()))?;
        let limit = settings.timeouts.statement;
        tokio::time::timeout(limit, schema::check_version(held.client(), &settings.keys.schema))
            .await
            .map_err(|_| OpenError::Unreachable(format!("it does not answer within {limit:?}")))??;
        held.keep();
        Ok(Self { connections, timeouts: settings.timeouts })
    }

    async fn read(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Failure> {
        let held = self.connections.hold().await?;
        let rows =
            connect::within(self.timeouts, async { Ok(held.client().query(sql, parameters).await?) }).await?;
        held.keep();
        Ok(rows)
    }

    async fn day(&self, file: FileId) -> Result<Option<Day>, Failure> {
        let rows = self.read("SELECT day FROM files WHERE file = $1", &[&values::file(file)]).await?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    async fn message_rows(&self, id: MessageId) -> Result<Vec<MessageRow>, Failure> {
        let Some(day) = self.day(id.file).await? else { return Ok(Vec::new()) };
        let rows = self.read(MESSAGE, &[&values::file(id.file), &day, &values::row(id.row)]).await?;
        rows.iter().map(|row| message_row(id, row)).collect()
    }

    async fn state_counts(&self, file: Option<FileId>) -> Result<Vec<StateCount>, Failure> {
        let day;
        let mut parameters: Vec<&(dyn ToSql + Sync)> = Vec::new();
        let mut sql =
            "SELECT d.name, m.state, count(*) FROM messages m JOIN destinations d ON d.id = m.destination"
                .to_owned();
        let wanted = file.map(values::file);
        if let (Some(file), Some(wanted)) = (file, &wanted) {
            let Some(found) = self.day(file).await? else { return Ok(Vec::new()) };
            day = found;
            sql.push_str(" WHERE m.day = $1 AND m.file = $2");
            parameters.push(&day);
            parameters.push(wanted);
        }
        sql.push_str(" GROUP BY d.name, m.state ORDER BY d.name, m.state");
        let rows = self.read(&sql, &parameters).await?;
        let count = |row: &Row| {
            Ok(StateCount {
                destination: row.get::<_, &str>(0).into(),
                state: waiting::state(row.get(1))?,
                messages: row.get::<_, i64>(2).cast_unsigned(),
            })
        };
        rows.iter().map(count).collect()
    }

    async fn gaps_after(
        &self,
        destination: &str,
        before: UnixMs,
        after: Option<&GapPlace>,
        limit: usize,
    ) -> Result<Vec<Gap>, Failure> {
        let beginning = GapPlace { sent_at: UnixMs(0), id: MessageId { file: FileId([0; 16]), row: 0 } };
        let GapPlace { sent_at, id } = *after.unwrap_or(&beginning);
        let (from, file, row) = (values::time(sent_at), values::file(id.file), values::row(id.row));
        let rows = self
            .read(
                GAPS,
                &[
                    &destination,
                    &values::time(before),
                    &from,
                    &file,
                    &row,
                    &clamp(limit),
                    &&WITHOUT_RECEIPT[..],
                ],
            )
            .await?;
        let gap = |row: &Row| {
            Ok(Gap {
                id: message_id(row),
                state: waiting::state(row.get("state"))?,
                provider_id: row.get("provider_id"),
                sent_at: unix(row.get("recorded_at")),
            })
        };
        rows.iter().map(gap).collect()
    }

    async fn held(
        &self,
        (is_orphan, order): (bool, &str),
        which: &ReceiptFilter,
        limit: usize,
    ) -> Result<Vec<HeldReceipt>, Failure> {
        let sql = format!(
            "SELECT number, since, s.name AS source_name, d.name AS destination_name, {} FROM \
             (SELECT * FROM receipt_parked \
               WHERE orphan = $4 \
                 AND ($1::text IS NULL OR source = (SELECT id FROM sources WHERE name = $1)) \
                 AND ($2::text IS NULL OR destination = (SELECT id FROM destinations WHERE name = $2)) \
               ORDER BY since {order}, number {order} LIMIT $3) r \
             JOIN LATERAL (SELECT name FROM sources WHERE id = r.source) s ON true \
             JOIN LATERAL (SELECT name FROM destinations WHERE id = r.destination) d ON true \
             ORDER BY since {order}, number {order}",
            columns!()
        );
        let rows = self.read(&sql, &[&which.source, &which.destination, &clamp(limit), &is_orphan]).await?;
        let held = |row: &Row| {
            let WaitingReceipt { receipt, .. } = WaitingReceipt::read(row)?;
            Ok(HeldReceipt {
                destination: row.get::<_, &str>("destination_name").into(),
                source: row.get::<_, &str>("source_name").into(),
                event: receipt.event,
                key: receipt.key,
                state: receipt.state,
                since: unix(row.get("since")),
            })
        };
        rows.iter().map(held).collect()
    }

    async fn source_rows(&self) -> Result<Vec<SourceRow>, Failure> {
        let depth = |rows: Vec<Row>| -> HashMap<i32, u64> {
            rows.iter().map(|row| (row.get(0), row.get::<_, i64>(1).cast_unsigned())).collect()
        };
        let waiting = depth(
            self.read(
                "SELECT source, sum(cardinality(event))::bigint FROM receipt_inbox GROUP BY source",
                &[],
            )
            .await?,
        );
        let parked = depth(
            self.read("SELECT source, count(*) FROM receipt_parked WHERE NOT orphan GROUP BY source", &[])
                .await?,
        );
        let sources = "SELECT s.id, s.name, d.name, s.cursor, s.receipts_at, s.cursor_at FROM sources s \
                         JOIN destinations d ON d.id = s.destination ORDER BY s.name";
        let rows = self.read(sources, &[]).await?;
        let time = |time: Option<SystemTime>| time.map(unix);
        let source = |row: &Row| {
            let id: i32 = row.get(0);
            SourceRow {
                name: row.get::<_, &str>(1).into(),
                destination: row.get::<_, &str>(2).into(),
                cursor: row.get::<_, Option<String>>(3).map(SourceCursor),
                receipts_at: time(row.get(4)),
                cursor_at: time(row.get(5)),
                waiting: waiting.get(&id).copied().unwrap_or(0),
                parked: parked.get(&id).copied().unwrap_or(0),
            }
        };
        Ok(rows.iter().map(source).collect())
    }
}

fn clamp(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn message_id(row: &Row) -> MessageId {
    MessageId {
        file: FileId(row.get::<_, Uuid>("file").into_bytes()),
        row: row.get::<_, i64>("row").cast_unsigned(),
    }
}

fn message_row(id: MessageId, row: &Row) -> Result<MessageRow, Failure> {
    let text = |column: &str| row.get::<_, Option<String>>(column);
    let time = |column: &str| row.get::<_, Option<SystemTime>>(column).map(unix);
    let unsigned = |number: i16| u16::try_from(number).unwrap_or(0);
    let receipt = match row.get::<_, Option<i16>>("receipt_state") {
        None => None,
        Some(state) => Some(AppliedReceipt {
            state: waiting::state(state)?,
            event: EventId(row.get::<_, Option<Uuid>>("receipt_event").unwrap_or_default().into_bytes()),
            at: time("receipt_at"),
            facts: ReceiptFacts {
                status: text("provider_status").map(Box::from),
                carrier: text("carrier").map(Box::from),
                response: text("response").map(Box::from),
                sent_at: time("provider_sent_at"),
                price: row.get::<_, Option<i64>>("price").map(Price),
            },
        }),
    };
    let reason = row.get::<_, Option<i16>>("reason");
    Ok(MessageRow {
        id,
        destination: row.get::<_, &str>("destination").into(),
        feed: row.get::<_, &str>("feed").into(),
        recipient: row.get("recipient"),
        state: waiting::state(row.get("state"))?,
        recorded: waiting::state(row.get("recorded"))?,
        attempts: row.get::<_, i32>("attempts").cast_unsigned(),
        status: unsigned(row.get("status")),
        reason: reason.and_then(|reason| Reason::from_byte(u8::try_from(reason).ok()?)),
        detail: text("detail"),
        provider_id: text("provider_id"),
        accepted_at: unix(row.get("accepted_at")),
        recorded_at: unix(row.get("recorded_at")),
        updated_at: unix(row.get("updated_at")),
        reported: ReportedStates(u8::try_from(row.get::<_, i16>("reported")).unwrap_or(0)),
        receipt,
    })
}

#[async_trait]
impl ReceiptView for PostgresView {
    async fn message(&self, id: MessageId) -> Result<Vec<MessageRow>, StoreError> {
        Ok(self.message_rows(id).await?)
    }

    async fn counts(&self, file: Option<FileId>) -> Result<Vec<StateCount>, StoreError> {
        Ok(self.state_counts(file).await?)
    }

    async fn gaps(
        &self,
        destination: &str,
        before: UnixMs,
        after: Option<&GapPlace>,
        limit: usize,
    ) -> Result<Vec<Gap>, StoreError> {
        Ok(self.gaps_after(destination, before, after, limit).await?)
    }

    async fn gap_ages(&self, destination: &str, now: UnixMs) -> Result<[u64; GAP_AGES.len()], StoreError> {
        let bounds: Vec<f64> = GAP_AGES.iter().map(std::time::Duration::as_secs_f64).collect();
        let rows = self
            .read(GAP_AGES_OF, &[&destination, &values::time(now), &bounds, &&WITHOUT_RECEIPT[..]])
            .await?;
        let mut ages = [0; GAP_AGES.len()];
        for row in rows {
            let class = usize::try_from(row.get::<_, i32>(0)).unwrap_or(0).clamp(1, ages.len());
            ages[class - 1] += row.get::<_, i64>(1).cast_unsigned();
        }
        Ok(ages)
    }

    async fn parked(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError> {
        Ok(self.held((false, "ASC"), which, limit).await?)
    }

    async fn orphans(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError> {
        Ok(self.held((true, "DESC"), which, limit).await?)
    }

    async fn rejects(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<RejectedReceipt>, StoreError> {
        let rows = self.read(REJECTS, &[&which.source, &which.destination, &clamp(limit)]).await?;
        let reject = |row: &Row| RejectedReceipt {
            source: row.get::<_, &str>(0).into(),
            place: row.get(1),
            reason: row.get(2),
            at: unix(row.get(3)),
            text: RejectedText { text: row.get::<_, &str>(4).into(), is_whole: row.get(5) },
        };
        Ok(rows.iter().map(reject).collect())
    }

    async fn sources(&self) -> Result<Vec<SourceRow>, StoreError> {
        Ok(self.source_rows().await?)
    }
}
