//! The reasons by which a message is not settled: one row each, and everything else comes from it.

use std::fmt;

use serde::{Serialize, Serializer};

/// Why a message was not settled, in order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    MessageTooLarge,
    MalformedMessage,
    InvalidField,
    UnknownPartner,
    SenderMismatch,
    MalformedSignature,
    SignatureMismatch,
    PayloadMismatch,
    NonceVoided,
    NonceReused,
    ExpiredUpdate,
    PolicyContradiction,
    PartnerInactive,
    AllocationNotFound,
    NotPermitted,
    CurrencyUnmapped,
    CurrencyMismatch,
    AllocationMismatch,
    AlreadySettled,
    DeliveryLimit,
    Expired,
    Internal,
    /// One that this version does not know: a worker of a newer version wrote it.
    Newer(Newer),
}

/// Whose turn it is with what was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Always theirs where it is final.
    Partner,
    Operator,
    Custody,
    PartnerOrOperator,
}

/// What follows from a reason.
struct Row {
    /// The public code.
    name: &'static str,
    /// The class, in the manner of an HTTP status.
    class: u16,
    /// Whether no later change of registry or state could make the same bytes settle.
    is_final: bool,
    /// Whether it is about how a message was sent, so that the same bytes may be refused for it and yet be right.
    of_the_way: bool,
    /// Whether the registry was asked and knew the partner.
    knew_partner: bool,
    /// Whose turn it is.
    turn: Turn,
    /// What the partner must do instead. A signed body is the partner's word: nobody here can mend it.
    partner: &'static str,
    /// What the operator can do.
    operator: &'static str,
}

impl Reason {
    /// Every reason of this version, in order of precedence.
    pub const ALL: [Reason; 22] = [
        Reason::MessageTooLarge,
        Reason::MalformedMessage,
        Reason::InvalidField,
        Reason::UnknownPartner,
        Reason::SenderMismatch,
        Reason::MalformedSignature,
        Reason::SignatureMismatch,
        Reason::PayloadMismatch,
        Reason::NonceVoided,
        Reason::NonceReused,
        Reason::ExpiredUpdate,
        Reason::PolicyContradiction,
        Reason::PartnerInactive,
        Reason::AllocationNotFound,
        Reason::NotPermitted,
        Reason::CurrencyUnmapped,
        Reason::CurrencyMismatch,
        Reason::AllocationMismatch,
        Reason::AlreadySettled,
        Reason::DeliveryLimit,
        Reason::Expired,
        Reason::Internal,
    ];

    /// The table.
    fn row(self) -> Row {
        match self {
            Reason::MessageTooLarge => Row {
                name: "message_too_large",
                class: 400,
                is_final: true,
                of_the_way: true,
                knew_partner: false,
                turn: Turn::Partner,
                partner: "Publish it again with a body of at most 262144 bytes, and properties and headers of at most 16384 \
                          together.",
                operator: "Nothing here: discard it once the partner knows.",
            },
            Reason::MalformedMessage => Row {
                name: "malformed_message",
                class: 400,
                is_final: true,
                of_the_way: true,
                knew_partner: false,
                turn: Turn::Partner,
                partner: "Mend what the detail names (routing key, content type or JSON) and publish it again; its nonce is \
                          still free.",
                operator: "Nothing here: discard it once the partner knows.",
            },
            Reason::InvalidField => Row {
                name: "invalid_field",
                class: 400,
                is_final: true,
                of_the_way: false,
                knew_partner: false,
                turn: Turn::Partner,
                partner: "Mend the field that the detail names, sign the new payload and publish it; its nonce is still free.",
                operator: "Nothing here: discard it once the partner knows.",
            },
            Reason::UnknownPartner => Row {
                name: "unknown_partner",
                class: 401,
                is_final: false,
                of_the_way: false,
                knew_partner: false,
                turn: Turn::Operator,
                partner: "Nothing, if the enterprise id is right: once the partner is registered here, a replay settles it. \
                          Else publish it again under the right routing key.",
                operator: "If the enterprise id is right, `settled partner add` and replay.",
            },
            Reason::SenderMismatch => Row {
                name: "sender_mismatch",
                class: 403,
                is_final: false,
                of_the_way: true,
                knew_partner: true,
                turn: Turn::Operator,
                partner: "Publish it again as the broker user agreed on, with the property user_id set. If another user was \
                          agreed on, bind the partner to it here and replay.",
                operator: "If another broker user was agreed on, `settled partner set --broker-user` and replay.",
            },
            Reason::MalformedSignature => Row {
                name: "malformed_signature",
                class: 401,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Sign the payload again and send 130 hexadecimal digits: header 31 to 34, r, and the lower s; its \
                          nonce is still free.",
                operator: "Nothing here: discard it once the partner knows.",
            },
            Reason::SignatureMismatch => Row {
                name: "signature_mismatch",
                class: 401,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Operator,
                partner: "Sign exactly the text of payload with a registered key and publish it again. If the key was right \
                          and only missing here, add it and replay.",
                operator: "Compare the recovered key with the partner's. If it is theirs, `settled key add` and replay.",
            },
            Reason::PayloadMismatch => Row {
                name: "payload_mismatch",
                class: 400,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Make the signed payload and the body say the same, sign it and publish it again; its nonce is still \
                          free.",
                operator: "Nothing here: discard it once the partner knows.",
            },
            Reason::NonceVoided => Row {
                name: "nonce_voided",
                class: 409,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "If it is still true, say it again under a new nonce: the operator has made this one unusable.",
                operator: "Nothing here: `settled receipt` says since when, `settled audit list --act 'nonce void'` why.",
            },
            Reason::NonceReused => Row {
                name: "nonce_reused",
                class: 409,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Publish it again with a nonce that was never used: this one belongs to another payload for ever.",
                operator: "Nothing here: `settled receipt` shows what the nonce belongs to.",
            },
            Reason::ExpiredUpdate => Row {
                name: "expired_update",
                class: 408,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "If it is still true, sign it again with a later expiresAt and a new nonce.",
                operator: "Nothing here: by its own signed word it counts no more.",
            },
            Reason::PolicyContradiction => Row {
                name: "policy_contradiction",
                class: 400,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::PartnerOrOperator,
                partner: "Publish it again without policyResult rejected; or, if the policy did reject it, publish a release.",
                operator: "Nothing here: the partner says two things.",
            },
            Reason::PartnerInactive => Row {
                name: "partner_inactive",
                class: 403,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Operator,
                partner: "Nothing: once the partner is resumed or enabled for this kind here, a replay settles it.",
                operator: "If it may settle, `settled partner resume` or `settled partner set`, and replay.",
            },
            Reason::AllocationNotFound => Row {
                name: "allocation_not_found",
                class: 404,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Custody,
                partner: "Check the id. If it is right, nothing: once it is reserved here, a replay settles it.",
                operator: "If the id is right, have it reserved and replay.",
            },
            Reason::NotPermitted => Row {
                name: "not_permitted",
                class: 403,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Publish it with an id of its own, under the routing key of that id's kind, and with a new nonce.",
                operator: "Nothing here: ask the partner how it came by the id.",
            },
            Reason::CurrencyUnmapped => Row {
                name: "currency_unmapped",
                class: 500,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Operator,
                partner: "Nothing, if the symbol is right: the map here lacks it, and once it is mapped, a replay settles it.",
                operator: "If the partner means what was reserved, `settled currency map` and replay.",
            },
            Reason::CurrencyMismatch => Row {
                name: "currency_mismatch",
                class: 409,
                is_final: false,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::PartnerOrOperator,
                partner: "Check the symbol: here it does not mean the currency that was reserved. If it should, have the map \
                          mended here: a replay settles it then. Else sign it anew with the right one and a new nonce.",
                operator: "Compare `settled currency list` with what the partner means. If the map is wrong, \
                           `settled currency map --replace` and replay.",
            },
            Reason::AllocationMismatch => Row {
                name: "allocation_mismatch",
                class: 409,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Publish it again with the value that was reserved for the field that the detail names, and with a \
                          new nonce.",
                operator: "Nothing here: `settled allocation show` says what was reserved.",
            },
            Reason::AlreadySettled => Row {
                name: "already_settled",
                class: 409,
                is_final: true,
                of_the_way: false,
                knew_partner: true,
                turn: Turn::Partner,
                partner: "Nothing can change it: it is settled the other way for good. To move the funds back, the client \
                          makes another allocation or deallocation.",
                operator: "Nothing here: `settled timeline` shows who settled it.",
            },
            Reason::DeliveryLimit => Row {
                name: "delivery_limit",
                class: 500,
                is_final: false,
                of_the_way: true,
                knew_partner: false,
                turn: Turn::Operator,
                partner: "Nothing: nobody judged it. Find out here why the worker could not, and replay.",
                operator: "Find out why the worker could not judge it, and replay.",
            },
            Reason::Expired => Row {
                name: "expired",
                class: 408,
                is_final: false,
                of_the_way: true,
                knew_partner: false,
                turn: Turn::PartnerOrOperator,
                partner: "Publish without the property expiration. This one was never judged: a replay does so.",
                operator: "Replay it, if it still counts: nobody judged it.",
            },
            Reason::Internal => Row {
                name: "internal",
                class: 500,
                is_final: false,
                of_the_way: true,
                knew_partner: false,
                turn: Turn::Operator,
                partner: "Nothing: the fault is here. Find it, mend it and replay.",
                operator: "Find the fault in the worker's log, mend it and replay.",
            },
            Reason::Newer(newer) => Row {
                name: "unknown",
                class: newer.class.unwrap_or(500),
                is_final: newer.is_final.unwrap_or(false),
                // Nobody here knows what it is about.
                of_the_way: true,
                knew_partner: true,
                turn: if newer.is_final == Some(true) {
                    Turn::Partner
                } else {
                    Turn::PartnerOrOperator
                },
                partner: "A newer version of settled refused it for a reason that this one does not know: look for the reason \
                          in that version's documentation.",
                operator: "Look at it, and replay it, with the newer version: this one only repeats what that one said.",
            },
        }
    }

    /// The public code.
    pub fn as_str(&self) -> &str {
        if let Reason::Newer(newer) = self {
            newer.as_str()
        } else {
            self.label()
        }
    }

    /// The name for what holds few of them, such as the label of a metric: of all that this version does not know, `unknown`.
    pub fn label(self) -> &'static str {
        self.row().name
    }

    /// Reads a public code of this version.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }

    /// Reads what some version wrote: what this one does not know is kept as it is.
    pub fn written(text: &str) -> Self {
        Self::parse(text).unwrap_or_else(|| Reason::Newer(Newer::new(text)))
    }

    /// The same with what was written beside it. What this version knows is known better.
    #[must_use]
    pub fn with(self, class: Option<u16>, is_final: Option<bool>) -> Self {
        if let Reason::Newer(newer) = self {
            Reason::Newer(Newer {
                class: class.or(newer.class),
                is_final: is_final.or(newer.is_final),
                ..newer
            })
        } else {
            self
        }
    }

    pub fn is_newer(self) -> bool {
        matches!(self, Reason::Newer(_))
    }

    /// The class, in the manner of an HTTP status. Of a newer reason what the newer worker told, else 500.
    pub fn class(self) -> u16 {
        self.row().class
    }

    /// Whether no later change of registry or state could make the same bytes settle. Of a newer reason what the newer
    /// worker told, else not.
    pub fn is_final(self) -> bool {
        self.row().is_final
    }

    /// Whether it is about how a message was sent, so that the same bytes may be refused for it and yet be right.
    pub fn is_of_the_way(self) -> bool {
        self.row().of_the_way
    }

    /// Whether the registry was asked and knew the partner.
    pub fn knew_partner(self) -> bool {
        self.row().knew_partner
    }

    /// Whose turn it is with what was refused for it.
    pub fn turn(self) -> Turn {
        self.row().turn
    }

    /// What the partner must do instead.
    pub fn advice_to_partner(self) -> &'static str {
        self.row().partner
    }

    /// What the operator can do.
    pub fn advice_to_operator(self) -> &'static str {
        self.row().operator
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The longest name of a newer reason, in bytes.
const NAME_MAX: usize = 64;

/// A reason of a newer version, as it was written, and what was written beside it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Newer {
    /// UTF-8, as far as `len`; zeros behind it.
    name: [u8; NAME_MAX],
    len: usize,
    class: Option<u16>,
    is_final: Option<bool>,
}

impl Newer {
    /// Cut after the last character that fits.
    fn new(text: &str) -> Self {
        let len = text.floor_char_boundary(NAME_MAX);
        let mut name = [0; NAME_MAX];
        for (place, byte) in name.iter_mut().zip(text.bytes().take(len)) {
            *place = byte;
        }
        Self {
            name,
            len,
            class: None,
            is_final: None,
        }
    }

    fn as_str(&self) -> &str {
        let written = self.name.get(..self.len).map(std::str::from_utf8);
        // It was cut from text.
        written.and_then(Result::ok).unwrap_or("unknown")
    }
}

impl fmt::Debug for Newer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?} {:?}", self.as_str(), self.class, self.is_final)
    }
}

/// Whether text has the form of a public code, whichever version knows it.
pub fn is_code(text: &str) -> bool {
    (1..=NAME_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_final_is_the_partners_turn() {
        let newer = Reason::written("of_tomorrow").with(None, Some(true));
        for reason in Reason::ALL.into_iter().chain([newer]) {
            if reason.is_final() {
                assert_eq!(reason.turn(), Turn::Partner, "{reason}");
            }
        }
    }

    #[test]
    fn what_a_newer_version_wrote_stays_as_it_is() {
        let odd = format!("{}\u{e9}", "x".repeat(63));
        for (text, kept) in [
            ("custody_frozen", "custody_frozen"),
            ("", ""),
            ("Was ist das?", "Was ist das?"),
            (odd.as_str(), &odd[..63]),
        ] {
            let reason = Reason::written(text);
            assert!(reason.is_newer());
            assert_eq!((reason.as_str(), reason.label()), (kept, "unknown"));
            assert_eq!((reason.class(), reason.is_final()), (500, false), "nobody told");
            let told = reason.with(Some(423), Some(true));
            assert_eq!((told.class(), told.is_final()), (423, true));
            assert_eq!(told.with(None, None), told);
            assert_eq!(serde_json::to_value(told).ok(), Some(kept.into()));
        }
        for reason in Reason::ALL {
            assert_eq!(Reason::written(reason.as_str()), reason);
            assert_eq!(reason.with(Some(1), Some(!reason.is_final())), reason, "known better");
            assert!(is_code(reason.as_str()) && !reason.is_newer());
        }
        assert!(!is_code("") && !is_code("Custody") && !is_code("a b") && !is_code(&"a".repeat(65)));
    }

    /// The operator's page says what `show` says, and nothing else.
    #[test]
    fn the_page_lists_every_reason_with_its_advice() {
        let page = include_str!("../../docs/dead-letters.md");
        let head = "| reason | final | what the partner must do |";
        let (_, table) = page.split_once(head).expect("the table is there");
        let rows: Vec<&str> = table
            .lines()
            .skip(2)
            .take_while(|line| line.starts_with("| "))
            .collect();
        let ours: Vec<String> = Reason::ALL
            .into_iter()
            .map(|reason| {
                let is_final = if reason.is_final() { "yes" } else { "no" };
                format!("| `{reason}` | {is_final} | {} |", reason.advice_to_partner())
            })
            .collect();
        assert_eq!(rows, ours);
    }
}
