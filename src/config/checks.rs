//! What must hold between settings that are each fine on their own.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use postrider_actors::model::{
    address::{AddressGuard, RefusedAddress},
    body::{BodyTemplate, is_json},
    builder::batch_bytes,
    formats::Format,
    order::OrderingKey,
    receipt_format::SAME_PATH,
};
use postrider_settings::{DEAD_LETTERS, Reader, join, show_duration, show_size, shown_text};
use url::Host;

use super::{
    Config, DelayMode, Destination, DirectoryFeed, Feed, FeedSource, LedgerKind, Profile, QueueFeed, Retry,
    STATUS_FEED, SourceKind, Table, TemplateSource, Webhook, destination::TEMPLATE_BYTES_MAX,
};
use crate::{
    built_in::{Engine, Engines},
    events::EventBodies,
};

/// The largest item of a table (Amazon DynamoDB, "Constraints": 400 KB, names of attributes included).
const DYNAMODB_ITEM_BYTES_MAX: usize = 400 << 10;
/// What an item holds beside rows and template: ids, names, times, the names of columns.
const DYNAMODB_ITEM_BYTES_REST: usize = 16 << 10;
/// The shortest retention: a queue that delivers an entry twice does so within minutes, unless its
/// consumer held it for longer.
const RETENTION_MIN: Duration = Duration::from_hours(1);

/// Notes every contradiction, and what needs an engine that is not built in.
pub(super) fn check(reader: &Reader, config: &Config, built_in: Engines) {
    check_build(reader, config, built_in);
    for destination in &config.destinations {
        check_destination(reader, config, destination);
    }
    for (feed, destination, webhook) in config.uses_of_webhooks() {
        if let TemplateSource::Inline(source) = &webhook.template
            && let Some(why) = unfit_template(feed, source, webhook)
        {
            reader.note(&join(&join("destinations", &destination.name), "template"), None, why);
        }
        let is_text = feed.directory().is_some_and(|directory| directory.format == Format::Text);
        if let Some(OrderingKey::Column(column)) = webhook.order().filter(|_| is_text) {
            let key = join(&join("destinations", &destination.name), "ordering_key");
            let advice = format!("the feed {} is text, which has no columns: remove it", feed.name);
            reader.note(&key, Some(shown_text(&column)), advice);
        }
    }
    check_engines(reader, config);
    check_events(reader, config);
    check_receipts(reader, config);
    check_ops(reader, config);
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
                reader.conflict(&key_of(feed, "queue"), &key_of(other, "queue"), &shown_text(name), advice);
            }
        }
    }
}

/// Why no file of a feed can be rendered by a template, as far as that is known without one (F67). What can't be compiled
/// was noted before.
pub(super) fn unfit_template(feed: &Feed, source: &str, webhook: &Webhook) -> Option<String> {
    let format = match &feed.source {
        FeedSource::Directory(directory) => directory.format.clone(),
        FeedSource::Queue(queue) => Format::Ndjson { recipient: queue.recipient.clone() },
    };
    let template = BodyTemplate::compile(Some(source), &webhook.content_type).ok()?;
    if webhook.bundle.is_some() && webhook.results.is_some() && !template.names_its_message() {
        return Some(
            "`results` names messages by their ids, and its bodies have none: print {{ id }}".to_owned(),
        );
    }
    let why = template.check_for(&format, &webhook.content_type).err()?;
    Some(format!("it can't be used for the feed {}: {why}", feed.name))
}

/// Notes each setting that needs an engine this binary was built without.
fn check_build(reader: &Reader, config: &Config, built_in: Engines) {
    let need = |key: &str, word: &str, engines: &[Engine]| {
        if let Some(advice) = built_in.missing(engines) {
            reader.note(key, Some(shown_text(word)), advice + ", or remove the setting");
        }
    };
    if config.profile == Profile::Aws {
        need("profile", "aws", &[Engine::Sqs, Engine::Dynamodb]);
    }
    if config.ledger.kind == LedgerKind::Postgres {
        need("ledger.kind", "postgres", &[Engine::Postgres]);
    }
    for feed in config.feeds.iter().filter(|feed| feed.queue().is_some()) {
        need(&key_of(feed, "kind"), "sqs", &[Engine::Sqs]);
    }
    for source in &config.receipt_sources {
        let key = join(&join("receipts.sources", &source.name), "kind");
        match &source.kind {
            SourceKind::Sqs(_) => need(&key, "sqs", &[Engine::Sqs]),
            SourceKind::Cloudwatch(_) => need(&key, "cloudwatch", &[Engine::Cloudwatch]),
            SourceKind::Directory(_) | SourceKind::Http(_) => {}
        }
    }
    for warehouse in &config.warehouses {
        need(&join("warehouses", &warehouse.name), &warehouse.name, &[Engine::Warehouse]);
    }
    for destination in config.destinations.iter().filter(|destination| destination.table().is_some()) {
        need(&join(&join("destinations", &destination.name), "kind"), "table", &[Engine::Warehouse]);
    }
}

/// Whoever is on call hears of it by a webhook, whose template has to be one for events.
fn check_events(reader: &Reader, config: &Config) {
    let Some(name) = &config.alarms.events.events_to else { return };
    let names = config.destinations.iter().map(|destination| &destination.name);
    check_name(reader, EVENTS_TO, "destination", name, names);
    let Some(destination) = config.destination(name) else { return };
    let Some(webhook) = destination.webhook() else {
        let advice = "it is a table: name a webhook";
        return reader.note(EVENTS_TO, Some(shown_text(name)), advice);
    };
    if let TemplateSource::Inline(source) = &webhook.template
        && let Some(why) = unfit_for_events(name, source, webhook)
    {
        reader.note(&join(&join("destinations", name), "template"), None, why);
    }
}

/// The key that names who hears of alarms and files.
const EVENTS_TO: &str = "alarms.events_to";

/// Why events can't be rendered by a template. What can't be compiled was noted before.
pub(super) fn unfit_for_events(name: &str, source: &str, webhook: &Webhook) -> Option<String> {
    let bodies = EventBodies::new(name, Some(source), &webhook.content_type).ok()?;
    let why = bodies.check().err()?;
    Some(format!("{EVENTS_TO} names this destination, and {why}; give events a destination of their own"))
}

/// Who is not on this machine has to prove who it is, and nobody on the way may read or change what it says (F56).
fn check_ops(reader: &Reader, config: &Config) {
    let ops = &config.ops;
    for (one, other) in [("tls_cert_file", "tls_key"), ("tls_key", "tls_cert_file")] {
        let (one, other) = (join("ops", one), join("ops", other));
        if reader.is_there(&one) && !reader.is_there(&other) {
            reader.note(&one, None, format!("set {other} too: a certificate is shown with its key"));
        }
    }
    let Some(address) = ops.listen.filter(|address| !address.ip().to_canonical().is_loopback()) else {
        return;
    };
    let has_token = ops.view_token.is_some() || ops.operate_token.is_some();
    let missing = match (has_token, ops.tls_cert_file.is_some()) {
        (true, true) => return,
        (false, true) => "set ops.operate_token, ops.view_token or both",
        (true, false) => "set ops.tls_cert_file and ops.tls_key",
        (false, false) => {
            "set ops.operate_token, ops.view_token or both, and ops.tls_cert_file and ops.tls_key"
        }
    };
    let advice =
        format!("other machines reach it there: {missing}, or listen at 127.0.0.1 behind a TLS proxy");
    reader.note("ops.listen", Some(shown_text(&address.to_string())), advice);
}

fn check_delay(reader: &Reader, config: &Config) {
    let word = match config.delay.mode {
        DelayMode::None => return,
        DelayMode::Fixed => "\"fixed\"",
        DelayMode::ByDepth => "\"by_depth\"",
    };
    if config.profile == Profile::Embedded {
        let advice = "only profile = \"aws\" delays entries: set it, or limit rate_per_s of the destination";
        reader.conflict("queue.delay.mode", "profile", &word, advice);
    } else if config.sqs.fifo {
        let advice = "a FIFO queue has no delay per entry (Amazon SQS API reference, SendMessage): use \
                      standard queues, or limit rate_per_s of the destination";
        reader.conflict("queue.delay.mode", "queue.sqs.fifo", &word, advice);
    }
}

fn check_engines(reader: &Reader, config: &Config) {
    let outbox = &config.outbox;
    if let Some(found) = outbox.retention.filter(|retention| *retention < RETENTION_MIN) {
        let advice = format!("write \"0s\" to keep batches, or {} and more", show_duration(RETENTION_MIN));
        reader.conflict("outbox.retention", "outbox.retention", &show_duration(found), advice);
    }
    check_delay(reader, config);
    if config.profile == Profile::Embedded {
        return;
    }
    for destination in &config.destinations {
        let name = &destination.name;
        if name == DEAD_LETTERS {
            let advice =
                "its queue would be that of the entries that nobody can read: call it something else";
            reader.conflict(&join("destinations", name), "queue.sqs.prefix", &shown_text(name), advice);
        }
    }
    let names = config.destinations.iter().map(|destination| destination.name.as_str());
    let longest = names.chain([DEAD_LETTERS]).max_by_key(|name| name.len()).unwrap_or(DEAD_LETTERS);
    if !config.sqs.has_room_for(longest) {
        let queue = config.sqs.queue_name(longest);
        let advice = format!(
            "a queue would be called {queue:?}, which is longer than the 80 characters that SQS allows: shorten the \
             prefix or the destination's name"
        );
        reader.conflict("queue.sqs.prefix", "queue.sqs.prefix", &shown_text(&config.sqs.prefix), advice);
    }
    // What changes of a batch is in its record, which has room for the worst; only its payload depends on settings.
    let webhooks = config.destinations.iter().filter_map(Destination::webhook);
    let template = webhooks.map(|known| match &known.template {
        TemplateSource::Default => 0,
        TemplateSource::Inline(source) => source.len(),
        TemplateSource::File(_) => TEMPLATE_BYTES_MAX,
    });
    let others = template.max().unwrap_or(0) + DYNAMODB_ITEM_BYTES_REST;
    for feed in &config.feeds {
        let rows = batch_bytes(feed.max_row);
        if rows + others > DYNAMODB_ITEM_BYTES_MAX {
            let advice = format!(
                "an item of DynamoDB holds {DYNAMODB_ITEM_BYTES_MAX} bytes; the rows of a batch may take {rows} of \
                 them, the template and the rest {others}: lower max_row"
            );
            let found = show_size(feed.max_row as u64);
            reader.conflict(&key_of(feed, "max_row"), "profile", &found, advice);
        }
    }
}

fn key_of(feed: &Feed, key: &str) -> String {
    join(&join("feeds", &feed.name), key)
}

fn check_queue(reader: &Reader, config: &Config, feed: &Feed, queue: &QueueFeed) {
    if queue.visibility <= queue.linger * 2 {
        let found = show_duration(queue.visibility);
        let advice = "it must be more than twice linger, or entries come again while they wait for others";
        reader.conflict(&key_of(feed, "visibility"), &key_of(feed, "linger"), &found, advice);
    }
    if queue.max_size < feed.max_row {
        let advice = format!("a row must fit into it: at least max_row ({})", show_size(feed.max_row as u64));
        let found = show_size(queue.max_size as u64);
        reader.conflict(&key_of(feed, "max_size"), &key_of(feed, "max_row"), &found, advice);
    }
    if config.profile == Profile::Aws {
        let name = queue.queue.name();
        let names = config.destinations.iter().map(|destination| destination.name.as_str());
        if names.chain([DEAD_LETTERS]).any(|own| config.sqs.queue_name(own) == name) {
            let advice = "that queue is one of Postrider's own ([queue.sqs]): give the feed its own";
            reader.conflict(&key_of(feed, "queue"), "queue.sqs.prefix", &shown_text(name), advice);
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
        let advice = "it must not be below base";
        reader.conflict(&retry_key("cap"), &retry_key("base"), &show_duration(retry.cap), advice);
    }
    if retry.base > retry.max_age {
        let advice = "the first retry would come after max_age: shorten it";
        reader.conflict(&retry_key("base"), &retry_key("max_age"), &show_duration(retry.base), advice);
    }
}

fn check_webhook(reader: &Reader, config: &Config, section: &str, destination: &Webhook, retry: &Retry) {
    let key = |key: &str| join(section, key);
    let retry_key = |key: &str| join(&join(section, "retry"), key);
    if config.lease.duration <= destination.timeout * 2 {
        let advice = format!(
            "it must be less than half of lease.duration ({}), or a worker could lose a batch while it \
             waits for an answer",
            show_duration(config.lease.duration)
        );
        reader.conflict(&key("timeout"), "lease.duration", &show_duration(destination.timeout), advice);
    }
    for (one, other) in [("client_cert_file", "client_key"), ("client_key", "client_cert_file")] {
        if reader.is_there(&key(one)) && !reader.is_there(&key(other)) {
            reader.note(&key(one), None, format!("set {other} too: a certificate is shown with its key"));
        }
    }
    let own = destination.headers.iter().any(|header| header.name == "authorization");
    let ways = [
        ("basic", destination.basic.is_some()),
        ("bearer", destination.bearer.is_some()),
        ("headers.authorization", own),
    ];
    let ways: Vec<_> = ways.into_iter().filter_map(|(way, is_set)| is_set.then_some(way)).collect();
    if let [one, other, ..] = ways[..] {
        reader.note(
            &key(one),
            None,
            format!("{other} is set too, and a request has one authorization: keep one"),
        );
    }
    check_bundle(reader, config, section, destination);
    check_ordering(reader, config, section, destination);
    if let Some(refused) = refused_address(destination) {
        // The address may be written in another way, and the rest of the URL may be secret: only the address is shown.
        reader.conflict(&key("url"), &key("allow"), &refused.address, refused.to_string());
    }
    if retry.max_retry_after > retry.max_age {
        let found = show_duration(retry.max_retry_after);
        let advice = "a message would be given up before it is tried again: it must not be above max_age";
        reader.conflict(&retry_key("max_retry_after"), &retry_key("max_age"), &found, advice);
    }
}

/// A bundle is a JSON array of messages of one batch, and an answer can only speak of what it can name.
fn check_bundle(reader: &Reader, config: &Config, section: &str, destination: &Webhook) {
    let key = |key: &str| join(section, key);
    let Some(bundle) = destination.bundle else {
        if reader.is_own(&key("results")) {
            reader.note(&key("results"), None, "it speaks of the messages of a bundle: set `bundle` too");
        }
        return;
    };
    if bundle > config.batch.max_messages as usize {
        let advice = format!(
            "a bundle has messages of one batch: at most batch.max_messages ({})",
            config.batch.max_messages
        );
        reader.conflict(&key("bundle"), "batch.max_messages", &bundle, advice);
    }
    if !is_json(&destination.content_type) {
        let advice = "bodies are put into a JSON array: with `bundle` it must be JSON";
        let found = shown_text(&destination.content_type);
        reader.conflict(&key("content_type"), &key("bundle"), &found, advice);
    }
    if destination.provider_id.is_some() && destination.results.is_none() {
        let advice =
            "the answer to a bundle has an id for each message in its `results`: set that too, or remove it";
        reader.note(&key("provider_id"), None, advice);
    }
}

/// An order is kept by one process, of what it can see.
fn check_ordering(reader: &Reader, config: &Config, section: &str, destination: &Webhook) {
    let key = |key: &str| join(section, key);
    if destination.order().is_none() {
        if reader.is_own(&key("ordering_key")) {
            let advice = "nothing is ordered by it: set ordering = \"per_key\" too";
            reader.note(&key("ordering_key"), None, advice);
        }
    } else if config.profile == Profile::Aws {
        let advice = "several machines take batches of one destination, and none knows what the others have in flight: \
                      remove it, or set profile = \"embedded\"";
        reader.conflict(&key("ordering"), "profile", &"\"per_key\"", advice);
    }
}

/// The address that is written in the URL, if the guard refuses it (F54). Other names are known only when they are
/// looked up.
fn refused_address(destination: &Webhook) -> Option<RefusedAddress> {
    let guard = AddressGuard::new(destination.allow.clone());
    let refused = |address: IpAddr| guard.check(address).err();
    match destination.url.host()? {
        Host::Ipv4(address) => refused(address.into()),
        Host::Ipv6(address) => refused(address.into()),
        // RFC 6761, section 6.3: always the loopback.
        Host::Domain(name) if name.trim_end_matches('.') == "localhost" => {
            refused(Ipv4Addr::LOCALHOST.into()).filter(|_| refused(Ipv6Addr::LOCALHOST.into()).is_some())
        }
        Host::Domain(_) => None,
    }
}

fn check_table(reader: &Reader, config: &Config, section: &str, table: &Table) {
    let names = config.warehouses.iter().map(|warehouse| &warehouse.name);
    check_name(reader, &join(section, "warehouse"), "warehouse", &table.warehouse, names);
    if let Some(warehouse) = config.warehouse(&table.warehouse)
        && config.lease.duration <= warehouse.statement_timeout * 2
    {
        let key = join(&join("warehouses", &table.warehouse), "statement_timeout");
        let advice = format!(
            "it must be less than half of lease.duration ({}), or a worker could lose a batch while it \
             waits for a statement",
            show_duration(config.lease.duration)
        );
        reader.conflict(&key, "lease.duration", &show_duration(warehouse.statement_timeout), advice);
    }
}

/// Notes a name that is not one of `names`, with the one that may have been meant.
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
        Some((_, nearest)) => format!("unknown {what}; did you mean {nearest:?}?"),
        None => format!("unknown {what}: add [{what}s.{name}]"),
    };
    reader.note(key, Some(shown_text(name)), advice);
}

fn check_receipts(reader: &Reader, config: &Config) {
    let receipts = &config.receipts;
    let destinations = || config.destinations.iter().map(|destination| &destination.name);
    let (mut directories, mut queues, mut secrets) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for source in &config.receipt_sources {
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
        if let Some((path, field)) =
            source.mapping.event_id.as_ref().and_then(|path| Some((path, source.mapping.field_of(path)?)))
        {
            let fields = key("fields");
            let advice = format!("{field} is the same: {SAME_PATH}");
            reader.conflict(
                &join(&fields, "event_id"),
                &join(&fields, field),
                &shown_text(path.as_str()),
                advice,
            );
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
                let other = feed.map(|feed| key_of(feed, "queue")).or_else(|| {
                    let other = queues.insert(name.to_owned(), &source.name)?;
                    Some(join(&join("receipts.sources", other), "queue"))
                });
                if let Some(other) = other.filter(|_| !name.is_empty()) {
                    let advice =
                        "its entries are taken there too, and each would get some of them: give each its own";
                    reader.conflict(&key("queue"), &other, &shown_text(name), advice);
                }
            }
            SourceKind::Http(_) | SourceKind::Cloudwatch(_) => {}
        }
        for secret in source.secrets() {
            // F55
            let other =
                secrets.insert(secret.to_string(), &source.name).filter(|other| *other != &source.name);
            if let Some(other) = other {
                let theirs = join(&join("receipts.sources", other), "secrets");
                reader.conflict(
                    &key("secrets"),
                    &theirs,
                    &shown_text(&secret.to_string()),
                    shared_secret(other),
                );
            }
        }
    }
    if let Some(name) = &receipts.events_to {
        check_name(reader, "receipts.events_to", "destination", name, destinations());
        if config.receipt_sources.iter().any(|source| source.destination == *name) {
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
    if config.profile == Profile::Aws
        && config.ledger.kind == LedgerKind::Embedded
        && !config.receipt_sources.is_empty()
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
                "write \"0s\" to keep rows, or {} and more: a message may be retried and wait for its receipt so long",
                show_duration(least)
            );
            reader.conflict("ledger.retention", "receipts.timeout", &show_duration(retention), advice);
        }
    }
}

/// Why no two sources may have the same secret.
pub(super) fn shared_secret(other: &str) -> String {
    format!(
        "the source {other} has it too: give each its own. A signature does not say for which source it was made, so \
         whoever records a request could send it to the other"
    )
}

fn check_feed(reader: &Reader, config: &Config, feed: &Feed) {
    for (index, name) in feed.destinations.iter().enumerate() {
        let names = config.destinations.iter().map(|destination| &destination.name);
        let key = format!("{}[{index}]", key_of(feed, "destinations"));
        check_name(reader, &key, "destination", name, names);
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
