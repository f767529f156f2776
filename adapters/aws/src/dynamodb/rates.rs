//! `RateTable`: the leases of a destination's rate, one item changed by compare-and-set.

use postrider_actors::{model::rate_share::RateLeases, ports::StoreError};

use super::{
    change::{Change, When},
    item::{BODY, Damaged, Item, PK, Reading, VERSION, number, text},
    keys::{self, ledger_key},
    state::Shared,
};

fn key(destination: &str) -> Item {
    ledger_key(&keys::rate_pk(destination), "rate")
}

impl Shared {
    pub(super) async fn load_rates(&self, destination: &str) -> Result<RateLeases, StoreError> {
        let Some(item) = self.calls.get("reading a shared rate", key(destination)).await? else {
            return Ok(RateLeases::default());
        };
        let body = Reading(&item).text(BODY)?;
        Ok(serde_json::from_str(body).map_err(|_| Damaged(BODY))?)
    }

    pub(super) async fn store_rates(
        &self,
        destination: &str,
        leases: &RateLeases,
    ) -> Result<bool, StoreError> {
        let Some(before) = leases.version.checked_sub(1) else { return Ok(false) };
        let body = serde_json::to_string(leases)
            .map_err(|error| StoreError::Permanent(format!("a shared rate can't be written: {error}")))?;
        let when = if before == 0 { When::Missing(PK) } else { When::Is(VERSION, number(before)) };
        let change = Change::of(&self.calls.tables.ledger, key(destination))
            .set(VERSION, number(leases.version))
            .set(BODY, text(&*body))
            .when(when);
        let Err(refused) = self.calls.update("storing a shared rate", change).await? else { return Ok(true) };
        // Done by a try that was not answered?
        let is_ours = |item: &Item| Reading(item).text(BODY) == Ok(&*body);
        Ok(refused.as_ref().is_some_and(is_ours))
    }
}
