mod engines;
mod ledger;
mod requests;
mod tracing;

use std::{collections::BTreeSet, time::Duration};

use postrider_settings::{Section, join, parse_duration, parse_size, show_duration, show_size};
use proptest::prelude::*;
use secrecy::{ExposeSecret as _, SecretString};

use super::*;

const MINIMAL: &str = include_str!("../../config/examples/minimal.toml");

/// Parses without an environment, as a binary with every engine does.
fn check(text: &str) -> Result<Config, Problems> {
    with_environment(text, &[])
}

fn with_environment(text: &str, variables: &[(&str, &str)]) -> Result<Config, Problems> {
    let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
    parse_for(text, Path::new("test.toml"), variables, Engines::FULL)
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

/// The default page with the keys that have no default filled in.
fn documented() -> toml::Table {
    let page = default_toml();
    let text = page
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|first: char| first.is_ascii_lowercase()) => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n");
    text.parse().expect("the default page is TOML with its examples filled in")
}

fn keys(table: &toml::Table, path: &str, found: &mut BTreeSet<String>) {
    for (key, value) in table {
        let path = join(path, key);
        if let toml::Value::Table(table) = value {
            keys(table, &path, found);
        }
        found.insert(path);
    }
}

#[test]
fn the_default_file_is_what_is_declared() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/default.toml");
    if std::env::var_os("POSTRIDER_WRITE_DEFAULTS").is_some() {
        std::fs::write(&path, default_toml()).expect("the file can be written");
    }
    let file = std::fs::read_to_string(&path).expect("the file is there");
    assert!(
        file == default_toml(),
        "config/default.toml is not what is declared: POSTRIDER_WRITE_DEFAULTS=1 cargo nextest run -p postrider --lib \
         -E 'test(the_default_file_is_what_is_declared)' writes it"
    );
}

#[test]
fn every_documented_key_is_read() {
    let mut documented_keys = BTreeSet::new();
    keys(&documented(), "", &mut documented_keys);
    let reader = Reader::default();
    let (tree, problems) = postrider_settings::layers(&default_toml(), "", []).expect("the page is TOML");
    assert_eq!(problems, []);
    read(Section::root(&reader, tree), Path::new("test.toml"));
    let (problems, asked) = reader.finish();
    assert_eq!(problems, [], "the defaults alone are fine");
    assert_eq!(asked.difference(&documented_keys).collect::<Vec<_>>(), Vec::<&String>::new(), "undocumented");
    let unread: Vec<_> = documented_keys.difference(&asked).filter(|key| !key.ends_with(".\"*\"")).collect();
    assert_eq!(unread, Vec::<&String>::new(), "documented but never read");
}

#[test]
fn each_key_of_the_default_file_has_a_comment_above_it() {
    let page = default_toml();
    let mut above = "";
    for line in page.lines() {
        let key = line.trim_start_matches('#');
        if key.starts_with(|first: char| first.is_ascii_lowercase()) && key.contains(" = ") {
            assert!(above.starts_with("# "), "{line} has no comment above it");
        }
        above = line;
    }
}

/// Table, key, lowest and highest of every key that has a range.
fn documented_ranges() -> Vec<(String, String, String, String)> {
    let (mut table, mut comment, mut ranges) = (String::new(), String::new(), Vec::new());
    for line in default_toml().lines() {
        if line.starts_with('[') {
            table = line.to_owned();
        } else if let Some(text) = line.strip_prefix("# ") {
            comment = comment + text + " ";
            continue;
        } else if let Some((key, value)) = line.split_once(" = ") {
            let words: Vec<_> = comment.split_ascii_whitespace().collect();
            let is_number = value.trim_matches('"').starts_with(|first: char| first.is_ascii_digit());
            // `min_tls` is one of some words, and `not_before` and `finish_by` are times, `listen` an address, though they begin with digits.
            let is_quantity = is_number && !words.contains(&"|") && !value.contains(['T', '/', ':']);
            if is_quantity && let [.., low, "to", high] = &words[..] {
                let high = high.trim_end_matches('.');
                ranges.push((table.clone(), key.to_owned(), (*low).to_owned(), high.to_owned()));
            }
            assert!(!is_quantity || words.len() > 2 && words[words.len() - 2] == "to", "{key} has no range");
        }
        comment.clear();
    }
    ranges
}

/// A value as it is written: a quantity with a unit in quotes.
fn quoted(value: &str) -> String {
    if value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        value.into()
    } else {
        format!("{value:?}")
    }
}

/// One less and one more, each in the smallest unit; nothing is less than none.
fn neighbours(low: &str, high: &str) -> Vec<String> {
    if let (Some(low), Some(high)) = (parse_duration(low), parse_duration(high)) {
        let one = Duration::from_millis(1);
        let below = low.checked_sub(one).map(show_duration);
        return below.into_iter().chain([show_duration(high + one)]).collect();
    }
    if let (Some(low), Some(high)) = (parse_size(low), parse_size(high)) {
        return low.checked_sub(1).map(show_size).into_iter().chain([show_size(high + 1)]).collect();
    }
    let (low, high): (i128, i128) = (low.parse().expect("a number"), high.parse().expect("a number"));
    vec![(low - 1).to_string(), (high + 1).to_string()]
}

#[test]
fn ranges_hold_at_their_ends_and_no_farther() {
    let ranges = documented_ranges();
    assert!(ranges.len() > 45, "{}", ranges.len());
    for (table, key, low, high) in ranges {
        let refused = |value: &str| {
            let result = check(&format!("{table}\n{key} = {}\n", quoted(value)));
            let problems = result.err().map(|problems| problems.list).unwrap_or_default();
            let of_range = |problem: &&Problem| {
                problem.key.ends_with(&format!(".{key}"))
                    && problem.advice.contains(&format!("from {low} to {high}"))
            };
            problems.iter().any(|problem| of_range(&problem))
        };
        for end in [&low, &high] {
            assert!(!refused(end), "{table} {key}: {end} is refused");
        }
        for beyond in neighbours(&low, &high) {
            assert!(refused(&beyond), "{table} {key}: {beyond} is taken");
        }
    }
}

#[test]
fn a_number_without_its_unit_is_refused_with_a_hint() {
    let mut seen = 0;
    for (table, key, low, _) in documented_ranges() {
        if low.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        for bare in ["5000", "\"5000\"", "0"] {
            let error = check(&format!("{table}\n{key} = {bare}\n")).expect_err("a bare number");
            let line = error.to_string();
            assert!(line.contains(&format!("{key}: found {bare}; it has no unit; write a ")), "{line}");
            assert!(line.contains("in quotes, such as \""), "{line}");
        }
        seen += 1;
    }
    assert!(seen > 20, "{seen}");
}

#[test]
fn the_examples_pass() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        check(&std::fs::read_to_string(&path).unwrap()).unwrap();
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
    assert_eq!(directory.format, Format::Csv { delimiter: b',', recipient: "user_id".into() });
    assert_eq!(feed.destinations, ["support"]);
    assert_eq!(directory.stable_after, Duration::from_secs(2));
    assert_eq!(config.profile, Profile::Embedded);
    let destination = config.destination("support").unwrap();
    assert_eq!(destination.webhook().unwrap().url.as_str(), "https://hooks.example.com/alerts");
    assert_eq!(destination.webhook().unwrap().secrets, [SecretSource::Credential("support".into())]);
    assert_eq!(destination.rate(), Some(Rate { per_s: 500, burst: 50 }));
    assert_eq!(destination.webhook().unwrap().timeout, Duration::from_secs(10));
    assert_eq!(destination.retry.max_attempts, 12);
    assert_eq!(destination.retry.cap, Duration::from_hours(1));
    assert_eq!(config.delivery.rate(), None);
}

/// B3: as many messages and attempts as a batch's record has room for, and each one's attempts in a byte of it.
#[test]
fn the_largest_record_can_be_asked_for() {
    let variables = [
        ("POSTRIDER__BATCH__MAX_MESSAGES", "1000"),
        ("POSTRIDER__DESTINATIONS__SUPPORT__RETRY__MAX_ATTEMPTS", "250"),
    ];
    let config = with_environment(MINIMAL, &variables).unwrap();
    let attempts = config.destination("support").unwrap().retry.max_attempts;
    assert_eq!((config.batch.max_messages, attempts), (1_000, 250));
    assert!(u8::try_from(attempts).is_ok_and(|attempts| attempts < u8::MAX));
}

/// Each case breaks the minimal example in one way; the line must name the key and say what to do.
/// Each change of the minimal example makes one problem, which says so much.
fn assert_each_is_named(cases: &[(&str, &[&str])]) {
    for (over, expected) in cases {
        let lines = problems(over);
        let is_named = lines.iter().any(|line| expected.iter().all(|part| line.contains(part)));
        assert!(is_named, "{over}\nexpected {expected:?}\ngot {lines:#?}");
        assert_eq!(lines.len(), 1, "{over}\ngot more than one problem: {lines:#?}");
    }
}

#[test]
fn each_mistake_is_named_with_what_to_do() {
    let cases: &[(&str, &[&str])] = &[
        ("[pools]\nparsers = 0", &["pools.parsers", "found 0", "1 to 64"]),
        ("[ops]\nlisten = \"localhost:9464\"", &["ops.listen", "found \"localhost:9464\"", "127.0.0.1:9464"]),
        ("[ops]\nlisten = \"9464\"", &["ops.listen", "an IP address and a port"]),
        ("[ops]\nlisten = \"0.0.0.0:9464\"", &["ops.listen", "ops.operate_token", "ops.tls_cert_file"]),
        (
            "[ops]\nlisten = \"[::]:9464\"\noperate_token = \"env:T\"",
            &["ops.listen", "set ops.tls_cert_file and ops.tls_key,"],
        ),
        (
            "[ops]\nlisten = \"10.0.0.1:9464\"\ntls_cert_file = \"/c\"\ntls_key = \"env:K\"",
            &["ops.listen", "set ops.operate_token, ops.view_token or both,"],
        ),
        ("[ops]\ntls_cert_file = \"/c\"", &["ops.tls_cert_file", "set ops.tls_key too"]),
        ("[ops]\nallowed_hosts = [\"a b\"]", &["ops.allowed_hosts[0]", "without port"]),
        ("[ops]\nallowed_hosts = [\"metrics:9464\"]", &["ops.allowed_hosts[0]", "without port"]),
        ("[alarms.failures]\nmax_percent = 101", &["alarms.failures.max_percent", "found 101", "per cent"]),
        ("[alarms]\ndepths = 1", &["alarms.depths", "did you mean `depth`?"]),
        ("[pools]\nparsers = 65", &["pools.parsers", "found 65"]),
        ("[pools]\nparsers = \"2\"", &["pools.parsers", "found \"2\"", "an integer"]),
        ("[pools]\nparsers = 2.0", &["pools.parsers", "the float 2.0"]),
        ("[pools]\nparser = 2", &["pools.parser", "unknown key; did you mean `parsers`?"]),
        ("[pool]\nparsers = 2", &["pool", "did you mean `pools`?"]),
        ("[batch]\nzzz = 2", &["batch.zzz", "known here: max_messages"]),
        ("[batch]\nmax_messages = 1001", &["batch.max_messages", "found 1001", "from 1 to 1000"]),
        (
            "[destinations.support.retry]\nmax_attempts = 251",
            &["support.retry.max_attempts", "found 251", "from 1 to 250"],
        ),
        ("pools = 3", &["pools", "found 3", "write a table, [pools]"]),
        ("feeds.b = 3", &["feeds.b", "found 3", "write a table, [feeds.b]"]),
        ("destinations.support.retry = 3", &["destinations.support.retry", "write a table"]),
        ("pools.parsers.x = 3", &["pools.parsers", "found a table", "an integer"]),
        ("[state]\ndir = \"state\"", &["state.dir", "absolute"]),
        ("[state]\ndir = \"/a/../b\"", &["state.dir", "without `..`"]),
        ("[state]\ndir = \"/srv/postrider\"", &["feeds.alerts.path", "state.dir"]),
        ("[state]\ndir = \"/srv/postrider/alerts/\"", &["feeds.alerts.path", "state.dir"]),
        ("[log]\nformat = \"xml\"", &["log.format", "found \"xml\"", "\"journald\""]),
        ("[outbox]\nlow_watermark = 2000000", &["outbox.low_watermark", "did you mean `high_watermark`?"]),
        ("[record]\nmax_outcomes = 3000", &["record.max_outcomes", "did you mean `max_unrecorded`?"]),
        (
            "[lease]\nduration = \"20s\"",
            &["destinations.support.timeout", "found 10s", "lease.duration (20s)"],
        ),
        ("[lease]\nduration_ms = 20000", &["lease.duration_ms", "did you mean `duration`?"]),
        ("[supervision]\nperiod_ms = 3100", &["supervision", "unknown key"]),
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
        (
            "[destinations.support]\nclient_cert_file = \"/etc/client.pem\"",
            &["destinations.support.client_cert_file", "set client_key too"],
        ),
        (
            "[destinations.support]\nclient_key = \"env:KEY\"",
            &["destinations.support.client_key", "set client_cert_file too"],
        ),
        (
            "[destinations.support]\nbasic = \"env:A\"\nbearer = \"env:B\"",
            &["destinations.support.basic", "bearer is set too"],
        ),
        (
            "[destinations.support]\nbearer = \"env:B\"\nheaders.authorization = \"env:A\"",
            &["destinations.support.bearer", "headers.authorization is set too"],
        ),
        ("[destinations.support]\nmin_tls = \"1.1\"", &["destinations.support.min_tls", "\"1.2\", \"1.3\""]),
        ("[destinations.support]\nurl = \"http://h/#x\"", &["destinations.support.url", "fragment"]),
        ("[destinations.support]\ntimeout = \"40s\"", &["destinations.support.timeout", "lease"]),
        (
            "[destinations.support]\ntimeout = \"11m\"",
            &["destinations.support.timeout", "found \"11m\"", "a time from 10ms to 10m"],
        ),
        (
            "[destinations.support]\ntimeout = 5000",
            &["destinations.support.timeout", "found 5000", "no unit", "\"5s\""],
        ),
        ("[feeds.alerts]\nmax_row = \"32MiB\"", &["feeds.alerts.max_row", "a size from 16B to 16MiB"]),
        ("[destinations.support]\ncontent_type = \"json\"", &["content_type", "media type"]),
        ("[destinations.support]\ncontent_type = \"a/b\\r\\nx: y\"", &["content_type", "media type"]),
        (
            "[destinations.support]\ntemplate = \"{{ id\"",
            &["destinations.support.template", "not a valid template"],
        ),
        (
            "[destinations.support]\ntemplate = \"1\"\ntemplate_file = \"/x\"",
            &["template_file", "keep one of them"],
        ),
        ("[destinations.support.retry]\nbase = \"5s\"\ncap = \"4s\"", &["retry.cap", "found 4s", "base"]),
        ("[destinations.support.retry]\nmax_age = \"0s\"", &["retry.max_age", "found \"0s\""]),
        (
            "[destinations.support.retry]\nmax_age = \"60s\"\nmax_retry_after = \"61s\"",
            &["retry.max_retry_after", "found 61s", "max_age"],
        ),
        ("[destinations.support.headers]\nhost = \"x\"", &["headers.host", "written by Postrider"]),
        (
            "[destinations.support.headers]\nWebhook-Id = \"x\"",
            &["headers.Webhook-Id", "written by Postrider"],
        ),
        ("[destinations.support.headers]\n\"x y\" = \"x\"", &["headers.\"x y\"", "not a valid header name"]),
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
    assert_each_is_named(cases);
}

#[test]
fn every_problem_is_reported_at_once_with_its_line() {
    let text = "[pools]\nparsers = 0\n\n[batch]\nmessages = 5\n  max_messages = \"a\"\n\n[feeds.a]\nformat = \"text\"\n";
    let error = check(text).unwrap_err();
    let lines: Vec<_> = error.to_string().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 5, "{error}");
    assert!(lines[0].starts_with("test.toml:2:1: pools.parsers: found 0; "), "{error}");
    assert!(lines[1].starts_with("test.toml:5:1: batch.messages: unknown key; did you mean `max_messages`?"));
    assert!(lines[2].starts_with("test.toml:6:3: batch.max_messages: found \"a\"; "), "{error}");
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
    assert_eq!(check("[feeds.\"*\"]\nsettle = -1").unwrap_err().list.len(), 1);
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
        ("[destinations.support]\nbearer = \"whsec_c2VjcmV0\"", "bearer"),
        ("[destinations.support]\nbasic = \"user:c2VjcmV0\"", "basic"),
        ("[destinations.support]\nclient_cert_file = \"/c\"\nclient_key = \"c2VjcmV0\"", "client_key"),
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
    assert_eq!(config.destination("support").unwrap().rate_per_s, 100);
    let west = config.destination("eu-west").unwrap();
    assert!(west.paused);
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
        "[outbox]\nhigh_watermark = 100\n[destinations.a]\nurl=\"http://h\"\nsecrets=[]\nretry.max_age = \"60s\"",
    )
    .unwrap();
    assert_eq!(config.alarms.depth.max_messages, 75);
    assert_eq!(config.destinations[0].retry.max_retry_after, Duration::from_mins(1));
}

#[test]
fn s2_8_the_alarms_are_preset_with_the_seeds_numbers() {
    let alarms = check("").unwrap().alarms;
    assert_eq!(alarms.failures.max_percent, 5);
    assert_eq!(alarms.latency.max, Duration::from_mins(5));
    assert_eq!(alarms.dead.max_messages, 0);
    // The seed's depth of 1000 is for a queue that should be empty: see default.toml.
    assert_eq!(alarms.depth.max_messages, 1_500_000);
}

#[test]
fn the_ops_server_is_on_loopback_until_another_place_is_made_safe() {
    assert_eq!(check("").unwrap().ops.listen, Some(OPS_LISTEN));
    assert_eq!(check("[ops]\nlisten = \"\"").unwrap().ops.listen, None);
    let safe = "[ops]\nlisten = \"0.0.0.0:9464\"\nview_token = \"env:V\"\ntls_cert_file = \"/c\"\ntls_key = \"env:K\"";
    assert!(check(safe).is_ok());
    let ops = check("[ops]\nlisten = \"[::1]:9464\"\nallowed_hosts = [\"Metrics.Internal\"]").unwrap().ops;
    assert_eq!(ops.listen, Some("[::1]:9464".parse().unwrap()));
    assert_eq!(ops.allowed_hosts, ["metrics.internal"]);
}

#[test]
fn own_keys_lie_over_shared_ones() {
    let config = check(
        "[destinations.\"*\"]\nburst = 7\ntemplate = \"{{ id }}\"\nretry.base = \"2s\"\nheaders.x-a = \"1\"\n\
         [destinations.a]\nurl=\"http://h\"\nsecrets=[]\nretry.cap = \"3s\"\ntemplate_file = \"/t\"\n\
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
    assert_eq!(format("t"), Format::Text);
    assert_eq!(format("c"), Format::Csv { delimiter: b';', recipient: "id".into() });
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

    let login = |keys: &str| {
        let text = format!("[destinations.a]\nurl=\"http://h\"\nsecrets=[]\n{keys}");
        check(&text).unwrap().resolve_with(|name| match name {
            "TOKEN" => Some("t0ken".into()),
            "LOGIN" => Some("Aladdin:open sesame".into()),
            _ => None,
        })
    };
    for (keys, value) in [
        ("bearer=\"env:TOKEN\"", "Bearer t0ken"),
        // RFC 7617, section 2.
        ("basic=\"env:LOGIN\"", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
    ] {
        let resolved = login(keys).unwrap();
        let (name, header) = &resolved.materials["a"].headers[0];
        assert_eq!((name.as_str(), header.expose_secret()), ("authorization", value));
        let shown = format!("{resolved:?}");
        assert!(!shown.contains("t0ken") && !shown.contains("sesame") && !shown.contains("QWxh"), "{shown}");
    }
    let error = login("basic=\"env:TOKEN\"").unwrap_err().to_string();
    assert!(error.contains("write USER:PASSWORD") && !error.contains("t0ken"), "{error}");

    let bad = format!(
        "[destinations.a]\nurl=\"http://h\"\nsecrets=[\"env:NONE\", \"file:{empty}\", \"credential:none\", \
         \"env:BAD\"]\ntemplate_file=\"{broken}\"\nca_file=\"{secret}\"\nheaders.x-a=\"env:LINES\""
    );
    let error = check(&bad).unwrap().resolve_with(environment).unwrap_err();
    assert_eq!(error.list.len(), 7, "{error}");
    for part in
        ["NONE; the variable is not set", "nothing in it", "No such file", "base64", "not a valid template"]
    {
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
    /// Whatever the value of whatever key, reading ends with a configuration or with problems.
    #[test]
    fn anything_is_read_or_refused_without_a_panic(
        section in "(pools|batch|feeds|destinations|feeds\\.a|destinations\\.support|destinations\\.\"\\*\"|x)",
        key in "(parsers|max_row|path|url|secrets|retry|headers|destinations|format|[a-z\"]{1,6})",
        value in "(-?[0-9]{1,40}|\"[^\"\\\\]{0,20}\"|true|\\[[0-9,]{0,5}\\]|\\{ a = 1 \\}|1\\.5|1979-05-27)",
    ) {
        let _ = check(&format!("[{section}]\n{key} = {value}\n"));
        let name = format!("POSTRIDER__{}__{}", section.replace('.', "__"), key.to_uppercase());
        let _ = with_environment(MINIMAL, &[(&name, &value)]);
    }

    /// A time, however it is written, is the same time.
    #[test]
    fn a_time_reads_back_from_how_it_is_shown(millis in 100u64..600_000) {
        let timeout = Duration::from_millis(millis);
        for written in [show_duration(timeout), format!("{millis}ms")] {
            let config = check(&format!("shutdown.timeout = {written:?}")).unwrap();
            prop_assert_eq!(config.shutdown.timeout, timeout);
        }
    }

    /// The same of a size.
    #[test]
    fn a_size_reads_back_from_how_it_is_shown(bytes in 16u64..16 << 20) {
        for written in [show_size(bytes), format!("{bytes}B")] {
            let config = check(&format!("[feeds.\"*\"]\nmax_row = {written:?}\n[feeds.a]\npath = \"/a\"\n\
                format = \"text\"\ndestinations = [\"d\"]\n[destinations.d]\nurl = \"http://h\"\nsecrets = []")).unwrap();
            prop_assert_eq!(config.feeds[0].max_row as u64, bytes);
        }
    }

    /// A number within its range is taken unchanged; outside it is refused.
    #[test]
    fn ranges_hold_at_their_ends(number in prop_oneof![Just(0i64), Just(1), Just(64), Just(65), any::<i64>()]) {
        let result = check(&format!("[pools]\nparsers = {number}"));
        match usize::try_from(number) {
            Ok(parsers) if (1..=64).contains(&parsers) => prop_assert_eq!(result.unwrap().pools.parsers, parsers),
            _ => prop_assert_eq!(result.unwrap_err().list.len(), 1),
        }
    }
}

#[test]
fn commands_that_read_need_the_part_that_says_where_the_store_is() {
    let parse = |text: &str| super::parse_for_store(text, Path::new("test.toml"), []);
    let broken = "[state]\ndir = \"/srv/state\"\n[feeds.a]\nrescan = \"sometimes\"\n[destinations.d]\nno_such_key = 1\n[no_table]";
    let (config, elsewhere) = parse(broken).unwrap();
    assert_eq!(config.state.dir, Path::new("/srv/state"));
    assert!(elsewhere.len() >= 3, "{elsewhere:?}");
    for text in
        ["[state]\ndir = \"here\"", "profile = \"gcp\"", "[ledger]\nkind = 1", "[state]\ndri = \"/x\"", "= 1"]
    {
        assert!(parse(text).is_err(), "{text}");
    }
    assert!(parse("").unwrap().1.is_empty());
}
