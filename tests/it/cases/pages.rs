//! README and the pages in docs/ name only what exists, and what exists stands on a page: commands, flags, settings, reasons,
//! event types, headers, exit codes, tables, files, make's targets and links. `metrics` looks at metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use clap::CommandFactory;
use settled::{cli::Cli, domain::decide::Reason};

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    support::{PATIENCE, Place, said, settled, skip, until},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What people read, by path. The changelog tells of what was, and is not held to what is.
fn pages() -> Vec<(String, String)> {
    let fixed = [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "benches/README.md",
        "docs/evidence/README.md",
    ];
    let mut paths: Vec<String> = fixed.map(str::to_owned).into();
    for entry in std::fs::read_dir(root().join("docs")).expect("docs") {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        if name.ends_with(".md") {
            paths.push(format!("docs/{name}"));
        }
    }
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

fn everything() -> String {
    pages().into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n")
}

/// A page's lines, each with whether it stands in a fenced block, and of what kind.
fn lines(text: &str) -> Vec<(Option<&str>, &str)> {
    let mut fence = None;
    let mut lines = Vec::new();
    for line in text.lines() {
        match (fence, line.trim_start().strip_prefix("```")) {
            (None, Some(kind)) => fence = Some(kind),
            (Some(_), Some(_)) => fence = None,
            (_, None) => lines.push((fence, line)),
        }
    }
    lines
}

/// The code spans of a line.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Every code span of a page, outside its fenced blocks.
fn code(text: &str) -> Vec<&str> {
    lines(text)
        .into_iter()
        .filter(|(fence, _)| fence.is_none())
        .flat_map(|(_, line)| spans(line))
        .collect()
}

/// Every file of Rust and SQL below a directory, in one text, but for tests that stand in files of their own.
fn sources(directory: &str) -> String {
    let mut found = String::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "rs" || extension == "sql")
                && !path.ends_with("tests.rs")
            {
                found.push_str(&std::fs::read_to_string(&path).expect("UTF-8"));
            }
        }
    }
    found
}

/// The words of a text that begin with `prefix` and go on with characters of a name.
fn words(text: &str, prefix: &str, is_name: impl Fn(char) -> bool) -> BTreeSet<String> {
    text.match_indices(prefix)
        .filter(|(at, _)| {
            !text[..*at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == '-')
        })
        .map(|(at, _)| {
            let rest = &text[at + prefix.len()..];
            let end = rest.find(|letter| !is_name(letter)).unwrap_or(rest.len());
            format!("{prefix}{}", &rest[..end])
        })
        .collect()
}

fn none(found: Vec<String>, why: &str) {
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

/// A command with everything below it, by path: `dead-letters runs list`. With the flags of each.
fn commands() -> BTreeMap<String, BTreeSet<String>> {
    fn add(command: &clap::Command, path: &str, found: &mut BTreeMap<String, BTreeSet<String>>) {
        let flags = command
            .get_arguments()
            .filter_map(clap::Arg::get_long)
            .map(|flag| format!("--{flag}"));
        found.insert(path.to_owned(), flags.collect());
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            add(inner, format!("{path} {}", inner.get_name()).trim_start(), found);
        }
    }
    let mut cli = Cli::command();
    // Makes the flags of every command known to those below it.
    cli.build();
    let mut found = BTreeMap::new();
    add(&cli, "", &mut found);
    found
}

/// What somebody types after `settled`: the command, and its flags.
fn typed(text: &str, commands: &BTreeMap<String, BTreeSet<String>>) -> Result<(String, Vec<String>), String> {
    let mut path = String::new();
    let mut flags = Vec::new();
    let mut in_path = true;
    for word in text.split_whitespace() {
        if word == "help" && path.is_empty() {
            return Ok((String::new(), Vec::new()));
        }
        if let Some(flag) = word.strip_prefix("--") {
            in_path = false;
            let name = flag.split(['=', ']', ',']).next().unwrap_or_default();
            flags.push(format!("--{name}"));
        } else if ["|", "&&", ">", "<", "\\"].contains(&word) {
            break;
        } else if in_path {
            let longer = format!("{path} {word}");
            let longer = longer.trim_start();
            if commands.contains_key(longer) {
                path = longer.to_owned();
            } else {
                let has_inner = commands.keys().any(|known| known.starts_with(&format!("{path} ")));
                if path.is_empty() || has_inner {
                    return Err(format!("there is no `settled {longer}`"));
                }
                in_path = false;
            }
        }
    }
    Ok((path, flags))
}

/// What a page has one type: code spans that begin with `settled `, and lines of its blocks.
fn typed_lines(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut before = String::new();
    for (fence, line) in lines(text) {
        match fence {
            None => {
                // The second is what the id of a dead letter is hashed with.
                let typed = spans(line).filter(|code| code.starts_with("settled ") && *code != "settled dead letter 2");
                found.extend(typed.map(str::to_owned));
            }
            Some(_) => {
                let line = format!("{before}{}", line.trim().trim_start_matches("$ "));
                before.clear();
                if let Some(line) = line.strip_suffix('\\') {
                    before = line.to_owned();
                    continue;
                }
                let parts = line.split("&& ").flat_map(|part| part.split("| "));
                found.extend(
                    parts
                        .map(str::trim)
                        .filter(|part| part.starts_with("settled ") && fence == Some("console"))
                        .map(str::to_owned),
                );
            }
        }
    }
    found
}

#[test]
fn every_command_and_flag_named_exists() {
    let commands = commands();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in pages() {
        for line in typed_lines(&text) {
            seen += 1;
            // `settled ledger balances`, `check` in a table: what is said of both.
            match typed(line.trim_start_matches("settled "), &commands) {
                Err(why) => wrong.push(format!("{path}: {why}")),
                Ok((command, flags)) => {
                    let known = &commands[&command];
                    for flag in flags.iter().filter(|flag| !known.contains(*flag) && *flag != "--help") {
                        wrong.push(format!("{path}: `settled {command}` has no {flag}"));
                    }
                }
            }
        }
        let all: BTreeSet<&String> = commands.values().flatten().collect();
        for flag in code(&text).into_iter().filter(|code| code.starts_with("--")) {
            let name = flag.split([' ', '=']).next().unwrap_or_default().to_owned();
            if !all.contains(&name) && name != "--features" {
                wrong.push(format!("{path}: no command has {name}"));
            }
        }
    }
    assert!(seen > 50, "the pages name commands: {seen}");
    none(wrong, "the pages name what is not there");
}

/// The commands that a page names, also those that a line names after others of their kind: `settled partner add`, `list`.
fn commands_named(commands: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (_, text) in pages() {
        for line in typed_lines(&text) {
            if let Ok((command, _)) = typed(line.trim_start_matches("settled "), commands) {
                named.insert(command);
            }
        }
        for (_, line) in lines(&text).into_iter().filter(|(fence, _)| fence.is_none()) {
            let mut outer = String::new();
            for span in spans(line) {
                if let Some(rest) = span.strip_prefix("settled ") {
                    let path = typed(rest, commands).map(|(path, _)| path).unwrap_or_default();
                    outer = path
                        .rsplit_once(' ')
                        .map_or(String::new(), |(outer, _)| outer.to_owned());
                } else {
                    named.insert(format!("{outer} {span}").trim_start().to_owned());
                }
            }
        }
    }
    named
}

#[test]
fn every_command_and_flag_is_on_a_page() {
    let commands = commands();
    let named = commands_named(&commands);
    let text = everything();
    let mut missing = Vec::new();
    for (command, flags) in &commands {
        let is_leaf = !commands.keys().any(|other| other.starts_with(&format!("{command} ")));
        if is_leaf && !named.contains(command) {
            missing.push(format!("`settled {command}`"));
        }
        for flag in flags
            .iter()
            .filter(|flag| !["--help", "--version"].contains(&flag.as_str()))
        {
            if !words(&text, flag, |letter| letter.is_ascii_alphanumeric() || letter == '-').contains(flag) {
                missing.push(format!("{flag} of `settled {command}`"));
            }
        }
    }
    none(missing, "no page tells of");
}

/// Settings by room; what stands outside of the rooms by itself.
fn settings() -> toml::Table {
    settled::config::DEFAULTS.parse().expect("TOML")
}

#[test]
fn every_setting_named_exists() {
    let settings = settings();
    let is_one = |name: &str| match name.split_once('.') {
        Some((room, name)) => settings.get(room).and_then(|room| room.as_table()?.get(name)).is_some(),
        None => settings.contains_key(name),
    };
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in pages() {
        for code in code(&text) {
            let name = code.split([' ', '=']).next().unwrap_or_default();
            let is_name = name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte == b'.');
            let is_of_a_room = name
                .split_once('.')
                .is_some_and(|(room, _)| settings.get(room).is_some_and(toml::Value::is_table));
            if is_name && is_of_a_room {
                seen += 1;
                if !is_one(name) {
                    wrong.push(format!("{path}: {name} is no setting"));
                }
            }
        }
        // In the environment: SETTLED_PARK__DEADLINE.
        for name in words(&text, "SETTLED_", |letter| letter.is_ascii_uppercase() || letter == '_') {
            let key = name.trim_start_matches("SETTLED_").replace("__", ".").to_lowercase();
            let urls = [
                "database_url",
                "broker_url",
                "database_url_file",
                "broker_url_file",
                "a.b",
            ];
            let of_tools = ["postgres_password", "broker_password", "broker_management_url"];
            if !is_one(&key) && ![&urls[..], &of_tools[..]].concat().contains(&key.as_str()) {
                wrong.push(format!("{path}: {name} sets nothing"));
            }
        }
    }
    assert!(seen > 20, "the pages name settings: {seen}");
    none(wrong, "the pages name what is not there");
}

/// `config/default.toml` is the page of the settings: a comment stands above each, or above the line before it.
#[test]
fn every_setting_is_explained() {
    let mut bare = Vec::new();
    let mut is_explained = false;
    for line in settled::config::DEFAULTS.lines() {
        if line.starts_with('#') {
            is_explained = true;
        } else if line.trim().is_empty() || line.starts_with('[') {
            is_explained = false;
        } else if !is_explained {
            bare.push(line.to_owned());
        } else {
            is_explained = false;
        }
    }
    none(bare, "no comment stands above");
}

#[test]
fn every_reason_is_told_to_partners_and_operators() {
    let (partners, letters) = (read("docs/partners.md"), read("docs/dead-letters.md"));
    for reason in Reason::ALL {
        assert!(partners.contains(&format!("`{reason}`")), "docs/partners.md: {reason}");
        assert!(
            letters.contains(&format!("| `{reason}` |")),
            "docs/dead-letters.md: {reason}"
        );
    }
    let told = format!("one of {} reasons", Reason::ALL.len());
    assert!(read("README.md").contains(&told), "README.md does not say: {told}");
}

#[test]
fn event_types_named_exist_and_every_one_is_told() {
    const TYPES: [&str; 6] = [
        "allocation.cleared",
        "allocation.released",
        "deallocation.cleared",
        "deallocation.released",
        "update.parked",
        "update.rejected",
    ];
    let code_of_types = sources("src/domain");
    let subscribers = read("docs/subscribers.md");
    for kind in TYPES {
        assert!(
            code_of_types.contains(&format!("\"{kind}\"")),
            "{kind} is no type any more"
        );
        assert!(
            subscribers.contains(&format!("| `{kind}` |")),
            "docs/subscribers.md: {kind}"
        );
    }
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        for code in code(&text) {
            let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
            if let Some((first, second)) = code.split_once('.')
                && ["allocation", "deallocation", "update"].contains(&first)
                && is_word(second)
                && !TYPES.contains(&code)
            {
                wrong.push(format!("{path}: {code} is no type"));
            }
        }
    }
    none(wrong, "the pages name what is not there");
}

#[test]
fn headers_named_exist_and_every_one_is_told() {
    let is_name = |letter: char| letter.is_ascii_lowercase() || letter == '-';
    let in_code: BTreeSet<String> = words(&sources("src/domain"), "settled-", is_name)
        .into_iter()
        .filter(|name| name.len() > "settled-".len())
        .collect();
    let (operators, subscribers) = (read("docs/operators.md"), read("docs/subscribers.md"));
    let missing = in_code.iter().filter(|name| {
        ![&operators, &subscribers]
            .iter()
            .any(|page| page.contains(&format!("`{name}`")))
    });
    none(missing.cloned().collect(), "no page tells of the header");
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let named = code(&text)
            .into_iter()
            .flat_map(|code| words(code, "settled-", is_name));
        wrong.extend(
            named
                .filter(|name| !in_code.contains(name) && name != "settled-")
                .map(|name| format!("{path}: {name} is no header")),
        );
    }
    none(wrong, "the pages name what is not there");
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let help = Cli::command()
        .get_after_help()
        .expect("it tells exit codes")
        .to_string();
    let numbers = |text: &str| -> BTreeSet<u8> {
        text.split(|letter: char| !letter.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect()
    };
    let operators = read("docs/operators.md");
    let (_, table) = operators.split_once("| exit code | meaning |").expect("the table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    let told: BTreeSet<u8> = rows
        .filter_map(|row| row.trim_start_matches("| ").split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(told, numbers(&help), "{help}");
}

/// `settled.held` and the like: tables and functions of the schema.
#[test]
fn tables_and_functions_named_exist() {
    let schema = sources("src/store/schema");
    let is_name = |letter: char| letter.is_ascii_lowercase() || letter == '_';
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in pages() {
        for name in words(&text, "settled.", is_name) {
            let is_there = schema.contains(&format!("{name} ")) || schema.contains(&format!("{name}("));
            let is_word = name.len() > "settled.".len() && name != "settled.refinery_schema_history";
            seen += usize::from(is_word);
            if is_word && !is_there {
                wrong.push(format!("{path}: the schema has no {name}"));
            }
        }
    }
    assert!(seen > 5, "the pages name tables");
    none(wrong, "the pages name what is not there");
}

#[test]
fn files_and_targets_named_exist() {
    let makefile = read("Makefile");
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter(|line| line.starts_with(|letter: char| letter.is_ascii_lowercase()) && line.contains("## "))
        .filter_map(|line| line.split(':').next())
        .collect();
    assert!(targets.len() > 10, "{targets:?}");
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let mut commands: Vec<&str> = code(&text);
        commands.extend(
            lines(&text)
                .into_iter()
                .filter(|(fence, _)| *fence == Some("console"))
                .map(|(_, line)| line.trim_start_matches("$ ")),
        );
        for code in commands {
            let mut words = code.split_whitespace();
            let first = words.next().unwrap_or_default();
            if first == "make"
                && let Some(target) = words.next()
                && !targets.contains(target)
            {
                wrong.push(format!("{path}: make has no {target}"));
            }
            let is_path = [
                "src/",
                "tests/",
                "docs/",
                "config/",
                "dev/",
                "benches/",
                "examples/",
                "findings/",
                ".ci/",
            ]
            .iter()
            .any(|room| first.starts_with(room))
                && !first.contains('*');
            if is_path && !root().join(first).exists() {
                wrong.push(format!("{path}: there is no {first}"));
            }
        }
    }
    none(wrong, "the pages name what is not there");
    let development = read("docs/development.md");
    let performance = read("docs/performance.md");
    let missing: Vec<String> = targets
        .into_iter()
        .filter(|target| !["services", "services-down", "clean", "help"].contains(target))
        .filter(|target| {
            ![&development, &performance]
                .iter()
                .any(|page| page.contains(&format!("make {target}")))
        })
        .map(str::to_owned)
        .collect();
    none(missing, "docs/development.md does not tell of make");
}

/// The name that a forge gives to a heading.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter_map(|letter| match letter {
            ' ' => Some('-'),
            '-' | '_' => Some(letter),
            letter if letter.is_alphanumeric() => Some(letter),
            _ => None,
        })
        .collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let headings = lines(text)
        .into_iter()
        .filter(|(fence, line)| fence.is_none() && line.starts_with('#'));
    headings.map(|(_, line)| anchor(line)).collect()
}

/// The targets of a text's links and pictures.
fn links(text: &str) -> Vec<&str> {
    lines(text)
        .into_iter()
        .filter(|(fence, _)| fence.is_none())
        .flat_map(|(_, line)| line.split("](").skip(1))
        .filter_map(|rest| rest.split(')').next())
        .collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    let mut followed = 0;
    let mut all = pages();
    all.push(("CHANGELOG.md".to_owned(), read("CHANGELOG.md")));
    for (path, text) in &all {
        for link in links(text) {
            followed += 1;
            let (file, heading) = link
                .split_once('#')
                .map_or((link, None), |(file, heading)| (file, Some(heading)));
            if file.starts_with("http") {
                wrong.push(format!("{path}: {link}: nobody here can follow it"));
                continue;
            }
            let target = match file {
                "" => root().join(path),
                file => root().join(path).parent().expect("a directory").join(file),
            };
            if !target.exists() {
                wrong.push(format!("{path}: {link}"));
            } else if let Some(heading) = heading {
                let text = std::fs::read_to_string(&target).expect("a page");
                if !anchors(&text).contains(heading) {
                    wrong.push(format!("{path}: {link}: there is no such heading"));
                }
            }
        }
    }
    assert!(followed > 60, "{followed} links");
    none(wrong, "links that lead nowhere");
}

/// From README one comes to every page, and from every page back.
#[test]
fn every_page_is_reached() {
    let pages: BTreeMap<PathBuf, String> = pages()
        .into_iter()
        .map(|(path, text)| (root().join(path).canonicalize().expect("a page"), text))
        .collect();
    let readme = root().join("README.md").canonicalize().expect("README");
    let onward = |path: &Path| -> Vec<PathBuf> {
        let targets = links(&pages[path])
            .into_iter()
            .map(|link| link.split('#').next().unwrap_or_default().to_owned());
        targets
            .filter_map(|file| path.parent()?.join(file).canonicalize().ok())
            .filter(|target| pages.contains_key(target))
            .collect()
    };
    let mut reached = BTreeSet::from([readme.clone()]);
    let mut next = vec![readme.clone()];
    while let Some(path) = next.pop() {
        for target in onward(&path) {
            if reached.insert(target.clone()) {
                next.push(target);
            }
        }
    }
    let lost = pages.keys().filter(|path| !reached.contains(*path));
    none(
        lost.map(|path| path.display().to_string()).collect(),
        "no link leads to",
    );
    let stuck = pages
        .keys()
        .filter(|path| path.parent().is_some_and(|parent| parent.ends_with("docs")))
        .filter(|path| !onward(path).contains(&readme));
    none(
        stuck.map(|path| path.display().to_string()).collect(),
        "no link leads back to README from",
    );
}

/// A page that nobody reads to its end helps nobody.
#[test]
fn no_page_is_too_long() {
    let long = pages().into_iter().filter(|(_, text)| text.lines().count() > 600);
    none(long.map(|(path, _)| path).collect(), "more than 600 lines");
    let readme = read("README.md").lines().count();
    assert!(readme < 130, "README has {readme} lines, and should be two screens");
}

/// What a line of `doctor` is called in the table is what it is called.
#[test]
fn the_lines_of_doctor_are_those_of_the_page() {
    let operators = read("docs/operators.md");
    let (_, table) = operators.split_once("\n## Doctor, line by line").expect("the heading");
    let table = table.split("\n## ").next().unwrap_or_default();
    let code = sources("src");
    let mut seen = 0;
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        for name in spans(row.split(" | ").next().unwrap_or_default()) {
            seen += 1;
            let stem = name.trim_end_matches(" ...");
            let is_there = code.contains(&format!("\"{stem}\"")) || code.contains(&format!("\"{stem} "));
            assert!(is_there, "doctor has no line {name}");
        }
    }
    assert!(seen > 15, "{seen} lines");
}

/// The SQL blocks of a page.
fn sql_of(page: &str) -> String {
    let text = read(page);
    let blocks: Vec<&str> = lines(&text)
        .into_iter()
        .filter(|(fence, line)| *fence == Some("sql") && !line.starts_with("CREATE ROLE"))
        .map(|(_, line)| line)
        .collect();
    blocks.join("\n")
}

/// The grants of the operators' page are what the worker needs, and no more is said to be missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grants_of_the_page_are_enough_for_a_worker() {
    let place = Place::new("pages_worker_rights").await;
    let db = place.db().await;
    let role = format!("{}_worker", place.name);
    let sql = sql_of("docs/operators.md").replace("TO worker;", &format!("TO {role};"));
    assert!(sql.matches(&role).count() > 5, "{sql}");
    db.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'; {sql}"))
        .await
        .expect("granted");
    let (before, after) = place.database_url.split_once("://").expect("a URL");
    let (_, after) = after.split_once('@').expect("a user");
    let url = format!("{before}://{role}:secret@{after}");
    let output = settled()
        .args(["doctor", "--json"])
        .env("SETTLED_DATABASE_URL", &url)
        .env("SETTLED_BROKER_URL", &place.broker_url)
        .output()
        .await
        .expect("doctor runs");
    let text = said(&output);
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let wrong: Vec<&str> = found["checks"]
        .as_array()
        .unwrap_or_else(|| panic!("{text}"))
        .iter()
        .filter(|check| check["ok"] == false)
        .filter_map(|check| check["name"].as_str())
        .collect();
    // The place has no topology of its own making to look at here: rights on the broker are not this page's block.
    let of_the_database = [
        "schema",
        "append_only",
        "grants",
        "ownership",
        "rehearsal",
        "outbox",
        "held",
        "keys",
    ];
    let wrong: Vec<&&str> = wrong.iter().filter(|name| of_the_database.contains(*name)).collect();
    assert!(wrong.is_empty(), "{wrong:?}: {text}");
    db.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("gone");
}

/// The SQL of the custody page, with the rights that it says are needed and no others.
#[tokio::test]
async fn the_custody_page_works_as_it_is_written() {
    let place = Place::new("pages_custody").await;
    let db = place.db().await;
    let role = format!("{}_custody", place.name);
    let page = sql_of("docs/custody.md");
    let (call, grants) = page.split_once("GRANT USAGE").expect("a call and its grants");
    let grants = format!("GRANT USAGE{}", grants.replace("TO custody;", &format!("TO {role};")));
    let connection = "INSERT INTO settled.partners (enterprise_id, name) VALUES ('northwind', 'Northwind');
        INSERT INTO settled.connections
            (connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id)
        VALUES ('632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7', 'northwind', '9838fce3-c125-4af8-a775-a389f5ac26bf', 'cust-42', 'conn-7')";
    db.batch_execute(&format!("{connection}; CREATE ROLE {role}; {grants}; SET ROLE {role}"))
        .await
        .expect("granted");
    let client = "'9838fce3-c125-4af8-a775-a389f5ac26bf'";
    let sql = format!("SELECT settled.deposit({client}, 'BTC', 250000000, 'deposit-1')");
    let result: String = db.query_one(&sql, &[]).await.expect("a deposit").get(0);
    assert_eq!(result, "deposited");
    for expected in ["reserved", "exists"] {
        let row = db
            .query_one(call.trim().trim_end_matches(';'), &[])
            .await
            .expect("a row");
        assert_eq!(row.get::<_, String>("result"), expected);
    }
    // What is added is never changed.
    for statement in [
        "UPDATE settled.entries SET transfer_id = transfer_id",
        "DELETE FROM settled.transfers",
    ] {
        let error = db.batch_execute(statement).await.expect_err(statement);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{error}");
    }
    db.batch_execute(&format!("RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("gone");
}

/// The lines of a page's `console` blocks below a heading, without the prompt; a line that goes on is one.
fn console(page: &str, heading: &str) -> Vec<String> {
    let text = read(page);
    let (_, section) = text.split_once(heading).unwrap_or_else(|| panic!("{page}: {heading}"));
    let section = section.split("\n## ").next().unwrap_or_default().replace("\\\n", " ");
    lines(&section)
        .into_iter()
        .filter(|(fence, _)| *fence == Some("console"))
        .filter_map(|(_, line)| Some(line.strip_prefix("$ ")?.to_owned()))
        .collect()
}

/// What three pages have one type, from the first partner to the outcome: start, deposit, reserve, explain, publish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_are_typed_from_start_to_settled() {
    let place = Place::new("pages_story").await;
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_settled"));
    let path = format!(
        "{}:{}",
        binary.parent().expect("a directory").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&place.name);
    let type_in = async |line: &str| {
        let mut shell = tokio::process::Command::new("sh");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SETTLED_")) {
            shell.env_remove(name);
        }
        shell
            .args(["-c", line])
            .env("PATH", &path)
            .env("SETTLED_DATABASE_URL", &place.database_url)
            .env("SETTLED_BROKER_URL", &place.broker_url)
            .current_dir(&directory);
        let output = shell.output().await.expect("a shell");
        assert!(output.status.success(), "$ {line}\n{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let start = console("docs/operators.md", "\n## Start");
    assert!(start.len() > 5, "{start:?}");
    for line in start {
        // Where things are is this test's; so is the worker. `doctor` says that no partner has a key yet.
        if !line.starts_with("export ") && line != "settled worker" {
            type_in(line.trim_end_matches(" && settled doctor")).await;
        }
    }
    let [deposit] = &console("docs/custody.md", "\n## Deposit")[..] else {
        panic!("one line")
    };
    assert!(type_in(deposit).await.contains("came in"));
    let [reserve] = &console("docs/custody.md", "\n## Reserve")[..] else {
        panic!("one line")
    };
    assert!(type_in(reserve).await.contains("\"reserved\""));
    let page = read("docs/partners.md");
    let body = page
        .lines()
        .find(|line| line.starts_with('{') && line.contains("\"signature\""))
        .expect("the body");
    std::fs::write(directory.join("body.json"), body).expect("written");
    let example = console("docs/partners.md", "\n## A worked example");
    let explain = example
        .iter()
        .find(|line| line.starts_with("settled explain"))
        .expect("it");
    let judged = type_in(&format!("{explain} --json")).await;
    assert!(judged.contains("\"verdict\":\"settled\""), "{judged}");
    let worker = place.ready_worker(&[]).await;
    place
        .line()
        .publish(&[Message::new("northwind.allocation.update", body, Expect::Any)])
        .await;
    let nonce = "settled receipt --enterprise-id northwind --nonce 2026-11-20-000001 --json";
    until("it has a receipt", PATIENCE, async || {
        let found = place
            .run(&[
                "receipt",
                "--enterprise-id",
                "northwind",
                "--nonce",
                "2026-11-20-000001",
            ])
            .await;
        found.status.success().then_some(())
    })
    .await;
    let receipt: serde_json::Value = serde_json::from_str(&type_in(nonce).await).expect("JSON");
    let subscribers = read("docs/subscribers.md");
    let shown = receipt["eventId"].as_str().expect("an event");
    assert_eq!(receipt["verdict"], "settled");
    assert!(subscribers.contains(shown), "the event of the page is {shown}");
    assert!(type_in("settled ledger check").await.contains("right"));
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The example in Python signs to the byte what the page shows.
#[test]
fn the_partner_in_one_file_makes_the_body_of_the_page() {
    let file = root().join("examples/partner.py");
    let output = match std::process::Command::new("python3")
        .arg(&file)
        .arg("body")
        .env_remove("PARTNER_KEY")
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            return skip(
                "pages::the_partner_in_one_file_makes_the_body_of_the_page",
                &format!("no python3: {error}"),
            );
        }
    };
    assert!(output.status.success(), "{}", said(&output));
    let body = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(read("docs/partners.md").lines().any(|line| line == body), "{body}");
}

#[test]
fn the_reader_of_pages_reads_them() {
    let page = "# A (b), c_d\n`settled partner add`, `list`\n```console\n$ settled a && settled b \\\n    --c\nsettled d\n```\n[x](y.md#z)\n";
    assert_eq!(anchors(page), BTreeSet::from(["a-b-c_d".to_owned()]));
    assert_eq!(links(page), ["y.md#z"]);
    assert_eq!(typed_lines(page).len(), 4);
    let commands = commands();
    assert!(typed("partner ad", &commands).is_err());
    assert!(typed("no-such-command", &commands).is_err());
    let (command, flags) = typed("partner add --name 'A b' --own-queue", &commands).expect("a command");
    assert_eq!((command.as_str(), flags.len()), ("partner add", 2));
    assert!(commands["partner add"].contains("--own-queue") && commands["partner add"].contains("--json"));
}
