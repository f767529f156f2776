//! The state of a message. States are totally ordered and recording is `max` (design §6, I7).

use serde::{Deserialize, Serialize};

/// The state of one message at one destination, in the order in which a later report wins. The numbers are what stores
/// hold (B2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum MessageState {
    /// In the outbox or the queue, no attempt recorded.
    Accepted = 0,
    /// An attempt failed, or the message was redriven: it is due again.
    Retrying = 1,
    /// Its time was over while it was open. What was in flight then may be answered 2xx all the same.
    Unsent = 2,
    /// An operator cancelled it while it was open. What was in flight then may be answered 2xx all the same.
    Cancelled = 3,
    /// Given up, with a reason; can be redriven.
    Dead = 4,
    /// The receiver answered 2xx (I2).
    Sent = 5,
    /// Sent, and no receipt came in time; a late receipt undoes it.
    Expired = 6,
    /// A receipt says that it did not arrive.
    Failed = 7,
    /// A receipt says that it arrived.
    Delivered = 8,
}

impl MessageState {
    /// All of them, in their order.
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::Retrying,
        Self::Unsent,
        Self::Cancelled,
        Self::Dead,
        Self::Sent,
        Self::Expired,
        Self::Failed,
        Self::Delivered,
    ];

    /// Those of messages that were sent, and of which no receipt has said what became of them.
    pub const WITHOUT_RECEIPT: [Self; 2] = [Self::Sent, Self::Expired];

    /// What both reports together say: the maximum (I7).
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        self.max(other)
    }

    /// Whether the message still needs delivery.
    pub fn is_open(self) -> bool {
        self <= Self::Retrying
    }

    /// The byte of a batch's state vector; `None` for a byte that no version wrote.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u8 == byte)
    }

    /// The word that operators see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Retrying => "retrying",
            Self::Unsent => "unsent",
            Self::Cancelled => "cancelled",
            Self::Dead => "dead",
            Self::Sent => "sent",
            Self::Expired => "expired",
            Self::Failed => "failed",
            Self::Delivered => "delivered",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn b2_the_order_is_the_design_s() {
        assert!(MessageState::ALL.is_sorted());
        assert_eq!(MessageState::ALL.map(|state| state as u8), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        for byte in 0..=u8::MAX {
            let state = MessageState::from_byte(byte);
            assert_eq!(
                state.map(|state| state as u8),
                MessageState::ALL.map(|state| state as u8).contains(&byte).then_some(byte)
            );
        }
    }

    proptest! {
        #[test]
        fn i7_the_order_of_reports_does_not_matter(states in prop::collection::vec(prop::sample::select(&MessageState::ALL), 1..12), seed: u64) {
            let mut permuted = states.clone();
            let len = permuted.len();
            permuted.rotate_left(seed as usize % len);
            permuted.swap(0, (seed >> 8) as usize % len);
            let merge = |reports: &[MessageState]| {
                reports.iter().fold(MessageState::Accepted, |state, &report| state.merge(report))
            };
            let once = merge(&states);
            prop_assert_eq!(once, merge(&permuted));
            permuted.extend(&states); // states twice
            prop_assert_eq!(once, merge(&permuted));
            prop_assert_eq!(Some(once), states.into_iter().max());
        }
    }
}
