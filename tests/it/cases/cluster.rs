//! Three nodes of the broker, and a standby of the database: whoever of them is lost, nothing of what was settled is.

use std::cell::Cell;

use tokio_postgres::Client;

use crate::kit::{
    auditor::Reservation,
    cells::{APPLY, give_own_books, moves},
    command::Answer,
    partner::Partner,
    private::Private,
    storm::{Act, Round, Shape, Step, Tally},
    support::{PATIENCE, Place, count, skip, until},
    traffic::Dice,
};

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
