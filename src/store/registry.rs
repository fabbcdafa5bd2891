//! What operators and the custody system put in: partners, keys, symbols, connections, reservations. Everything here can
//! be said twice: the second time it is found as it is.

mod keys;
mod partners;
mod rotation;
mod symbols;

use std::error::Error;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::{
    Row,
    types::{FromSql, IsNull, ToSql, Type, private::BytesMut, to_sql_checked},
};
use uuid::Uuid;

pub(super) use self::partners::let_go_on;
pub use self::{
    keys::{KeyProof, KeyRecord, NewKey, REMEMBERED_MAX, Reinstated},
    partners::{FieldChange, FieldChanges, NewPartner, PartnerRecord, PartnerWish, Roster},
    rotation::{Challenge, Challenged, EndingPartner, Rotated, Rotation},
    symbols::{Mapped, NewSymbol, SymbolRecord},
};
use super::{
    Fate, Session, Store, StoreError,
    audit::{Act, write_audit},
    time::time,
};
use crate::domain::calendar::CalendarTime;

/// 2000-01-01T00:00:00Z: the server counts microseconds from then on.
const BEGINNING: i64 = 946_684_800_000_000;

/// Any timestamptz, the infinite ones too.
impl<'a> FromSql<'a> for CalendarTime {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let microsecond = i64::from_be_bytes(raw.try_into()?);
        Ok(Self::from_microsecond(microsecond.saturating_add(BEGINNING)))
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TIMESTAMPTZ
    }
}

/// Exactly, also where jiff's own timestamps end.
impl ToSql for CalendarTime {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        self.as_microsecond().saturating_sub(BEGINNING).to_sql(kind, out)
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

/// Who does it, and why, for the audit.
#[derive(Clone, Copy, Debug)]
pub struct By<'a> {
    pub operator: &'a str,
    pub why: Option<&'a str>,
}

/// Writes down what was done, in the transaction that did it. What changed nothing is not written down.
pub(super) async fn note(
    session: &Session,
    by: By<'_>,
    name: &'static str,
    about: &Value,
    outcome: &Value,
) -> Result<(), StoreError> {
    let act = Act {
        name,
        operator: by.operator,
        why: by.why,
        filters: about,
        voucher: None,
    };
    write_audit(session, act, outcome, None).await.map(drop)
}

/// What an addition came to, with the record as it is stored now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registered<T> {
    Added(T),
    /// It was there with the same content.
    Exists(T),
    /// It was there, and what may change was changed.
    Updated(T),
    /// It is revoked, and stays so.
    Revoked(T),
    /// It is there with other content, which stands.
    Conflict(T),
    /// The partner that it is said to belong to is not registered.
    NoPartner,
    /// Its validity would end before it begins.
    NeverValid,
    /// Its owner did not prove to have its private half.
    Unproven(Unproven),
}

impl<T> Registered<T> {
    /// The same of what is made of the record.
    pub(super) fn map<U>(self, of: impl FnOnce(T) -> U) -> Registered<U> {
        match self {
            Registered::Added(record) => Registered::Added(of(record)),
            Registered::Exists(record) => Registered::Exists(of(record)),
            Registered::Updated(record) => Registered::Updated(of(record)),
            Registered::Revoked(record) => Registered::Revoked(of(record)),
            Registered::Conflict(record) => Registered::Conflict(of(record)),
            Registered::NoPartner => Registered::NoPartner,
            Registered::NeverValid => Registered::NeverValid,
            Registered::Unproven(why) => Registered::Unproven(why),
        }
    }
}

/// Why a key is not proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// A proof is required, and none was given.
    Missing,
    /// Nothing is there to be signed, or not any more.
    NoChallenge,
    /// It is no signature of what is there, made with this key.
    Wrong,
}

/// A client's connection with a partner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRecord {
    pub connection_id: Uuid,
    pub enterprise_id: String,
    pub client_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    #[serde(serialize_with = "time")]
    pub created_at: Timestamp,
}

/// A connection to register.
#[derive(Clone, Debug)]
pub struct NewConnection {
    pub connection_id: Uuid,
    pub enterprise_id: String,
    pub client_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
}

/// What became of one reservation: `reserved`, `exists`, or `refused` with a reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// None where none can be read.
    pub id: Option<Uuid>,
    pub result: String,
    pub reason: Option<String>,
    /// Which field breaks which rule.
    pub detail: Option<String>,
}

const CONNECTION_COLUMNS: &str =
    "connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id, created_at";

fn connection(row: &Row) -> ConnectionRecord {
    ConnectionRecord {
        connection_id: row.get("connection_id"),
        enterprise_id: row.get("enterprise_id"),
        client_id: row.get("client_id"),
        partners_client_id: row.get("partners_client_id"),
        partners_connection_id: row.get("partners_connection_id"),
        created_at: row.get("created_at"),
    }
}

/// A row that was there a statement ago and is gone: somebody deletes by hand. Worth another try.
pub(super) fn vanished(session: &Session, what: &str) -> StoreError {
    StoreError::new(
        session.name,
        Fate::Retry,
        format!("{what} went away while it was looked at"),
    )
}

impl Store {
    /// Registers a connection.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn add_connection(
        &self,
        wish: &NewConnection,
        by: By<'_>,
    ) -> Result<Registered<ConnectionRecord>, StoreError> {
        let session = self.session("add_connection").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* registry::add_connection */
                    INSERT INTO settled.connections (
                        connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id
                    )
                    SELECT $1, p.enterprise_id, $3, $4, $5
                    FROM settled.partners AS p
                    WHERE p.enterprise_id = $2
                    ON CONFLICT (connection_id) DO NOTHING
                    RETURNING {CONNECTION_COLUMNS}"
                ),
                &[
                    &wish.connection_id,
                    &wish.enterprise_id,
                    &wish.client_id,
                    &wish.partners_client_id,
                    &wish.partners_connection_id,
                ],
            )
            .await?;
        if let Some(row) = rows.first() {
            let added = connection(row);
            let about = json!({"connectionId": added.connection_id, "enterpriseId": added.enterprise_id});
            let outcome = json!({
                "clientId": added.client_id,
                "partnersClientId": added.partners_client_id,
                "partnersConnectionId": added.partners_connection_id,
            });
            note(&session, by, "connection add", &about, &outcome).await?;
            session.commit().await?;
            return Ok(Registered::Added(added));
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::add_connection again */
                    SELECT {CONNECTION_COLUMNS}
                    FROM settled.connections
                    WHERE connection_id = $1"
                ),
                &[&wish.connection_id],
            )
            .await?;
        session.rollback().await;
        let Some(stored) = rows.first().map(connection) else {
            return Ok(Registered::NoPartner);
        };
        let same = stored.enterprise_id == wish.enterprise_id
            && stored.client_id == wish.client_id
            && stored.partners_client_id == wish.partners_client_id
            && stored.partners_connection_id == wish.partners_connection_id;
        Ok(if same {
            Registered::Exists(stored)
        } else {
            Registered::Conflict(stored)
        })
    }

    /// Every connection, by enterprise and id; those of one enterprise if it is named.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn connections(&self, enterprise_id: Option<&str>) -> Result<Vec<ConnectionRecord>, StoreError> {
        let rows = self
            .session("connections")
            .await?
            .query(
                &format!(
                    "/* registry::connections */
                    SELECT {CONNECTION_COLUMNS}
                    FROM settled.connections
                    WHERE enterprise_id = $1 OR $1 IS NULL
                    ORDER BY enterprise_id, connection_id"
                ),
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.iter().map(connection).collect())
    }

    /// Connections of a partner in the order of their ids, after one of them.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn connections_of(
        &self,
        enterprise_id: &str,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<ConnectionRecord>, StoreError> {
        let rows = self
            .session("connections_of")
            .await?
            .query(
                &format!(
                    "/* registry::connections_of */
                    SELECT {CONNECTION_COLUMNS}
                    FROM settled.connections
                    WHERE enterprise_id = $1 AND ($2::uuid IS NULL OR connection_id > $2)
                    ORDER BY connection_id
                    LIMIT $3"
                ),
                &[&enterprise_id, &after, &limit],
            )
            .await?;
        Ok(rows.iter().map(connection).collect())
    }

    /// One connection; None if there is no such one.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn registered_connection(&self, connection_id: Uuid) -> Result<Option<ConnectionRecord>, StoreError> {
        let rows = self
            .session("connection")
            .await?
            .query(
                &format!(
                    "/* registry::connection */
                    SELECT {CONNECTION_COLUMNS}
                    FROM settled.connections
                    WHERE connection_id = $1"
                ),
                &[&connection_id],
            )
            .await?;
        Ok(rows.first().map(connection))
    }

    /// Every currency that ever came in.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn currencies(&self) -> Result<Vec<String>, StoreError> {
        let rows = self
            .session("currencies")
            .await?
            .query(
                "/* registry::currencies */
                SELECT currency
                FROM settled.funds
                WHERE owner = '00000000-0000-0000-0000-000000000000'
                  AND holder = 'world'
                ORDER BY currency",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Reserves, in one transaction, each on its own. `reservations` is the JSON array that `settled.reserve` documents;
    /// one answer comes back for each, in order.
    ///
    /// # Errors
    /// The database is away or refuses; nothing of it is reserved, unless `at_commit` says that it is unknown. It may be
    /// asked again: what is reserved answers `exists`.
    pub async fn reserve(&self, reservations: &str, by: By<'_>) -> Result<Vec<Reserved>, StoreError> {
        let session = self.session("reserve").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* registry::reserve */
                SELECT id, result, reason, detail
                FROM settled.reserve($1::text::jsonb)
                ORDER BY ordinal",
                &[&reservations],
            )
            .await;
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                session.rollback().await;
                return Err(error);
            }
        };
        let answers: Vec<Reserved> = rows
            .iter()
            .map(|row| Reserved {
                id: row.get("id"),
                result: row.get("result"),
                reason: row.get("reason"),
                detail: row.get("detail"),
            })
            .collect();
        // One row however many they are.
        let count = |result: &str| answers.iter().filter(|answer| answer.result == result).count();
        let reserved = count("reserved");
        if reserved > 0 {
            let ends: Vec<Option<Uuid>> = answers
                .iter()
                .filter(|answer| answer.result == "reserved")
                .map(|answer| answer.id)
                .collect();
            let about = json!({"first": ends.first(), "last": ends.last()});
            let outcome = json!({"reserved": reserved, "exists": count("exists"), "refused": count("refused")});
            note(&session, by, "reserve", &about, &outcome).await?;
        }
        session.commit().await?;
        Ok(answers)
    }
}
