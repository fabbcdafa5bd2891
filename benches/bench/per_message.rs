//! The worker to compare with: what a good engineer writes first, and as fast as such a thing gets. A message at a time,
//! [`TASKS`] of them at once; each is read, checked and settled in a transaction of its own, its statements awaited in turn;
//! then its event is published and confirmed, and then it is acknowledged.
//!
//! It reads, verifies and decides with the library's own code and writes the same rows, so the two workers differ in how
//! they talk to PostgreSQL and RabbitMQ and in nothing else. Left out is what makes it cheaper: no outbox row (an event is
//! published before the acknowledgement, so a crash in between publishes it again, with the same id), no row in `batches`,
//! no second look at what is parked, no collector of dead letters, no replies, no metrics and no log.
//!
//! A message that settles takes 9 round trips to PostgreSQL, one for each of: BEGIN; the allocation, locked; the receipt,
//! locked, with what is parked under its nonce; the partner with its keys and the time; the allocation's new state; the
//! receipt; the transfer with what authorised it; the funds (two rows where they leave the connection); COMMIT. Then one to
//! RabbitMQ for the event and its confirm; the acknowledgement is not answered. A message that is refused with its sender in doubt takes 5
//! (its transaction writes nothing), one that does not decode none; either publishes its dead letter together with its event.
//!
//! Tried in turns, and left out because the CPU time per message was the same within what it differs from run to run: one
//! publishing channel for all tasks, a connection for publishing alone, half as many database connections as tasks, 8 and 32
//! tasks, all of them on one thread.

use std::{collections::BTreeMap, error::Error, str::FromStr, sync::Arc, time::Duration};

use deadpool_postgres::{Client, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Transaction};
use futures_util::{StreamExt, future::try_join_all};
use jiff::Timestamp;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    message::Delivery as Received,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions,
    },
    types::{AMQPValue, DecimalValue, FieldArray, FieldTable, ShortString},
};
use settled::{
    broker::{BrokerSettings, topology::UPDATES},
    config::{Settings, Sources, process_environment},
    domain::{
        allocation::{Allocation, Kind, PolicyResult, Status},
        changeset::{Changeset, Settlement},
        currency::Symbols,
        decide::decide,
        delivery::{Bytes, Delivery, HeaderValue, Headers, Properties, Publication, PublicationKind, Source},
        ledger::{AccountKind, Amount, Quantity, funds_of},
        message::{self, Facts, MessageRef},
        publications,
        reason::Reason,
        receipt::{Receipt, ReceiptKey},
        signature::PublicKey,
        snapshot::{Parked, Partner, Rules, Snapshot, Whereabouts},
        verdict::VerdictKind,
    },
    settle::rules,
    worker::Signals,
};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinSet,
};
use tokio_postgres::{NoTls, Row, error::SqlState};
use uuid::Uuid;

/// Messages at work at once, each with a database connection and a publishing channel.
const TASKS: usize = 16;

/// Messages that the broker hands out ahead of their acknowledgement.
const PREFETCH: u16 = 256;

/// A deadlock, or a nonce that another task wrote first, is tried again this often.
const ATTEMPTS: usize = 8;

/// The longest wait for a database connection, for confirms, or for the messages at work when the worker stops.
const PATIENCE: Duration = Duration::from_secs(30);

type Fault = Box<dyn Error + Send + Sync>;

/// Reads the settings from the environment and works until SIGTERM.
///
/// # Errors
/// A sentence about a wrong setting, or about what broke: whatever was not acknowledged comes again.
pub(crate) async fn run() -> Result<(), String> {
    let settings = Settings::load(Sources {
        file: None,
        environment: process_environment(),
        flags: Vec::new(),
    });
    let settings = settings.map_err(|error| error.message().to_owned())?;
    let mut signals = Signals::new().map_err(|error| format!("signals can not be caught: {error}"))?;
    let stop = async {
        signals.next().await;
    };
    settle(&settings, stop).await
}

/// Works until `stop`, then finishes the messages that are at work.
///
/// # Errors
/// As for [`run`].
pub(crate) async fn settle(settings: &Settings, stop: impl Future<Output = ()>) -> Result<(), String> {
    let database = settings.database_url().map_err(|error| error.message().to_owned())?;
    let broker = settings.broker_url().map_err(|error| error.message().to_owned())?;
    let pool = pool(database.expose()).map_err(|error| format!("the database's URL will not do: {error}"))?;
    let login = BrokerSettings::from_settings(settings)
        .map_err(|error| error.message().to_owned())?
        .login();
    work(pool, broker.expose(), login, rules(settings), stop)
        .await
        .map_err(|fault| format!("the per-message worker broke off: {}", whole(fault.as_ref())))
}

/// An error with what caused it: tokio-postgres says `db error` and no more.
fn whole(error: &(dyn Error + 'static)) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", whole(cause)),
        None => error.to_string(),
    }
}

fn pool(url: &str) -> Result<Pool, Fault> {
    let mut config = tokio_postgres::Config::from_str(url)?;
    config
        .application_name("per-message")
        .options("-c statement_timeout=10s -c lock_timeout=5s");
    let recycling_method = RecyclingMethod::Fast;
    let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method });
    Ok(Pool::builder(manager)
        .max_size(TASKS)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(PATIENCE))
        .create_timeout(Some(PATIENCE))
        .build()?)
}

async fn work(
    pool: Pool,
    broker: &str,
    login: Option<String>,
    rules: Rules,
    stop: impl Future<Output = ()>,
) -> Result<(), Fault> {
    let mut stop = std::pin::pin!(stop);
    let properties = ConnectionProperties::default().with_connection_name("per-message".into());
    let connection = Connection::connect(broker, properties).await?;
    let intake = connection.create_channel().await?;
    intake.basic_qos(PREFETCH, BasicQosOptions { global: false }).await?;
    let (hand_over, deliveries) = mpsc::channel(1);
    let deliveries = Arc::new(Mutex::new(deliveries));
    let rules = Arc::new(rules);
    let mut tasks = JoinSet::new();
    // A task's end must not close its channel while the connection is being closed.
    let mut channels = Vec::new();
    for _ in 0..TASKS {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        channels.push(channel.clone());
        let desk = Desk {
            pool: pool.clone(),
            channel,
            login: login.clone(),
            rules: Arc::clone(&rules),
        };
        tasks.spawn(desk.work(Arc::clone(&deliveries)));
    }
    // Theirs alone, so that nothing is handed over when none of them is left.
    drop(deliveries);
    let options = BasicConsumeOptions {
        no_local: false,
        no_ack: false,
        exclusive: false,
        nowait: false,
    };
    let mut consumer = intake
        .basic_consume(UPDATES.into(), ShortString::default(), options, FieldTable::default())
        .await?;
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(ended) = tasks.join_next() => return ended?,
            received = consumer.next() => match received {
                Some(received) => {
                    if hand_over.send(received?).await.is_err() {
                        // Every task has ended: why, the first of them says.
                        return tasks.join_next().await.ok_or("no task is left")??;
                    }
                }
                None => return Err("the broker ended the consumer".into()),
            },
        }
    }
    intake
        .basic_cancel(consumer.tag(), BasicCancelOptions { nowait: false })
        .await?;
    // What is at work is finished; what was only handed out goes back to the queue with the connection.
    drop(hand_over);
    let rest = async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok::<_, Fault>(())
    };
    tokio::time::timeout(PATIENCE, rest).await??;
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// One task.
struct Desk {
    pool: Pool,
    /// Its own: on a shared one, confirms of several tasks would have to be told apart.
    channel: Channel,
    /// Who the broker knows us as.
    login: Option<String>,
    rules: Arc<Rules>,
}

impl Desk {
    async fn work(self, deliveries: Arc<Mutex<mpsc::Receiver<Received>>>) -> Result<(), Fault> {
        loop {
            let received = deliveries.lock().await.recv().await;
            let Some(received) = received else { return Ok(()) };
            self.handle(received).await?;
        }
    }

    /// Settles a message, publishes what came of it, and acknowledges it.
    async fn handle(&self, mut received: Received) -> Result<(), Fault> {
        let mut delivery = delivery_from(&mut received);
        let facts = message::facts(&delivery);
        message::shorten(&mut delivery, &facts);
        let message = MessageRef {
            delivery: &delivery,
            facts: &facts,
        };
        let mut attempt = 1;
        let publications = loop {
            match self.judge(message).await {
                Ok(judged) => break judged,
                Err(fault) if attempt < ATTEMPTS && passes(fault.as_ref()) => attempt += 1,
                Err(fault) => return Err(fault),
            }
        };
        tokio::time::timeout(PATIENCE, self.publish(&publications)).await??;
        received.ack(BasicAckOptions { multiple: false }).await?;
        Ok(())
    }

    /// One attempt: load, decide, write, commit.
    async fn judge(&self, message: MessageRef<'_>) -> Result<Vec<Publication>, Fault> {
        // What does not decode asks nothing of the database.
        if message.facts.content.is_err() {
            let now = Timestamp::now();
            let snapshot = Snapshot {
                now,
                ..Snapshot::default()
            };
            let (publications, _) = self.decide(snapshot, message, now)?;
            return Ok(publications);
        }
        let mut client: Client = self.pool.get().await?;
        let transaction = client.transaction().await?;
        let snapshot = load(&transaction, message.facts).await?;
        let now = snapshot.now;
        let (publications, changes) = self.decide(snapshot, message, now)?;
        write(&transaction, message.delivery, &changes, now).await?;
        transaction.commit().await?;
        Ok(publications)
    }

    fn decide(
        &self,
        snapshot: Snapshot,
        message: MessageRef<'_>,
        now: Timestamp,
    ) -> Result<(Vec<Publication>, Changeset), Fault> {
        let (judgements, changes) = decide(snapshot, &[message], &self.rules);
        let judgement = judgements.into_iter().next().ok_or("a message came to no verdict")?;
        let mut publications = publications::publications(message, &judgement, now, &self.rules);
        publications.retain(|publication| publication.kind != PublicationKind::Reply);
        Ok((publications, changes))
    }

    /// Publishes event and dead letter together and awaits both confirms.
    async fn publish(&self, publications: &[Publication]) -> Result<(), Fault> {
        let confirms = publications.iter().map(|publication| {
            let options = BasicPublishOptions {
                // An event that nobody subscribed to is done; a dead letter without a queue would be lost.
                mandatory: publication.kind == PublicationKind::DeadLetter,
                immediate: false,
            };
            self.channel.basic_publish(
                publication.exchange.as_str().into(),
                publication.routing_key.as_str().into(),
                options,
                &publication.body,
                match (publication.kind, &self.login) {
                    // By which the collector knows its own.
                    (PublicationKind::DeadLetter, Some(login)) => {
                        properties_to(&publication.properties).with_user_id(login.as_str().into())
                    }
                    (PublicationKind::DeadLetter, None) | (PublicationKind::Event | PublicationKind::Reply, _) => {
                        properties_to(&publication.properties)
                    }
                },
            )
        });
        for confirm in try_join_all(confirms).await? {
            match confirm.await? {
                Confirmation::Ack(None) => {}
                Confirmation::Ack(Some(_)) => return Err("no queue takes dead letters".into()),
                Confirmation::Nack(_) | Confirmation::NotRequested => return Err("the broker took no event".into()),
            }
        }
        Ok(())
    }
}

/// Whether another attempt may go better: a deadlock or a lock timeout, or a row that another task wrote first.
fn passes(fault: &(dyn Error + Send + Sync + 'static)) -> bool {
    let code = fault
        .downcast_ref::<tokio_postgres::Error>()
        .and_then(tokio_postgres::Error::code);
    [
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::LOCK_NOT_AVAILABLE,
        SqlState::UNIQUE_VIOLATION,
    ]
    .iter()
    .any(|passing| code == Some(passing))
}

const LOAD_ALLOCATIONS: &str = "\
    SELECT a.id, a.type, a.status, a.currency, a.quantity::text AS quantity, a.connection_id, a.client_id,
           a.client_external_id, a.initiated_by, a.notes, a.reason, a.retriable, a.partner_external_id, a.evaluation_id,
           a.pending_approval_id, a.policy_result, a.settled_nonce, a.created_at, a.updated_at,
           a.client_funds * 4 + 1 AS available_account, a.connection_funds * 4 + 2 AS held_account,
           a.connection_funds * 4 + 3 AS allocated_account,
           c.enterprise_id, c.partners_client_id, c.partners_connection_id
    FROM settled.allocations AS a
    JOIN settled.connections AS c ON c.connection_id = a.connection_id
    WHERE a.id = ANY ($1)
    ORDER BY a.id
    FOR NO KEY UPDATE OF a";

const LOAD_RECEIPTS: &str = "\
    SELECT r.key, r.enterprise_id, r.nonce, r.payload_digest, r.message_digest, r.verdict, r.reason, r.allocation_id,
           r.event_id, r.public_key, r.first_seen, r.last_seen, p.seq, p.parked_at, p.until, p.attempts
    FROM settled.receipts AS r
    LEFT JOIN settled.parked AS p ON p.key = r.key
    WHERE r.key = ANY ($1)
    ORDER BY r.key
    FOR NO KEY UPDATE OF r";

const LOAD_PARTNER: &str = "\
    SELECT t.now, p.enterprise_id, p.broker_user, p.suspended_at IS NOT NULL AS suspended,
           p.async_allocations, p.async_deallocations, k.public_key
    FROM (SELECT date_trunc('milliseconds', clock_timestamp()) AS now) AS t
    LEFT JOIN settled.partners AS p ON p.enterprise_id = $1
    LEFT JOIN settled.partner_keys AS k
      ON k.enterprise_id = p.enterprise_id
     AND k.revoked_at IS NULL
     AND k.valid_from <= clock_timestamp()
     AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())";

/// Tasks that park for the same partner count one after the other, or each would fill the same room.
const LOCK_PARKING: &str = "SELECT pg_advisory_xact_lock(7236102, hashtext($1))";

const COUNT_PARKED: &str = "SELECT count(*) FROM settled.parked WHERE enterprise_id = $1";

/// Loads what the message may touch, in the order of every writer's locks.
async fn load(transaction: &Transaction<'_>, facts: &Facts) -> Result<Snapshot, Fault> {
    let mut snapshot = Snapshot::default();
    let Ok(content) = &facts.content else {
        return Ok(snapshot);
    };
    let update = &content.update;
    let mut ids = vec![update.id];
    ids.extend(content.signed_ids.iter().filter(|id| **id != update.id));
    let statement = transaction.prepare_cached(LOAD_ALLOCATIONS).await?;
    for row in transaction.query(&statement, &[&ids]).await? {
        let allocation = allocation(&row).ok_or("an allocation that can not be read")?;
        snapshot.allocations.insert(allocation.id, Arc::new(allocation));
    }
    let mut keys: Vec<Uuid> = content.receipt_keys().map(|key| key.0).collect();
    keys.dedup();
    let statement = transaction.prepare_cached(LOAD_RECEIPTS).await?;
    for row in transaction.query(&statement, &[&keys]).await? {
        let key = ReceiptKey(row.get("key"));
        let receipt = receipt(&row).ok_or("a receipt that can not be read")?;
        snapshot.receipts.insert(key, receipt);
        if let Some(parked) = parked(&row) {
            snapshot.parked.insert(key, parked);
        }
    }
    if !snapshot.allocations.contains_key(&update.id) {
        let statement = transaction.prepare_cached(LOCK_PARKING).await?;
        transaction.query_one(&statement, &[&update.enterprise_id]).await?;
        let statement = transaction.prepare_cached(COUNT_PARKED).await?;
        let row = transaction.query_one(&statement, &[&update.enterprise_id]).await?;
        let count = u64::try_from(row.get::<_, i64>(0))?;
        snapshot.parked_counts.insert(update.enterprise_id.clone(), count);
    }
    // After the locks, so that a key or a suspension that was committed while they were awaited counts.
    let statement = transaction.prepare_cached(LOAD_PARTNER).await?;
    for row in transaction.query(&statement, &[&update.enterprise_id]).await? {
        snapshot.now = row.get("now");
        let Some(enterprise_id) = row.get::<_, Option<String>>("enterprise_id") else {
            continue;
        };
        let partner = snapshot.partners.entry(enterprise_id).or_insert_with(|| Partner {
            quarantined: false,
            whereabouts: Whereabouts::Here,
            broker_user: row.get("broker_user"),
            suspended: row.get("suspended"),
            async_allocations: row.get("async_allocations"),
            async_deallocations: row.get("async_deallocations"),
            keys: Vec::new(),
            revoked: Vec::new(),
            symbols: Symbols::default(),
        });
        let key: Option<&[u8]> = row.get("public_key");
        partner.keys.extend(key.and_then(PublicKey::from_bytes));
    }
    Ok(snapshot)
}

fn allocation(row: &Row) -> Option<Allocation> {
    Some(Allocation {
        id: row.get("id"),
        kind: Kind::parse(row.get("type"))?,
        status: Status::parse(row.get("status"))?,
        amount: Amount {
            currency: row.get("currency"),
            quantity: Quantity::parse(row.get("quantity")).ok()?,
        },
        connection_id: row.get("connection_id"),
        enterprise_id: row.get("enterprise_id"),
        client_id: row.get("client_id"),
        partners_client_id: row.get("partners_client_id"),
        partners_connection_id: row.get("partners_connection_id"),
        client_external_id: row.get("client_external_id"),
        initiated_by: row.get("initiated_by"),
        notes: row.get("notes"),
        reason: row.get("reason"),
        retriable: row.get("retriable"),
        partner_external_id: row.get("partner_external_id"),
        // No partner of the benchmark has symbols of its own.
        partner_symbol: None,
        evaluation_id: row.get("evaluation_id"),
        pending_approval_id: row.get("pending_approval_id"),
        policy_result: row
            .get::<_, Option<&str>>("policy_result")
            .and_then(PolicyResult::parse),
        settled_nonce: row.get("settled_nonce"),
        created_at: row.get("created_at"),
        updated_at: row.get("updated_at"),
        available_account: row.get("available_account"),
        held_account: row.get("held_account"),
        allocated_account: row.get("allocated_account"),
    })
}

fn receipt(row: &Row) -> Option<Receipt> {
    Some(Receipt {
        enterprise_id: row.get("enterprise_id"),
        nonce: row.get("nonce"),
        payload_digest: row.get::<_, &[u8]>("payload_digest").try_into().ok()?,
        message_digest: row.get::<_, &[u8]>("message_digest").try_into().ok()?,
        verdict: VerdictKind::parse(row.get("verdict"))?,
        reason: row.get::<_, Option<&str>>("reason").and_then(Reason::parse),
        allocation_id: row.get("allocation_id"),
        event_id: row.get("event_id"),
        public_key: PublicKey::from_bytes(row.get("public_key"))?,
        first_seen: row.get("first_seen"),
        last_seen: row.get("last_seen"),
        voided: false,
    })
}

fn parked(row: &Row) -> Option<Parked> {
    Some(Parked {
        seq: row.get::<_, Option<i64>>("seq")?,
        parked_at: row.get("parked_at"),
        until: row.get("until"),
        attempts: u32::try_from(row.get::<_, i32>("attempts")).ok()?,
        also: None,
    })
}

const UPDATE_ALLOCATION: &str = "\
    UPDATE settled.allocations
    SET status = $2, reason = $3, retriable = false, partner_external_id = $4, evaluation_id = $5,
        pending_approval_id = $6, policy_result = $7, settled_nonce = $8, updated_at = $9
    WHERE id = $1
      AND status = 'reserved'";

const INSERT_RECEIPT: &str = "\
    INSERT INTO settled.receipts (
        key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id, public_key,
        first_seen, last_seen, batch_id
    )
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)";

/// A receipt that is only seen again keeps the id of what gave its verdict.
const UPDATE_RECEIPT: &str = "\
    UPDATE settled.receipts
    SET message_digest = $2, verdict = $3, reason = $4, allocation_id = $5, event_id = $6, public_key = $7,
        last_seen = $8,
        batch_id = CASE WHEN (verdict, event_id) IS DISTINCT FROM ($3, $6) THEN $9 ELSE batch_id END
    WHERE key = $1";

const INSERT_TRANSFER: &str = "\
    INSERT INTO settled.transfers (
        subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
        created_at
    )
    VALUES ($1, 1, $2, $3, $4, $5::text::numeric(78, 0), $6, $7, $8, $9, $10)";

const UPDATE_FUNDS: &str = "\
    UPDATE settled.funds
    SET available = available + $2::text::numeric,
        held = held + $3::text::numeric,
        allocated = allocated + $4::text::numeric
    WHERE id = $1";

const PARK: &str = "\
    INSERT INTO settled.parked (
        key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at, until,
        attempts, due_at
    )
    VALUES ($1, $2, $3, $4, $5, $6, 1, $7, $8, $9, $10, 0, $11)";

const INSERT_PARKING: &str = "\
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    VALUES ($1, $2, 'parked', $3)";

/// Writes what the verdict changes, one row after the other. The accounts come last and in the order of their numbers:
/// some are hot, and no two tasks may wait for each other.
async fn write(
    transaction: &Transaction<'_>,
    delivery: &Delivery,
    changes: &Changeset,
    now: Timestamp,
) -> Result<(), Fault> {
    let batch = Uuid::now_v7();
    for settlement in &changes.settlements {
        update_allocation(transaction, settlement).await?;
    }
    for (key, receipt) in &changes.new_receipts {
        insert_receipt(transaction, *key, receipt, batch).await?;
    }
    for (key, receipt) in &changes.changed_receipts {
        update_receipt(transaction, *key, receipt, batch).await?;
    }
    for settlement in &changes.settlements {
        insert_transfer(transaction, settlement, batch, now).await?;
    }
    for new in changes.newly_parked.values() {
        let properties = serde_json::to_string(&delivery.properties)?;
        let statement = transaction.prepare_cached(PARK).await?;
        transaction
            .execute(
                &statement,
                &[
                    &new.key.0,
                    &new.enterprise_id,
                    &new.nonce,
                    &new.allocation_id,
                    &delivery.exchange,
                    &delivery.routing_key,
                    &properties,
                    &delivery.body,
                    &new.parked.parked_at,
                    &new.parked.until,
                    &new.due_at,
                ],
            )
            .await?;
        let statement = transaction.prepare_cached(INSERT_PARKING).await?;
        transaction
            .execute(&statement, &[&new.key.0, &new.allocation_id, &new.parked.parked_at])
            .await?;
    }
    for (funds, [available, held, allocated]) in by_funds(changes) {
        let statement = transaction.prepare_cached(UPDATE_FUNDS).await?;
        transaction
            .execute(&statement, &[&funds, &available, &held, &allocated])
            .await?;
    }
    Ok(())
}

/// What each row of funds changes by: available, held, allocated.
fn by_funds(changes: &Changeset) -> BTreeMap<i64, [String; 3]> {
    let mut rows = BTreeMap::new();
    for (account, change) in &changes.balances {
        let (funds, kind) = funds_of(*account);
        let row = rows.entry(funds).or_insert_with(|| ["0", "0", "0"].map(str::to_owned));
        let [available, held, allocated] = row;
        match kind {
            AccountKind::Available => *available = change.to_string(),
            AccountKind::Held => *held = change.to_string(),
            AccountKind::Allocated => *allocated = change.to_string(),
            // No settlement moves funds of the world outside.
            AccountKind::External => {}
        }
    }
    rows
}

async fn update_allocation(transaction: &Transaction<'_>, settlement: &Settlement) -> Result<(), Fault> {
    let allocation = &settlement.allocation;
    let statement = transaction.prepare_cached(UPDATE_ALLOCATION).await?;
    let updated = transaction
        .execute(
            &statement,
            &[
                &allocation.id,
                &allocation.status.as_str(),
                &allocation.reason,
                &allocation.partner_external_id,
                &allocation.evaluation_id,
                &allocation.pending_approval_id,
                &allocation.policy_result.map(PolicyResult::as_str),
                &allocation.settled_nonce,
                &allocation.updated_at,
            ],
        )
        .await?;
    if updated == 1 {
        Ok(())
    } else {
        Err("an allocation left its state under our lock".into())
    }
}

async fn insert_receipt(
    transaction: &Transaction<'_>,
    key: ReceiptKey,
    receipt: &Receipt,
    batch: Uuid,
) -> Result<(), Fault> {
    let statement = transaction.prepare_cached(INSERT_RECEIPT).await?;
    transaction
        .execute(
            &statement,
            &[
                &key.0,
                &receipt.enterprise_id,
                &receipt.nonce,
                &receipt.payload_digest.as_slice(),
                &receipt.message_digest.as_slice(),
                &receipt.verdict.as_str(),
                &receipt.reason.map(Reason::label),
                &receipt.allocation_id,
                &receipt.event_id,
                &receipt.public_key.as_bytes().as_slice(),
                &receipt.first_seen,
                &receipt.last_seen,
                &batch,
            ],
        )
        .await?;
    Ok(())
}

async fn update_receipt(
    transaction: &Transaction<'_>,
    key: ReceiptKey,
    receipt: &Receipt,
    batch: Uuid,
) -> Result<(), Fault> {
    let statement = transaction.prepare_cached(UPDATE_RECEIPT).await?;
    transaction
        .execute(
            &statement,
            &[
                &key.0,
                &receipt.message_digest.as_slice(),
                &receipt.verdict.as_str(),
                &receipt.reason.map(Reason::label),
                &receipt.allocation_id,
                &receipt.event_id,
                &receipt.public_key.as_bytes().as_slice(),
                &receipt.last_seen,
                &batch,
            ],
        )
        .await?;
    Ok(())
}

async fn insert_transfer(
    transaction: &Transaction<'_>,
    settlement: &Settlement,
    batch: Uuid,
    now: Timestamp,
) -> Result<(), Fault> {
    let transfer = &settlement.transfer;
    let (debit, credit) = (transfer.debit.1, transfer.credit.1);
    let amount = transfer.amount.quantity.to_string();
    let event = settlement.allocation.status.as_str();
    let content = &settlement.content;
    let signature = content.signature.as_ref().map(<[u8; 65]>::as_slice);
    let statement = transaction.prepare_cached(INSERT_TRANSFER).await?;
    transaction
        .execute(
            &statement,
            &[
                &transfer.allocation_id,
                &event,
                &debit,
                &credit,
                &amount,
                &content.key.0,
                &content.payload,
                &signature,
                &batch,
                &now,
            ],
        )
        .await?;
    Ok(())
}

/// What lapin hands over, in the library's words; the body is taken out of it.
fn delivery_from(received: &mut Received) -> Delivery {
    let body = std::mem::take(&mut received.data);
    let properties = &received.properties;
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    Delivery {
        exchange: received.exchange.to_string(),
        routing_key: received.routing_key.to_string(),
        properties: Properties {
            content_type: text(properties.content_type()),
            content_encoding: text(properties.content_encoding()),
            headers: properties.headers().as_ref().map(headers_from),
            delivery_mode: *properties.delivery_mode(),
            priority: *properties.priority(),
            correlation_id: text(properties.correlation_id()),
            reply_to: text(properties.reply_to()),
            expiration: text(properties.expiration()),
            message_id: text(properties.message_id()),
            timestamp: *properties.timestamp(),
            kind: text(properties.kind()),
            user_id: text(properties.user_id()),
            app_id: text(properties.app_id()),
            cluster_id: text(properties.cluster_id()),
            undecodable: None,
        },
        body,
        cut: None,
        redelivered: received.redelivered,
        source: Source::Queue {
            delivery_tag: received.delivery_tag,
        },
    }
}

fn headers_from(table: &FieldTable) -> Headers {
    table
        .into_iter()
        .map(|(name, value)| (name.to_string(), header_from(value)))
        .collect()
}

fn header_from(value: &AMQPValue) -> HeaderValue {
    match value {
        AMQPValue::Boolean(value) => HeaderValue::Boolean(*value),
        AMQPValue::ShortShortInt(value) => HeaderValue::ShortShortInt(*value),
        AMQPValue::ShortShortUInt(value) => HeaderValue::ShortShortUInt(*value),
        AMQPValue::ShortInt(value) => HeaderValue::ShortInt(*value),
        AMQPValue::ShortUInt(value) => HeaderValue::ShortUInt(*value),
        AMQPValue::LongInt(value) => HeaderValue::LongInt(*value),
        AMQPValue::LongUInt(value) => HeaderValue::LongUInt(*value),
        AMQPValue::LongLongInt(value) => HeaderValue::LongLongInt(*value),
        AMQPValue::Float(value) => HeaderValue::Float(value.to_bits()),
        AMQPValue::Double(value) => HeaderValue::Double(value.to_bits()),
        AMQPValue::DecimalValue(value) => HeaderValue::Decimal {
            scale: value.scale,
            value: value.value,
        },
        AMQPValue::ShortString(value) => HeaderValue::text(value.as_str()),
        AMQPValue::LongString(value) => HeaderValue::LongString(Bytes(value.as_bytes().to_vec())),
        AMQPValue::FieldArray(values) => HeaderValue::Array(values.as_slice().iter().map(header_from).collect()),
        AMQPValue::Timestamp(value) => HeaderValue::Timestamp(*value),
        AMQPValue::FieldTable(table) => HeaderValue::Table(headers_from(table)),
        AMQPValue::ByteArray(value) => HeaderValue::ByteArray(Bytes(value.as_slice().to_vec())),
        AMQPValue::Void => HeaderValue::Void,
    }
}

/// The library's words, in lapin's.
fn properties_to(properties: &Properties) -> BasicProperties {
    let mut message = BasicProperties::default();
    type With = fn(BasicProperties, ShortString) -> BasicProperties;
    let texts: [(&Option<String>, With); 10] = [
        (&properties.content_type, BasicProperties::with_content_type),
        (&properties.content_encoding, BasicProperties::with_content_encoding),
        (&properties.correlation_id, BasicProperties::with_correlation_id),
        (&properties.reply_to, BasicProperties::with_reply_to),
        (&properties.expiration, BasicProperties::with_expiration),
        (&properties.message_id, BasicProperties::with_message_id),
        (&properties.kind, BasicProperties::with_type),
        (&properties.user_id, BasicProperties::with_user_id),
        (&properties.app_id, BasicProperties::with_app_id),
        (&properties.cluster_id, BasicProperties::with_cluster_id),
    ];
    for (value, with) in texts {
        if let Some(value) = value {
            message = with(message, value.as_str().into());
        }
    }
    if let Some(headers) = &properties.headers {
        message = message.with_headers(table_to(headers));
    }
    if let Some(value) = properties.delivery_mode {
        message = message.with_delivery_mode(value);
    }
    if let Some(value) = properties.priority {
        message = message.with_priority(value);
    }
    if let Some(value) = properties.timestamp {
        message = message.with_timestamp(value);
    }
    message
}

fn table_to(headers: &Headers) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert(name.as_str().into(), value_to(value));
    }
    table
}

fn value_to(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Boolean(value) => AMQPValue::Boolean(*value),
        HeaderValue::ShortShortInt(value) => AMQPValue::ShortShortInt(*value),
        HeaderValue::ShortShortUInt(value) => AMQPValue::ShortShortUInt(*value),
        HeaderValue::ShortInt(value) => AMQPValue::ShortInt(*value),
        HeaderValue::ShortUInt(value) => AMQPValue::ShortUInt(*value),
        HeaderValue::LongInt(value) => AMQPValue::LongInt(*value),
        HeaderValue::LongUInt(value) => AMQPValue::LongUInt(*value),
        HeaderValue::LongLongInt(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(bits) => AMQPValue::Float(f32::from_bits(*bits)),
        HeaderValue::Double(bits) => AMQPValue::Double(f64::from_bits(*bits)),
        HeaderValue::Decimal { scale, value } => AMQPValue::DecimalValue(DecimalValue {
            scale: *scale,
            value: *value,
        }),
        HeaderValue::LongString(bytes) => AMQPValue::LongString(bytes.0.clone().into()),
        HeaderValue::Array(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(value_to).collect::<Vec<_>>()))
        }
        HeaderValue::Timestamp(value) => AMQPValue::Timestamp(*value),
        HeaderValue::Table(headers) => AMQPValue::FieldTable(table_to(headers)),
        HeaderValue::ByteArray(bytes) => AMQPValue::ByteArray(bytes.0.clone().into()),
        HeaderValue::Void => AMQPValue::Void,
    }
}
