//! A database and a vhost for each test, the real binary, and waiting for things to become true.

use std::{
    future::Future,
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
};
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::kit::{
    amqp::{Line, Message, Seen, Tap},
    auditor::{
        self, Deposit, Observed, Reservation, Sent, Story,
        books::Books,
        bounds::{Amounts, Gauge},
    },
    contract,
    partner::Partner,
    secrets,
};

/// Of a worker that leaves dead letters in their queue, for tests that look at them there.
pub(crate) const LEAVE_DEAD_LETTERS: (&str, &str) = ("SETTLED_DEAD_LETTERS__COLLECT", "false");

/// The worker with its collector, quick to take what is due, and to take over what a dead worker had.
pub(crate) const COLLECTS: [(&str, &str); 4] = [
    ("SETTLED_DEAD_LETTERS__COLLECT", "true"),
    ("SETTLED_PARK__LEASE", "1s"),
    ("SETTLED_PARK__POLL", "20ms"),
    ("SETTLED_RETRY__MAX", "200ms"),
];

/// Longer than anything here takes on a busy machine. Where tests are meant to fail (`dev/mutants`), the seconds are said
/// when they are compiled.
pub(crate) const PATIENCE: Duration = Duration::from_secs(match option_env!("SETTLED_TEST_PATIENCE") {
    Some(seconds) => match u64::from_str_radix(seconds, 10) {
        Ok(seconds) => seconds,
        Err(_) => panic!("SETTLED_TEST_PATIENCE is a number of seconds"),
    },
    None => 60,
});

/// Waits for a condition, looking again and again. The only wait there is in these tests.
pub(crate) async fn until<T>(what: &str, deadline: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < deadline, "waited {deadline:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Where PostgreSQL and RabbitMQ are.
#[derive(Clone)]
pub(crate) struct Services {
    pub(crate) database: String,
    pub(crate) broker: String,
    pub(crate) management: String,
}

impl Services {
    /// What `dev/services up` printed.
    pub(crate) fn of_environment() -> Self {
        let variable = |name: &str| {
            std::env::var(name)
                .ok()
                .filter(|value| !value.is_empty())
                .unwrap_or_else(|| {
                    panic!("{name} is not set: run `make test`, or export what `dev/services up` prints")
                })
        };
        Self {
            database: variable("SETTLED_DATABASE_URL"),
            broker: variable("SETTLED_BROKER_URL"),
            management: variable("SETTLED_BROKER_MANAGEMENT_URL"),
        }
    }

    /// The three lines that `dev/services` prints.
    pub(crate) fn of_lines(text: &str) -> Self {
        let line = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_else(|| panic!("no {name} in {text:?}"))
                .trim_matches('\'')
                .to_owned()
        };
        Self {
            database: line("SETTLED_DATABASE_URL"),
            broker: line("SETTLED_BROKER_URL"),
            management: line("SETTLED_BROKER_MANAGEMENT_URL"),
        }
    }

    /// Asks the broker's management API; the status and the answer.
    pub(crate) async fn manage(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let began = Instant::now();
        loop {
            let error = match self.try_manage(method, path, body.clone(), PATIENCE).await {
                Ok(answer) => return answer,
                Err(error) => error,
            };
            // A node that paused, or starts, takes no connections for a moment; what was refused there was not done.
            let may_come = error.contains("Connection refused") && began.elapsed() < PATIENCE;
            assert!(may_come, "the management API answers: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The same of one that may be away.
    pub(crate) async fn try_manage(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        patience: Duration,
    ) -> Result<(u16, Value), String> {
        let (scheme, rest) = self.management.split_once("://").expect("a URL");
        let (user, host) = rest.rsplit_once('@').expect("user and password in the management URL");
        let (name, password) = user.split_once(':').expect("a password in the management URL");
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{scheme}://{}{path}", host.trim_end_matches('/')))
            .header(
                "authorization",
                basic(&percent_decoded(name), &percent_decoded(password)),
            )
            .header("content-type", "application/json")
            .body(body.map(|body| body.to_string()).unwrap_or_default())
            .expect("a request");
        let answer = tokio::task::spawn_blocking(move || {
            let config = ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(patience))
                .build();
            let mut answer = ureq::Agent::new_with_config(config).run(request)?;
            let text = answer.body_mut().read_to_string()?;
            Ok::<_, ureq::Error>((answer.status().as_u16(), text))
        });
        let (status, text) = answer.await.expect("no panic").map_err(|error| error.to_string())?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    /// The first number of the broker's version.
    pub(crate) async fn broker_major(&self) -> u32 {
        let (_, overview) = self.manage("GET", "/api/overview", None).await;
        let version = overview["rabbitmq_version"].as_str().expect("a version");
        let major = version.split('.').next().and_then(|number| number.parse().ok());
        major.unwrap_or_else(|| panic!("a version: {version}"))
    }

    pub(crate) async fn make_vhost(&self, name: &str) {
        let (status, answer) = self.manage("PUT", &format!("/api/vhosts/{name}"), None).await;
        assert!(matches!(status, 201 | 204), "vhost {name}: {status} {answer}");
        let user = userinfo(&self.broker).0;
        let all = serde_json::json!({"configure": ".*", "write": ".*", "read": ".*"});
        let path = format!("/api/permissions/{name}/{user}");
        let (status, answer) = self.manage("PUT", &path, Some(all)).await;
        assert!(matches!(status, 201 | 204), "permissions on {name}: {status} {answer}");
    }

    /// A database that has run the migrations of this checkout, made once however many tests ask at a time.
    async fn template(&self) -> String {
        let mut files: Vec<PathBuf> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/schema"))
            .expect("the schema's directory")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        files.sort();
        let mut hash = Sha256::new();
        for file in &files {
            hash.update(file.file_name().expect("a name").as_encoded_bytes());
            hash.update(std::fs::read(file).expect("a migration"));
        }
        let hash = hex::encode(hash.finalize());
        let name = format!("settled_template_{}", hash.get(..16).expect("a long hash"));
        let admin = connect(&self.database).await;
        let is_made = async || {
            let sql = "SELECT FROM pg_database WHERE datname = $1 AND datistemplate";
            !admin.query(sql, &[&name]).await.expect("pg_database").is_empty()
        };
        if is_made().await {
            return name;
        }
        // Tests run in processes of their own: one makes it, the others wait. The lock goes with the connection.
        let lock = "SELECT pg_advisory_lock(hashtextextended($1, 0))";
        admin.execute(lock, &[&name]).await.expect("the lock");
        if is_made().await {
            return name;
        }
        let make = async |sql: String| admin.batch_execute(&sql).await.expect(&sql);
        make(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
        make(format!("CREATE DATABASE {name} TEMPLATE template0")).await;
        let mut migrate = settled();
        migrate
            .env("SETTLED_DATABASE_URL", with_path(&self.database, &name))
            .arg("migrate");
        let output = migrate.output().await.expect("settled runs");
        assert!(output.status.success(), "settled migrate: {}", said(&output));
        let made = connect(&with_path(&self.database, &name)).await;
        let applied = "SELECT count(*) FROM settled.refinery_schema_history";
        let applied: i64 = made.query_one(applied, &[]).await.expect("a history").get(0);
        let stale = "the program was built of another checkout than the tests: build it again";
        assert_eq!(usize::try_from(applied).ok(), Some(files.len()), "{stale}");
        drop(made);
        // Nobody connects to it any more, so that it can be copied at any time. Being a template says that it is complete.
        make(format!(
            "ALTER DATABASE {name} ALLOW_CONNECTIONS false IS_TEMPLATE true"
        ))
        .await;
        name
    }
}

fn basic(name: &str, password: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = "Basic ".to_owned();
    for chunk in format!("{name}:{password}").as_bytes().chunks(3) {
        let number = chunk
            .iter()
            .chain(&[0; 2])
            .take(3)
            .fold(0_usize, |number, byte| number << 8 | usize::from(*byte));
        for place in 0..4 {
            let digit = DIGITS[number >> (18 - 6 * place) & 63];
            text.push(if place > chunk.len() { '=' } else { char::from(digit) });
        }
    }
    text
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let code = (*first == b'%')
            .then(|| more.split_at_checked(2))
            .flatten()
            .and_then(|(code, after)| Some((u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok()?, after)));
        let (byte, after) = code.unwrap_or((*first, more));
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8(bytes).expect("UTF-8")
}

/// A place with one partner, whose client has so many satoshis.
pub(crate) async fn with_partner(test: &str, satoshis: &str) -> (Place, Partner) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", satoshis).await;
    (place, partner)
}

/// The same with so many reservations of one satoshi.
pub(crate) async fn with_reservations(test: &str, count: usize) -> (Place, Partner, Vec<Reservation>) {
    let (place, partner) = with_partner(test, "1000000").await;
    let reservations: Vec<_> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

/// How many rows of a table or view of ours; `what` may go on with a condition.
pub(crate) async fn count(db: &Client, what: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM settled.{what}");
    db.query_one(&sql, &[]).await.expect(&sql).get(0)
}

/// The user and the password of a URL, as they stand in it.
pub(crate) fn userinfo(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").expect("a URL").1;
    let user = rest.rsplit_once('@').expect("a user in the URL").0;
    user.split_once(':').expect("a password in the URL")
}

/// The URL with another database or vhost.
pub(crate) fn with_path(url: &str, path: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let (rest, query) = rest
        .split_once('?')
        .map_or((rest, String::new()), |(rest, query)| (rest, format!("?{query}")));
    let authority = rest.split('/').next().expect("a first part");
    format!("{scheme}://{authority}/{path}{query}")
}

/// The URL with another host and port.
pub(crate) fn with_address(url: &str, address: std::net::SocketAddr) -> String {
    let (before, rest) = url.rsplit_once('@').expect("a user in the URL");
    let path = rest.split_once('/').map_or("", |(_, path)| path);
    format!("{before}@{address}/{path}")
}

/// The host and port of a URL.
pub(crate) fn address(url: &str) -> String {
    let rest = url.rsplit_once('@').expect("a user in the URL").1;
    rest.split(['/', '?']).next().expect("a first part").to_owned()
}

/// A URL for each of its hosts.
pub(crate) fn each_host(url: &str) -> Vec<String> {
    let all = address(url);
    all.split(',').map(|host| url.replacen(&all, host, 1)).collect()
}

pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the database answers");
    tokio::spawn(async move {
        // The client sees the error itself.
        drop(connection.await);
    });
    client
}

/// The program that is tried: the one of the tests, unless what is measured is the one that `make` built to be used.
pub(crate) fn program() -> std::ffi::OsString {
    std::env::var_os("SETTLED_TEST_PROGRAM")
        .filter(|program| !program.is_empty())
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_settled").into())
}

/// The binary, without the environment's settings.
pub(crate) fn settled() -> Command {
    let mut command = Command::new(program());
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("SETTLED_") || name_text.starts_with("OTEL_") {
            command.env_remove(&name);
        }
    }
    command.kill_on_drop(true);
    command
}

/// Says that a test cannot run here, and why. Its name is the one that `tests/skips.txt` has: `file::function`.
pub(crate) fn skip(test: &str, why: &str) {
    // The runner names a test's thread after it, unless it runs them on its own.
    if let Some(name) = std::thread::current()
        .name()
        .and_then(|name| name.strip_prefix("cases::"))
    {
        assert_eq!(name, test, "the test that was skipped has another name");
    }
    let line = format!("SKIPPED {test}: {}\n", why.replace('\n', " "));
    eprint!("{line}");
    if let Some(path) = std::env::var_os("SETTLED_TEST_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        std::io::Write::write_all(&mut file.expect("the list of skips"), line.as_bytes()).expect("a line in it");
    }
}

/// Everything a command printed, for a failure's message.
pub(crate) fn said(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// One test's own database, vhost and directory, with everything that was said in it. Deleted when the test passes, kept
/// and named when it fails (but for `SETTLED_TEST_KEEP=no`).
pub(crate) struct Place {
    /// What every event's subscriber saw.
    pub(crate) events: Tap,
    /// What came to the dead-letter exchange.
    pub(crate) dead: Tap,
    line: Line,
    story: Mutex<Story>,
    // The last field is the last to go: what stands on the ground lets go of it first.
    ground: Ground,
}

impl std::ops::Deref for Place {
    type Target = Ground;

    fn deref(&self) -> &Ground {
        &self.ground
    }
}

impl Place {
    /// A migrated database and a declared topology.
    pub(crate) async fn new(test: &str) -> Self {
        Self::within(Services::of_environment(), test).await
    }

    /// The same in services of one's own.
    pub(crate) async fn within(services: Services, test: &str) -> Self {
        Self::on(Ground::within(services, test).await).await
    }

    /// The same on ground that was made ready for it.
    pub(crate) async fn on(ground: Ground) -> Self {
        ground.copy_template().await;
        Self::with_topology(ground).await
    }

    /// A copy of these books, with everything that was told of them, on a broker of its own. No one may be at work here.
    pub(crate) async fn copy(&self, test: &str) -> Self {
        let ground = Ground::within(self.services.clone(), test).await;
        ground.create_database(&self.name).await;
        let place = Self::with_topology(ground).await;
        *place.story() = self.told();
        place.events.recall(self.events.seen());
        place.dead.recall(self.dead.seen());
        place
    }

    /// Lets go of everything but the ground, which takes its time to go.
    pub(crate) fn leave(self) -> Ground {
        self.ground
    }

    /// Where the database is made already.
    pub(crate) async fn with_topology(ground: Ground) -> Self {
        let output = ground.run(&["topology"]).await;
        assert!(output.status.success(), "settled topology: {}", said(&output));
        Self {
            events: Tap::open(&ground.broker_url, "settlement.events", "test.events").await,
            dead: Tap::open(&ground.broker_url, "settlement.dead", "test.dead").await,
            line: Line::open(&ground.broker_url).await,
            story: Mutex::default(),
            ground,
        }
    }

    pub(crate) async fn succeed(&self, arguments: &[&str]) {
        let output = self.run(arguments).await;
        assert!(
            output.status.success(),
            "settled {}: {}",
            arguments.join(" "),
            said(&output)
        );
    }

    pub(crate) fn story(&self) -> MutexGuard<'_, Story> {
        self.story.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> Story {
        self.story().clone()
    }

    /// Registers a partner with its key and connection.
    pub(crate) async fn register(&self, partner: &Partner) {
        self.register_with(partner, &[]).await;
    }

    /// The same with further flags of `partner add`.
    pub(crate) async fn register_with(&self, partner: &Partner, flags: &[&str]) {
        let enterprise = partner.enterprise.as_str();
        let add = ["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"];
        self.succeed(&[&add, flags].concat()).await;
        self.add_key(partner).await;
        self.connect_partner(partner).await;
    }

    pub(crate) async fn add_key(&self, partner: &Partner) {
        let key = partner.public_key();
        let enterprise = partner.enterprise.as_str();
        self.succeed(&["key", "add", "--enterprise-id", enterprise, "--public-key", &key])
            .await;
        self.story().keys.push((enterprise.to_owned(), key));
    }

    pub(crate) async fn connect_partner(&self, partner: &Partner) {
        let (connection, client) = (partner.connection.to_string(), partner.client.to_string());
        self.succeed(&[
            "connection",
            "add",
            "--connection-id",
            &connection,
            "--enterprise-id",
            &partner.enterprise,
            "--client-id",
            &client,
            "--partners-client-id",
            &partner.partners_client,
            "--partners-connection-id",
            &partner.partners_connection,
        ])
        .await;
    }

    /// Funds come in for a partner's client.
    pub(crate) async fn deposit(&self, partner: &Partner, currency: &str, quantity: &str) {
        let (client, reference) = (partner.client.to_string(), Uuid::new_v4().to_string());
        self.succeed(&[
            "deposit",
            "--client-id",
            &client,
            "--currency",
            currency,
            "--quantity",
            quantity,
            "--reference",
            &reference,
        ])
        .await;
        self.story().deposits.push(Deposit {
            client: partner.client,
            currency: currency.to_owned(),
            quantity: quantity.to_owned(),
        });
    }

    /// Reserves in one command; every one must be reserved.
    pub(crate) async fn reserve(&self, reservations: &[Reservation]) {
        let lines: String = reservations
            .iter()
            .map(|reservation| reservation.line() + "\n")
            .collect();
        let output = self.run_with(&["allocation", "reserve", "--json"], &lines).await;
        let text = String::from_utf8_lossy(&output.stdout);
        let refused = text
            .lines()
            .filter(|line| serde_json::from_str::<Value>(line).is_ok_and(|answer| answer["result"] != "reserved"));
        let refused: Vec<&str> = refused.collect();
        assert!(
            output.status.success() && refused.is_empty() && text.lines().count() == reservations.len(),
            "settled allocation reserve: {refused:?} {}",
            said(&output)
        );
        self.story().reservations.extend_from_slice(reservations);
    }

    /// Publishes as partners do, persistent and confirmed, and remembers what was published.
    pub(crate) async fn publish(&self, messages: &[Message]) {
        self.story().sent.extend(messages.iter().map(|message| Sent {
            routing_key: message.routing_key.clone(),
            body: message.body.clone(),
            expect: message.expect,
        }));
        self.line.publish(messages).await;
    }

    /// The line this test speaks and looks on.
    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    /// Waits until everything that was published has its place and nothing is left to publish; says what is missing.
    pub(crate) async fn rest(&self) {
        self.rest_within(PATIENCE).await;
    }

    /// The same where there is more to do.
    pub(crate) async fn rest_within(&self, patience: Duration) {
        let db = self.db().await;
        let began = Instant::now();
        loop {
            let mut problems = auditor::unrest(&db, &self.told(), &self.dead.seen()).await;
            // After a lost acknowledgement a message is settled and waits in the queue still.
            if problems.is_empty() && self.line.depth("settlement.updates").await > 0 {
                problems.push("I7: messages in the queue".to_owned());
            }
            // Acknowledged, and judged in a moment.
            let held = "SELECT EXISTS (SELECT FROM settled.held)";
            if problems.is_empty() && db.query_one(held, &[]).await.expect("held").get(0) {
                problems.push("I7: messages are held".to_owned());
            }
            if problems.is_empty() && self.collects() && self.line.depth("settlement.dead").await > 0 {
                problems.push("I7: dead letters in the queue".to_owned());
            }
            if problems.is_empty() {
                return;
            }
            assert!(
                began.elapsed() < patience,
                "no rest within {patience:?}: {}",
                problems.join("\n")
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Rest with a consumer attached and within the worker's bounds; where the story wants it, everything said again; an
    /// orderly stop of the last worker; and then the books: nothing may be wrong with them.
    pub(crate) async fn settle_up(&self, worker: Worker) {
        self.rest().await;
        worker.ready().await;
        if self.story().repeats {
            self.repeat(&worker).await;
        }
        self.check_bounds(&worker).await;
        let status = worker.terminate().await;
        assert_eq!(status.code(), Some(0), "SIGTERM ends the worker in order");
        self.audit().await;
    }

    /// Says again what had an effect: it must be answered as before, and change nothing (I6).
    async fn repeat(&self, worker: &Worker) {
        // Enough to meet every kind of effect, in a moment.
        const MOST: usize = 100;
        let db = self.db().await;
        let again = auditor::effective(&db, &self.told()).await;
        let step = again.len().div_ceil(MOST).max(1);
        let again: Vec<Message> = again
            .iter()
            .step_by(step)
            .map(|sent| Message::new(&sent.routing_key, sent.body.clone(), sent.expect))
            .collect();
        let count = async || -> i64 {
            let sql = "SELECT coalesce(sum(duplicate), 0)::bigint FROM settled.batches";
            db.query_one(sql, &[]).await.expect("batches").get(0)
        };
        let (before, duplicates) = (Books::read(&db).await, count().await);
        self.publish(&again).await;
        until("I6: what is said again is a duplicate", PATIENCE, async || {
            assert!(worker.ended().is_none(), "the worker ended: {}", worker.said());
            (count().await >= duplicates + again.len() as i64).then_some(())
        })
        .await;
        self.rest().await;
        let changes = before.changes(&Books::read(&db).await);
        assert!(changes.is_empty(), "the auditor found:\n{}", changes.join("\n"));
    }

    /// What the worker takes is within its bounds (I10), once the services have noticed the end of what was cut off.
    async fn check_bounds(&self, worker: &Worker) {
        let gauge = Gauge::of(self, worker);
        let sql = "SELECT count(*) FROM settled.partners WHERE own_queue";
        let own_queues: i64 = self.db().await.query_one(sql, &[]).await.expect("partners").get(0);
        // Their lanes have the default prefetch in every test that has any.
        let bounds = worker.bounds.with_lanes(own_queues.unsigned_abs(), 1_000);
        let began = Instant::now();
        loop {
            let above = gauge.read().await.above(&bounds);
            if above.is_empty() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "the auditor found:\n{}", above.join("\n"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The books at rest, from outside. No worker may be running.
    pub(crate) async fn audit(&self) {
        // With no consumer left, what was not acknowledged is in the queue again and counts as ready.
        let left = self.line.depth("settlement.updates").await;
        assert_eq!(left, 0, "I7: messages were left in the queue, or never acknowledged");
        if self.collects() {
            let left = self.line.depth("settlement.dead").await;
            assert_eq!(
                left, 0,
                "I7: dead letters were left in the queue, or never acknowledged"
            );
        }
        self.audit_midway().await;
        let problems = auditor::unrest(&self.db().await, &self.told(), &self.dead.seen()).await;
        assert!(problems.is_empty(), "the auditor found:\n{}", problems.join("\n"));
    }

    /// The books at any moment after an orderly stop: what was not taken yet waits in the queue, and is in no other place.
    pub(crate) async fn audit_midway(&self) {
        assert_eq!(
            self.line.depth("settlement.unreadable").await,
            0,
            "I3: dead letters nobody could read"
        );
        let observed = self.observed().await;
        let sql = "SELECT coalesce(string_agg(a::text, E'\\n'), '') FROM settled.audit AS a";
        let written: String = self.db().await.query_one(sql, &[]).await.expect("the audit").get(0);
        secrets::check("the audit", &written);
        let mut problems = auditor::audit(&self.db().await, &self.told(), &observed).await;
        if self.line.depth("settlement.dead").await == 0 {
            problems.extend(auditor::uncollected(&self.db().await, &observed.dead).await);
        }
        assert!(problems.is_empty(), "the auditor found:\n{}", problems.join("\n"));
    }

    /// Everything that can be seen without the database.
    pub(crate) async fn observed(&self) -> Observed {
        self.events.catch_up(&self.line).await;
        self.dead.catch_up(&self.line).await;
        Observed {
            events: self.events.seen().into_iter().flat_map(Seen::events).collect(),
            dead: self.dead.seen(),
            queued: self.line.peek("settlement.updates").await,
        }
    }
}

/// An empty vhost, the name of a database that does not exist yet, and a directory.
pub(crate) struct Ground {
    pub(crate) name: String,
    pub(crate) services: Services,
    pub(crate) database_url: String,
    pub(crate) broker_url: String,
    directory: PathBuf,
    workers: AtomicUsize,
    /// A worker here collects dead letters.
    collects: AtomicBool,
}

impl Ground {
    pub(crate) async fn new(test: &str) -> Self {
        Self::within(Services::of_environment(), test).await
    }

    pub(crate) async fn within(services: Services, test: &str) -> Self {
        let id = Uuid::new_v4().simple().to_string();
        let name = format!("t_{test}_{}", id.get(..8).expect("32 digits"));
        services.make_vhost(&name).await;
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&name);
        std::fs::create_dir_all(&directory).expect("a directory");
        for url in [&services.database, &services.broker, &services.management] {
            secrets::of_url(url);
        }
        Self {
            database_url: with_path(&services.database, &name),
            broker_url: with_path(&services.broker, &name),
            name,
            services,
            directory,
            workers: AtomicUsize::new(0),
            collects: AtomicBool::new(false),
        }
    }

    /// Makes the database, with our schema.
    pub(crate) async fn copy_template(&self) {
        let template = self.services.template().await;
        self.create_database(&template).await;
    }

    /// Makes the database, empty.
    pub(crate) async fn create_database(&self, template: &str) {
        let admin = connect(&self.services.database).await;
        let sql = format!("CREATE DATABASE {} TEMPLATE {template}", self.name);
        admin.batch_execute(&sql).await.expect("a database");
    }

    fn collects(&self) -> bool {
        self.collects.load(Ordering::Relaxed)
    }

    /// A connection to the database, for looking at it and for breaking it.
    pub(crate) async fn db(&self) -> Client {
        connect(&self.database_url).await
    }

    /// The database's URL for another login, whose password is `p`.
    pub(crate) fn database_url_of(&self, login: &str) -> String {
        let (user, password) = userinfo(&self.database_url);
        self.database_url
            .replace(&format!("{user}:{password}@"), &format!("{login}:p@"))
    }

    /// Changes what the database's guards let nobody change: time passes, a later version wrote it, somebody had the owner's
    /// rights.
    pub(crate) async fn tamper(&self, sql: &str) {
        let unguarded = format!("BEGIN; SET LOCAL session_replication_role = replica; {sql}; COMMIT");
        let done = self.db().await.batch_execute(&unguarded).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// A file of this test's own.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A command of `settled`, yet to be run.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = settled();
        command
            .env("SETTLED_DATABASE_URL", &self.database_url)
            .env("SETTLED_BROKER_URL", &self.broker_url)
            .args(arguments);
        command
    }

    /// Runs a command of `settled`.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, "").await
    }

    /// The same with something on stdin.
    pub(crate) async fn run_with(&self, arguments: &[&str], stdin: &str) -> Output {
        run(&self.database_url, &self.broker_url, arguments, stdin).await
    }

    /// Runs a command that must succeed, with `--json`, and reads its document.
    pub(crate) async fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        let output = self.run(&arguments).await;
        assert!(
            output.status.success(),
            "settled {}: {}",
            arguments.join(" "),
            said(&output)
        );
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {}", said(&output)))
    }

    /// The database as workers reach it: through the pooler of `dev/pooler`, if it stands before the same server.
    fn database_of_workers(&self) -> String {
        let given = |name: &str| std::env::var(name).ok();
        match (given("SETTLED_TEST_POOLER"), given("SETTLED_DATABASE_URL")) {
            (Some(pooler), Some(shared)) if address(&shared) == address(&self.database_url) => {
                with_address(&self.database_url, pooler.parse().expect("the pooler's address"))
            }
            _ => self.database_url.clone(),
        }
    }

    /// Starts a worker with further settings, and does not wait for it.
    pub(crate) fn worker(&self, settings: &[(&str, &str)]) -> Worker {
        let number = self.workers.fetch_add(1, Ordering::Relaxed);
        let log = self.directory.join(format!("worker-{number}.log"));
        let mut command = settled();
        command
            .env("SETTLED_DATABASE_URL", self.database_of_workers())
            .env("SETTLED_BROKER_URL", &self.broker_url)
            .env("SETTLED_WORKER__NAME", format!("w{number}"))
            .env("SETTLED_HTTP__LISTEN", "127.0.0.1:0")
            // Of half of them everything: what they say is searched for what nobody may read.
            .env(
                "SETTLED_LOG__LEVEL",
                if (self.name.len() + number).is_multiple_of(2) {
                    "trace"
                } else {
                    "debug"
                },
            )
            .env("SETTLED_LOG__FORMAT", "json");
        for (name, value) in settings {
            command.env(name, value);
        }
        if !settings.contains(&LEAVE_DEAD_LETTERS) {
            self.collects.store(true, Ordering::Relaxed);
        }
        let name = settings.iter().rev().find(|(name, _)| *name == "SETTLED_WORKER__NAME");
        let name = name.map_or_else(|| format!("w{number}"), |(_, name)| (*name).to_owned());
        Worker::start(command, log, name, Amounts::bounds(settings))
    }

    /// A worker that is ready.
    pub(crate) async fn ready_worker(&self, settings: &[(&str, &str)]) -> Worker {
        let worker = self.worker(settings);
        worker.ready().await;
        worker
    }

    async fn delete(name: String, services: Services) {
        let admin = connect(&services.database).await;
        let sql = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
        admin.batch_execute(&sql).await.expect("the database goes");
        services.manage("DELETE", &format!("/api/vhosts/{name}"), None).await;
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let keep = std::env::var_os("SETTLED_TEST_KEEP").is_none_or(|keep| keep != "no");
        if std::thread::panicking() && keep {
            eprintln!(
                "kept: database and vhost {}, logs in {}",
                self.name,
                self.directory.display()
            );
            return;
        }
        let (name, services) = (self.name.clone(), self.services.clone());
        // A runtime cannot be blocked on from within itself.
        let delete = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(Self::delete(name, services));
        });
        if delete.join().is_ok() {
            drop(std::fs::remove_dir_all(&self.directory));
        }
    }
}

/// Asks an address; the status and the body. Nothing where it does not answer.
pub(crate) async fn get(url: &str) -> Option<(u16, String)> {
    let asked = url.to_owned();
    let asking = tokio::task::spawn_blocking(move || {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(10)))
            .build();
        let mut answer = ureq::Agent::new_with_config(config).get(&asked).call().ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        Some((answer.status().as_u16(), text))
    });
    let answer = asking.await.expect("no panic");
    if let Some((_, text)) = &answer {
        secrets::check(url, text);
    }
    answer
}

pub(crate) async fn run(database_url: &str, broker_url: &str, arguments: &[&str], stdin: &str) -> Output {
    let mut command = settled();
    command
        .env("SETTLED_DATABASE_URL", database_url)
        .env("SETTLED_BROKER_URL", broker_url)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("settled starts");
    let mut input = child.stdin.take().expect("a pipe");
    let write = async move {
        // A command that does not read its stdin ends before it is written.
        drop(input.write_all(stdin.as_bytes()).await);
        drop(input);
    };
    let both = async { tokio::join!(child.wait_with_output(), write).0 };
    let output = tokio::time::timeout(PATIENCE, both).await;
    let output = output
        .unwrap_or_else(|_| panic!("settled {arguments:?} did not end"))
        .expect("an exit");
    contract::answered(arguments, &output);
    secrets::check_command(arguments, &output);
    output
}

/// A worker's process.
pub(crate) struct Worker {
    child: Mutex<Child>,
    pub(crate) log: PathBuf,
    pub(crate) name: String,
    /// What it may take, by its settings.
    pub(crate) bounds: Amounts,
}

impl Worker {
    fn start(mut command: Command, log: PathBuf, name: String, bounds: Amounts) -> Self {
        let file = std::fs::File::create(&log).expect("a log");
        command
            .arg("worker")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file);
        let child = Mutex::new(command.spawn().expect("settled starts"));
        Self {
            child,
            log,
            name,
            bounds,
        }
    }

    /// Its process, while it lives.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child().id()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its log so far.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("its log")).into_owned()
    }

    /// The lines of its log that are JSON.
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.said()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Where its HTTP listens, if it said so.
    pub(crate) fn http_said(&self) -> Option<String> {
        // A console beside it has an address of its own.
        let is_its = |line: &Value| {
            line["message"]
                .as_str()
                .is_some_and(|said| said.starts_with("HTTP listens"))
        };
        let line = self.lines().into_iter().find(is_its);
        line.and_then(|line| line["address"].as_str().map(str::to_owned))
    }

    /// Where its HTTP listens, once it said so.
    pub(crate) async fn http(&self) -> String {
        until("the worker says where its HTTP listens", PATIENCE, async || {
            let address = self.http_said();
            if address.is_none()
                && let Some(status) = self.ended()
            {
                panic!("the worker ended with {status}: {}", self.said());
            }
            address
        })
        .await
    }

    /// Asks it; the status and the body. Nothing where it does not answer.
    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        let url = format!("http://{}{path}", self.http().await);
        get(&url).await
    }

    /// Whether it says that it is ready.
    pub(crate) async fn is_ready(&self) -> bool {
        self.get("/readyz").await.is_some_and(|(status, _)| status == 200)
    }

    pub(crate) async fn ready(&self) {
        until("the worker is ready", PATIENCE, async || {
            if let Some(status) = self.ended() {
                panic!("the worker ended with {status}: {}", self.said());
            }
            self.is_ready().await.then_some(())
        })
        .await;
    }

    pub(crate) async fn not_ready(&self) -> String {
        until("the worker is not ready", PATIENCE, async || {
            self.get("/readyz")
                .await
                .and_then(|(status, text)| (status == 503).then_some(text))
        })
        .await
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("a child")
    }

    /// Waits for its end.
    pub(crate) async fn end(&self) -> ExitStatus {
        until("the worker ends", PATIENCE, async || self.ended()).await
    }

    /// kill -9.
    pub(crate) async fn kill(&self) {
        if let Err(error) = self.child().start_kill() {
            panic!("kill -9: {error}");
        }
        self.end().await;
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        if let Some(id) = self.id() {
            let status = std::process::Command::new("sh")
                .args(["-c", &format!("kill -{name} {id}")])
                .status();
            assert!(status.expect("a shell").success(), "kill -{name} {id}");
        }
    }

    /// SIGTERM, and how it ended.
    pub(crate) async fn terminate(&self) -> ExitStatus {
        self.signal("TERM");
        self.end().await
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = self.said();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default();
            eprintln!("the end of {}:\n{}", self.log.display(), tail.join("\n"));
        }
        drop(self.child().start_kill());
        // Of a place that is gone already there is nothing left to read.
        if let Ok(said) = std::fs::read(&self.log) {
            let said = String::from_utf8_lossy(&said);
            secrets::check(&format!("the log of worker {}", self.name), &said);
        }
    }
}

/// Runs something beside the test until the guard goes.
pub(crate) struct Beside(tokio::task::JoinHandle<()>);

impl Beside {
    pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.abort();
    }
}
