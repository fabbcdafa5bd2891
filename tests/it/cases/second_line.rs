//! What the database refuses, whatever program asks: a role that may write to every table still can not rewrite money. The
//! worker's own role may write less than that.

use std::{
    future::poll_fn,
    sync::{Arc, Mutex},
};

use settled::{domain::reason::Reason, store::roles::DatabaseRole};
use tokio_postgres::{AsyncMessage, Client, NoTls};
use uuid::Uuid;

use crate::kit::{
    auditor::Expect,
    command::ask,
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, connect, until},
};

/// No right; refused by a trigger; balances and transfers do not agree; a duplicate key.
const NO_RIGHT: &str = "42501";
const REFUSED: &str = "P0001";
const OWED: &str = "SX002";
/// The partner is on its way to another cell.
const MOVES_AWAY: &str = "SX003";

struct Books {
    place: Place,
    settled: Uuid,
    reserved: Uuid,
    role: String,
    db: Client,
}

/// Books with a settled and a reserved allocation, a final refusal and a dead letter, and a login with these rights.
async fn books(test: &str, grants: &str) -> Books {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<_> = (0..3).map(|_| partner.allocation("BTC", "10")).collect();
    place.reserve(&reservations).await;
    let wrong = partner
        .draft(&reservations[1], "cleared")
        .set("clientId", Uuid::new_v4().to_string());
    let messages = [
        partner.cleared(&reservations[0]),
        wrong.message(Expect::Refused("allocation_mismatch")),
    ];
    let worker = place.ready_worker(&COLLECTS).await;
    place.publish(&messages).await;
    let db = place.db().await;
    until("both are judged, and the dead letter is kept", PATIENCE, async || {
        let sql = "SELECT EXISTS (SELECT FROM settled.dead_letters)
                      AND EXISTS (SELECT FROM settled.receipts WHERE verdict = 'settled')";
        db.query_one(sql, &[])
            .await
            .expect("rows")
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    worker.terminate().await;
    ask(&place, &["roles", "--apply"]).await.document(0);
    let role = format!("{}_thief", place.name);
    db.batch_execute(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'p'; {}",
        grants.replace("ROLE", &role)
    ))
    .await
    .expect("a role");
    let url = place.database_url_of(&role);
    Books {
        settled: reservations[0].id,
        reserved: reservations[2].id,
        db: connect(&url).await,
        role,
        place,
    }
}

impl Books {
    /// What the database says of a transaction of these statements: its SQLSTATE; none: it is done.
    async fn says(&self, sql: &str) -> Option<String> {
        let sql = sql
            .replace("SETTLED", &format!("'{}'", self.settled))
            .replace("RESERVED", &format!("'{}'", self.reserved));
        let said = self.db.batch_execute(&format!("BEGIN; {sql}; COMMIT")).await;
        let code = said.err().map(|error| {
            let code = error.code().unwrap_or_else(|| panic!("{sql}: {error}"));
            code.code().to_owned()
        });
        self.db.batch_execute("ROLLBACK").await.expect("rolled back");
        code
    }

    async fn leave(self) {
        let owner = self.place.db().await;
        owner
            .batch_execute(&format!("DROP OWNED BY {0}; DROP ROLE {0}", self.role))
            .await
            .expect("gone");
        let checked = ask(&self.place, &["ledger", "check", "--signatures"]).await.document(0);
        assert_eq!(checked["ok"], true, "{checked}");
    }
}

const CHANGES: &str = "UPDATE settled.funds SET held = held - 3 WHERE holder = 'connection' AND held >= 3";
const MOVES: &str = "UPDATE settled.funds SET held = held - 3, allocated = allocated + 3 WHERE holder = 'connection'";
const MOVES_BACK: &str =
    "UPDATE settled.funds SET held = held + 3, allocated = allocated - 3 WHERE holder = 'connection'";
const TRANSFER: &str =
    "INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    SELECT gen_random_uuid(), 0, 'reserved', settled.account(f.id, 'held'), settled.account(f.id, 'allocated'), 3, now()
    FROM settled.funds AS f WHERE f.holder = 'connection'";

/// With every right on every table, and no ownership.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_write_everywhere_can_not_rewrite_money() {
    let grants = "GRANT USAGE ON SCHEMA settled TO ROLE;
        GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA settled TO ROLE;
        REVOKE ALL ON settled.owed, settled.seeds FROM ROLE";
    let books = books("second_line", grants).await;
    for (what, sql, code) in [
        (
            "a terminal allocation's status",
            "UPDATE settled.allocations SET status = 'released', reason = 'x' WHERE id = SETTLED",
            REFUSED,
        ),
        (
            "back to reserved",
            "UPDATE settled.allocations SET status = 'reserved', reason = 'x', settled_nonce = NULL WHERE id = SETTLED",
            REFUSED,
        ),
        (
            "its nonce",
            "UPDATE settled.allocations SET settled_nonce = 'x' WHERE id = SETTLED",
            REFUSED,
        ),
        (
            "its reason",
            "UPDATE settled.allocations SET partner_external_id = 'x' WHERE id = SETTLED",
            REFUSED,
        ),
        (
            "a quantity",
            "UPDATE settled.allocations SET quantity = 11 WHERE id = RESERVED",
            REFUSED,
        ),
        (
            "a currency",
            "UPDATE settled.allocations SET currency = 'ETH' WHERE id = RESERVED",
            REFUSED,
        ),
        (
            "a client",
            "UPDATE settled.allocations SET client_id = gen_random_uuid() WHERE id = RESERVED",
            REFUSED,
        ),
        (
            "whose funds",
            "UPDATE settled.allocations SET client_funds = 7 WHERE id = RESERVED",
            REFUSED,
        ),
        (
            "an id",
            "UPDATE settled.allocations SET id = gen_random_uuid() WHERE id = RESERVED",
            REFUSED,
        ),
        (
            "an allocation away",
            "DELETE FROM settled.allocations WHERE id = RESERVED",
            REFUSED,
        ),
        ("all allocations away", "TRUNCATE settled.allocations", REFUSED),
        ("a transfer", "UPDATE settled.transfers SET amount = 1", REFUSED),
        ("a transfer away", "DELETE FROM settled.transfers", REFUSED),
        (
            "an account's owner",
            "UPDATE settled.funds SET owner = gen_random_uuid() WHERE holder = 'client'",
            REFUSED,
        ),
        (
            "an account's currency",
            "UPDATE settled.funds SET currency = 'ETH'",
            REFUSED,
        ),
        ("an account away", "DELETE FROM settled.funds", REFUSED),
        (
            "a balance alone",
            "UPDATE settled.funds SET available = available + 1 WHERE holder = 'client'",
            OWED,
        ),
        (
            "a balance to another owner",
            "UPDATE settled.funds SET available = available - 1 WHERE holder = 'client';
            UPDATE settled.funds SET allocated = allocated + 1 WHERE holder = 'connection'",
            OWED,
        ),
        (
            "money out of nothing",
            "INSERT INTO settled.funds (holder, owner, currency, available) VALUES ('client', gen_random_uuid(), 'BTC', 5)",
            OWED,
        ),
        ("a transfer without its balances", TRANSFER, OWED),
        ("one of its two balances", &format!("{TRANSFER}; {CHANGES}"), OWED),
        (
            "another amount",
            &format!(
                "{TRANSFER}; UPDATE settled.funds SET held = held - 4, allocated = allocated + 4 WHERE holder = 'connection'"
            ),
            OWED,
        ),
        (
            "in a savepoint",
            "SAVEPOINT a; UPDATE settled.funds SET held = held + 1 WHERE holder = 'connection'; RELEASE a",
            OWED,
        ),
        (
            "checked at once",
            "SET CONSTRAINTS ALL IMMEDIATE; UPDATE settled.funds SET held = held + 1 WHERE holder = 'connection'",
            OWED,
        ),
        (
            "a savepoint's part taken back",
            &format!("{TRANSFER}; SAVEPOINT a; {MOVES}; ROLLBACK TO a"),
            OWED,
        ),
        (
            "the first part taken back",
            &format!("SAVEPOINT a; {TRANSFER}; ROLLBACK TO a; {MOVES}"),
            OWED,
        ),
        (
            "the last of many",
            &format!("{}{CHANGES}", format!("{MOVES}; {MOVES_BACK}; ").repeat(20)),
            OWED,
        ),
        ("what is owed", "DELETE FROM settled.owed", NO_RIGHT),
        (
            "what is owed, made up",
            "INSERT INTO settled.owed VALUES (pg_current_xact_id(), false, ARRAY[5], ARRAY[1.0])",
            NO_RIGHT,
        ),
        (
            "a settled receipt",
            "UPDATE settled.receipts SET verdict = 'rejected', reason = 'internal' WHERE verdict = 'settled'",
            REFUSED,
        ),
        ("a receipt's nonce", "UPDATE settled.receipts SET nonce = 'x'", REFUSED),
        (
            "a receipt's payload",
            "UPDATE settled.receipts SET payload_digest = sha256('x')",
            REFUSED,
        ),
        (
            "a final reason",
            "UPDATE settled.receipts SET verdict = 'settled', reason = NULL WHERE reason = 'allocation_mismatch'",
            REFUSED,
        ),
        ("a receipt away", "DELETE FROM settled.receipts", REFUSED),
        (
            "a dead letter's body",
            "UPDATE settled.dead_letters SET body = 'x'",
            REFUSED,
        ),
        (
            "a dead letter's key",
            "UPDATE settled.dead_letters SET routing_key = 'x.allocation.update'",
            REFUSED,
        ),
        (
            "a parked message's body",
            "UPDATE settled.parked SET body = 'x'",
            REFUSED,
        ),
        (
            "whose a key is",
            "UPDATE settled.partner_keys SET enterprise_id = 'x'",
            REFUSED,
        ),
        ("a key away", "DELETE FROM settled.partner_keys", REFUSED),
        ("all that waits away", "TRUNCATE settled.parked", REFUSED),
        ("the side room away", "TRUNCATE settled.held", REFUSED),
        ("all dead letters away", "TRUNCATE settled.dead_letters", REFUSED),
        ("all partners away", "TRUNCATE settled.partners CASCADE", REFUSED),
        ("all connections away", "TRUNCATE settled.connections CASCADE", REFUSED),
        (
            "what a symbol means",
            "UPDATE settled.currency_symbols SET currency = 'x'",
            REFUSED,
        ),
        ("a symbol away", "DELETE FROM settled.currency_symbols", REFUSED),
        (
            "a connection's client",
            "UPDATE settled.connections SET client_id = gen_random_uuid()",
            REFUSED,
        ),
        ("the audit", "DELETE FROM settled.audit", REFUSED),
        ("an epoch", "UPDATE settled.epochs SET epoch = epoch + 7", REFUSED),
        ("who wanted what", "DELETE FROM settled.voices", REFUSED),
        ("triggers off", "SET LOCAL session_replication_role = replica", NO_RIGHT),
        (
            "a trigger off",
            "ALTER TABLE settled.funds DISABLE TRIGGER pay",
            NO_RIGHT,
        ),
        (
            "a function",
            "CREATE OR REPLACE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            NO_RIGHT,
        ),
    ] {
        assert_eq!(books.says(sql).await.as_deref(), Some(code), "{what}: {sql}");
    }
    // What belongs together is let through, in any order of the statements.
    for sql in [
        format!("{TRANSFER}; {MOVES}; ROLLBACK"),
        format!("{MOVES}; {MOVES_BACK}"),
        format!("SAVEPOINT a; {TRANSFER}; ROLLBACK TO a; {MOVES}; {MOVES_BACK}"),
        format!("{MOVES}; {MOVES_BACK}; ").repeat(20),
        "SELECT 1".to_owned(),
    ] {
        assert_eq!(books.says(&sql).await, None, "{sql}");
    }
    // Each refusal says what it is about.
    for (sql, sentence) in [
        (
            "UPDATE settled.allocations SET quantity = 1",
            "these columns never change",
        ),
        (
            "UPDATE settled.allocations SET notes = notes WHERE status <> 'reserved'",
            "these columns never change",
        ),
        (
            "UPDATE settled.allocations SET updated_at = now() WHERE status <> 'reserved'",
            "what is cleared or released never changes",
        ),
        ("DELETE FROM settled.funds", "its rows are never deleted"),
        (
            "UPDATE settled.receipts SET verdict = 'parked' WHERE verdict = 'settled'",
            "a receipt that says settled never changes",
        ),
        (
            "UPDATE settled.transfers SET amount = 1",
            "its rows are only ever added",
        ),
        ("TRUNCATE settled.parked", "its rows are never taken away all at once"),
    ] {
        let error = books.db.batch_execute(sql).await.expect_err(sql);
        let said = error
            .as_db_error()
            .map(|db| db.message().to_owned())
            .unwrap_or_default();
        assert!(said.ends_with(sentence), "{sql}: {said}");
    }
    books.leave().await;
}

/// As a member of settled_worker: what a worker has no need of it has no right to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thief_of_the_workers_role_is_kept_to_what_a_worker_does() {
    let books = books("thief", &format!("GRANT {} TO ROLE", DatabaseRole::Worker)).await;
    for sql in [
        "UPDATE settled.allocations SET quantity = 11 WHERE id = RESERVED",
        "UPDATE settled.allocations SET client_funds = 7 WHERE id = RESERVED",
        "INSERT INTO settled.allocations SELECT * FROM settled.allocations",
        "DELETE FROM settled.allocations",
        "UPDATE settled.funds SET external = 0",
        "UPDATE settled.funds SET owner = gen_random_uuid()",
        "INSERT INTO settled.funds (holder, owner, currency) VALUES ('client', gen_random_uuid(), 'BTC')",
        "UPDATE settled.receipts SET nonce = 'x'",
        "DELETE FROM settled.receipts",
        "DELETE FROM settled.transfers",
        "SELECT payload FROM settled.transfers",
        "INSERT INTO settled.deposits (client_id, reference, currency, quantity) VALUES (gen_random_uuid(), 'r', 'BTC', 1)",
        "SELECT settled.deposit(gen_random_uuid(), 'BTC', 5, 'r')",
        "SELECT settled.withdraw(gen_random_uuid(), 'BTC', 5, 'r')",
        "SELECT settled.reserve('[]')",
        "SELECT settled.move(gen_random_uuid(), 'deposit', 1, 2, 3, now())",
        "INSERT INTO settled.partners (enterprise_id, name) VALUES ('x', 'x')",
        "INSERT INTO settled.partner_keys (public_key, enterprise_id) VALUES (decode(repeat('02', 33), 'hex'), 'acme')",
        "UPDATE settled.partner_keys SET valid_until = NULL",
        "INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since) VALUES ('acme', 'x', 'BTC', now())",
        "UPDATE settled.partners SET suspended_at = NULL",
        "INSERT INTO settled.connections SELECT * FROM settled.connections",
        "SELECT * FROM settled.tokens",
        "SELECT * FROM settled.audit",
        "INSERT INTO settled.audit (at, operator, act, filters, outcome) VALUES (now(), 'x', 'x', '{}', '{}')",
        "UPDATE settled.dead_letters SET body = 'x'",
        "DELETE FROM settled.dead_letters",
        "SELECT * FROM settled.owed",
        "TRUNCATE settled.parked",
    ] {
        assert_eq!(books.says(sql).await.as_deref(), Some(NO_RIGHT), "{sql}");
    }
    // And what it may write is held to the same rules.
    for (sql, code) in [
        (
            "UPDATE settled.allocations SET status = 'released', reason = 'x' WHERE id = SETTLED",
            REFUSED,
        ),
        (
            "UPDATE settled.funds SET held = held + 1 WHERE holder = 'connection'",
            OWED,
        ),
        (
            "UPDATE settled.receipts SET verdict = 'rejected', reason = 'internal' WHERE verdict = 'settled'",
            REFUSED,
        ),
    ] {
        assert_eq!(books.says(sql).await.as_deref(), Some(code), "{sql}");
    }
    books.leave().await;
}

/// What takes a reserved allocation out of `reserved`, in the three statements of its books: what is said, what moves, and the
/// balances. By whoever could write all of them.
fn settles() -> String {
    "UPDATE settled.allocations SET status = 'released', reason = 'x', settled_nonce = 'n' WHERE id = RESERVED"
        .to_owned()
}

fn transfers(amount: u8, to: &str) -> String {
    format!(
        "INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at, batch_id,
                                        receipt_key, signature, payload)
         SELECT a.id, 1, 'released', settled.account(a.connection_funds, 'held'), {to}, {amount}, now(), gen_random_uuid(),
                gen_random_uuid(), decode(repeat('00', 65), 'hex'), 'p'
         FROM settled.allocations AS a WHERE a.id = RESERVED"
    )
}

fn balances(amount: u8) -> String {
    format!(
        "UPDATE settled.funds SET held = held - {amount} WHERE holder = 'connection';
         UPDATE settled.funds SET available = available + {amount} WHERE holder = 'client'"
    )
}

const BACK: &str = "settled.account(a.client_funds, 'available')";

/// As a member of settled_worker, who may write each part: no part of a settlement stands without the others. Funds that are held
/// are neither left behind nor moved before their time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allocation_is_settled_by_its_own_transfer() {
    let books = books("own_transfer", &format!("GRANT {} TO ROLE", DatabaseRole::Worker)).await;
    let elsewhere = "settled.account(a.connection_funds, 'allocated')";
    for (what, sql) in [
        ("a status alone", settles()),
        (
            "a transfer of what stays reserved",
            format!("{}; {}", transfers(10, BACK), balances(10)),
        ),
        (
            "a part of its quantity",
            format!("{}; {}; {}", settles(), transfers(3, BACK), balances(3)),
        ),
        (
            "another outcome's account",
            format!(
                "{}; {}; UPDATE settled.funds SET held = held - 10, allocated = allocated + 10 WHERE holder = 'connection'",
                settles(),
                transfers(10, elsewhere)
            ),
        ),
        (
            "checked at once",
            format!("SET CONSTRAINTS ALL IMMEDIATE; {}", settles()),
        ),
        (
            "a transfer taken back",
            format!(
                "{}; SAVEPOINT a; {}; {}; ROLLBACK TO a",
                settles(),
                transfers(10, BACK),
                balances(10)
            ),
        ),
    ] {
        assert_eq!(books.says(&sql).await.as_deref(), Some(OWED), "{what}: {sql}");
    }
    // Together they are let through, in any order; what nobody signed is what `ledger check --signatures` is for.
    for parts in [
        [settles(), transfers(10, BACK), balances(10)],
        [balances(10), transfers(10, BACK), settles()],
    ] {
        let sql = format!("{}; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK", parts.join("; "));
        assert_eq!(books.says(&sql).await, None, "{sql}");
    }
    books.leave().await;
}

/// As a member of settled_registrar: when a key was registered, revoked, proven and reinstated is the server's word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registrars_login_says_not_when() {
    let books = books(
        "registrars_login",
        &format!("GRANT {} TO ROLE", DatabaseRole::Registrar),
    )
    .await;
    let told = async |sql: &str| {
        books
            .db
            .batch_execute(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    };
    let is = async |condition: &str| {
        let sql =
            format!("SELECT {condition} FROM settled.partner_keys WHERE public_key = decode(repeat('02', 33), 'hex')");
        let row = books.db.query_one(&sql, &[]).await.expect("a row");
        assert_eq!(row.get::<_, Option<bool>>(0), Some(true), "{condition}");
    };
    // A key that always was, and was proven long ago.
    told(
        "INSERT INTO settled.partner_keys (public_key, enterprise_id, created_at, proven_at, reinstated_at, valid_from)
         VALUES (decode(repeat('02', 33), 'hex'), 'acme', '2020-01-01', '2020-01-01', '2020-01-01', '2020-01-01')",
    )
    .await;
    is("created_at > now() - interval '1 minute' AND proven_at = created_at AND reinstated_at IS NULL").await;
    let mine = "WHERE public_key = decode(repeat('02', 33), 'hex')";
    told(&format!(
        "UPDATE settled.partner_keys SET proven_at = '2020-01-01' {mine}"
    ))
    .await;
    is("proven_at > created_at").await;
    let refused = async |set: &str| {
        let sql = format!("UPDATE settled.partner_keys SET {set} {mine}");
        assert_eq!(books.says(&sql).await.as_deref(), Some(REFUSED), "{set}");
    };
    refused("reinstated_at = now()").await;
    refused("revoked_at = now(), reinstated_at = now()").await;
    told(&format!(
        "UPDATE settled.partner_keys SET revoked_at = '2020-01-01' {mine}"
    ))
    .await;
    is("revoked_at > created_at").await;
    refused("revoked_at = NULL").await;
    refused("revoked_at = now()").await;
    refused("reinstated_at = now()").await;
    // More than is remembered: not all that it signed meanwhile would stay refused.
    books
        .place
        .tamper(
            "INSERT INTO settled.distrusted (public_key, payload_digest, at)
             SELECT decode(repeat('02', 33), 'hex'), sha256(n::text::bytea), now() FROM generate_series(1, 100000) AS n",
        )
        .await;
    refused("revoked_at = NULL, reinstated_at = now()").await;
    books
        .place
        .tamper("DELETE FROM settled.distrusted WHERE payload_digest = sha256('7')")
        .await;
    told(&format!(
        "UPDATE settled.partner_keys SET revoked_at = NULL, reinstated_at = '2020-01-01' {mine}"
    ))
    .await;
    is("reinstated_at > proven_at AND revoked_at IS NULL").await;
    // An act of last year.
    told(
        "INSERT INTO settled.audit (at, operator, act, filters, outcome)
         VALUES ('2020-01-01', 'ann', 'key add', '{\"publicKey\": \"02\"}', '{}')",
    )
    .await;
    let sql = "SELECT min(at) > now() - interval '1 hour' FROM settled.audit";
    let row = books.db.query_one(sql, &[]).await.expect("a row");
    assert!(row.get::<_, bool>(0), "the server says when");
    // Who owns the tables brings times along, as a partner's way to another cell does.
    let owner = books.place.db().await;
    owner
        .batch_execute(
            "INSERT INTO settled.partner_keys (public_key, enterprise_id, created_at)
             VALUES (decode(repeat('03', 33), 'hex'), 'acme', '2020-01-01')",
        )
        .await
        .expect("a row");
    let sql = "SELECT count(*) FROM settled.partner_keys WHERE created_at = '2020-01-01'";
    assert_eq!(owner.query_one(sql, &[]).await.expect("a row").get::<_, i64>(0), 1);
    books.leave().await;
}

/// Times that no program reads: wherever people's logins may write one, it is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_that_nobody_reads_is_refused() {
    let grants = format!("GRANT {}, {} TO ROLE", DatabaseRole::Operator, DatabaseRole::Registrar);
    let books = books("times", &grants).await;
    let open = "SELECT format('%s.%s', c.relname, a.attname)
                FROM pg_class AS c
                JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                WHERE c.relnamespace = 'settled'::regnamespace
                  AND c.relkind = 'r'
                  AND a.atttypid = 'timestamptz'::regtype
                  AND EXISTS (
                      SELECT
                      FROM unnest(ARRAY['settled_operator', 'settled_registrar', 'settled_custody']) AS r (role)
                      WHERE has_column_privilege(r.role, c.oid, a.attnum, 'INSERT')
                         OR has_column_privilege(r.role, c.oid, a.attnum, 'UPDATE')
                  )
                  AND NOT EXISTS (
                      SELECT
                      FROM pg_constraint AS k
                      WHERE k.conrelid = c.oid
                        AND k.conname = c.relname || '_times'
                        AND position(format('(%I > ''-infinity''', a.attname) IN pg_get_constraintdef(k.oid)) > 0
                        AND position(format('(%I < ''9999-12-30', a.attname) IN pg_get_constraintdef(k.oid)) > 0
                  )
                ORDER BY 1";
    let owner = books.place.db().await;
    let rows = owner.query(open, &[]).await.expect("columns");
    let open: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    // What may have no end, and is read as that.
    assert_eq!(
        open,
        [
            "outbox.leased_until",
            "partner_keys.valid_from",
            "partner_keys.valid_until"
        ]
    );
    for time in ["infinity", "-infinity", "200000-01-01"] {
        for sql in [
            "INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
             VALUES (gen_random_uuid(), 1, '', 0, 'TIME', now())",
            "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = 'TIME'",
            "INSERT INTO settled.clients (client_id, enterprise_id, created_at) VALUES (gen_random_uuid(), 'acme', 'TIME')",
            "INSERT INTO settled.partners (enterprise_id, name, created_at) VALUES ('globex', 'x', 'TIME')",
            "INSERT INTO settled.plans (at, operator, filters, messages) VALUES ('TIME', 'x', '{}', 1)",
            "INSERT INTO settled.epochs (epoch, books, begun_at) VALUES (2, gen_random_uuid(), 'TIME')",
        ] {
            let sql = sql.replace("TIME", time);
            assert_eq!(books.says(&sql).await.as_deref(), Some("23514"), "{sql}");
        }
    }
    // The last moment that the programs know.
    let last = "INSERT INTO settled.clients (client_id, enterprise_id, created_at)
                VALUES (gen_random_uuid(), 'acme', '9999-12-30 22:00:00.999999+00')";
    assert_eq!(books.says(last).await, None);
    ask(&books.place, &["client", "list"]).await.document(0);
    books.leave().await;
}

/// A path with a schema of the thief's in front: no trigger finds there what it asks with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_of_ones_own_leads_no_trigger_elsewhere() {
    let grants = format!(
        "GRANT {} TO ROLE; CREATE SCHEMA ROLE AUTHORIZATION ROLE",
        DatabaseRole::Registrar
    );
    let books = books("own_path", &grants).await;
    books
        .place
        .tamper(
            "UPDATE settled.partners SET moving = gen_random_uuid(), quarantined_at = now(), quarantine_reason = 'x'",
        )
        .await;
    let adds =
        "INSERT INTO settled.partner_keys (public_key, enterprise_id) VALUES (decode(repeat('02', 33), 'hex'), 'acme')";
    assert_eq!(books.says(adds).await.as_deref(), Some(MOVES_AWAY));
    let role = &books.role;
    books
        .db
        .batch_execute(&format!(
            "CREATE FUNCTION {role}.never(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
             CREATE OPERATOR {role}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = {role}.never);
             SET search_path = {role}, pg_catalog"
        ))
        .await
        .expect("an operator of its own");
    let equals = books.db.query_one("SELECT 'a'::text = 'a'::text", &[]).await;
    assert!(!equals.expect("a row").get::<_, bool>(0), "it is what this login finds");
    assert_eq!(books.says(adds).await.as_deref(), Some(MOVES_AWAY));
    books.leave().await;
}

/// A function with its owner's rights serves the table that it belongs to: no login hangs it on one of its own, and it refuses to
/// work there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_of_ours_serves_no_other_table() {
    let place = Place::new("own_tables").await;
    ask(&place, &["roles", "--apply"]).await.document(0);
    let owner = place.db().await;
    let sql = "SELECT format('settled.%I(%s)', p.proname, oidvectortypes(p.proargtypes)), p.prorettype = 'trigger'::regtype,
                      p.proconfig::text LIKE '%search_path=pg_catalog, pg_temp%',
                      EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS e WHERE e.grantee = 0),
                      p.prosecdef
               FROM pg_proc AS p
               WHERE p.pronamespace = 'settled'::regnamespace AND (p.prosecdef OR p.prorettype = 'trigger'::regtype)";
    let mut triggers = Vec::new();
    for row in owner.query(sql, &[]).await.expect("functions") {
        let function: String = row.get(0);
        assert_eq!(
            row.get::<_, Option<bool>>(2),
            Some(true),
            "{function}: a fixed search_path"
        );
        if !row.get::<_, bool>(4) {
            continue;
        }
        assert!(!row.get::<_, bool>(3), "{function} is everybody's");
        if row.get(1) {
            triggers.push(function);
        }
    }
    assert!(triggers.len() >= 6, "{triggers:?}");
    let hang = |function: &str| {
        format!(
            "CREATE TEMP TABLE mine (x int) ON COMMIT DROP;
             CREATE TRIGGER mine AFTER INSERT ON mine FOR EACH STATEMENT EXECUTE FUNCTION {function}"
        )
    };
    let login = format!("{}_bob", place.name);
    owner
        .batch_execute(&format!(
            "CREATE ROLE {login} LOGIN PASSWORD 'p'; GRANT TEMPORARY ON DATABASE {} TO {login}",
            place.name
        ))
        .await
        .expect("a role that may make tables of its own");
    for role in DatabaseRole::ALL
        .into_iter()
        .filter(|role| *role != DatabaseRole::Owner)
    {
        owner
            .batch_execute(&format!("GRANT {role} TO {login}"))
            .await
            .expect("a member");
        let db = connect(&place.database_url_of(&login)).await;
        for function in &triggers {
            let error = db.batch_execute(&hang(function)).await.expect_err(function);
            assert_eq!(
                error.code().map(|code| code.code()),
                Some(NO_RIGHT),
                "{role} {function}: {error:?}"
            );
        }
        owner
            .batch_execute(&format!("REVOKE {role} FROM {login}"))
            .await
            .expect("none any more");
    }
    // Not for who may hang it there either.
    for function in &triggers {
        let sql = format!("BEGIN; {}; INSERT INTO mine VALUES (1)", hang(function));
        let error = owner.batch_execute(&sql).await.expect_err(function);
        let said = error.as_db_error().map(|db| db.message().to_owned());
        assert!(
            said.as_deref()
                .is_some_and(|said| said.starts_with("this function serves")),
            "{function}: {said:?}"
        );
        owner.batch_execute("ROLLBACK").await.expect("rolled back");
    }
    owner
        .batch_execute(&format!("DROP OWNED BY {login}; DROP ROLE {login}"))
        .await
        .expect("gone");
}

/// As a member of settled_operator: what its commands do not do to what was refused, no statement of its does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_login_takes_no_refusal_back() {
    let books = books("operators_login", &format!("GRANT {} TO ROLE", DatabaseRole::Operator)).await;
    let owner = books.place.db().await;
    // A refusal that is not final, as a parked message has.
    owner
        .batch_execute(
            "INSERT INTO settled.receipts (key, allocation_id, event_id, batch_id, first_seen, last_seen, verdict, reason,
                                           enterprise_id, nonce, payload_digest, message_digest, public_key, voided_at)
             SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), batch_id, now(), now(), 'parked', NULL,
                    enterprise_id, 'voided', payload_digest, message_digest, public_key, now()
             FROM settled.receipts WHERE verdict = 'settled'",
        )
        .await
        .expect("a voided nonce");
    for sql in [
        "UPDATE settled.receipts SET voided_at = NULL WHERE nonce = 'voided'",
        "UPDATE settled.receipts SET voided_at = now() + interval '1 day' WHERE nonce = 'voided'",
        "DELETE FROM settled.dead_letters",
    ] {
        assert_eq!(books.says(sql).await.as_deref(), Some(REFUSED), "{sql}");
    }
    for sql in [
        "DELETE FROM settled.receipts",
        "UPDATE settled.receipts SET verdict = 'settled'",
        "UPDATE settled.dead_letters SET reason = 'internal'",
        "UPDATE settled.allocations SET status = 'cleared' WHERE id = RESERVED",
        "DELETE FROM settled.parked",
        "DELETE FROM settled.audit",
    ] {
        let said = books.says(sql).await;
        assert!(matches!(said.as_deref(), Some(NO_RIGHT)), "{sql}: {said:?}");
    }
    // What a person is done with may go.
    owner
        .batch_execute("UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now()")
        .await
        .expect("discarded");
    assert_eq!(books.says("DELETE FROM settled.dead_letters").await, None);
    books.leave().await;
}

/// The trigger knows every final reason that a receipt can have: those from the check of the nonce on.
#[test]
fn every_final_reason_of_a_receipt_is_kept() {
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/schema");
    let mut files: Vec<_> = std::fs::read_dir(schema)
        .expect("the schema")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let text: String = files
        .iter()
        .map(|file| std::fs::read_to_string(file).expect("a migration"))
        .collect();
    // The newest that is made.
    let at = text.rfind("CREATE TRIGGER final_for_ever").expect("the trigger");
    let trigger = text[at..].split(';').next().expect("a statement");
    let proven = Reason::ALL
        .iter()
        .skip_while(|reason| reason.as_str() != "nonce_reused");
    let mut found = 0;
    for reason in proven.filter(|reason| reason.is_final()) {
        assert!(trigger.contains(&format!("'{reason}'")), "{reason} is not in {trigger}");
        found += 1;
    }
    assert!(found >= 4, "reasons are read");
}

/// What PL/pgSQL asks is planned at its first call on a connection, and that plan is kept: see `docs/traps.md`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_batch_makes_no_later_one_slow() {
    let place = Place::new("first_plan").await;
    place
        .tamper(
            "INSERT INTO settled.funds (holder, owner, currency, held)
            SELECT 'connection', gen_random_uuid(), 'BTC', 10 FROM generate_series(1, 300)",
        )
        .await;
    let (db, said) = connect_and_hear(&place).await;
    db.batch_execute(
        "LOAD 'auto_explain'; SET auto_explain.log_nested_statements = on; SET auto_explain.log_min_duration = 0;
        SET auto_explain.log_analyze = on; SET client_min_messages = log",
    )
    .await
    .expect("the tests' user may");
    for limit in [1, 300] {
        let some = format!(
            "WHERE f.id IN (SELECT id FROM settled.funds WHERE holder = 'connection' ORDER BY id LIMIT {limit})"
        );
        let moves = MOVES.replace("WHERE holder = 'connection'", &some);
        let moves = moves.replace("settled.funds SET", "settled.funds AS f SET");
        let transfers = TRANSFER.replace("WHERE f.holder = 'connection'", &some);
        db.batch_execute(&format!("BEGIN; {transfers}; {moves}; COMMIT"))
            .await
            .expect("balances and transfers agree");
    }
    let said = said.lock().expect("no panic").clone();
    let plans: Vec<&String> = said.iter().filter(|plan| plan.contains("settled.owed")).collect();
    // Of each transaction what is owed, what is paid, the sum of both, and its end.
    assert_eq!(plans.len(), 8, "{plans:#?}");
    for plan in plans {
        assert!(!plan.contains("Removed by Join Filter"), "each with each: {plan}");
        assert!(!plan.contains("Seq Scan on owed"), "all of it is read: {plan}");
    }
}

/// A connection, and what the server says on it beside its answers.
async fn connect_and_hear(place: &Place) -> (Client, Arc<Mutex<Vec<String>>>) {
    let (client, mut connection) = tokio_postgres::connect(&place.database_url, NoTls)
        .await
        .expect("the database answers");
    let said = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&said);
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notice(notice) = message {
                hears.lock().expect("no panic").push(notice.message().to_owned());
            }
        }
    });
    (client, said)
}
