//! Dead letters of workers that were taken from their queue, against what their batches published.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    cause::MadeBy,
    filing::{Arrival, Known},
};

/// How many letters of workers these are, by when they failed, which is the time of their batch. A copy counts once, as far
/// as its row tells: one too many would hide a letter that never came, one too few would cry for one that did.
pub fn taken(known: &BTreeMap<Uuid, Known>, arrivals: &[Arrival<'_>]) -> BTreeMap<Timestamp, u32> {
    let mut seen = BTreeSet::new();
    let mut taken = BTreeMap::new();
    for arrival in arrivals {
        let (MadeBy::Settled, Some(failed_at)) = (arrival.cause.made_by, arrival.cause.failed_at) else {
            continue;
        };
        let id = arrival.id();
        let is_copy = known
            .get(&id)
            .is_some_and(|known| [known.first_failed_at, known.last_failed_at].contains(&failed_at));
        if !is_copy && seen.insert((id, failed_at)) {
            let count: &mut u32 = taken.entry(failed_at).or_default();
            *count = count.saturating_add(1);
        }
    }
    taken
}
