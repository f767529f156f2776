use std::{collections::HashMap, time::Duration};

use actix_web::web::Query;
use postrider_actors::{
    model::{
        ids::FileId,
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
    desk::Clerk,
    limit,
    orders::{BY, known_destination},
};
use crate::{
    ops::Problem,
    shapes::{Dead, DeadGroup},
};

/// Dead letters per read, and per change.
const PAGE: usize = 1_000;
/// Dead letters that are looked at for their groups, and for how long.
const GROUPED_MAX: usize = 1_000_000;
const GROUPING_MAX: Duration = Duration::from_secs(8);
/// Groups that are kept apart, and that are shown.
const GROUPS_KEPT: usize = 10_000;
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
    /// Why the last attempt failed: `status`, `timeout`, `connect`, …
    reason: Option<String>,
    /// Of the last answer
    status: Option<u16>,
    /// Why there was no other: `permanent`, `attempts`, `age`, `poison`
    cause: Option<String>,
    /// Given up longer ago: `30m`, `2h`, `1day`
    older_than: Option<String>,
    /// Given up within this time
    newer_than: Option<String>,
    /// 1 to 1000; 100 by default
    limit: Option<usize>,
    /// As `next` of the page before
    cursor: Option<String>,
}

/// Which dead letters are sent again.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RedriveOrder {
    /// A file's name or id
    file: Option<String>,
    destination: Option<String>,
    reason: Option<String>,
    status: Option<u16>,
    cause: Option<String>,
    /// Given up longer ago: `30m`, `2h`, `1day`
    older_than: Option<String>,
    /// Given up within this time
    newer_than: Option<String>,
    /// All of them; required without a filter
    all: Option<bool>,
    /// At most so many
    limit: Option<usize>,
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
        let ago = |age: &Option<String>| -> Result<Option<UnixMs>, Problem> {
            let Some(age) = age else { return Ok(None) };
            let age = humantime::parse_duration(age);
            let age =
                age.map_err(|error| Problem::bad(format!("a duration such as 30m, 2h or 1day: {error}")))?;
            Ok(Some(now.before(age)))
        };
        Ok(DeadFilter {
            file,
            destination: self.destination.clone(),
            reason: self.reason.as_deref().map(reason).transpose()?,
            status: self.status,
            cause: self.cause.as_deref().map(cause).transpose()?,
            before: ago(&self.older_than)?,
            since: ago(&self.newer_than)?,
        })
    }

    /// As it was asked for, for the audit.
    fn text(&self) -> String {
        let words = [
            ("--file", self.file.clone()),
            ("--destination", self.destination.clone()),
            ("--reason", self.reason.clone()),
            ("--status", self.status.map(|status| status.to_string())),
            ("--cause", self.cause.clone()),
            ("--older-than", self.older_than.clone()),
            ("--newer-than", self.newer_than.clone()),
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

fn reason(word: &str) -> Result<Reason, Problem> {
    let mut all = (0..=u8::MAX).filter_map(Reason::from_byte);
    all.find(|reason| reason.as_str() == word).ok_or_else(|| Problem::bad(format!("no reason is {word:?}")))
}

fn cause(word: &str) -> Result<DeathCause, Problem> {
    let mut all = (0..=u8::MAX).filter_map(DeathCause::from_byte);
    all.find(|cause| cause.as_str() == word).ok_or_else(|| Problem::bad(format!("no cause is {word:?}")))
}

/// Messages that were given up
#[utoipa::path(get, path = "/api/v1/dead", params(DeadQuery),
    responses((status = 200, description = "", body = Page<Dead>), (status = 404, description = "No such file or destination")))]
pub(super) async fn list(api: State, query: Query<DeadQuery>) -> Answer<Page<Dead>> {
    let (query, now) = (query.into_inner(), api.now());
    let limit = limit(query.limit)?;
    let page = api.desk.ask(move |clerk| {
        let filter = query.filter(clerk, now)?;
        let from = Position(query.cursor.unwrap_or_default());
        let (letters, recipients) = clerk.read(|view| {
            let letters = view.dead(&filter, &from, limit)?;
            let recipients = view.recipients(&letters)?;
            Ok((letters, recipients))
        })?;
        let next = letters.last().filter(|_| letters.len() == limit).map(|last| last.position.0.clone());
        let items = letters.iter().zip(recipients);
        Ok(Page { items: items.map(|(letter, to)| Dead::of(letter, Some(to))).collect(), next })
    });
    answer(page.await?)
}

/// Dead letters, counted by what they have in common.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeadGroups {
    /// All that match.
    total: u64,
    /// The largest first.
    pub(super) groups: Vec<DeadGroup>,
    /// Whether not all were looked at: the counts are lower bounds.
    cut: bool,
}

/// Dead letters by file, destination, reason, status and cause
#[utoipa::path(get, path = "/api/v1/dead/groups", params(DeadQuery), responses((status = 200, description = "", body = DeadGroups)))]
pub(super) async fn groups(api: State, query: Query<DeadQuery>) -> Answer<DeadGroups> {
    let (query, now) = (query.into_inner(), api.now());
    let groups = api.desk.ask(move |clerk| {
        let filter = query.filter(clerk, now)?;
        grouped(clerk, &filter)
    });
    answer(groups.await?)
}

/// What letters of one group have in common.
type GroupKey = (FileId, String, Reason, u16, DeathCause);

/// Looks at every letter that matches, and holds none.
pub(super) fn grouped(clerk: &mut Clerk, filter: &DeadFilter) -> Result<DeadGroups, Problem> {
    let begun = Instant::now();
    let mut groups: HashMap<GroupKey, DeadGroup> = HashMap::new();
    let (mut from, mut total, mut cut) = (Position::default(), 0, false);
    loop {
        let letters = clerk.read(|view| view.dead(filter, &from, PAGE))?;
        let Some(last) = letters.last() else { break };
        from.clone_from(&last.position);
        total += letters.len() as u64;
        for letter in &letters {
            let last = letter.last;
            let key = (letter.file, letter.destination.clone(), last.reason, last.status, letter.cause);
            if let Some(group) = groups.get_mut(&key) {
                group.add(last.at);
            } else if groups.len() < GROUPS_KEPT {
                groups.insert(key, DeadGroup::of(letter));
            } else {
                cut = true;
            }
        }
        if total >= GROUPED_MAX as u64 || begun.elapsed() >= GROUPING_MAX {
            cut = true;
            break;
        }
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_by(|one, other| {
        other.messages.cmp(&one.messages).then_with(|| one.file_name.cmp(&other.file_name))
    });
    groups.truncate(GROUPS_MAX);
    Ok(DeadGroups { total, groups, cut })
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
    responses((status = 200, description = "", body = RedriveAnswer), (status = 400, description = "It would be all of them")))]
pub(super) async fn redrive(api: State, order: Body<RedriveOrder>) -> Answer<RedriveAnswer> {
    let (order, now) = (order.0, api.now());
    let done = api.desk.ask(move |clerk| {
        let query = order.query();
        let filter = query.filter(clerk, now)?;
        let dry_run = order.dry_run.unwrap_or_default();
        let is_meant =
            order.all.unwrap_or_default() || order.limit.is_some() || query.text() != "all dead letters";
        if dry_run {
            let found = clerk.read(|view| view.count_dead(&filter))?;
            let found = found.min(order.limit.map_or(u64::MAX, |limit| limit as u64));
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
        let (begun, mut left, mut redriven) = (Instant::now(), order.limit.unwrap_or(usize::MAX), 0);
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
    fn words_that_are_none_are_refused() {
        assert_eq!(reason("timeout").unwrap(), Reason::Timeout);
        assert_eq!(cause("age").unwrap(), DeathCause::Age);
        assert!(reason("Timeout").is_err() && cause("").is_err());
    }
}
