//! Commands see and do the same on every store: one story, run against each of them.

use std::{
    collections::BTreeMap,
    num::{NonZeroU32, NonZeroUsize},
    path::Path,
    sync::Arc,
};

use postrider_actors::ports::console::{
    DeadFilter, Delivery, Fate, FileSelector, Operate, Order, Position, Search, View,
};
use postrider_actors::{
    model::{
        batch::{BatchHeader, Rendering},
        ids::{BatchId, MessageId},
        ledger::{DETAIL_BYTES_MAX, MessageVerdict},
        limits::{Concurrency, LimitChange, SetLimits},
        outcome::{Attempt, DeathCause, Reason, Verdict},
        state::MessageState,
        time::{MonoMs, UnixMs},
    },
    ports::{
        LeaseRequest, LeaseToken, Ledger, LimitsSet, Outbox, Queue, Release, Settlement, Steering, Want,
    },
    testing::fixtures,
};
use postrider_sqlite::{EmbeddedStore, Operator, Viewer};
use tokio::runtime::Runtime;

const NOW: UnixMs = UnixMs(1_000_000);

/// One byte less than there is room for, so that a character of two bytes is left out whole.
const WORDS: &str = const {
    const BYTES: [u8; DETAIL_BYTES_MAX - 1] = [b'w'; DETAIL_BYTES_MAX - 1];
    match str::from_utf8(&BYTES) {
        Ok(words) => words,
        Err(_) => panic!("ASCII"),
    }
};

fn at(ms: u64) -> UnixMs {
    UnixMs(NOW.0 + ms)
}

/// Gets the batch into a worker's hands at the time.
type Grant = Box<dyn Fn(&Runtime, BatchId, UnixMs) -> (LeaseToken, Arc<BatchHeader>)>;

/// A daemon's side of a store.
struct Daemon {
    runtime: Runtime,
    outbox: Arc<dyn Outbox>,
    ledger: Arc<dyn Ledger>,
    steering: Arc<dyn Steering>,
    lease: Grant,
}

impl Daemon {
    /// Records `verdicts` of a worker that has `batch` at `now`, and gives the rest of it back.
    fn settle(&self, batch: BatchId, now: UnixMs, verdicts: Vec<MessageVerdict>, details: &[(u32, &str)]) {
        let (token, _) = (self.lease)(&self.runtime, batch, now);
        self.record(token, verdicts, details);
    }

    fn record(&self, token: LeaseToken, verdicts: Vec<MessageVerdict>, details: &[(u32, &str)]) {
        let settlement = Settlement {
            token,
            verdicts,
            details: details.iter().map(|&(index, words)| (index, words.into())).collect(),
            records: Vec::new(),
            ends: true,
            begins: None,
        };
        self.runtime.block_on(self.ledger.settle(vec![settlement])).unwrap();
    }
}

fn verdict(index: u32, drive: u32, attempt: u32, verdict: Verdict) -> MessageVerdict {
    MessageVerdict { index, drive, attempt, verdict }
}

fn delivery_of(view: &mut dyn View, id: MessageId, destination: &str) -> Delivery {
    let mut deliveries = view.message(id).unwrap().into_iter().filter_map(|report| match report.fate {
        Fate::Message(delivery) => Some(delivery),
        Fate::Rejected { .. } | Fate::Duplicate => None,
    });
    deliveries.find(|delivery| delivery.destination == destination).expect("it goes there")
}

fn story(daemon: &Daemon, view: &mut dyn View, operate: &mut dyn Operate) {
    let file = fixtures::file("f", 1, &["d", "e"]);
    let other = fixtures::file("f", 2, &["d"]);
    daemon.runtime.block_on(async {
        // Accepted are rows 1, 2 and 5.
        let step = fixtures::step_without(&file, 1..=5, &[3], &[4], NOW);
        daemon.outbox.append(step).await.unwrap();
        for first in [1, 11] {
            daemon.outbox.append(fixtures::step(&other, first..=first + 9, at(1))).await.unwrap();
        }
    });
    let batch = BatchId::derive(file.id, "d", 1);
    let id = MessageId { file: file.id, row: 1 };

    let delivery = delivery_of(view, id, "d");
    assert_eq!((delivery.state, delivery.recipient.as_deref()), (MessageState::Accepted, Some("user-1")));
    assert_eq!((delivery.not_before, delivery.accepted_at), (Some(NOW), NOW));

    let (failed, again) = (fixtures::failed(at(1)), fixtures::failed(at(2)));
    let verdicts = vec![
        verdict(0, 0, 1, Verdict::Retry { attempt: failed, not_before: at(50) }),
        verdict(1, 0, 1, Verdict::Dead { attempt: again, cause: DeathCause::Age }),
    ];
    // What the destination answered is kept with a dead letter, and only there.
    let too_long = format!("{WORDS}ü, and this is too much");
    daemon.settle(batch, NOW, verdicts, &[(0, "not now"), (1, &too_long)]);
    let delivery = delivery_of(view, id, "d");
    assert_eq!((delivery.state, delivery.not_before), (MessageState::Retrying, Some(at(50))));
    assert_eq!((&delivery.failed[..], delivery.sent, delivery.cause), (&[failed][..], None, None));

    let last = fixtures::failed(at(60));
    let verdicts = vec![verdict(0, 0, 2, Verdict::Dead { attempt: last, cause: DeathCause::Attempts })];
    daemon.settle(batch, at(50), verdicts, &[]);
    let delivery = delivery_of(view, id, "d");
    assert_eq!((delivery.state, delivery.cause), (MessageState::Dead, Some(DeathCause::Attempts)));
    assert_eq!((&delivery.failed[..], delivery.not_before), (&[failed, last][..], None));
    assert_eq!(delivery_of(view, id, "e").state, MessageState::Accepted);

    dead_letters(view);
    counts(view, operate);
    limits(daemon, view, operate);
    searches(view);
    new_bodies(daemon, view, operate);

    let given_up = DeadFilter { cause: Some(DeathCause::Attempts), ..DeadFilter::default() };
    assert_eq!(operate.redrive(&given_up, 9, at(100)).unwrap(), 1);
    assert_eq!(operate.redrive(&given_up, 9, at(100)).unwrap(), 0);
    let delivery = delivery_of(view, id, "d");
    assert_eq!((delivery.state, delivery.drive), (MessageState::Retrying, 1));
    assert_eq!(delivery.failed, [failed, last], "a redrive forgets no attempt");
    assert_eq!((delivery.accepted_at, delivery.not_before), (at(100), Some(at(100))));
    daemon.settle(batch, at(100), vec![verdict(0, 1, 1, Verdict::Sent { at: at(130), status: 202 })], &[]);
    let delivery = delivery_of(view, id, "d");
    assert_eq!((delivery.state, delivery.sent), (MessageState::Sent, Some((202, at(130)))));
    assert_eq!((delivery.failed.len(), delivery.recipient.as_deref()), (2, Some("user-1")));

    let mut fate = |row| view.message(MessageId { file: file.id, row }).unwrap();
    assert!(matches!(&fate(3)[..], [report] if matches!(report.fate, Fate::Rejected { line: 4, .. })));
    assert!(matches!(&fate(4)[..], [report] if matches!(report.fate, Fate::Duplicate)));
    assert!(fate(6).is_empty() && fate(0).is_empty());
    let unknown = MessageId { file: fixtures::file("f", 9, &["d"]).id, row: 1 };
    assert!(view.message(unknown).unwrap().is_empty());
}

/// Rows 1 and 2 of `1.csv` are dead at `d`.
fn dead_letters(view: &mut dyn View) {
    let mut rows = Vec::new();
    let mut position = Position::default();
    loop {
        let page = view.dead(&DeadFilter::default(), &position, 1).unwrap();
        let Some(letter) = page.first() else { break };
        assert_eq!((page.len(), &letter.destination[..], &letter.file_name[..]), (1, "d", "1.csv"));
        let recipient = view.recipients(&page).unwrap();
        assert_eq!(recipient, [format!("user-{}", letter.row)]);
        assert_eq!(letter.detail.as_deref(), (letter.row == 2).then_some(WORDS));
        rows.push((letter.row, letter.attempts, letter.last.at));
        position = letter.position.clone();
    }
    rows.sort_unstable();
    assert_eq!(rows, [(1, 2, at(60)), (2, 1, at(2))]);
    let mut count = |filter: DeadFilter| view.dead(&filter, &Position::default(), 99).unwrap().len();
    let named = |name: &str| DeadFilter { file: Some(name.into()), ..DeadFilter::default() };
    assert_eq!((count(DeadFilter::default()), count(named("1.csv")), count(named("2.csv"))), (2, 2, 0));
    assert_eq!(count(named("no.csv")), 0);
    assert_eq!(count(DeadFilter { destination: Some("e".into()), ..DeadFilter::default() }), 0);
    assert_eq!(count(DeadFilter { destination: Some("d".into()), ..named("1.csv") }), 2);
    assert_eq!(count(DeadFilter { cause: Some(DeathCause::Age), ..DeadFilter::default() }), 1);
    assert_eq!(count(DeadFilter { since: Some(at(3)), ..DeadFilter::default() }), 1);
    assert_eq!(count(DeadFilter { before: Some(at(3)), ..DeadFilter::default() }), 1);
    assert!(view.dead(&DeadFilter::default(), &Position("nonsense".into()), 9).is_err());
}

fn counts(view: &mut dyn View, operate: &mut dyn Operate) {
    let names = |files: Vec<postrider_actors::model::file::FileReport>| -> Vec<_> {
        files.into_iter().map(|report| report.file.name).collect()
    };
    assert_eq!(names(view.files(None, 9).unwrap()), ["2.csv", "1.csv"]);
    assert_eq!(names(view.files(None, 1).unwrap()), ["2.csv"]);
    assert_eq!(names(view.files(Some(&"1.csv".into()), 9).unwrap()), ["1.csv"]);
    let found = view.files(Some(&"1.csv".into()), 9).unwrap();
    let by_id = view.files(Some(&FileSelector::Id(found[0].file.id)), 9).unwrap();
    assert_eq!(names(by_id), ["1.csv"]);
    assert!(view.files(Some(&"3.csv".into()), 9).unwrap().is_empty());
    assert!(found[0].is_balanced());
    let totals = view.file_totals().unwrap();
    assert_eq!((totals.ingesting, totals.open, totals.settled), (2, 0, 0));
    // Three at each of two, two of them dead; and twenty.
    assert_eq!(view.depth().unwrap(), 3 + 3 - 2 + 20);
    let views = view.destinations().unwrap();
    assert_eq!((views["d"].counts.accepted, views["d"].counts.dead, views["e"].counts.accepted), (23, 2, 3));
    assert!(views["d"].disabled.is_none());

    let pause = |reason: &str| Order::Pause { destination: "d".into(), reason: reason.into() };
    assert_eq!(operate.order(&pause("for repairs"), "ada", at(5)), Ok(1));
    assert_eq!(operate.order(&pause("another reason"), "ada", at(6)), Ok(0));
    assert_eq!(view.destinations().unwrap()["d"].disabled, Some((at(5), "for repairs".into())));
    let resume = Order::Resume { destination: "d".into() };
    assert_eq!(operate.order(&resume, "bob", at(7)), Ok(1));
    assert_eq!(operate.order(&resume, "bob", at(8)), Ok(0));
    assert!(view.destinations().unwrap()["d"].disabled.is_none());
    let lines = view.audit(9).unwrap();
    let said: Vec<_> =
        lines.iter().map(|line| (line.at, &*line.by, &*line.verb, &*line.of, &*line.detail)).collect();
    assert_eq!(said, [(at(7), "bob", "resume", "d", ""), (at(5), "ada", "pause", "d", "for repairs")]);
    assert_eq!(view.audit(1).unwrap(), lines[..1]);
}

/// Rows of a file that died of their template get new bodies; those that were answered keep theirs.
fn new_bodies(daemon: &Daemon, view: &mut dyn View, operate: &mut dyn Operate) {
    let file = fixtures::file("f", 3, &["d"]);
    let batch = |first: u64| BatchId::derive(file.id, "d", first);
    daemon.runtime.block_on(async {
        for first in [1, 3] {
            daemon.outbox.append(fixtures::step(&file, first..=first + 1, at(200))).await.unwrap();
        }
    });
    let dead = |index, drive, reason| {
        let attempt = Attempt { at: at(201), status: 0, reason };
        verdict(index, drive, 1, Verdict::Dead { attempt, cause: DeathCause::Permanent })
    };
    let all = |drive, reason| vec![dead(0, drive, reason), dead(1, drive, reason)];
    daemon.settle(batch(1), at(200), all(0, Reason::Render), &[]);
    daemon.settle(batch(3), at(200), vec![dead(0, 0, Reason::Render), dead(1, 0, Reason::Timeout)], &[]);
    let filter = DeadFilter { file: Some("3.csv".into()), ..DeadFilter::default() };
    assert_eq!(view.count_dead(&filter), Ok(4));
    let rendering = |template: &str| {
        let rendering = Rendering { template: Some(template.into()), content_type: "text/plain".into() };
        BTreeMap::from([("d".to_owned(), rendering)])
    };
    let mut rerender = |template: &str, now, dry_run| {
        let done = operate.rerender(&filter, &rendering(template), 99, at(now), dry_run).unwrap();
        (done.redriven, done.refused)
    };
    assert_eq!(rerender("one", 300, true), (2, 2));
    assert_eq!(view.count_dead(&filter), Ok(4), "nothing is changed");
    assert_eq!(rerender("one", 300, false), (2, 2));
    assert_eq!(rerender("one", 301, false), (0, 2));
    let delivery = delivery_of(view, MessageId { file: file.id, row: 1 }, "d");
    assert_eq!((delivery.state, delivery.rendered_at), (MessageState::Retrying, Some(at(300))));
    assert_eq!(delivery_of(view, MessageId { file: file.id, row: 3 }, "d").rendered_at, None);
    let template = |now| {
        let (lease, header) = (daemon.lease)(&daemon.runtime, batch(1), at(now));
        (lease, header.template.clone())
    };
    let (token, by) = template(300);
    assert_eq!(by.as_deref(), Some("one"));
    daemon.record(token, all(1, Reason::Connect), &[]);
    assert_eq!(rerender("two", 400, false), (2, 2), "it was wrong again, and not sent");
    let (token, by) = template(400);
    assert_eq!(by.as_deref(), Some("two"));
    daemon.record(token, all(2, Reason::Status), &[]);
    assert_eq!(rerender("three", 500, false), (0, 4));
    assert_eq!(operate.redrive(&filter, 99, at(600)), Ok(4));
    let (token, by) = template(600);
    assert_eq!(by.as_deref(), Some("two"), "I4");
    let sent = |index| verdict(index, 3, 1, Verdict::Sent { at: at(601), status: 200 });
    daemon.record(token, vec![sent(0), sent(1)], &[]);
}

/// What is set is known to commands and daemons, and what is unset is not.
fn limits(daemon: &Daemon, view: &mut dyn View, operate: &mut dyn Operate) {
    let number = NonZeroUsize::new(9).map(Concurrency::Fixed);
    let (rate, auto) = (NonZeroU32::new(70), Some(Concurrency::Auto));
    let mut ms = 8;
    let mut order = |destination: &str, change: LimitChange| {
        ms += 1;
        operate.order(&Order::Limit { destination: destination.into(), change }, "ada", at(ms)).unwrap()
    };
    assert_eq!(order("d", LimitChange::Rate(None)), 0);
    assert_eq!((order("d", LimitChange::Rate(rate)), order("d", LimitChange::Rate(rate))), (1, 0));
    assert_eq!(order("d", LimitChange::Concurrency(number)), 1);
    assert_eq!(
        (order("d", LimitChange::Concurrency(auto)), order("new", LimitChange::Concurrency(number))),
        (1, 1)
    );
    let (of_d, of_new) = (
        SetLimits { rate_per_s: rate, concurrency: auto },
        SetLimits { rate_per_s: None, concurrency: number },
    );
    let expected = LimitsSet::from([("d".into(), of_d), ("new".into(), of_new)]);
    let is_known = || daemon.runtime.block_on(daemon.steering.set_limits()).unwrap() == expected;
    // It may be a second old.
    let mut looks = 0..30;
    while !is_known() {
        looks.next().expect("a daemon knows it within 3 s");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let views = view.destinations().unwrap();
    assert_eq!(
        (views["d"].limits, views["new"].limits, views["e"].limits),
        (of_d, of_new, SetLimits::default())
    );
    for change in [LimitChange::Rate(None), LimitChange::Concurrency(None), LimitChange::Rate(None)] {
        order("d", change);
    }
    assert!(view.destinations().unwrap()["d"].limits.is_empty());
    let lines = view.audit(2).unwrap();
    let said: Vec<_> = lines.iter().map(|line| (&*line.verb, &*line.of, &*line.detail)).collect();
    assert_eq!(said, [("concurrency", "d", "default"), ("rate", "d", "default")]);
}

fn searches(view: &mut dyn View) {
    // `user-1` is also the beginning of `user-10` to `user-19`, which are others.
    for (recipient, only, files) in [("user-1", None, 2), ("user-15", None, 1), ("user-5", Some("1.csv"), 1)]
    {
        let file = only.map(|name| view.files(Some(&name.into()), 1).unwrap()[0].file.id);
        for batches in [1, 2, 100] {
            let mut search = Search::default();
            while view.search(&mut search, recipient, file, batches, 99).unwrap() {}
            search.found.dedup();
            assert_eq!(search.found.len(), files, "{recipient} in steps of {batches}");
        }
        let mut search = Search::default();
        while view.search(&mut search, recipient, file, 1, 1).unwrap() {}
        assert_eq!(search.found.len(), 1);
    }
}

#[test]
fn the_embedded_store() {
    let dir = tempfile::tempdir().unwrap();
    let path: &Path = dir.path();
    let store = Arc::new(EmbeddedStore::open(path, Arc::new(|error| panic!("fatal: {error}"))).unwrap());
    let runtime = Runtime::new().unwrap();
    let queue = store.clone();
    let lease: Grant = Box::new(move |runtime, batch, now| {
        let wants = vec![Want::new("d", usize::MAX, usize::MAX)];
        let request =
            LeaseRequest { holder: "w".into(), wants, until: MonoMs(u64::MAX), now, born: UnixMs(0) };
        let leases = runtime.block_on(queue.lease(request)).unwrap();
        let (wanted, others): (Vec<_>, Vec<_>) =
            leases.iter().map(|lease| lease.token).partition(|token| token.batch == batch);
        runtime.block_on(queue.release(&others, Release::Unused)).unwrap();
        let lease = leases.iter().find(|lease| lease.token == wanted[0]).expect("it is one of them");
        (lease.token, lease.header.clone())
    });
    let (outbox, ledger) = (store.clone(), store.clone());
    let daemon = Daemon { runtime, outbox, ledger, steering: store, lease };
    story(&daemon, &mut Viewer::open(path).unwrap(), &mut Operator::open(path).unwrap());
}

#[cfg(feature = "aws")]
#[allow(dead_code, unreachable_pub, reason = "shared; this binary needs one emulator")]
#[path = "cloud/emulators.rs"]
mod emulators;

#[cfg(feature = "aws")]
mod dynamodb {
    use aws_config::{BehaviorVersion, Region};
    use aws_sdk_dynamodb::{Client, config::Credentials};
    use aws_smithy_http_client::{
        Builder,
        tls::{Provider, rustls_provider::CryptoMode},
    };
    use postrider::clock::SystemClock;
    use postrider_aws::dynamodb::{Console, DynamoSettings, DynamoStore, migrate};
    use postrider_settings::{Dynamodb, Keys as _};

    use postrider_actors::ports::{Claim, ClaimRequest, Claims as _};

    use super::{emulators::Server, *};

    fn client(endpoint: &str) -> Client {
        let config = aws_sdk_dynamodb::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::from_static("us-east-1"))
            .credentials_provider(Credentials::new("test", "test", None, None, "tests"))
            .http_client(Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https())
            .endpoint_url(endpoint)
            .build();
        Client::from_conf(config)
    }

    fn keys() -> Dynamodb {
        Dynamodb { table: "console".to_owned(), ..Dynamodb::declared() }
    }

    fn console(endpoint: &str) -> Console {
        let runtime = Runtime::new().unwrap();
        let settings = DynamoSettings::new(keys(), "operator-1");
        let client = client(endpoint);
        let opening = DynamoStore::open(&client, settings, Arc::new(SystemClock), Arc::new(()));
        let store = runtime.block_on(opening).unwrap();
        Console::new(runtime, store)
    }

    #[test]
    #[ignore = "needs dynoxide: set POSTRIDER_DYNOXIDE"]
    fn the_dynamodb_store() {
        let server = Server::dynamodb();
        let runtime = Runtime::new().unwrap();
        let store = runtime.block_on(async {
            let client = client(server.endpoint());
            let settings = DynamoSettings {
                sweep_interval: std::time::Duration::ZERO,
                ..DynamoSettings::new(keys(), "n-1")
            };
            migrate(&client, &settings).await.unwrap();
            let clock = Arc::new(SystemClock);
            Arc::new(DynamoStore::open(&client, settings, clock, Arc::new(())).await.unwrap())
        });
        let claims = store.clone();
        let lease: Grant = Box::new(move |runtime, batch, now| {
            let request = ClaimRequest {
                holder: "n-1/w#1".into(),
                batches: vec![batch],
                until: UnixMs(u64::MAX / 2_000),
                now,
                born: UnixMs(0),
            };
            let granted = runtime.block_on(claims.claim(request)).unwrap();
            let [(_, Claim::Granted(lease))] = &granted[..] else { panic!("not granted: {granted:?}") };
            (lease.token, lease.header.clone())
        });
        let (outbox, ledger) = (store.clone(), store.clone());
        let daemon = Daemon { runtime, outbox, ledger, steering: store, lease };
        story(&daemon, &mut console(server.endpoint()), &mut console(server.endpoint()));
    }
}
