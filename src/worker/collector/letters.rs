//! Dead letters in hand: what each is, and why it is here.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    domain::{
        allocation::Allocation,
        dead_letter::{self, Arrival, Cause},
        decide::Judged,
    },
    settle::{self, Batch, Clerk},
    store::StoreError,
};

/// Dead letters with the message in each as its partner sent it, and why it is here.
#[derive(Clone, Default)]
pub(super) struct Letters {
    pub(super) batch: Batch,
    pub(super) causes: Vec<Cause>,
    /// An earlier commit of theirs is unknown: they may be stored.
    pub(super) again: bool,
}

/// Of each dead letter that nobody told yet, what it asks for, where that is there already. By their place.
pub(super) type Effects = BTreeMap<usize, Arc<Allocation>>;

impl Letters {
    pub(super) fn arrivals(&self, effects: &Effects) -> Vec<Arrival<'_>> {
        let messages = self.batch.deliveries.iter().zip(&self.batch.facts).zip(&self.causes);
        messages
            .enumerate()
            .map(|(index, ((delivery, facts), cause))| Arrival {
                message: Judged { delivery, facts },
                cause,
                again: self.again || delivery.redelivered,
                has_effect: effects.contains_key(&index),
            })
            .collect()
    }

    /// Money that moved is never called rejected: before it is told that the broker gave a message up, the receipts are
    /// asked. What settles after that was given up before,
    /// and is found by [`crate::worker::settled_since`].
    pub(super) async fn effects(&self, clerk: &Clerk) -> Result<Effects, StoreError> {
        let messages = self.batch.deliveries.iter().zip(&self.batch.facts).zip(&self.causes);
        let (places, untold): (Vec<usize>, Vec<Judged<'_>>) = messages
            .enumerate()
            .filter(|(_, (_, cause))| cause.is_untold())
            .map(|(index, ((delivery, facts), _))| (index, Judged { delivery, facts }))
            .unzip();
        let effects = settle::effects(clerk, &untold).await?;
        let effects = places.into_iter().zip(effects);
        Ok(effects.filter_map(|(index, effect)| Some((index, effect?))).collect())
    }

    /// Two halves, unless a single one is left.
    pub(super) fn halves(&self) -> Option<(Self, Self)> {
        let (left, right) = self.batch.halves()?;
        let (left_causes, right_causes) = self.causes.split_at_checked(left.deliveries.len())?;
        let half = |batch: Batch, causes: &[Cause]| Self {
            batch,
            causes: causes.to_vec(),
            again: self.again,
        };
        Some((half(left, left_causes), half(right, right_causes)))
    }

    /// What can be stored, and what no database could hold.
    pub(super) fn sort(self) -> (Self, Self) {
        let mut unstorable = Self::default();
        if !self
            .batch
            .deliveries
            .iter()
            .any(|delivery| dead_letter::unstorable(delivery).is_some())
        {
            return (self, unstorable);
        }
        let mut kept = Self {
            again: self.again,
            ..Self::default()
        };
        let (mut storable, mut others) = (Vec::new(), Vec::new());
        let facts = self.batch.facts.into_iter().zip(self.causes);
        for (delivery, (facts, cause)) in self.batch.deliveries.iter().zip(facts) {
            let (deliveries, letters) = match dead_letter::unstorable(delivery) {
                Some(_) => (&mut others, &mut unstorable),
                None => (&mut storable, &mut kept),
            };
            deliveries.push(delivery.clone());
            letters.batch.facts.push(facts);
            letters.causes.push(cause);
        }
        kept.batch.deliveries = Arc::new(storable);
        unstorable.batch.deliveries = Arc::new(others);
        (kept, unstorable)
    }
}
