//! The operator's page: files of `page/` that lie in the binary. They hold no data and need no token; what they show
//! comes from `/api/v1`.
//!
//! F56: whatever a file name or an answer carries, the page runs no script and loads nothing but its own files.

use std::{borrow::Cow, io::Write as _};

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

use super::{problem::Problem, resources::readable};

#[derive(RustEmbed)]
#[folder = "page/"]
struct Files;

/// Its own files and its own interface, nothing else, and in no frame. Preact sets styles by script, which `style-src` has
/// nothing against; an inline style or script of somebody else's making does nothing.
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
    let data = if media_type == JAVASCRIPT { without_comments(data) } else { data };
    let headers = request.headers();
    if has(headers, &IF_NONE_MATCH, &tag) {
        return Ok(response.status(actix_web::http::StatusCode::NOT_MODIFIED).finish());
    }
    if has(headers, &ACCEPT_ENCODING, "gzip") {
        return Ok(response.insert_header((CONTENT_ENCODING, "gzip")).body(packed(&data)));
    }
    Ok(response.body(data.into_owned()))
}

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// What may be asked for; licences and notes lie beside it for those who read the source.
fn media_type(path: &str) -> Option<&'static str> {
    match path.rsplit_once('.')?.1 {
        "html" => Some("text/html; charset=utf-8"),
        "js" => Some(JAVASCRIPT),
        "css" => Some("text/css; charset=utf-8"),
        "svg" => Some("image/svg+xml"),
        _ => None,
    }
}

/// Modules without their lines of comment, which weigh a tenth of the page. The lines stay, empty, so that a browser names the
/// right ones.
fn without_comments(module: Cow<'static, [u8]>) -> Cow<'static, [u8]> {
    let Ok(text) = str::from_utf8(&module) else { return module };
    let kept = |line| if is_comment(line) { "" } else { line };
    text.split('\n').map(kept).collect::<Vec<_>>().join("\n").into_bytes().into()
}

/// A line of text in a template that begins so would be lost; a test looks for one.
fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each line of a module begins: in code, or in a string or template.
    fn begins_in_code(module: &str) -> Vec<bool> {
        // What is open: a template, or a brace; code of a template is within `${`.
        let (mut open, mut lines) = (Vec::new(), vec![true]);
        let mut chars = module.chars().peekable();
        while let Some(c) = chars.next() {
            let in_template = open.last() == Some(&'`');
            match (c, chars.peek()) {
                ('\n', _) => lines.push(!in_template),
                ('\\', _) => {
                    chars.next();
                }
                ('`', _) if in_template => {
                    open.pop();
                }
                ('$', Some('{')) if in_template => {
                    chars.next();
                    open.push('{');
                }
                _ if in_template => {}
                ('`' | '{', _) => open.push(c),
                ('}', _) => assert_eq!(open.pop(), Some('{')),
                ('/', Some('/')) => while chars.next_if(|c| *c != '\n').is_some() {},
                ('/', Some('*')) => {
                    let mut before = ' ';
                    while let Some(c) = chars.next_if(|c| (before, *c) != ('*', '/')) {
                        assert_ne!(c, '\n', "a comment of several lines");
                        before = c;
                    }
                    chars.next();
                }
                ('\'' | '"', _) => {
                    while let Some(inner) = chars.next_if(|inner| *inner != c) {
                        assert_ne!(inner, '\n', "a string of several lines");
                        if inner == '\\' {
                            chars.next();
                        }
                    }
                    chars.next();
                }
                _ => {}
            }
        }
        assert!(open.is_empty(), "{open:?}");
        lines
    }

    #[test]
    fn only_comments_are_left_out() {
        let template = "a(`\n${b('`', { c }) // d\n}\n// e\n`);\n// f `\n/* ' */ g();";
        assert_eq!(begins_in_code(template), [true, false, true, false, false, true, true]);
        let mut comments = 0;
        for path in
            Files::iter().filter(|path| media_type(path) == Some(JAVASCRIPT) && !path.starts_with("vendor/"))
        {
            let module = Files::get(&path).unwrap().data;
            let text = str::from_utf8(&module).unwrap();
            for (line, in_code) in text.split('\n').zip(begins_in_code(text)) {
                comments += usize::from(is_comment(line));
                assert!(in_code || !is_comment(line), "{path}: text that looks like a comment: {line}");
            }
            assert_eq!(
                without_comments(module.clone()).split(|b| *b == b'\n').count(),
                text.split('\n').count()
            );
        }
        assert!(comments > 50, "{comments}");
        let library = Files::get("vendor/preact.js").unwrap().data;
        assert_eq!(without_comments(library.clone()), library);
    }
}
