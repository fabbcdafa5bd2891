use std::sync::Arc;

use super::*;
use crate::domain::{
    decide::{self, Snapshot},
    delivery::{Delivery, Source},
    ledger::Quantity,
    message::{Draft, Facts, Outcome, body_text, facts, payload_text, routing_key},
    signature::SigningKey,
};

const ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84bd";

fn time(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn rules() -> Rules {
    Rules {
        park_deadline: jiff::SignedDuration::from_mins(15),
        park_first_retry: jiff::SignedDuration::from_secs(1),
        park_max_interval: jiff::SignedDuration::from_secs(60),
        park_max_per_partner: 10,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".to_owned(),
    }
}

/// A record with every optional field, or with none.
fn allocation(kind: Kind, status: Status, full: bool) -> Allocation {
    let some = |text: &str| full.then(|| text.to_owned());
    let reason = match status {
        Status::Cleared => None,
        Status::Released => Some("no funds \u{1f4b8} \"quoted\" \\ \n".to_owned()),
        Status::Reserved => Some("awaiting the partner's update".to_owned()),
    };
    Allocation {
        id: ID.parse().expect("a UUID"),
        kind,
        status,
        amount: Amount {
            currency: "ETH:wei".to_owned(),
            quantity: Quantity::parse("115792089237316195423570985008687907853269984665640564039457584007913129639935")
                .expect("a quantity"),
        },
        connection_id: Uuid::from_u128(0xc0),
        enterprise_id: "acme".to_owned(),
        client_id: Uuid::from_u128(0xc1),
        partners_client_id: "cust-1".to_owned(),
        partners_connection_id: "conn-1".to_owned(),
        client_external_id: "external-1".to_owned(),
        initiated_by: "user-1".to_owned(),
        notes: some("a note"),
        reason,
        retriable: false,
        partner_external_id: some("theirs-1"),
        evaluation_id: some("eval-1"),
        pending_approval_id: some("pending-1"),
        policy_result: full.then_some(PolicyResult::Approved),
        settled_nonce: Some("nonce-1".to_owned()),
        created_at: time("2026-01-02T03:04:05Z"),
        updated_at: time("2026-01-02T03:05:06.789Z"),
        available_account: 1,
        held_account: 2,
        allocated_account: 3,
    }
}

/// A delivery with what it tells by itself.
struct Sent {
    delivery: Delivery,
    facts: Facts,
}

impl Sent {
    fn new(routing_key: &str, body: impl Into<Vec<u8>>, properties: Properties) -> Self {
        let delivery = Delivery {
            exchange: "settlement.updates".to_owned(),
            routing_key: routing_key.to_owned(),
            body: body.into(),
            properties,
            cut: None,
            redelivered: false,
            source: Source::Plain,
        };
        let facts = facts(&delivery);
        Self { delivery, facts }
    }

    /// A real update of the kind, signed.
    fn update(kind: Kind, properties: Properties) -> Self {
        let record = allocation(kind, Status::Reserved, false);
        let draft = Draft {
            enterprise_id: record.enterprise_id,
            kind,
            id: record.id,
            amount: record.amount,
            client_id: record.client_id,
            connection_id: record.connection_id,
            partners_client_id: record.partners_client_id,
            partners_connection_id: record.partners_connection_id,
            partners_id: "theirs-1".to_owned(),
            outcome: Outcome::Cleared,
            nonce: "nonce-1".to_owned(),
            evaluation_id: None,
            pending_approval_id: None,
            policy_result: None,
        };
        let payload = payload_text(&draft);
        let signature = SigningKey::from_bytes([1; 32]).expect("a key").sign(&payload);
        Self::new(
            &routing_key("acme", kind),
            body_text(&draft, &payload, &signature),
            properties,
        )
    }

    fn judged(&self) -> Judged<'_> {
        Judged {
            delivery: &self.delivery,
            facts: &self.facts,
        }
    }

    fn say(&self, verdict: Verdict, proven: bool) -> Vec<Publication> {
        publications(
            self.judged(),
            &Judgement { verdict, proven },
            time("2026-01-02T03:06:07.008Z"),
            &rules(),
        )
    }

    fn reject(&self, reason: Reason) -> Vec<Publication> {
        let detail = "a sentence".to_owned();
        self.say(Verdict::Rejected { reason, detail }, reason >= Reason::NonceReused)
    }
}

fn settled(allocation: &Allocation) -> Verdict {
    Verdict::Settled {
        allocation: Arc::new(allocation.clone()),
    }
}

fn parked(again: bool) -> Verdict {
    Verdict::Parked {
        parked_at: time("2026-01-02T03:04:05.006Z"),
        until: time("2026-01-02T03:19:05.006Z"),
        again,
    }
}

fn text(publication: &Publication) -> &str {
    std::str::from_utf8(&publication.body).expect("an event is UTF-8")
}

fn only(mut publications: Vec<Publication>) -> Publication {
    assert_eq!(publications.len(), 1, "{publications:?}");
    publications.remove(0)
}

fn header(name: &str, value: &str) -> Properties {
    Properties {
        headers: Some(Headers::from([(name.to_owned(), HeaderValue::text(value))])),
        ..Properties::default()
    }
}

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
                if_full(r#","partnerExternalId":"theirs-1""#),
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
    assert_eq!(event.properties.content_type.as_deref(), Some(CONTENT_TYPE));
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
    let sent = Sent::update(Kind::Allocation, Properties::default());
    let record = allocation(Kind::Allocation, Status::Cleared, true);
    let named = |verdict, reason| id_of(sent.judged(), verdict, reason, Some(&record)).to_string();
    let told = |publications: Vec<Publication>| publications[0].properties.message_id.clone();
    let outcome = told(sent.say(settled(&record), true));
    assert_eq!(Some(named(VerdictKind::Settled, None)), outcome);
    assert_eq!(Some(named(VerdictKind::Duplicate, None)), outcome);
    let reason = Reason::AllocationNotFound;
    assert_eq!(
        Some(named(VerdictKind::Parked, Some(reason))),
        told(sent.say(parked(false), true))
    );
    assert_eq!(
        Some(named(VerdictKind::Rejected, Some(reason))),
        told(sent.reject(reason))
    );
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

#[test]
fn a_dead_letter_is_the_message_and_why() {
    let kept = [
        ("traceparent", HeaderValue::text("anything")),
        ("x-stream-offset", HeaderValue::LongLongInt(7)),
        ("x-delivery-counter", HeaderValue::ShortShortUInt(1)),
        ("cc", HeaderValue::text("lower case is the partner's own")),
        ("x-settled-reason", HeaderValue::Void),
        (
            "nested",
            HeaderValue::Array(vec![HeaderValue::Double(1), HeaderValue::Boolean(true)]),
        ),
        (
            "bytes",
            HeaderValue::LongString(super::super::delivery::Bytes(vec![0xff, 0])),
        ),
    ];
    let dropped = [
        ("CC", HeaderValue::Array(vec![HeaderValue::text("elsewhere")])),
        ("BCC", HeaderValue::Array(Vec::new())),
        ("x-delivery-count", HeaderValue::LongLongInt(3)),
        ("x-death", HeaderValue::Array(Vec::new())),
        ("x-first-death-queue", HeaderValue::text("forged")),
        ("x-first-death-reason", HeaderValue::text("forged")),
        ("x-last-death-exchange", HeaderValue::text("forged")),
        ("settled-reason", HeaderValue::text("forged")),
        ("settled-final", HeaderValue::Boolean(false)),
        ("settled-origin-user-id", HeaderValue::text("forged")),
        ("settled-origin-expiration", HeaderValue::text("forged")),
        ("settled-", HeaderValue::text("forged")),
        ("settled-anything", HeaderValue::text("forged")),
    ];
    let table = |entries: &[(&str, HeaderValue)]| -> Headers {
        entries
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect()
    };
    let mut incoming = table(&kept);
    incoming.extend(table(&dropped));
    let received = Properties {
        content_type: Some("application/json".to_owned()),
        content_encoding: Some("identity".to_owned()),
        headers: Some(incoming),
        delivery_mode: Some(1),
        priority: Some(3),
        correlation_id: Some("correlated".to_owned()),
        reply_to: Some("anywhere".to_owned()),
        expiration: Some("60000".to_owned()),
        message_id: Some("m-1".to_owned()),
        timestamp: Some(1_767_225_600),
        kind: Some("update".to_owned()),
        user_id: Some("acme-user".to_owned()),
        app_id: Some("app".to_owned()),
        cluster_id: Some("cluster".to_owned()),
        undecodable: None,
    };
    let sent = Sent::new("acme.allocation.update", b"\xff not JSON".as_slice(), received.clone());
    let publications = sent.reject(Reason::MalformedMessage);
    let [_, dead] = publications.as_slice() else {
        panic!("an event and a dead letter: {publications:?}");
    };
    let added = [
        ("settled-reason", HeaderValue::text("malformed_message")),
        ("settled-class", HeaderValue::LongLongInt(400)),
        ("settled-final", HeaderValue::Boolean(true)),
        ("settled-detail", HeaderValue::text("a sentence")),
        (
            "settled-digest",
            HeaderValue::text("d79b0c5993f79481b297412d39116c779a37c02c095cd0c58f33b24e11e985b9"),
        ),
        ("settled-failed-at", HeaderValue::text("2026-01-02T03:06:07.008Z")),
        ("settled-origin-exchange", HeaderValue::text("settlement.updates")),
        (
            "settled-origin-routing-key",
            HeaderValue::text("acme.allocation.update"),
        ),
    ];
    let moved = [
        ("settled-origin-user-id", HeaderValue::text("acme-user")),
        ("settled-origin-expiration", HeaderValue::text("60000")),
    ];
    let mut headers = table(&kept);
    headers.extend(table(&added));
    headers.extend(table(&moved));
    // What not everyone can carry is text, and beside it as it was.
    let rare = ["bytes", "nested"].map(|name| (name.to_owned(), headers[name].clone()));
    let originals = super::super::wire::write_headers(&Headers::from(rare)).expect("short names");
    headers.insert(
        "nested".to_owned(),
        HeaderValue::Array(vec![
            HeaderValue::text(f64::from_bits(1).to_string()),
            HeaderValue::Boolean(true),
        ]),
    );
    headers.insert("bytes".to_owned(), HeaderValue::text("ff00"));
    headers.insert(
        "settled-origin-headers".to_owned(),
        HeaderValue::text(dead_letter::as_text(&originals)),
    );
    let expected = Publication {
        kind: PublicationKind::DeadLetter,
        exchange: "settlement.dead".to_owned(),
        routing_key: "acme.allocation.update".to_owned(),
        properties: Properties {
            headers: Some(headers),
            delivery_mode: Some(2),
            user_id: None,
            expiration: None,
            ..received
        },
        body: sent.delivery.body.clone(),
    };
    assert_eq!(*dead, expected);

    // A message that carried nothing: only what is added, and a forged header does not stand in for what is not there.
    let sent = Sent::new("nonsense", "", header("settled-origin-user-id", "forged"));
    let dead = sent.reject(Reason::MalformedMessage).remove(1);
    assert_eq!(dead.routing_key, "nonsense");
    let names: Vec<String> = dead.properties.headers.expect("headers").into_keys().collect();
    let mut expected: Vec<&str> = added.iter().map(|(name, _)| *name).collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
}

#[test]
fn every_rejection_is_dead_lettered_by_us() {
    let sent = Sent::update(Kind::Allocation, Properties::default());
    for reason in Reason::ALL {
        let kinds: Vec<PublicationKind> = sent.reject(reason).into_iter().map(|said| said.kind).collect();
        assert_eq!(kinds, [PublicationKind::Event, PublicationKind::DeadLetter], "{reason}");
    }
}

/// Of what is too large: what is left of the body, whether its headers are left, and that the rest is that of the whole.
#[test]
fn a_dead_letter_that_is_too_large_is_a_head_with_the_digest_of_the_whole() {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let with = |padding: usize| Properties {
        message_id: Some("m-1".to_owned()),
        user_id: Some("partner".to_owned()),
        headers: Some(Headers::from([
            ("traceparent".to_owned(), HeaderValue::text(TRACE)),
            ("padding".to_owned(), HeaderValue::text("x".repeat(padding))),
        ])),
        ..Properties::default()
    };
    for (body, padding, kept, headers_kept) in [
        (262_145, 10, 4_096, true),
        (262_145, 17_000, 4_096, false),
        (5_000, 17_000, 4_096, false),
        (4_096, 17_000, 4_096, false),
        (20, 17_000, 20, false),
        (0, 17_000, 0, false),
    ] {
        let bytes: Vec<u8> = (0..body).map(|at| b"0123456789abcdef-"[at % 17]).collect();
        let digest = crate::domain::message::sha256(&bytes);
        let mut sent = Sent::new("acme.allocation.update", bytes.clone(), with(padding));
        crate::domain::message::shorten(&mut sent.delivery, &sent.facts);
        assert_eq!(sent.facts, facts(&sent.delivery), "judged again it is what it was");
        let said = sent.reject(Reason::MessageTooLarge);
        let [event, dead] = said.as_slice() else {
            panic!("an event and a dead letter: {said:?}");
        };
        let told: serde_json::Value = serde_json::from_slice(&event.body).expect("JSON");
        assert_eq!(told["data"]["messageDigest"], hex::encode(digest));
        let traced = event
            .properties
            .headers
            .as_ref()
            .and_then(|headers| headers.get("traceparent"));
        assert_eq!(traced, Some(&HeaderValue::text(TRACE)), "in the trace that it came in");
        assert_eq!(dead.body, bytes[..kept]);
        let headers = dead.properties.headers.as_ref().expect("headers");
        assert_eq!(headers["settled-body-length"], HeaderValue::LongLongInt(body as i64));
        assert_eq!(headers["settled-digest"], HeaderValue::text(hex::encode(digest)));
        assert_eq!(headers["settled-origin-user-id"], HeaderValue::text("partner"));
        for name in ["padding", "traceparent"] {
            assert_eq!(headers.contains_key(name), headers_kept, "{name} of {body} bytes");
        }
        assert_eq!(dead.properties.message_id.as_deref(), Some("m-1"));
        assert!(dead.properties.wire_len() < 20_000);
    }
}

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
    let batch = [sent.judged()];
    let now = time("2026-01-02T03:06:07.008Z");
    let mut partner = decide::Partner {
        broker_user: None,
        suspended: true,
        async_allocations: true,
        async_deallocations: true,
        keys: Vec::new(),
        revoked: Vec::new(),
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
            distrusted: [].into(),
            parked_bytes: [].into(),
            parked_bytes_of_all: 0,
        };
        let (judgements, _) = decide::decide(snapshot, &batch, &rules());
        let said: usize = judgements
            .iter()
            .map(|judgement| publications(sent.judged(), judgement, now, &rules()).len())
            .sum();
        assert_eq!(said, expected);
    }
}

const BATCHED: Format = Format::Batched { max_bytes: 262_144 };

/// The events of `updates` one after the other, as they are said.
fn events_of(updates: &[&str]) -> Vec<Publication> {
    let sent = |body: &&str| Sent::new("acme.allocation.update", *body, Properties::default());
    let said = updates.iter().flat_map(|body| sent(body).reject(Reason::InvalidField));
    said.filter(|said| said.kind == PublicationKind::Event).collect()
}

/// The id by `python3 -c "import uuid; uuid.uuid5(NAMESPACE, 'batch|allocation.cleared.acme|412c4f12-..|412c4f12-..')"`.
#[test]
fn events_under_one_routing_key_byte_for_byte() {
    let record = |status| allocation(Kind::Allocation, status, true);
    let sent = Sent::update(Kind::Allocation, Properties::default());
    let cleared = only(sent.say(settled(&record(Status::Cleared)), true));
    let released = only(sent.say(settled(&record(Status::Released)), true));
    let [rejected, dead] = sent.reject(Reason::AlreadySettled).try_into().expect("two");
    let said = [&dead, &cleared, &released, &cleared, &rejected]
        .map(Clone::clone)
        .to_vec();
    assert_eq!(in_format(said.clone(), Format::Single), said);

    let twice = Publication {
        kind: PublicationKind::Event,
        exchange: "settlement.events".to_owned(),
        routing_key: "allocation.cleared.acme".to_owned(),
        properties: Properties {
            content_type: Some("application/cloudevents-batch+json".to_owned()),
            delivery_mode: Some(2),
            message_id: Some("40291fd9-2d48-5ed7-b234-096f9f3e12cc".to_owned()),
            headers: Some([("settled-events".to_owned(), HeaderValue::LongInt(2))].into()),
            ..Properties::default()
        },
        body: format!("[{0},{0}]", text(&cleared)).into_bytes(),
    };
    let in_arrays = in_format(said, BATCHED);
    let [first, second, third, last] = in_arrays.as_slice() else {
        panic!("three routing keys and a dead letter: {in_arrays:?}");
    };
    assert_eq!(*first, twice);
    assert_eq!(count_of(first), 2);
    for (array, event) in [(second, &released), (third, &rejected)] {
        assert_eq!(text(array), format!("[{}]", text(event)), "one alone is an array too");
        assert_eq!(array.routing_key, event.routing_key);
        assert_ne!(array.properties.message_id, event.properties.message_id);
        assert_eq!(count_of(array), 1);
    }
    assert_eq!(*last, dead, "the sender's own bytes");
}

/// A sender may give its message any header, and a dead letter keeps it.
#[test]
fn a_dead_letter_is_one_whatever_its_headers_say() {
    let mut said = Publication {
        kind: PublicationKind::DeadLetter,
        exchange: DEAD_EXCHANGE.to_owned(),
        routing_key: "invalid_field".to_owned(),
        properties: Properties {
            headers: Some(Headers::from([(
                EVENTS_HEADER.to_owned(),
                HeaderValue::LongLongInt(1_000_000),
            )])),
            ..Properties::default()
        },
        body: Vec::new(),
    };
    assert_eq!(count_of(&said), 1);
    said.kind = PublicationKind::Event;
    assert_eq!(count_of(&said), 1_000_000, "as earlier versions wrote it");
    let headers = said.properties.headers.get_or_insert_default();
    headers.insert(EVENTS_HEADER.to_owned(), HeaderValue::LongInt(1_000_000));
    assert_eq!(count_of(&said), 1_000_000);
}

/// The name of an array is that of its events in their order.
#[test]
fn an_array_is_named_for_what_is_in_it() {
    let name = |updates: &[&str]| {
        let said = in_format(events_of(updates), BATCHED);
        only(said).properties.message_id.expect("an id")
    };
    let names = [
        name(&["{}"]),
        name(&["{}", "[]"]),
        name(&["[]", "{}"]),
        name(&["{}", "[]", "[]"]),
    ];
    assert_eq!(
        names.iter().collect::<std::collections::BTreeSet<_>>().len(),
        names.len()
    );
    assert_eq!(name(&["{}", "[]"]), names[1]);
}

/// By the sizes of events under one routing key, the sizes of the arrays, in events.
#[test]
fn an_array_has_so_many_bytes_and_no_more() {
    let sized = |size: &usize| Publication {
        body: vec![b'7'; *size],
        ..events_of(&["{}"]).remove(0)
    };
    // Ten bytes hold the brackets, a comma between each two, and the rest.
    for (sizes, arrays) in [
        (&[8][..], &[1][..]),
        (&[9], &[1]),
        (&[100], &[1]),
        (&[3, 4], &[2]),
        (&[4, 4], &[1, 1]),
        (&[2, 2, 2], &[3]),
        (&[2, 2, 3], &[2, 1]),
        // What would still fit in front stays behind.
        (&[1, 9, 1], &[1, 1, 1]),
        (&[9, 1, 1], &[1, 2]),
        (&[], &[]),
    ] {
        let said = in_format(sizes.iter().map(sized).collect(), Format::Batched { max_bytes: 10 });
        let counts: Vec<u64> = said.iter().map(count_of).collect();
        assert_eq!(counts, arrays, "{sizes:?}");
        for array in said {
            assert!(array.body.len() <= 10 || count_of(&array) == 1, "{sizes:?}");
        }
    }
}

/// A message has one trace: it is that of all of its events, or none.
#[test]
fn a_trace_travels_with_events_that_share_it() {
    let trace = |last: char| format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{last}-01");
    let event = |last: Option<char>| {
        let properties = last.map_or_else(Properties::default, |last| header("traceparent", &trace(last)));
        Sent::new("acme.allocation.update", "{}", properties)
            .reject(Reason::InvalidField)
            .remove(0)
    };
    for (traces, shared) in [
        (&[None][..], None),
        (&[Some('1')], Some('1')),
        (&[Some('1'), Some('1')], Some('1')),
        (&[Some('1'), Some('2')], None),
        (&[Some('1'), None], None),
        (&[None, Some('1')], None),
    ] {
        let said = in_format(traces.iter().map(|last| event(*last)).collect(), BATCHED);
        let headers = only(said).properties.headers.expect("headers");
        let travels = headers.get("traceparent").and_then(HeaderValue::as_text);
        assert_eq!(travels.map(str::to_owned), shared.map(trace), "{traces:?}");
    }
}

#[test]
fn a_subscriber_reads_either_format() {
    let array = Some("application/cloudevents-batch+json");
    for (content_type, body, events) in [
        (
            Some("application/cloudevents+json"),
            "{\"a\": 1}",
            Some(&["{\"a\": 1}"][..]),
        ),
        (None, "[1]", Some(&["[1]"])),
        (array, "[]", Some(&[])),
        (
            array,
            "[ {\"a\": [1,  2]} , \"]\" ]",
            Some(&["{\"a\": [1,  2]}", "\"]\""]),
        ),
        (array, "{}", None),
        (array, "[{}", None),
        (array, "", None),
    ] {
        let events = events.map(|events| events.iter().map(|event| event.as_bytes()).collect::<Vec<_>>());
        assert_eq!(read(content_type, body.as_bytes()).ok(), events, "{body}");
    }
}

/// What is said of the messages of a batch: of each an event, and a dead letter before it, behind it or none.
fn anything_said() -> impl proptest::strategy::Strategy<Value = Vec<Publication>> {
    use proptest::prelude::*;
    let reasons = [Reason::MalformedMessage, Reason::InvalidField, Reason::MessageTooLarge];
    let one = (
        0..4_usize,
        0..reasons.len(),
        "[a-c\"\\\\]{0,40}",
        any::<bool>(),
        0..3_u8,
    );
    proptest::collection::vec(one, 0..60).prop_map(move |batch| {
        let said = batch.into_iter().flat_map(|(sender, reason, body, turned, trace)| {
            let routing_key = [
                "acme.allocation.update",
                "acme2.allocation.update",
                "a.b",
                "zed.deallocation.update",
            ];
            let trace = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{trace}-01");
            let sent = Sent::new(routing_key[sender], body, header("traceparent", &trace));
            let mut said = sent.reject(reasons[reason]);
            if turned {
                said.reverse();
            }
            said
        });
        said.collect()
    })
}

/// By routing key, the bytes of its events in order.
fn by_routing_key(said: &[Publication]) -> std::collections::BTreeMap<&str, Vec<&[u8]>> {
    let mut events = std::collections::BTreeMap::<&str, Vec<&[u8]>>::new();
    for one in said.iter().filter(|one| one.kind == PublicationKind::Event) {
        let content_type = one.properties.content_type.as_deref();
        let read = read(content_type, &one.body).expect("it can be read");
        assert_eq!(count_of(one), read.len() as u64);
        events.entry(&one.routing_key).or_default().extend(read);
    }
    events
}

proptest::proptest! {
    #[test]
    fn either_format_says_the_same(said in anything_said(), max_bytes in 1_usize..20_000) {
        let in_arrays = in_format(said.clone(), Format::Batched { max_bytes });
        proptest::prop_assert_eq!(by_routing_key(&in_arrays), by_routing_key(&said));
        let dead = |said: &[Publication]| -> Vec<Publication> {
            let dead = said.iter().filter(|one| one.kind == PublicationKind::DeadLetter);
            dead.cloned().collect()
        };
        proptest::prop_assert_eq!(dead(&in_arrays), dead(&said));
        let total = |said: &[Publication]| said.iter().map(count_of).sum::<u64>();
        proptest::prop_assert_eq!(total(&in_arrays), total(&said));
        for array in in_arrays.iter().filter(|one| one.kind == PublicationKind::Event) {
            proptest::prop_assert!(array.body.len() <= max_bytes || count_of(array) == 1);
        }
        // No more messages than must be: two that follow each other under one routing key would not fit into one.
        let mut last = std::collections::BTreeMap::<&str, &[u8]>::new();
        for array in in_arrays.iter().filter(|one| one.kind == PublicationKind::Event) {
            if let Some(before) = last.insert(&array.routing_key, &array.body) {
                let first = read(array.properties.content_type.as_deref(), &array.body).expect("an array");
                let together = [before, first[0]].concat().len();
                proptest::prop_assert!(together >= max_bytes, "{} bytes and a comma", together);
            }
        }
    }
}
