//! Seeded bugs: one-line patches in `tests/mutants`, each of which compiles and passes the happy path below. `make mutants`
//! applies one after the other to a copy of the tree and sees that the test it names notices. Here only the patches
//! themselves are looked at, so that none rots between two such runs.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::kit::{
    partner::Partner,
    support::{PATIENCE, Place, until},
};

/// Fewer would prove little.
const FEWEST: usize = 30;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A patch: its header, and what it finds and puts in which file.
struct Mutant {
    name: String,
    header: Vec<(String, String)>,
    hunks: Vec<Hunk>,
}

struct Hunk {
    file: String,
    found: String,
    put: String,
}

impl Mutant {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).expect("UTF-8");
        let (header, diff) = text.split_once("\n\n").expect("a header, an empty line and a diff");
        let header = header
            .lines()
            .map(|line| line.split_once(": ").expect("a name and a sentence"))
            .map(|(name, sentence)| (name.to_owned(), sentence.to_owned()));
        let mut file = String::new();
        let mut hunks: Vec<Hunk> = Vec::new();
        for line in diff.lines() {
            if let Some(name) = line.strip_prefix("+++ b/") {
                name.clone_into(&mut file);
            } else if line.starts_with("@@ ") {
                let (found, put) = (String::new(), String::new());
                hunks.push(Hunk {
                    file: file.clone(),
                    found,
                    put,
                });
            } else if !line.starts_with("--- a/") {
                let (sign, rest) = line.split_at_checked(1).unwrap_or((" ", ""));
                let hunk = hunks.last_mut().expect("a hunk before its lines");
                if sign != "+" {
                    hunk.found += &format!("{rest}\n");
                }
                if sign != "-" {
                    hunk.put += &format!("{rest}\n");
                }
            }
        }
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        Self {
            name,
            header: header.collect(),
            hunks,
        }
    }

    fn all() -> Vec<Self> {
        let directory = std::fs::read_dir(root().join("tests/mutants")).expect("tests/mutants");
        let mut paths: Vec<PathBuf> = directory.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    fn said(&self, name: &str) -> &str {
        let said = self.header.iter().find(|(said, _)| said == name);
        said.map(|(_, sentence)| sentence.as_str()).unwrap_or_default()
    }
}

#[test]
fn every_mutant_still_applies_in_one_place() {
    let mut wrong = Vec::new();
    for mutant in Mutant::all() {
        assert!(!mutant.hunks.is_empty(), "{} changes nothing", mutant.name);
        for hunk in &mutant.hunks {
            let name = &mutant.name;
            assert!(hunk.file.starts_with("src/"), "{name} changes {}", hunk.file);
            assert_ne!(hunk.found, hunk.put, "{name}");
            let text = std::fs::read_to_string(root().join(&hunk.file)).unwrap_or_default();
            let at: Vec<_> = text.match_indices(&hunk.found).collect();
            let whole = at
                .iter()
                .filter(|(at, _)| *at == 0 || text.as_bytes().get(at - 1) == Some(&b'\n'));
            let places = whole.count();
            if places != 1 {
                wrong.push(format!("{name}: {} has {places} places for\n{}", hunk.file, hunk.found));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "tests/mutants/NAME.patch: make the same bug anew in the source as it is now:\n{}",
        wrong.join("\n")
    );
}

/// The tests of a target, by the text of their file: the modules lead to it.
fn has_test(target: &str, test: &str) -> bool {
    let (modules, name) = test.rsplit_once("::").unwrap_or(("", test));
    let directory = match target {
        "lib" => root().join("src"),
        "it" => root().join("tests/it/cases"),
        other => panic!("{other} is no target of ours"),
    };
    let inner = modules.strip_suffix("::tests");
    let files = [
        directory.join(format!("{}.rs", modules.replace("::", "/"))),
        directory.join(format!("{}.rs", inner.unwrap_or(modules).replace("::", "/"))),
        directory.join(format!("{}/mod.rs", inner.unwrap_or(modules).replace("::", "/"))),
    ];
    let written = format!("fn {name}(");
    let texts = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    texts.into_iter().any(|text| text.contains(&written))
}

#[test]
fn every_mutant_says_what_it_is_and_who_notices() {
    let mutants = Mutant::all();
    assert!(mutants.len() >= FEWEST, "{} mutants", mutants.len());
    let told = format!("{} seeded bugs", mutants.len());
    assert!(
        include_str!("../../../docs/promises.md").contains(&told),
        "docs/promises.md does not say: {told}"
    );
    for mutant in &mutants {
        let name = &mutant.name;
        assert!(
            name.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'-' || byte.is_ascii_digit()),
            "{name}"
        );
        let names: Vec<&str> = mutant.header.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["Bug", "Breaks", "Caught by"], "{name}: the lines of its header");
        for sentence in ["Bug", "Breaks"] {
            let said = mutant.said(sentence);
            assert!(said.ends_with('.') && said.len() > 20, "{name}: {sentence}: {said:?}");
        }
        let (target, tests) = mutant
            .said("Caught by")
            .split_once(' ')
            .expect("a target and its tests");
        for test in tests.split(' ') {
            assert!(has_test(target, test), "{name}: there is no test {test} in {target}");
        }
    }
}

/// What a demonstration would show: a partner's valid messages settle, and their events come. Every mutant passes this, so
/// it looks at nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_happy_path() {
    let place = Place::new("happy").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations: Vec<_> = (0..8).map(|_| partner.allocation("BTC", "100")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let (cleared, released) = (&reservations[0], &reservations[1]);
    place
        .publish(&[partner.cleared(cleared), partner.released(released)])
        .await;
    for (status, reservation) in [("cleared", cleared), ("released", released)] {
        let seen = place
            .events
            .wait("its event", |seen| {
                seen.routing_key == format!("allocation.{status}.acme")
            })
            .await;
        let event: serde_json::Value = serde_json::from_slice(&seen.body).expect("an event is JSON");
        assert_eq!(event["subject"], json!(reservation.id));
        let shown = place.json(&["allocation", "show", &reservation.id.to_string()]).await;
        assert_eq!(shown["allocation"]["status"], status);
    }
    until("both are acknowledged", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 0).then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}
