//! Fifteen troubles: what the operator sees of each, in `postrider status`, in the overview that the page shows, in the alarm and
//! in the log. Each names the cause, and what to do about it. The table in `docs/operations.md` is made of what these tests see and held against it;
//! `POSTRIDER_BLESS=1` with one thread writes it anew.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

#[cfg(feature = "postgres")]
use crate::pg::{Postgres, Stop};
use crate::{
    api::read,
    clock::Wall,
    ops::address,
    support::{LIVENESS, World, disk::SmallDisk, input::Input, scripted::Reply, wait_for, wait_until},
    trouble::{start_as_nobody, status, wait_alarm},
};
#[cfg(feature = "aws")]
use crate::{
    cloud::{Fault, Rule},
    several::{Engines, migrate},
};

/// A world whose daemon serves its page.
fn watched() -> World {
    let mut world = World::new("csv");
    world.set("ops.listen", "127.0.0.1:0");
    world
}

/// What is to be seen of a trouble.
struct Signs<'a> {
    /// The first cell of its row.
    trouble: &'a str,
    /// A part of what binds.
    cause: &'a str,
    /// The alarm that is raised; none where nothing is wrong that an operator does not know.
    alarm: Option<&'a str>,
    /// A part of a line of the log; none where nothing happens that it should say.
    log: Option<&'a str>,
}

/// A text without what differs from one run to the next: times, durations, amounts, places.
fn general(text: &str) -> String {
    // What an engine says last is its own affair.
    let text = match text.split_once(" s: ") {
        Some((away, _)) if away.contains(" is away for ") => &format!("{away} s: …"),
        _ => text,
    };
    let is_number =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || ",.".contains(c));
    let is_clock =
        |word: &str| word.len() == 5 && word.as_bytes()[2] == b':' && word.replace(':', "").len() == 4;
    let words = text.split_whitespace().map(|word| {
        let core = word.trim_matches(|c: char| "(),:;".contains(c));
        let is_status = core.len() == 3 && matches!(core.as_bytes()[0], b'4' | b'5');
        let replacement = if core.contains("/tmp/") {
            "PATH"
        } else if core.starts_with("127.0.0.1:") {
            "ADDRESS"
        } else if ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].contains(&core) {
            "DAY"
        } else if core.len() == 10 && is_number(&core.replace('-', "")) {
            "DATE"
        } else if is_clock(core) {
            "HH:MM"
        } else if is_number(core) && !is_status {
            "N"
        } else {
            return word.to_owned();
        };
        word.replacen(core, replacement, 1)
    });
    words.collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The messages of the log's lines.
fn messages(world: &World) -> Vec<String> {
    let log = world.daemon_log_text();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let message =
        |line: Value| line.pointer("/fields/message").or(line.get("message"))?.as_str().map(str::to_owned);
    lines.filter_map(message).collect()
}

/// Waits until a trouble shows everywhere, and holds that against its row.
fn judge(world: &mut World, signs: &Signs<'_>) {
    let Signs { trouble, cause, alarm, log } = signs;
    let mut seen = Value::Null;
    let ceiling = wait_for(LIVENESS, cause, || {
        let ceiling = status(world)["ceiling"].clone();
        if seen != ceiling["text"] {
            seen.clone_from(&ceiling["text"]);
            println!("{seen}");
        }
        ceiling["text"].as_str().is_some_and(|text| text.contains(cause)).then_some(ceiling)
    });
    let said =
        |ceiling: &Value| [&ceiling["text"], &ceiling["remedy"]].map(|words| words.as_str().map(general));
    let address = address(world);
    wait_until(LIVENESS, "the page to say the same as the status", || {
        let overview = read(address, "/overview");
        let (page, status) = (said(&overview["ceiling"]), said(&status(world)["ceiling"]));
        if page != status {
            println!("page: {page:?}, status: {status:?}");
        }
        page == status
    });
    if let Some(alarm) = alarm {
        wait_alarm(world, alarm, "raised", "");
    }
    let line = log.map_or("–".to_owned(), |log| {
        let found = || messages(world).into_iter().find(|message| message.contains(log));
        general(
            &found()
                .or_else(|| {
                    thread::sleep(Duration::from_secs(5));
                    found()
                })
                .unwrap_or_else(|| panic!("the log does not say `{log}`: {:#?}", messages(world))),
        )
    });
    let text = |value: &Value| value.as_str().map_or_else(|| "–".to_owned(), general);
    let row = format!(
        "| {trouble} | {} | {} | {} | {} |",
        text(&ceiling["text"]),
        text(&ceiling["remedy"]),
        alarm.map_or("–".to_owned(), |alarm| format!("`{alarm}`")),
        line
    );
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let written = fs::read_to_string(&page).expect("it is there");
    let start = format!("| {trouble} |");
    let before = written.lines().find(|line| line.starts_with(&start)).expect("the table has a row for it");
    if std::env::var_os("POSTRIDER_BLESS").is_some() {
        fs::write(&page, written.replace(before, &row)).expect("the page can be written");
    } else {
        assert_eq!(before, row, "docs/operations.md says otherwise; POSTRIDER_BLESS=1 writes what is seen");
    }
}

#[test]
fn s4_a_receiver_that_is_down() {
    let mut world = watched();
    world
        .set("destinations.support.url", "http://127.0.0.1:9/support")
        .set("destinations.support.concurrency", "auto");
    world.drop_file(Input::csv("a.csv", 200)).start_ready();
    let signs = Signs {
        trouble: "the receiver is down",
        cause: "breaker open: connect",
        alarm: None,
        log: Some("its circuit breaker is open"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_wrong_secret() {
    let mut world = watched();
    world.script(|_| Reply::Status(401));
    world.set("destinations.support.concurrency", "auto");
    world.drop_file(Input::csv("a.csv", 600)).start_ready();
    let signs = Signs {
        trouble: "the secret is wrong",
        cause: "401",
        alarm: Some("suspects"),
        log: Some("the destination is disabled"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_wrong_template() {
    let mut world = watched();
    world.receive(&[]).set("destinations.support.template", r#"{"name": {{ data.nmae }}}"#);
    world.drop_file(Input::csv("a.csv", 30)).start_ready();
    let signs = Signs {
        trouble: "the template names what the feed lacks",
        cause: "data.nmae",
        alarm: Some("files"),
        log: Some("a file is held"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_full_disk() {
    let mut world = watched();
    world.receive(&[]).unset("alarms.disk.max_percent");
    let Some(disk) = SmallDisk::mount(&world.state(), "64m") else { return };
    world.start_ready();
    let inbox = world.inbox("alerts");
    let input = Input::csv("a.csv", 30);
    fs::write(inbox.join(".a.csv"), &input.bytes).expect("there is room");
    disk.fill();
    fs::rename(inbox.join(".a.csv"), inbox.join("a.csv")).expect("one file system");
    let signs = Signs {
        trouble: "the disk is full",
        cause: "disk",
        alarm: Some("disk"),
        log: Some("the feed is parked"),
    };
    judge(&mut world, &signs);
    disk.free();
}

#[test]
fn s4_a_pause() {
    let mut world = watched();
    world.receive(&[]).start_ready();
    world.postrider(&["pause", "support", "--reason", "they deploy"]).ok();
    world.drop_file(Input::csv("a.csv", 30));
    let signs = Signs {
        trouble: "an operator has paused the destination",
        cause: "paused by the operator",
        alarm: None,
        log: None,
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_closed_window() {
    let mut world = watched();
    // Of another day, whenever this runs.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    let days = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let day = days[(now.as_secs() / 86_400 + 3) as usize % 7];
    world.receive(&[]).set("feeds.alerts.window", format!("{day} 08:00-20:00 UTC"));
    world.drop_file(Input::csv("a.csv", 30)).start_ready();
    let signs = Signs { trouble: "the window is closed", cause: "window opens", alarm: None, log: None };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_receiver_that_fails() {
    let mut world = watched();
    world.script(|_| Reply::Status(503));
    world.set("destinations.support.concurrency", "auto");
    world.drop_file(Input::csv("a.csv", 300)).start_ready();
    let signs = Signs {
        trouble: "the receiver fails: the breaker is open",
        cause: "breaker open: 503",
        alarm: Some("failures"),
        log: Some("its circuit breaker is open"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_rate_that_is_reached() {
    let mut world = watched();
    world.receive(&[]).set("destinations.support.rate_per_s", 50).set("destinations.support.burst", 10);
    world.drop_file(Input::csv("a.csv", 3_000)).start_ready();
    let signs = Signs { trouble: "the rate is reached", cause: "rate_per_s = 50", alarm: None, log: None };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_watermark() {
    let mut world = watched();
    world.receive(&[]).set("destinations.support.rate_per_s", 5).set("destinations.support.burst", 5);
    world.set("outbox.high_watermark", 1_000);
    world.drop_file(Input::csv("a.csv", 20_000)).start_ready();
    let signs = Signs {
        trouble: "the watermark is reached",
        cause: "watermark: waiting for support",
        alarm: None,
        log: None,
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_canary_that_fails() {
    let mut world = watched();
    world.script(|request| {
        let fails = request.id.bytes().map(u32::from).sum::<u32>() % 10 < 3;
        Reply::Status(if fails { 500 } else { 200 })
    });
    world
        .set("canary.enabled", true)
        .set("canary.min_rows", 2_000)
        .set("destinations.support.retry.base", "30s")
        .set("destinations.support.retry.cap", "30s");
    world.drop_file(Input::csv("a.csv", 3_000)).start_ready();
    let signs = Signs {
        trouble: "the canary fails",
        cause: "canary held",
        alarm: Some("canary"),
        log: Some("first messages failed"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_no_files() {
    let mut world = watched();
    world.receive(&[]).start_ready();
    thread::sleep(Duration::from_millis(500));
    let signs = Signs { trouble: "no file comes", cause: "no files", alarm: None, log: None };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_file_that_can_not_be_read() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: only root can run the daemon as somebody else");
        return;
    }
    let mut world = watched();
    world.receive(&[]);
    let _daemon = start_as_nobody(&mut world);
    let path = world.staging().join("a.csv");
    fs::write(&path, Input::csv("a.csv", 30).bytes).expect("the directory is ours");
    fs::set_permissions(&path, Permissions::from_mode(0o000)).expect("it is ours");
    fs::rename(&path, world.inbox("alerts").join("a.csv")).expect("one file system");
    let signs = Signs {
        trouble: "a file can't be read",
        cause: "Permission denied",
        // It is looked for in the log of the world's own daemon.
        alarm: None,
        log: Some("can't be"),
    };
    judge(&mut world, &signs);
}

#[test]
fn s4_a_wall_clock_that_jumps() {
    let mut world = watched();
    world.receive(&[]);
    let wall = Wall::of(&world);
    let command = wall.command();
    world.under(&command.iter().map(String::as_str).collect::<Vec<_>>());
    world.drop_file(Input::csv("a.csv", 30)).start().wait_settled(LIVENESS);
    wall.set("+2d");
    let signs = Signs {
        trouble: "the wall clock jumps",
        cause: "nothing: all is sent",
        alarm: None,
        log: Some("the wall clock has jumped"),
    };
    judge(&mut world, &signs);
}

#[test]
#[cfg(feature = "aws")]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn s4_sqs_that_is_away() {
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]).set("ops.listen", "127.0.0.1:0");
    migrate(&mut world);
    world.start_ready();
    for operation in ["SendMessageBatch", "ReceiveMessage", "DeleteMessageBatch", "GetQueueAttributes"] {
        engines.sqs.inject(Rule::on(operation, Fault::unavailable()));
    }
    world.drop_file(Input::csv("a.csv", 300));
    let signs = Signs { trouble: "SQS is away", cause: "SQS is away", alarm: None, log: Some("queue") };
    judge(&mut world, &signs);
}

#[test]
#[cfg(feature = "postgres")]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn s4_postgres_that_is_away() {
    let postgres = Postgres::start();
    let mut world = watched();
    world.keep_rows_in(&postgres);
    world.receive(&[]).start_ready();
    postgres.stop(Stop::Fast);
    world.drop_file(Input::csv("a.csv", 300));
    let signs = Signs {
        trouble: "Postgres is away",
        cause: "Postgres is away",
        alarm: None,
        log: Some("recording outcomes: tried again"),
    };
    judge(&mut world, &signs);
}
