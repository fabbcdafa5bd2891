//! docker-compose.yml, where no Docker looks at it: what it names is there, and nothing is open to other machines.

use std::collections::BTreeSet;

use yaml_rust2::{Yaml, YamlLoader};

use super::pages::{read, root};

fn yaml(path: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(documents.len(), 1, "{path} is one document");
    documents.remove(0)
}

pub(super) fn text(yaml: &Yaml) -> &str {
    yaml.as_str().unwrap_or_else(|| panic!("a text: {yaml:?}"))
}

/// The names in a table.
fn names(yaml: &Yaml) -> BTreeSet<String> {
    let table = yaml.as_hash().unwrap_or_else(|| panic!("a table: {yaml:?}"));
    table.keys().map(|name| text(name).to_owned()).collect()
}

/// A list of texts, of a key that may be missing.
pub(super) fn list(yaml: &Yaml) -> Vec<&str> {
    yaml.as_vec().into_iter().flatten().map(text).collect()
}

/// A service with what `<<` merges into it.
fn setting<'y>(service: &'y Yaml, name: &str) -> &'y Yaml {
    let own = &service[name];
    if own.is_badvalue() { &service["<<"][name] } else { own }
}

#[test]
fn what_the_compose_file_names_is_there() {
    let compose = yaml("docker-compose.yml");
    let services = compose["services"].as_hash().expect("services");
    let (known, volumes) = (names(&compose["services"]), names(&compose["volumes"]));
    let mut used = BTreeSet::new();
    for (name, service) in services {
        let name = text(name);
        let image = text(setting(service, "image"));
        assert!(
            image.contains(':') && !image.ends_with(":latest"),
            "{name}: {image} says which version"
        );
        let after = match &service["depends_on"] {
            Yaml::Hash(_) => names(&service["depends_on"]),
            one => list(one).into_iter().map(str::to_owned).collect(),
        };
        assert!(after.is_subset(&known), "{name} waits for {after:?}");
        for mount in list(&service["volumes"]) {
            let (from, to) = mount.split_once(':').expect("from and to");
            match from.strip_prefix("./") {
                Some(path) => {
                    assert!(root().join(path).exists(), "{name}: {path} is there");
                    assert!(to.ends_with(":ro"), "{name}: {mount} is only read");
                }
                None => {
                    assert!(volumes.contains(from), "{name}: volume {from}");
                    used.insert(from.to_owned());
                }
            }
        }
        for port in list(&service["ports"]) {
            assert!(
                port.starts_with("127.0.0.1:"),
                "{name}: {port} is for this machine only"
            );
        }
        // What watches is there on request, and runs with as little as the rest.
        let profiles = list(&service["profiles"]);
        let watches = ["prometheus", "grafana"].contains(&name);
        assert_eq!(profiles, if watches { &["observability"][..] } else { &[] }, "{name}");
        if watches || setting(service, "build").as_str().is_some() {
            assert_eq!(setting(service, "read_only").as_bool(), Some(true), "{name}");
            assert_eq!(list(setting(service, "cap_drop")), ["ALL"], "{name}");
        }
    }
    assert_eq!(used, volumes, "each volume is used");
    assert!(
        known.contains("worker") && known.contains("grafana"),
        "services are read: {known:?}"
    );
}

/// Prometheus asks the workers where they listen, and Grafana asks Prometheus and finds the dashboard.
#[test]
fn what_watches_is_led_to_what_it_watches() {
    let compose = yaml("docker-compose.yml");
    let mounted = |service: &str, from: &str| {
        let mounts = list(&compose["services"][service]["volumes"]);
        let to = mounts
            .iter()
            .find_map(|mount| mount.strip_prefix(&format!("./{from}:")));
        let to = to.unwrap_or_else(|| panic!("{service} has {from}"));
        to.trim_end_matches(":ro").to_owned()
    };
    let prometheus = yaml("config/prometheus/prometheus.yml");
    let scraped = &prometheus["scrape_configs"][0]["dns_sd_configs"][0];
    assert_eq!(list(&scraped["names"]), ["worker"]);
    let listens = text(&compose["services"]["worker"]["environment"]["SETTLED_HTTP__LISTEN"]);
    let port = scraped["port"].as_i64().expect("a port");
    assert!(listens.ends_with(&format!(":{port}")), "{listens}, {port}");
    let folder = mounted("prometheus", "config/prometheus/prometheus.yml").replace("/prometheus.yml", "");
    for rules in list(&prometheus["rule_files"]) {
        assert_eq!(
            mounted("prometheus", &format!("config/prometheus/{rules}")),
            format!("{folder}/{rules}")
        );
    }

    assert_eq!(
        mounted("grafana", "config/grafana/provisioning"),
        "/etc/grafana/provisioning"
    );
    let source = yaml("config/grafana/provisioning/datasources/prometheus.yml");
    let source = &source["datasources"][0];
    assert_eq!(
        (text(&source["type"]), source["isDefault"].as_bool()),
        ("prometheus", Some(true))
    );
    let port = list(&compose["services"]["prometheus"]["ports"])[0]
        .rsplit_once(':')
        .expect("a port")
        .1;
    assert_eq!(text(&source["url"]), format!("http://prometheus:{port}"));
    let dashboards = yaml("config/grafana/provisioning/dashboards/settled.yml");
    let folder = text(&dashboards["providers"][0]["options"]["path"]);
    let dashboard = mounted("grafana", "config/grafana/settled.json");
    assert_eq!(dashboard.rsplit_once('/').map(|(of, _)| of), Some(folder));
    let home = text(&compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]);
    assert_eq!(home, dashboard);
}
