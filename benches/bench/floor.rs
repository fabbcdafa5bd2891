//! What the work costs at least on this machine: the signature, the message in, the event out, the rows. Each is measured
//! by itself, with as little around it as lets it be done at all; the sum is the floor under any worker that keeps the
//! same promises.

use std::{collections::BTreeMap, hint::black_box};

use futures_util::{StreamExt, future::join_all, join};
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions},
    types::FieldTable,
};
use serde::Deserialize;
use serde_json::{Value, json};
use settled::{
    broker::topology::{EVENTS, UPDATES},
    domain::{
        digest::sha256,
        signature::{Signer, signature_bytes, signer},
    },
};
use tokio_postgres::{Client, Statement, types::ToSql};
use uuid::Uuid;

use crate::{
    Fallible,
    drain::feed,
    place::{Line, PATIENCE, Place, Services, own},
    processes::{Accounts, own_thread},
    traffic::{Traffic, World},
};

/// Messages in a transaction, between two acknowledgements and between two waits for confirms: a worker's batch.
const BATCH: usize = 256;
const PREFETCH: u16 = 2_000;
/// Signatures recovered: they take their time, and it is always the same.
const SIGNATURES: usize = 20_000;
/// Whose rows and events these are.
const ENTERPRISE: &str = "trading-partner-0";

/// Microseconds of CPU a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Floor {
    pub(crate) signature: f64,
    pub(crate) intake_client: f64,
    pub(crate) intake_broker: f64,
    pub(crate) event_client: f64,
    pub(crate) event_broker: f64,
    pub(crate) rows_client: f64,
    pub(crate) rows_postgres: f64,
}

impl Floor {
    pub(crate) fn sum(&self) -> f64 {
        self.signature
            + self.intake_client
            + self.intake_broker
            + self.event_client
            + self.event_broker
            + self.rows_client
            + self.rows_postgres
    }

    /// Messages a second if every core did nothing else.
    pub(crate) fn rate(&self) -> f64 {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        cores as f64 * 1e6 / self.sum()
    }
}

/// What of a body is needed here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    allocation_id: Uuid,
    amount: Value,
    client_id: Uuid,
    connection_id: Uuid,
    partners_allocation_id: String,
    nonce: String,
    payload: String,
    signature: String,
}

fn bodies(traffic: &Traffic, messages: usize) -> Fallible<Vec<Body>> {
    let some = traffic.messages.iter().take(messages);
    Ok(some
        .map(|message| serde_json::from_slice(&message.body))
        .collect::<Result<_, _>>()?)
}

/// An event as long as the worker's for this message, and its id.
fn event(body: &Body) -> (String, Vec<u8>) {
    let id = Uuid::new_v4().to_string();
    let event = json!({
        "specversion": "1.0", "id": id, "source": "/settled", "type": "allocation.cleared",
        "subject": body.allocation_id, "time": "2026-01-01T00:00:00.000Z", "datacontenttype": "application/json",
        "data": {
            "allocation": {
                "id": body.allocation_id, "amount": body.amount, "connectionId": body.connection_id,
                "clientExternalId": body.partners_allocation_id.strip_prefix("at-partner-"),
                "partnerExternalId": body.partners_allocation_id, "initiatedBy": "simulated client",
                "createdAt": "2026-01-01T00:00:00.000Z", "updatedAt": "2026-01-01T00:00:00.000Z",
                "retriable": false, "reason": null, "status": "cleared", "type": "allocation",
            },
            "enterpriseId": ENTERPRISE, "clientId": body.client_id, "nonce": body.nonce,
        },
    });
    (id, event.to_string().into_bytes())
}

pub(crate) async fn measure(services: &Services, world: &World, traffic: &Traffic, messages: usize) -> Fallible<Floor> {
    let bodies = bodies(traffic, messages)?;
    let signature = tokio::task::block_in_place(|| recover(&bodies))?;
    let place = services.place("floor", world, own()).await?;
    let accounts = Accounts::open(services).await?;
    feed(&place, traffic, messages).await?;
    accounts.rest().await?;
    let (intake_client, intake_broker) = in_time("messages in", drain(&place, &accounts, messages)).await?;
    accounts.rest().await?;
    let (event_client, event_broker) = in_time("events out", publish(&place, &accounts, &bodies)).await?;
    accounts.rest().await?;
    let (rows_client, rows_postgres) = in_time("rows", settle(&place, &accounts, &bodies)).await?;
    services.leave(place).await?;
    Ok(Floor {
        signature,
        intake_client,
        intake_broker,
        event_client,
        event_broker,
        rows_client,
        rows_postgres,
    })
}

/// One part of the floor, which ends some time.
async fn in_time<T>(part: &str, measuring: impl Future<Output = Fallible<T>>) -> Fallible<T> {
    tokio::time::timeout(PATIENCE, measuring)
        .await
        .map_err(|_| format!("the floor's {part} did not end within {PATIENCE:?}"))?
}

/// Recovers signers on one core. By the thread's own clock, so that whoever else runs does not count.
fn recover(bodies: &[Body]) -> Fallible<f64> {
    let bodies = &bodies[..bodies.len().min(SIGNATURES)];
    let before = own_thread()?;
    for body in bodies {
        if !matches!(black_box(signer(&body.payload, &body.signature)), Signer::Key(_)) {
            return Err("a signature of ours names no key".into());
        }
    }
    Ok((own_thread()? - before) as f64 / 1_000.0 / bodies.len() as f64)
}

/// Takes what waits and acknowledges it, a batch at a time.
async fn drain(place: &Place, accounts: &Accounts, messages: usize) -> Fallible<(f64, f64)> {
    let line = Line::open(&place.broker_url).await?;
    let channel = line.channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions { global: false }).await?;
    let options = BasicConsumeOptions {
        no_local: false,
        no_ack: false,
        exclusive: false,
        nowait: false,
    };
    let before = accounts.read()?;
    let mut consumer = channel
        .basic_consume(UPDATES.into(), "".into(), options, FieldTable::default())
        .await?;
    for number in 1..=messages {
        let next = tokio::time::timeout(PATIENCE, consumer.next()).await?;
        let message = next.ok_or("the consumer was cancelled")??;
        black_box(&message.data);
        if number % BATCH == 0 || number == messages {
            message.acker.ack(BasicAckOptions { multiple: true }).await?;
        }
    }
    let cpu = accounts.read()?.since(before);
    line.close().await;
    Ok((a_message(cpu.harness, messages), a_message(cpu.broker, messages)))
}

/// Publishes events and awaits their confirms, a batch at a time, two batches at once.
async fn publish(place: &Place, accounts: &Accounts, bodies: &[Body]) -> Fallible<(f64, f64)> {
    let line = Line::open(&place.broker_url).await?;
    let events = lanes(bodies).map(|bodies| bodies.iter().map(event).collect::<Vec<_>>());
    let before = accounts.read()?;
    let mut running = tokio::task::JoinSet::new();
    for events in events {
        let channel = line.channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        running.spawn(async move {
            for some in events.chunks(BATCH) {
                let options = BasicPublishOptions {
                    mandatory: true,
                    immediate: false,
                };
                let sending = some.iter().map(|(id, body)| {
                    let properties = BasicProperties::default()
                        .with_content_type("application/cloudevents+json".into())
                        .with_message_id(id.as_str().into())
                        .with_delivery_mode(2);
                    let key = format!("allocation.cleared.{ENTERPRISE}");
                    channel.basic_publish(EVENTS.into(), key.into(), options, body, properties)
                });
                for confirm in join_all(sending).await {
                    match confirm?.await? {
                        Confirmation::Ack(None) => {}
                        other => return Err(format!("an event was not confirmed: {other:?}").into()),
                    }
                }
            }
            Fallible::Ok(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    let cpu = accounts.read()?.since(before);
    line.close().await;
    Ok((
        a_message(cpu.harness, bodies.len()),
        a_message(cpu.broker, bodies.len()),
    ))
}

fn a_message(microseconds: u64, messages: usize) -> f64 {
    microseconds as f64 / messages as f64
}

/// The messages, one half for each lane.
fn lanes(bodies: &[Body]) -> [&[Body]; 2] {
    let (first, second) = bodies.split_at(bodies.len() / 2);
    [first, second]
}

/// A batch's rows as columns.
struct Columns {
    allocations: Vec<Uuid>,
    receipts: Vec<Uuid>,
    nonces: Vec<String>,
    digests: Vec<Vec<u8>>,
    partners_ids: Vec<String>,
    payloads: Vec<String>,
    signatures: Vec<Vec<u8>>,
}

impl Columns {
    fn of(bodies: &[Body]) -> Fallible<Self> {
        let mut bodies: Vec<&Body> = bodies.iter().collect();
        bodies.sort_by_key(|body| body.allocation_id);
        let each = || bodies.iter();
        let digests: Vec<[u8; 32]> = each().map(|body| sha256(&body.payload)).collect();
        let signatures = each().map(|body| Some(signature_bytes(&body.signature)?.to_vec()));
        Ok(Self {
            allocations: each().map(|body| body.allocation_id).collect(),
            receipts: digests
                .iter()
                .map(|digest| Uuid::from_slice(&digest[..16]))
                .collect::<Result<_, _>>()?,
            nonces: each().map(|body| body.nonce.clone()).collect(),
            digests: digests.iter().map(|digest| digest.to_vec()).collect(),
            partners_ids: each().map(|body| body.partners_allocation_id.clone()).collect(),
            payloads: each().map(|body| body.payload.clone()).collect(),
            signatures: signatures
                .collect::<Option<_>>()
                .ok_or("a signature of ours is malformed")?,
        })
    }
}

/// Writes what a settlement writes, two transactions at a time: load under locks, then everything, then COMMIT. No row for
/// the batch, no outbox, no look for what is not there.
async fn settle(place: &Place, accounts: &Accounts, bodies: &[Body]) -> Fallible<(f64, f64)> {
    let mut ready = Vec::new();
    for bodies in lanes(bodies) {
        let client = place.db().await?;
        let mut statements = Vec::new();
        for sql in STATEMENTS {
            statements.push(client.prepare(sql).await?);
        }
        let statements = <[Statement; STATEMENTS.len()]>::try_from(statements).map_err(|_| "statements were lost")?;
        let batches: Vec<Columns> = bodies.chunks(BATCH).map(Columns::of).collect::<Fallible<_>>()?;
        ready.push((client, statements, batches));
    }
    let before = accounts.read()?;
    let mut running = tokio::task::JoinSet::new();
    for (client, statements, batches) in ready {
        running.spawn(async move {
            for batch in batches {
                write(&client, &statements, &batch).await?;
            }
            Fallible::Ok(())
        });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    let cpu = accounts.read()?.since(before);
    let sql = "SELECT count(*) FROM settled.allocations WHERE status = 'cleared'";
    let settled: i64 = place.db().await?.query_one(sql, &[]).await?.get(0);
    if usize::try_from(settled)? != bodies.len() {
        return Err(format!("the floor settled {settled} of {}", bodies.len()).into());
    }
    Ok((
        a_message(cpu.harness, bodies.len()),
        a_message(cpu.postgres, bodies.len()),
    ))
}

/// In the order in which they are sent.
const STATEMENTS: [&str; 7] = [
    "SELECT id, status, connection_funds, quantity::text
     FROM settled.allocations
     WHERE id = ANY ($1)
     ORDER BY id
     FOR NO KEY UPDATE",
    "SELECT key FROM settled.receipts WHERE key = ANY ($1)",
    "INSERT INTO settled.receipts (
         key, enterprise_id, nonce, payload_digest, message_digest, verdict, allocation_id, event_id, public_key,
         batch_id, first_seen, last_seen
     )
     SELECT n.key, $5, n.nonce, n.digest, n.digest, 'settled', n.id, n.id, $6, $7, now(), now()
     FROM (
         SELECT unnest($1::uuid[]) AS key, unnest($2::text[]) AS nonce, unnest($3::bytea[]) AS digest,
                unnest($4::uuid[]) AS id
     ) AS n",
    "UPDATE settled.allocations AS a
     SET status = 'cleared',
         reason = NULL,
         partner_external_id = n.partners_id,
         settled_nonce = n.nonce,
         updated_at = now()
     FROM (SELECT unnest($1::uuid[]) AS id, unnest($2::text[]) AS partners_id, unnest($3::text[]) AS nonce) AS n
     WHERE a.id = n.id
       AND a.status = 'reserved'",
    "INSERT INTO settled.transfers (
         subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
         created_at
     )
     SELECT n.id, 1, 'cleared', n.funds * 4 + 2, n.funds * 4 + 3, n.quantity::numeric, n.receipt, n.payload, n.signature,
            $7, now()
     FROM (
         SELECT unnest($1::uuid[]) AS id, unnest($2::bigint[]) AS funds, unnest($3::text[]) AS quantity,
                unnest($4::uuid[]) AS receipt, unnest($5::text[]) AS payload, unnest($6::bytea[]) AS signature
     ) AS n",
    "SELECT FROM settled.funds WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE",
    "UPDATE settled.funds AS f
     SET held = f.held - n.moved::numeric,
         allocated = f.allocated + n.moved::numeric
     FROM (SELECT unnest($1::bigint[]) AS id, unnest($2::text[]) AS moved) AS n
     WHERE f.id = n.id",
];

/// One transaction in two round trips.
async fn write(client: &Client, statements: &[Statement; STATEMENTS.len()], batch: &Columns) -> Fallible<()> {
    let [load, receipts, insert_receipts, update, transfers, lock, balances] = statements;
    let (id, key) = (Uuid::new_v4(), vec![2_u8; 33]);
    let allocations: [&(dyn ToSql + Sync); 1] = [&batch.allocations];
    let seen: [&(dyn ToSql + Sync); 1] = [&batch.receipts];
    let (begun, rows, seen) = join!(
        client.batch_execute("BEGIN"),
        client.query(load, &allocations),
        client.query(receipts, &seen),
    );
    begun?;
    let rows = rows?;
    if rows.len() != batch.allocations.len() || !seen?.is_empty() {
        return Err("the floor met an allocation that is not there, or a receipt that is".into());
    }
    let funds: Vec<i64> = rows.iter().map(|row| row.get(2)).collect();
    let quantities: Vec<&str> = rows.iter().map(|row| row.get(3)).collect();
    let mut sums = BTreeMap::<i64, i64>::new();
    for (funds, quantity) in funds.iter().zip(&quantities) {
        *sums.entry(*funds).or_default() += quantity.parse::<i64>()?;
    }
    let (moved, sums): (Vec<i64>, Vec<String>) = sums.into_iter().map(|(id, sum)| (id, sum.to_string())).unzip();
    let written: [&[&(dyn ToSql + Sync)]; 5] = [
        &[
            &batch.receipts,
            &batch.nonces,
            &batch.digests,
            &batch.allocations,
            &ENTERPRISE,
            &key,
            &id,
        ],
        &[&batch.allocations, &batch.partners_ids, &batch.nonces],
        // The rows come in the order of the ids, which is that of the batch.
        &[
            &batch.allocations,
            &funds,
            &quantities,
            &batch.receipts,
            &batch.payloads,
            &batch.signatures,
            &id,
        ],
        &[&moved],
        &[&moved, &sums],
    ];
    let done = join!(
        client.execute(insert_receipts, written[0]),
        client.execute(update, written[1]),
        client.execute(transfers, written[2]),
        client.execute(lock, written[3]),
        client.execute(balances, written[4]),
        client.batch_execute("COMMIT"),
    );
    for written in [done.0, done.1, done.2, done.3, done.4] {
        written?;
    }
    Ok(done.5?)
}
