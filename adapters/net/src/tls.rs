//! TLS as a client: rustls with ring, TLS 1.2 and 1.3, the system's roots and one extra file.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// A configuration that trusts the system's roots and those in `ca_file`. The error is for the operator and says
/// what to do.
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
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
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring offers TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let mut count = 0;
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())? {
        let certificate = certificate.map_err(|error| format!("no PEM certificate: {error}"))?;
        roots.add(certificate).map_err(|error| format!("certificate {}: {error}", count + 1))?;
        count += 1;
    }
    if count == 0 {
        return Err("holds no certificate (expected PEM, `-----BEGIN CERTIFICATE-----`)".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn an_unusable_ca_file_is_named_with_the_reason() {
        let error = |path: &Path| client_config(Some(path)).err().unwrap();
        assert!(error(Path::new("/nowhere/ca.pem")).contains("/nowhere/ca.pem"));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(error(file.path()).contains("holds no certificate"));
        file.write_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(error(file.path()).contains("certificate 1"));
    }
}
