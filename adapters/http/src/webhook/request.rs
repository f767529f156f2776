//! Writes requests of HTTP/1.1 and HTTP/2. What does not change from message to message is prebuilt per destination; the
//! rest is appended to the connection's own buffer, so that a request costs no allocation and one write.

use hyper::{
    Method, Request,
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT},
    http,
};
use postrider_actors::{model::ids::RequestId, ports::WebhookRequest};

use super::{
    settings::{WebhookSettings, host_header},
    syntax::value_problem,
};
use crate::signature::{SecretError, SigningKey};

/// A destination's requests: everything but the message.
pub(super) struct RequestTemplate {
    /// Request line, host, user agent and static headers; each line ends with CRLF.
    head: Vec<u8>,
    keys: Vec<SigningKey>,
}

/// The content type is not a valid header value. It is stored with the batch, so it is checked at each use.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadContentType;

/// The same for HTTP/2.
pub(super) struct Http2Template {
    head: Request<()>,
    keys: Vec<SigningKey>,
}

const USER_AGENT_NAME: &str = concat!("postrider/", env!("CARGO_PKG_VERSION"));

impl Http2Template {
    /// The error says what can't be sent.
    pub(super) fn new(settings: &WebhookSettings) -> Result<Self, String> {
        let url = &settings.keys.url;
        let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
        let mut head = Request::builder()
            .method(Method::POST)
            .uri(format!("{}://{}{path}", url.scheme(), host_header(url)))
            .header(USER_AGENT, USER_AGENT_NAME);
        for (name, value) in &settings.headers {
            let mut value = HeaderValue::from_str(value).map_err(|error| error.to_string())?;
            // It may be a credential: no table of compressed headers holds it (RFC 7541, section 7.1.3).
            value.set_sensitive(true);
            head = head.header(name, value);
        }
        let keys = settings.secrets.iter().map(SigningKey::new).collect::<Result<_, _>>();
        let head = head.body(()).map_err(|error: http::Error| error.to_string())?;
        Ok(Self { head, keys: keys.map_err(|error| error.to_string())? })
    }

    /// The head of one request.
    pub(super) fn head(&self, request: &WebhookRequest<'_>) -> Result<Request<()>, BadContentType> {
        if value_problem(request.content_type.as_bytes()).is_some() {
            return Err(BadContentType);
        }
        let mut id = [0; ID_BYTES];
        let id = write_id(request.id, &mut id);
        let mut digits = itoa::Buffer::new();
        let timestamp = digits.format(request.at.0 / 1000).as_bytes();
        let mut signatures = Vec::new();
        for key in &self.keys {
            if !signatures.is_empty() {
                signatures.push(b' ');
            }
            key.sign(id, timestamp, request.body, &mut signatures);
        }
        let mut head = self.head.clone();
        let headers = head.headers_mut();
        let mut put = |name: HeaderName, value: &[u8], repeats: bool| {
            let mut value = HeaderValue::from_bytes(value).map_err(|_| BadContentType)?;
            // What is another in each request would only push out of the table what is not.
            value.set_sensitive(!repeats);
            headers.insert(name, value);
            Ok(())
        };
        put(CONTENT_TYPE, request.content_type.as_bytes(), true)?;
        put(WEBHOOK_ID, id, false)?;
        put(WEBHOOK_TIMESTAMP, timestamp, false)?;
        if !signatures.is_empty() {
            put(WEBHOOK_SIGNATURE, &signatures, false)?;
        }
        if let Some(trace) = request.trace {
            put(TRACEPARENT, trace.as_bytes(), true)?; // the same for all of a batch
        }
        let mut digits = itoa::Buffer::new();
        put(CONTENT_LENGTH, digits.format(request.body.len()).as_bytes(), false)?;
        Ok(head)
    }
}

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
/// W3C Trace Context, section 3.2.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// `msg_`, 32 hex digits, `_`, up to 20 digits of a row; a bundle's is shorter.
const ID_BYTES: usize = 4 + 32 + 1 + 20;

impl RequestTemplate {
    pub(super) fn new(settings: &WebhookSettings) -> Result<Self, SecretError> {
        let url = &settings.keys.url;
        let mut head = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\nuser-agent: {USER_AGENT_NAME}\r\n",
            &url[url::Position::BeforePath..url::Position::AfterQuery],
            host_header(url),
        );
        for (name, value) in &settings.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        let keys = settings.secrets.iter().map(SigningKey::new).collect::<Result<_, _>>()?;
        Ok(Self { head: head.into_bytes(), keys })
    }

    /// Replaces what is in `out` by one whole request.
    pub(super) fn write(
        &self,
        request: &WebhookRequest<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), BadContentType> {
        if value_problem(request.content_type.as_bytes()).is_some() {
            return Err(BadContentType);
        }
        let mut id = [0; ID_BYTES];
        let id = write_id(request.id, &mut id);
        let mut digits = itoa::Buffer::new();
        let timestamp = digits.format(request.at.0 / 1000).as_bytes();

        out.clear();
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"content-type: ");
        out.extend_from_slice(request.content_type.as_bytes());
        out.extend_from_slice(b"\r\nwebhook-id: ");
        out.extend_from_slice(id);
        out.extend_from_slice(b"\r\nwebhook-timestamp: ");
        out.extend_from_slice(timestamp);
        for (index, key) in self.keys.iter().enumerate() {
            out.extend_from_slice(if index == 0 { b"\r\nwebhook-signature: " } else { b" " });
            key.sign(id, timestamp, request.body, out);
        }
        if let Some(trace) = request.trace {
            out.extend_from_slice(b"\r\ntraceparent: ");
            out.extend_from_slice(trace.as_bytes());
        }
        let mut digits = itoa::Buffer::new();
        out.extend_from_slice(b"\r\ncontent-length: ");
        out.extend_from_slice(digits.format(request.body.len()).as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
        out.extend_from_slice(request.body);
        Ok(())
    }
}

/// Writes an id as its `Display` does, without the formatting machinery: it is on every message's path.
fn write_id(id: RequestId, to: &mut [u8; ID_BYTES]) -> &[u8] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let (prefix, digest, row) = match id {
        RequestId::Message(id) => (&b"msg_"[..], id.file.0, Some(id.row)),
        RequestId::Bundle(id) => (&b"bundle_"[..], id.0, None),
    };
    to[..prefix.len()].copy_from_slice(prefix);
    let mut len = prefix.len();
    for byte in digest {
        to[len] = HEX[usize::from(byte >> 4)];
        to[len + 1] = HEX[usize::from(byte & 15)];
        len += 2;
    }
    if let Some(row) = row {
        to[len] = b'_';
        let mut digits = itoa::Buffer::new();
        let row = digits.format(row).as_bytes();
        to[len + 1..len + 1 + row.len()].copy_from_slice(row);
        len += 1 + row.len();
    }
    &to[..len]
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        ids::{BundleId, FileId, MessageId},
        time::UnixMs,
        trace::{SpanId, TraceId, TraceParent},
    };
    use postrider_settings::{Keys as _, Retry};
    use proptest::prelude::*;

    use super::*;
    use crate::webhook::WebhookKeys;

    fn settings(url: &str, secrets: &[&str]) -> WebhookSettings {
        let url = url.parse::<url::Url>().unwrap().into();
        let keys = WebhookKeys { url, ..WebhookKeys::declared() };
        let secrets = secrets.iter().map(|secret| (*secret).to_owned().into()).collect();
        WebhookSettings {
            headers: vec![("x-tenant".into(), "7".into())],
            ..WebhookSettings::new(keys, secrets, &Retry::declared())
        }
    }

    fn written(url: &str, secrets: &[&str]) -> String {
        let template = RequestTemplate::new(&settings(url, secrets)).unwrap();
        let id = MessageId { file: FileId([0xab; 16]), row: 17 };
        let at = UnixMs(1_700_000_000_999);
        let request = WebhookRequest::of_one(&id, at, "application/json", b"{\"a\":1}");
        let mut out = b"what an earlier request left".to_vec();
        template.write(&request, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_request_is_written_whole() {
        let id = format!("msg_{}_17", "ab".repeat(16));
        let mut signature = Vec::new();
        SigningKey::new(&"s".to_owned().into()).unwrap().sign(
            id.as_bytes(),
            b"1700000000",
            b"{\"a\":1}",
            &mut signature,
        );
        assert_eq!(
            written("http://example.com:8080/a%20b?c=d", &["s"]),
            format!(
                "POST /a%20b?c=d HTTP/1.1\r\nhost: example.com:8080\r\nuser-agent: postrider/{}\r\nx-tenant: 7\r\n\
                 content-type: application/json\r\nwebhook-id: {id}\r\nwebhook-timestamp: 1700000000\r\n\
                 webhook-signature: {}\r\ncontent-length: 7\r\n\r\n{{\"a\":1}}",
                env!("CARGO_PKG_VERSION"),
                String::from_utf8(signature).unwrap(),
            )
        );
    }

    #[test]
    fn both_protocols_say_the_same() {
        let settings = settings("https://example.com:8080/a%20b?c=d", &["a", "b"]);
        let id = MessageId { file: FileId([0xab; 16]), row: 17 };
        let at = UnixMs(1_700_000_000_999);
        let trace = TraceParent::new(TraceId::of(id.file), SpanId([0xcd; 8]), true);
        let request = WebhookRequest::of_one(&id, at, "application/json", b"{\"a\":1}");
        let request = WebhookRequest { trace: Some(&trace), ..request };
        let mut text = Vec::new();
        RequestTemplate::new(&settings).unwrap().write(&request, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let head = Http2Template::new(&settings).unwrap().head(&request).unwrap();
        assert_eq!(head.uri(), "https://example.com:8080/a%20b?c=d");
        let mut expected: Vec<_> = text.lines().skip(1).take_while(|line| !line.is_empty()).collect();
        expected.retain(|line| !line.starts_with("host: ")); // it is in the URI
        let mut lines: Vec<_> = head
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        lines.sort();
        expected.sort_unstable();
        assert_eq!(lines, expected);
        let of_trace = format!("traceparent: 00-{}-{}-01", "ab".repeat(16), "cd".repeat(8));
        assert!(lines.contains(&of_trace), "{lines:?}");
        assert!(head.headers()["x-tenant"].is_sensitive());
        let smuggling = WebhookRequest { content_type: "a/b\r\nx: y", ..request };
        assert_eq!(Http2Template::new(&settings).unwrap().head(&smuggling).err(), Some(BadContentType));
    }

    #[test]
    fn each_secret_signs_and_none_leaves_the_header_out() {
        let lines = |secrets: &[&str]| {
            let text = written("http://h", secrets);
            let line = text.lines().find(|line| line.starts_with("webhook-signature")).map(str::to_owned);
            line.map(|line| line.matches("v1,").count())
        };
        assert_eq!(lines(&["a", "b", "c"]), Some(3));
        assert_eq!(lines(&[]), None);
    }

    #[test]
    fn the_host_header_has_the_port_only_where_it_is_not_the_scheme_s() {
        assert!(written("https://h:443/", &[]).contains("\r\nhost: h\r\n"));
        assert!(written("https://[::1]:444/", &[]).contains("\r\nhost: [::1]:444\r\n"));
        assert!(written("http://bücher.example/", &[]).contains("\r\nhost: xn--bcher-kva.example\r\n"));
    }

    #[test]
    fn a_stored_content_type_cannot_smuggle_a_header() {
        let template = RequestTemplate::new(&settings("http://h", &[])).unwrap();
        let id = MessageId { file: FileId([0; 16]), row: 1 };
        let request = WebhookRequest::of_one(&id, UnixMs(0), "a/b\r\nx: y", b"");
        assert_eq!(template.write(&request, &mut Vec::new()), Err(BadContentType));
    }

    proptest! {
        #[test]
        fn ids_are_written_as_they_print(file: [u8; 16], row: u64) {
            for id in [MessageId { file: FileId(file), row }.into(), RequestId::Bundle(BundleId(file))] {
                let mut buffer = [0; ID_BYTES];
                let printed = id.to_string();
                prop_assert_eq!(write_id(id, &mut buffer), printed.as_bytes());
            }
        }
    }
}
