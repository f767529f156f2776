//! TLS: what is trusted, what is refused, and how it is called (F41). All of it by HTTP/1.1; HTTP/2 has tests of its own.

use postrider_net::tls::{Identity, TlsVersion};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ALL_VERSIONS, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::ring::default_provider,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use tempfile::NamedTempFile;
use tokio_rustls::TlsAcceptor;

use super::*;

/// A certificate authority and the file that makes a client trust it.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
    file: NamedTempFile,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), certificate.pem()).unwrap();
        Self { issuer: Issuer::new(params, key), certificate, file }
    }

    /// Answers requests over TLS with a certificate for `name`.
    async fn serve(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
        needs_client: bool,
    ) -> Server {
        self.serve_by(name, change, needs_client, ALL_VERSIONS).await
    }

    /// The same with these versions of TLS.
    async fn serve_by(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
        needs_client: bool,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Server {
        let acceptor = self.acceptor(name, change, needs_client, versions, &[b"h2", b"http/1.1"]);
        Server::start(move |stream, _| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
                while read_request(&mut stream).await.is_some() {
                    stream.write_all(OK).await.unwrap();
                }
            }
        })
        .await
    }

    /// A server's side of TLS, which offers these protocols.
    pub(super) fn acceptor(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
        needs_client: bool,
        versions: &[&'static SupportedProtocolVersion],
        protocols: &[&[u8]],
    ) -> TlsAcceptor {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .unwrap();
        let builder = if needs_client {
            let mut roots = RootCertStore::empty();
            roots.add(self.certificate.der().clone()).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }

    /// A client's certificate and key.
    fn identity(&self) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["client".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity::from_pem(&certificate.pem(), &key.serialize_pem()).unwrap()
    }

    /// A client that trusts this authority.
    fn webhook(&self, host: &str, server: &Server) -> HttpWebhook {
        let mut settings = self.settings(host, server);
        settings.keys.http2 = false;
        HttpWebhook::new(settings).unwrap()
    }

    /// Its settings, by which it speaks HTTP/2 too.
    pub(super) fn settings(&self, host: &str, server: &Server) -> WebhookSettings {
        let mut settings = settings(&format!("https://{host}:{}/hook", server.address.port()));
        settings.keys.ca_file = Some(self.file.path().to_owned());
        settings
    }
}

#[tokio::test]
async fn a_trusted_receiver_is_reached_by_name_or_address_and_the_connection_kept() {
    let authority = Authority::new();
    for host in ["localhost", "127.0.0.1"] {
        let server = authority.serve(host, |_| {}, false).await;
        let webhook = authority.webhook(host, &server);
        for _ in 0..5 {
            assert_eq!(send(&webhook).await, SENT);
        }
        assert_eq!(server.connections(), 1);
        assert_eq!(send_body(&webhook, &vec![b'x'; 1 << 20]).await, SENT);
    }
}

#[tokio::test]
async fn f41_untrusted_certificates_are_refused() {
    let authority = Authority::new();
    let expired = |params: &mut CertificateParams| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    };
    let server = authority.serve("localhost", expired, false).await;
    assert_eq!(send(&authority.webhook("localhost", &server)).await, retryable(Reason::Tls), "expired");

    let server = authority.serve("other.example", |_| {}, false).await;
    assert_eq!(send(&authority.webhook("localhost", &server)).await, retryable(Reason::Tls), "wrong host");

    let server = Authority::new().serve("localhost", |_| {}, false).await;
    assert_eq!(send(&authority.webhook("localhost", &server)).await, retryable(Reason::Tls), "unknown CA");
}

#[tokio::test]
async fn f41_a_client_certificate_that_we_do_not_have_is_a_tls_error() {
    // TLS 1.3: the server refuses after our side of the handshake is done.
    let authority = Authority::new();
    let server = authority.serve("localhost", |_| {}, true).await;
    assert_eq!(send(&authority.webhook("localhost", &server)).await, retryable(Reason::Tls));
}

#[tokio::test]
async fn a_receiver_that_asks_for_a_certificate_is_shown_it() {
    let authority = Authority::new();
    let server = authority.serve("localhost", |_| {}, true).await;
    let with = |identity| {
        let settings = authority.webhook("localhost", &server).settings.clone();
        HttpWebhook::new(WebhookSettings { identity: Some(identity), ..settings }).unwrap()
    };
    assert_eq!(send(&with(authority.identity())).await, SENT);
    assert_eq!(send(&with(Authority::new().identity())).await, retryable(Reason::Tls), "somebody else's");
    // Who does not ask is not bothered.
    let server = authority.serve("localhost", |_| {}, false).await;
    let settings = authority.webhook("localhost", &server).settings.clone();
    let identity = Some(authority.identity());
    assert_eq!(send(&HttpWebhook::new(WebhookSettings { identity, ..settings }).unwrap()).await, SENT);
}

#[tokio::test]
async fn f41_a_version_of_tls_below_the_oldest_is_refused() {
    let authority = Authority::new();
    for (version, oldest, outcome) in [
        (&TLS12, TlsVersion::Tls12, SENT),
        (&TLS13, TlsVersion::Tls12, SENT),
        (&TLS13, TlsVersion::Tls13, SENT),
        (&TLS12, TlsVersion::Tls13, retryable(Reason::Tls)),
    ] {
        let server = authority.serve_by("localhost", |_| {}, false, &[version]).await;
        let mut settings = authority.webhook("localhost", &server).settings.clone();
        settings.keys.min_tls = oldest;
        assert_eq!(send(&HttpWebhook::new(settings).unwrap()).await, outcome, "{version:?} {oldest:?}");
    }
}

#[tokio::test]
async fn f41_old_tls_and_no_tls_are_refused() {
    let authority = Authority::new();
    for answer in [
        // A fatal alert, protocol_version: what a TLS 1.0 server says.
        &b"\x15\x03\x01\x00\x02\x02\x46"[..],
        // A TLS 1.0 server hello.
        b"\x16\x03\x01\x00\x2a\x02\x00\x00\x26\x03\x0112345678901234567890123456789012\x00\x00\x2f\x00",
        b"HTTP/1.1 400 The plain HTTP request was sent to HTTPS port\r\n\r\n",
    ] {
        let server = Server::start(move |mut stream, _| async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(answer).await;
        })
        .await;
        let outcome = send(&authority.webhook("localhost", &server)).await;
        assert_eq!(outcome, retryable(Reason::Tls), "{}", answer.escape_ascii());
    }
}

#[tokio::test]
async fn f41_a_handshake_that_hangs_ends_with_the_connect_timeout() {
    let authority = Authority::new();
    let server = Server::start(|mut stream, _| async move {
        while stream.read(&mut [0; 4096]).await.is_ok_and(|len| len > 0) {}
    })
    .await;
    let mut settings = authority.webhook("localhost", &server).settings.clone();
    settings.connect_timeout = Duration::from_millis(100);
    let started = Instant::now();
    assert_eq!(send(&HttpWebhook::new(settings).unwrap()).await, retryable(Reason::Tls));
    assert!(started.elapsed() < Duration::from_secs(5));
}
