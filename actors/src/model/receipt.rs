//! Receipts: later reports on messages that were sent.
//!
//! A message's *standing* is what its receipts together say of it: the greatest receipt by [`Receipt::rank`],
//! and whether they contradict each other. Both are joins, so the order in which receipts come, and how often
//! each of them comes, does not matter (F51).

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::{ids::MessageId, state::MessageState, time::UnixMs};

/// The longest id of a provider, in bytes: it is indexed.
pub const PROVIDER_ID_BYTES_MAX: usize = 200;

/// The longest carrier or status word that is kept, in bytes.
pub const WORD_BYTES_MAX: usize = 100;

/// The longest response of a provider that is kept, in bytes; a longer one is cut.
pub const RESPONSE_BYTES_MAX: usize = 500;

/// The longest text of a rejected receipt that is kept, in bytes; a longer one is cut.
pub const REJECTED_BYTES_MAX: usize = 16 << 10;

/// How many bytes of an event are its id's.
const EVENT_ID_HALF: usize = 8;

/// A receipt's identity within its source: what a source sends again is the same receipt.
///
/// Of a receipt that names its id it is half that id and half what the receipt says. So another receipt under an id
/// that came before is taken too, and none is lost where a mapping names something that is no id of a receipt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(pub [u8; 16]);

impl EventId {
    /// Of a receipt that the provider gave an id.
    pub fn named(source: &str, id: &str) -> Self {
        Self::digest(source, b"id", id.as_bytes())
    }

    /// Of a receipt that the provider gave an id, and of what it says.
    #[must_use]
    pub fn saying(self, receipt: &Receipt) -> Self {
        let Receipt { event: _, key, state, at, facts } = receipt;
        let ReceiptFacts { status, carrier, response, sent_at, price } = facts;
        let (kind, name) = match key {
            ReceiptKey::Message(id) => (0, [&id.file.0[..], &id.row.to_le_bytes()].concat()),
            ReceiptKey::Provider(id) => (1, id.as_bytes().to_vec()),
        };
        let mut hash = Sha256::new();
        hash.update([kind, *state as u8]);
        let number = |number: Option<u64>| number.map(u64::to_le_bytes);
        let numbers = [at.map(|at| at.0), sent_at.map(|at| at.0), price.map(|price| price.0.cast_unsigned())];
        let numbers = numbers.map(number);
        let texts = [status, carrier, response].map(|text| text.as_deref().map(str::as_bytes));
        let parts = numbers.iter().map(|number| number.as_ref().map(|bytes| &bytes[..])).chain(texts);
        for part in parts.chain([Some(&name[..])]) {
            // A part that is missing is no empty one.
            hash.update(part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            hash.update(part.unwrap_or_default());
        }
        let mut id = self.0;
        id[EVENT_ID_HALF..].copy_from_slice(&hash.finalize()[..EVENT_ID_HALF]);
        Self(id)
    }

    /// The least and the greatest of all that bring the same id, whatever they say.
    pub fn same_id(self) -> (Self, Self) {
        let (mut least, mut greatest) = (self.0, self.0);
        least[EVENT_ID_HALF..].fill(0);
        greatest[EVENT_ID_HALF..].fill(u8::MAX);
        (Self(least), Self(greatest))
    }

    /// Of a receipt without one: the same text is the same receipt.
    pub fn of_text(source: &str, text: &[u8]) -> Self {
        Self::digest(source, b"text", text)
    }

    fn digest(source: &str, kind: &[u8], bytes: &[u8]) -> Self {
        let mut hash = Sha256::new();
        for part in [source.as_bytes(), kind, bytes] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }
}

impl fmt::Debug for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::ids::hex(&self.0))
    }
}

/// Which message a receipt is about, at the destination of its source.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ReceiptKey {
    /// By our id.
    Message(MessageId),
    /// By the id that the destination answered with.
    Provider(Box<str>),
}

/// What a provider charged, in units of 10⁻⁸ of its currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Price(pub i64);

impl fmt::Display for Price {
    /// Exact, without zeros at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, fraction) = (self.0.unsigned_abs() / PRICE_UNIT, self.0.unsigned_abs() % PRICE_UNIT);
        let sign = if self.0 < 0 { "-" } else { "" };
        let fraction = format!("{fraction:08}");
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() { "" } else { "." };
        write!(f, "{sign}{whole}{point}{fraction}")
    }
}

/// Units of a [`Price`] in one of its currency.
const PRICE_UNIT: u64 = 100_000_000;

/// What a receipt brings beside the state. What the provider left out is `None`, never an empty text (S0.3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceiptFacts {
    /// The provider's own word for the state, at most [`WORD_BYTES_MAX`].
    pub status: Option<Box<str>>,
    /// At most [`WORD_BYTES_MAX`].
    pub carrier: Option<Box<str>>,
    /// At most [`RESPONSE_BYTES_MAX`].
    pub response: Option<Box<str>>,
    /// When the provider says it sent the message.
    pub sent_at: Option<UnixMs>,
    /// What it charged.
    pub price: Option<Price>,
}

/// One receipt, validated: no text of it holds a NUL or is longer than its bound (F52).
#[derive(Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Its identity within its source.
    pub event: EventId,
    /// Which message it is about.
    pub key: ReceiptKey,
    /// `Sent` (an interim report: it changes nothing but the facts), `Failed` or `Delivered`.
    pub state: MessageState,
    /// When the provider says that happened.
    pub at: Option<UnixMs>,
    /// The rest.
    pub facts: ReceiptFacts,
}

impl fmt::Debug for Receipt {
    /// No response: it may hold a recipient (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receipt")
            .field("event", &self.event)
            .field("key", &self.key)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// How receipts of one message compare: the greatest one's facts are kept.
pub type Rank = (MessageState, UnixMs, EventId);

impl Receipt {
    /// By state, then by the provider's time, then by id, so that the order is total (S0.4).
    pub fn rank(&self) -> Rank {
        (self.state, self.at.unwrap_or(UnixMs(0)), self.event)
    }

    /// How many bytes of memory it takes, roughly.
    pub fn held_bytes(&self) -> usize {
        let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
        let ReceiptFacts { status, carrier, response, .. } = &self.facts;
        size_of::<Self>() + text(status) + text(carrier) + text(response)
    }
}

/// Which final states receipts have reported of a message. Stored as its number; a join.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedStates(pub u8);

impl ReportedStates {
    const FAILED: u8 = 1;
    const DELIVERED: u8 = 2;

    /// By one receipt.
    pub fn by(state: MessageState) -> Self {
        Self(match state {
            MessageState::Failed => Self::FAILED,
            MessageState::Delivered => Self::DELIVERED,
            _ => 0,
        })
    }

    /// By both.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether both delivery and failure were reported (S0.4).
    pub fn is_conflict(self) -> bool {
        self.0 == Self::FAILED | Self::DELIVERED
    }
}

/// The row of a message, and what the receipts of one step add to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptStanding {
    state_before: MessageState,
    reported_before: ReportedStates,
    /// The message's state with those receipts.
    pub state: MessageState,
    /// Which final states were reported, in all.
    pub reported: ReportedStates,
    greatest: Option<Rank>,
    /// The greatest of those receipts, if it is greater than the row's: its facts are to be kept.
    pub best: Option<Receipt>,
}

impl ReceiptStanding {
    /// Of a row in which a receipt of rank `greatest` was the greatest so far.
    pub fn new(state: MessageState, reported: ReportedStates, greatest: Option<Rank>) -> Self {
        Self { state_before: state, reported_before: reported, state, reported, greatest, best: None }
    }

    /// Joins a receipt of this message with the rest.
    pub fn hear(&mut self, receipt: Receipt) {
        self.reported = self.reported.merge(ReportedStates::by(receipt.state));
        // I2: an interim receipt makes no message sent, that is for the receiver's 2xx to say.
        if receipt.state > MessageState::Expired {
            self.state = self.state.merge(receipt.state);
        }
        if self.greatest.is_none_or(|greatest| receipt.rank() > greatest) {
            self.greatest = Some(receipt.rank());
            self.best = Some(receipt);
        }
    }

    /// The row's state before those receipts.
    pub fn state_before(&self) -> MessageState {
        self.state_before
    }

    /// Whether the row must be written.
    pub fn has_news(&self) -> bool {
        self.best.is_some() || self.reported != self.reported_before
    }

    /// Whether the state has changed.
    pub fn is_changed(&self) -> bool {
        self.state != self.state_before
    }

    /// Whether its receipts contradict each other, and did not before.
    pub fn is_new_conflict(&self) -> bool {
        self.reported.is_conflict() && !self.reported_before.is_conflict()
    }
}

/// A receipt that could not be read, and why.
#[derive(Clone, PartialEq, Eq)]
pub struct ReceiptReject {
    /// The identity that the receipt has if it names none itself, so that what is sent again is recorded once.
    pub event: EventId,
    /// When it happened, by what is around it.
    pub at: Option<UnixMs>,
    /// Where it stood: `FILE:LINE`, a request's item, an entry's id.
    pub place: String,
    /// What is wrong with it and what is expected.
    pub reason: String,
    /// What is kept of it.
    pub text: RejectedText,
}

/// What is kept of a rejected receipt: for the operator, and to be read again once the mapping is fixed. It may name
/// a recipient, so it belongs in no log (I10).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RejectedText {
    /// As it came, or the columns of its row as a JSON object; at most [`REJECTED_BYTES_MAX`], without a NUL.
    /// Empty: nothing is kept.
    pub text: Box<str>,
    /// Whether that is a whole receipt, which can be read again.
    pub is_whole: bool,
}

impl RejectedText {
    /// Of a receipt: whole, if it fits.
    pub fn of_receipt(text: &[u8]) -> Self {
        let kept = Self::of_other(text);
        Self { is_whole: kept.text.as_bytes() == text, ..kept }
    }

    /// Of something that is not a receipt: for the operator alone.
    pub fn of_other(text: &[u8]) -> Self {
        let text = &text[..text.len().min(REJECTED_BYTES_MAX)];
        let mut text = String::from_utf8_lossy(text).replace('\0', "\u{fffd}");
        text.truncate(text.floor_char_boundary(REJECTED_BYTES_MAX));
        Self { text: text.into(), is_whole: false }
    }
}

impl fmt::Debug for RejectedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RejectedText({} bytes, whole: {})", self.text.len(), self.is_whole)
    }
}

impl fmt::Debug for ReceiptReject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReceiptReject({}: {})", self.place, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn receipt() -> impl Strategy<Value = Receipt> {
        let state =
            prop_oneof![Just(MessageState::Sent), Just(MessageState::Failed), Just(MessageState::Delivered)];
        (state, prop::option::of(0u64..3), any::<[u8; 16]>()).prop_map(|(state, at, event)| {
            let facts = ReceiptFacts { status: Some(format!("{event:?}").into()), ..ReceiptFacts::default() };
            let key = ReceiptKey::Provider("p-1".into());
            Receipt { event: EventId(event), key, state, at: at.map(UnixMs), facts }
        })
    }

    /// A row that was given the receipts in steps, each of which was written: its state, what was reported, and the
    /// greatest receipt.
    fn heard(
        state: MessageState,
        steps: impl IntoIterator<Item = Vec<Receipt>>,
    ) -> (MessageState, ReportedStates, Option<Receipt>) {
        let mut row = (state, ReportedStates::default(), None);
        for step in steps {
            let rank = row.2.as_ref().map(Receipt::rank);
            let mut standing = ReceiptStanding::new(row.0, row.1, rank);
            for receipt in step {
                standing.hear(receipt);
            }
            if standing.has_news() {
                row = (standing.state, standing.reported, standing.best.or(row.2));
            }
        }
        row
    }

    proptest! {
        #[test]
        fn f51_neither_order_nor_repetition_nor_grouping_matters(
            receipts in prop::collection::vec(receipt(), 0..20),
            state in prop_oneof![
                Just(MessageState::Dead), Just(MessageState::Sent), Just(MessageState::Expired)
            ],
            size in 1usize..8,
            seed: u64,
        ) {
            use rand::{SeedableRng as _, seq::SliceRandom as _};
            let mut tripled = [&receipts[..], &receipts, &receipts].concat();
            tripled.shuffle(&mut rand::rngs::SmallRng::seed_from_u64(seed));
            let once = heard(state, [receipts.clone()]);
            prop_assert_eq!(heard(state, tripled.chunks(size).map(<[_]>::to_vec)), once.clone());
            let greatest = receipts.iter().map(|receipt| receipt.state).max();
            let is_final = |state: &MessageState| *state > MessageState::Expired;
            prop_assert_eq!(once.0, greatest.filter(is_final).map_or(state, |greatest| state.merge(greatest)));
            prop_assert_eq!(once.2, receipts.into_iter().max_by_key(Receipt::rank));
        }
    }

    #[test]
    fn s0_4_a_late_failure_does_not_undo_a_delivery_and_is_a_conflict() {
        let of = |state, event| Receipt {
            event: EventId([event; 16]),
            key: ReceiptKey::Provider("p-1".into()),
            state,
            at: Some(UnixMs(u64::from(event))),
            facts: ReceiptFacts::default(),
        };
        let (delivered, failed) = (of(MessageState::Delivered, 1), of(MessageState::Failed, 9));
        let mut standing = ReceiptStanding::new(MessageState::Sent, ReportedStates::default(), None);
        standing.hear(delivered.clone());
        assert!(standing.is_changed() && !standing.is_new_conflict());
        let mut later = ReceiptStanding::new(standing.state, standing.reported, Some(delivered.rank()));
        later.hear(failed);
        assert_eq!((later.state, &later.best), (MessageState::Delivered, &None));
        assert!(later.has_news() && later.is_new_conflict() && !later.is_changed());
        let mut again = ReceiptStanding::new(later.state, later.reported, Some(delivered.rank()));
        again.hear(delivered);
        assert!(!again.has_news() && !again.is_new_conflict());
    }

    #[test]
    fn i2_an_interim_receipt_brings_facts_and_changes_no_state() {
        for state in [MessageState::Dead, MessageState::Sent, MessageState::Expired] {
            let mut standing = ReceiptStanding::new(state, ReportedStates::default(), None);
            standing.hear(Receipt {
                event: EventId([1; 16]),
                key: ReceiptKey::Provider("p-1".into()),
                state: MessageState::Sent,
                at: None,
                facts: ReceiptFacts::default(),
            });
            assert_eq!((standing.state, standing.reported), (state, ReportedStates::default()));
            assert!(standing.has_news() && standing.best.is_some());
        }
    }

    #[test]
    fn a_rejected_text_is_whole_or_says_that_it_is_not() {
        let whole = format!("{{\"a\":\"{}\"}}", "ü".repeat(100));
        let kept = RejectedText::of_receipt(whole.as_bytes());
        assert_eq!((&*kept.text, kept.is_whole), (&*whole, true));
        assert!(!RejectedText::of_other(whole.as_bytes()).is_whole);
        let longest = "x".repeat(REJECTED_BYTES_MAX);
        assert!(RejectedText::of_receipt(longest.as_bytes()).is_whole);
        for (text, starts) in [
            (format!("{longest}x").into_bytes(), "xx"),
            (format!("x{}", "ü".repeat(REJECTED_BYTES_MAX)).into_bytes(), "xü"),
            (vec![0xff; REJECTED_BYTES_MAX], "\u{fffd}\u{fffd}"),
            (b"a\xffb".to_vec(), "a\u{fffd}b"),
            (b"a\0b".to_vec(), "a\u{fffd}b"),
        ] {
            let kept = RejectedText::of_receipt(&text);
            assert!(kept.text.starts_with(starts) && !kept.is_whole, "{starts}");
            assert!(kept.text.len() <= REJECTED_BYTES_MAX && !kept.text.contains('\0'), "{starts}");
        }
        assert!(!format!("{:?}", RejectedText::of_receipt(b"secret")).contains("secret"));
    }

    #[test]
    fn prices_are_exact() {
        for (price, text) in
            [(645_000, "0.00645"), (-100_000_000, "-1"), (0, "0"), (1, "0.00000001"), (250_000_000, "2.5")]
        {
            assert_eq!(Price(price).to_string(), text);
        }
    }

    #[test]
    fn events_differ_by_source_kind_and_text() {
        let ids = [
            EventId::named("a", "1"),
            EventId::named("b", "1"),
            EventId::of_text("a", b"1"),
            EventId::named("a", "2"),
        ];
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
        assert_eq!(EventId::named("a", "1"), ids[0]);
    }

    #[test]
    fn f51_an_event_tells_what_a_receipt_says_apart_and_keeps_its_id() {
        let of = |receipt: &Receipt| EventId::named("a", "1").saying(receipt);
        let text = |text: &str| Some(Box::from(text));
        let plain = Receipt {
            event: EventId([0; 16]),
            key: ReceiptKey::Provider("p-1".into()),
            state: MessageState::Delivered,
            at: Some(UnixMs(1)),
            facts: ReceiptFacts::default(),
        };
        let facts = |facts: ReceiptFacts| Receipt { facts, ..plain.clone() };
        let none = ReceiptFacts::default;
        let others = [
            plain.clone(),
            Receipt { key: ReceiptKey::Provider("p-2".into()), ..plain.clone() },
            Receipt {
                key: ReceiptKey::Message(MessageId { file: super::super::ids::FileId([1; 16]), row: 1 }),
                ..plain.clone()
            },
            Receipt { state: MessageState::Failed, ..plain.clone() },
            Receipt { at: None, ..plain.clone() },
            Receipt { at: Some(UnixMs(2)), ..plain.clone() },
            facts(ReceiptFacts { status: text("x"), ..none() }),
            facts(ReceiptFacts { carrier: text("x"), ..none() }),
            facts(ReceiptFacts { carrier: text(""), ..none() }),
            facts(ReceiptFacts { response: text("x"), ..none() }),
            facts(ReceiptFacts { sent_at: Some(UnixMs(1)), ..none() }),
            facts(ReceiptFacts { price: Some(Price(1)), ..none() }),
        ];
        let ids: std::collections::HashSet<_> = others.iter().map(of).collect();
        assert_eq!(ids.len(), others.len());
        let (least, greatest) = EventId::named("a", "1").same_id();
        assert!(ids.iter().all(|id| (least..=greatest).contains(id)));
        assert!(!(least..=greatest).contains(&EventId::named("a", "2").saying(&plain)));
        assert_eq!(
            of(&Receipt { event: EventId([9; 16]), ..plain.clone() }),
            of(&plain),
            "its own event is no part"
        );
    }
}
