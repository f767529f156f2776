//! Counting two tables by key range: whether a secondary has what its primary has (S4.5).
//!
//! Keys are `msg_<file>_<row>`. Each table is read for its counts by file, once for every so many files; where two
//! differ, the files' rows are counted by ranges. Hashes of the keys are summed too, so that two tables that miss different rows of a
//! range are not taken for equal, and on demand hashes of the values. Rows in flight at that moment are differences too:
//! compare again later.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr as _,
};

use postrider_actors::model::{
    ids::FileId,
    table::{Column, ColumnType},
};
use serde::Serialize;

use postrider_settings::WarehouseDialect as Dialect;

use super::{WarehouseTable, connection::OpenError};

/// What a comparison holds and lists at the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompareLimits {
    /// Files that are counted at once. More are counted after them.
    pub files: usize,
    /// Differing files that are looked into.
    pub differing: usize,
    /// Rows of a range.
    pub range_rows: u64,
    /// Differing ranges that are listed for a file.
    pub ranges: usize,
}

impl Default for CompareLimits {
    fn default() -> Self {
        Self { files: 100_000, differing: 100, range_rows: 10_000, ranges: 100 }
    }
}

/// How two tables compare.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompareReport {
    /// Files that were counted.
    pub files: u64,
    /// Rows of them in the primary.
    pub primary: u64,
    /// Rows of them in the secondary.
    pub secondary: u64,
    /// Files whose rows differ.
    pub differing: Vec<FileDifference>,
    /// Files that differ too, beyond those.
    pub differing_more: u64,
}

/// A file whose rows differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileDifference {
    /// Its id.
    pub file: FileId,
    /// Its rows in the primary.
    pub primary: u64,
    /// Its rows in the secondary.
    pub secondary: u64,
    /// Where they differ, in order.
    pub ranges: Vec<RangeDifference>,
    /// Ranges that differ too, beyond those.
    pub ranges_more: u64,
}

/// A range of rows that differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RangeDifference {
    /// Its first row.
    pub from: u64,
    /// Its last row.
    pub to: u64,
    /// How many of them are in the primary.
    pub primary: u64,
    /// How many of them are in the secondary. The same number of other rows, or of rows with other values, is a
    /// difference.
    pub secondary: u64,
}

impl CompareReport {
    /// Whether both have the same rows.
    pub fn is_equal(&self) -> bool {
        self.differing.is_empty() && self.differing_more == 0
    }
}

impl fmt::Display for CompareReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, primary, secondary, .. } = self;
        let verdict = if self.is_equal() { "equal" } else { "different" };
        writeln!(f, "{verdict}: {files} files, {primary} rows in the primary, {secondary} in the secondary")?;
        for file in &self.differing {
            writeln!(f, "  file {}: {} rows, {} rows", file.file, file.primary, file.secondary)?;
            for range in &file.ranges {
                let RangeDifference { from, to, primary, secondary } = range;
                let note = if primary == secondary { " (others)" } else { "" };
                writeln!(f, "    rows {from} to {to}: {primary}, {secondary}{note}")?;
            }
            if file.ranges_more > 0 {
                writeln!(f, "    and {} ranges more", file.ranges_more)?;
            }
        }
        if self.differing_more > 0 {
            writeln!(f, "  and {} files more", self.differing_more)?;
        }
        Ok(())
    }
}

/// Rows, and the sum of their hashes as the database writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RowCount {
    rows: u64,
    sum: String,
}

/// What is compared of two tables' rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Their keys.
    Keys,
    /// The values of the columns that both fill, too.
    Values,
}

/// Counts both. Every question ends by its warehouse's statement timeout.
pub async fn compare(
    primary: &WarehouseTable,
    secondary: &WarehouseTable,
    compared: Compared,
    limits: CompareLimits,
) -> Result<CompareReport, OpenError> {
    if compared == Compared::Values && primary.dialect() != secondary.dialect() {
        let why = "values are compared as texts, which Postgres and Redshift write in different ways: compare the keys \
                   alone";
        return Err(OpenError::Refused(why.to_owned()));
    }
    let (hash, hash_there) = (primary.row_hash(secondary, compared), secondary.row_hash(primary, compared));
    let mut report = CompareReport::default();
    let mut after = None;
    loop {
        let (mut ours, mut theirs) = tokio::try_join!(
            primary.by_file(&hash, after, limits.files),
            secondary.by_file(&hash_there, after, limits.files)
        )?;
        // Beyond the last file of a table that has more of them, nothing is known yet.
        let ends = [&ours, &theirs].into_iter().filter(|counts| counts.len() >= limits.files.max(1));
        after = ends.filter_map(|counts| counts.last_key_value().map(|(file, _)| *file)).min();
        if let Some(end) = after {
            ours.retain(|file, _| *file <= end);
            theirs.retain(|file, _| *file <= end);
        }
        let files: BTreeSet<_> = ours.keys().chain(theirs.keys()).copied().collect();
        report.files += files.len() as u64;
        report.primary += ours.values().map(|count| count.rows).sum::<u64>();
        report.secondary += theirs.values().map(|count| count.rows).sum::<u64>();
        for file in files {
            let (one, other) =
                (ours.remove(&file).unwrap_or_default(), theirs.remove(&file).unwrap_or_default());
            if one == other {
                continue;
            }
            if report.differing.len() >= limits.differing {
                report.differing_more += 1;
                continue;
            }
            let (by_range, by_range_there) = tokio::try_join!(
                primary.by_range(&hash, file, limits.range_rows),
                secondary.by_range(&hash_there, file, limits.range_rows)
            )?;
            let (ranges, ranges_more) = differing(&by_range, &by_range_there, limits);
            let difference =
                FileDifference { file, primary: one.rows, secondary: other.rows, ranges, ranges_more };
            report.differing.push(difference);
        }
        if after.is_none() {
            return Ok(report);
        }
    }
}

fn differing(
    ours: &BTreeMap<u64, RowCount>,
    theirs: &BTreeMap<u64, RowCount>,
    limits: CompareLimits,
) -> (Vec<RangeDifference>, u64) {
    let (mut ranges, mut more) = (Vec::new(), 0);
    let none = RowCount::default();
    for range in ours.keys().chain(theirs.keys()).copied().collect::<BTreeSet<_>>() {
        let (one, other) = (ours.get(&range).unwrap_or(&none), theirs.get(&range).unwrap_or(&none));
        if one == other {
            continue;
        }
        if ranges.len() >= limits.ranges {
            more += 1;
            continue;
        }
        let from = range.saturating_mul(limits.range_rows).saturating_add(1);
        let to = from.saturating_add(limits.range_rows.max(1) - 1);
        ranges.push(RangeDifference { from, to, primary: one.rows, secondary: other.rows });
    }
    (ranges, more)
}

/// A key of ours; the row has no more digits than 64 bits hold.
const KEY: &str = "^msg_[0-9a-f]{32}_[0-9]{1,18}$";

impl WarehouseTable {
    fn key(&self) -> String {
        // A validated name: it needs its quotes and nothing else.
        format!("\"{}\"", self.mapping.columns[0].name)
    }

    /// A number that two equal rows have in common, and two different ones hardly ever: 60 bits of an MD5, the one digest that
    /// both dialects have. It is summed exactly.
    fn row_hash(&self, other: &Self, compared: Compared) -> String {
        let key = self.key();
        let text = match compared {
            Compared::Keys => key,
            Compared::Values => {
                let is_there =
                    |column: &&Column| other.mapping.columns.iter().any(|one| one.name == column.name);
                let filled = self.mapping.columns[1..].iter().filter(is_there);
                // By name, so that the order of the mapping does not matter; digests, so that no value runs into the next.
                let mut filled: Vec<_> = filled.collect();
                filled.sort_by(|a, b| a.name.cmp(&b.name));
                let digests =
                    filled.into_iter().map(|column| format!(" || coalesce(md5({}), '-')", text_of(column)));
                format!("{key}{}", digests.collect::<String>())
            }
        };
        match self.dialect() {
            Dialect::Postgres => {
                format!("CAST(CAST('x' || substring(md5({text}), 1, 15) AS bit(60)) AS bigint)")
            }
            Dialect::Redshift => format!("strtol(substring(md5({text}), 1, 15), 16)"),
        }
    }

    /// Counts of the next `limit` files after `after`, in order.
    async fn by_file(
        &self,
        hash: &str,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<BTreeMap<FileId, RowCount>, OpenError> {
        let key = self.key();
        // Sixteen bytes in hex: every collation has them in the order of the bytes.
        let after = after.map(|file| format!("AND substring({key}, 5, 32) > '{file}' ")).unwrap_or_default();
        let query = format!(
            "SELECT substring({key}, 5, 32), count(*), sum({hash}) FROM {} WHERE {key} ~ '{KEY}' {after}GROUP BY 1 ORDER BY 1 LIMIT {}",
            self.name,
            limit.clamp(1, i32::MAX as usize),
        );
        let rows = self.connections().ask(&query).await?;
        Ok(rows.iter().filter_map(|row| Some((file_of(row)?, count_of(row)?))).collect())
    }

    /// Counts of one file by the number of the range, from 0.
    async fn by_range(
        &self,
        hash: &str,
        file: FileId,
        range_rows: u64,
    ) -> Result<BTreeMap<u64, RowCount>, OpenError> {
        let key = self.key();
        let query = format!(
            "SELECT (r.n - 1) / {}, count(*), sum(r.h) FROM ( \
                 SELECT CASE WHEN {key} ~ '{KEY}' THEN CAST(substring({key}, 38) AS bigint) END AS n, {hash} AS h \
                 FROM {} WHERE substring({key}, 1, 37) = 'msg_{file}_') r \
             WHERE r.n IS NOT NULL GROUP BY 1 ORDER BY 1",
            range_rows.max(1),
            self.name,
        );
        let rows = self.connections().ask(&query).await?;
        Ok(rows
            .iter()
            .filter_map(|row| Some((row.first()?.as_deref()?.parse().ok()?, count_of(row)?)))
            .collect())
    }
}

/// A column's value as text.
fn text_of(column: &Column) -> String {
    let name = format!("\"{}\"", column.name);
    match column.kind {
        // Redshift makes no text of a boolean.
        ColumnType::Boolean => format!("CASE WHEN {name} THEN 't' WHEN NOT {name} THEN 'f' END"),
        _ => format!("CAST({name} AS varchar)"),
    }
}

fn file_of(row: &[Option<String>]) -> Option<FileId> {
    FileId::from_str(row.first()?.as_deref()?).ok()
}

fn count_of(row: &[Option<String>]) -> Option<RowCount> {
    let rows = row.get(1)?.as_deref()?.parse().ok()?;
    Some(RowCount { rows, sum: row.get(2)?.clone()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(ranges: &[(u64, u64, &str)]) -> BTreeMap<u64, RowCount> {
        let count = |&(range, rows, sum): &(u64, u64, &str)| (range, RowCount { rows, sum: sum.to_owned() });
        ranges.iter().map(count).collect()
    }

    #[test]
    fn s4_5_ranges_that_differ_are_found_even_if_their_counts_do_not() {
        let limits = CompareLimits { range_rows: 100, ranges: 2, ..CompareLimits::default() };
        let ours = counts(&[(0, 100, "5050"), (1, 100, "15050"), (2, 3, "606"), (4, 1, "401")]);
        let theirs = counts(&[(0, 100, "5050"), (1, 99, "14900"), (2, 3, "607"), (9, 1, "901")]);
        let (ranges, more) = differing(&ours, &theirs, limits);
        assert_eq!(
            ranges,
            [
                RangeDifference { from: 101, to: 200, primary: 100, secondary: 99 },
                RangeDifference { from: 201, to: 300, primary: 3, secondary: 3 },
            ]
        );
        assert_eq!(more, 2);
        assert_eq!(differing(&ours, &ours, limits), (vec![], 0));
    }
}
