//! Who collects traces.

use secrecy::ExposeSecret as _;

use super::{assert_each_is_named, check};

#[test]
fn each_mistake_about_traces_is_named() {
    assert_each_is_named(&[
        ("[tracing]\nendpoint = \"127.0.0.1:4318\"", &["tracing.endpoint", "http:// or https://"]),
        ("[tracing]\nendpoint = \"http://u:p@h:4318\"", &["tracing.endpoint", "without user name"]),
        (
            "[tracing]\nendpoint = \"http://h:4318/v1/traces/\"",
            &["tracing.endpoint", "without /v1/traces, which is appended"],
        ),
        ("[tracing]\nsample_percent = 101", &["tracing.sample_percent", "found 101", "0 to 100"]),
        ("[tracing.headers]\nauthorization = \"Bearer x\"", &["tracing.headers.authorization", "env:NAME"]),
        ("[tracing.headers]\nhost = \"x\"", &["tracing.headers.host", "written by Postrider"]),
        ("[tracing]\nendpont = \"http://h\"", &["tracing.endpont", "did you mean `endpoint`?"]),
    ]);
}

#[test]
fn headers_of_the_collector_are_read_and_never_shown() {
    let text = "[destinations.a]\nurl=\"http://h\"\nsecrets=[]\n[tracing]\nendpoint=\"http://h:4318\"\n\
                headers.X-Api-Key=\"env:KEY\"\nheaders.x-tenant=\"7\"";
    let resolve = |value: &str| {
        let value = value.to_owned();
        check(text).unwrap().resolve_with(move |name| (name == "KEY").then(|| value.clone().into()))
    };
    let resolved = resolve("s3cr3t").unwrap();
    let headers = resolved.tracing_headers.iter();
    let headers: Vec<_> = headers.map(|(name, value)| (&**name, value.expose_secret())).collect();
    assert_eq!(headers, [("x-api-key", "s3cr3t"), ("x-tenant", "7")]);
    assert!(!format!("{resolved:?}").contains("s3cr3t"));
    let smuggling = resolve("a\nb: c").unwrap_err().list;
    assert_eq!(smuggling[0].key, "tracing.headers.x-api-key");
}
