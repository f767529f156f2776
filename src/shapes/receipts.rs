use postrider_actors::{
    model::receipt::ReceiptKey,
    ports::console::receipts::{self as console, GAP_AGES},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::Time;

/// The state of a source of receipts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) destination: String,
    /// How far it was read; `null` if it keeps no cursor.
    pub(crate) cursor: Option<String>,
    /// When receipts last came from it.
    pub(crate) receipts_at: Option<Time>,
    pub(crate) cursor_at: Option<Time>,
    /// Receipts in the inbox.
    pub(crate) waiting: u64,
    /// Receipts that wait for their message.
    pub(crate) parked: u64,
}

impl From<&console::SourceRow> for Source {
    fn from(source: &console::SourceRow) -> Self {
        Self {
            name: source.name.to_string(),
            destination: source.destination.to_string(),
            cursor: source.cursor.as_ref().map(|cursor| cursor.0.clone()),
            receipts_at: source.receipts_at.map(Time),
            cursor_at: source.cursor_at.map(Time),
            waiting: source.waiting,
            parked: source.parked,
        }
    }
}

/// The number of messages in one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct StateCount {
    pub(crate) destination: String,
    pub(crate) state: &'static str,
    pub(crate) messages: u64,
}

impl From<&console::StateCount> for StateCount {
    fn from(count: &console::StateCount) -> Self {
        let console::StateCount { destination, state, messages } = count;
        Self { destination: destination.to_string(), state: state.as_str(), messages: *messages }
    }
}

/// Messages of one destination that were sent and have had no final receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Gaps {
    pub(crate) destination: String,
    pub(crate) ages: Vec<GapAge>,
}

/// How many of them are of one age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct GapAge {
    /// Older than this, and younger than the next.
    pub(crate) from_s: u64,
    pub(crate) messages: u64,
}

impl Gaps {
    /// By the classes of [`GAP_AGES`].
    pub(crate) fn ages(ages: &[u64; GAP_AGES.len()]) -> Vec<GapAge> {
        let ages = GAP_AGES.iter().zip(ages);
        ages.map(|(from, messages)| GapAge { from_s: from.as_secs(), messages: *messages }).collect()
    }
}

/// A receipt that has no message (yet).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Held {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// The message that it names.
    pub(crate) names: String,
    pub(crate) state: &'static str,
    pub(crate) since: Time,
}

impl From<&console::HeldReceipt> for Held {
    fn from(receipt: &console::HeldReceipt) -> Self {
        Self {
            source: receipt.source.to_string(),
            destination: receipt.destination.to_string(),
            names: key_text(&receipt.key),
            state: receipt.state.as_str(),
            since: receipt.since.into(),
        }
    }
}

/// What a receipt names, as text.
pub(crate) fn key_text(key: &ReceiptKey) -> String {
    match key {
        ReceiptKey::Message(id) => id.to_string(),
        ReceiptKey::Provider(id) => id.to_string(),
    }
}

/// A receipt that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Rejected {
    pub(crate) source: String,
    /// Where it stood there.
    pub(crate) place: String,
    pub(crate) reason: String,
    pub(crate) at: Time,
    /// What is kept of it.
    pub(crate) text: Option<String>,
    pub(crate) is_whole: bool,
}

impl From<&console::RejectedReceipt> for Rejected {
    fn from(reject: &console::RejectedReceipt) -> Self {
        let text = &reject.text.text;
        Self {
            source: reject.source.to_string(),
            place: reject.place.clone(),
            reason: reject.reason.clone(),
            at: reject.at.into(),
            text: (!text.is_empty()).then(|| text.to_string()),
            is_whole: reject.text.is_whole,
        }
    }
}
