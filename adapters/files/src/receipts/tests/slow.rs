//! Files that take longer to be hashed, copied or moved than anybody waits.

use std::{
    io::Read,
    path::Path,
    sync::{Condvar, Mutex as StdMutex, atomic::AtomicUsize},
};

use postrider_actors::{
    model::{ids::FileId, time::UnixMs},
    ports::{InboxChange, RejectSink, Scan, Seen, Unowned},
};
use tokio::runtime::Builder;

use super::*;

const LOOK_MAX: Duration = Duration::from_millis(50);

/// An inbox whose disk hangs until the test releases it.
struct Slow {
    inbox: DirectoryInbox,
    is_hung: StdMutex<bool>,
    released: Condvar,
    /// Files never end.
    endless: AtomicBool,
    panics: AtomicBool,
    /// The file that the disk can't read.
    broken: StdMutex<Option<&'static str>>,
    /// How often the claims were listed, a file was hashed, and one was moved away.
    listed: AtomicUsize,
    hashed: AtomicUsize,
    finished: AtomicUsize,
}

impl Slow {
    fn over(inbox: DirectoryInbox) -> Arc<Self> {
        Arc::new(Self {
            inbox,
            is_hung: StdMutex::new(true),
            released: Condvar::new(),
            endless: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            broken: StdMutex::new(None),
            listed: AtomicUsize::new(0),
            hashed: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
        })
    }

    fn hang(&self, is_hung: bool) {
        *self.is_hung.lock().unwrap() = is_hung;
        self.released.notify_all();
    }

    fn wait(&self) {
        drop(self.released.wait_while(self.is_hung.lock().unwrap(), |is_hung| *is_hung).unwrap());
    }

    /// Listed, hashed, finished.
    fn counts(&self) -> [usize; 3] {
        [&self.listed, &self.hashed, &self.finished].map(|count| count.load(Ordering::SeqCst))
    }
}

#[async_trait]
impl Inbox for Slow {
    fn prepare(&self) -> io::Result<()> {
        self.inbox.prepare()
    }

    async fn changed(&self) -> io::Result<InboxChange> {
        self.inbox.changed().await
    }

    fn scan(&self, limit: usize) -> io::Result<Scan> {
        self.inbox.scan(limit)
    }

    fn claim(&self, name: &OsString, now: UnixMs) -> Result<ClaimedFile, ClaimError> {
        self.inbox.claim(name, now)
    }

    fn unowned(&self, is_taken: &dyn Fn(&Path) -> bool) -> io::Result<Unowned> {
        self.listed.fetch_add(1, Ordering::SeqCst);
        self.inbox.unowned(is_taken)
    }

    fn open_raw(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>> {
        self.hashed.fetch_add(1, Ordering::SeqCst);
        self.wait();
        if self.broken.lock().unwrap().is_some_and(|broken| *broken == *file.name) {
            return Err(rustix::io::Errno::IO.into());
        }
        if self.endless.load(Ordering::SeqCst) {
            return Ok(Box::new(io::repeat(0)));
        }
        self.inbox.open_raw(file)
    }

    fn open_rows(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>> {
        assert!(!self.panics.swap(false, Ordering::SeqCst), "it was set to panic");
        self.inbox.open_rows(file)
    }

    fn seen(&self, file: &ClaimedFile) -> io::Result<Box<dyn Seen>> {
        self.inbox.seen(file)
    }

    fn is_unchanged(&self, file: &ClaimedFile) -> io::Result<bool> {
        self.inbox.is_unchanged(file)
    }

    fn rejects(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<Box<dyn RejectSink>> {
        self.inbox.rejects(file, report)
    }

    fn finish(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<()> {
        self.finished.fetch_add(1, Ordering::SeqCst);
        self.wait();
        self.inbox.finish(file, report)
    }

    fn rewrite_reports(&self, reports: &[FileReport]) -> Vec<(FileId, io::Error)> {
        self.inbox.rewrite_reports(reports)
    }
}

/// On a runtime with two threads for blocking work: whoever waits must leave the other one free.
fn with_two_threads(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(2).build().unwrap();
    runtime.block_on(test);
}

async fn assert_a_thread_is_free() {
    let free = timeout(Duration::from_secs(10), tokio::task::spawn_blocking(|| ())).await;
    free.expect("a thread is left for others").unwrap();
}

#[test]
fn a_file_that_takes_longer_than_anybody_waits_is_gone_through_once_and_taken() {
    with_two_threads(async {
        let world = World::new(ReceiptFileFormat::Ndjson);
        world.put("a", lines(0..15));
        let inbox = Slow::over(world.inbox());
        let source = world.source_over(inbox.clone(), LOOK_MAX);
        let wait = Duration::from_millis(10);
        for _ in 0..3 {
            let nothing = source.poll(None, wait).await.unwrap();
            assert!(nothing.receipts.is_empty() && nothing.cursor.is_none());
            // As a collector that loses its patience, or is restarted.
            assert!(timeout(wait, source.poll(None, wait)).await.is_err());
        }
        assert_a_thread_is_free().await;
        assert_eq!(inbox.counts(), [1, 1, 0], "one scan, however often it is polled");
        inbox.hang(false);
        let first = loop {
            let polled = source.poll(None, wait).await.unwrap();
            if polled.cursor.is_some() {
                break polled;
            }
        };
        assert_eq!((first.receipts.len(), inbox.counts()), (10, [1, 1, 0]), "it was not begun again");
        let second = source.poll(first.cursor.as_ref(), Duration::from_secs(30)).await.unwrap();
        assert_eq!((second.receipts.len(), second.acks.len()), (5, 1));

        // Its move to another file system takes as long.
        inbox.hang(true);
        for _ in 0..3 {
            assert!(timeout(wait, source.acknowledge(&second.acks)).await.is_err());
        }
        assert_a_thread_is_free().await;
        inbox.hang(false);
        source.acknowledge(&second.acks).await.unwrap();
        assert_eq!(inbox.counts(), [1, 1, 1]);
        assert!(world.names("done").contains("a"));
    });
}

#[test]
fn what_nobody_waits_for_any_more_ends() {
    with_two_threads(async {
        let world = World::new(ReceiptFileFormat::Ndjson);
        world.put("a", lines(0..15));
        let inbox = Slow::over(world.inbox());
        inbox.endless.store(true, Ordering::SeqCst);
        inbox.hang(false);
        let source = world.source_over(inbox.clone(), LOOK_MAX);
        while inbox.counts()[1] == 0 {
            assert!(source.poll(None, LOOK_MAX).await.unwrap().receipts.is_empty());
        }
        drop(source);
        let ended = async {
            while Arc::strong_count(&inbox) > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), ended).await.expect("a shutdown does not wait for it");
    });
}

#[tokio::test]
async fn f05_a_file_that_its_disk_cannot_read_holds_up_no_other() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    let inbox = Slow::over(world.inbox());
    inbox.hang(false);
    *inbox.broken.lock().unwrap() = Some("a");
    world.put("a", lines(0..5));
    let source = world.source_over(inbox.clone(), Duration::from_secs(30));
    let wait = Duration::from_millis(50);
    assert!(source.poll(None, wait).await.is_err(), "there is nothing else to read");
    world.put("b", lines(5..25));
    world.put("c", lines(25..30));
    assert_eq!(world.drain(&source).await.receipts.len(), 25);
    assert!(world.names("done").contains("c") && !world.names("done").contains("a"));
    // Nothing was decided about it.
    *inbox.broken.lock().unwrap() = None;
    assert_eq!(world.drain(&world.source()).await.receipts.len(), 5);
    assert!(world.names("done").contains("a"));
}

#[tokio::test]
async fn a_look_that_panics_leaves_no_file_out() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    world.put("a", lines(0..5));
    let inbox = Slow::over(world.inbox());
    inbox.hang(false);
    inbox.panics.store(true, Ordering::SeqCst);
    let source = Arc::new(world.source_over(inbox, Duration::from_secs(30)));
    let wait = Duration::from_secs(10);
    let panicked = source.clone();
    let look = tokio::spawn(async move { panicked.poll(None, wait).await });
    assert!(look.await.unwrap_err().is_panic());
    assert_eq!(source.poll(None, wait).await.unwrap().receipts.len(), 5);
}
