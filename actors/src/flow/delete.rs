use std::time::Duration;

use super::back_off;
use crate::{
    model::backoff::Backoff,
    ports::{AckId, Intake, ItemOutcome},
};

/// Tries of a deletion.
const TRIES: u32 = 4;

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));

/// Deletes entries whose content is stored, a few times over. `Err`: how many are left, and why. They come again, are
/// known and are deleted then, so nobody has to wait for them.
pub async fn delete_entries(intake: &dyn Intake, acks: &[AckId]) -> Result<(), (usize, String)> {
    let mut left = acks.to_vec();
    let mut why = String::new();
    for failures in 0..TRIES {
        if failures > 0 {
            back_off(BACKOFF, failures).await;
        }
        match intake.delete(&left).await {
            Ok(outcomes) => {
                let failed = left.into_iter().zip(outcomes).filter_map(|(ack, outcome)| match outcome {
                    // `Permanent`: not ours any more; whoever gets it next finds it known.
                    ItemOutcome::Ok | ItemOutcome::Permanent(_) => None,
                    ItemOutcome::Retryable(error) | ItemOutcome::Unknown(error) => {
                        why = error;
                        Some(ack)
                    }
                });
                left = failed.collect();
            }
            Err(error) => why = error.to_string(),
        }
        if left.is_empty() {
            return Ok(());
        }
    }
    Err((left.len(), why))
}
