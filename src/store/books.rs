//! The balances, and the proof that the books are right. Read-only, and each answer is of one moment.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::ledger::AccountKind;

/// Problems that [`Store::check_books`] spells out; the rest is counted.
pub const PROBLEMS_MAX: usize = 100;

/// One account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalanceRecord {
    pub account: String,
    /// The client of `available`, the connection of `held` and `allocated`.
    pub owner: Option<Uuid>,
    pub currency: String,
    pub balance: String,
}

/// All accounts of a currency together; the last is nothing where the books are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumRecord {
    pub currency: String,
    pub external: String,
    pub available: String,
    pub held: String,
    pub allocated: String,
    pub total: String,
}

/// What an owner has of a currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountRecord {
    /// `world`, `client` or `connection`.
    pub holder: String,
    /// Nil of the world.
    pub owner: Uuid,
    pub currency: String,
    pub external: String,
    pub available: String,
    pub held: String,
    pub allocated: String,
}

/// Which accounts.
#[derive(Clone, Copy, Debug)]
pub struct AccountsPage<'p> {
    /// From one id to another.
    pub owners: (Uuid, Uuid),
    pub currency: Option<&'p str>,
    /// After the one of this owner, currency and holder.
    pub after: Option<(Uuid, &'p str, &'p str)>,
}

/// What the books were found to be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Books {
    /// Sentences with the exact difference; at most [`PROBLEMS_MAX`], and then one that counts the rest.
    pub problems: Vec<String>,
    /// Rows looked at, by table or view.
    pub counted: BTreeMap<&'static str, i64>,
}

impl Store {
    /// Every account's balance, by currency, kind and owner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn balances(&self) -> Result<Vec<BalanceRecord>, StoreError> {
        let mut session = self.session("balances").await?;
        session.begin_long().await?;
        let rows = session
            .query(
                "/* books::balances */
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

    /// The sums of all accounts, by currency.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn sums(&self) -> Result<Vec<SumRecord>, StoreError> {
        let mut session = self.session("sums").await?;
        session.begin_long().await?;
        let rows = session
            .query(
                "/* books::sums */
                SELECT f.currency, sum(f.external)::text AS external, sum(f.available)::text AS available,
                       sum(f.held)::text AS held, sum(f.allocated)::text AS allocated,
                       (sum(f.external) + sum(f.available) + sum(f.held) + sum(f.allocated))::text AS total
                FROM settled.funds AS f
                GROUP BY f.currency
                ORDER BY f.currency",
                &[],
            )
            .await?;
        session.rollback().await;
        let sums = rows.iter().map(|row| SumRecord {
            currency: row.get("currency"),
            external: row.get("external"),
            available: row.get("available"),
            held: row.get("held"),
            allocated: row.get("allocated"),
            total: row.get("total"),
        });
        Ok(sums.collect())
    }

    /// A page of accounts by owner and currency, after one of them: of owners between two ids, and of one currency or of all.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn accounts(&self, page: &AccountsPage<'_>, limit: i64) -> Result<Vec<AccountRecord>, StoreError> {
        let (first, last) = page.owners;
        let (owner, currency, holder) = page.after.unwrap_or((Uuid::nil(), "", ""));
        let rows = self
            .session("accounts")
            .await?
            .query(
                "/* books::accounts */
                SELECT f.holder, f.owner, f.currency, f.external::text AS external, f.available::text AS available,
                       f.held::text AS held, f.allocated::text AS allocated
                FROM settled.funds AS f
                WHERE f.owner BETWEEN $1 AND $2
                  AND (f.owner, f.currency, f.holder) > ($3::uuid, $4::text COLLATE \"C\", $5::text COLLATE \"C\")
                  AND ($6::text IS NULL OR f.currency = $6)
                ORDER BY f.owner, f.currency, f.holder
                LIMIT $7",
                &[&first, &last, &owner, &currency, &holder, &page.currency, &limit],
            )
            .await?;
        let accounts = rows.iter().map(|row| AccountRecord {
            holder: row.get("holder"),
            owner: row.get("owner"),
            currency: row.get("currency"),
            external: row.get("external"),
            available: row.get("available"),
            held: row.get("held"),
            allocated: row.get("allocated"),
        });
        Ok(accounts.collect())
    }

    /// Proves the books, all of them in one moment. Reads every row that moved money. `told` is told how many questions of how
    /// many are answered.
    ///
    /// # Errors
    /// The database is away or refuses. What is wrong with the books is no error.
    pub async fn check_books(&self, mut told: impl FnMut(usize, usize)) -> Result<Books, StoreError> {
        let mut session = self.session("check_books").await?;
        session.begin_long().await?;
        let mut books = Books::default();
        let mut found = 0_usize;
        let all = PROOFS.len() + COUNTED.len();
        for (done, Proof { holds, wrong }) in PROOFS.into_iter().enumerate() {
            told(done, all);
            if let Some(holds) = holds {
                let rows = session
                    .query(&format!("/* books::check_books holds */ {holds}"), &[])
                    .await?;
                if session.one(&rows)?.get(0) {
                    continue;
                }
            }
            let rows = session
                .query(
                    &format!(
                        "/* books::check_books */
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
        for (done, (name, rows)) in COUNTED.into_iter().enumerate() {
            told(PROOFS.len() + done, all);
            let counted = session
                .query(
                    &format!("/* books::check_books count */ SELECT count(*) FROM settled.{rows}"),
                    &[],
                )
                .await?;
            books.counted.insert(name, session.one(&counted)?.get(0));
        }
        session.rollback().await;
        Ok(books)
    }
}

/// What [`Books::counted`] counts, and which rows these are.
const COUNTED: [(&str, &str); 9] = [
    ("accounts", "accounts"),
    ("allocations", "allocations"),
    ("batches", "batches"),
    ("deposits", "deposits"),
    ("entries", "entries"),
    ("receipts", "receipts"),
    ("settlements", "transfers WHERE step = 1"),
    ("transfers", "transfers"),
    ("withdrawals", "withdrawals"),
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

const PROOFS: [Proof; 12] = [
    // Per currency everything sums to zero: both accounts of each transfer are there, and of one currency.
    Proof::none_of(
        "SELECT format('currency %s: its entries sum to %s instead of 0', f.currency, sum(e.change))
    FROM settled.entries AS e
    JOIN settled.funds AS f ON f.id = e.account_id / 4
    GROUP BY f.currency
    HAVING sum(e.change) <> 0",
    ),
    Proof {
        holds: Some(
            "SELECT (SELECT count(*) FROM settled.transfers) = (
                   SELECT count(*)
                   FROM settled.transfers AS t
                   JOIN settled.funds AS d ON d.id = t.debit_account / 4
                   JOIN settled.funds AS c ON c.id = t.credit_account / 4 AND c.currency = d.currency
               )",
        ),
        wrong: "SELECT format('transfer %s: it moves %s from account %s (%s) to account %s (%s)', t.id, t.amount,
                  t.debit_account, coalesce(d.currency, 'which does not exist'),
                  t.credit_account, coalesce(c.currency, 'which does not exist'))
    FROM settled.transfers AS t
    LEFT JOIN settled.funds AS d ON d.id = t.debit_account / 4
    LEFT JOIN settled.funds AS c ON c.id = t.credit_account / 4
    WHERE (d.currency = c.currency) IS NOT TRUE",
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
    // The funds that an allocation names are those of its client and connection.
    Proof::none_of(
        "SELECT format('allocation %s: its %s account %s is not that of its client and connection', a.id, k.kind,
                  settled.account(k.funds, k.kind))
    FROM settled.allocations AS a
    JOIN settled.connections AS c ON c.connection_id = a.connection_id
    CROSS JOIN LATERAL (VALUES
        ('available', a.client_funds, 'client', c.client_id),
        ('held', a.connection_funds, 'connection', c.connection_id)
    ) AS k (kind, funds, holder, owner)
    LEFT JOIN settled.funds AS f ON f.id = k.funds
    WHERE (f.holder, f.owner, f.currency) IS DISTINCT FROM (k.holder, k.owner, a.currency)",
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
               ) + (
                   SELECT count(*) FROM settled.withdrawals
               ) + (
                   SELECT count(*) FROM settled.moved_funds
               )
               AND (SELECT count(*) FROM settled.transfers) = (
                   SELECT count(*)
                   FROM settled.transfers AS t
                   JOIN settled.allocations AS a ON a.id = t.subject_id
                   WHERE t.amount = a.quantity
                     AND CASE t.step
                         WHEN 0 THEN t.event = 'reserved' AND t.credit_account = settled.account(a.connection_funds, 'held')
                              AND t.debit_account = CASE a.type
                                  WHEN 'allocation' THEN settled.account(a.client_funds, 'available')
                                  ELSE settled.account(a.connection_funds, 'allocated') END
                         ELSE a.status <> 'reserved' AND t.event = a.status
                              AND t.debit_account = settled.account(a.connection_funds, 'held')
                              AND t.credit_account = CASE WHEN (a.type = 'allocation') = (a.status = 'cleared')
                                  THEN settled.account(a.connection_funds, 'allocated')
                                  ELSE settled.account(a.client_funds, 'available') END
                         END
               ) + (
                   SELECT count(*)
                   FROM settled.deposits AS d
                   JOIN settled.transfers AS t ON t.subject_id = d.id AND t.step = 0
                   JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
                   JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = d.client_id AND v.currency = d.currency
                   WHERE (t.event, t.debit_account, t.credit_account, t.amount)
                       = ('deposit', settled.account(x.id, 'external'), settled.account(v.id, 'available'), d.quantity)
               ) + (
                   SELECT count(*)
                   FROM settled.withdrawals AS d
                   JOIN settled.transfers AS t ON t.subject_id = d.id AND t.step = 0
                   JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
                   JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = d.client_id AND v.currency = d.currency
                   WHERE (t.event, t.debit_account, t.credit_account, t.amount)
                       = ('withdrawal', settled.account(v.id, 'available'), settled.account(x.id, 'external'), d.quantity)
               ) + (
                   SELECT count(*)
                   FROM settled.moved_funds AS d
                   JOIN settled.connections AS c ON c.connection_id = d.connection_id
                   JOIN settled.transfers AS t ON t.subject_id = d.id AND t.step = 0
                   JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
                   JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = c.client_id AND v.currency = d.currency
                   JOIN settled.funds AS h
                     ON h.holder = 'connection' AND h.owner = c.connection_id AND h.currency = d.currency
                   WHERE t.amount = d.quantity
                     AND CASE
                         WHEN d.left_from IS NULL
                         THEN (t.event, t.debit_account, t.credit_account)
                            = ('arrived', settled.account(x.id, 'external'), settled.account(v.id, 'available'))
                         ELSE (t.event, t.debit_account, t.credit_account)
                            = ('left', settled.account(h.id, d.left_from), settled.account(x.id, 'external'))
                         END
               )",
        ),
        wrong: "SELECT CASE
        WHEN t.id IS NULL
        THEN format('%s %s is %s, and its transfer (%s from account %s to account %s) is missing',
                    w.what, w.subject_id, w.status, w.amount, w.debit, w.credit)
        WHEN w.subject_id IS NULL
        THEN format('transfer %s (%s, %s from account %s to account %s) has no %s %s in that state',
                    t.id, t.event, t.amount, t.debit_account, t.credit_account,
                    CASE WHEN t.event IN ('deposit', 'withdrawal', 'arrived', 'left') THEN t.event ELSE 'allocation' END, t.subject_id)
        ELSE format('transfer %s of %s %s is %s of %s from account %s to account %s instead of %s of %s from account %s to account %s',
                    t.id, w.what, w.subject_id, t.event, t.amount, t.debit_account, t.credit_account,
                    w.event, w.amount, w.debit, w.credit)
    END
    FROM (
        SELECT a.type AS what, a.status, a.id AS subject_id, 0::smallint AS step, 'reserved' AS event,
               CASE a.type WHEN 'allocation' THEN settled.account(a.client_funds, 'available')
                    ELSE settled.account(a.connection_funds, 'allocated') END AS debit,
               settled.account(a.connection_funds, 'held') AS credit, a.quantity AS amount
        FROM settled.allocations AS a
        UNION ALL
        SELECT a.type, a.status, a.id, 1::smallint, a.status,
               settled.account(a.connection_funds, 'held'),
               CASE WHEN (a.type = 'allocation') = (a.status = 'cleared')
                    THEN settled.account(a.connection_funds, 'allocated')
                    ELSE settled.account(a.client_funds, 'available') END,
               a.quantity
        FROM settled.allocations AS a
        WHERE a.status <> 'reserved'
        UNION ALL
        SELECT 'deposit', 'in', d.id, 0::smallint, 'deposit', settled.account(x.id, 'external'),
               settled.account(v.id, 'available'), d.quantity
        FROM settled.deposits AS d
        LEFT JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
        LEFT JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = d.client_id AND v.currency = d.currency
        UNION ALL
        SELECT 'withdrawal', 'out', d.id, 0::smallint, 'withdrawal', settled.account(v.id, 'available'),
               settled.account(x.id, 'external'), d.quantity
        FROM settled.withdrawals AS d
        LEFT JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
        LEFT JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = d.client_id AND v.currency = d.currency
        UNION ALL
        SELECT 'moved funds', CASE WHEN d.left_from IS NULL THEN 'in' ELSE 'out' END, d.id, 0::smallint,
               CASE WHEN d.left_from IS NULL THEN 'arrived' ELSE 'left' END,
               CASE WHEN d.left_from IS NULL THEN settled.account(x.id, 'external')
                    ELSE settled.account(h.id, d.left_from) END,
               CASE WHEN d.left_from IS NULL THEN settled.account(v.id, 'available')
                    ELSE settled.account(x.id, 'external') END,
               d.quantity
        FROM settled.moved_funds AS d
        JOIN settled.connections AS c ON c.connection_id = d.connection_id
        LEFT JOIN settled.funds AS x ON x.holder = 'world' AND x.currency = d.currency
        LEFT JOIN settled.funds AS v ON v.holder = 'client' AND v.owner = c.client_id AND v.currency = d.currency
        LEFT JOIN settled.funds AS h
               ON h.holder = 'connection' AND h.owner = c.connection_id AND h.currency = d.currency
    ) AS w
    FULL JOIN settled.transfers AS t ON t.subject_id = w.subject_id AND t.step = w.step
    WHERE (t.event, t.debit_account, t.credit_account, t.amount) IS DISTINCT FROM (w.event, w.debit, w.credit, w.amount)",
    },
    // An allocation that left reserved names the nonce that did it, and so does the receipt that its transfer names.
    Proof {
        holds: Some(
            "SELECT (SELECT count(*) FROM settled.allocations WHERE status <> 'reserved') = (
                   SELECT count(*)
                   FROM settled.allocations AS a
                   JOIN settled.connections AS c ON c.connection_id = a.connection_id
                   JOIN settled.settlements AS s
                     ON s.allocation_id = a.id AND s.nonce = a.settled_nonce AND s.enterprise_id = c.enterprise_id
                   WHERE a.status <> 'reserved'
               )
               AND (SELECT count(*) FROM settled.allocations WHERE status <> 'reserved') = (
                   SELECT count(*) FROM settled.settlements
               )",
        ),
        wrong: "SELECT CASE
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
    },
    // What authorised a transfer stands in it, and is what its receipt says was signed; both were written by one batch.
    Proof {
        holds: Some(
            "SELECT (SELECT count(*) FROM settled.receipts WHERE verdict = 'settled') = (
                   SELECT count(*) FROM settled.transfers WHERE step = 1
               )
               AND (SELECT count(*) FROM settled.transfers WHERE step = 1) = (
                   SELECT count(*)
                   FROM settled.transfers AS t
                   JOIN settled.receipts AS r ON r.key = t.receipt_key
                   WHERE t.step = 1
                     AND r.verdict = 'settled'
                     AND r.allocation_id = t.subject_id
                     AND r.batch_id = t.batch_id
                     AND r.payload_digest = sha256(convert_to(t.payload, 'UTF8'))
               )",
        ),
        wrong: "SELECT CASE
        WHEN t.subject_id IS NULL
        THEN format('the receipt of nonce %s of partner %s says settled, and there is no settlement of %s by it',
                    r.nonce, r.enterprise_id, r.allocation_id)
        WHEN r.key IS NULL
        THEN format('the settlement of %s has no settled receipt (key %s)', t.subject_id, t.receipt_key)
        WHEN r.allocation_id <> t.subject_id
        THEN format('the settlement of %s has no settled receipt (nonce %s of partner %s is of %s)',
                    t.subject_id, r.nonce, r.enterprise_id, r.allocation_id)
        WHEN r.batch_id IS DISTINCT FROM t.batch_id
        THEN format('settlement of %s: its batch is %s, and that of its transfer %s', t.subject_id, r.batch_id,
                    coalesce(t.batch_id::text, 'none'))
        ELSE format('settlement of %s: what was signed is not what its receipt (nonce %s of partner %s) says',
                    t.subject_id, r.nonce, r.enterprise_id)
    END
    FROM (SELECT * FROM settled.receipts WHERE verdict = 'settled') AS r
    FULL JOIN (SELECT * FROM settled.transfers WHERE step = 1) AS t ON t.receipt_key = r.key
    WHERE (r.allocation_id, r.batch_id, r.payload_digest)
        IS DISTINCT FROM (t.subject_id, t.batch_id, sha256(convert_to(t.payload, 'UTF8')))",
    },
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
    FULL JOIN (SELECT batch_id, count(*) AS total FROM settled.transfers WHERE step = 1 GROUP BY batch_id) AS s
           ON s.batch_id = b.id
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
