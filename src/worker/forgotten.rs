//! Whether a queue forgot its consumer, judged by what it says of itself.

use std::time::{Duration, Instant};

/// What one look at a queue told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It has a consumer.
    Attended,
    /// It may have forgotten us: it is looked at again soon.
    Again,
    /// The same, again and again: nothing can be settled from it, whatever the reason.
    Silent,
    /// It holds messages and has nobody to give them to: it was made anew without a word to its consumer.
    MadeAnew,
    /// It said for too long that it has nobody. Whether it was made anew or its leader does not answer, only a new consumer tells.
    SilentTooLong,
}

/// What a queue said since it had a consumer last.
///
/// RabbitMQ asks the leader of a quorum queue, waits a quarter of a second for it, and tells `0 messages, 0 consumers` where no
/// answer comes (`rabbit_quorum_queue:stat`). A queue that was just made anew says the same, so this alone proves nothing. One
/// that holds messages did answer.
#[derive(Debug)]
pub(super) struct Forgotten {
    patience: Duration,
    proven: usize,
    silent_since: Option<Instant>,
}

impl Forgotten {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            proven: 0,
            silent_since: None,
        }
    }

    /// Nobody is missed.
    pub(super) fn is_attended(&self) -> bool {
        self.proven == 0 && self.silent_since.is_none()
    }

    /// It said how many messages are ready and how many consumers there are.
    pub(super) fn told(&mut self, ready: u32, consumers: u32, now: Instant) -> Look {
        if consumers > 0 {
            self.proven = 0;
            self.silent_since = None;
            return Look::Attended;
        }
        if ready > 0 {
            self.proven += 1;
            // One consumer is exchanged for another when the first message that is no redelivery comes.
            return if self.proven > 1 { Look::MadeAnew } else { Look::Again };
        }
        match self.silent_since {
            None => {
                self.silent_since = Some(now);
                Look::Again
            }
            Some(since) if now.duration_since(since) < self.patience => Look::Silent,
            Some(_) => Look::SilentTooLong,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_queue_that_answered_can_have_forgotten() {
        const NOTHING: (u32, u32) = (0, 0);
        const WAITING: (u32, u32) = (7, 0);
        const ATTENDED: (u32, u32) = (0, 1);
        for looks in [
            vec![(0, ATTENDED, Look::Attended), (2, (9, 3), Look::Attended)],
            // A leader that is slow, or frozen until another one leads.
            vec![
                (0, NOTHING, Look::Again),
                (300, NOTHING, Look::Silent),
                (9_999, NOTHING, Look::Silent),
                (10_001, ATTENDED, Look::Attended),
                (10_300, NOTHING, Look::Again),
                (20_299, NOTHING, Look::Silent),
                (20_300, NOTHING, Look::SilentTooLong),
            ],
            // Two answers are proof, whatever was said between.
            vec![(0, WAITING, Look::Again), (300, WAITING, Look::MadeAnew)],
            vec![
                (0, NOTHING, Look::Again),
                (300, NOTHING, Look::Silent),
                (600, WAITING, Look::Again),
                (900, NOTHING, Look::Silent),
                (1_200, WAITING, Look::MadeAnew),
            ],
            // One consumer goes and the next one comes.
            vec![
                (0, WAITING, Look::Again),
                (300, ATTENDED, Look::Attended),
                (2_100, WAITING, Look::Again),
            ],
        ] {
            let mut forgotten = Forgotten::new(Duration::from_secs(10));
            let begin = Instant::now();
            for (number, (at, (ready, consumers), expected)) in looks.iter().enumerate() {
                let now = begin + Duration::from_millis(*at);
                assert_eq!(
                    forgotten.told(*ready, *consumers, now),
                    *expected,
                    "{number} of {looks:?}"
                );
                assert_eq!(
                    forgotten.is_attended(),
                    *expected == Look::Attended,
                    "{number} of {looks:?}"
                );
            }
        }
    }
}
