//! What a destination's webhook needs to know.

use std::{fmt, time::Duration};

use postrider_net::tls::Identity;
use postrider_settings::Retry;
use secrecy::SecretString;
use url::{Host, Url};

use super::keys::WebhookKeys;

/// Until a connection is open: name lookup, TCP and TLS; a part of the attempt's timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// One destination's webhook, with what its keys only name.
#[derive(Clone)]
pub struct WebhookSettings {
    /// `[destinations.NAME]`, what a webhook has. As many connections are kept at most as requests may be in
    /// flight.
    pub keys: WebhookKeys,
    /// Sent with every request; see [`validate`](super::validate) for what they may be.
    pub headers: Vec<(String, String)>,
    /// One signature each; none means that requests are not signed.
    pub secrets: Vec<SecretString>,
    /// Shown to a receiver that asks for a certificate.
    pub identity: Option<Identity>,
    /// For opening a connection.
    pub connect_timeout: Duration,
    /// `Retry-After` counts no longer than this.
    pub retry_after_max: Duration,
}

impl WebhookSettings {
    /// Without headers and certificate.
    pub fn new(keys: WebhookKeys, secrets: Vec<SecretString>, retry: &Retry) -> Self {
        Self {
            headers: Vec::new(),
            secrets,
            identity: None,
            connect_timeout: CONNECT_TIMEOUT.min(keys.timeout),
            retry_after_max: retry.max_retry_after,
            keys,
        }
    }
}

impl fmt::Debug for WebhookSettings {
    /// The origin and no more: path, headers and secrets may all grant access (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookSettings")
            .field("origin", &self.keys.url.origin().ascii_serialization())
            .field("headers", &self.headers.len())
            .field("secrets", &self.secrets.len())
            .field("concurrency", &self.keys.concurrency)
            .field("timeout", &self.keys.timeout)
            .finish_non_exhaustive()
    }
}

/// The value of the `Host` header: with brackets if it is an IPv6 address, with the port if
/// it is not the scheme's own.
pub(super) fn host_header(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The parts of the URL that a connection needs; `None` if it has no host, which http(s) URLs have.
pub(super) fn authority(url: &Url) -> Option<(Host<String>, u16)> {
    Some((url.host()?.to_owned(), url.port_or_known_default()?))
}

#[cfg(test)]
mod tests {
    use postrider_settings::Keys as _;

    use super::*;

    #[test]
    fn debug_shows_the_origin_and_nothing_that_grants_access() {
        let url = Url::parse("https://hooks.example.com/services/T0KEN?k=T0KEN").unwrap();
        let keys = WebhookKeys { url: url.into(), ..WebhookKeys::declared() };
        let secrets = vec!["T0KEN".to_owned().into()];
        let settings = WebhookSettings {
            headers: vec![("authorization".into(), "Bearer T0KEN".into())],
            ..WebhookSettings::new(keys, secrets, &Retry::declared())
        };
        let shown = format!("{settings:?}");
        assert!(shown.contains("hooks.example.com") && !shown.contains("T0KEN"), "{shown}");
    }
}
