//! What is given as a word, an age or a number: how it is read, and how it is described.

use std::time::Duration;

use postrider_actors::model::{
    outcome::{DeathCause, Reason},
    priority::Priority,
};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Number;
use utoipa::openapi::schema::{Object, ObjectBuilder, OneOfBuilder, Schema, Type};

use crate::shapes::whole_of;

/// Why an attempt failed.
pub(super) fn reasons() -> Schema {
    words(Reason::ALL.map(Reason::as_str))
}

/// Why a message was given up.
pub(super) fn causes() -> Schema {
    words(DeathCause::ALL.map(DeathCause::as_str))
}

/// How urgent a file is.
pub(super) fn priorities() -> Schema {
    word(Priority::WORDS.map(|(word, _)| word)).into()
}

/// How long ago.
pub(super) fn ages() -> Schema {
    or_null(ObjectBuilder::new().schema_type(Type::String).pattern(Some(AGE)).build())
}

fn word<const N: usize>(words: [&str; N]) -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words)).build()
}

fn words<const N: usize>(words: [&str; N]) -> Schema {
    or_null(word(words))
}

/// What is left out may be given as `null`.
fn or_null(schema: Object) -> Schema {
    OneOfBuilder::new().item(schema).item(ObjectBuilder::new().schema_type(Type::Null)).into()
}

/// How long ago, as it was given: `30m`, `2h`, `1day`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Age {
    text: String,
    span: Duration,
}

/// One number and one unit: what the description says of it holds exactly.
const AGE: &str = "^[0-9]{1,9}(ms|s|m|h|d|day|days|w)$";

impl TryFrom<String> for Age {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let is_one = (1..=9).contains(&digits)
            && ["ms", "s", "m", "h", "d", "day", "days", "w"].contains(&&text[digits..]);
        let span = humantime::parse_duration(&text).ok().filter(|_| is_one);
        let span = span.ok_or_else(|| format!("{text:?} is not a time such as 30m, 2h or 1day"))?;
        Ok(Self { text, span })
    }
}

impl Age {
    /// How long that is.
    pub(super) fn span(&self) -> Duration {
        self.span
    }
}

impl From<Age> for String {
    fn from(age: Age) -> Self {
        age.text
    }
}

/// A whole number: in JSON `5.0` is one too.
pub(super) fn whole<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let Some(number) = Option::<Number>::deserialize(deserializer)? else { return Ok(None) };
    let wrong = || D::Error::custom(format!("{number} is not a whole number that fits"));
    whole_of(&number).and_then(|whole| whole.try_into().ok()).ok_or_else(wrong).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_a_number_and_a_unit() {
        let span = |text: &str| Age::try_from(text.to_owned()).map(|age| age.span);
        assert_eq!(span("30m"), Ok(Duration::from_mins(30)));
        assert_eq!(span("1day"), Ok(Duration::from_hours(24)));
        for wrong in ["", "30", "m", "1.5h", "1h 30m", " 1h", "1y", "1234567890s", "١m"] {
            assert!(span(wrong).is_err(), "{wrong:?}");
        }
    }
}
