//! Dead letters.

use super::*;

#[test]
fn a_dead_letter_is_the_message_and_why() {
    let kept = [
        ("traceparent", HeaderValue::text("anything")),
        ("x-stream-offset", HeaderValue::LongLongInt(7)),
        ("x-retry-count", HeaderValue::LongLongInt(2)),
        ("x-delivery-counter", HeaderValue::ShortShortUInt(1)),
        ("cc", HeaderValue::text("lower case is the partner's own")),
        ("x-settled-reason", HeaderValue::Void),
        (
            "nested",
            HeaderValue::Array(vec![HeaderValue::Double(1), HeaderValue::Boolean(true)]),
        ),
        ("bytes", HeaderValue::LongString(Bytes(vec![0xff, 0]))),
    ];
    let dropped = [
        ("CC", HeaderValue::Array(vec![HeaderValue::text("elsewhere")])),
        ("BCC", HeaderValue::Array(Vec::new())),
        ("x-delivery-count", HeaderValue::LongLongInt(3)),
        ("x-acquired-count", HeaderValue::LongLongInt(4)),
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
    let originals = wire::write_headers(&Headers::from(rare)).expect("short names");
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
        HeaderValue::text(as_text(&originals)),
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
        let digest = crate::domain::digest::sha256(&bytes);
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
