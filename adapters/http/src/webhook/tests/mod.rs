//! The adapter against real sockets: raw listeners that do what receivers do, and what they should not.

mod connections;
mod guard;
mod http2;
mod misbehaviour;
mod provider_ids;
mod tls;

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use postrider_actors::model::{
    ids::{FileId, MessageId},
    time::UnixMs,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use postrider_settings::{Keys as _, Retry};

use super::*;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A listener that gives each connection, with its number from 0, to a script. It stops with the test.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start<F, S>(script: F) -> Self
    where
        F: Fn(TcpStream, usize) -> S + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(script(stream, count.fetch_add(1, SeqCst)));
            }
        });
        Self { address, connections }
    }

    /// Answers every request with `answer`, connections kept.
    async fn answering(answer: &'static [u8]) -> Self {
        Self::start(move |mut stream, _| async move {
            while read_request(&mut stream).await.is_some() {
                stream.write_all(answer).await.unwrap();
            }
        })
        .await
    }

    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    fn webhook(&self) -> HttpWebhook {
        HttpWebhook::new(self.settings()).unwrap()
    }

    fn webhook_with(&self, change: impl FnOnce(&mut WebhookKeys)) -> HttpWebhook {
        let mut settings = self.settings();
        change(&mut settings.keys);
        HttpWebhook::new(settings).unwrap()
    }

    fn settings(&self) -> WebhookSettings {
        settings(&format!("http://{}/hook", self.address))
    }
}

fn settings(url: &str) -> WebhookSettings {
    let allow = vec!["127.0.0.1/32".parse().unwrap(), "::1/128".parse().unwrap()];
    let keys = WebhookKeys { url: url.parse::<url::Url>().unwrap().into(), allow, ..WebhookKeys::declared() };
    WebhookSettings::new(keys, vec!["s".to_owned().into()], &Retry::declared())
}

/// One whole request, head and body; `None` at the end of the stream.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let Some(end) = memchr::memmem::find(&bytes, b"\r\n\r\n") else { continue };
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let length: usize = length.parse().unwrap();
        while bytes.len() < end + 4 + length {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        assert_eq!(bytes.len(), end + 4 + length, "bytes behind the request");
        return Some(bytes);
    }
}

async fn send(webhook: &HttpWebhook) -> Outcome {
    send_body(webhook, b"{\"a\":1}").await
}

async fn send_body(webhook: &HttpWebhook, body: &[u8]) -> Outcome {
    let id = MessageId { file: FileId([7; 16]), row: 1 };
    let request = WebhookRequest::of_one(&id, UnixMs(1_700_000_000_000), "application/json", body);
    webhook.send(request).await.outcome
}

const SENT: Outcome = Outcome::Sent { status: 200 };

fn retryable(reason: Reason) -> Outcome {
    Outcome::Retryable { status: 0, reason, retry_after: None }
}
