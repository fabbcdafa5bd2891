//! What the console looks at again and again: the last minute is no more than that, one look serves everybody, and who never
//! answers is said, beside what was seen of it last.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use settled::console::{Needs, table};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::console_size::counted;
use crate::kit::{
    console::{Console, Visitor},
    proxy::Proxy,
    support::{Beside, PATIENCE, Place, address, until, with_address},
};

/// A worker that says what it is told to say, and counts how often it is asked.
struct Told {
    address: String,
    /// Messages that it has counted; none: it does not say.
    messages: Arc<Mutex<Option<u64>>>,
    asked: Arc<AtomicUsize>,
    _serving: Beside,
}

impl Told {
    async fn new(messages: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let messages = Arc::new(Mutex::new(Some(messages)));
        let asked = Arc::new(AtomicUsize::new(0));
        let (says, counts) = (Arc::clone(&messages), Arc::clone(&asked));
        let serving = Beside::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counts.fetch_add(1, Ordering::Relaxed);
                let mut head = [0; 4096];
                let read = stream.read(&mut head).await.unwrap_or_default();
                let is_ready = head[..read].starts_with(b"GET /readyz");
                let says = *says.lock().expect("nobody broke");
                let body = match says {
                    _ if is_ready => r#"{"ready": true, "paused": null, "reasons": []}"#.to_owned(),
                    Some(count) => format!(
                        "settled_end_to_end_seconds_bucket{{le=\"0.1\"}} {count}\n\
                         settled_end_to_end_seconds_bucket{{le=\"+Inf\"}} {count}\n\
                         settled_partner_messages_total{{enterprise_id=\"acme\",verdict=\"settled\"}} {count}\n"
                    ),
                    None => continue,
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                drop(stream.write_all(answer.as_bytes()).await);
            }
        });
        Self {
            address,
            messages,
            asked,
            _serving: serving,
        }
    }

    fn says(&self, messages: Option<u64>) {
        *self.messages.lock().expect("nobody broke") = messages;
    }
}

/// What stands in acme's line under "last minute".
async fn last_minute(console: &Console, visitor: &Visitor) -> String {
    let page = console.get(visitor, "/").await;
    assert_eq!(page.status, 200, "{page:?}");
    assert!(!page.text.contains("1000000"), "all that was ever counted: {page:?}");
    let (_, rest) = page.text.split_once("href=\"/partners/acme\"").expect("a line");
    let line = rest.split("</tr>").next().expect("its end");
    let cells: Vec<&str> = line.split("<td class=\"r\">").collect();
    cells[1].split("</td>").next().expect("its end").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_minute_is_told_without_what_was_before() {
    let place = Place::new("console_minute").await;
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "Acme"];
    assert!(place.run(&add).await.status.success());
    let worker = Told::new(1_000_000).await;
    let settings = [
        ("SETTLED_CONSOLE__WORKERS", worker.address.as_str()),
        ("SETTLED_CONSOLE__LIVE_INTERVAL", "500ms"),
    ];
    let console = Console::start(&place, &settings).await;
    let ann = console.sign_in().await;
    // One look tells nothing of a minute, and of another one in which nothing came it is nothing.
    let first = console.get(&ann, "/").await;
    assert!(
        first.text.contains("is told from the second look on") && !first.text.contains(" ms</td>"),
        "{first:?}"
    );
    let sees = async |number: &str| {
        until(&format!("{number} came"), PATIENCE, async || {
            (last_minute(&console, &ann).await == number).then_some(())
        })
        .await;
    };
    sees("0").await;
    worker.says(Some(1_000_007));
    sees("7").await;
    let page = console.get(&ann, "/").await;
    assert!(page.text.contains("≤ 100 ms"), "{page:?}");
    // A question that it did not answer is no count of nothing.
    worker.says(None);
    sees("–").await;
    worker.says(Some(1_000_009));
    sees("9").await;
    // It was started anew: what it has counted came since.
    worker.says(Some(5));
    sees("5").await;
    worker.says(Some(6));
    sees("6").await;
    let page = console.get(&ann, "/partners/acme").await;
    assert!(page.text.contains("6 since the workers were started"), "{page:?}");
    console.stop().await;
}

/// However many look, each thing is looked at once at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_look_serves_everybody() {
    const VIEWERS: usize = 40;
    let place = Place::new("console_shared").await;
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "Acme"];
    assert!(place.run(&add).await.status.success());
    let worker = Told::new(7).await;
    let (front, connections) = counted(address(&place.broker_url)).await;
    let broker = with_address(&place.broker_url, front.parse().expect("an address"));
    let settings = [
        ("SETTLED_CONSOLE__WORKERS", worker.address.as_str()),
        ("SETTLED_BROKER_URL", broker.as_str()),
    ];
    let console = Console::start(&place, &settings).await;
    let ann = console.sign_in().await;
    let began = Instant::now();
    for path in ["/", "/partners/acme"] {
        let pages = (0..VIEWERS).map(|_| console.get(&ann, path));
        for page in futures_util::future::join_all(pages).await {
            assert_eq!(page.status, 200, "{page:?}");
        }
    }
    // A look a second, and two questions to a worker each.
    let looks = usize::try_from(began.elapsed().as_secs()).expect("few") + 2;
    let asked = worker.asked.load(Ordering::Relaxed);
    assert!(
        asked <= 2 * looks,
        "the worker was asked {asked} times by {looks} looks at most"
    );
    let connected = connections.load(Ordering::Relaxed);
    assert!(connected <= looks, "{connected} connections to the broker");
    console.stop().await;
}

/// Nobody is kept waiting by a part of the doctor's questions that is not answered: the others' lines are there, and what was known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_says_what_it_knows_while_something_never_answers() {
    let place = Place::new("console_doctor").await;
    let broker = Proxy::to(&address(&place.broker_url)).await;
    let broker_url = with_address(&place.broker_url, broker.address);
    let console = Console::start(&place, &[("SETTLED_BROKER_URL", broker_url.as_str())]).await;
    let ann = console.sign_in().await;
    let line = |name: &str| format!("<th scope=\"row\">{name}</th>");
    let late = format!("{}<td><span class=\"chip warn\">", line("broker"));
    let until_it_says = async |what: &str, says: &dyn Fn(&str) -> bool| {
        until(what, 2 * PATIENCE, async || {
            let began = Instant::now();
            let page = console.get(&ann, "/doctor").await;
            let took = began.elapsed();
            assert_eq!(page.status, 200, "{page:?}");
            assert!(took < Duration::from_secs(6), "the page took {took:?}");
            // The database's lines are there, whatever the broker does.
            (page.text.contains(&line("schema")) && says(&page.text)).then_some(())
        })
        .await;
    };
    broker.stall();
    until_it_says("the broker is looked at still", &|page| {
        page.contains(&late) && page.contains("there was no answer within 3s") && !page.contains("logged in after")
    })
    .await;
    broker.open();
    until_it_says("all is known", &|page| {
        !page.contains(&late) && page.contains("logged in after")
    })
    .await;
    broker.stall();
    until_it_says("what was known is shown with its age", &|page| {
        page.contains(&late) && page.contains("the lines below are of") && page.contains("logged in after")
    })
    .await;
    broker.open();
    console.stop().await;
}

/// Each screen answers without the database, in its frame, and says why it shows nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_screen_answers_without_the_database() {
    let place = Place::new("console_without").await;
    let nowhere = format!("postgres://a:b@{}/x", crate::kit::command::NOWHERE);
    let console = Console::start(&place, &[("SETTLED_DATABASE_URL", &nowhere)]).await;
    let ann = console.sign_in_without_pages().await;
    let id = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
    let mut seen = 0;
    for route in table().filter(|route| route.method == "GET" && !matches!(route.needs, Needs::Nobody)) {
        let path = match route.path {
            // It never ends: it tells what the overview has.
            "/live" => continue,
            "/letters/{id}" => format!("/letters/{id}"),
            "/partners/{id}" => "/partners/acme".to_owned(),
            "/discard" | "/restore" => format!("{}?partner=acme", route.path),
            "/purge" => "/purge?before=1h".to_owned(),
            "/timeline" => format!("/timeline?of={id}"),
            path => path.replace("{id}", "1"),
        };
        let began = Instant::now();
        let page = console.get(&ann, &path).await;
        let took = began.elapsed();
        // These show more than the database has; and who is signed in stands in none.
        let status = if matches!(route.path, "/" | "/doctor" | "/sessions") {
            200
        } else {
            503
        };
        assert_eq!(page.status, status, "{path}: {page:?}");
        assert!(took < Duration::from_secs(10), "{path} took {took:?}");
        assert!(
            page.text.contains("href=\"/audit\"") && page.text.contains("href=\"/doctor\""),
            "{path} stands in its frame: {page:?}"
        );
        let says = match route.path {
            "/sessions" => "You are ann",
            "/doctor" => "<th scope=\"row\">database</th><td><span class=\"chip bad\">",
            "/" => "the database: ",
            _ => "role=\"alert\"",
        };
        assert!(page.text.contains(says), "{path}: {says}: {page:?}");
        seen += 1;
    }
    assert!(seen >= 18, "{seen}");
    console.stop().await;
}

/// Sockets that are open, and never answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_answers_is_said_beside_what_was_seen_last() {
    let place = Place::new("console_silence").await;
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "Acme"];
    assert!(place.run(&add).await.status.success());
    let (database, broker) = (
        Proxy::to(&address(&place.database_url)).await,
        Proxy::to(&address(&place.broker_url)).await,
    );
    let (database_url, broker_url) = (
        with_address(&place.database_url, database.address),
        with_address(&place.broker_url, broker.address),
    );
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let worker = silent.local_addr().expect("an address").to_string();
    let settings = [
        ("SETTLED_DATABASE_URL", database_url.as_str()),
        ("SETTLED_DATABASE__STATEMENT_TIMEOUT", "1s"),
        ("SETTLED_DATABASE__CLIENT_DEADLINE", "2s"),
        ("SETTLED_DATABASE__CONNECT_TIMEOUT", "2s"),
        ("SETTLED_DATABASE__ACQUIRE_TIMEOUT", "2s"),
        ("SETTLED_BROKER_URL", broker_url.as_str()),
        ("SETTLED_CONSOLE__WORKERS", worker.as_str()),
    ];
    let console = Console::start(&place, &settings).await;
    let ann = console.sign_in().await;
    until("everything was seen once", PATIENCE, async || {
        let page = console.get(&ann, "/").await;
        assert!(
            page.text.contains("no answer within"),
            "the worker never answers: {page:?}"
        );
        (page.text.contains("open letters")
            && page.text.contains("in the queue")
            && !page.text.contains("role=\"alert\""))
        .then_some(())
    })
    .await;
    database.stall();
    broker.stall();
    until("it is said", PATIENCE, async || {
        let began = Instant::now();
        let page = console.get(&ann, "/").await;
        let took = began.elapsed();
        assert_eq!(page.status, 200, "{page:?}");
        assert!(took < Duration::from_secs(3), "a page took {took:?}");
        assert!(
            page.text.contains("open letters") && page.text.contains("in the queue"),
            "what was seen last is there: {page:?}"
        );
        (page.text.matches("What stands here of it is of").count() == 2
            && page.text.contains("the database: ")
            && page.text.contains("the broker: "))
        .then_some(())
    })
    .await;
    // A page that shows what is not there to be seen says so, with its form as it was filled in; and so does an act.
    for (path, holds) in [
        (
            "/letters?partner=acme&since=2h",
            &["value=\"acme\"", "value=\"2h\"", ">Filter<"][..],
        ),
        ("/audit?operator=bob", &["value=\"bob\"", ">Filter<"]),
        ("/ledger?currency=BTC", &["value=\"BTC\"", ">Filter<"]),
        ("/purge?before=1h", &["value=\"1h\"", "Count them"]),
    ] {
        let page = console.get(&ann, path).await;
        assert_eq!(page.status, 503, "{path}: {page:?}");
        for text in holds.iter().chain([&"role=\"alert\"", &"href=\"/audit\""]) {
            assert!(page.text.contains(text), "{path}: {text}: {page:?}");
        }
    }
    let why = ("why", "their key may be stolen");
    for (path, fields) in [
        ("/partners/acme/quarantine", &[why][..]),
        (
            "/plans/1/replay",
            &[why, ("seen", "3"), ("canary", "2"), ("rate", "7"), ("yes_again", "yes")],
        ),
        ("/runs/1/resume", &[why, ("seen", "3"), ("rate", "7")]),
        ("/discard", &[why, ("seen", "3"), ("partner", "acme")]),
        ("/purge", &[why, ("seen", "3"), ("before", "1h")]),
        ("/outbox/retry", &[why, ("seen", "1"), ("id", "7")]),
    ] {
        let page = console.act(&ann, path, fields).await;
        assert_eq!(page.status, 503, "{path}: {page:?}");
        assert!(
            page.text.contains(&format!("action=\"{path}\"")) && page.text.contains("Send it again"),
            "{path}: {page:?}"
        );
        for (name, value) in fields {
            let field = format!("name=\"{name}\"");
            let (_, rest) = page.text.split_once(&field).expect("the field");
            let tag = rest.split('>').next().expect("its end");
            assert!(tag.contains(&format!("value=\"{value}\"")), "{path}: {name}: {page:?}");
        }
    }
    database.open();
    broker.open();
    until("all is well again", 2 * PATIENCE, async || {
        let page = console.get(&ann, "/").await;
        (!page.text.contains("role=\"alert\"")).then_some(())
    })
    .await;
    console.stop().await;
    drop(silent);
}
