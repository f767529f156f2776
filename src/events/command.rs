//! The operator's command for alarms: run without a shell, with an event as its standard input, and never for longer than it
//! may. Nothing of it runs on a thread that it could keep: the process can end at any time.

use std::{
    env,
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::time::Instant;

use super::Event;

/// What it finds of the daemon's environment. The rest may hold secrets.
const KEPT: [&str; 6] = ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ"];

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How long something that was killed may take to end.
const END: Duration = Duration::from_secs(2);

/// Runs `command`, its path and its arguments, for `event`. The error says why it failed.
pub(crate) async fn run(command: &[String], event: &Event, within: Duration) -> Result<(), String> {
    let Some(program) = command.first().cloned() else { return Ok(()) };
    let (prepared, json) = (prepared(command, event), event.json());
    // Starting it reads a disk, which may hang.
    let started = tokio::task::spawn_blocking(move || start(prepared, &json));
    let started = tokio::time::timeout(within, started).await;
    let mut running = match started {
        Ok(Ok(Ok(running))) => running,
        Ok(Ok(Err(error))) => return Err(format!("{program} can't be started: {error}")),
        Ok(Err(_)) | Err(_) => return Err(format!("{program} can't be started in time")),
    };
    match running.ended(within).await {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("{program}: {status}")),
        None => {
            running.kill();
            running.ended(END).await;
            Err(format!("{program} did not end within {} s and was killed", within.as_secs()))
        }
    }
}

fn prepared(command: &[String], event: &Event) -> Command {
    let mut prepared = Command::new(&command[0]);
    prepared
        .args(&command[1..])
        .env_clear()
        .envs(KEPT.iter().filter_map(|name| Some((name, env::var_os(name)?))))
        .env("POSTRIDER_EVENT", event.kind())
        .current_dir("/")
        .process_group(0) // what it starts is killed with it
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Event::Alarm(note) = event {
        prepared
            .env("POSTRIDER_ALARM", &note.alarm)
            .env("POSTRIDER_SUBJECT", &note.subject)
            .env("POSTRIDER_SEVERITY", &note.severity);
    }
    prepared
}

fn start(mut command: Command, stdin: &[u8]) -> std::io::Result<Running> {
    let mut running = Running { child: command.spawn()?, status: None };
    if let Some(mut pipe) = running.child.stdin.take() {
        // An event fits into the buffer of a pipe, so that this waits for nobody. Whoever closes it does without.
        let _ = pipe.write_all(stdin);
    }
    Ok(running)
}

/// A command that runs; killed when dropped.
struct Running {
    child: Child,
    status: Option<ExitStatus>,
}

impl Running {
    /// How it ended, if it does within that time.
    async fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + within;
        loop {
            // An error says that it is nobody's child any more: nothing is known of its end.
            self.status = self.child.try_wait().unwrap_or_default();
            if self.status.is_some() || Instant::now() >= until {
                return self.status;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Kills it and what it has started, unless it has ended: its id may be another's then.
    fn kill(&self) {
        if self.status.is_none() {
            // It may have ended just now.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn shell(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
    }

    const MINUTE: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn a_command_gets_the_event_and_nothing_secret() {
        let [raised, ..] = Event::samples();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run(&shell(&format!("cat > {0}; env >> {0}", out.display())), &raised, MINUTE).await.unwrap();
        let found = fs::read_to_string(&out).unwrap();
        let (event, environment) = found.split_at(raised.json().len());
        assert_eq!(event.as_bytes(), raised.json());
        let names: Vec<_> =
            environment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        let of_shell = ["PWD", "OLDPWD", "SHLVL", "_"];
        let allowed =
            |name: &str| KEPT.contains(&name) || of_shell.contains(&name) || name.starts_with("POSTRIDER_");
        assert!(names.iter().all(|name| allowed(name)), "{names:?}");
        for line in ["POSTRIDER_EVENT=alarm.raised", "POSTRIDER_ALARM=dead", "POSTRIDER_SUBJECT=support"] {
            assert!(environment.contains(line), "{environment}");
        }
    }

    #[tokio::test]
    async fn a_command_that_fails_says_why() {
        let [raised, ..] = Event::samples();
        let why = run(&shell("exit 3"), &raised, MINUTE).await.unwrap_err();
        assert!(why.contains("exit status: 3"), "{why}");
        let why = run(&["/nonexistent".to_owned()], &raised, MINUTE).await.unwrap_err();
        assert!(why.contains("can't be started"), "{why}");
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_with_what_it_has_started() {
        let [raised, ..] = Event::samples();
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!("sleep 1000 & echo $! > {0}; echo $$ >> {0}; wait", pids.display());
        let begun = Instant::now();
        let why = run(&shell(&script), &raised, Duration::from_secs(1)).await.unwrap_err();
        assert!(why.contains("was killed"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        let found = fs::read_to_string(&pids).unwrap();
        assert_eq!(found.lines().count(), 2);
        for pid in found.lines() {
            // What its parent has left behind is a zombie until somebody takes it.
            let is_gone = || match fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) => stat.contains(") Z "),
                Err(_) => true,
            };
            while !is_gone() {
                assert!(begun.elapsed() < Duration::from_secs(20), "{pid} runs on");
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}
