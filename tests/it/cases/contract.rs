//! The schemas in `docs/schemas` and the program say the same, both ways. What the other tests publish and receive is laid
//! beside them by the kit (`kit::contract`).

use std::collections::{BTreeMap, BTreeSet};

use clap::CommandFactory;
use proptest::{prelude::*, sample::select, test_runner::TestRunner};
use serde_json::{Value, json};
use settled::{
    cli::Cli,
    domain::{message::EarlyRefusal, reason::Reason, signature::Signer},
};
use uuid::Uuid;

use super::pages::read as page;
use crate::kit::{
    contract::{
        self, ANSWERS, Form, decoded, directory, file_of, files, is_taken, misfits, refusals, type_file, whole,
    },
    partner::{Fields, new_key, sign},
    schema_change::{Writer, breaks},
};

/// Schemas that name no message and no answer.
const SHARED: [&str; 1] = ["common.json"];

#[test]
fn every_schema_is_one_and_bears_its_name() {
    let all = files(&directory());
    assert!(all.len() > 20, "{all:?}");
    for file in &all {
        let schema = contract::read(&directory(), file);
        assert_eq!(
            schema["$schema"], "https://json-schema.org/draft/2020-12/schema",
            "{file}"
        );
        assert_eq!(
            schema["$id"],
            format!("https://settled.example/schemas/{file}"),
            "{file}"
        );
        assert!(schema["title"].is_string(), "{file} has a title");
        let wrong: Vec<String> = jsonschema::draft202012::meta::validate(&schema)
            .err()
            .map(|error| error.to_string())
            .into_iter()
            .collect();
        assert!(wrong.is_empty(), "{file}: {wrong:?}");
        // Everything it refers to is there.
        if !SHARED.contains(&file.as_str()) {
            whole(&directory(), file);
        }
    }
}

#[test]
fn the_schemas_know_every_reason_and_class() {
    let common = contract::read(&directory(), "common.json");
    let known = |name: &str| common["$defs"][name]["x-known"].clone();
    let reasons: Vec<&str> = Reason::ALL.iter().map(Reason::as_str).collect();
    assert_eq!(known("reason"), json!(reasons));
    let classes: BTreeSet<u16> = Reason::ALL.iter().map(|reason| reason.class()).collect();
    assert_eq!(known("class"), json!(classes));
}

#[test]
fn every_command_with_json_has_its_schema() {
    fn leaves(command: &clap::Command, path: &str, found: &mut BTreeSet<String>) {
        let inner: Vec<&clap::Command> = command
            .get_subcommands()
            .filter(|inner| inner.get_name() != "help")
            .collect();
        // One that does something by itself, besides what those below it do, is a command of its own.
        let by_itself = !(path.is_empty() || command.is_subcommand_required_set());
        if inner.is_empty() || by_itself || command.is_args_conflicts_with_subcommands_set() {
            found.insert(path.to_owned());
        }
        for inner in inner {
            leaves(inner, format!("{path} {}", inner.get_name()).trim_start(), found);
        }
    }
    let mut commands = BTreeSet::new();
    leaves(&Cli::command(), "", &mut commands);
    let answer: BTreeSet<String> = ANSWERS.iter().map(|(command, _)| (*command).to_owned()).collect();
    let silent: BTreeSet<String> = contract::SILENT
        .iter()
        .map(|(command, _)| (*command).to_owned())
        .collect();
    assert_eq!(answer.union(&silent).cloned().collect::<BTreeSet<_>>(), commands);
    let expected: BTreeSet<String> = answer.iter().map(|command| file_of(command)).collect();
    let there: BTreeSet<String> = files(&directory())
        .into_iter()
        .filter(|file| file.starts_with("commands/"))
        .collect();
    assert_eq!(there, expected);
    assert!(ANSWERS.contains(&("allocation reserve", Form::Lines)));
}

/// A partner's message before it is signed.
#[derive(Clone, Debug)]
struct Said {
    kind: &'static str,
    fields: Fields,
}

impl Said {
    fn routing_key(&self) -> String {
        format!("acme.{}.update", self.kind)
    }

    /// The body, with this in place of some of its fields once it is signed.
    fn body(&self, changes: &[(String, Option<Value>)]) -> String {
        let payload = self.fields.text();
        let mut body = self.fields.clone();
        body.set("payload", json!(payload));
        body.set("signature", json!(sign(&new_key(), &payload)));
        for (name, change) in changes {
            match (name.split_once('.'), change) {
                (Some((outer, inner)), change) => {
                    let mut members = body.get(outer).clone();
                    if let Some(members) = members.as_object_mut() {
                        members.remove(inner);
                        members.extend(change.clone().map(|value| (inner.to_owned(), value)));
                    }
                    body.set(outer, members);
                }
                (None, Some(value)) => body.set(name, value.clone()),
                (None, None) => body.remove(name),
            }
        }
        body.text()
    }
}

/// Text of so many bytes at most that is stored and unescaped as every reader does.
fn text(most: usize) -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{1,40}".prop_map(|text: String| text),
        "[a-z0-9äöü€\u{1f600}\\\\\"/\n\t]{1,12}".prop_map(|text: String| text),
        Just("x".repeat(most)),
    ]
}

fn uuid() -> impl Strategy<Value = String> {
    (any::<[u8; 16]>(), any::<bool>()).prop_map(|(bytes, is_upper)| {
        let text = Uuid::from_bytes(bytes).to_string();
        if is_upper { text.to_uppercase() } else { text }
    })
}

fn quantity() -> impl Strategy<Value = String> {
    prop_oneof![
        "[1-9][0-9]{0,76}".prop_map(|text: String| text),
        Just("1".to_owned()),
        Just("115792089237316195423570985008687907853269984665640564039457584007913129639935".to_owned()),
    ]
}

prop_compose! {
    /// What a partner may say.
    fn said()(
        kind in select(vec!["allocation", "deallocation"]),
        released in proptest::option::of(text(16_384)),
        ids in [uuid(), uuid(), uuid()],
        names in [text(1_024), text(1_024), text(1_024)],
        nonce in text(256),
        currency in "[A-Za-z0-9:._-]{1,64}",
        quantity in quantity(),
        evaluation in proptest::option::of(text(1_024)),
        approval in proptest::option::of(text(1_024)),
        policy in proptest::option::of(select(vec!["approved", "REJECTED", "Approved", "rEjEcTeD"])),
        unknown in proptest::option::of(select(vec![json!(1.5), json!(null), json!([{"a": []}]), json!("x")])),
    ) -> Said {
        let [id, client, connection] = ids;
        let [partners_client, partners_connection, partners_id] = names;
        let status = if released.is_some() { "released" } else { "cleared" };
        let mut fields = Fields(vec![("status".to_owned(), json!(status))]);
        if let Some(why) = released {
            fields.set("rejectReason", json!(why));
        }
        fields.set(&format!("{kind}Id"), json!(id));
        fields.set("amount", json!({"currency": currency, "quantity": quantity}));
        fields.set("clientId", json!(client));
        fields.set("connectionId", json!(connection));
        fields.set("partnersClientId", json!(partners_client));
        fields.set("partnersConnectionId", json!(partners_connection));
        let partners = if kind == "allocation" { "partnersAllocationId" } else { "partnersDeallocationId" };
        fields.set(partners, json!(partners_id));
        fields.set("nonce", json!(nonce));
        for (name, value) in [("evaluationId", evaluation), ("pendingApprovalId", approval)] {
            if let Some(value) = value {
                fields.set(name, json!(value));
            }
        }
        if let Some(policy) = policy {
            fields.set("policyResult", json!(policy));
        }
        if let Some(unknown) = unknown {
            fields.set("desk", unknown);
        }
        Said { kind, fields }
    }
}

fn run(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    })
}

#[test]
fn what_a_partner_may_say_passes_schema_and_decoder_alike() {
    let outcome = run(300).run(&said(), |said| {
        let body = said.body(&[]);
        let value: Value = serde_json::from_str(&body).expect("JSON");
        let file = contract::update_file(&said.routing_key()).expect("a schema");
        let refused = refusals(&file, &value);
        prop_assert!(refused.is_empty(), "the schema: {refused:?}\n{body}");
        let facts = decoded(&said.routing_key(), body.as_bytes());
        let content = facts
            .content
            .as_ref()
            .map_err(|why| TestCaseError::fail(format!("{why:?}\n{body}")))?;
        prop_assert!(content.agreement.is_ok(), "{:?}\n{body}", content.agreement);
        prop_assert!(matches!(content.signer, Signer::Key(_)), "{:?}", content.signer);
        // What is signed has a schema of its own.
        let payload: Value = serde_json::from_str(&content.payload).expect("JSON");
        let refused = refusals(&format!("payload-{}.json", said.kind), &payload);
        prop_assert!(refused.is_empty(), "the payload's schema: {refused:?}");
        Ok(())
    });
    outcome.expect("both accept it");
}

/// What may stand in a field's place.
fn other_values() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        Just(None),
        select(vec![
            json!(null),
            json!(true),
            json!(7),
            json!([]),
            json!({}),
            json!(""),
            json!(" "),
            json!("cleared"),
            json!("released"),
            json!("Cleared"),
            json!("0"),
            json!("007"),
            json!("1.5"),
            json!("-1"),
            json!("1e3"),
            json!("approved"),
            json!("approve"),
            json!("{}"),
            json!("a\u{0}b"),
            json!("10764cd8-59b5-422a-93a6-681bae7e84bd"),
            json!("{10764cd8-59b5-422a-93a6-681bae7e84bd}"),
            json!("10764cd859b5422a93a6681bae7e84bd"),
            json!("B/C"),
            json!({"currency": "BTC", "quantity": 5}),
            json!({"currency": "BTC"}),
            json!("x".repeat(64)),
            json!("x".repeat(65)),
            json!("x".repeat(257)),
            json!("x".repeat(1_025)),
            json!("x".repeat(16_385)),
            json!("1".repeat(78)),
            json!("1".repeat(79)),
            json!(format!("0x{}", "1".repeat(128))),
            json!(format!("1b{}", "1".repeat(128))),
            json!(format!("1f{}", "1".repeat(128))),
            json!(format!("1f{}", "1".repeat(127))),
        ])
        .prop_map(Some),
    ]
}

/// With one field changed, or two: the schema accepts what the decoder takes and refuses what it refuses, signature included.
#[test]
fn what_the_schema_refuses_the_decoder_refuses_and_the_other_way_round() {
    let names = vec![
        "status",
        "rejectReason",
        "allocationId",
        "deallocationId",
        "amount",
        "amount.currency",
        "amount.quantity",
        "clientId",
        "connectionId",
        "partnersClientId",
        "partnersConnectionId",
        "partnersAllocationId",
        "partnersDeallocationId",
        "nonce",
        "evaluationId",
        "pendingApprovalId",
        "policyResult",
        "payload",
        "signature",
        "desk",
    ];
    let change = (select(names), other_values()).prop_map(|(name, value)| (name.to_owned(), value));
    let changes = proptest::collection::vec(change, 1..3);
    let mut counted = BTreeMap::from([(true, 0), (false, 0)]);
    let counts = std::cell::RefCell::new(&mut counted);
    let outcome = run(1_500).run(&(said(), changes), |(said, changes)| {
        let body = said.body(&changes);
        let value: Value = serde_json::from_str(&body).expect("JSON");
        let file = contract::update_file(&said.routing_key()).expect("a schema");
        let refused = refusals(&file, &value);
        let facts = decoded(&said.routing_key(), body.as_bytes());
        let is_taken = is_taken(&facts);
        *counts.borrow_mut().entry(is_taken).or_default() += 1;
        if !refused.is_empty() {
            prop_assert!(
                !is_taken,
                "the decoder takes what the schema refuses: {refused:?}\n{changes:?}\n{body}"
            );
        } else if !is_taken {
            let why = match &facts.content {
                Err(EarlyRefusal { detail, .. }) => detail.clone(),
                Ok(content) => format!("{:?}", content.signer),
            };
            let is_beyond = BEYOND.iter().any(|(_, piece)| why.contains(piece));
            prop_assert!(is_beyond, "only the decoder refuses it: {why}\n{changes:?}\n{body}");
        }
        Ok(())
    });
    outcome.expect("both say the same");
    assert!(
        counted.values().all(|count| *count > 50),
        "both kinds were tried: {counted:?}"
    );
}

/// What the decoder checks and no schema can say, as docs/contract.md lists it, and a piece of the detail.
const BEYOND: [(&str, &str); 9] = [
    ("bytes, not characters", "bytes"),
    ("above 2^256-1", "2^256-1"),
    ("the same key twice", "same key twice"),
    ("a lone surrogate", "lone surrogate"),
    ("a byte-order mark", "byte-order mark"),
    ("nested deeper than 16", "nested deeper than 16"),
    ("UTF-8", "UTF-8"),
    ("more than 262,144 bytes", "at most 262144"),
    ("r and s", "must be at"),
];

#[test]
fn what_the_decoder_checks_beyond_the_schema_is_on_the_page() {
    let said = Said {
        kind: "allocation",
        fields: Fields(vec![
            ("status".to_owned(), json!("cleared")),
            ("allocationId".to_owned(), json!("10764cd8-59b5-422a-93a6-681bae7e84bd")),
            ("amount".to_owned(), json!({"currency": "BTC", "quantity": "1"})),
            ("clientId".to_owned(), json!("9838fce3-c125-4af8-a775-a389f5ac26bf")),
            ("connectionId".to_owned(), json!("632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7")),
            ("partnersClientId".to_owned(), json!("c")),
            ("partnersConnectionId".to_owned(), json!("d")),
            ("partnersAllocationId".to_owned(), json!("e")),
            ("nonce".to_owned(), json!("n")),
        ]),
    };
    let good = said.body(&[]);
    let changed = |name: &str, value: Value| said.body(&[(name.to_owned(), Some(value))]).into_bytes();
    let begun = |head: &str| good.replacen('{', head, 1).into_bytes();
    let rows: [(usize, Vec<u8>); 9] = [
        (0, changed("nonce", json!("é".repeat(200)))),
        (
            1,
            changed("amount", json!({"currency": "BTC", "quantity": "9".repeat(78)})),
        ),
        (2, begun("{\"nonce\":\"n\",")),
        (3, begun("{\"desk\":\"\\ud800\",")),
        (4, [&b"\xef\xbb\xbf"[..], good.as_bytes()].concat()),
        (5, begun(&format!("{{\"desk\":{}{},", "[".repeat(17), "]".repeat(17)))),
        (6, [good.as_bytes(), b"\xff"].concat()),
        (7, [good.clone().into_bytes(), vec![b' '; 262_144]].concat()),
        (8, changed("signature", json!(format!("1f{}", "0".repeat(128))))),
    ];
    let contract = page("docs/contract.md");
    for (number, body) in rows {
        let (words, piece) = BEYOND[number];
        assert!(contract.contains(words), "docs/contract.md lists: {words}");
        let facts = decoded(&said.routing_key(), &body);
        let why = match &facts.content {
            Err(EarlyRefusal { detail, .. }) => detail.clone(),
            Ok(content) => format!("{:?}", content.signer),
        };
        assert!(!is_taken(&facts) && why.contains(piece), "{words}: {why}");
        // Whoever reads it leniently finds it right.
        if let Ok(value) = serde_json::from_slice::<Value>(&body) {
            let refused = refusals("update-allocation.json", &value);
            assert!(refused.is_empty(), "{words}: {refused:?}");
        }
    }
}

/// The pages' own examples are what the schemas say.
#[test]
fn the_examples_of_the_pages_are_what_the_schemas_say() {
    let mut events = 0;
    for line in page("docs/subscribers.md").split("```").skip(1).step_by(2) {
        let Some(document) = line.strip_prefix("json\n") else {
            continue;
        };
        let value: Value = serde_json::from_str(document).expect("JSON");
        let list: Vec<Value> = match &value {
            Value::Array(list) => {
                assert_eq!(misfits("events-batched.json", &value), [""; 0]);
                list.clone()
            }
            one => vec![one.clone()],
        };
        for event in list {
            assert_eq!(
                misfits(&type_file(event["type"].as_str().expect("a type")), &event),
                [""; 0]
            );
            // Those of a partner itself stand beside it.
            let is_in_it = misfits("event.json", &event).is_empty();
            assert_ne!(is_in_it, contract::is_of_a_partner(&event), "{event}");
            events += 1;
        }
    }
    assert!(events >= 3, "{events}");
    let partners = page("docs/partners.md");
    let body = partners.lines().find(|line| line.contains("\"signature\":\"20"));
    let body: Value = serde_json::from_str(body.expect("the body")).expect("JSON");
    assert_eq!(misfits("update-allocation.json", &body), [""; 0]);
}

/// The newest release whose schemas stand in `docs/schemas/released`.
fn released() -> Vec<String> {
    let entries = std::fs::read_dir(directory().join("released")).expect("docs/schemas/released");
    let mut versions: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    versions.sort();
    versions
}

/// Who writes what a file describes.
fn writer(file: &str) -> Writer {
    let others = ["update-", "payload-", "reservation"];
    if others.iter().any(|head| file.starts_with(head)) {
        Writer::Others
    } else {
        Writer::Ours
    }
}

/// What is a break, is meant, and is announced in CHANGELOG.md and docs/contract.md: the file, and what is said of it.
const ANNOUNCED: [(&str, &str); 2] = [
    ("payload-allocation.json", "/expiresAt: nothing is said of it"),
    ("payload-deallocation.json", "/expiresAt: nothing is said of it"),
];

/// The policy of docs/contract.md: whoever built against a release goes on.
#[test]
fn nothing_breaks_who_built_against_a_release() {
    let mut broken = Vec::new();
    assert!(!released().is_empty());
    for version in released() {
        let before = directory().join("released").join(&version);
        let there = files(&directory());
        for file in files(&before).iter().filter(|file| !SHARED.contains(&file.as_str())) {
            if !there.contains(file) {
                broken.push(format!("{version}: {file} is gone"));
                continue;
            }
            let found = breaks(writer(file), &whole(&before, file), &whole(&directory(), file));
            let is_announced = |why: &String| ANNOUNCED.iter().any(|(one, what)| one == file && why.starts_with(what));
            let found = found.into_iter().filter(|why| !is_announced(why));
            broken.extend(found.map(|why| format!("{version}: {file}: {why}")));
        }
    }
    assert!(
        broken.is_empty(),
        "breaking changes, see docs/contract.md:\n{}",
        broken.join("\n")
    );
}

/// A schema with something else at a place, or with nothing there.
fn changed(mut schema: Value, at: &str, value: Option<Value>) -> Value {
    let (place, name) = at.rsplit_once('/').expect("a place");
    let members = schema.pointer_mut(place).and_then(Value::as_object_mut);
    let members = members.unwrap_or_else(|| panic!("nothing at {place}"));
    match value {
        Some(value) => drop(members.insert(name.to_owned(), value)),
        None => drop(members.remove(name)),
    }
    schema
}

#[test]
fn what_breaks_a_reader_and_what_does_not() {
    let event = whole(&directory(), "event-allocation-cleared.json");
    let in_allocation = |rest: &str| format!("/properties/data/properties/allocation/properties/{rest}");
    let rows = [
        ("/properties/more".to_owned(), Some(json!({"type": "string"})), false),
        (in_allocation("more"), Some(json!({"type": "string"})), false),
        (
            "/properties/id/description".to_owned(),
            Some(json!("other words")),
            false,
        ),
        (in_allocation("partnerExternalId/maxLength"), Some(json!(10)), false),
        (in_allocation("id"), None, true),
        (in_allocation("notes"), None, true),
        (in_allocation("status/const"), Some(json!("done")), true),
        (in_allocation("notes/type"), Some(json!(["string", "null"])), true),
        (
            in_allocation("amount/properties/quantity/type"),
            Some(json!("number")),
            true,
        ),
        (in_allocation("amount/required"), Some(json!(["currency"])), true),
        (in_allocation("partnerExternalId/minLength"), None, true),
        ("/properties/time/pattern".to_owned(), None, true),
        ("/properties/subject".to_owned(), None, true),
        ("/required".to_owned(), Some(json!(["id"])), true),
        (
            "/properties/type/const".to_owned(),
            Some(json!("allocation.done")),
            true,
        ),
    ];
    for (at, value, is_break) in rows {
        let found = breaks(Writer::Ours, &event, &changed(event.clone(), &at, value));
        assert_eq!(!found.is_empty(), is_break, "{at}: {found:?}");
    }
    let any = whole(&directory(), "event.json");
    let mut more = any.clone();
    more["oneOf"]
        .as_array_mut()
        .expect("types")
        .push(json!({"type": "object"}));
    assert!(
        !breaks(Writer::Ours, &any, &more).is_empty(),
        "a new type of event is a new promise"
    );
    assert_eq!(breaks(Writer::Ours, &more, &any), [""; 0]);
}

#[test]
fn what_breaks_a_writer_and_what_does_not() {
    let update = whole(&directory(), "update-allocation.json");
    let rows = [
        (
            "/properties/status/enum",
            Some(json!(["cleared", "released", "returned"])),
            false,
        ),
        ("/properties/nonce/maxLength", Some(json!(512)), false),
        ("/properties/nonce/pattern", None, false),
        ("/properties/evaluationId", None, false),
        ("/required", Some(json!(["nonce"])), false),
        // Unknown fields were ignored, whatever they held.
        ("/properties/desk", Some(json!({"type": "string"})), true),
        ("/properties/status/enum", Some(json!(["cleared"])), true),
        ("/properties/nonce/maxLength", Some(json!(100)), true),
        ("/properties/nonce/minLength", Some(json!(2)), true),
        ("/properties/partnersClientId/pattern", Some(json!("^[a-z]*$")), true),
        ("/then/required", Some(json!(["rejectReason", "evaluationId"])), true),
        ("/additionalProperties", Some(json!(false)), true),
    ];
    for (at, value, is_break) in rows {
        let found = breaks(Writer::Others, &update, &changed(update.clone(), at, value));
        assert_eq!(!found.is_empty(), is_break, "{at}: {found:?}");
    }
    let mut stricter = update.clone();
    stricter["required"]
        .as_array_mut()
        .expect("names")
        .push(json!("evaluationId"));
    assert!(!breaks(Writer::Others, &update, &stricter).is_empty());
}
