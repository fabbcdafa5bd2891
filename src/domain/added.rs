//! Everything that a broker adds to the headers of a message, in one place: by name, and by form what a later version may
//! bring.

/// A header that a broker writes.
struct Added {
    /// The name, or the beginning of the names.
    name: &'static str,
    is_beginning: bool,
    /// The first RabbitMQ that does so.
    #[cfg_attr(not(test), expect(dead_code, reason = "docs/dead-letters.md is held to it"))]
    since: &'static str,
}

const fn named(name: &'static str, since: &'static str) -> Added {
    Added {
        name,
        is_beginning: false,
        since,
    }
}

const fn beginning(name: &'static str, since: &'static str) -> Added {
    Added {
        name,
        is_beginning: true,
        since,
    }
}

/// How often a message was handed out. A quorum queue writes these whenever it delivers once more; whatever a sender wrote
/// under such a name is gone then.
const COUNTERS: [Added; 2] = [named("x-delivery-count", "3.8"), named("x-acquired-count", "4.3")];

/// How a message came to where it is: once more at each death.
const DEATHS: [Added; 4] = [
    named("x-death", "2.8"),
    beginning("x-first-death-", "3.6"),
    beginning("x-last-death-", "3.13"),
    named("x-opt-deaths", "4.0"),
];

/// Of these one header is as large as it is, and still no part of what a sender may send: a broker that writes more than this
/// in all is none that we know.
const ROOM: usize = 4_096;

/// The largest value that is taken for a broker's, in bytes: a name of a node or of a queue.
pub(in crate::domain) const VALUE_MAX: usize = 256;

impl Added {
    fn is(&self, name: &str) -> bool {
        if self.is_beginning {
            name.starts_with(self.name)
        } else {
            name == self.name
        }
    }
}

/// Whether a header is known to be a broker's own, and so nothing that the sender said: it does not travel on.
pub(in crate::domain) fn is_of_the_broker(name: &str) -> bool {
    COUNTERS.iter().chain(&DEATHS).any(|added| added.is(name))
}

/// How a header counts in the size of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::domain) enum Size {
    /// As its sender's.
    Counted,
    /// It may come, go or grow between one delivery of a message and the next.
    Free,
}

/// A redelivery never changes a verdict, and of headers only their size has a part in one. The counters are free. So is, up to
/// a bound in all, whatever has the form that a broker's own headers have: a name that begins with `x-`, and a number, a
/// boolean or a short text. Interceptors (4.2 and later) and versions to come write such.
pub(in crate::domain) fn size_of(name: &str, is_short: bool) -> Size {
    if is_short && name.starts_with("x-") {
        Size::Free
    } else {
        Size::Counted
    }
}

/// Of so many bytes in the form of a broker's headers, those that are not the sender's. What is known by name is never his.
pub(in crate::domain) fn free(known: usize, others: usize) -> usize {
    known.saturating_add(others.min(ROOM))
}

/// Whether a header is a broker's count of deliveries.
pub(in crate::domain) fn is_counter(name: &str) -> bool {
    COUNTERS.iter().any(|added| added.is(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_the_same_names_and_versions() {
        let page = include_str!("../../docs/dead-letters.md");
        for added in COUNTERS.iter().chain(&DEATHS) {
            let star = if added.is_beginning { "*" } else { "" };
            let row = format!("| `{}{star}` | {} |", added.name, added.since);
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn what_a_sender_writes_is_his() {
        for (name, ours) in [
            ("x-delivery-count", true),
            ("x-delivery-counter", false),
            ("x-acquired-count", true),
            ("x-first-death-queue", true),
            ("x-last-death-exchange", true),
            ("x-first-death", false),
            ("x-death-count", false),
            ("delivery-count", false),
        ] {
            assert_eq!(is_of_the_broker(name), ours, "{name}");
        }
    }
}
