//! What the README says is so.

use settled::domain::{
    decide::Reason,
    delivery::{Delivery, Properties, Source},
    message::{facts, parse_uuid, sha256},
    signature::{Signer, SigningKey},
};

const README: &str = include_str!("../../README.md");

/// The fenced blocks between a heading and the next one.
fn blocks(heading: &str) -> Vec<&'static str> {
    let (_, section) = README.split_once(heading).expect("the heading is there");
    let end = section.find("\n## ").unwrap_or(section.len());
    let section = section.get(..end).expect("a boundary");
    section
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| Some(block.split_once('\n')?.1.trim_end()))
        .collect()
}

/// The worked example is real: the key signs the payload to that signature, and the body is judged signed and agreeing.
#[test]
fn the_worked_example_is_true_to_the_byte() {
    let [keys, payload, signature, body] = blocks("### A worked example")[..] else {
        panic!("four blocks")
    };
    let (secret, public) = keys.split_once('\n').expect("two keys");
    let seed = sha256("settled: the partner of the README");
    assert_eq!(hex::encode(seed), secret);
    let key = SigningKey::from_bytes(seed).expect("a key");
    assert_eq!(key.public_key().to_hex(), public);
    assert_eq!(key.sign(payload), signature);
    assert!(README.contains(&format!("The payload of {} bytes", payload.len())));

    let delivery = Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: "northwind.allocation.update".to_owned(),
        body: body.as_bytes().to_vec(),
        properties: Properties::default(),
        redelivered: false,
        source: Source::Plain,
    };
    let content = facts(&delivery).content.expect("it decodes");
    assert_eq!(content.update.payload, payload);
    assert_eq!(content.update.signature, signature);
    assert_eq!(content.signer, Signer::Key(key.public_key()));
    assert_eq!(content.agreement, Ok(()));
}

/// The event that the README shows for the worked example has the id that the worker would give it.
#[test]
fn the_event_shown_is_that_of_the_worked_example() {
    let [event] = blocks("## For services: subscribe to events")[..] else {
        panic!("one block")
    };
    let event: serde_json::Value = serde_json::from_str(event).expect("JSON");
    let namespace = parse_uuid("6f1d0c52-0e0b-5c7e-9a53-3c1c8a2d7f10").expect("a UUID");
    let name = format!(
        "{}|{}",
        event["type"].as_str().unwrap_or_default(),
        event["subject"].as_str().unwrap_or_default()
    );
    assert_eq!(event["id"], uuid::Uuid::new_v5(&namespace, name.as_bytes()).to_string());
    assert_eq!(event["data"]["allocation"]["id"], event["subject"]);
    assert_eq!(event["data"]["allocation"]["updatedAt"], event["time"]);
}

#[test]
fn the_table_of_reasons_is_that_of_the_code() {
    for (place, reason) in Reason::ALL.into_iter().enumerate().filter(|(place, _)| *place < 15) {
        let is_final = if reason.is_final() { "yes" } else { "no" };
        let row = format!("| {} | `{reason}` | {} | {is_final} |", place + 1, reason.class());
        assert!(README.contains(&row), "{row}");
    }
    for reason in [Reason::DeliveryLimit, Reason::Expired, Reason::Internal] {
        assert!(README.contains(&format!("`{reason}`")), "{reason}");
    }
}

/// Every setting that the README names in the manner of `room.name` is one.
#[test]
fn the_settings_named_are_settings() {
    let settings: toml::Table = settled::config::DEFAULTS.parse().expect("TOML");
    let named = README
        .split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once('.'));
    let mut found = 0;
    for (room, name) in named {
        if let Some(toml::Value::Table(room)) = settings.get(room) {
            assert!(room.contains_key(name), "{room:?} has no {name}");
            found += 1;
        }
    }
    assert!(found > 3, "the README names settings");
}

/// Every promise names a test that is there.
#[test]
fn every_promise_names_its_test() {
    let (_, section) = README.split_once("## What is promised").expect("the heading is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let sources: String = [
        include_str!("faults.rs"),
        include_str!("worker.rs"),
        include_str!("proof.rs"),
        include_str!("commands.rs"),
        include_str!("tls.rs"),
        include_str!("outage.rs"),
        include_str!("../model/main.rs"),
        include_str!("../../src/domain/decide/tests.rs"),
        include_str!("../../src/domain/event/tests.rs"),
        include_str!("../../src/broker/intake.rs"),
    ]
    .concat();
    let tests: Vec<&str> = section
        .split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once("::").map(|_| code.rsplit("::").next().unwrap_or(code)))
        .collect();
    assert!(tests.len() > 10, "promises name tests: {tests:?}");
    for test in tests {
        assert!(sources.contains(&format!("fn {test}(")), "{test} is not there");
    }
}
