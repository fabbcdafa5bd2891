//! Facts about what we stand on that touch us and have no other test; `docs/traps.md` has them all.

use std::collections::BTreeSet;

use serde_json::json;

use crate::kit::{
    amqp::Message,
    support::{PATIENCE, Place, until, with_reservations},
};

/// A partner that clears so many reservations, which is all that is said.
async fn place_with(test: &str, count: usize) -> (Place, Vec<Message>) {
    let (place, partner, reservations) = with_reservations(test, count).await;
    place.story().only_valid = true;
    let cleared = reservations.iter().map(|reservation| partner.cleared(reservation));
    let cleared = cleared.collect();
    (place, cleared)
}

/// lapin recovered connections with stale acknowledgements before 4.12.3, tokio-postgres and postgres-protocol have had
/// holes, and tracing-subscriber let text steer terminals. What would bring another libsecp256k1 or TLS library is not here.
#[test]
fn dependencies_are_above_their_floors() {
    const FLOORS: [(&str, [u64; 3]); 4] = [
        ("lapin", [4, 12, 3]),
        ("tokio-postgres", [0, 7, 18]),
        ("postgres-protocol", [0, 6, 12]),
        ("tracing-subscriber", [0, 3, 20]),
    ];
    let lock: toml::Table = include_str!("../../../Cargo.lock").parse().expect("TOML");
    let packages = lock["package"].as_array().expect("packages");
    let text = |package: &toml::Value, name: &str| package[name].as_str().expect(name).to_owned();
    for (name, floor) in FLOORS {
        let mut versions = packages
            .iter()
            .filter(|package| text(package, "name") == name)
            .peekable();
        assert!(versions.peek().is_some(), "{name} is locked");
        for package in versions {
            let version = text(package, "version");
            let numbers: Vec<u64> = version.split('.').map(|part| part.parse().expect("a number")).collect();
            assert!(
                numbers.as_slice() >= floor.as_slice(),
                "{name} {version} is below {floor:?}"
            );
        }
    }
    let names: BTreeSet<String> = packages.iter().map(|package| text(package, "name")).collect();
    for name in ["bitcoin", "aws-lc-rs", "aws-lc-sys", "openssl-sys"] {
        assert!(!names.contains(name), "{name} is locked");
    }
}

/// PostgreSQL compresses large values with pglz by default, which costs more than it saves. Bodies are stored as they are, and
/// a batch's publications, which are much alike, with lz4, which saves more than it costs.
#[tokio::test]
async fn nothing_is_compressed_with_pglz() {
    let (place, _) = place_with("traps_toast", 1).await;
    let db = place.db().await;
    let sql = "SELECT c.relname || '.' || a.attname, a.attstorage = 'e', a.attcompression = 'l'
               FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
               WHERE c.relnamespace = 'settled'::regnamespace
                 AND c.relname || '.' || a.attname = ANY ($1)
               ORDER BY 1";
    let columns = ["dead_letters.body", "outbox.publications", "parked.body"];
    let rows = db.query(sql, &[&columns.as_slice()]).await.expect("columns");
    let kept: Vec<(String, bool, bool)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let expected = [
        (columns[0], true, false),
        (columns[1], false, true),
        (columns[2], true, false),
    ];
    assert_eq!(
        kept,
        expected.map(|(column, plain, lz4)| (column.to_owned(), plain, lz4))
    );

    let write = "INSERT INTO settled.outbox
                 SELECT gen_random_uuid(), 1, convert_to(string_agg(gen_random_uuid() || $1, ''), 'UTF8'), 1, now(), now()
                 FROM generate_series(1, 250)";
    let alike = r#"","source":"/settled","type":"allocation.cleared","datacontenttype":"application/json"}"#;
    db.execute(write, &[&alike]).await.expect("written");
    let sql = "SELECT octet_length(publications), pg_column_size(publications) FROM settled.outbox";
    let row = db.query_one(sql, &[]).await.expect("the row");
    let (bytes, kept): (i32, i32) = (row.get(0), row.get(1));
    assert!(kept < bytes / 2, "{kept} of {bytes} bytes");
}

/// A statement prepared before a column changed is refused (0A000): it is prepared again, and nobody pauses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_plan_costs_a_retry() {
    let (place, messages) = place_with("traps_plan", 20).await;
    // Batches of one go round the few connections there are: each of these has the old statement before it changes.
    let settings = [("SETTLED_WORKER__LANES", "1"), ("SETTLED_WORKER__BATCH_MAX", "1")];
    let worker = place.ready_worker(&settings).await;
    let (before, after) = messages.split_at(10);
    place.publish(before).await;
    place.rest().await;
    let alter = "ALTER TABLE settled.allocations ALTER COLUMN evaluation_id TYPE varchar(5000)";
    place.db().await.batch_execute(alter).await.expect("another type");
    place.publish(after).await;
    place.rest().await;
    let lines = worker.lines();
    let met = lines.iter().any(|line| line["sqlstate"] == "0A000");
    assert!(met, "no statement was stale: {}", worker.said());
    let paused = lines.iter().any(|line| line["message"] == "intake paused");
    assert!(!paused, "{}", worker.said());
    place.settle_up(worker).await;
}

/// Sessions that answer every write with 25006 belong to a server that was demoted: they are left for new ones, and what
/// came meanwhile settles when one of these can write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_turned_read_only_is_left_and_found_again() {
    let (place, messages) = place_with("traps_read_only", 20).await;
    let db = place.db().await;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    let name = &place.name;
    let demote = format!(
        "ALTER DATABASE {name} SET default_transaction_read_only = on;
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'settled'"
    );
    db.batch_execute(&demote).await.expect("a standby");
    place.publish(&messages).await;
    let told = worker.not_ready().await;
    assert!(told.contains("database"), "{told}");
    until("it met a write that is refused", PATIENCE, async || {
        worker.said().contains("25006").then_some(())
    })
    .await;
    // The worker's sessions stay read-only for as long as they live.
    db.batch_execute(&format!("ALTER DATABASE {name} RESET default_transaction_read_only"))
        .await
        .expect("a primary");
    worker.ready().await;
    place.settle_up(worker).await;
}

/// An idle worker knows as well that it could settle nothing, before a message shows it: servers are switched to this when
/// their disk is nearly full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_is_not_ready_on_a_database_that_turned_read_only() {
    let (place, messages) = place_with("traps_read_only_idle", 4).await;
    let db = place.db().await;
    let name = &place.name;
    let worker = place.ready_worker(&[("SETTLED_RETRY__MAX", "200ms")]).await;
    // Before its first batch, and after one.
    for messages in messages.chunks(2) {
        db.batch_execute(&format!(
            "ALTER DATABASE {name} SET default_transaction_read_only = on;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'settled'"
        ))
        .await
        .expect("a standby");
        until("it says so", PATIENCE, async || {
            let said = worker.not_ready().await;
            said.contains("the database is read-only").then_some(())
        })
        .await;
        db.batch_execute(&format!("ALTER DATABASE {name} RESET default_transaction_read_only"))
            .await
            .expect("a primary");
        worker.ready().await;
        place.publish(messages).await;
        place.rest().await;
    }
    place.settle_up(worker).await;
}

/// A policy can take messages away before anybody judges them. They are not lost: the broker's dead letter says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_gives_up_is_a_dead_letter() {
    let (place, messages) = place_with("traps_given_up", 3).await;
    let policy = json!({
        "pattern": "^settlement\\.updates$",
        "definition": {"message-ttl": 1},
        "apply-to": "queues",
    });
    let path = format!("/api/policies/{}/short", place.name);
    let (status, answer) = place.services.manage("PUT", &path, Some(policy)).await;
    assert_eq!(status, 201, "{answer}");
    until("the policy is in force", PATIENCE, async || {
        let (_, queue) = place
            .services
            .manage("GET", &format!("/api/queues/{}/settlement.updates", place.name), None)
            .await;
        (queue["policy"] == "short").then_some(())
    })
    .await;
    place.line().publish(&messages).await;
    for message in &messages {
        let seen = place
            .dead
            .wait("the broker's dead letter", |seen| seen.body == message.body)
            .await;
        let death = ("settlement.updates".to_owned(), "expired".to_owned());
        assert_eq!(
            (seen.death(), seen.routing_key),
            (Some(death), message.routing_key.clone())
        );
    }
}
