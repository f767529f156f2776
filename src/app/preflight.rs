//! What a feed would make of a file. It is read by the feed's own parser; nothing is sent and nothing is written.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    hash::BuildHasher as _,
    io::{Read, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use postrider_actors::{
    model::{
        batch::{BatchHeader, RowLayout},
        body::BodyTemplate,
        conditions::Conditions,
        file::FileRecord,
        formats::{RowBlock, RowParser},
        ids::{FileId, hex},
        rendering::BodyChecks,
        table::MAPPING_TYPE,
        terms::Terms,
        time::UnixMs,
    },
    ports::{ClaimedFile, Inbox as _},
    reading::{FeedSettings, RowStream},
};
use postrider_files::inbox::{DirectoryInbox, InboxConfig, TERMS, TERMS_BYTES_MAX};
use postrider_settings::Duplicates;
use sha2::{Digest as _, Sha256};

use super::{
    feeds::feed_settings,
    troubles::{self, OpsNote},
};
use crate::config::{Config, Destination, Resolved};

/// Rows of a block.
const BLOCK_ROWS: usize = 8 * 1024;

/// Bodies that are shown.
const BODIES_MAX: usize = 3;

/// Reasons that are told apart; whatever else is wrong is counted together.
const REASONS_MAX: usize = 50;

/// How long the daemon may take to say how fast its receivers answer.
const METRICS_TIMEOUT: Duration = Duration::from_secs(2);

/// What a feed would make of a file.
#[derive(Debug, Default)]
pub struct Preflight {
    /// The id that the file would have.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Rows in it.
    pub rows: u64,
    /// Rows that would become messages at each destination.
    pub accepted: u64,
    /// Rows that would be left out as duplicates.
    pub duplicates: u64,
    /// Rows that would be refused.
    pub rejected: u64,
    /// Those by reason, numbers in it aside: how many, and the line of the first.
    pub reasons: BTreeMap<String, (u64, u64)>,
    /// Why the file would be held or fail as a whole.
    pub refused: Option<String>,
    /// When its messages may go, if it were claimed now.
    pub terms: Terms,
    /// Where its rows would go.
    pub destinations: Vec<String>,
    /// What the first accepted rows would become, by destination.
    pub bodies: BTreeMap<String, Vec<String>>,
}

/// Reads `path` as the feed `name` would.
pub fn look(resolved: &Resolved, name: &str, path: &Path) -> anyhow::Result<Preflight> {
    let config = &resolved.config;
    let Some(feed) = config.feeds.iter().find(|feed| feed.name == name) else {
        let names: Vec<_> = config.feeds.iter().map(|feed| feed.name.as_str()).collect();
        bail!("there is no feed {name:?}; there are: {}", names.join(", "));
    };
    let Some(directory) = feed.directory() else {
        bail!("the feed {name} takes the entries of a queue, not files");
    };
    let settings = feed_settings(resolved, feed, directory);
    let inbox = DirectoryInbox::new(InboxConfig {
        feed: feed.name.clone(),
        settings: directory.settings.clone(),
        state_dir: config.state.dir.clone(),
        format: directory.format.clone(),
        max_row: feed.max_row,
        conditions: feed.conditions.clone(),
    });
    let unreadable = || format!("can't read {}", path.display());
    let metadata = fs::metadata(path).with_context(unreadable)?;
    if !metadata.is_file() {
        bail!("{} is not a file", path.display());
    }
    let claimed = ClaimedFile {
        name: path.file_name().unwrap_or(path.as_os_str()).to_owned(),
        path: path.to_owned(),
        claimed_at: now(),
        bytes: metadata.len(),
        expected: None,
        conditions: None,
        fingerprint: [0; 5],
    };
    let digest = digest(inbox.open_raw(&claimed).with_context(unreadable)?).with_context(unreadable)?;
    let (conditions, wrong) = match conditions_beside(path, &settings.conditions)? {
        Ok(conditions) => (conditions, None),
        Err(problems) => (settings.conditions.clone(), Some(problems)),
    };
    let record = FileRecord {
        id: FileId::derive(name, &digest),
        feed: name.to_owned(),
        name: claimed.display_name(),
        bytes: metadata.len(),
        sha256: hex(&digest),
        claimed_at: claimed.claimed_at,
        destinations: conditions.destinations.clone(),
        terms: conditions.of_file(claimed.claimed_at),
        priority: conditions.priority.unwrap_or(settings.settings.priority),
    };
    let source = inbox.open_rows(&claimed).with_context(unreadable)?;
    let mut preflight = Preflight {
        file: record.id.to_string(),
        bytes: record.bytes,
        terms: record.terms.clone(),
        destinations: record.destinations.clone(),
        ..Preflight::default()
    };
    preflight.read(&settings, record, source)?;
    preflight.refused = preflight.refused.or(wrong);
    Ok(preflight)
}

/// What `NAME.toml` beside the file says, over what `feed` says; or what is wrong with it.
fn conditions_beside(path: &Path, feed: &Conditions) -> anyhow::Result<Result<Conditions, String>> {
    let mut sidecar = path.as_os_str().to_owned();
    sidecar.push(TERMS);
    let sidecar = Path::new(&sidecar);
    let unreadable = || format!("can't read {}", sidecar.display());
    let mut text = String::new();
    match fs::File::open(sidecar) {
        Ok(file) => file.take(TERMS_BYTES_MAX).read_to_string(&mut text).with_context(unreadable)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Ok(feed.clone())),
        Err(error) => return Err(error).with_context(unreadable),
    };
    Ok(Conditions::of_sidecar(&text, sidecar, feed)
        .map_err(|problems| problems.to_string().replace('\n', "; ")))
}

fn digest(mut source: Box<dyn Read + Send>) -> std::io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            len => hash.update(&buffer[..len]),
        }
    }
}

impl Preflight {
    fn read(
        &mut self,
        feed: &FeedSettings,
        file: FileRecord,
        source: Box<dyn Read + Send>,
    ) -> anyhow::Result<()> {
        let mut destinations = feed.destinations.clone();
        destinations.retain(|destination| file.destinations.iter().any(|name| **name == *destination.name));
        let headers_of = move |layout: &RowLayout| -> Vec<_> {
            destinations.iter().map(|destination| destination.header(&file, layout)).collect()
        };
        let parser = RowParser::new(&feed.format, feed.settings.max_row);
        let mut stream =
            RowStream::new(source, parser).checking(BodyChecks::new(1, Box::new(headers_of.clone())));
        // A hash of 64 bits for each recipient: in a million rows one is taken for another with a chance of 1 to 37 million.
        let (mut seen, hasher) = (HashSet::new(), std::hash::RandomState::new());
        let mut block = RowBlock::new(BLOCK_ROWS);
        loop {
            block.clear();
            let is_end = stream.next_block(&mut block);
            self.rows = stream.parser().position().rows;
            for reject in &block.rejects {
                self.reject(&reject.reason, reject.line);
            }
            if let Some(layout) = stream.parser().layout() {
                let headers = headers_of(layout);
                for (row, bytes) in block.iter() {
                    if feed.directory.duplicates == Duplicates::First
                        && !seen.insert(hasher.hash_one(layout.read(bytes)?.recipient))
                    {
                        self.duplicates += 1;
                        continue;
                    }
                    self.accepted += 1;
                    if self.accepted <= BODIES_MAX as u64 {
                        self.show(&headers, row.row, bytes)?;
                    }
                }
            }
            self.refused = stream.parser().bodies().and_then(BodyChecks::verdict).map(str::to_owned);
            match is_end {
                _ if self.refused.is_some() => return Ok(()),
                Ok(false) => {}
                Ok(true) => return Ok(()),
                Err(error) => {
                    self.refused = Some(error.to_string());
                    return Ok(());
                }
            }
        }
    }

    fn reject(&mut self, reason: &str, line: u64) {
        self.rejected += 1;
        let mut kind = without_numbers(reason);
        if self.reasons.len() >= REASONS_MAX && !self.reasons.contains_key(&kind) {
            "something else".clone_into(&mut kind);
        }
        self.reasons.entry(kind).or_insert((0, line)).0 += 1;
    }

    fn show(
        &mut self,
        headers: &[std::sync::Arc<BatchHeader>],
        row: u64,
        bytes: &[u8],
    ) -> anyhow::Result<()> {
        for header in headers.iter().filter(|header| header.content_type != MAPPING_TYPE) {
            let template = BodyTemplate::compile(header.template.as_deref(), &header.content_type)?;
            let mut body = Vec::new();
            template.render(header, header.message_id(row), bytes, &mut body)?;
            let bodies = self.bodies.entry(header.destination.clone()).or_default();
            bodies.push(String::from_utf8_lossy(&body).into_owned());
        }
        Ok(())
    }
}

/// A reason with every number written as N: what differs only in the place is one kind.
fn without_numbers(reason: &str) -> String {
    let mut kind = String::with_capacity(reason.len());
    for character in reason.chars() {
        if !character.is_ascii_digit() {
            kind.push(character);
        } else if !kind.ends_with('N') {
            kind.push('N');
        }
    }
    kind
}

/// When messages would all be sent, and what that is worked out from.
#[derive(Debug)]
pub struct Estimate {
    /// Open messages that are before them.
    pub backlog: u64,
    /// The configured rate, if there is one.
    pub rate_per_s: Option<u32>,
    /// How long an attempt takes, as a running daemon has measured it.
    pub latency: Option<Duration>,
    /// How long it takes to send them all; `None` without a rate or a latency to work it out from.
    pub takes: Option<Duration>,
    /// When the last one is sent then.
    pub finish: Option<UnixMs>,
}

fn now() -> UnixMs {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixMs(now.as_millis() as u64)
}

/// When the messages of a file would be sent to a destination, if nothing fails.
pub fn estimate(
    config: &Config,
    destination: &Destination,
    file: &Preflight,
    backlog: u64,
    latency: Option<Duration>,
) -> Estimate {
    let rates = [destination.rate(), config.delivery.rate()];
    let rate_per_s = rates.into_iter().flatten().map(|rate| rate.per_s).min();
    // Where it is found by itself, nobody knows it beforehand.
    let fixed = destination.webhook().and_then(|webhook| webhook.concurrency);
    let concurrency = fixed.map(|concurrency| concurrency.min(config.delivery.concurrency));
    let by_latency =
        latency.zip(concurrency).map(|(latency, concurrency)| concurrency as f64 / latency.as_secs_f64());
    let pace = match (rate_per_s.map(f64::from), by_latency) {
        (Some(rate), Some(bearable)) => Some(rate.min(bearable)),
        (rate, bearable) => rate.or(bearable),
    };
    let takes =
        pace.and_then(|pace| Duration::try_from_secs_f64((backlog + file.accepted) as f64 / pace).ok());
    let finish = takes.map(|takes| file.terms.done_at(now(), takes));
    Estimate { backlog, rate_per_s, latency, takes, finish }
}

/// How long an attempt took on average, by destination, as the daemon that runs on `state_dir` has measured it since it
/// began; empty if none answers, or not without a token.
pub fn latencies(state_dir: &Path) -> BTreeMap<String, Duration> {
    let ops: OpsNote = troubles::read(state_dir).unwrap_or_default();
    let Some(address) = ops.address.filter(|_| !ops.has_tls && !ops.has_tokens) else {
        return BTreeMap::new();
    };
    metrics(address).map(|text| mean_of_attempts(&text)).unwrap_or_default()
}

fn metrics(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, METRICS_TIMEOUT)?;
    stream.set_read_timeout(Some(METRICS_TIMEOUT))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// From the sums and counts of the histogram of attempts.
fn mean_of_attempts(text: &str) -> BTreeMap<String, Duration> {
    let values = |suffix: &str| -> BTreeMap<String, f64> {
        let prefix = format!("postrider_attempt_duration_seconds_{suffix}{{destination=\"");
        let value = |line: &str| {
            let (name, value) = line.strip_prefix(&prefix)?.split_once("\"}")?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        text.lines().filter_map(value).collect()
    };
    let counts = values("count");
    let mean = |(name, sum): (String, f64)| {
        let count = counts.get(&name).copied().filter(|count| *count > 0.0)?;
        Some((name, Duration::try_from_secs_f64(sum / count).ok()?))
    };
    values("sum").into_iter().filter_map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latency_is_read_from_the_metrics() {
        let text = "HTTP/1.1 200 OK\r\n\r\npostrider_attempt_duration_seconds_sum{destination=\"a\"} 2.5\n\
                    postrider_attempt_duration_seconds_count{destination=\"a\"} 50\n\
                    postrider_attempt_duration_seconds_sum{destination=\"idle\"} 0\n\
                    postrider_attempt_duration_seconds_count{destination=\"idle\"} 0\n";
        assert_eq!(mean_of_attempts(text), [("a".to_owned(), Duration::from_millis(50))].into());
    }

    #[test]
    fn reasons_that_differ_in_numbers_are_one_kind() {
        let kind = "the line is N bytes long, longer than max_row = N";
        assert_eq!(without_numbers("the line is 70001 bytes long, longer than max_row = 65536"), kind);
    }
}
