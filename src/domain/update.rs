//! The partner's update: the fields of a body, in the order of the documented table.

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    address::parse_uuid,
    allocation::{Kind, PolicyResult},
    calendar,
    json::{Json, Object},
    ledger::{Amount, Quantity, is_currency},
};

/// The longest nonce, in UTF-8 bytes.
pub(super) const NONCE_MAX: usize = 256;
/// The longest external identifier, in UTF-8 bytes.
const EXTERNAL_ID_MAX: usize = 1024;
/// The longest reject reason, in UTF-8 bytes.
const REJECT_REASON_MAX: usize = 16_384;

/// What a partner says: decoded from a body, or about to be signed. Not yet anybody's word: see
/// [`super::signature::Verified`].
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The partner's enterprise, from the routing key.
    pub enterprise_id: String,
    pub kind: Kind,
    /// `allocationId` or `deallocationId`.
    pub id: Uuid,
    pub amount: Amount,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    /// `partnersAllocationId` or `partnersDeallocationId`.
    pub partners_id: String,
    pub outcome: Outcome,
    pub nonce: String,
    pub evaluation_id: Option<String>,
    pub pending_approval_id: Option<String>,
    pub policy_result: Option<PolicyResult>,
    /// `expiresAt` of the signed text: from then on it settles nothing any more.
    pub expires_at: Option<Timestamp>,
}

/// A body as the documented table has it.
pub(super) struct DecodedBody {
    pub(super) update: Update,
    /// The signed text, as received.
    pub(super) payload: String,
    /// The signature's text, as received.
    pub(super) signature: String,
}

/// What the partner says became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Cleared,
    Released { reject_reason: String },
}

impl Outcome {
    /// The `status` that says it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Outcome::Cleared => "cleared",
            Outcome::Released { .. } => "released",
        }
    }

    /// The `rejectReason`, where there is one.
    pub fn reject_reason(&self) -> Option<&str> {
        match self {
            Outcome::Cleared => None,
            Outcome::Released { reject_reason } => Some(reject_reason),
        }
    }
}

/// What a partner always signs.
pub(super) struct Statement {
    pub(super) id: Uuid,
    pub(super) amount: Amount,
    pub(super) client_id: Uuid,
    pub(super) connection_id: Uuid,
    pub(super) partners_client_id: String,
    pub(super) partners_connection_id: String,
    pub(super) partners_id: String,
    pub(super) outcome: Outcome,
    pub(super) nonce: String,
}

impl Statement {
    /// The fields in the order of the documented table; the first that breaks its rule is named.
    pub(super) fn read(said: &Object<'_>, kind: Kind) -> Result<Self, String> {
        let id = Field::required(said, kind.id_field())?.uuid()?;
        let amount = Field::required(said, "amount")?.amount()?;
        let client_id = Field::required(said, "clientId")?.uuid()?;
        let connection_id = Field::required(said, "connectionId")?.uuid()?;
        let partners_client_id = Field::required(said, "partnersClientId")?.bounded(EXTERNAL_ID_MAX)?;
        let partners_connection_id = Field::required(said, "partnersConnectionId")?.bounded(EXTERNAL_ID_MAX)?;
        let partners_id = Field::required(said, kind.partners_id_field())?.bounded(EXTERNAL_ID_MAX)?;
        let status = Field::required(said, "status")?;
        let released = match status.text()? {
            "cleared" => false,
            "released" => true,
            _ => return Err(status.says("must be cleared or released")),
        };
        let nonce = Field::required(said, "nonce")?.bounded(NONCE_MAX)?;
        let outcome = if released {
            Outcome::Released {
                reject_reason: Field::required(said, "rejectReason")?.bounded(REJECT_REASON_MAX)?,
            }
        } else if let Some(field) = Field::optional(said, "rejectReason") {
            return Err(field.says("must be absent when the status is cleared"));
        } else {
            Outcome::Cleared
        };
        Ok(Self {
            id,
            amount,
            client_id,
            connection_id,
            partners_client_id,
            partners_connection_id,
            partners_id,
            outcome,
            nonce,
        })
    }
}

/// Step 3: the fields in the order of the documented table; the first that breaks its rule is named.
pub(super) fn decode(body: &Object<'_>, enterprise_id: &str, kind: Kind) -> Result<DecodedBody, String> {
    let Statement {
        id,
        amount,
        client_id,
        connection_id,
        partners_client_id,
        partners_connection_id,
        partners_id,
        outcome,
        nonce,
    } = Statement::read(body, kind)?;
    let evaluation_id = Field::optional(body, "evaluationId")
        .map(|field| field.bounded(EXTERNAL_ID_MAX))
        .transpose()?;
    let pending_approval_id = Field::optional(body, "pendingApprovalId")
        .map(|field| field.bounded(EXTERNAL_ID_MAX))
        .transpose()?;
    let policy_result = Field::optional(body, "policyResult")
        .map(|field| field.policy_result())
        .transpose()?;
    let payload = Field::required(body, "payload")?;
    let payload_text = payload.text()?;
    if payload_text.is_empty() {
        return Err(payload.says("must not be empty"));
    }
    let signature = Field::required(body, "signature")?;
    let signature = signature.text()?;
    let update = Update {
        enterprise_id: enterprise_id.to_owned(),
        kind,
        id,
        amount,
        client_id,
        connection_id,
        partners_client_id,
        partners_connection_id,
        partners_id,
        outcome,
        nonce,
        evaluation_id,
        pending_approval_id,
        policy_result,
        // It counts where it is signed only: of the body it would be anybody's.
        expires_at: None,
    };
    Ok(DecodedBody {
        update,
        payload: payload_text.to_owned(),
        signature: signature.to_owned(),
    })
}

/// One field of the table under its full name.
pub(super) struct Field<'a> {
    name: &'static str,
    value: Json<'a>,
}

impl<'a> Field<'a> {
    fn required(object: &Object<'a>, name: &'static str) -> Result<Self, String> {
        Self::optional(object, name).ok_or_else(|| format!("{name}: is missing"))
    }

    /// `null` is a value of the wrong type, never absence.
    pub(super) fn optional(object: &Object<'a>, name: &'static str) -> Option<Self> {
        object.get(name).map(|value| Self { name, value })
    }

    /// The text, where it is one.
    pub(super) fn as_str(&self) -> Option<&str> {
        self.value.as_str()
    }

    fn says(&self, sentence: &str) -> String {
        format!("{}: {sentence}", self.name)
    }

    /// A string that PostgreSQL can store.
    fn text(&self) -> Result<&str, String> {
        let text = self.value.as_str().ok_or_else(|| self.says("must be a string"))?;
        if text.contains('\0') {
            return Err(self.says("must not contain U+0000"));
        }
        Ok(text)
    }

    pub(super) fn bounded(&self, max: usize) -> Result<String, String> {
        let text = self.text()?;
        if text.is_empty() || text.len() > max {
            return Err(self.says(&format!("must be 1 to {max} bytes")));
        }
        Ok(text.to_owned())
    }

    pub(super) fn uuid(&self) -> Result<Uuid, String> {
        parse_uuid(self.text()?).ok_or_else(|| self.says("must be a UUID of 36 characters, 8-4-4-4-12"))
    }

    /// RFC 3339, cut to milliseconds.
    pub(super) fn time(&self) -> Result<Timestamp, String> {
        let time = calendar::strict_rfc3339(self.text()?);
        time.ok_or_else(|| self.says("must be RFC 3339, such as 2030-01-31T00:00:00Z"))
    }

    fn policy_result(&self) -> Result<PolicyResult, String> {
        PolicyResult::parse(self.text()?).ok_or_else(|| self.says("must be approved or rejected"))
    }

    fn amount(&self) -> Result<Amount, String> {
        let object = self.value.as_object().ok_or_else(|| self.says("must be an object"))?;
        let member = |key: &str, name: &'static str| {
            object
                .get(key)
                .map(|value| Field { name, value })
                .ok_or_else(|| format!("{name}: is missing"))
        };
        let currency = member("currency", "amount.currency")?;
        let currency_text = currency.text()?;
        if !is_currency(currency_text) {
            return Err(currency.says("must be 1 to 64 bytes of [A-Za-z0-9:._-]"));
        }
        let quantity = member("quantity", "amount.quantity")?;
        let quantity_value = Quantity::parse(quantity.text()?).map_err(|sentence| quantity.says(sentence))?;
        Ok(Amount {
            currency: currency_text.to_owned(),
            quantity: quantity_value,
        })
    }
}
