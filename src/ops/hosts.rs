use std::net::IpAddr;

use actix_web::http::{
    Uri,
    header::{self, HeaderMap},
    uri::Authority,
};

/// The host names that the server answers to. A page in a browser can make its own name point here (DNS rebinding)
/// and would then read the answers; requests for that name are refused.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    allowed: Vec<String>,
}

/// Why a request is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostRejection {
    /// It names no host, or several.
    Unclear,
    /// It names a host that we are not.
    Host,
    /// A page of another origin sent it.
    Origin,
}

impl Hosts {
    /// `allowed`, in lower case, in addition to localhost and the address that a request arrived at.
    pub(super) fn new(allowed: Vec<String>) -> Self {
        Self { allowed }
    }

    /// Whether a request that arrived at `local` is for this server, and comes from no page but its own.
    pub(super) fn check(&self, headers: &HeaderMap, uri: &Uri, local: IpAddr) -> Result<(), HostRejection> {
        let mut hosts = headers.get_all(header::HOST);
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return Err(HostRejection::Unclear);
        };
        let authority: Authority =
            host.to_str().ok().and_then(|host| host.parse().ok()).ok_or(HostRejection::Unclear)?;
        // Of a request for http://host/path the target counts (RFC 9112, section 3.2.2).
        for authority in [Some(&authority), uri.authority()].into_iter().flatten() {
            if !self.is_ours(authority, local) {
                return Err(HostRejection::Host);
            }
        }
        for origin in headers.get_all(header::ORIGIN) {
            let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
            if !origin.is_some_and(|origin| is_origin_of(&origin, &authority)) {
                return Err(HostRejection::Origin);
            }
        }
        Ok(())
    }

    fn is_ours(&self, authority: &Authority, local: IpAddr) -> bool {
        if authority.as_str().contains('@') {
            return false;
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        host == "localhost"
            || host.parse::<IpAddr>().is_ok_and(|host| host.to_canonical() == local.to_canonical())
            || self.allowed.contains(&host)
    }
}

/// Whether a page of `origin` has asked `host` for what is its own: name and port are the same. Another server of the same
/// machine has another port.
fn is_origin_of(origin: &Uri, host: &Authority) -> bool {
    let default = match origin.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => return false,
    };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(default);
    origin.authority().is_some_and(|origin| {
        !origin.as_str().contains('@')
            && origin.host().eq_ignore_ascii_case(host.host())
            && port(origin) == port(host)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(host: &[&str], origin: Option<&str>, uri: &str) -> Result<(), HostRejection> {
        let mut headers = HeaderMap::new();
        for host in host {
            headers.append(header::HOST, host.parse().unwrap());
        }
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        let hosts = Hosts::new(vec!["metrics.internal".into(), "fd00::1".into()]);
        hosts.check(&headers, &uri.parse().unwrap(), "127.0.0.1".parse().unwrap())
    }

    #[test]
    fn our_names_are_known_whatever_the_port_and_the_case() {
        for host in [
            "127.0.0.1:9464",
            "127.0.0.1",
            "localhost:1",
            "LocalHost",
            "Metrics.Internal:9464",
            "[fd00::1]:9464",
            "[::ffff:127.0.0.1]:9464",
        ] {
            assert_eq!(check(&[host], None, "/metrics"), Ok(()), "{host}");
        }
        for (host, origin) in [
            ("localhost:9464", "http://localhost:9464"),
            ("LOCALHOST:9464", "http://localhost:9464"),
            ("metrics.internal", "https://metrics.internal"),
            ("metrics.internal:443", "https://metrics.internal"),
        ] {
            assert_eq!(check(&[host], Some(origin), "/metrics"), Ok(()), "{origin}");
        }
        assert_eq!(check(&["localhost"], None, "http://localhost/metrics"), Ok(()));
    }

    #[test]
    fn other_hosts_are_refused() {
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "evil.example:9464",
            "10.0.0.1",
            "0.0.0.0",
            "2130706433",
            "[::1]",
            "localhost@evil.example",
            "evil.example@localhost",
            "metrics.internal.",
        ] {
            assert_eq!(check(&[host], None, "/metrics"), Err(HostRejection::Host), "{host}");
        }
        assert_eq!(check(&["localhost"], None, "http://evil.example/metrics"), Err(HostRejection::Host));
        assert_eq!(check(&[], None, "/metrics"), Err(HostRejection::Unclear));
        assert_eq!(check(&["localhost", "localhost"], None, "/metrics"), Err(HostRejection::Unclear));
        assert_eq!(check(&["local host"], None, "/metrics"), Err(HostRejection::Unclear));
    }

    #[test]
    fn f56_pages_of_other_origins_are_refused() {
        for origin in [
            "http://evil.example",
            "null",
            "file://",
            "http://localhost@evil.example",
            "http://evil@localhost:9464",
            // Another server of this machine.
            "http://localhost:8080",
            "http://localhost",
            "http://127.0.0.1:9464",
            "chrome-extension://localhost:9464",
        ] {
            let checked = check(&["localhost:9464"], Some(origin), "/metrics");
            assert_eq!(checked, Err(HostRejection::Origin), "{origin}");
        }
    }
}
