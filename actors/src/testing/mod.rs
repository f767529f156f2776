//! Fakes and conformance suites.

mod clock;
pub mod conformance;
mod figure;
pub mod fixtures;
mod ledger_row;
mod memory_intake;
mod memory_rates;
mod memory_receipts;
mod memory_source;
mod memory_store;
mod memory_table;
mod memory_transport;

pub use clock::{FakeClock, TokioClock};
pub use figure::{counts, figure};
pub use ledger_row::{LedgerReceipt, LedgerRow, LedgerSource, LedgerTally, RowReader};
pub use memory_intake::{IntakeCalls, IntakeFaults, MemoryIntake};
pub use memory_rates::MemoryRateTable;
pub use memory_receipts::MemoryReceipts;
pub use memory_source::MemorySource;
pub use memory_store::MemoryStore;
pub use memory_table::{MemoryStatement, MemoryTable};
pub use memory_transport::{MemoryTransport, TransportFaults};
