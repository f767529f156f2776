//! A message's body: the default JSON, or a template in the syntax of Jinja (`minijinja`).
//!
//! A template sees `id`, `feed`, `recipient`, `row` and `data` (the columns, or the JSON object). If the
//! content type is JSON, what a template prints is written as a JSON value, quotes included, so that no
//! recipient can break out of a string: write `{"to": {{ recipient }}}`, without quotes of your own.
//!
//! Bodies depend on nothing but the template, the content type and the row (I4): no clock, no random.

use std::{collections::BTreeSet, io::Write as _};

use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value, context, value::Serde};
use postrider_settings::Format;
use serde::de::IgnoredAny;

use super::{
    batch::{BatchHeader, MessageData, MessageParts, PayloadError, RowLayout, put_cell},
    ids::{FileId, MessageId},
    priority::Priority,
    terms::Terms,
};

/// The most work one rendering may do, in template instructions: a loop can't hang a delivery.
const FUEL: u64 = 1_000_000;

/// What a template sees.
const NAMES: [&str; 5] = ["id", "feed", "recipient", "row", "data"];

/// A body template, ready to render; the default is the default body.
#[derive(Default)]
pub struct BodyTemplate(Option<Environment<'static>>);

/// A template that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct TemplateError(minijinja::Error);

/// A body that can't be rendered: no retry will change that.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The stored row can't be read.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The template failed on this row.
    #[error("{0}")]
    Template(#[from] minijinja::Error),
    /// The row is not a valid JSON object.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

const NAME: &str = "body";

impl BodyTemplate {
    /// Compiles a template's source; `None` is the default body.
    pub fn compile(source: Option<&str>, content_type: &str) -> Result<Self, TemplateError> {
        let Some(source) = source else {
            return Ok(Self(None));
        };
        let json = is_json(content_type);
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(move |_| if json { AutoEscape::Json } else { AutoEscape::None });
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned(NAME, source.to_owned()).map_err(TemplateError)?;
        Ok(Self(Some(environment)))
    }

    /// Appends the body of the message whose laid-out bytes are `row_bytes`.
    pub fn render(
        &self,
        header: &BatchHeader,
        id: MessageId,
        row_bytes: &[u8],
        body: &mut Vec<u8>,
    ) -> Result<(), RenderError> {
        let parts = header.layout.read(row_bytes)?;
        match &self.0 {
            None => default_body(header, id, &parts, body),
            Some(environment) => {
                let context = context! {
                    id => id.to_string(),
                    feed => header.feed.as_str(),
                    recipient => parts.recipient,
                    row => id.row,
                    data => data_value(parts.data)?,
                };
                environment.get_template(NAME)?.render_captured_to(context, body)?;
                Ok(())
            }
        }
    }
}

impl BodyTemplate {
    /// Whether it is the default body, which can always be made.
    pub fn is_default(&self) -> bool {
        self.0.is_none()
    }

    /// Renders a body and checks that it is JSON if its content type says so. The error is for the operator and quotes
    /// nothing of the row (I10).
    pub fn check(
        &self,
        header: &BatchHeader,
        id: MessageId,
        row_bytes: &[u8],
        body: &mut Vec<u8>,
    ) -> Result<(), String> {
        if let Err(error) = self.render(header, id, row_bytes, body) {
            return Err(self.explain(header, row_bytes, &error));
        }
        if is_json(&header.content_type) {
            serde_json::from_slice::<IgnoredAny>(body)
                .map_err(|error| format!("the body is not JSON, as its content type says: {error}"))?;
        }
        Ok(())
    }

    fn explain(&self, header: &BatchHeader, row_bytes: &[u8], error: &RenderError) -> String {
        let RenderError::Template(error) = error else { return error.to_string() };
        let has = |name: &str| match name.split_once('.') {
            Some(("data", field)) => match header.layout.read(row_bytes).map(|parts| parts.data) {
                Ok(MessageData::Columns(names, _)) => names.iter().any(|known| known == field),
                Ok(MessageData::Object(object)) => {
                    let object = serde_json::from_str::<serde_json::Value>(object).unwrap_or_default();
                    field.split('.').try_fold(&object, |value, key| value.get(key)).is_some()
                }
                _ => false,
            },
            _ => NAMES.contains(&name),
        };
        let is_undefined = error.kind() == ErrorKind::UndefinedError;
        if let Some(name) = self.names().into_iter().find(|name| is_undefined && !has(name)) {
            return format!("the template needs {name}, which the row does not have");
        }
        let line = error.line().map(|line| format!(" in line {line} of the template")).unwrap_or_default();
        format!("the body can't be rendered: {}{line}", error.kind())
    }

    /// Whether a body says which message it is.
    pub fn names_its_message(&self) -> bool {
        self.is_default() || self.names().contains("id")
    }

    /// The names that it uses, as far as they are written out: `recipient`, `data.name`.
    fn names(&self) -> BTreeSet<String> {
        let template = self.0.as_ref().and_then(|environment| environment.get_template(NAME).ok());
        let names = template.map(|template| template.undeclared_variables(true));
        // A function is not a name that a row could have.
        let is_global = |name: &String| ["range", "dict", "namespace", "debug"].contains(&name.as_str());
        names.into_iter().flatten().filter(|name| !is_global(name)).collect()
    }

    /// Whether it only prints names, with no condition, loop or filter: what it makes of a row differs from what it makes
    /// of another one in nothing but the values.
    pub fn is_plain(&self) -> bool {
        let Some(template) = self.0.as_ref().and_then(|environment| environment.get_template(NAME).ok())
        else {
            return true;
        };
        let source = template.source();
        let is_path = |expression: &str| {
            let path = expression.trim_matches(['-', '+']).trim();
            path.split('.').all(|name| {
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            })
        };
        !source.contains("{%")
            && !source.contains("{#")
            && source
                .split("{{")
                .skip(1)
                .all(|rest| rest.split_once("}}").is_some_and(|(path, _)| is_path(path)))
    }

    /// What is wrong with it for every file of a feed of this format, as far as that can be known without one: the names
    /// of a CSV's columns and of an object's keys are taken to be those that it uses.
    pub fn check_for(&self, format: &Format, content_type: &str) -> Result<(), String> {
        if self.is_default() {
            return Ok(());
        }
        let mut fields: Vec<String> =
            self.names().iter().filter_map(|name| Some(name.strip_prefix("data.")?.to_owned())).collect();
        let layout = match format {
            Format::Text => RowLayout::Lines,
            Format::Csv { recipient: name, .. } | Format::Ndjson { recipient: name } => {
                fields.retain(|field| field != name);
                fields.push(name.clone());
                RowLayout::Columns { recipient: fields.len() - 1, names: fields }
            }
        };
        let mut row = Vec::new();
        match &layout {
            RowLayout::Columns { names, .. } => names.iter().for_each(|_| put_cell(&mut row, "1")),
            RowLayout::Lines | RowLayout::Objects => row.push(b'1'),
        }
        let header = BatchHeader {
            feed: "feed".into(),
            destination: "destination".into(),
            file: FileId([0; 16]),
            layout,
            template: None,
            content_type: content_type.to_owned(),
            terms: Terms::default(),
            priority: Priority::Normal,
        };
        let checked = self.check(&header, header.message_id(1), &row, &mut Vec::new());
        let Err(why) = checked else { return Ok(()) };
        // What fails for these values may be fine for others.
        let is_certain = self.is_plain() || why.starts_with("the template needs");
        let needs_field = why.contains("needs data.") && *format != Format::Text;
        if is_certain && !needs_field { Err(why.replace("the row does", "its rows do")) } else { Ok(()) }
    }
}

/// Whether a content type is JSON: `application/json` or any `+json`, parameters aside.
pub fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    essence == "application/json" || essence == "text/json" || essence.ends_with("+json")
}

/// `{"id":…,"feed":…,"recipient":…,"data":{…}}`. Cells are strings; a JSON object is kept unchanged.
fn default_body(
    header: &BatchHeader,
    id: MessageId,
    parts: &MessageParts<'_>,
    body: &mut Vec<u8>,
) -> Result<(), RenderError> {
    // An id needs no escaping; writing to a Vec can't fail.
    let _ = write!(body, "{{\"id\":\"{id}\",\"feed\":");
    serde_json::to_writer(&mut *body, &header.feed)?;
    body.extend_from_slice(b",\"recipient\":");
    serde_json::to_writer(&mut *body, parts.recipient)?;
    body.extend_from_slice(b",\"data\":");
    match &parts.data {
        MessageData::None => body.extend_from_slice(b"{}"),
        MessageData::Object(object) => body.extend_from_slice(object.as_bytes()),
        MessageData::Columns(names, cells) => {
            let mut separator = b'{';
            for (name, cell) in names.iter().zip(cells.clone()) {
                body.push(separator);
                separator = b',';
                serde_json::to_writer(&mut *body, name)?;
                body.push(b':');
                serde_json::to_writer(&mut *body, cell)?;
            }
            body.push(b'}');
        }
    }
    body.push(b'}');
    Ok(())
}

fn data_value(data: MessageData<'_>) -> Result<Value, RenderError> {
    Ok(match data {
        MessageData::None => Value::from_pairs(std::iter::empty::<(String, Value)>()),
        MessageData::Columns(names, cells) => {
            Value::from_pairs(names.iter().zip(cells).map(|(name, cell)| (name.as_str(), Value::from(cell))))
        }
        MessageData::Object(object) => Value::from(Serde(serde_json::from_str::<serde_json::Value>(object)?)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(layout: RowLayout, template: Option<&str>, content_type: &str) -> BatchHeader {
        BatchHeader {
            feed: "alerts".into(),
            destination: "support".into(),
            file: FileId([0xab; 16]),
            layout,
            template: template.map(Into::into),
            content_type: content_type.into(),
            terms: Terms::default(),
            priority: Priority::Normal,
        }
    }

    fn render(header: &BatchHeader, row: &[u8]) -> Result<String, RenderError> {
        let template = BodyTemplate::compile(header.template.as_deref(), &header.content_type).unwrap();
        let mut body = Vec::new();
        template.render(header, header.message_id(7), row, &mut body)?;
        Ok(String::from_utf8(body).unwrap())
    }

    fn columns() -> (RowLayout, Vec<u8>) {
        let mut row = Vec::new();
        put_cell(&mut row, "u\"1");
        put_cell(&mut row, "=cmd|' /C calc'!A0");
        (RowLayout::Columns { names: vec!["user_id".into(), "na\nme".into()], recipient: 0 }, row)
    }

    #[test]
    fn default_bodies() {
        let id = format!("msg_{}_7", "ab".repeat(16));
        let lines = header(RowLayout::Lines, None, "application/json");
        assert_eq!(
            render(&lines, b"u1").unwrap(),
            format!(r#"{{"id":"{id}","feed":"alerts","recipient":"u1","data":{{}}}}"#)
        );
        let (layout, row) = columns();
        let body = render(&header(layout, None, "application/json"), &row).unwrap();
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["recipient"], "u\"1");
        assert_eq!(body["data"]["na\nme"], "=cmd|' /C calc'!A0", "F33: verbatim");
        let mut row = Vec::new();
        put_cell(&mut row, "7");
        row.extend(br#"{"n": 1.10, "user_id":7}"#);
        let objects = header(RowLayout::Objects, None, "application/json");
        assert!(render(&objects, &row).unwrap().ends_with(r#""data":{"n": 1.10, "user_id":7}}"#));
    }

    #[test]
    fn templates_escape_by_content_type() {
        let (layout, row) = columns();
        let json = header(layout.clone(), Some(r#"{"to": {{ recipient }}}"#), "application/vnd.x+json");
        assert_eq!(render(&json, &row).unwrap(), r#"{"to": "u\"1"}"#);
        let text = header(layout, Some("{{ data.user_id }} {{ row }} {{ feed }}"), "text/plain");
        assert_eq!(render(&text, &row).unwrap(), "u\"1 7 alerts");
    }

    #[test]
    fn a_name_that_is_not_there_and_an_endless_loop_are_errors() {
        let (layout, row) = columns();
        let missing = header(layout.clone(), Some("{{ data.nmae }}"), "text/plain");
        assert!(render(&missing, &row).is_err());
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}.{% endfor %}{% endfor %}";
        assert!(render(&header(layout, Some(endless), "text/plain"), &row).is_err());
        assert!(BodyTemplate::compile(Some("{{ x"), "text/plain").is_err());
    }

    fn check_for(source: &str, content_type: &str, format: &Format) -> Result<(), String> {
        BodyTemplate::compile(Some(source), content_type).unwrap().check_for(format, content_type)
    }

    #[test]
    fn f67_what_no_file_of_a_feed_can_have_is_found_without_one() {
        let csv = Format::Csv { delimiter: b',', recipient: "user_id".into() };
        let needs = |name: &str| Err(format!("the template needs {name}, which its rows do not have"));
        let json = "application/json";
        assert_eq!(check_for("{{ nmae }}", "text/plain", &csv), needs("nmae"));
        assert_eq!(check_for("{{ data.name }}", "text/plain", &Format::Text), needs("data.name"));
        for (source, format) in [
            (r#"{"to": {{ recipient }}, "n": {{ data.any }}}"#, &csv),
            (r#"{"to": {{ recipient }}, "n": {{ data.any | int }}, "m": {{ data["x y"] }}}"#, &csv),
            (
                r#"{"to": {{ recipient }}{% if data.b is defined %}, "b": {{ data.b }}{% endif %}}"#,
                &Format::Text,
            ),
            (
                r#"{"all": {{ data }}, "three": [{% for n in range(3) %}{{ n }},{% endfor %}0]}"#,
                &Format::Text,
            ),
        ] {
            assert_eq!(check_for(source, json, format), Ok(()), "{source}");
        }
        let why = check_for(r#"{"to": {{ recipient }}"#, json, &csv).unwrap_err();
        assert!(why.starts_with("the body is not JSON"), "{why}");
        assert_eq!(check_for(r#"{"to": {{ recipient }}"#, "text/plain", &csv), Ok(()));
    }

    #[test]
    fn plain_templates_are_known_as_such() {
        for (source, is_plain) in [
            ("none", true),
            ("{{ id }}{{- data.a_1 -}}{{row}}", true),
            ("{{ data.a | upper }}", false),
            ("{{ data['a'] }}", false),
            ("{% if row %}{{ id }}{% endif %}", false),
            ("{{ '}}' }}", false),
            ("{{ data.a + 1 }}", false),
        ] {
            let template = BodyTemplate::compile(Some(source), "text/plain").unwrap();
            assert_eq!(template.is_plain(), is_plain, "{source}");
        }
    }
}
