//! Claims: leases for a queue that only carries batches. They stand in the same columns as the leases that
//! the embedded queue gives, but their deadline is by the wall clock, and only a claim or a restart finds
//! that it has passed.

use postrider_actors::{
    model::{batch::StateVector, ids::BatchId, lease::is_earlier_life, time::UnixMs},
    ports::{Claim, ClaimRequest, ItemOutcome, LeaseToken},
};
use rusqlite::{OptionalExtension, params};

use super::{
    leases::phase,
    tx::{Phase, Tx, TxError, int, uint},
};

/// What is stored of a batch that is claimed.
struct Claimed {
    seq: i64,
    phase: i64,
    count: u32,
    fence: u64,
    losses: u32,
    holder: Option<String>,
    until_mono: Option<i64>,
    until: Option<i64>,
    states: Option<Vec<u8>>,
    destination: String,
    disabled: bool,
}

/// `Claims::claim`.
pub(crate) fn claim(tx: &Tx<'_>, request: &ClaimRequest) -> Result<Vec<(BatchId, Claim)>, TxError> {
    request.batches.iter().map(|&id| Ok((id, claim_one(tx, request, id)?))).collect()
}

fn claim_one(tx: &Tx<'_>, request: &ClaimRequest, id: BatchId) -> Result<Claim, TxError> {
    let found = tx
        .connection
        .prepare_cached(
            "SELECT b.seq, b.phase, b.count, b.fence, b.losses, b.holder, b.lease_until_mono, b.claimed_until,
                 r.states, n.name, n.disabled_at IS NOT NULL
             FROM batches b JOIN destinations n ON n.seq = b.destination LEFT JOIN results r ON r.batch = b.seq
             WHERE b.id = ?1",
        )?
        .query_row([id.0], |row| {
            Ok(Claimed {
                seq: row.get(0)?,
                phase: row.get(1)?,
                count: row.get(2)?,
                fence: uint(row.get(3)?),
                losses: row.get(4)?,
                holder: row.get(5)?,
                until_mono: row.get(6)?,
                until: row.get(7)?,
                states: row.get(8)?,
                destination: row.get(9)?,
                disabled: row.get(10)?,
            })
        })
        .optional()?;
    let Some(batch) = found else { return Ok(Claim::Missing) };
    let (mut fence, mut losses) = (batch.fence + 1, batch.losses);
    match phase(batch.phase)? {
        Phase::Settled => return Ok(Claim::Settled),
        _ if batch.disabled => {
            return Ok(Claim::Unavailable(format!("destination {} is disabled", batch.destination)));
        }
        Phase::Outstanding | Phase::Queued => {}
        Phase::Leased => {
            // What the embedded queue has leased is no claim; it is taken back at the next start.
            let until = match (batch.until_mono, batch.until) {
                (None, Some(until)) => UnixMs(uint(until)),
                _ => request.until,
            };
            let holder = batch.holder.as_deref().unwrap_or_default();
            if until < request.now || is_earlier_life(holder, &request.holder) {
                losses += 1;
            } else if holder == &*request.holder {
                // Its first answer was lost.
                fence = batch.fence;
            } else {
                return Ok(Claim::Held { until });
            }
        }
    }
    tx.connection
        .prepare_cached(
            "UPDATE batches SET phase = 2, fence = ?2, losses = ?3, holder = ?4, lease_until_mono = NULL,
                 claimed_until = ?5 WHERE seq = ?1",
        )?
        .execute(params![batch.seq, int(fence), losses, &*request.holder, int(request.until.0)])?;
    let states = batch.states.map_or_else(|| StateVector::accepted(batch.count), StateVector);
    Ok(Claim::Granted { fence, losses, states })
}

/// `Claims::extend_claims`.
pub(crate) fn extend(
    tx: &Tx<'_>,
    tokens: &[LeaseToken],
    until: UnixMs,
) -> Result<Vec<(BatchId, ItemOutcome)>, TxError> {
    let mut update = tx
        .connection
        .prepare_cached("UPDATE batches SET claimed_until = ?3 WHERE id = ?1 AND phase = 2 AND fence = ?2")?;
    let mut outcomes = Vec::with_capacity(tokens.len());
    for token in tokens {
        let held = update.execute(params![token.batch.0, int(token.fence), int(until.0)])? == 1;
        let outcome = if held {
            ItemOutcome::Ok
        } else {
            ItemOutcome::Permanent("the claim is not held any more".into())
        };
        outcomes.push((token.batch, outcome));
    }
    Ok(outcomes)
}
