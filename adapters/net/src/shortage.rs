//! What this machine lacks, told from what a peer and the way to it did: only the latter is evidence about a message (F72).

use std::{
    fs::File,
    io,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use postrider_actors::model::outcome::Shortage;
use rustix::io::Errno;
use tokio::time::Instant;

/// For how long a lookup that failed may have failed of what was missing: it says so late, and by then there may be some.
const LATELY: Duration = Duration::from_secs(2);

/// When a descriptor was missing last.
static MISSED: Mutex<Option<Instant>> = Mutex::new(None);

/// What is missing, if that is what `error` says.
pub fn shortage(error: &io::Error) -> Option<Shortage> {
    match Errno::from_io_error(error)? {
        Errno::MFILE | Errno::NFILE => {
            *MISSED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            Some(Shortage::Descriptors)
        }
        Errno::ADDRNOTAVAIL => Some(Shortage::Ports),
        Errno::NOBUFS | Errno::NOMEM => Some(Shortage::Memory),
        _ => None,
    }
}

/// What may be missing, after a failure that does not say: the resolver reports a socket that it could not open as a name
/// that it could not find.
pub fn shortage_lately() -> Option<Shortage> {
    let now = || File::open("/dev/null").err().and_then(|error| shortage(&error));
    let missed = *MISSED.lock().unwrap_or_else(PoisonError::into_inner);
    let lately = missed.is_some_and(|at| at.elapsed() < LATELY);
    if lately { Some(Shortage::Descriptors) } else { now() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn f72_only_what_this_machine_lacks_is_a_shortage() {
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
        // Nor is a lookup that fails just after a descriptor was missing evidence.
        assert_eq!(shortage(&Errno::MFILE.into()), Some(Shortage::Descriptors));
        assert_eq!(shortage_lately(), Some(Shortage::Descriptors));
        tokio::time::advance(LATELY).await;
        assert_eq!(shortage_lately(), None);
    }
}
