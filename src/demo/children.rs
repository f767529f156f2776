//! The demo's processes: this same program as a receiver and as the daemon. They are stopped when the
//! demo ends, however it ends.

use std::{
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use tokio::time::Instant;

use super::{summary::PolledFile, world::World};
use crate::receiver::Counts;

/// How long a child may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// How long it may take to stop: longer than the daemon's `shutdown.timeout`.
const STOP: Duration = Duration::from_secs(30);
/// The share of requests that the receiver fails, so that the table shows retries.
const FAIL_RATE: &str = "0.001";
/// Gives a child the process id of its parent, with which it ends.
const PARENT: &str = "POSTRIDER_DEMO_PARENT";

/// Makes the kernel end this process when the demo that started it ends, even by `kill -9`. Does
/// nothing in a process that no demo has started. To be called first, before any thread is there.
pub fn end_with_parent() -> anyhow::Result<()> {
    let Some(parent) = env::var_os(PARENT) else { return Ok(()) };
    // The kernel watches the thread that started us; the demo starts its children on its main thread.
    set_parent_process_death_signal(Some(Signal::TERM)).context("can't tie this process to its parent")?;
    let parent_now = getppid().map(|pid| pid.as_raw_pid().to_string());
    // It may have ended before that call.
    ensure!(parent_now.as_deref() == parent.to_str(), "the demo that started this process has ended");
    Ok(())
}

/// This program, without the variables of the demo's environment that would configure it.
fn command() -> anyhow::Result<Command> {
    let mut command = Command::new(env::current_exe().context("can't find this program")?);
    let foreign =
        ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "CREDENTIALS_DIRECTORY"];
    for (name, _) in env::vars_os() {
        let is_ours =
            name.to_str().is_some_and(|name| name.starts_with("POSTRIDER_") || foreign.contains(&name));
        if is_ours {
            command.env_remove(name);
        }
    }
    command.env(PARENT, std::process::id().to_string()).stdin(Stdio::null());
    Ok(command)
}

/// A child that does not outlive its owner.
#[derive(Debug)]
struct Guarded {
    child: Child,
    name: &'static str,
}

impl Guarded {
    fn spawn(mut command: Command, name: &'static str) -> anyhow::Result<Self> {
        let child = command.spawn().with_context(|| format!("can't start the {name}"))?;
        Ok(Self { child, name })
    }

    /// Asks it to stop and waits; then it is killed.
    fn stop(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let until = Instant::now() + STOP;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the {} ended with {status} when it was asked to stop", self.name);
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.child.kill()?;
        self.child.wait()?;
        bail!("the {} did not stop within {} s and was killed", self.name, STOP.as_secs())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Already reported after an orderly stop; on any other path the error has no reader.
        let _ = self.stop();
    }
}

/// `postrider receiver`.
#[derive(Debug)]
pub(super) struct ReceiverProcess {
    address: SocketAddr,
    _process: Guarded,
}

impl ReceiverProcess {
    pub(super) fn start(world: &World) -> anyhow::Result<Self> {
        let mut command = command()?;
        let secret = world.secret();
        command
            .args(["receiver", "--listen", "127.0.0.1:0", "--fail-rate", FAIL_RATE, "--secret"])
            .arg(format!("file:{}", secret.display()))
            .stdout(Stdio::piped())
            .stderr(File::create(world.log("receiver"))?);
        let mut process = Guarded::spawn(command, "receiver")?;
        let stdout = process.child.stdout.take().expect("it was piped just now");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("can't read from the receiver")?;
        let address = line.trim().strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let address = address.with_context(|| {
            format!("the receiver did not start; its log is {}", world.log("receiver").display())
        })?;
        Ok(Self { address, _process: process })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has counted so far.
    pub(super) fn counts(&self) -> anyhow::Result<Counts> {
        let get = || -> anyhow::Result<Counts> {
            let mut stream = TcpStream::connect(self.address)?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            let host = self.address;
            write!(stream, "GET /stats HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (_, json) = answer.split_once("\r\n\r\n").context("no whole answer")?;
            Ok(serde_json::from_str(json)?)
        };
        get().context("can't read the receiver's counts")
    }
}

/// `postrider run`.
#[derive(Debug)]
pub(super) struct Daemon {
    process: std::cell::RefCell<Guarded>,
    notify: UnixDatagram,
    socket: PathBuf,
    config: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts it and waits until it says that it is ready, as systemd would.
    pub(super) fn start(world: &World, config: &Path) -> anyhow::Result<Self> {
        let socket = world.notify_socket();
        let notify = UnixDatagram::bind(&socket)
            .with_context(|| format!("can't listen on {}; try a shorter --keep", socket.display()))?;
        notify.set_nonblocking(true)?;
        let log = world.log("run");
        let mut command = command()?;
        command
            .args(["run", "-c"])
            .arg(config)
            .env("NOTIFY_SOCKET", &socket)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let process = Guarded::spawn(command, "daemon")?.into();
        let daemon = Self { process, notify, socket, config: config.to_owned(), log };
        let until = Instant::now() + READY;
        while !daemon.said_ready() {
            daemon.check()?;
            ensure!(
                Instant::now() < until,
                "the daemon is not ready after {} s; its log is {}",
                READY.as_secs(),
                daemon.log.display()
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Reads everything it has said to its supervisor, so that it never has to wait to say more.
    fn said_ready(&self) -> bool {
        let mut ready = false;
        let mut message = [0; 4096];
        while let Ok(len) = self.notify.recv(&mut message) {
            ready |= message[..len].split(|&byte| byte == b'\n').any(|line| line == b"READY=1");
        }
        ready
    }

    /// That it runs.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        self.said_ready();
        match self.process.borrow_mut().child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the daemon has ended with {status}; its log is {}", self.log.display()),
        }
    }

    /// What `postrider files` says.
    pub(super) fn files(&self) -> anyhow::Result<Vec<PolledFile>> {
        let mut command = command()?;
        let output = command.args(["files", "--json", "-c"]).arg(&self.config).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.stdout.is_empty(),
            "`postrider files` ended with {}: {}",
            output.status,
            stderr.trim()
        );
        serde_json::from_slice(&output.stdout).context("can't read what `postrider files --json` printed")
    }

    /// The most memory it has held so far.
    pub(super) fn peak_memory_bytes(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.process.borrow().child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        let kib: u64 = peak.context("the kernel does not say the peak")?.trim().parse()?;
        Ok(kib * 1024)
    }

    /// Stops it in order.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.process.borrow_mut().stop()?;
        fs::remove_file(&self.socket).context("can't remove the notify socket")
    }
}
