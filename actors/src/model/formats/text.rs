//! `text`: one id per line. Spaces and tabs around it are dropped; a line of nothing else is blank.

use super::{RowError, check_recipient, check_text};

/// Lays out a line; `false` if it is blank.
pub(super) fn lay_out(line: &[u8], bytes: &mut Vec<u8>) -> Result<bool, RowError> {
    let text = check_text(line)?.trim_matches([' ', '\t']);
    if text.is_empty() {
        return Ok(false);
    }
    check_recipient(text)?;
    bytes.extend_from_slice(text.as_bytes());
    Ok(true)
}

/// Lays out a line of anything; `false` if it is blank.
pub(super) fn lay_out_line(line: &[u8], bytes: &mut Vec<u8>) -> Result<bool, RowError> {
    let text = check_text(line)?.trim_matches([' ', '\t', '\r']);
    bytes.extend_from_slice(text.as_bytes());
    Ok(!text.is_empty())
}
