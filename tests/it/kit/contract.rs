//! What others build against, held to what is seen: every message that a test publishes or receives and every answer with
//! `--json` is laid beside its schema in `docs/schemas`.
//!
//! The schemas are open, as the policy in `docs/contract.md` has it: a reader must bear fields that it does not know. Here
//! they are closed, so that a field that no schema tells of is seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
    process::Output,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use jsonschema::Validator;
use lapin::{BasicProperties, message::Delivery as Received, types::AMQPValue};
use serde_json::{Map, Value, json};
use settled::domain::{
    address,
    delivery::{Delivery, Properties, Source},
    message::{self, Facts},
    signature::Signer,
};

use crate::kit::{amqp::Message, auditor::Expect, secrets};

/// Where the schemas stand.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schemas")
}

/// A command's answer with `--json`: one document, or a line for each thing asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Document,
    Lines,
}

/// Every command that answers with `--json`, and how. Its schema is `commands/<words>.json`.
pub(crate) const ANSWERS: [(&str, Form); 69] = [
    ("allocation reserve", Form::Lines),
    ("allocation show", Form::Document),
    ("audit list", Form::Lines),
    ("config reference", Form::Document),
    ("config show", Form::Document),
    ("client add", Form::Document),
    ("client list", Form::Document),
    ("connection add", Form::Document),
    ("connection list", Form::Document),
    ("connection show", Form::Document),
    ("currency list", Form::Document),
    ("currency map", Form::Document),
    ("currency unmap", Form::Document),
    ("dead-letters collect", Form::Document),
    ("dead-letters discard", Form::Document),
    ("dead-letters export", Form::Lines),
    ("dead-letters groups", Form::Document),
    ("dead-letters list", Form::Lines),
    ("dead-letters plan", Form::Document),
    ("dead-letters plan approve", Form::Document),
    ("dead-letters plan show", Form::Document),
    ("dead-letters purge", Form::Document),
    ("dead-letters replay", Form::Document),
    ("dead-letters restore", Form::Document),
    ("dead-letters runs cancel", Form::Document),
    ("dead-letters runs list", Form::Document),
    ("dead-letters runs resume", Form::Document),
    ("dead-letters runs show", Form::Document),
    ("dead-letters show", Form::Document),
    ("dead-letters stats", Form::Document),
    ("demo", Form::Document),
    ("deposit", Form::Document),
    ("doctor", Form::Document),
    ("explain", Form::Document),
    ("key add", Form::Document),
    ("key challenge", Form::Document),
    ("key list", Form::Document),
    ("key reinstate", Form::Document),
    ("key revoke", Form::Document),
    ("key rotate", Form::Document),
    ("ledger balances", Form::Document),
    ("ledger check", Form::Document),
    ("migrate", Form::Document),
    ("nonce void", Form::Document),
    ("outbox list", Form::Lines),
    ("outbox retry", Form::Document),
    ("partner add", Form::Document),
    ("partner list", Form::Document),
    ("partner move", Form::Document),
    ("partner quarantine", Form::Document),
    ("partner resume", Form::Document),
    ("partner set", Form::Document),
    ("partner suspend", Form::Document),
    ("partner-kit lint", Form::Document),
    ("partner-kit sign", Form::Document),
    ("partner-kit vectors", Form::Document),
    ("probe", Form::Document),
    ("receipt", Form::Document),
    ("reconcile", Form::Document),
    ("recover", Form::Document),
    ("roles", Form::Document),
    ("simulate", Form::Document),
    ("timeline", Form::Document),
    ("token add", Form::Document),
    ("token list", Form::Document),
    ("token revoke", Form::Document),
    ("topology", Form::Document),
    ("topology export", Form::Document),
    ("withdraw", Form::Document),
];

/// Commands that answer no program, and why.
pub(crate) const SILENT: [(&str, &str); 5] = [
    ("worker", "it runs until it is stopped, and speaks in its log"),
    (
        "api",
        "it runs until it is stopped, and its document is docs/openapi.json",
    ),
    ("console", "it runs until it is stopped; its line says where to open it"),
    ("completions", "a shell reads it"),
    ("man", "man reads it"),
];

/// The schema's file of a command.
pub(crate) fn file_of(command: &str) -> String {
    format!("commands/{}.json", command.replace(' ', "-"))
}

/// One schema by its file, as it stands.
pub(crate) fn read(directory: &Path, file: &str) -> Value {
    let path = directory.join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files of a directory of schemas.
pub(crate) fn files(directory: &Path) -> BTreeSet<String> {
    let list = |folder: &str| -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(directory.join(folder)) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .filter(|name| name.ends_with(".json"))
            .map(|name| format!("{folder}{name}"))
            .collect()
    };
    list("").into_iter().chain(list("commands/")).collect()
}

/// A schema with everything that it refers to in its place, so that it stands alone.
pub(crate) fn whole(directory: &Path, file: &str) -> Value {
    let root = read(directory, file);
    flat(directory, file, &root, &root)
}

fn flat(directory: &Path, file: &str, root: &Value, schema: &Value) -> Value {
    match schema {
        Value::Object(members) => {
            let mut parts: Vec<Value> = Vec::new();
            let mut own = Map::new();
            for (key, value) in members {
                match (key.as_str(), value) {
                    ("$ref", Value::String(target)) => parts.push(referred(directory, file, root, target)),
                    ("allOf", Value::Array(all)) => {
                        parts.extend(all.iter().map(|part| flat(directory, file, root, part)));
                    }
                    // Names, and a note beside what it is about: nothing to look into.
                    ("$schema" | "$id" | "$defs" | "contentSchema" | "description" | "title", _) => {}
                    // Names of fields, which are no keywords.
                    ("properties", Value::Object(fields)) => {
                        let fields = fields
                            .iter()
                            .map(|(name, field)| (name.clone(), flat(directory, file, root, field)));
                        own.insert(key.clone(), Value::Object(fields.collect()));
                    }
                    ("const" | "enum" | "required" | "x-known", value) => drop(own.insert(key.clone(), value.clone())),
                    (_, value) => drop(own.insert(key.clone(), flat(directory, file, root, value))),
                }
            }
            parts.into_iter().fold(Value::Object(own), merged)
        }
        Value::Array(items) => items.iter().map(|item| flat(directory, file, root, item)).collect(),
        other => other.clone(),
    }
}

fn referred(directory: &Path, file: &str, root: &Value, target: &str) -> Value {
    let (other, pointer) = target.split_once('#').unwrap_or((target, ""));
    let folder = Path::new(file).parent().unwrap_or(Path::new(""));
    let (file, root) = if other.is_empty() {
        (file.to_owned(), root.clone())
    } else {
        let path = match other.strip_prefix("../") {
            Some(above) => above.to_owned(),
            None => folder.join(other).to_string_lossy().into_owned(),
        };
        let root = read(directory, &path);
        (path, root)
    };
    let part = root
        .pointer(pointer)
        .unwrap_or_else(|| panic!("{file}: nothing at {target}"));
    flat(directory, &file, &root, part)
}

/// Both at once, as far as their keywords do not meet; what meets stands side by side.
fn merged(left: Value, right: Value) -> Value {
    let (Value::Object(mut left), Value::Object(right)) = (left, right) else {
        panic!("only objects are joined");
    };
    let mut beside = Map::new();
    for (key, value) in right {
        let Some(mine) = left.get(&key).cloned() else {
            left.insert(key, value);
            continue;
        };
        let joined = match (key.as_str(), mine, value) {
            ("properties", Value::Object(mut mine), Value::Object(theirs)) => {
                for (name, property) in theirs {
                    let both = match mine.remove(&name) {
                        Some(own) => merged(own, property),
                        None => property,
                    };
                    mine.insert(name, both);
                }
                Value::Object(mine)
            }
            ("required", Value::Array(mine), Value::Array(theirs)) => {
                let mut all = mine;
                all.extend(theirs);
                Value::Array(all)
            }
            // Of two types the narrower: null of text or null.
            ("type", mine, theirs) if types(&mine).is_subset(&types(&theirs)) => mine,
            ("type", mine, theirs) if types(&theirs).is_subset(&types(&mine)) => theirs,
            (_, mine, theirs) if mine == theirs => mine,
            (_, mine, theirs) => {
                beside.insert(key.clone(), theirs);
                mine
            }
        };
        left.insert(key, joined);
    }
    if !beside.is_empty() {
        left.insert("allOf".to_owned(), json!([beside]));
    }
    Value::Object(left)
}

/// What `type` says, as a set.
pub(crate) fn types(value: &Value) -> BTreeSet<&str> {
    match value {
        Value::String(one) => BTreeSet::from([one.as_str()]),
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => BTreeSet::new(),
    }
}

/// The same, with nothing allowed but what it tells of.
fn closed(schema: Value) -> Value {
    match schema {
        Value::Object(members) => {
            let is_told = members.contains_key("properties") && !members.contains_key("additionalProperties");
            let mut members: Map<String, Value> = members
                .into_iter()
                .map(|(key, value)| match (key.as_str(), value) {
                    ("properties", Value::Object(fields)) => {
                        let fields = fields.into_iter().map(|(name, field)| (name, closed(field)));
                        (key, Value::Object(fields.collect()))
                    }
                    ("if" | "then" | "else" | "not" | "const" | "enum", value) => (key, value),
                    (_, value) => (key, closed(value)),
                })
                .collect();
            if is_told {
                members.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
            Value::Object(members)
        }
        Value::Array(items) => items.into_iter().map(closed).collect(),
        other => other,
    }
}

/// A schema's validator: open as others use it, or closed.
fn validator(file: &str, is_closed: bool) -> Arc<Validator> {
    type Known = Mutex<BTreeMap<(String, bool), Arc<Validator>>>;
    static KNOWN: LazyLock<Known> = LazyLock::new(Known::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let made = known.entry((file.to_owned(), is_closed)).or_insert_with(|| {
        let schema = whole(&directory(), file);
        let schema = if is_closed { closed(schema) } else { schema };
        Arc::new(jsonschema::draft202012::new(&schema).unwrap_or_else(|error| panic!("{file}: {error}")))
    });
    Arc::clone(made)
}

/// What a value has that its schema does not allow.
pub(crate) fn misfits(file: &str, value: &Value) -> Vec<String> {
    wrong(&validator(file, true), file, value)
}

/// The same as others see it, who must bear what they do not know.
pub(crate) fn refusals(file: &str, value: &Value) -> Vec<String> {
    wrong(&validator(file, false), file, value)
}

fn wrong(validator: &Validator, file: &str, value: &Value) -> Vec<String> {
    validator
        .iter_errors(value)
        .map(|error| format!("{file}: {} at {:?}", error, error.instance_path().to_string()))
        .collect()
}

/// What was found wrong where nobody could be told: in the task that listens for a test.
static FOUND: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn found() -> MutexGuard<'static, Vec<String>> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails where something was found.
pub(crate) fn nothing_found() {
    let found = found();
    assert!(
        found.is_empty(),
        "what was published is not what the schemas say:\n{}",
        found.join("\n")
    );
}

/// What tests publish themselves where only settled does: no word of settled's.
static FORGED: LazyLock<Mutex<HashSet<Vec<u8>>>> = LazyLock::new(Mutex::default);

/// Looks at what a test is about to publish.
pub(crate) fn sent(message: &Message) {
    secrets::message(message);
    if message.exchange != "settlement.updates" {
        FORGED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(message.body.clone());
        return;
    }
    let problems = agreement(
        &message.routing_key,
        &message.body,
        matches!(message.expect, Expect::Settles),
    );
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The schema of an update's body, by its routing key.
pub(crate) fn update_file(routing_key: &str) -> Option<String> {
    let (_, kind) = address::parse_routing_key(routing_key)?;
    Some(format!("update-{}.json", kind.as_str()))
}

/// What the program reads of a body alone.
pub(crate) fn decoded(routing_key: &str, body: &[u8]) -> Facts {
    message::facts(&Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: routing_key.to_owned(),
        body: body.to_vec(),
        properties: Properties::default(),
        cut: None,
        redelivered: false,
        source: Source::Plain,
    })
}

/// Whether the decoder takes it: steps 1 to 3, and that the signature is one.
pub(crate) fn is_taken(facts: &Facts) -> bool {
    match &facts.content {
        Ok(content) => !matches!(content.signer, Signer::Malformed(_)),
        Err(_) => false,
    }
}

/// What the schema refuses the decoder refuses; what settles the schema accepts.
pub(crate) fn agreement(routing_key: &str, body: &[u8], settles: bool) -> Vec<String> {
    let (Some(file), Ok(value)) = (update_file(routing_key), serde_json::from_slice::<Value>(body)) else {
        return Vec::new();
    };
    let refused = refusals(&file, &value);
    if refused.is_empty() || (!settles && !is_taken(&decoded(routing_key, body))) {
        return Vec::new();
    }
    let words = "the schema refuses what is taken";
    refused.into_iter().map(|why| format!("{words}: {why}")).collect()
}

/// Looks at what came to a test.
pub(crate) fn received(delivery: &Received) {
    let is_forged = FORGED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .contains(&delivery.data);
    if is_forged {
        return;
    }
    let problems = match delivery.exchange.as_str() {
        // A reply is an event at another address.
        "settlement.events" | "" => event(&delivery.properties, &delivery.data),
        "settlement.dead" => dead_letter(&delivery.properties),
        _ => return,
    };
    found().extend(problems);
}

fn event(properties: &BasicProperties, body: &[u8]) -> Vec<String> {
    let file = match properties.content_type().as_ref().map(|kind| kind.as_str()) {
        Some("application/cloudevents+json") => "event.json",
        Some("application/cloudevents-batch+json") => "events-batched.json",
        _ => return Vec::new(),
    };
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return vec![format!("{file}: no JSON")];
    };
    let mut headers = as_json(properties);
    // What a broker counts when it delivers a message again is none of ours.
    if let Some(headers) = headers.as_object_mut() {
        headers.retain(|name, _| !name.starts_with("x-"));
    }
    // `oneOf` only says that none fits: what is wrong is said by the schema of its type.
    let one = |event: &Value| match event["type"].as_str() {
        Some(kind) if files(&directory()).contains(&type_file(kind)) => misfits(&type_file(kind), event),
        _ => vec![format!("{file}: an event of no known type: {event}")],
    };
    let mut problems = match &value {
        Value::Array(events) => events.iter().flat_map(one).collect(),
        event => one(event),
    };
    if problems.is_empty() && !is_of_a_partner(&value) {
        problems = misfits(file, &value);
    }
    problems.extend(misfits("event-headers.json", &headers));
    if !problems.is_empty() {
        problems.push(value.to_string());
    }
    problems
}

/// Whether an event is of a partner itself, and not of what became of an update: `event.json` keeps to the list that it had.
pub(crate) fn is_of_a_partner(event: &Value) -> bool {
    let kind = event["type"].as_str().unwrap_or_default();
    kind.starts_with("partner.") || kind.starts_with("key.")
}

/// The schema of an event's type.
pub(crate) fn type_file(kind: &str) -> String {
    format!("event-{}.json", kind.replace('.', "-"))
}

/// Our headers of a dead letter that we made: one that the broker made has the broker's record.
fn dead_letter(properties: &BasicProperties) -> Vec<String> {
    let Value::Object(headers) = as_json(properties) else {
        return Vec::new();
    };
    if headers.contains_key("x-death") || !headers.contains_key("settled-reason") {
        return Vec::new();
    }
    let ours = headers.into_iter().filter(|(name, _)| name.starts_with("settled-"));
    let ours = Value::Object(ours.collect());
    let mut problems = misfits("dead-letter-headers.json", &ours);
    if !problems.is_empty() {
        problems.push(ours.to_string());
    }
    problems
}

/// Headers as JSON, as the schemas speak of them.
fn as_json(properties: &BasicProperties) -> Value {
    let headers = properties.headers().as_ref();
    let members = headers.into_iter().flat_map(|table| table.inner().iter());
    members
        .map(|(name, value)| (name.as_str().to_owned(), header(value)))
        .collect::<Map<String, Value>>()
        .into()
}

fn header(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into(),
        AMQPValue::Boolean(truth) => (*truth).into(),
        AMQPValue::LongInt(number) => (*number).into(),
        AMQPValue::LongLongInt(number) => (*number).into(),
        other => format!("{other:?}").into(),
    }
}

/// The command in its arguments, where it is one that answers with `--json`.
fn command_of(arguments: &[&str]) -> Option<(&'static str, Form)> {
    let mut words = Vec::new();
    let mut rest = arguments.iter();
    while let Some(word) = rest.next() {
        match *word {
            "--config" | "--set" | "--database-url" | "--broker-url" => drop(rest.next()),
            flag if flag.starts_with("--") => {}
            word => words.push(word),
        }
    }
    let line = words.join(" ");
    let begins = |command: &str| line == command || line.starts_with(&format!("{command} "));
    let fitting = ANSWERS.into_iter().filter(|(command, _)| begins(command));
    fitting.max_by_key(|(command, _)| command.len())
}

/// Looks at what a command answered: its document or lines, or else why there is none.
pub(crate) fn answered(arguments: &[&str], output: &Output) {
    if !arguments.contains(&"--json") {
        return;
    }
    let Some((command, form)) = command_of(arguments) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    if let Ok(record) = std::env::var("SETTLED_TEST_RECORD") {
        let line = format!(
            "{}\t{:?}\t{}\n",
            command,
            output.status.code(),
            said.replace('\n', "\u{1}")
        );
        let file = std::fs::OpenOptions::new().append(true).create(true).open(record);
        std::io::Write::write_all(&mut file.expect("a record"), line.as_bytes()).expect("a line");
    }
    let read = |text: &str| serde_json::from_str::<Value>(text);
    let (file, values): (String, Vec<_>) = if said.is_empty() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        // What is said before settings are read is said to people.
        let document = complaint.lines().last().filter(|line| line.starts_with('{')).map(read);
        ("error.json".to_owned(), document.into_iter().collect())
    } else {
        match form {
            Form::Document => (file_of(command), vec![read(&said)]),
            Form::Lines => (file_of(command), said.lines().map(read).collect()),
        }
    };
    for value in values {
        let value = value.unwrap_or_else(|error| panic!("settled {command}: {error}: {said}"));
        let problems = misfits(&file, &value);
        assert!(
            problems.is_empty(),
            "settled {command}: {}\n{value}",
            problems.join("\n")
        );
    }
}
