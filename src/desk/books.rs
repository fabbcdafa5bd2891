//! The books: balances, their proof, and what the batches counted against what they wrote.

use std::time::Duration;

use serde::Serialize;

use super::{
    AccountRecord, AccountsPage, BalanceRecord, Books, Desk, Moment, Page, Reconciliation, Refusal, SignaturesChecked,
    SumRecord,
};
use crate::{
    broker::{BrokerSettings, Connection, topology},
    domain::calendar::CalendarTime,
    store::reconcile::{self, Waiting},
};

/// The proof of the books.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    pub ok: bool,
    #[serde(flatten)]
    pub books: Books,
    /// Where signatures were verified too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signatures: Option<SignaturesChecked>,
}

impl Checked {
    /// The same with what the signatures were found to be. What was not looked at is not right.
    #[must_use]
    pub fn with(mut self, mut signatures: SignaturesChecked) -> Self {
        self.ok = self.ok && signatures.forged == 0 && signatures.next.is_none();
        self.books.problems.append(&mut signatures.problems);
        self.signatures = Some(signatures);
        self
    }
}

/// What was compared.
#[derive(Clone, Debug, Serialize)]
pub struct Reconciled {
    pub ok: bool,
    #[serde(flatten)]
    pub found: Reconciliation,
}

/// A window of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReconcileQuestion {
    since: Moment,
    until: Option<Moment>,
}

impl ReconcileQuestion {
    /// From the first moment that counts until the first that does not any more; until now if that is left out.
    ///
    /// # Errors
    /// It ends before it begins.
    pub fn new(since: Moment, until: Option<Moment>) -> Result<Self, Refusal> {
        if let (Moment::At(since), Some(Moment::At(until))) = (since, until) {
            in_order(since, until)?;
        }
        Ok(Self { since, until })
    }
}

/// How often dead letters that may be on their way are looked for, and how long in between.
const LOOKS: u32 = 11;
const LOOK: Duration = Duration::from_millis(500);
/// A quorum queue's limit.
const PREFETCH_MAX: u64 = 2_000;

impl Desk {
    /// Every account's balance.
    ///
    /// # Errors
    /// The database is away.
    pub async fn balances(&self) -> Result<Vec<BalanceRecord>, Refusal> {
        Ok(self.store.balances().await?)
    }

    /// The sums of all accounts, by currency.
    ///
    /// # Errors
    /// The database is away.
    pub async fn sums(&self) -> Result<Vec<SumRecord>, Refusal> {
        Ok(self.store.sums().await?)
    }

    /// A page of accounts by owner and currency; `console.page` says how many.
    ///
    /// # Errors
    /// The database is away.
    pub async fn accounts(&self, page: &AccountsPage<'_>) -> Result<Page<AccountRecord>, Refusal> {
        let limit = i64::from(self.settings.console.page);
        Ok(Page::of(self.store.accounts(page, limit + 1).await?, limit))
    }

    /// Proves the books. `told` is told how many questions of how many are answered.
    ///
    /// # Errors
    /// The database is away. What is wrong with the books is no error.
    pub async fn check_books(&self, told: impl FnMut(usize, usize)) -> Result<Checked, Refusal> {
        let books = self.store.check_books(told).await?;
        Ok(Checked {
            ok: books.problems.is_empty(),
            books,
            signatures: None,
        })
    }

    /// Compares what the batches of a window counted with what they wrote.
    ///
    /// # Errors
    /// The window ends before it begins; the database is away.
    pub async fn reconcile(&self, question: ReconcileQuestion) -> Result<Reconciled, Refusal> {
        let mut looks = 1;
        let found = loop {
            // Before the database: what is taken in between is then in both numbers, and not in none.
            let waiting = self.waiting().await;
            let found = self.store.reconcile(question.since, question.until, waiting).await?;
            in_order(found.since, found.until)?;
            // What is on its way, published or handed out a moment ago, arrives.
            let only_letters = found
                .lines
                .iter()
                .all(|line| line.ok || line.left.what == reconcile::PUBLISHED);
            if looks == LOOKS || !only_letters || found.lines.iter().all(|line| line.ok) {
                break found;
            }
            looks += 1;
            tokio::time::sleep(LOOK).await;
        };
        Ok(Reconciled {
            ok: found.lines.iter().all(|line| line.ok),
            found,
        })
    }

    /// Dead letters that wait in their queue. While it is not empty its consumers may hold as many as they may have.
    async fn waiting(&self) -> Waiting {
        let asked = async {
            let broker = BrokerSettings::from_settings(&self.settings).ok()?;
            let connection = Connection::open(&broker, "settled reconcile").await.ok()?;
            let queue = topology::backlog(&connection, topology::DEAD).await.ok();
            drop(connection.close().await);
            queue
        };
        match asked.await {
            Some((0, _)) => Waiting::AtMost(0),
            Some((ready, consumers)) => {
                Waiting::AtMost(u64::from(ready).saturating_add(u64::from(consumers).saturating_mul(PREFETCH_MAX)))
            }
            None => Waiting::Unknown,
        }
    }
}

fn in_order(since: CalendarTime, until: CalendarTime) -> Result<(), Refusal> {
    if since < until {
        return Ok(());
    }
    Err(super::reversed())
}
