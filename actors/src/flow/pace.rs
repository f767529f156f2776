use crate::model::throughput::Rates;

/// Logs a worker's throughput of the last minute (S4.7).
pub fn log_rates(worker: &str, rates: Rates) {
    let (per_hour, per_day) = (rates.per_hour() as u64, rates.per_day() as u64);
    tracing::info!(worker, processed = rates.processed, per_hour, per_day, "throughput of the last minute");
}
