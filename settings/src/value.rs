//! Times and sizes as people write them.

use std::time::Duration;

/// What to write instead of something that is not a time.
pub(crate) const DURATION: &str =
    "a time with its unit in quotes, such as \"250ms\", \"5s\", \"30m\" or \"14d\"";

/// What to write instead of something that is not a size.
pub(crate) const SIZE: &str = "a size with its unit in quotes, such as \"512B\", \"64KiB\" or \"1MiB\"";

const DURATION_UNITS: [(&str, u128); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Powers of 1024 and, for those who count in thousands, of 1000.
const SIZE_UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("KB", 1_000),
    ("B", 1),
];

/// Whether a text is a number without a unit. `0` is refused too: a file in which some numbers go bare invites
/// others to follow.
pub(crate) fn is_bare(text: &str) -> bool {
    let text = text.trim();
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || b"._-".contains(&byte))
}

/// `5s`, `250ms`, `1h 30m`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if is_bare(text) { None } else { humantime::parse_duration(text.trim()).ok() }
}

/// A time in the largest unit that it is a whole number of. Anything below a millisecond is dropped.
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis == 0 {
        return "0s".into();
    }
    let whole = DURATION_UNITS.iter().find(|(_, unit)| millis.is_multiple_of(*unit));
    let (name, unit) = whole.expect("every time is a whole number of milliseconds");
    format!("{}{name}", millis / unit)
}

/// `512B`, `64KiB`, `1MB`.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|first: char| first.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// A size in the largest unit, of those with powers of 1024, that it is a whole number of.
pub fn show_size(bytes: u64) -> String {
    if bytes == 0 {
        return "0B".into();
    }
    let whole = SIZE_UNITS[..4].iter().find(|(_, unit)| bytes.is_multiple_of(*unit));
    match whole {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_and_sizes_read_as_people_write_them() {
        for (text, millis) in
            [("5s", 5_000), ("250ms", 250), ("30m", 1_800_000), ("1h 30m", 5_400_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse_duration("14d"), Some(Duration::from_hours(14 * 24)));
        for (text, bytes) in
            [("512B", 512), ("64KiB", 65_536), ("1 MiB", 1 << 20), ("64kB", 64_000), ("0B", 0)]
        {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in ["", "5", "0", "5.5", "-5s", "s", "5 parsecs", "99999999999999999999d"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        for text in ["", "64", "0", "KiB", "64Ki", "64 kib", "-1B", "1.5MiB", "99999999TiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(millis in 0u64..10_000_000_000, bytes in any::<u64>()) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&show_duration(duration)), Some(duration));
            prop_assert_eq!(parse_size(&show_size(bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,20}|[0-9]{0,25}[a-zA-Z ]{0,4}") {
            let _ = (parse_duration(&text), parse_size(&text));
        }
    }
}
