//! Where receipts come from.

use std::time::Duration;

use crate::{
    declare::{duration, given, integer, unset},
    reader::{Need, Section},
    tree::shown_text,
};

crate::settings! {
    /// Log groups.
    CloudwatchSource {
        /// kind = "cloudwatch": log groups, 1 to 32.
        log_groups: Vec<String> = unset("[\"sns/eu-central-1/123456789012/DirectPublishToPhoneNumber\"]", log_groups);
        /// The filter pattern of CloudWatch Logs; "" = every event.
        filter: Option<String> = given("\"\"", filter);
        /// Calls per second to all of its log groups together. Those of several sources add up. AWS allows 5 to 25 per
        /// account and region.
        calls_per_s: u32 = integer(2, 1..=1_000, "calls per second");
        /// How often it polls.
        poll: Duration = duration("60s", "1s"..="1h");
        /// How far each poll overlaps the one before it, because events come late.
        overlap: Duration = duration("5m", "0s"..="1d");
        /// How far back the very first poll starts.
        start: Duration = duration("1h", "0s"..="30d");
    }
}

fn filter(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    section.text(key).filter(|filter| !filter.is_empty())
}

/// Log groups of one source: each is asked by itself.
const GROUPS_MAX: usize = 32;

fn log_groups(section: &mut Section<'_>, key: &'static str) -> Vec<String> {
    let reader = section.reader();
    let items = section.list(key, true).unwrap_or_default();
    if section.need == Need::Required && (items.is_empty() || items.len() > GROUPS_MAX) {
        let advice = format!("name 1 to {GROUPS_MAX} log groups");
        reader.note(&section.key(key), Some(items.len().to_string()), advice);
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
    groups
}
