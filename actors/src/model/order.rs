//! The order of messages that have a key in common (`ordering = "per_key"`): one is sent when all before it have ended.
//!
//! Whoever keeps the order must know of every message that is older than the one it sends. So an ordered destination is
//! leased from its oldest open batch on, due or not, to one worker at a time (B13). The rule itself is a queue per key: its
//! first message may be in flight, or wait to be tried again; the others of that key wait for it, and no other key does.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{
    batch::{MessageParts, RowLayout},
    table::{Raw, field},
};

/// What the messages of one key have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderingKey {
    /// The recipient.
    Recipient,
    /// This column, or field of the JSON object.
    Column(Arc<str>),
}

impl OrderingKey {
    /// The key of a message whose laid-out bytes are `row_bytes`. Messages without one have that in common: a slip in the
    /// column's name makes a destination slow, but breaks no order.
    pub fn of<'a>(&self, layout: &'a RowLayout, row_bytes: &'a [u8]) -> Cow<'a, str> {
        let Ok(MessageParts { recipient, data }) = layout.read(row_bytes) else { return Cow::default() };
        match self {
            Self::Recipient => Cow::Borrowed(recipient),
            Self::Column(name) => match field(&data, name) {
                Some(Raw::Text(text)) => text,
                Some(Raw::Json(json)) => Cow::Borrowed(json),
                None => Cow::default(),
            },
        }
    }
}

/// Which messages are next, by key. `M` names a message.
///
/// Keys are hashes. Two keys with one hash wait for each other, which breaks no promise.
#[derive(Debug)]
pub struct KeyOrder<M>(HashMap<u64, VecDeque<M>>);

impl<M> Default for KeyOrder<M> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<M: Copy + PartialEq> KeyOrder<M> {
    /// An open message comes, younger than those that came before. Whether it is its turn.
    pub fn arrive(&mut self, key: u64, message: M) -> bool {
        let queue = self.0.entry(key).or_default();
        queue.push_back(message);
        queue.len() == 1
    }

    /// A message has ended. Whose turn it is now, if it was the turn of this one.
    pub fn leave(&mut self, key: u64, message: M) -> Option<M> {
        let queue = self.0.get_mut(&key)?;
        let at = queue.iter().position(|other| *other == message)?;
        queue.remove(at);
        if queue.is_empty() {
            self.0.remove(&key);
            return None;
        }
        (at == 0).then(|| queue[0])
    }

    /// No message is held any more.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether no message is held.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::batch::put_cell;

    #[test]
    fn a_key_is_the_recipient_or_a_column() {
        let columns = RowLayout::Columns { names: vec!["user_id".into(), "order".into()], recipient: 0 };
        let (mut row, mut object) = (Vec::new(), Vec::new());
        put_cell(&mut row, "u1");
        put_cell(&mut row, "o7");
        put_cell(&mut object, "u1");
        object.extend(br#"{"order": {"id": 7}}"#);
        let column = |name: &str| OrderingKey::Column(name.into());
        assert_eq!(OrderingKey::Recipient.of(&columns, &row), "u1");
        assert_eq!(OrderingKey::Recipient.of(&RowLayout::Objects, &object), "u1");
        assert_eq!(OrderingKey::Recipient.of(&RowLayout::Lines, b"u1"), "u1");
        assert_eq!(column("order").of(&columns, &row), "o7");
        assert_eq!(column("order.id").of(&RowLayout::Objects, &object), "7");
        assert_eq!(column("oder").of(&columns, &row), "");
        assert_eq!(column("order").of(&RowLayout::Lines, b"u1"), "");
    }

    #[test]
    fn the_first_of_a_key_holds_its_key_and_no_other() {
        let mut order = KeyOrder::default();
        assert!(order.arrive(7, 'a'));
        assert!(!order.arrive(7, 'b'));
        assert!(order.arrive(8, 'c'));
        assert!(!order.arrive(7, 'd'));
        assert_eq!(order.leave(8, 'c'), None, "nobody waited for it");
        assert_eq!(order.leave(7, 'b'), None, "it was not its turn");
        assert_eq!(order.leave(7, 'a'), Some('d'));
        assert_eq!(order.leave(7, 'a'), None, "it is gone");
        assert_eq!(order.leave(7, 'd'), None);
        assert!(order.is_empty());
    }

    proptest! {
        #[test]
        fn of_each_key_one_message_at_most_has_its_turn_and_they_have_it_in_order(
            keys in prop::collection::vec(0u64..5, 1..60),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
        ) {
            let mut order = KeyOrder::default();
            let mut turns: Vec<(u64, usize)> = Vec::new();
            let mut ended: HashMap<u64, Vec<usize>> = HashMap::new();
            let mut coming = keys.iter().copied().enumerate();
            for pick in picks {
                if turns.is_empty() || pick.index(2) == 0 {
                    if let Some((nth, key)) = coming.next()
                        && order.arrive(key, nth)
                    {
                        turns.push((key, nth));
                    }
                } else {
                    let (key, nth) = turns.swap_remove(pick.index(turns.len()));
                    ended.entry(key).or_default().push(nth);
                    turns.extend(order.leave(key, nth).map(|next| (key, next)));
                }
                let keys: HashSet<_> = turns.iter().map(|(key, _)| key).collect();
                prop_assert_eq!(keys.len(), turns.len(), "never two of one key");
            }
            prop_assert!(ended.values().all(|ended| ended.is_sorted()));
            // All of them have their turn in the end.
            for (nth, key) in coming {
                turns.extend(order.arrive(key, nth).then_some((key, nth)));
            }
            let mut count = ended.values().map(Vec::len).sum::<usize>();
            while let Some((key, nth)) = turns.pop() {
                count += 1;
                turns.extend(order.leave(key, nth).map(|next| (key, next)));
            }
            prop_assert_eq!(count, keys.len());
            prop_assert!(order.is_empty());
        }
    }
}
