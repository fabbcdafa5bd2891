use super::*;
use crate::domain::{
    decide::Rules,
    delivery::{Properties, Source},
    event,
    message::facts,
};

const KEY: &str = "acme.allocation.update";

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).expect("in range")
}

fn headers<const N: usize>(entries: [(&str, HeaderValue); N]) -> Headers {
    entries
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::text(value)
}

/// A message as a partner sends it.
fn sent() -> Delivery {
    Delivery {
        exchange: "settlement.updates".into(),
        routing_key: KEY.into(),
        body: b"{}".to_vec(),
        properties: Properties {
            content_type: Some("application/json".into()),
            headers: Some(headers([("mine", HeaderValue::LongInt(7)), ("traceparent", text("x"))])),
            delivery_mode: Some(2),
            expiration: Some("60000".into()),
            message_id: Some("m-1".into()),
            user_id: Some("partner".into()),
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Queue { delivery_tag: 3 },
    }
}

fn rules() -> Rules {
    Rules {
        park_deadline: jiff::SignedDuration::from_secs(1),
        park_first_retry: jiff::SignedDuration::from_secs(1),
        park_max_interval: jiff::SignedDuration::from_secs(1),
        park_max_per_partner: 1,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".into(),
    }
}

/// The login that dead letters carry.
const WORKER: &str = "worker";

/// A letter taken apart, where the worker's word counts, at a time after everything here.
fn opened(letter: Delivery) -> (Delivery, Cause) {
    open(letter, &Trusted::new([WORKER.to_owned()]), time(2_000))
}

/// The dead letter that the worker makes of it, as the collector gets it.
fn ours(reason: Reason) -> Delivery {
    letter_of(&sent(), reason)
}

fn letter_of(message: &Delivery, reason: Reason) -> Delivery {
    let facts = facts(message);
    let judgement = crate::domain::decide::Judgement {
        verdict: crate::domain::decide::Verdict::Rejected {
            reason,
            detail: "amount.quantity: differs from the record".into(),
        },
        proven: false,
    };
    let judged = Judged {
        delivery: message,
        facts: &facts,
    };
    let made = event::publications(judged, &judgement, time(1_000), &rules());
    let letter = made
        .into_iter()
        .find(|publication| publication.kind == crate::domain::delivery::PublicationKind::DeadLetter)
        .expect("a dead letter");
    Delivery {
        exchange: letter.exchange,
        routing_key: letter.routing_key,
        body: letter.body,
        properties: Properties {
            // The publisher adds it.
            user_id: Some(WORKER.into()),
            ..letter.properties
        },
        cut: None,
        redelivered: false,
        source: Source::Queue { delivery_tag: 3 },
    }
}

/// What the broker writes when it dead-letters by itself.
fn death(queue: &str, reason: &str) -> Headers {
    headers([
        ("count", HeaderValue::LongLongInt(1)),
        ("exchange", text("settlement.updates")),
        ("original-expiration", text("60000")),
        ("queue", text(queue)),
        ("reason", text(reason)),
        ("routing-keys", HeaderValue::Array(vec![text(KEY)])),
        ("time", HeaderValue::Timestamp(900)),
    ])
}

fn by_the_broker(deaths: Vec<HeaderValue>) -> Delivery {
    let mut delivery = sent();
    delivery.properties.expiration = None;
    let headers = delivery.properties.headers.get_or_insert_default();
    headers.insert("x-death".into(), HeaderValue::Array(deaths));
    delivery.exchange = "settlement.dead".into();
    delivery
}

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
    message::shorten(&mut message, &facts);
    let refusal = facts.content.clone().expect_err("too large");
    let judgement = Judgement {
        verdict: Verdict::Rejected {
            reason: refusal.reason,
            detail: refusal.detail,
        },
        proven: false,
    };
    let judged = Judged {
        delivery: &message,
        facts: &facts,
    };
    let made = event::publications(judged, &judgement, time(1_000), &rules());
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
        assert_eq!(facts.message_digest, message::sha256(&body));
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
        headers.insert(BODY_LENGTH_HEADER.into(), value);
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
    letter
        .properties
        .headers
        .as_mut()
        .expect("headers")
        .remove(BODY_LENGTH_HEADER);
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
        ("settled-reason", Some(text("because"))),
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
    letter.body = vec![b' '; message::BODY_MAX + 1];
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

fn identity(properties: &Properties) -> Identity<'_> {
    Identity {
        routing_key: KEY,
        digest: message::sha256(b"{}"),
        properties,
        is_too_large: false,
        is_unknown: false,
    }
}

#[test]
fn an_id_is_everything_that_is_judged_and_nothing_else() {
    let sent = sent().properties;
    let one = identity(&sent);
    let plain = Properties::default();
    let with = |change: fn(&mut Properties)| {
        let mut properties = sent.clone();
        change(&mut properties);
        properties
    };
    // What no check reads.
    for same in [
        with(|properties| properties.headers = None),
        with(|properties| properties.message_id = Some("m-2".into())),
        with(|properties| properties.expiration = None),
        with(|properties| properties.reply_to = Some("amq.rabbitmq.reply-to.x".into())),
        with(|properties| properties.correlation_id = Some("c".into())),
        with(|properties| properties.delivery_mode = Some(1)),
        with(|properties| properties.priority = Some(9)),
        with(|properties| properties.timestamp = Some(1)),
        with(|properties| properties.kind = Some("k".into())),
        with(|properties| properties.app_id = Some("a".into())),
        with(|properties| properties.cluster_id = Some("c".into())),
    ] {
        assert_eq!(identity(&same).id(), one.id(), "{same:?}");
    }
    let empty = Properties {
        content_type: Some(String::new()),
        content_encoding: Some(String::new()),
        user_id: Some(String::new()),
        ..plain.clone()
    };
    let others = [
        with(|properties| properties.content_type = None),
        with(|properties| properties.content_type = Some(String::new())),
        with(|properties| properties.content_type = Some("Application/json".into())),
        with(|properties| properties.content_encoding = Some("gzip".into())),
        with(|properties| properties.content_encoding = Some(String::new())),
        with(|properties| properties.user_id = None),
        with(|properties| properties.user_id = Some("partne".into())),
        // The same letters, elsewhere.
        with(|properties| {
            properties.content_encoding = properties.user_id.take();
        }),
        with(|properties| {
            properties.content_type = Some("application/jsonpartner".into());
            properties.user_id = None;
        }),
        plain.clone(),
        empty,
    ];
    let mut ids: Vec<Uuid> = others.iter().map(|other| identity(other).id()).collect();
    ids.extend([
        one.id(),
        Identity {
            routing_key: "acme.deallocation.update",
            ..one
        }
        .id(),
        Identity {
            digest: message::sha256(b"[]"),
            ..one
        }
        .id(),
        Identity {
            is_too_large: true,
            ..one
        }
        .id(),
        Identity {
            is_unknown: true,
            ..one
        }
        .id(),
    ]);
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "each is a row of its own");
    // Rows of years are found by it: it stays what it is.
    assert_eq!(one.id().to_string(), "a18ede03-354f-0626-a220-6f6a31649f19");
}

#[test]
fn a_shape_is_what_details_have_in_common() {
    for (detail, shape) in [
        ("", ""),
        (
            "amount.quantity: differs from the record",
            "amount.quantity: differs from the record",
        ),
        (
            "the body has 262145 bytes, at most 262144",
            "the body has <n> bytes, at most <n>",
        ),
        ("no 3f2504e0-4f89-41d3-9a0c-0305e82c3301 here", "no <id> here"),
        ("3F2504E0-4F89-41D3-9A0C-0305E82C3301", "<id>"),
        (
            "x3f2504e0-4f89-41d3-9a0c-0305e82c3301",
            "x<n>f<n>e<n>-<n>f<n>-<n>d<n>-<n>a<n>c-<n>e<n>c<n>",
        ),
        ("key 033df510d350f873be0b78806104683194536b57 is", "key <hex> is"),
        ("nonce-17 and 18446744073709551616", "nonce-<n> and <n>"),
        ("defaced facade", "defaced facade"),
        ("größer als 5 \u{20bf}", "größer als <n> \u{20bf}"),
    ] {
        assert_eq!(shape_of(detail), shape, "{detail}");
    }
    let group = |partner, reason, detail| group_of(partner, reason, detail);
    let one = group(Some("acme"), Reason::InvalidField, "nonce: 5 bytes");
    assert_eq!(one, group(Some("acme"), Reason::InvalidField, "nonce: 17 bytes"));
    for other in [
        group(Some("beta"), Reason::InvalidField, "nonce: 5 bytes"),
        group(None, Reason::InvalidField, "nonce: 5 bytes"),
        group(Some("acme"), Reason::MalformedMessage, "nonce: 5 bytes"),
        group(Some("acme"), Reason::InvalidField, "nonce: 5 words"),
    ] {
        assert_ne!(one, other);
    }
}

/// Failures of one message at these times, handed out before or not; what they leave in a row.
fn filed(known: Option<Known>, failures: &[(Option<i64>, bool)]) -> (Option<Entry>, usize) {
    filed_by(MadeBy::Settled, known, failures)
}

fn filed_by(made_by: MadeBy, known: Option<Known>, failures: &[(Option<i64>, bool)]) -> (Option<Entry>, usize) {
    let message = sent();
    let facts = facts(&message);
    let causes: Vec<Cause> = failures
        .iter()
        .map(|(failed_at, _)| Cause {
            made_by,
            reason: Reason::UnknownPartner,
            detail: String::new(),
            failed_at: failed_at.map(time),
        })
        .collect();
    let arrivals: Vec<Arrival<'_>> = causes
        .iter()
        .zip(failures)
        .map(|(cause, (_, again))| Arrival {
            message: Judged {
                delivery: &message,
                facts: &facts,
            },
            cause,
            again: *again,
            has_effect: false,
        })
        .collect();
    let id = arrivals.first().expect("an arrival").id();
    let known = known.map(|known| (id, known)).into_iter().collect();
    let mut filing = file(&known, &arrivals, time(100));
    let entry = filing.entries.remove(&id);
    assert!(filing.entries.is_empty(), "one row a message");
    (entry, filing.counted.len())
}

#[test]
fn a_message_is_one_row_however_often_it_fails() {
    let known = |state, discarded_at: Option<i64>| Known {
        state,
        first_failed_at: time(10),
        last_failed_at: time(20),
        discarded_at: discarded_at.map(time),
    };
    let (first, again) = (false, true);
    // New, twice in one batch, the second time later.
    let (entry, counted) = filed(None, &[(Some(5), first), (Some(7), first)]);
    let expected = Entry {
        is_new: true,
        state: State::Open,
        first_failed_at: time(5),
        last_failed_at: time(7),
        discarded_at: None,
        seen: 2,
        last: Some(1),
        is_closed: false,
    };
    assert_eq!((entry, counted), (Some(expected), 2));
    // What was handed out before and is not there is stored like any other.
    assert_eq!(filed(None, &[(Some(5), again)]).1, 1);
    // A copy of what is there changes nothing.
    for failed_at in [Some(20), Some(12), None] {
        let (entry, counted) = filed(Some(known(State::Open, None)), &[(failed_at, again)]);
        assert_eq!((entry, counted), (None, 0), "{failed_at:?}");
    }
    // Nor does the second copy that a relay publishes, which the broker does not mark: it has the time of the first.
    for failed_at in [10, 20] {
        let (entry, counted) = filed(Some(known(State::Open, None)), &[(Some(failed_at), first)]);
        assert_eq!((entry, counted), (None, 0), "{failed_at}");
    }
    assert_eq!(filed(None, &[(Some(5), first), (Some(5), first)]).1, 1);
    // A late copy that the broker does not mark counts, and changes no reason.
    let (entry, _) = filed(Some(known(State::Open, None)), &[(Some(8), first)]);
    let entry = entry.expect("an entry");
    assert_eq!((entry.seen, entry.last, entry.first_failed_at), (1, None, time(8)));
    // A later failure does, handed out before or not.
    for is_again in [first, again] {
        let entry = filed(Some(known(State::Open, None)), &[(Some(21), is_again)]).0;
        let entry = entry.expect("an entry");
        assert_eq!((entry.seen, entry.last, entry.last_failed_at), (1, Some(0), time(21)));
    }
    // Clocks ahead of the database's, and no clock at all, are now.
    for failed_at in [Some(500), None] {
        let entry = filed(Some(known(State::Open, None)), &[(failed_at, first)]).0;
        assert_eq!(entry.expect("an entry").last_failed_at, time(100));
    }
    // Only a failure after it was discarded opens it again.
    for (failed_at, state) in [(25, State::Discarded), (30, State::Discarded), (31, State::Open)] {
        let entry = filed(Some(known(State::Discarded, Some(30))), &[(Some(failed_at), first)]).0;
        let entry = entry.expect("an entry");
        assert_eq!(
            (entry.state, entry.discarded_at.is_some()),
            (state, state == State::Discarded)
        );
    }
    // The broker tells whole seconds only: one that it says of the second of the discard is taken for a later one, unless
    // it may be a copy of what is known.
    let mut discarded = known(State::Discarded, None);
    discarded.discarded_at = Some(Timestamp::from_millisecond(30_500).expect("a time"));
    for (made_by, failed_at, is_again, state) in [
        (MadeBy::Broker, 30, first, State::Open),
        (MadeBy::Broker, 30, again, State::Discarded),
        (MadeBy::Broker, 29, first, State::Discarded),
        (MadeBy::Settled, 30, first, State::Discarded),
    ] {
        let entry = filed_by(made_by, Some(discarded.clone()), &[(Some(failed_at), is_again)]).0;
        let entry = entry.expect("an entry");
        assert_eq!(entry.state, state, "{made_by:?} {failed_at} {is_again}");
        assert_eq!(entry.discarded_at.is_some(), state == State::Discarded);
    }
    // What is under way or over stays so.
    for state in [State::Due, State::Parked, State::Settled] {
        let entry = filed(Some(known(state, None)), &[(Some(50), first)]).0;
        assert_eq!(entry.expect("an entry").state, state);
    }
}

#[test]
fn a_verdict_on_a_dead_letter_says_where_it_stands() {
    let id = Uuid::from_u128(7);
    let key = Uuid::from_u128(8);
    let replayed = Source::Replayed { id };
    let waited = Source::Parked {
        key,
        seq: 0,
        dead_letter: Some(id),
    };
    let at = time(0);
    let parked = |again| Verdict::Parked {
        parked_at: at,
        until: at,
        again,
    };
    let refused = Verdict::Rejected {
        reason: Reason::AllocationNotFound,
        detail: "no allocation of this id was reserved in time".into(),
    };
    for (source, verdict, expected) in [
        (
            replayed,
            parked(false),
            Some((State::Parked, VerdictKind::Parked, true)),
        ),
        (replayed, parked(true), Some((State::Open, VerdictKind::Parked, true))),
        (
            replayed,
            refused.clone(),
            Some((State::Open, VerdictKind::Rejected, true)),
        ),
        (waited, parked(true), None),
        (
            waited,
            refused.clone(),
            Some((State::Open, VerdictKind::Rejected, false)),
        ),
        (Source::Queue { delivery_tag: 1 }, refused.clone(), None),
        (Source::Plain, refused.clone(), None),
        (
            Source::Parked {
                key,
                seq: 0,
                dead_letter: None,
            },
            refused.clone(),
            None,
        ),
    ] {
        let mut message = sent();
        message.source = source;
        let facts = facts(&message);
        let judged = Judged {
            delivery: &message,
            facts: &facts,
        };
        let judgement = Judgement { verdict, proven: true };
        let ruling = ruling(judged, &judgement);
        let found = ruling
            .as_ref()
            .map(|ruling| (ruling.state, ruling.verdict, ruling.is_replay));
        assert_eq!(found, expected, "{source:?} {judgement:?}");
        let is_refusal = judgement.verdict.kind() == VerdictKind::Rejected;
        if let Some(ruling) = ruling {
            assert_eq!(ruling.id, id);
            assert_eq!(
                (ruling.detail.is_some(), ruling.group.is_some()),
                (is_refusal, is_refusal)
            );
        }
        // What is a dead letter already is not published as one again; its refusal is told.
        let publications = event::publications(judged, &judgement, at, &rules());
        let kind = crate::domain::delivery::PublicationKind::DeadLetter;
        let again = publications.iter().any(|publication| publication.kind == kind);
        assert_eq!(again, is_refusal && source.dead_letter().is_none(), "{source:?}");
        assert!(!is_refusal || !publications.is_empty());
    }
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
    while table.len() < message::PROPERTIES_MAX - 500 {
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
