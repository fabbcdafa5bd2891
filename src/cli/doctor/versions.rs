//! What is known of the servers' versions: who is out of support, and which faults of theirs touch us. None of it is a problem by
//! itself: money is right on each of them.

use jiff::{Timestamp, civil::Date, tz::TimeZone};

/// The last day of PostgreSQL's support, by major version.
const POSTGRES: [(i32, Date); 6] = [
    (13, jiff::civil::date(2025, 11, 13)),
    (14, jiff::civil::date(2026, 11, 12)),
    (15, jiff::civil::date(2027, 11, 11)),
    (16, jiff::civil::date(2028, 11, 9)),
    (17, jiff::civil::date(2029, 11, 8)),
    (18, jiff::civil::date(2030, 11, 14)),
];

/// The oldest series of RabbitMQ that anybody still mends for everybody, when this program was made.
const RABBITMQ_MENDED: (u32, u32) = (4, 2);

/// The newest series that this program was tried on.
const RABBITMQ_TRIED: (u32, u32) = (4, 3);
const POSTGRES_TRIED: i32 = 18;

type Version = (u32, u32, u32);

/// A fault of RabbitMQ that touches us: which versions have it, and what it means.
struct Fault {
    has: fn(Version) -> bool,
    says: &'static str,
}

const FAULTS: [Fault; 3] = [
    Fault {
        has: |version| version < (4, 3, 3),
        says: "before 4.3.3 its own dead-lettering can stick after changes of queue members (rabbitmq-server 16652): watch \
               settled_broker_dead_letters_waiting",
    },
    Fault {
        has: |version| matches!(version, (4, 2, 6) | (4, 3, 0)),
        says: "it asks for the right to configure a queue even to look at it: depths of queues are not seen without",
    },
    Fault {
        has: |version| ((4, 2, 0)..(4, 2, 4)).contains(&version),
        says: "before 4.2.4 variables in topic permissions may not be filled in: write them out for each partner",
    },
];

/// What there is to say of a broker that names itself so, `RabbitMQ 4.0.5`.
pub(super) fn of_broker(named: &str) -> Option<String> {
    let version = read(named.strip_prefix("RabbitMQ ")?)?;
    let series = (version.0, version.1);
    let mut said = Vec::new();
    if series < RABBITMQ_MENDED {
        said.push(format!(
            "RabbitMQ {}.{} is out of support: plan its upgrade",
            series.0, series.1
        ));
    }
    if series > RABBITMQ_TRIED {
        said.push(format!(
            "newer than the {}.{} that this program was tried on",
            RABBITMQ_TRIED.0, RABBITMQ_TRIED.1
        ));
    }
    said.extend(
        FAULTS
            .iter()
            .filter(|fault| (fault.has)(version))
            .map(|fault| fault.says.to_owned()),
    );
    (!said.is_empty()).then(|| said.join("; "))
}

/// Whether topic permissions keep partners apart on a broker.
pub(in crate::cli) fn topic_permissions(named: &str) -> String {
    let fault = named.strip_prefix("RabbitMQ ").and_then(read).is_some_and(|version| {
        FAULTS
            .iter()
            .any(|fault| fault.says.contains("topic permissions") && (fault.has)(version))
    });
    let also = if fault {
        "; and on this version variables in them may not be filled in"
    } else {
        ""
    };
    format!(
        "topic permissions alone do not keep partners apart, since a CC header copies a message past them{also}: an exchange for \
         each partner does"
    )
}

fn read(text: &str) -> Option<Version> {
    let digits = text
        .split(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .next()?;
    let mut parts = digits.split('.').map(str::parse);
    let mut next = || parts.next().and_then(Result::ok);
    Some((next()?, next()?, next().unwrap_or_default()))
}

/// What there is to say of a PostgreSQL of this `server_version_num`.
pub(super) fn of_postgres(number: i32, now: Timestamp) -> Option<String> {
    let major = number / 10_000;
    if major > POSTGRES_TRIED {
        return Some(format!(
            "newer than the {POSTGRES_TRIED} that this program was tried on"
        ));
    }
    let today = now.to_zoned(TimeZone::UTC).date();
    let end = POSTGRES.iter().find(|(of, _)| *of == major).map(|(_, end)| *end);
    match end {
        Some(end) if today <= end => None,
        Some(end) => Some(format!(
            "PostgreSQL {major} is out of support since {end}: plan its upgrade"
        )),
        None => Some(format!("PostgreSQL {major} is out of support: plan its upgrade")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brokers_are_known_by_their_version() {
        let says = |named: &str, what: &str| of_broker(named).is_some_and(|said| said.contains(what));
        for (named, unsupported, sticks, configure) in [
            ("RabbitMQ 3.10.8", true, true, false),
            ("RabbitMQ 3.13.7+rc.1", true, true, false),
            ("RabbitMQ 4.0.5", true, true, false),
            ("RabbitMQ 4.2.6", false, true, true),
            ("RabbitMQ 4.3.0", false, true, true),
            ("RabbitMQ 4.3.2", false, true, false),
            ("RabbitMQ 4.3.6", false, false, false),
        ] {
            assert_eq!(says(named, "out of support"), unsupported, "{named}");
            assert_eq!(says(named, "16652"), sticks, "{named}");
            assert_eq!(says(named, "to configure"), configure, "{named}");
        }
        assert!(says("RabbitMQ 4.4.0", "newer than"));
        for nothing in ["RabbitMQ 4.3.6", "RabbitMQ unknown", "something else 1.0", ""] {
            assert_eq!(of_broker(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn postgres_is_out_of_support_the_day_after() {
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let (last, after) = (at("2027-11-11T23:59:59Z"), at("2027-11-12T00:00:00Z"));
        assert_eq!(of_postgres(150_018, last), None);
        assert!(of_postgres(150_018, after).is_some_and(|said| said.contains("2027-11-11")));
        assert_eq!(of_postgres(180_001, after), None);
        assert!(of_postgres(120_000, last).is_some());
        assert!(of_postgres(190_000, last).is_some_and(|said| said.contains("newer")));
    }
}
