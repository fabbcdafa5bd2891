//! What README and the pages have one do works: their SQL, their commands, their rights and their example of a partner.

use std::path::PathBuf;

use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use serde_json::json;

use super::pages::{lines, read, root};
use crate::kit::{
    amqp::Message,
    auditor::Expect,
    support::{PATIENCE, Place, address, said, settled, skip, until, with_path},
};

/// The SQL blocks of a page.
fn sql_of(page: &str) -> String {
    let text = read(page);
    let blocks: Vec<&str> = lines(&text)
        .into_iter()
        .filter(|(fence, line)| *fence == Some("sql") && !line.starts_with("CREATE ROLE"))
        .map(|(_, line)| line)
        .collect();
    blocks.join("\n")
}

/// The login of the operators' page has what the worker needs, and no more is said to be missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grants_of_the_page_are_enough_for_a_worker() {
    let place = Place::new("pages_worker_rights").await;
    let db = place.db().await;
    let role = format!("{}_worker", place.name);
    let output = place.run(&["roles", "--apply"]).await;
    assert!(output.status.success(), "{}", said(&output));
    let page = read("docs/operators.md");
    let sql = lines(&page)
        .into_iter()
        .find(|(fence, line)| *fence == Some("sql") && line.starts_with("CREATE ROLE worker_1"))
        .map(|(_, line)| line.replace("worker_1", &role).replace("'...'", "'secret'"))
        .expect("the login");
    db.batch_execute(&sql).await.expect("made");
    let (before, after) = place.database_url.split_once("://").expect("a URL");
    let (_, after) = after.split_once('@').expect("a user");
    let url = format!("{before}://{role}:secret@{after}");
    let output = settled()
        .args(["doctor", "--json"])
        .env("SETTLED_DATABASE_URL", &url)
        .env("SETTLED_BROKER_URL", &place.broker_url)
        .output()
        .await
        .expect("doctor runs");
    let text = said(&output);
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let wrong: Vec<&str> = found["checks"]
        .as_array()
        .unwrap_or_else(|| panic!("{text}"))
        .iter()
        .filter(|check| check["ok"] == false)
        .filter_map(|check| check["name"].as_str())
        .collect();
    // The place has no topology of its own making to look at here: rights on the broker are not this page's block.
    let of_the_database = [
        "schema",
        "append_only",
        "grants",
        "ownership",
        "rehearsal",
        "outbox",
        "held",
        "keys",
    ];
    let wrong: Vec<&&str> = wrong.iter().filter(|name| of_the_database.contains(*name)).collect();
    assert!(wrong.is_empty(), "{wrong:?}: {text}");
    db.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("gone");
}

/// The SQL of the custody page, with the rights that it says are needed and no others.
#[tokio::test]
async fn the_custody_page_works_as_it_is_written() {
    let place = Place::new("pages_custody").await;
    let db = place.db().await;
    let role = format!("{}_custody", place.name);
    let page = sql_of("docs/custody.md");
    let output = place.run(&["roles", "--apply"]).await;
    assert!(output.status.success(), "{}", said(&output));
    let (call, grants) = page.split_once("GRANT settled_custody").expect("a call and its grant");
    let grants = format!(
        "GRANT settled_custody{}",
        grants.replace("TO custody;", &format!("TO {role};"))
    );
    let connection = "INSERT INTO settled.partners (enterprise_id, name) VALUES ('northwind', 'Northwind');
        INSERT INTO settled.connections
            (connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id)
        VALUES ('632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7', 'northwind', '9838fce3-c125-4af8-a775-a389f5ac26bf', 'cust-42', 'conn-7')";
    db.batch_execute(&format!("{connection}; CREATE ROLE {role}; {grants}; SET ROLE {role}"))
        .await
        .expect("granted");
    let client = "'9838fce3-c125-4af8-a775-a389f5ac26bf'";
    let sql = format!("SELECT settled.deposit({client}, 'BTC', 250000000, 'deposit-1')");
    let result: String = db.query_one(&sql, &[]).await.expect("a deposit").get(0);
    assert_eq!(result, "deposited");
    for expected in ["reserved", "exists"] {
        let row = db
            .query_one(call.trim().trim_end_matches(';'), &[])
            .await
            .expect("a row");
        assert_eq!(row.get::<_, String>("result"), expected);
    }
    // What is added is never changed.
    for statement in [
        "UPDATE settled.transfers SET amount = amount",
        "DELETE FROM settled.transfers",
    ] {
        let error = db.batch_execute(statement).await.expect_err(statement);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{error}");
    }
    db.batch_execute(&format!("RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}"))
        .await
        .expect("gone");
}

/// The lines of a page's `console` blocks below a heading, without the prompt; a line that goes on is one.
fn console(page: &str, heading: &str) -> Vec<String> {
    let text = read(page);
    let (_, section) = text.split_once(heading).unwrap_or_else(|| panic!("{page}: {heading}"));
    let section = section.split("\n## ").next().unwrap_or_default().replace("\\\n", " ");
    lines(&section)
        .into_iter()
        .filter(|(fence, _)| *fence == Some("console"))
        .filter_map(|(_, line)| Some(line.strip_prefix("$ ")?.to_owned()))
        .collect()
}

/// What three pages have one type, from the first partner to the outcome: start, deposit, reserve, explain, publish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_are_typed_from_start_to_settled() {
    let place = Place::new("pages_story").await;
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_settled"));
    let path = format!(
        "{}:{}",
        binary.parent().expect("a directory").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&place.name);
    let type_in = async |line: &str| {
        let mut shell = tokio::process::Command::new("sh");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SETTLED_")) {
            shell.env_remove(name);
        }
        shell
            .args(["-c", line])
            .env("PATH", &path)
            .env("SETTLED_DATABASE_URL", &place.database_url)
            .env("SETTLED_BROKER_URL", &place.broker_url)
            .current_dir(&directory);
        let output = shell.output().await.expect("a shell");
        assert!(output.status.success(), "$ {line}\n{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let start = console("docs/operators.md", "\n## Start");
    assert!(start.len() > 5, "{start:?}");
    for line in start {
        // Where things are is this test's; so is the worker. `doctor` says that no partner has a key yet.
        if !line.starts_with("export ") && line != "settled worker" {
            type_in(line.trim_end_matches(" && settled doctor")).await;
        }
    }
    let [deposit] = &console("docs/custody.md", "\n## Deposit")[..] else {
        panic!("one line")
    };
    assert!(type_in(deposit).await.contains("came in"));
    let [reserve] = &console("docs/custody.md", "\n## Reserve")[..] else {
        panic!("one line")
    };
    assert!(type_in(reserve).await.contains("\"reserved\""));
    let page = read("docs/partners.md");
    let body = page
        .lines()
        .find(|line| line.starts_with('{') && line.contains("\"signature\""))
        .expect("the body");
    std::fs::write(directory.join("body.json"), body).expect("written");
    let example = console("docs/partners.md", "\n## A worked example");
    let explain = example
        .iter()
        .find(|line| line.starts_with("settled explain"))
        .expect("it");
    let judged = type_in(&format!("{explain} --json")).await;
    assert!(judged.contains("\"verdict\":\"settled\""), "{judged}");
    let worker = place.ready_worker(&[]).await;
    place
        .line()
        .publish(&[Message::new("northwind.allocation.update", body, Expect::Any)])
        .await;
    let nonce = "settled receipt --enterprise-id northwind --nonce 2026-11-20-000001 --json";
    until("it has a receipt", PATIENCE, async || {
        let found = place
            .run(&[
                "receipt",
                "--enterprise-id",
                "northwind",
                "--nonce",
                "2026-11-20-000001",
            ])
            .await;
        found.status.success().then_some(())
    })
    .await;
    let receipt: serde_json::Value = serde_json::from_str(&type_in(nonce).await).expect("JSON");
    let subscribers = read("docs/subscribers.md");
    let shown = receipt["eventId"].as_str().expect("an event");
    assert_eq!(receipt["verdict"], "settled");
    assert!(subscribers.contains(shown), "the event of the page is {shown}");
    assert!(type_in("settled ledger check").await.contains("right"));
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The example in Python signs to the byte what the page shows.
#[test]
fn the_partner_in_one_file_makes_the_body_of_the_page() {
    let file = root().join("examples/partner.py");
    let output = match std::process::Command::new("python3")
        .arg(&file)
        .arg("body")
        .env_remove("PARTNER_KEY")
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            return skip(
                "page_examples::the_partner_in_one_file_makes_the_body_of_the_page",
                &format!("no python3: {error}"),
            );
        }
    };
    assert!(output.status.success(), "{}", said(&output));
    let body = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(read("docs/partners.md").lines().any(|line| line == body), "{body}");
}

/// One of a page's users of the broker.
struct User {
    name: String,
    url: String,
}

/// Makes the users of the page, with the rights that its `rabbitmqctl` lines give, on this place's vhost.
async fn users_of_the_page(place: &Place) -> Vec<User> {
    let words =
        |line: &str| -> Vec<String> { line.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect() };
    let lines = console("docs/operators.md", "\n## Broker rights");
    let mut users: Vec<User> = Vec::new();
    for line in &lines {
        let words = words(line);
        let [program, act, _, _, user, rest @ ..] = &words[..] else {
            panic!("{line}")
        };
        assert_eq!(program, "rabbitmqctl");
        let name = format!("{}-{user}", place.name);
        let (what, rights) = match (act.as_str(), rest) {
            ("set_permissions", [configure, write, read]) => {
                let login = json!({"password": "secret", "tags": ""});
                let (status, answer) = place
                    .services
                    .manage("PUT", &format!("/api/users/{name}"), Some(login))
                    .await;
                assert!(matches!(status, 201 | 204), "{status} {answer}");
                let url = format!("amqp://{name}:secret@{}/", address(&place.broker_url));
                users.push(User {
                    name: user.clone(),
                    url: with_path(&url, &place.name),
                });
                let rights = json!({"configure": configure, "write": write, "read": read});
                ("permissions", rights)
            }
            ("set_topic_permissions", [exchange, write, read]) => {
                let rights = json!({"exchange": exchange, "write": write, "read": read});
                ("topic-permissions", rights)
            }
            _ => panic!("{line}"),
        };
        let path = format!("/api/{what}/{}/{name}", place.name);
        let (status, answer) = place.services.manage("PUT", &path, Some(rights)).await;
        assert!(matches!(status, 201 | 204), "{line}: {status} {answer}");
    }
    users
}

async fn channel(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default())
        .await
        .expect("logged in");
    let channel = connection.create_channel().await.expect("a channel");
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .expect("confirms");
    (connection, channel)
}

/// With the rights of the page whoever declares declares, a worker has what it needs, and a partner speaks and hears for itself
/// only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_of_the_page_are_enough_and_keep_partners_apart() {
    let place = Place::new("pages_rights").await;
    let users = users_of_the_page(&place).await;
    let url = |name: &str| users.iter().find(|user| user.name == name).expect(name).url.clone();
    let as_user = async |name: &str, command: &str| {
        settled()
            .args([command, "--json"])
            .env("SETTLED_DATABASE_URL", &place.database_url)
            .env("SETTLED_BROKER_URL", url(name))
            .output()
            .await
            .expect("it runs")
    };
    let output = as_user("admin", "topology").await;
    assert!(output.status.success(), "{}", said(&output));
    let output = as_user("worker", "doctor").await;
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = found["checks"].as_array().expect("checks");
    let of_the_broker = |name: &str| {
        ["permission ", "queue ", "exchange ", "broker"]
            .iter()
            .any(|head| name.starts_with(head))
    };
    let looked_at = checks
        .iter()
        .filter(|check| check["name"].as_str().is_some_and(of_the_broker));
    let wrong: Vec<_> = looked_at.clone().filter(|check| check["ok"] == false).collect();
    assert!(looked_at.count() > 10 && wrong.is_empty(), "{}", said(&output));

    let queue = "northwind.outcomes";
    let (_connection, own) = channel(&url("northwind")).await;
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    own.queue_declare(queue.into(), durable, FieldTable::default())
        .await
        .expect("its own queue");
    for (key, is_allowed) in [
        ("*.*.northwind", true),
        ("#", false),
        ("*.*.acme", false),
        ("update.rejected", false),
    ] {
        let (_connection, channel) = channel(&url("northwind")).await;
        let bound = channel
            .queue_bind(
                queue.into(),
                "settlement.events".into(),
                key.into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await;
        assert_eq!(bound.is_ok(), is_allowed, "bind {key}: {bound:?}");
    }
    for (exchange, key, is_allowed) in [
        ("settlement.updates", "northwind.allocation.update", true),
        ("settlement.updates", "acme.allocation.update", false),
        ("settlement.events", "allocation.cleared.northwind", false),
        ("settlement.dead", "northwind.allocation.update", false),
        ("", "settlement.updates", false),
    ] {
        let (_connection, channel) = channel(&url("northwind")).await;
        let sent = channel
            .basic_publish(
                exchange.into(),
                key.into(),
                BasicPublishOptions::default(),
                b"{}",
                BasicProperties::default(),
            )
            .await
            .expect("it is written");
        assert_eq!(sent.await.is_ok(), is_allowed, "publish to {exchange:?} under {key}");
    }
    for user in &users {
        let name = format!("{}-{}", place.name, user.name);
        place
            .services
            .manage("DELETE", &format!("/api/users/{name}"), None)
            .await;
    }
}
