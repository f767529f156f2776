//! How many messages a worker leases ahead of what it sends.

use std::time::Duration;

use super::traffic::limiter::Bound;

/// Messages that wait in a worker for each that may be in flight, so that a lease is worth its transaction …
const PER_PERMIT: usize = 4;

/// … and at least …
const MIN: usize = 1_000;

/// … but where a rate limits it, no more than go out in this part of a lease: what waits here no other machine can send, and
/// its lease has to be extended …
const PART_OF_LEASE: u32 = 2;

/// … or in this time, however short the leases are: by what workers want it is decided how much the queue offers to all
/// machines …
const TIME_MIN: Duration = Duration::from_secs(10);

/// … and at least so many: a batch is leased whole anyway.
const MIN_LIMITED: usize = 16;

/// Messages in flight that are leased ahead for where the limit on them finds itself.
const AUTO: usize = 256;

/// One of several workers that send to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Which one, from 0.
    pub worker: usize,
    /// Of how many.
    pub workers: usize,
}

impl Rank {
    /// Its share of `total`: what is left over goes to the first ones.
    pub fn share(self, total: usize) -> usize {
        total / self.workers + usize::from(self.worker < total % self.workers)
    }
}

/// Messages of a destination that may wait in a worker, by the limits of all workers together; `None` if others send them
/// all. No more share it than may always have a message in flight: one that has leased messages must get its turn.
pub fn ahead(rank: Rank, bound: Bound, rate_per_s: Option<usize>, lease: Duration) -> Option<usize> {
    let sharing = Rank { workers: rank.workers.min(bound.floor()), ..rank };
    let concurrency = match bound {
        Bound::Auto { ceiling } => ceiling.min(AUTO),
        Bound::Fixed(number) => number,
    };
    let is_sharing = sharing.worker < sharing.workers && concurrency > 0;
    let rate = rate_per_s.map(|rate| sharing.share(rate));
    is_sharing.then(|| ahead_for(sharing.share(concurrency), rate, lease))
}

/// Messages that may wait in a worker which has up to `concurrency` of them in flight and sends `rate_per_s`, if a rate
/// limits it.
fn ahead_for(concurrency: usize, rate_per_s: Option<usize>, lease: Duration) -> usize {
    let ahead = MIN.max(PER_PERMIT * concurrency);
    let Some(rate) = rate_per_s else { return ahead };
    let time = (lease / PART_OF_LEASE).max(TIME_MIN);
    let sent = (rate as u128).saturating_mul(time.as_millis()) / 1_000;
    ahead.min(usize::try_from(sent).unwrap_or(usize::MAX).max(MIN_LIMITED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_leases_ahead_for_half_a_lease_at_its_rate_and_never_more_than_without_one() {
        let minute = Duration::from_mins(1);
        let at = |rate, lease| ahead_for(64, Some(rate), lease);
        assert_eq!((ahead_for(64, None, minute), ahead_for(512, None, minute)), (1_000, 2_048));
        assert_eq!((at(10, minute), at(5, minute), at(30, minute)), (300, 150, 900));
        assert_eq!((at(100, minute), at(usize::MAX, Duration::MAX)), (1_000, 1_000));
        assert_eq!((at(0, minute), at(50, Duration::from_secs(3))), (16, 500));
    }

    #[test]
    fn workers_share_a_destination_as_far_as_each_of_them_may_have_a_message_in_flight() {
        let minute = Duration::from_mins(1);
        let of = |workers, bound, rate| -> Vec<_> {
            (0..workers).map(|worker| ahead(Rank { worker, workers }, bound, rate, minute)).collect()
        };
        assert_eq!(of(3, Bound::Fixed(1), None), [Some(1_000), None, None]);
        assert_eq!(of(3, Bound::Fixed(2), Some(3)), [Some(60), Some(30), None]);
        assert_eq!(of(2, Bound::Fixed(1_001), None), [Some(2_004), Some(2_000)]);
        assert_eq!(of(2, Bound::Auto { ceiling: 1_024 }, Some(20)), [Some(300), Some(300)]);
        assert_eq!(of(1, Bound::Fixed(8), None), [Some(1_000)]);
        assert_eq!(Rank { worker: 1, workers: 3 }.share(8), 3);
    }
}
