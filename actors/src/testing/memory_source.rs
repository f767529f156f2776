//! A source of receipts in memory that fails and repeats itself as a real one may.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::{
    model::{
        receipt::{Receipt, ReceiptReject},
        time::UnixMs,
    },
    ports::{AckId, Polled, ReceiptSource, SourceCursor, StoreError},
};

/// A log of receipts. Its cursor is how many of them were read.
pub struct MemorySource {
    page: usize,
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Default)]
struct State {
    log: Vec<Result<Receipt, ReceiptReject>>,
    /// How many of the next polls fail …
    failing: u32,
    /// … and how many of the next acknowledgements.
    failing_acks: u32,
    /// How many receipts the next page has besides, whose status is of no interest.
    ignored: u64,
    /// The cursor of every poll.
    polls: Vec<Option<usize>>,
    /// What was acknowledged: places in the log.
    acknowledged: Vec<usize>,
}

impl MemorySource {
    /// An empty log that is read in pages of so many.
    pub fn new(page: usize) -> Self {
        Self { page: page.max(1), state: Mutex::default(), arrived: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no operation panics half-way")
    }

    /// Appends what will be read.
    pub fn put(&self, items: impl IntoIterator<Item = Result<Receipt, ReceiptReject>>) {
        self.state().log.extend(items);
        self.arrived.notify_waiters();
    }

    /// Makes the next `polls` polls fail.
    pub fn fail(&self, polls: u32) {
        self.state().failing = polls;
    }

    /// Makes the next `acks` acknowledgements fail.
    pub fn fail_acks(&self, acks: u32) {
        self.state().failing_acks = acks;
    }

    /// Adds receipts to the next page whose status is of no interest.
    pub fn ignore(&self, receipts: u64) {
        self.state().ignored = receipts;
    }

    /// The cursor of every poll so far.
    pub fn polls(&self) -> Vec<Option<usize>> {
        self.state().polls.clone()
    }

    /// Up to where in the log everything is acknowledged, in the order of the acknowledgements.
    pub fn acknowledged(&self) -> Vec<usize> {
        self.state().acknowledged.clone()
    }

    fn page(&self, from: usize) -> Option<Polled> {
        let mut state = self.state();
        let State { log, ignored, .. } = &mut *state;
        let page = log.get(from..)?;
        let page = &page[..page.len().min(self.page)];
        if page.is_empty() {
            return None;
        }
        let end = from + page.len();
        let mut polled = Polled {
            ignored: std::mem::take(ignored),
            cursor: Some(SourceCursor(end.to_string())),
            acks: vec![AckId(end.to_string().into())],
            ..Polled::default()
        };
        for item in page {
            match item.clone() {
                Ok(receipt) => polled.receipts.push(receipt),
                Err(reject) => polled.rejects.push(reject),
            }
        }
        Some(polled)
    }
}

#[async_trait]
impl ReceiptSource for MemorySource {
    async fn poll(&self, cursor: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError> {
        let from = cursor.map(|cursor| cursor.0.parse().expect("it is a cursor of ours"));
        {
            let mut state = self.state();
            state.polls.push(from);
            if state.failing > 0 {
                state.failing -= 1;
                return Err(StoreError::Retryable("the source is away".into()));
            }
        }
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let arrived = self.arrived.notified();
            if let Some(polled) = self.page(from.unwrap_or(0)) {
                return Ok(polled);
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Ok(Polled::default());
            }
        }
    }

    /// A second for each receipt that is not read yet.
    fn behind(&self, cursor: Option<&SourceCursor>, _: UnixMs) -> Option<Duration> {
        let read: usize = cursor?.0.parse().expect("it is a cursor of ours");
        Some(Duration::from_secs((self.state().log.len() - read) as u64))
    }

    async fn acknowledge(&self, acks: &[AckId]) -> Result<(), StoreError> {
        let mut state = self.state();
        if state.failing_acks > 0 {
            state.failing_acks -= 1;
            return Err(StoreError::Unknown("no answer".into()));
        }
        let places = acks.iter().map(|ack| ack.0.parse::<usize>().expect("it is an ack id of ours"));
        state.acknowledged.extend(places);
        Ok(())
    }
}
