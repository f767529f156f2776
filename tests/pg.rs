//! The server that other tests are run on is what it says.
#![cfg(feature = "postgres")]

#[path = "pg/mod.rs"]
mod pg;

use pg::{Postgres, Stop};

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn a_server_keeps_its_data_over_a_crash() {
    let server = Postgres::start();
    server.execute("CREATE TABLE t (i int); INSERT INTO t VALUES (7)");
    for how in [Stop::Crash, Stop::Fast] {
        server.stop(how);
        server.resume();
        assert_eq!(server.value("SELECT i::text FROM t"), "7");
    }
}
