//! The calls to SQS, each made, timed and classified in one place. What several of them share: entries go in
//! tens, and every answer is by the entry's own id, never by position.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aws_sdk_sqs::{
    Client,
    error::{BuildError, ProvideErrorMetadata, SdkError},
    operation::receive_message::ReceiveMessageOutput,
    types::{
        BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
        ChangeMessageVisibilityBatchResultEntry, DeleteMessageBatchRequestEntry,
        DeleteMessageBatchResultEntry, Message, MessageAttributeValue, MessageSystemAttributeName,
        QueueAttributeName, SendMessageBatchRequestEntry, SendMessageBatchResultEntry,
    },
};
use aws_smithy_types::timeout::TimeoutConfig;
use postrider_actors::{
    flow::{Call, Service},
    model::call::{CallOutcome, Failure, FailureKind},
};

use crate::{ApiObserver, failure};

/// Entries per batch call ("Amazon SQS message quotas").
pub(crate) const ENTRIES_MAX: usize = 10;

/// The longest visibility timeout: 12 hours from the receive ("Amazon SQS message quotas"), less some seconds that
/// a call may take.
pub(crate) const VISIBILITY_MAX: Duration = Duration::from_secs(43_200 - 20);

/// The longest delay of a message ("Amazon SQS message quotas").
pub(crate) const DELAY_MAX: Duration = Duration::from_mins(15);

/// The message attribute that says why an entry is a dead letter.
pub(crate) const REASON_ATTRIBUTE: &str = "postrider-reason";

/// The client, and the service that it calls.
#[derive(Clone)]
pub(crate) struct Calls {
    pub(crate) client: Client,
    pub(crate) service: Service,
    /// For long polls: the others have the client's own.
    poll_timeouts: TimeoutConfig,
}

/// A message to send.
#[derive(Clone)]
pub(crate) struct Outgoing {
    /// Unique within a call: letters, digits, `-` and `_`, at most 80.
    pub(crate) id: String,
    pub(crate) body: Arc<str>,
    pub(crate) delay: Duration,
    /// `MessageGroupId` and `MessageDeduplicationId`, for a FIFO queue.
    pub(crate) fifo: Option<(String, String)>,
    /// `postrider-reason`, for a dead letter.
    pub(crate) reason: Option<String>,
}

impl Outgoing {
    /// What counts towards the limits: body, and names, types and values of attributes ("Amazon SQS message
    /// quotas").
    pub(crate) fn bytes(&self) -> usize {
        let reason =
            self.reason.as_ref().map_or(0, |why| REASON_ATTRIBUTE.len() + "String".len() + why.len());
        self.body.len() + reason
    }

    fn entry(&self) -> Result<SendMessageBatchRequestEntry, BuildError> {
        let mut entry = SendMessageBatchRequestEntry::builder().id(&self.id).message_body(&*self.body);
        match &self.fifo {
            Some((group, deduplication)) => {
                entry = entry.message_group_id(group).message_deduplication_id(deduplication);
            }
            None => entry = entry.delay_seconds(whole_seconds(self.delay.min(DELAY_MAX))),
        }
        if let Some(why) = &self.reason {
            let value = MessageAttributeValue::builder().data_type("String").string_value(why).build()?;
            entry = entry.message_attributes(REASON_ATTRIBUTE, value);
        }
        entry.build()
    }
}

/// Why one entry of an answered call was not taken.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    /// Ours to fix: repeating it won't help.
    pub(crate) sender_fault: bool,
    pub(crate) code: String,
    pub(crate) why: String,
}

impl Refusal {
    fn of(entry: &BatchResultErrorEntry) -> Self {
        let why = format!("{}: {}", entry.code(), entry.message().unwrap_or("no reason given"));
        Self { sender_fault: entry.sender_fault(), code: entry.code().to_owned(), why }
    }

    fn unanswered() -> Self {
        let why = "the answer does not speak of this entry".to_owned();
        Self { sender_fault: false, code: "Unanswered".to_owned(), why }
    }
}

/// Entries that were not taken, by id. Whatever is not in it was.
pub(crate) type Refusals = HashMap<String, Refusal>;

/// SQS counts in whole seconds; nothing may come before its time.
pub(crate) fn whole_seconds(time: Duration) -> i32 {
    i32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(i32::MAX)
}

impl Calls {
    pub(crate) fn new(client: Client, observer: Arc<dyn ApiObserver>, poll_timeouts: TimeoutConfig) -> Self {
        Self { client, service: Service::new("sqs", "SQS", observer), poll_timeouts }
    }

    /// `SendMessageBatch`, of up to ten.
    pub(crate) async fn send(&self, queue: &str, messages: &[Outgoing]) -> Result<Refusals, Failure> {
        let entries = messages
            .iter()
            .map(Outgoing::entry)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unbuilt(&error))?;
        let request = self.client.send_message_batch().queue_url(queue).set_entries(Some(entries));
        let answer =
            self.watch("SendMessageBatch", messages.len(), request.send(), |a| refused(a.failed())).await?;
        let taken: Vec<_> = answer.successful().iter().map(SendMessageBatchResultEntry::id).collect();
        let ids = messages.iter().map(|message| message.id.as_str());
        Ok(self.settle("SendMessageBatch", ids, &taken, answer.failed()))
    }

    /// `ReceiveMessage`, with a long poll of `wait`.
    pub(crate) async fn receive(
        &self,
        queue: &str,
        limit: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Message>, Failure> {
        use MessageSystemAttributeName as Attribute;
        let timeouts = aws_sdk_sqs::config::Builder::new().timeout_config(self.poll_timeouts.clone());
        let request = self
            .client
            .receive_message()
            .queue_url(queue)
            .max_number_of_messages(i32::try_from(limit.clamp(1, ENTRIES_MAX)).unwrap_or(1))
            .wait_time_seconds(whole_seconds(wait))
            .visibility_timeout(whole_seconds(visibility.min(VISIBILITY_MAX)))
            .message_system_attribute_names(Attribute::ApproximateReceiveCount)
            .message_system_attribute_names(Attribute::SentTimestamp)
            .message_system_attribute_names(Attribute::MessageGroupId)
            .customize()
            .config_override(timeouts);
        let answer = async { request.send().await.map_err(|error| failure(&error)) };
        let judge = |answer: &ReceiveMessageOutput| (CallOutcome::Ok, answer.messages().len());
        let answer = self.service.judged(Call::of("ReceiveMessage"), answer, judge).await?;
        Ok(answer.messages.unwrap_or_default())
    }

    /// `ChangeMessageVisibilityBatch`, of up to ten receipt handles: hidden for so long from now.
    pub(crate) async fn hide(
        &self,
        queue: &str,
        changes: &[(String, Duration)],
    ) -> Result<Refusals, Failure> {
        let entry = |(index, (handle, hidden)): (usize, &(String, Duration))| {
            ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(index.to_string())
                .receipt_handle(handle)
                .visibility_timeout(whole_seconds((*hidden).min(VISIBILITY_MAX)))
                .build()
        };
        let entries = changes
            .iter()
            .enumerate()
            .map(entry)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unbuilt(&error))?;
        let ids: Vec<_> = (0..changes.len()).map(|index| index.to_string()).collect();
        let request =
            self.client.change_message_visibility_batch().queue_url(queue).set_entries(Some(entries));
        let name = "ChangeMessageVisibilityBatch";
        let answer = self.watch(name, changes.len(), request.send(), |a| refused(a.failed())).await?;
        let taken: Vec<_> =
            answer.successful().iter().map(ChangeMessageVisibilityBatchResultEntry::id).collect();
        Ok(self.settle(name, ids.iter().map(String::as_str), &taken, answer.failed()))
    }

    /// `DeleteMessageBatch`, of up to ten receipt handles. Refusals are by index as text.
    pub(crate) async fn delete(&self, queue: &str, handles: &[String]) -> Result<Refusals, Failure> {
        let entry = |(index, handle): (usize, &String)| {
            DeleteMessageBatchRequestEntry::builder().id(index.to_string()).receipt_handle(handle).build()
        };
        let entries = handles
            .iter()
            .enumerate()
            .map(entry)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unbuilt(&error))?;
        let ids: Vec<_> = (0..handles.len()).map(|index| index.to_string()).collect();
        let request = self.client.delete_message_batch().queue_url(queue).set_entries(Some(entries));
        let name = "DeleteMessageBatch";
        let answer = self.watch(name, handles.len(), request.send(), |a| refused(a.failed())).await?;
        let taken: Vec<_> = answer.successful().iter().map(DeleteMessageBatchResultEntry::id).collect();
        Ok(self.settle(name, ids.iter().map(String::as_str), &taken, answer.failed()))
    }

    /// `GetQueueAttributes`.
    pub(crate) async fn attributes(
        &self,
        queue: &str,
        names: &[QueueAttributeName],
    ) -> Result<HashMap<QueueAttributeName, String>, Failure> {
        let request =
            self.client.get_queue_attributes().queue_url(queue).set_attribute_names(Some(names.to_vec()));
        let answer = self.watch("GetQueueAttributes", 0, request.send(), |_| 0).await?;
        Ok(answer.attributes.unwrap_or_default())
    }

    /// Makes a call; `refused` counts what of it was not taken.
    pub(crate) fn watch<T, E: ProvideErrorMetadata + std::error::Error + 'static>(
        &self,
        operation: &'static str,
        items: usize,
        call: impl Future<Output = Result<T, SdkError<E>>>,
        refused: impl Fn(&T) -> usize,
    ) -> impl Future<Output = Result<T, Failure>> {
        let answer = async { call.await.map_err(|error| failure(&error)) };
        let judge =
            move |answer: &T| (if refused(answer) > 0 { CallOutcome::Partial } else { CallOutcome::Ok }, 0);
        self.service.judged(Call::of(operation).with(items), answer, judge)
    }

    /// An entry that the answer does not speak of counts as refused: nothing is taken on trust.
    fn settle<'a>(
        &self,
        operation: &'static str,
        ids: impl Iterator<Item = &'a str>,
        taken: &[&str],
        failed: &[BatchResultErrorEntry],
    ) -> Refusals {
        let mut refusals = Refusals::new();
        for id in ids.filter(|id| !taken.contains(id)) {
            let refusal =
                failed.iter().find(|entry| entry.id() == id).map_or_else(Refusal::unanswered, Refusal::of);
            self.service.rejected(operation, &refusal.code, 1);
            refusals.insert(id.to_owned(), refusal);
        }
        refusals
    }
}

fn refused(failed: &[BatchResultErrorEntry]) -> usize {
    failed.len()
}

fn unbuilt(error: &BuildError) -> Failure {
    Failure::new(FailureKind::Invalid, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_rounded_up_so_that_nothing_comes_too_early() {
        for (ms, seconds) in [(0, 0), (1, 1), (1_000, 1), (1_001, 2), (899_999, 900)] {
            assert_eq!(whole_seconds(Duration::from_millis(ms)), seconds);
        }
    }

    #[test]
    fn an_attribute_counts_with_name_type_and_value() {
        let plain =
            Outgoing { id: "1".into(), body: "body".into(), delay: Duration::ZERO, fifo: None, reason: None };
        assert_eq!(plain.bytes(), 4);
        let dead = Outgoing { reason: Some("why".into()), ..plain };
        assert_eq!(dead.bytes(), 4 + 16 + 6 + 3);
    }
}
