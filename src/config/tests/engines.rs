//! Queue, outbox, AWS and feeds from a queue.

use postrider_actors::model::delay::{DelayPolicy, DepthStep};

use super::*;

const SQS: &str = "queue.kind = \"sqs\"\nqueue.sqs.name = \"pr\"\n";
const QUEUE_FEED: &str =
    "[feeds.q]\nkind = \"sqs\"\nqueue_name = \"in\"\nrecipient = \"id\"\ndestinations = [\"support\"]\n";

/// The minimal example with `before` above it and `after` below it.
fn around(before: &str, after: &str) -> Result<Config, Problems> {
    check(&format!("{before}\n{MINIMAL}\n{after}"))
}

fn sqs(config: &Config) -> &SqsQueue {
    match &config.queue.kind {
        QueueKind::Sqs(sqs) => sqs,
        QueueKind::Embedded => panic!("it is the embedded queue"),
    }
}

#[cfg(feature = "aws")]
#[test]
fn the_shared_engines_read_as_written() {
    let config = around(&format!("{SQS}outbox.kind = \"dynamodb\""), QUEUE_FEED).unwrap();
    let sqs = sqs(&config);
    assert_eq!(sqs.queue, QueueAddress::Name("pr".into()));
    assert_eq!((&sqs.dead_letter_name[..], sqs.queue.is_fifo()), ("pr-dead", false));
    assert_eq!((sqs.max_bytes, sqs.wait, sqs.max_receives), (1_048_576, Duration::from_secs(20), 1_000));
    assert_eq!(sqs.delay, Delay::None);
    let OutboxKind::Dynamodb(dynamodb) = &config.outbox.kind else { panic!("it is the embedded outbox") };
    assert_eq!((&dynamodb.table[..], &dynamodb.ledger_table()[..]), ("postrider", "postrider-ledger"));
    // S3.9
    assert_eq!(dynamodb.shards, 20);
    assert_eq!(config.outbox.retention, None);
    let feed = config.feed("q").unwrap();
    assert_eq!(feed.directory(), None);
    let queue = feed.queue().unwrap();
    assert_eq!((&queue.queue, &queue.recipient[..]), (&QueueAddress::Name("in".into()), "id"));
    assert_eq!((queue.max_rows, queue.max_bytes), (500, 262_144));
}

#[cfg(feature = "aws")]
#[test]
fn a_queue_is_known_by_its_name_or_its_address() {
    let url = "https://sqs.eu-central-1.amazonaws.com/123456789012/pr.fifo";
    let config = around(&format!("queue.kind = \"sqs\"\nqueue.sqs.url = \"{url}\""), "").unwrap();
    let queue = &sqs(&config).queue;
    assert_eq!((queue.name(), queue.is_fifo(), queue.to_string()), ("pr.fifo", true, url.to_owned()));
    assert_eq!(sqs(&config).dead_letter_name, "pr-dead.fifo");
}

/// S2.3 and S2.6; the seed: over 1000 entries 60 s, over 500 entries 30 s.
#[cfg(feature = "aws")]
#[test]
fn delays_read_as_written_and_the_seed_s_table_is_the_default() {
    let config = around(&format!("{SQS}queue.delay.mode = \"by_depth\""), "").unwrap();
    let Delay::ByDepth { steps, hysteresis_percent, read_every } = &sqs(&config).delay else {
        panic!("by_depth")
    };
    let steps = steps.iter().map(|&(above, delay)| DepthStep { above, delay }).collect();
    let policy =
        DelayPolicy::ByDepth { steps, hysteresis_percent: *hysteresis_percent, read_every: *read_every };
    assert_eq!(policy, DelayPolicy::seed_table());
    let config = around(&format!("{SQS}queue.delay = {{ mode = \"fixed\", fixed_s = 0 }}"), "").unwrap();
    assert_eq!(sqs(&config).delay, Delay::Fixed(Duration::ZERO));
    let config = with_environment(
        &format!("{SQS}{MINIMAL}"),
        &[("POSTRIDER__QUEUE__DELAY__MODE", "by_depth"), ("POSTRIDER__QUEUE__DELAY__STEPS", "10:1, 20:900")],
    )
    .unwrap();
    let Delay::ByDepth { steps, .. } = &sqs(&config).delay else { panic!("by_depth") };
    assert_eq!(steps[..], [(10, Duration::from_secs(1)), (20, Duration::from_mins(15))]);
}

#[cfg(feature = "aws")]
#[test]
fn each_mistake_with_engines_is_named_with_what_to_do() {
    let dynamodb = format!("{SQS}outbox.kind = \"dynamodb\"\n");
    let long = "x".repeat(76);
    let cases: &[(String, &[&str])] = &[
        ("queue.kind = \"kafka\"".into(), &["queue.kind", "\"embedded\", \"sqs\""]),
        ("queue.kind = \"sqs\"".into(), &["queue.sqs.name", "it is missing", "as url"]),
        ("queue.kind = \"sqs\"\nqueue.sqs.name = \"a b\"".into(), &["queue.sqs.name", "1 to 80"]),
        (format!("{SQS}queue.sqs.url = \"https://h/1/q\""), &["queue.sqs.url", "keep one"]),
        (
            "queue.kind = \"sqs\"\nqueue.sqs.url = \"https://user:s3cr3t@h/q\"".into(),
            &["queue.sqs.url", "without user name"],
        ),
        (
            "queue.kind = \"sqs\"\nqueue.sqs.url = \"https://h/\"".into(),
            &["queue.sqs.url", "ends in its name"],
        ),
        // The queue's name is short enough, that of its dead-letter queue is not.
        (
            format!("queue.kind = \"sqs\"\nqueue.sqs.name = \"{long}\""),
            &["queue.sqs.dead_letter_name", "1 to 80"],
        ),
        (
            format!("{SQS}queue.sqs.dead_letter_name = \"d.fifo\""),
            &["queue.sqs.dead_letter_name", "must be FIFO too"],
        ),
        (format!("{SQS}queue.sqs.dead_letter_name = \"pr\""), &["queue.sqs.dead_letter_name", "of its own"]),
        ("queue.delay.mode = \"fixed\"".into(), &["queue.delay.mode", "queue.kind = \"sqs\""]),
        (
            "queue = { kind = \"sqs\", sqs.name = \"a.fifo\", delay.mode = \"by_depth\" }".into(),
            &["queue.delay.mode", "FIFO", "SendMessage"],
        ),
        ("queue.delay.steps = [[10, 901]]".into(), &["queue.delay.steps", "at most 900"]),
        (
            "queue.delay.steps = [[20, 1], [10, 2]]".into(),
            &["queue.delay.steps", "found [(20, 1), (10, 2)]", "ascending"],
        ),
        ("queue.delay.steps = [[10, 2], [20, 1]]".into(), &["queue.delay.steps", "ascending"]),
        ("queue.delay.steps = []".into(), &["queue.delay.steps", "1 to 16 pairs"]),
        ("queue.delay.steps = [[1, 2, 3]]".into(), &["queue.delay.steps", "pairs of whole"]),
        ("queue.delay.steps = [[1, -2]]".into(), &["queue.delay.steps", "pairs of whole"]),
        ("outbox.kind = \"dynamodb\"".into(), &["outbox.kind", "queue.kind = \"sqs\"", "share"]),
        (format!("{dynamodb}outbox.dynamodb.table = \"a/b\""), &["dynamodb.table", "3 to 248"]),
        (
            format!("{dynamodb}batch.max_bytes = 400000"),
            &["batch.max_bytes", "409600", "lower batch.max_bytes"],
        ),
        (
            format!("{dynamodb}batch.max_messages = 10000"),
            &["batch.max_bytes", "11 failed attempts of 10000 messages"],
        ),
        ("outbox.retention_s = 3599".into(), &["outbox.retention_s", "found 3599", "3600 and more"]),
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
        (QUEUE_FEED.replace("queue_name", "#"), &["feeds.q.queue_name", "as queue_url"]),
        (
            format!("{QUEUE_FEED}linger_ms = 20000\nvisibility_s = 40"),
            &["feeds.q.visibility_s", "more than twice linger_ms"],
        ),
        (format!("{QUEUE_FEED}max_bytes = 65535"), &["feeds.q.max_bytes", "max_row_bytes (65536)"]),
        (
            format!("{QUEUE_FEED}{}", QUEUE_FEED.replace("feeds.q", "feeds.r")),
            &["feeds.r.queue_name", "the feed q takes its entries too"],
        ),
        (
            SQS.to_owned() + &QUEUE_FEED.replace("\"in\"", "\"pr-dead\""),
            &["feeds.q.queue_name", "[queue.sqs]"],
        ),
        ("[feeds.alerts]\nkind = \"file\"".into(), &["feeds.alerts.kind", "\"directory\", \"sqs\""]),
        ("[feeds.alerts]\npollers = 3".into(), &["feeds.alerts.pollers", "only kind = \"sqs\""]),
        ("[feeds.alerts]\nformat = \"json\"".into(), &["feeds.alerts.format", "\"ndjson\""]),
    ];
    for (over, expected) in cases {
        let lines = problems(over);
        assert_eq!(lines.len(), 1, "{over}: {lines:#?}");
        assert!(expected.iter().all(|part| lines[0].contains(part)), "{over}: {lines:#?}");
        assert!(!lines[0].contains("s3cr3t"), "{lines:#?}");
    }
}

#[cfg(feature = "aws")]
#[test]
fn shared_keys_of_the_other_kind_do_no_harm() {
    let shared = "[feeds.\"*\"]\nrescan_ms = 500\nformat = \"csv\"\npollers = 7\nrecipient = \"id\"\n";
    let queue = QUEUE_FEED.replace("recipient = \"id\"\n", "");
    let config = around("", &format!("{shared}{queue}")).unwrap();
    assert_eq!(config.feed("q").unwrap().queue().unwrap().pollers, 7);
    assert_eq!(config.feed("alerts").unwrap().directory().unwrap().rescan, Duration::from_millis(500));
}

#[cfg(not(feature = "aws"))]
#[test]
fn a_build_without_aws_refuses_what_it_can_not_do() {
    for (before, after, key) in [(SQS, "", "queue.kind"), ("", QUEUE_FEED, "feeds.q.kind")] {
        let error = around(before, after).unwrap_err();
        assert_eq!(error.list.len(), 1, "{error}");
        assert!(error.to_string().contains(&format!("{key}: found ")), "{error}");
        assert!(error.to_string().contains("--features aws"), "{error}");
    }
}
