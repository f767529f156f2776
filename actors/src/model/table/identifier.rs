//! Names of tables and columns. They come from the configuration and go into statements, where no parameter can
//! replace them (F57): whatever is not a plain name is refused at the start, and plain names are always quoted.

use std::{fmt, str::FromStr};

/// The longest identifier that Postgres keeps whole ("Identifiers and Key Words"); Redshift takes 127.
pub const IDENTIFIER_BYTES_MAX: usize = 63;

/// A plain name: `[A-Za-z_][A-Za-z0-9_$]{0,62}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identifier(String);

/// A name that can't be used in a statement.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{found:?} is not a name of {what}: expected {expected}")]
pub struct IdentifierError {
    found: String,
    what: &'static str,
    expected: &'static str,
}

impl IdentifierError {
    fn of(found: &str, what: &'static str, expected: &'static str) -> Self {
        Self { found: found.chars().take(80).collect(), what, expected }
    }
}

impl Identifier {
    /// Takes a name as it is in the database's catalogue. Upper case is kept: statements quote it.
    pub fn parse(text: &str) -> Result<Self, IdentifierError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$');
        let is_plain = text.bytes().all(plain)
            && text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && text.len() <= IDENTIFIER_BYTES_MAX;
        if is_plain {
            Ok(Self(text.to_owned()))
        } else {
            let expected = "a letter or _, then up to 62 letters, digits, _ or $";
            Err(IdentifierError::of(text, "a column, table or schema", expected))
        }
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Quoted, for a statement.
impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl fmt::Debug for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Identifier {
    type Err = IdentifierError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// A table: `table`, found by the role's search path, or `schema.table`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableName {
    /// Its schema, if it is given.
    pub schema: Option<Identifier>,
    /// Its name.
    pub name: Identifier,
}

impl TableName {
    /// As it is read: `table` or `schema.table`.
    pub fn plain(&self) -> String {
        let schema = self.schema.as_ref().map(|schema| format!("{}.", schema.as_str()));
        format!("{}{}", schema.unwrap_or_default(), self.name.as_str())
    }

    /// Reads `table` or `schema.table`.
    pub fn parse(text: &str) -> Result<Self, IdentifierError> {
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema), name),
            None => (None, text),
        };
        let refused = |_| IdentifierError::of(text, "a table", "`table` or `schema.table`, without quotes");
        Ok(Self {
            schema: schema.map(Identifier::parse).transpose().map_err(refused)?,
            name: Identifier::parse(name).map_err(refused)?,
        })
    }
}

/// Each part quoted, for a statement.
impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{schema}.")?;
        }
        write!(f, "{}", self.name)
    }
}

impl FromStr for TableName {
    type Err = IdentifierError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn f57_hostile_identifiers_are_refused() {
        for hostile in [
            "",
            "id\"; drop table users; --",
            "id\" text); drop",
            "a b",
            "a-b",
            "1a",
            "$a",
            "a.b",
            "a\0b",
            "a\nb",
            "naïve",
            "ｉｄ",
            "id;",
            "id'",
            "\"id\"",
            "id/*",
            &"x".repeat(64),
        ] {
            assert!(Identifier::parse(hostile).is_err(), "{hostile:?}");
            assert!(TableName::parse(&format!("public.{hostile}")).is_err(), "{hostile:?}");
        }
        for hostile in ["a.b.c", ".", "a.", ".a", "a..b", "\"a\".\"b\""] {
            let error = TableName::parse(hostile).unwrap_err();
            assert!(error.to_string().contains("schema.table"), "{error}");
        }
    }

    #[test]
    fn names_are_quoted_part_by_part() {
        assert_eq!(TableName::parse("Sales.Order$1").unwrap().to_string(), r#""Sales"."Order$1""#);
        assert_eq!(TableName::parse("select").unwrap().to_string(), r#""select""#);
        assert!(Identifier::parse(&"x".repeat(63)).is_ok());
    }

    proptest! {
        #[test]
        fn f57_what_is_taken_can_break_out_of_no_quotes(text: String, plain in "[A-Za-z_][A-Za-z0-9_$]{0,62}") {
            if let Ok(identifier) = Identifier::parse(&text) {
                prop_assert!(!identifier.as_str().contains(['"', '\\', '\0', '\'']));
            }
            prop_assert_eq!(Identifier::parse(&plain).unwrap().to_string(), format!("\"{plain}\""));
        }
    }
}
