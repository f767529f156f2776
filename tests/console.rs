//! What commands are told and do is the same on every store: one story, told by each of them.

use std::{path::Path, sync::Arc};

use postrider::{
    adapters::embedded::{EmbeddedStore, Operator, Viewer},
    console::{DeadFilter, Delivery, Fate, FileSelector, Operate, Position, Search, View},
};
use postrider_actors::{
    model::{
        batch::{NewBatch, Rows},
        ids::{BatchId, MessageId},
        outcome::{Attempt, DeathCause, Verdict},
        record::{DETAIL_BYTES_MAX, MessageRecord},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Claim, ClaimRequest, Claims, LeaseToken, Ledger, Outbox, OutstandingQuery, Settlement},
    testing::fixtures,
};
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

/// A daemon's side of a store.
struct Daemon {
    runtime: Runtime,
    outbox: Arc<dyn Outbox>,
    claims: Arc<dyn Claims>,
    ledger: Arc<dyn Ledger>,
}

impl Daemon {
    /// Dispatches what is outstanding, claims `batch` and records `verdicts`.
    fn settle(&self, batch: BatchId, verdicts: Vec<(u32, Verdict)>, retries: Vec<NewBatch>) {
        self.settle_with(batch, verdicts, retries, Vec::new());
    }

    fn settle_with(
        &self,
        batch: BatchId,
        verdicts: Vec<(u32, Verdict)>,
        retries: Vec<NewBatch>,
        records: Vec<MessageRecord>,
    ) {
        self.runtime.block_on(async {
            let query =
                OutstandingQuery { due_by: UnixMs(u64::MAX), limit: 100, with_batches: false, except: &[] };
            let entries = self.outbox.outstanding(query).await.unwrap();
            let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
            self.outbox.mark_dispatched(&ids).await.unwrap();
            let request = ClaimRequest {
                holder: "n-1/w#1".into(),
                batches: vec![batch],
                until: UnixMs(u64::MAX / 2_000),
                now: NOW,
            };
            let claims = self.claims.claim(request).await.unwrap();
            let [(_, Claim::Granted { fence, .. })] = claims[..] else { panic!("not granted: {claims:?}") };
            let token = LeaseToken { batch, fence };
            self.ledger.settle(vec![Settlement { token, verdicts, retries, records }]).await.unwrap();
        });
    }
}

/// The retry of one message of `batch`.
fn retry(batch: &NewBatch, index: usize, attempt: Attempt, not_before: UnixMs) -> NewBatch {
    let rows = Rows::decode(batch.payload.clone()).unwrap();
    let first_row = rows.row(index);
    let header = batch.header.clone();
    NewBatch {
        id: BatchId::derive(header.file, &header.destination, first_row, 0, 1),
        first_row,
        count: 1,
        attempt: 1,
        not_before,
        payload: rows.select([index]).finish(),
        history: vec![vec![attempt]],
        header,
        ..batch.clone()
    }
}

fn told(view: &mut dyn View, id: MessageId, destination: &str) -> Delivery {
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
    let first = fixtures::batch(&file, "d", [1, 2, 5], NOW);
    let id = MessageId { file: file.id, row: 1 };

    let delivery = told(view, id, "d");
    assert_eq!((delivery.state, delivery.recipient.as_deref()), (MessageState::Accepted, Some("user-1")));
    assert_eq!((delivery.not_before, delivery.accepted_at), (Some(NOW), NOW));

    let (failed, again) = (fixtures::failed(at(1)), fixtures::failed(at(2)));
    let carried = retry(&first, 0, failed, at(50));
    let verdicts = vec![
        (0, Verdict::Retry { attempt: failed, not_before: at(50) }),
        (1, Verdict::Dead { attempt: again, cause: DeathCause::Age }),
    ];
    // The destination's words on what it was told are kept with a dead letter, and only there.
    let said = |row, state, detail: String| MessageRecord {
        id: MessageId { file: file.id, row },
        destination: "d".into(),
        feed: "f".into(),
        recipient: format!("user-{row}").into(),
        state,
        attempts: 1,
        status: 503,
        reason: Some(again.reason),
        detail: Some(detail.into()),
        provider_id: None,
        accepted_at: NOW,
        at: at(2),
    };
    let records = vec![
        said(1, MessageState::Retrying, "not now".to_owned()),
        said(2, MessageState::Dead, format!("{WORDS}ü, and this is too much")),
    ];
    daemon.settle_with(first.id, verdicts, vec![carried.clone()], records);
    let delivery = told(view, id, "d");
    assert_eq!((delivery.state, delivery.not_before), (MessageState::Retrying, Some(at(50))));
    assert_eq!((&delivery.failed[..], delivery.sent, delivery.cause), (&[failed][..], None, None));

    let last = fixtures::failed(at(60));
    let verdicts = vec![(0, Verdict::Dead { attempt: last, cause: DeathCause::Attempts })];
    daemon.settle(carried.id, verdicts, Vec::new());
    let delivery = told(view, id, "d");
    assert_eq!((delivery.state, delivery.cause), (MessageState::Dead, Some(DeathCause::Attempts)));
    assert_eq!((&delivery.failed[..], delivery.not_before), (&[failed, last][..], None));
    assert_eq!(told(view, id, "e").state, MessageState::Accepted);

    dead_letters(view);
    counts(view, operate);
    searches(view);

    let given_up = DeadFilter { cause: Some(DeathCause::Attempts), ..DeadFilter::default() };
    assert_eq!(operate.redrive(&given_up, 9, at(100)).unwrap(), 1);
    assert_eq!(operate.redrive(&given_up, 9, at(100)).unwrap(), 0);
    let delivery = told(view, id, "d");
    assert_eq!((delivery.state, delivery.drive), (MessageState::Retrying, 1));
    assert_eq!(delivery.failed, [failed, last], "a redrive forgets no attempt");
    let redriven = BatchId::derive(file.id, "d", 1, 1, 0);
    daemon.settle(redriven, vec![(0, Verdict::Sent { at: at(130), status: 202 })], Vec::new());
    let delivery = told(view, id, "d");
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
    assert_eq!((views["d"].outstanding, views["d"].disabled.is_some()), (0, false));

    operate.disable("d", "for repairs", at(5)).unwrap();
    operate.disable("d", "another reason", at(6)).unwrap();
    assert_eq!(view.destinations().unwrap()["d"].disabled, Some((at(5), "for repairs".into())));
    assert!(operate.enable("d").unwrap());
    assert!(!operate.enable("d").unwrap());
    assert!(view.destinations().unwrap()["d"].disabled.is_none());
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
    let daemon = Daemon { runtime, outbox: store.clone(), claims: store.clone(), ledger: store };
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
    use postrider::adapters::{
        clock::SystemClock,
        dynamodb::{Console, DynamoSettings, DynamoStore, migrate},
    };

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

    fn console(endpoint: &str) -> Console {
        let runtime = Runtime::new().unwrap();
        let settings = DynamoSettings::new("console", "operator-1");
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
                sweep_after: std::time::Duration::ZERO,
                sweep_interval: std::time::Duration::ZERO,
                ..DynamoSettings::new("console", "n-1")
            };
            migrate(&client, &settings).await.unwrap();
            let clock = Arc::new(SystemClock);
            Arc::new(DynamoStore::open(&client, settings, clock, Arc::new(())).await.unwrap())
        });
        let daemon = Daemon { runtime, outbox: store.clone(), claims: store.clone(), ledger: store };
        story(&daemon, &mut console(server.endpoint()), &mut console(server.endpoint()));
    }
}
