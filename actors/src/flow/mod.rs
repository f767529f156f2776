//! What bounds and wakes the stages: bells, gates, slots, owners and progress marks; what they want an operator to see; and
//! how remote services are called. They outlive the actors that use them, so that a restarted actor finds them as they were.

mod bell;
mod blocking;
mod call;
mod delete;
mod file_rates;
mod gate;
mod held;
mod holds;
mod insist;
mod meter;
mod owners;
mod pace;
mod places;
mod progress;
mod slots;
mod spans;
mod traffic;
mod trouble_board;
mod worker;

pub use bell::{Bell, Bells};
pub use blocking::blocking;
pub use call::{Call, Service, again, back_off};
pub use delete::delete_entries;
pub use file_rates::{FileRate, FileRates};
pub use gate::Gate;
pub use held::HeldFeeds;
pub use holds::Holds;
pub use insist::insist;
pub use meter::Meter;
pub(crate) use meter::Waits;
pub use owners::{Owner, Owners};
pub use pace::log_rates;
pub use places::{Place, Places};
pub use progress::{Progress, ProgressBoard};
pub use slots::{Slot, Slots};
pub use spans::Tracing;
pub use traffic::{Asking, ConfiguredTraffic, Passage, Seat, TrafficControl};
pub use trouble_board::{FeedNotes, Speaker, TroubleBoard};
pub use worker::{DeliveryStrategy, Worker, WorkerSetup, unused};
