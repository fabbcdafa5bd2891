//! What may hold a password, and what of it may be shown.

use std::fmt;

use serde::Deserialize;

use crate::redact;

/// What was typed, as it may be repeated: a URL or connection string in the wrong place holds a password there too.
pub(crate) fn repeated(text: &str) -> &str {
    let lower = text.to_ascii_lowercase();
    let may_be_secret = ["://", "@", "password", "passwd", "sslmode", "host=", "user="];
    if may_be_secret.iter().any(|piece| lower.contains(piece)) {
        return "***";
    }
    text
}

/// A URL or DSN that may hold a password. Nothing prints it whole: [`Secret::expose`] is for those who connect.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// Parameters of connection strings that are shown. All others may hold anything.
const SHOWN: [&str; 16] = [
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "sslmode",
    "application_name",
    "connect_timeout",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
    "heartbeat",
    "channel_max",
    "frame_max",
    "connection_timeout",
    "auth_mechanism",
];

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The whole of it, password included.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What may be shown to people: scheme, user, host, path, and parameters known to be harmless.
    pub fn redacted(&self) -> String {
        let urls = redact::urls(&self.0);
        // A password with a comma and a scheme in it looks like the end of one URL and the beginning of another.
        let is_cut = urls.iter().any(|url| url.contains('@')) && urls.iter().any(|url| !url.contains('@'));
        let each = urls.into_iter().map(|url| match url.split_once("://") {
            Some((scheme, _)) if is_cut => format!("{scheme}://***"),
            Some(_) | None => redacted_one(url),
        });
        each.collect::<Vec<_>>().join(",")
    }
}

fn redacted_one(text: &str) -> String {
    match text.split_once("://") {
        Some((scheme, rest)) => {
            let (credentials, place) = match rest.rsplit_once('@') {
                Some((credentials, place)) => (Some(credentials), place),
                None => (None, rest),
            };
            // A password may hold `/`, `?` or `#` unescaped, a parameter may hold `@`: which of them this is, is
            // a guess, so nothing of it is shown.
            if credentials.is_some_and(|text| text.contains(['/', '?', '#'])) {
                return format!("{scheme}://***");
            }
            let who = match credentials.map(|text| text.split_once(':').ok_or(text)) {
                Some(Ok((user, _))) => format!("{user}:***@"),
                Some(Err(user)) => format!("{user}@"),
                None => String::new(),
            };
            match place.split_once('?') {
                Some((place, query)) => {
                    let pairs: Vec<String> = query.split('&').map(|pair| shown_pair(pair, pair)).collect();
                    format!("{scheme}://{who}{place}?{}", pairs.join("&"))
                }
                None => format!("{scheme}://{who}{place}"),
            }
        }
        None => redacted_pairs(text),
    }
}

fn shown_pair(pair: &str, as_written: &str) -> String {
    match pair.split_once('=') {
        Some((key, _)) if SHOWN.contains(&key.trim()) => as_written.to_owned(),
        Some((key, _)) => format!("{}=***", key.trim()),
        None => "***".to_owned(),
    }
}

/// `key=value key='va lue'`, with libpq's quotes and backslashes.
fn redacted_pairs(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    let mut shown = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((key, after)) = rest.split_once('=') else {
            shown.push("***".to_owned());
            break;
        };
        let after = after.trim_start();
        let quoted = after.starts_with('\'');
        let mut escaped = false;
        let end = after
            .char_indices()
            .skip(usize::from(quoted))
            .find(|(_, letter)| {
                let ends = !escaped
                    && if quoted {
                        *letter == '\''
                    } else {
                        letter.is_whitespace()
                    };
                escaped = !escaped && *letter == '\\';
                ends
            })
            .map_or(
                after.len(),
                |(at, letter)| if quoted { at + letter.len_utf8() } else { at },
            );
        let (value, next) = after.split_at(end);
        let key = key.trim();
        let plain_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if plain_key {
            shown.push(shown_pair(&format!("{key}="), &format!("{key}={value}")));
        } else {
            shown.push("***".to_owned());
        }
        rest = next.trim_start();
    }
    shown.join(" ")
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.redacted())
    }
}
