//! Who may ask whom, and that a name means one thing: read off the sources, file by file.

use std::collections::{BTreeMap, BTreeSet};

use super::tidy::{assert_none, code, sources};

type Graph = BTreeMap<String, BTreeSet<String>>;

/// The modules of `src` by path, such as `domain::decide`, with their code.
fn modules() -> BTreeMap<String, String> {
    sources("src")
        .into_iter()
        .filter(|(name, _)| !name.ends_with("tests.rs") && !name.contains("/tests/") && !name.ends_with("testing.rs"))
        .map(|(name, text)| {
            let path = name
                .trim_start_matches("src/")
                .trim_end_matches(".rs")
                .replace('/', "::");
            let path = path.trim_end_matches("::mod").to_owned();
            (path, code(&text))
        })
        .filter(|(path, _)| path != "lib" && path != "main")
        .collect()
}

/// Every path that a `use` names, and every path that begins with `crate`, `self` or `super` elsewhere.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut words: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(|letter: char| !letter.is_whitespace()) {
        rest = &rest[at..];
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let len = match rest.chars().next() {
            Some(letter) if is_word(letter) => rest.find(|letter| !is_word(letter)).unwrap_or(rest.len()),
            Some(':') if rest.starts_with("::") => 2,
            Some(letter) => letter.len_utf8(),
            None => break,
        };
        let (word, after) = rest.split_at(len);
        words.push(word);
        rest = after;
    }
    let mut index = 0;
    while let Some(word) = words.get(index) {
        let is_root = matches!(*word, "crate" | "self" | "super") && words.get(index + 1) == Some(&"::");
        let is_use = *word == "use" && words.get(index + 1) != Some(&"<");
        if is_use {
            index = tree(&words, index + 1, "", &mut found);
        } else if is_root {
            index = tree(&words, index, "", &mut found);
        } else {
            index += 1;
        }
    }
    found
}

/// Reads `a::b::{c, d::e}`: its leaves, and where it ends.
fn tree(words: &[&str], mut index: usize, before: &str, found: &mut Vec<String>) -> usize {
    let mut path = before.to_owned();
    loop {
        match words.get(index).copied() {
            Some("{") => {
                index += 1;
                while !matches!(words.get(index).copied(), Some("}") | None) {
                    index = match words.get(index).copied() {
                        Some(",") => index + 1,
                        _ => tree(words, index, &path, found),
                    };
                }
                return index + 1;
            }
            Some(word) => {
                path = if path.is_empty() {
                    word.to_owned()
                } else {
                    format!("{path}::{word}")
                };
                index += 1;
            }
            None => return index,
        }
        if words.get(index) == Some(&"::") && !matches!(words.get(index + 1).copied(), Some("<") | None) {
            index += 1;
            continue;
        }
        found.push(path);
        if words.get(index) == Some(&"as") {
            index += 2;
        }
        return index;
    }
}

/// The module that a path names, or whose item it names.
fn resolved(me: &str, path: &str, modules: &BTreeMap<String, String>) -> Option<String> {
    let mut parts: Vec<&str> = path.split("::").collect();
    let mut base: Vec<&str> = Vec::new();
    match parts.first().copied() {
        Some("crate") => drop(parts.remove(0)),
        Some("self") => {
            base = me.split("::").collect();
            parts.remove(0);
        }
        Some("super") => {
            base = me.split("::").collect();
            while parts.first() == Some(&"super") {
                base.pop();
                parts.remove(0);
            }
        }
        Some(child) if modules.contains_key(&format!("{me}::{child}")) => base = me.split("::").collect(),
        Some(_) | None => return None,
    }
    base.extend(parts);
    (1..=base.len())
        .rev()
        .map(|len| base[..len].join("::"))
        .find(|path| modules.contains_key(path))
}

fn imports() -> Graph {
    let modules = modules();
    modules
        .iter()
        .map(|(me, text)| {
            let asked = paths(text)
                .iter()
                .filter_map(|path| resolved(me, path, &modules))
                .filter(|asked| asked != me)
                .collect();
            (me.clone(), asked)
        })
        .collect()
}

/// A way through the graph that comes back to where it began.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    fn walk(graph: &Graph, at: &str, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> Option<Vec<String>> {
        if let Some(begin) = way.iter().position(|seen| seen == at) {
            return Some(way[begin..].to_vec());
        }
        if done.contains(at) {
            return None;
        }
        way.push(at.to_owned());
        for next in graph.get(at).into_iter().flatten() {
            if let Some(circle) = walk(graph, next, way, done) {
                return Some(circle);
            }
        }
        way.pop();
        done.insert(at.to_owned());
        None
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|at| walk(graph, at, &mut Vec::new(), &mut done))
}

fn room(path: &str) -> &str {
    path.split("::").next().unwrap_or(path)
}

#[test]
fn no_file_of_the_domain_asks_one_that_asks_it() {
    let mut graph = imports();
    graph.retain(|path, _| room(path) == "domain");
    for asked in graph.values_mut() {
        asked.retain(|path| room(path) == "domain");
    }
    assert!(graph.len() > 30, "the domain is read");
    assert!(graph["domain::decide"].contains("domain::verdict"), "imports are read");
    assert_eq!(circle(&graph), None);
}

/// A room's files, and each folder in it as one: who stands at its door (`mod.rs`) asks all of them and is asked by all.
fn files_of(asking: &Graph, of: &str) -> Graph {
    let file = |path: &str| -> Option<String> {
        let mut parts = path.split("::");
        (parts.next() == Some(of))
            .then(|| parts.next().map(str::to_owned))
            .flatten()
    };
    let mut files = Graph::new();
    for (path, asked) in asking {
        if let Some(me) = file(path) {
            let others = asked.iter().filter_map(|path| file(path)).filter(|other| *other != me);
            files.entry(me.clone()).or_default().extend(others);
        }
    }
    files
}

#[test]
fn in_no_room_a_file_asks_one_that_asks_it() {
    let asking = imports();
    let rooms: BTreeSet<&str> = asking.keys().map(|path| room(path)).collect();
    let mut read = 0;
    for room in rooms {
        let files = files_of(&asking, room);
        read += files.len();
        assert_eq!(circle(&files), None, "in {room}");
    }
    assert!(read > 150, "files are read: {read}");
}

/// Who may ask whom: [the rooms](../../../docs/architecture.md#the-rooms). Who is not named may ask what lies beside.
const MAY_ASK: [(&str, &[&str]); 21] = [
    ("race", &[]),
    ("redact", &[]),
    ("sealed", &[]),
    ("domain", &[]),
    ("config", &["redact"]),
    ("plain", &[]),
    ("fail", &[]),
    ("tls", &[]),
    ("retry", &["config"]),
    ("telemetry", &["domain", "config", "plain"]),
    ("health", &["telemetry"]),
    ("http", &["config", "health", "retry", "telemetry", "tls"]),
    (
        "store",
        &["config", "domain", "fail", "race", "redact", "telemetry", "tls"],
    ),
    (
        "broker",
        &["config", "domain", "fail", "race", "redact", "telemetry", "tls"],
    ),
    ("settle", &["config", "domain", "fail", "store", "telemetry"]),
    (
        "worker",
        &[
            "broker",
            "config",
            "domain",
            "fail",
            "health",
            "http",
            "retry",
            "settle",
            "store",
            "telemetry",
        ],
    ),
    (
        "desk",
        &[
            "broker",
            "config",
            "domain",
            "plain",
            "retry",
            "settle",
            "store",
            "telemetry",
        ],
    ),
    ("partner", &["broker", "config", "domain", "retry"]),
    (
        "cli",
        &[
            "api",
            "broker",
            "config",
            "console",
            "desk",
            "domain",
            "http",
            "partner",
            "plain",
            "retry",
            "sealed",
            "settle",
            "store",
            "telemetry",
            "worker",
        ],
    ),
    (
        "api",
        &[
            "broker",
            "config",
            "desk",
            "domain",
            "health",
            "http",
            "plain",
            "retry",
            "store",
            "telemetry",
            "tls",
            "worker",
        ],
    ),
    (
        "console",
        &[
            "config",
            "desk",
            "domain",
            "http",
            "plain",
            "retry",
            "sealed",
            "telemetry",
            "tls",
            "worker",
        ],
    ),
];

#[test]
fn rooms_ask_only_whom_they_may() {
    let mut rooms = Graph::new();
    let mut found = Vec::new();
    for (path, asked) in imports() {
        let from = room(&path);
        let may = MAY_ASK.iter().find(|(room, _)| *room == from);
        let Some((_, may)) = may else {
            found.push(format!("{path} stands in no room that is known"));
            continue;
        };
        for asked in asked.iter().filter(|asked| room(asked) != from) {
            if !may.contains(&room(asked)) {
                found.push(format!("{path} asks {asked}"));
            }
            rooms.entry(from.to_owned()).or_default().insert(room(asked).to_owned());
        }
    }
    assert_none(&found, "arrows point down only");
    assert!(rooms.len() > 8, "the rooms are read: {rooms:?}");
    assert_eq!(circle(&rooms), None);
}

/// A command's arguments are named for the question that they put to the desk, so `cli` is left out.
#[test]
fn a_name_of_a_type_means_one_thing() {
    let mut meanings = BTreeMap::<String, Vec<String>>::new();
    for (path, text) in modules() {
        if room(&path) == "cli" {
            continue;
        }
        for line in text.lines().filter(|line| line.starts_with("pub")) {
            let mut words = line
                .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
                .skip(1);
            if words.any(|word| ["struct", "enum", "trait", "type"].contains(&word))
                && let Some(name) = words.next()
            {
                meanings.entry(name.to_owned()).or_default().push(path.clone());
            }
        }
    }
    assert!(meanings.len() > 150, "types are read: {}", meanings.len());
    let found: Vec<String> = meanings
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("{name}: {}", places.join(", ")))
        .collect();
    assert_none(&found, "one word, one meaning: docs/architecture.md");
}

#[test]
fn imports_are_read_as_rust_reads_them() {
    let text = "use a::{self, b::{c, d as e}, f}; pub use self::g::*; fn x() { crate::h::i::<u8>(super::j::K) }";
    assert_eq!(
        paths(text),
        [
            "a::self",
            "a::b::c",
            "a::b::d",
            "a::f",
            "self::g::*",
            "crate::h::i",
            "super::j::K"
        ]
    );
    let edges = |edges: &[(&str, &str)]| {
        let mut graph = Graph::new();
        for (from, to) in edges {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        graph
    };
    assert_eq!(circle(&edges(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    let circle = circle(&edges(&[("a", "b"), ("b", "c"), ("c", "b")])).expect("a circle");
    assert_eq!(circle, ["b", "c"]);
}
