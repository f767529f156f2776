//! How fast the webhook client is, next to `wrk` on the same receiver in the same run.
//!
//! `cargo bench --features full --bench webhook_client [-- --receiver nginx|own --rounds N --seconds N --connections N]`
//!
//! Client and wrk take turns; medians are printed, the ratio is of the medians. The client signs each
//! of its messages, wrk sends one signed request over and over. The receiver is nginx if it is installed,
//! else Postrider's own; it shares the machine with both, so the ratio says more than the rates.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use hyper::StatusCode;
use postrider::receiver::{Capacity, Receiver, ReceiverSettings};
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        outcome::Outcome,
        time::UnixMs,
    },
    ports::{Webhook as _, WebhookRequest},
};
use postrider_http::webhook::{HttpWebhook, WebhookKeys, WebhookSettings};
use postrider_settings::{Keys as _, Retry};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo=";

#[derive(clap::Parser)]
struct Args {
    /// `nginx` or `own`; nginx if it is installed.
    #[arg(long)]
    receiver: Option<String>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Be the receiver: what the bench starts itself with.
    #[arg(long, hide = true)]
    receive: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if args.receive {
        return runtime.block_on(receive());
    }
    let nginx = installed("nginx");
    let (name, server) = match args.receiver.as_deref() {
        Some("nginx") | None if nginx => ("nginx", start_nginx()?),
        Some("own") | None => ("postrider receiver", start_own()?),
        Some(other) => bail!("--receiver {other}: expected `nginx`, which must be installed, or `own`"),
    };
    let url = format!("http://{}/hook", server.address);
    let lua = server.dir.path().join("post.lua");
    std::fs::write(&lua, wrk_script())?;
    let wrk = installed("wrk");
    println!("{} connections to {name}, {} rounds of {} s each", args.connections, args.rounds, args.seconds);

    let (mut client_rates, mut wrk_rates, mut cpu_costs) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        let (rate, cpu_us) = runtime.block_on(measure_client(&url, &args))?;
        client_rates.push(rate);
        cpu_costs.push(cpu_us);
        print!("round {round}: client {rate:.0}/s, {cpu_us:.1} µs CPU each");
        if wrk {
            let rate = measure_wrk(&url, &lua, &args)?;
            wrk_rates.push(rate);
            print!("; wrk {rate:.0}/s");
        }
        println!();
    }
    let client = median(&mut client_rates);
    print!("median: client {client:.0}/s, {:.1} µs CPU each", median(&mut cpu_costs));
    if wrk {
        let wrk = median(&mut wrk_rates);
        print!("; wrk {wrk:.0}/s; ratio {:.2}", client / wrk);
    }
    println!();
    Ok(())
}

/// Requests per second, and CPU time of this process per request in µs.
async fn measure_client(url: &str, args: &Args) -> anyhow::Result<(f64, f64)> {
    let url = url.parse::<url::Url>()?.into();
    let allow = vec!["127.0.0.1/32".parse()?];
    let keys = WebhookKeys { url, allow, concurrency: Some(args.connections), ..WebhookKeys::declared() };
    let settings = WebhookSettings::new(keys, vec![SECRET.to_owned().into()], &Retry::declared());
    let webhook = HttpWebhook::new(settings);
    let webhook = Arc::new(webhook.map_err(|problems| anyhow::anyhow!("{problems:?}"))?);
    let rows = Arc::new(AtomicU64::new(0));
    let cpu_before = cpu_seconds();
    let started = Instant::now();
    let until = started + Duration::from_secs(args.seconds);
    let senders: Vec<_> = (0..args.connections)
        .map(|_| {
            let (webhook, rows) = (Arc::clone(&webhook), Arc::clone(&rows));
            tokio::spawn(async move {
                let body = body();
                while Instant::now() < until {
                    let id = MessageId { file: FileId([7; 16]), row: rows.fetch_add(1, Relaxed) };
                    let at = UnixMs(1_700_000_000_000);
                    let request = WebhookRequest::of_one(&id, at, "application/json", body.as_bytes());
                    let outcome = webhook.send(request).await.outcome;
                    ensure!(matches!(outcome, Outcome::Sent { .. }), "{outcome:?}");
                }
                Ok(())
            })
        })
        .collect();
    for sender in senders {
        sender.await??;
    }
    let sent = rows.load(Relaxed) as f64;
    Ok((sent / started.elapsed().as_secs_f64(), (cpu_seconds() - cpu_before) * 1e6 / sent))
}

fn measure_wrk(url: &str, lua: &Path, args: &Args) -> anyhow::Result<f64> {
    let output = Command::new("wrk")
        .args(["-t", "2", "-c", &args.connections.to_string(), "-d", &format!("{}s", args.seconds), "-s"])
        .arg(lua)
        .arg(url)
        .output()
        .context("can't run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!text.contains("Non-2xx"), "wrk was refused:\n{text}");
    let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    rate.context("wrk printed no rate")?.trim().parse().context("wrk's rate is not a number")
}

/// 200 bytes, as the measurements behind `docs/decisions/0006-http-client.md`.
fn body() -> String {
    format!("{{\"id\":\"{}\"}}", "x".repeat(200 - 9))
}

fn wrk_script() -> String {
    format!(
        "wrk.method = \"POST\"\nwrk.body = '{}'\nwrk.headers[\"content-type\"] = \"application/json\"\n\
         wrk.headers[\"webhook-id\"] = \"msg_{}_1000000\"\nwrk.headers[\"webhook-timestamp\"] = \"1700000000\"\n\
         wrk.headers[\"webhook-signature\"] = \"v1,{}=\"\n",
        body(),
        "07".repeat(16),
        "A".repeat(43),
    )
}

struct Server {
    address: SocketAddr,
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One process, so that killing it leaves no worker behind.
fn start_nginx() -> anyhow::Result<Server> {
    let dir = tempfile::tempdir()?;
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let config = dir.path().join("nginx.conf");
    std::fs::write(
        &config,
        format!(
            "daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests 1000000000;\n\
             client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\n\
             server {{ listen {address}; location / {{ return 204; }} }} }}\n",
            dir.path().display()
        ),
    )?;
    let child = Command::new("nginx").arg("-c").arg(&config).stderr(Stdio::null()).spawn()?;
    let server = Server { address, child, dir };
    for _ in 0..100 {
        if std::net::TcpStream::connect(address).is_ok() {
            return Ok(server);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("nginx does not answer on {address}")
}

fn start_own() -> anyhow::Result<Server> {
    let mut child = Command::new(std::env::current_exe()?).arg("--receive").stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
    Ok(Server { address: line.trim().parse()?, child, dir: tempfile::tempdir()? })
}

async fn receive() -> anyhow::Result<()> {
    let receiver = Receiver::bind(ReceiverSettings {
        listen: ([127, 0, 0, 1], 0).into(),
        secrets: Vec::new(),
        fail_rate: 0.0,
        fail_status: StatusCode::SERVICE_UNAVAILABLE,
        retry_after: None,
        seed: 0,
        capacity: Capacity::default(),
        log: None,
        log_bodies: false,
        answer_ids: false,
        results: false,
    })
    .await?;
    println!("{}", receiver.local_addr()?);
    receiver.serve(std::future::pending()).await?;
    Ok(())
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
