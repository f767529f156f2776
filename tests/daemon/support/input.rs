//! Files to drop, and how each of their rows must end.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::scripted::sha256_hex;

/// How a row must end; the oracle's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Sent or dead.
    Ok,
    Sent,
    Dead,
    /// Sent, dead, or cancelled with its file.
    Cancelled,
    /// Sent, dead, or unsent because its time was over.
    Unsent,
    Rejected,
    Duplicate,
}

#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) kind: Kind,
    pub(crate) recipient: Option<String>,
    /// Its cells, where the body is the default one.
    cells: Option<Vec<String>>,
}

impl Row {
    pub(crate) fn new(kind: Kind, recipient: &str) -> Self {
        Self { kind, recipient: Some(recipient.to_owned()), cells: None }
    }

    pub(crate) fn rejected() -> Self {
        Self { kind: Kind::Rejected, recipient: None, cells: None }
    }
}

/// A file and its expectation.
#[derive(Clone)]
pub(crate) struct Input {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    columns: Option<Vec<String>>,
    pub(crate) rows: Vec<Row>,
    /// How the file must end.
    state: &'static str,
    /// What it is known by, if that is not the digest of its bytes.
    known_by: Option<String>,
}

/// The file's name without its ending; makes recipients, and so contents, differ from file to file.
fn stem(name: &str) -> &str {
    name.split('.').next().expect("`split` yields at least one piece")
}

/// The recipient in row `row` of a generated file.
pub(crate) fn recipient(name: &str, row: usize) -> String {
    format!("user-{}-{row:07}", stem(name))
}

impl Input {
    /// A csv file of `count` good rows: `user_id,name,amount`.
    pub(crate) fn csv(name: &str, count: usize) -> Self {
        let columns = ["user_id", "name", "amount"].map(str::to_owned).to_vec();
        let mut bytes = String::with_capacity(count * 48) + "user_id,name,amount\n";
        let mut rows = Vec::with_capacity(count);
        for row in 1..=count {
            let recipient = recipient(name, row);
            let cells = vec![recipient.clone(), format!("Näme {row}, Jr."), format!("{}.50", row % 1000)];
            writeln!(bytes, "{},\"{}\",{}", cells[0], cells[1], cells[2]).expect("strings take everything");
            rows.push(Row { kind: Kind::Ok, recipient: Some(recipient), cells: Some(cells) });
        }
        Self {
            name: name.into(),
            bytes: bytes.into_bytes(),
            columns: Some(columns),
            rows,
            state: "ingested",
            known_by: None,
        }
    }

    /// A text file of `count` good rows.
    pub(crate) fn text(name: &str, count: usize) -> Self {
        let rows: Vec<_> = (1..=count).map(|row| Row::new(Kind::Ok, &recipient(name, row))).collect();
        let mut bytes = String::with_capacity(count * 24);
        for row in 1..=count {
            writeln!(bytes, "{}", recipient(name, row)).expect("strings take everything");
        }
        Self::of(name, bytes, rows)
    }

    /// A file written by hand.
    pub(crate) fn of(name: &str, bytes: impl Into<Vec<u8>>, rows: Vec<Row>) -> Self {
        Self {
            name: name.into(),
            bytes: bytes.into(),
            columns: None,
            rows,
            state: "ingested",
            known_by: None,
        }
    }

    /// The same file, expected to end in `state`.
    pub(crate) fn ending(mut self, state: &'static str) -> Self {
        self.state = state;
        self
    }

    /// The same file, which went away before its bytes were read: it is known by `digest`, and no row of it.
    pub(crate) fn unread(mut self, digest: &str) -> Self {
        self.known_by = Some(digest.to_owned());
        self.rows.clear();
        self
    }

    /// The same file under another name.
    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The same file with every accepted row expected to end as `kind`.
    pub(crate) fn all(mut self, kind: Kind) -> Self {
        for row in &mut self.rows {
            row.kind = kind;
        }
        self
    }

    /// Another end for one row, from 1.
    pub(crate) fn but(mut self, row: usize, kind: Kind) -> Self {
        self.rows[row - 1].kind = kind;
        self
    }

    /// The same file, its bodies made by a template: the oracle can't foretell them.
    pub(crate) fn templated(mut self) -> Self {
        self.columns = None;
        self
    }

    /// The oracle's description of it.
    pub(crate) fn manifest(&self, feed: &str, destinations: &[String]) -> Value {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                let kind = match row.kind {
                    Kind::Ok => "ok",
                    Kind::Sent => "sent",
                    Kind::Dead => "dead",
                    Kind::Cancelled => "cancelled",
                    Kind::Unsent => "unsent",
                    Kind::Rejected => "rejected",
                    Kind::Duplicate => "duplicate",
                };
                json!([kind, row.recipient, row.cells])
            })
            .collect();
        json!({
            "feed": feed,
            "name": self.name,
            "sha256": self.known_by.clone().unwrap_or_else(|| sha256_hex(&self.bytes)),
            "destinations": destinations,
            "state": self.state,
            "columns": self.columns,
            "rows": rows,
        })
    }
}
