//! Several hosts behind one URL, and one of them frozen: it is there, takes connections, and says nothing.

use std::time::{Duration, Instant};

use crate::kit::{
    auditor::Reservation,
    partner::Partner,
    postgres::Server,
    proxy::Proxy,
    support::{PATIENCE, Place, Worker, address, skip, until},
};

/// What a frozen peer may cost: five seconds, and some for a machine that is busy with other tests.
const FROZEN: Duration = Duration::from_secs(7);

/// The URL with these hosts in place of its own.
fn among(url: &str, hosts: &[&Proxy]) -> String {
    let hosts: Vec<String> = hosts.iter().map(|host| host.address.to_string()).collect();
    url.replacen(&address(url), &hosts.join(","), 1)
}

/// A partner with funds for some allocations, which settle one at a time.
struct Stream<'a> {
    place: &'a Place,
    partner: Partner,
    reservations: Vec<Reservation>,
}

impl<'a> Stream<'a> {
    async fn new(place: &'a Place, messages: usize) -> Self {
        let partner = Partner::new("acme");
        place.register(&partner).await;
        place.deposit(&partner, "BTC", "1000").await;
        let reservations: Vec<_> = (0..messages).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        Self {
            place,
            partner,
            reservations,
        }
    }

    /// Publishes one, and waits until it is settled and told.
    async fn settles(&mut self) -> Duration {
        let reservation = self.reservations.pop().expect("one is left");
        let began = Instant::now();
        let settled = self.place.events.seen().len();
        self.place.publish(&[self.partner.cleared(&reservation)]).await;
        until("it is settled and told", PATIENCE, async || {
            (self.place.events.seen().len() > settled).then_some(())
        })
        .await;
        began.elapsed()
    }
}

/// Freezes one host after the other: whoever the worker stands on, it goes on with the other.
async fn freeze_in_turn(stream: &mut Stream<'_>, hosts: &[&Proxy], worker: &Worker) {
    stream.settles().await;
    for frozen in hosts {
        frozen.stall();
        for _ in 0..3 {
            let took = stream.settles().await;
            assert!(took < FROZEN, "{took:?}: {}", worker.said());
        }
        frozen.open();
        stream.settles().await;
    }
    worker.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_of_the_broker_stops_nobody() {
    let place = Place::new("hosts_broker").await;
    let mut stream = Stream::new(&place, 30).await;
    let upstream = address(&place.broker_url);
    let (one, other) = (Proxy::to(&upstream).await, Proxy::to(&upstream).await);
    let hosts = among(&place.broker_url, &[&one, &other]);
    let urls = format!(
        "{}, {}",
        among(&place.broker_url, &[&one]),
        among(&place.broker_url, &[&other])
    );
    for url in [hosts, urls] {
        let worker = place.ready_worker(&[("SETTLED_BROKER_URL", &url)]).await;
        freeze_in_turn(&mut stream, &[&one, &other], &worker).await;
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
    place.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_host_of_the_database_stops_nobody() {
    let place = Place::new("hosts_database").await;
    let mut stream = Stream::new(&place, 15).await;
    let upstream = address(&place.database_url);
    let (one, other) = (Proxy::to(&upstream).await, Proxy::to(&upstream).await);
    let url = among(&place.database_url, &[&one, &other]);
    let worker = place.ready_worker(&[("SETTLED_DATABASE_URL", &url)]).await;
    freeze_in_turn(&mut stream, &[&one, &other], &worker).await;
    place.settle_up(worker).await;
}

/// Both frozen, or the only one: that is told within seconds, by an idle worker too, and it goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_on_a_frozen_peer_is_not_ready() {
    let place = Place::new("hosts_frozen").await;
    let mut stream = Stream::new(&place, 4).await;
    let database = Proxy::to(&address(&place.database_url)).await;
    let broker = Proxy::to(&address(&place.broker_url)).await;
    let urls = [
        ("SETTLED_DATABASE_URL", among(&place.database_url, &[&database])),
        ("SETTLED_BROKER_URL", among(&place.broker_url, &[&broker])),
    ];
    let urls = urls.each_ref().map(|(name, url)| (*name, url.as_str()));
    let worker = place.ready_worker(&urls).await;
    for frozen in [&database, &broker] {
        stream.settles().await;
        frozen.stall();
        let began = Instant::now();
        worker.not_ready().await;
        assert!(began.elapsed() < FROZEN, "{:?}: {}", began.elapsed(), worker.said());
        frozen.open();
        worker.ready().await;
    }
    stream.settles().await;
    place.settle_up(worker).await;
}

/// Of several servers the one that writes is taken, wherever it stands, although the URL does not ask for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_is_found_among_standbys() {
    let place = Place::new("hosts_primary").await;
    let access = "host all all 127.0.0.1/32 trust\n";
    let standby = match Server::start("default_transaction_read_only = on", access, &[]).await {
        Ok(standby) => standby,
        Err(why) => return skip("hosts::the_primary_is_found_among_standbys", &why),
    };
    let read_only = address(&standby.url("127.0.0.1", "postgres"));
    let made = crate::kit::support::connect(&standby.url("127.0.0.1", "postgres")).await;
    let sql = format!(
        "SET default_transaction_read_only = off; CREATE DATABASE {}",
        place.name
    );
    for statement in sql.split(';') {
        made.batch_execute(statement).await.expect("made");
    }
    let mut stream = Stream::new(&place, 4).await;
    let primary = address(&place.database_url);
    for hosts in [format!("{read_only},{primary}"), format!("{primary},{read_only}")] {
        let url = place.database_url.replacen(&primary, &hosts, 1);
        let worker = place.ready_worker(&[("SETTLED_DATABASE_URL", &url)]).await;
        stream.settles().await;
        stream.settles().await;
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
    // Only standbys: that is said.
    let url = place
        .database_url
        .replacen(&primary, &format!("{read_only},{read_only}"), 1);
    let worker = place.worker(&[("SETTLED_DATABASE_URL", &url), ("SETTLED_RETRY__MAX", "200ms")]);
    until("it says that nobody writes", PATIENCE, async || {
        let (_, body) = worker.get("/readyz").await?;
        body.contains("the database is read-only").then_some(())
    })
    .await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    place.audit().await;
}
