//! The tables: their layout, their version, making and checking them.
//!
//! # Layout, version 1
//!
//! **The outbox table** `NAME`: what batches carry, each content once (B4). It is written ahead of the batches that need
//! it and never changed but for its expiry: a write costs by an item's size, and these are large.
//!
//! | attribute | | |
//! |---|---|---|
//! | `Digest` | S | hash key: the first 128 bits of SHA-256 of `length of Header (u64, little-endian) Header Payload`, in hex |
//! | `Header` | S | `BatchHeader` as JSON, its destination empty: batches of several destinations share it |
//! | `Payload` | B | as `model::batch` encodes it |
//! | `ExpiresAt` | N | seconds; the table's TTL. Moved on while a batch needs it |
//!
//! **The ledger table** `NAME-ledger`, keyed by `Pk` and `Sk`: all that changes, and all that is about more than
//! one batch. `ROW` is 16 hex digits, `NODE` a process's name without its start number.
//!
//! | `Pk` | `Sk` | what |
//! |---|---|---|
//! | `batch#ID` | `batch` | a batch's record, see below |
//! | | `history#FENCE#DRIVE#ATTEMPT#INDEX` | failed attempts that were recorded together, named by the first of them: `Body`. Never rewritten (B3) |
//! | `file#ID` | `step#ROW` | the batches of a step, which ends with this row: `Batches`, JSON: the first rows of each destination's |
//! | | `file` | the file: `Record` (JSON), checkpoint, `State`, `ClosedAt`, `Owner`, `Reported` |
//! | | `file#DESTINATION#NODE` | what that node counted: `Sent`, `Dead`, `Retrying`, `Changes`, `LastAt`; to be summed. What was accepted follows from the checkpoint |
//! | | `rejects#ROW`, `duplicates#ROW` | chunks by their last row: `Body` |
//! | `files` | `STAMP#ID` | every file in the order of its first rows: `Name`, `Feed` |
//! | `open#NODE#FEED` | `STAMP#ID` | files whose final report that node has yet to write |
//! | `dead` | `FILE#DESTINATION#ROW#ID` | batches with dead messages, by their first row |
//! | `cluster` | `state` | what holds for all machines (B25), read by each once a second: `Version`, `Body`, JSON: `disabled` destinations, since when and why; files that are `held`; the `priorities` that were ordered last |
//! | `destinations` | `NAME` | every destination that was appended to |
//! | `depth` | `NODE#SLOT` | by how much a node changed the number of open messages of each destination: `Messages#DESTINATION`; to be summed |
//! | `entries#FEED#MINUTE` | `head` | entries of an inbound queue that were taken, by the minute in which they were sent (`model::entries`, B22): `Version`, `Count` of all, `Body`: the last of them; expires |
//! | | `VERSION` | a chunk of them: `Body`. Never rewritten; expires |
//! | `rate#DESTINATION` | `rate` | the leases of a shared rate |
//! | `schema` | `version` | `Version`; `Shard`, the most shards that batches were spread over |
//!
//! **A batch's record** is one item for its whole life. `model::ledger::codec` encodes its `Body`, which is absent while
//! nothing is recorded; beside it stands only what has to be found or conditioned on:
//!
//! | attribute | | |
//! |---|---|---|
//! | `Version` | N | counts every change but those of `Until`, `LookAt` and `KeptUntil` |
//! | `Fence`, `Holder`, `Until` | | the claim; `Until` by the wall clock |
//! | `File`, `Topic`, `FirstRow`, `Count`, `Rows`, `AcceptedAt`, `NotBefore` | | what never changes; `Rows` only if there are gaps between the rows |
//! | `Priority` | S | how urgent the file was when the rows were accepted, if that is not `normal` |
//! | `Digest`, `KeptUntil` | | what it carries, and until when that is kept at least, in seconds |
//! | `TopicShard` | S | `DESTINATION#NN`, NN = `model::shard` of the file id (S3.9); until it is archived |
//! | `Shard` | N | `model::shard` of the batch id, of `scan_concurrency` |
//! | `OutstandingCreatedTime` | N | microseconds; while nobody has it and messages are left |
//! | `DeliveryTime` | N | microseconds; since it was claimed, until it is outstanding again |
//! | `Due`, `Open` | | when it was due as it became outstanding, in milliseconds, and how many messages were open |
//! | `LookAt` | N | milliseconds by the store's time; when it is to be looked at, until it is done (B20) |
//! | `Owner` | S | the process, `NODE-START`, that looks after it: that made it outstanding, or has claimed or taken it over |
//!
//! The indexes are on the ledger table, for records are small. They are sparse: `Outstanding` (`TopicShard`,
//! `OutstandingCreatedTime`), `OutstandingAllTopics` (`Shard`, `LookAt`), `Delivered` (`TopicShard`, `DeliveryTime`),
//! `DeliveredAllTopics` (`Shard`, `DeliveryTime`). Times of creation and delivery are unique within a process and only
//! grow, so that batches of one file, which are in one shard, come in their order. A claim takes a batch from
//! `Outstanding` to `Delivered` and leaves `LookAt` alone; an extension changes no index.

use std::time::Duration;

use aws_sdk_dynamodb::{
    error::ProvideErrorMetadata as _,
    types::{
        AttributeDefinition, BillingMode, GlobalSecondaryIndex, IndexStatus, KeySchemaElement, KeyType,
        Projection, ProjectionType, ScalarAttributeType, TableDescription, TableStatus,
        TimeToLiveSpecification, TimeToLiveStatus,
    },
};
use postrider_actors::{model::call::Failure, ports::StoreError};

use super::{
    calls::{Calls, Tables},
    change::{Change, When, built},
    item::{
        ACCEPTED_AT, COUNT, DELIVERY_TIME, DIGEST, DUE, EXPIRES_AT, KEPT_UNTIL, LOOK_AT, OPEN,
        OUTSTANDING_CREATED_TIME, OWNER, PK, Reading, SHARD, SK, TOPIC, TOPIC_SHARD, VERSION, number,
    },
    keys::{DELIVERED, DELIVERED_ALL_TOPICS, OUTSTANDING, OUTSTANDING_ALL_TOPICS, ledger_key},
};

/// The layout that this program reads and writes.
pub const SCHEMA_VERSION: u32 = 1;

/// How long a table or index may take until it can be used. Indexes on a table with data take longer; then
/// `migrate` says so and can be run again.
const ACTIVE_WAIT: Duration = Duration::from_mins(10);
const ACTIVE_POLL: Duration = Duration::from_millis(500);

/// An index as it has to be.
pub(super) struct IndexSpec {
    pub(super) name: &'static str,
    pub(super) hash: (&'static str, ScalarAttributeType),
    pub(super) range: (&'static str, ScalarAttributeType),
    pub(super) include: &'static [&'static str],
}

pub(super) fn indexes() -> [IndexSpec; 4] {
    use ScalarAttributeType::{N, S};
    [
        IndexSpec {
            name: OUTSTANDING,
            hash: (TOPIC_SHARD, S),
            range: (OUTSTANDING_CREATED_TIME, N),
            include: &[TOPIC, COUNT, DUE],
        },
        IndexSpec {
            name: OUTSTANDING_ALL_TOPICS,
            hash: (SHARD, N),
            range: (LOOK_AT, N),
            include: &[TOPIC, COUNT, DUE, OPEN, OWNER, OUTSTANDING_CREATED_TIME],
        },
        IndexSpec {
            name: DELIVERED,
            hash: (TOPIC_SHARD, S),
            range: (DELIVERY_TIME, N),
            include: &[TOPIC, COUNT, DUE],
        },
        IndexSpec {
            name: DELIVERED_ALL_TOPICS,
            hash: (SHARD, N),
            range: (DELIVERY_TIME, N),
            include: &[TOPIC, COUNT, DUE, ACCEPTED_AT, DIGEST, KEPT_UNTIL],
        },
    ]
}

fn key(name: &str, kind: KeyType) -> Result<KeySchemaElement, Failure> {
    built(KeySchemaElement::builder().attribute_name(name).key_type(kind).build())
}

fn attribute(name: &str, kind: ScalarAttributeType) -> Result<AttributeDefinition, Failure> {
    built(AttributeDefinition::builder().attribute_name(name).attribute_type(kind).build())
}

fn global_index(spec: &IndexSpec) -> Result<GlobalSecondaryIndex, Failure> {
    let mut projection = Projection::builder().projection_type(ProjectionType::Include);
    for name in spec.include {
        projection = projection.non_key_attributes(*name);
    }
    built(
        GlobalSecondaryIndex::builder()
            .index_name(spec.name)
            .key_schema(key(spec.hash.0, KeyType::Hash)?)
            .key_schema(key(spec.range.0, KeyType::Range)?)
            .projection(projection.build())
            .build(),
    )
}

/// Makes what is missing of the tables, and brings them up to date. Refuses what a newer version made. What
/// is there already is left as it is, its billing mode and tags too.
pub(super) async fn migrate(calls: &Calls) -> Result<(), StoreError> {
    if describe(calls, &calls.tables.outbox).await?.is_none() {
        create_outbox(calls, &calls.tables.outbox).await?;
    }
    match describe(calls, &calls.tables.ledger).await? {
        None => create_ledger(calls, &calls.tables.ledger).await?,
        Some(table) => {
            for spec in indexes() {
                if !index_names(&table).any(|name| name == spec.name) {
                    add_index(calls, &calls.tables.ledger, &spec).await?;
                }
            }
        }
    }
    for table in [&calls.tables.outbox, &calls.tables.ledger] {
        wait_active(calls, table).await?;
        enable_ttl(calls, table).await?;
    }
    match version(calls).await? {
        None => {
            let mut item = ledger_key("schema", "version");
            item.insert(VERSION.to_owned(), number(SCHEMA_VERSION));
            let put = calls.client.put_item().table_name(&calls.tables.ledger).set_item(Some(item));
            calls.insist("PutItem", 1, "writing the schema version", || put.clone().send()).await?;
            Ok(())
        }
        Some((version, _)) => check_version(version, &calls.tables),
    }
}

/// What is wrong with the tables, each as a sentence; empty if they can be used. Changes nothing.
pub(super) async fn check(calls: &Calls) -> Result<Vec<String>, StoreError> {
    let mut wrong = Vec::new();
    let mut is_there = true;
    for table in [&calls.tables.outbox, &calls.tables.ledger] {
        let Some(description) = describe(calls, table).await? else {
            wrong.push(format!("table {table} is missing; `postrider migrate` makes it"));
            is_there = false;
            continue;
        };
        if !matches!(description.table_status(), Some(TableStatus::Active | TableStatus::Updating)) {
            let status = description.table_status().map_or("unknown", TableStatus::as_str);
            wrong.push(format!("table {table} is {status}, not ACTIVE"));
        }
        let expected: &[_] = if table == &calls.tables.outbox {
            &[(DIGEST, KeyType::Hash)]
        } else {
            &[(PK, KeyType::Hash), (SK, KeyType::Range)]
        };
        wrong.extend(wrong_keys(&format!("table {table}"), description.key_schema(), expected));
        if table == &calls.tables.ledger {
            wrong.extend(wrong_indexes(table, &description));
        }
        if !has_ttl(calls, table).await? {
            wrong.push(format!(
                "table {table} has no TTL on {EXPIRES_AT}; `postrider migrate` switches it on"
            ));
        }
    }
    if is_there {
        match version(calls).await? {
            None => {
                wrong.push(format!(
                    "table {} has no schema version; run `postrider migrate`",
                    calls.tables.ledger
                ));
            }
            Some((version, _)) => {
                wrong.extend(check_version(version, &calls.tables).err().map(|error| error.to_string()));
            }
        }
    }
    Ok(wrong)
}

/// Refuses tables that can't be used: cheap enough for every start. Returns the shards of the indexes over all
/// destinations that batches were ever spread over.
pub(super) async fn check_start(calls: &Calls) -> Result<u16, StoreError> {
    match version(calls).await? {
        Some((version, shards)) => check_version(version, &calls.tables).map(|()| shards),
        None => Err(StoreError::Permanent(format!(
            "table {} has no schema version; run `postrider migrate`",
            calls.tables.ledger
        ))),
    }
}

fn check_version(version: u32, tables: &Tables) -> Result<(), StoreError> {
    if version == SCHEMA_VERSION {
        return Ok(());
    }
    Err(StoreError::Permanent(format!(
        "table {} has schema version {version}, this program reads {SCHEMA_VERSION}: use a newer program",
        tables.ledger
    )))
}

fn wrong_keys(what: &str, found: &[KeySchemaElement], expected: &[(&str, KeyType)]) -> Option<String> {
    let found: Vec<_> = found.iter().map(|key| (key.attribute_name(), key.key_type().clone())).collect();
    (found != expected).then(|| {
        let names =
            |keys: &[(&str, KeyType)]| keys.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        format!(
            "{what} has the key {}, not {}; it was made by something else",
            names(&found),
            names(expected)
        )
    })
}

fn wrong_indexes(table: &str, description: &TableDescription) -> Vec<String> {
    let mut wrong = Vec::new();
    for spec in indexes() {
        let found =
            description.global_secondary_indexes().iter().find(|index| index.index_name() == Some(spec.name));
        let Some(found) = found else {
            wrong.push(format!("table {table} has no index {}; `postrider migrate` makes it", spec.name));
            continue;
        };
        let what = format!("index {} of table {table}", spec.name);
        let expected = [(spec.hash.0, KeyType::Hash), (spec.range.0, KeyType::Range)];
        wrong.extend(wrong_keys(&what, found.key_schema(), &expected));
        let projection = found.projection();
        let is_all = projection.and_then(Projection::projection_type) == Some(&ProjectionType::All);
        let included = projection.map_or(&[][..], Projection::non_key_attributes);
        for name in spec.include {
            if !is_all && !included.iter().any(|included| included == name) {
                wrong.push(format!(
                    "{what} does not project {name}; delete the index and run `postrider migrate`"
                ));
            }
        }
        if found.index_status() != Some(&IndexStatus::Active) {
            let status = found.index_status().map_or("unknown", IndexStatus::as_str);
            wrong.push(format!("{what} is {status}, not ACTIVE"));
        }
    }
    wrong
}

fn index_names(table: &TableDescription) -> impl Iterator<Item = &str> {
    table.global_secondary_indexes().iter().filter_map(|index| index.index_name())
}

/// What the service says of a table; `None` if it does not exist.
async fn describe(calls: &Calls, table: &str) -> Result<Option<TableDescription>, StoreError> {
    let call = calls.client.describe_table().table_name(table);
    let described = calls.insist("DescribeTable", 0, "describing a table", || async {
        match call.clone().send().await {
            Ok(output) => Ok(output.table),
            Err(error) if error.code() == Some("ResourceNotFoundException") => Ok(None),
            Err(error) => Err(error),
        }
    });
    Ok(described.await?)
}

async fn create_outbox(calls: &Calls, table: &str) -> Result<(), StoreError> {
    let call = calls
        .client
        .create_table()
        .table_name(table)
        .key_schema(key(DIGEST, KeyType::Hash)?)
        .attribute_definitions(attribute(DIGEST, ScalarAttributeType::S)?)
        .billing_mode(BillingMode::PayPerRequest);
    create(calls, call).await
}

async fn create_ledger(calls: &Calls, table: &str) -> Result<(), StoreError> {
    use ScalarAttributeType::{N, S};
    let mut call = calls
        .client
        .create_table()
        .table_name(table)
        .key_schema(key(PK, KeyType::Hash)?)
        .key_schema(key(SK, KeyType::Range)?)
        .billing_mode(BillingMode::PayPerRequest);
    for (name, kind) in [
        (PK, S),
        (SK, S),
        (TOPIC_SHARD, S),
        (SHARD, N),
        (OUTSTANDING_CREATED_TIME, N),
        (LOOK_AT, N),
        (DELIVERY_TIME, N),
    ] {
        call = call.attribute_definitions(attribute(name, kind)?);
    }
    for spec in indexes() {
        call = call.global_secondary_indexes(global_index(&spec)?);
    }
    create(calls, call).await
}

async fn create(
    calls: &Calls,
    call: aws_sdk_dynamodb::operation::create_table::builders::CreateTableFluentBuilder,
) -> Result<(), StoreError> {
    calls
        .insist("CreateTable", 0, "making a table", || async {
            match call.clone().send().await {
                Ok(_) => Ok(()),
                // Somebody else is making it, or our own first try was not answered.
                Err(error) if error.code() == Some("ResourceInUseException") => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
        .map_err(StoreError::from)
}

/// Adds an index and waits for it: a table takes one new index at a time.
async fn add_index(calls: &Calls, table: &str, spec: &IndexSpec) -> Result<(), StoreError> {
    wait_active(calls, table).await?;
    let index = global_index(spec)?;
    let create = aws_sdk_dynamodb::types::CreateGlobalSecondaryIndexAction::builder()
        .index_name(spec.name)
        .set_key_schema(Some(index.key_schema().to_vec()))
        .set_projection(index.projection().cloned())
        .build();
    let update =
        aws_sdk_dynamodb::types::GlobalSecondaryIndexUpdate::builder().create(built(create)?).build();
    let (hash, range) = (spec.hash.clone(), spec.range.clone());
    let call = calls
        .client
        .update_table()
        .table_name(table)
        .attribute_definitions(attribute(hash.0, hash.1)?)
        .attribute_definitions(attribute(range.0, range.1)?)
        .global_secondary_index_updates(update);
    calls.insist("UpdateTable", 0, "making an index", || call.clone().send()).await?;
    wait_active(calls, table).await
}

async fn wait_active(calls: &Calls, table: &str) -> Result<(), StoreError> {
    let until = tokio::time::Instant::now() + ACTIVE_WAIT;
    loop {
        let description = describe(calls, table).await?;
        let is_active = description.as_ref().is_some_and(|table| {
            table.table_status() == Some(&TableStatus::Active)
                && table
                    .global_secondary_indexes()
                    .iter()
                    .all(|index| index.index_status() == Some(&IndexStatus::Active))
        });
        if is_active {
            return Ok(());
        }
        if tokio::time::Instant::now() > until {
            return Err(StoreError::Retryable(format!(
                "table {table} or one of its indexes is not ACTIVE after {} s; run it again later",
                ACTIVE_WAIT.as_secs()
            )));
        }
        tokio::time::sleep(ACTIVE_POLL).await;
    }
}

async fn has_ttl(calls: &Calls, table: &str) -> Result<bool, StoreError> {
    let call = calls.client.describe_time_to_live().table_name(table);
    let output =
        calls.insist("DescribeTimeToLive", 0, "reading a table's TTL", || call.clone().send()).await?;
    Ok(output.time_to_live_description.is_some_and(|ttl| {
        ttl.attribute_name() == Some(EXPIRES_AT)
            && matches!(
                ttl.time_to_live_status(),
                Some(TimeToLiveStatus::Enabled | TimeToLiveStatus::Enabling)
            )
    }))
}

async fn enable_ttl(calls: &Calls, table: &str) -> Result<(), StoreError> {
    if has_ttl(calls, table).await? {
        return Ok(());
    }
    let ttl = built(TimeToLiveSpecification::builder().enabled(true).attribute_name(EXPIRES_AT).build())?;
    let call = calls.client.update_time_to_live().table_name(table).time_to_live_specification(ttl);
    calls.insist("UpdateTimeToLive", 0, "switching a table's TTL on", || call.clone().send()).await?;
    Ok(())
}

/// Takes note that batches are spread over so many shards: whoever has fewer in its configuration reads them all the
/// same.
pub(super) fn spread_over(tables: &Tables, shards: u16) -> Change<'_> {
    Change::of(&tables.ledger, ledger_key("schema", "version"))
        .set(SHARD, number(shards))
        .when(When::Exists(PK))
}

async fn version(calls: &Calls) -> Result<Option<(u32, u16)>, StoreError> {
    let item = calls.get("reading the schema version", ledger_key("schema", "version")).await?;
    let Some(item) = item else { return Ok(None) };
    let reading = Reading(&item);
    Ok(Some((reading.number(VERSION)?, reading.maybe_number(SHARD)?.unwrap_or(0))))
}
