//! What keeps a feed, one of its files or a destination from going on until something outside of it changes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::time::UnixMs;

/// Files of one feed that are listed with their trouble.
pub const FILES_MAX: usize = 1_000;

/// One trouble.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// When it began.
    pub since: UnixMs,
    /// What is wrong, for the operator.
    pub reason: String,
}

/// The troubles of one machine, by the names of feeds and destinations that have some.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Troubles {
    /// Of feeds and their files.
    pub feeds: BTreeMap<String, FeedTroubles>,
    /// Why nothing is sent to a destination.
    pub destinations: BTreeMap<String, Trouble>,
}

/// The troubles of one feed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeedTroubles {
    /// Why the feed takes no files, if it is parked (F58).
    pub parked: Option<Trouble>,
    /// Files that can't be taken, read, moved away or reported now, by name; [`FILES_MAX`] at most.
    pub held: BTreeMap<String, Trouble>,
}

impl FeedTroubles {
    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.parked.is_none() && self.held.is_empty()
    }
}
