use std::net::IpAddr;

use actix_web::http::{
    Method, StatusCode, Uri,
    header::{HeaderMap, HeaderValue},
};
use postrider_http::token::{Token, bearer};
use secrecy::SecretString;

use super::{
    hosts::{HostRejection, Hosts},
    problem::Problem,
};

/// Bytes of a request's head, and headers in it. The server itself would take 128 KiB and 96.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Read.
    View,
    /// Read, and give orders.
    Operate,
}

impl Role {
    /// The word that operators see.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Operate => "operate",
        }
    }
}

/// Who has sent a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) role: Role,
    /// Whether that is by a token.
    pub(crate) has_token: bool,
}

/// Who may ask for what.
#[derive(Debug)]
pub(super) struct Access {
    hosts: Hosts,
    /// None: whoever reaches the server may do everything. Then it is on loopback.
    tokens: Vec<(Token, Role)>,
}

/// The head of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head<'a> {
    pub(super) method: &'a Method,
    pub(super) uri: &'a Uri,
    pub(super) headers: &'a HeaderMap,
    /// Where it arrived.
    pub(super) local: IpAddr,
}

impl Access {
    /// For requests that go by one of `hosts`, and bring one of these tokens if there are any.
    pub(super) fn new(
        hosts: Vec<String>,
        view: Option<&SecretString>,
        operate: Option<&SecretString>,
    ) -> Self {
        let token = |secret: Option<&SecretString>, role| Some((Token::new(secret?)?, role));
        // Unusable ones were refused with the configuration.
        let tokens = [token(view, Role::View), token(operate, Role::Operate)].into_iter().flatten().collect();
        Self { hosts: Hosts::new(hosts), tokens }
    }

    /// Whether requests need a token.
    pub(super) fn has_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// The role of who has sent this. It looks at nothing but the head, before anything is spent on a body.
    pub(super) fn check(&self, head: Head<'_>) -> Result<Role, Problem> {
        let Head { method, uri, headers, local } = head;
        let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
        let target = uri.path_and_query().map_or(0, |target| target.as_str().len());
        if headers.len() > HEADERS_MAX || bytes + target > HEAD_BYTES_MAX {
            return Err(Problem::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too long"));
        }
        self.hosts.check(headers, uri, local).map_err(|rejection| match rejection {
            HostRejection::Unclear => Problem::bad("expected exactly one Host header"),
            HostRejection::Host => Problem::new(
                StatusCode::MISDIRECTED_REQUEST,
                "not known by this name: add it to ops.allowed_hosts",
            ),
            HostRejection::Origin => foreign(),
        })?;
        let is_data = is_data(uri.path());
        if is_cross_site(headers) && (is_data || *method != Method::GET) {
            return Err(foreign());
        }
        let role = self.role(headers);
        match role {
            Ok(Role::View) if *method == Method::POST && uri.path().starts_with(API) => Err(Problem::new(
                StatusCode::FORBIDDEN,
                "this token may only look: ops.operate_token may do more",
            )),
            // What is no data tells nobody anything.
            Err(_) if !is_data => Ok(Role::View),
            role => role,
        }
    }

    fn role(&self, headers: &HeaderMap) -> Result<Role, Problem> {
        if self.tokens.is_empty() {
            return Ok(Role::Operate);
        }
        let brought =
            bearer(headers).ok_or_else(|| Problem::unauthorized("expected `Authorization: Bearer TOKEN`"))?;
        // Every token is compared, so that the time does not reveal which one it was.
        let known = |best: Option<Role>, (token, role): &(Token, Role)| {
            if token.is(brought) { best.max(Some(*role)) } else { best }
        };
        let role = self.tokens.iter().fold(None, known);
        role.ok_or_else(|| Problem::unauthorized("the token is not known"))
    }
}

/// What begins the paths of the interface for programs.
pub(super) const API: &str = "/api/";

/// Whether a path leads to anything that an outsider must not learn. The page itself holds nothing, and probes say no more
/// than whether the daemon is well.
fn is_data(path: &str) -> bool {
    path.starts_with(API) || path == "/metrics"
}

fn foreign() -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "not for pages of other origins")
}

/// Whether a browser says that a page of another site has caused it (Fetch Metadata).
fn is_cross_site(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    matches!(site, Some(b"cross-site" | b"same-site"))
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderName;

    use super::*;

    const VIEW: &str = "view-0123456789ab";
    const OPERATE: &str = "operate-0123456789";

    /// The role, or the status.
    fn check(access: &Access, method: &Method, target: &str, headers: &[(&str, &str)]) -> Result<Role, u16> {
        let mut map = HeaderMap::new();
        map.insert("host".parse().unwrap(), "localhost:9464".parse().unwrap());
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let (uri, local) = (target.parse().unwrap(), "127.0.0.1".parse().unwrap());
        let head = Head { method, uri: &uri, headers: &map, local };
        access.check(head).map_err(|problem| actix_web::ResponseError::status_code(&problem).as_u16())
    }

    #[test]
    fn f56_tokens_decide_what_one_may_do() {
        let (view, operate): (SecretString, SecretString) = (VIEW.into(), OPERATE.into());
        let access = Access::new(Vec::new(), Some(&view), Some(&operate));
        let (view, operate) = (format!("Bearer {VIEW}"), format!("bearer {OPERATE}"));
        let json = ("content-type", "application/json");
        let (files, pause) = ("/api/v1/files", "/api/v1/destinations/a/pause");
        assert_eq!(check(&access, &Method::GET, files, &[("authorization", &view)]), Ok(Role::View));
        assert_eq!(check(&access, &Method::GET, files, &[("authorization", &operate)]), Ok(Role::Operate));
        assert_eq!(
            check(&access, &Method::POST, pause, &[("authorization", &operate), json]),
            Ok(Role::Operate)
        );
        assert_eq!(check(&access, &Method::POST, pause, &[("authorization", &view), json]), Err(403));
        for wrong in ["", "Bearer ", "Bearer view-0123456789aX", "Basic dmlldw=="] {
            assert_eq!(check(&access, &Method::GET, files, &[("authorization", wrong)]), Err(401), "{wrong}");
            assert_eq!(
                check(&access, &Method::GET, "/metrics", &[("authorization", wrong)]),
                Err(401),
                "{wrong}"
            );
        }
        let twice = [("authorization", &*view), ("authorization", &*operate)];
        assert_eq!(check(&access, &Method::GET, files, &twice), Err(401));
        assert_eq!(check(&access, &Method::GET, &format!("{files}?token={OPERATE}"), &[]), Err(401));
        assert_eq!(check(&access, &Method::GET, files, &[("cookie", &format!("token={OPERATE}"))]), Err(401));
        for open in ["/", "/app.js", "/healthz", "/readyz"] {
            assert_eq!(check(&access, &Method::GET, open, &[]), Ok(Role::View), "{open}");
        }
    }

    #[test]
    fn f56_without_tokens_no_page_of_another_origin_gives_an_order() {
        let access = Access::new(Vec::new(), None, None);
        let (json, pause) = (("content-type", "application/json"), "/api/v1/destinations/a/pause");
        assert_eq!(check(&access, &Method::POST, pause, &[json]), Ok(Role::Operate));
        for headers in [
            [json, ("origin", "http://evil.example")],
            [json, ("origin", "null")],
            [json, ("sec-fetch-site", "cross-site")],
            [json, ("sec-fetch-site", "same-site")],
        ] {
            assert_eq!(check(&access, &Method::POST, pause, &headers), Err(403), "{headers:?}");
            assert_eq!(check(&access, &Method::GET, "/api/v1/files", &headers[1..]), Err(403), "{headers:?}");
        }
        // A link from elsewhere may lead to the page.
        assert_eq!(check(&access, &Method::GET, "/", &[("sec-fetch-site", "cross-site")]), Ok(Role::Operate));
        assert_eq!(check(&access, &Method::GET, "/", &[("x", &"a".repeat(HEAD_BYTES_MAX))]), Err(431));
    }
}
