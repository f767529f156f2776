use actix_web::{
    HttpRequest,
    web::{Path, Query},
};
use postrider_actors::supervision::ActorReport;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Answer, Items, State, answer, caller, desk::Clerk, limit, series::STEP};
use crate::{
    ops::{access::Caller, problem::Problem},
    shapes::{Alarm, AuditLine, Destination, File, Overview, Sample, Time},
};

/// Who asks.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Session {
    /// `view` or `operate`
    role: &'static str,
    /// Whether tokens are used.
    auth: bool,
    version: &'static str,
    api: &'static str,
}

/// What the caller may do
#[utoipa::path(get, path = "/api/v1/session", responses((status = 200, description = "", body = Session)))]
pub(super) async fn session(request: HttpRequest) -> Answer<Session> {
    let Caller { role, has_token } = caller(&request);
    answer(Session { role: role.as_str(), auth: has_token, version: env!("CARGO_PKG_VERSION"), api: "v1" })
}

/// Will it be done in time, and if not, why
#[utoipa::path(get, path = "/api/v1/overview", responses((status = 200, description = "", body = Overview)))]
pub(super) async fn overview(api: State) -> Answer<Overview> {
    answer(api.live.snapshot().await?.overview.clone())
}

/// All destinations, by name
#[utoipa::path(get, path = "/api/v1/destinations", responses((status = 200, description = "", body = Items<Destination>)))]
pub(super) async fn destinations(api: State) -> Answer<Items<Destination>> {
    answer(Items { items: api.live.snapshot().await?.destinations.clone() })
}

/// A destination, with what is about it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DestinationDetail {
    #[serde(flatten)]
    destination: Destination,
    /// The latest orders about it.
    audit: Vec<AuditLine>,
    /// Open files that go there.
    files: Vec<File>,
}

/// Orders and files that are shown with a destination, and lines of the audit that are looked through for them.
const ABOUT_MAX: usize = 50;
const AUDIT_LOOKED_AT: usize = 1_000;

/// One destination
#[utoipa::path(get, path = "/api/v1/destinations/{name}", params(("name" = String, Path)),
    responses((status = 200, description = "", body = DestinationDetail), (status = 404, description = "No such destination")))]
pub(super) async fn destination(api: State, name: Path<String>) -> Answer<DestinationDetail> {
    let name = name.into_inner();
    let snapshot = api.live.snapshot().await?;
    let known = snapshot.destinations.iter().find(|destination| destination.name == name);
    let destination = known.cloned().ok_or_else(|| no_destination(&name))?;
    let is_about = move |line: &AuditLine| line.of == name || line.of.ends_with(&format!(" at {name}"));
    let lines = api.desk.ask(|clerk| clerk.read(|view| view.audit(AUDIT_LOOKED_AT))).await?;
    let audit = lines.into_iter().map(AuditLine::from).filter(is_about).take(ABOUT_MAX).collect();
    let files = snapshot.files.iter().filter(|file| file.to.contains(&destination.name));
    let files = files.take(ABOUT_MAX).cloned().collect();
    answer(DestinationDetail { destination, audit, files })
}

/// A name that nothing has.
pub(super) fn no_destination(name: &str) -> Problem {
    Problem::missing(format!("no destination is called {name:?}"))
}

/// A misspelt name must not look like success.
pub(super) fn known_destination(clerk: &mut Clerk, name: &str) -> Result<(), Problem> {
    if clerk.config().destination(name).is_some() {
        return Ok(());
    }
    let is_known = clerk.read(|view| view.destinations())?.contains_key(name);
    if is_known { Ok(()) } else { Err(no_destination(name)) }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct SeriesQuery {
    /// Without: all together
    destination: Option<String>,
}

/// The last 15 minutes, as arrays of one length, the oldest first.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct SeriesAnswer {
    step_s: u64,
    /// The limit now.
    rate_per_s: Option<u32>,
    at: Vec<Time>,
    sent_per_s: Vec<Option<f64>>,
    attempts_per_s: Vec<Option<f64>>,
    failed_4xx_per_s: Vec<Option<f64>>,
    failed_5xx_per_s: Vec<Option<f64>>,
    failed_timeout_per_s: Vec<Option<f64>>,
    failed_other_per_s: Vec<Option<f64>>,
    p50_ms: Vec<Option<f64>>,
    p95_ms: Vec<Option<f64>>,
    limit: Vec<Option<u64>>,
    in_flight: Vec<Option<u64>>,
    open: Vec<Option<u64>>,
}

/// Samples for charts
#[utoipa::path(get, path = "/api/v1/series", params(SeriesQuery),
    responses((status = 200, description = "", body = SeriesAnswer), (status = 404, description = "No such destination")))]
pub(super) async fn series(api: State, query: Query<SeriesQuery>) -> Answer<SeriesAnswer> {
    let name = query.into_inner().destination.unwrap_or_default();
    let mut rate_per_s = None;
    if !name.is_empty() {
        let snapshot = api.live.snapshot().await?;
        let known = snapshot.destinations.iter().find(|destination| destination.name == name);
        rate_per_s = known.ok_or_else(|| no_destination(&name))?.rate_per_s;
    }
    let samples = api.live.series(|series| series.of(&name));
    let mut series = SeriesAnswer { step_s: STEP.as_secs(), rate_per_s, ..SeriesAnswer::default() };
    for (at, sample) in samples {
        let Sample {
            sent_per_s,
            attempts_per_s,
            failed_4xx_per_s,
            failed_5xx_per_s,
            failed_timeout_per_s,
            failed_other_per_s,
            p50_ms,
            p95_ms,
            limit,
            in_flight,
            open,
        } = sample;
        series.at.push(at.into());
        series.sent_per_s.push(sent_per_s);
        series.attempts_per_s.push(attempts_per_s);
        series.failed_4xx_per_s.push(failed_4xx_per_s);
        series.failed_5xx_per_s.push(failed_5xx_per_s);
        series.failed_timeout_per_s.push(failed_timeout_per_s);
        series.failed_other_per_s.push(failed_other_per_s);
        series.p50_ms.push(p50_ms);
        series.p95_ms.push(p95_ms);
        series.limit.push(limit);
        series.in_flight.push(in_flight);
        series.open.push(open);
    }
    answer(series)
}

/// An actor of the pipeline.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Actor {
    name: String,
    /// Its second name: a feed's, a source's.
    of: Option<String>,
    /// Which of those with that name, from 0.
    number: usize,
    /// Where it stands in the tree of supervisors.
    path: String,
    alive: bool,
    /// Which life, from 1.
    generation: u64,
    /// Since the process began.
    restarts: u64,
    /// When this life began.
    since: Time,
    last_exit: Option<ActorExit>,
    /// Messages that wait for it; `null`: it is sent control messages alone, and fetches its work itself.
    mailbox: Option<usize>,
    /// How many its mailbox has room for.
    mailbox_max: Option<usize>,
    /// How much of the last 10 s its code ran, work that blocks included: more than 100 if it did several things at the same
    /// time. What it leaves to tasks of their own, such as requests, is not in it. `null` in its first seconds.
    busy_percent: Option<f64>,
}

/// How a life ended.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ActorExit {
    at: Time,
    text: String,
}

impl From<ActorReport> for Actor {
    fn from(report: ActorReport) -> Self {
        Self {
            name: report.name.to_owned(),
            of: report.of.map(|of| of.to_string()),
            number: report.id.slot,
            path: report.id.path.to_string(),
            alive: report.alive,
            generation: report.id.generation,
            restarts: report.restarts,
            since: report.since.into(),
            last_exit: report.last_exit.map(|(at, text)| ActorExit { at: at.into(), text }),
            mailbox: report.mailbox.map(|(waiting, _)| waiting),
            mailbox_max: report.mailbox.map(|(_, room)| room),
            // In tenths.
            busy_percent: report.busy_percent.map(|percent| (percent * 10.0).round() / 10.0),
        }
    }
}

/// The actors, and what is stuck.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Actors {
    items: Vec<Actor>,
    stuck: Vec<String>,
}

/// The actors of the pipeline
#[utoipa::path(get, path = "/api/v1/actors", responses((status = 200, description = "", body = Actors)))]
pub(super) async fn actors(api: State) -> Answer<Actors> {
    let sources = api.live.sources();
    let items = sources.actors.list().into_iter().map(Actor::from).collect();
    answer(Actors { items, stuck: sources.health.stuck() })
}

/// The alarms.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Alarms {
    /// Those that are raised, the most severe first.
    items: Vec<Alarm>,
    /// Those that were cleared, the latest first.
    cleared: Vec<Alarm>,
}

/// Alarms that are raised, and the last that were cleared
#[utoipa::path(get, path = "/api/v1/alarms", responses((status = 200, description = "", body = Alarms)))]
pub(super) async fn alarms(api: State) -> Answer<Alarms> {
    let board = &api.live.sources().alarms;
    answer(Alarms { items: board.raised(), cleared: board.cleared() })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditQuery {
    /// Part of what an order was about
    of: Option<String>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
}

/// Who ordered what, the latest first
#[utoipa::path(get, path = "/api/v1/audit", params(AuditQuery), responses((status = 200, description = "", body = Items<AuditLine>)))]
pub(super) async fn audit(api: State, query: Query<AuditQuery>) -> Answer<Items<AuditLine>> {
    let AuditQuery { of, limit: asked } = query.into_inner();
    let limit = limit(asked)?;
    let looked_at = if of.is_some() { AUDIT_LOOKED_AT } else { limit };
    let lines = api.desk.ask(move |clerk| clerk.read(|view| view.audit(looked_at))).await?;
    let is_about = |line: &AuditLine| of.as_ref().is_none_or(|of| line.of.contains(of.as_str()));
    answer(Items { items: lines.into_iter().map(AuditLine::from).filter(is_about).take(limit).collect() })
}
