//! What is registered: changed, listed, shown, and what is said where something else is registered already.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::kit::{
    command::{Answer, add_partner, ask, ask_in, ledger, register},
    partner::Partner,
    support::Place,
};

/// The newest act of the audit.
async fn last_act(ground: &crate::kit::support::Ground) -> Value {
    let mut acts = ask(ground, &["audit", "list", "--limit", "1"]).await.lines(0);
    acts.pop().unwrap_or_default()
}

#[tokio::test]
async fn a_partner_is_changed_field_by_field() {
    let ground = ledger("set").await;
    add_partner(&ground, "acme").await;
    let before = ask(&ground, &["partner", "list"]).await.document(0)[0].clone();
    assert_eq!(before["brokerUser"], Value::Null);
    let set = ["partner", "set", "--enterprise-id", "acme"];
    let by = ["--operator", "nora", "--reason", "ticket 8"];
    let steps: [(&[&str], &str, Value, Value); 7] = [
        (&["--name", "Acme AG"], "name", before["name"].clone(), json!("Acme AG")),
        (&["--broker-user", "acme"], "brokerUser", Value::Null, json!("acme")),
        (&["--broker-user", "acme2"], "brokerUser", json!("acme"), json!("acme2")),
        (&["--no-broker-user"], "brokerUser", json!("acme2"), Value::Null),
        (
            &["--no-async-allocations"],
            "asyncAllocations",
            json!(true),
            json!(false),
        ),
        (&["--async-allocations"], "asyncAllocations", json!(false), json!(true)),
        (
            &["--async-deallocations", "off"],
            "asyncDeallocations",
            json!(true),
            json!(false),
        ),
    ];
    let mut expected = before.clone();
    for (flags, field, from, to) in steps {
        let told = ask(&ground, &[&set, flags, &by].concat()).await.document(0);
        expected[field] = to.clone();
        let changed = json!({field: {"from": from, "to": to}});
        let mut all = expected.clone();
        all["result"] = json!("updated");
        all["changed"] = changed.clone();
        assert_eq!(told, all, "{flags:?}");
        let act = last_act(&ground).await;
        assert_eq!(
            (
                &act["act"],
                &act["operator"],
                &act["why"],
                &act["filters"],
                &act["outcome"]
            ),
            (
                &json!("partner set"),
                &json!("nora"),
                &json!("ticket 8"),
                &json!({"enterpriseId": "acme"}),
                &changed
            )
        );
        // Again it is so already, and nothing is written down.
        let told = ask(&ground, &[&set, flags].concat()).await.document(0);
        assert_eq!((&told["result"], &told["changed"]), (&json!("exists"), &json!({})));
        assert_eq!(last_act(&ground).await, act, "{flags:?}");
    }
    assert_eq!(ask(&ground, &["partner", "list"]).await.document(0)[0], expected);

    // Several at a time, the partner by its place, in words.
    let words = [
        "partner",
        "set",
        "acme",
        "--name",
        "A\u{202e}B",
        "--async-deallocations",
    ];
    let told = Answer::of(&ground.run(&words).await);
    assert!(told.succeeded(), "{}", told.all());
    assert!(
        told.out.contains("asynchronous deallocations was no, is yes now")
            && told.out.contains(r#"name was "Acme AG", is "A\u{202e}B" now"#)
            && told.err.is_empty(),
        "{}",
        told.all()
    );
    let told = Answer::of(&ground.run(&words).await);
    assert!(told.out.contains("it is so already"), "{}", told.all());
}

#[tokio::test]
async fn what_can_not_be_set_is_refused() {
    let ground = ledger("set_refused").await;
    add_partner(&ground, "acme").await;
    ask(&ground, &["partner", "set", "nobody", "--name", "x"])
        .await
        .refused(1, "no partner nobody is registered");
    for words in [
        &["partner", "set", "acme"][..],
        &["partner", "set", "--name", "x"],
        &["partner", "set", "acme", "--enterprise-id", "acme", "--name", "x"],
        &["partner", "set", "acme", "--broker-user", "u", "--no-broker-user"],
        &["partner", "set", "acme", "--own-queue", "--no-own-queue"],
        &["partner", "set", "acme", "--own-queue", "perhaps"],
        &["partner", "set", "acme", "--name", ""],
        &["partner", "set", "a.b", "--name", "x"],
        &["partner", "set", "acme", "--name", "x", "--wait", "soon"],
    ] {
        ask(&ground, words).await.refusal(2);
    }
}

#[tokio::test]
async fn other_content_is_said_field_by_field() {
    let ground = ledger("other_content").await;
    let add = ["partner", "add", "--enterprise-id", "acme"];
    ask(&ground, &[&add, &["--name", "Acme", "--broker-user", "u"][..]].concat())
        .await
        .document(0);
    let given = ["--name", "Acme's", "--no-async-deallocations"];
    let (message, hint) = ask(&ground, &[&add, &given[..]].concat()).await.refusal(1);
    for piece in [
        r#"its name is "Acme", and "Acme's" was given"#,
        "asynchronous deallocations are enabled, and \"not enabled\" was given",
        r#"it is bound to the broker user "u", and no broker user was given"#,
    ] {
        assert!(message.contains(piece), "{piece} is not in {message}");
    }
    // The command that it names does what it says.
    let command = hint.strip_prefix("to change it: settled ").expect("a command");
    let words = [
        "partner",
        "set",
        "acme",
        "--no-async-deallocations",
        "--no-broker-user",
        "--name",
        "Acme's",
    ];
    assert_eq!(
        command,
        "partner set acme --no-async-deallocations --no-broker-user --name 'Acme'\\''s'"
    );
    ask(&ground, &words).await.document(0);
    let told = ask(&ground, &[&add, &given[..]].concat()).await.document(0);
    assert_eq!(told["result"], "exists");
}

#[tokio::test]
async fn connections_are_listed_and_shown() {
    let ground = ledger("connections_shown").await;
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    register(&ground, &acme).await;
    register(&ground, &beta).await;
    let all = ask(&ground, &["connection", "list"]).await.document(0);
    assert_eq!(all.as_array().map(Vec::len), Some(2));
    for flag in ["--partner", "--enterprise-id"] {
        let one = ask(&ground, &["connection", "list", flag, "acme"]).await.document(0);
        assert_eq!(one, json!([all[0]]));
    }
    let id = acme.connection.to_string();
    let shown = ask(&ground, &["connection", "show", &id.to_uppercase()])
        .await
        .document(0);
    assert_eq!(shown, all[0]);
    assert_eq!(shown["connectionId"], json!(id));
    let words = Answer::of(&ground.run(&["connection", "show", &id]).await);
    assert!(
        words.succeeded() && words.out.contains(&acme.partners_client),
        "{}",
        words.all()
    );
    ask(&ground, &["connection", "show", &Uuid::new_v4().to_string()])
        .await
        .refused(1, "no connection");
    ask(&ground, &["connection", "show", "x"])
        .await
        .refused(2, "36 characters");

    // Another connection of that id: what differs, and that nothing changes it.
    let (connection, client) = (acme.connection.to_string(), Uuid::new_v4().to_string());
    let add = [
        "connection",
        "add",
        "--connection-id",
        &connection,
        "--enterprise-id",
        "beta",
        "--client-id",
        &client,
        "--partners-client-id",
        &acme.partners_client,
        "--partners-connection-id",
        "other",
    ];
    let (message, hint) = ask(&ground, &add).await.refusal(1);
    for piece in [
        "its partner is acme, and beta was given".to_owned(),
        format!("its client is {}, and {client} was given", acme.client),
        format!(
            "the partner's connection is {:?}, and \"other\" was given",
            acme.partners_connection
        ),
    ] {
        assert!(message.contains(&piece), "{piece} is not in {message}");
    }
    assert!(!message.contains("the partner's client is"), "{message}");
    assert!(hint.contains("no command changes a connection"), "{hint}");
}

/// Without a worker: an empty queue of one's own goes at once, one with messages stays with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_own_queue_goes_only_when_nothing_is_in_it() {
    let place = Place::new("own_off").await;
    let partner = Partner::new("beta");
    place.register(&partner).await;
    let queue = async || {
        let path = format!("/api/queues/{}/settlement.updates.beta", place.name);
        place.services.manage("GET", &path, None).await.0
    };
    let set = |switch: &'static str| ["partner", "set", "beta", "--own-queue", switch];
    for result in ["updated", "exists"] {
        let told = place.json(&set("on")).await;
        assert_eq!((&told["result"], &told["ownQueue"]), (&json!(result), &json!(true)));
        assert_eq!(queue().await, 200);
    }
    place.deposit(&partner, "BTC", "9").await;
    let reservation = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reservation)).await;
    place.publish(&[partner.cleared(&reservation)]).await;
    assert_eq!(place.line().depth("settlement.updates.beta").await, 1);
    // Nobody settles it: nothing is changed, and it stays where it is.
    let began = std::time::Instant::now();
    ask(&place, &set("off")).await.refused(
        1,
        "settlement.updates.beta holds 1 messages and nobody consumes it; nothing was changed",
    );
    assert!(began.elapsed().as_secs() < 10);
    assert_eq!(place.line().depth("settlement.updates.beta").await, 1);
    let told = place.json(&["partner", "list"]).await;
    assert_eq!(told[0]["ownQueue"], true);

    // Somebody changed the registry by hand: what waits there is not forgotten.
    let db = place.db().await;
    let by_hand = "UPDATE settled.partners SET own_queue = $1";
    db.execute(by_hand, &[&false]).await.expect("changed");
    let doctor = Answer::of(&place.run(&["doctor", "--json"]).await);
    assert!(
        doctor.code == Some(1)
            && doctor
                .out
                .contains("nobody's own any more, and there is 1 message in it"),
        "{}",
        doctor.all()
    );
    db.execute(by_hand, &[&true]).await.expect("changed");

    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
    // No worker and nothing in it: it goes.
    let told = place.json(&set("off")).await;
    assert_eq!(
        (&told["result"], &told["ownQueue"], &told["queue"]),
        (&json!("updated"), &json!(false), &json!("empty, and deleted"))
    );
    assert_eq!(queue().await, 404);
    let told = place.json(&set("off")).await;
    assert_eq!((&told["result"], told.get("queue")), (&json!("exists"), None));
    // And its messages go to the common queue.
    let next = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&next)).await;
    place.publish(&[partner.cleared(&next)]).await;
    assert_eq!(place.line().depth("settlement.updates").await, 1);
    let worker = place.ready_worker(&[]).await;
    place.settle_up(worker).await;
}

/// Every setting, and who has the word; a password nowhere.
#[tokio::test]
async fn settings_are_shown_with_where_they_come_from() {
    let ground = ledger("config_show").await;
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.toml", ground.name));
    std::fs::write(&path, "[worker]\nlanes = 3\n").expect("a file");
    let file = path.display().to_string();
    let secret = "hunter2hunter2";
    let url = format!("amqp://somebody:{secret}@localhost:1/v");
    let variables = [("SETTLED_PARK__DEADLINE", "2s"), ("SETTLED_DATABASE_URL", "")];
    let words = [
        "config",
        "show",
        "--config",
        &file,
        "--broker-url",
        &url,
        "--set",
        "log.level=debug",
    ];
    let answer = ask_in(&variables, &words).await;
    assert!(!answer.all().contains(secret), "{}", answer.all());
    let settings = answer.document(0);
    let of = |setting: &str| {
        let mut all = settings.as_array().expect("a list").iter();
        all.find(|told| told["setting"] == setting).expect(setting).clone()
    };
    assert_eq!(
        of("worker.lanes"),
        json!({"setting": "worker.lanes", "value": 3, "from": {"kind": "file", "name": file, "line": 2}})
    );
    assert_eq!(
        of("park.deadline"),
        json!({
            "setting": "park.deadline", "value": "2s",
            "from": {"kind": "environment", "name": "SETTLED_PARK__DEADLINE"},
        })
    );
    assert_eq!(
        of("broker.url"),
        json!({
            "setting": "broker.url", "value": "amqp://somebody:***@localhost:1/v",
            "from": {"kind": "flag"}, "flag": "--broker-url",
        })
    );
    assert_eq!(
        (&of("log.level")["value"], &of("log.level")["flag"]),
        (&json!("debug"), &json!("--set"))
    );
    assert_eq!(
        of("worker.batch_max"),
        json!({"setting": "worker.batch_max", "value": 256, "from": {"kind": "default"}})
    );
    assert_eq!(of("database.pool_size")["derived"], "worker.lanes + 4");
    let mut command = ground.command(&words);
    let said = Answer::of(&command.output().await.expect("settled runs"));
    assert!(said.succeeded() && !said.all().contains(secret), "{}", said.all());
    assert!(
        said.out.contains(&format!("{file}, line 2")) && said.out.contains("flag --broker-url"),
        "{}",
        said.all()
    );
    std::fs::remove_file(&path).expect("it goes");
}

/// Tables are as wide as COLUMNS says where there is no terminal, and what others wrote has no line and no colour.
#[tokio::test]
async fn tables_fit_and_nothing_steers_the_terminal() {
    let ground = ledger("tables").await;
    let name = "a partner with a long name that goes on for much longer than a line of a terminal";
    for enterprise in ["acme", "beta"] {
        let add = ["partner", "add", "--enterprise-id", enterprise, "--name", name];
        ask(&ground, &add).await.document(0);
    }
    let listed = async |columns: Option<&str>, flags: &[&str]| {
        let mut command = ground.command(&[&["partner", "list"], flags].concat());
        command.env_remove("COLUMNS");
        if let Some(columns) = columns {
            command.env("COLUMNS", columns);
        }
        let answer = Answer::of(&command.output().await.expect("settled runs"));
        assert!(answer.succeeded(), "{}", answer.all());
        answer.out
    };
    let whole = listed(None, &[]).await;
    assert_eq!(whole.lines().count(), 4, "{whole}");
    assert!(whole.lines().any(|line| line.contains(name)), "{whole}");
    for columns in ["80", "100", "120"] {
        let fitted = listed(Some(columns), &[]).await;
        let most: usize = columns.parse().expect("a number");
        assert!(
            fitted.lines().all(|line| line.chars().count() <= most),
            "{columns}: {fitted}"
        );
        // Broken where it must be, or one below the other with its names, it is all there.
        let letters = |text: &str| text.chars().filter(|letter| letter.is_alphanumeric()).count();
        assert!(letters(&fitted) >= letters(&whole), "{columns}: {fitted}");
    }
    assert_eq!(listed(Some("80"), &["--wide"]).await, whole);
    for columns in ["", "0", "wide", "1"] {
        assert_eq!(listed(Some(columns), &[]).await, whole, "{columns:?}");
    }
    // A complaint is one line with its hint, whatever was typed.
    let answer = Answer::of(
        &ground
            .run(&["partner", "list", "--config", "a\x1b[31mb\nsettled: c\u{202e}"])
            .await,
    );
    assert_eq!(answer.code, Some(2));
    assert!(!answer.err.contains(['\x1b', '\u{202e}']), "{:?}", answer.err);
    assert_eq!(answer.err.lines().count(), 2, "{}", answer.err);
}

/// Made-up money goes only where nobody's is, or where that is said.
#[tokio::test]
async fn a_simulation_asks_before_it_adds_to_somebodys_database() {
    let place = Place::new("simulated").await;
    add_partner(&place, "acme").await;
    let simulate = ["simulate", "--messages", "10", "--timeout", "1s"];
    let (message, hint) = ask(&place, &simulate).await.refusal(1);
    assert!(
        message.contains("partners that no simulation made (acme); nothing was added"),
        "{message}"
    );
    assert!(
        hint.contains("--yes-into-this-database") && hint.contains("4 partners with a key and a connection each"),
        "{hint}"
    );
    let partners = place.json(&["partner", "list"]).await;
    assert_eq!(partners.as_array().map(Vec::len), Some(1));
    let worker = place.ready_worker(&[]).await;
    let meant = ["simulate", "--messages", "20", "--yes-into-this-database"];
    let answer = Answer::of(&place.run(&meant).await);
    assert!(
        answer.succeeded() && answer.err.contains("adds 4 partners"),
        "{}",
        answer.all()
    );
    worker.terminate().await;
    // Only its own are there: it need not be said.
    let other = Place::new("simulated_twice").await;
    let worker = other.ready_worker(&[]).await;
    for _ in 0..2 {
        let report = other.json(&["simulate", "--messages", "20"]).await;
        assert_eq!(report["ok"], true, "{report}");
    }
    worker.terminate().await;
}
