//! `config/default.toml`, made from the declarations.

use postrider_settings::{
    AlarmEvents, Aws, Batch, Canary, CloudwatchSource, DeadAlarm, Delay, Delivery, DepthAlarm, Directory,
    DiskAlarm, Dynamodb, FailuresAlarm, FeedQueue, Keys as _, LatencyAlarm, Lease, Ledger, Log, Ops, Outbox,
    Page, Pools, Postgres, Receipts, Record, Retry, Root, Shutdown, Sqs, State, Storm, TracingKeys,
    Warehouse,
};

use postrider_actors::model::conditions::TermKeys;
use postrider_http::webhook::WebhookKeys;

use super::{
    destination::{KindKeys, TableKeys},
    receipts::{DirectorySource, Fields, HttpSource, SourceKeys, SqsSource},
};

const HEAD: &str = "\
# Postrider's settings and their defaults. `postrider` is built from the declarations that this page is made from.
#
# Write your own file with only what differs (`postrider run -c FILE`). Any key can be set from the
# environment too, its path in any case and joined by two underscores, lists separated by commas:
#
#   POSTRIDER__POOLS__PARSERS=4
#   POSTRIDER__DESTINATIONS__SUPPORT__TIMEOUT=30s
#   POSTRIDER__FEEDS__ALERTS__DESTINATIONS=support,audit
#
# In names of feeds, destinations and headers `_` also matches `-`. The environment wins over
# your file, your file over this one. `postrider check-config -c FILE` says what is wrong, all at once.
#
# A time is written with its unit (\"250ms\", \"5s\", \"30m\", \"14d\"), and so is a size (\"512B\", \"64KiB\", \"1MiB\").
# A line that begins with `#key =` shows a key that has no default.

";

/// Every key with its help, range and default, as TOML.
pub fn default_toml() -> String {
    let mut page = Page::default();
    page.verbatim(HEAD).keys::<Root>();
    page.table::<State>("state")
        .table::<Log>("log")
        .table::<Pools>("pools")
        .table::<Batch>("batch")
        .table::<Canary>("canary")
        .table::<Outbox>("outbox")
        .table::<Dynamodb>("outbox.dynamodb")
        .table::<Sqs>("queue.sqs")
        .table::<Delay>("queue.delay")
        .table::<Aws>("aws")
        .table::<Lease>("lease")
        .table::<Record>("record")
        .table::<Delivery>("delivery")
        .table::<Shutdown>("shutdown")
        .table::<Ops>("ops")
        .table::<AlarmEvents>("alarms")
        .table::<DepthAlarm>("alarms.depth")
        .table::<FailuresAlarm>("alarms.failures")
        .table::<DiskAlarm>("alarms.disk")
        .table::<LatencyAlarm>("alarms.latency")
        .table::<DeadAlarm>("alarms.dead")
        .table::<TracingKeys>("tracing")
        .heading(
            "tracing.headers",
            &[
                "Headers that each request to the collector carries, up to 32. A value may be kept elsewhere, as secrets are;",
                "authorization and cookie must. For example: x-api-key = \"credential:tracing-key\".",
            ],
        )
        .table::<Ledger>("ledger")
        .table::<Postgres>("ledger.postgres")
        .table::<Receipts>("receipts");
    sources(&mut page);
    page.table::<Warehouse>("warehouses.\"*\"");
    page.heading(
        "feeds.\"*\"",
        &[
            "[feeds.\"*\"] sets the defaults of every [feeds.NAME]. A name is 1 to 64 characters out of a-z, 0-9, - and _.",
        ],
    )
    .keys::<postrider_settings::Feed>()
    .keys::<TermKeys>()
    .keys::<Directory>()
    .keys::<FeedQueue>();
    destinations(&mut page);
    page.finish()
}

fn sources(page: &mut Page) {
    page.heading(
        "receipts.sources.\"*\"",
        &["[receipts.sources.\"*\"] sets the defaults of every [receipts.sources.NAME]."],
    )
    .keys::<SourceKeys>()
    .keys::<DirectorySource>()
    .keys::<HttpSource>()
    .keys::<SqsSource>()
    .keys::<CloudwatchSource>()
    .heading("receipts.sources.\"*\".fields", Fields::ABOUT)
    .keys::<Fields>()
    .heading(
        "receipts.sources.\"*\".statuses",
        &[
            "What the provider's words mean: \"delivered\", \"failed\", \"sent\" (an interim report) or \"ignored\".",
            "For example: DELIVERED = \"delivered\", UNDELIV = \"failed\".",
        ],
    );
}

fn destinations(page: &mut Page) {
    page.heading(
        "destinations.\"*\"",
        &["[destinations.\"*\"] sets the defaults of every [destinations.NAME]."],
    )
    .keys::<KindKeys>()
    .keys::<postrider_settings::Destination>()
    .keys::<WebhookKeys>()
    .keys::<TableKeys>()
    .keys::<postrider_settings::Group>()
    .heading(
        "destinations.\"*\".headers",
        &[
            "Headers that each request carries, up to 32. A value may be kept elsewhere, as secrets are;",
            "authorization and cookie must. For example: x-team = \"growth\", authorization =",
            "\"credential:support-token\".",
        ],
    )
    .heading(
        "destinations.\"*\".columns",
        &[
            "kind = \"table\": what its columns hold, COLUMN = \"SOURCE TYPE required\". SOURCE is recipient, feed or",
            "data.NAME (keys joined by dots); TYPE is text (if left out), integer, numeric, double, boolean, timestamp,",
            "date or json; with required, a message without it is dead. Messages keep the columns they were accepted",
            "with. For example: user_id = \"recipient\", amount = \"data.amount numeric required\".",
        ],
    )
    .table::<Retry>("destinations.\"*\".retry")
    .table::<Storm>("destinations.\"*\".storm");
}
