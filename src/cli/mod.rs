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
mod tests {
    use super::{unparsed::in_two, *};

    fn read(words: &str) -> Result<Cli, Unparsed> {
        Cli::read(words.split(' ').map(OsString::from))
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_anywhere() {
        for words in [
            "settled --json --set park.deadline=2s partner list",
            "settled partner --json list --set park.deadline=2s",
            "settled partner list --set park.deadline=2s --json",
        ] {
            let cli = read(words).expect(words);
            assert!(cli.wants_json(), "{words}");
            assert_eq!(
                cli.global.set,
                [("park.deadline".to_owned(), "2s".to_owned())],
                "{words}"
            );
        }
    }

    #[test]
    fn arguments_are_checked_before_anything_is_asked() {
        let deposit = "settled deposit --client-id 3f2504e0-4f89-41d3-9a0c-0305e82c3301 --currency BTC --reference r";
        for (words, fits) in [
            (format!("{deposit} --quantity 1"), true),
            (format!("{deposit} --quantity 01"), false),
            (format!("{deposit} --quantity -1"), false),
            (format!("{deposit} --quantity 1.5"), false),
            ("settled partner add --enterprise-id a.b --name x".to_owned(), false),
            ("settled partner suspend --enterprise-id -x".to_owned(), false),
            (
                "settled allocation show 3f2504e04f8941d39a0c0305e82c3301".to_owned(),
                false,
            ),
            (
                "settled allocation show 3F2504E0-4F89-41D3-9A0C-0305E82C3301".to_owned(),
                true,
            ),
            ("settled worker --set worker.lanes".to_owned(), false),
            ("settled".to_owned(), false),
            ("settled nothing".to_owned(), false),
        ] {
            let read = read(&words);
            assert_eq!(read.is_ok(), fits, "{words}");
            if let Err(refusal) = read {
                assert_eq!(refusal.error.exit_code(), 2, "{words}");
            }
        }
    }

    #[test]
    fn secrets_in_the_wrong_place_are_not_repeated() {
        for secret in [
            "xprv9s21ZrQH143K3QTDL4LXw2F7HEK3wJUD2nW2nRk4stbPy6cq3jPPqjiChkVvvNKmPGJxWUtg6LnF5kejMRNNU3TGtRBeJgk33yuGBxrMPHi",
            "postgres://u:pa55@h/d",
            "host=h,password=pa55",
            "u:pa55@h",
        ] {
            for words in [
                format!("settled key add --enterprise-id E {secret}"),
                format!("settled key add {secret}"),
                format!("settled {secret}"),
                format!("settled key add --enterprise-id={secret} --public-key x"),
                format!("settled key add --enterprise-id=\u{a0}{secret} --public-key x"),
            ] {
                let refusal = read(&words).err().expect(&words);
                assert!(refusal.error.to_string().contains(secret), "clap would say it: {words}");
                assert!(!refusal.scrubbed().contains(secret), "{words}");
            }
        }
    }

    #[test]
    fn usage_errors_have_a_sentence_and_a_hint() {
        let refusal = read("settled allocation show").err().expect("an argument is missing");
        let (message, hint) = in_two(&refusal.scrubbed());
        assert_eq!(message, "the following required arguments were not provided: <ID>");
        assert!(hint.starts_with("Usage: settled allocation show"), "{hint}");
    }

    #[test]
    fn times_are_cut_to_what_is_shown() {
        let read = |text| time(text).map(|time| time.to_string());
        assert_eq!(
            read("2030-01-31T01:00:00.123456+01:00"),
            Ok("2030-01-31T00:00:00.123Z".to_owned())
        );
        assert!(read("2030-01-31").is_err());
        assert!(read("tomorrow").is_err());
    }

    /// What the desk says is to be typed is read as the same wish.
    #[test]
    fn a_command_line_of_the_desk_is_read_as_what_was_asked() {
        use dead_letters::DeadLettersCommand as Dead;

        use crate::{
            desk::{Author, Cancel, Moment, Plan, Purge, Replay, Resume, Selection, StateChange, Which},
            domain::{
                dead_letter::{MadeBy, State},
                reason::Reason,
            },
        };
        let which = Which {
            states: vec![State::Open, State::Discarded],
            reasons: vec![Reason::Internal, Reason::InvalidField],
            is_final: Some(false),
            partner: Some("acme".into()),
            allocation: Some(Uuid::from_u128(7)),
            nonce: Some("-n'1".into()),
            group: Some("0123abcd".into()),
            made_by: Some(MadeBy::Unknown),
            since: Some(Moment::Ago(std::time::Duration::from_millis(5_400_001))),
            until: Some(Moment::At(
                CalendarTime::parse("2030-01-31T00:00:00.123Z").expect("a time"),
            )),
        };
        let author = Author {
            operator: "-ann o'hara".into(),
            why: "--they asked; \"again\"".into(),
        };
        let dead = |command: &crate::desk::Command| {
            let words = command.words().iter().map(OsString::from);
            match Cli::read(words)
                .unwrap_or_else(|refusal| panic!("{command}: {}", refusal.error))
                .command
            {
                Command::DeadLetters(dead) => dead,
                _ => panic!("{command}"),
            }
        };
        for (plan, which) in [(Some(7), Which::default()), (None, which.clone())] {
            let selection = Selection { plan, which };
            for change in [StateChange::Discard, StateChange::Restore] {
                let asked = (selection.clone(), author.clone());
                match (change, dead(&change.command(&selection, &author))) {
                    (StateChange::Discard, Dead::Discard(read)) | (StateChange::Restore, Dead::Restore(read)) => {
                        assert_eq!(read.typed(), asked);
                    }
                    _ => panic!("{change:?}"),
                }
            }
        }
        let purge = Purge {
            discarded_before: Moment::Ago(std::time::Duration::from_secs(3_600)),
            settled: true,
            author: author.clone(),
        };
        assert!(matches!(dead(&purge.command()), Dead::Purge(read) if read.typed() == purge));
        let plan = Plan {
            which: which.clone(),
            limit: Some(3),
            operator: author.operator.clone(),
        };
        assert!(matches!(dead(&plan.command()), Dead::Plan(read) if read.typed() == Some(plan.clone())));
        for for_act in crate::desk::PlanAct::ALL {
            let approve = crate::desk::Approve {
                plan: 7,
                for_act,
                author: author.clone(),
            };
            use dead_letters::OfPlan;
            let Dead::Plan(read) = dead(&approve.command()) else {
                panic!("{for_act}");
            };
            assert!(matches!(read.of_one(), Some(OfPlan::Approve(read)) if read.typed() == approve));
        }
        let export = crate::desk::Export {
            which,
            recipients: vec!["age1x".to_owned(), "age1y".to_owned()],
            operator: author.operator.clone(),
        };
        assert!(matches!(dead(&export.command()), Dead::Export(read) if read.typed() == export));
        let replay = Replay {
            plan: 7,
            canary: Some(10),
            rate: Some(0.5),
            yes_again: true,
            all_verdicts: true,
            author: author.clone(),
        };
        assert!(matches!(dead(&replay.command()), Dead::Replay(read) if read.typed() == replay));
        let (resume, cancel) = (
            Resume {
                run: 3,
                rate: Some(50.0),
                yes_again: true,
                author: author.clone(),
            },
            Cancel { run: 3, author },
        );
        use dead_letters::RunsCommand as Runs;
        for which in [crate::desk::Refused::All, crate::desk::Refused::Ids(vec![7, 9])] {
            let retry = crate::desk::Retry {
                which,
                author: resume.author.clone(),
            };
            let words = retry.command().words().iter().map(OsString::from).collect::<Vec<_>>();
            assert!(matches!(
                Cli::read(words).expect("a command line").command,
                Command::Outbox(outbox::OutboxCommand::Retry(read)) if read.typed() == retry
            ));
        }
        assert!(matches!(dead(&resume.command()), Dead::Runs(Runs::Resume(read)) if read.typed() == resume));
        assert!(matches!(dead(&cancel.command()), Dead::Runs(Runs::Cancel(read)) if read.typed() == cancel));
    }
}
