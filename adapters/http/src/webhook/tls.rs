//! TLS for HTTP/1.1 and HTTP/2.

use std::sync::Arc;

use tokio_rustls::TlsConnector;

use super::settings::WebhookSettings;

/// What ALPN calls HTTP/2 (RFC 9113, section 3.2).
pub(super) const HTTP_2: &[u8] = b"h2";

/// A connector by the destination's settings. The error is for the operator.
pub(super) fn connector(settings: &WebhookSettings) -> Result<TlsConnector, String> {
    let WebhookSettings { keys, identity, .. } = settings;
    let mut config =
        postrider_net::tls::client_config(keys.ca_file.as_deref(), keys.min_tls, identity.as_ref())?;
    let protocols: &[&[u8]] = if keys.http2 { &[HTTP_2, b"http/1.1"] } else { &[b"http/1.1"] };
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}
