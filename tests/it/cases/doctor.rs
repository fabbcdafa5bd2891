//! `settled doctor`: each thing that it looks at is broken for real, and its line says so while the others stay well.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::{Line, Message},
    auditor::Expect,
    command::{Answer, NOWHERE, ask_in},
    partner::Partner,
    postgres::Server,
    support::{Beside, Ground, address, skip, userinfo, with_address},
};

/// The lines about the database, where all is well.
const DATABASE: [&str; 19] = [
    "database",
    "schema",
    "append_only",
    "functions",
    "everybody",
    "grants",
    "ownership",
    "rehearsal",
    "clock",
    "limits",
    "synchronous_commit",
    "standbys",
    "fsync",
    "keys",
    "open_dead_letters",
    "outbox",
    "dead_letter_space",
    "outbox_refused",
    "held",
];

/// The lines about the broker.
const BROKER: [&str; 30] = [
    "broker",
    "partners_apart",
    "updates",
    "dead_letters",
    "unreadable",
    "management",
    "exchange settlement.unreadable",
    "exchange settlement.dead",
    "exchange settlement.dead.broker",
    "exchange settlement.updates.all",
    "exchange settlement.updates",
    "exchange settlement.epoch",
    "exchange settlement.events",
    "queue settlement.unreadable",
    "queue settlement.dead",
    "queue settlement.dead.broker",
    "queue settlement.updates",
    "queue settlement.epoch",
    "queue settlement.dead.broker.*",
    "permission to publish to settlement.events",
    "permission to publish to settlement.dead",
    "permission to publish to settlement.unreadable",
    "permission to publish to settlement.epoch",
    "permission to consume settlement.updates",
    "permission to consume settlement.dead",
    "permission to consume settlement.dead.broker",
    "permission to consume settlement.epoch",
    "permission to consume settlement.dead.broker.*",
    "alarms",
    "epoch",
];

/// What is looked at at the broker only where the database says its name.
const OF_THE_BOOKS: [&str; 2] = [
    "permission to consume settlement.dead.broker.*",
    "queue settlement.dead.broker.*",
];

/// What the doctor said, line by line.
struct Visit {
    lines: BTreeMap<String, Said>,
}

struct Said {
    ok: bool,
    detail: String,
    hint: String,
}

impl Visit {
    fn of(answer: &Answer) -> Self {
        let all_well = answer.succeeded();
        let document = answer.document(i32::from(!all_well));
        assert_eq!(document["ok"], all_well);
        let keys: BTreeSet<&str> = document
            .as_object()
            .expect("an object")
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(keys, BTreeSet::from(["ok", "checks"]));
        let mut lines = BTreeMap::new();
        for check in document["checks"].as_array().expect("lines") {
            let keys: BTreeSet<&str> = check
                .as_object()
                .expect("an object")
                .keys()
                .map(String::as_str)
                .collect();
            assert_eq!(keys, BTreeSet::from(["name", "ok", "detail", "hint"]));
            let line = Said {
                ok: check["ok"].as_bool().expect("yes or no"),
                detail: check["detail"].as_str().expect("a sentence").to_owned(),
                hint: check["hint"].as_str().unwrap_or_default().to_owned(),
            };
            let name = check["name"].as_str().expect("a name").to_owned();
            assert!(lines.insert(name.clone(), line).is_none(), "{name} twice");
        }
        assert_eq!(all_well, lines.values().all(|line| line.ok));
        Self { lines }
    }

    fn names(&self) -> BTreeSet<&str> {
        self.lines.keys().map(String::as_str).collect()
    }

    /// Says every line, for a failure's message.
    fn said(&self) -> String {
        let line = |(name, line): (&String, &Said)| format!("{} {name}: {} ({})", line.ok, line.detail, line.hint);
        self.lines.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[track_caller]
    fn line(&self, name: &str) -> &Said {
        self.lines
            .get(name)
            .unwrap_or_else(|| panic!("no line {name}:\n{}", self.said()))
    }

    /// Exactly these lines tell of a problem, each with a hint; every other one is there and well.
    #[track_caller]
    fn assert_problems(&self, problems: &[&str], absent: &[&str]) {
        let found = self.lines.iter().filter(|(_, line)| !line.ok);
        let found: BTreeSet<&str> = found.map(|(name, _)| name.as_str()).collect();
        assert_eq!(found, problems.iter().copied().collect(), "\n{}", self.said());
        for name in problems {
            let line = self.line(name);
            assert!(
                !line.hint.is_empty() && !line.detail.is_empty(),
                "{name} has no hint:\n{}",
                self.said()
            );
        }
        let expected = ["settings"].iter().chain(&DATABASE).chain(&BROKER);
        let expected: BTreeSet<&str> = expected.copied().filter(|name| !absent.contains(name)).collect();
        let missing: Vec<_> = expected.difference(&self.names()).copied().collect();
        assert!(missing.is_empty(), "not said: {missing:?}\n{}", self.said());
    }

    /// The same, and what the problem's line says.
    #[track_caller]
    fn assert_problem(&self, name: &str, piece: &str) {
        self.assert_problems(&[name], &[]);
        let detail = &self.line(name).detail;
        assert!(detail.contains(piece), "{name}: {piece:?} is not in {detail:?}");
    }
}

async fn visit_with(database: &str, broker: &str, more: &[(&str, &str)]) -> Visit {
    let urls = [("SETTLED_DATABASE_URL", database), ("SETTLED_BROKER_URL", broker)];
    Visit::of(&ask_in(&[&urls, more].concat(), &["doctor"]).await)
}

async fn visit(ground: &Ground) -> Visit {
    visit_with(&ground.database_url, &ground.broker_url, &[]).await
}

async fn succeed(ground: &Ground, arguments: &[&str]) {
    ground.json(arguments).await;
}

/// A place where all is well: schema, topology, a partner with a key.
async fn well(test: &str) -> Ground {
    let ground = Ground::new(test).await;
    ground.copy_template().await;
    succeed(&ground, &["topology"]).await;
    add_partner(&ground, "acme").await;
    add_key(&ground, "acme", &[]).await;
    visit(&ground).await.assert_problems(&[], &[]);
    ground
}

async fn add_partner(ground: &Ground, enterprise: &str) {
    succeed(
        ground,
        &["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"],
    )
    .await;
}

async fn add_key(ground: &Ground, enterprise: &str, flags: &[&str]) -> String {
    let key = Partner::new(enterprise).public_key();
    let add = ["key", "add", "--enterprise-id", enterprise, "--public-key", &key];
    succeed(ground, &[&add, flags].concat()).await;
    key
}

async fn execute(db: &Client, sql: &str) {
    db.batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

#[tokio::test]
async fn where_all_is_well_every_line_says_so() {
    let ground = well("well").await;
    let found = visit(&ground).await;
    let expected: BTreeSet<&str> = ["settings"].iter().chain(&DATABASE).chain(&BROKER).copied().collect();
    assert_eq!(found.names(), expected);
    for (line, version) in [("database", "PostgreSQL "), ("broker", "RabbitMQ ")] {
        assert!(found.line(line).detail.starts_with(version), "{}", found.said());
    }
    // For a person the same, one line each.
    let output = ground.run(&["doctor"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &[][..]));
    // The user of these tests owns everything, and management is not asked: hints; and others by the servers' versions.
    let (hints, lines): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.trim_start().starts_with("hint: "));
    assert!(lines.len() == expected.len() + 1 && hints.len() >= 2, "{text}");
    assert!(
        text.lines().last().is_some_and(|last| last.contains("all well")),
        "{text}"
    );
    // And a problem is marked, with what to do about it.
    execute(&ground.db().await, "DROP TRIGGER append_only ON settled.transfers").await;
    let output = ground.run(&["doctor"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(1), &[][..]));
    let mut lines = text.lines().skip_while(|line| !line.starts_with("PROBLEM"));
    assert!(lines.next().is_some_and(|line| line.contains("append_only")), "{text}");
    assert!(lines.next().is_some_and(|line| line.contains("hint: ")), "{text}");
    let found = format!("1 of {} checks found a problem", expected.len());
    assert!(text.contains(&found), "{text}");
}

#[tokio::test]
async fn what_is_away_is_a_line_and_the_rest_is_still_looked_at() {
    let ground = well("away").await;
    let (database, broker) = (ground.database_url.as_str(), ground.broker_url.as_str());
    let (user, password) = userinfo(database);
    let others = DATABASE.into_iter().filter(|name| *name != "database");
    let others: Vec<&str> = others.chain(OF_THE_BOOKS).collect();
    for (url, piece) in [
        (format!("postgres://{user}:{password}@{NOWHERE}/x"), "refused"),
        (database.replace(password, "wrong"), "password authentication failed"),
        (format!("{database}_missing"), "does not exist"),
        ("postgres://u@192.0.2.1/x".to_owned(), "encryption"),
        (String::new(), "no database is configured"),
    ] {
        let found = visit_with(&url, broker, &[]).await;
        found.assert_problems(&["database"], &others);
        assert!(found.line("database").detail.contains(piece), "{}", found.said());
        assert!(!found.said().contains(password), "{}", found.said());
    }
    let (user, password) = userinfo(broker);
    let others: Vec<&str> = BROKER.into_iter().filter(|name| *name != "broker").collect();
    for (url, piece) in [
        (format!("amqp://{user}:{password}@{NOWHERE}/x"), "refused"),
        (broker.replace(password, "wrong"), "ACCESS_REFUSED"),
        (format!("{broker}_missing"), "not found"),
        ("amqp://u:p@192.0.2.1/x".to_owned(), "in the clear"),
        (String::new(), "no broker is configured"),
    ] {
        let found = visit_with(database, &url, &[]).await;
        found.assert_problems(&["broker"], &others);
        assert!(found.line("broker").detail.contains(piece), "{piece}: {}", found.said());
        assert!(!found.said().contains(password), "{}", found.said());
    }
    // A wrong setting is all there is to say.
    let found = visit_with(database, broker, &[("SETTLED_PARK__DEADLIN", "2s")]).await;
    assert_eq!(found.names(), BTreeSet::from(["settings"]));
    let line = found.line("settings");
    assert!(
        !line.ok && line.detail.contains("park.deadlin") && !line.hint.is_empty(),
        "{}",
        found.said()
    );
}

#[tokio::test]
async fn the_schema_is_the_one_that_is_needed() {
    let ground = well("version").await;
    let db = ground.db().await;
    // Of several migrations only the first is left.
    execute(&db, "DELETE FROM settled.refinery_schema_history WHERE version > 1").await;
    let older = "UPDATE settled.refinery_schema_history SET version = 0";
    let newer = "UPDATE settled.refinery_schema_history SET version = 99";
    for (alter, piece, hint) in [
        (older, "version 0", "settled migrate"),
        (newer, "newer", "newer program"),
    ] {
        execute(&db, alter).await;
        let found = visit(&ground).await;
        found.assert_problem("schema", piece);
        assert!(found.line("schema").hint.contains(hint), "{}", found.said());
    }
    execute(&db, "DROP SCHEMA settled CASCADE").await;
    let found = visit(&ground).await;
    found.assert_problems(
        &["schema"],
        &[
            OF_THE_BOOKS[0],
            OF_THE_BOOKS[1],
            "append_only",
            "functions",
            "everybody",
            "grants",
            "ownership",
            "rehearsal",
            "keys",
            "open_dead_letters",
            "dead_letter_space",
            "outbox",
            "outbox_refused",
            "held",
        ],
    );
    assert!(
        found.line("schema").hint.contains("settled migrate"),
        "{}",
        found.said()
    );
}

#[tokio::test]
async fn what_keeps_the_books_unchanged_is_there_and_switched_on() {
    let ground = well("guards").await;
    let db = ground.db().await;
    let trigger = "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE";
    let refuse = "FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change()";
    let guards = [
        ("transfers", "append_only"),
        ("batches", "append_only"),
        ("deposits", "append_only"),
        ("withdrawals", "append_only"),
        ("moved_funds", "append_only"),
        ("moves", "fixed"),
        ("parkings", "append_only"),
        ("receipts", "never_forgotten"),
        ("receipts", "settled_for_ever"),
        ("audit", "append_only"),
        ("audit_subjects", "append_only"),
        ("allocations", "id_taken"),
        ("partners", "of_moving"),
        ("partners", "told"),
        ("approvals", "signed"),
        ("plans", "numbered"),
        ("plans", "fixed"),
        ("plan_items", "with_its_plan"),
        ("run_items", "two_people"),
        ("audit_subjects", "two_people"),
        ("epochs", "two_people"),
        ("dead_letters", "by_an_act"),
        ("dead_letters", "purged_by_an_act"),
        ("dead_letters", "by_a_run"),
        ("receipts", "of_moving"),
        ("dead_letters", "never_emptied"),
        ("allocations", "owe"),
        ("partner_keys", "dated"),
        ("audit", "signed"),
    ];
    for (table, name) in guards {
        let piece = format!("trigger {name} on settled.{table}");
        execute(&db, &format!("ALTER TABLE settled.{table} DISABLE TRIGGER {name}")).await;
        visit(&ground).await.assert_problem("append_only", &piece);
        execute(
            &db,
            &format!("ALTER TABLE settled.{table} ENABLE REPLICA TRIGGER {name}"),
        )
        .await;
        visit(&ground).await.assert_problem("append_only", &piece);
        execute(&db, &format!("ALTER TABLE settled.{table} ENABLE TRIGGER {name}")).await;
    }
    let piece = "trigger append_only on settled.transfers";
    for broken in [
        String::new(),
        // One that lets some of it pass.
        format!("CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON settled.transfers {refuse}"),
        "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON settled.transfers FOR EACH ROW WHEN (old.amount > 5)
         EXECUTE FUNCTION settled.refuse_change()"
            .to_owned(),
    ] {
        execute(&db, "DROP TRIGGER append_only ON settled.transfers").await;
        execute(&db, &broken).await;
        visit(&ground).await.assert_problem("append_only", piece);
        execute(&db, "DROP TRIGGER IF EXISTS append_only ON settled.transfers").await;
        execute(&db, &format!("{trigger} ON settled.transfers {refuse}")).await;
    }
    // A guard of what settled that lets something of it pass.
    let settled = "trigger settled_for_ever on settled.receipts";
    let kept = "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'settled_for_ever'";
    let whole: String = db.query_one(kept, &[]).await.expect("the guard").get(0);
    let weak = whole.replace(" OR (old.public_key IS DISTINCT FROM new.public_key)", "");
    assert_ne!(weak, whole, "the key is a part of it");
    for (guard, is_good) in [(&weak, false), (&whole, true)] {
        execute(&db, "DROP TRIGGER settled_for_ever ON settled.receipts").await;
        execute(&db, guard).await;
        if !is_good {
            visit(&ground).await.assert_problem("append_only", settled);
        }
    }
    visit(&ground).await.assert_problems(&[], &[]);
    // A function that refuses nothing, and triggers that do not fire.
    let database = &ground.name;
    execute(
        &db,
        &format!("ALTER DATABASE {database} SET session_replication_role = replica"),
    )
    .await;
    visit(&ground)
        .await
        .assert_problem("append_only", "session_replication_role");
    execute(
        &db,
        &format!("ALTER DATABASE {database} RESET session_replication_role"),
    )
    .await;
    execute(
        &db,
        "CREATE OR REPLACE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    )
    .await;
    visit(&ground).await.assert_problem("append_only", piece);
}

/// A function that does its owner's work is nobody's by chance: not even a trigger's, which could be hung on another table.
#[tokio::test]
async fn no_function_with_its_owners_rights_is_everybodys() {
    let ground = well("functions").await;
    let db = ground.db().await;
    visit(&ground).await.assert_problems(&[], &[]);
    execute(&db, "GRANT EXECUTE ON FUNCTION settled.refuse_debt() TO PUBLIC").await;
    let found = visit(&ground).await;
    found.assert_problem("functions", "settled.refuse_debt()");
    let line = found.line("functions");
    assert!(
        line.hint
            .contains("REVOKE ALL ON FUNCTION settled.refuse_debt() FROM PUBLIC;"),
        "{}",
        found.said()
    );
    execute(&db, "REVOKE ALL ON FUNCTION settled.refuse_debt() FROM PUBLIC").await;
    visit(&ground).await.assert_problems(&[], &[]);
}

/// What everybody may make in the database is said with what takes it away, and is no problem by itself.
#[tokio::test]
async fn what_everybody_may_make_is_said() {
    let ground = well("everybody").await;
    let db = ground.db().await;
    let temporary = format!("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC;", ground.name);
    let found = visit(&ground).await;
    assert!(found.line("everybody").hint.contains(&temporary), "{}", found.said());
    execute(&db, "GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    succeed(&ground, &["roles", "--apply"]).await;
    let found = visit(&ground).await;
    found.assert_problems(&[], &[]);
    let line = found.line("everybody");
    assert!(!line.detail.contains("temporary objects"), "{}", found.said());
    assert!(
        line.hint.contains("REVOKE CREATE ON SCHEMA public FROM PUBLIC;"),
        "{}",
        found.said()
    );
    execute(&db, "REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    let found = visit(&ground).await;
    assert_eq!(found.line("everybody").hint, "", "{}", found.said());
}

#[tokio::test]
async fn the_user_may_do_what_the_worker_does() {
    let ground = well("grants").await;
    let db = ground.db().await;
    let role = format!("{}_role", ground.name);
    let grant = format!(
        "GRANT USAGE ON SCHEMA settled TO {role};
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA settled TO {role};
         REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA settled FROM PUBLIC;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA settled TO {role}"
    );
    execute(&db, &format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'")).await;
    execute(&db, &grant).await;
    let (user, password) = userinfo(&ground.database_url);
    let url = ground
        .database_url
        .replace(&format!("{user}:{password}@"), &format!("{role}:secret@"));
    let visit = async || visit_with(&url, &ground.broker_url, &[]).await;
    let found = visit().await;
    found.assert_problems(&[], &[]);
    // It owns nothing, and may do more than a worker needs: so it is said, table by table, column by column.
    let line = found.line("ownership");
    for piece in [
        "a warning",
        "DELETE on settled.receipts",
        "UPDATE on settled.allocations",
        "EXECUTE on settled.deposit(uuid, text, numeric, text)",
        "SELECT on settled.owed",
    ] {
        assert!(line.hint.contains(piece), "{piece}: {}", found.said());
    }
    assert!(line.detail.contains("owns no table"), "{}", found.said());
    // One who owns a single table, by being a member of its owner, could switch off what guards it.
    let owner = format!("{}_owner", ground.name);
    let give = format!("CREATE ROLE {owner}; GRANT {owner} TO {role}; ALTER TABLE settled.transfers OWNER TO {owner}");
    execute(&db, &give).await;
    let found = visit().await;
    let line = found.line("ownership");
    assert!(line.ok && line.hint.contains("owns nothing"), "{}", found.said());
    execute(
        &db,
        &format!("ALTER TABLE settled.transfers OWNER TO CURRENT_USER; DROP ROLE {owner}"),
    )
    .await;
    // What the batch itself needs, its rehearsal misses as well.
    for (privilege, object, others) in [
        ("UPDATE", "settled.receipts", &["rehearsal"][..]),
        ("INSERT", "settled.transfers", &["rehearsal"]),
        ("UPDATE", "settled.funds", &["rehearsal"]),
        ("INSERT", "settled.outbox_refused", &["rehearsal"]),
        ("DELETE", "settled.outbox", &["rehearsal"]),
        ("INSERT", "settled.dead_letters", &["rehearsal"]),
        ("SELECT", "settled.runs", &["open_dead_letters"]),
        ("INSERT", "settled.distrusted", &["rehearsal"]),
        ("SELECT", "settled.partner_keys", &["rehearsal", "keys"]),
        ("SELECT", "settled.refinery_schema_history", &["schema"]),
        ("EXECUTE", "settled.exactly(text, bigint, bigint)", &["rehearsal"]),
        (
            "USAGE",
            "schema settled",
            &[
                "schema",
                "rehearsal",
                "keys",
                "append_only",
                "open_dead_letters",
                "dead_letter_space",
                "outbox_refused",
            ],
        ),
    ] {
        let what = match privilege {
            "EXECUTE" => "FUNCTION ",
            _ => "",
        };
        execute(&db, &format!("REVOKE {privilege} ON {what}{object} FROM {role}")).await;
        let found = visit().await;
        let line = found.line("grants");
        assert!(
            !line.ok && !line.hint.is_empty(),
            "{privilege} on {object}:\n{}",
            found.said()
        );
        // Of some tables only columns may be changed.
        let named = line.detail.split("lacks ").last().unwrap_or_default();
        assert!(
            named.starts_with(privilege) && named.contains(&format!(" on {object}")),
            "{}",
            found.said()
        );
        // What can not be seen is not said to be missing.
        if others.contains(&"schema") {
            let line = found.line("schema");
            assert!(
                line.detail.contains("can not be looked at") && !found.said().contains("settled migrate"),
                "{}",
                found.said()
            );
        }
        // The SQL that it prints mends it.
        let sql = line.hint.strip_prefix("as the owner of the schema: ").expect("SQL");
        execute(&db, sql).await;
        visit().await.assert_problems(&[], &[]);
        for (name, line) in &found.lines {
            let concerned = name == "grants" || others.contains(&name.as_str());
            assert!(
                line.ok || concerned,
                "{privilege} on {object}, and {name}:\n{}",
                found.said()
            );
        }
        execute(&db, &grant).await;
    }
    visit().await.assert_problems(&[], &[]);
    execute(&db, &format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn plaintext_that_is_allowed_is_said() {
    let ground = well("plaintext").await;
    for (allowed, piece) in [("false", ""), ("true", "in the open")] {
        let settings = [("SETTLED_ALLOW_PLAINTEXT", allowed)];
        let found = visit_with(&ground.database_url, &ground.broker_url, &settings).await;
        found.assert_problems(&[], &[]);
        let hint = &found.line("settings").hint;
        assert!(
            hint.contains(piece) && hint.is_empty() == piece.is_empty(),
            "{}",
            found.said()
        );
    }
}

#[tokio::test]
async fn a_statement_that_can_not_run_is_found_by_the_rehearsal() {
    let ground = well("rehearsal").await;
    let db = ground.db().await;
    for (table, column) in [
        ("transfers", "payload"),
        ("outbox", "publications"),
        ("allocations", "retriable"),
    ] {
        execute(
            &db,
            &format!("ALTER TABLE settled.{table} RENAME COLUMN {column} TO renamed"),
        )
        .await;
        visit(&ground).await.assert_problem("rehearsal", "does not exist");
        execute(
            &db,
            &format!("ALTER TABLE settled.{table} RENAME COLUMN renamed TO {column}"),
        )
        .await;
    }
    visit(&ground).await.assert_problems(&[], &[]);
    let count: i64 = db
        .query_one("SELECT count(*) FROM settled.batches", &[])
        .await
        .expect("a count")
        .get(0);
    assert_eq!(count, 0, "a rehearsal leaves nothing behind");
}

#[tokio::test]
async fn the_servers_settings_are_looked_at() {
    let ground = well("vitals").await;
    let db = ground.db().await;
    let database = &ground.name;
    let set = async |setting: &str| execute(&db, &format!("ALTER DATABASE {database} SET {setting}")).await;
    let reset = async |setting: &str| execute(&db, &format!("ALTER DATABASE {database} RESET {setting}")).await;

    set("synchronous_commit = off").await;
    visit(&ground).await.assert_problem("synchronous_commit", "off");
    set("synchronous_commit = local").await;
    visit(&ground).await.assert_problems(&[], &[]);
    reset("synchronous_commit").await;

    set("default_transaction_read_only = on").await;
    let found = visit(&ground).await;
    found.assert_problems(&["database"], &["rehearsal"]);
    assert!(found.line("database").detail.contains("read-only"), "{}", found.said());
    execute(
        &db,
        &format!(
            "SET default_transaction_read_only = off; ALTER DATABASE {database} RESET default_transaction_read_only"
        ),
    )
    .await;

    execute(&db, "CREATE SCHEMA other").await;
    // A limit that does not come through, as everybody in this database sees it. Nobody works without.
    let dropped = "CREATE VIEW other.pg_settings AS
                   SELECT name, CASE name WHEN 'lock_timeout' THEN '0' ELSE setting END AS setting, enumvals
                   FROM pg_catalog.pg_settings";
    execute(&db, dropped).await;
    set("search_path = other, pg_catalog").await;
    let sentence = "lock_timeout is 0 ms within a transaction that set it to 5000 ms";
    visit(&ground).await.assert_problem("limits", sentence);
    let worker = ground.worker(&[]);
    assert_eq!(worker.end().await.code(), Some(2));
    assert!(worker.said().contains(sentence), "{}", worker.said());
    execute(&db, "DROP VIEW other.pg_settings").await;
    reset("search_path").await;

    // The clock, as everybody in this database sees it: an hour ahead, or behind.
    for interval in ["1 hour", "-1 hour", "3 seconds"] {
        let clock = format!(
            "CREATE OR REPLACE FUNCTION other.clock_timestamp() RETURNS timestamptz LANGUAGE sql
             AS $$ SELECT pg_catalog.clock_timestamp() + interval '{interval}' $$"
        );
        execute(&db, &clock).await;
        set("search_path = other, pg_catalog").await;
        let found = visit(&ground).await;
        let line = found.line("clock");
        assert!(!line.ok && line.hint.contains("NTP"), "{}", found.said());
        let concerned = ["clock", "keys"];
        assert!(
            found
                .lines
                .iter()
                .all(|(name, line)| line.ok || concerned.contains(&name.as_str())),
            "{}",
            found.said()
        );
        reset("search_path").await;
    }
    visit(&ground).await.assert_problems(&[], &[]);
}

#[tokio::test]
async fn a_server_that_forgets_in_a_crash_is_found() {
    for setting in ["fsync", "full_page_writes"] {
        let access = "host all all 127.0.0.1/32 trust\n";
        let server = match Server::start(&format!("{setting} = off"), access, &[]).await {
            Ok(server) => server,
            Err(why) => return skip("doctor::a_server_that_forgets_in_a_crash_is_found", &why),
        };
        let mut ground = Ground::new("fsync").await;
        ground.database_url = server.url("127.0.0.1", "postgres");
        succeed(&ground, &["migrate"]).await;
        succeed(&ground, &["topology"]).await;
        visit(&ground).await.assert_problem("fsync", setting);
    }
}

#[tokio::test]
async fn every_active_partner_has_a_key() {
    let ground = well("nokey").await;
    let lacks = async |names: &[&str]| {
        let found = visit(&ground).await;
        match names {
            [] => found.assert_problems(&[], &[]),
            names => found.assert_problem("keys", &names.join(", ")),
        }
    };
    add_partner(&ground, "none").await;
    lacks(&["none"]).await;
    add_key(
        &ground,
        "none",
        &[
            "--valid-from",
            "2020-01-01T00:00:00Z",
            "--valid-until",
            "2020-02-01T00:00:00Z",
        ],
    )
    .await;
    lacks(&["none"]).await;
    add_key(&ground, "none", &["--valid-from", "2199-01-01T00:00:00Z"]).await;
    lacks(&["none"]).await;
    let key = add_key(&ground, "none", &[]).await;
    lacks(&[]).await;
    succeed(
        &ground,
        &["key", "revoke", "--enterprise-id", "none", "--public-key", &key],
    )
    .await;
    lacks(&["none"]).await;
    add_partner(&ground, "more").await;
    lacks(&["more", "none"]).await;
    // Of one that is suspended none is expected.
    for name in ["more", "none"] {
        succeed(&ground, &["partner", "suspend", "--enterprise-id", name]).await;
    }
    lacks(&[]).await;
}

async fn manage(ground: &Ground, method: &str, path: &str, body: Option<Value>) {
    let (status, answer) = ground.services.manage(method, path, body).await;
    assert!(matches!(status, 201 | 204), "{method} {path}: {status} {answer}");
}

/// An exchange or a queue is missing, and then others are in its place: its line says so, and those that can not be
/// answered without it.
async fn spoil(ground: &Ground, object: &str, concerned: &[&str], absent: &[&str], others: &[Value]) {
    let (kind, name) = object.split_once(' ').expect("a kind and a name");
    let path = format!("/api/{kind}s/{}/{name}", ground.name);
    manage(ground, "DELETE", &path, None).await;
    let found = visit(ground).await;
    found.assert_problems(&[&[object], concerned].concat(), absent);
    let line = found.line(object);
    assert_eq!(line.detail, "it is missing");
    assert!(line.hint.contains("settled topology"), "{}", found.said());
    for other in others {
        manage(ground, "PUT", &path, Some(other.clone())).await;
        visit(ground)
            .await
            .assert_problem(object, "it is there with other properties");
        manage(ground, "DELETE", &path, None).await;
    }
    succeed(ground, &["topology"]).await;
    visit(ground).await.assert_problems(&[], &[]);
}

#[tokio::test]
async fn each_exchange_is_there_and_as_it_should_be() {
    let ground = well("exchanges").await;
    for (name, concerned, kind) in [
        (
            "settlement.unreadable",
            &["permission to publish to settlement.unreadable"][..],
            "fanout",
        ),
        (
            "settlement.dead",
            &["permission to publish to settlement.dead"],
            "topic",
        ),
        (
            "settlement.epoch",
            &["permission to publish to settlement.epoch"],
            "fanout",
        ),
        ("settlement.updates.all", &[], "fanout"),
        ("settlement.updates", &[], "topic"),
        (
            "settlement.events",
            &["permission to publish to settlement.events"],
            "topic",
        ),
    ] {
        let arguments = match name {
            "settlement.updates" => json!({}),
            _ => json!({"alternate-exchange": "amq.fanout"}),
        };
        let others = [
            json!({"type": kind, "durable": true, "arguments": arguments}),
            json!({"type": kind, "durable": false}),
            json!({"type": "headers", "durable": true}),
        ];
        spoil(&ground, &format!("exchange {name}"), concerned, &[], &others).await;
    }
}

/// Quorum queues that are not quite what they should be.
fn almost(dead_letters: &str) -> Vec<Value> {
    let queue = |change: &[(&str, Value)]| {
        let mut arguments = json!({
            "x-queue-type": "quorum", "x-delivery-limit": 50, "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish", "x-dead-letter-exchange": dead_letters,
        });
        for (name, value) in change {
            arguments[*name] = value.clone();
        }
        json!({"durable": true, "arguments": arguments})
    };
    vec![
        json!({"durable": true, "arguments": {"x-queue-type": "classic"}}),
        json!({"durable": true, "arguments": {"x-queue-type": "quorum"}}),
        queue(&[("x-delivery-limit", json!(49))]),
        queue(&[("x-dead-letter-exchange", json!("settlement.events"))]),
        queue(&[("x-dead-letter-strategy", json!("at-most-once"))]),
        queue(&[
            ("x-overflow", json!("drop-head")),
            ("x-dead-letter-strategy", json!("at-most-once")),
        ]),
        queue(&[("x-max-length", json!(9))]),
    ]
}

/// One that is missing has no depth.
const DEPTHS: [&str; 3] = ["updates", "dead_letters", "unreadable"];

#[tokio::test]
async fn the_input_queue_is_there_and_as_it_should_be() {
    let ground = well("updates").await;
    let concerned = ["permission to consume settlement.updates"];
    let others = almost("settlement.dead");
    spoil(&ground, "queue settlement.updates", &concerned, &DEPTHS, &others).await;
}

#[tokio::test]
async fn the_dead_letter_queues_are_there_and_as_they_should_be() {
    let ground = well("dead").await;
    let concerned = ["permission to consume settlement.dead"];
    let others = almost("settlement.unreadable");
    spoil(&ground, "queue settlement.dead", &concerned, &DEPTHS, &others).await;
    let others = [
        json!({"durable": true, "arguments": {"x-queue-type": "classic"}}),
        json!({"durable": true, "arguments": {"x-queue-type": "quorum", "x-max-length": 9}}),
    ];
    spoil(&ground, "queue settlement.unreadable", &[], &DEPTHS, &others).await;
    let others = [
        json!({"durable": true, "arguments": {"x-queue-type": "stream"}}),
        json!({"durable": true, "arguments": {"x-queue-type": "stream", "x-max-length-bytes": 1_000}}),
    ];
    let concerned = ["permission to consume settlement.epoch"];
    spoil(&ground, "queue settlement.epoch", &concerned, &[], &others).await;
}

#[tokio::test]
async fn the_broker_user_has_the_permissions() {
    let ground = well("permission").await;
    let role = format!("{}_user", ground.name);
    let secret = Uuid::new_v4().simple().to_string();
    manage(
        &ground,
        "PUT",
        &format!("/api/users/{role}"),
        Some(json!({"password": secret, "tags": ""})),
    )
    .await;
    let (user, password) = userinfo(&ground.broker_url);
    let url = ground
        .broker_url
        .replace(&format!("{user}:{password}@"), &format!("{role}:{secret}@"));
    for (configure, write, read, problems) in [
        (".*", ".*", ".*", &[][..]),
        // As a worker should be: it declares nothing.
        (
            "",
            "settlement.(events|dead|unreadable|epoch)",
            "settlement.(updates|dead|epoch)",
            &[],
        ),
        (
            "",
            "settlement.events",
            ".*",
            &[
                "permission to publish to settlement.dead",
                "permission to publish to settlement.unreadable",
                "permission to publish to settlement.epoch",
            ],
        ),
        (
            "",
            "settlement.(dead|unreadable|epoch)",
            ".*",
            &["permission to publish to settlement.events"],
        ),
        (
            "",
            ".*",
            "settlement.updates",
            &[
                "permission to consume settlement.dead",
                "permission to consume settlement.dead.broker",
                "permission to consume settlement.epoch",
                "permission to consume settlement.dead.broker.*",
            ],
        ),
        (
            "",
            ".*",
            "settlement.(dead|epoch)",
            &["permission to consume settlement.updates"],
        ),
    ] {
        let body = json!({"configure": configure, "write": write, "read": read});
        manage(
            &ground,
            "PUT",
            &format!("/api/permissions/{}/{role}", ground.name),
            Some(body),
        )
        .await;
        let found = visit_with(&ground.database_url, &url, &[]).await;
        found.assert_problems(problems, &[]);
        for name in problems {
            assert!(found.line(name).hint.contains("set_permissions"), "{}", found.said());
        }
        // The line that it prints is all that a worker needs.
        if let Some(name) = problems.first() {
            let hint = found.line(name).hint.clone();
            let place = format!("rabbitmqctl set_permissions -p '{}' '{role}' ", ground.name);
            let (_, patterns) = hint.split_once(&place).expect("the command");
            let patterns: Vec<&str> = patterns.split('\'').skip(1).step_by(2).collect();
            let [configure, write, read] = patterns[..] else {
                panic!("three patterns: {hint}");
            };
            let body = json!({"configure": configure, "write": write, "read": read});
            let path = format!("/api/permissions/{}/{role}", ground.name);
            manage(&ground, "PUT", &path, Some(body)).await;
            visit_with(&ground.database_url, &url, &[])
                .await
                .assert_problems(&[], &[]);
        }
        // What could not be looked at is said.
        let hint = &found.line("queue settlement.updates").hint;
        assert_eq!(hint.contains("configure"), configure.is_empty(), "{}", found.said());
    }
    let path = format!("/api/permissions/{}/{role}", ground.name);
    manage(&ground, "DELETE", &path, None).await;
    let others: Vec<&str> = BROKER.into_iter().filter(|name| *name != "broker").collect();
    visit_with(&ground.database_url, &url, &[])
        .await
        .assert_problems(&["broker"], &others);
    manage(&ground, "DELETE", &format!("/api/users/{role}"), None).await;
}

#[tokio::test]
async fn what_waits_is_counted_and_touched_by_nobody() {
    let ground = well("waits").await;
    let line = Line::open(&ground.broker_url).await;
    let to = |queue: &str| {
        let mut message = Message::new(queue, "x", Expect::Any);
        message.exchange = String::new();
        message
    };
    let [updates, dead, unreadable] = ["settlement.updates", "settlement.dead", "settlement.unreadable"].map(to);
    line.publish(&[updates.clone(), updates, dead.clone(), dead.clone(), dead, unreadable])
        .await;
    let found = visit(&ground).await;
    found.assert_problems(&[], &[]);
    for (name, count) in [("updates", "2"), ("dead_letters", "3"), ("unreadable", "1")] {
        assert!(
            found.line(name).detail.ends_with(&format!(": {count}")),
            "{}",
            found.said()
        );
    }
    assert!(
        found.line("unreadable").hint.contains("settlement.unreadable"),
        "{}",
        found.said()
    );
    for (queue, count) in [
        ("settlement.updates", 2),
        ("settlement.dead", 3),
        ("settlement.unreadable", 1),
    ] {
        assert_eq!(line.depth(queue).await, count, "{queue}");
    }
}

/// One frame of AMQP, whole.
async fn frame(from: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut frame = vec![0; 7];
    from.read_exact(&mut frame).await?;
    let size = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
    frame.resize(7 + size + 1, 0);
    from.read_exact(&mut frame[7..]).await?;
    Ok(frame)
}

/// Hands everything on until something is published. Then it does what a broker does while a memory or disk alarm is on:
/// it says so (connection.blocked) and reads no more. A real alarm would stop every other test.
async fn alarmed(mut client: TcpStream, broker: &str) -> std::io::Result<()> {
    const PUBLISH: [u8; 4] = [0, 60, 0, 40];
    const BLOCKED: &[u8] = b"\x01\0\0\0\0\0\x0f\0\x0a\0\x3c\x0alow memory\xce";
    let mut server = TcpStream::connect(broker).await?;
    let (mut from_client, to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let to_client = tokio::sync::Mutex::new(to_client);
    let asking = async {
        let mut greeting = [0; 8];
        from_client.read_exact(&mut greeting).await?;
        to_server.write_all(&greeting).await?;
        loop {
            let frame = frame(&mut from_client).await?;
            if frame[0] == 1 && frame[7..].starts_with(&PUBLISH) {
                to_client.lock().await.write_all(BLOCKED).await?;
                return std::future::pending::<std::io::Result<()>>().await;
            }
            to_server.write_all(&frame).await?;
        }
    };
    let answering = async {
        loop {
            let frame = frame(&mut from_server).await?;
            to_client.lock().await.write_all(&frame).await?;
        }
    };
    tokio::select! {
        ended = asking => ended,
        ended = answering => ended,
    }
}

#[tokio::test]
async fn an_alarm_of_the_broker_is_seen() {
    let ground = well("alarm").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let front = with_address(&ground.broker_url, listener.local_addr().expect("an address"));
    let broker = address(&ground.broker_url);
    let _front = Beside::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let broker = broker.clone();
            tokio::spawn(async move { drop(alarmed(client, &broker).await) });
        }
    });
    let found = visit_with(&ground.database_url, &front, &[]).await;
    // What an alarm leaves without an answer has no line, and one says so.
    let unanswered: Vec<&str> = BROKER.into_iter().filter(|name| name.contains(' ')).collect();
    found.assert_problems(&["alarms", "topology"], &unanswered);
    assert!(
        found.line("alarms").detail.contains("memory or disk alarm"),
        "{}",
        found.said()
    );
}
