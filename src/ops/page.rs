//! The operator's page: files of `page/` that lie in the binary. They hold no data and need no token; what they show
//! comes from `/api/v1`.
//!
//! F56: whatever a file name or an answer carries, the page runs no script and loads nothing but its own files.

use std::io::Write as _;

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
        HeaderMap, HeaderName, IF_NONE_MATCH, REFERRER_POLICY, VARY,
    },
    web::{Path, ServiceConfig},
};
use flate2::{Compression, write::GzEncoder};
use rust_embed::{EmbeddedFile, RustEmbed};

use super::{problem::Problem, readable};

#[derive(RustEmbed)]
#[folder = "page/"]
struct Files;

/// Its own files and its own interface, nothing else, and in no frame. uPlot and Preact set styles by script, which
/// `style-src` has nothing against; an inline style or script of somebody else's making does nothing.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// No window of another origin gets hold of this one.
const OPENER_POLICY: (HeaderName, &str) =
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
const RESOURCE_POLICY: (HeaderName, &str) =
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin");

/// `/` and what it loads.
pub(super) fn routes(config: &mut ServiceConfig) {
    config.service(readable("/", index)).service(readable("/page/{path:.+}", file));
}

async fn index(request: HttpRequest) -> Result<HttpResponse, Problem> {
    answer(&request, "index.html")
}

async fn file(request: HttpRequest, path: Path<String>) -> Result<HttpResponse, Problem> {
    answer(&request, &path)
}

fn answer(request: &HttpRequest, path: &str) -> Result<HttpResponse, Problem> {
    let found = Files::get(path).and_then(|file| Some((file, media_type(path)?)));
    let Some((EmbeddedFile { data, metadata }, media_type)) = found else {
        return Err(Problem::missing("the page has no such file"));
    };
    // Half of it tells two binaries' files apart.
    let hash = metadata.sha256_hash();
    let half = hash.first_chunk().map_or(0, |half| u128::from_be_bytes(*half));
    let tag = format!("\"{half:032x}\"");
    let mut response = HttpResponse::Ok();
    response
        .insert_header((CONTENT_TYPE, media_type))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((REFERRER_POLICY, "no-referrer"))
        .insert_header(OPENER_POLICY)
        .insert_header(RESOURCE_POLICY)
        // Asked for again each time, and answered by 304: a new binary's page is never mixed with an old one's.
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header((VARY, "accept-encoding"))
        .insert_header((ETAG, tag.as_str()));
    let headers = request.headers();
    if has(headers, &IF_NONE_MATCH, &tag) {
        return Ok(response.status(actix_web::http::StatusCode::NOT_MODIFIED).finish());
    }
    if has(headers, &ACCEPT_ENCODING, "gzip") {
        return Ok(response.insert_header((CONTENT_ENCODING, "gzip")).body(packed(&data)));
    }
    Ok(response.body(data.into_owned()))
}

/// What may be asked for; licences and notes lie beside it for those who read the source.
fn media_type(path: &str) -> Option<&'static str> {
    match path.rsplit_once('.')?.1 {
        "html" => Some("text/html; charset=utf-8"),
        "js" => Some("text/javascript; charset=utf-8"),
        "css" => Some("text/css; charset=utf-8"),
        "svg" => Some("image/svg+xml"),
        _ => None,
    }
}

/// Whether a header lists `value`.
fn has(headers: &HeaderMap, name: &HeaderName, value: &str) -> bool {
    let listed = |header: &str| {
        header.split(',').any(|one| one.split(';').next().is_some_and(|one| one.trim() == value))
    };
    headers.get_all(name).any(|header| header.to_str().is_ok_and(listed))
}

/// The largest file takes 2 ms, and a browser asks once: not worth a cache.
fn packed(data: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::best());
    // Writing to a Vec can't fail.
    let _ = packer.write_all(data);
    packer.finish().unwrap_or_default()
}
