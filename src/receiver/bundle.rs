//! The messages of a request: one, or those of a bundle, whose body is a JSON array.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// One message.
#[derive(Debug)]
pub(super) struct Message<'a> {
    /// Its id, if it has one.
    pub(super) id: Option<Cow<'a, str>>,
    /// Its body.
    pub(super) body: &'a [u8],
}

#[derive(serde::Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
}

/// Whether a request with this `webhook-id` is a bundle.
pub(super) fn is_bundle(webhook_id: &str) -> bool {
    webhook_id.starts_with("bundle_")
}

/// The messages of a request. A bundle that is no array counts as one message, with the bundle's id.
pub(super) fn messages<'a>(webhook_id: Option<&'a str>, body: &'a [u8]) -> Vec<Message<'a>> {
    let array = match webhook_id {
        Some(id) if is_bundle(id) => serde_json::from_slice::<Vec<&RawValue>>(body).ok(),
        _ => None,
    };
    let one = || vec![Message { id: webhook_id.map(Cow::Borrowed), body }];
    array.map_or_else(one, |array| {
        let message = |raw: &'a RawValue| {
            let id = serde_json::from_str(raw.get()).ok().map(|Named { id }| id);
            Message { id, body: raw.get().as_bytes() }
        };
        array.into_iter().map(message).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(id: &str, body: &str) -> Vec<(Option<String>, String)> {
        let text = |message: &Message<'_>| {
            (message.id.as_deref().map(str::to_owned), String::from_utf8(message.body.to_vec()).unwrap())
        };
        messages(Some(id), body.as_bytes()).iter().map(text).collect()
    }

    #[test]
    fn the_messages_of_a_bundle_keep_their_bytes() {
        let body = r#"[{"id":"msg_1","n": 1.0},{"n":2}, 3]"#;
        let expected = [
            (Some("msg_1".to_owned()), r#"{"id":"msg_1","n": 1.0}"#.to_owned()),
            (None, r#"{"n":2}"#.to_owned()),
            (None, "3".to_owned()),
        ];
        assert_eq!(read("bundle_0", body), expected);
    }

    #[test]
    fn anything_else_is_one_message() {
        for (id, body) in [("msg_1", r#"[{"id":"x"}]"#), ("bundle_1", "{}"), ("bundle_1", "[")] {
            assert_eq!(read(id, body), [(Some(id.to_owned()), body.to_owned())]);
        }
        assert!(messages(None, b"x")[0].id.is_none());
    }
}
