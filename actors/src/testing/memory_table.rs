//! A table in memory: rows by key, values that it refuses, outages, and a count of every statement.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;

use crate::{
    model::{
        bisect::Refusal,
        call::FailureKind,
        table::{Mapping, TableRow},
    },
    ports::{Table, TableError},
};

/// One statement, as the table saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryStatement {
    /// When it came.
    pub at: Instant,
    /// Its rows.
    pub rows: usize,
    /// Whether it was written.
    pub written: bool,
}

/// The table.
#[derive(Default)]
pub struct MemoryTable {
    state: Mutex<State>,
    in_flight: AtomicUsize,
}

#[derive(Default)]
struct State {
    rows: BTreeMap<String, HashMap<String, Option<String>>>,
    poison: Vec<(String, FailureKind, &'static str)>,
    unfit: Option<String>,
    sifts: bool,
    outage: Option<TableError>,
    panics: usize,
    latency: Duration,
    bytes_max: Option<usize>,
    statements: Vec<MemoryStatement>,
    in_flight_max: usize,
}

impl MemoryTable {
    /// An empty table that takes everything at once.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses every row that has `value` in some column.
    pub fn refuse(&self, value: &str) {
        self.refuse_as(value, FailureKind::Invalid, "22000");
    }

    /// The same with a code.
    pub fn refuse_as(&self, value: &str, kind: FailureKind, code: &'static str) {
        self.state().poison.push((value.into(), kind, code));
    }

    /// Its catalogue says that no row with `value` in some column fits.
    pub fn foresee(&self, value: &str) {
        self.state().unfit = Some(value.into());
    }

    /// It can write rows each by itself in one statement.
    pub fn can_sift(&self) {
        self.state().sifts = true;
    }

    /// Answers every statement with this from now on; `None`: goes on.
    pub fn answer(&self, error: Option<TableError>) {
        self.state().outage = error;
    }

    /// Panics at the next `times` statements.
    pub fn panic(&self, times: usize) {
        self.state().panics = times;
    }

    /// Every statement takes this long.
    pub fn slow(&self, latency: Duration) {
        self.state().latency = latency;
    }

    /// The most bytes of a statement.
    pub fn limit_bytes(&self, bytes_max: usize) {
        self.state().bytes_max = Some(bytes_max);
    }

    /// Its rows: by key, the values by column.
    pub fn rows(&self) -> BTreeMap<String, HashMap<String, Option<String>>> {
        self.state().rows.clone()
    }

    /// Every statement so far.
    pub fn statements(&self) -> Vec<MemoryStatement> {
        self.state().statements.clone()
    }

    /// The most statements that were in flight at the same time.
    pub fn in_flight_max(&self) -> usize {
        self.state().in_flight_max
    }

    async fn statement<T>(
        &self,
        rows: &[TableRow],
        work: impl FnOnce(&Self) -> Result<T, TableError>,
    ) -> Result<T, TableError> {
        let at = Instant::now();
        let in_flight = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        let _in_flight = RunningStatement(&self.in_flight);
        let (latency, panics) = {
            let mut state = self.state();
            state.in_flight_max = state.in_flight_max.max(in_flight);
            let panics = state.panics > 0;
            state.panics = state.panics.saturating_sub(1);
            (state.latency, panics)
        };
        assert!(!panics, "the table was set to panic");
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let answer = work(self);
        let written = answer.is_ok();
        self.state().statements.push(MemoryStatement { at, rows: rows.len(), written });
        answer
    }

    fn write(&self, rows: &[TableRow]) -> Result<(), TableError> {
        let mut state = self.state();
        if let Some(outage) = &state.outage {
            return Err(outage.clone());
        }
        let bytes: usize = rows.iter().map(TableRow::statement_bytes).sum();
        if state.bytes_max.is_some_and(|max| bytes > max) {
            return Err(TableError::Retryable(format!("a statement of {bytes} bytes is too large")));
        }
        let mapping = rows.first().map(|row| row.mapping.clone());
        for row in rows {
            assert_eq!(Some(&row.mapping), mapping.as_ref(), "rows of one statement are made alike");
            if let Some(refusal) = state.refusal(row) {
                return Err(TableError::Refused(refusal));
            }
        }
        for row in rows {
            state.put(row);
        }
        Ok(())
    }

    /// A row of `mapping`, for tests of tables.
    pub fn row(mapping: &Arc<Mapping>, values: &[Option<&str>]) -> TableRow {
        assert_eq!(mapping.columns.len(), values.len(), "a value per column");
        let values = values.iter().map(|value| value.map(Into::into)).collect();
        TableRow { mapping: mapping.clone(), values }
    }
}

impl State {
    fn refusal(&self, row: &TableRow) -> Option<Refusal> {
        let poison = |value: &str| self.poison.iter().find(|(poison, ..)| poison == value);
        let (value, kind, code) = row.values.iter().flatten().find_map(|value| poison(value))?;
        Some(Refusal { kind: *kind, code: (*code).into(), words: format!("value {value:?} is refused") })
    }

    fn put(&mut self, row: &TableRow) {
        let Entry::Vacant(new) = self.rows.entry(row.key().to_owned()) else { return };
        let names = row.mapping.columns.iter().map(|column| column.name.clone());
        let values = row.values.iter().map(|value| value.as_deref().map(ToOwned::to_owned));
        new.insert(names.zip(values).collect());
    }
}

/// Takes its place back however the statement ends.
struct RunningStatement<'a>(&'a AtomicUsize);

impl Drop for RunningStatement<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Table for MemoryTable {
    fn statement_bytes_max(&self) -> usize {
        self.state().bytes_max.unwrap_or(16 << 20)
    }

    async fn unfit(&self, rows: &[TableRow]) -> Vec<(usize, String)> {
        let unfit = self.state().unfit.clone();
        let is_unfit = |row: &TableRow| row.values.iter().any(|value| value.as_deref() == unfit.as_deref());
        let rows = rows.iter().enumerate().filter(|(_, row)| unfit.is_some() && is_unfit(row));
        rows.map(|(at, _)| (at, "it does not fit".to_owned())).collect()
    }

    async fn insert(&self, rows: &[TableRow]) -> Result<(), TableError> {
        self.statement(rows, |table| table.write(rows)).await
    }

    fn sifts(&self) -> bool {
        self.state().sifts
    }

    async fn sift(&self, rows: &[TableRow]) -> Result<Vec<(usize, Refusal)>, TableError> {
        let each = |table: &Self| {
            let mut state = table.state();
            if let Some(outage) = &state.outage {
                return Err(outage.clone());
            }
            let mut refused = Vec::new();
            for (at, row) in rows.iter().enumerate() {
                match state.refusal(row) {
                    Some(refusal) => refused.push((at, refusal)),
                    None => state.put(row),
                }
            }
            Ok(refused)
        };
        self.statement(rows, each).await
    }
}
