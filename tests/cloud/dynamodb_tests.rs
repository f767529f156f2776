//! Every injection into DynamoDB.

use std::{collections::HashMap, time::Duration};

use aws_sdk_dynamodb::{
    Client,
    operation::{query::QueryError, transact_write_items::TransactWriteItemsError},
    types::{
        AttributeDefinition, AttributeValue, BatchStatementErrorCodeEnum, BatchStatementRequest, BillingMode,
        GlobalSecondaryIndex, KeySchemaElement, KeyType, KeysAndAttributes, Projection, ProjectionType, Put,
        PutRequest, ScalarAttributeType, TransactWriteItem, WriteRequest,
    },
};

use super::{
    cloud::{Count, Fault, FaultProxy, Rule, Server},
    code, sdk_config,
};

const TABLE: &str = "outbox";
const INDEX: &str = "Outstanding";
const LAG: Duration = Duration::from_millis(100);

/// A table of items `{id, lane}` with a sparse index by `lane`, behind a proxy.
struct Table {
    proxy: FaultProxy,
    client: Client,
    /// Past the proxy.
    direct: Client,
    _servers: [Server; 2],
}

type Item = HashMap<String, AttributeValue>;

fn string(value: &str) -> AttributeValue {
    AttributeValue::S(value.to_owned())
}

fn key(id: &str) -> Item {
    [("id".to_owned(), string(id))].into()
}

fn item(id: &str) -> Item {
    let mut item = key(id);
    item.insert("lane".to_owned(), string("l"));
    item
}

fn put(id: &str) -> TransactWriteItem {
    let put = Put::builder().table_name(TABLE).set_item(Some(item(id))).build().expect("it is whole");
    TransactWriteItem::builder().put(put).build()
}

impl Table {
    async fn new() -> Self {
        let servers = [Server::dynamodb(), Server::dynamodb()];
        let proxy = FaultProxy::with_stale_copy(servers[0].endpoint(), servers[1].endpoint(), LAG);
        let client = Client::new(&sdk_config(proxy.endpoint()));
        let direct = Client::new(&sdk_config(servers[0].endpoint()));
        let attribute = |name: &str| {
            let attribute = AttributeDefinition::builder().attribute_name(name);
            attribute.attribute_type(ScalarAttributeType::S).build().expect("it is whole")
        };
        let hash = |name: &str| {
            let hash = KeySchemaElement::builder().attribute_name(name).key_type(KeyType::Hash);
            hash.build().expect("it is whole")
        };
        let index = GlobalSecondaryIndex::builder()
            .index_name(INDEX)
            .key_schema(hash("lane"))
            .projection(Projection::builder().projection_type(ProjectionType::All).build())
            .build()
            .expect("it is whole");
        let create = client.create_table().table_name(TABLE).billing_mode(BillingMode::PayPerRequest);
        let create = create.attribute_definitions(attribute("id")).attribute_definitions(attribute("lane"));
        let create = create.key_schema(hash("id")).global_secondary_indexes(index);
        create.send().await.expect("dynoxide creates tables");
        proxy.reset_counts();
        Self { proxy, client, direct, _servers: servers }
    }

    /// Writes by `BatchWriteItem`; the ids that came back.
    async fn write(&self, ids: &[&str]) -> Vec<String> {
        let requests = ids.iter().map(|id| {
            let put = PutRequest::builder().set_item(Some(item(id))).build().expect("it is whole");
            WriteRequest::builder().put_request(put).build()
        });
        let write = self.client.batch_write_item().request_items(TABLE, requests.collect());
        let unprocessed =
            write.send().await.expect("the batch is taken").unprocessed_items.unwrap_or_default();
        let unprocessed = unprocessed.get(TABLE).into_iter().flatten();
        let ids = unprocessed.map(|write| id(&write.put_request().expect("only puts were sent").item));
        ids.collect()
    }

    /// The ids of a client's full scan, in order.
    async fn scan(&self, client: &Client, index: Option<&str>, consistent: bool) -> Vec<String> {
        let scan = client.scan().table_name(TABLE).set_index_name(index.map(str::to_owned));
        let scan = scan.consistent_read(consistent).send().await.expect("dynoxide scans");
        let mut ids: Vec<_> = scan.items.unwrap_or_default().iter().map(id).collect();
        ids.sort();
        ids
    }

    async fn stored(&self) -> Vec<String> {
        self.scan(&self.direct, None, true).await
    }

    async fn outstanding(&self) -> Vec<String> {
        let query = self.client.query().table_name(TABLE).index_name(INDEX);
        let query =
            query.key_condition_expression("lane = :l").expression_attribute_values(":l", string("l"));
        let items = query.send().await.expect("dynoxide queries").items.unwrap_or_default();
        let mut ids: Vec<_> = items.iter().map(id).collect();
        ids.sort();
        ids
    }
}

impl Table {
    /// Waits until the copy has only this one in its index.
    async fn wait_outstanding(&self, id: &str) {
        let wait = async {
            while self.outstanding().await != [id] {
                tokio::time::sleep(LAG / 10).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the copy catches up");
    }
}

fn id(item: &Item) -> String {
    item["id"].as_s().expect("it is a string").clone()
}

fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{number:02}")).collect()
}

fn as_strs(ids: &[String]) -> Vec<&str> {
    ids.iter().map(String::as_str).collect()
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_share_of_the_writes_stays_unprocessed() {
    let table = Table::new().await;
    let ids = numbered(25);
    table.proxy.inject(Rule::on("BatchWriteItem", Fault::Unprocessed { share: 0.5 }));
    let mut left = table.write(&as_strs(&ids)).await;
    assert!((12..=13).contains(&left.len()), "{left:?}");
    let mut all = table.stored().await;
    assert_eq!(all.len() + left.len(), 25);
    all.extend(left.iter().cloned());
    all.sort();
    assert_eq!(all, ids);
    // A caller that continues gets there.
    let mut calls = 1;
    while left.len() > 1 {
        left = table.write(&as_strs(&left)).await;
        calls += 1;
    }
    table.proxy.clear_faults();
    if !left.is_empty() {
        table.write(&as_strs(&left)).await;
    }
    assert_eq!(table.stored().await, ids);
    assert!(table.proxy.injected("BatchWriteItem") >= calls - 1, "{calls}");
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn nothing_processed_is_an_error() {
    let table = Table::new().await;
    table.proxy.inject(Rule::on("BatchWriteItem", Fault::Unprocessed { share: 1.0 }).next(1));
    let put = PutRequest::builder().set_item(Some(item("a"))).build().expect("it is whole");
    let write = table.client.batch_write_item();
    let write = write.request_items(TABLE, vec![WriteRequest::builder().put_request(put).build()]);
    let error = write.send().await.expect_err("nothing was processed").into_service_error();
    assert!(error.is_provisioned_throughput_exceeded_exception(), "{error:?}");
    assert!(table.stored().await.is_empty());
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_share_of_the_keys_stays_unprocessed_with_its_projection() {
    let table = Table::new().await;
    let ids = numbered(10);
    table.write(&as_strs(&ids)).await;
    table.proxy.inject(Rule::on("BatchGetItem", Fault::Unprocessed { share: 0.3 }).next(1));
    let keys = KeysAndAttributes::builder().set_keys(Some(ids.iter().map(|id| key(id)).collect()));
    let keys = keys.consistent_read(true).projection_expression("id").build().expect("it is whole");
    let get = table.client.batch_get_item().request_items(TABLE, keys);
    let answer = get.send().await.expect("the batch is taken");
    let mut rest = answer.unprocessed_keys.expect("some are left");
    let rest = rest.remove(TABLE).expect("of this table");
    assert_eq!(rest.keys.len(), 3);
    assert_eq!((rest.projection_expression(), rest.consistent_read()), (Some("id"), Some(true)));
    let found = &answer.responses.expect("some are found")[TABLE];
    let mut all: Vec<_> = found.iter().chain(&rest.keys).map(id).collect();
    all.sort();
    assert_eq!(all, ids);
    let again = table.client.batch_get_item().request_items(TABLE, rest);
    let again = again.send().await.expect("the batch is taken");
    assert!(again.unprocessed_keys.is_none_or(|rest| rest.is_empty()));
    assert_eq!(again.responses.expect("the rest is found")[TABLE].len(), 3);
    assert_eq!(table.proxy.counts()["BatchGetItem"], Count { calls: 2, items: 13, empty: 0 });
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn statements_fail_in_their_places() {
    let table = Table::new().await;
    let ids = numbered(10);
    table.write(&as_strs(&ids)).await;
    table.proxy.inject(
        Rule::on("BatchExecuteStatement", Fault::FailStatements { statements: 4, code: "ThrottlingError" })
            .next(1),
    );
    // One of them fails by itself: its condition does not hold.
    let mut asked = ids.clone();
    asked[4] = "no such item".to_owned();
    let statements = asked.iter().map(|id| {
        let statement = format!("UPDATE \"{TABLE}\" REMOVE lane WHERE id = ? AND attribute_exists(id)");
        let statement = BatchStatementRequest::builder().statement(statement).parameters(string(id));
        statement.build().expect("it is whole")
    });
    let execute = table.client.batch_execute_statement().set_statements(Some(statements.collect()));
    let responses = execute.send().await.expect("the batch is taken").responses.expect("one per statement");
    assert_eq!(responses.len(), 10);
    let mut throttled = 0;
    for (id, response) in asked.iter().zip(&responses) {
        let error = response.error().and_then(|error| error.code());
        let is_done = table.outstanding().await.iter().all(|outstanding| outstanding != id);
        match error {
            Some(BatchStatementErrorCodeEnum::ThrottlingError) => throttled += 1,
            Some(BatchStatementErrorCodeEnum::ConditionalCheckFailed) => assert_eq!(id, &asked[4]),
            None => assert!(is_done, "{id} was answered as done"),
            other => panic!("{other:?}"),
        }
        assert!(is_done || error.is_some());
        assert_eq!(is_done, error.is_none() || id == &asked[4], "{id}: {error:?}");
    }
    assert_eq!(throttled, 4);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn errors_are_the_ones_that_the_sdk_knows() {
    let table = Table::new().await;
    table.proxy.inject(Rule::on("Query", Fault::throughput_exceeded()).next(1));
    let query = || {
        let query = table.client.query().table_name(TABLE).key_condition_expression("id = :id");
        query.expression_attribute_values(":id", string("a")).send()
    };
    let error = query().await.expect_err("throttled");
    let is_it =
        error.as_service_error().is_some_and(QueryError::is_provisioned_throughput_exceeded_exception);
    assert!(is_it, "{error:?}");
    table.proxy.inject(Rule::on("Query", Fault::throttled()).next(1));
    assert_eq!(code(&query().await.expect_err("throttled")), Some("ThrottlingException"));
    query().await.expect("the rules are used up");

    table.proxy.inject(Rule::on("TransactWriteItems", Fault::ConflictTransaction).next(1));
    let write =
        || table.client.transact_write_items().transact_items(put("a")).transact_items(put("b")).send();
    let error = write().await.expect_err("a conflict").into_service_error();
    let reasons: Vec<_> = match &error {
        TransactWriteItemsError::TransactionCanceledException(cancelled) => {
            cancelled.cancellation_reasons().iter().map(|reason| reason.code().unwrap_or_default()).collect()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(reasons, ["TransactionConflict", "None"]);
    assert!(table.stored().await.is_empty());
    write().await.expect("the rule is used up");
    assert_eq!(table.stored().await, ["a", "b"]);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_transaction_without_an_answer_was_carried_out_or_not() {
    let table = Table::new().await;
    for (forward, expected) in [(false, &[][..]), (true, &["a"])] {
        table.proxy.inject(Rule::on("TransactWriteItems", Fault::Close { forward }).next(1));
        let error = table.client.transact_write_items().transact_items(put("a")).send().await;
        assert!(error.expect_err("no answer").as_service_error().is_none());
        assert_eq!(table.stored().await, expected);
    }
    assert_eq!(table.proxy.counts()["TransactWriteItems"], Count { calls: 2, items: 2, empty: 0 });
}

#[tokio::test]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_stale_index_misses_new_items_and_keeps_removed_ones() {
    let table = Table::new().await;
    table.write(&["old"]).await;
    table.proxy.inject(Rule::on("Query", Fault::Stale));
    table.proxy.inject(Rule::on("Scan", Fault::Stale));
    table.wait_outstanding("old").await;
    table.proxy.freeze_copy(true);
    table.write(&["new"]).await;
    let remove = table.client.update_item().table_name(TABLE).set_key(Some(key("old")));
    remove.update_expression("REMOVE lane").send().await.expect("it is there");

    assert_eq!(table.outstanding().await, ["old"]);
    assert_eq!(table.scan(&table.client, Some(INDEX), false).await, ["old"]);
    assert_eq!(table.scan(&table.client, None, false).await, ["old"]);
    // A consistent read is never stale.
    assert_eq!(table.scan(&table.client, None, true).await, ["new", "old"]);
    assert_eq!(table.scan(&table.direct, Some(INDEX), false).await, ["new"]);

    table.proxy.freeze_copy(false);
    table.wait_outstanding("new").await;
    assert_eq!(table.proxy.problems(), Vec::<String>::new());
}
