//! The calls that the store makes: each within the service's limits, repeated as [`super::retry`] says, and
//! its consumption reported.

use std::{collections::HashMap, future::Future, sync::Arc};

use aws_sdk_dynamodb::{
    Client,
    config::{http::HttpResponse, retry::RetryConfig},
    error::{ProvideErrorMetadata, SdkError},
    operation::{
        batch_execute_statement::BatchExecuteStatementOutput, query::builders::QueryFluentBuilder,
        transact_write_items::TransactWriteItemsError, update_item::UpdateItemError,
    },
    types::{
        BatchStatementErrorCodeEnum, BatchStatementRequest, ConsumedCapacity, KeysAndAttributes, PutRequest,
        ReturnConsumedCapacity, ReturnValue, ReturnValuesOnConditionCheckFailure, TransactWriteItem,
        WriteRequest,
    },
};
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    flow::{Call, Service, again},
    model::{
        backoff::Tries,
        call::{CallOutcome, Failure, FailureKind},
    },
    ports::{CallObserver, ItemOutcome, StoreError},
};

use super::{
    change::{Change, Statement, built},
    item::{Item, text},
    retry::{BUDGET, described},
};
use crate::kind_of;

/// Items in one `BatchGetItem` (API reference).
pub(super) const GETS_MAX: usize = 100;

/// Statements in one `BatchExecuteStatement`, and writes in one `BatchWriteItem` (API reference).
pub(super) const STATEMENTS_MAX: usize = 25;

/// Actions in one `TransactWriteItems` (API reference).
pub(super) const ACTIONS_MAX: usize = 100;

/// Bytes in one `TransactWriteItems`: 4 MB by the API reference, less what attribute names and our rough
/// count may add.
pub(super) const TRANSACTION_BYTES_MAX: usize = 3_500_000;

/// Calls of one operation that are in flight at once.
pub(super) const PARALLEL_CALLS: usize = 16;

/// The two tables' names.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub(super) outbox: String,
    pub(super) ledger: String,
}

/// The client and what goes with it.
pub(super) struct Calls {
    pub(super) client: Client,
    pub(super) tables: Tables,
    service: Service,
}

/// What a transaction came to.
pub(super) enum TransactOutcome {
    Done,
    /// Nothing was written: the conditions of these actions do not hold.
    Refused(Vec<usize>),
}

/// What one statement of a batch came to.
#[derive(Debug)]
pub(super) enum StatementOutcome {
    Done,
    /// Its condition does not hold, or there is no such item.
    Refused,
    Failed(ItemOutcome),
}

/// What was found of each key of a get.
pub(super) enum GetOutcome {
    Item(Item),
    Missing,
    /// The service did not get to it within all tries.
    Unprocessed,
}

impl Calls {
    pub(super) fn new(client: &Client, tables: Tables, observer: Arc<dyn CallObserver>) -> Self {
        // The store repeats calls itself: a retry that it does not know of would hide that an answer is
        // unknown.
        let config = client.config().to_builder().retry_config(RetryConfig::disabled()).build();
        let service = Service::new("dynamodb", "DynamoDB", observer);
        Self { client: Client::from_conf(config), tables, service }
    }

    /// Reports what a call consumed: the table's own part, and each index's.
    fn consumed<'a>(&self, consumed: impl IntoIterator<Item = &'a ConsumedCapacity>) {
        for capacity in consumed {
            let Some(table) = capacity.table_name() else { continue };
            let mut indexes = 0.0;
            for (index, part) in capacity.global_secondary_indexes().into_iter().flatten() {
                let units = part.capacity_units().unwrap_or_default();
                indexes += units;
                self.service.observer().capacity(table, Some(index), units);
            }
            let own = capacity.capacity_units().unwrap_or_default() - indexes;
            if own > 0.0 {
                self.service.observer().capacity(table, None, own);
            }
        }
    }

    /// Makes a call until it is answered or its tries are used up; `items` is what it carries. `Ok(Err(_))`: the service
    /// answered that a condition does not hold.
    async fn ask<T, E, F>(
        &self,
        operation: &'static str,
        items: usize,
        what: &str,
        mut call: impl FnMut() -> F,
        judge: impl Fn(&T) -> CallOutcome,
    ) -> Result<Result<T, E>, Failure>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let request = || {
            let call = call();
            async move {
                match call.await {
                    Ok(answer) => Ok(Ok(answer)),
                    Err(SdkError::ServiceError(context)) if is_condition(context.err()) => {
                        Ok(Err(context.into_err()))
                    }
                    Err(error) => Err(described(what, &error)),
                }
            }
        };
        let judge = |answer: &Result<T, E>| (answer.as_ref().map_or(CallOutcome::Conflict, &judge), 0);
        let call = Call::of(operation).with(items);
        self.service.repeated(call, &mut BUDGET.into(), request, judge).await
    }

    /// The same for a call without a condition.
    pub(super) async fn insist<T, E, F>(
        &self,
        operation: &'static str,
        items: usize,
        what: &str,
        call: impl FnMut() -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let answer = self.ask(operation, items, what, call, |_| CallOutcome::Ok).await?;
        answer.map_err(|error| refused(what, &error))
    }

    /// One item of the ledger table, strongly consistent.
    pub(super) async fn get(&self, what: &str, key: Item) -> Result<Option<Item>, StoreError> {
        let call = self
            .client
            .get_item()
            .table_name(&self.tables.ledger)
            .set_key(Some(key))
            .consistent_read(true)
            .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
        let output = self.insist("GetItem", 1, what, || call.clone().send()).await?;
        self.consumed(output.consumed_capacity());
        Ok(output.item)
    }

    /// Many items of one table, strongly consistent, one answer per key in order. `attributes`: only these.
    pub(super) async fn get_many(
        &self,
        what: &str,
        table: &str,
        keys: &[Item],
        attributes: Option<&[&str]>,
    ) -> Result<Vec<GetOutcome>, StoreError> {
        let chunks: Vec<_> =
            keys.chunks(GETS_MAX).map(|keys| self.get_some(what, table, keys, attributes)).collect();
        let mut chunks = stream::iter(chunks).buffered(4);
        let mut found = Vec::with_capacity(keys.len());
        while let Some(chunk) = chunks.next().await {
            found.extend(chunk?);
        }
        Ok(found)
    }

    async fn get_some(
        &self,
        what: &str,
        table: &str,
        keys: &[Item],
        attributes: Option<&[&str]>,
    ) -> Result<Vec<GetOutcome>, StoreError> {
        let mut wanted = KeysAndAttributes::builder().set_keys(Some(distinct(keys))).consistent_read(true);
        if let Some(attributes) = attributes {
            let numbered = attributes.iter().enumerate();
            let names: HashMap<_, _> =
                numbered.map(|(nth, name)| (format!("#a{nth}"), (*name).to_owned())).collect();
            let mut placeholders: Vec<_> = names.keys().cloned().collect();
            placeholders.sort_unstable();
            wanted = wanted
                .set_expression_attribute_names(Some(names))
                .projection_expression(placeholders.join(", "));
        }
        let mut wanted = Some(built(wanted.build())?);
        let mut tries = Tries::new(BUDGET);
        let mut items = Vec::new();
        while let Some(request) = wanted.take() {
            let asked = request.keys().len();
            let keys_left = request.keys().to_vec();
            let call = self
                .client
                .batch_get_item()
                .request_items(table, request)
                .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
            let output = match self.insist("BatchGetItem", asked, what, || call.clone().send()).await {
                Ok(output) => output,
                // What was found already is worth telling; the rest is asked for again by the caller.
                Err(failure) if failure.kind != FailureKind::Invalid && !items.is_empty() => {
                    tracing::debug!(what, %failure, keys = asked, "keys are left unprocessed");
                    return Ok(in_order(keys, &items, &keys_left));
                }
                Err(failure) => return Err(failure.into()),
            };
            self.consumed(output.consumed_capacity());
            items.extend(output.responses.and_then(|mut tables| tables.remove(table)).unwrap_or_default());
            let left = output.unprocessed_keys.and_then(|mut tables| tables.remove(table));
            let Some(left) = left.filter(|left| !left.keys().is_empty()) else { break };
            let busy = || {
                let why = format!("{what}: {} keys are unprocessed", left.keys().len());
                Failure::new(FailureKind::Throttled, why)
            };
            if left.keys().len() < asked {
                tries.progressed();
            }
            if again(&mut tries, busy()).await.is_err() {
                let unprocessed: Vec<_> = left.keys().to_vec();
                return Ok(in_order(keys, &items, &unprocessed));
            }
            wanted = Some(left);
        }
        Ok(in_order(keys, &items, &[]))
    }

    /// One page of a query.
    pub(super) async fn query(
        &self,
        what: &str,
        call: QueryFluentBuilder,
    ) -> Result<(Vec<Item>, Option<Item>), StoreError> {
        let call = call.return_consumed_capacity(ReturnConsumedCapacity::Indexes);
        let output = self.insist("Query", 1, what, || call.clone().send()).await?;
        self.consumed(output.consumed_capacity());
        Ok((output.items.unwrap_or_default(), output.last_evaluated_key))
    }

    /// A strongly consistent query of a partition of the ledger table. `condition` narrows the range key by the `values`
    /// that it names.
    pub(super) fn in_partition(
        &self,
        pk: impl Into<String>,
        condition: &str,
        values: impl IntoIterator<Item = (&'static str, String)>,
    ) -> QueryFluentBuilder {
        let and = if condition.is_empty() { "" } else { " AND " };
        let call = self
            .client
            .query()
            .table_name(&self.tables.ledger)
            .key_condition_expression(format!("Pk = :pk{and}{condition}"))
            .expression_attribute_values(":pk", text(pk))
            .consistent_read(true);
        values
            .into_iter()
            .fold(call, |call, (name, value)| call.expression_attribute_values(name, text(value)))
    }

    /// Every item of a partition of the ledger table whose range key begins with `prefix`, strongly
    /// consistent. For partitions that are known to be small.
    pub(super) async fn partition(
        &self,
        what: &str,
        pk: &str,
        prefix: &str,
    ) -> Result<Vec<Item>, StoreError> {
        let mut items = Vec::new();
        let mut from = None;
        loop {
            let call = if prefix.is_empty() {
                self.in_partition(pk, "", [])
            } else {
                self.in_partition(pk, "begins_with(Sk, :prefix)", [(":prefix", prefix.to_owned())])
            };
            let call = call.set_exclusive_start_key(from);
            let (page, next) = self.query(what, call).await?;
            items.extend(page);
            if next.is_none() {
                return Ok(items);
            }
            from = next;
        }
    }

    /// Writes all of `actions` or none. At most [`ACTIONS_MAX`], on different items.
    pub(super) async fn transact(
        &self,
        what: &str,
        actions: Vec<TransactWriteItem>,
    ) -> Result<TransactOutcome, StoreError> {
        // A token makes a repeated transaction one and the same, for ten minutes.
        let token = format!("{:032x}", rand::random::<u128>());
        let count = actions.len();
        let call = self
            .client
            .transact_write_items()
            .set_transact_items(Some(actions))
            .client_request_token(token)
            .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
        let mut tries = Tries::new(BUDGET);
        loop {
            let send = || call.clone().send();
            let error = match self.ask("TransactWriteItems", count, what, send, |_| CallOutcome::Ok).await? {
                Ok(output) => {
                    self.consumed(output.consumed_capacity());
                    return Ok(TransactOutcome::Done);
                }
                Err(error) => error,
            };
            let TransactWriteItemsError::TransactionCanceledException(cancelled) = &error else {
                return Err(refused(what, &error).into());
            };
            let codes: Vec<_> = cancelled
                .cancellation_reasons()
                .iter()
                .map(|reason| reason.code().unwrap_or("None"))
                .collect();
            let refused: Vec<_> =
                (0..codes.len()).filter(|&index| codes[index] == "ConditionalCheckFailed").collect();
            if !refused.is_empty() {
                return Ok(TransactOutcome::Refused(refused));
            }
            let kind = codes.iter().find(|code| **code != "None").map(|code| kind_of(code, 400));
            let why =
                format!("DynamoDB {what}: {}", error.message().unwrap_or("the transaction was cancelled"));
            let failure = Failure::new(kind.unwrap_or(FailureKind::Unavailable), why);
            self.service.say("TransactWriteItems", &failure);
            again(&mut tries, failure).await?;
        }
    }

    /// Executes statements on different items, one answer each in order: failed ones are repeated by
    /// themselves.
    pub(super) async fn execute(&self, what: &str, statements: Vec<Statement>) -> Vec<StatementOutcome> {
        let chunks: Vec<_> =
            statements.chunks(STATEMENTS_MAX).map(|chunk| self.execute_some(what, chunk)).collect();
        let answers: Vec<_> = stream::iter(chunks).buffered(PARALLEL_CALLS).collect().await;
        answers.into_iter().flatten().collect()
    }

    async fn execute_some(&self, what: &str, statements: &[Statement]) -> Vec<StatementOutcome> {
        let mut answers: Vec<Option<StatementOutcome>> = statements.iter().map(|_| None).collect();
        let mut tries = Tries::new(BUDGET);
        loop {
            let open: Vec<_> = (0..answers.len()).filter(|&index| answers[index].is_none()).collect();
            if open.is_empty() {
                return answers.into_iter().flatten().collect();
            }
            let requests: Result<Vec<_>, _> = open
                .iter()
                .map(|&index| {
                    let (statement, parameters) = &statements[index];
                    let request = BatchStatementRequest::builder().statement(statement);
                    request.set_parameters(Some(parameters.clone())).build()
                })
                .collect();
            let output = match built(requests) {
                Ok(requests) => {
                    let call = self
                        .client
                        .batch_execute_statement()
                        .set_statements(Some(requests))
                        .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
                    let send = || call.clone().send();
                    self.ask("BatchExecuteStatement", open.len(), what, send, answered).await
                }
                Err(failure) => Err(failure),
            };
            let output = match output.and_then(|answer| answer.map_err(|error| refused(what, &error))) {
                Ok(output) => output,
                Err(failure) => {
                    for index in open {
                        answers[index] = Some(StatementOutcome::Failed(failure.clone().into()));
                    }
                    continue;
                }
            };
            self.consumed(output.consumed_capacity());
            let mut worst = None;
            for (nth, index) in open.iter().copied().enumerate() {
                // An answer that is missing is taken as one that was not given.
                let error = match output.responses().get(nth) {
                    Some(response) => response.error(),
                    None => continue,
                };
                let Some(error) = error else {
                    answers[index] = Some(StatementOutcome::Done);
                    continue;
                };
                if error.code() == Some(&BatchStatementErrorCodeEnum::ConditionalCheckFailed) {
                    answers[index] = Some(StatementOutcome::Refused);
                    continue;
                }
                let code = error.code().map_or("an unnamed error", BatchStatementErrorCodeEnum::as_str);
                let why =
                    format!("DynamoDB {what}: {code}: {}", error.message().unwrap_or("no further words"));
                let failure = Failure::new(kind_of(code, 400), why);
                match failure.kind {
                    FailureKind::Throttled | FailureKind::Unavailable | FailureKind::Unknown => {
                        worst = Some(failure);
                    }
                    FailureKind::Denied | FailureKind::Refused | FailureKind::Invalid => {
                        self.service.say("BatchExecuteStatement", &failure);
                        answers[index] = Some(StatementOutcome::Failed(failure.into()));
                    }
                }
            }
            if answers.iter().all(Option::is_some) {
                continue;
            }
            let failure = worst.unwrap_or_else(|| {
                Failure::new(FailureKind::Unknown, format!("DynamoDB {what}: a statement has no answer"))
            });
            if let Err(failure) = again(&mut tries, failure).await {
                for answer in answers.iter_mut().filter(|answer| answer.is_none()) {
                    *answer = Some(StatementOutcome::Failed(failure.clone().into()));
                }
            }
        }
    }

    /// Puts items of a table without conditions.
    pub(super) async fn put_all(&self, what: &str, table: &str, items: Vec<Item>) -> Result<(), StoreError> {
        for items in items.chunks(STATEMENTS_MAX) {
            let mut left: Vec<_> = Vec::with_capacity(items.len());
            for item in items {
                let put = built(PutRequest::builder().set_item(Some(item.clone())).build())?;
                left.push(WriteRequest::builder().put_request(put).build());
            }
            let mut tries = Tries::new(BUDGET);
            loop {
                let asked = left.len();
                let call = self
                    .client
                    .batch_write_item()
                    .request_items(table, left)
                    .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
                let output = self.insist("BatchWriteItem", asked, what, || call.clone().send()).await?;
                self.consumed(output.consumed_capacity());
                left =
                    output.unprocessed_items.and_then(|mut tables| tables.remove(table)).unwrap_or_default();
                if left.is_empty() {
                    break;
                }
                if left.len() < asked {
                    tries.progressed();
                }
                let why = format!("{what}: {} items are unprocessed", left.len());
                again(&mut tries, Failure::new(FailureKind::Throttled, why)).await?;
            }
        }
        Ok(())
    }

    /// Updates one item of the ledger table. `Ok(Err(item))`: its condition does not hold, and this is the
    /// item, if there is one.
    pub(super) async fn update(
        &self,
        what: &str,
        change: Change<'_>,
    ) -> Result<Result<Item, Option<Item>>, StoreError> {
        let call = change
            .call(self.client.update_item())
            .return_values(ReturnValue::AllNew)
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .return_consumed_capacity(ReturnConsumedCapacity::Indexes);
        match self.ask("UpdateItem", 1, what, || call.clone().send(), |_| CallOutcome::Ok).await? {
            Ok(output) => {
                self.consumed(output.consumed_capacity());
                Ok(Ok(output.attributes.unwrap_or_default()))
            }
            Err(UpdateItemError::ConditionalCheckFailedException(refused)) => {
                Ok(Err(refused.item.filter(|item| !item.is_empty())))
            }
            Err(error) => Err(refused(what, &error).into()),
        }
    }
}

fn is_condition(error: &impl ProvideErrorMetadata) -> bool {
    matches!(error.code(), Some("ConditionalCheckFailedException" | "TransactionCanceledException"))
}

/// A condition that does not hold, of a call that has none.
fn refused(what: &str, error: &impl std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Invalid, format!("DynamoDB {what}: {error}"))
}

/// How an answer to statements counts: those whose condition does not hold are as they should be.
fn answered(output: &BatchExecuteStatementOutput) -> CallOutcome {
    let failed = output.responses().iter().filter_map(|response| response.error());
    let is_partial = failed
        .into_iter()
        .any(|error| error.code() != Some(&BatchStatementErrorCodeEnum::ConditionalCheckFailed));
    if is_partial { CallOutcome::Partial } else { CallOutcome::Ok }
}

/// A get may not name a key twice.
fn distinct(keys: &[Item]) -> Vec<Item> {
    let mut distinct: Vec<Item> = Vec::with_capacity(keys.len());
    for key in keys {
        if !distinct.contains(key) {
            distinct.push(key.clone());
        }
    }
    distinct
}

/// The answer to each key. Items come back in any order.
fn in_order(keys: &[Item], items: &[Item], unprocessed: &[Item]) -> Vec<GetOutcome> {
    let is_of = |item: &Item, key: &Item| key.iter().all(|(name, value)| item.get(name) == Some(value));
    keys.iter()
        .map(|key| match items.iter().find(|item| is_of(item, key)) {
            Some(item) => GetOutcome::Item(item.clone()),
            None if unprocessed.contains(key) => GetOutcome::Unprocessed,
            None => GetOutcome::Missing,
        })
        .collect()
}
