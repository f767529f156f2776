//! One value: checked against its column's type and written in the one form that every database reads alike.
//!
//! An empty text is not a value for any type but text: a delimited file can't say it otherwise (S0.3).

pub use super::source::Raw;
use super::{ColumnType, calendar};

/// The most digits of an exact decimal, before and after the point together. Redshift keeps 38, Postgres 1000
/// where a column says how many; the database refuses what its column can't hold.
pub const DECIMAL_DIGITS_MAX: usize = 1_000;

/// How deep JSON may be nested: as deep as it is read elsewhere here. A database's stack has a limit too (54001).
pub const JSON_DEPTH_MAX: usize = 128;

/// How much of a value an error repeats.
const SHOWN_CHARS: usize = 40;

/// The value in its type's one form; `None` is NULL. The error says what was found and what is expected.
pub fn normalise(kind: ColumnType, raw: &Raw<'_>) -> Result<Option<Box<str>>, String> {
    let text: &str = match raw {
        Raw::Text(text) => text,
        Raw::Json(json) => json,
    };
    if text.contains('\0') {
        return Err("holds a NUL character, which no database takes".to_owned());
    }
    if kind == ColumnType::Text {
        return Ok(Some(text.into()));
    }
    if kind == ColumnType::Json {
        return json(raw);
    }
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(None);
    }
    let (value, expected) = match kind {
        ColumnType::Integer => (integer(text), "a whole number of 64 bits"),
        ColumnType::Numeric => (decimal(text), "a decimal number of at most 1000 digits"),
        ColumnType::Double => (double(text), "a finite number"),
        ColumnType::Boolean => (boolean(text), "true or false (or yes, no, on, off, t, f, y, n, 1, 0)"),
        ColumnType::Timestamp => {
            let expected =
                "RFC 3339 with an offset, e.g. 2026-01-31T23:59:59.5Z, or Unix seconds or milliseconds";
            (calendar::timestamp(text), expected)
        }
        ColumnType::Date => (calendar::date(text), "YYYY-MM-DD of the years 0001 to 9999"),
        ColumnType::Text | ColumnType::Json => unreachable!("answered above"),
    };
    match value {
        Some(value) => Ok(Some(value.into())),
        None => Err(format!("found {}, expected {expected}", shown(text))),
    }
}

fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARS).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{dots}")
}

/// A field's JSON as it stood in the file; a text has to be JSON itself if it comes from a cell.
fn json(raw: &Raw<'_>) -> Result<Option<Box<str>>, String> {
    let text = match raw {
        Raw::Json(json) => (*json).to_owned(),
        Raw::Text(text) => {
            let text = text.trim_ascii();
            if text.is_empty() {
                return Ok(None);
            }
            // A string of a JSON object that holds JSON, or a cell: both are read. Any other text is a string.
            match serde_json::from_str::<serde::de::IgnoredAny>(text) {
                Ok(_) => text.to_owned(),
                Err(error) => return Err(format!("found {}, expected JSON: {error}", shown(text))),
            }
        }
    };
    if has_nul_escape(&text) {
        return Err("holds \\u0000, a NUL character, which no database takes".to_owned());
    }
    if is_too_deep(&text) {
        return Err(format!("is nested more than {JSON_DEPTH_MAX} deep"));
    }
    Ok(Some(text.into()))
}

/// Whether a JSON text is nested too deep.
fn is_too_deep(json: &str) -> bool {
    let (mut depth, mut is_text) = (0usize, false);
    let mut bytes = json.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => is_text = !is_text,
            b'\\' => drop(bytes.next()), // only in a text
            b'[' | b'{' if !is_text => {
                depth += 1;
                if depth > JSON_DEPTH_MAX {
                    return true;
                }
            }
            b']' | b'}' if !is_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// Whether a JSON text has an escaped NUL, not an escaped backslash before `u0000`.
fn has_nul_escape(json: &str) -> bool {
    let bytes = json.as_bytes();
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|&byte| byte == b'\\') {
        let escape = at + found;
        if bytes[escape + 1..].starts_with(b"u0000") {
            return true;
        }
        at = (escape + 2).min(bytes.len());
    }
    false
}

/// A sign, then digits alone.
fn integer(text: &str) -> Option<String> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse::<i64>().ok().map(|value| value.to_string())
}

/// A decimal without an exponent, whatever it came with: Redshift reads none.
fn decimal(text: &str) -> Option<String> {
    let (sign, unsigned) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !are_digits(whole) || !are_digits(fraction) {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    let length = |text: &str| i64::try_from(text.len()).unwrap_or(i64::MAX);
    let point = length(whole).saturating_add(i64::from(exponent));
    let (before, after) = (point.max(0) as u64, length(&digits).saturating_sub(point).max(0) as u64);
    if before + after > DECIMAL_DIGITS_MAX as u64 {
        return None;
    }
    let number = if point <= 0 {
        format!("0.{}{digits}", "0".repeat(point.unsigned_abs() as usize))
    } else if point as usize >= digits.len() {
        format!("{digits}{}", "0".repeat(point as usize - digits.len()))
    } else {
        format!("{}.{}", &digits[..point as usize], &digits[point as usize..])
    };
    Some(format!("{sign}{number}"))
}

fn double(text: &str) -> Option<String> {
    // `parse` takes words for infinity and for what is not a number.
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
    let value = text.parse::<f64>().ok().filter(|value| is_number && value.is_finite())?;
    Some(format!("{value:?}")) // the shortest text that reads back, with an exponent where it is large
}

fn boolean(text: &str) -> Option<String> {
    let value = match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => "true",
        "false" | "f" | "no" | "n" | "off" | "0" => "false",
        _ => return None,
    };
    Some(value.to_owned())
}
