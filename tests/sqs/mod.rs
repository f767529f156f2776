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
use postrider_aws::{
    AwsSettings,
    sqs::{SqsTransport, provision::Provisioner},
};
use postrider_settings::Sqs;

use super::cloud::{FaultProxy, Server, sdk_config};

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

    /// The queues of an installation of its own with these destinations, as `postrider migrate` makes them.
    pub async fn create(&self, fifo: bool, destinations: &[&str]) -> Sqs {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let names = Sqs { prefix: format!("q{number}"), fifo };
        let provisioner = Provisioner::new(self.direct.clone(), &aws(), Arc::new(()));
        let dead = provisioner.make(&names.dead_letters(), None).await.expect("ministack makes queues");
        let arn = provisioner.read(&dead).await.expect("it is there").arn.expect("it has an ARN");
        for destination in destinations {
            let url = provisioner
                .make(&names.queue_name(destination), Some(&arn))
                .await
                .expect("it makes this one");
            let found = provisioner.read(&url).await.expect("it is there");
            assert_eq!(found.differences(fifo), []);
        }
        self.proxy.reset_counts();
        names
    }

    /// What a process carries hints by.
    pub fn transport(&self, names: &Sqs) -> Arc<SqsTransport> {
        Arc::new(SqsTransport::new(self.client.clone(), &aws(), names.clone(), Arc::new(())))
    }

    /// Where a queue is.
    pub async fn url(&self, name: &str) -> String {
        let found = self.direct.get_queue_url().queue_name(name).send().await.expect("it is there");
        found.queue_url.expect("it has a URL")
    }
}

pub fn aws() -> AwsSettings {
    AwsSettings {
        attempt_timeout: ATTEMPT,
        poll_max: Duration::from_secs(1),
        max_attempts: 1,
        ..AwsSettings::default()
    }
}
