//! The queues themselves: created by `postrider migrate`, held against what is needed by `check-config --connect`
//! and at the start.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use aws_sdk_sqs::{Client, error::ProvideErrorMetadata as _, types::QueueAttributeName};
use postrider_actors::ports::StoreError;
use serde::Deserialize;
use serde_json::json;

use super::calls::{Calls, whole_seconds};
use crate::{ApiObserver, AwsSettings};

/// How long SQS keeps an entry that nobody deletes: the longest there is ("Amazon SQS message quotas").
const RETENTION: Duration = Duration::from_hours(14 * 24);

/// Receives below which the redrive policy would take entries away that nothing is wrong with: those of a slow
/// or paused destination are received and given back many times.
const RECEIVES_MIN: u32 = 100;

/// The queues of one installation.
#[derive(Clone, Debug)]
pub struct QueueNames {
    /// The queue's name; it ends in `.fifo` for a FIFO queue.
    pub queue: String,
    /// Its dead-letter queue, of the same kind ("Using dead-letter queues in Amazon SQS").
    pub dead_letters: String,
}

/// What a queue is to be like.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Whether it is a FIFO queue.
    pub fifo: bool,
    /// The visibility timeout: the duration of a lease.
    pub visibility: Duration,
    /// Bytes per message.
    pub max_bytes: usize,
    /// Receives after which the redrive policy takes an entry away.
    pub max_receives: u32,
}

/// What a queue is like, as far as it matters here.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its ARN.
    pub arn: Option<String>,
    /// Whether it is a FIFO queue.
    pub fifo: bool,
    /// Bytes per message.
    pub maximum_message_bytes: Option<usize>,
    /// Its visibility timeout.
    pub visibility: Option<Duration>,
    /// For how long it keeps entries.
    pub retention: Option<Duration>,
    /// The ARN of its dead-letter queue, and the receives that are allowed.
    pub redrive: Option<(String, u32)>,
}

/// Something that is not as expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The queue attribute, as SQS names it.
    pub attribute: &'static str,
    /// What was found, what was expected, and what follows from it.
    pub what: String,
    /// Whether it has to be fixed. Otherwise Postrider copes, at a price.
    pub must_be_fixed: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.attribute, self.what)
    }
}

impl Found {
    /// What is not as expected.
    pub fn differences(&self, expected: &Expected) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut differ = |attribute, must_be_fixed, what: String| {
            differences.push(Difference { attribute, what, must_be_fixed });
        };
        if self.fifo != expected.fifo {
            let kind = |fifo| if fifo { "a FIFO queue" } else { "a standard queue" };
            let (found, wanted) = (kind(self.fifo), kind(expected.fifo));
            differ("FifoQueue", true, format!("it is {found}, its name says {wanted}"));
        }
        if let Some(bytes) = self.maximum_message_bytes.filter(|bytes| *bytes < expected.max_bytes) {
            let wanted = expected.max_bytes;
            let what = format!("{bytes} instead of {wanted}: larger batches are loaded from the outbox");
            differ("MaximumMessageSize", false, what);
        }
        if self.visibility.is_some_and(|found| found != expected.visibility) {
            let (found, wanted) = (self.visibility.unwrap_or_default(), expected.visibility);
            let what = format!("{found:?} instead of {wanted:?}: Postrider sets its own at each receive");
            differ("VisibilityTimeout", false, what);
        }
        if let Some(retention) = self.retention.filter(|retention| *retention < RETENTION) {
            let what = format!(
                "{} s instead of {} s: what is held for longer (a paused or disabled destination) would be lost from \
                 the queue; set it to 14 days",
                retention.as_secs(),
                RETENTION.as_secs()
            );
            differ("MessageRetentionPeriod", true, what);
        }
        match &self.redrive {
            None => {
                let what =
                    "there is none: entries that can't be read stay in the queue; name a dead-letter queue";
                differ("RedrivePolicy", true, what.into());
            }
            Some((_, receives)) if *receives < RECEIVES_MIN.min(expected.max_receives) => {
                let what = format!(
                    "maxReceiveCount is {receives}: entries of slow or paused destinations, which are received \
                     often, would become dead letters; set it to {}",
                    expected.max_receives
                );
                differ("RedrivePolicy", true, what);
            }
            Some((_, receives)) if *receives != expected.max_receives => {
                let what = format!("maxReceiveCount is {receives} instead of {}", expected.max_receives);
                differ("RedrivePolicy", *receives < expected.max_receives, what);
            }
            Some(_) => {}
        }
        differences
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RedrivePolicy {
    dead_letter_target_arn: String,
    max_receive_count: Count,
}

/// SQS answers with a number, its clients are known to set a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Count {
    Number(u32),
    Text(String),
}

/// Reads what matters of a queue.
pub(super) async fn attributes(calls: &Calls, queue_url: &str) -> Result<Found, StoreError> {
    let found = calls.attributes(queue_url, &[QueueAttributeName::All]).await;
    let found = found.map_err(|failure| failure.about(format_args!("queue {queue_url}")))?;
    Ok(read(&found))
}

fn read(found: &HashMap<QueueAttributeName, String>) -> Found {
    use QueueAttributeName as Name;
    let number = |name: &Name| found.get(name).and_then(|value| value.parse::<u64>().ok());
    let redrive = found.get(&Name::RedrivePolicy).and_then(|text| {
        let policy: RedrivePolicy = serde_json::from_str(text).ok()?;
        let receives = match policy.max_receive_count {
            Count::Number(count) => count,
            Count::Text(text) => text.parse().ok()?,
        };
        Some((policy.dead_letter_target_arn, receives))
    });
    Found {
        arn: found.get(&Name::QueueArn).cloned(),
        fifo: found.get(&Name::FifoQueue).is_some_and(|value| value == "true"),
        maximum_message_bytes: number(&Name::MaximumMessageSize)
            .and_then(|bytes| usize::try_from(bytes).ok()),
        visibility: number(&Name::VisibilityTimeout).map(Duration::from_secs),
        retention: number(&Name::MessageRetentionPeriod).map(Duration::from_secs),
        redrive,
    }
}

/// The queues as they stand now.
#[derive(Clone, Debug)]
pub struct Provisioned {
    /// The queue's URL.
    pub queue_url: String,
    /// The dead-letter queue's URL.
    pub dead_letter_url: String,
    /// Which of them were created just now.
    pub created: Vec<String>,
    /// What is not as expected with the queue.
    pub differences: Vec<Difference>,
}

/// Makes and checks queues.
pub struct Provisioner(Calls);

impl Provisioner {
    /// With this client.
    pub fn new(client: Client, aws: &AwsSettings, observer: Arc<dyn ApiObserver>) -> Self {
        Self(Calls::new(client, observer, aws.timeouts(Duration::ZERO)))
    }

    /// The URL of the queue `name`; `None` if there is none, or none that we may see.
    pub async fn find(&self, name: &str) -> Result<Option<String>, StoreError> {
        let request = async {
            match self.0.client.get_queue_url().queue_name(name).send().await {
                Ok(answer) => Ok(answer.queue_url),
                Err(error) if error.code().is_some_and(is_unknown_queue) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let found = self.0.watch("GetQueueUrl", 0, request, |_| 0).await;
        Ok(found.map_err(|failure| failure.about(format_args!("queue {name}")))?)
    }

    /// Reads a queue and says what is not as expected.
    pub async fn check(&self, queue_url: &str, expected: &Expected) -> Result<Vec<Difference>, StoreError> {
        Ok(attributes(&self.0, queue_url).await?.differences(expected))
    }

    /// Creates what is missing: the dead-letter queue, and the queue with a redrive policy to it. What is there is
    /// left as it is and checked.
    pub async fn provision(
        &self,
        names: &QueueNames,
        expected: &Expected,
    ) -> Result<Provisioned, StoreError> {
        for name in [&names.queue, &names.dead_letters] {
            if is_fifo(name) != expected.fifo {
                let why = format!("queue name {name:?}: names of FIFO queues end in .fifo, and no others do");
                return Err(StoreError::Permanent(why));
            }
        }
        let mut created = Vec::new();
        let dead_letter_url = if let Some(url) = self.find(&names.dead_letters).await? {
            url
        } else {
            created.push(names.dead_letters.clone());
            self.create(&names.dead_letters, expected, None).await?
        };
        let queue_url = if let Some(url) = self.find(&names.queue).await? {
            url
        } else {
            let dead_letters = attributes(&self.0, &dead_letter_url).await?;
            let arn = dead_letters.arn.ok_or_else(|| {
                StoreError::Retryable(format!("queue {dead_letter_url} did not say its ARN"))
            })?;
            created.push(names.queue.clone());
            self.create(&names.queue, expected, Some(&arn)).await?
        };
        let differences = self.check(&queue_url, expected).await?;
        Ok(Provisioned { queue_url, dead_letter_url, created, differences })
    }

    async fn create(
        &self,
        name: &str,
        expected: &Expected,
        dead_letters: Option<&str>,
    ) -> Result<String, StoreError> {
        use QueueAttributeName as Name;
        let mut request = self
            .0
            .client
            .create_queue()
            .queue_name(name)
            .attributes(Name::VisibilityTimeout, whole_seconds(expected.visibility).to_string())
            .attributes(Name::MessageRetentionPeriod, RETENTION.as_secs().to_string())
            .attributes(Name::MaximumMessageSize, expected.max_bytes.to_string());
        if expected.fifo {
            request = request.attributes(Name::FifoQueue, "true");
        }
        if let Some(arn) = dead_letters {
            let policy = json!({ "deadLetterTargetArn": arn, "maxReceiveCount": expected.max_receives });
            request = request.attributes(Name::RedrivePolicy, policy.to_string());
        }
        let answer = self.0.watch("CreateQueue", 0, request.send(), |_| 0).await;
        let answer = answer.map_err(|failure| failure.about(format_args!("queue {name}")))?;
        answer.queue_url.ok_or_else(|| StoreError::Unknown(format!("queue {name} was created without a URL")))
    }
}

/// Whether a queue of this name, or at this URL, is a FIFO queue: their names end so, and no others do
/// (`CreateQueue` in the Amazon SQS API Reference).
pub fn is_fifo(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| end == "fifo")
}

fn is_unknown_queue(code: &str) -> bool {
    code.ends_with("QueueDoesNotExist") || code.ends_with("NonExistentQueue")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected() -> Expected {
        Expected {
            fifo: false,
            visibility: Duration::from_mins(1),
            max_bytes: 1_048_576,
            max_receives: 1_000,
        }
    }

    fn fitting() -> HashMap<QueueAttributeName, String> {
        use QueueAttributeName as Name;
        HashMap::from([
            (Name::VisibilityTimeout, "60".to_owned()),
            (Name::MaximumMessageSize, "1048576".to_owned()),
            (Name::MessageRetentionPeriod, "1209600".to_owned()),
            (Name::RedrivePolicy, r#"{"deadLetterTargetArn":"arn:x","maxReceiveCount":"1000"}"#.to_owned()),
        ])
    }

    #[test]
    fn a_queue_that_fits_has_no_differences_and_each_that_does_not_says_what_follows() {
        use QueueAttributeName as Name;
        assert_eq!(read(&fitting()).differences(&expected()), []);
        let cases = [
            (Name::FifoQueue, Some("true"), "FifoQueue", true),
            (Name::MaximumMessageSize, Some("262144"), "MaximumMessageSize", false),
            (Name::VisibilityTimeout, Some("30"), "VisibilityTimeout", false),
            (Name::MessageRetentionPeriod, Some("345600"), "MessageRetentionPeriod", true),
            (Name::RedrivePolicy, None, "RedrivePolicy", true),
            (
                Name::RedrivePolicy,
                Some(r#"{"deadLetterTargetArn":"a","maxReceiveCount":3}"#),
                "RedrivePolicy",
                true,
            ),
            (
                Name::RedrivePolicy,
                Some(r#"{"deadLetterTargetArn":"a","maxReceiveCount":2000}"#),
                "RedrivePolicy",
                false,
            ),
        ];
        for (name, value, attribute, must_be_fixed) in cases {
            let mut found = fitting();
            match value {
                Some(value) => found.insert(name, value.to_owned()),
                None => found.remove(&name),
            };
            let differences = read(&found).differences(&expected());
            assert_eq!(differences.len(), 1, "{differences:?}");
            assert_eq!((differences[0].attribute, differences[0].must_be_fixed), (attribute, must_be_fixed));
        }
    }
}
