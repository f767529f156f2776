//! Requests go to public addresses only, and to what the configuration allows (F54).

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{
    ops::{alarmed, metric, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        scripted::Reply,
        wait_until,
    },
};

/// A listener that counts connections, and closes them.
struct Counter {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Counter {
    fn on(address: impl Into<SocketAddr>) -> Self {
        let listener = TcpListener::bind(address.into()).expect("the address is free");
        let (address, connections) =
            (listener.local_addr().expect("it is bound"), Arc::<AtomicUsize>::default());
        let count = connections.clone();
        thread::spawn(move || {
            for _ in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { address, connections }
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

const NOTHING: Vec<&str> = Vec::new();

#[test]
fn f54_no_spelling_of_a_private_address_is_a_destination() {
    let counter = Counter::on((Ipv4Addr::LOCALHOST, 0));
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    let spellings = [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0x7f.0.0.01",
        "%31%32%37.0.0.1",
        "\u{ff11}27\u{3002}0.0.1",
        "0",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::1]",
        "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
        "localhost",
        "LocalHost.",
        "169.254.169.254",
        "0xa9fea9fe",
        "[fd00:ec2::254]",
        "10.0.0.1",
        "192.168.1.1",
        "100.64.0.1",
    ];
    for (index, host) in spellings.iter().enumerate() {
        let name = format!("d{index}");
        world.add_destination(&name);
        let url = format!("http://{host}:{}/hook?key=t0ken", counter.address.port());
        world
            .set(&format!("destinations.{name}.url"), url)
            .set(&format!("destinations.{name}.allow"), NOTHING);
    }
    world.configure();
    let answer = world.postrider(&["check-config", "--json"]);
    assert_eq!(answer.code, Some(78));
    let problems = answer.json();
    let problems = problems["problems"].as_array().expect("they are listed");
    assert_eq!(problems.len(), spellings.len(), "{problems:#?}");
    for (index, host) in spellings.iter().enumerate() {
        let key = format!("destinations.d{index}.url");
        let problem = problems.iter().find(|problem| problem["key"] == key).expect("each is refused");
        let advice = problem["advice"].as_str().expect("text");
        assert!(
            advice.contains("is not a public address") && advice.contains("set allow = [\""),
            "{host}: {advice}"
        );
        assert!(!problem.to_string().contains("t0ken"), "{problem}");
    }
    world.start();
    assert_eq!(world.wait_exit(LIVENESS).code(), Some(78));
    assert_eq!(counter.count(), 0);
}

#[test]
fn f54_a_literal_that_is_refused_says_the_line_that_allows_it() {
    let mut world = World::new("csv");
    world.set("destinations.support.allow", NOTHING).configure();
    let refused = world.postrider(&["check-config"]);
    assert_eq!(refused.code, Some(78));
    let line = refused.stderr.split_once("if it is meant, set ").expect("it says what to write").1;
    assert!(line.starts_with("allow = [\"127.0.0.1/32\"]"), "{line}");
    world.set("destinations.support.allow", vec!["127.0.0.1/32"]).configure();
    world.postrider(&["check-config"]).ok();
    for (wrong, advice) in [
        ("127.0.0.1", "write a network such as"),
        ("127.0.0.1/8", "write \"127.0.0.0/8\""),
        ("::ffff:127.0.0.0/104", "write that network as IPv4"),
    ] {
        world.set("destinations.support.allow", vec![wrong]).configure();
        let answer = world.postrider(&["check-config"]);
        assert_eq!(answer.code, Some(78));
        assert!(answer.stderr.contains(advice), "{wrong}: {}", answer.stderr);
    }
}

/// Lets the world's daemon see a hosts file of its own, which it gives back; `None`, with a message, if this process may
/// not mount.
fn own_hosts(world: &mut World) -> Option<std::path::PathBuf> {
    let hosts = world.path("hosts");
    fs::write(&hosts, "").expect("the directory is ours");
    let mounts = Command::new("unshare").args(["--mount", "true"]).status();
    if !mounts.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a hosts file of one's own needs a mount, which is not allowed here");
        return None;
    }
    let script = format!("mount --bind '{}' /etc/hosts && exec \"$@\"", hosts.display());
    world.under(&["unshare", "--mount", "sh", "-c", &script, "sh"]);
    Some(hosts)
}

/// Longer than an answer of the resolver is used, and than an idle connection is kept.
const FORGOTTEN: Duration = Duration::from_secs(5);

#[test]
fn f54_a_name_that_leads_inside_is_not_followed_and_kills_nothing() {
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    let Some(hosts) = own_hosts(&mut world) else { return };
    let lead_to = |addresses: &[&str]| {
        let lines: Vec<_> = addresses.iter().map(|address| format!("{address} hooks.example\n")).collect();
        fs::write(&hosts, lines.concat()).expect("the file is ours");
    };
    // An attempt that is charged is dead.
    world.set("destinations.support.retry.max_attempts", 1);
    world.set("destinations.support.allow", vec!["127.0.0.1/32"]);
    let port = world.receiver_port();
    world.set("destinations.support.url", format!("http://hooks.example:{port}/support"));
    let inside = Counter::on((Ipv4Addr::new(127, 0, 0, 3), port));
    let destination = |world: &World| {
        let status = world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json();
        status["destinations"]["support"].clone()
    };
    let is_blocked = |world: &World| destination(world)["state"] == "blocked";

    lead_to(&["127.0.0.3"]);
    let address = serve(&mut world);
    world.drop_file(Input::csv("inside.csv", 300).all(Kind::Sent));
    let alarm = "blocked";
    wait_until(LIVENESS, "the alarm", || alarmed(address, alarm) == Some(1.0));
    wait_until(LIVENESS, "the status", || is_blocked(&world));
    let why = "127.0.0.3 is not a public address (Loopback); if it is meant, set allow = [\"127.0.0.3/32\"]";
    assert_eq!(destination(&world)["blocked_reason"], why);
    assert!(destination(&world)["blocked_at"].is_string());
    assert!(world.postrider(&["status"]).ok().stdout.contains("blocked since"));
    assert!(
        metric(address, "postrider_attempts_not_begun_total{destination=\"support\",reason=\"address\"}")
            > Some(0.0)
    );
    let log = world.daemon().log_text();
    assert_eq!(
        log.matches("leads to an address that is not allowed").count(),
        1,
        "once, not for each message"
    );

    // The name is put right: everything goes out by itself.
    lead_to(&["127.0.0.1"]);
    world.wait_settled(LIVENESS);
    assert_eq!((world.requests().len(), inside.count()), (300, 0));
    wait_until(LIVENESS, "the end of the alarm", || alarmed(address, alarm) == Some(0.0));
    assert_eq!(destination(&world)["state"], "enabled");

    // Rebinding: it leads inside at the second lookup.
    lead_to(&["127.0.0.3"]);
    thread::sleep(FORGOTTEN);
    world.drop_file(Input::csv("rebound.csv", 300).all(Kind::Sent));
    wait_until(LIVENESS, "the status", || is_blocked(&world));
    assert_eq!((world.requests().len(), inside.count()), (300, 0));

    // A mixed answer: only what is allowed is dialled.
    lead_to(&["127.0.0.3", "127.0.0.1", "::1", "10.0.0.1"]);
    world.wait_settled(LIVENESS);
    assert_eq!((world.requests().len(), inside.count()), (600, 0));
    world.stop();
    assert_eq!(world.prove()["requests"], 600, "each is sent once");

    // The listener would have counted.
    lead_to(&["127.0.0.3"]);
    world
        .set("destinations.support.allow", vec!["127.0.0.3/32"])
        .set("destinations.support.retry.max_attempts", 12);
    world.start_ready().drop_file(Input::csv("allowed.csv", 1));
    wait_until(LIVENESS, "a connection", || inside.count() > 0);
}

#[test]
fn f54_no_proxy_is_taken_from_the_environment() {
    let proxy = Counter::on((Ipv4Addr::LOCALHOST, 0));
    let mut world = World::new("csv");
    world.receive(&[]);
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        world.environment(name, &format!("http://{}", proxy.address));
    }
    world.environment("no_proxy", "").start_ready();
    world.drop_file(Input::csv("direct.csv", 200).all(Kind::Sent)).wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 200);
    assert_eq!(proxy.count(), 0);
}
