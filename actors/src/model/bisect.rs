//! Finding the rows that a database refuses among many (S4.4).
//!
//! A statement writes all of its rows or none, and a refusal does not say which row it was. So what is refused is
//! halved until single rows are left, each with the database's own words on it. When the first half of a
//! refused statement goes through, the second one must hold what was refused: it is halved unasked.
//!
//! With `k` bad rows among `n`, about `2·k·log2(n/k)` statements are made beyond those that write everything at
//! once: each bad row is the end of a path of halvings, the paths share their beginnings, and each halving
//! costs two statements at most. [`statements_max`] is the exact bound.

use std::ops::Range;

/// The state machine: it hands out ranges of rows to write, one after the other, and takes the result of each.
#[derive(Clone, Debug)]
pub struct Bisection {
    /// What is yet to be written, in reverse.
    pending: Vec<Piece>,
}

#[derive(Clone, Debug)]
struct Piece {
    rows: Range<usize>,
    /// It is the second half of a refused statement whose first half may go through.
    sibling: bool,
}

/// What follows from a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Narrowed {
    /// The range is tried again in parts.
    Halved,
    /// It was this row alone: it is never asked for again.
    Row(usize),
}

impl Bisection {
    /// Begins with statements that don't overlap and are not empty, in order.
    pub fn new(statements: Vec<Range<usize>>) -> Self {
        let piece = |rows: Range<usize>| Piece { rows, sibling: false };
        let pending = statements.into_iter().rev().filter(|rows| !rows.is_empty()).map(piece).collect();
        Self { pending }
    }

    /// The rows to write next; the same until [`Self::written`] or [`Self::refused`]. `None` if nothing is left.
    pub fn next(&self) -> Option<Range<usize>> {
        self.pending.last().map(|piece| piece.rows.clone())
    }

    /// What [`Self::next`] said has been written.
    pub fn written(&mut self) {
        let Some(done) = self.pending.pop() else { return };
        // Its sibling lies directly behind, was refused together with it, and is to blame.
        if let Some(sibling) = self.pending.last_mut().filter(|piece| piece.sibling) {
            debug_assert_eq!(done.rows.end, sibling.rows.start, "a sibling follows its first half");
            sibling.sibling = false;
            if sibling.rows.len() > 1 {
                self.halve();
            }
        }
    }

    /// What [`Self::next`] said has been refused.
    pub fn refused(&mut self) -> Narrowed {
        match self.pending.last() {
            Some(piece) if piece.rows.len() > 1 => {
                self.halve();
                Narrowed::Halved
            }
            _ => {
                let row = self.pending.pop().map_or(0, |piece| piece.rows.start);
                self.absolve_sibling();
                Narrowed::Row(row)
            }
        }
    }

    /// What is left, in order: for when the rest can't be written now.
    pub fn rest(self) -> impl Iterator<Item = Range<usize>> {
        self.pending.into_iter().rev().map(|piece| piece.rows)
    }

    fn halve(&mut self) {
        let Some(Piece { rows, .. }) = self.pending.pop() else { return };
        // The one in front of a piece is refused now: nothing more is known of what comes behind it.
        self.absolve_sibling();
        let middle = rows.start + rows.len() / 2;
        self.pending.push(Piece { rows: middle..rows.end, sibling: true });
        self.pending.push(Piece { rows: rows.start..middle, sibling: false });
    }

    fn absolve_sibling(&mut self) {
        if let Some(piece) = self.pending.last_mut() {
            piece.sibling = false;
        }
    }
}

/// The most statements that a bisection of `statements` ranges with `rows` rows, `bad` of them refused, makes.
pub fn statements_max(statements: usize, rows: usize, bad: usize) -> usize {
    if bad == 0 {
        return statements;
    }
    // Refused ranges of more than one row, level by level: no more than ranges of that level, nor than bad rows.
    let mut refused_ranges = 0;
    let (mut size, mut ranges) = (rows, 1usize);
    while size > 1 {
        refused_ranges += ranges.min(bad);
        size = size.div_ceil(2);
        ranges = ranges.saturating_mul(2);
    }
    statements + 2 * refused_ranges
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one range of rows is meant")]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    /// Runs it against a table that refuses `bad`. What was written, what was found, and how many statements.
    fn run(statements: Vec<Range<usize>>, bad: &BTreeSet<usize>) -> (Vec<usize>, Vec<usize>, usize) {
        let (mut written, mut found, mut count) = (Vec::new(), Vec::new(), 0);
        let mut bisection = Bisection::new(statements);
        while let Some(rows) = bisection.next() {
            count += 1;
            if bad.range(rows.clone()).next().is_none() {
                written.extend(rows);
                bisection.written();
            } else if let Narrowed::Row(row) = bisection.refused() {
                found.push(row);
            }
        }
        (written, found, count)
    }

    #[test]
    fn s4_4_one_bad_row_among_a_thousand_costs_few_statements() {
        for bad in [0, 1, 499, 500, 998, 999] {
            let (written, found, count) = run(vec![0..1_000], &BTreeSet::from([bad]));
            assert_eq!((written.len(), found), (999, vec![bad]));
            assert!(count <= 21, "{count} statements for {bad}");
        }
        assert_eq!(run(vec![0..1_000], &BTreeSet::new()).2, 1);
    }

    #[test]
    fn what_is_left_is_known_when_it_stops() {
        let mut bisection = Bisection::new(vec![0..8, 8..12]);
        assert_eq!(bisection.refused(), Narrowed::Halved);
        bisection.written(); // 0..4; so 4..8 is to blame
        assert_eq!(bisection.next(), Some(4..6));
        assert_eq!(bisection.rest().collect::<Vec<_>>(), [4..6, 6..8, 8..12]);
    }

    #[test]
    fn a_table_that_changes_its_mind_ends_it_all_the_same() {
        // Refused once as a whole, then every part goes through.
        let mut bisection = Bisection::new(vec![0..100, 100..101]);
        bisection.refused();
        let mut written = Vec::new();
        while let Some(rows) = bisection.next() {
            written.extend(rows);
            bisection.written();
        }
        assert_eq!(written, (0..101).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn s4_4_exactly_the_bad_rows_are_found_and_the_good_ones_written_once(
            sizes in prop::collection::vec(1usize..200, 1..5),
            bad in prop::collection::btree_set(0usize..800, 0..30),
        ) {
            let mut statements = Vec::new();
            let mut at = 0;
            for size in sizes {
                statements.push(at..at + size);
                at += size;
            }
            let bad: BTreeSet<_> = bad.into_iter().filter(|row| *row < at).collect();
            let bound: usize = statements
                .iter()
                .map(|rows| statements_max(1, rows.len(), bad.range(rows.clone()).count()))
                .sum();
            let (written, found, count) = run(statements, &bad);
            prop_assert_eq!(&found, &bad.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(written, (0..at).filter(|row| !bad.contains(row)).collect::<Vec<_>>());
            prop_assert!(count <= bound, "{} statements, at most {}", count, bound);
        }
    }
}
