//! What came through a proxy, by operation.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// Calls of one operation since the counts were reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Requests that arrived whole, whatever became of them: what a bill would count.
    pub calls: u64,
    /// What they carried: entries, items, keys or statements of the request; for `ReceiveMessage`, `Query`,
    /// `Scan` and `FilterLogEvents` the messages, items and events of the answers that were sent.
    pub items: u64,
    /// Answers to such reads that brought nothing.
    pub empty: u64,
}

/// By operation, e.g. `SendMessageBatch`.
pub type Counts = BTreeMap<String, Count>;

/// How much the answer to a read brought; `None` for an operation that is counted by its request.
pub(super) fn answered_items(operation: &str, answer: &Value) -> Option<u64> {
    match operation {
        "ReceiveMessage" => Some(length(&answer["Messages"])),
        // `Select=COUNT` brings no items but counts them.
        "FilterLogEvents" => Some(length(&answer["events"])),
        "Query" | "Scan" => Some(answer["Count"].as_u64().unwrap_or_default()),
        _ => None,
    }
}

/// How much a request carries; nothing for a read that is counted by its answer.
pub(super) fn requested_items(operation: &str, request: &Value) -> u64 {
    match operation {
        "ReceiveMessage" | "Query" | "Scan" | "FilterLogEvents" => 0,
        "SendMessageBatch" | "DeleteMessageBatch" | "ChangeMessageVisibilityBatch" => {
            length(&request["Entries"])
        }
        "BatchWriteItem" => tables(request).map(length).sum(),
        "BatchGetItem" => tables(request).map(|table| length(&table["Keys"])).sum(),
        "BatchExecuteStatement" => length(&request["Statements"]),
        "ExecuteTransaction" => length(&request["TransactStatements"]),
        "TransactGetItems" | "TransactWriteItems" => length(&request["TransactItems"]),
        _ => 1,
    }
}

fn length(list: &Value) -> u64 {
    list.as_array().map_or(0, |list| list.len() as u64)
}

fn tables(request: &Value) -> impl Iterator<Item = &Value> {
    request["RequestItems"].as_object().into_iter().flat_map(|tables| tables.values())
}
