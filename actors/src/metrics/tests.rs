use super::*;
use crate::model::{outcome::Attempt, time::UnixMs};

fn attempt(reason: Reason, status: u16) -> Attempt {
    Attempt { at: UnixMs(1), status, reason }
}

fn retry(reason: Reason, status: u16) -> Verdict {
    Verdict::Retry { attempt: attempt(reason, status), not_before: UnixMs(2) }
}

#[test]
fn every_verdict_has_its_word_and_poison_is_no_attempt() {
    let word = |verdict| outcome_of(&verdict).map(|at| OUTCOMES[at]);
    assert_eq!(word(Verdict::Sent { at: UnixMs(1), status: 204 }), Some("sent"));
    for (status, expected) in [
        (302, "status_3xx"),
        (429, "status_429"),
        (404, "status_4xx"),
        (503, "status_5xx"),
        (99, "status_other"),
    ] {
        assert_eq!(word(retry(Reason::Status, status)), Some(expected));
    }
    for reason in (0..=u8::MAX).filter_map(Reason::from_byte) {
        assert_eq!(word(retry(reason, 0)).is_none(), reason == Reason::Poison, "{reason:?}");
    }
    for cause in (0..=u8::MAX).filter_map(DeathCause::from_byte) {
        assert!(CAUSES.contains(&cause), "{cause:?}");
    }
}

#[test]
fn a_settlement_is_counted_once_and_a_stale_one_only_where_it_is_a_fact() {
    let metrics = StageMetrics::default().destination("support");
    let dead = Verdict::Dead { attempt: attempt(Reason::Status, 404), cause: DeathCause::Permanent };
    let verdict = |verdict| MessageVerdict { index: 0, drive: 0, attempt: 1, verdict };
    let verdicts = [
        verdict(Verdict::Sent { at: UnixMs(1), status: 200 }),
        verdict(retry(Reason::Timeout, 0)),
        verdict(dead),
    ];
    let tally = Tally::of(&verdicts);
    assert!(!tally.is_clean() && Tally::of(&verdicts[..1]).is_clean());
    metrics.settled(&tally, Settled::Complete, Duration::from_secs(1), false);
    assert_eq!(metrics.totals(), Totals { all: 3, failed: 2 });
    let counts = |m: &DestinationMetrics| {
        (m.0.sent.get(), m.0.retries.get(), m.dead(), m.0.clean.get(), m.0.with_failures.get())
    };
    assert_eq!(counts(&metrics), (1, 1, 1, 0, 1));
    metrics.settled(&tally, Settled::Stale, Duration::from_secs(1), true);
    assert_eq!(counts(&metrics), (2, 1, 1, 0, 1));
}
