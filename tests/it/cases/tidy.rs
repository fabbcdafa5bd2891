//! The walls of the house.

use std::{collections::BTreeSet, path::Path};

use clap::CommandFactory;
use settled::cli::Cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file under a directory, by its path from the root.
pub(super) fn sources(directory: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("inside").display().to_string();
                found.push((name, std::fs::read_to_string(&path).expect("UTF-8")));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing in {directory}");
    found
}

/// The code without its comments, for what a comment names, it may explain; without its tests; and without the lines that
/// silence a dependency's own log.
pub(super) fn code(text: &str) -> String {
    let tests = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    text.split_at(tests)
        .0
        .lines()
        .filter(|line| !line.trim_start().starts_with(".with_target("))
        .map(|line| {
            line.split_once("//")
                .map_or(line, |(before, _)| if before.ends_with(':') { line } else { before })
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// Whether a word stands in the text with nothing of a name around it.
fn names(text: &str, word: &str) -> bool {
    let is_name = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let bytes = text.as_bytes();
    text.match_indices(word).any(|(at, _)| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        !is_name(before) && !is_name(bytes.get(at + word.len()))
    })
}

/// The files outside of `rooms` that name one of the words.
fn trespassers(words: &[&str], rooms: &[&str]) -> Vec<String> {
    found_in("src", words, |file| !rooms.iter().any(|room| file.starts_with(room)))
}

/// The files of a folder that name one of the words.
fn named_in(folder: &str, words: &[&str]) -> Vec<String> {
    found_in(folder, words, |_| true)
}

fn found_in(folder: &str, words: &[&str], counts: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (name, text) in sources(folder).into_iter().filter(|(name, _)| counts(name)) {
        let text = code(&text);
        found.extend(
            words
                .iter()
                .filter(|word| names(&text, word))
                .map(|word| format!("{name} names {word}")),
        );
    }
    found
}

pub(super) fn assert_none(found: &[String], why: &str) {
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

#[test]
fn the_domain_does_no_io_and_knows_no_time() {
    let words = [
        "tokio",
        "lapin",
        "tokio_postgres",
        "SystemTime",
        "Instant",
        "async fn",
        "tracing",
        "metrics",
        "std::env",
        "std::fs",
        "Timestamp::now",
    ];
    let found = named_in("src/domain", &words);
    assert_none(&found, "src/domain is pure");
}

#[test]
fn sql_stands_only_in_the_store() {
    let words = [
        "tokio_postgres",
        "deadpool_postgres",
        "refinery",
        "SELECT",
        "INSERT INTO",
        "DELETE FROM",
    ];
    assert_none(&trespassers(&words, &["src/store/"]), "SQL belongs to src/store");
}

#[test]
fn lapin_stands_only_in_the_broker() {
    assert_none(
        // These tests say what of its log is left out.
        &trespassers(&["lapin"], &["src/broker/", "src/telemetry/tests.rs"]),
        "lapin belongs to src/broker",
    );
}

#[test]
fn backoff_stands_only_in_retry() {
    let uses = [
        "backoff::ExponentialBackoff",
        "backoff::backoff",
        "::backoff",
        "use backoff",
        "ExponentialBackoff",
    ];
    assert_none(
        &trespassers(&uses, &["src/retry.rs"]),
        "the backoff crate is replaceable in src/retry.rs",
    );
}

#[test]
fn signals_are_said_only_in_telemetry() {
    let words = [
        "tracing",
        "metrics_exporter_prometheus",
        "counter!",
        "gauge!",
        "histogram!",
        "trace!",
        "debug!",
        "info!",
        "warn!",
        "error!",
    ];
    let mut found = trespassers(&words, &["src/telemetry/"]);
    // The handle that `/metrics` is answered from is a value like another.
    found.retain(|found| found != "src/http.rs names metrics_exporter_prometheus");
    // Its tests need something to answer with.
    found.retain(|found| !found.starts_with("src/http/tests.rs names "));
    assert_none(&found, "logs and metrics are types in src/telemetry");
}

/// A room says what happened; that there are traces is nobody's business but telemetry's.
#[test]
fn opentelemetry_stands_only_in_telemetry() {
    let words = [
        "opentelemetry",
        "opentelemetry_sdk",
        "opentelemetry_otlp",
        "opentelemetry_http",
    ];
    assert_none(
        &trespassers(&words, &["src/telemetry/"]),
        "spans are signals of src/telemetry",
    );
}

/// What an operator may do is at the desk, for whoever asks: a command line, a console, an API.
#[test]
fn the_desk_reads_no_arguments_and_prints_nothing() {
    let words = [
        "clap",
        "cli",
        "comfy_table",
        "indicatif",
        "println!",
        "eprintln!",
        "print!",
        "eprint!",
        "stdin",
        "stdout",
        "stderr",
    ];
    let found = named_in("src/desk", &words);
    assert_none(&found, "src/desk is typed questions and typed answers");
}

/// The command line's way to the database is the desk. Who goes past it, and why: the list only shrinks.
#[test]
fn the_command_line_asks_the_desk() {
    let past_it = [
        ("src/cli/allocation.rs", "reserves, as a stream"),
        ("src/cli/dead_letters/collect.rs", "runs the worker's collector"),
        ("src/cli/demo.rs", "makes the databases of a demo"),
        ("src/cli/doctor/broker.rs", "examines the server itself"),
        ("src/cli/doctor/database.rs", "examines the server itself"),
        ("src/cli/failure.rs", "an error of those here as an exit code"),
        ("src/cli/mod.rs", "opens the store for those here"),
        ("src/cli/registry.rs", "registers"),
        ("src/cli/registry/connection.rs", "registers"),
        ("src/cli/registry/key.rs", "registers"),
        ("src/cli/registry/partner.rs", "registers"),
        ("src/cli/setup.rs", "migrates"),
        ("src/cli/simulate.rs", "registers and reserves what it simulates"),
        ("src/cli/simulate/drive.rs", "registers and reserves what it simulates"),
    ];
    let goes_past = |text: &str| {
        text.contains("store::") || names(text, "Store") || names(text, "StoreError") || text.contains("crate::store")
    };
    let found: BTreeSet<String> = sources("src/cli")
        .into_iter()
        .filter(|(_, text)| goes_past(&code(text)))
        .map(|(name, _)| name)
        .collect();
    let listed: BTreeSet<String> = past_it.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(
        found, listed,
        "ask src/desk; whoever needs the store no more is struck off"
    );
}

/// The API is a neighbour of the command line: it asks the desk and speaks with the broker, and knows nothing of the store. Nobody
/// below knows of it.
#[test]
fn the_api_asks_the_desk() {
    let words = [
        "crate::store",
        "store::",
        "Store",
        "StoreError",
        "clap",
        "cli",
        "settle",
        "println!",
        "eprintln!",
    ];
    for (name, text) in sources("src/api") {
        assert!(text.lines().count() < 600, "{name} is too long");
    }
    let found = named_in("src/api", &words);
    assert_none(&found, "src/api asks src/desk");
    let mut found = trespassers(&["crate::api", "api::run"], &["src/api/", "src/cli/"]);
    found.extend(trespassers(
        &["tokio_rustls"],
        &["src/api/", "src/console/", "src/http/", "src/store/", "src/broker/"],
    ));
    assert_none(&found, "only the command line starts the API");
}

/// So does the console: it knows nothing of the store, of SQL or of the broker, and what it shows is markup of templates.
#[test]
fn the_console_asks_the_desk() {
    let words = [
        "crate::store",
        "store::",
        "Store",
        "StoreError",
        "crate::broker",
        "crate::settle",
        "clap",
        "cli",
        "println!",
        "eprintln!",
    ];
    for (name, text) in sources("src/console") {
        assert!(text.lines().count() < 600, "{name} is too long");
    }
    assert_none(&named_in("src/console", &words), "src/console asks src/desk");
    let found = trespassers(&["crate::console", "console::run"], &["src/console/", "src/cli/"]);
    assert_none(&found, "only the command line starts the console");
    // Nothing of a template is taken as it is, no script or style stands in a page, and nothing comes from elsewhere.
    let templates = root().join("src/console/templates");
    let mut read = 0;
    for entry in std::fs::read_dir(templates).expect("templates") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        read += 1;
        for word in [
            "|safe",
            "| safe",
            "style=",
            "<style",
            "javascript:",
            " onclick",
            "http://",
            "https://",
            "//cdn",
        ] {
            assert!(!text.contains(word), "{} has {word:?}", path.display());
        }
        let scripts = text.matches("<script").count();
        assert_eq!(scripts, text.matches("<script src=\"{{").count(), "{}", path.display());
    }
    assert!(read > 20, "templates are read: {read}");
}

#[test]
fn files_are_named_for_what_they_are_about() {
    let vague = [
        "utils", "util", "helpers", "helper", "types", "common", "manager", "misc",
    ];
    let is_vague = |name: &str| {
        Path::new(name).iter().any(|part| {
            let part = part.to_string_lossy();
            vague.contains(&part.trim_end_matches(".rs"))
        })
    };
    let found: Vec<String> = ["src", "tests", "benches"]
        .into_iter()
        .flat_map(sources)
        .map(|(name, _)| name)
        .filter(|name| is_vague(name))
        .collect();
    assert_none(&found, "a file is named for what it is about");
}

#[test]
fn the_auditor_asks_the_domain_nothing() {
    let rooms = [
        "tests/it/kit/auditor",
        "tests/it/kit/partner.rs",
        "tests/it/kit/traffic.rs",
    ];
    let mut read = 0;
    for (name, text) in sources("tests/it") {
        if rooms.iter().any(|room| name.starts_with(room)) {
            read += 1;
            for word in ["settled::", "domain"] {
                assert!(!code(&text).contains(word), "{name} names {word}");
            }
        }
    }
    assert!(read > rooms.len(), "the auditor has rooms of its own");
}

/// A fail point in a release would let its environment kill it.
#[test]
fn fail_points_stay_out_of_releases() {
    let read = |name: &str| std::fs::read_to_string(root().join(name)).expect(name);
    let manifest: toml::Table = read("Cargo.toml").parse().expect("TOML");
    let features = manifest["features"].as_table().expect("features");
    assert!(
        !features.contains_key("default"),
        "no feature is on that was not asked for"
    );
    for name in ["Makefile", "Dockerfile", "dev/services"] {
        let text = read(name);
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("cargo build") || line.contains("cargo install"))
            .filter(|line| line.contains("features"))
            .collect();
        assert!(lines.is_empty(), "{name}: {lines:?}");
    }
    // What reads the environment, and acts, is one module that the feature switches on.
    let text = code(&read("src/fail.rs"));
    let (before, armed) = text
        .split_once("#[cfg(feature = \"faults\")]\nmod armed {")
        .expect("the module is switched");
    assert!(!names(before, "env") && armed.contains("std::env::var(\"SETTLED_FAULT\")"));
    let (_, after) = armed.split_once("\n}\n").unwrap_or((armed, ""));
    assert!(!names(after, "env"), "nothing comes after it");
    assert_none(
        &trespassers(&["SETTLED_FAULT"], &["src/fail.rs", "src/config/tests.rs"]),
        "SETTLED_FAULT is read in src/fail.rs",
    );
}

#[test]
fn the_reference_asks_the_program_nothing() {
    let text = std::fs::read_to_string(root().join("tests/model/reference.rs")).expect("the reference");
    for word in ["settled::", "domain", "crate::", "super::"] {
        assert!(!code(&text).contains(word), "tests/model/reference.rs names {word}");
    }
}

#[test]
fn no_commented_word_is_taken_for_code() {
    assert!(names("use lapin::Channel;", "lapin"));
    assert!(!names("let lapins = 1;", "lapin"));
    assert!(!names(&code("// lapin does this"), "lapin"));
    assert!(code("let url = \"http://x\";").contains("http://x"));
}

/// Every act that is written down can be asked for by its name: `settled audit list` knows it, and its help names it.
#[test]
fn every_act_is_in_the_list_of_acts() {
    let mut written: BTreeSet<String> = BTreeSet::new();
    for directory in ["src/desk", "src/store"] {
        for (_, text) in sources(directory) {
            let text: String = code(&text).split_whitespace().collect::<Vec<_>>().join(" ");
            // An act of the desk, a note of the store, and an act with all its fields.
            for before in [".act(\"", "by, \"", "Act { name: \""] {
                let found = text.split(before).skip(1).filter_map(|rest| rest.split('"').next());
                written.extend(found.map(str::to_owned));
            }
        }
    }
    assert!(
        written.contains("plan approve") && written.contains("key add"),
        "{written:?}"
    );
    // These are chosen by what is done.
    written.extend(
        [
            "deposit",
            "withdraw",
            "discard",
            "restore",
            "recover",
            "recover propose",
        ]
        .map(str::to_owned),
    );
    let known: BTreeSet<String> = settled::store::audit::ACTS.map(str::to_owned).into();
    assert_eq!(written, known);
    let help = Cli::command()
        .find_subcommand_mut("audit")
        .and_then(|audit| audit.find_subcommand_mut("list"))
        .expect("settled audit list")
        .render_long_help()
        .to_string();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for act in known {
        assert!(
            help.contains(&format!(" {act},")) || help.contains(&format!(" {act} ")),
            "{act}: {help}"
        );
    }
}
