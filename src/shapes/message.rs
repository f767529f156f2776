use postrider_actors::{
    model::outcome::{Attempt, DeathCause},
    ports::console::{
        Fate, MessageReport,
        receipts::{AppliedReceipt, MessageRow},
    },
};
use serde::Serialize;
use utoipa::ToSchema;

use super::Time;

/// What became of a row, at one destination.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct Story {
    pub(crate) id: String,
    pub(crate) file: String,
    pub(crate) file_name: String,
    pub(crate) row: u64,
    #[serde(flatten)]
    pub(crate) fate: StoryFate,
}

/// Why a row is no message, or how it was delivered.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum StoryFate {
    Rejected(RejectedRow),
    Duplicate(DuplicateRow),
    Message(Box<MessageStory>),
}

/// A row that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct RejectedRow {
    /// `rejected`
    #[schema(pattern = "^rejected$")]
    pub(crate) state: &'static str,
    /// The line it starts on.
    pub(crate) line: u64,
    pub(crate) reason: String,
}

/// A row that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct DuplicateRow {
    /// `duplicate`
    #[schema(pattern = "^duplicate$")]
    pub(crate) state: &'static str,
}

/// A message and its attempts.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct MessageStory {
    #[schema(pattern = "^(accepted|retrying|unsent|cancelled|dead|sent|expired|failed|delivered)$")]
    pub(crate) state: &'static str,
    pub(crate) destination: String,
    /// `null` once its payload was archived.
    pub(crate) recipient: Option<String>,
    pub(crate) payload_archived: bool,
    /// When its row was accepted, or last redriven.
    pub(crate) accepted_at: Time,
    /// How often it was redriven.
    pub(crate) redriven: u32,
    pub(crate) rendered_anew_at: Option<Time>,
    /// Those that failed, the oldest first.
    pub(crate) attempts: Vec<FailedAttempt>,
    pub(crate) sent: Option<SentAttempt>,
    /// Why it was given up.
    pub(crate) cause: Option<&'static str>,
    pub(crate) next_attempt: Option<Time>,
    /// The destination's own id for it.
    pub(crate) provider_id: Option<String>,
    /// What the destination said of it last, if it failed: the first line of its answer, or a table's words.
    pub(crate) detail: Option<String>,
    pub(crate) receipt: Option<ReceiptStory>,
    /// Whether receipts say that it failed and that it arrived.
    pub(crate) conflict: Option<bool>,
}

/// An attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FailedAttempt {
    pub(crate) at: Time,
    pub(crate) status: Option<u16>,
    pub(crate) reason: &'static str,
}

/// The one that did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct SentAttempt {
    pub(crate) at: Time,
    pub(crate) status: u16,
}

/// What the greatest of a message's receipts says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct ReceiptStory {
    pub(crate) state: &'static str,
    pub(crate) at: Option<Time>,
    pub(crate) status: Option<String>,
    pub(crate) carrier: Option<String>,
    pub(crate) response: Option<String>,
    pub(crate) sent_at: Option<Time>,
    pub(crate) price: Option<String>,
}

impl Story {
    /// With what a ledger of rows says of it, if there is one.
    pub(crate) fn of(report: &MessageReport, row: Option<&MessageRow>) -> Self {
        let fate = match &report.fate {
            Fate::Rejected { line, reason } => {
                StoryFate::Rejected(RejectedRow { state: "rejected", line: *line, reason: reason.clone() })
            }
            Fate::Duplicate => StoryFate::Duplicate(DuplicateRow { state: "duplicate" }),
            Fate::Message(delivery) => StoryFate::Message(Box::new(MessageStory {
                state: delivery.state.merge(row.map_or(delivery.state, |row| row.state)).as_str(),
                destination: delivery.destination.clone(),
                recipient: delivery.recipient.clone(),
                payload_archived: delivery.recipient.is_none(),
                accepted_at: delivery.accepted_at.into(),
                redriven: delivery.drive,
                rendered_anew_at: delivery.rendered_at.map(Time),
                attempts: delivery.failed.iter().copied().map(FailedAttempt::from).collect(),
                sent: delivery.sent.map(|(status, at)| SentAttempt { at: at.into(), status }),
                cause: delivery.cause.map(DeathCause::as_str),
                next_attempt: delivery.not_before.map(Time),
                provider_id: row.and_then(|row| row.provider_id.clone()),
                detail: delivery.detail.clone().or_else(|| row.and_then(|row| row.detail.clone())),
                receipt: row.and_then(|row| row.receipt.as_ref()).map(ReceiptStory::from),
                conflict: row.map(|row| row.reported.is_conflict()),
            })),
        };
        Self {
            id: report.id.to_string(),
            file: report.id.file.to_string(),
            file_name: report.file_name.clone(),
            row: report.id.row,
            fate,
        }
    }
}

/// `None`: no answer came.
pub(super) fn answered(attempt: Attempt) -> Option<u16> {
    (attempt.status != 0).then_some(attempt.status)
}

impl From<Attempt> for FailedAttempt {
    fn from(attempt: Attempt) -> Self {
        Self { at: attempt.at.into(), status: answered(attempt), reason: attempt.reason.as_str() }
    }
}

impl From<&AppliedReceipt> for ReceiptStory {
    fn from(receipt: &AppliedReceipt) -> Self {
        let facts = &receipt.facts;
        let text = |text: Option<&str>| text.map(str::to_owned);
        Self {
            state: receipt.state.as_str(),
            at: receipt.at.map(Time),
            status: text(facts.status.as_deref()),
            carrier: text(facts.carrier.as_deref()),
            response: text(facts.response.as_deref()),
            sent_at: facts.sent_at.map(Time),
            price: facts.price.map(|price| price.to_string()),
        }
    }
}
