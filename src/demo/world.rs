//! The demo's directory, configuration and file.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufWriter, Write as _},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use postrider_actors::model::file::FileReport;
use serde_json::json;
use tokio::time::Instant;

const FILE: &str = "users.csv";

/// What must come of the generated file's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) rows: u64,
    /// Rows without a user.
    pub(super) rejected: u64,
    /// Rows of a user who had one before.
    pub(super) duplicates: u64,
}

impl Expected {
    /// One row in 10,000 is bad and one in 5,000 is a repetition, so that the table shows what becomes
    /// of such rows; a file too small to spare them has none.
    fn new(rows: u64) -> Self {
        let one_in = |many: u64| if rows < 10 { 0 } else { rows.div_ceil(many) };
        Self { rows, rejected: one_in(10_000), duplicates: one_in(5_000) }
    }
}

/// Where everything is.
#[derive(Debug)]
pub(super) struct World {
    directory: PathBuf,
    expected: Expected,
}

impl World {
    /// Makes the directories. They are kept when the demo ends: its reports are there to be read.
    pub(super) fn create(directory: Option<&Path>, rows: u64) -> anyhow::Result<Self> {
        let directory = match directory {
            Some(directory) => directory.to_owned(),
            None => std::env::temp_dir().join(format!("postrider-demo-{}-{}", process::id(), now_ms())),
        };
        // It holds a secret.
        let make = |path: &Path| DirBuilder::new().mode(0o700).create(path);
        match make(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let is_empty = fs::read_dir(&directory).map(|mut entries| entries.next().is_none());
                let context = || format!("{} can't be used", directory.display());
                ensure!(is_empty.with_context(context)?, "{} is not empty", directory.display());
            }
            made => made.with_context(|| format!("can't make {}", directory.display()))?,
        }
        // The children get the paths and have a working directory of their own choice.
        let directory = directory.canonicalize()?;
        for name in ["inbox", "state"] {
            make(&directory.join(name))?;
        }
        let world = Self { directory, expected: Expected::new(rows) };
        let secret = format!("whsec_{}", STANDARD.encode(rand::random::<[u8; 32]>()));
        fs::write(world.secret(), secret).context("can't write the secret")?;
        Ok(world)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn expected(&self) -> Expected {
        self.expected
    }

    pub(super) fn secret(&self) -> PathBuf {
        self.directory.join("secret")
    }

    pub(super) fn log(&self, of: &str) -> PathBuf {
        self.directory.join(format!("{of}.log"))
    }

    pub(super) fn notify_socket(&self) -> PathBuf {
        self.directory.join("notify")
    }

    /// The report beside the finished file, as soon as it says that every row has settled; `None` if it
    /// doesn't within `timeout`.
    pub(super) fn wait_for_report(&self, timeout: Duration) -> anyhow::Result<Option<FileReport>> {
        let path = self.done(".report.json");
        let until = Instant::now() + timeout;
        while Instant::now() < until {
            match fs::read(&path) {
                Ok(json) => {
                    let report: FileReport = serde_json::from_slice(&json)
                        .with_context(|| format!("{} is not a report", path.display()))?;
                    if report.settled_at.is_some() {
                        return Ok(Some(report));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    /// Where the daemon moves the file when it is done.
    pub(super) fn done(&self, ending: &str) -> PathBuf {
        self.directory.join("inbox/done").join(format!("{FILE}{ending}"))
    }

    /// Writes the daemon's configuration. Everything that it doesn't name is the default.
    pub(super) fn write_config(&self, receiver: SocketAddr) -> anyhow::Result<PathBuf> {
        let path = |name: &str| {
            let path = self.directory.join(name);
            let text = path.to_str().map(str::to_owned);
            text.with_context(|| format!("{} is not UTF-8; choose another --keep", path.display()))
        };
        let config = json!({
            "state": { "dir": path("state")? },
            // It shows the full rate at once.
            "canary": { "enabled": false },
            "feeds": { "demo": {
                "path": path("inbox")?,
                "format": "csv",
                "recipient": "user_id",
                "duplicates": "first",
                "destinations": ["receiver"],
            } },
            "destinations": { "receiver": {
                "url": format!("http://{receiver}/hook"),
                "allow": [format!("{}/32", receiver.ip())],
                "secrets": [format!("file:{}", path("secret")?)],
                "retry": { "base": "100ms", "cap": "2s" },
            } },
        });
        let file = self.directory.join("postrider.toml");
        fs::write(&file, toml::to_string(&config)?).context("can't write the configuration")?;
        Ok(file)
    }

    /// Writes the file outside the watched directory, on the same file system.
    pub(super) fn generate(&self) -> anyhow::Result<()> {
        let path = self.directory.join(FILE);
        let mut file = BufWriter::new(File::create(&path)?);
        write_rows(&mut file, self.expected)
            .and_then(|()| file.flush())
            .with_context(|| format!("can't write {}", path.display()))
    }

    /// Drops it: a rename, so that it is there whole at once.
    pub(super) fn drop_file(&self) -> anyhow::Result<()> {
        fs::rename(self.directory.join(FILE), self.directory.join("inbox").join(FILE))
            .context("can't drop the file")
    }
}

/// Good rows first and the others spread over them. A repetition repeats the first user, so it comes
/// after it.
fn write_rows(to: &mut impl io::Write, expected: Expected) -> io::Result<()> {
    let Expected { rows, rejected, duplicates } = expected;
    writeln!(to, "user_id,name,amount")?;
    let others = rejected + duplicates;
    let (mut bad, mut repeated) = (0, 0);
    for row in 1..=rows {
        // After `row` rows so many of the others must have been written.
        let due = (u128::from(row) * u128::from(others) / u128::from(rows)) as u64;
        if row == 1 || due == bad + repeated {
            writeln!(to, "user-{row:07},Ada {row},{}.{:02}", row % 1000, row % 100)?;
        } else if bad < rejected {
            bad += 1;
            writeln!(to, ",Nobody {row},0.00")?;
        } else {
            repeated += 1;
            writeln!(to, "user-{:07},Ada again,0.00", 1)?;
        }
    }
    Ok(())
}

/// Milliseconds since the Unix epoch.
pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_file_has_the_rows_that_are_expected_of_it() {
        for rows in [1, 2, 9, 10, 11, 100, 4_999, 5_001, 100_000] {
            let expected = Expected::new(rows);
            let mut csv = Vec::new();
            write_rows(&mut csv, expected).unwrap();
            let mut reader = csv::Reader::from_reader(&csv[..]);
            assert_eq!(reader.headers().unwrap(), vec!["user_id", "name", "amount"]);
            let (mut seen, mut found) = (HashSet::new(), Expected { rows: 0, rejected: 0, duplicates: 0 });
            for record in reader.records() {
                let user = record.unwrap()[0].to_owned();
                found.rows += 1;
                if user.is_empty() {
                    found.rejected += 1;
                } else if !seen.insert(user) {
                    found.duplicates += 1;
                }
            }
            assert_eq!(found, expected);
            assert_eq!(rows >= 10, expected.rejected > 0 && expected.duplicates > 0);
        }
    }

    #[test]
    fn a_directory_that_holds_something_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo");
        let world = World::create(Some(&path), 10).unwrap();
        assert!(world.secret().exists());
        let error = World::create(Some(&path), 10).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
    }

    #[test]
    fn the_configuration_is_toml_whatever_the_directory_is_called() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a \"b\"\\c");
        let world = World::create(Some(&path), 10).unwrap();
        let file = world.write_config("127.0.0.1:1234".parse().unwrap()).unwrap();
        let config: toml::Table = fs::read_to_string(file).unwrap().parse().unwrap();
        let inbox = config["feeds"]["demo"]["path"].as_str().unwrap();
        assert!(Path::new(inbox).is_dir());
        assert_eq!(config["destinations"]["receiver"]["url"].as_str(), Some("http://127.0.0.1:1234/hook"));
    }
}
