//! Keys, as they are used: when each proved a message last, written down now and then; and whose last key ends soon, which is
//! told the world too.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use super::Worker;
use crate::{
    domain::signature::PublicKey,
    retry::{self, Waited},
    settle::{Answered, Batch},
    store::registry::EndingPartner,
    telemetry::Signal,
};

/// When keys proved messages, as far as it is not written down yet. As many as are registered, at most.
#[derive(Debug, Default)]
pub struct KeyUses {
    since: Mutex<HashMap<PublicKey, Instant>>,
}

impl KeyUses {
    /// What a batch was proven by.
    pub(super) fn add(&self, batch: &Batch, answered: &Answered) {
        let proven = batch.messages().iter().zip(&answered.answers);
        let proven = proven.filter(|(_, answer)| answer.judgement.proven);
        let signers = proven.filter_map(|(message, _)| message.facts.content.as_ref().ok()?.signer.key());
        // Nearly always the same one or a few, so that the lock is taken once.
        let mut keys: Vec<PublicKey> = Vec::new();
        for key in signers {
            if keys.last() != Some(&key) && !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.extend(keys.into_iter().map(|key| (key, now)));
    }

    fn take(&self) -> HashMap<PublicKey, Instant> {
        std::mem::take(&mut *self.since.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// They could not be written down; what was used since is newer.
    fn put_back(&self, uses: HashMap<PublicKey, Instant>) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, at) in uses {
            since.entry(key).or_insert(at);
        }
    }
}

/// Goes on until the program stops, and writes down once more then. A database that is away is the lanes' to tell.
pub(super) async fn run(mut worker: Worker) {
    let mut told: BTreeMap<String, EndingPartner> = BTreeMap::new();
    loop {
        note(&worker).await;
        let store = &worker.clerk.store;
        if let Ok(ending) = store.keys_ending(worker.settings.registry.key_warn_before).await {
            Signal::KeysEnding { partners: ending.len() }.emit();
            let is_new = |one: &&EndingPartner| told.get(&one.enterprise_id) != Some(one);
            let new: Vec<EndingPartner> = ending.iter().filter(is_new).cloned().collect();
            for one in &new {
                let ends_at = one.ends_at.to_string();
                Signal::LastKeyEnds {
                    enterprise_id: &one.enterprise_id,
                    ends_at: &ends_at,
                }
                .emit();
            }
            // Where it can not be written to be told, it is new the next time as well.
            if store.tell_keys_ending(&new).await.is_ok() {
                told = ending.into_iter().map(|one| (one.enterprise_id.clone(), one)).collect();
            }
        }
        let interval = worker.settings.registry.key_use_interval;
        if retry::sleep(interval, &mut worker.stop).await == Waited::Stopping {
            note(&worker).await;
            return;
        }
    }
}

async fn note(worker: &Worker) {
    let uses = worker.key_uses.take();
    let ago: Vec<_> = uses.iter().map(|(key, at)| (*key, at.elapsed())).collect();
    if worker.clerk.store.note_key_uses(&ago).await.is_err() {
        worker.key_uses.put_back(uses);
    }
}
