//! What waits of one destination in one lane, by file.

use std::collections::{HashMap, VecDeque};

use super::batch::Batch;
use crate::model::{
    fairness::FileTurns,
    ids::{BatchId, FileId},
};

/// Batches with something to send, by file.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) turns: FileTurns<FileId>,
    pub(super) files: HashMap<FileId, VecDeque<BatchId>>,
}

impl Lane {
    pub(super) fn push(&mut self, batch: &Batch, ahead: bool) {
        let queue = self.files.entry(batch.file).or_default();
        if ahead {
            queue.push_front(batch.token.batch);
        } else {
            queue.push_back(batch.token.batch);
        }
        self.turns.arrive(batch.file, batch.priority);
    }

    /// Takes out a batch, wherever it stands.
    pub(super) fn remove(&mut self, file: FileId, batch: BatchId) {
        let Some(queue) = self.files.get_mut(&file) else { return };
        queue.retain(|&id| id != batch);
        if queue.is_empty() {
            self.files.remove(&file);
            self.turns.leave(file);
        }
    }

    /// The batch at `at` of the file whose turn is after `skipped` others.
    pub(super) fn nth(&self, skipped: usize, at: usize) -> Option<(FileId, Option<BatchId>)> {
        let file = self.turns.order().nth(skipped)?;
        Some((file, self.files.get(&file).and_then(|queue| queue.get(at)).copied()))
    }
}
