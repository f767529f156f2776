//! The store that an operator's commands work on, by the configuration's choice.

use crate::{
    adapters::embedded::{Operator, Viewer},
    config::{Config, OutboxKind},
    console::{Operate, View},
};

/// The configuration is refused before this is reached.
#[cfg(not(feature = "aws"))]
const WITHOUT_AWS: &str = "this program was built without AWS";

/// Opens the store to read. It must be there already.
pub fn view(config: &Config) -> anyhow::Result<Box<dyn View>> {
    match &config.outbox.kind {
        OutboxKind::Embedded => Ok(Box::new(Viewer::open(&config.state.dir)?)),
        #[cfg(feature = "aws")]
        OutboxKind::Dynamodb(dynamodb) => Ok(Box::new(super::aws::console(config, dynamodb)?)),
        #[cfg(not(feature = "aws"))]
        OutboxKind::Dynamodb(_) => anyhow::bail!(WITHOUT_AWS),
    }
}

/// Opens the store to change it. It must be there already.
pub fn operate(config: &Config) -> anyhow::Result<Box<dyn Operate>> {
    match &config.outbox.kind {
        OutboxKind::Embedded => Ok(Box::new(Operator::open(&config.state.dir)?)),
        #[cfg(feature = "aws")]
        OutboxKind::Dynamodb(dynamodb) => Ok(Box::new(super::aws::console(config, dynamodb)?)),
        #[cfg(not(feature = "aws"))]
        OutboxKind::Dynamodb(_) => anyhow::bail!(WITHOUT_AWS),
    }
}
