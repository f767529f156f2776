//! Which connection a request goes out on, and how often.

use super::*;

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let server = Server::answering(OK).await;
    let webhook = server.webhook();
    for _ in 0..100 {
        assert_eq!(send(&webhook).await, SENT);
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn every_framing_that_ends_leaves_the_connection_usable() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\nx",
    ] {
        let server = Server::answering(answer).await;
        let webhook = server.webhook();
        for _ in 0..3 {
            assert_eq!(send(&webhook).await, SENT, "{}", answer.escape_ascii());
        }
        assert_eq!(server.connections(), 1, "{}", answer.escape_ascii());
    }
    let server = Server::answering(b"HTTP/1.1 204 No Content\r\n\r\n").await;
    let webhook = server.webhook();
    for _ in 0..3 {
        assert_eq!(send(&webhook).await, Outcome::Sent { status: 204 });
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn answers_that_end_the_connection_end_it() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"[..],
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        // More than the answer: whose answer is the rest?
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 65537\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let server = Server::answering(answer).await;
        let webhook = server.webhook();
        for sent in 1..=3 {
            assert_eq!(send(&webhook).await, SENT, "{}", answer.escape_ascii());
            assert_eq!(server.connections(), sent, "{}", answer.escape_ascii());
        }
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_is_not_used_and_nothing_is_sent_twice() {
    let (closed, mut was_closed) = tokio::sync::mpsc::unbounded_channel();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    let server = Server::start(move |mut stream, number| {
        let (closed, count) = (closed.clone(), Arc::clone(&count));
        async move {
            read_request(&mut stream).await.unwrap();
            count.fetch_add(1, SeqCst);
            stream.write_all(OK).await.unwrap();
            if number % 2 == 0 {
                stream.set_zero_linger().unwrap();
            }
            drop(stream);
            closed.send(()).unwrap();
        }
    })
    .await;
    let webhook = server.webhook();
    for _ in 0..20 {
        assert_eq!(send(&webhook).await, SENT);
        was_closed.recv().await.unwrap();
        // Lets the runtime notice it.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(requests.load(SeqCst), 20);
}

#[tokio::test]
async fn i5_a_kept_connection_that_ends_without_an_answer_is_a_reset_and_no_second_request() {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    let server = Server::start(move |mut stream, _| {
        let count = Arc::clone(&count);
        async move {
            read_request(&mut stream).await.unwrap();
            count.fetch_add(1, SeqCst);
            stream.write_all(OK).await.unwrap();
            // The second request arrives and may have been handled before this process died.
            read_request(&mut stream).await.unwrap();
            count.fetch_add(1, SeqCst);
        }
    })
    .await;
    let webhook = server.webhook();
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(send(&webhook).await, retryable(Reason::Reset));
    assert_eq!((requests.load(SeqCst), server.connections()), (2, 1));
}

#[tokio::test]
async fn what_arrives_on_an_idle_connection_is_no_answer() {
    let (stray, mut was_sent) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::start(move |mut stream, number| {
        let stray = stray.clone();
        async move {
            while read_request(&mut stream).await.is_some() {
                stream.write_all(OK).await.unwrap();
                if number == 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    stream.write_all(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    stray.send(()).unwrap();
                }
            }
        }
    })
    .await;
    let webhook = server.webhook();
    assert_eq!(send(&webhook).await, SENT);
    was_sent.recv().await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(send(&webhook).await, SENT);
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn no_more_connections_are_kept_than_the_concurrency() {
    let server = Server::answering(OK).await;
    let webhook = server.webhook_with(|keys| keys.concurrency = Some(2));
    let attempts = (0..8).map(|_| send(&webhook));
    assert_eq!(futures_util::future::join_all(attempts).await, [SENT; 8]);
    assert_eq!(server.connections(), 8);
    assert_eq!(webhook.idle.len(), 2);
}

#[tokio::test]
async fn a_connection_is_given_up_before_the_server_closes_it() {
    let (ended, mut has_ended) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::start(move |mut stream, _| {
        let ended = ended.clone();
        async move {
            read_request(&mut stream).await.unwrap();
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nkeep-alive: timeout=1\r\ncontent-length: 0\r\n\r\n")
                .await
                .unwrap();
            assert!(read_request(&mut stream).await.is_none());
            ended.send(()).unwrap();
        }
    })
    .await;
    let webhook = server.webhook();
    for _ in 0..2 {
        assert_eq!(send(&webhook).await, SENT);
        // Nobody asks for it again, and yet it is closed.
        has_ended.recv().await.unwrap();
    }
    assert_eq!(webhook.idle.len(), 0);
}

#[tokio::test]
async fn a_cancelled_attempt_closes_its_connection() {
    let (ended, mut has_ended) = tokio::sync::mpsc::unbounded_channel();
    let (arrived, mut has_arrived) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::start(move |mut stream, _| {
        let (ended, arrived) = (ended.clone(), arrived.clone());
        async move {
            read_request(&mut stream).await.unwrap();
            arrived.send(()).unwrap();
            assert!(read_request(&mut stream).await.is_none());
            ended.send(()).unwrap();
        }
    })
    .await;
    let webhook = server.webhook();
    tokio::select! {
        outcome = send(&webhook) => panic!("{outcome:?}"),
        _ = has_arrived.recv() => {}
    }
    has_ended.recv().await.unwrap();
    assert_eq!(webhook.idle.len(), 0);
}

#[tokio::test]
async fn a_request_goes_out_on_a_new_connection_if_the_kept_one_took_no_byte_of_it() {
    // The receiver runs beside this runtime, which is kept from hearing of the reset: the attempt finds
    // the connection quiet, and learns only from its write that it is gone.
    let (address, has_address) = std::sync::mpsc::channel();
    let (reset, was_reset) = std::sync::mpsc::channel();
    let (go, may_reset) = tokio::sync::oneshot::channel::<()>();
    let receiver = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            address.send(listener.local_addr().unwrap()).unwrap();
            let (mut first, _) = listener.accept().await.unwrap();
            read_request(&mut first).await.unwrap();
            first.write_all(OK).await.unwrap();
            may_reset.await.unwrap();
            first.set_zero_linger().unwrap();
            drop(first);
            reset.send(()).unwrap();
            let (mut second, _) = listener.accept().await.unwrap();
            read_request(&mut second).await.unwrap();
            second.write_all(OK).await.unwrap();
        });
    });
    let url = format!("http://{}/", has_address.recv().unwrap());
    let webhook = HttpWebhook::new(settings(&url)).unwrap();
    assert_eq!(send(&webhook).await, SENT);
    go.send(()).unwrap();
    was_reset.recv().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(send(&webhook).await, SENT);
    receiver.join().unwrap();
}
