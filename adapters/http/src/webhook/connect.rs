//! Opens connections: name lookup, guard, TCP to each address in turn, TLS. No proxy, whatever the
//! environment says.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use postrider_actors::model::{
    address::AddressGuard,
    outcome::{Obstacle, Reason},
};
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::Mutex,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;
use url::Host;

use super::{
    keys::WebhookKeys,
    settings::authority,
    shortage::{Trouble, shortage, shortage_lately},
    stream::Stream,
};

/// How many addresses of one name are tried.
const ADDRESSES_MAX: usize = 8;

/// How long a lookup's result, good or bad, is used for further connections: long enough that a
/// receiver which closes after each answer doesn't cost a lookup per message, short enough that a
/// changed record is followed at once.
const LOOKUP_REUSE: Duration = Duration::from_secs(1);

/// Opens connections to one destination.
pub(super) struct Connector {
    target: Target,
    guard: AddressGuard,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
}

enum Target {
    Address(SocketAddr),
    Name(Name),
}

/// A host's name, and what the last lookup of it found.
struct Name {
    host: Arc<str>,
    port: u16,
    resolve: Resolve,
    last: Arc<Mutex<Option<Lookup>>>,
}

/// Looks up the addresses of a name, for a port.
type Resolve = fn(Arc<str>, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;

/// The system's resolver: the hosts file, then DNS.
fn system(host: Arc<str>, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
    Box::pin(async move { Ok(tokio::net::lookup_host((&*host, port)).await?.collect()) })
}

struct Lookup {
    at: Instant,
    addresses: Result<Arc<[SocketAddr]>, Trouble>,
}

impl Connector {
    /// The error says what is wrong with the URL.
    pub(super) fn new(
        keys: &WebhookKeys,
        tls: Option<TlsConnector>,
        timeout: Duration,
    ) -> Result<Self, String> {
        let (host, port) = authority(&keys.url).ok_or("the URL has no host")?;
        let tls = match tls {
            Some(connector) => {
                let name = host.to_string();
                let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name =
                    ServerName::try_from(name).map_err(|_| "the URL's host can't be in a certificate")?;
                Some((connector, name))
            }
            None => None,
        };
        let target = match host {
            Host::Ipv4(address) => Target::Address((address, port).into()),
            Host::Ipv6(address) => Target::Address((address, port).into()),
            Host::Domain(name) => {
                Target::Name(Name { host: name.into(), port, resolve: system, last: Arc::default() })
            }
        };
        Ok(Self { target, guard: AddressGuard::new(keys.allow.clone()), tls, timeout })
    }

    /// Opens a connection within the connect timeout and before `deadline`, the attempt's own. Running
    /// into the former is the trouble of the step it was in, into the latter a timeout.
    pub(super) async fn connect(&self, deadline: Instant) -> Result<Stream, Trouble> {
        let until = deadline.min(Instant::now() + self.timeout);
        let mut step = Reason::Dns;
        let opened = timeout_at(until, self.open(until, &mut step)).await;
        match opened {
            Ok(opened) => opened,
            Err(_) if until == deadline => Err(Reason::Timeout.into()),
            Err(_) => Err(step.into()),
        }
    }

    async fn open(&self, until: Instant, step: &mut Reason) -> Result<Stream, Trouble> {
        let addresses = match &self.target {
            Target::Address(address) => candidates(&self.guard, &[*address])?,
            Target::Name(name) => candidates(&self.guard, &name.look_up().await?)?,
        };
        *step = Reason::Connect;
        let tcp = connect_to_any(&addresses, until).await?;
        // 0.0.0.0 is 127.0.0.1 once it is connected.
        let peer = tcp.peer_addr().map_err(|_| Reason::Connect)?;
        self.guard.check(peer.ip()).map_err(|refused| Trouble::Unsent(Obstacle::Address(refused)))?;
        // A request is one write: waiting to fill a segment would only delay it.
        tcp.set_nodelay(true).map_err(|_| Reason::Connect)?;
        let Some((connector, name)) = &self.tls else { return Ok(Stream::Plain(tcp)) };
        *step = Reason::Tls;
        let tls = connector.connect(name.clone(), tcp).await.map_err(|_| Reason::Tls)?;
        Ok(Stream::Tls(Box::new(tls)))
    }
}

/// The addresses that may be connected to, in order. Every address passes here immediately before the connect, IP
/// literals and those of an earlier lookup too, and exactly what it returns is dialled: where the guard against
/// server-side request forgery decides (design §10, F54). Of a mixed answer only the allowed addresses are used.
fn candidates(guard: &AddressGuard, resolved: &[SocketAddr]) -> Result<Vec<SocketAddr>, Trouble> {
    let mut addresses = Vec::with_capacity(resolved.len().min(ADDRESSES_MAX));
    let mut refused = None;
    for &address in resolved {
        match guard.check(address.ip()) {
            Ok(()) if addresses.len() < ADDRESSES_MAX && !addresses.contains(&address) => {
                addresses.push(address);
            }
            Ok(()) => {}
            Err(refusal) => refused = refused.or(Some(refusal)),
        }
    }
    match refused {
        Some(refusal) if addresses.is_empty() => Err(Trouble::Unsent(Obstacle::Address(refusal))),
        _ => Ok(addresses),
    }
}

/// Tries each address with a fair share of the time that is left, so that one which drops packets
/// does not keep the next from being tried. It is this machine's fault where it is so for every address: one that
/// refuses is evidence.
async fn connect_to_any(addresses: &[SocketAddr], until: Instant) -> Result<TcpStream, Trouble> {
    let mut troubles = Vec::with_capacity(addresses.len());
    for (index, address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let share = until.saturating_duration_since(now) / (addresses.len() - index) as u32;
        let short = match timeout_at(now + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => shortage(&error),
            Err(_) => None,
        };
        troubles.push(short.map_or(Trouble::Failed(Reason::Connect), Trouble::from));
    }
    let failed = troubles.iter().find(|trouble| matches!(trouble, Trouble::Failed(_)));
    Err(failed.or(troubles.first()).copied().unwrap_or(Trouble::Failed(Reason::Connect)))
}

impl Name {
    /// Looks the name up, one lookup at a time. The lookup runs in a task that holds the lock: an attempt
    /// that gives up does not start another one beside it, so a hanging resolver holds at most one thread
    /// of the blocking pool per destination.
    async fn look_up(&self) -> Result<Arc<[SocketAddr]>, Trouble> {
        let mut last = Arc::clone(&self.last).lock_owned().await;
        if let Some(last) = &*last
            && last.at.elapsed() < LOOKUP_REUSE
        {
            return last.addresses.clone();
        }
        let lookup = (self.resolve)(self.host.clone(), self.port);
        let task = tokio::spawn(async move {
            let addresses = match lookup.await {
                Ok(addresses) if addresses.is_empty() => Err(Reason::Dns.into()),
                Ok(addresses) => Ok(addresses.into()),
                Err(error) => {
                    Err(shortage(&error).or_else(shortage_lately).map_or(Reason::Dns.into(), Trouble::from))
                }
            };
            *last = Some(Lookup { at: Instant::now(), addresses: addresses.clone() });
            addresses
        });
        // The task ends early only when the runtime does.
        task.await.unwrap_or(Err(Reason::Dns.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
    };

    use postrider_settings::Keys as _;
    use url::Url;

    use super::*;

    fn address(port: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, port).into()
    }

    /// Lets 127.0.0.1 through, and not 127.0.0.2.
    fn guard() -> AddressGuard {
        AddressGuard::new(vec!["127.0.0.1/32".parse().unwrap()])
    }

    #[test]
    fn candidates_are_few_and_different() {
        let resolved: Vec<_> = (0..40).map(|port| address(port / 2)).collect();
        let expected: Vec<_> = (0..ADDRESSES_MAX as u16).map(address).collect();
        assert_eq!(candidates(&guard(), &resolved), Ok(expected));
    }

    const REFUSED: [u8; 4] = [127, 0, 0, 2];

    fn refused() -> Trouble {
        Trouble::Unsent(Obstacle::Address(guard().check(REFUSED.into()).unwrap_err()))
    }

    #[test]
    fn f54_of_a_mixed_answer_only_what_is_allowed_is_dialled() {
        let (good, bad) = (address(1), SocketAddr::from((REFUSED, 1)));
        for mixed in [&[good, bad][..], &[bad, good], &[bad, bad, good, bad]] {
            assert_eq!(candidates(&guard(), mixed), Ok(vec![good]));
        }
        // However many the refused ones are.
        let many: Vec<_> = (0..100).map(|_| bad).chain([good]).collect();
        assert_eq!(candidates(&guard(), &many), Ok(vec![good]));
        assert_eq!(candidates(&guard(), &[bad, bad]), Err(refused()));
    }

    /// 127.0.0.1 when it is asked for the first time, 127.0.0.2 afterwards.
    fn rebinding(_: Arc<str>, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        static LOOKUPS: AtomicUsize = AtomicUsize::new(0);
        let answer = if LOOKUPS.fetch_add(1, SeqCst) == 0 { address(port) } else { (REFUSED, port).into() };
        Box::pin(async move { Ok(vec![answer]) })
    }

    #[tokio::test]
    async fn f54_an_answer_that_changes_between_lookups_is_refused() {
        let listener = tokio::net::TcpListener::bind(address(0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let inside = tokio::net::TcpListener::bind((Ipv4Addr::from(REFUSED), port)).await.unwrap();
        let mut connector = connector(&format!("http://rebinding.example:{port}/"), Duration::from_secs(5));
        let Target::Name(name) = &mut connector.target else { panic!("a name") };
        (name.resolve, connector.guard) = (rebinding, guard());
        let until = Instant::now() + Duration::from_secs(5);
        assert!(connector.connect(until).await.is_ok());
        let Target::Name(name) = &connector.target else { panic!("a name") };
        // As when the time of an answer is over.
        *name.last.lock().await = None;
        for _ in 0..3 {
            assert_eq!(connector.connect(until).await.err(), Some(refused()));
        }
        assert!(timeout_at(Instant::now(), inside.accept()).await.is_err(), "0 connections");
    }

    #[tokio::test]
    async fn f54_the_peer_is_judged_too() {
        let listener = tokio::net::TcpListener::bind(address(0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut connector = connector(&format!("http://0.0.0.0:{port}/"), Duration::from_secs(5));
        // Linux connects 0.0.0.0 to 127.0.0.1, which is not allowed by this.
        connector.guard = AddressGuard::new(vec!["0.0.0.0/32".parse().unwrap()]);
        let error = connector.connect(Instant::now() + Duration::from_secs(5)).await.err();
        let Some(Trouble::Unsent(Obstacle::Address(refused))) = error else { panic!("{error:?}") };
        assert_eq!(refused.address, Ipv4Addr::LOCALHOST);
    }

    #[tokio::test]
    async fn the_next_address_is_tried_when_one_refuses_or_is_silent() {
        let listener = tokio::net::TcpListener::bind(address(0)).await.unwrap();
        let good = listener.local_addr().unwrap();
        let closed = {
            let other = tokio::net::TcpListener::bind(address(0)).await.unwrap();
            other.local_addr().unwrap()
        };
        let mute = listener_with_full_backlog().await;
        let addresses = [closed, mute.1, good];
        let until = Instant::now() + Duration::from_secs(2);
        let stream = connect_to_any(&addresses, until).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert_eq!(connect_to_any(&[closed], until).await.err(), Some(Reason::Connect.into()));
    }

    /// A listener whose backlog is full: it drops SYNs.
    async fn listener_with_full_backlog() -> (tokio::net::TcpListener, SocketAddr, Vec<TcpStream>) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(address(0)).unwrap();
        let listener = socket.listen(0).unwrap();
        let at = listener.local_addr().unwrap();
        let mut filled = Vec::new();
        while let Ok(stream) = tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(at)).await
        {
            filled.push(stream.unwrap());
            assert!(filled.len() < 8, "the backlog never filled");
        }
        (listener, at, filled)
    }

    fn connector(url: &str, timeout: Duration) -> Connector {
        let keys = WebhookKeys { url: Url::parse(url).unwrap().into(), ..WebhookKeys::declared() };
        Connector::new(&keys, None, timeout).unwrap()
    }

    #[tokio::test]
    async fn lookups_are_shared_and_failures_classified() {
        let name = |host: &str| Name { host: host.into(), port: 80, resolve: system, last: Arc::default() };
        let local = name("localhost");
        let found = local.look_up().await.unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback()));
        let again = local.look_up().await.unwrap();
        assert!(Arc::ptr_eq(&found, &again), "the second connection asked again");
        assert_eq!(name("nobody.invalid").look_up().await, Err(Reason::Dns.into()));
    }

    #[tokio::test]
    async fn f42_a_hanging_lookup_ends_with_the_attempt_and_is_not_started_twice() {
        let connector = connector("http://slow.example/", Duration::from_millis(20));
        let Target::Name(name) = &connector.target else { panic!("a name") };
        // What a lookup in flight does: it holds the lock.
        let _hanging = Arc::clone(&name.last).lock_owned().await;
        let late = Instant::now() + Duration::from_mins(1);
        assert_eq!(connector.connect(late).await.err(), Some(Reason::Dns.into()));
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(connector.connect(soon).await.err(), Some(Reason::Timeout.into()));
    }
}
