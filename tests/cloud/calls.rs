//! The way of one call through a proxy: counted, drawn faults for, changed, forwarded, changed again.

use std::{
    collections::HashMap,
    ops::{ControlFlow, RangeInclusive},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use hyper::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    counts::{Counts, answered_items, requested_items},
    dynamodb,
    faults::{After, Begun, Call, Drawn, Plan, Silence},
    replica::{Replica, is_write},
    sqs,
    upstream::{Problems, Upstream},
};

/// What the calls of one proxy share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) plan: Mutex<Plan>,
    pub(super) counts: Mutex<Counts>,
    /// When calls arrived, by operation.
    pub(super) arrivals: Mutex<HashMap<String, Vec<Instant>>>,
    pub(super) latency: Mutex<Option<(RangeInclusive<Duration>, SmallRng)>>,
    pub(super) problems: Arc<Problems>,
    pub(super) replica: Option<Replica>,
    upstream: Upstream,
    /// The message ids of duplicates, and under which id the queue first knew them.
    known_as: Mutex<HashMap<String, Value>>,
    /// How many duplicates were sent.
    resent: AtomicU64,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics while holding it")
}

/// What becomes of a call.
#[derive(Debug)]
pub(super) enum Fate {
    Answered(Response<Bytes>),
    Silent(Silence),
}

impl Shared {
    pub(super) fn new(upstream: Upstream, replica: Option<Replica>, problems: Arc<Problems>) -> Self {
        Self {
            plan: Mutex::default(),
            counts: Mutex::default(),
            arrivals: Mutex::default(),
            latency: Mutex::default(),
            problems,
            upstream,
            replica,
            known_as: Mutex::default(),
            resent: AtomicU64::new(0),
        }
    }

    /// Takes one call through everything.
    pub(super) async fn pass(self: &Arc<Self>, operation: String, request: Request<Bytes>) -> Fate {
        // Only what is understood can be changed; anything else goes through as it is.
        let json = serde_json::from_slice(request.body()).unwrap_or(Value::Null);
        self.count_request(&operation, &json);
        self.wait().await;

        let drawn = lock(&self.plan).draw(&operation);
        let mut call = Call { operation, request: json, is_changed: false, is_stale: false };
        let afters = match self.begin(&mut call, drawn) {
            ControlFlow::Continue(afters) => afters,
            ControlFlow::Break(fate) => return fate,
        };
        let mut headers = request.headers().clone();
        headers.remove("x-amz-target");
        let answer = if call.is_spent() {
            json_response(StatusCode::OK, &json!({}))
        } else if call.is_changed {
            let body = Bytes::from(call.request.to_string());
            self.forward(&call, request.map(|_| body)).await
        } else {
            self.forward(&call, request).await
        };
        self.finish(&call, afters, answer, &headers).await
    }

    fn count_request(&self, operation: &str, request: &Value) {
        lock(&self.arrivals).entry(operation.to_owned()).or_default().push(Instant::now());
        let mut counts = lock(&self.counts);
        let count = counts.entry(operation.to_owned()).or_default();
        count.calls += 1;
        count.items += requested_items(operation, request);
    }

    fn count_answer(&self, operation: &str, answer: &Value) {
        let Some(items) = answered_items(operation, answer) else { return };
        let mut counts = lock(&self.counts);
        let count = counts.entry(operation.to_owned()).or_default();
        count.items += items;
        count.empty += u64::from(items == 0);
    }

    /// The network's latency, if a test has set one.
    async fn wait(&self) {
        let latency = lock(&self.latency).as_mut().map(|(range, rng)| {
            let us = |duration: &Duration| duration.as_micros() as u64;
            Duration::from_micros(rng.random_range(us(range.start())..=us(range.end())))
        });
        if let Some(latency) = latency {
            tokio::time::sleep(latency).await;
        }
    }

    /// Makes the drawn faults happen as far as they concern the request. Returns what is left for the answer, or
    /// what ends the call here.
    fn begin(&self, call: &mut Call, drawn: Vec<Drawn>) -> ControlFlow<Fate, Vec<(Drawn, After)>> {
        let mut plan = lock(&self.plan);
        let mut afters = Vec::new();
        let mut drawn = drawn.into_iter();
        while let Some(mut fault) = drawn.next() {
            let end = match fault.fault.begin(call, &mut fault.rng) {
                Begun::Nothing => {
                    plan.settle(&fault, &call.operation, false);
                    continue;
                }
                Begun::Changed => {
                    call.is_changed = true;
                    plan.settle(&fault, &call.operation, true);
                    continue;
                }
                Begun::Later(after) => {
                    call.is_changed = true;
                    afters.push((fault, after));
                    continue;
                }
                Begun::Answer { status, body } => {
                    let status = StatusCode::from_u16(status).expect("a rule's status is one of HTTP's");
                    Fate::Answered(json_response(status, &body))
                }
                Begun::Silence(silence) => Fate::Silent(silence),
            };
            plan.settle(&fault, &call.operation, true);
            // The others find nothing that they could happen to.
            for other in drawn.chain(afters.into_iter().map(|(other, _)| other)) {
                plan.settle(&other, &call.operation, false);
            }
            return ControlFlow::Break(end);
        }
        ControlFlow::Continue(afters)
    }

    /// Sends what is left of the request to whom it is for.
    async fn forward(&self, call: &Call, request: Request<Bytes>) -> Response<Bytes> {
        let Some(replica) = &self.replica else {
            if call.is_stale {
                self.problems.add("Fault::Stale without a stale copy to answer from".to_owned());
            }
            return self.ask(&self.upstream, request).await;
        };
        if call.is_stale {
            return self.ask(replica.upstream(), request).await;
        }
        if !is_write(&call.operation) {
            return self.ask(&self.upstream, request).await;
        }
        let _order = replica.in_order().await;
        let answer = self.ask(&self.upstream, request.clone()).await;
        if answer.status().is_success() {
            replica.repeat(&call.operation, request).await;
        }
        answer
    }

    async fn ask(&self, upstream: &Upstream, request: Request<Bytes>) -> Response<Bytes> {
        upstream.send(request).await.unwrap_or_else(|problem| {
            let body = json!({ "__type": "ServiceUnavailable", "message": problem });
            self.problems.add(problem);
            json_response(StatusCode::BAD_GATEWAY, &body)
        })
    }

    /// Does what is left to do with the answer, and counts what it brings.
    async fn finish(
        self: &Arc<Self>,
        call: &Call,
        afters: Vec<(Drawn, After)>,
        answer: Response<Bytes>,
        headers: &HeaderMap,
    ) -> Fate {
        let operation = &call.operation;
        let mut json = Value::Null;
        if answer.status().is_success() {
            json = serde_json::from_slice(answer.body()).unwrap_or(Value::Null);
        }
        let mut is_changed = operation == "ReceiveMessage" && self.rename(&mut json);
        let mut silence = None;
        for (fault, after) in afters {
            let happened = match after {
                After::Silence(how) => {
                    silence = Some(how);
                    true
                }
                // The service refused: there is nothing that the others could happen to.
                _ if json.is_null() => false,
                after => {
                    is_changed = true;
                    self.change(call, &mut json, after, headers).await
                }
            };
            lock(&self.plan).settle(&fault, operation, happened);
        }
        if let Some(silence) = silence {
            return Fate::Silent(silence);
        }
        if !json.is_null() {
            self.count_answer(operation, &json);
        }
        Fate::Answered(if is_changed { answer.map(|_| json.to_string().into()) } else { answer })
    }

    /// Does one thing to a good answer; whether there was anything to do it to.
    async fn change(
        self: &Arc<Self>,
        call: &Call,
        answer: &mut Value,
        after: After,
        headers: &HeaderMap,
    ) -> bool {
        match after {
            After::Silence(_) => {}
            After::Failed(failed) => sqs::add_failed(answer, failed),
            After::Duplicate { messages, delay_s, asked } => {
                let count = self.duplicate(call, answer, messages, delay_s, headers).await;
                sqs::narrow(answer, &asked);
                return count > 0;
            }
            After::Reorder(seed) => return sqs::reorder(answer, &mut SmallRng::seed_from_u64(seed)),
            After::Expire { messages, after } => {
                let Some(request) = sqs::expire(&call.request["QueueUrl"], answer, messages) else {
                    return false;
                };
                let (shared, headers) = (Arc::clone(self), headers.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    shared.call("ChangeMessageVisibilityBatch", &request, &headers).await;
                });
            }
            After::Unprocessed { field, withheld } => dynamodb::add_unprocessed(answer, field, withheld),
            After::Responses(responses) => dynamodb::insert_responses(answer, responses),
        }
        true
    }

    /// Sends up to `count` received messages again; returns how many. None that is a duplicate itself, else
    /// there would be no end of it.
    async fn duplicate(
        &self,
        call: &Call,
        answer: &Value,
        count: usize,
        delay_s: u32,
        headers: &HeaderMap,
    ) -> usize {
        let messages = answer["Messages"].as_array().into_iter().flatten();
        let mut done = 0;
        for message in messages {
            let is_known = lock(&self.known_as).values().any(|id| *id == message["MessageId"]);
            if is_known || done == count {
                continue;
            }
            let number = self.resent.fetch_add(1, Ordering::Relaxed);
            let send = sqs::resend(&call.request["QueueUrl"], message, delay_s, number);
            let sent = self.call("SendMessage", &send, headers).await;
            if let Some(id) = sent.as_ref().and_then(|sent| sent["MessageId"].as_str()) {
                lock(&self.known_as).insert(id.to_owned(), message["MessageId"].clone());
                done += 1;
            }
        }
        done
    }

    /// Gives duplicates the message ids of their originals, as SQS would; whether there was one.
    fn rename(&self, answer: &mut Value) -> bool {
        let known_as = lock(&self.known_as);
        if known_as.is_empty() {
            return false;
        }
        let mut is_changed = false;
        for message in sqs::messages(answer) {
            if let Some(first) = message["MessageId"].as_str().and_then(|id| known_as.get(id)) {
                message["MessageId"] = first.clone();
                is_changed = true;
            }
        }
        is_changed
    }

    /// A call of the proxy's own, not counted. `None` if it was refused, which is a problem of the test's
    /// surroundings.
    async fn call(&self, operation: &str, request: &Value, headers: &HeaderMap) -> Option<Value> {
        let mut own = Request::post("/").body(Bytes::from(request.to_string())).expect("a path and a body");
        *own.headers_mut() = headers.clone();
        let target = format!("AmazonSQS.{operation}").parse().expect("an operation's name");
        own.headers_mut().insert("x-amz-target", target);
        let answer = self.ask(&self.upstream, own).await;
        if !answer.status().is_success() {
            let body = String::from_utf8_lossy(answer.body());
            self.problems.add(format!("the proxy's own {operation} was refused: {body}"));
            return None;
        }
        serde_json::from_slice(answer.body()).ok()
    }
}

fn json_response(status: StatusCode, body: &Value) -> Response<Bytes> {
    Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/x-amz-json-1.0")
        .body(Bytes::from(body.to_string()))
        .expect("a status, a fixed header and a body")
}
