//! The one writer: a thread of its own, because SQLite and getaddrinfo must not share tokio's blocking
//! pool, and because a sync takes milliseconds that many callers can share (group commit).

use std::{sync::Arc, thread, time::Duration};

use postrider_actors::{failpoint, ports::StoreError};
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::tx::{Caches, Tx, TxError};

/// Writes that wait for the writer; callers beyond that wait for a place.
const QUEUE_WRITES_MAX: usize = 256;

/// Writes in one transaction.
const GROUP_WRITES_MAX: usize = 128;

/// Payload in one transaction: what SQLite's cache has to hold until the commit.
const GROUP_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Pages in the log before they are moved into the database (8 KiB each).
const CHECKPOINT_PAGES: i64 = 1_000;

/// The same where there is a ledger of rows. Receipts in random order write a page for each of them: a page that is written
/// again before it is moved is moved once.
const WIDE_CHECKPOINT_PAGES: i64 = 4_000;

/// Whether a write may be answered before it is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Answered after the sync: what it says survives a power cut.
    Synced,
    /// Survives the process. Ordered before the next synced write on the disk.
    Process,
}

/// Called with what went wrong when the disk can't be trusted any more. Ends the process in the daemon.
pub type OnFatal = Arc<dyn Fn(&str) + Send + Sync>;

/// Ends the process with exit code 74 (input/output error): recovery from the log is the only way to know
/// what is on the disk. A failed fsync must not be repeated: the kernel has dropped what it failed on.
pub fn exit_on_fatal(last: impl Fn() + Send + Sync + 'static) -> OnFatal {
    Arc::new(move |error| {
        tracing::error!(
            error,
            "the store can't be trusted any more: exiting; a restart recovers from its log"
        );
        last();
        std::process::exit(74);
    })
}

/// A write that waits for its turn and for its commit.
trait WriteJob: Send {
    /// Runs in a transaction. May run again after a rollback.
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), TxError>;
    /// Answers after the commit, or with the reason why it failed.
    fn answer(self: Box<Self>, committed: Result<(), StoreError>);
    /// Payload bytes that it brings.
    fn bytes(&self) -> usize;
    fn durability(&self) -> Durability;
}

struct WriteCall<F, T> {
    run: F,
    done: Option<T>,
    bytes: usize,
    durability: Durability,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, T> WriteJob for WriteCall<F, T>
where
    F: FnMut(&mut Tx<'_>) -> Result<T, TxError> + Send,
    T: Send,
{
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), TxError> {
        self.done = Some((self.run)(tx)?);
        Ok(())
    }

    fn answer(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { run, done, reply, .. } = *self;
        // Dropped before the caller gets its answer: the request holds the name by which a holder counts as living.
        drop(run);
        // A caller that is gone wants no answer.
        let _ = reply.send(committed.map(|()| done.expect("a committed job has run")));
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn durability(&self) -> Durability {
        self.durability
    }
}

/// Hands writes to the writer's thread.
#[derive(Clone)]
pub(crate) struct Writer {
    jobs: mpsc::Sender<Box<dyn WriteJob>>,
}

impl Writer {
    /// Starts the thread. It ends when the last `Writer` is dropped, and checkpoints.
    pub(crate) fn start(
        connection: Connection,
        on_fatal: OnFatal,
    ) -> std::io::Result<(Self, thread::JoinHandle<()>)> {
        let (jobs, queue) = mpsc::channel(QUEUE_WRITES_MAX);
        let thread = thread::Builder::new().name("store-writer".into()).spawn(move || {
            Thread { connection, caches: Caches::default(), synced: true, on_fatal }.work(queue);
        })?;
        Ok((Self { jobs }, thread))
    }

    /// Runs `run` in a transaction and answers after its commit.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        durability: Durability,
        bytes: usize,
        run: impl FnMut(&mut Tx<'_>) -> Result<T, TxError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(WriteCall { run, done: None, bytes, durability, reply });
        self.jobs.send(job).await.map_err(|_| StoreError::Retryable("the store is closed".into()))?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Unknown("the store stopped".into())))
    }
}

struct Thread {
    connection: Connection,
    caches: Caches,
    /// Whether commits are set to sync.
    synced: bool,
    on_fatal: OnFatal,
}

/// The disk failed; the thread is to end.
struct Fatal;

impl Thread {
    fn work(mut self, mut queue: mpsc::Receiver<Box<dyn WriteJob>>) {
        while let Some(first) = queue.blocking_recv() {
            let mut bytes = first.bytes();
            let (mut synced, mut unsynced): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
            let mut next = Some(first);
            while let Some(job) = next {
                match job.durability() {
                    Durability::Synced => synced.push(job),
                    Durability::Process => unsynced.push(job),
                }
                next = (synced.len() + unsynced.len() < GROUP_WRITES_MAX && bytes < GROUP_BYTES_MAX)
                    .then(|| queue.try_recv().ok())
                    .flatten();
                bytes += next.as_ref().map_or(0, |job| job.bytes());
            }
            // Leases first: workers need not wait for a sync that they don't ask for.
            let done = self
                .commit(unsynced, Durability::Process)
                .and_then(|()| self.commit(synced, Durability::Synced))
                .and_then(|()| {
                    let is_wide = self.caches.is_wide;
                    self.checkpoint(if is_wide { WIDE_CHECKPOINT_PAGES } else { CHECKPOINT_PAGES })
                });
            if done.is_err() {
                // Callers that wait get `Unknown`: their replies are dropped.
                return;
            }
        }
        // The last one out leaves an empty log.
        let _ = self.checkpoint(1);
    }

    /// Commits a group. If one job fails, the group is taken apart so that it fails alone.
    fn commit(&mut self, mut jobs: Vec<Box<dyn WriteJob>>, durability: Durability) -> Result<(), Fatal> {
        if jobs.is_empty() {
            return Ok(());
        }
        match self.transact(&mut jobs, durability) {
            Ok(()) => jobs.into_iter().for_each(|job| job.answer(Ok(()))),
            Err(error) if error.is_fatal() => return Err(self.fatal(&error)),
            Err(error) if jobs.len() == 1 => {
                for job in jobs {
                    job.answer(Err(error.to_store_error()));
                }
            }
            Err(_) => {
                for job in jobs {
                    self.commit(vec![job], durability)?;
                }
            }
        }
        Ok(())
    }

    fn transact(&mut self, jobs: &mut [Box<dyn WriteJob>], durability: Durability) -> Result<(), TxError> {
        self.set_synced(durability == Durability::Synced)?;
        let done = self.run(jobs);
        if done.is_err() {
            // What was interned in it is gone with it. Some errors have rolled back already.
            self.caches = Caches::default();
            if !self.connection.is_autocommit() {
                self.connection.execute_batch("ROLLBACK")?;
            }
        }
        done
    }

    fn run(&mut self, jobs: &mut [Box<dyn WriteJob>]) -> Result<(), TxError> {
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let mut tx = Tx::new(&self.connection, &mut self.caches);
        for job in jobs {
            job.run(&mut tx)?;
        }
        tx.flush()?;
        failpoint_before_commit();
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        failpoint_after_commit();
        Ok(())
    }

    fn set_synced(&mut self, synced: bool) -> Result<(), TxError> {
        if self.synced != synced {
            let sql = if synced { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
            self.connection.execute_batch(sql)?;
            self.synced = synced;
        }
        Ok(())
    }

    /// Moves the log into the database once it holds `pages`. Its syncs count like those of commits: a
    /// failed one ends the process, where SQLite's own checkpoints would try again and believe the answer.
    fn checkpoint(&mut self, pages: i64) -> Result<(), Fatal> {
        let checkpoint = |mode: &str| -> Result<i64, TxError> {
            let mut statement = self.connection.prepare_cached(mode)?;
            Ok(statement.query_row([], |row| row.get(1))?)
        };
        let done = checkpoint("PRAGMA wal_checkpoint(NOOP)").and_then(|in_log| {
            if in_log < pages {
                return Ok(0);
            }
            failpoint_checkpoint();
            checkpoint("PRAGMA wal_checkpoint(PASSIVE)")
        });
        match done {
            Ok(_) => Ok(()),
            Err(error) if error.is_fatal() => Err(self.fatal(&error)),
            // A full disk: the log continues, and the next round tries again.
            Err(error) => {
                tracing::warn!(%error, "the store's log could not be moved into the database; retrying");
                thread::sleep(Duration::from_millis(10));
                Ok(())
            }
        }
    }

    fn fatal(&self, error: &TxError) -> Fatal {
        (self.on_fatal)(&error.to_string());
        Fatal
    }
}

fn failpoint_before_commit() {
    failpoint!("store-before-commit");
}

fn failpoint_after_commit() {
    failpoint!("store-after-commit");
}

fn failpoint_checkpoint() {
    failpoint!("store-checkpoint");
}
