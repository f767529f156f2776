//! Authentication of requests with receipts.

use std::fmt;

use actix_web::http::header::{HeaderMap, HeaderValue};
use secrecy::SecretString;

use crate::{
    signature::{SecretError, SignedHead, Unsigned, Verifier},
    token::{NO_TOKEN, Token, bearer},
};

/// What a request must bring: several secrets or tokens at once, so that they can be rotated.
pub struct Credentials(CredentialKind);

enum CredentialKind {
    /// A signature by the Standard Webhooks specification.
    Signature(Verifier),
    /// `Authorization: Bearer …` (RFC 6750).
    Bearer(Vec<Token>),
}

impl fmt::Debug for Credentials {
    /// Nothing of the secrets (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            CredentialKind::Signature(_) => "Credentials(signature)",
            CredentialKind::Bearer(_) => "Credentials(bearer)",
        })
    }
}

/// Secrets or tokens that nothing can be checked with. It never holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// Anybody could hand receipts in.
    #[error("no secret is given (expected at least one)")]
    None,
    /// No key can be made of it.
    #[error("number {} {why}", .index + 1)]
    Secret {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        why: SecretError,
    },
    /// A token that is too short, or that no header could hold.
    #[error("number {} is not a valid token ({NO_TOKEN})", .index + 1)]
    Token {
        /// Which one, from 0.
        index: usize,
    },
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotAllowed {
    /// It brings nothing that could be checked: 401.
    Missing(String),
    /// What it brings is wrong: 403.
    Refused(String),
}

/// A request whose head has passed.
#[derive(Debug)]
pub(super) enum Admitted<'a> {
    /// Its signature is to be checked when its body is there.
    Signed(&'a Verifier, SignedHead<'a>),
    /// Nothing is left to be checked.
    Bearer,
}

impl Credentials {
    /// Requests are signed with one of these secrets.
    pub fn signature(secrets: &[SecretString]) -> Result<Self, CredentialsError> {
        if secrets.is_empty() {
            return Err(CredentialsError::None);
        }
        let verifier =
            Verifier::new(secrets).map_err(|(index, why)| CredentialsError::Secret { index, why })?;
        Ok(Self(CredentialKind::Signature(verifier)))
    }

    /// Requests bring one of these tokens.
    pub fn bearer(tokens: &[SecretString]) -> Result<Self, CredentialsError> {
        if tokens.is_empty() {
            return Err(CredentialsError::None);
        }
        let tokens = tokens
            .iter()
            .enumerate()
            .map(|(index, token)| Token::new(token).ok_or(CredentialsError::Token { index }));
        Ok(Self(CredentialKind::Bearer(tokens.collect::<Result<_, _>>()?)))
    }

    /// What to ask for in a 401's `WWW-Authenticate`, which has to name something (RFC 9110, section 11.6.1).
    pub(super) fn challenge(&self) -> HeaderValue {
        HeaderValue::from_static(match self.0 {
            CredentialKind::Signature(_) => "StandardWebhooks",
            CredentialKind::Bearer(_) => "Bearer",
        })
    }

    /// Looks at a request's head, before anything is spent on its body.
    pub(super) fn admit<'a>(
        &'a self,
        headers: &'a HeaderMap,
        now_s: u64,
    ) -> Result<Admitted<'a>, NotAllowed> {
        match &self.0 {
            CredentialKind::Signature(verifier) => {
                match SignedHead::read(|name| only(headers, name), now_s) {
                    Ok(head) => Ok(Admitted::Signed(verifier, head)),
                    Err(why @ (Unsigned::Header(_) | Unsigned::Timestamp)) => {
                        Err(NotAllowed::Missing(why.to_string()))
                    }
                    Err(why) => Err(NotAllowed::Refused(why.to_string())),
                }
            }
            CredentialKind::Bearer(tokens) => {
                let token = bearer(headers)
                    .ok_or_else(|| NotAllowed::Missing("expected `Authorization: Bearer TOKEN`".into()))?;
                // Every token is compared, so that the time does not reveal which one it was.
                let known = tokens.iter().fold(false, |known, one| one.is(token) | known);
                if known {
                    Ok(Admitted::Bearer)
                } else {
                    Err(NotAllowed::Refused("the token is not known".into()))
                }
            }
        }
    }
}

impl Admitted<'_> {
    /// Looks at the body too.
    pub(super) fn check(&self, body: &[u8]) -> Result<(), NotAllowed> {
        match self {
            Self::Signed(verifier, head) => {
                verifier.verify(head, body).map_err(|why| NotAllowed::Refused(why.to_string()))
            }
            Self::Bearer => Ok(()),
        }
    }

    /// What the sender calls its request, cut short: it is for people.
    pub(super) fn request_id(&self) -> Option<String> {
        match self {
            Self::Signed(_, head) => Some(head.id.chars().take(64).collect()),
            Self::Bearer => None,
        }
    }
}

/// The text of a header that is there once.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name);
    values.next().filter(|_| values.next().is_none())?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::AUTHORIZATION;

    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn secrets(texts: &[&str]) -> Vec<SecretString> {
        texts.iter().map(|text| (*text).to_owned().into()).collect()
    }

    fn admit(credentials: &Credentials, values: &[&str]) -> Result<(), NotAllowed> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        credentials.admit(&headers, 0).map(drop)
    }

    #[test]
    fn f55_only_a_known_token_in_the_one_header_is_let_in() {
        let credentials = Credentials::bearer(&secrets(&["fedcba9876543210", TOKEN])).unwrap();
        for good in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef", "BEARER  fedcba9876543210 "] {
            assert_eq!(admit(&credentials, &[good]), Ok(()), "{good}");
        }
        for wrong in
            ["Bearer 0123456789abcdeg", "Bearer 0123456789abcde", "Bearer 0123456789abcdef0", "Bearer x y"]
        {
            assert!(matches!(admit(&credentials, &[wrong]), Err(NotAllowed::Refused(_))), "{wrong}");
        }
        let good = "Bearer 0123456789abcdef";
        for none in [
            &[][..],
            &["Bearer "],
            &["Bearer"],
            &["Basic MDEyMzQ1Njc4OWFiY2RlZg=="],
            &["0123456789abcdef"],
            &[good, good],
        ] {
            assert!(matches!(admit(&credentials, none), Err(NotAllowed::Missing(_))), "{none:?}");
        }
    }

    #[test]
    fn unusable_tokens_and_secrets_are_refused_by_their_number_and_never_shown() {
        let refused = |tokens: &[&str]| Credentials::bearer(&secrets(tokens)).unwrap_err();
        assert_eq!(refused(&[]), CredentialsError::None);
        for bad in ["", "0123456789abcde", "0123456789 abcdef", "0123456789abcdef\n", "0123456789äöüabcd"]
        {
            assert_eq!(refused(&[TOKEN, bad]), CredentialsError::Token { index: 1 }, "{bad:?}");
        }
        assert_eq!(Credentials::signature(&[]).unwrap_err(), CredentialsError::None);
        let error = Credentials::signature(&secrets(&["a", "whsec_?"])).unwrap_err();
        assert!(error.to_string().starts_with("number 2 starts with `whsec_`"), "{error}");
        assert_eq!(format!("{:?}", Credentials::bearer(&secrets(&[TOKEN])).unwrap()), "Credentials(bearer)");
    }
}
