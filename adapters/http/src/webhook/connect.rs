//! Opens connections: name lookup, TCP to each address in turn, TLS. No proxy, whatever the
//! environment says.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use postrider_actors::model::outcome::Reason;
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    sync::Mutex,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;
use url::{Host, Url};

use super::{
    settings::authority,
    shortage::{Trouble, shortage, shortage_now},
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
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
}

enum Target {
    Address(SocketAddr),
    Name { host: Arc<str>, port: u16, lookup: Arc<Mutex<Option<Lookup>>> },
}

struct Lookup {
    at: Instant,
    addresses: Result<Arc<[SocketAddr]>, Trouble>,
}

impl Connector {
    /// The error says what is wrong with the URL.
    pub(super) fn new(url: &Url, tls: Option<TlsConnector>, timeout: Duration) -> Result<Self, String> {
        let (host, port) = authority(url).ok_or("the URL has no host")?;
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
            Host::Domain(name) => Target::Name { host: name.into(), port, lookup: Arc::default() },
        };
        Ok(Self { target, tls, timeout })
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
            Target::Address(address) => candidates(&[*address]),
            Target::Name { host, port, lookup } => candidates(&look_up(host, *port, lookup).await?),
        };
        *step = Reason::Connect;
        let tcp = connect_to_any(&addresses, until).await?;
        // A request is one write: waiting to fill a segment would only delay it.
        tcp.set_nodelay(true).map_err(|_| Reason::Connect)?;
        let Some((connector, name)) = &self.tls else { return Ok(Stream::Plain(tcp)) };
        *step = Reason::Tls;
        let tls = connector.connect(name.clone(), tcp).await.map_err(|_| Reason::Tls)?;
        Ok(Stream::Tls(Box::new(tls)))
    }
}

/// The addresses that may be connected to, in order. Every address passes here after resolution, IP
/// literals too, and only what it returns is connected to: the place where the guard against
/// server-side request forgery decides (design §10, F54).
fn candidates(resolved: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut addresses = Vec::with_capacity(resolved.len().min(ADDRESSES_MAX));
    for &address in resolved {
        if addresses.len() < ADDRESSES_MAX && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
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
        troubles.push(short.map_or(Trouble::Failed(Reason::Connect), Trouble::Short));
    }
    let failed = troubles.iter().find(|trouble| matches!(trouble, Trouble::Failed(_)));
    Err(failed.or(troubles.first()).copied().unwrap_or(Trouble::Failed(Reason::Connect)))
}

/// Looks a name up, one lookup at a time. The lookup runs in a task that holds the lock: an attempt
/// that gives up does not start another one beside it, so a hanging resolver holds at most one thread
/// of the blocking pool per destination.
async fn look_up(
    host: &Arc<str>,
    port: u16,
    lookup: &Arc<Mutex<Option<Lookup>>>,
) -> Result<Arc<[SocketAddr]>, Trouble> {
    let mut last = Arc::clone(lookup).lock_owned().await;
    if let Some(last) = &*last
        && last.at.elapsed() < LOOKUP_REUSE
    {
        return last.addresses.clone();
    }
    let host = Arc::clone(host);
    let task = tokio::spawn(async move {
        let addresses: Result<Arc<[_]>, _> = match tokio::net::lookup_host((&*host, port)).await {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => {
                Err(shortage(&error).or_else(shortage_now).map_or(Reason::Dns.into(), Trouble::Short))
            }
        };
        let addresses =
            addresses.and_then(|found| if found.is_empty() { Err(Reason::Dns.into()) } else { Ok(found) });
        *last = Some(Lookup { at: Instant::now(), addresses: addresses.clone() });
        addresses
    });
    // The task ends early only when the runtime does.
    task.await.unwrap_or(Err(Reason::Dns.into()))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(port: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, port).into()
    }

    #[test]
    fn candidates_are_few_and_different() {
        let resolved: Vec<_> = (0..40).map(|port| address(port / 2)).collect();
        let expected: Vec<_> = (0..ADDRESSES_MAX as u16).map(address).collect();
        assert_eq!(candidates(&resolved), expected);
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

    #[tokio::test]
    async fn lookups_are_shared_and_failures_classified() {
        let lookup = Arc::default();
        let host: Arc<str> = "localhost".into();
        let found = look_up(&host, 80, &lookup).await.unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback()));
        let again = look_up(&host, 80, &lookup).await.unwrap();
        assert!(Arc::ptr_eq(&found, &again), "the second connection asked again");

        let nobody: Arc<str> = "nobody.invalid".into();
        assert_eq!(look_up(&nobody, 80, &Arc::default()).await, Err(Reason::Dns.into()));
    }

    #[tokio::test]
    async fn f42_a_hanging_lookup_ends_with_the_attempt_and_is_not_started_twice() {
        let url = Url::parse("http://slow.example/").unwrap();
        let connector = Connector::new(&url, None, Duration::from_millis(20)).unwrap();
        let Target::Name { lookup, .. } = &connector.target else { panic!("a name") };
        // What a lookup in flight does: it holds the lock.
        let _hanging = Arc::clone(lookup).lock_owned().await;
        let late = Instant::now() + Duration::from_mins(1);
        assert_eq!(connector.connect(late).await.err(), Some(Reason::Dns.into()));
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(connector.connect(soon).await.err(), Some(Reason::Timeout.into()));
    }
}
