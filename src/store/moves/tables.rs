//! What a partner takes along to another cell, table by table. A row is read in the same words on both sides, so that what is in
//! the target is compared with what the source has, value by value.

/// The rows of a table.
pub(super) struct Copied {
    pub(super) name: &'static str,
    /// The rows in the source, of the partner that stands for `{whose}`.
    pub(super) source: &'static str,
    /// The same in the target, once they are there.
    pub(super) target: &'static str,
    /// What names a row: an expression over its columns, as text.
    pub(super) key: &'static str,
    /// Puts rows into the target: $1 is a JSON array of them.
    pub(super) insert: &'static str,
    /// The target may have more, which others brought there.
    pub(super) may_have_more: bool,
}

/// A table whose rows are the same on both sides.
macro_rules! as_it_is {
    ($name:literal, $columns:literal, $from:literal, $key:literal) => {
        Copied {
            name: $name,
            source: concat!("SELECT ", $columns, " FROM ", $from),
            target: concat!("SELECT ", $columns, " FROM ", $from),
            key: $key,
            insert: concat!(
                "INSERT INTO settled.",
                $name,
                " (",
                $columns,
                ") SELECT ",
                $columns,
                " FROM jsonb_populate_recordset(NULL::settled.",
                $name,
                ", $1::text::jsonb)"
            ),
            may_have_more: false,
        }
    };
}

/// Of clients both sides are asked alike: a client has the same id on both, unlike accounts and batches.
const CLIENTS: &str = "SELECT client_id, enterprise_id FROM settled.clients WHERE client_id IN (
            SELECT c.client_id FROM settled.connections AS c WHERE c.enterprise_id = '{whose}')";

/// In the order in which they refer to each other. A batch had messages of others too: what goes along is its part of this
/// partner, by what its receipts say, under an id of its own (`settled.part_of_batch`).
pub(super) const TABLES: [Copied; 14] = [
    as_it_is!(
        "partners",
        "enterprise_id, name, async_allocations, async_deallocations, broker_user, own_queue, suspended_at, quarantined_at, \
         quarantine_reason, created_at",
        "settled.partners WHERE enterprise_id = '{whose}'",
        "enterprise_id"
    ),
    as_it_is!(
        "partner_keys",
        "public_key, enterprise_id, valid_from, valid_until, revoked_at, reinstated_at, created_at, proven_at",
        "settled.partner_keys WHERE enterprise_id = '{whose}'",
        "encode(public_key, 'hex')"
    ),
    as_it_is!(
        "key_uses",
        "public_key, last_used_at",
        "settled.key_uses WHERE public_key IN (SELECT k.public_key FROM settled.partner_keys AS k \
         WHERE k.enterprise_id = '{whose}')",
        "encode(public_key, 'hex')"
    ),
    as_it_is!(
        "distrusted",
        "public_key, payload_digest, at",
        "settled.distrusted WHERE public_key IN (SELECT k.public_key FROM settled.partner_keys AS k \
         WHERE k.enterprise_id = '{whose}')",
        "encode(public_key || payload_digest, 'hex')"
    ),
    as_it_is!(
        "connections",
        "connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id, created_at",
        "settled.connections WHERE enterprise_id = '{whose}'",
        "connection_id::text"
    ),
    // A client may have connections with others in both cells.
    Copied {
        name: "clients",
        source: CLIENTS,
        target: CLIENTS,
        key: "client_id::text",
        insert: "INSERT INTO settled.clients (client_id, enterprise_id)
            SELECT client_id, enterprise_id FROM jsonb_populate_recordset(NULL::settled.clients, $1::text::jsonb)
            ON CONFLICT (client_id) DO NOTHING",
        may_have_more: true,
    },
    // Of clients none: they may stay in both cells, and what is revoked in one would count in the other.
    as_it_is!(
        "tokens",
        "id, enterprise_id, role, digest, name, rate, expires_at, revoked_at, created_at",
        "settled.tokens WHERE enterprise_id = '{whose}' AND role = 'partner'",
        "id::text"
    ),
    as_it_is!(
        "currency_symbols",
        "enterprise_id, symbol, currency, since, until",
        "settled.currency_symbols WHERE enterprise_id = '{whose}'",
        "symbol || ' ' || since::text"
    ),
    Copied {
        name: "batches",
        source: "SELECT settled.part_of_batch(n.batch_id, '{whose}') AS id, b.worker, 'moved' AS source, b.at,
                   sum(n.messages)::integer AS received,
                   coalesce(sum(n.messages) FILTER (WHERE n.verdict = 'settled'), 0)::integer AS settled,
                   coalesce(sum(n.messages) FILTER (WHERE n.verdict = 'duplicate'), 0)::integer AS duplicate,
                   coalesce(sum(n.messages) FILTER (WHERE n.verdict = 'parked'), 0)::integer AS parked,
                   coalesce(sum(n.messages) FILTER (WHERE n.verdict = 'rejected'), 0)::integer AS rejected,
                   coalesce(jsonb_object_agg(n.reason, n.messages) FILTER (WHERE n.verdict = 'rejected'), '{}') AS reasons
            FROM (
                SELECT r.batch_id, r.verdict, r.reason, count(*) AS messages
                FROM settled.receipts AS r
                WHERE r.enterprise_id = '{whose}'
                GROUP BY r.batch_id, r.verdict, r.reason
            ) AS n
            JOIN settled.batches AS b ON b.id = n.batch_id
            GROUP BY n.batch_id, b.worker, b.at",
        target: "SELECT id, worker, source, at, received, settled, duplicate, parked, rejected, reasons
            FROM settled.batches
            WHERE id IN (SELECT r.batch_id FROM settled.receipts AS r WHERE r.enterprise_id = '{whose}')",
        key: "id::text",
        insert: "INSERT INTO settled.batches (
                id, worker, source, at, received, settled, duplicate, parked, rejected, reasons
            )
            SELECT id, worker, source, at, received, settled, duplicate, parked, rejected, reasons
            FROM jsonb_populate_recordset(NULL::settled.batches, $1::text::jsonb)",
        may_have_more: false,
    },
    Copied {
        name: "receipts",
        source: "SELECT key, allocation_id, event_id, settled.part_of_batch(batch_id, enterprise_id) AS batch_id, first_seen,
                   last_seen, verdict, reason, enterprise_id, nonce, payload_digest, message_digest, public_key, voided_at
            FROM settled.receipts
            WHERE enterprise_id = '{whose}'",
        target: "SELECT key, allocation_id, event_id, batch_id, first_seen,
                   last_seen, verdict, reason, enterprise_id, nonce, payload_digest, message_digest, public_key, voided_at
            FROM settled.receipts
            WHERE enterprise_id = '{whose}'",
        key: "key::text",
        insert: "INSERT INTO settled.receipts (
                key, allocation_id, event_id, batch_id, first_seen,
                last_seen, verdict, reason, enterprise_id, nonce, payload_digest, message_digest, public_key, voided_at
            )
            SELECT key, allocation_id, event_id, batch_id, first_seen,
                   last_seen, verdict, reason, enterprise_id, nonce, payload_digest, message_digest, public_key, voided_at
            FROM jsonb_populate_recordset(NULL::settled.receipts, $1::text::jsonb)",
        may_have_more: false,
    },
    // What was told of refusals and parkings, so that it is told again in the same words.
    Copied {
        name: "told",
        source: "SELECT t.event_id, t.at, settled.part_of_batch(t.batch_id, '{whose}') AS batch_id, t.verdict, t.reason, t.proven,
                   t.digest, t.key, t.allocation_id, t.words
            FROM settled.told AS t
            WHERE t.proven
              AND t.key IN (SELECT r.key FROM settled.receipts AS r WHERE r.enterprise_id = '{whose}')",
        target: "SELECT t.event_id, t.at, t.batch_id, t.verdict, t.reason, t.proven, t.digest, t.key, t.allocation_id, t.words
            FROM settled.told AS t
            WHERE t.proven
              AND t.key IN (SELECT r.key FROM settled.receipts AS r WHERE r.enterprise_id = '{whose}')",
        key: "event_id::text",
        insert: "INSERT INTO settled.told (
                event_id, at, batch_id, verdict, reason, proven, digest, key, allocation_id, words
            )
            SELECT event_id, at, batch_id, verdict, reason, proven, digest, key, allocation_id, words
            FROM jsonb_populate_recordset(NULL::settled.told, $1::text::jsonb)",
        may_have_more: false,
    },
    // The funds that they name have other numbers in the target.
    Copied {
        name: "allocations",
        source: "SELECT a.id, a.connection_id, a.client_id, a.created_at, a.type, a.currency, a.quantity,
                   a.client_external_id, a.initiated_by, a.notes, a.reserved_reason, a.reserved_retriable, a.retriable,
                   a.updated_at, a.status, a.reason, a.partner_external_id, a.evaluation_id, a.pending_approval_id,
                   a.policy_result, a.settled_nonce, a.partner_symbol
            FROM settled.allocations AS a
            JOIN settled.connections AS c ON c.connection_id = a.connection_id
            WHERE c.enterprise_id = '{whose}'",
        target: "SELECT a.id, a.connection_id, a.client_id, a.created_at, a.type, a.currency, a.quantity,
                   a.client_external_id, a.initiated_by, a.notes, a.reserved_reason, a.reserved_retriable, a.retriable,
                   a.updated_at, a.status, a.reason, a.partner_external_id, a.evaluation_id, a.pending_approval_id,
                   a.policy_result, a.settled_nonce, a.partner_symbol
            FROM settled.allocations AS a
            JOIN settled.connections AS c ON c.connection_id = a.connection_id
            WHERE c.enterprise_id = '{whose}'",
        key: "id::text",
        insert: "INSERT INTO settled.allocations (
                id, connection_id, client_id, client_funds, connection_funds, created_at, type, currency, quantity,
                client_external_id, initiated_by, notes, reserved_reason, reserved_retriable, retriable,
                updated_at, status, reason, partner_external_id, evaluation_id, pending_approval_id,
                policy_result, settled_nonce, partner_symbol
            )
            SELECT n.id, n.connection_id, n.client_id, v.id, h.id, n.created_at, n.type, n.currency, n.quantity,
                   n.client_external_id, n.initiated_by, n.notes, n.reserved_reason, n.reserved_retriable, n.retriable,
                   n.updated_at, n.status, n.reason, n.partner_external_id, n.evaluation_id, n.pending_approval_id,
                   n.policy_result, n.settled_nonce, n.partner_symbol
            FROM jsonb_populate_recordset(NULL::settled.allocations, $1::text::jsonb) AS n
            JOIN settled.funds AS v ON (v.holder, v.owner, v.currency) = ('client', n.client_id, n.currency)
            JOIN settled.funds AS h ON (h.holder, h.owner, h.currency) = ('connection', n.connection_id, n.currency)",
        may_have_more: false,
    },
    // So have the accounts: each is named by its kind, and whose it is by its allocation.
    Copied {
        name: "transfers",
        source: "SELECT t.subject_id, t.step, t.event, t.amount, t.created_at, t.receipt_key, t.signature, t.payload,
                   settled.part_of_batch(t.batch_id, '{whose}') AS batch_id,
                   settled.kind_of(t.debit_account) AS debit, d.owner AS debit_owner,
                   settled.kind_of(t.credit_account) AS credit, e.owner AS credit_owner
            FROM settled.transfers AS t
            JOIN settled.allocations AS a ON a.id = t.subject_id
            JOIN settled.connections AS c ON c.connection_id = a.connection_id
            JOIN settled.funds AS d ON d.id = t.debit_account / 4
            JOIN settled.funds AS e ON e.id = t.credit_account / 4
            WHERE c.enterprise_id = '{whose}'",
        target: "SELECT t.subject_id, t.step, t.event, t.amount, t.created_at, t.receipt_key, t.signature, t.payload,
                   t.batch_id,
                   settled.kind_of(t.debit_account) AS debit, d.owner AS debit_owner,
                   settled.kind_of(t.credit_account) AS credit, e.owner AS credit_owner
            FROM settled.transfers AS t
            JOIN settled.allocations AS a ON a.id = t.subject_id
            JOIN settled.connections AS c ON c.connection_id = a.connection_id
            JOIN settled.funds AS d ON d.id = t.debit_account / 4
            JOIN settled.funds AS e ON e.id = t.credit_account / 4
            WHERE c.enterprise_id = '{whose}'",
        key: "subject_id || ' ' || step",
        insert: "INSERT INTO settled.transfers (
                subject_id, step, event, amount, created_at, receipt_key, signature, payload, batch_id,
                debit_account, credit_account
            )
            SELECT n.subject_id, n.step, n.event, n.amount, n.created_at, n.receipt_key, n.signature, n.payload, n.batch_id,
                   settled.account(CASE n.debit WHEN 'available' THEN a.client_funds ELSE a.connection_funds END, n.debit),
                   settled.account(CASE n.credit WHEN 'available' THEN a.client_funds ELSE a.connection_funds END, n.credit)
            FROM jsonb_to_recordset($1::text::jsonb) AS n (
                subject_id uuid, step smallint, event text, amount numeric, created_at timestamptz, receipt_key uuid,
                signature bytea, payload text, batch_id uuid, debit text, credit text
            )
            JOIN settled.allocations AS a ON a.id = n.subject_id",
        may_have_more: false,
    },
    // Their deadline goes on when the target judges; how often they were tried is of no matter there.
    Copied {
        name: "parked",
        source: "SELECT key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at,
                   until, also_reply
            FROM settled.parked
            WHERE enterprise_id = '{whose}'",
        target: "SELECT key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at,
                   until, also_reply
            FROM settled.parked
            WHERE enterprise_id = '{whose}'",
        key: "key::text",
        insert: "WITH came AS (
                INSERT INTO settled.parked (
                    key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at,
                    until, also_reply, attempts, due_at
                )
                SELECT key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at,
                       until, also_reply, 0, clock_timestamp()
                FROM jsonb_populate_recordset(NULL::settled.parked, $1::text::jsonb)
                RETURNING key, allocation_id, parked_at
            )
            INSERT INTO settled.parkings (key, allocation_id, step, at)
            SELECT key, allocation_id, 'parked', parked_at FROM came",
        may_have_more: false,
    },
];

/// Acts on the partner: when its keys counted is told by them. The database signs them anew, as what the mover brought.
pub(super) const ACTS: Copied = Copied {
    name: "audit",
    source: "SELECT at, operator, act, why, filters, outcome
        FROM settled.audit
        WHERE act NOT LIKE 'partner move%'
          AND (filters ->> 'enterpriseId' = '{whose}'
            OR filters ->> 'publicKey' IN (
                SELECT encode(k.public_key, 'hex') FROM settled.partner_keys AS k WHERE k.enterprise_id = '{whose}'))",
    target: "SELECT at, operator, act, why, filters, outcome
        FROM settled.audit
        WHERE act NOT LIKE 'partner move%'
          AND (filters ->> 'enterpriseId' = '{whose}'
            OR filters ->> 'publicKey' IN (
                SELECT encode(k.public_key, 'hex') FROM settled.partner_keys AS k WHERE k.enterprise_id = '{whose}'))",
    key: "at::text || act || filters::text || outcome::text",
    insert: "INSERT INTO settled.audit (at, operator, act, why, filters, outcome)
        SELECT at, operator, act, why, filters, outcome
        FROM jsonb_populate_recordset(NULL::settled.audit, $1::text::jsonb)
        ORDER BY at",
    may_have_more: true,
};
