//! What an operator does to dead letters directly: discard, restore, purge. Rows are locked in id order, and whether a row
//! is as it was thought to be stands in the WHERE, so that two operators at once do everything once.

use serde_json::json;
use uuid::Uuid;

use super::super::{
    Store, StoreError,
    audit::{Act, write_audit, write_subjects},
};

/// Rows that one statement changes.
const SLICE: usize = 5_000;

/// What an act came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Acted {
    pub audit_id: i64,
    /// Rows that it changed.
    pub changed: usize,
    /// Plans that it deleted.
    pub plans: usize,
}

const DISCARD: &str = "\
    /* acts::discard */
    WITH mine AS MATERIALIZED (
        SELECT id
        FROM settled.dead_letters
        WHERE id = ANY ($1) AND state = 'open'
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE settled.dead_letters AS d
    SET state = 'discarded',
        discarded_at = date_trunc('milliseconds', now())
    FROM mine
    WHERE d.id = mine.id
    RETURNING d.id";

const RESTORE: &str = "\
    /* acts::restore */
    WITH mine AS MATERIALIZED (
        SELECT id
        FROM settled.dead_letters
        WHERE id = ANY ($1) AND state = 'discarded'
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE settled.dead_letters AS d
    SET state = 'open',
        discarded_at = NULL
    FROM mine
    WHERE d.id = mine.id
    RETURNING d.id";

const PURGE: &str = "\
    /* acts::purge */
    WITH mine AS MATERIALIZED (
        SELECT id
        FROM settled.dead_letters
        WHERE id > $2
          AND (state = 'discarded' AND discarded_at < $1 OR $4 AND state = 'settled' AND judged_at < $1)
        ORDER BY id
        LIMIT $3
        FOR UPDATE
    )
    DELETE FROM settled.dead_letters AS d
    USING mine
    WHERE d.id = mine.id
    RETURNING d.id";

const PURGE_PLAN: &str = "\
    /* acts::purge plan */
    DELETE FROM settled.plans
    WHERE id = (
        SELECT p.id
        FROM settled.plans AS p
        WHERE p.at < $1
          AND NOT EXISTS (SELECT FROM settled.runs AS r WHERE r.plan_id = p.id)
        ORDER BY p.id
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id";

impl Store {
    /// Sets open messages aside; the rest of the selection stays as it is.
    ///
    /// # Errors
    /// The database is away or refuses; nothing is changed then, unless `at_commit` says that it is unknown.
    pub async fn discard(&self, act: Act<'_>, ids: &[Uuid]) -> Result<Acted, StoreError> {
        self.change("discard", "discarded", DISCARD, act, ids).await
    }

    /// Opens discarded messages again.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub async fn restore(&self, act: Act<'_>, ids: &[Uuid]) -> Result<Acted, StoreError> {
        self.change("restore", "restored", RESTORE, act, ids).await
    }

    async fn change(
        &self,
        during: &'static str,
        word: &str,
        sql: &str,
        act: Act<'_>,
        ids: &[Uuid],
    ) -> Result<Acted, StoreError> {
        let session = self.session(during).await?;
        session.begin().await?;
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        let mut changed: Vec<Uuid> = Vec::new();
        for slice in sorted.chunks(SLICE) {
            let rows = session.query(sql, &[&slice]).await?;
            changed.extend(rows.iter().map(|row| row.get::<_, Uuid>("id")));
        }
        let outcome = json!({"selected": ids.len(), word: changed.len()});
        let audit_id = write_audit(&session, act, &outcome, None).await?;
        write_subjects(&session, audit_id, &changed).await?;
        session.commit().await?;
        Ok(Acted {
            audit_id,
            changed: changed.len(),
            plans: 0,
        })
    }

    /// How many messages [`Store::purge`] would delete.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_purgeable(&self, before: jiff::Timestamp, settled_too: bool) -> Result<i64, StoreError> {
        let session = self.session("count_purgeable").await?;
        let rows = session
            .query(
                "/* acts::count_purgeable */
                SELECT (SELECT count(*) FROM settled.dead_letters WHERE state = 'discarded' AND discarded_at < $1)
                     + CASE WHEN $2 THEN
                           (SELECT count(*) FROM settled.dead_letters WHERE state = 'settled' AND judged_at < $1)
                       ELSE 0 END",
                &[&before, &settled_too],
            )
            .await?;
        Ok(session.one(&rows)?.get(0))
    }

    /// Deletes for ever what was discarded before a time, if so wished what was settled before it too, and plans older than it that no run names.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub async fn purge(&self, act: Act<'_>, before: jiff::Timestamp, settled_too: bool) -> Result<Acted, StoreError> {
        let session = self.session("purge").await?;
        session.begin().await?;
        let limit = i64::try_from(SLICE).unwrap_or(i64::MAX);
        let mut purged: Vec<Uuid> = Vec::new();
        loop {
            let last = purged.last().copied().unwrap_or(Uuid::nil());
            let rows = session.query(PURGE, &[&before, &last, &limit, &settled_too]).await?;
            if rows.is_empty() {
                break;
            }
            purged.extend(rows.iter().map(|row| row.get::<_, Uuid>("id")));
            // RETURNING has no order; the next slice begins after the greatest.
            purged.sort_unstable();
        }
        let mut plans = 0;
        while !session.query(PURGE_PLAN, &[&before]).await?.is_empty() {
            plans += 1;
        }
        let outcome = json!({"purged": purged.len(), "plans": plans});
        let audit_id = write_audit(&session, act, &outcome, None).await?;
        write_subjects(&session, audit_id, &purged).await?;
        session.commit().await?;
        Ok(Acted {
            audit_id,
            changed: purged.len(),
            plans,
        })
    }
}
