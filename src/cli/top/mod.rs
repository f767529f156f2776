//! `postrider top`

mod client;
mod draw;
mod show;
mod state;
mod views;

use std::{
    io::{IsTerminal as _, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::ensure;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::time::Instant;
use url::Url;

use self::{
    client::{Ask, Client, Reply},
    state::{Effect, Top},
};
use crate::exit::Exit;

/// Between two looks at the daemon.
const LOOK: Duration = Duration::from_secs(1);

/// How long a key or an answer may wait until it is drawn.
const FRAME: Duration = Duration::from_millis(50);

/// Watch and steer the running daemon in a terminal: files, destinations, dead letters, actors, alarms
///
/// Asks the daemon on this machine, at the address of its ops server, or the one that `--url` names. Sorts, filters, shows all
/// that is known of one thing, and gives the same orders as the commands, each after a question. `?` lists the keys. A token
/// comes from the environment variable `POSTRIDER_TOKEN`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The daemon to ask, such as `https://push-1.internal:9464`; it needs no configuration
    #[arg(long)]
    url: Option<Url>,
    /// Certificates that a daemon with TLS is known by, in PEM: its own, or those of who has signed it
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// Runs until somebody leaves.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    ensure!(stdout().is_terminal(), "top needs a terminal; `postrider status --json` is for programs");
    let (base, token) = match &args.url {
        Some(url) => (url.clone(), client::token()),
        None => client::address(config)?,
    };
    let client = Client::start(base, token, args.ca_file.as_deref())?;
    let mut terminal = ratatui::try_init()?;
    let done = watch(&mut terminal, &client);
    ratatui::restore();
    done.map(|()| Exit::Done.into())
}

fn watch(terminal: &mut DefaultTerminal, client: &Client) -> anyhow::Result<()> {
    let mut top = Top::new();
    let mut looked: Option<Instant> = None;
    let mut is_asked = false;
    loop {
        if !is_asked && looked.is_none_or(|at| at.elapsed() >= LOOK) {
            is_asked = client.ask(Ask::Look(top.view))?;
            looked = Some(Instant::now());
        }
        while let Ok(reply) = client.replies.try_recv() {
            match reply {
                Reply::Seen(seen) => {
                    is_asked = false;
                    top.see(seen);
                }
                Reply::One(one) => top.see_one(one),
                Reply::Done(text) | Reply::Refused(text) => {
                    // A look that was refused is over too.
                    is_asked = false;
                    looked = None;
                    top.message = Some(text);
                }
                Reply::Lost(why) => {
                    is_asked = false;
                    top.lost = Some(why);
                }
            }
        }
        terminal.draw(|frame| draw::draw(&top, frame))?;
        if !event::poll(FRAME)? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        let room = match top.press(key) {
            Effect::Quit => return Ok(()),
            Effect::Draw => true,
            Effect::Look => {
                (is_asked, looked) = (false, None);
                true
            }
            Effect::LookAt(path) => client.ask(Ask::LookAt(path))?,
            Effect::Give(order) => client.ask(Ask::Give(order))?,
        };
        if !room {
            top.message = Some("the daemon has not answered yet; try again".to_owned());
        }
    }
}
