//! Which engines this binary has. Their client libraries take longer to build than everything else together, so
//! they are cargo features, and the demo is built without them.

use std::{fmt, iter, sync::LazyLock};

/// An engine that is built in by a cargo feature. The embedded store always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Queue, feeds and receipts.
    Sqs,
    /// Outbox.
    Dynamodb,
    /// Receipts.
    Cloudwatch,
    /// Ledger of rows.
    Postgres,
    /// Tables of a warehouse as destinations.
    Warehouse,
}

impl Engine {
    const ALL: [Self; 5] = [Self::Sqs, Self::Dynamodb, Self::Cloudwatch, Self::Postgres, Self::Warehouse];
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sqs => "SQS",
            Self::Dynamodb => "DynamoDB",
            Self::Cloudwatch => "CloudWatch Logs",
            Self::Postgres => "Postgres",
            Self::Warehouse => "warehouse tables",
        })
    }
}

/// The engines of a binary. A value, so that each build can test what another one says.
#[derive(Clone, Copy, Debug)]
pub struct Engines {
    aws: bool,
    postgres: bool,
}

impl Engines {
    /// Those of this binary.
    pub const BUILT_IN: Self = Self { aws: cfg!(feature = "aws"), postgres: cfg!(feature = "postgres") };
    /// Those of a build with `--features full`.
    #[cfg(test)]
    pub(crate) const FULL: Self = Self { aws: true, postgres: true };
    /// Those of a build without features.
    #[cfg(test)]
    pub(crate) const LEAN: Self = Self { aws: false, postgres: false };

    fn has(self, engine: Engine) -> bool {
        match engine {
            Engine::Sqs | Engine::Dynamodb | Engine::Cloudwatch => self.aws,
            Engine::Postgres | Engine::Warehouse => self.postgres,
        }
    }

    /// What to do about a setting, or a command, that needs `engines`; `None` if all are built in.
    pub fn missing(self, engines: &[Engine]) -> Option<String> {
        let missing: Vec<_> =
            engines.iter().filter(|engine| !self.has(**engine)).map(Engine::to_string).collect();
        (!missing.is_empty()).then(|| {
            format!(
                "this binary was built without {}: build it with `cargo build --release --features full`",
                missing.join(" and ")
            )
        })
    }

    /// The version, and what this binary can work on and what not.
    fn version(self) -> String {
        let names = |built_in: bool| {
            let engines = Engine::ALL.into_iter().filter(move |&engine| self.has(engine) == built_in);
            engines.map(|engine| engine.to_string())
        };
        let present: Vec<_> = iter::once("embedded".to_owned()).chain(names(true)).collect();
        let absent: Vec<_> = names(false).collect();
        let mut lines =
            vec![env!("CARGO_PKG_VERSION").to_owned(), format!("engines: {}", present.join(", "))];
        if !absent.is_empty() {
            lines.push(format!("not built in: {} (see --features full)", absent.join(", ")));
        }
        lines.join("\n")
    }
}

/// The text of `--version`.
pub static VERSION: LazyLock<String> = LazyLock::new(|| Engines::BUILT_IN.version());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_lists_what_is_there_and_what_is_not() {
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            Engines::FULL.version(),
            format!(
                "{version}\nengines: embedded, SQS, DynamoDB, CloudWatch Logs, Postgres, warehouse tables"
            )
        );
        assert_eq!(
            Engines { aws: false, postgres: true }.version(),
            format!(
                "{version}\nengines: embedded, Postgres, warehouse tables\n\
                 not built in: SQS, DynamoDB, CloudWatch Logs (see --features full)"
            )
        );
    }

    #[test]
    fn an_engine_that_is_missing_is_named_with_what_to_do() {
        for engine in Engine::ALL {
            assert_eq!(Engines::FULL.missing(&[engine]), None);
            let advice = Engines::LEAN.missing(&[engine]).unwrap();
            assert!(advice.contains(&format!("without {engine}: build it with `cargo build")), "{advice}");
        }
        let advice = Engines { aws: false, postgres: true }.missing(&Engine::ALL).unwrap();
        assert!(advice.contains("without SQS and DynamoDB and CloudWatch Logs: build"), "{advice}");
    }
}
