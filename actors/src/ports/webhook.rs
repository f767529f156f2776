use async_trait::async_trait;

use crate::model::{
    ids::{MessageId, RequestId},
    outcome::Outcome,
    time::UnixMs,
    trace::TraceParent,
};

/// One request: an attempt at one message, or at several in a JSON array.
#[derive(Clone, Copy)]
pub struct WebhookRequest<'a> {
    /// Sent as `webhook-id`.
    pub id: RequestId,
    /// The messages that it carries, for an answer that says something of each of them.
    pub messages: &'a [MessageId],
    /// Sent as `webhook-timestamp`, in whole seconds, fresh at each attempt.
    pub at: UnixMs,
    /// The body's content type.
    pub content_type: &'a str,
    /// The body; a message's is the same at every attempt (I4).
    pub body: &'a [u8],
    /// Sent as `traceparent`, if anybody collects traces.
    pub trace: Option<&'a TraceParent>,
}

impl<'a> WebhookRequest<'a> {
    /// With one message.
    pub fn of_one(message: &'a MessageId, at: UnixMs, content_type: &'a str, body: &'a [u8]) -> Self {
        let messages = std::slice::from_ref(message);
        Self { id: (*message).into(), messages, at, content_type, body, trace: None }
    }
}

/// What the receiver has said of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The outcome of the request as a whole. It holds for each of its messages unless `items` says more.
    pub outcome: Outcome,
    /// The receiver's own id for the message, if it is to be kept and was in the answer.
    pub provider_id: Option<Box<str>>,
    /// What the answer says of each message, in the order of the request; empty if it does not.
    pub items: Vec<ItemAnswer>,
    /// The first line of an answer that is not 2xx, for the operator: at most
    /// [`ANSWER_BYTES_MAX`](crate::model::standing::ANSWER_BYTES_MAX). It is never logged (I10).
    pub text: Option<Box<str>>,
}

/// What an answer says of one message among several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemAnswer {
    /// Its outcome.
    pub outcome: Outcome,
    /// The receiver's own id for it, if it is to be kept and was in the answer.
    pub provider_id: Option<Box<str>>,
}

impl From<Outcome> for Answer {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, provider_id: None, items: Vec::new(), text: None }
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
