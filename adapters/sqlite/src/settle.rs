//! `Ledger::settle`: recording what became of messages, by the rules of `model::ledger`.

use postrider_actors::ports::{Settled, Settlement};

use super::{
    stored::Stored,
    tx::{Tx, TxError},
};

/// Records one settlement. Those of one batch in one transaction see each other (B7).
pub(crate) fn settle(tx: &mut Tx<'_>, settlement: &Settlement) -> Result<Settled, TxError> {
    let id = settlement.token.batch;
    let Some(mut stored) = Stored::by_id(tx.connection, id)? else {
        tracing::warn!(batch = %id, "settled a batch that the store does not know");
        return Ok(Settled::Stale);
    };
    let changes = stored
        .record
        .settle(settlement.standing())
        .map_err(|rejected| TxError::Refused(format!("settling batch {id}: {rejected}")))?;
    stored.store_changes(tx, &changes)?;
    Ok(Settled::of(&changes, &stored.record))
}
