//! Many events in one message.

use super::*;

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
        exchange: DEAD.to_owned(),
        routing_key: "invalid_field".to_owned(),
        properties: Properties {
            headers: Some(Headers::from([(
                header::EVENTS.to_owned(),
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
    headers.insert(header::EVENTS.to_owned(), HeaderValue::LongInt(1_000_000));
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
