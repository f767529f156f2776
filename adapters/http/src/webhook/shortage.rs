//! What this machine lacks, told from what the receiver and the way to it did: only the latter is evidence about a
//! message (F72).

use std::{fs::File, io};

use postrider_actors::model::outcome::{Obstacle, Reason, Shortage};
use rustix::io::Errno;

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

/// What is missing, if that is what `error` says.
pub(super) fn shortage(error: &io::Error) -> Option<Shortage> {
    match Errno::from_io_error(error)? {
        Errno::MFILE | Errno::NFILE => Some(Shortage::Descriptors),
        Errno::ADDRNOTAVAIL => Some(Shortage::Ports),
        Errno::NOBUFS | Errno::NOMEM => Some(Shortage::Memory),
        _ => None,
    }
}

/// What may be missing now, after a failure that does not say: the resolver reports a socket that it could not open as a
/// name that it could not find.
pub(super) fn shortage_now() -> Option<Shortage> {
    File::open("/dev/null").err().and_then(|error| shortage(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f72_only_what_this_machine_lacks_is_a_shortage() {
        let of = |errno: Errno| shortage(&errno.into());
        assert_eq!(of(Errno::MFILE), Some(Shortage::Descriptors));
        assert_eq!(of(Errno::NFILE), Some(Shortage::Descriptors));
        assert_eq!(of(Errno::ADDRNOTAVAIL), Some(Shortage::Ports));
        assert_eq!(of(Errno::NOBUFS), Some(Shortage::Memory));
        assert_eq!(of(Errno::NOMEM), Some(Shortage::Memory));
        for errno in
            [Errno::CONNREFUSED, Errno::CONNRESET, Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::TIMEDOUT]
        {
            assert_eq!(of(errno), None, "{errno:?}");
        }
        assert_eq!(shortage(&io::Error::other("not the system's")), None);
    }
}
