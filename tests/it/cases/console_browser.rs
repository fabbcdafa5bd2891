//! The console in a real browser: Debian's Chromium, driven by Playwright, with axe's rules for who can not see or uses no mouse.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::api_tools::{run, tools};
use crate::kit::{
    auditor::{Expect, Reservation},
    console::{Console, PROXY_SECRET},
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, Worker, said, skip, until},
};

/// Of npm.
const PLAYWRIGHT: &str = "1.65.1";
const AXE: &str = "4.14.1";

/// The browser and what drives it.
struct Browser {
    tools: PathBuf,
    chromium: PathBuf,
}

impl Browser {
    async fn new() -> Result<Self, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tools = tools().join(format!("browser-{PLAYWRIGHT}-{AXE}"));
        std::fs::create_dir_all(&tools).map_err(|error| format!("{}: {error}", tools.display()))?;
        // Several tests want it at once: one installs, the others wait.
        let install = format!(
            "dev/prerequisites browser && cd '{0}' && {{ [ -e done ] || {{ npm install --silent --no-audit --no-fund \
             --ignore-scripts --prefix . playwright-core@{PLAYWRIGHT} axe-core@{AXE} && : > done; }}; }}",
            tools.display()
        );
        let lock = tools.join("lock").display().to_string();
        run(Path::new("flock"), &[lock.as_str(), "sh", "-c", install.as_str()], root).await?;
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
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/tools/console.js");
        let mut child = tokio::process::Command::new("node")
            .arg(script)
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
        let ended = tokio::time::timeout(4 * PATIENCE, child.wait_with_output()).await;
        let output = ended.expect("the story ends").expect("node runs");
        assert!(output.status.success(), "{}", said(&output));
    }
}

/// Dead letters that settle once the key is there, which it is; and a worker.
async fn staged(test: &str, count: usize) -> (Place, Worker, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "Acme Trading"];
    assert!(place.run(&add).await.status.success());
    place.connect_partner(&partner).await;
    place.deposit(&partner, "BTC", "100000000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "25000000")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&COLLECTS).await;
    let messages: Vec<_> = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
        .collect();
    place.publish(&messages).await;
    collected(&place, count).await;
    place.add_key(&partner).await;
    (place, worker, reservations)
}

async fn collected(place: &Place, count: usize) {
    let db = place.db().await;
    until("they are collected", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.dead_letters WHERE state = 'open'";
        let open: i64 = db.query_one(sql, &[]).await.expect("a count").get(0);
        (usize::try_from(open) == Ok(count)).then_some(())
    })
    .await;
}

async fn incident(test: &str, scripts: bool) {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip(test, &why),
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
        Err(why) => return skip("the_keyboard_alone_will_do", &why),
    };
    let (place, worker, _) = staged("console_keyboard", 3).await;
    let console = Console::behind_proxy(&place, &[]).await;
    browser.play(&console, "keyboard", true, json!({})).await;
    console.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_text_is_shown_and_does_nothing() {
    let browser = match Browser::new().await {
        Ok(browser) => browser,
        Err(why) => return skip("hostile_text_is_shown_and_does_nothing", &why),
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
    collected(&place, 1).await;
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
