//! Settlements on their way into a transaction: see [`super::settle`].

use std::{collections::BTreeMap, sync::Arc};

use postrider_actors::{
    model::{
        ids::FileId,
        time::{MonoMs, UnixMs},
    },
    ports::{Settled, Settlement, StoreError},
};
use tokio::sync::oneshot;

/// A call of `settle` and where its answer goes.
pub(super) struct SettleCall {
    pub(super) settlements: Vec<Settlement>,
    pub(super) answer: oneshot::Sender<Result<Vec<Settled>, StoreError>>,
}

/// What the lane remembers.
#[derive(Default)]
pub(super) struct SettleLane {
    pub(super) times: LastTimes,
    /// When its last transaction began.
    pub(super) began: Option<MonoMs>,
}

/// Times at which a node's counts last settled a message, so that they only grow.
pub(super) type LastTimes = BTreeMap<(FileId, Arc<str>), UnixMs>;
