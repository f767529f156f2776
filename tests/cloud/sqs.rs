//! What the faults do to the bodies of SQS calls (`AmazonSQS.*`, JSON protocol).

use rand::{RngExt as _, rngs::SmallRng, seq::SliceRandom as _};
use serde_json::{Value, json};

/// Takes up to `count` entries, picked at random, out of a batch.
pub(super) fn take_entries(request: &mut Value, count: usize, rng: &mut SmallRng) -> Vec<Value> {
    let Some(entries) = request["Entries"].as_array_mut() else { return Vec::new() };
    let mut picked: Vec<_> = (0..entries.len()).collect();
    picked.shuffle(rng);
    picked.truncate(count);
    // From the back, so that the other positions hold.
    picked.sort_unstable_by(|a, b| b.cmp(a));
    picked.into_iter().map(|position| entries.remove(position)).collect()
}

/// A `BatchResultErrorEntry` about a request's entry.
pub(super) fn failed(entry: &Value, code: &str, sender_fault: bool) -> Value {
    let message = "injected by the test's fault proxy";
    json!({ "Id": entry["Id"], "Code": code, "Message": message, "SenderFault": sender_fault })
}

/// Adds to the `Failed` of a batch's answer.
pub(super) fn add_failed(answer: &mut Value, failed: Vec<Value>) {
    if let Some(list) = answer["Failed"].as_array_mut() {
        list.extend(failed);
    } else {
        answer["Failed"] = failed.into();
    }
}

/// Gives every entry a random delay on top of none.
pub(super) fn scatter(request: &mut Value, delay_s_max: u32, rng: &mut SmallRng) {
    for entry in request["Entries"].as_array_mut().into_iter().flatten() {
        let own = entry["DelaySeconds"].as_u64().unwrap_or_default();
        entry["DelaySeconds"] = (own + u64::from(rng.random_range(0..=delay_s_max))).into();
    }
}

/// What a receiver asked to see of each message.
#[derive(Debug)]
pub(super) struct Asked {
    system: Vec<String>,
    own: Vec<String>,
}

const OWN: &str = "MessageAttributeNames";
const SYSTEM: &str = "MessageSystemAttributeNames";
/// Its deprecated name.
const SYSTEM_OLD: &str = "AttributeNames";

/// Asks for everything that a message has, so that it can be sent again.
pub(super) fn widen(request: &mut Value) -> Asked {
    let names = |field: &Value| -> Vec<String> {
        field.as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    };
    let mut system = names(&request[SYSTEM]);
    system.extend(names(&request[SYSTEM_OLD]));
    let asked = Asked { system, own: names(&request[OWN]) };
    request[OWN] = json!(["All"]);
    request[SYSTEM] = json!(["All"]);
    if let Some(request) = request.as_object_mut() {
        request.remove(SYSTEM_OLD);
    }
    asked
}

/// Takes out of the answer what the receiver did not ask for.
pub(super) fn narrow(answer: &mut Value, asked: &Asked) {
    let wants = |names: &[String], name: &str| {
        names.iter().any(|wanted| match wanted.strip_suffix(".*") {
            Some(prefix) => name.starts_with(prefix),
            None => wanted == "All" || wanted == name,
        })
    };
    for message in messages(answer) {
        let Some(message) = message.as_object_mut() else { continue };
        for (field, names) in [("Attributes", &asked.system), ("MessageAttributes", &asked.own)] {
            let Some(attributes) = message.get_mut(field).and_then(Value::as_object_mut) else { continue };
            let before = attributes.len();
            attributes.retain(|name, _| wants(names, name));
            let (is_less, is_empty) = (attributes.len() < before, attributes.is_empty());
            if is_empty {
                message.remove(field);
            }
            if is_less && field == "MessageAttributes" {
                // It was made over all of them.
                message.remove("MD5OfMessageAttributes");
            }
        }
    }
}

/// The `SendMessage` that makes a received message come again.
pub(super) fn resend(queue: &Value, message: &Value, delay_s: u32, dedup: u64) -> Value {
    let mut send = json!({ "QueueUrl": queue, "MessageBody": message["Body"] });
    if let Some(own) = message.get("MessageAttributes") {
        send["MessageAttributes"] = own.clone();
    }
    if let Some(group) = message["Attributes"].get("MessageGroupId") {
        send["MessageGroupId"] = group.clone();
        if message["Attributes"].get("MessageDeduplicationId").is_some() {
            // Under its old id the queue would know that it has it.
            send["MessageDeduplicationId"] = format!("fault-proxy-{dedup}").into();
        }
    } else {
        // Nobody may receive it before the proxy has noted whose duplicate it is.
        send["DelaySeconds"] = delay_s.max(1).into();
    }
    send
}

/// The `ChangeMessageVisibilityBatch` that makes handed-out messages visible again; `None` if there are none.
pub(super) fn expire(queue: &Value, answer: &Value, count: usize) -> Option<Value> {
    let handles = answer["Messages"].as_array().into_iter().flatten().take(count);
    let entries: Vec<_> = handles
        .enumerate()
        .map(|(position, message)| {
            json!({
                "Id": position.to_string(),
                "ReceiptHandle": message["ReceiptHandle"],
                "VisibilityTimeout": 0,
            })
        })
        .collect();
    (!entries.is_empty()).then(|| json!({ "QueueUrl": queue, "Entries": entries }))
}

/// Mixes the messages of an answer; whether there were any two.
pub(super) fn reorder(answer: &mut Value, rng: &mut SmallRng) -> bool {
    let Some(messages) = answer["Messages"].as_array_mut() else { return false };
    messages.shuffle(rng);
    messages.len() > 1
}

/// The messages of an answer to `ReceiveMessage`.
pub(super) fn messages(answer: &mut Value) -> impl Iterator<Item = &mut Value> {
    answer["Messages"].as_array_mut().into_iter().flatten()
}
