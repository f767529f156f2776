//! Who collects, and what an exporter can't do without.

use std::{fmt, io};

use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

/// Who collects.
#[derive(Clone)]
pub struct CollectorSettings {
    /// Its address, without `/v1/traces`.
    pub endpoint: Url,
    /// Headers of each request.
    pub headers: Vec<(String, SecretString)>,
}

impl fmt::Debug for CollectorSettings {
    /// No header's value (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.headers.iter().map(|(name, _)| name).collect();
        f.debug_struct("CollectorSettings")
            .field("endpoint", &self.endpoint)
            .field("headers", &names)
            .finish()
    }
}

impl CollectorSettings {
    /// Whether both are the same collector, asked in the same way.
    pub fn is_same(&self, other: &Self) -> bool {
        let exposed =
            |(name, value): &(String, SecretString)| (name.clone(), value.expose_secret().to_owned());
        self.endpoint == other.endpoint
            && self.headers.iter().map(exposed).eq(other.headers.iter().map(exposed))
    }
}

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// The system has no thread to spare.
    #[error("the thread that exports spans can't be started: {0}")]
    Thread(#[from] io::Error),
    /// TLS needs them.
    #[error("the system has no root certificates: install ca-certificates")]
    NoRoots,
}
