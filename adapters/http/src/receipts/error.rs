//! Why a request with receipts is refused.

use actix_web::http::{
    StatusCode,
    header::{HeaderName, HeaderValue, RETRY_AFTER},
};

/// Answered with 503, in seconds.
const RETRY_AFTER_S: &str = "10";

/// Why a request is answered with anything but 200.
#[derive(Debug)]
pub(super) struct RequestError {
    pub(super) status: StatusCode,
    /// For the sender and for the log: nothing of the body, and no secret.
    pub(super) why: String,
    pub(super) header: Option<(HeaderName, HeaderValue)>,
}

impl RequestError {
    pub(super) fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self { status, why: why.into(), header: None }
    }

    pub(super) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.header = Some((name, value));
        self
    }

    /// The store can't take anything now.
    pub(super) fn later() -> Self {
        Self::again("receipts can't be stored now; send them again")
    }

    pub(super) fn again(why: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, why)
            .with(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S))
    }
}
