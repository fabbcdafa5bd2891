//! Messages in hand that are settled, by a lane, as due ones or as packs of the side room: what one attempt does beside the
//! walk of [`settle`] itself, and what is remembered of it until it is acknowledged and published.

use super::{
    Worker,
    driver::{Holder, Trying, drive},
    patience::{HandBack, Patience},
    publish::Owned,
};
use crate::{
    domain::delivery::Source,
    settle::{self, Answered, Attempt, Batch, blocked::SideRoom, next_step::Terms},
    store::{StoreError, held::Pack},
    telemetry::{Door, PauseCause, Signal, Stage, Tally},
};

/// Settles messages that came through one door, and remembers what they came to.
pub(super) struct Settler<'a> {
    pub worker: &'a Worker,
    /// In logs.
    pub number: usize,
    pub door: Door,
    pub owned: &'a Owned,
    /// Whether it serves the queue of all: what it commits shows that messages are settled.
    pub is_common: bool,
    /// Whether the side room may take what is in the way of a batch.
    pub room: SideRoom,
    /// What is committed: it is told even if the rest has to be handed back.
    pub done: Vec<Answered>,
}

impl<'a> Settler<'a> {
    pub(super) fn new(worker: &'a Worker, number: usize, door: Door, owned: &'a Owned) -> Self {
        let done = Vec::new();
        Self {
            worker,
            number,
            door,
            owned,
            is_common: false,
            room: SideRoom::Free,
            done,
        }
    }

    /// One attempt. Where messages at some places need what is known to be locked, nothing is done and the places are
    /// answered.
    pub(super) async fn attempt(&mut self, trying: &mut Trying, batch: &Batch) -> Result<Vec<usize>, StoreError> {
        let Worker { clerk, locks, .. } = self.worker;
        let published = self.owned.deletable();
        match settle::attempt(
            clerk,
            locks,
            self.room,
            trying.id,
            batch,
            &published,
            &mut trying.earlier,
        )
        .await?
        {
            Attempt::Blocked(places) => Ok(places),
            Attempt::Answered(answered) => {
                self.keep(trying, batch, answered);
                Ok(Vec::new())
            }
        }
    }

    /// The one message is rejected as `internal`.
    pub(super) async fn reject(&mut self, trying: &mut Trying, batch: &Batch) -> Result<(), StoreError> {
        let answered = settle::reject_culprit(&self.worker.clerk, trying.id, batch, &mut trying.earlier).await?;
        self.keep(trying, batch, answered);
        Ok(())
    }

    pub(super) fn blame(&self, trying: &Trying, batch: &Batch, error: &StoreError) {
        for message in batch.messages() {
            let digest = hex::encode(message.facts.message_digest);
            Signal::CulpritIsolated {
                batch: trying.id,
                digest: &digest,
                sqlstate: error.sqlstate.as_deref(),
                error: &error.to_string(),
            }
            .emit();
        }
    }

    /// Whether somebody's open transaction has locked what a batch needs; then that is remembered.
    pub(super) async fn finds_locks(&self, batch: &Batch) -> bool {
        match settle::find_locked(&self.worker.clerk, batch).await {
            Ok(locks) if !locks.is_empty() => {
                Signal::LocksFound { locks: locks.len() }.emit();
                self.worker.locks.remember(locks);
                true
            }
            // Who can not be asked now is tried again like any other.
            Ok(_) | Err(_) => false,
        }
    }

    fn keep(&mut self, trying: &Trying, batch: &Batch, answered: Answered) {
        self.owned.deleted(&answered.deleted);
        self.worker.key_uses.add(batch, &answered);
        self.worker.witness.note(answered.id);
        if !answered.publications.is_empty() {
            self.owned.add(answered.id);
        }
        let mut tally = Tally::new();
        for (message, answer) in batch.messages().iter().zip(&answered.answers) {
            let (verdict, enterprise_id) = (&answer.judgement.verdict, message.facts.enterprise_id.as_deref());
            tally.add(&self.worker.labels, enterprise_id, verdict.kind(), verdict.reason());
        }
        Signal::BatchJudged {
            batch: answered.id,
            lane: self.number,
            from: self.door,
            tally: &tally,
        }
        .emit();
        Signal::stage(Stage::Settle, trying.began).emit();
        if self.is_common {
            self.worker.health.note_settled();
        }
        self.done.push(answered);
    }
}

/// A batch in hand that may wait: a lane's, or due messages.
pub(super) struct InHand<'a> {
    pub settler: Settler<'a>,
    terms: Terms,
    patience: Patience<Batch>,
    /// What needs what somebody's open transaction has locked. It is not waited for: it comes back, or is kept.
    pub blocked: Vec<Batch>,
    /// Where messages came from that are kept in the side room instead of being judged now.
    held: Vec<Source>,
}

impl<'a> InHand<'a> {
    pub(super) fn new(settler: Settler<'a>, terms: Terms) -> Self {
        let patience = Patience::new(settler.worker, &settler.worker.gate, format!("lane {}", settler.number));
        Self {
            settler,
            terms,
            patience,
            blocked: Vec::new(),
            held: Vec::new(),
        }
    }

    /// Keeps packs in the side room, and says whether that is known to have been done.
    pub(super) async fn hold(&mut self, packs: &[Pack]) -> bool {
        let is_held = self.settler.worker.hold(packs).await;
        if is_held {
            self.note_held(packs);
        }
        is_held
    }

    /// These are held.
    pub(super) fn note_held(&mut self, packs: &[Pack]) {
        let deliveries = packs.iter().flat_map(|pack| &pack.deliveries);
        self.held.extend(deliveries.map(|delivery| delivery.source));
    }

    /// Keeps messages of a queue in the side room that need what is locked, or that a partner in quarantine sent. Where that
    /// has no room, the former wait in line, and the latter are refused: nobody waits for a quarantine to end. What is
    /// another cell's waits.
    pub(super) async fn keep_blocked(&mut self) -> Result<(), HandBack> {
        for batch in std::mem::take(&mut self.blocked) {
            let worker = self.settler.worker;
            let (quarantined, locked) = worker.fairness.blocked_apart(&batch, &worker.locks);
            let storing = worker.fairness.storing().await;
            let is_held = match worker.fairness.packs_of_locked(&locked) {
                Some(packs) => self.hold(&packs).await,
                None => false,
            };
            drop(storing);
            if !is_held {
                self.settle_in_line(locked).await?;
            }
            let storing = worker.fairness.storing().await;
            let (no_room, packs) = worker.fairness.packs_of_quarantined(&quarantined);
            let is_held = self.hold(&packs).await;
            drop(storing);
            if !is_held {
                let deliveries = packs.into_iter().flat_map(|pack| pack.deliveries).collect();
                self.settle_in_line(Batch::read(deliveries).await).await?;
            }
            self.settle_without_room(no_room).await?;
        }
        Ok(())
    }

    /// Refuses what has no room; but what is of a partner that is on its way to another cell, or lives there, waits for room, as
    /// long as it takes, and pauses intake meanwhile.
    async fn settle_without_room(&mut self, batch: Batch) -> Result<(), HandBack> {
        if batch.is_empty() {
            return Ok(());
        }
        let worker = self.settler.worker;
        let mut waiting = vec![batch];
        while let Some(batch) = waiting.pop() {
            // Others may have made room since it was measured.
            worker.measure_room().await;
            let storing = worker.fairness.storing().await;
            let (no_room, packs) = worker.fairness.packs_of_quarantined(&batch);
            let rest = if self.hold(&packs).await { no_room } else { batch };
            drop(storing);
            if rest.is_empty() {
                continue;
            }
            self.settler.room = SideRoom::Full;
            let tried = drive(self, rest).await;
            self.settler.room = SideRoom::Free;
            tried?;
            for batch in std::mem::take(&mut self.blocked) {
                let full = StoreError::no_room_for_another_cell();
                self.patience.wait(PauseCause::Database, &full, &batch).await?;
                waiting.push(batch);
            }
        }
        self.patience.over();
        Ok(())
    }

    /// Waits for what is locked, as long as it takes, and pauses intake meanwhile: nothing is dropped.
    pub(super) async fn settle_in_line(&mut self, batch: Batch) -> Result<(), HandBack> {
        if batch.is_empty() {
            return Ok(());
        }
        drive(self, batch).await?;
        while let Some(batch) = self.blocked.pop() {
            let full = StoreError::room_is_full();
            self.patience.wait(PauseCause::Database, &full, &batch).await?;
            drive(self, batch).await?;
        }
        self.patience.over();
        Ok(())
    }

    /// Whether each message that was taken is judged or held, once. If not it is a mistake of ours, and nothing may be
    /// acknowledged: the pause is told, and then everything goes back.
    pub(super) async fn account_for(&mut self, taken: &Batch) -> Result<(), HandBack> {
        let done = self.settler.done.iter().flat_map(|answered| &answered.answers);
        let answered = done.map(|answer| answer.source).chain(self.held.iter().copied());
        let Err(error) = each_once(taken.sources(), answered) else {
            return Ok(());
        };
        loop {
            self.patience.wait(PauseCause::Schema, &error, taken).await?;
        }
    }
}

/// Whether the deliveries that are answered are those that were taken, each once.
pub(super) fn each_once(
    taken: impl Iterator<Item = Source>,
    answered: impl Iterator<Item = Source>,
) -> Result<(), StoreError> {
    let tags = |sources: &mut dyn Iterator<Item = Source>| {
        let mut tags: Vec<Option<u64>> = sources.map(Source::delivery_tag).collect();
        tags.sort_unstable();
        tags
    };
    let (taken, answered) = (tags(&mut { taken }), tags(&mut { answered }));
    if taken == answered && !taken.contains(&None) {
        return Ok(());
    }
    let sentence = format!(
        "of {} messages {} came to a verdict, and not each of them to one; that is a mistake in this program, and nothing of \
         it is acknowledged",
        taken.len(),
        answered.len()
    );
    Err(StoreError::ours("settle_batch", sentence))
}

impl Holder for InHand<'_> {
    type Part = Batch;

    fn terms(&self) -> Terms {
        self.terms
    }

    fn worker(&self) -> &Worker {
        self.settler.worker
    }

    fn number(&self) -> usize {
        self.settler.number
    }

    fn patience(&mut self) -> &mut Patience<Batch> {
        &mut self.patience
    }

    fn count(part: &Batch) -> usize {
        part.len()
    }

    async fn attempt(&mut self, trying: &mut Trying, part: &Batch) -> Result<Vec<Batch>, StoreError> {
        let blocked = self.settler.attempt(trying, part).await?;
        if blocked.is_empty() {
            self.patience.over();
            return Ok(Vec::new());
        }
        let is_blocked = |index: usize| blocked.binary_search(&index).is_ok();
        self.blocked.push(part.part(is_blocked));
        Ok(vec![part.part(|index| !is_blocked(index))])
    }

    async fn cut(&mut self, part: Batch) -> Vec<Batch> {
        part.halves().map_or_else(Vec::new, |[left, right]| vec![right, left])
    }

    fn blame(&self, trying: &Trying, part: &Batch, error: &StoreError) {
        self.settler.blame(trying, part, error);
    }

    async fn reject(&mut self, trying: &mut Trying, part: &Batch, _: &StoreError) -> Result<(), StoreError> {
        self.settler.reject(trying, part).await?;
        self.patience.over();
        Ok(())
    }

    async fn finds_locks(&self, part: &Batch) -> bool {
        self.settler.finds_locks(part).await
    }

    /// The same id is tried again: where it is there already, what it came to is known.
    fn commit_unknown(&mut self, _: &mut Trying, _: &mut Batch) {}

    /// Nothing of a batch needs that room.
    async fn wait_for_room(&mut self, error: &StoreError, part: &Batch) -> Result<(), HandBack> {
        self.patience.wait(PauseCause::Database, error, part).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Fate;

    #[test]
    fn nothing_is_acknowledged_that_did_not_come_to_one_verdict() {
        let tags = |tags: &[u64]| -> Vec<Source> {
            let source = |delivery_tag: &u64| Source::Queue {
                delivery_tag: *delivery_tag,
            };
            tags.iter().map(source).collect()
        };
        let check = |taken: &[Source], answered: &[Source]| each_once(taken.iter().copied(), answered.iter().copied());
        for (taken, answered) in [(vec![], vec![]), (vec![7], vec![7]), (vec![7, 8, 9], vec![9, 7, 8])] {
            assert!(check(&tags(&taken), &tags(&answered)).is_ok(), "{taken:?} {answered:?}");
        }
        for (taken, answered) in [
            (vec![7], vec![]),
            (vec![], vec![7]),
            (vec![7, 8], vec![7]),
            (vec![7, 8], vec![7, 7]),
            (vec![7, 8], vec![7, 8, 8]),
            (vec![7, 8], vec![7, 9]),
        ] {
            let error = check(&tags(&taken), &tags(&answered)).expect_err("a fault of ours");
            assert_eq!(error.fate, Fate::Ours, "{taken:?} {answered:?}");
        }
        // What has no tag can not be acknowledged: tag 0 would acknowledge everything there is.
        assert!(check(&[Source::Plain], &[Source::Plain]).is_err());
    }
}
