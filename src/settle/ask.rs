//! What messages would come to, or came to already: the same steps without the write.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{Batch, Clerk, one_each};
use crate::{
    domain::{
        allocation::{Allocation, Status},
        changeset::Changeset,
        decide,
        delivery::Delivery,
        message::{Facts, MessageRef},
        snapshot::{Rules, Snapshot},
        verdict::{Judgement, Verdict, VerdictKind},
    },
    store::{Store, StoreError},
};

/// What a single message would come to now, with the movement it would make. Nothing is written.
///
/// # Errors
/// The database is away.
pub async fn explain(
    store: &Store,
    rules: &Rules,
    delivery: Delivery,
) -> Result<(Judgement, Changeset, Facts), StoreError> {
    let batch = Batch::read(vec![delivery]).await;
    let messages = batch.refs();
    let snapshot = match batch.messages().first().map(|message| &message.facts.content) {
        Some(Ok(_)) => {
            store.count_parked_bytes().await?;
            store.snapshot(&messages).await?
        }
        // Steps 1 to 3 ask nothing of the registry, so they can be explained without a database.
        Some(Err(_)) | None => Snapshot::default(),
    };
    let (judgements, changes) = decide::decide(snapshot, &messages, rules);
    let judgement = judgements.into_iter().next();
    let facts = batch.into_messages().into_iter().next().map(|message| message.facts);
    judgement
        .zip(facts)
        .map(|(judgement, facts)| (judgement, changes, facts))
        .ok_or_else(|| {
            StoreError::ours(
                "explain",
                "a batch of one came to no verdict; that is a mistake in this program",
            )
        })
}

/// Of each message, read with its signer, the allocation that has what the message asks for: what would be a duplicate if it
/// were judged now. Each is judged alone, and nothing is written.
///
/// # Errors
/// The database is away.
pub async fn effects(clerk: &Clerk, messages: &[MessageRef<'_>]) -> Result<Vec<Option<Arc<Allocation>>>, StoreError> {
    if messages.is_empty() {
        return Ok(Vec::new());
    }
    let snapshot = clerk.store.snapshot(messages).await?;
    let effect = |message: &MessageRef<'_>| {
        let Ok(content) = &message.facts.content else {
            return Ok(None);
        };
        // Where nothing has settled nothing needs to be judged.
        let is_settled = |allocation: &Arc<Allocation>| allocation.status != Status::Reserved;
        let is_asked_for = snapshot.allocations.get(&content.update.id).is_some_and(is_settled);
        let has_receipt = content.receipt_keys().any(|key| {
            let receipt = snapshot.receipts.get(&key);
            receipt.is_some_and(|receipt| receipt.verdict == VerdictKind::Settled)
        });
        if !is_asked_for && !has_receipt {
            return Ok(None);
        }
        let (judgements, _) = decide::decide(snapshot.clone(), &[*message], &clerk.rules);
        one_each(1, judgements.len())?;
        Ok(judgements.into_iter().find_map(|judgement| match judgement.verdict {
            Verdict::Duplicate { allocation } => Some(allocation),
            Verdict::Settled { .. } | Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
        }))
    };
    catch_unwind(AssertUnwindSafe(|| messages.iter().map(effect).collect()))
        .unwrap_or_else(|_| Err(StoreError::blame_the_batch("looking for an effect panicked")))
}
