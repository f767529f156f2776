//! How a batch is delivered after its lease was lost (design §8).
//!
//! A lost lease means that a worker or the process died while messages were in flight, perhaps
//! because of one of them. Its unrecorded messages are suspects and are redelivered one at a time, so
//! that a poison message is found without condemning its neighbours: first quickly, with outcomes
//! recorded in groups; if the lease is lost again, with each outcome recorded before the next message
//! is begun. From then on the first unrecorded message is exactly the one that was in flight.

/// From this many losses on, each outcome is recorded before the next message begins.
pub const EXACT_LOSSES: u32 = 2;

/// The smallest cap on losses that condemns no message on the evidence of one loss alone.
pub const MIN_LOST_CAP: u32 = EXACT_LOSSES + 1;

/// How to deliver a leased batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// All messages at once, as far as permits go.
    Together,
    /// One message at a time.
    Alone,
    /// One message at a time, each recorded before the next begins.
    AloneRecorded,
    /// The first unrecorded message is dead without another attempt; then as `AloneRecorded`.
    Condemn,
}

impl Pace {
    /// The pace of a batch whose lease was lost `losses` times, where `lost_cap` losses condemn.
    pub fn of(losses: u32, lost_cap: u32) -> Self {
        match losses {
            0 => Self::Together,
            1 => Self::Alone,
            _ if losses >= lost_cap.max(MIN_LOST_CAP) => Self::Condemn,
            _ => Self::AloneRecorded,
        }
    }
}

/// The losses to store after a settlement recorded something: progress clears the message that is
/// first now of what its predecessors are charged with.
pub fn losses_after_progress(losses: u32) -> u32 {
    losses.min(EXACT_LOSSES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Delivers a batch of `len` messages of which `poison` kills its process, always.
    fn requests_until_settled(len: usize, poison: usize, lost_cap: u32) -> (Vec<u32>, Option<usize>) {
        let mut requests = vec![0u32; len];
        let mut settled = vec![false; len];
        let mut condemned = None;
        let mut losses = 0;
        'lease: loop {
            let open: Vec<_> = (0..len).filter(|&index| !settled[index]).collect();
            if open.is_empty() {
                return (requests, condemned);
            }
            match Pace::of(losses, lost_cap) {
                Pace::Together => {
                    for index in open {
                        requests[index] += 1;
                    }
                    losses += 1; // the poison is among them; nothing was recorded in time
                }
                Pace::Alone => {
                    for index in open {
                        requests[index] += 1;
                        if index == poison {
                            losses += 1; // the group was not recorded
                            continue 'lease;
                        }
                    }
                    unreachable!("the poison is not settled");
                }
                pace => {
                    let mut open = open.into_iter();
                    if pace == Pace::Condemn {
                        let first = open.next().expect("not empty");
                        settled[first] = true;
                        condemned = Some(first);
                        losses = losses_after_progress(losses);
                    }
                    for index in open {
                        requests[index] += 1;
                        if index == poison {
                            losses += 1;
                            continue 'lease;
                        }
                        settled[index] = true;
                        losses = losses_after_progress(losses);
                    }
                }
            }
        }
    }

    #[test]
    fn a_poison_message_is_found_and_its_neighbours_are_not_condemned() {
        for lost_cap in 3..7 {
            for poison in [0, 1, 7, 9] {
                let (requests, condemned) = requests_until_settled(10, poison, lost_cap);
                assert_eq!(condemned, Some(poison), "cap {lost_cap}");
                // I5: lost requests per id stay within the cap, plus the one that succeeds.
                assert_eq!(requests[poison], lost_cap, "cap {lost_cap}");
                assert!(
                    requests.iter().all(|&requests| requests <= lost_cap),
                    "cap {lost_cap}: {requests:?}"
                );
            }
        }
    }

    #[test]
    fn a_cap_too_small_to_be_fair_is_raised() {
        assert_eq!(Pace::of(2, 0), Pace::AloneRecorded);
        assert_eq!(Pace::of(3, 0), Pace::Condemn);
    }
}
