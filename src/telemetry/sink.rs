//! Lines on their way to stderr. Whoever logs never waits for whoever reads: a thread of its own writes, and lines that
//! find no room are counted and left out (F59).

use std::{
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Bytes that wait at most: seconds of a debug log, and little memory (I8).
const BYTES_MAX: usize = 1 << 20;

/// How long to wait with a stderr that was made non-blocking and has no room.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// Takes lines.
#[derive(Clone)]
pub(super) struct Sink(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<u8>,
    /// Lines that found no room behind what waits.
    dropped: u64,
    is_writing: bool,
}

impl Sink {
    /// Writes to `to` from a thread of its own; `dropped_line` says how many lines are missing at a place.
    pub(super) fn start(
        to: impl Write + Send + 'static,
        dropped_line: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let sink = Self(Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() }));
        let writing = sink.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || writing.run(to, &dropped_line))?;
        Ok(sink)
    }

    /// Adds whole lines, or counts them as dropped.
    pub(super) fn push(&self, lines: &[u8]) {
        let mut queue = self.queue();
        // Behind dropped ones only once it was said that they are missing.
        if queue.dropped > 0 || queue.waiting.len() + lines.len() > BYTES_MAX {
            queue.dropped += str::from_utf8(lines).map_or(1, |lines| lines.lines().count() as u64);
        } else {
            queue.waiting.extend_from_slice(lines);
        }
        drop(queue);
        self.0.changed.notify_all();
    }

    /// Waits until everything is written, but no longer than `within`.
    pub(super) fn flush(&self, within: Duration) {
        let is_left = |queue: &mut Queue| !queue.waiting.is_empty() || queue.dropped > 0 || queue.is_writing;
        // Elapsing is no error: nobody reads.
        let _ = self.0.changed.wait_timeout_while(self.queue(), within, is_left);
    }

    fn run(&self, mut to: impl Write, dropped_line: &impl Fn(u64) -> String) {
        let mut lines = Vec::new();
        loop {
            let dropped = {
                let mut queue = self.queue();
                queue.is_writing = false;
                self.0.changed.notify_all();
                while queue.waiting.is_empty() && queue.dropped == 0 {
                    queue = self.0.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                queue.is_writing = true;
                mem::swap(&mut lines, &mut queue.waiting);
                mem::take(&mut queue.dropped)
            };
            if dropped > 0 {
                lines.extend_from_slice(dropped_line(dropped).as_bytes());
            }
            write_all(&mut to, &lines);
            lines.clear();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Changed by infallible steps only.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stderr that is gone has nowhere to report it.
fn write_all(to: &mut impl Write, mut lines: &[u8]) {
    while !lines.is_empty() {
        match to.write(lines) {
            Ok(0) => return,
            Ok(written) => lines = &lines[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(FULL_PAUSE),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// For the `fmt` layer, which writes an event at once.
impl Write for Sink {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.push(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A pipe whose reader takes `allowed` writes and then stops.
    struct Reader {
        allow: mpsc::Receiver<()>,
        read: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Reader {
        fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
            self.allow.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            self.read.lock().unwrap().extend_from_slice(lines);
            Ok(lines.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stuck() -> (Sink, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (sender, allow) = mpsc::channel();
        let read = Arc::new(Mutex::default());
        let reader = Reader { allow, read: Arc::clone(&read) };
        let sink = Sink::start(reader, |lines| format!("{lines} are missing\n")).unwrap();
        (sink, sender, read)
    }

    #[test]
    fn f59_a_reader_that_stops_costs_lines_and_no_time() {
        let (sink, allow, read) = stuck();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        for _ in 0..10_000 {
            sink.push(&line);
        }
        sink.flush(Duration::from_millis(50));
        // The reader is back.
        for _ in 0..3 {
            allow.send(()).unwrap();
        }
        sink.flush(Duration::from_secs(5));
        sink.push(b"after\n");
        allow.send(()).unwrap();
        sink.flush(Duration::from_secs(5));
        let read = String::from_utf8(read.lock().unwrap().clone()).unwrap();
        let missing = read.lines().filter_map(|line| line.strip_suffix(" are missing"));
        let missing: usize = missing.map(|count| count.parse::<usize>().unwrap()).sum();
        let lines = read.lines().filter(|line| line.starts_with('x')).count();
        assert!(lines * 1024 <= 2 * BYTES_MAX, "{lines} lines waited");
        assert_eq!(lines + missing, 10_000);
        assert_eq!(read.lines().last(), Some("after"));
    }

    #[test]
    fn what_was_logged_last_is_flushed() {
        let (sink, allow, read) = stuck();
        sink.push(b"one\ntwo\n");
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            allow.send(()).unwrap();
        });
        sink.flush(Duration::from_secs(5));
        assert_eq!(*read.lock().unwrap(), b"one\ntwo\n");
    }
}
