//! What is refused of a destination's keys before anything is sent.

use std::{collections::HashSet, fmt};

use url::Url;

/// One thing that is wrong with a destination's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, relative to the destination: `url`, `headers.host`.
    pub key: String,
    /// What was found. Never the value of a header or a secret.
    pub found: String,
    /// What is allowed instead.
    pub allowed: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}; {}", self.key, self.found, self.allowed)
    }
}

/// Headers that Postrider writes itself, or that would change how the request is framed.
const RESERVED: [&str; 18] = [
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "traceparent",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
    "http2-settings",
];

/// The request line and the static headers together: receivers commonly take 8 KiB of head.
const STATIC_HEAD_BYTES_MAX: usize = 6 * 1024;

/// Everything that is wrong with a URL, static headers and a content type, without IO.
pub fn validate(url: &str, headers: &[(String, String)], content_type: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut problem = |key: String, found: String, allowed: &str| {
        problems.push(Problem { key, found, allowed: allowed.to_owned() });
    };
    match Url::parse(url) {
        Err(error) => {
            problem("url".into(), error.to_string(), "expected http://host/path or https://host/path");
        }
        Ok(url) => {
            if !matches!(url.scheme(), "http" | "https") {
                problem("url".into(), format!("the scheme is `{}`", url.scheme()), "expected http or https");
            }
            if !url.username().is_empty() || url.password().is_some() {
                // The URL is not shown: it holds a password.
                problem(
                    "url".into(),
                    "it holds credentials".into(),
                    "send them in `headers.authorization`, with the value from a secret",
                );
            }
            if url.fragment().is_some() {
                problem(
                    "url".into(),
                    "it has a fragment (`#…`)".into(),
                    "fragments are never sent; remove it",
                );
            }
            if url.port() == Some(0) {
                problem("url".into(), "the port is 0".into(), "expected 1 to 65535");
            }
        }
    }
    let mut seen = HashSet::new();
    for (name, value) in headers {
        let key = || format!("headers.{name}");
        let lower = name.to_ascii_lowercase();
        if !is_token(name) {
            problem(
                format!("headers.{}", name.escape_debug()),
                "the name is not a valid header name".into(),
                "expected letters, digits and -",
            );
        } else if lower == "content-type" {
            problem(key(), "it is written by Postrider".into(), "set `content_type` instead");
        } else if RESERVED.contains(&lower.as_str()) {
            problem(key(), "it is written by Postrider".into(), "remove it");
        } else if !seen.insert(lower) {
            problem(key(), "it is there twice (case does not count)".into(), "keep one");
        }
        if let Some(found) = value_problem(value.as_bytes()) {
            problem(key(), found, "expected visible ASCII, spaces inside");
        }
    }
    if content_type.is_empty() || value_problem(content_type.as_bytes()).is_some() {
        problem(
            "content_type".into(),
            format!("`{}`", content_type.escape_debug()),
            "expected a media type such as application/json",
        );
    }
    let bytes = url.len() + headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum::<usize>();
    if bytes > STATIC_HEAD_BYTES_MAX {
        problem(
            "headers".into(),
            format!("URL and headers take {bytes} bytes"),
            "expected at most 6144 together: receivers refuse longer heads",
        );
    }
    problems
}

/// What keeps `value` from being the value of a header.
pub(super) fn value_problem(value: &[u8]) -> Option<String> {
    if let Some(at) = value.iter().position(|&byte| !matches!(byte, b'\t' | b' '..=b'~')) {
        return Some(format!("byte {at} of the value is 0x{:02x}", value[at]));
    }
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    (is_blank(value.first()) || is_blank(value.last()))
        .then(|| "the value begins or ends with a blank".into())
}

pub(super) fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn problems(url: &str, pairs: &[(&str, &str)]) -> Vec<String> {
        validate(url, &headers(pairs), "application/json").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_plain_destination_has_no_problem() {
        let pairs = [("Authorization", "Bearer a b"), ("X-Tenant", "7"), ("X-Empty", "")];
        assert_eq!(problems("https://[::1]:8443/hook?x=1", &pairs), Vec::<String>::new());
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let found = problems(
            "ftp://user:pw@host/x#y",
            &[("Host", "a"), ("WEBHOOK-ID", "a"), ("a b", "c"), ("X-A", "1\r\nX-B: 2"), ("x-a", " 3")],
        );
        for expected in [
            "the scheme is `ftp`",
            "credentials",
            "fragment",
            "`headers.Host`: it is written by Postrider",
            "`headers.WEBHOOK-ID`: it is written by Postrider",
            "`headers.a b`: the name is not a valid header name",
            "byte 1 of the value is 0x0d",
            "`headers.x-a`: it is there twice",
            "begins or ends with a blank",
        ] {
            assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:#?}");
        }
        assert_eq!(found.len(), 9, "{found:#?}");
        assert!(!found.iter().any(|problem| problem.contains("pw")), "no password is shown");
    }

    #[test]
    fn every_reserved_header_is_refused_in_any_case() {
        for name in RESERVED {
            assert_eq!(problems("http://h/", &[(&name.to_ascii_uppercase(), "x")]).len(), 1, "{name}");
        }
    }

    #[test]
    fn the_static_head_is_bounded() {
        let limit = STATIC_HEAD_BYTES_MAX - "http://h/".len() - 4 - 1;
        assert!(problems("http://h/", &[("x", &"v".repeat(limit))]).is_empty());
        assert_eq!(problems("http://h/", &[("x", &"v".repeat(limit + 1))]).len(), 1);
    }

    #[test]
    fn content_types_cannot_smuggle_headers() {
        for content_type in ["", "a/b\r\nx: y", " a/b"] {
            assert_eq!(validate("http://h/", &[], content_type).len(), 1, "{content_type:?}");
        }
    }
}
