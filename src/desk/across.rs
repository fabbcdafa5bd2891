//! What two cells say of the same messages and the same money: a message is judged in one of them, and money that left the one came
//! into the other.

use std::collections::{BTreeSet, HashSet};

use serde::Deserialize;
use uuid::Uuid;

use super::{Desk, ReconcileLine, Reconciled, Reconciliation, Refusal};
use crate::store::{
    across::ProvenNonce,
    books::PROBLEMS_MAX,
    reconcile::{Relation, Side},
};

/// Keys that are asked for at a time.
const PAGE: usize = 10_000;

/// A message that was sent, as its sender kept it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentNonce {
    pub enterprise_id: String,
    pub nonce: String,
}

const ONE_CELL: &str = "each partner lives in one cell: see to it that its messages are led to that one alone";

/// A line whose right side is none: each sentence stands for so many.
fn none_of(found: &mut Reconciliation, what: &'static str, wrong: Vec<(String, i64)>, advice: &'static str) {
    let count = wrong.iter().map(|(_, count)| count).sum();
    found.lines.push(ReconcileLine {
        left: Side { what, count },
        relation: Relation::Equal,
        right: Side { what: "none", count: 0 },
        ok: count == 0,
        differs_by: count,
        advice,
    });
    spell(found, wrong.into_iter().map(|(sentence, _)| sentence).collect());
}

/// Adds the first sentences, and counts the rest.
fn spell(found: &mut Reconciliation, mut sentences: Vec<String>) {
    let rest = sentences.len().saturating_sub(PROBLEMS_MAX);
    sentences.truncate(PROBLEMS_MAX);
    found.problems.append(&mut sentences);
    if rest > 0 {
        found.problems.push(format!("and {rest} more like these"));
    }
}

impl Desk {
    /// Adds to what was compared in this cell what is compared with the other, in the same window; and where it is given what was
    /// sent, that each of it was judged.
    ///
    /// # Errors
    /// Nobody said where the other cell is; a database is away.
    pub async fn reconcile_across(
        &self,
        here: Reconciled,
        sent: Option<Vec<SentNonce>>,
    ) -> Result<Reconciled, Refusal> {
        let other = self.other_cell()?;
        let books = (
            self.store.books_epoch().await?.books,
            other.store.books_epoch().await?.books,
        );
        if books.0 == books.1 {
            return Err(
                Refusal::refused("both databases hold the same books, or a copy of them")
                    .hint("SETTLED_TARGET_DATABASE_URL leads to the other cell"),
            );
        }
        let mut found = here.found;
        self.judged_twice(&other, &mut found).await?;
        self.partners_twice(&other, &mut found).await?;
        self.money_moved(&other, books, &mut found).await?;
        if let Some(sent) = sent {
            self.judged_at_all(&other, sent, &mut found).await?;
        }
        Ok(Reconciled {
            ok: found.lines.iter().all(|line| line.ok),
            found,
        })
    }

    async fn judged_twice(&self, other: &Self, found: &mut Reconciliation) -> Result<(), Refusal> {
        let (mut after, mut twice) = (Uuid::nil(), Vec::new());
        loop {
            let limit = i64::try_from(PAGE).unwrap_or(i64::MAX);
            let page = self.store.judged_here(found.since, found.until, after, limit).await?;
            let Some(last) = page.last() else { break };
            after = last.key;
            let keys: Vec<Uuid> = page.iter().map(|one| one.key).collect();
            let there: HashSet<Uuid> = other.store.judged_too(&keys).await?.into_iter().collect();
            let both = page.into_iter().filter(|one| there.contains(&one.key));
            twice.extend(both.map(|one| {
                let sentence = format!(
                    "nonce {:?} of partner {}: judged in both cells",
                    one.nonce, one.enterprise_id
                );
                (sentence, 1)
            }));
        }
        none_of(found, "messages that both cells judged", twice, ONE_CELL);
        Ok(())
    }

    async fn partners_twice(&self, other: &Self, found: &mut Reconciliation) -> Result<(), Refusal> {
        let (here, there) = (
            self.store.judged_partners().await?,
            other.store.judged_partners().await?,
        );
        let known: BTreeSet<&String> = here.iter().collect();
        let twice = there.iter().filter(|one| known.contains(one));
        let twice = twice
            .map(|one| (format!("partner {one}: both cells judge its messages"), 1))
            .collect();
        none_of(
            found,
            "partners that both cells judge",
            twice,
            "a partner lives in one cell: suspend it in the other, and look at the messages that both judged",
        );
        let mut astray = Vec::new();
        for (cell, of, partners) in [(self, "this", &there), (other, "the other", &here)] {
            let refused = cell.store.refused_of(partners, found.since, found.until).await?;
            astray.extend(refused.into_iter().map(|(whose, count)| {
                (
                    format!("partner {whose}: {count} messages came to {of} cell and were refused as nobody's"),
                    count,
                )
            }));
        }
        none_of(
            found,
            "messages refused in a cell that does not know their partner",
            astray,
            "they were led to the wrong cell: mend the bindings or the shovel, and publish to the right one what \
             `settled dead-letters export` gives",
        );
        let mut held = Vec::new();
        for (cell, of) in [(self, "this"), (other, "the other")] {
            let left = cell.store.held_of_those_who_left().await?;
            held.extend(left.into_iter().map(|(whose, count)| {
                (
                    format!("partner {whose}: {count} messages are held in {of} cell, which it left"),
                    count,
                )
            }));
        }
        none_of(
            found,
            "messages held in a cell that their partner left",
            held,
            "`settled partner move --apply` hands them over; mend what leads them there",
        );
        Ok(())
    }

    /// Of moves between these two: a partner may have gone on to a third cell.
    async fn money_moved(&self, other: &Self, books: (Uuid, Uuid), found: &mut Reconciliation) -> Result<(), Refusal> {
        let (mut left, mut equal, mut wrong) = (0_i64, 0_i64, Vec::new());
        for (from, to, there) in [(self, other, books.1), (other, self, books.0)] {
            let ended = from.store.ended_moves(there).await?;
            let gone = from.store.moved_sums(false, &ended).await?;
            let came: BTreeSet<_> = to.store.moved_sums(true, &ended).await?.into_iter().collect();
            for sum in &gone {
                left += 1;
                if came.contains(sum) {
                    equal += 1;
                } else {
                    wrong.push(format!(
                        "move {}: {} {} left connection {}, and did not arrive like that",
                        sum.move_id, sum.quantity, sum.currency, sum.connection_id
                    ));
                }
            }
            let gone: BTreeSet<_> = gone.into_iter().collect();
            wrong.extend(came.difference(&gone).map(|sum| {
                format!(
                    "move {}: {} {} arrived on connection {}, and did not leave like that",
                    sum.move_id, sum.quantity, sum.currency, sum.connection_id
                )
            }));
        }
        found.lines.push(ReconcileLine {
            left: Side {
                what: "sums of money that left a cell with a partner",
                count: left,
            },
            relation: Relation::Equal,
            right: Side {
                what: "the same, arrived in the other",
                count: equal,
            },
            ok: wrong.is_empty(),
            differs_by: i64::try_from(wrong.len()).unwrap_or(i64::MAX),
            advice: "somebody changed the books of a cell, or one was restored from another moment: run \
                     `settled ledger check` in both",
        });
        spell(found, wrong);
        Ok(())
    }

    async fn judged_at_all(
        &self,
        other: &Self,
        sent: Vec<SentNonce>,
        found: &mut Reconciliation,
    ) -> Result<(), Refusal> {
        let sent: Vec<ProvenNonce> = sent
            .into_iter()
            .map(|one| ProvenNonce::of(one.enterprise_id, one.nonce))
            .collect();
        let mut nowhere = Vec::new();
        for page in sent.chunks(PAGE) {
            let keys: Vec<Uuid> = page.iter().map(|one| one.key).collect();
            let mut known: HashSet<Uuid> = self.store.proven(&keys).await?.into_iter().collect();
            known.extend(other.store.proven(&keys).await?);
            let missing = page.iter().filter(|one| !known.contains(&one.key));
            nowhere.extend(missing.map(|one| {
                format!(
                    "nonce {:?} of partner {}: in neither cell",
                    one.nonce, one.enterprise_id
                )
            }));
        }
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        found.lines.push(ReconcileLine {
            left: Side {
                what: "messages that were sent",
                count: count(sent.len()),
            },
            relation: Relation::Equal,
            right: Side {
                what: "of them proven in one cell or the other",
                count: count(sent.len().saturating_sub(nowhere.len())),
            },
            ok: nowhere.is_empty(),
            differs_by: count(nowhere.len()),
            advice: "each waits in a queue or in a side room, was refused before its sender was proven, or is lost on the way: \
                     look into the queues and at the dead letters of both cells, and let the partner send again what is in none",
        });
        spell(found, nowhere);
        Ok(())
    }
}
