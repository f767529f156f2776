//! What servers of the daemon share: an address that is taken before anything is answered, a bound on
//! connections, and an end that lets requests in progress finish.
//!
//! Connections that nobody vouches for give way: when no place is free, the oldest of them is closed, and no peer has
//! more than half of all places with them. So whoever opens connections and says nothing keeps nobody out.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
    time::Instant,
};

/// How long a connection keeps its place whatever comes: a request that is sent at once has been read by then.
const UNKNOWN_MIN: Duration = Duration::from_millis(500);

/// How often it is looked again whether a place can be given away.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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

/// A connection's place among those that are served at once.
#[derive(Debug)]
pub struct Seat {
    stopping: watch::Receiver<bool>,
    place: Arc<Place>,
}

#[derive(Debug)]
struct Place {
    host: IpAddr,
    since: Instant,
    is_kept: AtomicBool,
    /// Another connection gets it.
    given_away: Notify,
}

impl Seat {
    /// Returns when the server is to end.
    pub async fn stopped(&self) {
        // The sender is gone when the server is.
        let _ = self.stopping.clone().wait_for(|stopping| *stopping).await;
    }

    /// The peer has proven who it is: its connection gives way to none from now on.
    pub fn keep(&self) {
        self.place.is_kept.store(true, Relaxed);
    }

    /// Whether it has.
    pub fn is_kept(&self) -> bool {
        self.place.is_kept.load(Relaxed)
    }
}

/// The places that are taken.
#[derive(Debug, Default)]
struct Places(Mutex<Vec<Arc<Place>>>);

impl Places {
    fn with<T>(&self, work: impl FnOnce(&mut Vec<Arc<Place>>) -> T) -> T {
        // Nothing in here panics half-way.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many connections of `host` nobody vouches for.
    fn unknown(&self, host: IpAddr) -> usize {
        self.with(|places| places.iter().filter(|place| place.is_unknown() && place.host == host).count())
    }

    /// Closes the oldest connection that nobody vouches for: of `host`, or else of the host that has most of them.
    /// Whether there was one.
    fn give_away(&self, host: Option<IpAddr>) -> bool {
        self.with(|places| {
            let unknown = |host: IpAddr| {
                let is_its = move |place: &&Arc<Place>| place.host == host && place.is_unknown();
                places.iter().filter(is_its).count()
            };
            let is_due = |place: &&Arc<Place>| {
                place.is_unknown()
                    && place.since.elapsed() >= UNKNOWN_MIN
                    && host.is_none_or(|host| place.host == host)
            };
            let due = places.iter().filter(is_due);
            let victim = due.max_by_key(|place| (unknown(place.host), place.since.elapsed())).cloned();
            if let Some(victim) = &victim {
                places.retain(|place| !Arc::ptr_eq(place, victim));
                victim.given_away.notify_one();
            }
            victim.is_some()
        })
    }
}

impl Place {
    fn is_unknown(&self) -> bool {
        !self.is_kept.load(Relaxed)
    }
}

/// What counts as one peer: an IPv6 network has 2⁶⁴ addresses to spare.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
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

    /// Gives each connection to `serve`, at most `connections_max` at once: others take the place of one that nobody
    /// vouches for, or wait in the kernel's backlog. Call it within a tokio runtime.
    pub fn serve<F, S>(self, connections_max: u32, serve: F) -> io::Result<Serving>
    where
        F: Fn(TcpStream, SocketAddr, Seat) -> S + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::from_std(self.listener)?;
        let permits = Arc::new(Semaphore::new(connections_max as usize));
        let (stopping, stopped) = watch::channel(false);
        let hall = Hall {
            permits: Arc::clone(&permits),
            places: Arc::default(),
            unknown_max: (connections_max as usize / 2).max(1),
            stopping: stopped,
        };
        let accepting = tokio::spawn(hall.accept(listener, serve));
        Ok(Serving { accepting, stopping, permits, connections_max })
    }
}

/// Where connections get their places.
struct Hall {
    permits: Arc<Semaphore>,
    places: Arc<Places>,
    /// Places of one host that nobody vouches for.
    unknown_max: usize,
    stopping: watch::Receiver<bool>,
}

impl Hall {
    async fn accept<F, S>(self, listener: TcpListener, serve: F)
    where
        F: Fn(TcpStream, SocketAddr, Seat) -> S,
        S: Future<Output = ()> + Send + 'static,
    {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let (permit, place) = self.place(host(peer.ip())).await;
                    let seat = Seat { stopping: self.stopping.clone(), place: Arc::clone(&place) };
                    let served = serve(stream, peer, seat);
                    let places = Arc::clone(&self.places);
                    tokio::spawn(async move {
                        tokio::select! {
                            () = served => {}
                            () = place.given_away.notified() => {}
                        }
                        places.with(|places| places.retain(|other| !Arc::ptr_eq(other, &place)));
                        drop(permit);
                    });
                }
                // Out of descriptors, or a peer that is gone again: neither passes faster by spinning.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Waits for a place for a connection of `host`.
    async fn place(&self, host: IpAddr) -> (OwnedSemaphorePermit, Arc<Place>) {
        let permit = || Arc::clone(&self.permits).acquire_owned();
        let permit = loop {
            let is_over = self.places.unknown(host) >= self.unknown_max;
            let wait = if is_over || self.permits.available_permits() == 0 {
                // The permit comes as soon as the other connection is dropped.
                let is_given = self.places.give_away(is_over.then_some(host));
                if is_given { Duration::MAX } else { LOOK_AGAIN }
            } else {
                Duration::MAX
            };
            if is_over && wait == LOOK_AGAIN {
                tokio::time::sleep(wait).await;
            } else if let Ok(permit) = tokio::time::timeout(wait, permit()).await {
                break permit.expect("nobody closes the semaphore");
            }
        };
        let place = Arc::new(Place {
            host,
            since: Instant::now(),
            is_kept: AtomicBool::new(false),
            given_away: Notify::new(),
        });
        self.places.with(|places| places.push(Arc::clone(&place)));
        (permit, place)
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
