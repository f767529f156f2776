//! The cloud mode's surroundings for tests and benches: emulators of AWS services, and a proxy in front
//! of them that counts calls and injects what the emulators never do by themselves.
//!
//! A directory module, taken in with `#[path = "cloud/mod.rs"] mod cloud;`. Everything here may be called
//! from synchronous tests: servers are processes, a proxy runs on a thread and a runtime of its own.
//!
//! The usual order, from the back to the front:
//!
//! ```ignore
//! let emulators = Emulators::start();
//! let sqs = FaultProxy::start(emulators.sqs().endpoint());
//! sqs.inject(Rule::on("SendMessageBatch", Fault::fail_entries(3)).next(1));
//! let client = aws_sdk_sqs::Client::new(&sdk_config(sqs.endpoint()));
//! // … and at the end, that what the test is about did happen:
//! assert_eq!(sqs.injected("SendMessageBatch"), 1);
//! ```
#![allow(dead_code, reason = "shared by several test binaries and benches; none of them uses everything")]
#![allow(unreachable_pub, reason = "`pub` is for the binaries that take this module in")]

mod calls;
mod counts;
mod dynamodb;
pub mod emulators;
pub mod faults;
pub mod proxy;
mod replica;
mod sqs;
mod upstream;

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig};
use aws_sdk_sqs::config::{Credentials, SharedCredentialsProvider};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};

#[allow(unused_imports, reason = "as above: what a binary needs of it differs")]
pub use self::{
    counts::{Count, Counts},
    emulators::{Emulators, Server},
    faults::{Fault, Rule},
    proxy::FaultProxy,
};

/// The region of everything in tests.
pub const REGION: &str = "us-east-1";
/// The key of everything in tests. ministack takes a key of twelve digits for an account id; any other key
/// means the account 000000000000.
pub const ACCESS_KEY: &str = "test";
/// Its secret; the emulators check no signature.
pub const SECRET_KEY: &str = "test";

/// What an SDK client of a test needs. It never retries: a retry that a test does not see would hide a fault
/// and spoil a count.
pub fn sdk_config(endpoint: &str) -> SdkConfig {
    let credentials =
        Credentials::builder().access_key_id(ACCESS_KEY).secret_access_key(SECRET_KEY).provider_name("tests");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static(REGION))
        .credentials_provider(SharedCredentialsProvider::new(credentials.build()))
        .http_client(Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https())
        .retry_config(RetryConfig::disabled())
        .endpoint_url(endpoint)
        .build()
}

/// What a child process (the daemon) needs to find `endpoint`s through the SDK's own chain. Whatever else of
/// AWS is in the environment has to be removed by the caller.
pub fn sdk_environment(sqs: &str, dynamodb: &str) -> [(&'static str, String); 6] {
    [
        ("AWS_ENDPOINT_URL_SQS", sqs.to_owned()),
        ("AWS_ENDPOINT_URL_DYNAMODB", dynamodb.to_owned()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        // Otherwise the chain may look for a role on the network.
        ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
    ]
}
