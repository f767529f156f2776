//! Paths, web addresses and queues.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use url::Url;

use crate::{reader::Section, tree::shown_text};

const PATH: &str = "write an absolute path without `..`";

/// A text without rules of its own.
pub fn optional_text(section: &mut Section<'_>, key: &'static str) -> Option<String> {
    section.text(key)
}

/// An absolute path, taken apart and put together again so that equal paths compare equal.
pub fn optional_path(section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
    let text = section.text(key)?;
    let path: PathBuf = Path::new(&text).components().collect();
    // `..` can't be compared without looking at the disk, and a relative path would depend on where
    // the daemon was started.
    let is_plain = path.is_absolute()
        && !text.contains('\0')
        && path.components().all(|component| component != Component::ParentDir);
    if !is_plain {
        section.reader().note(&section.key(key), Some(shown_text(&text)), PATH);
    }
    Some(path)
}

/// The same; empty if it is missing.
pub fn absolute_path(section: &mut Section<'_>, key: &'static str) -> PathBuf {
    optional_path(section, key).unwrap_or_default()
}

/// The same; it must be there.
pub fn required_path(section: &mut Section<'_>, key: &'static str) -> PathBuf {
    let path = optional_path(section, key);
    section.require(key, PATH);
    path.unwrap_or_default()
}

/// An http(s) address without user, query or fragment.
pub fn web_address(section: &mut Section<'_>, key: &'static str) -> Option<Url> {
    let text = section.text(key)?;
    let url = parse_web_address(&text);
    if url.is_none() {
        // It may hold a password: not shown.
        let advice = "write an http:// or https:// address without user name, query or fragment";
        section.reader().note(&section.key(key), None, advice);
    }
    url
}

fn parse_web_address(text: &str) -> Option<Url> {
    Url::parse(text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

/// An SQS queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueAddress {
    /// By its name in the account and region of the credentials.
    Name(String),
    /// By its address, which ends in its name.
    Url(Url),
}

impl QueueAddress {
    /// The queue's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::Url(url) => url.path().rsplit('/').next().unwrap_or_default(),
        }
    }

    /// Whether it is a FIFO queue: the name ends in `.fifo`.
    pub fn is_fifo(&self) -> bool {
        self.name().ends_with(FIFO_SUFFIX)
    }
}

impl fmt::Display for QueueAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Url(url) => f.write_str(url.as_str()),
        }
    }
}

/// What the names of FIFO queues end in (Amazon SQS API reference, `CreateQueue`).
pub const FIFO_SUFFIX: &str = ".fifo";

/// The longest name of a queue (Amazon SQS API reference, `CreateQueue`).
pub(crate) const QUEUE_NAME_MAX: usize = 80;

fn is_queue_name(name: &str) -> bool {
    let stem = name.strip_suffix(FIFO_SUFFIX).unwrap_or(name);
    !stem.is_empty()
        && name.len() <= QUEUE_NAME_MAX
        && stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// A queue by its name or its address; an empty name replaces what is missing or wrong.
pub fn queue(section: &mut Section<'_>, key: &'static str) -> QueueAddress {
    let nothing = QueueAddress::Name(String::new());
    let text = section.text(key);
    section.require(key, "write the queue's name, or its address for a queue of another account");
    let Some(text) = text else { return nothing };
    let path = section.key(key);
    if !text.contains("://") {
        if !is_queue_name(&text) {
            let advice = "write a queue's name: 1 to 80 characters out of A-Z, a-z, 0-9, - and _; that of a FIFO \
                          queue ends in .fifo";
            section.reader().note(&path, Some(shown_text(&text)), advice);
        }
        return QueueAddress::Name(text);
    }
    let url = parse_web_address(&text).map(QueueAddress::Url).filter(|queue| is_queue_name(queue.name()));
    url.unwrap_or_else(|| {
        // It may hold a password: not shown.
        let advice = "write the queue's whole address, which ends in its name and has no user name, query or \
                      fragment: https://sqs.REGION.amazonaws.com/ACCOUNT/NAME";
        section.reader().note(&path, None, advice);
        nothing
    })
}
