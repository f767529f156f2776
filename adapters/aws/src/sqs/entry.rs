//! What an entry of a queue says: a hint, as JSON, version 3. `docs/sqs.md` documents it; a change is a new version.

use postrider_actors::{
    model::{ids::BatchId, time::UnixMs},
    ports::Hint,
};
use serde::{Deserialize, Serialize};

/// The version that this program writes and reads.
const VERSION: u64 = 3;

/// Why a body can't be read as an entry. Without any of the body's text (I10).
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum EntryError {
    #[error("version {0} of the entry; this program reads version {VERSION}")]
    Version(u64),
    #[error("not an entry: {0} at line {1}, column {2}")]
    Json(&'static str, usize, usize),
}

#[derive(Serialize, Deserialize)]
struct Entry {
    version: u64,
    batch: BatchId,
    due: UnixMs,
}

#[derive(Deserialize)]
struct Version {
    version: u64,
}

pub(super) fn write(hint: &Hint) -> String {
    let entry = Entry { version: VERSION, batch: hint.batch, due: hint.due };
    serde_json::to_string(&entry).expect("an entry has string keys")
}

pub(super) fn read(text: &str) -> Result<Hint, EntryError> {
    // First the version: another one may have other fields.
    let Version { version } = serde_json::from_str(text).map_err(|error| unreadable(&error))?;
    if version != VERSION {
        return Err(EntryError::Version(version));
    }
    let Entry { batch, due, .. } = serde_json::from_str(text).map_err(|error| unreadable(&error))?;
    Ok(Hint { batch, due })
}

/// The error's own text may quote the body.
fn unreadable(error: &serde_json::Error) -> EntryError {
    use serde_json::error::Category;
    let what = match error.classify() {
        Category::Data => "other fields than expected",
        Category::Io | Category::Syntax | Category::Eof => "not JSON",
    };
    EntryError::Json(what, error.line(), error.column())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_hint_reads_back(batch: [u8; 16], due: u64) {
            let hint = Hint { batch: BatchId(batch), due: UnixMs(due) };
            let text = write(&hint);
            prop_assert!(text.len() < 100);
            prop_assert_eq!(read(&text), Ok(hint));
        }

        #[test]
        fn nothing_panics_and_no_text_of_a_body_is_told(text in ".*secret.*") {
            let error = read(&text).unwrap_err();
            prop_assert!(!error.to_string().contains("secret"));
        }
    }

    #[test]
    fn what_is_no_entry_is_refused_with_the_reason() {
        let reasons = [
            ("hello", "not an entry: not JSON"),
            (r#"{"version":2,"rows":[]}"#, "version 2 of the entry; this program reads version 3"),
            (r#"{"version":3,"batch":"xyz","due":1}"#, "not an entry: other fields than expected"),
            ("[]", "not an entry"),
        ];
        for (text, reason) in reasons {
            assert!(read(text).unwrap_err().to_string().starts_with(reason), "{text}");
        }
    }
}
