//! Finding the rows that a database refuses among many, whatever its reason (S4.4, F66).
//!
//! One rule for every code: if the server answered and the connection lives, the statement is divided. A statement writes
//! all of its rows or none, and a refusal does not say which row it was. So what is refused is tried row by row in one
//! statement where the table can do that, and halved until single rows are left where it can't. When the first half
//! of a refused statement goes through, the second one must hold what was refused: it is halved unasked.
//!
//! Nobody is blamed without evidence. A code that speaks of a value (`Invalid`) is evidence; of any other code it is that the
//! table has taken rows since the code first came. Before it has, rows from all over the statement are tried one by one:
//! if the table refuses these too, the statement as such can't work (a missing table, a missing grant), and all wait.
//!
//! With `k` bad rows among `n`, halving makes about `2·k·log2(n/k)` statements beyond those that write everything at
//! once: each bad row is the end of a path of halvings, the paths share their beginnings, and each halving
//! costs two statements at most. [`statements_max`] is the exact bound.
//!
//! A webhook's bundles are divided by the same rule ([`bundle`](super::bundle)): a statement is a request, a row a message.

use std::{collections::BTreeMap, fmt, ops::Range};

use super::call::FailureKind;

/// Single rows that are tried before a statement as such is taken to be refused.
const PROBES: u32 = 3;

/// Why a database that answered, and whose connection lives, wrote nothing of a statement.
#[derive(Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What its code says: `Invalid` blames a value, `Unavailable` the moment, anything else nobody yet.
    pub kind: FailureKind,
    /// The code: an SQLSTATE.
    pub code: Box<str>,
    /// The database's words. They may quote the row: they are kept with it and never logged (I10).
    pub words: String,
}

impl Refusal {
    /// Its words for the journal, where they speak of the database and not of a row (I10).
    pub fn for_the_journal(&self) -> &str {
        let is_of_the_schema = ["0A", "3D", "3F", "42"].iter().any(|class| self.code.starts_with(class));
        let may_be_said = is_of_the_schema || self.kind == FailureKind::Unavailable;
        if may_be_said { &self.words } else { "its words may quote a row: they are kept with the messages" }
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Refusal({} {})", self.kind.as_str(), self.code)
    }
}

/// A row that was refused by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// Which.
    pub row: usize,
    /// Why.
    pub refusal: Refusal,
    /// Whether there is evidence against it. Without evidence it is tried again later.
    pub is_blamed: bool,
}

/// What follows from a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Narrowed {
    /// The rows are tried again in parts.
    Parts,
    /// It was this row alone: it is never asked for again.
    Row(RefusedRow),
    /// The statement as such is refused: what is left waits.
    Whole(Refusal),
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextStatement {
    /// The rows.
    pub rows: Range<usize>,
    /// Each by itself, in one statement; otherwise all or none.
    pub row_by_row: bool,
}

/// The state machine: it hands out ranges of rows to write, one after the other, and takes the result of each.
#[derive(Clone, Debug)]
pub struct Bisection {
    /// What is yet to be written, in reverse.
    pending: Vec<Piece>,
    /// Whether the table can write rows each by itself in one statement.
    sifts: bool,
    /// The codes that came, and whether the table has taken rows since.
    codes: BTreeMap<Box<str>, bool>,
    /// Rows that were refused alone before there was evidence.
    unproven: Vec<(usize, Refusal)>,
}

#[derive(Clone, Debug)]
struct Piece {
    rows: Range<usize>,
    /// It is the second half of a refused statement whose first half may go through.
    sibling: bool,
    row_by_row: bool,
}

impl Bisection {
    /// Begins with statements that don't overlap and are not empty, in order. `sifts`: the table can write rows each by
    /// itself in one statement; `at_once`: bad rows are expected, so it begins with that.
    pub fn new(statements: Vec<Range<usize>>, sifts: bool, at_once: bool) -> Self {
        let piece = |rows: Range<usize>| {
            let row_by_row = sifts && at_once && rows.len() > 1;
            Piece { rows, sibling: false, row_by_row }
        };
        let pending = statements.into_iter().rev().filter(|rows| !rows.is_empty()).map(piece).collect();
        Self { pending, sifts, codes: BTreeMap::new(), unproven: Vec::new() }
    }

    /// The rows to write next; the same until its result is given. `None` if nothing is left.
    pub fn next(&self) -> Option<NextStatement> {
        let piece = self.pending.last()?;
        Some(NextStatement { rows: piece.rows.clone(), row_by_row: piece.row_by_row })
    }

    /// What [`Self::next`] said has been written: all of it. Rows that are blamed now: the statement works.
    pub fn written(&mut self) -> Vec<RefusedRow> {
        let Some(done) = self.pending.pop() else { return Vec::new() };
        // Its sibling lies directly behind, was refused together with it, and is to blame.
        if let Some(sibling) = self.pending.last_mut().filter(|piece| piece.sibling) {
            debug_assert_eq!(done.rows.end, sibling.rows.start, "a sibling follows its first half");
            sibling.sibling = false;
            if sibling.rows.len() > 1 {
                self.halve();
            }
        }
        self.took_rows()
    }

    /// What [`Self::next`] said has been written row by row, but for the rows of `refused`. What is known of refused
    /// rows now.
    pub fn sifted(&mut self, refused: Vec<(usize, Refusal)>) -> Vec<RefusedRow> {
        let Some(done) = self.pending.pop() else { return Vec::new() };
        let took_any = refused.len() < done.rows.len();
        for (_, refusal) in &refused {
            self.codes.entry(refusal.code.clone()).or_insert(false);
        }
        let mut known = if took_any { self.took_rows() } else { Vec::new() };
        known.extend(refused.into_iter().map(|(row, refusal)| {
            let is_blamed = self.blames(&refusal);
            RefusedRow { row, refusal, is_blamed }
        }));
        known
    }

    /// What [`Self::next`] said has been refused as a whole. `draw`, in `0.0..1.0`, chooses the row that is tried alone.
    pub fn refused(&mut self, refusal: Refusal, draw: f64) -> Narrowed {
        self.codes.entry(refusal.code.clone()).or_insert(false);
        let has_evidence = refusal.kind == FailureKind::Invalid || self.codes[&refusal.code];
        if self.pending.last().is_some_and(|piece| piece.row_by_row) {
            // It can't be done that way: a constraint that is checked at the end, no right to make functions.
            self.sifts = false;
            self.pending.iter_mut().for_each(|piece| piece.row_by_row = false);
        }
        let is_of_the_moment = refusal.kind == FailureKind::Unavailable;
        match self.pending.last_mut() {
            Some(piece) if piece.rows.len() > 1 => {
                if self.sifts && (has_evidence || !is_of_the_moment) {
                    piece.row_by_row = true;
                } else if has_evidence {
                    self.halve();
                } else {
                    self.probe(draw);
                }
                Narrowed::Parts
            }
            _ => self.refused_alone(refusal, draw),
        }
    }

    fn refused_alone(&mut self, refusal: Refusal, draw: f64) -> Narrowed {
        let row = self.pending.pop().map_or(0, |piece| piece.rows.start);
        self.absolve_sibling();
        if self.blames(&refusal) {
            return Narrowed::Row(RefusedRow { row, refusal, is_blamed: true });
        }
        if self.codes[&refusal.code] {
            return Narrowed::Row(RefusedRow { row, refusal, is_blamed: false });
        }
        self.unproven.push((row, refusal.clone()));
        let is_of_the_moment = refusal.kind == FailureKind::Unavailable;
        if is_of_the_moment || self.unproven.len() >= PROBES as usize {
            return Narrowed::Whole(refusal);
        }
        self.probe(draw);
        Narrowed::Parts
    }

    /// Rows that nobody knows what to think of: refused alone, and the table has taken nothing since.
    pub fn unproven(&mut self) -> Vec<RefusedRow> {
        let judged = |(row, refusal)| RefusedRow { row, refusal, is_blamed: false };
        self.unproven.drain(..).map(judged).collect()
    }

    /// What was not decided on, in order: for when the rest can't be written now.
    pub fn rest(self) -> impl Iterator<Item = usize> {
        let pending = self.pending.into_iter().rev().flat_map(|piece| piece.rows);
        let mut rest: Vec<_> = pending.chain(self.unproven.into_iter().map(|(row, _)| row)).collect();
        rest.sort_unstable();
        rest.into_iter()
    }

    /// Whether there is evidence against a row that was refused alone. A temporary refusal never counts as evidence.
    fn blames(&self, refusal: &Refusal) -> bool {
        match refusal.kind {
            FailureKind::Invalid => true,
            FailureKind::Unavailable => false,
            _ => self.codes.get(&refusal.code).copied().unwrap_or(false),
        }
    }

    /// The statement works: whoever was refused alone is to blame.
    fn took_rows(&mut self) -> Vec<RefusedRow> {
        self.codes.values_mut().for_each(|taken_since| *taken_since = true);
        let unproven = std::mem::take(&mut self.unproven);
        let judged = |(row, refusal)| {
            let is_blamed = self.blames(&refusal);
            RefusedRow { row, refusal, is_blamed }
        };
        unproven.into_iter().map(judged).collect()
    }

    fn halve(&mut self) {
        let Some(Piece { rows, .. }) = self.pending.pop() else { return };
        // The one in front of a piece is refused now: nothing more is known of what comes behind it.
        self.absolve_sibling();
        let middle = rows.start + rows.len() / 2;
        self.push(middle..rows.end, true);
        self.push(rows.start..middle, false);
    }

    /// Puts a single row of what is next on top: if the table takes it, the statement works.
    fn probe(&mut self, draw: f64) {
        let Some(Piece { rows, .. }) = self.pending.pop() else { return };
        self.absolve_sibling();
        let at = rows.start + ((rows.len() as f64 * draw) as usize).min(rows.len() - 1);
        self.push(at + 1..rows.end, false);
        self.push(rows.start..at, false);
        self.push(at..at + 1, false);
    }

    fn push(&mut self, rows: Range<usize>, sibling: bool) {
        if !rows.is_empty() {
            self.pending.push(Piece { rows, sibling, row_by_row: false });
        }
    }

    fn absolve_sibling(&mut self) {
        if let Some(piece) = self.pending.last_mut() {
            piece.sibling = false;
        }
    }
}

/// How many of a table's rows it refused lately, and so how its next statements begin.
#[derive(Clone, Copy, Debug, Default)]
pub struct RefusedShare(f64);

impl RefusedShare {
    /// A group with `rows` rows, `refused` of which were to blame, has been written.
    pub fn note(&mut self, rows: usize, refused: usize) {
        if rows > 0 {
            // A few groups' memory: a bad file is soon over.
            self.0 = 0.5 * self.0 + 0.5 * (refused as f64 / rows as f64);
        }
    }

    /// The most rows of a statement that is more likely taken than refused, if each row is as bad as the last ones were.
    pub fn statement_rows(self) -> usize {
        const LN_2: f64 = std::f64::consts::LN_2;
        if self.0 > 0.0 { ((LN_2 / self.0) as usize).max(1) } else { usize::MAX }
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

    fn refusal(kind: FailureKind, code: &str) -> Refusal {
        Refusal { kind, code: code.into(), words: format!("says {code}") }
    }

    fn value() -> Refusal {
        refusal(FailureKind::Invalid, "22001")
    }

    /// What came of it all.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Came {
        written: Vec<usize>,
        blamed: Vec<usize>,
        later: Vec<usize>,
        whole: Option<Box<str>>,
        statements: usize,
    }

    impl Came {
        fn judged(&mut self, rows: impl IntoIterator<Item = RefusedRow>) {
            for RefusedRow { row, is_blamed, .. } in rows {
                if is_blamed { self.blamed.push(row) } else { self.later.push(row) }
            }
        }
    }

    /// Runs it against a table that refuses the rows of `bad`, and everything if `all` says so.
    fn run(
        mut bisection: Bisection,
        bad: &BTreeMap<usize, Refusal>,
        all: Option<&Refusal>,
        mut draw: impl FnMut() -> f64,
    ) -> Came {
        let mut came = Came::default();
        while let Some(NextStatement { rows, row_by_row }) = bisection.next() {
            came.statements += 1;
            let refused: Vec<_> = match all {
                Some(refusal) => rows.clone().map(|row| (row, refusal.clone())).collect(),
                None => bad.range(rows.clone()).map(|(row, refusal)| (*row, refusal.clone())).collect(),
            };
            if row_by_row {
                came.written.extend(rows.filter(|row| refused.iter().all(|(bad, _)| bad != row)));
                came.judged(bisection.sifted(refused));
            } else if let Some((_, refusal)) = refused.into_iter().next() {
                match bisection.refused(refusal, draw()) {
                    Narrowed::Parts => {}
                    Narrowed::Row(row) => came.judged([row]),
                    Narrowed::Whole(refusal) => {
                        came.whole = Some(refusal.code);
                        came.later.extend(bisection.rest());
                        return came;
                    }
                }
            } else {
                came.written.extend(rows);
                came.judged(bisection.written());
            }
        }
        came.judged(bisection.unproven());
        came.written.sort_unstable();
        came.blamed.sort_unstable();
        came
    }

    fn halving(statements: Vec<Range<usize>>) -> Bisection {
        Bisection::new(statements, false, false)
    }

    #[test]
    fn s4_4_one_bad_row_among_a_thousand_costs_few_statements() {
        for bad in [0, 1, 499, 500, 998, 999] {
            let came = run(halving(vec![0..1_000]), &BTreeMap::from([(bad, value())]), None, || 0.0);
            assert_eq!((came.written.len(), &*came.blamed), (999, &[bad][..]));
            assert!(came.statements <= 21, "{} statements for {bad}", came.statements);
        }
        assert_eq!(run(halving(vec![0..1_000]), &BTreeMap::new(), None, || 0.0).statements, 1);
    }

    #[test]
    fn f66_a_bad_row_is_blamed_whatever_its_code_and_a_moment_blames_nobody() {
        for (kind, code, is_blamed) in [
            (FailureKind::Invalid, "22001", true),
            (FailureKind::Invalid, "23514", true),
            (FailureKind::Refused, "P0001", true),
            (FailureKind::Refused, "P0002", true),
            (FailureKind::Refused, "54001", true),
            (FailureKind::Refused, "MYERR", true),
            (FailureKind::Refused, "42P01", true),
            (FailureKind::Denied, "42501", true),
            (FailureKind::Unavailable, "40001", false),
            (FailureKind::Unavailable, "57014", false),
        ] {
            for sifts in [false, true] {
                for bad in [0, 250, 499] {
                    let bad = BTreeMap::from([(bad, refusal(kind, code))]);
                    for draw in [0.0, 0.5, 0.999] {
                        let bisection = Bisection::new(vec![0..500], sifts, false);
                        let came = run(bisection, &bad, None, || draw);
                        if kind == FailureKind::Unavailable && came.whole.is_some() {
                            assert!(came.blamed.is_empty(), "its row was the one that was tried: {came:?}");
                            continue;
                        }
                        assert_eq!(came.written.len(), 499, "{code} {sifts}: {came:?}");
                        let (blamed, later) = (came.blamed.len(), came.later.len());
                        assert_eq!(
                            (blamed, later),
                            if is_blamed { (1, 0) } else { (0, 1) },
                            "{code} {sifts}"
                        );
                        assert!(came.statements <= if sifts { 5 } else { 24 }, "{code} {sifts}: {came:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn f66_a_table_that_takes_nothing_blames_nobody_and_costs_a_few_statements() {
        for (kind, code, sifts, most) in [
            (FailureKind::Refused, "42P01", false, 4),
            (FailureKind::Denied, "42501", false, 4),
            (FailureKind::Refused, "P0001", false, 4),
            (FailureKind::Unavailable, "55P03", false, 2),
            (FailureKind::Refused, "42P01", true, 2),
            (FailureKind::Unavailable, "53100", true, 2),
        ] {
            let all = refusal(kind, code);
            let bisection = Bisection::new(vec![0..5_000, 5_000..7_000], sifts, false);
            let came = run(bisection, &BTreeMap::new(), Some(&all), || 0.7);
            assert!(came.blamed.is_empty() && came.written.is_empty(), "{code}: {came:?}");
            assert!(came.statements <= 2 * most, "{code}: {} statements", came.statements);
            let mut later = came.later;
            later.sort_unstable();
            assert_eq!(later, (0..7_000).collect::<Vec<_>>(), "{code}: all of them wait, each once");
        }
        // A code that speaks of values is another matter.
        let came = run(halving(vec![0..8]), &BTreeMap::new(), Some(&value()), || 0.0);
        assert_eq!(came.blamed, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn f66_a_table_that_goes_away_in_the_middle_blames_none_of_what_is_left() {
        let mut bisection = halving(vec![0..8]);
        assert_eq!(bisection.refused(value(), 0.0), Narrowed::Parts);
        assert_eq!(bisection.written(), []); // 0..4
        let gone = refusal(FailureKind::Refused, "42P01");
        for draw in [0.0, 0.5, 0.9] {
            assert_eq!(bisection.refused(gone.clone(), draw), Narrowed::Parts);
        }
        assert!(matches!(bisection.refused(gone, 0.0), Narrowed::Whole(_)));
        assert_eq!(bisection.rest().collect::<Vec<_>>(), [4, 5, 6, 7]);
    }

    #[test]
    fn a_table_that_cannot_go_row_by_row_is_halved_instead() {
        let mut bisection = Bisection::new(vec![0..4, 4..8], true, true);
        assert_eq!(bisection.next(), Some(NextStatement { rows: 0..4, row_by_row: true }));
        bisection.refused(value(), 0.0);
        assert_eq!(bisection.next(), Some(NextStatement { rows: 0..2, row_by_row: false }));
        let came = run(bisection, &BTreeMap::from([(2, value())]), None, || 0.0);
        assert_eq!((came.written, came.blamed), (vec![0, 1, 3, 4, 5, 6, 7], vec![2]));
    }

    #[test]
    fn f66_statements_begin_at_the_size_that_the_last_refusals_suggest() {
        let mut share = RefusedShare::default();
        assert_eq!(share.statement_rows(), usize::MAX);
        for _ in 0..10 {
            share.note(1_000, 200);
        }
        assert_eq!(share.statement_rows(), 3, "a fifth of them is bad");
        for _ in 0..20 {
            share.note(1_000, 0);
        }
        assert!(share.statement_rows() > 1_000_000, "that is over");
        share.note(0, 0);
        share.note(10, 10);
        assert_eq!(share.statement_rows(), 1);
    }

    #[test]
    fn what_is_left_is_known_when_it_stops() {
        let mut bisection = halving(vec![0..8, 8..12]);
        assert_eq!(bisection.refused(value(), 0.0), Narrowed::Parts);
        bisection.written(); // 0..4; so 4..8 is to blame
        assert_eq!(bisection.next().map(|next| next.rows), Some(4..6));
        assert_eq!(bisection.rest().collect::<Vec<_>>(), (4..12).collect::<Vec<_>>());
    }

    #[test]
    fn a_table_that_changes_its_mind_ends_it_all_the_same() {
        // Refused once as a whole, then every part goes through.
        let mut bisection = halving(vec![0..100, 100..101]);
        bisection.refused(value(), 0.0);
        let came = run(bisection, &BTreeMap::new(), None, || 0.0);
        assert_eq!(came.written, (0..101).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn s4_4_exactly_the_bad_rows_are_found_and_the_good_ones_written_once(
            sizes in prop::collection::vec(1usize..200, 1..5),
            bad in prop::collection::btree_set(0usize..800, 0..30),
        ) {
            let (statements, rows) = in_a_row(sizes);
            let bad: BTreeSet<_> = bad.into_iter().filter(|row| *row < rows).collect();
            let bound: usize = statements
                .iter()
                .map(|rows| statements_max(1, rows.len(), bad.range(rows.clone()).count()))
                .sum();
            let refused = bad.iter().map(|row| (*row, value())).collect();
            let came = run(halving(statements), &refused, None, || 0.0);
            prop_assert_eq!(&came.blamed, &bad.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(came.written, (0..rows).filter(|row| !bad.contains(row)).collect::<Vec<_>>());
            prop_assert!(came.statements <= bound, "{} statements, at most {}", came.statements, bound);
        }

        #[test]
        fn f66_every_row_ends_once_and_no_good_row_is_blamed(
            sizes in prop::collection::vec(1usize..60, 1..5),
            bad in prop::collection::btree_map(0usize..240, 0usize..5, 0..80),
            sifts: bool,
            at_once: bool,
            draws in prop::collection::vec(0.0f64..1.0, 1..20),
        ) {
            let kinds = [
                value(),
                refusal(FailureKind::Refused, "P0002"),
                refusal(FailureKind::Denied, "42501"),
                refusal(FailureKind::Unavailable, "40001"),
                refusal(FailureKind::Refused, "MYERR"),
            ];
            let (statements, rows) = in_a_row(sizes);
            let bad: BTreeMap<_, _> = bad
                .into_iter()
                .filter(|(row, _)| *row < rows)
                .map(|(row, kind)| (row, kinds[kind].clone()))
                .collect();
            let mut draws = draws.into_iter().cycle();
            let came = run(Bisection::new(statements, sifts, at_once), &bad, None, || draws.next().unwrap());
            let mut all: Vec<_> = came.written.iter().chain(&came.blamed).chain(&came.later).copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..rows).collect::<Vec<_>>());
            prop_assert!(came.blamed.iter().all(|row| bad.contains_key(row)));
            prop_assert!(came.written.iter().all(|row| !bad.contains_key(row)));
            let is_moment = |row: &usize| bad[row].kind == FailureKind::Unavailable;
            prop_assert!(!came.blamed.iter().any(is_moment));
        }
    }

    fn in_a_row(sizes: Vec<usize>) -> (Vec<Range<usize>>, usize) {
        let mut at = 0;
        let statements = sizes.into_iter().map(|size| {
            at += size;
            at - size..at
        });
        (statements.collect(), at)
    }
}
