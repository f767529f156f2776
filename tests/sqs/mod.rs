//! Queues on an emulator, behind a proxy that counts and disturbs.
#![allow(dead_code, reason = "shared by several test binaries; none of them uses everything")]
#![allow(unreachable_pub, reason = "`pub` is for the binaries that take this module in")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_sdk_sqs::{Client, config::timeout::TimeoutConfig};
use postrider_actors::{
    model::time::UnixMs,
    ports::Clock,
    testing::{FakeClock, MemoryStore},
};
use postrider_aws::{
    AwsSettings,
    sqs::{
        SqsQueue, SqsSettings,
        provision::{Expected, Provisioner, QueueNames},
    },
};

use super::cloud::{FaultProxy, Server, sdk_config};

/// When all tests happen, by the fake clock.
pub const NOW: UnixMs = UnixMs(1_700_000_000_000);

/// How long the client waits for an answer, so that a hang is soon over.
const ATTEMPT: Duration = Duration::from_millis(1_500);

/// An emulator with a proxy in front of it.
pub struct Queues {
    pub server: Server,
    pub proxy: FaultProxy,
    pub client: Client,
    /// Past the proxy.
    pub direct: Client,
    made: AtomicU32,
}

impl Queues {
    pub fn start() -> Self {
        let server = Server::sqs();
        let proxy = FaultProxy::start(server.endpoint());
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).build();
        let config = sdk_config(proxy.endpoint()).into_builder().timeout_config(timeouts).build();
        let direct = Client::new(&sdk_config(server.endpoint()));
        Self { client: Client::new(&config), direct, server, proxy, made: AtomicU32::new(0) }
    }

    /// A queue and its dead-letter queue, as `postrider migrate` makes them; their URLs.
    pub async fn create(&self, suffix: &str) -> (String, String) {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let names = QueueNames {
            queue: format!("q-{number}{suffix}"),
            dead_letters: format!("q-{number}-dead{suffix}"),
        };
        let made = Provisioner::new(self.client.clone(), &aws(), Arc::new(()))
            .provision(&names, &expected(suffix))
            .await
            .expect("ministack makes queues");
        assert_eq!(made.created, [names.dead_letters, names.queue]);
        assert_eq!(made.differences, []);
        self.proxy.reset_counts();
        (made.queue_url, made.dead_letter_url)
    }

    /// A process at the queue.
    pub fn open(
        &self,
        settings: &SqsSettings,
        store: &Arc<MemoryStore>,
        clock: Arc<dyn Clock>,
    ) -> Arc<SqsQueue> {
        let (client, settings) = (self.client.clone(), settings.clone());
        Arc::new(SqsQueue::new(client, settings, store.clone(), store.clone(), clock, Arc::new(())))
    }
}

pub fn expected(suffix: &str) -> Expected {
    Expected {
        fifo: suffix == ".fifo",
        visibility: Duration::from_mins(1),
        max_bytes: 1_048_576,
        max_receives: 1_000,
    }
}

pub fn aws() -> AwsSettings {
    AwsSettings { attempt_timeout: ATTEMPT, max_attempts: 1, ..AwsSettings::default() }
}

/// As by default, but with short waits.
pub fn settings(url: &str, dead: &str) -> SqsSettings {
    SqsSettings {
        queue_url: url.into(),
        dead_letter_url: Some(dead.into()),
        process: "node-1".into(),
        wait: Duration::from_secs(1),
        delete_linger: Duration::from_millis(50),
        send_budget: Duration::from_secs(5),
        aws: aws(),
        ..SqsSettings::default()
    }
}

pub fn clock() -> Arc<FakeClock> {
    Arc::new(FakeClock::at(NOW))
}
