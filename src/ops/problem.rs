use std::fmt;

use actix_web::{
    HttpResponse, ResponseError,
    http::{StatusCode, header::CONTENT_TYPE},
};
use serde_json::json;

/// The media type of RFC 9457.
const PROBLEM: &str = "application/problem+json";

/// Why a request is answered with an error (RFC 9457).
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    detail: String,
    header: Option<(&'static str, &'static str)>,
    /// What the caller may have meant.
    ids: Vec<String>,
}

impl Problem {
    /// `detail` is for the caller: what is wrong and what to do.
    pub(crate) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), header: None, ids: Vec::new() }
    }

    /// A parameter or a body that can't be used.
    pub(crate) fn bad(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// There is no such thing.
    pub(crate) fn missing(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// Its name fits several files.
    pub(crate) fn ambiguous(detail: impl Into<String>, ids: Vec<String>) -> Self {
        Self { ids, ..Self::new(StatusCode::CONFLICT, detail) }
    }

    /// Not by this method.
    pub(crate) fn method(allowed: &'static str) -> Self {
        let problem = Self::new(StatusCode::METHOD_NOT_ALLOWED, allowed);
        problem.with("allow", allowed)
    }

    /// Without a token that is known.
    pub(crate) fn unauthorized(detail: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail).with("www-authenticate", "Bearer")
    }

    /// Not now.
    pub(crate) fn later(status: StatusCode, detail: impl Into<String>) -> Self {
        Self::new(status, detail).with("retry-after", "2")
    }

    fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.header = Some((name, value));
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut body = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or_default(),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if !self.ids.is_empty() {
            body["ids"] = json!(self.ids);
        }
        let mut response = HttpResponse::build(self.status);
        response.insert_header((CONTENT_TYPE, PROBLEM));
        if let Some(header) = self.header {
            response.insert_header(header);
        }
        response.body(body.to_string())
    }
}
