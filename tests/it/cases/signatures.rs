//! `settled ledger check --signatures`: rows that agree with each other and are nobody's word are found by what can not be
//! written, a signature.

use std::cell::Cell;

use secp256k1::SecretKey;
use serde_json::{Value, json};
use settled::{
    config::{Settings, Sources},
    desk::{Desk, SignaturePlace},
};
use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    auditor::Reservation,
    command::ask,
    partner::{Partner, new_key, sign},
    support::Place,
};

/// So many settlements that they take more than one piece.
const MANY: usize = 1_200;

async fn settled_place(test: &str, many: usize) -> (Place, Partner, Vec<Reservation>) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100000").await;
    let reservations: Vec<_> = (0..many).map(|_| partner.allocation("BTC", "7")).collect();
    place.reserve(&reservations).await;
    let messages: Vec<_> = reservations
        .iter()
        .enumerate()
        .map(|(index, one)| {
            if index % 5 == 4 {
                partner.released(one)
            } else {
                partner.cleared(one)
            }
        })
        .collect();
    let worker = place.ready_worker(&[]).await;
    place.publish(&messages).await;
    place.settle_up(worker).await;
    (place, partner, reservations)
}

/// As the owner may: no trigger stands in the way.
async fn spoil(db: &Client, sql: &str) {
    db.batch_execute(&format!(
        "BEGIN; SET LOCAL session_replication_role = replica; {sql}; COMMIT"
    ))
    .await
    .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The settlement of an allocation anew: text, signature, and the receipt as it would be.
async fn signed_anew(db: &Client, id: Uuid, payload: &str, signature: &str, public_key: &str) {
    let digest = hex::encode(Sha256::digest(payload));
    let quoted = payload.replace('\'', "''");
    spoil(
        db,
        &format!(
            "UPDATE settled.receipts AS r
             SET payload_digest = '\\x{digest}', public_key = '\\x{public_key}'
             FROM settled.transfers AS t
             WHERE t.subject_id = '{id}' AND t.step = 1 AND r.key = t.receipt_key;
             UPDATE settled.transfers
             SET payload = '{quoted}', signature = '\\x{signature}'
             WHERE subject_id = '{id}' AND step = 1"
        ),
    )
    .await;
}

async fn payload(db: &Client, id: Uuid) -> String {
    let sql = "SELECT payload FROM settled.settlements WHERE allocation_id = $1";
    db.query_one(sql, &[&id]).await.expect("a settlement").get(0)
}

fn public(key: &SecretKey) -> String {
    hex::encode(key.public_key().serialize())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settlement_that_nobody_signed_is_named() {
    let (place, partner, reservations) = settled_place("forged", 12).await;
    let good = ask(&place, &["ledger", "check", "--signatures"]).await.document(0);
    assert_eq!(
        good["signatures"],
        json!({"verified": 12, "forged": 0, "next": null}),
        "{good}"
    );

    let db = place.db().await;
    let ids: Vec<Uuid> = reservations.iter().map(|one| one.id).collect();
    let zeros = "00".repeat(65);
    let own = partner.public_key();
    let text = payload(&db, ids[0]).await;
    signed_anew(&db, ids[0], &text, &zeros, &own).await;
    // By a stranger's key, that its receipt names.
    let stranger = new_key();
    let text = payload(&db, ids[1]).await;
    signed_anew(&db, ids[1], &text, &sign(&stranger, &text), &public(&stranger)).await;
    // By another partner's.
    let other = Partner::new("other");
    place.register(&other).await;
    let text = payload(&db, ids[2]).await;
    signed_anew(&db, ids[2], &text, &sign(&other.key, &text), &other.public_key()).await;
    // By a key that was registered once it was settled, and by one that had been revoked.
    let late = new_key();
    add_key(&place, "acme", &public(&late)).await;
    let text = payload(&db, ids[3]).await;
    signed_anew(&db, ids[3], &text, &sign(&late, &text), &public(&late)).await;
    // The partner's own signature, under what it did not say.
    let text = payload(&db, ids[5]).await;
    let said = text.replace("\"7\"", "\"70\"");
    assert_ne!(text, said);
    signed_anew(&db, ids[5], &said, &sign(&partner.key, &said), &own).await;
    // One signature under another settlement.
    let text = payload(&db, ids[6]).await;
    signed_anew(&db, ids[7], &text, &sign(&partner.key, &text), &own).await;

    let books = ask(&place, &["ledger", "check"]).await.document(0);
    assert_eq!(books["ok"], true, "the rows agree with each other: {books}");
    let bad = ask(&place, &["ledger", "check", "--signatures"]).await.document(1);
    assert_eq!(
        (&bad["ok"], &bad["signatures"]),
        (&json!(false), &json!({"verified": 12, "forged": 6, "next": null})),
        "{bad}"
    );
    let problems: Vec<&str> = bad["problems"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (id, words) in [
        (ids[0], "its signature is none".to_owned()),
        (
            ids[1],
            format!("by the key {}, which is registered for nobody", public(&stranger)),
        ),
        (ids[2], "which is registered for other, and not for acme".to_owned()),
        (
            ids[3],
            format!("by the key {}, which was registered after it", public(&late)),
        ),
        (
            ids[5],
            "amount.quantity: what was signed is not what stands in the books".to_owned(),
        ),
        (
            ids[7],
            "allocationId: what was signed is not what stands in the books".to_owned(),
        ),
    ] {
        let about = format!("settlement of {id}: ");
        let named: Vec<&&str> = problems.iter().filter(|problem| problem.starts_with(&about)).collect();
        assert!(
            named.len() == 1 && named[0].contains(&words),
            "{id}: {words}: {problems:?}"
        );
    }
    assert_eq!(problems.len(), 6, "{problems:?}");
}

async fn add_key(place: &Place, enterprise: &str, key: &str) {
    let arguments = ["key", "add", "--enterprise-id", enterprise, "--public-key", key];
    ask(place, &arguments).await.document(0);
}

/// A key that is revoked, cut short or put back after what it settled: that stays right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_of_a_key_does_not_change_what_it_settled() {
    let (place, partner, _) = settled_place("key_then", 3).await;
    let key = partner.public_key();
    let whose = ["--enterprise-id", "acme", "--public-key", &key];
    let right = async || {
        let checked = ask(&place, &["ledger", "check", "--signatures"]).await.document(0);
        assert_eq!(checked["signatures"]["verified"], 3, "{checked}");
    };
    let cut = [
        "--valid-from",
        "2020-01-01T00:00:00Z",
        "--valid-until",
        "2020-02-01T00:00:00Z",
    ];
    ask(&place, &[&["key", "add"], &whose[..], &cut[..]].concat())
        .await
        .document(0);
    right().await;
    ask(&place, &[&["key", "revoke"], &whose[..]].concat())
        .await
        .document(0);
    right().await;
    ask(
        &place,
        &[&["key", "reinstate"], &whose[..], &["--reason", "found"]].concat(),
    )
    .await
    .document(0);
    right().await;
    // Had it been so a year before, nobody could have settled with it.
    let db = place.db().await;
    spoil(
        &db,
        "UPDATE settled.audit SET at = at - interval '1 year';
         UPDATE settled.partner_keys SET created_at = created_at - interval '1 year'",
    )
    .await;
    let bad = ask(&place, &["ledger", "check", "--signatures"]).await.document(1);
    assert_eq!(bad["signatures"]["forged"], 3, "{bad}");
    assert!(
        bad["problems"][0]
            .as_str()
            .expect("text")
            .contains("was not valid then"),
        "{bad}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_that_was_ended_goes_on_where_it_was() {
    let (place, _, _) = settled_place("goes_on", MANY).await;
    let settings = Settings::load(Sources {
        file: None,
        environment: std::iter::once(("SETTLED_DATABASE_URL".to_owned(), place.database_url.clone())),
        flags: Vec::new(),
    });
    let desk = Desk::open(&settings.expect("settings")).expect("a desk");
    // Each time as far as one piece, from there on.
    let (mut after, mut verified, mut times) = (None, 0, 0);
    loop {
        let seen = Cell::new(false);
        let stop = std::future::poll_fn(|_| {
            if seen.get() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        });
        let found = desk
            .check_signatures(after, stop, |_| seen.set(true))
            .await
            .expect("it is read");
        assert_eq!(found.forged, 0);
        verified += found.verified;
        times += 1;
        after = found.next;
        if after.is_none() {
            break;
        }
        assert!(times < 100, "it comes to an end");
    }
    assert!(times > 1, "there was more than one piece");
    assert_eq!(verified, MANY as u64, "each is looked at once");

    // A place of another table, and the end.
    let db = place.db().await;
    let file: i64 = db
        .query_one("SELECT pg_relation_filenode('settled.transfers')::bigint", &[])
        .await
        .expect("a number")
        .get(0);
    let other = format!("{}.0", file + 1);
    let check = |after: &str| ["ledger", "check", "--signatures", "--after", after].map(str::to_owned);
    let run = async |after: &str| {
        let words = check(after);
        ask(&place, &words.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    run(&other).await.refused(1, "written anew");
    let end = run(&format!("{file}.4000000000")).await.document(0);
    assert_eq!(end["signatures"], json!({"verified": 0, "forged": 0, "next": null}));
    assert!(SignaturePlace::parse(&format!("{file}.0")).is_ok());

    let said = place.run(&["ledger", "check", "--signatures"]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains(&format!("{MANY} settlements verified, 0 of them forged")),
        "{said}"
    );
}
