//! Dead letters in hand: what each is, and why it is here.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    domain::{
        allocation::Allocation,
        dead_letter::{self, Arrival, Cause},
        delivery::Source,
        message::{Message, MessageRef},
    },
    settle::{self, Clerk},
    store::StoreError,
};

/// The message in a dead letter as its partner sent it, and why it is here.
#[derive(Clone)]
pub(super) struct Letter {
    pub(super) message: Message,
    pub(super) cause: Cause,
}

/// Dead letters that are stored together.
#[derive(Clone, Default)]
pub(super) struct Letters {
    letters: Arc<Vec<Letter>>,
    /// An earlier commit of theirs is unknown: they may be stored.
    pub(super) again: bool,
}

/// Of each dead letter that nobody told yet, what it asks for, where that is there already. By their place.
pub(super) type Effects = BTreeMap<usize, Arc<Allocation>>;

impl Letters {
    pub(super) fn new(letters: Vec<Letter>) -> Self {
        Self {
            letters: Arc::new(letters),
            again: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.letters.len()
    }

    /// Where each came from.
    pub(super) fn sources(&self) -> impl Iterator<Item = Source> {
        self.letters.iter().map(|letter| letter.message.delivery.source)
    }

    pub(super) fn arrivals(&self, effects: &Effects) -> Vec<Arrival<'_>> {
        self.letters
            .iter()
            .enumerate()
            .map(|(index, Letter { message, cause })| Arrival {
                message: message.by_ref(),
                cause,
                again: self.again || message.delivery.redelivered,
                has_effect: effects.contains_key(&index),
            })
            .collect()
    }

    /// Money that moved is never called rejected: before it is told that the broker gave a message up, the receipts are
    /// asked. What settles after that was given up before,
    /// and is found by [`crate::worker::settled_since`].
    pub(super) async fn effects(&self, clerk: &Clerk) -> Result<Effects, StoreError> {
        let (places, untold): (Vec<usize>, Vec<MessageRef<'_>>) = self
            .letters
            .iter()
            .enumerate()
            .filter(|(_, letter)| letter.cause.is_untold())
            .map(|(index, letter)| (index, letter.message.by_ref()))
            .unzip();
        let effects = settle::effects(clerk, &untold).await?;
        let effects = places.into_iter().zip(effects);
        Ok(effects.filter_map(|(index, effect)| Some((index, effect?))).collect())
    }

    /// All of both, in the order in which they came.
    pub(super) fn both(one: &Self, other: &Self) -> Self {
        let mut letters: Vec<Letter> = one.letters.iter().chain(other.letters.iter()).cloned().collect();
        letters.sort_by_key(|letter| letter.message.delivery.source.delivery_tag());
        Self {
            letters: Arc::new(letters),
            again: one.again || other.again,
        }
    }

    /// Those at the places that are picked, as ones that may be stored.
    pub(super) fn part(&self, picks: impl Fn(usize) -> bool) -> Self {
        let letters = self.letters.iter().enumerate().filter(|(index, _)| picks(*index));
        Self {
            letters: Arc::new(letters.map(|(_, letter)| letter.clone()).collect()),
            again: true,
        }
    }

    /// Two halves, unless a single one is left.
    pub(super) fn halves(&self) -> Option<[Self; 2]> {
        let (left, right) = self.letters.split_at_checked(self.letters.len() / 2)?;
        let half = |letters: &[Letter]| Self {
            letters: Arc::new(letters.to_vec()),
            again: self.again,
        };
        (!left.is_empty()).then(|| [left, right].map(half))
    }

    /// What can be stored, and what no database could hold.
    pub(super) fn sort(self) -> (Self, Self) {
        let is_storable = |letter: &Letter| dead_letter::unstorable(&letter.message.delivery).is_none();
        if self.letters.iter().all(is_storable) {
            return (self, Self::default());
        }
        let again = self.again;
        let (storable, others): (Vec<_>, Vec<_>) =
            Arc::unwrap_or_clone(self.letters).into_iter().partition(is_storable);
        let of = |letters| Self {
            letters: Arc::new(letters),
            again,
        };
        (of(storable), of(others))
    }
}
