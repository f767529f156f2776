//! TLS: rustls with ring, TLS 1.2 and 1.3, the system's roots and one extra file.

use std::{fmt, path::Path, sync::Arc};

use rustls::{
    ClientConfig, DEFAULT_VERSIONS, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl TlsVersion {
    fn and_newer(self) -> &'static [&'static SupportedProtocolVersion] {
        static ONLY_1_3: [&SupportedProtocolVersion; 1] = [&TLS13];
        match self {
            Self::Tls12 => DEFAULT_VERSIONS,
            Self::Tls13 => &ONLY_1_3,
        }
    }
}

/// What one shows a peer that asks who it is: a certificate, and that it has the key.
#[derive(Clone)]
pub struct Identity(Arc<CertifiedKey>);

impl fmt::Debug for Identity {
    /// Nothing of the key (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

/// What is wrong with an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityError {
    /// The certificates.
    Certificates(String),
    /// The key. The text holds nothing of it.
    Key(&'static str),
}

impl Identity {
    /// Of certificates in PEM, the client's own first, and its key in PEM.
    pub fn from_pem(certificates: &str, key: &str) -> Result<Self, IdentityError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificates.as_bytes()).collect();
        let chain =
            chain.map_err(|error| IdentityError::Certificates(format!("no PEM certificate: {error}")))?;
        if chain.is_empty() {
            return Err(IdentityError::Certificates(NO_CERTIFICATE.into()));
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| {
            IdentityError::Key(
                "it is not a private key in PEM, `-----BEGIN PRIVATE KEY-----`, without a password",
            )
        })?;
        let pair = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => IdentityError::Key("it is not the key of the certificate"),
            rustls::Error::InvalidCertificate(error) => IdentityError::Certificates(format!("{error:?}")),
            _ => IdentityError::Key(
                "it is of a kind that can't sign: use RSA, ECDSA (P-256, P-384) or Ed25519",
            ),
        })?;
        Ok(Self(Arc::new(pair)))
    }
}

const NO_CERTIFICATE: &str = "holds no certificate (expected PEM, `-----BEGIN CERTIFICATE-----`)";

fn provider() -> CryptoProvider {
    ring::default_provider()
}

/// A configuration that trusts the system's roots and those in `ca_file`, speaks no version older than `oldest`, and shows
/// `identity` to a server that asks. The error is for the operator and says what to do.
pub fn client_config(
    ca_file: Option<&Path>,
    oldest: TlsVersion,
    identity: Option<&Identity>,
) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(system.certs);
    if let Some(path) = ca_file {
        add_file(&mut roots, path).map_err(|problem| format!("`ca_file` {}: {problem}", path.display()))?;
    } else if added == 0 {
        let errors: Vec<_> = system.errors.iter().map(ToString::to_string).collect();
        return Err(format!(
            "the system has no root certificates{}{}; install ca-certificates or set `ca_file`",
            if errors.is_empty() { "" } else { ": " },
            errors.join(", "),
        ));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(oldest.and_newer())
        .expect("ring offers TLS 1.2 and 1.3")
        .with_root_certificates(roots);
    Ok(match identity {
        None => builder.with_no_client_auth(),
        Some(Identity(pair)) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair.clone())))
        }
    })
}

/// A configuration for a server that shows `identity` and asks no client for its own.
pub fn server_config(identity: &Identity) -> ServerConfig {
    ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(DEFAULT_VERSIONS)
        .expect("ring offers TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.0.clone())))
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let mut count = 0;
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())? {
        let certificate = certificate.map_err(|error| format!("no PEM certificate: {error}"))?;
        roots.add(certificate).map_err(|error| format!("certificate {}: {error}", count + 1))?;
        count += 1;
    }
    if count == 0 {
        return Err(NO_CERTIFICATE.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn an_unusable_ca_file_is_named_with_the_reason() {
        let error = |path: &Path| client_config(Some(path), TlsVersion::Tls12, None).err().unwrap();
        assert!(error(Path::new("/nowhere/ca.pem")).contains("/nowhere/ca.pem"));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(error(file.path()).contains("holds no certificate"));
        file.write_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(error(file.path()).contains("certificate 1"));
    }

    #[test]
    fn an_unusable_identity_is_refused_with_the_reason_and_nothing_of_the_key() {
        let pair = || rcgen::generate_simple_self_signed(["client".to_owned()]).unwrap();
        let (own, other) = (pair(), pair());
        let (certificate, key) = (own.cert.pem(), own.signing_key.serialize_pem());
        assert!(Identity::from_pem(&certificate, &key).is_ok());
        let mismatch = Identity::from_pem(&certificate, &other.signing_key.serialize_pem()).unwrap_err();
        assert_eq!(mismatch, IdentityError::Key("it is not the key of the certificate"));
        for (certificate, key) in [("", &*key), (&*key, &*key), ("-----BEGIN CERTIFICATE-----\nA", &*key)] {
            let error = Identity::from_pem(certificate, key).unwrap_err();
            assert!(matches!(error, IdentityError::Certificates(_)), "{error:?}");
        }
        for key in ["", "hunter2", &*certificate] {
            let error = Identity::from_pem(&certificate, key).unwrap_err();
            assert!(matches!(error, IdentityError::Key(_)), "{error:?}");
            assert!(!format!("{error:?}").contains("hunter2"));
        }
    }
}
