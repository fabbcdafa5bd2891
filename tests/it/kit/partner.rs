//! A partner, written from the protocol's text alone: it names nothing of the program it speaks to.

use secp256k1::{SecretKey, ecdsa::RecoverableSignature};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    secrets,
};

/// A partner with one key and one connection.
#[derive(Clone)]
pub(crate) struct Partner {
    pub(crate) enterprise: String,
    pub(crate) key: SecretKey,
    pub(crate) client: Uuid,
    pub(crate) connection: Uuid,
    pub(crate) partners_client: String,
    pub(crate) partners_connection: String,
}

impl Partner {
    pub(crate) fn new(enterprise: &str) -> Self {
        let key = new_key();
        secrets::key(&key.to_secret_bytes());
        Self {
            enterprise: enterprise.to_owned(),
            key,
            client: Uuid::new_v4(),
            connection: Uuid::new_v4(),
            partners_client: format!("{enterprise}-customer"),
            partners_connection: format!("{enterprise}-link"),
        }
    }

    /// The compressed point, as `key add` takes it.
    pub(crate) fn public_key(&self) -> String {
        hex::encode(self.key.public_key().serialize())
    }

    pub(crate) fn allocation(&self, currency: &str, quantity: &str) -> Reservation {
        self.reservation("allocation", currency, quantity)
    }

    pub(crate) fn deallocation(&self, currency: &str, quantity: &str) -> Reservation {
        self.reservation("deallocation", currency, quantity)
    }

    fn reservation(&self, kind: &'static str, currency: &str, quantity: &str) -> Reservation {
        let id = Uuid::new_v4();
        Reservation {
            id,
            kind,
            connection: self.connection,
            client: self.client,
            currency: currency.to_owned(),
            quantity: quantity.to_owned(),
            client_external_id: format!("order-{id}"),
            notes: None,
        }
    }

    /// What this partner says of a reservation when all is well.
    pub(crate) fn draft(&self, reservation: &Reservation, status: &str) -> Draft {
        Draft {
            enterprise: self.enterprise.clone(),
            kind: reservation.kind,
            key: self.key,
            fields: Fields(vec![
                ("status".to_owned(), json!(status)),
                (format!("{}Id", reservation.kind), json!(reservation.id)),
                (
                    "amount".to_owned(),
                    json!({"currency": reservation.currency, "quantity": reservation.quantity}),
                ),
                ("clientId".to_owned(), json!(self.client)),
                ("connectionId".to_owned(), json!(self.connection)),
                ("partnersClientId".to_owned(), json!(self.partners_client)),
                ("partnersConnectionId".to_owned(), json!(self.partners_connection)),
                (
                    match reservation.kind {
                        "allocation" => "partnersAllocationId".to_owned(),
                        _ => "partnersDeallocationId".to_owned(),
                    },
                    json!(format!("theirs-{}", reservation.id)),
                ),
                ("nonce".to_owned(), json!(Uuid::new_v4().to_string())),
            ]),
        }
        .released_with(match status {
            "released" => Some("insufficient funds at the custodian"),
            _ => None,
        })
    }

    pub(crate) fn cleared(&self, reservation: &Reservation) -> Message {
        self.draft(reservation, "cleared").message(Expect::Settles)
    }

    pub(crate) fn released(&self, reservation: &Reservation) -> Message {
        self.draft(reservation, "released").message(Expect::Settles)
    }
}

/// A key that nobody has.
pub(crate) fn new_key() -> SecretKey {
    loop {
        let bytes = [*Uuid::new_v4().as_bytes(), *Uuid::new_v4().as_bytes()].concat();
        let bytes: [u8; 32] = Sha256::digest(bytes).into();
        if let Ok(key) = SecretKey::from_secret_bytes(bytes) {
            return key;
        }
    }
}

/// The members of a JSON object in the partner's order.
#[derive(Clone, Debug)]
pub(crate) struct Fields(pub(crate) Vec<(String, Value)>);

impl Fields {
    pub(crate) fn text(&self) -> String {
        let members: Vec<String> = self
            .0
            .iter()
            .map(|(name, value)| format!("{}:{value}", json!(name)))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    pub(crate) fn get(&self, name: &str) -> &Value {
        self.0
            .iter()
            .find(|(other, _)| other == name)
            .map_or(&Value::Null, |(_, value)| value)
    }

    /// Changes a member in its place, or adds it at the end.
    pub(crate) fn set(&mut self, name: &str, value: Value) {
        match self.0.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.0.retain(|(other, _)| other != name);
    }
}

/// A message that is not signed yet: the fields that will be.
#[derive(Clone)]
pub(crate) struct Draft {
    pub(crate) enterprise: String,
    pub(crate) kind: &'static str,
    pub(crate) key: SecretKey,
    pub(crate) fields: Fields,
}

impl Draft {
    fn released_with(mut self, reason: Option<&str>) -> Self {
        if let Some(reason) = reason {
            self.fields.0.insert(1, ("rejectReason".to_owned(), json!(reason)));
        }
        self
    }

    pub(crate) fn set(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.set(name, value.into());
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.fields.remove(name);
        self
    }

    /// Says of an allocation what is said of deallocations, or the other way round.
    pub(crate) fn of_other_kind(partner: &Partner, reservation: &Reservation) -> Self {
        let kind = match reservation.kind {
            "allocation" => "deallocation",
            _ => "allocation",
        };
        partner.draft(
            &Reservation {
                kind,
                ..reservation.clone()
            },
            "cleared",
        )
    }

    pub(crate) fn signed_by(mut self, key: SecretKey) -> Self {
        self.key = key;
        self
    }

    pub(crate) fn routing_key(&self) -> String {
        format!("{}.{}.update", self.enterprise, self.kind)
    }

    pub(crate) fn message(&self, expect: Expect) -> Message {
        self.message_with(&self.fields.text(), expect)
    }

    /// With a signed text of one's own making.
    pub(crate) fn message_with(&self, payload: &str, expect: Expect) -> Message {
        self.message_signed(payload, &sign(&self.key, payload), expect)
    }

    /// With a signature of one's own making.
    pub(crate) fn message_signed(&self, payload: &str, signature: &str, expect: Expect) -> Message {
        let mut fields = self.fields.clone();
        fields.set("payload", json!(payload));
        fields.set("signature", json!(signature));
        Message::new(&self.routing_key(), fields.text(), expect)
    }
}

/// SHA-256 twice over the magic text, the payload's length and the payload.
pub(crate) fn digest(payload: &str) -> secp256k1::Message {
    let mut text = b"\x18Bitcoin Signed Message:\n".to_vec();
    let length = payload.len();
    match length {
        0..=0xfc => text.push(length as u8),
        0xfd..=0xffff => text.extend([&[0xfd], (length as u16).to_le_bytes().as_slice()].concat()),
        _ => text.extend([&[0xfe], (length as u32).to_le_bytes().as_slice()].concat()),
    }
    text.extend(payload.as_bytes());
    secp256k1::Message::from_digest(Sha256::digest(Sha256::digest(text)).into())
}

/// Signs as the account's user key does.
pub(crate) fn sign(key: &SecretKey, payload: &str) -> String {
    let signature = RecoverableSignature::sign_ecdsa_recoverable(digest(payload), key);
    let (recovery, scalars) = signature.serialize_compact();
    format!("{:02x}{}", 31 + recovery.to_u8(), hex::encode(scalars))
}
