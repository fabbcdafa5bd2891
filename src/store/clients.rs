//! Clients and their enterprises: as whom a client reads over HTTP.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Fate, Store, StoreError,
    audit::{Act, write_audit},
    registry::{By, Registered},
    time::time,
};

/// A client as registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientRecord {
    pub client_id: Uuid,
    pub enterprise_id: String,
    #[serde(serialize_with = "time")]
    pub created_at: Timestamp,
}

fn client(row: &Row) -> ClientRecord {
    ClientRecord {
        client_id: row.get("client_id"),
        enterprise_id: row.get("enterprise_id"),
        created_at: row.get("created_at"),
    }
}

impl Store {
    /// Registers a client's enterprise, for good: what was told to one enterprise must not become another's.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn add_client(
        &self,
        client_id: Uuid,
        enterprise_id: &str,
        by: By<'_>,
    ) -> Result<Registered<ClientRecord>, StoreError> {
        let session = self.session("add_client").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* clients::add_client */
                INSERT INTO settled.clients (client_id, enterprise_id)
                VALUES ($1, $2)
                ON CONFLICT (client_id) DO NOTHING
                RETURNING client_id, enterprise_id, created_at",
                &[&client_id, &enterprise_id],
            )
            .await?;
        if let Some(row) = rows.first() {
            let added = client(row);
            let about = json!({"clientId": client_id, "enterpriseId": enterprise_id});
            let act = Act {
                name: "client add",
                operator: by.operator,
                why: by.why,
                filters: &about,
                voucher: None,
            };
            write_audit(&session, act, &json!({}), None).await?;
            session.commit().await?;
            return Ok(Registered::Added(added));
        }
        let rows = session
            .query(
                "/* clients::add_client again */
                SELECT client_id, enterprise_id, created_at
                FROM settled.clients
                WHERE client_id = $1",
                &[&client_id],
            )
            .await?;
        let stored = rows.first().map(client);
        session.rollback().await;
        // Somebody deletes by hand. Worth another try.
        let stored = stored
            .ok_or_else(|| StoreError::new("add_client", Fate::Retry, "the client went away while it was looked at"))?;
        Ok(if stored.enterprise_id == enterprise_id {
            Registered::Exists(stored)
        } else {
            Registered::Conflict(stored)
        })
    }

    /// Every client, or those of one enterprise.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn clients(&self, enterprise_id: Option<&str>) -> Result<Vec<ClientRecord>, StoreError> {
        let rows = self
            .session("clients")
            .await?
            .query(
                "/* clients::clients */
                SELECT client_id, enterprise_id, created_at
                FROM settled.clients
                WHERE $1::text IS NULL OR enterprise_id = $1
                ORDER BY enterprise_id, client_id",
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.iter().map(client).collect())
    }
}
