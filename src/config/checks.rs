//! What must hold between settings that are each fine on their own.

use std::{collections::BTreeMap, path::Path, time::Duration};

use postrider_actors::model::retry::RetrySchedule;

use super::{
    Config, Destination, DirectoryFeed, Feed, LedgerKind, OutboxKind, QueueFeed, QueueKind, STATUS_FEED,
    SourceKind, Table, TemplateSource, Webhook,
    read::TEMPLATE_BYTES_MAX,
    reader::Reader,
    tree::{join, shown_text},
};

/// The largest item of a table (Amazon DynamoDB, "Constraints": 400 KB, names of attributes included).
const DYNAMODB_ITEM_BYTES_MAX: usize = 400 << 10;
/// What an item holds beside rows, template and attempts: ids, names, times, the names of columns.
const DYNAMODB_ITEM_BYTES_REST: usize = 16 << 10;
/// A failed attempt in a batch's history: time, status and reason.
const ATTEMPT_BYTES: usize = 10;
/// The shortest retention: a queue that delivers an entry twice does so within minutes, unless its
/// consumer held it for longer.
const RETENTION_MIN: Duration = Duration::from_hours(1);

/// Notes every contradiction.
pub(super) fn check(reader: &Reader, config: &Config) {
    let supervision = &config.supervision;
    if !supervision.is_consistent() {
        let waits: u128 =
            (1..=supervision.max_restarts).map(|n| supervision.backoff_max(n).as_millis()).sum();
        let advice = format!(
            "the first {} waits between restarts may take {waits} ms, so this period would never see that \
             many and a crash loop would go on for ever: make it longer than that, or lower max_restarts, \
             base_ms or cap_ms",
            supervision.max_restarts
        );
        let found = supervision.period.as_millis();
        reader.conflict("supervision.period_ms", "supervision.max_restarts", &found, advice);
    }
    if supervision.base > supervision.cap {
        let advice = "it must not be below supervision.base_ms";
        reader.conflict("supervision.cap_ms", "supervision.base_ms", &supervision.cap.as_millis(), advice);
    }
    if config.outbox.low_watermark >= config.outbox.high_watermark && config.outbox.high_watermark > 1 {
        let found = config.outbox.low_watermark;
        let advice = "it must be below outbox.high_watermark";
        reader.conflict("outbox.low_watermark", "outbox.high_watermark", &found, advice);
    }
    if config.record.max_outcomes > config.record.max_unrecorded {
        let found = config.record.max_outcomes;
        let advice = "a group can't be larger than record.max_unrecorded";
        reader.conflict("record.max_outcomes", "record.max_unrecorded", &found, advice);
    }
    for destination in &config.destinations {
        check_destination(reader, config, destination);
    }
    check_engines(reader, config);
    check_receipts(reader, config);
    let (mut directories, mut queues) = (BTreeMap::new(), BTreeMap::new());
    for feed in &config.feeds {
        check_feed(reader, config, feed);
        if let Some(directory) = feed.directory() {
            check_directory(reader, config, feed, directory);
            if let Some(other) = directories.insert(directory.path.as_path(), feed.name.as_str()) {
                let advice = format!("the feed {other} watches that directory too: give each its own");
                let other = join(&join("feeds", other), "path");
                reader.conflict(&key_of(feed, "path"), &other, &directory.path.display(), advice);
            }
        }
        if let Some(queue) = feed.queue() {
            check_queue(reader, config, feed, queue);
            let name = queue.queue.name();
            if let Some(other) = queues.insert(name, feed).filter(|_| !name.is_empty()) {
                let advice = format!(
                    "the feed {} takes its entries too, and each would get some of them: give each its own",
                    other.name
                );
                reader.conflict(
                    &queue_key(reader, feed),
                    &queue_key(reader, other),
                    &shown_text(name),
                    advice,
                );
            }
        }
    }
}

fn check_engines(reader: &Reader, config: &Config) {
    let outbox = &config.outbox;
    if outbox.retention.is_some_and(|retention| retention < RETENTION_MIN) {
        let found = outbox.retention.unwrap_or_default().as_secs();
        let advice = format!("write 0 to keep batches, or {} and more", RETENTION_MIN.as_secs());
        reader.conflict("outbox.retention_s", "outbox.retention_s", &found, advice);
    }
    if outbox.kind == OutboxKind::Embedded {
        return;
    }
    if config.queue.kind == QueueKind::Embedded {
        let advice = "it needs queue.kind = \"sqs\": several machines share this outbox, and the embedded queue \
                      is one machine's own";
        reader.conflict("outbox.kind", "queue.kind", &"\"dynamodb\"", advice);
    }
    // Every batch may come back whole as a retry, with all attempts before it.
    let attempts = config.destinations.iter().map(|known| known.retry.max_attempts - 1).max().unwrap_or(0);
    let webhooks = config.destinations.iter().filter_map(Destination::webhook);
    let template = webhooks.map(|known| match &known.template {
        TemplateSource::Default => 0,
        TemplateSource::Inline(source) => source.len(),
        TemplateSource::File(_) => TEMPLATE_BYTES_MAX,
    });
    let history = config.batch.max_messages as usize * attempts as usize * ATTEMPT_BYTES;
    let others = history + template.max().unwrap_or(0) + DYNAMODB_ITEM_BYTES_REST;
    if config.batch.max_bytes + others > DYNAMODB_ITEM_BYTES_MAX {
        let advice = format!(
            "an item of DynamoDB holds {DYNAMODB_ITEM_BYTES_MAX} bytes; the templates and {attempts} failed \
             attempts of {} messages may take {others} of them: lower batch.max_bytes, batch.max_messages or \
             max_attempts",
            config.batch.max_messages
        );
        reader.conflict("batch.max_bytes", "outbox.kind", &config.batch.max_bytes, advice);
    }
}

fn key_of(feed: &Feed, key: &str) -> String {
    join(&join("feeds", &feed.name), key)
}

/// The key that names a feed's queue.
fn queue_key(reader: &Reader, feed: &Feed) -> String {
    let [name, url] = ["queue_name", "queue_url"].map(|key| key_of(feed, key));
    if reader.is_set(&url) { url } else { name }
}

fn check_queue(reader: &Reader, config: &Config, feed: &Feed, queue: &QueueFeed) {
    if queue.visibility <= queue.linger * 2 {
        let found = queue.visibility.as_secs();
        let advice = "it must be more than twice linger_ms, or entries come again while they wait for others";
        reader.conflict(&key_of(feed, "visibility_s"), &key_of(feed, "linger_ms"), &found, advice);
    }
    if queue.max_bytes < feed.max_row_bytes {
        let advice = format!("a row must fit into it: at least max_row_bytes ({})", feed.max_row_bytes);
        reader.conflict(&key_of(feed, "max_bytes"), &key_of(feed, "max_row_bytes"), &queue.max_bytes, advice);
    }
    if let QueueKind::Sqs(own) = &config.queue.kind {
        let name = queue.queue.name();
        if [own.queue.name(), &own.dead_letter_name].contains(&name) {
            let advice = "that queue carries Postrider's own batches ([queue.sqs]): give the feed its own";
            let own_key = if reader.is_set("queue.sqs.url") { "queue.sqs.url" } else { "queue.sqs.name" };
            reader.conflict(&queue_key(reader, feed), own_key, &shown_text(name), advice);
        }
    }
}

fn check_destination(reader: &Reader, config: &Config, destination: &Destination) {
    let section = join("destinations", &destination.name);
    let retry_key = |key: &str| join(&join(&section, "retry"), key);
    if let Some(webhook) = destination.webhook() {
        check_webhook(reader, config, &section, webhook, &destination.retry);
    }
    if let Some(table) = destination.table() {
        check_table(reader, config, &section, table);
    }
    let retry = &destination.retry;
    if retry.base > retry.cap {
        let advice = "it must not be below base_ms";
        reader.conflict(&retry_key("cap_ms"), &retry_key("base_ms"), &retry.cap.as_millis(), advice);
    }
    if retry.base > retry.max_age {
        let advice = "the first retry would come after max_age_s: shorten it";
        reader.conflict(&retry_key("base_ms"), &retry_key("max_age_s"), &retry.base.as_millis(), advice);
    }
}

fn check_webhook(
    reader: &Reader,
    config: &Config,
    section: &str,
    destination: &Webhook,
    retry: &RetrySchedule,
) {
    let key = |key: &str| join(section, key);
    let retry_key = |key: &str| join(&join(section, "retry"), key);
    if config.lease.duration <= destination.timeout * 2 {
        let advice = format!(
            "it must be less than half of lease.duration_ms ({}), or a worker could lose a batch while it \
             waits for an answer",
            config.lease.duration.as_millis()
        );
        let found = destination.timeout.as_millis();
        reader.conflict(&key("timeout_ms"), "lease.duration_ms", &found, advice);
    }
    if destination.connect_timeout > destination.timeout {
        let found = destination.connect_timeout.as_millis();
        let advice = "it is a part of timeout_ms and can't be longer";
        reader.conflict(&key("connect_timeout_ms"), &key("timeout_ms"), &found, advice);
    }
    if destination.max_retry_after > retry.max_age {
        let found = destination.max_retry_after.as_secs();
        let advice = "a message would be given up before it is tried again: it must not be above max_age_s";
        reader.conflict(&retry_key("max_retry_after_s"), &retry_key("max_age_s"), &found, advice);
    }
}

fn check_table(reader: &Reader, config: &Config, section: &str, table: &Table) {
    let names = config.warehouses.iter().map(|warehouse| &warehouse.name);
    check_name(reader, &join(section, "warehouse"), "warehouse", &table.warehouse, names);
    if let Some(warehouse) = config.warehouse(&table.warehouse)
        && config.lease.duration <= warehouse.statement_timeout * 2
    {
        let key = join(&join("warehouses", &warehouse.name), "statement_timeout_ms");
        let advice = format!(
            "it must be less than half of lease.duration_ms ({}), or a worker could lose a batch while it \
             waits for a statement",
            config.lease.duration.as_millis()
        );
        reader.conflict(&key, "lease.duration_ms", &warehouse.statement_timeout.as_millis(), advice);
    }
}

/// Notes a name that is none of `names`, with the one that may have been meant.
fn check_name<'a>(
    reader: &Reader,
    key: &str,
    what: &str,
    name: &str,
    names: impl Iterator<Item = &'a String> + Clone,
) {
    if names.clone().any(|known| known == name) || name.is_empty() {
        return;
    }
    let nearest = names
        .map(|known| (strsim::jaro_winkler(known, name), known))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|(a, _), (b, _)| a.total_cmp(b));
    let advice = match nearest {
        Some((_, nearest)) => format!("there is no such {what}; did you mean {nearest:?}?"),
        None => format!("there is no such {what}: add [{what}s.{name}]"),
    };
    reader.note(key, Some(shown_text(name)), advice);
}

fn check_receipts(reader: &Reader, config: &Config) {
    let receipts = &config.receipts;
    let destinations = || config.destinations.iter().map(|destination| &destination.name);
    let (mut directories, mut queues) = (BTreeMap::new(), BTreeMap::new());
    for source in &receipts.sources {
        let section = join("receipts.sources", &source.name);
        let key = |key: &str| join(&section, key);
        check_name(reader, &key("destination"), "destination", &source.destination, destinations());
        let destination = config.destination(&source.destination);
        if destination.is_some_and(|destination| destination.table().is_some()) {
            let advice = "it is a table, which sends no receipts: name a webhook";
            reader.note(&key("destination"), Some(shown_text(&source.destination)), advice);
        } else if source.mapping.message_id.is_none()
            && source.mapping.provider_id.is_some()
            && destination.and_then(|known| known.webhook()).is_some_and(|known| known.provider_id.is_none())
        {
            let advice = format!(
                "receipts name the provider's id only, and [destinations.{}] does not keep it: set provider_id there",
                source.destination
            );
            reader.note(&join(&key("fields"), "provider_id"), None, advice);
        }
        match &source.kind {
            SourceKind::Http(_) if receipts.listen.is_none() => {
                let advice =
                    "write where to listen, such as \"127.0.0.1:8081\": a source of kind = \"http\" needs it";
                reader.note("receipts.listen", None, advice);
            }
            SourceKind::Directory(directory) => {
                let path = &directory.path;
                let feed = config
                    .feeds
                    .iter()
                    .find(|feed| feed.directory().is_some_and(|other| overlap(path, &other.path)));
                if let Some(feed) = feed {
                    let advice =
                        format!("it and the directory of the feed {} must not contain each other", feed.name);
                    reader.conflict(&key("path"), &key_of(feed, "path"), &path.display(), advice);
                }
                if overlap(path, &config.state.dir) {
                    let advice = "it and state.dir must not contain each other";
                    reader.conflict(&key("path"), "state.dir", &path.display(), advice);
                }
                if let Some(other) = directories.insert(path.clone(), &source.name) {
                    let advice = format!("the source {other} watches that directory too: give each its own");
                    let other = join(&join("receipts.sources", other), "path");
                    reader.conflict(&key("path"), &other, &path.display(), advice);
                }
            }
            SourceKind::Sqs(sqs) => {
                let name = sqs.queue.name();
                let feed = config
                    .feeds
                    .iter()
                    .find(|feed| feed.queue().is_some_and(|other| other.queue.name() == name));
                let other = feed.map(|feed| queue_key(reader, feed)).or_else(|| {
                    let other = queues.insert(name.to_owned(), &source.name)?;
                    Some(join(&join("receipts.sources", other), "queue_name"))
                });
                if let Some(other) = other.filter(|_| !name.is_empty()) {
                    let advice =
                        "its entries are taken there too, and each would get some of them: give each its own";
                    reader.conflict(&key("queue_name"), &other, &shown_text(name), advice);
                }
            }
            SourceKind::Http(_) | SourceKind::Cloudwatch(_) => {}
        }
    }
    if let Some(name) = &receipts.events_to {
        check_name(reader, "receipts.events_to", "destination", name, destinations());
        if receipts.sources.iter().any(|source| source.destination == *name) {
            let advice = "receipts of that destination would make events about events: name another";
            reader.note("receipts.events_to", Some(shown_text(name)), advice);
        }
        if config.feed(STATUS_FEED).is_some() {
            let advice = format!(
                "with receipts.events_to the feed {STATUS_FEED:?} is Postrider's own: rename this one"
            );
            reader.conflict(&join("feeds", STATUS_FEED), "receipts.events_to", &shown_text(name), advice);
        }
    }
    if config.outbox.kind != OutboxKind::Embedded
        && config.ledger.kind == LedgerKind::Embedded
        && !receipts.sources.is_empty()
    {
        let advice = "several machines share the outbox, and receipts have to be found by all of them: set \
                      ledger.kind = \"postgres\"";
        reader.conflict("ledger.kind", "receipts.sources", &"\"embedded\"", advice);
    }
    if let Some(retention) = config.ledger.retention {
        let oldest = config.destinations.iter().map(|known| known.retry.max_age).max().unwrap_or_default();
        let least = oldest + receipts.timeout.max(receipts.park);
        if retention < least {
            let advice = format!(
                "write 0 to keep rows, or {} and more: a message may be retried and wait for its receipt so long",
                least.as_secs()
            );
            reader.conflict("ledger.retention_s", "receipts.timeout_s", &retention.as_secs(), advice);
        }
    }
}

fn check_feed(reader: &Reader, config: &Config, feed: &Feed) {
    for (index, name) in feed.destinations.iter().enumerate() {
        let names = config.destinations.iter().map(|destination| &destination.name);
        let key = format!("{}[{index}]", key_of(feed, "destinations"));
        check_name(reader, &key, "destination", name, names);
    }
    if config.batch.max_bytes < feed.max_row_bytes {
        let advice = format!(
            "a row must fit into a batch: at most batch.max_bytes ({}), or raise that",
            config.batch.max_bytes
        );
        reader.conflict(&key_of(feed, "max_row_bytes"), "batch.max_bytes", &feed.max_row_bytes, advice);
    }
}

fn check_directory(reader: &Reader, config: &Config, feed: &Feed, directory: &DirectoryFeed) {
    let path = &directory.path;
    if overlap(path, &config.state.dir) {
        let advice = format!(
            "it and state.dir ({}) must not contain each other: what is dropped and what Postrider keeps \
             would mix",
            config.state.dir.display()
        );
        reader.conflict(&key_of(feed, "path"), "state.dir", &path.display(), advice);
    }
    for other in config.feeds.iter().filter(|other| other.name != feed.name) {
        let Some(theirs) = other.directory() else { continue };
        // Finished files go to `done` and `failed` in the feed's own directory.
        if ["done", "failed"].iter().any(|name| path.starts_with(theirs.path.join(name))) {
            let advice =
                format!("the feed {} puts its finished files there: choose another directory", other.name);
            reader.conflict(&key_of(feed, "path"), &key_of(other, "path"), &path.display(), advice);
        }
    }
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}
