//! Supervision (design §8).
//!
//! `actix::Supervisor` restarts an actor that stops, but a panic kills it permanently, and its mailbox is
//! dropped while the process lives on. Here a supervisor owns factories, not addresses. Each child's
//! actor runs in a task of its own under `catch_unwind`; the task's end, however it comes, reaches the
//! supervisor as [`ChildExited`], which rebuilds the child after a backoff, or fails towards its own
//! parent when restarts become too many. The root's failure ends the process with [`EXIT_SOFTWARE`]. What the process can do
//! without, a feed, does not fail towards its parent: it is parked and tried again, with waits that grow ([`Parking`]).
//!
//! Children are listed downstream first: they start in that order and drain in reverse, each rank
//! fully gone before the next is asked.

mod board;
mod child;
mod supervisor;
#[cfg(all(test, feature = "testing"))]
mod tests;

pub use board::{ActorBoard, ActorReport};
pub use child::{Birth, ChildExited, ChildId, Drain, Exit, Fault, Stage};
pub use supervisor::{
    ChildSpec, Factory, Parking, ParkingNotice, Shutdown, Strategy, Supervisor, SupervisorSettings,
};

/// The exit code after an escalation: `EX_SOFTWARE` of sysexits.h.
pub const EXIT_SOFTWARE: i32 = 70;
