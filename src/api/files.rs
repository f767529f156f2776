use std::cmp::Reverse;

use actix_web::{
    HttpRequest,
    web::{Path, Query},
};
use postrider_actors::{
    model::file::{FileReport, Stage},
    ports::console::{DeadFilter, FileSelector},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Answer, State, answer, caller,
    dead::grouped,
    desk::{Clerk, bad_cursor},
    limit,
    live::untaken,
};
use crate::{
    ops::{access::Role, problem::Problem},
    shapes::{File, FileDetail, RefusedRow, StateCount},
};

/// Files that a list looks through, the latest.
const FILES_MAX: usize = 10_000;
/// Groups of dead letters that are shown with a file.
const GROUPS_MAX: usize = 20;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesQuery {
    /// A state, or `open` for all that are not settled
    #[param(inline)]
    state: Option<WantedState>,
    feed: Option<String>,
    destination: Option<String>,
    /// Part of the name, in any case
    q: Option<String>,
    #[param(inline)]
    #[serde(default)]
    sort: Sort,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// A state of a file, or several.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum WantedState {
    Open,
    Reading,
    Sending,
    Held,
    Waiting,
    Done,
    Failed,
}

impl WantedState {
    fn takes(self, file: &File) -> bool {
        let state = match self {
            Self::Open => return file.is_open(),
            Self::Reading => Stage::Reading,
            Self::Sending => Stage::Sending,
            Self::Held => Stage::Held,
            Self::Waiting => Stage::Waiting,
            Self::Done => Stage::Done,
            Self::Failed => Stage::Failed,
        };
        file.state == state.as_str()
    }
}

/// What comes first.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Sort {
    #[default]
    Newest,
    Oldest,
    Name,
    Rows,
    Left,
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

/// Files
#[utoipa::path(get, path = "/api/v1/files", params(FilesQuery),
    responses((status = 200, description = "", body = Files), (status = 400, description = "A parameter is wrong")))]
pub(super) async fn list(api: State, query: Query<FilesQuery>) -> Answer<Files> {
    let query = query.into_inner();
    let limit = limit(query.limit)?;
    let from: usize = match &query.cursor {
        None => 0,
        Some(cursor) => cursor.parse().map_err(|_| bad_cursor())?,
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
        query.state.is_none_or(|state| state.takes(file))
            && query.feed.as_ref().is_none_or(|feed| file.feed == *feed)
            && query.destination.as_ref().is_none_or(|name| file.to.contains(name))
            && wanted.as_ref().is_none_or(|wanted| file.name.to_lowercase().contains(wanted))
    });
    query.sort.sort(&mut files);
    let total = files.len();
    let next = (from.saturating_add(limit) < total).then(|| (from + limit).to_string());
    let items = files.into_iter().skip(from).take(limit).collect();
    answer(Files { items, next, total, cut })
}

impl Sort {
    fn sort(self, files: &mut [File]) {
        match self {
            // What can't be taken has no time, and comes first.
            Self::Newest => {
                files.sort_by_key(|file| Reverse(file.claimed_at.map_or((1, None), |at| (0, Some(at)))));
            }
            Self::Oldest => files.sort_by_key(|file| file.claimed_at.map_or((1, None), |at| (0, Some(at)))),
            Self::Name => files.sort_by(|one, other| one.name.cmp(&other.name)),
            Self::Rows => files.sort_by_key(|file| Reverse(file.rows)),
            Self::Left => files.sort_by_key(|file| Reverse(file.open)),
        }
    }
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
        let groups = if dead > 0 { grouped(clerk, &filter, GROUPS_MAX)?.groups } else { Vec::new() };
        let counts = clerk.rows(|rows| rows.ask(|view| view.counts(Some(id))))?;
        let receipts = counts.map(|counts| counts.iter().map(StateCount::from).collect());
        let file = File::of(&report, &live.facts(&report, &live.sources().troubles.all(), now), now);
        Ok(FileDetail::of(&report, file, groups, receipts, now))
    });
    answer(detail.await?)
}

/// Refused rows that are read at once: each may be 64 KiB long.
const REFUSED_PAGE: usize = 100;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct RejectsQuery {
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// A page of rows that were refused.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Rejects {
    /// All of the file.
    total: u64,
    items: Vec<RefusedRow>,
    /// For the parameter `cursor`; `null`: there is no more.
    next: Option<String>,
}

/// The rows of a file that were refused, in their order
///
/// `NAME.rejects.csv` beside the file holds them whole. What stood in a row is shown to who may operate.
#[utoipa::path(get, path = "/api/v1/files/{file}/rejects", params(("file" = String, Path), RejectsQuery),
    responses((status = 200, description = "", body = Rejects), (status = 404, description = "No such file"),
        (status = 409, description = "Several files have that name")))]
pub(super) async fn rejects(
    api: State,
    request: HttpRequest,
    name: Path<String>,
    query: Query<RejectsQuery>,
) -> Answer<Rejects> {
    let (name, RejectsQuery { limit: asked, cursor }) = (name.into_inner(), query.into_inner());
    let limit = limit(asked)?;
    let mut after: u64 = match cursor {
        None => 0,
        Some(cursor) => cursor.parse().map_err(|_| bad_cursor())?,
    };
    let shows_text = caller(&request).role == Role::Operate;
    let page = api.desk.ask(move |clerk| {
        let report = find(clerk, &name)?;
        let mut items = Vec::new();
        let next = loop {
            let left = limit - items.len();
            if left == 0 {
                break clerk.read(|view| view.rejects(report.file.id, after, 1))?.first().map(|_| after);
            }
            let page = clerk.read(|view| view.rejects(report.file.id, after, left.min(REFUSED_PAGE)))?;
            let Some(last) = page.last() else { break None };
            after = last.row;
            items.extend(page.into_iter().map(|reject| RefusedRow::of(reject, shows_text)));
        };
        Ok(Rejects { total: report.rejected, items, next: next.map(|row| row.to_string()) })
    });
    answer(page.await?)
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
