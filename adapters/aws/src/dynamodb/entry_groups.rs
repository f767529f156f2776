//! The groups of entries that a step of an inbound queue adds to, and what is remembered of groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use postrider_actors::{
    model::entries::{EntryGroup, GroupChange, minute_of},
    ports::EntryId,
};

/// Ids that are remembered, some 20 bytes each …
const IDS_MAX: usize = 200_000;

/// … and groups.
const GROUPS_MAX: usize = 4_096;

/// The minute and the feed.
pub(super) type GroupKey = (u64, Arc<str>);

pub(super) fn key_of(entry: &EntryId) -> GroupKey {
    (minute_of(entry.sent_at), entry.feed.clone())
}

/// Groups as they are known. A copy of one is cheap.
#[derive(Clone, Default)]
pub(super) struct Groups(pub(super) BTreeMap<GroupKey, Arc<EntryGroup>>);

impl Groups {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Which of these were taken before.
    pub(super) fn taken(&self, entries: &[EntryId]) -> Vec<EntryId> {
        let is_taken =
            |entry: &&EntryId| self.0.get(&key_of(entry)).is_some_and(|group| group.has(&entry.id));
        entries.iter().filter(is_taken).cloned().collect()
    }

    /// What adds these, whose groups they are.
    pub(super) fn add(&self, entries: &[EntryId]) -> Vec<(GroupKey, GroupChange)> {
        let change = |(key, group): (&GroupKey, &Arc<EntryGroup>)| {
            let own = entries.iter().filter(|entry| key_of(entry) == *key).map(|entry| &*entry.id);
            (key.clone(), group.add(own))
        };
        self.0.iter().map(change).collect()
    }
}

/// What is remembered of groups.
#[derive(Default)]
pub(super) struct GroupCache {
    known: Groups,
    /// Feeds that another process reads too.
    shared: BTreeSet<Arc<str>>,
}

impl GroupCache {
    pub(super) fn get(&self, key: &GroupKey) -> Option<Arc<EntryGroup>> {
        self.known.0.get(key).cloned()
    }

    pub(super) fn remove(&mut self, key: &GroupKey) -> Option<Arc<EntryGroup>> {
        self.known.0.remove(key)
    }

    pub(super) fn insert(&mut self, key: GroupKey, group: Arc<EntryGroup>) {
        self.known.0.insert(key, group);
        let mut ids: usize = self.known.0.values().map(|group| group.len()).sum();
        // The oldest go first. Whoever needs one again reads it.
        while (ids > IDS_MAX || self.known.0.len() > GROUPS_MAX)
            && let Some((_, oldest)) = self.known.0.pop_first()
        {
            ids -= oldest.len();
        }
    }

    pub(super) fn is_shared(&self, feed: &Arc<str>) -> bool {
        self.shared.contains(feed)
    }

    pub(super) fn note_shared(&mut self, feed: Arc<str>) {
        self.shared.insert(feed);
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::time::UnixMs;

    use super::*;

    #[test]
    fn i8_what_is_remembered_of_entries_is_bounded() {
        let mut cache = GroupCache::default();
        let feed: Arc<str> = "feed".into();
        let few = Arc::new(EntryGroup::default());
        for minute in 0..=GROUPS_MAX as u64 {
            cache.insert((minute, feed.clone()), few.clone());
        }
        assert!(cache.get(&(0, feed.clone())).is_none() && cache.get(&(1, feed.clone())).is_some());
        let many: Vec<_> = (0..=IDS_MAX / 2).map(|number| number.to_string()).collect();
        let mut group = EntryGroup::default();
        group.written(group.add(many.iter().map(String::as_str)));
        for minute in 10_000..10_002 {
            cache.insert((minute, feed.clone()), Arc::new(group.clone()));
        }
        assert!(cache.get(&(10_001, feed.clone())).is_some());
        assert_eq!(cache.known.0.len(), 1, "two of them are too many");
    }

    #[test]
    fn b22_an_entry_is_in_the_group_of_its_feed_and_minute() {
        let entry = |feed: &str, minute: u64| EntryId {
            feed: feed.into(),
            id: "e".into(),
            sent_at: UnixMs(minute * 60_000),
        };
        let entries = [entry("a", 1), entry("a", 2), entry("b", 1)];
        let mut groups = Groups::new();
        for entry in &entries {
            groups.0.insert(key_of(entry), Arc::default());
        }
        let changes = groups.add(&entries);
        assert!(changes.len() == 3 && changes.iter().all(|(_, change)| change.count == 1));
        let (key, change) = changes.into_iter().next().unwrap();
        Arc::make_mut(groups.0.get_mut(&key).unwrap()).written(change);
        assert_eq!(groups.taken(&entries), [entry("a", 1)]);
    }
}
