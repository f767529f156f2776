//! Which batches of a destination are leased: retries first, but never in all of the room that a worker has (B11).

/// Of so many messages that are leased where both kinds wait, one was never tried: a destination that fails for a while
/// must not keep new messages waiting for as long as it is tried again.
pub const FRESH_ONE_IN: u32 = 5;

/// How a destination's leases were shared between the two kinds. It outlasts a lease, so that small ones are shared as
/// well: a worker that has room for one batch at a time would lease nothing but retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneShare {
    /// How many messages the retries are ahead of their share.
    retries_ahead: i64,
}

impl LaneShare {
    /// Chooses batches until `messages` of theirs are due, and at most `batches`. Each comes with how many of its
    /// messages are due, and each kind in the order in which it is to be leased. No more is read of either than is
    /// chosen, and one beyond.
    pub fn choose<T>(
        &mut self,
        retries: impl IntoIterator<Item = (T, usize)>,
        fresh: impl IntoIterator<Item = (T, usize)>,
        messages: usize,
        batches: usize,
    ) -> Vec<T> {
        let (mut retries, mut fresh) = (retries.into_iter().peekable(), fresh.into_iter().peekable());
        let mut chosen = Vec::new();
        let mut sum = 0;
        while chosen.len() < batches && sum < messages {
            let both_wait = retries.peek().is_some() && fresh.peek().is_some();
            let is_fresh = if both_wait { self.retries_ahead > 0 } else { retries.peek().is_none() };
            let Some((batch, due)) = (if is_fresh { fresh.next() } else { retries.next() }) else { break };
            if both_wait {
                let due = i64::try_from(due).unwrap_or(i64::MAX);
                let ahead = if is_fresh { due.saturating_mul(1 - i64::from(FRESH_ONE_IN)) } else { due };
                self.retries_ahead = self.retries_ahead.saturating_add(ahead);
            }
            sum += due;
            chosen.push(batch);
        }
        chosen
    }
}
