//! An inbound queue, as its owner uses it.

use crate::cloud::sdk_config;

/// The queue of a feed, as its owner uses it.
pub(crate) struct Inbound {
    runtime: tokio::runtime::Runtime,
    client: aws_sdk_sqs::Client,
    url: String,
}

impl Inbound {
    pub(crate) const NAME: &str = "inbound";

    pub(crate) fn new(sqs_endpoint: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = aws_sdk_sqs::Client::new(&sdk_config(sqs_endpoint));
        let made =
            runtime.block_on(client.create_queue().queue_name(Self::NAME).send()).expect("a new queue");
        let url = made.queue_url.expect("a queue has a URL");
        Self { runtime, client, url }
    }

    pub(crate) fn send(&self, bodies: &[String]) {
        for body in bodies {
            let send = self.client.send_message().queue_url(&self.url).message_body(body).send();
            self.runtime.block_on(send).expect("the emulator takes it");
        }
    }

    /// Entries that are not deleted.
    pub(crate) fn left(&self) -> u64 {
        use aws_sdk_sqs::types::QueueAttributeName as Name;
        let names = [Name::ApproximateNumberOfMessages, Name::ApproximateNumberOfMessagesNotVisible];
        let ask = self.client.get_queue_attributes().queue_url(&self.url);
        let ask = names.iter().fold(ask, |ask, name| ask.attribute_names(name.clone())).send();
        let found = self.runtime.block_on(ask).expect("the emulator answers");
        let count = |name: &Name| found.attributes()?.get(name)?.parse::<u64>().ok();
        names.iter().map(|name| count(name).expect("both are counted")).sum()
    }
}
