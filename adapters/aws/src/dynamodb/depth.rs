//! How many messages of each destination are open, counted by whoever changes that.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    model::{room::OpenMessages, time::MonoMs},
    ports::StoreError,
};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    cache::lock,
    calls::Calls,
    change::Change,
    item::{MESSAGES_OF, number},
    keys::{self, ledger_key},
};

/// Append transactions in flight at once. Each changes a depth counter of its own, or they would refuse each
/// other.
const SLOTS: u32 = 16;

/// How old the depth may be, but for what this process has changed in it: that is counted at once.
const DEPTH_AGE_MAX: Duration = Duration::from_secs(15);

/// By how much the open messages of destinations change.
pub(super) type DepthChange = BTreeMap<Arc<str>, i64>;

/// The counters of this node, and what is known of all nodes'.
pub(super) struct Depth {
    node: String,
    sum: Mutex<DepthSum>,
    slots: Semaphore,
    free_slots: Mutex<Vec<u32>>,
}

#[derive(Default)]
struct DepthSum {
    /// As it was read, with what this process changed since.
    known: Option<(MonoMs, DepthChange)>,
    /// Counts this process's changes.
    changes: u64,
}

/// One of this node's depth counters, ours until dropped.
pub(super) struct DepthSlot<'a> {
    depth: &'a Depth,
    number: u32,
    _permit: SemaphorePermit<'a>,
}

impl DepthSlot<'_> {
    pub(super) fn name(&self) -> String {
        format!("a{}", self.number)
    }
}

impl Drop for DepthSlot<'_> {
    fn drop(&mut self) {
        lock(&self.depth.free_slots).push(self.number);
    }
}

impl Depth {
    pub(super) fn of(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            sum: Mutex::default(),
            slots: Semaphore::new(SLOTS as usize),
            free_slots: Mutex::new((0..SLOTS).collect()),
        }
    }

    pub(super) async fn slot(&self) -> DepthSlot<'_> {
        let permit = self.slots.acquire().await.expect("the semaphore is never closed");
        let number = lock(&self.free_slots).pop().expect("there are as many slots as permits");
        DepthSlot { depth: self, number, _permit: permit }
    }

    /// The action that makes a change.
    pub(super) fn change(
        &self,
        table: &str,
        slot: &str,
        change: &DepthChange,
    ) -> Result<TransactWriteItem, StoreError> {
        let key = ledger_key(keys::DEPTH_PK, &format!("{}#{slot}", self.node));
        let mut item = Change::of(table, key);
        for (destination, messages) in change {
            item = item.add(format!("{MESSAGES_OF}{destination}"), number(*messages));
        }
        item.action()
    }

    /// Takes note that it was changed.
    pub(super) fn changed(&self, change: &DepthChange) {
        let mut sum = lock(&self.sum);
        sum.changes += 1;
        if let Some((_, known)) = &mut sum.known {
            for (destination, messages) in change {
                *known.entry(destination.clone()).or_default() += messages;
            }
        }
    }

    /// Takes note that it may have been changed.
    pub(super) fn unknown(&self) {
        let mut sum = lock(&self.sum);
        sum.changes += 1;
        sum.known = None;
    }

    pub(super) async fn read(&self, calls: &Calls, now: MonoMs) -> Result<OpenMessages, StoreError> {
        let changes = {
            let sum = lock(&self.sum);
            if let Some((at, known)) = &sum.known
                && now.since(*at) < DEPTH_AGE_MAX
            {
                return Ok(open(known));
            }
            sum.changes
        };
        let parts = calls.partition("reading the depth", keys::DEPTH_PK, "").await?;
        let mut total = DepthChange::new();
        for (name, value) in parts.iter().flatten() {
            let Some(destination) = name.strip_prefix(MESSAGES_OF) else { continue };
            let messages = value.as_n().ok().and_then(|number| number.parse::<i64>().ok());
            let damaged = || StoreError::Permanent(format!("a depth counter has a damaged attribute {name}"));
            *total.entry(destination.into()).or_default() += messages.ok_or_else(damaged)?;
        }
        let answer = open(&total);
        let mut sum = lock(&self.sum);
        // Our own changes may be in it or not, if there were any meanwhile: then it is read anew next time.
        sum.known = (sum.changes == changes).then_some((now, total));
        Ok(answer)
    }
}

/// Counters are read one after the other: a sum below 0 is one that was caught between two of them.
fn open(sums: &DepthChange) -> OpenMessages {
    let some = |(destination, &messages): (&Arc<str>, &i64)| {
        let messages = u64::try_from(messages).ok().filter(|messages| *messages > 0)?;
        Some((destination.clone(), messages))
    };
    sums.iter().filter_map(some).collect()
}
