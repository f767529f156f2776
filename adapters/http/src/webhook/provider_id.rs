//! Finds the receiver's own id for a message in the body of its answer.

use std::{borrow::Cow, collections::HashMap, fmt, str::FromStr};

use postrider_actors::model::receipt::PROVIDER_ID_BYTES_MAX;
use serde_json::value::RawValue;

/// The longest pointer, in bytes: it is written by hand.
const POINTER_BYTES_MAX: usize = 512;

/// Where in a JSON document a value is (RFC 6901): `/message/id`, `/messages/0/id`. The empty pointer is the
/// whole document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonPointer {
    /// Without the slashes, unescaped.
    tokens: Vec<String>,
}

/// A text that is not a JSON pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPointer {
    /// It does not start with a slash.
    #[error("it does not start with `/` (expected a JSON pointer such as /message/id)")]
    NoSlash,
    /// A `~` that is neither `~0` nor `~1`.
    #[error("it holds `~` without 0 or 1 behind it (write ~0 for `~` and ~1 for `/` in a key)")]
    Escape,
    /// Longer than anybody's answers are deep.
    #[error("it is longer than 512 bytes")]
    TooLong,
}

impl FromStr for JsonPointer {
    type Err = BadPointer;

    fn from_str(text: &str) -> Result<Self, BadPointer> {
        if text.len() > POINTER_BYTES_MAX {
            return Err(BadPointer::TooLong);
        }
        if text.is_empty() {
            return Ok(Self { tokens: Vec::new() });
        }
        let tokens = text.strip_prefix('/').ok_or(BadPointer::NoSlash)?.split('/');
        Ok(Self { tokens: tokens.map(unescape).collect::<Result<_, _>>()? })
    }
}

impl fmt::Display for JsonPointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `~` first: the other way round the one of `~1` would be escaped too.
        self.tokens.iter().try_for_each(|token| write!(f, "/{}", token.replace('~', "~0").replace('/', "~1")))
    }
}

fn unescape(token: &str) -> Result<String, BadPointer> {
    let mut parts = token.split('~');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (sign, rest) = match part.as_bytes().first() {
            Some(b'0') => ('~', &part[1..]),
            Some(b'1') => ('/', &part[1..]),
            _ => return Err(BadPointer::Escape),
        };
        text.push(sign);
        text.push_str(rest);
    }
    Ok(text)
}

/// Why an answer gives no id. For people; it never holds what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoId {
    /// The body was cut off, is longer than `response_bytes_max`, or did not come in time.
    NoBody,
    NotJson,
    /// Nothing is there.
    Nothing,
    /// An object, an array, `null` or a boolean.
    NoText,
    Empty,
    TooLong,
    Nul,
}

impl NoId {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NoBody => "its body did not come whole, in time and within response_bytes_max",
            Self::NotJson => "its body is not JSON",
            Self::Nothing => "nothing is there",
            Self::NoText => "what is there is neither text nor number",
            Self::Empty => "what is there is an empty text",
            Self::TooLong => "what is there is longer than 200 bytes",
            Self::Nul => "what is there holds a NUL",
        }
    }
}

impl JsonPointer {
    /// What it points to.
    pub(super) fn value<'a>(&self, body: &'a [u8]) -> Result<&'a RawValue, NoId> {
        let mut value: &RawValue = serde_json::from_slice(body).map_err(|_| NoId::NotJson)?;
        for token in &self.tokens {
            value = step(value, token)?;
        }
        Ok(value)
    }

    /// The text or number that it points to. A number is taken digit by digit: one of twenty digits is an id
    /// that no float holds.
    pub(super) fn find(&self, body: &[u8]) -> Result<Box<str>, NoId> {
        let text = self.value(body)?.get();
        let id = match text.as_bytes().first() {
            Some(b'"') => serde_json::from_str::<Cow<'_, str>>(text).map_err(|_| NoId::NotJson)?,
            Some(b'-' | b'0'..=b'9') => Cow::Borrowed(text),
            _ => return Err(NoId::NoText),
        };
        match &*id {
            "" => Err(NoId::Empty),
            id if id.len() > PROVIDER_ID_BYTES_MAX => Err(NoId::TooLong),
            id if id.contains('\0') => Err(NoId::Nul),
            id => Ok(id.into()),
        }
    }
}

/// One step down. Of a key that is there twice the last one counts, as with most parsers.
fn step<'a>(value: &'a RawValue, token: &str) -> Result<&'a RawValue, NoId> {
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'{') => {
            let mut object: HashMap<JsonKey<'a>, &'a RawValue> =
                serde_json::from_str(text).map_err(|_| NoId::NotJson)?;
            object.remove(token).ok_or(NoId::Nothing)
        }
        Some(b'[') => {
            let is_index =
                token == "0" || !token.starts_with('0') && token.bytes().all(|b| b.is_ascii_digit());
            let index: usize = token.parse().ok().filter(|_| is_index).ok_or(NoId::Nothing)?;
            let array: Vec<&'a RawValue> = serde_json::from_str(text).map_err(|_| NoId::NotJson)?;
            array.get(index).copied().ok_or(NoId::Nothing)
        }
        _ => Err(NoId::Nothing),
    }
}

/// A key of an object; borrowed where it holds no escapes.
#[derive(Debug, PartialEq, Eq, Hash, serde::Deserialize)]
#[serde(transparent)]
struct JsonKey<'a>(#[serde(borrow)] Cow<'a, str>);

impl std::borrow::Borrow<str> for JsonKey<'_> {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(pointer: &str, body: &str) -> Result<String, NoId> {
        pointer.parse::<JsonPointer>().unwrap().find(body.as_bytes()).map(String::from)
    }

    /// The example of RFC 6901, section 5, as far as it points to numbers.
    #[test]
    fn the_specification_s_example_is_reproduced() {
        let body =
            r#"{"foo":["bar","baz"],"":0,"a/b":1,"c%d":2,"e^f":3,"g|h":4,"i\\j":5,"k\"l":6," ":7,"m~n":8}"#;
        assert_eq!(find("/foo/0", body), Ok("bar".into()));
        for (pointer, expected) in [
            ("/", "0"),
            ("/a~1b", "1"),
            ("/c%d", "2"),
            ("/e^f", "3"),
            ("/g|h", "4"),
            ("/i\\j", "5"),
            ("/k\"l", "6"),
            ("/ ", "7"),
            ("/m~0n", "8"),
        ] {
            assert_eq!(find(pointer, body), Ok(expected.into()), "{pointer}");
            assert_eq!(pointer.parse::<JsonPointer>().unwrap().to_string(), pointer);
        }
        assert_eq!(find("", "\"x\""), Ok("x".into()));
        assert_eq!(find("/~01", r#"{"~1":"tilde one"}"#), Ok("tilde one".into()));
    }

    #[test]
    fn what_is_no_pointer_is_refused() {
        let refused = |text: &str| text.parse::<JsonPointer>().unwrap_err();
        assert_eq!(refused("message.id"), BadPointer::NoSlash);
        assert_eq!(refused("/a~2b"), BadPointer::Escape);
        assert_eq!(refused("/a~"), BadPointer::Escape);
        assert_eq!(refused(&"/a".repeat(257)), BadPointer::TooLong);
    }

    #[test]
    fn texts_and_numbers_are_ids_and_nothing_else() {
        assert_eq!(find("/a/b", r#" {"a": {"b": "x\u0041"}} "#), Ok("xA".into()));
        assert_eq!(find("/a/1/b", r#"{"a":[0,{"b":"y"}]}"#), Ok("y".into()));
        assert_eq!(find("/a", r#"{"a":123456789012345678901234}"#), Ok("123456789012345678901234".into()));
        assert_eq!(find("/a", r#"{"a":"1","a":"2"}"#), Ok("2".into()));
        for (pointer, body, why) in [
            ("/a", "", NoId::NotJson),
            ("/a", "ok", NoId::NotJson),
            ("/a", r#"{"a":"x"} {"#, NoId::NotJson),
            ("/a", "{\"a\":\"\u{1}\"}", NoId::NotJson),
            ("/b", r#"{"a":"x"}"#, NoId::Nothing),
            ("/a/b", r#"{"a":"x"}"#, NoId::Nothing),
            ("/01", "[1,2]", NoId::Nothing),
            ("/+1", "[1,2]", NoId::Nothing),
            ("/-", "[1,2]", NoId::Nothing),
            ("/", "[1,2]", NoId::Nothing),
            ("/2", "[1,2]", NoId::Nothing),
            ("/99999999999999999999999", "[1,2]", NoId::Nothing),
            ("/a", r#"{"a":null}"#, NoId::NoText),
            ("/a", r#"{"a":true}"#, NoId::NoText),
            ("/a", r#"{"a":{"b":1}}"#, NoId::NoText),
            ("/a", r#"{"a":[1]}"#, NoId::NoText),
            ("/a", r#"{"a":""}"#, NoId::Empty),
            ("/a", r#"{"a":"x\u0000"}"#, NoId::Nul),
        ] {
            assert_eq!(find(pointer, body), Err(why), "{pointer} in {body:?}");
        }
    }

    #[test]
    fn an_id_has_200_bytes_at_most() {
        let body = |len: usize| format!(r#"{{"a":"{}"}}"#, "x".repeat(len));
        assert_eq!(find("/a", &body(200)), Ok("x".repeat(200)));
        assert_eq!(find("/a", &body(201)), Err(NoId::TooLong));
        assert_eq!(find("/a", &format!(r#"{{"a":{}}}"#, "1".repeat(201))), Err(NoId::TooLong));
    }

    #[test]
    fn f23_deep_answers_are_refused_without_a_panic() {
        let deep = format!("{}1{}", "[".repeat(60_000), "]".repeat(60_000));
        assert!(find("/0/0", &deep).is_err());
        let _ = find(&"/0".repeat(250), &deep);
    }

    proptest! {
        #[test]
        fn any_pointer_is_refused_or_comes_back_as_it_was(text in "[/~01a-c]{0,20}") {
            if let Ok(pointer) = text.parse::<JsonPointer>() {
                prop_assert_eq!(pointer.to_string(), text);
            }
        }

        #[test]
        fn it_finds_what_the_library_finds(
            keys in prop::collection::vec("[a/~0-1]{0,3}", 1..4),
            id in "[a-z\"\\\\é]{1,20}",
        ) {
            let mut document = serde_json::Value::from(id.clone());
            let mut pointer = String::new();
            for key in &keys {
                document = serde_json::json!({ key.clone(): document, "other": 1 });
                pointer = format!("/{}{pointer}", key.replace('~', "~0").replace('/', "~1"));
            }
            prop_assert_eq!(document.pointer(&pointer).and_then(|found| found.as_str()), Some(&*id));
            prop_assert_eq!(find(&pointer, &document.to_string()), Ok(id));
        }
    }
}
