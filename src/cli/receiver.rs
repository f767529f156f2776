//! `postrider receiver`

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use hyper::{StatusCode, header::HeaderValue};
use secrecy::SecretString;
use tokio::signal::unix::{SignalKind, signal};

use crate::receiver::{Capacity, Counts, Receiver, ReceiverSettings};

/// Receive webhooks, to try things against
///
/// Verifies signatures, fails on purpose if asked to, counts, and logs each message as one JSON line
/// before it answers. The messages of a bundle count and are logged one by one. Prints `listening on ADDR` when it is
/// ready and its counts when it is stopped (SIGTERM or SIGINT). `GET /stats` shows the counts as JSON meanwhile;
/// `PUT /capacity` with `{"latency_ms":100,"slots":50,"per_s":2000}` changes what it can bear.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  postrider receiver --listen 127.0.0.1:8080
  postrider receiver --secret file:/etc/postrider/secret --fail-rate 0.1 --seed 7
  postrider receiver --status 429 --retry-after 5 --log requests.jsonl

Log lines:
  {\"at\":1700000000000,\"id\":\"msg_…\",\"timestamp\":\"1700000000\",\"path\":\"/\",\"status\":200,\"bytes\":61,\"verified\":true,\"body_sha256\":\"…\"}")]
pub struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,

    /// Secret that requests must be signed with: `env:NAME`, `file:PATH` or the secret itself, which
    /// others on this machine can then see. Several for rotation; without any, signatures are not
    /// checked. A request that does not verify, or is more than 5 minutes old, is answered 401
    #[arg(long = "secret", value_name = "SECRET")]
    secrets: Vec<String>,

    /// Share of the requests that fail, from 0 to 1. Default: 0, or 1 if --status is given
    #[arg(long, value_name = "P", value_parser = fraction)]
    fail_rate: Option<f64>,

    /// Their status; default: 503
    #[arg(long, value_name = "CODE", value_parser = status)]
    status: Option<StatusCode>,

    /// Their `Retry-After`: seconds, a date, or anything else to see what happens
    #[arg(long, value_name = "VALUE")]
    retry_after: Option<HeaderValue>,

    /// Decides which requests fail: with the same seed the n-th request has the same result.
    /// Default: random
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Time to wait before each answer, in milliseconds
    #[arg(long, value_name = "L", default_value_t = 0)]
    latency_ms: u64,

    /// Requests in progress at most: one more is answered 503 at once
    #[arg(long, value_name = "N")]
    slots: Option<u32>,

    /// Requests served per second at most: others wait in a queue without an end
    #[arg(long, value_name = "N", value_parser = per_s)]
    per_s: Option<f64>,

    /// File to append a JSON line per request to
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// Log the bodies too
    #[arg(long, requires = "log")]
    log_bodies: bool,

    /// Answer what is accepted with an id of the receiver's own, {"message":{"id":"prv-…"}}, as a provider
    /// does: it is 24 hex digits of the SHA-256 of webhook-id
    #[arg(long)]
    answer_ids: bool,

    /// Answer a bundle with the status of each of its messages, {"items":[{"id":"msg_…","status":200}]}; each of them
    /// fails by itself. The destination needs `results = "/items"`
    #[arg(long)]
    results: bool,

    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

fn fraction(text: &str) -> Result<f64, String> {
    let fraction = text.parse().map_err(|_| "expected a number from 0 to 1".to_owned())?;
    if (0.0..=1.0).contains(&fraction) { Ok(fraction) } else { Err("expected a number from 0 to 1".into()) }
}

fn per_s(text: &str) -> Result<f64, String> {
    let per_s = text.parse().ok().filter(|per_s: &f64| (0.001..=1e9).contains(per_s));
    per_s.ok_or_else(|| "expected 0.001 to 1e9".to_owned())
}

fn status(text: &str) -> Result<StatusCode, String> {
    let status = text.parse::<u16>().ok().and_then(|code| StatusCode::from_u16(code).ok());
    // 1xx is no answer, and a server that sends it as one is broken.
    status.filter(|status| (200..600).contains(&status.as_u16())).ok_or("expected 200 to 599".into())
}

fn secret(source: &str) -> anyhow::Result<SecretString> {
    let secret = if let Some(name) = source.strip_prefix("env:") {
        std::env::var(name).with_context(|| format!("--secret env:{name}: no such variable"))?
    } else if let Some(path) = source.strip_prefix("file:") {
        let text = std::fs::read_to_string(path).with_context(|| format!("--secret: can't read {path}"))?;
        text.trim_end_matches(['\r', '\n']).to_owned()
    } else {
        source.to_owned()
    };
    Ok(secret.into())
}

impl Args {
    fn settings(self) -> anyhow::Result<ReceiverSettings> {
        Ok(ReceiverSettings {
            listen: self.listen,
            secrets: self.secrets.iter().map(|source| secret(source)).collect::<Result<_, _>>()?,
            fail_rate: self.fail_rate.unwrap_or(if self.status.is_some() { 1.0 } else { 0.0 }),
            fail_status: self.status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
            retry_after: self.retry_after,
            seed: self.seed.unwrap_or_else(rand::random),
            capacity: Capacity { latency_ms: self.latency_ms, slots: self.slots, per_s: self.per_s },
            log: self.log,
            log_bodies: self.log_bodies,
            answer_ids: self.answer_ids,
            results: self.results,
        })
    }
}

/// Runs it until a signal.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let settings = args.settings()?;
    let seed = settings.seed;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let counts = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let receiver = Receiver::bind(settings).await?;
        // Whoever started it waits for this line.
        writeln!(io::stdout(), "listening on {}", receiver.local_addr()?)?;
        let stop = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        receiver.serve(stop).await
    })?;
    // Connections that outlived the drain are not waited for.
    runtime.shutdown_background();
    writeln!(io::stdout(), "{}", if json { as_json(&counts, seed)? } else { as_text(&counts, seed) })?;
    Ok(ExitCode::SUCCESS)
}

fn as_json(counts: &Counts, seed: u64) -> anyhow::Result<String> {
    let mut value = serde_json::to_value(counts)?;
    value["seed"] = seed.into();
    Ok(value.to_string())
}

fn as_text(counts: &Counts, seed: u64) -> String {
    let Counts { requests, accepted, failed, unverified, bytes, first_at, last_at } = counts;
    let messages = accepted + failed + unverified;
    let seconds = match (first_at, last_at) {
        (Some(first), Some(last)) => last.saturating_sub(*first) as f64 / 1000.0,
        _ => 0.0,
    };
    format!(
        "{messages} messages in {requests} requests ({bytes} bytes of body) in {seconds:.1} s: {accepted} accepted, {failed} failed on \
         purpose (seed {seed}), {unverified} not verified"
    )
}
