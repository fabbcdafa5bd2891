//! Tokens: who may ask over HTTP. KeptToken as digests.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Session, Store, StoreError,
    audit::{Act, write_audit},
    registry::By,
    time::{maybe_time, time},
};

/// A token as kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenRecord {
    pub id: Uuid,
    pub enterprise_id: String,
    /// `partner` or `client`.
    pub role: String,
    pub name: String,
    /// Requests a second, where it has a number of its own.
    pub rate: Option<i32>,
    #[serde(serialize_with = "time")]
    pub expires_at: Timestamp,
    #[serde(serialize_with = "maybe_time")]
    pub revoked_at: Option<Timestamp>,
    #[serde(serialize_with = "time")]
    pub created_at: Timestamp,
    /// Whether it is accepted now, by the database's clock.
    pub valid: bool,
}

/// A token to be kept.
#[derive(Clone, Debug)]
pub struct NewToken<'a> {
    pub id: Uuid,
    pub enterprise_id: &'a str,
    pub role: &'a str,
    pub digest: [u8; 32],
    pub name: &'a str,
    pub rate: Option<i32>,
    /// Milliseconds from now, by the database's clock.
    pub lasts_ms: i64,
}

/// What came of keeping a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeptToken {
    Added(TokenRecord),
    /// No partner of this enterprise is registered, or no client's enterprise is this.
    NoSuchEnterprise,
}

/// What came of revoking one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revoked {
    Revoked(TokenRecord),
    /// It was revoked before.
    Before(TokenRecord),
}

const TOKEN_COLUMNS: &str = "\
    id, enterprise_id, role, name, rate, expires_at, revoked_at, created_at,
    revoked_at IS NULL AND expires_at > clock_timestamp() AS valid";

fn token(row: &Row) -> TokenRecord {
    TokenRecord {
        id: row.get("id"),
        enterprise_id: row.get("enterprise_id"),
        role: row.get("role"),
        name: row.get("name"),
        rate: row.get("rate"),
        expires_at: row.get("expires_at"),
        revoked_at: row.get("revoked_at"),
        created_at: row.get("created_at"),
        valid: row.get("valid"),
    }
}

async fn note(session: &Session, by: By<'_>, name: &'static str, token: &TokenRecord) -> Result<(), StoreError> {
    let about = json!({"tokenId": token.id, "enterpriseId": token.enterprise_id, "role": token.role});
    let outcome = json!({
        "name": token.name,
        "rate": token.rate,
        "expiresAt": crate::domain::calendar::rfc3339(token.expires_at),
    });
    let act = Act {
        name,
        operator: by.operator,
        why: by.why,
        filters: &about,
        voucher: None,
    };
    write_audit(session, act, &outcome, None).await.map(drop)
}

impl Store {
    /// Keeps a token's digest. Its enterprise must be known in the role.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn add_token(&self, wish: &NewToken<'_>, by: By<'_>) -> Result<KeptToken, StoreError> {
        let session = self.session("add_token").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* tokens::add_token enterprise */
                SELECT CASE $2
                    WHEN 'partner' THEN EXISTS (SELECT FROM settled.partners WHERE enterprise_id = $1)
                    ELSE EXISTS (SELECT FROM settled.clients WHERE enterprise_id = $1)
                END",
                &[&wish.enterprise_id, &wish.role],
            )
            .await?;
        if !session.one(&rows)?.get::<_, bool>(0) {
            session.rollback().await;
            return Ok(KeptToken::NoSuchEnterprise);
        }
        let rows = session
            .query(
                &format!(
                    "/* tokens::add_token */
                    INSERT INTO settled.tokens (id, enterprise_id, role, digest, name, rate, expires_at)
                    VALUES ($1, $2, $3, $4, $5, $6,
                        date_trunc('milliseconds', clock_timestamp() + $7::bigint * interval '1 millisecond'))
                    RETURNING {TOKEN_COLUMNS}"
                ),
                &[
                    &wish.id,
                    &wish.enterprise_id,
                    &wish.role,
                    &wish.digest.as_slice(),
                    &wish.name,
                    &wish.rate,
                    &wish.lasts_ms,
                ],
            )
            .await?;
        let added = token(session.one(&rows)?);
        note(&session, by, "token add", &added).await?;
        session.commit().await?;
        Ok(KeptToken::Added(added))
    }

    /// Accepts a token no more, from the next request on. None where there is no such one.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn revoke_token(&self, id: Uuid, by: By<'_>) -> Result<Option<Revoked>, StoreError> {
        let session = self.session("revoke_token").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* tokens::revoke_token */
                    UPDATE settled.tokens
                    SET revoked_at = date_trunc('milliseconds', clock_timestamp())
                    WHERE id = $1
                      AND revoked_at IS NULL
                    RETURNING {TOKEN_COLUMNS}"
                ),
                &[&id],
            )
            .await?;
        if let Some(revoked) = rows.first().map(token) {
            note(&session, by, "token revoke", &revoked).await?;
            session.commit().await?;
            return Ok(Some(Revoked::Revoked(revoked)));
        }
        let rows = session
            .query(
                &format!(
                    "/* tokens::revoke_token again */
                    SELECT {TOKEN_COLUMNS}
                    FROM settled.tokens
                    WHERE id = $1"
                ),
                &[&id],
            )
            .await?;
        session.rollback().await;
        Ok(rows.first().map(|row| Revoked::Before(token(row))))
    }

    /// Every token, or those of one enterprise, the oldest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn tokens(&self, enterprise_id: Option<&str>) -> Result<Vec<TokenRecord>, StoreError> {
        let rows = self
            .session("tokens")
            .await?
            .query(
                &format!(
                    "/* tokens::tokens */
                    SELECT {TOKEN_COLUMNS}
                    FROM settled.tokens
                    WHERE $1::text IS NULL OR enterprise_id = $1
                    ORDER BY created_at, id"
                ),
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.iter().map(token).collect())
    }

    /// Ids and digests of those that are accepted now, the newest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn valid_tokens(&self, most: i64) -> Result<Vec<(Uuid, Vec<u8>)>, StoreError> {
        let rows = self
            .session("valid_tokens")
            .await?
            .query(
                "/* tokens::valid_tokens */
                SELECT id, digest
                FROM settled.tokens
                WHERE revoked_at IS NULL
                  AND expires_at > clock_timestamp()
                ORDER BY created_at DESC, id
                LIMIT $1",
                &[&most],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get("id"), row.get("digest"))).collect())
    }

    /// A token with its digest.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn token(&self, id: Uuid) -> Result<Option<(TokenRecord, Vec<u8>)>, StoreError> {
        let rows = self
            .session("token")
            .await?
            .query(
                &format!(
                    "/* tokens::token */
                    SELECT {TOKEN_COLUMNS}, digest
                    FROM settled.tokens
                    WHERE id = $1"
                ),
                &[&id],
            )
            .await?;
        Ok(rows.first().map(|row| (token(row), row.get("digest"))))
    }
}
