//! Status changes as a queue: what receipts and expiry changed goes back into the pipeline as messages, so that it
//! is delivered with an outbox, retries, signatures and dead letters like any other message.
//!
//! The ledger holds the changes until they are deleted here. Which ones are handed out is kept in memory only: a
//! restart hands out again what was not deleted, and the feed recognises it by the entry's id.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use postrider_actors::{
    model::time::MonoMs,
    ports::{
        AckId, Clock, Intake, IntakeEntry, ItemOutcome, QueueDepth, ReceiptLedger, StatusChange, StoreError,
    },
};
use serde::Serialize;

/// How long an entry that was handed out stays hidden. The feed extends it.
const VISIBILITY: Duration = Duration::from_mins(1);

/// How often the ledger is asked while it has none.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Changes read from the ledger at once.
const READ_MAX: usize = 1_000;

/// The body of an entry.
#[derive(Serialize)]
struct ChangeBody<'a> {
    message_id: String,
    destination: &'a str,
    provider_id: Option<&'a str>,
    before: &'static str,
    state: &'static str,
    at: String,
}

/// The ledger's status changes.
pub struct StatusChangeIntake {
    ledger: Arc<dyn ReceiptLedger>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// One reader at a time: several pollers would read the same changes.
    reading: tokio::sync::Mutex<()>,
}

/// What is known of changes.
#[derive(Default)]
struct State {
    /// Read and not handed out.
    waiting: BTreeMap<u64, StatusChange>,
    /// Handed out.
    held: BTreeMap<u64, HeldChange>,
    /// The greatest number that was read. A change that is committed with a lower one later is found when
    /// reading starts over, which it does whenever there is nothing behind this.
    after: Option<u64>,
    deliveries: u64,
}

struct HeldChange {
    change: StatusChange,
    ack: AckId,
    until: MonoMs,
}

impl StatusChangeIntake {
    /// Reads the changes of `ledger`, which was opened to keep them.
    pub fn new(ledger: Arc<dyn ReceiptLedger>, clock: Arc<dyn Clock>) -> Self {
        Self { ledger, clock, state: Mutex::default(), reading: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what waits; reads on if nothing does.
    async fn take(&self, limit: usize) -> Result<Vec<IntakeEntry>, StoreError> {
        let taken = self.state().take(limit, self.clock.mono());
        if !taken.is_empty() {
            return Ok(taken);
        }
        let _reading = self.reading.lock().await;
        let after = self.state().after;
        let mut read = self.ledger.changes(after, READ_MAX).await?;
        if read.is_empty() && after.is_some() {
            read = self.ledger.changes(None, READ_MAX).await?;
        }
        let mut state = self.state();
        state.after = read.last().map(|change| change.number);
        for change in read {
            if !state.held.contains_key(&change.number) {
                state.waiting.insert(change.number, change);
            }
        }
        Ok(state.take(limit, self.clock.mono()))
    }

    /// One outcome per ack id: what `change` does to the delivery, if it is the current one.
    fn each(&self, acks: &[AckId], change: impl Fn(&mut State, u64)) -> Vec<ItemOutcome> {
        let mut state = self.state();
        let one = |ack: &AckId| match state.number_of(ack) {
            Some(number) => {
                change(&mut state, number);
                ItemOutcome::Ok
            }
            None => ItemOutcome::Permanent("this delivery is not ours any more".into()),
        };
        acks.iter().map(one).collect()
    }
}

impl State {
    fn take(&mut self, limit: usize, now: MonoMs) -> Vec<IntakeEntry> {
        let late: Vec<_> =
            self.held.iter().filter(|(_, held)| held.until <= now).map(|(number, _)| *number).collect();
        for number in late {
            self.release(number);
        }
        let mut taken = Vec::new();
        while taken.len() < limit
            && let Some((number, change)) = self.waiting.pop_first()
        {
            self.deliveries += 1;
            let ack = AckId(format!("{number}.{}", self.deliveries).into());
            taken.push(IntakeEntry {
                id: entry_id(&change),
                ack: ack.clone(),
                body: body(&change).into(),
                sent_at: change.at,
                // Whether it was handed out before a restart is not known.
                receives: 0,
            });
            self.held.insert(number, HeldChange { change, ack, until: now.after(VISIBILITY) });
        }
        taken
    }

    fn release(&mut self, number: u64) {
        if let Some(held) = self.held.remove(&number) {
            self.waiting.insert(number, held.change);
        }
    }

    /// The change of this delivery, if it is still the current one.
    fn number_of(&self, ack: &AckId) -> Option<u64> {
        let number = number(ack)?;
        self.held.get(&number).filter(|held| held.ack == *ack).map(|_| number)
    }
}

/// By the number, and by the time as well: in a new ledger the numbers start over, and the
/// feed remembers for days which entries it has taken.
fn entry_id(change: &StatusChange) -> String {
    format!("{}-{}", change.number, change.at.0)
}

fn number(ack: &AckId) -> Option<u64> {
    ack.0.split_once('.')?.0.parse().ok()
}

fn body(change: &StatusChange) -> String {
    let at = std::time::UNIX_EPOCH + Duration::from_millis(change.at.0.min(YEAR_9999_MS));
    let body = ChangeBody {
        message_id: change.id.to_string(),
        destination: &change.destination,
        provider_id: change.provider_id.as_deref(),
        before: change.before.as_str(),
        state: change.state.as_str(),
        at: humantime::format_rfc3339_millis(at).to_string(),
    };
    serde_json::to_string(&body).expect("texts and nothing else")
}

/// The last millisecond that RFC 3339 can say.
const YEAR_9999_MS: u64 = 253_402_300_799_999;

#[async_trait]
impl Intake for StatusChangeIntake {
    async fn receive(&self, limit: usize, wait: Duration) -> Result<Vec<IntakeEntry>, StoreError> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let taken = self.take(limit).await?;
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if !taken.is_empty() || left.is_zero() {
                return Ok(taken);
            }
            tokio::time::sleep(left.min(LOOK_EVERY)).await;
        }
    }

    fn visibility(&self) -> Duration {
        VISIBILITY
    }

    async fn extend(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        let until = self.clock.mono().after(VISIBILITY);
        Ok(self.each(acks, |state, number| {
            if let Some(held) = state.held.get_mut(&number) {
                held.until = until;
            }
        }))
    }

    async fn delete(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        // An earlier delivery deletes too: what it brought is committed.
        let numbers: Vec<_> = acks.iter().filter_map(number).collect();
        // Nobody reads them again while they go.
        let _reading = self.reading.lock().await;
        self.ledger.forget_changes(&numbers).await?;
        let mut state = self.state();
        for number in numbers {
            state.held.remove(&number);
            state.waiting.remove(&number);
        }
        let outcome = |ack: &AckId| match number(ack) {
            Some(_) => ItemOutcome::Ok,
            None => ItemOutcome::Permanent("not a delivery of a status change".into()),
        };
        Ok(acks.iter().map(outcome).collect())
    }

    async fn release(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        Ok(self.each(acks, State::release))
    }

    /// How many changes were read and are not delivered: there may be more in the ledger.
    async fn depth(&self) -> Result<QueueDepth, StoreError> {
        let state = self.state();
        Ok(QueueDepth { visible: state.waiting.len() as u64, in_flight: state.held.len() as u64, delayed: 0 })
    }
}

#[cfg(test)]
mod tests;
