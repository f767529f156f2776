//! What a warehouse is given.

use std::time::Duration;

use postrider_settings::Warehouse;
use secrecy::SecretString;

use crate::pg::CONNECT_TIMEOUT;

/// The most bytes of a statement that Postrider makes: half of what Redshift takes ("Quotas and limits": 16 MB).
pub const STATEMENT_BYTES_MAX: usize = 8_000_000;

/// One warehouse: a database that any number of tables are in.
#[derive(Clone, Debug)]
pub struct WarehouseSettings {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE`. `Debug` does not show it.
    pub url: SecretString,
    /// `[warehouses.NAME]`. As many connections are open as statements may be in flight.
    pub keys: Warehouse,
    /// To open a connection, and to wait for a free one.
    pub connect_timeout: Duration,
}

impl WarehouseSettings {
    /// With these keys.
    pub fn new(url: SecretString, keys: Warehouse) -> Self {
        Self { url, keys, connect_timeout: CONNECT_TIMEOUT }
    }
}
