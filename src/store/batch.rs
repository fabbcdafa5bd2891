//! A batch's two visits: load a [`Snapshot`] under locks, write a [`Changeset`]. Each is one round trip (the load a second
//! one where a message may be parked); one statement a table, arrays in, keys sorted. Locks are taken in the order of every
//! writer: allocations, receipts, who parks, what was told, parked, dead letters, accounts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::join;
use jiff::Timestamp;
use tokio_postgres::{Row, types::FromSql};
use uuid::Uuid;

use super::{Fate, Session, Store, StoreError, dead_letters, held, outbox, registry::REMEMBERED_MAX, told};
use crate::{
    domain::{
        allocation::{Allocation, Kind, PolicyResult, Status},
        decide::{Changeset, Judged, Judgement, Parked, Partner, Reason, Receipt, ReceiptKey, Snapshot, VerdictKind},
        delivery::{BatchId, Publication},
        event,
        ledger::{Amount, Quantity},
        signature::{PublicKey, Signer, signature_bytes},
        told::{Firsts, Tellings},
    },
    fail::Point,
};

/// What a batch names, and so may touch.
#[derive(Debug, Default)]
struct Wanted {
    allocations: BTreeSet<Uuid>,
    receipts: BTreeSet<Uuid>,
    enterprises: BTreeSet<String>,
    /// Who speaks of which allocation: the message is parked where it is not there.
    spoken_of: BTreeSet<(String, Uuid)>,
}

impl Wanted {
    fn of(batch: &[Judged<'_>]) -> Self {
        let mut wanted = Self::default();
        for content in batch.iter().filter_map(|message| message.facts.content.as_ref().ok()) {
            let update = &content.update;
            wanted.allocations.insert(update.id);
            wanted.allocations.extend(&content.signed_ids);
            wanted.receipts.extend(content.receipt_keys().map(|key| key.0));
            wanted.enterprises.insert(update.enterprise_id.clone());
            wanted.spoken_of.insert((update.enterprise_id.clone(), update.id));
        }
        wanted
    }
}

const ALLOCATION_COLUMNS: &str = "\
    a.id, a.type, a.status, a.currency, a.quantity::text AS quantity, a.connection_id, a.client_id,
    a.client_external_id, a.initiated_by, a.notes, a.reason, a.retriable, a.partner_external_id, a.evaluation_id,
    a.pending_approval_id, a.policy_result, a.settled_nonce, a.created_at, a.updated_at,
    a.available_account, a.held_account, a.allocated_account,
    c.enterprise_id, c.partners_client_id, c.partners_connection_id";

/// The statement that reads allocations, with what follows its FROM.
pub(super) fn select_allocations(function: &str, rest: &str) -> String {
    format!(
        "/* {function} */
        SELECT {ALLOCATION_COLUMNS}
        FROM settled.allocations AS a
        JOIN settled.connections AS c ON c.connection_id = a.connection_id
        {rest}"
    )
}

const LOAD_NOW: &str = "\
    /* batch::load now */
    SELECT date_trunc('milliseconds', clock_timestamp())";

const LOAD_PARTNERS: &str = "\
    /* batch::load partners */
    SELECT p.enterprise_id, p.broker_user, p.suspended_at IS NOT NULL AS suspended,
           p.async_allocations, p.async_deallocations, k.public_key,
           k.revoked_at IS NOT NULL AS revoked, k.reinstated_at IS NOT NULL AS reinstated
    FROM settled.partners AS p
    LEFT JOIN settled.partner_keys AS k
      ON k.enterprise_id = p.enterprise_id
     AND (k.revoked_at IS NOT NULL
       OR (k.valid_from <= clock_timestamp()
      AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())))
    WHERE p.enterprise_id = ANY ($1)";

/// What was refused because its key was revoked then. Asked only where a message is signed with a key that was reinstated;
/// after the keys, so that whatever was refused before that is seen.
const LOAD_DISTRUSTED: &str = "\
    /* batch::load distrusted */
    SELECT d.public_key, d.payload_digest
    FROM settled.distrusted AS d
    JOIN unnest($1::bytea[], $2::bytea[]) AS n (public_key, payload_digest)
      ON n.public_key = d.public_key
     AND n.payload_digest = d.payload_digest";

const LOAD_PARKED: &str = "\
    /* batch::load parked */
    SELECT key, seq, parked_at, until, attempts, also_reply
    FROM settled.parked
    WHERE key = ANY ($1)";

/// Where messages may be parked, one batch at a time counts and parks for a partner: others that counted at the same
/// moment would each fill the same room. In the order of the keys, so that two batches never wait for each other. What is
/// locked is a number of ours, since there may be no row yet; it goes with the transaction.
const LOCK_PARKING: &str = "\
    /* batch::load lock parking */
    SELECT pg_advisory_xact_lock(7236102, w.key)
    FROM (
        SELECT DISTINCT hashtext(w.enterprise_id) AS key
        FROM unnest($1::text[]) AS w (enterprise_id)
        ORDER BY key
    ) AS w";

const LOAD_PARKED_COUNTS: &str = "\
    /* batch::load parked counts */
    SELECT enterprise_id, count(*), sum(bytes)::bigint
    FROM settled.parked
    WHERE enterprise_id = ANY ($1)
    GROUP BY enterprise_id";

fn load_allocations(lock: bool) -> String {
    let rest = if lock {
        "WHERE a.id = ANY ($1) ORDER BY a.id FOR NO KEY UPDATE OF a"
    } else {
        "WHERE a.id = ANY ($1)"
    };
    select_allocations("batch::load allocations", rest)
}

fn load_receipts(lock: bool) -> String {
    let rest = if lock { "ORDER BY key FOR NO KEY UPDATE" } else { "" };
    format!(
        "/* batch::load receipts */
        SELECT key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
               public_key, first_seen, last_seen
        FROM settled.receipts
        WHERE key = ANY ($1)
        {rest}"
    )
}

/// Loads what the batch may touch. Locks first, and the rest in later statements, so that they see what committed while
/// the locks were awaited. One round trip; a second one only where a message names an allocation that is not there, since
/// it may be parked: who parks is locked then, and the rest is loaded anew.
async fn load(session: &Session, batch: &[Judged<'_>], patience: Option<Duration>) -> Result<Snapshot, StoreError> {
    let wanted = &Wanted::of(batch);
    let lock = patience.is_some();
    let (allocations, receipts) = (load_allocations(lock), load_receipts(lock));
    for sql in [
        &allocations,
        &receipts,
        LOAD_PARTNERS,
        LOAD_PARKED,
        LOAD_NOW,
        LOCK_PARKING,
        LOAD_PARKED_COUNTS,
        LOAD_DISTRUSTED,
    ] {
        session.prepare(sql).await?;
    }
    let allocation_ids: Vec<Uuid> = wanted.allocations.iter().copied().collect();
    let keys: Vec<Uuid> = wanted.receipts.iter().copied().collect();
    let begin = async {
        if let Some(patience) = patience {
            session.begin_impatient(patience).await?;
            session.pass(Point::AfterBegin).await
        } else {
            session.begin_read_only().await
        }
    };
    let answers = join!(
        begin,
        async { session.query(&allocations, &[&allocation_ids]).await },
        async { session.query(&receipts, &[&keys]).await },
        load_rest(session, wanted, &keys),
    );
    answers.0?;
    let mut snapshot = Snapshot::default();
    for row in answers.1? {
        let allocation = allocation(session, &row)?;
        snapshot.allocations.insert(allocation.id, Arc::new(allocation));
    }
    for row in answers.2? {
        let (key, receipt) = receipt(session, &row)?;
        snapshot.receipts.insert(key, receipt);
    }
    let mut rest = answers.3?;
    let unknown: BTreeSet<&str> = wanted
        .spoken_of
        .iter()
        .filter(|(_, id)| !snapshot.allocations.contains_key(id))
        .map(|(enterprise_id, _)| enterprise_id.as_str())
        .collect();
    if !session.skips(unknown.is_empty()) {
        let enterprises: Vec<&str> = unknown.into_iter().collect();
        let answers = join!(
            async {
                if !lock {
                    return Ok(Vec::new());
                }
                session.query(LOCK_PARKING, &[&enterprises]).await
            },
            load_rest(session, wanted, &keys),
            async { session.query(LOAD_PARKED_COUNTS, &[&enterprises]).await },
        );
        answers.0?;
        rest = answers.1?;
        for row in answers.2? {
            let count: i64 = row.get(1);
            snapshot
                .parked_counts
                .insert(row.get(0), u64::try_from(count).unwrap_or_default());
            let bytes: i64 = row.get(2);
            snapshot
                .parked_bytes
                .insert(row.get(0), u64::try_from(bytes).unwrap_or_default());
        }
    }
    snapshot.distrusted = load_distrusted(session, batch, &rest.reinstated).await?;
    snapshot.parked_bytes_of_all = session.parked_bytes;
    snapshot.partners = rest.partners;
    snapshot.parked = rest.parked;
    snapshot.now = rest.now;
    session.pass(Point::AfterLoad).await?;
    Ok(snapshot)
}

/// What is loaded after the locks.
struct Rest {
    partners: HashMap<String, Partner>,
    /// Keys that were revoked once and are not any more.
    reinstated: HashSet<PublicKey>,
    parked: HashMap<ReceiptKey, Parked>,
    now: Timestamp,
}

async fn load_rest(session: &Session, wanted: &Wanted, keys: &[Uuid]) -> Result<Rest, StoreError> {
    let enterprises: Vec<&str> = wanted.enterprises.iter().map(String::as_str).collect();
    let answers = join!(
        async { session.query(LOAD_PARTNERS, &[&enterprises]).await },
        async { session.query(LOAD_PARKED, &[&keys]).await },
        async { session.query(LOAD_NOW, &[]).await },
    );
    let mut partners = HashMap::new();
    let mut reinstated = HashSet::new();
    for row in answers.0? {
        let partner = partners.entry(row.get("enterprise_id")).or_insert_with(|| Partner {
            broker_user: row.get("broker_user"),
            suspended: row.get("suspended"),
            async_allocations: row.get("async_allocations"),
            async_deallocations: row.get("async_deallocations"),
            keys: Vec::new(),
            revoked: Vec::new(),
        });
        if let Some(bytes) = row.get::<_, Option<&[u8]>>("public_key") {
            let key = public_key(session, bytes)?;
            if row.get("revoked") {
                partner.revoked.push(key);
            } else {
                partner.keys.push(key);
                if row.get("reinstated") {
                    reinstated.insert(key);
                }
            }
        }
    }
    let mut parked = HashMap::new();
    for row in answers.1? {
        let attempts: i32 = row.get("attempts");
        let waiting = Parked {
            seq: row.get("seq"),
            parked_at: row.get("parked_at"),
            until: row.get("until"),
            attempts: u32::try_from(attempts).unwrap_or_default(),
            // What a later version wrote is best effort like every reply.
            also: row
                .get::<_, Option<&str>>("also_reply")
                .and_then(|text| serde_json::from_str(text).ok()),
        };
        parked.insert(ReceiptKey(row.get("key")), waiting);
    }
    let now = answers.2?.first().map_or(Timestamp::UNIX_EPOCH, |row| row.get(0));
    Ok(Rest {
        partners,
        reinstated,
        parked,
        now,
    })
}

/// Which of a batch's signed texts were refused because their key, reinstated since, was revoked.
async fn load_distrusted(
    session: &Session,
    batch: &[Judged<'_>],
    reinstated: &HashSet<PublicKey>,
) -> Result<HashSet<(PublicKey, [u8; 32])>, StoreError> {
    if session.skips(reinstated.is_empty()) {
        return Ok(HashSet::new());
    }
    let contents = batch.iter().filter_map(|message| message.facts.content.as_ref().ok());
    let (keys, digests): (Vec<&[u8]>, Vec<&[u8]>) = contents
        .filter_map(|content| match &content.signer {
            Signer::Key(key) if reinstated.contains(key) => {
                Some((key.as_bytes().as_slice(), content.payload_digest.as_slice()))
            }
            Signer::Key(_) | Signer::Malformed(_) | Signer::Unrecoverable | Signer::Unread => None,
        })
        .unzip();
    if session.skips(keys.is_empty()) {
        return Ok(HashSet::new());
    }
    let mut distrusted = HashSet::new();
    for row in session.query(LOAD_DISTRUSTED, &[&keys, &digests]).await? {
        let digest = row.get::<_, &[u8]>(1).try_into();
        let digest = digest.map_err(|_| corrupt(session, "a digest"))?;
        distrusted.insert((public_key(session, row.get(0))?, digest));
    }
    Ok(distrusted)
}

fn corrupt(session: &Session, what: &str) -> StoreError {
    StoreError::new(
        session.name,
        Fate::Ours,
        format!("the database holds {what} that this version can not read"),
    )
}

fn public_key(session: &Session, bytes: &[u8]) -> Result<PublicKey, StoreError> {
    PublicKey::stored(bytes).ok_or_else(|| corrupt(session, "a public key"))
}

/// A row's columns one after another, in the order of its SELECT. To find each by its name takes a microsecond a row.
struct InOrder<'a> {
    row: &'a Row,
    next: usize,
}

impl<'a> InOrder<'a> {
    fn of(row: &'a Row) -> Self {
        Self { row, next: 0 }
    }

    fn take<T: FromSql<'a>>(&mut self) -> T {
        let value = self.row.get(self.next);
        self.next += 1;
        value
    }
}

/// Reads a row of [`select_allocations`].
pub(super) fn allocation(session: &Session, row: &Row) -> Result<Allocation, StoreError> {
    let read = || {
        let mut column = InOrder::of(row);
        // In the order of ALLOCATION_COLUMNS: the fields of a literal are read as they are written.
        Some(Allocation {
            id: column.take(),
            kind: Kind::parse(column.take())?,
            status: Status::parse(column.take())?,
            amount: Amount {
                currency: column.take(),
                quantity: Quantity::parse(column.take()).ok()?,
            },
            connection_id: column.take(),
            client_id: column.take(),
            client_external_id: column.take(),
            initiated_by: column.take(),
            notes: column.take(),
            reason: column.take(),
            retriable: column.take(),
            partner_external_id: column.take(),
            evaluation_id: column.take(),
            pending_approval_id: column.take(),
            policy_result: match column.take::<Option<&str>>() {
                Some(text) => Some(PolicyResult::parse(text)?),
                None => None,
            },
            settled_nonce: column.take(),
            created_at: column.take(),
            updated_at: column.take(),
            available_account: column.take(),
            held_account: column.take(),
            allocated_account: column.take(),
            enterprise_id: column.take(),
            partners_client_id: column.take(),
            partners_connection_id: column.take(),
        })
    };
    read().ok_or_else(|| corrupt(session, "an allocation"))
}

/// Reads a row of [`load_receipts`], its key apart.
fn receipt(session: &Session, row: &Row) -> Result<(ReceiptKey, Receipt), StoreError> {
    let read = || {
        let mut column = InOrder::of(row);
        let key = ReceiptKey(column.take());
        // In the order of the SELECT.
        let receipt = Receipt {
            enterprise_id: column.take(),
            nonce: column.take(),
            payload_digest: column.take::<&[u8]>().try_into().ok()?,
            message_digest: column.take::<&[u8]>().try_into().ok()?,
            verdict: VerdictKind::parse(column.take())?,
            reason: match column.take::<Option<&str>>() {
                Some(text) => Some(Reason::parse(text)?),
                None => None,
            },
            allocation_id: column.take(),
            event_id: column.take(),
            public_key: PublicKey::stored(column.take())?,
            first_seen: column.take(),
            last_seen: column.take(),
        };
        Some((key, receipt))
    };
    read().ok_or_else(|| corrupt(session, "a receipt"))
}

impl Store {
    /// Opens the transaction `settle_batch` and loads what the batch may touch.
    ///
    /// # Errors
    /// No connection, or the load failed.
    pub async fn open_batch(&self, batch: &[Judged<'_>]) -> Result<(OpenBatch, Snapshot), StoreError> {
        let session = self.session("settle_batch").await?;
        let snapshot = load(&session, batch, Some(self.lock_patience)).await?;
        Ok((OpenBatch { session }, snapshot))
    }

    /// The same snapshot for a judgement without effect: no locks, nothing written.
    ///
    /// # Errors
    /// No connection, or the load failed.
    pub async fn snapshot(&self, batch: &[Judged<'_>]) -> Result<Snapshot, StoreError> {
        let session = self.session("explain").await?;
        let snapshot = load(&session, batch, None).await?;
        session.rollback().await;
        Ok(snapshot)
    }
}

impl Store {
    /// Opens a transaction that will be undone: what a batch asks of the database, tried out before a message is in hand.
    /// Every statement runs, even one without rows, so that what is missing (a grant, a table, a column) shows.
    ///
    /// # Errors
    /// What the batch would meet.
    pub async fn open_rehearsal(&self, batch: &[Judged<'_>]) -> Result<(OpenBatch, Snapshot), StoreError> {
        let mut session = self.session("rehearse").await?;
        session.rehearsal = true;
        let snapshot = load(&session, batch, Some(self.lock_patience)).await?;
        Ok((OpenBatch { session }, snapshot))
    }
}

/// The transaction between load and write. Dropped, it leaves no trace.
pub struct OpenBatch {
    session: Session,
}

/// A batch's outcome, ready to be written.
pub struct Outcome<'a> {
    /// Made before the transaction; the first row written carries it.
    pub id: BatchId,
    pub worker: &'a str,
    /// The door it came through: `queue` (also of what was held since), `parked` or `replayed`.
    pub source: &'static str,
    pub now: Timestamp,
    pub batch: &'a [Judged<'a>],
    pub judgements: &'a [Judgement],
    pub changes: &'a Changeset,
    /// Events and dead letters to publish once this is committed.
    pub publications: &'a [Publication],
    /// How long the writer owns the outbox row.
    pub lease: std::time::Duration,
    /// Outbox rows whose publications are all confirmed.
    pub published: &'a [BatchId],
}

impl OpenBatch {
    /// What was told before of what this batch refuses and parks; what was not is told by this batch, and remembered.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn remember(&self, id: BatchId, tellings: &Tellings) -> Result<Firsts, StoreError> {
        told::remember(&self.session, id, tellings).await
    }

    /// Writes the outcome and takes it back.
    ///
    /// # Errors
    /// What the batch would meet.
    pub async fn rehearse(self, outcome: &Outcome<'_>) -> Result<(), StoreError> {
        let mut done = write_all(&self.session, outcome).await;
        if done.is_ok() {
            done = held::rehearse(&self.session).await;
        }
        self.session.rollback().await;
        done
    }

    /// Lets go of everything.
    pub async fn leave(self) {
        self.session.rollback().await;
    }

    /// Writes the outcome and commits.
    ///
    /// # Errors
    /// With `at_commit` set, whether it committed is unknown: try again under the same id.
    pub async fn write(self, outcome: &Outcome<'_>) -> Result<(), StoreError> {
        if let Err(error) = write_all(&self.session, outcome).await {
            self.session.rollback().await;
            return Err(error);
        }
        self.session.pass(Point::BeforeCommit).await?;
        self.session.commit().await
    }
}

/// Every statement of the write, in the order in which they are sent.
const WRITES: [&str; 20] = [
    held::LEAVE,
    INSERT_BATCH,
    INSERT_RECEIPTS,
    UPDATE_RECEIPTS,
    UPDATE_ALLOCATIONS,
    INSERT_SETTLEMENTS,
    INSERT_TRANSFERS,
    LOCK_PARKED,
    UNPARK,
    PARK,
    PARK_ON,
    ASK_AGAIN,
    dead_letters::LOCK,
    dead_letters::JUDGE,
    DISTRUST,
    STILL_REVOKED,
    outbox::INSERT,
    outbox::DELETE,
    LOCK_ACCOUNTS,
    UPDATE_BALANCES,
];

/// Every statement of the write, sent together, in the order of the locks.
async fn write_all(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let changes = outcome.changes;
    let rulings = dead_letters::rulings(outcome);
    // On a fresh connection too they leave in this order, so that the first error is the cause.
    for sql in WRITES {
        session.prepare(sql).await?;
    }
    let written = join!(
        held::leave(session, outcome),
        insert_batch(session, outcome),
        insert_receipts(session, outcome),
        update_receipts(session, outcome),
        update_allocations(session, changes),
        insert_settlements(session, outcome),
        insert_transfers(session, outcome),
        lock_parked(session, changes),
        unpark(session, outcome),
        park(session, outcome),
        park_on(session, changes),
        ask_again(session, changes),
        dead_letters::lock(session, &rulings),
        dead_letters::judge(session, outcome, &rulings),
        distrust(session, outcome),
        still_revoked(session, changes),
        outbox::insert(session, outcome.id, outcome.publications, outcome.lease),
        delete_published(session, outcome.published),
        lock_accounts(session, changes),
        update_balances(session, changes),
    );
    let results = [
        written.0, written.1, written.2, written.3, written.4, written.5, written.6, written.7, written.8, written.9,
        written.10, written.11, written.12, written.13, written.14, written.15, written.16, written.17, written.18,
    ];
    results.into_iter().collect()
}

pub(super) const INSERT_BATCH: &str = "\
    /* batch::insert_batch */
    INSERT INTO settled.batches (
        id, worker, source, at, received, settled, duplicate, parked, rejected, reasons, letters
    )
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::jsonb, $11)";

const INSERT_RECEIPTS: &str = "\
    /* batch::insert_receipts */
    INSERT INTO settled.receipts (
        key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
        public_key, first_seen, last_seen, batch_id
    )
    SELECT n.*, $13
    FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::text[], $7::text[], $8::uuid[],
        $9::uuid[], $10::bytea[], $11::timestamptz[], $12::timestamptz[]
    ) AS n";

const UPDATE_RECEIPTS: &str = "\
    /* batch::update_receipts */
    UPDATE settled.receipts AS r
    SET message_digest = n.message_digest,
        verdict = n.verdict,
        reason = n.reason,
        allocation_id = n.allocation_id,
        event_id = n.event_id,
        public_key = n.public_key,
        last_seen = n.last_seen,
        batch_id = CASE WHEN (r.verdict, r.event_id) IS DISTINCT FROM (n.verdict, n.event_id)
                        THEN $8 ELSE r.batch_id END
    FROM unnest(
        $1::uuid[], $2::bytea[], $3::text[], $4::text[], $5::uuid[], $6::bytea[], $7::timestamptz[], $9::uuid[]
    ) AS n (key, message_digest, verdict, reason, event_id, public_key, last_seen, allocation_id)
    WHERE r.key = n.key";

const UPDATE_ALLOCATIONS: &str = "\
    /* batch::update_allocations */
    UPDATE settled.allocations AS a
    SET status = n.status,
        reason = n.reason,
        retriable = false,
        partner_external_id = n.partner_external_id,
        evaluation_id = n.evaluation_id,
        pending_approval_id = n.pending_approval_id,
        policy_result = n.policy_result,
        settled_nonce = n.nonce,
        updated_at = n.updated_at
    FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::timestamptz[]
    ) AS n (id, status, reason, partner_external_id, evaluation_id, pending_approval_id, policy_result, nonce,
            updated_at)
    WHERE a.id = n.id
      AND a.status = 'reserved'";

const INSERT_SETTLEMENTS: &str = "\
    /* batch::insert_settlements */
    INSERT INTO settled.settlements (
        allocation_id, enterprise_id, nonce, payload, signature, public_key, batch_id, settled_at
    )
    SELECT n.*, $7, $8
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::bytea[]) AS n";

const INSERT_TRANSFERS: &str = "\
    /* batch::insert_transfers */
    WITH made AS (
        INSERT INTO settled.transfers (
            subject_id, step, event, debit_account, credit_account, amount, batch_id, created_at
        )
        SELECT n.subject_id, 1, n.event, n.debit, n.credit, n.amount::numeric(78, 0), $6, $7
        FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::text[])
             AS n (subject_id, event, debit, credit, amount)
        RETURNING id, debit_account, credit_account, amount
    )
    INSERT INTO settled.entries (transfer_id, account_id, change)
    SELECT id, debit_account, -amount FROM made
    UNION ALL
    SELECT id, credit_account, amount FROM made";

const PARK: &str = "\
    /* batch::park */
    WITH made AS (
        INSERT INTO settled.parked (
            key, enterprise_id, nonce, allocation_id, exchange, routing_key, properties, body,
            parked_at, until, due_at, dead_letter_id, format, attempts
        )
        SELECT n.key, n.enterprise_id, n.nonce, n.allocation_id, n.exchange, n.routing_key, n.properties, n.body,
               n.parked_at, n.until, n.due_at,
               -- What was purged meanwhile takes no verdict: a refusal later makes a dead letter, as of any other message.
               (SELECT d.id FROM settled.dead_letters AS d WHERE d.id = n.dead_letter_id),
               $13::smallint, 0
        FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::bytea[],
            $9::timestamptz[], $10::timestamptz[], $11::timestamptz[], $12::uuid[]
        ) AS n (
            key, enterprise_id, nonce, allocation_id, exchange, routing_key, properties, body, parked_at, until, due_at,
            dead_letter_id
        )
        RETURNING key, allocation_id, parked_at
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT key, allocation_id, 'parked', parked_at FROM made";

const PARK_ON: &str = "\
    /* batch::park_on */
    UPDATE settled.parked AS p
    SET attempts = n.attempts,
        due_at = CASE WHEN p.due_at < p.leased_until THEN p.due_at ELSE n.due_at END,
        leased_until = NULL
    FROM unnest($1::uuid[], $2::integer[], $3::timestamptz[]) AS n (key, attempts, due_at)
    WHERE p.key = n.key";

const ASK_AGAIN: &str = "\
    /* batch::ask_again */
    UPDATE settled.parked AS p
    SET also_reply = n.reply
    FROM unnest($1::uuid[], $2::text[]) AS n (key, reply)
    WHERE p.key = n.key";

const UNPARK: &str = "\
    /* batch::unpark */
    WITH gone AS (
        DELETE FROM settled.parked AS p
        USING unnest($1::uuid[], $3::bigint[]) AS n (key, seq)
        WHERE p.key = n.key
          AND p.seq = n.seq
        RETURNING p.key, p.allocation_id
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT key, allocation_id, 'left', $2 FROM gone";

const LOCK_ACCOUNTS: &str = "\
    /* batch::lock_accounts */
    SELECT FROM settled.accounts WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE";

const UPDATE_BALANCES: &str = "\
    /* batch::update_balances */
    UPDATE settled.accounts AS a
    SET balance = a.balance + n.change::numeric
    FROM unnest($1::bigint[], $2::text[]) AS n (id, change)
    WHERE a.id = n.id";

/// In key order, so that two batches never wait for each other. Of each key as many as are remembered.
const DISTRUST: &str = "\
    /* batch::distrust */
    WITH room AS MATERIALIZED (
        SELECT k.public_key
        FROM (SELECT DISTINCT unnest($1::bytea[])) AS k (public_key)
        WHERE (
            SELECT count(*)
            FROM (SELECT FROM settled.distrusted AS d WHERE d.public_key = k.public_key LIMIT $4) AS known
        ) < $4
    )
    INSERT INTO settled.distrusted (public_key, payload_digest, at)
    SELECT n.public_key, n.payload_digest, $3
    FROM unnest($1::bytea[], $2::bytea[]) AS n (public_key, payload_digest)
    JOIN room AS r ON r.public_key = n.public_key
    ORDER BY n.public_key, n.payload_digest
    ON CONFLICT DO NOTHING";

/// A later statement than the one that adds to what is distrusted: that waits for whoever reinstates the key just now.
const STILL_REVOKED: &str = "\
    /* batch::still_revoked */
    SELECT count(*) FROM settled.partner_keys WHERE public_key = ANY ($1) AND revoked_at IS NOT NULL";

async fn distrust(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let refused = &outcome.changes.distrusted;
    if session.skips(refused.is_empty()) {
        return Ok(());
    }
    let (keys, digests): (Vec<&[u8]>, Vec<&[u8]>) = refused
        .iter()
        .map(|(key, digest)| (key.as_bytes().as_slice(), digest.as_slice()))
        .unzip();
    session
        .execute(DISTRUST, &[&keys, &digests, &outcome.now, &REMEMBERED_MAX])
        .await
        .map(drop)
}

/// A key that was reinstated while the batch was judged: what it signed is judged again, and was never refused.
async fn still_revoked(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    let keys: BTreeSet<&[u8]> = changes
        .distrusted
        .iter()
        .map(|(key, _)| key.as_bytes().as_slice())
        .collect();
    if session.skips(keys.is_empty()) {
        return Ok(());
    }
    let keys: Vec<&[u8]> = keys.into_iter().collect();
    let rows = session.query(STILL_REVOKED, &[&keys]).await?;
    let count: i64 = rows.first().map_or(0, |row| row.get(0));
    if usize::try_from(count) == Ok(keys.len()) {
        return Ok(());
    }
    session.poison();
    let sentence = "a key was reinstated while what it signed was refused";
    Err(StoreError::new(session.name, Fate::Retry, sentence))
}

async fn delete_published(session: &Session, ids: &[BatchId]) -> Result<(), StoreError> {
    outbox::delete(session, ids).await?;
    if ids.is_empty() {
        return Ok(());
    }
    session.pass(Point::OutboxDeleted).await
}

async fn insert_batch(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let Outcome { id, worker, source, .. } = *outcome;
    let letters = event::letters_of(outcome.publications);
    count_batch(session, id, worker, source, outcome.now, outcome.judgements, letters).await?;
    session.pass(Point::BatchInserted).await
}

/// Writes the batch's own row: how many came, and to what.
pub(super) async fn count_batch(
    session: &Session,
    id: BatchId,
    worker: &str,
    source: &str,
    now: Timestamp,
    judgements: &[Judgement],
    letters: usize,
) -> Result<(), StoreError> {
    let mut verdicts = BTreeMap::<VerdictKind, i32>::new();
    let mut reasons = BTreeMap::<&str, u32>::new();
    for Judgement { verdict, .. } in judgements {
        *verdicts.entry(verdict.kind()).or_default() += 1;
        if verdict.kind() == VerdictKind::Rejected
            && let Some(reason) = verdict.reason()
        {
            *reasons.entry(reason.as_str()).or_default() += 1;
        }
    }
    let count = |kind| verdicts.get(&kind).copied().unwrap_or_default();
    let received = i32::try_from(judgements.len()).unwrap_or(i32::MAX);
    let reasons = serde_json::to_string(&reasons).unwrap_or_default();
    session
        .execute_exactly(
            1,
            INSERT_BATCH,
            &[
                &id,
                &worker,
                &source,
                &now,
                &received,
                &count(VerdictKind::Settled),
                &count(VerdictKind::Duplicate),
                &count(VerdictKind::Parked),
                &count(VerdictKind::Rejected),
                &reasons,
                &i32::try_from(letters).unwrap_or(i32::MAX),
            ],
        )
        .await
}

/// Receipts as columns.
#[derive(Default)]
struct ReceiptColumns<'a> {
    keys: Vec<Uuid>,
    enterprise_ids: Vec<&'a str>,
    nonces: Vec<&'a str>,
    payload_digests: Vec<&'a [u8]>,
    message_digests: Vec<&'a [u8]>,
    verdicts: Vec<&'static str>,
    reasons: Vec<Option<&'static str>>,
    allocation_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
    public_keys: Vec<&'a [u8]>,
    first_seen: Vec<Timestamp>,
    last_seen: Vec<Timestamp>,
}

impl<'a> ReceiptColumns<'a> {
    fn of(receipts: &'a BTreeMap<ReceiptKey, Receipt>) -> Self {
        let mut columns = Self::default();
        for (key, receipt) in receipts {
            columns.keys.push(key.0);
            columns.enterprise_ids.push(&receipt.enterprise_id);
            columns.nonces.push(&receipt.nonce);
            columns.payload_digests.push(&receipt.payload_digest);
            columns.message_digests.push(&receipt.message_digest);
            columns.verdicts.push(receipt.verdict.as_str());
            columns.reasons.push(receipt.reason.map(Reason::as_str));
            columns.allocation_ids.push(receipt.allocation_id);
            columns.event_ids.push(receipt.event_id);
            columns.public_keys.push(receipt.public_key.as_bytes());
            columns.first_seen.push(receipt.first_seen);
            columns.last_seen.push(receipt.last_seen);
        }
        columns
    }
}

async fn insert_receipts(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let receipts = &outcome.changes.new_receipts;
    if session.skips(receipts.is_empty()) {
        return Ok(());
    }
    let columns = ReceiptColumns::of(receipts);
    session
        .execute_exactly(
            receipts.len(),
            INSERT_RECEIPTS,
            &[
                &columns.keys,
                &columns.enterprise_ids,
                &columns.nonces,
                &columns.payload_digests,
                &columns.message_digests,
                &columns.verdicts,
                &columns.reasons,
                &columns.allocation_ids,
                &columns.event_ids,
                &columns.public_keys,
                &columns.first_seen,
                &columns.last_seen,
                &outcome.id,
            ],
        )
        .await?;
    session.pass(Point::ReceiptsInserted).await
}

/// A receipt that is only seen again keeps the batch that gave its verdict.
async fn update_receipts(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let receipts = &outcome.changes.changed_receipts;
    if session.skips(receipts.is_empty()) {
        return Ok(());
    }
    let columns = ReceiptColumns::of(receipts);
    session
        .execute_exactly(
            receipts.len(),
            UPDATE_RECEIPTS,
            &[
                &columns.keys,
                &columns.message_digests,
                &columns.verdicts,
                &columns.reasons,
                &columns.event_ids,
                &columns.public_keys,
                &columns.last_seen,
                &outcome.id,
                &columns.allocation_ids,
            ],
        )
        .await?;
    session.pass(Point::ReceiptsUpdated).await
}

/// `status = 'reserved'` is the second guard: an allocation leaves it at most once.
async fn update_allocations(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    if session.skips(changes.settlements.is_empty()) {
        return Ok(());
    }
    let each = || changes.settlements.iter().map(|settlement| &settlement.allocation);
    let ids: Vec<Uuid> = each().map(|allocation| allocation.id).collect();
    let statuses: Vec<&str> = each().map(|allocation| allocation.status.as_str()).collect();
    let reasons: Vec<Option<&str>> = each().map(|allocation| allocation.reason.as_deref()).collect();
    let partner_ids: Vec<Option<&str>> = each()
        .map(|allocation| allocation.partner_external_id.as_deref())
        .collect();
    let evaluations: Vec<Option<&str>> = each().map(|allocation| allocation.evaluation_id.as_deref()).collect();
    let approvals: Vec<Option<&str>> = each()
        .map(|allocation| allocation.pending_approval_id.as_deref())
        .collect();
    let policies: Vec<Option<&str>> = each()
        .map(|allocation| allocation.policy_result.map(PolicyResult::as_str))
        .collect();
    let nonces: Vec<Option<&str>> = each().map(|allocation| allocation.settled_nonce.as_deref()).collect();
    let times: Vec<Timestamp> = each().map(|allocation| allocation.updated_at).collect();
    session
        .execute_exactly(
            ids.len(),
            UPDATE_ALLOCATIONS,
            &[
                &ids,
                &statuses,
                &reasons,
                &partner_ids,
                &evaluations,
                &approvals,
                &policies,
                &nonces,
                &times,
            ],
        )
        .await?;
    session.pass(Point::AllocationsUpdated).await
}

async fn insert_settlements(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let settlements = &outcome.changes.settlements;
    if session.skips(settlements.is_empty()) {
        return Ok(());
    }
    let ids: Vec<Uuid> = settlements.iter().map(|settlement| settlement.allocation.id).collect();
    let updates = || settlements.iter().map(|settlement| &settlement.content.update);
    let enterprises: Vec<&str> = updates().map(|update| update.enterprise_id.as_str()).collect();
    let nonces: Vec<&str> = updates().map(|update| update.nonce.as_str()).collect();
    let payloads: Vec<&str> = updates().map(|update| update.payload.as_str()).collect();
    let signatures: Vec<Option<[u8; 65]>> = updates().map(|update| signature_bytes(&update.signature)).collect();
    let signatures: Vec<Option<&[u8]>> = signatures
        .iter()
        .map(|bytes| bytes.as_ref().map(<[u8; 65]>::as_slice))
        .collect();
    let keys: Vec<&[u8]> = settlements
        .iter()
        .map(|settlement| settlement.public_key.as_bytes().as_slice())
        .collect();
    session
        .execute_exactly(
            ids.len(),
            INSERT_SETTLEMENTS,
            &[
                &ids,
                &enterprises,
                &nonces,
                &payloads,
                &signatures,
                &keys,
                &outcome.id,
                &outcome.now,
            ],
        )
        .await?;
    session.pass(Point::SettlementsInserted).await
}

async fn insert_transfers(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let settlements = &outcome.changes.settlements;
    if session.skips(settlements.is_empty()) {
        return Ok(());
    }
    let each = || settlements.iter().map(|settlement| &settlement.transfer);
    let subjects: Vec<Uuid> = each().map(|transfer| transfer.allocation_id).collect();
    let events: Vec<&str> = settlements
        .iter()
        .map(|settlement| settlement.allocation.status.as_str())
        .collect();
    let debits: Vec<i64> = each().map(|transfer| transfer.debit.1).collect();
    let credits: Vec<i64> = each().map(|transfer| transfer.credit.1).collect();
    let amounts: Vec<String> = each().map(|transfer| transfer.amount.quantity.to_string()).collect();
    session
        .execute_exactly(
            subjects.len() * 2,
            INSERT_TRANSFERS,
            &[
                &subjects,
                &events,
                &debits,
                &credits,
                &amounts,
                &outcome.id,
                &outcome.now,
            ],
        )
        .await?;
    session.pass(Point::TransfersInserted).await
}

const LOCK_PARKED: &str = "\
    /* batch::lock_parked */
    SELECT FROM settled.parked WHERE key = ANY ($1) ORDER BY key FOR UPDATE";

/// In key order, as settled.reserve() locks them to wake them.
async fn lock_parked(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    let keys: BTreeSet<Uuid> = changes
        .unparked
        .keys()
        .chain(changes.parked_later.keys())
        .chain(changes.asked_again.keys())
        .map(|key| key.0)
        .collect();
    if session.skips(keys.is_empty()) {
        return Ok(());
    }
    let keys: Vec<Uuid> = keys.into_iter().collect();
    session.query(LOCK_PARKED, &[&keys]).await.map(drop)
}

/// Keeps messages until their allocation is there: body and properties as received.
async fn park(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    let parked = &outcome.changes.newly_parked;
    if session.skips(parked.is_empty()) {
        return Ok(());
    }
    let rows: Vec<_> = parked
        .values()
        .filter_map(|new| outcome.batch.get(new.index).map(|message| (new, message.delivery)))
        .collect();
    let keys: Vec<Uuid> = rows.iter().map(|(new, _)| new.key.0).collect();
    let enterprises: Vec<&str> = rows.iter().map(|(new, _)| new.enterprise_id.as_str()).collect();
    let nonces: Vec<&str> = rows.iter().map(|(new, _)| new.nonce.as_str()).collect();
    let allocations: Vec<Uuid> = rows.iter().map(|(new, _)| new.allocation_id).collect();
    let exchanges: Vec<&str> = rows.iter().map(|(_, delivery)| delivery.exchange.as_str()).collect();
    let routing_keys: Vec<&str> = rows.iter().map(|(_, delivery)| delivery.routing_key.as_str()).collect();
    let properties: Vec<String> = rows
        .iter()
        .map(|(_, delivery)| outbox::properties_text(&delivery.properties))
        .collect();
    let bodies: Vec<&[u8]> = rows.iter().map(|(_, delivery)| delivery.body.as_slice()).collect();
    let parked_at: Vec<Timestamp> = rows.iter().map(|(new, _)| new.parked.parked_at).collect();
    let until: Vec<Timestamp> = rows.iter().map(|(new, _)| new.parked.until).collect();
    let due_at: Vec<Timestamp> = rows.iter().map(|(new, _)| new.due_at).collect();
    let dead_letters: Vec<Option<Uuid>> = rows.iter().map(|(_, delivery)| delivery.source.dead_letter()).collect();
    session
        .execute_exactly(
            parked.len(),
            PARK,
            &[
                &keys,
                &enterprises,
                &nonces,
                &allocations,
                &exchanges,
                &routing_keys,
                &properties,
                &bodies,
                &parked_at,
                &until,
                &due_at,
                &dead_letters,
                &outbox::FORMAT,
            ],
        )
        .await?;
    session.pass(Point::Parked).await
}

/// Lets messages wait on. One that was woken while it was judged stays due: see `parked.leased_until`.
async fn park_on(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    if session.skips(changes.parked_later.is_empty()) {
        return Ok(());
    }
    let keys: Vec<Uuid> = changes.parked_later.keys().map(|key| key.0).collect();
    let attempts: Vec<i32> = changes
        .parked_later
        .values()
        .map(|(attempts, _)| i32::try_from(*attempts).unwrap_or(i32::MAX))
        .collect();
    let due_at: Vec<Timestamp> = changes.parked_later.values().map(|(_, due_at)| *due_at).collect();
    session.execute(PARK_ON, &[&keys, &attempts, &due_at]).await?;
    session.pass(Point::ParkedOn).await
}

/// Keeps who asked last, so that both are answered. What this batch parked is there by now.
async fn ask_again(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    if session.skips(changes.asked_again.is_empty()) {
        return Ok(());
    }
    let keys: Vec<Uuid> = changes.asked_again.keys().map(|key| key.0).collect();
    let replies: Vec<String> = changes
        .asked_again
        .values()
        .map(|reply| serde_json::to_string(reply).unwrap_or_default())
        .collect();
    session.execute(ASK_AGAIN, &[&keys, &replies]).await.map(drop)
}

/// Ends the waiting. Another worker may have done so already: rows are not counted.
async fn unpark(session: &Session, outcome: &Outcome<'_>) -> Result<(), StoreError> {
    if session.skips(outcome.changes.unparked.is_empty()) {
        return Ok(());
    }
    let keys: Vec<Uuid> = outcome.changes.unparked.keys().map(|key| key.0).collect();
    let seqs: Vec<i64> = outcome.changes.unparked.values().copied().collect();
    session.execute(UNPARK, &[&keys, &outcome.now, &seqs]).await?;
    session.pass(Point::Unparked).await
}

/// An UPDATE FROM takes its rows in any order; locking them first, in id order, keeps batches from deadlocking. Accounts
/// come last because some of them are hot.
async fn lock_accounts(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    if session.skips(changes.balances.is_empty()) {
        return Ok(());
    }
    let ids: Vec<i64> = changes.balances.keys().copied().collect();
    session.query(LOCK_ACCOUNTS, &[&ids]).await.map(drop)
}

async fn update_balances(session: &Session, changes: &Changeset) -> Result<(), StoreError> {
    if session.skips(changes.balances.is_empty()) {
        return Ok(());
    }
    let ids: Vec<i64> = changes.balances.keys().copied().collect();
    let sums: Vec<String> = changes.balances.values().map(ToString::to_string).collect();
    session
        .execute_exactly(ids.len(), UPDATE_BALANCES, &[&ids, &sums])
        .await?;
    session.pass(Point::BalancesUpdated).await
}
