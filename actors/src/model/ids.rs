//! Identities. All are deterministic: a re-parse, a re-drop or a second process makes the same ones,
//! so that appending is insert-if-absent (design §6).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// A file's identity: the first 128 bits of SHA-256 over feed name and content digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub [u8; 16]);

impl FileId {
    /// The identity of content (given by its SHA-256) that was dropped into `feed`.
    pub fn derive(feed: &str, content_sha256: &[u8; 32]) -> Self {
        Self(truncated_digest(&[feed.as_bytes(), content_sha256]))
    }
}

/// A batch's identity, for its whole life: a retry is the same batch, due again (design §6).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub [u8; 16]);

impl BatchId {
    /// The identity of the batch of `file` for `destination` that starts at `first_row`.
    pub fn derive(file: FileId, destination: &str, first_row: u64) -> Self {
        Self(truncated_digest(&[&file.0, destination.as_bytes(), &first_row.to_le_bytes()]))
    }
}

/// SHA-256 over length-prefixed parts (so that no two part lists collide), cut to 128 bits.
fn truncated_digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}

/// Bytes in lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut hex, byte| {
        use std::fmt::Write as _;
        let _ = write!(hex, "{byte:02x}"); // writing to a String can't fail
        hex
    })
}

/// A message's identity, sent as `webhook-id`: `msg_<file id>_<row>`. Rows count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// The file the message came from.
    pub file: FileId,
    /// Its row in that file, from 1; a CSV header is not a row.
    pub row: u64,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "msg_{}_{}", self.file, self.row)
    }
}

/// A bundle's identity: the digest of its exact list of messages (B15). Another list is another id, or a receiver that
/// deduplicates by it would lose messages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BundleId(pub [u8; 16]);

impl BundleId {
    /// The identity of these messages in one request: the first 128 bits of SHA-256 over their ids, each with a line feed
    /// behind it, so that a receiver can compute it in any language.
    pub fn derive(messages: &[MessageId]) -> Self {
        let mut hash = Sha256::new();
        for message in messages {
            hash.update(format!("{message}\n"));
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }
}

/// What a request is sent as in `webhook-id`: `msg_…`, or `bundle_<32 hex digits>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestId {
    /// One message.
    Message(MessageId),
    /// A JSON array of messages.
    Bundle(BundleId),
}

impl From<MessageId> for RequestId {
    fn from(id: MessageId) -> Self {
        Self::Message(id)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(id) => id.fmt(f),
            Self::Bundle(id) => write!(f, "bundle_{id}"),
        }
    }
}

/// Text that is not an id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{found}` is not a {kind} (expected {expected})")]
pub struct ParseIdError {
    found: String,
    kind: &'static str,
    expected: &'static str,
}

impl FromStr for MessageId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (file, row) = text.strip_prefix("msg_")?.split_once('_')?;
            Some(Self { file: file.parse().ok()?, row: row.parse().ok()? })
        };
        parse().ok_or_else(|| ParseIdError {
            found: text.chars().take(80).collect(),
            kind: "message id",
            expected: "msg_<32 hex digits>_<row>",
        })
    }
}

macro_rules! hex_id {
    ($name:ident, $kind:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut hex = [0u8; 32];
                for (pair, byte) in hex.chunks_exact_mut(2).zip(self.0) {
                    pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
                    pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
                }
                f.pad(std::str::from_utf8(&hex).expect("hex digits are ASCII"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let error = || ParseIdError {
                    found: text.chars().take(80).collect(),
                    kind: $kind,
                    expected: "32 hex digits",
                };
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(error());
                }
                let mut id = [0; 16];
                for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| error())?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
                }
                Ok(Self(id))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
hex_id!(FileId, "file id");
hex_id!(BatchId, "batch id");
hex_id!(BundleId, "bundle id");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_what_they_print() {
        let file = FileId::derive("alerts", &[7; 32]);
        let message = MessageId { file, row: 18_446_744_073_709_551_615 };
        assert_eq!(message.to_string().parse(), Ok(message));
        assert_eq!(file.to_string().parse(), Ok(file));
    }

    #[test]
    fn identity_depends_on_feed_content_and_nothing_else() {
        assert_eq!(FileId::derive("a", &[1; 32]), FileId::derive("a", &[1; 32]));
        assert_ne!(FileId::derive("a", &[1; 32]), FileId::derive("b", &[1; 32]));
        assert_ne!(FileId::derive("a", &[1; 32]), FileId::derive("a", &[2; 32]));
    }

    #[test]
    fn a_batch_is_its_file_destination_and_first_row() {
        let (file, other) = (FileId::derive("a", &[1; 32]), FileId::derive("a", &[2; 32]));
        let ids = [
            BatchId::derive(file, "d", 1),
            BatchId::derive(file, "d", 2),
            BatchId::derive(file, "e", 1),
            BatchId::derive(other, "d", 1),
        ];
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
        assert_eq!(BatchId::derive(file, "d", 1), ids[0]);
    }

    #[test]
    fn b15_a_bundle_is_its_exact_list_of_messages() {
        let file = FileId([0xab; 16]);
        let ids = |rows: &[u64]| rows.iter().map(|&row| MessageId { file, row }).collect::<Vec<_>>();
        let of = |rows: &[u64]| BundleId::derive(&ids(rows));
        let lists: [&[u64]; 7] = [&[1, 2, 3], &[1, 2], &[2, 3], &[1, 3, 2], &[12, 3], &[1, 23], &[1]];
        assert_eq!(lists.map(of).into_iter().collect::<std::collections::HashSet<_>>().len(), lists.len());
        assert_eq!(of(&[1, 2, 3]), of(&[1, 2, 3]));
        // printf 'msg_%s_1\nmsg_%s_2\n' $F $F | sha256sum | cut -c -32, with F = abab…
        let id = RequestId::Bundle(of(&[1, 2])).to_string();
        assert_eq!(id, "bundle_f7ee0c521f7dc6e5c02d5488d00ffeea");
    }

    #[test]
    fn what_is_no_id_says_what_one_looks_like() {
        for text in ["", "msg_", "msg_12_1", "msg_zz_1", "7", "msg_é", "ééééééééééééééééaaaaaaaaaaaaaaaa"]
        {
            let error = text.parse::<MessageId>().unwrap_err().to_string();
            assert!(error.contains("msg_<32 hex digits>_<row>"), "{error}");
            assert!(text.parse::<FileId>().is_err());
        }
    }
}
