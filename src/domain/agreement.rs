//! Step 8: whether the signed text says what the body says.

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    address::parse_uuid,
    allocation::{Kind, PolicyResult},
    json::{Json, Object},
    update::{Field, NONCE_MAX, Update},
};

/// What the signed text says.
pub(super) struct Signed {
    pub(super) nonce: Option<String>,
    pub(super) ids: Vec<Uuid>,
    /// When it ends, by its own word.
    pub(super) expires_at: Option<Timestamp>,
    pub(super) agreement: Result<(), String>,
}

impl Signed {
    pub(super) fn read(body: &Object<'_>, update: &Update, payload: &str) -> Self {
        let unread = |detail: String| Self {
            nonce: None,
            ids: Vec::new(),
            expires_at: None,
            agreement: Err(detail),
        };
        let payload = match Json::from_text(payload) {
            Ok(payload) => payload,
            Err(error) => return unread(format!("the payload {error}")),
        };
        let Some(payload) = payload.as_object() else {
            return unread("the payload is not a JSON object".to_owned());
        };
        let expires_at = Field::optional(payload, EXPIRES_AT)
            .map(|field| field.time())
            .transpose();
        Self {
            nonce: Field::optional(payload, "nonce").and_then(|field| field.bounded(NONCE_MAX).ok()),
            ids: [Kind::Allocation, Kind::Deallocation]
                .into_iter()
                .filter_map(|kind| Field::optional(payload, kind.id_field()))
                .filter_map(|field| field.uuid().ok())
                .collect(),
            agreement: agree(payload, body, update).and(expires_at.clone().map(drop)),
            expires_at: expires_at.ok().flatten(),
        }
    }
}

/// The signed text may say when it ends; the body need not repeat it.
const EXPIRES_AT: &str = "expiresAt";

/// How two values of a named field are compared.
#[derive(Clone, Copy)]
enum Equality {
    Json,
    Uuid,
    PolicyResult,
}

impl Equality {
    fn holds(self, left: &Json<'_>, right: &Json<'_>) -> bool {
        /// Equal, and both of them readable.
        fn as_read<T: PartialEq>(left: &Json<'_>, right: &Json<'_>, read: fn(&str) -> Option<T>) -> bool {
            let left = left.as_str().and_then(read);
            left.is_some() && left == right.as_str().and_then(read)
        }
        match self {
            Equality::Json => left == right,
            Equality::Uuid => as_read(left, right, parse_uuid),
            Equality::PolicyResult => as_read(left, right, PolicyResult::parse),
        }
    }
}

/// Step 8: whether the signed text says what the body says. The body has passed step 3, so a field that it lacks is an
/// optional one, or a `rejectReason` without a release.
fn agree(payload: &Object<'_>, body: &Object<'_>, update: &Update) -> Result<(), String> {
    let always = [
        (update.kind.id_field(), Equality::Uuid),
        ("amount", Equality::Json),
        ("clientId", Equality::Uuid),
        ("connectionId", Equality::Uuid),
        ("partnersClientId", Equality::Json),
        ("partnersConnectionId", Equality::Json),
        (update.kind.partners_id_field(), Equality::Json),
        ("status", Equality::Json),
        ("nonce", Equality::Json),
        ("rejectReason", Equality::Json),
    ];
    let where_signed = [
        ("evaluationId", Equality::Json),
        ("pendingApprovalId", Equality::Json),
        ("policyResult", Equality::PolicyResult),
    ];
    let must = always.iter().map(|field| (field, true));
    let may = where_signed.iter().map(|field| (field, false));
    for ((name, equality), must_be_signed) in must.chain(may) {
        match (payload.get(name), body.get(name)) {
            (Some(signed), Some(said)) if equality.holds(&signed, &said) => {}
            (Some(_), Some(_)) => return Err(format!("{name}: differs between the payload and the body")),
            (Some(_), None) => return Err(format!("{name}: is in the payload, but not in the body")),
            (None, Some(_)) if must_be_signed => return Err(format!("{name}: is in the body, but not in the payload")),
            (None, Some(_) | None) => {}
        }
    }
    for (key, signed) in payload.iter() {
        // Nearly always the first, which is the least work: what has a name here was compared above.
        let is_covered = always.iter().chain(&where_signed).any(|(name, _)| *name == key)
            || body.get(&key).as_ref() == Some(&signed)
            || (key == EXPIRES_AT && body.get(EXPIRES_AT).is_none())
            || (key == "enterpriseId" && signed.as_str() == Some(&update.enterprise_id));
        if !is_covered {
            return Err(match &*key {
                "enterpriseId" => "enterpriseId: differs between the payload and the routing key".to_owned(),
                EXPIRES_AT => "expiresAt: differs between the payload and the body".to_owned(),
                // Its name is the partner's own text and is not echoed.
                _ => "an undocumented key of the payload is not in the body, or has another value there".to_owned(),
            });
        }
    }
    Ok(())
}
