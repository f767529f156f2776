//! Receiving: the pollers, and the sweeper of what they brought.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use aws_sdk_sqs::types::{Message, MessageSystemAttributeName as Attribute};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use postrider_actors::model::time::{MonoMs, UnixMs};
use rand::RngExt as _;

use super::{
    Desk,
    calls::{ENTRIES_MAX, VISIBILITY_MAX},
    dead_letters::DeadLetter,
    envelope,
    stock::{Back, Receipt, Received},
};
use crate::full_jitter;

/// The longest that an idle poller or the sweeper sleeps; asks and arrivals wake them.
const TICK: Duration = Duration::from_millis(500);

/// How often the sweeper looks while there is something in stock.
const SWEEP: Duration = Duration::from_millis(250);

/// How long a receive that is under way may take on when the queue is closed. Cutting it off can leave an entry
/// hidden for the visibility timeout that nobody has got.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// The bound of the first wait after a receive that failed; doubled with each.
const WAIT_BASE: Duration = Duration::from_millis(200);
const WAIT_CAP: Duration = Duration::from_secs(10);

/// An entry that is due this soon is kept until then, which is cheaper and more exact than hiding it anew.
const SOON: Duration = Duration::from_secs(2);

/// How long an entry is hidden at most whose batch a worker here has by another entry.
const LEASED_WAIT: Duration = Duration::from_secs(5);

/// Calls in flight of one group of changes.
const CALLS_IN_FLIGHT: usize = 4;

/// Tries of a change of visibility; after them the timeout that runs does it.
const HIDE_TRIES: u32 = 2;

/// An entry is renewed when it was received so many times of those that the redrive policy allows, in percent.
const RENEW_RECEIVES_PERCENT: u32 = 90;

/// An entry is renewed when it is this old: SQS keeps one for 14 days at most ("Amazon SQS message quotas").
const RENEW_AGE: Duration = Duration::from_hours(10 * 24);

/// What to do with received entries that are not kept.
#[derive(Default)]
pub(super) struct Leftovers {
    /// To hide for so long from now.
    pub(super) hide: Vec<(Receipt, Duration)>,
    /// To delete.
    pub(super) delete: Vec<Receipt>,
    /// To give back.
    pub(super) back: Vec<(Received, Back)>,
    /// Never to be delivered.
    pub(super) dead: Vec<DeadLetter>,
}

/// A poller: receives while that many receives are of use that it is this one's turn.
pub(super) fn poll(desk: Arc<Desk>, index: usize) -> BoxFuture<'static, ()> {
    receive_on(desk, index).boxed()
}

async fn receive_on(desk: Arc<Desk>, index: usize) {
    let mut closing = desk.closing.subscribe();
    let mut bound = WAIT_BASE;
    loop {
        // Registered before the look, so that no ask falls between both.
        let asked = desk.asked.notified();
        if desk.is_closing() {
            return;
        }
        if desk.state().stock.receives_wanted(desk.stock_time()) <= index {
            // Elapsing is no error: asks run out by time.
            let _ = tokio::time::timeout(TICK, asked).await;
            continue;
        }
        let settings = &desk.settings;
        let receive =
            desk.calls.receive(&settings.queue_url, ENTRIES_MAX, settings.wait, settings.visibility);
        let received = tokio::select! {
            received = receive => received,
            () = async {
                // The sender lives as long as the desk.
                let _ = closing.wait_for(|closing| *closing).await;
                tokio::time::sleep(CLOSE_GRACE).await;
            } => return,
        };
        match received {
            Ok(messages) => {
                bound = WAIT_BASE;
                // A moment after they were hidden: HAND_OUT_MIN covers it.
                desk.sort_in(messages, desk.stock_time()).await;
            }
            Err(failure) => {
                let why = failure.why;
                tracing::warn!(why, "receiving from SQS failed; it is tried again until it succeeds");
                tokio::time::sleep(full_jitter(bound)).await;
                bound = (bound * 2).min(WAIT_CAP);
            }
        }
    }
}

/// Gives back what nobody wants any more, keeps hidden what is wanted, rings when something is due.
pub(super) fn sweep(desk: Arc<Desk>) -> BoxFuture<'static, ()> {
    sweep_on(desk).boxed()
}

async fn sweep_on(desk: Arc<Desk>) {
    loop {
        if desk.is_closing() {
            let all = desk.state().stock.clear();
            let hide = all.into_iter().map(|received| (received.receipt, Duration::ZERO));
            desk.hide(hide.collect()).await;
            return;
        }
        let idle = desk.state().stock.is_empty();
        if idle {
            desk.stocked.wait(TICK).await;
            continue;
        }
        let now = desk.stock_time();
        let sweep = {
            let mut state = desk.state();
            let state = &mut *state;
            let leases = &state.leases;
            state.stock.sweep(|destination| leases.values().any(|held| held.is_for(destination)), now)
        };
        let visibility = desk.settings.visibility;
        let hide = sweep.hide.into_iter().map(|receipt| (receipt, visibility)).collect();
        desk.dispose(Leftovers { hide, back: sweep.back, ..Leftovers::default() }).await;
        let pause = sweep.next_due.map_or(SWEEP, |due| due.since(now).min(SWEEP));
        tokio::time::sleep(pause).await;
        if sweep.next_due.is_some_and(|due| due <= desk.stock_time()) {
            desk.ring();
        }
    }
}

impl Desk {
    /// Puts received messages where they belong.
    async fn sort_in(&self, messages: Vec<Message>, now: MonoMs) {
        let mut left = Leftovers::default();
        let mut kept = 0;
        for message in messages {
            kept += usize::from(self.sort_in_one(message, now, &mut left));
        }
        if kept > 0 {
            self.stocked.ring();
            self.ring();
        }
        self.dispose(left).await;
    }

    /// Whether it is kept for a worker.
    fn sort_in_one(&self, message: Message, now: MonoMs, left: &mut Leftovers) -> bool {
        let attribute =
            |name: &Attribute| message.attributes().and_then(|found| found.get(name)?.parse::<u64>().ok());
        let receives = attribute(&Attribute::ApproximateReceiveCount).unwrap_or(1);
        let sent_at = attribute(&Attribute::SentTimestamp);
        let group = message.attributes().and_then(|found| found.get(&Attribute::MessageGroupId)).cloned();
        let (Some(id), Some(handle)) = (message.message_id, message.receipt_handle) else {
            tracing::warn!("SQS handed out a message without id or handle");
            return false;
        };
        let receipt = Receipt { message: id, handle };
        let body = message.body.unwrap_or_default();
        let entry = match envelope::read(&body) {
            Ok(entry) => entry,
            Err(error) => {
                left.dead.push(DeadLetter { receipt, body: body.into(), group, reason: error.to_string() });
                return false;
            }
        };
        let batch = entry.batch.id;
        let wait = entry.batch.not_before.since(self.clock.wall());
        let received = Received {
            entry,
            receipt,
            receives: u32::try_from(receives).unwrap_or(u32::MAX),
            sent_at: sent_at.map_or_else(|| self.clock.wall(), UnixMs),
            at: now,
            hidden_until: now.after(self.settings.visibility),
            due: now.after(wait),
        };
        let mut state = self.state();
        let state = &mut *state;
        // What we have already is delivered again now and then. The latest receipt of a message is the one that
        // counts; a second message with the same batch is one too many.
        let receipt = match (state.leases.get_mut(&batch), state.stock.find_mut(batch)) {
            (Some(held), _) => {
                let hidden = held.until.since(self.clock.mono());
                if held.receipt.message != received.receipt.message {
                    // A double; or the store has sent the batch again, and its worker is about to say that the lease
                    // has ended.
                    left.hide.push((received.receipt, hidden.min(LEASED_WAIT)));
                    return false;
                }
                Some((&mut held.receipt, hidden))
            }
            (None, Some(stocked)) => {
                let fresh = stocked.receipt.message == received.receipt.message;
                if fresh {
                    stocked.hidden_until = received.hidden_until;
                }
                Some((&mut stocked.receipt, Duration::ZERO))
            }
            (None, None) => None,
        };
        if let Some((known, hidden)) = receipt {
            if known.message != received.receipt.message {
                left.delete.push(received.receipt);
                return false;
            }
            *known = received.receipt;
            if hidden > Duration::ZERO {
                left.hide.push((known.clone(), hidden));
            }
            return false;
        }
        if wait > SOON {
            // S2.5: it costs no claim and no attempt. Later than 12 hours, it is received and hidden again.
            left.hide.push((received.receipt, wait));
            return false;
        }
        let (leases, before) = (&state.leases, left.back.len());
        let offered = state.stock.offer(
            received,
            |destination| leases.values().any(|held| held.is_for(destination)),
            now,
        );
        left.back.extend(offered);
        left.back.len() == before
    }

    /// Does what is to be done with entries that are not kept.
    pub(super) async fn dispose(&self, left: Leftovers) {
        let Leftovers { mut hide, mut delete, back, dead } = left;
        let mut renewals = Vec::new();
        for (received, why) in back {
            let hidden = why.hide(rand::rng().random());
            let receives_max = self.settings.max_receives.saturating_mul(RENEW_RECEIVES_PERCENT) / 100;
            let age = self.clock.wall().since(received.sent_at);
            if received.receives >= receives_max.max(1) || age >= RENEW_AGE {
                renewals.push((received, hidden));
            } else {
                hide.push((received.receipt, hidden));
            }
        }
        delete.extend(self.renew(renewals).await);
        delete.extend(self.move_dead(dead).await);
        if !delete.is_empty() {
            self.deletes.push(delete.into_iter().map(|receipt| receipt.handle)).await;
        }
        self.hide(hide).await;
    }

    /// Sends entries anew that would be taken away soon, by the redrive policy or for their age, though nothing
    /// is wrong with them: their destination is slow, paused or disabled. Returns those that may be deleted.
    async fn renew(&self, entries: Vec<(Received, Duration)>) -> Vec<Receipt> {
        let mut renewed = Vec::new();
        for (received, hidden) in entries {
            let batch = &received.entry.batch;
            let not_before = batch.not_before.max(self.clock.wall().after(hidden));
            let body = if received.entry.by_reference {
                envelope::write_reference(batch, batch.not_before)
            } else {
                envelope::write(batch, batch.not_before)
            };
            let message = self.outgoing(batch, not_before, rand::random(), body.into());
            match self.calls.send(&self.settings.queue_url, std::slice::from_ref(&message)).await {
                Ok(refusals) if refusals.is_empty() => {
                    tracing::info!(batch = %batch.id, receives = received.receives, "an entry that waits for long is sent anew");
                    renewed.push(received.receipt);
                }
                // It comes again and is tried again.
                Ok(_) | Err(_) => {
                    tracing::warn!(batch = %batch.id, "an entry that waits for long can't be sent anew yet");
                }
            }
        }
        renewed
    }

    /// Hides messages for so long from now. If it fails, they come when their visibility timeout has run out:
    /// that is tolerated, for claims fence.
    pub(super) async fn hide(&self, mut changes: Vec<(Receipt, Duration)>) {
        for attempt in 0..HIDE_TRIES {
            if changes.is_empty() {
                return;
            }
            if attempt > 0 {
                tokio::time::sleep(full_jitter(WAIT_BASE)).await;
            }
            // One handle once: of several changes the last one holds.
            let by_message: BTreeMap<_, _> = changes
                .into_iter()
                .map(|(receipt, hidden)| (receipt.message.clone(), (receipt, hidden)))
                .collect();
            let distinct: Vec<_> = by_message.into_values().collect();
            let chunks: Vec<Vec<_>> = distinct.chunks(ENTRIES_MAX).map(<[_]>::to_vec).collect();
            let calls = chunks.into_iter().map(|chunk| async move {
                let call: Vec<_> = chunk
                    .iter()
                    .map(|(receipt, hidden)| (receipt.handle.clone(), (*hidden).min(VISIBILITY_MAX)))
                    .collect();
                let answer = self.calls.hide(&self.settings.queue_url, &call).await;
                (chunk, answer)
            });
            let answers: Vec<_> = stream::iter(calls).buffer_unordered(CALLS_IN_FLIGHT).collect().await;
            let mut again = Vec::new();
            for (chunk, answer) in answers {
                let Ok(refusals) = answer else {
                    again.extend(chunk);
                    continue;
                };
                for (id, refusal) in refusals {
                    // A stale handle is somebody else's message by now.
                    if !refusal.sender_fault
                        && let Some(change) = id.parse().ok().and_then(|at: usize| chunk.get(at))
                    {
                        again.push(change.clone());
                    }
                }
            }
            changes = again;
        }
        if !changes.is_empty() {
            tracing::debug!(entries = changes.len(), "visibility timeouts could not be changed; they run on");
        }
    }
}
