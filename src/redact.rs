//! What may be shown of a text that comes from outside: of a server, of a library, of somebody's keyboard. Any of them may repeat
//! a URL that it was given, and with it a password.

/// How long what is repeated may be, in characters: a server may say anything.
const TEXT_MAX: usize = 2_000;

/// Beginnings of URLs that may follow one another in a list.
const SCHEMES: [&str; 6] = [
    "amqp://",
    "amqps://",
    "postgres://",
    "postgresql://",
    "http://",
    "https://",
];

/// Names whose value is nobody's business, as parts of a longer name too.
const KEYS: [&str; 6] = ["password", "passwd", "passphrase", "secret", "token", "authorization"];

/// The URLs of a list: they stand between commas. A comma that no scheme follows is part of a URL.
pub fn urls(text: &str) -> Vec<&str> {
    let mut urls = Vec::new();
    if !SCHEMES.iter().any(|scheme| begins(text.trim_start(), scheme)) {
        return vec![text];
    }
    let mut rest = text;
    let mut from = 0;
    while let Some(at) = rest.get(from..).and_then(|tail| tail.find(',')).map(|at| at + from) {
        let (one, after) = rest.split_at(at);
        let after = after.trim_start_matches(',').trim_start();
        if SCHEMES.iter().any(|scheme| begins(after, scheme)) {
            urls.push(one.trim());
            rest = after;
            from = 0;
        } else {
            from = at + 1;
        }
    }
    urls.push(rest.trim());
    urls
}

fn begins(text: &str, with: &str) -> bool {
    text.get(..with.len())
        .is_some_and(|head| head.eq_ignore_ascii_case(with))
}

/// The text without what may be a secret in it: of a URL only its scheme, of a pair with a telling name only the name, and of
/// what looks like `user:password@` nothing. Percent-encoded ones count.
pub fn outside(text: &str) -> String {
    let text: String = text.chars().take(TEXT_MAX).collect();
    let mut shown = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let end = rest.find(is_border).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        match key_of(word) {
            // The value may stand behind blanks and in quotes.
            Some(key) => {
                shown.push_str(key);
                shown.push_str("***");
                let of_word = word.get(key.len()..).unwrap_or_default();
                rest = if of_word.is_empty() {
                    without_value(after)
                } else {
                    after
                };
            }
            None => {
                shown.push_str(&word_shown(word));
                let lower = word.to_ascii_lowercase();
                let value = after.trim_start_matches(' ').strip_prefix('=');
                if let Some(value) = value.filter(|_| KEYS.iter().any(|key| lower.ends_with(key))) {
                    shown.push_str("=***");
                    rest = without_value(value);
                    continue;
                }
                let border = after.chars().next();
                shown.extend(border);
                rest = after.get(border.map_or(0, char::len_utf8)..).unwrap_or_default();
            }
        }
    }
    shown
}

fn is_border(letter: char) -> bool {
    letter.is_whitespace() || matches!(letter, '"' | '\'' | '`' | '<' | '>')
}

/// The part of a word up to and with the sign behind a telling name.
fn key_of(word: &str) -> Option<&str> {
    let lower = word.to_ascii_lowercase();
    let decoded = ["%3d", "=", ":"];
    KEYS.iter().find_map(|key| {
        let at = lower.find(key)?;
        let behind = at.checked_add(key.len())?;
        let tail = lower.get(behind..)?;
        let sign = decoded.iter().find(|sign| tail.starts_with(**sign))?;
        word.get(..behind + sign.len())
    })
}

/// What follows a value: in quotes, or up to the next blank.
fn without_value(text: &str) -> &str {
    let text = text.trim_start_matches(' ');
    let quote = text.chars().next().filter(|letter| matches!(letter, '"' | '\'' | '`'));
    match quote {
        Some(quote) => {
            let inner = text.get(quote.len_utf8()..).unwrap_or_default();
            let end = inner.find(quote).map_or(inner.len(), |at| at + quote.len_utf8());
            inner.get(end..).unwrap_or_default()
        }
        None => text
            .get(text.find(char::is_whitespace).unwrap_or(text.len())..)
            .unwrap_or_default(),
    }
}

fn word_shown(word: &str) -> String {
    let lower = word.to_ascii_lowercase();
    if let Some((before, _)) = word.split_once("://") {
        let scheme = before
            .rsplit(|letter: char| !letter.is_ascii_alphanumeric())
            .next()
            .unwrap_or_default();
        return format!("{scheme}://***");
    }
    let is_encoded = lower.contains("%3a%2f%2f") || (lower.contains("%40") && lower.contains("%3a"));
    let is_login = lower
        .rsplit_once('@')
        .or_else(|| lower.rsplit_once("%40"))
        .is_some_and(|(before, _)| before.contains(':') || before.contains("%3a"));
    if is_encoded || is_login {
        return "***".to_owned();
    }
    word.to_owned()
}

/// The text without these words, where they are long enough to be told from any other text: a password as it was written, and as
/// it is meant.
pub fn without(text: &str, secrets: &[&str]) -> String {
    const SHORTEST: usize = 3;
    let mut shown = outside(text);
    for secret in secrets {
        if secret.len() >= SHORTEST {
            shown = shown.replace(secret, "***");
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_where_a_scheme_follows() {
        for (text, expected) in [
            ("amqp://u:p@h/v", vec!["amqp://u:p@h/v"]),
            ("amqp://u:p,q@h1,h2:5/v", vec!["amqp://u:p,q@h1,h2:5/v"]),
            ("amqp://a/v,AMQPS://b/v", vec!["amqp://a/v", "AMQPS://b/v"]),
            ("amqp://a/v , amqp://b/v,", vec!["amqp://a/v", "amqp://b/v,"]),
            ("host=h password='x,amqp://y'", vec!["host=h password='x,amqp://y'"]),
            ("", vec![""]),
        ] {
            assert_eq!(urls(text), expected, "{text}");
        }
    }

    #[test]
    fn no_password_comes_through() {
        for text in [
            "NOT_ALLOWED - vhost v,amqp://u:hunter2@h2/v not found",
            "could not parse amqp://u:hunter2@h:x/v: invalid port",
            "amqps://u:hun,hunter2@h1,h2:5672/v",
            "postgres://u:hun@hunter2@a,b/db refused",
            "amqp%3A%2F%2Fu%3Ahunter2%40h is no URL",
            "u%3Ahunter2%40h",
            "u:hunter2@h",
            "tcp:u:hunter2@h:5672",
            "host=h password=hunter2 dbname=d",
            "password = hunter2 user = u",
            "PASSWORD='hun hunter2' host=h",
            "sslpassword: \"hunter2\"",
            "password%3Dhunter2",
            "Authorization: hunter2",
            "[amqp://u:hunter2@h/v]",
            "(postgresql://u:hunter2@h)",
        ] {
            let shown = outside(text);
            assert!(!shown.contains("unter2"), "{text}: {shown}");
        }
        assert_eq!(
            without("vhost hunter2 not found", &["hunter2", "p"]),
            "vhost *** not found"
        );
    }

    #[test]
    fn what_is_no_secret_stays() {
        for text in [
            "",
            "NOT_FOUND - no queue 'settlement.updates' in vhost '/'",
            "connection to 127.0.0.1:5672 refused, node rabbit@host:25672",
            "relation \"settled.receipts\" does not exist (SQLSTATE 42P01)",
            "the password is wrong",
            "100% of it\n\u{e4}",
        ] {
            assert_eq!(outside(text), text);
        }
        assert_eq!(outside(&"x".repeat(5_000)).len(), TEXT_MAX);
    }
}
