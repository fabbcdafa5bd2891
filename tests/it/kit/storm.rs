//! A line at work on servers of its own, to which one bad thing after another is done. Every act is drawn from a seed, is
//! counted, and is recorded; what recovers from it is timed.

mod acts;
mod servers;
mod tally;

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

pub(crate) use self::{
    acts::{Act, schedule},
    tally::Tally,
};
use crate::kit::{
    amqp::{Line, Message},
    auditor::{Reservation, Sent},
    partner::Partner,
    private::Private,
    proxy::Proxy,
    support::{Place, Worker, address, count, each_host, get, until},
    traffic::{Dice, Mix, Traffic, fund, reserve_and_draft, reserve_late},
};

/// What the workers run with: the defaults, but for their logs, which would be gigabytes.
const SETTINGS: [(&str, &str); 1] = [("SETTLED_LOG__LEVEL", "info")];

/// Longer than anything takes to go on after an act.
const RECOVERY: Duration = Duration::from_secs(90);

/// So long a partner waits for a confirm before it publishes again.
const CONFIRM: Duration = Duration::from_secs(1);

/// Messages for what only a settlement can show, and for what happens to a partner's keys.
const SPARE: usize = 600;

/// Which servers, and how many workers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) options: &'static [&'static str],
    pub(crate) workers: usize,
}

impl Shape {
    pub(crate) const ONE: Shape = Shape {
        options: &[],
        workers: 2,
    };

    pub(crate) const CLUSTER: Shape = Shape {
        options: Private::CLUSTER,
        workers: 2,
    };

    pub(crate) fn is_cluster(&self) -> bool {
        self.options.contains(&"--nodes")
    }

    pub(crate) fn has_standby(&self) -> bool {
        self.options.contains(&"--standby")
    }
}

/// One act, with the numbers that it draws.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) act: Act,
    pub(crate) draws: [usize; 4],
}

impl Step {
    pub(crate) fn draw(act: Act, dice: &mut Dice) -> Self {
        Self {
            act,
            draws: std::array::from_fn(|_| dice.below(1_000_000)),
        }
    }

    fn number(&self, draw: usize, bound: usize) -> usize {
        self.draws.get(draw).copied().unwrap_or_default() % bound.max(1)
    }

    /// A time between two, in milliseconds.
    fn time(&self, draw: usize, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.number(draw, (most - least) as usize) as u64)
    }
}

/// What an act brought about.
struct Outcome {
    /// Whether it met anything: connections, frames, processes.
    hits: usize,
    recovers: Option<Recovers>,
}

/// What recovers, by what it is called.
#[derive(Clone, Copy)]
enum Recovers {
    /// From this moment until the next settlement.
    Since(&'static str, Instant),
    /// It did already, in so long.
    Took(&'static str, Duration),
}

impl Outcome {
    fn hit(hits: usize) -> Self {
        Self { hits, recovers: None }
    }

    fn recovers(hits: usize, what: &'static str, since: Instant) -> Self {
        Self {
            hits,
            recovers: Some(Recovers::Since(what, since)),
        }
    }

    fn took(hits: usize, what: &'static str, took: Duration) -> Self {
        Self {
            hits,
            recovers: Some(Recovers::Took(what, took)),
        }
    }
}

/// A database, a vhost, workers and traffic, on servers that outlive it.
pub(crate) struct Round<'a> {
    private: &'a Private,
    pub(crate) place: Place,
    database: Vec<Proxy>,
    broker: Vec<Proxy>,
    urls: [(&'static str, String); 2],
    workers: RefCell<Vec<Worker>>,
    /// The PostgreSQL that writes.
    primary: &'a Cell<&'static str>,
    /// Allocations of a partner that is always well, each of which one message can still settle.
    spare: RefCell<Vec<Message>>,
    /// A partner whose keys and state change: whatever becomes of its messages, each must be accounted for.
    moody: RefCell<Partner>,
    of_moody: RefCell<Vec<Reservation>>,
    messages: Vec<Message>,
    late: Vec<Reservation>,
}

impl<'a> Round<'a> {
    pub(crate) async fn prepare(
        private: &'a Private,
        primary: &'a Cell<&'static str>,
        shape: Shape,
        seed: u64,
        messages: usize,
    ) -> Self {
        let place = Place::within(private.services.clone(), "soak").await;
        let mix = Mix {
            valid: messages,
            ..Mix::FULL
        };
        let funded = fund(&place, &mix).await;
        let Traffic { messages, late } = reserve_and_draft(&place, &funded, seed, &mix).await;
        let well = &funded.pair[0];
        let spare: Vec<Reservation> = (0..SPARE).map(|_| well.allocation("BTC", "1")).collect();
        place.reserve(&spare).await;
        let moody = Partner::new("moody");
        place.register(&moody).await;
        place.deposit(&moody, "BTC", "1000000").await;
        let of_moody: Vec<Reservation> = (0..SPARE).map(|_| moody.allocation("BTC", "1")).collect();
        place.reserve(&of_moody).await;
        let (database, database_url) = behind_proxies(&place.database_url).await;
        let (broker, broker_url) = behind_proxies(&place.broker_url).await;
        let urls = [
            ("SETTLED_DATABASE_URL", database_url),
            ("SETTLED_BROKER_URL", broker_url),
        ];
        let round = Self {
            spare: RefCell::new(spare.iter().map(|reservation| well.cleared(reservation)).collect()),
            moody: RefCell::new(moody),
            of_moody: RefCell::new(of_moody),
            workers: RefCell::default(),
            private,
            place,
            database,
            broker,
            urls,
            primary,
            messages,
            late,
        };
        for _ in 0..shape.workers {
            let worker = round.start_worker();
            round.workers.borrow_mut().push(worker);
        }
        round.all_ready().await;
        round
    }

    fn start_worker(&self) -> Worker {
        let urls = self.urls.each_ref().map(|(name, url)| (*name, url.as_str()));
        self.place.worker(&[&SETTINGS[..], &urls].concat())
    }

    /// Every worker lives, and is ready.
    async fn all_ready(&self) {
        until("every worker is ready", RECOVERY, async || {
            self.all_live();
            let addresses: Vec<Option<String>> = self.workers.borrow().iter().map(Worker::http_said).collect();
            for address in addresses {
                let (status, _) = get(&format!("http://{}/readyz", address?)).await?;
                if status != 200 {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    /// No worker ended by itself.
    fn all_live(&self) {
        for worker in self.workers.borrow().iter() {
            if let Some(status) = worker.ended() {
                panic!("a worker ended by itself with {status}: {}", worker.said());
            }
        }
    }

    /// Everything goes wrong for so long, step by step, while messages come; then everything is accounted for.
    pub(crate) async fn run(mut self, steps: impl Iterator<Item = Step>, long: Option<Duration>, tally: &mut Tally) {
        let began = Instant::now();
        let is_over = Cell::new(false);
        let storm = async {
            let mut steps = steps;
            while long.is_none_or(|long| began.elapsed() < long) {
                let Some(step) = steps.next() else { break };
                self.one(step, tally).await;
            }
            is_over.set(true);
        };
        // Where nobody says how long, about as long as the acts take.
        let long = long.unwrap_or(Duration::from_secs(120));
        tokio::join!(storm, self.talk(long, &is_over));
        self.settle_up(tally).await;
    }

    /// Publishes, spread over the time; what is left when it is over goes out at once.
    async fn talk(&self, long: Duration, is_over: &Cell<bool>) {
        const LOT: usize = 6;
        let began = Instant::now();
        let lots = self.messages.len().div_ceil(LOT).max(1);
        for (number, lot) in self.messages.chunks(LOT).enumerate() {
            self.place.publish(lot).await;
            let due = long.mul_f64((number + 1) as f64 / lots as f64);
            while !is_over.get() && began.elapsed() < due {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    async fn one(&self, step: Step, tally: &mut Tally) {
        let began = Instant::now();
        let outcome = self.act(step).await;
        let took = began.elapsed();
        let recovery = match outcome.recovers {
            Some(Recovers::Since(what, since)) => {
                self.settles_again(step.act).await;
                Some((what, since.elapsed()))
            }
            Some(Recovers::Took(what, took)) => Some((what, took)),
            None => None,
        };
        self.all_live();
        // Every other act meets a line that is all well; the others one that still comes back.
        if step.number(3, 2) == 0 || step.act.is_heavy() {
            self.all_ready().await;
        }
        tally.note(step, outcome.hits, took, recovery);
    }

    /// Waits for a settlement that is not there yet.
    async fn settles_again(&self, act: Act) {
        let mut watcher = Watcher::new(&self.place.database_url);
        let mut before = None;
        until(&format!("something settles after {act:?}"), RECOVERY, async || {
            self.all_live();
            let last = watcher.last().await?;
            // There must be something to settle.
            if before.is_none() {
                before = Some(last);
                let message = self.one_spare();
                self.place.story().sent.push(sent(&message));
                // What a partner waits for its confirm is part of what is timed: not for long at a node that is frozen.
                let line = Line::open_with(&self.place.broker_url, CONFIRM).await;
                line.publish(&[message]).await;
            }
            (before != Some(last)).then_some(())
        })
        .await;
    }

    /// A valid message that nobody sent yet.
    fn one_spare(&self) -> Message {
        let message = self.spare.borrow_mut().pop();
        message.unwrap_or_else(|| panic!("more than {SPARE} acts in a round"))
    }

    /// The rest of the story, and the books.
    async fn settle_up(&mut self, tally: &mut Tally) {
        for proxy in self.database.iter().chain(&self.broker) {
            proxy.open();
        }
        self.all_ready().await;
        let late = std::mem::take(&mut self.late);
        let mut workers = std::mem::take(&mut *self.workers.borrow_mut());
        let last = workers.pop().expect("a worker");
        reserve_late(&self.place, &late, &last).await;
        self.place.rest_within(RECOVERY).await;
        for worker in &workers {
            assert_eq!(
                worker.terminate().await.code(),
                Some(0),
                "SIGTERM ends the worker in order"
            );
        }
        drop(workers);
        self.place.story().keys_end = true;
        self.place.settle_up(last).await;
        let check = self.place.json(&["ledger", "check", "--signatures"]).await;
        assert_eq!(check["ok"], true, "{check}");
        let wires: usize = self.database.iter().chain(&self.broker).map(Proxy::injected).sum();
        let db = self.place.db().await;
        let settled = count(&db, "settlements").await;
        tally.round_is_over(self.place.story().sent.len(), settled, wires);
    }
}

fn sent(message: &Message) -> Sent {
    Sent {
        routing_key: message.routing_key.clone(),
        body: message.body.clone(),
        expect: message.expect,
    }
}

/// A proxy for each host, and the URL with them.
async fn behind_proxies(url: &str) -> (Vec<Proxy>, String) {
    let mut proxies = Vec::new();
    for url in each_host(url) {
        proxies.push(Proxy::to(&address(&url)).await);
    }
    let addresses: Vec<String> = proxies.iter().map(|proxy| proxy.address.to_string()).collect();
    (proxies, url.replacen(&address(url), &addresses.join(","), 1))
}

/// A connection to the first host that gives one; it may be slow to come, or never.
async fn try_connect(url: &str) -> Option<Client> {
    for url in each_host(url) {
        let connecting = tokio::time::timeout(Duration::from_millis(500), tokio_postgres::connect(&url, NoTls));
        if let Ok(Ok((client, connection))) = connecting.await {
            tokio::spawn(async move { drop(connection.await) });
            return Some(client);
        }
    }
    None
}

/// Looks at what settled last, through whatever happens to the database.
struct Watcher {
    url: String,
    link: Option<Client>,
}

impl Watcher {
    fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            link: None,
        }
    }

    /// The batch that settled something last. Nothing while there is no answer.
    async fn last(&mut self) -> Option<Option<Uuid>> {
        if self.link.is_none() {
            self.link = try_connect(&self.url).await;
        }
        let sql = "SELECT id FROM settled.batches WHERE settled > 0 ORDER BY id DESC LIMIT 1";
        let asked = tokio::time::timeout(Duration::from_secs(1), self.link.as_ref()?.query_opt(sql, &[])).await;
        match asked {
            Ok(Ok(row)) => Some(row.map(|row| row.get(0))),
            Ok(Err(_)) | Err(_) => {
                self.link = None;
                None
            }
        }
    }
}
