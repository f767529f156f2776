//! One request to the collector (OTLP 1.x, "OTLP/HTTP").

use std::{sync::Arc, time::Duration};

use rustls::crypto::ring;
use secrecy::{ExposeSecret as _, SecretString};
use ureq::{
    Agent,
    http::{HeaderMap, header::RETRY_AFTER},
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{
    message,
    settings::{CollectorSettings, ExporterError},
};

/// How long a request may take, from the look-up of the name to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of an answer that are read: it says how many spans were refused, and why.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Who collects.
pub(crate) struct Collector {
    agent: Agent,
    url: String,
    headers: Vec<(String, SecretString)>,
}

/// Why spans were not taken.
pub(crate) struct NotTaken {
    pub(crate) why: String,
    /// Whether the same may be taken later.
    pub(crate) may_succeed: bool,
    /// How long the collector asks to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

impl Collector {
    pub(crate) fn new(settings: &CollectorSettings) -> Result<Self, ExporterError> {
        let mut config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None) // none from the environment
            .user_agent(concat!("postrider/", env!("CARGO_PKG_VERSION")));
        if settings.endpoint.scheme() == "https" {
            config = config.tls_config(tls()?);
        }
        let url = format!("{}/v1/traces", settings.endpoint.as_str().trim_end_matches('/'));
        Ok(Self { agent: config.build().new_agent(), url, headers: settings.headers.clone() })
    }

    /// Posts a message. If it was taken: how many of its spans were refused all the same, and why.
    pub(crate) fn post(&self, body: &[u8]) -> Result<Option<(u64, String)>, NotTaken> {
        let mut request = self.agent.post(&self.url).header("content-type", message::CONTENT_TYPE);
        for (name, value) in &self.headers {
            request = request.header(name, value.expose_secret());
        }
        // Not the URL: the operator knows it, and paths may hold keys.
        let failed =
            |error: ureq::Error| NotTaken { why: error.to_string(), may_succeed: true, retry_after: None };
        let mut answer = request.send(body).map_err(failed)?;
        let status = answer.status().as_u16();
        if answer.status().is_success() {
            let read = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
            // Taken is taken, whatever becomes of the rest.
            return Ok(read.ok().and_then(|answer| message::refused(&answer)));
        }
        Err(NotTaken {
            why: format!("status {status}"),
            // "Retryable Response Codes"
            may_succeed: matches!(status, 429 | 502 | 503 | 504),
            retry_after: retry_after(answer.headers()),
        })
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// rustls with ring, and the system's roots, as for webhooks.
fn tls() -> Result<TlsConfig, ExporterError> {
    let roots = rustls_native_certs::load_native_certs().certs;
    if roots.is_empty() {
        return Err(ExporterError::NoRoots);
    }
    let roots: Vec<_> = roots.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build())
}
