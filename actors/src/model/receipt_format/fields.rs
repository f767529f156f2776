//! The fields of one receipt, each judged by its own rule.

use std::borrow::Cow;

use super::mapping::{FIELDS, ReceiptMapping, StatusMeaning, UnknownStatus};
use crate::model::{
    ids::MessageId,
    receipt::{
        EventId, PROVIDER_ID_BYTES_MAX, Price, RESPONSE_BYTES_MAX, Receipt, ReceiptFacts, ReceiptKey,
        WORD_BYTES_MAX,
    },
    state::MessageState,
    time::UnixMs,
    timestamp,
};

pub(super) const MESSAGE_ID: usize = 0;
pub(super) const PROVIDER_ID: usize = 1;
pub(super) const EVENT_ID: usize = 2;
pub(super) const STATUS: usize = 3;
pub(super) const TIME: usize = 4;
pub(super) const CARRIER: usize = 5;
pub(super) const RESPONSE: usize = 6;
pub(super) const SENT_AT: usize = 7;
pub(super) const PRICE: usize = 8;
/// The longest receipt id: only its digest is kept.
const EVENT_ID_BYTES_MAX: usize = 1000;

/// The greatest row: stores keep it as a signed number of 64 bits.
const ROW_MAX: u64 = i64::MAX as u64;

/// How much of a value is shown.
const SHOWN_CHARS: usize = 40;

/// The value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FieldValue<'a> {
    Text(Cow<'a, str>),
    /// A JSON number, digit by digit.
    Number(&'a str),
    Boolean(bool),
    /// An object or an array.
    Nested(&'static str),
}

/// A value per field, at the field's place.
pub(super) type Fields<'a> = [Option<FieldValue<'a>>; FIELDS];

/// A value for the operator: cut, and escaped for the terminal (F27).
pub(super) fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    let cut = if text.chars().nth(SHOWN_CHARS).is_some() { "…" } else { "" };
    format!("\"{shown}{cut}\"")
}

/// One field, with its name for what there is to say of it.
struct Field<'a> {
    name: &'a str,
    found: Option<&'a FieldValue<'a>>,
}

impl<'a> Field<'a> {
    /// What it says as text; empty text is nothing (S0.3).
    fn text(&self) -> Result<Option<&'a str>, String> {
        let text = match self.found {
            None => return Ok(None),
            Some(FieldValue::Text(text)) => &**text,
            Some(FieldValue::Number(digits)) => digits,
            Some(FieldValue::Boolean(true)) => "true",
            Some(FieldValue::Boolean(false)) => "false",
            Some(FieldValue::Nested(kind)) => {
                return Err(format!("`{}` is {kind}, expected text or a number", self.name));
            }
        };
        if text.contains('\0') {
            return Err(format!("`{}` holds a NUL byte, which no text may have", self.name));
        }
        Ok(Some(text).filter(|text| !text.trim_ascii().is_empty()))
    }

    /// An id, whole or not at all.
    fn id(&self, bytes_max: usize) -> Result<Option<&'a str>, String> {
        let id = self.text()?;
        match id {
            Some(id) if id.len() > bytes_max => Err(format!(
                "`{}` has {} bytes, expected an id of at most {bytes_max}: {}",
                self.name,
                id.len(),
                quoted(id)
            )),
            id => Ok(id),
        }
    }

    /// A text that is kept for people, cut to its bound.
    fn kept(&self, bytes_max: usize) -> Result<Option<Box<str>>, String> {
        let cut = |text: &str| {
            let mut end = text.len().min(bytes_max);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text[..end].into()
        };
        Ok(self.text()?.map(cut))
    }

    fn time(&self) -> Result<Option<UnixMs>, String> {
        let read = |text: &str| {
            timestamp::read(text.trim_ascii())
                .ok_or_else(|| self.refusal(text, &format!("expected a time: {}", timestamp::EXPECTED)))
        };
        self.text()?.map(read).transpose()
    }

    fn refusal(&self, found: &str, expected: &str) -> String {
        format!("`{}` is {}, {expected}", self.name, quoted(found))
    }
}

/// The state that a word means; `None` for one that is of no interest.
fn state_of(mapping: &ReceiptMapping, word: &str) -> Result<Option<MessageState>, String> {
    Ok(Some(match mapping.statuses.get(word) {
        Some(StatusMeaning::Sent) => MessageState::Sent,
        Some(StatusMeaning::Failed) => MessageState::Failed,
        Some(StatusMeaning::Delivered) => MessageState::Delivered,
        Some(StatusMeaning::Ignored) => return Ok(None),
        None if mapping.otherwise == UnknownStatus::Sent => MessageState::Sent,
        None => {
            let found = quoted(word);
            return Err(format!(
                "`{}` is {found}, which the source's `statuses` do not have",
                mapping.status
            ));
        }
    }))
}

/// Reads a receipt; `None` if its status is of no interest. `identity` makes the event's id.
pub(super) fn receipt(
    fields: &Fields<'_>,
    mapping: &ReceiptMapping,
    identity: impl FnOnce(Option<&str>) -> EventId,
) -> Result<Option<Receipt>, String> {
    let paths = mapping.paths();
    let field = |place: usize| Field {
        name: paths[place].map_or("", |path| path.as_str()),
        found: fields[place].as_ref(),
    };
    let Some(word) = field(STATUS).text()? else {
        return Err(format!("`{}` is missing or empty, expected the status", mapping.status));
    };
    let Some(state) = state_of(mapping, word.trim_ascii())? else { return Ok(None) };
    Ok(Some(Receipt {
        key: key(&field(MESSAGE_ID), &field(PROVIDER_ID))?,
        state,
        at: field(TIME).time()?,
        facts: ReceiptFacts {
            status: field(STATUS).kept(WORD_BYTES_MAX)?,
            carrier: field(CARRIER).kept(WORD_BYTES_MAX)?,
            response: field(RESPONSE).kept(RESPONSE_BYTES_MAX)?,
            sent_at: field(SENT_AT).time()?,
            price: price(&field(PRICE))?,
        },
        event: identity(field(EVENT_ID).id(EVENT_ID_BYTES_MAX)?),
    }))
}

fn key(message: &Field<'_>, provider: &Field<'_>) -> Result<ReceiptKey, String> {
    if let Some(text) = message.text()? {
        return match text.parse::<MessageId>() {
            Ok(id) if id.row <= ROW_MAX => Ok(ReceiptKey::Message(id)),
            _ => Err(message.refusal(text, "expected a message id: msg_<32 hex digits>_<row>")),
        };
    }
    if let Some(id) = provider.id(PROVIDER_ID_BYTES_MAX)? {
        return Ok(ReceiptKey::Provider(id.into()));
    }
    let names: Vec<_> = [message.name, provider.name].into_iter().filter(|name| !name.is_empty()).collect();
    Err(format!("`{}` is missing or empty, expected the message's id", names.join("` or `")))
}

fn price(field: &Field<'_>) -> Result<Option<Price>, String> {
    let read = |text: &str| {
        decimal(text.trim_ascii()).map(Price).ok_or_else(|| {
            field.refusal(text, "expected a price: a decimal number below 92 thousand million")
        })
    };
    field.text()?.map(read).transpose()
}

/// A decimal in units of 10⁻⁸, never by way of a binary fraction; what is beyond the eighth decimal is
/// rounded, half away from zero. `None` if it is not a decimal, or too large.
fn decimal(text: &str) -> Option<i64> {
    const DECIMALS: i32 = 8;
    let (sign, number) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let (mantissa, exponent) = match number.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (number, 0),
    };
    let (whole, decimals) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    if !is_number(whole) || !is_number(decimals) {
        return None;
    }
    // How many of the digits make up whole units; the next one rounds them.
    let taken = i64::try_from(whole.len()).ok()? + i64::from(exponent) + i64::from(DECIMALS);
    let mut digits = whole.bytes().chain(decimals.bytes());
    let mut units = 0i64;
    let mut place = 0;
    while place < taken {
        let Some(digit) = digits.next() else { break };
        units = units.checked_mul(10)?.checked_add(i64::from(digit - b'0'))?;
        place += 1;
    }
    if place == taken && digits.next().is_some_and(|digit| digit >= b'5') {
        units = units.checked_add(1)?;
    }
    while place < taken && units != 0 {
        units = units.checked_mul(10)?;
        place += 1;
    }
    Some(sign * units)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn s0_3_prices_are_exact() {
        for (text, expected) in [
            ("0.00645", Some(645_000)),
            ("-0.0075", Some(-750_000)),
            ("+1", Some(100_000_000)),
            ("0.1", Some(10_000_000)),
            ("0.00000001", Some(1)),
            ("0.000000014", Some(1)),
            ("0.000000015", Some(2)),
            ("-0.000000015", Some(-2)),
            ("0.0075000000000000006", Some(750_000)),
            ("6.45e-3", Some(645_000)),
            ("645E-5", Some(645_000)),
            ("1e3", Some(100_000_000_000)),
            ("5e-9", Some(1)),
            ("4e-9", Some(0)),
            ("5e-10", Some(0)),
            ("1e-99999", Some(0)),
            ("0e99999", Some(0)),
            ("92233720368.54775807", Some(i64::MAX)),
            ("92233720368.54775808", None),
            ("1e11", None),
            ("1e99999", None),
            ("1e99999999999", None),
            ("", None),
            ("-", None),
            (".5", None),
            ("1.", None),
            ("1,5", None),
            ("$1", None),
            ("NaN", None),
            ("--1", None),
            ("0x10", None),
        ] {
            assert_eq!(decimal(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_decimal_reads_back(units in any::<i64>().prop_filter("has no absolute value", |n| *n != i64::MIN)) {
            let sign = if units < 0 { "-" } else { "" };
            let (whole, rest) = (units.abs() / 100_000_000, units.abs() % 100_000_000);
            prop_assert_eq!(decimal(&format!("{sign}{whole}.{rest:08}")), Some(units));
            prop_assert_eq!(decimal(&format!("{units}e-8")), Some(units));
        }

        #[test]
        fn no_text_is_too_strange_for_a_price(text in "[-+0-9.eE]{0,40}|.*") {
            let _ = decimal(&text); // it must not panic
        }
    }
}
