//! README and the pages in docs/ name only what exists, and what exists stands on a page: settings, reasons,
//! event types, headers, tables, files, make's targets and links. `page_commands` looks at commands, `metrics` at metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use settled::domain::reason::Reason;

pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(super) fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What people read, by path. The changelog tells of what was, and is not held to what is.
pub(super) fn pages() -> Vec<(String, String)> {
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

pub(super) fn everything() -> String {
    pages().into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n")
}

/// A page's lines, each with whether it stands in a fenced block, and of what kind.
pub(super) fn lines(text: &str) -> Vec<(Option<&str>, &str)> {
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
pub(super) fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Every code span of a page, outside its fenced blocks.
pub(super) fn code(text: &str) -> Vec<&str> {
    lines(text)
        .into_iter()
        .filter(|(fence, _)| fence.is_none())
        .flat_map(|(_, line)| spans(line))
        .collect()
}

/// Every file of Rust and SQL below a directory, in one text, but for tests in files of their own.
fn sources(directory: &str) -> String {
    let mut found = String::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() && path.ends_with("tests") {
                continue;
            }
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
pub(super) fn words(text: &str, prefix: &str, is_name: impl Fn(char) -> bool) -> BTreeSet<String> {
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

pub(super) fn none(found: Vec<String>, why: &str) {
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
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
                "migrate_database_url",
                "migrate_database_url_file",
                "target_database_url",
                "target_database_url_file",
                "a.b",
            ];
            let of_tools = [
                "postgres_password",
                "broker_password",
                "broker_management_url",
                "broker_management_url_file",
            ];
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

/// `settled.held` and the like: tables and functions of the schema.
#[test]
fn tables_and_functions_named_exist() {
    let schema = sources("src/store/schema");
    let is_name = |letter: char| letter.is_ascii_lowercase() || letter == '_';
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in pages() {
        // But for a dashboard, whose file bears our name.
        for name in words(&text.replace("settled.json", ""), "settled.", is_name) {
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
            if file.starts_with("http://") || file.starts_with("https://") {
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

/// What figures rest on is there, listed, and says by which command it came to be.
#[test]
fn evidence_is_listed_and_names_its_command() {
    let list = read("docs/evidence/README.md");
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(root().join("docs/evidence")).expect("evidence") {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        let text = read(&format!("docs/evidence/{name}"));
        if name != "README.md" && !list.contains(&format!("({name})")) {
            wrong.push(format!("{name} is not listed"));
        }
        let head: Vec<&str> = text.lines().take(10).collect();
        let is_said = ["command", "$ ", "make "]
            .iter()
            .any(|sign| head.iter().any(|line| line.contains(sign)));
        if name != "README.md" && !is_said {
            wrong.push(format!("{name} names no command"));
        }
    }
    none(wrong, "docs/evidence");
}

#[test]
fn the_reader_of_pages_reads_them() {
    let page = "# A (b), c_d\n`a`\n```console\n$ [no](link)\n```\n[x](y.md#z)\n";
    assert_eq!(anchors(page), BTreeSet::from(["a-b-c_d".to_owned()]));
    assert_eq!(links(page), ["y.md#z"]);
    assert_eq!(code(page), ["a"]);
    assert_eq!(
        words("ab-c x-ab abd", "ab", char::is_alphanumeric),
        BTreeSet::from(["ab".to_owned(), "abd".to_owned()])
    );
}
