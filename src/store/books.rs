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

/// What the books were found to be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Books {
    /// Sentences with the exact difference; at most [`PROBLEMS_MAX`], and then one that counts the rest.
    pub problems: Vec<String>,
    /// Rows looked at, by table.
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
        for table in COUNTED {
            let rows = session
                .query(
                    &format!("/* books::check_books count */ SELECT count(*) FROM settled.{table}"),
                    &[],
                )
                .await?;
            books.counted.insert(table, session.one(&rows)?.get(0));
        }
        session.rollback().await;
        Ok(books)
    }
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
