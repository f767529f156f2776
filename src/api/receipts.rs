use std::collections::BTreeSet;

use actix_web::web::Query;
use postrider_actors::ports::console::receipts::ReceiptFilter;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Answer, Items, State, answer, limit};
use crate::shapes::{Gaps, Held, Rejected, Source, StateCount};

/// What is known of receipts.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Receipts {
    /// Whether there is a ledger of rows.
    kept: bool,
    sources: Vec<Source>,
    /// Messages by destination and state. `null`: to count all of them would read every row.
    counts: Option<Vec<StateCount>>,
    /// Messages that were sent and have had no final receipt.
    gaps: Vec<Gaps>,
}

/// Sources of receipts, and what has had none
#[utoipa::path(get, path = "/api/v1/receipts", responses((status = 200, description = "", body = Receipts)))]
pub(super) async fn overview(api: State) -> Answer<Receipts> {
    let now = api.now();
    let found = api.desk.ask(move |clerk| {
        let config = clerk.config();
        let destinations = config.receipt_sources.iter().map(|source| source.destination.clone());
        let destinations: BTreeSet<_> = destinations.collect();
        let found = clerk.rows(|rows| {
            let sources = rows.ask(|view| view.sources())?;
            let mut gaps = Vec::new();
            for destination in destinations {
                let ages = rows.ask(|view| view.gap_ages(&destination, now))?;
                gaps.push(Gaps { destination, ages: Gaps::ages(&ages) });
            }
            let sources = sources.iter().map(Source::from).collect();
            Ok(Receipts { kept: true, sources, counts: None, gaps })
        })?;
        Ok(found.unwrap_or_default())
    });
    answer(found.await?)
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ReceiptsQuery {
    source: Option<String>,
    destination: Option<String>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
}

impl ReceiptsQuery {
    fn filter(&self) -> ReceiptFilter {
        ReceiptFilter { source: self.source.clone(), destination: self.destination.clone() }
    }
}

/// Receipts that wait for their message, the longest waiting first
#[utoipa::path(get, path = "/api/v1/receipts/parked", params(ReceiptsQuery), responses((status = 200, description = "", body = Items<Held>)))]
pub(super) async fn parked(api: State, query: Query<ReceiptsQuery>) -> Answer<Items<Held>> {
    let (which, limit) = (query.filter(), limit(query.limit)?);
    let found = api.desk.ask(move |clerk| clerk.rows(|rows| rows.ask(|view| view.parked(&which, limit))));
    answer(Items { items: found.await?.unwrap_or_default().iter().map(Held::from).collect() })
}

/// Receipts whose message never came, the latest first
#[utoipa::path(get, path = "/api/v1/receipts/orphans", params(ReceiptsQuery), responses((status = 200, description = "", body = Items<Held>)))]
pub(super) async fn orphans(api: State, query: Query<ReceiptsQuery>) -> Answer<Items<Held>> {
    let (which, limit) = (query.filter(), limit(query.limit)?);
    let found = api.desk.ask(move |clerk| clerk.rows(|rows| rows.ask(|view| view.orphans(&which, limit))));
    answer(Items { items: found.await?.unwrap_or_default().iter().map(Held::from).collect() })
}

/// Receipts that could not be read, the latest first
#[utoipa::path(get, path = "/api/v1/receipts/rejects", params(ReceiptsQuery), responses((status = 200, description = "", body = Items<Rejected>)))]
pub(super) async fn rejects(api: State, query: Query<ReceiptsQuery>) -> Answer<Items<Rejected>> {
    let (which, limit) = (query.filter(), limit(query.limit)?);
    let found = api.desk.ask(move |clerk| clerk.rows(|rows| rows.ask(|view| view.rejects(&which, limit))));
    answer(Items { items: found.await?.unwrap_or_default().iter().map(Rejected::from).collect() })
}
