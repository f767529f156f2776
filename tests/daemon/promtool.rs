//! Metrics and rules as Prometheus' own checker reads them.

use std::{
    env, fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    ops::{get, serve},
    support::{LIVENESS, World, input::Input, scripted::Reply},
};

/// What `promtool` says; empty if it finds nothing.
fn promtool(arguments: &[&str], input: &str) -> String {
    let tool = env::var_os("POSTRIDER_PROMTOOL").expect("script/test sets POSTRIDER_PROMTOOL");
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool starts");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stdout));
    said
}

#[test]
#[ignore = "needs promtool (POSTRIDER_PROMTOOL): script/test fetches it"]
fn s2_7_prometheus_finds_nothing_to_say_of_metrics_and_rules() {
    let mut world = World::new("csv");
    world.script(|request| Reply::Status(if request.earlier == 0 { 500 } else { 200 }));
    let address = serve(&mut world);
    world.drop_file(Input::csv("counted.csv", 50)).wait_settled(LIVENESS);
    let metrics = get(address, "/metrics").body;
    for family in [
        "postrider_messages_sent_total",
        "postrider_disk_bytes",
        "postrider_feed_last_file_timestamp_seconds",
        "process_cpu_seconds_total",
        "process_start_time_seconds",
        "postrider_store_bytes",
    ] {
        assert!(metrics.contains(&format!("\n# TYPE {family} ")), "{family}: {metrics}");
    }
    assert_eq!(promtool(&["check", "metrics"], &metrics), "");
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/alerts.yml");
    assert!(fs::exists(&rules).expect("it can be seen"));
    promtool(&["check", "rules", &rules.to_string_lossy()], "");
    // The queries of the dashboard, as rules: their grammar is the same.
    let dashboard = fs::read_to_string(rules.with_file_name("grafana.json")).expect("it is there");
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).expect("it is JSON");
    let panels = dashboard["panels"].as_array().expect("it has panels").iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries: Vec<_> = targets.map(|target| target["expr"].as_str().expect("it is a query")).collect();
    assert!(queries.len() > 40, "{}", queries.len());
    let record = |(nth, query): (usize, &&str)| serde_json::json!({ "record": format!("panel:query:{nth}"), "expr": query });
    let rules: Vec<_> = queries.iter().enumerate().map(record).collect();
    let file = world.path("dashboard.yml");
    // JSON is YAML.
    fs::write(&file, serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string())
        .expect("the directory is ours");
    promtool(&["check", "rules", &file.to_string_lossy()], "");
    world.stop();
}
