//! Why a message is refused: what the table of reasons has to say besides the code.

use crate::domain::{
    message::Content,
    reason::Reason,
    receipt::ReceiptKey,
    signature::Unverified,
    snapshot::{KeyStanding, Partner, Rules, Snapshot},
    update::Update,
    verdict::{Verdict, VerdictKind},
};

/// Of what a newer version did, where nobody remembers its words.
pub(super) const NEWER: &str = "a newer version of settled refused it for a reason that this version does not know";

/// Whatever payload it comes with.
pub(super) const VOIDED: (Reason, &str) = (
    Reason::NonceVoided,
    "nonce: the operator has made it unusable; nothing that was or will be signed with it settles",
);

/// What the partner can tell its mistake by: where the key stands that made the signature, and in what its payload and
/// body disagree. Whose else a key may be is not the sender's business.
pub(super) fn why_unverified(
    snapshot: &Snapshot,
    unverified: &Unverified,
    content: &Content,
    partner: &Partner,
) -> String {
    let known = match unverified {
        Unverified::Malformed(_) => return unverified.detail(),
        Unverified::Unrecoverable => unverified.detail(),
        Unverified::Stranger(key) if partner.revoked.contains(key) => {
            return "the signature was made by a key of this partner that is revoked".into();
        }
        Unverified::Stranger(key) => match snapshot.registered.get(key) {
            Some(registered) if registered.enterprise_id == content.update.enterprise_id => {
                return match registered.standing {
                    KeyStanding::Early => {
                        "the signature was made by a key of this partner that is not valid yet".into()
                    }
                    KeyStanding::Expired => "the signature was made by a key of this partner that has expired".into(),
                    // It has become valid this moment.
                    KeyStanding::Valid => unverified.detail(),
                };
            }
            Some(_) => {
                return "the signature was made by a key that is registered, but not for this partner".into();
            }
            None => "the signature was made by no key that is registered: the payload may have been changed after it \
                     was signed, or another key signed it"
                .into(),
        },
    };
    match &content.agreement {
        Ok(()) => known,
        Err(disagreement) => format!("{known}; besides, {disagreement}"),
    }
}

/// What a newer version refused by a rule that this one does not know is refused in the same words: to judge it anew
/// would settle what that rule holds back.
pub(super) fn refused_by_newer(snapshot: &Snapshot, key: ReceiptKey) -> Option<Verdict> {
    let receipt = snapshot.receipts.get(&key)?;
    let reason = receipt.reason.filter(|reason| reason.is_newer())?;
    let detail = snapshot.newer_details.get(&key);
    (receipt.verdict == VerdictKind::Rejected).then(|| Verdict::Rejected {
        reason,
        detail: detail.map_or_else(|| NEWER.to_owned(), Clone::clone),
    })
}

/// Why a newer version lets a message wait, where this one does not know it: it goes on waiting.
pub(super) fn waits_for_newer(snapshot: &Snapshot, key: ReceiptKey) -> Option<Reason> {
    let receipt = snapshot.receipts.get(&key)?;
    let reason = receipt.reason.filter(|reason| reason.is_newer());
    reason.filter(|_| receipt.verdict == VerdictKind::Parked)
}

/// What counts no more, whatever the books say: its nonce is voided, or it has ended by its own signed word. What was a
/// duplicate before is answered as before: its effect is there.
pub(super) fn spent(snapshot: &Snapshot, update: &Update, key: ReceiptKey) -> Option<(Reason, &'static str)> {
    let receipt = snapshot.receipts.get(&key);
    if receipt.is_some_and(|receipt| receipt.voided) {
        return Some(VOIDED);
    }
    let is_over = update.expires_at.is_some_and(|end| end <= snapshot.now);
    if !is_over || receipt.is_some_and(|receipt| receipt.verdict == VerdictKind::Duplicate) {
        return None;
    }
    Some((
        Reason::ExpiredUpdate,
        "expiresAt: the time until which it was to count is over",
    ))
}

/// Why no message waits for the allocation that it names.
pub(super) fn why_not_found(snapshot: &Snapshot, rules: &Rules, update: &Update, size: u64, due: bool) -> &'static str {
    let bytes = snapshot.parked_bytes.get(&update.enterprise_id).copied();
    let bytes = bytes.unwrap_or_default().saturating_add(size);
    let all = snapshot.parked_bytes_of_all.saturating_add(size);
    match snapshot.parked_counts.get(&update.enterprise_id) {
        Some(count) if !due && *count >= rules.park_max_per_partner => {
            "no allocation of this id, and too many of this partner's messages wait already"
        }
        Some(_) if !due && bytes > rules.park_max_bytes_per_partner => {
            "no allocation of this id, and this partner's messages that wait take too much room already"
        }
        Some(_) if !due && all > rules.park_max_bytes => {
            "no allocation of this id, and the messages that wait take too much room already"
        }
        Some(_) | None => "no allocation of this id was reserved in time",
    }
}
