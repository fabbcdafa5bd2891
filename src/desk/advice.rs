//! What a partner must do instead, for each reason. A signed body is the partner's word: nobody here can mend it.

use crate::domain::decide::Reason;

/// One sentence or two for the partner, and for the operator who tells it.
pub fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::MessageTooLarge => {
            "Publish it again with a body of at most 262144 bytes, and properties and headers of at most 16384 together."
        }
        Reason::MalformedMessage => {
            "Mend what the detail names (routing key, content type or JSON) and publish it again; its nonce is still free."
        }
        Reason::InvalidField => {
            "Mend the field that the detail names, sign the new payload and publish it; its nonce is still free."
        }
        Reason::UnknownPartner => {
            "Nothing, if the enterprise id is right: once the partner is registered here, a replay settles it. Else publish \
             it again under the right routing key."
        }
        Reason::SenderMismatch => {
            "Publish it again as the broker user agreed on, with the property user_id set. If another user was agreed on, \
             bind the partner to it here and replay."
        }
        Reason::MalformedSignature => {
            "Sign the payload again and send 130 hexadecimal digits: header 31 to 34, r, and the lower s; its nonce is still \
             free."
        }
        Reason::SignatureMismatch => {
            "Sign exactly the text of payload with a registered key and publish it again. If the key was right and only \
             missing here, add it and replay."
        }
        Reason::PayloadMismatch => {
            "Make the signed payload and the body say the same, sign it and publish it again; its nonce is still free."
        }
        Reason::NonceReused => {
            "Publish it again with a nonce that was never used: this one belongs to another payload for ever."
        }
        Reason::PolicyContradiction => {
            "Publish it again without policyResult rejected; or, if the policy did reject it, publish a release."
        }
        Reason::PartnerInactive => {
            "Nothing: once the partner is resumed or enabled for this kind here, a replay settles it."
        }
        Reason::AllocationNotFound => {
            "Check the id. If it is right, nothing: once it is reserved here, a replay settles it."
        }
        Reason::NotPermitted => {
            "Publish it with an id of its own, under the routing key of that id's kind, and with a new nonce."
        }
        Reason::AllocationMismatch => {
            "Publish it again with the value that was reserved for the field that the detail names, and with a new nonce."
        }
        Reason::AlreadySettled => {
            "Nothing can change it: it is settled the other way for good. To move the funds back, the client makes another \
             allocation or deallocation."
        }
        Reason::DeliveryLimit => "Nothing: nobody judged it. Find out here why the worker could not, and replay.",
        Reason::Expired => "Publish without the property expiration. This one was never judged: a replay does so.",
        Reason::Internal => "Nothing: the fault is here. Find it, mend it and replay.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The operator's page says what `show` says.
    #[test]
    fn the_page_lists_every_reason_with_its_advice() {
        let page = include_str!("../../docs/dead-letters.md");
        for reason in Reason::ALL {
            let is_final = if reason.is_final() { "yes" } else { "no" };
            let row = format!("| `{reason}` | {is_final} | {} |", advice(reason));
            assert!(page.contains(&row), "{row}");
        }
    }
}
