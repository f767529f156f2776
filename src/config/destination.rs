//! Where messages go.

use std::{fmt, ops::Deref, path::PathBuf};

use postrider_actors::model::{
    body::BodyTemplate,
    table::{COLUMNS_MAX, Column, ColumnSource, ColumnType, Identifier, Mapping, TableName},
};
use postrider_settings::{
    Group, Keys as _, Need, Retry, SOURCES, SecretSource, Section, Storm, choice, given, refuse_keys,
    settings, shown_text, unset,
};

use super::{needed_if, read_text};
use postrider_http::webhook::{self, WebhookKeys};

/// The longest inline template or template file, in bytes: it is stored with the batches.
pub(super) const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Headers of a client: they make every request longer.
const HEADERS_MAX: usize = 32;

/// An address and a media type that are fine, where only headers are in question.
const ANY_URL: &str = "http://localhost/";
const ANY_TYPE: &str = "application/json";

/// Headers whose value is a secret by definition.
const SECRET_HEADERS: [&str; 3] = ["authorization", "cookie", "proxy-authorization"];

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// What all destinations have in common.
    pub settings: postrider_settings::Destination,
    /// What it is.
    pub target: Target,
    /// `[destinations.NAME.retry]`
    pub retry: Retry,
}

impl Deref for Destination {
    type Target = postrider_settings::Destination;

    fn deref(&self) -> &Self::Target {
        &self.settings
    }
}

/// What a destination is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One request per message.
    Webhook(Box<Webhook>),
    /// One row per message.
    Table(Table),
}

impl Destination {
    /// The webhook, if it is one.
    pub fn webhook(&self) -> Option<&Webhook> {
        match &self.target {
            Target::Webhook(webhook) => Some(webhook),
            Target::Table(_) => None,
        }
    }

    /// The table, if it is one.
    pub fn table(&self) -> Option<&Table> {
        match &self.target {
            Target::Webhook(_) => None,
            Target::Table(table) => Some(table),
        }
    }
}

/// What a destination is, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationKind {
    /// One request per message.
    Webhook,
    /// One row per message.
    Table,
}

settings! {
    /// What a destination is.
    KindKeys {
        /// Each message becomes a request, or a row of a warehouse's table.
        kind: DestinationKind =
            choice(&[("webhook", DestinationKind::Webhook), ("table", DestinationKind::Table)]);
    }

    /// The keys of kind = "table".
    TableKeys {
        /// kind = "table": the warehouse that the table is in.
        warehouse: String = unset("\"main\"", warehouse_name);
        /// The table, or SCHEMA.TABLE. It must exist.
        table: TableName = unset("\"analytics.events\"", table_name);
        /// The column for the message's id; it must be unique, so that no row is written twice.
        key_column: String = given("\"message_id\"", key_column);
    }
}

/// A warehouse's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its keys.
    pub settings: TableKeys,
    /// … and how its statements are filled.
    pub group: Group,
    /// How a message becomes a row; the first column is the key.
    pub mapping: Mapping,
}

impl Deref for Table {
    type Target = TableKeys;

    fn deref(&self) -> &TableKeys {
        &self.settings
    }
}

/// A webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// Its keys.
    pub settings: WebhookKeys,
    /// When it is paused because it is used wrongly.
    pub storm: Storm,
    /// The body.
    pub template: TemplateSource,
    /// Headers that each request carries; names in lower case, each once.
    pub headers: Vec<Header>,
}

impl Deref for Webhook {
    type Target = WebhookKeys;

    fn deref(&self) -> &WebhookKeys {
        &self.settings
    }
}

/// Where a body comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateSource {
    /// `{"id":…,"feed":…,"recipient":…,"data":{…}}`
    Default,
    /// This template.
    Inline(String),
    /// The template in this file.
    File(PathBuf),
}

impl TemplateSource {
    /// The template's source; `None` for the default body.
    pub fn read(&self) -> Result<Option<String>, String> {
        match self {
            Self::Default => Ok(None),
            Self::Inline(source) => Ok(Some(source.clone())),
            Self::File(path) => {
                let source = read_text(path, TEMPLATE_BYTES_MAX as u64);
                source.map(Some).map_err(|error| format!("{}: {error}", path.display()))
            }
        }
    }
}

/// A static header.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    /// In lower case.
    pub name: String,
    /// Its value, or where it is kept.
    pub value: HeaderValue,
}

/// A static header's value.
#[derive(Clone, PartialEq, Eq)]
pub enum HeaderValue {
    /// The value itself.
    Literal(String),
    /// Kept elsewhere.
    Secret(SecretSource),
}

impl fmt::Debug for Header {
    /// Never the value: an API key is no less secret for being written into the file (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: …", self.name)
    }
}

impl fmt::Debug for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Reads `[destinations.NAME]`. Every key is read whatever the kind: `[destinations."*"]` sets defaults for
/// both kinds.
pub(super) fn destination(section: &mut Section<'_>, name: &str) -> Destination {
    let is_table = KindKeys::read(section).kind == DestinationKind::Table;
    let settings = postrider_settings::Destination::read(section);
    let retry = retry(section);
    let need = section.need;
    let is_needed = need == Need::Required;
    section.need = needed_if(is_needed && !is_table);
    let webhook = webhook(section);
    section.need = needed_if(is_needed && is_table);
    let table = table(section);
    section.need = need;
    if is_table {
        let advice = "only kind = \"webhook\" has it: remove it";
        refuse_keys::<WebhookKeys>(section, advice);
        for key in ["rate_per_s", "burst", "headers", "storm"].map(|key| section.key(key)) {
            if is_needed && section.reader().is_own(&key) {
                section.reader().note(&key, None, advice);
            }
        }
    } else {
        let advice = "only kind = \"table\" has it: remove it, or say that messages become rows";
        refuse_keys::<TableKeys>(section, advice);
        refuse_keys::<Group>(section, advice);
        let columns = section.key("columns");
        if is_needed && section.reader().is_own(&columns) {
            section.reader().note(&columns, None, advice);
        }
    }
    let target = if is_table { Target::Table(table) } else { Target::Webhook(Box::new(webhook)) };
    Destination { name: name.to_owned(), settings, target, retry }
}

fn retry(section: &mut Section<'_>) -> Retry {
    let mut retry = Retry::read_table(section, "retry");
    let key = format!("{}.max_retry_after", section.key("retry"));
    if !section.reader().is_set(&key) {
        // Shortening the total timeout does not require shortening its part.
        retry.max_retry_after = retry.max_retry_after.min(retry.max_age);
    }
    retry
}

fn webhook(section: &mut Section<'_>) -> Webhook {
    let settings = WebhookKeys::read(section);
    let template = template(section, &settings);
    Webhook { template, headers: headers(section), storm: Storm::read_table(section, "storm"), settings }
}

fn warehouse_name(section: &mut Section<'_>, key: &'static str) -> String {
    let name = section.text(key).unwrap_or_default();
    section.require(key, "name one of [warehouses]");
    name
}

fn table_name(section: &mut Section<'_>, key: &'static str) -> TableName {
    let text = section.text(key).unwrap_or_default();
    section.require(key, "write the table's name, or SCHEMA.TABLE");
    TableName::parse(&text).unwrap_or_else(|error| {
        if section.reader().is_there(&section.key(key)) {
            section.reader().note(&section.key(key), None, error.to_string());
        }
        TableName::parse("invalid").expect("it is a plain name")
    })
}

fn key_column(section: &mut Section<'_>, key: &'static str) -> String {
    let column = section.text(key).unwrap_or_default();
    if let Err(error) = Identifier::parse(&column)
        && section.reader().is_there(&section.key(key))
    {
        section.reader().note(&section.key(key), None, error.to_string());
    }
    column
}

fn table(section: &mut Section<'_>) -> Table {
    let settings = TableKeys::read(section);
    let group = Group::read(section);
    let (reader, key) = (section.reader(), settings.key_column.clone());
    let id = Column { name: key.clone(), source: ColumnSource::Id, kind: ColumnType::Text, required: true };
    let mut columns = vec![id];
    let columns_key = section.key("columns");
    for (path, name, text) in section.private_texts("columns") {
        if let Err(error) = Identifier::parse(&name) {
            reader.note(&path, None, error.to_string());
        } else if name.eq_ignore_ascii_case(&key) {
            reader.note(
                &path,
                None,
                "it is the key_column, which holds the message's id: remove one of them",
            );
        }
        match column(name, &text) {
            Some(column) => columns.push(column),
            None => reader.note(&path, Some(shown_text(&text)), COLUMN),
        }
    }
    if section.need == Need::Required && columns.len() == 1 {
        reader.note(&columns_key, None, format!("say what the table's columns hold: {COLUMN}"));
    }
    if columns.len() > COLUMNS_MAX {
        let advice = format!("at most {COLUMNS_MAX} columns");
        reader.note(&columns_key, Some(columns.len().to_string()), advice);
    }
    Table { settings, group, mapping: Mapping { columns } }
}

const COLUMN: &str = "write SOURCE, or SOURCE TYPE, or SOURCE TYPE required: SOURCE is recipient, feed or \
                      data.NAME, TYPE is text, integer, numeric, double, boolean, timestamp, date or json";

/// `SOURCE [TYPE [required]]`.
fn column(name: String, text: &str) -> Option<Column> {
    let mut words = text.split_ascii_whitespace();
    let source = match words.next()? {
        "recipient" => ColumnSource::Recipient,
        "feed" => ColumnSource::Feed,
        path => {
            let field = path.strip_prefix("data.")?;
            field.split('.').all(|part| !part.is_empty()).then(|| ColumnSource::Field(field.to_owned()))?
        }
    };
    let kind = match words.next().unwrap_or("text") {
        "text" => ColumnType::Text,
        "integer" => ColumnType::Integer,
        "numeric" => ColumnType::Numeric,
        "double" => ColumnType::Double,
        "boolean" => ColumnType::Boolean,
        "timestamp" => ColumnType::Timestamp,
        "date" => ColumnType::Date,
        "json" => ColumnType::Json,
        _ => return None,
    };
    let required = match words.next() {
        None => false,
        Some("required") => true,
        Some(_) => return None,
    };
    words.next().is_none().then_some(Column { name, source, kind, required })
}

fn template(section: &Section<'_>, settings: &WebhookKeys) -> TemplateSource {
    let reader = section.reader();
    let (key, file_key) = (section.key("template"), section.key("template_file"));
    if let Some(source) = &settings.template {
        if source.len() > TEMPLATE_BYTES_MAX {
            let advice = format!("at most {TEMPLATE_BYTES_MAX} bytes");
            reader.note(&key, Some(format!("{} bytes", source.len())), advice);
        } else if let Err(error) = BodyTemplate::compile(Some(source), &settings.content_type) {
            reader.note(&key, None, format!("it is not a valid template: {error}"));
        }
    }
    match (settings.template.clone(), settings.template_file.clone()) {
        (None, None) => TemplateSource::Default,
        (Some(source), None) => TemplateSource::Inline(source),
        (None, Some(file)) => TemplateSource::File(file),
        // A destination's own key wins over the one that all destinations share.
        (Some(source), Some(file)) => match (reader.is_own(&key), reader.is_own(&file_key)) {
            (true, false) => TemplateSource::Inline(source),
            (false, true) => TemplateSource::File(file),
            _ => {
                reader.note(&file_key, None, "`template` is set too: keep one of them");
                TemplateSource::Inline(source)
            }
        },
    }
}

/// The headers of a client, `[….headers]`.
pub(super) fn headers(section: &mut Section<'_>) -> Vec<Header> {
    let reader = section.reader();
    let key = section.key("headers");
    let items = section.private_texts("headers");
    if items.len() > HEADERS_MAX {
        reader.note(&key, Some(items.len().to_string()), format!("at most {HEADERS_MAX} headers"));
    }
    let mut headers: Vec<Header> = Vec::new();
    for (path, name, text) in items {
        let name = name.to_ascii_lowercase();
        let value = match SecretSource::parse(&text) {
            Some(Ok(source)) => HeaderValue::Secret(source),
            Some(Err(advice)) => {
                reader.note(&path, None, advice);
                continue;
            }
            None => HeaderValue::Literal(text),
        };
        // The adapter knows what it can send; a value that is kept elsewhere is checked when it is read.
        let literal = match &value {
            HeaderValue::Literal(text) => text.clone(),
            HeaderValue::Secret(_) => String::new(),
        };
        let refusal = webhook::validate(ANY_URL, &[(name.clone(), literal)], ANY_TYPE);
        if let Some(problem) = refusal.first() {
            reader.note(&path, None, format!("{}; {}", problem.found, problem.allowed));
        } else if headers.iter().any(|header| header.name == name) {
            reader.note(&path, None, "it is set twice, in different case: remove one");
        } else if matches!(value, HeaderValue::Literal(_)) && SECRET_HEADERS.contains(&name.as_str()) {
            reader.note(&path, None, SOURCES);
        } else {
            headers.push(Header { name, value });
        }
    }
    headers
}
