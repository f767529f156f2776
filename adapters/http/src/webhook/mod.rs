//! The webhook port over HTTP/1.1: a writer and reader of our own on tokio, because the client decides
//! the end-to-end rate (`docs/decisions/0006-http-client.md`). Where TLS negotiates it, over HTTP/2: [`http2`].
//!
//! The path of one attempt: take an idle [`connection`] or [`connect`]; write the [`request`] from the
//! destination's template, signed by [`crate::signature`]; read the [`response`]; put the connection back.
//! Nothing runs between attempts but the reaper of [`idle`] connections, and no task owns a connection:
//! an attempt that is cancelled closes its own and disturbs no other.

mod connect;
mod connection;
mod http2;
mod idle;
mod keys;
mod provider_id;
mod request;
mod response;
mod results;
mod settings;
mod shortage;
mod stream;
mod syntax;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use postrider_actors::{
    model::{
        bundle::RESULT_BYTES_MAX,
        http_policy,
        outcome::{Outcome, Reason},
        standing::first_line,
    },
    ports::{self, Webhook, WebhookRequest},
};
use tokio::time::Instant;

use self::{
    connect::Connector,
    connection::{Answer, Connection, NoAnswer, idle_max},
    http2::{Place, SharedConnections},
    idle::IdleConnections,
    provider_id::NoId,
    request::{Http2Template, RequestTemplate},
    shortage::Trouble,
    stream::Stream,
};
pub use self::{
    keys::{WebhookKeys, WebhookUrl},
    provider_id::{BadPointer, JsonPointer},
    settings::WebhookSettings,
    syntax::{Problem, validate},
};
use crate::signature::SigningKey;

/// The longest a connection stays idle: Node, Apache and uvicorn close theirs after 5 s, and a request
/// that meets the close on its way costs an attempt. Under load none stays idle that long.
const IDLE_MAX: Duration = Duration::from_secs(4);

/// Bytes of an answer's body that are read before its connection is given up (design §10); the status counts all the
/// same. Where it says something of each message, it has room for that too.
const RESPONSE_BYTES_MAX: u64 = 64 << 10;

/// How often a request is repeated within its attempt because the receiver has not taken it: it closed the connection
/// just then, or said so. Servers of HTTP/2 say so when they reload, and after so many requests on a connection.
const REPEATS_MAX: usize = 3;

/// One destination's receiver.
pub struct HttpWebhook {
    settings: WebhookSettings,
    template: RequestTemplate,
    /// For HTTP/2, where it may be negotiated.
    http2_template: Option<Http2Template>,
    connector: Connector,
    idle: IdleConnections,
    shared: SharedConnections,
    /// 2xx answers without the id that they should hold.
    ids_missing: AtomicU64,
    /// What of a request may be secret.
    secrets: Vec<String>,
}

/// Words of configured headers that are shorter are no secrets worth the name.
const SECRET_BYTES_MIN: usize = 8;

impl fmt::Debug for HttpWebhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpWebhook").field(&self.settings).finish()
    }
}

impl HttpWebhook {
    /// Makes everything ready that does not change from message to message, and connects to nothing.
    /// Reads the system's root certificates and `ca_file` for an `https` URL. The errors are every
    /// problem that [`validate`] finds, unusable secrets by their index, and unusable certificates.
    pub fn new(settings: WebhookSettings) -> Result<Self, Vec<Problem>> {
        let problem = |key: String, found: String, allowed: &str| {
            vec![Problem { key, found, allowed: allowed.to_owned() }]
        };
        // The content type travels with each batch; any valid one does here.
        let mut problems = validate(settings.keys.url.as_str(), &settings.headers, "application/json");
        for (index, secret) in settings.secrets.iter().enumerate() {
            if let Err(error) = SigningKey::new(secret) {
                problems.extend(problem(format!("secrets[{index}]"), format!("it {error}"), "replace it"));
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let template = RequestTemplate::new(&settings)
            .map_err(|error| problem("secrets".into(), error.to_string(), "replace it"))?;
        let tls = match settings.keys.url.scheme() {
            "https" => Some(
                tls::connector(&settings)
                    .map_err(|error| problem("ca_file".into(), error, "expected PEM certificates"))?,
            ),
            _ => None,
        };
        let http2_template = (tls.is_some() && settings.keys.http2).then(|| Http2Template::new(&settings));
        let http2_template = http2_template.transpose().map_err(|error| {
            problem("url".into(), error, "set `http2 = false`: HTTP/2 can't carry such a request")
        })?;
        let connector = Connector::new(&settings.keys, tls, settings.connect_timeout).map_err(|error| {
            problem("url".into(), error, "expected http://host/path or https://host/path")
        })?;
        let limit = settings.keys.in_flight_max();
        let (idle, shared) =
            (IdleConnections::new(limit), SharedConnections::new(limit, http2_template.is_some()));
        // Whatever may be behind `Bearer`, in a cookie or in a header of the receiver's own.
        let words = settings.headers.iter().flat_map(|(_, value)| value.split_ascii_whitespace());
        let secrets = words.filter(|word| word.len() >= SECRET_BYTES_MIN).map(str::to_owned).collect();
        Ok(Self {
            secrets,
            settings,
            template,
            http2_template,
            connector,
            idle,
            shared,
            ids_missing: AtomicU64::new(0),
        })
    }

    /// Makes one attempt: one request, unless the receiver is known not to have taken it, because a kept connection turns
    /// out to be closed before a byte of it was sent, or because it says so by HTTP/2. Then, and only then, it goes out on
    /// another one (I5: still at most one request).
    async fn attempt(&self, request: &WebhookRequest<'_>) -> Result<Answer, Trouble> {
        let deadline = Instant::now() + self.settings.keys.timeout;
        let mut repeats = 0;
        loop {
            let (answer, may_repeat) = match self.line(deadline).await? {
                Line::Kept(kept) => (self.exchange(kept, request, deadline).await, true),
                Line::Fresh(fresh) => (self.exchange(fresh, request, deadline).await, false),
                Line::Shared(place) => (self.exchange_shared(place, request, deadline).await, true),
            };
            match answer {
                Err(no_answer) if no_answer.nothing_sent && may_repeat && repeats < REPEATS_MAX => {
                    repeats += 1;
                }
                done => return done.map_err(|no_answer| no_answer.trouble),
            }
        }
    }

    /// What the request goes out on: a connection that is open already, or a new one.
    async fn line(&self, deadline: Instant) -> Result<Line, Trouble> {
        let at_hand = || self.idle.take().map(Line::Kept).or_else(|| self.shared.take().map(Line::Shared));
        if let Some(line) = at_hand() {
            return Ok(line);
        }
        let mut turn = self.shared.turn(deadline).await?;
        if turn.is_some()
            && let Some(line) = at_hand()
        {
            return Ok(line); // opened by who had the turn before
        }
        let opened = match self.connector.connect(deadline).await.map(Stream::into_http2) {
            Ok(Ok(stream)) => self.shared.open(stream, deadline).await.map(Line::Shared),
            Ok(Err(stream)) => {
                self.shared.learn_http_1();
                Ok(Line::Fresh(Connection::new(stream, deadline)))
            }
            Err(trouble) => Err(trouble),
        };
        if let (Some(turn), Err(trouble)) = (&mut turn, &opened) {
            **turn = Some((Instant::now(), *trouble));
        }
        opened
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        request: &WebhookRequest<'_>,
        deadline: Instant,
    ) -> Result<Answer, NoAnswer> {
        self.template.write(request, &mut connection.output).map_err(|_| Reason::Render)?;
        let (bytes_max, keep_body) = self.body_limits(request);
        let response = connection.exchange(deadline, bytes_max, keep_body).await?;
        let head = response.head;
        if response.reusable {
            self.idle.put(connection, Instant::now() + idle_max(&head, IDLE_MAX));
        }
        Ok(Answer { status: head.status, retry_after: head.retry_after, body: response.body })
    }

    async fn exchange_shared(
        &self,
        place: Place,
        request: &WebhookRequest<'_>,
        deadline: Instant,
    ) -> Result<Answer, NoAnswer> {
        let template = self.http2_template.as_ref().expect("HTTP/2 is only negotiated where it is offered");
        let head = template.head(request).map_err(|_| Reason::Render)?;
        let body = Bytes::copy_from_slice(request.body);
        let (bytes_max, keep_body) = self.body_limits(request);
        place.exchange(head, body, deadline, bytes_max, keep_body).await
    }

    /// How much of an answer's body is read, and whether it is kept.
    fn body_limits(&self, request: &WebhookRequest<'_>) -> (u64, bool) {
        let keys = &self.settings.keys;
        let results = if keys.results.is_some() { request.messages.len() * RESULT_BYTES_MAX } else { 0 };
        (RESPONSE_BYTES_MAX + results as u64, keys.provider_id.is_some() || keys.results.is_some())
    }
}

/// What a request goes out on.
enum Line {
    /// A connection that was used before.
    Kept(Connection),
    /// A new one.
    Fresh(Connection),
    /// A place on one that is shared, by HTTP/2.
    Shared(Place),
}

impl HttpWebhook {
    /// What an answer says, and what of each message, where it is to say that.
    fn said(&self, request: &WebhookRequest<'_>, answer: Answer) -> ports::Answer {
        let (keys, longest) = (&self.settings.keys, self.settings.retry_after_max);
        let Answer { status, retry_after, body } = answer;
        let outcome = http_policy::outcome(status, retry_after, request.at, longest);
        if !matches!(outcome, Outcome::Sent { .. }) {
            let text = body.as_deref().and_then(|body| first_line(body, &self.secrets)).map(Into::into);
            return ports::Answer { text, ..outcome.into() };
        }
        let (body, pointer) = (body.as_deref(), keys.provider_id.as_ref());
        let Some(results) = &keys.results else {
            let provider_id = pointer.and_then(|pointer| self.provider_id(pointer, body));
            return ports::Answer { provider_id, ..outcome.into() };
        };
        let outcome_of = |status| http_policy::item_outcome(status, retry_after, request.at, longest);
        let (items, unnamed) = results::items(body, results, pointer, status, request.messages, outcome_of);
        if unnamed > 0 {
            tracing::warn!(
                origin = %keys.url.origin().ascii_serialization(),
                %results,
                status,
                unnamed,
                messages = items.len(),
                "an answer does not say what became of messages; they are tried again"
            );
        }
        ports::Answer { items, ..outcome.into() }
    }

    /// The id in a body that came whole. An answer without one is as good as any other, but its receipts will
    /// not find the message by it.
    fn provider_id(&self, pointer: &JsonPointer, body: Option<&[u8]>) -> Option<Box<str>> {
        match body.ok_or(NoId::NoBody).and_then(|body| pointer.find(body)) {
            Ok(id) => Some(id),
            Err(why) => {
                let missing = self.ids_missing.fetch_add(1, Relaxed) + 1;
                tracing::warn!(
                    origin = %self.settings.keys.url.origin().ascii_serialization(),
                    provider_id = %pointer,
                    missing,
                    "a 2xx answer holds no provider id: {}",
                    why.as_str()
                );
                None
            }
        }
    }
}

#[async_trait]
impl Webhook for HttpWebhook {
    async fn send(&self, request: WebhookRequest<'_>) -> ports::Answer {
        let outcome = match self.attempt(&request).await {
            Ok(answer) => return self.said(&request, answer),
            // Retrying won't help a content type that is not a valid header value.
            Err(Trouble::Failed(reason @ Reason::Render)) => Outcome::Permanent { status: 0, reason },
            Err(Trouble::Failed(reason)) => Outcome::Retryable { status: 0, reason, retry_after: None },
            Err(Trouble::Unsent(obstacle)) => Outcome::Unsent(obstacle),
        };
        outcome.into()
    }
}
