//! Queue, outbox, AWS and feeds from a queue.

use super::*;

const AWS: &str = "profile = \"aws\"\nqueue.sqs.prefix = \"pr\"\n";
const QUEUE_FEED: &str =
    "[feeds.q]\nkind = \"sqs\"\nqueue = \"in\"\nrecipient = \"id\"\ndestinations = [\"support\"]\n";

/// The minimal example with `before` above it and `after` below it.
fn around(before: &str, after: &str) -> Result<Config, Problems> {
    check(&format!("{before}\n{MINIMAL}\n{after}"))
}

#[test]
fn the_shared_engines_read_as_written() {
    let config = around(AWS, QUEUE_FEED).unwrap();
    assert_eq!(config.profile, Profile::Aws);
    assert_eq!((&config.sqs.queue_name("support")[..], config.sqs.fifo), ("pr-support", false));
    assert_eq!(config.delay.mode, DelayMode::None);
    let dynamodb = &config.dynamodb;
    assert_eq!((&dynamodb.table[..], &dynamodb.ledger_table()[..]), ("postrider", "postrider-ledger"));
    // S3.9
    assert_eq!(dynamodb.shards, 20);
    assert_eq!(config.outbox.retention, None);
    let feed = config.feed("q").unwrap();
    assert_eq!(feed.directory(), None);
    let queue = feed.queue().unwrap();
    assert_eq!((&queue.queue, &queue.recipient[..]), (&QueueAddress::Name("in".into()), "id"));
    assert_eq!((queue.max_rows, queue.max_size), (500, 256 << 10));
}

#[test]
fn b24_there_is_a_queue_for_each_destination() {
    let config = around("profile = \"aws\"\nqueue.sqs.fifo = true", "").unwrap();
    assert_eq!(config.sqs.queue_name("support"), "postrider-support.fifo");
    assert!(config.sqs.has_room_for("support") && !config.sqs.has_room_for(&"x".repeat(66)));
}

#[test]
fn a_feed_s_queue_is_known_by_its_name_or_its_address() {
    let url = "https://sqs.eu-central-1.amazonaws.com/123456789012/in.fifo";
    let config = around("", &QUEUE_FEED.replace("\"in\"", &format!("\"{url}\""))).unwrap();
    let queue = &config.feed("q").unwrap().queue().unwrap().queue;
    assert_eq!((queue.name(), queue.is_fifo(), queue.to_string()), ("in.fifo", true, url.to_owned()));
}

/// S2.3 and S2.6; the seed: over 1000 entries 60 s, over 500 entries 30 s.
#[test]
fn delays_read_as_written_and_the_seed_s_table_is_the_default() {
    let config = around(&format!("{AWS}queue.delay.mode = \"by_depth\""), "").unwrap();
    assert_eq!(config.delay.mode, DelayMode::ByDepth);
    let step = |above, seconds| (above, Duration::from_secs(seconds));
    assert_eq!(config.delay.steps, [step(500, 30), step(1_000, 60)]);
    let config = around(&format!("{AWS}queue.delay = {{ mode = \"fixed\", fixed = \"0s\" }}"), "").unwrap();
    assert_eq!((config.delay.mode, config.delay.fixed), (DelayMode::Fixed, Duration::ZERO));
    let config = with_environment(
        &format!("{AWS}{MINIMAL}"),
        &[("POSTRIDER__QUEUE__DELAY__MODE", "by_depth"), ("POSTRIDER__QUEUE__DELAY__STEPS", "10:1s, 20:15m")],
    )
    .unwrap();
    assert_eq!(config.delay.steps[..], [(10, Duration::from_secs(1)), (20, Duration::from_mins(15))]);
}

#[test]
fn each_mistake_with_engines_is_named_with_what_to_do() {
    let long = "x".repeat(68);
    let cases: &[(String, &[&str])] = &[
        ("profile = \"kafka\"".into(), &["profile", "\"embedded\", \"aws\""]),
        ("outbox.kind = \"dynamodb\"".into(), &["outbox.kind", "unknown key"]),
        ("profile = \"aws\"\nqueue.sqs.prefix = \"a b\"".into(), &["queue.sqs.prefix", "1 to 79"]),
        // Short enough for every destination, too long for the dead letters.
        (format!("profile = \"aws\"\nqueue.sqs.prefix = \"{long}\""), &["queue.sqs.prefix", "80 characters"]),
        (QUEUE_FEED.replace("\"in\"", "\"https://user:s3cr3t@h/q\""), &["feeds.q.queue", "no user name"]),
        (QUEUE_FEED.replace("\"in\"", "\"https://h/\""), &["feeds.q.queue", "ends in its name"]),
        (QUEUE_FEED.replace("\"in\"", "\"a b\""), &["feeds.q.queue", "1 to 80"]),
        ("queue.delay.mode = \"fixed\"".into(), &["queue.delay.mode", "profile = \"aws\""]),
        (
            "profile = \"aws\"\nqueue = { sqs.fifo = true, delay.mode = \"by_depth\" }".into(),
            &["queue.delay.mode", "FIFO", "SendMessage"],
        ),
        ("queue.delay.steps = [[10, \"16m\"]]".into(), &["queue.delay.steps", "at most 15m"]),
        ("queue.delay.steps = [[20, \"1s\"], [10, \"2s\"]]".into(), &["queue.delay.steps", "ascending"]),
        ("queue.delay.steps = [[10, \"2s\"], [20, \"1s\"]]".into(), &["queue.delay.steps", "ascending"]),
        ("queue.delay.steps = []".into(), &["queue.delay.steps", "1 to 16 pairs"]),
        ("queue.delay.steps = [[1, 2]]".into(), &["queue.delay.steps", "pairs of a whole number and a time"]),
        ("queue.delay.steps = [[-1, \"2s\"]]".into(), &["queue.delay.steps", "pairs of a whole number"]),
        (format!("{AWS}outbox.dynamodb.table = \"a/b\""), &["dynamodb.table", "3 to 248"]),
        (
            format!("{AWS}feeds.alerts.max_row = \"512KiB\""),
            &["feeds.alerts.max_row", "found 512KiB", "409600", "lower max_row"],
        ),
        ("outbox.retention = \"59m\"".into(), &["outbox.retention", "found 59m", "1h and more"]),
        ("aws.region = \"eu central\"".into(), &["aws.region", "eu-central-1"]),
        (
            "aws.sqs_endpoint_url = \"127.0.0.1:4566\"".into(),
            &["aws.sqs_endpoint_url", "http:// or https://"],
        ),
        ("aws.endpoint_url = \"http://h\"".into(), &["aws.endpoint_url", "did you mean `sqs_endpoint_url`"]),
        (format!("{QUEUE_FEED}path = \"/x\""), &["feeds.q.path", "not from files"]),
        (format!("{QUEUE_FEED}duplicates = \"first\""), &["feeds.q.duplicates", "not from files"]),
        (format!("{QUEUE_FEED}format = \"csv\""), &["feeds.q.format", "\"json\""]),
        (QUEUE_FEED.replace("recipient", "#"), &["feeds.q.recipient", "it is missing"]),
        (QUEUE_FEED.replace("queue =", "#"), &["feeds.q.queue", "or its address"]),
        (
            format!("{QUEUE_FEED}linger = \"20s\"\nvisibility = \"40s\""),
            &["feeds.q.visibility", "found 40s", "more than twice linger"],
        ),
        (format!("{QUEUE_FEED}max_size = \"65535B\""), &["feeds.q.max_size", "max_row (64KiB)"]),
        (
            format!("{QUEUE_FEED}{}", QUEUE_FEED.replace("feeds.q", "feeds.r")),
            &["feeds.r.queue", "the feed q takes its entries too"],
        ),
        (
            AWS.to_owned() + &QUEUE_FEED.replace("\"in\"", "\"pr-dead-letters\""),
            &["feeds.q.queue", "[queue.sqs]"],
        ),
        ("[feeds.alerts]\nkind = \"file\"".into(), &["feeds.alerts.kind", "\"directory\", \"sqs\""]),
        ("[feeds.alerts]\nvisibility = \"3m\"".into(), &["feeds.alerts.visibility", "only kind = \"sqs\""]),
        ("[feeds.alerts]\nformat = \"json\"".into(), &["feeds.alerts.format", "\"ndjson\""]),
    ];
    for (over, expected) in cases {
        let lines = problems(over);
        assert_eq!(lines.len(), 1, "{over}: {lines:#?}");
        assert!(expected.iter().all(|part| lines[0].contains(part)), "{over}: {lines:#?}");
        assert!(!lines[0].contains("s3cr3t"), "{lines:#?}");
    }
}

#[test]
fn shared_keys_of_the_other_kind_do_no_harm() {
    let shared = "[feeds.\"*\"]\nrescan = \"500ms\"\nformat = \"csv\"\nmax_rows = 7\nrecipient = \"id\"\n";
    let queue = QUEUE_FEED.replace("recipient = \"id\"\n", "");
    let config = around("", &format!("{shared}{queue}")).unwrap();
    assert_eq!(config.feed("q").unwrap().queue().unwrap().max_rows, 7);
    assert_eq!(config.feed("alerts").unwrap().directory().unwrap().rescan, Duration::from_millis(500));
}

#[test]
fn a_lean_build_names_the_engine_the_key_and_the_place() {
    let tables = "[warehouses.main]\nurl = \"env:WAREHOUSE\"\n[destinations.events]\nkind = \"table\"\nwarehouse = \"main\"\n\
                  table = \"events\"\n[destinations.events.columns]\nuser_id = \"recipient\"";
    let receipts = |kind| {
        format!(
            "[receipts.sources.r]\nkind = {kind}\ndestination = \"support\"\n[receipts.sources.r.fields]\n\
             message_id = \"id\"\nstatus = \"status\"\n[receipts.sources.r.statuses]\nOK = \"delivered\"\n"
        )
    };
    let cases = [
        (AWS.to_owned(), vec![("1:1: profile: found \"aws\"", "SQS and DynamoDB")]),
        (
            "ledger.kind = \"postgres\"\nledger.postgres.url = \"env:URL\"".into(),
            vec![("1:8: ledger.kind: found \"postgres\"", "Postgres")],
        ),
        (QUEUE_FEED.into(), vec![("2:1: feeds.q.kind: found \"sqs\"", "SQS")]),
        (receipts("\"sqs\"\nqueue = \"in\""), vec![("2:1: receipts.sources.r.kind: found \"sqs\"", "SQS")]),
        (
            receipts("\"cloudwatch\"\nlog_groups = [\"g\"]"),
            vec![("2:1: receipts.sources.r.kind: found \"cloudwatch\"", "CloudWatch Logs")],
        ),
        (
            tables.into(),
            vec![
                ("warehouses.main: found \"main\"", "warehouse tables"),
                ("4:1: destinations.events.kind: found \"table\"", "warehouse tables"),
            ],
        ),
    ];
    for (text, expected) in cases {
        let text = format!("{text}\n{MINIMAL}");
        check(&text).unwrap_or_else(|problems| panic!("a full build takes it: {problems}"));
        let refused = parse_for(&text, Path::new("test.toml"), [], Engines::LEAN).unwrap_err();
        let lines: Vec<_> = refused.list.iter().map(|problem| problem.line(&refused.file)).collect();
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (line, (place, engine)) in lines.iter().zip(expected) {
            let advice = format!("; this binary was built without {engine}: build it with `cargo build");
            assert!(line.contains(place) && line.contains(&advice), "{place}: {line}");
        }
    }
}
