//! The webhook port over HTTP/1.1: a writer and reader of our own on tokio, because the client decides
//! the end-to-end rate (`docs/decisions/0006-http-client.md`).
//!
//! The path of one attempt: take an idle [`connection`] or [`connect`]; write the [`request`] from the
//! destination's template, signed by [`crate::signature`]; read the [`response`]; put the connection back.
//! Nothing runs between attempts but the reaper of [`idle`] connections, and no task owns a connection:
//! an attempt that is cancelled closes its own and disturbs no other.

mod connect;
mod connection;
mod idle;
mod keys;
mod provider_id;
mod request;
mod response;
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
use postrider_actors::{
    model::{
        http_policy,
        outcome::{Outcome, Reason},
    },
    ports::{self, Webhook, WebhookRequest},
};
use tokio::time::Instant;

use self::{
    connect::Connector,
    connection::{Connection, Response, idle_max},
    idle::IdleConnections,
    provider_id::NoId,
    request::RequestTemplate,
    shortage::Trouble,
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
/// same.
const RESPONSE_BYTES_MAX: u64 = 64 << 10;

/// One destination's receiver.
pub struct HttpWebhook {
    settings: WebhookSettings,
    template: RequestTemplate,
    connector: Connector,
    idle: IdleConnections,
    /// 2xx answers without the id that they should hold.
    ids_missing: AtomicU64,
}

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
        let connector = Connector::new(&settings.keys, tls, settings.connect_timeout).map_err(|error| {
            problem("url".into(), error, "expected http://host/path or https://host/path")
        })?;
        let idle = IdleConnections::new(settings.keys.in_flight_max());
        Ok(Self { settings, template, connector, idle, ids_missing: AtomicU64::new(0) })
    }

    /// Makes one attempt: one request, unless a kept connection turns out to be closed before a byte of
    /// it was sent. Then, and only then, it goes out on a new one (I5: still at most one request).
    async fn attempt(&self, request: &WebhookRequest<'_>) -> Result<Response, Trouble> {
        let deadline = Instant::now() + self.settings.keys.timeout;
        if let Some(kept) = self.idle.take() {
            match self.exchange(kept, request, deadline).await {
                Err(no_answer) if no_answer.nothing_sent => {}
                done => return done.map_err(|no_answer| no_answer.trouble),
            }
        }
        let stream = self.connector.connect(deadline).await?;
        let fresh = Connection::new(stream, deadline);
        self.exchange(fresh, request, deadline).await.map_err(|no_answer| no_answer.trouble)
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        request: &WebhookRequest<'_>,
        deadline: Instant,
    ) -> Result<Response, connection::NoAnswer> {
        self.template.write(request, &mut connection.output).map_err(|_| Reason::Render)?;
        let keep_body = self.settings.keys.provider_id.is_some();
        let answer = connection.exchange(deadline, RESPONSE_BYTES_MAX, keep_body).await?;
        if answer.reusable {
            self.idle.put(connection, Instant::now() + idle_max(&answer.head, IDLE_MAX));
        }
        Ok(answer)
    }
}

impl HttpWebhook {
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
            Ok(Response { head, body, .. }) => {
                let outcome = http_policy::outcome(
                    head.status,
                    head.retry_after,
                    request.at,
                    self.settings.retry_after_max,
                );
                let provider_id = match (outcome, &self.settings.keys.provider_id) {
                    (Outcome::Sent { .. }, Some(pointer)) => self.provider_id(pointer, body.as_deref()),
                    _ => None,
                };
                return ports::Answer { outcome, provider_id };
            }
            // Retrying won't help a content type that is not a valid header value.
            Err(Trouble::Failed(reason @ Reason::Render)) => Outcome::Permanent { status: 0, reason },
            Err(Trouble::Failed(reason)) => Outcome::Retryable { status: 0, reason, retry_after: None },
            Err(Trouble::Unsent(obstacle)) => Outcome::Unsent(obstacle),
        };
        outcome.into()
    }
}
