//! What `HttpWebhook` sends, judged by the public Standard Webhooks library of another language.
//! `script/test` makes the venv and sets `POSTRIDER_PYTHON` to its interpreter.

use std::{
    collections::BTreeMap,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use postrider_actors::{
    model::{
        bundle::Bodies,
        ids::{BundleId, FileId, MessageId, RequestId},
        outcome::Outcome,
        time::UnixMs,
    },
    ports::{Webhook as _, WebhookRequest},
};
use postrider_http::webhook::{HttpWebhook, WebhookKeys, WebhookSettings};
use postrider_settings::{Keys as _, Retry};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

const ISSUED: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const UNPADDED: &str = "whsec_c2VjcmV0cw";
const PLAIN: &str = "correct horse battery staple";

/// One request as it came over the wire.
struct Received {
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// Sends `body` as that of `messages`, signed with every secret, `age` ago, and returns what arrived.
async fn deliver(secrets: &[&str], messages: &[MessageId], body: &[u8], age: Duration) -> Received {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap()).parse::<url::Url>().unwrap().into();
    let allow = vec!["127.0.0.1/32".parse().unwrap()];
    let keys = WebhookKeys { url, allow, ..WebhookKeys::declared() };
    let secrets = secrets.iter().map(|secret| (*secret).to_owned().into()).collect();
    let webhook = HttpWebhook::new(WebhookSettings::new(keys, secrets, &Retry::declared())).unwrap();
    let receive = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = Vec::new();
        loop {
            assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "cut off");
            let Some(end) = memchr::memmem::find(&bytes, b"\r\n\r\n") else { continue };
            let head = std::str::from_utf8(&bytes[..end]).unwrap();
            let headers: BTreeMap<_, _> = head
                .lines()
                .skip(1)
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            if bytes.len() - end - 4 == headers["content-length"].parse::<usize>().unwrap() {
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                return Received { body: bytes.split_off(end + 4), headers };
            }
        }
    };
    let at = (SystemTime::now() - age).duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let id = match messages {
        [message] => (*message).into(),
        several => RequestId::Bundle(BundleId::derive(several)),
    };
    let (at, content_type) = (UnixMs(at.as_millis() as u64), "application/json");
    let request = WebhookRequest { id, messages, at, content_type, body, trace: None };
    let (received, outcome) = tokio::join!(receive, webhook.send(request));
    assert_eq!(outcome.outcome, Outcome::Sent { status: 204 });
    received
}

fn case(secret: &str, received: &Received) -> String {
    json!({
        "secret": secret,
        "raw": !secret.starts_with("whsec_"),
        "headers": received.headers,
        "body": STANDARD.encode(&received.body),
    })
    .to_string()
}

/// The library's judgement of each case.
fn judge(cases: &[String]) -> Vec<String> {
    let python = std::env::var_os("POSTRIDER_PYTHON").expect("POSTRIDER_PYTHON names the venv's interpreter");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/signatures/verify.py");
    let mut child = Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("POSTRIDER_PYTHON runs");
    // The script reads a line before it writes one; what it writes fits in the pipe, nobody waits for anybody.
    child.stdin.take().unwrap().write_all(cases.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the script failed");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
#[ignore = "needs script/test's venv (standardwebhooks==1.1.0)"]
async fn signatures_satisfy_the_public_library() {
    let now = Duration::ZERO;
    let body = "{\"id\":\"msg_1\",\"name\":\"Zoë\"}".as_bytes();
    let messages: Vec<_> = (1..=100).map(|row| MessageId { file: FileId([0xa5; 16]), row }).collect();
    let one = &messages[..1];
    let issued = deliver(&[ISSUED], one, body, now).await;
    let rotated = deliver(&[UNPADDED, ISSUED, PLAIN], one, body, now).await;
    let empty = deliver(&[PLAIN], one, b"", now).await;
    let old = deliver(&[ISSUED], one, body, Duration::from_mins(6)).await;
    let mut tampered = deliver(&[ISSUED], one, body, now).await;
    tampered.body[7] ^= 1;
    let mut bodies = Bodies::default();
    for id in &messages {
        let render = |body: &mut Vec<u8>| write!(body, r#"{{"id":"{id}","name":"Zoë"}}"#);
        bodies.push(render).unwrap();
    }
    let bundle = deliver(&[UNPADDED, ISSUED, PLAIN], &messages, bodies.array(0..100), now).await;
    let half = deliver(&[ISSUED], &messages[..50], bodies.array(0..50), now).await;
    assert_ne!(bundle.headers["webhook-id"], half.headers["webhook-id"], "B15");
    let mut shorter = deliver(&[ISSUED], &messages, bodies.array(0..100), now).await;
    shorter.body.clone_from(&half.body);
    let mut renamed = deliver(&[ISSUED], one, body, now).await;
    renamed.headers.insert("webhook-id".into(), "msg_2".into());

    let cases = [
        (case(ISSUED, &issued), "ok"),
        (case(ISSUED, &rotated), "ok"),
        (case(UNPADDED, &rotated), "ok"),
        (case(PLAIN, &rotated), "ok"),
        (case(PLAIN, &empty), "ok"),
        (case(ISSUED, &bundle), "ok"),
        (case(UNPADDED, &bundle), "ok"),
        (case(PLAIN, &bundle), "ok"),
        (case(ISSUED, &half), "ok"),
        (case(ISSUED, &shorter), "refused: No matching signature found"),
        (case(UNPADDED, &issued), "refused: No matching signature found"),
        (case(ISSUED, &old), "refused: Message timestamp too old"),
        (case(ISSUED, &tampered), "refused: No matching signature found"),
        (case(ISSUED, &renamed), "refused: No matching signature found"),
    ];
    let judged = judge(&cases.clone().map(|(case, _)| case));
    assert_eq!(judged, cases.map(|(_, expected)| expected));
}
