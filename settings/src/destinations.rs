//! What all destinations have in common.

use std::time::Duration;

use crate::{
    declare::{duration, flag, integer},
    reader::{Reader, Section},
    secret::{SOURCES, SecretSource},
};

/// A rate and the burst it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Messages per second, at least 1.
    pub per_s: u32,
    /// Messages at once, at least 1.
    pub burst: u32,
}

impl Rate {
    /// `None` for 0 messages per second: no bound.
    pub fn new(per_s: u32, burst: u32) -> Option<Self> {
        (per_s > 0).then_some(Self { per_s, burst })
    }
}

crate::settings! {
    /// What all destinations have in common.
    Destination {
        /// Messages per second; 0 = no limit. Tables have the limits of their warehouse instead.
        rate_per_s: u32 = integer(0, 0..=10_000_000, "messages per second, 0 = no limit");
        /// Messages that may be sent at once when `rate_per_s` is set.
        burst: u32 = integer(50, 1..=10_000_000, "messages");
        /// Hold this destination's messages: they are accepted and wait.
        paused: bool = flag(false);
    }

    /// When a destination is paused because it is used wrongly.
    Storm {
        /// Percent of the last 500 attempts at a file's messages (20 at least) that may fail for good (4xx, redirects, bodies
        /// that can't be rendered) for a reason that the file did not have before. Above it the secret, the address or the
        /// template is likely wrong: the destination is disabled, its messages are held, and
        /// `postrider resume` goes on. 0 = never.
        percent: u8 = integer(20, 0..=100, "percent, 0 = never");
    }

    /// How waiting batches share the statements of a table (S4.2).
    Group {
        /// Rows per statement at most. Waiting batches share a statement.
        max_rows: usize = integer(5_000, 1..=100_000, "rows");
        /// The longest that a batch waits for others to fill a statement.
        linger: Duration = duration("500ms", "0s"..="1m");
    }

    /// When a failed attempt is retried.
    Retry {
        /// Attempts, the first included. Waits are drawn at random below their bound, so with these settings a
        /// message is tried for 14 hours on average and 28 at most: long enough for a night. At most 250, because a
        /// batch's record counts them in one byte per message; for a longer time raise `cap`.
        max_attempts: u32 = integer(40, 1..=250, "attempts, the first included");
        /// The age at which a message is given up.
        max_age: Duration = duration("3d", "1s"..="30d");
        /// The longest wait before the second attempt; doubled with each.
        base: Duration = duration("1s", "1ms"..="1h");
        /// The longest wait between two attempts.
        cap: Duration = duration("1h", "1ms"..="1d");
        /// The longest Retry-After that is honoured; at most `max_age`.
        max_retry_after: Duration = duration("1h", "0s"..="30d");
    }
}

impl Destination {
    /// The bound on messages per second, if there is one.
    pub fn rate(&self) -> Option<Rate> {
        Rate::new(self.rate_per_s, self.burst)
    }
}

/// Signing secrets, or tokens, of one destination or source: they make every request longer.
const SECRETS_MAX: usize = 8;

/// A list of places where secrets are kept.
pub fn secrets(section: &mut Section<'_>, key: &'static str) -> Vec<SecretSource> {
    let reader = section.reader();
    let items = section.list(key, false).unwrap_or_default();
    if items.len() > SECRETS_MAX {
        let advice = format!("at most {SECRETS_MAX} secrets");
        reader.note(&section.key(key), Some(items.len().to_string()), advice);
    }
    items.into_iter().filter_map(|(path, text)| source(reader, &path, &text)).collect()
}

/// The place where a secret is kept, if there is one.
pub fn optional_secret(section: &mut Section<'_>, key: &'static str) -> Option<SecretSource> {
    let text = section.private_text(key)?;
    source(section.reader(), &section.key(key), &text)
}

fn source(reader: &Reader, path: &str, text: &str) -> Option<SecretSource> {
    let source = SecretSource::parse(text).unwrap_or(Err(SOURCES));
    source.map_err(|advice| reader.note(path, None, advice)).ok()
}
