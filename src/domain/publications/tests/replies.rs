//! Replies.

use super::*;

#[test]
fn which_names_are_answered_to() {
    for (name, answered) in [
        ("amq.rabbitmq.reply-to.g1h2AA5yZXBseUAyNzc.x", true),
        ("settlement.reply.acme.x", true),
        ("settlement.reply.acme.x.y", true),
        ("settlement.reply.acme", false),
        ("settlement.reply.acme2.x", false),
        ("settlement.reply.acm.x", false),
        ("settlement.reply.beta.x", false),
        ("settlement.reply.ACME.x", false),
        ("settlement.reply..x", false),
        ("settlement.reply.", false),
        ("amq.rabbitmq.reply-to", false),
        ("amq.rabbitmq.reply", false),
        ("settlement.updates", false),
        ("settlement.dead", false),
        (" settlement.reply.acme.x", false),
        ("x.settlement.reply.acme.x", false),
        ("", false),
    ] {
        assert_eq!(is_reply_queue(name, "acme"), answered, "{name}");
        let properties = Properties {
            reply_to: Some(name.to_owned()),
            ..Properties::default()
        };
        let sent = Sent::update(Kind::Allocation, properties);
        let record = allocation(Kind::Allocation, Status::Cleared, true);
        let replies = sent
            .say(settled(&record), true)
            .iter()
            .filter(|said| said.kind == PublicationKind::Reply)
            .count();
        assert_eq!(replies, usize::from(answered), "{name}");
    }
}

#[test]
fn a_reply_is_the_same_event() {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let properties = Properties {
        reply_to: Some("settlement.reply.acme.answers".to_owned()),
        correlation_id: Some("their-17".to_owned()),
        ..header("traceparent", trace)
    };
    let sent = Sent::update(Kind::Allocation, properties);
    let record = allocation(Kind::Allocation, Status::Cleared, true);
    let detail = String::new();
    for (verdict, published) in [
        (settled(&record), 1),
        (
            Verdict::Duplicate {
                allocation: Arc::new(record.clone()),
            },
            1,
        ),
        (parked(false), 1),
        (
            Verdict::Rejected {
                reason: Reason::AlreadySettled,
                detail,
            },
            2,
        ),
        // Asked again while it waits: the sender is told, the world is not.
        (parked(true), 0),
    ] {
        let mut said = sent.say(verdict.clone(), true);
        assert_eq!(said.len(), published + 1, "{verdict:?}");
        let reply = said.pop().expect("a reply");
        let event = said.first().cloned().unwrap_or_else(|| only_event(&sent));
        let expected = Publication {
            kind: PublicationKind::Reply,
            exchange: String::new(),
            routing_key: "settlement.reply.acme.answers".to_owned(),
            properties: Properties {
                correlation_id: Some("their-17".to_owned()),
                ..event.properties.clone()
            },
            body: event.body.clone(),
        };
        assert_eq!(reply, expected);
        assert_eq!(event.properties.correlation_id, None);
        assert_eq!(event.properties.headers, header("traceparent", trace).headers);
        // Before step 9 nobody is proven, and a stranger gets no answer.
        let unproven = sent.say(verdict, false);
        assert_eq!(unproven, said);
    }
}

/// The parking as it was first told.
fn only_event(sent: &Sent) -> Publication {
    sent.say(parked(false), false).remove(0)
}

/// `decide` says from which step on a sender is proven; here it meets what is said.
#[test]
fn a_stranger_is_not_answered() {
    let properties = Properties {
        reply_to: Some("amq.rabbitmq.reply-to.x".to_owned()),
        ..Properties::default()
    };
    let sent = Sent::update(Kind::Allocation, properties);
    let batch = [sent.by_ref()];
    let now = time("2026-01-02T03:06:07.008Z");
    let mut partner = Partner {
        quarantined: false,
        whereabouts: Whereabouts::Here,
        broker_user: None,
        suspended: true,
        async_allocations: true,
        async_deallocations: true,
        keys: Vec::new(),
        revoked: Vec::new(),
        symbols: crate::domain::currency::Symbols::default(),
    };
    for (known, expected) in [(false, 2), (true, 3)] {
        if known {
            partner
                .keys
                .push(SigningKey::from_bytes([1; 32]).expect("a key").public_key());
        }
        let snapshot = Snapshot {
            now,
            partners: [("acme".to_owned(), partner.clone())].into(),
            allocations: [].into(),
            receipts: [].into(),
            parked: [].into(),
            parked_counts: [].into(),
            ..Snapshot::default()
        };
        let (judgements, _) = decide(snapshot, &batch, &rules());
        let said: usize = judgements
            .iter()
            .map(|judgement| publications(sent.by_ref(), judgement, now, &rules()).len())
            .sum();
        assert_eq!(said, expected);
    }
}
