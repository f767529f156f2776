//! Structured logs on stderr: for people, for the journal or as JSON, escaped and bounded; and panics
//! as events like any other.

mod limit;
mod lines;
mod machine;
mod metered;
pub mod metrics;
mod sink;

use std::{
    backtrace::Backtrace,
    env, fmt,
    io::{self, IsTerminal as _, Write as _},
    panic::{self, PanicHookInfo},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer, filter::ParseError, fmt::MakeWriter, layer::SubscriberExt as _, registry::LookupSpan,
    util::SubscriberInitExt as _,
};

pub use metered::Metered;
pub use postrider_settings::escape::escape;

use self::{
    limit::{Limiter, Quota},
    lines::{Lines, SharedLimiter, SpanFields, Style},
    sink::Sink,
};
use crate::config::{Log, LogFormat, LogLevel};

/// Says what is logged by module, in the syntax of [`EnvFilter`]; wins over `log.level`.
pub const FILTER_VARIABLE: &str = "POSTRIDER_LOG";

/// What one place in the code may log at once, and per second after that: an outage must not fill the disk. What is
/// kept back is counted in the log; debug and trace are asked for and never slowed down.
const QUOTA: Quota = Quota { burst: 50, per_s: 1 };

/// The longest panic message and backtrace that are logged, in bytes.
const PANIC_MESSAGE_BYTES_MAX: usize = 512;
const BACKTRACE_BYTES_MAX: usize = 16 << 10;

/// How long the last lines have to be written when the process ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines go once logs are set up: as global as `tracing`'s own dispatcher.
static SINK: OnceLock<Sink> = OnceLock::new();

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `POSTRIDER_LOG` is not a filter.
    #[error("{FILTER_VARIABLE}={value:?}: {error}; write a level (info) or module=level pairs, by commas")]
    Filter {
        /// What it holds.
        value: String,
        /// What is wrong with it.
        error: ParseError,
    },
    /// Somebody else has set a subscriber up.
    #[error("logs are set up already: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// The system has no thread to spare.
    #[error("the thread that writes logs can't be started: {0}")]
    Thread(#[from] io::Error),
}

/// The logs that are set up. When it is dropped, what was kept back is reported.
#[must_use = "dropping it ends the report of what was kept back"]
pub struct Telemetry {
    style: Style,
    limiter: SharedLimiter,
}

/// Sets up logs and the panic hook for the whole process.
pub fn init(log: &Log) -> Result<Telemetry, TelemetryError> {
    let filter = match env::var(FILTER_VARIABLE) {
        Ok(value) if !value.is_empty() => {
            EnvFilter::try_new(&value).map_err(|error| TelemetryError::Filter { value, error })?
        }
        _ => EnvFilter::new(directives(log.level)),
    };
    let style = style(log.format);
    let limiter = Arc::new(Mutex::new(Limiter::new(QUOTA)));
    let sink = Sink::start(io::stderr(), move |lines| lines::dropped_line(style, lines))?;
    let writer = SINK.get_or_init(|| sink).clone();
    let layer = layer(style, Arc::clone(&limiter), move || writer.clone());
    tracing_subscriber::registry().with(filter).with(layer).try_init()?;
    panic::set_hook(Box::new(log_panic));
    Ok(Telemetry { style, limiter })
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("style", &self.style).finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Writes how many lines were kept back since the last report. Call it every minute or so, for
    /// the case that nothing else is logged.
    pub fn report_suppressed(&self) {
        let reports = self.limiter.lock().unwrap_or_else(PoisonError::into_inner).take_all_suppressed();
        for (place, lines) in reports {
            write(&lines::suppressed_line(self.style, &place, lines));
        }
    }
}

/// Writes a line to stderr, behind what was logged.
pub fn write(line: &str) {
    if let Some(sink) = SINK.get() {
        sink.push(line.as_bytes());
    } else {
        // There is nowhere to report it if stderr is gone.
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

/// Waits until what was logged is written, for a second at most: before the process ends.
pub fn flush() {
    if let Some(sink) = SINK.get() {
        sink.flush(LAST_LINES);
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.report_suppressed();
    }
}

fn layer<S, W>(style: Style, limiter: SharedLimiter, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Errors of stderr itself have nowhere to go; the default would panic on a closed one.
    let layer =
        tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false).log_internal_errors(false);
    let lines = Lines::new(style, limiter);
    match style {
        Style::Json => layer.fmt_fields(lines::json_fields()).event_format(lines).boxed(),
        Style::Text { .. } | Style::Journald => layer.fmt_fields(SpanFields).event_format(lines).boxed(),
    }
}

/// Our own crates at the level asked for; libraries say no more than warnings, whose details are
/// not meant for operators. What a peer does to its own connection is an error to the library of the HTTP servers.
fn directives(level: LogLevel) -> String {
    let (ours, theirs) = match level {
        LogLevel::Error => ("error", "error"),
        LogLevel::Warn => ("warn", "warn"),
        LogLevel::Info => ("info", "warn"),
        LogLevel::Debug => ("debug", "warn"),
        LogLevel::Trace => ("trace", "warn"),
    };
    format!("{theirs},actix_http=off,postrider={ours},postrider_actors={ours}")
}

fn style(format: LogFormat) -> Style {
    match format {
        LogFormat::Json => Style::Json,
        LogFormat::Journald => Style::Journald,
        LogFormat::Auto if is_journal() => Style::Journald,
        LogFormat::Auto | LogFormat::Text => {
            let is_plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
                || env::var_os("TERM").is_some_and(|term| term == "dumb");
            Style::Text { has_colors: !is_plain && io::stderr().is_terminal() }
        }
    }
}

/// Whether stderr is the journal: systemd.exec(5) says to compare `$JOURNAL_STREAM` with it, for a
/// program may have been started with another stderr since.
fn is_journal() -> bool {
    let stream = env::var("JOURNAL_STREAM").ok();
    let stat = rustix::fs::fstat(io::stderr()).ok();
    stream.zip(stat).is_some_and(|(stream, stat)| is_stream(&stream, stat.st_dev, stat.st_ino))
}

fn is_stream(stream: &str, device: u64, inode: u64) -> bool {
    stream.split_once(':').is_some_and(|(d, i)| d.parse() == Ok(device) && i.parse() == Ok(inode))
}

fn mono_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The monotonic clock starts at zero and its nanoseconds are below 10⁹.
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

fn log_panic(info: &PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("no message");
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::force_capture().to_string();
    let current = thread::current();
    panic_event(current.name().unwrap_or("unnamed"), &location, message, &backtrace);
}

fn panic_event(thread: &str, location: &str, message: &str, backtrace: &str) {
    let message = &message[..message.floor_char_boundary(PANIC_MESSAGE_BYTES_MAX)];
    let backtrace = &backtrace[..backtrace.floor_char_boundary(BACKTRACE_BYTES_MAX)];
    tracing::error!(thread, location, backtrace, "panicked: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_known_by_device_and_inode() {
        assert!(is_stream("8:12345", 8, 12345));
        assert!(!is_stream("8:12345", 8, 12346));
        for other in ["", "8", "8:", ":12345", "8:12345:1", "a:b"] {
            assert!(!is_stream(other, 8, 12345), "{other}");
        }
    }

    #[test]
    fn every_level_is_a_filter() {
        for level in [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace] {
            EnvFilter::try_new(directives(level)).unwrap();
        }
    }

    #[test]
    fn a_panic_is_one_bounded_event() {
        use std::fmt::Write as _;

        #[derive(Default)]
        struct Fields(String);
        impl tracing::field::Visit for Fields {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                let _ = write!(self.0, "{}={value:?};", field.name());
            }
        }
        struct Capture(Arc<Mutex<Vec<String>>>);
        impl<S: Subscriber> Layer<S> for Capture {
            fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
                let mut fields = Fields::default();
                event.record(&mut fields);
                self.0.lock().unwrap().push(fields.0);
            }
        }
        let events = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Capture(Arc::clone(&events)));
        tracing::subscriber::with_default(subscriber, || {
            panic_event("arbiter-1", "src/x.rs:1:2", &"é".repeat(10_000), &"frame\n".repeat(10_000));
        });
        let events = events.lock().unwrap();
        assert_eq!(events.len(), 1);
        assert!(events[0].contains("thread=\"arbiter-1\";") && events[0].contains("panicked: éé"));
        assert!(events[0].len() < 2 * BACKTRACE_BYTES_MAX);
    }
}
