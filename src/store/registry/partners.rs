//! Partners: who may send updates. That one is suspended, in quarantine or resumed is told as an event: the trigger `told` puts it
//! into the outbox, in the transaction that does it.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::Row;

use super::{By, Registered, note, vanished};
use crate::{
    domain::calendar::rfc3339,
    store::{
        Session, Store, StoreError,
        time::{maybe_time, time},
    },
};

/// A partner as registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PartnerRecord {
    pub enterprise_id: String,
    pub name: String,
    pub async_allocations: bool,
    pub async_deallocations: bool,
    /// The AMQP user its messages must carry.
    pub broker_user: Option<String>,
    pub own_queue: bool,
    #[serde(serialize_with = "maybe_time")]
    pub suspended_at: Option<Timestamp>,
    /// Since when its messages are held instead of judged, and why.
    #[serde(serialize_with = "maybe_time")]
    pub quarantined_at: Option<Timestamp>,
    pub quarantine_reason: Option<String>,
    #[serde(serialize_with = "time")]
    pub created_at: Timestamp,
}

impl PartnerRecord {
    /// Whom it logs in as at the broker: who is bound to nobody is given a user of its own name.
    pub fn login(&self) -> &str {
        self.broker_user.as_deref().unwrap_or(&self.enterprise_id)
    }
}

/// Who is registered.
#[derive(Clone, Debug, Default)]
pub struct Roster {
    pub partners: HashSet<String>,
    /// Those whose messages are held instead of judged.
    pub quarantined: HashSet<String>,
}

/// A partner to register.
#[derive(Clone, Debug)]
pub struct NewPartner {
    pub enterprise_id: String,
    pub name: String,
    pub async_allocations: bool,
    pub async_deallocations: bool,
    pub broker_user: Option<String>,
    pub own_queue: bool,
}

/// What is to change of a partner. What is None stays.
#[derive(Clone, Debug, Default)]
pub struct PartnerWish {
    pub name: Option<String>,
    pub async_allocations: Option<bool>,
    pub async_deallocations: Option<bool>,
    /// Some(None): bound to no user.
    pub broker_user: Option<Option<String>>,
    pub own_queue: Option<bool>,
}

/// What a field was, and what it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldChange {
    pub from: Value,
    pub to: Value,
}

/// By field, as they are called in JSON.
pub type FieldChanges = BTreeMap<&'static str, FieldChange>;

impl PartnerRecord {
    /// The fields that an operator says, by their names in JSON.
    fn said(&self) -> [(&'static str, Value); 5] {
        [
            ("name", json!(self.name)),
            ("asyncAllocations", json!(self.async_allocations)),
            ("asyncDeallocations", json!(self.async_deallocations)),
            ("brokerUser", json!(self.broker_user)),
            ("ownQueue", json!(self.own_queue)),
        ]
    }

    /// The same partner with a wish come true.
    #[must_use]
    pub fn with(&self, wish: &PartnerWish) -> Self {
        let wish = wish.clone();
        Self {
            name: wish.name.unwrap_or_else(|| self.name.clone()),
            async_allocations: wish.async_allocations.unwrap_or(self.async_allocations),
            async_deallocations: wish.async_deallocations.unwrap_or(self.async_deallocations),
            broker_user: wish.broker_user.unwrap_or_else(|| self.broker_user.clone()),
            own_queue: wish.own_queue.unwrap_or(self.own_queue),
            ..self.clone()
        }
    }

    /// What is different in another record.
    pub fn changes_to(&self, other: &Self) -> FieldChanges {
        self.said()
            .into_iter()
            .zip(other.said())
            .filter(|((_, from), (_, to))| from != to)
            .map(|((field, from), (_, to))| (field, FieldChange { from, to }))
            .collect()
    }
}

const PARTNER_COLUMNS: &str = "\
    enterprise_id, name, async_allocations, async_deallocations, broker_user, own_queue, suspended_at, quarantined_at,
    quarantine_reason, created_at";

fn partner(row: &Row) -> PartnerRecord {
    PartnerRecord {
        enterprise_id: row.get("enterprise_id"),
        name: row.get("name"),
        async_allocations: row.get("async_allocations"),
        async_deallocations: row.get("async_deallocations"),
        broker_user: row.get("broker_user"),
        own_queue: row.get("own_queue"),
        suspended_at: row.get("suspended_at"),
        quarantined_at: row.get("quarantined_at"),
        quarantine_reason: row.get("quarantine_reason"),
        created_at: row.get("created_at"),
    }
}

/// What was held of a partner is due at once, oldest first; what was parked waits as much longer as the partner was in quarantine,
/// which began then. Says how much is parked.
pub(in crate::store) async fn let_go_on(
    session: &Session,
    enterprise_id: &str,
    since: Timestamp,
) -> Result<u64, StoreError> {
    // What is being judged just now has its lease, and comes again by itself.
    let waited = session
        .execute(
            "/* registry::let_go_on parked */
            WITH waiting AS (
                SELECT key
                FROM settled.parked
                WHERE enterprise_id = $1
                ORDER BY key
                FOR UPDATE
            )
            UPDATE settled.parked AS p
            SET until = p.until + greatest(statement_timestamp() - greatest(p.parked_at, $2), interval '0'),
                due_at = least(p.due_at, statement_timestamp())
            FROM waiting AS w
            WHERE p.key = w.key",
            &[&enterprise_id, &since],
        )
        .await?;
    session
        .execute(
            "/* registry::let_go_on held */
            UPDATE settled.held
            SET due_at = statement_timestamp()
            WHERE id IN (
                SELECT id
                FROM settled.held
                WHERE whose = $1
                  AND due_at > statement_timestamp()
                  AND leased_until IS NULL
                FOR UPDATE SKIP LOCKED
            )",
            &[&enterprise_id],
        )
        .await?;
    Ok(waited)
}

impl Store {
    /// Registers a partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn add_partner(&self, wish: &NewPartner, by: By<'_>) -> Result<Registered<PartnerRecord>, StoreError> {
        let session = self.session("add_partner").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* registry::add_partner */
                    INSERT INTO settled.partners (
                        enterprise_id, name, async_allocations, async_deallocations, broker_user, own_queue
                    )
                    VALUES ($1, $2, $3, $4, $5, $6)
                    ON CONFLICT (enterprise_id) DO NOTHING
                    RETURNING {PARTNER_COLUMNS}"
                ),
                &[
                    &wish.enterprise_id,
                    &wish.name,
                    &wish.async_allocations,
                    &wish.async_deallocations,
                    &wish.broker_user,
                    &wish.own_queue,
                ],
            )
            .await?;
        if let Some(row) = rows.first() {
            let added = partner(row);
            let about = json!({"enterpriseId": added.enterprise_id});
            let outcome = json!({
                "name": added.name,
                "asyncAllocations": added.async_allocations,
                "asyncDeallocations": added.async_deallocations,
                "brokerUser": added.broker_user,
                "ownQueue": added.own_queue,
            });
            note(&session, by, "partner add", &about, &outcome).await?;
            session.commit().await?;
            return Ok(Registered::Added(added));
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::add_partner again */
                    SELECT {PARTNER_COLUMNS}
                    FROM settled.partners
                    WHERE enterprise_id = $1"
                ),
                &[&wish.enterprise_id],
            )
            .await?;
        let stored = rows
            .first()
            .map(partner)
            .ok_or_else(|| vanished(&session, "the partner"));
        session.rollback().await;
        let stored = stored?;
        let same = stored.name == wish.name
            && stored.async_allocations == wish.async_allocations
            && stored.async_deallocations == wish.async_deallocations
            && stored.broker_user == wish.broker_user
            && stored.own_queue == wish.own_queue;
        Ok(if same {
            Registered::Exists(stored)
        } else {
            Registered::Conflict(stored)
        })
    }

    /// Suspends a partner, from the next batch on. None if there is no such partner. A partner that is suspended again keeps
    /// the time of the first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn suspend_partner(
        &self,
        enterprise_id: &str,
        by: By<'_>,
    ) -> Result<Option<Registered<PartnerRecord>>, StoreError> {
        let session = self.session("suspend_partner").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* registry::suspend_partner */
                    UPDATE settled.partners
                    SET suspended_at = clock_timestamp()
                    WHERE enterprise_id = $1
                      AND suspended_at IS NULL
                    RETURNING {PARTNER_COLUMNS}"
                ),
                &[&enterprise_id],
            )
            .await?;
        if let Some(row) = rows.first() {
            let changed = partner(row);
            let about = json!({"enterpriseId": changed.enterprise_id});
            note(&session, by, "partner suspend", &about, &json!({})).await?;
            session.commit().await?;
            return Ok(Some(Registered::Updated(changed)));
        }
        session.rollback().await;
        Ok(self.partner(enterprise_id).await?.map(Registered::Exists))
    }

    /// Holds a partner's messages from the next batch on, instead of judging them; what waits already waits on, its deadline
    /// stopped. None if there is no such partner. A partner that is in quarantine keeps the time and the reason of the first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn quarantine_partner(
        &self,
        enterprise_id: &str,
        by: By<'_>,
    ) -> Result<Option<Registered<PartnerRecord>>, StoreError> {
        let session = self.session("quarantine_partner").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* registry::quarantine_partner */
                    UPDATE settled.partners
                    SET quarantined_at = clock_timestamp(),
                        quarantine_reason = $2
                    WHERE enterprise_id = $1
                      AND quarantined_at IS NULL
                    RETURNING {PARTNER_COLUMNS}"
                ),
                &[&enterprise_id, &by.why],
            )
            .await?;
        if let Some(row) = rows.first() {
            let changed = partner(row);
            let about = json!({"enterpriseId": changed.enterprise_id});
            note(&session, by, "partner quarantine", &about, &json!({})).await?;
            session.commit().await?;
            return Ok(Some(Registered::Updated(changed)));
        }
        session.rollback().await;
        Ok(self.partner(enterprise_id).await?.map(Registered::Exists))
    }

    /// Lets a partner go on, suspended or in quarantine, from the next batch on. What was held meanwhile is due at once,
    /// oldest first; what waited before waits as much longer as the quarantine took. None if there is no such partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn resume_partner(
        &self,
        enterprise_id: &str,
        by: By<'_>,
    ) -> Result<Option<Registered<PartnerRecord>>, StoreError> {
        let session = self.session("resume_partner").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* registry::resume_partner before */
                SELECT suspended_at, quarantined_at
                FROM settled.partners
                WHERE enterprise_id = $1
                FOR NO KEY UPDATE",
                &[&enterprise_id],
            )
            .await?;
        let Some(row) = rows.first() else {
            session.rollback().await;
            return Ok(None);
        };
        let (suspended_at, quarantined_at): (Option<Timestamp>, Option<Timestamp>) = (row.get(0), row.get(1));
        if suspended_at.is_none() && quarantined_at.is_none() {
            session.rollback().await;
            return Ok(self.partner(enterprise_id).await?.map(Registered::Exists));
        }
        let mut outcome = json!({});
        if let Some(quarantined_at) = quarantined_at {
            let waited = let_go_on(&session, enterprise_id, quarantined_at).await?;
            let rows = session
                .query(
                    "/* registry::resume_partner count */
                    SELECT coalesce(sum(messages), 0)::bigint FROM settled.held WHERE whose = $1",
                    &[&enterprise_id],
                )
                .await?;
            let held: i64 = session.one(&rows)?.get(0);
            outcome = json!({"quarantinedAt": rfc3339(quarantined_at), "held": held, "parked": waited});
        }
        let rows = session
            .query(
                &format!(
                    "/* registry::resume_partner */
                    UPDATE settled.partners
                    SET suspended_at = NULL,
                        quarantined_at = NULL,
                        quarantine_reason = NULL
                    WHERE enterprise_id = $1
                    RETURNING {PARTNER_COLUMNS}"
                ),
                &[&enterprise_id],
            )
            .await?;
        let changed = partner(session.one(&rows)?);
        let about = json!({"enterpriseId": changed.enterprise_id});
        note(&session, by, "partner resume", &about, &outcome).await?;
        session.commit().await?;
        Ok(Some(Registered::Updated(changed)))
    }

    /// Every partner, by enterprise id.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn partners(&self) -> Result<Vec<PartnerRecord>, StoreError> {
        let rows = self
            .session("partners")
            .await?
            .query(
                &format!(
                    "/* registry::partners */
                    SELECT {PARTNER_COLUMNS}
                    FROM settled.partners
                    ORDER BY enterprise_id"
                ),
                &[],
            )
            .await?;
        Ok(rows.iter().map(partner).collect())
    }

    /// Partners by enterprise id, after one of them: of all, or of these alone.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn partners_page(
        &self,
        after: Option<&str>,
        partners: Option<&[String]>,
        limit: i64,
    ) -> Result<Vec<PartnerRecord>, StoreError> {
        let rows = self
            .session("partners_page")
            .await?
            .query(
                &format!(
                    "/* registry::partners_page */
                    SELECT {PARTNER_COLUMNS}
                    FROM settled.partners
                    WHERE ($1::text IS NULL OR enterprise_id > $1)
                      AND ($2::text[] IS NULL OR enterprise_id = ANY ($2))
                    ORDER BY enterprise_id
                    LIMIT $3"
                ),
                &[&after, &partners, &limit],
            )
            .await?;
        Ok(rows.iter().map(partner).collect())
    }

    /// The partners that have an input queue of their own, the first registered first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn own_queues(&self) -> Result<Vec<String>, StoreError> {
        let rows = self
            .session("own_queues")
            .await?
            .query(
                "/* registry::own_queues */
                SELECT enterprise_id
                FROM settled.partners
                WHERE own_queue
                ORDER BY created_at, enterprise_id",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Every partner that is registered, and which of them are in quarantine.
    ///
    /// # Errors
    /// The database is away.
    pub async fn roster(&self) -> Result<Roster, StoreError> {
        let rows = self
            .session("roster")
            .await?
            .query(
                "/* registry::roster */ SELECT enterprise_id, quarantined_at IS NOT NULL FROM settled.partners",
                &[],
            )
            .await?;
        let is_quarantined = |row: &&Row| row.get::<_, bool>(1);
        Ok(Roster {
            partners: rows.iter().map(|row| row.get(0)).collect(),
            quarantined: rows.iter().filter(is_quarantined).map(|row| row.get(0)).collect(),
        })
    }

    /// One partner; None if there is no such one.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn partner(&self, enterprise_id: &str) -> Result<Option<PartnerRecord>, StoreError> {
        let rows = self
            .session("partner")
            .await?
            .query(
                &format!(
                    "/* registry::partner */
                    SELECT {PARTNER_COLUMNS}
                    FROM settled.partners
                    WHERE enterprise_id = $1"
                ),
                &[&enterprise_id],
            )
            .await?;
        Ok(rows.first().map(partner))
    }

    /// Changes what is registered of a partner, from the next batch on: the record now, and what was changed. None if there
    /// is no such partner.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn set_partner(
        &self,
        enterprise_id: &str,
        wish: &PartnerWish,
        by: By<'_>,
    ) -> Result<Option<(PartnerRecord, FieldChanges)>, StoreError> {
        let session = self.session("set_partner").await?;
        session.begin().await?;
        let rows = session
            .query(
                &format!(
                    "/* registry::set_partner before */
                    SELECT {PARTNER_COLUMNS}
                    FROM settled.partners
                    WHERE enterprise_id = $1
                    FOR NO KEY UPDATE"
                ),
                &[&enterprise_id],
            )
            .await?;
        let Some(before) = rows.first().map(partner) else {
            session.rollback().await;
            return Ok(None);
        };
        let after = before.with(wish);
        let changes = before.changes_to(&after);
        if changes.is_empty() {
            session.rollback().await;
            return Ok(Some((before, changes)));
        }
        session
            .query(
                "/* registry::set_partner */
                UPDATE settled.partners
                SET name = $2,
                    async_allocations = $3,
                    async_deallocations = $4,
                    broker_user = $5,
                    own_queue = $6
                WHERE enterprise_id = $1",
                &[
                    &enterprise_id,
                    &after.name,
                    &after.async_allocations,
                    &after.async_deallocations,
                    &after.broker_user,
                    &after.own_queue,
                ],
            )
            .await?;
        let about = json!({"enterpriseId": enterprise_id});
        note(&session, by, "partner set", &about, &json!(changes)).await?;
        session.commit().await?;
        Ok(Some((after, changes)))
    }
}
