//! Whether a queue forgot its consumer, judged by what it says of itself.

use std::time::{Duration, Instant};

/// What one look at a queue told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attendance {
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
    pub(super) fn told(&mut self, ready: u32, consumers: u32, now: Instant) -> Attendance {
        if consumers > 0 {
            self.proven = 0;
            self.silent_since = None;
            return Attendance::Attended;
        }
        if ready > 0 {
            self.proven += 1;
            // One consumer is exchanged for another when the first message that is no redelivery comes.
            return if self.proven > 1 {
                Attendance::MadeAnew
            } else {
                Attendance::Again
            };
        }
        match self.silent_since {
            None => {
                self.silent_since = Some(now);
                Attendance::Again
            }
            Some(since) if now.duration_since(since) < self.patience => Attendance::Silent,
            Some(_) => Attendance::SilentTooLong,
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
            vec![(0, ATTENDED, Attendance::Attended), (2, (9, 3), Attendance::Attended)],
            // A leader that is slow, or frozen until another one leads.
            vec![
                (0, NOTHING, Attendance::Again),
                (300, NOTHING, Attendance::Silent),
                (9_999, NOTHING, Attendance::Silent),
                (10_001, ATTENDED, Attendance::Attended),
                (10_300, NOTHING, Attendance::Again),
                (20_299, NOTHING, Attendance::Silent),
                (20_300, NOTHING, Attendance::SilentTooLong),
            ],
            // Two answers are proof, whatever was said between.
            vec![(0, WAITING, Attendance::Again), (300, WAITING, Attendance::MadeAnew)],
            vec![
                (0, NOTHING, Attendance::Again),
                (300, NOTHING, Attendance::Silent),
                (600, WAITING, Attendance::Again),
                (900, NOTHING, Attendance::Silent),
                (1_200, WAITING, Attendance::MadeAnew),
            ],
            // One consumer goes and the next one comes.
            vec![
                (0, WAITING, Attendance::Again),
                (300, ATTENDED, Attendance::Attended),
                (2_100, WAITING, Attendance::Again),
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
                    *expected == Attendance::Attended,
                    "{number} of {looks:?}"
                );
            }
        }
    }
}
