//! A receiver that follows a test's script, and logs like `postrider receiver` does. It is small
//! and slow on purpose: one thread per connection, no HTTP library.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: String,
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    /// How many requests with this id and path came before.
    pub(crate) earlier: usize,
    pub(crate) at: Instant,
}

impl Request {
    /// The id and the body of each message: of itself, or of each in a bundle. Their bodies say their ids.
    pub(crate) fn messages(&self) -> Vec<(String, String)> {
        if !self.id.starts_with("bundle_") {
            return vec![(self.id.clone(), self.body.clone())];
        }
        let array: Vec<&RawValue> = serde_json::from_str(&self.body).expect("a bundle is an array");
        let message = |raw: &RawValue| {
            let value: serde_json::Value = serde_json::from_str(raw.get()).expect("bodies are JSON");
            (value["id"].as_str().expect("bodies say their ids").to_owned(), raw.get().to_owned())
        };
        array.into_iter().map(message).collect()
    }
}

/// What the receiver does about a request.
pub(crate) enum Reply {
    /// Answers.
    Status(u16),
    /// Answers with one more header.
    Header(u16, &'static str, String),
    /// Answers 200, with the status of each message of a bundle: its id, and what its `results` say.
    Results(Vec<(String, u16)>),
    /// Answers with these bytes, status 200, and waits for the next request.
    Raw(Vec<u8>),
    /// Answers with this, and then one byte after the other without an end, with such pauses; without any, many at once.
    Forever(&'static str, Duration),
    /// Breaks the connection with a RST after the whole request has arrived.
    Reset,
    /// Never answers; closes when the receiver is dropped.
    Hang,
}

/// Every request, and how many there were of each id and path.
type Seen = (Vec<Request>, HashMap<(String, String), usize>);

struct Shared {
    script: Box<dyn Fn(&Request) -> Reply + Send + Sync>,
    seen: Mutex<Seen>,
    log: Mutex<File>,
    stopped: AtomicBool,
}

/// A running receiver; it stops when dropped.
pub(crate) struct ScriptedReceiver {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

impl ScriptedReceiver {
    pub(crate) fn start(log: &Path, script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let file = OpenOptions::new().create(true).append(true).open(log).expect("the log opens");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            seen: Mutex::default(),
            log: Mutex::new(file),
            stopped: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&accepting);
                // A connection that breaks is the sender's to notice.
                thread::spawn(move || stream.and_then(|stream| serve(&shared, &stream)));
            }
        });
        Self { address, shared }
    }

    /// Every request so far, in order of arrival.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.seen.lock().expect("no script panics").0.clone()
    }
}

impl Drop for ScriptedReceiver {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes `accept`; if it fails, the listener is gone already.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(shared: &Shared, stream: &TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some((path, headers, length)) = read_head(&mut reader)? {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let request = {
            let mut seen = shared.seen.lock().expect("no script panics");
            let (requests, counts) = &mut *seen;
            let id = headers.get("webhook-id").cloned().unwrap_or_default();
            let count = counts.entry((id.clone(), path.clone())).or_default();
            let earlier = *count;
            *count += 1;
            let body = String::from_utf8_lossy(&body).into_owned();
            let request = Request { id, path, headers, body, earlier, at: Instant::now() };
            requests.push(request.clone());
            request
        };
        match (shared.script)(&request) {
            Reply::Status(status) => answer(shared, stream, &request, status, "")?,
            Reply::Header(status, name, value) => {
                answer(shared, stream, &request, status, &format!("{name}: {value}\r\n"))?;
            }
            Reply::Results(results) => {
                let statuses: HashMap<_, _> = results.iter().cloned().collect();
                log(shared, &request, |id| statuses.get(id).copied().unwrap_or(0))?;
                let items: Vec<_> = results
                    .iter()
                    .map(|(id, status)| serde_json::json!({ "id": id, "status": status }))
                    .collect();
                let body = serde_json::json!({ "items": items }).to_string();
                let length = body.len();
                write!(&mut &*stream, "HTTP/1.1 200 -\r\ncontent-length: {length}\r\n\r\n{body}")?;
            }
            Reply::Raw(bytes) => {
                log(shared, &request, |_| 200)?;
                (&mut &*stream).write_all(&bytes)?;
            }
            Reply::Forever(head, pause) => {
                log(shared, &request, |_| 200)?;
                let mut to = stream;
                to.write_all(head.as_bytes())?;
                let bytes = if pause.is_zero() { &[b'x'; 8 << 10][..] } else { b"x" };
                while !shared.stopped.load(Ordering::SeqCst) {
                    to.write_all(bytes)?;
                    thread::sleep(pause);
                }
                return Ok(());
            }
            Reply::Reset => {
                log(shared, &request, |_| 0)?;
                // Linger 0 turns the close into a RST.
                return rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))
                    .map_err(Into::into);
            }
            Reply::Hang => {
                log(shared, &request, |_| 0)?;
                while !shared.stopped.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(20));
                }
                return Ok(());
            }
        }
    }
    Ok(())
}

pub(crate) type Head = (String, HashMap<String, String>, usize);

/// The path, the headers and the body's length; `None` at the end of the connection.
pub(crate) fn read_head(reader: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Some((path, headers, length)))
}

/// Logs, then answers: every answer is in the log.
fn answer(
    shared: &Shared,
    mut stream: &TcpStream,
    request: &Request,
    status: u16,
    header: &str,
) -> io::Result<()> {
    log(shared, request, |_| status)?;
    write!(stream, "HTTP/1.1 {status} -\r\n{header}content-length: 0\r\n\r\n")
}

/// A line for each message, as `postrider receiver` writes them.
fn log(shared: &Shared, request: &Request, status_of: impl Fn(&str) -> u16) -> io::Result<()> {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is after 1970");
    let messages = request.messages();
    let mut lines = String::new();
    for (id, body) in &messages {
        let mut line = serde_json::json!({
            "at": u64::try_from(since_epoch.as_millis()).expect("it is before the year 500 million"),
            "id": id,
            "timestamp": request.headers.get("webhook-timestamp"),
            "path": request.path,
            "status": status_of(id),
            "bytes": body.len(),
            "verified": null,
            "body_sha256": sha256_hex(body.as_bytes()),
            "body": body,
        });
        if *id != request.id {
            line["bundle"] = request.id.as_str().into();
            line["of"] = messages.len().into();
        }
        writeln!(lines, "{line}").expect("strings take everything");
    }
    shared.log.lock().expect("no script panics").write_all(lines.as_bytes())
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("strings take everything");
        hex
    })
}
