//! How the receipts of a source are read: which field says what, and what the provider's words mean.
//!
//! Every receipt is judged by itself (F52): what is wrong with one is said with the field, what was found
//! and what is expected, and the others are taken. A field that is missing, empty or `null` is `None`
//! (S0.3). Ids are taken unchanged; one that does not fit is refused, because half an id names another message.
//! Words and responses are only kept for people: they are cut to their bounds.

mod body;
mod fields;
mod mapping;
mod object;
mod rows;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use body::{BodyError, notification};
pub use mapping::{
    FieldPath, MappingError, PATH_KEYS_MAX, ReceiptMapping, SAME_PATH, StatusMeaning, UnknownStatus,
};
pub use rows::{ReceiptFileError, ReceiptFileFormat, ReceiptRows};

use super::{
    receipt::{EventId, Receipt, ReceiptReject, RejectedText},
    time::UnixMs,
};
use fields::Fields;

/// A read ends when the texts of its rejects have so many bytes: they are kept until they are stored (I8).
pub const REJECTS_BYTES_MAX: usize = 4 << 20;

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

    /// Whether nothing was read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this is enough for one read: `receipts_max` items, or the limit on the text of rejects.
    pub fn is_full(&self, receipts_max: usize) -> bool {
        self.len() >= receipts_max || text_bytes(&self.rejects) >= REJECTS_BYTES_MAX
    }
}

fn text_bytes(rejects: &[ReceiptReject]) -> usize {
    rejects.iter().map(|reject| reject.text.text.len()).sum()
}

/// What the surroundings of a receipt say of it, such as a log's event. What the receipt says itself comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Around {
    /// Its identity.
    pub event: Option<EventId>,
    /// When it happened.
    pub at: Option<UnixMs>,
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

    /// Reads one JSON object; `None` if its status is of no interest. The error says what is wrong with the
    /// receipt and what is expected.
    pub fn read_object(&self, text: &[u8], around: Around) -> Result<Option<Receipt>, String> {
        let fields = object::find(text, &self.mapping.paths())?;
        self.read(&fields, text, around)
    }

    /// Reads one JSON object into `read`. `place` says where it stood.
    pub fn read_into(
        &self,
        text: &[u8],
        around: Around,
        place: impl FnOnce() -> String,
        read: &mut ReadReceipts,
    ) {
        match self.read_object(text, around) {
            Ok(Some(receipt)) => read.receipts.push(receipt),
            Ok(None) => read.ignored += 1,
            Err(reason) => {
                let kept = RejectedText::of_receipt(text);
                read.rejects.push(self.rejected(text, around, place(), reason, kept));
            }
        }
    }

    /// Reads a rejected receipt again, as it would be read if it came now. `None` if its status is of no interest.
    pub fn read_again(&self, reject: &ReceiptReject) -> Result<Option<Receipt>, String> {
        self.read_object(reject.text.text.as_bytes(), Around { event: Some(reject.event), at: reject.at })
    }

    /// What becomes of text that is not a receipt at all.
    pub fn reject(&self, text: &[u8], place: String, reason: String) -> ReceiptReject {
        self.rejected(text, Around::default(), place, reason, RejectedText::of_other(text))
    }

    /// What becomes of a file that can't be used. `digest` stands for what it holds and for what is wrong with it:
    /// the same again is the same reject.
    pub fn reject_file(&self, digest: &[u8], place: String, reason: String) -> ReceiptReject {
        self.rejected(digest, Around::default(), place, reason, RejectedText::default())
    }

    fn rejected(
        &self,
        identity: &[u8],
        around: Around,
        place: String,
        reason: String,
        text: RejectedText,
    ) -> ReceiptReject {
        let event = around.event.unwrap_or_else(|| EventId::of_text(&self.source, identity));
        ReceiptReject { event, at: around.at, place, reason, text }
    }

    fn read(&self, fields: &Fields<'_>, text: &[u8], around: Around) -> Result<Option<Receipt>, String> {
        let mut is_named = false;
        let identity = |id: Option<&str>| {
            is_named = id.is_some();
            match (id, around.event) {
                (Some(id), _) => EventId::named(&self.source, id),
                (None, Some(event)) => event,
                (None, None) => EventId::of_text(&self.source, text),
            }
        };
        let Some(mut receipt) = fields::receipt(fields, &self.mapping, identity)? else { return Ok(None) };
        receipt.at = receipt.at.or(around.at);
        if is_named {
            receipt.event = receipt.event.saying(&receipt);
        }
        Ok(Some(receipt))
    }
}
