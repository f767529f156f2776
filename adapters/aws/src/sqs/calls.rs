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
    ports::{CallObserver, ItemOutcome, QueueDepth},
};

use crate::{AwsSettings, failure};

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
    /// The longest poll …
    poll_max: Duration,
    /// … and the timeouts of one: other calls have the client's own.
    poll_timeouts: TimeoutConfig,
}

/// A message to send.
#[derive(Clone)]
pub(crate) struct Sending {
    /// Unique within a call: letters, digits, `-` and `_`, at most 80.
    pub(crate) id: String,
    pub(crate) body: Arc<str>,
    pub(crate) delay: Duration,
    /// `MessageGroupId` and `MessageDeduplicationId`, for a FIFO queue.
    pub(crate) fifo: Option<(String, String)>,
    /// `postrider-reason`, for a dead letter.
    pub(crate) reason: Option<String>,
}

impl Sending {
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

/// What an answer says of one entry.
pub(crate) fn outcome(refusal: Option<&Refusal>) -> ItemOutcome {
    match refusal {
        None => ItemOutcome::Ok,
        Some(refusal) if refusal.sender_fault => ItemOutcome::Permanent(refusal.why.clone()),
        Some(refusal) => ItemOutcome::Retryable(refusal.why.clone()),
    }
}

/// SQS counts in whole seconds; nothing may come before its time.
pub(crate) fn whole_seconds(time: Duration) -> i32 {
    i32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(i32::MAX)
}

impl Calls {
    /// `client` was made with `aws`.
    pub(crate) fn new(client: Client, aws: &AwsSettings, observer: Arc<dyn CallObserver>) -> Self {
        let service = Service::new("sqs", "SQS", observer);
        Self { client, service, poll_max: aws.poll_max, poll_timeouts: aws.timeouts(aws.poll_max) }
    }

    /// `SendMessageBatch`, of up to ten.
    pub(crate) async fn send(&self, queue: &str, messages: &[Sending]) -> Result<Refusals, Failure> {
        let entries = messages
            .iter()
            .map(Sending::entry)
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
            .wait_time_seconds(whole_seconds(wait.min(self.poll_max)))
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

    /// How many messages a queue holds.
    pub(crate) async fn depth(&self, queue: &str) -> Result<QueueDepth, Failure> {
        use QueueAttributeName as Name;
        let names = [
            Name::ApproximateNumberOfMessages,
            Name::ApproximateNumberOfMessagesNotVisible,
            Name::ApproximateNumberOfMessagesDelayed,
        ];
        let counts = self.attributes(queue, &names).await?;
        let count = |name: &Name| {
            let count = counts.get(name).and_then(|count| count.parse().ok());
            count.ok_or_else(|| {
                Failure::new(FailureKind::Unknown, format!("SQS did not say {}", name.as_str()))
            })
        };
        Ok(QueueDepth {
            visible: count(&names[0])?,
            in_flight: count(&names[1])?,
            delayed: count(&names[2])?,
        })
    }

    /// The URL of the queue `name`; `None` if it does not exist or this role may not see it.
    pub(crate) async fn url(&self, name: &str) -> Result<Option<String>, Failure> {
        let request = async {
            match self.client.get_queue_url().queue_name(name).send().await {
                Ok(answer) => Ok(answer.queue_url),
                Err(error) if error.code().is_some_and(is_unknown_queue) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let found = self.watch("GetQueueUrl", 0, request, |_| 0).await;
        found.map_err(|failure| failure.about(format_args!("GetQueueUrl: queue {name}")))
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

/// Whether an error code says that the queue does not exist.
pub(super) fn is_unknown_queue(code: &str) -> bool {
    code.ends_with("QueueDoesNotExist") || code.ends_with("NonExistentQueue")
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
}
