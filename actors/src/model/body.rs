//! A message's body: the default JSON, or a template in the syntax of Jinja (`minijinja`).
//!
//! A template sees `id`, `feed`, `recipient`, `row` and `data` (the columns, or the JSON object). If the
//! content type is JSON, what a template prints is written as a JSON value, quotes included, so that no
//! recipient can break out of a string: write `{"to": {{ recipient }}}`, without quotes of your own.
//!
//! Bodies depend on nothing but the template, the content type and the row (I4): no clock, no random.

use std::io::Write as _;

use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context, value::Serde};

use super::{
    batch::{BatchHeader, MessageData, MessageParts, PayloadError},
    ids::MessageId,
};

/// The most work one rendering may do, in template instructions: a loop can't hang a delivery.
const FUEL: u64 = 1_000_000;

/// A body template, ready to render.
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

/// Whether a content type is JSON: `application/json` or any `+json`, parameters aside.
fn is_json(content_type: &str) -> bool {
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
    use crate::model::{
        batch::{RowLayout, put_cell},
        ids::FileId,
    };

    fn header(layout: RowLayout, template: Option<&str>, content_type: &str) -> BatchHeader {
        BatchHeader {
            feed: "alerts".into(),
            destination: "support".into(),
            file: FileId([0xab; 16]),
            layout,
            template: template.map(Into::into),
            content_type: content_type.into(),
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
}
