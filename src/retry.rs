//! Waiting between tries, and the only place that names the `backoff` crate.
//!
//! That crate is unmaintained (RUSTSEC-2025-0012). It is kept on purpose for its arithmetic, and replaceable here.

use std::time::Duration;

use ::backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff as _};
use tokio::sync::watch;

use crate::config::RetrySettings;

/// Growing, jittered, capped waits. It never gives up: that is its owner's decision.
#[derive(Debug)]
pub struct Backoff {
    inner: ExponentialBackoff,
    max: Duration,
    attempts: u32,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Waited {
    /// The time is over: try again.
    Over,
    /// The program is stopping.
    Stopping,
}

impl Backoff {
    pub fn new(settings: &RetrySettings) -> Self {
        // The cap holds with jitter included, and clipping would make everybody who reached it come back in step: so
        // the growth stops lower, where the highest jittered wait is the cap.
        let ceiling = settings.max.div_f64(1.0 + settings.jitter);
        let inner = ExponentialBackoffBuilder::new()
            .with_initial_interval(settings.initial.min(ceiling))
            .with_multiplier(settings.multiplier)
            .with_randomization_factor(settings.jitter)
            .with_max_interval(ceiling)
            .with_max_elapsed_time(None)
            .build();
        Backoff {
            inner,
            max: settings.max,
            attempts: 0,
        }
    }

    /// The next wait.
    #[expect(clippy::should_implement_trait, reason = "an iterator may end, this must not")]
    pub fn next(&mut self) -> Duration {
        self.attempts = self.attempts.saturating_add(1);
        // The crate adds a nanosecond when it rounds, and answers None only where a total time is set.
        self.inner.next_backoff().unwrap_or(self.max).min(self.max)
    }

    /// Waits handed out since the start or the last reset.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// It worked: begin again with the first wait next time.
    pub fn reset(&mut self) {
        self.attempts = 0;
        self.inner.reset();
    }

    /// Waits for [`Backoff::next`], or until the program stops.
    pub async fn wait(&mut self, shutdown: &mut watch::Receiver<bool>) -> Waited {
        let pause = self.next();
        sleep(pause, shutdown).await
    }
}

/// Does what may be done twice, again while its failure is one that passes; not for ever (`retry.transient_attempts`).
///
/// # Errors
/// The last failure.
pub async fn patiently<T, E>(
    settings: &RetrySettings,
    passes: impl Fn(&E) -> bool,
    mut work: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut backoff = Backoff::new(settings);
    loop {
        match work().await {
            Err(error) if passes(&error) && backoff.attempts() < settings.transient_attempts => {
                tokio::time::sleep(backoff.next()).await;
            }
            done => return done,
        }
    }
}

/// Until the program stops.
pub async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // Both answers mean the same; the guard that one of them holds must not live on in the caller.
    drop(shutdown.wait_for(|stopping| *stopping).await);
}

/// Waits, or until the program stops. A sender that is gone stops too: nobody is left who could say so.
pub async fn sleep(pause: Duration, shutdown: &mut watch::Receiver<bool>) -> Waited {
    tokio::select! {
        biased;
        () = stopped(shutdown) => Waited::Stopping,
        () = tokio::time::sleep(pause) => Waited::Over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(initial: u64, max: u64, multiplier: f64, jitter: f64) -> RetrySettings {
        RetrySettings {
            initial: Duration::from_millis(initial),
            max: Duration::from_millis(max),
            multiplier,
            jitter,
            transient_attempts: 8,
        }
    }

    #[test]
    fn grows_to_the_cap_and_stays_there() {
        let mut backoff = Backoff::new(&settings(50, 5_000, 2.0, 0.0));
        let waits: Vec<u128> = (0..10).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(backoff.attempts(), 10);
        for _ in 0..10_000 {
            assert!(backoff.next() <= Duration::from_secs(5));
        }
        backoff.reset();
        assert_eq!(backoff.attempts(), 0);
        assert_eq!(backoff.next(), Duration::from_millis(50));
    }

    #[test]
    fn jitter_stays_within_its_share_and_under_the_cap() {
        for jitter in [0.1, 0.3, 0.9] {
            let mut first = Vec::new();
            for _ in 0..500 {
                let mut backoff = Backoff::new(&settings(100, 1_000, 2.0, jitter));
                first.push(backoff.next().as_secs_f64());
                for _ in 0..20 {
                    backoff.next();
                }
                let last = backoff.next().as_secs_f64();
                let lowest = 1.0 / (1.0 + jitter) * (1.0 - jitter);
                assert!(last >= lowest - 0.001 && last <= 1.0, "{last} with jitter {jitter}");
            }
            let (low, high) = first
                .iter()
                .fold((f64::MAX, 0.0_f64), |(low, high), x| (low.min(*x), high.max(*x)));
            assert!(
                low >= 0.1 * (1.0 - jitter) - 0.001 && high <= 0.1 * (1.0 + jitter) + 0.001,
                "{low} {high}"
            );
            assert!(
                high - low > 0.1 * jitter,
                "500 draws with jitter {jitter} lie between {low} and {high}"
            );
        }
    }

    #[test]
    fn a_first_wait_at_the_cap_is_capped() {
        let mut backoff = Backoff::new(&settings(1_000, 1_000, 2.0, 0.5));
        for _ in 0..1_000 {
            assert!(backoff.next() <= Duration::from_secs(1));
        }
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_program_stops() {
        let (stop, mut stopping) = watch::channel(false);
        let mut backoff = Backoff::new(&settings(1, 60_000, 2.0, 0.0));
        assert_eq!(backoff.wait(&mut stopping).await, Waited::Over);
        let mut long = Backoff::new(&settings(60_000, 60_000, 2.0, 0.0));
        let waiting = tokio::spawn(async move { long.wait(&mut stopping).await });
        stop.send(true).expect("somebody listens");
        assert_eq!(waiting.await.expect("no panic"), Waited::Stopping);
        // Said before the wait began, and a sender that is gone.
        let mut late = stop.subscribe();
        assert_eq!(sleep(Duration::from_secs(60), &mut late).await, Waited::Stopping);
        let (gone, mut orphan) = watch::channel(false);
        drop(gone);
        assert_eq!(sleep(Duration::from_secs(60), &mut orphan).await, Waited::Stopping);
    }
}
