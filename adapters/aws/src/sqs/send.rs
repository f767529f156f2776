//! Sending (S2.1, S2.2): many entries in few calls, and an outcome per entry.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{
        batch::NewBatch,
        call::{Failure, FailureKind},
        ids::BatchId,
        shard::shard,
        time::UnixMs,
    },
    ports::{ItemOutcome, OutboxEntry},
};
use tokio::time::Instant;

use super::{
    Desk,
    calls::{ENTRIES_MAX, Outgoing, Refusal, Refusals},
    envelope,
    packing::pack,
};
use crate::full_jitter;

/// The bound of the first wait between two rounds; doubled with each.
const WAIT_BASE: Duration = Duration::from_millis(100);

/// The longest wait between two rounds.
const WAIT_CAP: Duration = Duration::from_secs(2);

/// An entry that is not accepted yet.
struct Pending<'a> {
    batch: &'a NewBatch,
    not_before: UnixMs,
    body: Arc<str>,
    /// The body is only a reference to the outbox.
    by_reference: bool,
    /// What tells this sending of the batch from others, for a FIFO queue.
    nonce: u32,
    /// It goes in a call of its own: in company the call was refused.
    alone: bool,
    /// What the last round came to.
    last: ItemOutcome,
}

impl Pending<'_> {
    fn refer(&mut self) {
        self.body = envelope::write_reference(self.batch, self.not_before).into();
        self.by_reference = true;
    }

    /// Takes an answer in; it may change how the entry is offered next time.
    fn judge(&mut self, answer: Result<Option<Refusal>, Failure>) {
        self.last = match answer {
            Ok(None) => ItemOutcome::Ok,
            Ok(Some(refusal)) if refusal.sender_fault => {
                if is_about_size(&refusal.code) && !self.by_reference {
                    self.refer();
                    ItemOutcome::Retryable(refusal.why)
                } else {
                    ItemOutcome::Permanent(refusal.why)
                }
            }
            Ok(Some(refusal)) => ItemOutcome::Retryable(refusal.why),
            Err(Failure { kind: FailureKind::Unknown, why, .. }) => ItemOutcome::Unknown(why),
            Err(Failure { code: Some(code), why, .. }) if is_about_size(&code) => {
                // Something in the call was too large, by the queue's own limit.
                if !self.alone {
                    self.alone = true;
                    ItemOutcome::Retryable(why)
                } else if !self.by_reference {
                    self.refer();
                    ItemOutcome::Retryable(why)
                } else {
                    ItemOutcome::Permanent(why)
                }
            }
            Err(failure) => ItemOutcome::Retryable(failure.why),
        };
    }
}

impl Desk {
    /// Sends entries; one outcome per entry, in order. What was not accepted within the budget is the residue: it
    /// is reported as what it came to last, and stays in the outbox.
    pub(super) async fn send(&self, entries: &[OutboxEntry]) -> Vec<(BatchId, ItemOutcome)> {
        let mut outcomes: HashMap<BatchId, ItemOutcome> = HashMap::with_capacity(entries.len());
        let mut pending: Vec<Pending<'_>> = Vec::with_capacity(entries.len());
        for entry in entries {
            match &entry.batch {
                Some(batch) if outcomes.insert(entry.id, ItemOutcome::Ok).is_none() => {
                    pending.push(self.prepare(batch, entry.not_before));
                }
                Some(_) => {} // twice in one call: sent once
                None => {
                    let why = format!("batch {} was not brought along", entry.id);
                    outcomes.insert(entry.id, ItemOutcome::Permanent(why));
                }
            }
        }
        let deadline = Instant::now() + self.settings.send_budget;
        let mut bound = WAIT_BASE;
        while !pending.is_empty() {
            for (at, answer) in self.round(&pending).await {
                let sent = &mut pending[at];
                sent.judge(answer);
            }
            pending.retain(|sent| match &sent.last {
                ItemOutcome::Ok => false,
                ItemOutcome::Permanent(_) => {
                    outcomes.insert(sent.batch.id, sent.last.clone());
                    false
                }
                ItemOutcome::Retryable(_) | ItemOutcome::Unknown(_) => true,
            });
            let wait = full_jitter(bound);
            if self.is_closing() || Instant::now() + wait >= deadline {
                break;
            }
            if !pending.is_empty() {
                tokio::time::sleep(wait).await;
            }
            bound = (bound * 2).min(WAIT_CAP);
        }
        outcomes.extend(pending.into_iter().map(|sent| (sent.batch.id, sent.last)));
        entries.iter().map(|entry| (entry.id, outcomes[&entry.id].clone())).collect()
    }

    fn prepare<'a>(&self, batch: &'a NewBatch, not_before: UnixMs) -> Pending<'a> {
        let body: Arc<str> = envelope::write(batch, not_before).into();
        let too_large = body.len() > self.max_bytes();
        let last = ItemOutcome::Retryable("it was not sent".into());
        let mut prepared = Pending {
            batch,
            not_before,
            body,
            by_reference: false,
            nonce: rand::random(),
            alone: false,
            last,
        };
        if too_large {
            prepared.refer();
        }
        prepared
    }

    /// The message of a batch; how long it is delayed is counted from now.
    pub(super) fn outgoing(
        &self,
        batch: &NewBatch,
        not_before: UnixMs,
        nonce: u32,
        body: Arc<str>,
    ) -> Outgoing {
        let fifo = self.settings.is_fifo().then(|| {
            let key = batch.header.file.to_string();
            let lane = shard(Some(&key), self.settings.lanes.max(1), 0);
            // SQS drops what is repeated within five minutes, which is what the repetition of a call is for. A batch that
            // is sent again because it is due again is no repetition.
            (format!("{}-{lane}", batch.header.destination), format!("{}-{nonce:08x}", batch.id))
        });
        let delay = not_before.since(self.clock.wall());
        Outgoing { id: batch.id.to_string(), body, delay, fifo, reason: None }
    }

    /// Offers all that is pending once. Every position is answered.
    async fn round(&self, pending: &[Pending<'_>]) -> Vec<(usize, Result<Option<Refusal>, Failure>)> {
        let outgoing: Vec<_> = pending
            .iter()
            .map(|sent| self.outgoing(sent.batch, sent.not_before, sent.nonce, sent.body.clone()))
            .collect();
        let max_bytes = self.max_bytes();
        // Who goes alone counts as a whole call.
        let sizes = outgoing.iter().zip(pending);
        let sizes = sizes.map(|(message, sent)| if sent.alone { max_bytes } else { message.bytes() });
        let in_flight = if self.settings.is_fifo() { 1 } else { self.settings.sends_in_flight.max(1) };
        let calls = pack(sizes, ENTRIES_MAX, max_bytes).into_iter().map(|call| {
            let messages = outgoing[call.clone()].to_vec();
            async move { (call, self.calls.send(&self.settings.queue_url, &messages).await) }
        });
        let answers: Vec<_> = stream::iter(calls).buffer_unordered(in_flight).collect().await;
        let mut by_position = Vec::with_capacity(pending.len());
        for (call, answer) in answers {
            for at in call {
                by_position.push((at, one_of(&answer, &outgoing[at].id)));
            }
        }
        by_position
    }
}

/// The answer for one entry of a call.
fn one_of(answer: &Result<Refusals, Failure>, id: &str) -> Result<Option<Refusal>, Failure> {
    match answer {
        Ok(refusals) => Ok(refusals.get(id).cloned()),
        Err(failure) => Err(failure.clone()),
    }
}

/// Whether SQS found a message or a call too large. The per-message limit is answered as an invalid parameter
/// ("Message must be shorter than … bytes").
fn is_about_size(code: &str) -> bool {
    let code = code.rsplit('.').next().unwrap_or(code);
    matches!(code, "BatchRequestTooLong" | "InvalidParameterValue" | "MessageTooLong")
}
