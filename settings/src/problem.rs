//! What is wrong with a configuration, said so that all of it can be corrected in one go.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::escape::escape;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// In the operator's file; both count from 1.
    File {
        /// The line.
        line: usize,
        /// The character in it.
        column: usize,
    },
    /// In this environment variable.
    Environment(String),
    /// In the declarations that `config/default.toml` is made from.
    Default,
}

/// One thing to correct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key's full path, such as `destinations.support.rate_per_s`; empty for a syntax error.
    pub key: String,
    /// Where the value was written; `None` if it is missing.
    pub origin: Option<Origin>,
    /// The value, unless it is or may hold a secret.
    pub found: Option<String>,
    /// What is allowed, or what to do.
    pub advice: String,
}

/// Every problem of one configuration, in the order of the file.
#[derive(Clone, Debug)]
pub struct Problems {
    /// The operator's file.
    pub file: PathBuf,
    /// What to correct; never empty.
    pub list: Vec<Problem>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: can't read the configuration: {error}; name the file with -c FILE or POSTRIDER_CONFIG", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It was read, and is wrong.
    #[error(transparent)]
    Invalid(#[from] Problems),
}

impl Problem {
    /// One line: where, which key, what was found, what to do.
    pub fn line(&self, file: &Path) -> String {
        let mut line = match &self.origin {
            Some(Origin::File { line, column }) => format!("{}:{line}:{column}: ", file.display()),
            Some(Origin::Environment(name)) => format!("environment {name}: "),
            Some(Origin::Default) | None => format!("{}: ", file.display()),
        };
        if !self.key.is_empty() {
            line += &self.key;
            line += ": ";
        }
        if let Some(found) = &self.found {
            line = line + "found " + found + "; ";
        }
        line += &self.advice;
        // Names are the operator's, but the file may not be.
        escape(&line).into_owned()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.list.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&problem.line(&self.file))?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

impl Problems {
    /// `Err` with all of them, sorted by place and each once; `Ok` without any.
    pub fn check(file: &Path, mut list: Vec<Problem>) -> Result<(), Self> {
        if list.is_empty() {
            return Ok(());
        }
        // What is missing has no place: after what has one.
        let place = |problem: &Problem| (problem.origin.is_none(), problem.origin.clone());
        list.sort_by(|a, b| (place(a), &a.key, &a.advice).cmp(&(place(b), &b.key, &b.advice)));
        // One wrong value in a `"*"` table is met once for each feed or destination.
        list.dedup();
        Err(Self { file: file.to_owned(), list })
    }
}
