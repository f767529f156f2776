use std::collections::VecDeque;

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::*;

fn lease_of(process: &str, rate_milli: u64, wants_milli: u64) -> RateLease {
    RateLease {
        process: process.to_owned(),
        rate_milli,
        wants_milli,
        capacity_milli: 100_000,
        lease_ms: 4_000,
        renewed: 7,
    }
}

fn request(wants_milli: u64) -> RateRequest {
    RateRequest { wants_milli, capacity_milli: 100_000 }
}

/// Everyone renews once, in turn; the rates after it.
fn round(table: &mut RateLeases, wants: &[u64]) -> Vec<u64> {
    for (index, &wants) in wants.iter().enumerate() {
        *table = table.renew(&index.to_string(), request(wants), |_| true).unwrap();
    }
    (0..wants.len()).map(|index| table.of(&index.to_string()).unwrap().rate_milli).collect()
}

#[test]
fn shares_are_those_of_doorman_s_documentation() {
    // `doc/algorithms.md`, FAIR_SHARE: 120 among wants of 1000, 50 and 10 are 60, 50 and 10.
    let fair = |mine, others: &[u64]| fair_share(120, mine, others.to_vec());
    assert_eq!((fair(1000, &[50, 10]), fair(50, &[1000, 10]), fair(10, &[50, 1000])), (60, 50, 10));
    assert_eq!((fair(1000, &[]), fair(7, &[]), fair(0, &[120])), (120, 7, 0));
    assert_eq!(fair(60, &[60]), 60);
}

#[test]
fn a_newcomer_gets_its_share_when_the_others_have_renewed() {
    let mut table = RateLeases::default();
    // One message per second and process is held back.
    assert_eq!(round(&mut table, &[100_000]), [99_000]);
    assert_eq!(round(&mut table, &[100_000, 100_000]), [99_000, 0]);
    assert_eq!(round(&mut table, &[100_000, 100_000]), [49_000, 49_000]);
    let joined = table.renew("2", request(100_000), |_| true).unwrap();
    assert_eq!(joined.of("2").unwrap().rate_milli, 0, "everything is covered by the others' leases");
    table = joined;
    let thirds = round(&mut table, &[100_000, 100_000, 100_000]);
    assert_eq!(thirds, [32_333, 32_333, 32_333]);
}

#[test]
fn idle_processes_keep_a_floor_and_leave_the_rest() {
    let mut table = RateLeases::default();
    round(&mut table, &[100_000, 0, 0, 0]);
    round(&mut table, &[100_000, 0, 0, 0]);
    // A twentieth is for all idle ones together, by fours here.
    assert_eq!(round(&mut table, &[100_000, 0, 0, 0]), [92_400, 1_200, 1_200, 1_200]);
    round(&mut table, &[100_000, 0, 0, 100_000]);
    assert_eq!(round(&mut table, &[100_000, 0, 0, 100_000]), [46_800, 1_200, 1_200, 46_800]);
}

#[test]
fn what_is_not_live_falls_away_and_what_is_live_is_kept_free() {
    let leases = vec![lease_of("dead", 60_000, 100_000), lease_of("live", 40_000, 100_000)];
    let table = RateLeases { version: 7, leases };
    let renewed = table.renew("me", request(100_000), |lease| lease.process == "live").unwrap();
    assert_eq!(renewed.version, 8);
    assert_eq!(renewed.of("dead"), None);
    assert_eq!(renewed.of("live"), table.of("live"));
    let mine = renewed.of("me").unwrap();
    assert_eq!((mine.rate_milli, mine.renewed, mine.lease_ms), (49_000, 8, 4_000));
    let left = renewed.release("me");
    assert_eq!((left.version, left.of("me"), left.leases.len()), (9, None, 1));
}

#[test]
fn the_lowest_limit_counts_while_configurations_differ() {
    let ask = |table: &RateLeases, me: &str, capacity_milli| {
        table.renew(me, RateRequest { wants_milli: u64::MAX, capacity_milli }, |_| true).unwrap()
    };
    let rate = |table: &RateLeases, me: &str| table.of(me).unwrap().rate_milli;
    let mut table = ask(&RateLeases::default(), "old", 100_000);
    assert_eq!(rate(&table, "old"), 99_000);
    table = ask(&table, "new", 40_000);
    assert_eq!(rate(&table, "new"), 0);
    for _ in 0..2 {
        table = ask(&ask(&table, "old", 100_000), "new", 40_000);
    }
    assert_eq!((rate(&table, "old"), rate(&table, "new")), (19_000, 19_000));
}

#[test]
fn there_is_a_most_of_processes() {
    let leases = (0..PROCESSES_MAX).map(|index| lease_of(&index.to_string(), 0, 0)).collect();
    let full = RateLeases { version: 1, leases };
    assert_eq!(full.renew("one more", request(1), |_| true), Err(TooManyProcesses));
    assert!(full.renew("0", request(1), |_| true).is_ok());
    assert!(full.renew("one more", request(1), |lease| lease.process != "0").is_ok());
    assert_eq!((refresh(3), lease(3)), (Duration::from_secs(1), Duration::from_secs(4)));
    assert_eq!(refresh(PROCESSES_MAX), Duration::from_millis(12_800));
}

#[test]
fn a_lease_has_ended_when_its_mark_stops_moving() {
    let mut share = RateShare::new("me".into(), 100_000);
    assert!(share.must_read(MonoMs(0)));
    assert_eq!(share.ask(1, MonoMs(0)), Ok(None), "nothing is asked for blindly");
    let other = lease_of("other", 100_000, 100_000);
    share.learn(RateLeases { version: 7, leases: vec![other.clone()] }, MonoMs(1_000));
    // Read again later: the mark is as old as when it was first seen.
    share.learn(RateLeases { version: 9, leases: vec![other.clone()] }, MonoMs(3_000));
    let rate_at = |share: &mut RateShare, now| {
        share.ask(100_000, MonoMs(now)).unwrap().unwrap().table.of("me").unwrap().rate_milli
    };
    assert_eq!(rate_at(&mut share, 5_124), 0);
    assert!(share.must_read(MonoMs(5_124)));
    assert_eq!(rate_at(&mut share, 5_125), 99_000, "4 s and a thirty-second part of it");
    assert!(!share.must_read(MonoMs(5_125)));
    share.learn(RateLeases { version: 10, leases: vec![RateLease { renewed: 10, ..other }] }, MonoMs(5_200));
    assert_eq!(rate_at(&mut share, 9_000), 0, "it was renewed after all");
}

#[test]
fn less_is_used_before_it_is_asked_for_and_more_after_it_is_granted() {
    let mut share = RateShare::new("me".into(), 100_000);
    let rate = |share: &RateShare, now| share.allowance(MonoMs(now)).rate_milli;
    share.learn(RateLeases::default(), MonoMs(0));
    let all = share.ask(100_000, MonoMs(0)).unwrap().unwrap();
    assert_eq!(rate(&share, 0), 0);
    share.granted(all);
    assert_eq!((rate(&share, 7_999), rate(&share, 8_000)), (99_000, 0));
    // Asks for less; the answer is lost.
    share.ask(10_000, MonoMs(1_000)).unwrap().unwrap();
    assert_eq!(rate(&share, 1_000), 10_000);
    share.lose_sight();
    assert!(share.must_read(MonoMs(1_100)));
    assert_eq!((rate(&share, 7_999), rate(&share, 8_000)), (10_000, 0), "the last lease that is known ends");
    // It is gone from the table: nothing is counted on.
    share.learn(RateLeases { version: 5, leases: Vec::new() }, MonoMs(1_200));
    assert_eq!(rate(&share, 1_200), 0);
}

#[test]
fn alone_a_lease_is_renewed_when_half_of_it_is_over_or_more_is_wanted() {
    let mut share = RateShare::new("me".into(), 100_000);
    assert!(share.must_renew(1, MonoMs(0)));
    share.learn(RateLeases::default(), MonoMs(0));
    assert!(share.must_renew(1, MonoMs(0)), "it has none yet");
    let some = share.ask(50_000, MonoMs(0)).unwrap().unwrap();
    share.granted(some);
    assert!(!share.must_renew(50_000, MonoMs(3_999)) && share.must_renew(50_000, MonoMs(4_000)));
    assert!(share.must_renew(50_001, MonoMs(1)) && !share.must_renew(10, MonoMs(1)));
    let other = lease_of("other", 1_000, 1_000);
    let mine = share.known.as_ref().unwrap().leases[0].clone();
    share.learn(RateLeases { version: 2, leases: vec![mine, other] }, MonoMs(100));
    assert!(share.must_renew(50_000, MonoMs(100)), "others look at it");
}

#[test]
fn what_an_earlier_life_of_the_process_held_is_free() {
    let rate = |me: &str| {
        let mut share = RateShare::new(me.into(), 100_000);
        share.learn(RateLeases { version: 7, leases: vec![lease_of("node-4", 99_000, 99_000)] }, MonoMs(0));
        let renewal = share.ask(100_000, MonoMs(0)).unwrap().unwrap();
        (renewal.table.leases.len(), renewal.table.of(me).unwrap().rate_milli)
    };
    assert_eq!((rate("node-5"), rate("node-3"), rate("mode-5")), ((1, 99_000), (2, 0), (2, 0)));
}

#[test]
fn bursts_of_all_together_are_the_configured_one() {
    let burst = |rate_milli, processes, burst| {
        Allowance { rate_milli, until: MonoMs(0), processes }.burst(burst, 100_000)
    };
    assert_eq!(burst(100_000, 1, 50), 50);
    assert_eq!(burst(33_333, 3, 50), 16);
    assert_eq!((burst(98_333, 3, 50), burst(833, 3, 50)), (47, 1));
    assert_eq!((burst(50_000, 2, 1), burst(100_000, 1, 1), burst(0, 9, 5)), (1, 1, 1));
}

#[test]
fn demand_follows_what_passed_and_what_waits() {
    let mut demand = Demand::unknown(100_000);
    let (none, second) = (Duration::ZERO, Duration::from_secs(1));
    assert_eq!(demand.measure(0, none, second, 100_000), 50_000);
    assert_eq!(demand.measure(30, Duration::from_millis(249), second, 100_000), 60_000);
    assert_eq!(demand.measure(30, Duration::from_millis(250), second, 100_000), 100_000);
    assert_eq!(demand.measure(60, none, second, 100_000), 100_000);
    assert_eq!(demand.measure(1, none, Duration::from_millis(100), 100_000), 50_000);
    assert_eq!(demand.measure(u64::MAX, none, Duration::ZERO, 100_000), 100_000);
    let idle = (0..20).map(|_| demand.measure(0, none, second, 100_000)).last();
    assert_eq!(idle, Some(0));
}

#[test]
fn waits_add_up() {
    let mut waits = Waits::default();
    let total = |waits: &Waits, now| waits.total(MonoMs(now)).as_millis();
    waits.note(false, MonoMs(100));
    assert_eq!(total(&waits, 300), 0);
    waits.note(true, MonoMs(300));
    waits.note(true, MonoMs(350));
    assert_eq!(total(&waits, 400), 100);
    waits.note(false, MonoMs(500));
    waits.note(true, MonoMs(900));
    assert_eq!(total(&waits, 1_000), 300);
}

proptest! {
    #[test]
    fn shares_are_max_min_fair(capacity in 0u64..1_000_000, wants in prop::collection::vec(0u64..500_000, 1..20)) {
        let shares: Vec<_> = (0..wants.len())
            .map(|me| {
                let mut others = wants.clone();
                let mine = others.remove(me);
                fair_share(capacity, mine, others)
            })
            .collect();
        let (sum, wanted): (u64, u64) = (shares.iter().sum(), wants.iter().sum());
        prop_assert!(sum <= capacity);
        // All of it is used, but for what an integer division leaves.
        prop_assert!(sum + wants.len() as u64 >= capacity.min(wanted));
        let most = *shares.iter().max().unwrap();
        for (share, want) in shares.iter().zip(&wants) {
            prop_assert!(share <= want);
            prop_assert!(share == want || share + 1 >= most, "who wants more has no less than anybody");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// A world of processes, clocks and a table that answers late, twice or never. Real time is in milliseconds
// and known to nobody.

struct Process {
    share: RateShare,
    /// Its clock: `offset + real · (1 + ppm / 10⁶)`.
    offset: u64,
    ppm: i64,
    capacity_milli: u64,
    wants_milli: u64,
    doing: Doing,
    /// It takes no steps any more. What it holds it uses to the end, as a stopped process that went on would.
    killed: bool,
}

enum Doing {
    Nothing { until: u64 },
    Reading { table: Option<RateLeases>, read_at: u64, answer_at: u64 },
    Writing { renewal: Renewal, id: u64, answer_at: u64 },
}

/// A write on its way to the table.
struct Write {
    id: u64,
    arrives_at: u64,
    table: RateLeases,
}

struct World {
    random: StdRng,
    now: u64,
    table: RateLeases,
    writes: VecDeque<Write>,
    /// Those that were done.
    done: Vec<u64>,
    last_id: u64,
    processes: Vec<Process>,
    /// Chance, in percent, that a request or an answer is late or lost.
    faults: u32,
}

const CAPACITY: u64 = 100_000;
const STEP_MS: u64 = 5;
/// What a process waits for an answer.
const TIMEOUT_MS: u64 = 900;

impl World {
    fn new(seed: u64) -> Self {
        let random = StdRng::seed_from_u64(seed);
        let (table, writes) = (RateLeases::default(), VecDeque::new());
        Self { random, now: 0, table, writes, done: Vec::new(), last_id: 0, processes: Vec::new(), faults: 0 }
    }

    fn join(&mut self, capacity_milli: u64) {
        let name = format!("p{}", self.last_id);
        self.last_id += 1;
        self.processes.push(Process {
            share: RateShare::new(name.as_str().into(), capacity_milli),
            // Clocks that agree on nothing.
            offset: self.random.random_range(0..10_000_000_000),
            ppm: self.random.random_range(-500..=500),
            capacity_milli,
            wants_milli: capacity_milli,
            doing: Doing::Nothing { until: self.now },
            killed: false,
        });
    }

    fn delay(&mut self) -> u64 {
        let fault = self.random.random_range(0..100) < self.faults;
        if fault { self.random.random_range(100..6_000) } else { self.random.random_range(2..25) }
    }

    fn step(&mut self) {
        self.now += STEP_MS;
        let now = self.now;
        // Writes arrive in any order.
        let mut arriving: Vec<_> = Vec::new();
        for write in std::mem::take(&mut self.writes) {
            if write.arrives_at <= now { arriving.push(write) } else { self.writes.push_back(write) }
        }
        arriving.sort_by_key(|write| write.arrives_at);
        for write in arriving {
            if write.table.version == self.table.version + 1 {
                self.table = write.table;
                self.done.push(write.id);
            }
        }
        for index in 0..self.processes.len() {
            if !self.processes[index].killed {
                self.act(index);
            }
        }
        self.processes.retain(|process| !process.killed || process.rate(now) > 0);
    }

    fn act(&mut self, index: usize) {
        let now = self.now;
        let (to, back, pause) = (self.delay(), self.delay(), self.random.random_range(850..1_000));
        let process = &mut self.processes[index];
        let clock = process.clock(now);
        let doing = std::mem::replace(&mut process.doing, Doing::Nothing { until: now + pause });
        let write = match doing {
            Doing::Nothing { until } if until > now => return process.doing = Doing::Nothing { until },
            Doing::Nothing { .. } if !process.share.must_renew(process.wants_milli, clock) => return,
            Doing::Nothing { .. } if process.share.must_read(clock) => {
                let (read_at, answer_at) = (now + to, now + to + back);
                return process.doing = Doing::Reading { table: None, read_at, answer_at };
            }
            Doing::Nothing { .. } => true,
            Doing::Reading { table, read_at, answer_at } => {
                let table = table.or_else(|| (read_at <= now).then(|| self.table.clone()));
                if answer_at > now {
                    if read_at + TIMEOUT_MS > now {
                        process.doing = Doing::Reading { table, read_at, answer_at };
                    }
                    return; // given up otherwise: tried again after the pause
                }
                process.share.learn(table.expect("it was read before it was answered"), clock);
                true
            }
            Doing::Writing { renewal, id, answer_at } => {
                if answer_at > now {
                    process.doing = Doing::Writing { renewal, id, answer_at };
                } else if self.done.contains(&id) {
                    process.share.granted(renewal);
                } else {
                    process.share.lose_sight();
                    process.doing = Doing::Nothing { until: now }; // read and try again at once
                }
                return;
            }
        };
        if write && let Ok(Some(renewal)) = process.share.ask(process.wants_milli, clock) {
            self.last_id += 1;
            let (id, table) = (self.last_id, renewal.table.clone());
            self.writes.push_back(Write { id, arrives_at: now + to, table });
            let answer_at = now + to + back;
            process.doing = if to + back > TIMEOUT_MS {
                // The answer comes too late or never; the write itself may still be done. What is lost is
                // forgotten at once: the worst a process may do.
                process.share.lose_sight();
                Doing::Nothing { until: now + TIMEOUT_MS }
            } else {
                Doing::Writing { renewal, id, answer_at }
            };
        }
    }

    fn rate(&self) -> u64 {
        self.processes.iter().map(|process| process.rate(self.now)).sum()
    }

    fn living(&self) -> Vec<usize> {
        (0..self.processes.len()).filter(|&index| !self.processes[index].killed).collect()
    }
}

impl Process {
    fn clock(&self, real: u64) -> MonoMs {
        let drift = real.cast_signed() * self.ppm / 1_000_000;
        MonoMs((self.offset + real).saturating_add_signed(drift))
    }

    fn rate(&self, real: u64) -> u64 {
        self.share.allowance(self.clock(real)).rate_milli
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// While processes come, go, are killed and change their minds, and while requests and answers are late
    /// or lost, all of them together may never send more than the limit. When it is over, they may send at
    /// least 90 % of what they could, within 20 s: the last write may be 6 s late, the lease that it brings is of a process
    /// that is gone and was alone, and has to end.
    #[test]
    fn the_sum_never_exceeds_the_limit_and_comes_back_to_it(seed in any::<u64>(), faults in 0u32..40) {
        let mut world = World::new(seed);
        world.faults = faults;
        for _ in 0..3 {
            world.join(CAPACITY);
        }
        for _ in 0..30_000 / STEP_MS {
            world.step();
            let sum = world.rate();
            prop_assert!(sum <= CAPACITY, "{sum} at {} ms", world.now);
            let living = world.living();
            let chosen = living[world.random.random_range(0..living.len())];
            match world.random.random_range(0..2_000) {
                0..2 if living.len() > 1 => world.processes[chosen].killed = true,
                2..5 if living.len() < 8 => world.join(CAPACITY),
                5..15 => world.processes[chosen].wants_milli = world.random.random_range(0..=CAPACITY),
                15..20 => world.processes[chosen].wants_milli = 0,
                _ => {}
            }
        }
        world.faults = 0;
        for _ in 0..20_000 / STEP_MS {
            world.step();
            prop_assert!(world.rate() <= CAPACITY);
        }
        let wanted: u64 = world.living().iter().map(|&index| world.processes[index].wants_milli).sum();
        let (sum, expected) = (world.rate(), wanted.min(CAPACITY) * 9 / 10);
        prop_assert!(sum >= expected, "{sum} of {wanted} wanted; {:#?}", world.table);
    }

    /// A limit that is changed in one process after the other is held by all from when the last lease under
    /// the old one has been renewed or has ended, and never is the higher one exceeded.
    #[test]
    fn a_limit_that_differs_between_processes(seed in any::<u64>(), new in 1_000u64..200_000) {
        let mut world = World::new(seed);
        for _ in 0..3 {
            world.join(CAPACITY);
        }
        let mut restarts: Vec<u64> = (0..3).map(|_| world.random.random_range(8_000..20_000)).collect();
        restarts.sort_unstable();
        for _ in 0..40_000 / STEP_MS {
            world.step();
            let sum = world.rate();
            prop_assert!(sum <= CAPACITY.max(new), "{sum} at {} ms", world.now);
            // The first one is restarted, and every other lease is renewed or ended.
            if world.now > restarts[0] + 7_000 {
                prop_assert!(sum <= new, "{sum} at {} ms, restarts {restarts:?}", world.now);
            }
            let due = restarts.iter().filter(|&&at| at <= world.now && at + STEP_MS > world.now).count();
            for _ in 0..due {
                let old = world.processes.iter().position(|p| !p.killed && p.capacity_milli == CAPACITY);
                if let Some(old) = old {
                    world.processes[old].killed = true;
                    world.join(new);
                }
            }
        }
        let living = world.living();
        prop_assert!(world.rate() * 10 >= new * 9, "{} of {new} by {}", world.rate(), living.len());
    }
}
