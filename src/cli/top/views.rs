//! What `top` shows of each kind of thing, and what can be done to it: tables, so that all views work alike.

use serde_json::{Value, json};

/// How a value is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As it is, escaped.
    Text,
    /// A whole number, its thousands apart.
    Count,
    /// A number per second.
    PerS,
    /// Percent, rounded down: 100 is all.
    Percent,
    /// Seconds.
    Time,
    /// A moment, by its time of day in UTC.
    Moment,
}

/// A column of a table, or a fact of one thing.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// Where the value is: a JSON pointer.
    pub(super) at: &'static str,
    pub(super) kind: Kind,
    /// Characters; 0: what the others leave.
    pub(super) width: u16,
}

const fn column(title: &'static str, at: &'static str, kind: Kind, width: u16) -> Column {
    Column { title, at, kind, width }
}

/// Something that can be done to a thing.
#[derive(Debug)]
pub(super) struct Verb {
    pub(super) key: char,
    /// The command's word for it.
    pub(super) name: &'static str,
    /// What is asked of whom, in the API.
    pub(super) order: fn(&Value) -> Order,
    /// What happens then.
    pub(super) effect: &'static str,
    /// Whether it can't be undone: then the thing's name is to be typed.
    pub(super) is_final: bool,
}

/// A request for a verb.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Order {
    /// Below `/api/v1`, by segments.
    pub(super) path: Vec<String>,
    pub(super) body: Value,
}

/// One kind of thing.
#[derive(Debug)]
pub(super) struct View {
    pub(super) name: &'static str,
    /// Below `/api/v1`.
    pub(super) path: &'static str,
    /// The list in the answer.
    pub(super) list: &'static str,
    /// What tells one row from another: pointers.
    pub(super) id: &'static [&'static str],
    /// What people call it: a pointer.
    pub(super) called: &'static str,
    pub(super) columns: &'static [Column],
    /// What is shown of one of them, beside its columns.
    pub(super) facts: &'static [Column],
    /// Whether `/PATH/ID` says more of one of them.
    pub(super) has_more: bool,
    pub(super) verbs: &'static [Verb],
}

fn at(row: &Value, pointer: &str) -> String {
    row.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn of_file(row: &Value, verb: &str, body: Value) -> Order {
    Order { path: vec!["files".into(), at(row, "/id"), verb.into()], body }
}

fn of_destination(row: &Value, verb: &str) -> Order {
    Order { path: vec!["destinations".into(), at(row, "/name"), verb.into()], body: json!({}) }
}

fn priority(row: &Value, priority: &str) -> Order {
    of_file(row, "priority", json!({ "priority": priority }))
}

fn redrive(group: &Value) -> Order {
    let mut body = json!({});
    for field in ["file", "destination", "reason", "status", "cause"] {
        if let Some(value) = group.get(field).filter(|value| !value.is_null()) {
            body[field] = value.clone();
        }
    }
    Order { path: vec!["dead".into(), "redrive".into()], body }
}

const fn verb(key: char, name: &'static str, order: fn(&Value) -> Order, effect: &'static str) -> Verb {
    Verb { key, name, order, effect, is_final: false }
}

const DESTINATION_VERBS: &[Verb] = &[
    verb('p', "pause", |row| of_destination(row, "pause"), "nothing more goes there; what is in flight ends"),
    verb('r', "resume", |row| of_destination(row, "resume"), "its messages go on"),
];

const FILE_VERBS: &[Verb] = &[
    verb('h', "hold", |row| of_file(row, "hold", json!({})), "nothing more of it goes until it is released"),
    verb('r', "release", |row| of_file(row, "release", json!({})), "its messages go on"),
    Verb {
        key: 'c',
        name: "cancel",
        order: |row| of_file(row, "cancel", json!({})),
        effect: "nothing more of it is sent, ever",
        is_final: true,
    },
    verb('u', "make urgent", |row| priority(row, "urgent"), "it goes ahead of the others"),
    verb('n', "make normal", |row| priority(row, "normal"), "it shares with the others"),
    verb('b', "make bulk", |row| priority(row, "bulk"), "the others go ahead of it"),
];

const DEAD_VERBS: &[Verb] =
    &[verb('R', "redrive", redrive, "all of the group are sent again, also those that are not shown")];

/// Every view, in the order of their keys: 1, 2, …
pub(super) const VIEWS: &[View] = &[
    View {
        name: "Files",
        path: "files",
        list: "items",
        id: &["/feed", "/name", "/id"],
        called: "/name",
        columns: &[
            column("feed", "/feed", Kind::Text, 10),
            column("file", "/name", Kind::Text, 24),
            column("state", "/state", Kind::Text, 8),
            column("%", "/percent", Kind::Percent, 5),
            column("rows", "/rows", Kind::Count, 11),
            column("sent", "/sent", Kind::Count, 11),
            column("dead", "/dead", Kind::Count, 9),
            column("per s", "/sent_per_s", Kind::PerS, 8),
            column("left", "/left_s", Kind::Time, 8),
            column("why", "/ceiling/text", Kind::Text, 0),
        ],
        facts: &[
            column("what to do", "/ceiling/remedy", Kind::Text, 0),
            column("reason", "/reason", Kind::Text, 0),
            column("since", "/since", Kind::Moment, 0),
            column("priority", "/priority", Kind::Text, 0),
            column("started", "/claimed_at", Kind::Moment, 0),
            column("read to its end", "/closed_at", Kind::Moment, 0),
            column("settled", "/settled_at", Kind::Moment, 0),
            column("took", "/took_s", Kind::Time, 0),
            column("done by", "/done_at", Kind::Moment, 0),
            column("finish by", "/finish_by", Kind::Moment, 0),
            column("retrying", "/retrying", Kind::Count, 0),
            column("pending", "/pending", Kind::Count, 0),
            column("unsent", "/unsent", Kind::Count, 0),
            column("cancelled", "/cancelled", Kind::Count, 0),
            column("rejected", "/rejected", Kind::Count, 0),
            column("duplicates", "/duplicates", Kind::Count, 0),
        ],
        has_more: true,
        verbs: FILE_VERBS,
    },
    View {
        name: "Destinations",
        path: "destinations",
        list: "items",
        id: &["/name"],
        called: "/name",
        columns: &[
            column("destination", "/name", Kind::Text, 18),
            column("state", "/state", Kind::Text, 14),
            column("open", "/open", Kind::Count, 11),
            column("per s", "/sent_per_s", Kind::PerS, 8),
            column("limit", "/limit", Kind::Count, 6),
            column("busy", "/in_flight", Kind::Count, 6),
            column("p95 ms", "/p95_ms", Kind::Count, 8),
            column("fail %", "/failed_percent", Kind::Percent, 6),
            column("breaker", "/breaker", Kind::Text, 9),
            column("why", "/ceiling/text", Kind::Text, 0),
        ],
        facts: &[
            column("what to do", "/ceiling/remedy", Kind::Text, 0),
            column("to", "/url", Kind::Text, 0),
            column("reason", "/reason", Kind::Text, 0),
            column("since", "/since", Kind::Moment, 0),
            column("messages per second at most", "/rate_per_s", Kind::Count, 0),
            column("concurrency", "/concurrency", Kind::Text, 0),
            column("tokens for retries", "/retry_tokens", Kind::Count, 0),
            column("out since", "/out_since", Kind::Moment, 0),
            column("nothing goes before", "/not_before", Kind::Moment, 0),
            column("next retry", "/next_due", Kind::Moment, 0),
            column("p50 ms", "/p50_ms", Kind::Count, 0),
            column("sent", "/counts/sent", Kind::Count, 0),
            column("dead", "/counts/dead", Kind::Count, 0),
            column("retrying", "/counts/retrying", Kind::Count, 0),
            column("last error", "/last_error/reason", Kind::Text, 0),
            column("its status", "/last_error/status", Kind::Text, 0),
            column("its answer", "/last_error/text", Kind::Text, 0),
        ],
        has_more: true,
        verbs: DESTINATION_VERBS,
    },
    View {
        name: "Dead",
        path: "dead/groups",
        list: "groups",
        id: &["/file", "/destination", "/reason", "/status", "/cause"],
        called: "/file_name",
        columns: &[
            column("messages", "/messages", Kind::Count, 11),
            column("reason", "/reason", Kind::Text, 10),
            column("status", "/status", Kind::Text, 6),
            column("cause", "/cause", Kind::Text, 10),
            column("destination", "/destination", Kind::Text, 16),
            column("file", "/file_name", Kind::Text, 24),
            column("last", "/last_at", Kind::Moment, 10),
            column("answer", "/detail", Kind::Text, 0),
        ],
        facts: &[column("first", "/first_at", Kind::Moment, 0)],
        has_more: false,
        verbs: DEAD_VERBS,
    },
    View {
        name: "Actors",
        path: "actors",
        list: "items",
        id: &["/path"],
        called: "/path",
        columns: &[
            column("actor", "/path", Kind::Text, 36),
            column("alive", "/alive", Kind::Text, 6),
            column("life", "/generation", Kind::Count, 5),
            column("restarts", "/restarts", Kind::Count, 9),
            column("mailbox", "/mailbox", Kind::Count, 8),
            column("busy %", "/busy_percent", Kind::Percent, 7),
            column("since", "/since", Kind::Moment, 10),
            column("its last end", "/last_exit/text", Kind::Text, 0),
        ],
        facts: &[],
        has_more: false,
        verbs: &[],
    },
    View {
        name: "Alarms",
        path: "alarms",
        list: "items",
        id: &["/alarm", "/subject"],
        called: "/alarm",
        columns: &[
            column("alarm", "/alarm", Kind::Text, 12),
            column("of", "/subject", Kind::Text, 16),
            column("since", "/since", Kind::Moment, 10),
            column("what", "/text", Kind::Text, 0),
        ],
        facts: &[column("what to do", "/remedy", Kind::Text, 0)],
        has_more: false,
        verbs: &[],
    },
    View {
        name: "Audit",
        path: "audit",
        list: "items",
        id: &["/at", "/order", "/of"],
        called: "/of",
        columns: &[
            column("at", "/at", Kind::Moment, 10),
            column("by", "/by", Kind::Text, 16),
            column("order", "/order", Kind::Text, 12),
            column("of", "/of", Kind::Text, 32),
            column("detail", "/detail", Kind::Text, 0),
        ],
        facts: &[],
        has_more: false,
        verbs: &[],
    },
];
