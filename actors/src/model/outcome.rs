//! The outcome of an attempt, and why a message was given up.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{address::RefusedAddress, time::UnixMs};

/// The reason of a destination that is paused because it answered 410.
pub const GONE: &str = "it answered 410 Gone";

/// Why an attempt failed. The numbers are stored: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Reason {
    /// The receiver answered with a status other than 2xx; the status says which.
    Status = 1,
    /// No complete answer within the destination's total timeout.
    Timeout = 2,
    /// The connection could not be opened.
    Connect = 3,
    /// The host name could not be resolved.
    Dns = 4,
    /// The TLS handshake failed or the certificate was refused.
    Tls = 5,
    /// The connection broke after the request had begun: whether it arrived is unknown.
    Reset = 6,
    /// The answer was not HTTP, exceeded a limit on heads or bodies, or did not say what became of this message.
    Protocol = 7,
    /// The body could not be rendered from the template.
    Render = 8,
    /// The attempt's own task panicked.
    Panic = 9,
    /// The process or worker died while it was delivering this message, again and again.
    Poison = 10,
    /// The database refused the row.
    Refused = 11,
    /// The database could not take rows at all: no connection, no answer in time, a lock, a missing table.
    Unavailable = 12,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Status,
        Self::Timeout,
        Self::Connect,
        Self::Dns,
        Self::Tls,
        Self::Reset,
        Self::Protocol,
        Self::Render,
        Self::Panic,
        Self::Poison,
        Self::Refused,
        Self::Unavailable,
    ];

    /// The reason for a stored byte; `None` for a byte that no version wrote.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == byte)
    }

    /// The word that operators see and filter by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Dns => "dns",
            Self::Tls => "tls",
            Self::Reset => "reset",
            Self::Protocol => "protocol",
            Self::Render => "render",
            Self::Panic => "panic",
            Self::Poison => "poison",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
        }
    }
}

/// What this machine has run out of, so that an attempt could not even begin (F72).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shortage {
    /// Of the process (EMFILE) or the machine (ENFILE).
    Descriptors,
    /// No free port towards that address (EADDRNOTAVAIL).
    Ports,
    /// The kernel's, for sockets (ENOBUFS, ENOMEM).
    Memory,
}

impl Shortage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Descriptors, Self::Ports, Self::Memory];

    /// The word for logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Ports => "ports",
            Self::Memory => "memory",
        }
    }
}

/// Why an attempt could not even begin. It says nothing about the message, which is charged with nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// This machine has run out of something (F72).
    Shortage(Shortage),
    /// The destination leads to an address that its configuration does not allow (F54). That is a slip in the
    /// configuration, or somebody else's answer to a name lookup: the messages wait until it is put right.
    Address(RefusedAddress),
}

impl Obstacle {
    /// The words for metric labels.
    pub const WORDS: [&'static str; Shortage::ALL.len() + 1] = ["descriptors", "ports", "memory", "address"];

    /// Its place in [`Obstacle::WORDS`].
    pub fn index(self) -> usize {
        match self {
            Self::Shortage(shortage) => shortage as usize,
            Self::Address(_) => Shortage::ALL.len(),
        }
    }
}

/// The outcome of one attempt, as the webhook port reports it. Whether a failed one is retried is the
/// retry schedule's decision, not the adapter's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// 2xx.
    Sent {
        /// The HTTP status.
        status: u16,
    },
    /// May succeed later: 408, 425, 429, 5xx, timeout, connection trouble.
    Retryable {
        /// The HTTP status, 0 if there was no answer.
        status: u16,
        /// Why.
        reason: Reason,
        /// `Retry-After`, already turned into a delay and clamped to be finite and not negative.
        retry_after: Option<Duration>,
    },
    /// Will not succeed later: any other 4xx, 3xx, a body that can't be rendered.
    Permanent {
        /// The HTTP status, 0 if there was no answer.
        status: u16,
        /// Why.
        reason: Reason,
    },
    /// 410: the destination itself is gone. It is disabled and its messages are held, this one too.
    Gone,
    /// Nothing left this machine, for a reason that is its own: no attempt was made, and the message is charged with
    /// nothing.
    Unsent(Obstacle),
}

/// One failed attempt in a message's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When it ended.
    pub at: UnixMs,
    /// The HTTP status, 0 if there was no answer.
    pub status: u16,
    /// Why it failed.
    pub reason: Reason,
}

/// Why a message was given up. The numbers are stored: append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum DeathCause {
    /// An answer that no retry can change.
    Permanent = 1,
    /// `retry.max_attempts` were made.
    Attempts = 2,
    /// It became older than `retry.max_age_s`.
    Age = 3,
    /// Its delivery killed its worker or process `lost_lease_cap` times.
    Poison = 4,
}

impl DeathCause {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Permanent, Self::Attempts, Self::Age, Self::Poison];

    /// The cause for a stored byte; `None` for a byte that no version wrote.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| *cause as u8 == byte)
    }

    /// The word that operators see and filter by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permanent => "permanent",
            Self::Attempts => "attempts",
            Self::Age => "age",
            Self::Poison => "poison",
        }
    }
}

/// What is to be recorded for one message of a leased batch, after the retry schedule has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// 2xx at `at`.
    Sent {
        /// When the answer came.
        at: UnixMs,
        /// The HTTP status.
        status: u16,
    },
    /// Due again at `not_before`.
    Retry {
        /// The attempt that failed.
        attempt: Attempt,
        /// When the next attempt may be made.
        not_before: UnixMs,
    },
    /// Given up.
    Dead {
        /// The last attempt.
        attempt: Attempt,
        /// Why there is no other.
        cause: DeathCause,
    },
}

#[cfg(test)]
mod tests {
    use super::{super::address::AddressGuard, *};

    #[test]
    fn obstacles_have_words() {
        for shortage in Shortage::ALL {
            assert_eq!(Obstacle::WORDS[Obstacle::Shortage(shortage).index()], shortage.as_str());
        }
        let refused = AddressGuard::default().check([127, 0, 0, 1].into()).unwrap_err();
        assert_eq!(Obstacle::WORDS[Obstacle::Address(refused).index()], "address");
    }

    #[test]
    fn stored_bytes_read_back() {
        for byte in 0..=u8::MAX {
            if let Some(reason) = Reason::from_byte(byte) {
                assert_eq!(reason as u8, byte);
            }
            if let Some(cause) = DeathCause::from_byte(byte) {
                assert_eq!(cause as u8, byte);
            }
        }
        assert_eq!((0..=u8::MAX).filter_map(Reason::from_byte).count(), 12);
        assert_eq!((0..=u8::MAX).filter_map(DeathCause::from_byte).count(), 4);
    }
}
