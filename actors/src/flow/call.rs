use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::RngExt as _;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    model::{
        backoff::{Backoff, Tries},
        call::{CallOutcome, Failure, FailureKind},
    },
    ports::CallObserver,
};

/// A remote service as an adapter calls it: the one place where calls are timed, counted, repeated and complained
/// about. Clones are the same one.
///
/// The adapter hands in the call, its client's error made a [`Failure`]; here it is bounded, reported to the observer
/// and, if it may be, repeated. What only an operator can change (a missing permission or table) is said once with
/// the operation's name, and once when it works again: who waits for it needs no line per try.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    name: &'static str,
    title: String,
    observer: Arc<dyn CallObserver>,
    /// Operations that wait for an operator.
    blocked: Mutex<BTreeSet<&'static str>>,
}

/// One call of a service's operation.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    operation: &'static str,
    items: usize,
    limit: Option<Duration>,
}

impl Call {
    /// By the service's name for it.
    pub fn of(operation: &'static str) -> Self {
        Self { operation, items: 0, limit: None }
    }

    /// What it carries.
    #[must_use]
    pub fn with(mut self, items: usize) -> Self {
        self.items = items;
        self
    }

    /// The longest that it may take, for clients that have no timeout of their own. After it the call may have happened.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({})", self.0.title)
    }
}

impl Service {
    /// `name` is the metrics' word for it, `title` the operator's.
    pub fn new(name: &'static str, title: impl Into<String>, observer: Arc<dyn CallObserver>) -> Self {
        let blocked = Mutex::default();
        Self(Arc::new(Inner { name, title: title.into(), observer, blocked }))
    }

    /// Who watches.
    pub fn observer(&self) -> &dyn CallObserver {
        &*self.0.observer
    }

    /// Makes a call once.
    pub fn call<T>(
        &self,
        call: Call,
        request: impl Future<Output = Result<T, Failure>>,
    ) -> impl Future<Output = Result<T, Failure>> {
        self.judged(call, request, |_| (CallOutcome::Ok, 0))
    }

    /// Makes a call once; `judge` says how an answer counts, and how many items it brought.
    pub fn judged<T>(
        &self,
        call: Call,
        request: impl Future<Output = Result<T, Failure>>,
        judge: impl FnOnce(&T) -> (CallOutcome, usize),
    ) -> impl Future<Output = Result<T, Failure>> {
        // Clients' futures are 20 kB and more: they would be copied into every future around them.
        let request = Box::pin(request);
        async move {
            let begun = Instant::now();
            let answer = match call.limit {
                None => request.await,
                Some(limit) => timeout(limit, request).await.unwrap_or_else(|_| {
                    let why = format!("{} did not answer within {limit:?}", self.0.title);
                    Err(Failure::new(FailureKind::Unknown, why))
                }),
            };
            let (outcome, brought) = match &answer {
                Ok(answer) => judge(answer),
                Err(failure) => (CallOutcome::Failed(failure.kind), 0),
            };
            let items = call.items + brought;
            self.0.observer.call(self.0.name, call.operation, outcome, begun.elapsed(), items);
            match &answer {
                Err(failure) => self.say(call.operation, failure),
                // What was refused of it, the caller looks at.
                Ok(_) if outcome == CallOutcome::Partial => {}
                Ok(_) => self.allowed(call.operation),
            }
            answer
        }
    }

    /// Makes a call until it is answered or its tries are used up.
    pub async fn repeated<T, F>(
        &self,
        call: Call,
        tries: &mut Tries,
        mut request: impl FnMut() -> F,
        judge: impl Fn(&T) -> (CallOutcome, usize),
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        loop {
            match self.judged(call, request(), &judge).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => again(tries, failure).await?,
            }
        }
    }

    /// Items of an answered call were not taken, and why, in the service's own word.
    pub fn rejected(&self, operation: &'static str, why: &str, items: usize) {
        self.0.observer.rejected(self.0.name, operation, why, items);
    }

    /// Says that an operation waits for an operator, if it does and this is news. For items of an answered call.
    pub fn say(&self, operation: &'static str, failure: &Failure) {
        match failure.kind {
            FailureKind::Denied | FailureKind::Refused => {}
            // The service has looked at more than permissions.
            FailureKind::Invalid => return self.allowed(operation),
            FailureKind::Throttled | FailureKind::Unavailable | FailureKind::Unknown => return,
        }
        if !self.blocked().insert(operation) {
            return;
        }
        let (service, why) = (&self.0.title, &failure.why);
        if failure.kind == FailureKind::Denied {
            tracing::error!(service, operation, why, "a permission is missing: grant it; the work waits");
        } else {
            tracing::error!(service, operation, why, "the service refuses: fix it there; the work waits");
        }
    }

    fn allowed(&self, operation: &'static str) {
        if self.blocked().remove(operation) {
            tracing::info!(service = self.0.title, operation, "the service allows it again");
        }
    }

    fn blocked(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        // Nothing panics while holding it.
        self.0.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits before the next of `tries`, or gives up.
pub async fn again(tries: &mut Tries, failure: Failure) -> Result<(), Failure> {
    let next = tries.failed(failure.kind, rand::rng().random());
    match next {
        Ok(wait) => {
            sleep(wait).await;
            Ok(())
        }
        Err(kind) => Err(Failure { kind, ..failure }),
    }
}

/// Waits after `failures` failures in a row (from 1).
pub async fn back_off(backoff: Backoff, failures: u32) {
    let wait = backoff.wait(failures, rand::rng().random());
    sleep(wait).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::backoff::Budget;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(&'static str, &'static str, CallOutcome, usize)>>);

    impl CallObserver for Seen {
        fn call(
            &self,
            service: &'static str,
            operation: &'static str,
            outcome: CallOutcome,
            _: Duration,
            items: usize,
        ) {
            self.0.lock().unwrap().push((service, operation, outcome, items));
        }
    }

    const BUDGET: Budget =
        Budget { tries: 4, backoff: Backoff::new(Duration::from_millis(50), Duration::from_secs(3)) };

    fn failed(kind: FailureKind) -> Failure {
        Failure::new(kind, "why")
    }

    #[tokio::test(start_paused = true)]
    async fn every_try_is_reported_and_what_may_pass_is_repeated() {
        let seen = Arc::new(Seen::default());
        let service = Service::new("sqs", "SQS", seen.clone());
        let mut answers =
            [Err(failed(FailureKind::Throttled)), Err(failed(FailureKind::Unknown)), Ok(3)].into_iter();
        let mut tries = BUDGET.into();
        let answer = service.repeated(
            Call::of("SendMessageBatch").with(10),
            &mut tries,
            || std::future::ready(answers.next().unwrap()),
            |taken| (if *taken < 10 { CallOutcome::Partial } else { CallOutcome::Ok }, 0),
        );
        assert_eq!(answer.await, Ok(3));
        let outcomes = [
            CallOutcome::Failed(FailureKind::Throttled),
            CallOutcome::Failed(FailureKind::Unknown),
            CallOutcome::Partial,
        ];
        let expected = outcomes.map(|outcome| ("sqs", "SendMessageBatch", outcome, 10));
        assert_eq!(*seen.0.lock().unwrap(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_an_answer_is_cut_off_and_unknown() {
        let service = Service::new("postgres", "Postgres", Arc::new(()));
        let call = Call::of("take").within(Duration::from_secs(30));
        let begun = Instant::now();
        let answer = service.call(call, std::future::pending::<Result<(), _>>()).await;
        assert_eq!(answer.unwrap_err().kind, FailureKind::Unknown);
        assert_eq!(begun.elapsed(), Duration::from_secs(30));
        let tried = service
            .repeated(call, &mut BUDGET.into(), std::future::pending::<Result<(), _>>, |()| {
                (CallOutcome::Ok, 0)
            })
            .await;
        assert_eq!(tried.unwrap_err().kind, FailureKind::Unknown);
    }

    #[tokio::test]
    async fn a_missing_permission_is_said_once_per_change_of_state_and_operation() {
        let service = Service::new("dynamodb", "DynamoDB", Arc::new(()));
        let blocked = || service.blocked().iter().copied().collect::<Vec<_>>();
        let call = async |operation, answer: Result<(), Failure>| {
            let _ = service.call(Call::of(operation), std::future::ready(answer)).await;
        };
        for _ in 0..3 {
            call("UpdateItem", Err(failed(FailureKind::Denied))).await;
            assert_eq!(blocked(), ["UpdateItem"]);
        }
        call("Query", Err(failed(FailureKind::Refused))).await;
        // Neither says that the permission is there.
        call("UpdateItem", Err(failed(FailureKind::Throttled))).await;
        call("UpdateItem", Err(failed(FailureKind::Unknown))).await;
        assert_eq!(blocked(), ["Query", "UpdateItem"]);
        call("UpdateItem", Ok(())).await;
        call("Query", Err(failed(FailureKind::Invalid))).await;
        assert!(blocked().is_empty());
    }
}
