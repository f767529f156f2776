//! The engines of a configuration, before the daemon uses them: `check-config --connect` tries them and
//! changes nothing, `migrate` makes what is missing. Both say what is wrong and what to do.

use std::fs;

use anyhow::Context as _;

use crate::{
    config::{Config, Feed, Profile},
    findings::{Finding, Verdict},
};
use postrider_sqlite::{self as embedded, OpenError, SCHEMA_VERSION};

/// What the embedded store is called in findings.
const EMBEDDED: &str = "embedded store";

/// Tries every engine. Destinations are not called.
pub fn connect(config: &Config) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    if config.profile == Profile::Embedded {
        findings.push(embedded_store(config));
    }
    findings.extend(config.feeds.iter().filter_map(directory));
    findings.extend(shared(config, false)?);
    Ok(findings)
}

/// What the daemon would find of a feed's directory. Whether it may write there depends on who it runs as.
fn directory(feed: &Feed) -> Option<Finding> {
    let path = &feed.directory()?.path;
    let finding =
        |verdict, detail: String| Some(Finding::new(format!("feed {}", feed.name), verdict, detail));
    let parked =
        |why: String| finding(Verdict::Wrong, format!("{}: {why}: the feed would be parked", path.display()));
    if let Err(error) = fs::read_dir(path) {
        return parked(error.to_string());
    }
    // Ours, or not there yet.
    match ["done", "failed", ".postrider"].iter().find(|name| path.join(name).is_file()) {
        Some(name) => parked(format!("a file is called {name}; move it away")),
        None => finding(Verdict::Fine, path.display().to_string()),
    }
}

/// Looks at queues and tables outside of this machine and changes nothing.
pub fn check_shared(config: &Config) -> anyhow::Result<Vec<Finding>> {
    shared(config, false)
}

/// Makes and checks queues and tables outside of this machine; nothing if the configuration names none.
pub fn migrate_shared(config: &Config) -> anyhow::Result<Vec<Finding>> {
    shared(config, true)
}

fn embedded_store(config: &Config) -> Finding {
    let finding = |verdict, detail: String| Finding::new(EMBEDDED, verdict, detail);
    match embedded::schema_version(&config.state.dir) {
        Ok(SCHEMA_VERSION) => finding(Verdict::Fine, format!("schema version {SCHEMA_VERSION}")),
        Ok(older) if older < SCHEMA_VERSION => {
            let detail = format!("schema version {older}; the daemon, or `postrider migrate`, updates it");
            finding(Verdict::Costly, detail)
        }
        Ok(newer) => {
            let detail = format!(
                "schema version {newer}, this program knows up to {SCHEMA_VERSION}: run the newer version"
            );
            finding(Verdict::Wrong, detail)
        }
        Err(OpenError::Missing(path)) => {
            let detail =
                format!("{} is not there yet; the daemon makes it at its first start", path.display());
            finding(Verdict::Fine, detail)
        }
        Err(error) => finding(Verdict::Wrong, error.to_string()),
    }
}

fn shared(config: &Config, may_make: bool) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    #[cfg(feature = "aws")]
    if super::aws::is_needed(config) {
        findings.extend(runtime()?.block_on(super::aws::try_engines(config, may_make)));
    }
    #[cfg(feature = "postgres")]
    {
        let addresses = config.addresses()?;
        findings.extend(runtime()?.block_on(super::postgres::try_engines(config, &addresses, may_make)));
    }
    // Without its feature, the configuration was refused if it names any.
    let _ = (config, may_make, &mut findings);
    Ok(findings)
}

/// What a command waits on: it does one thing after the other.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("the system refuses a runtime")
}
