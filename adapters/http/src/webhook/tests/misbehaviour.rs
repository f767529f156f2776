//! Receivers that hang, lie, flood and die (F34–F40).

use tokio::time::sleep;

use super::*;

const SOON: Duration = Duration::from_millis(200);

/// A script that reads one request, does what `act` does, and then holds the connection open until
/// the client closes it.
async fn once<F, S>(act: F) -> Server
where
    F: Fn(TcpStream) -> S + Send + Copy + 'static,
    S: Future<Output = TcpStream> + Send + 'static,
{
    Server::start(move |mut stream, _| async move {
        read_request(&mut stream).await;
        let mut stream = act(stream).await;
        let _ = stream.read(&mut [0]).await;
    })
    .await
}

async fn saying(answer: &'static [u8]) -> Server {
    once(move |mut stream| async move {
        let _ = stream.write_all(answer).await;
        stream
    })
    .await
}

/// One attempt with a short timeout; it must not take much longer.
async fn attempt(server: &Server) -> Outcome {
    let webhook = server.webhook_with(|keys| keys.timeout = SOON);
    let started = Instant::now();
    let outcome = send(&webhook).await;
    assert!(started.elapsed() < SOON * 4, "{:?}", started.elapsed());
    assert_eq!(webhook.idle.len(), 0, "the connection was kept");
    outcome
}

#[tokio::test]
async fn f34_a_receiver_that_hangs_costs_the_timeout_and_no_more() {
    assert_eq!(attempt(&saying(b"").await).await, retryable(Reason::Timeout));
    assert_eq!(attempt(&saying(b"HTTP/1.1 200").await).await, retryable(Reason::Timeout));
    assert_eq!(attempt(&saying(b"HTTP/1.1 100 Continue\r\n\r\n").await).await, retryable(Reason::Timeout));
}

#[tokio::test]
async fn f34_a_status_that_came_counts_though_the_rest_never_comes() {
    assert_eq!(attempt(&saying(b"HTTP/1.1 200 OK\r\n").await).await, SENT);
    assert_eq!(attempt(&saying(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await).await, SENT);
    let failed =
        saying(b"HTTP/1.1 503 No\r\nretry-after: 7\r\ntransfer-encoding: chunked\r\n\r\n5\r\n").await;
    let retry_after = Some(Duration::from_secs(7));
    let expected = Outcome::Retryable { status: 503, reason: Reason::Status, retry_after };
    assert_eq!(attempt(&failed).await, expected);
}

/// What is kept of an answer for the operator.
async fn text(answer: &'static [u8]) -> Option<String> {
    let webhook = saying(answer).await.webhook_with(|keys| keys.timeout = SOON);
    let id = MessageId { file: FileId([7; 16]), row: 1 };
    let request = WebhookRequest::of_one(&id, UnixMs(1_700_000_000_000), "application/json", b"{}");
    webhook.send(request).await.text.map(Into::into)
}

#[tokio::test]
async fn of_an_answer_that_is_not_2xx_the_first_line_is_kept() {
    let down = b"HTTP/1.1 503 No\r\ncontent-length: 20\r\n\r\n\ndown for\t repair\nno";
    assert_eq!(text(down).await.as_deref(), Some("down for\t repair"));
    assert_eq!(text(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n").await, None);
    assert_eq!(text(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await, None);
    let chunks = b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n3\r\ndow\r\n1\r\nn\r\n0\r\n\r\n";
    assert_eq!(text(chunks).await.as_deref(), Some("down"));
    // However long the body is, no more of it is kept than its first line may have.
    let mut long = b"HTTP/1.1 500 No\r\ncontent-length: 60000\r\n\r\n".to_vec();
    long.resize(long.len() + 60_000, b'x');
    let kept = text(Box::leak(long.into_boxed_slice())).await.expect("it says something");
    assert_eq!(kept.len(), postrider_actors::model::standing::ANSWER_BYTES_MAX);
}

#[tokio::test]
async fn f35_a_peer_that_never_reads_runs_into_the_timeout() {
    let server = Server::start(|stream, _| async move {
        sleep(Duration::from_mins(1)).await;
        drop(stream);
    })
    .await;
    let webhook = server.webhook_with(|keys| keys.timeout = SOON);
    let outcome = send_body(&webhook, &vec![b'x'; 16 << 20]).await;
    assert_eq!(outcome, retryable(Reason::Timeout));
}

#[tokio::test]
async fn f36_a_body_that_trickles_holds_the_slot_until_the_timeout() {
    let server = once(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n").await;
        while stream.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
        stream
    })
    .await;
    assert_eq!(attempt(&server).await, SENT);
}

#[tokio::test]
async fn f36_a_head_that_trickles_holds_the_slot_until_the_timeout() {
    let server = once(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await;
        while stream.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(10)).await;
        }
        stream
    })
    .await;
    assert_eq!(attempt(&server).await, SENT);
}

#[tokio::test]
async fn f36_an_endless_body_is_cut_at_its_limit() {
    for head in ["", "transfer-encoding: chunked\r\n"] {
        let (took, mut taken) = tokio::sync::mpsc::unbounded_channel();
        let server = Server::start(move |mut stream, _| {
            let took = took.clone();
            async move {
                read_request(&mut stream).await.unwrap();
                let answer = format!("HTTP/1.1 200 OK\r\n{head}\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                let piece = if head.is_empty() {
                    "x".repeat(1024)
                } else {
                    format!("400\r\n{}\r\n", "x".repeat(1024))
                };
                let mut written = 0;
                while stream.write_all(piece.as_bytes()).await.is_ok() {
                    written += piece.len();
                }
                took.send(written).unwrap();
            }
        })
        .await;
        let started = Instant::now();
        assert_eq!(send(&server.webhook()).await, SENT);
        assert!(started.elapsed() < Duration::from_secs(5), "read on until the timeout");
        // What both kernels buffer is beyond anybody's limit.
        let written = taken.recv().await.unwrap();
        assert!(written < 16 << 20, "{written}");
    }
}

#[tokio::test]
async fn f36_heads_are_bounded_whatever_they_are_made_of() {
    let none = retryable(Reason::Protocol);
    for (piece, expected) in [("x: y\r\n", SENT), ("x", SENT), ("HTTP/1.1 100 Continue\r\n\r\n", none)] {
        let server = Server::start(move |mut stream, _| async move {
            read_request(&mut stream).await.unwrap();
            let start = if piece.starts_with("HTTP") { "" } else { "HTTP/1.1 200 OK\r\nx: " };
            let flood = format!("{start}{}", piece.repeat((10 << 20) / piece.len()));
            let _ = stream.write_all(flood.as_bytes()).await;
        })
        .await;
        let webhook = server.webhook();
        assert_eq!(send(&webhook).await, expected, "{piece:?}");
        assert_eq!(webhook.idle.len(), 0, "the connection was kept");
    }
}

#[tokio::test]
async fn f36_the_largest_head_that_is_allowed_is_read() {
    let answer = |bytes: usize| {
        let frame = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: \r\n\r\n";
        let answer = frame.replace("x: ", &format!("x: {}", "y".repeat(bytes - frame.len())));
        assert_eq!(answer.len(), bytes);
        answer
    };
    for (bytes, kept) in [(16 * 1024, 1), (16 * 1024 + 1, 0)] {
        let answer: &'static str = answer(bytes).leak();
        let webhook = Server::answering(answer.as_bytes()).await.webhook();
        assert_eq!(send(&webhook).await, SENT, "{bytes}");
        assert_eq!(webhook.idle.len(), kept, "{bytes}");
    }
}

#[tokio::test]
async fn f37_a_reset_after_the_request_is_unknown() {
    let server = Server::start(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.set_zero_linger().unwrap();
    })
    .await;
    assert_eq!(attempt(&server).await, retryable(Reason::Reset));
    let in_the_head = Server::start(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 2").await.unwrap();
    })
    .await;
    assert_eq!(attempt(&in_the_head).await, retryable(Reason::Reset));
    let behind_the_status = Server::start(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-le").await.unwrap();
    })
    .await;
    assert_eq!(attempt(&behind_the_status).await, SENT);
}

#[tokio::test]
async fn f37_a_reset_in_the_body_does_not_take_the_status_back() {
    let server = Server::start(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await.unwrap();
        sleep(Duration::from_millis(50)).await;
        stream.set_zero_linger().unwrap();
    })
    .await;
    assert_eq!(attempt(&server).await, SENT);
}

#[tokio::test]
async fn f38_retry_after_is_a_delay_from_the_attempt() {
    // The attempts are made at 1,700,000,000 s: Tue, 14 Nov 2023 22:13:20 GMT.
    for (value, seconds) in [
        ("30", Some(30)),
        ("Tue, 14 Nov 2023 22:14:20 GMT", Some(60)),
        ("Mon, 14 Nov 2033 22:14:20 GMT", Some(3600)),
        ("315360000", Some(3600)),
        ("Tue, 14 Nov 2023 22:13:19 GMT", None),
        ("-30", None),
        ("whenever", None),
    ] {
        let answer: &'static str =
            format!("HTTP/1.1 429 Slow\r\nRetry-After: {value}\r\ncontent-length: 0\r\n\r\n").leak();
        let outcome = send(&Server::answering(answer.as_bytes()).await.webhook()).await;
        let retry_after = seconds.map(Duration::from_secs);
        assert_eq!(
            outcome,
            Outcome::Retryable { status: 429, reason: Reason::Status, retry_after },
            "{value}"
        );
    }
}

#[tokio::test]
async fn f39_a_redirect_is_not_followed() {
    let elsewhere = Server::answering(OK).await;
    for status in [301, 302, 307, 308] {
        let answer: &'static str = format!(
            "HTTP/1.1 {status} Moved\r\nlocation: http://{}/\r\ncontent-length: 0\r\n\r\n",
            elsewhere.address
        )
        .leak();
        let outcome = send(&Server::answering(answer.as_bytes()).await.webhook()).await;
        assert_eq!(outcome, Outcome::Permanent { status, reason: Reason::Status });
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test]
async fn f40_a_gone_destination_is_gone() {
    let server = Server::answering(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(send(&server.webhook()).await, Outcome::Gone);
}

#[tokio::test]
async fn what_is_not_http_is_a_protocol_error() {
    for garbage in
        [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"\x15\x03\x03\x00\x02\x02\x46", b"HTTP/2.0 200 OK\r\n\r\n"]
    {
        let outcome = attempt(&saying(garbage).await).await;
        assert_eq!(outcome, retryable(Reason::Protocol), "{}", garbage.escape_ascii());
    }
}

#[tokio::test]
async fn an_answer_counts_though_the_request_was_not_read_to_its_end() {
    let server = Server::start(|mut stream, _| async move {
        let mut some = [0; 1024];
        stream.read_exact(&mut some).await.unwrap();
        stream
            .write_all(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            .await
            .unwrap();
        sleep(Duration::from_mins(1)).await;
    })
    .await;
    let outcome = send_body(&server.webhook(), &vec![b'x'; 16 << 20]).await;
    assert_eq!(outcome, Outcome::Permanent { status: 413, reason: Reason::Status });
}

#[tokio::test]
async fn unreachable_receivers_have_distinct_reasons() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refused = HttpWebhook::new(settings(&format!("http://{closed}/"))).unwrap();
    assert_eq!(send(&refused).await, retryable(Reason::Connect));
    let unknown = HttpWebhook::new(settings("http://nobody.invalid/")).unwrap();
    assert_eq!(send(&unknown).await, retryable(Reason::Dns));
}
