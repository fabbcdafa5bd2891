//! How dead letters join what is known of them, and what is told of it.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use uuid::Uuid;

use super::letters::{Effects, Letters};
use crate::{
    domain::{
        dead_letter::{self, Arrival, Cause, Filing, Known, MadeBy},
        delivery::{BatchId, Publication},
        event,
        told::{Firsts, Tellings},
        verdict::{Judgement, Verdict},
    },
    settle::{self, Answer, Answered, Clerk},
    store::{StoreError, dead_letter_space::SpaceBounds, filing::FilingOutcome},
};

/// Dead letters that are stored.
pub(super) struct StoredLetters {
    pub(super) answered: Answered,
    pub(super) filing: Filing,
    /// From the failure of the last one to its being stored.
    pub(super) lag: Duration,
}

/// Does, and undoes, everything that storing dead letters asks of the database.
///
/// # Errors
/// What it would meet.
pub async fn rehearse(clerk: &Clerk) -> Result<(), StoreError> {
    rehearse_with(clerk, &Letters::default()).await
}

pub(super) async fn rehearse_with(clerk: &Clerk, letters: &Letters) -> Result<(), StoreError> {
    let effects = letters.effects(clerk).await?;
    let arrivals = letters.arrivals(&effects);
    let ids: Vec<Uuid> = arrivals.iter().map(Arrival::id).collect();
    // Whether there is room is another question.
    let anything = SpaceBounds {
        max_rows: u64::MAX,
        max_bytes: u64::MAX,
    };
    let (open, known, now) = clerk.store.open_filing_rehearsal(&ids, anything).await?;
    let id = Uuid::now_v7();
    let firsts = open.remember(id, &tellings(&arrivals, now)).await?;
    let filed = file(clerk, id, &arrivals, &effects, &known, &firsts, now)?;
    open.rehearse(&filed.outcome(clerk, &arrivals)).await
}

/// What is told of those that nobody judged.
pub(super) fn tellings(arrivals: &[Arrival<'_>], now: Timestamp) -> Tellings {
    // What has its effect is not told to be refused.
    let untold = arrivals
        .iter()
        .filter(|arrival| arrival.cause.is_untold() && !arrival.has_effect);
    Tellings::of_given_up(untold.map(|arrival| {
        let Cause { reason, detail, .. } = arrival.cause;
        (
            arrival.message,
            *reason,
            detail.as_str(),
            dead_letter::failed_at(arrival, now),
        )
    }))
}

/// How these join what is known, and what is to be told of it.
pub(super) fn file(
    clerk: &Clerk,
    id: BatchId,
    arrivals: &[Arrival<'_>],
    effects: &Effects,
    known: &BTreeMap<Uuid, Known>,
    firsts: &Firsts,
    now: Timestamp,
) -> Result<Filed, StoreError> {
    let filed = catch_unwind(AssertUnwindSafe(|| {
        let mut filed = Filed {
            id,
            now,
            filing: dead_letter::file(known, arrivals, now),
            taken: dead_letter::taken(known, arrivals),
            answers: Vec::new(),
            publications: Vec::new(),
            lag: Duration::ZERO,
        };
        for (index, arrival) in arrivals.iter().enumerate() {
            let is_counted = filed.filing.counted.binary_search(&index).is_ok();
            let failed_at = dead_letter::failed_at(arrival, now);
            // A broker's record may be forged; the worker's word counts where there is one.
            if is_counted && (arrival.cause.made_by == MadeBy::Settled || filed.lag.is_zero()) {
                filed.lag = Duration::try_from(now.duration_since(failed_at)).unwrap_or_default();
            }
            if !arrival.cause.is_untold() {
                continue;
            }
            let Cause { reason, detail, .. } = arrival.cause;
            let effect = effects.get(&index);
            if is_counted {
                let judgement = Judgement {
                    verdict: match effect {
                        Some(allocation) => Verdict::Duplicate {
                            allocation: Arc::clone(allocation),
                        },
                        None => Verdict::Rejected {
                            reason: *reason,
                            detail: detail.clone(),
                        },
                    },
                    proven: effect.is_some(),
                };
                let source = arrival.message.delivery.source;
                filed.answers.push(Answer { source, judgement });
            }
            // Told also where it looks like a copy: one that was handed out before is not for certain stored, and nobody
            // else tells of it. Told twice it is the same event, with the same id.
            filed.publications.extend(match effect {
                Some(allocation) => event::told_again(arrival.message, allocation, &clerk.rules),
                None => {
                    let event = event::given_up(arrival.message, *reason, detail, failed_at, firsts, &clerk.rules);
                    Some(event)
                }
            });
        }
        filed.publications.iter().try_for_each(settle::in_words)?;
        filed.publications = event::in_format(filed.publications, clerk.event_format);
        Ok(filed)
    }));
    filed.unwrap_or_else(|_| Err(StoreError::blame_the_batch("filing the batch panicked")))
}

/// Dead letters, filed and not written yet.
pub(super) struct Filed {
    id: BatchId,
    now: Timestamp,
    filing: Filing,
    taken: BTreeMap<Timestamp, u32>,
    answers: Vec<Answer>,
    publications: Vec<Publication>,
    lag: Duration,
}

impl Filed {
    pub(super) fn outcome<'a>(&'a self, clerk: &'a Clerk, arrivals: &'a [Arrival<'a>]) -> FilingOutcome<'a> {
        FilingOutcome {
            id: self.id,
            worker: &clerk.worker,
            now: self.now,
            arrivals,
            filing: &self.filing,
            taken: &self.taken,
            verdicts: self.answers.iter().map(|answer| &answer.judgement.verdict).collect(),
            publications: &self.publications,
            lease: clerk.outbox_lease,
        }
    }

    pub(super) fn stored(self) -> StoredLetters {
        StoredLetters {
            answered: Answered {
                id: self.id,
                answers: self.answers,
                publications: self.publications,
                kept: Vec::new(),
                replies: Vec::new(),
                deleted: Vec::new(),
                replies_ignored: 0,
            },
            filing: self.filing,
            lag: self.lag,
        }
    }
}
