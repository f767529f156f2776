//! HTTP/2: against a real server, and against one that writes frames by hand.

use futures_util::future::join_all;
use h2::{
    RecvStream,
    server::{Builder, Connection, SendResponse},
};
use hyper::{Request, Response};
use rustls::ALL_VERSIONS;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::{tls::Authority, *};

/// A server on TLS that counts connections and requests.
struct Server2 {
    authority: Authority,
    server: Server,
    requests: Arc<AtomicUsize>,
}

impl Server2 {
    /// Gives each connection that negotiated one of `protocols`, with its number from 0, to a script.
    async fn accept<F, S>(protocols: &[&[u8]], script: F) -> Self
    where
        F: Fn(TlsStream<TcpStream>, usize, Arc<AtomicUsize>) -> S + Clone + Send + Sync + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let authority = Authority::new();
        let acceptor = authority.acceptor("localhost", |_| {}, false, ALL_VERSIONS, protocols);
        let requests = Arc::<AtomicUsize>::default();
        let count = requests.clone();
        let server = Server::start(move |stream, number| {
            let (acceptor, script, count) = (acceptor.clone(), script.clone(), count.clone());
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    script(stream, number, count).await;
                }
            }
        })
        .await;
        Self { authority, server, requests }
    }

    /// Answers each request by `answer`, which is given its number from 0, all at once.
    async fn answering<F, S>(builder: Builder, answer: F) -> Self
    where
        F: Fn(Request<RecvStream>, SendResponse<Bytes>, usize) -> S + Clone + Send + Sync + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        Self::accept(&[b"h2"], move |stream, _, count| {
            let (builder, answer) = (builder.clone(), answer.clone());
            async move {
                let mut incoming: Connection<_, Bytes> = builder.handshake(stream).await.unwrap();
                while let Some(Ok((request, respond))) = incoming.accept().await {
                    tokio::spawn(answer(request, respond, count.fetch_add(1, SeqCst)));
                }
            }
        })
        .await
    }

    /// Reads frames until the first request is there, and then does as the script says, which is given the stream's id.
    async fn raw<F, S>(settings: &'static [u8], script: F) -> Self
    where
        F: Fn(TlsStream<TcpStream>, u32, usize) -> S + Clone + Send + Sync + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        Self::accept(&[b"h2"], move |mut stream, number, count| {
            let script = script.clone();
            async move {
                stream.write_all(&frame(SETTINGS, 0, 0, settings)).await.unwrap();
                stream.read_exact(&mut [0; 24]).await.unwrap(); // RFC 9113, section 3.4
                while let Some((kind, id)) = read_frame(&mut stream).await {
                    if kind == HEADERS {
                        count.fetch_add(1, SeqCst);
                        script(stream, id, number).await;
                        return;
                    }
                }
            }
        })
        .await
    }

    fn settings(&self) -> WebhookSettings {
        self.authority.settings("localhost", &self.server)
    }

    fn webhook(&self) -> HttpWebhook {
        HttpWebhook::new(self.settings()).unwrap()
    }

    fn webhook_with(&self, change: impl FnOnce(&mut WebhookKeys)) -> HttpWebhook {
        let mut settings = self.settings();
        change(&mut settings.keys);
        HttpWebhook::new(settings).unwrap()
    }

    /// Connections and requests.
    fn counts(&self) -> (usize, usize) {
        (self.server.connections(), self.requests.load(SeqCst))
    }
}

// RFC 9113, section 6: the frames' types.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
/// `END_STREAM` and `END_HEADERS`.
const WHOLE: u8 = 5;
/// RFC 7541, appendix A: `:status: 200`.
const STATUS_200: &[u8] = &[0x88];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The type and stream of the next frame.
async fn read_frame(stream: &mut TlsStream<TcpStream>) -> Option<(u8, u32)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [_, a, b, c, kind, _, rest @ ..] =
        [0, head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7], head[8]];
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some((kind, u32::from_be_bytes(rest)))
}

fn goaway(last: u32, reason: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat())
}

/// Reads on until the client goes away.
async fn swallow(mut stream: TlsStream<TcpStream>) {
    while read_frame(&mut stream).await.is_some() {}
}

/// Reads the request, and says 200 and `ok`.
async fn ok(request: Request<RecvStream>, respond: SendResponse<Bytes>) {
    read_all(request).await;
    say(respond, Response::new(()), "ok");
}

async fn read_all(request: Request<RecvStream>) -> Vec<u8> {
    let mut body = request.into_body();
    let mut all = Vec::new();
    while let Some(Ok(part)) = body.data().await {
        body.flow_control().release_capacity(part.len()).unwrap();
        all.extend_from_slice(&part);
    }
    all
}

fn say(mut respond: SendResponse<Bytes>, head: Response<()>, body: &'static str) {
    // It fails where the client has gone.
    if let Ok(mut stream) = respond.send_response(head, false) {
        let _ = stream.send_data(body.into(), true);
    }
}

async fn send_at_once(webhook: &HttpWebhook, count: usize) -> Vec<Outcome> {
    join_all((0..count).map(|_| send(webhook))).await
}

#[tokio::test]
async fn one_connection_carries_many_requests_at_once() {
    const MANY: usize = 60;
    let (open, most) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let (in_flight, peak) = (open, most.clone());
    let server = Server2::answering(Builder::new(), move |request, respond, _| {
        let (open, most) = (in_flight.clone(), peak.clone());
        async move {
            most.fetch_max(open.fetch_add(1, SeqCst) + 1, SeqCst);
            assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/hook"));
            assert!(request.headers()["webhook-signature"].to_str().unwrap().starts_with("v1,"));
            assert_eq!(request.headers()["content-length"], "7");
            assert_eq!(read_all(request).await, b"{\"a\":1}");
            sleep(Duration::from_millis(100)).await;
            open.fetch_sub(1, SeqCst);
            say(respond, Response::new(()), "ok");
        }
    })
    .await;
    let webhook = server.webhook();
    for round in 1..=3 {
        assert_eq!(send_at_once(&webhook, MANY).await, vec![SENT; MANY]);
        assert_eq!(server.counts(), (1, round * MANY));
    }
    assert_eq!(most.load(SeqCst), MANY, "all at once");
}

#[tokio::test]
async fn a_receiver_without_http_2_gets_http_1_1() {
    for (protocols, http2) in [(&[&b"http/1.1"[..]][..], true), (&[b"h2", b"http/1.1"], false), (&[], true)] {
        let server = Server2::accept(protocols, |mut stream, _, count| async move {
            while read_request(&mut stream).await.is_some() {
                count.fetch_add(1, SeqCst);
                stream.write_all(OK).await.unwrap();
            }
        })
        .await;
        let webhook = server.webhook_with(|keys| keys.http2 = http2);
        assert_eq!(send_at_once(&webhook, 10).await, vec![SENT; 10]);
        assert_eq!(send(&webhook).await, SENT);
        assert_eq!(server.counts(), (10, 11));
    }
}

#[tokio::test]
async fn no_connection_carries_more_than_its_receiver_allows() {
    let mut builder = Builder::new();
    builder.max_concurrent_streams(4);
    let server = Server2::answering(builder, |request, respond, _| async move {
        sleep(Duration::from_millis(50)).await;
        ok(request, respond).await;
    })
    .await;
    let webhook = server.webhook();
    // Until the receiver has said so, nobody knows.
    assert_eq!(send(&webhook).await, SENT);
    for _ in 0..3 {
        assert_eq!(send_at_once(&webhook, 20).await, vec![SENT; 20]);
    }
    let (connections, requests) = server.counts();
    assert_eq!(requests, 61, "none was refused and repeated");
    assert!((5..=20).contains(&connections), "{connections}");
}

#[tokio::test]
async fn a_receiver_that_allows_no_request_gets_none() {
    // SETTINGS_MAX_CONCURRENT_STREAMS = 0.
    let server = Server2::raw(&[0, 3, 0, 0, 0, 0], |stream, _, _| swallow(stream)).await;
    let webhook = server.webhook_with(|keys| keys.timeout = Duration::from_millis(500));
    let outcomes = send_at_once(&webhook, 3).await;
    assert_eq!(outcomes, vec![retryable(Reason::Timeout); 3]);
    let (connections, requests) = server.counts();
    assert!(connections <= 3 && requests <= 1, "{connections} connections, {requests} requests");
}

#[tokio::test]
async fn what_is_refused_is_repeated_and_not_without_end() {
    let server = Server2::answering(Builder::new(), |request, mut respond, number| async move {
        match number {
            0 | 1 | 3.. => respond.send_reset(h2::Reason::REFUSED_STREAM),
            _ => ok(request, respond).await,
        }
    })
    .await;
    let webhook = server.webhook();
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(server.counts(), (1, 3));
    assert_eq!(send(&webhook).await, retryable(Reason::Connect));
    assert_eq!(server.counts(), (1, 3 + 1 + REPEATS_MAX));
}

#[tokio::test]
async fn i5_any_other_reset_is_not_repeated() {
    for (reset, reason) in [
        (h2::Reason::INTERNAL_ERROR, Reason::Reset),
        (h2::Reason::CANCEL, Reason::Reset),
        (h2::Reason::NO_ERROR, Reason::Reset),
        (h2::Reason::HTTP_1_1_REQUIRED, Reason::Reset),
    ] {
        let server = Server2::answering(Builder::new(), move |_, mut respond, _| async move {
            respond.send_reset(reset);
        })
        .await;
        let webhook = server.webhook();
        assert_eq!(send(&webhook).await, retryable(reason), "{reset:?}");
        assert_eq!(send(&webhook).await, retryable(reason), "{reset:?}");
        assert_eq!(server.counts(), (1, 2), "{reset:?}");
    }
}

#[tokio::test]
async fn what_comes_after_the_last_stream_of_goaway_is_sent_on_another_connection() {
    let server = Server2::raw(&[], |mut stream, id, number| async move {
        let answer = if number == 0 { goaway(0, 0) } else { frame(HEADERS, WHOLE, id, STATUS_200) };
        stream.write_all(&answer).await.unwrap();
        swallow(stream).await;
    })
    .await;
    let webhook = server.webhook();
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(server.counts(), (2, 2));
}

#[tokio::test]
async fn i5_what_goaway_may_have_let_through_is_not_sent_again() {
    for reason in [0, 2] {
        let server = Server2::raw(&[], move |mut stream, id, _| async move {
            stream.write_all(&goaway(id, reason)).await.unwrap();
            let _ = stream.shutdown().await;
        })
        .await;
        assert_eq!(send(&server.webhook()).await, retryable(Reason::Reset));
        assert_eq!(server.counts(), (1, 1));
    }
}

#[tokio::test]
async fn a_receiver_that_ends_its_connections_after_some_requests_loses_none_and_gets_none_twice() {
    let server = Server2::accept(&[b"h2"], |stream, _, count| async move {
        let mut incoming: Connection<_, Bytes> = h2::server::handshake(stream).await.unwrap();
        let mut left = 10;
        while let Some(Ok((request, respond))) = incoming.accept().await {
            count.fetch_add(1, SeqCst);
            tokio::spawn(ok(request, respond));
            left -= 1;
            if left == 0 {
                incoming.graceful_shutdown();
            }
        }
    })
    .await;
    let webhook = server.webhook();
    for _ in 0..10 {
        assert_eq!(send_at_once(&webhook, 20).await, vec![SENT; 20]);
    }
    let (connections, requests) = server.counts();
    assert_eq!(requests, 200);
    assert!(connections > 1, "{connections}");
}

#[tokio::test]
async fn a_request_that_hangs_times_out_alone() {
    let server = Server2::answering(Builder::new(), |request, respond, number| async move {
        if number == 0 {
            std::future::pending::<()>().await;
        }
        ok(request, respond).await;
    })
    .await;
    let webhook = server.webhook_with(|keys| keys.timeout = Duration::from_millis(500));
    let others = async {
        sleep(Duration::from_millis(100)).await;
        send_at_once(&webhook, 10).await
    };
    let (hanging, others) = tokio::join!(send(&webhook), others);
    assert_eq!((hanging, others), (retryable(Reason::Timeout), vec![SENT; 10]));
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(server.counts(), (1, 12), "the connection was not given up");
}

#[tokio::test]
async fn a_connection_on_which_nothing_comes_is_given_up() {
    let server = Server2::raw(&[], |mut stream, id, number| async move {
        if number > 0 {
            stream.write_all(&frame(HEADERS, WHOLE, id, STATUS_200)).await.unwrap();
        }
        swallow(stream).await;
    })
    .await;
    let webhook = server.webhook_with(|keys| keys.timeout = Duration::from_millis(300));
    assert_eq!(send(&webhook).await, retryable(Reason::Timeout));
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(server.counts(), (2, 2));
}

#[tokio::test]
async fn f40_an_answer_means_what_it_means_by_http_1_1() {
    let answers = [204, 302, 400, 410, 429, 500, 503];
    let server = Server2::answering(Builder::new(), move |request, mut respond, number| async move {
        read_all(request).await;
        let interim = Response::builder().status(103).body(()).unwrap();
        respond.send_informational(interim).unwrap();
        let head = Response::builder().status(answers[number]).header("retry-after", "7").body(()).unwrap();
        say(respond, head, "");
    })
    .await;
    let webhook = server.webhook();
    for status in answers {
        let retry_after = http_policy::RetryAfter::parse_seconds("7");
        let expected = http_policy::outcome(status, retry_after, UnixMs(0), Duration::from_mins(1));
        assert_eq!(send(&webhook).await, expected, "{status}");
    }
    assert_eq!(server.counts(), (1, answers.len()));
}

#[tokio::test]
async fn large_bodies_go_both_ways_and_only_so_much_of_an_answer_is_read() {
    const LARGE: usize = 1 << 20;
    let sent = Arc::<AtomicUsize>::default();
    let count = sent.clone();
    let server = Server2::answering(Builder::new(), move |request, mut respond, _| {
        let count = count.clone();
        async move {
            assert_eq!(read_all(request).await.len(), LARGE);
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            // Without end, as the client's windows allow.
            loop {
                stream.reserve_capacity(16 << 10);
                let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
                let Some(Ok(room)) = room else { return };
                count.fetch_add(room, SeqCst);
                if stream.send_data(Bytes::from(vec![b'x'; room]), false).is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let webhook = server.webhook();
    for _ in 0..5 {
        assert_eq!(send_body(&webhook, &vec![b'x'; LARGE]).await, SENT);
    }
    assert_eq!(server.counts(), (1, 5), "only the streams were reset");
    let sent = sent.load(SeqCst);
    assert!(sent < 5 * 4 * RESPONSE_BYTES_MAX as usize, "{sent}");
}

#[tokio::test]
async fn an_answer_counts_before_the_request_is_read() {
    let server = Server2::answering(Builder::new(), |_, respond, _| async move {
        let head = Response::builder().status(413).body(()).unwrap();
        say(respond, head, "too large");
    })
    .await;
    let webhook = server.webhook();
    let expected = Outcome::Permanent { status: 413, reason: Reason::Status };
    assert_eq!(send_body(&webhook, &vec![b'x'; 4 << 20]).await, expected);
    assert_eq!(send(&webhook).await, expected);
    assert_eq!(server.counts(), (1, 2));
}

#[tokio::test]
async fn the_provider_s_id_is_found() {
    let server = Server2::answering(Builder::new(), |request, respond, _| async move {
        read_all(request).await;
        say(respond, Response::new(()), "{\"message\":{\"id\":\"p-1\"}}");
    })
    .await;
    let webhook = server.webhook_with(|keys| keys.provider_id = Some("/message/id".parse().unwrap()));
    let id = MessageId { file: FileId([7; 16]), row: 1 };
    let request = WebhookRequest::of_one(&id, UnixMs(0), "text/plain", b"");
    assert_eq!(webhook.send(request).await.provider_id.as_deref(), Some("p-1"));
}

#[tokio::test]
async fn a_server_that_misbehaves_costs_an_attempt_and_no_more() {
    /// What the server writes after the first request.
    type Misbehaviour = fn(u32) -> Vec<u8>;
    let cases: [(&str, Misbehaviour); 9] = [
        ("not HTTP/2", |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("a frame that is too large", |id| frame(HEADERS, WHOLE, id, &vec![0; 20_000])),
        ("an answer without a status", |id| frame(HEADERS, WHOLE, id, &[])),
        ("headers that can't be decoded", |id| frame(HEADERS, WHOLE, id, &[0xff; 8])),
        ("a body without an answer", |id| frame(DATA, 1, id, b"x")),
        ("an answer to nobody", |id| frame(HEADERS, WHOLE, id + 2, STATUS_200)),
        ("a stream of the server's own", |_| frame(HEADERS, WHOLE, 2, STATUS_200)),
        ("a reset of nothing", |id| frame(RST_STREAM, 0, id + 4, &[0; 4])),
        ("headers without end", |id| {
            // `x: ` and 1000 bytes, literal and not indexed.
            let field = [&[0x00, 0x01, b'x', 0x7f, 0xe9, 0x06][..], &[b'v'; 1000]].concat();
            let mut frames = frame(HEADERS, 0, id, STATUS_200);
            for _ in 0..1_000 {
                frames.extend(frame(CONTINUATION, 0, id, &field));
            }
            frames
        }),
    ];
    for (name, misbehaviour) in cases {
        let server = Server2::raw(&[], move |mut stream, id, number| async move {
            if number > 0 {
                stream.write_all(&frame(HEADERS, WHOLE, id, STATUS_200)).await.unwrap();
            } else {
                // It fails where the client has had enough.
                let _ = stream.write_all(&misbehaviour(id)).await;
            }
            // Where only the stream broke, the next one comes here.
            while let Some((kind, id)) = read_frame(&mut stream).await {
                if kind == HEADERS {
                    let _ = stream.write_all(&frame(HEADERS, WHOLE, id, STATUS_200)).await;
                }
            }
        })
        .await;
        let webhook = server.webhook_with(|keys| keys.timeout = Duration::from_secs(5));
        let outcome = timeout(Duration::from_secs(2), send(&webhook)).await.ok();
        let expected = [retryable(Reason::Protocol), retryable(Reason::Reset)];
        assert!(outcome.is_some_and(|outcome| expected.contains(&outcome)), "{name}: {outcome:?}");
        assert_eq!(server.counts().1, 1, "{name}");
        assert_eq!(send(&webhook).await, SENT, "{name}");
    }
}

#[tokio::test]
async fn headers_that_are_too_long_cost_their_request_alone() {
    let server = Server2::answering(Builder::new(), |request, respond, number| async move {
        if number > 0 {
            return ok(request, respond).await;
        }
        read_all(request).await;
        let long = "v".repeat(20_000);
        let head = Response::builder().header("x-long", long).body(()).unwrap();
        say(respond, head, "ok");
    })
    .await;
    let webhook = server.webhook();
    assert_eq!(send(&webhook).await, retryable(Reason::Protocol));
    assert_eq!(send(&webhook).await, SENT);
}

#[tokio::test]
async fn what_keeps_one_from_connecting_keeps_all_that_wait_for_it() {
    let server = Server::start(|mut stream, _| async move {
        while stream.read(&mut [0; 4096]).await.is_ok_and(|len| len > 0) {}
    })
    .await;
    let authority = Authority::new();
    let mut settings = authority.settings("localhost", &server);
    settings.connect_timeout = Duration::from_millis(200);
    let webhook = HttpWebhook::new(settings).unwrap();
    let begun = Instant::now();
    assert_eq!(send_at_once(&webhook, 50).await, vec![retryable(Reason::Tls); 50]);
    assert!(begun.elapsed() < Duration::from_secs(2), "not one after the other: {:?}", begun.elapsed());
    assert_eq!(server.connections(), 1);
}
