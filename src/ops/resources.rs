//! What is at a path: to be read, or to be ordered.

use actix_web::{
    FromRequest, Handler, HttpRequest, HttpResponse, Resource, Responder,
    guard::fn_guard,
    http::{
        Method, StatusCode,
        header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING},
    },
    web,
};

use super::problem::Problem;

/// What is at `path`, and can only be read, without a body.
pub(crate) fn readable<F, A>(path: &str, handler: F) -> Resource
where
    F: Handler<A>,
    A: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let without_body = || fn_guard(|context| !has_body(context.head().headers()));
    let refuse = |request: HttpRequest| async move {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        Err::<HttpResponse, _>(if is_read {
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "without a body, please")
        } else {
            Problem::method("GET, HEAD")
        })
    };
    web::resource(path.to_owned())
        .route(web::get().guard(without_body()).to(handler.clone()))
        .route(web::head().guard(without_body()).to(handler))
        .default_service(web::to(refuse))
}

fn has_body(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH);
    length.is_some_and(|length| length.as_bytes() != b"0") || headers.contains_key(TRANSFER_ENCODING)
}

/// What is at `path`, and can only be ordered.
pub(crate) fn order<F, A>(path: &str, handler: F) -> Resource
where
    F: Handler<A>,
    A: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let other_method = || async { Err::<HttpResponse, _>(Problem::method("POST")) };
    web::resource(path.to_owned()).route(web::post().to(handler)).default_service(web::to(other_method))
}
