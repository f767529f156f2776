//! Entries that can never be delivered: they go to the dead-letter queue with the reason as a message attribute,
//! and only then out of the queue.
//!
//! An entry whose batch the store does not know goes there too. Retention may have removed a settled batch whose
//! entry came once more; but a store that was restored from an older backup, or the wrong store, looks the
//! same, and then the entry is the only trace of its messages. A dead letter too many can be purged; one that
//! was deleted can't be brought back.

use std::{sync::Arc, time::Duration};

use super::{Desk, calls::Outgoing, stock::Receipt};

/// How long an entry is hidden that can't be moved to the dead-letter queue now.
const BURIAL_WAIT: Duration = Duration::from_mins(15);

/// The longest reason that travels.
const REASON_BYTES_MAX: usize = 256;

/// One such entry.
pub(super) struct DeadLetter {
    pub(super) receipt: Receipt,
    pub(super) body: Arc<str>,
    /// Its message group, in a FIFO queue.
    pub(super) group: Option<String>,
    /// Why, without any of the body's text.
    pub(super) reason: String,
}

impl Desk {
    /// Moves entries to the dead-letter queue. Returns those that may be deleted; the others are hidden.
    pub(super) async fn bury(&self, dead: Vec<DeadLetter>) -> Vec<Receipt> {
        let mut buried = Vec::new();
        let mut hide = Vec::new();
        for letter in dead {
            let DeadLetter { receipt, body, group, reason } = letter;
            tracing::error!(message = receipt.message, reason, "an entry of the queue can't be delivered");
            self.calls.observer.rejected("sqs", "ReceiveMessage", "dead_letter", 1);
            let Some(queue) = &self.settings.dead_letter_url else {
                hide.push((receipt, BURIAL_WAIT));
                continue;
            };
            // A dead-letter queue is of its queue's kind ("Using dead-letter queues in Amazon SQS").
            let fifo = self
                .settings
                .is_fifo()
                .then(|| (group.unwrap_or_else(|| "postrider".to_owned()), receipt.message.clone()));
            let mut reason = reason;
            reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
            let message =
                Outgoing { id: "dead".into(), body, delay: Duration::ZERO, fifo, reason: Some(reason) };
            match self.calls.send(queue, std::slice::from_ref(&message)).await {
                Ok(refusals) if refusals.is_empty() => buried.push(receipt),
                Ok(refusals) => {
                    let why = refusals.into_values().next().map(|refusal| refusal.why);
                    tracing::warn!(
                        message = receipt.message,
                        why,
                        "the dead-letter queue does not take it; it stays hidden"
                    );
                    hide.push((receipt, BURIAL_WAIT));
                }
                Err(failure) => {
                    let why = failure.why;
                    tracing::warn!(
                        message = receipt.message,
                        why,
                        "the dead-letter queue can't be reached; it stays hidden"
                    );
                    hide.push((receipt, BURIAL_WAIT));
                }
            }
        }
        self.hide(hide).await;
        buried
    }
}
