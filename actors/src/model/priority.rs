//! How urgent files are: of a feed as it is configured, of a file as it was dropped or as an operator has ordered since.

pub use postrider_settings::Priority;
use serde::{Deserialize, Serialize};

use super::ids::FileId;

/// How many messages go of each priority where all three wait: of 21 messages 16 are urgent, 4 are normal, 1 is bulk.
pub const fn weight(priority: Priority) -> u64 {
    match priority {
        Priority::Bulk => 1,
        Priority::Normal => 4,
        Priority::Urgent => 16,
    }
}

/// How urgent a file is at a destination by an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePriority {
    /// The file.
    pub file: FileId,
    /// The destination.
    pub destination: String,
    /// How urgent it is there.
    pub priority: Priority,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_reads_back() {
        for (word, priority) in Priority::WORDS {
            assert_eq!((word.parse(), priority.as_str()), (Ok(priority), word));
            assert_eq!(Priority::from_byte(priority as u8), Some(priority));
            assert_eq!(serde_json::to_string(&priority).unwrap(), format!("{word:?}"));
            assert_eq!(weight(Priority::Urgent) % weight(priority), 0, "shares are whole numbers");
        }
        assert_eq!((Priority::from_byte(3), "Urgent".parse::<Priority>().ok()), (None, None));
        assert!(Priority::Urgent > Priority::Normal && Priority::Normal > Priority::Bulk);
    }
}
