//! The database's own books: what must hold of any ledger, whatever was published, and whether two looks at it show the same.

use std::collections::BTreeMap;

use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{Expect, Observed, Story, digest_of, is_by_broker};
use crate::kit::partner;

/// Said of a settlement whose key did not count at its moment, to the millisecond.
pub(crate) const BY_AN_ENDED_KEY: &str = "I9: an effect by a key that was not active";

/// What a replay must leave as it is, each as rows of text. A receipt's `last_seen` may grow, and a verdict that is not
/// `settled` may be given anew.
const BOOKS: [(&str, &str); 10] = [
    ("funds", "SELECT f::text FROM settled.funds AS f"),
    ("accounts", "SELECT a::text FROM settled.accounts AS a"),
    ("deposits", "SELECT d::text FROM settled.deposits AS d"),
    ("withdrawals", "SELECT w::text FROM settled.withdrawals AS w"),
    ("moved_funds", "SELECT m::text FROM settled.moved_funds AS m"),
    ("allocations", "SELECT a::text FROM settled.allocations AS a"),
    ("transfers", "SELECT t::text FROM settled.transfers AS t"),
    ("entries", "SELECT e::text FROM settled.entries AS e"),
    ("settlements", "SELECT s::text FROM settled.settlements AS s"),
    (
        "receipts",
        "SELECT (key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
                 public_key, batch_id, first_seen)::text
         FROM settled.receipts WHERE verdict = 'settled'",
    ),
];

/// Everything that had an effect, as it stands at one moment.
pub(crate) struct Books(BTreeMap<&'static str, Vec<String>>);

impl Books {
    pub(crate) async fn read(db: &Client) -> Self {
        let mut books = BTreeMap::new();
        for (name, sql) in BOOKS {
            let rows = db.query(sql, &[]).await.expect(name);
            let mut rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            rows.sort_unstable();
            books.insert(name, rows);
        }
        Self(books)
    }

    /// What is not the same later (I6).
    pub(crate) fn changes(&self, later: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (name, before) in &self.0 {
            let after = later.0.get(name).cloned().unwrap_or_default();
            let gone = before.iter().filter(|row| after.binary_search(row).is_err());
            let come = after.iter().filter(|row| before.binary_search(row).is_err());
            let gone = gone.map(|row| format!("I6: said again, it changed {name}: no more {row}"));
            let come = come.map(|row| format!("I6: said again, it changed {name}: now {row}"));
            changes.extend(gone.chain(come).take(4));
            if *before != after && before.len() != after.len() {
                changes.push(format!(
                    "I6: said again, it left {} {name} instead of {}",
                    after.len(),
                    before.len()
                ));
            }
        }
        changes
    }
}

/// What must hold of any ledger, whatever was published.
pub(crate) async fn ledger(db: &Client) -> Vec<String> {
    let checks = [
        (
            "I2: a transfer between accounts that are not there, or not of one currency",
            "SELECT t.id::text, coalesce(d.currency, 'nothing') || ' and ' || coalesce(c.currency, 'nothing')
             FROM settled.transfers AS t
             LEFT JOIN settled.accounts AS d ON d.id = t.debit_account
             LEFT JOIN settled.accounts AS c ON c.id = t.credit_account
             WHERE (d.currency = c.currency) IS NOT TRUE",
        ),
        (
            // The view of the two sides is as good as what it is made of: the transfers themselves say what each balance is.
            "I2: a balance is not the sum of its transfers",
            "SELECT a.id::text, a.balance::text || ' and ' || coalesce(m.total, 0)::text
             FROM settled.accounts AS a
             LEFT JOIN (
                 SELECT s.account, sum(s.change) AS total
                 FROM settled.transfers AS t
                 CROSS JOIN LATERAL (VALUES (t.debit_account, -t.amount), (t.credit_account, t.amount))
                      AS s (account, change)
                 GROUP BY s.account
             ) AS m ON m.account = a.id
             WHERE a.balance <> coalesce(m.total, 0)",
        ),
        (
            "I2: entries of a currency do not sum to zero",
            "SELECT a.currency, sum(e.change)::text FROM settled.entries AS e
             JOIN settled.accounts AS a ON a.id = e.account_id GROUP BY a.currency HAVING sum(e.change) <> 0",
        ),
        (
            "I2: entries of no account",
            "SELECT e.transfer_id::text, e.account_id::text FROM settled.entries AS e
             LEFT JOIN settled.accounts AS a ON a.id = e.account_id WHERE a.id IS NULL",
        ),
        (
            "I2: a balance is not the sum of its entries",
            "SELECT a.id::text, a.balance::text || ' and ' || coalesce(sum(e.change), 0)::text
             FROM settled.accounts AS a LEFT JOIN settled.entries AS e ON e.account_id = a.id
             GROUP BY a.id, a.balance HAVING a.balance <> coalesce(sum(e.change), 0)",
        ),
        (
            "I2: a balance is negative",
            "SELECT kind, balance::text FROM settled.accounts WHERE balance < 0 AND kind <> 'external'",
        ),
        (
            "I2: a transfer has not its two entries",
            "SELECT t.id::text, count(e.*)::text FROM settled.transfers AS t
             LEFT JOIN settled.entries AS e ON e.transfer_id = t.id
              AND ((e.account_id = t.debit_account AND e.change = -t.amount)
                OR (e.account_id = t.credit_account AND e.change = t.amount))
             GROUP BY t.id HAVING count(e.*) <> 2",
        ),
        (
            "I2: entries of no transfer, or too many of one",
            "SELECT e.transfer_id::text, count(*)::text FROM settled.entries AS e
             LEFT JOIN settled.transfers AS t ON t.id = e.transfer_id
             GROUP BY e.transfer_id, t.id HAVING count(*) <> 2 OR t.id IS NULL",
        ),
        (
            "I2: a state is not the fold of its transfers",
            "SELECT a.id::text, a.status FROM settled.allocations AS a
             LEFT JOIN settled.connections AS c ON c.connection_id = a.connection_id
             LEFT JOIN settled.accounts AS v
                    ON (v.kind, v.owner, v.currency) = ('available', c.client_id, a.currency)
             LEFT JOIN settled.accounts AS h ON (h.kind, h.owner, h.currency) = ('held', c.connection_id, a.currency)
             LEFT JOIN settled.accounts AS l
                    ON (l.kind, l.owner, l.currency) = ('allocated', c.connection_id, a.currency)
             LEFT JOIN settled.transfers AS r ON r.subject_id = a.id AND r.step = 0
             LEFT JOIN settled.transfers AS s ON s.subject_id = a.id AND s.step = 1
             WHERE (r.event = 'reserved'
                AND r.amount = a.quantity
                AND r.debit_account = CASE a.type WHEN 'allocation' THEN v.id ELSE l.id END
                AND r.credit_account = h.id
                AND CASE a.status
                    WHEN 'reserved' THEN s.id IS NULL
                    ELSE s.event = a.status AND s.amount = a.quantity AND s.debit_account = h.id
                     AND s.credit_account = CASE (a.type = 'allocation') = (a.status = 'cleared')
                                            WHEN true THEN l.id ELSE v.id END
                    END) IS NOT TRUE",
        ),
        (
            "I2: transfers of nothing",
            "SELECT t.id::text, t.event FROM settled.transfers AS t
             WHERE NOT EXISTS (SELECT FROM settled.allocations AS a WHERE a.id = t.subject_id)
               AND NOT EXISTS (SELECT FROM settled.deposits AS d WHERE d.id = t.subject_id)
               AND NOT EXISTS (SELECT FROM settled.withdrawals AS w WHERE w.id = t.subject_id)
               AND NOT EXISTS (SELECT FROM settled.moved_funds AS m WHERE m.id = t.subject_id)",
        ),
        (
            "I1: a transfer that settles without its receipt, its text or its signature",
            "SELECT t.subject_id::text, coalesce(r.verdict, 'no receipt') FROM settled.transfers AS t
             LEFT JOIN settled.receipts AS r ON r.key = t.receipt_key
             WHERE t.step = 1
               AND (r.verdict = 'settled' AND octet_length(t.signature) = 65 AND t.payload <> '') IS NOT TRUE",
        ),
        (
            "I1: a settlement of no transfer, or a transfer that settles and is none",
            "SELECT coalesce(s.allocation_id, t.subject_id)::text, coalesce(t.event, 'none') FROM settled.settlements AS s
             FULL JOIN (SELECT * FROM settled.transfers WHERE step = 1) AS t ON t.subject_id = s.allocation_id
             WHERE ((s.payload, s.signature, s.batch_id, s.settled_at)
                  = (t.payload, t.signature, t.batch_id, t.created_at)) IS NOT TRUE",
        ),
        (
            "I1: an outcome without its authority, or the other way round",
            "SELECT coalesce(a.id, s.allocation_id)::text, coalesce(a.status, 'none') FROM settled.settlements AS s
             FULL JOIN (SELECT * FROM settled.allocations WHERE status <> 'reserved') AS a ON a.id = s.allocation_id
             WHERE a.id IS NULL OR s.allocation_id IS NULL OR a.settled_nonce <> s.nonce",
        ),
        (
            "I1: a receipt without its effect, or the other way round",
            "SELECT coalesce(r.nonce, s.nonce), coalesce(r.allocation_id, s.allocation_id)::text
             FROM settled.settlements AS s
             FULL JOIN (SELECT * FROM settled.receipts WHERE verdict = 'settled') AS r
                    ON (r.enterprise_id, r.nonce) = (s.enterprise_id, s.nonce)
             WHERE ((r.allocation_id, r.public_key, r.batch_id, r.payload_digest)
                  = (s.allocation_id, s.public_key, s.batch_id, sha256(convert_to(s.payload, 'UTF8')))) IS NOT TRUE",
        ),
        (
            "I1: a transfer of another batch than its receipt",
            "SELECT t.id::text, t.batch_id::text FROM settled.transfers AS t
             JOIN settled.receipts AS r ON r.key = t.receipt_key
             WHERE t.step = 1 AND t.batch_id IS DISTINCT FROM r.batch_id",
        ),
        (
            "I5: a nonce has two receipts",
            "SELECT enterprise_id, nonce FROM settled.receipts GROUP BY enterprise_id, nonce HAVING count(*) > 1",
        ),
        (
            BY_AN_ENDED_KEY,
            "SELECT s.allocation_id::text, encode(s.public_key, 'hex') FROM settled.settlements AS s
             LEFT JOIN settled.partner_keys AS k USING (public_key, enterprise_id)
             LEFT JOIN settled.partners AS p USING (enterprise_id)
             WHERE (s.settled_at >= date_trunc('milliseconds', k.valid_from)
                AND s.settled_at < coalesce(k.valid_until, 'infinity')
                AND s.settled_at < coalesce(k.revoked_at, 'infinity')
                AND s.settled_at < coalesce(p.suspended_at, 'infinity')) IS NOT TRUE",
        ),
        (
            "I9: an amount in the partner's own words that did not mean the currency of the books then",
            "SELECT a.id::text, a.partner_symbol FROM settled.allocations AS a
             JOIN settled.settlements AS s ON s.allocation_id = a.id
             WHERE a.partner_symbol IS NOT NULL
               AND NOT EXISTS (
                   SELECT FROM settled.currency_symbols AS m
                   WHERE (m.enterprise_id, m.symbol, m.currency) = (s.enterprise_id, a.partner_symbol, a.currency)
                     AND date_trunc('milliseconds', m.since) <= s.settled_at
                     AND s.settled_at <= coalesce(m.until, 'infinity')
               )",
        ),
        (
            "I5: a nonce was accepted twice",
            "SELECT enterprise_id, nonce FROM settled.settlements GROUP BY enterprise_id, nonce HAVING count(*) > 1",
        ),
        (
            "I4: publications were set aside",
            "SELECT batch_id::text, refusal FROM settled.outbox_refused",
        ),
    ];
    let mut problems = Vec::new();
    for (problem, sql) in checks {
        for row in db.query(sql, &[]).await.expect(problem).iter().take(5) {
            let (left, right): (String, String) = (row.get(0), row.get(1));
            problems.push(format!("{problem}: {left} {right}"));
        }
    }
    problems
}

/// Nothing has an effect without a signature that a key of that partner made over that text, and the text says just this.
pub(crate) async fn authority(db: &Client, story: &Story) -> Vec<String> {
    let sql = "SELECT s.allocation_id, s.enterprise_id, s.nonce, s.payload, s.signature, s.public_key,
                      a.type, a.status, coalesce(a.partner_symbol, a.currency), a.quantity::text, a.client_id,
                      a.connection_id
               FROM settled.settlements AS s JOIN settled.allocations AS a ON a.id = s.allocation_id";
    let mut problems = Vec::new();
    for row in db.query(sql, &[]).await.expect("settlements") {
        let id: Uuid = row.get(0);
        let (enterprise, nonce, payload): (String, String, String) = (row.get(1), row.get(2), row.get(3));
        let (signature, key): (Vec<u8>, Vec<u8>) = (row.get(4), row.get(5));
        let (kind, status): (String, String) = (row.get(6), row.get(7));
        let (currency, quantity): (String, String) = (row.get(8), row.get(9));
        let (client, connection): (Uuid, Uuid) = (row.get(10), row.get(11));
        let is_theirs = story.keys.contains(&(enterprise.clone(), hex::encode(&key)));
        if signer(&signature, &payload) != Some(key) || !is_theirs {
            problems.push(format!("I9: {id} has an effect that {enterprise} did not sign for"));
        }
        let signed: Value = serde_json::from_str(&payload).unwrap_or_default();
        let names = |name: &str, of: Uuid| signed[name].as_str().is_some_and(|text| text.parse() == Ok(of));
        let is_of_this =
            names(&format!("{kind}Id"), id) && names("clientId", client) && names("connectionId", connection);
        let amount = json!({"currency": currency, "quantity": quantity});
        let says = (&signed["nonce"], &signed["status"], &signed["amount"]);
        if !is_of_this || says != (&json!(nonce), &json!(status), &amount) {
            problems.push(format!(
                "I9: {id} has an effect that is not the one {enterprise} signed for"
            ));
        }
    }
    problems
}

/// Whose signature it is; nobody's where it is not the one form that counts (low s).
pub(crate) fn signer(signature: &[u8], payload: &str) -> Option<Vec<u8>> {
    let (header, scalars) = signature.split_first()?;
    let recovery = RecoveryId::try_from(i32::from(*header) - 31).ok()?;
    let signature = RecoverableSignature::from_compact(scalars, recovery).ok()?;
    let plain = signature.to_standard();
    let mut low = plain;
    low.normalize_s();
    let key = signature.recover(partner::digest(payload)).ok()?;
    (plain == low).then(|| key.serialize().to_vec())
}

/// What came in is what it came to, in each batch and in all.
pub(crate) async fn batches(db: &Client, story: &Story, observed: &Observed) -> Vec<String> {
    let checks = [
        (
            "does not add up",
            "SELECT id::text FROM settled.batches WHERE received <> settled + duplicate + parked + rejected",
        ),
        (
            "has not a reason for each rejection",
            "SELECT id::text FROM settled.batches
             WHERE rejected <> (SELECT coalesce(sum(value::integer), 0) FROM jsonb_each_text(reasons))",
        ),
        (
            "counts other settlements than there are of it",
            "SELECT b.id::text FROM settled.batches AS b LEFT JOIN settled.settlements AS s ON s.batch_id = b.id
             GROUP BY b.id HAVING b.settled <> count(s.*)",
        ),
    ];
    let mut problems = Vec::new();
    for (problem, sql) in checks {
        for row in db.query(sql, &[]).await.expect("batches").iter().take(5) {
            let id: String = row.get(0);
            problems.push(format!("I3: the batch {id} {problem}"));
        }
    }
    let sql = "SELECT (SELECT coalesce(sum(settled), 0) FROM settled.batches)::bigint,
                      (SELECT count(*) FROM settled.allocations WHERE status <> 'reserved'),
                      (SELECT coalesce(sum(received), 0) FROM settled.batches WHERE source IN ('queue', 'moved'))::bigint,
                      (SELECT coalesce(sum(rejected), 0) FROM settled.batches)::bigint,
                      (SELECT coalesce(sum(messages), 0) FROM settled.held)::bigint";
    let row = db.query_one(sql, &[]).await.expect("sums");
    let (settled, outcomes, received, rejected, held): (i64, i64, i64, i64, i64) =
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    if settled != outcomes {
        problems.push(format!(
            "I1: the batches settled {settled}, {outcomes} allocations have an outcome"
        ));
    }
    // Every copy is delivered at least once, except those that wait still or that the broker took away before: those the
    // collector counts, where there is one.
    let before = |expect| matches!(expect, Expect::Refused("delivery_limit" | "expired"));
    let delivered = story.sent.iter().filter(|sent| !before(sent.expect)).count();
    let delivered = delivered.saturating_sub(observed.queued.len());
    // What is held was delivered and is in no batch yet.
    if usize::try_from(received + held).unwrap_or_default() < delivered {
        problems.push(format!(
            "I3: the batches received {received} and {held} are held, of {delivered} messages"
        ));
    }
    let ours = observed.dead.iter().filter(|seen| !is_by_broker(seen));
    let ours: std::collections::BTreeSet<_> = ours.map(|seen| (&seen.routing_key, digest_of(seen))).collect();
    if usize::try_from(rejected).unwrap_or_default() < ours.len() {
        let dead = ours.len();
        problems.push(format!(
            "I3: the batches rejected {rejected}, and {dead} are dead letters"
        ));
    }
    problems
}
