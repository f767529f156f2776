//! Which field of a receipt says what, and what the provider's words mean.

use std::{collections::BTreeMap, fmt};

/// How many fields a receipt has.
pub(super) const FIELDS: usize = 9;

/// The most keys that a field's path may have.
pub const PATH_KEYS_MAX: usize = 8;

/// Where a field is: in an object, the key of this name, or else nested keys joined by dots; in a CSV file, the
/// column of this name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldPath {
    pub(super) text: String,
    pub(super) keys: Vec<String>,
}

/// Why `event_id` may be nothing else.
pub const SAME_PATH: &str = "map the id that the provider gives each receipt, or leave event_id out: receipts with \
                             the same text are the same then";

/// A mapping that can't work.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MappingError {
    /// A path leads nowhere.
    #[error("`{0}` is not a field: use a key, or up to {PATH_KEYS_MAX} keys joined by dots")]
    Path(String),
    /// Nothing would say which message a receipt is about.
    #[error("a receipt must name its message: map `message_id` or `provider_id`")]
    NoId,
    /// What is named does not tell the receipts of one message apart.
    #[error("`event_id` and `{1}` are both `{0}`: {SAME_PATH}")]
    SamePath(String, &'static str),
    /// A message could never have a final receipt.
    #[error("no status means `delivered` or `failed`: a receipt could say nothing")]
    NoFinalStatus,
}

impl FieldPath {
    /// Reads `key` or `key.key`.
    pub fn parse(text: &str) -> Result<Self, MappingError> {
        let keys: Vec<_> = text.split('.').map(str::to_owned).collect();
        if keys.len() > PATH_KEYS_MAX || keys.iter().any(String::is_empty) || text.contains('\0') {
            return Err(MappingError::Path(text.chars().take(80).collect()));
        }
        Ok(Self { text: text.to_owned(), keys })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a provider's word for a status means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusMeaning {
    /// It is on its way: nothing changes but the facts.
    Sent,
    /// It did not arrive and will not.
    Failed,
    /// It arrived.
    Delivered,
    /// The receipt is of no interest.
    Ignored,
}

/// What becomes of a receipt whose status is not in the mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownStatus {
    /// It is rejected, so that the operator sees it.
    #[default]
    Reject,
    /// It is an interim report.
    Sent,
}

/// Which field of a receipt says what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptMapping {
    /// Our id, `msg_<file>_<row>`. It counts if both are there.
    pub message_id: Option<FieldPath>,
    /// The id that the destination answered with.
    pub provider_id: Option<FieldPath>,
    /// The receipt's own id. Without one the same text is the same receipt.
    pub event_id: Option<FieldPath>,
    /// The provider's word for the state.
    pub status: FieldPath,
    /// When it happened.
    pub time: Option<FieldPath>,
    /// Who carried the message.
    pub carrier: Option<FieldPath>,
    /// What was answered on its way.
    pub response: Option<FieldPath>,
    /// When it was sent.
    pub sent_at: Option<FieldPath>,
    /// What it cost: decimal, exact to eight decimals.
    pub price: Option<FieldPath>,
    /// What the provider's words mean; matching is case-sensitive.
    pub statuses: BTreeMap<String, StatusMeaning>,
    /// What any other word means.
    pub otherwise: UnknownStatus,
}

impl ReceiptMapping {
    /// Refuses what can't work.
    pub fn check(&self) -> Result<(), MappingError> {
        if self.message_id.is_none() && self.provider_id.is_none() {
            return Err(MappingError::NoId);
        }
        if let Some((path, field)) =
            self.event_id.as_ref().and_then(|path| Some((path, self.field_of(path)?)))
        {
            return Err(MappingError::SamePath(path.text.clone(), field));
        }
        let is_final =
            |meaning: &StatusMeaning| matches!(meaning, StatusMeaning::Delivered | StatusMeaning::Failed);
        if self.statuses.values().any(is_final) { Ok(()) } else { Err(MappingError::NoFinalStatus) }
    }

    /// The field beside `event_id` that is read from `path`.
    pub fn field_of(&self, path: &FieldPath) -> Option<&'static str> {
        let fields = [
            ("message_id", self.message_id.as_ref()),
            ("provider_id", self.provider_id.as_ref()),
            ("status", Some(&self.status)),
            ("at", self.time.as_ref()),
            ("carrier", self.carrier.as_ref()),
            ("response", self.response.as_ref()),
            ("sent_at", self.sent_at.as_ref()),
            ("price", self.price.as_ref()),
        ];
        fields.into_iter().find(|(_, other)| *other == Some(path)).map(|(field, _)| field)
    }

    /// In the order of the fields' places.
    pub(super) fn paths(&self) -> [Option<&FieldPath>; FIELDS] {
        [
            self.message_id.as_ref(),
            self.provider_id.as_ref(),
            self.event_id.as_ref(),
            Some(&self.status),
            self.time.as_ref(),
            self.carrier.as_ref(),
            self.response.as_ref(),
            self.sent_at.as_ref(),
            self.price.as_ref(),
        ]
    }
}
