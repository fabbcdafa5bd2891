//! Labels: with few, fixed values, or bounded where whoever publishes chooses them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

/// A label with few, fixed values.
macro_rules! label {
    ($(#[$about:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($variant),+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

label!(
    /// What we stand on.
    Dependency { Database = "database", Broker = "broker" }
);
label!(
    /// The door a batch came through.
    Door { Queue = "queue", Parked = "parked", Replayed = "replayed", Held = "held", Dead = "dead" }
);
label!(
    /// A step of a batch that is timed.
    Stage {
        Facts = "facts",
        Hold = "hold",
        Load = "load",
        Decide = "decide",
        Write = "write",
        Commit = "commit",
        Settle = "settle",
        Publish = "publish",
        Collect = "collect",
    }
);
label!(
    /// What is asked of the public API.
    ApiRoute {
        UpdateAllocation = "update_allocation",
        UpdateDeallocation = "update_deallocation",
        PartnerAllocations = "partner_allocations",
        PartnerAllocation = "partner_allocation",
        PartnerBalances = "partner_balances",
        ClientAllocations = "client_allocations",
        ClientAllocation = "client_allocation",
        Receipt = "receipt",
        Openapi = "openapi",
        Other = "other",
    }
);
label!(
    /// Why intake is paused.
    PauseCause {
        Database = "database",
        Broker = "broker",
        Culprits = "culprits",
        Schema = "schema",
        DeadLetterReturned = "dead_letter_returned",
    }
);
label!(
    /// What became of an event: confirmed with or without a queue bound for it.
    EventFate { Confirmed = "confirmed", Unrouted = "unrouted" }
);
label!(
    /// What became of an answer to `reply_to`.
    ReplyResult { Sent = "sent", Failed = "failed", Ignored = "ignored" }
);
label!(
    /// What became of a span: the receiver has it, an export failed, or there was no room for it.
    SpanFate { Exported = "exported", Failed = "failed", Dropped = "dropped" }
);
label!(
    /// The type of an event.
    EventType {
        AllocationCleared = "allocation.cleared",
        AllocationReleased = "allocation.released",
        DeallocationCleared = "deallocation.cleared",
        DeallocationReleased = "deallocation.released",
        UpdateParked = "update.parked",
        UpdateRejected = "update.rejected",
        PartnerSuspended = "partner.suspended",
        PartnerQuarantined = "partner.quarantined",
        PartnerResumed = "partner.resumed",
        KeyEnding = "key.ending",
        Other = "other",
    }
);

impl EventType {
    /// Reads it off an event's routing key: the type, alone or followed by a dot and the enterprise.
    pub fn of_routing_key(routing_key: &str) -> Self {
        let mut parts = routing_key.splitn(3, '.');
        let (first, second) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.as_str().split_once('.') == Some((first, second)))
            .unwrap_or(EventType::Other)
    }
}

/// The partners that have a label of their own. Whoever publishes chooses the enterprise in the routing key, so the
/// set is bounded and only partners that the registry knows get in.
#[derive(Debug)]
pub struct PartnerLabels {
    max: usize,
    known: Mutex<HashSet<Arc<str>>>,
}

/// Partners beyond the bound.
const OTHER: &str = "other";
/// Messages of nobody we know, or not shown to be anybody's.
const UNKNOWN: &str = "unknown";

impl PartnerLabels {
    /// At most `max` (`http.partner_labels_max`) labels beside `other` and `unknown`.
    pub fn new(max: usize) -> Self {
        PartnerLabels {
            max,
            known: Mutex::new(HashSet::new()),
        }
    }

    pub(super) fn label(&self, enterprise_id: Option<&str>, registered: bool) -> Arc<str> {
        let Some(enterprise_id) = enterprise_id else {
            return UNKNOWN.into();
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(label) = known.get(enterprise_id) {
            return Arc::clone(label);
        }
        if !registered {
            return UNKNOWN.into();
        }
        if known.len() >= self.max || enterprise_id == OTHER || enterprise_id == UNKNOWN {
            return OTHER.into();
        }
        let label: Arc<str> = enterprise_id.into();
        known.insert(Arc::clone(&label));
        label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_partners_are_bounded() {
        let labels = PartnerLabels::new(2);
        for (enterprise, registered, label) in [
            (Some("stranger"), false, "unknown"),
            (Some("a"), true, "a"),
            (Some("a"), false, "a"),
            (Some("b"), true, "b"),
            (Some("c"), true, "other"),
            (Some("c"), false, "unknown"),
            (Some("a"), true, "a"),
            (None, true, "unknown"),
        ] {
            assert_eq!(
                &*labels.label(enterprise, registered),
                label,
                "{enterprise:?} {registered}"
            );
        }
        assert_eq!(&*PartnerLabels::new(0).label(Some("a"), true), "other");
        assert_eq!(&*PartnerLabels::new(9).label(Some("unknown"), true), "other");
    }

    #[test]
    fn event_types_are_read_off_routing_keys() {
        for kind in EventType::ALL.iter().copied().filter(|kind| *kind != EventType::Other) {
            assert_eq!(EventType::of_routing_key(kind.as_str()), kind);
            assert_eq!(EventType::of_routing_key(&format!("{kind}.acme")), kind);
        }
        for other in [
            "",
            "allocation",
            "allocation.",
            "allocation.clearedx",
            "x.allocation.cleared",
            "other",
        ] {
            assert_eq!(EventType::of_routing_key(other), EventType::Other, "{other}");
        }
    }
}
