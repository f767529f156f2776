//! Tokens that a request brings in its `Authorization` header (RFC 6750).

use std::fmt;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;

/// A shorter token could be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// What a text must be to be a token.
pub const NO_TOKEN: &str = "expected 16 or more visible ASCII characters without blanks";

/// The one token of the one `Authorization` header.
pub fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(AUTHORIZATION);
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

/// A token as its digest under a key that only this process knows: digests are compared in constant time, and
/// how far two of them agree says nothing about how far the tokens do.
pub struct Token {
    key: Hmac<Sha256>,
    digest: Vec<u8>,
}

impl fmt::Debug for Token {
    /// Nothing of it (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// `None`: it is too short, or no header could hold it.
    pub fn new(token: &SecretString) -> Option<Self> {
        let token = token.expose_secret().as_bytes();
        if token.len() < TOKEN_BYTES_MIN || !token.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let key: [u8; 32] = rand::random();
        let key = Hmac::<Sha256>::new_from_slice(&key).expect("HMAC takes a key of any length");
        let digest = key.clone().chain_update(token).finalize().into_bytes().to_vec();
        Some(Self { key, digest })
    }

    /// Whether `token` is this one.
    pub fn is(&self, token: &[u8]) -> bool {
        self.key.clone().chain_update(token).verify_slice(&self.digest).is_ok()
    }
}
