//! How much the stored dead letters take, in all and by partner, and whether there is room for more. Counted by triggers:
//! whoever stores or deletes some adds a row to the sums, and nobody waits for another's.

use super::{Fate, Session, Store, StoreError};

/// What dead letters may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceBounds {
    pub max_rows: u64,
    /// Of bodies and properties.
    pub max_bytes: u64,
}

impl SpaceBounds {
    /// How full it is: 1.0 is full.
    #[expect(clippy::cast_precision_loss, reason = "a share, to be shown")]
    pub fn filled(self, rows: u64, bytes: u64) -> f64 {
        let share = |taken: u64, most: u64| taken as f64 / most.max(1) as f64;
        share(rows, self.max_rows).max(share(bytes, self.max_bytes))
    }
}

/// What some dead letters take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    pub rows: u64,
    pub bytes: u64,
    /// By partner, those with the most bytes first; an empty name stands for messages of which none can be read.
    pub partners: Vec<(String, u64, u64)>,
}

/// What a filing asks.
pub(super) const SUM: &str = "\
    /* dead_letter_space::sum */
    SELECT coalesce(sum(rows), 0)::bigint, coalesce(sum(bytes), 0)::bigint FROM settled.dead_letter_space";

fn natural(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

impl StoreError {
    /// Whether there is no room for more dead letters.
    pub fn is_full(&self) -> bool {
        self.fate == Fate::Full
    }
}

/// Refuses where so much is stored that nothing more may be.
pub(super) async fn check(session: &Session, bounds: SpaceBounds, most: f64) -> Result<(), StoreError> {
    let rows = session.query(SUM, &[]).await?;
    let sums = session.one(&rows)?;
    let (rows, bytes) = (natural(sums.get(0)), natural(sums.get(1)));
    if bounds.filled(rows, bytes) < most {
        return Ok(());
    }
    let SpaceBounds { max_rows, max_bytes } = bounds;
    Err(StoreError::new(
        "dead letters are full",
        Fate::Full,
        format!(
            "{rows} rows of at most {max_rows}, {bytes} bytes of at most {max_bytes} (dead_letters.max_rows, max_bytes): \
             discard and purge some, or raise the bound; until then they wait in the queue settlement.dead"
        ),
    ))
}

impl Store {
    /// Whether so little is stored that a collector that stopped may go on: below this share of the bounds.
    ///
    /// # Errors
    /// [`StoreError::is_full`], or the database is away.
    pub async fn check_dead_letter_space(&self, bounds: SpaceBounds, most: f64) -> Result<(), StoreError> {
        check(&self.session("dead_letter_space").await?, bounds, most).await
    }

    /// What the dead letters take, with this many partners.
    ///
    /// # Errors
    /// The database is away.
    pub async fn dead_letter_space(&self, partners: i64) -> Result<Space, StoreError> {
        let session = self.session("dead_letter_space").await?;
        let rows = session.query(SUM, &[]).await?;
        let sums = session.one(&rows)?;
        let mut space = Space {
            rows: natural(sums.get(0)),
            bytes: natural(sums.get(1)),
            partners: Vec::new(),
        };
        let rows = session
            .query(
                "/* dead_letter_space::partners */
                SELECT enterprise_id, sum(rows)::bigint, sum(bytes)::bigint
                FROM settled.dead_letter_space
                GROUP BY enterprise_id
                ORDER BY 3 DESC, 1
                LIMIT $1",
                &[&partners],
            )
            .await?;
        let partner = |row: &tokio_postgres::Row| (row.get(0), natural(row.get(1)), natural(row.get(2)));
        space.partners = rows.iter().map(partner).collect();
        Ok(space)
    }

    /// Puts the sums together, one row a partner.
    ///
    /// # Errors
    /// The database is away.
    pub async fn sum_dead_letter_space(&self) -> Result<(), StoreError> {
        self.session("sum_dead_letter_space")
            .await?
            .execute(
                "/* dead_letter_space::put together */
                WITH gone AS (
                    DELETE FROM settled.dead_letter_space
                    WHERE (SELECT count(*) > count(DISTINCT s.enterprise_id) FROM settled.dead_letter_space AS s)
                    RETURNING enterprise_id, rows, bytes
                )
                INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
                SELECT enterprise_id, sum(rows), sum(bytes)
                FROM gone
                GROUP BY enterprise_id
                HAVING sum(rows) <> 0 OR sum(bytes) <> 0",
                &[],
            )
            .await
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuller_of_both_bounds_counts() {
        let bounds = SpaceBounds {
            max_rows: 10,
            max_bytes: 1_000,
        };
        for (rows, bytes, filled) in [(0, 0, 0.0), (5, 0, 0.5), (1, 800, 0.8), (10, 0, 1.0), (0, 2_000, 2.0)] {
            let found = bounds.filled(rows, bytes);
            assert!((found - filled).abs() < 1e-9, "{rows} {bytes}: {found}");
        }
    }
}
