//! So many messages a second, over all waves of a run.

use std::time::{Duration, Instant};

/// When the next message may go out. What a pause between two waves has cost is not made up for, so that a run is never faster than it
/// was asked to be; what a slow publication has cost within a wave is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Messages a second; None: as fast as it goes.
    rate: Option<f64>,
    due: Instant,
}

impl Pace {
    pub(super) fn new(rate: Option<f64>, now: Instant) -> Self {
        Self { rate, due: now }
    }

    /// A wave begins.
    pub(super) fn begin(&mut self, now: Instant) {
        self.due = self.due.max(now);
    }

    /// How many are due by now, of as many as go out together at most.
    pub(super) fn allowed(&self, now: Instant, together: usize) -> usize {
        let Some(rate) = self.rate else { return together };
        match now.checked_duration_since(self.due) {
            None => 0,
            // The cast saturates.
            Some(late) => together.min((late.as_secs_f64() * rate) as usize + 1),
        }
    }

    /// So many went out in their time.
    pub(super) fn sent(&mut self, messages: usize) {
        if let Some(rate) = self.rate {
            self.due += Duration::try_from_secs_f64(messages as f64 / rate).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many went out by each of these moments, in milliseconds.
    fn sent_by(pace: &mut Pace, began: Instant, moments: &[u64]) -> Vec<usize> {
        let mut all = 0;
        moments
            .iter()
            .map(|moment| {
                let count = pace.allowed(began + Duration::from_millis(*moment), 100);
                pace.sent(count);
                all += count;
                all
            })
            .collect()
    }

    #[test]
    fn one_wave_after_another_is_no_faster_than_one() {
        let began = Instant::now();
        let mut pace = Pace::new(Some(5.0), began);
        pace.begin(began);
        assert_eq!(sent_by(&mut pace, began, &[0, 0, 199, 200]), [1, 1, 1, 2]);
        // The next wave begins at once, and has to wait all the same.
        pace.begin(began + Duration::from_millis(201));
        assert_eq!(sent_by(&mut pace, began, &[201, 399, 400]), [0, 0, 1]);
        // One that began late makes up for nothing.
        pace.begin(began + Duration::from_millis(10_000));
        assert_eq!(sent_by(&mut pace, began, &[10_000, 10_199, 10_200]), [1, 1, 2]);
    }

    #[test]
    fn within_a_wave_what_is_late_is_made_up_for() {
        let began = Instant::now();
        let mut pace = Pace::new(Some(100.0), began);
        pace.begin(began);
        assert_eq!(sent_by(&mut pace, began, &[0, 500, 505, 510]), [1, 51, 51, 52]);
        let mut pace = Pace::new(None, began);
        assert_eq!(sent_by(&mut pace, began, &[0, 0]), [100, 200]);
    }
}
