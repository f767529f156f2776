//! Receivers that misbehave, of the tests' own: each costs its bound, and no message is lost or blamed.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::Signal;
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring::default_provider,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
};

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind, recipient},
    scripted::{Reply, Request},
    wait_until,
};

fn row(request: &Request) -> usize {
    request.id.rsplit('_').next().and_then(|row| row.parse().ok()).expect("ids end in a row number")
}

/// `postrider status --json` of one destination.
fn status(world: &World, destination: &str) -> serde_json::Value {
    world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json()["destinations"][destination]
        .clone()
}

fn sent(world: &World, file: &str, destination: &str) -> u64 {
    world.file(file).and_then(|file| file["destinations"][destination]["sent"].as_u64()).unwrap_or(0)
}

/// Answers 200 on every connection until `down` is set: from then on those that are there swallow what comes and answer
/// nothing, as behind a link that is down; new ones are answered. Counts what was swallowed.
fn serve_until_down(down: Arc<AtomicBool>, swallowed: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (down, swallowed) = (down.clone(), swallowed.clone());
            let is_new = down.load(Ordering::SeqCst);
            thread::spawn(move || {
                // Requests are small; one read has each whole.
                let mut request = [0; 16 << 10];
                while stream.read(&mut request).is_ok_and(|read| read > 0) {
                    if down.load(Ordering::SeqCst) && !is_new {
                        swallowed.fetch_add(1, Ordering::SeqCst);
                    } else if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn f35_connections_whose_link_is_down_cost_a_timeout_each() {
    const ROWS: usize = 2_000;
    const CONCURRENCY: u32 = 8;
    let mut world = World::new("csv");
    let (down, swallowed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let address = serve_until_down(down.clone(), swallowed.clone());
    world.script(|_| Reply::Status(200));
    world
        .set("destinations.support.url", format!("http://{address}/support"))
        .set("destinations.support.concurrency", CONCURRENCY)
        .set("destinations.support.rate_per_s", 500)
        .set("destinations.support.timeout", "2s")
        .drop_file(Input::csv("link.csv", ROWS).all(Kind::Sent))
        .start_ready();
    wait_until(LIVENESS, "some to be sent", || sent(&world, "link.csv", "support") > 0);
    down.store(true, Ordering::SeqCst);
    wait_until(LIVENESS, "all to be sent", || sent(&world, "link.csv", "support") == ROWS as u64);
    let (lost, shown) = (swallowed.load(Ordering::SeqCst), status(&world, "support"));
    world.stop();
    // Each kept connection was used once more, and never again after that.
    assert!((1..=CONCURRENCY as usize).contains(&lost), "{lost}");
    assert_eq!(shown["dead"], 0, "{shown}");
    figure(format!(
        "{lost} kept connections went dead without a word: one timeout each, {ROWS} of {ROWS} sent"
    ));
}

#[test]
fn f36_slow_endless_and_huge_answers_cost_no_more_than_their_bounds() {
    const ROWS: usize = 40;
    let mut world = World::new("csv");
    let huge: Vec<u8> = std::iter::once("HTTP/1.1 200 OK\r\n".to_owned())
        .chain((0..10_000).map(|nth| format!("x-{nth}: {}\r\n", "h".repeat(1_000))))
        .chain(["content-length: 0\r\n\r\n".to_owned()])
        .flat_map(String::into_bytes)
        .collect();
    let endless = "HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
    world.script(move |request| match row(request) % 4 {
        0 => Reply::Forever(endless, Duration::ZERO),
        1 => Reply::Forever(endless, Duration::from_millis(100)),
        2 => Reply::Raw(huge.clone()),
        _ => Reply::Status(200),
    });
    let begun = Instant::now();
    world
        .set("destinations.support.timeout", "2s")
        .drop_file(Input::csv("odd.csv", ROWS).all(Kind::Sent))
        .start()
        .wait_settled(LIVENESS);
    let (took, peak) = (begun.elapsed(), world.daemon().peak_memory_bytes());
    world.stop();
    // The status line had come: nothing of that is a reason to send again.
    assert_eq!(world.prove()["requests"], ROWS);
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(peak < 128 << 20, "{peak} bytes");
    figure(format!(
        "{ROWS} answers, 3 of 4 endless, dripping or with 10 MB of headers: each sent once, in {took:.1?}"
    ));
}

#[test]
fn f39_redirects_are_not_followed() {
    const ROWS: usize = 9;
    let mut world = World::new("csv");
    world.script(|request| match request.path.as_str() {
        "/support" => Reply::Header([301, 302, 307][row(request) % 3], "location", "/elsewhere".into()),
        _ => Reply::Status(200),
    });
    // Too few for a storm: each dies once it is known that nothing better comes.
    world.drop_file(Input::csv("moved.csv", ROWS).all(Kind::Dead)).start().wait_settled(LIVENESS);
    assert!(world.requests().iter().all(|request| request.path == "/support"));
    let dead = world.postrider(&["dead", "list", "--json"]).ok().stdout;
    for code in ["301", "302", "307"] {
        assert!(dead.contains(code), "{dead}");
    }
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS);
    figure(format!("{ROWS} redirects: {ROWS} requests, none to where they point"));
}

#[test]
fn f42_a_name_that_does_not_resolve_is_waited_for_and_delays_no_other() {
    const ROWS: usize = 30;
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    world.add_destination("other").add_feed("other", "csv", &["other"]).configure();
    let right = format!("http://127.0.0.1:{}/support", world.receiver_port());
    world.set("destinations.support.url", "http://nosuch.invalid/support");
    world
        .drop_file(Input::csv("lost.csv", ROWS).all(Kind::Sent))
        .drop_into("other", Input::csv("other.csv", ROWS).all(Kind::Sent))
        .start_ready();
    wait_until(LIVENESS, "the other's to be sent", || sent(&world, "other.csv", "other") == ROWS as u64);
    wait_until(LIVENESS, "an attempt", || {
        status(&world, "support")["retrying"].as_u64().is_some_and(|n| n > 0)
    });
    assert_eq!(status(&world, "support")["dead"], 0);
    world.set("destinations.support.url", right).configure();
    world.daemon().signal(Signal::HUP);
    world.daemon().wait_log("the new configuration is in use");
    world.wait_settled(LIVENESS * 2);
    world.stop();
    assert_eq!(world.prove()["requests"], 2 * ROWS);
    figure(format!(
        "{ROWS} messages to a name that is not there: none dead, each sent once when it is corrected"
    ));
}

/// Answers 200 over TLS, with a certificate that `authority` has made out to `name`.
fn serve_tls(name: &str, authority: &Issuer<'static, KeyPair>) -> SocketAddr {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("it is a name");
    let certificate = params.signed_by(&key, authority).expect("it is signed");
    let private = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).expect("it was just written");
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .expect("key and certificate belong together");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = ServerConnection::new(config.clone()).expect("the configuration is right");
            thread::spawn(move || {
                let mut stream = StreamOwned::new(connection, stream);
                // Requests are small; one read has each whole. An error is a peer that does not trust us.
                let mut request = [0; 16 << 10];
                while stream.read(&mut request).is_ok_and(|read| read > 0) {
                    if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn f41_a_certificate_that_is_not_trusted_kills_nothing_and_opens_the_breaker() {
    const ROWS: usize = 200;
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).expect("it signs itself");
    let ca = world.path("ca.pem");
    fs::write(&ca, certificate.pem()).expect("the directory is ours");
    let authority = Issuer::new(params, key);
    let input = Input::csv("secure.csv", ROWS).all(Kind::Sent);
    let who = recipient("secure.csv", 1);
    let (right, elsewhere) = (serve_tls("localhost", &authority), serve_tls("example.com", &authority));
    world
        .set("destinations.support.url", format!("https://localhost:{}/support", elsewhere.port()))
        .drop_file(input)
        .start_ready();
    // First nobody trusts who signed it, then it is for another host, then it is right.
    let wait_refused = |world: &World| {
        wait_until(LIVENESS, "an attempt", || {
            let told = world.postrider(&["messages", "--recipient", &who, "--json"]).stdout;
            told.contains("tls") && status(world, "support")["out_since"].is_string()
        });
        let shown = status(world, "support");
        assert!(shown["dead"] == 0 && shown["sent"] == 0, "{shown}");
    };
    wait_refused(&world);
    world.set("destinations.support.ca_file", ca.display().to_string()).configure();
    world.daemon().signal(Signal::HUP);
    world.daemon().wait_log("the new configuration is in use");
    wait_refused(&world);
    world.set("destinations.support.url", format!("https://localhost:{}/support", right.port())).configure();
    world.daemon().signal(Signal::HUP);
    wait_until(LIVENESS, "all to be sent", || sent(&world, "secure.csv", "support") == ROWS as u64);
    assert_eq!(status(&world, "support")["dead"], 0);
    world.stop();
    figure(format!(
        "{ROWS} messages behind a certificate that nobody trusts, then one for another host: 0 dead, {ROWS} sent once it \
         is right"
    ));
}
