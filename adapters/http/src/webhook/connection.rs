//! One connection: writes a request, reads its answer, knows whether it can be used again.

use std::{
    future::{Future, poll_fn},
    io,
    mem::MaybeUninit,
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use postrider_actors::model::{http_policy::RetryAfter, outcome::Reason};
use tokio::{
    io::{AsyncRead as _, AsyncReadExt as _, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::{
    response::{BodyReader, BodyStep, Framing, HEAD_BYTES_MAX, Parsed, ResponseHead, parse_head},
    shortage::{Trouble, shortage},
    stream::Stream,
};

/// One read takes at most this much; a common answer fits in one.
const READ_BYTES: usize = 4 * 1024;
/// A buffer that a large body has stretched is given back above this, so that idle connections stay
/// small (I8).
const BUFFER_BYTES_KEPT: usize = 16 * 1024;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoAnswer {
    pub(super) trouble: Trouble,
    /// Whether it is certain that the receiver has not taken the request: no byte of it left this host, or the
    /// receiver says so.
    pub(super) nothing_sent: bool,
}

impl From<Reason> for NoAnswer {
    fn from(reason: Reason) -> Self {
        Self { trouble: reason.into(), nothing_sent: false }
    }
}

/// What the receiver has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) retry_after: Option<RetryAfter>,
    /// The body of a 2xx, if it was asked for and came whole; of any other answer its beginning, as far as that came.
    pub(super) body: Option<Vec<u8>>,
}

/// Bytes of the body of an answer that is not 2xx that are kept: enough for its first line.
const ERROR_BYTES_KEPT: usize = 1_024;

/// How much of an answer's body is kept, if any of it is.
pub(super) fn kept_bytes_max(status: u16, keep_body: bool) -> Option<usize> {
    if (200..300).contains(&status) { keep_body.then_some(usize::MAX) } else { Some(ERROR_BYTES_KEPT) }
}

/// An answer, and whether the connection is good for another request.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) head: ResponseHead,
    pub(super) reusable: bool,
    /// As in [`Answer`].
    pub(super) body: Option<Vec<u8>>,
}

/// An open connection with its buffers.
pub(super) struct Connection {
    stream: Stream,
    /// The request, whole.
    pub(super) output: Vec<u8>,
    /// What was read of the answer and not dropped yet.
    input: Vec<u8>,
    /// Armed for the deadline of some request, and then left alone: see [`within`].
    timer: Pin<Box<Sleep>>,
}

impl Connection {
    pub(super) fn new(stream: Stream, deadline: Instant) -> Self {
        Self { stream, output: Vec::new(), input: Vec::new(), timer: Box::pin(sleep_until(deadline)) }
    }

    /// Sends `output` and reads the answer. Once a final status line has come, it counts, whatever becomes of the rest
    /// of the head and of the body: see `docs/decisions/0008…`. With `keep_body`, the body of a 2xx is kept; of any other answer
    /// always the beginning.
    pub(super) async fn exchange(
        &mut self,
        deadline: Instant,
        body_bytes_max: u64,
        keep_body: bool,
    ) -> Result<Response, NoAnswer> {
        let Self { stream, output, input, timer } = self;
        input.clear();
        let mut head = None;
        let mut body = None;
        let talk = async {
            let sent = write_request(stream, output, input).await?;
            let ResponseHead { status, framing, .. } = read_head(stream, input, &mut head).await?;
            let mut reader = BodyReader::new(framing, body_bytes_max);
            let end = if let Some(bytes_max) = kept_bytes_max(status, keep_body) {
                let mut kept = Vec::new();
                let end = read_body(stream, input, &mut reader, Some((&mut kept, bytes_max))).await;
                let is_whole = matches!(end, BodyEnd::Clean | BodyEnd::Surplus)
                    || end == BodyEnd::Closed && framing == Framing::UntilClose;
                body = (is_whole || bytes_max == ERROR_BYTES_KEPT).then_some(kept);
                end
            } else {
                read_body(stream, input, &mut reader, None).await
            };
            Ok::<_, NoAnswer>(sent && end == BodyEnd::Clean)
        };
        let ended = within(timer.as_mut(), deadline, talk).await;
        // F70: however the head went on, or didn't, the receiver has said what became of the message.
        let head = head.or_else(|| ResponseHead::of_status_line(input));
        output.shrink_to(BUFFER_BYTES_KEPT);
        input.shrink_to(BUFFER_BYTES_KEPT);
        match (head, ended) {
            (Some(head), Some(Ok(intact))) => {
                Ok(Response { head, reusable: intact && head.keep_alive, body })
            }
            (Some(head), _) => Ok(Response { head, reusable: false, body: None }),
            (None, Some(Err(no_answer))) => Err(no_answer),
            (None, Some(Ok(_))) => unreachable!("talk succeeds only after it has set the head"),
            (None, None) => Err(Reason::Timeout.into()),
        }
    }

    /// Whether an idle connection is still open and has received nothing. Costs no system call unless the runtime
    /// was notified about the socket.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut self.stream).poll_read(&mut cx, &mut ReadBuf::uninit(&mut byte)).is_pending()
    }
}

/// Runs `work` until `deadline`; `None` if it was not done by then. `timer` may still be armed for the
/// earlier deadline of an earlier request: it is moved only when it fires, so that a connection costs the
/// timer wheel one entry per timeout and not one per request.
async fn within<T>(
    mut timer: Pin<&mut Sleep>,
    deadline: Instant,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    if timer.deadline() > deadline {
        timer.as_mut().reset(deadline);
    }
    poll_fn(move |cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(done));
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                return Poll::Ready(None);
            }
            timer.as_mut().reset(deadline);
        }
    })
    .await
}

/// Writes the request. Returns whether all of it was taken: a receiver may answer and stop reading, and
/// then its answer counts. Bytes that it sends meanwhile are in `input`.
async fn write_request(stream: &mut Stream, output: &[u8], input: &mut Vec<u8>) -> Result<bool, NoAnswer> {
    let mut written = 0;
    poll_fn(|cx| {
        loop {
            let step = if written < output.len() {
                stream.poll_write(cx, &output[written..])
            } else {
                stream.poll_flush(cx).map_ok(|()| usize::MAX)
            };
            match step {
                Poll::Ready(Ok(usize::MAX)) => return Poll::Ready(Ok(true)),
                Poll::Ready(Ok(len)) if len > 0 => written += len,
                Poll::Ready(Err(error)) if written == 0 && stream.writes_directly() => {
                    let trouble = shortage(&error).map_or(broken(&error).into(), Trouble::from);
                    return Poll::Ready(Err(NoAnswer { trouble, nothing_sent: true }));
                }
                // It may have answered before it closed: try to read.
                Poll::Ready(_) => return Poll::Ready(Ok(false)),
                Poll::Pending => break,
            }
        }
        // Its window is full. It may have answered already and never read on.
        match poll_fill(stream, cx, input) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(Reason::Reset.into())),
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(false)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(broken(&error).into())),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Reads until a final head is there. Leaves in `input` what came behind it.
async fn read_head(
    stream: &mut Stream,
    input: &mut Vec<u8>,
    head: &mut Option<ResponseHead>,
) -> Result<ResponseHead, NoAnswer> {
    let mut skipped = 0;
    // Where to look for the end of a head. A head that trickles in is parsed again only when it may have
    // ended, or else it would cost time in the square of its length.
    let mut looked = 0;
    let mut reads = 0u32;
    loop {
        let tail = looked.max(3) - 3;
        if !input.is_empty() && (reads <= 4 || memchr::memchr(b'\n', &input[tail..]).is_some()) {
            looked = input.len();
            match parse_head(input).map_err(|_| Reason::Protocol)? {
                Parsed::Final(len, parsed) => {
                    input.drain(..len);
                    *head = Some(parsed);
                    return Ok(parsed);
                }
                Parsed::Interim(len) => {
                    input.drain(..len);
                    skipped += len;
                    (looked, reads) = (0, 0);
                    continue;
                }
                Parsed::Partial => {}
            }
        }
        if skipped + input.len() > HEAD_BYTES_MAX {
            return Err(Reason::Protocol.into());
        }
        match poll_fn(|cx| poll_fill(stream, cx, input)).await {
            Ok(0) => return Err(Reason::Reset.into()),
            Ok(_) => reads += 1,
            Err(error) => return Err(broken(&error).into()),
        }
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyEnd {
    /// Where it should, with nothing behind it.
    Clean,
    /// Where it should, with something behind it that nobody asked for.
    Surplus,
    /// With the connection.
    Closed,
    /// Too long, framed wrongly, or cut off by an error.
    Broken,
}

/// Reads the body, and drops what `kept` does not take, which takes so many bytes.
async fn read_body(
    stream: &mut Stream,
    input: &mut Vec<u8>,
    body: &mut BodyReader,
    mut kept: Option<(&mut Vec<u8>, usize)>,
) -> BodyEnd {
    loop {
        let step = body.feed(input, kept.as_mut().map(|(kept, _)| &mut **kept));
        if let Some((kept, bytes_max)) = &mut kept {
            kept.truncate(*bytes_max);
        }
        match step {
            BodyStep::More => input.clear(),
            BodyStep::Done { left: 0 } => return BodyEnd::Clean,
            BodyStep::Done { .. } => return BodyEnd::Surplus,
            BodyStep::Broken => return BodyEnd::Broken,
        }
        match poll_fn(|cx| poll_fill(stream, cx, input)).await {
            Ok(0) => return BodyEnd::Closed,
            Err(_) => return BodyEnd::Broken,
            Ok(_) => {}
        }
    }
}

/// Appends what one read gives; 0 is the end of the stream. The future holds nothing between polls.
fn poll_fill(stream: &mut Stream, cx: &mut Context<'_>, input: &mut Vec<u8>) -> Poll<io::Result<usize>> {
    input.reserve(READ_BYTES);
    pin!(stream.read_buf(input)).poll(cx)
}

/// The reason for a connection that broke after the request had begun. TLS trouble shows up here when
/// the server judges the handshake after we have finished ours (TLS 1.3).
fn broken(error: &io::Error) -> Reason {
    if is_tls(error) { Reason::Tls } else { Reason::Reset }
}

/// Whether TLS has failed, rather than what carries it.
pub(super) fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>)
}

/// For how long the connection may stay idle after an answer with `head`, at most `longest`. A second
/// before the server closes it, so that a request does not meet its FIN on the way.
pub(super) fn idle_max(head: &ResponseHead, longest: Duration) -> Duration {
    let server = head.idle_max.map(|idle| idle.saturating_sub(Duration::from_secs(1)));
    server.map_or(longest, |server| server.min(longest))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_timer_left_by_an_earlier_request_neither_hurries_nor_delays_a_later_one() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut timer = Box::pin(sleep_until(start + 10 * second));
        assert_eq!(within(timer.as_mut(), start + 10 * second, async { 1 }).await, Some(1));

        sleep(5 * second).await;
        let work = async { sleep(9 * second).await };
        assert_eq!(within(timer.as_mut(), start + 15 * second, work).await, Some(()));
        assert_eq!(start.elapsed(), 14 * second);

        assert_eq!(within(timer.as_mut(), start + 24 * second, pending::<()>()).await, None);
        assert_eq!(start.elapsed(), 24 * second);

        // A shorter timeout than before: after a change of config, say.
        timer.as_mut().reset(start + 100 * second);
        assert_eq!(within(timer.as_mut(), start + 25 * second, pending::<()>()).await, None);
        assert_eq!(start.elapsed(), 25 * second);
    }
}
