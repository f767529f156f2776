//! What a feed's configuration says of when its files' messages may go, and how it is read.

use std::{path::Path, time::Duration};

use jiff::{Timestamp, civil::DateTime};
use postrider_settings::{
    Keys, Page, Problems, Reader, Section, duration, finish, integer, layers, settings, shown_text, unset,
};

use super::{
    priority::Priority,
    terms::{Rate, Terms},
    time::UnixMs,
    window::{TimeOfDay, Window, Windows},
};

settings! {
    /// When messages may go.
    TermKeys {
        /// When requests may begin: days, hours and a time zone, or a list of such windows of which one must be open; by
        /// default at any time. It is open while a clock on the wall there shows so, and may go over midnight: Fri
        /// 22:00-06:00. What is in flight when it closes ends.
        window: Option<Windows> = unset("\"Mon-Fri 08:00-20:45 Europe/Berlin\"", windows);
        /// No message goes before then: a time with its offset, or without one by the clock of the window.
        not_before: Option<String> = unset("\"2026-12-01T08:00:00+01:00\"", date);
        /// Messages that are not sent this long after their file was claimed end as unsent, even while they wait for a paused
        /// destination or a closed window. 0s: no limit.
        expires_after: Option<Duration> = duration("0s", "0s"..="365d").or_none();
        /// How many messages of all of the feed's files together go to a destination, in addition to the destination's own rate.
        /// Each process has it for itself. 0: no limit.
        rate_per_s: Option<u32> = integer(0, 0..=10_000_000, "messages per second").or_none();
        /// When a file is to be done: a time of day with its time zone, the next one after it was claimed; or a point in time.
        /// Nothing goes faster for it: `postrider files`, `watch` and `status` say when a file will not be done by then.
        finish_by: Option<String> = unset("\"09:00 Europe/Berlin\"", date);
    }

    /// What only one file can have.
    FileKeys {
        /// Messages that are not sent by then end as unsent: as `expires_after`, at a point in time.
        expires_at: Option<String> = unset("\"2026-12-01T18:00:00+01:00\"", date);
        /// Where its rows go: some of its feed's destinations.
        destinations: Option<Vec<(String, String)>> = unset("[\"support\"]", names);
        /// How urgent it is, instead of its feed's `priority`.
        priority: Option<Priority> = unset("\"urgent\"", priority);
    }
}

/// What is said of the files of a feed, or of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// As [`Terms::not_before`].
    pub not_before: Option<UnixMs>,
    /// As [`Terms::expires_at`].
    pub expires_at: Option<UnixMs>,
    /// The same, counted from when the file is claimed.
    pub expires_after: Option<Duration>,
    /// As [`Terms::windows`]; `None` if nothing is said of them.
    pub windows: Option<Windows>,
    /// As [`Terms::rate`].
    pub rate: Option<Rate>,
    /// When a file is to be done.
    pub finish_by: Option<Deadline>,
    /// Where rows go.
    pub destinations: Vec<String>,
    /// How urgent a file is, if that is said of it alone.
    pub priority: Option<Priority>,
}

/// When a file is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// When it is so late next.
    Daily(TimeOfDay),
    /// Then.
    At(UnixMs),
}

impl Conditions {
    /// Reads those of a feed: the keys of [`TermKeys`]. What is wrong is noted.
    pub fn read(section: &mut Section<'_>) -> Self {
        Self::of(TermKeys::read(section), section, None)
    }

    fn of(keys: TermKeys, section: &Section<'_>, others: Option<&Self>) -> Self {
        let windows = keys.window;
        let clock = windows.as_ref().or_else(|| others?.windows.as_ref());
        let not_before = keys.not_before.and_then(|text| moment(section, "not_before", &text, clock));
        let expires_after = keys.expires_after;
        let finish_by = keys.finish_by.and_then(|text| deadline(section, &text, clock));
        let rate = keys.rate_per_s.map(|per_s| Rate { per_s, of_feed: others.is_none() });
        Self { not_before, expires_after, windows, rate, finish_by, ..Self::default() }
    }

    /// Reads what is said of one file, over what `feed` says of all. `file` is how problems name it.
    pub fn of_sidecar(text: &str, file: &Path, feed: &Self) -> Result<Self, Problems> {
        let defaults = Page::default().keys::<TermKeys>().keys::<FileKeys>().finish();
        let (tree, problems) =
            layers(&defaults, text, []).map_err(|list| Problems { file: file.to_owned(), list })?;
        let reader = Reader::default();
        let mut section = Section::root(&reader, tree);
        let keys = TermKeys::read(&mut section);
        let FileKeys { expires_at, destinations, priority } = FileKeys::read(&mut section);
        let mut own = Self::of(keys, &section, Some(feed));
        let clock = own.windows.as_ref().or(feed.windows.as_ref());
        own.priority = priority;
        own.expires_at = expires_at.and_then(|text| moment(&section, "expires_at", &text, clock));
        if let (Some(begins), Some(ends)) = (own.not_before, own.expires_at)
            && ends <= begins
        {
            reader.note("expires_at", None, "nothing may go before not_before, and nothing from then on");
        }
        own.destinations =
            destinations.map_or_else(Vec::new, |names| known(&reader, names, &feed.destinations));
        section.finish();
        finish(reader, file, problems)?;
        Ok(own.over(feed))
    }

    /// What is said here, and where nothing is, what `others` say.
    #[must_use]
    fn over(self, others: &Self) -> Self {
        let (mut expires_at, mut expires_after) = (self.expires_at, self.expires_after);
        if expires_at.is_none() && expires_after.is_none() {
            (expires_at, expires_after) = (others.expires_at, others.expires_after);
        }
        Self {
            not_before: self.not_before.or(others.not_before),
            expires_at,
            expires_after,
            windows: self.windows.or_else(|| others.windows.clone()),
            rate: self.rate.or(others.rate),
            finish_by: self.finish_by.or_else(|| others.finish_by.clone()),
            destinations: if self.destinations.is_empty() {
                others.destinations.clone()
            } else {
                self.destinations
            },
            priority: self.priority.or(others.priority),
        }
    }

    /// The terms of a file that was claimed at `claimed_at`.
    pub fn of_file(&self, claimed_at: UnixMs) -> Terms {
        let after = self.expires_after.map(|after| claimed_at.after(after));
        Terms {
            not_before: self.not_before,
            expires_at: self.expires_at.into_iter().chain(after).min(),
            windows: self.windows.clone().unwrap_or_default(),
            rate: self.rate,
            finish_by: self.finish_by.as_ref().and_then(|by| match by {
                Deadline::Daily(time) => time.next(claimed_at),
                Deadline::At(at) => Some(*at),
            }),
        }
    }
}

fn date(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    section.date(key)
}

fn priority(section: &mut Section<'_>, key: &'static str) -> Option<Priority> {
    section.choice(key, &Priority::WORDS)
}

fn names(section: &mut Section<'_>, key: &'static str) -> Option<Vec<(String, String)>> {
    let names = section.list(key, true)?;
    if names.is_empty() {
        let advice = "name at least one destination, or leave it out";
        section.reader().note(&section.key(key), Some("an empty list".into()), advice);
    }
    Some(names)
}

/// Those names, each once; one that is not among `all` is noted.
fn known(reader: &Reader, names: Vec<(String, String)>, all: &[String]) -> Vec<String> {
    let mut known: Vec<String> = Vec::new();
    for (path, name) in names {
        if !all.contains(&name) {
            let advice = format!("its feed does not go there, but to {}", all.join(", "));
            reader.note(&path, Some(shown_text(&name)), advice);
        } else if !known.contains(&name) {
            known.push(name);
        }
    }
    known
}

/// A window or several; what is wrong with one is noted.
fn windows(section: &mut Section<'_>, key: &'static str) -> Option<Windows> {
    let reader = section.reader();
    let read = |(path, text): (String, String)| {
        let window = text.parse::<Window>();
        window.map_err(|error| reader.note(&path, Some(shown_text(&text)), error.to_string())).ok()
    };
    Some(Windows(section.texts(key)?.into_iter().filter_map(read).collect()))
}

/// A time of day, or a point in time. What is wrong is noted.
fn deadline(section: &Section<'_>, text: &str, clock: Option<&Windows>) -> Option<Deadline> {
    const KEY: &str = "finish_by";
    // A date begins with its year.
    if text.trim_start().as_bytes().get(2) != Some(&b':') {
        return moment(section, KEY, text, clock).map(Deadline::At);
    }
    let time = text.parse::<TimeOfDay>().map_err(|error| {
        section.reader().note(&section.key(KEY), Some(shown_text(text)), error.to_string());
    });
    time.ok().map(Deadline::Daily)
}

/// A point in time, where it has no offset by the clock of the windows. What is wrong is noted.
fn moment(section: &Section<'_>, key: &str, text: &str, clock: Option<&Windows>) -> Option<UnixMs> {
    let note = |advice: &str| section.reader().note(&section.key(key), Some(shown_text(text)), advice);
    let at = if let Ok(at) = text.parse::<Timestamp>() {
        Some(at)
    } else if let Ok(shown) = text.parse::<DateTime>() {
        let mut zones = clock.into_iter().flat_map(|windows| &windows.0).map(Window::zone);
        let Some(zone) = zones.next().filter(|zone| zones.all(|other| other == *zone)) else {
            note(
                "it has no offset, and there is no window whose clock it could go by: write it as 2026-12-01T08:00:00+01:00",
            );
            return None;
        };
        zone.to_timestamp(shown).ok()
    } else {
        None
    };
    let at = at.and_then(|at| u64::try_from(at.as_millisecond()).ok());
    if at.is_none() {
        note("write a time as 2026-12-01T08:00:00+01:00");
    }
    at.map(UnixMs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn feed() -> Conditions {
        Conditions {
            not_before: Some(UnixMs(5)),
            expires_after: Some(HOUR),
            windows: Some(Windows(vec!["08:00-18:00 Europe/Berlin".parse().unwrap()])),
            destinations: vec!["support".into(), "audit".into()],
            ..Conditions::default()
        }
    }

    fn sidecar(text: &str) -> Result<Conditions, String> {
        let read = Conditions::of_sidecar(text, Path::new("users.csv.toml"), &feed());
        read.map_err(|problems| problems.to_string())
    }

    #[test]
    fn what_is_said_of_one_file_goes_before_what_is_said_of_all() {
        assert_eq!(sidecar("# nothing").unwrap(), feed());
        let at = "2026-12-01T18:00:00Z".parse::<Timestamp>().unwrap();
        let read = sidecar("window = []\nexpires_at = 2026-12-01T18:00:00Z").unwrap();
        let expected = Terms {
            not_before: Some(UnixMs(5)),
            expires_at: Some(UnixMs(at.as_millisecond() as u64)),
            ..Terms::default()
        };
        assert_eq!(read.of_file(UnixMs(7)), expected, "the feed's hour is not his");
        assert_eq!(feed().of_file(UnixMs(7)).expires_at, Some(UnixMs(7).after(HOUR)));
        let both = sidecar("expires_at = \"2026-12-01T18:00:00Z\"\nexpires_after = \"2h\"").unwrap();
        assert_eq!(
            both.of_file(UnixMs(7)).expires_at,
            Some(UnixMs(7).after(2 * HOUR)),
            "whatever comes first"
        );
    }

    #[test]
    fn a_file_may_be_more_urgent_than_its_feed() {
        let read = |text| sidecar(text).map(|read| read.priority);
        assert_eq!((read(""), read("priority = \"urgent\"")), (Ok(None), Ok(Some(Priority::Urgent))));
        assert!(read("priority = \"important\"").unwrap_err().contains("\"urgent\", \"normal\", \"bulk\""));
    }

    #[test]
    fn a_file_may_go_to_some_of_its_feed_s_destinations() {
        assert_eq!(sidecar("destinations = [\"audit\", \"audit\"]").unwrap().destinations, ["audit"]);
        for (text, says) in [
            (
                "destinations = [\"audt\"]",
                "users.csv.toml:1:17: destinations[0]: found \"audt\"; its feed does not go there",
            ),
            ("destinations = []", "name at least one destination"),
        ] {
            let problems = sidecar(text).unwrap_err();
            assert!(problems.contains(says), "{problems}");
        }
    }

    #[test]
    fn a_file_has_a_rate_of_its_own_or_shares_its_feed_s() {
        let rate = Some(Rate { per_s: 9, of_feed: true });
        let of_feed = Conditions { rate, ..feed() };
        let read = |text| Conditions::of_sidecar(text, Path::new("a.toml"), &of_feed).unwrap().rate;
        assert_eq!(read(""), rate);
        assert_eq!(read("rate_per_s = 7"), Some(Rate { per_s: 7, of_feed: false }));
    }

    #[test]
    fn a_file_is_to_be_done_by_a_time_of_day_or_by_a_point_in_time() {
        let of_feed =
            Conditions { finish_by: "09:00 UTC".parse().ok().map(Deadline::Daily), ..Conditions::default() };
        let friday = UnixMs(1_800_000_000_000);
        let by = |text: &str| {
            let read = Conditions::of_sidecar(text, Path::new("a.toml"), &of_feed);
            read.map(|read| read.of_file(friday).finish_by).map_err(|problems| problems.to_string())
        };
        assert_eq!(by(""), Ok(Some(friday.after(HOUR))));
        assert_eq!(by("finish_by = \"07:00 UTC\""), Ok(Some(friday.after(23 * HOUR))), "the next one");
        assert_eq!(by("finish_by = 2027-01-15T10:00:00Z"), Ok(Some(friday.after(2 * HOUR))));
        assert!(by("finish_by = \"09:00\"").unwrap_err().contains("time zone"));
        assert!(by("finish_by = \"soon\"").unwrap_err().contains("write a time as"));
    }

    #[test]
    fn a_time_without_an_offset_goes_by_the_clock_of_the_window() {
        let read = sidecar("not_before = \"2026-12-01T08:00\"").unwrap();
        let berlin = "2026-12-01T08:00:00+01:00".parse::<Timestamp>().unwrap();
        assert_eq!(read.not_before, Some(UnixMs(berlin.as_millisecond() as u64)));
        let read = sidecar("window = [\"08:00-18:00 UTC\"]\nnot_before = 2026-12-01T08:00:00").unwrap();
        assert_eq!(read.not_before, Some(UnixMs(berlin.as_millisecond() as u64 + 3_600_000)));
        let of_none = sidecar("window = []\nnot_before = \"2026-12-01T08:00\"").unwrap_err();
        assert!(of_none.contains("it has no offset"), "{of_none}");
    }

    #[test]
    fn every_problem_is_said_with_its_place_and_the_nearest_key() {
        let text = "window = \"Mon-Fri 8-20 UTC\"\nnot_befor = \"2026-12-01T08:00:00Z\"\nexpires_at = \"tomorrow\"\n\
                    expires_after = 2";
        let expected = [
            "users.csv.toml:1:1: window: found \"Mon-Fri 8-20 UTC\"; \"8-20\" is not a span of hours",
            "users.csv.toml:2:1: not_befor: unknown key; did you mean `not_before`?",
            "users.csv.toml:3:1: expires_at: found \"tomorrow\"; write a time as",
            "users.csv.toml:4:1: expires_after: found 2; it has no unit",
        ];
        let problems = sidecar(text).unwrap_err();
        let lines: Vec<_> = problems.lines().collect();
        assert_eq!(lines.len(), expected.len(), "{problems}");
        for (line, expected) in lines.iter().zip(expected) {
            assert!(line.starts_with(expected), "{line}");
        }
        let syntax = sidecar("window = ").unwrap_err();
        assert!(syntax.starts_with("users.csv.toml:1:"), "{syntax}");
        let never =
            sidecar("not_before = 2026-12-01T08:00:00Z\nexpires_at = 2026-12-01T08:00:00Z").unwrap_err();
        assert!(never.contains("nothing may go before not_before"), "{never}");
    }
}
