//! Commands that ask nobody: the reference of settings, the partner kit, completions and manual pages.

use std::{collections::BTreeSet, path::PathBuf, process::Stdio};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::pages::read;
use crate::kit::{
    command::{Answer, ask_in, run_in},
    contract,
    partner::Partner,
    support::{PATIENCE, said, settled},
};

/// Runs a command with something on stdin, in an empty environment.
async fn given(arguments: &[&str], stdin: &str) -> Answer {
    let mut command = settled();
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("settled starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(stdin.as_bytes()).await.expect("it reads");
    drop(input);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .expect("it ends")
        .expect("an exit");
    contract::answered(arguments, &output);
    Answer::of(&output)
}

async fn printed(arguments: &[&str]) -> String {
    let output = run_in(&[], arguments).await;
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn the_page_of_settings_is_what_the_command_prints() {
    let page = printed(&["config", "reference"]).await;
    assert!(
        page == read("docs/settings.md"),
        "docs/settings.md is not what `settled config reference` prints"
    );
}

/// Each setting once, with words, a type and bounds; the bounds are those of the types, and the defaults those of the file.
#[tokio::test]
async fn the_reference_tells_every_setting() {
    let told = ask_in(&[], &["config", "reference"]).await.document(0);
    let shown = ask_in(&[], &["config", "show"]).await.document(0);
    let names = |list: &Value| -> BTreeSet<String> {
        let list = list.as_array().expect("a list");
        list.iter()
            .filter_map(|setting| setting["setting"].as_str())
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(names(&told), names(&shown));
    let find = |name: &str| {
        let mut all = told.as_array().expect("a list").iter();
        all.find(|setting| setting["setting"] == name)
            .cloned()
            .unwrap_or_else(|| panic!("{name}"))
    };
    for (name, kind, bounds, default) in [
        ("worker.lanes", "whole number", Some("from 1 to 16"), json!(2)),
        ("park.deadline", "duration", Some("from 100ms to 720h"), json!("15m")),
        ("held.share", "number", Some("from 0.1 to 1.0"), json!(0.2)),
        ("events.format", "text", Some("single or batched"), json!("single")),
        (
            "log.level",
            "text",
            Some("one of error, warn, info, debug, trace"),
            json!("info"),
        ),
        ("worker.name", "text", Some("0 to 128 bytes long"), json!("")),
        ("dead_letters.collect", "true or false", None, json!(true)),
        (
            "broker.trusted_users",
            "list of texts",
            Some("have entries of at most 255 bytes without control characters"),
            json!([]),
        ),
    ] {
        let setting = find(name);
        assert_eq!(setting["type"], kind, "{name}");
        assert_eq!(setting["bounds"], json!(bounds), "{name}");
        assert_eq!(setting["default"], default, "{name}");
        assert!(setting["text"].as_str().is_some_and(|text| text.len() > 10), "{name}");
    }
    assert_eq!(find("database.url")["variable"], "SETTLED_DATABASE_URL");
    assert_eq!(find("worker.lanes")["variable"], "SETTLED_WORKER__LANES");
    let wordless: Vec<Value> = told
        .as_array()
        .expect("a list")
        .iter()
        .filter(|setting| setting["text"] == "")
        .cloned()
        .collect();
    assert_eq!(wordless, Vec::<Value>::new());
    let unbounded: BTreeSet<&str> = told
        .as_array()
        .expect("a list")
        .iter()
        .filter(|setting| setting["bounds"].is_null() && setting["type"] != "true or false")
        .filter_map(|setting| setting["setting"].as_str())
        .collect();
    // A URL or a path is any text.
    let is_any = |name: &&&str| name.ends_with("url") || name.ends_with("_file");
    let bare: Vec<&&str> = unbounded.iter().filter(|name| !is_any(name)).collect();
    assert!(bare.is_empty(), "these say nothing of what they may be: {bare:?}");
}

/// A variable or a key that is nearly one is refused with the one that was probably meant.
#[tokio::test]
async fn a_slip_in_a_setting_is_answered_with_what_was_meant() {
    for (variable, meant) in [
        ("SETTLED_WORKER__LANE", "SETTLED_WORKER__LANES"),
        ("SETTLED_WORKER_LANES", "SETTLED_WORKER__LANES"),
        ("SETTLED_WROKER__LANES", "SETTLED_WORKER__LANES"),
        ("SETTLED_PARK__DEADLNE", "SETTLED_PARK__DEADLINE"),
        ("SETTLED_DATABSE_URL", "SETTLED_DATABASE_URL"),
        ("SETTLED_BROKER_URL_FIL", "SETTLED_BROKER_URL_FILE"),
        ("SETTLED_ALLOW_PLAINTXT", "SETTLED_ALLOW_PLAINTEXT"),
        ("SETTLED_DEAD_LETTER__COLLECT", "SETTLED_DEAD_LETTERS__COLLECT"),
    ] {
        let (message, hint) = ask_in(&[(variable, "1")], &["config", "show"]).await.refusal(2);
        assert!(
            message.contains(variable) && hint.contains(meant),
            "{variable}: {message} {hint}"
        );
    }
    for (key, meant) in [
        ("worker.lane=1", "worker.lanes"),
        ("parks.deadline=2s", "park.deadline"),
        ("lanes=2", "worker.lanes"),
    ] {
        let (message, hint) = ask_in(&[], &["config", "show", "--set", key]).await.refusal(2);
        assert!(hint.contains(meant), "{key}: {message} {hint}");
    }
}

fn message(partner: &Partner) -> String {
    let reservation = partner.allocation("BTC", "5");
    String::from_utf8(partner.cleared(&reservation).body).expect("UTF-8")
}

#[tokio::test]
async fn the_kit_looks_at_a_message() {
    let partner = Partner::new("acme");
    let (body, key) = (message(&partner), partner.public_key());
    let lint = [
        "partner-kit",
        "lint",
        "--json",
        "--routing-key",
        "acme.allocation.update",
        "--public-key",
        &key,
    ];
    let report = given(&lint, &body).await.document(0);
    assert_eq!((&report["ok"], &report["recoveredKey"]), (&json!(true), &json!(key)));
    // All that is wrong is said at once, to people too.
    let wrong = body.replacen("\"5\"", "5", 1).replacen("cleared", "Cleared", 1);
    let report = given(&lint, &wrong).await.document(1);
    let named: Vec<&str> = report["checks"]
        .as_array()
        .expect("checks")
        .iter()
        .filter(|check| check["ok"] == false)
        .filter_map(|check| check["name"].as_str())
        .collect();
    assert_eq!(named, ["amount.quantity", "status"]);
    let said = given(&["partner-kit", "lint", "-"], &wrong).await;
    assert_eq!(said.code, Some(1), "{}", said.all());
    for piece in [
        "WRONG  amount.quantity",
        "invalid_field: ",
        "would be refused",
        "message digest",
    ] {
        assert!(said.out.contains(piece), "{piece}: {}", said.all());
    }
    let secret = hex::encode(partner.key.to_secret_bytes());
    let refused = given(&["partner-kit", "lint", "--json", "--public-key", &secret], &body).await;
    let (sentence, _) = refused.refusal(2);
    assert!(!sentence.contains(&secret), "a private key is not repeated: {sentence}");
    let missing = ask_in(&[], &["partner-kit", "lint", "/nowhere/body.json"]).await;
    missing.refused(2, "/nowhere/body.json can not be read");
}

/// What the kit signs, the kit and the worker's own code find right.
#[tokio::test]
async fn the_kit_signs_with_test_keys_only() {
    let partner = Partner::new("acme");
    let fields = partner.draft(&partner.allocation("BTC", "5"), "cleared").fields.text();
    let signed = given(&["partner-kit", "sign", "--json", "--test-key", "bob"], &fields)
        .await
        .document(0);
    let (body, key) = (
        signed["body"].as_str().expect("a body"),
        signed["publicKey"].as_str().expect("a key"),
    );
    let report = given(&["partner-kit", "lint", "--json", "--public-key", key], body)
        .await
        .document(0);
    assert_eq!(report["recoveredKey"], key);
    let plain = given(&["partner-kit", "sign", "--test-key", "bob"], &fields).await;
    assert_eq!((plain.code, plain.out.trim_end()), (Some(0), body));
    let other = given(&["partner-kit", "sign", "--json", "--test-key", "carol"], &fields)
        .await
        .document(0);
    assert_ne!(other["publicKey"], key);
    given(&["partner-kit", "sign", "--json"], "[]")
        .await
        .refused(2, "no JSON object");
}

#[tokio::test]
async fn the_kit_has_vectors_and_they_are_always_the_same() {
    let first = ask_in(&[], &["partner-kit", "vectors"]).await.document(0);
    assert_eq!(first, ask_in(&[], &["partner-kit", "vectors"]).await.document(0));
    for vector in first.as_array().expect("a list") {
        let (body, key) = (
            vector["body"].as_str().expect("a body"),
            vector["publicKey"].as_str().expect("a key"),
        );
        let routing_key = vector["routingKey"].as_str().expect("a key");
        let arguments = [
            "partner-kit",
            "lint",
            "--json",
            "--routing-key",
            routing_key,
            "--public-key",
            key,
        ];
        let report = given(&arguments, body)
            .await
            .document(if vector["reason"].is_null() { 0 } else { 1 });
        let checks = report["checks"].as_array().expect("checks");
        let first = checks.iter().find(|check| check["ok"] == false);
        assert_eq!(
            first.map_or(&Value::Null, |check| &check["reason"]),
            &vector["reason"],
            "{}",
            vector["name"]
        );
        if let Some(file) = contract::update_file(routing_key)
            && let Ok(body) = serde_json::from_str(body)
        {
            let may_be_refused = ["invalid_field", "malformed_signature"]
                .iter()
                .any(|reason| vector["reason"] == *reason);
            assert!(
                may_be_refused || contract::refusals(&file, &body).is_empty(),
                "{}",
                vector["name"]
            );
        }
    }
}

#[tokio::test]
async fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = printed(&["completions", shell]).await;
        for word in ["partner-kit", "dead-letters", "reconcile", "--json"] {
            assert!(
                script.contains(word) || script.contains(word.trim_start_matches("--")),
                "{shell}: {word}"
            );
        }
    }
    let output = run_in(&[], &["completions", "tcsh"]).await;
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    // The shell itself finds nothing wrong with it.
    let script = printed(&["completions", "bash"]).await;
    let mut check = tokio::process::Command::new("bash");
    check
        .args(["-n", "/dev/stdin"])
        .stdin(Stdio::piped())
        .kill_on_drop(true);
    let mut child = check.spawn().expect("bash");
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(script.as_bytes())
        .await
        .expect("it reads");
    assert!(child.wait().await.expect("an exit").success());
}

#[tokio::test]
async fn manual_pages_are_there_for_every_command() {
    let page = printed(&["man"]).await;
    assert!(page.contains(".TH settled 1") && page.contains("reconcile"), "{page}");
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("man-pages");
    std::fs::create_dir_all(&directory).expect("a directory");
    let place = directory.to_str().expect("UTF-8");
    printed(&["man", "--to", place]).await;
    for name in [
        "settled",
        "settled-worker",
        "settled-partner-kit-lint",
        "settled-dead-letters-runs-list",
    ] {
        let text = std::fs::read_to_string(directory.join(format!("{name}.1"))).expect(name);
        assert!(text.contains(&format!(".TH {name} 1")), "{name}: {text}");
    }
    std::fs::remove_dir_all(&directory).expect("it goes");
    let nowhere = run_in(&[], &["man", "--to", "/nowhere/at/all"]).await;
    assert_eq!(nowhere.status.code(), Some(2), "{}", said(&nowhere));
}
