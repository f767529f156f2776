//! New bodies for messages that were never sent: the one way out of I4, for an operator who has corrected a template.

use super::{
    codec,
    record::{Record, Rendered},
    settle::Changes,
};
use crate::model::{codec::Damaged, outcome::Reason, time::UnixMs};

/// Why the messages of a batch keep their bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeepsBody {
    /// One of them is still to be sent: a worker may have the body already.
    #[error("messages of their batch are still to be sent")]
    Open,
    /// One that would have to be sent may have been received.
    #[error("they may have been received")]
    MayBeReceived,
}

/// Whether an attempt that failed for this reason has brought nothing to anybody. A TLS handshake that fails may do so
/// after the request was written.
fn has_sent_nothing(reason: Reason) -> bool {
    matches!(reason, Reason::Render | Reason::Dns | Reason::Connect)
}

impl Record {
    /// Why its messages keep their bodies; `None` if none that may ever be sent again was sent since they were made.
    /// `history` is all of its failed attempts.
    ///
    /// A lease that ends without a record of everything (it was lost, given back, or its receiver was suspect) says
    /// nothing of what was sent under it. So there must not have been more than the one under which they died, each by
    /// attempts that were recorded and sent nothing. That refuses more than it must, and never too little.
    pub fn keeps_bodies<'a>(
        &self,
        history: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Option<KeepsBody>, Damaged> {
        if !self.is_settled() {
            return Ok(Some(KeepsBody::Open));
        }
        let mut has_sent = self.fence > self.rendered.fence + 1 || self.losses > 0 || self.has_suspects();
        let deaths = self.exceptions.values().filter_map(|exception| exception.death.as_ref());
        has_sent |= deaths.into_iter().any(|death| !has_sent_nothing(death.attempt.reason));
        for chunk in history {
            let failures = codec::decode_history(chunk)?.into_iter();
            let is_dead =
                |index: u32| self.exceptions.get(&index).is_some_and(|exception| exception.death.is_some());
            let mut of_dead = failures.filter(|failure| is_dead(failure.index));
            has_sent |= of_dead.any(|failure| !has_sent_nothing(failure.attempt.reason));
        }
        Ok(has_sent.then_some(KeepsBody::MayBeReceived))
    }

    /// Notes that the bodies of its messages are made anew from `at` on, and opens the dead ones at `indexes` again. Only
    /// if [`Self::keeps_bodies`] says nothing against it.
    pub fn rerender(&mut self, indexes: impl IntoIterator<Item = u32>, at: UnixMs) -> Changes {
        let changes = self.redrive(indexes, at);
        if !changes.rose.is_empty() {
            self.rendered = Rendered { fence: self.fence, at };
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

    use super::*;
    use crate::model::{
        ledger::{Deadline, Failure, Grant, MessageVerdict, Standing},
        outcome::{Attempt, DeathCause, Verdict},
        state::MessageState,
    };

    const MESSAGES: u32 = 4;

    /// One batch, its worker, and what has left the machine since its bodies were made.
    struct World {
        record: Record,
        history: Vec<Vec<u8>>,
        random: SmallRng,
        now: u64,
        left: [bool; MESSAGES as usize],
    }

    impl World {
        fn new(seed: u64) -> Self {
            Self {
                record: Record::new(MESSAGES, UnixMs(0), UnixMs(0)),
                history: Vec::new(),
                random: SmallRng::seed_from_u64(seed),
                now: 1,
                left: [false; MESSAGES as usize],
            }
        }

        fn keeps_bodies(&self) -> Option<KeepsBody> {
            self.record.keeps_bodies(self.history.iter().map(Vec::as_slice)).unwrap()
        }

        /// A lease under which each message may be attempted, with whatever end.
        fn lease(&mut self) {
            self.now += 1_000;
            let (now, wall) = (Deadline(self.now), UnixMs(self.now));
            let until = Deadline(self.now + 10);
            if self.record.lease("w", until, now, wall, UnixMs(0)) != Grant::Granted {
                return;
            }
            let mut verdicts = Vec::new();
            for index in self.record.open().collect::<Vec<_>>() {
                let reason = match self.random.random_range(0..12u8) {
                    0..=3 => Reason::Render,
                    4 => Reason::Connect,
                    5 => Reason::Dns,
                    6 => Reason::Status,
                    7 => Reason::Tls,
                    8 => {
                        // Answered, and yet not recorded: the destination is suspect.
                        self.left[index] = true;
                        continue;
                    }
                    _ => continue,
                };
                self.left[index] |= matches!(reason, Reason::Status | Reason::Tls);
                let attempt = Attempt { at: UnixMs(self.now), status: 0, reason };
                let verdict = if reason == Reason::Render || self.random.random() {
                    Verdict::Dead { attempt, cause: DeathCause::Permanent }
                } else {
                    Verdict::Retry { attempt, not_before: UnixMs(self.now) }
                };
                let (drive, tries) = (self.record.drive(index), self.record.tries[index]);
                verdicts.push(MessageVerdict {
                    index: index as u32,
                    drive,
                    attempt: u32::from(tries) + 1,
                    verdict,
                });
            }
            let is_lost = self.random.random_range(0..4u8) == 0;
            let details = BTreeMap::new();
            let standing = Standing {
                fence: self.record.fence,
                verdicts: &verdicts,
                details: &details,
                ends: !is_lost,
                begins: None,
            };
            let changes = self.record.settle(standing).unwrap();
            if !changes.failures.is_empty() {
                self.history.push(codec::encode_history(&changes.failures));
            }
            if is_lost {
                self.record.lose();
            }
        }
    }

    #[test]
    fn i4_no_message_that_may_have_been_received_gets_another_body() {
        let (mut allowed, mut refused) = (0, 0);
        for seed in 0..20_000 {
            let mut world = World::new(seed);
            for _ in 0..12 {
                world.lease();
                let dead = |world: &World, index: usize| world.record.states.get(index) == MessageState::Dead;
                if !(0..MESSAGES as usize).any(|index| dead(&world, index)) || world.random.random() {
                    continue;
                }
                if let Some(why) = world.keeps_bodies() {
                    assert_eq!(why == KeepsBody::Open, !world.record.is_settled());
                    refused += 1;
                    let some: Vec<_> = (0..MESSAGES).filter(|_| world.random.random()).collect();
                    world.record.redrive(some, UnixMs(world.now));
                    continue;
                }
                for index in 0..MESSAGES as usize {
                    assert!(!(dead(&world, index) && world.left[index]), "seed {seed}, message {index}");
                }
                allowed += 1;
                let some: Vec<_> = (0..MESSAGES).filter(|_| world.random.random()).collect();
                let changes = world.record.rerender(some, UnixMs(world.now));
                if !changes.rose.is_empty() {
                    // Of the others none is sent again.
                    world.left = [false; MESSAGES as usize];
                    assert_eq!(
                        world.record.rendered,
                        Rendered { fence: world.record.fence, at: UnixMs(world.now) }
                    );
                }
            }
        }
        assert!(allowed > 500 && refused > 1_000, "{allowed} allowed, {refused} refused");
    }

    #[test]
    fn what_died_of_a_template_twice_is_rendered_twice_and_what_was_answered_is_not() {
        let attempt = |reason| Attempt { at: UnixMs(5), status: 0, reason };
        let die = |record: &mut Record, reason: Reason| {
            let granted = record.lease("w", Deadline(9), Deadline(0), UnixMs(9), UnixMs(0));
            assert_eq!(granted, Grant::Granted);
            let verdict = Verdict::Dead { attempt: attempt(reason), cause: DeathCause::Permanent };
            let verdicts = [MessageVerdict { index: 0, drive: record.drive(0), attempt: 1, verdict }];
            let details = BTreeMap::new();
            let fence = record.fence;
            let standing =
                Standing { fence, verdicts: &verdicts, details: &details, ends: true, begins: None };
            codec::encode_history(&record.settle(standing).unwrap().failures)
        };
        let mut record = Record::new(1, UnixMs(0), UnixMs(0));
        let first = die(&mut record, Reason::Render);
        assert_eq!(record.keeps_bodies([&*first]), Ok(None));
        assert_eq!(record.rerender([0], UnixMs(6)).rose, [0]);
        assert_eq!(record.keeps_bodies([&*first]), Ok(Some(KeepsBody::Open)));
        let second = die(&mut record, Reason::Render);
        assert_eq!(record.keeps_bodies([&*first, &*second]), Ok(None));
        record.rerender([0], UnixMs(7));
        assert_eq!(
            (record.rendered, record.fate(0).unwrap().rendered_at),
            (Rendered { fence: 2, at: UnixMs(7) }, Some(UnixMs(7)))
        );
        let third = die(&mut record, Reason::Status);
        let refused = Ok(Some(KeepsBody::MayBeReceived));
        assert_eq!(record.keeps_bodies([&*first, &*second, &*third]), refused);
        // Also if the death alone says so, or the history alone.
        assert_eq!(record.keeps_bodies([]), refused);
        let mut of_status = record.clone();
        of_status.exceptions.get_mut(&0).unwrap().death.as_mut().unwrap().attempt = attempt(Reason::Render);
        assert_eq!(of_status.keeps_bodies([]), Ok(None));
        let failure = Failure { index: 0, drive: 0, attempt_number: 1, attempt: attempt(Reason::Timeout) };
        assert_eq!(of_status.keeps_bodies([&*codec::encode_history(&[failure])]), refused);
        assert!(of_status.keeps_bodies([&b"?"[..]]).is_err());
    }
}
