//! Reads on a connection and a thread of their own: they see the last commit and wait for none.

use std::thread;

use postrider_actors::ports::StoreError;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::tx::{Caches, TxError};

/// Reads that wait for the reader; callers beyond that wait for a place.
const QUEUE_READS_MAX: usize = 64;

type ReadJob = Box<dyn FnOnce(&Connection, &mut Caches) + Send>;

/// Hands reads to the reader's thread.
#[derive(Clone)]
pub(crate) struct Reader {
    jobs: mpsc::Sender<ReadJob>,
}

impl Reader {
    /// Starts the thread. It ends when the last `Reader` is dropped.
    pub(crate) fn start(connection: Connection) -> std::io::Result<(Self, thread::JoinHandle<()>)> {
        let (jobs, mut queue) = mpsc::channel::<ReadJob>(QUEUE_READS_MAX);
        let thread = thread::Builder::new().name("store-reader".into()).spawn(move || {
            let mut caches = Caches::default();
            while let Some(job) = queue.blocking_recv() {
                job(&connection, &mut caches);
            }
        })?;
        Ok((Self { jobs }, thread))
    }

    /// Answers with what `read` finds.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection, &mut Caches) -> Result<T, TxError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: ReadJob = Box::new(move |connection, caches| {
            let found = read(connection, caches).map_err(|error| error.to_store_error());
            let _ = reply.send(found);
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Retryable("the store is closed".into()))?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Unknown("the store stopped".into())))
    }
}
