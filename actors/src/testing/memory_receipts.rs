use std::{
    collections::{BTreeMap, HashMap, VecDeque, btree_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;

use super::ledger_row::{LedgerReceipt, LedgerRow, LedgerSource, LedgerTally, RowReader};
use crate::{
    model::{
        ids::MessageId,
        receipt::{
            EventId, PROVIDER_ID_BYTES_MAX, REJECTED_BYTES_MAX, RESPONSE_BYTES_MAX, Receipt, ReceiptKey,
            ReceiptReject, ReceiptStanding, ReportedStates, WORD_BYTES_MAX,
        },
        record::{MessageRecord, record_rank},
        state::MessageState,
        time::UnixMs,
    },
    ports::{
        Applied, Arrival, ReceiptLedger, ReceiptRejects, Reread, SourceCursor, StatusChange, StoreError,
        Taken,
    },
};

/// A ledger of rows in memory. It refuses what a database would refuse (a NUL, a text beyond its bound), can
/// be out of order, and can lose answers.
#[derive(Default)]
pub struct MemoryReceipts {
    state: Mutex<State>,
    keep_changes: bool,
    down: AtomicBool,
    counts_hang: AtomicBool,
    answers_to_lose: AtomicU32,
    writes: AtomicU64,
}

/// Receipts by destination and what they name, with when they were parked.
type Parked = BTreeMap<(Arc<str>, ReceiptKey), Vec<(UnixMs, Receipt)>>;

#[derive(Default)]
struct State {
    rows: BTreeMap<RowKey, LedgerEntry>,
    by_provider: BTreeMap<(Arc<str>, Box<str>), Vec<MessageId>>,
    inbox: VecDeque<WaitingReceipt>,
    events: BTreeMap<(Arc<str>, EventId), UnixMs>,
    parked: Parked,
    orphans: Vec<(UnixMs, WaitingReceipt)>,
    rejects: BTreeMap<(Arc<str>, EventId), (UnixMs, ReceiptReject)>,
    sources: HashMap<Arc<str>, Source>,
    changes: BTreeMap<u64, StatusChange>,
    last_change: u64,
}

#[derive(Default)]
struct Source {
    cursor: Option<SourceCursor>,
    times: LedgerSource,
}

type RowKey = (MessageId, Arc<str>);

/// A receipt and the destination that it is about.
struct WaitingReceipt {
    destination: Arc<str>,
    receipt: Receipt,
}

struct LedgerEntry {
    /// The greatest of what delivery said, with the least provider's id.
    record: MessageRecord,
    expired: bool,
    reported: ReportedStates,
    best: Option<Receipt>,
}

impl LedgerEntry {
    fn state(&self) -> MessageState {
        let expired = if self.expired { MessageState::Expired } else { MessageState::Accepted };
        // I2: an interim receipt makes no message sent.
        let receipt =
            self.best.as_ref().map(|best| best.state).filter(|&state| state > MessageState::Expired);
        self.record.state.merge(expired).merge(receipt.unwrap_or(MessageState::Accepted))
    }

    fn record(&mut self, record: &MessageRecord) {
        let least = match (self.record.provider_id.take(), record.provider_id.clone()) {
            (Some(known), Some(new)) => Some(known.min(new)),
            (known, new) => known.or(new),
        };
        if record_rank(record) > record_rank(&self.record) {
            self.record = record.clone();
        }
        self.record.provider_id = least;
    }

    fn standing(&self) -> ReceiptStanding {
        ReceiptStanding::new(self.state(), self.reported, self.best.as_ref().map(Receipt::rank))
    }
}

impl State {
    fn parked(&self) -> u64 {
        self.parked.values().map(|parked| parked.len() as u64).sum()
    }

    /// The message that a receipt at `destination` is about. Of several that the provider gave the same id, the
    /// latest: it means the newer one, and a receipt costs one row.
    fn resolve(&self, destination: &Arc<str>, key: &ReceiptKey) -> Option<MessageId> {
        match key {
            ReceiptKey::Message(id) => self.rows.contains_key(&(*id, destination.clone())).then_some(*id),
            ReceiptKey::Provider(id) => {
                let ids = self.by_provider.get(&(destination.clone(), id.clone()))?;
                let accepted_at = |id| self.rows[&(id, destination.clone())].record.accepted_at;
                ids.iter().copied().max_by_key(|&id| (accepted_at(id), id))
            }
        }
    }

    fn record(&mut self, record: &MessageRecord) {
        let key = (record.id, record.destination.clone());
        let (before, after) = match self.rows.entry(key) {
            Entry::Vacant(free) => {
                free.insert(LedgerEntry {
                    record: record.clone(),
                    expired: false,
                    reported: ReportedStates(0),
                    best: None,
                });
                (None, record.provider_id.clone())
            }
            Entry::Occupied(mut known) => {
                let before = known.get().record.provider_id.clone();
                known.get_mut().record(record);
                (before, known.get().record.provider_id.clone())
            }
        };
        if before != after {
            self.unname(&record.destination, before, record.id);
            if let Some(id) = after.clone() {
                self.by_provider.entry((record.destination.clone(), id)).or_default().push(record.id);
            }
        }
        let keys = [Some(ReceiptKey::Message(record.id)), after.map(ReceiptKey::Provider)];
        for key in keys.into_iter().flatten() {
            self.unorphan(&record.destination, &key);
            self.unpark(&record.destination, key, usize::MAX);
        }
    }

    /// Forgets that `provider_id` is `message`'s.
    fn unname(&mut self, destination: &Arc<str>, provider_id: Option<Box<str>>, message: MessageId) {
        let Some(id) = provider_id else { return };
        if let Entry::Occupied(mut ids) = self.by_provider.entry((destination.clone(), id)) {
            ids.get_mut().retain(|id| *id != message);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
    }

    /// Puts the orphans of `key` back into the inbox.
    fn unorphan(&mut self, destination: &Arc<str>, key: &ReceiptKey) {
        let is_of =
            |waiting: &WaitingReceipt| waiting.destination == *destination && waiting.receipt.key == *key;
        let found = self.orphans.extract_if(.., |(_, waiting)| is_of(waiting));
        self.inbox.extend(found.map(|(_, waiting)| waiting));
    }

    /// Puts up to `limit` receipts that are parked under `key` back into the inbox; how many.
    fn unpark(&mut self, destination: &Arc<str>, key: ReceiptKey, limit: usize) -> usize {
        let Entry::Occupied(mut parked) = self.parked.entry((destination.clone(), key)) else { return 0 };
        let count = parked.get().len().min(limit);
        for (_, receipt) in parked.get_mut().drain(..count) {
            self.inbox.push_back(WaitingReceipt { destination: destination.clone(), receipt });
        }
        if parked.get().is_empty() {
            parked.remove();
        }
        count
    }

    /// Puts a receipt into the inbox, unless its event is known.
    fn take(
        &mut self,
        source: &Arc<str>,
        destination: &Arc<str>,
        receipt: Receipt,
        at: UnixMs,
        taken: &mut Taken,
    ) {
        let (least, greatest) = receipt.event.same_id();
        let is_reused =
            self.events.range((source.clone(), least)..=(source.clone(), greatest)).next().is_some();
        let Entry::Vacant(new) = self.events.entry((source.clone(), receipt.event)) else {
            taken.known += 1;
            return;
        };
        new.insert(at);
        taken.reused_ids += u64::from(is_reused);
        self.inbox.push_back(WaitingReceipt { destination: destination.clone(), receipt });
        taken.new += 1;
    }

    fn change(&mut self, key: &RowKey, before: MessageState, at: UnixMs) {
        let row = &self.rows[key];
        self.last_change += 1;
        let change = StatusChange {
            number: self.last_change,
            id: key.0,
            destination: key.1.clone(),
            provider_id: row.record.provider_id.as_deref().map(str::to_owned),
            before,
            state: row.state(),
            at,
        };
        self.changes.insert(change.number, change);
    }
}

impl MemoryReceipts {
    /// An empty ledger that keeps no changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty ledger that keeps the changes of states.
    pub fn keeping_changes() -> Self {
        Self { keep_changes: true, ..Self::default() }
    }

    /// Whether every call fails from now on, with nothing done.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Whether counts are never answered from now on.
    pub fn hang_counts(&self, hang: bool) {
        self.counts_hang.store(hang, Ordering::SeqCst);
    }

    async fn counted(&self) {
        if self.counts_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    /// Loses the answers of the next `writes` writes: they are done, and the caller gets `Unknown`.
    pub fn lose_answers(&self, writes: u32) {
        self.answers_to_lose.store(writes, Ordering::SeqCst);
    }

    /// How many writes there were.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    fn state(&self) -> Result<MutexGuard<'_, State>, StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Retryable("the ledger is down".to_owned()));
        }
        Ok(self.state.lock().expect("no operation panics half-way"))
    }

    fn written<T>(&self, done: T) -> Result<T, StoreError> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        let lose = |left: u32| left.checked_sub(1);
        match self.answers_to_lose.try_update(Ordering::SeqCst, Ordering::SeqCst, lose) {
            Ok(_) => Err(StoreError::Unknown("the answer was lost".to_owned())),
            Err(_) => Ok(done),
        }
    }
}

/// What a database would refuse, and with it the statement.
fn check_text(what: &str, text: Option<&str>, bytes_max: usize) -> Result<(), StoreError> {
    match text {
        Some(text) if text.contains('\0') => {
            Err(StoreError::Permanent(format!("{what} holds a NUL, which the caller must refuse")))
        }
        Some(text) if text.len() > bytes_max => Err(StoreError::Permanent(format!(
            "{what} has {} bytes, more than {bytes_max}: the caller must refuse or cut it",
            text.len()
        ))),
        _ => Ok(()),
    }
}

fn check_receipt(receipt: &Receipt) -> Result<(), StoreError> {
    if !matches!(receipt.state, MessageState::Sent | MessageState::Failed | MessageState::Delivered) {
        return Err(StoreError::Permanent(format!("no receipt says {}", receipt.state.as_str())));
    }
    if let ReceiptKey::Provider(id) = &receipt.key {
        check_text("a provider's id", Some(id), PROVIDER_ID_BYTES_MAX)?;
    }
    check_text("a status", receipt.facts.status.as_deref(), WORD_BYTES_MAX)?;
    check_text("a carrier", receipt.facts.carrier.as_deref(), WORD_BYTES_MAX)?;
    check_text("a response", receipt.facts.response.as_deref(), RESPONSE_BYTES_MAX)
}

fn check_reject(reject: &ReceiptReject) -> Result<(), StoreError> {
    check_text("a reject's place", Some(&reject.place), usize::MAX)?;
    check_text("a reject's text", Some(&reject.text.text), REJECTED_BYTES_MAX)
}

#[async_trait]
impl ReceiptLedger for MemoryReceipts {
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError> {
        let mut state = self.state()?;
        for record in &records {
            check_text("a provider's id", record.provider_id.as_deref(), PROVIDER_ID_BYTES_MAX)?;
            check_text("a recipient", Some(&record.recipient), usize::MAX)?;
            check_text("a detail", record.detail.as_deref(), usize::MAX)?;
        }
        for record in &records {
            state.record(record);
        }
        self.written(())
    }

    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        let mut state = self.state()?;
        arrival.receipts.iter().try_for_each(check_receipt)?;
        arrival.rejects.iter().try_for_each(check_reject)?;
        let Arrival { source, destination, receipts, rejects, cursor, at } = arrival;
        let mut taken = Taken::default();
        let has_receipts = !receipts.is_empty() || !rejects.is_empty();
        for receipt in receipts {
            state.take(&source, &destination, receipt, at, &mut taken);
        }
        for reject in rejects {
            let key = (source.clone(), reject.event);
            if !state.events.contains_key(&key)
                && let Entry::Vacant(new) = state.rejects.entry(key)
            {
                new.insert((at, reject));
                taken.rejected += 1;
            }
        }
        let source = state.sources.entry(source).or_default();
        if has_receipts {
            source.times.receipts_at = Some(at);
        }
        if let Some(cursor) = cursor {
            source.cursor = Some(cursor);
            source.times.cursor_at = Some(at);
        }
        self.written(taken)
    }

    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError> {
        Ok(self.state()?.sources.get(source).and_then(|source| source.cursor.clone()))
    }

    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError> {
        let mut state = self.state()?;
        let mut applied = Applied::default();
        let mut standings: BTreeMap<RowKey, ReceiptStanding> = BTreeMap::new();
        let mut held_bytes = 0;
        while applied.total() < receipts as u64 && held_bytes <= bytes {
            let Some(WaitingReceipt { destination, receipt }) = state.inbox.pop_front() else { break };
            held_bytes += receipt.held_bytes();
            if let Some(id) = state.resolve(&destination, &receipt.key) {
                applied.matched += 1;
                let key = (id, destination);
                let standing = state.rows[&key].standing();
                standings.entry(key).or_insert(standing).hear(receipt);
            } else {
                applied.parked += 1;
                let key = (destination, receipt.key.clone());
                state.parked.entry(key).or_default().push((at, receipt));
            }
        }
        for (key, standing) in standings {
            applied.conflicts += u64::from(standing.is_new_conflict());
            let (is_changed, before) = (standing.is_changed(), standing.state_before());
            let row = state.rows.get_mut(&key).expect("it was resolved");
            row.reported = standing.reported;
            row.best = standing.best.or(row.best.take());
            if is_changed {
                applied.changed += 1;
                if self.keep_changes {
                    state.change(&key, before, at);
                }
            }
        }
        self.written(applied)
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.counted().await;
        Ok(self.state()?.inbox.len() as u64)
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        self.counted().await;
        Ok(self.state()?.parked())
    }

    async fn rejoin(&self, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state()?;
        let known = |(destination, key): &&(Arc<str>, ReceiptKey)| state.resolve(destination, key).is_some();
        let keys: Vec<_> = state.parked.keys().filter(known).take(limit).cloned().collect();
        let mut rejoined = 0;
        for (destination, key) in keys {
            rejoined += state.unpark(&destination, key, limit - rejoined);
        }
        self.written(rejoined)
    }

    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state()?;
        let mut given_up = Vec::new();
        state.parked.retain(|(destination, _), parked| {
            parked.retain(|(at, receipt)| {
                let keep = *at >= before || given_up.len() >= limit;
                if !keep {
                    let waiting =
                        WaitingReceipt { destination: destination.clone(), receipt: receipt.clone() };
                    given_up.push((*at, waiting));
                }
                keep
            });
            !parked.is_empty()
        });
        let count = given_up.len();
        state.orphans.extend(given_up);
        self.written(count)
    }

    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError> {
        let mut state = self.state()?;
        let due = |(key, row): &(&RowKey, &LedgerEntry)| {
            &*key.1 == destination && row.state() == MessageState::Sent && row.record.at < before
        };
        let keys: Vec<_> = state.rows.iter().filter(due).take(limit).map(|(key, _)| key.clone()).collect();
        for key in &keys {
            state.rows.get_mut(key).expect("it was found").expired = true;
            if self.keep_changes {
                state.change(key, MessageState::Sent, at);
            }
        }
        self.written(keys.len())
    }

    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError> {
        let state = self.state()?;
        let from = after.map_or(0, |after| after.saturating_add(1));
        Ok(state.changes.range(from..).take(limit).map(|(_, change)| change.clone()).collect())
    }

    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError> {
        let mut state = self.state()?;
        for number in numbers {
            state.changes.remove(number);
        }
        self.written(())
    }

    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state()?;
        let mut left = limit;
        let mut old = |at: UnixMs| {
            let remove = at < before && left > 0;
            left -= usize::from(remove);
            remove
        };
        let old_rows: Vec<_> =
            state.rows.iter().filter(|(_, row)| old(row.record.at)).map(|(key, _)| key.clone()).collect();
        for key in old_rows {
            let row = state.rows.remove(&key).expect("it was found");
            state.unname(&key.1, row.record.provider_id, key.0);
        }
        state.orphans.retain(|(at, _)| !old(*at));
        state.rejects.retain(|_, (at, _)| !old(*at));
        state.events.retain(|_, at| !old(*at));
        self.written(limit - left)
    }
}

#[async_trait]
impl ReceiptRejects for MemoryReceipts {
    async fn rejects(
        &self,
        source: &str,
        after: Option<EventId>,
        limit: usize,
    ) -> Result<Vec<ReceiptReject>, StoreError> {
        let state = self.state()?;
        let rejects = state.rejects.iter();
        let rejects =
            rejects.filter(|((of, event), _)| &**of == source && after.is_none_or(|after| *event > after));
        Ok(rejects.take(limit).map(|(_, (_, reject))| reject.clone()).collect())
    }

    async fn settle_rejects(&self, reread: Reread) -> Result<Taken, StoreError> {
        let mut state = self.state()?;
        reread.receipts.iter().try_for_each(|(_, receipt)| check_receipt(receipt))?;
        let Reread { source, destination, receipts, ignored, rejected, at } = reread;
        let mut taken = Taken::default();
        let events: Vec<_> = receipts.iter().map(|(event, _)| *event).collect();
        for (_, receipt) in receipts {
            state.take(&source, &destination, receipt, at, &mut taken);
        }
        for event in events {
            state.events.entry((source.clone(), event)).or_insert(at);
            state.rejects.remove(&(source.clone(), event));
        }
        for event in ignored {
            state.rejects.remove(&(source.clone(), event));
        }
        for (event, reason) in rejected {
            if let Some((_, reject)) = state.rejects.get_mut(&(source.clone(), event)) {
                reject.reason = reason;
            }
        }
        self.written(taken)
    }
}

#[async_trait]
impl RowReader for MemoryReceipts {
    async fn row(&self, id: MessageId, destination: &str) -> Option<LedgerRow> {
        let state = self.state.lock().expect("no operation panics half-way");
        let row = state.rows.get(&(id, destination.into()))?;
        let record = row.record.clone();
        Some(LedgerRow {
            id,
            destination: record.destination,
            feed: record.feed,
            recipient: record.recipient,
            state: row.state(),
            attempts: record.attempts,
            status: record.status,
            reason: record.reason,
            detail: record.detail,
            provider_id: record.provider_id,
            accepted_at: record.accepted_at,
            at: record.at,
            reported: row.reported,
            receipt: row.best.as_ref().map(|best| LedgerReceipt {
                state: best.state,
                at: best.at,
                facts: best.facts.clone(),
            }),
        })
    }

    async fn tally(&self) -> LedgerTally {
        let state = self.state.lock().expect("no operation panics half-way");
        LedgerTally {
            rows: state.rows.len() as u64,
            parked: state.parked(),
            orphans: state.orphans.len() as u64,
            rejects: state.rejects.len() as u64,
        }
    }

    async fn source(&self, name: &str) -> Option<LedgerSource> {
        let state = self.state.lock().expect("no operation panics half-way");
        state.sources.get(name).map(|source| source.times)
    }
}
