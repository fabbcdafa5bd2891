//! Does with messages in hand what has to be done, however long that takes: one attempt after another, and what comes after
//! one that failed is [`next_step`]'s to say. Lanes, due messages, the side room and the collector are all driven from here;
//! in what they differ is in their [`Terms`] and in how they do what a [`Holder`] does.

use std::time::Instant;

use uuid::Uuid;

use super::{
    Worker,
    patience::{HandBack, Patience},
};
use crate::{
    domain::delivery::BatchId,
    settle::{
        Answered,
        next_step::{Failed, Step, Terms, next_step},
    },
    store::StoreError,
    telemetry::Signal,
};

/// A part that is being worked on: what one attempt must know of those before it.
pub(super) struct Trying {
    /// Made before the first attempt: only by it an attempt whose commit is unknown is found again.
    pub id: BatchId,
    /// What such an attempt came to, if it committed.
    pub earlier: Option<Answered>,
    pub began: Instant,
    /// Attempts that failed for what passes by itself.
    attempts: u32,
    /// Why the one message that is left is rejected.
    refused: Option<StoreError>,
}

impl Trying {
    fn new() -> Self {
        Self {
            id: Uuid::now_v7(),
            earlier: None,
            began: Instant::now(),
            attempts: 0,
            refused: None,
        }
    }

    /// It may be committed. What is tried next is another batch.
    pub(super) fn begin_another(&mut self) {
        self.id = Uuid::now_v7();
    }
}

/// Whoever holds messages and has something to do with them.
pub(super) trait Holder: Send + Sync {
    /// Messages that are worked on together.
    type Part: Clone + Send + Sync;

    /// What it may do with them when an attempt fails.
    fn terms(&self) -> Terms;

    fn worker(&self) -> &Worker;

    /// In logs.
    fn number(&self) -> usize;

    fn patience(&mut self) -> &mut Patience<Self::Part>;

    fn count(part: &Self::Part) -> usize;

    /// One attempt to do all of it in one transaction. What it answers is left to do: parts in which nothing is done yet.
    fn attempt(
        &mut self,
        trying: &mut Trying,
        part: &Self::Part,
    ) -> impl Future<Output = Result<Vec<Self::Part>, StoreError>> + Send;

    /// Cuts what the database refuses in two or more, and answers those that it still holds, the last first.
    fn cut(&mut self, part: Self::Part) -> impl Future<Output = Vec<Self::Part>> + Send;

    /// One message is rejected from now on, since the database refuses it alone.
    fn blame(&self, trying: &Trying, part: &Self::Part, error: &StoreError);

    /// Rejects the one message that the database refuses alone.
    fn reject(
        &mut self,
        trying: &mut Trying,
        part: &Self::Part,
        why: &StoreError,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Whether what it needs is locked by somebody's open transaction. Then that is remembered, and set apart at the next
    /// attempt.
    fn finds_locks(&self, part: &Self::Part) -> impl Future<Output = bool> + Send;

    /// Whether an attempt was committed is unknown.
    fn commit_unknown(&mut self, trying: &mut Trying, part: &mut Self::Part);

    /// There is no room for what would be stored.
    fn wait_for_room(
        &mut self,
        error: &StoreError,
        part: &Self::Part,
    ) -> impl Future<Output = Result<(), HandBack<Self::Part>>> + Send;
}

/// Does everything there is to do with a part, or hands back what could not be done.
pub(super) async fn drive<H: Holder>(holder: &mut H, part: H::Part) -> Result<(), HandBack<H::Part>> {
    let mut parts = vec![part];
    while let Some(part) = parts.pop() {
        if H::count(&part) > 0 {
            parts.extend(drive_one(holder, part).await?);
        }
    }
    Ok(())
}

/// One attempt after another, until it is done or cut into parts.
async fn drive_one<H: Holder>(holder: &mut H, mut part: H::Part) -> Result<Vec<H::Part>, HandBack<H::Part>> {
    let terms = holder.terms();
    let attempts_max = holder.worker().settings.retry.transient_attempts;
    let culprits_max = holder.worker().settings.worker.culprits_per_minute;
    let mut trying = Trying::new();
    loop {
        let refused = trying.refused.take();
        let attempted = match &refused {
            Some(why) => holder.reject(&mut trying, &part, why).await.map(|()| Vec::new()),
            None => holder.attempt(&mut trying, &part).await,
        };
        trying.refused = refused;
        let error = match attempted {
            Ok(left) => return Ok(left),
            Err(error) => error,
        };
        if error.at_commit {
            holder.commit_unknown(&mut trying, &mut part);
        }
        let failed = Failed {
            fate: error.fate,
            is_lock_wait: error.is_lock_wait(),
            attempts: trying.attempts,
            attempts_max,
            can_halve: H::count(&part) > 1,
            was_rejecting: trying.refused.is_some(),
            is_stopping: *holder.worker().stop.borrow(),
        };
        let culprits = &holder.worker().culprits;
        let step = culprits.decide(culprits_max, |may_blame| next_step(terms, failed, may_blame));
        match step {
            Step::Again => {
                trying.attempts += 1;
                let (id, number, attempts) = (trying.id, holder.number(), trying.attempts);
                holder.patience().short(id, number, attempts, &error).await;
            }
            Step::FindLocks => {
                trying.attempts += 1;
                // Somebody may hold a lock for long. Who needs it is found out once, and waits without us.
                if !holder.finds_locks(&part).await {
                    let (id, number, attempts) = (trying.id, holder.number(), trying.attempts);
                    holder.patience().short(id, number, attempts, &error).await;
                }
            }
            Step::Halve => return Ok(holder.cut(part).await),
            Step::Reject => {
                holder.blame(&trying, &part, &error);
                trying.refused = Some(error);
            }
            Step::Wait(cause) => holder.patience().wait(cause, &error, &part).await?,
            Step::WaitForRoom => holder.wait_for_room(&error, &part).await?,
            Step::LetGo(cause) => {
                let why = format!("{cause}: {error}");
                let lane = holder.number();
                Signal::HandedBack { lane, why: &why }.emit();
                return Ok(Vec::new());
            }
            Step::Overtaken => return Ok(Vec::new()),
        }
    }
}
