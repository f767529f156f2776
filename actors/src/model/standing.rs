//! How the process that sends stands, as it notes it every second for whoever asks: a command, the operator page.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    ids::FileId,
    outcome::{Attempt, Reason},
    time::{UnixMs, rfc3339},
    traffic::brake::Brake,
};

/// The longest text of an answer that is kept, in bytes.
pub const ANSWER_BYTES_MAX: usize = 200;

/// How much of a line is looked at for that.
const LINE_BYTES_MAX: usize = 16 << 10;

/// How a process stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// Each destination that it sends to.
    pub destinations: BTreeMap<String, TrafficStanding>,
    /// The pace of files that are on their way: messages that got their final state per second, lately.
    pub files: BTreeMap<FileId, f64>,
    /// Feeds that wait for room, since when, and the destinations that hold them up.
    pub waiting: BTreeMap<String, (UnixMs, Vec<String>)>,
    /// Engines that don't do what is asked of them, since when, and what they said last.
    pub engines: BTreeMap<String, (UnixMs, String)>,
    /// The actors that have something to do.
    pub actors: Vec<ActorStanding>,
}

/// How busy an actor is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorStanding {
    /// Its place in the tree: the actors of a pool share it.
    pub path: String,
    /// What it is.
    pub name: String,
    /// How much of the last seconds its code ran.
    pub busy_percent: u32,
    /// Messages that wait for it.
    pub waiting: usize,
}

/// How busy the least busy actor of a pool of `size` actors is, in percent; of several such pools, the busiest one. `None`: in
/// none of them has every actor something to do.
pub fn least_busy(actors: &[ActorStanding], name: &str, size: usize) -> Option<u32> {
    let mut pools: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for actor in actors.iter().filter(|actor| actor.name == name) {
        pools.entry(&actor.path).or_default().push(actor.busy_percent);
    }
    let full = pools.into_values().filter(|pool| pool.len() >= size);
    full.filter_map(|pool| pool.into_iter().min()).max()
}

/// How a destination's traffic stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrafficStanding {
    /// Requests that may be in flight.
    pub limit: usize,
    /// The most that the limit can become.
    pub limit_max: usize,
    /// Whether the limit is found by itself.
    pub is_found: bool,
    /// What keeps messages from going at once, and since when.
    pub brake: Option<(Brake, UnixMs)>,
    /// Since when nothing but single messages go there, to probe.
    pub open_since: Option<UnixMs>,
    /// Before when nothing goes: the next probe, or what the receiver has asked for.
    pub paused_until: Option<UnixMs>,
    /// Tokens for retries.
    pub retry_tokens: u64,
    /// Messages that got their final state per second, lately.
    pub per_s: f64,
    /// The most that it was lately, long after it stands.
    pub pace: f64,
    /// The share of the attempts, lately, after which a message waits for another one.
    #[serde(default)]
    pub retry_share: f64,
    /// Requests in flight.
    pub in_flight: usize,
    /// How long an answer takes when the receiver is not busy, in milliseconds, if that is known.
    pub answer_ms: Option<f64>,
    /// How the last attempt that failed did so.
    pub last_error: Option<LastError>,
}

/// How an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// When, with which status, and why.
    #[serde(flatten)]
    pub attempt: Attempt,
    /// The first line of the answer; it is the receiver's own, so it is escaped where it is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl LastError {
    /// The status, or why there was none.
    pub fn word(&self) -> String {
        match self.attempt {
            Attempt { status: 0, reason, .. } => reason.as_str().to_owned(),
            Attempt { status, reason: Reason::Status, .. } => status.to_string(),
            Attempt { status, reason, .. } => format!("{status} {}", reason.as_str()),
        }
    }

    /// For programs.
    pub fn view(&self) -> Value {
        let Attempt { at, status, reason } = self.attempt;
        json!({
            "at": rfc3339(at),
            "status": (status != 0).then_some(status),
            "reason": reason.as_str(),
            "text": self.text,
        })
    }
}

/// The first line of an answer that says something, cut to what is kept of it. It is stored and shown: what is secret of the
/// request is left out, should the receiver repeat it (I10), and so is NUL, which not every store takes.
pub fn first_line(body: &[u8], secrets: &[String]) -> Option<String> {
    let text = String::from_utf8_lossy(body);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    // Before it is cut: half a secret is one too.
    let mut line = line[..line.floor_char_boundary(LINE_BYTES_MAX)].replace('\0', "\u{fffd}");
    for secret in secrets {
        line = line.replace(secret, "***");
    }
    line.truncate(line.floor_char_boundary(ANSWER_BYTES_MAX));
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_named_by_its_status_or_by_its_reason() {
        let word = |status, reason| {
            LastError { attempt: Attempt { at: UnixMs(0), status, reason }, text: None }.word()
        };
        assert_eq!(word(503, Reason::Status), "503");
        assert_eq!(word(0, Reason::Timeout), "timeout");
        assert_eq!(word(207, Reason::Protocol), "207 protocol");
    }

    #[test]
    fn of_an_answer_the_first_line_is_kept_that_says_something() {
        let first_line = |body: &[u8]| first_line(body, &["s3cret-t0ken".to_owned()]);
        assert_eq!(first_line(b"\r\n  down for repair \r\nmore"), Some("down for repair".into()));
        assert_eq!(first_line(b"no such token: s3cret-t0ken\0"), Some("no such token: ***\u{fffd}".into()));
        let at_the_cut = format!("{}s3cret-t0ken", "x".repeat(ANSWER_BYTES_MAX - 6));
        assert_eq!(first_line(at_the_cut.as_bytes()).map(|line| line.contains("s3")), Some(false));
        assert_eq!(first_line(b" \n\n"), None);
        let long = "é".repeat(ANSWER_BYTES_MAX);
        let kept = first_line(long.as_bytes()).expect("it says something");
        assert!(kept.len() <= ANSWER_BYTES_MAX && long.starts_with(&kept), "{kept}");
        assert_eq!(first_line(b"\xff{"), Some("\u{fffd}{".into()));
    }

    #[test]
    fn a_pool_is_as_busy_as_the_least_busy_of_its_actors() {
        let actor = |path: &str, busy_percent| ActorStanding {
            path: path.into(),
            name: "parser".into(),
            busy_percent,
            waiting: 0,
        };
        let actors = [actor("a", 90), actor("a", 70), actor("b", 99), actor("c", 40), actor("c", 50)];
        assert_eq!(least_busy(&actors, "parser", 2), Some(70));
        assert_eq!(least_busy(&actors, "parser", 1), Some(99));
        assert_eq!((least_busy(&actors, "parser", 3), least_busy(&actors, "batcher", 1)), (None, None));
    }

    #[test]
    fn what_was_noted_reads_back() {
        let error = LastError {
            attempt: Attempt { at: UnixMs(5), status: 503, reason: Reason::Status },
            text: Some("down".into()),
        };
        let traffic = TrafficStanding {
            brake: Some((Brake::Rate, UnixMs(7))),
            last_error: Some(error),
            per_s: 1.5,
            ..TrafficStanding::default()
        };
        let standing = Standing {
            destinations: [("d".to_owned(), traffic)].into(),
            files: [(FileId([3; 16]), 2.5)].into(),
            waiting: [("f".to_owned(), (UnixMs(1), vec!["d".to_owned()]))].into(),
            engines: [("SQS".to_owned(), (UnixMs(2), "no answer".to_owned()))].into(),
            actors: vec![ActorStanding {
                path: "root/sweeper".into(),
                busy_percent: 3,
                ..ActorStanding::default()
            }],
        };
        let text = serde_json::to_string(&standing).unwrap();
        assert_eq!(serde_json::from_str::<Standing>(&text).unwrap(), standing, "{text}");
    }
}
