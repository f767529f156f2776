use std::fmt;

use actix::{MailboxError, Message, Recipient};

use crate::flow::{Meter, Waits};

/// The way to an actor for one kind of message, with the meter that counts what waits there. Clones lead to the same one.
pub struct Inlet<M: Message<Result = ()> + Send>
where
    M: 'static,
{
    recipient: Recipient<Letter<M>>,
    meter: Meter,
}

/// A message in a mailbox. It is counted until it is opened, or dropped with the mailbox.
pub struct Letter<M> {
    message: M,
    waits: Waits,
}

impl<M: Message<Result = ()>> Message for Letter<M> {
    type Result = ();
}

impl<M> Letter<M> {
    /// The message, which waits no longer.
    pub fn open(self) -> M {
        drop(self.waits);
        self.message
    }
}

impl<M: Message<Result = ()> + Send + 'static> Inlet<M> {
    /// To a mailbox with `room` for so many messages.
    pub fn new(recipient: Recipient<Letter<M>>, room: usize, meter: Meter) -> Self {
        meter.has_mailbox(room);
        Self { recipient, meter }
    }

    /// Sends a message and waits until it is handled.
    pub async fn send(&self, message: M) -> Result<(), MailboxError> {
        self.recipient.send(Letter { message, waits: self.meter.waits() }).await
    }
}

impl<M: Message<Result = ()> + Send + 'static> Clone for Inlet<M> {
    fn clone(&self) -> Self {
        Self { recipient: self.recipient.clone(), meter: self.meter.clone() }
    }
}

impl<M: Message<Result = ()> + Send + 'static> fmt::Debug for Inlet<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inlet")
    }
}
