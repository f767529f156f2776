use crate::model::time::{MonoMs, UnixMs};

/// Reads the time. Waiting is tokio's; deciding is `model`'s.
pub trait Clock: Send + Sync {
    /// The wall clock: for schedules that outlive the process, and for records. It may jump.
    fn wall(&self) -> UnixMs;
    /// A clock that never jumps and goes on while the process is stopped: for leases and rates.
    fn mono(&self) -> MonoMs;
}
