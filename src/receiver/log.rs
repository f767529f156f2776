//! The receiver's log: one JSON line per request, written before the answer. It is read after kills,
//! so a line is one `write` to a file opened for appending: it is there whole or not at all.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// One request.
#[derive(Debug, Serialize)]
pub(super) struct LogEntry<'a> {
    /// When it was complete, in milliseconds since the epoch.
    pub(super) at: u64,
    pub(super) id: Option<&'a str>,
    pub(super) timestamp: Option<&'a str>,
    pub(super) path: &'a str,
    /// What it will be answered.
    pub(super) status: u16,
    pub(super) bytes: usize,
    /// Whether its signature is good; null without a secret to check it with.
    pub(super) verified: Option<bool>,
}

#[derive(Serialize)]
struct LogLine<'a> {
    #[serde(flatten)]
    entry: &'a LogEntry<'a>,
    body_sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
}

#[derive(Debug)]
pub(super) struct RequestLog {
    file: File,
    with_bodies: bool,
}

impl RequestLog {
    pub(super) fn open(path: &Path, with_bodies: bool) -> anyhow::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.with_context(|| format!("can't open the log {}", path.display()))?;
        Ok(Self { file, with_bodies })
    }

    pub(super) fn append(&self, entry: &LogEntry<'_>, body: &[u8]) -> io::Result<()> {
        let digest: [u8; 32] = Sha256::digest(body).into();
        let line = LogLine {
            entry,
            body_sha256: hex(&digest),
            body: self.with_bodies.then(|| String::from_utf8_lossy(body).into_owned()),
        };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        let written = (&self.file).write(&bytes)?;
        if written < bytes.len() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "only a part of a line was written"));
        }
        Ok(())
    }
}

fn hex(digest: &[u8; 32]) -> String {
    digest
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}
