//! The process as a whole: where it keeps things, how much it does at once, how it is watched.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use url::Url;

use crate::{
    address::{FIFO_SUFFIX, QUEUE_NAME_MAX, optional_path, optional_text, required_path, web_address},
    declare::{choice, duration, flag, given, integer, unset},
    destinations::{Rate, optional_secret},
    reader::Section,
    secret::SecretSource,
    tree::shown_text,
};

/// Where batches, their records and the queue are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Everything in SQLite, in the state directory.
    Embedded,
    /// Batches and records in DynamoDB, the queue on SQS.
    Aws,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `journald` if stderr is the journal, else `text`.
    Auto,
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
    /// Text without time, with the priority prefix that the journal reads.
    Journald,
}

impl LogFormat {
    /// The words for them.
    pub const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("text", Self::Text), ("json", Self::Json), ("journald", Self::Journald)];
}

/// The lowest level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Only what needs action.
    Error,
    /// And what may need action soon.
    Warn,
    /// And the milestones of each file.
    Info,
    /// And each batch.
    Debug,
    /// Everything.
    Trace,
}

/// How new entries of the queue are delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DelayMode {
    /// Not at all.
    None,
    /// All alike.
    Fixed,
    /// By how many entries the queue holds.
    ByDepth,
}

crate::settings! {
    /// What holds for the whole process.
    Root {
        /// Where batches, what became of them, and the queue are kept. "embedded" keeps everything in SQLite under
        /// `state.dir`: one machine. "aws" keeps batches in DynamoDB and carries them by SQS, so that any number of
        /// machines share the work.
        profile: Profile = choice(&[("embedded", Profile::Embedded), ("aws", Profile::Aws)]);
    }

    /// Where Postrider keeps its store and the files it works on.
    State {
        /// An absolute path. It should be on the same file system as the feeds: a file is then claimed by a rename,
        /// not by a copy.
        dir: PathBuf = given("\"/var/lib/postrider\"", required_path);
    }

    /// What is logged, and how.
    Log {
        /// Format of log lines. "auto" is "journald" where stderr is the journal, else "text".
        format: LogFormat = choice(LogFormat::WORDS);
        /// The lowest level that is logged. `POSTRIDER_LOG` overrides it by module, for example
        /// `POSTRIDER_LOG=info,postrider_actors::coordinator=debug`.
        level: LogLevel = choice(&[
            ("info", LogLevel::Info),
            ("error", LogLevel::Error),
            ("warn", LogLevel::Warn),
            ("debug", LogLevel::Debug),
            ("trace", LogLevel::Trace),
        ]);
    }

    /// Numbers of workers. A reload changes them.
    Pools {
        /// Parsers per feed: files of one feed that are read at the same time. 1 keeps their order.
        parsers: usize = integer(2, 1..=64, "parsers per feed");
        /// Delivery workers. Each leases batches of its own; all share the limits of `[delivery]`.
        deliveries: usize = integer(2, 1..=64, "delivery workers");
        /// Workers that write into warehouses' tables; none run without a table. The limits on statements are those
        /// of `[warehouses.NAME]`, however many there are.
        tables: usize = integer(2, 1..=64, "workers");
    }

    /// A batch is one row in the store, one lease, one acknowledgement.
    Batch {
        /// Messages per batch: larger batches cost less per message, smaller ones lose less time to a crash. At most
        /// 1000, because each group of outcomes rewrites the whole record of its batch.
        max_messages: u32 = integer(500, 1..=1_000, "messages");
    }

    /// The first messages of a large file go ahead of the others. If too many of them fail, the file is held, with the
    /// reasons in `postrider files`, until somebody releases it; else the others follow, at a growing rate.
    Canary {
        /// Whether large files have one.
        enabled: bool = flag(true);
        /// Rows of a file from which on it is large.
        min_rows: u64 = integer(10_000, 1..=1_000_000_000, "rows");
        /// The first messages of a file, for each of its webhooks …
        messages: u32 = integer(200, 1..=100_000, "messages");
        /// … or so much of the file, whichever is more.
        percent: u32 = integer(1, 0..=100, "per cent");
        /// The file is held if more fail, with a probability of 95 % at least: the lower bound of Wilson's interval counts.
        /// A message has failed if one of its attempts has.
        max_error_percent: u32 = integer(10, 0..=100, "per cent");
        /// How long the rate grows after that, to a thousand times what it began with; then it is limited by nothing but the
        /// destination. "0s": all others follow at once.
        ramp: Duration = duration("30s", "0s"..="1h");
    }

    /// Where accepted batches are kept, with the state of each message.
    Outbox {
        /// Open messages of a destination from which on it is full. A feed's intake pauses while all of its destinations
        /// are: files wait in their directories, which costs nothing. It resumes at three quarters of this. It limits
        /// the store's size, not memory.
        high_watermark: u64 = integer(2_000_000, 1..=1_000_000_000, "messages");
        /// Open messages of one destination at which its feeds pause even if their other destinations have room: how far
        /// a destination that is down may fall behind the others. At least `high_watermark`; a smaller number counts as
        /// that. It limits the store's size: some 100 bytes and its row for each message.
        max_backlog: u64 = integer(20_000_000, 1..=1_000_000_000, "messages");
        /// How long a settled batch is kept after its dispatch; "0s" = for ever. Then its rows are removed:
        /// `postrider messages` no longer finds them and the file's report stays. Rows of dead letters are kept until
        /// they are redriven and sent. At least "1h": a queue may deliver an entry twice.
        retention: Option<Duration> = duration("0s", "0s"..="3650d").or_none();
    }

    /// The tables of `profile = "aws"`. Create them with `postrider migrate` or from config/aws.
    Dynamodb {
        /// The table of the outbox; that of the ledger is TABLE-ledger.
        table: String = given("\"postrider\"", table_name);
        /// Shards that one destination's outstanding batches are spread over in the indexes, so that none is a hot
        /// partition. All machines must use the same; don't change it while batches are outstanding.
        shards: u32 = integer(20, 1..=1_000, "shards");
        /// Shards of the indexes over all destinations: calls that a look at an empty outbox costs.
        scan_concurrency: u16 = integer(4, 1..=64, "shards");
    }

    /// The queues of `profile = "aws"`, one per destination: PREFIX-DESTINATION. Create them with `postrider migrate` or
    /// from config/aws, for a new destination too. The queue for entries that nobody can read is PREFIX-dead-letters.
    Sqs {
        /// What their names begin with. A name has at most 80 characters.
        prefix: String = given("\"postrider\"", queue_prefix);
        /// Whether they are FIFO queues, whose names end in .fifo: batches of one file for one destination then come in
        /// order, and slower.
        fifo: bool = flag(false);
    }

    /// Throttles what is put on the queues of `profile = "aws"`, for receivers that need it beside a rate. Not on FIFO
    /// queues, which have no delay per entry. No delay is ever shortened by it.
    Delay {
        /// Whether entries are delayed, and by what.
        mode: DelayMode = choice(&[
            ("none", DelayMode::None),
            ("fixed", DelayMode::Fixed),
            ("by_depth", DelayMode::ByDepth),
        ]);
        /// The delay of each entry with "fixed". SQS allows no more.
        fixed: Duration = duration("30s", "0s"..="15m");
        /// With "by_depth": pairs of messages of a destination that are due, above which entries are delayed, and for
        /// how long, at most "15m". From the environment: `500:30s,1000:60s`.
        steps: Vec<(u64, Duration)> = given("[[500, \"30s\"], [1000, \"60s\"]]", steps);
    }

    /// How AWS is reached. Credentials come only from where the SDK looks for them: `AWS_ACCESS_KEY_ID` and the like, a
    /// profile, the role of the instance or task. `postrider check-config --connect` tries everything.
    Aws {
        /// The region. Default: from `AWS_REGION`, the profile or the instance.
        region: Option<String> = unset("\"eu-central-1\"", region);
        /// The profile in ~/.aws/config. Default: from `AWS_PROFILE`.
        profile: Option<String> = unset("\"postrider\"", aws_profile);
        /// Another address for SQS: an emulator or a VPC endpoint. `AWS_ENDPOINT_URL_SQS` works too.
        sqs_endpoint_url: Option<Url> = unset("\"http://127.0.0.1:4566\"", web_address);
        /// Another address for DynamoDB. `AWS_ENDPOINT_URL_DYNAMODB` works too.
        dynamodb_endpoint_url: Option<Url> = unset("\"http://127.0.0.1:8000\"", web_address);
        /// Another address for CloudWatch Logs. `AWS_ENDPOINT_URL_CLOUDWATCH_LOGS` works too.
        logs_endpoint_url: Option<Url> = unset("\"http://127.0.0.1:5000\"", web_address);
    }

    /// How long a worker may keep a batch without renewing its lease.
    Lease {
        /// How long a worker may go without renewing its leases before others get its batches; more than twice every
        /// timeout. Workers renew leases as they go; after a crash, batches wait this long. SQS allows no more than
        /// "12h".
        duration: Duration = duration("60s", "1s"..="12h");
    }

    /// How far delivery may run ahead of what is recorded.
    Record {
        /// Unrecorded outcomes above which no new request starts. After a crash at most these and the requests in
        /// flight are repeated.
        max_unrecorded: usize = integer(2_000, 1..=1_000_000, "outcomes");
    }

    /// Limits over all destinations together.
    Delivery {
        /// Requests in flight. Each may hold a connection: mind LimitNOFILE.
        concurrency: usize = integer(512, 1..=65_536, "requests in flight");
        /// Messages per second; 0 = no limit.
        rate_per_s: u32 = integer(0, 0..=10_000_000, "messages per second, 0 = no limit");
        /// Messages that may be sent at once when `rate_per_s` is set.
        burst: u32 = integer(500, 1..=10_000_000, "messages");
    }

    /// How the daemon ends.
    Shutdown {
        /// From SIGTERM to the exit: requests in flight are finished and recorded. Keep it below systemd's
        /// TimeoutStopSec.
        timeout: Duration = duration("25s", "100ms"..="10m");
    }

    /// Where the interface for operators and programs, metrics and health are served. Changes need a restart, not a
    /// reload.
    Ops {
        /// "ADDRESS:PORT"; "" = nowhere. /api/v1 shows everything and takes orders. Prometheus scrapes GET /metrics;
        /// GET /healthz answers what the systemd watchdog gets, GET /readyz whether files are taken. A second daemon
        /// takes the next free port after the default, and says so; another port in use is an error; port 0 takes a free
        /// one. On loopback, whoever is on this machine may see and order everything unless there are tokens; anywhere
        /// else tokens and TLS are required.
        listen: Option<SocketAddr> = given("\"127.0.0.1:9464\"", listen);
        /// Names, up to 16, that requests may call it by beside `listen` itself and localhost, such as the name that
        /// Prometheus is given; without port. Requests for other names are refused, so that no web page can read it
        /// through a name of its own (DNS rebinding).
        allowed_hosts: Vec<String> = given("[]", hosts);
        /// Where the token is kept that allows to look, sent as "Authorization: Bearer TOKEN": "env:NAME", "file:/PATH"
        /// or "credential:NAME". 16 or more visible ASCII characters.
        view_token: Option<SecretSource> = unset("\"credential:ops-view\"", optional_secret);
        /// The same for the token that also allows to give orders.
        operate_token: Option<SecretSource> = unset("\"credential:ops-operate\"", optional_secret);
        /// PEM file of the certificates that the server shows, its own first; an absolute path. With it, it speaks TLS.
        tls_cert_file: Option<PathBuf> = unset("\"/etc/postrider/ops.pem\"", optional_path);
        /// Where their key is kept, in PEM.
        tls_key: Option<SecretSource> = unset("\"credential:ops-key\"", optional_secret);
    }

    /// Alarms, checked every second. Raising and clearing is logged and shown by the metric `postrider_alarm`;
    /// config/alerts.yml has the same rules for Prometheus. An alarm clears at or below 80 per cent of its threshold,
    /// after 60 s; the one on dead letters when its window has passed.
    AlarmEvents {
        /// The destination, of kind = "webhook", that gets an event when an alarm is raised or cleared, and when a file is
        /// settled: `alarm.raised`, `alarm.cleared` and `file.settled` (docs/operations.md). An event is signed and sent as
        /// that destination's messages are, and rendered by its template if it has one, but at once: past its rate, its
        /// queue and a pause. It is tried for some 4 minutes. Give events a destination of their own. None by default.
        events_to: Option<String> = unset("\"on-call\"", optional_text);
        /// A command that is run for each alarm raised or cleared: a list of its absolute path and its arguments, without a
        /// shell. The event is its standard input, in JSON, and POSTRIDER_EVENT, POSTRIDER_ALARM, POSTRIDER_SUBJECT and
        /// POSTRIDER_SEVERITY are in its environment, but nothing secret. Its output is discarded. After 30 s it is killed,
        /// with what it has started. `[]` = none.
        command: Vec<String> = given("[]", command);
    }

    /// Traces for OpenTelemetry: a span for each batch, from its lease to the end of that, and a header `traceparent` (W3C Trace
    /// Context) on its requests. All batches of a file are in one trace, whose id is the file's.
    TracingKeys {
        /// Where a collector takes OTLP over HTTP; /v1/traces is appended. Without it nothing is traced, and no request has the
        /// header. Nothing is taken from OTEL_… variables.
        endpoint: Option<Url> = unset("\"http://127.0.0.1:4318\"", collector);
        /// Files that are traced, of a hundred on average, chosen by their ids: all machines choose alike. Requests of the
        /// others have a `traceparent` that says so.
        sample_percent: u32 = integer(100, 0..=100, "per cent");
    }

    /// The backlog. 1000, a common bound elsewhere, suits a queue that should be empty; here a file of a million rows
    /// is normal, and a backlog close to `outbox.high_watermark`, where intake pauses.
    DepthAlarm {
        /// Open messages above which it is raised, after 60 s. Not more than three quarters of `outbox.high_watermark`
        /// unless you set it. If they can't be counted, it is raised too.
        max_messages: u64 = integer(1_500_000, 0..=1_000_000_000, "messages");
    }

    /// Failures among a destination's attempts, or among the batches sent to the queue; the worst of them counts, if
    /// there were at least 20.
    FailuresAlarm {
        /// Per cent above which it is raised; 100 is never.
        max_percent: u32 = integer(5, 0..=100, "per cent");
        /// The window that is counted.
        window: Duration = duration("5m", "1s"..="1h");
    }

    /// How full the disk of the state directory or of a feed is, as df says it.
    DiskAlarm {
        /// Per cent above which it is raised; it clears at 98 per cent of that. 100 is never: suits a large disk that is
        /// watched otherwise.
        max_percent: u32 = integer(95, 0..=100, "per cent");
    }

    /// Age of the oldest overdue batch, waiting or being sent; a retry counts from its own due time.
    LatencyAlarm {
        /// The age above which it is raised. A file that takes longer to send raises it: set it to the time that your
        /// largest file may take. If the age can't be read, it is raised too.
        max: Duration = duration("5m", "0s"..="30d");
    }

    /// New dead letters: messages given up. It clears after a `window` without any; those that are there stay in
    /// `postrider dead list` until they are redriven.
    DeadAlarm {
        /// Messages given up within `window`, above which it is raised.
        max_messages: u64 = integer(0, 0..=1_000_000_000, "messages");
        /// The window that is counted.
        window: Duration = duration("5m", "1s"..="1h");
    }
}

/// What is watched, every second, and whom that is reported to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alarms {
    /// `[alarms]`
    pub events: AlarmEvents,
    /// `[alarms.depth]`
    pub depth: DepthAlarm,
    /// `[alarms.failures]`
    pub failures: FailuresAlarm,
    /// `[alarms.disk]`
    pub disk: DiskAlarm,
    /// `[alarms.latency]`
    pub latency: LatencyAlarm,
    /// `[alarms.dead]`
    pub dead: DeadAlarm,
}

impl Outbox {
    /// Open messages at which intake goes on: a gap that is wide enough for it not to flap.
    pub fn low_watermark(&self) -> u64 {
        self.high_watermark / 4 * 3
    }
}

impl Dynamodb {
    /// The ledger's table.
    pub fn ledger_table(&self) -> String {
        format!("{}-ledger", self.table)
    }
}

impl Sqs {
    /// The name of the queue of a destination.
    pub fn queue_name(&self, destination: &str) -> String {
        format!("{}-{destination}{}", self.prefix, if self.fifo { FIFO_SUFFIX } else { "" })
    }

    /// The name of the queue for what nobody can read, shared by all of them and of the same kind ("Using dead-letter
    /// queues in Amazon SQS").
    pub fn dead_letters(&self) -> String {
        self.queue_name(DEAD_LETTERS)
    }

    /// Whether SQS allows a queue of that name.
    pub fn has_room_for(&self, destination: &str) -> bool {
        self.queue_name(destination).len() <= QUEUE_NAME_MAX
    }
}

/// The destination that can't be: its queue is for what nobody can read.
pub const DEAD_LETTERS: &str = "dead-letters";

impl Delivery {
    /// The bound on messages per second, if there is one.
    pub fn rate(&self) -> Option<Rate> {
        Rate::new(self.rate_per_s, self.burst)
    }
}

fn queue_prefix(section: &mut Section<'_>, key: &'static str) -> String {
    let is_prefix = |text: &str| {
        (1..QUEUE_NAME_MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    section.checked_text(key, is_prefix, "write 1 to 79 characters out of A-Z, a-z, 0-9, - and _")
}

fn table_name(section: &mut Section<'_>, key: &'static str) -> String {
    // Amazon DynamoDB, "Naming rules": 3 to 255 of these; seven are for `-ledger`.
    let is_name = |name: &str| {
        (3..=248).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let advice = "write a table's name: 3 to 248 characters out of A-Z, a-z, 0-9, -, _ and full stop";
    section.checked_text(key, is_name, advice)
}

fn region(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    word(section, key, "write a region such as \"eu-central-1\"")
}

fn aws_profile(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    word(section, key, "write a profile's name as in ~/.aws/config")
}

fn word(section: &mut Section<'_>, key: &'static str, advice: &str) -> Option<String> {
    let text = section.text(key)?;
    let is_word = (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@+".contains(&byte));
    if !is_word {
        section.reader().note(&section.key(key), Some(shown_text(&text)), advice);
    }
    Some(text)
}

/// Steps of `queue.delay.steps`: few enough to read at a glance.
const STEPS_MAX: usize = 16;

/// The longest delay of an entry (Amazon SQS API reference, `SendMessage`).
const DELAY_MAX: Duration = Duration::from_mins(15);

fn steps(section: &mut Section<'_>, key: &'static str) -> Vec<(u64, Duration)> {
    let Some(pairs) = section.pairs(key) else { return Vec::new() };
    let is_table = (1..=STEPS_MAX).contains(&pairs.len())
        && pairs.iter().all(|&(depth, delay)| depth <= 1_000_000_000 && delay <= DELAY_MAX)
        && pairs.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
    if !is_table {
        let advice = format!(
            "write 1 to {STEPS_MAX} pairs of entries and a time, both ascending, the time at most 15m: \
             [[500, \"30s\"], [1000, \"60s\"]]"
        );
        section.reader().note(&section.key(key), None, advice);
    }
    pairs
}

fn collector(section: &mut Section<'_>, key: &'static str) -> Option<Url> {
    let url = web_address(section, key)?;
    if url.path().trim_end_matches('/').ends_with("/v1/traces") {
        let advice = "write the address without /v1/traces, which is appended";
        section.reader().note(&section.key(key), Some(shown_text(url.as_str())), advice);
    }
    Some(url)
}

/// An address to listen at; `None` for "".
pub fn listen(section: &mut Section<'_>, key: &'static str) -> Option<SocketAddr> {
    let text = section.text(key).unwrap_or_default();
    match text.trim() {
        "" => None,
        address => {
            let parsed = address.parse().ok();
            if parsed.is_none() {
                let advice = "write an IP address and a port, such as \"127.0.0.1:9464\", or \"\"";
                section.reader().note(&section.key(key), Some(shown_text(&text)), advice);
            }
            parsed
        }
    }
}

/// Where the ops server listens by default.
pub const OPS_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);

/// Words of a command: whoever needs more writes a script.
const WORDS_MAX: usize = 32;

fn command(section: &mut Section<'_>, key: &'static str) -> Vec<String> {
    let reader = section.reader();
    let words = section.list(key, true).unwrap_or_default();
    if words.len() > WORDS_MAX {
        let advice = format!("keep to {WORDS_MAX} words");
        reader.note(&section.key(key), Some(words.len().to_string()), advice);
    }
    // A relative path would depend on where the daemon was started, and a bare name on its PATH.
    if let Some((path, program)) = words.first().filter(|(_, program)| !Path::new(program).is_absolute()) {
        let advice = "write the absolute path of a program, such as [\"/usr/local/bin/page-me\"]";
        reader.note(path, Some(shown_text(program)), advice);
    }
    if let Some((path, _)) = words.iter().find(|(_, word)| word.contains('\0')) {
        reader.note(path, None, "a NUL byte ends a word for the system: remove it");
    }
    words.into_iter().map(|(_, word)| word).collect()
}

/// Names that the ops server answers to: a few spellings of one machine.
const HOSTS_MAX: usize = 16;

fn hosts(section: &mut Section<'_>, key: &'static str) -> Vec<String> {
    let reader = section.reader();
    let hosts = section.list(key, true).unwrap_or_default();
    if hosts.len() > HOSTS_MAX {
        let advice = format!("keep to {HOSTS_MAX} names");
        reader.note(&section.key(key), Some(hosts.len().to_string()), advice);
    }
    hosts
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
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b24_a_queue_is_called_after_its_destination() {
        let keys = |fifo| Sqs { prefix: "pr".into(), fifo };
        let (standard, fifo) = (keys(false), keys(true));
        assert_eq!(
            (&standard.queue_name("d")[..], &standard.dead_letters()[..]),
            ("pr-d", "pr-dead-letters")
        );
        assert_eq!(
            (&fifo.queue_name("d")[..], &fifo.dead_letters()[..]),
            ("pr-d.fifo", "pr-dead-letters.fifo")
        );
    }
}
