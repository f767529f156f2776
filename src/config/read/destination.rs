use std::time::Duration;

use postrider_actors::model::{
    body::BodyTemplate,
    retry::RetrySchedule,
    table::{COLUMNS_MAX, Column, ColumnSource, ColumnType, Identifier, Mapping, TableName},
};
use url::Url;

use crate::adapters::webhook::{self, BadPointer, JsonPointer};

use super::{
    super::{
        Destination, Header, HeaderValue, Table, Target, TemplateSource, Webhook, WebhookUrl,
        reader::{Reader, Section},
        secret::{SOURCES, SecretSource},
        tree::shown_text,
    },
    Need, count,
    ledger::require_postgres,
    path, rate, require,
};

/// The longest inline template or template file, in bytes: it is stored with the batches.
pub(in crate::config) const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Headers and signing secrets per destination: they make every request longer.
const HEADERS_MAX: usize = 32;
pub(super) const SECRETS_MAX: usize = 8;

/// An address and a media type that are fine, where only headers are in question.
const ANY_URL: &str = "http://localhost/";
const ANY_TYPE: &str = "application/json";

/// Headers whose value is a secret by definition.
const SECRET_HEADERS: [&str; 3] = ["authorization", "cookie", "proxy-authorization"];

/// Keys that only a webhook has.
const WEBHOOK_KEYS: [&str; 14] = [
    "rate_per_s",
    "burst",
    "url",
    "secrets",
    "concurrency",
    "timeout_ms",
    "connect_timeout_ms",
    "max_response_bytes",
    "template",
    "template_file",
    "content_type",
    "ca_file",
    "provider_id",
    "headers",
];

/// Keys that only a table has.
const TABLE_KEYS: [&str; 6] = ["warehouse", "table", "key_column", "columns", "max_rows", "linger_ms"];

/// Reads `[destinations.NAME]`. Every key is read whatever the kind, for what stands in `[destinations."*"]`
/// is for destinations of both.
pub(super) fn destination(
    reader: &Reader,
    mut section: Section<'_>,
    name: String,
    need: Need,
) -> Destination {
    let is_table = section.choice("kind", &[("webhook", false), ("table", true)]).unwrap_or(false);
    let need_of = |of| if is_table == of { need } else { Need::Optional };
    let (retry, max_retry_after) = retry(reader, section.section("retry"));
    let webhook = webhook(reader, &mut section, max_retry_after, need_of(false));
    let table = table(reader, &mut section, need_of(true));
    let (others, advice): (&[&str], _) = if is_table {
        require_postgres(reader, &section.key("kind"), "table");
        (&WEBHOOK_KEYS, "only kind = \"webhook\" has it: remove it")
    } else {
        (&TABLE_KEYS, "only kind = \"table\" has it: remove it, or say that messages become rows")
    };
    for key in others.iter().map(|key| section.key(key)) {
        if need == Need::Required && reader.is_own(&key) {
            reader.note(&key, None, advice);
        }
    }
    let destination = Destination {
        name,
        target: if is_table { Target::Table(table) } else { Target::Webhook(Box::new(webhook)) },
        rate: rate(&mut section),
        is_paused: section.boolean("paused"),
        retry,
    };
    section.finish();
    destination
}

fn webhook(reader: &Reader, section: &mut Section<'_>, max_retry_after: Duration, need: Need) -> Webhook {
    let timeout = section.millis("timeout_ms", 10..=600_000);
    let mut connect_timeout = section.millis("connect_timeout_ms", 10..=600_000);
    if !reader.is_set(&section.key("connect_timeout_ms")) {
        // Whoever shortens the whole is not asked to shorten its part.
        connect_timeout = connect_timeout.min(timeout);
    }
    let content_type = content_type(reader, section);
    Webhook {
        url: url(reader, section, need),
        secrets: secrets(reader, section, need),
        concurrency: count(section, "concurrency", 1, 65_536, "requests in flight"),
        timeout,
        connect_timeout,
        max_response_bytes: count(section, "max_response_bytes", 0, 16 << 20, "bytes"),
        template: template(reader, section, &content_type),
        content_type,
        headers: headers(reader, section),
        ca_file: path(reader, section, "ca_file", Need::Optional),
        max_retry_after,
        provider_id: provider_id(reader, section),
    }
}

fn provider_id(reader: &Reader, section: &mut Section<'_>) -> Option<JsonPointer> {
    let pointer = section.text("provider_id").filter(|text| !text.is_empty())?.parse();
    pointer
        .map_err(|error: BadPointer| reader.note(&section.key("provider_id"), None, error.to_string()))
        .ok()
}

fn table(reader: &Reader, section: &mut Section<'_>, need: Need) -> Table {
    let warehouse = section.text("warehouse").unwrap_or_default();
    require(reader, section, "warehouse", need, "name one of [warehouses]");
    let text = section.text("table").unwrap_or_default();
    require(reader, section, "table", need, "write the table's name, or SCHEMA.TABLE");
    let table = TableName::parse(&text).unwrap_or_else(|error| {
        if reader.is_there(&section.key("table")) {
            reader.note(&section.key("table"), None, error.to_string());
        }
        TableName::parse("invalid").expect("it is a plain name")
    });
    let key = section.text("key_column").unwrap_or_default();
    if let Err(error) = Identifier::parse(&key)
        && reader.is_there(&section.key("key_column"))
    {
        reader.note(&section.key("key_column"), None, error.to_string());
    }
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
    if need == Need::Required && columns.len() == 1 {
        reader.note(&columns_key, None, format!("say what the table's columns hold: {COLUMN}"));
    }
    if columns.len() > COLUMNS_MAX {
        let advice = format!("keep to {COLUMNS_MAX} columns");
        reader.note(&columns_key, Some(columns.len().to_string()), advice);
    }
    Table {
        warehouse,
        table,
        mapping: Mapping { columns },
        max_rows: count(section, "max_rows", 1, 100_000, "rows"),
        linger: section.millis("linger_ms", 0..=60_000),
    }
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

fn retry(reader: &Reader, mut section: Section<'_>) -> (RetrySchedule, Duration) {
    let schedule = RetrySchedule {
        max_attempts: section.integer("max_attempts", 1..=1_000, "attempts, the first included"),
        max_age: section.seconds("max_age_s", 1..=2_592_000),
        base: section.millis("base_ms", 1..=3_600_000),
        cap: section.millis("cap_ms", 1..=86_400_000),
    };
    let mut max_retry_after = section.seconds("max_retry_after_s", 0..=2_592_000);
    if !reader.is_set(&section.key("max_retry_after_s")) {
        max_retry_after = max_retry_after.min(schedule.max_age);
    }
    section.finish();
    (schedule, max_retry_after)
}

fn url(reader: &Reader, section: &mut Section<'_>, need: Need) -> WebhookUrl {
    const ADVICE: &str = "write an http:// or https:// address";
    // Part of an address may be a secret: it is not shown.
    let text = section.private_text("url");
    require(reader, section, "url", need, ADVICE);
    let key = section.key("url");
    let fallback =
        || WebhookUrl(Url::parse("http://invalid.invalid/").expect("the fallback is a valid address"));
    let Some(text) = text else {
        return fallback();
    };
    let url = match Url::parse(&text) {
        Ok(url) => url,
        Err(error) => {
            reader.note(&key, None, format!("it is no address ({error}); {ADVICE}"));
            return fallback();
        }
    };
    if !matches!(url.scheme(), "http" | "https") {
        reader.note(&key, Some(shown_text(url.scheme())), ADVICE);
    } else if !url.username().is_empty() || url.password().is_some() {
        let advice = "it holds a user name or password: put an `authorization` into [headers], from a file \
                      or credential";
        reader.note(&key, None, advice);
    } else if url.fragment().is_some() {
        reader.note(&key, None, "a fragment (#…) is never sent: remove it");
    } else if text.len() > 2048 {
        reader.note(&key, Some(format!("{} bytes", text.len())), "keep to 2048 bytes");
    } else if url.port() == Some(0) {
        reader.note(&key, Some("port 0".into()), "write a port from 1 to 65535");
    }
    WebhookUrl(url)
}

fn secrets(reader: &Reader, section: &mut Section<'_>, need: Need) -> Vec<SecretSource> {
    let advice = "write where the signing secrets are kept, such as [\"credential:NAME\"], or [] to send \
                  without a signature";
    let secrets = secrets_of(reader, section, "secrets", SECRETS_MAX);
    require(reader, section, "secrets", need, advice);
    secrets
}

/// A list of places where secrets are kept.
pub(super) fn secrets_of(
    reader: &Reader,
    section: &mut Section<'_>,
    key: &'static str,
    max: usize,
) -> Vec<SecretSource> {
    let items = section.list(key, false).unwrap_or_default();
    if items.len() > max {
        reader.note(&section.key(key), Some(items.len().to_string()), format!("keep to {max} secrets"));
    }
    items
        .into_iter()
        .filter_map(|(path, text)| match SecretSource::parse(&text) {
            Some(Ok(source)) => Some(source),
            Some(Err(advice)) => {
                reader.note(&path, None, advice);
                None
            }
            None => {
                reader.note(&path, None, SOURCES);
                None
            }
        })
        .collect()
}

fn content_type(reader: &Reader, section: &mut Section<'_>) -> String {
    let text = section.text("content_type").unwrap_or_default();
    let essence = text.split(';').next().unwrap_or("").trim();
    let is_type = essence.split_once('/').is_some_and(|(kind, sub)| is_token(kind) && is_token(sub));
    let key = section.key("content_type");
    let can_be_sent = webhook::validate(ANY_URL, &[], &text).is_empty() && text.len() <= 256;
    if reader.is_there(&key) && !(is_type && can_be_sent) {
        reader.note(&key, Some(shown_text(&text)), "write a media type such as \"application/json\"");
    }
    text
}

fn template(reader: &Reader, section: &mut Section<'_>, content_type: &str) -> TemplateSource {
    let inline = section.text("template");
    let file = path(reader, section, "template_file", Need::Optional);
    let (key, file_key) = (section.key("template"), section.key("template_file"));
    if let Some(source) = &inline {
        if source.len() > TEMPLATE_BYTES_MAX {
            let advice = format!("keep to {TEMPLATE_BYTES_MAX} bytes");
            reader.note(&key, Some(format!("{} bytes", source.len())), advice);
        } else if let Err(error) = BodyTemplate::compile(Some(source), content_type) {
            reader.note(&key, None, format!("it is no template: {error}"));
        }
    }
    match (inline, file) {
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

fn headers(reader: &Reader, section: &mut Section<'_>) -> Vec<Header> {
    let key = section.key("headers");
    let items = section.private_texts("headers");
    if items.len() > HEADERS_MAX {
        reader.note(&key, Some(items.len().to_string()), format!("keep to {HEADERS_MAX} headers"));
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
            reader.note(&path, None, "it is there twice, in another case: remove one");
        } else if matches!(value, HeaderValue::Literal(_)) && SECRET_HEADERS.contains(&name.as_str()) {
            reader.note(&path, None, SOURCES);
        } else {
            headers.push(Header { name, value });
        }
    }
    headers
}

/// A token of RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}
