//! A Postgres server of a test's own: `script/test` installs Postgres and says where it is; a server is up
//! within a second. It listens on the loopback, trusts everybody, and keeps nothing beyond the test.
//!
//! A directory module, taken in with `#[path = "pg/mod.rs"] mod pg;`.
#![allow(dead_code, reason = "shared by several test binaries and benches; none of them uses everything")]
#![allow(unreachable_pub, reason = "`pub` is for the binaries that take this module in")]

use std::{
    env,
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use postrider_settings::{Keys, Tls};
use tempfile::TempDir;
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

/// Names the directory with `postgres` and `initdb`.
pub const POSTGRES: &str = "POSTRIDER_POSTGRES";

/// The role that owns the test's database; no superuser.
pub const OWNER: &str = "postrider";
/// That database.
pub const DATABASE: &str = "postrider";

/// `[ledger.postgres]` for a server on the loopback.
pub fn keys() -> postrider_settings::Postgres {
    postrider_settings::Postgres { tls: Tls::Disable, ..Keys::declared() }
}

/// How long it may take to answer; it needs less than a second on a quiet machine.
const UP: Duration = Duration::from_mins(1);

/// One running server. It ends with this value, and with the test's process however it ends.
pub struct Postgres {
    bin: PathBuf,
    directory: TempDir,
    port: u16,
    running: Mutex<Option<Running>>,
    fsync: bool,
}

struct Running {
    child: Child,
    /// Dropped to release the keeper.
    release: Option<mpsc::Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl Postgres {
    /// Starts an empty server that does not sync: it survives its own crashes, not the machine's.
    pub fn start() -> Self {
        Self::start_with(false)
    }

    /// Starts an empty server that syncs, and has the memory that docs/postgres.md advises: for figures.
    pub fn start_durable() -> Self {
        Self::start_with(true)
    }

    fn start_with(fsync: bool) -> Self {
        let bin = bin();
        let directory =
            tempfile::Builder::new().prefix("postrider-pg-").tempdir().expect("a temporary directory");
        give_away(directory.path());
        let data = directory.path().join("data");
        let output = as_server_user(&bin.join("initdb"), directory.path())
            .args(["--auth=trust", "--no-sync", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data)
            .output()
            .expect("initdb can be started");
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        let port = free_port();
        let server = Self { bin, directory, port, running: Mutex::default(), fsync };
        server.resume();
        server.execute_as("postgres", "postgres", &format!("CREATE ROLE {OWNER} LOGIN"));
        server.execute_as("postgres", "postgres", &format!("CREATE DATABASE {DATABASE} OWNER {OWNER}"));
        server
    }

    /// `postgres://postrider@127.0.0.1:PORT/postrider`
    pub fn url(&self) -> String {
        self.url_of(OWNER, DATABASE)
    }

    /// The same for another role and database.
    pub fn url_of(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Runs statements as the owner, or panics.
    pub fn execute(&self, sql: &str) {
        self.execute_as(OWNER, DATABASE, sql);
    }

    /// Runs statements, or panics.
    pub fn execute_as(&self, role: &str, database: &str, sql: &str) {
        self.with_client(role, database, async |client| {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        });
    }

    /// The first column of the first row, as text; the query casts it.
    pub fn value(&self, sql: &str) -> String {
        self.value_as(OWNER, DATABASE, sql)
    }

    /// The same as another role, e.g. the superuser `postgres`.
    pub fn value_as(&self, role: &str, database: &str, sql: &str) -> String {
        self.with_client(role, database, async |client| {
            let rows = client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            rows.first().and_then(|row| row.get::<_, Option<String>>(0)).unwrap_or_default()
        })
    }

    /// Every row as the texts of its columns; the query casts them.
    pub fn rows(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        self.with_client(OWNER, DATABASE, async |client| {
            let rows = client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            rows.iter().map(|row| (0..row.len()).map(|column| row.get(column)).collect()).collect()
        })
    }

    /// A thread of its own, so that asynchronous tests may call it too.
    fn with_client<T: Send>(
        &self,
        role: &str,
        database: &str,
        work: impl AsyncFnOnce(Client) -> T + Send,
    ) -> T {
        let url = self.url_of(role, database);
        thread::scope(|scope| {
            let run = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.expect("a runtime").block_on(async {
                    let (client, connection) =
                        tokio_postgres::connect(&url, NoTls).await.expect("the server answers");
                    let driving = tokio::spawn(connection);
                    let done = work(client).await;
                    driving.abort();
                    done
                })
            });
            run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Ends every connection at once, as an administrator's shutdown (`fast`) or a crash would. The data stay.
    pub fn stop(&self, how: Stop) {
        let Some(mut running) = self.running.lock().expect("nobody panics while holding it").take() else {
            return;
        };
        let signal = match how {
            Stop::Fast => rustix::process::Signal::INT,
            Stop::Crash => rustix::process::Signal::QUIT, // "immediate": no checkpoint, recovery at the start
        };
        let pid = rustix::process::Pid::from_child(&running.child);
        let _ = rustix::process::kill_process(pid, signal);
        let until = Instant::now() + UP;
        while running.child.try_wait().expect("it is our child").is_none() {
            assert!(Instant::now() < until, "postgres does not stop: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
        drop(running.release.take());
        if let Some(keeper) = running.keeper.take() {
            let _ = keeper.join();
        }
    }

    /// Starts it again where it was, on the same port and data.
    pub fn resume(&self) {
        let log = File::options().create(true).append(true).open(self.directory.path().join("log"));
        let log = log.expect("the directory is ours");
        let fsync = if self.fsync { "on" } else { "off" };
        let (buffers, wal) = if self.fsync { ("2GB", "8GB") } else { ("256MB", "2GB") };
        let mut command = as_server_user(&self.bin.join("postgres"), self.directory.path());
        command.arg("-D").arg(self.directory.path().join("data")).arg("-k").arg(self.directory.path());
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string()]);
        for setting in [
            format!("fsync={fsync}"),
            format!("full_page_writes={fsync}"),
            "max_connections=100".into(),
            format!("shared_buffers={buffers}"),
            format!("max_wal_size={wal}"),
            "log_min_error_statement=panic".into(),
        ] {
            command.args(["-c", &setting]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be shared")).stderr(log);
        let (started, wait_started) = mpsc::channel();
        let (release, wait_release) = mpsc::channel::<()>();
        // The kernel ends the server with the thread that started it: this one lives as long.
        let keeper = thread::spawn(move || {
            if started.send(command.spawn()).is_ok() {
                let _ = wait_release.recv();
            }
        });
        let child = wait_started.recv().expect("the keeper answers once").expect("setpriv can be started");
        *self.running.lock().expect("nobody panics while holding it") =
            Some(Running { child, release: Some(release), keeper: Some(keeper) });
        self.wait_up();
    }

    fn wait_up(&self) {
        let until = Instant::now() + UP;
        let url = format!("{}?connect_timeout=5", self.url_of("postgres", "postgres"));
        let runtime = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                loop {
                    match tokio_postgres::connect(&url, NoTls).await {
                        Ok(_) => return Ok(()),
                        Err(error) if Instant::now() > until => return Err(error),
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            })
        });
        if let Err(error) = runtime.join().expect("waiting does not panic") {
            panic!("postgres does not come up: {error}; its log:\n{}", self.log());
        }
    }

    /// What it has written so far, for a failure's message.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log"))
            .unwrap_or_else(|error| format!("no log: {error}"))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop(Stop::Crash);
    }
}

/// How a server ends.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// In order, but now.
    Fast,
    /// As if it were killed.
    Crash,
}

/// Postgres refuses to run as root: then it is the user `postgres`, which its Debian package makes.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where Postgres is installed.
fn bin() -> PathBuf {
    env::var_os(POSTGRES).map_or_else(
        || panic!("{POSTGRES} is not set: it names the directory of `postgres`; script/test sets it"),
        PathBuf::from,
    )
}

/// Its client for the command line.
pub fn psql() -> String {
    bin().join("psql").display().to_string()
}

/// A port of the loopback that nobody listens on now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

fn give_away(directory: &Path) {
    if is_root() {
        let status = Command::new("chown").arg("postgres:postgres").arg(directory).status();
        assert!(status.is_ok_and(|status| status.success()), "chown postgres {}", directory.display());
    }
}

/// `program` as a process that ends with the thread that starts it.
fn as_server_user(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command.arg("--").arg(program).current_dir(directory);
    command
}
