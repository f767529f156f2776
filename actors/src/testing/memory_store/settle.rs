//! `Ledger::settle` and the operator's redrive, in memory.

use std::collections::{BTreeMap, BTreeSet};

use super::{Dead, Phase, State, refused};
use crate::{
    model::{
        batch::{NewBatch, Rows},
        ids::{BatchId, FileId},
        outcome::Verdict,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Settled, Settlement, StoreError},
};

impl State {
    pub(super) fn settle(&mut self, settlement: Settlement) -> Settled {
        let Some(&at) = self.ids.get(&settlement.token.batch) else { return Settled::Stale };
        let current = self.is_current(settlement.token).is_some();
        let (file, destination) = {
            let header = &self.batches[at].batch.header;
            (header.file, header.destination.clone())
        };
        let mut carried_on = BTreeSet::new();
        let mut ends = Vec::new();
        let mut last = None;
        for (index, verdict) in settlement.verdicts {
            let index = index as usize;
            match verdict {
                Verdict::Sent { at, .. } => ends.push((index, MessageState::Sent, None, at)),
                Verdict::Dead { attempt, .. } if current => {
                    ends.push((index, MessageState::Dead, Some(attempt), attempt.at));
                }
                Verdict::Retry { attempt, .. } if current => {
                    let batch = &mut self.batches[at];
                    let ended = ends.iter().any(|&(ended, ..)| ended == index);
                    if !ended && batch.states.merge(index, MessageState::Retrying) == MessageState::Accepted {
                        carried_on.insert(batch.rows.row(index));
                        last = last.max(Some(attempt.at));
                    }
                }
                Verdict::Dead { .. } | Verdict::Retry { .. } => {}
            }
        }
        if current {
            for retry in settlement.retries {
                self.carry_on(retry, &carried_on);
            }
        }
        for (index, state, death, ended_at) in ends {
            let key = (file, destination.clone(), self.batches[at].rows.row(index));
            let message = self.messages.get_mut(&key).expect("every row of a batch is a message");
            let live = &mut self.batches[message.batch];
            if live.states.merge(message.index, state) < state {
                last = last.max(Some(ended_at));
            }
            // A 2xx here too, where the live entry is elsewhere. `dead` can be taken back by a redrive, so
            // it stands at the live entry alone.
            if state == MessageState::Sent {
                self.batches[at].states.merge(index, state);
            }
            let live = &mut self.batches[message.batch];
            message.death = if live.states.get(message.index) == MessageState::Dead {
                message.death.or(death)
            } else {
                None
            };
            if live.states.unsettled().next().is_none() {
                live.phase = Phase::Settled;
            }
        }
        let complete = self.batches[at].states.unsettled().next().is_none();
        if complete {
            self.batches[at].phase = Phase::Settled;
        }
        if let Some(last) = last {
            self.reopen_report(file);
            self.settle_file(file, last);
        }
        match (current, complete) {
            (false, _) => Settled::Stale,
            (true, true) => Settled::Complete,
            (true, false) => Settled::Open,
        }
    }

    /// A report that may be out of date is to be written again.
    pub(super) fn reopen_report(&mut self, file: FileId) {
        if let Some(file) = self.file(file) {
            file.reported = false;
        }
    }

    /// What no store may accept, for it would lose or double a message.
    pub(super) fn check_settlement(
        &self,
        at: usize,
        current: bool,
        settlement: &Settlement,
    ) -> Result<(), StoreError> {
        let batch = &self.batches[at];
        let len = batch.states.0.len();
        if let Some((index, _)) = settlement.verdicts.iter().find(|(index, _)| *index as usize >= len) {
            return refused(format!("index {index} of a batch of {len}"));
        }
        if !current {
            return Ok(());
        }
        let retried =
            settlement.verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Retry { .. }));
        let mut waiting: BTreeSet<u64> = retried.map(|(index, _)| batch.rows.row(*index as usize)).collect();
        for retry in &settlement.retries {
            let follows = retry.header == batch.batch.header
                && retry.root == batch.batch.root
                && (retry.drive, retry.attempt) == (batch.batch.drive, batch.batch.attempt + 1);
            let rows = Rows::decode(retry.payload.clone());
            let rows = rows.map_err(|error| StoreError::Permanent(error.to_string()))?;
            if !follows || rows.len() != retry.count as usize {
                return refused(format!("retry batch {} does not follow from {}", retry.id, batch.batch.id));
            }
            if let Some(row) = (0..rows.len()).map(|index| rows.row(index)).find(|row| !waiting.remove(row)) {
                return refused(format!("row {row} is carried on without a verdict"));
            }
        }
        match waiting.into_iter().find(|row| {
            let index = batch.rows.find(*row).expect("verdicts are about rows of the batch");
            batch.states.get(index) == MessageState::Accepted
        }) {
            Some(row) => refused(format!("row {row} is retried, but no batch carries it on")),
            None => Ok(()),
        }
    }

    /// Stores a retry batch with those of its messages that were open until now.
    pub(super) fn carry_on(&mut self, mut retry: NewBatch, open: &BTreeSet<u64>) {
        let rows = Rows::decode(retry.payload.clone()).expect("check_settlement has read it");
        let live: Vec<_> = (0..rows.len()).filter(|&index| open.contains(&rows.row(index))).collect();
        let Some(&first) = live.first() else { return };
        if live.len() < rows.len() {
            let header = &retry.header;
            retry.first_row = rows.row(first);
            retry.id = BatchId::derive(
                header.file,
                &header.destination,
                retry.first_row,
                retry.drive,
                retry.attempt,
            );
            retry.count = live.len() as u32;
            retry.history = live.iter().filter_map(|&index| retry.history.get(index).cloned()).collect();
            retry.payload = rows.select(live).finish();
        }
        self.insert(retry);
    }

    pub(super) fn redrive(&mut self, now: UnixMs) -> usize {
        let mut groups: BTreeMap<(BatchId, String), Vec<Dead>> = BTreeMap::new();
        for ((_, destination, row), message) in &self.messages {
            if let Some(death) = message.death {
                let root = self.batches[message.batch].batch.root;
                let group = groups.entry((root, destination.clone())).or_default();
                group.push((*row, message.batch, message.index, death));
            }
        }
        let count = groups.values().map(Vec::len).sum();
        for ((root, destination), group) in groups {
            let origin = &self.batches[self.ids[&root]];
            let header = origin.batch.header.clone();
            let indexes =
                group.iter().map(|(row, ..)| origin.rows.find(*row).expect("the root has every row"));
            let payload = origin.rows.select(indexes).finish();
            let mut history = Vec::new();
            let mut drive = 0;
            for &(_, batch, index, death) in &group {
                let batch = &mut self.batches[batch];
                let mut attempts = batch.batch.history.get(index).cloned().unwrap_or_default();
                attempts.push(death);
                history.push(attempts);
                drive = drive.max(batch.batch.drive + 1);
                batch.states.0[index] = MessageState::Retrying as u8;
            }
            let first_row = group[0].0;
            self.insert(NewBatch {
                id: BatchId::derive(header.file, &destination, first_row, drive, 0),
                root,
                first_row,
                count: group.len() as u32,
                drive,
                attempt: 0,
                accepted_at: now,
                not_before: now,
                payload,
                history,
                header: header.clone(),
            });
            self.reopen_report(header.file);
            self.settle_file(header.file, now);
        }
        count
    }
}
