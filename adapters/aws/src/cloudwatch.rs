//! Receipts from the events of CloudWatch Logs, as Amazon SNS writes them for its SMS and push deliveries: one
//! JSON object per event, over one or several log groups.
//!
//! [`receipt_window`] decides which part of which group is read next; one poll is one page of
//! `FilterLogEvents`. All calls of a source share one rate; those of several sources add up. The service's quota
//! is per account and region ("CloudWatch Logs service quotas": 5 to 25 per second), and others use it too.
//!
//! [`receipt_window`]: postrider_actors::model::receipt_window

use std::{fmt, num::NonZeroU32, sync::Arc, time::Duration};

use async_trait::async_trait;
use aws_sdk_cloudwatchlogs::{Client, error::ProvideErrorMetadata as _, types::FilteredLogEvent};
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};
use postrider_actors::{
    flow::{Call, Service},
    model::{
        call::{CallOutcome, Failure, FailureKind},
        receipt::EventId,
        receipt_format::{Around, ReadReceipts, ReceiptFormat},
        receipt_window::{Next, PageRequest, WindowCursor, WindowRule},
        time::UnixMs,
    },
    ports::{AckId, CallObserver, Clock, Polled, ReceiptSource, SourceCursor, StoreError},
};
use postrider_settings::CloudwatchSource;
use tokio::time::Instant;

use crate::failure;

/// The most events of one page (`limit` of `FilterLogEvents`); an answer has 1 MiB at most besides.
pub const PAGE_EVENTS_MAX: u32 = 10_000;
/// A poll ends with the page that brings it to so many receipts.
const POLL_RECEIPTS: usize = 1_000;
/// A poll makes so many calls at most: pages may be empty, and what is read should be stored now and then.
const POLL_CALLS_MAX: usize = 10;

const OPERATION: &str = "FilterLogEvents";

/// Reads at most one event: whether a group is there and may be read.
pub async fn look(client: &Client, group: &str) -> Result<(), StoreError> {
    let call = client.filter_log_events().log_group_name(group).limit(1).send().await;
    call.map(drop).map_err(|error| failure(&error).into())
}

/// What is read, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudWatchSettings {
    /// `[receipts.sources.NAME]`, what log groups have.
    pub keys: CloudwatchSource,
    /// Events per page, from 1 to [`PAGE_EVENTS_MAX`].
    pub page_events: u32,
    /// Events younger than this are left for the next look: the service does not show all of them yet.
    pub lag: Duration,
    /// The longest stretch of time that one look covers, beside its overlap.
    pub window_max: Duration,
}

impl CloudWatchSettings {
    /// With these keys.
    pub fn new(keys: CloudwatchSource) -> Self {
        Self { keys, page_events: 2_500, lag: Duration::from_secs(10), window_max: Duration::from_hours(1) }
    }

    /// How time is divided.
    fn rule(&self) -> WindowRule {
        let CloudwatchSource { overlap, poll, start, .. } = self.keys;
        WindowRule { overlap, lag: self.lag, window_max: self.window_max, step: poll, lookback: start }
    }
}

/// How many calls per second a source may make, over all of its groups.
#[derive(Clone)]
pub struct CallRate(Arc<DefaultDirectRateLimiter>);

impl fmt::Debug for CallRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CallRate")
    }
}

impl CallRate {
    /// Evenly spaced, without a burst: so that no second has more, wherever it begins.
    pub fn per_second(calls: NonZeroU32) -> Self {
        let quota = Quota::per_second(calls).allow_burst(NonZeroU32::MIN);
        Self(Arc::new(RateLimiter::direct(quota)))
    }

    /// Waits for a call's turn. Cancelling it takes no turn away.
    async fn turn(&self) {
        while let Err(not_until) = self.0.check() {
            tokio::time::sleep(not_until.wait_time_from(DefaultClock::default().now())).await;
        }
    }
}

/// The source.
#[derive(Clone)]
pub struct CloudWatchReceipts {
    client: Client,
    settings: CloudWatchSettings,
    format: ReceiptFormat,
    rate: CallRate,
    clock: Arc<dyn Clock>,
    service: Service,
}

impl fmt::Debug for CloudWatchReceipts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudWatchReceipts")
            .field("source", self.format.source())
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// One answer of the service.
struct PageOfEvents {
    events: Vec<FilteredLogEvent>,
    next_token: Option<String>,
}

impl CloudWatchReceipts {
    /// `client` must not try twice by itself: see [`logs_client`](crate::logs_client).
    pub fn new(
        client: Client,
        settings: CloudWatchSettings,
        format: ReceiptFormat,
        rate: CallRate,
        clock: Arc<dyn Clock>,
        observer: Arc<dyn CallObserver>,
    ) -> Self {
        let service = Service::new("logs", format!("CloudWatch Logs, source {}", format.source()), observer);
        Self { client, settings, format, rate, clock, service }
    }

    fn filter(&self) -> &str {
        self.settings.keys.filter.as_deref().unwrap_or_default()
    }

    /// `None`: the service refuses the page's token, which may have expired or belong to another query.
    async fn fetch(&self, page: &PageRequest) -> Result<Option<PageOfEvents>, Failure> {
        self.rate.turn().await;
        let call = self
            .client
            .filter_log_events()
            .log_group_name(&page.group)
            .set_filter_pattern(self.settings.keys.filter.clone())
            .start_time(signed(page.start))
            // The service counts the end in.
            .end_time(signed(page.end) - 1)
            .limit(self.settings.page_events.clamp(1, PAGE_EVENTS_MAX).cast_signed())
            .set_next_token(page.token.clone());
        let request = async {
            match call.send().await {
                Ok(answer) => Ok(Some(PageOfEvents {
                    next_token: answer.next_token,
                    events: answer.events.unwrap_or_default(),
                })),
                Err(error) if page.token.is_some() && error.code() == Some("InvalidParameterException") => {
                    Ok(None)
                }
                Err(error) => Err(failure(&error)),
            }
        };
        let judge = |page: &Option<PageOfEvents>| match page {
            Some(page) => (CallOutcome::Ok, page.events.len()),
            None => (CallOutcome::Conflict, 0),
        };
        self.service.judged(Call::of(OPERATION), request, judge).await
    }

    fn read(&self, group: &str, events: &[FilteredLogEvent], read: &mut ReadReceipts) {
        for event in events {
            let text = event.message().unwrap_or_default().as_bytes();
            let around = Around {
                event: event.event_id().map(|id| EventId::named(self.format.source(), id)),
                // When it was logged is better than nothing, and the same whenever it is read.
                at: event.timestamp().map(|at| UnixMs(at.max(0) as u64)),
            };
            let place = || format!("{group} {}", event.event_id().unwrap_or("event without id"));
            self.format.read_into(text, around, place, read);
        }
    }
}

fn signed(at: UnixMs) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

#[async_trait]
impl ReceiptSource for CloudWatchReceipts {
    async fn poll(&self, cursor: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError> {
        let (rule, filter) = (&self.settings.rule(), self.filter());
        let mut at = match cursor {
            Some(cursor) => WindowCursor::parse(&cursor.0).map_err(|error| {
                let source = self.format.source();
                StoreError::Permanent(format!(
                    "receipt source `{source}`: {error}; a source of another kind had this name: choose another one"
                ))
            })?,
            None => WindowCursor::default(),
        };
        let stored = |at: &WindowCursor| Some(SourceCursor(at.to_text()));
        if at.adopt(&self.settings.keys.log_groups, rule, self.clock.wall()) {
            return Ok(Polled { cursor: stored(&at), ..Polled::default() });
        }

        let deadline = Instant::now() + wait;
        let mut read = ReadReceipts::default();
        let (mut calls, mut has_moved) = (0, false);
        let mut failed: Vec<String> = Vec::new();
        let mut failure = None;
        while calls < POLL_CALLS_MAX && read.receipts.len() + read.rejects.len() < POLL_RECEIPTS {
            let request = match at.next(rule, filter, &failed, self.clock.wall()) {
                Next::Fetch(request) => request,
                Next::Wait(due_in) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if has_moved || failure.is_some() || left.is_zero() {
                        break;
                    }
                    tokio::time::sleep(due_in.min(left)).await;
                    continue;
                }
            };
            calls += 1;
            match self.fetch(&request).await {
                Ok(Some(page)) => {
                    self.read(&request.group, &page.events, &mut read);
                    at.fetched(&request, page.next_token, filter, self.clock.wall());
                    has_moved = true;
                }
                Ok(None) => {
                    tracing::info!(group = %request.group, "a page of log events has expired; reading its window again");
                    at.forget_page(&request);
                    has_moved = true;
                }
                Err(other) => {
                    tracing::warn!(
                        source = %self.format.source(),
                        group = %request.group,
                        why = other.why,
                        "log events can't be read; retrying the same window"
                    );
                    // What concerns one group does not keep the others from their turn; what concerns all does.
                    let is_general = !matches!(other.kind, FailureKind::Denied | FailureKind::Refused);
                    failed.push(request.group);
                    failure.get_or_insert(other);
                    if is_general {
                        break;
                    }
                }
            }
        }
        match failure {
            Some(failure) if !has_moved => Err(failure.into()),
            _ => Ok(Polled {
                receipts: read.receipts,
                rejects: read.rejects,
                ignored: read.ignored,
                cursor: has_moved.then(|| stored(&at)).flatten(),
                acks: Vec::new(),
            }),
        }
    }

    fn behind(&self, cursor: Option<&SourceCursor>, now: UnixMs) -> Option<Duration> {
        Some(WindowCursor::parse(&cursor?.0).ok()?.behind(now))
    }

    /// Nothing: the cursor is all there is.
    async fn acknowledge(&self, _: &[AckId]) -> Result<(), StoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn s0_1_calls_to_all_groups_share_one_rate_and_a_pause_earns_no_burst() {
        let period = Duration::from_millis(20);
        let rate = CallRate::per_second(NonZeroU32::new(50).unwrap());
        let begun = Instant::now();
        let groups = [rate.clone(), rate.clone(), rate.clone()].map(|rate| {
            tokio::spawn(async move {
                for _ in 0..4 {
                    rate.turn().await;
                }
            })
        });
        for group in groups {
            group.await.unwrap();
        }
        assert!(begun.elapsed() >= period * 11, "12 calls in {:?}", begun.elapsed());

        tokio::time::sleep(period * 10).await;
        let begun = Instant::now();
        for _ in 0..5 {
            rate.turn().await;
        }
        assert!(begun.elapsed() >= period * 4, "5 calls in {:?}", begun.elapsed());
    }
}
