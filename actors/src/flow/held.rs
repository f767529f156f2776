use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use postrider_settings::Outbox;

use crate::model::room::{OpenMessages, holders};

/// The destinations that hold each feed up that waits.
type HoldersByFeed = BTreeMap<Arc<str>, Vec<Arc<str>>>;

/// Which feeds wait for room, and which destinations hold them up. Clones are the same one: feeds write it, probes and
/// alarms read it.
#[derive(Clone, Debug, Default)]
pub struct HeldFeeds(Arc<Mutex<HoldersByFeed>>);

impl HeldFeeds {
    /// Whether `feed` may take more in for `destinations`; it says so when that changes.
    pub fn allows<'a>(
        &self,
        feed: &Arc<str>,
        destinations: impl IntoIterator<Item = &'a str>,
        bounds: &Outbox,
        open: &OpenMessages,
    ) -> bool {
        let mut held = self.lock();
        let was_held = held.contains_key(feed);
        let by = holders(bounds, open, destinations, was_held);
        if by.is_empty() {
            if held.remove(feed).is_some() {
                tracing::info!(%feed, "its destinations have room: intake goes on");
            }
            return true;
        }
        if !was_held {
            let high_watermark = bounds.high_watermark;
            tracing::warn!(%feed, destinations = by.join(", "), high_watermark,
                "intake pauses: these destinations hold too many open messages");
        }
        held.insert(feed.clone(), by.into_iter().map(Into::into).collect());
        false
    }

    /// Forgets all feeds but these: the others are not configured any more.
    pub fn keep(&self, is_configured: impl Fn(&str) -> bool) {
        self.lock().retain(|feed, _| is_configured(feed));
    }

    /// The feeds that wait, and for which destinations.
    pub fn list(&self) -> Vec<(Arc<str>, Vec<Arc<str>>)> {
        self.lock().iter().map(|(feed, by)| (feed.clone(), by.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HoldersByFeed> {
        // Changed by infallible steps only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
