use std::{num::NonZeroU32, time::Duration};

use actix_web::{http::StatusCode, web::Path};
use postrider_actors::{
    model::{
        limits::{CONCURRENCY_MAX, Concurrency, LimitChange, RATE_MAX},
        priority::Priority,
    },
    ports::console::{AuditLine, FileSelector, FilesAt, FilesCount, Order, OrderedFiles},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Answer, Body, State, answer,
    answers::known_destination,
    desk::{BY, Clerk},
    files,
    words::{self, whole},
};
use crate::{app::reload as reloading, ops::problem::Problem, shapes::InFlightLimit};

/// How long a reload is waited for.
const RELOAD_WAIT: Duration = Duration::from_secs(15);

/// What an order did.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ordered {
    /// 0: it was so already.
    changed: usize,
    text: String,
    /// Files that it is about.
    files: Option<u64>,
    /// Their open messages.
    open: Option<u64>,
    dry_run: bool,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PauseOrder {
    /// Why; 256 bytes are kept
    reason: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RateOrder {
    /// Messages per second; `null`: as configured
    #[serde(deserialize_with = "whole")]
    #[schema(required = true, minimum = 1, maximum = 10_000_000)]
    rate_per_s: Option<u32>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ConcurrencyOrder {
    /// Requests in flight, or `"auto"`; `null`: as configured
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required = true)]
    concurrency: Option<InFlightLimit>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FileOrder {
    /// At this destination only
    destination: Option<String>,
    /// Why; 256 bytes are kept
    reason: Option<String>,
    /// Only say how much it would be
    dry_run: Option<bool>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ReleaseOrder {
    /// At this destination only
    destination: Option<String>,
    /// Only say how much it would be
    dry_run: Option<bool>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PriorityOrder {
    #[schema(schema_with = words::priorities)]
    priority: Priority,
    /// At this destination only
    destination: Option<String>,
    /// Only say how much it would be
    dry_run: Option<bool>,
}

/// Gives an order about a destination.
async fn order_destination(
    api: State,
    name: String,
    order: impl FnOnce(&mut Clerk, String) -> Result<Order, Problem> + Send + 'static,
    done: String,
    nothing: &'static str,
) -> Answer<Ordered> {
    let now = api.now();
    let ordered = api.desk.ask(move |clerk| {
        known_destination(clerk, &name)?;
        let order = order(clerk, name.clone())?;
        let changed = clerk.operate(|operate| operate.order(&order, BY, now))?;
        let text = format!("{name} {}", if changed > 0 { &done } else { nothing });
        Ok(Ordered { changed, text, files: None, open: None, dry_run: false })
    });
    let ordered = ordered.await?;
    api.live.look_again();
    answer(ordered)
}

/// Sends nothing more to a destination until it is resumed
#[utoipa::path(post, path = "/api/v1/destinations/{name}/pause", params(("name" = String, Path)), request_body = PauseOrder,
    responses((status = 200, description = "", body = Ordered), (status = 404, description = "No such destination")))]
pub(super) async fn pause(api: State, name: Path<String>, order: Body<PauseOrder>) -> Answer<Ordered> {
    let reason = order.0.reason.unwrap_or_else(|| "paused by an operator".to_owned());
    let order = move |_: &mut Clerk, destination| Ok(Order::Pause { destination, reason });
    let done = "is paused; its messages are held".to_owned();
    order_destination(api, name.into_inner(), order, done, "was paused already; the first reason stands")
        .await
}

/// Sends a paused destination's messages again
#[utoipa::path(post, path = "/api/v1/destinations/{name}/resume", params(("name" = String, Path)), request_body = Nothing,
    responses((status = 200, description = "", body = Ordered), (status = 404, description = "No such destination")))]
pub(super) async fn resume(api: State, name: Path<String>, _: Body<Nothing>) -> Answer<Ordered> {
    let order = |_: &mut Clerk, destination| Ok(Order::Resume { destination });
    order_destination(api, name.into_inner(), order, "is resumed".to_owned(), "was not paused").await
}

async fn limit_destination(api: State, name: Path<String>, change: LimitChange) -> Answer<Ordered> {
    let order = move |clerk: &mut Clerk, destination: String| {
        let config = clerk.config();
        if let Some(table) = config.destination(&destination).and_then(crate::config::Destination::table) {
            let detail = format!(
                "{destination} is a table: [warehouses.{}] limits the statements to it, then reload",
                table.warehouse
            );
            return Err(Problem::new(StatusCode::CONFLICT, detail));
        }
        Ok(Order::Limit { destination, change })
    };
    let done = match change {
        LimitChange::Rate(None) | LimitChange::Concurrency(None) => {
            format!("goes by the {} of its configuration", change.verb())
        }
        _ => format!("goes by {} {change}", change.verb()),
    };
    order_destination(api, name.into_inner(), order, done, "goes by that already").await
}

/// Sets how many messages per second go to a destination
#[utoipa::path(post, path = "/api/v1/destinations/{name}/rate", params(("name" = String, Path)), request_body = RateOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "It is a table")))]
pub(super) async fn rate(api: State, name: Path<String>, order: Body<RateOrder>) -> Answer<Ordered> {
    let rate = match order.0.rate_per_s {
        None => None,
        Some(rate @ 1..=RATE_MAX) => NonZeroU32::new(rate),
        Some(_) => {
            return Err(Problem::bad(format!("rate_per_s is from 1 to {RATE_MAX}, or null; to stop, pause")));
        }
    };
    limit_destination(api, name, LimitChange::Rate(rate)).await
}

/// Sets how many requests may be in flight to a destination
#[utoipa::path(post, path = "/api/v1/destinations/{name}/concurrency", params(("name" = String, Path)),
    request_body = ConcurrencyOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "It is a table")))]
pub(super) async fn concurrency(
    api: State,
    name: Path<String>,
    order: Body<ConcurrencyOrder>,
) -> Answer<Ordered> {
    let change = order.0.concurrency.map(Concurrency::from);
    if matches!(change, Some(Concurrency::Fixed(number)) if number.get() > CONCURRENCY_MAX) {
        return Err(Problem::bad(format!(
            "concurrency is from 1 to {CONCURRENCY_MAX}, \"auto\", or null; to stop, pause"
        )));
    }
    limit_destination(api, name, LimitChange::Concurrency(change)).await
}

/// Gives an order about a file, or says how much it would be.
async fn order_file(
    api: State,
    name: String,
    destination: Option<String>,
    dry_run: bool,
    order: impl FnOnce(FilesAt) -> Order + Send + 'static,
    done: String,
    nothing: &'static str,
) -> Answer<Ordered> {
    let now = api.now();
    let ordered = api.desk.ask(move |clerk| {
        let report = files::find(clerk, &name)?;
        if let Some(destination) = &destination
            && !report.destinations.contains_key(destination)
        {
            return Err(Problem::missing(format!("{name:?} does not go to a destination {destination:?}")));
        }
        let named = FileSelector::Id(report.file.id);
        let of = FilesAt { files: OrderedFiles::Named(named), destination };
        let FilesCount { files, open, .. } = clerk.read(|view| view.count_files(&of))?;
        let name = report.file.name;
        if dry_run {
            let text = format!("{name} would be {done}");
            return Ok(Ordered { changed: 0, text, files: Some(files), open: Some(open), dry_run });
        }
        let changed = clerk.operate(|operate| operate.order(&order(of), BY, now))?;
        let text = if changed > 0 { format!("{name} is {done}") } else { format!("{name} {nothing}") };
        Ok(Ordered { changed, text, files: Some(files), open: Some(open), dry_run })
    });
    let ordered = ordered.await?;
    api.live.look_again();
    answer(ordered)
}

/// Sends nothing more of a file until it is released
#[utoipa::path(post, path = "/api/v1/files/{file}/hold", params(("file" = String, Path)), request_body = FileOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "Several files have that name")))]
pub(super) async fn hold(api: State, name: Path<String>, order: Body<FileOrder>) -> Answer<Ordered> {
    let FileOrder { destination, reason, dry_run } = order.0;
    let reason = reason.unwrap_or_else(|| "held by an operator".to_owned());
    let order = move |of| Order::Hold { of, reason };
    let nothing = "was held already; the first reason stands";
    let dry_run = dry_run.unwrap_or_default();
    order_file(api, name.into_inner(), destination, dry_run, order, "held".to_owned(), nothing).await
}

/// Sends the messages of a held file again, whoever held it
#[utoipa::path(post, path = "/api/v1/files/{file}/release", params(("file" = String, Path)), request_body = ReleaseOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "Several files have that name")))]
pub(super) async fn release(api: State, name: Path<String>, order: Body<ReleaseOrder>) -> Answer<Ordered> {
    let ReleaseOrder { destination, dry_run } = order.0;
    let dry_run = dry_run.unwrap_or_default();
    let order = |of| Order::Release { of };
    order_file(api, name.into_inner(), destination, dry_run, order, "released".to_owned(), "was not held")
        .await
}

/// Sends nothing more of a file, ever; it can't be undone
#[utoipa::path(post, path = "/api/v1/files/{file}/cancel", params(("file" = String, Path)), request_body = FileOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "Several files have that name")))]
pub(super) async fn cancel(api: State, name: Path<String>, order: Body<FileOrder>) -> Answer<Ordered> {
    let FileOrder { destination, reason, dry_run } = order.0;
    let reason = reason.unwrap_or_else(|| "cancelled by an operator".to_owned());
    let order = move |of| Order::Cancel { of, reason };
    let dry_run = dry_run.unwrap_or_default();
    let nothing = "was cancelled already";
    order_file(api, name.into_inner(), destination, dry_run, order, "cancelled".to_owned(), nothing).await
}

/// Sends a file before others, or after them
#[utoipa::path(post, path = "/api/v1/files/{file}/priority", params(("file" = String, Path)), request_body = PriorityOrder,
    responses((status = 200, description = "", body = Ordered), (status = 409, description = "Several files have that name")))]
pub(super) async fn priority(api: State, name: Path<String>, order: Body<PriorityOrder>) -> Answer<Ordered> {
    let PriorityOrder { priority, destination, dry_run } = order.0;
    let order = move |of| Order::Priority { of, priority };
    let dry_run = dry_run.unwrap_or_default();
    let done = priority.as_str().to_owned();
    order_file(api, name.into_inner(), destination, dry_run, order, done, "had that priority already").await
}

/// The configuration that is in use.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Reloaded {
    config: String,
}

/// Reads the configuration anew, and waits until it is in use
#[utoipa::path(post, path = "/api/v1/reload", request_body = Nothing,
    responses((status = 200, description = "", body = Reloaded), (status = 422, description = "It can't be used; the old one stays")))]
pub(super) async fn reload(api: State, _: Body<Nothing>) -> Answer<Reloaded> {
    let now = api.now();
    let reloaded = api.desk.ask(move |clerk| {
        let state_dir = clerk.config().state.dir.clone();
        let used = reloading::ask(&state_dir, RELOAD_WAIT);
        let used =
            used.map_err(|error| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, format!("{error:#}")))?;
        let config = used.display().to_string();
        let (by, verb) = (BY.to_owned(), "reload".to_owned());
        let line = AuditLine { at: now, by, verb, of: config.clone(), detail: String::new() };
        clerk.operate(|operate| operate.note(&line))?;
        Ok(Reloaded { config })
    });
    answer(reloaded.await?)
}
