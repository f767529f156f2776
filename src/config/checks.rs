//! What must hold between settings that are each fine on their own.

use std::{collections::BTreeMap, path::Path};

use super::{Config, Destination, Feed, reader::Reader, tree::join, tree::shown_text};

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
    let mut directories = BTreeMap::new();
    for feed in &config.feeds {
        check_feed(reader, config, feed);
        if let Some(other) = directories.insert(feed.path.as_path(), feed.name.as_str()) {
            let advice = format!("the feed {other} watches that directory too: give each its own");
            let other = join(&join("feeds", other), "path");
            reader.conflict(&key_of(feed, "path"), &other, &feed.path.display(), advice);
        }
    }
}

fn key_of(feed: &Feed, key: &str) -> String {
    join(&join("feeds", &feed.name), key)
}

fn check_destination(reader: &Reader, config: &Config, destination: &Destination) {
    let section = join("destinations", &destination.name);
    let key = |key: &str| join(&section, key);
    let retry_key = |key: &str| join(&join(&section, "retry"), key);

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
    let retry = &destination.retry;
    if retry.base > retry.cap {
        let advice = "it must not be below base_ms";
        reader.conflict(&retry_key("cap_ms"), &retry_key("base_ms"), &retry.cap.as_millis(), advice);
    }
    if retry.base > retry.max_age {
        let advice = "the first retry would come after max_age_s: shorten it";
        reader.conflict(&retry_key("base_ms"), &retry_key("max_age_s"), &retry.base.as_millis(), advice);
    }
    if destination.max_retry_after > retry.max_age {
        let found = destination.max_retry_after.as_secs();
        let advice = "a message would be given up before it is tried again: it must not be above max_age_s";
        reader.conflict(&retry_key("max_retry_after_s"), &retry_key("max_age_s"), &found, advice);
    }
}

fn check_feed(reader: &Reader, config: &Config, feed: &Feed) {
    for (index, name) in feed.destinations.iter().enumerate() {
        if config.destination(name).is_some() {
            continue;
        }
        let nearest = config
            .destinations
            .iter()
            .map(|destination| (strsim::jaro_winkler(&destination.name, name), &destination.name))
            .filter(|(similarity, _)| *similarity > 0.7)
            .max_by(|(a, _), (b, _)| a.total_cmp(b));
        let advice = match nearest {
            Some((_, nearest)) => format!("there is no such destination; did you mean {nearest:?}?"),
            None => format!("there is no such destination: add [destinations.{name}]"),
        };
        reader.note(&format!("{}[{index}]", key_of(feed, "destinations")), Some(shown_text(name)), advice);
    }
    if config.batch.max_bytes < feed.max_row_bytes {
        let advice = format!(
            "a row must fit into a batch: at most batch.max_bytes ({}), or raise that",
            config.batch.max_bytes
        );
        reader.conflict(&key_of(feed, "max_row_bytes"), "batch.max_bytes", &feed.max_row_bytes, advice);
    }
    if overlap(&feed.path, &config.state.dir) {
        let advice = format!(
            "it and state.dir ({}) must not contain each other: what is dropped and what Postrider keeps \
             would mix",
            config.state.dir.display()
        );
        reader.conflict(&key_of(feed, "path"), "state.dir", &feed.path.display(), advice);
    }
    for other in &config.feeds {
        // Finished files go to `done` and `failed` in the feed's own directory.
        let is_outcome = ["done", "failed"].iter().any(|name| feed.path.starts_with(other.path.join(name)));
        if is_outcome && feed.name != other.name {
            let advice =
                format!("the feed {} puts its finished files there: choose another directory", other.name);
            reader.conflict(&key_of(feed, "path"), &key_of(other, "path"), &feed.path.display(), advice);
        }
    }
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}
