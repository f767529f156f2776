//! Sends events to whoever is on call: to a destination, and to a command of the operator's. Each has a queue and a task of its
//! own, so that neither waits for the other, and nobody who has something to report waits for either. Nothing of it is durable:
//! the log has every alarm and every settled file.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use postrider_actors::{
    model::{
        alarm::board::AlarmNote,
        backoff::Backoff,
        outcome::{Obstacle, Outcome},
        time::MonoMs,
    },
    ports::{Clock, Webhook, WebhookRequest},
    sweeper::SettledHook,
};
use tokio::sync::Notify;

use super::{clients::events_client, error::StartError};
use crate::{
    config::Resolved,
    events::{
        Event, EventBodies, command,
        waiting::{Next, Waiting},
    },
    telemetry::metrics::{EventCounts, Metrics},
};

/// Tries of a request, and the waits between them: 4 minutes in all, for a receiver that restarts.
const TRIES: u32 = 10;
const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));

/// How long a command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is looked whether everything has left when the process ends.
const LOOK: Duration = Duration::from_millis(20);

/// Where events go by one configuration.
#[derive(Default)]
pub(super) struct Receivers {
    webhook: Option<Arc<EventWebhook>>,
    command: Option<Arc<[String]>>,
}

/// A destination that gets events.
struct EventWebhook {
    name: String,
    client: Box<dyn Webhook>,
    bodies: EventBodies,
}

impl Receivers {
    /// Makes the client. Connects to nothing.
    pub(super) fn build(resolved: &Resolved) -> Result<Self, StartError> {
        let events = &resolved.config.alarms.events;
        let webhook = match &events.events_to {
            Some(name) => Some(Arc::new(EventWebhook::build(resolved, name)?)),
            None => None,
        };
        let command = Some(events.command.clone()).filter(|words| !words.is_empty());
        Ok(Self { webhook, command: command.map(Arc::from) })
    }
}

impl EventWebhook {
    fn build(resolved: &Resolved, name: &str) -> Result<Self, StartError> {
        let failed = |problems| StartError::Destination { name: name.to_owned(), problems };
        let client = events_client(resolved, name)?;
        let (client, content_type) = client.ok_or_else(|| failed("it is not a webhook".into()))?;
        let template = resolved.materials.get(name).and_then(|materials| materials.template.as_deref());
        let bodies = EventBodies::new(name, template, &content_type).map_err(failed)?;
        Ok(Self { name: name.to_owned(), client: Box::new(client), bodies })
    }

    /// Makes one attempt.
    async fn send(&self, event: &Event, clock: &dyn Clock) -> Result<(), Failure> {
        let given_up = |why| Failure { why, again: None };
        let body = self.bodies.render(event).map_err(given_up)?;
        let id = event.id();
        let request = WebhookRequest::of_one(&id, clock.wall(), self.bodies.content_type(), &body);
        let answered = |status: u16, reason: &str| match status {
            0 => format!("{}: {reason}", self.name),
            status => format!("{} answered {status}", self.name),
        };
        match self.client.send(request).await.outcome {
            Outcome::Sent { .. } => Ok(()),
            Outcome::Permanent { status, reason } => Err(given_up(answered(status, reason.as_str()))),
            Outcome::Gone => Err(given_up(answered(410, ""))),
            Outcome::Retryable { status, reason, retry_after } => {
                let again = Some(retry_after.unwrap_or_default());
                Err(Failure { why: answered(status, reason.as_str()), again })
            }
            Outcome::Unsent(obstacle) => {
                let why = match obstacle {
                    Obstacle::Address(refused) => refused.to_string(),
                    Obstacle::Shortage(shortage) => format!("this machine lacks {}", shortage.as_str()),
                };
                Err(Failure { why: format!("{}: {why}", self.name), again: Some(Duration::ZERO) })
            }
        }
    }
}

/// Why an attempt failed, and whether there is another one, not earlier than after that time.
struct Failure {
    why: String,
    again: Option<Duration>,
}

/// Where events are handed in. Clones share it.
#[derive(Clone)]
pub(super) struct Announcer(Arc<Ways>);

struct Ways {
    clock: Arc<dyn Clock>,
    webhook: Way<EventWebhook>,
    command: Way<[String]>,
}

/// One way for events to leave.
struct Way<T: ?Sized> {
    state: Mutex<WayState<T>>,
    /// Something is to be sent.
    news: Notify,
    /// The last one failed: that is logged once.
    is_failing: AtomicBool,
    counts: EventCounts,
}

struct WayState<T: ?Sized> {
    receiver: Option<Arc<T>>,
    /// Whether it is known that there is nobody, if there is nobody: alarms may come before the first configuration.
    is_known: bool,
    waiting: Waiting,
    is_sending: bool,
}

impl Announcer {
    /// What is handed in waits for [`Announcer::configure`].
    pub(super) fn new(clock: Arc<dyn Clock>, metrics: &Metrics) -> Self {
        let (webhook, command) = (Way::new(metrics.events("webhook")), Way::new(metrics.events("command")));
        Self(Arc::new(Ways { clock, webhook, command }))
    }

    /// Sends, for as long as the process lives.
    pub(super) fn start(&self) {
        let (webhook, command) = (self.0.clone(), self.0.clone());
        actix_rt::spawn(async move { webhook.send().await });
        actix_rt::spawn(async move { command.run().await });
    }

    /// Another configuration is in use. What waits goes to whoever is named now.
    pub(super) fn configure(&self, receivers: Receivers) {
        self.0.webhook.configure(receivers.webhook);
        self.0.command.configure(receivers.command);
    }

    /// An alarm was raised or cleared.
    pub(super) fn alarm(&self, note: &AlarmNote) {
        let now = self.0.clock.mono();
        self.0.webhook.push(now, || Event::Alarm(note.clone()));
        self.0.command.push(now, || Event::Alarm(note.clone()));
    }

    /// Takes files that are settled. Only the destination hears of them: a command per file is no way to be called.
    pub(super) fn on_settled(&self) -> SettledHook {
        let ways = self.0.clone();
        Arc::new(move |file| ways.webhook.push(ways.clock.mono(), || Event::Settled(file)))
    }

    /// Waits until what is due has left, for at most so long.
    pub(super) async fn finish(&self, within: Duration) {
        let Ways { clock, webhook, command } = &*self.0;
        let left = async {
            while webhook.is_busy(clock.mono()) || command.is_busy(clock.mono()) {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(within, left).await.is_err() {
            tracing::warn!("events that have not left yet are given up: the daemon ends");
        }
    }
}

impl<T: ?Sized> Way<T> {
    fn new(counts: EventCounts) -> Self {
        let state =
            WayState { receiver: None, is_known: false, waiting: Waiting::default(), is_sending: false };
        Self { state: Mutex::new(state), news: Notify::new(), is_failing: AtomicBool::new(false), counts }
    }

    fn state(&self) -> MutexGuard<'_, WayState<T>> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn configure(&self, receiver: Option<Arc<T>>) {
        {
            let mut state = self.state();
            if receiver.is_none() {
                state.waiting = Waiting::default();
            }
            state.receiver = receiver;
            state.is_known = true;
        }
        self.news.notify_one();
    }

    fn receiver(&self) -> Option<Arc<T>> {
        self.state().receiver.clone()
    }

    fn push(&self, now: MonoMs, event: impl FnOnce() -> Event) {
        let is_kept = {
            let mut state = self.state();
            if state.receiver.is_none() && state.is_known {
                return;
            }
            state.waiting.push(now, event())
        };
        if is_kept {
            self.news.notify_one();
        } else {
            self.counts.dropped.inc();
            tracing::error!("too many events wait to be sent: one is dropped");
        }
    }

    fn is_busy(&self, now: MonoMs) -> bool {
        let state = self.state();
        state.is_sending || (state.receiver.is_some() && state.waiting.is_due(now))
    }

    /// The next event, as soon as there is one. The one before has been sent or given up.
    async fn next(&self, clock: &dyn Clock) -> Event {
        self.state().is_sending = false;
        loop {
            let now = clock.mono();
            let wait = {
                let mut state = self.state();
                let next = if state.receiver.is_some() { state.waiting.take(now) } else { Next::Nothing };
                match next {
                    Next::Event(event) => {
                        state.is_sending = true;
                        return event;
                    }
                    Next::At(at) => at.since(now),
                    Next::Nothing => Duration::MAX,
                }
            };
            // Either way it is looked again.
            let _ = tokio::time::timeout(wait, self.news.notified()).await;
        }
    }

    fn sent(&self) {
        self.counts.sent.inc();
        if self.is_failing.swap(false, Relaxed) {
            tracing::info!("events are sent again");
        }
    }

    /// Something failed; the first failure of several is logged.
    fn failed(&self, event: &Event, why: &str) {
        if !self.is_failing.swap(true, Relaxed) {
            tracing::error!(event = event.kind(), why, "events can't be sent to who is on call");
        }
    }
}

impl Ways {
    async fn send(&self) {
        let (way, clock) = (&self.webhook, &*self.clock);
        loop {
            let event = way.next(clock).await;
            for tries in 1..=TRIES {
                // Asked for each time: a reload may have put it right, or nobody is to hear of it any more.
                let Some(receiver) = way.receiver() else { break };
                match receiver.send(&event, clock).await {
                    Ok(()) => {
                        way.sent();
                        break;
                    }
                    Err(Failure { why, again }) => {
                        way.failed(&event, &why);
                        let Some(after) = again.filter(|_| tries < TRIES) else {
                            way.counts.failed.inc();
                            break;
                        };
                        tokio::time::sleep(BACKOFF.bound(tries).max(after.min(BACKOFF.cap))).await;
                    }
                }
            }
        }
    }

    async fn run(&self) {
        let (way, clock) = (&self.command, &*self.clock);
        loop {
            let event = way.next(clock).await;
            let Some(words) = way.receiver() else { continue };
            match command::run(&words, &event, COMMAND_TIMEOUT).await {
                Ok(()) => way.sent(),
                Err(why) => {
                    way.failed(&event, &why);
                    way.counts.failed.inc();
                }
            }
        }
    }
}
