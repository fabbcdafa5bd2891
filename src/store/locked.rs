//! What somebody's open transaction has locked. Asked only after a batch waited for a lock in vain.

use std::{collections::BTreeSet, time::Duration};

use futures_util::join;
use tokio_postgres::types::{FromSql, ToSql};
use uuid::Uuid;

use super::{Session, Store, StoreError};

/// Between two looks: who holds a lock in both, as the same transaction, does not let go of it soon.
const BETWEEN: Duration = Duration::from_millis(25);

/// Rows by their keys, and partners for whose parking somebody holds the lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locks {
    pub allocations: BTreeSet<Uuid>,
    pub receipts: BTreeSet<Uuid>,
    pub parked: BTreeSet<Uuid>,
    pub dead_letters: BTreeSet<Uuid>,
    pub funds: BTreeSet<i64>,
    pub parkings: BTreeSet<String>,
}

impl Locks {
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.allocations.len()
            + self.receipts.len()
            + self.parked.len()
            + self.dead_letters.len()
            + self.funds.len()
            + self.parkings.len()
    }

    pub fn extend(&mut self, more: Locks) {
        self.allocations.extend(more.allocations);
        self.receipts.extend(more.receipts);
        self.parked.extend(more.parked);
        self.dead_letters.extend(more.dead_letters);
        self.funds.extend(more.funds);
        self.parkings.extend(more.parkings);
    }

    /// Takes out what `others` has and `still` has not.
    pub fn forget(&mut self, others: &Locks, still: &Locks) {
        fn forget<T: Ord>(mine: &mut BTreeSet<T>, others: &BTreeSet<T>, still: &BTreeSet<T>) {
            mine.retain(|one| !others.contains(one) || still.contains(one));
        }
        forget(&mut self.allocations, &others.allocations, &still.allocations);
        forget(&mut self.receipts, &others.receipts, &still.receipts);
        forget(&mut self.parked, &others.parked, &still.parked);
        forget(&mut self.dead_letters, &others.dead_letters, &still.dead_letters);
        forget(&mut self.funds, &others.funds, &still.funds);
        forget(&mut self.parkings, &others.parkings, &still.parkings);
    }
}

/// Those of a table's rows that are locked against a batch, and by which transaction.
async fn locked<K>(session: &Session, table: &str, key: &str, keys: &BTreeSet<K>) -> Result<Vec<(K, i64)>, StoreError>
where
    K: Clone + for<'a> FromSql<'a> + ToSql + Sync,
{
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<K> = keys.iter().cloned().collect();
    // A row that is skipped is locked now; its xmax says who has locked it.
    let sql = format!(
        "/* locked::locked */
        WITH free AS MATERIALIZED (
            SELECT {key} FROM settled.{table} WHERE {key} = ANY ($1) FOR NO KEY UPDATE SKIP LOCKED
        )
        SELECT t.{key}, t.xmax::text::bigint
        FROM settled.{table} AS t
        WHERE t.{key} = ANY ($1)
          AND NOT EXISTS (SELECT FROM free AS f WHERE f.{key} = t.{key})"
    );
    let rows = session.query(&sql, &[&keys]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

const FUNDS_OF: &str = "\
    /* locked::funds_of */
    SELECT DISTINCT unnest(ARRAY[client_funds, connection_funds])
    FROM settled.allocations
    WHERE id = ANY ($1)";

/// The lock of `batch::LOCK_PARKING`, tried.
const PARKINGS: &str = "\
    /* locked::parkings */
    SELECT w.enterprise_id
    FROM unnest($1::text[]) AS w (enterprise_id)
    WHERE NOT pg_try_advisory_xact_lock(7236102, hashtext(w.enterprise_id))";

/// One look, with who holds each lock.
#[derive(Default)]
struct Look {
    allocations: Vec<(Uuid, i64)>,
    receipts: Vec<(Uuid, i64)>,
    parked: Vec<(Uuid, i64)>,
    dead_letters: Vec<(Uuid, i64)>,
    funds: Vec<(i64, i64)>,
    parkings: Vec<(String, i64)>,
}

async fn look(session: &Session, among: &Locks) -> Result<Look, StoreError> {
    let parkings: Vec<&str> = among.parkings.iter().map(String::as_str).collect();
    let found = join!(
        locked(session, "allocations", "id", &among.allocations),
        locked(session, "receipts", "key", &among.receipts),
        locked(session, "parked", "key", &among.parked),
        locked(session, "dead_letters", "id", &among.dead_letters),
        locked(session, "funds", "id", &among.funds),
        async {
            if parkings.is_empty() {
                return Ok(Vec::new());
            }
            session.query(PARKINGS, &[&parkings]).await
        },
    );
    Ok(Look {
        allocations: found.0?,
        receipts: found.1?,
        parked: found.2?,
        dead_letters: found.3?,
        funds: found.4?,
        parkings: found.5?.iter().map(|row| (row.get(0), 0)).collect(),
    })
}

/// What the same transaction holds in both looks.
fn kept<K: Ord + Clone>(first: &[(K, i64)], second: &[(K, i64)]) -> BTreeSet<K> {
    let first: BTreeSet<&(K, i64)> = first.iter().collect();
    let both = second.iter().filter(|one| first.contains(one));
    both.map(|(key, _)| key.clone()).collect()
}

impl Store {
    /// What of `wanted` is locked by a transaction that does not let go of it soon, with the funds of its allocations.
    ///
    /// # Errors
    /// The database is away, or a whole table is locked.
    pub async fn find_locked(&self, wanted: &Locks) -> Result<Locks, StoreError> {
        let session = self.session("find_locked").await?;
        let mut among = wanted.clone();
        let ids: Vec<Uuid> = wanted.allocations.iter().copied().collect();
        let funds = session.query(FUNDS_OF, &[&ids]).await?;
        among.funds.extend(funds.iter().map(|row| row.get::<_, i64>(0)));
        let first = look(&session, &among).await?;
        tokio::time::sleep(BETWEEN).await;
        let second = look(&session, &among).await?;
        Ok(Locks {
            allocations: kept(&first.allocations, &second.allocations),
            receipts: kept(&first.receipts, &second.receipts),
            parked: kept(&first.parked, &second.parked),
            dead_letters: kept(&first.dead_letters, &second.dead_letters),
            funds: kept(&first.funds, &second.funds),
            parkings: kept(&first.parkings, &second.parkings),
        })
    }

    /// What of these is locked still.
    ///
    /// # Errors
    /// The database is away, or a whole table is locked.
    pub async fn still_locked(&self, among: &Locks) -> Result<Locks, StoreError> {
        let session = self.session("still_locked").await?;
        let found = look(&session, among).await?;
        fn keys<K: Ord>(found: Vec<(K, i64)>) -> BTreeSet<K> {
            found.into_iter().map(|(key, _)| key).collect()
        }
        Ok(Locks {
            allocations: keys(found.allocations),
            receipts: keys(found.receipts),
            parked: keys(found.parked),
            dead_letters: keys(found.dead_letters),
            funds: keys(found.funds),
            parkings: keys(found.parkings),
        })
    }
}
