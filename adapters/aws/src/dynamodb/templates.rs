//! `config/aws` and the policies of `docs/aws.md` against what the adapters use.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{item, schema};

const CLOUD_FORMATION: &str = include_str!("../../../../config/aws/postrider.yaml");
const TERRAFORM: &str = include_str!("../../../../config/aws/postrider.tf");
const HANDBOOK: &str = include_str!("../../../../docs/aws.md");

/// An index: hash key, range key, projected attributes.
type Index = (String, String, BTreeSet<String>);

/// The text behind `key:` or `key =`, without quotes.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let line = line.trim().trim_start_matches("- ");
    let rest = line.strip_prefix(key)?.trim_start();
    let rest = rest.strip_prefix([':', '='])?;
    Some(rest.trim().trim_matches('"'))
}

fn list(text: &str) -> BTreeSet<String> {
    let inner = text.trim_matches(['[', ']']);
    inner.split(',').map(|name| name.trim().trim_matches('"').to_owned()).collect()
}

fn expected() -> BTreeMap<String, Index> {
    schema::indexes()
        .into_iter()
        .map(|index| {
            let include = index.include.iter().map(|&name| name.to_owned()).collect();
            (index.name.to_owned(), (index.hash.0.to_owned(), index.range.0.to_owned(), include))
        })
        .collect()
}

#[test]
fn cloud_formation_makes_the_indexes_of_the_schema() {
    let mut found: BTreeMap<String, Index> = BTreeMap::new();
    let (mut index, mut attribute) = (None, String::new());
    let (before, ledger) = CLOUD_FORMATION.split_once("\n  Ledger:\n").expect("it makes the ledger's table");
    assert!(!before.contains("IndexName"), "the indexes are the ledger table's");
    for line in ledger.lines() {
        if let Some(name) = value(line, "IndexName") {
            index = Some(name.to_owned());
        } else if let Some(name) = value(line, "AttributeName") {
            attribute = name.to_owned();
        } else if let Some(name) = &index {
            let entry = found.entry(name.clone()).or_default();
            match value(line, "KeyType") {
                Some("HASH") => entry.0.clone_from(&attribute),
                Some(_) => entry.1.clone_from(&attribute),
                None => {}
            }
            if let Some(names) = value(line, "NonKeyAttributes") {
                entry.2 = list(names);
            } else if value(line, "TimeToLiveSpecification").is_some() {
                index = None;
            }
        }
    }
    assert_eq!(found, expected());
}

#[test]
fn terraform_makes_the_indexes_of_the_schema() {
    let mut found: BTreeMap<String, Index> = BTreeMap::new();
    let ledger = TERRAFORM.split_once("resource \"aws_dynamodb_table\" \"ledger\"");
    let (before, ledger) = ledger.expect("it makes the ledger's table");
    assert!(!before.contains("global_secondary_index"), "the indexes are the ledger table's");
    for block in ledger.split("global_secondary_index {").skip(1) {
        let block = block.split('}').next().unwrap_or_default();
        let get = |key| block.lines().find_map(|line| value(line, key)).unwrap_or_default().to_owned();
        let names = list(&get("non_key_attributes"));
        found.insert(get("name"), (get("hash_key"), get("range_key"), names));
    }
    assert_eq!(found, expected());
}

#[test]
fn the_policies_name_the_indexes_of_the_ledger_s_table() {
    let texts = [
        (CLOUD_FORMATION, "${Ledger.Arn}/index/*", 2),
        (TERRAFORM, "${aws_dynamodb_table.ledger.arn}/index/*", 2),
        (HANDBOOK, "table/postrider-ledger/index/*", 3),
    ];
    for (text, indexes, times) in texts {
        assert_eq!((text.matches(indexes).count(), text.matches("/index/*").count()), (times, times));
    }
}

#[test]
fn both_define_every_attribute_that_is_a_key() {
    let of_indexes = schema::indexes().into_iter().flat_map(|index| [index.hash.0, index.range.0]);
    for name in of_indexes.chain([item::PK, item::SK]) {
        let (_, ledger) = CLOUD_FORMATION.split_once("\n  Ledger:\n").expect("it makes the ledger's table");
        assert!(ledger.contains(&format!("- AttributeName: {name}\n          AttributeType: ")), "{name}");
        let (_, ledger) = TERRAFORM.split_once("\"ledger\" {").expect("it makes the ledger's table");
        assert!(ledger.contains(&format!("name = \"{name}\"\n    type = ")), "{name}");
    }
}

#[test]
fn both_name_the_keys_and_the_ttl_of_both_tables() {
    for (text, ttl) in
        [(CLOUD_FORMATION, "AttributeName: ExpiresAt"), (TERRAFORM, "attribute_name = \"ExpiresAt\"")]
    {
        assert_eq!(text.matches(ttl).count(), 2);
        for name in [item::DIGEST, item::PK, item::SK] {
            assert!(text.contains(name), "{name}");
        }
    }
    assert_eq!(item::EXPIRES_AT, "ExpiresAt");
    assert!(
        CLOUD_FORMATION.contains("${TableName}-ledger") && TERRAFORM.contains("${var.table_name}-ledger")
    );
}

/// The actions per `Sid` of the handbook's policies, one map per policy.
fn handbook() -> Vec<BTreeMap<String, BTreeSet<String>>> {
    let blocks =
        HANDBOOK.split("```json\n").skip(1).map(|block| block.split("```").next().unwrap_or_default());
    blocks
        .map(|block| {
            let policy: Value = serde_json::from_str(block).expect("a policy is JSON");
            let statements = match policy.get("Statement") {
                Some(Value::Array(statements)) => statements.clone(),
                _ => vec![policy],
            };
            let actions = |statement: &Value| {
                let actions = statement["Action"].as_array().expect("actions are a list").iter();
                actions.map(|action| action.as_str().expect("an action is a text").to_owned()).collect()
            };
            let sid = |statement: &Value| statement["Sid"].as_str().expect("each has a Sid").to_owned();
            statements.iter().map(|statement| (sid(statement), actions(statement))).collect()
        })
        .collect()
}

/// The actions per `Sid` of a template, in the order of its text.
fn statements(text: &str, sid_key: &str) -> Vec<(String, BTreeSet<String>)> {
    let mut found: Vec<(String, BTreeSet<String>)> = Vec::new();
    for line in text.lines() {
        if let Some(sid) = value(line, sid_key) {
            found.push((sid.to_owned(), BTreeSet::new()));
        } else if let Some((_, actions)) = found.last_mut() {
            let words = line.split(|at: char| !(at.is_ascii_alphanumeric() || at == ':'));
            actions.extend(
                words
                    .filter(|word| word.starts_with("sqs:") || word.starts_with("dynamodb:"))
                    .map(ToOwned::to_owned),
            );
        }
    }
    found
}

#[test]
fn the_templates_grant_what_the_handbook_says() {
    let policies = handbook();
    let [daemon, inbound, read, _migrate] = &policies[..] else { panic!("four policies: {policies:?}") };
    let granted: Vec<_> = daemon.iter().chain(inbound).chain(read).collect();
    for (text, key) in [(CLOUD_FORMATION, "Sid"), (TERRAFORM, "sid")] {
        let found = statements(text, key);
        assert_eq!(found.len(), granted.len(), "{found:?}");
        for (sid, actions) in &found {
            let is_granted = granted.iter().any(|(name, of)| *name == sid && *of == actions);
            assert!(is_granted, "{sid} grants {actions:?}");
        }
    }
}

/// Which action an SDK call needs.
fn action_of(call: &str) -> &'static [&'static str] {
    match call {
        "send_message" | "send_message_batch" => &["sqs:SendMessage"],
        "receive_message" => &["sqs:ReceiveMessage"],
        "delete_message_batch" => &["sqs:DeleteMessage"],
        "change_message_visibility" | "change_message_visibility_batch" => &["sqs:ChangeMessageVisibility"],
        "get_queue_attributes" => &["sqs:GetQueueAttributes"],
        "get_queue_url" => &["sqs:GetQueueUrl"],
        "create_queue" => &["sqs:CreateQueue"],
        "batch_execute_statement" => &["dynamodb:PartiQLUpdate"],
        "batch_get_item" => &["dynamodb:BatchGetItem"],
        "batch_write_item" => &["dynamodb:BatchWriteItem"],
        "delete_item" => &["dynamodb:DeleteItem"],
        "get_item" => &["dynamodb:GetItem"],
        "put_item" => &["dynamodb:PutItem"],
        "query" => &["dynamodb:Query"],
        "scan" => &["dynamodb:Scan"],
        "transact_write_items" => &["dynamodb:PutItem", "dynamodb:UpdateItem", "dynamodb:DeleteItem"],
        "update_item" => &["dynamodb:UpdateItem"],
        "describe_table" => &["dynamodb:DescribeTable"],
        "describe_time_to_live" => &["dynamodb:DescribeTimeToLive"],
        "create_table" => &["dynamodb:CreateTable"],
        "update_table" => &["dynamodb:UpdateTable"],
        "update_time_to_live" => &["dynamodb:UpdateTimeToLive"],
        _ => &[],
    }
}

/// Calls of the SDK's clients in the adapters' sources.
fn calls_made() -> BTreeSet<String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut calls = BTreeSet::new();
    for directory in ["sqs", "dynamodb"] {
        for entry in std::fs::read_dir(root.join(directory)).expect("the adapters' sources are there") {
            let path = entry.expect("a directory can be read").path();
            if path.ends_with("templates.rs") {
                continue;
            }
            let source: String =
                std::fs::read_to_string(&path).expect("a source can be read").split_whitespace().collect();
            for after in source.split("client.").skip(1) {
                let name: String =
                    after.chars().take_while(|at| at.is_ascii_lowercase() || *at == '_').collect();
                if after[name.len()..].starts_with("()") {
                    calls.insert(name);
                }
            }
        }
    }
    calls
}

#[test]
fn every_call_is_permitted_and_every_permission_is_used() {
    let calls = calls_made();
    let needed: BTreeSet<&str> = calls.iter().flat_map(|call| action_of(call)).copied().collect();
    let unknown: Vec<_> =
        calls.iter().filter(|call| action_of(call).is_empty() && *call != "config").collect();
    assert_eq!(unknown, Vec::<&String>::new(), "no permission is known for these calls");
    let policies = handbook();
    let granted: BTreeSet<&str> =
        policies.iter().flat_map(BTreeMap::values).flatten().map(String::as_str).collect();
    assert_eq!(needed, granted);
    let daemon: BTreeSet<&str> = policies[0].values().flatten().map(String::as_str).collect();
    let makes = ["CreateQueue", "CreateTable", "UpdateTable", "UpdateTimeToLive"];
    let without_making = needed.iter().filter(|action| !makes.iter().any(|make| action.ends_with(make)));
    assert_eq!(without_making.copied().collect::<BTreeSet<_>>(), daemon);
}
