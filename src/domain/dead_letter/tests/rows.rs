//! Which letters are one row, and what becomes of it.

use super::*;

fn identity(properties: &Properties) -> Identity<'_> {
    Identity {
        routing_key: KEY,
        digest: sha256(b"{}"),
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
            digest: sha256(b"[]"),
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
fn filed(known: Option<Known>, failures: &[(Option<i64>, bool)]) -> (Option<FiledRow>, usize) {
    filed_by(MadeBy::Settled, known, failures)
}

fn filed_by(made_by: MadeBy, known: Option<Known>, failures: &[(Option<i64>, bool)]) -> (Option<FiledRow>, usize) {
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
            message: MessageRef {
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
    let expected = FiledRow {
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
        let judged = MessageRef {
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
        let publications = publications(judged, &judgement, at, &rules());
        let kind = crate::domain::delivery::PublicationKind::DeadLetter;
        let again = publications.iter().any(|publication| publication.kind == kind);
        assert_eq!(again, is_refusal && source.dead_letter().is_none(), "{source:?}");
        assert!(!is_refusal || !publications.is_empty());
    }
}

/// What a batch says it published is what the collector counts, whatever copies differ in.
#[test]
fn a_batch_counts_its_letters_as_the_collector_does() {
    let plain = sent();
    let with = |change: fn(&mut Delivery)| {
        let mut delivery = sent();
        change(&mut delivery);
        delivery
    };
    let copies = [
        plain.clone(),
        with(|copy| copy.properties.message_id = Some("m-2".into())),
        with(|copy| copy.properties.content_type = Some("text/plain".into())),
        with(|copy| copy.properties.content_encoding = Some("gzip".into())),
        with(|copy| copy.properties.user_id = None),
        with(|copy| copy.routing_key = "acme.deallocation.update".into()),
        with(|copy| copy.body = b"[]".to_vec()),
    ];
    let rejected = Judgement {
        verdict: Verdict::Rejected {
            reason: Reason::MalformedMessage,
            detail: "no".into(),
        },
        proven: false,
    };
    let facts: Vec<_> = copies.iter().map(facts).collect();
    let judged = copies
        .iter()
        .zip(&facts)
        .map(|(delivery, facts)| (MessageRef { delivery, facts }, &rejected));
    let letters: Vec<(Delivery, Cause)> = copies
        .iter()
        .map(|copy| opened(letter_of(copy, Reason::MalformedMessage)))
        .collect();
    let read: Vec<_> = letters
        .iter()
        .map(|(delivery, _)| crate::domain::message::facts(delivery))
        .collect();
    let arrivals: Vec<Arrival<'_>> = letters
        .iter()
        .zip(&read)
        .map(|((delivery, cause), facts)| Arrival {
            message: MessageRef { delivery, facts },
            cause,
            again: false,
            has_effect: false,
        })
        .collect();
    let counted: u32 = taken(&[].into(), &arrivals).values().sum();
    assert_eq!(letters_of(judged), 6);
    assert_eq!(counted, 6);
    // One that is replayed makes no second letter.
    let mut replayed = plain;
    replayed.source = Source::Replayed { id: Uuid::nil() };
    let facts = crate::domain::message::facts(&replayed);
    let one = MessageRef {
        delivery: &replayed,
        facts: &facts,
    };
    assert_eq!(letters_of([(one, &rejected)]), 0);
}
