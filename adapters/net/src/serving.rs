//! A server of the daemon that runs: how it starts, and how it ends while requests are in progress.

use std::{any::Any, time::Duration};

use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::{
    dev::{Extensions, Server, ServerHandle},
    rt::net::TcpStream,
};
use tokio::task::JoinHandle;

use crate::seats::Seats;

/// How long the listening thread may take to end once nothing else is left of the server.
const LAST_ACCEPT: Duration = Duration::from_millis(50);

/// A server that answers. It ends when this is dropped.
#[derive(Debug)]
pub struct Serving {
    server: JoinHandle<()>,
    watching: JoinHandle<()>,
    handle: ServerHandle,
    seats: Seats,
}

impl Serving {
    /// Starts it, within a tokio runtime. Its connections have their seats by [`seat`].
    pub fn start(server: Server, seats: Seats) -> Self {
        let handle = server.handle();
        let server = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "a server can't run");
            }
        });
        let watched = seats.clone();
        let watching = tokio::spawn(async move { watched.watch().await });
        Self { server, watching, handle, seats }
    }

    /// Takes no more connections, and lets the open ones finish their requests, for no longer than `timeout`. Whether all
    /// of them have ended.
    pub async fn stop(mut self, timeout: Duration) -> bool {
        // The order is given by the call; its answer may come a second late, for workers look no more often.
        drop(self.handle.stop(true));
        let ended = tokio::time::timeout(timeout, self.seats.emptied()).await.is_ok();
        self.seats.close();
        let _ = tokio::time::timeout(LAST_ACCEPT, &mut self.server).await;
        ended
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.watching.abort();
        drop(self.handle.stop(false));
        self.seats.close();
    }
}

/// Gives a new connection its seat, as part of the connection. Without one (no descriptor is left) its requests are to be
/// refused: nothing could close it.
pub fn seat(seats: &Seats, connection: &dyn Any, data: &mut Extensions) {
    let behind_tls = || Some(connection.downcast_ref::<TlsStream<TcpStream>>()?.get_ref().0);
    let stream = connection.downcast_ref::<TcpStream>().or_else(behind_tls);
    if let Some(Ok(seat)) = stream.map(|stream| seats.take(stream)) {
        data.insert(seat);
    }
}
