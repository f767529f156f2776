//! How files, leases of batches and requests are named in distributed traces (OpenTelemetry, W3C Trace Context).
//!
//! Nothing is stored for it: a file's trace and a lease's span follow from their ids, so that every machine that sends a part of
//! a file, and its next life, names the same trace (design §6).

use std::{fmt, time::Duration};

use sha2::{Digest as _, Sha256};

use super::{
    batch::BatchHeader,
    ids::{BatchId, FileId, hex},
    lease::{Lease, LeaseToken},
    ledger::MessageVerdict,
    outcome::Verdict,
    time::UnixMs,
};

/// The trace of a file: its id, so that whoever knows one can look up the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(pub [u8; 16]);

impl TraceId {
    /// The trace of `file`.
    pub fn of(file: FileId) -> Self {
        let mut id = file.0;
        // All zeros is not an id (W3C Trace Context, section 3.2.2.3).
        if id == [0; 16] {
            id[15] = 1;
        }
        Self(id)
    }

    /// The 56 bits that samplers decide by (W3C Trace Context Level 2, section 5): as good as random, being a part of a digest.
    fn randomness(self) -> u64 {
        self.0[9..].iter().fold(0, |bits, byte| (bits << 8) | u64::from(*byte))
    }
}

/// The span of a batch under one lease.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId(pub [u8; 8]);

impl SpanId {
    /// The span of a lease. Each lease of a batch has its own, whichever machine holds it.
    pub fn of(token: LeaseToken) -> Self {
        let digest =
            Sha256::new().chain_update(token.batch.0).chain_update(token.fence.to_be_bytes()).finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        // All zeros is not an id (section 3.2.2.4).
        if id == [0; 8] {
            id[7] = 1;
        }
        Self(id)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Which files are traced. It decides by the trace alone, as OpenTelemetry's samplers do, so that every machine decides alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Traces whose randomness is below this are left out.
    threshold: u64,
}

impl Sampling {
    /// Of a hundred files so many, on average.
    pub fn percent(percent: u32) -> Self {
        Self { threshold: (u64::from(100 - percent.min(100)) << 56) / 100 }
    }

    /// Whether a trace is recorded.
    pub fn takes(self, trace: TraceId) -> bool {
        trace.randomness() >= self.threshold
    }
}

/// Bytes of a `traceparent` of version 00.
const TRACEPARENT_BYTES: usize = 55;

/// The value of the header `traceparent`: the trace of the file, the span of the batch, and whether they are recorded (W3C Trace
/// Context, section 3.2).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceParent([u8; TRACEPARENT_BYTES]);

impl TraceParent {
    /// Of these.
    pub fn new(trace: TraceId, span: SpanId, is_sampled: bool) -> Self {
        let text = format!("00-{}-{}-{:02x}", hex(&trace.0), hex(&span.0), u8::from(is_sampled));
        Self(text.into_bytes().try_into().expect("2, 32, 16 and 2 digits, and three dashes"))
    }

    /// Visible ASCII.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// How a batch's lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Every message of the batch has its final state.
    Settled,
    /// Messages are left that are tried again later.
    Retrying,
    /// The batch was given back with messages that were not tried: its destination or file is held, or the daemon drains.
    Returned,
    /// The lease was lost to another holder.
    Lost,
    /// The worker ended.
    Abandoned,
}

impl LeaseEnd {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Settled => "settled",
            Self::Retrying => "retrying",
            Self::Returned => "returned",
            Self::Lost => "lost",
            Self::Abandoned => "abandoned",
        }
    }
}

/// A batch from its lease to the end of that. It names nobody (I10) and is bounded by the names in the configuration (I8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSpan {
    /// The file's trace.
    pub trace: TraceId,
    /// The lease's span.
    pub span: SpanId,
    /// The feed's name.
    pub feed: Box<str>,
    /// The destination's name.
    pub destination: Box<str>,
    /// The file.
    pub file: FileId,
    /// The batch.
    pub batch: BatchId,
    /// Which lease of it.
    pub fence: u64,
    /// When it was leased.
    pub started: UnixMs,
    /// How long it was held.
    pub took: Duration,
    /// Messages that were open when it was leased.
    pub messages: u64,
    /// Recorded outcomes: messages that were sent …
    pub sent: u64,
    /// … attempts after which a message will be tried again …
    pub retried: u64,
    /// … and messages that were given up.
    pub dead: u64,
    /// How the lease ended.
    pub end: LeaseEnd,
}

impl BatchSpan {
    /// The span of a lease that begins at `started`.
    pub fn begin(lease: &Lease, started: UnixMs) -> Self {
        let BatchHeader { feed, destination, file, .. } = &*lease.header;
        Self {
            trace: TraceId::of(*file),
            span: SpanId::of(lease.token),
            feed: feed.as_str().into(),
            destination: destination.as_str().into(),
            file: *file,
            batch: lease.token.batch,
            fence: lease.token.fence,
            started,
            took: Duration::ZERO,
            messages: lease.open.len() as u64,
            sent: 0,
            retried: 0,
            dead: 0,
            end: LeaseEnd::Abandoned,
        }
    }

    /// These outcomes were recorded.
    pub fn record(&mut self, verdicts: &[MessageVerdict]) {
        for MessageVerdict { verdict, .. } in verdicts {
            match verdict {
                Verdict::Sent { .. } => self.sent += 1,
                Verdict::Retry { .. } => self.retried += 1,
                Verdict::Dead { .. } => self.dead += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A `traceparent` by the letter of W3C Trace Context, section 3.2.2: trace, span and flags.
    fn parse(header: &[u8]) -> Option<(String, String, u8)> {
        let text = std::str::from_utf8(header).ok()?;
        let [version, trace, span, flags] = text.split('-').collect::<Vec<_>>().try_into().ok()?;
        let is_hex = |text: &str, digits| {
            text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_id = |text: &str, digits| is_hex(text, digits) && text.bytes().any(|byte| byte != b'0');
        (version == "00" && is_id(trace, 32) && is_id(span, 16) && is_hex(flags, 2)).then(|| {
            (trace.to_owned(), span.to_owned(), u8::from_str_radix(flags, 16).expect("two hex digits"))
        })
    }

    fn token(batch: [u8; 16], fence: u64) -> LeaseToken {
        LeaseToken { batch: BatchId(batch), fence }
    }

    #[test]
    fn the_header_is_as_the_recommendation_has_it() {
        let file = FileId([0xab; 16]);
        let parent = TraceParent::new(TraceId::of(file), SpanId([0xcd; 8]), true);
        let expected = format!("00-{}-{}-01", "ab".repeat(16), "cd".repeat(8));
        assert_eq!(parent.as_bytes(), expected.as_bytes());
        assert_eq!(
            parse(b"00-00000000000000000000000000000000-cdcdcdcdcdcdcdcd-01"),
            None,
            "this test can fail"
        );
    }

    #[test]
    fn no_id_is_all_zeros() {
        let trace = TraceId::of(FileId([0; 16]));
        assert_ne!(trace.0, [0; 16]);
        let parent = TraceParent::new(trace, SpanId::of(token([0; 16], 0)), false);
        assert!(parse(parent.as_bytes()).is_some(), "{parent:?}");
    }

    #[test]
    fn a_share_of_the_files_is_traced() {
        let files: Vec<_> = (0..10_000u64).map(|n| FileId::derive(&n.to_string(), &[7; 32])).collect();
        let taken = |percent| {
            let sampling = Sampling::percent(percent);
            files.iter().filter(|file| sampling.takes(TraceId::of(**file))).count()
        };
        assert_eq!((taken(0), taken(100)), (0, 10_000));
        assert!((450..550).contains(&taken(5)), "{}", taken(5));
        assert!((4_800..5_200).contains(&taken(50)), "{}", taken(50));
        let half = Sampling::percent(50);
        let least = TraceId([0; 16]);
        assert!(!half.takes(least) && half.takes(TraceId([0xff; 16])));
    }

    proptest! {
        #[test]
        fn every_header_parses_and_names_the_file(file: [u8; 16], batch: [u8; 16], fence: u64, percent in 0..=100u32) {
            prop_assume!(file != [0; 16]);
            let (file, token) = (FileId(file), token(batch, fence));
            let trace = TraceId::of(file);
            let is_sampled = Sampling::percent(percent).takes(trace);
            let parent = TraceParent::new(trace, SpanId::of(token), is_sampled);
            let (in_trace, span, flags) = parse(parent.as_bytes()).expect("it parses");
            prop_assert_eq!(in_trace, file.to_string());
            prop_assert_eq!(span, hex(&SpanId::of(token).0));
            prop_assert_eq!(flags, u8::from(is_sampled));
        }

        #[test]
        fn every_lease_has_a_span_of_its_own(batch: [u8; 16], other: [u8; 16], fence: u64) {
            let of = |batch, fence| SpanId::of(token(batch, fence));
            prop_assert_eq!(of(batch, fence), of(batch, fence));
            prop_assert_ne!(of(batch, fence), of(batch, fence.wrapping_add(1)));
            if batch != other {
                prop_assert_ne!(of(batch, fence), of(other, fence));
            }
        }

        #[test]
        fn who_takes_a_file_takes_it_at_every_higher_share(file: [u8; 16], low in 0..=100u32, high in 0..=100u32) {
            let trace = TraceId::of(FileId(file));
            let takes = |percent| Sampling::percent(percent).takes(trace);
            prop_assert!(takes(low.max(high)) || !takes(low.min(high)));
        }
    }
}
