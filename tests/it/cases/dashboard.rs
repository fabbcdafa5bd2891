//! The dashboard under load: Debian's Prometheus reads a worker and an API, and every panel has something to draw, of what it
//! answers to the panel's own expressions. With SETTLED_TEST_PICTURES=docs/images the picture of them is made anew.

use std::{net::TcpListener, path::Path, process::Stdio, time::Duration};

use serde_json::json;
use tokio::process::Command;

use super::{
    api_reads::{ROOT, token},
    api_tools::run,
    console_browser::Browser,
};
use crate::kit::{
    api::Api,
    partner::Partner,
    program::Program,
    support::{COLLECTS, PATIENCE, Place, get, skip, until},
};

/// Seconds between two looks of Prometheus.
const SCRAPE: u64 = 1;

/// What is not there before it happens.
const EMPTY: [&str; 1] = ["settled_dead_letters_full"];

/// What is never at rest while partners send.
const BUSY: [&str; 14] = [
    "Workers ready",
    "Consumers",
    "Judged",
    "Rejected",
    "By partner",
    "From receipt to confirmed event",
    "A batch in each stage, p90",
    "Messages in a batch, p50",
    "Events",
    "Dead letters published",
    "Open",
    "Collected",
    "Database and HTTP",
    "HTTP API",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_panel_of_the_dashboard_has_something_to_draw() {
    let test = "dashboard::every_panel_of_the_dashboard_has_something_to_draw";
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let got = run(Path::new("dev/prerequisites"), &["promtool"], root).await;
    let browser = match got {
        Ok(_) => Browser::new().await,
        Err(why) => Err(why),
    };
    let browser = match browser {
        Ok(browser) => browser,
        Err(why) => return skip(test, &why),
    };
    let partner = Partner::new("acme");
    let place = Place::new("dashboard").await;
    place.register(&partner).await;
    let management = [("SETTLED_BROKER_MANAGEMENT_URL", place.services.management.as_str())];
    let worker = place.ready_worker(&[&COLLECTS[..], &management].concat()).await;
    let api = Api::start(&place, &[]).await;
    let prometheus = prometheus(&place, &[&worker.http().await, &api.watch()]).await;
    let pictures = std::env::var_os("SETTLED_TEST_PICTURES");
    let seconds: u64 = if pictures.is_some() { 120 } else { 20 };
    let messages = (100 * (seconds + 60)).to_string();
    let here = ["simulate", "--yes-into-this-database", "--messages", &messages];
    let mut traffic = place.command(&[&here[..], &["--rate", "100", "--invalid", "4", "--partners", "3"]].concat());
    traffic.stdin(Stdio::null()).stdout(Stdio::null());
    let traffic = Program::start("simulate", &mut traffic, place.file("simulate.log"));
    let wish = json!({
        "prometheus": format!("http://{}", prometheus.1),
        "scrape": SCRAPE,
        "seconds": seconds,
        "busy": BUSY,
        "empty": EMPTY,
        "picture": pictures.map(|pictures| Path::new(&pictures).join("dashboard-load.png")),
    });
    // Somebody asks the API meanwhile.
    let acme = token(&place, "acme", "partner", &[]).await;
    let list = format!("{ROOT}/acme/partners/allocations");
    let asking = async {
        loop {
            assert_eq!(api.get(&list, &acme).await.status, 200);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let patience = 4 * PATIENCE + Duration::from_secs(2 * seconds);
    tokio::select! {
        () = browser.tell("dashboard.js", &wish, patience) => {}
        () = asking => {}
    }
    drop(traffic);
    drop(prometheus);
    api.stop().await;
    let ended = worker.terminate().await;
    assert!(ended.success(), "{}", worker.said());
}

/// One that reads these, and its address.
async fn prometheus(place: &Place, read: &[&str]) -> (Program, String) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address").to_string();
    drop(free);
    let settings = json!({
        "global": {"scrape_interval": format!("{SCRAPE}s")},
        "scrape_configs": [{"job_name": "settled", "static_configs": [{"targets": read}]}],
    });
    let file = place.file("prometheus.yml");
    // What is JSON is YAML too.
    std::fs::write(&file, settings.to_string()).expect("it can be written");
    let mut command = Command::new("prometheus");
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", place.file("prometheus").display()))
        .arg(format!("--web.listen-address={address}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let program = Program::start("Prometheus", &mut command, place.file("prometheus.log"));
    until("Prometheus is ready", PATIENCE, async || {
        program.still_runs();
        let (status, _) = get(&format!("http://{address}/-/ready")).await?;
        (status == 200).then_some(())
    })
    .await;
    (program, address)
}
