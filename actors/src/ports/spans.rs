use crate::model::trace::BatchSpan;

/// Takes the spans of batches for whoever collects traces.
pub trait SpanSink: Send + Sync {
    /// Takes the span of a batch whose lease has ended. It never waits and never fails: a span that there is no room for is
    /// dropped and counted.
    fn take(&self, span: BatchSpan);
}
