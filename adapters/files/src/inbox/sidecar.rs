//! `NAME.done`: marks a file as complete; optionally says what the file holds.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use postrider_actors::ports::Expected;

/// No sidecar needs more.
pub(super) const SIDECAR_BYTES_MAX: u64 = 4096;

/// Reads a sidecar of the file `name`: nothing at all, or lines of `sha256=<hex>` and `rows=<n>`, or the one
/// line that `sha256sum` prints. Anything else is refused with the reason: a promise that is not
/// understood must not be taken for one that is kept.
pub(super) fn parse(name: &OsStr, bytes: &[u8]) -> Result<Expected, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "its sidecar is not UTF-8 text".to_owned())?;
    let lines: Vec<_> = text
        .lines()
        .enumerate()
        .map(|(n, line)| (n + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    if let [(_, line)] = lines[..]
        && let Some(sha256) = sha256sum(name, line)?
    {
        return Ok(Expected { sha256: Some(sha256), rows: None });
    }
    let mut expected = Expected::default();
    for (number, line) in lines {
        let refuse = |problem: &str| Err(format!("its sidecar, line {number}: {problem}"));
        let (key, value) = match line.split_once('=') {
            Some((key, value)) => (key.trim(), value.trim()),
            None => return refuse("expected `sha256=<hex>`, `rows=<number>` or what sha256sum prints"),
        };
        match key {
            "sha256" if expected.sha256.is_some() => return refuse("`sha256` is given twice"),
            "sha256" if is_sha256(value) => expected.sha256 = Some(value.to_ascii_lowercase()),
            "sha256" => return refuse("`sha256` takes 64 hex digits"),
            "rows" if expected.rows.is_some() => return refuse("`rows` is given twice"),
            "rows" => match value.parse() {
                Ok(rows) => expected.rows = Some(rows),
                Err(_) => return refuse("`rows` takes a whole number"),
            },
            _ => return refuse("the key is neither `sha256` nor `rows`"),
        }
    }
    Ok(expected)
}

/// Reads `<hex>  NAME` or `<hex> *NAME`. A leading `\` says that the name is escaped.
fn sha256sum(name: &OsStr, line: &str) -> Result<Option<String>, String> {
    let escaped = line.starts_with('\\');
    let Some((digest, rest)) = line.trim_start_matches('\\').split_at_checked(64) else { return Ok(None) };
    if !is_sha256(digest) {
        return Ok(None);
    }
    let named = rest.strip_prefix("  ").or_else(|| rest.strip_prefix(" *")).unwrap_or(rest);
    let base = named.rsplit('/').next().unwrap_or(named);
    // The digest alone names no file, and an escaped name is not worth unescaping to find a mix-up.
    if !rest.is_empty() && !escaped && base.as_bytes() != name.as_bytes() {
        return Err("its sidecar holds the digest of a file with another name".to_owned());
    }
    Ok(Some(digest.to_ascii_lowercase()))
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn read(text: &str) -> Result<Expected, String> {
        parse(OsStr::new("users.csv"), text.as_bytes())
    }

    #[test]
    fn both_forms_are_read_and_an_empty_one_promises_nothing() {
        let sha256 = Some(DIGEST.to_owned());
        assert_eq!(read(""), Ok(Expected::default()));
        assert_eq!(read("\n \n"), Ok(Expected::default()));
        let both = Expected { sha256: sha256.clone(), rows: Some(12) };
        assert_eq!(read(&format!("rows = 12\r\nsha256={}\n", DIGEST.to_uppercase())), Ok(both));
        let digest = Ok(Expected { sha256, rows: None });
        for text in ["", "  users.csv", " *users.csv", "  /srv/x/users.csv", "\n"] {
            assert_eq!(read(&format!("{DIGEST}{text}")), digest, "{text:?}");
        }
        assert_eq!(read(&format!("\\{DIGEST}  a\\nb")), digest);
    }

    #[test]
    fn anything_else_is_refused_with_its_line() {
        for (text, why) in [
            ("rows=12\nrows=12", "line 2: `rows` is given twice"),
            ("rows=-1", "`rows` takes a whole number"),
            ("sha256=abc", "64 hex digits"),
            ("\nlines=1", "line 2: the key is neither"),
            ("ok", "line 1: expected"),
            ("ÿ".repeat(40).as_str(), "line 1: expected"),
        ] {
            assert!(read(text).unwrap_err().contains(why), "{text}");
        }
        assert!(read(&format!("{DIGEST}  other.csv")).unwrap_err().contains("another name"));
        assert!(read(&format!("{DIGEST}  users.csv\n{DIGEST}  b")).is_err());
        assert!(parse(OsStr::new("a"), b"\xff").unwrap_err().contains("UTF-8"));
    }
}
