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

const LOCK: &str = "\
    /* acts::lock */
    SELECT id
    FROM settled.dead_letters
    WHERE id = ANY ($1) AND state = $2
    ORDER BY id
    FOR NO KEY UPDATE";

const DISCARD: &str = "\
    /* acts::discard */
    UPDATE settled.dead_letters
    SET state = 'discarded',
        discarded_at = date_trunc('milliseconds', now())
    WHERE id = ANY ($1)";

const RESTORE: &str = "\
    /* acts::restore */
    UPDATE settled.dead_letters
    SET state = 'open',
        discarded_at = NULL
    WHERE id = ANY ($1)";

const LOCK_PURGED: &str = "\
    /* acts::purge lock */
    SELECT id
    FROM settled.dead_letters
    WHERE id > $2
      AND (state = 'discarded' AND discarded_at < $1 OR $4 AND state = 'settled' AND judged_at < $1)
    ORDER BY id
    LIMIT $3
    FOR UPDATE";

const PURGE: &str = "\
    /* acts::purge */
    DELETE FROM settled.dead_letters WHERE id = ANY ($1)";

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
        self.change("discard", ("open", "discarded"), DISCARD, act, ids).await
    }

    /// Opens discarded messages again.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub async fn restore(&self, act: Act<'_>, ids: &[Uuid]) -> Result<Acted, StoreError> {
        self.change("restore", ("discarded", "restored"), RESTORE, act, ids)
            .await
    }

    async fn change(
        &self,
        during: &'static str,
        (state, word): (&str, &str),
        sql: &str,
        act: Act<'_>,
        ids: &[Uuid],
    ) -> Result<Acted, StoreError> {
        let session = self.session(during).await?;
        session.begin().await?;
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        let mut mine: Vec<Uuid> = Vec::new();
        for slice in sorted.chunks(SLICE) {
            let rows = session.query(LOCK, &[&slice, &state]).await?;
            mine.extend(rows.iter().map(|row| row.get::<_, Uuid>("id")));
        }
        // Before anything changes: the database may want to see it there.
        let outcome = json!({"selected": ids.len(), word: mine.len()});
        let audit_id = write_audit(&session, act, &outcome, None).await?;
        write_subjects(&session, audit_id, &mine).await?;
        for slice in mine.chunks(SLICE) {
            session.execute_exactly(slice.len(), sql, &[&slice]).await?;
        }
        session.commit().await?;
        Ok(Acted {
            audit_id,
            changed: mine.len(),
            plans: 0,
        })
    }

    /// How many messages, and how many plans, [`Store::purge`] would delete.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn count_purgeable(&self, before: jiff::Timestamp, settled_too: bool) -> Result<(i64, i64), StoreError> {
        let session = self.session("count_purgeable").await?;
        let rows = session
            .query(
                "/* acts::count_purgeable */
                SELECT (SELECT count(*) FROM settled.dead_letters WHERE state = 'discarded' AND discarded_at < $1)
                     + CASE WHEN $2 THEN
                           (SELECT count(*) FROM settled.dead_letters WHERE state = 'settled' AND judged_at < $1)
                       ELSE 0 END AS messages,
                       (SELECT count(*)
                        FROM settled.plans AS p
                        WHERE p.at < $1 AND NOT EXISTS (SELECT FROM settled.runs AS r WHERE r.plan_id = p.id)) AS plans",
                &[&before, &settled_too],
            )
            .await?;
        let row = session.one(&rows)?;
        Ok((row.get("messages"), row.get("plans")))
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
            let rows = session
                .query(LOCK_PURGED, &[&before, &last, &limit, &settled_too])
                .await?;
            if rows.is_empty() {
                break;
            }
            purged.extend(rows.iter().map(|row| row.get::<_, Uuid>("id")));
        }
        let mut plans = 0;
        while !session.query(PURGE_PLAN, &[&before]).await?.is_empty() {
            plans += 1;
        }
        let outcome = json!({"purged": purged.len(), "plans": plans});
        let audit_id = write_audit(&session, act, &outcome, None).await?;
        write_subjects(&session, audit_id, &purged).await?;
        for slice in purged.chunks(SLICE) {
            session.execute_exactly(slice.len(), PURGE, &[&slice]).await?;
        }
        session.commit().await?;
        Ok(Acted {
            audit_id,
            changed: purged.len(),
            plans,
        })
    }
}
