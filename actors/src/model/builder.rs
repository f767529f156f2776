//! Cuts a file's rows into batches by count and bytes. Linger is the batcher's clock.

use std::sync::Arc;

use bytes::Bytes;
use postrider_settings::Batch;

use super::{
    batch::{BatchHeader, NewBatch, PayloadWriter},
    formats::ParsedRow,
    ids::BatchId,
    time::UnixMs,
};

/// Bytes of payload per batch. Every leased batch is held whole, so it bounds memory; statements of a warehouse and
/// entries of SQS hold several batches, so larger ones gain little.
const BATCH_BYTES: usize = 64 << 10;

/// Bytes of payload per batch of a feed with rows of up to `max_row` bytes: a row always fits into one.
pub fn batch_bytes(max_row: usize) -> usize {
    BATCH_BYTES.max(max_row)
}

/// The limits of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// At most so many messages; at least 1. 1 is the rollback to single sends (S2.10).
    pub max_messages: u32,
    /// At most so many payload bytes, unless a single row is longer.
    pub max_bytes: usize,
}

impl BatchLimits {
    /// Of a feed with rows of up to `max_row` bytes.
    pub fn new(batch: &Batch, max_row: usize) -> Self {
        Self { max_messages: batch.max_messages, max_bytes: batch_bytes(max_row) }
    }
}

/// A full batch of rows.
#[derive(Clone, PartialEq, Eq)]
pub struct Cut {
    /// The encoded rows.
    pub payload: Bytes,
    /// How many.
    pub count: u32,
    /// The first row's number.
    pub first_row: u64,
    /// The last row's number.
    pub last_row: u64,
    /// The byte after the last row in the file's stream.
    pub offset: u64,
}

impl Cut {
    /// These rows as a batch for the destination of `header`.
    pub fn batch(&self, header: Arc<BatchHeader>, accepted_at: UnixMs) -> NewBatch {
        NewBatch {
            id: BatchId::derive(header.file, &header.destination, self.first_row),
            header,
            first_row: self.first_row,
            count: self.count,
            accepted_at,
            not_before: accepted_at,
            payload: self.payload.clone(),
        }
    }
}

/// Collects rows until a batch is full.
#[derive(Debug)]
pub struct BatchBuilder {
    limits: BatchLimits,
    writer: PayloadWriter,
    first_row: u64,
    last_row: u64,
    offset: u64,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new(limits: BatchLimits) -> Self {
        Self { limits, writer: PayloadWriter::default(), first_row: 0, last_row: 0, offset: 0 }
    }

    /// Adds a row and returns the batch that it filled, or that had no room for it.
    pub fn push(&mut self, row: ParsedRow, bytes: &[u8]) -> Option<Cut> {
        let overflowing = if !self.writer.is_empty()
            && self.writer.len() + bytes.len() + MAX_ROW_OVERHEAD_BYTES > self.limits.max_bytes
        {
            self.cut()
        } else {
            None
        };
        if self.writer.is_empty() {
            self.first_row = row.row;
        }
        self.writer.push(row.row, bytes);
        self.last_row = row.row;
        self.offset = row.offset;
        // A batch of one message never overflows: both cuts can't fall on the same row.
        if overflowing.is_none() && self.writer.count() >= self.limits.max_messages {
            return self.cut();
        }
        overflowing
    }

    /// Takes what there is, if there is anything.
    pub fn cut(&mut self) -> Option<Cut> {
        if self.writer.is_empty() {
            return None;
        }
        let fresh = PayloadWriter::with_capacity(self.writer.len().min(self.limits.max_bytes));
        let full = std::mem::replace(&mut self.writer, fresh);
        Some(Cut {
            count: full.count(),
            payload: full.finish(),
            first_row: self.first_row,
            last_row: self.last_row,
            offset: self.offset,
        })
    }

    /// Whether no row waits.
    pub fn is_empty(&self) -> bool {
        self.writer.is_empty()
    }
}

/// Two varints before each row: 10 bytes at most each.
const MAX_ROW_OVERHEAD_BYTES: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::batch::Rows;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_is_in_exactly_one_batch_and_no_limit_is_broken(
            lens in prop::collection::vec(0usize..200, 0..200), max_messages in 1u32..20, max_bytes in 1usize..1000,
        ) {
            let mut builder = BatchBuilder::new(BatchLimits { max_messages, max_bytes });
            let mut cuts = Vec::new();
            for (index, len) in lens.iter().enumerate() {
                let row = ParsedRow { row: index as u64 * 3 + 1, end: 0, offset: index as u64 * 1000 };
                cuts.extend(builder.push(row, &vec![7; *len]));
                prop_assert!(builder.writer.count() <= max_messages);
            }
            cuts.extend(builder.cut());
            prop_assert!(builder.is_empty());
            let mut next = 0;
            for cut in cuts {
                let rows = Rows::decode(cut.payload.clone()).unwrap();
                prop_assert_eq!(rows.len(), cut.count as usize);
                prop_assert!(cut.count <= max_messages);
                prop_assert!(cut.payload.len() <= max_bytes || cut.count == 1);
                prop_assert_eq!(rows.row(0), cut.first_row);
                for index in 0..rows.len() {
                    prop_assert_eq!(rows.row(index), next as u64 * 3 + 1);
                    prop_assert_eq!(rows.bytes(index).len(), lens[next]);
                    next += 1;
                }
                prop_assert_eq!(cut.last_row, (next as u64 - 1) * 3 + 1);
                prop_assert_eq!(cut.offset, (next as u64 - 1) * 1000);
            }
            prop_assert_eq!(next, lens.len());
        }
    }
}
