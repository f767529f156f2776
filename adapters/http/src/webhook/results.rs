//! What an answer says of each message of a bundle: an array of objects with the `id` of a message and its `status`.

use std::{borrow::Cow, collections::HashMap};

use postrider_actors::{
    model::{
        ids::MessageId,
        outcome::{Outcome, Reason},
    },
    ports::ItemAnswer,
};
use serde_json::value::RawValue;

use super::provider_id::JsonPointer;

/// One of them; what else it holds is its receiver's own.
#[derive(serde::Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    status: u16,
}

/// What the body of a 2xx with this `status` says of `messages`, one after the other, and of how many it says nothing.
/// Those are not to blame, and may have been taken or not: they are retried. So are all of them where the body did not come
/// whole or is something else. Of two items with one id the first counts; ids that are not among `messages` count for
/// nothing.
pub(super) fn items(
    body: Option<&[u8]>,
    results: &JsonPointer,
    provider_id: Option<&JsonPointer>,
    status: u16,
    messages: &[MessageId],
    outcome_of: impl Fn(u16) -> Outcome,
) -> (Vec<ItemAnswer>, usize) {
    let found = body.and_then(|body| results.value(body).ok());
    let array = found.and_then(|value| serde_json::from_str::<Vec<&RawValue>>(value.get()).ok());
    let mut said = HashMap::new();
    for raw in array.unwrap_or_default() {
        if let Ok(Item { id, status }) = serde_json::from_str(raw.get()) {
            said.entry(id).or_insert((status, raw));
        }
    }
    let mut unnamed = 0;
    let item = |message: &MessageId| {
        let Some(&(status, raw)) = said.get(&*message.to_string()) else {
            unnamed += 1;
            let outcome = Outcome::Retryable { status, reason: Reason::Protocol, retry_after: None };
            return ItemAnswer { outcome, provider_id: None };
        };
        let outcome = outcome_of(status);
        let is_sent = matches!(outcome, Outcome::Sent { .. });
        let pointer = provider_id.filter(|_| is_sent);
        ItemAnswer {
            outcome,
            provider_id: pointer.and_then(|pointer| pointer.find(raw.get().as_bytes()).ok()),
        }
    };
    let items = messages.iter().map(item).collect();
    (items, unnamed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use postrider_actors::model::{http_policy, ids::FileId, time::UnixMs};
    use proptest::prelude::*;

    use super::*;

    fn messages(count: u64) -> Vec<MessageId> {
        (1..=count).map(|row| MessageId { file: FileId([7; 16]), row }).collect()
    }

    fn id(row: u64) -> String {
        messages(row)[row as usize - 1].to_string()
    }

    fn read(body: Option<&str>, pointer: &str, count: u64) -> (Vec<ItemAnswer>, usize) {
        let outcome_of = |status| http_policy::item_outcome(status, None, UnixMs(0), Duration::ZERO);
        let provider_id = "/ref".parse().unwrap();
        let body = body.map(str::as_bytes);
        items(body, &pointer.parse().unwrap(), Some(&provider_id), 207, &messages(count), outcome_of)
    }

    fn outcomes(body: &str, count: u64) -> Vec<Outcome> {
        read(Some(body), "/items", count).0.into_iter().map(|item| item.outcome).collect()
    }

    const UNNAMED: Outcome = Outcome::Retryable { status: 207, reason: Reason::Protocol, retry_after: None };

    fn refused(status: u16) -> Outcome {
        Outcome::Permanent { status, reason: Reason::Status }
    }

    #[test]
    fn each_message_has_its_own_status_in_whatever_order() {
        let body = format!(
            r#"{{"items":[{{"id":"{}","status":422,"why":["x"]}},{{"status":200,"id":"{}","ref":17}},{{"id":"{}","status":410}}]}}"#,
            id(2),
            id(1),
            id(3)
        );
        let (items, unnamed) = read(Some(&body), "/items", 3);
        let outcomes: Vec<_> = items.iter().map(|item| item.outcome).collect();
        assert_eq!(outcomes, [Outcome::Sent { status: 200 }, refused(422), refused(410)]);
        let ids: Vec<_> = items.iter().map(|item| item.provider_id.as_deref()).collect();
        assert_eq!((&ids[..], unnamed), (&[Some("17"), None, None][..], 0));
    }

    #[test]
    fn a_message_that_is_not_named_is_retried_and_other_ids_count_for_nothing() {
        let body = format!(
            r#"{{"items":[{{"id":"msg_0_9","status":400}},{{"id":"{0}","status":200}},{{"id":"{0}","status":400}},7,{{"id":"{1}"}}]}}"#,
            id(2),
            id(3)
        );
        assert_eq!(outcomes(&body, 3), [UNNAMED, Outcome::Sent { status: 200 }, UNNAMED]);
        assert_eq!(read(Some(&body), "/items", 3).1, 2);
    }

    #[test]
    fn an_answer_that_says_nothing_blames_nobody() {
        for body in [None, Some(""), Some("{}"), Some(r#"{"items":{}}"#), Some(r#"{"items":[{"id":"#)] {
            let (items, unnamed) = read(body, "/items", 2);
            assert!(items.iter().all(|item| item.outcome == UNNAMED) && unnamed == 2, "{body:?}");
        }
        let array = format!(r#"[{{"id":"{}","status":503}}]"#, id(1));
        let down = Outcome::Retryable { status: 503, reason: Reason::Status, retry_after: None };
        assert_eq!(read(Some(&array), "", 1).0[0].outcome, down, "the whole body is the array");
    }

    proptest! {
        #[test]
        fn any_body_is_read_without_a_panic_and_every_message_has_an_outcome(body in ".{0,200}", count in 1u64..5) {
            prop_assert_eq!(outcomes(&body, count).len(), count as usize);
        }
    }
}
