//! Times as other systems write them.
//!
//! - RFC 3339, with `T` or a space between date and time and any number of decimals. Without an offset it
//!   is UTC, as the services that leave it out mean it (Amazon SNS's delivery logs do).
//! - Unix time: digits, with decimals if need be. Up to 11 digits before the point are seconds (until the
//!   year 5138), more are milliseconds (since March 1973). So a number of microseconds is refused rather
//!   than read as a year far away.
//!
//! Nothing before 1970 and nothing after 9999 is a time of a message.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::time::UnixMs;

/// What [`read`] takes, for the operator.
pub const EXPECTED: &str = "RFC 3339, or Unix seconds or milliseconds";

/// The last millisecond of the year 9999.
const MS_MAX: u64 = 253_402_300_799_999;

/// From so many digits on, a number counts milliseconds.
const MS_DIGITS: usize = 12;

/// Far more than any time takes.
const BYTES_MAX: usize = 64;

/// Reads a time; decimals beyond milliseconds are dropped. `None` if it is not a time.
pub fn read(text: &str) -> Option<UnixMs> {
    if text.len() > BYTES_MAX {
        return None;
    }
    let ms = if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        unix(text)?
    } else {
        rfc3339(text)?
    };
    (ms <= MS_MAX).then_some(UnixMs(ms))
}

fn unix(text: &str) -> Option<u64> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    if decimals.is_empty() || decimals.contains('.') {
        return None;
    }
    let number: u64 = whole.parse().ok()?;
    if whole.trim_start_matches('0').len() >= MS_DIGITS {
        return Some(number);
    }
    let thousandths = decimals.bytes().chain(*b"00").take(3).map(|digit| u64::from(digit - b'0'));
    number.checked_mul(1000)?.checked_add(thousandths.fold(0, |sum, digit| sum * 10 + digit))
}

fn rfc3339(text: &str) -> Option<u64> {
    // `time` takes any separator; a date and a time of other kinds shall not pass for one.
    if !matches!(text.as_bytes().get(10)?, b'T' | b't' | b' ') {
        return None;
    }
    let clock = text.get(11..)?;
    let has_offset = clock.contains(['Z', 'z', '+', '-']);
    let parsed = if has_offset {
        OffsetDateTime::parse(text, &Rfc3339)
    } else {
        OffsetDateTime::parse(&format!("{text}Z"), &Rfc3339)
    };
    u64::try_from(parsed.ok()?.unix_timestamp_nanos().div_euclid(1_000_000)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_other_systems_write_is_read() {
        for (text, expected) in [
            ("2024-02-29T12:00:00Z", 1_709_208_000_000),
            ("2024-02-29t12:00:00.5z", 1_709_208_000_500),
            ("2024-02-29T13:30:00.123456789+01:30", 1_709_208_000_123),
            ("2016-06-28 00:40:34.558", 1_467_074_434_558),
            ("1970-01-01T00:00:00Z", 0),
            ("9999-12-31T23:59:59.999Z", MS_MAX),
            ("0", 0),
            ("1709208000", 1_709_208_000_000),
            ("1709208000.25", 1_709_208_000_250),
            ("1709208000.1239", 1_709_208_000_123),
            ("1709208000123", 1_709_208_000_123),
            ("1709208000123.9", 1_709_208_000_123),
            ("99999999999", 99_999_999_999_000),
            ("100000000000", 100_000_000_000),
        ] {
            assert_eq!(read(text), Some(UnixMs(expected)), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            ".",
            "1.",
            "1.2.3",
            "-1",
            "1e9",
            "now",
            "1709208000123456",
            "99999999999999999999999",
            "2024-02-30T12:00:00Z",
            "2023-02-29T12:00:00Z",
            "2024-02-29",
            "2024-02-29x12:00:00Z",
            "2024-02-29T25:00:00Z",
            "2024-02-29T12:00:00+0100",
            "29.02.2024 12:00",
            "1969-12-31T23:59:59Z",
            "10000-01-01T00:00:00Z",
            "２024-02-29T12:00:00Z",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text: String) {
            let _ = read(&text); // it must not panic
        }

        #[test]
        fn seconds_and_milliseconds_say_the_same(ms in 100_000_000_000u64..99_999_999_999_999) {
            prop_assert_eq!(read(&ms.to_string()), Some(UnixMs(ms)));
            prop_assert_eq!(read(&format!("{}.{:03}", ms / 1000, ms % 1000)), Some(UnixMs(ms)));
        }
    }
}
