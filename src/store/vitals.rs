//! The server itself, so far as settling depends on it: what `doctor` asks.

use jiff::Timestamp;

use super::{Store, StoreError, migrate::HAS_LZ4, roles::DatabaseRole};

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
    /// Whether it was built with what the schema compresses with.
    pub has_lz4: bool,
}

/// Something that everybody may make in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenPlace {
    /// `temporary objects`, `objects in schema public`.
    pub what: String,
    /// What takes it away.
    pub revoked: String,
}

/// A trigger that keeps rows from being changed: table, name, and the events it refuses (bits of `pg_trigger.tgtype`:
/// BEFORE 2, DELETE 8, UPDATE 16, TRUNCATE 32).
const GUARDS: [(&str, &str, i16); 37] = [
    ("transfers", "append_only", 58),
    ("batches", "append_only", 58),
    ("deposits", "append_only", 58),
    ("withdrawals", "append_only", 58),
    ("moved_funds", "append_only", 58),
    ("parkings", "append_only", 58),
    ("holdings", "append_only", 58),
    ("receipts", "never_forgotten", 42),
    ("audit", "append_only", 58),
    ("audit_subjects", "append_only", 58),
    ("approvals", "append_only", 58),
    ("distrusted", "append_only", 58),
    ("epochs", "append_only", 58),
    ("voices", "append_only", 58),
    ("seeds", "append_only", 58),
    ("told", "never_changed", 50),
    ("allocations", "fixed", 18),
    ("funds", "fixed", 18),
    ("receipts", "fixed", 18),
    ("dead_letters", "fixed", 18),
    ("parked", "fixed", 18),
    ("held", "fixed", 18),
    ("connections", "fixed", 18),
    ("partner_keys", "fixed", 18),
    ("currency_symbols", "fixed", 18),
    ("moves", "fixed", 18),
    ("plans", "fixed", 18),
    ("allocations", "never_forgotten", 42),
    ("funds", "never_forgotten", 42),
    ("partner_keys", "never_forgotten", 42),
    ("currency_symbols", "never_forgotten", 42),
    ("moves", "never_forgotten", 42),
    ("dead_letters", "never_emptied", 34),
    ("parked", "never_emptied", 34),
    ("held", "never_emptied", 34),
    ("partners", "never_emptied", 34),
    ("connections", "never_emptied", 34),
];

/// What a receipt that says settled keeps for ever: the guard `settled_for_ever` compares it.
const KEPT_OF_RECEIPTS: [&str; 12] = [
    "key",
    "allocation_id",
    "event_id",
    "batch_id",
    "first_seen",
    "verdict",
    "reason",
    "enterprise_id",
    "nonce",
    "payload_digest",
    "message_digest",
    "public_key",
];

/// Functions that everybody may call unless somebody took that away: what the worker's user needs of them.
const FUNCTIONS: [&str; 1] = ["settled.exactly(text, bigint, bigint)"];

/// Why the server's limits can not be relied on; None: they can. Without them a statement that hangs is given up by us alone, and
/// goes on there with its locks.
pub fn check_limits(limits: &[(&str, i64, i64)]) -> Result<(), String> {
    let other: Vec<String> = limits
        .iter()
        .filter(|(_, wanted, kept)| wanted != kept)
        .map(|(name, wanted, kept)| format!("{name} is {kept} ms within a transaction that set it to {wanted} ms"))
        .collect();
    match other.as_slice() {
        [] => Ok(()),
        other => Err(format!(
            "the database does not keep our limits: {}; what stands before it, a pooler perhaps, drops SET LOCAL",
            other.join(", ")
        )),
    }
}

impl Store {
    /// Asks for an answer, and whether anything could be written.
    ///
    /// # Errors
    /// There is no answer, or nothing could.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let session = self.session("ping").await?;
        let rows = session
            .query(
                "/* store::ping */ SELECT current_setting('transaction_read_only')::boolean",
                &[],
            )
            .await?;
        session.may_write(!session.one(&rows)?.get::<_, bool>(0))
    }

    /// How the server is and how it is set up.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn vitals(&self) -> Result<Vitals, StoreError> {
        let session = self.session("vitals").await?;
        let rows = session
            .query(
                &format!(
                    "/* vitals::vitals */
                SELECT {HAS_LZ4} AS has_lz4, current_setting('server_version') AS version,
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
                       current_setting('session_replication_role') AS replication_role"
                ),
                &[],
            )
            .await?;
        let row = session.one(&rows)?;
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
            has_lz4: row.get("has_lz4"),
        })
    }

    /// Which of the limits that are told with every transaction the server keeps there, in milliseconds: name, wanted, kept.
    /// What stands between us and it may drop what a session sets.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn limits(&self) -> Result<Vec<(&'static str, i64, i64)>, StoreError> {
        let wanted = self.limits.each;
        let names = wanted.map(|(name, _)| name);
        let session = self.session("limits").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* vitals::limits */
                SELECT s.setting::bigint
                FROM unnest($1::text[]) WITH ORDINALITY AS n (name, place)
                JOIN pg_settings AS s USING (name)
                ORDER BY place",
                &[&&names[..]],
            )
            .await?;
        // Nothing was written: a COMMIT here would be one of a settlement to whoever injects faults.
        session.rollback().await;
        let kept = rows.iter().map(|row| row.get::<_, i64>(0));
        Ok(wanted
            .into_iter()
            .zip(kept)
            .map(|((name, wanted), kept)| (name, wanted, kept))
            .collect())
    }

    /// The database's clock.
    ///
    /// # Errors
    /// The database is away.
    pub async fn clock(&self) -> Result<Timestamp, StoreError> {
        let session = self.session("clock").await?;
        let rows = session
            .query("/* vitals::clock */ SELECT clock_timestamp()", &[])
            .await?;
        Ok(session.one(&rows)?.get(0))
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
                "/* vitals::missing_guards */
                WITH armed AS (
                    SELECT c.relname AS table_name, t.tgname AS name, t.tgtype AS events, t.tgqual IS NULL AS is_always,
                           f.proname AS function, f.prosrc ~ 'RAISE EXCEPTION' AS refuses,
                           pg_get_triggerdef(t.oid) AS definition
                    FROM pg_trigger AS t
                    JOIN pg_class AS c ON c.oid = t.tgrelid
                    JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'settled'
                    JOIN pg_proc AS f ON f.oid = t.tgfoid
                    WHERE t.tgenabled IN ('O', 'A')
                ), refusing AS (
                    SELECT * FROM armed WHERE function = 'refuse_change' AND refuses
                ), wanting AS (
                SELECT w.table_name, w.name
                FROM unnest($1::text[], $2::text[], $3::smallint[]) AS w (table_name, name, events)
                WHERE NOT EXISTS (
                    SELECT
                    FROM refusing AS a
                    WHERE a.table_name = w.table_name AND a.name = w.name
                      AND a.events & w.events = w.events
                      AND a.is_always
                )
                UNION ALL
                SELECT 'receipts', 'settled_for_ever'
                WHERE NOT EXISTS (
                    SELECT
                    FROM refusing AS a
                    WHERE a.table_name = 'receipts' AND a.name = 'settled_for_ever'
                      -- For each row, on UPDATE.
                      AND a.events & 17 = 17
                      AND position('WHEN (((old.verdict = ''settled''::text) AND (' IN a.definition) > 0
                      AND NOT EXISTS (
                          SELECT
                          FROM unnest($4::text[]) AS k (name)
                          WHERE position(format('(old.%1$s IS DISTINCT FROM new.%1$s)', k.name) IN a.definition) = 0
                      )
                )
                UNION ALL
                SELECT w.table_name, w.name
                FROM (VALUES
                    -- BEFORE, for each row, on UPDATE; on DELETE.
                    ('receipts', 'voided_for_ever', 19,
                     'WHEN (((old.voided_at IS NOT NULL) AND (new.voided_at IS DISTINCT FROM old.voided_at)))'),
                    ('dead_letters', 'done_with', 11,
                     'WHEN ((old.state <> ALL (ARRAY[''discarded''::text, ''settled''::text])))')
                ) AS w (table_name, name, events, asked)
                WHERE NOT EXISTS (
                    SELECT
                    FROM refusing AS a
                    WHERE a.table_name = w.table_name AND a.name = w.name
                      AND a.events & w.events = w.events
                      AND position(w.asked IN a.definition) > 0
                )
                UNION ALL
                SELECT w.table_name, w.name
                FROM (VALUES
                    ('allocations', 'terminal', 'refuse_change'), ('receipts', 'final_for_ever', 'refuse_change'),
                    ('transfers', 'owe', 'transfers_owe'), ('funds', 'pay', 'balances_pay'),
                    ('funds', 'pay_first', 'balances_pay'), ('owed', 'paid', 'refuse_debt'),
                    ('allocations', 'id_taken', 'leave_taken_id'), ('partners', 'of_moving', 'refuse_of_moving'),
                    ('partner_keys', 'of_moving', 'refuse_of_moving'), ('connections', 'of_moving', 'refuse_of_moving'),
                    ('currency_symbols', 'of_moving', 'refuse_of_moving'), ('receipts', 'of_moving', 'refuse_of_moving'),
                    ('partners', 'told', 'tell_of_partner'), ('allocations', 'owe', 'allocations_owe'),
                    ('allocations', 'owe_first', 'allocations_owe'), ('partner_keys', 'dated', 'date_key'),
                    ('audit', 'signed', 'sign_audit'),
                    ('plans', 'signed', 'sign_person'), ('approvals', 'signed', 'sign_person'),
                    ('voices', 'signed', 'sign_person'), ('runs', 'signed', 'sign_person'),
                    ('plans', 'numbered', 'number_plan'), ('plan_items', 'with_its_plan', 'refuse_later_items'),
                    ('run_items', 'two_people', 'refuse_alone'), ('dead_letters', 'by_a_run', 'refuse_without_run'),
                    ('audit_subjects', 'two_people', 'refuse_act_alone'), ('epochs', 'two_people', 'refuse_epoch_alone'),
                    ('dead_letters', 'by_an_act', 'refuse_without_act'),
                    ('dead_letters', 'purged_by_an_act', 'refuse_without_act')
                ) AS w (table_name, name, function)
                WHERE NOT EXISTS (
                    SELECT
                    FROM armed AS a
                    WHERE a.table_name = w.table_name AND a.name = w.name AND a.function = w.function
                )
                )
                SELECT format('trigger %s on settled.%s', name, table_name)
                FROM wanting
                ORDER BY 1",
                &[&tables, &names, &events, &KEPT_OF_RECEIPTS.as_slice()],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Functions that do what their owner may, and that everybody may call: a trigger function of these could be hung on
    /// anybody's table.
    ///
    /// # Errors
    /// The database is away.
    pub async fn open_functions(&self) -> Result<Vec<String>, StoreError> {
        let rows = self
            .session("open_functions")
            .await?
            .query(
                "/* vitals::open_functions */
                SELECT format('settled.%I(%s)', p.proname, oidvectortypes(p.proargtypes))
                FROM pg_proc AS p
                WHERE p.pronamespace = to_regnamespace('settled')::oid
                  AND p.prosecdef
                  AND EXISTS (
                      SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS e WHERE e.grantee = 0
                  )
                ORDER BY 1",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// What everybody may make in this database, temporary objects among it, as the statements that take it away.
    ///
    /// # Errors
    /// The database is away.
    pub async fn open_places(&self) -> Result<Vec<OpenPlace>, StoreError> {
        let rows = self
            .session("open_places")
            .await?
            .query(
                "/* vitals::open_places */
                SELECT 'temporary objects' AS what,
                       format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC;', d.datname) AS revoked
                FROM pg_database AS d
                CROSS JOIN LATERAL aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS e
                WHERE d.datname = current_database() AND e.grantee = 0 AND e.privilege_type = 'TEMPORARY'
                UNION ALL
                SELECT 'objects in schema ' || n.nspname, format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC;', n.nspname)
                FROM pg_namespace AS n
                CROSS JOIN LATERAL aclexplode(n.nspacl) AS e
                WHERE e.grantee = 0 AND e.privilege_type = 'CREATE'
                ORDER BY 1 DESC",
                &[],
            )
            .await?;
        let place = |row: &tokio_postgres::Row| OpenPlace {
            what: row.get("what"),
            revoked: row.get("revoked"),
        };
        Ok(rows.iter().map(place).collect())
    }

    /// Whether this user could switch off what refuses change: it owns tables of ours, or may do anything.
    ///
    /// # Errors
    /// The database is away.
    pub async fn owns_tables(&self) -> Result<bool, StoreError> {
        let session = self.session("owns_tables").await?;
        let rows = session
            .query(
                "/* vitals::owns_tables */
                SELECT EXISTS (
                    SELECT
                    FROM pg_class AS c
                    JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'settled'
                    WHERE c.relkind = 'r' AND pg_has_role(current_user, c.relowner, 'MEMBER')
                )",
                &[],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// What the worker does and this user may not, as `UPDATE on settled.receipts`.
    ///
    /// # Errors
    /// The database is away.
    pub async fn missing_grants(&self) -> Result<Vec<String>, StoreError> {
        let standing = self.role_standing(DatabaseRole::Worker, false).await?;
        let mut missing: Vec<String> = standing.missing.iter().map(ToString::to_string).collect();
        let session = self.session("missing_grants").await?;
        let rows = session
            .query(
                "/* vitals::missing_grants */
                SELECT 'EXECUTE on ' || w.signature
                FROM unnest($1::text[]) AS w (signature)
                WHERE EXISTS (SELECT FROM pg_namespace WHERE nspname = 'settled' AND has_schema_privilege(oid, 'USAGE'))
                  AND NOT has_function_privilege(to_regprocedure(w.signature), 'EXECUTE')",
                &[&FUNCTIONS.as_slice()],
            )
            .await?;
        missing.extend(rows.iter().map(|row| row.get::<_, String>(0)));
        missing.sort_unstable();
        Ok(missing)
    }

    /// Whether this user may do anything.
    ///
    /// # Errors
    /// The database is away.
    pub async fn is_superuser(&self) -> Result<bool, StoreError> {
        let session = self.session("is_superuser").await?;
        let rows = session
            .query(
                "/* vitals::is_superuser */ SELECT rolsuper FROM pg_roles WHERE rolname = current_user",
                &[],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }
}
