//! The daemon's look at itself, every second: the clock, signs of life, the backlog, alarms, the status line.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch::{self, Receiver, Sender},
    time::MissedTickBehavior,
};

use super::{machine::Machine, status::StatusReporter, watch::Watch};
use crate::{config::Config, ops::Phase};

/// How often it looks.
const LOOK: Duration = Duration::from_secs(1);

/// How many looks lie between two reports of suppressed log lines.
const LOOKS_PER_LOG_REPORT: u64 = 60;

/// The task that looks. It lives as long as the process, so that the watchdog is fed while a configuration is taken up
/// and while the daemon drains.
pub(super) struct Lookout {
    config: Sender<Config>,
    task: actix_rt::task::JoinHandle<()>,
}

impl Lookout {
    /// Looks from now on.
    pub(super) fn start(machine: &Arc<Machine>, config: &Config) -> Self {
        let (sender, receiver) = watch::channel(config.clone());
        Self { config: sender, task: actix_rt::spawn(run(machine.clone(), receiver)) }
    }

    /// Another configuration is in use.
    pub(super) fn configure(&self, config: &Config) {
        self.config.send_replace(config.clone());
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(machine: Arc<Machine>, mut config: Receiver<Config>) {
    let mut watch = Watch::new(&machine, &config.borrow_and_update());
    let mut status = StatusReporter::new(&machine);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for looks in 0_u64.. {
        look.tick().await;
        machine.steady.observe();
        let stuck = machine.health.stuck();
        if !stuck.is_empty() {
            tracing::error!(stuck = stuck.join(", "), "threads or actors are stuck: the watchdog is not fed");
        }
        machine.notify(|systemd| systemd.beat(stuck.is_empty()).map(drop));
        if looks % LOOKS_PER_LOG_REPORT == LOOKS_PER_LOG_REPORT - 1 {
            machine.telemetry.report_suppressed();
        }
        if config.has_changed().unwrap_or(false) {
            watch.configure(&config.borrow_and_update());
        }
        watch.look(status.paces(), status.late().to_vec()).await;
        // Before that nobody knows what there is; at the end the status says that the daemon drains.
        if matches!(machine.health.phase(), Phase::Ready | Phase::Reloading)
            && let Some(line) = status.line().await
        {
            machine.notify(|systemd| systemd.status(&line));
        }
    }
}
