//! How full the side room is, in numbers and in words: for `/readyz`, the gauges and `settled doctor`.

use std::time::Duration;

use crate::{config::HeldSettings, store::held::HeldTotal, telemetry::Signal};

/// From this share on there is something to say.
pub const NEAR: f64 = 0.8;

/// What is held, and how much of what may be held that is.
#[derive(Clone, Debug, PartialEq)]
pub struct Fill {
    pub messages: u64,
    /// Since when the oldest waits.
    pub oldest: Duration,
    /// Of all bounds, the share of the one that is nearest ...
    pub filled: f64,
    /// ... and whose it is.
    pub of: String,
}

#[expect(clippy::cast_precision_loss, reason = "a share, to be compared with 80 %")]
fn share(of: u64, most: u64) -> f64 {
    // Where nothing may be held nothing is; what is there nevertheless is from before.
    if most == 0 { 1.0 } else { of as f64 / most as f64 }
}

impl Fill {
    pub fn measure(held: &HeldSettings, totals: &[HeldTotal]) -> Self {
        let sum = |totals: &[&HeldTotal]| {
            let messages: u64 = totals.iter().map(|total| total.messages).sum();
            let bytes: u64 = totals.iter().map(|total| total.bytes).sum();
            (messages, bytes)
        };
        let (messages, bytes) = sum(&totals.iter().collect::<Vec<_>>());
        let mut room = Self {
            messages,
            oldest: totals.iter().map(|total| total.oldest).max().unwrap_or_default(),
            filled: share(messages, held.max_messages).max(share(bytes, held.max_bytes)),
            of: "all of them".to_owned(),
        };
        if messages == 0 {
            room.filled = 0.0;
        }
        for total in totals {
            let of_one: Vec<&HeldTotal> = totals.iter().filter(|other| other.whose == total.whose).collect();
            let (messages, bytes) = sum(&of_one);
            let filled = share(messages, held.max_messages_per_partner).max(share(bytes, held.max_bytes_per_partner));
            if filled > room.filled {
                room.filled = filled;
                room.of = total
                    .whose
                    .clone()
                    .unwrap_or_else(|| "strangers and malformed ones".to_owned());
            }
        }
        room
    }

    /// What there is to know; nothing where nothing is held.
    pub fn sentence(&self) -> Option<String> {
        if self.messages == 0 {
            return None;
        }
        let messages = match self.messages {
            1 => "1 message is".to_owned(),
            several => format!("{several} messages are"),
        };
        let sentence = format!(
            "{messages} held to be judged later, the oldest for {} s",
            self.oldest.as_secs()
        );
        Some(if self.filled >= 1.0 {
            format!(
                "{sentence}; the room for {} is full: more of theirs is judged in line",
                self.of
            )
        } else if self.filled >= NEAR {
            format!(
                "{sentence}; the room for {} is {:.0} % full",
                self.of,
                self.filled * 100.0
            )
        } else {
            sentence
        })
    }
}

/// Says when the room gets full, and when it has room again.
#[derive(Debug, Default)]
pub(super) struct FillWatch {
    full: bool,
}

impl FillWatch {
    pub(super) fn look(&mut self, room: &Fill) {
        let filled = room.filled;
        Signal::HeldFilled { filled }.emit();
        // Between the two it stays what it was, so that a room at its bound is said once.
        if room.filled >= 1.0 && !self.full {
            self.full = true;
            let of = room.of.as_str();
            Signal::HeldFull {
                of,
                messages: room.messages,
            }
            .emit();
        } else if room.filled < NEAR && self.full {
            self.full = false;
            Signal::HeldHasRoom.emit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Settings, Sources},
        store::held::HeldWhy,
    };

    #[test]
    fn the_nearest_bound_counts() {
        let sources = Sources {
            file: None,
            environment: std::iter::empty(),
            flags: Vec::new(),
        };
        let mut held = Settings::load(sources).expect("the defaults").held;
        (held.max_messages, held.max_messages_per_partner) = (100, 20);
        (held.max_bytes, held.max_bytes_per_partner) = (1_000, 500);
        let total = |whose: Option<&str>, why, messages, bytes| HeldTotal {
            whose: whose.map(str::to_owned),
            why,
            messages,
            bytes,
            oldest: Duration::from_secs(messages),
        };
        let none = Fill::measure(&held, &[]);
        assert_eq!((none.messages, none.filled, none.sentence()), (0, 0.0, None));
        for (totals, filled, of, words) in [
            (
                vec![total(Some("a"), HeldWhy::Share, 2, 100)],
                0.2,
                "a",
                "the oldest for 2 s",
            ),
            (
                vec![
                    total(Some("a"), HeldWhy::Share, 10, 10),
                    total(Some("a"), HeldWhy::Locked, 8, 10),
                ],
                0.9,
                "a",
                "the room for a is 90 % full",
            ),
            (
                vec![total(None, HeldWhy::Share, 20, 10)],
                1.0,
                "strangers and malformed ones",
                "is full: more of theirs is judged in line",
            ),
            (
                vec![
                    total(Some("a"), HeldWhy::Share, 1, 450),
                    total(Some("b"), HeldWhy::Rate, 1, 500),
                ],
                1.0,
                "b",
                "the room for b is full",
            ),
            (
                vec![
                    total(Some("a"), HeldWhy::Share, 1, 450),
                    total(Some("b"), HeldWhy::Rate, 1, 450),
                    total(Some("c"), HeldWhy::Rate, 1, 100),
                ],
                1.0,
                "all of them",
                "the room for all of them is full",
            ),
        ] {
            let room = Fill::measure(&held, &totals);
            assert!((room.filled - filled).abs() < 1e-9 && room.of == of, "{room:?}");
            let sentence = room.sentence().expect("something is held");
            assert!(sentence.contains(words), "{sentence}");
        }
        held.max_messages = 0;
        assert_eq!(Fill::measure(&held, &[]).filled, 0.0);
    }
}
