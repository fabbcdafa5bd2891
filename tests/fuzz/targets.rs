//! Who reads bytes of others, and what must be true whatever these are.

use k256::ecdsa::{RecoveryId, Signature, VerifyingKey};
use serde_json::Value;
use settled::{
    config::{Settings, Sources},
    domain::{
        delivery::{Delivery, Properties, Source},
        message::{self, Facts},
        public_key::PublicKey,
        reason::Reason,
        signature::{self, Signer},
        wire,
    },
    partner::{
        lint::{LintedMessage, lint},
        vectors::test_key,
    },
    redact,
    store::outbox,
};

use crate::{
    MEMORY, corpus,
    engine::{APART, Target},
};

const JSON: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "\"\"",
    "0",
    "-0",
    "1e999",
    "\\ud83d\\ude00",
    "\\ud800",
    "\\u0000",
    "\u{feff}",
    "\"amount\":",
    "\"quantity\":\"1\"",
    "\"nonce\":\"n\"",
    "\"status\":\"released\"",
    "\"rejectReason\":\"r\"",
    "\"payload\":",
    "\"enterpriseId\":\"acme\"",
    "\"expiresAt\":\"2027-01-01T00:00:00Z\"",
    "\"policyResult\":\"REJECTED\"",
];

pub(crate) fn all() -> Vec<Target> {
    vec![
        Target {
            name: "decode",
            words: JSON,
            memory: BODY_MEMORY,
            seeds: corpus::bodies,
            check: decode,
        },
        Target {
            name: "agreement",
            words: JSON,
            memory: BODY_MEMORY,
            seeds: corpus::payloads,
            check: agreement,
        },
        Target {
            name: "json",
            words: JSON,
            memory: BODY_MEMORY,
            seeds: corpus::bodies,
            check: json,
        },
        Target {
            name: "signature",
            words: &["1f", "20", "21", "22", "0x", "00", "ff", "\n"],
            memory: 8,
            seeds: corpus::signatures,
            check: signature,
        },
        Target {
            name: "xpub",
            words: &["xpub", "tpub", "xprv", "02", "03", "04", " "],
            // The test's own text, with three bytes for each that is no UTF-8.
            memory: 8,
            seeds: corpus::keys,
            check: xpub,
        },
        Target {
            name: "properties",
            words: &["F\0\0\0\u{4}", "S\0\0\0\u{1}", "A\0\0\0\u{1}", "t\u{1}", "V", "x-death"],
            memory: PROPERTY_MEMORY,
            seeds: Vec::new,
            check: properties,
        },
        Target {
            name: "outbox",
            words: &[
                "\"whole\":",
                "\"events\":",
                "\"count\":",
                "\"body\":4294967295",
                "\"type\":\"partner.resumed\"",
                "{}",
                "[]",
            ],
            memory: PROPERTY_MEMORY,
            seeds: Vec::new,
            check: outbox_row,
        },
        Target {
            name: "config",
            words: &[
                "\n",
                "=",
                "[worker]",
                "lanes",
                "\"",
                "broker.url",
                "amqps://u:p@h/v",
                "15s",
                "[[",
                "\"\"\"",
            ],
            // Every setting is laid over the defaults, some 20 kB of text.
            memory: CONFIG_MEMORY,
            seeds: || {
                vec![
                    settled::config::DEFAULTS.as_bytes().to_vec(),
                    b"worker.lanes=3".to_vec(),
                ]
            },
            check: config,
        },
        Target {
            name: "http_body",
            words: JSON,
            memory: BODY_MEMORY,
            seeds: corpus::bodies,
            check: http_body,
        },
        Target {
            name: "redact",
            words: &["://", "@", "password=", "%40", ":", ",", "amqp", "postgres"],
            memory: 16,
            seeds: || vec![b"postgres://u:hunter2@h/d, amqps://u:hunter2@a,b/v password=hunter2".to_vec()],
            check: redacted,
        },
    ]
}

/// What the other parsers' trees take: two dozen bytes and more for each value, and a value may be two bytes: `[0,0,0`. What
/// ours takes is measured by itself.
const BODY_MEMORY: usize = 60;
/// Times of a body that reading it takes.
const READING: usize = 4;
/// The same of header tables, whose fields may be one byte.
const PROPERTY_MEMORY: usize = 200;
const CONFIG_MEMORY: usize = 100;

fn delivery(body: &[u8]) -> Delivery {
    Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: "acme.allocation.update".to_owned(),
        body: body.to_vec(),
        properties: Properties {
            content_type: Some("application/json".to_owned()),
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    }
}

/// What a message is found to be says nothing of its content, and is the same each time.
fn facts(body: &[u8]) -> Result<Facts, String> {
    let delivery = delivery(body);
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let facts = message::facts(&delivery);
    let took = MEMORY.peak_usage().saturating_sub(before);
    let most = READING * body.len() + APART;
    if took > most {
        return Err(format!(
            "reading takes {took} bytes for {} of a body, at most {most}",
            body.len()
        ));
    }
    if facts != message::facts(&delivery) {
        return Err("read twice, a message is two".to_owned());
    }
    if let Err(refusal) = &facts.content
        && refusal.detail.len() > 512
    {
        return Err(format!("a sentence of {} bytes", refusal.detail.len()));
    }
    Ok(facts)
}

pub(crate) fn decode(input: &[u8]) -> Result<(), String> {
    let facts = facts(input)?;
    if let Ok(content) = &facts.content {
        let update = &content.update;
        let quantity = update.amount.quantity.to_string();
        if quantity.starts_with('0') || quantity.len() > 78 {
            return Err(format!("a quantity of {quantity}"));
        }
        if update.nonce.is_empty() || update.nonce.len() > 256 || content.payload.is_empty() {
            return Err("a field breaks its rule".to_owned());
        }
    }
    Ok(())
}

/// The input is what is signed, validly, in a body whose other fields are the payload's own, where it is an object: what is
/// signed and what is said agree by value, or the difference is named.
fn agreement(input: &[u8]) -> Result<(), String> {
    let Ok(payload) = std::str::from_utf8(input) else {
        return Ok(());
    };
    let key = test_key("alice");
    let signed = key.sign(payload);
    let mut body = match serde_json::from_str::<Value>(payload) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) | Err(_) => serde_json::Map::new(),
    };
    body.insert("payload".to_owned(), payload.into());
    body.insert("signature".to_owned(), signed.into());
    let facts = facts(Value::Object(body).to_string().as_bytes())?;
    if let Ok(content) = &facts.content {
        if content.payload != payload {
            return Err("what is signed is not what was received".to_owned());
        }
        if content.signer != Signer::Key(key.public_key()) {
            return Err("who signed it is not found".to_owned());
        }
    }
    Ok(())
}

/// How deep brackets stand in one another at most, whatever stands between: more than enough for the other parser's stack.
fn depth(input: &[u8]) -> usize {
    let (mut now, mut most) = (0_usize, 0);
    for byte in input {
        match byte {
            b'[' | b'{' => now += 1,
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
        most = most.max(now);
    }
    most
}

/// Against a second parser, which shares no code: what it refuses is refused, and what it takes is refused for what only we
/// refuse.
fn json(input: &[u8]) -> Result<(), String> {
    let refused = match facts(input)?.content {
        Err(refusal) if refusal.reason == Reason::MalformedMessage => Some(refusal.detail),
        Err(refusal) if refusal.reason == Reason::MessageTooLarge => return Ok(()),
        Ok(_) | Err(_) => None,
    };
    if depth(input) > 200 {
        return Ok(());
    }
    let theirs = std::str::from_utf8(input).ok().map(str::parse::<tinyjson::JsonValue>);
    let is_taken = matches!(theirs, Some(Ok(_)));
    match refused {
        None if !is_taken => Err("the other parser refuses it, and we do not".to_owned()),
        Some(detail)
            if is_taken
                && ![
                    "the same key twice",
                    "nested deeper",
                    "lone surrogate",
                    "hex escape",
                    "byte-order mark",
                    "not a JSON object",
                ]
                .iter()
                .any(|ours| detail.contains(ours)) =>
        {
            Err(format!("the other parser takes it, and we say: {detail}"))
        }
        None | Some(_) => Ok(()),
    }
}

/// A signature and what it signs, against a second implementation of the curve.
fn signature(input: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(input);
    let (signed, payload) = text.split_once('\n').unwrap_or((&text, ""));
    let ours = signature::signer(payload, signed);
    let Some(bytes) = signature::signature_bytes(signed) else {
        return match ours {
            Signer::Malformed(_) => Ok(()),
            other => Err(format!("its text is malformed, and it is {other:?}")),
        };
    };
    let [header, scalars @ ..] = &bytes;
    let theirs = Signature::from_slice(scalars).ok().and_then(|signature| {
        let id = RecoveryId::from_byte(header.checked_sub(31)?)?;
        VerifyingKey::recover_from_prehash(&signature::signed_digest(payload), &signature, id).ok()
    });
    let theirs = theirs.map(|key| key.to_encoded_point(true).as_bytes().to_vec());
    let ours = match ours {
        Signer::Key(key) => Some(key.as_bytes().to_vec()),
        Signer::Unrecoverable => None,
        other => return Err(format!("its text is well-formed, and it is {other:?}")),
    };
    if ours == theirs {
        Ok(())
    } else {
        Err(format!("we recover {ours:?}, the other {theirs:?}"))
    }
}

/// What is taken for a key is one to the other implementation too, and no complaint repeats what was typed.
fn xpub(input: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(input);
    match PublicKey::from_xpub_or_hex(&text) {
        Ok(key) => {
            if k256::PublicKey::from_sec1_bytes(key.as_bytes()).is_err() {
                return Err(format!("{} is no point to the other implementation", key.to_hex()));
            }
            (PublicKey::from_hex(&key.to_hex()) == Some(key))
                .then_some(())
                .ok_or_else(|| "a key is not itself".to_owned())
        }
        Err(error) => {
            let said = error.to_string();
            let typed = text.trim();
            if typed.len() >= 8 && said.contains(typed) {
                return Err("a complaint repeats what was typed".to_owned());
            }
            Ok(())
        }
    }
}

/// A list of properties as it comes over the wire: what can be read can be written and read again.
fn properties(input: &[u8]) -> Result<(), String> {
    let read = wire::read(input);
    if wire::is_plain(input) && read.undecodable.is_some() {
        return Err("every reader can read it, and we can not".to_owned());
    }
    if let Some(headers) = &read.headers
        && let Some(written) = wire::write_headers(headers)
        && wire::headers(&written).as_ref() != Some(headers)
    {
        return Err("headers that were written are others when they are read".to_owned());
    }
    let _length = read.sent_wire_len();
    Ok(())
}

/// A row of the outbox, its format first.
fn outbox_row(input: &[u8]) -> Result<(), String> {
    let (format, bytes) = input.split_first().unwrap_or((&1, &[]));
    drop(outbox::count_of_row(i16::from(*format), bytes));
    Ok(())
}

/// Settings as flags, variables and a file: refused or taken, and a password is in no complaint.
fn config(input: &[u8]) -> Result<(), String> {
    const SECRET: &str = "hunter2-in-the-settings";
    let text = String::from_utf8_lossy(input);
    let (name, value) = text.split_once('=').unwrap_or((&text, SECRET));
    let hidden = format!("{value}{SECRET}");
    let variables = [
        (
            format!("SETTLED_{}", name.to_uppercase().replace('.', "__")),
            value.to_owned(),
        ),
        (
            "SETTLED_BROKER_URL".to_owned(),
            format!("amqps://u:{SECRET}@h/{hidden}"),
        ),
    ];
    let file = std::env::temp_dir().join(format!("settled-fuzz-{}.toml", std::process::id()));
    std::fs::write(&file, input).map_err(|error| error.to_string())?;
    for sources in [
        Sources {
            file: Some(file.clone()),
            environment: Vec::new().into_iter(),
            flags: Vec::new(),
        },
        Sources {
            file: None,
            environment: Vec::from(variables).into_iter(),
            flags: Vec::new(),
        },
        Sources {
            file: None,
            environment: Vec::new().into_iter(),
            flags: vec![(name.to_owned(), hidden.clone())],
        },
    ] {
        match Settings::told(sources) {
            Ok((settings, told)) => {
                let shown = format!("{settings:?}");
                if shown.contains(SECRET)
                    && !name.contains("name")
                    && !name.contains("source")
                    && !name.contains("file")
                {
                    let is_url = ["url", "URL"].iter().any(|url| name.contains(url));
                    if is_url {
                        return Err("a URL's password is shown".to_owned());
                    }
                }
                drop(serde_json::to_string(&told));
            }
            Err(error) => {
                let said = format!("{} {}", error.message(), error.hint());
                if said.contains(&format!("u:{SECRET}")) {
                    return Err(format!("a complaint has a password: {said}"));
                }
            }
        }
    }
    Ok(())
}

/// What a partner sends by HTTP is the body of a message; and what `partner-kit lint` says of it.
fn http_body(input: &[u8]) -> Result<(), String> {
    let facts = facts(input)?;
    let report = lint(&LintedMessage {
        body: input,
        routing_key: Some("acme.allocation.update"),
        content_type: None,
        keys: &[],
        now: jiff::Timestamp::UNIX_EPOCH,
    });
    let is_well = serde_json::to_string(&report).is_ok();
    if is_well && (facts.content.is_ok() || !report.checks.is_empty()) {
        Ok(())
    } else {
        Err("a refused body of which nothing is said".to_owned())
    }
}

/// A text of somebody else's is shown without what stands where passwords stand.
fn redacted(input: &[u8]) -> Result<(), String> {
    const SECRET: &str = "hunter2-of-a-url";
    let text = String::from_utf8_lossy(input);
    let shown = redact::outside(&format!("postgres://user:{SECRET}@host/db {text}"));
    if shown.contains(SECRET) {
        return Err("a URL's password is shown".to_owned());
    }
    Ok(())
}
