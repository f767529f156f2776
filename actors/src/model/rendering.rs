//! Whether the bodies of a file's rows can be made, found out before a row is accepted (F67).
//!
//! A template that names what a feed does not have fails for every row: then the file is held and nothing of it is
//! accepted. What fails for one row only is that row's affair: it is a reject, with its reason.

use std::{fmt, sync::Arc};

use super::{
    batch::{BatchHeader, RowLayout},
    body::BodyTemplate,
    table::{MAPPING_TYPE, Mapping},
};

/// If none of so many first rows can be rendered, it is not the rows' fault.
const FIRST_ROWS: u32 = 20;

/// Makes the headers of a file's batches, once the layout of its rows is known.
pub type HeadersOf = Box<dyn FnMut(&RowLayout) -> Vec<Arc<BatchHeader>> + Send>;

/// Renders the rows of one file while they are read, as far as they could fail.
pub struct BodyChecks {
    /// Rows before this one were accepted earlier, by the template of that time.
    from_row: u64,
    headers_of: HeadersOf,
    checks: Option<Vec<BodyCheck>>,
    /// Of the first rows: how many were rendered, and how many could not be.
    rendered: u32,
    failed: u32,
    why: Option<String>,
    body: Vec<u8>,
}

/// The bodies for one destination.
struct BodyCheck {
    header: Arc<BatchHeader>,
    template: BodyTemplate,
    /// What makes every row fail.
    always: Option<String>,
    /// Whether one row may fail where another one does not.
    differs: bool,
    /// Whether a row was rendered.
    is_proven: bool,
}

impl BodyChecks {
    /// Of the rows from `from_row` on.
    pub fn new(from_row: u64, headers_of: HeadersOf) -> Self {
        let (checks, why) = (None, None);
        Self { from_row, headers_of, checks, rendered: 0, failed: 0, why, body: Vec::new() }
    }

    /// Why the body of this row can't be made, if it can't.
    pub(super) fn check(&mut self, row: u64, layout: &RowLayout, bytes: &[u8]) -> Result<(), String> {
        if row < self.from_row {
            return Ok(());
        }
        let checks = self
            .checks
            .get_or_insert_with(|| (self.headers_of)(layout).into_iter().map(BodyCheck::new).collect());
        let mut checked = Ok(());
        for check in checks.iter_mut().filter(|check| check.has_to_look()) {
            if let Err(why) = check.look(row, bytes, &mut self.body) {
                checked = Err(format!("destination {}: {why}", check.header.destination));
                break;
            }
        }
        if self.rendered < FIRST_ROWS {
            self.rendered += 1;
            self.failed += u32::from(checked.is_err());
            if let (Err(why), None) = (&checked, &self.why) {
                self.why = Some(why.clone());
            }
        }
        checked
    }

    /// Why no row of the file can be rendered, as its first rows show; to be asked once some were read.
    pub fn verdict(&self) -> Option<&str> {
        self.why.as_deref().filter(|_| self.failed == self.rendered)
    }
}

impl BodyCheck {
    fn new(header: Arc<BatchHeader>) -> Self {
        let (mut always, mut differs) = (None, false);
        let mut source = header.template.as_deref();
        if header.content_type == MAPPING_TYPE {
            source = None; // a table's rows are judged one by one when they are written
            always = Mapping::of(&header).ok().and_then(|mapping| mapping.lacks(&header.layout));
        }
        let template = BodyTemplate::compile(source, &header.content_type).unwrap_or_else(|error| {
            always = Some(format!("it is not a valid template: {error}"));
            BodyTemplate::default()
        });
        if !template.is_default() {
            differs = !(template.is_plain() && header.layout != RowLayout::Objects);
        }
        Self { header, template, always, differs, is_proven: false }
    }

    /// The default body can always be made; of rows that are all alike, one proves it for all.
    fn has_to_look(&self) -> bool {
        self.always.is_some() || (!self.template.is_default() && (self.differs || !self.is_proven))
    }

    fn look(&mut self, row: u64, bytes: &[u8], body: &mut Vec<u8>) -> Result<(), String> {
        if let Some(why) = &self.always {
            return Err(why.clone());
        }
        body.clear();
        let id = self.header.message_id(row);
        self.template.check(&self.header, id, bytes, body)?;
        self.is_proven = true;
        Ok(())
    }
}

impl fmt::Debug for BodyChecks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BodyChecks")
            .field("rendered", &self.rendered)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{batch::put_cell, ids::FileId, priority::Priority, terms::Terms};

    fn header(template: &str, layout: RowLayout) -> Arc<BatchHeader> {
        Arc::new(BatchHeader {
            feed: "alerts".into(),
            destination: "support".into(),
            file: FileId([1; 16]),
            layout,
            template: Some(template.into()),
            content_type: "application/json".into(),
            terms: Terms::default(),
            priority: Priority::Normal,
        })
    }

    fn columns() -> RowLayout {
        RowLayout::Columns { names: vec!["user_id".into(), "points".into()], recipient: 0 }
    }

    fn checks(template: &str, layout: &RowLayout) -> BodyChecks {
        let header = header(template, layout.clone());
        BodyChecks::new(1, Box::new(move |_| vec![header.clone()]))
    }

    fn cells(points: &str) -> Vec<u8> {
        let mut row = Vec::new();
        put_cell(&mut row, "u1");
        put_cell(&mut row, points);
        row
    }

    #[test]
    fn f67_a_name_that_the_feed_lacks_is_named_and_is_a_verdict_on_the_file() {
        let layout = columns();
        let mut checks = checks(r#"{"to": {{ recipient }}, "n": {{ data.pionts }}}"#, &layout);
        for row in 1..=50 {
            let why = checks.check(row, &layout, &cells("7")).unwrap_err();
            assert_eq!(
                why,
                "destination support: the template needs data.pionts, which the row does not have"
            );
        }
        assert_eq!(
            checks.verdict(),
            Some("destination support: the template needs data.pionts, which the row does not have")
        );
    }

    #[test]
    fn f67_a_row_whose_own_body_fails_is_no_verdict_on_the_others() {
        let layout = columns();
        let mut checks = checks(r#"{"to": {{ recipient }}, "n": {{ data.points | int }}}"#, &layout);
        for (row, points, is_fine) in [(1, "seven", false), (2, "7", true), (3, "8", true), (4, "", false)] {
            assert_eq!(checks.check(row, &layout, &cells(points)).is_ok(), is_fine, "row {row}");
        }
        assert_eq!(checks.verdict(), None);
        let why = checks.check(5, &layout, &cells("secret")).unwrap_err();
        assert!(!why.contains("secret"), "I10: {why}");
    }

    #[test]
    fn f67_what_should_be_json_is() {
        let layout = columns();
        let mut checks = checks(r#"{"to": {{ recipient }}, "n": {{ data.points }}"#, &layout);
        let why = checks.check(1, &layout, &cells("7")).unwrap_err();
        assert!(
            why.starts_with("destination support: the body is not JSON, as its content type says: "),
            "{why}"
        );
        assert_eq!(checks.verdict(), Some(&*why));
    }

    #[test]
    fn of_rows_that_are_all_alike_one_is_rendered() {
        let layout = columns();
        let mut checks = checks(r#"{"to": {{ recipient }}, "n": {{ data.points }}}"#, &layout);
        assert_eq!(checks.check(1, &layout, &cells("7")), Ok(()));
        let check = &checks.checks.as_ref().unwrap()[0];
        assert!(!check.has_to_look());
        // Objects have keys of their own.
        let mut checks =
            self::checks(r#"{"to": {{ recipient }}, "n": {{ data.points }}}"#, &RowLayout::Objects);
        let object = |object: &str| {
            let mut row = Vec::new();
            put_cell(&mut row, "u1");
            row.extend(object.as_bytes());
            row
        };
        assert_eq!(checks.check(1, &RowLayout::Objects, &object(r#"{"points": 7}"#)), Ok(()));
        let why = checks.check(2, &RowLayout::Objects, &object(r#"{"user_id": "u1"}"#)).unwrap_err();
        assert_eq!(why, "destination support: the template needs data.points, which the row does not have");
        assert_eq!(checks.verdict(), None);
    }

    #[test]
    fn what_was_accepted_before_is_not_judged_again() {
        let layout = columns();
        let header = header("{{ nobody }}", layout.clone());
        let mut checks = BodyChecks::new(3, Box::new(move |_| vec![header.clone()]));
        assert_eq!((checks.check(2, &layout, &cells("7")), checks.verdict()), (Ok(()), None));
        assert!(checks.check(3, &layout, &cells("7")).is_err());
    }
}
