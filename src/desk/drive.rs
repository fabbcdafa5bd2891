//! The driver of a replay: marks the messages of a run as due, as fast as it may, and waits for their verdicts, which the
//! workers write. Everything that must survive stands in the database: whoever takes the run up goes on where it stands.

use std::time::{Duration, Instant};

use crate::{
    config::DeadLetterSettings,
    store::{
        Store, StoreError,
        runs::{Driven, Driver, Marked, Run},
    },
};

/// How often we look, at most.
const LOOK: Duration = Duration::from_millis(50);
/// Messages that one transaction marks.
const SLICE: usize = 256;

/// How a drive ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// No message waits, and none is due.
    Over,
    /// It must not go on, and why.
    Stop(String),
    /// Somebody cancelled it, or took it over.
    Lost,
}

/// What there is to say on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunNews {
    /// As before, with new numbers.
    On,
    /// The canary is judged as planned.
    CanaryPassed,
}

/// Drives a run until it is over, must stop, or is ours no more. Dropped, it leaves what is due as it is.
///
/// # Errors
/// The database is away or refuses.
pub(super) async fn drive(
    store: &Store,
    settings: &DeadLetterSettings,
    id: i64,
    driver: Driver,
    mut canary: Option<i64>,
    mut told: impl FnMut(&Run, RunNews),
) -> Result<Ended, StoreError> {
    let mut pace = None;
    let mut patience = Silence::new(settings.verdict_deadline);
    loop {
        let looked = Instant::now();
        let Driven::Ours(run) = store.drive_on(id, driver).await? else {
            return Ok(Ended::Lost);
        };
        let look = looked.elapsed();
        if run.waiting == 0 && run.due == 0 {
            return Ok(Ended::Over);
        }
        if let Some(many) = canary
            && run.due == 0
            && run.judged >= many
        {
            if run.differ > 0 {
                return Ok(Ended::Stop(format!(
                    "{} of the first {} came to another verdict than planned",
                    run.differ, run.judged
                )));
            }
            canary = None;
            told(&run, RunNews::CanaryPassed);
        }
        told(&run, RunNews::On);
        if patience.is_over(&run) {
            return Ok(Ended::Stop(format!(
                "no verdict for {:?}: no worker takes what is due",
                settings.verdict_deadline
            )));
        }
        let room = match canary {
            Some(many) => many - run.due - run.judged,
            None => i64::try_from(settings.due_max).unwrap_or(i64::MAX) - run.due,
        };
        let room = usize::try_from(room.min(run.waiting)).unwrap_or_default();
        let allowed = match (run.rate, canary) {
            (Some(rate), None) => pace.get_or_insert_with(|| Pace::new(rate)).allowed(room),
            _ => room,
        };
        if !mark(store, id, driver, allowed, pace.as_mut()).await? {
            return Ok(Ended::Lost);
        }
        // Looking counts every message of the run: a quarter of the time at most.
        tokio::time::sleep(LOOK.max(3 * look)).await;
    }
}

/// Marks so many, a slice at a time. False if the run is ours no more.
async fn mark(
    store: &Store,
    id: i64,
    driver: Driver,
    allowed: usize,
    mut pace: Option<&mut Pace>,
) -> Result<bool, StoreError> {
    let mut left = allowed;
    while left > 0 {
        match store.mark_due(id, driver, left.min(SLICE)).await? {
            Driven::Lost => return Ok(false),
            Driven::Ours(Marked { due: 0, skipped: 0 }) => break,
            Driven::Ours(Marked { due, .. }) => {
                // What is skipped is no replay: the rate is that of those that are.
                left = left.saturating_sub(due);
                if let Some(pace) = &mut pace {
                    pace.marked += due;
                }
            }
        }
    }
    Ok(true)
}

/// So many a second, counted from the beginning so that no rounding adds up.
struct Pace {
    rate: f64,
    began: Instant,
    marked: usize,
}

impl Pace {
    fn new(rate: f64) -> Self {
        Self {
            rate,
            began: Instant::now(),
            marked: 0,
        }
    }

    /// How many of `room` may go now. What stood still while there was no room is not caught up with.
    fn allowed(&mut self, room: usize) -> usize {
        let due = self.due(self.began.elapsed());
        let allowed = due.saturating_sub(self.marked);
        if allowed > room {
            self.marked += allowed - room;
        }
        allowed.min(room)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of messages, saturating"
    )]
    fn due(&self, elapsed: Duration) -> usize {
        (elapsed.as_secs_f64() * self.rate) as usize + 1
    }
}

/// Whether verdicts still come.
struct Silence {
    deadline: Duration,
    judged: i64,
    since: Instant,
}

impl Silence {
    fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            judged: 0,
            since: Instant::now(),
        }
    }

    fn is_over(&mut self, run: &Run) -> bool {
        if run.due == 0 || run.judged != self.judged {
            self.judged = run.judged;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_whatever_the_room() {
        let mut pace = Pace::new(10.0);
        let at = |seconds| {
            Instant::now()
                .checked_sub(Duration::from_secs_f64(seconds))
                .expect("a moment")
        };
        assert_eq!(pace.allowed(100), 1, "the first goes at once");
        pace.marked = 1;
        pace.began = at(0.95);
        assert_eq!(pace.allowed(100), 9);
        assert_eq!(pace.allowed(4), 4);
        pace.marked += 4;
        assert_eq!(pace.allowed(100), 0, "what there was no room for is not made up for");
        let slow = Pace::new(0.5);
        assert_eq!(slow.due(Duration::from_secs(1)), 1);
        assert_eq!(slow.due(Duration::from_secs(2)), 2);
    }
}
