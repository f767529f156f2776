//! The inbound queue of a feed, on SQS.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use aws_sdk_sqs::{
    Client,
    types::{Message, MessageSystemAttributeName},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{call::Failure, time::UnixMs},
    ports::{AckId, CallObserver, Intake, IntakeEntry, ItemOutcome, QueueDepth, StoreError},
};

use super::calls::{self, Calls, ENTRIES_MAX, Refusals};
use crate::AwsSettings;

/// Batch calls of one operation under way at once: each takes a round trip and moves ten entries.
const CALLS_AT_ONCE: usize = 8;

/// An SQS queue, standard or FIFO, that a feed reads.
pub struct SqsIntake {
    calls: Calls,
    url: String,
    /// How long an entry is ours, whatever the queue's own visibility timeout is.
    visibility: Duration,
}

impl fmt::Debug for SqsIntake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsIntake").field("url", &self.url).finish_non_exhaustive()
    }
}

impl SqsIntake {
    /// The queue at `url`, whose entries are hidden for `visibility` at a time. Calls nothing yet. `client` was made with
    /// `aws`.
    pub fn new(
        client: Client,
        aws: &AwsSettings,
        url: String,
        visibility: Duration,
        observer: Arc<dyn CallObserver>,
    ) -> Self {
        Self { calls: Calls::new(client, aws, observer), url, visibility }
    }

    /// Does something to entries in tens; one outcome per ack id, in order. A call that fails as a whole says
    /// nothing about the entries of the others.
    async fn in_tens<'a, F>(&'a self, acks: &'a [AckId], call: impl Fn(Vec<String>) -> F) -> Vec<ItemOutcome>
    where
        F: Future<Output = Result<Refusals, Failure>>,
    {
        let calls = acks.chunks(ENTRIES_MAX).map(|acks| {
            let answer = call(acks.iter().map(|ack| ack.0.to_string()).collect());
            async move {
                let answer = answer.await;
                (0..acks.len()).map(|index| outcome(&answer, index)).collect::<Vec<_>>()
            }
        });
        // Collected first: a stream over borrowing closures is no `Send` future otherwise.
        let calls: Vec<_> = calls.collect();
        stream::iter(calls).buffered(CALLS_AT_ONCE).concat().await
    }

    async fn hide(&self, acks: &[AckId], hidden: Duration) -> Vec<ItemOutcome> {
        self.in_tens(acks, |handles| {
            let changes: Vec<_> = handles.into_iter().map(|handle| (handle, hidden)).collect();
            async move { self.calls.hide(&self.url, &changes).await }
        })
        .await
    }
}

/// What the answer to a batch call says of its entry at `index`.
fn outcome(answer: &Result<Refusals, Failure>, index: usize) -> ItemOutcome {
    match answer {
        Ok(refusals) => calls::outcome(refusals.get(&index.to_string())),
        Err(failure) => failure.clone().into(),
    }
}

fn entry(message: Message) -> Option<IntakeEntry> {
    let attributes = message.attributes.unwrap_or_default();
    let number = |name| attributes.get(&name).and_then(|value| value.parse().ok());
    let sent_at = number(MessageSystemAttributeName::SentTimestamp);
    let (Some(id), Some(handle), Some(sent_at)) = (message.message_id, message.receipt_handle, sent_at)
    else {
        // The API reference promises all of them. It comes again after its visibility timeout.
        tracing::warn!("SQS delivered a message without an id, a receipt handle or a time; it is left alone");
        return None;
    };
    let receives = number(MessageSystemAttributeName::ApproximateReceiveCount);
    Some(IntakeEntry {
        id,
        ack: AckId(handle.into()),
        body: Bytes::from(message.body.unwrap_or_default()),
        sent_at: UnixMs(sent_at),
        receives: receives.and_then(|receives| u32::try_from(receives).ok()).unwrap_or(0),
    })
}

#[async_trait]
impl Intake for SqsIntake {
    async fn receive(&self, limit: usize, wait: Duration) -> Result<Vec<IntakeEntry>, StoreError> {
        let messages = self.calls.receive(&self.url, limit, wait, self.visibility).await?;
        Ok(messages.into_iter().filter_map(entry).collect())
    }

    fn visibility(&self) -> Duration {
        self.visibility
    }

    async fn extend(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        Ok(self.hide(acks, self.visibility).await)
    }

    async fn delete(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        let delete = |handles: Vec<String>| async move { self.calls.delete(&self.url, &handles).await };
        Ok(self.in_tens(acks, delete).await)
    }

    async fn release(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        Ok(self.hide(acks, Duration::ZERO).await)
    }

    async fn depth(&self) -> Result<QueueDepth, StoreError> {
        Ok(self.calls.depth(&self.url).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_actors::model::call::FailureKind;

    use crate::sqs::calls::Refusal;

    #[test]
    fn f48_what_an_answer_says_of_an_entry_is_taken_by_its_id() {
        let refusal = |sender_fault| Refusal { sender_fault, code: "Code".into(), why: "why".into() };
        let refusals = [("1".to_owned(), refusal(true)), ("10".to_owned(), refusal(false))];
        let answer = Ok(refusals.into_iter().collect());
        let outcomes: Vec<_> = [0, 1, 10].map(|index| outcome(&answer, index)).into();
        let why = || "why".to_owned();
        assert_eq!(outcomes, [ItemOutcome::Ok, ItemOutcome::Permanent(why()), ItemOutcome::Retryable(why())]);
    }

    #[test]
    fn f48_a_call_without_an_answer_leaves_its_entries_unknown() {
        let failed = |kind| Err(Failure::new(kind, "timeout"));
        assert_eq!(outcome(&failed(FailureKind::Unknown), 0), ItemOutcome::Unknown("timeout".into()));
        assert_eq!(outcome(&failed(FailureKind::Throttled), 0), ItemOutcome::Retryable("timeout".into()));
        assert_eq!(outcome(&failed(FailureKind::Denied), 0), ItemOutcome::Retryable("timeout".into()));
    }
}
