//! What no program may say where others read it: passwords, tokens, private keys, and of messages their bodies, signed texts and
//! signatures. Everything that a test uses is remembered, and what its programs wrote is searched for it when they end: logs (at
//! trace for a good part of them), complaints, metrics, traces, what the audit has, what the API answers and the console's pages.
//! What a command answers on stdout, and the page of one message, may hold a message that was asked for; a password they may not.

use std::{
    collections::{BTreeSet, VecDeque},
    process::Output,
    sync::{Mutex, MutexGuard, PoisonError},
};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Value, json};

use super::amqp::Message;

/// Messages whose words are searched for: the first so many, and as many of the last.
const MESSAGES: usize = 8;
/// Private keys that are searched for: the newest so many.
const KEYS: usize = 32;
/// Bytes of a text that tell it from others.
const PIECE: usize = 40;

#[derive(Default)]
struct Used {
    passwords: BTreeSet<String>,
    /// In hexadecimal.
    keys: VecDeque<String>,
    /// What a page carries for its own session, and nobody else reads.
    of_pages: BTreeSet<String>,
    /// Bodies and signed texts.
    first: Vec<String>,
    last: Vec<String>,
}

static USED: Mutex<Option<Used>> = Mutex::new(None);

fn used() -> MutexGuard<'static, Option<Used>> {
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A partner's private key.
pub(crate) fn key(secret: &[u8]) {
    let mut used = used();
    let keys = &mut used.get_or_insert_default().keys;
    keys.push_back(hex::encode(secret));
    if keys.len() > KEYS {
        keys.pop_front();
    }
}

/// What stands in the forms of a session's pages, and in nothing else.
pub(crate) fn of_pages(token: &str) {
    assert!(token.len() >= 8, "nobody guesses it: {token}");
    used().get_or_insert_default().of_pages.insert(token.to_owned());
}

/// A password, or a token.
pub(crate) fn password(secret: &str) {
    // What is shorter stands in other words too.
    if secret.len() >= 8 {
        used().get_or_insert_default().passwords.insert(secret.to_owned());
    }
}

/// The password of a URL, as it is written there.
pub(crate) fn of_url(url: &str) {
    if let Some((login, _)) = url.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@'))
        && let Some((_, secret)) = login.split_once(':')
    {
        password(secret);
    }
}

/// A message that a partner published.
pub(crate) fn message(message: &Message) {
    let Ok(body) = std::str::from_utf8(&message.body) else {
        return;
    };
    let fields: Value = serde_json::from_str(body).unwrap_or_default();
    let mut used = used();
    let used = used.get_or_insert_default();
    for text in [Some(body), fields["payload"].as_str()].into_iter().flatten() {
        if text.len() < PIECE {
            continue;
        }
        if used.first.len() < 2 * MESSAGES {
            used.first.push(text.to_owned());
        } else {
            used.last.push(text.to_owned());
            if used.last.len() > 2 * MESSAGES {
                used.last.remove(0);
            }
        }
    }
}

/// Tokens that a command made.
pub(crate) fn of_answer(arguments: &[&str], output: &Output) {
    if !arguments.starts_with(&["token", "add"]) {
        return;
    }
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    if let Some(token) = document["token"].as_str() {
        password(token);
    }
}

/// How a text may stand in a log: as it is, as a JSON string, in hexadecimal, in base64, and as Rust shows bytes.
fn forms(text: &str) -> Vec<String> {
    let escaped = json!(text).to_string();
    // From a multiple of three bytes on base64 says the same wherever a text begins; its middle is told from others best.
    let middle = text.len() / 2 / 3 * 3;
    let piece = text.as_bytes().get(middle..).unwrap_or_default();
    let piece = &piece[..piece.len().min(PIECE / 3 * 3)];
    let numbers: Vec<String> = piece.iter().map(u8::to_string).collect();
    let mut forms = vec![
        hex::encode(piece),
        hex::encode_upper(piece),
        BASE64_STANDARD.encode(piece),
        numbers.join(", "),
    ];
    for written in [
        text,
        escaped.trim_matches('"'),
        json!(escaped).to_string().trim_matches('"'),
    ] {
        let half = written.len() / 2;
        let start = (half..written.len())
            .find(|at| written.is_char_boundary(*at))
            .unwrap_or(0);
        let end = (start + PIECE).min(written.len());
        let end = (end..=written.len())
            .find(|at| written.is_char_boundary(*at))
            .unwrap_or(written.len());
        forms.push(written[start..end].to_owned());
    }
    forms
}

/// The first run of so many hexadecimal digits: a signature, whoever's.
fn signature(text: &str) -> Option<&str> {
    let is_hex = |byte: u8| byte.is_ascii_hexdigit();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if !is_hex(bytes[at]) {
            at += 1;
            continue;
        }
        let end = (at..bytes.len())
            .find(|end| !is_hex(bytes[*end]))
            .unwrap_or(bytes.len());
        if end - at >= 128 {
            return text.get(at..end.min(at + 130));
        }
        at = end;
    }
    None
}

/// Passwords and private keys in a text.
fn passwords_in(text: &str) -> Vec<String> {
    let used = used();
    let passwords = used.iter().flat_map(|used| used.passwords.iter().chain(&used.keys));
    passwords.filter(|secret| text.contains(*secret)).cloned().collect()
}

/// Everything in a text that may not stand in it.
pub(crate) fn found(text: &str) -> Vec<String> {
    let mut all = passwords_in(text);
    all.extend(signature(text).map(str::to_owned));
    let used = used();
    for used in used.iter() {
        all.extend(used.of_pages.iter().filter(|token| text.contains(*token)).cloned());
        for text_of in used.first.iter().chain(&used.last) {
            all.extend(forms(text_of).into_iter().filter(|form| text.contains(form.as_str())));
        }
    }
    all
}

/// Fails the test where something was said that may not be. A test that fails already is left alone.
pub(crate) fn check(place: &str, text: &str) {
    if std::thread::panicking() {
        return;
    }
    let found = found(text);
    assert!(found.is_empty(), "{place} holds what nobody may read there: {found:?}");
}

/// The same of what the API answers, which names the fields of an update as updates do: no password, and nobody's signature.
pub(crate) fn check_answer(request: &str, text: &str) {
    if std::thread::panicking() {
        return;
    }
    let mut found = passwords_in(text);
    found.extend(signature(text).map(str::to_owned));
    assert!(found.is_empty(), "the answer to {request} holds {found:?}");
}

/// The same of a page that a console shows. One that shows messages may hold them, and each its own forms' tokens.
pub(crate) fn check_page(path: &str, text: &str) {
    if std::thread::panicking() {
        return;
    }
    // The way in carries the secret that it was opened with, to be sent as a form.
    let mut leaked = passwords_in(text);
    leaked.retain(|secret| !path.contains(secret.as_str()));
    assert!(leaked.is_empty(), "the page {path} shows {leaked:?}");
    let shows_messages = ["/letters/", "/export"].iter().any(|place| path.contains(place));
    if shows_messages {
        return;
    }
    let of_messages: Vec<String> = found(text)
        .into_iter()
        .filter(|found| !path.contains(found.as_str()) && !used().iter().any(|used| used.of_pages.contains(found)))
        .collect();
    assert!(of_messages.is_empty(), "the page {path} shows {of_messages:?}");
}

/// The same of a command: nothing at all in what it complains of, and no password in what it answers. A token is answered once,
/// by the command that makes it.
pub(crate) fn check_command(arguments: &[&str], output: &Output) {
    of_answer_checked(arguments, output);
    of_answer(arguments, output);
}

fn of_answer_checked(arguments: &[&str], output: &Output) {
    if std::thread::panicking() {
        return;
    }
    let command = arguments.join(" ");
    check(
        &format!("stderr of settled {command}"),
        &String::from_utf8_lossy(&output.stderr),
    );
    let leaked = passwords_in(&String::from_utf8_lossy(&output.stdout));
    assert!(leaked.is_empty(), "settled {command} answers with {leaked:?}");
}
