//! The database's URL: what it says of encryption and of where the server is, and what of it may be repeated.

use tokio_postgres::config::SslMode;

use crate::tls;

/// Reads a URL or DSN. tokio-postgres knows neither `verify-full` nor a custom authority; both `require` and
/// `verify-full` check the certificate and the host's name here, which is stricter than libpq's `require`.
pub(super) fn parse_url(text: &str) -> Result<(tokio_postgres::Config, bool), String> {
    if text.is_empty() {
        return Err("no database is set; set SETTLED_DATABASE_URL".into());
    }
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let (cleaned, mode) = take_sslmode(text, is_url);
    let config: tokio_postgres::Config = cleaned
        .parse()
        .map_err(|error: tokio_postgres::Error| unreadable(&error))?;
    let encrypted = match mode {
        // One that tokio-postgres found where we did not look (spaces around the equals sign) counts as well.
        None => config.get_ssl_mode() == SslMode::Require,
        Some("disable") => false,
        Some("require" | "verify-full") => true,
        Some(other) => {
            // The words that libpq knows are no secret; any other may be a piece of one.
            let known = ["allow", "prefer", "verify-ca"].into_iter().find(|word| *word == other);
            return Err(format!(
                "sslmode{} of the database URL is not one of disable, require, verify-full (prefer would fall back to \
                 plaintext silently)",
                known.map(|word| format!("={word}")).unwrap_or_default()
            ));
        }
    };
    Ok((config, encrypted))
}

/// The same database for another login, both without a character that means something: what stands last counts, in a URL and in
/// key=value pairs. A URL's own login is left out.
pub fn with_login(text: &str, user: &str, password: &str) -> String {
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let Some((scheme, rest)) = text.split_once("://").filter(|_| is_url) else {
        return format!("{text} user={user} password={password}");
    };
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
    let and = if query.is_empty() { "" } else { "&" };
    format!("{scheme}://{place}?{query}{and}user={user}&password={password}")
}

/// Options of a connection string that may be named; anything else in a complaint may be a piece of a password.
const OPTIONS: [&str; 14] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslmode",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "keepalives",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
];

/// Why a connection string can not be read, without a word of it: what looks like an option may be a piece of the password.
fn unreadable(error: &tokio_postgres::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| cause.to_string());
    let named = OPTIONS
        .iter()
        .find(|option| text.contains(&format!("option `{option}`")));
    match named {
        Some(option) => format!("the database URL can not be read: the value of its option {option} is wrong"),
        None => "the database URL can not be read: write it as postgres://user:password@host:5432/name, with what is \
                 not a letter, a digit, -, . or _ in the password as %XX, or as key=value pairs"
            .into(),
    }
}

/// Takes `sslmode=...` out of a URL's query or a DSN, and leaves everything else as it stands.
fn take_sslmode(text: &str, is_url: bool) -> (String, Option<&str>) {
    let is_border = |before: Option<char>| match before {
        None => true,
        Some(before) if is_url => before == '?' || before == '&',
        Some(before) => before.is_whitespace(),
    };
    let found = text
        .match_indices("sslmode=")
        .find(|(at, _)| is_border(text.get(..*at).and_then(|head| head.chars().next_back())));
    let Some((at, key)) = found else {
        return (text.to_owned(), None);
    };
    let (head, rest) = text.split_at(at);
    let rest = rest.get(key.len()..).unwrap_or_default();
    let end = rest
        .find(|letter: char| if is_url { letter == '&' } else { letter.is_whitespace() })
        .unwrap_or(rest.len());
    let (mode, tail) = rest.split_at(end);
    let cleaned = if is_url {
        format!("{head}{}", tail.strip_prefix('&').unwrap_or(tail))
    } else {
        format!("{head}{tail}")
    };
    (
        cleaned.trim_end_matches(['?', '&']).to_owned(),
        Some(mode.trim_matches('\'')),
    )
}

/// Whether every host is this machine, by name and, where one is given, by number: the number is what is connected to.
pub(super) fn is_local(config: &tokio_postgres::Config) -> bool {
    let by_name = config.get_hosts().iter().all(|host| match host {
        tokio_postgres::config::Host::Tcp(name) => tls::is_loopback(name),
        tokio_postgres::config::Host::Unix(_) => true,
    });
    by_name && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<(bool, bool), String> {
        parse_url(url).map(|(config, encrypted)| (encrypted, is_local(&config)))
    }

    /// deadpool's own settings would leave these out.
    #[test]
    fn the_url_is_read_by_tokio_postgres_itself() {
        let url =
            "postgres://u:p@a,b/db?target_session_attrs=read-write&channel_binding=require&load_balance_hosts=random";
        let (config, _) = parse_url(url).expect("a URL");
        assert_eq!(
            (
                config.get_target_session_attrs(),
                config.get_channel_binding(),
                config.get_load_balance_hosts()
            ),
            (
                tokio_postgres::config::TargetSessionAttrs::ReadWrite,
                tokio_postgres::config::ChannelBinding::Require,
                tokio_postgres::config::LoadBalanceHosts::Random,
            )
        );
    }

    #[test]
    fn urls_say_whether_they_are_encrypted_and_local() {
        let (plain, encrypted, local, remote) = (false, true, true, false);
        for (url, expected) in [
            ("postgres://u:p@localhost/db", (plain, local)),
            ("postgres://u:p@127.0.0.1:5433/db?application_name=x", (plain, local)),
            ("postgresql://u:p@[::1]/db", (plain, local)),
            ("postgres://u:p@%2Fvar%2Frun%2Fpostgresql/db", (plain, local)),
            ("postgres://u:p@db.internal/db", (plain, remote)),
            ("postgres://u:p@localhost,db.internal/db", (plain, remote)),
            ("postgres://u:p@/db?hostaddr=10.0.0.5", (plain, remote)),
            ("postgres://u:p@localhost/db?hostaddr=10.0.0.5", (plain, remote)),
            ("host=localhost hostaddr=10.0.0.5", (plain, remote)),
            ("postgres://u:p@db.internal/db?sslmode=require", (encrypted, remote)),
            (
                "postgres://u:p@db.internal/db?connect_timeout=3&sslmode=verify-full",
                (encrypted, remote),
            ),
            (
                "postgres://u:p@db.internal/db?sslmode=verify-full&connect_timeout=3",
                (encrypted, remote),
            ),
            (
                "host=db.internal user=u password='a  b' sslmode='verify-full' dbname=db",
                (encrypted, remote),
            ),
            ("host=db.internal user=u sslmode = require", (encrypted, remote)),
            ("postgres://u:sslmode=x@db.internal/db?sslmode=disable", (plain, remote)),
        ] {
            assert_eq!(read(url), Ok(expected), "{url}");
        }
        for url in [
            "",
            "postgres://u:p@h/db?sslmode=prefer",
            "postgres://u:p@h/db?sslmode=verify-ca",
            "nonsense",
        ] {
            let sentence = read(url).expect_err(url);
            assert!(!sentence.contains(":p@"), "{sentence}");
        }
        // Wherever a password stands, written as it should not be, no piece of it is repeated.
        for url in [
            "postgres://u:hunter2@h:hunter2/db",
            "postgres://u:x?sslmode=hunter2@h/db",
            "postgres://u:x&sslmode=hunter2@h/db?sslmode=hunter2",
            "postgres://u:p@h/db?sslmode=hunter2",
            "postgres://u:p@h/db?sslmode=hunter2,require",
            "postgres://u:p@h/db?hunter2=hunter2",
            "postgres://u:p@h/db?port=hunter2",
            "postgres://u:p@h/db?connect_timeout=hunter2",
            "postgres://u:p@h/db?target_session_attrs=hunter2",
            "postgres://u:%hunter2@h/db?hostaddr=hunter2",
            "postgres://u:hunter2/hunter2@h/db?channel_binding=hunter2",
            "postgresql://hunter2:hunter2/x?hunter2",
            "host=h password=hun ter2 hunter2",
            "host=h password='hunter2",
            "host=h sslmode=hunter2 password=hunter2",
            "host=h sslmode='hunter2' password=hunter2",
            "host=h sslmode = hunter2",
            "host=h hunter2=hunter2",
            "host=h port=hunter2",
        ] {
            let sentence = read(url).expect_err(url);
            assert!(
                !sentence.contains("unter2") && !sentence.contains("ter2"),
                "{url}: {sentence}"
            );
        }
    }

    #[test]
    fn the_same_database_for_another_login() {
        for text in [
            "postgres://u:p@a:1,b:2/db",
            "postgres://a/db?connect_timeout=3",
            "postgresql://u@a/db?user=x&password=y",
            "postgres://u:p@%2Fvar%2Frun/db",
            "host=a user=u password='p  p' dbname=db",
        ] {
            let (before, _) = parse_url(text).expect("a URL");
            let url = with_login(text, "worker_1", "s3");
            assert!(!url.contains("u:p"), "{url}");
            let (config, _) = parse_url(&url).expect("a URL");
            assert_eq!(
                (config.get_user(), config.get_password()),
                (Some("worker_1"), Some(b"s3".as_slice())),
                "{text}"
            );
            assert_eq!(
                (config.get_hosts(), config.get_ports(), config.get_dbname()),
                (before.get_hosts(), before.get_ports(), Some("db")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_password_keeps_its_blanks() {
        let (config, _) = parse_url("host=h user=u password='a  b' sslmode=require").expect("a DSN");
        assert_eq!(config.get_password(), Some(b"a  b".as_slice()));
    }
}
