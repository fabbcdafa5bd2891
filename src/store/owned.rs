//! What a client or a partner may see of its own: allocations by page, and balances of connections. Read-only.

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    Store, StoreError,
    allocations::{ALLOCATION_COLUMNS, allocation, select_allocations},
};
use crate::domain::allocation::Allocation;

/// Whose allocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnedBy<'a> {
    /// Of the clients whose enterprise this is.
    Client(&'a str),
    /// Of the partner.
    Partner(&'a str),
}

impl OwnedBy<'_> {
    fn enterprise_id(&self) -> &str {
        match self {
            OwnedBy::Client(enterprise_id) | OwnedBy::Partner(enterprise_id) => enterprise_id,
        }
    }

    /// Which connections, of `c`; `$1` is the enterprise.
    fn condition(&self) -> &'static str {
        match self {
            OwnedBy::Client(_) => {
                "c.client_id IN (SELECT l.client_id FROM settled.clients AS l WHERE l.enterprise_id = $1)"
            }
            OwnedBy::Partner(_) => "c.enterprise_id = $1",
        }
    }
}

/// Which of them. Empty lists: all.
#[derive(Clone, Debug, Default)]
pub struct OwnedFilter {
    pub kinds: Vec<&'static str>,
    pub statuses: Vec<&'static str>,
    pub currencies: Vec<String>,
    pub connections: Vec<Uuid>,
}

/// What stands on a connection in one currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionBalance {
    pub connection_id: Uuid,
    pub client_id: Uuid,
    pub partners_connection_id: String,
    /// None where nothing was ever on it.
    pub currency: Option<String>,
    pub allocated: String,
    pub held: String,
}

/// What stands on all connections of a partner in one currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartnerBalance {
    pub currency: String,
    pub allocated: String,
    pub held: String,
}

impl Store {
    /// One allocation, if it is the owner's.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn owned_allocation(&self, owner: OwnedBy<'_>, id: Uuid) -> Result<Option<Allocation>, StoreError> {
        let session = self.session("owned_allocation").await?;
        let rest = format!("WHERE a.id = $2 AND {}", owner.condition());
        let rows = session
            .query(
                &select_allocations("owned::owned_allocation", &rest),
                &[&owner.enterprise_id(), &id],
            )
            .await?;
        rows.first().map(|row| allocation(&session, row)).transpose()
    }

    /// A page of the owner's allocations, the oldest first, after the one that was made at `after` under that id: so many of
    /// them at most, and no more once these bytes are reached. With whether there are more.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn owned_allocations(
        &self,
        owner: OwnedBy<'_>,
        filter: &OwnedFilter,
        after: Option<(Timestamp, Uuid)>,
        (limit, bytes): (i64, i64),
    ) -> Result<(Vec<Allocation>, bool), StoreError> {
        let session = self.session("owned_allocations").await?;
        let (time, id) = after.unzip();
        // As many of each connection, by its index, and the first of those: whatever else is there is not read.
        let rows = session
            .query(
                &format!(
                    "/* owned::owned_allocations */
                    SELECT sized.*
                    FROM (
                        SELECT page.*,
                               sum(page.bytes) OVER (ORDER BY page.created_at, page.id) - page.bytes AS before,
                               count(*) OVER () AS found
                        FROM (
                            SELECT {ALLOCATION_COLUMNS}, octet_length(a::text) AS bytes
                            FROM settled.connections AS c
                            CROSS JOIN LATERAL (
                                SELECT x.*
                                FROM settled.allocations AS x
                                WHERE x.connection_id = c.connection_id
                                  AND ($2::timestamptz IS NULL OR (x.created_at, x.id) > ($2, $3::uuid))
                                  AND (cardinality($4::text[]) = 0 OR x.type = ANY ($4))
                                  AND (cardinality($5::text[]) = 0 OR x.status = ANY ($5))
                                  AND (cardinality($6::text[]) = 0 OR x.currency = ANY ($6))
                                ORDER BY x.created_at, x.id
                                LIMIT $8
                            ) AS a
                            WHERE {}
                              AND (cardinality($7::uuid[]) = 0 OR c.connection_id = ANY ($7))
                            ORDER BY a.created_at, a.id
                            LIMIT $8
                        ) AS page
                    ) AS sized
                    WHERE sized.before < $9
                    ORDER BY sized.created_at, sized.id",
                    owner.condition()
                ),
                &[
                    &owner.enterprise_id(),
                    &time,
                    &id,
                    &filter.kinds,
                    &filter.statuses,
                    &filter.currencies,
                    &filter.connections,
                    // One more says whether there are more.
                    &limit.saturating_add(1),
                    &bytes,
                ],
            )
            .await?;
        let found = rows.first().map_or(0, |row| row.get::<_, i64>("found"));
        let shown = usize::try_from(limit).unwrap_or(usize::MAX);
        let page = rows.iter().take(shown).map(|row| allocation(&session, row));
        let page: Vec<Allocation> = page.collect::<Result<_, _>>()?;
        let more = i64::try_from(page.len()).is_ok_and(|told| told < found);
        Ok((page, more))
    }

    /// What stands on all connections of a partner by currency, and on each of so many of them in the order of their ids,
    /// after one of them; all of one moment.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn partner_balances(
        &self,
        enterprise_id: &str,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<(Vec<PartnerBalance>, Vec<ConnectionBalance>), StoreError> {
        let session = self.session("partner_balances").await?;
        session.begin_read_only().await?;
        let all = session
            .query(
                "/* owned::partner_balances */
                SELECT f.currency, sum(f.allocated)::text AS allocated, sum(f.held)::text AS held
                FROM settled.connections AS c
                JOIN settled.funds AS f ON f.owner = c.connection_id AND f.holder = 'connection'
                WHERE c.enterprise_id = $1
                GROUP BY f.currency
                ORDER BY f.currency",
                &[&enterprise_id],
            )
            .await?;
        let each = session
            .query(
                "/* owned::partner_balances each */
                SELECT c.connection_id, c.client_id, c.partners_connection_id, f.currency,
                       coalesce(f.allocated, 0)::text AS allocated, coalesce(f.held, 0)::text AS held
                FROM (
                    SELECT connection_id, client_id, partners_connection_id
                    FROM settled.connections
                    WHERE enterprise_id = $1
                      AND ($2::uuid IS NULL OR connection_id > $2)
                    ORDER BY connection_id
                    LIMIT $3
                ) AS c
                LEFT JOIN settled.funds AS f ON f.owner = c.connection_id AND f.holder = 'connection'
                ORDER BY c.connection_id, f.currency",
                &[&enterprise_id, &after, &limit],
            )
            .await?;
        session.rollback().await;
        let all = all.iter().map(|row| PartnerBalance {
            currency: row.get("currency"),
            allocated: row.get("allocated"),
            held: row.get("held"),
        });
        let each = each.iter().map(|row| ConnectionBalance {
            connection_id: row.get("connection_id"),
            client_id: row.get("client_id"),
            partners_connection_id: row.get("partners_connection_id"),
            currency: row.get("currency"),
            allocated: row.get("allocated"),
            held: row.get("held"),
        });
        Ok((all.collect(), each.collect()))
    }
}
