//! `settled ledger check --signatures` over ten million settlements, each signed for itself. Left out of the suite, since it takes
//! most of an hour and some 20 GB: `make signatures-size`.

use std::{
    fmt::Write as _,
    io::Cursor,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::SinkExt;
use secp256k1::SecretKey;
use settled::domain::receipt::ReceiptKey;
use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::Reservation,
    partner::{Partner, sign},
    support::{Place, program, with_partner},
};

/// What it may take on two cores.
const MOST: Duration = Duration::from_secs(600);
/// Rows that are sent at once.
const LOT: u64 = 5_000;
/// Writers, one a core.
const WRITERS: u64 = 2;
/// Settlements of a batch.
const BATCH: u64 = 250;

fn wanted() -> u64 {
    let said = std::env::var("SETTLED_SIGNATURES").unwrap_or_default();
    if said.is_empty() {
        10_000_000
    } else {
        said.parse().expect("a number of settlements")
    }
}

/// The one settlement that a worker made, and of which the others differ by id, nonce, digest and signature.
struct Pilot {
    enterprise: String,
    key: SecretKey,
    id: String,
    nonce: String,
    payload: String,
}

impl Pilot {
    /// Rows for COPY.
    fn lot(&self, numbers: std::ops::Range<u64>) -> String {
        let mut rows = String::new();
        for number in numbers {
            let (id, nonce) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
            let payload = self.payload.replace(&self.id, &id).replace(&self.nonce, &nonce);
            let digest = hex::encode(Sha256::digest(&payload));
            let signature = sign(&self.key, &payload);
            let key = ReceiptKey::new(&self.enterprise, &nonce).0;
            writeln!(
                rows,
                "{number}\t{id}\t{nonce}\t{key}\t\\\\x{digest}\t\\\\x{signature}\t{}",
                payload.replace('\\', "\\\\")
            )
            .expect("a text takes it");
        }
        rows
    }
}

async fn execute(db: &Client, sql: &str) {
    db.batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// Signs so many, on every core.
async fn signed(place: &Place, pilot: &Arc<Pilot>, count: u64) {
    let db = place.db().await;
    execute(
        &db,
        "CREATE UNLOGGED TABLE public.signed (
            n bigint, id uuid, nonce text, key uuid, digest bytea, signature bytea, payload text
         )",
    )
    .await;
    let share = count.div_ceil(WRITERS);
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let (db, pilot) = (place.db().await, Arc::clone(pilot));
        writers.push(tokio::spawn(async move {
            let mut sink = pin!(db.copy_in("COPY public.signed FROM STDIN").await.expect("a copy"));
            let mut next = (writer * share).min(count);
            let end = (next + share).min(count);
            while next < end {
                let numbers = next..(next + LOT).min(end);
                next = numbers.end;
                let pilot = Arc::clone(&pilot);
                let rows = tokio::task::spawn_blocking(move || pilot.lot(numbers))
                    .await
                    .expect("rows");
                sink.send(Cursor::new(rows.into_bytes())).await.expect("sent");
            }
            assert_eq!(sink.finish().await.expect("copied"), end - (writer * share).min(count));
        }));
    }
    for writer in writers {
        writer.await.expect("no panic");
    }
}

/// The indexes and keys of these tables, taken away and to be made again: so that a row costs no search for its place.
async fn without_indexes(db: &Client) -> Vec<String> {
    let found = db
        .query(
            "SELECT 'ALTER TABLE ' || conrelid::regclass || ' DROP CONSTRAINT ' || quote_ident(conname),
                    'ALTER TABLE ' || conrelid::regclass || ' ADD CONSTRAINT ' || quote_ident(conname) || ' ' || pg_get_constraintdef(oid)
             FROM pg_constraint
             WHERE contype IN ('p', 'u')
               AND conrelid IN ('settled.receipts'::regclass, 'settled.allocations'::regclass, 'settled.transfers'::regclass)",
            &[],
        )
        .await
        .expect("keys");
    for row in &found {
        execute(db, row.get(0)).await;
    }
    found.iter().map(|row| row.get(1)).collect()
}

/// Rows like the pilot's, in the order of their numbers, and the books and batches as they are then.
async fn multiplied(place: &Place, count: u64) {
    let db = place.db().await;
    let again = without_indexes(&db).await;
    let batch = format!("md5('batch' || s.n / {BATCH})::uuid");
    place
        .tamper(&format!(
            "INSERT INTO settled.batches (id, worker, source, at, received, settled, duplicate, parked, rejected, reasons)
             SELECT md5('batch' || n)::uuid, b.worker, b.source, b.at, m.many, m.many, 0, 0, 0, b.reasons
             FROM settled.batches AS b, generate_series(0, {last} / {BATCH}) AS n
             CROSS JOIN LATERAL (SELECT least({BATCH}, {count} - n * {BATCH}) AS many) AS m
             WHERE b.settled = 1 AND m.many > 0;
             INSERT INTO settled.allocations
             SELECT s.id, a.connection_id, a.client_id, a.client_funds, a.connection_funds, a.created_at, a.type, a.currency,
                    a.quantity, 'order-' || s.id, a.initiated_by, a.notes, a.reserved_reason, a.reserved_retriable, a.retriable,
                    a.updated_at, a.status, a.reason, replace(a.partner_external_id, a.id::text, s.id::text), a.evaluation_id,
                    a.pending_approval_id, a.policy_result, s.nonce, a.partner_symbol
             FROM settled.allocations AS a, public.signed AS s;
             INSERT INTO settled.receipts
             SELECT s.key, s.id, md5('event' || s.n)::uuid, {batch}, r.first_seen, r.last_seen, r.verdict, r.reason,
                    r.enterprise_id, s.nonce, s.digest, s.digest, r.public_key, r.voided_at
             FROM settled.receipts AS r, public.signed AS s;
             INSERT INTO settled.transfers (
                debit_account, credit_account, created_at, subject_id, batch_id, receipt_key, step, event, amount, signature, payload
             )
             SELECT t.debit_account, t.credit_account, t.created_at, s.id, CASE t.step WHEN 1 THEN {batch} END,
                    CASE t.step WHEN 1 THEN s.key END, t.step, t.event, t.amount, CASE t.step WHEN 1 THEN s.signature END,
                    CASE t.step WHEN 1 THEN s.payload END
             FROM public.signed AS s, settled.transfers AS t
             WHERE t.subject_id IN (SELECT subject_id FROM settled.transfers WHERE step = 1);
             UPDATE settled.funds AS f
             SET available = f.available - p.available * {count}, held = f.held + p.held * {count},
                 allocated = f.allocated + p.allocated * {count}
             FROM public.pilot_moved AS p
             WHERE p.id = f.id;
             DROP TABLE public.signed",
            last = count - 1,
        ))
        .await;
    for sql in again {
        execute(&db, &sql).await;
    }
    for table in ["batches", "allocations", "receipts", "transfers", "funds"] {
        execute(&db, &format!("VACUUM ANALYZE settled.{table}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "most of an hour: make signatures-size"]
async fn ten_million_signatures() {
    let count = wanted();
    let (place, partner) = with_partner("signatures_size", "1000000000000").await;
    let db = place.db().await;
    execute(&db, "CREATE TABLE public.pilot_was AS SELECT * FROM settled.funds").await;
    let (reservation, message) = pilot(&place, &partner).await;
    execute(
        &db,
        "CREATE TABLE public.pilot_moved AS
         SELECT f.id, coalesce(w.available, 0) - f.available AS available, f.held - coalesce(w.held, 0) AS held,
                f.allocated - coalesce(w.allocated, 0) AS allocated
         FROM settled.funds AS f LEFT JOIN public.pilot_was AS w ON w.id = f.id",
    )
    .await;
    let body: serde_json::Value = serde_json::from_slice(&message.body).expect("a body");
    let text = |name: &str| body[name].as_str().expect(name).to_owned();
    let pilot = Pilot {
        enterprise: partner.enterprise.clone(),
        key: partner.key,
        id: reservation.id.to_string(),
        nonce: text("nonce"),
        payload: text("payload"),
    };
    let began = Instant::now();
    signed(&place, &Arc::new(pilot), count).await;
    println!("{count} settlements signed in {:?}", began.elapsed());
    let began = Instant::now();
    multiplied(&place, count).await;
    println!("and booked in {:?}", began.elapsed());

    let began = Instant::now();
    let output = tokio::process::Command::new(program())
        .env("SETTLED_DATABASE_URL", &place.database_url)
        .args(["ledger", "check", "--signatures"])
        .output()
        .await
        .expect("it runs");
    let elapsed = began.elapsed();
    println!(
        "{}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    println!(
        "settled ledger check --signatures: exit {:?} after {elapsed:?}",
        output.status.code()
    );
    assert!(output.status.success());
    assert!(elapsed < MOST, "{elapsed:?}");
}

/// One that a worker settles.
async fn pilot(place: &Place, partner: &Partner) -> (Reservation, Message) {
    let reservation = partner.allocation("BTC", "7");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let message = partner.cleared(&reservation);
    let worker = place.ready_worker(&[]).await;
    place.publish(std::slice::from_ref(&message)).await;
    place.settle_up(worker).await;
    (reservation, message)
}
