use std::time::Duration;

use crate::model::call::CallOutcome;

/// Watches calls to remote services (S2.7), for metrics. It must not block.
pub trait CallObserver: Send + Sync {
    /// A call has ended. `items`: how many entries, messages or rows it carried either way.
    fn call(
        &self,
        service: &'static str,
        operation: &'static str,
        outcome: CallOutcome,
        latency: Duration,
        items: usize,
    );

    /// Items of an answered call that were not taken, and why, in the service's own word.
    fn rejected(&self, _service: &'static str, _operation: &'static str, _why: &str, _items: usize) {}

    /// Capacity that a call consumed; `index` is `None` for the table itself.
    fn capacity(&self, _table: &str, _index: Option<&str>, _units: f64) {}
}

impl CallObserver for () {
    fn call(&self, _: &'static str, _: &'static str, _: CallOutcome, _: Duration, _: usize) {}
}
