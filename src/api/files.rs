use std::cmp::Reverse;

use actix_web::web::{Path, Query};
use postrider_actors::{
    model::file::FileReport,
    ports::console::{DeadFilter, FileSelector},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Answer, State, answer, dead::grouped, desk::Clerk, limit, live::untaken};
use crate::{
    ops::Problem,
    shapes::{File, FileDetail, StateCount},
};

/// Files that a list looks through, the latest.
const FILES_MAX: usize = 10_000;
/// Groups of dead letters that are shown with a file.
const GROUPS_MAX: usize = 20;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesQuery {
    /// A state, or `open` for all that are not settled
    state: Option<String>,
    feed: Option<String>,
    destination: Option<String>,
    /// Part of the name, in any case
    q: Option<String>,
    /// `newest` (default), `oldest`, `name`, `rows` or `left`
    sort: Option<String>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// A page of files.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Files {
    items: Vec<File>,
    /// For the parameter `cursor`; `null`: there is no more.
    next: Option<String>,
    /// Files that match.
    total: usize,
    /// Whether there are older ones, which were not looked through.
    cut: bool,
}

/// The states of a file, as words.
const STATES: [&str; 7] = ["open", "reading", "sending", "held", "waiting", "done", "failed"];

/// Files
#[utoipa::path(get, path = "/api/v1/files", params(FilesQuery),
    responses((status = 200, description = "", body = Files), (status = 400, description = "A parameter is wrong")))]
pub(super) async fn list(api: State, query: Query<FilesQuery>) -> Answer<Files> {
    let query = query.into_inner();
    let limit = limit(query.limit)?;
    if let Some(state) = query.state.as_deref().filter(|state| !STATES.contains(state)) {
        return Err(Problem::bad(format!("{state:?} is not a state: {}", STATES.join(", "))));
    }
    let from: usize = match &query.cursor {
        None => 0,
        Some(cursor) => cursor.parse().map_err(|_| Problem::bad("cursor: pass `next` of the page before"))?,
    };
    // What binds them is as of now.
    api.live.snapshot().await?;
    let reports = api.desk.ask(|clerk| clerk.read(|view| view.files(None, FILES_MAX))).await?;
    let cut = reports.len() == FILES_MAX;
    let (now, troubles) = (api.now(), api.live.sources().troubles.all());
    let mut files = untaken(&troubles, &reports);
    files.extend(reports.iter().map(|report| File::of(report, &api.live.facts(report, &troubles, now), now)));
    let wanted = query.q.as_deref().map(str::to_lowercase);
    files.retain(|file| {
        let is_state = match query.state.as_deref() {
            None => true,
            Some("open") => file.is_open(),
            Some(state) => file.state == state,
        };
        is_state
            && query.feed.as_ref().is_none_or(|feed| file.feed == *feed)
            && query.destination.as_ref().is_none_or(|name| file.to.contains(name))
            && wanted.as_ref().is_none_or(|wanted| file.name.to_lowercase().contains(wanted))
    });
    sort(&mut files, query.sort.as_deref().unwrap_or("newest"))?;
    let total = files.len();
    let next = (from.saturating_add(limit) < total).then(|| (from + limit).to_string());
    let items = files.into_iter().skip(from).take(limit).collect();
    answer(Files { items, next, total, cut })
}

fn sort(files: &mut [File], by: &str) -> Result<(), Problem> {
    match by {
        // What can't be taken has no time, and comes first.
        "newest" => files.sort_by_key(|file| Reverse(file.claimed_at.map_or((1, None), |at| (0, Some(at))))),
        "oldest" => files.sort_by_key(|file| file.claimed_at.map_or((1, None), |at| (0, Some(at)))),
        "name" => files.sort_by(|one, other| one.name.cmp(&other.name)),
        "rows" => files.sort_by_key(|file| Reverse(file.rows)),
        "left" => files.sort_by_key(|file| Reverse(file.open)),
        _ => return Err(Problem::bad("sort is newest, oldest, name, rows or left")),
    }
    Ok(())
}

/// One file, by its id or its name
#[utoipa::path(get, path = "/api/v1/files/{file}", params(("file" = String, Path)),
    responses((status = 200, description = "", body = FileDetail), (status = 404, description = "No such file"),
        (status = 409, description = "Several files have that name")))]
pub(super) async fn one(api: State, name: Path<String>) -> Answer<FileDetail> {
    let (name, live, now) = (name.into_inner(), api.live.clone(), api.now());
    live.snapshot().await?;
    let detail = api.desk.ask(move |clerk| {
        let report = find(clerk, &name)?;
        let id = report.file.id;
        let filter = DeadFilter { file: Some(FileSelector::Id(id)), ..DeadFilter::default() };
        let dead: u64 = report.destinations.values().map(|counts| counts.dead).sum();
        let mut groups = if dead > 0 { grouped(clerk, &filter)?.groups } else { Vec::new() };
        groups.truncate(GROUPS_MAX);
        let counts = clerk.rows(|rows| rows.ask(|view| view.counts(Some(id))))?;
        let receipts = counts.map(|counts| counts.iter().map(StateCount::from).collect());
        let file = File::of(&report, &live.facts(&report, &live.sources().troubles.all(), now), now);
        Ok(FileDetail::of(&report, file, groups, receipts, now))
    });
    answer(detail.await?)
}

/// The one file with this name or id. Several are not to be guessed at.
pub(super) fn find(clerk: &mut Clerk, name: &str) -> Result<FileReport, Problem> {
    let selector = FileSelector::from(name);
    let mut found = clerk.read(|view| view.files(Some(&selector), GROUPS_MAX))?;
    if found.len() > 1 {
        let ids = found.iter().map(|report| report.file.id.to_string()).collect();
        return Err(Problem::ambiguous(
            format!("several files are called {name:?}; give the id of one"),
            ids,
        ));
    }
    found.pop().ok_or_else(|| Problem::missing(format!("no file is called {name:?}")))
}
