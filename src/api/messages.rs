use std::time::Duration;

use actix_web::web::Query;
use postrider_actors::{
    model::ids::MessageId,
    ports::console::{Fate, FileSelector, MessageReport, Position, Search, receipts::MessageRow},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::{
    Answer, State, answer,
    desk::{Clerk, bad_cursor},
    limit,
};
use crate::{ops::problem::Problem, shapes::Story};

/// Batches per read of a search: what is held back from the store's log at once.
const SEARCH_BATCHES: usize = 256;
/// How long one request searches.
const SEARCH_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct MessagesQuery {
    /// As in the header `webhook-id`: `msg_FILE_ROW`
    id: Option<String>,
    /// Byte for byte
    recipient: Option<String>,
    /// A file's name or id
    file: Option<String>,
    destination: Option<String>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// What was found.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Found {
    items: Vec<Story>,
    /// For the parameter `cursor`; `null`: everything was looked through.
    next: Option<String>,
    searched: Searched,
}

/// How much was looked through.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Searched {
    batches: u64,
}

/// What happened to a message, or to all messages for a recipient
///
/// By `id` it costs a few reads. A search by `recipient` reads every payload that was accepted and not archived: each request works
/// for two seconds at most and says with `next` where to go on.
#[utoipa::path(get, path = "/api/v1/messages", params(MessagesQuery),
    responses((status = 200, description = "", body = Found), (status = 400, description = "Neither or both of id and recipient"), (status = 404, description = "No such file")))]
pub(super) async fn find(api: State, query: Query<MessagesQuery>) -> Answer<Found> {
    let query = query.into_inner();
    let limit = limit(query.limit)?;
    let found = api.desk.ask(move |clerk| {
        let (ids, next, batches) = match (&query.id, &query.recipient) {
            (Some(id), None) => {
                let id = id.parse::<MessageId>();
                (
                    vec![id.map_err(|_| Problem::bad("id is as in the header webhook-id: msg_FILE_ROW"))?],
                    None,
                    0,
                )
            }
            (None, Some(recipient)) => search(clerk, recipient, &query, limit)?,
            _ => return Err(Problem::bad("give id or recipient")),
        };
        let mut items = Vec::new();
        for id in ids {
            let reports = clerk.read(|view| view.message(id))?;
            let rows = clerk.rows(|rows| rows.ask(|view| view.message(id)))?.unwrap_or_default();
            let wanted = reports.iter().filter(|report| is_wanted(report, query.destination.as_deref()));
            items.extend(wanted.map(|report| Story::of(report, row_of(&rows, report))));
        }
        Ok(Found { items, next, searched: Searched { batches } })
    });
    answer(found.await?)
}

fn is_wanted(report: &MessageReport, destination: Option<&str>) -> bool {
    destination.is_none_or(|wanted| match &report.fate {
        Fate::Message(delivery) => delivery.destination == wanted,
        Fate::Rejected { .. } | Fate::Duplicate => true,
    })
}

fn row_of<'a>(rows: &'a [MessageRow], report: &MessageReport) -> Option<&'a MessageRow> {
    let Fate::Message(delivery) = &report.fate else { return None };
    rows.iter().find(|row| row.id == report.id && *row.destination == *delivery.destination)
}

/// Continues a search. A cursor is the number of the file, the batches so far and the engine's position.
fn search(
    clerk: &mut Clerk,
    recipient: &str,
    query: &MessagesQuery,
    limit: usize,
) -> Result<(Vec<MessageId>, Option<String>, u64), Problem> {
    let files = match query.file.as_deref() {
        None => vec![None],
        Some(name) => {
            let selector = FileSelector::from(name);
            let reports = clerk.read(|view| view.files(Some(&selector), usize::MAX))?;
            if reports.is_empty() {
                return Err(Problem::missing(format!("no file is called {name:?}")));
            }
            reports.iter().map(|report| Some(report.file.id)).collect()
        }
    };
    let (mut number, mut search) = match query.cursor.as_deref() {
        None => (0, Search::default()),
        Some(cursor) => read_cursor(cursor).ok_or_else(bad_cursor)?,
    };
    let (begun, mut found, mut next) = (Instant::now(), Vec::new(), None);
    while let Some(file) = files.get(number) {
        let left = limit - found.len();
        let is_more = clerk.read_on(query.cursor.as_deref(), |view| {
            view.search(&mut search, recipient, *file, SEARCH_BATCHES, left)
        })?;
        found.append(&mut search.found);
        if !is_more {
            number += 1;
            search = Search { batches: search.batches, ..Search::default() };
        }
        if found.len() >= limit || begun.elapsed() >= SEARCH_MAX {
            next =
                (number < files.len()).then(|| format!("{number}.{}.{}", search.batches, search.position.0));
            break;
        }
    }
    // The batches of one row for several destinations need not be neighbours.
    found.sort_unstable();
    found.dedup();
    Ok((found, next, search.batches))
}

fn read_cursor(cursor: &str) -> Option<(usize, Search)> {
    let (number, rest) = cursor.split_once('.')?;
    let (batches, position) = rest.split_once('.')?;
    let search =
        Search { position: Position(position.to_owned()), batches: batches.parse().ok()?, found: Vec::new() };
    Some((number.parse().ok()?, search))
}
