//! The database and the broker away: cut off, refusing, silent, restarted and killed, under load and before the start.

use std::time::{Duration, Instant};

use lapin::types::AMQPValue;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::{
        Reservation,
        bounds::{Amounts, Gauge, Watch},
    },
    partner::Partner,
    private::Private,
    proxy::Proxy,
    support::{Ground, PATIENCE, Place, Worker, address, skip, until, with_address},
    traffic::{Mix, Traffic, prepare, publish_in_lots},
};

/// Short deadlines, so that silence is noticed soon.
const SETTINGS: [(&str, &str); 12] = [
    ("SETTLED_WORKER__BATCH_MAX", "16"),
    ("SETTLED_WORKER__PREFETCH", "64"),
    ("SETTLED_RETRY__MAX", "200ms"),
    ("SETTLED_DATABASE__CONNECT_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__STATEMENT_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__LOCK_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__CLIENT_DEADLINE", "2s"),
    ("SETTLED_DATABASE__ACQUIRE_TIMEOUT", "2s"),
    ("SETTLED_BROKER__HEARTBEAT", "1s"),
    ("SETTLED_BROKER__CONNECT_TIMEOUT", "2s"),
    ("SETTLED_BROKER__PUBLISH_DEADLINE", "2s"),
    ("SETTLED_OUTBOX__LEASE", "2s"),
];

/// A body at its largest.
const BODY_MAX: usize = 262_144;

/// A worker that reaches both through proxies.
struct Proxied {
    database: Proxy,
    broker: Proxy,
    database_url: String,
    broker_url: String,
}

impl Proxied {
    async fn to(ground: &Ground) -> Self {
        let database = Proxy::to(&address(&ground.database_url)).await;
        let broker = Proxy::to(&address(&ground.broker_url)).await;
        Self {
            database_url: with_address(&ground.database_url, database.address),
            broker_url: with_address(&ground.broker_url, broker.address),
            database,
            broker,
        }
    }

    fn worker(&self, ground: &Ground, settings: &[(&str, &str)]) -> Worker {
        let urls = [
            ("SETTLED_DATABASE_URL", self.database_url.as_str()),
            ("SETTLED_BROKER_URL", self.broker_url.as_str()),
        ];
        ground.worker(&[SETTINGS.as_slice(), &urls, settings].concat())
    }
}

/// Whether the worker is at work: settles something that was not settled before.
async fn goes_on(place: &Place) {
    let db = place.db().await;
    let count = async || -> i64 {
        let sql = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches";
        db.query_one(sql, &[]).await.expect("batches").get(0)
    };
    let before = count().await;
    until("the worker goes on", PATIENCE, async || {
        (count().await > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_refused_and_stalled_under_load() {
    let place = Place::new("outages").await;
    let Traffic { messages, .. } = prepare(&place, 5, &Mix::VALID).await;
    let proxied = Proxied::to(&place).await;
    let worker = proxied.worker(&place, &[]);
    worker.ready().await;
    let mut lots = messages.chunks(messages.len().div_ceil(6));
    let mut lot = || lots.next().unwrap_or_default();

    // Every connection ends at once; new ones may come.
    for proxy in [&proxied.database, &proxied.broker] {
        let (half, rest) = lot().split_at(20);
        publish_in_lots(&place, half).await;
        proxy.cut();
        publish_in_lots(&place, rest).await;
        goes_on(&place).await;
    }
    // Away for a while.
    for proxy in [&proxied.database, &proxied.broker] {
        let (half, rest) = lot().split_at(20);
        publish_in_lots(&place, half).await;
        proxy.refuse();
        publish_in_lots(&place, rest).await;
        worker.not_ready().await;
        proxy.open();
        worker.ready().await;
    }
    // Silent: no answer, no error, no end.
    for proxy in [&proxied.database, &proxied.broker] {
        let (half, rest) = lot().split_at(20);
        publish_in_lots(&place, half).await;
        proxy.stall();
        publish_in_lots(&place, rest).await;
        worker.not_ready().await;
        let db = place.db().await;
        let rows: i64 = db
            .query_one("SELECT count(*) FROM settled.outbox", &[])
            .await
            .expect("outbox")
            .get(0);
        assert!(
            rows <= 2 * 2 + 2,
            "two rows a lane and two of the due messages at most, not {rows}"
        );
        proxy.open();
        worker.ready().await;
    }
    assert!(worker.ended().is_none(), "the worker lived through all of it");
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_waits_for_what_is_away_at_its_start() {
    let place = Place::new("away_at_start").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservation = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let proxied = Proxied::to(&place).await;
    proxied.database.refuse();
    proxied.broker.refuse();

    let worker = proxied.worker(&place, &[]);
    worker.not_ready().await;
    assert_eq!(worker.get("/livez").await.map(|(status, _)| status), Some(200));
    assert_eq!(worker.get("/metrics").await.map(|(status, _)| status), Some(200));
    proxied.database.open();
    // It goes on to the broker, and is not ready for that.
    until("it asks the broker", PATIENCE, async || {
        worker
            .lines()
            .iter()
            .any(|line| line["dependency"] == "broker")
            .then_some(())
    })
    .await;
    assert!(!worker.is_ready().await);
    // Waiting ends at once when it is told to stop.
    let other = proxied.worker(&place, &[]);
    other.not_ready().await;
    assert_eq!(other.terminate().await.code(), Some(0), "{}", other.said());

    proxied.broker.open();
    worker.ready().await;
    place.publish(&[partner.cleared(&reservation)]).await;
    place.settle_up(worker).await;
}

/// A partner with so many reservations, and what it says of them.
async fn with_messages(place: &Place, count: usize) -> Vec<Message> {
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let cleared = reservations.iter().map(|reservation| partner.cleared(reservation));
    cleared.collect()
}

/// Waits until so many messages are in the queue, in nobody's hands.
async fn all_back(place: &Place, count: usize) {
    until("all are handed back", PATIENCE, async || {
        (place.line().depth("settlement.updates").await as usize == count).then_some(())
    })
    .await;
}

/// How often each message in the queue went back there.
async fn delivery_counts(place: &Place) -> Vec<i64> {
    let queued = place.line().peek("settlement.updates").await;
    queued.iter().map(delivery_count).collect()
}

fn delivery_count(seen: &Seen) -> i64 {
    match seen.header("x-delivery-count") {
        None => 0,
        Some(AMQPValue::LongLongInt(count)) => *count,
        Some(other) => panic!("{other:?}"),
    }
}

/// However long the database is away, a message is handed back once: its delivery count must not grow with the outage. Again
/// and again, since each time the outage meets the lanes at another moment: idle, attaching, with their hands full.
async fn long_outage(test: &str, lanes: &str) {
    const MESSAGES: usize = 30;
    let place = Place::new(test).await;
    let all = with_messages(&place, 4 * MESSAGES).await;
    let proxied = Proxied::to(&place).await;
    let release = Duration::from_millis(300);
    let worker = proxied.worker(
        &place,
        &[
            ("SETTLED_WORKER__PAUSE_RELEASE", "300ms"),
            ("SETTLED_WORKER__LANES", lanes),
        ],
    );
    for messages in all.chunks(MESSAGES) {
        worker.ready().await;
        proxied.database.refuse();
        place.publish(messages).await;
        worker.not_ready().await;
        all_back(&place, MESSAGES).await;
        // Many times as long as the worker has patience.
        tokio::time::sleep(release * 6).await;
        all_back(&place, MESSAGES).await;
        let counts = delivery_counts(&place).await;
        assert!(
            counts.len() == MESSAGES && counts.iter().all(|count| *count <= 1),
            "handed back more than once: {counts:?}"
        );
        proxied.database.open();
        place.rest().await;
    }
    place.settle_up(worker).await;
    assert!(place.dead.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_outage_counts_once_against_each_message() {
    long_outage("long_outage", "1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_outage_counts_once_with_many_lanes() {
    long_outage("long_outage_lanes", "4").await;
}

/// The real thing: both services stopped, started and killed, while messages come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_and_killed_under_load() {
    let private = match Private::start().await {
        Ok(private) => private,
        Err(why) => return skip("outage::restarted_and_killed_under_load", &why),
    };
    {
        let place = Place::within(private.services.clone(), "restarts").await;
        let Traffic { messages, .. } = prepare(&place, 7, &Mix::VALID).await;
        let worker = place.worker(&SETTINGS);
        worker.ready().await;
        let mut lots = messages.chunks(messages.len().div_ceil(4));
        for name in ["postgres", "rabbitmq"] {
            for how in ["restart", "kill"] {
                let lot = lots.next().unwrap_or_default();
                let (before, after) = lot.split_at(lot.len() / 2);
                publish_in_lots(&place, before).await;
                let hit = async {
                    if how == "kill" {
                        private.kill(name).await;
                    }
                    private.restart(name).await;
                };
                // Partners do not wait for it.
                tokio::join!(hit, publish_in_lots(&place, after));
                worker.ready().await;
            }
        }
        assert!(worker.ended().is_none(), "the worker lived through all of it");
        place.settle_up(worker).await;
    }
}

/// The broker's patience with a consumer, in milliseconds, and how often it looks at it: so often that its channel never
/// goes to sleep, for a channel of 3.10 that sleeps does not look.
const CONSUMER_TIMEOUT: u32 = 2_000;
const CHANNEL_TICK: u32 = 200;

/// The database is away for three times as long as the broker is patient with a consumer. Whether the worker hands the
/// messages back first or the broker takes them away, it counts once against each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn away_for_three_consumer_timeouts() {
    let private = match Private::start().await {
        Ok(private) => private,
        Err(why) => return skip("outage::away_for_three_consumer_timeouts", &why),
    };
    for (name, value) in [
        ("consumer_timeout", CONSUMER_TIMEOUT),
        ("channel_tick_interval", CHANNEL_TICK),
    ] {
        let set = format!("application:set_env(rabbit, {name}, {value}).");
        private.rabbitmqctl(&["eval", &set]).await;
    }
    // The worker is the first to lose patience, and then the broker.
    for (test, pause_release) in [("timeout_ours", "500ms"), ("timeout_theirs", "60s")] {
        let place = Place::within(private.services.clone(), test).await;
        let messages = with_messages(&place, 40).await;
        let proxied = Proxied::to(&place).await;
        let worker = proxied.worker(
            &place,
            &[
                ("SETTLED_WORKER__PAUSE_RELEASE", pause_release),
                ("SETTLED_WORKER__BATCH_MAX", "4"),
            ],
        );
        worker.ready().await;
        // The worker has its hands full when the database goes.
        let db = place.db().await;
        db.batch_execute("BEGIN; LOCK TABLE settled.batches")
            .await
            .expect("a lock");
        place.publish(&messages).await;
        all_back(&place, 0).await;
        proxied.database.refuse();
        let away = Instant::now();
        db.batch_execute("ROLLBACK").await.expect("the lock goes");
        worker.not_ready().await;
        all_back(&place, messages.len()).await;
        let three = Duration::from_millis(u64::from(CONSUMER_TIMEOUT)) * 3;
        tokio::time::sleep(three.saturating_sub(away.elapsed())).await;
        all_back(&place, messages.len()).await;
        let counts = delivery_counts(&place).await;
        assert_eq!(counts.len(), messages.len());
        assert!(
            counts.iter().all(|count| *count == 1),
            "it was in the worker's hands: {counts:?}"
        );
        let handed_back = worker
            .lines()
            .iter()
            .any(|line| line["message"] == "messages handed back to the broker");
        assert_eq!(
            handed_back,
            pause_release == "500ms",
            "who was first: {}",
            worker.said()
        );
        proxied.database.open();
        worker.ready().await;
        place.settle_up(worker).await;
        assert!(place.dead.seen().is_empty());
    }
}

/// While a memory or a disk alarm holds, the broker takes no publication: the outbox must not grow, nor the worker, and
/// everything goes on by itself when the alarm is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_held_while_traffic_waits() {
    let private = match Private::start().await {
        Ok(private) => private,
        Err(why) => return skip("outage::an_alarm_held_while_traffic_waits", &why),
    };
    let place = Place::within(private.services.clone(), "alarm").await;
    let Traffic { messages, .. } = prepare(&place, 9, &Mix::VALID).await;
    let db = place.db().await;
    let (memory, disk) = messages.split_at(messages.len() / 2);
    let worker = place.ready_worker(&SETTINGS).await;
    let process = worker.id();
    let lanes = 2;
    for (waiting, raise, clear) in [
        (
            memory,
            ["set_vm_memory_high_watermark", "0"],
            ["set_vm_memory_high_watermark", "0.4"],
        ),
        (
            disk,
            ["set_disk_free_limit", "1000000000000000"],
            ["set_disk_free_limit", "64000000"],
        ),
    ] {
        // A blocked connection takes nothing from anybody: what is to wait is published before, while nobody settles.
        worker.signal("STOP");
        publish_in_lots(&place, waiting).await;
        private.rabbitmqctl(&raise).await;
        let watch = Watch::over(Gauge::of(&place, &worker));
        worker.signal("CONT");
        let count = async || -> i64 {
            let row = db.query_one("SELECT count(*) FROM settled.outbox", &[]).await;
            row.expect("outbox").get(0)
        };
        until(
            "every lane has two rows that it can not publish",
            PATIENCE,
            async || (count().await == 2 * lanes).then_some(()),
        )
        .await;
        // Each lane has tried again and again.
        let failures = async || {
            let lines = worker.lines();
            let failed = lines
                .iter()
                .filter(|line| line["message"] == "publishing failed; the row is kept and published again");
            failed.count()
        };
        let before = failures().await;
        until("publishing fails", PATIENCE, async || {
            (failures().await >= before + 6).then_some(())
        })
        .await;
        let peak = watch.peak();
        let bounds = Amounts {
            outbox_rows: 2 * lanes.unsigned_abs(),
            ..worker.bounds
        };
        assert_eq!(peak.above(&bounds), Vec::<String>::new(), "{peak:?}");
        assert_eq!(peak.outbox_rows, bounds.outbox_rows);
        private.rabbitmqctl(&clear).await;
        place.rest().await;
        worker.ready().await;
    }
    assert_eq!(worker.id(), process, "it lived through both");
    place.settle_up(worker).await;
}

/// Thousands wait, and the worker takes of them what its settings allow, of its own memory and of everybody's connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_stays_in_the_queue() {
    const SETTINGS: [(&str, &str); 3] = [
        ("SETTLED_WORKER__PREFETCH", "10"),
        ("SETTLED_WORKER__BATCH_MAX", "8"),
        ("SETTLED_DATABASE__POOL_SIZE", "5"),
    ];
    let place = Place::new("backlog").await;
    let mix = Mix {
        valid: 3_000,
        ..Mix::VALID
    };
    let Traffic { mut messages, .. } = prepare(&place, 10, &mix).await;
    // Some are as large as they may be: together more than the worker may hold.
    for message in messages.iter_mut().step_by(10) {
        let size = message.body.len();
        assert_eq!(message.body.pop(), Some(b'}'));
        message.body.extend(b",\"padding\":\"");
        message.body.resize(BODY_MAX - 2, b'x');
        message.body.extend(b"\"}");
        assert!(size < BODY_MAX && message.body.len() == BODY_MAX);
    }
    for lot in messages.chunks(250) {
        place.publish(lot).await;
    }
    let worker = place.worker(&SETTINGS);
    let gauge = Gauge::of(&place, &worker);
    let watch = Watch::over(gauge.clone());
    // The broker counts what is in hand every five seconds only, so its hands are kept full until it has.
    let locks = place.db().await;
    worker.ready().await;
    locks
        .batch_execute("BEGIN; LOCK TABLE settled.batches")
        .await
        .expect("locked");
    until("the broker counts what is in hand", PATIENCE, async || {
        (gauge.read().await.unacked > 0).then_some(())
    })
    .await;
    locks.batch_execute("ROLLBACK").await.expect("unlocked");
    place.rest().await;
    let peak = watch.peak();
    eprintln!("{peak:?} of {:?}", worker.bounds);
    assert_eq!(peak.above(&worker.bounds), Vec::<String>::new());
    assert!(peak.ahead > 0, "it was looked at while it worked: {peak:?}");
    place.settle_up(worker).await;
}

/// A number from the environment, for those who have less time.
fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is a whole number"))
    })
}

/// The batches' own count of what settled, once the database answers.
async fn settled(db: &tokio_postgres::Client) -> i64 {
    let sql = "SELECT coalesce(sum(settled), 0)::bigint FROM settled.batches";
    db.query_one(sql, &[]).await.expect("batches").get(0)
}

/// What the database takes on disk, in bytes.
async fn size(db: &tokio_postgres::Client) -> i64 {
    let sql = "SELECT pg_database_size(current_database())";
    db.query_one(sql, &[]).await.expect("a size").get(0)
}

/// Waits until so many are settled. The times of the first beyond `before` and of the last.
async fn drained(db: &tokio_postgres::Client, before: i64, all: i64) -> (Instant, Instant) {
    const LONG: Duration = Duration::from_secs(1_800);
    let first = until("the first settles", LONG, async || {
        (settled(db).await > before).then(Instant::now)
    })
    .await;
    let last = until("all settle", LONG, async || {
        (settled(db).await >= all).then(Instant::now)
    })
    .await;
    (first, last)
}

/// Ten minutes without the database while a hundred thousand messages wait: nothing is dead-lettered, no message was delivered
/// more than once in vain, and then all of it drains about as fast as ever. `make outage`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a quarter of an hour: run `make outage`"]
async fn away_while_a_hundred_thousand_wait() {
    let waiting = number("SETTLED_OUTAGE_MESSAGES", 100_000) as usize;
    let away = Duration::from_secs(number("SETTLED_OUTAGE_SECONDS", 600));
    let usual = (waiting / 5).max(1_000);
    let private = Private::start().await.unwrap_or_else(|why| panic!("{why}"));
    let place = Place::within(private.services.clone(), "long_away").await;
    place.story().only_valid = true;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100000000").await;
    let empty = size(&place.db().await).await;
    let mut messages = Vec::new();
    for _ in 0..(usual + waiting).div_ceil(5_000) {
        let reservations: Vec<Reservation> = (0..5_000).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        messages.extend(reservations.iter().map(|reservation| partner.cleared(reservation)));
    }
    messages.truncate(usual + waiting);
    let (before, during) = messages.split_at(usual);
    let publish = async |messages: &[Message]| {
        for lot in messages.chunks(250) {
            place.publish(lot).await;
        }
    };
    let rate =
        |messages: usize, (first, last): (Instant, Instant)| messages as f64 / last.duration_since(first).as_secs_f64();

    publish(before).await;
    let db = place.db().await;
    let worker = place.ready_worker(&[("SETTLED_LOG__LEVEL", "info")]).await;
    let usual_rate = rate(usual, drained(&db, 0, usual as i64).await);
    println!("{usual} messages that waited while nothing was away: {usual_rate:.0} a second");
    place.rest_within(Duration::from_secs(600)).await;

    // Some are in the worker's hands when it goes.
    let (in_hand, rest) = during.split_at(2_000.min(during.len()));
    db.batch_execute("BEGIN; LOCK TABLE settled.batches")
        .await
        .expect("a lock");
    publish(in_hand).await;
    private.kill("postgres").await;
    let gone = Instant::now();
    worker.not_ready().await;
    publish(rest).await;
    println!("{waiting} wait after {:.0?} without the database", gone.elapsed());
    tokio::time::sleep(away.saturating_sub(gone.elapsed())).await;
    all_back(&place, waiting).await;
    // Those that were in hand are the first in the queue again; to look at more would count against them.
    let counts = place.line().peek_some("settlement.updates", 5_000).await;
    let counts: Vec<i64> = counts.iter().map(delivery_count).collect();
    let mut table = std::collections::BTreeMap::<i64, usize>::new();
    for count in &counts {
        *table.entry(*count).or_default() += 1;
    }
    println!(
        "delivery counts of the first {} after {:.0?}: {table:?}",
        counts.len(),
        gone.elapsed()
    );
    assert!(
        counts.iter().all(|count| *count <= 1),
        "handed back more than once: {table:?}"
    );

    private.restart("postgres").await;
    let back = Instant::now();
    let db = place.db().await;
    let (first, last) = drained(&db, usual as i64, (usual + waiting) as i64).await;
    let after_rate = rate(waiting, (first, last));
    println!(
        "back: the first settled {:.0?} after the database answered, {waiting} at {after_rate:.0} a second, {:.2} of the usual rate",
        first.duration_since(back),
        after_rate / usual_rate
    );
    place.rest_within(Duration::from_secs(900)).await;
    place.settle_up(worker).await;
    assert!(place.dead.seen().is_empty());
    println!(
        "on disk: {} bytes for each reservation and its settlement",
        (size(&db).await - empty) / (usual + waiting) as i64
    );
    assert!(
        after_rate > 0.8 * usual_rate,
        "{after_rate:.0} a second, {usual_rate:.0} as usual"
    );
}
