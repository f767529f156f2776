//! `postrider top` in a real terminal (tmux) beside a real daemon.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use crate::{
    api::{VIEW, with_tokens},
    ops::serve,
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        process::POSTRIDER,
        scripted::Reply,
        wait_until,
    },
};

/// A terminal of its own, with a server of its own.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn start(world: &World, columns: u32) -> Self {
        Self::run(world, columns, &format!("{POSTRIDER} top -c {}", world.config_path().display()))
    }

    fn run(world: &World, columns: u32, command: &str) -> Self {
        // Its own for each: a server that was killed may be there for a moment.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("tmux-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let terminal = Self { socket: world.path(&name).display().to_string() };
        let size = columns.to_string();
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &size, "-y", "30", command]);
        terminal
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .env("LC_ALL", "C.UTF-8")
            .args(["-u", "-S", &self.socket])
            .args(arguments)
            .output()
            .expect("script/test installs tmux");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, keys: &str) {
        self.tmux(&["send-keys", "-l", keys]);
    }

    fn key(&self, name: &str) {
        self.tmux(&["send-keys", name]);
        if name == "Escape" {
            // What follows at once is taken for a key with Alt.
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Waits until the screen says all of this.
    fn wait(&self, words: &[&str]) {
        wait_until(LIVENESS, &format!("{words:?} on the screen"), || {
            let screen = self.screen();
            words.iter().all(|word| screen.contains(word))
        });
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = Command::new("tmux").args(["-S", &self.socket, "kill-server"]).output();
    }
}

#[test]
#[ignore = "needs tmux: script/test installs it"]
fn top_shows_what_happens_and_gives_orders_in_a_terminal() {
    // More than this lasts for, however slow the machine is.
    const ROWS: usize = 20_000;
    let mut world = World::new("csv");
    world.script(|request| match request.id.rsplit('_').next() {
        Some("7") => Reply::Status(404),
        _ => Reply::Status(200),
    });
    world.set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 10);
    serve(&mut world);
    let terminal = Terminal::start(&world, 160);
    terminal.wait(&["Everything is settled.", "No alarm.", "Nothing here."]);
    world.drop_file(Input::csv("spring.csv", ROWS).all(Kind::Sent).but(7, Kind::Dead));
    terminal.wait(&["spring.csv", "20,000", "messages are open"]);
    // A file is held, and goes on when it is released.
    terminal.press("h");
    terminal.wait(&["hold spring.csv"]);
    terminal.press("y");
    terminal.wait(&["held"]);
    terminal.press("ry");
    terminal.wait(&["sending"]);
    // A destination is paused and resumed.
    terminal.press("2");
    terminal.wait(&["breaker", "enabled"]);
    terminal.press("py");
    terminal.wait(&["disabled"]);
    let paused = world.request_count();
    terminal.press("ry");
    terminal.wait(&["enabled"]);
    wait_until(LIVENESS, "it to go on", || world.request_count() > paused + 20);
    terminal.key("Enter");
    terminal.wait(&["pause", "resume", "by "]);
    terminal.key("Escape");
    terminal.press("1?");
    terminal.wait(&["Keys", "another view"]);
    terminal.key("Escape");
    terminal.press("/nosuch");
    terminal.wait(&["Nothing matches the filter."]);
    terminal.key("Escape");
    terminal.wait(&["spring.csv"]);
    // The dead letter of its group, and what is in the audit.
    terminal.press("3");
    terminal.wait(&["404", "spring.csv"]);
    terminal.press("6");
    terminal.wait(&["hold", "release", "pause", "resume"]);
    // Without the daemon it claims nothing.
    world.kill();
    terminal.wait(&["No contact with the daemon"]);
    terminal.press("q");
    world.unset("destinations.support.rate_per_s").unset("destinations.support.burst");
    world.start().wait_settled(LIVENESS * 2);
    world.stop();
    world.prove();
}

#[test]
#[ignore = "needs tmux: script/test installs it"]
fn f56_top_asks_a_daemon_elsewhere_by_tls_and_trusts_nobody_else() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let certify = |name: &str| {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let file = world.path(name);
        std::fs::write(&file, own.cert.pem()).expect("the directory is ours");
        (file.display().to_string(), own.signing_key.serialize_pem())
    };
    let ((certificate, key), (other, _)) = (certify("ops.pem"), certify("other.pem"));
    let key_file = world.path("ops.key");
    std::fs::write(&key_file, key).expect("the directory is ours");
    world
        .set("ops.tls_cert_file", certificate.as_str())
        .set("ops.tls_key", format!("file:{}", key_file.display()));
    let address = with_tokens(&mut world);
    world.drop_file(Input::csv("spring.csv", 10)).wait_settled(LIVENESS);
    let top = |ca_file: &str| {
        let place = format!("--url https://localhost:{} --ca-file {ca_file}", address.port());
        format!("env POSTRIDER_TOKEN={VIEW} {POSTRIDER} top {place}")
    };
    let terminal = Terminal::run(&world, 160, &top(&certificate));
    terminal.wait(&["Everything is settled.", "spring.csv"]);
    drop(terminal);
    let terminal = Terminal::run(&world, 160, &top(&other));
    terminal.wait(&["No contact with the daemon"]);
    drop(terminal);
    world.stop();
    world.prove();
}
