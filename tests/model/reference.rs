//! The reference: what the public contract says of one message after another, written from its prose and tables and
//! from nothing else. It is slow, plain and without bounds, and shares nothing with the program: it names no type and no
//! function of it (`the_reference_asks_the_program_nothing` holds that). It has no batches, no snapshots, no crashes: what
//! committed is told to it, message by message, and it says what must have come of it.

use std::collections::{BTreeMap, BTreeSet};

use num_bigint::BigInt;
use serde_json::{Value, json};
use uuid::Uuid;

/// Milliseconds since 2026-01-02T00:00:00Z. A schedule never reaches the next day.
pub(crate) type Millis = u64;

/// RFC 3339, UTC, milliseconds.
pub(crate) fn rfc3339(time: Millis) -> String {
    let (seconds, millis) = (time / 1_000, time % 1_000);
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    assert!(hours < 24, "a schedule ends before midnight");
    format!("2026-01-02T{hours:02}:{minutes:02}:{:02}.{millis:03}Z", seconds % 60)
}

/// How long a message waits for its allocation.
pub(crate) const PARK_DEADLINE: Millis = 20_000;
/// Messages of one partner that may wait.
pub(crate) const PARK_MAX: usize = 2;

/// A key, by number.
pub(crate) type Key = u8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Allocation,
    Deallocation,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Allocation => "allocation",
            Kind::Deallocation => "deallocation",
        }
    }
}

/// The fields of a message: what the body says, or what was signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) kind: Kind,
    pub(crate) id: Uuid,
    pub(crate) currency: &'static str,
    pub(crate) quantity: &'static str,
    pub(crate) client: Uuid,
    pub(crate) connection: Uuid,
    pub(crate) partners_client: &'static str,
    pub(crate) partners_connection: &'static str,
    pub(crate) partners_id: &'static str,
    /// The rejectReason; without one it is cleared.
    pub(crate) released: Option<&'static str>,
    pub(crate) nonce: &'static str,
    /// The three that the partners of these schedules do not sign.
    pub(crate) evaluation: Option<&'static str>,
    pub(crate) approval: Option<&'static str>,
    pub(crate) policy: Option<&'static str>,
    /// When it ends, in the payload only: as it is written, and what that means.
    pub(crate) expires: Option<(&'static str, Millis)>,
}

impl Fields {
    fn status(&self) -> &'static str {
        if self.released.is_some() { "released" } else { "cleared" }
    }

    fn contradicts(&self) -> bool {
        self.released.is_none()
            && self
                .policy
                .is_some_and(|policy| policy.eq_ignore_ascii_case("rejected"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signature {
    Malformed,
    /// No point can be recovered.
    Nobody,
    By(Key),
}

/// One message as the contract sees it. It is written down when the message is made, never read from its bytes.
#[derive(Clone, Debug)]
pub(crate) struct Word {
    pub(crate) routing_key: &'static str,
    /// Null where the routing key has another form.
    pub(crate) enterprise: Option<&'static str>,
    /// SHA-256 of the body, in hexadecimal.
    pub(crate) digest: String,
    /// The reason of step 1, 2 or 3 that applies, and the field that the detail must name.
    pub(crate) broken: Option<(&'static str, Option<&'static str>)>,
    pub(crate) said: Fields,
    pub(crate) signed: Fields,
    /// SHA-256 of the payload, in hexadecimal.
    pub(crate) payload: String,
    pub(crate) signature: Signature,
    /// The signature's text, as kept with a settlement.
    pub(crate) signature_text: String,
    pub(crate) user_id: Option<&'static str>,
    pub(crate) message_id: Option<&'static str>,
    pub(crate) reply_to: Option<&'static str>,
}

/// How a message is judged: as it comes from the queue, or as a parked one that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    Queue,
    Due,
}

#[derive(Clone, Debug)]
pub(crate) struct Partner {
    pub(crate) user: Option<&'static str>,
    pub(crate) suspended: bool,
    pub(crate) allocations: bool,
    pub(crate) deallocations: bool,
    pub(crate) keys: Vec<Validity>,
    /// What it calls the currencies: symbol and currency.
    pub(crate) symbols: &'static [(&'static str, &'static str)],
}

impl Partner {
    /// Why an amount that is named so is not of the currency that was reserved.
    fn misnames(&self, symbol: &str, reserved: &str) -> Option<&'static str> {
        let meant = self.symbols.iter().find(|(name, _)| *name == symbol);
        let currency = meant.map_or(symbol, |(_, currency)| currency);
        let has_own = self.symbols.iter().any(|(name, currency)| name != currency);
        let reserved_is_named = self.symbols.iter().any(|(_, currency)| *currency == reserved);
        match () {
            () if currency == reserved => None,
            () if !has_own || meant.is_some_and(|(name, currency)| name == currency) => Some("allocation_mismatch"),
            () if meant.is_none() && !reserved_is_named => Some("currency_unmapped"),
            () => Some("currency_mismatch"),
        }
    }
}

/// A key, from when and until when; it may be taken back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Validity {
    pub(crate) key: Key,
    pub(crate) from: Millis,
    pub(crate) until: Option<Millis>,
    pub(crate) revoked: bool,
}

impl Validity {
    pub(crate) fn holds_at(&self, now: Millis) -> bool {
        !self.revoked && self.from <= now && self.until.is_none_or(|until| now < until)
    }
}

/// What the custody system reserves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reservation {
    pub(crate) id: Uuid,
    pub(crate) kind: Kind,
    pub(crate) enterprise: &'static str,
    pub(crate) currency: &'static str,
    pub(crate) quantity: &'static str,
    pub(crate) client: Uuid,
    pub(crate) connection: Uuid,
    pub(crate) partners_client: &'static str,
    pub(crate) partners_connection: &'static str,
    pub(crate) external_id: &'static str,
    pub(crate) notes: Option<&'static str>,
    pub(crate) reason: Option<&'static str>,
    pub(crate) retriable: bool,
}

pub(crate) const INITIATED_BY: &str = "user-1";
pub(crate) const AWAITING: &str = "awaiting the partner's update";

/// An allocation as the books have it.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) reservation: Reservation,
    pub(crate) status: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) retriable: bool,
    pub(crate) created: Millis,
    pub(crate) updated: Millis,
    /// What settled it.
    pub(crate) settled: Option<Settled>,
}

#[derive(Clone, Debug)]
pub(crate) struct Settled {
    pub(crate) partners_id: &'static str,
    /// By which symbol of the partner's own.
    pub(crate) symbol: Option<&'static str>,
    pub(crate) nonce: &'static str,
    pub(crate) evaluation: Option<&'static str>,
    pub(crate) approval: Option<&'static str>,
    pub(crate) policy: Option<String>,
    pub(crate) payload: String,
    pub(crate) signature: String,
    pub(crate) key: Key,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Receipt {
    pub(crate) payload: String,
    pub(crate) message: String,
    pub(crate) verdict: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) allocation: Uuid,
    pub(crate) event: Uuid,
    pub(crate) key: Key,
    pub(crate) first: Millis,
    pub(crate) last: Millis,
    /// An operator made the nonce unusable.
    pub(crate) voided: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) parked_at: Millis,
    pub(crate) until: Millis,
}

/// The kind of an account, its owner and its currency.
pub(crate) type Account = (&'static str, Option<Uuid>, &'static str);

/// What must have come of one message.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) verdict: &'static str,
    pub(crate) reason: Option<&'static str>,
    /// The field that the detail begins with.
    pub(crate) names: Option<&'static str>,
    /// The event that tells it; its `detail` is left open.
    pub(crate) event: Value,
    pub(crate) event_id: Uuid,
    pub(crate) routing_key: String,
    /// Nothing is published for a message that waits already.
    pub(crate) published: bool,
    /// A dead letter goes out, and not by the broker itself.
    pub(crate) dead: bool,
    /// The queue that is answered to.
    pub(crate) reply: Option<&'static str>,
}

/// Reason, class, final.
pub(crate) const REASONS: [(&str, u16, bool); 19] = [
    ("message_too_large", 400, true),
    ("malformed_message", 400, true),
    ("invalid_field", 400, true),
    ("unknown_partner", 401, false),
    ("sender_mismatch", 403, false),
    ("malformed_signature", 401, true),
    ("signature_mismatch", 401, false),
    ("payload_mismatch", 400, true),
    ("nonce_voided", 409, true),
    ("nonce_reused", 409, true),
    ("expired_update", 408, true),
    ("policy_contradiction", 400, false),
    ("partner_inactive", 403, false),
    ("allocation_not_found", 404, false),
    ("not_permitted", 403, true),
    ("currency_unmapped", 500, false),
    ("currency_mismatch", 409, false),
    ("allocation_mismatch", 409, true),
    ("already_settled", 409, true),
];

/// Class and finality.
pub(crate) fn class_of(reason: &str) -> (u16, bool) {
    let row = REASONS
        .iter()
        .find(|(name, ..)| *name == reason)
        .expect("a reason of the table");
    (row.1, row.2)
}

fn is_final(reason: Option<&str>) -> bool {
    reason.is_some_and(|reason| class_of(reason).1)
}

/// Events.
fn uuid_of(name: &str) -> Uuid {
    let namespace = Uuid::from_u128(0x6f1d_0c52_0e0b_5c7e_9a53_3c1c_8a2d_7f10);
    Uuid::new_v5(&namespace, name.as_bytes())
}

/// The whole state, as the words of the contract have it.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub(crate) now: Millis,
    pub(crate) partners: BTreeMap<&'static str, Partner>,
    pub(crate) allocations: BTreeMap<Uuid, Record>,
    /// By enterprise and nonce.
    pub(crate) receipts: BTreeMap<(&'static str, &'static str), Receipt>,
    pub(crate) waiting: BTreeMap<(&'static str, &'static str), Waiting>,
    /// Key and payload of what was refused because the key was revoked then.
    pub(crate) distrusted: BTreeSet<(Key, String)>,
    pub(crate) balances: BTreeMap<Account, BigInt>,
}

/// Why a message is refused: the reason, and the field that its detail names.
type Refusal = (&'static str, Option<&'static str>);

impl Books {
    pub(crate) fn reserve(&mut self, reservation: Reservation) {
        if self.allocations.contains_key(&reservation.id) {
            return;
        }
        let record = Record {
            reservation,
            status: "reserved",
            reason: Some(reservation.reason.unwrap_or(AWAITING)),
            retriable: reservation.retriable,
            created: self.now,
            updated: self.now,
            settled: None,
        };
        self.transfer(&record, "reserved");
        self.allocations.insert(reservation.id, record);
    }

    /// `settled nonce void`: of a proven nonce that has not settled, and is not refused for good.
    pub(crate) fn void(&mut self, enterprise: &'static str, nonce: &'static str) {
        if let Some(receipt) = self.receipts.get_mut(&(enterprise, nonce))
            && ["parked", "rejected"].contains(&receipt.verdict)
            && !is_final(receipt.reason)
        {
            receipt.voided = true;
        }
    }

    /// The table of transfers.
    fn transfer(&mut self, record: &Record, event: &str) {
        let Reservation {
            kind,
            client,
            connection,
            currency,
            quantity,
            ..
        } = record.reservation;
        let available = ("available", Some(client), currency);
        let held = ("held", Some(connection), currency);
        let allocated = ("allocated", Some(connection), currency);
        let (debit, credit) = match (event, kind) {
            ("reserved", Kind::Allocation) => (available, held),
            ("reserved", Kind::Deallocation) => (allocated, held),
            ("cleared", Kind::Allocation) => (held, allocated),
            ("cleared", Kind::Deallocation) => (held, available),
            ("released", Kind::Allocation) => (held, available),
            ("released", Kind::Deallocation) => (held, allocated),
            _ => panic!("no transfer {event}"),
        };
        self.move_funds(debit, credit, quantity);
    }

    pub(crate) fn move_funds(&mut self, debit: Account, credit: Account, quantity: &str) {
        let quantity: BigInt = quantity.parse().expect("a number");
        *self.balances.entry(debit).or_default() -= &quantity;
        *self.balances.entry(credit).or_default() += quantity;
    }

    /// One message: the verdict, and the books after it.
    pub(crate) fn judge(&mut self, word: &Word, door: Door) -> Answer {
        // Steps 1 to 3.
        if let Some(refusal) = word.broken {
            return self.reject(word, refusal, false);
        }
        let enterprise = word.enterprise.expect("a message that is not broken has a routing key");
        // "Duplicate": before step 4, whatever the registry says now. What counts is what was signed.
        let now = self.now;
        if let Some(receipt) = self.receipts.get_mut(&(enterprise, word.signed.nonce))
            && receipt.verdict == "settled"
            && receipt.payload == word.payload
            && word.signature == Signature::By(receipt.key)
        {
            receipt.last = now;
            let allocation = receipt.allocation;
            if door == Door::Due {
                self.waiting.remove(&(enterprise, word.said.nonce));
            }
            return self.settlement(word, "duplicate", allocation);
        }
        let slot = (enterprise, word.said.nonce);
        // Steps 4 to 8.
        let key = match self.prove(word, enterprise) {
            Ok(key) => key,
            Err(refusal) => {
                // Nothing that a stranger sends touches the receipts; a message that was parked was proven then.
                if door == Door::Due {
                    self.waiting.remove(&slot);
                    if let Some(key) = self.receipts.get(&slot).map(|receipt| receipt.key) {
                        self.keep_receipt(word, slot, key, "rejected", Some(refusal.0));
                    }
                }
                return self.reject(word, refusal, false);
            }
        };
        // Step 9. The first receipt stays as it is.
        let receipt = self.receipts.get(&slot);
        let is_voided = receipt.is_some_and(|receipt| receipt.voided);
        if receipt.is_some_and(|receipt| receipt.payload != word.payload) {
            let refusal = if is_voided { "nonce_voided" } else { "nonce_reused" };
            if door == Door::Due {
                self.waiting.remove(&slot);
            }
            return self.reject(word, (refusal, Some("nonce")), true);
        }
        // A nonce that is unusable, and what has ended by its own word; but a duplicate stays one.
        let is_over = word.signed.expires.is_some_and(|(_, end)| end <= self.now);
        let refusal = if is_voided {
            Some(("nonce_voided", Some("nonce")))
        } else if is_over && receipt.is_none_or(|receipt| receipt.verdict != "duplicate") {
            Some(("expired_update", Some("expiresAt")))
        } else {
            None
        };
        if let Some(refusal) = refusal {
            if door == Door::Due {
                self.waiting.remove(&slot);
            }
            self.keep_receipt(word, slot, key, "rejected", Some(refusal.0));
            return self.reject(word, refusal, true);
        }
        // "Again": the same while parked. It may contradict itself where it is not signed, and step 10 comes first.
        if door == Door::Queue
            && !word.said.contradicts()
            && let Some(waiting) = self.waiting.get(&slot).cloned()
        {
            let mut answer = self.park_event(word, &waiting);
            answer.published = false;
            return answer;
        }
        // Steps 10 to 15. What was refused for good stays so, also where a map of currencies would let it through by now.
        let before = self.receipts.get(&slot).and_then(|receipt| receipt.reason);
        let step = match (self.settle_or_refuse(word, enterprise), before) {
            (Ok(_), Some(reason)) if is_final(Some(reason)) => Err((reason, None)),
            (step, _) => step,
        };
        match step {
            Ok("settled") => {
                self.settle(word, key);
                self.keep_receipt(word, slot, key, "settled", None);
                if door == Door::Due {
                    self.waiting.remove(&slot);
                }
                self.settlement(word, "settled", word.said.id)
            }
            Ok(verdict) => {
                self.keep_receipt(word, slot, key, verdict, None);
                if door == Door::Due {
                    self.waiting.remove(&slot);
                }
                self.settlement(word, verdict, word.said.id)
            }
            Err(("allocation_not_found", _)) => self.park_or_reject(word, slot, key, door),
            Err(refusal) => {
                self.keep_receipt(word, slot, key, "rejected", Some(refusal.0));
                if door == Door::Due {
                    self.waiting.remove(&slot);
                }
                self.reject(word, refusal, true)
            }
        }
    }

    /// Steps 4 to 8: the key that proves the sender.
    fn prove(&mut self, word: &Word, enterprise: &str) -> Result<Key, Refusal> {
        let Some(partner) = self.partners.get(enterprise) else {
            return Err(("unknown_partner", None));
        };
        if partner.user.is_some() && partner.user != word.user_id {
            return Err(("sender_mismatch", None));
        }
        let key = match word.signature {
            Signature::Malformed => return Err(("malformed_signature", None)),
            Signature::Nobody => return Err(("signature_mismatch", None)),
            Signature::By(key) => key,
        };
        if !partner
            .keys
            .iter()
            .any(|validity| validity.key == key && validity.holds_at(self.now))
        {
            // Whatever becomes of a revoked key: what it signed meanwhile and came here is refused for ever.
            if partner
                .keys
                .iter()
                .any(|validity| validity.key == key && validity.revoked)
            {
                self.distrusted.insert((key, word.payload.clone()));
            }
            return Err(("signature_mismatch", None));
        }
        if self.distrusted.contains(&(key, word.payload.clone())) {
            return Err(("signature_mismatch", None));
        }
        // The policy fields are not in these payloads, so they may differ.
        let unsigned = |fields: &Fields| Fields {
            evaluation: None,
            approval: None,
            policy: None,
            ..fields.clone()
        };
        if unsigned(&word.said) != unsigned(&word.signed) {
            return Err(("payload_mismatch", None));
        }
        Ok(key)
    }

    /// Steps 10 to 15: `settled`, `duplicate`, or why not.
    fn settle_or_refuse(&self, word: &Word, enterprise: &str) -> Result<&'static str, Refusal> {
        let said = &word.said;
        if said.contradicts() {
            return Err(("policy_contradiction", None));
        }
        let partner = self.partners.get(enterprise).expect("step 4");
        let enabled = match said.kind {
            Kind::Allocation => partner.allocations,
            Kind::Deallocation => partner.deallocations,
        };
        if partner.suspended || !enabled {
            return Err(("partner_inactive", None));
        }
        let Some(record) = self.allocations.get(&said.id) else {
            return Err(("allocation_not_found", None));
        };
        let reserved = record.reservation;
        if reserved.enterprise != enterprise || reserved.kind != said.kind {
            return Err(("not_permitted", None));
        }
        let partners_id = match said.kind {
            Kind::Allocation => "partnersAllocationId",
            Kind::Deallocation => "partnersDeallocationId",
        };
        let settled_as = record
            .settled
            .as_ref()
            .map_or(said.partners_id, |settled| settled.partners_id);
        // What it was settled by it may be called for ever.
        let settled_by = record.settled.as_ref().and_then(|settled| settled.symbol);
        let receipt = self.receipts.get(&(record.reservation.enterprise, said.nonce));
        let was_duplicate = receipt.is_some_and(|receipt| receipt.verdict == "duplicate");
        if settled_by != Some(said.currency)
            && !was_duplicate
            && let Some(reason) = partner.misnames(said.currency, reserved.currency)
        {
            return Err((reason, Some("amount.currency")));
        }
        for (field, agrees) in [
            ("amount.quantity", reserved.quantity == said.quantity),
            ("clientId", reserved.client == said.client),
            ("connectionId", reserved.connection == said.connection),
            ("partnersClientId", reserved.partners_client == said.partners_client),
            (
                "partnersConnectionId",
                reserved.partners_connection == said.partners_connection,
            ),
            (partners_id, settled_as == said.partners_id),
        ] {
            if !agrees {
                return Err(("allocation_mismatch", Some(field)));
            }
        }
        match record.status {
            "reserved" => Ok("settled"),
            status if status == said.status() => Ok("duplicate"),
            _ => Err(("already_settled", None)),
        }
    }

    /// Step 12: parked first, and rejected when the deadline is over or too many wait already.
    fn park_or_reject(&mut self, word: &Word, slot: (&'static str, &'static str), key: Key, door: Door) -> Answer {
        let now = self.now;
        match door {
            Door::Due => {
                if let Some(waiting) = self.waiting.get(&slot).cloned()
                    && now < waiting.until
                {
                    let mut answer = self.park_event(word, &waiting);
                    answer.published = false;
                    // Who waits was told when it was parked.
                    answer.reply = None;
                    return answer;
                }
                self.waiting.remove(&slot);
            }
            Door::Queue => {
                let of_partner = self.waiting.keys().filter(|(enterprise, _)| *enterprise == slot.0);
                if of_partner.count() < PARK_MAX {
                    let waiting = Waiting {
                        parked_at: now,
                        until: word
                            .signed
                            .expires
                            .map_or(now + PARK_DEADLINE, |(_, end)| end.min(now + PARK_DEADLINE)),
                    };
                    self.waiting.insert(slot, waiting.clone());
                    self.keep_receipt(word, slot, key, "parked", Some("allocation_not_found"));
                    return self.park_event(word, &waiting);
                }
            }
        }
        self.keep_receipt(word, slot, key, "rejected", Some("allocation_not_found"));
        self.reject(word, ("allocation_not_found", None), true)
    }

    /// "On settlement" in section 3.
    fn settle(&mut self, word: &Word, key: Key) {
        let said = &word.said;
        let mut record = self.allocations.get(&said.id).expect("step 12").clone();
        self.transfer(&record, said.status());
        record.status = said.status();
        record.reason = said.released;
        record.retriable = false;
        record.updated = self.now;
        record.settled = Some(Settled {
            partners_id: said.partners_id,
            symbol: (said.currency != record.reservation.currency).then_some(said.currency),
            nonce: said.nonce,
            evaluation: said.evaluation,
            approval: said.approval,
            policy: said.policy.map(str::to_ascii_lowercase),
            payload: word.payload.clone(),
            signature: word.signature_text.clone(),
            key,
        });
        self.allocations.insert(said.id, record);
    }

    /// "Receipts" in section 2: the newest verdict, but never out of `settled` or a final reason.
    fn keep_receipt(
        &mut self,
        word: &Word,
        slot: (&'static str, &'static str),
        key: Key,
        verdict: &'static str,
        reason: Option<&'static str>,
    ) {
        let now = self.now;
        let earlier = self.receipts.get_mut(&slot);
        if let Some(earlier) = earlier
            && (earlier.verdict == "settled" || is_final(earlier.reason))
        {
            earlier.last = now;
            return;
        }
        let event = match (verdict, reason) {
            ("parked", Some(reason)) => refusal_id("update.parked", word, reason),
            ("rejected", Some(reason)) => refusal_id("update.rejected", word, reason),
            _ => settlement_id(self.allocations.get(&word.said.id).expect("it settled")),
        };
        let earlier = self.receipts.get(&slot);
        let first = earlier.map_or(now, |earlier| earlier.first);
        let voided = earlier.is_some_and(|earlier| earlier.voided);
        let receipt = Receipt {
            payload: word.payload.clone(),
            message: word.digest.clone(),
            verdict,
            reason,
            allocation: word.said.id,
            event,
            key,
            first,
            last: now,
            voided,
        };
        self.receipts.insert(slot, receipt);
    }

    /// Section 4, the event of a settlement: from the record alone.
    fn settlement(&self, word: &Word, verdict: &'static str, id: Uuid) -> Answer {
        let record = self.allocations.get(&id).expect("it settled");
        let settled = record.settled.as_ref().expect("it settled");
        let reserved = record.reservation;
        let mut allocation = json!({
            "id": id.to_string(),
            "amount": {"currency": reserved.currency, "quantity": reserved.quantity},
            "connectionId": reserved.connection.to_string(),
            "clientExternalId": reserved.external_id,
            "partnerExternalId": settled.partners_id,
            "initiatedBy": INITIATED_BY,
            "createdAt": rfc3339(record.created),
            "updatedAt": rfc3339(record.updated),
            "retriable": record.retriable,
            "reason": record.reason,
            "status": record.status,
            "type": reserved.kind.name(),
        });
        let optional = [
            ("notes", reserved.notes),
            ("partnerSymbol", settled.symbol),
            ("evaluationId", settled.evaluation),
            ("pendingApprovalId", settled.approval),
            ("policyResult", settled.policy.as_deref()),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                allocation[name] = value.into();
            }
        }
        let kind = type_of(record);
        let event = json!({
            "specversion": "1.0",
            "id": settlement_id(record).to_string(),
            "source": "/settled",
            "type": kind,
            "subject": id.to_string(),
            "time": rfc3339(record.updated),
            "datacontenttype": "application/json",
            "data": {
                "allocation": allocation,
                "enterpriseId": reserved.enterprise,
                "clientId": reserved.client.to_string(),
                "nonce": settled.nonce,
            },
        });
        Answer {
            verdict,
            reason: None,
            names: None,
            event,
            event_id: settlement_id(record),
            routing_key: format!("{kind}.{}", reserved.enterprise),
            published: true,
            dead: false,
            reply: reply_queue(word),
        }
    }

    fn reject(&self, word: &Word, (reason, names): Refusal, proven: bool) -> Answer {
        let mut answer = refusal(word, "update.rejected", reason, self.now);
        answer.names = names;
        answer.dead = true;
        answer.reply = reply_queue(word).filter(|_| proven);
        answer
    }

    fn park_event(&self, word: &Word, waiting: &Waiting) -> Answer {
        let mut answer = refusal(word, "update.parked", "allocation_not_found", waiting.parked_at);
        answer.verdict = "parked";
        answer.event["data"]["parkedUntil"] = rfc3339(waiting.until).into();
        answer.reply = reply_queue(word);
        answer
    }
}

fn type_of(record: &Record) -> String {
    format!("{}.{}", record.reservation.kind.name(), record.status)
}

fn settlement_id(record: &Record) -> Uuid {
    uuid_of(&format!("{}|{}", type_of(record), record.reservation.id))
}

fn refusal_id(kind: &str, word: &Word, reason: &str) -> Uuid {
    uuid_of(&format!("{kind}|{}|{}|{reason}", word.routing_key, word.digest))
}

/// Section 4, the event of a rejection or of a parking, without its detail.
fn refusal(word: &Word, kind: &str, reason: &'static str, time: Millis) -> Answer {
    let (class, is_final) = class_of(reason);
    let id = refusal_id(kind, word, reason);
    let mut data = json!({
        "enterpriseId": word.enterprise,
        "reason": reason,
        "class": class,
        "final": is_final,
        "messageDigest": word.digest,
    });
    let mut event = json!({
        "specversion": "1.0",
        "id": id.to_string(),
        "source": "/settled",
        "type": kind,
        "time": rfc3339(time),
        "datacontenttype": "application/json",
    });
    if word.broken.is_none() {
        data["allocationId"] = word.said.id.to_string().into();
        data["nonce"] = word.said.nonce.into();
        event["subject"] = word.said.id.to_string().into();
    }
    if let Some(message_id) = word.message_id {
        data["messageId"] = message_id.into();
    }
    event["data"] = data;
    Answer {
        verdict: "rejected",
        reason: Some(reason),
        names: None,
        event,
        event_id: id,
        routing_key: word
            .enterprise
            .map_or(kind.to_owned(), |enterprise| format!("{kind}.{enterprise}")),
        published: true,
        dead: false,
        reply: None,
    }
}

/// Other names are ignored, or partners could write to any queue.
fn reply_queue(word: &Word) -> Option<&'static str> {
    let (name, enterprise) = (word.reply_to?, word.enterprise?);
    let ours =
        name.starts_with("amq.rabbitmq.reply-to.") || name.starts_with(&format!("settlement.reply.{enterprise}."));
    ours.then_some(name)
}
