//! Message records: what delivery reports of each message to a ledger of rows.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::BuildHasher,
    sync::Arc,
};

use super::{
    batch::OpenRows,
    ids::MessageId,
    lease::Lease,
    ledger::MessageVerdict,
    outcome::{Reason, Verdict},
    state::MessageState,
    time::UnixMs,
};

/// What delivery reports of one message at one destination to a ledger of rows.
#[derive(Clone, PartialEq, Eq)]
pub struct MessageRecord {
    /// The message.
    pub id: MessageId,
    /// Where it went.
    pub destination: Arc<str>,
    /// Where it came from.
    pub feed: Arc<str>,
    /// Who gets it.
    pub recipient: Box<str>,
    /// `Retrying`, `Dead` or `Sent`.
    pub state: MessageState,
    /// How many attempts it had in this drive.
    pub attempts: u32,
    /// The last answer's HTTP status, 0 without an answer.
    pub status: u16,
    /// Why the last attempt failed, if it did.
    pub reason: Option<Reason>,
    /// What the destination itself said of that.
    pub detail: Option<Box<str>>,
    /// The id that the destination answered with, at most [`PROVIDER_ID_BYTES_MAX`](super::receipt::PROVIDER_ID_BYTES_MAX), without NUL.
    pub provider_id: Option<Box<str>>,
    /// When its row was accepted, or last redriven.
    pub accepted_at: UnixMs,
    /// When the attempt ended.
    pub at: UnixMs,
}

impl fmt::Debug for MessageRecord {
    /// No recipient (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageRecord")
            .field("id", &self.id)
            .field("destination", &self.destination)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// How records of one message compare: attempts, status, reason and time of the greatest are kept. A redrive counts
/// attempts from 1 again; it is a later acceptance. A provider's id is kept from whichever has one, the least if several
/// differ; the recipient never differs.
pub fn record_rank(record: &MessageRecord) -> (MessageState, UnixMs, u32, UnixMs) {
    (record.state, record.accepted_at, record.attempts, record.at)
}

/// What a destination said of one message beside its verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Its own id for the message.
    pub provider_id: Option<Box<str>>,
    /// Its words on a failure.
    pub detail: Option<Box<str>>,
}

/// What the destination said of the messages that are dead now: kept with the dead letter, whatever the ledger.
pub fn details<S: BuildHasher>(
    verdicts: &[MessageVerdict],
    said: &HashMap<u32, Said, S>,
) -> BTreeMap<u32, Box<str>> {
    let dead = verdicts.iter().filter(|message| matches!(message.verdict, Verdict::Dead { .. }));
    dead.filter_map(|message| Some((message.index, said.get(&message.index)?.detail.clone()?))).collect()
}

/// The records of `verdicts` on messages of `lease`. `said` is by index in the batch.
pub fn records<S: BuildHasher>(
    lease: &Lease,
    rows: &OpenRows,
    verdicts: &[MessageVerdict],
    said: &mut HashMap<u32, Said, S>,
) -> Vec<MessageRecord> {
    let header = &lease.header;
    let (feed, destination) = (Arc::<str>::from(&*header.feed), Arc::<str>::from(&*header.destination));
    let record = |&MessageVerdict { index, attempt: number, verdict, .. }: &MessageVerdict| {
        let (row, bytes) = rows.get(index)?; // a batch that can't be read is condemned by index alone
        let recipient = header.layout.read(bytes).map_or("", |parts| parts.recipient);
        let (state, at, status, reason) = match verdict {
            Verdict::Sent { at, status } => (MessageState::Sent, at, status, None),
            Verdict::Retry { attempt, .. } => {
                (MessageState::Retrying, attempt.at, attempt.status, Some(attempt.reason))
            }
            Verdict::Dead { attempt, .. } => {
                (MessageState::Dead, attempt.at, attempt.status, Some(attempt.reason))
            }
        };
        let Said { provider_id, detail } = said.remove(&index).unwrap_or_default();
        Some(MessageRecord {
            id: header.message_id(row),
            destination: destination.clone(),
            feed: feed.clone(),
            recipient: recipient.into(),
            state,
            attempts: number,
            status,
            reason,
            detail,
            provider_id,
            accepted_at: lease.since(index),
            at,
        })
    };
    verdicts.iter().filter_map(record).collect()
}
