//! What README and the pages in docs/ say of messages, promises and traps is so. `pages` looks at everything else in them.

use std::collections::BTreeMap;

use settled::domain::{
    address::parse_uuid,
    delivery::{Delivery, Properties, Publication, PublicationKind, Source},
    digest::sha256,
    event,
    message::facts,
    reason::Reason,
    signature::{Signer, SigningKey},
};

const PARTNERS: &str = include_str!("../../../docs/partners.md");
const SUBSCRIBERS: &str = include_str!("../../../docs/subscribers.md");
const PROMISES: &str = include_str!("../../../docs/promises.md");

/// The fenced blocks between a heading and the next one.
fn blocks(page: &'static str, heading: &str) -> Vec<&'static str> {
    let (_, section) = page.split_once(heading).expect("the heading is there");
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
    let [keys, payload, signature, body, ..] = blocks(PARTNERS, "\n## A worked example")[..] else {
        panic!("four blocks")
    };
    let (secret, public) = keys.split_once('\n').expect("two keys");
    let seed = sha256("settled: the partner of the README");
    assert_eq!(hex::encode(seed), secret);
    let key = SigningKey::from_bytes(seed).expect("a key");
    assert_eq!(key.public_key().to_hex(), public);
    assert_eq!(key.sign(payload), signature);
    assert!(PARTNERS.contains(&format!("The payload of {} bytes", payload.len())));

    let delivery = Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: "northwind.allocation.update".to_owned(),
        body: body.as_bytes().to_vec(),
        properties: Properties::default(),
        cut: None,
        redelivered: false,
        source: Source::Plain,
    };
    let content = facts(&delivery).content.expect("it decodes");
    assert_eq!(content.payload, payload);
    assert_eq!(content.signature.map(hex::encode).as_deref(), Some(signature));
    assert_eq!(content.signer, Signer::Key(key.public_key()));
    assert_eq!(content.agreement, Ok(()));
}

/// The id of a settlement's event, by the rule.
fn id_of(event: &serde_json::Value) -> String {
    let namespace = parse_uuid("6f1d0c52-0e0b-5c7e-9a53-3c1c8a2d7f10").expect("a UUID");
    let text = |name: &str| event[name].as_str().unwrap_or_default();
    let name = format!("{}|{}", text("type"), text("subject"));
    uuid::Uuid::new_v5(&namespace, name.as_bytes()).to_string()
}

/// The event that the page shows for the worked example has the id that the worker would give it.
#[test]
fn the_event_shown_is_that_of_the_worked_example() {
    let [event, ..] = blocks(SUBSCRIBERS, "\n## The message")[..] else {
        panic!("a block")
    };
    let event: serde_json::Value = serde_json::from_str(event).expect("JSON");
    assert_eq!(event["id"], id_of(&event));
    assert_eq!(event["data"]["allocation"]["id"], event["subject"]);
    assert_eq!(event["data"]["allocation"]["updatedAt"], event["time"]);
}

/// The array that the page shows is what the worker makes of the events in it, byte for byte and with these properties.
#[test]
fn the_array_shown_is_that_of_its_events() {
    let [properties, array] = blocks(SUBSCRIBERS, "\n## Many events in one message")[..] else {
        panic!("two blocks")
    };
    let said = |name: &str| {
        let line = properties.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}")).trim()
    };
    let events = event::read(Some(said("content_type")), array.as_bytes()).expect("an array");
    let alone = events.iter().map(|body| {
        let told: serde_json::Value = serde_json::from_slice(body).expect("an event");
        let text = |name: &str| told[name].as_str().expect("text").to_owned();
        assert_eq!(text("id"), id_of(&told));
        Publication {
            kind: PublicationKind::Event,
            exchange: said("exchange").to_owned(),
            routing_key: format!("{}.northwind", text("type")),
            properties: Properties {
                content_type: Some("application/cloudevents+json".to_owned()),
                delivery_mode: Some(2),
                message_id: Some(text("id")),
                ..Properties::default()
            },
            body: body.to_vec(),
        }
    });
    let max_bytes = 262_144;
    let made = event::in_format(alone.collect(), event::Format::Batched { max_bytes });
    let [made] = made.as_slice() else {
        panic!("one message: {made:?}")
    };
    assert_eq!(std::str::from_utf8(&made.body), Ok(array));
    assert_eq!(made.routing_key, said("routing key"));
    let properties = &made.properties;
    assert_eq!(properties.content_type.as_deref(), Some(said("content_type")));
    assert_eq!(properties.message_id.as_deref(), Some(said("message_id")));
    assert_eq!(
        properties.delivery_mode.map(|mode| mode.to_string()).as_deref(),
        Some(said("delivery_mode"))
    );
    assert_eq!(format!("settled-events: {}", event::count_of(made)), said("headers"));
    assert_eq!(properties.headers.as_ref().map(BTreeMap::len), Some(1));
}

#[test]
fn the_table_of_reasons_is_that_of_the_code() {
    // What came later stands between the numbers, which are quoted.
    let numbers = [
        "1", "2", "3", "4", "5", "6", "7", "8", "8a", "9", "9a", "10", "11", "12", "13", "13a", "13b", "14", "15",
    ];
    for (number, reason) in numbers.into_iter().zip(Reason::ALL) {
        let is_final = if reason.is_final() { "yes" } else { "no" };
        let row = format!("| {number} | `{reason}` | {} | {is_final} |", reason.class());
        assert!(PARTNERS.contains(&row), "{row}");
    }
    for reason in [Reason::DeliveryLimit, Reason::Expired, Reason::Internal] {
        assert!(PARTNERS.contains(&format!("`{reason}`")), "{reason}");
    }
}

/// The tests that a text names, like `worker::sigterm_settles...`, and where there is none of that name.
fn named_tests(text: &str) -> (Vec<&str>, Vec<&str>) {
    let is_there = |path: &str| {
        let modules: Vec<&str> = path.split("::").filter(|module| *module != "tests").collect();
        let (name, modules) = modules.split_last()?;
        // Tests beside their file may have files of their own.
        let beside = format!("src/{}.rs", path.rsplit_once("::")?.0.replace("::", "/"));
        // The last module may stand in the file of the one before it.
        let outer = modules.split_last().map_or(modules, |(_, outer)| outer);
        let files = [modules, outer].map(|modules| modules.join("/")).map(|room| {
            [
                format!("src/{room}.rs"),
                format!("src/{room}/mod.rs"),
                format!("src/{room}/tests.rs"),
                format!("tests/it/cases/{room}.rs"),
                format!("tests/{room}/main.rs"),
            ]
        });
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let texts = files
            .iter()
            .flatten()
            .chain([&beside])
            .filter_map(|file| std::fs::read_to_string(root.join(file)).ok());
        let test = format!("fn {name}(");
        texts.into_iter().any(|text| text.contains(&test)).then_some(())
    };
    let is_path = |code: &&str| {
        code.contains("::")
            && code
                .bytes()
                .all(|byte| byte == b':' || byte == b'_' || byte.is_ascii_alphanumeric())
    };
    let codes = text.split('`').skip(1).step_by(2);
    codes.filter(is_path).partition(|path| is_there(path).is_some())
}

const PROMISED: &str = "\n## Promises and their tests";

/// The first cells of the table that a heading opens.
fn first_cells(heading: &str) -> Vec<&'static str> {
    let (_, section) = PROMISES.split_once(heading).expect(heading);
    let section = section.split("\n#").next().unwrap_or_default();
    let rows = section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    rows.skip(1).collect()
}

/// Every promise names a test that is there, and what voids it.
#[test]
fn every_promise_names_its_test() {
    let (found, missing) = named_tests(PROMISES);
    assert!(found.len() > 10, "promises name tests: {found:?}");
    assert!(missing.is_empty(), "these tests are not there: {missing:?}");
    let (_, section) = PROMISES.split_once(PROMISED).expect("the heading is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    for row in section
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| promise"))
    {
        let cells = row.split(" | ").nth(1).unwrap_or_default();
        assert!(!named_tests(cells).0.is_empty(), "a promise without a test: {row}");
    }
    let (promises, breaks) = (first_cells(PROMISED), first_cells("\n## How to break our promise"));
    assert!(promises.len() > 10, "{promises:?}");
    assert_eq!(promises, breaks, "for each promise, in the same order, what voids it");
}

/// Every trap names a test that is there.
#[test]
fn every_trap_names_its_test() {
    const TRAPS: &str = include_str!("../../../docs/traps.md");
    let (found, missing) = named_tests(TRAPS);
    assert!(
        found.len() > 30 && missing.is_empty(),
        "these tests are not there: {missing:?}"
    );
    let rows = TRAPS
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| what"));
    for row in rows {
        let tests = row.rsplit(" | ").next().unwrap_or_default();
        assert!(!named_tests(tests).0.is_empty(), "a trap without a test: {row}");
    }
}

/// Every threat names a test that is there.
#[test]
fn every_threat_names_its_test() {
    const THREATS: &str = include_str!("../../../docs/threats.md");
    let (found, missing) = named_tests(THREATS);
    assert!(
        found.len() > 40 && missing.is_empty(),
        "these tests are not there: {missing:?}"
    );
    let (defended, open) = THREATS
        .split_once("\n## What is not defended")
        .expect("what is not defended is said");
    let rows = |text: &'static str, head: &'static str| {
        text.lines()
            .filter(move |line| line.starts_with("| ") && !line.starts_with(head))
    };
    for row in rows(defended, "| threat") {
        let tests = row.rsplit(" | ").next().unwrap_or_default();
        assert!(!named_tests(tests).0.is_empty(), "a threat without a test: {row}");
    }
    assert!(rows(open, "| what").count() > 5, "what is not defended is listed");
}
