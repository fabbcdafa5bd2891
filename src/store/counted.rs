//! What was counted once of what does not change any more, so that a list of it costs nothing the next time. For lists alone:
//! whatever is decided by a number counts anew.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use jiff::Timestamp;

/// Numbers that are kept at most; the oldest go first.
const KEPT_MAX: usize = 1_000;

/// Numbers by the id of what they are of, and a time of it: books that were restored may give an id to something else.
#[derive(Debug)]
pub(super) struct Counted<T>(Mutex<BTreeMap<i64, (Timestamp, T)>>);

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Copy> Counted<T> {
    pub(super) fn get(&self, id: i64, at: Timestamp) -> Option<T> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&id).filter(|(of, _)| *of == at).map(|(_, number)| *number)
    }

    pub(super) fn keep(&self, id: i64, at: Timestamp, number: T) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(id, (at, number));
        while kept.len() > KEPT_MAX {
            kept.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_of_its_time() {
        let at = |second| Timestamp::from_second(second).expect("a time");
        let counted = Counted::default();
        for id in 0..1_500 {
            counted.keep(id, at(id), id * 2);
        }
        assert_eq!(
            (counted.get(1_499, at(1_499)), counted.get(1, at(1))),
            (Some(2_998), None)
        );
        assert_eq!(counted.get(1_499, at(1)), None, "it is another one of that id");
    }
}
