use std::{net::SocketAddr, time::Duration};

use postrider_actors::model::alarm::AlarmRule;

use super::super::{
    Alarms, FailuresAlarm, Ops, Outbox,
    reader::{Reader, Section},
    tree::shown_text,
};

/// Names that the ops server answers to: a few spellings of one machine.
const HOSTS_MAX: usize = 16;

/// Reads `listen`: an address, or nowhere.
pub(super) fn listen(reader: &Reader, section: &mut Section<'_>) -> Option<SocketAddr> {
    let text = section.text("listen").unwrap_or_default();
    match text.trim() {
        "" => None,
        address => {
            let parsed = address.parse().ok();
            if parsed.is_none() {
                let advice = "write an IP address and a port, such as \"127.0.0.1:9464\", or \"\"";
                reader.note(&section.key("listen"), Some(shown_text(&text)), advice);
            }
            parsed
        }
    }
}

/// Reads `[ops]`.
pub(super) fn ops(reader: &Reader, mut section: Section<'_>) -> Ops {
    let listen = listen(reader, &mut section);
    let hosts = section.list("allowed_hosts", true).unwrap_or_default();
    if hosts.len() > HOSTS_MAX {
        let advice = format!("keep to {HOSTS_MAX} names");
        reader.note(&section.key("allowed_hosts"), Some(hosts.len().to_string()), advice);
    }
    let allowed_hosts = hosts
        .into_iter()
        .take(HOSTS_MAX)
        .filter_map(|(path, name)| {
            let is_name = (1..=253).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
                || name.parse::<std::net::Ipv6Addr>().is_ok();
            if !is_name {
                reader.note(&path, Some(shown_text(&name)), "write a host name or an address, without port");
            }
            is_name.then(|| name.to_ascii_lowercase())
        })
        .collect();
    section.finish();
    Ops { listen, allowed_hosts }
}

/// What all alarms share about clearing.
#[derive(Clone, Copy)]
struct Clearing {
    fraction: f64,
    after: Duration,
}

impl Clearing {
    fn rule(self, threshold: u64, raise_after: Duration) -> AlarmRule {
        let threshold = threshold as f64;
        AlarmRule { threshold, clear_at: threshold * self.fraction, raise_after, clear_after: self.after }
    }
}

/// Reads `[alarms]`.
pub(super) fn alarms(reader: &Reader, mut section: Section<'_>, outbox: &Outbox) -> Alarms {
    let clearing = Clearing {
        fraction: f64::from(section.integer("clear_percent", 1..=100u32, "per cent")) / 100.0,
        after: section.seconds("clear_after_s", 0..=86_400),
    };
    let alarms = Alarms {
        depth: depth(reader, section.section("depth"), clearing, outbox),
        failures: failures(section.section("failures"), clearing),
        latency: latency(section.section("latency"), clearing),
        dead: dead(section.section("dead")),
    };
    section.finish();
    alarms
}

fn depth(
    reader: &Reader,
    mut section: Section<'_>,
    clearing: Clearing,
    outbox: &Outbox,
) -> Option<AlarmRule> {
    let enabled = section.boolean("enabled");
    let mut max = section.integer("max_messages", 0..=1_000_000_000u64, "messages");
    if !reader.is_set(&section.key("max_messages")) {
        // Above the watermark it could never be.
        max = max.min(outbox.high_watermark / 4 * 3);
    }
    let rule = clearing.rule(max, section.seconds("raise_after_s", 0..=86_400));
    section.finish();
    enabled.then_some(rule)
}

fn failures(mut section: Section<'_>, clearing: Clearing) -> Option<FailuresAlarm> {
    let enabled = section.boolean("enabled");
    let max = section.integer("max_percent", 0..=100u64, "per cent");
    let alarm = FailuresAlarm {
        window: section.seconds("window_s", 1..=3600),
        min_attempts: section.integer("min_attempts", 1..=1_000_000u64, "attempts"),
        rule: clearing.rule(max, section.seconds("raise_after_s", 0..=86_400)),
    };
    section.finish();
    enabled.then_some(alarm)
}

fn latency(mut section: Section<'_>, clearing: Clearing) -> Option<AlarmRule> {
    let enabled = section.boolean("enabled");
    let max = section.integer("max_s", 0..=2_592_000u64, "seconds");
    let rule = clearing.rule(max, section.seconds("raise_after_s", 0..=86_400));
    section.finish();
    enabled.then_some(rule)
}

fn dead(mut section: Section<'_>) -> Option<(AlarmRule, Duration)> {
    let enabled = section.boolean("enabled");
    let max = section.integer("max_messages", 0..=1_000_000_000u64, "messages");
    let window = section.seconds("window_s", 1..=3600);
    section.finish();
    // The window is its hysteresis: one that was given up is looked at for as long.
    let now = Duration::ZERO;
    let threshold = max as f64;
    let rule = AlarmRule { threshold, clear_at: threshold, raise_after: now, clear_after: now };
    enabled.then_some((rule, window))
}
