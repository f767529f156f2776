use std::{future::Future, sync::Arc};

use crate::{
    model::rate_share::{PROCESSES_MAX, RateLease, RateLeases},
    ports::RateTable,
};

/// The contract of the table of leased rates. Each case gets an empty table.
pub async fn rates<F: Future<Output = Arc<dyn RateTable>>>(make: impl Fn() -> F) {
    an_unknown_destination_is_empty(make().await).await;
    what_is_stored_is_read_back_whole(make().await).await;
    only_the_next_version_is_stored(make().await).await;
    of_two_writers_one_is_faster(make().await).await;
    destinations_do_not_meet(make().await).await;
    a_table_without_leases_keeps_its_version(make().await).await;
    as_many_leases_as_there_may_be(make().await).await;
}

fn table(version: u64, processes: &[&str]) -> RateLeases {
    let lease = |process: &&str| RateLease {
        process: (*process).to_owned(),
        rate_milli: 333_333,
        wants_milli: 0,
        // The largest values that a configuration allows.
        capacity_milli: u64::from(u32::MAX) * 1000,
        lease_ms: 51_200,
        renewed: version,
    };
    RateLeases { version, leases: processes.iter().map(lease).collect() }
}

async fn an_unknown_destination_is_empty(store: Arc<dyn RateTable>) {
    assert_eq!(store.load("d").await, Ok(RateLeases::default()));
    assert_eq!(store.store("d", &table(2, &["a"])).await, Ok(false), "version 1 comes first");
    assert_eq!(store.load("d").await, Ok(RateLeases::default()));
}

async fn what_is_stored_is_read_back_whole(store: Arc<dyn RateTable>) {
    let written = table(1, &["vm-1/4711", "vm-2:\"ü\"", ""]);
    assert_eq!(store.store("d", &written).await, Ok(true));
    assert_eq!(store.load("d").await, Ok(written));
    let mut next = table(2, &["vm-1/4711"]);
    next.leases[0].rate_milli = 0;
    assert_eq!(store.store("d", &next).await, Ok(true));
    assert_eq!(store.load("d").await, Ok(next));
}

async fn only_the_next_version_is_stored(store: Arc<dyn RateTable>) {
    assert_eq!(store.store("d", &table(1, &["a"])).await, Ok(true));
    assert_eq!(store.store("d", &table(2, &["b"])).await, Ok(true));
    for version in [0, 1, 2, 4, u64::MAX] {
        assert_eq!(store.store("d", &table(version, &["c"])).await, Ok(false), "version {version}");
    }
    assert_eq!(store.load("d").await, Ok(table(2, &["b"])));
}

async fn of_two_writers_one_is_faster(store: Arc<dyn RateTable>) {
    for version in 1..=20 {
        let (a, b) = (table(version, &["a"]), table(version, &["b"]));
        let (first, second) = tokio::join!(store.store("d", &a), store.store("d", &b));
        let winner = match (first, second) {
            (Ok(true), Ok(false)) => a,
            (Ok(false), Ok(true)) => b,
            both => panic!("version {version}: {both:?}"),
        };
        assert_eq!(store.load("d").await, Ok(winner));
    }
}

async fn destinations_do_not_meet(store: Arc<dyn RateTable>) {
    // `*` is the rate over all destinations; no destination can be named so.
    for name in ["d", "D", "d ", "*", "all"] {
        assert_eq!(store.store(name, &table(1, &[name])).await, Ok(true), "{name:?}");
    }
    assert_eq!(store.load("*").await, Ok(table(1, &["*"])));
}

async fn a_table_without_leases_keeps_its_version(store: Arc<dyn RateTable>) {
    assert_eq!(store.store("d", &table(1, &["a"])).await, Ok(true));
    assert_eq!(store.store("d", &table(2, &[])).await, Ok(true));
    assert_eq!(store.load("d").await, Ok(table(2, &[])));
    assert_eq!(store.store("d", &table(1, &["a"])).await, Ok(false));
}

async fn as_many_leases_as_there_may_be(store: Arc<dyn RateTable>) {
    let names: Vec<_> = (0..PROCESSES_MAX).map(|index| format!("{index:0>64}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let full = table(1, &names);
    assert_eq!(store.store("d", &full).await, Ok(true));
    assert_eq!(store.load("d").await, Ok(full));
}
