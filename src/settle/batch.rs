//! Messages in hand, with what each tells by itself.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::{
    domain::{
        decide::{Judged, Reason},
        delivery::Delivery,
        message::{self, Facts, Refusal},
    },
    fail::{self, Point},
};

/// Messages that are read where they are, which holds up an I/O thread for a tenth of a millisecond: to have another thread
/// wake up and answer takes as long.
const READ_AT_ONCE: usize = 3;

/// Messages with what each tells by itself.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub deliveries: Arc<Vec<Delivery>>,
    pub facts: Vec<Facts>,
}

impl Batch {
    /// Decodes, checks agreement and recovers signers: a few messages where they are, more off the I/O threads and on as many
    /// cores as there are.
    pub async fn read(deliveries: Vec<Delivery>) -> Self {
        Self::read_by(deliveries, message::facts).await.shortened()
    }

    /// The same without the signers, for what is only kept.
    pub async fn read_unsigned(deliveries: Vec<Delivery>) -> Self {
        Self::read_by(deliveries, message::unsigned_facts).await
    }

    /// The same with the signers of some: whoever is asked whether its effect is there must be known.
    pub async fn read_signed_where(deliveries: Vec<Delivery>, is_signed: impl Fn(usize) -> bool) -> Self {
        let mut batch = Self::read_unsigned(deliveries).await;
        let asked: Vec<usize> = (0..batch.deliveries.len()).filter(|index| is_signed(*index)).collect();
        let deliveries = asked.iter().filter_map(|index| batch.deliveries.get(*index).cloned());
        let signed = Self::read(deliveries.collect()).await;
        for (index, facts) in asked.into_iter().zip(signed.facts) {
            if let Some(place) = batch.facts.get_mut(index) {
                *place = facts;
            }
        }
        batch
    }

    async fn read_by(deliveries: Vec<Delivery>, read: Reader) -> Self {
        let deliveries = Arc::new(deliveries);
        let bytes = deliveries.iter().map(|delivery| delivery.body.len()).sum::<usize>();
        let facts = if deliveries.len() <= READ_AT_ONCE && bytes <= READ_AT_ONCE * message::BODY_MAX {
            deliveries.iter().map(|delivery| read_one(delivery, read)).collect()
        } else {
            read_apart(&deliveries, read).await
        };
        fail::point(Point::AfterFacts).await;
        Self { deliveries, facts }
    }

    /// Of a message that is too large the head only: all that becomes of it is a dead letter with that.
    fn shortened(mut self) -> Self {
        if self.facts.iter().any(is_too_large) {
            for (delivery, facts) in Arc::make_mut(&mut self.deliveries).iter_mut().zip(&self.facts) {
                message::shorten(delivery, facts);
            }
        }
        self
    }

    /// Each message with its facts, as the domain takes them.
    pub fn judged(&self) -> Vec<Judged<'_>> {
        self.deliveries
            .iter()
            .zip(&self.facts)
            .map(|(delivery, facts)| Judged { delivery, facts })
            .collect()
    }

    /// Those at the places that are picked.
    pub fn part(&self, picks: impl Fn(usize) -> bool) -> Self {
        let picked = |index: &usize| picks(*index);
        let indexes: Vec<usize> = (0..self.deliveries.len()).filter(picked).collect();
        if indexes.len() == self.deliveries.len() {
            return self.clone();
        }
        let deliveries = indexes.iter().filter_map(|index| self.deliveries.get(*index).cloned());
        Self {
            deliveries: Arc::new(deliveries.collect()),
            facts: indexes
                .iter()
                .filter_map(|index| self.facts.get(*index).cloned())
                .collect(),
        }
    }

    /// The two halves, where there is more than one message: for a search for the one that the database refuses.
    pub fn halves(&self) -> Option<(Self, Self)> {
        let middle = self.deliveries.len() / 2;
        let (left, right) = self
            .deliveries
            .split_at_checked(middle)
            .filter(|(left, _)| !left.is_empty())?;
        let (left_facts, right_facts) = self.facts.split_at_checked(middle)?;
        let half = |deliveries: &[Delivery], facts: &[Facts]| Self {
            deliveries: Arc::new(deliveries.to_vec()),
            facts: facts.to_vec(),
        };
        Some((half(left, left_facts), half(right, right_facts)))
    }
}

fn is_too_large(facts: &Facts) -> bool {
    let refusal = facts.content.as_ref().err();
    refusal.is_some_and(|refusal| refusal.reason == Reason::MessageTooLarge)
}

type Reader = fn(&Delivery) -> Facts;

/// Reads messages on other threads, each a share of them.
async fn read_apart(deliveries: &Arc<Vec<Delivery>>, read: Reader) -> Vec<Facts> {
    // As many as the runtime has threads, which is as many as there are cores: to ask the system again reads its files.
    let cores = tokio::runtime::Handle::current().metrics().num_workers();
    // A signature takes 30 us: below a handful a second thread costs more than it brings.
    let share = deliveries.len().div_ceil(cores).max(8);
    let tasks: Vec<_> = (0..deliveries.len())
        .step_by(share)
        .map(|start| {
            let deliveries = Arc::clone(deliveries);
            tokio::task::spawn_blocking(move || {
                deliveries
                    .iter()
                    .skip(start)
                    .take(share)
                    .map(|delivery| read_one(delivery, read))
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let mut facts = Vec::with_capacity(deliveries.len());
    for (index, task) in tasks.into_iter().enumerate() {
        match task.await {
            Ok(some) => facts.extend(some),
            // Only a runtime that shuts down ends here (a panic is caught message by message): read them here then.
            Err(_) => {
                let rest = deliveries.iter().skip(index * share).take(share);
                facts.extend(rest.map(|delivery| read_one(delivery, read)));
            }
        }
    }
    facts
}

/// A panic of ours in reading a message is that message's own fate, not the batch's.
fn read_one(delivery: &Delivery, read: Reader) -> Facts {
    catch_unwind(AssertUnwindSafe(|| read(delivery))).unwrap_or_else(|_| unreadable(delivery))
}

fn unreadable(delivery: &Delivery) -> Facts {
    Facts {
        message_digest: delivery
            .cut
            .as_ref()
            .map_or_else(|| message::sha256(&delivery.body), |cut| cut.digest),
        enterprise_id: message::parse_routing_key(&delivery.routing_key).map(|(enterprise, _)| enterprise.to_owned()),
        content: Err(Refusal {
            reason: Reason::Internal,
            detail: "this version failed to read the message".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::{Properties, Source};

    fn numbered(count: u8) -> Batch {
        let deliveries: Vec<Delivery> = (0..count)
            .map(|number| Delivery {
                exchange: String::new(),
                routing_key: String::new(),
                body: vec![number],
                properties: Properties::default(),
                cut: None,
                redelivered: false,
                source: Source::Plain,
            })
            .collect();
        let facts = deliveries.iter().map(message::facts).collect();
        Batch {
            deliveries: Arc::new(deliveries),
            facts,
        }
    }

    /// A batch cut in two until every message stands alone, by their numbers in the order they are found.
    fn cut(batch: &Batch, most: u32) -> Vec<u8> {
        assert_eq!(batch.deliveries.len(), batch.facts.len());
        match batch.halves() {
            Some((left, right)) => {
                assert!(most > 0, "a search that does not end");
                [cut(&left, most - 1), cut(&right, most - 1)].concat()
            }
            None => {
                let [delivery] = batch.deliveries.as_slice() else {
                    panic!("{} messages in one piece", batch.deliveries.len());
                };
                assert_eq!(batch.facts[0].message_digest, message::sha256(&delivery.body));
                delivery.body.clone()
            }
        }
    }

    #[test]
    fn halves_are_never_empty_and_together_the_whole() {
        for count in 1..=65 {
            assert_eq!(
                cut(&numbered(count), 7),
                (0..count).collect::<Vec<_>>(),
                "{count} messages"
            );
        }
        assert!(numbered(0).halves().is_none());
    }
}
