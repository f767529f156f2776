//! Connection settings.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use postrider_settings::Postgres;
use secrecy::SecretString;
use tokio_postgres::config::{Config, TargetSessionAttrs};

use super::open_error::OpenError;
use crate::pg::{self, CONNECT_TIMEOUT};

/// How the ledger's database is reached, and what is kept there.
#[derive(Clone, Debug)]
pub struct PostgresSettings {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE`; several hosts are tried in order until one takes writes.
    pub url: SecretString,
    /// `[ledger.postgres]`
    pub keys: Postgres,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Whether state changes are kept for delivery.
    pub keep_changes: bool,
}

impl PostgresSettings {
    /// With these keys.
    pub fn new(url: SecretString, keys: Postgres) -> Self {
        Self { url, keys, timeouts: Timeouts::default(), keep_changes: false }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To open a connection, and to wait for a free one.
    pub connect: Duration,
    /// One statement. Each of the daemon's joins some thousand keys with an index: one that takes longer won't finish,
    /// and is done again.
    pub statement: Duration,
    /// One lock that a statement waits for.
    pub lock: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: CONNECT_TIMEOUT, statement: Duration::from_secs(30), lock: Duration::from_secs(10) }
    }
}

/// A schema's name that needs no escaping anywhere (F57).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schema(String);

impl Schema {
    pub(super) fn parse(name: &str) -> Result<Self, OpenError> {
        let is_first = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        let is_name = name.len() <= 63
            && name.bytes().next().is_some_and(is_first)
            && name.bytes().all(|byte| is_first(byte) || byte.is_ascii_digit())
            && !name.starts_with("pg_")
            && name != "information_schema";
        if is_name {
            Ok(Self(name.to_owned()))
        } else {
            Err(OpenError::Settings(format!(
                "`schema` {name:?} is no schema's name here (expected a lower-case letter or _, then lower-case \
                 letters, digits or _, at most 63 in all, not beginning with pg_)"
            )))
        }
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The daemon's small statements. Each joins some thousand keys with an index, whatever the tables' size and
    /// whatever the statistics say of a table that was empty a minute ago: a plan that reads the table instead is
    /// never the right one, and a plan is made for each run, so that it knows its partition and how many keys.
    Work,
    /// Commands that read much, or change the schema.
    Look,
}

/// What the driver is given.
pub(super) fn config(
    settings: &PostgresSettings,
    schema: &Schema,
    purpose: Purpose,
) -> Result<Config, OpenError> {
    let Timeouts { connect, statement, lock } = settings.timeouts;
    let mut config = pg::config(&settings.url, settings.keys.tls, connect, statement + connect)?;
    let mut options = config.get_options().map_or_else(String::new, |options| format!("{options} "));
    // Writing to a String can't fail.
    let _ = write!(
        options,
        "-c search_path=\"{schema}\",pg_temp -c statement_timeout={} -c lock_timeout={} \
         -c idle_in_transaction_session_timeout={} -c jit=off -c timezone=UTC \
         -c default_transaction_isolation=read\\ committed",
        statement.as_millis().max(1),
        lock.as_millis().max(1),
        (statement + connect).as_millis().max(1),
    );
    if purpose == Purpose::Work {
        options.push_str(
            " -c plan_cache_mode=force_custom_plan -c enable_seqscan=off -c enable_hashjoin=off \
             -c enable_mergejoin=off",
        );
    }
    config.options(options).target_session_attrs(TargetSessionAttrs::ReadWrite);
    Ok(config)
}

#[cfg(test)]
mod tests {
    use postrider_settings::{Keys as _, Tls};
    use tokio_postgres::config::SslMode;

    use super::*;

    #[test]
    fn f57_a_schema_that_would_need_escaping_is_refused() {
        for name in ["postrider", "_x", "a1_"] {
            assert!(Schema::parse(name).is_ok(), "{name}");
        }
        let long = "a".repeat(64);
        for name in
            ["", "1a", "A", "a b", "a\";drop schema public", "ä", "pg_x", "a-b", "information_schema", &long]
        {
            assert!(matches!(Schema::parse(name), Err(OpenError::Settings(_))), "{name}");
        }
    }

    #[test]
    fn no_part_of_a_url_is_shown() {
        let schema = Schema::parse("postrider").unwrap();
        let mut errors = 0;
        for url in [
            "postgres://u:hunter?2@h/d",
            "postgres://u:hunter2@h/d?hunter2=1",
            "postgres://u:hunter2@h:hunter2/d",
            "postgres://u:%zzhunter2@h/d",
            "hunter2",
            "user=u password=hunter2",
        ] {
            let settings = PostgresSettings::new(url.to_owned().into(), Postgres::declared());
            let config = config(&settings, &schema, Purpose::Work);
            if let Err(error) = &config {
                errors += 1;
                assert!(!error.to_string().contains("hunter"), "{error}");
            }
            assert!(!format!("{config:?} {settings:?}").contains("hunter2"), "{config:?}");
        }
        assert!(errors >= 4, "most of them are not URLs, {errors}");
    }

    #[test]
    fn encryption_is_required_or_not_wanted_and_nothing_between() {
        let schema = Schema::parse("postrider").unwrap();
        let mode = |query: &str, tls: Tls| {
            let keys = Postgres { tls, ..Postgres::declared() };
            let settings = PostgresSettings::new(format!("postgres://u@h/d{query}").into(), keys);
            config(&settings, &schema, Purpose::Work).map(|config| config.get_ssl_mode())
        };
        for query in ["", "?sslmode=prefer", "?sslmode=disable"] {
            assert_eq!(mode(query, Tls::Require).unwrap(), SslMode::Require);
            assert_eq!(mode(query, Tls::Disable).unwrap(), SslMode::Disable);
        }
        assert!(matches!(mode("?sslmode=require", Tls::Disable), Err(OpenError::Settings(_))));
    }
}
