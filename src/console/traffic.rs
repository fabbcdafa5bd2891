//! What each partner sends, as workers count it: how much, and how much of it is refused.

use std::collections::BTreeMap;

/// The counter that it is told by.
const COUNTER: &str = "settled_partner_messages_total{";

/// Messages that were judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct JudgedCount {
    pub(super) messages: u64,
    pub(super) rejected: u64,
}

impl JudgedCount {
    /// Whether who had counted so much may say this later: who was started anew counts from nothing.
    pub(super) fn may_become(self, now: JudgedCount) -> bool {
        self.messages <= now.messages && self.rejected <= now.rejected
    }

    /// What came on top of an earlier count.
    pub(super) fn since(self, earlier: JudgedCount) -> JudgedCount {
        if !earlier.may_become(self) {
            return self;
        }
        JudgedCount {
            messages: self.messages - earlier.messages,
            rejected: self.rejected - earlier.rejected,
        }
    }

    pub(super) fn add(&mut self, other: JudgedCount) {
        self.messages += other.messages;
        self.rejected += other.rejected;
    }

    /// Refused ones of a hundred, to a tenth; none where nothing was judged.
    pub(super) fn rejected_percent(self) -> Option<String> {
        let tenths = (self.rejected * 1_000).checked_div(self.messages)?;
        Some(format!("{}.{} %", tenths / 10, tenths % 10))
    }
}

/// By partner.
pub(super) type Traffic = BTreeMap<String, JudgedCount>;

/// What a worker's metrics say of it. Partners without a line of their own there have none here.
pub(super) fn traffic(metrics: &str) -> Traffic {
    let mut traffic = Traffic::new();
    for line in metrics.lines() {
        let Some((labels, count)) = line.strip_prefix(COUNTER).and_then(|rest| rest.split_once("} ")) else {
            continue;
        };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0)
        };
        let (Some(partner), Some(verdict), Ok(count)) =
            (label("enterprise_id"), label("verdict"), count.parse::<u64>())
        else {
            continue;
        };
        traffic.entry(partner.to_owned()).or_default().add(JudgedCount {
            messages: count,
            rejected: if verdict == "rejected" { count } else { 0 },
        });
    }
    traffic
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_partners_send_is_read_off_a_counter() {
        let text = "# TYPE settled_partner_messages_total counter\n\
                    settled_partner_messages_total{enterprise_id=\"acme\",verdict=\"settled\"} 90\n\
                    settled_partner_messages_total{verdict=\"rejected\",enterprise_id=\"acme\"} 10\n\
                    settled_partner_messages_total{enterprise_id=\"globex\",verdict=\"parked\"} 1\n\
                    settled_partner_messages_total{enterprise_id=\"x\"} 1\n\
                    settled_messages_total{verdict=\"settled\"} 7\n";
        let found = traffic(text);
        let of = |partner: &str| found.get(partner).map(|count| (count.messages, count.rejected));
        assert_eq!(
            (of("acme"), of("globex"), of("x")),
            (Some((100, 10)), Some((1, 0)), None)
        );
        let acme = found["acme"];
        assert_eq!(acme.rejected_percent().as_deref(), Some("10.0 %"));
        assert_eq!(JudgedCount::default().rejected_percent(), None);
        let earlier = JudgedCount {
            messages: 40,
            rejected: 9,
        };
        assert_eq!(acme.since(earlier).rejected_percent().as_deref(), Some("1.6 %"));
        assert_eq!(earlier.since(acme), earlier, "it was started anew");
    }
}
