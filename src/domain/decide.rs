//! The table of reasons, walked in one place.

mod effect;
mod why;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use jiff::Timestamp;

use self::{
    effect::{Effect, as_before, contradicts, settle_step},
    why::{NEWER, VOIDED},
};
use super::{
    allocation::Allocation,
    changeset::{Changeset, NewlyParked, Settlement},
    delivery::{Delivery, Source},
    event_id,
    ledger::Transfer,
    message::{Content, MessageRef},
    reason::Reason,
    receipt::{Receipt, ReceiptKey},
    reply::ReplyTo,
    signature::{PublicKey, Signer, Verified},
    snapshot::{Parked, Partner, Rules, Snapshot},
    update::Update,
    verdict::{Judgement, Verdict, VerdictKind},
};
/// Judges a batch in order; each message sees the effects of those before it.
pub fn decide(mut snapshot: Snapshot, batch: &[MessageRef<'_>], rules: &Rules) -> (Vec<Judgement>, Changeset) {
    let partners = std::mem::take(&mut snapshot.partners);
    let mut judging = Judging {
        snapshot,
        partners: &partners,
        rules,
        changes: Changeset::default(),
        new_receipts: BTreeSet::new(),
        changed_receipts: BTreeSet::new(),
    };
    let judgements = batch
        .iter()
        .enumerate()
        .map(|(index, message)| judging.judge(index, *message))
        .collect();
    (judgements, judging.into_changes())
}

/// The snapshot as the batch has changed it so far.
struct Judging<'a> {
    snapshot: Snapshot,
    /// Those of the snapshot: a batch changes none of them.
    partners: &'a HashMap<String, Partner>,
    rules: &'a Rules,
    /// All but the receipts, which stand in the snapshot until the batch is judged.
    changes: Changeset,
    new_receipts: BTreeSet<ReceiptKey>,
    changed_receipts: BTreeSet<ReceiptKey>,
}

impl Judging<'_> {
    fn into_changes(self) -> Changeset {
        let mut receipts = self.snapshot.receipts;
        let mut taken = |keys: BTreeSet<ReceiptKey>| -> BTreeMap<ReceiptKey, Receipt> {
            let each = keys.into_iter();
            each.filter_map(|key| Some((key, receipts.remove(&key)?))).collect()
        };
        Changeset {
            new_receipts: taken(self.new_receipts),
            changed_receipts: taken(self.changed_receipts),
            ..self.changes
        }
    }

    /// One verdict; and whatever it is, a parked message that came to more than waiting waits no more.
    fn judge(&mut self, index: usize, message: MessageRef<'_>) -> Judgement {
        if let Some(verdict) = self.overtaken(message) {
            return Judgement { verdict, proven: true };
        }
        let judgement = self.walk(index, message);
        if let Source::Parked { key, seq, .. } = message.delivery.source
            && judgement.verdict.kind() != VerdictKind::Parked
        {
            if let Some(also) = self
                .snapshot
                .parked
                .get(&ReceiptKey(key))
                .and_then(|parked| parked.also.clone())
            {
                self.changes.also_answered.insert(index, also);
            }
            self.unpark(ReceiptKey(key), seq, message);
        }
        judgement
    }

    /// A parked message that was taken so long ago that another worker judged it, and that another copy waits in its
    /// place by now: that one has its own verdict to come, and this one had it.
    fn overtaken(&self, message: MessageRef<'_>) -> Option<Verdict> {
        let Source::Parked { key, seq, .. } = message.delivery.source else {
            return None;
        };
        let parked = self.snapshot.parked.get(&ReceiptKey(key))?;
        (parked.seq != seq).then_some(Verdict::Parked {
            parked_at: parked.parked_at,
            until: parked.until,
            again: true,
        })
    }

    fn walk(&mut self, index: usize, message: MessageRef<'_>) -> Judgement {
        let content = match &message.facts.content {
            Err(refusal) => {
                return Judgement {
                    verdict: Verdict::Rejected {
                        reason: refusal.reason,
                        detail: refusal.detail.clone(),
                    },
                    proven: false,
                };
            }
            Ok(content) => content,
        };
        if let Some(allocation) = self.settled_before(content) {
            return Judgement {
                verdict: Verdict::Duplicate { allocation },
                proven: true,
            };
        }
        let update = &content.update;
        let key = content.key;
        let partner = self.partners.get(&update.enterprise_id);
        let verified = match self.prove(message, content, partner) {
            Err((reason, detail)) => {
                if let (Reason::SignatureMismatch, Signer::Key(signer), Some(partner)) =
                    (reason, &content.signer, partner)
                    && partner.revoked.contains(signer)
                {
                    self.changes.distrusted.insert((*signer, content.payload_digest));
                }
                let verdict = Verdict::Rejected { reason, detail };
                // A parked message was proven when it was parked: its receipt must not go on saying "parked".
                if message.delivery.source.is_parked()
                    && let Some(receipt) = self.snapshot.receipts.get(&key).cloned()
                {
                    self.put_receipt(message, content, receipt.public_key, &verdict);
                }
                return Judgement { verdict, proven: false };
            }
            Ok(verified) => verified,
        };
        self.judge_proven(index, message, content, &verified, partner)
    }

    /// Money that moved is never called rejected: a settled receipt of the same signed text, by the key kept in it, answers
    /// before the registry is asked.
    fn settled_before(&mut self, content: &Content) -> Option<Arc<Allocation>> {
        let update = &content.update;
        let key = content.signed_key.unwrap_or(content.key);
        let receipt = self.snapshot.receipts.get(&key)?;
        if receipt.verdict != VerdictKind::Settled || receipt.payload_digest != content.payload_digest {
            return None;
        }
        Verified::verify(update, &content.signer, &[receipt.public_key]).ok()?;
        let allocation = Arc::clone(self.snapshot.allocations.get(&receipt.allocation_id)?);
        self.touch_receipt(key);
        Some(allocation)
    }

    /// Whether the API sent it, which has seen a token of the enterprise in the routing key. The broker lets nobody else set this
    /// login.
    fn is_of_the_api(&self, message: MessageRef<'_>) -> bool {
        let sender = message.delivery.properties.user_id.as_ref();
        sender.is_some_and(|sender| self.rules.api_users.contains(sender))
    }

    /// Steps 4 to 8.
    fn prove<'c>(
        &self,
        message: MessageRef<'_>,
        content: &'c Content,
        partner: Option<&Partner>,
    ) -> Result<Verified<&'c Update>, (Reason, String)> {
        let Some(partner) = partner else {
            return Err((
                Reason::UnknownPartner,
                "no partner of this enterprise id is registered".into(),
            ));
        };
        if let Some(user) = &partner.broker_user
            && message.delivery.properties.user_id.as_ref() != Some(user)
            && !self.is_of_the_api(message)
        {
            return Err((
                Reason::SenderMismatch,
                "the user_id property is not the broker user that this partner is bound to".into(),
            ));
        }
        let verified = Verified::verify(&content.update, &content.signer, &partner.keys).map_err(|unverified| {
            let detail = why::why_unverified(&self.snapshot, &unverified, content, partner);
            (unverified.reason(), detail)
        })?;
        if self
            .snapshot
            .distrusted
            .contains(&(verified.key(), content.payload_digest))
        {
            return Err((
                Reason::SignatureMismatch,
                "it was signed with a key that was revoked when it came first, and stays refused: sign it anew, with a \
                 new nonce"
                    .into(),
            ));
        }
        match &content.agreement {
            Err(detail) => Err((Reason::PayloadMismatch, detail.clone())),
            Ok(()) => Ok(verified),
        }
    }

    /// From step 9 on: the sender is proven, so a receipt is kept.
    fn judge_proven(
        &mut self,
        index: usize,
        message: MessageRef<'_>,
        content: &Arc<Content>,
        verified: &Verified<&Update>,
        partner: Option<&Partner>,
    ) -> Judgement {
        let update = *verified.get();
        let key = content.key;
        let proven = |verdict| Judgement { verdict, proven: true };

        if let Some(receipt) = self.snapshot.receipts.get(&key)
            && receipt.payload_digest != content.payload_digest
        {
            let (reason, detail) = if receipt.voided {
                VOIDED
            } else {
                (Reason::NonceReused, "nonce: this partner used it with another payload")
            };
            return proven(Verdict::Rejected {
                reason,
                detail: detail.into(),
            });
        }
        if let Some(verdict) = why::refused_by_newer(&self.snapshot, key) {
            self.touch_receipt(key);
            return proven(verdict);
        }
        if let Some((reason, detail)) = why::spent(&self.snapshot, update, key) {
            let detail = detail.into();
            let verdict = Verdict::Rejected { reason, detail };
            self.put_receipt(message, content, verified.key(), &verdict);
            return proven(verdict);
        }
        let due = message.delivery.source.is_parked();
        // A contradiction comes first (step 10): the same payload may wait with another policyResult around it, unsigned.
        if !due
            && !contradicts(update)
            && let Some(parked) = self.snapshot.parked.get_mut(&key)
        {
            // The first one that waits is answered by itself; of those that ask after it, the newest.
            if let Some(reply) = ReplyTo::of(message)
                && parked.also.as_ref() != Some(&reply)
            {
                parked.also = Some(reply.clone());
                self.changes.asked_again.insert(key, reply);
            }
            return proven(Verdict::Parked {
                parked_at: parked.parked_at,
                until: parked.until,
                again: true,
            });
        }
        let newer = why::waits_for_newer(&self.snapshot, key).filter(|_| due);
        let step = match newer {
            Some(_) => Effect::NotFound,
            None => as_before(&self.snapshot, key, settle_step(&self.snapshot, key, update, partner)),
        };
        if let Effect::NotFound = step
            && let Some(verdict) = self.park(index, message, content, verified.key(), key)
        {
            return proven(verdict);
        }
        let verdict = match step {
            Effect::NotFound => {
                let detail = why::why_not_found(&self.snapshot, self.rules, update, size_of(message.delivery), due);
                let reason = newer.unwrap_or(Reason::AllocationNotFound);
                let detail = if newer.is_some() { NEWER } else { detail };
                let detail = detail.into();
                Verdict::Rejected { reason, detail }
            }
            Effect::Refused(reason, detail) => Verdict::Rejected { reason, detail },
            Effect::AlreadySo(allocation) => Verdict::Duplicate { allocation },
            Effect::Settles(allocation, transfer) => {
                self.settle(content, verified.key(), &allocation, transfer);
                Verdict::Settled { allocation }
            }
        };
        self.put_receipt(message, content, verified.key(), &verdict);
        proven(verdict)
    }

    fn settle(
        &mut self,
        content: &Arc<Content>,
        public_key: PublicKey,
        allocation: &Arc<Allocation>,
        transfer: Transfer,
    ) {
        for (account, change) in transfer.entries() {
            let balance = self.changes.balances.entry(account).or_default();
            #[expect(clippy::arithmetic_side_effects, reason = "BigInt is unbounded")]
            {
                *balance += change;
            }
        }
        self.snapshot.allocations.insert(allocation.id, Arc::clone(allocation));
        self.changes.settlements.push(Settlement {
            allocation: Arc::clone(allocation),
            transfer,
            content: Arc::clone(content),
            public_key,
        });
    }

    /// Parks a message, or lets it wait on. None when its time or its partner's share is up.
    fn park(
        &mut self,
        index: usize,
        message: MessageRef<'_>,
        content: &Content,
        public_key: PublicKey,
        key: ReceiptKey,
    ) -> Option<Verdict> {
        let now = self.snapshot.now;
        let update = &content.update;
        if message.delivery.source.is_parked() {
            let parked = self.snapshot.parked.get_mut(&key)?;
            if now >= parked.until {
                return None;
            }
            parked.attempts = parked.attempts.saturating_add(1);
            let due_at = self.rules.due_at(now, parked.attempts, parked.until);
            self.changes.parked_later.insert(key, (parked.attempts, due_at));
            return Some(Verdict::Parked {
                parked_at: parked.parked_at,
                until: parked.until,
                again: true,
            });
        }
        let count = self
            .snapshot
            .parked_counts
            .entry(update.enterprise_id.clone())
            .or_default();
        if *count >= self.rules.park_max_per_partner {
            return None;
        }
        let size = size_of(message.delivery);
        let bytes = self
            .snapshot
            .parked_bytes
            .entry(update.enterprise_id.clone())
            .or_default();
        let (with, with_all) = (
            bytes.saturating_add(size),
            self.snapshot.parked_bytes_of_all.saturating_add(size),
        );
        if with > self.rules.park_max_bytes_per_partner || with_all > self.rules.park_max_bytes {
            return None;
        }
        *bytes = with;
        self.snapshot.parked_bytes_of_all = with_all;
        *count = count.saturating_add(1);
        let until = now.saturating_add(self.rules.park_deadline).unwrap_or(Timestamp::MAX);
        // Judged once more when it ends by its own word.
        let until = update.expires_at.map_or(until, |end| until.min(end));
        let parked = Parked {
            seq: 0,
            parked_at: now,
            until,
            attempts: 0,
            also: None,
        };
        let due_at = self.rules.due_at(now, 0, until);
        self.snapshot.parked.insert(key, parked.clone());
        self.changes.newly_parked.insert(
            key,
            NewlyParked {
                key,
                index,
                enterprise_id: update.enterprise_id.clone(),
                nonce: update.nonce.clone(),
                allocation_id: update.id,
                parked,
                due_at,
                bytes: size,
            },
        );
        let verdict = Verdict::Parked {
            parked_at: now,
            until,
            again: false,
        };
        self.put_receipt(message, content, public_key, &verdict);
        Some(verdict)
    }

    /// Ends the waiting, and makes room for another message of the partner.
    fn unpark(&mut self, key: ReceiptKey, seq: i64, message: MessageRef<'_>) {
        if self.snapshot.parked.remove(&key).is_some()
            && let Some(id) = message.facts.enterprise_id.as_deref()
        {
            let size = size_of(message.delivery);
            if let Some(count) = self.snapshot.parked_counts.get_mut(id) {
                *count = count.saturating_sub(1);
            }
            if let Some(bytes) = self.snapshot.parked_bytes.get_mut(id) {
                *bytes = bytes.saturating_sub(size);
            }
            self.snapshot.parked_bytes_of_all = self.snapshot.parked_bytes_of_all.saturating_sub(size);
        }
        self.changes.parked_later.remove(&key);
        self.changes.asked_again.remove(&key);
        // A row that this batch made is not made; one that was there is taken away.
        if self.changes.newly_parked.remove(&key).is_none() {
            self.changes.unparked.insert(key, seq);
        }
    }

    /// A receipt takes the newest verdict, unless it is closed.
    fn put_receipt(&mut self, message: MessageRef<'_>, content: &Content, public_key: PublicKey, verdict: &Verdict) {
        let update = &content.update;
        let key = content.key;
        let earlier = self.snapshot.receipts.get(&key);
        if earlier.is_some_and(Receipt::is_closed) {
            self.touch_receipt(key);
            return;
        }
        let receipt = Receipt {
            enterprise_id: update.enterprise_id.clone(),
            nonce: update.nonce.clone(),
            payload_digest: content.payload_digest,
            message_digest: message.facts.message_digest,
            verdict: verdict.kind(),
            reason: verdict.reason(),
            allocation_id: update.id,
            event_id: event_id::id_of(message, update, verdict),
            public_key,
            first_seen: earlier.map_or(self.snapshot.now, |receipt| receipt.first_seen),
            last_seen: self.snapshot.now,
            voided: earlier.is_some_and(|receipt| receipt.voided),
        };
        let was_there = self.snapshot.receipts.insert(key, receipt).is_some();
        self.note_receipt(key, was_there);
    }

    fn touch_receipt(&mut self, key: ReceiptKey) {
        if let Some(receipt) = self.snapshot.receipts.get_mut(&key) {
            receipt.last_seen = self.snapshot.now;
            self.note_receipt(key, true);
        }
    }

    fn note_receipt(&mut self, key: ReceiptKey, was_there: bool) {
        if was_there && !self.new_receipts.contains(&key) {
            self.changed_receipts.insert(key);
        } else {
            self.new_receipts.insert(key);
        }
    }
}

/// Bytes of a message, as far as it is kept.
fn size_of(delivery: &Delivery) -> u64 {
    let bytes = delivery.body.len().saturating_add(delivery.properties.sent_wire_len());
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
