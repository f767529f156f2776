//! How a batch is delivered after its lease was lost, and when a message is condemned (design §8, B17).
//!
//! A lost lease means that a worker or the process died while messages were in flight, perhaps because of one of them.
//! Where it is known which those were, only they are charged, and the others continue at full pace. Where it is not
//! (another machine, a power cut), the batch's open messages go one at a time: first quickly, with outcomes recorded in
//! groups; after a second loss without progress each is marked as begun, in the commit that records its predecessor,
//! before it is sent. From then on a further loss charges exactly the one that was in flight.

/// From this many losses in a row on, each message is marked as begun before it is sent.
pub const EXACT_LOSSES: u8 = 2;

/// Deaths in which a message alone was in flight, until it is condemned: one may be chance, two bad luck.
pub const CONDEMNING_DEATHS: u8 = 3;

/// How to deliver a leased batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// All messages at once, as far as permits go.
    Together,
    /// One message at a time.
    Alone,
    /// One message at a time, each recorded, and the next marked as begun, before that is sent.
    AloneMarked,
}

impl Pace {
    /// The pace of a batch whose lease was lost `losses` times in a row without progress and without evidence.
    pub fn of(losses: u8) -> Self {
        match losses {
            0 => Self::Together,
            1..EXACT_LOSSES => Self::Alone,
            _ => Self::AloneMarked,
        }
    }
}

/// Whether a message that alone was in flight in `deaths_alone` deaths is given up.
pub fn is_condemned(deaths_alone: u8) -> bool {
    deaths_alone >= CONDEMNING_DEATHS
}

/// The most requests of one message that are lost without evidence of what was in flight, until it is condemned: one
/// together with its neighbours, one alone in company that was recorded, one alone without progress, and the deaths
/// that condemn it (I5).
pub const LOST_REQUESTS_MAX: u32 = 3 + CONDEMNING_DEATHS as u32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        batch::{BatchHeader, RowLayout},
        ids::{BatchId, FileId},
        terms::Terms,
    };
    use crate::model::{
        lease::Lease,
        ledger::{Deadline, Grant, Record, Standing},
        outcome::Verdict,
        priority::Priority,
        time::UnixMs,
    };
    use std::{collections::BTreeMap, sync::Arc};

    fn header() -> BatchHeader {
        BatchHeader {
            feed: "f".into(),
            destination: "d".into(),
            file: FileId([0; 16]),
            layout: RowLayout::Lines,
            template: None,
            content_type: String::new(),
            terms: Terms::default(),
            priority: Priority::Normal,
        }
    }

    /// Delivers a batch of `len` messages of which `poison` kills its process, always, and nothing says what was in
    /// flight. Outcomes of a batch that goes alone are recorded every `group` messages.
    fn deliver(len: u32, poison: u32, group: usize) -> (Vec<u32>, Vec<u32>) {
        let mut record = Record::new(len, UnixMs(0), UnixMs(0));
        let mut requests = vec![0u32; len as usize];
        let mut condemned = Vec::new();
        for life in 0..1_000u64 {
            let granted =
                record.lease("w", Deadline(life), Deadline(life), UnixMs(life * 1_000_000), UnixMs(0));
            if granted == Grant::Settled {
                return (requests, condemned);
            }
            assert_eq!(granted, Grant::Granted);
            let header = Arc::new(header());
            let lease = Lease::of(BatchId([0; 16]), header, bytes::Bytes::new(), &record);
            let fence = lease.token.fence;
            let settle = |record: &mut Record, indexes: &[u32], verdict: Verdict, begins: Option<u32>| {
                let verdicts: Vec<_> = indexes
                    .iter()
                    .map(|index| {
                        lease.open.iter().find(|open| open.index == *index).unwrap().verdict(verdict)
                    })
                    .collect();
                let details = BTreeMap::new();
                let standing =
                    Standing { fence, verdicts: &verdicts, details: &details, ends: false, begins };
                record.settle(standing).unwrap();
            };
            let sent = Verdict::Sent { at: UnixMs(life), status: 200 };
            for (&index, _) in lease.charged.iter().filter(|(_, (_, alone))| is_condemned(*alone)) {
                settle(&mut record, &[index], crate::model::retry::poisoned(UnixMs(life)), None);
                condemned.push(index);
            }
            let open: Vec<u32> = record.open().map(|index| index as u32).collect();
            match Pace::of(lease.losses) {
                Pace::Together => open.iter().for_each(|&index| requests[index as usize] += 1),
                Pace::Alone => {
                    let mut unrecorded = Vec::new();
                    for &index in &open {
                        requests[index as usize] += 1;
                        if index == poison {
                            break;
                        }
                        unrecorded.push(index);
                        if unrecorded.len() == group {
                            settle(&mut record, &std::mem::take(&mut unrecorded), sent, None);
                        }
                    }
                }
                Pace::AloneMarked => {
                    let mut last: Option<u32> = None;
                    for &index in &open {
                        settle(&mut record, &Vec::from_iter(last), sent, Some(index));
                        requests[index as usize] += 1;
                        if index == poison {
                            last = None;
                            break;
                        }
                        last = Some(index);
                    }
                    settle(&mut record, &Vec::from_iter(last), sent, None);
                }
            }
            if open.contains(&poison) {
                record.lose();
            } else {
                settle(&mut record, &open, sent, None);
            }
        }
        panic!("it never finishes");
    }

    #[test]
    fn a_poison_message_is_found_and_its_neighbours_are_not_condemned() {
        for poison in [0, 1, 7, 9] {
            for group in [1, 3, 100] {
                let (requests, condemned) = deliver(10, poison, group);
                assert_eq!(condemned, [poison], "groups of {group}");
                // I5: lost requests per id stay within the cap, plus the one that succeeds.
                assert!(requests[poison as usize] <= LOST_REQUESTS_MAX, "groups of {group}: {requests:?}");
                assert!(requests.iter().all(|&requests| requests <= LOST_REQUESTS_MAX), "{requests:?}");
            }
        }
    }

    #[test]
    fn what_was_in_flight_is_charged_and_nothing_else() {
        let mut record = Record::new(5, UnixMs(0), UnixMs(0));
        record.lease("w", Deadline(1), Deadline(0), UnixMs(0), UnixMs(0));
        record.charge(&[1, 3], false);
        record.lease("w", Deadline(1), Deadline(0), UnixMs(0), UnixMs(0));
        record.charge(&[3, 9], true); // 9 is not a message of it
        assert_eq!(record.losses, 0, "the others go at full pace");
        let charges: Vec<_> =
            record.exceptions.iter().map(|(index, e)| (*index, e.losses, e.losses_alone)).collect();
        assert_eq!(charges, [(1, 1, 0), (3, 2, 1)]);
    }

    #[test]
    fn a_message_that_was_begun_under_a_lease_given_back_is_not_charged_for_the_next() {
        let mut record = Record::new(2, UnixMs(0), UnixMs(0));
        let lease = |record: &mut Record| record.lease("w", Deadline(1), Deadline(0), UnixMs(0), UnixMs(0));
        lease(&mut record);
        let details = BTreeMap::new();
        let begins = Some(1);
        let standing = Standing { fence: 1, verdicts: &[], details: &details, ends: false, begins };
        record.settle(standing).unwrap();
        assert!(record.release(1));
        lease(&mut record);
        record.lose();
        assert!(record.exceptions.is_empty(), "{:?}", record.exceptions);
    }
}
