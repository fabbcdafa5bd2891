//! How many requests are in hand: in all, how many of them updates, and how many of one enterprise. So that who waits for an
//! answer keeps nobody from asking, and nobody's many keep out the others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::ApiSettings;

/// What a request has in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum CallKind {
    /// The database is asked.
    Read,
    /// A message is published, and what becomes of it is waited for.
    Update,
}

type Whose = (String, CallKind);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    updates: Arc<Semaphore>,
    share_max: usize,
    shares: Arc<Mutex<HashMap<Whose, usize>>>,
}

/// A place among those of an enterprise, and for an update among all updates; free when this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    places: Places,
    whose: Whose,
    _of_updates: Option<OwnedSemaphorePermit>,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoShare {
    /// The enterprise has all that it may have.
    Enterprise,
    /// All updates together are as many as there may be.
    Updates,
}

impl Places {
    pub(super) fn new(settings: &ApiSettings) -> Self {
        Self {
            all: Arc::new(Semaphore::new(settings.requests_max)),
            updates: Arc::new(Semaphore::new(settings.updates_max)),
            share_max: settings.share_max,
            shares: Arc::default(),
        }
    }

    /// A place for one more request, before anything is known of it; none: the house is full.
    pub(super) fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.all).try_acquire_owned().ok()
    }

    /// A place for one more of an enterprise. Of its own first: who has none left takes none of the others', not for a moment.
    pub(super) fn share(&self, enterprise_id: &str, work: CallKind) -> Result<Share, NoShare> {
        let whose = (enterprise_id.to_owned(), work);
        let mut shares = self.shares();
        // Only who holds one stands here.
        let held = shares.get(&whose).copied().unwrap_or_default();
        if held >= self.share_max {
            return Err(NoShare::Enterprise);
        }
        let of_updates = match work {
            CallKind::Read => None,
            CallKind::Update => {
                let place = Arc::clone(&self.updates).try_acquire_owned();
                Some(place.map_err(|_| NoShare::Updates)?)
            }
        };
        shares.insert(whose.clone(), held.saturating_add(1));
        drop(shares);
        Ok(Share {
            places: self.clone(),
            whose,
            _of_updates: of_updates,
        })
    }

    fn shares(&self) -> MutexGuard<'_, HashMap<Whose, usize>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut shares = self.places.shares();
        match shares.get_mut(&self.whose) {
            Some(held) if *held > 1 => *held -= 1,
            Some(_) | None => drop(shares.remove(&self.whose)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(all: usize, updates: usize, share: usize) -> Places {
        Places {
            all: Arc::new(Semaphore::new(all)),
            updates: Arc::new(Semaphore::new(updates)),
            share_max: share,
            shares: Arc::default(),
        }
    }

    #[test]
    fn updates_leave_room_for_who_only_asks() {
        let places = places(3, 2, 9);
        let in_hand = |work| {
            let place = places.take();
            let share = places.share("acme", work);
            Some((place?, share.ok()?))
        };
        let updates: Vec<_> = (0..3).filter_map(|_| in_hand(CallKind::Update)).collect();
        assert_eq!(updates.len(), 2);
        let read = in_hand(CallKind::Read);
        assert!(read.is_some() && places.take().is_none(), "one was left, and is taken");
        drop((updates, read));
        assert!(in_hand(CallKind::Update).is_some());
    }

    #[test]
    fn an_enterprise_has_its_share_and_no_more() {
        let places = places(9, 3, 2);
        let mut held: Vec<_> = (0..2)
            .filter_map(|_| places.share("acme", CallKind::Update).ok())
            .collect();
        assert_eq!(held.len(), 2);
        let another = || places.share("acme", CallKind::Update).err();
        assert_eq!(another(), Some(NoShare::Enterprise));
        assert!(
            places.share("acme", CallKind::Read).is_ok(),
            "its other requests have their own"
        );
        let of_beta = places.share("beta", CallKind::Update);
        assert!(of_beta.is_ok());
        assert_eq!(places.share("gamma", CallKind::Update).err(), Some(NoShare::Updates));
        assert_eq!(another(), Some(NoShare::Enterprise), "who has its share is told so");
        drop(held.pop());
        held.extend(places.share("acme", CallKind::Update));
        assert_eq!(held.len(), 2, "what was given back is there again");
        drop((held, of_beta));
        assert!(places.shares().is_empty(), "nobody is remembered who holds nothing");
    }
}
