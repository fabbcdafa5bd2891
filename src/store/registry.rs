//! What operators and the custody system put in: partners, keys, connections, deposits, reservations. Everything here can
//! be said twice: the second time it is found as it is.

mod partners;

use std::error::Error;

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use tokio_postgres::{
    Row,
    types::{FromSql, Type},
};
use uuid::Uuid;

pub use self::partners::{FieldChange, FieldChanges, NewPartner, PartnerRecord, PartnerWish};
use super::{
    Fate, Session, Store, StoreError,
    audit::{Act, write_audit},
};
use crate::domain::{
    calendar::{CalendarTime, rfc3339},
    ledger::{Amount, Quantity},
    signature::PublicKey,
};

/// RFC 3339 with milliseconds, as every time that leaves the program.
pub(super) fn time<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&rfc3339(*time))
}

/// The same, or null.
pub(super) fn maybe_time<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_some(&rfc3339(*time)),
        None => serializer.serialize_none(),
    }
}

fn shown<S: Serializer>(time: &CalendarTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

fn maybe_shown<S: Serializer>(time: &Option<CalendarTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_some(&time.to_string()),
        None => serializer.serialize_none(),
    }
}

/// Any timestamptz, the infinite ones too: the server counts microseconds from 2000 on.
impl<'a> FromSql<'a> for CalendarTime {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        const BEGINNING: i64 = 946_684_800_000_000;
        let microsecond = i64::from_be_bytes(raw.try_into()?);
        Ok(Self::from_microsecond(microsecond.saturating_add(BEGINNING)))
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::TIMESTAMPTZ
    }
}

/// What was signed by a revoked key and is remembered of one key, at most. Above it the key can not be reinstated.
pub const REMEMBERED_MAX: i64 = 100_000;

/// Who does it, and why, for the audit.
#[derive(Clone, Copy, Debug)]
pub struct By<'a> {
    pub operator: &'a str,
    pub why: Option<&'a str>,
}

/// Writes down what was done, in the transaction that did it. What changed nothing is not written down.
async fn note(
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
}

/// A partner's key as registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyRecord {
    /// 33 bytes in lower-case hexadecimal.
    pub public_key: String,
    pub enterprise_id: String,
    #[serde(serialize_with = "shown")]
    pub valid_from: CalendarTime,
    #[serde(serialize_with = "maybe_shown")]
    pub valid_until: Option<CalendarTime>,
    #[serde(serialize_with = "maybe_time")]
    pub revoked_at: Option<Timestamp>,
    #[serde(serialize_with = "time")]
    pub created_at: Timestamp,
    /// When it was reinstated last, if ever.
    #[serde(serialize_with = "maybe_time", skip_serializing_if = "Option::is_none")]
    pub reinstated_at: Option<Timestamp>,
    /// Whether it is accepted now, by the database's clock.
    pub valid: bool,
}

/// What came of reinstating a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reinstated {
    /// It counts again; so many messages stay refused for ever.
    Reinstated(KeyRecord, i64),
    /// It is not revoked.
    NotRevoked(KeyRecord),
    /// More came meanwhile than is remembered.
    TooMany(KeyRecord),
    /// This partner has no such key.
    Unknown,
}

/// A key to register.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub enterprise_id: String,
    pub public_key: PublicKey,
    /// None: from now on, or from when it was valid already.
    pub valid_from: Option<CalendarTime>,
    /// None: without end.
    pub valid_until: Option<CalendarTime>,
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

/// What a deposit came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deposited {
    Deposited,
    /// The same content under the same reference came in before.
    Exists,
    /// Other content came in under this reference: this.
    Conflict(Amount),
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

const KEY_COLUMNS: &str = "\
    public_key, enterprise_id, valid_from, valid_until, revoked_at, created_at, reinstated_at,
    revoked_at IS NULL
        AND valid_from <= clock_timestamp()
        AND (valid_until IS NULL OR valid_until > clock_timestamp()) AS valid";

fn key(row: &Row) -> KeyRecord {
    KeyRecord {
        public_key: hex::encode(row.get::<_, &[u8]>("public_key")),
        enterprise_id: row.get("enterprise_id"),
        valid_from: row.get("valid_from"),
        valid_until: row.get("valid_until"),
        revoked_at: row.get("revoked_at"),
        created_at: row.get("created_at"),
        reinstated_at: row.get("reinstated_at"),
        valid: row.get("valid"),
    }
}

fn about_key(key: &KeyRecord) -> Value {
    json!({"enterpriseId": key.enterprise_id, "publicKey": key.public_key})
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
fn vanished(session: &Session, what: &str) -> StoreError {
    StoreError::new(
        session.name,
        Fate::Retry,
        format!("{what} went away while it was looked at"),
    )
}

/// What came in under a reference before.
async fn earlier_deposit(session: &Session, client_id: Uuid, reference: &str) -> Result<Amount, StoreError> {
    let rows = session
        .query(
            "/* registry::deposit earlier */
            SELECT currency, quantity::text AS quantity
            FROM settled.deposits
            WHERE client_id = $1
              AND reference = $2",
            &[&client_id, &reference],
        )
        .await?;
    let row = rows.first().ok_or_else(|| vanished(session, "the deposit"))?;
    let quantity = Quantity::parse(row.get("quantity"))
        .map_err(|why| StoreError::new("deposit", Fate::Ours, format!("a stored deposit's quantity: {why}")))?;
    Ok(Amount {
        currency: row.get("currency"),
        quantity,
    })
}

impl Store {
    /// Registers a key. Afterwards it is valid exactly as said; but one that is revoked stays revoked.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn add_key(&self, wish: &NewKey, by: By<'_>) -> Result<Registered<KeyRecord>, StoreError> {
        let session = self.session("add_key").await?;
        session.begin().await?;
        let bytes = wish.public_key.as_bytes().as_slice();
        let known = session
            .query(
                "/* registry::add_key partner */
                SELECT clock_timestamp()
                FROM settled.partners
                WHERE enterprise_id = $1
                FOR KEY SHARE",
                &[&wish.enterprise_id],
            )
            .await?;
        let Some(now) = known.first().map(|row| row.get::<_, CalendarTime>(0)) else {
            session.rollback().await;
            return Ok(Registered::NoPartner);
        };
        let rows = session
            .query(
                &format!(
                    "/* registry::add_key earlier */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys
                    WHERE public_key = $1
                    FOR UPDATE"
                ),
                &[&bytes],
            )
            .await?;
        let earlier = rows.first().map(key);
        if let Some(earlier) = &earlier
            && earlier.enterprise_id != wish.enterprise_id
        {
            session.rollback().await;
            return Ok(Registered::Conflict(earlier.clone()));
        }
        if let Some(earlier) = &earlier
            && earlier.revoked_at.is_some()
        {
            session.rollback().await;
            return Ok(Registered::Revoked(earlier.clone()));
        }
        let valid_from = match (wish.valid_from, &earlier) {
            (Some(given), _) => given,
            (None, Some(earlier)) => earlier.valid_from.min(now),
            (None, None) => now,
        };
        if wish.valid_until.is_some_and(|until| until <= valid_from) {
            session.rollback().await;
            return Ok(Registered::NeverValid);
        }
        if let Some(earlier) = &earlier
            && (earlier.valid_from, earlier.valid_until) == (valid_from, wish.valid_until)
        {
            session.rollback().await;
            return Ok(Registered::Exists(earlier.clone()));
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::add_key */
                    INSERT INTO settled.partner_keys AS k (public_key, enterprise_id, valid_from, valid_until)
                    VALUES ($1, $2, $3::text::timestamptz, $4::text::timestamptz)
                    ON CONFLICT (public_key) DO UPDATE
                    SET valid_from = excluded.valid_from,
                        valid_until = excluded.valid_until
                    WHERE k.enterprise_id = excluded.enterprise_id
                      AND k.revoked_at IS NULL
                    RETURNING {KEY_COLUMNS}"
                ),
                &[
                    &bytes,
                    &wish.enterprise_id,
                    &valid_from.exactly(),
                    &wish.valid_until.map(CalendarTime::exactly),
                ],
            )
            .await?;
        let Some(stored) = rows.first().map(key) else {
            // Another partner was quicker, or somebody who revoked it, just now.
            let error = vanished(&session, "the key");
            session.rollback().await;
            return Err(error);
        };
        let mut outcome = json!({
            "validFrom": stored.valid_from.to_string(),
            "validUntil": stored.valid_until.map(|time| time.to_string()),
        });
        if let Some(earlier) = &earlier {
            outcome["was"] = json!({
                "validFrom": earlier.valid_from.to_string(),
                "validUntil": earlier.valid_until.map(|time| time.to_string()),
            });
        }
        note(&session, by, "key add", &about_key(&stored), &outcome).await?;
        session.commit().await?;
        Ok(match earlier {
            None => Registered::Added(stored),
            Some(_) => Registered::Updated(stored),
        })
    }

    /// Lets a revoked key count again, from the next batch on. What it signed while it was revoked, and was refused, stays
    /// refused for ever.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn reinstate_key(
        &self,
        enterprise_id: &str,
        public_key: PublicKey,
        by: By<'_>,
    ) -> Result<Reinstated, StoreError> {
        let session = self.session("reinstate_key").await?;
        session.begin().await?;
        let bytes = public_key.as_bytes().as_slice();
        // Waits for the batches that refuse what it signed just now, and they for this.
        let rows = session
            .query(
                &format!(
                    "/* registry::reinstate_key earlier */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys
                    WHERE public_key = $1
                      AND enterprise_id = $2
                    FOR UPDATE"
                ),
                &[&bytes, &enterprise_id],
            )
            .await?;
        let Some(earlier) = rows.first().map(key) else {
            session.rollback().await;
            return Ok(Reinstated::Unknown);
        };
        let rows = session
            .query(
                "/* registry::reinstate_key count */
                SELECT count(*)
                FROM settled.distrusted
                WHERE public_key = $1",
                &[&bytes],
            )
            .await?;
        let refused: i64 = session.one(&rows)?.get(0);
        let refusal = match earlier.revoked_at {
            None => Some(Reinstated::NotRevoked(earlier.clone())),
            Some(_) if refused >= REMEMBERED_MAX => Some(Reinstated::TooMany(earlier.clone())),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            session.rollback().await;
            return Ok(refusal);
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::reinstate_key */
                    UPDATE settled.partner_keys
                    SET revoked_at = NULL,
                        reinstated_at = clock_timestamp()
                    WHERE public_key = $1
                    RETURNING {KEY_COLUMNS}"
                ),
                &[&bytes],
            )
            .await?;
        let Some(stored) = rows.first().map(key) else {
            let error = vanished(&session, "the key");
            session.rollback().await;
            return Err(error);
        };
        let outcome = json!({"revokedAt": earlier.revoked_at.map(rfc3339), "refusedForEver": refused});
        note(&session, by, "key reinstate", &about_key(&stored), &outcome).await?;
        session.commit().await?;
        Ok(Reinstated::Reinstated(stored, refused))
    }

    /// Revokes a key, from the next batch on. None if this partner has no such key. A key revoked before keeps the time
    /// of the first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn revoke_key(
        &self,
        enterprise_id: &str,
        public_key: PublicKey,
        by: By<'_>,
    ) -> Result<Option<Registered<KeyRecord>>, StoreError> {
        let session = self.session("revoke_key").await?;
        session.begin().await?;
        let bytes = public_key.as_bytes().as_slice();
        let rows = session
            .query(
                &format!(
                    "/* registry::revoke_key */
                    UPDATE settled.partner_keys
                    SET revoked_at = clock_timestamp()
                    WHERE public_key = $1
                      AND enterprise_id = $2
                      AND revoked_at IS NULL
                    RETURNING {KEY_COLUMNS}"
                ),
                &[&bytes, &enterprise_id],
            )
            .await?;
        if let Some(row) = rows.first() {
            let revoked = key(row);
            note(&session, by, "key revoke", &about_key(&revoked), &json!({})).await?;
            session.commit().await?;
            return Ok(Some(Registered::Updated(revoked)));
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::revoke_key again */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys
                    WHERE public_key = $1
                      AND enterprise_id = $2"
                ),
                &[&bytes, &enterprise_id],
            )
            .await?;
        session.rollback().await;
        Ok(rows.first().map(|row| Registered::Exists(key(row))))
    }

    /// Every key, by enterprise and age; those of one enterprise if it is named.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn keys(&self, enterprise_id: Option<&str>) -> Result<Vec<KeyRecord>, StoreError> {
        let rows = self
            .session("keys")
            .await?
            .query(
                &format!(
                    "/* registry::keys */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys
                    WHERE enterprise_id = $1 OR $1 IS NULL
                    ORDER BY enterprise_id, created_at, public_key"
                ),
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.iter().map(key).collect())
    }

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

    /// Funds come in, once per client and reference.
    ///
    /// # Errors
    /// The database is away or refuses. It may be asked again: what came in is found by its reference.
    pub async fn deposit(
        &self,
        client_id: Uuid,
        amount: &Amount,
        reference: &str,
        by: By<'_>,
    ) -> Result<Deposited, StoreError> {
        let session = self.session("deposit").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* registry::deposit */ SELECT settled.deposit($1, $2, $3::text::numeric, $4)",
                &[&client_id, &amount.currency, &amount.quantity.to_string(), &reference],
            )
            .await?;
        let deposited = match rows.first().map(|row| row.get::<_, &str>(0)) {
            Some("deposited") => Deposited::Deposited,
            Some("exists") => Deposited::Exists,
            Some("conflict") => Deposited::Conflict(earlier_deposit(&session, client_id, reference).await?),
            Some(_) | None => {
                return Err(StoreError::new(
                    "deposit",
                    Fate::Ours,
                    "settled.deposit() gave an answer that this version does not know",
                ));
            }
        };
        if deposited != Deposited::Deposited {
            session.rollback().await;
            return Ok(deposited);
        }
        let about = json!({"clientId": client_id, "reference": reference});
        let outcome = json!({"currency": amount.currency, "quantity": amount.quantity});
        note(&session, by, "deposit", &about, &outcome).await?;
        session.commit().await?;
        Ok(deposited)
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
