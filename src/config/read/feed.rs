use super::{
    super::{
        DirectoryFeed, Duplicates, Feed, FeedFormat, FeedSource, QueueAddress, QueueFeed,
        reader::{Reader, Section},
        tree::shown_text,
    },
    Need, count,
    engines::{address, require_aws},
    path, require,
};

/// Destinations of one feed: each row becomes that many messages.
const DESTINATIONS_MAX: usize = 16;

/// Keys that only a feed from a directory has.
const DIRECTORY_KEYS: [&str; 8] = [
    "path",
    "delimiter",
    "duplicates",
    "settle_ms",
    "rescan_ms",
    "require_done",
    "decompress_max_ratio",
    "decompress_max_bytes",
];

/// Keys that only a feed from a queue has.
const QUEUE_KEYS: [&str; 8] =
    ["queue_name", "queue_url", "max_rows", "max_bytes", "linger_ms", "pollers", "wait_s", "visibility_s"];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Directory,
    Queue,
}

/// Reads `[feeds.NAME]`.
pub(super) fn feed(reader: &Reader, mut section: Section<'_>, name: String, need: Need) -> Feed {
    let kinds = [("directory", Kind::Directory), ("sqs", Kind::Queue)];
    let kind = section.choice("kind", &kinds).unwrap_or(Kind::Directory);
    let need_of = |of| if kind == of { need } else { Need::Optional };
    // Every key is read whatever the kind, for what stands in `[feeds."*"]` is for feeds of both.
    let max_row_bytes = count(&mut section, "max_row_bytes", 16, 16 << 20, "bytes");
    let (format, recipient) = format(reader, &mut section, kind, need);
    let directory = directory(reader, &mut section, format, need_of(Kind::Directory));
    let queue = queue(reader, &mut section, recipient, max_row_bytes, need_of(Kind::Queue));
    let (others, advice) = match kind {
        Kind::Directory => {
            (QUEUE_KEYS, "only kind = \"sqs\" has it: remove it, or say that messages come from a queue")
        }
        Kind::Queue => (
            DIRECTORY_KEYS,
            "a feed of kind = \"sqs\" takes messages from a queue, not from files: remove it",
        ),
    };
    for key in others.map(|key| section.key(key)) {
        if need == Need::Required && reader.is_own(&key) {
            reader.note(&key, None, advice);
        }
    }
    if kind == Kind::Queue {
        require_aws(reader, &section.key("kind"), "sqs");
    }
    let feed = Feed {
        name,
        source: match kind {
            Kind::Directory => FeedSource::Directory(directory),
            Kind::Queue => FeedSource::Queue(queue),
        },
        destinations: destinations(reader, &mut section, need),
        max_row_bytes,
    };
    section.finish();
    feed
}

fn directory(reader: &Reader, section: &mut Section<'_>, format: FeedFormat, need: Need) -> DirectoryFeed {
    DirectoryFeed {
        path: path(reader, section, "path", need).unwrap_or_default(),
        format,
        duplicates: section
            .choice("duplicates", &[("keep", Duplicates::Keep), ("first", Duplicates::First)])
            .unwrap_or(Duplicates::Keep),
        settle: section.millis("settle_ms", 0..=3_600_000),
        rescan: section.millis("rescan_ms", 100..=3_600_000),
        require_done: section.boolean("require_done"),
        decompress_max_ratio: section.integer("decompress_max_ratio", 1..=100_000, "bytes per byte"),
        decompress_max_bytes: section.integer("decompress_max_bytes", 1..=1u64 << 50, "bytes"),
    }
}

fn queue(
    reader: &Reader,
    section: &mut Section<'_>,
    recipient: String,
    max_row_bytes: usize,
    need: Need,
) -> QueueFeed {
    let queue = address(reader, section, "queue_name", "queue_url", need == Need::Required);
    let mut max_bytes = count(section, "max_bytes", 1 << 10, 16 << 20, "bytes");
    if !reader.is_set(&section.key("max_bytes")) {
        max_bytes = max_bytes.max(max_row_bytes);
    }
    QueueFeed {
        // Only what is needed and missing gets here, and was noted.
        queue: queue.unwrap_or_else(|| QueueAddress::Name(String::new())),
        recipient,
        max_rows: count(section, "max_rows", 1, 10_000, "messages"),
        max_bytes,
        linger: section.millis("linger_ms", 0..=60_000),
        pollers: count(section, "pollers", 1, 64, "polls"),
        wait: section.seconds("wait_s", 0..=20),
        visibility: section.seconds("visibility_s", 30..=43_200),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Word {
    Text,
    Csv,
    Ndjson,
    Json,
}

/// The format of a directory's files, and the recipient's name.
fn format(reader: &Reader, section: &mut Section<'_>, kind: Kind, need: Need) -> (FeedFormat, String) {
    let words = [("text", Word::Text), ("csv", Word::Csv), ("ndjson", Word::Ndjson), ("json", Word::Json)];
    let word = section.choice("format", &words);
    let format_key = section.key("format");
    if kind == Kind::Directory {
        require(reader, section, "format", need, "write \"text\", \"csv\" or \"ndjson\"");
    }
    let delimiter = delimiter(reader, section);
    let recipient = section.text("recipient");
    if let Some(recipient) = &recipient
        && (recipient.is_empty() || recipient.len() > 256 || recipient.chars().any(char::is_control))
    {
        let advice = "write the column's name: 1 to 256 bytes, no control character";
        reader.note(&section.key("recipient"), Some(shown_text(recipient)), advice);
    }

    // What stands in `[feeds."*"]` is for those feeds that can use it.
    let is_own = |key: &str| need == Need::Required && reader.is_own(&section.key(key));
    let recipient_needed = "name the column or key that holds the recipient";
    if kind == Kind::Queue {
        if is_own("format") && word.is_some_and(|word| word != Word::Json) {
            let advice = "the entries of a queue are \"json\", an object or an array of them: write that, or \
                          remove it";
            reader.note(&format_key, None, advice);
        }
        require(reader, section, "recipient", need, recipient_needed);
        return (FeedFormat::Text, recipient.unwrap_or_default());
    }
    if matches!(word, Some(Word::Text | Word::Ndjson)) && is_own("delimiter") {
        let advice = "only format = \"csv\" has a delimiter: remove it";
        reader.note(&section.key("delimiter"), None, advice);
    }
    let format = match word {
        None => FeedFormat::Text,
        Some(Word::Text) => {
            if is_own("recipient") {
                let advice = "with format = \"text\" the line is the recipient: remove it";
                reader.note(&section.key("recipient"), None, advice);
            }
            FeedFormat::Text
        }
        Some(Word::Json) => {
            if need == Need::Required {
                let advice = "only the entries of a queue are \"json\"; files hold one object per line: write \
                              \"ndjson\"";
                reader.note(&format_key, Some("\"json\"".into()), advice);
            }
            FeedFormat::Text
        }
        Some(word) => {
            require(reader, section, "recipient", need, recipient_needed);
            let recipient = recipient.unwrap_or_default();
            match word {
                Word::Csv => FeedFormat::Csv { delimiter, recipient },
                _ => FeedFormat::Ndjson { recipient },
            }
        }
    };
    (format, String::new())
}

/// What stands between the cells of a csv.
pub(super) fn delimiter(reader: &Reader, section: &mut Section<'_>) -> u8 {
    let text = section.text("delimiter");
    match text.as_deref().map(str::as_bytes) {
        Some(&[byte]) if byte.is_ascii() && !matches!(byte, b'"' | b'\r' | b'\n' | 0) => byte,
        Some(_) => {
            let advice =
                "write one ASCII character, neither a quote nor a line break, such as \",\" or \"\\t\"";
            reader.note(&section.key("delimiter"), text.as_deref().map(shown_text), advice);
            b','
        }
        None => b',',
    }
}

fn destinations(reader: &Reader, section: &mut Section<'_>, need: Need) -> Vec<String> {
    let key = section.key("destinations");
    let items = section.list("destinations", true);
    require(reader, section, "destinations", need, "name at least one of [destinations]");
    let Some(items) = items else {
        return Vec::new();
    };
    if items.is_empty() {
        reader.note(&key, Some("an empty list".into()), "name at least one of [destinations]");
    }
    if items.len() > DESTINATIONS_MAX {
        let advice = format!("name at most {DESTINATIONS_MAX} destinations");
        reader.note(&key, Some(items.len().to_string()), advice);
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
