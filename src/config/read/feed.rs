use super::{
    super::{
        Duplicates, Feed, FeedFormat,
        reader::{Reader, Section},
        tree::shown_text,
    },
    Need, count, path, require,
};

/// Destinations of one feed: each row becomes that many messages.
const DESTINATIONS_MAX: usize = 16;

/// Reads `[feeds.NAME]`.
pub(super) fn feed(reader: &Reader, mut section: Section<'_>, name: String, need: Need) -> Feed {
    let feed = Feed {
        name,
        path: path(reader, &mut section, "path", need).unwrap_or_default(),
        format: format(reader, &mut section, need),
        duplicates: section
            .choice("duplicates", &[("keep", Duplicates::Keep), ("first", Duplicates::First)])
            .unwrap_or(Duplicates::Keep),
        destinations: destinations(reader, &mut section, need),
        settle: section.millis("settle_ms", 0..=3_600_000),
        rescan: section.millis("rescan_ms", 100..=3_600_000),
        require_done: section.boolean("require_done"),
        max_row_bytes: count(&mut section, "max_row_bytes", 16, 16 << 20, "bytes"),
        decompress_max_ratio: section.integer("decompress_max_ratio", 1..=100_000, "bytes per byte"),
        decompress_max_bytes: section.integer("decompress_max_bytes", 1..=1u64 << 50, "bytes"),
    };
    section.finish();
    feed
}

#[derive(Clone, Copy, PartialEq)]
enum Word {
    Text,
    Csv,
    Ndjson,
}

fn format(reader: &Reader, section: &mut Section<'_>, need: Need) -> FeedFormat {
    let words = [("text", Word::Text), ("csv", Word::Csv), ("ndjson", Word::Ndjson)];
    let word = section.choice("format", &words);
    require(reader, section, "format", need, "write \"text\", \"csv\" or \"ndjson\"");
    let delimiter = delimiter(reader, section);
    let recipient = section.text("recipient");
    if let Some(recipient) = &recipient
        && (recipient.is_empty() || recipient.len() > 256 || recipient.chars().any(char::is_control))
    {
        let advice = "write the column's name: 1 to 256 bytes, no control character";
        reader.note(&section.key("recipient"), Some(shown_text(recipient)), advice);
    }

    // What stands in `[feeds."*"]` is for those feeds that can use it.
    let unused = |key: &str, advice: &str| {
        let key = section.key(key);
        if need == Need::Required && reader.is_own(&key) {
            reader.note(&key, None, advice);
        }
    };
    if matches!(word, Some(Word::Text | Word::Ndjson)) {
        unused("delimiter", "only format = \"csv\" has a delimiter: remove it");
    }
    match word {
        Some(Word::Text) => {
            unused("recipient", "with format = \"text\" the line is the recipient: remove it");
            FeedFormat::Text
        }
        Some(word) => {
            require(reader, section, "recipient", need, "name the column or key that holds the recipient");
            let recipient = recipient.unwrap_or_default();
            match word {
                Word::Csv => FeedFormat::Csv { delimiter, recipient },
                _ => FeedFormat::Ndjson { recipient },
            }
        }
        None => FeedFormat::Text,
    }
}

fn delimiter(reader: &Reader, section: &mut Section<'_>) -> u8 {
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
