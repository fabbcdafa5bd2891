//! Whether what stands in the books as the authority for a settlement is one: its signature verified again, long after.
//!
//! Rows may all agree with each other and still be nobody's word: whoever may write to the tables can write all of them. What
//! can not be written is a signature of a key that somebody else has.

use std::{borrow::Cow, collections::HashMap, time::Duration};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    allocation::{Kind, PolicyResult, Status},
    calendar::CalendarTime,
    currency::SymbolLives,
    digest::sha256,
    json::{Json, Object},
    receipt::ReceiptKey,
    signature::{PublicKey, Signer, signer},
    update::{Field, Outcome, Statement},
};

/// A change of a key counts from its COMMIT on, and is written down with a moment before it: a batch in between judged, rightly,
/// by what was there. Longer than a transaction may take.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// A settlement as it stands in the books, with what is said to have authorised it.
#[derive(Clone, Debug)]
pub struct Authorised {
    pub allocation_id: Uuid,
    pub settled_at: Timestamp,
    /// The signed text.
    pub payload: String,
    /// 65 bytes: header, r, s.
    pub signature: Vec<u8>,
    /// None: the receipt that it names is missing.
    pub by: Option<AuthorisedBy>,
    /// None: the allocation is missing.
    pub record: Option<AuthorisedRecord>,
}

/// Of the receipt: who is said to have signed.
#[derive(Clone, Debug)]
pub struct AuthorisedBy {
    pub key: ReceiptKey,
    pub enterprise_id: String,
    pub nonce: String,
    pub payload_digest: Vec<u8>,
    pub public_key: Vec<u8>,
}

/// Of the allocation and its connection: what is said to have been signed. Texts as they are stored.
#[derive(Clone, Debug)]
pub struct AuthorisedRecord {
    pub kind: String,
    pub status: String,
    pub currency: String,
    /// By which symbol it was signed for; none: by the currency itself.
    pub partner_symbol: Option<String>,
    pub quantity: String,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub enterprise_id: String,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    pub partner_external_id: Option<String>,
    pub reason: Option<String>,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<String>,
}

impl AuthorisedRecord {
    /// What the amount was called when it was signed for.
    fn symbol(&self) -> &String {
        self.partner_symbol.as_ref().unwrap_or(&self.currency)
    }
}

/// What a signature is held against, as it was at its time.
#[derive(Debug, Default)]
pub struct Register {
    pub keys: HashMap<PublicKey, KeyLife>,
    pub symbols: SymbolLives,
}

/// When a key counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub from: CalendarTime,
    pub until: Option<CalendarTime>,
}

impl Validity {
    /// What was valid when it was looked up may have ended when the moment was read.
    fn covers(&self, moment: Timestamp) -> bool {
        let begun = self.from.timestamp() <= moment;
        begun
            && self
                .until
                .is_none_or(|until| until.timestamp() > earlier(moment, LEEWAY))
    }
}

fn earlier(moment: Timestamp, by: Duration) -> Timestamp {
    moment.saturating_sub(by).unwrap_or(Timestamp::MIN)
}

/// A key as it is registered now.
#[derive(Clone, Debug)]
pub struct KeyNow {
    pub enterprise_id: String,
    pub registered_at: Timestamp,
    pub validity: Validity,
    pub revoked_at: Option<Timestamp>,
}

/// What an operator did to a key, as the audit has it.
#[derive(Clone, Copy, Debug)]
pub struct KeyChange {
    pub at: Timestamp,
    /// What counted before, where it is said.
    pub was: Option<Validity>,
    /// What counts since, where it was changed.
    pub validity: Option<Validity>,
    /// Whether it is revoked since, where that was changed.
    pub revoked: Option<bool>,
}

/// Since then, until the next one.
#[derive(Clone, Copy, Debug)]
struct KeyState {
    since: Timestamp,
    validity: Validity,
    revoked: bool,
}

/// Whose a key is, and when it counted: a window that is changed today says nothing of what was settled before.
#[derive(Clone, Debug)]
pub struct KeyLife {
    enterprise_id: String,
    registered_at: Timestamp,
    /// The oldest first.
    states: Vec<KeyState>,
}

impl KeyLife {
    /// What a key is now, and what the audit has of it. Who changed a row past this program left no word in the audit: then
    /// what stands in the row counts for all of its life.
    pub fn new(key: KeyNow, mut changes: Vec<KeyChange>) -> Self {
        changes.sort_by_key(|change| change.at);
        let first = changes
            .iter()
            .find_map(|change| change.was.or(change.validity))
            .unwrap_or(key.validity);
        let mut state = KeyState {
            since: Timestamp::MIN,
            validity: first,
            revoked: false,
        };
        let mut states = vec![state];
        for change in changes {
            state = KeyState {
                since: change.at,
                validity: change.validity.unwrap_or(state.validity),
                revoked: change.revoked.unwrap_or(state.revoked),
            };
            states.push(state);
        }
        // What stands in the row counts since the last word of the audit: a rotation writes of the new key only.
        if let Some(last) = states.last_mut() {
            last.validity = key.validity;
            state = *last;
        }
        if let Some(since) = key.revoked_at.filter(|_| !state.revoked) {
            states.push(KeyState {
                since,
                revoked: true,
                ..state
            });
            states.sort_by_key(|state| state.since);
        }
        Self {
            enterprise_id: key.enterprise_id,
            registered_at: key.registered_at,
            states,
        }
    }

    /// Why it did not count for a partner at a moment.
    fn objection(&self, enterprise_id: &str, moment: Timestamp) -> Option<String> {
        if self.enterprise_id != enterprise_id {
            return Some(format!(
                "is registered for {}, and not for {enterprise_id}",
                self.enterprise_id
            ));
        }
        // Moments of settlements are cut to milliseconds.
        if earlier(self.registered_at, Duration::from_millis(1)) > moment {
            return Some("was registered after it".to_owned());
        }
        let asked_from = earlier(moment, LEEWAY);
        let ends = self
            .states
            .iter()
            .skip(1)
            .map(|next| next.since)
            .chain([Timestamp::MAX]);
        let mut in_force = self
            .states
            .iter()
            .zip(ends)
            .filter(|(state, end)| state.since <= moment && *end >= asked_from)
            .map(|(state, _)| state)
            .peekable();
        if in_force.peek().is_none() {
            return Some("did not count then".to_owned());
        }
        let mut unrevoked = in_force.filter(|state| !state.revoked).peekable();
        if unrevoked.peek().is_none() {
            return Some("was revoked then".to_owned());
        }
        if unrevoked.any(|state| state.validity.covers(moment)) {
            return None;
        }
        Some("was not valid then".to_owned())
    }
}

/// Why the symbol that was signed did not mean the currency of the books then.
fn unmapped(
    settlement: &Authorised,
    by: &AuthorisedBy,
    record: &AuthorisedRecord,
    symbols: &SymbolLives,
) -> Option<String> {
    // Moments of settlements are cut to milliseconds.
    let until = settlement.settled_at.saturating_add(Duration::from_millis(1));
    let within = earlier(settlement.settled_at, LEEWAY)..=until.unwrap_or(Timestamp::MAX);
    let is_mapped = symbols.may_mean(&by.enterprise_id, record.symbol(), &record.currency, &within);
    (!is_mapped).then(|| "amount.currency: what was signed did not mean the currency of the books then".to_owned())
}

/// Why a settlement is not what its signature authorises; none where it is. Names ids and keys, and no text of a partner's.
pub fn objection(settlement: &Authorised, register: &Register) -> Option<String> {
    let id = settlement.allocation_id;
    look(settlement, register)
        .err()
        .map(|why| format!("settlement of {id}: {why}"))
}

fn look(settlement: &Authorised, register: &Register) -> Result<(), Cow<'static, str>> {
    let by = settlement.by.as_ref().ok_or("the receipt that it names is missing")?;
    let record = settlement.record.as_ref().ok_or("its allocation is missing")?;
    let key = match signer(&settlement.payload, &hex::encode(&settlement.signature)) {
        Signer::Key(key) => key,
        Signer::Malformed(why) => return Err(format!("its signature is none: {why}").into()),
        Signer::Unrecoverable | Signer::Unread => return Err("its signature was made by no key".into()),
    };
    if by.public_key != key.as_bytes() {
        return Err(format!(
            "its signature was made by the key {key}, and its receipt names {}",
            hex::encode(&by.public_key)
        )
        .into());
    }
    let Some(life) = register.keys.get(&key) else {
        return Err(format!("its signature was made by the key {key}, which is registered for nobody").into());
    };
    if let Some(why) = life.objection(&by.enterprise_id, settlement.settled_at) {
        return Err(format!("its signature was made by the key {key}, which {why}").into());
    }
    if by.key != ReceiptKey::new(&by.enterprise_id, &by.nonce) {
        return Err("its receipt is not kept under its partner and nonce".into());
    }
    if by.payload_digest != sha256(&settlement.payload) {
        return Err("what was signed is not what its receipt says".into());
    }
    if by.enterprise_id != record.enterprise_id {
        return Err(format!(
            "it was signed for partner {}, and its connection is with {}",
            by.enterprise_id, record.enterprise_id
        )
        .into());
    }
    let payload = Json::from_text(&settlement.payload).map_err(|error| format!("the signed text {error}"))?;
    let payload = payload.as_object().ok_or("the signed text is not a JSON object")?;
    disagreement(payload, settlement, by, record)
        .or_else(|| unmapped(settlement, by, record, &register.symbols))
        .map_or(Ok(()), |why| Err(why.into()))
}

/// Which field of the signed text is not what stands in the books.
fn disagreement(
    payload: &Object<'_>,
    settlement: &Authorised,
    by: &AuthorisedBy,
    record: &AuthorisedRecord,
) -> Option<String> {
    let Some(kind) = Kind::parse(&record.kind) else {
        return Some("its type is none that this version knows".to_owned());
    };
    let signed = match Statement::read(payload, kind) {
        Ok(signed) => signed,
        Err(why) => return Some(format!("the signed text is none of this kind: {why}")),
    };
    let (released, reason) = match &signed.outcome {
        Outcome::Cleared => (Status::Cleared, None),
        Outcome::Released { reject_reason } => (Status::Released, Some(reject_reason.as_str())),
    };
    let differs = [
        (kind.id_field(), signed.id != settlement.allocation_id),
        ("amount.currency", signed.amount.currency != *record.symbol()),
        ("amount.quantity", signed.amount.quantity.to_string() != record.quantity),
        ("clientId", signed.client_id != record.client_id),
        ("connectionId", signed.connection_id != record.connection_id),
        (
            "partnersClientId",
            signed.partners_client_id != record.partners_client_id,
        ),
        (
            "partnersConnectionId",
            signed.partners_connection_id != record.partners_connection_id,
        ),
        (
            kind.partners_id_field(),
            Some(&signed.partners_id) != record.partner_external_id.as_ref(),
        ),
        ("status", released.as_str() != record.status),
        ("rejectReason", reason != record.reason.as_deref()),
        ("nonce", signed.nonce != by.nonce),
    ];
    if let Some((field, _)) = differs.into_iter().find(|(_, differs)| *differs) {
        return Some(format!("{field}: what was signed is not what stands in the books"));
    }
    // What need not be signed, and holds where it is.
    let text = |name| Field::optional(payload, name).map(|field| field.as_str().map(str::to_owned));
    let policy = |text: Option<&str>| text.and_then(PolicyResult::parse);
    let unlike = [
        (
            "evaluationId",
            text("evaluationId").is_some_and(|signed| signed != record.evaluation_id),
        ),
        (
            "pendingApprovalId",
            text("pendingApprovalId").is_some_and(|signed| signed != record.pending_approval_id),
        ),
        (
            "policyResult",
            text("policyResult")
                .is_some_and(|signed| policy(signed.as_deref()) != policy(record.policy_result.as_deref())),
        ),
    ];
    let (field, _) = unlike.into_iter().find(|(_, unlike)| *unlike)?;
    Some(format!("{field}: what was signed is not what stands in the books"))
}

#[cfg(test)]
mod tests;
