//! What a letter opens to, and whom is believed.

use super::*;

#[test]
fn what_the_worker_made_opens_to_what_the_partner_sent() {
    for reason in Reason::ALL {
        let (message, cause) = opened(ours(reason));
        assert_eq!(message, sent());
        let expected = Cause {
            made_by: MadeBy::Settled,
            reason,
            detail: "amount.quantity: differs from the record".into(),
            failed_at: Some(time(1_000)),
        };
        assert_eq!(cause, expected);
        assert!(!cause.is_untold());
    }
}

/// A worker's letter of a message that is too large, as it comes out of the queue.
fn too_large(body: &[u8], padding: usize) -> Delivery {
    let mut message = sent();
    message.body = body.to_vec();
    let headers = message.properties.headers.get_or_insert_default();
    headers.insert("padding".into(), text(&"x".repeat(padding)));
    let facts = facts(&message);
    shorten(&mut message, &facts);
    let refusal = facts.content.clone().expect_err("too large");
    let judgement = Judgement {
        verdict: Verdict::Rejected {
            reason: refusal.reason,
            detail: refusal.detail,
        },
        proven: false,
    };
    let judged = MessageRef {
        delivery: &message,
        facts: &facts,
    };
    let made = publications(judged, &judgement, time(1_000), &rules());
    let letter = made
        .into_iter()
        .find(|publication| publication.kind == crate::domain::delivery::PublicationKind::DeadLetter)
        .expect("a dead letter");
    Delivery {
        exchange: letter.exchange,
        routing_key: letter.routing_key,
        body: letter.body,
        properties: Properties {
            user_id: Some(WORKER.into()),
            ..letter.properties
        },
        ..message
    }
}

#[test]
fn a_head_opens_to_what_it_is_the_head_of() {
    for (len, padding) in [
        (262_145, 1),
        (300_000, 17_000),
        (5_000, 17_000),
        (4_096, 17_000),
        (0, 17_000),
    ] {
        let body: Vec<u8> = (0..len).map(|at| b"0123456789-"[at % 11]).collect();
        let whole = Delivery {
            body: body.clone(),
            ..sent()
        };
        let (message, cause) = opened(too_large(&body, padding));
        assert_eq!(
            (cause.made_by, cause.reason),
            (MadeBy::Settled, Reason::MessageTooLarge)
        );
        assert_eq!(message.body_len(), len as u64);
        assert_eq!(message.body, body[..len.min(4_096)]);
        let facts = facts(&message);
        assert_eq!(facts.message_digest, sha256(&body));
        let refusal = facts
            .content
            .expect_err("what is left of it must not be judged as if it were all");
        assert_eq!(
            (refusal.reason, &refusal.detail),
            (Reason::MessageTooLarge, &cause.detail)
        );
        assert_eq!(message.routing_key, whole.routing_key);
        assert_eq!(message.properties.user_id, whole.properties.user_id);
        assert_eq!(message.properties.expiration, whole.properties.expiration);
    }
}

#[test]
fn a_head_that_is_none_is_nobodys() {
    let body = vec![b'x'; 262_145];
    let length = |value: HeaderValue| {
        let mut letter = too_large(&body, 1);
        let headers = letter.properties.headers.as_mut().expect("headers");
        headers.insert(BODY_LENGTH.into(), value);
        opened(letter).1
    };
    assert_eq!(length(HeaderValue::LongLongInt(262_145)).made_by, MadeBy::Settled);
    for wrong in [
        HeaderValue::LongLongInt(-1),
        HeaderValue::LongLongInt(0),
        HeaderValue::LongLongInt(4_095),
        // All of it is there then, and is something else.
        HeaderValue::LongLongInt(4_096),
        HeaderValue::LongInt(262_145),
        text("262145"),
    ] {
        let cause = length(wrong.clone());
        assert_eq!(cause.made_by, MadeBy::Unknown, "{wrong:?}");
    }
    let mut letter = too_large(&body, 1);
    letter.properties.headers.as_mut().expect("headers").remove(BODY_LENGTH);
    assert_eq!(
        opened(letter).1.made_by,
        MadeBy::Unknown,
        "a digest that is not the body's"
    );
}

#[test]
fn what_does_not_say_what_ours_says_is_nobodys() {
    let spoil: [(&str, Option<HeaderValue>); 16] = [
        ("settled-reason", None),
        ("settled-reason", Some(text("Because of it"))),
        ("settled-reason", Some(HeaderValue::Boolean(true))),
        ("settled-class", None),
        ("settled-class", Some(HeaderValue::LongInt(409))),
        ("settled-class", Some(HeaderValue::LongLongInt(400))),
        ("settled-final", None),
        ("settled-final", Some(text("true"))),
        ("settled-detail", None),
        ("settled-detail", Some(HeaderValue::Void)),
        ("settled-digest", None),
        ("settled-digest", Some(text("ab"))),
        ("settled-failed-at", Some(text("yesterday"))),
        ("settled-failed-at", Some(HeaderValue::Timestamp(1_000))),
        ("settled-origin-exchange", None),
        ("settled-origin-routing-key", None),
    ];
    for (name, value) in spoil {
        let mut letter = ours(Reason::AllocationMismatch);
        let headers = letter.properties.headers.get_or_insert_default();
        // A user id that a stranger names must not become the message's.
        headers.insert("settled-origin-user-id".into(), text("victim"));
        match value {
            Some(value) => headers.insert(name.into(), value),
            None => headers.remove(name),
        };
        let (message, cause) = opened(letter);
        assert_eq!(
            (cause.made_by, cause.reason),
            (MadeBy::Unknown, Reason::Internal),
            "{name}"
        );
        assert!(cause.detail.contains(name) && cause.failed_at.is_none(), "{cause:?}");
        assert_eq!(message.properties.user_id, None);
        assert_eq!(message.properties.headers, sent().properties.headers, "{name}");
        assert_eq!(message.routing_key, KEY);
    }
}

#[test]
fn the_broker_says_why_by_its_first_record_alone() {
    for (queue, word, reason) in [
        ("settlement.updates", "rejected", Reason::Internal),
        ("settlement.updates", "delivery_limit", Reason::DeliveryLimit),
        ("settlement.updates.acme", "expired", Reason::Expired),
        ("settlement.updates", "maxlen", Reason::Internal),
    ] {
        let forged = HeaderValue::Table(death("settlement.updates", "expired"));
        let mut letter = by_the_broker(vec![HeaderValue::Table(death(queue, word)), forged]);
        let headers = letter.properties.headers.get_or_insert_default();
        let lies = ours(Reason::UnknownPartner).properties.headers.unwrap_or_default();
        headers.extend(lies.into_iter().filter(|(name, _)| name.starts_with("settled-")));
        headers.insert("settled-origin-user-id".into(), text("victim"));
        headers.insert("x-first-death-reason".into(), text("rejected"));
        headers.insert("x-last-death-queue".into(), text("evil"));
        let (message, cause) = opened(letter);
        assert_eq!((cause.made_by, cause.reason), (MadeBy::Broker, reason));
        assert_eq!(cause.failed_at, Some(time(900)));
        assert_eq!(message, sent(), "user id and expiration are the partner's own");
        let untold = matches!(reason, Reason::DeliveryLimit | Reason::Expired);
        assert_eq!(cause.is_untold(), untold);
    }
}

#[test]
fn a_death_elsewhere_is_not_the_brokers_word_about_ours() {
    let at = |queue: &str| HeaderValue::Table(death(queue, "expired"));
    for deaths in [
        vec![at("theirs"), at("settlement.updates")],
        vec![at("settlement.updates.")],
        vec![at("settlement.updates.a.b")],
        vec![at("settlement.updatesx")],
        vec![at("settlement.dead")],
        vec![text("settlement.updates"), at("settlement.updates")],
        vec![],
    ] {
        let (_, cause) = opened(by_the_broker(deaths.clone()));
        assert_eq!(cause.made_by, MadeBy::Unknown, "{deaths:?}");
        // And beside headers of ours it is nothing: a tool may have moved the dead letter about.
        let mut letter = ours(Reason::UnknownPartner);
        letter
            .properties
            .headers
            .get_or_insert_default()
            .insert("x-death".into(), HeaderValue::Array(deaths));
        let (message, cause) = opened(letter);
        assert_eq!((cause.made_by, cause.reason), (MadeBy::Settled, Reason::UnknownPartner));
        assert_eq!(message, sent());
    }
    let mut letter = by_the_broker(vec![]);
    let headers = letter.properties.headers.get_or_insert_default();
    headers.insert("x-death".into(), text("settlement.updates"));
    assert_eq!(opened(letter).1.made_by, MadeBy::Unknown);
}

/// RabbitMQ up to 3.12 keeps a record that came with the message, if its queue and reason are the true ones, and only
/// counts it up. One that the broker did not write says nothing.
#[test]
fn a_record_that_the_broker_does_not_write_is_nobodys() {
    let whole = || death("settlement.updates", "expired");
    let (message, cause) = opened(by_the_broker(vec![HeaderValue::Table(whole())]));
    assert_eq!(
        (cause.made_by, message.properties.user_id.as_deref()),
        (MadeBy::Broker, Some("partner"))
    );
    let mut without_expiration = whole();
    without_expiration.remove("original-expiration");
    let cause = opened(by_the_broker(vec![HeaderValue::Table(without_expiration)])).1;
    assert_eq!(cause.made_by, MadeBy::Broker, "a queue's own time to live");
    let spoil: [(&str, Option<HeaderValue>); 17] = [
        ("reason", None),
        ("reason", Some(HeaderValue::Boolean(true))),
        ("exchange", None),
        ("exchange", Some(HeaderValue::Void)),
        ("count", None),
        ("count", Some(HeaderValue::LongInt(1))),
        ("count", Some(HeaderValue::LongLongInt(0))),
        ("time", None),
        ("time", Some(text("then"))),
        ("time", Some(HeaderValue::LongLongInt(900))),
        ("time", Some(HeaderValue::Timestamp(u64::MAX))),
        ("time", Some(HeaderValue::Timestamp(2_000 + 601))),
        ("routing-keys", None),
        ("routing-keys", Some(text(KEY))),
        ("routing-keys", Some(HeaderValue::Array(vec![]))),
        ("routing-keys", Some(HeaderValue::Array(vec![HeaderValue::Void]))),
        ("original-expiration", Some(text("soon"))),
    ];
    for (name, value) in spoil {
        let mut record = whole();
        let spoiled = format!("{name}: {value:?}");
        match value {
            Some(value) => record.insert(name.into(), value),
            None => record.remove(name),
        };
        let (message, cause) = opened(by_the_broker(vec![HeaderValue::Table(record.clone())]));
        assert_eq!(
            (cause.made_by, cause.reason),
            (MadeBy::Unknown, Reason::Internal),
            "{spoiled}"
        );
        assert!(!cause.is_untold() && cause.failed_at.is_none(), "{spoiled}");
        assert_eq!(message.properties.user_id, None, "{spoiled}");
        assert_eq!(message.properties.headers, sent().properties.headers, "{spoiled}");
        // Nor does a word of ours beside it count: that is no letter as we publish them.
        let mut letter = ours(Reason::UnknownPartner);
        let headers = letter.properties.headers.get_or_insert_default();
        headers.insert("x-death".into(), HeaderValue::Array(vec![HeaderValue::Table(record)]));
        assert_eq!(opened(letter).1.made_by, MadeBy::Unknown, "{spoiled}");
    }
    // The broker's clock may be ahead a little: it failed now, then.
    let mut ahead = whole();
    ahead.insert("time".into(), HeaderValue::Timestamp(2_000 + 599));
    assert_eq!(
        opened(by_the_broker(vec![HeaderValue::Table(ahead)])).1.made_by,
        MadeBy::Broker
    );
}

/// Who may write to settlement.dead, and is no worker.
#[test]
fn a_letter_is_believed_by_who_published_it() {
    let others = Trusted::new([WORKER.to_owned(), "other-worker".to_owned()]);
    let anybody = Trusted::new([WORKER.to_owned(), String::new()]);
    let alone = Trusted::new([WORKER.to_owned()]);
    for (user_id, trusted, is_believed) in [
        (Some(WORKER), &alone, true),
        (Some("other-worker"), &alone, false),
        (Some("other-worker"), &others, true),
        (Some("mallory"), &others, false),
        (Some("partner"), &others, false),
        (None, &alone, false),
        (None, &others, false),
        (None, &anybody, true),
        (Some("mallory"), &anybody, false),
        (Some("Worker"), &alone, false),
        (Some("worker "), &alone, false),
    ] {
        let mut letter = ours(Reason::SignatureMismatch);
        letter.properties.user_id = user_id.map(str::to_owned);
        let (message, cause) = open(letter, trusted, time(2_000));
        let expected = if is_believed {
            (MadeBy::Settled, Reason::SignatureMismatch, Some("partner"))
        } else {
            (MadeBy::Unknown, Reason::Internal, None)
        };
        let found = (cause.made_by, cause.reason, message.properties.user_id.as_deref());
        assert_eq!(found, expected, "{user_id:?}");
        // What the broker gave up carries its sender's user_id, whoever that is.
        let mut letter = by_the_broker(vec![HeaderValue::Table(death("settlement.updates", "expired"))]);
        letter.properties.user_id = user_id.map(str::to_owned);
        let (message, cause) = open(letter, trusted, time(2_000));
        assert_eq!(
            (cause.made_by, message.properties.user_id.as_deref()),
            (MadeBy::Broker, user_id)
        );
    }
}

#[test]
fn what_is_too_large_says_by_how_much() {
    let mut letter = by_the_broker(vec![HeaderValue::Table(death("settlement.updates", "rejected"))]);
    let (message, cause) = opened(letter.clone());
    let explained = explain(cause, &facts(&message));
    // By somebody else: a worker rejects nothing.
    assert_eq!(explained.reason, Reason::Internal);
    assert_eq!(
        explained.detail,
        "somebody rejected it at its queue, although it is within the limits"
    );
    letter.body = vec![b' '; BODY_MAX + 1];
    let (message, cause) = opened(letter);
    let explained = explain(cause, &facts(&message));
    assert_eq!(explained.reason, Reason::MessageTooLarge);
    assert_eq!(
        explained.detail,
        "the body has 262145 bytes, at most 262144 are allowed"
    );
}

#[test]
fn no_database_holds_a_nul() {
    let mut letter = sent();
    assert_eq!(unstorable(&letter), None);
    letter.routing_key.push('\0');
    assert!(unstorable(&letter).is_some());
}

/// What can not be decoded travels as text, and is what it was for whoever reads the dead letter.
#[test]
fn undecodable_properties_come_back_as_they_were() {
    // User id and headers can be decoded, the message id between them can not.
    let table = b"\x04mineI\x00\x00\x00\x07\x0esettled-reasonV";
    let length = u32::try_from(table.len()).expect("few").to_be_bytes();
    let list = [
        &[0b0010_0000, 0b1001_0000][..],
        &length,
        table,
        b"\x02\xff\xfe",
        b"\x07partner",
    ]
    .concat();
    let message = Delivery {
        properties: wire::read(&list),
        ..sent()
    };
    let refused = facts(&message).content.expect_err("refused");
    assert_eq!(refused.reason, Reason::MalformedMessage);
    assert!(
        refused.detail.contains("properties can not be decoded"),
        "{}",
        refused.detail
    );
    let letter = letter_of(&message, Reason::MalformedMessage);
    assert_eq!(letter.properties.undecodable, None);
    assert_eq!(letter.properties.user_id.as_deref(), Some(WORKER));
    let (message_again, cause) = opened(letter.clone());
    assert_eq!(
        (cause.made_by, cause.reason),
        (MadeBy::Settled, Reason::MalformedMessage)
    );
    let mut expected = wire::read(&list);
    expected.headers = Some(headers([("mine", HeaderValue::LongInt(7))]));
    assert_eq!(message_again.properties, expected);
    assert_eq!(message_again.properties.user_id.as_deref(), Some("partner"));
    assert_eq!(message_again.properties.undecodable.map(|list| list.0), Some(list));
    // The same when it is judged again.
    assert_eq!(facts(&opened_again(&message)).content.expect_err("refused"), refused);
    // One that says so and holds no list is nobody's.
    let mut spoilt = letter;
    let headers = spoilt.properties.headers.as_mut().expect("headers");
    headers.insert(ORIGIN_PROPERTIES.into(), text("no base64"));
    assert_eq!(opened(spoilt).1.made_by, MadeBy::Unknown);
}

fn opened_again(message: &Delivery) -> Delivery {
    opened(letter_of(message, Reason::MalformedMessage)).0
}

/// The largest that is not too large still fits the frames of a connection that consumes nothing.
#[test]
fn the_letter_of_the_largest_undecodable_list_fits_a_small_frame() {
    let wrong = [&b"\xff"[..], &[b'x'; 200]].concat();
    let mut table = Vec::new();
    while table.len() < PROPERTIES_MAX - 500 {
        table.extend(b"\x01a");
        table.push(b'S');
        table.extend(100_u32.to_be_bytes());
        table.extend([b'v'; 100]);
    }
    let length = u32::try_from(table.len()).expect("few").to_be_bytes();
    let short = [&[u8::try_from(wrong.len()).expect("short")], &wrong[..]].concat();
    let list = [&[0b0010_0000, 0b1000_0000][..], &length, &table, &short].concat();
    let message = Delivery {
        properties: wire::read(&list),
        ..sent()
    };
    let letter = letter_of(&message, Reason::MalformedMessage);
    assert!(
        letter.properties.wire_len() < 30_000,
        "{}",
        letter.properties.wire_len()
    );
    assert_eq!(opened(letter).0.properties, wire::read(&list));
}

/// What travels as text is stored, and replayed, as it came.
#[test]
fn headers_of_rare_types_come_back_as_they_were() {
    let mut message = sent();
    let own = headers([
        ("mine", HeaderValue::LongInt(7)),
        ("rate", HeaderValue::Double(0.1_f64.to_bits())),
        (
            "raw",
            HeaderValue::ByteArray(crate::domain::delivery::Bytes(vec![1, 2])),
        ),
        (
            "list",
            HeaderValue::Array(vec![HeaderValue::Decimal { scale: 1, value: 5 }, HeaderValue::Void]),
        ),
    ]);
    message.properties.headers = Some(own.clone());
    let letter = letter_of(&message, Reason::UnknownPartner);
    let travels = letter.properties.headers.as_ref().expect("headers");
    assert_eq!(travels["rate"], text("0.1"));
    assert_eq!(
        travels["list"],
        HeaderValue::Array(vec![text("0.5"), HeaderValue::Void])
    );
    let (again, cause) = opened(letter.clone());
    assert_eq!(cause.made_by, MadeBy::Settled);
    assert_eq!(again.properties, message.properties);
    assert_eq!(again.properties.headers, Some(own));
    let mut spoilt = letter;
    let headers = spoilt.properties.headers.as_mut().expect("headers");
    headers.insert(ORIGIN_HEADERS.into(), text("AAAA"));
    assert_eq!(opened(spoilt).1.made_by, MadeBy::Unknown);
}
