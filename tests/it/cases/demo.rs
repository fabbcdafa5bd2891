//! The whole story, as a newcomer plays it.

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use serde_json::{Value, json};

use crate::kit::{
    command::Answer,
    console::{Console, Visitor},
    private::Private,
    program::Program,
    proxy::Proxy,
    support::{Ground, PATIENCE, Place, address, connect, run, skip, until, with_address},
};

/// Every message is accounted for, those too whose dead letter holds a part of them only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_story_adds_up() {
    let ground = Ground::new("demo").await;
    ground.create_database("template0").await;
    let told = ground.json(&["demo", "--messages", "400"]).await;
    assert_eq!(told["ok"], true, "{told}");
    assert_eq!(
        (&told["unaccounted"], &told["wrong"]),
        (&json!(0), &json!([])),
        "{told}"
    );
    let reasons = told["reasons"].to_string();
    assert!(
        reasons.contains("message_too_large"),
        "a story with messages that are too large: {reasons}"
    );
}

/// The worker of the story owns nothing: it logs in as a member of `settled_worker` and of nothing else, and whoever registers and
/// reserves has a login too. None of them is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_of_the_story_is_not_the_owner() {
    let ground = Ground::new("demo_roles").await;
    ground.create_database("template0").await;
    let db = ground.db().await;
    // Who settles, publishes and looks into the side room; and of which roles each of them is a member.
    let works = "SELECT DISTINCT a.usename::text, ARRAY(
                     SELECT g.rolname::text FROM pg_auth_members AS m JOIN pg_roles AS g ON g.oid = m.roleid
                     WHERE m.member = a.usesysid
                 )
                 FROM pg_stat_activity AS a
                 WHERE a.datname = current_database() AND a.query ~ '^/\\* (batch|held|outbox)::'";
    let mut seen = BTreeSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let demo = ground.json(&["demo", "--messages", "300"]);
    tokio::pin!(demo);
    let told = loop {
        tokio::select! {
            told = &mut demo => break told,
            _ = ticks.tick() => {
                let rows = db.query(works, &[]).await.expect("sessions");
                seen.extend(rows.iter().map(|row| (row.get::<_, String>(0), row.get::<_, Vec<String>>(1))));
            }
        }
    };
    assert_eq!(told["ok"], true, "{told}");
    let logins: Vec<&(String, Vec<String>)> = seen.iter().collect();
    let [(worker, roles)] = logins[..] else {
        panic!("one login works: {seen:?}");
    };
    assert!(worker.starts_with("settled_demo_worker_"), "{seen:?}");
    assert_eq!(roles, &["settled_worker"]);
    let acts = "SELECT DISTINCT session_name FROM settled.audit";
    let acts: Vec<String> = db
        .query(acts, &[])
        .await
        .expect("acts")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        acts.len() == 1 && acts[0].starts_with("settled_demo_registrar_"),
        "one login registers and pays in: {acts:?}"
    );
    let left = "SELECT count(*) FROM pg_roles WHERE rolname IN ($1, $2)";
    let left: i64 = db.query_one(left, &[worker, &acts[0]]).await.expect("a count").get(0);
    assert_eq!(left, 0, "the logins are taken away again");
}

/// Where the login that was given may make none, as on some managed servers, the story says so and is told all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_make_no_login_plays_the_story_alone() {
    let ground = Ground::new("demo_alone").await;
    ground.create_database("template0").await;
    let login = format!("{}_owner", ground.name);
    let admin = connect(&ground.services.database).await;
    admin
        .batch_execute(&format!(
            "CREATE ROLE {login} LOGIN PASSWORD 'p'; ALTER DATABASE {} OWNER TO {login}",
            ground.name
        ))
        .await
        .expect("an owner");
    let words = ["demo", "--messages", "300", "--json"];
    let output = run(&ground.database_url_of(&login), &ground.broker_url, &words, "").await;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {complaint}"));
    assert_eq!(told["ok"], true, "{told}");
    assert!(complaint.contains("no logins can be made here"), "{complaint}");
    ground
        .db()
        .await
        .batch_execute(&format!(
            "REASSIGN OWNED BY {login} TO CURRENT_USER; DROP OWNED BY {login}; DROP ROLE {login}"
        ))
        .await
        .expect("gone");
}

/// The same where the worker, PostgreSQL and RabbitMQ are killed meanwhile, and with them the node that it stands on itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_story_adds_up_whoever_is_killed() {
    let private = match Private::start().await {
        Ok(private) => private,
        Err(why) => return skip("demo::the_story_adds_up_whoever_is_killed", &why),
    };
    let ground = Ground::within(private.services.clone(), "demo_chaos").await;
    ground.create_database("template0").await;
    let tool = private.tool();
    let tool = tool.to_str().expect("a path");
    let mut command = ground.command(&["demo", "--messages", "2000", "--chaos", "--services", tool, "--json"]);
    let told = tokio::time::timeout(PATIENCE * 3, command.output())
        .await
        .expect("it ends")
        .expect("it runs");
    // It tells the story as it goes, on stderr.
    let answer = Answer::of(&told);
    assert!(answer.succeeded(), "{}", answer.all());
    let told: Value = serde_json::from_str(&answer.out).expect("a document");
    assert_eq!(told["ok"], true, "{told}");
    assert_eq!(
        (&told["unaccounted"], &told["wrong"]),
        (&json!(0), &json!([])),
        "{told}"
    );
}

/// A simulation whose own connections are lost, and refused for a while, goes on where it was: its queue of events is there still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_simulation_goes_on_when_its_node_is_lost() {
    let place = Place::new("simulate_cut").await;
    let _worker = place.ready_worker(&[]).await;
    let proxy = Proxy::to(&address(&place.broker_url)).await;
    let mut command = place.command(&["simulate", "--messages", "900", "--rate", "300", "--json"]);
    command
        .env("SETTLED_BROKER_URL", with_address(&place.broker_url, proxy.address))
        .kill_on_drop(true);
    let running = tokio::spawn(async move { command.output().await.expect("it runs") });
    for told in [100, 400] {
        until("it is under way", PATIENCE, async || {
            assert!(!running.is_finished(), "it ended before it was cut");
            (place.events.seen().len() > told).then_some(())
        })
        .await;
        let before = proxy.injected();
        proxy.refuse();
        until("its connections are gone", PATIENCE, async || {
            (proxy.injected() >= before + 2).then_some(())
        })
        .await;
        proxy.open();
    }
    let ended = tokio::time::timeout(PATIENCE, running)
        .await
        .expect("it ends")
        .expect("no panic");
    let report = Answer::of(&ended).document(0);
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(report["messages"], 900, "{report}");
}

/// What `make demo CONSOLE=1` leaves open once the story is told: a console on it, with its link printed, and a worker that it
/// shows. Ctrl-C ends both in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_console_is_left_open_on_the_story() {
    let ground = Ground::new("demo_console").await;
    ground.create_database("template0").await;
    ground.json(&["demo", "--messages", "300"]).await;
    let settled = ground.command(&[]);
    let mut command = tokio::process::Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/demo-console"));
    command.arg(settled.as_std().get_program());
    for (name, value) in settled.as_std().get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let (told, log) = (ground.file("demo-console.out"), ground.file("demo-console.log"));
    // A group of its own, as a terminal gives it: Ctrl-C reaches all of it.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&told).expect("a file"));
    let program = Program::start("the demo's console", &mut command, log);
    let link = until("its link is printed", PATIENCE, async || {
        program.still_runs();
        let text = std::fs::read_to_string(&told).unwrap_or_default();
        let link = text.lines().find_map(|line| line.strip_prefix("open once: http://"));
        link.map(str::to_owned)
    })
    .await;
    let (address, secret) = link.split_once("/enter?link=").expect("an address and a secret");
    let console = Console::at(address);
    let entered = console
        .post(&Visitor::default(), "/enter", &format!("link={secret}"))
        .await;
    assert_eq!(entered.status, 303, "{entered:?}");
    let visitor = Visitor {
        cookie: entered.cookie(),
        ..Visitor::default()
    };
    until("the worker and the story's partners are shown", PATIENCE, async || {
        let page = console.get(&visitor, "/").await;
        let shown = ["</b>ready</span>", "/partners/acme", "/partners/globex"];
        shown.iter().all(|text| page.text.contains(text)).then_some(())
    })
    .await;
    until("its letters are collected", PATIENCE, async || {
        let page = console.get(&visitor, "/letters?state=open").await;
        page.text.contains("href=\"/letters/").then_some(())
    })
    .await;
    let group = program.id().expect("it runs");
    let interrupt = format!("kill -INT -{group}");
    let sent = std::process::Command::new("sh").args(["-c", &interrupt]).status();
    assert!(sent.expect("a shell").success());
    assert_eq!(program.end().await.code(), Some(0), "{}", program.said());
    assert!(
        tokio::net::TcpStream::connect(address).await.is_err(),
        "it ended with the console"
    );
}
