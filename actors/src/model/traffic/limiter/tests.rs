//! Nine receivers, simulated: what the limit finds by itself, against the best fixed one.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range};

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::SmallRng};

use super::*;

/// What sends.
#[derive(Clone, Copy)]
struct Sender {
    /// Messages per second that it can make.
    most: f64,
    /// Permits more that it makes use of, per second.
    ramp: f64,
}

const SENDER: Sender = Sender { most: 12_000.0, ramp: f64::INFINITY };

/// A receiver at one moment.
#[derive(Clone, Copy)]
struct Receiver {
    latency: f64,
    /// Requests above these are refused with a fast 503.
    slots: usize,
    /// Requests per second that it serves, in order.
    service: f64,
    /// The share that fails whatever the load.
    random: f64,
}

const IDLE: Receiver = Receiver { latency: 0.0, slots: usize::MAX, service: f64::INFINITY, random: 0.0 };

type Seconds = Vec<(u32, u32)>;

/// Good and bad answers in each second.
fn run(receiver: fn(f64) -> Receiver, seconds: usize, mut limiter: Limiter, sender: Sender) -> Seconds {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut counts: Seconds = vec![(0, 0); seconds];
    // In nanoseconds, so that a heap orders them.
    let nanos = |at: f64| (at * 1e9) as u64;
    let (mut events, mut leaving) = (BinaryHeap::new(), BinaryHeap::<Reverse<u64>>::new());
    let (mut now, mut in_flight, mut queue, mut next_send) = (0.0f64, 0usize, 0.0f64, 0.0f64);
    let (mut usable, mut ramped) = (limiter.limit() as f64, 0.0);
    loop {
        usable = (usable + (now - ramped) * sender.ramp).min(limiter.limit() as f64);
        ramped = now;
        while in_flight < usable as usize {
            next_send = next_send.max(now) + 1.0 / sender.most;
            while leaving.peek().is_some_and(|at| at.0 <= nanos(next_send)) {
                leaving.pop();
            }
            let is = receiver(next_send);
            let mut latency = is.latency * rng.random_range(0.9..1.2);
            let mut ok = true;
            if rng.random::<f64>() < is.random {
                (latency, ok) = (latency / 2.0, false);
            } else if leaving.len() >= is.slots {
                (latency, ok) = (0.002, false);
            } else if is.service.is_finite() {
                queue = queue.max(next_send) + 1.0 / is.service;
                latency += queue - next_send;
            }
            leaving.push(Reverse(nanos(next_send + latency)));
            let base = limiter.base().map_or(0.0, |base| base.as_secs_f64());
            let held = if ok { latency } else { latency.max(base) }; // rule 7
            events.push(Reverse((nanos(next_send + held), nanos(latency), ok)));
            in_flight += 1;
        }
        let Reverse((at, latency, ok)) = events.pop().expect("the limit is never 0");
        now = at as f64 / 1e9;
        let Some((good, bad)) = counts.get_mut(now as usize) else { return counts };
        *if ok { good } else { bad } += 1;
        limiter.answered(MonoMs(at / 1_000_000), ok.then(|| Duration::from_nanos(latency)), in_flight);
        in_flight -= 1;
    }
}

fn good(counts: &Seconds, over: Range<usize>) -> f64 {
    counts[over].iter().map(|(good, _)| f64::from(*good)).sum()
}

fn errors(counts: &Seconds) -> f64 {
    let (good, bad) = counts.iter().fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
    f64::from(bad) / f64::from(good + bad)
}

/// What "auto" reaches in these seconds, of the best of these fixed limits in the same seconds.
fn compare(receiver: fn(f64) -> Receiver, seconds: usize, fixed: &[usize], over: Range<usize>) -> (f64, f64) {
    compare_from(SENDER, receiver, seconds, fixed, over)
}

/// The same for another sender.
fn compare_from(
    sender: Sender,
    receiver: fn(f64) -> Receiver,
    seconds: usize,
    fixed: &[usize],
    over: Range<usize>,
) -> (f64, f64) {
    let run = |bound| run(receiver, seconds, Limiter::new(bound), sender);
    let found = run(Bound::Auto { ceiling: 1024 });
    let best = fixed.iter().map(|&limit| good(&run(Bound::Fixed(limit)), over.clone())).fold(0.0, f64::max);
    (good(&found, over) / best, errors(&found))
}

#[test]
fn near_and_far_receivers_that_bear_all_are_used_fully() {
    for (receiver, seconds) in [
        ((|_| Receiver { latency: 0.001, ..IDLE }) as fn(f64) -> Receiver, 6),
        (|_| Receiver { latency: 0.02, ..IDLE }, 8),
        (|_| Receiver { latency: 0.15, ..IDLE }, 12),
    ] {
        let (reached, errors) = compare(receiver, seconds, &[64, 1024], 3..seconds);
        assert!(reached >= 0.9 && errors == 0.0, "{reached}");
    }
}

#[test]
fn a_receiver_with_slots_is_filled_at_few_errors() {
    let (reached, errors) =
        compare(|_| Receiver { latency: 0.02, slots: 50, ..IDLE }, 20, &[32, 48, 50, 64], 3..20);
    assert!(reached >= 0.9 && errors <= 0.02, "{reached} at {errors}");
}

#[test]
fn a_receiver_with_a_queue_is_kept_busy() {
    for receiver in
        [(|_| Receiver { latency: 0.02, service: 2_000.0, ..IDLE }) as fn(f64) -> Receiver, |_| Receiver {
            latency: 0.1,
            service: 500.0,
            ..IDLE
        }]
    {
        let (reached, _) = compare(receiver, 16, &[64, 128, 256], 3..16);
        assert!(reached >= 0.9, "{reached}");
    }
}

#[test]
fn errors_that_do_not_depend_on_the_load_slow_nothing() {
    for (receiver, most) in [
        ((|_| Receiver { latency: 0.02, random: 0.1, ..IDLE }) as fn(f64) -> Receiver, 0.12),
        (|_| Receiver { latency: 0.02, random: 0.4, ..IDLE }, 0.42),
        // They begin while it is used fully.
        (|t| Receiver { latency: 0.02, random: if t > 8.0 { 0.4 } else { 0.0 }, ..IDLE }, 0.42),
    ] {
        let (reached, errors) = compare(receiver, 40, &[64, 512, 1024], 3..40);
        assert!(reached >= 0.9 && errors < most, "{reached} at {errors}");
    }
}

#[test]
fn what_was_chance_is_not_taken_for_it_when_places_are_short_later() {
    let receiver = |t| {
        let (random, slots) = if t < 8.0 { (0.4, 500) } else { (0.0, 50) };
        Receiver { latency: 0.02, random, slots, ..IDLE }
    };
    let counts = run(receiver, 40, Limiter::new(Bound::Auto { ceiling: 1024 }), SENDER);
    let late = counts[30..].to_vec();
    assert!(errors(&late) <= 0.02 && good(&late, 0..10) >= 10.0 * 0.9 * 50.0 / 0.021, "{late:?}");
}

#[test]
fn what_was_the_receivers_own_share_is_not_so_for_ever() {
    // It has no more permits than would bring it above that share again.
    let limiter = Limiter { own_errors: 0.4, ..Limiter::new(Bound::Auto { ceiling: 90 }) };
    let counts = run(|_| Receiver { latency: 0.02, slots: 50, ..IDLE }, 40, limiter, SENDER);
    let (early, late) = (counts[5..15].to_vec(), counts[30..].to_vec());
    assert!(errors(&early) > 0.3 && errors(&late) <= 0.02, "{counts:?}");
}

#[test]
fn f45_a_latency_that_grows_20_times_and_falls_again_is_followed() {
    let receiver = |t| Receiver { latency: if (8.0..23.0).contains(&t) { 0.1 } else { 0.005 }, ..IDLE };
    for over in [3..8, 18..23, 25..32] {
        let (reached, _) = compare(receiver, 32, &[64, 256, 1024], over.clone());
        assert!(reached >= 0.9, "{reached} in {over:?}");
    }
}

#[test]
fn slots_that_go_and_come_back_are_found_again_within_10_s() {
    let receiver =
        |t| Receiver { latency: 0.02, slots: if (8.0..20.0).contains(&t) { 50 } else { 200 }, ..IDLE };
    for over in [3..8, 18..20, 30..36] {
        let (reached, errors) = compare(receiver, 36, &[50, 190, 256], over.clone());
        assert!(reached >= 0.9 && errors <= 0.05, "{reached} in {over:?} at {errors}");
    }
}

#[test]
fn a_sender_that_is_slow_to_use_its_permits_does_not_take_a_lack_of_places_for_chance() {
    let sender = Sender { most: 30_000.0, ramp: 1_500.0 };
    let receiver =
        |t| Receiver { latency: 0.02, slots: if (12.0..26.0).contains(&t) { 50 } else { 400 }, ..IDLE };
    for over in [3..12, 15..26, 34..42] {
        let (reached, errors) = compare_from(sender, receiver, 42, &[48, 128, 380, 1024], over.clone());
        assert!(reached >= 0.9 && errors <= 0.025, "{reached} in {over:?} at {errors}");
    }
    // 7 s after the places are back it is nearly where it was.
    let counts = run(receiver, 34, Limiter::new(Bound::Auto { ceiling: 1024 }), sender);
    assert!(good(&counts, 33..34) >= 0.8 * good(&counts, 5..12) / 7.0, "{counts:?}");
    // And what is chance is still taken for it.
    let receiver = |_| Receiver { latency: 0.02, random: 0.1, ..IDLE };
    let (reached, errors) = compare_from(sender, receiver, 12, &[64, 512, 1024], 3..12);
    assert!(reached >= 0.9 && errors < 0.12, "{reached} at {errors}");
}

#[test]
fn an_operators_number_holds_at_once_and_is_reached_slowly_after_an_outage() {
    let mut limiter = Limiter::new(Bound::Fixed(64));
    assert_eq!(limiter.limit(), 64);
    limiter.restart();
    assert_eq!(limiter.limit(), 4);
    let mut seen = Vec::new();
    for at in 0..600 {
        limiter.answered(MonoMs(1_000 + at * 5), None, limiter.limit());
        seen.push(limiter.limit());
    }
    seen.dedup();
    assert_eq!(seen, [4, 8, 16, 32, 64], "errors don't lower it: an operator has said so");
    limiter.rebound(Bound::Fixed(2));
    assert_eq!(limiter.limit(), 2);
    limiter.restart();
    assert_eq!(limiter.limit(), 2, "never above what was said");
}

#[test]
fn wilsons_bound_is_as_in_the_books() {
    for (count, of, expected) in [(0, 50, 0.0), (5, 50, 0.050), (50, 50, 0.949), (100, 1000, 0.0856)] {
        let found = wilson_lower(count, of);
        assert!((found - expected).abs() < 0.001, "{count} of {of}: {found}");
    }
}

proptest! {
    #[test]
    fn the_limit_stays_within_its_bounds_whatever_is_answered(
        ceiling in 1usize..2_000,
        answers in prop::collection::vec((0u64..400, prop::option::of(0u64..60_000), 0usize..3_000), 1..600),
    ) {
        let bound = Bound::Auto { ceiling };
        let mut limiter = Limiter::new(bound);
        let mut now = 0;
        for (wait, latency, in_flight) in answers {
            now += wait;
            limiter.answered(MonoMs(now), latency.map(Duration::from_millis), in_flight);
            prop_assert!((bound.floor()..=ceiling).contains(&limiter.limit()), "{}", limiter.limit());
            prop_assert!(limiter.latencies.len() <= LATENCIES_MAX && limiter.second.len() < 32);
        }
    }
}
