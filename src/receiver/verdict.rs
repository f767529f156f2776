//! How a request is answered: by its signature first, then by the dice.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyper::{HeaderMap, StatusCode};
use secrecy::SecretString;

use postrider_http::signature::{self, SignedHead};

/// What a request is answered, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Accepted(StatusCode),
    Failed(StatusCode),
    Unverified,
}

impl Reply {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Accepted(status) | Self::Failed(status) => status,
            Self::Unverified => StatusCode::UNAUTHORIZED,
        }
    }
}

/// Checks signatures.
#[derive(Debug)]
pub(super) struct RequestVerifier(signature::Verifier);

impl RequestVerifier {
    pub(super) fn new(secrets: &[SecretString]) -> anyhow::Result<Self> {
        signature::Verifier::new(secrets)
            .map(Self)
            .map_err(|(index, error)| anyhow::anyhow!("secret {} can't be used: it {error}", index + 1))
    }

    /// Whether one of the secrets has signed the request lately; `None` if there are no secrets.
    pub(super) fn verify(&self, headers: &HeaderMap, body: &[u8], now_s: u64) -> Option<bool> {
        let header = |name: &str| {
            let mut values = headers.get_all(name).iter();
            values.next().filter(|_| values.next().is_none())?.to_str().ok()
        };
        let verify = || self.0.verify(&SignedHead::read(header, now_s)?, body);
        (!self.0.is_empty()).then(|| verify().is_ok())
    }
}

/// Decides which requests fail.
#[derive(Debug)]
pub(super) struct Failures {
    rate: f64,
    status: StatusCode,
    seed: u64,
    drawn: AtomicU64,
}

impl Failures {
    pub(super) fn new(rate: f64, status: StatusCode, seed: u64) -> Self {
        Self { rate, status, seed, drawn: AtomicU64::new(0) }
    }

    /// The next request's answer. `--status 204` asks for a status that is a success.
    pub(super) fn next(&self) -> Reply {
        if self.rate <= 0.0 {
            return Reply::Accepted(StatusCode::OK);
        }
        let number = self.drawn.fetch_add(1, Relaxed);
        // 53 bits: a fraction in 0..1 that a double holds exactly.
        let fraction = (mix(self.seed, number) >> 11) as f64 / (1u64 << 53) as f64;
        match fraction < self.rate {
            true if self.status.is_success() => Reply::Accepted(self.status),
            true => Reply::Failed(self.status),
            false => Reply::Accepted(StatusCode::OK),
        }
    }
}

/// The `number`-th output of splitmix64 seeded with `seed`.
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_http::signature::SigningKey;

    const NOW: u64 = 1_700_000_000;

    fn headers(id: &str, timestamp: &str, signature: &str) -> HeaderMap {
        [("webhook-id", id), ("webhook-timestamp", timestamp), ("webhook-signature", signature)]
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn signed(secret: &str, timestamp: u64) -> HeaderMap {
        let timestamp = timestamp.to_string();
        let mut signature = Vec::new();
        SigningKey::new(&secret.to_owned().into()).unwrap().sign(
            b"msg_1",
            timestamp.as_bytes(),
            b"body",
            &mut signature,
        );
        headers("msg_1", &timestamp, std::str::from_utf8(&signature).unwrap())
    }

    fn verifier(secrets: &[&str]) -> RequestVerifier {
        let secrets: Vec<_> = secrets.iter().map(|secret| (*secret).to_owned().into()).collect();
        RequestVerifier::new(&secrets).unwrap()
    }

    #[test]
    fn any_of_the_secrets_will_do_and_no_other() {
        let verify = |secret| verifier(&["old", "new"]).verify(&signed(secret, NOW), b"body", NOW);
        assert_eq!(verify("old"), Some(true));
        assert_eq!(verify("new"), Some(true));
        assert_eq!(verify("other"), Some(false));
        assert_eq!(verifier(&["old"]).verify(&signed("old", NOW), b"bod", NOW), Some(false));
        assert_eq!(verifier(&[]).verify(&HeaderMap::new(), b"body", NOW), None);
    }

    #[test]
    fn timestamps_may_be_five_minutes_off() {
        let verify = |at: u64| verifier(&["s"]).verify(&signed("s", at), b"body", NOW);
        for (at, expected) in [(NOW - 300, true), (NOW + 300, true), (NOW - 301, false), (NOW + 301, false)] {
            assert_eq!(verify(at), Some(expected), "{at}");
        }
    }

    #[test]
    fn what_is_missing_or_garbled_does_not_verify() {
        for headers in [
            HeaderMap::new(),
            headers("msg_1", "", "v1,AAAA"),
            headers("", "1700000000", "v1,AAAA"),
            headers("msg_1", "1700000000", ""),
            headers("msg_1", "soon", "v1,AAAA"),
            headers("msg_1", "-1", "v1,AAAA"),
        ] {
            assert_eq!(verifier(&["s"]).verify(&headers, b"body", NOW), Some(false), "{headers:?}");
        }
    }

    #[test]
    fn the_same_seed_fails_the_same_requests_at_the_given_rate() {
        let draw = |seed| {
            let failures = Failures::new(0.1, StatusCode::SERVICE_UNAVAILABLE, seed);
            (0..10_000).map(|_| failures.next()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let failed = draw(7).iter().filter(|answer| matches!(answer, Reply::Failed(_))).count();
        assert!((900..1100).contains(&failed), "{failed}");
    }

    #[test]
    fn rates_of_nothing_and_everything_are_exact() {
        for (rate, expected) in [(0.0, StatusCode::OK), (1.0, StatusCode::GONE)] {
            let failures = Failures::new(rate, StatusCode::GONE, 1);
            assert!((0..1000).all(|_| failures.next().status() == expected));
        }
        let no_content = Failures::new(1.0, StatusCode::NO_CONTENT, 1).next();
        assert_eq!(no_content, Reply::Accepted(StatusCode::NO_CONTENT));
    }
}
