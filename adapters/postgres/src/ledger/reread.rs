//! Rejects that a command reads again.

use std::{collections::BTreeSet, time::SystemTime};

use postrider_actors::{
    model::receipt::{EventId, ReceiptReject, RejectedText},
    ports::{Reread, Taken},
};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    take::{self, NewEvents, Others},
    values::{self, unix},
    waiting,
};

const REJECTS: &str = "
SELECT event, happened_at, place, reason, text, is_whole FROM receipt_rejects
 WHERE source = (SELECT id FROM sources WHERE name = $1) AND event > $2
 ORDER BY event LIMIT $3";

/// No event is all zeros: it is a digest.
const BEFORE_ALL: EventId = EventId([0; 16]);

const SAY_WHY: &str = "
UPDATE receipt_rejects r SET reason = n.reason FROM unnest($2::uuid[], $3::text[]) AS n (event, reason)
 WHERE r.source = $1 AND r.event = n.event";

impl Shared {
    pub(super) async fn rejects(
        &self,
        source: &str,
        after: Option<EventId>,
        limit: usize,
    ) -> Result<Vec<ReceiptReject>, Failure> {
        let after = Uuid::from_bytes(after.unwrap_or(BEFORE_ALL).0);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let held = self.connections.hold().await?;
        let rows = self
            .within(async { Ok(held.client().query(REJECTS, &[&source, &after, &limit]).await?) })
            .await?;
        held.keep();
        let reject = |row: &Row| ReceiptReject {
            event: EventId(row.get::<_, Uuid>(0).into_bytes()),
            at: row.get::<_, Option<SystemTime>>(1).map(unix),
            place: row.get(2),
            reason: row.get(3),
            text: RejectedText { text: row.get::<_, &str>(4).into(), is_whole: row.get(5) },
        };
        Ok(rows.iter().map(reject).collect())
    }

    /// Locks events before rejects, both in order, as `take` does.
    pub(super) async fn settle_rejects(&self, reread: &Reread) -> Result<Taken, Failure> {
        let Reread { receipts, ignored, rejected, .. } = reread;
        let (source, destination) = self.source_id(&reread.source, &reread.destination).await?;
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        let taken = self
            .within(async {
                let known = receipts.iter().flat_map(|(event, receipt)| [*event, receipt.event]);
                // Each once: a statement knows no row of its own.
                let known: BTreeSet<_> = known.collect();
                let at = values::time(reread.at);
                let remembered =
                    take::remember(&transaction, source, known.into_iter(), at, Others::Expected).await?;
                let is_new = |event: &EventId| remembered.contains_key(event);
                let mut put = BTreeSet::new();
                let new: Vec<_> = receipts
                    .iter()
                    .map(|(_, receipt)| receipt)
                    .filter(|receipt| is_new(&receipt.event) && put.insert(receipt.event))
                    .collect();
                waiting::put(&transaction, source, destination, &new).await?;
                let events = remembered.into_iter().filter(|(event, _)| put.contains(event)).collect();
                let taken = NewEvents::remembered(events).count(receipts.iter().map(|(_, receipt)| receipt));
                let mut gone: Vec<_> = receipts
                    .iter()
                    .map(|(event, _)| event)
                    .chain(ignored)
                    .map(|event| Uuid::from_bytes(event.0))
                    .collect();
                gone.sort_unstable();
                let delete = "DELETE FROM receipt_rejects WHERE source = $1 AND event = ANY ($2)";
                let delete = transaction.prepare_cached(delete).await?;
                transaction.execute(&delete, &[&source, &gone]).await?;
                let events: Vec<_> = rejected.iter().map(|(event, _)| Uuid::from_bytes(event.0)).collect();
                let reasons: Vec<_> = rejected.iter().map(|(_, reason)| values::text(reason)).collect();
                let say_why = transaction.prepare_cached(SAY_WHY).await?;
                transaction.execute(&say_why, &[&source, &events, &reasons]).await?;
                Ok(taken)
            })
            .await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        Ok(taken)
    }
}
