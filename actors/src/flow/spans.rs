use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    model::{
        ids::BatchId,
        lease::{Lease, LeaseToken},
        time::MonoMs,
        trace::{BatchSpan, LeaseEnd, Sampling, SpanId, TraceId, TraceParent},
    },
    ports::{Clock, Settled, Settlement, SpanSink},
};

/// What batches are traced by.
#[derive(Clone)]
pub struct Tracing {
    /// Which files are.
    pub sampling: Sampling,
    /// Where their spans go.
    pub sink: Arc<dyn SpanSink>,
}

impl Tracing {
    /// What the requests of a lease carry, whether or not its file is traced: the receiver decides as this machine does.
    pub(super) fn parent(&self, lease: &Lease) -> TraceParent {
        let trace = TraceId::of(lease.header.file);
        TraceParent::new(trace, SpanId::of(lease.token), self.sampling.takes(trace))
    }
}

/// The spans of the batches that a worker holds. At most one for each batch (I8).
pub(super) struct OpenSpans {
    tracing: Tracing,
    clock: Arc<dyn Clock>,
    open: Mutex<HashMap<BatchId, OpenSpan>>,
}

struct OpenSpan {
    span: BatchSpan,
    /// Since then, by the clock that doesn't jump.
    since: MonoMs,
}

impl OpenSpans {
    pub(super) fn new(tracing: Tracing, clock: Arc<dyn Clock>) -> Self {
        Self { tracing, clock, open: Mutex::default() }
    }

    pub(super) fn parent(&self, lease: &Lease) -> TraceParent {
        self.tracing.parent(lease)
    }

    /// A batch was leased.
    pub(super) fn begin(&self, lease: &Lease) {
        let span = BatchSpan::begin(lease, self.clock.wall());
        if self.tracing.sampling.takes(span.trace) {
            let opened = OpenSpan { span, since: self.clock.mono() };
            let before = self.open().insert(lease.token.batch, opened);
            // Leased again before anybody noticed that its last lease was lost.
            if let Some(before) = before {
                self.finish(before, LeaseEnd::Lost);
            }
        }
    }

    /// Outcomes were recorded, and leases have ended with it.
    pub(super) fn settled(&self, settlements: &[Settlement], settled: &[Settled]) {
        for (Settlement { token, verdicts, .. }, settled) in settlements.iter().zip(settled) {
            let end = match settled {
                Settled::Stale => {
                    self.end(*token, LeaseEnd::Lost);
                    continue;
                }
                Settled::Open => None,
                Settled::Released => Some(LeaseEnd::Retrying),
                Settled::Complete => Some(LeaseEnd::Settled),
            };
            if let Some(OpenSpan { span, .. }) =
                self.open().get_mut(&token.batch).filter(|open| open.span.fence == token.fence)
            {
                span.record(verdicts);
            }
            if let Some(end) = end {
                self.end(*token, end);
            }
        }
    }

    /// A lease has ended.
    pub(super) fn end(&self, token: LeaseToken, end: LeaseEnd) {
        let ended = match self.open().entry(token.batch) {
            Entry::Occupied(open) if open.get().span.fence == token.fence => open.remove(),
            _ => return,
        };
        self.finish(ended, end);
    }

    fn finish(&self, OpenSpan { mut span, since }: OpenSpan, end: LeaseEnd) {
        span.took = self.clock.mono().since(since);
        span.end = end;
        self.tracing.sink.take(span);
    }

    fn open(&self) -> MutexGuard<'_, HashMap<BatchId, OpenSpan>> {
        // Changed by single inserts and removals, and counts.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OpenSpans {
    /// The worker has ended, however it did.
    fn drop(&mut self) {
        let left: Vec<_> = self.open().drain().map(|(_, open)| open).collect();
        for open in left {
            self.finish(open, LeaseEnd::Abandoned);
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use bytes::Bytes;

    use super::*;
    use crate::{
        model::{
            ledger::MessageVerdict,
            outcome::{Attempt, DeathCause, Reason, Verdict},
            time::UnixMs,
        },
        testing::{TokioClock, fixtures},
    };

    #[derive(Default)]
    struct Taken(Mutex<Vec<BatchSpan>>);

    impl SpanSink for Taken {
        fn take(&self, span: BatchSpan) {
            self.0.lock().unwrap().push(span);
        }
    }

    struct World {
        taken: Arc<Taken>,
        spans: OpenSpans,
    }

    fn world(percent: u32) -> World {
        let taken = Arc::new(Taken::default());
        let tracing = Tracing { sampling: Sampling::percent(percent), sink: taken.clone() };
        World { taken, spans: OpenSpans::new(tracing, Arc::new(TokioClock::at(UnixMs(1_000)))) }
    }

    impl World {
        /// What has ended, and how.
        fn ended(&self) -> Vec<(u64, LeaseEnd)> {
            self.taken.0.lock().unwrap().drain(..).map(|span| (span.fence, span.end)).collect()
        }
    }

    fn lease(fence: u64) -> Lease {
        let file = fixtures::file("alerts", 1, &["support"]);
        Lease {
            token: LeaseToken { batch: BatchId([1; 16]), fence },
            header: fixtures::header(&file, "support"),
            accepted_at: UnixMs(0),
            count: 3,
            payload: Bytes::new(),
            open: Vec::new(),
            redriven: BTreeMap::new(),
            losses: 0,
            charged: BTreeMap::new(),
        }
    }

    fn settlement(token: LeaseToken, verdicts: &[Verdict]) -> Settlement {
        let verdict = |(index, verdict): (usize, &Verdict)| MessageVerdict {
            index: index as u32,
            drive: 0,
            attempt: 1,
            verdict: *verdict,
        };
        Settlement {
            token,
            verdicts: verdicts.iter().enumerate().map(verdict).collect(),
            details: BTreeMap::new(),
            records: Vec::new(),
            ends: true,
            begins: None,
        }
    }

    const ATTEMPT: Attempt = Attempt { at: UnixMs(0), status: 503, reason: Reason::Status };
    const SENT: Verdict = Verdict::Sent { at: UnixMs(0), status: 200 };
    const RETRY: Verdict = Verdict::Retry { attempt: ATTEMPT, not_before: UnixMs(9) };
    const DEAD: Verdict = Verdict::Dead { attempt: ATTEMPT, cause: DeathCause::Permanent };

    #[tokio::test(start_paused = true)]
    async fn a_span_counts_what_was_recorded_from_lease_to_end() {
        let world = world(100);
        let lease = lease(1);
        world.spans.begin(&lease);
        tokio::time::advance(Duration::from_millis(1_500)).await;
        world.spans.settled(&[settlement(lease.token, &[SENT, RETRY])], &[Settled::Open]);
        assert_eq!(world.ended(), [], "the lease goes on");
        world.spans.settled(&[settlement(lease.token, &[SENT, DEAD])], &[Settled::Complete]);
        let span = world.taken.0.lock().unwrap().pop().expect("it has ended");
        assert_eq!((span.sent, span.retried, span.dead), (2, 1, 1));
        assert_eq!((span.started, span.took), (UnixMs(1_000), Duration::from_millis(1_500)));
        assert_eq!((&*span.feed, &*span.destination, span.end), ("alerts", "support", LeaseEnd::Settled));
        assert_eq!(
            world.spans.parent(&lease),
            TraceParent::new(span.trace, span.span, true),
            "requests name the span"
        );
        drop(world.spans);
        assert_eq!(*world.taken.0.lock().unwrap(), [], "once");
    }

    #[tokio::test(start_paused = true)]
    async fn every_lease_ends_once_and_says_how() {
        let world = world(100);
        let token = |fence| lease(fence).token;
        world.spans.begin(&lease(1));
        world.spans.settled(&[settlement(token(1), &[RETRY])], &[Settled::Released]);
        world.spans.begin(&lease(2));
        world.spans.end(token(1), LeaseEnd::Returned);
        world.spans.end(token(2), LeaseEnd::Returned);
        world.spans.begin(&lease(3));
        world.spans.settled(&[settlement(token(3), &[SENT])], &[Settled::Stale]);
        world.spans.begin(&lease(4));
        world.spans.begin(&lease(5));
        world.spans.end(token(4), LeaseEnd::Lost);
        let ends =
            [(1, LeaseEnd::Retrying), (2, LeaseEnd::Returned), (3, LeaseEnd::Lost), (4, LeaseEnd::Lost)];
        assert_eq!(world.ended(), ends);
        let World { taken, spans } = world;
        drop(spans);
        let left: Vec<_> = taken.0.lock().unwrap().iter().map(|span| (span.fence, span.end)).collect();
        assert_eq!(left, [(5, LeaseEnd::Abandoned)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_sampled_has_no_span_and_its_requests_say_so() {
        let world = world(0);
        let lease = lease(1);
        world.spans.begin(&lease);
        world.spans.settled(&[settlement(lease.token, &[SENT])], &[Settled::Complete]);
        assert_eq!(world.ended(), []);
        assert!(world.spans.parent(&lease).as_bytes().ends_with(b"-00"));
    }
}
