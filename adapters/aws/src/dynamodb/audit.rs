//! Who ordered what: one item per line, by time.

use postrider_actors::ports::{StoreError, console::AuditLine};
use serde::{Deserialize, Serialize};

use super::{
    files::json,
    item::{BODY, Damaged, Reading, text},
    keys::{self, ledger_key},
    state::Shared,
};

#[derive(Serialize, Deserialize)]
struct Line {
    at: u64,
    by: String,
    verb: String,
    of: String,
    detail: String,
}

impl Shared {
    pub(super) async fn note(&self, line: &AuditLine) -> Result<(), StoreError> {
        let AuditLine { at, by, verb, of, detail } = line.clone();
        // Two operators may order at the same time.
        let mut item = ledger_key(keys::AUDIT_PK, &format!("{:020}#{:08x}", at.0, rand::random::<u32>()));
        item.insert(BODY.to_owned(), text(json(&Line { at: at.0, by, verb, of, detail })?));
        self.calls.put_all("noting an order", &self.calls.tables.ledger, vec![item]).await
    }

    /// Up to `limit` lines, the latest first.
    pub(super) async fn audit(&self, limit: usize) -> Result<Vec<AuditLine>, StoreError> {
        let mut lines = Vec::new();
        let mut from = None;
        while lines.len() < limit {
            let call = self
                .calls
                .in_partition(keys::AUDIT_PK, "", [])
                .scan_index_forward(false)
                .limit(i32::try_from(limit - lines.len()).unwrap_or(i32::MAX))
                .set_exclusive_start_key(from);
            let (items, next) = self.calls.query("reading what was ordered", call).await?;
            for item in &items {
                let line = serde_json::from_str(Reading(item).text(BODY)?).map_err(|_| Damaged(BODY))?;
                let Line { at, by, verb, of, detail } = line;
                lines.push(AuditLine { at: postrider_actors::model::time::UnixMs(at), by, verb, of, detail });
            }
            from = next;
            if from.is_none() {
                break;
            }
        }
        Ok(lines)
    }
}
