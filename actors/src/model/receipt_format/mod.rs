//! How the receipts of a source are read: which field says what, and what the provider's words mean.
//!
//! Every receipt is judged by itself (F52): what is wrong with one is said with the field, what was found
//! and what is expected, and the others are taken. A field that is missing, empty or `null` is `None`
//! (S0.3). Ids are taken as they stand; what does not fit is refused, for half an id names another message.
//! Words and responses are only kept for people: they are cut to their bounds.

mod body;
mod fields;
mod object;
mod rows;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, sync::Arc};

pub use body::{BodyError, notification};
pub use rows::{ReceiptFileError, ReceiptFileFormat, ReceiptRows};

use super::{
    receipt::{EventId, Receipt, ReceiptReject},
    state::MessageState,
};
use fields::{FIELDS, Fields};

/// The most keys that a field's path may have.
pub const PATH_KEYS_MAX: usize = 8;

/// Where a field stands: in an object under the key of this name, or, if there is none, under several keys,
/// one inside the other, with dots between them; in a CSV file in the column of this name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldPath {
    text: String,
    keys: Vec<String>,
}

/// A mapping that can't work.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MappingError {
    /// A path leads nowhere.
    #[error("`{0}` is no field: use a key, or up to {PATH_KEYS_MAX} keys with dots between them")]
    Path(String),
    /// Nothing would say which message a receipt is about.
    #[error("a receipt must name its message: map `message_id` or `provider_id`")]
    NoId,
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
    /// It is rejected, so that a person hears of it.
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
    /// What the provider's words mean. As they are written, upper and lower case told apart.
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
        let is_final =
            |meaning: &StatusMeaning| matches!(meaning, StatusMeaning::Delivered | StatusMeaning::Failed);
        if self.statuses.values().any(is_final) { Ok(()) } else { Err(MappingError::NoFinalStatus) }
    }

    /// In the order of [`fields`]' places.
    fn paths(&self) -> [Option<&FieldPath>; FIELDS] {
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

    /// The state that a word means; `None` for one that is of no interest.
    fn state(&self, word: &str) -> Result<Option<MessageState>, String> {
        Ok(Some(match self.statuses.get(word) {
            Some(StatusMeaning::Sent) => MessageState::Sent,
            Some(StatusMeaning::Failed) => MessageState::Failed,
            Some(StatusMeaning::Delivered) => MessageState::Delivered,
            Some(StatusMeaning::Ignored) => return Ok(None),
            None if self.otherwise == UnknownStatus::Sent => MessageState::Sent,
            None => {
                let found = fields::quoted(word);
                return Err(format!(
                    "`{}` is {found}, which the source's `statuses` do not have",
                    self.status
                ));
            }
        }))
    }
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadReceipts {
    /// Receipts to be taken.
    pub receipts: Vec<Receipt>,
    /// What could not be read.
    pub rejects: Vec<ReceiptReject>,
    /// How many had a status that is of no interest.
    pub ignored: u64,
}

impl ReadReceipts {
    /// How many there were.
    pub fn len(&self) -> usize {
        self.receipts.len() + self.rejects.len() + self.ignored as usize
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How the receipts of one source are read.
#[derive(Clone, Debug)]
pub struct ReceiptFormat {
    source: Arc<str>,
    mapping: ReceiptMapping,
}

impl ReceiptFormat {
    /// For the source of this name. The mapping is checked.
    pub fn new(source: Arc<str>, mapping: ReceiptMapping) -> Result<Self, MappingError> {
        mapping.check()?;
        Ok(Self { source, mapping })
    }

    /// The source's name.
    pub fn source(&self) -> &Arc<str> {
        &self.source
    }

    /// Reads one JSON object; `None` if its status is of no interest. `event` is the receipt's identity if
    /// something around it gives one; the mapping's `event_id` comes first. The error says what is wrong
    /// with the receipt and what is expected.
    pub fn read_object(&self, text: &[u8], event: Option<EventId>) -> Result<Option<Receipt>, String> {
        let fields = object::find(text, &self.mapping.paths())?;
        self.read(&fields, text, event)
    }

    /// Reads one JSON object into `read`. `place` says where it stood.
    pub fn read_into(
        &self,
        text: &[u8],
        event: Option<EventId>,
        place: impl FnOnce() -> String,
        read: &mut ReadReceipts,
    ) {
        let receipt = self.read_object(text, event);
        self.put(receipt, text, place, read);
    }

    /// What becomes of text that is no receipt at all.
    pub fn reject(&self, text: &[u8], place: String, reason: String) -> ReceiptReject {
        ReceiptReject { event: EventId::of_text(&self.source, text), place, reason }
    }

    fn put(
        &self,
        receipt: Result<Option<Receipt>, String>,
        text: &[u8],
        place: impl FnOnce() -> String,
        read: &mut ReadReceipts,
    ) {
        match receipt {
            Ok(Some(receipt)) => read.receipts.push(receipt),
            Ok(None) => read.ignored += 1,
            Err(reason) => read.rejects.push(self.reject(text, place(), reason)),
        }
    }

    fn read(
        &self,
        fields: &Fields<'_>,
        text: &[u8],
        event: Option<EventId>,
    ) -> Result<Option<Receipt>, String> {
        let identity = |id: Option<&str>| match (id, event) {
            (Some(id), _) => EventId::named(&self.source, id),
            (None, Some(event)) => event,
            (None, None) => EventId::of_text(&self.source, text),
        };
        fields::receipt(fields, &self.mapping, identity)
    }
}
