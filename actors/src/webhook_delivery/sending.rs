//! Senders: tasks that take from the roster the messages of the next request, send it, and report what became of them.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::{
    WebhookBatch, WebhookState, WebhookStrategy,
    attempt::{Desk, Load},
};
use crate::{
    flow::{Asking, Passage, back_off},
    model::{
        backoff::Backoff,
        lease::LeaseToken,
        outcome::{GONE, Obstacle, Outcome},
        retry::{Decision, decide},
        roster::{Admission, Answer, Pick, Report},
        time::{MonoMs, UnixMs},
        traffic::{
            breaker::Change,
            storm::{Judgement, PermanentFailure},
        },
    },
};

/// How long a sender waits before it looks again whether its attempt can begin. A descriptor is free again within a
/// request's time (F72); a refused address (F54) costs a lookup per second at most, whoever asks.
const OBSTACLE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));

/// How often a sender looks whether a permanent failure is ordinary by now, and after how long it is taken for that: until
/// it is known, its message is unrecorded.
const JUDGE_EVERY: Duration = Duration::from_millis(200);
const JUDGE_WITHIN: Duration = Duration::from_secs(5);

/// Asks for messages, those of files and feeds with a rate only as many as that lets through.
struct Limited<'a> {
    asking: Asking<'a>,
    batches: &'a HashMap<LeaseToken, Arc<WebhookBatch>>,
    now: MonoMs,
    /// When one of those rates does, that did not.
    ask_again: Option<MonoMs>,
}

impl Admission for Limited<'_> {
    fn ask(&mut self, destination: usize, batch: LeaseToken, is_retry: bool, messages: usize) -> Answer {
        let mut ask = |messages| self.asking.ask(destination, batch, is_retry, messages);
        let rate = self.batches.get(&batch).and_then(|batch| batch.rate.as_ref());
        let Some(rate) = rate else { return ask(messages) };
        rate.ask(self.now, messages, ask).unwrap_or_else(|wait| {
            self.asking.braked_by_file(destination);
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
        Change::Opened { times: 0, .. } => tracing::warn!(
            destination,
            "nothing more is sent there for the time being: its circuit breaker is open; single messages probe"
        ),
        Change::Opened { until, since, .. } => tracing::debug!(
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
    /// Starts a sender for every request that may go now.
    pub(super) fn start_senders(self: &Arc<Self>) {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        while let Some(load) = self.pick(&mut state, now, Vec::new()) {
            tokio::spawn(self.clone().send_loop(load));
        }
    }

    /// The next request that may go. `picks` is empty, for its messages.
    fn pick(&self, state: &mut WebhookState, now: UnixMs, mut picks: Vec<Pick>) -> Option<Load> {
        loop {
            let mut limited = Limited {
                asking: self.seat.ask(),
                batches: &state.batches,
                now: self.worker.clock().mono(),
                ask_again: None,
            };
            state.roster.pick(now, &mut limited, &mut picks);
            let of_files = limited.ask_again;
            let (passage, ask_again) = limited.asking.finish();
            let ask_again = ask_again.into_iter().chain(of_files).min();
            let Some(first) = picks.first().copied() else {
                let before = state.ask_again.filter(|at| *at > self.worker.clock().mono());
                state.ask_again = ask_again;
                if ask_again.is_some_and(|at| before.is_none_or(|before| at < before)) {
                    self.worker.wake(); // it sleeps for longer
                }
                return None;
            };
            let passage = passage.expect("what is picked was granted");
            if let Some(batch) = state.batches.get(&first.token).cloned() {
                return Some(Load { picks, batch, passage });
            }
            state.roster.ended(first.destination);
            for pick in picks.drain(..) {
                state.roster.report(pick, Report::Unsent, usize::MAX, now);
            }
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
            let could_go = |index: usize| {
                let messages = self.setup.destinations[index].messages_max();
                self.state().roster.waiting(index).max(1).min(self.seat.free(index).saturating_mul(messages))
            };
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

    async fn send_loop(self: Arc<Self>, load: Load) {
        let mut desk = Desk::default();
        let mut next = Some(load);
        let mut refusals = 0;
        while let Some(load) = next {
            let obstacle = self.try_now(&load, &mut desk).await;
            if let Some(obstacle) = obstacle.filter(|_| desk.drawn().is_none()) {
                refusals += 1;
                if self.wait_out(&load, obstacle, refusals).await {
                    next = Some(load);
                    continue;
                }
            }
            refusals = 0;
            next = self.conclude(load, &mut desk).await;
        }
        desk.leave(&*self.setup.in_flight);
    }

    /// Gives a request's permit back, reports what became of its messages, and takes the next request.
    async fn conclude(self: &Arc<Self>, load: Load, desk: &mut Desk) -> Option<Load> {
        let Load { mut picks, batch, passage } = load;
        let destination = batch.destination;
        self.give_back_permit(passage, desk, &batch);
        self.decide(&picks, desk, &batch);
        if !desk.undecided.is_empty() {
            // What is known of the others is recorded meanwhile.
            self.report(&mut self.state(), desk);
            self.start_senders();
            self.await_judgement(desk, &batch).await;
        }
        picks.clear();
        let now = self.worker.clock().wall();
        let mut state = self.state();
        let is_unsent = self.report(&mut state, desk);
        let next = self.pick(&mut state, now, picks);
        let waiting = state.roster.waiting(destination);
        drop(state);
        // Not at every message: a few times on the way down.
        let ahead = self.ahead[destination].load(Ordering::Relaxed);
        let taken = next.as_ref().map_or(1, |next| next.picks.len());
        let is_starved = waiting <= ahead / 2 && waiting % (ahead / 8).max(1) < taken;
        if is_starved || is_unsent {
            self.worker.wake();
        }
        if next.as_ref().is_none_or(|next| next.batch.destination != destination) {
            self.seat.wake_waiting(destination);
        }
        next
    }

    /// Gives the permit of an attempt back, and takes note of what the attempt says of its destination: as much of a bundle
    /// as of a single message. What stands for a bundle is the outcome of one of its messages, drawn at random, so
    /// that shares of failures are the same as without bundles.
    fn give_back_permit(&self, passage: Passage, desk: &mut Desk, batch: &WebhookBatch) {
        self.state().roster.ended(batch.destination);
        let Some(outcome) = desk.drawn() else {
            return; // the passage is dropped with its permit
        };
        let ended = passage.ended(&outcome, desk.latency, batch.lease.header.file);
        desk.epoch = ended.epoch;
        if let Some(change) = ended.change {
            let destination = &self.setup.destinations[batch.destination];
            say(&destination.name, change, self.worker.clock().mono());
        }
        if ended.grew {
            self.seat.wake_all();
        }
    }

    /// Decides on each message by its outcome. Those whose permanent failure may be a slip of the operator's are undecided.
    fn decide(&self, picks: &[Pick], desk: &mut Desk, batch: &WebhookBatch) {
        // One time for all: what failed together comes back together, and bundles stay as they were.
        let now = self.worker.clock().wall();
        for (at, &pick) in picks.iter().enumerate() {
            match desk.outcomes[at] {
                Some(outcome) => match self.judge(pick, batch, outcome, (desk.epoch, now), false) {
                    Some(report) => desk.reports.push((pick, report)),
                    None => desk.undecided.push((pick, outcome)),
                },
                None => desk.reports.push((pick, Report::Unsent)),
            }
        }
    }

    /// Waits until it is known what permanent failures mean. They are ordinary when nothing more comes that could say
    /// otherwise, and when it takes too long. If the worker closes before, their messages stay open.
    async fn await_judgement(&self, desk: &mut Desk, batch: &WebhookBatch) {
        let until = Instant::now() + JUDGE_WITHIN;
        while !desk.undecided.is_empty() {
            tokio::select! {
                biased;
                () = self.worker.closed() => {
                    let unsent = desk.undecided.drain(..).map(|(pick, _)| (pick, Report::Unsent));
                    desk.reports.extend(unsent);
                    return;
                }
                () = sleep(JUDGE_EVERY) => {}
            }
            let is_late = Instant::now() >= until || !self.has_more(batch.destination);
            let now = self.worker.clock().wall();
            for (pick, outcome) in std::mem::take(&mut desk.undecided) {
                match self.judge(pick, batch, outcome, (desk.epoch, now), is_late) {
                    Some(report) => desk.reports.push((pick, report)),
                    None => desk.undecided.push((pick, outcome)),
                }
            }
        }
    }

    /// Whether messages are on their way to a destination, or wait here.
    fn has_more(&self, destination: usize) -> bool {
        self.seat.is_busy(destination) || self.state().roster.waiting(destination) > 0
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

    /// What an outcome under a permit of `epoch` means for its message at `now`. `None` for a permanent failure of which it
    /// is not known yet, unless `is_late`.
    fn judge(
        &self,
        pick: Pick,
        batch: &WebhookBatch,
        outcome: Outcome,
        (epoch, now): (u32, UnixMs),
        is_late: bool,
    ) -> Option<Report> {
        if let Outcome::Permanent { status, reason } = outcome {
            let failure = PermanentFailure::new(status, reason);
            match self.seat.judge(pick.destination, epoch, batch.lease.header.file, failure) {
                Judgement::Ordinary => {}
                Judgement::Undecided if is_late => {}
                Judgement::Undecided => return None,
                Judgement::Suspect => {
                    self.suspect(pick.destination);
                    return Some(Report::Unsent);
                }
                Judgement::Outdated => return Some(Report::Unsent),
            }
        }
        // Only a retry asks how old its message is; most are sent.
        let age = if matches!(outcome, Outcome::Retryable { .. }) {
            let age = self.worker.clock().age(batch.lease.since(pick.index));
            let stood = self.seat.stood(pick.destination, age);
            batch.lease.age(pick.index, age.saturating_sub(stood), now)
        } else {
            Duration::ZERO
        };
        let retry = &self.setup.destinations[pick.destination].retry;
        Some(match decide(retry, outcome, pick.attempt, age, now, batch.draws.of(pick.attempt)) {
            Decision::Record(verdict) => Report::Verdict(verdict),
            Decision::Leave => Report::Unsent,
            Decision::Hold => {
                self.setup.destinations[pick.destination].metrics.gone();
                let mut state = self.state();
                state.to_disable[pick.destination] = Some(GONE.to_owned());
                self.holds.set(pick.destination, true);
                state.roster.stop(Some(pick.destination));
                Report::Unsent
            }
        })
    }

    /// Reports what is decided; whether a message of it was not sent. The last first: what goes again keeps its order.
    fn report(&self, state: &mut WebhookState, desk: &mut Desk) -> bool {
        let (now, mut flush, mut is_unsent) = (self.worker.clock().wall(), false, false);
        for (pick, report) in desk.reports.drain(..).rev() {
            flush |= state.roster.report(pick, report, self.setup.record_group, now);
            is_unsent |= report == Report::Unsent;
        }
        if flush {
            self.flush.ring();
        }
        is_unsent
    }

    /// Waits until an attempt may be able to begin. Whether its messages are still to be sent here then: their lease may be
    /// lost meanwhile, or the worker closed, or the destination held.
    async fn wait_out(&self, load: &Load, obstacle: Obstacle, times: u32) -> bool {
        let index = load.batch.destination;
        let destination = &self.setup.destinations[index];
        destination.metrics.not_begun(obstacle);
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
            () = self.holds.held(index) => return false,
            () = back_off(OBSTACLE, times) => {}
        }
        self.is_held_here(&load.batch)
    }

    /// Begins nothing more of a batch here.
    pub(super) fn stop(&self, batch: &WebhookBatch) {
        if !batch.held.swap(true, Ordering::Relaxed) {
            self.state().roster.stop_batch(batch.lease.token);
        }
    }

    /// Whether the lease of a batch is not lost yet.
    pub(super) fn is_held_here(&self, batch: &WebhookBatch) -> bool {
        self.state().batches.contains_key(&batch.lease.token)
    }
}
