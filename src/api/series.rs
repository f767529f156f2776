//! How fast it went: samples of what the daemon counts, kept for the charts of the last fifteen minutes.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use postrider_actors::model::time::UnixMs;

use crate::shapes::Sample;

/// Between two samples that are kept.
pub(crate) const STEP: Duration = Duration::from_secs(5);
/// Samples that are kept: 15 minutes.
pub(crate) const SAMPLES_MAX: usize = 180;
/// What rates of the moment are taken over.
const MOMENT: Duration = Duration::from_secs(10);
/// Totals that are kept for that, however often one looks.
const TOTALS_MAX: usize = 16;

/// Samples by destination; under the empty name those of all together.
pub(crate) type Samples = BTreeMap<String, Sample>;

/// Everything that was sampled.
#[derive(Debug, Default)]
pub(crate) struct Series {
    /// What was counted lately, the oldest first.
    totals: VecDeque<(UnixMs, BTreeMap<String, Totals>)>,
    /// The oldest first.
    kept: VecDeque<(UnixMs, Samples)>,
    /// What was counted when the last sample was kept.
    last_kept: Option<(UnixMs, BTreeMap<String, Totals>)>,
    now: Samples,
}

/// What was counted of one destination since the process began, and what its gauges show.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Totals {
    sent: f64,
    attempts: f64,
    failed_4xx: f64,
    failed_5xx: f64,
    failed_timeout: f64,
    failed_other: f64,
    /// Attempts that took no longer, by the bounds in seconds, the last of them infinite.
    buckets: Vec<(f64, f64)>,
    limit: Option<u64>,
    in_flight: Option<u64>,
    open: Option<u64>,
}

impl Series {
    /// Takes what the daemon has counted at `now`. The sample that is to be kept now, if one is.
    pub(crate) fn take(&mut self, metrics: &str, now: UnixMs) -> Option<&Samples> {
        let totals = read(metrics);
        while self.totals.len() >= TOTALS_MAX
            || self.totals.get(1).is_some_and(|(at, _)| now.since(*at) >= MOMENT)
        {
            self.totals.pop_front();
        }
        let before = self.totals.front();
        self.now = samples(before.map(|(at, totals)| (now.since(*at), totals)), &totals);
        self.totals.push_back((now, totals.clone()));
        let due = self.last_kept.as_ref().is_none_or(|(at, _)| now.since(*at) >= STEP);
        if !due {
            return None;
        }
        let before = self.last_kept.replace((now, totals.clone()));
        let before = before.as_ref().map(|(at, totals)| (now.since(*at), totals));
        self.kept.push_back((now, samples(before, &totals)));
        if self.kept.len() > SAMPLES_MAX {
            self.kept.pop_front();
        }
        self.kept.back().map(|(_, samples)| samples)
    }

    /// The rates of the moment.
    pub(crate) fn now(&self) -> &Samples {
        &self.now
    }

    /// Of one destination, or of all under the empty name; the oldest first.
    pub(crate) fn of(&self, name: &str) -> Vec<(UnixMs, Sample)> {
        let of = |(at, samples): &(UnixMs, Samples)| (*at, samples.get(name).copied().unwrap_or_default());
        self.kept.iter().map(of).collect()
    }
}

fn samples(before: Option<(Duration, &BTreeMap<String, Totals>)>, now: &BTreeMap<String, Totals>) -> Samples {
    let none = Totals::default();
    let sample = |(name, totals): (&String, &Totals)| {
        let before = before.map(|(time, before)| (time, before.get(name).unwrap_or(&none)));
        (name.clone(), sample(before, totals))
    };
    now.iter().map(sample).collect()
}

fn sample(before: Option<(Duration, &Totals)>, now: &Totals) -> Sample {
    let gauges = Sample { limit: now.limit, in_flight: now.in_flight, open: now.open, ..Sample::default() };
    let Some((time, before)) = before.filter(|(time, _)| !time.is_zero()) else { return gauges };
    let per_s = |of: fn(&Totals) -> f64| Some(((of(now) - of(before)).max(0.0)) / time.as_secs_f64());
    let took = |share| quantile(&before.buckets, &now.buckets, share).map(|seconds| seconds * 1_000.0);
    Sample {
        sent_per_s: per_s(|totals| totals.sent),
        attempts_per_s: per_s(|totals| totals.attempts),
        failed_4xx_per_s: per_s(|totals| totals.failed_4xx),
        failed_5xx_per_s: per_s(|totals| totals.failed_5xx),
        failed_timeout_per_s: per_s(|totals| totals.failed_timeout),
        failed_other_per_s: per_s(|totals| totals.failed_other),
        p50_ms: took(0.50),
        p95_ms: took(0.95),
        ..gauges
    }
}

/// The time within which `share` of the attempts between two readings ended, by linear interpolation within a bucket, as
/// Prometheus does. `None`: there was none.
fn quantile(before: &[(f64, f64)], now: &[(f64, f64)], share: f64) -> Option<f64> {
    let new = |index: usize| now[index].1 - before.get(index).map_or(0.0, |(_, count)| *count);
    let all = new(now.len().checked_sub(1)?);
    if all <= 0.0 {
        return None;
    }
    let wanted = all * share;
    let index = (0..now.len()).find(|index| new(*index) >= wanted)?;
    let (from, below) = if index == 0 { (0.0, 0.0) } else { (now[index - 1].0, new(index - 1)) };
    let to = now[index].0;
    if to.is_infinite() {
        return Some(from);
    }
    Some(from + (to - from) * (wanted - below) / (new(index) - below).max(f64::MIN_POSITIVE))
}

/// Reads what is exported, and adds all up under the empty name.
fn read(metrics: &str) -> BTreeMap<String, Totals> {
    let mut all: BTreeMap<String, Totals> = BTreeMap::new();
    for line in metrics.lines() {
        let Some((name, labels, value)) = parts(line) else { continue };
        let Some(destination) = label(labels, "destination") else { continue };
        let of = |all: &mut BTreeMap<String, Totals>, change: &dyn Fn(&mut Totals)| {
            for name in [destination, ""] {
                change(all.entry(name.to_owned()).or_default());
            }
        };
        let gauge = |gauge: &mut Option<u64>| *gauge = Some(gauge.unwrap_or(0) + value as u64);
        match name {
            "postrider_messages_sent_total" => of(&mut all, &|totals| totals.sent += value),
            "postrider_requests_in_flight" => of(&mut all, &|totals| gauge(&mut totals.in_flight)),
            "postrider_permits" => of(&mut all, &|totals| gauge(&mut totals.limit)),
            "postrider_messages_open" => of(&mut all, &|totals| gauge(&mut totals.open)),
            "postrider_attempts_total" => {
                let outcome = label(labels, "outcome").unwrap_or_default();
                of(&mut all, &|totals| {
                    totals.attempts += value;
                    match outcome {
                        "sent" => {}
                        "status_4xx" | "status_429" | "gone" => totals.failed_4xx += value,
                        "status_5xx" => totals.failed_5xx += value,
                        "timeout" => totals.failed_timeout += value,
                        _ => totals.failed_other += value,
                    }
                });
            }
            "postrider_attempt_duration_seconds_bucket" => {
                let bound = label(labels, "le").map_or(f64::NAN, |bound| match bound {
                    "+Inf" => f64::INFINITY,
                    bound => bound.parse().unwrap_or(f64::NAN),
                });
                of(&mut all, &|totals| {
                    // All have the same bounds, in the same order.
                    match totals.buckets.iter_mut().find(|(known, _)| known.total_cmp(&bound).is_eq()) {
                        Some((_, count)) => *count += value,
                        None => totals.buckets.push((bound, value)),
                    }
                });
            }
            _ => {}
        }
    }
    all
}

/// Name, labels and value of a line `name{labels} value`.
fn parts(line: &str) -> Option<(&str, &str, f64)> {
    let (name, rest) = line.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    // No exemplars are exported; one would follow a `#`.
    Some((name, labels, value.split(' ').next()?.parse().ok()?))
}

/// A label's value. Names of destinations need no escapes.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    labels.split(',').find_map(|label| {
        let (known, value) = label.split_once('=')?;
        (known == name).then(|| value.trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(sent: u64, failed: u64, fast: u64) -> String {
        let all = sent + failed;
        format!(
            "postrider_messages_sent_total{{destination=\"a\"}} {sent}\n\
             postrider_attempts_total{{destination=\"a\",outcome=\"sent\"}} {sent}\n\
             postrider_attempts_total{{destination=\"a\",outcome=\"status_5xx\"}} {failed}\n\
             postrider_attempts_total{{destination=\"b\",outcome=\"timeout\"}} 7\n\
             postrider_attempt_duration_seconds_bucket{{le=\"0.1\",destination=\"a\"}} {fast}\n\
             postrider_attempt_duration_seconds_bucket{{le=\"1.0\",destination=\"a\"}} {all}\n\
             postrider_attempt_duration_seconds_bucket{{le=\"+Inf\",destination=\"a\"}} {all}\n\
             postrider_permits{{destination=\"a\"}} 16\n\
             postrider_permits{{destination=\"b\"}} 4\n"
        )
    }

    fn at(second: u64) -> UnixMs {
        UnixMs(1_000_000 + second * 1_000)
    }

    #[test]
    fn rates_are_taken_over_the_last_ten_seconds() {
        let mut series = Series::default();
        series.take(&exported(0, 0, 0), at(0));
        assert_eq!(series.now()["a"], Sample { limit: Some(16), ..Sample::default() }, "unknown is not 0");
        for second in 1..=20 {
            series.take(&exported(second * 100, 0, second * 100), at(second));
        }
        series.take(&exported(2_100, 50, 2_000), at(21));
        let now = series.now()["a"];
        assert_eq!((now.sent_per_s, now.failed_5xx_per_s), (Some(100.0), Some(5.0)));
        assert_eq!(now.failed_percent().map(f64::round), Some(5.0));
        assert_eq!(series.now()[""].limit, Some(20), "all together");
        assert_eq!(series.now()["b"].failed_timeout_per_s, Some(0.0));
        assert_eq!((series.now()["b"].p50_ms, series.now()["b"].failed_percent()), (None, None));
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let now = [(0.1, 50.0), (1.0, 100.0), (f64::INFINITY, 100.0)];
        assert_eq!(quantile(&[], &now, 0.5), Some(0.1));
        let p95 = quantile(&[], &now, 0.95).unwrap();
        assert!((p95 - 0.91).abs() < 1e-9, "{p95}");
        assert_eq!(quantile(&now, &now, 0.5), None, "no attempt since");
        let slow = [(0.1, 0.0), (1.0, 0.0), (f64::INFINITY, 3.0)];
        assert_eq!(quantile(&[], &slow, 0.5), Some(1.0), "no shorter than that");
    }

    #[test]
    fn samples_are_kept_every_five_seconds_and_bounded() {
        let mut series = Series::default();
        let kept = (0..5_000).filter(|second| series.take(&exported(*second, 0, 0), at(*second)).is_some());
        assert_eq!(kept.count(), 1_000);
        let of = series.of("a");
        assert_eq!(of.len(), SAMPLES_MAX);
        assert_eq!(of.last().map(|(_, sample)| sample.sent_per_s), Some(Some(1.0)));
        assert!(series.totals.len() <= TOTALS_MAX);
        assert_eq!(series.of("unknown").len(), SAMPLES_MAX);
    }
}
