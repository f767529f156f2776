//! A table's shape by the catalogue: the statements that fill it, and which values can't fit.

use std::{
    collections::HashMap,
    fmt::Write as _,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use postrider_actors::model::table::{Identifier, Mapping, TableName, TableRow};
use tokio::time::Instant;
use tokio_postgres::{Row, types::Type};

/// How to write rows of one mapping into a table, as it was when its catalogue was read.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) mapping: Arc<Mapping>,
    /// When it was read.
    pub(super) at: Instant,
    /// `INSERT … SELECT … FROM unnest($1, $2, …) … ON CONFLICT (key) DO NOTHING`.
    pub(super) insert: String,
    /// `COPY table (…) FROM STDIN`, if that fills it as an INSERT does.
    pub(super) copy: Option<String>,
    /// A temporary function that writes rows each by itself, if the role may make one.
    pub(super) sift: Option<Sift>,
    /// What each column takes.
    columns: Vec<Fit>,
}

/// A temporary function of a session, and its call.
#[derive(Debug)]
pub(super) struct Sift {
    pub(super) create: String,
    pub(super) call: String,
}

/// What the catalogue says of a column's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fit {
    not_null: bool,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    /// The database knows.
    Unknown,
    /// `varchar(n)` and `char(n)`: spaces at the end are cut.
    Characters(usize),
    /// Digits before the point of a `numeric(p, s)`; others are rounded away.
    WholeDigits(usize),
    Between(i64, i64),
}

/// Read by [`Shape::of`]; `$1` is the table's name. The type's length or precision is left out of its name: a cast to
/// `varchar(20)` would cut, the assignment that follows refuses.
///
/// COPY fills what an INSERT would but for rules and row security. A trigger may fill what is NULL.
pub(super) const CATALOGUE: &str = "
SELECT a.attname::text, pg_catalog.format_type(a.atttypid, -1), a.atttypid, a.atttypmod,
       a.attnotnull AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger g
                                     WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgtype & 6 = 6),
       c.relkind IN ('r', 'p') AND NOT c.relhasrules AND NOT c.relrowsecurity,
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMP')
       AND EXISTS (SELECT FROM pg_catalog.pg_language l
                    WHERE l.lanname = 'plpgsql' AND pg_catalog.has_language_privilege(l.oid, 'USAGE'))
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
 WHERE c.oid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";

impl Shape {
    /// From the rows of [`CATALOGUE`]; the error says what is missing.
    pub(super) fn of(table: &TableName, mapping: &Arc<Mapping>, found: &[Row]) -> Result<Self, String> {
        let Some(first) = found.first() else {
            return Err(format!("the table {table} does not exist"));
        };
        let (copies, sifts): (bool, bool) = (first.get(5), first.get(6));
        let found: HashMap<String, &Row> = found.iter().map(|row| (row.get(0), row)).collect();
        let (mut names, mut kinds, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        for column in &mapping.columns {
            let Some(row) = found.get(&column.name) else {
                return Err(format!("the table {table} has no column {:?}", column.name));
            };
            names.push(Identifier::parse(&column.name).map_err(|error| error.to_string())?.to_string());
            kinds.push(row.get::<_, String>(1));
            columns.push(Fit { not_null: row.get(4), limit: limit(row.get(2), row.get(3)) });
        }
        let statements = Statements { table, names: &names, kinds: &kinds };
        Ok(Self {
            mapping: mapping.clone(),
            at: Instant::now(),
            insert: statements.insert(),
            copy: copies.then(|| format!("COPY {table} ({}) FROM STDIN", names.join(", "))),
            sift: sifts.then(|| statements.sift()),
            columns,
        })
    }

    /// Why a row can't be taken, in the database's words.
    pub(super) fn refuses(&self, row: &TableRow) -> Option<String> {
        let mut columns = self.columns.iter().zip(&self.mapping.columns).zip(&row.values);
        columns.find_map(|((fit, column), value)| fit.refuses(&column.name, value.as_deref()))
    }
}

impl Fit {
    fn refuses(self, column: &str, value: Option<&str>) -> Option<String> {
        let Some(value) = value else {
            let why = format!(
                "null value in column \"{column}\" violates not-null constraint (SQLSTATE 23502, by the catalogue)"
            );
            return self.not_null.then_some(why);
        };
        match self.limit {
            Limit::Unknown => None,
            Limit::Characters(most) => {
                let characters = value.trim_end_matches(' ').chars().count();
                (characters > most).then(|| {
                    format!(
                        "value too long for column \"{column}\": {characters} characters of at most {most} \
                         (SQLSTATE 22001, by the catalogue)"
                    )
                })
            }
            Limit::WholeDigits(most) => {
                let whole = value.trim_start_matches(['-', '0']);
                let digits = whole.split('.').next().unwrap_or_default().len();
                (digits > most).then(|| {
                    format!(
                        "numeric field overflow in column \"{column}\": {digits} digits before the point of at most \
                         {most} (SQLSTATE 22003, by the catalogue)"
                    )
                })
            }
            Limit::Between(least, most) => {
                let number = value.parse::<i64>().ok()?;
                (number < least || number > most).then(|| {
                    format!("value out of range for column \"{column}\" (SQLSTATE 22003, by the catalogue)")
                })
            }
        }
    }
}

/// What a type and its modifier limit, as the catalogue encodes them.
fn limit(kind: u32, modifier: i32) -> Limit {
    /// The modifiers of lengths and precisions count their own header.
    const HEADER: i32 = 4;
    let modifier = modifier.checked_sub(HEADER).filter(|modifier| *modifier >= 0);
    match Type::from_oid(kind) {
        Some(Type::INT2) => Limit::Between(i16::MIN.into(), i16::MAX.into()),
        Some(Type::INT4) => Limit::Between(i32::MIN.into(), i32::MAX.into()),
        Some(Type::VARCHAR | Type::BPCHAR) => modifier
            .map_or(Limit::Unknown, |characters| Limit::Characters(characters.unsigned_abs() as usize)),
        Some(Type::NUMERIC) => {
            // 16 bits each; since Postgres 15 a scale may be negative, or greater than the precision.
            let whole = modifier.and_then(|both| {
                let (precision, scale) = (both >> 16 & 0xffff, both & 0xffff);
                usize::try_from(precision - scale).ok().filter(|_| scale <= 1_000)
            });
            whole.map_or(Limit::Unknown, Limit::WholeDigits)
        }
        _ => Limit::Unknown,
    }
}

/// Makes statements of quoted names and of types.
struct Statements<'a> {
    table: &'a TableName,
    names: &'a [String],
    kinds: &'a [String],
}

impl Statements<'_> {
    /// `with(at, kind)` of each column, between commas.
    fn each(&self, with: impl Fn(usize, &str) -> String) -> String {
        let each: Vec<_> = self.kinds.iter().enumerate().map(|(at, kind)| with(at, kind)).collect();
        each.join(", ")
    }

    /// Each text is cast to its column's type.
    fn values(&self) -> String {
        self.each(|at, kind| format!("v.c{at}::{kind}"))
    }

    fn insert(&self) -> String {
        format!(
            "INSERT INTO {} ({}) SELECT {} FROM unnest({}) AS v({}) ON CONFLICT ({}) DO NOTHING",
            self.table,
            self.names.join(", "),
            self.values(),
            self.each(|at, _| format!("${}", at + 1)),
            self.each(|at, _| format!("c{at}")),
            self.names[0],
        )
    }

    /// A function of the session, by the name of its text's digest. `OTHERS` leaves a cancelled statement as it is.
    fn sift(&self) -> Sift {
        let arrays = self.each(|at, _| format!("a{at}"));
        let body = format!(
            "({parameters}) RETURNS TABLE (n bigint, code text, words text, about text, detail text)
LANGUAGE plpgsql AS $sift$
#variable_conflict use_column
DECLARE
    v record;
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    FOR v IN SELECT * FROM unnest({arrays}) WITH ORDINALITY AS u ({columns}, n) LOOP
        BEGIN
            INSERT INTO {table} ({names}) VALUES ({values}) ON CONFLICT ({key}) DO NOTHING;
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, words = MESSAGE_TEXT, about = CONSTRAINT_NAME,
                                    detail = PG_EXCEPTION_DETAIL;
            n := v.n;
            RETURN NEXT;
        END;
    END LOOP;
END $sift$",
            parameters = self.each(|at, _| format!("a{at} text[]")),
            columns = self.each(|at, _| format!("c{at}")),
            table = self.table,
            names = self.names.join(", "),
            values = self.values(),
            key = self.names[0],
        );
        let mut digest = DefaultHasher::new();
        body.hash(&mut digest);
        let name = format!("pg_temp.postrider_sift_{:016x}", digest.finish());
        let mut call = format!("SELECT n, code, words, about, detail FROM {name}(");
        // Writing to a String can't fail.
        let _ = write!(call, "{})", self.each(|at, _| format!("${}", at + 1)));
        Sift { create: format!("CREATE OR REPLACE FUNCTION {name}{body}"), call }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(limit: Limit, value: &str) -> bool {
        Fit { not_null: false, limit }.refuses("c", Some(value)).is_some()
    }

    #[test]
    fn f66_modifiers_are_read_as_the_catalogue_writes_them() {
        let numeric = |precision: i32, scale: i32| limit(1700, ((precision << 16) | (scale & 0x7ff)) + 4);
        assert_eq!(limit(1043, 34), Limit::Characters(30));
        assert_eq!(limit(1042, 7), Limit::Characters(3));
        assert_eq!(limit(1043, -1), Limit::Unknown);
        assert_eq!(limit(25, -1), Limit::Unknown);
        assert_eq!(numeric(10, 2), Limit::WholeDigits(8));
        assert_eq!(numeric(2, 2), Limit::WholeDigits(0));
        assert_eq!(numeric(2, 5), Limit::Unknown, "more after the point than there are");
        assert_eq!(numeric(5, -2), Limit::Unknown);
        assert_eq!(limit(1700, -1), Limit::Unknown);
        assert_eq!(limit(21, -1), Limit::Between(-32_768, 32_767));
    }

    #[test]
    fn f66_only_what_can_never_fit_is_refused() {
        for (limit, value, refused) in [
            (Limit::Characters(3), "äöü", false),
            (Limit::Characters(3), "abc   ", false),
            (Limit::Characters(3), "abcd", true),
            (Limit::WholeDigits(2), "-99.999", false),
            (Limit::WholeDigits(2), "0012.5", false),
            (Limit::WholeDigits(2), "-100", true),
            (Limit::WholeDigits(0), "0.99", false),
            (Limit::WholeDigits(0), "1", true),
            (Limit::Between(-5, 5), "5", false),
            (Limit::Between(-5, 5), "-6", true),
            (Limit::Between(-5, 5), "no number", false),
            (Limit::Unknown, "anything", false),
        ] {
            assert_eq!(refuses(limit, value), refused, "{limit:?} {value}");
        }
        let null = |not_null| Fit { not_null, limit: Limit::Unknown }.refuses("c", None);
        assert!(null(true).is_some_and(|why| why.contains("23502")) && null(false).is_none());
    }
}
