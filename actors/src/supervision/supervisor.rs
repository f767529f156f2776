//! The supervisor actor.

use std::{sync::Arc, time::Duration};

use actix::prelude::*;
use rand::RngExt as _;
use tokio::sync::oneshot;

use super::{
    EXIT_SOFTWARE,
    board::ActorBoard,
    child::{Birth, ChildExited, ChildId, Drain, Exit, Fault, Stage},
};
use crate::{
    flow::Meter,
    metrics::StageMetrics,
    model::{
        backoff::Backoff,
        restart::{Restart, RestartIntensity, RestartPolicy},
        time::MonoMs,
    },
    ports::Clock,
};

/// What the end of one child means for its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Nothing: each is restarted by itself.
    OneForOne,
    /// All are ended and restarted as one generation, so that no stale address survives.
    OneForAll,
}

/// What becomes of a supervisor whose children have used their restarts up and that may not fail towards its parent:
/// it goes on trying, with waits that grow up to a bound.
#[derive(Clone)]
pub struct Parking {
    /// Between two tries.
    pub backoff: Backoff,
    /// Who hears of it.
    pub say: ParkingNotice,
}

/// Is given the reason, and `None` once a generation has lived for the period that restarts are counted in.
pub type ParkingNotice = Arc<dyn Fn(Option<&str>) + Send + Sync>;

/// Brings one child to life and returns the address that it drains by.
pub type Factory = Arc<dyn Fn(Birth) -> Recipient<Drain> + Send + Sync>;

/// A kind of child.
#[derive(Clone)]
pub struct ChildSpec {
    /// Its name within the supervisor.
    pub name: &'static str,
    /// A second name, e.g. the feed's, if there are several of one kind.
    pub of: Option<Arc<str>>,
    /// How many of it.
    pub count: usize,
    /// How it is made.
    pub factory: Factory,
    /// Children of one rank start together and drain together; lower ranks are downstream.
    pub rank: usize,
}

impl ChildSpec {
    /// One child of `rank`, each life of which is given what `setup` makes.
    pub fn stage<S: Stage>(
        rank: usize,
        setup: impl Fn(&ChildId) -> S::Setup + Send + Sync + 'static,
    ) -> Self {
        Self::wired::<S>(rank, setup, |_, _| ())
    }

    /// The same, where others send to it: `born` is given the address and the meter of each life.
    pub fn wired<S: Stage>(
        rank: usize,
        setup: impl Fn(&ChildId) -> S::Setup + Send + Sync + 'static,
        born: impl Fn(&Addr<S>, &Meter) + Send + Sync + 'static,
    ) -> Self {
        let factory = move |birth: Birth| {
            let (id, fault, meter) = (birth.id.clone(), birth.fault.clone(), birth.meter.clone());
            let setup = setup(&id);
            let address = birth.start(S::MAILBOX, move |_| S::new(setup, &id, fault));
            born(&address, &meter);
            address.recipient()
        };
        Self { name: S::NAME, of: None, count: 1, factory: Arc::new(factory), rank }
    }

    /// So many of it.
    #[must_use]
    pub fn times(self, count: usize) -> Self {
        Self { count, ..self }
    }

    /// With a second name, where there are several of one kind.
    #[must_use]
    pub fn of(self, of: Arc<str>) -> Self {
        Self { of: Some(of), ..self }
    }
}

/// What all supervisors of a tree share.
#[derive(Clone)]
pub struct SupervisorSettings {
    /// Restart backoff and intensity.
    pub restarts: RestartPolicy,
    /// How long one rank may take to drain before it is ended, and again before it is abandoned.
    pub drain_timeout: Duration,
    /// Where children live, in turn.
    pub arbiters: Vec<ArbiterHandle>,
    /// The time, for the intensity.
    pub clock: Arc<dyn Clock>,
    /// Where restarts are counted.
    pub metrics: StageMetrics,
    /// Where children are listed.
    pub actors: ActorBoard,
    /// Instead of failing towards the parent. `None` where the process can't do without the children.
    pub parking: Option<Parking>,
}

/// Ends the tree in order. A second one changes how long that may take.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Shutdown {
    /// The exit code to report when all are gone.
    pub code: i32,
    /// How long each rank directly below may take, from now on, before it is ended.
    pub within: Duration,
}

struct ChildSlot {
    spec: usize,
    id: ChildId,
    arbiter: usize,
    alive: bool,
    failures: u32,
    born: MonoMs,
    drain: Option<Recipient<Drain>>,
    kill: Option<oneshot::Sender<()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SupervisorPhase {
    Running,
    /// A child of a `OneForAll` supervisor exited: the others are being ended; then all start again.
    Regenerating,
    Stopping {
        rank: usize,
        code: i32,
    },
}

/// Keeps its children alive. See the module documentation.
pub struct Supervisor {
    path: Arc<str>,
    strategy: Strategy,
    specs: Vec<ChildSpec>,
    settings: SupervisorSettings,
    fault: Fault,
    ended: Option<oneshot::Sender<i32>>,
    slots: Vec<ChildSlot>,
    intensity: RestartIntensity,
    phase: SupervisorPhase,
    /// Of a generation that is being ended: whose exit began it, and how.
    cause: Option<(usize, Exit)>,
    /// Failures since the restarts were used up; 0 while they are not.
    parked_failures: u32,
    /// Counts the exits: who waits to see whether there is one compares it.
    exits: u64,
}

impl Supervisor {
    /// A supervisor inside a tree, whose failure is its parent's business.
    pub fn new(
        path: impl Into<Arc<str>>,
        strategy: Strategy,
        specs: Vec<ChildSpec>,
        settings: SupervisorSettings,
        fault: Fault,
    ) -> Self {
        let intensity = RestartIntensity::new(settings.restarts);
        Self {
            path: path.into(),
            strategy,
            specs,
            settings,
            fault,
            ended: None,
            slots: Vec::new(),
            intensity,
            phase: SupervisorPhase::Running,
            cause: None,
            parked_failures: 0,
            exits: 0,
        }
    }

    /// The supervisor at the top of a tree; `ended` gets an exit code when the tree is gone. No other tree of the process
    /// ever had this `name`: its workers' leases are held under it.
    pub fn root(
        name: impl Into<Arc<str>>,
        specs: Vec<ChildSpec>,
        settings: SupervisorSettings,
        ended: oneshot::Sender<i32>,
    ) -> Self {
        let mut root = Self::new(name, Strategy::OneForOne, specs, settings, Fault::default());
        root.ended = Some(ended);
        root
    }

    /// A child that is itself a supervisor.
    pub fn nested(
        name: &'static str,
        of: Option<Arc<str>>,
        rank: usize,
        strategy: Strategy,
        settings: SupervisorSettings,
        specs: impl Fn() -> Vec<ChildSpec> + Send + Sync + 'static,
    ) -> ChildSpec {
        ChildSpec {
            name,
            of,
            count: 1,
            rank,
            factory: Arc::new(move |birth: Birth| {
                let (path, fault) = (birth.id.path.clone(), birth.fault.clone());
                let (specs, settings) = (specs(), settings.clone());
                // Room for an exit of every child at once; `ChildExited` ignores it anyway.
                birth.start(64, move |_| Self::new(path, strategy, specs, settings, fault)).recipient()
            }),
        }
    }

    fn start_child(&mut self, index: usize, context: &mut Context<Self>) {
        let slot = &mut self.slots[index];
        let spec = &self.specs[slot.spec];
        slot.id.generation += 1;
        let (kill, killed) = oneshot::channel();
        let arbiters = &self.settings.arbiters;
        let birth = Birth {
            id: slot.id.clone(),
            fault: Fault::default(),
            meter: Meter::default(),
            arbiter: arbiters[slot.arbiter % arbiters.len()].clone(),
            supervisor: context.address().recipient(),
            kill: killed,
        };
        slot.alive = true;
        slot.born = self.settings.clock.mono();
        let (name, of, now) = (spec.name, spec.of.clone(), self.settings.clock.wall());
        self.settings.actors.born(&slot.id, name, of, now, birth.meter.clone());
        slot.kill = Some(kill);
        slot.drain = Some((spec.factory)(birth));
    }

    fn start_all(&mut self, context: &mut Context<Self>) {
        self.phase = SupervisorPhase::Running;
        for index in 0..self.slots.len() {
            self.start_child(index, context);
        }
    }

    fn alive_in(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.slots.len())
            .filter(move |&index| self.slots[index].alive && self.specs[self.slots[index].spec].rank == rank)
    }

    fn stop(&mut self, code: i32, context: &mut Context<Self>) {
        if !matches!(self.phase, SupervisorPhase::Stopping { .. }) {
            let rank = self.specs.iter().map(|spec| spec.rank).max().unwrap_or(0);
            self.phase = SupervisorPhase::Stopping { rank, code };
            self.drain_rank(context);
        }
    }

    /// Drains the current rank; when nobody of it is alive, the one below.
    fn drain_rank(&mut self, context: &mut Context<Self>) {
        while let SupervisorPhase::Stopping { rank, code } = self.phase {
            let alive: Vec<_> = self.alive_in(rank).collect();
            if !alive.is_empty() {
                for index in alive {
                    if let Some(drain) = &self.slots[index].drain {
                        // A mailbox that is full of other things is drained by the timeout below.
                        let _ = drain.try_send(Drain);
                    }
                }
                self.limit_rank(rank, context);
                return;
            }
            if rank == 0 {
                if let Some(ended) = self.ended.take() {
                    let _ = ended.send(code); // nobody waits only if the process is ending anyway
                }
                context.stop();
                return;
            }
            self.phase = SupervisorPhase::Stopping { rank: rank - 1, code };
        }
    }

    fn limit_rank(&self, rank: usize, context: &mut Context<Self>) {
        let timeout = self.settings.drain_timeout;
        context.run_later(timeout, move |this, _| this.end_rank(rank));
        context.run_later(timeout + timeout / 4, move |this, context| this.abandon_rank(rank, context));
    }

    fn end_rank(&mut self, rank: usize) {
        if matches!(self.phase, SupervisorPhase::Stopping { rank: current, .. } if current == rank) {
            for index in self.alive_in(rank).collect::<Vec<_>>() {
                tracing::warn!(child = %self.slots[index].id, "the child did not drain in time; stopping it");
                self.slots[index].kill = None;
            }
        }
    }

    /// A child that blocks its thread can't be ended. The shutdown continues; the process's exit reaps it.
    fn abandon_rank(&mut self, rank: usize, context: &mut Context<Self>) {
        if let SupervisorPhase::Stopping { rank: current, code } = self.phase
            && current == rank
        {
            for index in self.alive_in(rank).collect::<Vec<_>>() {
                tracing::error!(child = %self.slots[index].id, "the child's thread is stuck; abandoning it");
                self.slots[index].alive = false;
            }
            self.phase =
                SupervisorPhase::Stopping { rank, code: if code == 0 { EXIT_SOFTWARE } else { code } };
            self.drain_rank(context);
        }
    }

    /// Counts a failure. How long to wait before the restart, unless the restarts are used up.
    fn child_failed(&mut self, index: usize, exit: &Exit, context: &mut Context<Self>) -> Option<Duration> {
        let now = self.settings.clock.mono();
        self.exits += 1;
        let slot = &mut self.slots[index];
        let stable = now.since(slot.born) >= self.settings.restarts.period;
        slot.failures = if stable { 1 } else { slot.failures + 1 };
        let jitter = rand::rng().random::<f64>();
        let restart = self.intensity.exited(now, slot.failures, jitter);
        let wait = match (restart, self.settings.parking.clone()) {
            (Restart::After(wait), _) if self.parked_failures == 0 => wait,
            (_, Some(parking)) => self.park(&parking, index, exit, context),
            (Restart::After(wait), None) => wait,
            (Restart::Escalate, None) => {
                self.escalate(index, exit, context);
                return None;
            }
        };
        let slot = &self.slots[index];
        let spec = &self.specs[slot.spec];
        self.settings.metrics.restart(spec.name, spec.of.as_deref());
        tracing::warn!(
            child = %slot.id, generation = slot.id.generation, exit = exit.as_str(), why = exit.why(), wait_ms = wait.as_millis() as u64, strategy = ?self.strategy,
            "a child exited and will be restarted"
        );
        Some(wait)
    }

    /// Restarts one child.
    fn restart(&mut self, index: usize, exit: &Exit, context: &mut Context<Self>) {
        if let Some(wait) = self.child_failed(index, exit, context) {
            context.run_later(wait, move |this, context| {
                if this.phase == SupervisorPhase::Running && !this.slots[index].alive {
                    this.start_child(index, context);
                }
            });
        }
    }

    /// Restarts all children once the last of them is gone. Only then is it known why: a child's exit may be reported
    /// before that of the sibling that took it along.
    fn regenerate(&mut self, context: &mut Context<Self>) {
        if self.slots.iter().any(|slot| slot.alive) {
            return;
        }
        if let Some((index, exit)) = self.cause.take()
            && let Some(wait) = self.child_failed(index, &exit, context)
        {
            context.run_later(wait, |this, context| {
                if this.phase == SupervisorPhase::Regenerating {
                    this.start_all(context);
                }
            });
        }
    }

    fn escalate(&mut self, index: usize, exit: &Exit, context: &mut Context<Self>) {
        let why = format!(
            "{} {} ({}); more than {} restarts within {:?}",
            self.slots[index].id,
            exit.as_str(),
            exit.why(),
            self.settings.restarts.max_restarts,
            self.settings.restarts.period
        );
        tracing::error!(supervisor = %self.path, why, "restart intensity exceeded");
        if self.ended.is_some() {
            self.stop(EXIT_SOFTWARE, context);
        } else {
            self.fault.fail(context, why);
        }
    }

    /// Says that the restarts are used up, and how long to wait before the next one.
    fn park(
        &mut self,
        parking: &Parking,
        index: usize,
        exit: &Exit,
        context: &mut Context<Self>,
    ) -> Duration {
        self.parked_failures += 1;
        let name = self.specs[self.slots[index].spec].name;
        let why = format!("{name} fails again and again: {}", exit.why());
        if self.parked_failures == 1 {
            tracing::error!(supervisor = %self.path, why, "restarts don't help; it is parked and tried again");
        }
        (parking.say)(Some(&why));
        // Half of it is certain: a wait of almost nothing would be none.
        let wait =
            parking.backoff.bound(self.parked_failures).mul_f64(0.5 + rand::rng().random::<f64>() / 2.0);
        let (exits, say) = (self.exits, parking.say.clone());
        context.run_later(wait + self.settings.restarts.period, move |this, _| {
            if this.exits == exits {
                this.parked_failures = 0;
                tracing::info!(supervisor = %this.path, "it has lived long enough to be trusted again");
                say(None);
            }
        });
        wait
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        for (spec, of_spec) in self.specs.iter().enumerate() {
            let path: Arc<str> = match &of_spec.of {
                Some(of) => format!("{}/{}:{of}", self.path, of_spec.name).into(),
                None => format!("{}/{}", self.path, of_spec.name).into(),
            };
            for slot in 0..of_spec.count {
                self.slots.push(ChildSlot {
                    spec,
                    id: ChildId { path: path.clone(), slot, generation: 0 },
                    arbiter: self.slots.len(),
                    alive: false,
                    failures: 0,
                    born: MonoMs(0),
                    drain: None,
                    kill: None,
                });
            }
        }
        self.start_all(context);
    }
}

impl Handler<ChildExited> for Supervisor {
    type Result = ();

    fn handle(&mut self, exited: ChildExited, context: &mut Self::Context) {
        let Some(index) = self.slots.iter().position(|slot| slot.alive && slot.id == exited.id) else {
            return; // an abandoned child after all
        };
        let slot = &mut self.slots[index];
        slot.alive = false;
        slot.drain = None;
        slot.kill = None;
        if matches!(self.phase, SupervisorPhase::Stopping { .. }) {
            self.settings.actors.gone(&exited.id);
        } else {
            self.settings.actors.ended(&exited.id, &exited.exit, self.settings.clock.wall());
        }
        match (self.phase, self.strategy) {
            (SupervisorPhase::Running, Strategy::OneForOne) => self.restart(index, &exited.exit, context),
            (SupervisorPhase::Running, Strategy::OneForAll) => {
                self.phase = SupervisorPhase::Regenerating;
                self.cause = Some((index, exited.exit));
                for slot in &mut self.slots {
                    slot.kill = None;
                    slot.drain = None;
                }
                self.regenerate(context);
            }
            (SupervisorPhase::Regenerating, _) => {
                let orphaned = matches!(self.cause, Some((_, Exit::Orphaned(_))));
                if orphaned && matches!(exited.exit, Exit::Failed(_) | Exit::Panicked(_) | Exit::Lost) {
                    self.cause = Some((index, exited.exit));
                }
                self.regenerate(context);
            }
            (SupervisorPhase::Stopping { rank, .. }, _) => {
                if self.alive_in(rank).next().is_none() {
                    self.drain_rank(context);
                }
            }
        }
    }
}

impl Handler<Drain> for Supervisor {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        self.stop(0, context);
    }
}

impl Handler<Shutdown> for Supervisor {
    type Result = ();

    fn handle(&mut self, shutdown: Shutdown, context: &mut Self::Context) {
        self.settings.drain_timeout = shutdown.within;
        if let SupervisorPhase::Stopping { rank, .. } = self.phase {
            self.limit_rank(rank, context);
        } else {
            self.stop(shutdown.code, context);
        }
    }
}
