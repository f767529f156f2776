//! Storing, reading and keeping what batches carry.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use postrider_actors::{
    model::{ids::BatchId, time::UnixMs},
    ports::{Fetched, StoreError},
};

use super::{
    cache::lock,
    calls::{GetOutcome, StatementOutcome},
    change::{Change, When},
    item::{DIGEST, EXPIRES_AT, KEPT_UNTIL, PK, number},
    payload::{NewPayload, Payload, PayloadId},
    record::StoredBatch,
    state::Shared,
};

/// The part of a payload's life that its batches don't count on: another machine that is given the same file may put it
/// with an expiry of its own, by its own clock and some seconds late. A day of sixty.
const UNCOUNTED: u32 = 64;

impl Shared {
    /// When what is put now expires, and until when its batches may say that it is kept.
    fn kept_until(&self) -> (UnixMs, UnixMs) {
        let life = self.settings.payload_life;
        let expires = self.clock.wall().after(life);
        (expires, expires.before(life / UNCOUNTED))
    }

    /// Whether what is kept until then is to be kept for longer.
    fn is_half_over(&self, until: UnixMs) -> bool {
        until < self.clock.wall().after(self.settings.payload_life / 2)
    }

    /// Stores payloads ahead of the batches that need them, each once; until when each is kept. A write is half as dear
    /// outside of a transaction, and needs no condition: what is there already has the same content, and is kept longer.
    pub(super) async fn put_payloads(
        &self,
        new: Vec<NewPayload>,
    ) -> Result<BTreeMap<PayloadId, UnixMs>, StoreError> {
        let (expires, until) = self.kept_until();
        let mut kept = BTreeMap::new();
        let mut missing: BTreeMap<PayloadId, NewPayload> = BTreeMap::new();
        for payload in new {
            let put = lock(&self.payloads).kept_until(payload.id);
            match put.filter(|until| !self.is_half_over(*until)) {
                Some(until) => {
                    kept.insert(payload.id, until);
                }
                None => {
                    missing.insert(payload.id, payload);
                }
            }
        }
        let items = missing.values().map(|payload| payload.item(expires)).collect();
        self.calls.put_all("storing payloads", &self.calls.tables.outbox, items).await?;
        let mut remembered = lock(&self.payloads);
        for (id, new) in missing {
            kept.insert(id, until);
            remembered.insert(id, new.payload, Some(until));
        }
        Ok(kept)
    }

    /// What batches carry, whose records are known. What is missing of the answer was not read.
    pub(super) async fn payloads_of(
        &self,
        batches: &[&StoredBatch],
    ) -> Result<HashMap<BatchId, Fetched>, StoreError> {
        let mut fetched = HashMap::with_capacity(batches.len());
        let mut missing: Vec<&StoredBatch> = Vec::new();
        {
            let remembered = lock(&self.payloads);
            for &stored in batches {
                match remembered.get(stored.payload) {
                    _ if stored.is_archived => {
                        fetched.insert(stored.id, Fetched::Missing);
                    }
                    Some(payload) => {
                        fetched.insert(stored.id, Fetched::Batch(stored.batch(payload)));
                    }
                    None => missing.push(stored),
                }
            }
        }
        if missing.is_empty() {
            return Ok(fetched);
        }
        let keys: Vec<_> = missing.iter().map(|stored| stored.payload.key()).collect();
        let got = self.calls.get_many("reading payloads", &self.calls.tables.outbox, &keys, None).await?;
        for (stored, got) in missing.into_iter().zip(got) {
            let answer = match got {
                GetOutcome::Item(item) => match Payload::read(item) {
                    Ok((id, payload)) => {
                        let batch = stored.batch(&payload);
                        lock(&self.payloads).insert(id, payload, None);
                        Fetched::Batch(batch)
                    }
                    Err(damaged) => {
                        tracing::error!(batch = %stored.id, payload = %stored.payload, %damaged, "a batch's rows are damaged");
                        Fetched::Missing
                    }
                },
                GetOutcome::Missing => Fetched::Missing,
                GetOutcome::Unprocessed => Fetched::Unprocessed,
            };
            fetched.insert(stored.id, answer);
        }
        Ok(fetched)
    }

    /// Which of these are stored.
    pub(super) async fn stored_payloads(
        &self,
        ids: impl Iterator<Item = PayloadId>,
    ) -> Result<BTreeSet<PayloadId>, StoreError> {
        let ids: BTreeSet<_> = ids.collect();
        let keys: Vec<_> = ids.iter().map(|id| id.key()).collect();
        let table = &self.calls.tables.outbox;
        let found = self.calls.get_many("looking for payloads", table, &keys, Some(&[DIGEST])).await?;
        let mut there = BTreeSet::new();
        for (id, got) in ids.into_iter().zip(found) {
            match got {
                GetOutcome::Item(_) => {
                    there.insert(id);
                }
                GetOutcome::Missing => {}
                GetOutcome::Unprocessed => {
                    return Err(StoreError::Retryable(
                        "looking for payloads: some were not looked for".into(),
                    ));
                }
            }
        }
        Ok(there)
    }

    /// Has the payloads of batches that still need them kept for longer, if half of their time is over. Of `batches`:
    /// the batch, its payload and until when that is kept.
    pub(super) async fn keep_payloads(
        &self,
        batches: impl IntoIterator<Item = (BatchId, PayloadId, UnixMs)>,
    ) -> Result<(), StoreError> {
        let old: Vec<_> = batches.into_iter().filter(|(_, _, until)| self.is_half_over(*until)).collect();
        if old.is_empty() {
            return Ok(());
        }
        let (expires, until) = self.kept_until();
        let [expires, until] = [expires, until].map(|at| number(at.0 / 1000));
        let mut ids: Vec<_> = old.iter().map(|(_, payload, _)| *payload).collect();
        ids.sort_unstable();
        ids.dedup();
        let keep = |id: &PayloadId| {
            Change::of(&self.calls.tables.outbox, id.key()).set(EXPIRES_AT, expires.clone()).statement()
        };
        let answers = self.calls.execute("keeping payloads", ids.iter().map(keep).collect()).await;
        let kept: BTreeMap<_, _> = ids.into_iter().zip(answers).collect();
        for (batch, payload, _) in &old {
            if matches!(kept[payload], StatementOutcome::Refused) {
                tracing::error!(%batch, %payload, "its rows have expired, for no daemon ran for too long: it can't be sent");
            }
        }
        // Only then, so that a batch never says more of its payload than is so.
        let note = old.iter().filter(|(_, payload, _)| matches!(kept[payload], StatementOutcome::Done)).map(
            |(id, ..)| {
                Change::of(&self.calls.tables.ledger, StoredBatch::key(*id))
                    .set(KEPT_UNTIL, until.clone())
                    .when(When::Exists(PK))
                    .statement()
            },
        );
        self.calls.execute("noting what is kept", note.collect()).await;
        Ok(())
    }
}
