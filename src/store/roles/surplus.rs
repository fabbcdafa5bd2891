//! What of a role's rights somebody lacks, and what somebody has beside them.

use std::fmt;

use super::{DatabaseRole, Grant};
use crate::store::{Session, Store, StoreError};

/// One right, so far as it can be asked for.
fn rights(grants: &[Grant]) -> Vec<Right> {
    let mut all = vec![Right {
        object: "schema",
        privilege: "USAGE",
        columns: Vec::new(),
    }];
    for (object, privileges) in grants {
        for privilege in *privileges {
            let (word, columns) = privilege.split_once(" (").unwrap_or((privilege, ""));
            let columns = columns
                .trim_end_matches(')')
                .split(", ")
                .filter(|column| !column.is_empty());
            all.push(Right {
                object,
                privilege: word,
                columns: columns.collect(),
            });
        }
    }
    all
}

struct Right {
    object: &'static str,
    privilege: &'static str,
    columns: Vec<&'static str>,
}

impl Right {
    fn shown(&self) -> String {
        if self.columns.is_empty() {
            return self.privilege.to_owned();
        }
        format!("{} ({})", self.privilege, self.columns.join(", "))
    }
}

/// Rights as the database is asked about them: one line a column, where a right is of columns.
#[derive(Default)]
struct Asked {
    places: Vec<i32>,
    objects: Vec<&'static str>,
    privileges: Vec<&'static str>,
    columns: Vec<Option<&'static str>>,
}

impl Asked {
    fn about(rights: &[Right]) -> Self {
        let mut asked = Self::default();
        for (place, right) in rights.iter().enumerate() {
            let columns: Vec<Option<&str>> = match right.columns.as_slice() {
                [] => vec![None],
                columns => columns.iter().copied().map(Some).collect(),
            };
            for column in columns {
                asked.places.push(i32::try_from(place).unwrap_or(i32::MAX));
                asked.objects.push(right.object);
                asked.privileges.push(right.privilege);
                asked.columns.push(column);
            }
        }
        asked
    }
}

/// What somebody lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingRight {
    /// A table's name, a function's signature, `schema` or `database`.
    pub object: String,
    pub privilege: String,
}

impl fmt::Display for MissingRight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.object.as_str() {
            "schema" => write!(f, "{} on schema settled", self.privilege),
            "database" => write!(f, "{} on this database", self.privilege),
            function if function.ends_with(')') => write!(f, "{} on {function}", self.privilege),
            table => write!(f, "{} on settled.{table}", self.privilege),
        }
    }
}

/// How somebody stands to a role.
#[derive(Clone, Debug)]
pub struct RoleStanding {
    /// Who was asked about.
    pub user: String,
    /// Whether the role is there.
    pub exists: bool,
    /// Whether who was asked about has what the role has.
    pub is_member: bool,
    /// What the role needs and who was asked about has not.
    pub missing: Vec<MissingRight>,
}

/// A role by itself.
#[derive(Clone, Debug)]
pub struct RoleFound {
    pub is_superuser: bool,
    pub can_login: bool,
    /// It may make roles or databases, replicate, or pass by row security.
    pub is_mighty: bool,
    pub owns_tables: bool,
    /// Rights on our tables that it does not need.
    pub more: Vec<MissingRight>,
}

impl Store {
    /// What is missing of what a role needs: of the role itself, or of who is logged in.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn role_standing(&self, role: DatabaseRole, itself: bool) -> Result<RoleStanding, StoreError> {
        let rights = rights(role.grants());
        let asked = Asked::about(&rights);
        let session = self.session("role_standing").await?;
        let rows = session
            .query(
                // What does not exist is the schema's problem, not a missing grant.
                "/* roles::role_standing */
                WITH who AS (
                    SELECT r.oid, r.rolname
                    FROM pg_roles AS r
                    WHERE r.rolname = CASE WHEN $2 THEN $1::name ELSE current_user END
                )
                SELECT w.rolname::text AS user, EXISTS (SELECT FROM pg_roles WHERE rolname = $1::name) AS role_exists,
                       coalesce((SELECT pg_has_role(w.oid, r.oid, 'USAGE') FROM pg_roles AS r WHERE r.rolname = $1::name),
                                false) AS is_member,
                       ARRAY(
                           SELECT DISTINCT a.place
                           FROM unnest($3::integer[], $4::text[], $5::text[], $6::text[])
                               AS a (place, object, privilege, attribute)
                           LEFT JOIN pg_namespace AS n ON n.nspname = 'settled'
                           LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = a.object
                           LEFT JOIN pg_attribute AS t
                                  ON t.attrelid = c.oid AND t.attname = a.attribute AND NOT t.attisdropped
                           WHERE CASE
                               WHEN n.oid IS NULL THEN false
                               WHEN a.object = 'schema' THEN NOT has_schema_privilege(w.oid, n.oid, a.privilege)
                               WHEN right(a.object, 1) = ')'
                               THEN has_schema_privilege(n.oid, 'USAGE')
                                    AND NOT has_function_privilege(w.oid, to_regprocedure(a.object), a.privilege)
                               WHEN c.oid IS NULL THEN false
                               WHEN a.attribute IS NULL THEN NOT has_table_privilege(w.oid, c.oid, a.privilege)
                               WHEN t.attnum IS NULL THEN false
                               ELSE NOT has_column_privilege(w.oid, c.oid, t.attnum, a.privilege)
                           END
                           ORDER BY a.place
                       ) AS missing
                FROM who AS w",
                &[
                    &role.name(),
                    &itself,
                    &asked.places,
                    &asked.objects,
                    &asked.privileges,
                    &asked.columns,
                ],
            )
            .await?;
        let Some(row) = rows.first() else {
            return Ok(RoleStanding {
                user: role.name().to_owned(),
                exists: false,
                is_member: false,
                missing: rights.iter().map(missing).collect(),
            });
        };
        let places: Vec<i32> = row.get("missing");
        let lacks = |place: &i32| usize::try_from(*place).ok().and_then(|place| rights.get(place));
        Ok(RoleStanding {
            user: row.get("user"),
            exists: row.get("role_exists"),
            is_member: row.get("is_member"),
            missing: places.iter().filter_map(lacks).map(missing).collect(),
        })
    }

    /// What a role is and may do beside what it needs; none where it is not there.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn role_found(&self, role: DatabaseRole) -> Result<Option<RoleFound>, StoreError> {
        let session = self.session("role_found").await?;
        let rows = session
            .query(
                "/* roles::role_found */
                SELECT r.rolsuper, r.rolcanlogin,
                       r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls AS mighty,
                       EXISTS (
                           SELECT
                           FROM pg_class AS c
                           WHERE c.relnamespace = to_regnamespace('settled')::oid
                             AND c.relkind = 'r'
                             AND pg_has_role(r.oid, c.relowner, 'MEMBER')
                       ) AS owns
                FROM pg_roles AS r
                WHERE r.rolname = $1::name",
                &[&role.name()],
            )
            .await?;
        let Some(found) = rows.first() else {
            return Ok(None);
        };
        Ok(Some(RoleFound {
            is_superuser: found.get("rolsuper"),
            can_login: found.get("rolcanlogin"),
            is_mighty: found.get("mighty"),
            owns_tables: found.get("owns"),
            more: surplus(&session, role, true).await?,
        }))
    }

    /// What whoever is logged in may do to our tables and functions beside what a role needs.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn more_than(&self, role: DatabaseRole) -> Result<Vec<MissingRight>, StoreError> {
        let session = self.session("more_than").await?;
        surplus(&session, role, false).await
    }
}

/// What the role itself, or who is logged in, has beside what the role needs: of tables, of columns, of functions that are not
/// everybody's, of the schema, of the database.
async fn surplus(session: &Session, role: DatabaseRole, itself: bool) -> Result<Vec<MissingRight>, StoreError> {
    let asked = Asked::about(&rights(role.grants()));
    let rows = session
        .query(
            "/* roles::surplus */
            WITH who AS (
                SELECT CASE WHEN $2 THEN $1::name ELSE current_user END AS name
            ), needed AS (
                SELECT * FROM unnest($3::text[], $4::text[], $5::text[]) AS n (object, privilege, attribute)
            ), things AS (
                SELECT c.oid, c.relname::text AS object, p.privilege, p.of_columns
                FROM pg_class AS c
                CROSS JOIN (VALUES
                    ('SELECT', true), ('INSERT', true), ('UPDATE', true), ('REFERENCES', true), ('DELETE', false),
                    ('TRUNCATE', false), ('TRIGGER', false)
                ) AS p (privilege, of_columns)
                WHERE c.relnamespace = to_regnamespace('settled')::oid
                  AND c.relkind IN ('r', 'p', 'v')
                  AND NOT EXISTS (
                      SELECT FROM needed AS n
                      WHERE n.object = c.relname AND n.privilege = p.privilege AND n.attribute IS NULL
                  )
            )
            SELECT t.object, t.privilege
            FROM things AS t, who AS w
            WHERE has_table_privilege(w.name, t.oid, t.privilege)
            UNION ALL
            SELECT t.object, format('%s (%s)', t.privilege, string_agg(a.attname, ', ' ORDER BY a.attnum))
            FROM who AS w, things AS t
            JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE CASE WHEN t.of_columns THEN
                      NOT has_table_privilege(w.name, t.oid, t.privilege)
                      AND has_column_privilege(w.name, t.oid, a.attnum, t.privilege)
                  END
              AND NOT EXISTS (
                  SELECT FROM needed AS n
                  WHERE n.object = t.object AND n.privilege = t.privilege AND n.attribute = a.attname
              )
            GROUP BY t.object, t.privilege
            UNION ALL
            SELECT format('settled.%I(%s)', p.proname, oidvectortypes(p.proargtypes)), 'EXECUTE'
            FROM who AS w, pg_proc AS p
            WHERE p.pronamespace = to_regnamespace('settled')::oid
              AND has_function_privilege(w.name, p.oid, 'EXECUTE')
              AND NOT EXISTS (
                  SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS e
                  WHERE e.grantee = 0 AND NOT p.prosecdef
              )
              AND NOT EXISTS (
                  SELECT FROM needed AS n
                  WHERE CASE WHEN right(n.object, 1) = ')' THEN to_regprocedure(n.object) = p.oid END
              )
            UNION ALL
            SELECT 'schema', 'CREATE'
            FROM who AS w
            WHERE has_schema_privilege(w.name, to_regnamespace('settled')::oid, 'CREATE')
            UNION ALL
            SELECT 'database', p.privilege
            FROM who AS w, (VALUES ('CREATE'), ('TEMPORARY')) AS p (privilege)
            WHERE has_database_privilege(w.name, current_database(), p.privilege)
              -- What everybody may is said of everybody.
              AND NOT EXISTS (
                  SELECT
                  FROM pg_database AS d
                  CROSS JOIN LATERAL aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS e
                  WHERE d.datname = current_database() AND e.grantee = 0 AND e.privilege_type = p.privilege
              )
            ORDER BY 1, 2",
            &[&role.name(), &itself, &asked.objects, &asked.privileges, &asked.columns],
        )
        .await?;
    let more = rows.iter().map(|row| MissingRight {
        object: row.get(0),
        privilege: row.get(1),
    });
    Ok(more.collect())
}

fn missing(right: &Right) -> MissingRight {
    MissingRight {
        object: right.object.to_owned(),
        privilege: right.shown(),
    }
}
