//! The database's roles: who may do what, at the least.

mod logins;
mod surplus;

use std::fmt;

pub use self::surplus::{MissingRight, RoleFound, RoleStanding};
use super::{Store, StoreError, approvals::ApprovalLimits};

/// Who works with the database. Each is a role of its own that nobody logs in as: people and programs are its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DatabaseRole {
    Owner,
    Worker,
    Operator,
    Registrar,
    Custody,
    Reader,
    Auditor,
    Console,
}

/// What may be done to a table or view of ours, or to a function by its signature.
pub type Grant = (&'static str, &'static [&'static str]);

const SETTLES: &str = "UPDATE (status, reason, retriable, partner_external_id, partner_symbol, evaluation_id, \
                       pending_approval_id, policy_result, settled_nonce, updated_at)";
const COUNTS: &str = "UPDATE (available, held, allocated)";
const REMEMBERS: &str =
    "UPDATE (message_digest, verdict, reason, allocation_id, event_id, public_key, last_seen, batch_id)";
const FILES: &str = "UPDATE (state, reason, detail, group_id, made_by, first_failed_at, last_failed_at, times_seen, \
                     leased_until, replays, verdict, judged_at, batch_id, discarded_at, note, checked_at)";

const WORKER: &[Grant] = &[
    ("refinery_schema_history", &["SELECT"]),
    ("partners", &["SELECT"]),
    ("partner_keys", &["SELECT"]),
    ("currency_symbols", &["SELECT"]),
    ("key_uses", &["SELECT", "INSERT", "UPDATE (last_used_at)"]),
    ("connections", &["SELECT"]),
    // Row locks are an UPDATE to the server.
    ("allocations", &["SELECT", SETTLES]),
    ("funds", &["SELECT", COUNTS]),
    ("transfers", &["INSERT"]),
    // Whether what was committed is there still.
    ("batches", &["SELECT (id, at)", "INSERT"]),
    ("epochs", &["SELECT"]),
    ("receipts", &["SELECT", "INSERT", REMEMBERS]),
    (
        "parked",
        &[
            "SELECT",
            "INSERT",
            "UPDATE (attempts, due_at, leased_until, also_reply)",
            "DELETE",
        ],
    ),
    ("parkings", &["INSERT"]),
    ("told", &["SELECT", "INSERT", "DELETE"]),
    (
        "held",
        &["SELECT", "INSERT", "UPDATE (due_at, leased_until, attempts)", "DELETE"],
    ),
    ("holdings", &["INSERT"]),
    ("outbox", &["SELECT", "INSERT", "UPDATE (leased_until)", "DELETE"]),
    ("outbox_refused", &["SELECT", "INSERT"]),
    ("dead_letters", &["SELECT", "INSERT", FILES]),
    ("letters_taken", &["SELECT", "INSERT", "UPDATE (letters)"]),
    ("dead_letter_space", &["SELECT", "INSERT", "DELETE"]),
    ("runs", &["SELECT"]),
    ("run_items", &["SELECT", "UPDATE (state, verdict, reason, judged_at)"]),
    ("distrusted", &["SELECT", "INSERT"]),
];

const OPERATOR: &[Grant] = &[
    ("partners", &["SELECT"]),
    ("partner_keys", &["SELECT"]),
    ("currency_symbols", &["SELECT"]),
    ("connections", &["SELECT"]),
    ("allocations", &["SELECT"]),
    // A nonce is voided.
    ("receipts", &["SELECT", "UPDATE (voided_at)"]),
    ("parked", &["SELECT", "UPDATE (due_at)"]),
    ("parkings", &["INSERT"]),
    ("told", &["SELECT"]),
    // What a replay moved.
    ("transfers", &["SELECT"]),
    ("funds", &["SELECT"]),
    ("distrusted", &["SELECT"]),
    (
        "dead_letters",
        &["SELECT", "UPDATE (state, run_id, discarded_at)", "DELETE"],
    ),
    // What is purged is counted by a trigger.
    ("dead_letter_space", &["INSERT"]),
    // To lock a row is an UPDATE to the server, of any column; a trigger refuses to change it.
    ("plans", &["SELECT", "INSERT", "UPDATE (id)", "DELETE"]),
    ("plan_items", &["SELECT", "INSERT"]),
    ("approvals", &["SELECT", "INSERT"]),
    ("approval_limits", &["SELECT"]),
    // A loss is accepted.
    ("epochs", &["SELECT", "INSERT"]),
    ("voices", &["SELECT", "INSERT"]),
    ("batches", &["SELECT (id, at)"]),
    (
        "runs",
        &[
            "SELECT",
            "INSERT",
            "UPDATE (state, note, changed_at, driver, driven_until, rate)",
        ],
    ),
    ("run_items", &["SELECT", "INSERT", "UPDATE (state, note)"]),
    ("audit", &["SELECT", "INSERT"]),
    ("audit_subjects", &["SELECT", "INSERT"]),
    ("outbox", &["SELECT", "INSERT"]),
    ("outbox_refused", &["SELECT", "DELETE"]),
];

const REGISTRAR: &[Grant] = &[
    (
        "partners",
        &[
            "SELECT",
            "INSERT",
            "UPDATE (name, broker_user, own_queue, async_allocations, async_deallocations, suspended_at, quarantined_at, \
             quarantine_reason)",
        ],
    ),
    (
        "partner_keys",
        &[
            "SELECT",
            "INSERT",
            "UPDATE (valid_from, valid_until, revoked_at, reinstated_at, proven_at)",
        ],
    ),
    // What waited for the end of a quarantine.
    ("parked", &["SELECT", "UPDATE (until, due_at)"]),
    ("held", &["SELECT", "UPDATE (due_at)"]),
    ("key_uses", &["SELECT"]),
    (
        "key_challenges",
        &["SELECT", "INSERT", "UPDATE (challenge, expires_at)", "DELETE"],
    ),
    ("distrusted", &["SELECT"]),
    ("connections", &["SELECT", "INSERT"]),
    ("currency_symbols", &["SELECT", "INSERT", "UPDATE (until)"]),
    // Whether a currency was ever held.
    ("funds", &["SELECT"]),
    ("clients", &["SELECT", "INSERT"]),
    ("tokens", &["SELECT", "INSERT", "UPDATE (revoked_at)"]),
    ("audit", &["SELECT", "INSERT"]),
];

const CUSTODY: &[Grant] = &[
    ("settled.deposit(uuid, text, numeric, text)", &["EXECUTE"]),
    ("settled.withdraw(uuid, text, numeric, text)", &["EXECUTE"]),
    ("settled.reserve(jsonb)", &["EXECUTE"]),
    // Whether a currency was ever held, and what stands under a reference that is used again.
    ("funds", &["SELECT"]),
    ("deposits", &["SELECT"]),
    ("withdrawals", &["SELECT"]),
    ("audit", &["SELECT", "INSERT"]),
];

const READER: &[Grant] = &[
    ("refinery_schema_history", &["SELECT"]),
    ("partners", &["SELECT"]),
    ("partner_keys", &["SELECT"]),
    ("currency_symbols", &["SELECT"]),
    ("key_uses", &["SELECT"]),
    ("connections", &["SELECT"]),
    ("clients", &["SELECT"]),
    ("tokens", &["SELECT"]),
    ("allocations", &["SELECT"]),
    ("receipts", &["SELECT"]),
    ("transfers", &["SELECT"]),
    ("settlements", &["SELECT"]),
    ("accounts", &["SELECT"]),
    ("funds", &["SELECT"]),
    ("batches", &["SELECT"]),
    ("told", &["SELECT"]),
    ("parkings", &["SELECT"]),
    ("held", &["SELECT"]),
    ("outbox", &["SELECT"]),
    ("outbox_refused", &["SELECT"]),
    ("dead_letters", &["SELECT"]),
    ("runs", &["SELECT"]),
    ("run_items", &["SELECT"]),
];

const AUDITOR: &[Grant] = &[
    ("audit", &["SELECT"]),
    ("accounts", &["SELECT"]),
    ("entries", &["SELECT"]),
    ("settlements", &["SELECT"]),
    ("funds", &["SELECT"]),
    ("transfers", &["SELECT"]),
    ("allocations", &["SELECT"]),
    ("connections", &["SELECT"]),
    ("deposits", &["SELECT"]),
    ("withdrawals", &["SELECT"]),
    ("moved_funds", &["SELECT"]),
    // What another cell says too.
    ("moves", &["SELECT"]),
    ("partners", &["SELECT"]),
    ("epochs", &["SELECT"]),
    ("receipts", &["SELECT"]),
    ("batches", &["SELECT"]),
    ("partner_keys", &["SELECT"]),
    ("currency_symbols", &["SELECT"]),
    ("parked", &["SELECT"]),
    ("parkings", &["SELECT"]),
    ("held", &["SELECT"]),
    ("holdings", &["SELECT"]),
    ("outbox", &["SELECT"]),
    ("outbox_refused", &["SELECT"]),
    ("dead_letters", &["SELECT"]),
    ("letters_taken", &["SELECT"]),
];

impl DatabaseRole {
    pub const ALL: [DatabaseRole; 8] = [
        DatabaseRole::Owner,
        DatabaseRole::Worker,
        DatabaseRole::Operator,
        DatabaseRole::Registrar,
        DatabaseRole::Custody,
        DatabaseRole::Reader,
        DatabaseRole::Auditor,
        DatabaseRole::Console,
    ];

    pub fn name(self) -> &'static str {
        match self {
            DatabaseRole::Owner => "settled_owner",
            DatabaseRole::Worker => "settled_worker",
            DatabaseRole::Operator => "settled_operator",
            DatabaseRole::Registrar => "settled_registrar",
            DatabaseRole::Custody => "settled_custody",
            DatabaseRole::Reader => "settled_reader",
            DatabaseRole::Auditor => "settled_auditor",
            DatabaseRole::Console => "settled_console",
        }
    }

    /// Reads `settled_worker`, or `worker`.
    ///
    /// # Errors
    /// Which there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        let found = Self::ALL
            .into_iter()
            .find(|role| role.name() == text || role.name().strip_prefix("settled_") == Some(text));
        found.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|role| role.name()).collect();
            format!("one of {}", names.join(", "))
        })
    }

    /// Who is meant by it.
    pub fn purpose(self) -> &'static str {
        match self {
            DatabaseRole::Owner => "owns the schema and applies migrations; no program that runs all day",
            DatabaseRole::Worker => "the worker: settles, publishes, collects dead letters",
            DatabaseRole::Operator => "people who look after refused messages",
            DatabaseRole::Registrar => "people who register partners, keys, connections, symbols, clients and tokens",
            DatabaseRole::Custody => "the custody system: deposits, withdrawals and reservations",
            DatabaseRole::Reader => "whoever looks and changes nothing, and the HTTP API",
            DatabaseRole::Auditor => "whoever proves the books, and reads what operators did",
            DatabaseRole::Console => {
                "the login of a console behind a proxy or an issuer, beside its other roles: the names that it vouches for count \
                 as people"
            }
        }
    }

    /// What it is granted. The owner owns; and of a console the triggers ask whether it is one.
    pub fn grants(self) -> &'static [Grant] {
        match self {
            DatabaseRole::Owner | DatabaseRole::Console => &[],
            DatabaseRole::Worker => WORKER,
            DatabaseRole::Operator => OPERATOR,
            DatabaseRole::Registrar => REGISTRAR,
            DatabaseRole::Custody => CUSTODY,
            DatabaseRole::Reader => READER,
            DatabaseRole::Auditor => AUDITOR,
        }
    }
}

impl fmt::Display for DatabaseRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `GRANT SELECT ON settled.partners TO ..`, or the same taken away.
pub fn grant_line(object: &str, privileges: &str, to: &str) -> String {
    format!("GRANT {privileges} ON {} TO {to};", thing(object))
}

fn thing(object: &str) -> String {
    match object {
        "schema" => "SCHEMA settled".to_owned(),
        function if function.ends_with(')') => format!("FUNCTION {function}"),
        table => format!("settled.{table}"),
    }
}

/// A name as SQL takes it.
pub fn quoted(name: &str) -> String {
    let is_plain = name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !name.starts_with(|first: char| first.is_ascii_digit());
    if is_plain && !name.is_empty() {
        return name.to_owned();
    }
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Everything that makes the roles what they are; may be repeated. What a role had more is taken away. With limits, what takes two
/// people as well.
pub fn statements(limits: Option<&ApprovalLimits>) -> Vec<String> {
    let mut all = Vec::new();
    for role in DatabaseRole::ALL {
        all.push(format!(
            "-- {role}: {}\nDO $$ BEGIN\n    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN\n        \
             CREATE ROLE {role} NOLOGIN;\n    END IF;\nEXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;\n\
             END $$;",
            role.purpose()
        ));
    }
    all.push(
        "-- The schema is its owner's, whoever applied the migrations. Who runs this is a member of it from now on.\n\
         DO $$ DECLARE\n    one record;\nBEGIN\n    IF NOT pg_has_role('settled_owner', 'USAGE') THEN\n        \
         GRANT settled_owner TO CURRENT_USER;\n    END IF;\n    \
         EXECUTE format('GRANT CREATE ON DATABASE %I TO settled_owner', current_database());\n    \
         IF (SELECT nspowner FROM pg_namespace WHERE nspname = 'settled') <> 'settled_owner'::regrole THEN\n        \
         ALTER SCHEMA settled OWNER TO settled_owner;\n    END IF;\n    FOR one IN\n        \
         SELECT format('ALTER %s settled.%I OWNER TO settled_owner',\n                      \
         CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, c.relname) AS sql\n        \
         FROM pg_class AS c\n        \
         WHERE c.relnamespace = 'settled'::regnamespace AND c.relkind IN ('r', 'p', 'v')\n          \
         AND c.relowner <> 'settled_owner'::regrole\n        UNION ALL\n        \
         SELECT format('ALTER FUNCTION %s OWNER TO settled_owner', p.oid::regprocedure)\n        \
         FROM pg_proc AS p\n        \
         WHERE p.pronamespace = 'settled'::regnamespace AND p.proowner <> 'settled_owner'::regrole\n    \
         LOOP\n        EXECUTE one.sql;\n    END LOOP;\nEND $$;"
            .to_owned(),
    );
    let working = DatabaseRole::ALL
        .into_iter()
        .filter(|role| *role != DatabaseRole::Owner);
    let names: Vec<&str> = working.clone().map(DatabaseRole::name).collect();
    let names = names.join(", ");
    all.push(format!(
        "-- Temporary objects are of no use to any of these roles, and of some to who would mislead. They are everybody's until the \
         owner of the\n-- database takes them away; another program in this database that needs them is granted them by name.\n\
         DO $$ BEGIN\n    IF pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), 'USAGE') THEN\n        \
         EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());\n        \
         EXECUTE format('REVOKE CREATE, TEMPORARY ON DATABASE %I FROM {names}', current_database());\n    END IF;\nEND $$;"
    ));
    all.push(format!("REVOKE ALL ON ALL TABLES IN SCHEMA settled FROM {names};"));
    all.push(format!("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA settled FROM {names};"));
    all.push(format!("REVOKE ALL ON SCHEMA settled FROM {names};"));
    all.push(grant_line("schema", "USAGE", &names));
    for role in working {
        for (object, privileges) in role.grants() {
            all.push(grant_line(object, &privileges.join(", "), role.name()));
        }
    }
    all.extend(limits.map(ApprovalLimits::statement));
    all
}

impl Store {
    /// Makes the roles what they are, in one transaction.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn apply_roles(&self, limits: Option<&ApprovalLimits>) -> Result<(), StoreError> {
        let session = self.session("apply_roles").await?;
        session.begin().await?;
        // Two at once wait for each other, and for migrations.
        session
            .query("/* roles::apply_roles */ SELECT pg_advisory_xact_lock(7236101)", &[])
            .await?;
        for statement in statements(limits) {
            let sql = format!("/* roles::apply_roles each */ {}", uncommented(&statement));
            session.ask(session.client()?.batch_execute(&sql)).await?;
        }
        session.commit().await
    }
}

/// A comment would make the rest of the line one.
fn uncommented(statement: &str) -> String {
    let lines: Vec<&str> = statement.lines().filter(|line| !line.starts_with("--")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_is_named_once_and_read_by_either_name() {
        for role in DatabaseRole::ALL {
            assert_eq!(DatabaseRole::parse(role.name()), Ok(role));
            assert_eq!(
                DatabaseRole::parse(role.name().trim_start_matches("settled_")),
                Ok(role)
            );
            let mut objects: Vec<&str> = role.grants().iter().map(|(object, _)| *object).collect();
            let listed = objects.len();
            objects.sort_unstable();
            objects.dedup();
            assert_eq!(objects.len(), listed, "{role}: an object stands twice");
        }
        assert!(DatabaseRole::parse("postgres").is_err());
    }

    #[test]
    fn nobody_but_the_owner_may_rewrite_money() {
        for role in DatabaseRole::ALL {
            for (object, privileges) in role.grants() {
                for privilege in *privileges {
                    let is_change =
                        privilege.starts_with("UPDATE") || *privilege == "DELETE" || *privilege == "TRUNCATE";
                    let never = [
                        "transfers",
                        "batches",
                        "deposits",
                        "withdrawals",
                        "audit",
                        "audit_subjects",
                        "distrusted",
                        "parkings",
                    ];
                    assert!(
                        !(is_change && never.contains(object)),
                        "{role}: {privilege} on {object}"
                    );
                    let is_money = ["allocations", "funds", "receipts"].contains(object);
                    assert!(
                        !(is_change && is_money && !privilege.contains('(')),
                        "{role}: {privilege} on {object}: of columns only"
                    );
                }
            }
        }
    }

    #[test]
    fn names_are_quoted_where_they_must_be() {
        assert_eq!(quoted("settled_worker"), "settled_worker");
        assert_eq!(quoted("O\"Hara"), "\"O\"\"Hara\"");
        assert_eq!(quoted("1x"), "\"1x\"");
        assert_eq!(quoted(""), "\"\"");
        assert_eq!(
            grant_line("partners", "SELECT", "bob"),
            "GRANT SELECT ON settled.partners TO bob;"
        );
        assert_eq!(
            grant_line("settled.reserve(jsonb)", "EXECUTE", "bob"),
            "GRANT EXECUTE ON FUNCTION settled.reserve(jsonb) TO bob;"
        );
    }
}
