//! What an operator types. Each command is a file or shares one with its like; all of them call the same functions as
//! the worker. Answers go to stdout: for people, or with `--json` one JSON document. Everything else goes to stderr.

mod allocation;
mod api;
mod audit;
mod client;
mod config;
mod console;
mod currency;
mod dead_letters;
mod demo;
mod doctor;
mod explain;
mod failure;
mod funds;
mod ledger;
mod life;
mod nonce;
mod outbox;
mod output;
mod partner_kit;
mod probe;
mod reconcile;
mod recover;
mod registry;
mod roles;
mod sealed;
mod setup;
mod shell;
mod simulate;
mod token;
mod unparsed;
mod worker;

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use uuid::Uuid;

use self::output::Output;
pub use self::{
    failure::{Exit, Failure},
    unparsed::Unparsed,
};
use crate::{
    broker::{BrokerError, BrokerSettings, Connection},
    config::{ConfigError, Settings, Sources, process_environment},
    desk::{Desk, bounded},
    domain::{
        address::{is_enterprise_id, parse_uuid},
        calendar::CalendarTime,
        ledger::{Quantity, is_currency},
    },
    retry::patiently,
    store::{Store, StoreError},
};

/// Settles asynchronous allocations from partners' signed messages on RabbitMQ, in PostgreSQL.
#[derive(Parser)]
#[command(
    name = "settled",
    version,
    after_help = "Exit codes: 0 done, 1 a check failed or nothing of that name, 2 usage, 3 partly done, 69 database or \
                  broker away, 70 our fault, 78 the database's user lacks a right."
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
    /// Its words, without flags: `partner add`.
    #[arg(skip)]
    words: String,
}

/// What every command takes.
#[derive(Args)]
#[command(next_help_heading = "Every command takes")]
struct Global {
    /// Settings in TOML, in the shape of config/default.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
    /// Tables as wide as their content, whatever the terminal's width
    #[arg(long, global = true)]
    wide: bool,
    /// Where PostgreSQL is; better set in SETTLED_DATABASE_URL, where other users cannot read it
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// Where RabbitMQ is; better set in SETTLED_BROKER_URL, where other users cannot read it
    #[arg(long, global = true, value_name = "URL")]
    broker_url: Option<String>,
    /// Any setting of config/default.toml; may be repeated
    #[arg(long = "set", global = true, value_name = "SETTING=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
}

#[derive(Subcommand)]
enum Command {
    /// Apply the schema to the database
    Migrate,
    /// Declare exchanges and queues on the broker
    Topology(setup::Topology),
    /// The database's roles: SQL that makes them, with the least that each command needs
    Roles(roles::Roles),
    /// Check everything that the worker needs, one line each
    Doctor(doctor::Doctor),
    /// Ask the worker that runs here, or the API, whether it is well: for health checks
    Probe(probe::Probe),
    /// Settings: what counts, and where it comes from
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Run the worker until SIGTERM
    Worker,
    /// Answer partners and clients over HTTP until SIGTERM
    Api,
    /// The operator's console in the browser, until SIGTERM
    Console(console::Console),
    /// Partners: who may send updates
    #[command(subcommand)]
    Partner(registry::PartnerCommand),
    /// Partners' public keys
    #[command(subcommand)]
    Key(registry::KeyCommand),
    /// Clients' connections with partners
    #[command(subcommand)]
    Connection(registry::ConnectionCommand),
    /// What partners call the currencies
    #[command(subcommand)]
    Currency(registry::CurrencyCommand),
    /// Clients: as which enterprise each reads over HTTP
    #[command(subcommand)]
    Client(client::ClientCommand),
    /// Tokens: who may ask over HTTP
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Funds come in, once per client and reference
    Deposit(funds::Deposit),
    /// Funds go out, once per client and reference
    Withdraw(funds::Funds),
    /// Reserve allocations, or look at one
    #[command(subcommand)]
    Allocation(allocation::AllocationCommand),
    /// Nonces: make one unusable
    #[command(subcommand)]
    Nonce(nonce::NonceCommand),
    /// What became of a partner's nonce
    Receipt(life::ReceiptQuestion),
    /// The life of an allocation or a message, in order of time
    Timeline(life::Timeline),
    /// Judge a message with the real code and change nothing
    Explain(explain::Explain),
    /// Balances, and the proof of the books
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Refused messages: keep them, look at them, have them judged again
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersCommand),
    /// What nobody was told yet: what waits to be published, and what the broker refused
    #[command(subcommand)]
    Outbox(outbox::OutboxCommand),
    /// What operators did
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// What the batches counted, against what they wrote
    Reconcile(reconcile::Reconcile),
    /// A database that is older than what workers told the broker: what it lacks, and going on without
    Recover(recover::Recover),
    /// Publish signed updates, right and wrong ones, and account for every one
    Simulate(simulate::Simulate),
    /// The whole story on a fresh database and broker, in under a minute
    Demo(demo::Demo),
    /// For partners, offline: look at a message, sign one with a test key, test vectors
    #[command(subcommand)]
    PartnerKit(partner_kit::PartnerKitCommand),
    /// Completions for a shell
    Completions(shell::Completions),
    /// Manual pages
    Man(shell::Man),
}

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// Help, the version, or a usage error: something to tell, with its own exit code.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Unparsed> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        let parsed = Self::command().try_get_matches_from(&arguments).and_then(|matches| {
            let mut cli = Self::from_arg_matches(&matches).map_err(|error| error.format(&mut Self::command()))?;
            let mut at = matches.subcommand();
            while let Some((word, below)) = at {
                cli.words = format!("{} {word}", cli.words).trim_start().to_owned();
                at = below.subcommand();
            }
            Ok(cli)
        });
        parsed.map_err(|error| Unparsed::new(error, arguments))
    }

    /// Whether answers and complaints are for programs.
    pub fn wants_json(&self) -> bool {
        self.global.json
    }

    /// Loads the settings and runs the command.
    ///
    /// # Errors
    /// Why it could not be carried out.
    pub async fn run(self) -> Result<Exit, Failure> {
        let (words, settings) = (self.words.clone(), self.global.settings());
        match (self.carry_out().await, settings) {
            (Err(failure), Ok(settings)) if failure.is_right() => Err(roles::mended(failure, &settings, &words).await),
            (done, _) => done,
        }
    }

    async fn carry_out(self) -> Result<Exit, Failure> {
        let out = Output::new(self.global.json).wide(self.global.wide);
        let settings = self.global.settings();
        let command = match self.command {
            // A wrong setting is one of the things it looks for.
            Command::Doctor(wish) => return doctor::run(settings, &out, &wish).await,
            Command::Config(command) => return config::run(&self.global, &out, command),
            // These need no settings.
            Command::PartnerKit(command) => return partner_kit::run(&out, command),
            Command::Completions(wish) => return shell::completions(&out, &wish),
            Command::Man(wish) => return shell::man(&out, &wish),
            command => command,
        };
        let context = Context {
            settings: settings?,
            out,
        };
        let context = &context;
        match command {
            Command::Migrate => setup::migrate(context).await,
            Command::Topology(wish) => setup::topology(context, &wish).await,
            Command::Roles(wish) => roles::run(context, &wish).await,
            Command::Doctor(_)
            | Command::Config(_)
            | Command::PartnerKit(_)
            | Command::Completions(_)
            | Command::Man(_) => Ok(Exit::Done),
            Command::Probe(wish) => probe::run(context, &wish).await,
            Command::Worker => worker::run(context, console::beside_worker).await,
            Command::Api => api::run(context).await,
            Command::Console(wish) => console::run(context, &wish).await,
            Command::Client(command) => client::run(context, command).await,
            Command::Token(command) => token::run(context, command).await,
            Command::Partner(command) => registry::partner(context, command).await,
            Command::Key(command) => registry::key(context, command).await,
            Command::Connection(command) => registry::connection(context, command).await,
            Command::Currency(command) => registry::currency(context, command).await,
            Command::Deposit(deposit) => funds::deposit(context, deposit).await,
            Command::Withdraw(withdrawal) => funds::withdraw(context, withdrawal).await,
            Command::Allocation(command) => allocation::run(context, command).await,
            Command::Nonce(command) => nonce::run(context, command).await,
            Command::Receipt(question) => life::receipt(context, &question).await,
            Command::Timeline(question) => life::timeline(context, &question).await,
            Command::Explain(question) => explain::run(context, question).await,
            Command::Ledger(command) => ledger::run(context, command).await,
            Command::DeadLetters(command) => dead_letters::run(context, command).await,
            Command::Outbox(command) => outbox::run(context, command).await,
            Command::Audit(command) => audit::run(context, command).await,
            Command::Reconcile(wish) => reconcile::run(context, &wish).await,
            Command::Recover(wish) => recover::run(context, &wish).await,
            Command::Simulate(wish) => simulate::run(context, wish).await,
            Command::Demo(wish) => demo::run(context, wish).await,
        }
    }
}

impl Global {
    fn settings(&self) -> Result<Settings, ConfigError> {
        Settings::load(self.sources())
    }

    fn urls(&self) -> [(&'static str, &'static str, &Option<String>); 2] {
        [
            ("database.url", "--database-url", &self.database_url),
            ("broker.url", "--broker-url", &self.broker_url),
        ]
    }

    /// Where settings come from.
    fn sources(&self) -> Sources<impl Iterator<Item = (String, String)>> {
        let named = self
            .urls()
            .into_iter()
            .filter_map(|(key, _, url)| Some((key.to_owned(), url.clone()?)));
        Sources {
            file: self.config.clone(),
            environment: process_environment(),
            flags: self.set.iter().cloned().chain(named).collect(),
        }
    }

    /// The flag that has the word on a setting, where one has.
    fn flag_of(&self, setting: &str) -> &'static str {
        let named = self
            .urls()
            .into_iter()
            .find(|(key, _, url)| *key == setting && url.is_some());
        named.map_or("--set", |(_, flag, _)| flag)
    }
}

/// What every command works with.
struct Context {
    settings: Settings,
    out: Output,
}

impl Context {
    /// The operator's desk; its database is not connected yet.
    fn desk(&self) -> Result<Desk, Failure> {
        Ok(Desk::open(&self.settings)?)
    }

    /// The database; not connected yet.
    fn store(&self) -> Result<Store, Failure> {
        self.settings.database_url()?;
        Store::new(&self.settings).map_err(|sentence| {
            Failure::usage(sentence).hint("check database.url, database.ca_file and database.client_certificate_file")
        })
    }

    /// The database as `settled migrate` reaches it; not connected yet.
    fn store_to_migrate(&self) -> Result<Store, Failure> {
        let mut settings = self.settings.clone();
        if !settings.database.migrate_url.is_empty() {
            settings.database.url = settings.database.migrate_url.clone();
        }
        settings.database_url()?;
        Store::new(&settings).map_err(|sentence| {
            Failure::usage(sentence)
                .hint("check database.migrate_url, database.ca_file and database.client_certificate_file")
        })
    }

    /// Where the broker is.
    fn broker(&self) -> Result<BrokerSettings, Failure> {
        Ok(BrokerSettings::from_settings(&self.settings)?)
    }

    /// A connection to the broker.
    async fn connect(&self, name: &str) -> Result<Connection, Failure> {
        Connection::open(&self.broker()?, name)
            .await
            .map_err(Failure::no_broker)
    }

    /// Does what may be done twice on a connection of its own, and again on a new one while the broker answers and then breaks
    /// it off; not for ever. RabbitMQ ends a connection with INTERNAL_ERROR where the replicas of a quorum queue were not
    /// ready in time. A broker that can not be reached at all is told at once.
    async fn declares<T>(
        &self,
        mut work: impl AsyncFnMut(&Connection) -> Result<T, BrokerError>,
    ) -> Result<T, Failure> {
        let breaks_off = |error: &BrokerError| matches!(error, BrokerError::Away(_));
        patiently(&self.settings.retry, breaks_off, async || {
            let connection = match self.connect("settled topology").await {
                Ok(connection) => connection,
                Err(failure) => return Ok(Err(failure)),
            };
            let done = work(&connection).await?;
            Ok(connection.close().await.map(|()| done).map_err(Failure::from))
        })
        .await?
    }

    /// Does what may be done twice, again while the database says that somebody else was in the way; not for ever.
    async fn patiently<T>(&self, work: impl AsyncFnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        patiently(&self.settings.retry, StoreError::is_in_the_way, work).await
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as section.setting=value, such as park.deadline=2s".into()),
    }
}

/// `[A-Za-z0-9][A-Za-z0-9_-]{0,63}`.
fn enterprise_id(text: &str) -> Result<String, String> {
    if is_enterprise_id(text) {
        return Ok(text.to_owned());
    }
    Err("1 to 64 letters, digits, _ and -, the first a letter or digit".into())
}

/// 36 characters, 8-4-4-4-12.
fn uuid(text: &str) -> Result<Uuid, String> {
    parse_uuid(text).ok_or_else(|| {
        "a UUID has 36 characters, 8-4-4-4-12, without braces: give the whole of it, as the lists show it with --wide or --json"
            .into()
    })
}

/// Where a list goes on.
fn cursor(text: &str) -> Result<i64, String> {
    let number = text.parse().ok().filter(|number: &i64| *number >= 0);
    number.ok_or_else(|| "a number: that of the last line of the page before, which says it".into())
}

/// A name that somebody else gave: 1 to 1024 bytes.
fn external_id(text: &str) -> Result<String, String> {
    bounded(text, 1024).map(|()| text.to_owned())
}

fn currency(text: &str) -> Result<String, String> {
    if is_currency(text) {
        return Ok(text.to_owned());
    }
    Err("1 to 64 letters, digits, :, ., _ and -".into())
}

fn quantity(text: &str) -> Result<Quantity, String> {
    Quantity::parse(text).map_err(|why| format!("base units, {why}"))
}

/// RFC 3339, cut to milliseconds: what is stored is what is shown.
fn time(text: &str) -> Result<CalendarTime, String> {
    CalendarTime::parse(text)
}

#[cfg(test)]
mod tests;
