//! Notifications to systemd (`sd_notify(3)`): ready, status, alive, reloading, stopping. Without systemd they go
//! nowhere and nothing fails.

use std::{
    env,
    ffi::OsStr,
    fmt::Write as _,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use postrider_actors::model::finish::{Rough, Thousands};
use sd_notify::NotifyState;

use crate::telemetry::escape;

/// How long a notification may wait for systemd to take it. It is sent from the actors' own threads.
const SEND_TIMEOUT: Duration = Duration::from_millis(200);
/// The longest file name in a status line, in characters.
const FILE_CHARS_MAX: usize = 60;

/// Notifies systemd of the daemon's state.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Connects to the service manager that started this process, if it expects notifications.
    pub fn from_environment() -> io::Result<Self> {
        match env::var_os("NOTIFY_SOCKET") {
            Some(path) if !path.is_empty() => Self::connect(&path, sd_notify::watchdog_enabled()),
            _ => Ok(Self::disconnected()),
        }
    }

    /// Connects to a socket: a path, or `@name` for an abstract one. `watchdog` is `WatchdogSec=`.
    pub fn connect(path: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(path)?,
        };
        socket.connect_addr(&address)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { socket: Some(socket), watchdog })
    }

    /// Notifies nobody.
    pub fn disconnected() -> Self {
        Self { socket: None, watchdog: None }
    }

    /// Everything is up.
    pub fn ready(&self, status: &str) -> io::Result<()> {
        self.send(&[NotifyState::Ready, NotifyState::Status(&escape(status))])
    }

    /// What `systemctl status` shows.
    pub fn status(&self, status: &str) -> io::Result<()> {
        self.send(&[NotifyState::Status(&escape(status))])
    }

    /// A reload begins; [`Notifier::ready`] ends it. `Type=notify-reload` needs the time, to
    /// recognise this reload among earlier ones.
    pub fn reloading(&self) -> io::Result<()> {
        self.send(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?])
    }

    /// The drain has begun.
    pub fn stopping(&self) -> io::Result<()> {
        self.send(&[NotifyState::Stopping, NotifyState::Status("draining")])
    }

    /// How often to call [`Notifier::beat`]: half of `WatchdogSec=`, as `sd_watchdog_enabled(3)` asks.
    /// `None` if nobody watches.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|timeout| timeout / 2)
    }

    /// Feeds the watchdog if `is_healthy`: the actors have made progress since the last beat. A process whose actors
    /// hang is not kept alive. Returns whether it was fed.
    pub fn beat(&self, is_healthy: bool) -> io::Result<bool> {
        let is_fed = is_healthy && self.watchdog.is_some();
        if is_fed {
            self.send(&[NotifyState::Watchdog])?;
        }
        Ok(is_fed)
    }

    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let mut message = String::new();
        for state in states {
            // Writing to a String can't fail.
            let _ = writeln!(message, "{state}");
        }
        socket.send(message.as_bytes()).map(|_| ())
    }
}

/// What a status line says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress<'a> {
    /// The file that is being delivered; one of them if there are more.
    pub file: Option<&'a str>,
    /// How many others are.
    pub other_files: usize,
    /// How much of it is settled, in percent, if its rows are counted.
    pub percent: Option<u64>,
    /// Messages that are not settled.
    pub open: u64,
    /// Messages settled per second, lately.
    pub per_s: f64,
}

/// One line: `alerts.csv 43 % · 12,300/s · 4 min left`.
pub fn status_line(progress: &Progress<'_>) -> String {
    let mut parts = Vec::new();
    match progress.file {
        Some(file) => {
            let mut part: String = escape(file).chars().take(FILE_CHARS_MAX).collect();
            if part.len() < escape(file).len() {
                part.push('…');
            }
            if let Some(percent) = progress.percent {
                part = format!("{part} {percent} %");
            }
            if progress.other_files > 0 {
                part = format!("{part} and {} more", Thousands(progress.other_files as u64));
            }
            parts.push(part);
        }
        None if progress.open > 0 => {
            parts.push(format!("{} messages to deliver", Thousands(progress.open)));
        }
        None => return "idle".into(),
    }
    let per_s = if progress.per_s.is_finite() { progress.per_s.max(0.0) } else { 0.0 };
    parts.push(format!("{}/s", Thousands(per_s.round() as u64)));
    if progress.open > 0 && per_s >= 1.0 {
        parts.push(format!(
            "{} left",
            Rough(Duration::from_secs((progress.open as f64 / per_s).ceil() as u64))
        ));
    }
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_s_sandbox_lets_the_daemon_know_this_boot() {
        // Or every kill under systemd sends what was leased one message at a time (B17).
        let unit = include_str!("../config/postrider.service");
        assert!(unit.lines().all(|line| !line.starts_with("ProcSubset=")), "it hides boot_id");
    }

    /// A notify socket as systemd has one.
    struct Manager {
        socket: UnixDatagram,
        _directory: tempfile::TempDir,
        notifier: Notifier,
    }

    impl Manager {
        fn new(watchdog: Option<Duration>) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("notify");
            let socket = UnixDatagram::bind(&path).unwrap();
            socket.set_nonblocking(true).unwrap();
            let notifier = Notifier::connect(path.as_os_str(), watchdog).unwrap();
            Self { socket, _directory: directory, notifier }
        }

        /// The next notification, if there is one.
        fn received(&self) -> Option<String> {
            let mut buffer = [0; 4096];
            let bytes = self.socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8(buffer[..bytes].to_vec()).unwrap())
        }
    }

    #[test]
    fn the_manager_is_fed() {
        let manager = Manager::new(Some(Duration::from_secs(20)));
        manager.notifier.ready("2 feeds").unwrap();
        assert_eq!(manager.received().unwrap(), "READY=1\nSTATUS=2 feeds\n");
        manager.notifier.status("idle").unwrap();
        assert_eq!(manager.received().unwrap(), "STATUS=idle\n");
        manager.notifier.stopping().unwrap();
        assert_eq!(manager.received().unwrap(), "STOPPING=1\nSTATUS=draining\n");
        manager.notifier.reloading().unwrap();
        let message = manager.received().unwrap();
        let time = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(time.trim().parse::<u64>().unwrap() > 0);
        assert_eq!(manager.received(), None);
    }

    #[test]
    fn the_watchdog_is_fed_only_after_progress() {
        let manager = Manager::new(Some(Duration::from_secs(20)));
        assert_eq!(manager.notifier.watchdog_interval(), Some(Duration::from_secs(10)));
        assert!(!manager.notifier.beat(false).unwrap());
        assert_eq!(manager.received(), None);
        assert!(manager.notifier.beat(true).unwrap());
        assert_eq!(manager.received().unwrap(), "WATCHDOG=1\n");

        let manager = Manager::new(None);
        assert_eq!(manager.notifier.watchdog_interval(), None);
        assert!(!manager.notifier.beat(true).unwrap());
        assert_eq!(manager.received(), None);
    }

    #[test]
    fn a_hostile_name_can_not_forge_a_notification() {
        let manager = Manager::new(None);
        let progress = Progress { file: Some("a\nSTOPPING=1\n.csv"), open: 1, ..Progress::default() };
        manager.notifier.status(&status_line(&progress)).unwrap();
        assert_eq!(manager.received().unwrap(), "STATUS=a\\nSTOPPING=1\\n.csv · 0/s\n");
        manager.notifier.status("b\nREADY=1").unwrap();
        assert_eq!(manager.received().unwrap(), "STATUS=b\\nREADY=1\n");
    }

    #[test]
    fn an_abstract_socket_is_reached_and_a_missing_one_is_an_error() {
        let name = format!("postrider-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::connect(OsStr::new(&format!("@{name}")), None).unwrap().status("x").unwrap();
        let mut buffer = [0; 64];
        let bytes = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], b"STATUS=x\n");
        assert!(Notifier::connect(OsStr::new("/nowhere/notify"), None).is_err());
        Notifier::disconnected().ready("x").unwrap();
    }

    #[test]
    fn a_manager_that_does_not_read_can_not_hang_the_daemon() {
        let manager = Manager::new(Some(Duration::from_secs(20)));
        let mut sent = 0;
        while manager.notifier.status("x").is_ok() {
            sent += 1;
            assert!(sent < 100_000, "the socket's queue is finite");
        }
        assert_eq!(manager.received().unwrap(), "STATUS=x\n");
        manager.notifier.status("y").unwrap();
    }

    #[test]
    fn status_lines_read_well() {
        let line = |file, percent, open, per_s| {
            status_line(&Progress { file, percent, open, per_s, other_files: 0 })
        };
        let file = Some("alerts.csv");
        assert_eq!(line(file, Some(43), 2_952_000, 12_300.4), "alerts.csv 43 % · 12,300/s · 4 min left");
        assert_eq!(line(file, Some(99), 50, 49.9), "alerts.csv 99 % · 50/s · 2 s left");
        assert_eq!(line(file, None, 7, 0.2), "alerts.csv · 0/s");
        assert_eq!(line(file, None, 7, f64::NAN), "alerts.csv · 0/s");
        assert_eq!(line(None, None, 1_234_567, 10.0), "1,234,567 messages to deliver · 10/s · 35 h left");
        assert_eq!(line(None, None, 0, 0.0), "idle");
        let several = Progress { file, other_files: 1200, open: 9, ..Progress::default() };
        assert_eq!(status_line(&several), "alerts.csv and 1,200 more · 0/s");
        let long = "x".repeat(300);
        assert!(line(Some(&long), Some(100), 0, 0.0).starts_with(&format!("{}… 100 %", "x".repeat(60))));
    }
}
