//! The database's roles: each command runs with its role's rights, and every right is needed by one of them. Found out by
//! running them, with each right taken away in turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::{Value, json};
use settled::{
    domain::signature::PublicKey,
    settle::Answered,
    store::{
        StoreError,
        roles::{DatabaseRole, grant_line},
    },
};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    command::{Answer, ask, ask_in},
    contract,
    in_process::{self, read, settle},
    partner::{Partner, new_key, sign},
    support::{COLLECTS, Ground, PATIENCE, Place, connect, run, settled, until},
};

/// What a command says that is not allowed what it does.
const DENIED: i32 = 78;

/// Books with something of everything in them, and a member of each role.
struct Fixture {
    place: Place,
    partner: Partner,
    reserved: Reservation,
    settled: Uuid,
    nonce: String,
    /// What a batch told.
    told: Answered,
    db: Client,
}

impl Fixture {
    async fn new(test: &str) -> Self {
        let place = Place::new(test).await;
        let partner = Partner::new("acme");
        place.register(&partner).await;
        place.deposit(&partner, "BTC", "1000").await;
        let reservations: Vec<_> = (0..3).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        let db = place.db().await;
        // What a batch says that nobody published: a row to be refused by the broker, later.
        let clerk = in_process::clerk(&place);
        let first = partner.draft(&reservations[0], "cleared");
        let nonce = first.fields.get("nonce").as_str().expect("a nonce").to_owned();
        let first = first.message(Expect::Settles);
        let answered = settle(&clerk, &read(std::slice::from_ref(&first)).await)
            .await
            .expect("settled");
        clerk
            .store
            .set_aside(answered.id, &answered.publications[0], "by a test")
            .await
            .expect("set aside");
        db.batch_execute(
            "CREATE TABLE public.kept AS SELECT * FROM settled.outbox;
             CREATE TABLE public.aside AS SELECT format, publications FROM settled.outbox_refused;
             DELETE FROM settled.outbox_refused",
        )
        .await
        .expect("kept");
        let worker = place.ready_worker(&COLLECTS).await;
        let wrong = partner
            .draft(&reservations[1], "cleared")
            .set("clientId", Uuid::new_v4().to_string());
        let missing = partner.draft(&partner.allocation("BTC", "1"), "cleared");
        place
            .publish(&[
                first,
                wrong.message(Expect::Refused("allocation_mismatch")),
                missing.message(Expect::Waits),
            ])
            .await;
        until("a dead letter is kept", PATIENCE, async || {
            let kept = "SELECT EXISTS (SELECT FROM settled.dead_letters) AND EXISTS (SELECT FROM settled.parked)";
            db.query_one(kept, &[])
                .await
                .expect("rows")
                .get::<_, bool>(0)
                .then_some(())
        })
        .await;
        worker.terminate().await;
        // What a key signed that was revoked once is looked up.
        let key = partner.public_key();
        let whose = ["--enterprise-id", "acme", "--public-key", &key];
        ask(&place, &[&["key", "revoke"], &whose[..]].concat())
            .await
            .document(0);
        ask(
            &place,
            &[&["key", "reinstate"], &whose[..], &["--reason", "x"]].concat(),
        )
        .await
        .document(0);
        ask(&place, &["roles", "--apply"]).await.document(0);
        Self {
            reserved: reservations[2].clone(),
            settled: reservations[0].id,
            nonce,
            told: answered,
            partner,
            db,
            place,
        }
    }

    async fn sql(&self, sql: &str) {
        self.db
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The URL of a login of a role's.
    async fn login(&self, role: DatabaseRole) -> String {
        let login = self.login_name(role);
        self.sql(&format!("CREATE ROLE {login} LOGIN PASSWORD 'p' IN ROLE {role}"))
            .await;
        self.place.database_url_of(&login)
    }

    fn login_name(&self, role: DatabaseRole) -> String {
        format!("{}_{role}", self.place.name)
    }

    async fn forget(&self, role: DatabaseRole) {
        self.sql(&format!("DROP ROLE {}", self.login_name(role))).await;
    }
}

/// Commands one after the other, until one is not allowed what it does.
struct Walk<'a> {
    fixture: &'a Fixture,
    url: String,
    denied: Option<(String, Answer)>,
    /// Commands that were run.
    ran: BTreeSet<String>,
}

impl Walk<'_> {
    /// The first document of what a command says, where it says one. Each of these exit codes will do.
    async fn with(&mut self, codes: &[i32], arguments: &[&str], stdin: &str) -> Value {
        if self.denied.is_some() {
            return Value::Null;
        }
        let words: Vec<&str> = arguments
            .iter()
            .take_while(|word| is_command_word(word))
            .copied()
            .collect();
        let command = contract::ANSWERS
            .iter()
            .map(|(command, _)| *command)
            .filter(|command| words.join(" ").starts_with(command))
            .max_by_key(|command| command.len());
        self.ran.insert(
            command
                .unwrap_or_else(|| panic!("no command: {arguments:?}"))
                .to_owned(),
        );
        let all = [arguments, &["--json"]].concat();
        let answer = Answer::of(&run(&self.url, &self.fixture.place.broker_url, &all, stdin).await);
        if answer.code == Some(DENIED) {
            self.denied = Some((arguments.join(" "), answer));
            return Value::Null;
        }
        assert!(
            answer.code.is_some_and(|code| codes.contains(&code)),
            "settled {}: {}",
            arguments.join(" "),
            answer.all()
        );
        answer
            .out
            .lines()
            .next()
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_default()
    }

    async fn run(&mut self, arguments: &[&str]) -> Value {
        self.with(&[0], arguments, "").await
    }

    /// With another cell, of which it has every right.
    async fn across(&mut self) {
        if self.denied.is_some() {
            return;
        }
        let other = Ground::new("roles_across").await;
        other.copy_template().await;
        other
            .tamper("UPDATE settled.epochs SET books = gen_random_uuid()")
            .await;
        let variables = [
            ("SETTLED_DATABASE_URL", self.url.as_str()),
            ("SETTLED_TARGET_DATABASE_URL", other.database_url.as_str()),
        ];
        let answer = ask_in(&variables, &["reconcile", "--since", "1h", "--across"]).await;
        match answer.code {
            Some(DENIED) => self.denied = Some(("reconcile --across".to_owned(), answer)),
            Some(0 | 1) => {}
            _ => panic!("settled reconcile --across: {}", answer.all()),
        }
    }

    /// The API, which goes on for as long as it may look.
    async fn api(&mut self) {
        if self.denied.is_some() {
            return;
        }
        self.ran.insert("api".to_owned());
        let mut command = settled();
        command
            .args(["api", "--json"])
            .env("SETTLED_DATABASE_URL", &self.url)
            .env("SETTLED_BROKER_URL", &self.fixture.place.broker_url)
            .env("SETTLED_API__LISTEN", "127.0.0.1:0");
        // It ends at once, or not at all.
        if let Ok(output) = tokio::time::timeout(Duration::from_secs(2), command.output()).await {
            let answer = Answer::of(&output.expect("it runs"));
            assert_eq!(answer.code, Some(DENIED), "{}", answer.all());
            self.denied = Some(("api".to_owned(), answer));
        }
    }
}

fn is_command_word(word: &str) -> bool {
    word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-') && !word.starts_with("--")
}

async fn registrar(walk: &mut Walk<'_>) {
    let fresh = Uuid::new_v4().simple().to_string();
    let enterprise = format!("p{fresh}");
    walk.run(&["partner", "add", "--enterprise-id", &enterprise, "--name", "x"])
        .await;
    walk.run(&["partner", "set", &enterprise, "--name", "y"]).await;
    walk.run(&["partner", "suspend", "--enterprise-id", &enterprise]).await;
    walk.run(&["partner", "resume", "--enterprise-id", &enterprise]).await;
    let key = hex::encode(new_key().public_key().serialize());
    let whose = ["--enterprise-id", &enterprise, "--public-key", &key];
    walk.run(&[&["key", "add"], &whose[..]].concat()).await;
    // Another, proven, in its place; asked for twice, so that the first asking gives way.
    let next = new_key();
    let public = hex::encode(next.public_key().serialize());
    let proven = ["--enterprise-id", &enterprise, "--public-key", &public];
    walk.run(&[&["key", "challenge"], &proven[..]].concat()).await;
    let asked = walk.run(&[&["key", "challenge"], &proven[..]].concat()).await;
    let proof = sign(&next, asked["challenge"].as_str().unwrap_or_default());
    let grace = ["--grace", "48h", "--reason", "x", "--proof", &proof];
    walk.run(&[&["key", "rotate"], &proven[..], &grace[..]].concat()).await;
    walk.run(&["partner", "quarantine", "--enterprise-id", &enterprise, "--reason", "x"])
        .await;
    walk.run(&["partner", "resume", "--enterprise-id", &enterprise]).await;
    walk.run(&[&["key", "revoke"], &whose[..]].concat()).await;
    walk.run(&[&["key", "reinstate"], &whose[..], &["--reason", "found"]].concat())
        .await;
    let (id, client) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    let connection = [
        "connection",
        "add",
        "--connection-id",
        &id,
        "--enterprise-id",
        &enterprise,
        "--client-id",
        &client,
    ];
    let theirs = ["--partners-client-id", "c", "--partners-connection-id", "n"];
    walk.run(&[&connection[..], &theirs[..]].concat()).await;
    walk.run(&["client", "add", "--client-id", &client, "--enterprise-id", &enterprise])
        .await;
    let named = ["--enterprise-id", &enterprise, "--symbol", "XBT"];
    walk.run(&[&["currency", "map"], &named[..], &["--currency", "BTC"]].concat())
        .await;
    walk.run(&[&["currency", "unmap"], &named[..]].concat()).await;
    let token = walk
        .run(&["token", "add", "--enterprise-id", &enterprise, "--role", "client"])
        .await;
    walk.run(&["token", "add", "--enterprise-id", &enterprise, "--role", "partner"])
        .await;
    let id = token["id"]
        .as_str()
        .unwrap_or("00000000-0000-0000-0000-000000000000")
        .to_owned();
    walk.run(&["token", "revoke", &id]).await;
    // A queue of its own comes and goes.
    walk.run(&["partner", "set", &enterprise, "--own-queue"]).await;
    walk.run(&["partner", "set", &enterprise, "--no-own-queue"]).await;
}

async fn custody(walk: &mut Walk<'_>) {
    let fresh = Uuid::new_v4().to_string();
    let client = walk.fixture.partner.client.to_string();
    let about = [
        "--client-id",
        &client,
        "--currency",
        "BTC",
        "--reference",
        &fresh,
        "--quantity",
    ];
    for way in ["deposit", "withdraw"] {
        walk.run(&[&[way], &about[..], &["5"]].concat()).await;
        walk.with(&[1], &[&[way], &about[..], &["6"]].concat(), "").await;
    }
    let line = walk.fixture.partner.allocation("BTC", "1").line();
    walk.with(&[0], &["allocation", "reserve"], &line).await;
}

async fn reader(walk: &mut Walk<'_>) {
    let fixture = walk.fixture;
    let (id, nonce) = (fixture.settled.to_string(), fixture.nonce.clone());
    let connection = fixture.partner.connection.to_string();
    for command in [
        "partner list",
        "key list",
        "connection list",
        "currency list",
        "client list",
        "token list",
        "ledger balances",
    ] {
        walk.run(&command.split(' ').collect::<Vec<_>>()).await;
    }
    walk.run(&["connection", "show", &connection]).await;
    walk.run(&["allocation", "show", &id, "--history"]).await;
    walk.run(&["receipt", "--enterprise-id", "acme", "--nonce", &nonce])
        .await;
    walk.run(&["timeline", &id]).await;
    walk.run(&["timeline", &nonce]).await;
    let sql = "SELECT encode(digest, 'hex') FROM settled.dead_letters LIMIT 1";
    let digest: String = fixture.db.query_one(sql, &[]).await.expect("a dead letter").get(0);
    walk.run(&["timeline", &digest]).await;
    let sql = "SELECT nonce FROM settled.parked LIMIT 1";
    let parked: String = fixture.db.query_one(sql, &[]).await.expect("a parked one").get(0);
    walk.run(&["timeline", &parked]).await;
    walk.run(&["receipt", "--enterprise-id", "acme", "--nonce", &parked])
        .await;
    let sql = "SELECT nonce FROM settled.dead_letters LIMIT 1";
    let dead: String = fixture.db.query_one(sql, &[]).await.expect("a dead letter").get(0);
    walk.run(&["receipt", "--enterprise-id", "acme", "--nonce", &dead])
        .await;
    walk.run(&["topology", "export"]).await;
    walk.api().await;
}

async fn auditor(walk: &mut Walk<'_>) {
    walk.run(&["audit", "list"]).await;
    walk.run(&["ledger", "check"]).await;
    walk.run(&["ledger", "check", "--signatures"]).await;
    walk.with(&[0, 1], &["reconcile", "--since", "1h"], "").await;
    walk.across().await;
}

async fn operator(walk: &mut Walk<'_>) {
    let fixture = walk.fixture;
    // A letter to be replayed, and a publication to be put back, each time.
    fixture
        .sql(
            "UPDATE settled.dead_letters SET state = 'open', run_id = NULL, discarded_at = NULL, replays = 0;
             INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
             SELECT gen_random_uuid(), format, publications, 'by a test' FROM public.aside",
        )
        .await;
    let id: Uuid = fixture
        .db
        .query_one("SELECT id FROM settled.dead_letters LIMIT 1", &[])
        .await
        .expect("a dead letter")
        .get(0);
    let id = id.to_string();
    let dead = ["dead-letters"];
    for command in ["list", "groups", "stats"] {
        walk.run(&[&dead[..], &[command]].concat()).await;
    }
    walk.run(&[&dead[..], &["show", &id, "--body"]].concat()).await;
    walk.run(&[&dead[..], &["export"]].concat()).await;
    walk.run(&[&dead[..], &["discard", "--partner", "acme", "--reason", "x"]].concat())
        .await;
    walk.run(
        &[
            &dead[..],
            &["restore", "--state", "all", "--partner", "acme", "--reason", "x"],
        ]
        .concat(),
    )
    .await;
    let plan = walk.run(&[&dead[..], &["plan", "--state", "all"]].concat()).await["plan"].to_string();
    walk.run(&[&dead[..], &["plan", "show", &plan]].concat()).await;
    // Somebody else's is approved.
    let theirs = ["dead-letters", "plan", "--state", "all", "--operator", "ann"];
    let theirs = ask(&fixture.place, &theirs).await.document(0)["plan"].to_string();
    let approve = ["plan", "approve", &theirs, "--operator", "bob", "--reason", "x"];
    walk.run(&[&dead[..], &approve[..]].concat()).await;
    let replay = ["replay", &plan, "--all-verdicts", "--reason", "x", "--yes"];
    walk.with(&[0, 3], &[&dead[..], &replay[..]].concat(), "").await;
    let runs = [&dead[..], &["runs"]].concat();
    walk.run(&[&runs[..], &["list"]].concat()).await;
    let sql = "SELECT coalesce(max(id), 1) FROM settled.runs";
    let run: i64 = fixture.db.query_one(sql, &[]).await.expect("runs").get(0);
    let run = run.to_string();
    walk.run(&[&runs[..], &["show", &run]].concat()).await;
    walk.with(&[0, 1], &[&runs[..], &["cancel", &run, "--reason", "x"]].concat(), "")
        .await;
    // It may be over by now.
    fixture
        .sql(&format!(
            "UPDATE settled.runs SET state = 'cancelled', driven_until = NULL WHERE id = {run}"
        ))
        .await;
    walk.with(
        &[0, 1, 3],
        &[&runs[..], &["resume", &run, "--reason", "x"]].concat(),
        "",
    )
    .await;
    let body = fixture.partner.cleared(&fixture.reserved);
    let text = String::from_utf8(body.body).expect("UTF-8");
    walk.with(&[0], &["explain", "--routing-key", &body.routing_key], &text)
        .await;
    // One whose allocation is not there may be parked.
    let unknown = fixture.partner.cleared(&fixture.partner.allocation("BTC", "1"));
    let text = String::from_utf8(unknown.body).expect("UTF-8");
    walk.with(&[0], &["explain", "--routing-key", &unknown.routing_key], &text)
        .await;
    // One that waits is taken back.
    let waits = fixture
        .partner
        .draft(&fixture.partner.allocation("BTC", "1"), "cleared");
    let nonce = waits.fields.get("nonce").as_str().expect("a nonce").to_owned();
    fixture.place.publish(&[waits.message(Expect::Any)]).await;
    until("it waits", PATIENCE, async || {
        let sql = "SELECT EXISTS (SELECT FROM settled.parked WHERE nonce = $1)";
        let row = fixture.db.query_one(sql, &[&nonce]).await.expect("rows");
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    let void = [
        "nonce",
        "void",
        "--enterprise-id",
        "acme",
        "--nonce",
        &nonce,
        "--reason",
        "x",
    ];
    walk.run(&void).await;
    // Of what a worker told the broker these books lack a batch; somebody else accepted that.
    let row = "SELECT books, epoch FROM settled.epochs ORDER BY epoch DESC LIMIT 1";
    let row = fixture.db.query_one(row, &[]).await.expect("an epoch");
    let (books, epoch): (Uuid, i32) = (row.get(0), row.get(1));
    let batch = Uuid::now_v7();
    let word = json!({"books": books, "epoch": epoch, "batch": batch, "at": "2026-01-02T03:04:05Z"});
    let mut word = Message::new("", word.to_string(), Expect::Any);
    word.exchange = "settlement.epoch".to_owned();
    fixture.place.line().publish(&[word]).await;
    fixture
        .sql(&format!(
            "INSERT INTO settled.voices (act, subject, at, expires_at, operator, why)
             VALUES ('recover', 'epoch {epoch}: up to batch {batch}', now(), now() + interval '1 hour', 'ann', 'x')"
        ))
        .await;
    walk.run(&["recover", "--accept-loss", "--reason", "x", "--operator", "bob"])
        .await;
    walk.run(&["outbox", "list"]).await;
    let retry = [
        "outbox",
        "retry",
        "--all",
        "--reason",
        "x",
        "--set",
        "outbox.retry_deadline=100ms",
    ];
    walk.with(&[0, 3], &retry, "").await;
    walk.run(&[&dead[..], &["discard", "--partner", "acme", "--reason", "x"]].concat())
        .await;
    // One that may go: a copy, so that the next walk has its own.
    fixture
        .sql(
            "INSERT INTO settled.dead_letters OVERRIDING USER VALUE
             SELECT (r).* FROM (
                 SELECT jsonb_populate_record(d, jsonb_build_object(
                     'id', gen_random_uuid(), 'state', 'discarded', 'discarded_at', now() - interval '1 day', 'run_id', NULL
                 )) AS r
                 FROM settled.dead_letters AS d LIMIT 1
             ) AS made",
        )
        .await;
    let purge = ["purge", "--discarded-before", "1h", "--reason", "x", "--yes"];
    walk.run(&[&dead[..], &purge[..]].concat()).await;
}

async fn walk(fixture: &Fixture, role: DatabaseRole, url: &str) -> (Option<(String, Answer)>, BTreeSet<String>) {
    let mut walk = Walk {
        fixture,
        url: url.to_owned(),
        denied: None,
        ran: BTreeSet::new(),
    };
    match role {
        DatabaseRole::Registrar => registrar(&mut walk).await,
        DatabaseRole::Custody => custody(&mut walk).await,
        DatabaseRole::Reader => reader(&mut walk).await,
        DatabaseRole::Auditor => auditor(&mut walk).await,
        DatabaseRole::Operator => operator(&mut walk).await,
        DatabaseRole::Worker | DatabaseRole::Owner | DatabaseRole::Console => panic!("{role} is tried elsewhere"),
    }
    (walk.denied, walk.ran)
}

/// As which role each command works, as `settled roles` says.
async fn commands_of(place: &Place) -> BTreeMap<String, BTreeSet<String>> {
    let said = ask(place, &["roles"]).await.document(0);
    let roles = said["roles"].as_array().expect("roles").iter();
    roles
        .map(|role| {
            let commands = role["commands"].as_array().expect("commands").iter();
            let commands = commands.map(|command| command.as_str().expect("text").to_owned());
            (role["name"].as_str().expect("a name").to_owned(), commands.collect())
        })
        .collect()
}

/// Runs every command of a role with its rights, and again with each right taken away.
async fn each_right_is_needed(test: &str, role: DatabaseRole) {
    let fixture = Fixture::new(test).await;
    // Replays are judged, and what is put back is published, by somebody.
    let worker = fixture.place.ready_worker(&COLLECTS).await;
    let url = fixture.login(role).await;
    let (denied, ran) = walk(&fixture, role, &url).await;
    if let Some((command, answer)) = denied {
        panic!("{role} may not run `settled {command}`: {}", answer.all());
    }
    let mut all = commands_of(&fixture.place).await.remove(role.name()).expect("the role");
    // It says in a note what it can not see, and declares the rest.
    all.remove("topology");
    assert_eq!(ran, all, "every command of {role} was run");
    let mut idle = Vec::new();
    for right in singly(role) {
        fixture.sql(&right.revoke()).await;
        let (denied, _) = walk(&fixture, role, &url).await;
        fixture.sql(&right.grant).await;
        match denied {
            // Of a receipt whose reason a newer version wrote, what that version told: cases::newer.
            None if role == DatabaseRole::Operator && right.object == "told" => {}
            None => idle.push(right.grant),
            Some((command, answer)) => {
                let (message, hint) = answer.refusal(DENIED);
                assert!(message.contains("lacks a permission"), "{command}: {message}");
                let whole = grant_line(right.object, right.whole, role.name());
                assert!(hint.contains(&whole), "{command}: {whole} is not in {hint}");
            }
        }
    }
    assert!(
        idle.is_empty(),
        "no command of {role} needs these:\n{}",
        idle.join("\n")
    );
    worker.terminate().await;
    fixture.forget(role).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registrar_has_what_it_needs_and_no_more() {
    each_right_is_needed("role_registrar", DatabaseRole::Registrar).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custody_has_what_it_needs_and_no_more() {
    each_right_is_needed("role_custody", DatabaseRole::Custody).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_has_what_it_needs_and_no_more() {
    each_right_is_needed("role_reader", DatabaseRole::Reader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_auditor_has_what_it_needs_and_no_more() {
    each_right_is_needed("role_auditor", DatabaseRole::Auditor).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_has_what_it_needs_and_no_more() {
    each_right_is_needed("role_operator", DatabaseRole::Operator).await;
}

/// A right that is taken away by itself: of columns one at a time.
struct Single {
    object: &'static str,
    /// The right that it is a part of, as the role has it.
    whole: &'static str,
    grant: String,
}

impl Single {
    fn revoke(&self) -> String {
        self.grant
            .replacen("GRANT ", "REVOKE ", 1)
            .replacen(" TO ", " FROM ", 1)
    }
}

fn singly(role: DatabaseRole) -> Vec<Single> {
    let all = role.grants().iter();
    let all = all.flat_map(|(object, privileges)| privileges.iter().map(|whole| (*object, *whole)));
    all.flat_map(|(object, whole)| {
        let parts = match whole.split_once(" (") {
            None => vec![whole.to_owned()],
            Some((word, columns)) => {
                let columns = columns.trim_end_matches(')').split(", ");
                columns.map(|column| format!("{word} ({column})")).collect()
            }
        };
        parts.into_iter().map(move |part| Single {
            object,
            whole,
            grant: grant_line(object, &part, role.name()),
        })
    })
    .collect()
}

/// Whether something that a worker does now and then, and where it fails does the next time without a word, meets a right that
/// this login lacks.
async fn is_missed_in_silence(fixture: &Fixture, url: &str) -> bool {
    let store = in_process::clerk_at(url).store;
    let forever = Duration::from_secs(3_600 * 24 * 365);
    let key = PublicKey::from_hex(&fixture.partner.public_key()).expect("a key");
    let done = [
        store.note_key_uses(&[(key, forever)]).await,
        store.forget_told(forever, u64::from(u32::MAX)).await.map(drop),
        store.sum_dead_letter_space().await,
        store.postpone_held(&[], forever).await,
        store
            .set_aside(fixture.told.id, &fixture.told.publications[0], "by a test")
            .await,
    ];
    fixture.sql("DELETE FROM settled.outbox_refused").await;
    done.iter().any(|done| done.as_ref().is_err_and(StoreError::is_right))
}

/// The worker with its role's rights does all of its work; with any of them taken away it says so before money moves, or in its
/// log where that right is of a task beside settling.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_has_what_it_needs_and_no_more() {
    let fixture = Fixture::new("role_worker").await;
    let role = DatabaseRole::Worker;
    let url = fixture.login(role).await;
    let place = &fixture.place;
    let quick = [
        &COLLECTS[..],
        &[
            ("SETTLED_DATABASE_URL", url.as_str()),
            ("SETTLED_PARK__FIRST_RETRY", "100ms"),
            ("SETTLED_HELD__POLL", "20ms"),
        ],
    ]
    .concat();
    let worker = place.ready_worker(&quick).await;
    place.publish(&[fixture.partner.cleared(&fixture.reserved)]).await;
    until("it settles", PATIENCE, async || {
        let sql = "SELECT status = 'cleared' FROM settled.allocations WHERE id = $1";
        let row = fixture.db.query_one(sql, &[&fixture.reserved.id]).await.expect("a row");
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    worker.terminate().await;
    assert!(!worker.said().contains("permission denied"), "{}", worker.said());

    let environment = [
        ("SETTLED_DATABASE_URL", url.as_str()),
        ("SETTLED_BROKER_URL", place.broker_url.as_str()),
    ];
    assert!(!is_missed_in_silence(&fixture, &url).await, "it has all of its rights");
    let mut idle = Vec::new();
    for right in singly(role) {
        fixture.sql(&right.revoke()).await;
        let told = ask_in(&environment, &["doctor"]).await;
        let document: Value = serde_json::from_str(told.out.trim()).unwrap_or_else(|_| panic!("{}", told.all()));
        let line = |name: &str| {
            let mut checks = document["checks"].as_array().expect("checks").iter();
            checks.find(|check| check["name"] == name).cloned().unwrap_or_default()
        };
        let named = line("grants");
        assert!(
            named["ok"] == false && named["hint"].as_str().is_some_and(|hint| hint.contains(right.whole)),
            "{}: {named}",
            right.grant
        );
        let noticed = [
            "schema",
            "rehearsal",
            "keys",
            "outbox",
            "held",
            "open_dead_letters",
            "outbox_refused",
        ]
        .iter()
        .any(|name| line(name)["ok"] == false);
        if !noticed && !is_missed_in_silence(&fixture, &url).await && !is_missed_at_work(&fixture, &quick).await {
            idle.push(right.grant.clone());
        }
        fixture.sql(&right.grant).await;
    }
    assert!(
        idle.is_empty(),
        "no work of the worker needs these:\n{}",
        idle.join("\n")
    );
    fixture.forget(role).await;
}

/// Whether a worker that does some of everything meets a right that it lacks.
async fn is_missed_at_work(fixture: &Fixture, settings: &[(&str, &str)]) -> bool {
    fixture
        .sql(
            "UPDATE settled.parked SET due_at = now(), leased_until = NULL;
             INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
             SELECT gen_random_uuid(), format, publications, count, now(), '-infinity' FROM public.kept",
        )
        .await;
    let worker = fixture.place.worker(settings);
    let began = std::time::Instant::now();
    let mut missed = false;
    while !missed && began.elapsed() < Duration::from_secs(10) {
        missed = worker.said().contains("permission denied");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    worker.terminate().await;
    missed
}

/// Rights are told as a fault of the set-up, with the line that mends it; a role is looked at by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_right_is_told_with_what_gives_it() {
    let fixture = Fixture::new("role_told").await;
    let name = format!("{}_bob", fixture.place.name);
    fixture.sql(&format!("CREATE ROLE {name} LOGIN PASSWORD 'p'")).await;
    let url = fixture.place.database_url_of(&name);
    let environment = [("SETTLED_DATABASE_URL", url.as_str())];
    let add = ["partner", "add", "--enterprise-id", "x", "--name", "x"];
    let (message, hint) = ask_in(&environment, &add).await.refusal(DENIED);
    assert!(message.contains("lacks a permission"), "{message}");
    assert_eq!(
        hint,
        format!("as the owner of the schema: GRANT settled_registrar TO {name};")
    );
    fixture.sql(&format!("GRANT settled_registrar TO {name}")).await;
    ask_in(&environment, &add).await.document(0);
    // What it may do it may do alone.
    let (_, hint) = ask_in(&environment, &["ledger", "check"]).await.refusal(DENIED);
    assert!(hint.contains("GRANT settled_auditor TO"), "{hint}");

    let look = async |role: &str| ask(&fixture.place, &["doctor", "--role", role]).await;
    for role in DatabaseRole::ALL {
        let found = look(role.name()).await.document(0);
        assert_eq!(found["ok"], true, "{role}: {found}");
    }
    // What is missing, and what is more: of a table, of columns of it, of a function, of the schema.
    fixture
        .sql(
            "REVOKE INSERT ON settled.audit FROM settled_registrar;
             GRANT DELETE ON settled.parked TO settled_registrar;
             GRANT UPDATE (body, until, bytes) ON settled.parked TO settled_registrar;
             GRANT SELECT (xid) ON settled.owed TO settled_registrar;
             GRANT EXECUTE ON FUNCTION settled.withdraw(uuid, text, numeric, text) TO settled_registrar;
             GRANT CREATE ON SCHEMA settled TO settled_registrar",
        )
        .await;
    let on_database = format!("ON DATABASE {} TO", fixture.place.name);
    fixture
        .sql(&format!(
            "GRANT TEMPORARY {on_database} settled_registrar; GRANT CREATE {on_database} settled_registrar"
        ))
        .await;
    let found = look("registrar").await.document(1);
    let text = found.to_string();
    for more in [
        "UPDATE (body, bytes) on settled.parked",
        "SELECT (xid) on settled.owed",
        "EXECUTE on settled.withdraw(uuid, text, numeric, text)",
        "CREATE on schema settled",
        "TEMPORARY on this database",
        "CREATE on this database",
    ] {
        assert!(text.contains(more), "{more}: {text}");
    }
    assert!(
        text.contains("GRANT INSERT ON settled.audit TO settled_registrar;"),
        "{text}"
    );
    assert!(text.contains("DELETE on settled.parked"), "{text}");
    // What everybody may is said by a line of its own, and is no surplus of each role.
    fixture.sql(&format!("GRANT TEMPORARY {on_database} PUBLIC")).await;
    let text = look("registrar").await.document(1).to_string();
    assert!(!text.contains("TEMPORARY on this database"), "{text}");
    // No one makes temporary objects but who owns the database, or is granted it by name.
    let temporary = "CREATE TEMPORARY TABLE mine (x integer)";
    let bob = connect(&url).await;
    bob.batch_execute(temporary).await.expect("everybody may");
    drop(bob);
    // Applied once more, it is as it was.
    let again = ask(&fixture.place, &["roles", "--apply"]).await.document(0);
    assert_eq!(again["applied"], true);
    assert_eq!(look("registrar").await.document(0)["ok"], true);
    let error = connect(&url).await.batch_execute(temporary).await.expect_err("a table");
    assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{error}");
    let printed = ask(&fixture.place, &["roles"]).await.document(0);
    assert_eq!(printed["applied"], false);
    assert_eq!(printed["statements"], again["statements"]);

    // Nobody else may call what moves money in, and everybody finds the same functions.
    let sql = "SELECT p.proname::text, p.prosecdef, p.proconfig::text, pg_get_userbyid(p.proowner)::text
               FROM pg_proc AS p
               WHERE p.pronamespace = 'settled'::regnamespace AND p.proname IN ('reserve', 'deposit', 'withdraw')";
    for row in fixture.db.query(sql, &[]).await.expect("functions") {
        assert!(row.get::<_, bool>(1), "{} is SECURITY DEFINER", row.get::<_, String>(0));
        assert_eq!(row.get::<_, String>(2), "{\"search_path=pg_catalog, pg_temp\"}");
        assert_eq!(row.get::<_, String>(3), "settled_owner");
    }
    for call in [
        "SELECT settled.deposit(gen_random_uuid(), 'BTC', 5, 'r')",
        "SELECT settled.withdraw(gen_random_uuid(), 'BTC', 5, 'r')",
        "SELECT * FROM settled.reserve('[]')",
    ] {
        let sql = format!("SET ROLE {name}");
        fixture.sql(&sql).await;
        let error = fixture.db.batch_execute(call).await.expect_err(call);
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{call}: {error}");
        fixture.sql("RESET ROLE").await;
    }
    fixture.sql(&format!("DROP ROLE {name}")).await;
    assert_eq!(json!(found["ok"]), json!(false));
}

/// Every command that asks the database has its role.
#[tokio::test]
async fn each_command_has_one_role() {
    let place = Place::new("role_table").await;
    let roles = commands_of(&place).await;
    let mut seen = BTreeSet::new();
    for (role, commands) in &roles {
        for command in commands {
            assert!(seen.insert(command.clone()), "{command} has two roles, one is {role}");
        }
    }
    // These ask nobody.
    let alone = [
        "config reference",
        "config show",
        "partner-kit lint",
        "partner-kit sign",
        "partner-kit vectors",
        "probe",
        "completions",
        "man",
    ];
    // Does what others do, with the rights of those whose work it is used for: docs/console.md.
    let several = ["console"];
    let all = contract::ANSWERS
        .iter()
        .map(|(command, _)| *command)
        .chain(contract::SILENT.iter().map(|(command, _)| *command));
    let without: Vec<&str> = all
        .filter(|command| !seen.contains(*command) && !alone.contains(command) && !several.contains(command))
        .collect();
    assert!(
        without.is_empty(),
        "no role is said to run {without:?} (src/cli/roles.rs)"
    );
}
