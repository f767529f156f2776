//! One attempt: the bodies of a request's messages are rendered, and sent in one request; or in several, where together they
//! are too large or the receiver refuses them (see `model::bundle`).

use std::{
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::FutureExt as _;
use rand::{RngExt as _, seq::IteratorRandom as _};
use tokio::time::Instant;

use super::{WebhookBatch, WebhookStrategy};
use crate::{
    flow::Passage,
    model::{
        bundle::{Bodies, Decided, Progress},
        ids::{BundleId, MessageId, RequestId},
        ledger::is_exclusive,
        outcome::{Attempt, Obstacle, Outcome, Reason},
        record::Said,
        roster::{Pick, Report},
    },
    ports::{Answer, InFlight, ItemAnswer, WebhookRequest},
};

/// The attempt's own task panicked.
const PANICKED: Outcome = Outcome::Retryable { status: 0, reason: Reason::Panic, retry_after: None };

/// The body can't be rendered.
const NOT_RENDERED: Outcome = Outcome::Permanent { status: 0, reason: Reason::Render };

/// The messages of one request, of one batch, and their permit.
pub(super) struct Load {
    pub(super) picks: Vec<Pick>,
    pub(super) batch: Arc<WebhookBatch>,
    pub(super) passage: Passage,
}

/// What a sender works with, from one request to the next.
#[derive(Default)]
pub(super) struct Desk {
    /// Where each message is noted as in flight.
    slots: Vec<u32>,
    bodies: Bodies,
    /// Of each body: which message of the request it is …
    rendered: Vec<usize>,
    /// … and its id.
    ids: Vec<MessageId>,
    /// The messages' outcomes, in their order; `None` where it was not tried.
    pub(super) outcomes: Vec<Option<Outcome>>,
    /// How long the first request took.
    pub(super) latency: Duration,
    /// What permanent failures are judged by.
    pub(super) epoch: u32,
    /// What is decided …
    pub(super) reports: Vec<(Pick, Report)>,
    /// … and not yet.
    pub(super) undecided: Vec<(Pick, Outcome)>,
}

impl Desk {
    /// Makes it ready for `count` messages.
    fn clear(&mut self, in_flight: &dyn InFlight, count: usize) {
        self.bodies.clear();
        self.rendered.clear();
        self.ids.clear();
        self.outcomes.clear();
        self.outcomes.resize(count, None);
        while self.slots.len() < count {
            self.slots.push(in_flight.enter());
        }
    }

    /// Renders the body of each message. Whose can't be rendered is decided on.
    fn render(&mut self, load: &Load) {
        let Load { picks, batch, .. } = load;
        let header = &batch.lease.header;
        self.latency = Duration::ZERO;
        for (at, pick) in picks.iter().enumerate() {
            let Some((row, bytes)) = batch.rows.get(pick.index) else {
                self.outcomes[at] = Some(NOT_RENDERED); // what is leased to be sent is among the open rows
                continue;
            };
            let id = header.message_id(row);
            // A row that makes the template panic must not take its neighbours with it.
            let render = |body: &mut Vec<u8>| {
                let rendered =
                    catch_unwind(AssertUnwindSafe(|| batch.template.render(header, id, bytes, body)));
                let failed = |why: &dyn fmt::Display, outcome| {
                    let destination = &*header.destination;
                    tracing::warn!(%id, destination, %why, "the body can't be rendered");
                    outcome
                };
                match rendered {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error)) => Err(failed(&error, NOT_RENDERED)),
                    Err(_) => Err(failed(&"rendering it panicked", PANICKED)),
                }
            };
            match self.bodies.push(render) {
                Ok(()) => {
                    self.rendered.push(at);
                    self.ids.push(id);
                }
                Err(outcome) => self.outcomes[at] = Some(outcome),
            }
        }
    }

    /// The outcome of one of the messages that were tried, drawn at random.
    pub(super) fn drawn(&self) -> Option<Outcome> {
        match self.outcomes[..] {
            [outcome] => outcome,
            _ => self.outcomes.iter().flatten().choose(&mut rand::rng()).copied(),
        }
    }

    /// Gives its slots back.
    pub(super) fn leave(self, in_flight: &dyn InFlight) {
        self.slots.into_iter().for_each(|slot| in_flight.leave(slot));
    }
}

impl WebhookStrategy {
    /// One attempt; what became of each message is on the desk. What kept it from being made, if something did.
    pub(super) async fn try_now(&self, load: &Load, desk: &mut Desk) -> Option<Obstacle> {
        let (count, in_flight) = (load.picks.len(), &*self.setup.in_flight);
        desk.clear(in_flight, count);
        let begun = Instant::now();
        let tried = AssertUnwindSafe(self.attempt(load, desk)).catch_unwind().await;
        desk.slots[..count].iter().for_each(|slot| in_flight.end(*slot));
        tried.unwrap_or_else(|_| {
            let row = load.batch.rows.get(load.picks[0].index).map_or(0, |(row, _)| row);
            let id = load.batch.lease.header.message_id(row);
            tracing::error!(%id, messages = count, "the attempt panicked");
            desk.latency = begun.elapsed();
            for outcome in &mut desk.outcomes {
                outcome.get_or_insert(PANICKED);
            }
            None
        })
    }

    async fn attempt(&self, load: &Load, desk: &mut Desk) -> Option<Obstacle> {
        let Load { picks, batch, .. } = load;
        // One that may have killed a process shares no request.
        let charged = batch.lease.charged.get(&picks[0].index);
        let (_others, _nobody);
        if charged.is_some_and(|&(deaths, _)| is_exclusive(deaths)) {
            _nobody = self.setup.alone.write().await;
        } else {
            _others = self.setup.alone.read().await;
        }
        if !self.may_begin(batch) {
            return None;
        }
        for (slot, pick) in desk.slots.iter().zip(picks) {
            self.setup.in_flight.begin(*slot, pick.token.batch, Some(pick.index));
        }
        desk.render(load);
        let mut progress = Progress::new(&desk.bodies);
        let mut latency = None;
        while let Some(part) = progress.next() {
            if latency.is_some() && !(self.may_begin(batch) && self.is_held_here(batch)) {
                break;
            }
            let begun = Instant::now();
            let answer = self.request(batch, desk, part).await;
            desk.latency = *latency.get_or_insert(begun.elapsed());
            if let Outcome::Unsent(obstacle) = answer.outcome {
                return Some(obstacle);
            }
            if let Decided::These(part) = progress.answered(&answer.outcome, rand::rng().random()) {
                self.take_answer(load, desk, part, answer);
            }
        }
        None
    }

    /// Whether messages of a batch may be begun.
    fn may_begin(&self, batch: &WebhookBatch) -> bool {
        if batch.is_closed(self.worker.clock().wall()) {
            self.stop(batch);
        }
        let is_held = self.holds.is_held(batch.destination) || batch.held.load(Ordering::Relaxed);
        !is_held && !self.worker.is_closing()
    }

    /// One request, with the messages of `part`.
    async fn request(&self, batch: &WebhookBatch, desk: &mut Desk, part: Range<usize>) -> Answer {
        let destination = &self.setup.destinations[batch.destination];
        let messages = &desk.ids[part.clone()];
        let (id, body) = match destination.bundle {
            Some(_) => (RequestId::Bundle(BundleId::derive(messages)), desk.bodies.array(part)),
            None => (messages[0].into(), desk.bodies.body(part.start)),
        };
        failpoint!("attempt.before");
        let at = self.worker.clock().wall();
        let content_type = &batch.lease.header.content_type;
        let begun = Instant::now();
        let trace = batch.trace.as_ref();
        let request = WebhookRequest { id, messages, at, content_type, body, trace };
        let answer = destination.webhook.send(request).await;
        destination.metrics.attempted(begun.elapsed());
        self.note_failure(batch.destination, &answer);
        failpoint!("attempt.after");
        answer
    }

    /// Keeps what an operator asks for first when messages fail.
    fn note_failure(&self, destination: usize, answer: &Answer) {
        let (status, reason) = match answer.outcome {
            Outcome::Sent { .. } | Outcome::Unsent(_) => return,
            Outcome::Retryable { status, reason, .. } | Outcome::Permanent { status, reason } => {
                (status, reason)
            }
            Outcome::Gone => (410, Reason::Status),
        };
        let attempt = Attempt { at: self.worker.clock().wall(), status, reason };
        self.seat.failed(destination, attempt, answer.text.as_deref());
    }

    /// Takes what an answer says of the messages of `part`.
    fn take_answer(&self, load: &Load, desk: &mut Desk, part: Range<usize>, answer: Answer) {
        let is_recorded = self.setup.destinations[load.batch.destination].recorded;
        let Answer { outcome, mut provider_id, items, text } = answer;
        let text = text.filter(|text| load.batch.keeps(text));
        let mut items = items.into_iter();
        for &at in &desk.rendered[part] {
            let all = || ItemAnswer { outcome, provider_id: provider_id.take() };
            let ItemAnswer { outcome, provider_id } = items.next().unwrap_or_else(all);
            desk.outcomes[at] = Some(outcome);
            let (index, is_sent) = (load.picks[at].index, matches!(outcome, Outcome::Sent { .. }));
            let provider_id = provider_id.filter(|_| is_recorded);
            let detail = text.clone().filter(|_| !is_sent);
            if provider_id.is_some() || detail.is_some() {
                load.batch.said().insert(index, Said { provider_id, detail });
            } else if !is_sent {
                // It may have said something of the attempt before.
                load.batch.said().remove(&index);
            }
        }
    }
}
