//! The messages that schedules are made of. Signing and recovering cost 60 us, so every message is made and read once, and
//! schedules name it by its number. Each is written twice: as bytes for the program, and as a [`Word`] for the reference,
//! which never sees the bytes.

use std::{collections::HashMap, sync::LazyLock};

use num_bigint::BigInt;
use serde_json::{Value, json};
use settled::domain::{
    delivery::{Delivery, HeaderValue, Properties, Source},
    message::{self, Facts},
    receipt::ReceiptKey,
    signature::{PublicKey, SigningKey},
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::reference::{Fields, Key, Kind, Reservation, Signature, Word};

/// A message, ready to be delivered.
pub(crate) struct Letter {
    pub(crate) word: Word,
    pub(crate) facts: Facts,
    /// As the queue hands it over, and as it comes back when it is due.
    pub(crate) queued: Delivery,
    pub(crate) due: Delivery,
    /// Headers of its dead letter that were its own.
    pub(crate) kept_headers: Vec<&'static str>,
}

pub(crate) const LARGEST: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";

const CLIENT: Uuid = Uuid::from_u128(0xc11e_0001);
const OTHER_CLIENT: Uuid = Uuid::from_u128(0xc11e_0002);

/// What is reserved when a schedule begins ([`RESERVED_AT_FIRST`]), and what may be reserved late.
pub(crate) const RESERVATIONS: [Reservation; 10] = [
    reservation(0xa1, Kind::Allocation, "acme", "BTC", "100000000", 1, "x-a1"),
    reservation(0xa2, Kind::Allocation, "acme", "ETH:wei", LARGEST, 1, "x-a2"),
    reservation(0xa3, Kind::Allocation, "acme", "BTC", "250", 2, "x-a3"),
    reservation(0xd1, Kind::Deallocation, "acme", "BTC", "40", 1, "x-d1"),
    reservation(0xd2, Kind::Deallocation, "acme", "ETH:wei", LARGEST, 2, "x-d2"),
    reservation(0xb1, Kind::Allocation, "beta", "BTC", "70", 3, "x-b1"),
    reservation(0xb2, Kind::Deallocation, "beta", "USD", "5", 3, "x-b2"),
    reservation(0xe1, Kind::Allocation, "acme", "BTC", "11", 1, "x-e1"),
    reservation(0xe2, Kind::Deallocation, "acme", "BTC", "3", 1, "x-e2"),
    reservation(0xe3, Kind::Allocation, "beta", "USD", "9", 3, "x-e3"),
];
pub(crate) const RESERVED_AT_FIRST: usize = 7;

const fn reservation(
    id: u128,
    kind: Kind,
    enterprise: &'static str,
    currency: &'static str,
    quantity: &'static str,
    connection: u128,
    external_id: &'static str,
) -> Reservation {
    let told = id.is_multiple_of(2);
    Reservation {
        id: Uuid::from_u128(id),
        kind,
        enterprise,
        currency,
        quantity,
        client: if connection == 2 { OTHER_CLIENT } else { CLIENT },
        connection: Uuid::from_u128(0xc022_0000 + connection),
        partners_client: "cust-1",
        partners_connection: if connection == 2 { "conn-2" } else { "conn-1" },
        external_id,
        notes: if told { Some("a note") } else { None },
        reason: if told { Some("the desk is looking at it") } else { None },
        retriable: told,
    }
}

/// Keys 1, 2 and 4 are acme's, 3 is beta's, 5 is ghost's, 9 is a stranger's.
pub(crate) const KEYS: [Key; 6] = [1, 2, 3, 4, 5, 9];

static SIGNING: LazyLock<Vec<(Key, SigningKey, PublicKey)>> = LazyLock::new(|| {
    let made = |number: Key| {
        let key = SigningKey::from_bytes([number; 32]).expect("a key");
        let public = key.public_key();
        (number, key, public)
    };
    KEYS.into_iter().map(made).collect()
});

fn signing_key(number: Key) -> &'static (Key, SigningKey, PublicKey) {
    SIGNING
        .iter()
        .find(|(key, ..)| *key == number)
        .expect("a key of the table")
}

pub(crate) fn public_key(number: Key) -> PublicKey {
    signing_key(number).2
}

pub(crate) fn key_number(key: &PublicKey) -> Key {
    SIGNING
        .iter()
        .find(|(_, _, public)| public == key)
        .expect("a key of the table")
        .0
}

/// What a partner would say of a reservation.
fn fields(reservation: &Reservation, released: Option<&'static str>, nonce: &'static str) -> Fields {
    Fields {
        kind: reservation.kind,
        id: reservation.id,
        currency: reservation.currency,
        quantity: reservation.quantity,
        client: reservation.client,
        connection: reservation.connection,
        partners_client: reservation.partners_client,
        partners_connection: reservation.partners_connection,
        partners_id: "theirs-1",
        released,
        nonce,
        evaluation: None,
        approval: None,
        policy: None,
        expires: None,
    }
}

/// A message being written.
#[derive(Clone)]
struct Draft {
    said: Fields,
    signed: Fields,
    signer: Key,
    /// Instead of the signature.
    scrawl: Option<(&'static str, Signature)>,
    enterprise: &'static str,
    routing_key: Option<&'static str>,
    /// Members of the body that are put there at the end; null takes one away.
    altered: Vec<(&'static str, Value)>,
    broken: Option<(&'static str, Option<&'static str>)>,
    properties: Properties,
    kept_headers: Vec<&'static str>,
}

impl Draft {
    fn new(reservation: &Reservation, released: Option<&'static str>, nonce: &'static str) -> Self {
        let fields = fields(reservation, released, nonce);
        Self {
            said: fields.clone(),
            signed: fields,
            signer: if reservation.enterprise == "beta" { 3 } else { 1 },
            scrawl: None,
            enterprise: reservation.enterprise,
            routing_key: None,
            altered: Vec::new(),
            broken: None,
            properties: Properties::default(),
            kept_headers: Vec::new(),
        }
    }

    /// Says the same in body and payload.
    fn say(&mut self, change: impl Fn(&mut Fields)) {
        change(&mut self.said);
        change(&mut self.signed);
    }

    fn finish(self) -> Letter {
        let payload = json_of(&self.signed, false).to_string();
        let (text, signature) = match self.scrawl {
            Some((text, signature)) => (text.to_owned(), signature),
            None => (signing_key(self.signer).1.sign(&payload), Signature::By(self.signer)),
        };
        let mut body = json_of(&self.said, true);
        body["payload"] = payload.clone().into();
        body["signature"] = text.clone().into();
        for (name, value) in self.altered {
            if value.is_null() {
                body.as_object_mut().expect("an object").remove(name);
            } else {
                body[name] = value;
            }
        }
        let body = body.to_string().into_bytes();
        let key = self.routing_key.unwrap_or_else(|| {
            Box::leak(format!("{}.{}.update", self.enterprise, self.said.kind.name()).into_boxed_str())
        });
        let leaked = |text: &Option<String>| text.clone().map(|text| &*Box::leak(text.into_boxed_str()));
        let word = Word {
            routing_key: key,
            enterprise: self.routing_key.is_none().then_some(self.enterprise),
            digest: hex::encode(Sha256::digest(&body)),
            broken: self.broken,
            payload: hex::encode(Sha256::digest(&payload)),
            signature,
            signature_text: text,
            user_id: leaked(&self.properties.user_id),
            message_id: leaked(&self.properties.message_id),
            reply_to: leaked(&self.properties.reply_to),
            said: self.said,
            signed: self.signed,
        };
        let mut queued = Delivery {
            exchange: "settlement.updates".to_owned(),
            routing_key: key.to_owned(),
            body,
            properties: self.properties,
            cut: None,
            redelivered: false,
            source: Source::Queue { delivery_tag: 1 },
        };
        let facts = message::facts(&queued);
        message::shorten(&mut queued, &facts);
        let row = ReceiptKey::new(self.enterprise, word.said.nonce);
        Letter {
            facts,
            due: Delivery {
                source: Source::Parked {
                    key: row.0,
                    seq: 0,
                    dead_letter: None,
                },
                ..queued.clone()
            },
            queued,
            word,
            kept_headers: self.kept_headers,
        }
    }
}

/// The documented fields; the policy's too, if wanted.
fn json_of(fields: &Fields, policy: bool) -> Value {
    let (id, partners_id) = match fields.kind {
        Kind::Allocation => ("allocationId", "partnersAllocationId"),
        Kind::Deallocation => ("deallocationId", "partnersDeallocationId"),
    };
    let mut object = json!({
        "status": if fields.released.is_some() { "released" } else { "cleared" },
        id: fields.id.to_string(),
        "amount": {"currency": fields.currency, "quantity": fields.quantity},
        "clientId": fields.client.to_string(),
        "connectionId": fields.connection.to_string(),
        "partnersClientId": fields.partners_client,
        "partnersConnectionId": fields.partners_connection,
        partners_id: fields.partners_id,
        "nonce": fields.nonce,
    });
    let mut optional = vec![("rejectReason", fields.released)];
    if policy {
        optional.push(("evaluationId", fields.evaluation));
        optional.push(("pendingApprovalId", fields.approval));
        optional.push(("policyResult", fields.policy));
    } else {
        optional.push(("expiresAt", fields.expires.map(|(text, _)| text)));
    }
    for (name, value) in optional {
        if let Some(value) = value {
            object[name] = value.into();
        }
    }
    object
}

/// What is done to an honest message.
type Twist = fn(&mut Draft);

/// One line each; every one is applied to both outcomes under two nonces of every reservation.
const TWISTS: [Twist; 46] = [
    // Who signed it.
    |draft| draft.signer = 2,
    |draft| draft.signer = 4,
    |draft| draft.signer = 9,
    |draft| draft.signer = if draft.signer == 3 { 1 } else { 3 },
    |draft| draft.scrawl = Some(("1f", Signature::Malformed)),
    // x = 5 is on no point of the curve.
    |draft| draft.scrawl = Some((NO_POINT, Signature::Nobody)),
    // What the body says and nobody signed.
    |draft| draft.said.nonce = "n-2",
    |draft| draft.said.nonce = "n-9",
    |draft| draft.said.id = RESERVATIONS[7].id,
    |draft| draft.said.id = RESERVATIONS[0].id,
    |draft| draft.said.quantity = "1",
    |draft| draft.said.partners_client = "cust-9",
    |draft| {
        draft.said.released = match draft.said.released {
            None => Some("changed on its way"),
            Some(_) => None,
        };
    },
    |draft| draft.said.policy = Some("rejected"),
    |draft| draft.said.policy = Some("REJECTED"),
    |draft| draft.said.policy = Some("Approved"),
    |draft| draft.said.evaluation = Some("evaluation-1"),
    |draft| {
        draft.said.evaluation = Some("evaluation-2");
        draft.said.approval = Some("approval-1");
    },
    // What is signed, and is not so.
    |draft| draft.say(|fields| fields.quantity = "99"),
    |draft| draft.say(|fields| fields.currency = "btc"),
    |draft| draft.say(|fields| fields.client = Uuid::from_u128(7)),
    |draft| draft.say(|fields| fields.connection = Uuid::from_u128(7)),
    |draft| draft.say(|fields| fields.partners_client = "cust-2"),
    |draft| draft.say(|fields| fields.partners_connection = "CONN-1"),
    |draft| {
        draft.say(|fields| {
            fields.partners_connection = "x";
            fields.client = Uuid::from_u128(7);
        });
    },
    |draft| draft.say(|fields| fields.partners_id = "theirs-2"),
    |draft| draft.say(|fields| fields.released = fields.released.map(|_| "another reason")),
    |draft| draft.say(|fields| fields.id = RESERVATIONS[0].id),
    |draft| draft.say(|fields| fields.id = RESERVATIONS[5].id),
    |draft| draft.say(|fields| fields.id = Uuid::from_u128(0xdead)),
    |draft| {
        draft.say(|fields| {
            fields.kind = match fields.kind {
                Kind::Allocation => Kind::Deallocation,
                Kind::Deallocation => Kind::Allocation,
            };
        });
    },
    // Somebody else's routing key, or nobody's.
    |draft| {
        draft.enterprise = "ghost";
        draft.signer = 5;
    },
    |draft| draft.enterprise = if draft.enterprise == "acme" { "beta" } else { "acme" },
    |draft| {
        draft.routing_key = Some("allocation.update");
        draft.broken = Some(("malformed_message", None));
    },
    // Properties.
    |draft| draft.properties.user_id = Some("acme-user".to_owned()),
    |draft| draft.properties.user_id = Some("somebody".to_owned()),
    |draft| {
        draft.properties.content_type = Some("text/plain".to_owned());
        draft.broken = Some(("malformed_message", None));
    },
    |draft| {
        draft.properties.content_type = Some("application/json".to_owned());
        draft.properties.message_id = Some("their-id-1".to_owned());
        draft.properties.expiration = Some("60000".to_owned());
    },
    |draft| {
        let header = |name: &str, text: &str| (name.to_owned(), HeaderValue::text(text));
        draft.properties.headers = Some(
            [
                header("x-theirs", "1"),
                header("traceparent", TRACEPARENT),
                header("settled-reason", "forged"),
                header("x-death", "forged"),
                header("x-first-death-queue", "forged"),
                header("CC", "forged"),
            ]
            .into(),
        );
        draft.kept_headers = vec!["x-theirs", "traceparent"];
    },
    |draft| {
        draft.properties.reply_to = Some(format!("settlement.reply.{}.desk", draft.enterprise));
        draft.properties.correlation_id = Some("question-1".to_owned());
    },
    |draft| {
        draft.properties.reply_to = Some("amq.rabbitmq.reply-to.g1h2".to_owned());
        draft.said.evaluation = Some("evaluation-3");
    },
    |draft| draft.properties.reply_to = Some("settlement.reply.other.desk".to_owned()),
    // Shape.
    |draft| {
        draft.altered.push(("status", "done".into()));
        draft.broken = Some(("invalid_field", Some("status")));
    },
    |draft| {
        draft.altered.push(("clientId", Value::Null));
        draft.broken = Some(("invalid_field", Some("clientId")));
    },
    |draft| {
        draft
            .altered
            .push(("amount", json!({"currency": "BTC", "quantity": "01"})));
        draft.broken = Some(("invalid_field", Some("amount.quantity")));
    },
    |draft| {
        let large = HeaderValue::text("x".repeat(17_000));
        draft.properties.headers = Some([("padding".to_owned(), large)].into());
        draft.broken = Some(("message_too_large", None));
    },
];

pub(crate) const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const NO_POINT: &str = "1f00000000000000000000000000000000000000000000000000000000000000050000000000000000000000000000000000000000000000000000000000000001";
const RELEASED: &str = "no funds \u{1f4b8} \"quoted\"\n";

/// Letters of one reservation.
pub(crate) const LETTERS_EACH: usize = HONEST + 2 * 2 * TWISTS.len();
/// The first of them break no rule: both outcomes under three nonces.
pub(crate) const HONEST: usize = 6;

/// Behind all of those: of each reservation, what ends within a schedule.
pub(crate) const ENDING: usize = RESERVATIONS.len() * LETTERS_EACH;
pub(crate) const ENDING_EACH: usize = 4;
/// Behind all of those: of each reservation, amounts that are named by symbols.
pub(crate) const NAMED: usize = ENDING + RESERVATIONS.len() * ENDING_EACH;
pub(crate) const NAMED_EACH: usize = 4;
/// What acme may call the currencies.
pub(crate) const MAPS: [&[(&str, &str)]; 6] = [
    &[],
    &[("XBT", "BTC")],
    &[("XBT", "BTC"), ("XXBT", "BTC"), ("XETH", "ETH:wei")],
    &[("XBT", "ETH:wei"), ("XXBT", "BTC")],
    &[("XETH", "ETH:wei")],
    &[("BTC", "BTC"), ("ETH:wei", "ETH:wei")],
];
/// Schedules begin at 01:00.
const ENDS: [(&str, u64); 2] = [
    ("2026-01-02T01:00:04.500999Z", 3_604_500),
    ("2026-01-02T03:00:18+02:00", 3_618_000),
];

/// Every message, by reservation: letter `n` is about reservation `n / LETTERS_EACH`, and from [`ENDING`] on about
/// `(n - ENDING) / ENDING_EACH`.
pub(crate) static PALETTE: LazyLock<Vec<Letter>> = LazyLock::new(|| {
    let own = [
        "own-0", "own-1", "own-2", "own-3", "own-4", "own-5", "own-6", "own-7", "own-8", "own-9",
    ];
    let mut letters = Vec::new();
    for (reservation, own) in RESERVATIONS.iter().zip(own) {
        let outcomes = [None, Some(RELEASED)];
        // Two nonces are used for everything, so that they meet; the third is this reservation's own.
        for nonce in ["n-1", "n-2", own] {
            for released in outcomes {
                letters.push(Draft::new(reservation, released, nonce).finish());
            }
        }
        for twist in TWISTS {
            for nonce in ["n-1", own] {
                for released in outcomes {
                    let mut draft = Draft::new(reservation, released, nonce);
                    twist(&mut draft);
                    letters.push(draft.finish());
                }
            }
        }
    }
    for (reservation, own) in RESERVATIONS.iter().zip(own) {
        for (nonce, expires) in ["n-1", own].into_iter().zip(ENDS) {
            for released in [None, Some(RELEASED)] {
                let mut draft = Draft::new(reservation, released, nonce);
                draft.say(|fields| fields.expires = Some(expires));
                letters.push(draft.finish());
            }
        }
    }
    for (reservation, own) in RESERVATIONS.iter().zip(own) {
        for symbol in ["XBT", "XXBT"] {
            for nonce in ["n-1", own] {
                let mut draft = Draft::new(reservation, None, nonce);
                draft.say(|fields| fields.currency = symbol);
                letters.push(draft.finish());
            }
        }
    }
    letters
});

/// The first letter of a routing key and a body: what was sent, as far as a dead letter tells. Letters that differ in their
/// properties only are one.
static IDENTITIES: LazyLock<HashMap<(&str, &[u8]), u16>> = LazyLock::new(|| {
    let numbered = (0_u16..).zip(PALETTE.iter()).collect::<Vec<_>>().into_iter().rev();
    numbered
        .map(|(number, letter)| ((letter.word.routing_key, &*letter.queued.body), number))
        .collect()
});

pub(crate) fn identity(routing_key: &str, body: &[u8]) -> Option<u16> {
    IDENTITIES.get(&(routing_key, body)).copied()
}

/// A number with its sign, for sums.
pub(crate) fn number(quantity: &str) -> BigInt {
    quantity.parse().expect("a number")
}
