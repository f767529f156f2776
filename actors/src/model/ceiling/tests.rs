use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::model::{
    file::FileRecord,
    ids::FileId,
    outcome::{Attempt, Reason},
    priority::Priority,
    terms::Rate,
    window::Windows,
};

/// 2027-01-15 08:00 UTC, a Friday.
const NOW: UnixMs = UnixMs(1_800_000_000_000);

fn ago(seconds: u64) -> UnixMs {
    NOW.before(Duration::from_secs(seconds))
}

fn hence(seconds: u64) -> UnixMs {
    NOW.after(Duration::from_secs(seconds))
}

fn trouble(reason: &str) -> Trouble {
    Trouble { since: ago(60), reason: reason.into() }
}

fn counts(accepted: u64, sent: u64, retrying: u64) -> DestinationCounts {
    DestinationCounts { accepted, sent, retrying, ..DestinationCounts::default() }
}

fn report(change: impl FnOnce(&mut FileReport)) -> FileReport {
    let mut report = FileReport {
        file: FileRecord {
            id: FileId([7; 16]),
            feed: "alerts".into(),
            name: "a.csv".into(),
            bytes: 9,
            sha256: "00".into(),
            claimed_at: ago(120),
            destinations: vec!["support".into()],
            terms: Terms::default(),
            priority: Priority::Normal,
        },
        state: FileState::Ingested,
        closed_at: Some(ago(100)),
        settled_at: None,
        rows: 1_000,
        rejected: 0,
        duplicates: 0,
        destinations: [("support".to_owned(), counts(1_000, 100, 0))].into(),
        held: BTreeMap::new(),
        priorities: BTreeMap::new(),
        failures: BTreeMap::new(),
    };
    change(&mut report);
    report
}

/// A daemon that sends 900 messages of one file to `support`, 10 per second, at its limit.
fn facts(change: impl FnOnce(&mut Facts)) -> Facts {
    let traffic = TrafficStanding {
        limit: 64,
        limit_max: 64,
        brake: Some((Brake::Limit, ago(30))),
        per_s: 10.0,
        pace: 10.0,
        ..TrafficStanding::default()
    };
    let support = DestinationFacts {
        is_configured: true,
        counts: counts(1_000, 100, 0),
        due: Some(2),
        traffic: Some(traffic),
        ..DestinationFacts::default()
    };
    let mut facts = Facts {
        is_running: Some(true),
        pool: 512,
        feeds: [("alerts".to_owned(), FeedFacts::default())].into(),
        destinations: [("support".to_owned(), support)].into(),
        has_files: true,
        files_per_s: [(FileId([7; 16]), 10.0)].into(),
        ..Facts::default()
    };
    change(&mut facts);
    facts
}

fn support(change: impl FnOnce(&mut DestinationFacts)) -> Facts {
    facts(|facts| change(facts.destinations.get_mut("support").unwrap()))
}

fn traffic(change: impl FnOnce(&mut TrafficStanding)) -> Facts {
    support(|facts| change(facts.traffic.as_mut().unwrap()))
}

fn error(status: u16, reason: Reason, text: &str) -> LastError {
    let text = (!text.is_empty()).then(|| text.to_owned());
    LastError { attempt: Attempt { at: ago(3), status, reason }, text }
}

fn held(cause: HoldCause, reason: &str) -> FileReport {
    let hold = FileHold { since: ago(600), from_row: 0, cause, reason: reason.into() };
    report(|report| {
        report.held.insert("support".into(), hold);
    })
}

/// What is said of the destination, and what is to be done.
fn said(facts: &Facts) -> (String, String) {
    let ceiling = facts.of_destination("support", NOW);
    (ceiling.to_string(), ceiling.remedy().unwrap_or_default())
}

#[test]
fn each_setting_that_slows_a_destination_down_is_named() {
    let braked = |brake| traffic(|traffic| traffic.brake = Some((brake, ago(30))));
    let rate = |is_set| {
        let mut facts = braked(Brake::Rate);
        let support = facts.destinations.get_mut("support").unwrap();
        (support.rate_per_s, support.is_rate_set) = (Some(500), is_set);
        facts
    };
    let limit = |limit, limit_max, is_found| {
        traffic(|traffic| (traffic.limit, traffic.limit_max, traffic.is_found) = (limit, limit_max, is_found))
    };
    let mut of_all = braked(Brake::RateOfAll);
    of_all.rate_of_all = Some(700);
    for (facts, text, remedy) in [
        (rate(false), "rate_per_s = 500", "postrider rate support N"),
        (rate(true), "rate_per_s = 500 (set by the operator)", "postrider rate support default"),
        (of_all, "delivery.rate_per_s = 700", "[delivery]"),
        (braked(Brake::Pool), "delivery.concurrency = 512", "concurrency of [delivery]"),
        (limit(64, 64, false), "concurrency = 64", "postrider concurrency support auto"),
        (limit(4, 64, false), "slow start: 4 of concurrency = 64", "by itself"),
        (limit(48, 1_024, true), "limit found by itself: 48", "nothing to set"),
        (limit(1_024, 1_024, true), "concurrency_max = 1024", "concurrency_max of [destinations.support]"),
        (traffic(|traffic| traffic.brake = None), "nothing: messages are on their way", ""),
    ] {
        let ceiling = facts.of_destination("support", NOW);
        assert_eq!(ceiling.to_string(), text);
        assert!(ceiling.remedy().unwrap_or_default().contains(remedy), "{text}: {:?}", ceiling.remedy());
        assert_eq!(ceiling.finish, Some(hence(90)));
        assert_eq!(ceiling.done_at(), Some(hence(120)), "to the next minute");
        assert!(!ceiling.is_stop() && !ceiling.is_for_operator(), "{text}");
    }
    assert_eq!(facts(|_| {}).of_destination("support", NOW).since, Some(ago(30)));
}

#[test]
fn each_trouble_of_a_destination_names_its_cause_and_its_remedy() {
    let down = traffic(|traffic| {
        (traffic.open_since, traffic.paused_until) = (Some(ago(42)), Some(hence(8)));
        traffic.last_error = Some(error(503, Reason::Status, "down for repair"));
    });
    let silent = traffic(|traffic| {
        traffic.open_since = Some(ago(400));
        traffic.last_error = Some(error(0, Reason::Timeout, ""));
    });
    let asks = traffic(|traffic| {
        traffic.paused_until = Some(hence(61));
        traffic.last_error = Some(error(429, Reason::Status, ""));
    });
    let wrong = format!("{}: 30 of 40 messages failed for good (status 401)", storm::SUSPECT);
    let disabled = |reason: &str| support(|facts| facts.disabled = Some((ago(60), reason.to_owned())));
    for (facts, text, remedy) in [
        (down, "breaker open: 503 for 42 s, probe in 8 s", "the receiver has to answer"),
        (silent, "breaker open: timeout for 7 min, probing", "the receiver has to answer"),
        (asks, "the receiver asks for a pause: 429, again in 61 s", "by itself"),
        (disabled(PAUSED), "paused by the operator, 07:59 UTC", "postrider resume support"),
        (disabled("new key"), "paused by the operator, 07:59 UTC: new key", "postrider resume support"),
        (
            disabled(&wrong),
            "disabled, 07:59 UTC: suspect configuration: 30 of 40 messages failed for good (status 401)",
            "put secret, address or template of [destinations.support] right",
        ),
        (disabled(outcome::GONE), "disabled, 07:59 UTC: it answered 410 Gone", "postrider resume support"),
        (support(|facts| facts.is_paused = true), "paused = true", "postrider reload"),
        (
            support(|facts| facts.blocked = Some(trouble("10.0.0.1 is private"))),
            "blocked, 07:59 UTC: 10.0.0.1 is private",
            "`allow`",
        ),
        (
            support(|facts| facts.is_configured = false),
            "the configuration has no such destination",
            "add [destinations.support]",
        ),
    ] {
        assert_eq!(said(&facts).0, text);
        assert!(said(&facts).1.contains(remedy), "{text}: {}", said(&facts).1);
        let ceiling = facts.of_destination("support", NOW);
        assert!(ceiling.is_stop() && ceiling.finish.is_none(), "{text}");
        // The file and the whole say the same, and of what.
        let file = report(|_| {});
        let of_file = facts.of_file(&file, NOW);
        assert_eq!((of_file.to_string(), of_file.destination.as_deref()), (text.to_owned(), Some("support")));
        assert_eq!(facts.of_whole(&[], NOW).to_string(), text);
    }
}

#[test]
fn retries_that_wait_say_when_the_next_goes() {
    let waiting = support(|facts| {
        (facts.counts, facts.due, facts.next_due) = (counts(1_000, 988, 12), Some(0), Some(hence(40)));
    });
    assert_eq!(said(&waiting).0, "12 messages have failed and wait to be tried again, the next in 40 s");
    let budget = traffic(|traffic| traffic.brake = Some((Brake::RetryBudget, ago(5))));
    assert!(said(&budget).0.starts_with("too much fails"));
}

fn full_disk(path: &str) -> DiskUse {
    DiskUse { path: path.into(), percent: 100, free: 0 }
}

#[test]
fn each_trouble_of_the_process_stands_before_everything_else() {
    let store = Trouble { since: ago(30), reason: "the store did not answer: timed out".into() };
    let away = |name: &str| {
        facts(|facts| {
            facts.engines.insert(name.to_owned(), store.clone());
        })
    };
    let disk = facts(|facts| facts.disk = Some(full_disk("/var/lib/postrider")));
    for (facts, text) in [
        (away("SQS"), "SQS is away for 30 s: the store did not answer: timed out"),
        (away("Postgres"), "Postgres is away for 30 s: the store did not answer: timed out"),
        (facts(|facts| facts.is_running = Some(false)), "no daemon is running"),
        (disk, "disk 100 % (/var/lib/postrider)"),
    ] {
        for ceiling in [
            facts.of_whole(&[], NOW),
            facts.of_destination("support", NOW),
            facts.of_file(&report(|_| {}), NOW),
        ] {
            assert_eq!(ceiling.to_string(), text);
            assert!(ceiling.is_for_operator() && ceiling.remedy().is_some(), "{text}");
        }
    }
    let unknown = facts(|facts| facts.is_running = None);
    assert_eq!(unknown.of_whole(&[], NOW).to_string(), "concurrency = 64", "another machine may send");
}

#[test]
fn a_pause_is_named_even_if_no_daemon_runs() {
    let mut facts = support(|facts| facts.disabled = Some((ago(60), PAUSED.into())));
    facts.is_running = Some(false);
    assert_eq!(facts.of_destination("support", NOW).to_string(), "paused by the operator, 07:59 UTC");
    assert_eq!(facts.of_whole(&[], NOW).to_string(), "no daemon is running");
}

#[test]
fn where_a_destination_waits_for_messages_its_files_say_why_none_come() {
    let idle = facts(|facts| {
        facts.destinations.get_mut("support").unwrap().traffic.as_mut().unwrap().brake = None;
    });
    assert_eq!(idle.of_whole(&[], NOW).cause, Cause::OnTheirWay);
    let later = report(|report| {
        report.file.name = "later.csv".into();
        report.file.terms.not_before = Some(hence(3_600));
    });
    assert_eq!(idle.of_whole(&[&later], NOW).cause, Cause::NotBefore);
    // One that is held by its canary is noted among what is held of its feed too.
    let reason = "at support: 30 % of the first 100 messages failed".to_owned();
    let hold = FileHold { since: ago(60), from_row: 1, cause: HoldCause::Errors, reason };
    let held = report(|report| drop(report.held.insert("support".into(), hold)));
    let noted = facts(|facts| {
        facts.destinations.get_mut("support").unwrap().traffic.as_mut().unwrap().brake = None;
        facts.feeds.get_mut("alerts").unwrap().held.insert("a.csv".into(), trouble("held"));
    });
    for facts in [&idle, &noted] {
        let whole = facts.of_whole(&[&later, &held], NOW);
        assert_eq!(whole.word(), "canary");
        assert!(whole.remedy().unwrap().contains("postrider release a.csv"), "{whole}");
        assert_eq!(whole.finish, None, "what stands has no end");
    }
    // Where the destination itself is the reason, it is named.
    let limited = facts(|_| {});
    assert_eq!(limited.of_whole(&[&later], NOW).word(), "concurrency");
}

#[test]
fn each_trouble_of_a_feed_is_named_and_a_full_disk_where_it_is_the_reason() {
    let feed = |change: &dyn Fn(&mut FeedFacts)| {
        facts(|facts| {
            facts.destinations.get_mut("support").unwrap().counts = counts(1_000, 1_000, 0);
            change(facts.feeds.get_mut("alerts").unwrap());
        })
    };
    let parked = feed(&|feed| feed.parked = Some(trouble("no such directory")));
    assert_eq!(parked.of_whole(&[], NOW).to_string(), "feed alerts parked, 07:59 UTC: no such directory");
    let unreadable = feed(&|feed| {
        feed.held.insert("b.csv".into(), trouble("permission denied"));
    });
    let whole = unreadable.of_whole(&[], NOW);
    assert_eq!(
        (whole.to_string().as_str(), whole.file.as_deref()),
        ("held, 07:59 UTC: permission denied", Some("b.csv"))
    );
    assert!(unreadable.of_unread("alerts", "c.csv", NOW).is_none());
    // What failed is blamed on a disk only if there is no room on it, however large its used share is.
    for mut facts in [parked, unreadable] {
        let text = facts.of_whole(&[], NOW).to_string();
        facts.disk = Some(DiskUse { path: "/srv".into(), percent: 99, free: 2 << 30 });
        assert_eq!(facts.of_whole(&[], NOW).to_string(), text);
        facts.disk = Some(full_disk("/srv"));
        assert_eq!(facts.of_whole(&[], NOW).to_string(), "disk 100 % (/srv)");
    }
    let waits = |facts: &mut Facts| {
        facts.feeds.get_mut("alerts").unwrap().waits_for = Some((ago(60), vec!["support".into()]));
        facts.reading = 1;
    };
    let mut behind = traffic(|traffic| {
        (traffic.open_since, traffic.paused_until) = (Some(ago(42)), Some(hence(8)));
    });
    waits(&mut behind);
    let text = "watermark: waiting for support (breaker open: no answers for 42 s, probe in 8 s)";
    assert_eq!(behind.of_whole(&[], NOW).to_string(), text);
    let reading = report(|report| {
        report.state = FileState::Ingesting;
        report.destinations.clear();
    });
    assert_eq!(behind.of_file(&reading, NOW).to_string(), text);
    assert_eq!(facts(|_| {}).of_file(&reading, NOW).to_string(), "reading");
}

#[test]
fn each_fact_of_a_file_is_named() {
    let windows = Windows(vec!["09:00-18:00 Europe/London".parse().unwrap()]);
    let terms = |terms: Terms| report(|report| report.file.terms = terms);
    for (file, text) in [
        (
            held(HoldCause::Errors, "31 % of the first 200 messages failed: status 404 × 62"),
            "canary held: 31 % of the first 200 messages failed: status 404 × 62",
        ),
        (
            held(HoldCause::Canary, "canary: its first 200 messages go ahead of the others"),
            "canary: its first 200 messages go ahead of the others",
        ),
        (held(HoldCause::Operator, HELD), "held by the operator, 07:50 UTC"),
        (held(HoldCause::Operator, "wrong list"), "held by the operator, 07:50 UTC: wrong list"),
        (held(HoldCause::Cancelled, "wrong list"), "being cancelled: wrong list"),
        (terms(Terms { windows, ..Terms::default() }), "window opens 09:00 Europe/London"),
        (terms(Terms { not_before: Some(hence(3_600)), ..Terms::default() }), "not_before = 09:00 UTC"),
        (
            terms(Terms { expires_at: Some(ago(1)), ..Terms::default() }),
            "expired: what is open ends as unsent",
        ),
        (report(|report| report.state = FileState::Failed("no header".into())), "concurrency = 64"),
        (
            report(|report| {
                report.state = FileState::Failed("no header".into());
                report.destinations.clear();
            }),
            "failed: no header",
        ),
        (
            report(|report| {
                report.destinations = [("support".to_owned(), counts(1_000, 1_000, 0))].into();
            }),
            "nothing: all is sent",
        ),
        (report(|_| {}), "concurrency = 64"),
    ] {
        let ceiling = facts(|_| {}).of_file(&file, NOW);
        assert_eq!(ceiling.to_string(), text);
        assert_eq!(ceiling.file.as_deref(), Some("a.csv"));
    }
    let rate = Rate { per_s: 5, of_feed: false };
    let own = terms(Terms { rate: Some(rate), ..Terms::default() });
    let braked = traffic(|traffic| traffic.brake = Some((Brake::RateOfFile, ago(9))));
    assert_eq!(braked.of_file(&own, NOW).to_string(), "rate_per_s = 5 of the file or its feed");
}

#[test]
fn what_stops_more_is_what_is_named() {
    let down = traffic(|traffic| traffic.open_since = Some(ago(42)));
    let canary = held(HoldCause::Ramp, "its canary went well");
    assert_eq!(down.of_file(&canary, NOW).word(), "breaker");
    assert_eq!(down.of_file(&held(HoldCause::Operator, "x"), NOW).word(), "held");
    // Of two destinations the one that stands, though the other has more to do.
    let two = facts(|facts| {
        let other = DestinationFacts {
            is_configured: true,
            disabled: Some((ago(1), PAUSED.into())),
            counts: counts(10, 0, 0),
            ..DestinationFacts::default()
        };
        facts.destinations.insert("other".into(), other);
    });
    assert_eq!(two.of_whole(&[], NOW).destination.as_deref(), Some("other"));
    assert_eq!(two.of_whole(&[], NOW).finish, None, "nobody knows");
    let file = report(|report| {
        report.destinations.insert("other".into(), counts(10, 0, 0));
    });
    assert_eq!(two.of_file(&file, NOW).destination.as_deref(), Some("other"));
}

#[test]
fn a_file_that_waits_for_its_time_says_when_it_will_be_done() {
    let file = report(|report| report.file.terms.not_before = Some(hence(3_600)));
    let idle = facts(|facts| {
        facts.files_per_s.insert(FileId([7; 16]), 0.0);
    });
    let ceiling = idle.of_file(&file, NOW);
    assert_eq!((ceiling.word(), ceiling.done_at()), ("not_before", Some(hence(3_600 + 120))));
    assert_eq!(facts(|_| {}).of_file(&report(|_| {}), NOW).done_at(), Some(hence(120)));
}

#[test]
fn what_the_last_retries_wait_is_a_part_of_the_time_that_is_left() {
    let retry = Retry {
        max_attempts: 40,
        max_age: Duration::from_hours(72),
        base: Duration::from_mins(1),
        cap: Duration::from_hours(1),
        max_retry_after: Duration::from_hours(1),
    };
    let failing = |share: f64| {
        support(|facts| {
            facts.retry = Some(retry.clone());
            facts.traffic.as_mut().unwrap().retry_share = share;
        })
    };
    let (well, ill) = (failing(0.0), failing(0.2));
    let of_file: fn(&Facts) -> Ceiling = |facts| facts.of_file(&report(|_| {}), NOW);
    let of_destination: fn(&Facts) -> Ceiling = |facts| facts.of_destination("support", NOW);
    for of in [of_file, of_destination] {
        let left = |facts: &Facts| of(facts).finish.expect("it moves").since(NOW);
        assert_eq!(left(&well), Duration::from_secs(90));
        // The second attempt alone waits 30 s on average, the third a minute.
        assert!(left(&ill) > Duration::from_secs(150), "{:?}", left(&ill));
    }
}

#[test]
fn a_file_that_will_be_late_says_so_and_one_that_stands_says_until_when_it_may() {
    let by = |seconds| report(|report| report.file.terms.finish_by = Some(hence(seconds)));
    let warning = |facts: &Facts, file: &FileReport| facts.of_file(file, NOW).warning();
    let going = facts(|_| {});
    assert_eq!(warning(&going, &by(120)), None);
    assert_eq!(going.of_file(&by(120), NOW).view()["in_time"], true);
    assert_eq!(warning(&going, &by(119)).as_deref(), Some("will not be done by 08:01 UTC"));
    let mut down = traffic(|traffic| (traffic.open_since, traffic.per_s) = (Some(ago(42)), 0.0));
    down.files_per_s.insert(FileId([7; 16]), 0.0);
    assert_eq!(
        warning(&down, &by(600)).as_deref(),
        Some("must go on by 08:08 UTC to be done by 08:10 UTC"),
        "90 s of work are left"
    );
    assert_eq!(down.of_file(&by(600), NOW).view()["latest"], "2027-01-15T08:08:30.000Z");
    assert_eq!(warning(&down, &by(60)).as_deref(), Some("will not be done by 08:01 UTC"));
    let done = report(|report| {
        report.destinations = [("support".to_owned(), counts(1_000, 1_000, 0))].into();
        (report.settled_at, report.file.terms.finish_by) = (Some(ago(30)), Some(ago(60)));
    });
    assert_eq!(warning(&going, &done).as_deref(), Some("was not done by 07:59 UTC"));
}

#[test]
fn nothing_to_do_is_said_too() {
    let idle = Facts { is_running: Some(true), ..Facts::default() };
    assert_eq!(idle.of_whole(&[], NOW).to_string(), "no files");
    assert_eq!(Facts { has_files: true, ..idle }.of_whole(&[], NOW).to_string(), "nothing: all is sent");
    let done = support(|facts| facts.counts = counts(5, 5, 0));
    assert_eq!((said(&done).0.as_str(), said(&done).1.as_str()), ("nothing: all is sent", ""));
}

#[test]
fn programs_get_the_same_with_times_as_everywhere() {
    let down = traffic(|traffic| {
        (traffic.open_since, traffic.paused_until) = (Some(ago(42)), Some(hence(8)));
        traffic.last_error = Some(error(503, Reason::Status, "down"));
    });
    let view = down.of_destination("support", NOW).view();
    assert_eq!(view["text"], "breaker open: 503 for 42 s, probe in 8 s");
    assert_eq!((&view["cause"], &view["since"]), (&"breaker".into(), &"2027-01-15T07:59:18.000Z".into()));
    assert_eq!(view["until"], "2027-01-15T08:00:08.000Z");
    assert_eq!(view["last_error"]["status"], 503);
    assert_eq!((&view["last_error"]["text"], &view["done_at"]), (&"down".into(), &serde_json::Value::Null));
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let brake = prop::option::of(prop::sample::select(vec![
        Brake::Limit,
        Brake::Pool,
        Brake::Rate,
        Brake::RateOfAll,
        Brake::RateOfFile,
        Brake::RetryBudget,
    ]));
    let flags = prop::array::uniform9(any::<bool>());
    (flags, brake, 0u64..2_000, 0u64..100, 0.0f64..1_000.0).prop_map(
        |(flags, brake, sent, percent, per_s)| {
            let [running, paused, disabled, blocked, out, asks, configured, parked, away] = flags;
            let mut facts = facts(|facts| {
                facts.is_running = Some(running);
                facts.disk = Some(DiskUse { path: "/".into(), percent, free: (100 - percent) << 20 });
                if parked {
                    facts.feeds.get_mut("alerts").unwrap().parked = Some(trouble("why"));
                }
                if away && percent > 50 {
                    facts.engines.insert("SQS".into(), trouble("why"));
                }
            });
            let support = facts.destinations.get_mut("support").unwrap();
            support.counts = counts(1_000, sent.min(1_000), 0);
            (support.is_configured, support.is_paused) = (configured, paused);
            support.disabled = disabled.then(|| (ago(5), "why".to_owned()));
            support.blocked = blocked.then(|| trouble("why"));
            let traffic = support.traffic.as_mut().unwrap();
            (traffic.brake, traffic.per_s) = (brake.map(|brake| (brake, ago(9))), per_s);
            traffic.open_since = out.then(|| ago(50));
            traffic.paused_until = asks.then(|| hence(50));
            facts
        },
    )
}

proptest! {
    #[test]
    fn what_stands_promises_nothing_and_what_waits_for_a_person_says_what_to_do(facts in any_facts()) {
        for ceiling in [
            facts.of_whole(&[], NOW),
            facts.of_destination("support", NOW),
            facts.of_file(&report(|_| {}), NOW),
        ] {
            let text = ceiling.to_string();
            prop_assert!(!text.is_empty() && !text.contains('\n'));
            if ceiling.is_stop() && ceiling.destination.is_some() {
                prop_assert_eq!(ceiling.finish, None, "{}", text);
            }
            if ceiling.is_for_operator() {
                prop_assert!(ceiling.remedy().is_some(), "{}", text);
            }
            if let Some(finish) = ceiling.finish {
                prop_assert!(finish >= NOW);
            }
            prop_assert_eq!(&ceiling.view()["text"], &text);
        }
    }
}
