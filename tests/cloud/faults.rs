//! Which faults there are, and the plan that says at which calls they happen.

use std::{collections::BTreeMap, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::{Value, json};

use super::{dynamodb, sqs};

/// What may go wrong with one call.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Not forwarded; answered with this status and AWS error code.
    Error {
        /// The HTTP status.
        status: u16,
        /// The error's code, e.g. `ThrottlingException`.
        code: &'static str,
    },
    /// Never answered: the client runs into its own timeout.
    Hang {
        /// Whether the service gets the request and carries it out.
        forward: bool,
    },
    /// The connection is closed in place of an answer.
    Close {
        /// As of `Hang`.
        forward: bool,
    },
    /// `…Batch` of SQS: up to so many entries are not forwarded and reported as `Failed`.
    FailEntries {
        /// How many.
        entries: usize,
        /// The entry's error code.
        code: &'static str,
        /// Whether it is the sender's fault, so that repeating won't help.
        sender_fault: bool,
    },
    /// `SendMessageBatch`: entries get a random delay, so that they arrive in another order, across receives
    /// too. Not for FIFO queues, which take no delay per message.
    Scatter {
        /// The longest delay in seconds.
        delay_s_max: u32,
    },
    /// `ReceiveMessage`: up to so many of the messages are handed out again some time later, under the same
    /// message id with another receipt handle, whether or not the first one is deleted. Each message once.
    Duplicate {
        /// How many.
        messages: usize,
        /// How much later, at least a second. A FIFO queue takes no delay: it hands them out in their turn.
        delay_s: u32,
    },
    /// `ReceiveMessage`: the messages of one answer in random order.
    Reorder,
    /// `ReceiveMessage`: up to so many of the messages become visible again behind the receiver's back.
    ExpireVisibility {
        /// How many.
        messages: usize,
        /// How long after they were handed out.
        after: Duration,
    },
    /// `BatchWriteItem`, `BatchGetItem`: a share of the items, picked at random, is not forwarded and comes back
    /// as unprocessed. If that is all of them, the answer is the error that DynamoDB then gives.
    Unprocessed {
        /// From 0 to 1; fractions of an item are rounded at random.
        share: f64,
    },
    /// `BatchExecuteStatement`: up to so many statements are not forwarded and answered with an error.
    FailStatements {
        /// How many.
        statements: usize,
        /// Of `BatchStatementErrorCodeEnum`, e.g. `ThrottlingError`.
        code: &'static str,
    },
    /// `TransactWriteItems`, `ExecuteTransaction`: not forwarded, cancelled for a conflict on its first item.
    ConflictTransaction,
    /// A read by an index or without `ConsistentRead` is answered from the stale copy (see
    /// `FaultProxy::with_stale_copy`): new items are missing, removed ones are still there.
    Stale,
}

impl Fault {
    /// What SQS says above a quota.
    pub fn sqs_throttled() -> Self {
        Self::Error { status: 403, code: "RequestThrottled" }
    }

    /// What any AWS service may say above its request rate.
    pub fn throttled() -> Self {
        Self::Error { status: 400, code: "ThrottlingException" }
    }

    /// What DynamoDB says above a table's or partition's capacity.
    pub fn throughput_exceeded() -> Self {
        Self::Error { status: 400, code: "ProvisionedThroughputExceededException" }
    }

    /// An error of the service's own.
    pub fn internal_error() -> Self {
        Self::Error { status: 500, code: "InternalServerError" }
    }

    /// The service is away.
    pub fn unavailable() -> Self {
        Self::Error { status: 503, code: "ServiceUnavailable" }
    }

    /// Entries that may succeed when they are sent again.
    pub fn fail_entries(entries: usize) -> Self {
        Self::FailEntries { entries, code: "InternalError", sender_fault: false }
    }

    /// Entries that never will.
    pub fn refuse_entries(entries: usize) -> Self {
        Self::FailEntries { entries, code: "InvalidMessageContents", sender_fault: true }
    }

    /// Whether it can happen to this operation.
    fn suits(&self, operation: &str) -> bool {
        match self {
            Self::Error { .. } | Self::Hang { .. } | Self::Close { .. } => true,
            Self::FailEntries { .. } => {
                ["SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"]
                    .contains(&operation)
            }
            Self::Scatter { .. } => operation == "SendMessageBatch",
            Self::Duplicate { .. } | Self::Reorder | Self::ExpireVisibility { .. } => {
                operation == "ReceiveMessage"
            }
            Self::Unprocessed { .. } => ["BatchWriteItem", "BatchGetItem"].contains(&operation),
            Self::FailStatements { .. } => operation == "BatchExecuteStatement",
            Self::ConflictTransaction => ["TransactWriteItems", "ExecuteTransaction"].contains(&operation),
            Self::Stale => ["Query", "Scan", "GetItem", "BatchGetItem"].contains(&operation),
        }
    }

    /// Does to a request what is to be done before it is forwarded.
    pub(super) fn begin(&self, call: &mut Call, rng: &mut SmallRng) -> Begun {
        match *self {
            Self::Error { status, code } => Begun::Answer { status, body: error(code) },
            Self::Hang { forward: false } => Begun::Silence(Silence::Hang),
            Self::Close { forward: false } => Begun::Silence(Silence::Close),
            Self::Hang { forward: true } => Begun::Later(After::Silence(Silence::Hang)),
            Self::Close { forward: true } => Begun::Later(After::Silence(Silence::Close)),
            Self::FailEntries { entries, code, sender_fault } => {
                let failed = sqs::take_entries(&mut call.request, entries, rng);
                if failed.is_empty() {
                    return Begun::Nothing;
                }
                let failed = failed.iter().map(|entry| sqs::failed(entry, code, sender_fault)).collect();
                Begun::Later(After::Failed(failed))
            }
            Self::Scatter { delay_s_max } => {
                sqs::scatter(&mut call.request, delay_s_max, rng);
                Begun::Changed
            }
            Self::Duplicate { messages, delay_s } => {
                let asked = sqs::widen(&mut call.request);
                Begun::Later(After::Duplicate { messages, delay_s, asked })
            }
            Self::Reorder => Begun::Later(After::Reorder(rng.random())),
            Self::ExpireVisibility { messages, after } => Begun::Later(After::Expire { messages, after }),
            Self::Unprocessed { share } => {
                let field = dynamodb::unprocessed_field(&call.operation);
                match dynamodb::withhold(&mut call.request, share, rng) {
                    None => Begun::Nothing,
                    Some(_) if call.is_spent() => {
                        Begun::Answer { status: 400, body: error("ProvisionedThroughputExceededException") }
                    }
                    Some(withheld) => Begun::Later(After::Unprocessed { field, withheld }),
                }
            }
            Self::FailStatements { statements, code } => {
                let failed = dynamodb::take_statements(&mut call.request, statements, code, rng);
                if failed.is_empty() { Begun::Nothing } else { Begun::Later(After::Responses(failed)) }
            }
            Self::ConflictTransaction => {
                Begun::Answer { status: 400, body: dynamodb::conflict(&call.operation, &call.request) }
            }
            Self::Stale if dynamodb::may_be_stale(&call.operation, &call.request) => {
                call.is_stale = true;
                Begun::Changed
            }
            Self::Stale => Begun::Nothing,
        }
    }
}

/// An error's body in the JSON protocol of both services.
fn error(code: &str) -> Value {
    json!({ "__type": code, "message": format!("injected by the test's fault proxy: {code}") })
}

/// One request on its way.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) operation: String,
    pub(super) request: Value,
    /// Whether `request` is not what came any more.
    pub(super) is_changed: bool,
    /// Whether it goes to the stale copy.
    pub(super) is_stale: bool,
}

impl Call {
    /// Whether a batch has nothing left to be forwarded: the services refuse an empty one.
    pub(super) fn is_spent(&self) -> bool {
        let request = &self.request;
        let list = request.get("Entries").or_else(|| request.get("Statements"));
        list.and_then(Value::as_array).is_some_and(Vec::is_empty)
            || request["RequestItems"].as_object().is_some_and(serde_json::Map::is_empty)
    }
}

/// What a fault made of a request.
#[derive(Debug)]
pub(super) enum Begun {
    /// It did not happen: nothing matched.
    Nothing,
    /// It is done.
    Changed,
    /// The rest is to be done with the answer.
    Later(After),
    /// The request is not forwarded but answered.
    Answer { status: u16, body: Value },
    /// It is not forwarded and not answered.
    Silence(Silence),
}

/// How a call goes without an answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Silence {
    Hang,
    Close,
}

/// What is left to do when the service has answered.
#[derive(Debug)]
pub(super) enum After {
    Silence(Silence),
    Failed(Vec<Value>),
    Duplicate { messages: usize, delay_s: u32, asked: sqs::Asked },
    Reorder(u64),
    Expire { messages: usize, after: Duration },
    Unprocessed { field: &'static str, withheld: Value },
    Responses(Vec<(usize, Value)>),
}

/// A fault and when it happens. At every call, unless limited; several limits hold together, and the faults of
/// several rules happen to one call together, in the order of their rules.
#[derive(Clone, Debug)]
pub struct Rule {
    operation: &'static str,
    fault: Fault,
    skip: u32,
    left: Option<u32>,
    probability: f64,
    rng: SmallRng,
}

impl Rule {
    /// `fault` at calls of `operation`, e.g. `SendMessageBatch`.
    pub fn on(operation: &'static str, fault: Fault) -> Self {
        assert!(fault.suits(operation), "{fault:?} can't happen to {operation}");
        Self { operation, fault, skip: 0, left: None, probability: 1.0, rng: SmallRng::seed_from_u64(0) }
    }

    /// Only `calls` times. A fault that had nothing to happen to (no message was received) does not count.
    pub fn next(mut self, calls: u32) -> Self {
        self.left = Some(calls);
        self
    }

    /// Not at the first `calls`.
    pub fn skip(mut self, calls: u32) -> Self {
        self.skip = calls;
        self
    }

    /// At random; `seed` decides too which entries or items are hit.
    pub fn with_probability(mut self, probability: f64, seed: u64) -> Self {
        assert!((0.0..=1.0).contains(&probability), "a probability: {probability}");
        self.probability = probability;
        self.rng = SmallRng::seed_from_u64(seed);
        self
    }

    fn fires(&mut self, operation: &str) -> bool {
        if operation != self.operation || self.left == Some(0) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if !self.rng.random_bool(self.probability) {
            return false;
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        true
    }
}

/// A fault that is to happen to one call.
#[derive(Debug)]
pub(super) struct Drawn {
    /// Of the rule, for `Plan::settle`.
    rule: u64,
    pub(super) fault: Fault,
    pub(super) rng: SmallRng,
}

/// The rules in force, and what has come of them.
#[derive(Debug, Default)]
pub(super) struct Plan {
    rules: BTreeMap<u64, Rule>,
    added: u64,
    injected: BTreeMap<String, u64>,
}

impl Plan {
    pub(super) fn add(&mut self, rule: Rule) {
        self.rules.insert(self.added, rule);
        self.added += 1;
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// The faults of one call.
    pub(super) fn draw(&mut self, operation: &str) -> Vec<Drawn> {
        let mut drawn = Vec::new();
        for (id, rule) in &mut self.rules {
            if rule.fires(operation) {
                let rng = SmallRng::seed_from_u64(rule.rng.random());
                drawn.push(Drawn { rule: *id, fault: rule.fault.clone(), rng });
            }
        }
        drawn
    }

    /// Says whether a drawn fault has happened; if not, its rule may fire again.
    pub(super) fn settle(&mut self, drawn: &Drawn, operation: &str, happened: bool) {
        if happened {
            *self.injected.entry(operation.to_owned()).or_default() += 1;
        } else if let Some(left) = self.rules.get_mut(&drawn.rule).and_then(|rule| rule.left.as_mut()) {
            *left += 1;
        }
    }

    pub(super) fn injected(&self, operation: &str) -> u64 {
        self.injected.get(operation).copied().unwrap_or_default()
    }
}
