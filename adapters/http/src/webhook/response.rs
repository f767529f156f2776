//! Reads answers (RFC 9112), without IO: bytes go in, what they mean comes out. A body's content matters
//! only for a provider's id; otherwise it is counted and dropped, so that the connection can be used again.
//!
//! The status line is the verdict. Whatever is wrong behind it costs the connection and nothing else: a receiver that
//! said 200 has the message, and asking it again would only double it (F70).

use std::time::Duration;

use postrider_actors::model::http_policy::RetryAfter;
use postrider_actors::model::time::UnixMs;

/// All heads of one answer together, interim ones too. Common servers send at most 8 KiB.
pub(super) const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Fields in one head; httparse needs a slot for each.
const FIELDS_MAX: usize = 100;

/// The head can't be read: it breaks a limit or the grammar, or is not HTTP at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotHttp;

/// The head of a final answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseHead {
    pub(super) status: u16,
    pub(super) retry_after: Option<RetryAfter>,
    /// Whether the connection stays open after the body.
    pub(super) keep_alive: bool,
    /// For how long the server says that it keeps an idle connection (`Keep-Alive: timeout=…`).
    pub(super) idle_max: Option<Duration>,
    pub(super) framing: Framing,
}

/// How the end of a body is found (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
    /// It can't be found, so nothing of the body is read.
    InDoubt,
}

impl ResponseHead {
    /// What a head says of which only the status line can be read, if that is a final one.
    pub(super) fn of_status_line(bytes: &[u8]) -> Option<Self> {
        let after = bytes.strip_prefix(b"HTTP/1.1 ").or_else(|| bytes.strip_prefix(b"HTTP/1.0 "))?;
        let (digits, after) = after.split_at_checked(3)?;
        // Whatever the reason phrase is.
        matches!(after.first()?, b' ' | b'\r' | b'\n').then_some(())?;
        let status = digits
            .iter()
            .all(u8::is_ascii_digit)
            .then(|| std::str::from_utf8(digits).ok()?.parse().ok())??;
        is_final(status).then_some(Self {
            status,
            retry_after: None,
            keep_alive: false,
            idle_max: None,
            framing: Framing::InDoubt,
        })
    }
}

/// 101 would hand the connection to a protocol that nobody asked for: it is final, and an error.
fn is_final(status: u16) -> bool {
    status >= 200 || status == 101
}

/// What the start of the buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Not a whole head yet.
    Partial,
    /// An interim answer (1xx) of so many bytes, to be skipped.
    Interim(usize),
    /// A final answer's head of so many bytes.
    Final(usize, ResponseHead),
}

/// Reads the head at the start of `bytes`. One that breaks the grammar in a way that is common is read all the same,
/// but the connection is not used again.
pub(super) fn parse_head(bytes: &[u8]) -> Result<Parsed, NotHttp> {
    let mut config = httparse::ParserConfig::default();
    parse_with(&config, bytes).or_else(|_| {
        config
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .ignore_invalid_headers_in_responses(true);
        let parsed = parse_with(&config, bytes)?;
        Ok(match parsed {
            Parsed::Final(len, head) => Parsed::Final(len, ResponseHead { keep_alive: false, ..head }),
            Parsed::Interim(_) | Parsed::Partial => parsed,
        })
    })
}

fn parse_with(config: &httparse::ParserConfig, bytes: &[u8]) -> Result<Parsed, NotHttp> {
    let mut fields = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let parsed =
        config.parse_response_with_uninit_headers(&mut response, bytes, &mut fields).map_err(|_| NotHttp)?;
    let httparse::Status::Complete(len) = parsed else { return Ok(Parsed::Partial) };
    let status = response.code.ok_or(NotHttp)?;
    if len > HEAD_BYTES_MAX || status < 100 {
        return Err(NotHttp);
    }
    if !is_final(status) {
        return Ok(Parsed::Interim(len));
    }

    let http_1_1 = response.version == Some(1);
    let mut length = None;
    let mut chunked = None;
    let mut in_doubt = false;
    let (mut close, mut keep_alive) = (false, false);
    let mut retry_after = None;
    let mut idle_max = None;
    for field in response.headers.iter() {
        if field.name.eq_ignore_ascii_case("content-length") {
            // A list of the same number is one number; anything else is an answer with two ends.
            for number in field.value.split(|&byte| byte == b',') {
                let number = parse_length(number);
                in_doubt |= number.is_none() || length.is_some_and(|before| number != Some(before));
                length = length.or(number);
            }
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            // Only chunked was offered; anything before it, or a second field, is nothing we can read.
            let only = chunked.is_none() && field.value.trim_ascii().eq_ignore_ascii_case(b"chunked");
            chunked = Some(only);
        } else if field.name.eq_ignore_ascii_case("connection") {
            for option in field.value.split(|&byte| byte == b',') {
                close |= option.trim_ascii().eq_ignore_ascii_case(b"close");
                keep_alive |= option.trim_ascii().eq_ignore_ascii_case(b"keep-alive");
            }
        } else if field.name.eq_ignore_ascii_case("keep-alive") {
            idle_max = parse_idle_max(field.value);
        } else if field.name.eq_ignore_ascii_case("retry-after") {
            retry_after = parse_retry_after(field.value);
        }
    }
    let framing = match (status, chunked, length) {
        (204 | 304, ..) => Framing::Length(0),
        (_, Some(true), _) => Framing::Chunked,
        (_, Some(false), _) => Framing::InDoubt,
        _ if in_doubt => Framing::InDoubt,
        (_, None, Some(length)) => Framing::Length(length),
        (_, None, None) => Framing::UntilClose,
    };
    // Chunks are what counts, but with a length beside them, or from HTTP/1.0, who knows what follows on this
    // connection: request smuggling's favourite (RFC 9112 §6.1, §6.3).
    in_doubt |= chunked == Some(false) || chunked.is_some() && (length.is_some() || !http_1_1);
    let keep_alive =
        !in_doubt && status != 101 && !close && (http_1_1 || keep_alive) && framing != Framing::UntilClose;
    Ok(Parsed::Final(len, ResponseHead { status, retry_after, keep_alive, idle_max, framing }))
}

/// Digits and nothing else, less than 2⁶⁴.
fn parse_length(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii();
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `timeout=5` of `Keep-Alive: timeout=5, max=100`.
fn parse_idle_max(value: &[u8]) -> Option<Duration> {
    let value = std::str::from_utf8(value).ok()?;
    value.split(',').find_map(|part| {
        let (name, seconds) = part.split_once('=')?;
        let seconds = name.trim().eq_ignore_ascii_case("timeout").then_some(seconds)?;
        seconds.trim().parse().ok().map(Duration::from_secs)
    })
}

/// Seconds or an HTTP date; anything else is as good as nothing.
pub(super) fn parse_retry_after(value: &[u8]) -> Option<RetryAfter> {
    let value = std::str::from_utf8(value).ok()?.trim();
    RetryAfter::parse_seconds(value).or_else(|| {
        let date = httpdate::parse_http_date(value).ok()?;
        let since_epoch = date.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(RetryAfter::At(UnixMs(0).after(since_epoch)))
    })
}

/// The state of a body after some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyStep {
    /// There is more to come.
    More,
    /// It ended; so many of the bytes were not its own.
    Done { left: usize },
    /// It is longer than allowed, or framed wrongly. Nothing that follows on the connection can be
    /// trusted.
    Broken,
}

/// Finds the end of a body.
#[derive(Debug)]
pub(super) struct BodyReader {
    state: BodyState,
    /// Bytes that may still come, framing and trailers counted.
    allowance: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyState {
    Length(u64),
    UntilClose,
    InDoubt,
    /// In a chunk's size, with the digits so far.
    ChunkSize {
        size: u64,
        digits: u8,
    },
    ChunkExtension {
        size: u64,
    },
    ChunkSizeLf {
        size: u64,
    },
    ChunkData {
        left: u64,
    },
    ChunkDataCr,
    ChunkDataLf,
    /// At the start of a line after the last chunk.
    TrailerStart,
    TrailerLine,
    TrailerLf,
    EndLf,
}

impl BodyReader {
    pub(super) fn new(framing: Framing, bytes_max: u64) -> Self {
        let state = match framing {
            Framing::Length(length) => BodyState::Length(length),
            Framing::Chunked => BodyState::ChunkSize { size: 0, digits: 0 },
            Framing::UntilClose => BodyState::UntilClose,
            Framing::InDoubt => BodyState::InDoubt,
        };
        Self { state, allowance: bytes_max }
    }

    /// Takes the next bytes; called first with what came behind the head, even if that is nothing. The
    /// content goes to `kept`, if there is one: no more than was allowed.
    pub(super) fn feed(&mut self, bytes: &[u8], mut kept: Option<&mut Vec<u8>>) -> BodyStep {
        match self.state {
            BodyState::InDoubt => BodyStep::Broken,
            // Known beforehand to be too long: not worth reading any of it.
            BodyState::Length(length) if length > self.allowance => BodyStep::Broken,
            BodyState::Length(length) => {
                let len = bytes.len() as u64;
                keep(kept.as_deref_mut(), &bytes[..len.min(length) as usize]);
                self.allowance = self.allowance.saturating_sub(len.min(length));
                self.state = BodyState::Length(length.saturating_sub(len));
                if len >= length { BodyStep::Done { left: (len - length) as usize } } else { BodyStep::More }
            }
            BodyState::UntilClose => {
                if bytes.len() as u64 > self.allowance {
                    return BodyStep::Broken;
                }
                self.allowance -= bytes.len() as u64;
                keep(kept, bytes);
                BodyStep::More
            }
            _ => self.feed_chunked(bytes, kept),
        }
    }

    fn feed_chunked(&mut self, bytes: &[u8], mut kept: Option<&mut Vec<u8>>) -> BodyStep {
        use BodyState as S;
        let mut at = 0;
        while at < bytes.len() {
            let step = match self.state {
                S::ChunkData { left } => left.min((bytes.len() - at) as u64),
                _ => 1,
            };
            let Some(allowance) = self.allowance.checked_sub(step) else { return BodyStep::Broken };
            self.allowance = allowance;
            if let S::ChunkData { left } = self.state {
                keep(kept.as_deref_mut(), &bytes[at..at + step as usize]);
                self.state = if step == left { S::ChunkDataCr } else { S::ChunkData { left: left - step } };
            } else {
                let byte = bytes[at];
                self.state = match (self.state, byte) {
                    (S::ChunkSize { size, digits }, _) if byte.is_ascii_hexdigit() && digits < 15 => {
                        let digit = char::from(byte).to_digit(16).expect("a hex digit, just checked");
                        S::ChunkSize { size: size * 16 + u64::from(digit), digits: digits + 1 }
                    }
                    (S::ChunkSize { size, digits: 1.. } | S::ChunkExtension { size }, b'\r') => {
                        S::ChunkSizeLf { size }
                    }
                    (S::ChunkSize { size, digits: 1.. }, b';' | b' ' | b'\t') => S::ChunkExtension { size },
                    (S::ChunkExtension { size }, _) if byte != b'\n' => S::ChunkExtension { size },
                    (S::ChunkSizeLf { size: 0 } | S::TrailerLf, b'\n') => S::TrailerStart,
                    (S::ChunkSizeLf { size }, b'\n') => S::ChunkData { left: size },
                    (S::ChunkDataCr, b'\r') => S::ChunkDataLf,
                    (S::ChunkDataLf, b'\n') => S::ChunkSize { size: 0, digits: 0 },
                    (S::TrailerStart, b'\r') => S::EndLf,
                    (S::TrailerLine, b'\r') => S::TrailerLf,
                    (S::TrailerStart | S::TrailerLine, _) if byte != b'\n' => S::TrailerLine,
                    (S::EndLf, b'\n') => return BodyStep::Done { left: bytes.len() - at - 1 },
                    _ => return BodyStep::Broken,
                };
            }
            at += step as usize;
        }
        BodyStep::More
    }
}

fn keep(kept: Option<&mut Vec<u8>>, content: &[u8]) {
    if let Some(kept) = kept {
        kept.extend_from_slice(content);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(text: &str) -> Result<ResponseHead, NotHttp> {
        match parse_head(text.as_bytes())? {
            Parsed::Final(len, head) => {
                assert_eq!(len, text.len());
                Ok(head)
            }
            other => panic!("{other:?}"),
        }
    }

    fn framing(fields: &str) -> Result<Framing, NotHttp> {
        head(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).map(|head| head.framing)
    }

    #[test]
    fn the_end_of_a_body_is_found_or_in_doubt() {
        assert_eq!(framing("Content-Length: 12\r\n"), Ok(Framing::Length(12)));
        assert_eq!(framing("content-length: 5, 5\r\nContent-Length: 5\r\n"), Ok(Framing::Length(5)));
        assert_eq!(framing("Transfer-Encoding: Chunked\r\n"), Ok(Framing::Chunked));
        assert_eq!(framing(""), Ok(Framing::UntilClose));
    }

    #[test]
    fn f70_doubt_about_the_end_of_a_body_costs_the_connection_alone() {
        let doubtful = |line: &str, fields: &str| {
            let head = head(&format!("{line} 200 OK\r\nconnection: keep-alive\r\n{fields}\r\n")).unwrap();
            assert_eq!((head.status, head.keep_alive), (200, false), "{fields:?}");
            head.framing
        };
        for conflict in [
            "content-length: 5\r\ncontent-length: 6\r\n",
            "content-length: 5, 6\r\n",
            "content-length: 5, x, 5\r\n",
            "content-length: -1\r\n",
            "content-length: +1\r\n",
            "content-length: 1x\r\n",
            "content-length: \r\n",
            "content-length: 18446744073709551616\r\n",
            "transfer-encoding: gzip\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "content-length: 5\r\ntransfer-encoding: gzip\r\n",
        ] {
            assert_eq!(doubtful("HTTP/1.1", conflict), Framing::InDoubt, "{conflict:?}");
        }
        // Where there are chunks, their end is the body's (RFC 9112 §6.3).
        let both = "content-length: 5\r\ntransfer-encoding: chunked\r\n";
        assert_eq!(doubtful("HTTP/1.1", both), Framing::Chunked);
        assert_eq!(doubtful("HTTP/1.0", "transfer-encoding: chunked\r\n"), Framing::Chunked);
        assert_eq!(read(Framing::InDoubt, 64, b"", &[]), Err(()), "nothing of it is read");
    }

    #[test]
    fn f70_fields_that_break_the_grammar_cost_the_connection_alone() {
        for odd in ["x: a\r\n b\r\n", "Server : x\r\n", "no field\r\n", ": x\r\n"] {
            let fields = format!("retry-after: 7\r\n{odd}content-length: 2\r\n");
            let head = head(&format!("HTTP/1.1 503 No\r\n{fields}\r\n")).unwrap();
            assert_eq!((head.status, head.keep_alive), (503, false), "{odd:?}");
            assert_eq!(head.retry_after, Some(RetryAfter::Delay(Duration::from_secs(7))), "{odd:?}");
            assert_eq!(head.framing, Framing::Length(2), "{odd:?}");
        }
        assert_eq!(parse_head(b"HTTP/1.1 103 Hints\r\nlink: a,\r\n b\r\n\r\n"), Ok(Parsed::Interim(36)));
    }

    #[test]
    fn f70_a_status_line_is_a_verdict_by_itself() {
        let status = |text: &str| ResponseHead::of_status_line(text.as_bytes()).map(|head| head.status);
        assert_eq!(status("HTTP/1.1 200 OK\r\n"), Some(200));
        assert_eq!(status("HTTP/1.0 503\r\nx: y"), Some(503));
        assert_eq!(status("HTTP/1.1 204\n"), Some(204));
        assert_eq!(status("HTTP/1.1 200 O\0K"), Some(200));
        assert_eq!(status("HTTP/1.1 101 Switching"), Some(101));
        for none in [
            "",
            "HTTP/1.1 2",
            "HTTP/1.1 200",
            "HTTP/1.1 2000 x",
            "HTTP/2 200 x",
            "HTTP/1.1 099 x",
            "HTTP/1.1 +20 x",
        ] {
            assert_eq!(status(none), None, "{none:?}");
        }
        assert_eq!(status("HTTP/1.1 100 Continue\r\n"), None, "a verdict is yet to come");
    }

    #[test]
    fn statuses_without_a_body_have_none_whatever_they_say() {
        for status in [204, 304] {
            let head = head(&format!("HTTP/1.1 {status} x\r\ncontent-length: 10\r\n\r\n")).unwrap();
            assert_eq!((head.framing, head.keep_alive), (Framing::Length(0), true));
        }
    }

    #[test]
    fn a_connection_is_kept_only_if_both_versions_rules_allow_it() {
        let keep = |line: &str, fields: &str| {
            head(&format!("{line} 200 OK\r\ncontent-length: 0\r\n{fields}\r\n")).unwrap().keep_alive
        };
        assert!(keep("HTTP/1.1", ""));
        assert!(!keep("HTTP/1.1", "Connection: Close\r\n"));
        assert!(!keep("HTTP/1.1", "connection: keep-alive, close\r\n"));
        assert!(!keep("HTTP/1.0", ""));
        assert!(keep("HTTP/1.0", "connection: Keep-Alive\r\n"));
        assert!(!head("HTTP/1.1 200 OK\r\n\r\n").unwrap().keep_alive, "until close");
        assert!(!head("HTTP/1.1 101 Switching\r\ncontent-length: 0\r\n\r\n").unwrap().keep_alive);
    }

    #[test]
    fn keep_alive_and_retry_after_are_read_and_garbage_is_nothing() {
        let fields = |fields: &str| {
            let head = head(&format!("HTTP/1.1 503 x\r\n{fields}\r\n")).unwrap();
            (head.idle_max, head.retry_after)
        };
        assert_eq!(fields("Keep-Alive: timeout=5, max=100\r\n"), (Some(Duration::from_secs(5)), None));
        assert_eq!(fields("Keep-Alive: max=100\r\n"), (None, None));
        let seconds = RetryAfter::Delay(Duration::from_secs(7));
        assert_eq!(fields("retry-after:  7 \r\n"), (None, Some(seconds)));
        let date = RetryAfter::At(UnixMs(784_111_777_000));
        assert_eq!(fields("retry-after: Sun, 06 Nov 1994 08:49:37 GMT\r\n"), (None, Some(date)));
        for garbage in ["-5", "tomorrow", "Sun, 99 Nov 1994 08:49:37 GMT", "1 2", "\u{e9}"] {
            assert_eq!(fields(&format!("retry-after: {garbage}\r\n")), (None, None), "{garbage}");
        }
    }

    #[test]
    fn interim_answers_are_skipped_and_partial_ones_awaited() {
        assert_eq!(parse_head(b"HTTP/1.1 100 Continue\r\n\r\nHTTP"), Ok(Parsed::Interim(25)));
        assert_eq!(parse_head(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"), Ok(Parsed::Interim(37)));
        assert_eq!(parse_head(b"HTTP/1.1 200 O"), Ok(Parsed::Partial));
        assert_eq!(parse_head(b""), Ok(Parsed::Partial));
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for bytes in
            ["SSH-2.0-OpenSSH\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 2000 x\r\n\r\n", "HTTP/1.1 099 x\r\n\r\n"]
        {
            assert_eq!(parse_head(bytes.as_bytes()), Err(NotHttp), "{bytes:?}");
        }
        let fields = "a: b\r\n".repeat(FIELDS_MAX + 1);
        assert_eq!(framing(&fields), Err(NotHttp));
    }

    /// Feeds `bytes` in pieces and returns the end: how many bytes are the body's, or that it is broken.
    fn read(framing: Framing, max: u64, bytes: &[u8], cuts: &[usize]) -> Result<Option<usize>, ()> {
        read_kept(framing, max, bytes, cuts).0
    }

    /// The same with the content.
    fn read_kept(
        framing: Framing,
        max: u64,
        bytes: &[u8],
        cuts: &[usize],
    ) -> (Result<Option<usize>, ()>, Vec<u8>) {
        let mut kept = Vec::new();
        let end = feed_all(framing, max, bytes, cuts, &mut kept);
        assert!(kept.len() as u64 <= max, "no more is kept than is allowed");
        (end, kept)
    }

    fn feed_all(
        framing: Framing,
        max: u64,
        bytes: &[u8],
        cuts: &[usize],
        kept: &mut Vec<u8>,
    ) -> Result<Option<usize>, ()> {
        let mut reader = BodyReader::new(framing, max);
        let mut at = 0;
        let mut cuts = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect::<Vec<_>>();
        cuts.push(bytes.len());
        cuts.sort_unstable();
        for cut in cuts {
            match reader.feed(&bytes[at..cut], Some(kept)) {
                BodyStep::More => at = cut,
                BodyStep::Done { left } => return Ok(Some(cut - left)),
                BodyStep::Broken => return Err(()),
            }
        }
        Ok(None)
    }

    #[test]
    fn chunks_extensions_and_trailers_end_where_they_end() {
        let whole = |bytes: &str| read(Framing::Chunked, 1000, bytes.as_bytes(), &[]);
        assert_eq!(whole("0\r\n\r\n"), Ok(Some(5)));
        assert_eq!(whole("5\r\nhello\r\n0\r\n\r\nHTTP/1.1"), Ok(Some(15)));
        assert_eq!(whole("A;x=\"y\"\r\n0123456789\r\n00\r\nx-sum: 1\r\ny: 2\r\n\r\n"), Ok(Some(43)));
        assert_eq!(whole("5\r\nhell"), Ok(None));
        for broken in [
            "\r\n",
            ";\r\n",
            "g\r\n",
            "5\nhello",
            "5\r\nhelloX",
            "5\r\nhello\n",
            "-1\r\n",
            "0\r\n\n",
            "0\r\nx: 1\n\r\n",
            "fffffffffffffffff\r\n",
            "5 5\rx",
        ] {
            assert_eq!(whole(broken), Err(()), "{broken:?}");
        }
    }

    #[test]
    fn f36_a_body_is_read_up_to_its_limit_and_no_further() {
        assert_eq!(read(Framing::Length(64), 64, &[0; 64], &[]), Ok(Some(64)));
        assert_eq!(read(Framing::Length(65), 64, b"", &[]), Err(()), "refused before it comes");
        assert_eq!(read(Framing::Length(u64::MAX), 64, b"", &[]), Err(()));
        assert_eq!(read(Framing::UntilClose, 64, &[0; 64], &[]), Ok(None));
        assert_eq!(read(Framing::UntilClose, 64, &[0; 65], &[]), Err(()));
        let chunked = b"5\r\nhello\r\n0\r\n\r\n";
        assert_eq!(read(Framing::Chunked, 15, chunked, &[]), Ok(Some(15)));
        assert_eq!(read(Framing::Chunked, 14, chunked, &[]), Err(()));
        let trailers = format!("0\r\n{}", "x: y\r\n".repeat(20));
        assert_eq!(read(Framing::Chunked, 64, trailers.as_bytes(), &[]), Err(()), "trailers count");
    }

    proptest! {
        #[test]
        fn where_a_body_is_cut_into_reads_does_not_matter(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..6),
            junk in prop::collection::vec(any::<u8>(), 0..20),
            cuts in prop::collection::vec(any::<usize>(), 0..30),
            max in 0u64..400,
            flip in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        ) {
            let mut bytes = Vec::new();
            for chunk in &chunks {
                bytes.extend(format!("{:x};e\r\n", chunk.len()).bytes());
                bytes.extend(chunk);
                bytes.extend(b"\r\n");
            }
            bytes.extend(b"0\r\nt: 1\r\n\r\n");
            let end = bytes.len();
            bytes.extend(&junk);
            if flip.is_none() {
                let expected = if end as u64 > max { Err(()) } else { Ok(Some(end)) };
                let (end, kept) = read_kept(Framing::Chunked, max, &bytes, &cuts);
                prop_assert_eq!(end, expected);
                if end.is_ok() {
                    prop_assert_eq!(kept, chunks.concat());
                }
            }
            if let Some((index, byte)) = flip {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            prop_assert_eq!(
                read(Framing::Chunked, max, &bytes, &cuts),
                read(Framing::Chunked, max, &bytes, &[])
            );
            let length = max / 2;
            prop_assert_eq!(
                read(Framing::Length(length), max, &bytes, &cuts),
                read(Framing::Length(length), max, &bytes, &[])
            );
        }

        #[test]
        fn any_bytes_are_parsed_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_head(&bytes);
            let mut answer = b"HTTP/1.1 200 OK\r\n".to_vec();
            answer.extend(bytes);
            let _ = parse_head(&answer);
        }
    }
}
