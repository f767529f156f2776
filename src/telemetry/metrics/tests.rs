use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
};

use postrider_actors::{
    model::{file::FileState, ledger::CountChange, time::UnixMs},
    testing::MemoryStore,
};
use postrider_sqlite::DATABASE;

use super::*;
use crate::telemetry::Metered;

/// A metric as the table documents it: type, labels, unit.
type DocumentedMetric = (String, BTreeSet<String>, String);

/// Metrics in which every family has a series; a state directory goes with them.
fn touched() -> (Metrics, tempfile::TempDir) {
    let metrics = Metrics::default();
    let dir = tempfile::tempdir().unwrap();
    for name in ["", "-wal"] {
        std::fs::write(dir.path().join(format!("{DATABASE}{name}")), "12345").unwrap();
    }
    metrics.watch_disk(dir.path());
    metrics.stages.feed("f").closed(&FileState::Ingested, UnixMs(1_000_000_000_000));
    let stages = &metrics.stages;
    drop((stages.feed("f"), stages.queue(), stages.leases_lost(), stages.gate("all").granted()));
    stages.ended("d", CountChange { unsent: 1, cancelled: 1, ..CountChange::default() });
    stages.gate("all").limit(NonZeroU32::new(1).into());
    drop((stages.restarts("parser", None), stages.destination("d").worker(1), stages.spans()));
    metrics.api.record("sqs", "SendMessageBatch", CallOutcome::Ok, Duration::from_millis(1), 10);
    metrics.capacity.add("t", Some("OutstandingAllTopics"), 0.5);
    metrics.backlog.open("d", Some(1));
    metrics.backlog.outstanding(Some(1));
    metrics.backlog.quarantined(Some(1));
    metrics.backlog.oldest(Some(Duration::from_secs(1)));
    metrics.backlog.queue(Some((1, 1)));
    let destination: Arc<str> = "d".into();
    metrics.backlog.entries(&[(destination.clone(), QueueDepth::default())]);
    let depth = DestinationDepth { destination, due: 1, waiting: 1, leased: 1 };
    metrics.backlog.messages("d", Some(&depth));
    metrics.store_call("outbox", "append");
    let receipts = &metrics.receipts;
    receipts.source("s").answered(200);
    receipts.source("s").behind(Some(Duration::from_secs(1)));
    drop(receipts.reconciler());
    receipts.sweeper().expired("d", 1);
    receipts.sweeper().waiting(Some(1));
    receipts.sweeper().parked(Some(1));
    metrics.alarm(AlarmKind::Depth, "d", Some(true));
    metrics.events("webhook");
    metrics.troubles("f", Some(&FeedTroubles::default()));
    (metrics, dir)
}

/// Every exported family, under the name that a query uses.
fn exported() -> BTreeMap<String, DocumentedMetric> {
    let text = touched().0.render(Format::OpenMetrics);
    let mut families: BTreeMap<String, DocumentedMetric> = BTreeMap::new();
    let mut units = BTreeMap::new();
    for line in text.lines() {
        if let Some(unit) = line.strip_prefix("# UNIT ") {
            let (name, unit) = unit.split_once(' ').unwrap();
            units.insert(name.to_owned(), unit.to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            families.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new(), String::new()));
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_once(['{', ' ']).unwrap();
            let family = families.iter_mut().rev().find(|(family, _)| name.starts_with(family.as_str()));
            let labels = rest.rsplit_once('}').map_or("", |(labels, _)| labels);
            let names = labels.split("\",").filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
            family.unwrap().1.1.extend(names.filter(|name| name != "le"));
        }
    }
    let full = |(name, mut row): (String, DocumentedMetric)| {
        row.2 = units.remove(&name).unwrap_or_default();
        let suffix = match row.0.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        (name + suffix, row)
    };
    families.into_iter().map(full).collect()
}

/// The table's rows: | `NAME` | type | labels | unit | meaning |
fn documented() -> BTreeMap<String, DocumentedMetric> {
    let text = include_str!("../../../docs/operations.md");
    let of_table = |line: &&str| ["| `postrider_", "| `process_"].iter().any(|start| line.starts_with(start));
    let rows = text.lines().filter(of_table);
    rows.map(|line| {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        assert!(cells.len() == 7 && !cells[5].is_empty(), "{line}");
        let labels = cells[3].split(',').map(|label| label.trim().trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        // What a counter counts is a unit for people, not one of OpenMetrics.
        let unit = Some(cells[4]).filter(|unit| matches!(*unit, "seconds" | "bytes")).unwrap_or_default();
        (cells[1].trim_matches('`').to_owned(), (cells[2].to_owned(), labels, unit.to_owned()))
    })
    .collect()
}

#[test]
fn every_metric_is_in_the_operators_table_as_it_is_exported() {
    assert_eq!(documented(), exported());
}

/// The metrics that queries name, without what histograms add.
fn named(queries: &str) -> BTreeSet<String> {
    let word = |at: usize| -> String {
        queries[at..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    };
    let is_start =
        |at: usize| !queries[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_');
    let starts = ["postrider_", "process_"].iter().flat_map(|start| queries.match_indices(start));
    let words = starts.filter(|(at, _)| is_start(*at)).map(|(at, _)| word(at));
    let family = |word: String| {
        let part = ["_bucket", "_sum", "_count"].iter().find_map(|part| word.strip_suffix(part));
        part.map_or(word.clone(), str::to_owned)
    };
    words.map(family).collect()
}

#[test]
fn the_dashboard_shows_metrics_that_exist_and_none_is_left_out_that_rules_ask_for() {
    let dashboard = include_str!("../../../config/grafana.json");
    let json: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    let panels = json["panels"].as_array().unwrap();
    let mut places = BTreeSet::new();
    let mut queries = String::new();
    for panel in panels {
        let place = &panel["gridPos"];
        assert!(places.insert((place["y"].as_u64(), place["x"].as_u64())), "two at one place: {panel}");
        assert!(panel["description"].as_str().is_some_and(|text| !text.is_empty()), "{}", panel["title"]);
        for target in panel["targets"].as_array().unwrap_or(&Vec::new()) {
            queries += target["expr"].as_str().unwrap();
            queries += "\n";
        }
    }
    let (shown, exported) = (named(&queries), exported());
    for name in &shown {
        assert!(exported.contains_key(name), "{name} does not exist");
    }
    for name in named(include_str!("../../../config/alerts.yml")) {
        assert!(shown.contains(&name), "a rule asks for {name}, and the dashboard does not show it");
    }
}

#[test]
fn the_older_format_has_the_same_samples() {
    let (metrics, _dir) = touched();
    let [new, old] = [Format::OpenMetrics, Format::Text].map(|format| metrics.render(format));
    let samples = |text: &str| -> Vec<String> {
        // What the machine does meanwhile is not in question: others write to the disk.
        let is_other =
            |line: &&str| ["#", "process_", "postrider_disk_"].iter().any(|start| line.starts_with(start));
        let of_us = |line: &&str| !is_other(line);
        text.lines().filter(of_us).map(str::to_owned).collect()
    };
    assert_eq!(samples(&new), samples(&old));
    assert!(!old.contains("# EOF") && !old.contains("# UNIT"));
    // A family is called as its samples are, or they are its parts.
    let types: BTreeMap<_, _> =
        old.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    for line in samples(&old) {
        let name = line.split(['{', ' ']).next().unwrap();
        let part = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let kind = types.get(name).or_else(|| types.get(part?));
        assert!(matches!(kind, Some(&("counter" | "gauge" | "histogram"))), "{line}: {kind:?}");
    }
    assert_eq!(Format::for_accept(None), Format::Text);
    assert_eq!(Format::for_accept(Some("text/plain;version=0.0.4;q=0.5,*/*;q=0.1")), Format::Text);
    let prometheus = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    assert_eq!(Format::for_accept(Some(prometheus)), Format::OpenMetrics);
}

#[test]
fn the_alert_rules_name_metrics_that_exist() {
    let rules = include_str!("../../../config/alerts.yml");
    let (named, exported) = (named(rules), exported());
    assert!(named.len() >= 5, "{named:?}");
    for name in named {
        assert!(exported.contains_key(&name), "{name} does not exist");
    }
    let (_, own) = rules.split_once("- name: postrider\n").expect("the group of the alarms inside");
    let own = own.split("- name: ").next().expect("there is always a first part");
    assert_eq!(own.matches("- alert: ").count(), AlarmKind::ALL.len());
}

#[test]
fn values_that_are_no_amount_are_left_out() {
    let metrics = Metrics::default();
    for units in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        metrics.capacity.add("t", None, units);
    }
    assert!(!metrics.render(Format::OpenMetrics).contains("consumed_capacity"));
    metrics.capacity.add("t", None, 1.5);
    metrics.capacity.add("t", None, 0.5);
    let text = metrics.render(Format::OpenMetrics);
    let line = "postrider_consumed_capacity_units_total{table=\"t\",index=\"\"} 2.0";
    assert!(text.contains(line), "{text}");
}

#[test]
fn label_values_can_not_forge_lines() {
    let metrics = Metrics::default();
    drop(metrics.stages.restarts("a\"} 1\nforged{x=\"", None));
    assert!(
        !metrics.render(Format::OpenMetrics).lines().any(|line| line.starts_with("forged")),
        "{}",
        metrics.render(Format::OpenMetrics)
    );
}

#[tokio::test]
async fn what_a_store_is_asked_and_what_it_refuses_is_counted() {
    use postrider_actors::ports::Outbox as _;
    let metrics = Metrics::default();
    let call = metrics.store_call("outbox", "append");
    for error in [StoreError::Retryable("x".into()), StoreError::Unknown("x".into())] {
        assert_eq!(call.count(async { Err::<(), _>(error.clone()) }).await, Err(error));
    }
    let store = Metered::new(Arc::new(MemoryStore::default()), &metrics);
    assert_eq!(store.depth().await, Ok(0));
    let text = metrics.render(Format::OpenMetrics);
    for line in [
        "{port=\"outbox\",operation=\"append\",outcome=\"retryable\"} 1",
        "{port=\"outbox\",operation=\"append\",outcome=\"unknown\"} 1",
        "{port=\"outbox\",operation=\"append\",outcome=\"ok\"} 0",
        "{port=\"outbox\",operation=\"open_messages\",outcome=\"ok\"} 1",
    ] {
        assert!(text.contains(&format!("postrider_store_calls_total{line}")), "{line}: {text}");
    }
}
