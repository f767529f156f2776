//! The ledger of rows, receipts and warehouses.

use std::time::Duration;

use postrider_actors::model::{
    receipt_format::{FieldPath, ReceiptFileFormat, StatusMeaning, UnknownStatus},
    table::{Column, ColumnSource, ColumnType},
};

use super::{super::*, check, problems};

const TABLE: &str = r#"
[warehouses.main]
url = "env:WAREHOUSE"
[destinations.events]
kind = "table"
warehouse = "main"
table = "analytics.events"
[destinations.events.columns]
user_id = "recipient"
amount = "data.order.amount numeric required"
"#;

const SOURCE: &str = r#"
[receipts.sources.dlr]
kind = "dir"
path = "/srv/receipts"
destination = "support"
[receipts.sources.dlr.fields]
message_id = "id"
status = "delivery.status"
[receipts.sources.dlr.statuses]
DELIVERED = "delivered"
"in transit" = "sent"
READ = "ignored"
"#;

const LISTEN: &str = "[receipts]\nlisten = \"127.0.0.1:8081\"\n";

/// A source of requests, and its listener.
fn pushed(name: &str, secret: &str) -> String {
    let kind = format!("kind = \"http\"\nsecrets = [\"{secret}\"]");
    LISTEN.to_owned()
        + &SOURCE.replace("kind = \"dir\"", &kind).replace("sources.dlr", &format!("sources.{name}"))
}

fn with_minimal(text: &str) -> Config {
    check(&format!("{}\n{text}", super::MINIMAL)).unwrap_or_else(|problems| panic!("{problems}"))
}

#[test]
fn a_table_reads_as_written() {
    let config = with_minimal(TABLE);
    let table = config.destination("events").unwrap().table().unwrap();
    assert_eq!(
        (table.warehouse.as_str(), table.table.to_string().as_str()),
        ("main", "\"analytics\".\"events\"")
    );
    let column = |name: &str, source, kind, required| Column { name: name.into(), source, kind, required };
    let amount = ColumnSource::Field("order.amount".into());
    let expected = [
        column("message_id", ColumnSource::Id, ColumnType::Text, true),
        column("amount", amount, ColumnType::Numeric, true),
        column("user_id", ColumnSource::Recipient, ColumnType::Text, false),
    ];
    assert_eq!(table.mapping.columns, expected);
    let warehouse = config.warehouse("main").unwrap();
    assert_eq!(warehouse.url, SecretSource::Environment("WAREHOUSE".into()));
    assert_eq!(warehouse.tls, Tls::Require, "nothing less unless it is asked for");
    assert!(!config.has_rows());
}

#[test]
fn a_source_of_receipts_reads_as_written() {
    let config = with_minimal(SOURCE);
    let [source] = &config.receipt_sources[..] else { panic!("one source") };
    let mapping = &source.mapping;
    assert_eq!(mapping.message_id.as_ref().map(FieldPath::as_str), Some("id"));
    assert_eq!(mapping.status.as_str(), "delivery.status");
    assert_eq!(mapping.provider_id, None);
    assert_eq!(mapping.statuses["DELIVERED"], StatusMeaning::Delivered);
    assert_eq!(mapping.statuses["in transit"], StatusMeaning::Sent);
    assert_eq!(mapping.statuses["READ"], StatusMeaning::Ignored);
    assert_eq!(mapping.otherwise, UnknownStatus::Reject);
    assert_eq!(source.format, ReceiptFileFormat::Ndjson);
    let csv = |keys: &str| {
        let text = SOURCE.replace("kind = \"dir\"", &format!("kind = \"dir\"\nformat = \"csv\"\n{keys}"));
        with_minimal(&text).receipt_sources[0].format
    };
    assert_eq!(csv(""), ReceiptFileFormat::Csv { delimiter: b',' });
    assert_eq!(csv("delimiter = \"\\t\""), ReceiptFileFormat::Csv { delimiter: b'\t' });
    assert_eq!(config.receipts.timeout, Duration::from_hours(72), "S0.5");
    assert!(config.is_recorded("support") && config.has_rows());
}

#[test]
fn postgres_records_every_message() {
    let config = with_minimal("[ledger]\nkind = \"postgres\"\npostgres.url = \"credential:ledger\"");
    assert!(config.is_recorded("support"));
    assert_eq!(config.ledger.kind, LedgerKind::Postgres);
    assert_eq!(config.postgres.url, SecretSource::Credential("ledger".into()));
}

#[test]
fn each_mistake_is_named_with_what_to_do() {
    let table = |over: &str| format!("{TABLE}\n{over}");
    let source = |over: &str| format!("{SOURCE}\n{over}");
    let table_with = |key: &str, value: &str| {
        let line = TABLE.lines().find(|line| line.starts_with(key)).expect("the key is there");
        TABLE.replace(line, &format!("{key} = {value}"))
    };
    let cases: &[(String, &[&str])] = &[
        ("[ledger]\nkind = \"postgres\"".into(), &["ledger.postgres.url", "missing", "env:NAME"]),
        (
            "[ledger.postgres]\nurl = \"postgres://me:s3cr3t@db/x\"".into(),
            &["ledger.postgres.url", "never written into the configuration"],
        ),
        (
            "[ledger.postgres]\nschema = \"a\\\"; drop schema public\"".into(),
            &["ledger.postgres.schema", "a-z"],
        ),
        ("[ledger.postgres]\nschema = \"pg_mine\"".into(), &["ledger.postgres.schema"]),
        ("[ledger]\nretention = \"1h\"".into(), &["ledger.retention", "found 1h", "6d and more"]),
        (table_with("table", "\"events; drop table x\""), &["destinations.events.table", "schema.table"]),
        (table_with("table", "\"a.b.c\""), &["destinations.events.table"]),
        (table_with("warehouse", "\"mian\""), &["destinations.events.warehouse", "did you mean \"main\"?"]),
        (table_with("user_id", "\"data\""), &["columns.user_id", "data.NAME"]),
        (table_with("user_id", "\"recipient varchar\""), &["columns.user_id", "TYPE is text"]),
        (table("message_id = \"recipient\""), &["columns.message_id", "key_column"]),
        (table("\"id\\\"; drop\" = \"recipient\""), &["columns", "62 letters, digits"]),
        (
            "[destinations.support]\ntable = \"t\"".into(),
            &["destinations.support.table", "only kind = \"table\" has it"],
        ),
        (
            TABLE.replace("[destinations.events]", "[destinations.events]\nurl = \"http://a/\""),
            &["destinations.events.url", "only kind = \"webhook\" has it"],
        ),
        (
            format!("{TABLE}\n[warehouses.slow]\nurl = \"env:A\"\n{}", "")
                .replace("url = \"env:WAREHOUSE\"", "url = \"env:WAREHOUSE\"\nstatement_timeout = \"30s\""),
            &["warehouses.main.statement_timeout", "less than half of lease.duration (1m)"],
        ),
        (source("FAILED = \"dead\""), &["statuses.FAILED", "found \"dead\"", "\"ignored\""]),
        (
            SOURCE.replace("destination = \"support\"", "destination = \"suport\""),
            &["dlr.destination", "support"],
        ),
        (SOURCE.replace("message_id = \"id\"", ""), &["dlr.fields.message_id", "provider_id"]),
        (
            SOURCE.replace("message_id = \"id\"", "provider_id = \"id\""),
            &["dlr.fields.provider_id", "[destinations.support] does not keep it"],
        ),
        (
            SOURCE.replace("message_id = \"id\"", "message_id = \"id\"\nevent_id = \"id\""),
            &[":1: ", "dlr.fields.event_id", "found \"id\"", "message_id is the same"],
        ),
        (
            SOURCE.replace("message_id = \"id\"", "message_id = \"id\"\nevent_id = \"delivery.status\""),
            &["dlr.fields.event_id", "status is the same"],
        ),
        (
            pushed("dlr", "env:S") + &pushed("other", "env:S").replacen(LISTEN, "", 1),
            &[":1: ", "sources.other.secrets", "found \"env:S\"", "the source dlr has it too"],
        ),
        (SOURCE.replace("/srv/receipts", "/srv/postrider/alerts/in"), &["dlr.path", "the feed alerts"]),
        (SOURCE.replace("kind = \"dir\"", "kind = \"ftp\""), &["dlr.kind", "\"cloudwatch\""]),
        (
            SOURCE.replace("kind = \"dir\"", "kind = \"http\"\nsecrets = [\"env:S\"]"),
            &["receipts.listen", "where to listen"],
        ),
        (
            format!("[receipts]\nlisten = \"127.0.0.1:8081\"\n{}", SOURCE.replace("\"dir\"", "\"http\"")),
            &["dlr.secrets", "would prove nothing"],
        ),
        (
            SOURCE.replace("kind = \"dir\"", "kind = \"dir\"\nformat = \"csv\"\ndelimiter = \"ab\""),
            &["dlr.delimiter", "one ASCII character"],
        ),
        (
            SOURCE.replace("kind = \"dir\"", "kind = \"dir\"\ndelimiter = \";\""),
            &["dlr.delimiter", "only format = \"csv\""],
        ),
        (
            format!("[receipts]\nevents_to = \"support\"\n{SOURCE}"),
            &["receipts.events_to", "events about events"],
        ),
        (
            "[destinations.support]\nprovider_id = \"message.id\"".into(),
            &["destinations.support.provider_id", "such as /message/id"],
        ),
    ];
    for (over, expected) in cases {
        let lines = problems(over);
        assert_eq!(lines.len(), 1, "{over}: {lines:#?}");
        assert!(expected.iter().all(|part| lines[0].contains(part)), "{over}: {lines:#?}");
        assert!(!lines[0].contains("s3cr3t"), "{lines:#?}");
    }
}

#[test]
fn f55_a_secret_of_two_sources_is_refused_wherever_it_is_kept() {
    let config =
        || with_minimal(&(pushed("dlr", "env:A") + &pushed("other", "env:B").replacen(LISTEN, "", 1)));
    let resolve = |a: &'static str, b: &'static str| {
        config().resolve_with(move |name| match name {
            "A" => Some(a.into()),
            "B" => Some(b.into()),
            _ => Some("/nowhere".into()),
        })
    };
    let same = |a, b| resolve(a, b).unwrap_err().to_string().contains("the source dlr has it too");
    assert!(same("whsec_c2VjcmV0", "whsec_c2VjcmV0") && same("whsec_c2VjcmV0", "secret"), "the same key");
    assert!(!same("whsec_c2VjcmV0", "secrets"));
    assert!(!resolve("s3cr3t", "s3cr3t").unwrap_err().to_string().contains("s3cr3t"), "I10");
}
