//! The room that dead letters have, and who is told when it gets short.

use std::collections::BTreeSet;

use crate::{
    config::DeadLetterSettings,
    store::{Store, dead_letter_space::SpaceBounds},
    telemetry::Signal,
};

/// Until so much of the room is free again a collector that had to stop takes nothing: each time it stops, what is in its
/// hands goes back, and counts against its delivery limit.
pub(super) const RESUME_BELOW: f64 = 0.95;

/// What dead letters may take in all.
pub(super) fn bounds(settings: &DeadLetterSettings) -> SpaceBounds {
    SpaceBounds {
        max_rows: settings.max_rows,
        max_bytes: settings.max_bytes,
    }
}

/// Watches what dead letters take, and says once when it is most of what they may.
#[derive(Debug, Default)]
pub struct SpaceWatch {
    /// Those that were said to be near their bound; an empty name with a star before it is all of them together.
    near: BTreeSet<String>,
}

impl SpaceWatch {
    /// From this share on there is an alarm.
    pub const NEAR: f64 = 0.8;
    /// Partners that are looked at, those with the most bytes first.
    const PARTNERS: i64 = 1_000;
    /// In the set, and in words.
    const ALL: &str = "all of them";

    /// Sums up, measures and says.
    pub async fn measure(&mut self, store: &Store, settings: &DeadLetterSettings) {
        // A database that is away is the lanes' to tell.
        let summed = store.sum_dead_letter_space().await;
        let Ok(space) = store.dead_letter_space(Self::PARTNERS).await else {
            return;
        };
        drop(summed);
        let filled = bounds(settings).filled(space.rows, space.bytes);
        let of_one = SpaceBounds {
            max_rows: settings.max_rows_per_partner,
            max_bytes: settings.max_bytes_per_partner,
        };
        let mut near = BTreeSet::new();
        let all = (Self::ALL, space.rows, space.bytes, filled);
        let partners = space.partners.iter().map(|(partner, rows, bytes)| {
            let name = if partner.is_empty() {
                "nobody that can be read"
            } else {
                partner
            };
            (name, *rows, *bytes, of_one.filled(*rows, *bytes))
        });
        for (of, rows, bytes, filled) in std::iter::once(all).chain(partners) {
            // Again at 100 %, where of one partner nothing else changes.
            for (level, word) in [(Self::NEAR, ""), (1.0, " (full)")] {
                if filled >= level {
                    let name = format!("{of}{word}");
                    if !self.near.contains(&name) {
                        let of = name.as_str();
                        Signal::DeadLettersNearBound {
                            of,
                            rows,
                            bytes,
                            filled,
                        }
                        .emit();
                    }
                    near.insert(name);
                }
            }
        }
        let partners_near = space
            .partners
            .iter()
            .filter(|(_, rows, bytes)| of_one.filled(*rows, *bytes) >= Self::NEAR)
            .count();
        Signal::DeadLetterSpace {
            rows: space.rows,
            bytes: space.bytes,
            filled,
            partners_near,
        }
        .emit();
        self.near = near;
    }
}
