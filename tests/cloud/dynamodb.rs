//! What the faults do to the bodies of DynamoDB calls (`DynamoDB_20120810.*`).

use rand::{RngExt as _, rngs::SmallRng, seq::SliceRandom as _};
use serde_json::{Map, Value, json};

/// The name of an answer's unprocessed rest.
pub(super) fn unprocessed_field(operation: &str) -> &'static str {
    if operation == "BatchGetItem" { "UnprocessedKeys" } else { "UnprocessedItems" }
}

/// The list in one table's part of `RequestItems`: itself for `BatchWriteItem`, its `Keys` for `BatchGetItem`.
fn list(table: &mut Value) -> Option<&mut Vec<Value>> {
    if table.is_array() { table.as_array_mut() } else { table["Keys"].as_array_mut() }
}

/// Takes a share of the items out of the request. Returns them as the answer has to bring them back, or `None` if
/// no item was taken.
pub(super) fn withhold(request: &mut Value, share: f64, rng: &mut SmallRng) -> Option<Value> {
    let tables = request["RequestItems"].as_object_mut()?;
    let mut picked: Vec<(String, usize)> = Vec::new();
    for (name, table) in tables.iter_mut() {
        let count = list(table)?.len();
        picked.extend((0..count).map(|position| (name.clone(), position)));
    }
    let wanted = picked.len() as f64 * share;
    // At random, so that a batch of one item is neither always let through nor never.
    let count = wanted.floor() as usize + usize::from(rng.random_bool(wanted.fract()));
    picked.shuffle(rng);
    picked.truncate(count);
    if picked.is_empty() {
        return None;
    }
    // From the back, so that the other positions hold.
    picked.sort_unstable_by(|a, b| b.cmp(a));
    let mut withheld = Map::new();
    for (name, position) in picked {
        let table = &mut tables[&name];
        let mut part = table.clone();
        let item = list(table)?.remove(position);
        let part = withheld.entry(name).or_insert_with(|| {
            // `BatchGetItem` wants projection and consistency back as well.
            list(&mut part).expect("it had items").clear();
            part
        });
        list(part)?.insert(0, item);
    }
    tables.retain(|_, table| list(table).is_some_and(|list| !list.is_empty()));
    Some(withheld.into())
}

/// Adds to what the service itself left unprocessed.
pub(super) fn add_unprocessed(answer: &mut Value, field: &str, withheld: Value) {
    let Value::Object(withheld) = withheld else { return };
    let Some(answer) = answer.as_object_mut() else { return };
    let here = answer.entry(field).or_insert_with(|| json!({}));
    let Some(here) = here.as_object_mut() else { return };
    for (name, mut table) in withheld {
        let rest = here.get_mut(&name).and_then(list).map(std::mem::take).unwrap_or_default();
        if let Some(list) = list(&mut table) {
            list.extend(rest);
        }
        here.insert(name, table);
    }
}

/// Takes up to `count` statements out of the request, and makes the response to each, with its position.
pub(super) fn take_statements(
    request: &mut Value,
    count: usize,
    code: &str,
    rng: &mut SmallRng,
) -> Vec<(usize, Value)> {
    let Some(statements) = request["Statements"].as_array_mut() else { return Vec::new() };
    let mut picked: Vec<_> = (0..statements.len()).collect();
    picked.shuffle(rng);
    picked.truncate(count);
    picked.sort_unstable();
    for position in picked.iter().rev() {
        statements.remove(*position);
    }
    let error = json!({ "Error": { "Code": code, "Message": "injected by the test's fault proxy" } });
    picked.into_iter().map(|position| (position, error.clone())).collect()
}

/// Puts responses where their statements stood; `responses` are in order of their positions.
pub(super) fn insert_responses(answer: &mut Value, responses: Vec<(usize, Value)>) {
    let Some(answer) = answer.as_object_mut() else { return };
    let list = answer.entry("Responses").or_insert_with(|| json!([]));
    if let Some(list) = list.as_array_mut() {
        for (position, response) in responses {
            list.insert(position, response);
        }
    }
}

/// The error of a transaction whose first item another one holds.
pub(super) fn conflict(operation: &str, request: &Value) -> Value {
    let field = if operation == "ExecuteTransaction" { "TransactStatements" } else { "TransactItems" };
    let items = request[field].as_array().map_or(0, Vec::len);
    let mut reasons = vec![json!({ "Code": "None" }); items];
    if let Some(first) = reasons.first_mut() {
        *first = json!({ "Code": "TransactionConflict", "Message": "Transaction is ongoing for the item" });
    }
    json!({
        "__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException",
        "Message": "Transaction cancelled, please refer cancellation reasons for specific reasons",
        "CancellationReasons": reasons,
    })
}

/// Whether DynamoDB may answer this read from an older copy.
pub(super) fn may_be_stale(operation: &str, request: &Value) -> bool {
    let is_consistent = |read: &Value| read["ConsistentRead"] == true;
    match operation {
        "BatchGetItem" => {
            request["RequestItems"].as_object().is_some_and(|tables| !tables.values().any(is_consistent))
        }
        _ => !is_consistent(request),
    }
}
