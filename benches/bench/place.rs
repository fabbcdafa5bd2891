//! Where a contestant works: a database copied from a template and a vhost of its own, both gone after the run.

use std::{
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use lapin::{
    Channel, Connection, ConnectionProperties, Consumer, ExchangeKind, Queue,
    options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::Value;
use settled::broker::{self, BrokerSettings, publisher::Publisher, topology};
use tokio::process::Command;
use tokio_postgres::{Client, NoTls};

use crate::{Fallible, traffic::World};

/// The subscriber's queue: durable, replicated, bound to every event.
pub(crate) const EVENTS_QUEUE: &str = "bench.events";

/// Longer than anything takes that is not stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// PostgreSQL and RabbitMQ, and what this run made in them.
pub(crate) struct Services {
    pub(crate) database: String,
    broker: String,
    management: String,
    /// What every database and vhost of this run begins with.
    prefix: String,
    made: AtomicUsize,
    pub(crate) admin: Client,
}

impl Services {
    /// Reads what `dev/services up` printed, and connects.
    pub(crate) async fn open() -> Fallible<Self> {
        let variable = |name: &str| {
            std::env::var(name)
                .ok()
                .filter(|value| !value.is_empty())
                .ok_or_else(|| format!("{name} is not set: run `make bench`, or export what `dev/services up` prints"))
        };
        let database = variable("SETTLED_DATABASE_URL")?;
        Ok(Self {
            broker: variable("SETTLED_BROKER_URL")?,
            management: variable("SETTLED_BROKER_MANAGEMENT_URL")?,
            prefix: format!("bench_{}_", std::process::id()),
            made: AtomicUsize::new(0),
            admin: connect(&database).await?,
            database,
        })
    }

    fn name(&self, what: &str) -> String {
        format!("{}{}_{what}", self.prefix, self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// A new database: a copy of one that nobody is connected to.
    async fn create_database(&self, what: &str, template: &str, copy: Copy) -> Fallible<Database> {
        let name = self.name(what);
        // So that everybody begins equally far from the last one.
        self.admin.batch_execute("CHECKPOINT").await?;
        let strategy = match copy {
            Copy::Pages => "wal_log",
            Copy::Files => "file_copy",
        };
        let sql = format!("CREATE DATABASE {name} TEMPLATE {template} STRATEGY {strategy}");
        self.admin.batch_execute(&sql).await?;
        Ok(Database {
            url: with_path(&self.database, &name),
            name,
        })
    }

    pub(crate) async fn drop_database(&self, name: &str) -> Fallible<()> {
        let sql = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
        Ok(self.admin.batch_execute(&sql).await?)
    }

    /// A database with the schema of a build of the worker, in which nothing happened yet.
    pub(crate) async fn migrated(&self, what: &str, program: &Path) -> Fallible<Database> {
        let database = self.create_database(what, "template0", Copy::Pages).await?;
        settled(program, &["migrate"], &[("SETTLED_DATABASE_URL", &database.url)]).await?;
        Ok(database)
    }

    /// A copy of the template that a build of the worker made, and a vhost with its topology and the subscriber's queue.
    pub(crate) async fn place(&self, what: &str, world: &World, program: &Path) -> Fallible<Place> {
        let template = world.template(program)?;
        let database = self.create_database(what, &template.name, world.copy).await?;
        let vhost = database.name.clone();
        self.manage("PUT", &format!("/api/vhosts/{vhost}"), None).await?;
        let user = userinfo(&self.broker)?.0;
        let all = serde_json::json!({"configure": ".*", "write": ".*", "read": ".*"});
        self.manage("PUT", &format!("/api/permissions/{vhost}/{user}"), Some(all))
            .await?;
        let broker_url = with_path(&self.broker, &vhost);
        settled(
            program,
            &["topology"],
            &[
                ("SETTLED_DATABASE_URL", &database.url),
                ("SETTLED_BROKER_URL", &broker_url),
            ],
        )
        .await?;
        let line = Line::open(&broker_url).await?;
        line.subscribe().await?;
        Ok(Place {
            database,
            broker_url,
            vhost,
            line,
        })
    }

    pub(crate) async fn leave(&self, place: Place) -> Fallible<()> {
        place.line.close().await;
        self.manage("DELETE", &format!("/api/vhosts/{}", place.vhost), None)
            .await?;
        self.drop_database(&place.database.name).await
    }

    /// Deletes whatever this run made and still stands.
    pub(crate) async fn clear(&self) -> Fallible<()> {
        let sql = "SELECT datname FROM pg_database WHERE starts_with(datname, $1)";
        for row in self.admin.query(sql, &[&self.prefix]).await? {
            self.drop_database(row.get(0)).await?;
        }
        let vhosts = self.manage("GET", "/api/vhosts?columns=name", None).await?;
        for vhost in vhosts.as_array().into_iter().flatten() {
            if let Some(name) = vhost["name"].as_str()
                && name.starts_with(&self.prefix)
            {
                self.manage("DELETE", &format!("/api/vhosts/{name}"), None).await?;
            }
        }
        Ok(())
    }

    /// Asks the broker's management API.
    pub(crate) async fn manage(&self, method: &str, path: &str, body: Option<Value>) -> Fallible<Value> {
        let (scheme, rest) = self
            .management
            .split_once("://")
            .ok_or("the management URL has no ://")?;
        let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
        let (user, password) = userinfo(&self.management)?;
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!(
                "{scheme}://{user}:{password}@{}{path}",
                host.trim_end_matches('/')
            ))
            .header("content-type", "application/json")
            .body(body.map(|body| body.to_string()).unwrap_or_default())?;
        let said = format!("{method} {path}");
        let answer = tokio::task::spawn_blocking(move || {
            let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).build();
            let mut answer = ureq::Agent::new_with_config(config).run(request)?;
            answer.body_mut().read_to_string()
        })
        .await?
        .map_err(|error| format!("the broker's management API, {said}: {error}"))?;
        Ok(serde_json::from_str(&answer).unwrap_or(Value::Null))
    }
}

/// How a database is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    /// Through the log. Its pages were all logged since the last checkpoint, so that changing one logs the change and not
    /// the page: as it is most of the time between two checkpoints.
    Pages,
    /// File by file, with a checkpoint at the end, for what is too large for the log: the first change of every page
    /// logs all of it.
    Files,
}

pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) url: String,
}

/// One contestant's own database and vhost.
pub(crate) struct Place {
    pub(crate) database: Database,
    pub(crate) broker_url: String,
    vhost: String,
    pub(crate) line: Line,
}

/// The harness's own connection to a vhost: for looking at queues.
pub(crate) struct Line {
    connection: Connection,
    channel: Channel,
}

impl Line {
    pub(crate) async fn open(url: &str) -> Fallible<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok(Self { connection, channel })
    }

    pub(crate) async fn channel(&self) -> Fallible<Channel> {
        Ok(self.connection.create_channel().await?)
    }

    async fn subscribe(&self) -> Fallible<()> {
        let options = QueueDeclareOptions {
            passive: false,
            durable: true,
            exclusive: false,
            auto_delete: false,
            nowait: false,
        };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        self.channel
            .queue_declare(EVENTS_QUEUE.into(), options, arguments)
            .await?;
        let exchange = ExchangeDeclareOptions {
            passive: true,
            durable: true,
            auto_delete: false,
            internal: false,
            nowait: false,
        };
        self.channel
            .exchange_declare(
                topology::EVENTS.into(),
                ExchangeKind::Topic,
                exchange,
                FieldTable::default(),
            )
            .await?;
        let bind = QueueBindOptions { nowait: false };
        self.channel
            .queue_bind(
                EVENTS_QUEUE.into(),
                topology::EVENTS.into(),
                "#".into(),
                bind,
                FieldTable::default(),
            )
            .await?;
        Ok(())
    }

    /// Messages ready in a queue.
    pub(crate) async fn ready(&self, queue: &str) -> Fallible<usize> {
        Ok(usize::try_from(self.look(queue).await?.message_count())?)
    }

    pub(crate) async fn consumers(&self, queue: &str) -> Fallible<u32> {
        Ok(self.look(queue).await?.consumer_count())
    }

    async fn look(&self, queue: &str) -> Fallible<Queue> {
        let options = QueueDeclareOptions {
            passive: true,
            durable: true,
            exclusive: false,
            auto_delete: false,
            nowait: false,
        };
        let asking = self.channel.queue_declare(queue.into(), options, FieldTable::default());
        Ok(tokio::time::timeout(PATIENCE, asking).await??)
    }

    /// Consumes without acknowledgements, which a subscriber that only counts has no need of.
    pub(crate) async fn consume(&self, queue: &str) -> Fallible<Consumer> {
        let options = BasicConsumeOptions {
            no_local: false,
            no_ack: true,
            exclusive: false,
            nowait: false,
        };
        let consuming = self
            .channel
            .basic_consume(queue.into(), "".into(), options, FieldTable::default());
        Ok(consuming.await?)
    }

    pub(crate) async fn close(self) {
        // Its vhost is about to go: nothing is lost with a failed good-bye. lapin now and then never tells of one that
        // succeeded.
        let closing = self.connection.close(200, "done".into());
        drop(tokio::time::timeout(Duration::from_secs(5), closing).await);
    }
}

impl Place {
    pub(crate) async fn db(&self) -> Fallible<Client> {
        connect(&self.database.url).await
    }

    /// A publisher with confirms, on a connection of its own.
    pub(crate) async fn publisher(&self) -> Fallible<(broker::Connection, Publisher)> {
        let settings = BrokerSettings {
            url: settled::config::Secret::new(self.broker_url.as_str()),
            files: settled::tls::ClientFiles::default(),
            heartbeat: Duration::from_secs(30),
            connect_timeout: PATIENCE,
            publish_deadline: PATIENCE,
            next_host_after: PATIENCE,
            allow_plaintext: true,
            memory: broker::Memory::default(),
        };
        let connection = broker::Connection::open(&settings, "bench partner").await?;
        let publisher = Publisher::open(&connection).await?;
        Ok((connection, publisher))
    }
}

/// Connects to a database; the connection ends with the client.
pub(crate) async fn connect(url: &str) -> Fallible<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        // The client meets the error itself.
        drop(connection.await);
    });
    Ok(client)
}

/// The program, without the settings of our own environment.
pub(crate) fn without_settings(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("SETTLED_") || text.starts_with("OTEL_") {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// The build of the worker at hand.
pub(crate) fn own() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_settled"))
}

/// Runs a command of a build of the worker; what it said on stdout.
pub(crate) async fn settled(program: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> Fallible<String> {
    let mut command = without_settings(program);
    command.args(arguments).envs(settings.iter().copied());
    let output = tokio::time::timeout(10 * PATIENCE, command.output()).await??;
    if !output.status.success() {
        return Err(format!(
            "settled {}: {}\n{}{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The user and the password of a URL, as they stand in it.
fn userinfo(url: &str) -> Fallible<(&str, &str)> {
    let user = url
        .split_once("://")
        .and_then(|(_, rest)| rest.rsplit_once('@'))
        .and_then(|(user, _)| user.split_once(':'));
    Ok(user.ok_or("a URL of the services names no user and password")?)
}

/// The URL with another database or vhost.
fn with_path(url: &str, path: &str) -> String {
    let (url, query) = match url.split_once('?') {
        Some((url, query)) => (url, format!("?{query}")),
        None => (url, String::new()),
    };
    let authority = url.find("://").map_or(0, |at| at + 3);
    let end = url[authority..].find('/').map_or(url.len(), |at| authority + at);
    format!("{}/{path}{query}", &url[..end])
}
