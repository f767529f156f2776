//! Entries that can never be delivered: they go to the dead-letter queue with the reason as a message attribute,
//! and only then out of the queue.
//!
//! An entry whose rows the store has lost goes there too: it is the only trace of its messages.

use std::{sync::Arc, time::Duration};

use super::{Desk, calls::Outgoing, stock::Receipt};

/// How long an entry is hidden that can't be moved to the dead-letter queue now.
const MOVE_WAIT: Duration = Duration::from_mins(15);

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
    pub(super) async fn move_dead(&self, dead: Vec<DeadLetter>) -> Vec<Receipt> {
        let mut moved = Vec::new();
        let mut hide = Vec::new();
        for letter in dead {
            let DeadLetter { receipt, body, group, reason } = letter;
            tracing::error!(message = receipt.message, reason, "an entry of the queue can't be delivered");
            self.calls.service.rejected("ReceiveMessage", "dead_letter", 1);
            let Some(queue) = &self.settings.dead_letter_url else {
                hide.push((receipt, MOVE_WAIT));
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
                Ok(refusals) if refusals.is_empty() => moved.push(receipt),
                Ok(refusals) => {
                    let why = refusals.into_values().next().map(|refusal| refusal.why);
                    tracing::warn!(
                        message = receipt.message,
                        why,
                        "the dead-letter queue does not take it; it stays hidden"
                    );
                    hide.push((receipt, MOVE_WAIT));
                }
                Err(failure) => {
                    let why = failure.why;
                    tracing::warn!(
                        message = receipt.message,
                        why,
                        "the dead-letter queue can't be reached; it stays hidden"
                    );
                    hide.push((receipt, MOVE_WAIT));
                }
            }
        }
        self.hide(hide).await;
        moved
    }
}
