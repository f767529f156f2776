//! Text from files, receivers and operators can't forge a log line or drive a terminal (F27).

use std::{borrow::Cow, fmt::Write as _};

/// Whether a terminal or a log reader may take the character for more than itself: control
/// characters (C0, C1, DEL), line and paragraph separators, and the marks that reorder text.
pub fn is_unsafe(char: char) -> bool {
    char.is_control()
        || matches!(char,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The text with every character that could be taken for more than itself written as `\n` or
/// `\u{1b}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for char in text.chars() {
        if is_unsafe(char) { push_escape(&mut escaped, char) } else { escaped.push(char) }
    }
    Cow::Owned(escaped)
}

/// A field's value: bare if it can only be one, else in quotes, so that a value can't pass for
/// further fields.
pub fn push_value(line: &mut String, value: &str) {
    let is_bare = !value.is_empty()
        && !value.contains(|char| matches!(char, ' ' | '"' | '=' | '\\') || is_unsafe(char));
    if is_bare {
        line.push_str(value);
        return;
    }
    line.push('"');
    for char in value.chars() {
        match char {
            '"' | '\\' => {
                line.push('\\');
                line.push(char);
            }
            char if is_unsafe(char) => push_escape(line, char),
            char => line.push(char),
        }
    }
    line.push('"');
}

fn push_escape(text: &mut String, char: char) {
    // Writing to a String can't fail.
    let _ = match char {
        '\n' => write!(text, "\\n"),
        '\r' => write!(text, "\\r"),
        '\t' => write!(text, "\\t"),
        char => write!(text, "{}", char.escape_unicode()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn f27_what_could_be_taken_for_more_is_escaped() {
        assert_eq!(escape("alerts.csv"), "alerts.csv");
        assert!(matches!(escape("größe 1"), Cow::Borrowed(_)));
        assert_eq!(escape("a\nb\r\tc"), "a\\nb\\r\\tc");
        assert_eq!(escape("\x1b[31mred\u{9b}x\x7f"), "\\u{1b}[31mred\\u{9b}x\\u{7f}");
        assert_eq!(escape("gpj\u{202e}.exe"), "gpj\\u{202e}.exe");
    }

    #[test]
    fn a_value_can_not_pass_for_further_fields() {
        let value = |text: &str| {
            let mut line = String::new();
            push_value(&mut line, text);
            line
        };
        assert_eq!(value("alerts.csv"), "alerts.csv");
        assert_eq!(value(""), "\"\"");
        assert_eq!(value("a state=sent"), "\"a state=sent\"");
        assert_eq!(value("a\" b=\"c\\"), "\"a\\\" b=\\\"c\\\\\"");
        assert_eq!(value("a\nERROR"), "\"a\\nERROR\"");
    }

    proptest! {
        #[test]
        fn nothing_unsafe_comes_through(text in "\\PC*|.{0,20}|[\\x00-\\x1f\\u{80}-\\u{9f}\\u{2020}-\\u{2070}]{0,20}") {
            prop_assert!(!escape(&text).contains(is_unsafe));
            let mut line = String::new();
            push_value(&mut line, &text);
            prop_assert!(!line.contains(is_unsafe));
        }
    }
}
