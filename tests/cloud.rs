//! That the fault layer does what tests of the cloud mode rely on: every injection, seen through the SDK in front
//! of the real emulators, and exact counts. `script/test` installs the emulators and sets `POSTRIDER_MINISTACK`
//! and `POSTRIDER_DYNOXIDE`.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    process::{Command, Stdio},
    time::Duration,
};

use cloud::{Server, sdk_config};
use tokio::time::Instant;

#[path = "cloud/dynamodb_tests.rs"]
mod dynamodb_tests;
#[path = "cloud/sqs_tests.rs"]
mod sqs_tests;

/// An SDK error's code.
fn code<E, R>(error: &aws_sdk_sqs::error::SdkError<E, R>) -> Option<&str>
where
    E: aws_sdk_sqs::error::ProvideErrorMetadata,
{
    error.as_service_error()?.code()
}

fn is_up(endpoint: &str) -> bool {
    TcpStream::connect(endpoint.strip_prefix("http://").expect("it is one")).is_ok()
}

fn wait_down(endpoint: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    while is_up(endpoint) {
        assert!(Instant::now() < until, "{endpoint} goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "needs POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE, which script/test sets"]
fn emulators_end_with_their_owner_and_outlive_the_thread_that_started_them() {
    let emulators = std::thread::spawn(cloud::Emulators::start).join().expect("they start");
    std::thread::sleep(Duration::from_millis(100));
    let endpoints = [emulators.sqs().endpoint().to_owned(), emulators.dynamodb().endpoint().to_owned()];
    assert!(endpoints.iter().all(|endpoint| is_up(endpoint)));
    drop(emulators);
    for endpoint in &endpoints {
        wait_down(endpoint);
    }
}

const HOLD: &str = "POSTRIDER_TEST_HOLD_EMULATOR";

/// The process that the next test kills; nothing by itself.
#[test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
fn hold_an_emulator_to_be_killed() {
    if env::var_os(HOLD).is_some() {
        let server = Server::dynamodb();
        println!("\nholding {}", server.endpoint());
        std::thread::sleep(Duration::from_mins(1));
    }
}

#[test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
fn an_emulator_ends_with_a_killed_process() {
    let mut owner = Command::new(env::current_exe().expect("this binary"))
        .args(["--exact", "hold_an_emulator_to_be_killed", "--ignored", "--nocapture"])
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this binary runs");
    let lines = BufReader::new(owner.stdout.take().expect("it is piped")).lines();
    let endpoint = lines
        .map_while(Result::ok)
        .find_map(|line| Some(line.strip_prefix("holding ")?.to_owned()))
        .expect("it starts the emulator");
    assert!(is_up(&endpoint));
    owner.kill().expect("it runs");
    owner.wait().expect("it is our child");
    wait_down(&endpoint);
}
