//! How values are shown. What is not known is a dash, never 0.

use serde_json::Value;

use super::views::Kind;
use crate::telemetry::escape;

/// What is not known.
const UNKNOWN: &str = "–";

/// A value of a kind; `None` and null are not known.
pub(super) fn shown(value: Option<&Value>, kind: Kind) -> String {
    let Some(value) = value.filter(|value| !value.is_null()) else { return UNKNOWN.to_owned() };
    match (kind, value) {
        (Kind::Text, Value::String(text)) => escape(text).into_owned(),
        (Kind::Text, Value::Bool(is)) => if *is { "yes" } else { "no" }.to_owned(),
        (Kind::Text, other) => escape(&other.to_string()).into_owned(),
        (Kind::Moment, Value::String(at)) => moment(at),
        (Kind::Moment, _) => UNKNOWN.to_owned(),
        (kind, value) => value.as_f64().map_or(UNKNOWN.to_owned(), |number| match kind {
            Kind::Percent => format!("{}", number.floor()),
            Kind::PerS if number < 10.0 => format!("{number:.1}"),
            Kind::Time => duration(number),
            _ => thousands(number.round() as u64),
        }),
    }
}

/// `1,234,567`.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let grouped = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group));
    grouped.collect::<Vec<_>>().join(",")
}

/// `12 s`, `4 min`, `3 h 20`: rounded up, so that nothing is promised too early.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).ceil() as u64;
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5_999 => format!("{} min", seconds.div_ceil(60)),
        _ => {
            let minutes = seconds.div_ceil(60);
            format!("{} h {:02}", minutes / 60, minutes % 60)
        }
    }
}

/// The time of day of an RFC 3339 time in UTC.
fn moment(at: &str) -> String {
    match at.split_once('T') {
        Some((_, time)) if time.is_ascii() && time.len() >= 9 => format!("{}Z", &time[..8]),
        _ => escape(at).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_known_is_no_number() {
        for kind in [Kind::Text, Kind::Count, Kind::PerS, Kind::Percent, Kind::Time, Kind::Moment] {
            assert_eq!(shown(None, kind), UNKNOWN);
            assert_eq!(shown(Some(&Value::Null), kind), UNKNOWN);
        }
        assert_eq!(shown(Some(&json!("many")), Kind::Count), UNKNOWN);
        assert_eq!(shown(Some(&json!(7)), Kind::Moment), UNKNOWN);
    }

    #[test]
    fn numbers_round_so_that_they_promise_nothing() {
        let as_shown = |value: Value, kind| shown(Some(&value), kind);
        assert_eq!(as_shown(json!(99.9), Kind::Percent), "99");
        assert_eq!(as_shown(json!(48_211), Kind::Count), "48,211");
        assert_eq!(as_shown(json!(1_000_000), Kind::Count), "1,000,000");
        assert_eq!(
            (as_shown(json!(0.42), Kind::PerS), as_shown(json!(1_234.6), Kind::PerS)),
            ("0.4".into(), "1,235".into())
        );
        assert_eq!(as_shown(json!(59.2), Kind::Time), "60 s");
        assert_eq!(
            (as_shown(json!(121), Kind::Time), as_shown(json!(12_001), Kind::Time)),
            ("3 min".into(), "3 h 21".into())
        );
        assert_eq!(as_shown(json!("2026-11-30T18:22:04.071Z"), Kind::Moment), "18:22:04Z");
    }

    #[test]
    fn f27_nothing_drives_the_terminal() {
        let shown = shown(Some(&json!("a\u{1b}[2J\nb")), Kind::Text);
        assert!(!shown.contains(char::is_control), "{shown}");
        assert!(!moment("2026\u{1b}[2J").contains(char::is_control));
    }
}
