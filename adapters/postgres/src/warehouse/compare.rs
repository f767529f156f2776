//! Counting two tables by key range: whether a secondary has what its primary has (S4.5).
//!
//! Keys are `msg_<file>_<row>`. Each table is read for its counts by file, once for every so many files; where two
//! differ, the files' rows are counted by ranges. The row numbers are summed too, so that two tables that miss different rows of a
//! range are not taken for equal. Rows in flight at that moment are differences too: compare again later.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr as _,
};

use postrider_actors::model::ids::FileId;
use serde::Serialize;

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
    /// How many of them are in the secondary. The same number of different rows is a difference.
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

/// Rows, and the sum of their numbers as the database writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RowCount {
    rows: u64,
    sum: String,
}

/// Counts both. Every question ends by its warehouse's statement timeout.
pub async fn compare(
    primary: &WarehouseTable,
    secondary: &WarehouseTable,
    limits: CompareLimits,
) -> Result<CompareReport, OpenError> {
    let mut report = CompareReport::default();
    let mut after = None;
    loop {
        let (mut ours, mut theirs) =
            tokio::try_join!(primary.by_file(after, limits.files), secondary.by_file(after, limits.files))?;
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
                primary.by_range(file, limits.range_rows),
                secondary.by_range(file, limits.range_rows)
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

    /// Counts of the next `limit` files after `after`, in order.
    async fn by_file(
        &self,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<BTreeMap<FileId, RowCount>, OpenError> {
        let key = self.key();
        // Sixteen bytes in hex: every collation has them in the order of the bytes.
        let after = after.map(|file| format!("AND substring({key}, 5, 32) > '{file}' ")).unwrap_or_default();
        let query = format!(
            "SELECT substring({key}, 5, 32), count(*), \
                 sum(CASE WHEN {key} ~ '{KEY}' THEN CAST(substring({key}, 38) AS bigint) END) \
             FROM {} WHERE {key} ~ '{KEY}' {after}GROUP BY 1 ORDER BY 1 LIMIT {}",
            self.name,
            limit.clamp(1, i32::MAX as usize),
        );
        let rows = self.connections().ask(&query).await?;
        Ok(rows.iter().filter_map(|row| Some((file_of(row)?, count_of(row)?))).collect())
    }

    /// Counts of one file by the number of the range, from 0.
    async fn by_range(&self, file: FileId, range_rows: u64) -> Result<BTreeMap<u64, RowCount>, OpenError> {
        let key = self.key();
        let query = format!(
            "SELECT (r.n - 1) / {}, count(*), sum(r.n) FROM ( \
                 SELECT CASE WHEN {key} ~ '{KEY}' THEN CAST(substring({key}, 38) AS bigint) END AS n \
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
