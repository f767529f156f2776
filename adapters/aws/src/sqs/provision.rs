//! The queues themselves: created by `postrider migrate`, held against what is needed by `check-config --connect`
//! and at the start.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use aws_sdk_sqs::{Client, types::QueueAttributeName};
use postrider_actors::ports::{CallObserver, StoreError};
use postrider_settings::FIFO_SUFFIX;
use serde::Deserialize;
use serde_json::json;

use super::calls::Calls;
use crate::AwsSettings;

/// How long SQS keeps an entry that nobody deletes: the longest there is ("Amazon SQS message quotas").
const RETENTION: Duration = Duration::from_hours(14 * 24);

/// Receives after which SQS takes an entry away to the dead-letter queue: the most that it allows. The batch of such an
/// entry goes out again by another.
const MAX_RECEIVES: u32 = 1_000;

/// How Postrider's own queues come to be.
pub const MAKE: &str = "make it with `postrider migrate` or from config/aws";

/// What a queue is like, as far as it matters here.
#[derive(Clone, Debug, Default)]
pub struct QueueAttributes {
    /// Its ARN.
    pub arn: Option<String>,
    /// Whether it is a FIFO queue.
    pub fifo: bool,
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

impl QueueAttributes {
    /// What is not as expected.
    pub fn differences(&self, fifo: bool) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut differ = |attribute, must_be_fixed, what: String| {
            differences.push(Difference { attribute, what, must_be_fixed });
        };
        if self.fifo != fifo {
            let kind = |fifo| if fifo { "a FIFO queue" } else { "a standard queue" };
            let (found, wanted) = (kind(self.fifo), kind(fifo));
            differ("FifoQueue", true, format!("it is {found}, its name says {wanted}"));
        }
        if let Some(retention) = self.retention.filter(|retention| *retention < RETENTION) {
            let what = format!(
                "{} s instead of {} s: entries that wait for longer are sent again",
                retention.as_secs(),
                RETENTION.as_secs()
            );
            differ("MessageRetentionPeriod", false, what);
        }
        match &self.redrive {
            None => {
                let what = "no redrive policy: an entry that nobody can process is received again and again until it expires";
                differ("RedrivePolicy", false, what.into());
            }
            Some((_, receives)) if *receives < MAX_RECEIVES => {
                let what = format!(
                    "maxReceiveCount is {receives} instead of {MAX_RECEIVES}: entries received that often \
                     become dead letters, and are sent again"
                );
                differ("RedrivePolicy", false, what);
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
pub(super) async fn attributes(calls: &Calls, queue_url: &str) -> Result<QueueAttributes, StoreError> {
    let found = calls.attributes(queue_url, &[QueueAttributeName::All]).await;
    let found =
        found.map_err(|failure| failure.about(format_args!("GetQueueAttributes: queue {queue_url}")))?;
    Ok(read(&found))
}

fn read(found: &HashMap<QueueAttributeName, String>) -> QueueAttributes {
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
    QueueAttributes {
        arn: found.get(&Name::QueueArn).cloned(),
        fifo: found.get(&Name::FifoQueue).is_some_and(|value| value == "true"),
        retention: number(&Name::MessageRetentionPeriod).map(Duration::from_secs),
        redrive,
    }
}

/// Makes and checks queues.
pub struct Provisioner(Calls);

impl Provisioner {
    /// With this client.
    pub fn new(client: Client, aws: &AwsSettings, observer: Arc<dyn CallObserver>) -> Self {
        Self(Calls::new(client, aws, observer))
    }

    /// The URL of the queue `name`; `None` if it does not exist or this role may not see it.
    pub async fn find(&self, name: &str) -> Result<Option<String>, StoreError> {
        Ok(self.0.url(name).await?)
    }

    /// Reads a queue that is there.
    pub async fn read(&self, queue_url: &str) -> Result<QueueAttributes, StoreError> {
        attributes(&self.0, queue_url).await
    }

    /// Makes a queue that is not there: with `dead_letters`, an ARN, one whose entries go there in the end; without, one
    /// that takes those of any queue of this account and region.
    pub async fn make(&self, name: &str, dead_letters: Option<&str>) -> Result<String, StoreError> {
        use QueueAttributeName as Name;
        let mut request = self.0.client.create_queue().queue_name(name);
        request = request.attributes(Name::MessageRetentionPeriod, RETENTION.as_secs().to_string());
        if name.ends_with(FIFO_SUFFIX) {
            request = request.attributes(Name::FifoQueue, "true");
        }
        request = if let Some(arn) = dead_letters {
            let policy = json!({ "deadLetterTargetArn": arn, "maxReceiveCount": MAX_RECEIVES });
            request.attributes(Name::RedrivePolicy, policy.to_string())
        } else {
            request
                .attributes(Name::RedriveAllowPolicy, json!({ "redrivePermission": "allowAll" }).to_string())
        };
        let answer = self.0.watch("CreateQueue", 0, request.send(), |_| 0).await;
        let answer = answer.map_err(|failure| failure.about(format_args!("CreateQueue: queue {name}")))?;
        answer.queue_url.ok_or_else(|| StoreError::Unknown(format!("queue {name} was created without a URL")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitting() -> HashMap<QueueAttributeName, String> {
        use QueueAttributeName as Name;
        HashMap::from([
            (Name::MessageRetentionPeriod, "1209600".to_owned()),
            (Name::RedrivePolicy, r#"{"deadLetterTargetArn":"arn:x","maxReceiveCount":"1000"}"#.to_owned()),
        ])
    }

    #[test]
    fn a_queue_that_fits_has_no_differences_and_each_that_does_not_says_what_follows() {
        use QueueAttributeName as Name;
        assert_eq!(read(&fitting()).differences(false), []);
        let few = r#"{"deadLetterTargetArn":"a","maxReceiveCount":3}"#;
        let cases = [
            (Name::FifoQueue, Some("true"), "FifoQueue", true),
            (Name::MessageRetentionPeriod, Some("345600"), "MessageRetentionPeriod", false),
            (Name::RedrivePolicy, None, "RedrivePolicy", false),
            (Name::RedrivePolicy, Some(few), "RedrivePolicy", false),
        ];
        for (name, value, attribute, must_be_fixed) in cases {
            let mut found = fitting();
            match value {
                Some(value) => found.insert(name, value.to_owned()),
                None => found.remove(&name),
            };
            let differences = read(&found).differences(false);
            assert_eq!(differences.len(), 1, "{differences:?}");
            assert_eq!((differences[0].attribute, differences[0].must_be_fixed), (attribute, must_be_fixed));
        }
    }
}
