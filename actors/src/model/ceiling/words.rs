//! A ceiling in words: one line that says what binds, one that says what to do about it.

use std::fmt;

use serde_json::{Value, json};

use super::{Cause, Ceiling, RateOf};
use crate::model::{
    finish::{Punctuality, Rough, Thousands},
    hold::HoldCause,
    standing::LastError,
    time::{UnixMs, rfc3339},
    window,
};

/// The reasons that `postrider pause` and `hold` give where nobody has given one.
pub const PAUSED: &str = "paused by an operator";
/// See [`PAUSED`].
pub const HELD: &str = "held by an operator";

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Done => f.write_str("nothing: all is sent"),
            Cause::NoFiles => f.write_str("no files"),
            Cause::NotRunning => f.write_str("no daemon is running"),
            Cause::Engine { name, reason } => write!(f, "{name} is away{}: {reason}", self.lasting()),
            Cause::Disk(disk) => write!(f, "disk {} % ({})", disk.percent, disk.path),
            Cause::Parked { feed, reason } => write!(f, "feed {feed} parked{}: {reason}", self.begun()),
            Cause::Unreadable { reason } => write!(f, "held{}: {reason}", self.begun()),
            Cause::Failed { reason } => write!(f, "failed: {reason}"),
            Cause::Watermark { destinations, behind } => {
                write!(f, "watermark: waiting for {}", destinations.join(", "))?;
                behind.as_ref().map_or(Ok(()), |behind| write!(f, " ({behind})"))
            }
            Cause::Reading => f.write_str("reading"),
            Cause::NotConfigured => f.write_str("the configuration has no such destination"),
            Cause::Paused => f.write_str("paused = true"),
            Cause::PausedByOperator { reason } => {
                write!(f, "paused by the operator{}{}", self.begun(), given(reason, PAUSED))
            }
            Cause::Disabled { reason } => write!(f, "disabled{}: {reason}", self.begun()),
            Cause::Blocked { reason } => write!(f, "blocked{}: {reason}", self.begun()),
            Cause::Held { cause, reason } => match cause {
                HoldCause::Canary => write!(f, "canary: {reason}"),
                HoldCause::Ramp => write!(f, "canary passed: {reason}"),
                HoldCause::Errors => write!(f, "canary held: {reason}"),
                HoldCause::Operator => {
                    write!(f, "held by the operator{}{}", self.begun(), given(reason, HELD))
                }
                HoldCause::Cancelled => write!(f, "being cancelled: {reason}"),
            },
            Cause::WindowClosed { opens } => write!(f, "window opens {opens}"),
            Cause::NotBefore => {
                let begins = self.until.map(|until| window::clock(until, self.at));
                write!(f, "not_before = {}", begins.unwrap_or_default())
            }
            Cause::Expired => f.write_str("expired: what is open ends as unsent"),
            Cause::Breaker => {
                write!(f, "breaker open: {}{}", self.error("no answers"), self.lasting())?;
                self.waits(f, ", probe in ", ", probing")
            }
            Cause::RetryAfter => {
                write!(f, "the receiver asks for a pause: {}", self.error("Retry-After"))?;
                self.waits(f, ", again in ", "")
            }
            Cause::Retries { messages } => {
                write!(f, "{} messages have failed and wait to be tried again", Thousands(*messages))?;
                self.waits(f, ", the next in ", "")
            }
            Cause::RetryBudget => {
                f.write_str("too much fails: retries go at 2 per second until more is sent")
            }
            Cause::Rate { per_s, of } => {
                f.write_str(if *of == RateOf::All { "delivery.rate_per_s" } else { "rate_per_s" })?;
                per_s.map_or(Ok(()), |per_s| write!(f, " = {per_s}"))?;
                f.write_str(match of {
                    RateOf::Set => " (set by the operator)",
                    RateOf::File => " of the file or its feed",
                    RateOf::Destination | RateOf::All => "",
                })
            }
            Cause::Limit { limit, max, is_found: true } if limit >= max => {
                write!(f, "concurrency_max = {max}")
            }
            Cause::Limit { limit, is_found: true, .. } => write!(f, "limit found by itself: {limit}"),
            Cause::Limit { limit, max, .. } if limit < max => {
                write!(f, "slow start: {limit} of concurrency = {max}")
            }
            Cause::Limit { limit, .. } => write!(f, "concurrency = {limit}"),
            Cause::Pool { limit } => write!(f, "delivery.concurrency = {limit}"),
            Cause::OnTheirWay => f.write_str("nothing: messages are on their way"),
        }
    }
}

/// A reason, unless it is the one that stands where nobody has given any.
fn given(reason: &str, otherwise: &str) -> String {
    if reason == otherwise { String::new() } else { format!(": {reason}") }
}

impl Ceiling {
    /// `, 14:02 UTC`.
    fn begun(&self) -> String {
        self.since.map(|since| format!(", {}", window::clock(since, self.at))).unwrap_or_default()
    }

    /// ` for 42 s`.
    fn lasting(&self) -> String {
        self.since.map(|since| format!(" for {}", Rough(self.at.since(since)))).unwrap_or_default()
    }

    fn waits(&self, f: &mut fmt::Formatter<'_>, more: &str, over: &str) -> fmt::Result {
        match self.until.filter(|until| *until > self.at) {
            Some(until) => write!(f, "{more}{}", Rough(until.since(self.at))),
            None => f.write_str(over),
        }
    }

    fn error(&self, unknown: &str) -> String {
        self.last_error.as_ref().map_or_else(|| unknown.to_owned(), LastError::word)
    }

    /// Why, in the words of who or what is the reason, if it has some.
    pub fn reason(&self) -> Option<&str> {
        match &self.cause {
            Cause::Engine { reason, .. }
            | Cause::Parked { reason, .. }
            | Cause::Unreadable { reason }
            | Cause::Failed { reason }
            | Cause::PausedByOperator { reason }
            | Cause::Disabled { reason }
            | Cause::Blocked { reason }
            | Cause::Held { reason, .. } => Some(reason),
            _ => None,
        }
    }

    /// Whether it will be done in time, if it is to be done by some time and that is in question.
    pub fn warning(&self) -> Option<String> {
        let (by, punctuality) = self.finish_by?;
        let clock = |at| window::clock(at, self.at);
        match punctuality {
            Punctuality::InTime | Punctuality::Unknown { latest: None } => None,
            Punctuality::Late if self.cause == Cause::Done => Some(format!("was not done by {}", clock(by))),
            Punctuality::Late => Some(format!("will not be done by {}", clock(by))),
            Punctuality::Unknown { latest: Some(latest) } => {
                Some(format!("must go on by {} to be done by {}", clock(latest), clock(by)))
            }
        }
    }

    /// The word for programs.
    pub fn word(&self) -> &'static str {
        match &self.cause {
            Cause::Done => "done",
            Cause::NoFiles => "no-files",
            Cause::NotRunning => "not-running",
            Cause::Engine { .. } => "engine",
            Cause::Disk(_) => "disk",
            Cause::Parked { .. } => "parked",
            Cause::Unreadable { .. } => "unreadable",
            Cause::Failed { .. } => "failed",
            Cause::Watermark { .. } => "watermark",
            Cause::Reading => "reading",
            Cause::NotConfigured => "not-configured",
            Cause::Paused | Cause::PausedByOperator { .. } => "paused",
            Cause::Disabled { .. } => "disabled",
            Cause::Blocked { .. } => "blocked",
            Cause::Held { cause: HoldCause::Canary | HoldCause::Ramp | HoldCause::Errors, .. } => "canary",
            Cause::Held { .. } => "held",
            Cause::WindowClosed { .. } => "window",
            Cause::NotBefore => "not_before",
            Cause::Expired => "expired",
            Cause::Breaker => "breaker",
            Cause::RetryAfter => "retry-after",
            Cause::Retries { .. } => "retries",
            Cause::RetryBudget => "retry-budget",
            Cause::Rate { .. } => "rate_per_s",
            Cause::Limit { .. } => "concurrency",
            Cause::Pool { .. } => "pool",
            Cause::OnTheirWay => "on-their-way",
        }
    }

    /// What to do about it; nothing where nothing is to be done.
    pub fn remedy(&self) -> Option<String> {
        let destination = self.destination.as_deref().unwrap_or("NAME");
        let file = self.file.as_deref().unwrap_or("FILE");
        Some(match &self.cause {
            Cause::Done
            | Cause::Reading
            | Cause::OnTheirWay
            | Cause::Expired
            | Cause::Held { cause: HoldCause::Canary | HoldCause::Ramp | HoldCause::Cancelled, .. } => {
                return None;
            }
            Cause::NoFiles => "rename a finished file into the directory of a feed".to_owned(),
            Cause::NotRunning => "start it: systemctl start postrider, or postrider run".to_owned(),
            Cause::Engine { name, .. } => {
                format!(
                    "Postrider goes on by itself once {name} answers; try it: postrider check-config --connect"
                )
            }
            Cause::Disk(disk) => format!("make room at {}; Postrider goes on by itself", disk.path),
            Cause::Parked { .. } => {
                "put that right; the feed is tried again once a minute at least".to_owned()
            }
            Cause::Unreadable { .. } => "put that right; the file is tried again when it changes".to_owned(),
            Cause::Failed { .. } => "put the file right and drop it again".to_owned(),
            Cause::Watermark { behind, .. } => {
                let goes_on = "it goes on at three quarters of outbox.high_watermark";
                behind.as_ref().and_then(|behind| behind.remedy()).unwrap_or_else(|| goes_on.to_owned())
            }
            Cause::NotConfigured => {
                format!(
                    "add [destinations.{destination}] and postrider reload, or postrider cancel the files"
                )
            }
            Cause::Paused => {
                format!("remove `paused` from [destinations.{destination}], then postrider reload")
            }
            Cause::PausedByOperator { .. } => format!("postrider resume {destination}"),
            Cause::Disabled { .. } => format!(
                "put secret, address or template of [destinations.{destination}] right, postrider reload, then \
                 postrider resume {destination}"
            ),
            Cause::Blocked { .. } => format!(
                "correct `url` of [destinations.{destination}], or allow that network in `allow`; then postrider reload"
            ),
            Cause::Held { cause: HoldCause::Errors, .. } => format!(
                "see why: postrider dead summary --file {file}; then postrider release {file}, or postrider cancel {file}"
            ),
            Cause::Held { .. } => format!("postrider release {file}"),
            Cause::WindowClosed { .. } | Cause::NotBefore | Cause::RetryAfter => {
                "it goes on by itself".to_owned()
            }
            Cause::Breaker => {
                "the receiver has to answer; single messages probe, and the others follow by themselves"
                    .to_owned()
            }
            Cause::Retries { .. } => format!(
                "they are tried until retry.max_attempts or retry.max_age of [destinations.{destination}]; the last \
                 error says why they failed"
            ),
            Cause::RetryBudget => "look at the receiver: the last error says why so much fails".to_owned(),
            Cause::Rate { of: RateOf::Set, .. } => {
                format!("for more: postrider rate {destination} N, or postrider rate {destination} default")
            }
            Cause::Rate { of: RateOf::Destination, .. } => {
                format!(
                    "for more: postrider rate {destination} N, or rate_per_s of [destinations.{destination}]"
                )
            }
            Cause::Rate { of: RateOf::All, .. } => "for more: rate_per_s of [delivery]".to_owned(),
            Cause::Rate { of: RateOf::File, .. } => {
                "for more, of files to come: rate_per_s of the feed or in FILE.toml".to_owned()
            }
            Cause::Limit { limit, max, is_found: true } if limit >= max => {
                format!("for more: concurrency_max of [destinations.{destination}]")
            }
            Cause::Limit { is_found: true, .. } => {
                "nothing to set: with more requests the receiver answers late or fails".to_owned()
            }
            Cause::Limit { limit, max, .. } if limit < max => {
                "it grows by itself: the receiver was out".to_owned()
            }
            Cause::Limit { .. } => {
                format!("for more: postrider concurrency {destination} auto, or a higher number")
            }
            Cause::Pool { .. } => "for more: concurrency of [delivery]; mind LimitNOFILE".to_owned(),
        })
    }

    /// For programs; times as RFC 3339.
    pub fn view(&self) -> Value {
        let time = |at: Option<UnixMs>| at.map(rfc3339);
        json!({
            "text": self.to_string(),
            "cause": self.word(),
            "since": time(self.since),
            "until": time(self.until),
            "destination": self.destination,
            "last_error": self.last_error.as_ref().map(LastError::view),
            "done_at": time(self.done_at()),
            "finish_by": time(self.finish_by.map(|(by, _)| by)),
            "in_time": match self.finish_by {
                Some((_, Punctuality::InTime)) => Some(true),
                Some((_, Punctuality::Late)) => Some(false),
                _ => None,
            },
            "latest": time(match self.finish_by {
                Some((_, Punctuality::Unknown { latest })) => latest,
                _ => None,
            }),
            "remedy": self.remedy(),
        })
    }
}
