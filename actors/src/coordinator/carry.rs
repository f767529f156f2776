//! What keeps the queues going: the feeder and each destination's tasks.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, join_all, select},
};
use postrider_settings::{Delay, DelayMode};
use rand::RngExt as _;

use super::{Line, SharedQueue};
use crate::{
    flow::{Progress, insist},
    metrics::QueueMetrics,
    model::{channel::Call, delay::CurrentDelay},
    ports::{DueBatch, DueQuery, Handle, ItemOutcome, Ledger, Outgoing, StoreError},
};

/// The longest that a task sleeps: redrives come from other processes and ring no bell.
const TICK: Duration = Duration::from_millis(500);

/// How long a receive waits for entries: the most that SQS allows. Less costs more calls and brings nothing sooner.
const POLL_WAIT: Duration = Duration::from_secs(20);

/// For how long a received entry is hidden: until it is claimed, or this process is gone.
const HIDDEN: Duration = Duration::from_secs(30);

/// How long a receive that is under way may take on when the process ends.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Calls of one destination's entries in flight at the same time; one where the transport keeps order.
const SENDS_IN_FLIGHT: usize = 4;

/// What a coordinator works with.
#[derive(Clone)]
pub struct CarrySetup {
    /// The queues.
    pub queue: Arc<SharedQueue>,
    /// Which destinations are disabled.
    pub ledger: Arc<dyn Ledger>,
    /// The destinations that there are.
    pub destinations: Vec<Arc<str>>,
    /// Those whose messages config holds.
    pub paused: Vec<Arc<str>>,
    /// How long entries are held back.
    pub delay: Delay,
    /// What is counted.
    pub metrics: QueueMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// What the feeder knows.
#[derive(Default)]
pub(super) struct Feed {
    /// The destinations that nothing is carried for; `None` before that was asked.
    held: Option<HashSet<Arc<str>>>,
    delays: BTreeMap<Arc<str>, CurrentDelay>,
}

impl CarrySetup {
    /// Carries until the queue is stopped, or the store refuses.
    pub async fn run(self) -> Result<(), StoreError> {
        self.queue.serve(&self.destinations);
        // A generation before this one may have been stopped.
        let mut closing = self.queue.closing.subscribe();
        self.queue.closing.send_replace(false);
        closing.mark_unchanged();
        let mut tasks: Vec<BoxFuture<'_, ()>> = Vec::new();
        for line in self.queue.lines() {
            tasks.push(self.work(line.clone()).boxed());
            tasks.push(self.poll(line).boxed());
        }
        let ended = async {
            // It can't be dropped while it is borrowed.
            let _ = closing.wait_for(|closing| *closing).await;
            tokio::time::sleep(CLOSE_GRACE).await;
        };
        let tasks = select(join_all(tasks).boxed(), ended.boxed());
        let feed = self.feed();
        tokio::pin!(feed);
        match select(tasks, feed).await {
            futures_util::future::Either::Left(_) => Ok(()),
            futures_util::future::Either::Right((fed, tasks)) => {
                fed?;
                tasks.await;
                Ok(())
            }
        }
    }

    fn is_closing(&self) -> bool {
        *self.queue.closing.borrow()
    }

    async fn feed(&self) -> Result<(), StoreError> {
        let mut feed = Feed::default();
        while !self.is_closing() {
            failpoint!("panic.coordinator");
            let wait = self.feed_once(&mut feed).await?;
            self.queue.due.wait(wait).await;
        }
        Ok(())
    }

    /// Asks the store for what is due and could be sent, and hands it to its destinations. How long until the next time.
    pub(super) async fn feed_once(&self, feed: &mut Feed) -> Result<Duration, StoreError> {
        let queue = &*self.queue;
        self.look_up_held(feed).await?;
        self.read_depths(feed).await?;
        let lines = queue.lines();
        let mono = queue.clock.mono();
        let delay_of =
            |name: &Arc<str>| feed.delays.get(name).map_or(Duration::ZERO, |delay| delay.now(mono));
        let (mut wants, mut confirm) = (Vec::new(), Vec::new());
        for line in &lines {
            if let Some(listing) = line.channel().to_list(queue.now(), delay_of(&line.name)) {
                wants.push((line.name.clone(), listing.limit));
                confirm.extend(listing.confirm);
            }
        }
        if wants.is_empty() {
            return Ok(TICK);
        }
        let due_by = queue.clock.wall();
        let query = DueQuery { process: &queue.process, due_by, wants: &wants, confirm: &confirm };
        let due = self.insist("looking for what is due", || queue.claims.due(query)).await?;
        let mut by_destination: BTreeMap<Arc<str>, Vec<DueBatch>> = BTreeMap::new();
        for batch in due {
            by_destination.entry(batch.destination.clone()).or_default().push(batch);
        }
        for (name, asked) in &wants {
            let Some(line) = lines.iter().find(|line| line.name == *name) else { continue };
            let due = by_destination.remove(name).unwrap_or_default();
            let wall = queue.clock.wall();
            line.channel().listed(&due, *asked, delay_of(name), queue.now(), wall);
            line.work.notify_one();
        }
        let next = self.insist("looking for what is due", || queue.claims.next_due()).await?;
        let until_next = next.map(|due| due.since(queue.clock.wall())).filter(|wait| !wait.is_zero());
        Ok(until_next.map_or(TICK, |wait| wait.min(TICK)))
    }

    async fn insist<T, F>(&self, what: &'static str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, &*self.queue.clock, &self.progress, operation).await
    }

    /// Which destinations nothing is carried for. The store remembers the answer where it costs a call (B25); what slips
    /// through meanwhile it refuses.
    async fn look_up_held(&self, feed: &mut Feed) -> Result<(), StoreError> {
        let disabled = || self.ledger.disabled_destinations();
        let disabled = self.insist("looking for disabled destinations", disabled).await?;
        let held: HashSet<_> = disabled.into_iter().chain(self.paused.iter().cloned()).collect();
        if feed.held.as_ref() == Some(&held) {
            return Ok(());
        }
        for line in self.queue.lines() {
            let is_held = held.contains(&line.name) || !self.destinations.contains(&line.name);
            line.channel().hold(is_held);
            if is_held {
                line.channel().give_back(self.queue.now(), true);
                line.work.notify_one();
            } else {
                line.asked.notify_one();
            }
        }
        feed.held = Some(held);
        // Workers look at it themselves: now, rather than at their next tick.
        self.queue.ring();
        Ok(())
    }

    /// Reads the depths that the delay goes by, if it goes by any (B21).
    async fn read_depths(&self, feed: &mut Feed) -> Result<(), StoreError> {
        if self.delay.mode == DelayMode::None {
            return Ok(());
        }
        let mono = self.queue.clock.mono();
        let mut wanted = false;
        for name in &self.destinations {
            let delay =
                feed.delays.entry(name.clone()).or_insert_with(|| CurrentDelay::new(self.delay.clone()));
            wanted |= delay.wants_depth(mono);
        }
        if !wanted {
            return Ok(());
        }
        let depths = self.queue.claims.depths(self.queue.clock.wall()).await;
        if let Err(error) = &depths {
            tracing::warn!(%error, "the backlog is unknown: entries are delayed as by the greatest");
        }
        for (name, delay) in &mut feed.delays {
            let of = |depth: &&crate::ports::DestinationDepth| depth.destination == *name;
            let due = depths.as_ref().ok().map(|depths| depths.iter().find(of).map_or(0, |depth| depth.due));
            delay.read(due, mono);
        }
        Ok(())
    }

    /// One destination's task that sends, hides, deletes and asks for the depth.
    async fn work(&self, line: Arc<Line>) {
        while !self.is_closing() {
            line.channel().give_back(self.queue.now(), false);
            if !self.work_once(&line, false).await {
                // Elapsing is no error: time itself brings work.
                let _ = tokio::time::timeout(TICK / 2, line.work.notified()).await;
            }
        }
    }

    /// Does what is to be done now; `all`: what may wait, too. Whether there was anything.
    pub(super) async fn work_once(&self, line: &Line, all: bool) -> bool {
        let sent = self.send(line).await;
        let tidied = self.queue.tidy(line, all).await;
        let read = self.queue.read_depth(line).await;
        if read {
            self.queue.due.ring();
        }
        sent || tidied || read
    }

    async fn send(&self, line: &Line) -> bool {
        let queue = &*self.queue;
        let calls_max = if queue.transport.limits().keeps_order { 1 } else { SENDS_IN_FLIGHT };
        let calls: Vec<_> = {
            let mut channel = line.channel();
            std::iter::from_fn(|| channel.take_sends(queue.now())).take(calls_max).collect()
        };
        let sends = calls.iter().map(|(entries, delay)| async move {
            let outcomes = queue.transport.send(&line.name, entries, *delay).await;
            self.note_sent(line, entries, outcomes);
        });
        join_all(sends).await;
        if !calls.is_empty() {
            failpoint!("dispatch.sent");
        }
        !calls.is_empty()
    }

    fn note_sent(&self, line: &Line, entries: &[Outgoing], answer: Result<Vec<ItemOutcome>, StoreError>) {
        let outcomes = answer.unwrap_or_else(|error| vec![error.into(); entries.len()]);
        let mut failure = None;
        for (entry, outcome) in entries.iter().zip(&outcomes) {
            match outcome {
                ItemOutcome::Ok => {}
                ItemOutcome::Retryable(why) | ItemOutcome::Permanent(why) => {
                    line.channel().unsent(entry.hint.batch);
                    failure = Some(why.clone());
                }
                ItemOutcome::Unknown(why) => {
                    line.channel().doubt();
                    failure = Some(why.clone());
                }
            }
        }
        let ids: Vec<_> = entries.iter().map(|entry| entry.hint.batch).zip(outcomes).collect();
        self.metrics.offered(&ids);
        self.queue.note(line, Call::Send, failure);
    }

    /// One destination's task that receives while workers want something.
    async fn poll(&self, line: Arc<Line>) {
        while !self.is_closing() {
            // Registered before the look, so that no wish falls between both.
            let asked = line.asked.notified();
            if !self.queue.receive(&line, POLL_WAIT).await {
                // Elapsing is no error: wishes run out by time.
                let _ = tokio::time::timeout(TICK, asked).await;
            }
        }
    }
}

impl SharedQueue {
    /// Notes how a call ended, and says so if that is news.
    fn note(&self, line: &Line, call: Call, failure: Option<String>) {
        let queue = &*line.name;
        let call_name = match call {
            Call::Send => "send",
            Call::Receive => "receive",
            Call::Hide => "hide",
            Call::Delete => "delete",
            Call::Depth => "depth",
        };
        match failure {
            Some(why) => {
                if line.channel().failed(call, self.now(), rand::rng().random()) {
                    tracing::warn!(
                        queue,
                        call = call_name,
                        why,
                        "a call to a queue fails; it is tried again"
                    );
                }
            }
            None => {
                if line.channel().worked(call) {
                    tracing::info!(queue, call = call_name, "the call to the queue works again");
                }
            }
        }
    }

    /// Hides and deletes. Whether there was anything.
    pub(super) async fn tidy(&self, line: &Line, all: bool) -> bool {
        let hides = line.channel().take_hides(self.now());
        let deletes = line.channel().take_deletes(self.now(), all);
        if !hides.is_empty() {
            // What is not hidden comes when its time has run out; claims fence.
            let answer = self.transport.hide(&line.name, &hides).await;
            self.note(line, Call::Hide, answer.err().map(|error| error.to_string()));
        }
        if !deletes.is_empty() {
            let answer = self.transport.delete(&line.name, &deletes).await;
            let again = |outcome: &ItemOutcome| {
                matches!(outcome, ItemOutcome::Retryable(_) | ItemOutcome::Unknown(_))
            };
            let (left, failure): (Vec<Handle>, _) = match answer {
                Ok(outcomes) => {
                    let left = deletes.iter().zip(&outcomes).filter(|(_, outcome)| again(outcome));
                    let left: Vec<_> = left.map(|(handle, _)| handle.clone()).collect();
                    let why = (!left.is_empty()).then(|| "some entries were not deleted".to_owned());
                    (left, why)
                }
                Err(error) => (deletes.clone(), Some(error.to_string())),
            };
            self.note(line, Call::Delete, failure);
            let now = self.now();
            for handle in left {
                line.channel().delete(Some(handle), now);
            }
        }
        !hides.is_empty() || !deletes.is_empty()
    }

    /// Asks for the depth, if it has to be known. Whether it did.
    pub(super) async fn read_depth(&self, line: &Line) -> bool {
        let asked = self.now();
        if !line.channel().wants_depth(asked) {
            return false;
        }
        let answer = self.transport.depth(&line.name).await;
        self.note(line, Call::Depth, answer.as_ref().err().map(ToString::to_string));
        line.channel().depth_read(answer.ok(), asked);
        true
    }

    /// Receives what is wanted. Whether anything was.
    pub(super) async fn receive(&self, line: &Line, wait: Duration) -> bool {
        let max = line.channel().to_receive(self.now());
        if max == 0 {
            return false;
        }
        match self.transport.receive(&line.name, max, wait, HIDDEN).await {
            Ok(entries) => {
                self.note(line, Call::Receive, None);
                if !entries.is_empty() {
                    line.channel().received(entries, self.now(), self.clock.wall());
                    line.work.notify_one();
                    self.ring();
                }
            }
            Err(error) => self.note(line, Call::Receive, Some(error.to_string())),
        }
        true
    }
}

#[cfg(feature = "testing")]
impl CarrySetup {
    /// Does once, in order, all that can be done now without waiting: for tests that go step by step.
    pub async fn turn(&self) -> Result<(), StoreError> {
        self.queue.serve(&self.destinations);
        let mut feed = Feed::default();
        self.feed_once(&mut feed).await?;
        for line in self.queue.lines() {
            for _ in 0..100 {
                if !self.work_once(&line, true).await {
                    break;
                }
            }
            self.queue.receive(&line, Duration::ZERO).await;
        }
        Ok(())
    }
}
