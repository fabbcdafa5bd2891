//! The outbox as an operator sees it: what waits to be told, what the broker refused, and having that published again.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::{Author, Command, Desk, Page, Pending, Refusal};
use crate::store::refused::{Became, Put};

/// Publications that one act puts back.
const PUT_BACK_MAX: usize = 1_000;
/// How often we look what became of them.
const LOOK: Duration = Duration::from_millis(100);

/// Which refused publications.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    Ids(Vec<i64>),
    All,
}

/// Publishing again what the broker refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    pub which: Refused,
    pub author: Author,
}

impl Retry {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["outbox", "retry"]);
        match &self.which {
            Refused::Ids(ids) => {
                for id in ids {
                    command.word(id);
                }
            }
            Refused::All => command.switch("--all", true),
        }
        self.author.add_to(&mut command);
        command
    }
}

/// What became of one.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RetriedOne {
    pub id: i64,
    /// None: it stayed where it was.
    #[serde(flatten)]
    pub publication: Option<RefusedPublication>,
    /// `published`, `refused` (again), `waiting` (for a worker) or `left` (as it was).
    pub became: &'static str,
    /// Of what was refused again: its number now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused_id: Option<i64>,
    pub why: Option<String>,
}

/// Which publication it is.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedPublication {
    pub batch_id: uuid::Uuid,
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
    pub message_id: Option<String>,
    pub bytes: u64,
}

/// What a retry came to.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Retried {
    pub published: usize,
    pub refused: usize,
    pub waiting: usize,
    pub left: usize,
    /// More are refused than one act takes.
    pub more: bool,
    pub audit_id: Option<i64>,
    pub operator: String,
    pub publications: Vec<RetriedOne>,
}

impl Retried {
    /// Whether every one was published.
    pub fn is_done(&self) -> bool {
        self.refused == 0 && self.waiting == 0 && self.left == 0
    }
}

impl Desk {
    /// What the broker refused, the oldest first; then what waits in the outbox.
    ///
    /// # Errors
    /// The database is away.
    pub async fn unpublished(&self, limit: i64) -> Result<Page<Pending>, Refusal> {
        let mut found = self.store.refused_publications(0, limit + 1).await?;
        let room = usize::try_from(limit + 1)
            .unwrap_or(usize::MAX)
            .saturating_sub(found.len());
        if room > 0 {
            found.extend(
                self.store
                    .waiting_publications(room, &self.settings.events.source)
                    .await?,
            );
        }
        Ok(Page::of(found, limit))
    }

    /// Puts refused publications back into the outbox, where a worker's relay takes them, with mandatory and confirm as ever;
    /// and waits `outbox.retry_deadline` for what becomes of them. `told` is told how many are decided, of how many.
    ///
    /// # Errors
    /// Nothing of that name was refused; the database is away.
    pub async fn retry(&self, wish: &Retry, mut told: impl FnMut(usize, usize)) -> Result<Retried, Refusal> {
        let (ids, filters) = match &wish.which {
            Refused::Ids(ids) => (Some(ids.as_slice()), json!({ "ids": ids })),
            Refused::All => (None, json!({ "all": true })),
        };
        let act = wish.author.act("outbox retry", &filters);
        let done = self
            .patiently(async || self.store.put_back(act, ids, PUT_BACK_MAX).await)
            .await?;
        if done.put.is_empty() {
            let refusal = match done.left.first() {
                None => Refusal::refused("nothing is set aside: there is nothing to publish again"),
                Some((id, why)) => Refusal::refused(format!("nothing was put back; of {id}: {why}")),
            };
            return Err(refusal.hint("`settled outbox list` shows what the broker refused"));
        }
        let became = self.await_verdicts(&done.put, &mut told).await?;
        let mut publications: Vec<RetriedOne> = done
            .put
            .into_iter()
            .zip(became)
            .map(|(put, became)| retried(put, became))
            .chain(done.left.into_iter().map(|(id, why)| RetriedOne {
                id,
                publication: None,
                became: "left",
                refused_id: None,
                why: Some(why),
            }))
            .collect();
        publications.sort_by_key(|one| one.id);
        let count = |word: &str| publications.iter().filter(|one| one.became == word).count();
        Ok(Retried {
            published: count("published"),
            refused: count("refused"),
            waiting: count("waiting"),
            left: count("left"),
            more: done.more,
            audit_id: done.audit_id,
            operator: wish.author.operator.clone(),
            publications,
        })
    }

    async fn await_verdicts(&self, put: &[Put], told: &mut impl FnMut(usize, usize)) -> Result<Vec<Became>, Refusal> {
        let began = Instant::now();
        loop {
            let became = self.patiently(async || self.store.became(put).await).await?;
            let waiting = became.iter().filter(|became| **became == Became::Waiting).count();
            told(put.len() - waiting, put.len());
            if waiting == 0 || began.elapsed() >= self.settings.outbox.retry_deadline {
                return Ok(became);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn retried(put: Put, became: Became) -> RetriedOne {
    let pending = put.pending;
    let (word, refused_id, why) = match became {
        Became::Published => ("published", None, None),
        Became::Refused(id, why) => ("refused", Some(id), Some(why)),
        Became::Waiting => ("waiting", None, None),
    };
    RetriedOne {
        id: pending.id.unwrap_or_default(),
        publication: Some(RefusedPublication {
            batch_id: pending.batch_id,
            exchange: pending.exchange,
            routing_key: pending.routing_key,
            message_id: pending.message_id,
            bytes: pending.bytes,
        }),
        became: word,
        refused_id,
        why,
    }
}
