//! Why an attempt has no answer: of it, or of this machine.

use postrider_actors::model::outcome::{Obstacle, Reason, Shortage};
pub(super) use postrider_net::shortage::{shortage, shortage_lately};

/// Why an attempt has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It was made, and failed.
    Failed(Reason),
    /// It could not be made here. Nothing was sent.
    Unsent(Obstacle),
}

impl From<Reason> for Trouble {
    fn from(reason: Reason) -> Self {
        Self::Failed(reason)
    }
}

impl From<Shortage> for Trouble {
    fn from(shortage: Shortage) -> Self {
        Self::Unsent(Obstacle::Shortage(shortage))
    }
}
