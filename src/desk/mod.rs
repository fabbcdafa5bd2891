//! The operator's desk: what a person may ask and do, as typed questions and typed answers. A command line parses a question
//! and prints its answer; a console or an API can ask the same. Nothing here reads arguments or prints.
//!
//! What is asked for is a value that knows its own command line ([`Command`]), so that whoever did it elsewhere can copy it.
//! Every act writes its audit row in the transaction that does it. What is refused is a [`Refusal`]: what happened, to what,
//! and what to do next. What takes long tells how far it is through a callback.

mod access;
mod across;
mod act;
mod approval;
mod ask;
mod books;
mod command;
mod currencies;
mod drive;
mod explain;
mod funds;
mod headers;
pub mod keys;
mod life;
mod limits;
mod moment;
mod moving;
mod nonce;
mod outbox;
mod owned;
mod plan;
mod recover;
mod refusal;
mod replay;
mod roles;
mod signatures;
mod standing;
mod timeline;
mod which;

use std::sync::Arc;

use jiff::Timestamp;

use self::approval::ActSize;
pub use self::{
    access::{ClientAdded, ClientRecord, Role, Token, TokenHolder, TokenMade, TokenRecord, TokenWish},
    across::SentNonce,
    act::{
        Author, Changed, Consent, ProposedPurge, Purge, Purgeable, Purged, Selected, Selection, StateChange, bounded,
    },
    approval::{Approve, Approved, PlanAct, PlanShown},
    ask::{
        AuditQuestion, Body, ByPartner, ByReason, Export, ExportedLine, Exports, FullLetter, Groups, LetterName, Stats,
        ToldEvent,
    },
    books::{Checked, ReconcileQuestion, Reconciled},
    command::Command,
    currencies::SymbolMapped,
    drive::RunNews,
    explain::{ExplainQuestion, Explained, Movement, explain},
    funds::{FundsTold, FundsWay, FundsWish},
    keys::{KeyRotated, KeyRotation},
    life::{EventState, EventTold, History, ReceiptFound, Transferred},
    moment::moment,
    moving::{MoveAct, PartnerMove, PartnerMoved},
    nonce::NonceVoided,
    outbox::{Refused, RefusedPublication, Retried, RetriedOne, Retry},
    owned::{ConnectionBalance, OwnedBy, OwnedFilter, PartnerBalance, PartnerBalances},
    plan::{LEFT_OUT, Plan, PlanLine, Planned, Sum},
    recover::{BooksStanding, Recovery},
    refusal::{Refusal, RefusalKind},
    replay::{Begun, Cancel, Replay, Resume, RunOutcome},
    roles::MadeLogin,
    signatures::{SignatureNews, SignaturePlace, SignaturesChecked},
    standing::{PartnerAct, PartnerStanding, Plannable, QueueStanding, QueueWatch, Standing},
    timeline::{LifeMoment, Timeline},
    which::Which,
};
// Answers that are rows as the store keeps them.
pub use crate::store::{
    approvals::{ApprovalLimits, ApprovalRecord},
    audit::AuditRecord,
    books::{AccountRecord, AccountsPage, BalanceRecord, Books, SumRecord},
    letters::{DeadLetter, Group, Replayed},
    life::ReceiptRecord,
    moves::MovedBalance,
    outbox::Backlog,
    plans::{PlanRecord, StateNow},
    reconcile::{Moment, ReconcileLine, Reconciliation},
    refused::{Pending, PublicationStanding},
    registry::{By, ConnectionRecord, KeyRecord, NewSymbol, PartnerRecord, Registered, SymbolRecord},
    roles::{DatabaseRole, MissingRight, RoleFound, RoleStanding, grant_line, quoted, statements},
    runs::{Came, Moved, Run},
    standing::{MinuteOfBatches, PartnerSeen, TrendOfGroup},
    voices::Voice,
};
use crate::{
    config::Settings,
    domain::calendar::CalendarTime,
    retry::patiently,
    store::{self, Store, StoreError},
};

/// Where questions are asked. Cheap to clone.
#[derive(Clone)]
pub struct Desk {
    store: Store,
    settings: Settings,
    /// Who vouches for the name of whoever acts here; none: they typed it.
    voucher: Option<Arc<str>>,
    /// Partners that whoever asks here is limited to; none: they are not.
    limits: Option<Arc<[String]>>,
}

/// A part of a longer list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// There are more after the last of these.
    pub more: bool,
}

impl<T> Page<T> {
    /// Cuts what was found down to so many. One more than is shown was asked for: whether it came says whether there are more.
    fn of(mut found: Vec<T>, shown: i64) -> Self {
        let more = cut(&mut found, usize::try_from(shown).unwrap_or(usize::MAX));
        Self { items: found, more }
    }
}

fn cut<T>(found: &mut Vec<T>, shown: usize) -> bool {
    let more = found.len() > shown;
    found.truncate(shown);
    more
}

fn is_ours(version: Option<i32>) -> Result<(), Refusal> {
    store::check_schema(version).map_err(|sentence| Refusal::refused(sentence).hint("run `settled migrate`"))
}

impl Desk {
    /// The desk of a database; it is not connected yet.
    ///
    /// # Errors
    /// A setting of the database is missing or wrong.
    pub fn open(settings: &Settings) -> Result<Self, Refusal> {
        settings.database_url()?;
        let store = Store::new(settings).map_err(|sentence| {
            Refusal::usage(sentence).hint("check database.url, database.ca_file and database.client_certificate_file")
        })?;
        Ok(Self::of(store, settings))
    }

    /// A desk on a store that is open already.
    pub fn of(store: Store, settings: &Settings) -> Self {
        Self {
            store,
            settings: settings.clone(),
            voucher: None,
            limits: None,
        }
    }

    /// Whether the database answers, and its schema is the one that this program is written for.
    ///
    /// # Errors
    /// The database is away, or its schema is older or newer.
    pub async fn check_schema(&self) -> Result<(), Refusal> {
        is_ours(self.store.schema_version().await?)
    }

    /// The same for a program that runs: migrations only add, so that one of before goes on with a newer schema until it is
    /// started anew.
    ///
    /// # Errors
    /// The database is away, or its schema is older.
    pub async fn check_schema_is_not_older(&self) -> Result<(), Refusal> {
        let found = self.store.schema_version().await?;
        is_ours(found.map(|version| version.min(store::schema_version())))
    }

    /// Does what may be done twice, again while the database says that somebody else was in the way; not for ever.
    async fn patiently<T>(&self, work: impl AsyncFnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        patiently(&self.settings.retry, StoreError::is_in_the_way, work).await
    }

    /// When a moment is, by the database's clock.
    async fn when(&self, moment: Moment) -> Result<CalendarTime, Refusal> {
        Ok(match moment {
            Moment::At(time) => time,
            Moment::Ago(ago) => {
                let then = self.store.clock().await?.saturating_sub(ago);
                then.unwrap_or(Timestamp::MIN).into()
            }
        })
    }

    /// The same of one that may be left out.
    async fn maybe_when(&self, moment: Option<Moment>) -> Result<Option<CalendarTime>, Refusal> {
        match moment {
            Some(moment) => self.when(moment).await.map(Some),
            None => Ok(None),
        }
    }

    /// From when until when, each of which may be left out.
    async fn window(
        &self,
        since: Option<Moment>,
        until: Option<Moment>,
    ) -> Result<(Option<CalendarTime>, Option<CalendarTime>), Refusal> {
        let (since, until) = (self.maybe_when(since).await?, self.maybe_when(until).await?);
        if since.zip(until).is_some_and(|(since, until)| since > until) {
            return Err(reversed());
        }
        Ok((since, until))
    }
}

/// Why no window of time is looked at.
fn reversed() -> Refusal {
    Refusal::usage("the window ends before it begins").hint("--since is the earlier one")
}
