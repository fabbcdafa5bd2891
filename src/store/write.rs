//! Statements that are written together: each with its rows and the fail point behind it, in one ordered list.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::Poll,
    time::Instant,
};

use futures_util::future::{MaybeDone, maybe_done};
use tokio_postgres::{Statement, types::ToSql};

use super::{Fate, Session, StoreError};
use crate::{
    fail::{self, Point},
    telemetry::{Signal, Stage},
};

/// What a statement is given.
pub(super) type Params<'a> = Vec<Box<dyn ToSql + Sync + Send + 'a>>;

/// Values as [`Params`].
macro_rules! params {
    ($($value:expr),* $(,)?) => {{
        let params: $crate::store::write::Params<'_> = vec![$(Box::new($value)),*];
        params
    }};
}
pub(super) use params;

/// A number of rows, as the server counts them.
pub(super) fn count(rows: usize) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// How many rows a statement must touch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows {
    /// So many, or it is a mistake of ours.
    Exactly(usize),
    /// So many, and the server sees to it: as many as are given are inserted, or the statement itself fails. It is looked at
    /// nevertheless, when the answer comes.
    Certain(usize),
    /// So many, or somebody else was quicker: what that means, and in words.
    Or(usize, Fate, &'static str),
    /// However many there are.
    Any,
}

/// One statement of many.
pub(super) struct Write<'a> {
    sql: &'static str,
    rows: Rows,
    params: Params<'a>,
    /// There is nothing to write: it is left out, but for a rehearsal.
    is_empty: bool,
    /// Passed once it is done.
    points: Vec<Point>,
}

impl<'a> Write<'a> {
    /// A statement that is always sent.
    pub(super) fn new(sql: &'static str, rows: Rows, params: Params<'a>) -> Self {
        Self {
            sql,
            rows,
            params,
            is_empty: false,
            points: Vec::new(),
        }
    }

    /// The same where there may be nothing to write.
    pub(super) fn unless(is_empty: bool, sql: &'static str, rows: Rows, params: Params<'a>) -> Self {
        Self {
            is_empty,
            ..Self::new(sql, rows, params)
        }
    }

    /// What a test may break once it is done.
    pub(super) fn then(mut self, point: Point) -> Self {
        self.points.push(point);
        self
    }

    /// The same of a statement that does several things, where it does this one.
    pub(super) fn then_if(self, does: bool, point: Point) -> Self {
        if does { self.then(point) } else { self }
    }

    /// Whether COMMIT may be sent before the answer is there: an answer that forbids it is an error of the server's, and after
    /// an error it commits nothing.
    fn may_travel_with_commit(&self) -> bool {
        let by_itself = match self.rows {
            Rows::Certain(_) | Rows::Any => true,
            Rows::Exactly(_) | Rows::Or(..) => self.is_empty,
        };
        // What a test breaks stands between the statements.
        by_itself && !self.points.iter().any(|point| fail::is_armed(*point))
    }

    /// Sends it, and holds its rows against what they must be.
    pub(super) async fn send(&self, session: &Session) -> Result<(), StoreError> {
        let statement = session.prepare(self.sql).await?;
        self.send_prepared(session, Some(&statement)).await
    }

    /// The same, sent when it is looked at first; nothing where there is nothing to write.
    async fn send_prepared(&self, session: &Session, statement: Option<&Statement>) -> Result<(), StoreError> {
        let Some(statement) = statement.filter(|_| !session.skips(self.is_empty)) else {
            return Ok(());
        };
        let params: Vec<&(dyn ToSql + Sync)> = self.params.iter().map(|param| &**param as _).collect();
        let touched = session.execute_prepared(statement, &params).await?;
        match self.rows {
            Rows::Exactly(rows) | Rows::Certain(rows) if touched != rows as u64 => {
                let function = self.sql.split("*/").next().unwrap_or_default();
                let function = function.trim_start_matches("/*").trim();
                let sentence = format!("{function} touched {touched} rows instead of {rows}");
                return Err(session.must_not_commit(Fate::Ours, &sentence));
            }
            Rows::Or(rows, fate, sentence) if touched != rows as u64 => {
                return Err(session.must_not_commit(fate, sentence));
            }
            Rows::Exactly(_) | Rows::Certain(_) | Rows::Or(..) | Rows::Any => {}
        }
        if !self.is_empty {
            for point in &self.points {
                session.pass(*point).await?;
            }
        }
        Ok(())
    }
}

/// Each that has something to write, which of most batches are few, is prepared once per connection; then they leave in the order
/// in which they are looked at, on a fresh connection too.
async fn prepare_all(session: &Session, writes: &[Write<'_>]) -> Result<Vec<Option<Statement>>, StoreError> {
    let mut statements = Vec::with_capacity(writes.len());
    for write in writes {
        statements.push(if session.skips(write.is_empty) {
            None
        } else {
            Some(session.prepare(write.sql).await?)
        });
    }
    Ok(statements)
}

/// Sends everything together, in the order of the list, and answers the first that failed: in that order, so that it is the
/// cause and not what followed from it.
pub(super) async fn write_all(session: &Session, writes: Vec<Write<'_>>) -> Result<(), StoreError> {
    let statements = prepare_all(session, &writes).await?;
    let running = writes
        .iter()
        .zip(&statements)
        .map(|(write, statement)| Box::pin(maybe_done(write.send_prepared(session, statement.as_ref()))))
        .collect();
    in_order(running).await.into_iter().collect()
}

/// Sends everything and COMMIT together, where nothing has to be looked at in between; else one after the other.
///
/// # Errors
/// With `at_commit` set, whether it committed is unknown.
pub(super) async fn write_and_commit(session: Session, writes: Vec<Write<'_>>) -> Result<(), StoreError> {
    let began = Instant::now();
    let together = writes.iter().all(Write::may_travel_with_commit) && !fail::is_armed(Point::BeforeCommit);
    if !together {
        if let Err(error) = write_all(&session, writes).await {
            session.rollback().await;
            return Err(error);
        }
        let written = Instant::now();
        Signal::stage(Stage::Write, began).emit();
        session.pass(Point::BeforeCommit).await?;
        session.commit_and_hear().await?;
        Signal::stage(Stage::Commit, written).emit();
        return Ok(());
    }
    session.not_poisoned()?;
    let statements = prepare_all(&session, &writes).await?;
    let session = &session;
    // When the last write was answered: COMMIT is on its way since before, and is waited for from then on.
    let written = Mutex::new(began);
    let note_written = || *written.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    // The last one is COMMIT.
    let steps = writes.iter().zip(&statements).map(Some).chain([None]);
    let running = steps
        .map(|step| {
            let note_written = &note_written;
            Box::pin(maybe_done(async move {
                match step {
                    Some((write, statement)) => {
                        let sent = write.send_prepared(session, statement.as_ref()).await;
                        note_written();
                        sent
                    }
                    None => session.commit_unless_failed().await,
                }
            }))
        })
        .collect();
    let answers = match fail::underway(Point::CommitSent, in_order(running)).await {
        Ok(answers) => answers,
        Err(injected) => return Err(unknown(session.broken(injected))),
    };
    let writes = writes.len();
    let failed = answers
        .into_iter()
        .enumerate()
        .find_map(|(place, answer)| Some((place, answer.err()?)));
    let Some((place, error)) = failed else {
        session.is_over();
        let written = *written.lock().unwrap_or_else(PoisonError::into_inner);
        let (stage, ended) = (Stage::Write, written);
        Signal::Stage { stage, began, ended }.emit();
        Signal::stage(Stage::Commit, written).emit();
        session.pass(Point::AfterCommit).await.map_err(unknown)?;
        return session.nobody_cut_its_wait();
    };
    // What the server answered to a write was before COMMIT, which after it commits nothing. Without an answer of its, or
    // where COMMIT itself went wrong, nobody knows.
    if place < writes && error.sqlstate.is_some() {
        session.undo().await;
        return Err(error);
    }
    Err(unknown(error))
}

fn unknown(error: StoreError) -> StoreError {
    StoreError {
        at_commit: true,
        ..error
    }
}

/// Runs all of them together, each time beginning with the first.
async fn in_order<F: Future>(mut running: Vec<Pin<Box<MaybeDone<F>>>>) -> Vec<F::Output> {
    poll_fn(|context| {
        let mut all = true;
        for one in &mut running {
            all &= one.as_mut().poll(context).is_ready();
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running
        .iter_mut()
        .filter_map(|one| one.as_mut().take_output())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn they_begin_in_their_order_and_every_answer_counts() {
        let begun = Mutex::new(Vec::new());
        let one = |number: usize| {
            let begun = &begun;
            async move {
                begun.lock().expect("nobody panics").push(number);
                // Each waits as often as it is far in front.
                for _ in number..40 {
                    tokio::task::yield_now().await;
                }
                number
            }
        };
        let running = (0..40).map(|number| Box::pin(maybe_done(one(number)))).collect();
        assert_eq!(in_order(running).await, (0..40).collect::<Vec<_>>());
        assert_eq!(*begun.lock().expect("nobody panics"), (0..40).collect::<Vec<_>>());
    }
}
