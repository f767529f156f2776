use std::time::Duration;

use postrider_actors::model::{body::BodyTemplate, retry::RetrySchedule};
use url::Url;

use crate::adapters::webhook;

use super::{
    super::{
        Destination, Header, HeaderValue, TemplateSource, WebhookUrl,
        reader::{Reader, Section},
        secret::{SOURCES, SecretSource},
        tree::shown_text,
    },
    Need, count, path, rate, require,
};

/// The longest inline template or template file, in bytes: it is stored with the batches.
pub(in crate::config) const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Headers and signing secrets per destination: they make every request longer.
const HEADERS_MAX: usize = 32;
const SECRETS_MAX: usize = 8;

/// An address and a media type that are fine, where only headers are in question.
const ANY_URL: &str = "http://localhost/";
const ANY_TYPE: &str = "application/json";

/// Headers whose value is a secret by definition.
const SECRET_HEADERS: [&str; 3] = ["authorization", "cookie", "proxy-authorization"];

/// Reads `[destinations.NAME]`.
pub(super) fn destination(
    reader: &Reader,
    mut section: Section<'_>,
    name: String,
    need: Need,
) -> Destination {
    let timeout = section.millis("timeout_ms", 10..=600_000);
    let mut connect_timeout = section.millis("connect_timeout_ms", 10..=600_000);
    if !reader.is_set(&section.key("connect_timeout_ms")) {
        // Whoever shortens the whole is not asked to shorten its part.
        connect_timeout = connect_timeout.min(timeout);
    }
    let content_type = content_type(reader, &mut section);
    let (retry, max_retry_after) = retry(reader, section.section("retry"));
    let destination = Destination {
        name,
        url: url(reader, &mut section, need),
        secrets: secrets(reader, &mut section, need),
        rate: rate(&mut section),
        concurrency: count(&mut section, "concurrency", 1, 65_536, "requests in flight"),
        timeout,
        connect_timeout,
        max_response_bytes: count(&mut section, "max_response_bytes", 0, 16 << 20, "bytes"),
        template: template(reader, &mut section, &content_type),
        content_type,
        headers: headers(reader, &mut section),
        ca_file: path(reader, &mut section, "ca_file", Need::Optional),
        is_paused: section.boolean("paused"),
        retry,
        max_retry_after,
    };
    section.finish();
    destination
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
    let items = section.list("secrets", false);
    let advice = "write where the signing secrets are kept, such as [\"credential:NAME\"], or [] to send \
                  without a signature";
    require(reader, section, "secrets", need, advice);
    let items = items.unwrap_or_default();
    if items.len() > SECRETS_MAX {
        let advice = format!("keep to {SECRETS_MAX} secrets");
        reader.note(&section.key("secrets"), Some(items.len().to_string()), advice);
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
