//! Where messages come from.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use crate::{
    address::{QueueAddress, queue, required_path},
    declare::{choice, duration, flag, given, integer, size, unset},
    reader::{Need, Section},
    tree::shown_text,
};

/// What a feed is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedKind {
    /// Files that are dropped.
    Directory,
    /// Entries of an SQS queue.
    Sqs,
}

/// What a feed's files look like, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatWord {
    /// One id per line.
    Text,
    /// Delimited, with a header.
    Csv,
    /// One JSON object per line.
    Ndjson,
    /// JSON objects or arrays of them, the entries of a queue.
    Json,
}

/// What a feed's files look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// One id per line.
    Text,
    /// Delimited, with a header.
    Csv {
        /// One ASCII character.
        delimiter: u8,
        /// The column that holds the recipient.
        recipient: String,
    },
    /// One JSON object per line.
    Ndjson {
        /// The top-level key that holds the recipient.
        recipient: String,
    },
}

/// What becomes of a recipient's second row in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplicates {
    /// It is a message of its own.
    Keep,
    /// It is counted as a duplicate and not sent.
    First,
}

/// How urgent a file's messages are, beside those of other files that wait for the same destination.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Priority {
    /// After all others, but never never.
    Bulk = 0,
    /// As most are.
    #[default]
    Normal = 1,
    /// Before all others, but never alone.
    Urgent = 2,
}

impl Priority {
    /// Each with its word, the most urgent first.
    pub const WORDS: [(&str, Self); 3] =
        [("urgent", Self::Urgent), ("normal", Self::Normal), ("bulk", Self::Bulk)];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Normal => "normal",
            Self::Urgent => "urgent",
        }
    }

    /// Reads back what was stored.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Bulk, Self::Normal, Self::Urgent].into_iter().find(|priority| *priority as u8 == byte)
    }

    /// Whether nobody has said anything of it.
    pub fn is_normal(&self) -> bool {
        *self == Self::Normal
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::WORDS.into_iter().find(|(word, _)| *word == text);
        found.map(|(_, priority)| priority).ok_or_else(|| "write urgent, normal or bulk".to_owned())
    }
}

crate::settings! {
    /// What all feeds have in common.
    Feed {
        /// Messages come from files that are dropped, or from the entries of a queue.
        kind: FeedKind = choice(&[("directory", FeedKind::Directory), ("sqs", FeedKind::Sqs)]);
        /// "text" (one id per line) | "csv" (with a header) | "ndjson" (one object per line). Files that end in .gz or
        /// .zst are decompressed. Entries of a queue are "json": an object, or an array of them.
        format: Option<FormatWord> = unset("\"csv\"", format_word);
        /// The column (csv) or top-level key (ndjson, json) that holds the recipient; none for text.
        recipient: Option<String> = unset("\"user_id\"", recipient);
        /// Where each row goes: names of `[destinations.NAME]`, 1 to 16.
        destinations: Vec<String> = unset("[\"support\"]", destinations);
        /// How urgent its files are, beside others that wait for the same destination: where all three wait, 16 of 21
        /// messages are urgent, 4 normal, 1 bulk. It is a file's own from when it is read; `postrider priority` changes
        /// it.
        priority: Priority = choice(&[
            ("normal", Priority::Normal),
            ("urgent", Priority::Urgent),
            ("bulk", Priority::Bulk),
        ]);
        /// A longer row is rejected. It bounds memory: a batch holds 64KiB, or one row if that is longer.
        max_row: usize = size("64KiB", "16B"..="16MiB");
    }

    /// A watched directory.
    Directory {
        /// The directory to watch; an absolute path. Finished files go to `done` and `failed` in it.
        path: PathBuf = unset("\"/srv/postrider/alerts\"", required_path);
        /// One ASCII character between the cells of a csv: "," or ";" or "\t" or "|".
        delimiter: u8 = given("\",\"", delimiter);
        /// "keep": each row is a message. "first": of the rows with one recipient in a file only the first is a
        /// message, the others are counted as duplicates.
        duplicates: Duplicates = choice(&[("keep", Duplicates::Keep), ("first", Duplicates::First)]);
        /// A file is claimed when it is renamed into the directory or closed after writing, or when its size and mtime
        /// have not changed for this long.
        stable_after: Duration = duration("2s", "0s"..="1h");
        /// How often the directory is scanned, for what the kernel's watch missed (network file systems report
        /// nothing).
        rescan: Duration = duration("10s", "100ms"..="1h");
        /// Whether a file is claimed only once NAME.done is beside it. If NAME.done exists and holds a sha256 or a
        /// row count, they are checked either way.
        require_done: bool = flag(false);
        /// Decompressed bytes per compressed byte above which a file is refused as a decompression bomb. Logs and ids
        /// compress 5 to 20 times.
        decompress_max_ratio: u32 = integer(200, 1..=100_000, "bytes per byte");
        /// The decompressed size above which a compressed file is refused.
        decompress_max: u64 = size("64GiB", "1B"..="1024TiB");
    }

    /// A queue whose entries are JSON objects or arrays of them.
    FeedQueue {
        /// The keys from here on are for kind = "sqs", which uses of those above only `format`, `recipient`,
        /// `destinations`, `max_row`, `window`, `not_before`, `expires_after`,
        /// `rate_per_s` and `finish_by`. The queue's name, or its address (https://…/NAME) for a queue of another
        /// account; a queue belongs to one feed alone.
        queue: QueueAddress = unset("\"alerts\"", queue);
        /// Messages that are taken into the outbox in one step; then their entries are deleted.
        max_rows: usize = integer(500, 1..=10_000, "messages");
        /// The size of the entries of one step. At least `max_row`. It bounds memory.
        max_size: usize = size("256KiB", "1KiB"..="16MiB");
        /// The longest that an entry waits for others, however long a poll takes.
        linger: Duration = duration("500ms", "0s"..="1m");
        /// How long a received entry is hidden from other machines. After a crash it comes again.
        visibility: Duration = duration("2m", "30s"..="12h");
    }
}

fn format_word(section: &mut Section<'_>, key: &'static str) -> Option<FormatWord> {
    let words = [
        ("text", FormatWord::Text),
        ("csv", FormatWord::Csv),
        ("ndjson", FormatWord::Ndjson),
        ("json", FormatWord::Json),
    ];
    section.choice(key, &words)
}

fn recipient(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    let recipient = section.text(key)?;
    if recipient.is_empty() || recipient.len() > 256 || recipient.chars().any(char::is_control) {
        let advice = "write the column's name: 1 to 256 bytes, no control character";
        section.reader().note(&section.key(key), Some(shown_text(&recipient)), advice);
    }
    Some(recipient)
}

/// The separator between the cells of a csv.
pub fn delimiter(section: &mut Section<'_>, key: &'static str) -> u8 {
    let text = section.text(key);
    match text.as_deref().map(str::as_bytes) {
        Some(&[byte]) if byte.is_ascii() && !matches!(byte, b'"' | b'\r' | b'\n' | 0) => byte,
        Some(_) => {
            let advice =
                "write one ASCII character, neither a quote nor a line break, such as \",\" or \"\\t\"";
            section.reader().note(&section.key(key), text.as_deref().map(shown_text), advice);
            b','
        }
        None => b',',
    }
}

/// Destinations of one feed: each row becomes that many messages.
const DESTINATIONS_MAX: usize = 16;

fn destinations(section: &mut Section<'_>, key: &'static str) -> Vec<String> {
    let (reader, path) = (section.reader(), section.key(key));
    let items = section.list(key, true);
    section.require(key, "name at least one of [destinations]");
    let Some(items) = items else {
        return Vec::new();
    };
    if items.is_empty() {
        reader.note(&path, Some("an empty list".into()), "name at least one of [destinations]");
    }
    if items.len() > DESTINATIONS_MAX {
        let advice = format!("name at most {DESTINATIONS_MAX} destinations");
        reader.note(&path, Some(items.len().to_string()), advice);
    }
    let mut names: Vec<String> = Vec::new();
    for (path, name) in items {
        if names.contains(&name) {
            reader.note(&path, Some(shown_text(&name)), "it is named twice: remove one");
        } else {
            names.push(name);
        }
    }
    names
}

impl Feed {
    /// The format of a directory's files. What does not go together with it is noted.
    pub fn file_format(&self, section: &Section<'_>, delimiter: u8) -> Format {
        let reader = section.reader();
        // `[feeds."*"]` may hold it for other feeds.
        let is_own = |key: &str| section.need == Need::Required && reader.is_own(&section.key(key));
        section.require("format", "write \"text\", \"csv\" or \"ndjson\"");
        if matches!(self.format, Some(FormatWord::Text | FormatWord::Ndjson)) && is_own("delimiter") {
            let advice = "only format = \"csv\" has a delimiter: remove it";
            reader.note(&section.key("delimiter"), None, advice);
        }
        let recipient = || {
            section.require("recipient", RECIPIENT);
            self.recipient.clone().unwrap_or_default()
        };
        match self.format {
            Some(FormatWord::Csv) => Format::Csv { delimiter, recipient: recipient() },
            Some(FormatWord::Ndjson) => Format::Ndjson { recipient: recipient() },
            Some(FormatWord::Text) => {
                if is_own("recipient") {
                    let advice = "with format = \"text\" the line is the recipient: remove it";
                    reader.note(&section.key("recipient"), None, advice);
                }
                Format::Text
            }
            Some(FormatWord::Json) => {
                if section.need == Need::Required {
                    let advice = "only the entries of a queue are \"json\"; files hold one object per line: write \
                                  \"ndjson\"";
                    reader.note(&section.key("format"), Some("\"json\"".into()), advice);
                }
                Format::Text
            }
            None => Format::Text,
        }
    }

    /// The key that holds the recipient in a queue's entries. Another format than theirs is noted.
    pub fn entry_recipient(&self, section: &Section<'_>) -> String {
        let key = section.key("format");
        let is_own = section.need == Need::Required && section.reader().is_own(&key);
        if is_own && self.format.is_some_and(|word| word != FormatWord::Json) {
            let advice = "the entries of a queue are \"json\", an object or an array of them: write that, or \
                          remove it";
            section.reader().note(&key, None, advice);
        }
        section.require("recipient", RECIPIENT);
        self.recipient.clone().unwrap_or_default()
    }
}

const RECIPIENT: &str = "name the column or key that holds the recipient";
