//! The receiver's own id in an answer's body, however the body is framed and whatever becomes of it.

use super::*;

fn webhook(server: &Server, pointer: &str) -> HttpWebhook {
    let provider_id = Some(pointer.parse().unwrap());
    let timeout = Duration::from_millis(300);
    server.webhook_with(|keys| (keys.timeout, keys.provider_id) = (timeout, provider_id))
}

/// The outcome, the id, and whether the connection was kept.
async fn exchange(server: &Server) -> (Outcome, Option<String>, bool) {
    let webhook = webhook(server, "/message/id");
    let id = MessageId { file: FileId([7; 16]), row: 1 };
    let at = UnixMs(1_700_000_000_000);
    let answer = webhook.send(WebhookRequest::of_one(&id, at, "text/plain", b"x")).await;
    (answer.outcome, answer.provider_id.map(String::from), webhook.idle.len() == 1)
}

/// Answers with these pieces, each in a packet of its own, and then closes if asked to.
async fn answering(pieces: Vec<String>, close: bool) -> Server {
    Server::start(move |mut stream, _| {
        let pieces = pieces.clone();
        async move {
            read_request(&mut stream).await;
            for piece in pieces {
                stream.write_all(piece.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if !close {
                let _ = stream.read(&mut [0]).await;
            }
        }
    })
    .await
}

const BODY: &str = r#"{"message":{"id":"SM-ü-17"},"x":1}"#;

#[tokio::test]
async fn it_is_found_in_a_body_of_any_framing() {
    let length = format!("HTTP/1.1 202 Accepted\r\ncontent-length: {}\r\n\r\n", BODY.len());
    let (front, back) = BODY.split_at(9);
    let chunked = [
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
        format!("{:x}\r\n{front}", front.len()),
        format!("\r\n{:x};x=y\r\n{back}\r\n0\r\nt: 1\r\n\r\n", back.len()),
    ];
    let closed = format!("HTTP/1.0 200 OK\r\n\r\n{BODY}");
    for (status, pieces, close, kept) in [
        (202, vec![format!("{length}{BODY}")], false, true),
        (202, vec![length.clone(), front.to_owned(), back.to_owned()], false, true),
        (200, chunked.to_vec(), false, true),
        (200, vec![chunked.concat()], false, true),
        (200, vec![closed], true, false),
        // Bytes that nobody asked for: the answer counts, the connection is closed.
        (202, vec![format!("{length}{BODY}HTTP/1.1 500 x\r\n\r\n")], false, false),
    ] {
        let server = answering(pieces.clone(), close).await;
        let expected = (Outcome::Sent { status }, Some("SM-ü-17".to_owned()), kept);
        assert_eq!(exchange(&server).await, expected, "{pieces:?}");
    }
}

#[tokio::test]
async fn a_message_without_one_is_sent_all_the_same() {
    let length =
        |length: usize, body: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
    let whole = |body: &str| length(body.len(), body);
    let long = format!("{{\"message\":{{\"id\":\"{}\"}}}}", "x".repeat(201));
    for (answer, close, kept) in [
        (whole("ok"), false, true),
        (whole(""), false, true),
        (whole(&long), false, true),
        (whole(r#"{"message":{"id":"a\u0000"}}"#), false, true),
        ("HTTP/1.1 204 No Content\r\n\r\n".to_owned(), false, true),
        // Cut off, too long, framed wrongly, or never coming (decision 0008).
        (length(BODY.len() + 5, BODY), true, false),
        (length(BODY.len() + 5, BODY), false, false),
        (length(1 << 20, BODY), false, false),
        (
            format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{BODY}X", BODY.len()),
            false,
            false,
        ),
    ] {
        let server = answering(vec![answer.clone()], close).await;
        let (outcome, id, is_kept) = exchange(&server).await;
        assert!(matches!(outcome, Outcome::Sent { .. }), "{answer}");
        assert_eq!((id, is_kept), (None, kept), "{answer}");
    }
}

#[tokio::test]
async fn answers_other_than_2xx_have_none() {
    for status in [302, 404, 503] {
        let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len());
        let server = answering(vec![answer], false).await;
        let (outcome, id, kept) = exchange(&server).await;
        assert!(!matches!(outcome, Outcome::Sent { .. }));
        assert_eq!((id, kept), (None, true));
    }
}

#[tokio::test]
async fn what_an_answer_lacks_is_counted() {
    let server = Server::answering(OK).await;
    let webhook = webhook(&server, "/id");
    for _ in 0..3 {
        assert_eq!(send(&webhook).await, SENT);
    }
    assert_eq!(webhook.ids_missing.load(Relaxed), 3);
    assert_eq!(server.connections(), 1);
}
