//! A partner's money leaves the source, once everything is in the target.

use uuid::Uuid;

use super::{CellMove, MovePhase, advance, find, lock, standing::MovedBalance, tell};
use crate::{
    fail::{self, Point},
    store::{Session, Store, StoreError, registry::By},
};

/// What leaving came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// It has left, now or before.
    Gone,
    /// What stands here is not what arrived there; nothing was changed.
    Differs(String),
    /// It was taken back, or this database knows nothing of it (any more); nothing was changed.
    NotPaused,
}

/// The funds of the partner's connections and of the world outside, in the order in which every writer locks them.
const LOCK: &str = "\
    /* moves::leave lock */
    SELECT FROM settled.funds AS f
    WHERE f.id IN (
        SELECT x.id
        FROM settled.connections AS c
        JOIN settled.funds AS h ON h.holder = 'connection' AND h.owner = c.connection_id
        CROSS JOIN LATERAL (
            SELECT h.id
            UNION ALL
            SELECT w.id FROM settled.funds AS w
            WHERE w.holder = 'world' AND w.owner = '00000000-0000-0000-0000-000000000000' AND w.currency = h.currency
        ) AS x
        WHERE c.enterprise_id = $1
    )
    ORDER BY f.id
    FOR NO KEY UPDATE";

/// What differs from what arrived.
const DIFFERENCE: &str = "\
    /* moves::leave difference */
    SELECT format('connection %s has %s %s here, and %s arrived', coalesce(h.connection_id, t.connection_id),
                  coalesce(h.balance, 0), coalesce(h.currency, t.currency), coalesce(t.balance, 0))
    FROM (
        SELECT c.connection_id, f.currency, f.held + f.allocated AS balance
        FROM settled.connections AS c
        JOIN settled.funds AS f ON f.holder = 'connection' AND f.owner = c.connection_id
        WHERE c.enterprise_id = $1
          AND f.held + f.allocated > 0
    ) AS h
    FULL JOIN (
        SELECT connection_id, currency, balance::numeric AS balance
        FROM unnest($2::uuid[], $3::text[], $4::text[]) AS t (connection_id, currency, balance)
    ) AS t ON (t.connection_id, t.currency) = (h.connection_id, h.currency)
    WHERE h.balance IS DISTINCT FROM t.balance
    LIMIT 1";

/// Out to the world outside, from where it stands.
const GO: &str = "\
    /* moves::leave money */
    WITH gone AS (
        INSERT INTO settled.moved_funds (move_id, connection_id, left_from, currency, quantity, created_at)
        SELECT $2, c.connection_id, k.kind, f.currency, p.part, date_trunc('milliseconds', clock_timestamp())
        FROM settled.connections AS c
        JOIN settled.funds AS f ON f.holder = 'connection' AND f.owner = c.connection_id
        CROSS JOIN LATERAL (VALUES ('held', f.held), ('allocated', f.allocated)) AS k (kind, balance)
        CROSS JOIN LATERAL settled.parts_of(k.balance) AS p (part)
        WHERE c.enterprise_id = $1
        RETURNING id, connection_id, left_from, currency, quantity, created_at
    )
    INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    SELECT m.id, 0, 'left', settled.account(h.id, m.left_from), settled.account(w.id, 'external'), m.quantity, m.created_at
    FROM gone AS m
    JOIN settled.funds AS h ON (h.holder, h.owner, h.currency) = ('connection', m.connection_id, m.currency)
    JOIN settled.funds AS w
      ON (w.holder, w.owner, w.currency) = ('world', '00000000-0000-0000-0000-000000000000'::uuid, m.currency)";

const BALANCE: &str = "\
    /* moves::leave balances */
    WITH gone AS (
        SELECT connection_id, currency, sum(quantity) AS quantity
        FROM settled.moved_funds
        WHERE move_id = $1
        GROUP BY connection_id, currency
    ), change AS (
        SELECT h.id, h.held, h.allocated, 0::numeric AS external
        FROM gone AS g
        JOIN settled.funds AS h ON (h.holder, h.owner, h.currency) = ('connection', g.connection_id, g.currency)
        UNION ALL
        SELECT w.id, 0, 0, sum(g.quantity)
        FROM gone AS g
        JOIN settled.funds AS w
          ON (w.holder, w.owner, w.currency) = ('world', '00000000-0000-0000-0000-000000000000'::uuid, g.currency)
        GROUP BY w.id
    )
    UPDATE settled.funds AS f
    SET held = f.held - c.held,
        allocated = f.allocated - c.allocated,
        external = f.external + c.external
    FROM change AS c
    WHERE f.id = c.id";

/// They wait in the target. Before the funds are locked, and by key, as every writer does.
const UNPARK: &str = "\
    /* moves::leave parked */
    WITH mine AS MATERIALIZED (
        SELECT key FROM settled.parked WHERE enterprise_id = $1 ORDER BY key FOR UPDATE
    ), gone AS (
        DELETE FROM settled.parked AS p USING mine AS m WHERE p.key = m.key RETURNING p.key, p.allocation_id
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT key, allocation_id, 'left', date_trunc('milliseconds', clock_timestamp()) FROM gone";

impl Store {
    /// In the source: what arrived in the target goes from here, all of it in one commit. Nothing of it is judged here any more.
    /// Said again it is found as it is.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn leave(&self, going: &CellMove, arrived: &[MovedBalance], by: By<'_>) -> Result<Leaving, StoreError> {
        let session = self.session("leave").await?;
        session.begin().await?;
        let Some(going) = lock(&session, going.id, MovePhase::Paused).await? else {
            let found = find(&session, going.id).await?;
            session.rollback().await;
            return Ok(match found.map(|found| found.phase) {
                Some(MovePhase::Left | MovePhase::Done) => Leaving::Gone,
                Some(MovePhase::Paused | MovePhase::Arrived | MovePhase::Cancelled) | None => Leaving::NotPaused,
            });
        };
        let whose = going.enterprise_id.as_str();
        session.execute(UNPARK, &[&whose]).await?;
        session.query(LOCK, &[&whose]).await?;
        if let Some(difference) = difference(&session, whose, arrived).await? {
            session.rollback().await;
            return Ok(Leaving::Differs(difference));
        }
        session.execute(GO, &[&whose, &going.id]).await?;
        session.execute(BALANCE, &[&going.id]).await?;
        advance(&session, going.id, MovePhase::Left).await?;
        let left = CellMove {
            phase: MovePhase::Left,
            ..going
        };
        tell(&session, by, &left, "partner move").await?;
        session.commit().await?;
        fail::point(Point::MoveLeft).await;
        Ok(Leaving::Gone)
    }
}

async fn difference(session: &Session, whose: &str, arrived: &[MovedBalance]) -> Result<Option<String>, StoreError> {
    let connections: Vec<Uuid> = arrived.iter().map(|one| one.connection_id).collect();
    let currencies: Vec<&str> = arrived.iter().map(|one| one.currency.as_str()).collect();
    let balances: Vec<&str> = arrived.iter().map(|one| one.quantity.as_str()).collect();
    let rows = session
        .query(DIFFERENCE, &[&whose, &connections, &currencies, &balances])
        .await?;
    Ok(rows.first().map(|row| row.get(0)))
}
