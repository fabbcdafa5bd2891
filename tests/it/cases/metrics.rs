//! What README and docs say of metrics is what they are: each is defined once, and the pages follow.

use std::{collections::BTreeSet, path::Path};

use settled::{
    store::roles::DatabaseRole,
    telemetry::{Metric, MetricKind, catalogue::ALL},
};

const PAGE: &str = "docs/metrics.md";

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// README and every page of docs, by path.
fn pages() -> Vec<(String, String)> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let mut paths = vec!["README.md".to_owned()];
    for entry in std::fs::read_dir(docs).expect("docs") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") {
            paths.push(format!("docs/{name}"));
        }
    }
    paths.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

fn row(metric: &Metric) -> String {
    let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
    let labels = if labels.is_empty() {
        "-".to_owned()
    } else {
        labels.join(", ")
    };
    let kind = metric.kind.as_str();
    format!("| `{}` | {kind} | {labels} | {} |", metric.name, metric.help)
}

/// The page of metrics has a row for each, in the order of the definitions, and none besides.
#[test]
fn the_page_of_metrics_is_their_definitions() {
    let page = read(PAGE);
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `settled_")).collect();
    let expected: Vec<String> = ALL.iter().map(row).collect();
    assert_eq!(rows, expected, "{PAGE} should have:\n{}\n", expected.join("\n"));
}

/// Names as they stand in a text, the endings that Prometheus gives a histogram's series left out.
fn named(text: &str) -> BTreeSet<String> {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let words = text.split(|letter: char| !is_name(letter) && letter != ':');
    words
        .filter(|word| word.starts_with("settled_") && !word.contains(':'))
        .map(|word| {
            let series = ["_bucket", "_count", "_sum"]
                .iter()
                .find_map(|end| word.strip_suffix(end));
            let is_of_histogram = |name: &&str| {
                ALL.iter()
                    .any(|metric| metric.name == *name && matches!(metric.kind, MetricKind::Histogram(_)))
            };
            series.filter(is_of_histogram).unwrap_or(word).to_owned()
        })
        .collect()
}

/// Every metric that a page names is one; the database's roles begin alike.
#[test]
fn every_metric_that_a_page_names_is_one() {
    let defined: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(defined.len(), ALL.len(), "each name once");
    let mut count = 0;
    for (path, text) in pages() {
        for name in named(&text) {
            if DatabaseRole::ALL.iter().any(|role| role.name() == name) {
                continue;
            }
            assert!(defined.contains(name.as_str()), "{path}: {name} is no metric");
            count += 1;
        }
    }
    assert!(count > defined.len(), "pages name metrics");
}
