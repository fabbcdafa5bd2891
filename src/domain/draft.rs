//! The partner's side: writes what [`super::message::facts`] reads.

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{calendar::rfc3339, update::Update};

/// The text that a partner signs: the documented fields in the documented order, without the policy's, and when it ends.
pub fn payload_text(draft: &Update) -> String {
    to_text(&Written { draft, signed: None })
}

/// The body that a partner publishes: every field, the payload and its signature.
pub fn body_text(draft: &Update, payload: &str, signature: &str) -> String {
    to_text(&Written {
        draft,
        signed: Some((payload, signature)),
    })
}

fn to_text(written: &Written<'_>) -> String {
    // Strings into memory: there is nothing in it that could fail.
    serde_json::to_string(written).unwrap_or_default()
}

/// A draft as JSON; with payload and signature the whole body.
struct Written<'a> {
    draft: &'a Update,
    signed: Option<(&'a str, &'a str)>,
}

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let draft = self.draft;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("status", draft.outcome.as_str())?;
        if let Some(reject_reason) = draft.outcome.reject_reason() {
            map.serialize_entry("rejectReason", reject_reason)?;
        }
        map.serialize_entry(draft.kind.id_field(), &draft.id)?;
        map.serialize_entry("amount", &draft.amount)?;
        map.serialize_entry("clientId", &draft.client_id)?;
        map.serialize_entry("connectionId", &draft.connection_id)?;
        map.serialize_entry("partnersClientId", &draft.partners_client_id)?;
        map.serialize_entry("partnersConnectionId", &draft.partners_connection_id)?;
        map.serialize_entry(draft.kind.partners_id_field(), &draft.partners_id)?;
        map.serialize_entry("nonce", &draft.nonce)?;
        if let Some((payload, signature)) = self.signed {
            if let Some(evaluation_id) = &draft.evaluation_id {
                map.serialize_entry("evaluationId", evaluation_id)?;
            }
            if let Some(pending_approval_id) = &draft.pending_approval_id {
                map.serialize_entry("pendingApprovalId", pending_approval_id)?;
            }
            if let Some(policy_result) = &draft.policy_result {
                map.serialize_entry("policyResult", policy_result)?;
            }
            map.serialize_entry("payload", payload)?;
            map.serialize_entry("signature", signature)?;
        } else if let Some(expires_at) = draft.expires_at {
            map.serialize_entry("expiresAt", &rfc3339(expires_at))?;
        }
        map.end()
    }
}
