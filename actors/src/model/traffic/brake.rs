//! What slows a destination down at the moment: of everything that has kept a message from going at once, what has done so most
//! lately. It is for the operator; nothing is decided by it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::time::MonoMs;

/// After how long half of what was counted is forgotten: what slows it down *now* is soon ahead of what did before.
const HALF_LIFE: Duration = Duration::from_secs(1);

/// What nobody has met for so long slows nothing down. A rate of one message per second is met once a second.
const MEMORY: Duration = Duration::from_secs(5);

/// What keeps a message from going at once, though nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Brake {
    /// As many requests are in flight as its limit allows.
    Limit,
    /// As many requests are in flight as all destinations together may have.
    Pool,
    /// Its own rate.
    Rate,
    /// The rate over all destinations.
    RateOfAll,
    /// The rate of a file or of its feed.
    RateOfFile,
    /// Only retries are left, and they may be no more than a part of what goes.
    RetryBudget,
}

impl Brake {
    const ALL: [Self; 6] =
        [Self::Limit, Self::Pool, Self::Rate, Self::RateOfAll, Self::RateOfFile, Self::RetryBudget];
}

/// What has been met, lately.
#[derive(Clone, Copy, Debug, Default)]
pub struct Brakes([Mark; Brake::ALL.len()]);

#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    /// How often it was met; halved with each [`HALF_LIFE`].
    weight: f64,
    /// When it was met last, if it was …
    met: Option<MonoMs>,
    /// … and since when again and again.
    since: MonoMs,
}

impl Mark {
    fn weight_at(&self, now: MonoMs) -> Option<f64> {
        let age = now.since(self.met?);
        (age < MEMORY).then(|| self.weight * (-age.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2())
    }
}

impl Brakes {
    /// A message did not go because of `brake`.
    pub fn meet(&mut self, brake: Brake, now: MonoMs) {
        let mark = &mut self.0[brake as usize];
        let weight = mark.weight_at(now);
        if weight.is_none() {
            mark.since = now;
        }
        mark.weight = weight.unwrap_or_default() + 1.0;
        mark.met = Some(now);
    }

    /// What was met most, and since when.
    pub fn strongest(&self, now: MonoMs) -> Option<(Brake, MonoMs)> {
        let met = Brake::ALL.into_iter().zip(&self.0);
        let met = met.filter_map(|(brake, mark)| Some((brake, mark.since, mark.weight_at(now)?)));
        met.max_by(|a, b| a.2.total_cmp(&b.2)).map(|(brake, since, _)| (brake, since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_brake_has_its_own_mark() {
        for (index, brake) in Brake::ALL.into_iter().enumerate() {
            assert_eq!(brake as usize, index);
        }
    }

    #[test]
    fn what_is_met_most_is_named_and_what_is_not_met_any_more_is_forgotten() {
        let mut brakes = Brakes::default();
        assert_eq!(brakes.strongest(MonoMs(0)), None);
        for ms in (1_000..3_000).step_by(10) {
            brakes.meet(Brake::Rate, MonoMs(ms));
            if ms % 100 == 0 {
                brakes.meet(Brake::Limit, MonoMs(ms));
            }
        }
        assert_eq!(brakes.strongest(MonoMs(3_000)), Some((Brake::Rate, MonoMs(1_000))));
        // The rate is raised: the limit is what is left, and soon.
        for ms in (3_000..8_000).step_by(100) {
            brakes.meet(Brake::Limit, MonoMs(ms));
        }
        assert_eq!(brakes.strongest(MonoMs(8_000)), Some((Brake::Limit, MonoMs(1_000))));
        assert_eq!(brakes.strongest(MonoMs(20_000)), None);
        brakes.meet(Brake::Limit, MonoMs(20_000));
        assert_eq!(brakes.strongest(MonoMs(20_001)), Some((Brake::Limit, MonoMs(20_000))), "a new time");
    }

    #[test]
    fn a_rate_of_one_per_second_is_met_often_enough() {
        let mut brakes = Brakes::default();
        for second in 0..60 {
            brakes.meet(Brake::Rate, MonoMs(second * 1_000));
            assert_eq!(brakes.strongest(MonoMs(second * 1_000 + 999)), Some((Brake::Rate, MonoMs(0))));
        }
    }
}
