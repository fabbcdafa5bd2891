//! What waits at the broker to be dead-lettered. While the broker can not get rid of it, it is in no queue that anybody reads:
//! only its management API, if we are told where that is, shows it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Worker;
use crate::{
    broker::{
        management::Management,
        topology::{self, DeadLettering},
    },
    retry::{self, Waited},
    telemetry::Signal,
};

/// After so long without a moment in which nothing waits there is an alarm: a healthy broker needs seconds at most.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Goes on until the program stops.
pub(super) async fn run(mut worker: Worker) {
    let settings = &worker.settings;
    let interval = settings.broker.management_interval;
    let management = match Management::from_settings(settings) {
        Ok(management) => management,
        Err(error) => {
            let error = error.to_string();
            Signal::ManagementAsked { error: Some(&error) }.emit();
            None
        }
    };
    let mut watch = Watch::default();
    let mut answered = None;
    loop {
        if let Some(management) = &management {
            let waiting = topology::waiting(management).await;
            // Said once, and again when it has changed.
            let error = waiting.as_ref().err().map(ToString::to_string);
            if answered != Some(error.is_none()) {
                answered = Some(error.is_none());
                Signal::ManagementAsked {
                    error: error.as_deref(),
                }
                .emit();
            }
            for one in waiting.iter().flatten() {
                Signal::BrokerDeadLettersMeasured {
                    queue: &one.queue,
                    messages: one.messages,
                }
                .emit();
            }
            if let Ok(waiting) = &waiting {
                for (queue, messages, since) in watch.stuck(waiting, Instant::now()) {
                    Signal::BrokerDeadLettersStuck { queue, messages, since }.emit();
                }
            }
        }
        if retry::sleep(interval, &mut worker.stop).await == Waited::Stopping {
            return;
        }
    }
}

/// Since when something waits, by queue, and whether that was said.
#[derive(Debug, Default)]
struct Watch(BTreeMap<String, (Instant, bool)>);

impl Watch {
    /// Where something waits for too long, once.
    fn stuck<'w>(&mut self, waiting: &'w [DeadLettering], now: Instant) -> Vec<(&'w str, u64, Duration)> {
        self.0
            .retain(|queue, _| waiting.iter().any(|one| one.queue == *queue && one.messages > 0));
        let mut stuck = Vec::new();
        for one in waiting.iter().filter(|one| one.messages > 0) {
            let (since, said) = self.0.entry(one.queue.clone()).or_insert((now, false));
            let waits = now.duration_since(*since);
            if waits >= STUCK_AFTER && !*said {
                *said = true;
                stuck.push((one.queue.as_str(), one.messages, waits));
            }
        }
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_long_is_said_once() {
        let mut watch = Watch::default();
        let begin = Instant::now();
        let waiting = |messages| {
            vec![DeadLettering {
                queue: "settlement.updates".to_owned(),
                messages,
            }]
        };
        for (seconds, messages, expected) in [
            (0, 0, 0),
            (10, 4, 0),
            (69, 4, 0),
            (70, 5, 1),
            (80, 5, 0),
            (90, 0, 0),
            (100, 1, 0),
            (159, 1, 0),
            (160, 1, 1),
        ] {
            let now = begin + Duration::from_secs(seconds);
            assert_eq!(
                watch.stuck(&waiting(messages), now).len(),
                expected,
                "after {seconds} s"
            );
        }
    }
}
