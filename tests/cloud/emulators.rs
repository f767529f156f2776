//! The emulators as child processes: ministack for SQS, dynoxide for DynamoDB, moto for CloudWatch Logs.
//! `script/test` installs them and says where they are; they are up within a second or two, so that every test has
//! servers of its own.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::Instant;

/// Names ministack's executable.
pub const MINISTACK: &str = "POSTRIDER_MINISTACK";
/// Names dynoxide's executable.
pub const DYNOXIDE: &str = "POSTRIDER_DYNOXIDE";
/// Names moto's server.
pub const MOTO: &str = "POSTRIDER_MOTO";

/// How long a server may take to answer; it needs a second or two on a quiet machine.
const UP: Duration = Duration::from_secs(30);
/// How often another free port is tried: it is only free until somebody else takes it.
const PORTS: usize = 5;

/// An SQS and a DynamoDB. They end with this value, and with the test's process however it ends.
#[derive(Debug)]
pub struct Emulators {
    sqs: Server,
    dynamodb: Server,
}

impl Emulators {
    /// Starts both. Panics with their log if one does not come up.
    pub fn start() -> Self {
        Self { sqs: Server::sqs(), dynamodb: Server::dynamodb() }
    }

    /// ministack.
    pub fn sqs(&self) -> &Server {
        &self.sqs
    }

    /// dynoxide.
    pub fn dynamodb(&self) -> &Server {
        &self.dynamodb
    }
}

/// One running emulator. Its data are in memory and end with it.
#[derive(Debug)]
pub struct Server {
    endpoint: String,
    child: Arc<Mutex<Child>>,
    /// Dropped to release the keeper.
    release: Option<mpsc::Sender<()>>,
    keeper: Option<JoinHandle<()>>,
    directory: TempDir,
}

impl Server {
    /// Starts an empty ministack.
    ///
    /// What it does otherwise than SQS: it takes a `DelaySeconds` above 900; an old ack id is invalid as soon
    /// as its message was received again; its counters are exact; it slows down with depth.
    pub fn sqs() -> Self {
        start(MINISTACK, |command, port, directory| {
            command
                .env("GATEWAY_PORT", port.to_string())
                .env("BIND_HOST", Ipv4Addr::LOCALHOST.to_string())
                .env("STATE_DIR", directory)
                // Its pid file goes there.
                .env("TMPDIR", directory)
                .env("SERVICES", "sqs")
                .env("LOG_LEVEL", "WARNING");
        })
    }

    /// Starts an empty dynoxide.
    ///
    /// What it does otherwise than DynamoDB: it never throttles, leaves nothing unprocessed, its indexes are
    /// never stale, and items past their TTL stay for long.
    pub fn dynamodb() -> Self {
        start(DYNOXIDE, |command, port, _| {
            command.args(["serve", "--log", "quiet", "--port"]).arg(port.to_string());
        })
    }

    /// Starts an empty CloudWatch Logs.
    ///
    /// What it does otherwise than the service: it never throttles; JSON filter patterns match everything; a
    /// page is never empty while another follows; a token that it does not know brings an empty last page.
    pub fn logs() -> Self {
        start(MOTO, |command, port, _| {
            command.args(["-H", &Ipv4Addr::LOCALHOST.to_string(), "-p"]).arg(port.to_string());
        })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What it has written so far, for a failure's message.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log"))
            .unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// Kills it, as when the service goes away; what it held is lost.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("nobody panics while holding it");
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        drop(self.release.take());
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

/// The executable that `variable` names.
fn executable(variable: &str) -> OsString {
    env::var_os(variable).unwrap_or_else(|| {
        panic!(
            "{variable} is not set: it names the emulator's executable; script/test installs it and sets it"
        )
    })
}

/// Starts `variable`'s executable on a free port, set up by `configure`, and waits until it answers.
fn start(variable: &str, configure: impl Fn(&mut Command, u16, &std::path::Path)) -> Server {
    let executable = executable(variable);
    let mut failures = Vec::new();
    for _ in 0..PORTS {
        let port = free_port();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = File::create(directory.path().join("log")).expect("the directory is ours");
        // `setpriv` has the kernel kill the process when the thread that started it is gone, and then becomes the
        // emulator; nothing in this process could do that without unsafe code.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&executable);
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("AWS_")) {
                command.env_remove(name);
            }
        }
        configure(&mut command, port, directory.path());
        command
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log);
        let mut server = keep(command, format!("http://127.0.0.1:{port}"), directory);
        match server.wait_up(port) {
            Ok(()) => return server,
            Err(failure) => {
                server.kill();
                failures.push(format!("port {port}: {failure}; its log:\n{}", server.log()));
            }
        }
    }
    panic!("{variable}={} did not come up:\n{}", executable.display(), failures.join("\n"));
}

/// A port of the loopback that nobody listens on now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

/// Runs `command` on a thread that lives as long as the server: the kernel minds the thread, and a test's
/// own thread may end before others are done with a server that it has started.
fn keep(mut command: Command, endpoint: String, directory: TempDir) -> Server {
    let (started, wait_started) = mpsc::channel();
    let (release, wait_release) = mpsc::channel::<()>();
    let keeper = thread::spawn(move || {
        if started.send(command.spawn()).is_ok() {
            // Nothing is ever sent: this ends when the server is dropped.
            let _ = wait_release.recv();
        }
    });
    let child = wait_started.recv().expect("the keeper answers once");
    let child = child.expect("setpriv (of util-linux) can be started");
    let child = Arc::new(Mutex::new(child));
    Server { endpoint, child, release: Some(release), keeper: Some(keeper), directory }
}

impl Server {
    /// Waits until it, and not somebody else who took the port, answers.
    fn wait_up(&mut self, port: u16) -> Result<(), String> {
        let until = Instant::now() + UP;
        loop {
            let mut child = self.child.lock().expect("nobody panics while holding it");
            if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
                return Err(format!("it ended with {status}"));
            }
            if is_answering(port) && is_listening(child.id(), port) {
                return Ok(());
            }
            drop(child);
            if Instant::now() > until {
                return Err(format!("it does not answer after {} s", UP.as_secs()));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether an HTTP server answers there, whatever it answers.
fn is_answering(port: u16) -> bool {
    let answer = || -> std::io::Result<bool> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /health HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut start = [0; 5];
        stream.read_exact(&mut start)?;
        Ok(&start == b"HTTP/")
    };
    answer().unwrap_or(false)
}

/// Whether the process `pid` itself listens on that port of the loopback.
fn is_listening(pid: u32, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let Ok(sockets) = fs::read_to_string(format!("/proc/{pid}/net/tcp")) else { return false };
    // proc(5): 1 = local address, 3 = state, 9 = inode.
    let inode = sockets.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_it = fields.get(1)?.ends_with(&format!(":{port:04X}")) && *fields.get(3)? == LISTEN;
        is_it.then(|| fields.get(9).map(ToString::to_string)).flatten()
    });
    let Some(inode) = inode else { return false };
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|target| target == socket))
}
