//! Rows, read quickly, and what is said of one that this version can not read.

use tokio_postgres::{Row, types::FromSql};

use super::{Fate, Session, StoreError};

/// A row's columns one after another, in the order of its SELECT. To find each by its name takes a microsecond a row.
pub(super) struct InOrder<'a> {
    row: &'a Row,
    next: usize,
}

impl<'a> InOrder<'a> {
    pub(super) fn of(row: &'a Row) -> Self {
        Self { row, next: 0 }
    }

    pub(super) fn take<T: FromSql<'a>>(&mut self) -> T {
        let value = self.row.get(self.next);
        self.next += 1;
        value
    }
}

pub(super) fn corrupt(session: &Session, what: &str) -> StoreError {
    StoreError::new(
        session.name,
        Fate::Ours,
        format!("the database holds {what} that this version can not read"),
    )
}
