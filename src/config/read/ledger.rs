//! The ledger of rows, receipts and their sources, and warehouses.

use std::collections::BTreeMap;

use postrider_actors::model::receipt_format::{
    FieldPath, ReceiptFileFormat, ReceiptMapping, StatusMeaning, UnknownStatus,
};

use super::{
    super::{
        CloudwatchSource, DirectorySource, HttpAuth, Ledger, LedgerKind, PostgresLedger, QueueAddress,
        ReceiptSource, Receipts, SecretSource, SourceKind, SqsSource, Tls, Warehouse, WarehouseDialect,
        reader::{Reader, Section},
        secret::SOURCES,
        tree::shown_text,
    },
    Need, count,
    destination::{SECRETS_MAX, secrets_of},
    engines::{address, require_aws},
    feed::delimiter,
    named,
    ops::listen,
    path, require,
};

/// Whether this program can reach Postgres at all.
const HAS_POSTGRES: bool = cfg!(feature = "postgres");

/// Log groups of one source: each is asked by itself.
const GROUPS_MAX: usize = 32;

/// Notes a setting that this program was built without.
pub(super) fn require_postgres(reader: &Reader, key: &str, word: &str) {
    if !HAS_POSTGRES {
        let advice = "this program was built without Postgres: use one that was built with `--features postgres` \
                      (the default), or leave the setting out";
        reader.note(key, Some(shown_text(word)), advice);
    }
}

/// Reads `[ledger]`.
pub(super) fn ledger(reader: &Reader, mut section: Section<'_>) -> Ledger {
    let is_postgres = section.choice("kind", &[("embedded", false), ("postgres", true)]).unwrap_or(false);
    if is_postgres {
        require_postgres(reader, &section.key("kind"), "postgres");
    }
    let retention = section.seconds("retention_s", 0..=315_360_000);
    let need = if is_postgres { Need::Required } else { Need::Optional };
    let postgres = postgres(reader, section.section("postgres"), need);
    section.finish();
    Ledger {
        kind: if is_postgres { LedgerKind::Postgres(postgres) } else { LedgerKind::Embedded },
        retention: (!retention.is_zero()).then_some(retention),
    }
}

fn postgres(reader: &Reader, mut section: Section<'_>, need: Need) -> PostgresLedger {
    let schema = section.text("schema").unwrap_or_default();
    // It is quoted wherever it is used; still, a name that needs no quotes spares the operator trouble (F57).
    let is_name = (1..=48).contains(&schema.len())
        && schema.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !schema.starts_with(|first: char| first.is_ascii_digit())
        && !schema.starts_with("pg_");
    if !is_name && reader.is_there(&section.key("schema")) {
        let advice =
            "write a schema's name: 1 to 48 characters out of a-z, 0-9 and _, no digit first, not pg_…";
        reader.note(&section.key("schema"), Some(shown_text(&schema)), advice);
    }
    let postgres = PostgresLedger {
        url: url(reader, &mut section, need),
        schema,
        connections: count(&mut section, "connections", 1, 100, "connections"),
        tls: tls(reader, &mut section),
        connect_timeout: section.millis("connect_timeout_ms", 100..=60_000),
        statement_timeout: section.millis("statement_timeout_ms", 100..=60_000),
        lock_timeout: section.millis("lock_timeout_ms", 10..=600_000),
        partition_days: section.integer("partition_days", 1..=366, "days"),
    };
    section.finish();
    postgres
}

/// Where an address is kept: it holds a password.
fn url(reader: &Reader, section: &mut Section<'_>, need: Need) -> SecretSource {
    let text = section.private_text("url");
    let key = section.key("url");
    require(reader, section, "url", need, "write where the address is kept, such as \"env:NAME\"");
    match text.as_deref().map(SecretSource::parse) {
        Some(Some(Ok(source))) => return source,
        Some(Some(Err(advice))) => reader.note(&key, None, advice),
        Some(None) => reader.note(&key, None, SOURCES),
        None => {}
    }
    SecretSource::Environment(String::new())
}

fn tls(reader: &Reader, section: &mut Section<'_>) -> Tls {
    let is_required = section.choice("tls", &[("require", true), ("disable", false)]).unwrap_or(true);
    let ca_file = path(reader, section, "ca_file", Need::Optional);
    if is_required { Tls::Require { ca_file } } else { Tls::Disable }
}

/// Reads `[warehouses.NAME]`.
pub(super) fn warehouse(reader: &Reader, mut section: Section<'_>, name: String, need: Need) -> Warehouse {
    if need == Need::Required {
        require_postgres(reader, &section.path.clone(), &name);
    }
    let dialects = [("postgres", WarehouseDialect::Postgres), ("redshift", WarehouseDialect::Redshift)];
    let warehouse = Warehouse {
        name,
        url: url(reader, &mut section, need),
        dialect: section.choice("dialect", &dialects).unwrap_or(WarehouseDialect::Postgres),
        tls: tls(reader, &mut section),
        statements: count(&mut section, "statements", 1, 100, "statements in flight"),
        statements_per_s: Some(section.integer(
            "statements_per_s",
            0..=10_000,
            "statements per second, 0 = no bound",
        ))
        .filter(|&per_s| per_s > 0),
        connect_timeout: section.millis("connect_timeout_ms", 100..=60_000),
        statement_timeout: section.millis("statement_timeout_ms", 100..=3_600_000),
    };
    section.finish();
    warehouse
}

/// Reads `[receipts]`.
pub(super) fn receipts(reader: &Reader, mut section: Section<'_>) -> Receipts {
    let receipts = Receipts {
        reconcilers: count(&mut section, "reconcilers", 1, 64, "reconcilers"),
        max_receipts: count(&mut section, "max_receipts", 1, 10_000, "receipts"),
        max_bytes: count(&mut section, "max_bytes", 1 << 10, 64 << 20, "bytes"),
        linger: section.millis("linger_ms", 0..=60_000),
        inbox_max: section.integer("inbox_max", 1_000..=1_000_000_000, "receipts"),
        timeout: section.seconds("timeout_s", 1..=31_536_000),
        park: section.seconds("park_s", 1..=31_536_000),
        events_to: section.text("events_to"),
        listen: listen(reader, &mut section),
        sources: named(reader, &mut section, "sources", source),
    };
    section.finish();
    receipts
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Directory,
    Http,
    Sqs,
    Cloudwatch,
}

/// Reads `[receipts.sources.NAME]`. Every key is read whatever the kind, for what stands in
/// `[receipts.sources."*"]` is for sources of all.
fn source(reader: &Reader, mut section: Section<'_>, name: String, need: Need) -> ReceiptSource {
    let kinds = [
        ("dir", Kind::Directory),
        ("http", Kind::Http),
        ("sqs", Kind::Sqs),
        ("cloudwatch", Kind::Cloudwatch),
    ];
    let kind = section.choice("kind", &kinds);
    require(reader, &section, "kind", need, "write \"dir\", \"http\", \"sqs\" or \"cloudwatch\"");
    if let Some(word @ (Kind::Sqs | Kind::Cloudwatch)) = kind {
        require_aws(reader, &section.key("kind"), if word == Kind::Sqs { "sqs" } else { "cloudwatch" });
    }
    let need_of = |of| if kind == Some(of) { need } else { Need::Optional };
    let is_csv = section.choice("format", &[("ndjson", false), ("csv", true)]).unwrap_or(false);
    let delimiter = delimiter(reader, &mut section);
    if !is_csv && need == Need::Required && reader.is_own(&section.key("delimiter")) {
        let advice = "only format = \"csv\" has a delimiter: remove it";
        reader.note(&section.key("delimiter"), None, advice);
    }
    let format = if is_csv { ReceiptFileFormat::Csv { delimiter } } else { ReceiptFileFormat::Ndjson };
    let destination = section.text("destination").unwrap_or_default();
    let advice = "name the destination whose messages these receipts are about";
    require(reader, &section, "destination", need, advice);
    let directory = DirectorySource {
        path: path(reader, &mut section, "path", need_of(Kind::Directory)).unwrap_or_default(),
        settle: section.millis("settle_ms", 0..=3_600_000),
    };
    let http = http(reader, &mut section, need_of(Kind::Http));
    let sqs = SqsSource {
        queue: address(reader, &mut section, "queue_name", "queue_url", need_of(Kind::Sqs) == Need::Required)
            .unwrap_or_else(|| QueueAddress::Name(String::new())),
        wait: section.seconds("wait_s", 0..=20),
        visibility: section.seconds("visibility_s", 30..=43_200),
    };
    let cloudwatch = cloudwatch(reader, &mut section, need_of(Kind::Cloudwatch));
    let mapping = mapping(reader, &mut section, need);
    let source = ReceiptSource {
        name,
        destination,
        kind: match kind {
            None | Some(Kind::Directory) => SourceKind::Directory(directory),
            Some(Kind::Http) => SourceKind::Http(http),
            Some(Kind::Sqs) => SourceKind::Sqs(sqs),
            Some(Kind::Cloudwatch) => SourceKind::Cloudwatch(cloudwatch),
        },
        format,
        mapping,
    };
    section.finish();
    source
}

fn http(reader: &Reader, section: &mut Section<'_>, need: Need) -> HttpAuth {
    let is_bearer = section.choice("auth", &[("signature", false), ("bearer", true)]).unwrap_or(false);
    let secrets = secrets_of(reader, section, "secrets", SECRETS_MAX);
    if need == Need::Required && secrets.is_empty() {
        let advice = "write where the signing secrets or tokens are kept, such as [\"credential:NAME\"]: receipts \
                      from anybody would prove nothing";
        reader.note(&section.key("secrets"), None, advice);
    }
    if is_bearer { HttpAuth::Bearer(secrets) } else { HttpAuth::Signature(secrets) }
}

fn cloudwatch(reader: &Reader, section: &mut Section<'_>, need: Need) -> CloudwatchSource {
    let items = section.list("log_groups", true).unwrap_or_default();
    let key = section.key("log_groups");
    if need == Need::Required && (items.is_empty() || items.len() > GROUPS_MAX) {
        let advice = format!("name 1 to {GROUPS_MAX} log groups");
        reader.note(&key, Some(items.len().to_string()), advice);
    }
    // Amazon CloudWatch Logs API reference, `LogGroup`: the pattern of logGroupName.
    let is_name = |name: &str| {
        (1..=512).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_/#".contains(&byte))
    };
    let mut groups = Vec::new();
    for (path, name) in items.into_iter().take(GROUPS_MAX) {
        if is_name(&name) {
            groups.push(name);
        } else {
            let advice = "write a log group's name: 1 to 512 characters out of A-Z, a-z, 0-9, . - _ / #";
            reader.note(&path, Some(shown_text(&name)), advice);
        }
    }
    CloudwatchSource {
        groups,
        filter: section.text("filter").filter(|filter| !filter.is_empty()),
        calls_per_s: section.integer("calls_per_s", 1..=1_000, "calls per second"),
        poll: section.seconds("poll_s", 1..=3_600),
        overlap: section.seconds("overlap_s", 0..=86_400),
        lag: section.seconds("lag_s", 0..=3_600),
        start: section.seconds("start_s", 0..=2_592_000),
        window: section.seconds("window_s", 1..=86_400),
    }
}

fn mapping(reader: &Reader, section: &mut Section<'_>, need: Need) -> ReceiptMapping {
    let mut fields = section.section("fields");
    let mut is_right = true;
    let mut field = |key: &'static str| {
        let text = fields.text(key).filter(|text| !text.is_empty())?;
        let path = FieldPath::parse(&text);
        is_right &= path.is_ok();
        path.map_err(|error| reader.note(&fields.key(key), None, error.to_string())).ok()
    };
    let (message_id, provider_id, event_id) = (field("message_id"), field("provider_id"), field("event_id"));
    let (status, time, carrier) = (field("status"), field("at"), field("carrier"));
    let (response, sent_at, price) = (field("response"), field("sent_at"), field("price"));
    if need == Need::Required {
        if message_id.is_none() && provider_id.is_none() && is_right {
            let advice =
                "say where a receipt names its message: message_id (ours, msg_…) or provider_id (theirs)";
            reader.note(&fields.key("message_id"), None, advice);
        }
        if status.is_none() && is_right {
            reader.note(&fields.key("status"), None, "say where a receipt says what became of its message");
        }
    }
    fields.finish();
    let unknown = [("reject", UnknownStatus::Reject), ("sent", UnknownStatus::Sent)];
    ReceiptMapping {
        message_id,
        provider_id,
        event_id,
        status: status.unwrap_or_else(|| FieldPath::parse("status").expect("it is a key")),
        time,
        carrier,
        response,
        sent_at,
        price,
        statuses: statuses(reader, section, need),
        otherwise: section.choice("other_statuses", &unknown).unwrap_or_default(),
    }
}

/// The words of `[receipts.sources.NAME.statuses]`.
fn statuses(reader: &Reader, section: &mut Section<'_>, need: Need) -> BTreeMap<String, StatusMeaning> {
    const WORDS: [(&str, StatusMeaning); 4] = [
        ("delivered", StatusMeaning::Delivered),
        ("failed", StatusMeaning::Failed),
        ("sent", StatusMeaning::Sent),
        ("ignored", StatusMeaning::Ignored),
    ];
    let (mut statuses, mut wrong) = (BTreeMap::new(), false);
    let key = section.key("statuses");
    for (path, word, meaning) in section.private_texts("statuses") {
        if let Some((_, meaning)) = WORDS.iter().find(|(known, _)| *known == meaning) {
            statuses.insert(word, *meaning);
        } else {
            let advice = "write what the word means: \"delivered\", \"failed\", \"sent\" or \"ignored\"";
            reader.note(&path, Some(shown_text(&meaning)), advice);
            wrong = true;
        }
    }
    let is_final =
        |meaning: &StatusMeaning| matches!(meaning, StatusMeaning::Delivered | StatusMeaning::Failed);
    if need == Need::Required && !wrong && !statuses.values().any(is_final) {
        let advice = "say what the provider's words mean: DELIVERED = \"delivered\", UNDELIV = \"failed\", …";
        reader.note(&key, None, advice);
    }
    statuses
}
