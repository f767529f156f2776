//! What Postrider's servers and clients share.

pub mod listener;
pub mod shortage;
pub mod tls;
