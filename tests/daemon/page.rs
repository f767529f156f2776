//! The operator's page in a real headless Chromium, against a real daemon: `tests/page/drive.py` does what a person would.
//!
//! Knobs: `POSTRIDER_CHROMIUM`, `POSTRIDER_AXE` (axe.min.js), `POSTRIDER_SHOTS` (a directory for screenshots),
//! `POSTRIDER_PAGE_FILES` and `POSTRIDER_PAGE_DEAD`.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use postrider_actors::testing::figure;

use crate::{
    ops::{get, send, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind, Row},
        knob,
        process::run,
        scripted::Reply,
        wait_until,
    },
};

/// What a browser may load to show the page: the sum of all its files, each gzipped.
const PAGE_BYTES_MAX: usize = 60_000;

/// How long a scenario may take on a loaded machine.
const SCENARIO: Duration = Duration::from_mins(5);

fn drive(world: &World, address: SocketAddr, scenario: &str, values: &[(&str, &str)]) {
    let python = std::env::var("POSTRIDER_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let mut command = Command::new(python);
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/page/drive.py"))
        .arg(scenario)
        .arg(format!("http://{address}/"))
        .args(values.iter().map(|(key, value)| format!("{key}={value}")));
    let answer = run(&mut command, &world.path("."), SCENARIO);
    assert_eq!(answer.code, Some(0), "{scenario}: {}\n{}", answer.stderr, answer.stdout);
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn the_page_follows_a_file_and_steers_a_destination() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.rate_per_s", 100).add_destination("other");
    let address = serve(&mut world);
    world.drop_file(Input::csv("winter-offer.csv", 6_000)).wait_requests(100);
    drive(&world, address, "progress", &[("name", "winter-offer.csv")]);
    drive(&world, address, "keyboard", &[("name", "winter-offer.csv")]);
    drive(&world, address, "steer", &[("destination", "support")]);
    let audit = world.postrider(&["audit", "--json"]).ok().json();
    let orders: Vec<_> = audit.as_array().expect("lines").iter().map(|line| &line["order"]).collect();
    assert_eq!(orders, ["resume", "pause"], "{audit}");
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn the_page_releases_a_file_that_its_canary_held() {
    let mut world = World::new("text");
    world
        .set("canary.enabled", true)
        .set("canary.min_rows", 2_000)
        .set("canary.ramp", "2s")
        .set("destinations.support.retry.base", "30s")
        .set("destinations.support.retry.cap", "30s");
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = is_broken.clone();
    world.script(move |request| {
        let fails = request.id.bytes().map(u32::from).sum::<u32>() % 10 < 3;
        Reply::Status(if fails && broken.load(Ordering::SeqCst) { 500 } else { 200 })
    });
    let address = serve(&mut world);
    world.drop_file(Input::text("large.txt", 3_000).all(Kind::Sent));
    let is_held = |world: &World| {
        world.file("large.txt").is_some_and(|file| file["held"]["support"]["cause"] == "errors")
    };
    wait_until(LIVENESS, "the file to be held", || is_held(&world));
    is_broken.store(false, Ordering::SeqCst);
    drive(&world, address, "release", &[("name", "large.txt")]);
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn the_page_redrives_all_that_match_in_one_action() {
    let dead = knob("POSTRIDER_PAGE_DEAD", 20_000);
    // The receiver of a test takes some 1,000 a second on a machine that does other things too.
    let within = LIVENESS * 5 + Duration::from_millis(5 * dead);
    let dead = dead as usize;
    let mut world = World::new("text");
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = is_broken.clone();
    world.script(move |_| Reply::Status(if broken.load(Ordering::SeqCst) { 404 } else { 200 }));
    world
        .set("destinations.support.storm.percent", 0)
        .set("destinations.support.concurrency", 64)
        .set("alarms.dead.window", "5s");
    let address = serve(&mut world);
    world.drop_file(Input::text("gone.txt", dead)).wait_settled(within);
    is_broken.store(false, Ordering::SeqCst);
    drive(&world, address, "alarm", &[("words", "dead"), ("state", "cleared")]);
    drive(&world, address, "redrive", &[("count", &dead.to_string()), ("status", "404")]);
    wait_until(within, "all to be sent", || {
        world.file("gone.txt").is_some_and(|file| file["destinations"]["support"]["sent"] == dead)
    });
    figure(format!("{dead} dead letters filtered and redriven by one action of the page"));
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn s2_8_the_page_shows_an_alarm_while_it_is_raised() {
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(404)).set("destinations.support.storm.percent", 0);
    let address = serve(&mut world);
    world.drop_file(Input::csv("bad.csv", 100)).wait_settled(LIVENESS);
    drive(&world, address, "alarm", &[("words", "dead"), ("state", "raised")]);
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn f29_the_page_lists_10000_files() {
    let files = knob("POSTRIDER_PAGE_FILES", 10_000) as usize;
    let mut world = World::new("text");
    world.receive(&[]);
    let inbox = world.inbox("alerts");
    for number in 0..files {
        fs::write(inbox.join(format!("batch-{number:05}.txt")), format!("user-{number}\n")).expect("ours");
    }
    let address = serve(&mut world);
    wait_until(LIVENESS * 10, "all files to be known", || {
        world.postrider(&["status", "--json", "--sample-ms", "0"]).json()["files"]["settled"] == files
    });
    drive(&world, address, "many", &[("total", &files.to_string())]);
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn f56_f27_the_page_shows_hostile_text_as_text() {
    const ANSWER: &str = "<img src=x onerror=alert('answer')>";
    const REJECTED: &str = "<img src=x onerror=alert('row')>";
    let recipient = "<script>alert('user')</script>";
    let mut world = World::new("csv");
    world.script(|_| {
        let answer = format!("HTTP/1.1 404 -\r\ncontent-length: {}\r\n\r\n{ANSWER}", ANSWER.len());
        Reply::Raw(answer.into_bytes())
    });
    world.set("destinations.support.storm.percent", 0);
    let address = serve(&mut world);
    let rows = [recipient, "user-2\u{202e}\u{7}"];
    let bytes = format!("user_id\n{}\n{REJECTED},\n", rows.map(|row| format!("\"{row}\"")).join("\n"));
    let rows = rows.iter().map(|row| Row::new(Kind::Ok, row)).chain([Row::rejected()]).collect();
    let name = "<img src=x onerror=alert(1)>\u{202e}\u{1b}[31m\n.csv";
    world.drop_file(Input::of(name, bytes, rows)).wait_settled(LIVENESS);
    let shown = "<img src=x onerror=alert(1)>\\u{202e}\\u{1b}[31m\\n.csv";
    drive(
        &world,
        address,
        "text",
        &[("name", shown), ("recipient", recipient), ("answer", ANSWER), ("row", REJECTED)],
    );
    figure(
        "markup and control characters in a file's name, a user id, a rejected row and an answer: shown as text, no script ran",
    );
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium, Playwright and axe-core, which script/test installs"]
fn axe_finds_nothing_on_the_page() {
    let mut world = World::new("csv");
    world.script(|request| match request.id.bytes().last() {
        Some(b'7') => Reply::Status(404),
        Some(b'3') if request.earlier < 3 => Reply::Status(503),
        _ => Reply::Status(200),
    });
    world.set("destinations.support.rate_per_s", 20).set("destinations.support.storm.percent", 0);
    world.add_destination("other").add_feed("more", "csv", &["other", "support"]);
    let address = serve(&mut world);
    world.drop_file(Input::csv("spring-offer.csv", 9_000)).drop_into("more", Input::csv("more.csv", 200));
    world.wait_requests(300);
    drive(&world, address, "axe", &[]);
    world.daemon().kill();
}

#[test]
#[ignore = "needs Chromium and Playwright, which script/test installs"]
fn f56_the_page_asks_for_a_token_and_keeps_it_for_the_tab() {
    let token = "an-operator-s-token-0123456789";
    let mut world = World::new("csv");
    world.receive(&[]).environment("OPS_TOKEN", token).set("ops.operate_token", "env:OPS_TOKEN");
    let address = serve(&mut world);
    drive(&world, address, "token", &[("token", token)]);
    world.daemon().kill();
}

/// What the index loads, and all that this loads.
fn files_of(address: SocketAddr) -> Vec<(String, String)> {
    let mut files = vec![("/".to_owned(), get(address, "/").body)];
    let mut next = 0;
    while let Some((path, text)) = files.get(next).cloned() {
        next += 1;
        for quote in ['"', '\''] {
            for named in text.split(quote).skip(1).step_by(2) {
                let found = if let Some(rest) = named.strip_prefix("/page/") {
                    format!("/page/{rest}")
                } else if named.starts_with("./") || named.starts_with("../") {
                    let folder = Path::new(&path).parent().expect("it is in a folder").join(named);
                    let mut clean = std::path::PathBuf::new();
                    for part in folder.components() {
                        if part.as_os_str() == ".." {
                            clean.pop();
                        } else if part.as_os_str() != "." {
                            clean.push(part);
                        }
                    }
                    clean.display().to_string()
                } else {
                    continue;
                };
                if !files.iter().any(|(path, _)| *path == found) {
                    let response = get(address, &found);
                    assert_eq!(response.status, 200, "{found}, which {path} names");
                    files.push((found, response.body));
                }
            }
        }
    }
    files
}

#[test]
fn f56_the_page_is_all_its_own_and_no_script_of_others_runs_in_it() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    let index = get(address, "/");
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cache-control: no-cache",
        "content-type: text/html; charset=utf-8",
    ] {
        assert!(index.head.contains(header), "{header}: {}", index.head);
    }
    let inline =
        index.body.matches("<script").count() - index.body.matches("<script type=\"module\" src=").count();
    assert_eq!((inline, index.body.matches("<style").count()), (0, 0), "nothing inline");
    let files = files_of(address);
    assert!(files.len() > 20, "{:?}", files.iter().map(|(path, _)| path).collect::<Vec<_>>());
    let mut packed = 0;
    for (path, text) in &files {
        // An SVG's name space is no address, and a library names those of its elements.
        let is_code = !path.contains("/vendor/") && path != "/page/icon.svg";
        assert!(
            !is_code || !text.contains("http://") && !text.contains("https://"),
            "{path} names another place"
        );
        let mut packer = GzEncoder::new(Vec::new(), Compression::best());
        packer.write_all(text.as_bytes()).expect("a Vec takes everything");
        packed += packer.finish().expect("a Vec takes everything").len();
    }
    assert!(packed <= PAGE_BYTES_MAX, "{packed} bytes gzipped");
    // A second look costs nothing; a file that isn't there is not the index.
    let tag = index.head.lines().find_map(|line| line.strip_prefix("etag: ")).expect("a tag").to_owned();
    let again = format!("GET / HTTP/1.1\r\nHost: {address}\r\nIf-None-Match: {tag}\r\n\r\n");
    assert_eq!(send(address, &again).status, 304);
    for path in
        ["/page/nothing.js", "/page/../Cargo.toml", "/page/%2e%2e/Cargo.toml", "/page/README.md", "/page/"]
    {
        assert_eq!(get(address, path).status, 404, "{path}");
    }
    world.stop();
    figure(format!("{} files of the page, {packed} bytes gzipped, under default-src 'none'", files.len()));
}
