//! The daemon's interface, asked from a thread of its own: whoever looks never waits for it.

use std::{
    env, fs,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail, ensure};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;
use ureq::tls::{PemItem, TlsConfig, parse_pem};
use url::{Host, Url};

use super::{
    state::Seen,
    views::{Order, VIEWS},
};
use crate::app::troubles::{self, OpsNote};

/// How long an answer may take: what the daemon gives itself for one, and a little.
const TIMEOUT: Duration = Duration::from_secs(25);

/// Rows of a list that are looked at. A table in a terminal has no use for more; filters of the commands have.
const ROWS_MAX: usize = 1_000;

/// An answer's bytes: a thousand rows with everything in them.
const ANSWER_MAX: u64 = 8 << 20;

/// Times that an order is repeated that does a part of its work at a time (10 s each).
const PARTS_MAX: usize = 100;

/// Names the token that is sent, where the daemon wants one.
const TOKEN: &str = "POSTRIDER_TOKEN";

/// Where the daemon of a configuration is asked, and by which token.
pub(super) fn address(config: &Path) -> anyhow::Result<(Url, Option<SecretString>)> {
    let config = crate::cli::load_for_store(config)?;
    let note: OpsNote = troubles::read(&config.state.dir)?;
    let Some(address) = note.address else {
        bail!("no daemon serves operators here: start one, and see that ops.listen is not empty");
    };
    ensure!(
        !note.has_tls,
        "the daemon speaks TLS at {address}: name it by --url as its certificate does, with --ca-file"
    );
    let token = token();
    ensure!(token.is_some() || !note.has_tokens, "the daemon wants a token: put it into {TOKEN}");
    Ok((Url::parse(&format!("http://{address}"))?, token))
}

/// The token that is sent, if there is one.
pub(super) fn token() -> Option<SecretString> {
    env::var(TOKEN).ok().map(SecretString::from)
}

/// Whether what is sent there stays on this machine.
fn is_here(base: &Url) -> bool {
    match base.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Trusts the certificates of this file, and nobody else.
fn trust(ca_file: &Path) -> anyhow::Result<TlsConfig> {
    let reading = || format!("can't read {}", ca_file.display());
    let pem = fs::read(ca_file).with_context(reading)?;
    let mut roots = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.with_context(reading)? {
            roots.push(certificate);
        }
    }
    ensure!(!roots.is_empty(), "{} has no certificate in PEM", ca_file.display());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = TlsConfig::builder().root_certs(roots.into()).unversioned_rustls_crypto_provider(provider);
    Ok(tls.build())
}

/// What is asked of the daemon.
pub(super) enum Ask {
    /// The overview and the rows of a view.
    Look(usize),
    /// One thing, by the segments of its path.
    LookAt(Vec<String>),
    /// An order.
    Give(Order),
}

/// What it says.
pub(super) enum Reply {
    Seen(Seen),
    One(Value),
    Done(String),
    /// An order was refused, or one thing is not there.
    Refused(String),
    /// It can't be reached.
    Lost(String),
}

/// The thread.
pub(super) struct Client {
    asks: SyncSender<Ask>,
    pub(super) replies: Receiver<Reply>,
}

impl Client {
    /// Asks the daemon at `base`, such as `http://127.0.0.1:9464`; with TLS one that `ca_file` vouches for.
    pub(super) fn start(
        base: Url,
        token: Option<SecretString>,
        ca_file: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let tls = match (base.scheme(), ca_file) {
            ("https", None) => {
                bail!("with TLS, --ca-file names the certificates that the daemon is known by")
            }
            ("https", Some(ca_file)) => trust(ca_file)?,
            ("http", None) => {
                ensure!(
                    token.is_none() || is_here(&base),
                    "a token goes elsewhere by TLS only: --url https://…"
                );
                TlsConfig::default()
            }
            ("http", Some(_)) => bail!("--ca-file is for a daemon with TLS: --url https://…"),
            (other, _) => bail!("--url begins with https:// or http://, not {other}://"),
        };
        let (asks, queue) = sync_channel(4);
        let (sender, replies) = channel();
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .tls_config(tls)
            .build()
            .new_agent();
        let wire = Wire { agent, base, token };
        thread::Builder::new().name("top-client".into()).spawn(move || wire.serve(&queue, &sender))?;
        Ok(Self { asks, replies })
    }

    /// Asks for something. Whether there was room: what is asked every second may be left out.
    pub(super) fn ask(&self, ask: Ask) -> anyhow::Result<bool> {
        match self.asks.try_send(ask) {
            Ok(()) => Ok(true),
            Err(TrySendError::Full(_)) => Ok(false),
            Err(TrySendError::Disconnected(_)) => Err(anyhow!("the thread that asks the daemon has ended")),
        }
    }
}

struct Wire {
    agent: ureq::Agent,
    base: Url,
    token: Option<SecretString>,
}

/// Why there is no answer to work with.
enum Trouble {
    /// The daemon said no, and why.
    Refused(String),
    Lost(String),
}

impl Wire {
    fn serve(&self, queue: &Receiver<Ask>, sender: &Sender<Reply>) {
        for ask in queue {
            let reply = match ask {
                Ask::Look(view) => self.look(view).map(Reply::Seen),
                Ask::LookAt(path) => self.get(&path, &[]).map(Reply::One),
                Ask::Give(order) => self.give(&order).map(Reply::Done),
            };
            let reply = reply.unwrap_or_else(|trouble| match trouble {
                Trouble::Refused(why) => Reply::Refused(why),
                Trouble::Lost(why) => Reply::Lost(why),
            });
            if sender.send(reply).is_err() {
                return; // nobody looks any more
            }
        }
    }

    fn look(&self, view: usize) -> Result<Seen, Trouble> {
        let shows = &VIEWS[view];
        let overview = self.get(&["overview".to_owned()], &[])?;
        let path: Vec<_> = shows.path.split('/').map(str::to_owned).collect();
        let limit = ROWS_MAX.to_string();
        let query: &[_] =
            if matches!(shows.path, "files" | "audit") { &[("limit", limit.as_str())] } else { &[] };
        let mut answer = self.get(&path, query)?;
        let total = answer.get("total").and_then(Value::as_u64);
        let rows = match answer.get_mut(shows.list).map(Value::take) {
            Some(Value::Array(rows)) => rows,
            _ => Vec::new(),
        };
        // A total of messages is no total of groups.
        let total = total.filter(|_| shows.list == "items");
        Ok(Seen { view, overview, rows, total })
    }

    fn give(&self, order: &Order) -> Result<String, Trouble> {
        let mut redriven = 0;
        for _ in 0..PARTS_MAX {
            let answer = self.post(&order.path, &order.body)?;
            if let Some(text) = answer.get("text").and_then(Value::as_str) {
                return Ok(text.to_owned());
            }
            redriven += answer.get("redriven").and_then(Value::as_u64).unwrap_or(0);
            if answer.get("more").and_then(Value::as_bool) != Some(true) {
                break;
            }
        }
        Ok(format!("{redriven} redriven"))
    }

    fn url(&self, path: &[String], query: &[(&str, &str)]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("it is http").pop_if_empty().extend(["api", "v1"]).extend(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    fn get(&self, path: &[String], query: &[(&str, &str)]) -> Result<Value, Trouble> {
        let mut request = self.agent.get(self.url(path, query).as_str());
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {}", token.expose_secret()));
        }
        read(request.call())
    }

    fn post(&self, path: &[String], body: &Value) -> Result<Value, Trouble> {
        let mut request = self.agent.post(self.url(path, &[]).as_str());
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {}", token.expose_secret()));
        }
        read(request.send_json(body))
    }
}

fn read(answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value, Trouble> {
    let lost = |error: ureq::Error| Trouble::Lost(error.to_string());
    let mut answer = answer.map_err(lost)?;
    let status = answer.status();
    let text = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_string().map_err(lost)?;
    let value = serde_json::from_str::<Value>(&text)
        .with_context(|| format!("status {status}, and no JSON"))
        .map_err(|error| Trouble::Lost(format!("{error:#}")))?;
    if status.is_success() {
        return Ok(value);
    }
    let detail = ["detail", "title"].iter().find_map(|field| value.get(field)?.as_str());
    Err(Trouble::Refused(detail.map_or_else(|| status.to_string(), str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_elsewhere_by_tls_only_and_tls_needs_to_know_whom_to_trust() {
        let start = |url: &str, ca_file: Option<&Path>| {
            let started = Client::start(url.parse().unwrap(), Some("a token".into()), ca_file);
            started.map(drop).map_err(|error| error.to_string())
        };
        for here in ["http://127.0.0.1:9464", "http://localhost:9464", "http://[::1]:9464"] {
            assert_eq!(start(here, None), Ok(()), "{here}");
        }
        assert!(start("http://192.0.2.1:9464", None).unwrap_err().contains("TLS only"));
        assert!(start("https://192.0.2.1:9464", None).unwrap_err().contains("--ca-file"));
        assert!(start("https://192.0.2.1", Some(Path::new("/nowhere"))).unwrap_err().contains("/nowhere"));
        assert!(start("ftp://192.0.2.1", None).unwrap_err().contains("ftp"));
    }
}
