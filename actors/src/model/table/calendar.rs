//! Dates and times as texts. The calendar is the proleptic Gregorian one, as RFC 3339 and Postgres have it.

use std::fmt::Write as _;

const DAY_S: i64 = 86_400;

/// From this magnitude on, a bare number counts milliseconds, not seconds: as seconds it would be the year 5138.
const MILLISECONDS_FROM: i64 = 100_000_000_000;

/// The first and last second that have a year of four digits.
const FIRST_S: i64 = days_of(1, 1, 1) * DAY_S;
const LAST_S: i64 = days_of(10_000, 1, 1) * DAY_S - 1;

/// Days from 1970-01-01 to a date of the proleptic Gregorian calendar: whole cycles of 400 years, then years that
/// begin in March, so that the leap day is a year's last.
const fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let march_year = if month > 2 { year } else { year - 1 };
    let cycle = march_year.div_euclid(400);
    let year_of_cycle = march_year.rem_euclid(400);
    let months_since_march = (month + 9) % 12;
    let day_of_year = (153 * months_since_march + 2) / 5 + day - 1;
    let day_of_cycle = year_of_cycle * 365 + year_of_cycle / 4 - year_of_cycle / 100 + day_of_year;
    // 719,468 days lie between 0000-03-01 and 1970-01-01; a cycle has 146,097.
    cycle * 146_097 + day_of_cycle - 719_468
}

/// The date so many days after 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let cycle = shifted.div_euclid(146_097);
    let day_of_cycle = shifted.rem_euclid(146_097);
    // Leap days before that day of the cycle are taken out, so that every year has 365 days.
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let months_since_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months_since_march + 2) / 5 + 1;
    let month = (months_since_march + 2) % 12 + 1;
    (cycle * 400 + year_of_cycle + i64::from(month <= 2), month, day)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// `YYYY-MM-DD` of an existing day.
pub(super) fn date(text: &str) -> Option<String> {
    parse_date(text.as_bytes())?;
    Some(text.to_owned())
}

/// Digits alone, as many as there are.
fn number(bytes: &[u8]) -> Option<i64> {
    bytes.iter().try_fold(0i64, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(i64::from(digit))
    })
}

/// Days since 1970-01-01.
fn parse_date(text: &[u8]) -> Option<i64> {
    if text.len() != 10 || text[4] != b'-' || text[7] != b'-' {
        return None;
    }
    let (year, month, day) = (number(&text[..4])?, number(&text[5..7])?, number(&text[8..])?);
    let exists = year >= 1 && (1..=12).contains(&month) && (1..=days_in(year, month)).contains(&day);
    exists.then(|| days_of(year, month, day))
}

/// Any of the forms, as `YYYY-MM-DD HH:MM:SS.ffffff+00`: in UTC, to the microsecond, what is finer cut off.
pub(super) fn timestamp(text: &str) -> Option<String> {
    let is_number = !text.contains(':');
    let (seconds, micros) = if is_number { unix(text)? } else { rfc_3339(text)? };
    if !(FIRST_S..=LAST_S).contains(&seconds) {
        return None;
    }
    let (year, month, day) = date_of(seconds.div_euclid(DAY_S));
    let second_of_day = seconds.rem_euclid(DAY_S);
    let (hour, minute, second) = (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    let mut text = String::with_capacity(29);
    // Writing to a String can't fail.
    let _ = write!(text, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}+00");
    Some(text)
}

/// Seconds and microseconds since 1970. A fraction of seconds may follow a point.
fn unix(text: &str) -> Option<(i64, i64)> {
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(unsigned) => (true, unsigned),
        None => (false, text),
    };
    let (whole, fraction) = match unsigned.split_once('.') {
        Some((whole, fraction)) => (whole, micros_of(fraction.as_bytes())?),
        None => (unsigned, 0),
    };
    if whole.is_empty() {
        return None;
    }
    let whole = number(whole.as_bytes())?;
    let micros = if whole >= MILLISECONDS_FROM {
        whole.checked_mul(1_000)?.checked_add(fraction / 1_000)?
    } else {
        whole * 1_000_000 + fraction
    };
    let micros = if negative { -micros } else { micros };
    Some((micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000)))
}

/// The digits behind a point as microseconds, what is finer cut off.
fn micros_of(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() {
        return None;
    }
    number(digits.get(6..).unwrap_or_default().get(..12).unwrap_or_default())?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let kept = &digits[..digits.len().min(6)];
    Some(number(kept)? * 10i64.pow(6 - kept.len() as u32))
}

/// RFC 3339, section 5.6: `T` may be a space (its note), a leap second is the next minute's first second.
fn rfc_3339(text: &str) -> Option<(i64, i64)> {
    let bytes = text.as_bytes();
    let days = parse_date(bytes.get(..10)?)?;
    let time = bytes.get(10..)?;
    let clock = time.get(..9)?;
    if !matches!(clock[0], b'T' | b't' | b' ') || clock[3] != b':' || clock[6] != b':' {
        return None;
    }
    let (hour, minute, second) = (number(&clock[1..3])?, number(&clock[4..6])?, number(&clock[7..9])?);
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let rest = &time[9..];
    let (micros, offset) = match rest.strip_prefix(b".") {
        Some(rest) => {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            (micros_of(&rest[..digits])?, &rest[digits..])
        }
        None => (0, rest),
    };
    let offset_s = match offset {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = hours * 3_600 + minutes * 60;
            if *sign == b'-' { -offset } else { offset }
        }
        _ => return None,
    };
    Some((days * DAY_S + hour * 3_600 + minute * 60 + second - offset_s, micros))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form_is_the_same_instant() {
        let expected = Some("2023-11-14 22:13:20.500000+00".to_owned());
        for text in [
            "2023-11-14T22:13:20.5Z",
            "2023-11-14t22:13:20.500000999z",
            "2023-11-15 00:13:20.5+02:00",
            "2023-11-14T16:43:20.5-05:30",
            "1700000000.5",
            "1700000000500",
        ] {
            assert_eq!(timestamp(text), expected, "{text}");
        }
        assert_eq!(timestamp("-1").as_deref(), Some("1969-12-31 23:59:59.000000+00"));
        assert_eq!(timestamp("2016-12-31T23:59:60Z").as_deref(), Some("2017-01-01 00:00:00.000000+00"));
        assert_eq!(timestamp("0").as_deref(), Some("1970-01-01 00:00:00.000000+00"));
        assert_eq!(timestamp("0001-01-01T00:00:00Z").as_deref(), Some("0001-01-01 00:00:00.000000+00"));
    }

    #[test]
    fn what_is_no_instant_or_needs_a_guess_is_refused() {
        for text in [
            "2023-11-14T22:13:20", // of which place?
            "2023-11-14",
            "2023-02-29T00:00:00Z",
            "2023-13-01T00:00:00Z",
            "2023-11-14T24:00:00Z",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20+0200",
            "2023-11-14T22:13:20+24:00",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59-00:01",
            "99999999999999999999",
            "253402300800000",
            "1e9",
            "1.",
            ".5",
            "-",
            "--1",
            "now",
            "infinity",
            "1700000000.5x",
            "1700000000.1234567x",
            "２０２３-11-14T22:13:20Z",
            "2023-11-14T22:13:2é",
        ] {
            assert_eq!(timestamp(text), None, "{text}");
        }
        for text in
            ["2023-02-29", "2023-1-1", "0000-01-01", "10000-01-01", "2023-01-01 ", "20230101", "2023/01/01"]
        {
            assert_eq!(date(text), None, "{text}");
        }
        assert_eq!(date("2024-02-29").as_deref(), Some("2024-02-29"));
    }

    proptest! {
        #[test]
        fn days_and_dates_are_inverse_and_consecutive(days in -719_162i64..2_932_896) {
            let (year, month, day) = date_of(days);
            prop_assert_eq!(days_of(year, month, day), days);
            prop_assert!((1..=days_in(year, month)).contains(&day));
            let next = date_of(days + 1);
            let expected = if day < days_in(year, month) {
                (year, month, day + 1)
            } else if month < 12 {
                (year, month + 1, 1)
            } else {
                (year + 1, 1, 1)
            };
            prop_assert_eq!(next, expected);
        }

        #[test]
        fn no_text_makes_it_panic_and_what_it_writes_reads_back(text in "[-+0-9TtZz:. é]{0,40}") {
            let _ = date(&text);
            if let Some(written) = timestamp(&text) {
                let again = written.replace("+00", "Z");
                prop_assert_eq!(timestamp(&again), Some(written));
            }
        }
    }
}
