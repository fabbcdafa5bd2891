//! What Prometheus and Grafana are given names what is exported; promtool holds the alerts and what a worker shows, where the
//! machine has it.

use std::{
    collections::BTreeSet,
    io::Write as _,
    process::{Command, Stdio},
};

use serde_json::Value;
use settled::telemetry::{MetricKind, catalogue::ALL};

use super::pages::{read, root};
use crate::kit::{
    amqp::Message,
    auditor::Expect,
    support::{COLLECTS, PATIENCE, said, skip, until, with_reservations},
};

/// Names of our metrics in a text, a histogram's series as the histogram.
fn named(text: &str) -> BTreeSet<String> {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let words = text
        .split(|letter: char| !is_name(letter))
        .filter(|word| word.starts_with("settled_"));
    words
        .map(|word| {
            let histogram = word.strip_suffix("_bucket").filter(|name| {
                ALL.iter()
                    .any(|metric| metric.name == *name && matches!(metric.kind, MetricKind::Histogram(_)))
            });
            histogram.unwrap_or(word).to_owned()
        })
        .collect()
}

fn exported() -> BTreeSet<String> {
    ALL.iter().map(|metric| metric.name.to_owned()).collect()
}

#[test]
fn every_metric_is_on_the_dashboard_and_no_other() {
    let dashboard: Value = serde_json::from_str(&read("config/grafana/settled.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let questions: Vec<&str> = targets.filter_map(|target| target["expr"].as_str()).collect();
    let asked = named(&questions.join("\n"));
    assert_eq!(asked, exported());
    let ids: BTreeSet<i64> = panels.iter().filter_map(|panel| panel["id"].as_i64()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has a number of its own");
    // A label that the metric has.
    for metric in ALL {
        for question in questions.iter().filter(|question| question.contains(metric.name)) {
            for by in question.split("by (").skip(1) {
                let labels = by.split(')').next().unwrap_or_default().split(", ");
                for label in labels.filter(|label| !["le", "instance"].contains(label)) {
                    assert!(metric.labels.contains(&label), "{}: {label} in {question}", metric.name);
                }
            }
        }
    }
}

fn alerts() -> BTreeSet<String> {
    let rules = read("config/prometheus/alerts.yml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

#[test]
fn every_alert_has_a_runbook_a_test_and_metrics_that_exist() {
    let rules = read("config/prometheus/alerts.yml");
    let questions = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let asked = named(&questions.collect::<Vec<_>>().join("\n"));
    assert_eq!(asked.difference(&exported()).collect::<Vec<_>>(), Vec::<&String>::new());
    let (operators, tests) = (read("docs/operators.md"), read("config/prometheus/alerts-test.yml"));
    let (_, section) = operators.split_once("\n## At an alarm").expect("the section");
    let section = section.split("\n## ").next().unwrap_or_default();
    let headings: BTreeSet<String> = section
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .map(str::to_owned)
        .collect();
    assert_eq!(headings, alerts(), "docs/operators.md has an entry for each alert");
    for alert in alerts() {
        let link = format!("runbook: docs/operators.md#{}", alert.to_lowercase());
        assert!(rules.contains(&link), "{alert}: {link}");
        let tried = format!("alertname: {alert}\n        exp_alerts:\n");
        assert!(tests.contains(&tried), "{alert} is seen to fire");
        let quiet = format!("alertname: {alert}\n        exp_alerts: []\n");
        assert!(tests.contains(&quiet), "{alert} is seen to be quiet");
    }
    // What says *Alarm* in its own help wants somebody to look.
    let alarms: BTreeSet<String> = ALL
        .iter()
        .filter(|metric| metric.help.ends_with("Alarm."))
        .map(|metric| metric.name.to_owned())
        .collect();
    let covered = |name: &String| asked.contains(name) || name == "settled_held_full_alarms_total";
    assert_eq!(
        alarms.iter().filter(|name| !covered(name)).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
}

#[test]
fn promtool_finds_nothing_wrong() {
    for arguments in [
        ["check", "rules", "config/prometheus/alerts.yml"],
        ["test", "rules", "config/prometheus/alerts-test.yml"],
        ["check", "config", "config/prometheus/prometheus.yml"],
    ] {
        let output = Command::new("promtool").args(arguments).current_dir(root()).output();
        match output {
            Ok(output) => assert!(output.status.success(), "{}", said(&output)),
            Err(error) => return skip("alerts::promtool_finds_nothing_wrong", &format!("no promtool: {error}")),
        }
    }
}

/// What a worker shows under load, as Prometheus would read it: names, units, types and help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promtool_finds_nothing_wrong_with_what_a_worker_shows() {
    if let Err(error) = Command::new("promtool").arg("--version").output() {
        let test = "alerts::promtool_finds_nothing_wrong_with_what_a_worker_shows";
        return skip(test, &format!("no promtool: {error}"));
    }
    let (place, partner, reservations) = with_reservations("promtool", 20).await;
    let worker = place.ready_worker(&COLLECTS).await;
    let refused = Message::new("acme.allocation.update", "{", Expect::Refused("malformed_message"));
    let settles = reservations.iter().map(|reservation| partner.cleared(reservation));
    place.publish(&settles.chain([refused]).collect::<Vec<_>>()).await;
    place.rest().await;
    // Gauges are there once they were measured.
    let text = until("everything is shown", PATIENCE, async || {
        let (_, text) = worker.get("/metrics").await?;
        let is_measured = [
            "settled_outbox_pending ",
            "settled_held{",
            "settled_dead_letters_rows ",
            "settled_replay_runs{",
        ]
        .iter()
        .all(|name| text.contains(name));
        is_measured.then_some(text)
    })
    .await;
    assert!(
        text.contains("settled_messages_total{verdict=\"settled\",reason=\"\"} 20"),
        "{text}"
    );
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    let mut stdin = promtool.stdin.take().expect("a pipe");
    stdin.write_all(text.as_bytes()).expect("it reads");
    drop(stdin);
    let output = promtool.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", said(&output));
    place.settle_up(worker).await;
}
