//! How many messages a worker leases ahead of what it sends.

use std::time::Duration;

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

/// Messages of a destination that may wait in a worker which has up to `concurrency` of them in flight and sends
/// `rate_per_s`, if a rate limits it.
pub fn ahead(concurrency: usize, rate_per_s: Option<usize>, lease: Duration) -> usize {
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
        let at = |rate, lease| ahead(64, Some(rate), lease);
        assert_eq!((ahead(64, None, minute), ahead(512, None, minute)), (1_000, 2_048));
        assert_eq!((at(10, minute), at(5, minute), at(30, minute)), (300, 150, 900));
        assert_eq!((at(100, minute), at(usize::MAX, Duration::MAX)), (1_000, 1_000));
        assert_eq!((at(0, minute), at(50, Duration::from_secs(3))), (16, 500));
    }
}
