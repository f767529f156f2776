//! The change of one item, put together once and written as an action of a transaction, as a call of its own, or as a
//! statement among others; and the other actions of transactions.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};

use aws_sdk_dynamodb::{
    error::BuildError,
    operation::update_item::builders::UpdateItemFluentBuilder,
    types::{AttributeValue, Delete, Put, TransactWriteItem, Update},
};
use postrider_actors::{
    model::call::{Failure, FailureKind},
    ports::StoreError,
};

use super::item::{Item, PK, SK};

/// What must hold of the item as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum When {
    Is(&'static str, AttributeValue),
    Exists(&'static str),
    Missing(&'static str),
}

/// A change. It happens if all of `when` holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change<'a> {
    pub(super) table: &'a str,
    pub(super) key: Item,
    pub(super) set: Vec<(&'static str, AttributeValue)>,
    pub(super) add: Vec<(Cow<'static, str>, AttributeValue)>,
    pub(super) remove: Vec<&'static str>,
    pub(super) when: Vec<When>,
}

/// A `PartiQL` statement with its parameters.
pub(super) type Statement = (String, Vec<AttributeValue>);

/// The expressions of a change, its names and values bound: many attribute names are reserved words.
struct Expressions {
    update: String,
    condition: Option<String>,
    names: HashMap<String, String>,
    values: HashMap<String, AttributeValue>,
}

impl Expressions {
    fn name(&mut self, name: &str) -> String {
        // A placeholder is letters and digits.
        let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let bound = if is_plain { format!("#{name}") } else { format!("#n{}", self.names.len()) };
        self.names.insert(bound.clone(), name.to_owned());
        bound
    }

    fn value(&mut self, value: &AttributeValue) -> String {
        let bound = format!(":v{}", self.values.len());
        self.values.insert(bound.clone(), value.clone());
        bound
    }
}

impl<'a> Change<'a> {
    /// Of the item with this key, which nothing happens to yet.
    pub(super) fn of(table: &'a str, key: Item) -> Self {
        Self { table, key, set: Vec::new(), add: Vec::new(), remove: Vec::new(), when: Vec::new() }
    }

    pub(super) fn set(mut self, name: &'static str, value: AttributeValue) -> Self {
        self.set.push((name, value));
        self
    }

    pub(super) fn add(mut self, name: impl Into<Cow<'static, str>>, value: AttributeValue) -> Self {
        self.add.push((name.into(), value));
        self
    }

    pub(super) fn remove(mut self, name: &'static str) -> Self {
        self.remove.push(name);
        self
    }

    pub(super) fn when(mut self, when: When) -> Self {
        self.when.push(when);
        self
    }

    fn expressions(&self) -> Expressions {
        let mut bound = Expressions {
            update: String::new(),
            condition: None,
            names: HashMap::new(),
            values: HashMap::new(),
        };
        let mut clauses = Vec::new();
        let mut clause = |word: &str, parts: Vec<String>| {
            if !parts.is_empty() {
                clauses.push(format!("{word} {}", parts.join(", ")));
            }
        };
        let mut pair = |name: &str, sign, value| format!("{}{sign}{}", bound.name(name), bound.value(value));
        clause("SET", self.set.iter().map(|(name, value)| pair(name, " = ", value)).collect());
        clause("ADD", self.add.iter().map(|(name, value)| pair(name, " ", value)).collect());
        clause("REMOVE", self.remove.iter().map(|name| bound.name(name)).collect());
        bound.update = clauses.join(" ");
        let conditions: Vec<_> = self
            .when
            .iter()
            .map(|when| match when {
                When::Is(name, value) => format!("{} = {}", bound.name(name), bound.value(value)),
                When::Exists(name) => format!("attribute_exists({})", bound.name(name)),
                When::Missing(name) => format!("attribute_not_exists({})", bound.name(name)),
            })
            .collect();
        bound.condition = (!conditions.is_empty()).then(|| conditions.join(" AND "));
        bound
    }

    /// As part of a transaction.
    pub(super) fn action(self) -> Result<TransactWriteItem, StoreError> {
        let Expressions { update, condition, names, values } = self.expressions();
        let update = built(
            Update::builder()
                .table_name(self.table)
                .set_key(Some(self.key))
                .update_expression(update)
                .set_condition_expression(condition)
                .set_expression_attribute_names(Some(names))
                .set_expression_attribute_values((!values.is_empty()).then_some(values))
                .build(),
        )?;
        Ok(TransactWriteItem::builder().update(update).build())
    }

    /// As a call of its own.
    pub(super) fn call(self, call: UpdateItemFluentBuilder) -> UpdateItemFluentBuilder {
        let Expressions { update, condition, names, values } = self.expressions();
        call.table_name(self.table)
            .set_key(Some(self.key))
            .update_expression(update)
            .set_condition_expression(condition)
            .set_expression_attribute_names(Some(names))
            .set_expression_attribute_values((!values.is_empty()).then_some(values))
    }

    /// As one of the statements of a call: it changes an item that is there, and adds nothing up. The key is that of the
    /// ledger table, or has one attribute.
    pub(super) fn statement(self) -> Statement {
        debug_assert!(self.add.is_empty(), "PartiQL has no ADD");
        let mut words = vec![format!("UPDATE \"{}\"", self.table)];
        let mut parameters = Vec::with_capacity(self.set.len() + self.when.len() + 2);
        for (name, value) in self.set {
            words.push(format!("SET \"{name}\"=?"));
            parameters.push(value);
        }
        words.extend(self.remove.iter().map(|name| format!("REMOVE \"{name}\"")));
        let mut conditions = Vec::with_capacity(self.when.len() + 2);
        // Sorted by name, so that a statement has one text.
        let key: BTreeMap<_, _> = self.key.into_iter().collect();
        debug_assert!(key.len() == 1 || key.keys().eq([PK, SK]), "a key of one of the two tables");
        for (name, value) in key {
            conditions.push(format!("\"{name}\"=?"));
            parameters.push(value);
        }
        for when in self.when {
            conditions.push(match when {
                When::Is(name, value) => {
                    parameters.push(value);
                    format!("\"{name}\"=?")
                }
                When::Exists(name) => format!("\"{name}\" IS NOT MISSING"),
                When::Missing(name) => format!("\"{name}\" IS MISSING"),
            });
        }
        (format!("{} WHERE {}", words.join(" "), conditions.join(" AND ")), parameters)
    }
}

/// An unconditional or conditional put as part of a transaction.
pub(super) fn put(table: &str, item: Item, condition: Option<&str>) -> Result<TransactWriteItem, StoreError> {
    let put = built(
        Put::builder()
            .table_name(table)
            .set_item(Some(item))
            .set_condition_expression(condition.map(str::to_owned))
            .build(),
    )?;
    Ok(TransactWriteItem::builder().put(put).build())
}

/// A delete as part of a transaction.
pub(super) fn delete(table: &str, key: Item) -> Result<TransactWriteItem, StoreError> {
    let delete = built(Delete::builder().table_name(table).set_key(Some(key)).build())?;
    Ok(TransactWriteItem::builder().delete(delete).build())
}

/// A call that could be built. What lacks something was not sent.
pub(super) fn built<T>(call: Result<T, BuildError>) -> Result<T, Failure> {
    call.map_err(|error| {
        Failure::new(FailureKind::Invalid, format!("a call to DynamoDB can't be built: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            item::{number, text},
            keys::ledger_key,
        },
        *,
    };

    fn change() -> Change<'static> {
        Change::of("ledger", ledger_key("a", "b"))
            .set("Version", number(2))
            .set("Holder", text("w"))
            .remove("Due")
            .when(When::Is("Version", number(1)))
            .when(When::Missing("Until"))
    }

    #[test]
    fn a_change_says_the_same_as_an_action_and_as_a_statement() {
        let action = change().action().unwrap();
        let update = action.update().unwrap();
        assert_eq!(update.update_expression(), "SET #Version = :v0, #Holder = :v1 REMOVE #Due");
        assert_eq!(update.condition_expression(), Some("#Version = :v2 AND attribute_not_exists(#Until)"));
        assert_eq!(update.expression_attribute_names().unwrap()["#Due"], "Due");
        assert_eq!(update.expression_attribute_values().unwrap()[":v2"], number(1));
        let (text, parameters) = change().statement();
        assert_eq!(
            text,
            "UPDATE \"ledger\" SET \"Version\"=? SET \"Holder\"=? REMOVE \"Due\" WHERE \"Pk\"=? AND \"Sk\"=? AND \
             \"Version\"=? AND \"Until\" IS MISSING"
        );
        assert_eq!(parameters.len(), 5);
        assert_eq!(parameters[4], number(1));
    }

    #[test]
    fn what_only_adds_up_binds_no_condition() {
        let counted = Change::of("ledger", ledger_key("a", "b")).add("Sent", number(3));
        let action = counted.action().unwrap();
        let update = action.update().unwrap();
        assert_eq!((update.update_expression(), update.condition_expression()), ("ADD #Sent :v0", None));
    }
}
