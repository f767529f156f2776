//! The command line.

pub mod receiver;
