//! Where a secret is kept. Never in the configuration itself, which is read by more people and
//! programs than a secret may be.

use std::{fmt, path::PathBuf};

/// Where a secret is kept.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// `env:NAME`: in an environment variable.
    Environment(String),
    /// `file:PATH`: in a file of its own.
    File(PathBuf),
    /// `credential:NAME`: in a credential that systemd passes (`LoadCredential=`).
    Credential(String),
}

/// What to write instead of something that is not a source.
pub const SOURCES: &str = "a secret is never written into the configuration: keep it in an environment \
     variable, a file or a systemd credential and write \"env:NAME\", \"file:/PATH\" or \"credential:NAME\"";

impl SecretSource {
    /// Reads a source; `None` if the text does not begin with a known prefix, and `Some(Err)` with
    /// what is wrong after the prefix.
    pub fn parse(text: &str) -> Option<Result<Self, &'static str>> {
        let (kind, name) = text.split_once(':')?;
        Some(match kind {
            "env" => {
                let is_name = !name.is_empty()
                    && !name.starts_with(|first: char| first.is_ascii_digit())
                    && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                if is_name {
                    Ok(Self::Environment(name.to_owned()))
                } else {
                    Err("write env:NAME with the name of a variable: letters, digits, _")
                }
            }
            "file" if name.starts_with('/') && !name.contains('\0') => Ok(Self::File(name.into())),
            "file" => Err("write file:/PATH with an absolute path"),
            "credential" => {
                // systemd.exec(5): a credential's name is a valid file name.
                let is_name = (1..=255).contains(&name.len())
                    && name != "."
                    && name != ".."
                    && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:".contains(&byte));
                if is_name {
                    Ok(Self::Credential(name.to_owned()))
                } else {
                    Err("write credential:NAME with a name as in LoadCredential=NAME:PATH, without a slash")
                }
            }
            _ => return None,
        })
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Credential(name) => write!(f, "credential:{name}"),
        }
    }
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
