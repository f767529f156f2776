//! Throttle: feeds the gates of destinations, one task each, at the rate that governor grants, or at this process's share
//! of it if several processes deliver ([`RateShares`]). Rate is one control of three; concurrency is the traffic control's,
//! delay the outbox's. What an operator has set of the two first ones outweighs the configuration ([`SetByOperators`]): it
//! is looked for all the time, and no gate is fed before it is known.

mod shared;

use std::{convert::Infallible, num::NonZeroU32, pin::pin, sync::Arc, time::Duration};

use actix::prelude::*;
use futures_util::future::join_all;
use governor::{
    Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use tokio::sync::watch;

use crate::{
    flow::{Bells, Gate, TrafficControl},
    metrics::RateMetrics,
    model::limits::GateRate,
    ports::{Clock, LimitsSet, RateTable, Steering},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// The name of the gate over all destinations: none that a destination can have.
pub const ALL: &str = "*";

/// How finely permits are dealt out: a feed of less than this much time is not worth a wake-up.
const GRAIN: Duration = Duration::from_millis(1);

/// How often it is looked for what operators have set.
const LOOK: Duration = Duration::from_millis(100);

/// A gate that a rate may limit.
#[derive(Clone, Debug)]
pub struct LimitedGate {
    /// What it is for: a destination's name, or [`ALL`].
    pub name: Arc<str>,
    /// The gate.
    pub gate: Gate,
    /// Messages per second by the configuration; `None`: no limit.
    pub rate_per_s: Option<NonZeroU32>,
    /// Messages at once after a pause, whatever the rate; at least 1.
    pub burst: NonZeroU32,
    /// What is counted.
    pub metrics: RateMetrics,
}

/// What operators set while the daemon runs.
#[derive(Clone)]
pub struct SetByOperators {
    /// Where it is.
    pub steering: Arc<dyn Steering>,
    /// Where what is set of concurrency holds.
    pub traffic: TrafficControl,
    /// To ring when other limits hold.
    pub workers: Bells,
}

/// How rates are shared with other processes.
#[derive(Clone)]
pub struct RateShares {
    /// Where the leases are.
    pub table: Arc<dyn RateTable>,
    /// This process's name. No two living processes may have the same; the simplest is one that is
    /// different at each start.
    pub process: Arc<str>,
}

/// What a throttle works with.
#[derive(Clone)]
pub struct ThrottleSetup {
    /// The gates to feed.
    pub gates: Vec<LimitedGate>,
    /// What may be set for them; `None`: nothing.
    pub set: Option<SetByOperators>,
    /// The time, for leases of shares.
    pub clock: Arc<dyn Clock>,
    /// Whether the gates are new to the process: others had their burst before.
    pub grants_burst: bool,
    /// With whom the rates are shared; `None` if this process has them to itself.
    pub shares: Option<RateShares>,
}

/// The actor.
pub struct Throttle {
    setup: ThrottleSetup,
    generation: u64,
    closing: watch::Sender<bool>,
}

impl Stage for Throttle {
    const NAME: &'static str = "throttle";

    type Setup = ThrottleSetup;

    fn new(setup: ThrottleSetup, id: &ChildId, _: Fault) -> Self {
        Self { setup, generation: id.generation, closing: watch::Sender::new(false) }
    }
}

impl Actor for Throttle {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let limits = watch::Sender::new(None);
        if let Some(set) = self.setup.set.clone() {
            context.spawn(look(set, limits.clone()).into_actor(self));
        } else {
            limits.send_replace(Some(LimitsSet::new()));
        }
        let feeder = |limited: LimitedGate| Feeder {
            limited,
            shares: self.setup.shares.clone(),
            clock: self.setup.clock.clone(),
            workers: self.setup.set.as_ref().map(|set| set.workers.clone()).unwrap_or_default(),
            limits: limits.subscribe(),
            closing: self.closing.subscribe(),
            // A fresh limiter grants a fresh burst: after a restart or a reload that would exceed the rate.
            grants_burst: self.setup.grants_burst && self.generation == 1,
        };
        let feeders: Vec<_> = self.setup.gates.iter().cloned().map(|limited| feeder(limited).run()).collect();
        let mut closing = self.closing.subscribe();
        let drained = async move {
            join_all(feeders).await;
            // There may be none. It can't be dropped while this runs.
            let _ = closing.wait_for(|closing| *closing).await;
        };
        context.spawn(drained.into_actor(self).map(|(), _, context| context.stop()));
    }
}

impl Handler<Drain> for Throttle {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        // Others get our shares at once instead of when the leases end.
        self.closing.send_replace(true);
    }
}

/// Looks for what operators have set. While the store does not answer, what was known holds on.
async fn look(set: SetByOperators, limits: watch::Sender<Option<LimitsSet>>) {
    loop {
        match set.steering.set_limits().await {
            Ok(found) => {
                if limits.borrow().as_ref() != Some(&found) {
                    set.traffic.set_limits(&found);
                    limits.send_replace(Some(found));
                }
            }
            Err(error) => tracing::debug!(%error, "it is not known what operators have set"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Feeds one gate.
struct Feeder {
    limited: LimitedGate,
    shares: Option<RateShares>,
    clock: Arc<dyn Clock>,
    workers: Bells,
    /// What operators have set, once that is known.
    limits: watch::Receiver<Option<LimitsSet>>,
    closing: watch::Receiver<bool>,
    grants_burst: bool,
}

impl Feeder {
    /// Feeds it until it is closed, by one rate after the other.
    async fn run(mut self) {
        let gate = self.limited.gate.clone();
        let mut next = self.next(None).await;
        while let Some(rate) = next {
            gate.limit(rate);
            self.limited.metrics.limit(rate);
            self.workers.ring();
            let (limited, clock) = (self.limited.clone(), self.clock.clone());
            let (shares, grants_burst) = (self.shares.clone(), self.grants_burst);
            self.grants_burst = false;
            let ends = self.next(Some(rate));
            next = match (rate, shares) {
                (GateRate::Open, _) => ends.await,
                (GateRate::PerS(rate), Some(shares)) => shared::run(limited, rate, shares, clock, ends).await,
                (GateRate::PerS(rate), None) => tokio::select! {
                    next = ends => next,
                    never = feed(limited, rate, grants_burst) => match never {},
                },
            };
        }
        gate.withdraw();
    }

    /// Waits until another rate holds than `now`; that rate. `None` when it is closed.
    async fn next(&mut self, now: Option<GateRate>) -> Option<GateRate> {
        let Self { limited, limits, closing, .. } = self;
        let rate = |known: &LimitsSet| {
            let set = known.get(&limited.name).and_then(|limits| limits.rate_per_s);
            GateRate::from(set.or(limited.rate_per_s))
        };
        let mut closed = pin!(closing.wait_for(|closing| *closing));
        loop {
            let found = limits.borrow_and_update().as_ref().map(rate);
            if found.is_some() && found != now {
                return found;
            }
            tokio::select! {
                biased;
                _ = &mut closed => return None,
                changed = limits.changed() => if changed.is_err() {
                    closed.await.ok()?; // nobody says more
                    return None;
                },
            }
        }
    }
}

async fn feed(limited: LimitedGate, rate_per_s: NonZeroU32, grant_burst: bool) -> Infallible {
    let LimitedGate { gate, burst, metrics, .. } = limited;
    let granted = metrics.granted();
    let grain = grain(rate_per_s, burst);
    // What lies unused in the gate is part of the burst too.
    let bucket = NonZeroU32::new(burst.get() - grain.get()).unwrap_or(burst);
    let limiter = RateLimiter::direct(Quota::per_second(rate_per_s).allow_burst(bucket));
    if !grant_burst {
        let _ = limiter.check_n(bucket); // spends what a fresh limiter would grant; it is not short of it
    }
    loop {
        failpoint!("panic.throttle");
        gate.drained(grain.get()).await;
        match limiter.check_n(grain) {
            Ok(Ok(())) => {
                gate.feed(grain.get());
                granted.inc_by(grain.get().into());
            }
            Ok(Err(not_until)) => {
                tokio::time::sleep(not_until.wait_time_from(DefaultClock::default().now())).await;
            }
            Err(insufficient) => unreachable!("a grain is never above the bucket: {insufficient}"),
        }
    }
}

/// Permits fed at once: about `GRAIN`'s worth, never more than half the burst.
fn grain(rate_per_s: NonZeroU32, burst: NonZeroU32) -> NonZeroU32 {
    let per_grain = u64::from(rate_per_s.get()) * GRAIN.as_micros() as u64 / 1_000_000;
    let half = NonZeroU32::new(burst.get() / 2).unwrap_or(NonZeroU32::MIN);
    NonZeroU32::new(per_grain as u32).unwrap_or(NonZeroU32::MIN).min(half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grains_follow_the_rate_within_the_burst() {
        let grain =
            |rate, burst| grain(NonZeroU32::new(rate).unwrap(), NonZeroU32::new(burst).unwrap()).get();
        assert_eq!(grain(1, 50), 1);
        assert_eq!(grain(999, 50), 1);
        assert_eq!(grain(20_000, 50), 20);
        assert_eq!(grain(1_000_000, 50), 25);
        assert_eq!(grain(1_000_000, 1), 1);
        assert_eq!(grain(u32::MAX, u32::MAX), u32::MAX / 1000);
    }
}
