//! Values as literals of a statement, where no parameter can be sent.

/// What a backslash between quotes means. Every connection asks the server, because an error here is an
/// injection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backslash {
    /// A character like any other (`standard_conforming_strings`).
    Plain,
    /// The beginning of an escape.
    Escape,
}

/// Has one character where a backslash escapes, and two where it is plain; it ends where it seems to in both.
pub(super) const PROBE: &str = r"SELECT length('\\')";

impl Backslash {
    /// By the server's answer to [`PROBE`].
    pub(super) fn by_probe(answer: &str) -> Option<Self> {
        match answer {
            "1" => Some(Self::Escape),
            "2" => Some(Self::Plain),
            _ => None,
        }
    }

    /// Appends a text between quotes. It holds no NUL: rows and names are without.
    pub(super) fn literal(self, statement: &mut String, text: &str) {
        statement.push('\'');
        let mut rest = text;
        while let Some(at) = rest.find(['\'', '\\']) {
            statement.push_str(&rest[..=at]);
            let special = rest.as_bytes()[at];
            // Doubled, both stand for themselves: a quote always, a backslash where it escapes.
            if special == b'\'' || self == Self::Escape {
                statement.push(char::from(special));
            }
            rest = &rest[at + 1..];
        }
        statement.push_str(rest);
        statement.push('\'');
    }

    /// Appends a value: a literal or NULL.
    pub(super) fn value(self, statement: &mut String, value: Option<&str>) {
        match value {
            Some(text) => self.literal(statement, text),
            None => statement.push_str("NULL"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quoted(backslash: Backslash, text: &str) -> String {
        let mut statement = String::new();
        backslash.literal(&mut statement, text);
        statement
    }

    /// Reads a literal as a server does, and fails if it ends early.
    fn read(backslash: Backslash, literal: &str) -> Option<String> {
        let mut characters = literal.strip_prefix('\'')?.chars();
        let mut text = String::new();
        loop {
            match characters.next()? {
                '\'' => match characters.next() {
                    Some('\'') => text.push('\''),
                    Some(_) => return None,
                    None => return Some(text),
                },
                '\\' if backslash == Backslash::Escape => match characters.next()? {
                    '\\' => text.push('\\'),
                    _ => return None, // an escape that nobody wrote
                },
                other => text.push(other),
            }
        }
    }

    #[test]
    fn f57_a_literal_cannot_be_left() {
        assert_eq!(quoted(Backslash::Plain, r"a'b\c"), r"'a''b\c'");
        assert_eq!(quoted(Backslash::Escape, r"a'b\c"), r"'a''b\\c'");
        assert_eq!(quoted(Backslash::Escape, r"\'; DROP TABLE t; --"), r"'\\''; DROP TABLE t; --'");
    }

    proptest! {
        #[test]
        fn any_text_reads_back(text in r"([\\'a\n\u{e9}]|\PC){0,40}") {
            for backslash in [Backslash::Plain, Backslash::Escape] {
                let literal = quoted(backslash, &text);
                prop_assert_eq!(read(backslash, &literal), Some(text.clone()), "{}", literal);
            }
        }
    }
}
