//! What a person asks afterwards: one allocation, one receipt, one life; the balances, and the proof that the books are
//! right. Read-only, and each answer is of one moment. [`Vitals`] is what `doctor` asks about the server itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Session, Store, StoreError,
    batch::{allocation, select_allocations},
    desk::{self, DeadLetter, Replayed},
    registry::time,
    told::{self, ToldRecord},
};
use crate::domain::{allocation::Allocation, decide::ReceiptKey, ledger::AccountKind};

/// How long a question that reads a whole table may take. The server's own limit is lifted for it.
const LONG: Duration = Duration::from_secs(6 * 60 * 60);

/// Rows of one kind that a life shows at most: a partner may ask for the same allocation again and again.
const LIFE_MAX: i64 = 500;

/// Problems that [`Store::check_books`] spells out; the rest is counted.
pub const PROBLEMS_MAX: usize = 100;

/// What became of one message, as kept for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReceiptRecord {
    pub enterprise_id: String,
    pub nonce: String,
    pub verdict: String,
    pub reason: Option<String>,
    pub payload_digest: String,
    pub message_digest: String,
    pub allocation_id: Uuid,
    pub event_id: Uuid,
    #[serde(serialize_with = "time")]
    pub first_seen: Timestamp,
    #[serde(serialize_with = "time")]
    pub last_seen: Timestamp,
    #[serde(skip)]
    pub key: Uuid,
    /// The batch that gave the verdict.
    #[serde(skip)]
    pub batch_id: Uuid,
}

const RECEIPT_COLUMNS: &str = "\
    key, enterprise_id, nonce, verdict, reason, payload_digest, message_digest, allocation_id, event_id, first_seen,
    last_seen, batch_id";

fn receipt(row: &Row) -> ReceiptRecord {
    ReceiptRecord {
        enterprise_id: row.get("enterprise_id"),
        nonce: row.get("nonce"),
        verdict: row.get("verdict"),
        reason: row.get("reason"),
        payload_digest: hex::encode(row.get::<_, &[u8]>("payload_digest")),
        message_digest: hex::encode(row.get::<_, &[u8]>("message_digest")),
        allocation_id: row.get("allocation_id"),
        event_id: row.get("event_id"),
        first_seen: row.get("first_seen"),
        last_seen: row.get("last_seen"),
        key: row.get("key"),
        batch_id: row.get("batch_id"),
    }
}

/// A step of a parked message: `parked`, `woken` or `left`.
#[derive(Clone, Debug)]
pub struct ParkingRecord {
    pub key: Uuid,
    pub allocation_id: Uuid,
    pub step: String,
    pub at: Timestamp,
}

/// A movement of an allocation's funds.
#[derive(Clone, Debug)]
pub struct TransferRecord {
    pub allocation_id: Uuid,
    /// `reserved`, `cleared` or `released`.
    pub event: String,
    pub debit: String,
    pub credit: String,
    pub currency: String,
    pub amount: String,
    /// The batch that settled it; none for the reservation.
    pub batch_id: Option<Uuid>,
    pub at: Timestamp,
}

/// What authorised a settlement.
#[derive(Clone, Debug)]
pub struct SettlementRecord {
    pub allocation_id: Uuid,
    pub enterprise_id: String,
    pub nonce: String,
    pub public_key: String,
    pub batch_id: Uuid,
    pub at: Timestamp,
}

/// A batch, and whether its publications still wait for the broker's confirms.
#[derive(Clone, Debug)]
pub struct BatchRecord {
    pub worker: String,
    /// `queue` or `parked`.
    pub source: String,
    pub at: Timestamp,
    pub pending: bool,
}

/// All that is known of some allocations and messages, of one moment.
#[derive(Clone, Debug, Default)]
pub struct Life {
    pub allocations: Vec<Allocation>,
    pub receipts: Vec<ReceiptRecord>,
    /// Every refusal and every parking, as it was told first.
    pub told: Vec<ToldRecord>,
    pub parkings: Vec<ParkingRecord>,
    pub transfers: Vec<TransferRecord>,
    pub settlements: Vec<SettlementRecord>,
    pub batches: BTreeMap<Uuid, BatchRecord>,
    pub dead_letters: Vec<DeadLetter>,
    /// With the dead letter that each is of.
    pub replays: Vec<(Uuid, Replayed)>,
    /// Batch and event of what the broker refused.
    pub set_aside: HashSet<(Uuid, Uuid)>,
    /// There was more than is shown.
    pub cut: bool,
}

/// Whose life.
#[derive(Clone, Debug)]
pub enum Subject {
    Allocation(Uuid),
    /// Of every partner that used it.
    Nonce(String),
    /// SHA-256 of a message or of a payload. Reads every receipt there is.
    Digest([u8; 32]),
}

impl Subject {
    fn allocation(&self) -> Option<Uuid> {
        match self {
            Subject::Allocation(id) => Some(*id),
            Subject::Nonce(_) | Subject::Digest(_) => None,
        }
    }

    fn digest(&self) -> Option<&[u8]> {
        match self {
            Subject::Digest(digest) => Some(digest),
            Subject::Allocation(_) | Subject::Nonce(_) => None,
        }
    }

    fn is_of(&self, dead_letter: &DeadLetter) -> bool {
        match self {
            Subject::Allocation(id) => dead_letter.allocation_id == Some(*id),
            Subject::Nonce(nonce) => dead_letter.nonce.as_ref() == Some(nonce),
            Subject::Digest(digest) => dead_letter.message_digest == hex::encode(digest),
        }
    }
}

/// One account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalanceRecord {
    pub account: String,
    /// The client of `available`, the connection of `held` and `allocated`.
    pub owner: Option<Uuid>,
    pub currency: String,
    pub balance: String,
}

/// What the books were found to be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Books {
    /// Sentences with the exact difference; at most [`PROBLEMS_MAX`], and then one that counts the rest.
    pub problems: Vec<String>,
    /// Rows looked at, by table.
    pub counted: BTreeMap<&'static str, i64>,
}

/// The server's own state, as far as settling depends on it.
#[derive(Clone, Debug)]
pub struct Vitals {
    /// `15.8 (Debian 15.8-0+deb12u1)`.
    pub version: String,
    /// `150008`.
    pub version_number: i32,
    /// A standby that follows another server: nothing can be written.
    pub read_only: bool,
    pub user: String,
    pub synchronous_commit: String,
    pub synchronous_standby_names: String,
    /// Standbys that follow this server now, and how many of them a commit may wait for.
    pub standbys: i64,
    pub synchronous_standbys: i64,
    pub fsync: bool,
    pub full_page_writes: bool,
    /// `origin`, unless somebody switched triggers off.
    pub replication_role: String,
}

/// A trigger that keeps rows from being changed: table, name, and the events it refuses (bits of `pg_trigger.tgtype`:
/// BEFORE 2, DELETE 8, UPDATE 16, TRUNCATE 32).
const GUARDS: [(&str, &str, i16); 12] = [
    ("transfers", "append_only", 58),
    ("entries", "append_only", 58),
    ("settlements", "append_only", 58),
    ("batches", "append_only", 58),
    ("deposits", "append_only", 58),
    ("parkings", "append_only", 58),
    ("holdings", "append_only", 58),
    ("receipts", "never_forgotten", 42),
    ("audit", "append_only", 58),
    ("audit_subjects", "append_only", 58),
    ("distrusted", "append_only", 58),
    ("told", "never_changed", 50),
];

/// What the program's user must be allowed, of tables and then of functions.
const TABLE_GRANTS: [(&str, &str); 28] = [
    ("refinery_schema_history", "SELECT"),
    ("partners", "SELECT"),
    ("partner_keys", "SELECT"),
    ("connections", "SELECT"),
    // The row locks of a batch are an UPDATE to the server.
    ("allocations", "SELECT, UPDATE"),
    ("accounts", "SELECT, UPDATE"),
    // RETURNING reads what was inserted.
    ("transfers", "SELECT, INSERT"),
    ("entries", "INSERT"),
    ("settlements", "INSERT"),
    ("batches", "INSERT"),
    ("receipts", "SELECT, INSERT, UPDATE"),
    ("parked", "SELECT, INSERT, UPDATE, DELETE"),
    ("parkings", "INSERT"),
    ("told", "SELECT, INSERT, DELETE"),
    ("held", "SELECT, INSERT, UPDATE, DELETE"),
    ("holdings", "INSERT"),
    ("outbox", "SELECT, INSERT, UPDATE, DELETE"),
    ("outbox_refused", "SELECT, INSERT"),
    ("dead_letters", "SELECT, INSERT, UPDATE, DELETE"),
    ("letters_taken", "SELECT, INSERT, UPDATE"),
    ("dead_letter_space", "SELECT, INSERT, DELETE"),
    ("plans", "SELECT, INSERT"),
    ("plan_items", "SELECT, INSERT"),
    ("runs", "SELECT, INSERT, UPDATE"),
    ("run_items", "SELECT, INSERT, UPDATE"),
    ("audit", "SELECT, INSERT"),
    ("audit_subjects", "SELECT, INSERT"),
    ("distrusted", "SELECT, INSERT"),
];
const FUNCTION_GRANTS: [&str; 2] = ["settled.deposit(uuid, text, numeric, text)", "settled.reserve(jsonb)"];

impl Session {
    /// Opens a transaction of one moment that may take long and changes nothing.
    async fn begin_long(&mut self) -> Result<(), StoreError> {
        self.deadline = LONG;
        self.begin_read_only().await?;
        self.execute("/* audit::begin_long */ SET LOCAL statement_timeout = 0", &[])
            .await?;
        // Sums over whole tables: hashes that stay in memory are worth it for one connection.
        self.execute("/* audit::begin_long */ SET LOCAL work_mem = '64MB'", &[])
            .await
            .map(drop)
    }
}

impl Store {
    /// One allocation.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn allocation(&self, id: Uuid) -> Result<Option<Allocation>, StoreError> {
        let session = self.session("allocation").await?;
        let rows = session
            .query(&select_allocations("audit::allocation", "WHERE a.id = $1"), &[&id])
            .await?;
        rows.first().map(|row| allocation(&session, row)).transpose()
    }

    /// What became of a nonce.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn receipt(&self, enterprise_id: &str, nonce: &str) -> Result<Option<ReceiptRecord>, StoreError> {
        let rows = self
            .session("receipt")
            .await?
            .query(
                &format!(
                    "/* audit::receipt */
                    SELECT {RECEIPT_COLUMNS}
                    FROM settled.receipts
                    WHERE key = $1"
                ),
                &[&ReceiptKey::new(enterprise_id, nonce).0],
            )
            .await?;
        Ok(rows.first().map(receipt))
    }

    /// Everything about some subjects, in one moment. A message brings its allocation along.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn life(&self, subjects: &[Subject]) -> Result<Life, StoreError> {
        let mut session = self.session("life").await?;
        session.begin_long().await?;
        let mut life = Life::default();
        let mut ids = BTreeSet::new();
        for subject in subjects {
            let rows = match subject {
                Subject::Allocation(id) => {
                    ids.insert(*id);
                    receipts_where(&session, "allocation_id = $1", &id).await?
                }
                Subject::Nonce(nonce) => {
                    let keys = keys_of(&session, nonce).await?;
                    receipts_where(&session, "key = ANY ($1)", &keys).await?
                }
                Subject::Digest(digest) => {
                    let digest = digest.as_slice();
                    receipts_where(&session, "message_digest = $1 OR payload_digest = $1", &digest).await?
                }
            };
            life.cut |= rows.len() > LIFE_MAX as usize;
            for row in rows.iter().take(LIFE_MAX as usize) {
                let receipt = receipt(row);
                ids.insert(receipt.allocation_id);
                life.receipts.push(receipt);
            }
        }
        let digests: Vec<&[u8]> = subjects.iter().filter_map(Subject::digest).collect();
        life.told = told::of_messages(&session, &digests, LIFE_MAX + 1).await?;
        // A body that is not the newest of its receipt's.
        let known: BTreeSet<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
        let proven = life.told.iter().filter(|told| told.proven);
        let keys: Vec<Uuid> = proven
            .filter_map(|told| told.key)
            .filter(|key| !known.contains(key))
            .collect();
        if !keys.is_empty() {
            for row in receipts_where(&session, "key = ANY ($1)", &keys).await? {
                let receipt = receipt(&row);
                ids.insert(receipt.allocation_id);
                life.receipts.push(receipt);
            }
        }
        life.receipts.sort_by_key(|receipt| (receipt.first_seen, receipt.key));
        life.receipts.dedup_by_key(|receipt| receipt.key);
        fill_refusals(&session, &mut life, subjects).await?;
        fill(&session, &mut life, ids.into_iter().collect()).await?;
        session.rollback().await;
        Ok(life)
    }

    /// How many publications are set aside because the broker refused them, and since when; none where there are none.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn outbox_refused(&self) -> Result<Option<(i64, Timestamp)>, StoreError> {
        let rows = self
            .session("outbox_refused")
            .await?
            .query(
                "/* audit::outbox_refused */ SELECT count(*), min(at) FROM settled.outbox_refused",
                &[],
            )
            .await?;
        Ok(rows
            .first()
            .and_then(|row| row.get::<_, Option<Timestamp>>(1).map(|oldest| (row.get(0), oldest))))
    }

    /// Every account's balance, by currency, kind and owner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn balances(&self) -> Result<Vec<BalanceRecord>, StoreError> {
        let mut session = self.session("balances").await?;
        session.begin_long().await?;
        let rows = session
            .query(
                "/* audit::balances */
                SELECT kind, owner, currency, balance::text AS balance
                FROM settled.accounts",
                &[],
            )
            .await?;
        session.rollback().await;
        let mut balances: Vec<BalanceRecord> = rows
            .iter()
            .map(|row| BalanceRecord {
                account: row.get("kind"),
                owner: row.get("owner"),
                currency: row.get("currency"),
                balance: row.get("balance"),
            })
            .collect();
        balances.sort_by(|left, right| {
            let place = |balance: &BalanceRecord| AccountKind::parse(&balance.account);
            (&left.currency, place(left), left.owner).cmp(&(&right.currency, place(right), right.owner))
        });
        Ok(balances)
    }

    /// Proves the books, all of them in one moment. Reads every row that moved money.
    ///
    /// # Errors
    /// The database is away or refuses. What is wrong with the books is no error.
    pub async fn check_books(&self) -> Result<Books, StoreError> {
        let mut session = self.session("check_books").await?;
        session.begin_long().await?;
        let mut books = Books::default();
        let mut found = 0_usize;
        for Proof { holds, wrong } in PROOFS {
            if let Some(holds) = holds {
                let rows = session
                    .query(&format!("/* audit::check_books holds */ {holds}"), &[])
                    .await?;
                if one(&session, &rows)?.get(0) {
                    continue;
                }
            }
            let rows = session
                .query(
                    &format!(
                        "/* audit::check_books */
                        SELECT problem, count(*) OVER () AS found
                        FROM ({wrong}) AS wrong (problem)
                        ORDER BY problem
                        LIMIT {PROBLEMS_MAX}"
                    ),
                    &[],
                )
                .await?;
            found += rows.first().map_or(0, |row| {
                usize::try_from(row.get::<_, i64>("found")).unwrap_or(usize::MAX)
            });
            let room = PROBLEMS_MAX - books.problems.len();
            books
                .problems
                .extend(rows.iter().take(room).map(|row| row.get::<_, String>("problem")));
        }
        if found > books.problems.len() {
            let rest = found - books.problems.len();
            books.problems.push(format!("and {rest} more problems like these"));
        }
        for table in COUNTED {
            let rows = session
                .query(
                    &format!("/* audit::check_books count */ SELECT count(*) FROM settled.{table}"),
                    &[],
                )
                .await?;
            books.counted.insert(table, rows.first().map_or(0, |row| row.get(0)));
        }
        session.rollback().await;
        Ok(books)
    }

    /// How the server is and how it is set up.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn vitals(&self) -> Result<Vitals, StoreError> {
        let session = self.session("vitals").await?;
        let rows = session
            .query(
                "/* audit::vitals */
                SELECT current_setting('server_version') AS version,
                       current_setting('server_version_num')::integer AS version_number,
                       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean AS read_only,
                       current_user::text AS \"user\",
                       current_setting('synchronous_commit') AS synchronous_commit,
                       current_setting('synchronous_standby_names') AS synchronous_standby_names,
                       (SELECT count(*) FROM pg_stat_replication) AS standbys,
                       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))
                           AS synchronous_standbys,
                       current_setting('fsync')::boolean AS fsync,
                       current_setting('full_page_writes')::boolean AS full_page_writes,
                       current_setting('session_replication_role') AS replication_role",
                &[],
            )
            .await?;
        let row = one(&session, &rows)?;
        Ok(Vitals {
            version: row.get("version"),
            version_number: row.get("version_number"),
            read_only: row.get("read_only"),
            user: row.get("user"),
            synchronous_commit: row.get("synchronous_commit"),
            synchronous_standby_names: row.get("synchronous_standby_names"),
            standbys: row.get("standbys"),
            synchronous_standbys: row.get("synchronous_standbys"),
            fsync: row.get("fsync"),
            full_page_writes: row.get("full_page_writes"),
            replication_role: row.get("replication_role"),
        })
    }

    /// The database's clock.
    ///
    /// # Errors
    /// The database is away.
    pub async fn clock(&self) -> Result<Timestamp, StoreError> {
        let session = self.session("clock").await?;
        let rows = session
            .query("/* audit::clock */ SELECT clock_timestamp()", &[])
            .await?;
        Ok(one(&session, &rows)?.get(0))
    }

    /// The triggers that are missing, switched off or not what they were, as `trigger append_only on settled.entries`.
    ///
    /// # Errors
    /// The database is away.
    pub async fn missing_guards(&self) -> Result<Vec<String>, StoreError> {
        let (tables, names): (Vec<&str>, Vec<&str>) = GUARDS.iter().map(|(table, name, _)| (*table, *name)).unzip();
        let events: Vec<i16> = GUARDS.iter().map(|(_, _, events)| *events).collect();
        let rows = self
            .session("missing_guards")
            .await?
            .query(
                "/* audit::missing_guards */
                SELECT format('trigger %s on settled.%s', w.name, w.table_name)
                FROM unnest($1::text[], $2::text[], $3::smallint[]) AS w (table_name, name, events)
                WHERE NOT EXISTS (
                    SELECT
                    FROM pg_trigger AS t
                    JOIN pg_class AS c ON c.oid = t.tgrelid AND c.relname = w.table_name
                    JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'settled'
                    JOIN pg_proc AS f ON f.oid = t.tgfoid
                    WHERE t.tgname = w.name
                      AND t.tgenabled IN ('O', 'A')
                      AND t.tgtype & w.events = w.events
                      AND t.tgqual IS NULL
                      AND f.proname = 'refuse_change'
                      AND f.prosrc ~ 'RAISE EXCEPTION'
                )
                ORDER BY w.table_name",
                &[&tables, &names, &events],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Whether this user could switch off what refuses change: it owns tables of ours, or may do anything.
    ///
    /// # Errors
    /// The database is away.
    pub async fn owns_tables(&self) -> Result<bool, StoreError> {
        let session = self.session("owns_tables").await?;
        let rows = session
            .query(
                "/* audit::owns_tables */
                SELECT EXISTS (
                    SELECT
                    FROM pg_class AS c
                    JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'settled'
                    WHERE c.relkind = 'r' AND pg_has_role(current_user, c.relowner, 'MEMBER')
                )",
                &[],
            )
            .await?;
        Ok(one(&session, &rows)?.get(0))
    }

    /// What this user is not allowed and needs, as `UPDATE on settled.receipts`.
    ///
    /// # Errors
    /// The database is away.
    pub async fn missing_grants(&self) -> Result<Vec<String>, StoreError> {
        let (tables, privileges): (Vec<&str>, Vec<&str>) = TABLE_GRANTS
            .iter()
            .flat_map(|(table, privileges)| privileges.split(", ").map(|privilege| (*table, privilege)))
            .unzip();
        let functions = FUNCTION_GRANTS.as_slice();
        let rows = self
            .session("missing_grants")
            .await?
            .query(
                // What does not exist is the schema's problem, not a missing grant.
                "/* audit::missing_grants */
                SELECT format('%s on settled.%s', w.privilege, w.table_name)
                FROM unnest($1::text[], $2::text[]) AS w (table_name, privilege)
                JOIN pg_class AS c ON c.relname = w.table_name
                JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'settled'
                WHERE NOT has_table_privilege(c.oid, w.privilege)
                UNION ALL
                SELECT 'EXECUTE on ' || w.signature
                FROM unnest($3::text[]) AS w (signature)
                WHERE EXISTS (SELECT FROM pg_namespace WHERE nspname = 'settled' AND has_schema_privilege(oid, 'USAGE'))
                  AND NOT has_function_privilege(to_regprocedure(w.signature), 'EXECUTE')
                UNION ALL
                SELECT 'USAGE on schema settled'
                FROM pg_namespace
                WHERE nspname = 'settled' AND NOT has_schema_privilege(oid, 'USAGE')
                ORDER BY 1",
                &[&tables, &privileges, &functions],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

fn one<'r>(session: &Session, rows: &'r [Row]) -> Result<&'r Row, StoreError> {
    rows.first().ok_or_else(|| {
        StoreError::new(
            session.name,
            super::Fate::Ours,
            "a question that has one answer had none",
        )
    })
}

async fn receipts_where(
    session: &Session,
    condition: &str,
    what: &(dyn tokio_postgres::types::ToSql + Sync),
) -> Result<Vec<Row>, StoreError> {
    session
        .query(
            &format!(
                "/* audit::life receipts */
                SELECT {RECEIPT_COLUMNS}
                FROM settled.receipts
                WHERE {condition}
                ORDER BY first_seen, key
                LIMIT {LIFE_MAX} + 1"
            ),
            &[what],
        )
        .await
}

/// The receipts that a nonce may have, one for each partner.
async fn keys_of(session: &Session, nonce: &str) -> Result<Vec<Uuid>, StoreError> {
    let rows = session
        .query(
            "/* audit::life partners */ SELECT enterprise_id FROM settled.partners",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| ReceiptKey::new(row.get(0), nonce).0).collect())
}

/// What hangs on receipts and allocations.
async fn fill(session: &Session, life: &mut Life, ids: Vec<Uuid>) -> Result<(), StoreError> {
    let rows = session
        .query(
            &select_allocations("audit::life allocations", "WHERE a.id = ANY ($1) ORDER BY a.id"),
            &[&ids],
        )
        .await?;
    for row in &rows {
        life.allocations.push(allocation(session, row)?);
    }
    let keys: Vec<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
    let rows = session
        .query(
            &format!(
                "/* audit::life parkings */
                SELECT key, allocation_id, step, at
                FROM settled.parkings
                WHERE key = ANY ($1)
                ORDER BY at, id
                LIMIT {LIFE_MAX} + 1"
            ),
            &[&keys],
        )
        .await?;
    life.cut |= rows.len() > LIFE_MAX as usize;
    life.parkings = rows
        .iter()
        .take(LIFE_MAX as usize)
        .map(|row| ParkingRecord {
            key: row.get("key"),
            allocation_id: row.get("allocation_id"),
            step: row.get("step"),
            at: row.get("at"),
        })
        .collect();
    let rows = session
        .query(
            "/* audit::life transfers */
            SELECT t.subject_id, t.event, d.kind AS debit, c.kind AS credit, d.currency, t.amount::text AS amount,
                   t.batch_id, t.created_at
            FROM settled.transfers AS t
            JOIN settled.accounts AS d ON d.id = t.debit_account
            JOIN settled.accounts AS c ON c.id = t.credit_account
            WHERE t.subject_id = ANY ($1)
            ORDER BY t.subject_id, t.step",
            &[&ids],
        )
        .await?;
    life.transfers = rows
        .iter()
        .map(|row| TransferRecord {
            allocation_id: row.get("subject_id"),
            event: row.get("event"),
            debit: row.get("debit"),
            credit: row.get("credit"),
            currency: row.get("currency"),
            amount: row.get("amount"),
            batch_id: row.get("batch_id"),
            at: row.get("created_at"),
        })
        .collect();
    let rows = session
        .query(
            "/* audit::life settlements */
            SELECT allocation_id, enterprise_id, nonce, public_key, batch_id, settled_at
            FROM settled.settlements
            WHERE allocation_id = ANY ($1)
            ORDER BY allocation_id",
            &[&ids],
        )
        .await?;
    life.settlements = rows
        .iter()
        .map(|row| SettlementRecord {
            allocation_id: row.get("allocation_id"),
            enterprise_id: row.get("enterprise_id"),
            nonce: row.get("nonce"),
            public_key: hex::encode(row.get::<_, &[u8]>("public_key")),
            batch_id: row.get("batch_id"),
            at: row.get("settled_at"),
        })
        .collect();
    fill_batches(session, life).await
}

/// What was refused and parked of these lives: as it was told, and as the dead letters keep it.
async fn fill_refusals(session: &Session, life: &mut Life, subjects: &[Subject]) -> Result<(), StoreError> {
    let is_too_many = |count: usize| count > LIFE_MAX as usize;
    // A message by its payload is known to the dead letters by its nonce, and by its body's digest.
    let mut wider = subjects.to_vec();
    for receipt in &life.receipts {
        wider.push(Subject::Nonce(receipt.nonce.clone()));
        wider.extend(digest(&receipt.message_digest).map(Subject::Digest));
    }
    let (mut dead_letters, replays) = desk::refusals(session, &wider, LIFE_MAX + 1).await?;
    life.cut |= is_too_many(dead_letters.len());
    // The same nonce of another partner's is another life, unless it was asked for.
    dead_letters.retain(|dead_letter| {
        subjects.iter().any(|subject| subject.is_of(dead_letter))
            || life.receipts.iter().any(|receipt| {
                let same = (dead_letter.enterprise_id.as_deref(), dead_letter.nonce.as_deref());
                same == (Some(&receipt.enterprise_id), Some(&receipt.nonce))
                    || dead_letter.message_digest == receipt.message_digest
            })
    });
    dead_letters.truncate(LIFE_MAX as usize);
    (life.dead_letters, life.replays) = (dead_letters, replays);

    let mut keys: Vec<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
    let named = |dead_letter: &DeadLetter| {
        let names = dead_letter.enterprise_id.as_deref().zip(dead_letter.nonce.as_deref());
        names.map(|(enterprise_id, nonce)| ReceiptKey::new(enterprise_id, nonce).0)
    };
    keys.extend(life.dead_letters.iter().filter_map(named));
    let allocations: Vec<Uuid> = subjects.iter().filter_map(Subject::allocation).collect();
    let told = told::of(session, &keys, &allocations, LIFE_MAX + 1).await?;
    life.told.extend(told);
    let digests: Vec<[u8; 32]> = life
        .dead_letters
        .iter()
        .filter(|dead_letter| dead_letter.nonce.is_none())
        .filter_map(|dead_letter| digest(&dead_letter.message_digest))
        .collect();
    let asked: BTreeSet<&[u8]> = subjects.iter().filter_map(Subject::digest).collect();
    let others: Vec<&[u8]> = digests
        .iter()
        .map(<[u8; 32]>::as_slice)
        .filter(|digest| !asked.contains(digest))
        .collect();
    life.told
        .extend(told::of_messages(session, &others, LIFE_MAX + 1).await?);
    life.told.sort_by_key(|told| (told.at, told.event_id));
    life.told.dedup_by_key(|told| told.event_id);
    life.cut |= is_too_many(life.told.len());
    life.told.truncate(LIFE_MAX as usize);
    Ok(())
}

fn digest(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

/// The batches, and what became of their publications.
async fn fill_batches(session: &Session, life: &mut Life) -> Result<(), StoreError> {
    let receipts = life.receipts.iter().map(|receipt| (receipt.batch_id, receipt.event_id));
    let told = life.told.iter().map(|told| (told.batch_id, told.event_id));
    let (batches, events): (Vec<Uuid>, Vec<Uuid>) = receipts.chain(told).unzip();
    let mut wanted: BTreeSet<Uuid> = batches.iter().copied().collect();
    wanted.extend(life.settlements.iter().map(|settlement| settlement.batch_id));
    let wanted: Vec<Uuid> = wanted.into_iter().collect();
    let rows = session
        .query(
            "/* audit::life batches */
            SELECT b.id, b.worker, b.source, b.at,
                   EXISTS (SELECT FROM settled.outbox AS o WHERE o.batch_id = b.id) AS pending
            FROM settled.batches AS b
            WHERE b.id = ANY ($1)",
            &[&wanted],
        )
        .await?;
    life.batches = rows
        .iter()
        .map(|row| {
            let batch = BatchRecord {
                worker: row.get("worker"),
                source: row.get("source"),
                at: row.get("at"),
                pending: row.get("pending"),
            };
            (row.get("id"), batch)
        })
        .collect();
    // A publication's head is JSON text and holds the event's id; few were ever refused.
    let rows = session
        .query(
            "/* audit::life set aside */
            SELECT DISTINCT w.batch_id, w.event_id
            FROM unnest($1::uuid[], $2::uuid[]) AS w (batch_id, event_id)
            JOIN settled.outbox_refused AS r ON r.batch_id = w.batch_id
            WHERE position(convert_to(w.event_id::text, 'UTF8') IN r.publications) > 0",
            &[&batches, &events],
        )
        .await?;
    life.set_aside = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    Ok(())
}

/// What [`Books::counted`] counts.
const COUNTED: [&str; 8] = [
    "accounts",
    "allocations",
    "batches",
    "deposits",
    "entries",
    "receipts",
    "settlements",
    "transfers",
];

/// What must never be found.
struct Proof {
    /// Whether all is well: the same proof by counting. A primary key on each side makes it as strict, and the server can share
    /// the work among processes, which it can not for a FULL JOIN. What is wrong is only looked for where something is.
    holds: Option<&'static str>,
    /// A query of one column: a sentence with the exact difference.
    wrong: &'static str,
}

impl Proof {
    const fn none_of(wrong: &'static str) -> Self {
        Self { holds: None, wrong }
    }
}

const PROOFS: [Proof; 13] = [
    // Per currency everything sums to zero.
    Proof::none_of(
        "SELECT format('currency %s: its entries sum to %s instead of 0', a.currency, sum(e.change))
    FROM settled.entries AS e
    JOIN settled.accounts AS a ON a.id = e.account_id
    GROUP BY a.currency
    HAVING sum(e.change) <> 0",
    ),
    // The two entries of each transfer, compared with what they must be, both ways.
    Proof {
        holds: Some(
            "SELECT (SELECT count(*) FROM settled.entries) = 2 * (SELECT count(*) FROM settled.transfers)
               AND (SELECT count(*) FROM settled.entries) = (
                   SELECT count(*)
                   FROM settled.entries AS e
                   JOIN settled.transfers AS t ON t.id = e.transfer_id
                   WHERE (e.account_id = t.debit_account AND e.change = -t.amount)
                      OR (e.account_id = t.credit_account AND e.change = t.amount)
               )",
        ),
        wrong: "SELECT CASE
        WHEN e.transfer_id IS NULL
        THEN format('transfer %s: its entry on account %s, %s, is missing', w.transfer_id, w.account_id, w.change)
        WHEN w.transfer_id IS NULL
        THEN format('entry of transfer %s on account %s, %s: no transfer asks for it',
                    e.transfer_id, e.account_id, e.change)
        ELSE format('transfer %s: its entry on account %s is %s instead of %s',
                    w.transfer_id, w.account_id, e.change, w.change)
    END
    FROM (
        SELECT id AS transfer_id, debit_account AS account_id, -amount AS change FROM settled.transfers
        UNION ALL
        SELECT id, credit_account, amount FROM settled.transfers
    ) AS w
    FULL JOIN settled.entries AS e ON e.transfer_id = w.transfer_id AND e.account_id = w.account_id
    WHERE e.change IS DISTINCT FROM w.change",
    },
    // Balances against entries.
    Proof::none_of(
        "SELECT CASE
        WHEN a.id IS NULL THEN format('account %s does not exist and has entries that sum to %s', e.account_id, e.total)
        ELSE format('account %s (%s of %s, %s): its balance is %s and its entries sum to %s',
                    a.id, a.kind, coalesce(a.owner::text, 'nobody'), a.currency, a.balance, coalesce(e.total, 0))
    END
    FROM settled.accounts AS a
    FULL JOIN (SELECT account_id, sum(change) AS total FROM settled.entries GROUP BY account_id) AS e
      ON e.account_id = a.id
    WHERE a.id IS NULL OR a.balance <> coalesce(e.total, 0)",
    ),
    // Nothing but the world outside owes anything.
    Proof::none_of(
        "SELECT format('account %s (%s of %s, %s): its balance is %s, which is negative',
                   id, kind, owner, currency, balance)
    FROM settled.accounts
    WHERE balance < 0 AND kind <> 'external'",
    ),
    // The accounts that an allocation names are those of its client and connection.
    Proof::none_of(
        "SELECT format('allocation %s: its %s account %s is not that of its client and connection', a.id, k.kind, k.account)
    FROM settled.allocations AS a
    JOIN settled.connections AS c ON c.connection_id = a.connection_id
    CROSS JOIN LATERAL (VALUES
        ('available', a.available_account, c.client_id),
        ('held', a.held_account, c.connection_id),
        ('allocated', a.allocated_account, c.connection_id)
    ) AS k (kind, account, owner)
    LEFT JOIN settled.accounts AS x ON x.id = k.account
    WHERE (x.kind, x.owner, x.currency) IS DISTINCT FROM (k.kind, k.owner, a.currency)",
    ),
    Proof::none_of(
        "SELECT format('allocation %s: its client %s is not that of its connection (%s)', a.id, a.client_id, c.client_id)
    FROM settled.allocations AS a
    JOIN settled.connections AS c ON c.connection_id = a.connection_id
    WHERE a.client_id <> c.client_id",
    ),
    // The state of everything is the fold of its transfers: each transfer that must be there, and no other.
    Proof {
        holds: Some(
            "SELECT (SELECT count(*) FROM settled.transfers) = (
                   SELECT count(*) + count(*) FILTER (WHERE status <> 'reserved') FROM settled.allocations
               ) + (
                   SELECT count(*) FROM settled.deposits
               )
               AND (SELECT count(*) FROM settled.transfers) = (
                   SELECT count(*)
                   FROM settled.transfers AS t
                   JOIN settled.allocations AS a ON a.id = t.subject_id
                   WHERE t.amount = a.quantity
                     AND CASE t.step
                         WHEN 0 THEN t.event = 'reserved' AND t.credit_account = a.held_account
                              AND t.debit_account = CASE a.type WHEN 'allocation'
                                                    THEN a.available_account ELSE a.allocated_account END
                         ELSE a.status <> 'reserved' AND t.event = a.status AND t.debit_account = a.held_account
                              AND t.credit_account = CASE WHEN (a.type = 'allocation') = (a.status = 'cleared')
                                                     THEN a.allocated_account ELSE a.available_account END
                         END
               ) + (
                   SELECT count(*)
                   FROM settled.deposits AS d
                   JOIN settled.transfers AS t ON t.subject_id = d.id AND t.step = 0
                   JOIN settled.accounts AS x ON x.kind = 'external' AND x.currency = d.currency
                   JOIN settled.accounts AS v
                     ON v.kind = 'available' AND v.owner = d.client_id AND v.currency = d.currency
                   WHERE (t.event, t.debit_account, t.credit_account, t.amount) = ('deposit', x.id, v.id, d.quantity)
               )",
        ),
        wrong: "SELECT CASE
        WHEN t.id IS NULL
        THEN format('%s %s is %s, and its transfer (%s from account %s to account %s) is missing',
                    w.what, w.subject_id, w.status, w.amount, w.debit, w.credit)
        WHEN w.subject_id IS NULL
        THEN format('transfer %s (%s, %s from account %s to account %s) has no %s %s in that state',
                    t.id, t.event, t.amount, t.debit_account, t.credit_account,
                    CASE t.event WHEN 'deposit' THEN 'deposit' ELSE 'allocation' END, t.subject_id)
        ELSE format('transfer %s of %s %s is %s of %s from account %s to account %s instead of %s of %s from account %s to account %s',
                    t.id, w.what, w.subject_id, t.event, t.amount, t.debit_account, t.credit_account,
                    w.event, w.amount, w.debit, w.credit)
    END
    FROM (
        SELECT a.type AS what, a.status, a.id AS subject_id, 0::smallint AS step, 'reserved' AS event,
               CASE a.type WHEN 'allocation' THEN a.available_account ELSE a.allocated_account END AS debit,
               a.held_account AS credit, a.quantity AS amount
        FROM settled.allocations AS a
        UNION ALL
        SELECT a.type, a.status, a.id, 1::smallint, a.status,
               a.held_account,
               CASE WHEN (a.type = 'allocation') = (a.status = 'cleared')
                    THEN a.allocated_account ELSE a.available_account END,
               a.quantity
        FROM settled.allocations AS a
        WHERE a.status <> 'reserved'
        UNION ALL
        SELECT 'deposit', 'in', d.id, 0::smallint, 'deposit', x.id, v.id, d.quantity
        FROM settled.deposits AS d
        LEFT JOIN settled.accounts AS x ON x.kind = 'external' AND x.currency = d.currency
        LEFT JOIN settled.accounts AS v
          ON v.kind = 'available' AND v.owner = d.client_id AND v.currency = d.currency
    ) AS w
    FULL JOIN settled.transfers AS t ON t.subject_id = w.subject_id AND t.step = w.step
    WHERE (t.event, t.debit_account, t.credit_account, t.amount) IS DISTINCT FROM (w.event, w.debit, w.credit, w.amount)",
    },
    // An allocation that left reserved has what authorised it, and nothing else has.
    Proof::none_of(
        "SELECT CASE
        WHEN s.allocation_id IS NULL THEN format('%s %s is %s, and its settlement is missing', a.type, a.id, a.status)
        ELSE format('%s %s is %s (nonce %s, partner %s), and its settlement says nonce %s of partner %s',
                    a.type, a.id, a.status, a.settled_nonce, c.enterprise_id, s.nonce, s.enterprise_id)
    END
    FROM settled.allocations AS a
    LEFT JOIN settled.connections AS c ON c.connection_id = a.connection_id
    LEFT JOIN settled.settlements AS s ON s.allocation_id = a.id
    WHERE (s.allocation_id IS NOT NULL OR a.status <> 'reserved')
      AND (a.settled_nonce, c.enterprise_id) IS DISTINCT FROM (s.nonce, s.enterprise_id)
    UNION ALL
    SELECT format('the settlement of %s has no allocation', s.allocation_id)
    FROM settled.settlements AS s
    WHERE NOT EXISTS (SELECT FROM settled.allocations AS a WHERE a.id = s.allocation_id)",
    ),
    // Its transfer was made in the same batch.
    Proof::none_of(
        "SELECT format('settlement of %s: its batch is %s, and that of its transfer %s', s.allocation_id, s.batch_id,
                   coalesce(t.batch_id::text, 'none'))
    FROM settled.settlements AS s
    JOIN settled.transfers AS t ON t.subject_id = s.allocation_id AND t.step = 1
    WHERE t.batch_id IS DISTINCT FROM s.batch_id",
    ),
    // Every settled receipt has its settlement, and vice versa.
    Proof::none_of(
        "SELECT format('the receipt of nonce %s of partner %s says settled, and there is no settlement of %s by it',
                  r.nonce, r.enterprise_id, r.allocation_id)
    FROM settled.receipts AS r
    WHERE r.verdict = 'settled'
      AND NOT EXISTS (
          SELECT FROM settled.settlements AS s
          WHERE s.allocation_id = r.allocation_id AND s.enterprise_id = r.enterprise_id AND s.nonce = r.nonce
      )
    UNION ALL
    SELECT format('the settlement of %s has no settled receipt (nonce %s of partner %s)',
                  s.allocation_id, s.nonce, s.enterprise_id)
    FROM settled.settlements AS s
    WHERE NOT EXISTS (
        SELECT FROM settled.receipts AS r
        WHERE r.verdict = 'settled'
          AND r.allocation_id = s.allocation_id AND r.enterprise_id = s.enterprise_id AND r.nonce = s.nonce
    )",
    ),
    // Each batch accounts for every message.
    Proof::none_of(
        "SELECT format('batch %s: received %s, and its verdicts sum to %s',
                   id, received, settled + duplicate + parked + rejected)
    FROM settled.batches
    WHERE received <> settled + duplicate + parked + rejected",
    ),
    // And for every settlement.
    Proof::none_of(
        "SELECT format('batch %s: it says that it settled %s, and %s settlements are of it',
                   coalesce(b.id, s.batch_id), coalesce(b.settled::text, 'nothing (there is no such batch)'),
                   coalesce(s.total, 0))
    FROM settled.batches AS b
    FULL JOIN (SELECT batch_id, count(*) AS total FROM settled.settlements GROUP BY batch_id) AS s ON s.batch_id = b.id
    WHERE coalesce(b.settled, -1) <> coalesce(s.total, 0)",
    ),
    // And every rejection has a reason.
    Proof::none_of(
        "SELECT format('batch %s: it rejected %s, and its reasons sum to %s', b.id, b.rejected, coalesce(r.total, 0))
    FROM settled.batches AS b
    CROSS JOIN LATERAL (SELECT sum(value::numeric) AS total FROM jsonb_each_text(b.reasons)) AS r
    WHERE b.rejected <> coalesce(r.total, 0)",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_proof_is_one_query_that_names_the_difference() {
        for Proof { holds, wrong } in PROOFS {
            assert!(wrong.starts_with("SELECT ") && wrong.contains("format("), "{wrong}");
            assert!(!wrong.contains(';'), "{wrong}");
            assert!(holds.is_none_or(|holds| holds.starts_with("SELECT ") && !holds.contains(';')));
        }
    }
}
