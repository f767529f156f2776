//! Throttle: feeds the gates of rate-limited destinations, one task each, at the rate that governor
//! grants, or at this process's share of it if several processes deliver ([`RateShares`]). Rate is one
//! control of three; concurrency is the roster's, delay the outbox's.

mod shared;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use actix::prelude::*;
use governor::{
    Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;

use crate::{
    flow::Gate,
    ports::{Clock, RateTable},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// The name of the gate over all destinations: none that a destination can have.
pub const ALL: &str = "*";

/// How finely permits are dealt out: a feed of less than this much time is not worth a wake-up.
const GRAIN: Duration = Duration::from_millis(1);

/// A limited gate.
#[derive(Clone, Debug)]
pub struct LimitedGate {
    /// What it is for: a destination's name, or [`ALL`].
    pub name: Arc<str>,
    /// The gate.
    pub gate: Gate,
    /// Messages per second.
    pub rate_per_s: NonZeroU32,
    /// Messages at once after a pause; at least 1.
    pub burst: NonZeroU32,
    /// Counts what it lets through.
    pub granted: Counter,
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
    /// Leases that are yet to be given back.
    holders: usize,
}

impl Stage for Throttle {
    const NAME: &'static str = "throttle";

    type Setup = ThrottleSetup;

    fn new(setup: ThrottleSetup, id: &ChildId, _: Fault) -> Self {
        Self { setup, generation: id.generation, closing: watch::Sender::new(false), holders: 0 }
    }
}

impl Actor for Throttle {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        // A fresh limiter grants a fresh burst: after a restart or a reload that would exceed the rate.
        let grant_burst = self.setup.grants_burst && self.generation == 1;
        for gate in self.setup.gates.clone() {
            if let Some(shares) = self.setup.shares.clone() {
                let share = shared::run(gate, shares, self.setup.clock.clone(), self.closing.subscribe());
                self.holders += 1;
                context.spawn(share.into_actor(self).map(|(), this, context| {
                    this.holders -= 1;
                    if this.holders == 0 {
                        context.stop(); // drained
                    }
                }));
            } else {
                context.spawn(feed(gate, grant_burst).into_actor(self));
            }
        }
    }
}

impl Handler<Drain> for Throttle {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        // Others get our shares at once instead of when the leases end.
        self.closing.send_replace(true);
        if self.holders == 0 {
            context.stop();
        }
    }
}

async fn feed(limited: LimitedGate, grant_burst: bool) {
    let LimitedGate { name: _, gate, rate_per_s, burst, granted } = limited;
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
