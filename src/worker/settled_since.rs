//! Open dead letters whose message has settled since: sent again by its partner, or come by another way. They are closed,
//! with a note how, and wait for nobody. The lanes pay nothing for it: a page of open rows is looked through at a time, and
//! what names a settled allocation is judged as a plan would judge it.

use super::Worker;
use crate::{
    retry::{self, Waited},
    settle::{self, Batch, Clerk},
    store::StoreError,
    telemetry::{Dependency, Signal},
};

/// Open rows that are looked through at a time.
const PAGE: i64 = 10_000;
/// Suspects that are judged at a time: their bodies are read.
const JUDGED: i64 = 128;

/// Looks through all open rows, again and again, until the program stops.
pub async fn run(mut worker: Worker) {
    let interval = worker.settings.dead_letters.recheck_interval;
    let mut after = 0;
    loop {
        match look_through(&worker.clerk, after).await {
            Ok(next) => {
                // More of the same page: at once, but for a breath.
                after = next.unwrap_or(0);
            }
            Err(error) => {
                let error = error.to_string();
                Signal::Retrying {
                    dependency: Dependency::Database,
                    attempt: 1,
                    wait: interval,
                    error: &error,
                }
                .emit();
            }
        }
        if retry::sleep(interval, &mut worker.stop).await == Waited::Stopping {
            return;
        }
    }
}

/// Looks through a page after a place, closes what has settled since, and answers where to go on; none: it was the last.
///
/// # Errors
/// The database is away.
pub async fn look_through(clerk: &Clerk, after: i64) -> Result<Option<i64>, StoreError> {
    let suspects = clerk.store.suspects(after, PAGE, JUDGED).await?;
    if suspects.ids.is_empty() {
        return Ok(suspects.next);
    }
    let stored = clerk.store.dead_letter_deliveries(&suspects.ids).await?;
    // What this version can not read waits for one that can.
    let (ids, deliveries): (Vec<_>, Vec<_>) = stored
        .into_iter()
        .filter_map(|(id, delivery)| Some((id, delivery?)))
        .unzip();
    let batch = Batch::read(deliveries).await;
    let effects = settle::effects(clerk, &batch.refs()).await?;
    let settled: Vec<_> = ids
        .iter()
        .zip(&effects)
        .filter_map(|(id, effect)| Some((*id, effect.as_ref()?)))
        .map(|(id, allocation)| {
            let note = match &allocation.settled_nonce {
                Some(by) => format!("settled since: what it asks for was settled by the message with the nonce {by}"),
                None => "settled since: what it asks for has been settled".to_owned(),
            };
            (id, note)
        })
        .collect();
    let others: Vec<_> = suspects
        .ids
        .iter()
        .filter(|id| !settled.iter().any(|(settled, _)| settled == *id))
        .copied()
        .collect();
    let closed = clerk.store.close_settled(&settled, &others).await?;
    if closed > 0 {
        Signal::DeadLettersSettledSince { closed }.emit();
    }
    Ok(suspects.next)
}
