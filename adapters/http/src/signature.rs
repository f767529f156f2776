//! Signatures by the Standard Webhooks specification, version 1 (HMAC-SHA256), made and verified:
//! <https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>.
//!
//! The signed content is `{webhook-id}.{webhook-timestamp}.{body}`. The header holds one
//! `v1,<base64>` per secret, separated by spaces, so that secrets can be rotated.

use std::{fmt, time::Duration};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_PAD_INDIFFERENT},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};
use sha2::Sha256;

/// A secret that no key can be made of. It never holds the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Nothing there.
    #[error("is empty (expected `whsec_` and base64 of 24 to 64 random bytes)")]
    Empty,
    /// `whsec_` is followed by something else.
    #[error("starts with `whsec_` but what follows is not base64 (expected base64 of 24 to 64 random bytes)")]
    NoBase64,
    /// The prefix of the specification's asymmetric keys.
    #[error("is an asymmetric key (`whsk_`, `whpk_`); only `whsec_` secrets are supported")]
    Asymmetric,
}

/// One secret, made ready: its two key blocks are hashed already and each signature starts from a copy.
#[derive(Clone)]
pub struct SigningKey(Hmac<Sha256>);

impl fmt::Debug for SigningKey {
    /// Nothing of the key (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey")
    }
}

/// Length of one `v1,<base64 of 32 bytes>`.
const SIGNATURE_LEN: usize = 3 + 44;

impl SigningKey {
    /// Makes a key of `whsec_<base64>`, decoded, or of any other text, whose bytes are the key as they
    /// stand. The specification's libraries decode both: see `docs/decisions/0009…`.
    pub fn new(secret: &SecretString) -> Result<Self, SecretError> {
        let text = secret.expose_secret();
        if text.starts_with("whsk_") || text.starts_with("whpk_") {
            return Err(SecretError::Asymmetric);
        }
        let key = Zeroizing::new(match text.strip_prefix("whsec_") {
            Some(encoded) => STANDARD_PAD_INDIFFERENT.decode(encoded).map_err(|_| SecretError::NoBase64)?,
            None => text.as_bytes().to_vec(),
        });
        if key.is_empty() {
            return Err(SecretError::Empty);
        }
        Ok(Self(Hmac::new_from_slice(&key).expect("HMAC takes a key of any length")))
    }

    fn mac(&self, id: &[u8], timestamp: &[u8], body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(id);
        mac.update(b".");
        mac.update(timestamp);
        mac.update(b".");
        mac.update(body);
        mac
    }

    /// Appends `v1,<base64>` for one message.
    pub fn sign(&self, id: &[u8], timestamp: &[u8], body: &[u8], to: &mut Vec<u8>) {
        let tag = self.mac(id, timestamp, body).finalize().into_bytes();
        let mut text = [0; SIGNATURE_LEN];
        text[..3].copy_from_slice(b"v1,");
        STANDARD.encode_slice(tag, &mut text[3..]).expect("32 bytes are 44 characters of base64");
        to.extend_from_slice(&text);
    }

    /// Whether one of the signatures in a `webhook-signature` header is this key's, compared in
    /// constant time. Versions other than `v1` are skipped.
    pub fn verifies(&self, id: &[u8], timestamp: &[u8], body: &[u8], header: &str) -> bool {
        let mac = self.mac(id, timestamp, body);
        header
            .split_ascii_whitespace()
            .take(SIGNATURES_MAX)
            .filter_map(|signature| STANDARD.decode(signature.strip_prefix("v1,")?).ok())
            .any(|tag| mac.clone().verify_slice(&tag).is_ok())
    }
}

/// How many signatures of one header are looked at: far more than any rotation has, and no work for
/// whoever sends thousands.
const SIGNATURES_MAX: usize = 32;

/// How far a timestamp may be off, both ways: the tolerance of the specification's libraries.
pub const TIMESTAMP_TOLERANCE: Duration = Duration::from_mins(5);

/// Why a request counts as unsigned. It never holds what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsigned {
    /// A header is missing, repeated, or not text.
    #[error("`{0}` is missing, repeated or not ASCII text")]
    Header(&'static str),
    /// The timestamp is not a number.
    #[error("`webhook-timestamp` is not a number of seconds since 1970")]
    Timestamp,
    /// It was signed too long ago, or will be.
    #[error("`webhook-timestamp` is off by {off_s} s, more than the {} s allowed", TIMESTAMP_TOLERANCE.as_secs())]
    Stale {
        /// By how many seconds.
        off_s: u64,
    },
    /// No secret fits.
    #[error("no signature in `webhook-signature` is by a secret that is known here")]
    NoMatch,
}

/// What a request's head says of its signature. Its body is still to be checked.
#[derive(Clone, Copy, Debug)]
pub struct SignedHead<'a> {
    /// `webhook-id`.
    pub id: &'a str,
    timestamp: &'a str,
    signatures: &'a str,
}

impl<'a> SignedHead<'a> {
    /// Reads the three headers, and refuses what is stale at `now_s`: before anything is spent on a body. `header` gives the
    /// text of a header that is there once.
    pub fn read(header: impl Fn(&str) -> Option<&'a str>, now_s: u64) -> Result<Self, Unsigned> {
        let get = |name: &'static str| header(name).ok_or(Unsigned::Header(name));
        let (id, timestamp) = (get("webhook-id")?, get("webhook-timestamp")?);
        let signatures = get("webhook-signature")?;
        let signed_s: u64 = timestamp.parse().map_err(|_| Unsigned::Timestamp)?;
        let off_s = signed_s.abs_diff(now_s);
        if off_s > TIMESTAMP_TOLERANCE.as_secs() {
            return Err(Unsigned::Stale { off_s });
        }
        Ok(Self { id, timestamp, signatures })
    }
}

/// The secrets that may have signed what comes in: several at once, so that they can be rotated.
#[derive(Clone, Debug)]
pub struct Verifier {
    keys: Vec<SigningKey>,
}

impl Verifier {
    /// Makes the secrets ready. The error names the first unusable one by its index.
    pub fn new(secrets: &[SecretString]) -> Result<Self, (usize, SecretError)> {
        let keys = secrets.iter().enumerate();
        let keys = keys.map(|(index, secret)| SigningKey::new(secret).map_err(|error| (index, error)));
        Ok(Self { keys: keys.collect::<Result<_, _>>()? })
    }

    /// Whether it has no secret, so that nothing can be verified.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether one of the secrets has signed this head with this body.
    pub fn verify(&self, head: &SignedHead<'_>, body: &[u8]) -> Result<(), Unsigned> {
        let is_signed = |key: &SigningKey| {
            key.verifies(head.id.as_bytes(), head.timestamp.as_bytes(), body, head.signatures)
        };
        if self.keys.iter().any(is_signed) { Ok(()) } else { Err(Unsigned::NoMatch) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: &str) -> SigningKey {
        SigningKey::new(&secret.to_owned().into()).unwrap()
    }

    fn signed(secret: &str, id: &str, timestamp: &str, body: &str) -> String {
        let mut header = Vec::new();
        key(secret).sign(id.as_bytes(), timestamp.as_bytes(), body.as_bytes(), &mut header);
        String::from_utf8(header).unwrap()
    }

    /// The example of the specification's own libraries.
    #[test]
    fn the_specification_s_example_is_reproduced() {
        let header = signed(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "1614265330",
            r#"{"test": 2432232314}"#,
        );
        assert_eq!(header, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    /// RFC 4231, test case 2: a raw secret's bytes are the key.
    #[test]
    fn a_secret_without_the_prefix_is_used_unchanged() {
        use base64::Engine as _;
        let mac = key("Jefe").0.clone().chain_update(b"what do ya want for nothing?").finalize();
        assert_eq!(STANDARD.encode(mac.into_bytes()), "W9zBRr9gdU5qBCQmCJV1x1oAPwidJzmDnexYuWTsOEM=");
    }

    #[test]
    fn any_changed_part_and_any_other_key_is_refused() {
        let header = signed("whsec_c2VjcmV0", "msg_1", "17", "body");
        let verifies = |secret: &str, id: &str, timestamp: &str, body: &str| {
            key(secret).verifies(id.as_bytes(), timestamp.as_bytes(), body.as_bytes(), &header)
        };
        assert!(verifies("whsec_c2VjcmV0", "msg_1", "17", "body"));
        assert!(verifies("secret", "msg_1", "17", "body"), "the same bytes, not encoded");
        assert!(
            signed("whsec_c2VjcmV0cw", "m", "1", "") == signed("whsec_c2VjcmV0cw==", "m", "1", ""),
            "padding"
        );
        assert!(!verifies("whsec_b3RoZXI=", "msg_1", "17", "body"));
        assert!(!verifies("whsec_c2VjcmV0", "msg_2", "17", "body"));
        assert!(!verifies("whsec_c2VjcmV0", "msg_1", "18", "body"));
        assert!(!verifies("whsec_c2VjcmV0", "msg_1", "17", "bodY"));
    }

    #[test]
    fn one_of_several_signatures_is_enough_and_junk_is_passed_over() {
        let good = signed("b", "m", "1", "x");
        let verifies = |header: &str| key("b").verifies(b"m", b"1", b"x", header);
        assert!(verifies(&format!("v1a,AAAA junk v1,??? {} {good}", signed("a", "m", "1", "x"))));
        assert!(!verifies(&format!("v2{}", &good[2..])), "the version counts");
        assert!(!verifies(&good[..good.len() - 5]), "a cut tag does not verify");
        assert!(!verifies("v1,"));
        assert!(!verifies(""));
    }

    #[test]
    fn f55_a_head_counts_if_it_is_whole_unambiguous_and_fresh() {
        let head = |pairs: &[(&'static str, &'static str)]| {
            let header = |name: &str| {
                let mut values = pairs.iter().filter(|(other, _)| *other == name);
                values.next().map(|(_, value)| *value).filter(|_| values.next().is_none())
            };
            SignedHead::read(header, 1_000).map(|head| head.id.to_owned())
        };
        let (id, at, by) =
            (("webhook-id", "m"), ("webhook-timestamp", "1000"), ("webhook-signature", "v1,x"));
        assert_eq!(head(&[id, at, by]), Ok("m".to_owned()));
        assert_eq!(head(&[at, by]), Err(Unsigned::Header("webhook-id")));
        assert_eq!(head(&[id, at]), Err(Unsigned::Header("webhook-signature")));
        assert_eq!(head(&[id, at, by, ("webhook-id", "n")]), Err(Unsigned::Header("webhook-id")));
        assert_eq!(head(&[id, ("webhook-timestamp", "1e3"), by]), Err(Unsigned::Timestamp));
        for (at, expected) in [("700", true), ("699", false), ("1300", true), ("1301", false)] {
            assert_eq!(head(&[id, ("webhook-timestamp", at), by]).is_ok(), expected, "{at}");
        }
    }

    #[test]
    fn any_of_several_secrets_may_have_signed() {
        let verifier = Verifier::new(&["new".to_owned().into(), "old".to_owned().into()]).unwrap();
        let by = |secret: &str| signed(secret, "m", "1", "x");
        let verify =
            |signatures: &str| verifier.verify(&SignedHead { id: "m", timestamp: "1", signatures }, b"x");
        assert_eq!(verify(&by("old")), Ok(()));
        assert_eq!(verify(&by("new")), Ok(()));
        assert_eq!(verify(&by("other")), Err(Unsigned::NoMatch));
        let none = Verifier::new(&[]).unwrap();
        assert!(none.is_empty());
        let head = SignedHead { id: "m", timestamp: "1", signatures: &by("old") };
        assert_eq!(none.verify(&head, b"x"), Err(Unsigned::NoMatch));
        assert_eq!(Verifier::new(&["a".to_owned().into(), String::new().into()]).unwrap_err().0, 1);
    }

    #[test]
    fn unusable_secrets_are_refused_without_being_shown() {
        for (secret, expected) in [
            ("", SecretError::Empty),
            ("whsec_", SecretError::Empty),
            ("whsec_not base64!", SecretError::NoBase64),
            ("whsk_abc", SecretError::Asymmetric),
        ] {
            let error = SigningKey::new(&secret.to_owned().into()).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.to_string().contains("not base64!"));
        }
        assert_eq!(format!("{:?}", key("hunter2")), "SigningKey");
    }
}
