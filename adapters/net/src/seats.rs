//! The connections of an HTTP server, and the bounds on them that actix-web has none of: how long one may be idle after its
//! first request, how old it may become, and who gives way when no place is free.
//!
//! Connections that nobody vouches for give way: when no place is free, the oldest of them is closed, and no peer keeps
//! more than half of all places with them. So whoever opens connections and says nothing keeps nobody out.
//!
//! A seat holds a second descriptor of its connection. That is what closes it: the server sees the end of the stream, and
//! drops the connection in its own order.

use std::{
    cmp::Reverse,
    io,
    net::{IpAddr, Ipv6Addr, Shutdown, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// How long a connection keeps its place whatever comes: a request that is sent at once has been read by then.
const UNKNOWN_MIN: Duration = Duration::from_millis(500);

/// How often it is looked whether a connection's time is over …
const LOOK: Duration = Duration::from_millis(250);
/// … and, while there are too many, whether one may be closed.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What the system keeps of a stream that its peer has not read.
const STREAM_BUFFER_BYTES: usize = 256 << 10;

/// Bounds on a server's connections.
#[derive(Clone, Copy, Debug)]
pub struct SeatBounds {
    /// Connections at once.
    pub connections_max: usize,
    /// How long a connection may be without a request in progress: before its first, between two, and while its last answer
    /// is read.
    pub idle_max: Duration,
    /// At this age a connection takes no more requests …
    pub age_max: Duration,
    /// … and so much later it is closed in the middle of one.
    pub grace: Duration,
}

/// The connections of one server.
#[derive(Clone, Debug)]
pub struct Seats(Arc<Hall>);

#[derive(Debug)]
struct Hall {
    bounds: SeatBounds,
    places: Mutex<Vec<Arc<Place>>>,
    /// There is something to look after.
    changed: Notify,
    /// Seats that were not dropped.
    taken: watch::Sender<usize>,
}

#[derive(Debug)]
struct Place {
    /// The connection, once more.
    stream: TcpStream,
    host: IpAddr,
    /// Where it arrived.
    local: IpAddr,
    since: Instant,
    is_kept: AtomicBool,
    is_stream: AtomicBool,
    /// Requests in progress.
    busy: AtomicUsize,
    /// Milliseconds after `since` at which something happened last.
    sign: AtomicU64,
}

/// A connection's place among those that are served at once. It is part of the connection, and dropped with it.
#[derive(Debug)]
pub struct Seat {
    place: Arc<Place>,
    seats: Seats,
}

/// A request in progress.
#[derive(Debug)]
pub struct InRequest(Arc<Place>);

/// An answer that goes on for as long as it is read.
#[derive(Clone, Debug)]
pub struct Streaming(Arc<Place>);

impl Seat {
    /// A request has come. It is in progress until what this returns is dropped.
    pub fn request(&self) -> InRequest {
        self.place.busy.fetch_add(1, SeqCst);
        InRequest(Arc::clone(&self.place))
    }

    /// The address of this machine that it arrived at.
    pub fn local(&self) -> IpAddr {
        self.place.local
    }

    /// The peer has proven who it is: its connection gives way to none from now on.
    pub fn keep(&self) {
        self.place.is_kept.store(true, Relaxed);
    }

    /// Whether it has.
    pub fn is_kept(&self) -> bool {
        self.place.is_kept.load(Relaxed)
    }

    /// Whether it takes no more requests.
    pub fn is_old(&self) -> bool {
        self.place.since.elapsed() >= self.seats.0.bounds.age_max
    }

    /// The answer to its request is a stream, which may last; but it is closed when nothing of it was read for
    /// `idle_max`.
    pub fn stream(&self) -> Streaming {
        // More would only be read late. It keeps what it has if the system refuses.
        let _ = set_socket_send_buffer_size(&self.place.stream, STREAM_BUFFER_BYTES);
        self.place.is_stream.store(true, Relaxed);
        Streaming(Arc::clone(&self.place))
    }
}

impl Streaming {
    /// Some of it was read.
    pub fn read(&self) {
        self.0.sign();
    }
}

impl Drop for InRequest {
    fn drop(&mut self) {
        self.0.sign();
        self.0.busy.fetch_sub(1, SeqCst);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.with(|places| places.retain(|place| !Arc::ptr_eq(place, &self.place)));
        self.seats.0.taken.send_modify(|taken| *taken -= 1);
    }
}

impl Place {
    fn is_unknown(&self) -> bool {
        !self.is_kept.load(Relaxed)
    }

    fn sign(&self) {
        self.sign.store(self.since.elapsed().as_millis() as u64, Relaxed);
    }

    fn close(&self) {
        // Whatever its peer has done to it: it is closed then.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn is_over(&self, bounds: &SeatBounds) -> bool {
        let age = self.since.elapsed();
        let is_old = age >= bounds.age_max + bounds.grace && !self.is_stream.load(Relaxed);
        let quiet = age.saturating_sub(Duration::from_millis(self.sign.load(Relaxed)));
        is_old || quiet >= bounds.idle_max && self.busy.load(SeqCst) == 0
    }
}

/// What counts as one peer: an IPv6 network has 2⁶⁴ addresses to spare.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

impl Seats {
    /// Nobody is there.
    pub fn new(bounds: SeatBounds) -> Self {
        let (taken, _) = watch::channel(0);
        Self(Arc::new(Hall { bounds, places: Mutex::default(), changed: Notify::new(), taken }))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Vec<Arc<Place>>) -> T) -> T {
        // Nothing in here panics half-way.
        work(&mut self.0.places.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A seat for a new connection. The error is that there is no descriptor for it.
    pub fn take(&self, connection: impl AsFd) -> io::Result<Seat> {
        let stream = TcpStream::from(connection.as_fd().try_clone_to_owned()?);
        let (host, local) = (host(stream.peer_addr()?.ip()), stream.local_addr()?.ip());
        let place = Arc::new(Place {
            stream,
            host,
            local,
            since: Instant::now(),
            is_kept: AtomicBool::new(false),
            is_stream: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            sign: AtomicU64::new(0),
        });
        let is_first = self.with(|places| {
            places.push(Arc::clone(&place));
            places.len() == 1
        });
        self.0.taken.send_modify(|taken| *taken += 1);
        if self.make_room() || is_first {
            self.0.changed.notify_one();
        }
        Ok(Seat { place, seats: self.clone() })
    }

    /// Closes what may be closed of what is too much. Whether more would have to be.
    fn make_room(&self) -> bool {
        let bounds = &self.0.bounds;
        let unknown_max = (bounds.connections_max / 2).max(1);
        self.with(|places| {
            loop {
                let unknown = |host: IpAddr| {
                    places.iter().filter(|place| place.host == host && place.is_unknown()).count()
                };
                let is_full = places.len() >= bounds.connections_max;
                let too_many =
                    |place: &Arc<Place>| place.is_unknown() && (is_full || unknown(place.host) > unknown_max);
                let mut surplus = places.iter().filter(|place| too_many(place)).peekable();
                if surplus.peek().is_none() {
                    return false;
                }
                let due = surplus.filter(|place| place.since.elapsed() >= UNKNOWN_MIN);
                // Of two that came at once the first.
                let first = due.min_by_key(|place| (Reverse(unknown(place.host)), place.since));
                let Some(victim) = first.cloned() else { return true };
                victim.close();
                places.retain(|place| !Arc::ptr_eq(place, &victim));
            }
        })
    }

    /// Closes connections whose time is over, until this is dropped.
    pub async fn watch(&self) {
        loop {
            let is_crowded = self.make_room();
            let is_empty = self.with(|places| {
                places.retain(|place| {
                    let is_over = place.is_over(&self.0.bounds);
                    if is_over {
                        place.close();
                    }
                    !is_over
                });
                places.is_empty()
            });
            let pause = if is_crowded { LOOK_AGAIN } else { LOOK };
            tokio::select! {
                () = self.0.changed.notified() => {}
                () = tokio::time::sleep(pause), if !is_empty => {}
            }
        }
    }

    /// Closes all that are left.
    pub fn close(&self) {
        self.with(|places| places.drain(..).for_each(|place| place.close()));
    }

    /// Returns when every connection has ended.
    pub async fn emptied(&self) {
        let mut taken = self.0.taken.subscribe();
        // The sender is in `self`.
        let _ = taken.wait_for(|taken| *taken == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const BOUNDS: SeatBounds = SeatBounds {
        connections_max: 4,
        idle_max: Duration::from_secs(10),
        age_max: Duration::from_mins(5),
        grace: Duration::from_mins(1),
    };

    /// A connection with its seat, and the peer's end of it.
    fn connect(seats: &Seats, listener: &TcpListener) -> (Seat, TcpStream) {
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        peer.set_nonblocking(true).unwrap();
        (seats.take(&stream).unwrap(), peer)
    }

    fn is_closed(peer: &TcpStream) -> bool {
        peer.peek(&mut [0]).is_ok_and(|read| read == 0)
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_unknown_connection_gives_way_and_a_known_one_never_does() {
        let (seats, listener) = (Seats::new(BOUNDS), TcpListener::bind("127.0.0.1:0").unwrap());
        let watching = tokio::spawn({
            let seats = seats.clone();
            async move { seats.watch().await }
        });
        let (known, its_peer) = connect(&seats, &listener);
        known.keep();
        let unknown: Vec<_> = (0..2).map(|_| connect(&seats, &listener)).collect();
        tokio::time::sleep(UNKNOWN_MIN * 2).await;
        assert!(unknown.iter().all(|(_, peer)| !is_closed(peer)), "half of the places are for one host");
        let (_third, peer) = connect(&seats, &listener);
        assert!(is_closed(&unknown[0].1) && !is_closed(&unknown[1].1) && !is_closed(&peer));
        let (_fourth, _peer) = connect(&seats, &listener);
        assert!(is_closed(&unknown[1].1) && !is_closed(&peer));
        // Nobody is closed before its time: it is looked again.
        let (_fifth, _peer) = connect(&seats, &listener);
        assert!(!is_closed(&peer));
        tokio::time::sleep(UNKNOWN_MIN).await;
        tokio::time::sleep(LOOK_AGAIN).await;
        assert!(is_closed(&peer) && !is_closed(&its_peer));
        watching.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_idle_or_old_is_closed_and_a_request_or_a_stream_that_is_read_is_not() {
        let (seats, listener) = (
            Seats::new(SeatBounds { connections_max: 100, ..BOUNDS }),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let watching = tokio::spawn({
            let seats = seats.clone();
            async move { seats.watch().await }
        });
        let (idle, busy, stream) =
            (connect(&seats, &listener), connect(&seats, &listener), connect(&seats, &listener));
        let request = busy.0.request();
        let streaming = stream.0.stream();
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            streaming.read();
        }
        assert_eq!([&idle, &busy, &stream].map(|(_, peer)| is_closed(peer)), [true, false, false]);
        tokio::time::sleep(BOUNDS.age_max).await;
        assert!(is_closed(&stream.1), "nobody reads it");
        assert!(busy.0.is_old() && !is_closed(&busy.1), "it is in a request");
        tokio::time::sleep(BOUNDS.grace).await;
        assert!(is_closed(&busy.1));
        drop(request);
        let emptied = tokio::time::timeout(Duration::from_secs(1), seats.emptied());
        assert!(emptied.await.is_err());
        drop((idle, busy, stream));
        seats.emptied().await;
        watching.abort();
    }

    #[test]
    fn a_network_counts_as_one_peer() {
        let host = |text: &str| host(text.parse().unwrap());
        assert_eq!(host("2001:db8::1"), host("2001:db8::ffff:2"));
        assert_ne!(host("2001:db8:0:1::1"), host("2001:db8:0:2::1"));
        assert_eq!(host("::ffff:10.0.0.1"), host("10.0.0.1"));
        assert_ne!(host("10.0.0.1"), host("10.0.0.2"));
    }
}
