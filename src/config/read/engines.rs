//! Which engines hold and carry batches, and how they are reached.

use std::time::Duration;

use url::Url;

use super::{
    super::{
        Aws, Delay, DynamodbOutbox, FIFO_SUFFIX, Outbox, OutboxKind, Queue, QueueAddress, QueueKind,
        SqsQueue,
        reader::{Reader, Section},
        tree::shown_text,
    },
    count,
};

/// Whether this program can reach AWS at all.
const HAS_AWS: bool = cfg!(feature = "aws");

/// Steps of `queue.delay.steps`: a table that a person can still overlook.
const STEPS_MAX: usize = 16;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Embedded,
    Aws,
}

/// Reads `kind`: the embedded engine, or the one called `word`.
fn kind(reader: &Reader, section: &mut Section<'_>, word: &str) -> Kind {
    let kind = section.choice("kind", &[("embedded", Kind::Embedded), (word, Kind::Aws)]);
    if kind == Some(Kind::Aws) {
        require_aws(reader, &section.key("kind"), word);
    }
    kind.unwrap_or(Kind::Embedded)
}

/// Notes a setting that this program was built without.
pub(super) fn require_aws(reader: &Reader, key: &str, word: &str) {
    if !HAS_AWS {
        let advice = "this program was built without AWS: use one that was built with `--features aws` (the \
                      default), or leave the setting out";
        reader.note(key, Some(shown_text(word)), advice);
    }
}

/// Reads `[outbox]`.
pub(super) fn outbox(reader: &Reader, mut section: Section<'_>) -> Outbox {
    let kind = kind(reader, &mut section, "dynamodb");
    let high_watermark = section.integer("high_watermark", 1..=1_000_000_000u64, "messages");
    let mut low_watermark = section.integer("low_watermark", 0..=1_000_000_000u64, "messages");
    if !reader.is_set("outbox.low_watermark") {
        // Whoever lowers the one is not asked to lower the other too.
        low_watermark = low_watermark.min(high_watermark / 4 * 3);
    }
    let retention = section.seconds("retention_s", 0..=315_360_000);
    let dynamodb = dynamodb(reader, section.section("dynamodb"));
    section.finish();
    Outbox {
        kind: match kind {
            Kind::Embedded => OutboxKind::Embedded,
            Kind::Aws => OutboxKind::Dynamodb(dynamodb),
        },
        high_watermark,
        low_watermark,
        retention: (!retention.is_zero()).then_some(retention),
    }
}

fn dynamodb(reader: &Reader, mut section: Section<'_>) -> DynamodbOutbox {
    let table = section.text("table").unwrap_or_default();
    // Amazon DynamoDB, "Naming rules": 3 to 255 of these; seven are for `-ledger`.
    let is_name = (3..=248).contains(&table.len())
        && table.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    let key = section.key("table");
    if !is_name && reader.is_there(&key) {
        let advice = "write a table's name: 3 to 248 characters out of A-Z, a-z, 0-9, -, _ and full stop";
        reader.note(&key, Some(shown_text(&table)), advice);
    }
    let outbox = DynamodbOutbox {
        table,
        shards: section.integer("shards", 1..=1_000, "shards"),
        scan_concurrency: count(&mut section, "scan_concurrency", 1, 64, "segments"),
        sweep_interval: section.millis("sweep_interval_ms", 500..=600_000),
        sweep_after: section.millis("sweep_after_ms", 1_000..=3_600_000),
    };
    section.finish();
    outbox
}

/// Reads `[queue]`.
pub(super) fn queue(reader: &Reader, mut section: Section<'_>) -> Queue {
    let kind = kind(reader, &mut section, "sqs");
    let prefetch = count(&mut section, "prefetch", 1, 64, "batches");
    let delay = delay(reader, section.section("delay"));
    let sqs = sqs(reader, section.section("sqs"), kind, delay);
    section.finish();
    let kind = match kind {
        Kind::Embedded => QueueKind::Embedded,
        Kind::Aws => QueueKind::Sqs(sqs),
    };
    Queue { kind, prefetch }
}

fn sqs(reader: &Reader, mut section: Section<'_>, kind: Kind, delay: Delay) -> SqsQueue {
    let queue = address(reader, &mut section, "name", "url", kind == Kind::Aws)
        .unwrap_or_else(|| QueueAddress::Name("postrider".into()));
    let dead_letter_key = section.key("dead_letter_name");
    let dead_letter_name = section.text("dead_letter_name").unwrap_or_else(|| {
        let (stem, suffix) = match queue.name().strip_suffix(FIFO_SUFFIX) {
            Some(stem) => (stem, FIFO_SUFFIX),
            None => (queue.name(), ""),
        };
        format!("{stem}-dead{suffix}")
    });
    if kind == Kind::Aws && !is_queue_name(&dead_letter_name) {
        reader.note(&dead_letter_key, Some(shown_text(&dead_letter_name)), QUEUE_NAME);
    } else if kind == Kind::Aws && dead_letter_name.ends_with(FIFO_SUFFIX) != queue.is_fifo() {
        // Amazon SQS Developer Guide, "Using dead-letter queues".
        let advice = "the dead-letter queue of a FIFO queue must be FIFO too (its name ends in .fifo), that of \
                      a standard queue must not";
        reader.note(&dead_letter_key, Some(shown_text(&dead_letter_name)), advice);
    } else if kind == Kind::Aws && dead_letter_name == queue.name() {
        reader.note(&dead_letter_key, Some(shown_text(&dead_letter_name)), "it must be a queue of its own");
    }
    let delay_key = "queue.delay.mode";
    if delay != Delay::None && kind == Kind::Embedded {
        let advice =
            "only queue.kind = \"sqs\" delays entries: set it, or limit rate_per_s of the destination";
        reader.conflict(delay_key, "queue.kind", &delay_word(&delay), advice);
    } else if delay != Delay::None && queue.is_fifo() {
        let advice = "a FIFO queue has no delay per entry (Amazon SQS API reference, SendMessage): use a \
                      standard queue, or limit rate_per_s of the destination";
        reader.conflict(delay_key, "queue.sqs.name", &delay_word(&delay), advice);
    }
    let sqs = SqsQueue {
        queue,
        dead_letter_name,
        max_bytes: count(&mut section, "max_bytes", 1 << 10, 1 << 20, "bytes"),
        pollers: count(&mut section, "pollers", 1, 64, "polls"),
        wait: section.seconds("wait_s", 0..=20),
        max_receives: section.integer("max_receives", 1..=1_000, "deliveries"),
        lanes: section.integer("lanes", 1..=1_000, "message groups"),
        delay,
    };
    section.finish();
    sqs
}

fn delay_word(delay: &Delay) -> &'static str {
    match delay {
        Delay::None => "\"none\"",
        Delay::Fixed(_) => "\"fixed\"",
        Delay::ByDepth { .. } => "\"by_depth\"",
    }
}

/// What a queue may be called (Amazon SQS API reference, `CreateQueue`).
const QUEUE_NAME: &str = "write a queue's name: 1 to 80 characters out of A-Z, a-z, 0-9, - and _; that of a FIFO queue ends in .fifo";

fn is_queue_name(name: &str) -> bool {
    let stem = name.strip_suffix(FIFO_SUFFIX).unwrap_or(name);
    !stem.is_empty()
        && name.len() <= 80
        && stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// A queue by one of two keys. `is_needed` where one of them must be there.
pub(super) fn address(
    reader: &Reader,
    section: &mut Section<'_>,
    name_key: &'static str,
    url_key: &'static str,
    is_needed: bool,
) -> Option<QueueAddress> {
    let (name, url) = (section.text(name_key), section.text(url_key));
    let (name_path, url_path) = (section.key(name_key), section.key(url_key));
    let name = name.filter(|name| {
        if !is_queue_name(name) {
            reader.note(&name_path, Some(shown_text(name)), QUEUE_NAME);
        }
        is_queue_name(name)
    });
    let url = url.and_then(|text| {
        let address = web_address(reader, &url_path, &text)?;
        let name = QueueAddress::Url(address.clone()).name().to_owned();
        if !is_queue_name(&name) {
            let advice = "write the queue's whole address, which ends in its name: \
                          https://sqs.REGION.amazonaws.com/ACCOUNT/NAME";
            reader.note(&url_path, Some(shown_text(&text)), advice);
            return None;
        }
        Some(address)
    });
    let is_there = reader.is_there(&name_path) || reader.is_there(&url_path);
    if is_needed && !is_there {
        let advice = format!("it is missing; write the queue's name here, or its address as {url_key}");
        reader.note(&name_path, None, advice);
    }
    match (name, url) {
        (Some(_), Some(url)) if is_needed && reader.is_own(&name_path) == reader.is_own(&url_path) => {
            reader.note(&url_path, None, format!("`{name_key}` is set too: keep one of them"));
            Some(QueueAddress::Url(url))
        }
        // What stands under the feed's own name wins over what all share.
        (Some(name), Some(_)) if reader.is_own(&name_path) => Some(QueueAddress::Name(name)),
        (_, Some(url)) => Some(QueueAddress::Url(url)),
        (Some(name), None) => Some(QueueAddress::Name(name)),
        (None, None) => None,
    }
}

/// An http(s) address without user, query or fragment.
fn web_address(reader: &Reader, key: &str, text: &str) -> Option<Url> {
    const ADVICE: &str = "write an http:// or https:// address without user name, query or fragment";
    let url = Url::parse(text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    });
    if url.is_none() {
        // It may hold a password: not shown.
        reader.note(key, None, ADVICE);
    }
    url
}

#[derive(Clone, Copy)]
enum Mode {
    None,
    Fixed,
    ByDepth,
}

fn delay(reader: &Reader, mut section: Section<'_>) -> Delay {
    let modes = [("none", Mode::None), ("fixed", Mode::Fixed), ("by_depth", Mode::ByDepth)];
    let mode = section.choice("mode", &modes).unwrap_or(Mode::None);
    let fixed = section.seconds("fixed_s", 0..=900);
    let steps = steps(reader, &mut section);
    let hysteresis_percent = section.integer("hysteresis_percent", 0..=90u32, "percent");
    let read_every = section.seconds("read_every_s", 1..=300);
    section.finish();
    match mode {
        Mode::None => Delay::None,
        Mode::Fixed => Delay::Fixed(fixed),
        Mode::ByDepth => Delay::ByDepth { steps, hysteresis_percent, read_every },
    }
}

fn steps(reader: &Reader, section: &mut Section<'_>) -> Vec<(u64, Duration)> {
    let key = section.key("steps");
    let Some(pairs) = section.pairs("steps") else { return Vec::new() };
    let is_table = (1..=STEPS_MAX).contains(&pairs.len())
        && pairs.iter().all(|&(depth, seconds)| depth <= 1_000_000_000 && seconds <= 900)
        && pairs.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
    if !is_table {
        let advice = format!(
            "write 1 to {STEPS_MAX} pairs of entries and seconds, both ascending, seconds at most 900: \
             [[500, 30], [1000, 60]]"
        );
        reader.note(&key, Some(format!("{pairs:?}")), advice);
    }
    pairs.into_iter().map(|(depth, seconds)| (depth, Duration::from_secs(seconds))).collect()
}

/// Reads `[aws]`.
pub(super) fn aws(reader: &Reader, mut section: Section<'_>) -> Aws {
    let mut word = |key: &'static str, advice: &str| {
        let text = section.text(key)?;
        let is_word = (1..=128).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@+".contains(&byte));
        if !is_word {
            reader.note(&section.key(key), Some(shown_text(&text)), advice);
        }
        Some(text)
    };
    let region = word("region", "write a region such as \"eu-central-1\"");
    let profile = word("profile", "write a profile's name as in ~/.aws/config");
    let mut endpoint = |key: &'static str| {
        let text = section.text(key)?;
        web_address(reader, &section.key(key), &text)
    };
    let aws = Aws {
        region,
        profile,
        sqs_endpoint: endpoint("sqs_endpoint_url"),
        dynamodb_endpoint: endpoint("dynamodb_endpoint_url"),
        logs_endpoint: endpoint("logs_endpoint_url"),
        connect_timeout: section.millis("connect_timeout_ms", 100..=60_000),
        attempt_timeout: section.millis("attempt_timeout_ms", 500..=120_000),
    };
    section.finish();
    aws
}
