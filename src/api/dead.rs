use std::time::Duration;

use actix_web::web::Query;
use postrider_actors::{
    model::{
        outcome::{DeathCause, Reason},
        time::UnixMs,
    },
    ports::console::{AuditLine, DeadFilter, FileSelector, Position},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::{
    Answer, Body, Page, State, answer,
    answers::known_destination,
    desk::{BY, Clerk},
    limit,
    words::{self, Age, whole},
};
use crate::{
    ops::problem::Problem,
    shapes::{Dead, DeadGroups, DeadTally},
};

/// Dead letters per read, and per change.
const PAGE: usize = 1_000;
/// Dead letters that are looked at for their groups, and for how long.
const GROUPED_MAX: u64 = 1_000_000;
const GROUPING_MAX: Duration = Duration::from_secs(8);
/// Groups that are shown.
const GROUPS_MAX: usize = 200;
/// How many one redrive changes at a time, and for how long one request does so.
const REDRIVE_STEP: usize = 10_000;
const REDRIVE_MAX: Duration = Duration::from_secs(10);

/// Which dead letters; all that is given must hold.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct DeadQuery {
    /// A file's name or id
    file: Option<String>,
    destination: Option<String>,
    /// Why the last attempt failed
    #[param(schema_with = words::reasons)]
    reason: Option<Reason>,
    /// Of the last answer
    #[param(maximum = 65535)]
    status: Option<u16>,
    /// Why there was no other
    #[param(schema_with = words::causes)]
    cause: Option<DeathCause>,
    /// Given up longer ago: `30m`, `2h`, `1day`
    #[param(schema_with = words::ages)]
    older_than: Option<Age>,
    /// Given up within this time
    #[param(schema_with = words::ages)]
    newer_than: Option<Age>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// Which dead letters are counted; all that is given must hold.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct GroupsQuery {
    /// A file's name or id
    file: Option<String>,
    destination: Option<String>,
    /// Why the last attempt failed
    #[param(schema_with = words::reasons)]
    reason: Option<Reason>,
    /// Of the last answer
    #[param(maximum = 65535)]
    status: Option<u16>,
    /// Why there was no other
    #[param(schema_with = words::causes)]
    cause: Option<DeathCause>,
    /// Given up longer ago: `30m`, `2h`, `1day`
    #[param(schema_with = words::ages)]
    older_than: Option<Age>,
    /// Given up within this time
    #[param(schema_with = words::ages)]
    newer_than: Option<Age>,
}

impl From<GroupsQuery> for DeadQuery {
    fn from(query: GroupsQuery) -> Self {
        let GroupsQuery { file, destination, reason, status, cause, older_than, newer_than } = query;
        let (limit, cursor) = (None, None);
        Self { file, destination, reason, status, cause, older_than, newer_than, limit, cursor }
    }
}

/// Which dead letters are sent again.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RedriveOrder {
    /// A file's name or id
    file: Option<String>,
    destination: Option<String>,
    #[schema(schema_with = words::reasons)]
    reason: Option<Reason>,
    #[serde(default, deserialize_with = "whole")]
    #[schema(maximum = 65535)]
    status: Option<u16>,
    #[schema(schema_with = words::causes)]
    cause: Option<DeathCause>,
    /// Given up longer ago: `30m`, `2h`, `1day`
    #[schema(schema_with = words::ages)]
    older_than: Option<Age>,
    /// Given up within this time
    #[schema(schema_with = words::ages)]
    newer_than: Option<Age>,
    /// All of them; required without a filter
    all: Option<bool>,
    /// At most so many
    #[serde(default, deserialize_with = "whole")]
    #[schema(maximum = 4_294_967_295_u32)]
    limit: Option<u32>,
    /// Only say how many it would be
    dry_run: Option<bool>,
}

impl RedriveOrder {
    fn query(&self) -> DeadQuery {
        let Self { file, destination, reason, status, cause, older_than, newer_than, .. } = self.clone();
        DeadQuery {
            file,
            destination,
            reason,
            status,
            cause,
            older_than,
            newer_than,
            limit: None,
            cursor: None,
        }
    }
}

impl DeadQuery {
    /// The filter at `now`, and a name that nothing has is an error: it must not look like an empty list.
    fn filter(&self, clerk: &mut Clerk, now: UnixMs) -> Result<DeadFilter, Problem> {
        let file = self.file.as_deref().map(FileSelector::from);
        if let (Some(name), Some(selector)) = (&self.file, &file)
            && clerk.read(|view| view.files(Some(selector), 1))?.is_empty()
        {
            return Err(Problem::missing(format!("no file is called {name:?}")));
        }
        if let Some(name) = &self.destination {
            known_destination(clerk, name)?;
        }
        let ago = |age: &Option<Age>| age.as_ref().map(|age| now.before(age.span()));
        Ok(DeadFilter {
            file,
            destination: self.destination.clone(),
            reason: self.reason,
            status: self.status,
            cause: self.cause,
            before: ago(&self.older_than),
            since: ago(&self.newer_than),
        })
    }

    /// As it was asked for, for the audit.
    fn text(&self) -> String {
        let words = [
            ("--file", self.file.clone()),
            ("--destination", self.destination.clone()),
            ("--reason", self.reason.map(|reason| reason.as_str().to_owned())),
            ("--status", self.status.map(|status| status.to_string())),
            ("--cause", self.cause.map(|cause| cause.as_str().to_owned())),
            ("--older-than", self.older_than.clone().map(String::from)),
            ("--newer-than", self.newer_than.clone().map(String::from)),
        ];
        let given: Vec<_> =
            words.into_iter().filter_map(|(name, value)| Some(format!("{name} {}", value?))).collect();
        if given.is_empty() {
            "all dead letters".to_owned()
        } else {
            format!("dead letters {}", given.join(" "))
        }
    }
}

/// Messages that were given up
#[utoipa::path(get, path = "/api/v1/dead", params(DeadQuery),
    responses((status = 200, description = "", body = Page<Dead>), (status = 404, description = "No such file or destination")))]
pub(super) async fn list(api: State, query: Query<DeadQuery>) -> Answer<Page<Dead>> {
    let (query, now) = (query.into_inner(), api.now());
    let limit = limit(query.limit)?;
    let page = api.desk.ask(move |clerk| {
        let filter = query.filter(clerk, now)?;
        let cursor = query.cursor.as_deref();
        let from = Position(cursor.unwrap_or_default().to_owned());
        let letters = clerk.read_on(cursor, |view| view.dead(&filter, &from, limit))?;
        let recipients = clerk.read(|view| view.recipients(&letters))?;
        let next = letters.last().filter(|_| letters.len() == limit).map(|last| last.position.0.clone());
        let items = letters.iter().zip(recipients);
        Ok(Page { items: items.map(|(letter, to)| Dead::of(letter, to)).collect(), next })
    });
    answer(page.await?)
}

/// Dead letters by file, destination, reason, status and cause
#[utoipa::path(get, path = "/api/v1/dead/groups", params(GroupsQuery),
    responses((status = 200, description = "", body = DeadGroups), (status = 404, description = "No such file or destination")))]
pub(super) async fn groups(api: State, query: Query<GroupsQuery>) -> Answer<DeadGroups> {
    let (query, now) = (DeadQuery::from(query.into_inner()), api.now());
    let groups = api.desk.ask(move |clerk| {
        let filter = query.filter(clerk, now)?;
        grouped(clerk, &filter, GROUPS_MAX)
    });
    answer(groups.await?)
}

/// Looks at letters that match, and holds none; the `limit` largest groups.
pub(super) fn grouped(clerk: &mut Clerk, filter: &DeadFilter, limit: usize) -> Result<DeadGroups, Problem> {
    let begun = Instant::now();
    let (mut tally, mut from) = (DeadTally::default(), Position::default());
    loop {
        let letters = clerk.read(|view| view.dead(filter, &from, PAGE))?;
        let Some(last) = letters.last() else { return Ok(tally.largest(limit, false)) };
        from.clone_from(&last.position);
        for letter in &letters {
            tally.add(letter);
        }
        if tally.total() >= GROUPED_MAX || begun.elapsed() >= GROUPING_MAX {
            return Ok(tally.largest(limit, true));
        }
    }
}

/// What a redrive did, or would.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RedriveAnswer {
    redriven: u64,
    /// With `dry_run`.
    would_redrive: Option<u64>,
    /// Whether the same order is to be given again to go on.
    more: bool,
    dry_run: bool,
}

/// Sends dead letters again that match
///
/// With the same ids and bodies; attempts are counted anew. It only makes them due: delivery keeps its rates. It works for ten
/// seconds at most: `more` says whether to give it again; what is redriven is no longer dead, so that nothing goes twice.
#[utoipa::path(post, path = "/api/v1/dead/redrive", request_body = RedriveOrder,
    responses((status = 200, description = "", body = RedriveAnswer), (status = 400, description = "It would be all of them"),
        (status = 404, description = "No such file or destination")))]
pub(super) async fn redrive(api: State, order: Body<RedriveOrder>) -> Answer<RedriveAnswer> {
    let (order, now) = (order.0, api.now());
    let done = api.desk.ask(move |clerk| {
        let query = order.query();
        let filter = query.filter(clerk, now)?;
        let dry_run = order.dry_run.unwrap_or_default();
        let is_meant =
            order.all.unwrap_or_default() || order.limit.is_some() || query.text() != "all dead letters";
        let limit = order.limit.map_or(usize::MAX, |limit| limit as usize);
        if dry_run {
            let found = clerk.read(|view| view.count_dead(&filter))?;
            let found = found.min(limit as u64);
            return Ok(RedriveAnswer { redriven: 0, would_redrive: Some(found), more: false, dry_run });
        }
        if !is_meant {
            return Err(Problem::bad(
                "this would be every dead letter: give a filter or a limit, or \"all\": true",
            ));
        }
        let note = |clerk: &mut Clerk, at: UnixMs, detail: String| {
            let (by, verb) = (BY.to_owned(), "redrive".to_owned());
            clerk.operate(|operate| operate.note(&AuditLine { at, by, verb, of: query.text(), detail }))
        };
        // One that is killed half-way has left this line.
        note(clerk, now, "begun".to_owned())?;
        let (begun, mut left, mut redriven) = (Instant::now(), limit, 0);
        let more = loop {
            let step = left.min(REDRIVE_STEP);
            let sent = clerk.operate(|operate| operate.redrive(&filter, step, now))?;
            redriven += sent as u64;
            left -= sent.min(left);
            if sent < step || left == 0 {
                break false;
            }
            if begun.elapsed() >= REDRIVE_MAX {
                break true;
            }
        };
        note(clerk, now.after(begun.elapsed()), format!("{redriven} redriven"))?;
        Ok(RedriveAnswer { redriven, would_redrive: None, more, dry_run })
    });
    let done = done.await?;
    api.live.look_again();
    answer(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_audit_has_the_filter_as_a_command_would_have_it() {
        assert_eq!(DeadQuery::default().text(), "all dead letters");
        let query = DeadQuery { file: Some("a.csv".into()), status: Some(404), ..DeadQuery::default() };
        assert_eq!(query.text(), "dead letters --file a.csv --status 404");
    }

    #[test]
    fn every_word_of_a_reason_and_of_a_cause_is_read() {
        for reason in Reason::ALL {
            let query = serde_json::json!({ "reason": reason.as_str() });
            assert_eq!(serde_json::from_value::<DeadQuery>(query).unwrap().reason, Some(reason));
        }
        for cause in DeathCause::ALL {
            let query = serde_json::json!({ "cause": cause.as_str() });
            assert_eq!(serde_json::from_value::<DeadQuery>(query).unwrap().cause, Some(cause));
        }
    }
}
