//! What servers of the daemon share: an address that is taken before anything is answered, a bound on
//! connections, and an end that lets requests in progress finish.

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinHandle,
};

/// A bound address that answers nobody yet.
#[derive(Debug)]
pub struct Listener {
    listener: StdListener,
    address: SocketAddr,
}

/// A listener that answers. It ends when this is dropped.
#[derive(Debug)]
pub struct Serving {
    accepting: JoinHandle<()>,
    stopping: watch::Sender<bool>,
    permits: Arc<Semaphore>,
    connections_max: u32,
}

/// Signals a connection to end.
#[derive(Clone, Debug)]
pub struct Stopped(watch::Receiver<bool>);

impl Stopped {
    /// Returns when the server is to end.
    pub async fn wait(&mut self) {
        // The sender is gone when the server is.
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }
}

impl Listener {
    /// Takes the address. Port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same address once more: what serves it next takes over where this one stops.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { listener: self.listener.try_clone()?, address: self.address })
    }

    /// Gives each connection to `serve`, at most `connections_max` at once: others wait in the kernel's
    /// backlog. Call it within a tokio runtime.
    pub fn serve<F, S>(self, connections_max: u32, serve: F) -> io::Result<Serving>
    where
        F: Fn(TcpStream, SocketAddr, Stopped) -> S + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::from_std(self.listener)?;
        let permits = Arc::new(Semaphore::new(connections_max as usize));
        let (stopping, stopped) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, Arc::clone(&permits), Stopped(stopped), serve));
        Ok(Serving { accepting, stopping, permits, connections_max })
    }
}

async fn accept<F, S>(listener: TcpListener, permits: Arc<Semaphore>, stopped: Stopped, serve: F)
where
    F: Fn(TcpStream, SocketAddr, Stopped) -> S,
    S: Future<Output = ()> + Send + 'static,
{
    loop {
        let permit = Arc::clone(&permits).acquire_owned().await.expect("nobody closes the semaphore");
        match listener.accept().await {
            Ok((stream, peer)) => {
                let served = serve(stream, peer, stopped.clone());
                tokio::spawn(async move {
                    served.await;
                    drop(permit);
                });
            }
            // Out of descriptors, or a peer that is gone again: neither passes faster by spinning.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

impl Serving {
    /// Takes no more connections, and lets the open ones finish their requests, for no longer than
    /// `timeout`. Whether all of them have ended.
    pub async fn stop(self, timeout: Duration) -> bool {
        self.accepting.abort();
        self.stopping.send_replace(true);
        // All permits are back when the last connection has ended.
        tokio::time::timeout(timeout, self.permits.acquire_many(self.connections_max)).await.is_ok()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.accepting.abort();
        self.stopping.send_replace(true);
    }
}
