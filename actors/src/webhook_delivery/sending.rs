//! Senders: tasks that take from the roster the next message that may go, send it, and report what became of it.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep};

use super::{WebhookBatch, WebhookState, WebhookStrategy};
use crate::{
    flow::{Asking, Passage, back_off},
    model::{
        backoff::Backoff,
        ids::FileId,
        lease::LeaseToken,
        ledger::is_exclusive,
        outcome::{Obstacle, Outcome, Reason},
        record::Said,
        retry::{Decision, decide},
        roster::{Admission, Answer, Pick, Report},
        time::{MonoMs, UnixMs},
        traffic::{
            breaker::Change,
            storm::{Judgement, PermanentFailure},
        },
    },
    ports::WebhookRequest,
};

/// How long a sender waits before it looks again whether its attempt can begin. A descriptor is free again within a
/// request's time (F72); a refused address (F54) costs a lookup per second at most, whoever asks.
const OBSTACLE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));

/// How often a sender looks whether a permanent failure is ordinary by now, and after how long it is taken for that: until
/// it is known, its message is unrecorded.
const JUDGE_EVERY: Duration = Duration::from_millis(200);
const JUDGE_WITHIN: Duration = Duration::from_secs(5);

/// Asks for messages, those of files and feeds with a rate only when that lets one through.
struct Limited<'a> {
    asking: Asking<'a>,
    batches: &'a HashMap<LeaseToken, Arc<WebhookBatch>>,
    now: MonoMs,
    /// When one of those rates does, that did not.
    ask_again: Option<MonoMs>,
}

impl Admission for Limited<'_> {
    fn ask(&mut self, destination: usize, batch: LeaseToken, is_retry: bool) -> Answer {
        let rate = self.batches.get(&batch).and_then(|batch| batch.rate.as_ref());
        let Some(rate) = rate else { return self.asking.ask(destination, batch, is_retry) };
        rate.ask(self.now, || self.asking.ask(destination, batch, is_retry)).unwrap_or_else(|wait| {
            self.ask_again = self.ask_again.into_iter().chain([self.now.after(wait)]).min();
            Answer::NotThis
        })
    }

    fn has_none(&mut self, destination: usize) {
        self.asking.has_none(destination);
    }
}

/// Says that a destination's breaker has opened or closed, once per outage.
fn say(destination: &str, change: Change, now: MonoMs) {
    match change {
        Change::Opened { since, .. } if since == now => tracing::warn!(
            destination,
            "nothing more is sent there for the time being: its circuit breaker is open; single messages probe"
        ),
        Change::Opened { until, since } => tracing::debug!(
            destination,
            out_s = now.since(since).as_secs(),
            next_s = until.since(now).as_secs(),
            "the destination is still out"
        ),
        Change::Closed { since } => {
            tracing::info!(destination, out_s = now.since(since).as_secs(), "the destination is back");
        }
    }
}

impl WebhookStrategy {
    /// Starts a sender for every message that may be sent now.
    pub(super) fn start_senders(self: &Arc<Self>) {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        while let Some((pick, passage, batch)) = self.pick(&mut state, now) {
            tokio::spawn(self.clone().send_loop(pick, passage, batch));
        }
    }

    /// The next message that may go.
    fn pick(&self, state: &mut WebhookState, now: UnixMs) -> Option<(Pick, Passage, Arc<WebhookBatch>)> {
        loop {
            let mut limited = Limited {
                asking: self.seat.ask(),
                batches: &state.batches,
                now: self.worker.clock().mono(),
                ask_again: None,
            };
            let picked = state.roster.pick(now, &mut limited);
            let of_files = limited.ask_again;
            let (passage, ask_again) = limited.asking.finish();
            let ask_again = ask_again.into_iter().chain(of_files).min();
            let Some(pick) = picked else {
                let before = state.ask_again.filter(|at| *at > self.worker.clock().mono());
                state.ask_again = ask_again;
                if ask_again.is_some_and(|at| before.is_none_or(|before| at < before)) {
                    self.worker.wake(); // it sleeps for longer
                }
                return None;
            };
            let passage = passage.expect("what is picked was granted");
            if let Some(batch) = state.batches.get(&pick.token).cloned() {
                return Some((pick, passage, batch));
            }
            state.roster.report(pick, Report::Unsent, usize::MAX, now);
        }
    }

    /// Waits for a destination's rate, or for that over all (`None`), whenever messages lack it.
    pub(super) async fn rate_loop(self: Arc<Self>, rate: Option<usize>) {
        loop {
            tokio::select! {
                biased;
                () = self.worker.closed() => return,
                () = self.seat.lacks(rate) => {}
            }
            // As many as could go at once: what is let through is to be sent now.
            let could_go =
                |index: usize| self.state().roster.waiting(index).max(1).min(self.seat.free(index));
            let wanted = match rate {
                Some(index) => could_go(index),
                None => (0..self.setup.destinations.len()).map(could_go).sum(),
            };
            tokio::select! {
                biased;
                () = self.worker.closed() => return,
                () = self.seat.pass(rate, wanted) => {}
            }
            self.start_senders();
        }
    }

    async fn send_loop(self: Arc<Self>, mut pick: Pick, mut passage: Passage, mut batch: Arc<WebhookBatch>) {
        let mut body = Vec::new();
        let slot = self.setup.in_flight.enter();
        let mut refusals = 0;
        loop {
            let begun = Instant::now();
            let attempt = AssertUnwindSafe(self.attempt(pick, &batch, slot, &mut body)).catch_unwind().await;
            self.setup.in_flight.end(slot);
            let attempt = attempt.unwrap_or_else(|_| {
                let row = batch.rows.get(pick.index).map_or(0, |(row, _)| row);
                tracing::error!(id = %batch.lease.header.message_id(row), "the attempt panicked");
                let outcome = Outcome::Retryable { status: 0, reason: Reason::Panic, retry_after: None };
                Some((outcome, begun.elapsed()))
            });
            if let Some((Outcome::Unsent(obstacle), _)) = attempt {
                refusals += 1;
                if self.wait_out(pick, obstacle, refusals).await {
                    continue;
                }
            }
            refusals = 0;
            let outcome = if let Some((outcome, latency)) = attempt {
                self.give_back_permit(pick, passage, &batch, outcome, latency).await
            } else {
                drop(passage); // with its permit
                None
            };
            let report = self.judge(pick, &batch, outcome);
            let now = self.worker.clock().wall();
            let mut state = self.state();
            let flush = state.roster.report(pick, report, self.setup.record_group, now);
            let next = self.pick(&mut state, now);
            let waiting = state.roster.waiting(pick.destination);
            // Not at every message: a few times on the way down.
            let ahead = self.ahead[pick.destination].load(Ordering::Relaxed);
            let starved = waiting <= ahead / 2 && waiting.is_multiple_of((ahead / 8).max(1));
            drop(state);
            if flush {
                self.flush.ring();
            }
            if starved || report == Report::Unsent {
                self.worker.wake();
            }
            if next.as_ref().is_none_or(|(next, ..)| next.destination != pick.destination) {
                self.seat.wake_waiting(pick.destination);
            }
            match next {
                Some(next) => (pick, passage, batch) = next,
                None => break self.setup.in_flight.leave(slot),
            }
        }
    }

    /// Gives the permit of an attempt back, and takes note of what the attempt says of its destination. The outcome to
    /// record; `None` if the message stays as it was because the destination is used wrongly.
    async fn give_back_permit(
        self: &Arc<Self>,
        pick: Pick,
        passage: Passage,
        batch: &WebhookBatch,
        outcome: Outcome,
        latency: Duration,
    ) -> Option<Outcome> {
        let destination = &self.setup.destinations[pick.destination];
        let file = batch.lease.header.file;
        let ended = passage.ended(&outcome, latency, file);
        if let Some(change) = ended.change {
            say(&destination.name, change, self.worker.clock().mono());
        }
        if ended.grew {
            self.seat.wake_all();
        }
        let Outcome::Permanent { status, reason } = outcome else { return Some(outcome) };
        let mut judgement = ended.judgement;
        if judgement == Judgement::Undecided {
            self.start_senders();
            let failure = PermanentFailure::new(status, reason);
            judgement = self.await_judgement(pick, ended.epoch, file, failure).await?;
        }
        match judgement {
            Judgement::Suspect => {
                self.suspect(pick.destination);
                None
            }
            Judgement::Outdated => None,
            Judgement::Ordinary | Judgement::Undecided => Some(outcome),
        }
    }

    /// Waits until an attempt may be able to begin. Whether the message is still to be sent here then: its lease may be
    /// lost meanwhile, or the worker closed, or the destination held.
    async fn wait_out(&self, pick: Pick, obstacle: Obstacle, times: u32) -> bool {
        let destination = &self.setup.destinations[pick.destination];
        destination.metrics.unsent(obstacle);
        match obstacle {
            Obstacle::Shortage(shortage) if times == 1 => tracing::warn!(
                destination = %destination.name,
                shortage = shortage.as_str(),
                "this machine can't open a connection; the message waits and is charged nothing"
            ),
            Obstacle::Shortage(_) => {}
            Obstacle::Address(refused) => {
                if self.setup.troubles.meet(&destination.name, refused) {
                    tracing::error!(
                        destination = %destination.name,
                        reason = %refused,
                        "the destination leads to an address that is not allowed; its messages wait and are charged \
                         nothing"
                    );
                }
            }
        }
        tokio::select! {
            biased;
            () = self.worker.closed() => return false,
            () = self.holds.held(pick.destination) => return false,
            () = back_off(OBSTACLE, times) => {}
        }
        self.state().batches.contains_key(&pick.token)
    }

    /// One attempt, and how long it took; `None` if the worker closes, or the destination is held, before it begins.
    async fn attempt(
        &self,
        pick: Pick,
        batch: &WebhookBatch,
        slot: u32,
        body: &mut Vec<u8>,
    ) -> Option<(Outcome, Duration)> {
        let destination = &self.setup.destinations[pick.destination];
        let charged = batch.lease.charged.get(&pick.index).is_some_and(|&(deaths, _)| is_exclusive(deaths));
        let (_others, _nobody);
        if charged {
            _nobody = self.setup.alone.write().await;
        } else {
            _others = self.setup.alone.read().await;
        }
        let is_held = self.holds.is_held(pick.destination) || batch.held.load(Ordering::Relaxed);
        if is_held || self.worker.is_closing() {
            return None;
        }
        if batch.is_closed(self.worker.clock().wall()) {
            self.stop(pick.token, batch);
            return None;
        }
        self.setup.in_flight.begin(slot, pick.token.batch, Some(pick.index));
        let header = &batch.lease.header;
        let (row, bytes) = batch.rows.get(pick.index)?;
        let id = header.message_id(row);
        body.clear();
        if let Err(error) = batch.template.render(header, id, bytes, body) {
            tracing::warn!(%id, destination = %destination.name, %error, "the body can't be rendered");
            return Some((Outcome::Permanent { status: 0, reason: Reason::Render }, Duration::ZERO));
        }
        failpoint!("attempt.before");
        let at = self.worker.clock().wall();
        let request = WebhookRequest { id, at, content_type: &header.content_type, body };
        let begun = Instant::now();
        let answer = destination.webhook.send(request).await;
        let latency = begun.elapsed();
        destination.metrics.attempted(latency);
        failpoint!("attempt.after");
        if answer.provider_id.is_some() && destination.recorded {
            let said = Said { provider_id: answer.provider_id, detail: None };
            batch.said().insert(pick.index, said);
        }
        Some((answer.outcome, latency))
    }

    /// Begins nothing more of a batch here.
    fn stop(&self, token: LeaseToken, batch: &WebhookBatch) {
        if !batch.held.swap(true, Ordering::Relaxed) {
            self.state().roster.stop_batch(token);
        }
    }

    /// Waits until it is known what a permanent failure means; `None` if the worker closes before. It is ordinary when
    /// nothing more comes that could say otherwise, and when it takes too long.
    async fn await_judgement(
        &self,
        pick: Pick,
        epoch: u32,
        file: FileId,
        failure: PermanentFailure,
    ) -> Option<Judgement> {
        let until = Instant::now() + JUDGE_WITHIN;
        loop {
            tokio::select! {
                biased;
                () = self.worker.closed() => return None,
                () = sleep(JUDGE_EVERY) => {}
            }
            let (judgement, is_busy) = self.seat.judge(pick.destination, epoch, file, failure);
            let more = is_busy || self.state().roster.waiting(pick.destination) > 0;
            if judgement != Judgement::Undecided {
                return Some(judgement);
            }
            if !more || Instant::now() >= until {
                return Some(Judgement::Ordinary);
            }
        }
    }

    /// Holds a destination that is used wrongly: from here on in this process, in a moment everywhere.
    fn suspect(&self, destination: usize) {
        let Some(suspicion) = self.seat.suspicion(destination) else { return };
        let mut state = self.state();
        if state.to_disable[destination].is_none() && !self.holds.is_held(destination) {
            state.to_disable[destination] = Some(suspicion);
            self.holds.set(destination, true);
            state.roster.stop(Some(destination));
        }
    }

    fn judge(&self, pick: Pick, batch: &WebhookBatch, outcome: Option<Outcome>) -> Report {
        let Some(outcome) = outcome else {
            return Report::Unsent;
        };
        let clock = self.worker.clock();
        // Only a retry asks how old its message is; most are sent.
        let age = if matches!(outcome, Outcome::Retryable { .. }) {
            let age = clock.age(batch.lease.since(pick.index));
            let stood = self.seat.stood(pick.destination, age);
            batch.lease.age(pick.index, age.saturating_sub(stood), clock.wall())
        } else {
            Duration::ZERO
        };
        let retry = &self.setup.destinations[pick.destination].retry;
        match decide(retry, outcome, pick.attempt, age, clock.wall(), batch.draws.of(pick.attempt)) {
            Decision::Record(verdict) => Report::Verdict(verdict),
            Decision::Leave => Report::Unsent,
            Decision::Hold => {
                self.setup.destinations[pick.destination].metrics.gone();
                let mut state = self.state();
                state.to_disable[pick.destination] = Some("it answered 410 Gone".to_owned());
                self.holds.set(pick.destination, true);
                state.roster.stop(Some(pick.destination));
                Report::Unsent
            }
        }
    }
}
