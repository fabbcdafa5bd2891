//! The console in a real browser: Debian's Chromium, driven by Playwright, with axe's rules for who can not see or uses no mouse.
//! With SETTLED_TEST_PICTURES=docs/images the stories make the pages' pictures anew.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::api_tools::{run, tools};
use crate::kit::{
    auditor::{Expect, Reservation},
    console::{Console, PROXY_SECRET},
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, Worker, said, skip},
};

/// What these tests take from npm, as tests/it/tools/package-lock.json pins it: installed once for each list, and no package's own
/// script runs.
pub(super) async fn web_tools() -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = std::fs::read(root.join("tests/it/tools/package-lock.json")).expect("the list");
    let digest = hex::encode(settled::domain::digest::sha256(&list));
    let tools = tools().join(format!("web-{}", &digest[..16]));
    std::fs::create_dir_all(&tools).map_err(|error| format!("{}: {error}", tools.display()))?;
    // Several tests want it at once: one installs, the others wait.
    let install = format!(
        "[ -e '{0}/done' ] || {{ cp tests/it/tools/package.json tests/it/tools/package-lock.json '{0}' && cd '{0}' && \
         npm ci --silent --no-audit --no-fund --ignore-scripts && : > done; }}",
        tools.display()
    );
    let lock = tools.join("lock").display().to_string();
    run(Path::new("flock"), &[lock.as_str(), "sh", "-c", install.as_str()], root).await?;
    Ok(tools)
}

/// The browser and what drives it.
pub(super) struct Browser {
    tools: PathBuf,
    chromium: PathBuf,
}

impl Browser {
    pub(super) async fn new() -> Result<Self, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tools = web_tools().await?;
        let lock = tools.join("lock").display().to_string();
        run(
            Path::new("flock"),
            &[lock.as_str(), "dev/prerequisites", "browser"],
            root,
        )
        .await?;
        let found = run(Path::new("sh"), &["-c", "command -v chromium && command -v node"], root).await?;
        Ok(Self {
            chromium: PathBuf::from(found.lines().next().unwrap_or_default()),
            tools,
        })
    }

    /// Has a story played. What is wrong in it is a panic.
    async fn play(&self, console: &Console, story: &str, scripts: bool, more: Value) {
        let mut wish = json!({
            "story": story,
            "scripts": scripts,
            "url": format!("http://{}", console.address()),
            "secret": PROXY_SECRET,
            // Where the pages' pictures are to be made anew.
            "pictures": std::env::var("SETTLED_TEST_PICTURES").ok(),
        });
        let fields = wish.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        let longer = wish["minutes"].as_u64().unwrap_or_default() * 60;
        let patience = 4 * PATIENCE + Duration::from_secs(longer);
        self.tell("console.js", &wish, patience).await;
    }

    /// Has a script of tests/it/tools do what is wished. What is wrong in it is a panic.
    pub(super) async fn tell(&self, script: &str, wish: &Value, patience: Duration) {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tools");
        let mut child = tokio::process::Command::new("node")
            .arg(scripts.join(script))
            .args([&self.tools, &self.chromium])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("node starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(wish.to_string().as_bytes()).await.expect("it reads");
        drop(stdin);
        let ended = tokio::time::timeout(patience, child.wait_with_output()).await;
        let output = ended.expect("the story ends").expect("node runs");
        assert!(output.status.success(), "{}", said(&output));
    }
}

/// Dead letters that settle once the key is there, which it is; and a worker.
async fn staged(test: &str, count: usize) -> (Place, Worker, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    let worker = place.ready_worker(&COLLECTS).await;
    let reservations = place
        .strand(&partner, "Acme Trading", "100000000000", (count, "25000000"))
        .await;
    place.collected(count).await;
    place.add_key(&partner).await;
    (place, worker, reservations)
}

/// Each picture is made by a story of these tests, and stands on a page.
#[test]
fn every_picture_is_made_here_and_shown() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read =
        |path: PathBuf| std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let script = read(root.join("tests/it/tools/console.js"));
    let mut made: Vec<String> = script
        .split("await shot(")
        .skip(1)
        .filter_map(|rest| rest.split('"').nth(1))
        .map(|name| format!("console-{name}.png"))
        .collect();
    let in_directory = std::fs::read_dir(root.join("docs/images")).expect("a directory");
    let mut there: Vec<String> = in_directory
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    // The dashboard's, which dashboard.rs has made.
    made.push("dashboard-load.png".to_owned());
    made.sort();
    there.sort();
    assert_eq!(made, there);
    let pages: String = ["docs/console.md", "docs/operators.md"]
        .map(|page| read(root.join(page)))
        .concat();
    for name in there {
        assert!(pages.contains(&format!("](images/{name})")), "{name} stands on no page");
    }
    // The page of those who are on duty shows the console at work.
    assert!(read(root.join("docs/operators.md")).contains("](images/console-load.png)"));
}

async fn incident(test: &str, scripts: bool) {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip(&format!("console_browser::{test}"), &why),
    };
    let (place, worker, reservations) = staged(test, 8).await;
    let console = Console::behind_proxy(&place, &[("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5")]).await;
    let allocation = reservations.first().expect("one").id;
    let more = json!({"messages": 8, "allocation": allocation});
    browser.play(&console, "incident", scripts, more).await;
    console.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incident_is_drained_in_a_browser_with_scripts() {
    incident("an_incident_is_drained_in_a_browser_with_scripts", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incident_is_drained_in_a_browser_without_scripts() {
    incident("an_incident_is_drained_in_a_browser_without_scripts", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keyboard_alone_will_do() {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip("console_browser::the_keyboard_alone_will_do", &why),
    };
    let (place, worker, _) = staged("console_keyboard", 3).await;
    // As often as dead_letters.max_replays says.
    place.tamper("UPDATE settled.dead_letters SET replays = 5").await;
    let console = Console::behind_proxy(&place, &[]).await;
    browser.play(&console, "keyboard", true, json!({})).await;
    console.stop().await;
    place.settle_up(worker).await;
}

/// A worker settles what `settled simulate` sends, and its numbers are seen to change by themselves. Where pictures are made anew
/// it goes on until the chart has some minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_overview_under_load_is_seen() {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip("console_browser::the_overview_under_load_is_seen", &why),
    };
    let place = Place::new("console_load").await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let http = port.local_addr().expect("an address").to_string();
    drop(port);
    let settings = [("SETTLED_HTTP__LISTEN", http.as_str())];
    let worker = place.ready_worker(&[&COLLECTS[..], &settings].concat()).await;
    let console = Console::behind_proxy(&place, &[("SETTLED_CONSOLE__WORKERS", http.as_str())]).await;
    let minutes = match std::env::var_os("SETTLED_TEST_PICTURES") {
        Some(_) => 2,
        None => 0,
    };
    // More than anybody waits for.
    let messages = (3_000 + minutes * 60 * 120).to_string();
    let simulate = [
        "simulate",
        "--messages",
        &messages,
        "--rate",
        "100",
        "--invalid",
        "4",
        "--partners",
        "3",
    ];
    let traffic = place
        .command(&simulate)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("settled starts");
    browser.play(&console, "load", true, json!({"minutes": minutes})).await;
    drop(traffic);
    console.stop().await;
    let ended = worker.terminate().await;
    assert!(ended.success(), "{}", worker.said());
}

/// Nobody answers for the broker: the alert stands there, look after look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_watched_changes_in_place() {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip("console_browser::what_is_watched_changes_in_place", &why),
    };
    let place = Place::new("console_watched").await;
    let nowhere = format!("amqp://a:b@{}/x", crate::kit::command::NOWHERE);
    let settings = [
        ("SETTLED_BROKER_URL", nowhere.as_str()),
        ("SETTLED_CONSOLE__LIVE_INTERVAL", "500ms"),
    ];
    let console = Console::start(&place, &settings).await;
    browser
        .play(&console, "watched", true, json!({"link": console.link()}))
        .await;
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_text_is_shown_and_does_nothing() {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip("console_browser::hostile_text_is_shown_and_does_nothing", &why),
    };
    const HOSTILE: &str =
        "<img src=x onerror='window.pwned=1'>\"><script>window.pwned=1</script>\u{202e}\u{200b}{{7*7}}";
    let place = Place::new("console_hostile").await;
    let partner = Partner::new("acme");
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", HOSTILE];
    assert!(place.run(&add).await.status.success());
    place.connect_partner(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations = [partner.allocation("BTC", "7")];
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&COLLECTS).await;
    let draft = partner.draft(&reservations[0], "cleared");
    let draft = draft
        .set("nonce", HOSTILE)
        .set("evaluationId", format!("{HOSTILE}{}", "long ".repeat(180)));
    place.publish(&[draft.message(Expect::Any)]).await;
    place.collected(1).await;
    let db = place.db().await;
    // As a detail of five kilobytes would be.
    let detail = format!("{HOSTILE} {}", "x".repeat(5_000));
    db.execute("UPDATE settled.dead_letters SET detail = $1", &[&detail])
        .await
        .expect("a detail");
    let letter: uuid::Uuid = db
        .query_one("SELECT id FROM settled.dead_letters", &[])
        .await
        .expect("a letter")
        .get(0);
    let why = [
        "partner",
        "suspend",
        "--enterprise-id",
        "acme",
        "--operator",
        HOSTILE,
        "--reason",
        HOSTILE,
    ];
    assert!(place.run(&why).await.status.success());
    let console = Console::behind_proxy(&place, &[]).await;
    let more = json!({"letter": letter, "nonce": HOSTILE});
    browser.play(&console, "hostile", true, more).await;
    console.stop().await;
    place.settle_up(worker).await;
}
