//! Partners' keys: whose word counts, and when.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::Row;

use super::{By, Registered, Unproven, note, vanished};
use crate::{
    domain::{
        calendar::{CalendarTime, rfc3339},
        signature::{PublicKey, Signer, signer},
    },
    store::{
        Session, Store, StoreError,
        time::{maybe_shown, maybe_time, shown, time},
    },
};

/// What was signed by a revoked key and is remembered of one key, at most. Above it the key can not be reinstated.
pub const REMEMBERED_MAX: i64 = 100_000;

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
    /// When its owner proved to have its private half, if ever.
    #[serde(serialize_with = "maybe_time", skip_serializing_if = "Option::is_none")]
    pub proven_at: Option<Timestamp>,
    /// When it proved a message last, as far as that was written down, about once a minute; null: never.
    #[serde(serialize_with = "maybe_time")]
    pub last_used_at: Option<Timestamp>,
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
    pub proof: KeyProof,
}

/// What shows that who gives a key has its private half.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyProof {
    /// Over what [`Store::challenge_key`] gave, as a partner signs its payloads.
    pub signature: Option<String>,
    /// A key that was never proven is not registered without it.
    pub required: bool,
}

pub(super) const KEY_COLUMNS: &str = "\
    k.public_key, k.enterprise_id, k.valid_from, k.valid_until, k.revoked_at, k.created_at, k.reinstated_at, k.proven_at,
    (SELECT u.last_used_at FROM settled.key_uses AS u WHERE u.public_key = k.public_key) AS last_used_at,
    k.revoked_at IS NULL
        AND k.valid_from <= clock_timestamp()
        AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp()) AS valid";

pub(super) fn key(row: &Row) -> KeyRecord {
    KeyRecord {
        public_key: hex::encode(row.get::<_, &[u8]>("public_key")),
        enterprise_id: row.get("enterprise_id"),
        valid_from: row.get("valid_from"),
        valid_until: row.get("valid_until"),
        revoked_at: row.get("revoked_at"),
        created_at: row.get("created_at"),
        reinstated_at: row.get("reinstated_at"),
        proven_at: row.get("proven_at"),
        last_used_at: row.get("last_used_at"),
        valid: row.get("valid"),
    }
}

pub(super) fn about_key(key: &KeyRecord) -> Value {
    json!({"enterpriseId": key.enterprise_id, "publicKey": key.public_key})
}

/// What changed of a key, for the audit.
pub(super) fn outcome_of(stored: &KeyRecord, earlier: Option<&KeyRecord>) -> Value {
    let window = |key: &KeyRecord| {
        json!({
            "validFrom": key.valid_from.to_string(),
            "validUntil": key.valid_until.map(|time| time.to_string()),
        })
    };
    let mut outcome = window(stored);
    if stored.proven_at.is_some() {
        outcome["provenAt"] = json!(stored.proven_at.map(rfc3339));
    }
    if let Some(earlier) = earlier {
        outcome["was"] = window(earlier);
    }
    outcome
}

/// A registration in an open transaction, with the key as it was.
pub(super) struct Registering {
    pub(super) came: Registered<KeyRecord>,
    pub(super) earlier: Option<KeyRecord>,
}

impl Registering {
    fn refused(came: Registered<KeyRecord>) -> Self {
        Self { came, earlier: None }
    }
}

/// Whether a key is proven just now; or why it is not to be registered.
async fn prove(
    session: &Session,
    wish: &NewKey,
    earlier: Option<&KeyRecord>,
) -> Result<Result<bool, Unproven>, StoreError> {
    let Some(signature) = &wish.proof.signature else {
        let is_proven = earlier.is_some_and(|earlier| earlier.proven_at.is_some());
        return Ok(if wish.proof.required && !is_proven {
            Err(Unproven::Missing)
        } else {
            Ok(false)
        });
    };
    let bytes = wish.public_key.as_bytes().as_slice();
    let rows = session
        .query(
            "/* registry::prove */
            SELECT challenge
            FROM settled.key_challenges
            WHERE enterprise_id = $1
              AND public_key = $2
              AND expires_at > clock_timestamp()
            FOR UPDATE",
            &[&wish.enterprise_id, &bytes],
        )
        .await?;
    let Some(challenge) = rows.first().map(|row| row.get::<_, &str>(0)) else {
        return Ok(Err(Unproven::NoChallenge));
    };
    if signer(challenge, signature.trim()) != Signer::Key(wish.public_key) {
        return Ok(Err(Unproven::Wrong));
    }
    // It proves once.
    session
        .execute(
            "/* registry::prove done */
            DELETE FROM settled.key_challenges WHERE enterprise_id = $1 AND public_key = $2",
            &[&wish.enterprise_id, &bytes],
        )
        .await?;
    Ok(Ok(true))
}

/// Afterwards the key is valid exactly as said; but one that is revoked stays revoked. Nothing is committed.
pub(super) async fn register(session: &Session, wish: &NewKey, now: CalendarTime) -> Result<Registering, StoreError> {
    let bytes = wish.public_key.as_bytes().as_slice();
    let rows = session
        .query(
            &format!(
                "/* registry::add_key earlier */
                SELECT {KEY_COLUMNS}
                FROM settled.partner_keys AS k
                WHERE k.public_key = $1
                FOR UPDATE OF k"
            ),
            &[&bytes],
        )
        .await?;
    let earlier = rows.first().map(key);
    if let Some(earlier) = &earlier
        && earlier.enterprise_id != wish.enterprise_id
    {
        return Ok(Registering::refused(Registered::Conflict(earlier.clone())));
    }
    if let Some(earlier) = &earlier
        && earlier.revoked_at.is_some()
    {
        return Ok(Registering::refused(Registered::Revoked(earlier.clone())));
    }
    let valid_from = match (wish.valid_from, &earlier) {
        (Some(given), _) => given,
        (None, Some(earlier)) => earlier.valid_from.min(now),
        (None, None) => now,
    };
    if wish.valid_until.is_some_and(|until| until <= valid_from) {
        return Ok(Registering::refused(Registered::NeverValid));
    }
    let proven = match prove(session, wish, earlier.as_ref()).await? {
        Ok(proven) => proven,
        Err(why) => return Ok(Registering::refused(Registered::Unproven(why))),
    };
    if let Some(earlier) = &earlier
        && !proven
        && (earlier.valid_from, earlier.valid_until) == (valid_from, wish.valid_until)
    {
        return Ok(Registering::refused(Registered::Exists(earlier.clone())));
    }
    let rows = session
        .query(
            &format!(
                "/* registry::add_key */
                INSERT INTO settled.partner_keys AS k (
                    public_key, enterprise_id, valid_from, valid_until, proven_at
                )
                VALUES (
                    $1, $2, $3::text::timestamptz, $4::text::timestamptz,
                    CASE WHEN $5 THEN date_trunc('milliseconds', clock_timestamp()) END
                )
                ON CONFLICT (public_key) DO UPDATE
                SET valid_from = excluded.valid_from,
                    valid_until = excluded.valid_until,
                    proven_at = coalesce(excluded.proven_at, k.proven_at)
                WHERE k.enterprise_id = excluded.enterprise_id
                  AND k.revoked_at IS NULL
                RETURNING {KEY_COLUMNS}"
            ),
            &[
                &bytes,
                &wish.enterprise_id,
                &valid_from.exactly(),
                &wish.valid_until.map(CalendarTime::exactly),
                &proven,
            ],
        )
        .await?;
    // Else another partner was quicker, or somebody who revoked it, just now.
    let stored = rows.first().map(key).ok_or_else(|| vanished(session, "the key"))?;
    Ok(Registering {
        came: match &earlier {
            None => Registered::Added(stored),
            Some(_) => Registered::Updated(stored),
        },
        earlier,
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
        let Registering { came, earlier } = match register(&session, wish, now).await {
            Ok(registering) => registering,
            Err(error) => {
                session.rollback().await;
                return Err(error);
            }
        };
        let (Registered::Added(stored) | Registered::Updated(stored)) = &came else {
            session.rollback().await;
            return Ok(came);
        };
        let outcome = outcome_of(stored, earlier.as_ref());
        note(&session, by, "key add", &about_key(stored), &outcome).await?;
        session.commit().await?;
        Ok(came)
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
                    FROM settled.partner_keys AS k
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
                    UPDATE settled.partner_keys AS k
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
                    UPDATE settled.partner_keys AS k
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
                    FROM settled.partner_keys AS k
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
                    FROM settled.partner_keys AS k
                    WHERE enterprise_id = $1 OR $1 IS NULL
                    ORDER BY enterprise_id, created_at, public_key"
                ),
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.iter().map(key).collect())
    }
}
