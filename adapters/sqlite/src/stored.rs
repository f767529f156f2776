//! A batch's record between its row and the rules: everything that reads or changes one does it here.
//!
//! What batches are found by is in columns and written when it changes; the rest of the record is its body, in
//! `results`. Failed attempts go to `attempts`, and `dead` lists what a record says is dead, for filters.

use postrider_actors::model::{
    ids::BatchId,
    ledger::{Changes, Deadline, Holder, Record, RowNumbers, codec},
    time::UnixMs,
};
use rusqlite::{Connection, OptionalExtension, Params, Row, params};

use super::tx::{Tx, TxError, check_sum, int, sum, uint};

/// A batch as it is stored.
pub(crate) struct Stored {
    pub(crate) seq: i64,
    pub(crate) id: BatchId,
    pub(crate) file: i64,
    pub(crate) destination: i64,
    pub(crate) header: i64,
    /// `None` once it was archived.
    pub(crate) payload: Option<i64>,
    /// To be changed by the rules and stored again.
    pub(crate) record: Record,
    first_row: u64,
    gaps: Option<Vec<u8>>,
    /// What the row says.
    columns: Columns,
    /// What `results` says.
    body: Option<Vec<u8>>,
}

/// What changes of a row.
#[derive(PartialEq, Eq)]
struct Columns {
    not_before: UnixMs,
    due: Option<UnixMs>,
    retry: bool,
    fence: u64,
    holder: Option<Holder>,
}

impl Columns {
    fn of(record: &Record) -> Self {
        Self {
            not_before: record.not_before,
            due: record.due(),
            retry: record.is_retry(),
            fence: record.fence,
            holder: record.holder.clone(),
        }
    }
}

/// A query for batches `b`, whose rows [`Stored::read`] reads. With what follows `FROM batches b`.
macro_rules! select_stored {
    ($($rest:literal),+) => {
        concat!(
            "SELECT b.seq, b.id, b.file, b.destination, b.header, b.payload, b.first_row, b.count, b.gaps, ",
            "b.accepted_at, b.not_before, b.due, b.retry, b.fence, b.holder, b.lease_until_mono, r.body, r.sum ",
            "FROM batches b ",
            $($rest),+
        )
    };
}
pub(crate) use select_stored;

/// Columns of it that queries go on by.
pub(crate) const FIRST_ROW: usize = 6;
pub(crate) const DUE: usize = 11;

impl Stored {
    /// The batch with `id`, if it is stored.
    pub(crate) fn by_id(connection: &Connection, id: BatchId) -> Result<Option<Self>, TxError> {
        const SQL: &str = select_stored!("LEFT JOIN results r ON r.batch = b.seq WHERE b.id = ?1");
        Self::find(connection, SQL, [id.0])
    }

    /// The batch with number `seq`.
    pub(crate) fn by_seq(connection: &Connection, seq: i64) -> Result<Self, TxError> {
        const SQL: &str = select_stored!("LEFT JOIN results r ON r.batch = b.seq WHERE b.seq = ?1");
        Self::find(connection, SQL, [seq])?.ok_or_else(|| rusqlite::Error::QueryReturnedNoRows.into())
    }

    /// The batch that has the message of `row`, and the message's index in it.
    pub(crate) fn by_row(
        connection: &Connection,
        file: i64,
        destination: i64,
        row: u64,
    ) -> Result<Option<(Self, usize)>, TxError> {
        const SQL: &str = select_stored!(
            "LEFT JOIN results r ON r.batch = b.seq
             WHERE b.file = ?1 AND b.destination = ?2 AND b.first_row <= ?3 ORDER BY b.first_row DESC LIMIT 1"
        );
        let Some(stored) = Self::find(connection, SQL, [file, destination, int(row)])? else {
            return Ok(None);
        };
        let index = stored.rows()?.find(row);
        Ok(index.map(|index| (stored, index)))
    }

    fn find(connection: &Connection, sql: &str, values: impl Params) -> Result<Option<Self>, TxError> {
        connection.prepare_cached(sql)?.query_row(values, |row| Ok(Self::read(row))).optional()?.transpose()
    }

    /// Reads a row of [`select_stored`].
    pub(crate) fn read(row: &Row<'_>) -> Result<Self, TxError> {
        let until: Option<i64> = row.get(15)?;
        let holder = row
            .get::<_, Option<String>>(14)?
            .map(|name| Holder { name, until: Deadline(uint(until.unwrap_or_default())) });
        let fence = uint(row.get(13)?);
        let head = codec::Head {
            count: row.get(7)?,
            accepted_at: UnixMs(uint(row.get(9)?)),
            not_before: UnixMs(uint(row.get(10)?)),
            fence,
            holder: holder.clone(),
        };
        let body: Option<Vec<u8>> = row.get(16)?;
        if let Some(body) = &body {
            check_sum("record", body, row.get(17)?)?;
        }
        let (not_before, due) = (head.not_before, row.get::<_, Option<i64>>(DUE)?);
        Ok(Self {
            seq: row.get(0)?,
            id: BatchId(row.get(1)?),
            file: row.get(2)?,
            destination: row.get(3)?,
            header: row.get(4)?,
            payload: row.get(5)?,
            record: codec::decode(head, body.as_deref())?,
            first_row: uint(row.get(FIRST_ROW)?),
            gaps: row.get(8)?,
            columns: Columns {
                not_before,
                due: due.map(|due| UnixMs(uint(due))),
                retry: row.get(12)?,
                fence,
                holder,
            },
            body,
        })
    }

    /// The row numbers of its messages.
    pub(crate) fn rows(&self) -> Result<RowNumbers, TxError> {
        Ok(codec::decode_rows(self.first_row, self.record.len() as u32, self.gaps.as_deref())?)
    }

    /// All of its failed attempts, as they were recorded.
    pub(crate) fn history(&self, connection: &Connection) -> Result<Vec<Vec<u8>>, TxError> {
        let mut select =
            connection.prepare_cached("SELECT body FROM attempts WHERE batch = ?1 ORDER BY seq")?;
        Ok(select.query_map([self.seq], |row| row.get(0))?.collect::<Result<_, _>>()?)
    }

    /// Its messages have another header from now on.
    pub(crate) fn set_header(&mut self, connection: &Connection, header: i64) -> Result<(), TxError> {
        connection
            .prepare_cached("UPDATE batches SET header = ?2 WHERE seq = ?1")?
            .execute([self.seq, header])?;
        self.header = header;
        Ok(())
    }

    /// Writes back what a rule changed, as far as it did.
    pub(crate) fn store(&mut self, connection: &Connection) -> Result<(), TxError> {
        self.store_columns(connection)?;
        let body = codec::encode(&self.record);
        if self.body.as_ref() != Some(&body) {
            connection
                .prepare_cached("INSERT OR REPLACE INTO results (batch, body, sum) VALUES (?1, ?2, ?3)")?
                .execute(params![self.seq, body, sum(&body)])?;
            self.body = Some(body);
        }
        Ok(())
    }

    /// The same for a rule that has left the body as it was.
    pub(crate) fn store_columns(&mut self, connection: &Connection) -> Result<(), TxError> {
        let columns = Columns::of(&self.record);
        if columns == self.columns {
            return Ok(());
        }
        let Columns { not_before, due, retry, fence, holder } = &columns;
        connection
            .prepare_cached(
                "UPDATE batches SET due = ?2, retry = ?3, fence = ?4, holder = ?5, lease_until_mono = ?6,
                     not_before = ?7 WHERE seq = ?1",
            )?
            .execute(params![
                self.seq,
                due.map(|due| int(due.0)),
                retry,
                int(*fence),
                holder.as_ref().map(|holder| &holder.name),
                holder.as_ref().map(|holder| int(holder.until.0)),
                int(not_before.0),
            ])?;
        self.columns = columns;
        Ok(())
    }

    /// Writes back what a rule changed, with what follows from it: history, counts and the list of dead letters.
    pub(crate) fn store_changes(&mut self, tx: &mut Tx<'_>, changes: &Changes) -> Result<(), TxError> {
        self.store(tx.connection)?;
        if !changes.failures.is_empty() {
            tx.connection
                .prepare_cached("INSERT INTO attempts (batch, body) VALUES (?1, ?2)")?
                .execute(params![self.seq, codec::encode_history(&changes.failures)])?;
        }
        self.list_deaths(tx.connection, changes)?;
        *tx.count(self.file, self.destination) += changes.counts;
        if let Some(at) = changes.last_at {
            tx.touch(self.file, at);
        }
        Ok(())
    }

    /// Keeps the list of dead letters true to the record.
    fn list_deaths(&self, connection: &Connection, changes: &Changes) -> Result<(), TxError> {
        if changes.died.is_empty() && changes.rose.is_empty() {
            return Ok(());
        }
        let rows = self.rows()?;
        let mut delete = connection
            .prepare_cached("DELETE FROM dead WHERE file = ?1 AND destination = ?2 AND row = ?3")?;
        for &index in &changes.rose {
            delete.execute([self.file, self.destination, int(rows.row(index as usize))])?;
        }
        let mut insert = connection.prepare_cached(
            "INSERT INTO dead (file, destination, row, batch, at, attempts, status, reason, cause)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        for &index in &changes.died {
            let exception = self.record.exceptions.get(&index);
            // What died and was sent after all in one settlement is dead no more.
            let Some(death) = exception.and_then(|exception| exception.death.as_ref()) else { continue };
            insert.execute(params![
                self.file,
                self.destination,
                int(rows.row(index as usize)),
                self.seq,
                int(death.attempt.at.0),
                self.record.tries[index as usize],
                death.attempt.status,
                death.attempt.reason as u8,
                death.cause as u8,
            ])?;
        }
        Ok(())
    }
}
