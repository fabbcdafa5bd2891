//! Statements that are written together: each with its rows and the fail point behind it, in one ordered list.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
};

use futures_util::future::{MaybeDone, maybe_done};
use tokio_postgres::types::ToSql;

use super::{Fate, Session, StoreError};
use crate::fail::Point;

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

/// How many rows a statement must touch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows {
    /// So many, or it is a mistake of ours.
    Exactly(usize),
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
    point: Option<Point>,
}

impl<'a> Write<'a> {
    /// A statement that is always sent.
    pub(super) fn new(sql: &'static str, rows: Rows, params: Params<'a>) -> Self {
        Self {
            sql,
            rows,
            params,
            is_empty: false,
            point: None,
        }
    }

    /// The same where there may be nothing to write.
    pub(super) fn unless(is_empty: bool, sql: &'static str, rows: Rows, params: Params<'a>) -> Self {
        Self {
            is_empty,
            ..Self::new(sql, rows, params)
        }
    }

    /// Left out where there is nothing.
    pub(super) fn or_none(self, is_empty: bool) -> Self {
        Self { is_empty, ..self }
    }

    /// What a test may break once it is done.
    pub(super) fn then(self, point: Point) -> Self {
        Self {
            point: Some(point),
            ..self
        }
    }

    /// Sends it, and holds its rows against what they must be.
    pub(super) async fn send(&self, session: &Session) -> Result<(), StoreError> {
        if session.skips(self.is_empty) {
            return Ok(());
        }
        let params: Vec<&(dyn ToSql + Sync)> = self.params.iter().map(|param| &**param as _).collect();
        match self.rows {
            Rows::Exactly(rows) => session.execute_exactly(rows, self.sql, &params).await?,
            Rows::Or(rows, fate, sentence) => {
                if session.execute(self.sql, &params).await? != rows as u64 {
                    return Err(session.must_not_commit(fate, sentence));
                }
            }
            Rows::Any => drop(session.execute(self.sql, &params).await?),
        }
        match self.point {
            Some(point) if !self.is_empty => session.pass(point).await,
            Some(_) | None => Ok(()),
        }
    }
}

/// Sends everything together, in the order of the list, and answers the first that failed: in that order, so that it is the
/// cause and not what followed from it.
pub(super) async fn write_all(session: &Session, writes: Vec<Write<'_>>) -> Result<(), StoreError> {
    // On a fresh connection too they leave in this order.
    for write in &writes {
        session.prepare(write.sql).await?;
    }
    let running = writes
        .iter()
        .map(|write| Box::pin(maybe_done(write.send(session))))
        .collect();
    in_order(running).await.into_iter().collect()
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
