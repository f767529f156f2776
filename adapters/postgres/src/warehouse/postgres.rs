//! The Postgres dialect: a COPY, or one array per column; each is one statement and its own transaction.

use std::{pin::pin, sync::Arc};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::SinkExt as _;
use postrider_actors::model::{
    bisect::Refusal,
    call::{Failure, FailureKind},
    table::{Mapping, TableRow},
};
use tokio_postgres::{
    Error,
    types::{ToSql, Type},
};

use super::{
    WarehouseTable,
    connection::keep_after,
    error::{NotWritten, is_about_the_table, with_detail},
    shape::{CATALOGUE, Shape, Sift},
};
use crate::pg::{Held, kind_of};

/// From so many rows on a COPY is faster than arrays (docs/decisions/0015-warehouse-tables.md).
const COPY_ROWS_MIN: usize = 250;

/// A COPY is sent in pieces of this size: the server reads one while the next is made.
const PIECE_BYTES: usize = 64 << 10;

/// A statement, and how it failed.
enum Failed {
    Driver(Error),
    /// The table, or its settings, can't take rows now, and why.
    Unready(String),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Driver(error)
    }
}

impl WarehouseTable {
    pub(super) async fn insert_fast(&self, rows: &[TableRow]) -> Result<(), NotWritten> {
        if rows.len() >= COPY_ROWS_MIN && self.may_copy() {
            let copied = self
                .with_shape(&rows[0].mapping, async |held, shape| match &shape.copy {
                    Some(copy) => by_copy(held, copy, rows).await.map(|()| true),
                    None => Ok(false),
                })
                .await;
            match copied {
                Ok(true) => return Ok(()),
                // Rows that come again, after a crash or a lost lease, may not be the only ones.
                Err(NotWritten::Refused(refusal)) if &*refusal.code == "23505" => self.met_a_key(),
                Err(error) => return Err(error),
                Ok(false) => {}
            }
        }
        self.with_shape(&rows[0].mapping, async |held, shape| {
            let arrays = Arrays::of(rows);
            let types = vec![Type::TEXT_ARRAY; arrays.0.len()];
            let prepared = held.client().prepare_typed_cached(&shape.insert, &types).await?;
            held.client().execute(&prepared, &arrays.parameters()).await?;
            Ok(())
        })
        .await
    }

    /// Writes rows each by itself, in one statement; those that were refused.
    pub(super) async fn insert_each(&self, rows: &[TableRow]) -> Result<Vec<(usize, Refusal)>, NotWritten> {
        self.with_shape(&rows[0].mapping, async |held, shape| {
            let Some(sift) = &shape.sift else {
                return Err(Failed::Unready("the role may make no temporary function".to_owned()));
            };
            let arrays = Arrays::of(rows);
            let prepared = prepare_sift(held, sift, arrays.0.len()).await?;
            let refused = held.client().query(&prepared, &arrays.parameters()).await?;
            Ok(refused.iter().map(|row| (row.get::<_, i64>(0).max(1) as usize - 1, refusal(row))).collect())
        })
        .await
    }

    /// Does a statement by the table's shape, which the catalogue is asked for if it is not known.
    async fn with_shape<T>(
        &self,
        mapping: &Arc<Mapping>,
        statement: impl AsyncFnOnce(&Held, &Shape) -> Result<T, Failed>,
    ) -> Result<T, NotWritten> {
        let connections = self.connections();
        let held = connections.hold().await?;
        let work = async {
            let shape = match self.shape_for(mapping) {
                Some(shape) => shape,
                None => self.read_shape(&held, mapping).await?,
            };
            statement(&held, &shape).await
        };
        match connections.within(work).await {
            None => Err(connections.no_answer().into()),
            Some(Ok(done)) => {
                held.keep();
                Ok(done)
            }
            Some(Err(Failed::Unready(why))) => {
                held.keep();
                Err(Failure::new(FailureKind::Refused, why).into())
            }
            Some(Err(Failed::Driver(error))) => {
                if is_about_the_table(&error) {
                    // A prepared statement that the table has outgrown must not come back.
                    self.forget_shape();
                } else {
                    keep_after(held, &error);
                }
                Err((&error).into())
            }
        }
    }

    /// Looks at the catalogue again; `None` if it can't be asked, or the table is not there.
    pub(super) async fn look_again(&self, mapping: &Arc<Mapping>) -> Option<Arc<Shape>> {
        self.forget_shape();
        self.with_shape(mapping, async |_, _| Ok(())).await.ok()?;
        self.shape_for(mapping)
    }

    async fn read_shape(&self, held: &Held, mapping: &Arc<Mapping>) -> Result<Arc<Shape>, Failed> {
        let found = held.client().query_typed(CATALOGUE, &[(&self.name.to_string(), Type::TEXT)]).await?;
        let shape = Arc::new(Shape::of(&self.name, mapping, &found).map_err(Failed::Unready)?);
        self.remember(Some(shape.clone()));
        Ok(shape)
    }
}

/// One array of texts per column.
struct Arrays<'a>(Vec<Vec<Option<&'a str>>>);

impl<'a> Arrays<'a> {
    fn of(rows: &'a [TableRow]) -> Self {
        let column = |at: usize| rows.iter().map(|row| row.values[at].as_deref()).collect();
        Self((0..rows[0].mapping.columns.len()).map(column).collect())
    }

    fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.0.iter().map(|column| column as &(dyn ToSql + Sync)).collect()
    }
}

/// `COPY … FROM STDIN` in its text format ("COPY", Postgres' manual): all rows or none, and no key twice.
async fn by_copy(held: &Held, copy: &str, rows: &[TableRow]) -> Result<(), Failed> {
    let statement = held.client().prepare_cached(copy).await?;
    let mut sink = pin!(held.client().copy_in::<_, Bytes>(&statement).await?);
    let mut piece = BytesMut::with_capacity(PIECE_BYTES + PIECE_BYTES / 4);
    for row in rows {
        put_line(&mut piece, row);
        if piece.len() >= PIECE_BYTES {
            sink.feed(piece.split().freeze()).await?;
            piece.reserve(PIECE_BYTES + PIECE_BYTES / 4);
        }
    }
    sink.send(piece.freeze()).await?;
    sink.finish().await?;
    Ok(())
}

fn put_line(line: &mut BytesMut, row: &TableRow) {
    for (at, value) in row.values.iter().enumerate() {
        if at > 0 {
            line.put_u8(b'\t');
        }
        let Some(value) = value else {
            line.put_slice(b"\\N");
            continue;
        };
        let mut rest = value.as_bytes();
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\t' | b'\n' | b'\r')) {
            line.put_slice(&rest[..at]);
            line.put_slice(match rest[at] {
                b'\t' => b"\\t",
                b'\n' => b"\\n",
                b'\r' => b"\\r",
                _ => b"\\\\",
            });
            rest = &rest[at + 1..];
        }
        line.put_slice(rest);
    }
    line.put_u8(b'\n');
}

/// The call of a session's function, which is made if the session has not got it yet.
async fn prepare_sift(held: &Held, sift: &Sift, columns: usize) -> Result<tokio_postgres::Statement, Error> {
    let types = vec![Type::TEXT_ARRAY; columns];
    let client = held.client();
    match client.prepare_typed_cached(&sift.call, &types).await {
        // No such function; no temporary schema yet.
        Err(error) if error.code().is_some_and(|code| matches!(code.code(), "42883" | "3F000")) => {
            client.batch_execute(&sift.create).await?;
            client.prepare_typed_cached(&sift.call, &types).await
        }
        prepared => prepared,
    }
}

/// What the function says of a row.
fn refusal(row: &tokio_postgres::Row) -> Refusal {
    let text = |column| row.get::<_, Option<&str>>(column).unwrap_or_default();
    let (code, words, about) = (text(1), text(2), text(3));
    let about = if about.is_empty() { String::new() } else { format!(", {about}") };
    let words = with_detail(format!("{words} (SQLSTATE {code}{about})"), Some(text(4)));
    Refusal { kind: kind_of(code), code: code.into(), words }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_actors::model::table::{Column, ColumnSource, ColumnType};

    #[test]
    fn f57_a_line_is_one_row_whatever_its_values_hold() {
        let column = |name: &str, source| Column {
            name: name.into(),
            source,
            kind: ColumnType::Text,
            required: false,
        };
        let columns = vec![
            column("id", ColumnSource::Id),
            column("a", ColumnSource::Feed),
            column("b", ColumnSource::Feed),
        ];
        let values = vec![Some("a\tb\nc\rd".into()), Some("\\.".into()), None];
        let row = TableRow { mapping: Arc::new(Mapping { columns }), values };
        let mut line = BytesMut::new();
        put_line(&mut line, &row);
        assert_eq!(&*line, b"a\\tb\\nc\\rd\t\\\\.\t\\N\n");
    }
}
