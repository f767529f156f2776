//! What the ledger and the tables share: the URL, TLS, connections of a pool, and words for errors.

use std::{error::Error as _, fmt, path::Path, str::FromStr as _, time::Duration};

use deadpool_postgres::{
    HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, TimeoutType,
};
use postrider_actors::model::{
    call::{Failure, FailureKind},
    outcome::Shortage,
};
use postrider_net::{
    shortage,
    tls::{TlsVersion, client_config},
};
use postrider_settings::Tls;
use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::{
    NoTls,
    config::{Config, SslMode},
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Until a connection is open, or one of the pool is free.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Settings that can't be used. It says which and why, and repeats nothing of a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSettings(pub String);

impl fmt::Display for BadSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadSettings {}

/// How to connect by `url`, `postgres://USER:PASSWORD@HOST:PORT/DATABASE`. Keepalives find a dead peer within a
/// minute; whatever was sent has to be acknowledged within `answer`.
pub(crate) fn config(
    url: &SecretString,
    tls: Tls,
    connect: Duration,
    answer: Duration,
) -> Result<Config, BadSettings> {
    let bad = |why: &str| BadSettings(why.to_owned());
    // Not the parser's words: it quotes parts of the URL, and the password may be one of them.
    let mut config = Config::from_str(url.expose_secret()).map_err(|_| {
        if url.expose_secret().contains("sslmode=verify-") {
            return bad("`url` says sslmode=verify-…: leave it out, `tls = \"require\"` verifies certificate and host");
        }
        bad("`url` is no Postgres URL (expected postgres://USER:PASSWORD@HOST:PORT/DATABASE; percent-encode special \
             characters of the password)")
    })?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(bad("`url` names no host"));
    }
    match (tls, config.get_ssl_mode()) {
        (Tls::Disable, SslMode::Require) => {
            return Err(bad("`url` says sslmode=require and `tls` says no; say it in `tls` alone"));
        }
        (Tls::Disable, _) => config.ssl_mode(SslMode::Disable),
        (Tls::Require, _) => config.ssl_mode(SslMode::Require),
    };
    config
        .application_name("postrider")
        .connect_timeout(connect)
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(30))
        .keepalives_interval(Duration::from_secs(10))
        .keepalives_retries(3)
        .tcp_user_timeout(answer);
    Ok(config)
}

/// What a pool opens its connections with. It asks nothing of a connection that comes back.
pub(crate) fn manager(config: Config, tls: Tls, ca_file: Option<&Path>) -> Result<Manager, BadSettings> {
    let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    Ok(match tls {
        Tls::Disable => Manager::from_config(config, NoTls, recycling),
        Tls::Require => Manager::from_config(config, connector(ca_file)?, recycling),
    })
}

/// TLS as the protocol has it. The error says what is wrong with `ca_file`.
pub(crate) fn connector(ca_file: Option<&Path>) -> Result<MakeRustlsConnect, BadSettings> {
    client_config(ca_file, TlsVersion::default(), None).map(MakeRustlsConnect::new).map_err(BadSettings)
}

/// A connection of a pool. Only [`keep`](Self::keep) gives it back; without that, because of an error or because the
/// caller went away in the middle, it is closed, and the server rolls back.
pub(crate) struct Held(Option<Object>);

impl Held {
    /// Takes one out of the pool.
    pub(crate) async fn of(pool: &Pool) -> Result<Self, PoolError> {
        pool.get().await.map(|connection| Self(Some(connection)))
    }

    /// It.
    pub(crate) fn client(&self) -> &Object {
        self.0.as_ref().expect("it is taken only when this value ends")
    }

    /// It, to begin a transaction on.
    pub(crate) fn client_mut(&mut self) -> &mut Object {
        self.0.as_mut().expect("it is taken only when this value ends")
    }

    /// Gives it back.
    pub(crate) fn keep(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}

/// Why there is no connection to `whom`, for an operator. One that is in use is waited for `wait`, a new one `create`.
pub(crate) fn no_connection(
    whom: &str,
    pool: &Pool,
    wait: Duration,
    create: Duration,
    error: &PoolError,
) -> Failure {
    let unavailable = |why: String| Failure::new(FailureKind::Unavailable, why);
    match error {
        PoolError::Timeout(TimeoutType::Wait) => unavailable(format!(
            "all {} connections to {whom} are in use for {wait:?}",
            pool.status().max_size
        )),
        PoolError::Timeout(_) => unavailable(format!("{whom} does not answer within {create:?}")),
        PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
            let failure = failure(error).about(format_args!("can't connect to {whom}"));
            // Without an answer of the server, it is the way there.
            let kind = if failure.code.is_some() { failure.kind } else { FailureKind::Unavailable };
            Failure { kind, ..failure }
        }
        other => unavailable(format!("can't connect to {whom}: {other}")),
    }
}

/// The local resource that ran out, if that is why the connection failed.
pub(crate) fn shortage(error: &PoolError) -> Option<Shortage> {
    let PoolError::Backend(error) = error else { return None };
    let error = error.source()?.downcast_ref::<std::io::Error>()?;
    // The resolver's has no number.
    shortage::shortage(error)
        .or_else(|| error.raw_os_error().is_none().then(shortage::shortage_lately).flatten())
}

/// Classifies an error by its SQLSTATE (Postgres' manual, appendix A). What was not committed did not happen; of a
/// COMMIT itself, see [`commit_failure`]. What nobody foresaw, an operator fixes: a worker that fails of it would send its
/// messages again.
pub(crate) fn failure(error: &tokio_postgres::Error) -> Failure {
    let why = words(error);
    let Some(refused) = error.as_db_error() else {
        // A value that the driver could not read or write is ours.
        let is_about_a_value =
            !error.is_closed() && error.source().is_some_and(|source| !source.is::<std::io::Error>());
        let kind = if is_about_a_value { FailureKind::Invalid } else { FailureKind::Unavailable };
        return Failure::new(kind, why);
    };
    let code = refused.code().code();
    Failure { kind: kind_of(code), code: Some(code.to_owned()), why }
}

/// The same of a COMMIT, or of a statement that is a transaction of its own: whether it happened is known only if the
/// server said that it did not.
pub(crate) fn commit_failure(error: &tokio_postgres::Error) -> Failure {
    let failure = failure(error);
    match failure.code.as_deref() {
        // 57P01 and its like come when the session is ended, maybe just after the commit.
        Some(code) if !code.starts_with("57P") && !code.starts_with("08") => failure,
        _ => Failure { kind: FailureKind::Unknown, ..failure },
    }
}

/// What an SQLSTATE means (Postgres' manual, appendix A). It is known of few that they speak of a value or of the moment; who
/// is to blame for any other, a row or the statement as such, `model::bisect` finds out.
pub(crate) fn kind_of(code: &str) -> FailureKind {
    match code {
        // No grant. (28: no entry by this password.)
        "42501" => FailureKind::Denied,
        _ => match code.get(..2).unwrap_or_default() {
            "28" => FailureKind::Denied,
            // Values; constraints; WITH CHECK OPTION.
            "22" | "23" | "44" => FailureKind::Invalid,
            // Connection, a standby, rolled back, resources, a lock, intervention, the disk.
            "08" | "25" | "40" | "53" | "55" | "57" | "58" => FailureKind::Unavailable,
            // No such table or column, a trigger's exception, a limit, and whatever nobody foresaw.
            _ => FailureKind::Refused,
        },
    }
}

/// An error for an operator. Neither its details, which quote rows (I10), nor the statement.
pub(crate) fn words(error: &tokio_postgres::Error) -> String {
    let Some(refused) = error.as_db_error() else {
        return error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
    };
    let about = refused.constraint().or(refused.table());
    let about = about.map_or_else(String::new, |about| format!(", {about}"));
    format!("{} (SQLSTATE {}{about})", refused.message(), refused.code().code())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(url: &str, tls: Tls) -> Result<Config, BadSettings> {
        config(&url.to_owned().into(), tls, Duration::from_secs(5), Duration::from_secs(30))
    }

    #[test]
    fn f66_codes_speak_of_values_of_grants_of_the_moment_or_of_nobody_in_particular() {
        for (kind, codes) in [
            (
                FailureKind::Invalid,
                &["22001", "22003", "22008", "22P02", "22021", "23502", "23505", "23514", "44000"][..],
            ),
            (FailureKind::Denied, &["42501", "28P01", "28000"]),
            (
                FailureKind::Refused,
                &[
                    "42P01", "42703", "42804", "3F000", "3D000", "0A000", "54000", "54001", "P0001", "P0002",
                    "MYERR", "XX000", "", "?",
                ],
            ),
            (
                FailureKind::Unavailable,
                &[
                    "40001", "40P01", "53300", "53100", "55P03", "57014", "57P01", "57P03", "08006", "25006",
                    "58030",
                ],
            ),
        ] {
            for code in codes {
                assert_eq!(kind_of(code), kind, "{code}");
            }
        }
    }

    #[test]
    fn i10_no_part_of_a_url_is_told() {
        let mut errors = 0;
        for url in [
            "postgres://u:hunter?2@h/d",
            "postgres://u:hunter2@h/d?hunter2=1",
            "postgres://u:%zzhunter2@h/d",
            "hunter2",
            "postgres://u:hunter2@",
        ] {
            // Some of them are URLs after all, of another host.
            let Err(error) = of(url, Tls::Disable) else { continue };
            assert!(!format!("{error} {error:?}").contains("hunter"), "{error}");
            errors += 1;
        }
        assert!(errors >= 3, "most of them are no URLs, {errors}");
    }

    #[test]
    fn encryption_is_required_or_not_wanted_and_nothing_between() {
        for query in ["", "?sslmode=prefer", "?sslmode=disable"] {
            let url = format!("postgres://u@h/d{query}");
            assert_eq!(of(&url, Tls::Require).unwrap().get_ssl_mode(), SslMode::Require);
            assert_eq!(of(&url, Tls::Disable).unwrap().get_ssl_mode(), SslMode::Disable);
        }
        assert!(of("postgres://u@h/d?sslmode=require", Tls::Disable).is_err());
        let error = of("postgres://u:hunter2@h/d?sslmode=verify-full", Tls::Require).unwrap_err().to_string();
        assert!(error.contains("leave it out") && !error.contains("hunter2"), "{error}");
    }
}
