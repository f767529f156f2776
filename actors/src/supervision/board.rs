use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::child::{ChildId, Exit};
use crate::{
    flow::Meter,
    model::time::{MonoMs, UnixMs},
};

/// What it is taken over how busy an actor is …
const MOMENT: Duration = Duration::from_secs(10);
/// … and looks that are kept for that, however often one looks.
const LOOKS_MAX: usize = 12;

/// The children of all supervisors of the process, for whoever looks from outside. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ActorBoard(Arc<Mutex<Reports>>);

/// By path and number.
type Reports = BTreeMap<(Arc<str>, usize), Watched>;

#[derive(Debug)]
struct Watched {
    report: ActorReport,
    meter: Meter,
    /// For how long it had worked, the oldest look first.
    looks: VecDeque<(MonoMs, Duration)>,
}

/// What is known of one child.
#[derive(Clone, Debug, PartialEq)]
pub struct ActorReport {
    /// Its place in the tree, and which life it is.
    pub id: ChildId,
    /// What it is.
    pub name: &'static str,
    /// Its second name: a feed's, a source's.
    pub of: Option<Arc<str>>,
    /// Whether it runs, or waits to be restarted.
    pub alive: bool,
    /// When this life began.
    pub since: UnixMs,
    /// How often it was restarted.
    pub restarts: u64,
    /// When a life of it ended last, and how.
    pub last_exit: Option<(UnixMs, String)>,
    /// Messages that wait for it, and how many its mailbox has room for; `None` if it is sent control messages alone.
    pub mailbox: Option<(usize, usize)>,
    /// How much of the last 10 s its code ran, in percent; `None`: not known yet. More than 100 if it did several things at
    /// the same time.
    pub busy_percent: Option<f64>,
}

impl Watched {
    fn busy_percent(&self) -> Option<f64> {
        let ((from, before), (to, now)) = (self.looks.front()?, self.looks.back()?);
        let span = to.since(*from).as_secs_f64();
        (span > 0.0).then(|| now.saturating_sub(*before).as_secs_f64() * 100.0 / span)
    }
}

impl ActorBoard {
    fn reports(&self) -> MutexGuard<'_, Reports> {
        // Changed by infallible steps only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A life begins.
    pub(super) fn born(
        &self,
        id: &ChildId,
        name: &'static str,
        of: Option<Arc<str>>,
        at: UnixMs,
        meter: Meter,
    ) {
        let mut reports = self.reports();
        let before = reports.remove(&(id.path.clone(), id.slot)).map(|before| before.report);
        let restarts = before.as_ref().map_or(0, |before| before.restarts + 1);
        let last_exit = before.and_then(|before| before.last_exit);
        let report = ActorReport {
            id: id.clone(),
            name,
            of,
            alive: true,
            since: at,
            restarts,
            last_exit,
            mailbox: None,
            busy_percent: None,
        };
        reports.insert((id.path.clone(), id.slot), Watched { report, meter, looks: VecDeque::new() });
    }

    /// A life has ended; another one follows.
    pub(super) fn ended(&self, id: &ChildId, exit: &Exit, at: UnixMs) {
        if let Some(Watched { report, .. }) = self.reports().get_mut(&(id.path.clone(), id.slot)) {
            report.alive = false;
            report.last_exit = Some((at, exit.why().to_owned()));
        }
    }

    /// It is no longer needed.
    pub(super) fn gone(&self, id: &ChildId) {
        self.reports().remove(&(id.path.clone(), id.slot));
    }

    /// Looks at how long each has worked; asked every second.
    pub fn look(&self, now: MonoMs) {
        for Watched { meter, looks, .. } in self.reports().values_mut() {
            while looks.len() >= LOOKS_MAX || looks.get(1).is_some_and(|(at, _)| now.since(*at) >= MOMENT) {
                looks.pop_front();
            }
            looks.push_back((now, meter.worked()));
        }
    }

    /// All of them, by their places in the tree.
    pub fn list(&self) -> Vec<ActorReport> {
        let report = |watched: &Watched| ActorReport {
            mailbox: watched.meter.mailbox(),
            busy_percent: watched.busy_percent().filter(|_| watched.report.alive),
            ..watched.report.clone()
        };
        self.reports().values().map(report).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn how_busy_an_actor_is_is_taken_over_the_last_ten_seconds() {
        let (board, meter) = (ActorBoard::default(), Meter::default());
        let id = ChildId::first("root/sweeper");
        board.born(&id, "sweeper", None, UnixMs(0), meter.clone());
        let now = |second: u64| MonoMs(second * 1_000);
        board.look(now(0));
        assert_eq!(board.list()[0].busy_percent, None, "one look says nothing");
        for second in 1..=60 {
            if second > 30 {
                let busy = meter.busy();
                tokio::time::advance(Duration::from_millis(250)).await;
                drop(busy);
            }
            board.look(now(second));
        }
        let report = &board.list()[0];
        assert_eq!(report.busy_percent.map(f64::round), Some(25.0));
        assert_eq!(report.mailbox, None);
        meter.has_mailbox(8);
        let _waits = meter.waits();
        assert_eq!(board.list()[0].mailbox, Some((1, 8)));
        // The next life begins anew.
        board.ended(&id, &Exit::Normal, UnixMs(1));
        assert_eq!(board.list()[0].busy_percent, None);
        board.born(&ChildId { generation: 2, ..id }, "sweeper", None, UnixMs(2), Meter::default());
        let report = &board.list()[0];
        assert_eq!((report.restarts, report.mailbox, report.busy_percent), (1, None, None));
    }
}
