//! Bundles: several messages of one batch in one request, as a JSON array.
//!
//! A bundle holds messages of one leased batch only, so they have destination, file, template and content type in common.
//! It takes one permit and counts as one attempt of its destination; a rate counts its messages. Its id is
//! [`BundleId`](super::ids::BundleId).
//!
//! What the receiver says of a bundle holds for all of its messages, unless it says something of each. There is one
//! exception: 400, 413 and 422 speak of the content, and one message may be to blame. So a bundle that is refused with one of
//! them is divided as a table's statement is, by [`bisect`](super::bisect). As there, dividing is no attempt (B16): each
//! message has one, with the request that decided on it. Of 400 and 422 nobody is blamed before the receiver has taken
//! something: three messages from all over the bundle go by themselves first, and if they are refused too, it is
//! the requests as such that are wrong. Then only these three are judged (and what they are judged by is
//! [`storm`](super::traffic::storm)); the others have not been tried.

use std::ops::Range;

use super::{
    bisect::{Bisection, Narrowed, Refusal},
    call::FailureKind,
    outcome::Outcome,
    table::divide,
};

/// Bytes of a request with several messages. Half of what nginx takes by default (`client_max_body_size 1m`): a bundle that is
/// refused as too large costs its bytes for nothing. A message that is larger by itself goes alone.
pub const BUNDLE_BYTES_MAX: usize = 512 << 10;

/// Bytes of an answer for each message that it may say something of: its id, a status, the receiver's own id and some
/// words.
pub const RESULT_BYTES_MAX: usize = 1 << 10;

/// The bodies of a request's messages. They are kept as they stand in an array, so that any part of them is one without
/// being copied.
#[derive(Debug, Default)]
pub struct Bodies {
    /// A byte, a body, a byte, a body …: the bytes between are brackets or commas, as [`Self::array`] needs them.
    bytes: Vec<u8>,
    places: Vec<Range<usize>>,
}

impl Bodies {
    /// Forgets them all.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.places.clear();
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether the bundle is empty.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Adds what `render` appends; nothing if it fails.
    pub fn push<E>(&mut self, render: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        let before = self.bytes.len();
        self.bytes.push(b',');
        let rendered = render(&mut self.bytes);
        if rendered.is_ok() {
            self.places.push(before + 1..self.bytes.len());
        } else {
            self.bytes.truncate(before);
        }
        rendered
    }

    /// One of them.
    pub fn body(&self, at: usize) -> &[u8] {
        &self.bytes[self.places[at].clone()]
    }

    /// Those of `range`, which is not empty, as a JSON array.
    pub fn array(&mut self, range: Range<usize>) -> &[u8] {
        let places = &self.places[range];
        let (first, last) = (places[0].start - 1, places[places.len() - 1].end);
        for place in places {
            self.bytes[place.start - 1] = b',';
        }
        self.bytes[first] = b'[';
        match self.bytes.get_mut(last) {
            Some(behind) => *behind = b']',
            None => self.bytes.push(b']'),
        }
        &self.bytes[first..=last]
    }

    /// How they are sent: in requests that are not too large, which are divided further where the receiver refuses them.
    pub fn requests(&self) -> Bisection {
        // With its comma; one that is too large by itself fills a request.
        let sizes = self.places.iter().map(|place| (place.len() + 1).min(BUNDLE_BYTES_MAX));
        let (requests, _) = divide(sizes, usize::MAX, BUNDLE_BYTES_MAX);
        Bisection::new(requests, false, false)
    }
}

/// The refusal of a request for its content, which says that it is to be divided.
pub fn refusal(outcome: &Outcome) -> Option<Refusal> {
    let Outcome::Permanent { status, .. } = *outcome else { return None };
    let kind = match status {
        413 => FailureKind::Invalid,
        400 | 422 => FailureKind::Refused,
        _ => return None,
    };
    Some(Refusal { kind, code: status.to_string().into(), words: String::new() })
}

/// What became of the messages of a bundle, as requests are made of parts of it.
#[derive(Debug)]
pub struct Progress {
    requests: Bisection,
    /// Whether the receiver has to be left alone with the rest.
    is_over: bool,
}

/// What an answer decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decided {
    /// On these messages.
    These(Range<usize>),
    /// On nothing: they go again in parts.
    Nothing,
}

impl Progress {
    /// Nothing has been sent yet.
    pub fn new(bodies: &Bodies) -> Self {
        Self { requests: bodies.requests(), is_over: false }
    }

    /// The messages to send next, in one request; the same until its answer is given. What was never decided on when this
    /// is `None` has not been tried.
    pub fn next(&self) -> Option<Range<usize>> {
        self.requests.next().filter(|_| !self.is_over).map(|next| next.rows)
    }

    /// How what [`Self::next`] said was answered as a whole. `draw`, in `0.0..1.0`, chooses the message that is tried alone.
    pub fn answered(&mut self, outcome: &Outcome, draw: f64) -> Decided {
        let Some(messages) = self.next() else { return Decided::Nothing };
        if let Some(refusal) = refusal(outcome) {
            // Whether it is to blame is the storm's to say, as of a message that always went alone.
            let is_single = messages.len() == 1;
            self.is_over = matches!(self.requests.refused(refusal, draw), Narrowed::Whole(_));
            return if is_single { Decided::These(messages) } else { Decided::Nothing };
        }
        // Anything but a 2xx says that the next request had better wait for its own permit.
        self.is_over = !matches!(outcome, Outcome::Sent { .. });
        self.requests.written();
        Decided::These(messages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::outcome::Reason;

    const SENT: Outcome = Outcome::Sent { status: 200 };

    fn status(status: u16) -> Outcome {
        Outcome::Permanent { status, reason: Reason::Status }
    }

    fn bodies(texts: &[&str]) -> Bodies {
        let mut bodies = Bodies::default();
        for text in texts {
            let append = |bytes: &mut Vec<u8>| {
                bytes.extend_from_slice(text.as_bytes());
                Ok::<_, ()>(())
            };
            bodies.push(append).unwrap();
        }
        bodies
    }

    /// What became of `count` messages, and in how many requests, at a receiver that answers by `answer`.
    fn send(
        count: usize,
        mut draw: impl FnMut() -> f64,
        mut answer: impl FnMut(Range<usize>) -> Outcome,
    ) -> (Vec<Option<Outcome>>, usize) {
        let mut progress = Progress::new(&bodies(&vec!["1"; count]));
        let (mut outcomes, mut requests) = (vec![None; count], 0);
        while let Some(messages) = progress.next() {
            requests += 1;
            let outcome = answer(messages);
            if let Decided::These(messages) = progress.answered(&outcome, draw()) {
                for at in messages {
                    assert_eq!(outcomes[at].replace(outcome), None, "B16: one attempt each");
                }
            }
        }
        (outcomes, requests)
    }

    #[test]
    fn any_part_of_the_bodies_is_an_array() {
        let mut bodies = bodies(&["{\"a\":1}", "2", "[3,4]"]);
        assert_eq!(bodies.array(0..3), b"[{\"a\":1},2,[3,4]]");
        assert_eq!(bodies.array(1..2), b"[2]");
        assert_eq!(bodies.array(1..3), b"[2,[3,4]]");
        assert_eq!(bodies.array(0..3), b"[{\"a\":1},2,[3,4]]");
        assert_eq!((bodies.body(0), bodies.len()), (&b"{\"a\":1}"[..], 3));
        let fails = |bytes: &mut Vec<u8>| {
            bytes.extend_from_slice(b"half");
            Err("it can't be rendered")
        };
        assert!(bodies.push(fails).is_err());
        assert_eq!(bodies.array(2..3), b"[[3,4]]");
        bodies.clear();
        assert!(bodies.is_empty());
    }

    #[test]
    fn a_request_has_its_bytes_and_a_large_message_goes_alone() {
        let large = "x".repeat(BUNDLE_BYTES_MAX / 2 - 1);
        let huge = "y".repeat(BUNDLE_BYTES_MAX * 2);
        let bodies = bodies(&[&large, &large, "1", &huge, "2"]);
        let mut progress = Progress::new(&bodies);
        let mut requests = Vec::new();
        while let Some(messages) = progress.next() {
            requests.push(messages);
            progress.answered(&SENT, 0.0);
        }
        assert_eq!(requests, [0..2, 2..3, 3..4, 4..5]);
    }

    #[test]
    fn an_answer_that_speaks_of_no_content_holds_for_all() {
        for outcome in [SENT, status(401), status(404), status(302), Outcome::Gone] {
            assert_eq!(send(100, || 0.5, |_| outcome), (vec![Some(outcome); 100], 1));
        }
    }

    #[test]
    fn one_bad_message_among_a_hundred_is_found_in_few_requests() {
        for (code, most) in [(413, 15), (400, 20), (422, 20)] {
            for bad in [0, 1, 49, 50, 99] {
                for draw in [0.0, 0.3, 0.99] {
                    let answer =
                        |messages: Range<usize>| if messages.contains(&bad) { status(code) } else { SENT };
                    let (outcomes, requests) = send(100, || draw, answer);
                    let found: Vec<_> = (0..100).filter(|at| outcomes[*at] == Some(status(code))).collect();
                    assert_eq!(found, [bad], "{code}");
                    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Some(SENT)).count(), 99);
                    assert!(requests <= most, "{requests} requests for {code} at {bad}");
                }
            }
        }
    }

    #[test]
    fn f68_a_receiver_that_refuses_everything_costs_a_few_requests_and_blames_few() {
        for code in [400, 422] {
            let (outcomes, requests) = send(100, || 0.7, |_| status(code));
            assert_eq!(requests, 4);
            assert_eq!(outcomes.iter().flatten().count(), 3, "the others were not tried");
        }
    }

    #[test]
    fn what_is_left_when_the_receiver_fails_was_not_tried() {
        let down = Outcome::Retryable { status: 503, reason: Reason::Status, retry_after: None };
        let mut requests = 0;
        let (outcomes, _) = send(
            8,
            || 0.0,
            |_| {
                requests += 1;
                if requests == 1 { status(413) } else { down }
            },
        );
        assert_eq!(outcomes[..4], [Some(down); 4]);
        assert_eq!(outcomes[4..], [None; 4]);
    }

    proptest! {
        #[test]
        fn exactly_the_bad_messages_are_found_and_each_message_is_decided_on_once(
            count in 1usize..150,
            bad in prop::collection::btree_set(0usize..150, 0..12),
            code in prop::sample::select(vec![400u16, 413, 422]),
            draws in prop::collection::vec(0.0f64..1.0, 1..20),
        ) {
            let bad: BTreeSet<_> = bad.into_iter().filter(|at| *at < count).collect();
            let mut draws = draws.into_iter().cycle();
            let answer =
                |messages: Range<usize>| if bad.range(messages).next().is_some() { status(code) } else { SENT };
            let (outcomes, _) = send(count, || draws.next().unwrap(), answer);
            for (at, outcome) in outcomes.iter().enumerate() {
                match outcome {
                    Some(Outcome::Sent { .. }) => prop_assert!(!bad.contains(&at)),
                    Some(_) => prop_assert!(bad.contains(&at)),
                    None => {}
                }
            }
            // Who is left was not tried because three bad ones were drawn first; then those three are known.
            let (tried, found) = (outcomes.iter().flatten().count(), outcomes.iter().flatten().filter(|o| **o != SENT));
            prop_assert!(tried == count || found.count() == 3);
        }
    }
}
