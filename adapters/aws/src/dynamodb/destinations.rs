//! Destinations: which there are, and which are disabled.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{model::time::UnixMs, ports::StoreError};

use super::{
    cache::CACHED_MAX,
    cache::lock,
    change::{Change, When},
    item::{DISABLED_AT, Damaged, Item, REASON, Reading, SK, TOPIC, number, text},
    keys::{self, ledger_key},
    state::{DestinationNames, Shared},
};

/// How old the list of disabled destinations may be, but for what this process has changed in it.
const DISABLED_AGE_MAX: Duration = Duration::from_secs(10);

impl Shared {
    /// Every destination that was ever appended to or disabled; since when and why it is disabled.
    pub(super) async fn known_destinations(
        &self,
    ) -> Result<BTreeMap<String, Option<(UnixMs, String)>>, StoreError> {
        let items = self.calls.partition("reading destinations", keys::DESTINATIONS_PK, "").await?;
        let read = |item: &Item| {
            let reading = Reading(item);
            let name = reading.text(SK)?.to_owned();
            let at = reading.maybe_number(DISABLED_AT)?;
            let reason = reading.maybe_text(REASON)?.unwrap_or_default().to_owned();
            Ok((name, at.map(|at| (UnixMs(at), reason))))
        };
        let read: Result<_, Damaged> = items.iter().map(read).collect();
        Ok(read?)
    }

    /// The actions that make destinations known, with the first step for them that this process appends.
    pub(super) fn register(&self, names: &[String]) -> Result<Vec<TransactWriteItem>, StoreError> {
        let registered = lock(&self.registered);
        let new = names.iter().filter(|name| !registered.contains(&***name));
        let action = |name: &String| {
            let key = ledger_key(keys::DESTINATIONS_PK, name);
            Change::of(&self.calls.tables.ledger, key).set(TOPIC, text(&**name)).action()
        };
        new.map(action).collect()
    }

    /// They are known now.
    pub(super) fn registered(&self, names: &[String]) {
        let mut registered = lock(&self.registered);
        for name in names {
            if registered.len() < CACHED_MAX {
                registered.insert(name.clone());
            }
        }
    }

    /// The disabled destinations, some seconds old at most.
    pub(super) async fn disabled_set(&self) -> Result<DestinationNames, StoreError> {
        let now = self.clock.mono();
        if let Some((at, known)) = &*lock(&self.disabled)
            && now.since(*at) < DISABLED_AGE_MAX
        {
            return Ok(known.clone());
        }
        let known = self.known_destinations().await?;
        let names = known.into_iter().filter(|(_, disabled)| disabled.is_some());
        let names: DestinationNames = Arc::new(names.map(|(name, _)| name.into()).collect());
        *lock(&self.disabled) = Some((now, names.clone()));
        Ok(names)
    }

    pub(super) async fn disabled(&self) -> Result<Vec<Arc<str>>, StoreError> {
        Ok(self.disabled_set().await?.iter().cloned().collect())
    }

    pub(super) async fn disable(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        let key = ledger_key(keys::DESTINATIONS_PK, name);
        let change = Change::of(&self.calls.tables.ledger, key)
            .set(DISABLED_AT, number(at.0))
            .set(REASON, text(reason))
            // The first reason stands.
            .when(When::Missing(DISABLED_AT));
        self.calls.update("disabling a destination", change).await?.ok();
        *lock(&self.disabled) = None;
        Ok(())
    }

    pub(super) async fn enable(&self, name: &str) -> Result<bool, StoreError> {
        let key = ledger_key(keys::DESTINATIONS_PK, name);
        let change = Change::of(&self.calls.tables.ledger, key)
            .remove(DISABLED_AT)
            .remove(REASON)
            .when(When::Exists(DISABLED_AT));
        let was_disabled = self.calls.update("enabling a destination", change).await?.is_ok();
        *lock(&self.disabled) = None;
        Ok(was_disabled)
    }
}
