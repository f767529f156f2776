//! A reload that a command asks for, and what became of it. Whoever may write to the state directory may ask: a file there
//! says so, as SIGHUP does, and another one has the answers. No process id can be the wrong one, and who asks hears of the
//! reload that has read the configuration after that.

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::state_dir;
use crate::exit::{Exit, ExitContext as _};

/// What the names of files begin with that ask for a reload; an id follows.
const ASKED: &str = "reload.asked.";

/// The file with the answers.
const ANSWERS: &str = "reload.json";

/// Answers that are kept, and questions that are taken at once.
const ANSWERS_MAX: usize = 16;

/// How often the daemon looks for a question, and a command for its answer.
const LOOK: Duration = Duration::from_millis(100);

/// What became of a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Who has asked for it.
    asked: String,
    /// The configuration that was read.
    config: PathBuf,
    /// Why it is not used.
    refused: Option<String>,
}

/// The daemon's side.
pub(super) struct Reloads {
    state_dir: PathBuf,
    answers: VecDeque<Answer>,
    /// Questions that can't be taken away: they would be asked for ever.
    stuck: BTreeSet<String>,
}

impl Reloads {
    /// Nobody was answered yet.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned(), answers: VecDeque::new(), stuck: BTreeSet::new() }
    }

    /// Returns when somebody asks. Cancelling it loses nothing.
    pub(super) async fn asked(&self) {
        while self.questions().next().is_none() {
            tokio::time::sleep(LOOK).await;
        }
    }

    fn questions(&self) -> impl Iterator<Item = String> {
        // A directory that can't be read now is looked into again.
        let entries = fs::read_dir(&self.state_dir).into_iter().flatten().filter_map(Result::ok);
        let ids =
            entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix(ASKED)?.to_owned()));
        ids.filter(|id| !self.stuck.contains(id)).take(ANSWERS_MAX)
    }

    /// Takes the questions, which the reload that begins now answers: it reads the configuration after this.
    pub(super) fn take(&mut self) -> Vec<String> {
        let questions: Vec<_> = self.questions().collect();
        for id in &questions {
            match fs::remove_file(self.state_dir.join(format!("{ASKED}{id}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(id, %error, "what asks for a reload can't be removed");
                    self.stuck.insert(id.clone());
                }
                _ => {}
            }
        }
        questions
    }

    /// Answers them.
    pub(super) fn answer(&mut self, asked: Vec<String>, config: &Path, refused: Option<&str>) {
        if asked.is_empty() {
            return;
        }
        let answer = |asked| Answer { asked, config: config.to_owned(), refused: refused.map(str::to_owned) };
        self.answers.extend(asked.into_iter().map(answer));
        let surplus = self.answers.len().saturating_sub(ANSWERS_MAX);
        self.answers.drain(..surplus);
        let write = || {
            let answers = serde_json::to_vec_pretty(&self.answers)?;
            state_dir::write_file(&self.state_dir.join(ANSWERS), &answers)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "who has asked for the reload is not answered");
        }
    }
}

/// Asks the daemon that runs on `state_dir` for a reload, and waits for it; the configuration that it uses now.
pub(crate) fn ask(state_dir: &Path, wait: Duration) -> anyhow::Result<PathBuf> {
    let is_running = || {
        let running = postrider_sqlite::is_running(state_dir);
        running.with_context(|| format!("can't look for a daemon in {}", state_dir.display()))
    };
    ensure!(
        is_running()?,
        "no daemon runs with state.dir {}; a new state.dir takes a restart",
        state_dir.display()
    );
    let id = format!("{:016x}", rand::random::<u64>());
    let question = state_dir.join(format!("{ASKED}{id}"));
    fs::write(&question, "").with_context(|| format!("can't ask for a reload: {}", question.display()))?;
    let until = Instant::now() + wait;
    loop {
        std::thread::sleep(LOOK);
        if let Some(answer) = find(state_dir, &id)? {
            return match answer.refused {
                None => Ok(answer.config),
                Some(why) => {
                    Err(anyhow::Error::msg(why)
                        .context("the new configuration is not used, the old one stays"))
                }
            }
            .exit(Exit::Config);
        }
        let (runs, is_late) = (is_running()?, Instant::now() >= until);
        if runs && !is_late {
            continue;
        }
        // It may have been answered or taken meanwhile.
        let was_taken = fs::remove_file(&question).is_err();
        if !runs {
            bail!("the daemon has ended before it reloaded");
        }
        let state = if was_taken { "it is reloading still" } else { "it has not begun to reload" };
        return Err(anyhow::anyhow!("no answer from the daemon within {wait:?}: {state}; its log has more"))
            .exit(Exit::TryLater);
    }
}

fn find(state_dir: &Path, id: &str) -> anyhow::Result<Option<Answer>> {
    let path = state_dir.join(ANSWERS);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("can't read {}", path.display()))?,
    };
    let answers: Vec<Answer> =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(answers.into_iter().find(|answer| answer.asked == id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_answered_once_by_the_reload_that_begins_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut reloads = Reloads::new(dir.path());
        assert!(reloads.take().is_empty());
        let (used, unused) = (Path::new("/etc/p.toml"), Some("line 3: no such key"));
        for (id, refused) in [("a", None), ("b", unused)] {
            fs::write(dir.path().join(format!("{ASKED}{id}")), "").unwrap();
            let asked = reloads.take();
            assert_eq!(asked, [id]);
            assert!(reloads.take().is_empty(), "it is taken");
            assert_eq!(find(dir.path(), id).unwrap(), None, "it is not answered");
            reloads.answer(asked, used, refused);
        }
        let answer = |asked: &str, refused: Option<&str>| {
            Some(Answer { asked: asked.into(), config: used.into(), refused: refused.map(Into::into) })
        };
        assert_eq!(find(dir.path(), "a").unwrap(), answer("a", None));
        assert_eq!(find(dir.path(), "b").unwrap(), answer("b", unused));
        for number in 0..ANSWERS_MAX {
            reloads.answer(vec![number.to_string()], used, None);
        }
        assert_eq!(find(dir.path(), "b").unwrap(), None, "no more than some are kept");
        fs::create_dir(dir.path().join(format!("{ASKED}c"))).unwrap();
        assert_eq!((reloads.take(), reloads.take()), (vec!["c".to_owned()], vec![]), "asked once");
    }

    #[test]
    fn nobody_is_asked_where_no_daemon_runs() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(dir.path(), Duration::from_secs(9)).unwrap_err().to_string();
        assert!(error.contains("no daemon runs") && error.contains("state.dir"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let daemon = postrider_sqlite::InstanceLock::acquire(dir.path()).unwrap();
        let error = ask(dir.path(), Duration::ZERO).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::TryLater);
        assert!(error.to_string().contains("not begun"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the lock; what was asked is taken back");
        drop(daemon);
    }
}
