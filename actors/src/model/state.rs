//! The state of a message. States are totally ordered and recording is `max` (design §6, I7).

use serde::{Deserialize, Serialize};

/// The state of one message at one destination, in the order in which a later report wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum MessageState {
    /// In the outbox or the queue, no attempt recorded.
    Accepted = 0,
    /// An attempt failed, or the message was redriven: it is due again.
    Retrying = 1,
    /// Given up, with a reason; can be redriven.
    Dead = 2,
    /// The receiver answered 2xx (I2).
    Sent = 3,
    /// Sent, and no receipt came in time; a late receipt undoes it.
    Expired = 4,
    /// A receipt says that it did not arrive.
    Failed = 5,
    /// A receipt says that it arrived.
    Delivered = 6,
}

impl MessageState {
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
        Some(match byte {
            0 => Self::Accepted,
            1 => Self::Retrying,
            2 => Self::Dead,
            3 => Self::Sent,
            4 => Self::Expired,
            5 => Self::Failed,
            6 => Self::Delivered,
            _ => return None,
        })
    }

    /// The word that operators see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Retrying => "retrying",
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

    const ALL: [MessageState; 7] = [
        MessageState::Accepted,
        MessageState::Retrying,
        MessageState::Dead,
        MessageState::Sent,
        MessageState::Expired,
        MessageState::Failed,
        MessageState::Delivered,
    ];

    #[test]
    fn the_order_is_the_design_s() {
        assert!(ALL.is_sorted());
        for (byte, state) in ALL.into_iter().enumerate() {
            assert_eq!(MessageState::from_byte(byte as u8), Some(state));
            assert_eq!(state as usize, byte);
        }
        assert_eq!(MessageState::from_byte(7), None);
    }

    proptest! {
        #[test]
        fn i7_the_order_of_reports_does_not_matter(states in prop::collection::vec(0u8..7, 1..12), seed: u64) {
            let states: Vec<_> = states.into_iter().filter_map(MessageState::from_byte).collect();
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
