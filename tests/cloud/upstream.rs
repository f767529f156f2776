//! The way from a proxy to its emulator.

use std::sync::Mutex;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    HeaderMap, Request, Response,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

/// The largest body either way: DynamoDB takes and gives 16 MB at most.
pub(super) const BODY_BYTES_MAX: usize = 20 << 20;

/// What a test should know of when it fails for no reason of its own.
#[derive(Debug, Default)]
pub(super) struct Problems(Mutex<Vec<String>>);

impl Problems {
    pub(super) fn add(&self, problem: String) {
        eprintln!("fault proxy: {problem}");
        self.0.lock().expect("nobody panics while holding it").push(problem);
    }

    pub(super) fn list(&self) -> Vec<String> {
        self.0.lock().expect("nobody panics while holding it").clone()
    }
}

/// An emulator's address with the connections to it.
#[derive(Clone, Debug)]
pub(super) struct Upstream {
    endpoint: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Upstream {
    pub(super) fn new(endpoint: &str) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), client }
    }

    /// Sends a request as it is, but to this address, and takes in the whole answer.
    pub(super) async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, String> {
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        parts.uri = format!("{}{path}", self.endpoint).parse().map_err(|error| format!("{error}"))?;
        end_to_end(&mut parts.headers);
        let answer = self.client.request(Request::from_parts(parts, Full::new(body))).await;
        let answer = answer.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            format!("{} can't be reached: {error}: {cause}", self.endpoint)
        })?;
        let (mut parts, body) = answer.into_parts();
        end_to_end(&mut parts.headers);
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("{} broke off its answer: {error}", self.endpoint))?;
        Ok(Response::from_parts(parts, body.to_bytes()))
    }
}

/// Leaves out the headers that are about one connection or one encoding of the body.
fn end_to_end(headers: &mut HeaderMap) {
    for name in [CONNECTION, TRANSFER_ENCODING, CONTENT_LENGTH] {
        headers.remove(name);
    }
    // dynoxide's checksum of a body that may be changed by now.
    headers.remove("x-amz-crc32");
}
