//! How a log line looks.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use tracing::{
    Event, Level, Subscriber, callsite,
    field::{Field, Visit},
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{Format, Json, JsonFields, Writer},
    },
    registry::LookupSpan,
};

use postrider_settings::escape::{escape, push_value};

use super::limit::{Admission, Limiter};

/// The longest line in bytes. The journal splits lines at 48 KiB (journald.conf(5), `LineMax=`).
const LINE_BYTES_MAX: usize = 32 << 10;

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// With time, for people.
    Text { has_colors: bool },
    /// Without time, with the priority prefix of sd-daemon(3).
    Journald,
    /// One object.
    Json,
}

/// What one place in the code logs.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct LogSite(callsite::Identifier);

pub(super) type SharedLimiter = Arc<Mutex<Limiter<LogSite>>>;

/// Writes events as lines, within each place's quota.
pub(super) struct Lines {
    style: Style,
    limiter: SharedLimiter,
    json: Format<Json>,
}

impl Lines {
    pub(super) fn new(style: Style, limiter: SharedLimiter) -> Self {
        let json = Format::default().json().flatten_event(true).with_current_span(false).with_span_list(true);
        Self { style, limiter, json }
    }
}

/// A line that says how many were kept back at a place.
pub(super) fn suppressed_line(style: Style, place: &LogSite, lines: u64) -> String {
    let metadata = place.0.0.metadata();
    let message = "lines were kept back: this place logs more than a line per second";
    let at = metadata.line().unwrap_or(0).into();
    own_line(style, *metadata.level(), metadata.target(), message, &[("suppressed", lines), ("line", at)])
}

/// A line that says how many are missing in its place.
pub(super) fn dropped_line(style: Style, lines: u64) -> String {
    let message = "lines are missing here: whoever reads the log does not keep up";
    own_line(style, Level::WARN, module_path!(), message, &[("dropped", lines)])
}

/// A line about the log itself.
fn own_line(style: Style, level: Level, target: &str, message: &str, fields: &[(&str, u64)]) -> String {
    if style == Style::Json {
        let mut line = serde_json::json!({
            "timestamp": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "level": level.as_str(),
            "target": target,
            "message": message,
        });
        for (name, value) in fields {
            line[name] = (*value).into();
        }
        return format!("{line}\n");
    }
    let mut line = String::new();
    push_head(&mut line, style, level);
    // Writing to a String can't fail.
    let _ = write!(line, "{target}: {message}");
    for (name, value) in fields {
        let _ = write!(line, " {name}={value}");
    }
    line.push('\n');
    line
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        // More than `info` is set by an operator who is looking for something.
        if *metadata.level() <= Level::INFO {
            let place = LogSite(metadata.callsite());
            let admission = {
                // Nothing can panic while it is held, so a poisoned lock holds sound buckets.
                let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
                limiter.admit(&place, super::mono_ms())
            };
            match admission {
                Admission::Suppress => return Ok(()),
                Admission::Write(reports) => {
                    for (place, lines) in reports {
                        writer.write_str(&suppressed_line(self.style, &place, lines))?;
                    }
                }
            }
        }
        if self.style == Style::Json {
            return self.json.format_event(context, writer, event);
        }
        let mut line = String::with_capacity(256);
        push_head(&mut line, self.style, *metadata.level());
        for span in context.event_scope().into_iter().flat_map(tracing_subscriber::registry::Scope::from_root)
        {
            line.push_str(span.name());
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                line.push('{');
                line.push_str(fields);
                line.push('}');
            }
            line.push_str(": ");
        }
        line.push_str(metadata.target());
        line.push(':');
        event.record(&mut FieldWriter { line: &mut line });
        cut(&mut line, LINE_BYTES_MAX);
        line.push('\n');
        writer.write_str(&line)
    }
}

fn push_head(line: &mut String, style: Style, level: Level) {
    // Writing to a String can't fail.
    let _ = match style {
        Style::Journald => write!(line, "<{}>", priority(level)),
        Style::Text { has_colors } => {
            let now = humantime::format_rfc3339_millis(SystemTime::now());
            let (on, off) = if has_colors { (color(level), "\x1b[0m") } else { ("", "") };
            write!(line, "{now} {on}{level:>5}{off} ")
        }
        Style::Json => Ok(()),
    };
}

/// syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn color(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[2m",
    }
}

fn cut(line: &mut String, bytes_max: usize) {
    if line.len() > bytes_max {
        line.truncate(line.floor_char_boundary(bytes_max));
        line.push('…');
    }
}

/// Formats the fields of spans, for `Text` and `Journald`.
pub(super) struct SpanFields;

impl<'writer> FormatFields<'writer> for SpanFields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = String::new();
        fields.record(&mut FieldWriter { line: &mut line });
        writer.write_str(line.trim_start())
    }
}

/// Formats the fields of spans, for `Json`.
pub(super) fn json_fields() -> JsonFields {
    JsonFields::new()
}

struct FieldWriter<'a> {
    line: &'a mut String,
}

impl FieldWriter<'_> {
    fn push(&mut self, field: &Field, value: &str) {
        self.line.push(' ');
        if field.name() == "message" {
            self.line.push_str(&escape(value));
        } else {
            self.line.push_str(field.name());
            self.line.push('=');
            push_value(self.line, value);
        }
    }
}

impl Visit for FieldWriter<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(error) = source {
            // Writing to a String can't fail.
            let _ = write!(text, ": {error}");
            source = error.source();
        }
        self.push(field, &text);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::{Layer as _, fmt::MakeWriter, layer::SubscriberExt as _};

    use super::*;
    use crate::telemetry::limit::Quota;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Captured {
        type Writer = Self;
        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// What `log` writes in a style.
    fn written(style: Style, log: impl FnOnce()) -> String {
        let captured = Captured::default();
        let limiter = Arc::new(Mutex::new(Limiter::new(Quota { burst: 2, per_s: 1 })));
        let layer = super::super::layer(style, limiter, captured.clone()).boxed();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn hostile() {
        let name = "a\n<0>EMERG forged\x1b[2J\u{9b}\u{2028}b.csv";
        let span = tracing::info_span!("feed", feed = "alerts", file = %name);
        let _entered = span.enter();
        tracing::warn!(rows = 3, file = %name, empty = "", "refused {name}");
    }

    #[test]
    fn f27_a_hostile_name_can_not_forge_a_line() {
        for style in [Style::Text { has_colors: false }, Style::Journald, Style::Json] {
            let text = written(style, hostile);
            assert_eq!(text.matches('\n').count(), 1, "{style:?}: {text}");
            assert!(!text.contains('\x1b'), "{style:?}: {text}");
            assert!(!text.trim_end().contains(|char: char| char < ' '), "{style:?}: {text}");
        }
        let text = written(Style::Journald, hostile);
        assert!(text.starts_with("<4>feed{feed=alerts file=\"a\\n<0>EMERG forged\\u{1b}[2J"), "{text}");
        assert!(text.contains(": refused a\\n<0>EMERG") && text.contains(" rows=3 file=\"a\\n"), "{text}");
        assert!(text.ends_with(" empty=\"\"\n"), "{text}");
    }

    /// What a stage logs is text: the `Debug` of a text would be quoted once by itself and once here.
    #[test]
    fn a_value_is_quoted_once() {
        let exit = postrider_actors::supervision::Exit::Failed("the \"store\" said no".into());
        let text = written(Style::Journald, || tracing::warn!(exit = exit.as_str(), why = exit.why(), "x"));
        assert!(text.ends_with("exit=failed why=\"the \\\"store\\\" said no\"\n"), "{text}");
    }

    #[test]
    fn json_lines_parse() {
        let line: serde_json::Value = serde_json::from_str(&written(Style::Json, hostile)).unwrap();
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["rows"], 3);
        assert_eq!(line["spans"][0]["feed"], "alerts");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let text = written(Style::Journald, || {
            for step in 0..5 {
                tracing::error!(step, "again");
            }
        });
        assert_eq!(text.lines().count(), 2, "{text}");
        let text = written(Style::Journald, || {
            for step in 0..5 {
                tracing::debug!(step, "asked for");
            }
        });
        assert_eq!(text.lines().count(), 5, "{text}");
    }

    #[test]
    fn a_report_of_what_was_kept_back_is_a_line_of_its_style() {
        let callsite = tracing::callsite!(name: "x", kind: tracing::metadata::Kind::EVENT, fields: );
        let place = LogSite(callsite::Identifier(callsite));
        let line = suppressed_line(Style::Journald, &place, 7);
        assert!(line.starts_with('<') && line.contains("suppressed=7") && line.ends_with('\n'), "{line}");
        let line: serde_json::Value = serde_json::from_str(&suppressed_line(Style::Json, &place, 7)).unwrap();
        assert_eq!(line["suppressed"], 7);
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let text = written(Style::Journald, || tracing::info!("{}", "ü".repeat(LINE_BYTES_MAX)));
        assert!(text.len() <= LINE_BYTES_MAX + "…\n".len() && text.ends_with("…\n"));
    }
}
