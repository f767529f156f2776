//! The roster of a destination that keeps an order.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::model::outcome::{Attempt, DeathCause, Reason};

const NOW: UnixMs = UnixMs(1_000_000);
const HOUR: Duration = Duration::from_hours(1);
const SENT: Report = Report::Verdict(Verdict::Sent { at: NOW, status: 200 });
const FAILED: Attempt = Attempt { at: NOW, status: 503, reason: Reason::Status };
const DEAD: Report = Report::Verdict(Verdict::Dead { attempt: FAILED, cause: DeathCause::Permanent });

fn retry(not_before: UnixMs) -> Report {
    Report::Verdict(Verdict::Retry { attempt: FAILED, not_before })
}

/// Everything may go.
struct Open;

impl Admission for Open {
    fn ask(&mut self, _: usize, _: LeaseToken, _: bool, messages: usize) -> Answer {
        Answer::Granted(messages)
    }

    fn has_none(&mut self, _: usize) {}
}

/// A message, as the store has it.
#[derive(Clone, Copy)]
struct Message {
    key: u64,
    tries: u32,
    not_before: UnixMs,
    has_ended: bool,
}

/// A batch, as the store has it.
struct Stored {
    messages: Vec<Message>,
    fence: u64,
    pace: Pace,
    is_leased: bool,
}

/// A worker's roster and the store.
struct Ordered {
    roster: Roster,
    bundle: usize,
    batches: Vec<Stored>,
}

fn id(batch: usize) -> BatchId {
    BatchId([batch as u8; 16])
}

impl Ordered {
    /// These batches, given by the keys of their messages, are leased.
    fn new(bundle: usize, batches: &[&[u64]]) -> Self {
        let mut this = Self { roster: Self::roster(bundle), bundle, batches: Vec::new() };
        for keys in batches {
            this.accept(keys);
        }
        this.lease(NOW);
        this
    }

    fn roster(bundle: usize) -> Roster {
        let mut roster = Roster::new(10_000, [bundle]);
        roster.keep_order(0, HOUR);
        roster
    }

    fn accept(&mut self, keys: &[u64]) {
        let message = |&key| Message { key, tries: 0, not_before: NOW, has_ended: false };
        let messages = keys.iter().map(message).collect();
        self.batches.push(Stored { messages, fence: 0, pace: Pace::Together, is_leased: false });
    }

    /// Leases all there is, as a worker does: nothing while something is yet to be given back.
    fn lease(&mut self, now: UnixMs) {
        if self.roster.is_giving_back(0) {
            return;
        }
        for (nth, stored) in self.batches.iter_mut().enumerate().filter(|(_, stored)| !stored.is_leased) {
            let open = |(index, message): (usize, &Message)| {
                let Message { tries, not_before, has_ended, .. } = *message;
                (!has_ended).then_some(OpenMessage { not_before, index: index as u32, drive: 0, tries })
            };
            let open: Vec<_> = stored.messages.iter().enumerate().filter_map(open).collect();
            if open.is_empty() {
                continue;
            }
            stored.is_leased = true;
            stored.fence += 1;
            let token = LeaseToken { batch: id(nth), fence: stored.fence };
            let keys =
                open.iter().map(|open| (open.index, stored.messages[open.index as usize].key)).collect();
            let (file, priority, pace) = (FileId([0; 16]), Priority::Normal, stored.pace);
            self.roster.add(0, Incoming { token, file, priority, pace, open, keys }, now);
        }
    }

    /// Gives back and records what there is.
    fn give_back(&mut self, now: UnixMs) {
        for ready in self.roster.take_ready(0, now, Duration::ZERO) {
            self.roster.recorded(ready.token, ready.verdicts.len());
            if ready.ends {
                self.ends(ready.token);
            }
        }
        for token in self.roster.returnable() {
            self.ends(token);
        }
    }

    fn ends(&mut self, token: LeaseToken) {
        self.roster.remove(token);
        self.batches[usize::from(token.batch.0[0])].is_leased = false;
    }

    /// The process is killed; the next one has begun.
    fn kill(&mut self, pace: Pace, now: UnixMs) {
        self.roster = Self::roster(self.bundle);
        for stored in self.batches.iter_mut().filter(|stored| stored.is_leased) {
            (stored.is_leased, stored.pace) = (false, pace);
        }
        self.lease(now);
    }

    /// The messages that may go at `now`, in the requests they go in.
    fn pick(&mut self, now: UnixMs) -> Vec<Vec<Pick>> {
        let mut requests = Vec::new();
        loop {
            let mut picks = Vec::new();
            self.roster.pick(now, &mut Open, &mut picks);
            if picks.is_empty() {
                return requests;
            }
            requests.push(picks);
        }
    }

    /// The same by batch and index.
    fn names(&mut self, now: UnixMs) -> Vec<(u8, u32)> {
        self.pick(now).iter().flatten().map(|pick| (pick.token.batch.0[0], pick.index)).collect()
    }

    fn message(&mut self, pick: Pick) -> &mut Message {
        &mut self.batches[usize::from(pick.token.batch.0[0])].messages[pick.index as usize]
    }

    fn report(&mut self, picks: &[Pick], now: UnixMs, report: Report) {
        self.roster.ended(0);
        for &pick in picks.iter().rev() {
            let message = self.message(pick);
            match report {
                Report::Unsent => {}
                Report::Verdict(Verdict::Retry { not_before, .. }) => {
                    (message.tries, message.not_before) = (pick.attempt, not_before);
                }
                Report::Verdict(_) => message.has_ended = true,
            }
            self.roster.report(pick, report, usize::MAX, now);
        }
    }
}

#[test]
fn b13_one_of_a_key_goes_at_a_time_across_batches_and_its_neighbours_go() {
    let mut ordered = Ordered::new(1, &[&[7, 8, 7], &[7, 9]]);
    let first = ordered.pick(NOW);
    let names: Vec<_> = first.iter().flatten().map(|pick| (pick.token.batch.0[0], pick.index)).collect();
    assert_eq!(names, [(0, 0), (0, 1), (1, 1)]);
    // It is tried again in half an hour, and nobody of its key goes before it.
    let due = UnixMs(NOW.0 + 1_800_000);
    ordered.report(&first[0], NOW, retry(due));
    ordered.report(&first[1], NOW, SENT);
    ordered.report(&first[2], NOW, SENT);
    ordered.give_back(NOW);
    assert!(ordered.pick(UnixMs(due.0 - 1)).is_empty());
    assert_eq!(ordered.roster.next_due(), Some(due));
    let held_for = |batch| ordered.roster.held_for(LeaseToken { batch: id(batch), fence: 1 });
    assert_eq!((held_for(0), held_for(1)), (Some(vec![0, 2]), Some(vec![0])));
    let again = ordered.pick(due);
    assert_eq!((again.len(), again[0][0].index, again[0][0].attempt), (1, 0, 2));
    ordered.report(&again[0], due, SENT);
    assert_eq!(ordered.names(due), [(0, 2)]);
}

#[test]
fn b13_a_bundle_has_one_message_of_a_key() {
    let mut ordered = Ordered::new(10, &[&[1, 2, 1, 3, 2]]);
    let requests = ordered.pick(NOW);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].iter().map(|pick| pick.index).collect::<Vec<_>>(), [0, 1, 3]);
    ordered.report(&requests[0], NOW, SENT);
    assert_eq!(ordered.names(NOW), [(0, 2), (0, 4)]);
}

#[test]
fn b13_what_is_given_up_gives_its_turn_to_the_next_and_what_was_not_tried_keeps_it() {
    let mut ordered = Ordered::new(1, &[&[7, 7]]);
    let first = ordered.pick(NOW);
    ordered.report(&first[0], NOW, Report::Unsent);
    let again = ordered.pick(NOW);
    assert_eq!((again[0][0].index, again[0][0].attempt), (0, 1));
    ordered.report(&again[0], NOW, DEAD);
    assert_eq!(ordered.names(NOW), [(0, 1)]);
}

#[test]
fn b13_what_is_held_is_given_back_whole_and_nothing_is_leased_before() {
    let mut ordered = Ordered::new(1, &[&[7, 8], &[7, 9]]);
    let first = ordered.pick(NOW);
    assert_eq!(first.len(), 3);
    ordered.report(&first[1], NOW, retry(NOW));
    ordered.roster.stop_batch(LeaseToken { batch: id(1), fence: 1 });
    assert!(ordered.pick(NOW).is_empty(), "the other batch stops too");
    assert_eq!(ordered.roster.held_for(LeaseToken { batch: id(9), fence: 1 }), None);
    ordered.give_back(NOW);
    ordered.accept(&[7, 6]);
    ordered.lease(NOW);
    assert!(ordered.pick(NOW).is_empty(), "two are in flight");
    ordered.report(&first[0], NOW, retry(NOW));
    ordered.report(&first[2], NOW, Report::Unsent);
    ordered.give_back(NOW);
    assert!(ordered.roster.is_empty());
    ordered.lease(NOW);
    let mut names = ordered.names(NOW);
    names.sort_unstable();
    assert_eq!(names, [(0, 0), (0, 1), (1, 1), (2, 1)]);
}

#[test]
fn b13_what_was_leased_before_all_is_given_back_goes_with_it() {
    let mut ordered = Ordered::new(1, &[&[7]]);
    let first = ordered.pick(NOW);
    ordered.roster.stop(Some(0));
    // The answer to a lease that was asked for before.
    let open = vec![OpenMessage { not_before: NOW, index: 0, drive: 0, tries: 0 }];
    let (token, file) = (LeaseToken { batch: id(1), fence: 1 }, FileId([0; 16]));
    let keys = HashMap::from([(0, 7)]);
    let (priority, pace) = (Priority::Normal, Pace::Together);
    ordered.roster.add(0, Incoming { token, file, priority, pace, open, keys }, NOW);
    assert!(ordered.pick(NOW).is_empty());
    assert_eq!(ordered.roster.returnable(), [token]);
    assert_eq!(first.len(), 1);
}

proptest! {
    #[test]
    fn b13_never_two_of_a_key_and_each_key_in_row_order_whatever_happens(
        batches in prop::collection::vec(prop::collection::vec(0u64..6, 1..15), 1..8),
        bundle in 1usize..5,
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0u8..12), 0..300),
    ) {
        let mut ordered = Ordered::new(bundle, &[]);
        let mut coming = batches.iter();
        let (mut now, mut flying, mut ended) = (NOW, Vec::<Vec<Pick>>::new(), HashMap::<u64, Vec<(u8, u32)>>::new());
        let mut end = |ordered: &mut Ordered, picks: &[Pick]| {
            for &pick in picks {
                ended.entry(ordered.message(pick).key).or_default().push((pick.token.batch.0[0], pick.index));
            }
        };
        for (index, what) in steps {
            now.0 += 500;
            flying.extend(ordered.pick(now));
            let keys: Vec<_> = flying.iter().flatten().map(|pick| ordered.message(*pick).key).collect();
            prop_assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len(), "two of one key at once");
            match what {
                0 => coming.next().into_iter().for_each(|keys| ordered.accept(keys)),
                1 => ordered.lease(now),
                2 => ordered.give_back(now),
                3 if index.index(4) == 0 => ordered.roster.stop(Some(0)),
                3 if !ordered.batches.is_empty() => {
                    let nth = index.index(ordered.batches.len());
                    let token = LeaseToken { batch: id(nth), fence: ordered.batches[nth].fence };
                    ordered.roster.stop_batch(token);
                }
                4 if index.index(4) == 0 => {
                    // Nobody knows any more what was in flight.
                    flying.clear();
                    let pace = [Pace::Together, Pace::Alone, Pace::AloneMarked][index.index(3)];
                    ordered.kill(pace, now);
                }
                5.. if !flying.is_empty() => {
                    let picks = flying.swap_remove(index.index(flying.len()));
                    let due = UnixMs(now.0 + 20_000 * u64::from(what - 5));
                    match what {
                        5..8 => ordered.report(&picks, now, retry(due)),
                        8 => ordered.report(&picks, now, Report::Unsent),
                        _ => {
                            end(&mut ordered, &picks);
                            ordered.report(&picks, now, if what == 9 { DEAD } else { SENT });
                        }
                    }
                }
                _ => {}
            }
        }
        coming.for_each(|keys| ordered.accept(keys));
        for _ in 0..2_000 {
            for picks in std::mem::take(&mut flying) {
                end(&mut ordered, &picks);
                ordered.report(&picks, now, SENT);
            }
            ordered.give_back(now);
            ordered.lease(now);
            now.0 += 30_000;
            flying.extend(ordered.pick(now));
        }
        prop_assert!(ordered.roster.is_empty(), "all have ended");
        prop_assert_eq!(ended.values().map(Vec::len).sum::<usize>(), batches.iter().map(Vec::len).sum::<usize>());
        prop_assert!(ended.values().all(|rows| rows.is_sorted()), "{:?}", ended);
        prop_assert!(ordered.roster.destinations[0].order.as_ref().is_some_and(in_order::Order::is_empty));
    }
}
