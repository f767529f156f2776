//! Where messages go.

use std::{fmt, ops::Deref, path::PathBuf, time::Duration};

use postrider_actors::model::{
    retry::RetrySchedule,
    table::{Mapping, TableName},
};
use url::Url;

use super::{Rate, SecretSource};
use crate::adapters::webhook::JsonPointer;

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// What it is.
    pub target: Target,
    /// Messages per second; `None`: no bound.
    pub rate: Option<Rate>,
    /// Whether its messages are held back.
    pub is_paused: bool,
    /// When a failed attempt is made again.
    pub retry: RetrySchedule,
}

/// What a destination is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One request per message.
    Webhook(Box<Webhook>),
    /// One row per message.
    Table(Table),
}

impl Destination {
    /// The webhook, if it is one.
    pub fn webhook(&self) -> Option<&Webhook> {
        match &self.target {
            Target::Webhook(webhook) => Some(webhook),
            Target::Table(_) => None,
        }
    }

    /// The table, if it is one.
    pub fn table(&self) -> Option<&Table> {
        match &self.target {
            Target::Webhook(_) => None,
            Target::Table(table) => Some(table),
        }
    }
}

/// A warehouse's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The name of its warehouse.
    pub warehouse: String,
    /// Its name there.
    pub table: TableName,
    /// How a message becomes a row; the first column is the key.
    pub mapping: Mapping,
    /// Rows per statement.
    pub max_rows: usize,
    /// The longest that a batch waits for others.
    pub linger: Duration,
}

/// A webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// Where requests go.
    pub url: WebhookUrl,
    /// What requests are signed with, all of them; none: not signed.
    pub secrets: Vec<SecretSource>,
    /// Requests in flight.
    pub concurrency: usize,
    /// From the start of an attempt to its end.
    pub timeout: Duration,
    /// From the start of a connection to its first use; at most `timeout`.
    pub connect_timeout: Duration,
    /// Bytes of an answer's body that are read.
    pub max_response_bytes: usize,
    /// The body.
    pub template: TemplateSource,
    /// The body's content type.
    pub content_type: String,
    /// Headers that each request carries; names in lower case, each once.
    pub headers: Vec<Header>,
    /// Certificates that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// The longest `Retry-After` that is honoured; at most `retry.max_age`.
    pub max_retry_after: Duration,
    /// Where in an answer the receiver's own id for the message stands; `None`: it is not kept.
    pub provider_id: Option<JsonPointer>,
}

/// A webhook's address. Some providers put a secret into the path, so `Debug` stops at the host.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookUrl(pub(crate) Url);

impl Deref for WebhookUrl {
    type Target = Url;

    fn deref(&self) -> &Url {
        &self.0
    }
}

impl fmt::Debug for WebhookUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/…", self.0.origin().ascii_serialization())
    }
}

/// Where a body comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateSource {
    /// `{"id":…,"feed":…,"recipient":…,"data":{…}}`
    Default,
    /// This template.
    Inline(String),
    /// The template in this file.
    File(PathBuf),
}

/// A static header.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    /// In lower case.
    pub name: String,
    /// Its value, or where it is kept.
    pub value: HeaderValue,
}

/// A static header's value.
#[derive(Clone, PartialEq, Eq)]
pub enum HeaderValue {
    /// As it stands.
    Literal(String),
    /// Kept elsewhere.
    Secret(SecretSource),
}

impl fmt::Debug for Header {
    /// Never the value: an API key is no less secret for being written into the file (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: …", self.name)
    }
}

impl fmt::Debug for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}
