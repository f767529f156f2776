//! Metric families with the names of their labels, so that a handle is asked for by values alone.

use std::{borrow::Cow, fmt};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// A set of labels. Values come from the configuration or from the code, never from input.
pub type Labels<const N: usize> = [(&'static str, Cow<'static, str>); N];

/// One counter per set of labels.
#[derive(Clone, Debug)]
pub struct Counters<const N: usize> {
    names: [&'static str; N],
    family: Family<Labels<N>, Counter>,
}

/// One gauge per set of labels. What is not known is absent.
#[derive(Clone, Debug)]
pub struct Gauges<const N: usize> {
    names: [&'static str; N],
    family: Family<Labels<N>, Gauge>,
}

/// One histogram of seconds per set of labels.
#[derive(Clone)]
pub struct Timings<const N: usize> {
    names: [&'static str; N],
    family: Family<Labels<N>, Histogram, fn() -> Histogram>,
}

impl<const N: usize> fmt::Debug for Timings<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timings").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Labels of these names and values.
pub fn labels<const N: usize>(names: [&'static str; N], values: [&str; N]) -> Labels<N> {
    std::array::from_fn(|at| (names[at], Cow::Owned(values[at].to_owned())))
}

impl<const N: usize> Counters<N> {
    /// Registers `NAME_total`.
    pub fn register(registry: &mut Registry, name: &str, names: [&'static str; N], help: &str) -> Self {
        let family = Family::default();
        registry.register(name, help, family.clone());
        Self { names, family }
    }

    /// The counter with these labels, exported from now on. Keep it: this looks it up.
    pub fn of(&self, values: [&str; N]) -> Counter {
        self.family.get_or_create_owned(&labels(self.names, values))
    }
}

impl<const N: usize> Gauges<N> {
    /// Registers `NAME`.
    pub fn register(registry: &mut Registry, name: &str, names: [&'static str; N], help: &str) -> Self {
        Self::register_as(registry, name, None, names, help)
    }

    /// Registers `NAME_seconds`.
    pub fn register_seconds(
        registry: &mut Registry,
        name: &str,
        names: [&'static str; N],
        help: &str,
    ) -> Self {
        Self::register_as(registry, name, Some(Unit::Seconds), names, help)
    }

    fn register_as(
        registry: &mut Registry,
        name: &str,
        unit: Option<Unit>,
        names: [&'static str; N],
        help: &str,
    ) -> Self {
        let family = Family::default();
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
            None => registry.register(name, help, family.clone()),
        }
        Self { names, family }
    }

    /// The gauge with these labels, exported from now on.
    pub fn of(&self, values: [&str; N]) -> Gauge {
        self.family.get_or_create_owned(&labels(self.names, values))
    }

    /// Exports a value, or nothing if it is not known.
    pub fn set(&self, values: [&str; N], known: Option<u64>) {
        if let Some(value) = known {
            self.of(values).set(i64::try_from(value).unwrap_or(i64::MAX));
        } else {
            self.family.remove(&labels(self.names, values));
        }
    }

    /// What is exported, for tests.
    #[cfg(test)]
    pub(crate) fn get(&self, values: [&str; N]) -> Option<u64> {
        let gauge = self.family.get(&labels(self.names, values))?;
        Some(u64::try_from(gauge.get()).expect("no test counts below 0"))
    }
}

impl<const N: usize> Timings<N> {
    /// Registers `NAME_seconds`.
    pub fn register(
        registry: &mut Registry,
        name: &str,
        names: [&'static str; N],
        help: &str,
        make: fn() -> Histogram,
    ) -> Self {
        let family = Family::new_with_constructor(make);
        registry.register_with_unit(name, help, Unit::Seconds, family.clone());
        Self { names, family }
    }

    /// The histogram with these labels, exported from now on. Keep it: this looks it up.
    pub fn of(&self, values: [&str; N]) -> Histogram {
        self.family.get_or_create_owned(&labels(self.names, values))
    }
}

/// Buckets for calls over a network or to a disk: 1 ms to a minute.
pub fn call_buckets() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0])
}

/// Buckets for how long messages wait: 0.1 s to three days.
pub fn age_buckets() -> Histogram {
    Histogram::new([0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 259_200.0])
}

/// What one of several holders adds to a gauge; taken back when it is dropped, even by a panic.
#[derive(Debug)]
pub struct Share {
    gauge: Gauge,
    share: i64,
}

impl Share {
    /// Nothing yet.
    pub fn of(gauge: Gauge) -> Self {
        Self { gauge, share: 0 }
    }

    /// This holder's part is `value` now.
    pub fn set(&mut self, value: usize) {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        if value != self.share {
            self.gauge.inc_by(value - self.share);
            self.share = value;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.gauge.dec_by(self.share);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn what_is_not_known_is_absent_and_never_0() {
        let mut registry = Registry::with_prefix("postrider");
        let depth = Gauges::register(&mut registry, "depth", [], "How many");
        let text = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text
        };
        assert!(!text().contains("depth"), "{}", text());
        depth.set([], Some(7));
        assert!(text().contains("\npostrider_depth{} 7\n"), "{}", text());
        depth.set([], None);
        assert!(!text().contains("depth"), "{}", text());
    }

    #[test]
    fn a_holder_that_is_gone_takes_its_share_along() {
        let gauge = Gauge::default();
        let (mut one, mut two) = (Share::of(gauge.clone()), Share::of(gauge.clone()));
        one.set(3);
        two.set(4);
        one.set(1);
        assert_eq!(gauge.get(), 5);
        drop(two);
        assert_eq!(gauge.get(), 1);
    }
}
