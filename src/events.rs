//! What whoever is on call hears of, outside of this machine: alarms that were raised or cleared, files that are settled.
//! [`waiting`] keeps what has not left yet, [`command`] runs the operator's command; the daemon's announcer sends.

pub(crate) mod command;
pub(crate) mod waiting;

use std::{fs, sync::LazyLock, time::Duration};

use postrider_actors::{
    model::{
        alarm::board::AlarmNote,
        batch::{BatchHeader, RowLayout, put_cell},
        body::BodyTemplate,
        file::DestinationCounts,
        ids::{FileId, MessageId},
        priority::Priority,
        terms::Terms,
        time::{UnixMs, rfc3339},
    },
    sweeper::SettledFile,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::shapes::Alarm;

/// The feed that a template is told an event comes from.
const FEED: &str = "alarms";

/// The longest text of an event, in characters: the cause of an alarm may quote what was found. An event has to fit into a
/// pipe as a whole.
const TEXT_MAX: usize = 2_000;

/// The name of this machine: where several share the work, each has alarms of its own. Empty if it is not known.
static HOST: LazyLock<String> = LazyLock::new(|| {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim_end().to_owned()
});

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// An alarm was raised, or cleared.
    Alarm(AlarmNote),
    /// Every message of a file has its final state.
    Settled(SettledFile),
}

impl Event {
    /// Its type, by which a receiver tells events apart.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Alarm(note) if note.cleared.is_some() => "alarm.cleared",
            Self::Alarm(_) => "alarm.raised",
            Self::Settled(_) => "file.settled",
        }
    }

    fn at(&self) -> UnixMs {
        match self {
            Self::Alarm(note) => note.cleared.unwrap_or(note.since),
            Self::Settled(file) => file.at,
        }
    }

    /// Its `webhook-id`: the same at every try, and another one for whatever happens next. A file is settled again after a
    /// redrive.
    pub(crate) fn id(&self) -> MessageId {
        let subject = match self {
            Self::Alarm(note) => format!("{} {} {}", note.alarm, note.subject, note.since.0),
            Self::Settled(file) => file.file.to_string(),
        };
        let content = format!("{} {} {subject}", self.kind(), self.at().0);
        MessageId { file: FileId::derive(FEED, &Sha256::digest(content).into()), row: 1 }
    }

    /// The facts. Every key is always there, so that a template may name it.
    fn data(&self) -> Value {
        match self {
            Self::Alarm(note) => {
                let mut alarm = Alarm::from(note);
                alarm.text = clipped(&alarm.text);
                // It has nothing but texts, numbers and times.
                serde_json::to_value(alarm).unwrap_or_default()
            }
            Self::Settled(file) => json!({
                "feed": file.feed,
                "name": file.name,
                "file": file.file.to_string(),
                "failed": file.failed.as_deref().map(clipped),
                "rows": file.rows,
                "accepted": file.counts.accepted,
                "sent": file.counts.sent,
                "dead": file.counts.dead,
                "unsent": file.counts.unsent,
                "cancelled": file.counts.cancelled,
                "rejected": file.rejected,
                "duplicates": file.duplicates,
                "balanced": file.is_balanced,
                "took_s": file.took.as_secs_f64(),
            }),
        }
    }

    /// The event as Standard Webhooks recommends it, `{"type":…,"timestamp":…,"data":{…}}`, and from where it is.
    pub(crate) fn json(&self) -> Vec<u8> {
        let event = json!({
            "type": self.kind(),
            "timestamp": rfc3339(self.at()),
            "host": *HOST,
            "data": self.data(),
        });
        event.to_string().into_bytes()
    }

    /// An event of each kind, for a look at what a template makes of them.
    fn samples() -> [Self; 3] {
        let raised = AlarmNote {
            alarm: "dead".into(),
            subject: "support".into(),
            severity: "warning".into(),
            since: UnixMs(0),
            value: Some(1.0),
            threshold: 0.0,
            unit: "messages".into(),
            cause: String::new(),
            remedy: "look".into(),
            cleared: None,
        };
        let cleared = AlarmNote { cleared: Some(UnixMs(1)), ..raised.clone() };
        let settled = SettledFile {
            feed: "alerts".into(),
            name: "a.csv".into(),
            file: FileId([0; 16]),
            at: UnixMs(1),
            failed: None,
            rows: 0,
            rejected: 0,
            duplicates: 0,
            counts: DestinationCounts::default(),
            is_balanced: true,
            took: Duration::ZERO,
        };
        [Self::Alarm(raised), Self::Alarm(cleared), Self::Settled(settled)]
    }
}

/// The beginning of a text.
fn clipped(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

/// How events are rendered for a destination: by its template, or as [`Event::json`].
pub(crate) struct EventBodies {
    template: BodyTemplate,
    header: BatchHeader,
}

impl EventBodies {
    /// The error says why the template can't be compiled.
    pub(crate) fn new(destination: &str, template: Option<&str>, content_type: &str) -> Result<Self, String> {
        let content_type = if template.is_some() { content_type } else { "application/json" };
        let compiled = BodyTemplate::compile(template, content_type).map_err(|error| error.to_string())?;
        let header = BatchHeader {
            feed: FEED.into(),
            destination: destination.into(),
            file: FileId([0; 16]),
            layout: RowLayout::Objects,
            template: None,
            content_type: content_type.to_owned(),
            terms: Terms::default(),
            priority: Priority::Normal,
        };
        Ok(Self { template: compiled, header })
    }

    /// Of every body.
    pub(crate) fn content_type(&self) -> &str {
        &self.header.content_type
    }

    /// The body. A template sees `id`, `feed` ("alarms"), `recipient` (the type) and `data`: the facts, with `type`,
    /// `timestamp` and `host`.
    pub(crate) fn render(&self, event: &Event) -> Result<Vec<u8>, String> {
        if self.template.is_default() {
            return Ok(event.json());
        }
        let mut data = event.data();
        data["type"] = event.kind().into();
        data["timestamp"] = rfc3339(event.at()).into();
        data["host"] = HOST.as_str().into();
        let mut row = Vec::new();
        put_cell(&mut row, event.kind());
        row.extend_from_slice(data.to_string().as_bytes());
        let mut body = Vec::new();
        self.template.check(&self.header, event.id(), &row, &mut body)?;
        Ok(body)
    }

    /// Why there is an event that it can't render.
    pub(crate) fn check(&self) -> Result<(), String> {
        for event in Event::samples() {
            self.render(&event)
                .map_err(|why| format!("it can't render the event {}: {why}", event.kind()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(body: &[u8]) -> Value {
        serde_json::from_slice(body).expect("it is JSON")
    }

    #[test]
    fn an_event_says_what_happened_and_each_has_an_id_of_its_own() {
        let [raised, cleared, settled] = Event::samples();
        let event = parsed(&raised.json());
        assert_eq!(
            (&event["type"], &event["timestamp"]),
            (&"alarm.raised".into(), &"1970-01-01T00:00:00.000Z".into())
        );
        assert!(event["host"].as_str().is_some_and(|host| !host.is_empty()), "{event}");
        let data = &event["data"];
        assert_eq!((&data["alarm"], &data["subject"]), (&"dead".into(), &"support".into()));
        assert_eq!((&data["cleared"], &data["value"]), (&Value::Null, &1.0.into()));
        let event = parsed(&cleared.json());
        assert_eq!(
            (&event["type"], &event["timestamp"]),
            (&"alarm.cleared".into(), &"1970-01-01T00:00:00.001Z".into())
        );
        assert_eq!(event["data"]["since"], "1970-01-01T00:00:00.000Z");
        assert_eq!(parsed(&settled.json())["data"]["name"], "a.csv");
        assert_eq!(raised.id(), raised.clone().id());
        assert!(raised.id() != cleared.id() && cleared.id() != settled.id());
    }

    #[test]
    fn an_event_is_as_short_as_a_pipe_needs_it() {
        let [Event::Alarm(mut note), ..] = Event::samples() else { panic!("the first is an alarm") };
        note.cause = "ä".repeat(100_000);
        assert!(Event::Alarm(note).json().len() < 32 << 10);
    }

    #[test]
    fn a_template_renders_events_and_one_that_is_for_messages_is_found_out() {
        let bodies =
            |template: &str| EventBodies::new("on-call", Some(template), "application/json").unwrap();
        let mut documented = include_str!("../docs/operations.md").lines();
        let line = documented.find(|line| line.starts_with("template = '{\"text\""));
        let table: toml::Table = line.expect("the documentation has an example").parse().unwrap();
        let slack = bodies(table["template"].as_str().unwrap());
        slack.check().unwrap();
        let [raised, _, settled] = Event::samples();
        assert_eq!(
            parsed(&slack.render(&raised).unwrap())["text"],
            "alarm.raised: dead 1 messages, more than 0"
        );
        assert_eq!(parsed(&slack.render(&settled).unwrap())["text"], "file.settled: a.csv");
        let why = bodies(r#"{"to": {{ data.points }}}"#).check().unwrap_err();
        assert!(why.contains("alarm.raised") && why.contains("data.points"), "{why}");
    }
}
