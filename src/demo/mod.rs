//! The whole pipeline with nothing installed and nothing configured: a directory, a receiver, a daemon, a
//! file, and at the end the proof that every row of it is accounted for.
//!
//! Receiver and daemon are processes of this same program, started as an operator would start them,
//! and the demo asks them everything as an operator would: `postrider files --json` and the
//! receiver's `/stats`.

mod children;
mod summary;
mod world;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use indicatif::{HumanCount, ProgressBar, ProgressState, ProgressStyle};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

pub use self::children::end_with_parent;
pub use self::summary::Summary;
use self::{
    children::{Daemon, ReceiverProcess},
    summary::{Facts, PolledFile},
    world::{World, now_ms},
};

/// What to demonstrate.
#[derive(Debug)]
pub struct DemoSettings {
    /// Rows of the generated file, the bad ones included.
    pub messages: u64,
    /// Where to put everything; a new temporary directory if not given.
    pub directory: Option<PathBuf>,
    /// Whether to draw a progress bar.
    pub progress: bool,
}

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(100);
/// How often the files are asked for: each time costs a process.
const POLL: Duration = Duration::from_millis(300);
/// How long the report's last version may take after the last row has settled.
const REPORT: Duration = Duration::from_secs(10);
/// How long nothing may change before the demo gives up.
const STALLED: Duration = Duration::from_mins(1);

/// Runs the whole job and says what came of it, and in which directory. The error is that it could not be run to its end; that
/// it did not balance is in the summary.
pub fn run(settings: &DemoSettings) -> anyhow::Result<(Summary, PathBuf)> {
    let interrupted = watch_signals()?;
    let world = World::create(settings.directory.as_deref(), settings.messages)?;
    let summary = deliver(&world, settings, &interrupted)
        .with_context(|| format!("the demo failed; its files are in {}", world.directory().display()))?;
    Ok((summary, world.directory().to_owned()))
}

fn deliver(world: &World, settings: &DemoSettings, interrupted: &AtomicBool) -> anyhow::Result<Summary> {
    let receiver = ReceiverProcess::start(world)?;
    let config = world.write_config(receiver.address())?;
    let daemon = Daemon::start(world, &config)?;
    world.generate()?;
    let dropped_at_ms = now_ms();
    world.drop_file()?;

    let bar = if settings.progress { bar(settings.messages) } else { ProgressBar::hidden() };
    let polled = follow(&receiver, &daemon, &bar, interrupted);
    bar.finish_and_clear();
    let report = polled?;
    let facts = Facts {
        expected: world.expected(),
        report,
        counts: receiver.counts()?,
        dropped_at_ms,
        peak_memory_bytes: daemon.peak_memory_bytes()?,
        written: world.wait_for_report(REPORT)?,
    };
    daemon.stop()?;
    Ok(facts.summary(world))
}

/// Follows the file to its end: every row in a final state.
fn follow(
    receiver: &ReceiverProcess,
    daemon: &Daemon,
    bar: &ProgressBar,
    interrupted: &AtomicBool,
) -> anyhow::Result<PolledFile> {
    let mut changed_at = Instant::now();
    let mut polled_at = changed_at;
    let mut last = (0, 0);
    loop {
        thread::sleep(TICK);
        ensure!(!interrupted.load(Relaxed), "interrupted");
        daemon.check()?;
        let counts = receiver.counts()?;
        bar.set_position(counts.accepted);
        let mut now = (counts.requests, last.1);
        if polled_at.elapsed() >= POLL {
            polled_at = Instant::now();
            if let Some(polled) = daemon.files()?.pop() {
                if polled.is_finished() {
                    return Ok(polled);
                }
                now.1 = polled.report.rows;
            }
        }
        if now != last {
            (last, changed_at) = (now, Instant::now());
        }
        if changed_at.elapsed() > STALLED {
            bail!(
                "nothing has changed for {} s, with {} of the messages delivered; the daemon's log is {}",
                STALLED.as_secs(),
                counts.accepted,
                daemon.log().display()
            );
        }
    }
}

fn bar(messages: u64) -> ProgressBar {
    let style = "{wide_bar} {human_pos} of {human_len} delivered, {rate}/s, {eta} left";
    let style = ProgressStyle::with_template(style).expect("the template is constant and parses");
    let rate = |state: &ProgressState, to: &mut dyn fmt::Write| {
        // A bar that can't be drawn is no reason to stop.
        let _ = write!(to, "{}", HumanCount(state.per_sec() as u64));
    };
    ProgressBar::new(messages).with_style(style.with_key("rate", rate))
}

/// Whether SIGINT or SIGTERM came. Waited for in a thread of its own, because the one that starts the
/// children must live as long as they do: see [`end_with_parent`].
fn watch_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::Builder::new().name("demo-signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        flag.store(true, Relaxed);
    })?;
    Ok(interrupted)
}
