//! What Postrider's servers and clients share.

pub mod seats;
pub mod serving;
pub mod shortage;
pub mod tls;
