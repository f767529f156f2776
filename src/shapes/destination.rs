use std::num::{NonZeroU32, NonZeroUsize};

use postrider_actors::{
    model::{
        ceiling,
        limits::{CONCURRENCY_MAX, Concurrency},
        outcome::Attempt,
        standing,
        time::UnixMs,
        trouble::Trouble,
    },
    ports::console::DestinationView,
};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Number, Value};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, OneOfBuilder, Schema, Type},
    },
};

use super::{Ceiling, Counts, Sample, Time};
use crate::config;

/// Where messages are delivered.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct Destination {
    pub(crate) name: String,
    /// `webhook` or `table`; `null` if the configuration does not have it.
    pub(crate) kind: Option<&'static str>,
    /// Its origin, or its table: a path may hold a secret.
    pub(crate) url: Option<String>,
    pub(crate) configured: bool,
    /// `enabled`, `paused` (by the configuration), `disabled` (by an operator, a 410, a storm), `blocked` or
    /// `not configured`
    pub(crate) state: &'static str,
    pub(crate) since: Option<Time>,
    pub(crate) reason: Option<String>,
    /// Messages that are not settled.
    pub(crate) open: u64,
    /// Over all files.
    pub(crate) counts: Counts,
    pub(crate) sent_per_s: Option<f64>,
    /// The limit.
    pub(crate) rate_per_s: Option<u32>,
    /// Whether an operator has set it.
    pub(crate) rate_set: bool,
    pub(crate) concurrency: Option<InFlightLimit>,
    pub(crate) concurrency_set: bool,
    /// Requests that may be in flight from this machine now.
    pub(crate) limit: Option<u64>,
    pub(crate) in_flight: Option<u64>,
    /// `closed`, `open` or `half-open`
    pub(crate) breaker: Option<&'static str>,
    /// Since when nothing but probes goes.
    pub(crate) out_since: Option<Time>,
    /// When the next probe goes, or before when the receiver wants nothing.
    pub(crate) not_before: Option<Time>,
    pub(crate) retry_tokens: Option<u64>,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p95_ms: Option<f64>,
    /// Attempts that failed, in the last 10 s.
    pub(crate) failed_percent: Option<f64>,
    pub(crate) batches: Batches,
    pub(crate) next_due: Option<Time>,
    /// The feeds that wait because of its backlog.
    pub(crate) holds: Vec<String>,
    pub(crate) last_error: Option<LastError>,
    pub(crate) ceiling: Option<Ceiling>,
}

/// A number, or `auto`: as many as the receiver can bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum InFlightLimit {
    Fixed(NonZeroUsize),
    Found(Auto),
}

/// It is found by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Auto {
    Auto,
}

/// A number as a whole one, if it is: in JSON `5.0` is one too.
pub(crate) fn whole_of(number: &Number) -> Option<u64> {
    /// Beyond that not every whole number has a float of its own.
    const EXACT: f64 = (1_u64 << 53) as f64;
    let exact = |number: &f64| number.fract() == 0.0 && (0.0..=EXACT).contains(number);
    number.as_u64().or_else(|| number.as_f64().filter(exact).map(|number| number as u64))
}

impl<'de> Deserialize<'de> for InFlightLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let number = value.as_number().and_then(whole_of).and_then(|number| usize::try_from(number).ok());
        match (&value, number.and_then(NonZeroUsize::new)) {
            (Value::String(word), _) if word == "auto" => Ok(Self::Found(Auto::Auto)),
            (_, Some(number)) => Ok(Self::Fixed(number)),
            _ => Err(D::Error::custom("expected a number from 1, \"auto\" or null")),
        }
    }
}

impl PartialSchema for InFlightLimit {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1));
        let word = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["auto"]));
        OneOfBuilder::new().item(number.maximum(Some(CONCURRENCY_MAX))).item(word).into()
    }
}

impl ToSchema for InFlightLimit {}

impl From<Concurrency> for InFlightLimit {
    fn from(concurrency: Concurrency) -> Self {
        match concurrency {
            Concurrency::Auto => Self::Found(Auto::Auto),
            Concurrency::Fixed(number) => Self::Fixed(number),
        }
    }
}

impl From<InFlightLimit> for Concurrency {
    fn from(limit: InFlightLimit) -> Self {
        match limit {
            InFlightLimit::Found(Auto::Auto) => Self::Auto,
            InFlightLimit::Fixed(number) => Self::Fixed(number),
        }
    }
}

/// A destination's batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Batches {
    /// Not due yet; where another queue carries them, all that it has not accepted.
    pub(crate) outstanding: u64,
    /// Due, and waiting for a worker.
    pub(crate) queued: Option<u64>,
    pub(crate) leased: Option<u64>,
    /// Set aside.
    pub(crate) damaged: Option<u64>,
}

/// The last attempt that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct LastError {
    pub(crate) at: Time,
    pub(crate) status: Option<u16>,
    pub(crate) reason: &'static str,
    pub(crate) text: Option<String>,
}

impl From<&standing::LastError> for LastError {
    fn from(error: &standing::LastError) -> Self {
        let Attempt { at, status, reason } = error.attempt;
        Self {
            at: at.into(),
            status: (status != 0).then_some(status),
            reason: reason.as_str(),
            text: error.text.clone(),
        }
    }
}

/// How a webhook's traffic stands on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LiveTraffic {
    pub(crate) limit: usize,
    pub(crate) in_flight: usize,
    pub(crate) out_since: Option<UnixMs>,
    pub(crate) paused_until: Option<UnixMs>,
    pub(crate) retry_tokens: u64,
}

/// What the store does not know of a destination.
#[derive(Clone, Debug, Default)]
pub(crate) struct DestinationFacts {
    pub(crate) trouble: Option<Trouble>,
    pub(crate) traffic: Option<LiveTraffic>,
    pub(crate) sample: Sample,
    pub(crate) holds: Vec<String>,
    /// What binds it.
    pub(crate) ceiling: Option<ceiling::Ceiling>,
}

impl Destination {
    /// What store, configuration and daemon know of it.
    pub(crate) fn of(
        name: &str,
        view: &DestinationView,
        known: Option<&config::Destination>,
        facts: DestinationFacts,
        now: UnixMs,
    ) -> Self {
        let DestinationFacts { trouble, traffic, sample, holds, ceiling } = facts;
        let state = match known {
            None => "not configured",
            Some(_) if view.disabled.is_some() => "disabled",
            Some(known) if known.paused => "paused",
            Some(_) if trouble.is_some() => "blocked",
            Some(_) => "enabled",
        };
        let why = match (&view.disabled, trouble) {
            (Some((since, reason)), _) => Some((*since, reason.clone())),
            (None, Some(Trouble { since, reason })) => Some((since, reason)),
            (None, None) => None,
        };
        let breaker = traffic.map(|traffic| match (traffic.out_since, traffic.paused_until) {
            (None, _) => "closed",
            (Some(_), Some(until)) if until > now => "open",
            (Some(_), _) => "half-open",
        });
        Self {
            name: name.to_owned(),
            kind: known.map(|known| if known.table().is_some() { "table" } else { "webhook" }),
            url: known.and_then(place),
            configured: known.is_some(),
            state,
            since: why.as_ref().map(|(since, _)| Time(*since)),
            reason: why.map(|(_, reason)| reason),
            open: view.counts.open(),
            counts: Counts::from(&view.counts),
            sent_per_s: sample.sent_per_s,
            rate_per_s: rate(known, view),
            rate_set: view.limits.rate_per_s.is_some(),
            concurrency: concurrency(known, view).map(InFlightLimit::from),
            concurrency_set: view.limits.concurrency.is_some(),
            limit: traffic.map(|traffic| traffic.limit as u64).or(sample.limit),
            in_flight: traffic.map(|traffic| traffic.in_flight as u64).or(sample.in_flight),
            breaker,
            out_since: traffic.and_then(|traffic| traffic.out_since).map(Time),
            not_before: traffic.and_then(|traffic| traffic.paused_until).map(Time),
            retry_tokens: traffic.map(|traffic| traffic.retry_tokens),
            p50_ms: sample.p50_ms,
            p95_ms: sample.p95_ms,
            failed_percent: sample.failed_percent(),
            batches: Batches {
                outstanding: view.outstanding,
                queued: view.queued,
                leased: view.leased,
                damaged: view.quarantined,
            },
            next_due: view.next_due.map(Time),
            holds,
            last_error: ceiling.as_ref().and_then(|ceiling| ceiling.last_error.as_ref()).map(LastError::from),
            ceiling: ceiling.as_ref().map(Ceiling::from),
        }
    }
}

impl Sample {
    /// Of the attempts that were made; `None`: there was none.
    pub(crate) fn failed_percent(&self) -> Option<f64> {
        let attempts = self.attempts_per_s.filter(|attempts| *attempts > 0.0)?;
        let failed = [
            self.failed_4xx_per_s,
            self.failed_5xx_per_s,
            self.failed_timeout_per_s,
            self.failed_other_per_s,
        ];
        let failed: f64 = failed.into_iter().flatten().sum();
        Some((failed / attempts * 100.0).clamp(0.0, 100.0))
    }
}

/// Where it is, without what may be secret.
fn place(known: &config::Destination) -> Option<String> {
    if let Some(table) = known.table() {
        return Some(format!("table {} in {}", table.table.plain(), table.warehouse));
    }
    Some(known.webhook()?.url.origin().ascii_serialization())
}

/// The limit on messages per second to a destination, if there is one.
pub(crate) fn rate(known: Option<&config::Destination>, view: &DestinationView) -> Option<u32> {
    let by_config = || known.and_then(|known| known.rate()).map(|rate| rate.per_s);
    view.limits.rate_per_s.map(NonZeroU32::get).or_else(by_config)
}

/// The requests that may be in flight to a webhook.
pub(crate) fn concurrency(
    known: Option<&config::Destination>,
    view: &DestinationView,
) -> Option<Concurrency> {
    let by_config = || {
        let fixed = known?.webhook()?.concurrency;
        Some(fixed.and_then(NonZeroUsize::new).map_or(Concurrency::Auto, Concurrency::Fixed))
    };
    view.limits.concurrency.or_else(by_config)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_limit_is_a_whole_number_or_auto() {
        let read = |value| serde_json::from_value::<InFlightLimit>(value).map(Concurrency::from).ok();
        let fixed = |number| NonZeroUsize::new(number).map(Concurrency::Fixed);
        assert_eq!(read(json!("auto")), Some(Concurrency::Auto));
        assert_eq!((read(json!(8)), read(json!(8.0))), (fixed(8), fixed(8)));
        for wrong in [json!("many"), json!(0), json!(-1), json!(1.5), json!(1e300), json!([8]), json!(true)] {
            assert_eq!(read(wrong.clone()), None, "{wrong}");
        }
        for limit in [Concurrency::Auto, fixed(7).expect("it is not 0")] {
            let written = serde_json::to_value(InFlightLimit::from(limit)).expect("it is JSON");
            assert_eq!(read(written), Some(limit));
        }
    }
}
