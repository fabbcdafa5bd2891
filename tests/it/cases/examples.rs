//! The examples for partners and subscribers work: each against a real worker, with the packages that it pins.

use std::{path::PathBuf, process::Stdio};

use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

use super::{
    apart::Users,
    pages::{read, root},
};
use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    command::ask,
    contract,
    partner::Partner,
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, count, said, skip, until},
};

const OF_PARTNERS: [&str; 5] = [
    "partner/python",
    "partner/node",
    "partner/bitgo",
    "partner/typescript",
    "partner/go",
];
const OF_SUBSCRIBERS: [&str; 2] = ["subscriber/python", "subscriber/node"];

/// Gets what an example builds on. Where there is no such language or registry its test is skipped, with why.
pub(super) fn installed(example: &str, test: &str) -> bool {
    let output = std::process::Command::new(root().join("dev/examples"))
        .args(["install", example])
        .output();
    match output {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            skip(test, &said(&output));
            false
        }
        Err(error) => {
            skip(test, &error.to_string());
            false
        }
    }
}

pub(super) fn example(name: &str, arguments: &[&str]) -> Command {
    if name == "partner/rust" {
        // Built with the tests; the directory is beside theirs.
        let program = PathBuf::from(env!("CARGO_BIN_EXE_settled"));
        return Command::new(program.parent().expect("a directory").join("examples/partner"));
    }
    let mut command = Command::new(root().join("dev/examples"));
    command.args(["run", name]).args(arguments);
    command
}

/// Runs a partner's example with these fields; its exit code and the event that it printed.
async fn says(place: &Place, name: &str, partner: &Partner, fields: &Value) -> (Option<i32>, Value) {
    let mut command = example(name, &[]);
    command.env("BROKER_URL", &place.broker_url);
    heard(command, name, partner, fields).await
}

async fn heard(mut command: Command, name: &str, partner: &Partner, fields: &Value) -> (Option<i32>, Value) {
    command
        .env("ENTERPRISE_ID", &partner.enterprise)
        .env("PARTNER_KEY", hex::encode(partner.key.to_secret_bytes()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(fields.to_string().as_bytes()).await.expect("it reads");
    drop(input);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .expect("it ends")
        .expect("an exit");
    let event =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{name}: {error}: {}", said(&output)));
    (output.status.code(), event)
}

pub(super) fn fields(partner: &Partner, reservation: &Reservation, status: &str) -> Value {
    let draft = partner.draft(reservation, status);
    serde_json::from_str(&draft.fields.text()).expect("JSON")
}

/// Clears one, releases one with text beyond ASCII, is refused for one; and clears one as a user who may do what the export lets a
/// partner do, and nothing else.
async fn a_partner_in(name: &str, test: &str) {
    let place = Place::new("examples_partner").await;
    let partner = Partner::new("northwind");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations = [
        partner.allocation("BTC", "10"),
        partner.allocation("BTC", "20"),
        partner.allocation("BTC", "30"),
        partner.allocation("BTC", "40"),
    ];
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let [first, second, third, fourth] = &reservations;
    let (code, event) = says(&place, name, &partner, &fields(&partner, first, "cleared")).await;
    assert_eq!(
        (code, &event["type"]),
        (Some(0), &json!("allocation.cleared")),
        "{test}: {event}"
    );
    assert_eq!(contract::misfits("event-allocation-cleared.json", &event), [""; 0]);
    let mut released = fields(&partner, second, "released");
    released["rejectReason"] = json!("余额不足 — \"no\"");
    let (code, event) = says(&place, name, &partner, &released).await;
    assert_eq!(
        (code, &event["type"]),
        (Some(0), &json!("allocation.released")),
        "{event}"
    );
    assert_eq!(event["data"]["allocation"]["reason"], released["rejectReason"]);
    let mut wrong = fields(&partner, third, "cleared");
    wrong["amount"]["quantity"] = json!("31");
    let (code, event) = says(&place, name, &partner, &wrong).await;
    assert_eq!(
        (code, &event["data"]["reason"]),
        (Some(1), &json!("allocation_mismatch")),
        "{event}"
    );
    let user = format!("{}_northwind", place.name);
    place
        .json(&["partner", "set", "--enterprise-id", "northwind", "--broker-user", &user])
        .await;
    place.json(&["topology"]).await;
    let exported = ask(&place, &["topology", "export", "--partner", "northwind"]).await;
    let users = Users::of(&place, &exported.document(0)).await;
    let mut command = example(name, &[]);
    command.env("BROKER_URL", users.url(&user)).env("OWN_EXCHANGE", "yes");
    let (code, event) = heard(command, name, &partner, &fields(&partner, fourth, "cleared")).await;
    users.forget(&place).await;
    assert_eq!(
        (code, &event["subject"]),
        (Some(0), &json!(fourth.id.to_string())),
        "{event}"
    );
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_in_python_settles() {
    if installed("partner/python", "examples::the_partner_in_python_settles") {
        a_partner_in("partner/python", "python").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_in_node_settles_with_bitgos_library() {
    if installed(
        "partner/node",
        "examples::the_partner_in_node_settles_with_bitgos_library",
    ) {
        a_partner_in("partner/node", "node").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_in_typescript_settles() {
    if installed("partner/typescript", "examples::the_partner_in_typescript_settles") {
        a_partner_in("partner/typescript", "typescript").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_in_go_settles() {
    if installed("partner/go", "examples::the_partner_in_go_settles") {
        a_partner_in("partner/go", "go").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partner_in_rust_settles() {
    a_partner_in("partner/rust", "rust").await;
}

/// Hears every settlement twice, in this format, and counts it once.
async fn a_subscriber_in(name: &str, format: &str) {
    let place = Place::new("examples_subscriber").await;
    let partner = Partner::new("northwind");
    place.register(&partner).await;
    place.deposit(&partner, "ETH", "1000000000000000000000000000000").await;
    // More than a double holds.
    let reservations: Vec<Reservation> = ["100000000000000000000000001", "200000000000000000000000002", "5"]
        .map(|quantity| partner.allocation("ETH", quantity))
        .into();
    place.reserve(&reservations).await;
    let store = if name == "subscriber/python" {
        PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("{}.sqlite", place.name))
            .display()
            .to_string()
    } else {
        place.database_url.clone()
    };
    let listen = |messages: usize| {
        let mut command = example(name, &["northwind.counting"]);
        command
            .env("BROKER_URL", &place.broker_url)
            .env("STORE", &store)
            .env("STOP_AFTER", messages.to_string())
            .kill_on_drop(true);
        command
    };
    place.line().bind("northwind.counting", "settlement.events", "#").await;
    let worker = place
        .ready_worker(&[("SETTLED_EVENTS__FORMAT", format), LEAVE_DEAD_LETTERS])
        .await;
    let [first, second, third] = &reservations[..] else {
        panic!("three")
    };
    let messages = [partner.cleared(first), partner.cleared(second), partner.released(third)];
    place.publish(&messages).await;
    place.rest().await;
    // Each is told again.
    place
        .publish(&messages.clone().map(|message| message.expecting(Expect::Any)))
        .await;
    place
        .publish(&[Message::new("northwind.allocation.update", "{}", Expect::Any)])
        .await;
    place.rest().await;
    // Of a type that it does nothing with.
    place
        .json(&["partner", "suspend", "--enterprise-id", "northwind"])
        .await;
    let db = place.db().await;
    until("it is told", PATIENCE, async || {
        (count(&db, "outbox").await == 0).then_some(())
    })
    .await;
    let waiting = usize::try_from(place.line().depth("northwind.counting").await).expect("a number");
    let output = tokio::time::timeout(PATIENCE, listen(waiting).output())
        .await
        .expect("it ends")
        .expect("an exit");
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |word: &str| text.lines().filter(|line| line.ends_with(word)).count();
    assert!(count(" new") == 5 && count(" seen before") == 3, "{text}");
    assert_eq!(place.line().depth("northwind.counting").await, 0, "acknowledged");
    let allocated = "300000000000000000000000003";
    if name == "subscriber/node" {
        let sql = "SELECT quantity::text FROM subscriber.allocated WHERE currency = 'ETH'";
        let rows = place.db().await.query(sql, &[]).await.expect("its table");
        let found: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(found, [allocated]);
    } else {
        let bytes = std::fs::read(&store).expect("its database");
        assert!(
            bytes
                .windows(allocated.len())
                .any(|window| window == allocated.as_bytes())
        );
        std::fs::remove_file(&store).expect("it goes");
    }
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_subscriber_in_python_counts_once() {
    if installed("subscriber/python", "examples::the_subscriber_in_python_counts_once") {
        a_subscriber_in("subscriber/python", "single").await;
        a_subscriber_in("subscriber/python", "batched").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_subscriber_in_node_counts_once() {
    if installed("subscriber/node", "examples::the_subscriber_in_node_counts_once") {
        a_subscriber_in("subscriber/node", "single").await;
        a_subscriber_in("subscriber/node", "batched").await;
    }
}

#[test]
fn the_examples_are_short_and_pinned() {
    for name in [&OF_PARTNERS[..], &OF_SUBSCRIBERS[..], &["partner/rust"]].concat() {
        let (kind, language) = name.split_once('/').expect("two");
        let file = match language {
            "python" => format!("{kind}.py"),
            "node" | "bitgo" => format!("{kind}.js"),
            "typescript" => format!("{kind}.ts"),
            "go" => "main.go".to_owned(),
            _ => "main.rs".to_owned(),
        };
        let text = read(&format!("examples/{name}/{file}"));
        assert!(text.lines().count() < 120, "{name}: {}", text.lines().count());
        match language {
            "python" => {
                let list = read(&format!("examples/{name}/requirements.txt"));
                assert!(list.lines().all(|line| line.contains("==")), "{name}: {list}");
            }
            "node" | "bitgo" | "typescript" => {
                let package: Value =
                    serde_json::from_str(&read(&format!("examples/{name}/package.json"))).expect("JSON");
                let of = |kind: &str| package[kind].as_object().cloned().unwrap_or_default();
                let (used, compiled) = (of("dependencies"), of("devDependencies"));
                assert!(!used.is_empty(), "{name}");
                let mut versions = used.values().chain(compiled.values()).filter_map(Value::as_str);
                assert!(
                    versions.all(|version| version.starts_with(|letter: char| letter.is_ascii_digit())),
                    "{name}"
                );
                assert!(!read(&format!("examples/{name}/package-lock.json")).contains("\"resolved\""));
            }
            _ => {}
        }
    }
}
