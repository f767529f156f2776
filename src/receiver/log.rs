//! The receiver's log: one JSON line per message, written before the answer. It is read after kills,
//! so a request's lines are one `write` to a file opened for appending: they are there whole or not at all.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// One message of a request.
#[derive(Debug, Serialize)]
pub(super) struct LogEntry<'a> {
    /// When the request was complete, in milliseconds since the epoch.
    pub(super) at: u64,
    pub(super) id: Option<&'a str>,
    /// The bundle that it came in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bundle: Option<&'a str>,
    /// How many messages that has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) of: Option<usize>,
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
    entry: LogEntry<'a>,
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

    /// Writes the messages of one request, with their bodies.
    pub(super) fn append<'a>(
        &self,
        messages: impl IntoIterator<Item = (LogEntry<'a>, &'a [u8])>,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        for (entry, body) in messages {
            let digest: [u8; 32] = Sha256::digest(body).into();
            let line = LogLine {
                entry,
                body_sha256: hex(&digest),
                body: self.with_bodies.then(|| String::from_utf8_lossy(body).into_owned()),
            };
            serde_json::to_writer(&mut bytes, &line)?;
            bytes.push(b'\n');
        }
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
