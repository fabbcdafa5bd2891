//! Signs one update as a partner does, and prints the body to publish:
//!
//! ```console
//! $ cargo run --example sign > body.json
//! $ settled explain body.json --routing-key northwind.allocation.update
//! ```
//!
//! With `PARTNER_KEY` set to 64 hexadecimal digits it signs with that key, otherwise with that of the README's example.

use std::error::Error;

use settled::domain::{
    address::parse_uuid,
    allocation::Kind,
    digest::sha256,
    draft::{body_text, payload_text},
    ledger::{Amount, Quantity},
    signature::SigningKey,
    update::{Outcome, Update},
};

fn main() -> Result<(), Box<dyn Error>> {
    let secret = match std::env::var("PARTNER_KEY") {
        Ok(text) => hex::decode(text)?
            .try_into()
            .map_err(|_| "PARTNER_KEY must be 32 bytes")?,
        Err(_) => sha256("settled: the partner of the README"),
    };
    let key = SigningKey::from_bytes(secret).ok_or("not a secp256k1 key")?;
    let uuid = |text| parse_uuid(text).ok_or("not a UUID");
    let update = Update {
        enterprise_id: "northwind".to_owned(),
        kind: Kind::Allocation,
        id: uuid("10764cd8-59b5-422a-93a6-681bae7e84bd")?,
        amount: Amount {
            currency: "BTC".to_owned(),
            quantity: Quantity::parse("100000000")?,
        },
        client_id: uuid("9838fce3-c125-4af8-a775-a389f5ac26bf")?,
        connection_id: uuid("632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7")?,
        partners_client_id: "cust-42".to_owned(),
        partners_connection_id: "conn-7".to_owned(),
        partners_id: "alloc-1001".to_owned(),
        outcome: Outcome::Cleared,
        nonce: "2026-11-20-000001".to_owned(),
        evaluation_id: None,
        pending_approval_id: None,
        policy_result: None,
        expires_at: None,
    };
    // The signature is over this very text; it travels in the body, and is never made again from its parts.
    let payload = payload_text(&update);
    let signature = key.sign(&payload);
    eprintln!("public key {}", key.public_key());
    print!("{}", body_text(&update, &payload, &signature));
    Ok(())
}
