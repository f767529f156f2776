use async_trait::async_trait;

use crate::model::{ids::MessageId, outcome::Outcome, time::UnixMs};

/// One attempt of one message.
#[derive(Clone, Copy)]
pub struct WebhookRequest<'a> {
    /// Sent as `webhook-id`.
    pub id: MessageId,
    /// Sent as `webhook-timestamp`, in whole seconds, fresh at each attempt.
    pub at: UnixMs,
    /// The body's content type.
    pub content_type: &'a str,
    /// The body, the same at every attempt (I4).
    pub body: &'a [u8],
}

/// The outcome of an attempt, and the receiver's own id for the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The outcome.
    pub outcome: Outcome,
    /// The receiver's own id for the message, if it is to be kept and was in the answer.
    pub provider_id: Option<Box<str>>,
}

impl From<Outcome> for Answer {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, provider_id: None }
    }
}

/// One destination's receiver. It applies the destination's timeout and limits on answers, signs,
/// classifies the answer by the HTTP policy (design §10) and never logs a body or a recipient.
#[async_trait]
pub trait Webhook: Send + Sync {
    /// Makes one attempt. It ends within the destination's total timeout. Cancelling it leaves
    /// unknown whether the request arrived.
    async fn send(&self, request: WebhookRequest<'_>) -> Answer;
}
