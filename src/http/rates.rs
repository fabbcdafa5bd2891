//! How often one may ask: so many times a second, as many at once, and no more.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// Of so many it is remembered what they have left; beyond that those go that have all of it.
pub(crate) const REMEMBERED_MAX: usize = 10_000;

/// How much each has left of its rate: as much as a second brings, and no more.
#[derive(Debug)]
pub(crate) struct Rates<K>(Mutex<HashMap<K, Left>>);

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

#[derive(Clone, Copy, Debug)]
struct Left {
    requests: f64,
    at: Instant,
    rate: u32,
}

impl Left {
    fn now(&self, now: Instant) -> f64 {
        let rate = f64::from(self.rate);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.requests + passed * rate).min(rate)
    }
}

impl<K: Copy + Eq + Hash> Rates<K> {
    /// Whether one may ask once more. It is taken of everybody who is named, each with its rate, or of nobody.
    pub(crate) fn take(&self, of: &[(K, u32)], now: Instant) -> bool {
        let mut all = self.all();
        if all.len() >= REMEMBERED_MAX && of.iter().any(|(whose, _)| !all.contains_key(whose)) {
            all.retain(|_, left| left.now(now) < f64::from(left.rate));
        }
        let left = |(whose, rate): &(K, u32)| {
            let kept = all.get(whose).map(|left| Left { rate: *rate, ..*left });
            kept.map_or(f64::from(*rate), |left| left.now(now))
        };
        let had: Vec<f64> = of.iter().map(left).collect();
        if had.iter().any(|requests| *requests < 1.0) {
            return false;
        }
        for ((whose, rate), requests) in of.iter().zip(had) {
            let left = Left {
                requests: requests - 1.0,
                at: now,
                rate: *rate,
            };
            all.insert(*whose, left);
        }
        true
    }

    /// One of those that were taken does not count.
    pub(crate) fn give_back(&self, of: &[(K, u32)]) {
        let mut all = self.all();
        for (whose, rate) in of {
            if let Some(left) = all.get_mut(whose) {
                left.requests = (left.requests + 1.0).min(f64::from(*rate));
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<K, Left>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_has_as_many_requests_as_a_second_brings() {
        let (rates, start) = (Rates::default(), Instant::now());
        let taken = |whose, after: u64| {
            let now = start + Duration::from_millis(after);
            (0..20).filter(|_| rates.take(&[(whose, 10)], now)).count()
        };
        assert_eq!(taken("one", 0), 10);
        assert_eq!(taken("one", 0), 0);
        assert_eq!(taken("other", 0), 10, "each has its own");
        assert_eq!(taken("one", 350), 3);
        assert_eq!(taken("one", 60_000), 10, "and no more than that");
        rates.give_back(&[("one", 10)]);
        assert_eq!(taken("one", 60_000), 1, "what was given back is there again");
    }

    #[test]
    fn it_is_taken_of_all_or_of_nobody() {
        let (rates, now) = (Rates::default(), Instant::now());
        let asks = |one| rates.take(&[("all", 5), (one, 3)], now);
        assert_eq!((0..9).filter(|_| asks("one")).count(), 3);
        assert!(rates.take(&[("all", 5)], now), "what was refused took nothing");
        assert_eq!((0..9).filter(|_| asks("other")).count(), 1, "they are five together");
        assert_eq!((0..9).filter(|_| rates.take(&[("other", 3)], now)).count(), 2);
    }

    #[test]
    fn so_many_are_remembered_and_nobody_who_has_less_than_all_is_forgotten() {
        let (rates, start) = (Rates::default(), Instant::now());
        for whose in 0..REMEMBERED_MAX {
            assert!(rates.take(&[(whose, 1)], start));
        }
        // A second later all but this one have all of theirs again.
        let later = start + Duration::from_secs(1);
        assert!(rates.take(&[(0, 1)], later));
        assert!(rates.take(&[(REMEMBERED_MAX, 1)], later));
        assert_eq!(rates.all().len(), 2);
        assert!(!rates.take(&[(0, 1)], later));
    }
}
