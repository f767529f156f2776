//! What is wrong with a file as a whole.

/// Why a file as a whole is unusable. Rows read before stay valid.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FileError {
    /// It starts with a UTF-16 or UTF-32 byte order mark.
    #[error("line 1: the file is UTF-16, only UTF-8 is read: convert it, e.g. `iconv -f UTF-16 -t UTF-8`")]
    Utf16,
    /// It starts like a compressed file.
    #[error("line 1: the file looks like {kind} data: {advice}")]
    Compressed {
        /// What it looks like.
        kind: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The header is no readable text.
    #[error("line {line}: the CSV header {problem}")]
    Header {
        /// Where it starts.
        line: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The header does not name the recipient's column.
    #[error("line {line}: no column is named `{wanted}` (the feed's `recipient`); the header has {found}")]
    NoRecipientColumn {
        /// Where the header starts.
        line: u64,
        /// The configured name.
        wanted: String,
        /// How many columns were found, and which, for the operator.
        found: String,
    },
}
