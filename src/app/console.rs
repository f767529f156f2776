//! The store that an operator's commands work on, by the configuration's choice.

use crate::{
    adapters::embedded::{Operator, Viewer},
    config::{Config, OutboxKind},
    console::{Operate, View},
};

/// Opens the store to read. It must be there already.
pub fn view(config: &Config) -> anyhow::Result<Box<dyn View>> {
    match &config.outbox.kind {
        OutboxKind::Embedded => Ok(Box::new(Viewer::open(&config.state.dir)?)),
        OutboxKind::Dynamodb(_) => anyhow::bail!("outbox.kind: commands can't read DynamoDB yet"),
    }
}

/// Opens the store to change it. It must be there already.
pub fn operate(config: &Config) -> anyhow::Result<Box<dyn Operate>> {
    match &config.outbox.kind {
        OutboxKind::Embedded => Ok(Box::new(Operator::open(&config.state.dir)?)),
        OutboxKind::Dynamodb(_) => anyhow::bail!("outbox.kind: commands can't change DynamoDB yet"),
    }
}
