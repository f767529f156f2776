//! Child processes that can't outlive their test.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{LIVENESS, wait_for};

/// The binary under test.
pub(crate) const POSTRIDER: &str = env!("CARGO_BIN_EXE_postrider");

/// A child whose standard error goes to a file; killed when dropped.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        let stderr = OpenOptions::new().create(true).append(true).open(log).expect("the log opens");
        let child = command.stdin(Stdio::null()).stderr(stderr).spawn().expect("the binary starts");
        Self { child, log: log.to_owned() }
    }

    /// The first line of its standard output, which must be piped. The pipe stays open.
    pub(crate) fn first_line(&mut self) -> String {
        let mut stdout = BufReader::new(self.child.stdout.take().expect("standard output is piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("standard output is text");
        assert!(!line.is_empty(), "no line on standard output; it said: {}", self.log_text());
        self.child.stdout = Some(stdout.into_inner());
        line.trim_end().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a child that was not waited for can be signalled");
    }

    /// `kill -9`, and its burial.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a child that was not waited for can be killed");
        self.child.wait().expect("it is our child");
    }

    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// Waits until it has exited on its own.
    pub(crate) fn wait_exit(&mut self, within: Duration) -> ExitStatus {
        wait_for(within, "the process to exit", || self.exit_status())
    }

    pub(crate) fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log reads")).into_owned()
    }

    /// Waits until its log holds `text`.
    pub(crate) fn wait_log(&self, text: &str) {
        wait_for(LIVENESS, &format!("`{text}` in the log"), || self.log_text().contains(text).then_some(()));
    }

    /// The largest resident set it ever had, in bytes.
    pub(crate) fn peak_memory_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux reports it");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
        kib * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit_status().is_none() {
            // Fails only if it exited meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a command that ended by itself said.
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    /// Its standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}{}", self.stdout, self.stderr))
    }

    /// Itself, if it succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

/// Runs a command to its end, at most `within`. Its output goes through files, so that no pipe can fill up.
pub(crate) fn run(command: &mut Command, scratch: &Path, within: Duration) -> Answer {
    let directory = tempfile::tempdir_in(scratch).expect("the scratch directory is ours");
    let (out, err) = (directory.path().join("out"), directory.path().join("err"));
    command.stdout(File::create(&out).expect("a new file"));
    let mut process = Process::spawn(command, &err);
    let code = process.wait_exit(within).code();
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("it was made")).into_owned();
    Answer { code, stdout: text(&out), stderr: text(&err) }
}
