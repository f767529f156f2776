//! How several processes share one destination's rate.
//!
//! Leases of capacity, as in Doorman, a "global distributed client side rate limiting" by Google
//! (<https://github.com/youtube/doorman>, `doc/design.md` and `doc/algorithms.md`): every process holds a
//! lease of a part of the rate, renews it often and says how much it could use; nobody is granted what
//! another's unexpired lease still covers, and what there is is divided max-min fairly (`FAIR_SHARE`).
//! Doorman decides in a server; here every process decides for itself with the pure rule
//! [`RateLeases::renew`] and writes the result into the one table of the destination by compare-and-set, so
//! that two that decide at once can't both succeed.
//!
//! No clocks are compared. Others judge a lease by its *mark*, the table's version when it was renewed: as
//! in the DynamoDB Lock Client (AWS Database Blog, "Building Distributed Locks with the DynamoDB Lock
//! Client"), a lease has ended when its mark has not changed for the length of the lease on the *observer's*
//! monotonic clock. The holder counts from before it sent the request that was granted, the observer from
//! after it saw the mark, so the holder always stops first, however wrong the wall clocks are.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{ledger::is_earlier_process, time::MonoMs};

/// Processes that may share one rate. All leases of a destination are in one item of the table: at 120 bytes
/// each this is 30 KB, and with [`refresh`] 20 writes a second, which stays below the 1000 write units (of
/// 1 KB) per second of one DynamoDB partition.
pub const PROCESSES_MAX: usize = 256;

/// How often a lease is renewed, at least.
pub const REFRESH: Duration = Duration::from_secs(1);

/// How much rarer it is renewed per process that shares the rate: 20 changes of the table per second in all,
/// so that compare-and-set seldom meets another's write.
const REFRESH_PER_PROCESS: Duration = Duration::from_millis(50);

/// How many renewals a lease outlasts: three may fail in a row before its holder must stop.
const REFRESHES_PER_LEASE: u32 = 4;

/// The same alone, where a lease is renewed when half of it is over: as many may fail, and it costs a quarter of the
/// writes. Another process waits so much longer for its first share.
const REFRESHES_PER_LEASE_ALONE: u32 = 8;

/// The part of a lease that an observer waits longer than its holder: for clocks of different pace (NTP
/// slews by at most 500 ppm, 1/2000) and for milliseconds cut off.
const DRIFT: u32 = 32;

/// The part of the capacity that all idle processes together keep, so that each can begin at once.
const FLOOR: u64 = 20;

/// The part of the limit that is granted to nobody: a second that is cut out of an even flow may hold one
/// message more than the rate, from each process. Not more than a twentieth.
fn headroom(capacity_milli: u64, processes: usize) -> u64 {
    (processes as u64 * 1000).min(capacity_milli / 20)
}

/// How long a process waits between two renewals if `processes` share the rate.
pub fn refresh(processes: usize) -> Duration {
    REFRESH.max(REFRESH_PER_PROCESS * u32::try_from(processes).unwrap_or(u32::MAX))
}

/// How long a lease holds if `processes` share the rate.
pub fn lease(processes: usize) -> Duration {
    refresh(processes) * if processes > 1 { REFRESHES_PER_LEASE } else { REFRESHES_PER_LEASE_ALONE }
}

/// One process's lease. Rates are in thousandths of a message per second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLease {
    /// Whose: a name that no other living process has.
    pub process: String,
    /// What it may send.
    pub rate_milli: u64,
    /// What it could send.
    pub wants_milli: u64,
    /// The destination's limit as its configuration has it.
    pub capacity_milli: u64,
    /// How long it holds from its renewal on.
    pub lease_ms: u64,
    /// Its mark: the version of the table that it was last renewed in.
    pub renewed: u64,
}

/// All leases of one destination's rate, as the table has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLeases {
    /// Counts changes, from 0. It never goes back: see [`RateLease::renewed`].
    pub version: u64,
    /// One per process, at most [`PROCESSES_MAX`].
    pub leases: Vec<RateLease>,
}

/// What a process asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateRequest {
    /// What it could send, in thousandths of a message per second.
    pub wants_milli: u64,
    /// The limit as its configuration has it, in the same unit.
    pub capacity_milli: u64,
}

/// [`PROCESSES_MAX`] other processes hold leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{PROCESSES_MAX} processes share this rate already, which is the most; stop one of them")]
pub struct TooManyProcesses;

impl RateLeases {
    /// The lease of `process`.
    pub fn of(&self, process: &str) -> Option<&RateLease> {
        self.leases.iter().find(|lease| lease.process == process)
    }

    /// The table after `me` has renewed its lease; those that are not `live` any more fall away.
    ///
    /// `me` is granted its max-min fair share by everyone's wants, but nothing that another's lease covers:
    /// a lease shrinks only when its holder renews it, so a newcomer waits for the others' next renewal.
    /// While processes are configured with different limits, the lowest one counts.
    pub fn renew(
        &self,
        me: &str,
        request: RateRequest,
        is_live: impl Fn(&RateLease) -> bool,
    ) -> Result<Self, TooManyProcesses> {
        let mut leases: Vec<_> =
            self.leases.iter().filter(|lease| lease.process != me && is_live(lease)).cloned().collect();
        if leases.len() >= PROCESSES_MAX {
            return Err(TooManyProcesses);
        }
        let processes = leases.len() + 1;
        let limit =
            leases.iter().map(|lease| lease.capacity_milli).fold(request.capacity_milli, std::cmp::min);
        let capacity = limit - headroom(limit, processes);
        let floor = capacity / FLOOR / processes as u64;
        let others: Vec<_> = leases.iter().map(|lease| lease.wants_milli.clamp(floor, capacity)).collect();
        let fair = fair_share(capacity, request.wants_milli.clamp(floor, capacity), others);
        let covered = leases.iter().fold(0u64, |sum, lease| sum.saturating_add(lease.rate_milli));
        let version = self.version + 1;
        leases.push(RateLease {
            process: me.to_owned(),
            rate_milli: fair.min(capacity.saturating_sub(covered)),
            wants_milli: request.wants_milli,
            capacity_milli: request.capacity_milli,
            lease_ms: lease(processes).as_millis() as u64,
            renewed: version,
        });
        Ok(Self { version, leases })
    }

    /// The table without the lease of `me`.
    #[must_use]
    pub fn release(&self, me: &str) -> Self {
        let leases = self.leases.iter().filter(|lease| lease.process != me).cloned().collect();
        Self { version: self.version + 1, leases }
    }
}

/// Max-min fairness: whoever wants less than an equal part gets it, the rest is divided equally among the
/// others.
fn fair_share(capacity: u64, mine: u64, mut wants: Vec<u64>) -> u64 {
    wants.push(mine);
    wants.sort_unstable();
    let mut left = capacity;
    for (served, &want) in wants.iter().enumerate() {
        let equal = left / (wants.len() - served) as u64;
        if want >= equal {
            return mine.min(equal);
        }
        left -= want;
    }
    mine
}

/// What a process may send at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// In thousandths of a message per second.
    pub rate_milli: u64,
    /// Until then, by the process's own clock; nothing from then on.
    pub until: MonoMs,
    /// How many processes share the rate, as far as is known.
    pub processes: usize,
}

impl Allowance {
    /// Messages at once: of `burst` one for each process, and the rest by the share of the rate. So the sum
    /// over all processes is at most `burst`, or the number of processes if that is more.
    pub fn burst(&self, burst: u32, capacity_milli: u64) -> u32 {
        let beyond = u64::from(burst).saturating_sub(self.processes as u64);
        let share = u128::from(beyond) * u128::from(self.rate_milli) / u128::from(capacity_milli.max(1));
        1 + share.min(u128::from(burst.saturating_sub(1))) as u32
    }
}

/// A renewal that is about to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// What to write, in place of the version before it.
    pub table: RateLeases,
    allowance: Allowance,
}

/// One process's side of one destination's rate: what it knows of the table and what it may send.
///
/// It is given the outcome of every read and write, and stays correct whatever is lost, late or repeated:
/// - it sends less from the moment on that it *asks* for less, because the others may see the answer first;
/// - it sends more only once it *knows* that it was granted;
/// - a write whose outcome is not known leaves the last grant as it was, up to that grant's end.
#[derive(Debug)]
pub struct RateShare {
    me: Arc<str>,
    capacity_milli: u64,
    known: Option<RateLeases>,
    /// The mark under which each other process's lease was first seen, and when.
    seen: BTreeMap<String, (u64, MonoMs)>,
    held: Allowance,
}

impl RateShare {
    /// Knows nothing and holds nothing. `capacity_milli` is the whole limit, in thousandths of a message per
    /// second.
    pub fn new(me: Arc<str>, capacity_milli: u64) -> Self {
        Self { me, capacity_milli, known: None, seen: BTreeMap::new(), held: Allowance::default() }
    }

    /// What may be sent at `now`.
    pub fn allowance(&self, now: MonoMs) -> Allowance {
        if now < self.held.until { self.held } else { Allowance { rate_milli: 0, ..self.held } }
    }

    /// How many processes share the rate, as far as is known.
    pub fn processes(&self) -> usize {
        self.held.processes.max(1)
    }

    /// Whether the table must be read before the next write. Alone, a process knows what it wrote last, and
    /// compare-and-set fails if it is wrong; with other processes that version is always outdated.
    pub fn must_read(&self, now: MonoMs) -> bool {
        self.known.as_ref().is_none_or(|table| {
            table.leases.iter().any(|lease| lease.process != *self.me && self.is_live(lease, now))
        })
    }

    /// Whether the lease is to be renewed now, with these wants; to be asked every [`refresh`]. Among others, every time:
    /// they may have come, gone, or want something else. Alone, when half of it is over or more is wanted than is held.
    pub fn must_renew(&self, wants_milli: u64, now: MonoMs) -> bool {
        let Some(known) = self.known.as_ref().filter(|_| !self.must_read(now)) else { return true };
        let request = RateRequest { wants_milli, capacity_milli: self.capacity_milli };
        let renewed = known.renew(&self.me, request, |_| false).ok();
        let grant = renewed.and_then(|table| table.of(&self.me).map(|lease| lease.rate_milli));
        let is_half_over = self.held.until.since(now) <= lease(1) / 2;
        is_half_over || grant.is_none_or(|grant| grant > self.held.rate_milli)
    }

    /// The table was read; the answer came at `now`.
    pub fn learn(&mut self, table: RateLeases, now: MonoMs) {
        // No lease is counted on that others don't see.
        let ours = table.of(&self.me).map_or(0, |lease| lease.rate_milli);
        self.held.rate_milli = self.held.rate_milli.min(ours);
        let mut seen = BTreeMap::new();
        for lease in table.leases.iter().filter(|lease| lease.process != *self.me) {
            let sighting = match self.seen.get(&lease.process) {
                Some(&(mark, at)) if mark == lease.renewed => (mark, at),
                _ => (lease.renewed, now),
            };
            seen.insert(lease.process.clone(), sighting);
        }
        self.seen = seen;
        self.known = Some(table);
    }

    fn is_live(&self, lease: &RateLease, now: MonoMs) -> bool {
        // An earlier life of this process has sent its last, whatever its lease says.
        if is_earlier_process(&lease.process, &self.me) {
            return false;
        }
        let length = Duration::from_millis(lease.lease_ms);
        match self.seen.get(&lease.process) {
            Some(&(mark, at)) if mark == lease.renewed => now < at.after(length).after(length / DRIFT),
            _ => true,
        }
    }

    /// A renewal to write now, `now` being a time before the request is sent; `None` if the table is not
    /// known. If it grants less than what is held, less is held from here on.
    pub fn ask(&mut self, wants_milli: u64, now: MonoMs) -> Result<Option<Renewal>, TooManyProcesses> {
        let Some(known) = &self.known else { return Ok(None) };
        let request = RateRequest { wants_milli, capacity_milli: self.capacity_milli };
        let table = known.renew(&self.me, request, |lease| self.is_live(lease, now))?;
        let granted = table.of(&self.me).expect("a renewed table has the lease it was renewed for");
        let (rate_milli, length) = (granted.rate_milli, Duration::from_millis(granted.lease_ms));
        self.held.rate_milli = self.held.rate_milli.min(rate_milli);
        let processes = table.leases.len();
        Ok(Some(Renewal { table, allowance: Allowance { rate_milli, until: now.after(length), processes } }))
    }

    /// The renewal was written.
    pub fn granted(&mut self, renewal: Renewal) {
        self.held = renewal.allowance;
        self.known = Some(renewal.table);
    }

    /// Somebody was faster, or it is not known whether a write was done: the table must be read.
    pub fn lose_sight(&mut self) {
        self.known = None;
    }

    /// Nothing is held from here on, whatever the table says.
    pub fn stop(&mut self) {
        self.held.rate_milli = 0;
    }

    /// The table to write on the way out, after [`Self::stop`]. `None` if there is no lease to give back, or
    /// the table is not known.
    pub fn give_back(&self) -> Option<RateLeases> {
        let known = self.known.as_ref()?;
        known.of(&self.me).map(|_| known.release(&self.me))
    }

    /// What [`Self::give_back`] returned was written.
    pub fn given_back(&mut self, table: RateLeases) {
        self.known = Some(table);
    }
}

/// How much a process could send, judged by what passed its gate.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    wants_milli: u64,
}

impl Demand {
    /// Nothing is known yet: it wants everything.
    pub fn unknown(capacity_milli: u64) -> Self {
        Self { wants_milli: capacity_milli }
    }

    /// The wants after a time `over` in which `passed` messages went through, and messages waited for their
    /// turn for `waited` of it.
    ///
    /// If they waited for a quarter of the time or more, how much would go is not known and everything is
    /// wanted. Otherwise twice of what passed, so that demand can grow without waiting; after a lull the
    /// estimate is halved at most, so that batches that come in gusts find their share.
    pub fn measure(&mut self, passed: u64, waited: Duration, over: Duration, capacity_milli: u64) -> u64 {
        let over_ms = over.as_millis().max(1);
        let twice = u64::try_from(u128::from(passed) * 2_000_000 / over_ms).unwrap_or(u64::MAX);
        let starved = waited.as_millis() * 4 >= over_ms;
        let wants = if starved { capacity_milli } else { twice.max(self.wants_milli / 2) };
        self.wants_milli = wants.min(capacity_milli);
        self.wants_milli
    }
}

/// How long messages have waited at a gate, as reported by the task that feeds it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waits {
    total: Duration,
    since: Option<MonoMs>,
}

impl Waits {
    /// Whether a message waits, from `now` on.
    pub fn note(&mut self, waiting: bool, now: MonoMs) {
        self.total = self.total(now);
        self.since = waiting.then_some(now);
    }

    /// All time up to `now` in which one waited.
    pub fn total(&self, now: MonoMs) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| now.since(since))
    }
}

#[cfg(test)]
mod tests;
