//! Where the store is asked: on threads of their own, a few at once, each for a bounded time. Never on a thread of the
//! actors, nor on the one that answers.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError, RwLock},
    thread,
    time::Duration,
};

use actix_web::http::StatusCode;
use postrider_actors::ports::{
    StoreError,
    console::{Operate, View},
};
use tokio::sync::{
    mpsc::{self, Receiver, Sender},
    oneshot,
};

use crate::{
    app::console::{self, RowLedger},
    config::Config,
    ops::problem::Problem,
};

/// Who gives orders, for the audit: nobody else may.
pub(super) const BY: &str = "api (operate)";

/// Questions that are looked into at once …
const CLERKS: usize = 3;
/// … and that wait.
const WAITING_MAX: usize = 32;
/// How long an answer may take, the wait included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// The configuration that is in use.
#[derive(Clone, Debug)]
pub(crate) struct InUse(Arc<RwLock<Arc<Config>>>);

impl InUse {
    /// That is it.
    pub(crate) fn new(config: &Config) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(config.clone()))))
    }

    /// Another one is in use.
    pub(crate) fn replace(&self, config: &Config) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config.clone());
    }

    /// The one that is in use now.
    pub(crate) fn get(&self) -> Arc<Config> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes questions.
#[derive(Clone, Debug)]
pub(crate) struct Desk(Sender<Job>);

/// A question, and where its answer goes.
struct Job(Box<dyn FnOnce(&mut Clerk) + Send>);

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

/// Looks into the store, one question after the other. What is open stays so for the next one.
pub(crate) struct Clerk {
    in_use: InUse,
    config: Arc<Config>,
    view: Option<Box<dyn View>>,
    rows: Option<RowLedger>,
}

impl Desk {
    /// Starts the clerks. They end when the last desk is gone.
    pub(crate) fn open(in_use: &InUse) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..CLERKS {
            let (receiver, in_use) = (Arc::clone(&receiver), in_use.clone());
            let work = move || serve(Clerk::new(&in_use), &receiver);
            thread::Builder::new().name(format!("api {number}")).spawn(work)?;
        }
        Ok(Self(sender))
    }

    /// The answer to a question.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Clerk) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (sender, receiver) = oneshot::channel();
        let job = Job(Box::new(move |clerk| {
            // Who no longer waits needs no answer.
            if !sender.is_closed() {
                let _ = sender.send(question(clerk));
            }
        }));
        self.0.try_send(job).map_err(|_| {
            Problem::later(StatusCode::TOO_MANY_REQUESTS, "too many questions at once; ask again")
        })?;
        match tokio::time::timeout(ANSWER_TIMEOUT, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the question could not be answered; the log has why",
            )),
            Err(_) => Err(Problem::new(
                StatusCode::GATEWAY_TIMEOUT,
                format!("it took longer than {} s; narrow it", ANSWER_TIMEOUT.as_secs()),
            )),
        }
    }
}

fn serve(mut clerk: Clerk, questions: &Mutex<Receiver<Job>>) {
    loop {
        let next = questions.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Job(work)) = next else { return };
        let worked: Result<(), Box<dyn Any + Send>> = catch_unwind(AssertUnwindSafe(|| work(&mut clerk)));
        if worked.is_err() {
            // The panic was logged. What it left half-done is not used again.
            clerk.close();
        }
    }
}

impl Clerk {
    /// Nothing is open.
    pub(crate) fn new(in_use: &InUse) -> Self {
        Self { config: in_use.get(), in_use: in_use.clone(), view: None, rows: None }
    }

    /// The configuration in use.
    pub(crate) fn config(&mut self) -> Arc<Config> {
        let now = self.in_use.get();
        if !Arc::ptr_eq(&now, &self.config) {
            self.config = now;
            self.close();
        }
        Arc::clone(&self.config)
    }

    fn close(&mut self) {
        (self.view, self.rows) = (None, None);
    }

    /// Reads the store. After an error it is opened anew.
    pub(crate) fn read<T>(
        &mut self,
        read: impl FnOnce(&mut dyn View) -> Result<T, StoreError>,
    ) -> Result<T, Problem> {
        self.look(read)?.map_err(|error| unreadable(&error.into()))
    }

    /// Reads on from where a page before has ended. Only the store can say whether a cursor is one of its own.
    pub(crate) fn read_on<T>(
        &mut self,
        cursor: Option<&str>,
        read: impl FnOnce(&mut dyn View) -> Result<T, StoreError>,
    ) -> Result<T, Problem> {
        self.look(read)?.map_err(|error| match error {
            StoreError::Permanent(_) if cursor.is_some() => bad_cursor(),
            error => unreadable(&error.into()),
        })
    }

    fn look<T>(
        &mut self,
        read: impl FnOnce(&mut dyn View) -> Result<T, StoreError>,
    ) -> Result<Result<T, StoreError>, Problem> {
        let config = self.config();
        let view = match &mut self.view {
            Some(view) => view,
            empty => empty.insert(console::view(&config).map_err(|error| unreadable(&error))?),
        };
        let answer = read(&mut **view);
        if answer.is_err() {
            self.view = None;
        }
        Ok(answer)
    }

    /// Reads the ledger of rows; `None` where none is configured.
    pub(crate) fn rows<T>(
        &mut self,
        read: impl FnOnce(&RowLedger) -> Result<T, StoreError>,
    ) -> Result<Option<T>, Problem> {
        let config = self.config();
        if self.rows.is_none() {
            self.rows = console::rows(&config).map_err(|error| unreadable(&error))?;
        }
        let Some(rows) = &self.rows else { return Ok(None) };
        let answer = read(rows);
        if answer.is_err() {
            self.rows = None;
        }
        answer.map(Some).map_err(|error| unreadable(&error.into()))
    }

    /// Changes the store.
    pub(crate) fn operate<T>(
        &mut self,
        change: impl FnOnce(&mut dyn Operate) -> Result<T, StoreError>,
    ) -> Result<T, Problem> {
        let mut operate = console::operate(&self.config()).map_err(|error| unreadable(&error))?;
        change(&mut *operate).map_err(|error| unreadable(&error.into()))
    }
}

/// Some text that no page has ended with.
pub(super) fn bad_cursor() -> Problem {
    Problem::bad("cursor: pass `next` of the page before")
}

fn unreadable(error: &anyhow::Error) -> Problem {
    Problem::later(StatusCode::SERVICE_UNAVAILABLE, format!("the store can't be used now: {error:#}"))
}
