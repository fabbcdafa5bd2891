//! Three nodes of the broker, and a standby of the database: whoever of them is lost, nothing of what was settled is.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use tokio_postgres::Client;

use crate::kit::{
    auditor::Reservation,
    cells::{APPLY, give_own_books, moves},
    command::Answer,
    partner::Partner,
    private::Private,
    proxy::Proxy,
    storm::{Act, Round, Shape, Step, Tally},
    support::{PATIENCE, Place, Worker, address, connect, count, each_host, skip, until, with_address},
    traffic::Dice,
};

/// A worker that could settle nothing for five seconds is not ready; and some more on a busy machine.
const UNREADY: Duration = Duration::from_secs(8);
/// The nodes miss each other after `net_ticktime`, four seconds and up to a quarter more, and the minority pauses.
const MAJORITY_LOST: Duration = Duration::from_secs(10);

/// A commit that waits for its standby is seen on the primary as soon as somebody ends its connection, and is nowhere else
/// yet; and if its wait is cancelled it is even answered with success. It must not be told or acknowledged before the standby
/// has it, or a failover would lose it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_was_cut_off_from_its_standby_waits_for_it() {
    let private = match Private::start_with(Private::STANDBY).await {
        Ok(private) => private,
        Err(why) => return skip("cluster::a_commit_that_was_cut_off_from_its_standby_waits_for_it", &why),
    };
    let place = Place::within(private.services.clone(), "standby").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservations: Vec<Reservation> = (0..3).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[("SETTLED_WORKER__LANES", "1")]).await;
    let db = place.db().await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    let all_told = async |count: usize| {
        until(&format!("{count} are told"), PATIENCE, async || {
            (place.events.seen().len() == count).then_some(())
        })
        .await;
    };
    all_told(1).await;

    for (before, how) in (1..).zip(["pg_terminate_backend", "pg_cancel_backend"]) {
        private.act("freeze", &["standby"]).await;
        place.publish(&[partner.cleared(&reservations[before])]).await;
        let waiting = async || -> Option<i32> {
            let sql = "SELECT pid FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event = 'SyncRep' AND query LIKE '%COMMIT' LIMIT 1";
            let row = db.query_opt(sql, &[]).await.expect("backends");
            row.map(|row| row.get(0))
        };
        // Somebody ends it: the settlement is there then, for all who look at this server.
        until(
            &format!("{how} ended the commit while it waited"),
            PATIENCE,
            async || {
                if let Some(pid) = waiting().await {
                    let ended = db.execute(&format!("SELECT {how}($1)"), &[&pid]).await;
                    ended.expect("ended");
                }
                (count(&db, "settlements").await == before as i64 + 1).then_some(())
            },
        )
        .await;
        // The worker finds that it was committed, and waits for the standby.
        until("the worker waits for the standby, or does not", PATIENCE, async || {
            (waiting().await.is_some() || place.events.seen().len() > before).then_some(())
        })
        .await;
        for _ in 0..200 {
            let told = place.events.seen().len();
            assert_eq!(told, before, "{how}: told before the standby had it: {}", worker.said());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        private.act("thaw", &["standby"]).await;
        all_told(before + 1).await;
    }

    // And the standby, promoted, has all of them.
    private.act("promote", &["standby"]).await;
    worker.ready().await;
    let db = place.db().await;
    assert_eq!(count(&db, "settlements").await, 3);
    place.settle_up(worker).await;
}

/// Who waits for the standby at COMMIT: the process, and in which database.
async fn who_waits(db: &Client) -> Option<(i32, String)> {
    let sql = "SELECT pid, datname::text FROM pg_stat_activity
               WHERE wait_event = 'SyncRep' AND query LIKE '%COMMIT' ORDER BY query_start LIMIT 1";
    let row = db.query_opt(sql, &[]).await.expect("backends");
    row.map(|row| (row.get(0), row.get(1)))
}

/// Cancels waits for the standby until what was committed is to be seen; then says in which database the next one waits.
async fn cut_until(db: &Client, seen: &str) -> String {
    until(
        &format!("{seen}: to be seen before the standby has it"),
        PATIENCE,
        async || {
            if let Some((pid, _)) = who_waits(db).await {
                db.execute("SELECT pg_cancel_backend($1)", &[&pid])
                    .await
                    .expect("cancelled");
            }
            (count(db, seen).await > 0).then_some(())
        },
    )
    .await;
    until(&format!("{seen}: it is waited for"), PATIENCE, async || {
        who_waits(db).await
    })
    .await
    .1
}

/// A step of a move goes on in the other cell once the standby has it, whoever cut its wait. And what is held is held once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_was_cut_off_from_its_standby_waits_for_it() {
    const NAME: &str = "cluster::a_move_that_was_cut_off_from_its_standby_waits_for_it";
    const LOCK: &str = "BEGIN; LOCK TABLE settled.audit IN EXCLUSIVE MODE";
    let private = match Private::start_with(Private::STANDBY).await {
        Ok(private) => private,
        Err(why) => return skip(NAME, &why),
    };
    let a = Place::within(private.services.clone(), "standby_a").await;
    let b = Place::within(private.services.clone(), "standby_b").await;
    give_own_books(&b).await;
    let acme = Partner::new("acme");
    a.register(&acme).await;
    a.deposit(&acme, "BTC", "10").await;
    let one = acme.allocation("BTC", "1");
    a.reserve(std::slice::from_ref(&one)).await;
    let (of_a, of_b) = ((a.db().await, a.db().await), (b.db().await, b.db().await));
    let blocked = async |db: &Client| {
        until("a step is about to commit", PATIENCE, async || {
            let sql = "SELECT FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%audit%' LIMIT 1";
            db.query_opt(sql, &[]).await.expect("backends").map(drop)
        })
        .await;
    };
    // What a step notes before its COMMIT waits for us, until the standby is frozen.
    of_a.1.batch_execute(LOCK).await.expect(LOCK);
    let arguments = [&["partner", "move", "--enterprise-id", "acme"][..], &APPLY].concat();
    let mut command = a.command(&arguments);
    command
        .env("SETTLED_TARGET_DATABASE_URL", &b.database_url)
        .env("SETTLED_DATABASE__LOCK_TIMEOUT", "40s")
        .env("SETTLED_DATABASE__STATEMENT_TIMEOUT", "40s")
        .env("SETTLED_DATABASE__CLIENT_DEADLINE", "50s");
    let moving = tokio::spawn(async move { command.output().await.expect("settled runs") });
    let steps = [
        (&a, &of_a, &of_b, "moves WHERE phase = 'paused'"),
        (&b, &of_b, &of_a, "moves WHERE phase = 'arrived'"),
        (&a, &of_a, &of_b, "moves WHERE phase = 'left'"),
        (&b, &of_b, &of_a, "moves WHERE phase = 'done'"),
    ];
    for (place, (db, holder), (_, next), seen) in steps {
        blocked(db).await;
        // Nor may the next step commit unseen.
        next.batch_execute(LOCK).await.expect(LOCK);
        private.act("freeze", &["standby"]).await;
        holder.batch_execute("ROLLBACK").await.expect("it goes on");
        assert_eq!(cut_until(db, seen).await, place.name, "{seen}: it is waited for first");
        private.act("thaw", &["standby"]).await;
    }
    of_a.1.batch_execute("ROLLBACK").await.expect("it goes on");
    let ended = tokio::time::timeout(PATIENCE, moving)
        .await
        .expect("it ends")
        .expect("it runs");
    assert!(ended.status.success(), "{}", Answer::of(&ended).all());

    let worker = a.ready_worker(&[("SETTLED_WORKER__LANES", "1")]).await;
    private.act("freeze", &["standby"]).await;
    a.publish(&[acme.cleared(&one)]).await;
    assert_eq!(cut_until(&of_a.0, "held").await, a.name);
    private.act("thaw", &["standby"]).await;
    until("nobody waits for the standby", PATIENCE, async || {
        who_waits(&of_a.0).await.is_none().then_some(())
    })
    .await;
    assert_eq!(count(&of_a.0, "held").await, 1, "once");
    let again = moves(&a, &b, &APPLY).await.document(0);
    assert_eq!(again["handedOver"], 1, "{again}");
    worker.terminate().await;
}

/// A commit that waits for a standby which is frozen is no error to the server: that nothing is settled is told by `/readyz` all
/// the same. So it is while somebody holds a lock that nothing gets past.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_settles_nothing_is_not_ready() {
    let private = match Private::start_with(Private::STANDBY).await {
        Ok(private) => private,
        Err(why) => return skip("cluster::a_worker_that_settles_nothing_is_not_ready", &why),
    };
    let place = Place::within(private.services.clone(), "stuck").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservations: Vec<Reservation> = (0..2).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let told = async || {
        let began = Instant::now();
        let why = worker.not_ready().await;
        assert!(why.contains("a batch waits for the database"), "{why}");
        assert!(began.elapsed() < UNREADY, "{:?}: {}", began.elapsed(), worker.said());
    };
    private.act("freeze", &["standby"]).await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    told().await;
    private.act("thaw", &["standby"]).await;
    worker.ready().await;
    place.rest().await;
    db.batch_execute("BEGIN; LOCK TABLE settled.batches")
        .await
        .expect("locked");
    place.publish(&[partner.cleared(&reservations[1])]).await;
    told().await;
    db.batch_execute("ROLLBACK").await.expect("let go");
    worker.ready().await;
    place.settle_up(worker).await;
}

/// An address that moves to a standby which has not heard everything yet leads to no books that lost something: the worker waits,
/// whether it runs already or begins there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_lags_has_lost_nothing() {
    let private = match Private::start_with(Private::STANDBY).await {
        Ok(private) => private,
        Err(why) => return skip("cluster::a_standby_that_lags_has_lost_nothing", &why),
    };
    let place = Place::within(private.services.clone(), "lags").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservations: Vec<Reservation> = (0..3).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    // One address, which moves: such a URL does not ask for a server that writes.
    let (plain, _) = place.database_url.split_once('?').unwrap_or((&place.database_url, ""));
    let hosts = each_host(plain);
    let [primary, standby] = &hosts[..] else {
        panic!("two hosts: {hosts:?}");
    };
    let moves = Proxy::to(&address(primary)).await;
    let url = with_address(plain, moves.address);
    let settings = [("SETTLED_DATABASE_URL", url.as_str()), ("SETTLED_RETRY__MAX", "200ms")];
    let worker = place.ready_worker(&settings).await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    place.rest().await;
    // From now on no commit waits for it, and it hears nothing.
    let (of_primary, of_standby) = (connect(primary).await, connect(standby).await);
    for statement in [
        "ALTER SYSTEM SET synchronous_standby_names = ''",
        "SELECT pg_reload_conf()",
    ] {
        of_primary.batch_execute(statement).await.expect(statement);
    }
    let paused = "SELECT pg_wal_replay_pause()";
    of_standby.batch_execute(paused).await.expect(paused);
    until("it hears nothing", PATIENCE, async || {
        let state = of_standby
            .query_one("SELECT pg_get_wal_replay_pause_state()", &[])
            .await;
        (state.expect("a state").get::<_, &str>(0) == "paused").then_some(())
    })
    .await;
    place.publish(&[partner.cleared(&reservations[1])]).await;
    place.rest().await;
    let waits = async |worker: &Worker| {
        until("it says that nothing can be written there", PATIENCE, async || {
            assert_eq!(worker.ended(), None, "{}", worker.said());
            let (_, body) = worker.get("/readyz").await?;
            body.contains("the database is read-only").then_some(())
        })
        .await;
    };
    let sees = "SELECT count(*) FROM settled.settlements";
    let count = of_standby
        .query_one(sees, &[])
        .await
        .expect("a standby that may be read");
    assert_eq!(count.get::<_, i64>(0), 1, "it lags");
    moves.lead_to(&address(standby));
    waits(&worker).await;
    // Its last word to the broker is what a new worker believes.
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
    let other = place.worker(&settings);
    waits(&other).await;
    moves.lead_to(&address(primary));
    other.ready().await;
    place.publish(&[partner.cleared(&reservations[2])]).await;
    place.settle_up(other).await;
}

/// The node that leads the queue, and whether all are members of it: what the management says.
async fn members(place: &Place) -> Option<(usize, usize)> {
    let path = format!("/api/queues/{}/settlement.updates", place.name);
    let asked = place.services.try_manage("GET", &path, None, PATIENCE).await;
    let (_, queue) = asked.ok()?;
    let leader = queue["leader"].as_str()?.split('@').next()?;
    let number = match leader.rsplit('-').next()? {
        "2" => 1,
        "3" => 2,
        _ => 0,
    };
    Some((number, queue["online"].as_array()?.len()))
}

const NODES: [&str; 3] = ["rabbitmq", "rabbitmq2", "rabbitmq3"];

/// Three nodes, a partner with so much to settle, and where each node is.
struct Frozen {
    private: Private,
    place: Place,
    partner: Partner,
    reservations: Vec<Reservation>,
    hosts: Vec<String>,
}

impl Frozen {
    async fn begin(name: &str, reservations: usize) -> Result<Self, String> {
        let private = Private::start_with(Private::CLUSTER).await?;
        let place = Place::within(private.services.clone(), name).await;
        let partner = Partner::new("acme");
        place.register(&partner).await;
        place.deposit(&partner, "BTC", "100").await;
        let reservations: Vec<Reservation> = (0..reservations).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        let hosts = each_host(&place.broker_url);
        Ok(Self {
            private,
            place,
            partner,
            reservations,
            hosts,
        })
    }

    async fn leader(&self) -> usize {
        until("every node is a member of the queue", PATIENCE, async || {
            let (leader, members) = members(&self.place).await?;
            (members == NODES.len()).then_some(leader)
        })
        .await
    }

    async fn worker_on(&self, node: usize) -> Worker {
        let url = [("SETTLED_BROKER_URL", self.hosts[node].as_str())];
        self.place.ready_worker(&url).await
    }

    async fn settles(&mut self, worker: &Worker) {
        let before = self.place.events.seen().len();
        let reservation = self.reservations.pop().expect("one is left");
        self.place.publish(&[self.partner.cleared(&reservation)]).await;
        until("it is settled and told", PATIENCE, async || {
            assert_eq!(worker.ended(), None, "{}", worker.said());
            (self.place.events.seen().len() > before).then_some(())
        })
        .await;
    }
}

/// A worker on a node that lives, while the leader of its queue is frozen: until another one leads, the queue answers nothing, and that
/// is all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_leader_costs_no_delivery() {
    let mut cluster = match Frozen::begin("frozen_leader", 2).await {
        Ok(cluster) => cluster,
        Err(why) => return skip("cluster::a_frozen_leader_costs_no_delivery", &why),
    };
    let frozen = cluster.leader().await;
    let worker = cluster.worker_on((frozen + 1) % NODES.len()).await;
    cluster.settles(&worker).await;
    cluster.private.act("freeze", &[NODES[frozen]]).await;
    let why = worker.not_ready().await;
    assert!(
        why.contains("the broker does not answer for queue settlement."),
        "{why}"
    );
    worker.ready().await;
    cluster.settles(&worker).await;
    let lost = worker
        .said()
        .lines()
        .filter(|line| line.contains("consumer lost"))
        .count();
    assert_eq!(lost, 0, "what it held counts one delivery more: {}", worker.said());
    cluster.private.act("thaw", &[NODES[frozen]]).await;
    cluster.place.settle_up(worker).await;
}

/// Two nodes are frozen: the one that is left leads the queue, or does not. How long the broker takes to find itself again once they
/// are thawed is its own, and at times longer than a test may wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the broker may take minutes to come back: run `make cluster`"]
async fn a_lost_majority_is_told() {
    let mut cluster = Frozen::begin("lost_majority", 4).await.expect("three nodes");
    for leads in [true, false] {
        let leader = cluster.leader().await;
        let left = if leads { leader } else { (leader + 1) % NODES.len() };
        let frozen: Vec<&str> = (0..NODES.len())
            .filter(|node| *node != left)
            .map(|node| NODES[node])
            .collect();
        let worker = cluster.worker_on(left).await;
        cluster.settles(&worker).await;
        let began = Instant::now();
        cluster.private.act("freeze", &frozen).await;
        worker.not_ready().await;
        assert!(
            began.elapsed() < MAJORITY_LOST,
            "{leads}: {:?}: {}",
            began.elapsed(),
            worker.said()
        );
        cluster.private.act("thaw", &frozen).await;
        worker.ready().await;
        cluster.settles(&worker).await;
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
    let last = cluster.place.ready_worker(&[]).await;
    cluster.place.settle_up(last).await;
}

/// What becomes of a cluster, one scenario after the other on the same servers: `make cluster`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half an hour: run `make cluster`"]
async fn whoever_is_lost() {
    let kills = std::env::var("SETTLED_CLUSTER_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok());
    let kills = kills.unwrap_or(20);
    let nodes = [
        Act::RollingRestart,
        Act::NodeFrozen,
        Act::NodeFrozen,
        Act::TwoOfThreeGone,
        Act::NodePartitioned,
        Act::MemoryAlarm,
    ];
    let databases = [
        Act::PrimaryKilledStandbyPromoted,
        Act::StandbyKilled,
        Act::PrimaryFrozenStandbyPromoted,
        Act::PostgresFrozen,
        Act::StandbyFrozen,
        Act::PrimaryKilledStandbyPromoted,
        Act::PostgresKilled,
        Act::BackendKilled,
    ];
    let scenarios: [(&str, usize, Vec<Act>); 4] = [
        ("the leader killed again and again", 2, vec![Act::LeaderKilled; kills]),
        ("nodes come and go", 2, nodes.to_vec()),
        ("primary and standby come and go", 2, databases.to_vec()),
        ("three workers", 3, [&nodes[..4], &databases[..4]].concat()),
    ];
    let private = Private::start_with(Private::CLUSTER).await;
    let private = private.unwrap_or_else(|why| panic!("{why}"));
    let primary = Cell::new("postgres");
    for (seed, (name, workers, acts)) in (1..).zip(scenarios) {
        let mut tally = Tally::new();
        tally.again = "make cluster".to_owned();
        let shape = Shape {
            workers,
            ..Shape::CLUSTER
        };
        let mut dice = Dice::new(seed);
        let steps: Vec<Step> = acts.iter().map(|act| Step::draw(*act, &mut dice)).collect();
        let round = Round::prepare(&private, &primary, shape, seed, 4_000).await;
        round.run(steps.into_iter(), None, &mut tally).await;
        println!("\n{name}, {workers} workers: all is accounted for\n{}", tally.table());
        assert_eq!(tally.acts(), acts.len());
        for act in acts {
            assert!(tally.met(act) > 0, "{act:?} met nothing");
        }
    }
}
