//! How a key is declared: once, with its type, unit, range, default and help. Reading it and documenting it both
//! follow from that.
//!
//! ```
//! use postrider_settings::{duration, integer, settings};
//!
//! settings! {
//!     /// When a batch is full.
//!     Batch {
//!         /// Messages per batch.
//!         max_messages: u32 = integer(500, 1..=1_000, "messages");
//!         /// The longest that a row waits for others.
//!         linger: std::time::Duration = duration("50ms", "0s"..="1m");
//!     }
//! }
//! ```

use std::{
    fmt::{Debug, Display, Write as _},
    marker::PhantomData,
    ops::RangeInclusive,
    time::Duration,
};

use crate::{
    layers,
    reader::{Reader, Section},
    value::{parse_duration, parse_size},
};

/// What a key's value is and may be.
pub trait Spec {
    /// What adapters and stages are given.
    type Value;

    /// Reads the key. What is wrong is noted, and a value within the range is used instead.
    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Self::Value;

    /// Its value in `config/default.toml`, and a sentence about what is allowed.
    fn shape(&self) -> Shape;
}

/// How a key is documented.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its value, in TOML.
    pub written: DocumentedValue,
    /// What is allowed, as a sentence; may be empty.
    pub allowed: String,
}

/// A value as `config/default.toml` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DocumentedValue {
    /// The default.
    Default(String),
    /// The key has no default; this is an example.
    Example(&'static str),
}

/// One declared key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its name in its table.
    pub name: &'static str,
    /// What it is for.
    pub help: String,
    /// What its value is and may be.
    pub shape: Shape,
}

impl Key {
    /// A key with its help, a line of doc comment each.
    pub fn new(name: &'static str, help: &[&str], shape: Shape) -> Self {
        Self { name, help: prose(help), shape }
    }
}

/// The keys of a table, or some of them.
pub trait Keys: Sized {
    /// What the table is for, a line of doc comment each.
    const ABOUT: &'static [&'static str];

    /// Reads them.
    fn read(section: &mut Section<'_>) -> Self;

    /// Every one of them, in the order of the documentation.
    fn keys() -> Vec<Key>;

    /// Reads the table `key` of `parent`, which has no other keys.
    fn read_table(parent: &mut Section<'_>, key: &'static str) -> Self {
        let mut section = parent.section(key);
        let read = Self::read(&mut section);
        section.finish();
        read
    }

    /// As it is where nobody wrote anything: every key at its default, those without one at what stands in for them.
    fn declared() -> Self {
        let page = Page::default().table::<Self>("declared").finish();
        let (tree, _) = layers(&page, "", []).expect("defaults are declared as TOML: a test reads them all");
        Self::read(&mut Section::root(&Reader::default(), tree).section("declared"))
    }
}

/// Declares tables and their keys. Each becomes a struct with the keys as fields, which implements [`Keys`].
#[macro_export]
macro_rules! settings {
    ($(
        $(#[doc = $about:literal])*
        $name:ident {
            $( $(#[doc = $help:literal])* $key:ident : $type:ty = $spec:expr; )*
        }
    )*) => { $(
        $(#[doc = $about])*
        #[allow(clippy::doc_markdown, reason = "the documentation is the text of default.toml")]
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            $( $(#[doc = $help])* pub $key: $type, )*
        }

        impl $crate::Keys for $name {
            const ABOUT: &'static [&'static str] = &[$($about),*];

            fn read(section: &mut $crate::Section<'_>) -> Self {
                Self {
                    $( $key: $crate::Spec::read(&$crate::typed::<$type, _>($spec), section, stringify!($key)), )*
                }
            }

            fn keys() -> Vec<$crate::Key> {
                vec![
                    $( $crate::Key::new(
                        stringify!($key),
                        &[$($help),*],
                        $crate::Spec::shape(&$crate::typed::<$type, _>($spec)),
                    ), )*
                ]
            }
        }
    )* };
}

/// The same spec; its value's type is that of the field.
pub fn typed<T, S: Spec<Value = T>>(spec: S) -> S {
    spec
}

/// A range as a sentence, which no line break may part.
fn range_of(low: impl Display, high: impl Display) -> String {
    format!("{low}{GLUE}to{GLUE}{high}.")
}

/// A space that is not the end of a line.
const GLUE: char = '\u{a0}';

/// See [`integer`].
#[derive(Clone, Debug)]
pub struct Integer<T> {
    default: u64,
    range: RangeInclusive<u64>,
    what: &'static str,
    value: PhantomData<T>,
}

/// An integer within a range; `what` says what it counts.
pub fn integer<T: TryFrom<u64>>(default: u64, range: RangeInclusive<u64>, what: &'static str) -> Integer<T> {
    Integer { default, range, what, value: PhantomData }
}

impl<T: TryFrom<u64>> Integer<T> {
    /// 0 means `None`.
    pub fn or_none(self) -> OrNone<Self> {
        OrNone(self)
    }

    /// `word` means `None`, and is the default.
    pub fn or_word(self, word: &'static str) -> OrWord<T> {
        OrWord { integer: self, word }
    }
}

/// See [`Integer::or_word`].
#[derive(Clone, Debug)]
pub struct OrWord<T> {
    integer: Integer<T>,
    word: &'static str,
}

impl<T: TryFrom<u64>> Spec for OrWord<T> {
    type Value = Option<T>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<T> {
        (!section.take_word(key, self.word)).then(|| self.integer.read(section, key))
    }

    fn shape(&self) -> Shape {
        let word = format!("{:?}", self.word);
        let allowed = format!("{word}, or{GLUE}{}", self.integer.shape().allowed);
        Shape { written: DocumentedValue::Default(word), allowed }
    }
}

impl<T> Spec for Integer<T>
where
    T: TryFrom<u64>,
{
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> T {
        narrow(section.integer(key, self.range.clone(), self.what))
    }

    fn shape(&self) -> Shape {
        let allowed = range_of(self.range.start(), self.range.end());
        Shape { written: DocumentedValue::Default(self.default.to_string()), allowed }
    }
}

fn narrow<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).ok().expect("a declared range lies within its type: a test reads both of its ends")
}

/// See [`duration`].
#[derive(Clone, Debug)]
pub struct Time {
    default: &'static str,
    range: RangeInclusive<&'static str>,
}

/// A time within a range, all as people write them: `"50ms"`, `"14d"`.
pub fn duration(default: &'static str, range: RangeInclusive<&'static str>) -> Time {
    Time { default, range }
}

impl Time {
    /// 0 means `None`.
    pub fn or_none(self) -> OrNone<Self> {
        OrNone(self)
    }
}

impl Spec for Time {
    type Value = Duration;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Duration {
        let end = |text| parse_duration(text).expect("a declared range is of times: a test reads it");
        section.duration(key, end(self.range.start())..=end(self.range.end()))
    }

    fn shape(&self) -> Shape {
        let allowed = range_of(self.range.start(), self.range.end());
        Shape { written: DocumentedValue::Default(format!("{:?}", self.default)), allowed }
    }
}

/// See [`size`].
#[derive(Clone, Debug)]
pub struct Size<T> {
    default: &'static str,
    range: RangeInclusive<&'static str>,
    value: PhantomData<T>,
}

/// A size in bytes within a range, all as people write them: `"64KiB"`.
pub fn size<T: TryFrom<u64>>(default: &'static str, range: RangeInclusive<&'static str>) -> Size<T> {
    Size { default, range, value: PhantomData }
}

impl<T: TryFrom<u64>> Spec for Size<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> T {
        let end = |text| parse_size(text).expect("a declared range is of sizes: a test reads it");
        narrow(section.size(key, end(self.range.start())..=end(self.range.end())))
    }

    fn shape(&self) -> Shape {
        let allowed = range_of(self.range.start(), self.range.end());
        Shape { written: DocumentedValue::Default(format!("{:?}", self.default)), allowed }
    }
}

/// A number; 0 means `None`.
#[derive(Clone, Debug)]
pub struct OrNone<S>(S);

impl<S> Spec for OrNone<S>
where
    S: Spec<Value: Default + PartialEq>,
{
    type Value = Option<S::Value>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Self::Value {
        Some(self.0.read(section, key)).filter(|value| *value != S::Value::default())
    }

    fn shape(&self) -> Shape {
        self.0.shape()
    }
}

/// See [`flag`].
#[derive(Clone, Debug)]
pub struct Flag(bool);

/// `true` or `false`.
pub fn flag(default: bool) -> Flag {
    Flag(default)
}

impl Spec for Flag {
    type Value = bool;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> bool {
        section.boolean(key)
    }

    fn shape(&self) -> Shape {
        Shape { written: DocumentedValue::Default(self.0.to_string()), allowed: String::new() }
    }
}

/// See [`choice`].
#[derive(Clone, Debug)]
pub struct Choice<T: 'static> {
    words: &'static [(&'static str, T)],
}

/// One of some words, each with its meaning; the first is the default.
pub fn choice<T>(words: &'static [(&'static str, T)]) -> Choice<T> {
    Choice { words }
}

impl<T: Copy + 'static> Spec for Choice<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> T {
        section.choice(key, self.words).unwrap_or(self.words[0].1)
    }

    fn shape(&self) -> Shape {
        let words: Vec<_> = self.words.iter().map(|(word, _)| format!("{word:?}")).collect();
        let allowed = format!("{}.", words.join(" | "));
        Shape { written: DocumentedValue::Default(words[0].clone()), allowed }
    }
}

/// See [`given`] and [`unset`].
pub struct KeyReader<T> {
    written: DocumentedValue,
    read: fn(&mut Section<'_>, &'static str) -> T,
}

/// A key with rules of its own: `read` notes what breaks them. The default is written as TOML.
pub fn given<T>(default: &'static str, read: fn(&mut Section<'_>, &'static str) -> T) -> KeyReader<T> {
    KeyReader { written: DocumentedValue::Default(default.to_owned()), read }
}

/// A key without a default; the example is written as TOML. `read` says whether it must be there.
pub fn unset<T>(example: &'static str, read: fn(&mut Section<'_>, &'static str) -> T) -> KeyReader<T> {
    KeyReader { written: DocumentedValue::Example(example), read }
}

impl<T> Spec for KeyReader<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> T {
        (self.read)(section, key)
    }

    fn shape(&self) -> Shape {
        Shape { written: self.written.clone(), allowed: String::new() }
    }
}

/// `config/default.toml`: every key with its help, range and default.
#[derive(Debug, Default)]
pub struct Page(String);

/// The widest line of a comment.
const WIDTH: usize = 112;

impl Page {
    /// Comment lines.
    fn comment(&mut self, help: &[&str]) -> &mut Self {
        self.paragraph(&prose(help));
        self
    }

    /// Verbatim lines.
    pub fn verbatim(&mut self, text: &str) -> &mut Self {
        self.0 += text;
        self
    }

    /// A table with all of its keys.
    pub fn table<T: Keys>(&mut self, name: &str) -> &mut Self {
        self.heading(name, T::ABOUT).keys::<T>()
    }

    /// The heading of a table.
    pub fn heading(&mut self, name: &str, about: &[&str]) -> &mut Self {
        self.0 += "\n";
        self.comment(about);
        // Writing to a String can't fail.
        let _ = writeln!(self.0, "[{name}]");
        self
    }

    /// Keys of the table whose heading came last.
    pub fn keys<T: Keys>(&mut self) -> &mut Self {
        for key in T::keys() {
            let gap = if key.help.is_empty() || key.shape.allowed.is_empty() { "" } else { " " };
            self.paragraph(&format!("{}{gap}{}", key.help, key.shape.allowed));
            let _ = match &key.shape.written {
                DocumentedValue::Default(value) => writeln!(self.0, "{} = {value}", key.name),
                DocumentedValue::Example(value) => writeln!(self.0, "#{} = {value}", key.name),
            };
        }
        self
    }

    /// The whole page.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.0)
    }

    /// Words, broken into lines.
    fn paragraph(&mut self, text: &str) {
        let mut line = String::new();
        for word in text.split_ascii_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH - 2 {
                let _ = writeln!(self.0, "# {line}");
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line += &word.replace(GLUE, " ");
        }
        if !line.is_empty() {
            let _ = writeln!(self.0, "# {line}");
        }
    }
}

/// Doc comments as plain text. Words that Rust sets in backticks, operators read without; commands keep theirs.
fn prose(lines: &[&str]) -> String {
    let text: Vec<_> = lines.iter().map(|line| line.trim()).collect();
    let mut plain = String::new();
    for (index, part) in text.join(" ").split('`').enumerate() {
        let is_command = index % 2 == 1 && part.contains(' ');
        let mark = if is_command { "`" } else { "" };
        plain = plain + mark + part + mark;
    }
    plain.trim().to_owned()
}

impl<T> Debug for KeyReader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Read").field("written", &self.written).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[expect(unreachable_pub, reason = "declared tables are public wherever they are")]
mod tests {
    use super::*;

    crate::settings! {
        /// What `postrider test` prints.
        Sample {
            /// How many, of `things`.
            count: u8 = integer(3, 1..=9, "things");
            /// How long.
            wait: Option<Duration> = duration("0s", "0s"..="1m").or_none();
            /// How large.
            room: usize = size("64KiB", "1KiB"..="1MiB");
            /// Whether.
            on: bool = flag(true);
            /// Which.
            word: u8 = choice(&[("one", 1), ("two", 2)]);
            /// Whose.
            name: Option<String> = unset("\"you\"", crate::optional_text);
        }
    }

    const PAGE: &str = "
# What `postrider test` prints.
[sample]
# How many, of things. 1 to 9.
count = 3
# How long. 0s to 1m.
wait = \"0s\"
# How large. 1KiB to 1MiB.
room = \"64KiB\"
# Whether.
on = true
# Which. \"one\" | \"two\".
word = \"one\"
# Whose.
#name = \"you\"
";

    fn read(text: &str) -> (Sample, Vec<String>) {
        let (tree, _) = layers(PAGE, text, []).expect("it is TOML");
        let reader = Reader::default();
        let mut root = Section::root(&reader, tree);
        let sample = Sample::read_table(&mut root, "sample");
        root.finish();
        let (problems, _) = reader.finish();
        (sample, problems.iter().map(|problem| format!("{}: {}", problem.key, problem.advice)).collect())
    }

    #[test]
    fn a_declaration_documents_itself() {
        assert_eq!(Page::default().table::<Sample>("sample").finish(), PAGE);
    }

    #[test]
    fn its_page_reads_back_as_its_defaults() {
        let expected = Sample { count: 3, wait: None, room: 64 << 10, on: true, word: 1, name: None };
        assert_eq!(read(""), (expected.clone(), Vec::new()));
        assert_eq!(Sample::declared(), expected);
    }

    #[test]
    fn what_is_written_is_what_is_given() {
        let text =
            "[sample]\ncount = 9\nwait = \"1m\"\nroom = \"1MiB\"\non = false\nword = \"two\"\nname = \"me\"";
        let wait = Some(Duration::from_mins(1));
        let expected = Sample { count: 9, wait, room: 1 << 20, on: false, word: 2, name: Some("me".into()) };
        assert_eq!(read(text), (expected, Vec::new()));
    }

    #[test]
    fn every_problem_is_noted_with_its_key() {
        let text = "[sample]\ncount = 10\nwait = \"61s\"\nroom = 64\non = 1\nword = \"three\"\nnam = \"me\"";
        let (_, problems) = read(text);
        let expected = [
            "sample.count: write an integer from 1 to 9: things",
            "sample.wait: write a time from 0s to 1m, ",
            "sample.room: it has no unit; write a size with its unit in quotes, such as ",
            "sample.on: write true or false",
            "sample.word: write one of \"one\", \"two\"",
            "sample.nam: unknown key; did you mean `name`?",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, expected) in problems.iter().zip(expected) {
            assert!(problem.starts_with(expected), "{problem}");
        }
    }
}
