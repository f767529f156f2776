//! The keys of a webhook, declared where the notions that they are made of are known.

use std::{fmt, ops::Deref, path::PathBuf, time::Duration};

use ipnet::IpNet;
use postrider_actors::model::{address::is_embedding, order::OrderingKey};
use postrider_net::tls::TlsVersion;
use postrider_settings::{
    SecretSource, Section, choice, duration, flag, given, integer, optional_path, optional_secret,
    optional_text, secrets, settings, shown_text, unset,
};
use url::Url;

use super::{
    provider_id::{BadPointer, JsonPointer},
    syntax::{is_token, validate},
};

settings! {
    /// The keys of kind = "webhook".
    WebhookKeys {
        /// Where requests go: http:// or https://, without user name and password.
        url: WebhookUrl = unset("\"https://hooks.example.com/alerts\"", url);
        /// Networks that requests may go to although they are not public, such as ["10.1.0.0/16"]. Without it, no
        /// connection is opened to an address that the Internet does not route (private, loopback, link-local, …),
        /// whatever name or spelling leads to it: the messages wait, and `postrider status` names the address.
        allow: Vec<IpNet> = given("[]", allow);
        /// What requests are signed with (Standard Webhooks), up to 8: with all of them, so that a secret can be
        /// rotated. Each is "env:NAME" (a variable), "file:/PATH" (a file) or "credential:NAME" (systemd's
        /// LoadCredential=), never the secret itself. `[]` sends without a signature.
        secrets: Vec<SecretSource> = unset("[\"credential:support\"]", signing_secrets);
        /// Requests in flight. "auto" finds what the receiver can bear, between 4 and `concurrency_max`: it begins with few,
        /// doubles them while answers come as fast as before, and takes back a third when they come late or fail. A number
        /// fixes it.
        concurrency: Option<usize> = integer(64, 1..=65_536, "requests in flight").or_word("auto");
        /// The most that "auto" goes to. What all destinations have in flight is bounded by `delivery.concurrency`.
        concurrency_max: usize = integer(1_024, 4..=65_536, "requests in flight");
        /// How long one attempt may take as a whole: name lookup, connection, request and answer.
        timeout: Duration = duration("10s", "10ms"..="10m");
        /// The body in the syntax of Jinja (minijinja), at most 64KiB. It sees id, feed, recipient, row and data (the
        /// columns). If `content_type` is JSON, what it prints is JSON with its quotes: write
        /// `{"to": {{ recipient }}}`. Without a template the body is
        /// `{"id":…,"feed":…,"recipient":…,"data":{…}}`.
        template: Option<String> = unset("'{\"to\": {{ recipient }}, \"name\": {{ data.name }}}'", optional_text);
        /// The same from a file; an absolute path. Messages keep the template they were accepted with.
        template_file: Option<PathBuf> = unset("\"/etc/postrider/alerts.json.j2\"", optional_path);
        /// The body's media type.
        content_type: String = given("\"application/json\"", content_type);
        /// PEM file of certificates to trust in addition to the system's; an absolute path.
        ca_file: Option<PathBuf> = unset("\"/etc/postrider/internal-ca.pem\"", optional_path);
        /// PEM file of the certificate to show a receiver that asks for one, with those between it and its issuer;
        /// an absolute path.
        client_cert_file: Option<PathBuf> = unset("\"/etc/postrider/client.pem\"", optional_path);
        /// The private key of client_cert_file, in PEM without a password, kept where secrets are.
        client_key: Option<SecretSource> = unset("\"credential:client-key\"", optional_secret);
        /// The oldest version of TLS that is spoken.
        min_tls: TlsVersion = choice(&[("1.2", TlsVersion::Tls12), ("1.3", TlsVersion::Tls13)]);
        /// The token of `authorization: Bearer TOKEN`, kept where secrets are.
        bearer: Option<SecretSource> = unset("\"credential:support-token\"", optional_secret);
        /// USER:PASSWORD of `authorization: Basic …`, kept where secrets are.
        basic: Option<SecretSource> = unset("\"credential:support-login\"", optional_secret);
        /// Speak HTTP/2 where TLS negotiates it: few connections carry all requests. `false` for HTTP/1.1 alone.
        http2: bool = flag(true);
        /// Messages of a request, which is a JSON array of their bodies then; 0 = one message each. Its `webhook-id`
        /// is made of the list of messages. What the answer says holds for all of them, unless `results` says more; one that
        /// is refused with 400, 413 or 422 is divided until the message is found that is refused. It has messages of one batch
        /// (`batch.max_messages`) and 512KiB at most.
        bundle: Option<usize> = integer(0, 0..=1_000, "messages, 0 = one message each").or_none();
        /// Where a 2xx answer in JSON says what became of each message of a bundle: a JSON pointer to an array of
        /// objects with `id` and `status`. A message that is not there is tried again.
        results: Option<JsonPointer> = unset("\"/items\"", pointer);
        /// "per_key": messages with the same key go in the order of their rows, each once the one before is sent or given up.
        /// One that is tried again holds up its key and no other. Files go in the order in which they were accepted. Needs
        /// profile = "embedded".
        ordering: Ordering = choice(&[("none", Ordering::None), ("per_key", Ordering::PerKey)]);
        /// The column that is the key, or the field of a JSON object ("account.id"). Default: the recipient.
        ordering_key: Option<String> = unset("\"account\"", optional_text);
        /// Where a 2xx answer in JSON has the receiver's own id for the message: a JSON pointer (RFC
        /// 6901). It is kept in the ledger, and receipts may name it. Of bundles: where an object of `results` has it.
        provider_id: Option<JsonPointer> = unset("\"/message/id\"", pointer);
    }
}

/// Which messages go one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    /// None: all go as they can.
    None,
    /// Those with the same key.
    PerKey,
}

impl WebhookKeys {
    /// The key by which messages go in order, if they do.
    pub fn order(&self) -> Option<OrderingKey> {
        let column = |name: &String| OrderingKey::Column(name.as_str().into());
        let key = || self.ordering_key.as_ref().map_or(OrderingKey::Recipient, column);
        (self.ordering == Ordering::PerKey).then(key)
    }

    /// Requests that may be in flight at most.
    pub fn in_flight_max(&self) -> usize {
        self.concurrency.unwrap_or(self.concurrency_max)
    }
}

/// A webhook's address. Some providers put a secret into the path, so `Debug` stops at the host.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookUrl(Url);

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

impl From<Url> for WebhookUrl {
    fn from(url: Url) -> Self {
        Self(url)
    }
}

fn url(section: &mut Section<'_>, key: &'static str) -> WebhookUrl {
    const ADVICE: &str = "write an http:// or https:// address";
    // Part of an address may be a secret: it is not shown.
    let text = section.private_text(key);
    section.require(key, ADVICE);
    let (reader, key) = (section.reader(), section.key(key));
    let fallback =
        || WebhookUrl(Url::parse("http://invalid.invalid/").expect("the fallback is a valid address"));
    let Some(text) = text else {
        return fallback();
    };
    let url = match Url::parse(&text) {
        Ok(url) => url,
        Err(error) => {
            reader.note(&key, None, format!("it is not a valid address ({error}); {ADVICE}"));
            return fallback();
        }
    };
    if !matches!(url.scheme(), "http" | "https") {
        reader.note(&key, Some(shown_text(url.scheme())), ADVICE);
    } else if !url.username().is_empty() || url.password().is_some() {
        let advice =
            "it holds a user name or password: keep them elsewhere, as USER:PASSWORD, and set `basic`";
        reader.note(&key, None, advice);
    } else if url.fragment().is_some() {
        reader.note(&key, None, "a fragment (#…) is never sent: remove it");
    } else if text.len() > 2048 {
        reader.note(&key, Some(format!("{} bytes", text.len())), "keep to 2048 bytes");
    } else if url.port() == Some(0) {
        reader.note(&key, Some("port 0".into()), "write a port from 1 to 65535");
    }
    WebhookUrl(url)
}

/// Networks of one destination that may be allowed: each is looked at before every connection.
const ALLOW_MAX: usize = 64;

fn allow(section: &mut Section<'_>, key: &'static str) -> Vec<IpNet> {
    let reader = section.reader();
    let items = section.list(key, true).unwrap_or_default();
    if items.len() > ALLOW_MAX {
        let advice = format!("at most {ALLOW_MAX} networks");
        reader.note(&section.key(key), Some(items.len().to_string()), advice);
    }
    let mut allowed = Vec::new();
    for (path, text) in items {
        let advice = match text.parse::<IpNet>() {
            Ok(net) if net != net.trunc() => {
                format!("it is an address within a network: write \"{}\"", net.trunc())
            }
            Ok(net) if is_embedding(&net) => {
                "such an address is judged by the IPv4 address in it: write that network as IPv4".to_owned()
            }
            Ok(net) => {
                allowed.push(net);
                continue;
            }
            Err(_) => "write a network such as \"10.1.0.0/16\", \"127.0.0.1/32\" or \"fd00::/8\"".to_owned(),
        };
        reader.note(&path, Some(shown_text(&text)), advice);
    }
    allowed
}

fn signing_secrets(section: &mut Section<'_>, key: &'static str) -> Vec<SecretSource> {
    let advice = "write where the signing secrets are kept, such as [\"credential:NAME\"], or [] to send \
                  without a signature";
    let secrets = secrets(section, key);
    section.require(key, advice);
    secrets
}

fn content_type(section: &mut Section<'_>, key: &'static str) -> String {
    let is_type = |text: &str| {
        let essence = text.split(';').next().unwrap_or("").trim();
        essence.split_once('/').is_some_and(|(kind, sub)| is_token(kind) && is_token(sub))
            && validate("http://localhost/", &[], text).is_empty()
            && text.len() <= 256
    };
    section.checked_text(key, is_type, "write a media type such as \"application/json\"")
}

fn pointer(section: &mut Section<'_>, key: &'static str) -> Option<JsonPointer> {
    let pointer = section.text(key).filter(|text| !text.is_empty())?.parse();
    pointer
        .map_err(|error: BadPointer| section.reader().note(&section.key(key), None, error.to_string()))
        .ok()
}
