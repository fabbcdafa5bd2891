//! One drain: so many messages wait, a contestant starts, and the clock runs from its first event to its last. Every
//! message, refused or not, makes exactly one event, so the subscriber's queue says how far it is. Afterwards the
//! contestant's books are checked: an answer that is fast and wrong does not count.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use settled::broker::{
    publisher::BrokerAnswer,
    topology::{DEAD, UPDATES},
};
use tokio_postgres::types::PgLsn;

use crate::{
    Fallible,
    contestant::{Contestant, Running, Told},
    place::{EVENTS_QUEUE, PATIENCE, Place, Services, settled},
    processes::{Accounts, Cpu, resident_at_most},
    traffic::{Expect, History, Traffic, World},
};

/// Between two looks at the subscriber's queue.
const POLL: Duration = Duration::from_millis(10);

/// What one drain came to. CPU in microseconds and WAL in bytes, each a message.
#[derive(Clone, Debug)]
pub(crate) struct Drain {
    pub(crate) rate: f64,
    pub(crate) seconds: f64,
    pub(crate) worker: f64,
    pub(crate) broker: f64,
    pub(crate) postgres: f64,
    pub(crate) wal: f64,
    /// Messages a batch, and round trips to the database a batch, of a contestant that tells.
    pub(crate) batch: Option<f64>,
    pub(crate) round_trips: Option<f64>,
    /// The most memory that its processes had resident, together.
    pub(crate) resident: u64,
}

impl Drain {
    /// CPU of everybody.
    pub(crate) fn cpu(&self) -> f64 {
        self.worker + self.broker + self.postgres
    }
}

/// What is drained, by whom.
pub(crate) struct Order<'a> {
    pub(crate) contestant: &'a Contestant,
    pub(crate) world: &'a World,
    pub(crate) traffic: &'a Traffic,
    /// Of the traffic, so many from its beginning.
    pub(crate) messages: usize,
    pub(crate) processes: usize,
}

impl<'a> Order<'a> {
    /// One process.
    pub(crate) fn new(contestant: &'a Contestant, world: &'a World, traffic: &'a Traffic, messages: usize) -> Self {
        Self {
            contestant,
            world,
            traffic,
            messages: messages.min(traffic.messages.len()),
            processes: 1,
        }
    }
}

/// At one moment.
struct Reading {
    at: Instant,
    events: usize,
    cpu: Cpu,
    wal: PgLsn,
    told: Vec<Told>,
}

pub(crate) async fn measure(services: &Services, logs: &Path, order: &Order<'_>) -> Fallible<Drain> {
    let place = services.place("drain", order.world, order.contestant.program()).await?;
    let mut accounts = Accounts::open(services).await?;
    feed(&place, order.traffic, order.messages).await?;
    accounts.rest().await?;
    let mut running = Vec::new();
    for _ in 0..order.processes {
        running.push(order.contestant.start(&place, logs)?);
    }
    accounts.workers = running.iter().map(|process| process.id).collect();
    let begin = wait_for(services, &place, &accounts, &mut running, order.contestant, 1).await?;
    let end = wait_for(
        services,
        &place,
        &accounts,
        &mut running,
        order.contestant,
        order.messages,
    )
    .await?;
    let resident = stop_all(running).await?;
    check(&place, order).await?;
    services.leave(place).await?;
    Ok(reckon(&begin, &end, resident))
}

/// Stops the processes; the most memory that they had resident, together.
async fn stop_all(running: Vec<Running>) -> Fallible<u64> {
    let resident = running
        .iter()
        .map(|process| resident_at_most(process.id))
        .sum::<Fallible<u64>>()?;
    for process in running {
        process.stop().await?;
    }
    Ok(resident)
}

fn reckon(begin: &Reading, end: &Reading, resident: u64) -> Drain {
    let events = (end.events - begin.events) as f64;
    let seconds = (end.at - begin.at).as_secs_f64();
    let cpu = end.cpu.since(begin.cpu);
    let sum = |get: fn(&Told) -> f64| -> f64 {
        end.told.iter().map(get).sum::<f64>() - begin.told.iter().map(get).sum::<f64>()
    };
    let batches = sum(|told| told.batches);
    let counts = |told: &Told| told.round_trips.is_some();
    let counted = !end.told.is_empty() && end.told.iter().all(counts);
    let a_batch = |number: f64| (batches > 0.0).then_some(number / batches);
    Drain {
        rate: events / seconds,
        seconds,
        worker: cpu.worker as f64 / events,
        broker: cpu.broker as f64 / events,
        postgres: cpu.postgres as f64 / events,
        wal: (u64::from(end.wal).saturating_sub(u64::from(begin.wal))) as f64 / events,
        batch: a_batch(sum(|told| told.messages)),
        round_trips: a_batch(sum(|told| told.round_trips.unwrap_or_default())).filter(|_| counted),
        resident,
    }
}

/// The worker's memory while so many messages wait: the traffic, again and again. It drains some of them, and what it did
/// not take must be there when it is gone.
pub(crate) async fn backlog(services: &Services, logs: &Path, order: &Order<'_>, waiting: usize) -> Fallible<u64> {
    let place = services
        .place("backlog", order.world, order.contestant.program())
        .await?;
    feed(&place, order.traffic, waiting).await?;
    let mut running = vec![order.contestant.start(&place, logs)?];
    let accounts = Accounts::open(services).await?;
    wait_for(
        services,
        &place,
        &accounts,
        &mut running,
        order.contestant,
        order.messages,
    )
    .await?;
    let resident = stop_all(running).await?;
    let (events, left) = (place.line.ready(EVENTS_QUEUE).await?, place.line.ready(UPDATES).await?);
    if events + left != waiting {
        return Err(format!("of {waiting} waiting messages {events} made an event, and {left} are left").into());
    }
    services.leave(place).await?;
    Ok(resident)
}

/// Publishes the messages, persistent and confirmed, and sees that the broker counts them. Where there are fewer than
/// wanted they go round.
pub(crate) async fn feed(place: &Place, traffic: &Traffic, messages: usize) -> Fallible<()> {
    let (connection, mut publisher) = place.publisher().await?;
    let mut left = messages;
    while left > 0 {
        for some in traffic.messages.chunks(1_000) {
            let some = &some[..left.min(some.len())];
            let fates = publisher.publish(some).await?;
            if let Some(fate) = fates.iter().find(|fate| **fate != BrokerAnswer::Confirmed) {
                return Err(format!("a message was not confirmed but {fate:?}").into());
            }
            left -= some.len();
        }
    }
    drop(publisher);
    // All is confirmed: a failed good-bye changes nothing.
    drop(connection.close().await);
    until_ready(place, UPDATES, messages).await
}

async fn until_ready(place: &Place, queue: &str, messages: usize) -> Fallible<()> {
    let began = Instant::now();
    loop {
        let ready = place.line.ready(queue).await?;
        if ready == messages {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(format!("{ready} messages wait in {queue}, not {messages}").into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Looks until there are so many events, and reads the clock and the accounts then.
async fn wait_for(
    services: &Services,
    place: &Place,
    accounts: &Accounts,
    running: &mut [Running],
    contestant: &Contestant,
    least: usize,
) -> Fallible<Reading> {
    let mut progress = (0, Instant::now());
    loop {
        let events = events_so_far(place, running, contestant).await?;
        if events >= least {
            let at = Instant::now();
            let cpu = accounts.read()?;
            let wal = services
                .admin
                .query_one("SELECT pg_current_wal_lsn()", &[])
                .await?
                .get(0);
            let mut told = Vec::new();
            for process in running {
                told.extend(process.told().await?);
            }
            return Ok(Reading {
                at,
                events,
                cpu,
                wal,
                told,
            });
        }
        if events > progress.0 {
            progress = (events, Instant::now());
        }
        if progress.1.elapsed() > PATIENCE {
            return Err(format!("{events} of {least} events, and no more for {PATIENCE:?}").into());
        }
        for process in &mut *running {
            process.still_runs()?;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Where each is a message, the subscriber's queue counts them. Where several are in one, the worker's own count has to
/// do while it runs; [`check`] counts what the messages hold.
async fn events_so_far(place: &Place, running: &mut [Running], contestant: &Contestant) -> Fallible<usize> {
    if !contestant.is_batched() {
        return place.line.ready(EVENTS_QUEUE).await;
    }
    let mut events = 0.0;
    for process in running {
        events += process.told().await?.unwrap_or_default().events;
    }
    Ok(events as usize)
}

/// Events in the messages of the subscriber's queue, which is empty afterwards.
async fn events_inside(place: &Place) -> Fallible<u64> {
    let messages = place.line.ready(EVENTS_QUEUE).await?;
    let mut consumer = place.line.consume(EVENTS_QUEUE).await?;
    let mut events = 0;
    for _ in 0..messages {
        let next = tokio::time::timeout(PATIENCE, consumer.next()).await?;
        let message = next.ok_or("the subscriber's consumer was cancelled")??;
        // An array and nothing else: who sends events singly here is not what is measured.
        let array: Vec<&serde_json::value::RawValue> = serde_json::from_slice(&message.data)?;
        events += array.len() as u64;
    }
    Ok(events)
}

/// The books of a contestant that stopped: everything settled once, everything refused dead-lettered, nothing left over.
async fn check(place: &Place, order: &Order<'_>) -> Fallible<()> {
    let expects = &order.traffic.expects[..order.messages];
    let count = |wanted: Expect| expects.iter().filter(|expect| **expect == wanted).count() as u64;
    let (settled_once, strangers, mismatches) =
        (count(Expect::Settled), count(Expect::Stranger), count(Expect::Mismatch));
    let remembered = match order.world.history {
        History::None => 0,
        History::Rows(rows) => rows,
    };
    let db = place.db().await?;
    let number = async |sql: &str| -> Fallible<u64> {
        let number: i64 = db.query_one(sql, &[]).await?.get(0);
        Ok(number.unsigned_abs())
    };
    let events = if order.contestant.is_batched() {
        events_inside(place).await?
    } else {
        place.line.ready(EVENTS_QUEUE).await? as u64
    };
    let stored_dead_letters = number("SELECT count(*) FROM settled.dead_letters").await?;
    let found = [
        (
            "messages left in the queue, or never acknowledged",
            place.line.ready(UPDATES).await? as u64,
            0,
        ),
        ("events", events, order.messages as u64),
        (
            "dead letters, in their queue and stored",
            place.line.ready(DEAD).await? as u64 + stored_dead_letters,
            strangers + mismatches,
        ),
        (
            "settlements",
            number("SELECT count(*) FROM settled.settlements").await?,
            settled_once,
        ),
        (
            "allocations that left reserved",
            number("SELECT count(*) FROM settled.allocations WHERE status <> 'reserved'").await?,
            settled_once,
        ),
        (
            "transfers of settlements",
            number("SELECT count(*) FROM settled.transfers WHERE step = 1").await?,
            settled_once,
        ),
        (
            "receipts",
            number("SELECT count(*) FROM settled.receipts").await?,
            remembered + settled_once + distinct(order, Expect::Mismatch),
        ),
        (
            "accounts whose balance is not the sum of their entries",
            number(
                "SELECT count(*)
                 FROM settled.accounts AS a
                 FULL JOIN (SELECT account_id, sum(change) AS sum FROM settled.entries GROUP BY account_id) AS e
                   ON e.account_id = a.id
                 WHERE coalesce(a.balance, 0) <> coalesce(e.sum, 0)",
            )
            .await?,
            0,
        ),
        (
            "money made or lost",
            number("SELECT (coalesce(sum(change), 0) <> 0)::int::bigint FROM settled.entries").await?,
            0,
        ),
        (
            "publications left in the outbox",
            number("SELECT count(*) FROM settled.outbox").await?,
            0,
        ),
    ];
    for (what, is, expected) in found {
        if is != expected {
            return Err(format!("{}: {what}: {is}, expected {expected}", order.contestant).into());
        }
    }
    // Its own audit knows more. It misses the deposits that the history's transfers are of, and, of others, the batches.
    if order.contestant.is_worker() && order.world.history == History::None {
        let settings = [("SETTLED_DATABASE_URL", place.database.url.as_str())];
        settled(order.contestant.program(), &["ledger", "check"], &settings).await?;
    }
    Ok(())
}

/// How many different messages come to this.
fn distinct(order: &Order<'_>, wanted: Expect) -> u64 {
    let expects = &order.traffic.expects[..order.messages];
    let bodies: std::collections::HashSet<&[u8]> = order
        .traffic
        .messages
        .iter()
        .zip(expects)
        .filter(|(_, expect)| **expect == wanted)
        .map(|(message, _)| message.body.as_slice())
        .collect();
    bodies.len() as u64
}
