//! What an HTTP answer means for a message (design §10).
//!
//! | answer | outcome |
//! |---|---|
//! | 2xx | sent |
//! | 408, 425, 429, 5xx | retryable, honouring `Retry-After` |
//! | 410 | the destination is gone |
//! | any other 4xx, 3xx | permanent: nothing is followed, nothing is tried again |
//! | anything else | retryable: it is not a final HTTP status |

use std::time::Duration;

use super::{
    outcome::{Outcome, Reason},
    time::UnixMs,
};

/// When the receiver wants to see the message again (RFC 9110 §10.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryAfter {
    /// This long after the answer.
    Delay(Duration),
    /// Not before this instant; an HTTP date, which the adapter has parsed.
    At(UnixMs),
}

impl RetryAfter {
    /// Reads the form in whole seconds: digits and nothing else. More than fits counts as the longest
    /// delay there is, so that [`outcome`] clamps it like any other long one. `None` for anything that is
    /// no such number, negative ones too: it may be a date.
    pub fn parse_seconds(text: &str) -> Option<Self> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        Some(Self::Delay(text.parse().map_or(Duration::MAX, Duration::from_secs)))
    }

    /// The delay as seen from `now`, at most `longest`. A date that has passed asks for nothing.
    fn delay(self, now: UnixMs, longest: Duration) -> Option<Duration> {
        let delay = match self {
            Self::Delay(delay) => delay,
            Self::At(at) if at > now => at.since(now),
            Self::At(_) => return None,
        };
        Some(delay.min(longest))
    }
}

/// The outcome of an answer. `retry_after` counts only for answers that are retried, and is cut to `longest`: a
/// receiver may slow its messages down but not park them for years.
pub fn outcome(status: u16, retry_after: Option<RetryAfter>, now: UnixMs, longest: Duration) -> Outcome {
    match status {
        200..=299 => Outcome::Sent { status },
        408 | 425 | 429 | 500..=599 => Outcome::Retryable {
            status,
            reason: Reason::Status,
            retry_after: retry_after.and_then(|retry_after| retry_after.delay(now, longest)),
        },
        410 => Outcome::Gone,
        300..=499 => Outcome::Permanent { status, reason: Reason::Status },
        _ => Outcome::Retryable { status, reason: Reason::Protocol, retry_after: None },
    }
}

/// The outcome of one message among several in an answer, whose own status is a 2xx. By the same policy; but who answers
/// 2xx is not gone, so 410 is about the message.
pub fn item_outcome(status: u16, retry_after: Option<RetryAfter>, now: UnixMs, longest: Duration) -> Outcome {
    match outcome(status, retry_after, now, longest) {
        Outcome::Gone => Outcome::Permanent { status, reason: Reason::Status },
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);
    const HOUR: Duration = Duration::from_hours(1);

    fn decide(status: u16) -> Outcome {
        outcome(status, None, NOW, HOUR)
    }

    #[test]
    fn f40_every_status_is_in_the_policy_table() {
        for status in 0..=999 {
            let expected = match status {
                200..=299 => Outcome::Sent { status },
                408 | 425 | 429 | 500..=599 => {
                    Outcome::Retryable { status, reason: Reason::Status, retry_after: None }
                }
                410 => Outcome::Gone,
                300..=499 => Outcome::Permanent { status, reason: Reason::Status },
                _ => Outcome::Retryable { status, reason: Reason::Protocol, retry_after: None },
            };
            assert_eq!(decide(status), expected, "{status}");
        }
    }

    #[test]
    fn an_item_s_status_means_the_same_but_for_410() {
        for status in 0..=999 {
            let item = item_outcome(status, None, NOW, HOUR);
            if status == 410 {
                assert_eq!(item, Outcome::Permanent { status, reason: Reason::Status });
            } else {
                assert_eq!(item, decide(status), "{status}");
            }
        }
    }

    #[test]
    fn f39_redirects_are_not_followed() {
        for status in [301, 302, 303, 307, 308] {
            assert_eq!(decide(status), Outcome::Permanent { status, reason: Reason::Status });
        }
    }

    #[test]
    fn f38_retry_after_is_honoured_and_clamped() {
        let ten_years = Duration::from_hours(10 * 365 * 24);
        let cases = [
            (RetryAfter::parse_seconds("0"), Some(Duration::ZERO)),
            (RetryAfter::parse_seconds("120"), Some(Duration::from_mins(2))),
            (RetryAfter::parse_seconds("315360000"), Some(HOUR)),
            (RetryAfter::parse_seconds("99999999999999999999999"), Some(HOUR)),
            (RetryAfter::parse_seconds("-1"), None),
            (RetryAfter::parse_seconds("+1"), None),
            (RetryAfter::parse_seconds("1.5"), None),
            (RetryAfter::parse_seconds(""), None),
            (RetryAfter::parse_seconds("soon"), None),
            (Some(RetryAfter::At(NOW.after(Duration::from_secs(5)))), Some(Duration::from_secs(5))),
            (Some(RetryAfter::At(NOW.after(ten_years))), Some(HOUR)),
            (Some(RetryAfter::At(NOW)), None),
            (Some(RetryAfter::At(UnixMs(0))), None),
        ];
        for (header, retry_after) in cases {
            for status in [408, 425, 429, 500, 503] {
                let expected = Outcome::Retryable { status, reason: Reason::Status, retry_after };
                assert_eq!(outcome(status, header, NOW, HOUR), expected, "{header:?}");
            }
        }
    }

    #[test]
    fn retry_after_means_nothing_to_a_final_answer() {
        let header = RetryAfter::parse_seconds("60");
        for status in [200, 204, 302, 400, 404, 410] {
            assert_eq!(outcome(status, header, NOW, HOUR), decide(status));
        }
    }
}
