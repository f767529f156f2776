use crate::model::ids::BatchId;

/// Where a process notes what it has in flight, so that its next life knows what it died with (B17).
///
/// It survives the process and needs no system call per message. Slots are small numbers; each is used by one task at a
/// time.
pub trait InFlight: Send + Sync {
    /// A slot of the caller's own.
    fn enter(&self) -> u32;

    /// Notes that the message at `index` of `batch` is begun in `slot`; `None`: several messages of it, in one statement.
    fn begin(&self, slot: u32, batch: BatchId, index: Option<u32>);

    /// Notes that nothing is in flight in `slot` any more.
    fn end(&self, slot: u32);

    /// Gives the slot back.
    fn leave(&self, slot: u32);
}

/// A process that notes nothing: its next life knows nothing.
impl InFlight for () {
    fn enter(&self) -> u32 {
        0
    }

    fn begin(&self, _slot: u32, _batch: BatchId, _index: Option<u32>) {}

    fn end(&self, _slot: u32) {}

    fn leave(&self, _slot: u32) {}
}
