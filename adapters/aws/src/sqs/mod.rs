//! Queues on Amazon SQS: one per destination, for the hints that the processes of one installation send each other
//! (port `Transport`), and those that feeds and receipts are read from (port `Intake`).
//!
//! An entry is a hint that a batch is due; what is true of the batch is in the store. What to send when, claims and
//! deletion are the coordinator's (`postrider_actors::coordinator`): here is one call to SQS for each of its five.
//!
//! - `calls.rs`: the calls, made, timed and classified in one place.
//! - `entry.rs`: what an entry says.
//! - `intake.rs`: something else, the queue that a feed reads.
//! - `provision.rs`: creates the queues or says what is wrong with them.
//!
//! Sources: Amazon SQS API Reference and Developer Guide ("Amazon SQS message quotas", "Amazon SQS visibility
//! timeout", "Amazon SQS short and long polling", "FIFO queue delivery logic").

mod calls;
mod entry;
mod intake;
pub mod provision;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use aws_sdk_sqs::{Client, types::Message};
use postrider_actors::{
    model::call::Failure,
    ports::{
        CallObserver, Handle, ItemOutcome, Outgoing, QueueDepth, Received, StoreError, Transport,
        TransportLimits,
    },
};
use postrider_settings::Sqs;

use self::calls::{Calls, DELAY_MAX, ENTRIES_MAX, Sending, VISIBILITY_MAX};
pub use self::intake::SqsIntake;
use crate::AwsSettings;

/// How long an entry is hidden that can't be moved to the dead-letter queue now.
const MOVE_WAIT: Duration = Duration::from_mins(15);

/// The queues of one installation.
pub struct SqsTransport {
    calls: Calls,
    keys: Sqs,
    /// By queue name.
    urls: Mutex<HashMap<String, Arc<str>>>,
}

impl fmt::Debug for SqsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsTransport").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl SqsTransport {
    /// Calls nothing yet. `client` was made with `aws`.
    pub fn new(client: Client, aws: &AwsSettings, keys: Sqs, observer: Arc<dyn CallObserver>) -> Self {
        Self { calls: Calls::new(client, aws, observer), keys, urls: Mutex::default() }
    }

    /// Makes a call to the queue `name`. A failure says which call and which queue it was.
    async fn at<T, F>(
        &self,
        name: &str,
        what: &str,
        call: impl FnOnce(Arc<str>) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let url = self.url(name).await?;
        call(url).await.map_err(|failure| {
            if failure.code.as_deref().is_some_and(calls::is_unknown_queue) {
                // Made anew, it may have another address.
                self.urls.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
            }
            failure.about(format_args!("{what}: queue {name}")).into()
        })
    }

    /// Where a queue is. It is asked for once.
    async fn url(&self, name: &str) -> Result<Arc<str>, StoreError> {
        let known = self.urls.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some(url) = known {
            return Ok(url);
        }
        let found = self.calls.url(name).await?.ok_or_else(|| {
            StoreError::Retryable(format!("GetQueueUrl: there is no queue {name}; {}", provision::MAKE))
        })?;
        let url: Arc<str> = found.into();
        self.urls.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), url.clone());
        Ok(url)
    }

    /// Moves an entry that can't be read to the dead-letter queue, with the reason.
    async fn move_to_dead_letters(&self, url: &str, queue: &str, message: Message, reason: &str) {
        let id = message.message_id.unwrap_or_default();
        tracing::error!(queue, message = id, reason, "an entry of the queue can't be read");
        self.calls.service.observer().rejected("sqs", "ReceiveMessage", "dead_letter", 1);
        let Some(handle) = message.receipt_handle else { return };
        let entry = Sending {
            id: "dead".into(),
            body: message.body.unwrap_or_default().into(),
            delay: Duration::ZERO,
            // A dead-letter queue is of its queue's kind ("Using dead-letter queues in Amazon SQS").
            fifo: self.keys.fifo.then(|| ("postrider".to_owned(), id.clone())),
            reason: Some(reason.to_owned()),
        };
        let name = self.keys.dead_letters();
        let moved = self.at(&name, "SendMessageBatch", |url| async move {
            self.calls.send(&url, std::slice::from_ref(&entry)).await
        });
        let why = match moved.await {
            Ok(refusals) if refusals.is_empty() => {
                // Not deleted, it comes again and is moved once more.
                let _ = self.calls.delete(url, &[handle]).await;
                return;
            }
            Ok(refusals) => refusals.into_values().next().map(|refusal| refusal.why).unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            queue,
            message = id,
            why,
            "the dead-letter queue does not take an entry; it stays hidden"
        );
        let _ = self.calls.hide(url, &[(handle, MOVE_WAIT)]).await;
    }
}

/// What the answer to a batch call says of each of its entries, which are called by their number.
fn outcomes(count: usize, refusals: &calls::Refusals) -> Vec<ItemOutcome> {
    (0..count).map(|index| calls::outcome(refusals.get(&index.to_string()))).collect()
}

#[async_trait]
impl Transport for SqsTransport {
    fn limits(&self) -> TransportLimits {
        TransportLimits {
            entries: ENTRIES_MAX,
            // A FIFO queue delays no single message (`SendMessage` in the API reference).
            delay: if self.keys.fifo { Duration::ZERO } else { DELAY_MAX },
            hidden: VISIBILITY_MAX,
            keeps_order: self.keys.fifo,
        }
    }

    async fn send(
        &self,
        destination: &str,
        entries: &[Outgoing],
        delay: Duration,
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if entries.len() > ENTRIES_MAX {
            return Err(StoreError::Permanent(format!("{} entries in one call", entries.len())));
        }
        let sending = entries.iter().enumerate().map(|(index, Outgoing { hint, sending, lane })| Sending {
            id: index.to_string(),
            body: entry::write(hint).into(),
            delay,
            fifo: self
                .keys
                .fifo
                .then(|| (lane.to_string(), format!("{}-{}-{sending}", hint.batch, hint.due.0))),
            reason: None,
        });
        let sending: Vec<_> = sending.collect();
        let name = self.keys.queue_name(destination);
        let refusals = self.at(&name, "SendMessageBatch", |url| {
            let sending = &sending;
            async move { self.calls.send(&url, sending).await }
        });
        Ok(outcomes(entries.len(), &refusals.await?))
    }

    async fn receive(
        &self,
        destination: &str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Result<Vec<Received>, StoreError> {
        let name = self.keys.queue_name(destination);
        let received = self.at(&name, "ReceiveMessage", |url| async move {
            let messages = self.calls.receive(&url, max, wait, hidden).await?;
            Ok((url, messages))
        });
        let (url, messages) = received.await?;
        let mut received = Vec::with_capacity(messages.len());
        for message in messages {
            match entry::read(message.body.as_deref().unwrap_or_default()) {
                Ok(hint) => {
                    if let Some(handle) = message.receipt_handle {
                        received.push(Received { hint, handle: Handle(handle.into()) });
                    } else {
                        // The API reference promises one. It comes again after its visibility timeout.
                        tracing::warn!(queue = name, "SQS delivered a message without a receipt handle");
                    }
                }
                Err(reason) => self.move_to_dead_letters(&url, &name, message, &reason.to_string()).await,
            }
        }
        Ok(received)
    }

    async fn hide(
        &self,
        destination: &str,
        changes: &[(Handle, Duration)],
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.keys.queue_name(destination);
        let call: Vec<_> = changes.iter().map(|(handle, hidden)| (handle.0.to_string(), *hidden)).collect();
        let refusals = self.at(&name, "ChangeMessageVisibilityBatch", |url| {
            let call = &call;
            async move { self.calls.hide(&url, call).await }
        });
        Ok(outcomes(changes.len(), &refusals.await?))
    }

    async fn delete(&self, destination: &str, handles: &[Handle]) -> Result<Vec<ItemOutcome>, StoreError> {
        if handles.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.keys.queue_name(destination);
        let call: Vec<_> = handles.iter().map(|handle| handle.0.to_string()).collect();
        let refusals = self.at(&name, "DeleteMessageBatch", |url| {
            let call = &call;
            async move { self.calls.delete(&url, call).await }
        });
        Ok(outcomes(handles.len(), &refusals.await?))
    }

    async fn depth(&self, destination: &str) -> Result<QueueDepth, StoreError> {
        let name = self.keys.queue_name(destination);
        self.at(&name, "GetQueueAttributes", |url| async move { self.calls.depth(&url).await }).await
    }
}
