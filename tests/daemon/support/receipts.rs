//! The ledger of rows, and receipts: how a world keeps and makes them, and who judges them.

use std::{env, fs, path::Path, process::Command, time::Duration};

use serde_json::Value;

use super::{World, process::run};
use crate::pg::Postgres;

impl World {
    /// Keeps a row of each message in Postgres, and makes the schema.
    pub(crate) fn keep_rows_in(&mut self, postgres: &Postgres) -> &mut Self {
        self.environment("POSTRIDER_TEST_LEDGER", &postgres.url());
        self.set("ledger.kind", "postgres")
            .set("ledger.postgres.url", "env:POSTRIDER_TEST_LEDGER")
            .set("ledger.postgres.tls", "disable");
        self.migrate()
    }

    /// `postrider migrate`.
    pub(crate) fn migrate(&mut self) -> &mut Self {
        self.configure();
        let answer = self.postrider(&["migrate"]);
        assert_eq!(answer.code, Some(0), "migrate: {}\n{}", answer.stdout, answer.stderr);
        self
    }

    /// A source of receipts about messages to `support`, in files that are dropped into its directory.
    pub(crate) fn add_receipts(&mut self, name: &str) -> &mut Self {
        let directory = self.inbox(name);
        fs::create_dir_all(&directory).expect("a new directory");
        let prefix = format!("receipts.sources.{name}");
        self.set(&format!("{prefix}.kind"), "dir")
            .set(&format!("{prefix}.path"), directory.display().to_string())
            .set(&format!("{prefix}.stable_after"), "300ms");
        self.map_receipts(name)
    }

    /// What receipts of a source look like in tests: as tests/oracle/receipts.py has it.
    pub(crate) fn map_receipts(&mut self, name: &str) -> &mut Self {
        let prefix = format!("receipts.sources.{name}");
        self.set(&format!("{prefix}.destination"), "support");
        for (field, key) in [
            ("message_id", "message_id"),
            ("provider_id", "provider_id"),
            ("event_id", "event"),
            ("status", "status"),
            ("at", "at"),
            ("response", "response"),
            ("carrier", "carrier"),
            ("price", "price"),
        ] {
            self.set(&format!("{prefix}.fields.{field}"), key);
        }
        for (word, meaning) in [("QUEUED", "sent"), ("UNDELIV", "failed"), ("DELIVRD", "delivered")] {
            self.set(&format!("{prefix}.statuses.{word}"), meaning);
        }
        self
    }

    /// Drops a file of receipts into a source's directory.
    pub(crate) fn drop_receipts(&self, source: &str, name: &str, text: &str) {
        let staged = self.staging().join("receipts");
        fs::write(&staged, text).expect("the directory is ours");
        fs::rename(staged, self.inbox(source).join(name)).expect("one file system");
    }

    /// Asks the oracle of receipts, which reads the ledger of rows itself; panics with its violations.
    #[track_caller]
    pub(crate) fn prove_receipts(
        &mut self,
        source: &str,
        receipts: &Path,
        engine: &[&str],
        more: &[&str],
    ) -> Value {
        self.prove(); // writes the manifest
        let python = env::var("POSTRIDER_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let mut command = Command::new(python);
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/receipts.py"))
            .args(["--manifest", &self.path("manifest.json").display().to_string()])
            .args(["--log", &self.receiver_log.display().to_string()])
            .args(["--receipts", &receipts.display().to_string()])
            .args(["--source", source, "--destination", "support"])
            .args(engine)
            .args(more);
        let answer = run(&mut command, self.directory.path(), Duration::from_mins(10));
        assert_eq!(answer.code, Some(0), "the oracle of receipts: {}\n{}", answer.stderr, answer.stdout);
        answer.json()
    }
}
