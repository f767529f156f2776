//! TLS for HTTP/1.1.

use std::{path::Path, sync::Arc};

use tokio_rustls::TlsConnector;

/// A connector that trusts the system's roots and those in `ca_file`. The error is for the operator.
pub(super) fn connector(ca_file: Option<&Path>) -> Result<TlsConnector, String> {
    let mut config = postrider_net::tls::client_config(ca_file)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
