//! The image, where no Docker builds it: what the build reads is let into it, it runs as nobody's root, and its health check is
//! a command of ours that tells the truth.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::pages::{read, root};
use crate::kit::{
    api::Api,
    command::{ask, ask_in},
    support::{Place, said},
};

/// What .dockerignore says, in its order: the last pattern that fits a path, or a folder above it, decides.
struct Ignored(Vec<(bool, Vec<String>)>);

impl Ignored {
    fn read() -> Self {
        let text = read(".dockerignore");
        let lines = text.lines().map(str::trim);
        let patterns = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(
            patterns
                .map(|pattern| {
                    let bare = pattern.trim_start_matches('!');
                    assert!(
                        !bare.contains("**") && (bare == "*" || !bare.contains('*')),
                        "{pattern}"
                    );
                    (bare.len() < pattern.len(), bare.split('/').map(str::to_owned).collect())
                })
                .collect(),
        )
    }

    fn lets_through(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('/').collect();
        let fits = |pattern: &[String]| {
            pattern.len() <= parts.len() && pattern.iter().zip(&parts).all(|(say, part)| say == "*" || say == part)
        };
        let last = self.0.iter().rev().find(|(_, pattern)| fits(pattern));
        last.is_none_or(|(lets, _)| *lets)
    }

    /// Whether something below a folder is let through.
    fn leads_on(&self, folder: &str) -> bool {
        let parts: Vec<&str> = folder.split('/').collect();
        let on_the_way = |pattern: &[String]| {
            pattern.len() > parts.len() && pattern.iter().zip(&parts).all(|(say, part)| say == part)
        };
        self.lets_through(folder) || self.0.iter().any(|(lets, pattern)| *lets && on_the_way(pattern))
    }

    /// The files that the build has.
    fn files(&self, folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path
                .strip_prefix(root())
                .expect("below")
                .to_str()
                .expect("UTF-8")
                .to_owned();
            if path.is_dir() {
                if self.leads_on(&name) {
                    self.files(&path, found);
                }
            } else if self.lets_through(&name) {
                found.insert(name);
            }
        }
    }
}

/// What the sources include when they are built without tests, by the file that does.
fn included(files: &BTreeSet<String>) -> BTreeSet<(String, PathBuf)> {
    let mut found = BTreeSet::new();
    for file in files
        .iter()
        .filter(|file| file.starts_with("src/") && file.ends_with(".rs"))
    {
        let text = read(file);
        let text = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
        if file.ends_with("/tests.rs") {
            continue;
        }
        for kind in ["include_str!(", "include_bytes!(", "include!("] {
            for (_, rest) in text.match_indices(kind).map(|(at, _)| text.split_at(at)) {
                let path = rest.split('"').nth(1).expect("a path");
                let folder = root().join(file);
                found.insert((file.clone(), folder.parent().expect("a folder").join(path)));
            }
        }
    }
    found
}

#[test]
fn the_build_of_the_image_has_all_that_it_reads() {
    let ignored = Ignored::read();
    let mut files = BTreeSet::new();
    ignored.files(root(), &mut files);
    let includes = included(&files);
    assert!(includes.len() >= 3, "includes are found: {includes:?}");
    for (from, path) in includes {
        let real = path
            .canonicalize()
            .unwrap_or_else(|error| panic!("{from}: {}: {error}", path.display()));
        let name = real
            .strip_prefix(root())
            .expect("below")
            .to_str()
            .expect("UTF-8")
            .to_owned();
        assert!(
            ignored.lets_through(&name),
            "{from} includes {name}, which .dockerignore keeps out"
        );
    }
    // Nothing of this machine comes along.
    for private in [".env", ".git", "target", "docs/partners.md"] {
        assert!(!ignored.lets_through(private), "{private}");
    }
    assert!(!files.is_empty() && !files.iter().any(|file| file.starts_with("target/")));

    // As cargo sees what Docker gives it.
    let copy = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("image-{}", std::process::id()));
    for file in &files {
        let to = copy.join(file);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        std::fs::copy(root().join(file), to).expect("a copy");
    }
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--format-version", "1"])
        .current_dir(&copy)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", said(&output));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let ours = metadata["packages"].as_array().expect("packages").iter();
    let ours: Vec<_> = ours.filter(|package| package["name"] == "settled").collect();
    assert_eq!(ours.len(), 1);
    let targets = ours[0]["targets"].as_array().expect("targets");
    assert!(targets.len() > 5, "{targets:?}");
    for target in targets {
        let path = target["src_path"].as_str().expect("a path");
        assert!(
            path.starts_with(copy.to_str().expect("UTF-8")) && Path::new(path).exists(),
            "{target}"
        );
    }
    std::fs::remove_dir_all(&copy).expect("it goes");
}

#[test]
fn the_image_runs_without_root_and_asks_itself_how_it_is() {
    let text = read("Dockerfile");
    let (_, last) = text.rsplit_once("\nFROM ").expect("stages");
    // No shell and no package manager: nothing to be run there but the program.
    assert!(
        last.starts_with("gcr.io/distroless/") && !last.contains("\nRUN "),
        "{last}"
    );
    let user = last
        .lines()
        .find_map(|line| line.strip_prefix("USER "))
        .expect("a user");
    let (user, group) = user.split_once(':').expect("a user and a group");
    for id in [user, group] {
        assert!(
            id.parse::<u32>().is_ok_and(|id| id >= 1_000),
            "a number, so that Kubernetes can see that it is not root"
        );
    }
    for label in ["title", "description", "licenses", "version", "revision"] {
        assert!(last.contains(&format!("org.opencontainers.image.{label}=")), "{label}");
    }
    let version = concat!("ARG VERSION=", env!("CARGO_PKG_VERSION"), "\n");
    assert!(last.contains(version), "{version}");
    // Without a shell only the form of a list can be run.
    for word in ["ENTRYPOINT [", "CMD [", "probe\", \"--live\"]"] {
        assert!(last.contains(word), "{word}");
    }
    let compose = read("docker-compose.yml");
    assert!(
        compose.contains("test: [CMD, settled, probe]") && !compose.contains("bash,"),
        "the worker's health check"
    );
}

/// Exit codes are what a health check goes by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_says_whether_worker_and_api_are_well() {
    let place = Place::new("image_probe").await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let (listens, watched) = (worker.http().await, api.watch());
    let of_worker = [("SETTLED_HTTP__LISTEN", listens.as_str())];
    let of_api = [("SETTLED_API__WATCH_LISTEN", watched.as_str())];
    for (variables, words, path) in [
        (of_worker, &["probe"][..], "readyz"),
        (of_worker, &["probe", "--live"], "livez"),
        (of_api, &["probe", "--api"], "readyz"),
        (of_api, &["probe", "--api", "--live"], "livez"),
    ] {
        let answer = ask_in(&variables, words).await.document(0);
        let (_, address) = variables[0];
        assert_eq!(answer["url"], format!("http://{address}/{path}"));
        assert_eq!((&answer["ok"], &answer["status"]), (&true.into(), &200.into()));
    }
    // One that has nothing to work with is alive, and not ready; it says why.
    let lost = place.worker(&[("SETTLED_DATABASE_URL", "postgres://u@127.0.0.1:1/d")]);
    let listens = lost.http().await;
    let of_lost = [("SETTLED_HTTP__LISTEN", listens.as_str())];
    assert_eq!(ask_in(&of_lost, &["probe", "--live"]).await.document(0)["ok"], true);
    let answer = ask_in(&of_lost, &["probe"]).await.document(1);
    assert_eq!(answer["status"], 503);
    assert!(
        answer["reasons"].as_array().is_some_and(|reasons| !reasons.is_empty()),
        "{answer}"
    );
    // Nobody is there, and nobody can be.
    let answer = ask_in(&[("SETTLED_HTTP__LISTEN", "127.0.0.1:9")], &["probe"])
        .await
        .document(1);
    assert_eq!(
        (&answer["ok"], &answer["status"]),
        (&false.into(), &serde_json::Value::Null)
    );
    ask(&place, &["probe", "--api"])
        .await
        .refused(2, "api.watch_listen names no port");
    ask_in(&[("SETTLED_HTTP__LISTEN", "127.0.0.1:0")], &["probe"])
        .await
        .refused(2, "http.listen names no port");
    lost.kill().await;
    api.stop().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}
