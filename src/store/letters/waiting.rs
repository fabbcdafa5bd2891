//! How much waits for an operator.

use std::time::Duration;

use crate::{
    domain::reason::Reason,
    store::{Store, StoreError},
};

/// What can be told of them at a glance.
#[derive(Clone, Debug, Default)]
pub struct LettersUnderWay {
    /// How long ago the oldest open one was collected.
    pub oldest: Option<Duration>,
    /// Runs by state.
    pub runs: Vec<(String, u64)>,
}

fn natural(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

/// How many dead letters wait, and what is being replayed.
#[derive(Clone, Debug, Default)]
pub struct LettersWaiting {
    /// Open ones by reason.
    pub open: Vec<(Reason, u64)>,
    /// How long ago the oldest open one was collected.
    pub oldest: Option<Duration>,
    /// Runs by state.
    pub runs: Vec<(String, u64)>,
}

impl Store {
    /// Measures the desk. One index is read from end to end: not for every few seconds.
    ///
    /// # Errors
    /// The database is away.
    pub async fn measure_letters(&self) -> Result<LettersWaiting, StoreError> {
        let session = self.session("measure_letters").await?;
        let rows = session
            .query(
                "/* letters::measure_letters open */
                SELECT reason, count(*)
                FROM settled.dead_letters
                WHERE state = 'open'
                GROUP BY reason",
                &[],
            )
            .await?;
        let open = rows
            .iter()
            .map(|row| (Reason::written(row.get(0)), natural(row.get(1))))
            .collect();
        drop(session);
        let LettersUnderWay { oldest, runs } = self.letters_under_way().await?;
        Ok(LettersWaiting { open, oldest, runs })
    }

    /// What costs nothing, however many there are.
    ///
    /// # Errors
    /// The database is away.
    pub async fn letters_under_way(&self) -> Result<LettersUnderWay, StoreError> {
        let session = self.session("letters_under_way").await?;
        let rows = session
            .query(
                "/* letters::letters_under_way oldest */
                SELECT extract(epoch FROM clock_timestamp() - collected_at)::float8
                FROM settled.dead_letters
                WHERE state = 'open'
                ORDER BY seq
                LIMIT 1",
                &[],
            )
            .await?;
        let oldest = rows
            .first()
            .map(|row| Duration::from_secs_f64(row.get::<_, f64>(0).max(0.0)));
        let rows = session
            .query(
                "/* letters::letters_under_way runs */ SELECT state, count(*) FROM settled.runs GROUP BY state",
                &[],
            )
            .await?;
        let runs = rows.iter().map(|row| (row.get(0), natural(row.get(1)))).collect();
        Ok(LettersUnderWay { oldest, runs })
    }
}
