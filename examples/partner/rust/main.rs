//! A partner in Rust: sign an update, publish it with a confirm, wait for its outcome. It names nothing of settled's code.
//!
//! ```console
//! $ echo '{"status":"cleared","allocationId":"..", ..}' | BROKER_URL=amqps://.. ENTERPRISE_ID=northwind PARTNER_KEY=<hex> cargo run --example partner
//! ```
//!
//! The fields stand in docs/partners.md. OWN_EXCHANGE=yes: the operator made an exchange and a queue for this partner.
//! It prints the outcome's event; exit 0: settled, 1: refused, 2: nothing was heard.

use std::{env, error::Error, io, process::ExitCode, time::Duration};

use futures_util::StreamExt as _;
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties, options::*, types::*, uri::AMQPUri};
use secp256k1::{Message, SecretKey, ecdsa::RecoverableSignature};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

fn varint(length: usize) -> Vec<u8> {
    match length {
        0..=0xfc => vec![length as u8],
        0xfd..=0xffff => [&[0xfd][..], &(length as u16).to_le_bytes()].concat(),
        _ => [&[0xfe][..], &(length as u32).to_le_bytes()].concat(),
    }
}

/// The compact recoverable signature of a Bitcoin signed message: header, r, s.
fn sign(key: &SecretKey, payload: &str) -> String {
    let magic = &b"\x18Bitcoin Signed Message:\n"[..];
    let text = [magic, &varint(payload.len()), payload.as_bytes()].concat();
    let digest = Message::from_digest(Sha256::digest(Sha256::digest(text)).into());
    let (recovery, scalars) = RecoverableSignature::sign_ecdsa_recoverable(digest, key).serialize_compact();
    format!("{:02x}{}", 27 + 4 + recovery.to_u8(), hex::encode(scalars))
}

/// The body. The payload is signed as the very text that travels in it.
fn signed(key: &SecretKey, fields: &Map<String, Value>) -> Vec<u8> {
    let payload = Value::Object(fields.clone()).to_string();
    let mut body = fields.clone();
    body.insert("signature".to_owned(), json!(sign(key, &payload)));
    body.insert("payload".to_owned(), json!(payload));
    Value::Object(body).to_string().into_bytes()
}

/// By nonce, by the bytes that were sent, or by what they are about: a settlement keeps the nonce that settled it.
fn is_about(event: &Value, fields: &Map<String, Value>, digest: &str) -> bool {
    let data = &event["data"];
    let id = fields.get("allocationId").or(fields.get("deallocationId"));
    let id = id.and_then(Value::as_str).unwrap_or_default().to_lowercase();
    data["nonce"] == fields["nonce"] || data["messageDigest"] == digest || data["allocation"]["id"] == json!(id)
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let setting = |name: &str| env::var(name).map_err(|_| format!("set {name}: the head of this file says to what"));
    let (url, enterprise) = (setting("BROKER_URL")?, setting("ENTERPRISE_ID")?);
    let secret = hex::decode(setting("PARTNER_KEY")?)?;
    let key = SecretKey::from_secret_bytes(secret.try_into().map_err(|_| "32 bytes")?)?;
    let fields: Map<String, Value> = serde_json::from_reader(io::stdin())?;
    let body = signed(&key, &fields);
    let digest = hex::encode(Sha256::digest(&body));
    let is_allocation = fields.contains_key("allocationId");
    let kind = ["deallocation", "allocation"][usize::from(is_allocation)];

    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let own = env::var_os("OWN_EXCHANGE").is_some();
    let [exchange, queue] = match own {
        true => ["updates", "outcomes"].map(|what| ShortString::from(format!("settlement.{what}.{enterprise}"))),
        false => ["settlement.updates".into(), format!("{enterprise}.outcomes").into()],
    };
    let none = FieldTable::default();
    if !own {
        // A queue of one's own, bound before anything is sent: what is told from now on is kept there.
        let durable = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        channel.queue_declare(queue.clone(), durable, quorum).await?;
        let (mine, plain) = (format!("*.*.{enterprise}").into(), QueueBindOptions::default());
        let bound = channel.queue_bind(queue.clone(), "settlement.events".into(), mine, plain, none.clone());
        bound.await?;
    }
    let consuming = channel.basic_consume(queue, "".into(), BasicConsumeOptions::default(), none);
    let mut told = consuming.await?;

    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_user_id(url.parse::<AMQPUri>()?.authority.userinfo.username.into())
        .with_message_id(fields["nonce"].as_str().unwrap_or_default().into());
    let route = format!("{enterprise}.{kind}.update").into();
    let mandatory = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let sent = channel.basic_publish(exchange, route, mandatory, &body, properties);
    if !matches!(sent.await?.await?, Confirmation::Ack(None)) {
        return Err("the broker did not take it, or no queue does: publish it again".into());
    }
    eprintln!("published, and confirmed by the broker");

    while let Ok(Some(message)) = tokio::time::timeout(Duration::from_secs(30), told.next()).await {
        let message = message?;
        let read: Value = serde_json::from_slice(&message.data)?;
        // One event, or an array of them where the operator chose so.
        let events = read.as_array().cloned().unwrap_or_else(|| vec![read]);
        message.ack(BasicAckOptions::default()).await?;
        let mut mine = events.into_iter().filter(|event| is_about(event, &fields, &digest));
        if let Some(outcome) = mine.find(|event| event["type"] != "update.parked") {
            println!("{outcome}");
            return Ok(ExitCode::from(u8::from(outcome["type"] == "update.rejected")));
        }
    }
    eprintln!("nothing for 30 s: see 'When there is silence' in docs/partners.md");
    Ok(ExitCode::from(2))
}
