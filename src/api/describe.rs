//! The description of the interface (`OpenAPI` 3.1). What is special to a route stands where it is handled; what all have in
//! common is added here: who may ask, how errors look, and that whatever is described of an answer is always there. A
//! schema-driven tester (`tests/daemon/openapi.rs`) holds the daemon to it.

use std::sync::LazyLock;

use actix_web::{HttpResponse, http::header::CONTENT_TYPE};
use serde_json::{Map, Value, json};
use utoipa::OpenApi;

use super::{LIMIT, LIMIT_MAX, answers, dead, events, files, messages, orders, receipts};

/// The routes and the shapes, as they say of themselves.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Postrider",
        description = "What a running daemon shows, and the orders it takes. See docs/operations.md."
    ),
    paths(
        answers::session,
        answers::overview,
        files::list,
        files::one,
        files::rejects,
        answers::destinations,
        answers::destination,
        answers::series,
        dead::list,
        dead::groups,
        messages::find,
        receipts::overview,
        receipts::parked,
        receipts::orphans,
        receipts::rejects,
        answers::actors,
        answers::alarms,
        answers::audit,
        events::stream,
        openapi,
        orders::pause,
        orders::resume,
        orders::rate,
        orders::concurrency,
        orders::hold,
        orders::release,
        orders::cancel,
        orders::priority,
        dead::redrive,
        orders::reload,
    )
)]
struct Routes;

/// The description of this interface, which is this document
#[utoipa::path(get, path = "/api/v1/openapi.json", responses((status = 200, description = "", body = serde_json::Value)))]
pub(super) async fn openapi() -> HttpResponse {
    static TEXT: LazyLock<String> = LazyLock::new(|| document().to_string());
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "application/json")).body(TEXT.as_str())
}

/// Everything that can go wrong with any question …
const ERRORS: [(u16, &str); 9] = [
    (400, "A parameter, the body or the head can't be used"),
    (401, "No token, or one that is not known"),
    (403, "A page of another origin asks, or the token may only look"),
    (413, "The body is too long, or there is one where none is expected"),
    (421, "The server is not known by this name"),
    (429, "Too many questions at once"),
    (431, "The head is too long"),
    (503, "The store can't be read now"),
    (504, "It took too long"),
];
/// … and with an order beside that.
const ERRORS_OF_ORDERS: [(u16, &str); 2] =
    [(408, "The body did not come in time"), (415, "It is not application/json")];

/// The whole of it.
pub(super) fn document() -> Value {
    let mut document = serde_json::to_value(Routes::openapi()).expect("it is made of strings and numbers");
    let paths = object(&mut document["paths"]);
    for (path, item) in paths.iter_mut() {
        for (method, operation) in object(item).iter_mut() {
            complete(path, method, operation);
        }
    }
    let schemas = object(&mut document["components"]["schemas"]);
    for (name, schema) in schemas.iter_mut() {
        // What is asked for may be left out.
        if !name.ends_with("Order") {
            require_all(schema);
        }
    }
    schemas.insert("Problem".to_owned(), problem());
    document["components"]["securitySchemes"] = json!({ "token": { "type": "http", "scheme": "bearer" } });
    document["security"] = json!([{ "token": [] }]);
    document
}

fn object(value: &mut Value) -> &mut Map<String, Value> {
    value.as_object_mut().expect("OpenAPI has an object there")
}

fn complete(path: &str, method: &str, operation: &mut Value) {
    let parts: Vec<_> = path.trim_start_matches("/api/v1/").split('/').collect();
    let words = parts.iter().map(|part| part.trim_matches(['{', '}']).replace('.', "-"));
    operation["operationId"] = format!("{method}-{}", words.collect::<Vec<_>>().join("-")).into();
    operation["tags"] = json!([parts[0]]);
    for parameter in operation.get_mut("parameters").and_then(Value::as_array_mut).into_iter().flatten() {
        complete_parameter(parameter, path);
    }
    let responses = object(&mut operation["responses"]);
    let mut add = |is_so: bool, status: &str, why: &str| {
        if is_so {
            responses.entry(status).or_insert_with(|| json!({ "description": why }));
        }
    };
    add(path.contains('{'), "404", "There is no such thing");
    add(path.contains("{file}"), "409", "Several files have that name");
    for (status, why) in ERRORS.iter().chain(ERRORS_OF_ORDERS.iter().filter(|_| method == "post")) {
        responses.entry(status.to_string()).or_insert_with(|| json!({ "description": why }));
    }
    for (status, response) in responses.iter_mut() {
        if status == "200" {
            response["description"] = "As asked".into();
            if let Some(stream) = response["content"].get_mut("text/event-stream") {
                stream["schema"] = event();
            }
            continue;
        }
        response["content"] = json!({
            "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } }
        });
        let header = match status.as_str() {
            "401" => "WWW-Authenticate",
            "429" | "503" | "504" => "Retry-After",
            _ => continue,
        };
        response["headers"] = json!({ header: { "schema": { "type": "string" } } });
    }
}

/// A parameter is in the path or in the query, and in neither of them `null`.
fn complete_parameter(parameter: &mut Value, path: &str) {
    let name = parameter["name"].as_str().unwrap_or_default().to_owned();
    let is_in_path = path.contains(&format!("{{{name}}}"));
    parameter["in"] = if is_in_path { "path" } else { "query" }.into();
    parameter["required"] = is_in_path.into();
    let schema = &mut parameter["schema"];
    if let Some(one) = schema["oneOf"].get(0).cloned() {
        *schema = one;
    }
    if let Some(one) = schema["type"].get(0).cloned() {
        schema["type"] = one;
    }
    if name == "limit" {
        *schema = json!({ "type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT });
    }
}

/// What a shape has is always there: what is not known is `null`.
fn require_all(schema: &mut Value) {
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        schema["required"] = properties.keys().cloned().collect();
    }
    for of in ["allOf", "oneOf"] {
        schema.get_mut(of).and_then(Value::as_array_mut).into_iter().flatten().for_each(require_all);
    }
}

/// An event of a stream. What its `data` is of depends on its name: `events::stream` says it.
fn event() -> Value {
    json!({
        "type": "object",
        "properties": {
            "event": { "enum": ["overview", "files", "destinations", "sample", "alarm"] },
            "id": { "type": "string" },
            "data": { "type": "string", "contentMediaType": "application/json" },
        },
    })
}

/// An error (RFC 9457), as `ops::problem::Problem` is written.
fn problem() -> Value {
    json!({
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": { "type": "string" },
            "title": { "type": "string" },
            "status": { "type": "integer" },
            "detail": { "type": "string", "description": "What is wrong, and what to do" },
            "ids": { "type": "array", "items": { "type": "string" }, "description": "The files that may be meant" },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn operations_have_names_of_their_own_and_parameters_a_place() {
        let document = document();
        let operations: Vec<_> = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|item| item.as_object().unwrap().values())
            .collect();
        let names: BTreeSet<_> = operations.iter().map(|one| one["operationId"].as_str().unwrap()).collect();
        assert_eq!(names.len(), operations.len());
        assert!(names.contains("get-files-file-rejects") && names.contains("post-dead-redrive"), "{names:?}");
        let dead = document.pointer("/paths/~1api~1v1~1dead/get/parameters").unwrap().as_array().unwrap();
        let reason = dead.iter().find(|one| one["name"] == "reason").unwrap();
        assert_eq!((&reason["in"], &reason["required"]), (&json!("query"), &json!(false)));
        assert_eq!(reason["schema"]["enum"][0], "status");
        let status = dead.iter().find(|one| one["name"] == "status").unwrap();
        assert_eq!(status["schema"]["type"], "integer");
    }

    #[test]
    fn errors_are_problems_and_answers_are_whole() {
        let document = document();
        let one = document.pointer("/paths/~1api~1v1~1files~1{file}/get/responses").unwrap();
        for status in ["400", "401", "404", "409", "503"] {
            assert!(one[status]["content"]["application/problem+json"].is_object(), "{status}: {one}");
        }
        assert_eq!(one["409"]["description"], "Several files have that name");
        let required = &document["components"]["schemas"]["Dead"]["required"];
        assert!(required.as_array().unwrap().contains(&json!("status")), "{required}");
        let order = &document["components"]["schemas"]["RateOrder"]["required"];
        assert_eq!(order, &json!(["rate_per_s"]));
        assert_eq!(document["components"]["schemas"]["FileOrder"].get("required"), None);
    }
}
