//! Which part of a log is read next for receipts: pure rules over a cursor that is stored as text.
//!
//! A log group's time is read window by window. The cursor says up to when each group is completely read, and
//! within a window which page comes next; it moves only with what was taken, in one transaction. So a read
//! that fails is repeated at the same place, however much later: a window computed from the time of the retry
//! would skip what lies between (S0.1). Each window reaches back over the end of the one before
//! by an overlap, for events that arrive late; what is seen again is known by its event.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::time::UnixMs;

/// A page's token is not used when it is older: the service forgets it after 24 hours, and what it then answers
/// might be taken for the end of a window.
const TOKEN_AGE_MAX: Duration = Duration::from_hours(1);

/// How a log is divided into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowRule {
    /// How far a window reaches back over the end of the one before: events that arrive later than this are
    /// not seen.
    pub overlap: Duration,
    /// How far behind the clock a window ends: most events have arrived by then.
    pub lag: Duration,
    /// The longest window beyond its overlap, so that what is read again after a failure is bounded.
    pub window_max: Duration,
    /// The shortest window beyond its overlap that is worth its calls.
    pub step: Duration,
    /// Where a group begins that was never read: so long before its first poll.
    pub lookback: Duration,
}

/// How far all groups of a source are read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowCursor {
    groups: BTreeMap<String, GroupCursor>,
    /// The group that was looked at last: the others have their turn before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last: Option<String>,
}

/// How far one group is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct GroupCursor {
    /// Every event before this that arrived in time is taken.
    until: UnixMs,
    /// The window that is being read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    open: Option<OpenWindow>,
}

/// A window of which some pages are taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OpenWindow {
    start: UnixMs,
    end: UnixMs,
    /// Where its next page is; `None`: at its beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    page: Option<PageToken>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PageToken {
    token: String,
    /// When the token was handed out.
    at: UnixMs,
    /// With which filter: a token goes with its query.
    filter: String,
}

/// A stored cursor that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored cursor can't be read: {0}")]
pub struct BadCursor(String);

/// One page to be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Of this group.
    pub group: String,
    /// From this time on …
    pub start: UnixMs,
    /// … to just before this one.
    pub end: UnixMs,
    /// The page; `None` is the first.
    pub token: Option<String>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Fetch this page.
    Fetch(PageRequest),
    /// Nothing is due before so long.
    Wait(Duration),
}

impl WindowCursor {
    /// Reads a stored cursor.
    pub fn parse(text: &str) -> Result<Self, BadCursor> {
        serde_json::from_str(text).map_err(|error| BadCursor(error.to_string()))
    }

    /// As it is stored.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("text keys, texts and numbers can be written")
    }

    /// Adds groups that are new and drops those that are not wanted any more. If it says that anything has
    /// changed, the cursor has to be stored before a page is fetched: where a group begins must not move with a
    /// first fetch that fails.
    pub fn adopt(&mut self, groups: &[String], rule: &WindowRule, now: UnixMs) -> bool {
        let before = self.groups.len();
        self.groups.retain(|name, _| groups.contains(name));
        let mut changed = self.groups.len() != before;
        for name in groups {
            if !self.groups.contains_key(name) {
                let until = earlier(now, rule.lookback);
                self.groups.insert(name.clone(), GroupCursor { until, open: None });
                changed = true;
            }
        }
        changed
    }

    /// What to do at `now`. The groups take turns; those in `passed_over` have just failed.
    pub fn next(&self, rule: &WindowRule, filter: &str, passed_over: &[String], now: UnixMs) -> Next {
        let last = self.last.as_deref().unwrap_or_default();
        let later = self.groups.iter().filter(|(name, _)| name.as_str() > last);
        let rest = self.groups.iter().filter(|(name, _)| name.as_str() <= last);
        let mut wait = rule.step;
        for (name, group) in later.chain(rest).filter(|(name, _)| !passed_over.contains(name)) {
            match group.request(rule, filter, now) {
                Ok(request) => return Next::Fetch(PageRequest { group: name.clone(), ..request }),
                Err(due_in) => wait = wait.min(due_in),
            }
        }
        Next::Wait(wait)
    }

    /// Notes that a page was fetched, and which one is next in its window, if any.
    pub fn fetched(&mut self, request: &PageRequest, next_token: Option<String>, filter: &str, now: UnixMs) {
        self.last = Some(request.group.clone());
        let Some(group) = self.groups.get_mut(&request.group) else { return };
        if let Some(token) = next_token {
            // A token that leads to itself would never end: the window is read again from its beginning.
            let page = (request.token.as_ref() != Some(&token)).then(|| PageToken {
                token,
                at: now,
                filter: filter.to_owned(),
            });
            group.open = Some(OpenWindow { start: request.start, end: request.end, page });
        } else {
            group.until = request.end;
            group.open = None;
        }
    }

    /// Notes that the service does not know a page's token (any more): its window is read again from its
    /// beginning.
    pub fn forget_page(&mut self, request: &PageRequest) {
        self.last = Some(request.group.clone());
        if let Some(group) = self.groups.get_mut(&request.group) {
            group.open = Some(OpenWindow { start: request.start, end: request.end, page: None });
        }
    }

    /// How far behind the clock the group that is farthest behind is.
    pub fn behind(&self, now: UnixMs) -> Duration {
        self.groups.values().map(|group| now.since(group.until)).max().unwrap_or_default()
    }
}

impl GroupCursor {
    /// The page to fetch, without the group's name, or how long until one is due.
    fn request(&self, rule: &WindowRule, filter: &str, now: UnixMs) -> Result<PageRequest, Duration> {
        if let Some(OpenWindow { start, end, page }) = &self.open {
            let is_good = |page: &&PageToken| page.filter == filter && now.since(page.at) < TOKEN_AGE_MAX;
            let token = page.as_ref().filter(is_good).map(|page| page.token.clone());
            return Ok(PageRequest { group: String::new(), start: *start, end: *end, token });
        }
        let stable_until = earlier(now, rule.lag);
        let step = rule.step.min(rule.window_max).max(Duration::from_millis(1));
        // Read up to a time that is still to come: the clock was set back. It must not keep what comes now from
        // being read until it has caught up.
        let until = if self.until > now { earlier(stable_until, step) } else { self.until };
        let end = stable_until.min(until.after(rule.window_max.max(step)));
        let due_in = step.saturating_sub(end.since(until));
        if !due_in.is_zero() {
            return Err(due_in.max(Duration::from_millis(1)));
        }
        Ok(PageRequest { group: String::new(), start: earlier(until, rule.overlap), end, token: None })
    }
}

fn earlier(at: UnixMs, by: Duration) -> UnixMs {
    UnixMs(at.0.saturating_sub(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
#[allow(clippy::cast_possible_wrap, reason = "the times of these tests are small")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: u64 = 1000;
    const NOW: UnixMs = UnixMs(10_000_000 * S);

    fn rule() -> WindowRule {
        WindowRule {
            overlap: Duration::from_secs(30),
            lag: Duration::from_secs(10),
            window_max: Duration::from_secs(100),
            step: Duration::from_secs(5),
            lookback: Duration::from_secs(250),
        }
    }

    fn at(s: i64) -> UnixMs {
        UnixMs(NOW.0.checked_add_signed(s * S as i64).unwrap())
    }

    fn cursor(groups: &[&str]) -> WindowCursor {
        let mut cursor = WindowCursor::default();
        assert!(cursor.adopt(&names(groups), &rule(), NOW));
        cursor
    }

    fn names(groups: &[&str]) -> Vec<String> {
        groups.iter().map(|name| (*name).to_owned()).collect()
    }

    fn request(cursor: &WindowCursor, now: UnixMs) -> PageRequest {
        match cursor.next(&rule(), "", &[], now) {
            Next::Fetch(request) => request,
            Next::Wait(wait) => panic!("nothing due for {wait:?}"),
        }
    }

    /// Stores it and reads it again.
    fn restarted(cursor: &WindowCursor) -> WindowCursor {
        WindowCursor::parse(&cursor.to_text()).unwrap()
    }

    #[test]
    fn s0_1_a_window_that_failed_begins_where_it_began_however_late_it_is_read_again() {
        let cursor = cursor(&["g"]);
        let first = request(&cursor, NOW);
        assert_eq!((first.start, first.end), (at(-280), at(-150)));
        for later in [1, 1_000, 1_000_000] {
            assert_eq!(request(&restarted(&cursor), at(later)), first, "after {later} s");
        }
        // Near the present a window may end later than at its first try, and never begins later.
        let mut cursor = cursor;
        while let Next::Fetch(request) = cursor.next(&rule(), "", &[], NOW) {
            cursor.fetched(&request, None, "", NOW);
        }
        let failed = request(&cursor, at(6));
        let again = request(&cursor, at(60));
        assert_eq!((failed.start, failed.end, again.start, again.end), (at(-40), at(-4), at(-40), at(50)));
    }

    #[test]
    fn the_pages_of_a_window_are_read_to_its_end_before_the_cursor_moves() {
        let mut cursor = cursor(&["g"]);
        let first = request(&cursor, NOW);
        cursor.fetched(&first, Some("t1".into()), "", NOW);
        let second = request(&restarted(&cursor), at(100));
        assert_eq!(second, PageRequest { token: Some("t1".into()), ..first.clone() });
        cursor.fetched(&second, Some("t2".into()), "", at(100));
        let third = request(&cursor, at(100));
        assert_eq!(third.token.as_deref(), Some("t2"));
        cursor.fetched(&third, None, "", at(100));
        assert_eq!(request(&cursor, at(100)).start, at(-180), "the overlap before the end of the first");
        assert_eq!(cursor.behind(at(100)), Duration::from_secs(250));
    }

    #[test]
    fn a_page_that_can_t_be_had_any_more_starts_its_window_over() {
        let mut cursor = cursor(&["g"]);
        let first = request(&cursor, NOW);
        cursor.fetched(&first, Some("t1".into()), "a", NOW);
        let token = |cursor: &WindowCursor, filter: &str, now| match cursor.next(&rule(), filter, &[], now) {
            Next::Fetch(PageRequest { start, end, token, .. }) => {
                assert_eq!((start, end), (first.start, first.end), "the same window");
                token
            }
            Next::Wait(_) => panic!("a window is open"),
        };
        assert_eq!(token(&cursor, "a", at(3599)).as_deref(), Some("t1"));
        assert_eq!(token(&cursor, "a", at(3600)), None, "too old");
        assert_eq!(token(&cursor, "b", at(1)), None, "another query");
        let second = PageRequest { token: Some("t1".into()), ..first.clone() };
        let mut same = cursor.clone();
        same.fetched(&second, Some("t1".into()), "a", at(1));
        assert_eq!(token(&same, "a", at(2)), None, "a token that leads to itself");
        cursor.forget_page(&second);
        assert_eq!(token(&restarted(&cursor), "a", at(2)), None);
    }

    #[test]
    fn groups_take_turns_and_one_that_fails_is_passed_over() {
        let mut cursor = cursor(&["a", "b", "c"]);
        let mut order = String::new();
        for _ in 0..6 {
            let request = request(&restarted(&cursor), NOW);
            order += &request.group;
            cursor.fetched(&request, Some(order.clone()), "", NOW);
        }
        assert_eq!(order, "abcabc");
        let failed = ["a".to_owned(), "b".to_owned()];
        let Next::Fetch(request) = cursor.next(&rule(), "", &failed, NOW) else { panic!("c is due") };
        assert_eq!(request.group, "c");
        let failed = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        assert_eq!(cursor.next(&rule(), "", &failed, NOW), Next::Wait(rule().step));
    }

    #[test]
    fn groups_come_and_go_with_the_configuration() {
        let mut cursor = cursor(&["a", "b"]);
        assert!(!cursor.adopt(&names(&["b", "a"]), &rule(), at(50)), "nothing new");
        assert!(cursor.adopt(&names(&["b", "c"]), &rule(), at(50)));
        assert_eq!(request(&cursor, at(50)).start, at(-280), "b goes on");
        let b = request(&cursor, at(50));
        cursor.fetched(&b, None, "", at(50));
        assert_eq!(
            (request(&cursor, at(50)).group.as_str(), request(&cursor, at(50)).start),
            ("c", at(50 - 280))
        );
    }

    #[test]
    fn what_is_due_is_waited_for() {
        let mut cursor = cursor(&["g"]);
        while let Next::Fetch(request) = cursor.next(&rule(), "", &[], NOW) {
            cursor.fetched(&request, None, "", NOW);
        }
        assert_eq!(cursor.next(&rule(), "", &[], NOW), Next::Wait(Duration::from_secs(5)));
        assert_eq!(cursor.next(&rule(), "", &[], at(3)), Next::Wait(Duration::from_secs(2)));
        assert_eq!(request(&cursor, at(5)).end, at(-5));
    }

    #[test]
    fn f09_a_clock_that_was_set_back_does_not_stop_the_reading() {
        let mut cursor = cursor(&["g"]);
        while let Next::Fetch(request) = cursor.next(&rule(), "", &[], at(100_000)) {
            cursor.fetched(&request, None, "", at(100_000));
        }
        let back = request(&cursor, NOW);
        assert_eq!((back.start, back.end), (at(-45), at(-10)));
        cursor.fetched(&back, None, "", NOW);
        assert_eq!(request(&cursor, at(5)).end, at(-5), "and goes on from there");
    }

    #[test]
    fn what_is_no_cursor_is_refused() {
        for text in ["", "17", "{\"groups\":{\"g\":{}}}"] {
            assert!(WindowCursor::parse(text).is_err(), "{text}");
        }
    }

    /// An event: when it happened and when it arrived, in seconds after the start.
    fn event() -> impl Strategy<Value = (u64, u64)> {
        // As late as the overlap and the lag together allow.
        (0u64..600, 0u64..=40).prop_map(|(happened, late)| (happened, happened + late))
    }

    proptest! {
        /// A reader that fails, is restarted, loses its tokens and looks at uneven times sees every event that
        /// is late by no more than overlap and lag.
        #[test]
        fn s0_1_every_event_that_arrives_in_time_is_seen(
            events in prop::collection::vec(event(), 0..60),
            steps in prop::collection::vec((0u64..40, 0u8..4), 1..80),
            page in 1usize..5,
        ) {
            let mut stored = cursor(&["g"]);
            let mut seen = vec![false; events.len()];
            let mut now = 0;
            // At the end, everything is due.
            let last = std::iter::repeat_n((5, 0), 400);
            for (wait, what) in steps.into_iter().chain(last) {
                now += wait;
                let clock = at(now as i64);
                let Next::Fetch(request) = stored.next(&rule(), "", &[], clock) else { continue };
                if what == 1 {
                    continue; // the call fails
                }
                // In order of time; a token names the last event of its page.
                let mut found: Vec<_> = (0..events.len())
                    .filter(|&n| events[n].1 <= now)
                    .map(|n| (at(events[n].0 as i64), n))
                    .filter(|(happened, _)| (request.start..request.end).contains(happened))
                    .collect();
                found.sort_unstable();
                if let Some(token) = &request.token {
                    let (happened, n) = token.split_once(' ').unwrap();
                    let after = (UnixMs(happened.parse().unwrap()), n.parse().unwrap());
                    found.retain(|event| *event > after);
                }
                let rest = found.len() > page;
                found.truncate(page);
                let mut next = stored.clone();
                if what == 2 && request.token.is_some() {
                    next.forget_page(&request);
                    found.clear();
                } else {
                    let token = found.last().filter(|_| rest).map(|(at, n)| format!("{} {n}", at.0));
                    next.fetched(&request, token, "", clock);
                }
                if what == 3 {
                    continue; // killed before the commit
                }
                for (_, n) in found {
                    seen[n] = true;
                }
                stored = restarted(&next);
            }
            for (n, event) in events.iter().enumerate() {
                prop_assert!(seen[n] || event.0 > now - 60, "{event:?} was never seen");
            }
        }
    }
}
