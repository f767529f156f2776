//! A small world per test: directories, a config, a receiver, a daemon, and the oracle.

pub(crate) mod disk;
#[cfg(feature = "aws")]
pub(crate) mod inbound;
pub(crate) mod input;
pub(crate) mod notify;
pub(crate) mod process;
#[cfg(feature = "postgres")]
mod receipts;
pub(crate) mod scripted;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use postrider_actors::{model::suspect::LOST_REQUESTS_MAX, testing::counts};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::{
    input::Input,
    notify::NotifySocket,
    process::{Answer, POSTRIDER, Process, run},
    scripted::{Reply, Request, ScriptedReceiver},
};

/// After faults stop, everything is terminal within this time (faults.md), on a loaded machine too.
pub(crate) const LIVENESS: Duration = Duration::from_mins(1);
/// How long a command that only reads may take.
const COMMAND: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(80);

/// The signing secret of every destination here; no log may hold it (I10).
pub(crate) const SECRET: &str = "whsec_dGhpcyBpcyBvbmx5IGEgdGVzdCBzZWNyZXQsIDMyIGI=";

/// Polls `check` until it gives something; panics with `what` after `within`.
#[track_caller]
pub(crate) fn wait_for<T>(within: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {within:?} in vain for {what}");
        thread::sleep(POLL);
    }
}

/// Polls `check` until it holds.
#[track_caller]
pub(crate) fn wait_until(within: Duration, what: &str, mut check: impl FnMut() -> bool) {
    wait_for(within, what, || check().then_some(()));
}

/// A number from the environment, for longer runs.
pub(crate) fn knob(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|error| panic!("{name} = `{text}` is not a number: {error}"))
    })
}

enum Receiver {
    None,
    /// `postrider receiver` and where it listens.
    Real {
        process: Process,
        address: String,
    },
    Scripted(ScriptedReceiver),
}

pub(crate) struct World {
    directory: TempDir,
    /// Holds the feeds' directories, and the files that are on their way into them.
    feeds: TempDir,
    state: PathBuf,
    /// The config as it will be written at the next `configure`.
    config: toml::Table,
    receiver: Receiver,
    receiver_log: PathBuf,
    /// Whether the receiver checks signatures: it can't where its clock is another than the daemon's.
    pub(crate) checks_signatures: bool,
    daemon: Option<Process>,
    /// Further processes that share this one's engines, by name; each has a state of its own and no feeds
    /// that anybody drops into.
    peers: BTreeMap<String, Process>,
    /// What the daemon and its commands find in their environment besides the usual.
    environment: Vec<(String, String)>,
    /// Where the oracle reads the facts, if not in the embedded store: the arguments that say so.
    engine: Vec<String>,
    pub(crate) notify: NotifySocket,
    /// What was dropped: feed and input; the same bytes only once.
    dropped: Vec<(String, Input)>,
    failpoints: String,
    /// What the daemon is started by: a command that ends in it.
    under: Vec<String>,
    /// The binary that the daemon and its commands are.
    binary: PathBuf,
    /// How often the daemon was killed or aborted.
    pub(crate) kills: usize,
    /// Further messages whose fate the sender can't know: the windows of panics, resets, timeouts.
    pub(crate) unknown: usize,
    /// Rounds of redrive.
    pub(crate) redrives: usize,
}

impl World {
    /// One feed `alerts` of `format`, going to `support`.
    pub(crate) fn new(format: &str) -> Self {
        Self::with_feeds_in(format, &env::temp_dir())
    }

    /// The same with its feeds on another file system than the state: a claim has to copy.
    pub(crate) fn apart(format: &str) -> Self {
        let world = Self::with_feeds_in(format, Path::new("/dev/shm"));
        let device = |path: &Path| fs::metadata(path).expect("it is there").dev();
        assert_ne!(
            device(world.feeds.path()),
            device(world.directory.path()),
            "/dev/shm is a file system of its own"
        );
        world
    }

    /// The same with its feeds and its state at `place`, a disk that tests treat badly.
    pub(crate) fn on(format: &str, place: &Path) -> Self {
        let mut world = Self::with_feeds_in(format, place);
        world.state = place.join("state");
        let state = world.state.display().to_string();
        world.set("state.dir", state);
        world
    }

    fn with_feeds_in(format: &str, feeds: &Path) -> Self {
        let temporary = |place: &Path| {
            tempfile::Builder::new()
                .prefix("postrider-test-")
                .tempdir_in(place)
                .expect("a temporary directory")
        };
        let (directory, feeds) = (temporary(&env::temp_dir()), temporary(feeds));
        let notify = NotifySocket::bind(&directory.path().join("notify"));
        let mut world = Self {
            receiver_log: directory.path().join("receiver.log"),
            state: directory.path().join("state"),
            directory,
            feeds,
            config: toml::Table::new(),
            receiver: Receiver::None,
            checks_signatures: true,
            daemon: None,
            peers: BTreeMap::new(),
            environment: Vec::new(),
            engine: Vec::new(),
            notify,
            dropped: Vec::new(),
            failpoints: String::new(),
            under: Vec::new(),
            binary: POSTRIDER.into(),
            kills: 0,
            unknown: 0,
            redrives: 0,
        };
        fs::create_dir(world.staging()).expect("a new directory");
        fs::File::create(&world.receiver_log).expect("a new file");
        fs::File::create(world.daemon_log()).expect("a new file");
        let state = world.state.display().to_string();
        world
            .set("state.dir", state)
            .set("log.format", "json")
            .set("log.level", "debug")
            .set("batch.max_messages", 100)
            .set("canary.enabled", false) // tests of it switch it on
            .set("alarms.disk.max_percent", 100) // the disk of the machine is not the test's
            .set("ops.listen", ""); // those of it too
        world.add_destination("support").add_feed("alerts", format, &["support"]);
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.path("postrider.toml")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.state.clone()
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.state().join("postrider.db")
    }

    pub(crate) fn receiver_log(&self) -> &Path {
        &self.receiver_log
    }

    pub(crate) fn daemon_log(&self) -> PathBuf {
        self.path("daemon.log")
    }

    /// What every daemon of this world has logged.
    pub(crate) fn daemon_log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.daemon_log()).expect("it was made")).into_owned()
    }

    pub(crate) fn inbox(&self, feed: &str) -> PathBuf {
        self.feeds.path().join(feed)
    }

    /// Where files are written before they are renamed into a feed.
    pub(crate) fn staging(&self) -> PathBuf {
        self.feeds.path().join(".staging")
    }

    pub(crate) fn done(&self, name: &str) -> PathBuf {
        self.inbox("alerts").join("done").join(name)
    }

    pub(crate) fn failed(&self, name: &str) -> PathBuf {
        self.inbox("alerts").join("failed").join(name)
    }

    // --- config

    /// Sets `a.b.c` in the config; it counts from the next start, or `configure`.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<toml::Value>) -> &mut Self {
        let mut table = &mut self.config;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                table.insert(part.to_owned(), value.into());
                break;
            }
            table = table
                .entry(part)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()))
                .as_table_mut()
                .expect("tests set keys of tables");
        }
        self
    }

    /// Removes `a.b.c` from the config.
    pub(crate) fn unset(&mut self, key: &str) -> &mut Self {
        let (tables, last) = key.rsplit_once('.').expect("tests set keys of tables");
        let table = tables.split('.').fold(&mut self.config, |table, part| {
            table.get_mut(part).and_then(toml::Value::as_table_mut).expect("it was set")
        });
        table.remove(last).expect("it was set");
        self
    }

    pub(crate) fn add_feed(&mut self, name: &str, format: &str, destinations: &[&str]) -> &mut Self {
        let inbox = self.inbox(name);
        fs::create_dir_all(&inbox).expect("a new directory");
        let names: Vec<_> = destinations.iter().map(|name| toml::Value::from(*name)).collect();
        let prefix = format!("feeds.{name}");
        self.set(&format!("{prefix}.path"), inbox.display().to_string())
            .set(&format!("{prefix}.format"), format)
            .set(&format!("{prefix}.rescan"), "500ms")
            .set(&format!("{prefix}.stable_after"), "300ms")
            .set(&format!("{prefix}.destinations"), names);
        if format != "text" {
            self.set(&format!("{prefix}.recipient"), "user_id");
        }
        self
    }

    /// A destination at path `/NAME` of the receiver, with a schedule that suits tests.
    pub(crate) fn add_destination(&mut self, name: &str) -> &mut Self {
        let prefix = format!("destinations.{name}");
        self.set(&format!("{prefix}.secrets"), vec!["env:POSTRIDER_TEST_SECRET"])
            .set(&format!("{prefix}.allow"), vec!["127.0.0.1/32", "::1/128"])
            .set(&format!("{prefix}.concurrency"), 16)
            .set(&format!("{prefix}.timeout"), "5s")
            .set(&format!("{prefix}.retry.max_attempts"), 12)
            .set(&format!("{prefix}.retry.base"), "20ms")
            .set(&format!("{prefix}.retry.cap"), "200ms")
    }

    fn names(&self, table: &str) -> Vec<String> {
        let found = self.config.get(table).and_then(toml::Value::as_table);
        found.map(|table| table.keys().filter(|name| *name != "*").cloned().collect()).unwrap_or_default()
    }

    fn number(&self, key: &str, default: i64) -> usize {
        let found = key.split('.').try_fold(None::<&toml::Value>, |at, part| {
            let table = at.map_or(Some(&self.config), toml::Value::as_table)?;
            Some(Some(table.get(part)?))
        });
        let number = found.flatten().and_then(toml::Value::as_integer).unwrap_or(default);
        usize::try_from(number).expect("tests set no negative numbers")
    }

    /// Messages that one kill may repeat: what is in flight, and what is not recorded yet.
    pub(crate) fn window(&self) -> usize {
        let destinations = self.names("destinations");
        let in_flight: usize = destinations
            .iter()
            .map(|name| self.number(&format!("destinations.{name}.concurrency"), 64))
            .sum();
        in_flight + self.number("record.max_unrecorded", 2000)
    }

    /// Keeps batches and facts in engines across the network. `environment` is for the daemon, `engine` says where
    /// the oracle reads.
    pub(crate) fn share(&mut self, environment: Vec<(String, String)>, engine: Vec<String>) -> &mut Self {
        self.environment = environment;
        self.engine = engine;
        self
    }

    /// Lets the daemon find `value` as `name` in its environment.
    pub(crate) fn environment(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Replaces the config file; a destination without a URL of its own points at the receiver.
    pub(crate) fn configure(&mut self) {
        let text = toml::to_string(&self.whole_config()).expect("a table is TOML");
        let fresh = self.path("postrider.toml.new");
        fs::write(&fresh, text).expect("the directory is ours");
        // A daemon may be reading the one before.
        fs::rename(fresh, self.config_path()).expect("one file system");
    }

    fn whole_config(&self) -> toml::Table {
        let address = match &self.receiver {
            Receiver::None => "127.0.0.1:9", // discard: nobody listens
            Receiver::Real { address, .. } => address,
            Receiver::Scripted(receiver) => &receiver.address.to_string(),
        };
        let mut config = self.config.clone();
        let destinations = config["destinations"].as_table_mut().expect("every world has destinations");
        for (name, destination) in destinations.iter_mut() {
            let destination = destination.as_table_mut().expect("destinations are tables");
            if destination.get("kind").and_then(toml::Value::as_str) == Some("table") {
                continue;
            }
            destination.entry("url").or_insert_with(|| format!("http://{address}/{name}").into());
        }
        config
    }

    // --- receivers

    /// Starts `postrider receiver` with more arguments. It takes the place of the one before, at its address.
    pub(crate) fn receive(&mut self, arguments: &[&str]) -> &mut Self {
        let listen = match std::mem::replace(&mut self.receiver, Receiver::None) {
            Receiver::Real { address, .. } => address,
            _ => "127.0.0.1:0".to_owned(),
        };
        let mut command = Command::new(&self.binary);
        command.args(["receiver", "--listen", &listen, "--log"]).arg(&self.receiver_log);
        if self.checks_signatures {
            command.args(["--secret", SECRET]);
        }
        command.args(arguments).stdout(Stdio::piped());
        let mut process = Process::spawn(&mut command, &self.path("receiver.stderr"));
        let line = process.first_line();
        let address = line.strip_prefix("listening on ").expect("the receiver says where it listens");
        let address = address.to_owned();
        self.receiver = Receiver::Real { process, address };
        self
    }

    /// The receiver's process, for what may happen to one.
    pub(crate) fn receiver(&mut self) -> &mut Process {
        match &mut self.receiver {
            Receiver::Real { process, .. } => process,
            _ => panic!("only a real receiver is a process"),
        }
    }

    /// Starts a receiver that follows a script.
    pub(crate) fn script(&mut self, script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> &mut Self {
        self.receiver = Receiver::Scripted(ScriptedReceiver::start(&self.receiver_log, script));
        self
    }

    /// Where the receiver listens on this machine.
    pub(crate) fn receiver_port(&self) -> u16 {
        match &self.receiver {
            Receiver::None => panic!("there is no receiver"),
            Receiver::Real { address, .. } => {
                address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("an address with a port")
            }
            Receiver::Scripted(receiver) => receiver.address.port(),
        }
    }

    /// What the scripted receiver got.
    pub(crate) fn requests(&self) -> Vec<Request> {
        match &self.receiver {
            Receiver::Scripted(receiver) => receiver.requests(),
            _ => panic!("only a scripted receiver keeps its requests"),
        }
    }

    /// How many requests any receiver has logged.
    pub(crate) fn request_count(&self) -> usize {
        let log = fs::File::open(&self.receiver_log).expect("it was made");
        let mut reader = BufReader::with_capacity(1 << 20, log);
        let mut count = 0;
        loop {
            let chunk = reader.fill_buf().expect("the log reads");
            if chunk.is_empty() {
                return count;
            }
            count += memchr::memchr_iter(b'\n', chunk).count();
            let read = chunk.len();
            reader.consume(read);
        }
    }

    /// The oracle reads the embedded store after all.
    pub(crate) fn read_embedded(&mut self) -> &mut Self {
        self.engine.clear();
        self
    }

    /// Whom requests were for, by the body's `data.KEY`, and the ids that they came under. The receiver has to
    /// log bodies.
    pub(crate) fn recipients(&self, key: &str) -> BTreeMap<String, BTreeSet<String>> {
        let log = fs::File::open(&self.receiver_log).expect("it was made");
        let mut found = BTreeMap::<String, BTreeSet<String>>::new();
        for line in BufReader::new(log).lines() {
            let entry: Value = serde_json::from_str(&line.expect("the log reads")).expect("whole lines");
            let body: Value =
                serde_json::from_str(entry["body"].as_str().expect("bodies are logged")).expect("JSON");
            let recipient = body["data"][key].as_str().expect("every body has it").to_owned();
            found.entry(recipient).or_default().insert(entry["id"].to_string());
        }
        found
    }

    /// The bodies that were accepted at `path`. The receiver has to log bodies.
    pub(crate) fn bodies_of(&self, path: &str) -> Vec<Value> {
        let log = fs::File::open(&self.receiver_log).expect("it was made");
        let entry = |line: std::io::Result<String>| -> Value {
            serde_json::from_str(&line.expect("the log reads")).expect("whole lines")
        };
        let entries = BufReader::new(log).lines().map(entry);
        let accepted = entries.filter(|entry| entry["path"] == path && entry["status"] == 200);
        let body = |entry: Value| serde_json::from_str(entry["body"].as_str().expect("bodies are logged"));
        accepted.map(|entry| body(entry).expect("bodies are JSON")).collect()
    }

    /// When each request arrived, in milliseconds, ascending.
    pub(crate) fn request_times(&self) -> Vec<u64> {
        let log = fs::File::open(&self.receiver_log).expect("it was made");
        let lines = BufReader::new(log).lines().map(|line| line.expect("the log reads"));
        let at = |line: String| {
            let entry: Value = serde_json::from_str(&line).expect("the log is JSON lines");
            entry["at"].as_u64().expect("every entry has its time")
        };
        let mut times: Vec<_> = lines.map(at).collect();
        times.sort_unstable();
        times
    }

    pub(crate) fn wait_requests(&self, at_least: usize) {
        wait_until(LIVENESS, &format!("{at_least} requests"), || self.request_count() >= at_least);
    }

    // --- the daemon

    /// The next start's `FAILPOINTS`.
    pub(crate) fn fail(&mut self, failpoints: &str) -> &mut Self {
        failpoints.clone_into(&mut self.failpoints);
        self
    }

    /// `postrider ARGUMENTS -c CONFIG` with the environment that the config needs.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(&self.config_path(), arguments)
    }

    /// Starts the daemon by another command, which replaces itself with it: `prlimit --nofile=128`.
    pub(crate) fn under(&mut self, command: &[&str]) -> &mut Self {
        self.under = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Lets the daemon and its commands be another binary from the next start on.
    pub(crate) fn binary(&mut self, path: &Path) -> &mut Self {
        path.clone_into(&mut self.binary);
        self
    }

    fn command_of(&self, config: &Path, arguments: &[&str]) -> Command {
        self.command_by(&[], config, arguments)
    }

    fn command_by(&self, under: &[String], config: &Path, arguments: &[&str]) -> Command {
        let mut words = under.iter().map(OsStr::new).chain([self.binary.as_os_str()]);
        let mut command = Command::new(words.next().expect("at least the binary"));
        command
            .args(words)
            .args(arguments)
            .arg("-c")
            .arg(config)
            .env("POSTRIDER_TEST_SECRET", SECRET)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("FAILPOINTS")
            .env_remove("POSTRIDER_LOG")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// `postrider run`, ready to be spawned.
    pub(crate) fn run_command(&self) -> Command {
        let mut command = self.command_by(&self.under, &self.config_path(), &["run"]);
        command.env("NOTIFY_SOCKET", self.notify.path()).stdout(Stdio::null());
        if !self.failpoints.is_empty() {
            command.env("FAILPOINTS", &self.failpoints);
        }
        command
    }

    /// Writes the config and starts the daemon.
    pub(crate) fn start(&mut self) -> &mut Self {
        assert!(self.daemon.is_none(), "one daemon at a time");
        self.configure();
        self.notify.forget();
        self.daemon = Some(Process::spawn(&mut self.run_command(), &self.daemon_log()));
        self
    }

    /// Starts the daemon and waits until it says that it is ready.
    pub(crate) fn start_ready(&mut self) -> &mut Self {
        self.start();
        self.notify.wait("READY=1");
        self
    }

    /// Starts another process on the same engines, with a state and feed directories of its own.
    pub(crate) fn start_peer(&mut self, name: &str) -> &mut Self {
        let home = self.path(name);
        fs::create_dir_all(&home).expect("the directory is ours");
        let mut config = self.whole_config();
        let set = |table: &mut toml::Value, key: &str, path: PathBuf| {
            fs::create_dir_all(&path).expect("the directory is ours");
            let table = table.as_table_mut().expect("it is a table");
            table.insert(key.to_owned(), path.display().to_string().into());
        };
        set(&mut config["state"], "dir", home.join("state"));
        for (feed, table) in config["feeds"].as_table_mut().expect("every world has feeds").iter_mut() {
            if table.get("path").is_some() {
                set(table, "path", home.join(feed));
            }
        }
        let path = home.join("postrider.toml");
        fs::write(&path, toml::to_string(&config).expect("a table is TOML")).expect("the directory is ours");
        let mut command = self.command_of(&path, &["run"]);
        command.stdout(Stdio::null());
        let peer = Process::spawn(&mut command, &self.daemon_log());
        assert!(self.peers.insert(name.to_owned(), peer).is_none(), "peer {name} runs already");
        self
    }

    /// `kill -9` of another process.
    pub(crate) fn kill_peer(&mut self, name: &str) {
        self.peers.remove(name).expect("the peer was started").kill();
        self.kills += 1;
    }

    /// SIGTERM to every other process.
    pub(crate) fn stop_peers(&mut self) {
        for (name, mut peer) in std::mem::take(&mut self.peers) {
            peer.signal(rustix::process::Signal::TERM);
            let status = peer.wait_exit(Duration::from_secs(30));
            assert_eq!(status.code(), Some(0), "{name} after SIGTERM: {status}\n{}", tail(&peer.log_text()));
        }
    }

    pub(crate) fn daemon(&mut self) -> &mut Process {
        self.daemon.as_mut().expect("the daemon was started")
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.daemon.take().expect("the daemon was started").kill();
        self.kills += 1;
    }

    /// SIGTERM; the daemon must drain and exit 0 within the 30 s of F11.
    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon was started");
        daemon.signal(rustix::process::Signal::TERM);
        let status = daemon.wait_exit(Duration::from_secs(30));
        assert_eq!(status.code(), Some(0), "after SIGTERM: {status}\n{}", tail(&daemon.log_text()));
    }

    /// Waits until the daemon is gone by itself.
    pub(crate) fn wait_exit(&mut self, within: Duration) -> std::process::ExitStatus {
        self.daemon.take().expect("the daemon was started").wait_exit(within)
    }

    /// Runs a command of the CLI against this world's config.
    pub(crate) fn postrider(&self, arguments: &[&str]) -> Answer {
        run(&mut self.command(arguments), self.directory.path(), COMMAND)
    }

    /// The same as the daemon is run.
    pub(crate) fn postrider_under(&self, arguments: &[&str]) -> Answer {
        let mut command = self.command_by(&self.under, &self.config_path(), arguments);
        run(&mut command, self.directory.path(), COMMAND)
    }

    // --- files

    /// Drops a file into a feed: written elsewhere, renamed into place.
    pub(crate) fn drop_into(&mut self, feed: &str, input: Input) -> &mut Self {
        let staged = self.staging().join("file");
        fs::write(&staged, &input.bytes).expect("the directory is ours");
        fs::rename(staged, self.inbox(feed).join(&input.name)).expect("one file system");
        self.expect(feed, input)
    }

    /// Drops a file into `alerts`.
    pub(crate) fn drop_file(&mut self, input: Input) -> &mut Self {
        self.drop_into("alerts", input)
    }

    /// Expects of a file what `drop_into` would, for tests that put it there themselves.
    pub(crate) fn expect(&mut self, feed: &str, input: Input) -> &mut Self {
        let known = self.dropped.iter().any(|(other, known)| other == feed && known.bytes == input.bytes);
        if !known {
            self.dropped.push((feed.to_owned(), input));
        }
        self
    }

    /// The expectations of the files dropped so far, for tests that learn them late.
    pub(crate) fn expected_mut(&mut self) -> impl Iterator<Item = &mut Input> {
        self.dropped.iter_mut().map(|(_, input)| input)
    }

    /// `postrider files --json`, of the files that were read; empty while there is no store.
    pub(crate) fn files(&self) -> Vec<Value> {
        self.all_files().into_iter().filter(|file| file["state"] != "held").collect()
    }

    /// The held file of that name.
    pub(crate) fn held(&self, name: &str) -> Option<Value> {
        self.all_files().into_iter().find(|file| file["state"] == "held" && file["name"] == name)
    }

    fn all_files(&self) -> Vec<Value> {
        if self.engine.is_empty() && !self.store().exists() {
            return Vec::new();
        }
        let answer = self.postrider(&["files", "--json", "--limit", "1000000"]);
        // The store may be in the middle of its creation.
        if answer.code == Some(0) { answer.json().as_array().expect("an array").clone() } else { Vec::new() }
    }

    /// The report of one file by name.
    pub(crate) fn file(&self, name: &str) -> Option<Value> {
        self.files().into_iter().find(|file| file["name"] == name)
    }

    /// Waits until every file that was dropped is closed and all its messages are terminal.
    pub(crate) fn wait_settled(&mut self, within: Duration) -> &mut Self {
        let expected = self.dropped.len();
        wait_until(within, &format!("{expected} files to settle"), || {
            if let Some(daemon) = &mut self.daemon
                && let Some(status) = daemon.exit_status()
            {
                panic!("the daemon exited ({status}) before everything was settled");
            }
            // Each look is a process: not more often than needed.
            thread::sleep(LOOK);
            let files = self.files();
            files.len() >= expected && files.iter().all(is_settled)
        });
        self
    }

    // --- the oracle

    /// Asks the oracle; panics with its violations. Returns its summary, which is also this test's figure in
    /// docs/faults.md.
    #[track_caller]
    pub(crate) fn prove(&mut self) -> Value {
        self.prove_since(&[])
    }

    /// The same; no state may be lower than in those earlier snapshots.
    #[track_caller]
    pub(crate) fn prove_since(&mut self, snapshots: &[PathBuf]) -> Value {
        let arguments: Vec<_> =
            snapshots.iter().flat_map(|dump| ["--earlier".to_owned(), dump.display().to_string()]).collect();
        let summary = self.ask_oracle(true, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        counts(json!({ "kills": self.kills, "oracle": summary }));
        summary
    }

    /// Keeps every message's state in a file, to be compared with later; nothing has to be terminal yet.
    pub(crate) fn snapshot(&mut self, dump: &Path) {
        self.ask_oracle(false, &["--dump", &dump.display().to_string()]);
    }

    #[track_caller]
    fn ask_oracle(&mut self, quiescent: bool, arguments: &[&str]) -> Value {
        let manifest = self.path("manifest.json");
        let destinations: serde_json::Map<_, _> = self
            .names("destinations")
            .into_iter()
            .map(|name| (name.clone(), json!(format!("/{name}"))))
            .collect();
        let files: Vec<_> = self
            .dropped
            .iter()
            .map(|(feed, input)| {
                let names = &self.config["feeds"][feed]["destinations"];
                let names: Vec<_> = names
                    .as_array()
                    .expect("set as an array")
                    .iter()
                    .filter_map(toml::Value::as_str)
                    .map(str::to_owned)
                    .collect();
                input.manifest(feed, &names)
            })
            .collect();
        let text = json!({
            "attempt_cap": self.number("destinations.support.retry.max_attempts", 12),
            "lost_lease_cap": LOST_REQUESTS_MAX,
            "kills": self.kills,
            "window": self.window(),
            "unknown": self.unknown,
            "redrives": self.redrives,
            "quiescent": quiescent,
            "signed": self.checks_signatures && matches!(self.receiver, Receiver::Real { .. }),
            "secrets": [SECRET, &SECRET["whsec_".len()..]],
            "destinations": destinations,
            "files": files,
        });
        fs::write(&manifest, text.to_string()).expect("the directory is ours");
        let python = env::var("POSTRIDER_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let mut command = Command::new(python);
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/oracle.py"))
            .args(["--manifest", &manifest.display().to_string()])
            .args(["--log", &self.receiver_log.display().to_string()])
            .args(["--scan", &self.daemon_log().display().to_string()])
            .args(arguments);
        if self.engine.is_empty() {
            command.args(["--store", &self.store().display().to_string()]);
        } else {
            command.args(&self.engine);
        }
        let answer = run(&mut command, self.directory.path(), Duration::from_mins(5));
        assert_eq!(answer.code, Some(0), "the oracle: {}\n{}", answer.stderr, answer.stdout);
        answer.json()
    }
}

/// A time as reports have it.
pub(crate) fn unix_ms(at: &Value) -> u64 {
    let at = humantime::parse_rfc3339(at.as_str().expect("a time")).expect("RFC 3339");
    at.duration_since(std::time::UNIX_EPOCH).expect("it is later").as_millis() as u64
}

/// Whether a report (of `files --json` or `NAME.report.json`) says that nothing will change any more.
pub(crate) fn is_settled(report: &Value) -> bool {
    let number = |value: &Value| value.as_u64().expect("reports count");
    report["state"] != "ingesting"
        && report["destinations"].as_object().expect("reports list destinations").values().all(|counts| {
            let settled = ["sent", "dead", "unsent", "cancelled"].map(|word| number(&counts[word]));
            settled.iter().sum::<u64>() == number(&counts["accepted"])
        })
}

/// Waits until the report of `path` (a file in `done/` or `failed/`) says that all is settled.
pub(crate) fn wait_report(path: &Path) -> Value {
    let name = format!("{}.report.json", path.file_name().expect("a file").to_string_lossy());
    let report = path.with_file_name(&name);
    wait_for(LIVENESS, &format!("the final {name}"), || {
        let report: Value = serde_json::from_slice(&fs::read(&report).ok()?).expect("reports are whole");
        is_settled(&report).then_some(report)
    })
}

/// Whether what a failed test leaves behind is kept.
pub(crate) fn keeps() -> bool {
    env::var_os("POSTRIDER_KEEP").is_some()
}

/// The end of a log, for a failed test's message.
fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = fs::read(self.daemon_log()).unwrap_or_default();
            eprintln!("the daemon's last words:\n{}", tail(&String::from_utf8_lossy(&log)));
            if keeps() {
                self.directory.disable_cleanup(true);
                self.feeds.disable_cleanup(true);
                eprintln!("kept: {} {}", self.directory.path().display(), self.feeds.path().display());
            }
        }
    }
}
