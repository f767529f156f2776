//! Send windows: the hours of a week in which requests may begin, as people write them:
//! `Mon-Fri 08:00-20:45 Europe/Berlin`.
//!
//! A window is open while a clock on the wall of its time zone shows one of its hours. So an hour that is skipped in
//! spring is in no window, and one that is repeated in autumn is in its window twice. One that ends before it begins goes
//! over midnight and belongs to the day on which it begins.

use std::{fmt, str::FromStr, time::Duration};

use jiff::{
    Timestamp,
    civil::{self, Date, Weekday},
    tz::{AmbiguousOffset, TimeZone},
};
use serde::{Deserialize, Serialize, de::Error as _};

use super::time::{UnixMs, timestamp};

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// Days that are searched for the next change: a week has each hour once, and a week in which the clocks skip it is
/// followed by one in which they don't.
const SEARCHED_DAYS: i64 = 16;

/// Changes that [`Windows::closed_between`] adds up: years of them.
const CHANGES_MAX: usize = 10_000;

/// How a window is written.
pub const EXAMPLE: &str = "\"Mon-Fri 08:00-20:45 Europe/Berlin\"";

const DAYS: [(&str, &str); 7] = [
    ("mon", "monday"),
    ("tue", "tuesday"),
    ("wed", "wednesday"),
    ("thu", "thursday"),
    ("fri", "friday"),
    ("sat", "saturday"),
    ("sun", "sunday"),
];

/// What is wrong with a window's text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// It has not its three parts.
    #[error("write days, hours and a time zone, such as {EXAMPLE}")]
    Parts,
    /// That is no day of the week.
    #[error(
        "{0:?} is not a day: write Mon, Tue, Wed, Thu, Fri, Sat or Sun, ranges such as Mon-Fri, several with commas"
    )]
    Day(String),
    /// That is no time of the day.
    #[error("{0:?} is not a span of hours: write it from 00:00 to 24:00, such as 08:00-20:45")]
    Hours(String),
    /// It would never be open.
    #[error("{0:?} begins when it ends: write 00:00-24:00 for the whole day")]
    Empty(String),
    /// That is no time of day.
    #[error("{0:?} is not a time of day: write it with its time zone, such as {TIME_EXAMPLE}")]
    Time(String),
    /// That is no time zone.
    #[error("{0:?} is not a time zone: write its IANA name, such as Europe/Berlin, or UTC")]
    Zone(String),
}

/// One window.
#[derive(Clone)]
pub struct Window {
    /// As it was written: what is stored, compared and shown.
    text: String,
    /// Bit 0 is Monday.
    days: u8,
    /// Minutes of the day; `to` may be 24:00.
    from: u16,
    to: u16,
    zone: TimeZone,
}

impl Window {
    /// Its time zone.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    fn is_open(&self, at: Timestamp) -> bool {
        let shown = at.to_zoned(self.zone.clone());
        let minute = shown.hour() as u16 * 60 + shown.minute() as u16;
        let is_day = |day: Weekday| self.days & (1 << day.to_monday_zero_offset()) != 0;
        let today = shown.weekday();
        if self.from < self.to {
            is_day(today) && (self.from..self.to).contains(&minute)
        } else {
            (is_day(today) && minute >= self.from) || (is_day(today.previous()) && minute < self.to)
        }
    }

    /// When it may open or close in the days from `day` on: whenever its clock shows one of its ends, or is changed.
    fn may_change(&self, after: Timestamp) -> impl Iterator<Item = Timestamp> + '_ {
        let first = after.to_zoned(self.zone.clone()).date();
        let days =
            (-1..=SEARCHED_DAYS).filter_map(move |days| first.checked_add(jiff::Span::new().days(days)).ok());
        let ends = days.flat_map(|day| [self.from, self.to % DAY].map(|minute| (day, minute)));
        let shown = ends.flat_map(|(day, minute)| instants(&self.zone, day, minute)).flatten();
        let horizon =
            after.checked_add(jiff::Span::new().hours(24 * SEARCHED_DAYS)).unwrap_or(Timestamp::MAX);
        let changed = self.zone.following(after).map(|change| change.timestamp());
        shown.chain(changed.take_while(move |at| *at <= horizon))
    }
}

/// When the clocks of a zone show that minute of a day: once as a rule, twice when they are set back, never when they skip it.
fn instants(zone: &TimeZone, day: Date, minute: u16) -> [Option<Timestamp>; 2] {
    let time = civil::time((minute / 60) as i8, (minute % 60) as i8, 0, 0);
    let shown = day.to_datetime(time);
    let at = |offset: jiff::tz::Offset| offset.to_timestamp(shown).ok();
    match zone.to_ambiguous_timestamp(shown).offset() {
        AmbiguousOffset::Unambiguous { offset } => [at(offset), None],
        AmbiguousOffset::Fold { before, after } => [at(before), at(after)],
        AmbiguousOffset::Gap { .. } => [None, None],
    }
}

/// A point in time for the operator, in UTC.
pub fn shown(at: UnixMs) -> String {
    timestamp(at).to_string()
}

/// The same by the clock of the wall, beside `now`: `14:02 UTC`, of another day `2026-11-29 14:02 UTC`.
pub fn clock(at: UnixMs, now: UnixMs) -> String {
    by_clock(&TimeZone::UTC, at, now)
}

fn by_clock(zone: &TimeZone, at: UnixMs, now: UnixMs) -> String {
    let (at, now) = (timestamp(at).to_zoned(zone.clone()), timestamp(now).to_zoned(zone.clone()));
    let name = zone.iana_name().unwrap_or("UTC");
    let time = format!("{:02}:{:02} {name}", at.hour(), at.minute());
    if at.date() == now.date() { time } else { format!("{} {time}", at.date()) }
}

fn unix_ms(at: Timestamp) -> UnixMs {
    UnixMs(u64::try_from(at.as_millisecond()).unwrap_or(0))
}

impl FromStr for Window {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let parts: Vec<_> = text.split_whitespace().collect();
        let [days, hours, zone] = match parts[..] {
            [hours, zone] => ["Mon-Sun", hours, zone],
            [days, hours, zone] => [days, hours, zone],
            _ => return Err(WindowError::Parts),
        };
        let wrong = || WindowError::Hours(hours.to_owned());
        let (from, to) = hours.split_once('-').ok_or_else(wrong)?;
        let (from, to) = (minute_of(from).ok_or_else(wrong)?, minute_of(to).ok_or_else(wrong)?);
        if from == DAY {
            return Err(wrong());
        }
        if from == to {
            return Err(WindowError::Empty(hours.to_owned()));
        }
        let days = days_of(days)?;
        let zone = zone_of(zone)?;
        Ok(Self { text: parts.join(" "), days, from, to, zone })
    }
}

/// A time zone by its IANA name: as this machine's database has it, or the one that is compiled in.
pub fn zone_of(name: &str) -> Result<TimeZone, WindowError> {
    TimeZone::get(name).map_err(|_| WindowError::Zone(name.to_owned()))
}

fn days_of(text: &str) -> Result<u8, WindowError> {
    let day = |word: &str| {
        let lower = word.to_ascii_lowercase();
        let found = DAYS.iter().position(|(short, long)| lower == *short || lower == *long);
        found.ok_or_else(|| WindowError::Day(word.to_owned()))
    };
    let mut days = 0;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        // Sat-Mon goes over the end of the week.
        let count = (last + 7 - first) % 7 + 1;
        for offset in 0..count {
            days |= 1 << ((first + offset) % 7);
        }
    }
    Ok(days)
}

fn minute_of(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let digits = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(hour) || !digits(minute) {
        return None;
    }
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    (minute < 60 && hour * 60 + minute <= DAY).then_some(hour * 60 + minute)
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({:?})", self.text)
    }
}

impl PartialEq for Window {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Window {}

impl std::hash::Hash for Window {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl Serialize for Window {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Window {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A time of day as people write it: `09:00 Europe/Berlin`.
#[derive(Clone)]
pub struct TimeOfDay {
    /// As it was written.
    text: String,
    minute: u16,
    zone: TimeZone,
}

/// How a time of day is written.
pub const TIME_EXAMPLE: &str = "\"09:00 Europe/Berlin\"";

impl TimeOfDay {
    /// When it is so late next after `after`. Where the clocks skip it that day, it is so the day after.
    pub fn next(&self, after: UnixMs) -> Option<UnixMs> {
        let today = timestamp(after).to_zoned(self.zone.clone()).date();
        let days =
            (0..=SEARCHED_DAYS).filter_map(|days| today.checked_add(jiff::Span::new().days(days)).ok());
        let shown = days.flat_map(|day| instants(&self.zone, day, self.minute)).flatten();
        shown.map(unix_ms).find(|at| *at > after)
    }
}

impl FromStr for TimeOfDay {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let parts: Vec<_> = text.split_whitespace().collect();
        let [time, zone] = parts[..] else { return Err(WindowError::Time(text.to_owned())) };
        let minute = minute_of(time).filter(|minute| *minute < DAY);
        let minute = minute.ok_or_else(|| WindowError::Time(text.to_owned()))?;
        Ok(Self { text: parts.join(" "), minute, zone: zone_of(zone)? })
    }
}

impl fmt::Debug for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TimeOfDay({:?})", self.text)
    }
}

impl PartialEq for TimeOfDay {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for TimeOfDay {}

/// Several windows, of which one must be open; without any, requests may begin at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Windows(pub Vec<Window>);

impl Windows {
    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether requests may begin at `at`.
    pub fn is_open(&self, at: UnixMs) -> bool {
        self.is_open_at(timestamp(at))
    }

    fn is_open_at(&self, at: Timestamp) -> bool {
        self.0.is_empty() || self.0.iter().any(|window| window.is_open(at))
    }

    /// When that changes next after `at`; `None` if it does not within two weeks.
    pub fn next_change(&self, at: UnixMs) -> Option<UnixMs> {
        let at = timestamp(at);
        let is_open = self.is_open_at(at);
        let later = self.0.iter().flat_map(|window| window.may_change(at)).filter(|change| *change > at);
        let mut later: Vec<_> = later.collect();
        later.sort_unstable();
        later.dedup();
        later.into_iter().find(|change| self.is_open_at(*change) != is_open).map(unix_ms)
    }

    /// A point in time by the clock that they go by; of several clocks by that of UTC.
    pub fn clock(&self, at: UnixMs, now: UnixMs) -> String {
        let mut zones = self.0.iter().map(Window::zone);
        let zone = zones.next().filter(|zone| zones.all(|other| other == *zone));
        zone.map_or_else(|| clock(at, now), |zone| by_clock(zone, at, now))
    }

    /// Until when nothing may begin, if it is so at `at`. It is to be asked again then.
    pub fn closed_until(&self, at: UnixMs) -> Option<UnixMs> {
        if self.is_open(at) {
            return None;
        }
        let searched = at.after(Duration::from_hours(24 * SEARCHED_DAYS as u64));
        Some(self.next_change(at).unwrap_or(searched))
    }

    /// How much of the time from `from` to `to` they were closed.
    pub fn closed_between(&self, from: UnixMs, to: UnixMs) -> Duration {
        let mut closed = Duration::ZERO;
        let mut at = from;
        for _ in 0..CHANGES_MAX {
            if at >= to || self.0.is_empty() {
                break;
            }
            let next = self.next_change(at).unwrap_or(to).min(to);
            if !self.is_open(at) {
                closed += next.since(at);
            }
            at = next;
        }
        closed
    }

    /// When `work` is done that begins at `from` and goes on only while they are open.
    pub fn done_at(&self, from: UnixMs, work: Duration) -> UnixMs {
        let (mut at, mut left) = (from, work);
        for _ in 0..CHANGES_MAX {
            if let Some(opens) = self.closed_until(at) {
                at = opens;
                continue;
            }
            match self.next_change(at) {
                Some(closes) if at.after(left) > closes => {
                    left = left.saturating_sub(closes.since(at));
                    at = closes;
                }
                _ => break,
            }
        }
        at.after(left)
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, window) in self.0.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{window}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn windows(texts: &[&str]) -> Windows {
        Windows(
            texts.iter().map(|text| text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))).collect(),
        )
    }

    fn at(text: &str) -> UnixMs {
        unix_ms(text.parse().unwrap())
    }

    #[test]
    fn a_working_week_opens_and_closes_to_the_minute() {
        let week = windows(&["Mon-Fri 08:00-20:45 Europe/Berlin"]);
        // A Friday in winter.
        assert!(!week.is_open(at("2026-12-04T07:59:59.999+01:00")));
        assert!(week.is_open(at("2026-12-04T08:00:00+01:00")));
        assert!(week.is_open(at("2026-12-04T20:44:59.999+01:00")));
        assert!(!week.is_open(at("2026-12-04T20:45:00+01:00")));
        assert_eq!(week.next_change(at("2026-12-04T12:00:00+01:00")), Some(at("2026-12-04T20:45:00+01:00")));
        let monday = at("2026-12-07T08:00:00+01:00");
        assert_eq!(week.closed_until(at("2026-12-04T20:45:00+01:00")), Some(monday));
        assert_eq!(week.closed_until(monday), None);
    }

    #[test]
    fn what_goes_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let night = windows(&["Fri 22:00-06:00 UTC"]);
        assert!(night.is_open(at("2026-12-04T22:00:00Z")) && night.is_open(at("2026-12-05T05:59:59Z")));
        assert!(!night.is_open(at("2026-12-04T05:59:59Z")) && !night.is_open(at("2026-12-05T22:00:00Z")));
        let evening = windows(&["Fri 22:00-24:00 UTC", "Sat 00:00-06:00 UTC"]);
        let noon = at("2026-12-04T12:00:00Z");
        assert_eq!(night.next_change(noon), evening.next_change(noon));
        let opened = at("2026-12-04T22:00:00Z");
        assert_eq!(evening.next_change(opened), Some(at("2026-12-05T06:00:00Z")), "the two are one");
        assert_eq!(windows(&["Fri 22:00-00:00 UTC"]).next_change(opened), Some(at("2026-12-05T00:00:00Z")));
    }

    #[test]
    fn an_hour_that_is_skipped_is_in_no_window() {
        // On 2026-03-29 the clocks of Berlin go from 02:00 to 03:00.
        let skipped = windows(&["Sun 02:00-03:00 Europe/Berlin"]);
        let before = at("2026-03-28T12:00:00+01:00");
        assert_eq!(skipped.next_change(before), Some(at("2026-04-05T02:00:00+02:00")), "a week later");
        let half = windows(&["Sun 02:30-04:00 Europe/Berlin"]);
        assert_eq!(
            half.next_change(before),
            Some(at("2026-03-29T03:00:00+02:00")),
            "as the clocks are changed"
        );
        let day = windows(&["Sun 01:00-05:00 Europe/Berlin"]);
        let opens = at("2026-03-29T01:00:00+01:00");
        assert_eq!(day.next_change(before), Some(opens));
        assert_eq!(day.next_change(opens), Some(opens.after(Duration::from_hours(3))), "an hour less");
    }

    #[test]
    fn an_hour_that_is_repeated_is_in_its_window_twice() {
        // On 2026-10-25 they go from 03:00 back to 02:00.
        let twice = windows(&["Sun 02:00-02:30 Europe/Berlin"]);
        let mut change = at("2026-10-24T12:00:00+02:00");
        let mut changes = Vec::new();
        for _ in 0..5 {
            change = twice.next_change(change).unwrap();
            changes.push(change);
        }
        let expected = [
            "2026-10-25T02:00:00+02:00",
            "2026-10-25T02:30:00+02:00",
            "2026-10-25T02:00:00+01:00",
            "2026-10-25T02:30:00+01:00",
            "2026-11-01T02:00:00+01:00",
        ];
        assert_eq!(changes, expected.map(at));
        let day = windows(&["Sun 01:00-05:00 Europe/Berlin"]);
        let opens = at("2026-10-25T01:00:00+02:00");
        assert_eq!(day.next_change(opens), Some(opens.after(Duration::from_hours(5))), "an hour more");
    }

    #[test]
    fn a_time_of_day_comes_every_day_on_which_its_clock_shows_it() {
        let nine: TimeOfDay = " 09:00  Europe/Berlin".parse().unwrap();
        assert_eq!(nine.next(at("2026-12-04T08:59:59+01:00")), Some(at("2026-12-04T09:00:00+01:00")));
        assert_eq!(nine.next(at("2026-12-04T09:00:00+01:00")), Some(at("2026-12-05T09:00:00+01:00")));
        let skipped: TimeOfDay = "02:30 Europe/Berlin".parse().unwrap();
        assert_eq!(skipped.next(at("2026-03-28T12:00:00+01:00")), Some(at("2026-03-30T02:30:00+02:00")));
        for (text, says) in [
            ("09:00", "write it with its time zone"),
            ("24:00 UTC", "is not a time of day"),
            ("9:00 UTC", "is not a time of day"),
            ("09:00 Europe/Berlni", "is not a time zone"),
        ] {
            let error = text.parse::<TimeOfDay>().expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_moment_is_shown_by_the_clock_of_the_window_and_with_its_date_if_that_is_another() {
        let now = at("2026-12-04T07:00:00+01:00");
        let week = windows(&["Mon-Fri 08:00-20:45 Europe/Berlin"]);
        assert_eq!(week.clock(at("2026-12-04T08:00:00+01:00"), now), "08:00 Europe/Berlin");
        assert_eq!(week.clock(at("2026-12-07T08:00:00+01:00"), now), "2026-12-07 08:00 Europe/Berlin");
        let two = windows(&["08:00-20:45 Europe/Berlin", "22:00-23:00 UTC"]);
        assert_eq!(two.clock(at("2026-12-04T08:00:00+01:00"), now), "07:00 UTC");
        assert_eq!(clock(UnixMs(u64::MAX), UnixMs(0)), "9999-12-30 22:00 UTC");
    }

    #[test]
    fn what_is_always_open_never_changes() {
        for always in [
            windows(&[]),
            windows(&["00:00-24:00 Europe/Berlin"]),
            windows(&["12:00-00:00 UTC", "00:00-12:00 UTC"]),
        ] {
            assert_eq!(
                (always.next_change(UnixMs(7)), always.closed_until(UnixMs(7))),
                (None, None),
                "{always}"
            );
            assert_eq!(always.closed_between(UnixMs(0), UnixMs(9_000_000_000)), Duration::ZERO);
        }
    }

    #[test]
    fn what_is_written_wrong_is_said() {
        for (text, says) in [
            ("", "write days, hours and a time zone"),
            ("Mon-Fri 08:00-20:00", "\"Mon-Fri\" is not a span of hours"),
            ("08:00 - 20:00 UTC", "write days, hours and a time zone"),
            ("Mo-Fr 08:00-20:00 UTC", "\"Mo\" is not a day"),
            ("Mon 8:00-20:00 UTC", "\"8:00-20:00\" is not a span of hours"),
            ("Mon 08:00-24:01 UTC", "is not a span of hours"),
            ("Mon 24:00-08:00 UTC", "is not a span of hours"),
            ("Mon 08:00-08:00 UTC", "write 00:00-24:00"),
            ("Mon 08:00-20:00 Europe/Berlni", "\"Europe/Berlni\" is not a time zone"),
        ] {
            let error = text.parse::<Window>().expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let window: Window = "  monday,Sat-Sun   08:00-20:00 UTC ".parse().unwrap();
        assert_eq!(
            (window.days, window.to_string().as_str()),
            (0b110_0001, "monday,Sat-Sun 08:00-20:00 UTC")
        );
    }

    const ZONES: [&str; 6] = [
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kathmandu",
        "America/Santiago",
        "UTC",
    ];

    fn any_window() -> impl Strategy<Value = Window> {
        (1u8..128, 0u16..1_440, 0u16..1_440, prop::sample::select(&ZONES[..])).prop_filter_map(
            "it is not empty",
            |(days, from, to, zone)| {
                let names: Vec<_> = DAYS
                    .iter()
                    .enumerate()
                    .filter(|(day, _)| days & (1 << day) != 0)
                    .map(|(_, (name, _))| *name)
                    .collect();
                let hours = format!("{:02}:{:02}-{:02}:{:02}", from / 60, from % 60, to / 60, to % 60);
                format!("{} {hours} {zone}", names.join(",")).parse().ok()
            },
        )
    }

    /// By the clock on the wall alone, minute by minute.
    fn shows(window: &Window, at: UnixMs) -> bool {
        let shown = timestamp(at).to_zoned(window.zone.clone());
        let of_week = |day: Weekday, minute: u16| {
            u64::from(day.to_monday_zero_offset() as u8) * 1_440 + u64::from(minute)
        };
        let now = of_week(shown.weekday(), shown.hour() as u16 * 60 + shown.minute() as u16);
        let length = (u64::from(window.to) + 1_440 - u64::from(window.from)) % 1_440;
        (0..7u64).filter(|day| window.days & (1 << day) != 0).any(|day| {
            let since = (now + 7 * 1_440 - (day * 1_440 + u64::from(window.from))) % (7 * 1_440);
            since < length
        })
    }

    proptest! {
        /// 2026-01-01 to 2028: both changes of the clocks, in both hemispheres.
        #[test]
        fn b11_a_window_is_open_when_its_clock_shows_so_and_changes_when_it_says(
            several in prop::collection::vec(any_window(), 1..4),
            start in 1_767_225_600u64..1_830_000_000,
        ) {
            let windows = Windows(several);
            let start = UnixMs(start * 1_000);
            let is_open = windows.is_open(start);
            prop_assert_eq!(is_open, windows.0.iter().any(|window| shows(window, start)));
            prop_assert_eq!(windows.closed_until(start).is_some(), !is_open);
            let step = Duration::from_mins(1);
            let end = windows.next_change(start).unwrap_or_else(|| start.after(Duration::from_hours(48)));
            prop_assert!(end > start);
            // Minute by minute nothing changes before that; and it does then.
            let mut at = start;
            let mut checked = 0;
            while at < end && checked < 5_000 {
                prop_assert_eq!(windows.is_open(at), is_open, "{} at {:?}", windows, timestamp(at));
                at = at.after(step);
                checked += 1;
            }
            if windows.next_change(start).is_some() {
                prop_assert_eq!(windows.is_open(end.before(Duration::from_millis(1))), is_open);
                prop_assert_eq!(windows.is_open(end), !is_open);
            }
        }

        #[test]
        fn what_is_open_and_what_is_closed_are_all_there_is(
            several in prop::collection::vec(any_window(), 1..3),
            start in 1_767_225_600u64..1_830_000_000,
            hours in 0u64..400,
        ) {
            let windows = Windows(several);
            let from = UnixMs(start * 1_000);
            let to = from.after(Duration::from_hours(hours));
            let closed = windows.closed_between(from, to);
            prop_assert!(closed <= to.since(from));
            let open = to.since(from).checked_sub(closed).expect("it was not closed for longer");
            let done = windows.done_at(from, open);
            // Work that takes as long as they were open is done by then, and no earlier than when they closed last.
            prop_assert!(windows.closed_between(from, done) + open == done.since(from), "{} {:?} {:?}", windows, done, to);
        }

        #[test]
        fn what_is_stored_reads_back(window in any_window()) {
            let json = serde_json::to_string(&window).unwrap();
            let read: Window = serde_json::from_str(&json).unwrap();
            prop_assert_eq!((read.days, read.from, read.to), (window.days, window.from, window.to));
            prop_assert_eq!(read, window);
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,30}|[a-zA-Z,-]{0,9} [0-9:-]{0,12} [A-Za-z/]{0,14}") {
            let _ = text.parse::<Window>();
        }
    }
}
