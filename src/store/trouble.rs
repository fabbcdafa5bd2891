//! What keeps us from the database, told apart: a refused login is not a server that does not answer.

use std::error::Error;

use super::StoreError;
use crate::tls::TlsFilesError;

/// By SQLSTATE, and by the kind of error where the server said nothing. In words for whoever looks at `/readyz`, a log or a
/// terminal; none of them repeats a part of the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    NoAnswer,
    Login,
    NoSuchDatabase,
    TooMany,
    Starting,
    Stopping,
    ReadOnly,
    NoRoom,
    Forgets,
    Tls,
    Right,
    /// Any other answer.
    Refuses,
}

impl Trouble {
    pub(super) fn of_code(code: &str) -> Self {
        match code {
            "28000" | "28P01" => Trouble::Login,
            "3D000" => Trouble::NoSuchDatabase,
            "53300" => Trouble::TooMany,
            "57P03" => Trouble::Starting,
            "57P01" | "57P02" | "57P05" => Trouble::Stopping,
            "25006" => Trouble::ReadOnly,
            "53100" | "53200" => Trouble::NoRoom,
            "26000" | "42P05" => Trouble::Forgets,
            "42501" => Trouble::Right,
            _ => match code.get(..2) {
                Some("08") => Trouble::NoAnswer,
                _ => Trouble::Refuses,
            },
        }
    }

    /// Of an error without a code: TLS that could not be agreed on, or nobody.
    pub(super) fn of_error(error: &tokio_postgres::Error) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        while let Some(one) = cause {
            let io = one.downcast_ref::<std::io::Error>();
            // So tokio-postgres says that a server is not the one that was asked for (target_session_attrs).
            if io.is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied && io.raw_os_error().is_none()) {
                return Trouble::ReadOnly;
            }
            let inner = io.and_then(std::io::Error::get_ref);
            let is_of_tls = one.is::<rustls::Error>() || one.is::<TlsFilesError>();
            if is_of_tls || inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
                return Trouble::Tls;
            }
            cause = one.source();
        }
        Trouble::NoAnswer
    }

    /// A sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Trouble::NoAnswer => "the database does not answer",
            Trouble::Login => "the database refuses our login",
            Trouble::NoSuchDatabase => "the server has no database of that name",
            Trouble::TooMany => "the database takes no more connections",
            Trouble::Starting => "the database is starting up, or does not take connections yet",
            Trouble::Stopping => "the database is shutting down, or ended our connection",
            Trouble::ReadOnly => "the database is read-only",
            Trouble::NoRoom => "the database has no disk or memory left",
            Trouble::Forgets => "the database does not know our prepared statements",
            Trouble::Tls => "TLS with the database can not be agreed on",
            Trouble::Right => "the database user lacks a right",
            Trouble::Refuses => "the database refuses what it is asked",
        }
    }

    /// The same as the beginning of a command's complaint.
    pub fn in_a_command(self) -> &'static str {
        match self {
            Trouble::NoAnswer => "the database is away",
            other => other.sentence(),
        }
    }

    /// What to do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Trouble::NoAnswer => "check that it runs and that SETTLED_DATABASE_URL (or --database-url) says where",
            Trouble::Login => {
                "check user and password in SETTLED_DATABASE_URL (or --database-url), database.client_certificate_file \
                 where the server asks for a certificate, and pg_hba.conf on the server"
            }
            Trouble::NoSuchDatabase => "create it, or check the name in SETTLED_DATABASE_URL (or --database-url)",
            Trouble::TooMany => "raise max_connections on the server, or lower database.pool_size",
            Trouble::Starting => "wait until it is up, and try again",
            Trouble::Stopping => "find out who stopped it, and try again",
            Trouble::ReadOnly => {
                "let SETTLED_DATABASE_URL name the primary, or name all servers and target_session_attrs=read-write"
            }
            Trouble::NoRoom => "make room on the server",
            Trouble::Forgets => {
                "a pooler in between lends a connection for a transaction and forgets what was prepared on it: let it \
                 pool by session, or keep prepared statements (PgBouncer 1.21 or later with max_prepared_statements above 0)"
            }
            Trouble::Tls => {
                "check database.ca_file, the server's certificate and the host's name in it, and \
                 database.client_certificate_file: whether the server trusts who signed it"
            }
            Trouble::Right => "`settled doctor` says which, and the SQL that grants it",
            Trouble::Refuses => "the log of the database says more",
        }
    }
}

/// The server's words about who may not come in, without the names of user, database and host in them: they are parts of the
/// URL, and of one that was written wrong they may be parts of the password.
pub(super) fn without_names(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut ends: Option<&[char]> = None;
    for letter in text.chars() {
        if let Some(end) = ends {
            if end.contains(&letter) {
                shown.push(letter);
                ends = None;
            }
            continue;
        }
        shown.push(letter);
        ends = match letter {
            '"' => Some(&['"']),
            '«' => Some(&['»']),
            '»' => Some(&['«']),
            '“' => Some(&['”']),
            '„' => Some(&['“', '”']),
            _ => None,
        };
        if ends.is_some() {
            shown.push_str("***");
        }
    }
    shown
}

impl StoreError {
    /// What keeps us from the database.
    pub fn trouble(&self) -> Trouble {
        self.trouble
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_not_repeated() {
        for (text, shown) in [
            (
                "no pg_hba.conf entry for host \"10.0.0.1\", user \"u\", database \"d\", no encryption",
                "no pg_hba.conf entry for host \"***\", user \"***\", database \"***\", no encryption",
            ),
            ("database \"a", "database \"***"),
            ("la base « a b » n'existe pas", "la base «***» n'existe pas"),
            ("Datenbank »x«", "Datenbank »***«"),
            (
                "the database system is starting up",
                "the database system is starting up",
            ),
        ] {
            assert_eq!(without_names(text), shown);
        }
    }

    #[test]
    fn only_silence_is_no_answer() {
        for code in [
            "28000", "28P01", "3D000", "53300", "53100", "57P01", "57P02", "57P03", "57P05", "25006", "26000", "42P05",
            "42501", "XX000",
        ] {
            let trouble = Trouble::of_code(code);
            assert_ne!(trouble, Trouble::NoAnswer, "{code}");
            assert!(
                !trouble.sentence().contains("not answer") && !trouble.in_a_command().contains("away"),
                "{code}"
            );
            assert!(!trouble.hint().is_empty());
        }
        assert_eq!(Trouble::of_code("08006"), Trouble::NoAnswer);
    }
}
