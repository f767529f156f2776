//! TLS for HTTP/1.1.

use std::sync::Arc;

use tokio_rustls::TlsConnector;

use super::settings::WebhookSettings;

/// A connector by the destination's settings. The error is for the operator.
pub(super) fn connector(settings: &WebhookSettings) -> Result<TlsConnector, String> {
    let WebhookSettings { keys, identity, .. } = settings;
    let mut config =
        postrider_net::tls::client_config(keys.ca_file.as_deref(), keys.min_tls, identity.as_ref())?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
