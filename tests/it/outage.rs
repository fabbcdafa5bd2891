//! The database and the broker away: cut off, refusing, silent, restarted and killed, under load and before the start.

use std::time::Duration;

use lapin::types::AMQPValue;

use crate::{
    amqp::Message,
    auditor::Reservation,
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

/// However long the database is away, a message is handed back once: its delivery count must not grow with the outage.
async fn long_outage(test: &str, lanes: &str) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<Reservation> = (0..30).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let proxied = Proxied::to(&place).await;
    let release = Duration::from_millis(300);
    let worker = proxied.worker(
        &place,
        &[
            ("SETTLED_WORKER__PAUSE_RELEASE", "300ms"),
            ("SETTLED_WORKER__LANES", lanes),
        ],
    );
    worker.ready().await;

    proxied.database.refuse();
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    worker.not_ready().await;
    let back = async || (place.line().depth("settlement.updates").await == 30).then_some(());
    until("all are handed back", PATIENCE, back).await;
    // Many times as long as the worker has patience.
    tokio::time::sleep(release * 6).await;
    until("they are still there", PATIENCE, back).await;
    for _ in 0..messages.len() {
        let seen = place.line().get("settlement.updates").await;
        let count = match seen.header("x-delivery-count") {
            None => 0,
            Some(AMQPValue::LongLongInt(count)) => *count,
            Some(other) => panic!("{other:?}"),
        };
        assert!(count <= 1, "it was handed back {count} times");
    }
    // What was taken for looking at it goes out again.
    place.line().publish(&messages).await;
    proxied.database.open();
    worker.ready().await;
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
