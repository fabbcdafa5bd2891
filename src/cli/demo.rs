//! `settled demo`: the whole story on a fresh database and broker. A worker as a child process, partners that publish
//! right and wrong updates, a subscriber that hears what came of each; then everything is added up. With `--chaos` the
//! worker, PostgreSQL and RabbitMQ are killed in turn meanwhile.

mod chaos;
mod child;
mod logins;
mod report;

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use clap::Args;
use tokio::sync::Mutex;

use self::{
    chaos::{Chaos, Hit},
    child::ChildWorker,
    logins::Logins,
    report::{Evidence, Report},
};
use super::{
    Context, Exit, Failure,
    doctor::POSTGRES_MIN,
    simulate::{
        Bar,
        account::Accounting,
        drive::{Drive, Registrar, Subscriber},
        plan::{Balances, Plan, Shape},
        stderr_has_colour, wait_for_all,
    },
};
use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection, server_version, subscribe,
        topology::{self, Depths},
    },
    partner::Post,
    store::Store,
};

/// One message in eight is wrong: about fifteen for each way of being wrong.
const INVALID_PERCENT: usize = 12;
/// How long the paced part takes.
const PACED: Duration = Duration::from_millis(6_500);
const PACED_CHAOS: Duration = Duration::from_secs(28);
const WAVES: usize = 6;
/// The last waves are published all at once, for the throughput.
const BURST_WAVES: usize = 2;
const PARKED_THEN_RESERVED: usize = 2;

/// Columns that the story needs on a terminal.
const COLUMNS_MIN: u16 = 60;
/// The oldest broker that has what the queues use: dead-lettering at least once.
const RABBITMQ_MIN: (u32, u32) = (3, 10);

/// The whole story on a fresh database and broker, in under a minute
#[derive(Args)]
#[command(after_help = "\
What it needs: an empty database on PostgreSQL 15 or newer, a virtual host of its own on RabbitMQ 3.10 or newer, a terminal
of 60 columns or none at all, and about 20 seconds (with --chaos a minute); more with more messages. `make demo` brings all
of it along.")]
pub(super) struct Demo {
    /// Kill the worker, PostgreSQL and RabbitMQ in turn while messages flow
    #[arg(long, requires = "services")]
    chaos: bool,
    /// The script that can kill and restart the services: dev/services
    #[arg(long, value_name = "PATH")]
    services: Option<PathBuf>,
    /// How many messages the partners publish
    #[arg(long, default_value_t = 2_000, value_name = "N", value_parser = clap::value_parser!(u32).range(300..=1_000_000))]
    messages: u32,
    /// The same seed draws the same story
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Says what happens, with the time, on stderr.
pub(super) struct Teller {
    began: Instant,
    bar: Bar,
    colour: bool,
}

impl Teller {
    fn say(&self, text: &str) {
        self.tell("2", text);
    }

    /// Something was hit.
    fn alarm(&self, text: &str) {
        self.tell("1;33", text);
    }

    fn tell(&self, code: &str, text: &str) {
        let time = format!("{:6.1} s", self.began.elapsed().as_secs_f64());
        self.bar.line(&match (self.colour, code) {
            (false, _) => format!("{time}  {text}"),
            (true, "2") => format!("\x1b[2m{time}\x1b[0m  {text}"),
            (true, code) => format!("\x1b[2m{time}\x1b[0m  \x1b[{code}m{text}\x1b[0m"),
        });
    }
}

pub(super) async fn run(context: &Context, wish: Demo) -> Result<Exit, Failure> {
    let (store, broker) = (context.store()?, context.broker()?);
    let messages = usize::try_from(wish.messages).unwrap_or(usize::MAX);
    let teller = Arc::new(Teller {
        began: Instant::now(),
        bar: Bar::new(messages),
        colour: stderr_has_colour(),
    });
    must_suffice(&store, &broker).await?;
    must_be_fresh(&store, &broker).await?;
    teller.say(if wish.chaos {
        "this takes about a minute"
    } else {
        "this takes about 20 seconds"
    });
    set_up(context, &store, &teller).await?;
    let logins = Logins::make(context, &teller).await?;
    let told = play(context, &wish, &logins, &teller).await;
    logins.forget(&teller).await;
    told
}

/// From the first partner to the last sum.
async fn play(context: &Context, wish: &Demo, logins: &Logins, teller: &Arc<Teller>) -> Result<Exit, Failure> {
    let (store, broker) = (context.store()?, context.broker()?);
    let shape = Shape {
        messages: usize::try_from(wish.messages).unwrap_or(usize::MAX),
        invalid_percent: INVALID_PERCENT,
        repeated_percent: 3,
        enterprises: vec!["acme".to_owned(), "globex".to_owned()],
        run: "demo".to_owned(),
        seed: wish.seed,
        user: broker.user()?,
        waves: WAVES,
        parked_then_reserved: PARKED_THEN_RESERVED,
        park_runs_out: true,
    };
    let plan = Arc::new(Plan::draw(&shape));
    let mut settings = context.settings.clone();
    settings.database.url = logins.registers().clone();
    let desk = Arc::new(Registrar {
        store: Store::new(&settings).map_err(Failure::usage)?,
        retry: context.settings.retry.clone(),
        patience: if wish.chaos {
            Duration::from_secs(60)
        } else {
            Duration::ZERO
        },
    });
    desk.register_all(&plan).await?;
    teller.say("partners acme and globex are registered, with a key and a connection each;");
    teller.say("  and one that is suspended, and one that is bound to a user of the broker");
    desk.deposit_all(&plan).await?;
    desk.reserve(&plan.reservations).await?;
    teller.say(&format!(
        "{} deposits, {} allocations reserved",
        plan.deposits.len(),
        plan.reservations.len()
    ));
    let before = report::balances(&store.balances().await?);

    let worker = ChildWorker::start(context, logins.works().clone(), wish.chaos)?;
    let worker = Arc::new(Mutex::new(worker));
    let story = Story {
        context,
        wish,
        broker: &broker,
        plan: Arc::clone(&plan),
        desk,
        teller: Arc::clone(teller),
        worker: Arc::clone(&worker),
    };
    let told = story.tell(&store, before).await;
    teller.bar.finish();
    let mut worker = worker.lock().await;
    match told {
        Ok(report) => {
            context.out.say(&report, |out| report.tell(out))?;
            if report.ok {
                worker.forget_log();
                return Ok(Exit::Done);
            }
            super::output::complain(&format!("the worker's log: {}", worker.log().display()));
            Ok(Exit::Failed)
        }
        Err(failure) => {
            worker.complain();
            Err(failure)
        }
    }
}

/// What is too old or too narrow is said before anything is made.
async fn must_suffice(store: &Store, broker: &BrokerSettings) -> Result<(), Failure> {
    const HINT: &str = "`settled demo --help` says what it needs; `make demo` brings it along";
    let terminal = console::Term::stderr();
    if let Some((_, columns)) = terminal.size_checked().filter(|_| terminal.is_term())
        && columns < COLUMNS_MIN
    {
        return Err(Failure::usage(format!(
            "the terminal has {columns} columns, and the demo's story needs {COLUMNS_MIN}"
        ))
        .hint("make it wider, or send stderr to a file"));
    }
    let vitals = store.vitals().await?;
    if vitals.version_number < POSTGRES_MIN {
        return Err(Failure::refused(format!(
            "the database is PostgreSQL {}, and the demo needs 15 or newer",
            vitals.version
        ))
        .hint(HINT));
    }
    if vitals.read_only {
        return Err(
            Failure::refused("the database is read-only, a standby perhaps").hint("let the URL name the primary")
        );
    }
    // A broker that hides its version is taken as it is.
    let version = server_version(broker).await.unwrap_or_default();
    if broker_version(&version).is_some_and(|version| version < RABBITMQ_MIN) {
        let (major, minor) = RABBITMQ_MIN;
        return Err(Failure::refused(format!(
            "the broker is {version}, and the demo needs {major}.{minor} or newer"
        ))
        .hint(HINT));
    }
    Ok(())
}

/// `RabbitMQ 3.10.8` as numbers.
fn broker_version(greeting: &str) -> Option<(u32, u32)> {
    let mut numbers = greeting.strip_prefix("RabbitMQ ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The demo moves made-up money: not where there is anything of anybody's.
async fn must_be_fresh(store: &Store, broker: &BrokerSettings) -> Result<(), Failure> {
    let not_fresh = |what: String| {
        Failure::refused(format!(
            "{what}: the demo wants a database and a virtual host of its own"
        ))
        .hint("`make demo` makes them, and so does: set -a; eval \"$(dev/services fresh demo)\"")
    };
    if store.schema_version().await?.is_some() {
        let partners = store.partners().await?.len();
        if partners > 0 {
            return Err(not_fresh(format!("the database has {partners} partners already")));
        }
        if !store.balances().await?.is_empty() {
            return Err(not_fresh("the database has accounts already".to_owned()));
        }
    }
    let connection = Connection::open(broker, "settled demo").await?;
    let found = async {
        let depths = topology::depths(&connection).await?;
        Ok::<_, BrokerError>((depths, subscribe::consumers(&connection, topology::UPDATES).await?))
    };
    match found.await {
        // Not declared yet.
        Err(error) if error.code() == Some(404) => {}
        Err(error) => return Err(error.into()),
        Ok((
            Depths {
                updates,
                dead,
                unreadable,
            },
            consumers,
        )) => {
            let waiting = u64::from(updates) + u64::from(dead) + u64::from(unreadable);
            if waiting > 0 {
                return Err(not_fresh(format!("{waiting} messages wait in the broker's queues")));
            }
            if consumers > 0 {
                return Err(not_fresh("a worker consumes the broker's queue already".to_owned()));
            }
        }
    }
    Ok(())
}

/// `migrate` and `topology`.
async fn set_up(context: &Context, store: &Store, teller: &Teller) -> Result<(), Failure> {
    let applied = store.migrate().await?;
    teller.say(&format!("schema applied: {}", applied.join(", ")));
    let hidden = topology::hidden(store.books_epoch().await?.books);
    context
        .declares(async |connection| {
            topology::declare(connection).await?;
            topology::declare_hidden(connection, &hidden).await
        })
        .await?;
    teller.say("exchanges and queues declared");
    Ok(())
}

/// Everything from the worker's start to the last sum.
struct Story<'a> {
    context: &'a Context,
    wish: &'a Demo,
    broker: &'a BrokerSettings,
    plan: Arc<Plan>,
    desk: Arc<Registrar>,
    teller: Arc<Teller>,
    worker: Arc<Mutex<ChildWorker>>,
}

impl Story<'_> {
    async fn tell(&self, store: &Store, before: Balances) -> Result<Report, Failure> {
        let (pid, chaos) = (self.worker.lock().await.pid(), self.wish.chaos);
        self.worker.lock().await.wait_until_consuming(self.broker).await?;
        self.teller.say(&format!("worker {pid} consumes"));
        let account = Arc::new(Accounting::new(&self.plan));
        let subscriber = Subscriber::start(
            self.broker,
            &self.context.settings.retry,
            "settled.demo.subscriber".to_owned(),
            true,
            Arc::clone(&account),
        )
        .await?;
        let driven = tokio::select! {
            driven = self.drive(&account) => driven,
            failure = self.worker_ends() => Err(failure),
        };
        subscriber.end().await;
        let (hits, post) = driven?;
        // All is said: now the worker stops in order, and the books are closed.
        let stopped = self.worker.lock().await.terminate().await?;
        self.teller
            .say(&format!("worker told to stop (SIGTERM): {}", stopped.sentence()));
        let findings = account.findings(true);
        let rejected = findings.expected.rejected;
        let evidence = Evidence {
            chaos,
            hits,
            republished: post.republished,
            depths: self.depths(rejected).await?,
            parked_left: store.count_parked().await?,
            before,
            after: report::balances(&store.balances().await?),
            books: store.check_books(|_, _| {}).await?,
            stopped,
            sample: account.sample(),
            seconds: self.teller.began.elapsed().as_secs_f64(),
        };
        let burst = self.burst_items();
        Ok(Report::new(&self.plan, &account, findings, evidence, burst))
    }

    /// Until the worker ends by itself. Where it is killed on purpose, nobody looks.
    async fn worker_ends(&self) -> Failure {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            if !self.wish.chaos
                && let Some(status) = self.worker.lock().await.ended()
            {
                return Failure::ours(format!("the worker ended by itself: {status}"));
            }
        }
    }

    /// The items that are published all at once.
    fn burst_items(&self) -> std::ops::Range<usize> {
        let end = self.plan.items.len();
        let first = self.plan.waves.get(self.paced_waves());
        first.map_or(end, |wave| wave.items.start)..end
    }

    fn paced_waves(&self) -> usize {
        if self.wish.chaos { WAVES } else { WAVES - BURST_WAVES }
    }

    async fn drive(&self, account: &Arc<Accounting>) -> Result<(Vec<Hit>, Posted), Failure> {
        let chaos = self.wish.chaos;
        let timeout = Duration::from_secs(if chaos { 60 } else { 25 });
        let hurry = Arc::new(AtomicUsize::new(0));
        let mut drive = Drive {
            post: Post::new(
                self.broker.clone(),
                "settled demo partner",
                &self.context.settings.retry,
                Duration::from_secs(60),
            ),
            plan: Arc::clone(&self.plan),
            account: Arc::clone(account),
            desk: Arc::clone(&self.desk),
            hurry: Arc::clone(&hurry),
            timeout,
        };
        let (waves, paced) = (self.plan.waves.len(), self.paced_waves());
        let paced_items = self.burst_items().start;
        let time = if chaos { PACED_CHAOS } else { PACED };
        let rate = (paced_items as f64 / time.as_secs_f64()).clamp(20.0, 1_000.0);
        self.teller.say(&format!(
            "partners publish {paced_items} signed updates, {rate:.0} a second"
        ));
        let bar = &self.teller.bar;
        let late = drive.reserve_late();
        let publishing = async {
            let mut answered = drive.waves(0..paced, Some(rate), || bar.show(account)).await?;
            if answered && paced < waves {
                let burst = self.burst_items().len();
                self.teller.say(&format!("and {burst} as fast as it goes"));
                answered = drive.burst(paced..waves, || bar.show(account)).await?;
            }
            if answered {
                wait_for_all(account, timeout, || bar.show(account)).await;
            }
            Ok::<_, Failure>(drive)
        };
        let hitting = async {
            match (&self.wish.services, chaos) {
                (Some(services), true) => {
                    let chaos = Chaos {
                        context: self.context,
                        broker: self.broker,
                        services,
                        account,
                        teller: &self.teller,
                        worker: &self.worker,
                        hurry: &hurry,
                        messages: self.plan.items.len(),
                    };
                    chaos.hit_all().await
                }
                (Some(_) | None, _) => Ok(Vec::new()),
            }
        };
        let (published, hits) = tokio::try_join!(publishing, hitting)?;
        account
            .until(Instant::now() + Duration::from_secs(10), |account| {
                account.dead_letters_missing() == 0
            })
            .await;
        late.abort();
        if let Ok(Err(failure)) = late.await {
            return Err(failure);
        }
        let posted = Posted {
            republished: published.post.republished,
        };
        published.post.close().await;
        self.teller.say("every message has its answer, or had its time");
        Ok((hits, posted))
    }

    /// What is in the queues; the broker counts a little behind.
    async fn depths(&self, dead: usize) -> Result<Depths, Failure> {
        let connection = Connection::open(self.broker, "settled demo").await?;
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let depths = topology::depths(&connection).await?;
            let there = usize::try_from(depths.dead).unwrap_or(usize::MAX) >= dead && depths.updates == 0;
            if there || Instant::now() >= deadline {
                connection.close().await?;
                return Ok(depths);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What the publisher went through.
struct Posted {
    republished: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_broker_is_known_by_its_greeting() {
        for (greeting, version) in [
            ("RabbitMQ 3.9.29", Some((3, 9))),
            ("RabbitMQ 3.10.8", Some((3, 10))),
            ("RabbitMQ 4.3.6", Some((4, 3))),
            ("LavinMQ 2.0", None),
            ("", None),
        ] {
            assert_eq!(broker_version(greeting), version, "{greeting}");
        }
        assert!((3, 9) < RABBITMQ_MIN && (3, 10) >= RABBITMQ_MIN && (4, 0) >= RABBITMQ_MIN);
    }
}
