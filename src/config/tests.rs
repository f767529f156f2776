mod engines;
#[cfg(all(feature = "aws", feature = "postgres"))]
mod ledger;

use proptest::prelude::*;
use secrecy::{ExposeSecret as _, SecretString};

use super::*;

const MINIMAL: &str = include_str!("../../config/examples/minimal.toml");

/// Parses without an environment.
fn check(text: &str) -> Result<Config, Problems> {
    parse(text, Path::new("test.toml"), [])
}

fn with_environment(text: &str, variables: &[(&str, &str)]) -> Result<Config, Problems> {
    parse(text, Path::new("test.toml"), variables.iter().map(|(name, value)| (name.into(), value.into())))
}

/// The problems of the minimal example with `over` laid over it.
fn problems(over: &str) -> Vec<String> {
    let mut tree: toml::Table = MINIMAL.parse().expect("the example is TOML");
    deep_merge(&mut tree, over.parse().expect("the test's change is TOML"));
    match check(&toml::to_string(&tree).expect("a table can be written")) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.list.iter().map(|problem| problem.line(Path::new(""))).collect(),
    }
}

fn deep_merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => deep_merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// The default file with the keys that have no default filled in.
fn documented() -> toml::Table {
    let text = DEFAULT_TOML
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|first: char| first.is_ascii_lowercase()) => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n");
    text.parse().expect("the default file is TOML with its examples filled in")
}

fn keys(table: &toml::Table, path: &str, found: &mut BTreeSet<String>) {
    for (key, value) in table {
        let path = tree::join(path, key);
        // The names of headers, columns and statuses are the operator's.
        if let toml::Value::Table(table) = value
            && !["headers", "columns", "statuses"].contains(&key.as_str())
        {
            keys(table, &path, found);
        }
        found.insert(path);
    }
}

#[test]
fn every_key_is_documented_and_every_documented_key_is_read() {
    let mut documented_keys = BTreeSet::new();
    keys(&documented(), "", &mut documented_keys);
    let (result, asked) = parse_tracked("", Path::new("test.toml"), []);
    result.expect("the defaults alone are fine");
    assert_eq!(asked.difference(&documented_keys).collect::<Vec<_>>(), Vec::<&String>::new(), "undocumented");
    let unread: Vec<_> = documented_keys.difference(&asked).filter(|key| !key.ends_with(".\"*\"")).collect();
    assert_eq!(unread, Vec::<&String>::new(), "documented but never read");
}

#[test]
fn each_key_of_the_default_file_has_a_comment_above_it() {
    let mut above = "";
    for line in DEFAULT_TOML.lines() {
        let key = line.trim_start_matches('#');
        let is_key = key.starts_with(|first: char| first.is_ascii_lowercase()) && key.contains(" = ");
        if is_key && !above.contains("headers") && !line.contains("authorization = ") {
            assert!(above.starts_with("# "), "{line} has no comment above it");
        }
        above = line;
    }
}

/// `LOW to HIGH` in the comment above a number, and the number's table and key.
fn documented_ranges() -> Vec<(String, String, u64, u64)> {
    let (mut table, mut comment, mut ranges) = (String::new(), String::new(), Vec::new());
    for line in DEFAULT_TOML.lines() {
        if line.starts_with('[') {
            table = line.to_owned();
        } else if let Some(text) = line.strip_prefix("# ") {
            comment = comment + text + " ";
            continue;
        } else if let Some((key, value)) = line.split_once(" = ")
            && value.parse::<u64>().is_ok()
        {
            let words: Vec<_> =
                comment.split([' ', ',', ';', '.', ':']).filter(|word| !word.is_empty()).collect();
            let range = words.windows(3).find_map(|words| match words {
                [low, "to", high] => Some((low.parse().ok()?, high.parse().ok()?)),
                _ => None,
            });
            if let Some((low, high)) = range {
                ranges.push((table.clone(), key.to_owned(), low, high));
            } else {
                assert_eq!(key, "low_watermark", "{key} has no range in its comment: {comment}");
            }
        }
        comment.clear();
    }
    ranges
}

#[test]
fn documented_ranges_are_those_that_hold() {
    let ranges = documented_ranges();
    assert!(ranges.len() > 35, "{}", ranges.len());
    for (table, key, low, high) in ranges {
        let is_refused = |number: i128| {
            let refusal = format!("write an integer from {low} to {high}");
            let result = check(&format!("{table}\n{key} = {number}\n"));
            result.is_err_and(|problems| {
                problems.list.iter().any(|problem| {
                    problem.key.ends_with(&key) && problem.advice.starts_with("write an integer") && {
                        assert!(problem.advice.starts_with(&refusal), "{table} {}", problem.advice);
                        true
                    }
                })
            })
        };
        assert!(!is_refused(low.into()) && !is_refused(high.into()), "{table} {key}: {low} to {high}");
        assert!(is_refused(i128::from(low) - 1), "{table} {key}: {low} is not the lowest");
        assert!(is_refused(i128::from(high) + 1), "{table} {key}: {high} is not the highest");
    }
}

#[test]
fn the_examples_pass() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if cfg!(not(feature = "aws")) && path.ends_with("several-machines.toml") {
            continue;
        }
        let needs_postgres = ["postgres.toml", "warehouse.toml"].iter().any(|name| path.ends_with(name));
        if cfg!(not(feature = "postgres")) && needs_postgres {
            continue;
        }
        parse(&std::fs::read_to_string(&path).unwrap(), &path, []).unwrap();
        seen += 1;
    }
    assert!(seen >= 3);
}

#[test]
fn the_minimal_example_reads_as_written() {
    let config = check(MINIMAL).unwrap();
    let feed = config.feed("alerts").unwrap();
    let directory = feed.directory().unwrap();
    assert_eq!(directory.path, Path::new("/srv/postrider/alerts"));
    assert_eq!(directory.format, FeedFormat::Csv { delimiter: b',', recipient: "user_id".into() });
    assert_eq!(feed.destinations, ["support"]);
    assert_eq!(directory.settle, Duration::from_secs(2));
    assert_eq!((&config.queue.kind, &config.outbox.kind), (&QueueKind::Embedded, &OutboxKind::Embedded));
    let destination = config.destination("support").unwrap();
    assert_eq!(destination.webhook().unwrap().url.as_str(), "https://hooks.example.com/alerts");
    assert_eq!(destination.webhook().unwrap().secrets, [SecretSource::Credential("support".into())]);
    assert_eq!(destination.rate, Some(Rate { per_s: 500, burst: 50 }));
    assert_eq!(destination.webhook().unwrap().timeout, Duration::from_secs(10));
    assert_eq!(destination.retry.max_attempts, 12);
    assert_eq!(destination.retry.cap, Duration::from_hours(1));
    assert_eq!(config.delivery.rate, None);
    assert_eq!(config.pools.workers, None);
    assert!(config.supervision.is_consistent());
}

/// Each case breaks the minimal example in one way; the line must name the key and say what to do.
#[test]
fn each_mistake_is_named_with_what_to_do() {
    let cases: &[(&str, &[&str])] = &[
        ("[pools]\nparsers = 0", &["pools.parsers", "found 0", "1 to 64"]),
        ("[ops]\nlisten = \"localhost:9464\"", &["ops.listen", "found \"localhost:9464\"", "127.0.0.1:9464"]),
        ("[ops]\nlisten = \"9464\"", &["ops.listen", "an IP address and a port"]),
        ("[ops]\nallowed_hosts = [\"a b\"]", &["ops.allowed_hosts[0]", "without port"]),
        ("[ops]\nallowed_hosts = [\"metrics:9464\"]", &["ops.allowed_hosts[0]", "without port"]),
        ("[alarms.failures]\nmax_percent = 101", &["alarms.failures.max_percent", "found 101", "per cent"]),
        ("[alarms]\ndepths = 1", &["alarms.depths", "did you mean `depth`?"]),
        ("[pools]\nparsers = 65", &["pools.parsers", "found 65"]),
        ("[pools]\nparsers = \"2\"", &["pools.parsers", "found \"2\"", "an integer"]),
        ("[pools]\nparsers = 2.0", &["pools.parsers", "the float 2.0"]),
        ("[pools]\nparser = 2", &["pools.parser", "unknown key; did you mean `parsers`?"]),
        ("[pool]\nparsers = 2", &["pool", "did you mean `pools`?"]),
        ("[batch]\nzzz = 2", &["batch.zzz", "known here: max_messages, max_bytes, linger_ms"]),
        ("pools = 3", &["pools", "found 3", "write a table, [pools]"]),
        ("feeds.b = 3", &["feeds.b", "found 3", "write a table, [feeds.b]"]),
        ("destinations.support.retry = 3", &["destinations.support.retry", "write a table"]),
        ("pools.parsers.x = 3", &["pools.parsers", "found a table", "an integer"]),
        ("[state]\ndir = \"state\"", &["state.dir", "absolute"]),
        ("[state]\ndir = \"/a/../b\"", &["state.dir", "without `..`"]),
        ("[state]\ndir = \"/srv/postrider\"", &["feeds.alerts.path", "state.dir"]),
        ("[state]\ndir = \"/srv/postrider/alerts/\"", &["feeds.alerts.path", "state.dir"]),
        ("[log]\nformat = \"xml\"", &["log.format", "found \"xml\"", "\"journald\""]),
        ("[outbox]\nlow_watermark = 2000000", &["outbox.low_watermark", "below outbox.high_watermark"]),
        ("[record]\nmax_outcomes = 3000", &["record.max_outcomes", "record.max_unrecorded"]),
        ("[lease]\nduration_ms = 20000", &["destinations.support.timeout_ms", "lease.duration_ms (20000)"]),
        ("[batch]\nmax_bytes = 1024", &["feeds.alerts.max_row_bytes", "batch.max_bytes (1024)"]),
        ("[supervision]\nperiod_ms = 3100", &["supervision.period_ms", "3100 ms", "crash loop"]),
        ("[supervision]\ncap_ms = 50", &["supervision.cap_ms", "supervision.base_ms"]),
        ("[feeds.alerts]\nformat = \"tsv\"", &["feeds.alerts.format", "\"ndjson\""]),
        ("[feeds.alerts]\nformat = \"text\"", &["feeds.alerts.recipient", "remove it"]),
        ("[feeds.alerts]\ndelimiter = \"ab\"", &["feeds.alerts.delimiter", "one ASCII character"]),
        ("[feeds.alerts]\ndelimiter = \"\\n\"", &["feeds.alerts.delimiter", "one ASCII character"]),
        ("[feeds.alerts]\nrecipient = \"\"", &["feeds.alerts.recipient", "1 to 256"]),
        ("[feeds.alerts]\ndestinations = []", &["feeds.alerts.destinations", "at least one"]),
        ("[feeds.alerts]\ndestinations = \"support\"", &["feeds.alerts.destinations", "write a list"]),
        ("[feeds.alerts]\ndestinations = [\"suport\"]", &["destinations[0]", "did you mean \"support\"?"]),
        ("[feeds.alerts]\ndestinations = [\"xyz\"]", &["destinations[0]", "add [destinations.xyz]"]),
        ("[feeds.alerts]\ndestinations = [\"support\", \"support\"]", &["destinations[1]", "named twice"]),
        ("[feeds.alerts]\nrequire_done = \"yes\"", &["feeds.alerts.require_done", "true or false"]),
        (
            "[feeds.b]\npath=\"/srv/postrider//alerts/\"\nformat=\"text\"\ndestinations=[\"support\"]",
            &["feeds.b.path", "the feed alerts watches that directory too"],
        ),
        (
            "[feeds.b]\npath=\"/srv/postrider/alerts/done\"\nformat=\"text\"\ndestinations=[\"support\"]",
            &["feeds.b.path", "the feed alerts puts its finished files there"],
        ),
        ("[feeds.b]\nformat=\"text\"\ndestinations=[\"support\"]", &["feeds.b.path", "it is missing"]),
        ("[destinations.b]\nsecrets=[]", &["destinations.b.url", "it is missing", "https://"]),
        ("[destinations.b]\nurl=\"http://h\"", &["destinations.b.secrets", "it is missing", "[]"]),
        ("[destinations.support]\nurl = \"ftp://h/\"", &["destinations.support.url", "found \"ftp\""]),
        ("[destinations.support]\nurl = \"hooks.example.com\"", &["destinations.support.url", "https://"]),
        ("[destinations.support]\nurl = \"http://u@h/\"", &["destinations.support.url", "user name"]),
        ("[destinations.support]\nurl = \"http://h/#x\"", &["destinations.support.url", "fragment"]),
        ("[destinations.support]\ntimeout_ms = 40000", &["destinations.support.timeout_ms", "lease"]),
        (
            "[destinations.support]\ntimeout_ms = 1000\nconnect_timeout_ms = 2000",
            &["connect_timeout_ms", "a part of timeout_ms"],
        ),
        ("[destinations.support]\ncontent_type = \"json\"", &["content_type", "media type"]),
        ("[destinations.support]\ncontent_type = \"a/b\\r\\nx: y\"", &["content_type", "media type"]),
        ("[destinations.support]\ntemplate = \"{{ id\"", &["destinations.support.template", "no template"]),
        (
            "[destinations.support]\ntemplate = \"x\"\ntemplate_file = \"/x\"",
            &["template_file", "keep one of them"],
        ),
        ("[destinations.support.retry]\nbase_ms = 5000\ncap_ms = 4000", &["retry.cap_ms", "base_ms"]),
        ("[destinations.support.retry]\nmax_age_s = 0", &["retry.max_age_s", "found 0"]),
        (
            "[destinations.support.retry]\nmax_age_s = 60\nmax_retry_after_s = 61",
            &["retry.max_retry_after_s", "max_age_s"],
        ),
        ("[destinations.support.headers]\nhost = \"x\"", &["headers.host", "written by Postrider"]),
        (
            "[destinations.support.headers]\nWebhook-Id = \"x\"",
            &["headers.Webhook-Id", "written by Postrider"],
        ),
        ("[destinations.support.headers]\n\"x y\" = \"x\"", &["headers.\"x y\"", "no header name"]),
        ("[destinations.support.headers]\nx-a = \"b\\r\\nc: d\"", &["headers.x-a", "0x0d"]),
        ("[destinations.support.headers]\nx-a = \"env:1\"", &["headers.x-a", "env:NAME"]),
        ("[destinations.support]\nsecrets = [\"file:rel\"]", &["secrets[0]", "absolute path"]),
        ("[destinations.support]\nsecrets = [\"credential:a/b\"]", &["secrets[0]", "without a slash"]),
        // F57: a hostile name never reaches a store or a metric.
        (
            "[destinations.'id\"; drop table batches']\nurl=\"http://h\"\nsecrets=[]",
            &["destinations.\"id\\\"; drop table batches\"", "choose a name"],
        ),
        (
            "[feeds.Alerts]\npath=\"/x\"\nformat=\"text\"\ndestinations=[\"support\"]",
            &["feeds.Alerts", "a-z"],
        ),
    ];
    for (over, expected) in cases {
        let lines = problems(over);
        let is_named = lines.iter().any(|line| expected.iter().all(|part| line.contains(part)));
        assert!(is_named, "{over}\nexpected {expected:?}\ngot {lines:#?}");
        assert_eq!(lines.len(), 1, "{over}\ngot more than one problem: {lines:#?}");
    }
}

#[test]
fn every_problem_is_reported_at_once_with_its_line() {
    let text =
        "[pools]\nparsers = 0\n\n[batch]\nlinger = 5\n  max_bytes = \"a\"\n\n[feeds.a]\nformat = \"text\"\n";
    let error = check(text).unwrap_err();
    let lines: Vec<_> = error.to_string().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 5, "{error}");
    assert!(lines[0].starts_with("test.toml:2:1: pools.parsers: found 0; "), "{error}");
    assert!(lines[1].starts_with("test.toml:5:1: batch.linger: unknown key; did you mean `linger_ms`?"));
    assert!(lines[2].starts_with("test.toml:6:3: batch.max_bytes: found \"a\"; "), "{error}");
    assert!(lines[3].starts_with("test.toml: feeds.a.destinations: it is missing"), "{error}");
    assert!(lines[4].starts_with("test.toml: feeds.a.path: it is missing"), "{error}");
}

#[test]
fn a_syntax_error_has_line_and_column_and_shows_no_text() {
    let error = check("[state]\ndir = \"/x\"\nsecret = whsec_abc\n").unwrap_err();
    assert!(error.to_string().starts_with("test.toml:3:10: TOML syntax"), "{error}");
    assert!(!error.to_string().contains("whsec_abc"), "{error}");
}

#[test]
fn a_mistake_in_a_shared_table_is_reported_once_and_there() {
    let text =
        format!("{MINIMAL}\n[destinations.b]\nurl=\"http://h\"\nsecrets=[]\n[destinations.\"*\"]\nburst=0\n");
    let error = check(&text).unwrap_err();
    assert_eq!(error.list.len(), 1, "{error}");
    assert_eq!(error.list[0].key, "destinations.\"*\".burst");
    // And it is reported where nothing uses it.
    assert_eq!(check("[feeds.\"*\"]\nsettle_ms = -1").unwrap_err().list.len(), 1);
}

#[test]
fn a_literal_secret_is_refused_and_never_shown() {
    for (over, key) in [
        ("[destinations.support]\nsecrets = [\"whsec_c2VjcmV0\"]", "secrets[0]"),
        ("[destinations.support]\nsecrets = \"whsec_c2VjcmV0\"", "secrets"),
        ("[destinations.support]\nsecret = \"whsec_c2VjcmV0\"", "secret"),
        ("[destinations.support.headers]\nAuthorization = \"whsec_c2VjcmV0\"", "headers.Authorization"),
        ("[destinations.support.headers]\nx-key = [\"whsec_c2VjcmV0\"]", "headers.x-key"),
        ("[destinations.support]\nurl = \"http://user:whsec_c2VjcmV0@h/\"", "url"),
        ("[destinations.support]\nurl = \"whsec_c2VjcmV0\"", "url"),
    ] {
        let lines = problems(over);
        assert_eq!(lines.len(), 1, "{over}: {lines:?}");
        assert!(lines[0].contains(&format!("destinations.support.{key}:")), "{lines:?}");
        assert!(!lines[0].contains("c2VjcmV0"), "{lines:?}");
    }
    assert!(problems("[destinations.support]\nsecrets = [\"x\"]")[0].contains("credential:NAME"));
}

#[test]
fn the_environment_wins_in_any_case_and_spelling() {
    let text = format!("{MINIMAL}\n[destinations.eu-west]\nurl=\"http://h\"\nsecrets=[]\n");
    let config = with_environment(
        &text,
        &[
            ("POSTRIDER__POOLS__PARSERS", "4"),
            ("postrider__destinations__Support__Rate_Per_S", "100"),
            ("POSTRIDER__DESTINATIONS__EU_WEST__PAUSED", "TRUE"),
            ("POSTRIDER__DESTINATIONS__EU_WEST__RETRY__MAX_ATTEMPTS", "3"),
            ("POSTRIDER__DESTINATIONS__EU_WEST__SECRETS", "env:A, file:/b"),
            ("POSTRIDER__DESTINATIONS__EU_WEST__HEADERS__X_TEAM", "growth"),
            ("POSTRIDER__FEEDS__ALERTS__DESTINATIONS", "support,eu-west"),
            ("POSTRIDER__FEEDS__NEW__PATH", "/new"),
            ("POSTRIDER__FEEDS__NEW__FORMAT", "text"),
            ("POSTRIDER__FEEDS__NEW__DESTINATIONS", "support"),
            ("POSTRIDER_CONFIG", "/elsewhere"),
            ("PATH", "/bin"),
        ],
    )
    .unwrap();
    assert_eq!(config.pools.parsers, 4);
    assert_eq!(config.destination("support").unwrap().rate.unwrap().per_s, 100);
    let west = config.destination("eu-west").unwrap();
    assert!(west.is_paused);
    assert_eq!(west.retry.max_attempts, 3);
    assert_eq!(west.webhook().unwrap().secrets.len(), 2);
    assert_eq!(west.webhook().unwrap().headers[0].name, "x-team");
    assert_eq!(config.feed("alerts").unwrap().destinations, ["support", "eu-west"]);
    assert_eq!(config.feed("new").unwrap().directory().unwrap().path, Path::new("/new"));
}

#[test]
fn mistakes_in_the_environment_name_the_variable() {
    for (name, value, expected) in [
        ("POSTRIDER__POOLS__PARSERS", "many", "pools.parsers: found \"many\""),
        ("POSTRIDER__POOL__PARSERS", "4", "pool: unknown key; did you mean `pools`?"),
        ("POSTRIDER__POOLS__PARSER", "4", "pools.parser: unknown key; did you mean `parsers`?"),
        ("POSTRIDER__POOLS", "4", "pools: it is a table: write POSTRIDER__POOLS__KEY=value"),
        ("POSTRIDER__POOLS__PARSERS__X", "4", "pools.parsers: it is a value, not a table"),
        ("POSTRIDER__", "4", "write POSTRIDER__TABLE__KEY=value"),
        ("POSTRIDER__DESTINATIONS__SUPPORT__SECRETS", "whsec_x", "destinations.support.secrets[0]"),
    ] {
        let error = with_environment(MINIMAL, &[(name, value)]).unwrap_err();
        assert_eq!(error.list.len(), 1, "{error}");
        assert!(error.to_string().contains(&format!("environment {name}: ")), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!error.to_string().contains("whsec_x"), "{error}");
    }
    let twice = [("POSTRIDER__POOLS__PARSERS", "4"), ("Postrider__Pools__Parsers", "5")];
    assert!(with_environment(MINIMAL, &twice).unwrap_err().to_string().contains("keep one of them"));
    let both = "[feeds.a-b]\npath=\"/a\"\n[feeds.a_b]\npath=\"/b\"";
    let error = with_environment(both, &[("POSTRIDER__FEEDS__A_B__PATH", "/c")]).unwrap_err();
    assert!(error.to_string().contains("it could mean \"a-b\" or \"a_b\""), "{error}");
}

#[test]
fn what_is_not_set_gives_way() {
    let config = check(
        "[outbox]\nhigh_watermark = 100\n[record]\nmax_unrecorded = 10\n[destinations.a]\nurl=\"http://h\"\n\
         secrets=[]\ntimeout_ms = 500\nretry.max_age_s = 60",
    )
    .unwrap();
    assert_eq!(config.outbox.low_watermark, 75);
    assert!((config.alarms.depth.unwrap().threshold - 75.0).abs() < 1e-9);
    assert_eq!(config.record.max_outcomes, 10);
    assert_eq!(config.destinations[0].webhook().unwrap().connect_timeout, Duration::from_millis(500));
    assert_eq!(config.destinations[0].webhook().unwrap().max_retry_after, Duration::from_mins(1));
}

#[test]
fn s2_8_the_alarms_are_preset_with_the_seeds_numbers() {
    let alarms = check("").unwrap().alarms;
    let rules = [alarms.failures.unwrap().rule, alarms.latency.unwrap(), alarms.dead.unwrap().0];
    let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
    for (rule, (threshold, clear_at)) in rules.iter().zip([(5.0, 4.0), (300.0, 240.0), (0.0, 0.0)]) {
        assert!(close(rule.threshold, threshold) && close(rule.clear_at, clear_at), "{rule:?}");
    }
    // The seed's depth of 1000 is for a queue that should be empty: see default.toml.
    assert!(close(alarms.depth.unwrap().threshold, 1_500_000.0));
    let off = check(
        "[alarms]\ndepth.enabled = false\ndead.enabled = false\nlatency.enabled = false\n\
                     failures.enabled = false",
    );
    assert_eq!(off.unwrap().alarms, Alarms::default());
}

#[test]
fn the_ops_server_is_off_until_it_is_asked_for() {
    assert_eq!(check("").unwrap().ops, Ops { listen: None, allowed_hosts: Vec::new() });
    let ops = check("[ops]\nlisten = \"[::1]:9464\"\nallowed_hosts = [\"Metrics.Internal\"]").unwrap().ops;
    assert_eq!(ops.listen, Some("[::1]:9464".parse().unwrap()));
    assert_eq!(ops.allowed_hosts, ["metrics.internal"]);
}

#[test]
fn own_keys_lie_over_shared_ones() {
    let config = check(
        "[destinations.\"*\"]\nburst = 7\ntemplate = \"{{ id }}\"\nretry.base_ms = 2000\nheaders.x-a = \"1\"\n\
         [destinations.a]\nurl=\"http://h\"\nsecrets=[]\nretry.cap_ms = 3000\ntemplate_file = \"/t\"\n\
         headers.x-b = \"2\"\n[feeds.\"*\"]\nrecipient = \"id\"\nformat = \"csv\"\ndelimiter = \";\"\n\
         [feeds.t]\npath = \"/t\"\nformat = \"text\"\ndestinations = [\"a\"]\n\
         [feeds.c]\npath = \"/c\"\ndestinations = [\"a\"]",
    )
    .unwrap();
    let a = config.destination("a").unwrap();
    assert_eq!((a.retry.base, a.retry.cap), (Duration::from_secs(2), Duration::from_secs(3)));
    let a = a.webhook().unwrap();
    assert_eq!(a.template, TemplateSource::File("/t".into()));
    assert_eq!(a.headers.iter().map(|header| header.name.as_str()).collect::<Vec<_>>(), ["x-a", "x-b"]);
    let format = |feed: &str| config.feed(feed).unwrap().directory().unwrap().format.clone();
    assert_eq!(format("t"), FeedFormat::Text);
    assert_eq!(format("c"), FeedFormat::Csv { delimiter: b';', recipient: "id".into() });
}

#[test]
fn debug_shows_no_secret() {
    let text = MINIMAL.replace("/alerts\"\nsecrets", "/services/T00/s3cr3t\"\nsecrets")
        + "[destinations.support.headers]\nx-api-key = \"s3cr3t\"\n";
    let config = check(&text).unwrap();
    assert!(config.destination("support").unwrap().webhook().unwrap().url.as_str().contains("s3cr3t"));
    let resolved = config.resolve_with(|name| (name == "CREDENTIALS_DIRECTORY").then(|| "/nowhere".into()));
    let shown = format!("{resolved:?}");
    assert!(!shown.contains("s3cr3t"), "{shown}");
    let config = check(&text).unwrap();
    assert!(!format!("{config:?} {config:#?}").contains("s3cr3t"));
}

#[test]
fn secrets_templates_and_certificates_are_read_and_every_failure_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (secret, empty) = (write("secret", "from a file\r\n"), write("empty", "\n"));
    let (template, broken) = (write("body.j2", "{{ id }}"), write("broken.j2", "{{ id"));
    let pem = write("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    write("support", "whsec_c2VjcmV0c2VjcmV0c2VjcmV0");
    let environment = |name: &str| match name {
        "CREDENTIALS_DIRECTORY" => Some(directory.path().as_os_str().to_owned()),
        "A" => Some("from the environment".into()),
        "BAD" => Some("whsec_?".into()),
        "LINES" => Some("a\nb".into()),
        _ => None,
    };

    let good = format!(
        "[destinations.a]\nurl=\"http://h\"\nsecrets=[\"env:A\", \"file:{secret}\", \"credential:support\"]\n\
         template_file=\"{template}\"\nca_file=\"{pem}\"\nheaders.authorization=\"env:A\""
    );
    let resolved = check(&good).unwrap().resolve_with(environment).unwrap();
    let materials = &resolved.materials["a"];
    let secrets: Vec<_> = materials.secrets.iter().map(SecretString::expose_secret).collect();
    assert_eq!(secrets, ["from the environment", "from a file", "whsec_c2VjcmV0c2VjcmV0c2VjcmV0"]);
    assert_eq!(materials.template.as_deref(), Some("{{ id }}"));
    assert_eq!(materials.headers[0].0, "authorization");
    assert_eq!(materials.headers[0].1.expose_secret(), "from the environment");
    assert!(materials.ca_pem.is_some());
    let shown = format!("{resolved:?}");
    assert!(!shown.contains("from ") && !shown.contains("c2Vj"), "{shown}");
    let again = check(&good).unwrap().resolve_with(environment).unwrap();
    assert!(materials.is_same(&again.materials["a"]));

    let bad = format!(
        "[destinations.a]\nurl=\"http://h\"\nsecrets=[\"env:NONE\", \"file:{empty}\", \"credential:none\", \
         \"env:BAD\"]\ntemplate_file=\"{broken}\"\nca_file=\"{secret}\"\nheaders.x-a=\"env:LINES\""
    );
    let error = check(&bad).unwrap().resolve_with(environment).unwrap_err();
    assert_eq!(error.list.len(), 7, "{error}");
    for part in ["NONE; the variable is not set", "nothing in it", "No such file", "base64", "no template"] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert!(!error.to_string().contains("whsec_?"), "{error}");
}

#[test]
fn a_file_that_is_too_large_or_missing_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(FILE_BYTES_MAX + 1).unwrap();
    let error = load(file.path()).unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }));
    assert!(error.to_string().contains("larger than 1048576 bytes"), "{error}");
    let error = load(Path::new("/nowhere/postrider.toml")).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere/postrider.toml: "), "{error}");
}

proptest! {
    /// Whatever stands at whatever key, reading ends with a configuration or with problems.
    #[test]
    fn anything_is_read_or_refused_without_a_panic(
        section in "(pools|batch|feeds|destinations|feeds\\.a|destinations\\.support|destinations\\.\"\\*\"|x)",
        key in "(parsers|max_bytes|path|url|secrets|retry|headers|destinations|format|[a-z\"]{1,6})",
        value in "(-?[0-9]{1,40}|\"[^\"\\\\]{0,20}\"|true|\\[[0-9,]{0,5}\\]|\\{ a = 1 \\}|1\\.5|1979-05-27)",
    ) {
        let _ = check(&format!("[{section}]\n{key} = {value}\n"));
        let name = format!("POSTRIDER__{}__{}", section.replace('.', "__"), key.to_uppercase());
        let _ = with_environment(MINIMAL, &[(&name, &value)]);
    }

    /// Within its range a number is taken as it stands; outside it is refused.
    #[test]
    fn ranges_hold_at_their_ends(number in prop_oneof![Just(0i64), Just(1), Just(64), Just(65), any::<i64>()]) {
        let result = check(&format!("[pools]\nparsers = {number}"));
        match usize::try_from(number) {
            Ok(parsers) if (1..=64).contains(&parsers) => prop_assert_eq!(result.unwrap().pools.parsers, parsers),
            _ => prop_assert_eq!(result.unwrap_err().list.len(), 1),
        }
    }
}
