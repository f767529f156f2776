//! A gate that is fed at this process's share of a rate.
//!
//! Two loops per gate: one holds the lease (`LeaseRenewal`), one feeds the gate at what the lease allows at the
//! moment (`pace`). What is allowed and when is decided by `model::rate_share`, how evenly by `model::bucket`.

use std::{cell::Cell, num::NonZeroU32, rc::Rc, sync::Arc, time::Duration};

use rand::RngExt as _;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{LimitedGate, RateShares, grain};
use crate::{
    flow::Gate,
    model::{
        bucket::{Bucket, MICRO},
        rate_share::{Allowance, Demand, RateLeases, RateShare, TooManyProcesses, Waits, refresh},
        time::MonoMs,
    },
    ports::{Clock, StoreError},
};

/// The longest that the table may take to answer: an answer later than the next renewal is of no use.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// Renewals that may meet another process's in a row before this one waits for its next turn.
const CONFLICTS_MAX: u32 = 5;

/// The longest random wait after such a meeting.
const CONFLICT_JITTER: Duration = Duration::from_millis(40);

/// How long nothing must pass until the lease is given back, so that an idle destination costs no calls.
const IDLE: Duration = Duration::from_secs(10);

/// How late a timer may fire in milliseconds without costing rate: that much is saved up beyond the burst. They
/// count in whole milliseconds, and a burst of 1 would lose what comes in until they fire.
const LATE_MS: u64 = 2;

/// How long the lease may take to be given back on the way out; it ends by itself otherwise.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Feeds `limited` at this process's share of `rate_per_s` until `ends`, and then gives its lease back; with what it ended.
pub(super) async fn run<T>(
    limited: LimitedGate,
    rate_per_s: NonZeroU32,
    shares: RateShares,
    clock: Arc<dyn Clock>,
    ends: impl Future<Output = T>,
) -> T {
    let allowed = watch::Sender::new(Allowance::default());
    let waits = Rc::new(Cell::new(Waits::default()));
    let capacity_milli = u64::from(rate_per_s.get()) * 1000;
    let pace = pace(limited.clone(), capacity_milli, clock.clone(), allowed.subscribe(), waits.clone());
    let holder = LeaseRenewal {
        share: RateShare::new(shares.process.clone(), capacity_milli),
        demand: Demand::unknown(capacity_milli),
        capacity_milli,
        limited,
        shares,
        clock,
        allowed,
        waits,
        in_trouble: false,
    };
    tokio::join!(pace, holder.hold(ends)).1
}

/// Feeds the gate with what is allowed. Permits are fed only to messages that wait, so none lies in the gate
/// beyond a lease's end and the burst is not exceeded by those. Ends with the holder.
async fn pace(
    limited: LimitedGate,
    capacity_milli: u64,
    clock: Arc<dyn Clock>,
    mut allowed: watch::Receiver<Allowance>,
    waits: Rc<Cell<Waits>>,
) {
    let note = |waiting, now| {
        let mut noted = waits.get();
        noted.note(waiting, now);
        waits.set(noted);
    };
    let LimitedGate { gate, burst, metrics, .. } = limited;
    let granted = metrics.granted();
    let mut bucket = Bucket::empty(clock.mono());
    loop {
        let now = clock.mono();
        let allowance = *allowed.borrow_and_update();
        if allowance.rate_milli == 0 || now >= allowance.until {
            bucket.set(0, 0, now);
            gate.withdraw(); // what was fed to a message that gave up
            note(gate.unserved() > 0, now);
            tokio::select! {
                biased;
                changed = allowed.changed() => if changed.is_err() {
                    return;
                },
                () = gate.moved() => {}
            }
            continue;
        }
        let share = NonZeroU32::new(allowance.burst(burst.get(), capacity_milli)).unwrap_or(NonZeroU32::MIN);
        let late_micro = allowance.rate_milli.saturating_mul(LATE_MS);
        bucket.set(allowance.rate_milli, u64::from(share.get()) * MICRO + late_micro, now);
        let per_s = u32::try_from(allowance.rate_milli / 1000).unwrap_or(u32::MAX);
        let grain = grain(NonZeroU32::new(per_s).unwrap_or(NonZeroU32::MIN), share);
        let count = gate.unserved().min(u64::from(grain.get())) as u32;
        let left = allowance.until.since(now);
        note(count > 0, now);
        let wait = match (count, bucket.take(count, now)) {
            (0, _) => left,
            (_, Ok(())) => {
                gate.feed(count);
                granted.inc_by(count.into());
                continue;
            }
            (_, Err(wait)) => wait.min(left),
        };
        tokio::select! {
            biased;
            changed = allowed.changed() => if changed.is_err() {
                return;
            },
            () = gate.moved(), if count == 0 => {}
            () = sleep(wait) => {}
        }
    }
}

/// Holds the lease.
struct LeaseRenewal {
    share: RateShare,
    demand: Demand,
    capacity_milli: u64,
    limited: LimitedGate,
    shares: RateShares,
    clock: Arc<dyn Clock>,
    allowed: watch::Sender<Allowance>,
    waits: Rc<Cell<Waits>>,
    /// Whether it was logged that the lease can't be renewed.
    in_trouble: bool,
}

/// How a gate stood.
struct Measured {
    at: MonoMs,
    passed: u64,
    waited: Duration,
}

/// Why a lease was not renewed.
#[derive(Debug, thiserror::Error)]
enum NotRenewed {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    TooMany(#[from] TooManyProcesses),
    #[error("other processes changed the leases {CONFLICTS_MAX} times in between")]
    Conflicts,
}

impl LeaseRenewal {
    async fn hold<T>(mut self, ends: impl Future<Output = T>) -> T {
        let ended = tokio::select! {
            biased;
            ended = ends => ended,
            never = self.serve() => match never {},
        };
        // The call that was cut off may be done or not.
        self.share.lose_sight();
        self.release().await;
        ended
    }

    fn gate(&self) -> &Gate {
        &self.limited.gate
    }

    /// Publishes what is allowed now.
    fn publish(&self) {
        self.allowed.send_replace(self.share.allowance(self.clock.mono()));
    }

    async fn serve(&mut self) -> std::convert::Infallible {
        loop {
            self.limited.gate.wanted().await;
            self.serve_until_idle().await;
            self.release().await;
        }
    }

    /// Renews the lease until nothing has passed for [`IDLE`].
    async fn serve_until_idle(&mut self) {
        let mut moved = self.clock.mono();
        let waited = self.waits.get().total(moved);
        let mut before = Measured { at: moved, passed: self.gate().passed(), waited };
        self.demand = Demand::unknown(self.capacity_milli);
        loop {
            let now = self.clock.mono();
            let measured =
                Measured { at: now, passed: self.gate().passed(), waited: self.waits.get().total(now) };
            let passed = measured.passed - before.passed;
            if passed > 0 || self.gate().unserved() > 0 {
                moved = now;
            } else if now.since(moved) >= IDLE {
                return;
            }
            let (waited, over) = (measured.waited.saturating_sub(before.waited), now.since(before.at));
            let wants_milli = self.demand.measure(passed, waited, over, self.capacity_milli);
            before = measured;
            if self.share.must_renew(wants_milli, now) {
                let renewed = self.renew(wants_milli).await;
                self.report(renewed);
            }
            // Early rather than late, and not in step with the others.
            let pause = refresh(self.share.processes()).mul_f64(rand::rng().random_range(0.85..1.0));
            sleep(pause.saturating_sub(self.clock.mono().since(now))).await;
        }
    }

    async fn renew(&mut self, wants_milli: u64) -> Result<(), NotRenewed> {
        for _ in 0..CONFLICTS_MAX {
            if self.share.must_read(self.clock.mono()) {
                self.read().await?;
            }
            let asked = self.share.ask(wants_milli, self.clock.mono());
            // Less holds from now on, before the others can know of it.
            self.publish();
            let Some(renewal) = asked? else { continue };
            if self.write(&renewal.table).await? {
                self.share.granted(renewal);
                self.publish();
                return Ok(());
            }
            sleep(CONFLICT_JITTER.mul_f64(rand::rng().random::<f64>())).await;
        }
        Err(NotRenewed::Conflicts)
    }

    async fn read(&mut self) -> Result<(), StoreError> {
        let load = self.shares.table.load(&self.limited.name);
        let table = timeout(CALL_TIMEOUT, load).await.unwrap_or_else(|_| Err(no_answer()))?;
        self.share.learn(table, self.clock.mono());
        Ok(())
    }

    /// Whether it was written; unless it was, the table must be read again.
    async fn write(&mut self, table: &RateLeases) -> Result<bool, StoreError> {
        let store = self.shares.table.store(&self.limited.name, table);
        let stored = timeout(CALL_TIMEOUT, store).await.unwrap_or_else(|_| Err(no_answer()));
        if stored != Ok(true) {
            self.share.lose_sight();
        }
        stored
    }

    /// Gives the lease back. If that can't be done it ends by itself: nothing is sent under it any more.
    async fn release(&mut self) {
        self.share.stop();
        self.publish();
        let released = timeout(RELEASE_TIMEOUT, async {
            for _ in 0..CONFLICTS_MAX {
                if self.share.must_read(self.clock.mono()) {
                    self.read().await?;
                }
                let Some(table) = self.share.give_back() else { return Ok(()) };
                if self.write(&table).await? {
                    self.share.given_back(table);
                    return Ok(());
                }
                sleep(CONFLICT_JITTER.mul_f64(rand::rng().random::<f64>())).await;
            }
            Err(NotRenewed::Conflicts)
        });
        let released = released.await.unwrap_or_else(|_| Err(no_answer().into()));
        if let Err(error) = released {
            tracing::info!(gate = %self.limited.name, %error, "the share of the rate can't be returned; it expires");
        }
    }

    /// Logs the first failure of several and their end.
    fn report(&mut self, renewed: Result<(), NotRenewed>) {
        let gate = &self.limited.name;
        match renewed {
            Err(error) if !self.in_trouble => {
                let left = self.share.allowance(self.clock.mono()).until.since(self.clock.mono());
                tracing::warn!(%gate, %error, left_ms = left.as_millis() as u64,
                    "the share of the rate can't be renewed; once it expires, messages wait for a renewal");
                self.in_trouble = true;
            }
            Ok(()) if self.in_trouble => {
                tracing::info!(%gate, "the share of the rate is renewed again");
                self.in_trouble = false;
            }
            _ => {}
        }
    }
}

fn no_answer() -> StoreError {
    StoreError::Unknown(format!("no answer within {CALL_TIMEOUT:?}"))
}
