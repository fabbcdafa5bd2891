//! Events, byte for byte.

use super::*;

/// The ids by `python3 -c "import uuid; uuid.uuid5(NAMESPACE, 'allocation.cleared|10764cd8-..')"`.
#[test]
fn the_event_of_a_settlement_byte_for_byte() {
    let amount = r#""amount":{"currency":"ETH:wei","quantity":"115792089237316195423570985008687907853269984665640564039457584007913129639935"}"#;
    let tail = r#""enterpriseId":"acme","clientId":"00000000-0000-0000-0000-0000000000c1","nonce":"nonce-1"}}"#;
    for (kind, status, name, id) in [
        (
            Kind::Allocation,
            Status::Cleared,
            "allocation.cleared",
            "412c4f12-be9a-5a20-bae2-945ecee51175",
        ),
        (
            Kind::Allocation,
            Status::Released,
            "allocation.released",
            "ba18ec6b-b58e-55c2-9c14-8399440356d9",
        ),
        (
            Kind::Deallocation,
            Status::Cleared,
            "deallocation.cleared",
            "22b25e88-6a32-5bf3-96e2-08b5b19af800",
        ),
        (
            Kind::Deallocation,
            Status::Released,
            "deallocation.released",
            "994d6028-824d-50b2-a6d9-314ff642e4a4",
        ),
    ] {
        for full in [true, false] {
            let record = allocation(kind, status, full);
            let sent = Sent::update(kind, Properties::default());
            let event = only(sent.say(settled(&record), true));
            let reason = match status {
                Status::Cleared => "null",
                Status::Released => "\"no funds \u{1f4b8} \\\"quoted\\\" \\\\ \\n\"",
                Status::Reserved => "",
            };
            let if_full = |json: &'static str| if full { json } else { "" };
            let expected = [
                r#"{"specversion":"1.0","id":""#,
                id,
                r#"","source":"/settled","type":""#,
                name,
                r#"","subject":"10764cd8-59b5-422a-93a6-681bae7e84bd","time":"2026-01-02T03:05:06.789Z","#,
                r#""datacontenttype":"application/json","data":{"allocation":{"#,
                r#""id":"10764cd8-59b5-422a-93a6-681bae7e84bd","#,
                amount,
                r#","connectionId":"00000000-0000-0000-0000-0000000000c0","clientExternalId":"external-1""#,
                if_full(r#","partnerExternalId":"theirs-1","partnerSymbol":"XETH""#),
                r#","initiatedBy":"user-1""#,
                if_full(r#","notes":"a note""#),
                r#","createdAt":"2026-01-02T03:04:05.000Z","updatedAt":"2026-01-02T03:05:06.789Z","retriable":false"#,
                if_full(r#","evaluationId":"eval-1","pendingApprovalId":"pending-1","policyResult":"approved""#),
                r#","reason":"#,
                reason,
                r#","status":""#,
                status.as_str(),
                r#"","type":""#,
                kind.as_str(),
                r#""},"#,
                tail,
            ]
            .concat();
            assert_eq!(text(&event), expected);
            let expected = Publication {
                kind: PublicationKind::Event,
                exchange: "settlement.events".to_owned(),
                routing_key: format!("{name}.acme"),
                properties: Properties {
                    content_type: Some("application/cloudevents+json".to_owned()),
                    delivery_mode: Some(2),
                    message_id: Some(id.to_owned()),
                    ..Properties::default()
                },
                body: expected.into_bytes(),
            };
            assert_eq!(event, expected);
            // A duplicate, by another message, at another time: the same bytes under the same id.
            let other = Sent::update(kind, header("traceparent", "none of your business"));
            let verdict = Verdict::Duplicate {
                allocation: Arc::new(record),
            };
            assert_eq!(only(other.say(verdict, true)), expected);
        }
    }
}

#[test]
fn the_event_of_a_rejection_byte_for_byte() {
    // The body decoded: subject, allocationId and nonce are there.
    let properties = Properties {
        message_id: Some("m-1".to_owned()),
        ..Properties::default()
    };
    let sent = Sent::update(Kind::Allocation, properties);
    let publications = sent.reject(Reason::AllocationMismatch);
    let [event, dead] = publications.as_slice() else {
        panic!("an event and a dead letter: {publications:?}");
    };
    assert_eq!(
        text(event),
        concat!(
            r#"{"specversion":"1.0","id":"edb02aa0-c8ec-52e6-bfc7-5809797d0ab7","source":"/settled","type":"update.rejected","#,
            r#""subject":"10764cd8-59b5-422a-93a6-681bae7e84bd","time":"2026-01-02T03:06:07.008Z","#,
            r#""datacontenttype":"application/json","data":{"enterpriseId":"acme","reason":"allocation_mismatch","#,
            r#""class":409,"final":true,"detail":"a sentence","allocationId":"10764cd8-59b5-422a-93a6-681bae7e84bd","#,
            r#""nonce":"nonce-1","messageDigest":"08fe9e2d71e8079bf983b2c1c0b0601c4719d577c225597ea96968cd750e9819","#,
            r#""messageId":"m-1"}}"#
        )
    );
    assert_eq!(event.routing_key, "update.rejected.acme");
    assert_eq!(
        event.properties.message_id.as_deref(),
        Some("edb02aa0-c8ec-52e6-bfc7-5809797d0ab7")
    );
    assert_eq!(event.properties.content_type.as_deref(), Some(content_type::EVENT));
    assert_eq!(event.properties.delivery_mode, Some(2));
    assert_eq!(dead.kind, PublicationKind::DeadLetter);

    // The body did not decode: nothing of it is known.
    let sent = Sent::new("acme.deallocation.update", "{}", Properties::default());
    let event = sent.reject(Reason::InvalidField).remove(0);
    assert_eq!(
        text(&event),
        concat!(
            r#"{"specversion":"1.0","id":"fb75b6d0-1c61-54fe-8a2d-4e6a3b881f75","source":"/settled","type":"update.rejected","#,
            r#""time":"2026-01-02T03:06:07.008Z","datacontenttype":"application/json","#,
            r#""data":{"enterpriseId":"acme","reason":"invalid_field","class":400,"final":true,"detail":"a sentence","#,
            r#""messageDigest":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}"#
        )
    );
    assert_eq!(event.routing_key, "update.rejected.acme");

    // No enterprise can be read: the bare type.
    let sent = Sent::new("acme.update", "{}", Properties::default());
    let event = sent.reject(Reason::MalformedMessage).remove(0);
    assert_eq!(
        text(&event),
        concat!(
            r#"{"specversion":"1.0","id":"c5c59607-e419-5d03-bac6-4f9e942a265a","source":"/settled","type":"update.rejected","#,
            r#""time":"2026-01-02T03:06:07.008Z","datacontenttype":"application/json","#,
            r#""data":{"enterpriseId":null,"reason":"malformed_message","class":400,"final":true,"#,
            r#""detail":"a sentence","messageDigest":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}"#
        )
    );
    assert_eq!(event.routing_key, "update.rejected");
}

#[test]
fn the_event_of_a_parking_byte_for_byte() {
    let sent = Sent::update(Kind::Allocation, Properties::default());
    let event = only(sent.say(parked(false), true));
    assert_eq!(
        text(&event),
        concat!(
            r#"{"specversion":"1.0","id":"d76192ba-e4d4-5eac-a073-14dd85937a52","source":"/settled","type":"update.parked","#,
            r#""subject":"10764cd8-59b5-422a-93a6-681bae7e84bd","time":"2026-01-02T03:04:05.006Z","#,
            r#""datacontenttype":"application/json","data":{"enterpriseId":"acme","reason":"allocation_not_found","#,
            r#""class":404,"final":false,"detail":"no allocation of this id is reserved yet; it will be judged again","#,
            r#""allocationId":"10764cd8-59b5-422a-93a6-681bae7e84bd","nonce":"nonce-1","#,
            r#""messageDigest":"08fe9e2d71e8079bf983b2c1c0b0601c4719d577c225597ea96968cd750e9819","#,
            r#""parkedUntil":"2026-01-02T03:19:05.006Z"}}"#
        )
    );
    assert_eq!(event.routing_key, "update.parked.acme");
    assert_eq!(sent.say(parked(true), true), [], "waiting on is no news");
}

/// The id is made of type, routing key, digest and reason: each of them counts, nothing else does.
#[test]
fn the_same_refusal_has_the_same_id() {
    let id = |sent: &Sent, reason| sent.reject(reason).remove(0).properties.message_id;
    let sent = Sent::new("acme.allocation.update", "{}", Properties::default());
    let first = id(&sent, Reason::InvalidField);
    let same = Sent::new("acme.allocation.update", "{}", header("a", "b"));
    assert_eq!(id(&same, Reason::InvalidField), first);
    assert_ne!(id(&sent, Reason::UnknownPartner), first);
    let routed = Sent::new("beta.allocation.update", "{}", Properties::default());
    assert_ne!(id(&routed, Reason::InvalidField), first);
    let other = Sent::new("acme.allocation.update", "{ }", Properties::default());
    assert_ne!(id(&other, Reason::InvalidField), first);
}

#[test]
fn a_receipt_names_the_event() {
    let told = |publications: Vec<Publication>| publications[0].properties.message_id.clone();
    for kind in [Kind::Allocation, Kind::Deallocation] {
        let sent = Sent::update(kind, Properties::default());
        let cleared = &sent.facts.content.as_ref().expect("content").update;
        let released = Update {
            outcome: Outcome::Released {
                reject_reason: "why".to_owned(),
            },
            ..cleared.clone()
        };
        for (update, status) in [(cleared, Status::Cleared), (&released, Status::Released)] {
            let named = |verdict: &Verdict| Some(id_of(sent.by_ref(), update, verdict).to_string());
            let record = allocation(kind, status, true);
            let outcome = told(sent.say(settled(&record), true));
            assert_eq!(named(&settled(&record)), outcome);
            let allocation = Arc::new(record);
            assert_eq!(named(&Verdict::Duplicate { allocation }), outcome);
            assert_eq!(named(&parked(false)), told(sent.say(parked(false), true)));
            let (reason, detail) = (Reason::AllocationNotFound, String::new());
            assert_eq!(named(&Verdict::Rejected { reason, detail }), told(sent.reject(reason)));
        }
    }
}

#[test]
fn an_allocation_in_reserve_has_no_outcome() {
    for kind in [Kind::Allocation, Kind::Deallocation] {
        let record = allocation(kind, Status::Reserved, true);
        assert_eq!(settlement_id(&record), None);
        let view = serde_json::to_value(AllocationView::from(&record)).expect("JSON");
        assert_eq!(view["reason"], "awaiting the partner's update");
    }
}

#[test]
fn times_have_milliseconds_and_a_z() {
    for (given, expected) in [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05.000Z"),
        ("2026-01-02T03:04:05.9999Z", "2026-01-02T03:04:05.999Z"),
        ("2026-01-02T03:04:05.001+02:00", "2026-01-02T01:04:05.001Z"),
    ] {
        assert_eq!(rfc3339(time(given)), expected);
    }
}

#[test]
fn a_valid_traceparent_travels() {
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let valid = [
        format!("00-{trace}-b7ad6b7169203331-01"),
        format!("00-{trace}-0000000000000001-00"),
        format!("00-{trace}-b7ad6b7169203331-ff"),
    ];
    let invalid = [
        String::new(),
        format!("00-{trace}-b7ad6b7169203331"),
        format!("00-{trace}-b7ad6b7169203331-01-"),
        format!("00-{trace}-b7ad6b7169203331-01-more"),
        format!(" 00-{trace}-b7ad6b7169203331-01"),
        format!("0-{trace}-b7ad6b7169203331-01"),
        format!("ff-{trace}-b7ad6b7169203331-01"),
        format!("00-{trace}-b7ad6b7169203331-1"),
        format!("00-{trace}-b7ad6b716920333-01"),
        format!("00-{trace}-b7ad6b716920333g-01"),
        format!("00-{}-b7ad6b7169203331-01", trace.to_uppercase()),
        format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
        format!("00-{trace}-0000000000000000-01"),
        format!("00-{trace}-b7ad6b7169203331-0\u{fc}"),
    ];
    let record = allocation(Kind::Allocation, Status::Cleared, true);
    let travels = |properties: Properties| {
        let sent = Sent::update(Kind::Allocation, properties);
        let settled = only(sent.say(settled(&record), true)).properties.headers;
        let rejected = sent.reject(Reason::NotPermitted).remove(0).properties.headers;
        assert_eq!(settled, rejected);
        settled
    };
    for value in &valid {
        assert_eq!(
            travels(header("traceparent", value)),
            header("traceparent", value).headers
        );
        assert_eq!(travels(header("Traceparent", value)), None);
    }
    for value in &invalid {
        assert_eq!(travels(header("traceparent", value)), None, "{value}");
    }
    let number = Headers::from([("traceparent".to_owned(), HeaderValue::LongInt(0))]);
    let properties = Properties {
        headers: Some(number),
        ..Properties::default()
    };
    assert_eq!(travels(properties), None);
}

/// Whatever it is refused for, and whichever kind it is of: the id of the update stands in `allocationId`, where the body
/// decoded, and nowhere where it did not.
#[test]
fn a_refusal_names_the_id_of_either_kind_in_the_documented_field() {
    let data = |publication: &Publication| {
        let event: serde_json::Value = serde_json::from_slice(&publication.body).expect("JSON");
        (event["subject"].clone(), event["data"].clone())
    };
    for kind in [Kind::Allocation, Kind::Deallocation] {
        let sent = Sent::update(kind, Properties::default());
        for reason in Reason::ALL {
            let (subject, data) = data(&sent.reject(reason).remove(0));
            let id = serde_json::json!(ID);
            assert_eq!((&subject, &data["allocationId"]), (&id, &id), "{kind:?} {reason}");
            assert_eq!(
                (&data["nonce"], &data["reason"]),
                (&"nonce-1".into(), &reason.as_str().into())
            );
            assert_eq!(data.get("deallocationId"), None, "{kind:?} {reason}");
        }
        let (subject, data) = data(&only(sent.say(parked(false), true)));
        assert_eq!(
            (subject, data["allocationId"].clone()),
            (ID.into(), ID.into()),
            "{kind:?}"
        );
    }
    // Nothing is known of a body that does not decode.
    for (routing_key, body) in [
        ("acme.deallocation.update", format!("{{\"deallocationId\":\"{ID}\"}}")),
        ("acme.deallocation.update", format!("{{\"allocationId\":\"{ID}\"}}")),
        ("acme.allocation.update", format!("{{\"deallocationId\":\"{ID}\"}}")),
    ] {
        let sent = Sent::new(routing_key, body, Properties::default());
        let (subject, data) = data(&sent.reject(Reason::InvalidField).remove(0));
        assert!(subject.is_null(), "{data}");
        assert!(
            data.get("allocationId").is_none() && data.get("nonce").is_none(),
            "{data}"
        );
    }
}
