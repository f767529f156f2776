//! What every ledger of rows must do, the fake too.

mod histories;
mod inbox;
mod joins;
mod rejects;
mod rows;
mod sweeps;

use std::{any::Any, future::Future, sync::Arc};

pub use histories::receipt_history;

use super::NOW;
use crate::{
    model::{
        ids::{FileId, MessageId},
        outcome::Reason,
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey, ReceiptReject, RejectedText},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, ReceiptLedger, ReceiptRejects, SourceCursor, Taken},
    testing::{LedgerRow, LedgerTally, MemoryReceipts, RowReader},
};

/// An empty ledger of rows under test, which keeps the changes of states.
pub struct ReceiptSubject {
    /// It.
    pub ledger: Arc<dyn ReceiptLedger>,
    /// Its rejects, as a command has them: from outside, beside the daemon.
    pub rejects: Arc<dyn ReceiptRejects>,
    /// How the suite looks into it.
    pub rows: Arc<dyn RowReader>,
    /// What must live as long: a directory, a server.
    pub guard: Box<dyn Any>,
}

/// The contract of the ledger of rows. Each case gets an empty one.
pub async fn receipts<F: Future<Output = ReceiptSubject>>(make: impl Fn() -> F) {
    rows::a_record_is_read_back_whole(make().await).await;
    rows::records_merge_by_rank_whatever_their_order(make().await).await;
    rows::a_message_twice_in_one_call_is_one_row(make().await).await;
    rows::two_destinations_of_a_message_are_two_rows(make().await).await;
    rows::records_come_in_any_number(make().await).await;
    inbox::a_receipt_is_taken_once_by_its_source_and_event(make().await).await;
    inbox::f51_another_receipt_under_a_known_id_is_taken_and_counted(make().await).await;
    inbox::the_cursor_moves_with_what_is_taken(make().await).await;
    inbox::it_is_noted_when_receipts_came_and_when_the_cursor_moved(make().await).await;
    inbox::an_application_is_bounded_by_receipts_and_bytes(make().await).await;
    inbox::f52_texts_at_their_bounds_are_stored_whole(make().await).await;
    inbox::f53_65536_receipts_at_once(make().await).await;
    rejects::rejects_are_kept_once(make().await).await;
    rejects::rejects_are_read_back_whole_page_by_page(make().await).await;
    rejects::what_can_be_read_now_is_taken_once_and_rejected_no_more(make().await).await;
    rejects::what_was_taken_meanwhile_is_known_when_its_reject_is_read(make().await).await;
    joins::both_keys_of_a_message_name_one_row(make().await).await;
    joins::an_interim_receipt_changes_nothing_but_the_facts(make().await).await;
    joins::s0_4_a_conflict_is_counted_once(make().await).await;
    joins::s0_6_a_receipt_waits_for_its_message(make().await).await;
    joins::a_provider_s_id_that_comes_late_joins_what_waits_for_it(make().await).await;
    joins::provider_ids_are_per_destination(make().await).await;
    joins::a_provider_s_id_that_is_used_again_is_the_latest_message_s(make().await).await;
    for seed in 0..6 {
        joins::f51_order_and_repetition_do_not_matter(make().await, seed).await;
    }
    joins::f50_concurrent_appliers_apply_each_receipt_once(make().await).await;
    joins::s0_6_whichever_comes_second_finds_the_other(make().await).await;
    sweeps::an_orphan_joins_when_its_message_comes(make().await).await;
    sweeps::s0_5_what_has_no_receipt_in_time_expires_and_a_late_one_undoes_it(make().await).await;
    sweeps::changes_are_kept_in_order_until_they_are_forgotten(make().await).await;
    sweeps::retention_goes_by_age_in_bounded_steps(make().await).await;
}

impl ReceiptSubject {
    /// The fake.
    pub fn in_memory() -> Self {
        let ledger = Arc::new(MemoryReceipts::keeping_changes());
        Self { ledger: ledger.clone(), rejects: ledger.clone(), rows: ledger, guard: Box::new(()) }
    }

    async fn record(&self, records: &[MessageRecord]) {
        self.ledger.record(records.to_vec()).await.unwrap();
    }

    async fn take(&self, receipts: &[Receipt]) -> Taken {
        self.ledger.take(arrival(receipts)).await.unwrap()
    }

    /// Applies until nothing waits; the sum of all results.
    async fn drain(&self) -> Applied {
        self.drain_by(1_000, NOW).await
    }

    async fn drain_by(&self, receipts: usize, at: UnixMs) -> Applied {
        let mut sum = Applied::default();
        loop {
            let applied = self.ledger.apply(receipts, usize::MAX, at).await.unwrap();
            sum += applied;
            if self.waiting().await == 0 {
                return sum;
            }
            assert!(applied.total() > 0, "one worker alone skips nothing");
        }
    }

    async fn waiting(&self) -> u64 {
        self.ledger.waiting().await.unwrap()
    }

    async fn row(&self, row: u64) -> LedgerRow {
        self.row_at(row, "d").await
    }

    async fn row_at(&self, row: u64, destination: &str) -> LedgerRow {
        self.rows.row(id(row), destination).await.expect("the message has a row")
    }

    async fn state(&self, row: u64) -> MessageState {
        self.row(row).await.state
    }

    async fn tally(&self) -> LedgerTally {
        self.rows.tally().await
    }
}

fn id(row: u64) -> MessageId {
    MessageId { file: FileId([7; 16]), row }
}

/// The record of row `row` at `d` after `attempts`.
fn record(row: u64, state: MessageState, attempts: u32) -> MessageRecord {
    let failed = state != MessageState::Sent;
    MessageRecord {
        id: id(row),
        destination: "d".into(),
        feed: "feed".into(),
        recipient: format!("user-{row}").into(),
        state,
        attempts,
        status: if failed { 503 } else { 200 },
        reason: failed.then_some(Reason::Status),
        detail: None,
        provider_id: None,
        accepted_at: NOW,
        at: UnixMs(NOW.0 + u64::from(attempts)),
    }
}

fn sent(row: u64) -> MessageRecord {
    record(row, MessageState::Sent, 1)
}

/// A sent message that the destination gave an id.
fn named(row: u64, provider_id: &str) -> MessageRecord {
    MessageRecord { provider_id: Some(provider_id.into()), ..sent(row) }
}

fn event(number: u64) -> EventId {
    EventId::named("s", &number.to_string())
}

/// A receipt by our id. `event` decides between receipts of the same state.
fn receipt(row: u64, number: u64, state: MessageState) -> Receipt {
    Receipt {
        event: event(number),
        key: ReceiptKey::Message(id(row)),
        state,
        at: Some(UnixMs(NOW.0 + number)),
        facts: ReceiptFacts::default(),
    }
}

fn delivered(row: u64, number: u64) -> Receipt {
    receipt(row, number, MessageState::Delivered)
}

fn failed(row: u64, number: u64) -> Receipt {
    receipt(row, number, MessageState::Failed)
}

/// The same receipt by the provider's id.
fn by(provider_id: &str, receipt: Receipt) -> Receipt {
    Receipt { key: ReceiptKey::Provider(provider_id.into()), ..receipt }
}

fn reject(number: u64) -> ReceiptReject {
    ReceiptReject {
        event: event(number),
        at: None,
        place: format!("receipts.ndjson:{number}"),
        reason: "status \"wat\" is mapped to no state".to_owned(),
        text: RejectedText::of_receipt(format!("{{\"number\":{number},\"status\":\"wat\"}}").as_bytes()),
    }
}

/// What source `s` brings for `d`.
fn arrival(receipts: &[Receipt]) -> Arrival {
    Arrival {
        source: "s".into(),
        destination: "d".into(),
        receipts: receipts.to_vec(),
        rejects: Vec::new(),
        cursor: None,
        at: NOW,
    }
}

fn cursor(text: &str) -> SourceCursor {
    SourceCursor(text.to_owned())
}

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
