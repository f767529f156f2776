//! The life of one child, and how its exit is detected.

use std::{
    any::Any,
    fmt,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
};

use actix::prelude::*;
use futures_util::FutureExt as _;
use tokio::sync::oneshot;

use crate::flow::Meter;

/// Which child, and which life of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChildId {
    /// The supervisor's path and the child's name, e.g. `root/feeds/alerts/parser`.
    pub path: Arc<str>,
    /// Which of the children of that name, from 0.
    pub slot: usize,
    /// Which life, from 1.
    pub generation: u64,
}

impl ChildId {
    /// The first life of the only child of this name.
    pub fn first(path: &str) -> Self {
        Self { path: path.into(), slot: 0, generation: 1 }
    }

    /// The life before this one, if there was one.
    pub fn predecessor(&self) -> Option<Self> {
        (self.generation > 1).then(|| Self { generation: self.generation - 1, ..self.clone() })
    }
}

impl fmt::Display for ChildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]#{}", self.path, self.slot, self.generation)
    }
}

/// How a child's life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It stopped by itself, or when it was asked to drain.
    Normal,
    /// It stopped because of an error.
    Failed(String),
    /// It stopped because a sibling is gone that it works with: the sibling's exit says why.
    Orphaned(String),
    /// It panicked, in a handler, a spawned future, `started` or its factory.
    Panicked(String),
    /// Its supervisor ended it.
    Killed,
    /// Its thread is gone.
    Lost,
}

impl Exit {
    /// The word for it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Normal => "stopped",
            Self::Failed(_) => "failed",
            Self::Orphaned(_) => "orphaned",
            Self::Panicked(_) => "panicked",
            Self::Killed => "killed",
            Self::Lost => "lost",
        }
    }

    /// Why, in a sentence.
    pub fn why(&self) -> &str {
        match self {
            Self::Failed(why) | Self::Orphaned(why) | Self::Panicked(why) => why,
            Self::Normal => "it stopped",
            Self::Killed => "it was ended",
            Self::Lost => "its thread is gone",
        }
    }
}

/// A child's exit, reported to its supervisor.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct ChildExited {
    /// Whose.
    pub id: ChildId,
    /// How.
    pub exit: Exit,
}

/// Finish what is in flight, accept nothing new, then stop.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Drain;

/// How an actor ends itself with an error.
#[derive(Clone, Debug, Default)]
pub struct Fault(Arc<Mutex<Option<Exit>>>);

impl Fault {
    /// Stops the actor; its supervisor sees [`Exit::Failed`].
    pub fn fail<A: Actor<Context = Context<A>>>(&self, context: &mut Context<A>, why: impl fmt::Display) {
        self.end(context, Exit::Failed(why.to_string()));
    }

    /// Stops the actor as `exit` says.
    pub fn end<A: Actor<Context = Context<A>>>(&self, context: &mut Context<A>, exit: Exit) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
        context.stop();
    }

    fn take(&self) -> Option<Exit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Reports a child's exit to the supervisor: from the monitor task, or when dropped with that task because the
/// arbiter itself is lost.
struct ExitGuard(Option<(Recipient<ChildExited>, ChildId)>);

impl ExitGuard {
    #[expect(
        clippy::disallowed_methods,
        reason = "one message per life; it must not be lost to a full mailbox"
    )]
    fn report(&mut self, exit: Exit) {
        if let Some((supervisor, id)) = self.0.take() {
            supervisor.do_send(ChildExited { id, exit });
        }
    }
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        self.report(Exit::Lost);
    }
}

/// An actor that a tree is made of: it is built from its setup, and drained before it ends.
pub trait Stage: Actor<Context = Context<Self>> + Handler<Drain> {
    /// Its name within its supervisor.
    const NAME: &'static str;

    /// Messages that its mailbox has room for. Most stages are sent control messages alone.
    const MAILBOX: usize = 4;

    /// Everything it is given.
    type Setup: Send + 'static;

    /// One life of it, which `id` names; `fault` ends it with an error.
    fn new(setup: Self::Setup, id: &ChildId, fault: Fault) -> Self;
}

/// Everything a factory needs to bring a child to life.
pub struct Birth {
    /// Who it is going to be.
    pub id: ChildId,
    /// How it can end itself with an error.
    pub fault: Fault,
    /// What waits for it, and how busy it is.
    pub meter: Meter,
    pub(super) arbiter: ArbiterHandle,
    pub(super) supervisor: Recipient<ChildExited>,
    pub(super) kill: oneshot::Receiver<()>,
}

impl Birth {
    /// Starts the actor that `make` builds, on the child's arbiter, with room for `mailbox` messages.
    pub fn start<A, F>(self, mailbox: usize, make: F) -> Addr<A>
    where
        A: Actor<Context = Context<A>>,
        F: FnOnce(&mut Context<A>) -> A + Send + 'static,
    {
        let Self { id, fault, meter, arbiter, supervisor, kill } = self;
        let (sender, receiver) = actix::dev::channel::channel::<A>(mailbox);
        // Built here, not in the task: it also reports an arbiter that is already dead.
        let mut guard = ExitGuard(Some((supervisor, id)));
        arbiter.spawn_fn(move || {
            actix_rt::spawn(async move {
                let mut life = actix_rt::spawn(async move {
                    let mut context = Context::with_receiver(receiver);
                    let actor = make(&mut context);
                    // Caught here and not only by tokio, so that the actor is dropped (and its
                    // `stopped` runs) outside of unwinding: a second panic there would abort the process.
                    meter.measure(AssertUnwindSafe(context.into_future(actor)).catch_unwind()).await
                });
                let (end, otherwise) = tokio::select! {
                    end = &mut life => (end, Exit::Lost),
                    // Also when the supervisor is gone with its end of the channel.
                    _ = kill => {
                        life.abort();
                        (life.await, Exit::Killed) // unless it has just ended by itself
                    }
                };
                let exit = match end {
                    Ok(Ok(())) => fault.take().unwrap_or(Exit::Normal),
                    Ok(Err(panic)) => Exit::Panicked(panic_text(&*panic)),
                    Err(error) if error.is_panic() => Exit::Panicked(panic_text(&*error.into_panic())),
                    Err(_) => otherwise,
                };
                guard.report(exit);
            });
        });
        Addr::new(sender)
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}
