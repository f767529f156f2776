//! What a queue between processes carries, and what the store says is to be sent.

use std::{sync::Arc, time::Duration};

use super::{ids::BatchId, time::UnixMs};

/// All that an entry of a queue says (B18): that a batch has something to deliver. The store is the truth; an entry
/// that is lost, doubled, late or of a batch that is long settled costs a call and never a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hint {
    /// The batch.
    pub batch: BatchId,
    /// Not to be claimed before then.
    pub due: UnixMs,
}

/// A hint to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// What is sent.
    pub hint: Hint,
    /// Which sending of its process it is. With the hint it tells a repeated call from a batch that is sent again.
    pub sending: u64,
    /// Where the transport keeps order, hints of one lane come in the order in which they were sent, and none while
    /// others of it are in flight.
    pub lane: u32,
}

/// Names one delivery of an entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub Arc<str>);

/// An entry that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// What it says.
    pub hint: Hint,
    /// What to name it by.
    pub handle: Handle,
}

/// What a transport can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportLimits {
    /// Entries per call.
    pub entries: usize,
    /// The longest delay of an entry; zero where no single entry can be delayed.
    pub delay: Duration,
    /// The longest that an entry can be hidden.
    pub hidden: Duration,
    /// Whether entries of one lane come in order, the next when those before are deleted.
    pub keeps_order: bool,
}

/// How many entries a queue holds. Its parts are counted at different moments: it is a gauge, no proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    /// Ready to be received.
    pub visible: u64,
    /// Received and hidden.
    pub in_flight: u64,
    /// Sent with a delay that has not run out.
    pub delayed: u64,
}

impl QueueDepth {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.visible + self.in_flight + self.delayed
    }
}

/// How a batch came to be due, as far as it matters for who has been sent a hint of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This process appended it, or left it to be tried again: nobody else sends a hint of it for now.
    Fresh,
    /// It was found in the store: another process appended it or left it, or an earlier life of this one, and may have
    /// sent a hint of it.
    Found,
    /// An earlier life of this process holds it: nobody else may claim it before that claim runs out.
    Mine,
}

/// A batch that is due and that nobody has claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueBatch {
    /// The batch.
    pub id: BatchId,
    /// Where it goes.
    pub destination: Arc<str>,
    /// Equal for batches of one file: see [`Outgoing::lane`].
    pub lane: u32,
    /// How many messages of it are open.
    pub open: u32,
    /// When the first of them may be delivered.
    pub due: UnixMs,
    /// How it came to be due.
    pub origin: Origin,
}
