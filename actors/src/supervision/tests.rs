//! The mechanism, seen from outside: what happens to a tree whose children panic, fail, hang and drain.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use actix::{Actor, ActorContext as _, Addr, Arbiter, Context, Handler, Message, Recipient};
use tokio::sync::oneshot;

use super::*;
use crate::{
    model::{backoff::Backoff, restart::RestartPolicy, time::UnixMs},
    testing::TokioClock,
};

type Log = Arc<Mutex<Vec<String>>>;

#[derive(Clone, Copy, Message)]
#[rtype(result = "()")]
enum Poke {
    Panic,
    Fail,
    Orphan,
}

struct Worker {
    name: String,
    log: Log,
    fault: Fault,
    drains: bool,
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.log.lock().unwrap().push(format!("{} started", self.name));
    }
}

impl Handler<Poke> for Worker {
    type Result = ();

    fn handle(&mut self, poke: Poke, context: &mut Self::Context) {
        match poke {
            Poke::Panic => panic!("poked"),
            Poke::Fail => self.fault.fail(context, "poked"),
            Poke::Orphan => self.fault.end(context, Exit::Orphaned("a sibling is gone".to_owned())),
        }
    }
}

impl Handler<Drain> for Worker {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        if self.drains {
            self.log.lock().unwrap().push(format!("{} drained", self.name));
            context.stop();
        }
    }
}

/// A tree under test: its log, the newest address of each child, and the root's exit code.
struct Tree {
    log: Log,
    pokes: Arc<Mutex<std::collections::HashMap<String, Recipient<Poke>>>>,
    settings: SupervisorSettings,
}

impl Tree {
    fn new(max_restarts: u32) -> Self {
        let restarts = RestartPolicy {
            max_restarts,
            period: Duration::from_mins(1),
            backoff: Backoff::new(Duration::from_millis(10), Duration::from_millis(100)),
        };
        let settings = SupervisorSettings {
            restarts,
            drain_timeout: Duration::from_millis(500),
            arbiters: vec![Arbiter::current()],
            clock: Arc::new(TokioClock::at(UnixMs(0))),
            metrics: crate::metrics::StageMetrics::default(),
            actors: ActorBoard::default(),
            parking: None,
        };
        Self { log: Log::default(), pokes: Arc::default(), settings }
    }

    fn worker(&self, name: &'static str, rank: usize, drains: bool) -> ChildSpec {
        let (log, pokes) = (self.log.clone(), self.pokes.clone());
        let factory: Factory = Arc::new(move |birth: Birth| {
            let (log, fault) = (log.clone(), birth.fault.clone());
            let full_name = format!("{name}#{}", birth.id.generation);
            let address = birth.start(4, move |_| Worker { name: full_name, log, fault, drains });
            pokes.lock().unwrap().insert(name.to_owned(), address.clone().recipient());
            address.recipient()
        });
        ChildSpec { name, of: None, count: 1, factory, rank }
    }

    fn start(&self, specs: Vec<ChildSpec>) -> (Addr<Supervisor>, oneshot::Receiver<i32>) {
        let (ended, code) = oneshot::channel();
        (Supervisor::root("root", specs, self.settings.clone(), ended).start(), code)
    }

    async fn poke(&self, name: &str, poke: Poke) {
        let recipient = self.pokes.lock().unwrap()[name].clone();
        let _ = recipient.send(poke).await; // the actor dies of it
    }

    async fn until_logged(&self, line: &str) {
        for _ in 0..2000 {
            if self.log.lock().unwrap().iter().any(|logged| logged == line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("`{line}` never came: {:?}", self.log.lock().unwrap());
    }

    fn logged(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

#[actix::test]
async fn a_child_that_panics_or_fails_is_restarted_and_its_sibling_is_not_disturbed() {
    let tree = Tree::new(5);
    let (_root, _code) = tree.start(vec![tree.worker("a", 0, true), tree.worker("b", 0, true)]);
    tree.until_logged("a#1 started").await;
    tree.poke("a", Poke::Panic).await;
    tree.until_logged("a#2 started").await;
    tree.poke("a", Poke::Fail).await;
    tree.until_logged("a#3 started").await;
    assert_eq!(tree.settings.metrics.restarts("a", None).get(), 2);
    assert_eq!(tree.logged().iter().filter(|line| line.starts_with('b')).count(), 1);
}

#[actix::test]
async fn one_generation_restarts_as_a_whole() {
    let tree = Tree::new(5);
    let specs = vec![tree.worker("batcher", 0, true), tree.worker("parser", 1, true)];
    let feed = Supervisor::nested("feed", None, 0, Strategy::OneForAll, tree.settings.clone(), move || {
        specs.clone()
    });
    let (_root, _code) = tree.start(vec![feed, tree.worker("other", 0, true)]);
    tree.until_logged("parser#1 started").await;
    tree.poke("parser", Poke::Panic).await;
    tree.until_logged("parser#2 started").await;
    tree.until_logged("batcher#2 started").await;
    assert_eq!(tree.logged().iter().filter(|line| line.starts_with("other")).count(), 1);
}

#[actix::test]
async fn f14_an_orphan_that_is_reported_first_does_not_hide_what_its_sibling_died_of() {
    let tree = Tree::new(0);
    let (say, mut said) = tokio::sync::mpsc::unbounded_channel();
    let parked = SupervisorSettings {
        parking: Some(Parking {
            backoff: Backoff::new(Duration::from_millis(5), Duration::from_millis(20)),
            say: Arc::new(move |why| say.send(why.map(str::to_owned)).expect("the test reads")),
        }),
        ..tree.settings.clone()
    };
    let specs = vec![tree.worker("batcher", 0, true), tree.worker("parser", 1, true)];
    let feed = Supervisor::nested("feed", None, 0, Strategy::OneForAll, parked, move || specs.clone());
    let (_root, _code) = tree.start(vec![feed]);
    for life in 1..20 {
        tree.until_logged(&format!("parser#{life} started")).await;
        let [parser, batcher] = ["parser", "batcher"].map(|name| tree.pokes.lock().unwrap()[name].clone());
        parser.try_send(Poke::Orphan).expect("its mailbox is empty");
        batcher.try_send(Poke::Panic).expect("its mailbox is empty");
        let why = said.recv().await.flatten();
        assert_eq!(why.as_deref(), Some("batcher fails again and again: poked"), "life {life}");
    }
}

#[actix::test]
async fn past_the_intensity_the_failure_climbs_to_the_root_and_the_code_is_70() {
    let tree = Tree::new(2);
    let specs = vec![tree.worker("parser", 0, true)];
    let feed = Supervisor::nested("feed", None, 0, Strategy::OneForAll, tree.settings.clone(), move || {
        specs.clone()
    });
    let (_root, code) = tree.start(vec![feed, tree.worker("other", 1, true)]);
    // Three lives per feed supervisor (two restarts), three feed supervisors: the ninth panic is the last.
    let poker = async {
        loop {
            if tree.pokes.lock().unwrap().contains_key("parser") {
                tree.poke("parser", Poke::Panic).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        code = code => assert_eq!(code, Ok(EXIT_SOFTWARE)),
        () = poker => unreachable!(),
        () = tokio::time::sleep(Duration::from_secs(20)) => panic!("it never ended: {:?}", tree.logged()),
    }
    let started =
        tree.logged().iter().filter(|line| line.starts_with("parser") && line.ends_with("started")).count();
    assert_eq!(started, 9);
    assert!(tree.logged().contains(&"other#1 drained".to_owned()), "the others drain first");
}

#[actix::test]
async fn f58_what_is_parked_is_tried_again_for_ever_and_trusted_once_it_lives() {
    let mut tree = Tree::new(2);
    tree.settings.restarts.period = Duration::from_secs(1);
    let said: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
    let say = said.clone();
    let parked = SupervisorSettings {
        parking: Some(Parking {
            backoff: Backoff::new(Duration::from_millis(5), Duration::from_millis(20)),
            say: Arc::new(move |why| say.lock().unwrap().push(why.map(str::to_owned))),
        }),
        ..tree.settings.clone()
    };
    let specs = vec![tree.worker("parser", 0, true)];
    let feed = Supervisor::nested("feed", None, 0, Strategy::OneForAll, parked, move || specs.clone());
    let (root, code) = tree.start(vec![feed, tree.worker("other", 0, true)]);
    tree.until_logged("parser#1 started").await;
    for life in 1..12 {
        tree.until_logged(&format!("parser#{life} started")).await;
        tree.poke("parser", Poke::Fail).await;
    }
    tree.until_logged("parser#12 started").await;
    assert_eq!(said.lock().unwrap().len(), 9, "the third failure is one too many, and all that follow");
    assert!(
        said.lock().unwrap().iter().all(|why| why.as_deref() == Some("parser fails again and again: poked"))
    );
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(said.lock().unwrap().last(), Some(&None), "it has lived for the period");
    tree.poke("parser", Poke::Panic).await;
    tree.until_logged("parser#13 started").await;
    assert_eq!(said.lock().unwrap().last(), Some(&None), "one failure is not too many");
    assert_eq!(tree.logged().iter().filter(|line| line.starts_with("other")).count(), 1);
    root.send(Shutdown { code: 0, within: Duration::from_millis(500) }).await.unwrap();
    assert_eq!(code.await, Ok(0));
}

#[actix::test]
async fn ranks_drain_from_upstream_to_downstream_and_one_that_hangs_is_ended() {
    let tree = Tree::new(5);
    let (root, code) = tree.start(vec![
        tree.worker("store", 0, true),
        tree.worker("hung", 1, false),
        tree.worker("watcher", 2, true),
    ]);
    tree.until_logged("watcher#1 started").await;
    root.send(Shutdown { code: 0, within: Duration::from_millis(500) }).await.unwrap();
    assert_eq!(code.await, Ok(0));
    let drained: Vec<_> = tree.logged().into_iter().filter(|line| line.ends_with("drained")).collect();
    assert_eq!(drained, ["watcher#1 drained", "store#1 drained"]);
}

#[actix::test]
async fn a_factory_that_panics_counts_as_a_restart() {
    let tree = Tree::new(3);
    let births = Arc::new(AtomicUsize::new(0));
    let counted = births.clone();
    let factory: Factory = Arc::new(move |birth: Birth| {
        let counted = counted.clone();
        birth
            .start(4, move |_| -> Worker {
                counted.fetch_add(1, Ordering::Relaxed);
                panic!("no birth")
            })
            .recipient()
    });
    let (_root, code) =
        tree.start(vec![ChildSpec { name: "stillborn", of: None, count: 1, factory, rank: 0 }]);
    assert_eq!(code.await, Ok(EXIT_SOFTWARE));
    assert_eq!(births.load(Ordering::Relaxed), 4);
}
