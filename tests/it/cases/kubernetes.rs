//! deploy/kubernetes: who knows which password, and what is prepared before workers run. That every object is as Kubernetes wants
//! it, `dev/kubernetes` holds.

use std::collections::BTreeMap;

use yaml_rust2::{Yaml, YamlLoader};

use super::{
    compose::{list, text},
    pages::{read, root},
};

/// Every object below deploy/kubernetes, with its file.
fn objects() -> Vec<(String, Yaml)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("deploy/kubernetes")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(root()).expect("below").display().to_string();
            let documents = YamlLoader::load_from_str(&read(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            found.extend(documents.into_iter().map(|document| (name.clone(), document)));
        }
    }
    found
}

/// The containers of an object, those that come first first.
fn containers(object: &Yaml) -> Vec<&Yaml> {
    let pod = &object["spec"]["template"]["spec"];
    let of = |kind: &str| pod[kind].as_vec().map(Vec::as_slice).unwrap_or_default();
    of("initContainers").iter().chain(of("containers")).collect()
}

fn secrets(container: &Yaml) -> Vec<&str> {
    let from = container["envFrom"].as_vec().map(Vec::as_slice).unwrap_or_default();
    let names = from.iter().map(|from| &from["secretRef"]["name"]);
    names.filter_map(Yaml::as_str).collect()
}

#[test]
fn the_owners_password_is_the_jobs_alone() {
    let mut who = BTreeMap::<String, Vec<String>>::new();
    for (file, object) in objects() {
        for container in containers(&object) {
            let words = list(&container["args"]).join(" ");
            assert!(
                container["env"].is_badvalue(),
                "{file}: {words} has its variables from where this test looks"
            );
            for secret in secrets(container) {
                who.entry(secret.to_owned()).or_default().push(words.clone());
            }
        }
    }
    // In this order: the roles are those of the schema that is there, and the workers' login has its rights by them.
    assert_eq!(
        who,
        BTreeMap::from([
            ("settled".to_owned(), vec!["worker".to_owned()]),
            (
                "settled-prepare".to_owned(),
                ["migrate", "roles --apply", "topology"].map(str::to_owned).into()
            ),
        ])
    );
    // What else reads a Secret reads the workers'.
    for (file, object) in objects() {
        for target in object["spec"]["secretTargetRef"].as_vec().into_iter().flatten() {
            assert_eq!(text(&target["name"]), "settled", "{file}");
        }
    }
}

#[test]
fn what_the_page_tells_to_make_is_what_is_used() {
    let page = read("docs/kubernetes.md");
    let made: Vec<&str> = page
        .lines()
        .filter_map(|line| line.split_once("create secret generic "))
        .map(|(_, rest)| rest.trim_end_matches(" \\"))
        .collect();
    assert_eq!(made, ["settled", "settled-prepare"]);
    let head = read("deploy/kubernetes/base/kustomization.yaml");
    for text in [&page, &head] {
        assert!(
            !text.contains("SETTLED_MIGRATE_DATABASE_URL"),
            "one name for the URL in either secret"
        );
    }
    let page = page.split_once("generic settled-prepare").expect("both").0;
    assert!(
        page.contains("IN ROLE settled_worker"),
        "the workers' login owns nothing"
    );
}
