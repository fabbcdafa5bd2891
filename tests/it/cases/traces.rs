//! Traces, as a receiver is told them: what is in them, that nobody waits for it, and what travels on with events and dead letters.

use std::collections::{BTreeMap, BTreeSet};

use hyper::StatusCode;
use lapin::types::{AMQPValue, FieldTable};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::Value;

use crate::kit::{
    amqp::{Message, Seen},
    auditor::Expect,
    certificates::Certificates,
    front::Front,
    otlp::{Manner, Receiver, Told},
    partner::Partner,
    secrets,
    support::{COLLECTS, PATIENCE, Place, Worker, skip, until, with_partner, with_reservations},
};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const SOON: (&str, &str) = ("SETTLED_TRACES__EXPORT_INTERVAL", "20ms");
const ONE_LANE: (&str, &str) = ("SETTLED_WORKER__LANES", "1");

/// A valid `traceparent` by number.
fn parent(number: u32) -> String {
    format!("00-{number:032x}-{number:016x}-01")
}

/// The message with these headers.
fn with(message: Message, headers: &[(&str, &str)]) -> Message {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), AMQPValue::LongString((*value).into()));
    }
    message.with(|properties| properties.with_headers(table))
}

fn traced(message: Message, number: u32) -> Message {
    with(
        message,
        &[("traceparent", &parent(number)), ("tracestate", &state(number))],
    )
}

fn state(number: u32) -> String {
    format!("vendor={number},other@x=a b")
}

/// Everything that a batch was linked to.
fn links(batches: &[Told]) -> BTreeSet<(String, String)> {
    batches.iter().flat_map(|batch| batch.links.iter().cloned()).collect()
}

fn numbers(numbers: impl IntoIterator<Item = u32>) -> BTreeSet<(String, String)> {
    numbers
        .into_iter()
        .map(|number| (parent(number), state(number)))
        .collect()
}

fn event(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body).expect("an event is JSON")
}

/// The `traceparent` of every event, by its type and nonce. None says more of a trace.
fn told(place: &Place) -> BTreeMap<(String, String), Option<String>> {
    let events = place.events.seen().into_iter().flat_map(Seen::events);
    events
        .map(|seen| {
            let event = event(&seen);
            assert_eq!(seen.text("tracestate"), None, "{event}");
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let of = (text(&event["type"]), text(&event["data"]["nonce"]));
            (of, seen.text("traceparent"))
        })
        .collect()
}

async fn metric(worker: &Worker, line: &str) -> u64 {
    let (_, text) = worker.get("/metrics").await.expect("it answers");
    let value = text.lines().find_map(|have| have.strip_prefix(line));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

fn nonce(message: &Message) -> String {
    let body: Value = serde_json::from_slice(&message.body).expect("JSON");
    body["nonce"].as_str().expect("a nonce").to_owned()
}

/// Lines of the log that say this.
fn said(worker: &Worker, message: &str) -> Vec<Value> {
    let mut lines = worker.lines();
    lines.retain(|line| line["message"] == message);
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_one_trace_with_its_stages_and_links() {
    let (place, partner, reservations) = with_reservations("spans", 40).await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    let key = "an-api-key-nobody-may-read";
    secrets::password(key);
    let settings = [
        (ENDPOINT, endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=an-api-key-nobody-may-read"),
        ("OTEL_SERVICE_NAME", "settlement"),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=test,service.name=no",
        ),
        SOON,
        ONE_LANE,
        COLLECTS[0],
    ];
    let worker = place.ready_worker(&settings).await;
    let good: Vec<Message> = (1..)
        .zip(&reservations[..30])
        .map(|(number, reservation)| traced(partner.cleared(reservation), number))
        .collect();
    // What is no traceparent is passed over, and so is a tracestate without one, that is none, or that is too long.
    let long = format!("a={},b={}", "v".repeat(255), "v".repeat(255));
    let odd = [
        with(partner.cleared(&reservations[30]), &[("traceparent", "00-nonsense")]),
        with(partner.cleared(&reservations[31]), &[("tracestate", "a=1")]),
        with(
            partner.cleared(&reservations[32]),
            &[("traceparent", &parent(99)), ("tracestate", "A=1")],
        ),
        with(
            partner.cleared(&reservations[33]),
            &[("traceparent", &parent(98)), ("tracestate", &long)],
        ),
        partner.cleared(&reservations[34]),
    ];
    let refused = traced(
        Message::new("acme.allocation.update", "{", Expect::Refused("malformed_message")),
        50,
    );
    let messages: Vec<Message> = good.iter().chain(&odd).cloned().chain([refused.clone()]).collect();
    place.publish(&messages).await;
    let batches = receiver.batches("queue", messages.len()).await;

    let linked = links(&batches);
    let mut expected = numbers((1..=30).chain([50]));
    expected.extend([98, 99].map(|number| (parent(number), String::new())));
    assert_eq!(linked, expected);
    let mut judged = BTreeMap::<String, usize>::new();
    for batch in &batches {
        assert_eq!(
            (batch.name.as_str(), batch.kind),
            ("process settlement.updates", SpanKind::Consumer)
        );
        assert_eq!((batch.parent.as_str(), batch.status, batch.links_dropped), ("", 0, 0));
        for (name, value) in [
            ("messaging.system", "rabbitmq"),
            ("messaging.operation.name", "process"),
            ("messaging.operation.type", "process"),
            ("messaging.destination.name", "settlement.updates"),
            ("settlement.door", "queue"),
        ] {
            assert_eq!(batch.attributes.get(name).map(String::as_str), Some(value), "{name}");
        }
        for (name, value) in [
            ("service.name", "settlement"),
            ("service.version", env!("CARGO_PKG_VERSION")),
            ("service.instance.id", worker.name.as_str()),
            ("deployment.environment.name", "test"),
            ("telemetry.sdk.language", "rust"),
        ] {
            assert_eq!(batch.resource.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert_eq!(
            batch.scope,
            ("settled".to_owned(), env!("CARGO_PKG_VERSION").to_owned())
        );
        let stages = receiver.under(batch);
        let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["read", "load", "decide", "write", "commit", "publish"]);
        let kinds: Vec<SpanKind> = stages.iter().map(|stage| stage.kind).collect();
        let (inside, asks) = (SpanKind::Internal, SpanKind::Client);
        assert_eq!(kinds, [inside, asks, inside, asks, asks, SpanKind::Producer]);
        let mut before = batch.time.0;
        for stage in &stages {
            // One after the other, and all within their batch.
            assert!(before <= stage.time.0 && stage.time.0 <= stage.time.1, "{}", stage.name);
            assert!(stage.time.1 <= batch.time.1, "{}", stage.name);
            before = stage.time.1;
        }
        let database = stages.iter().filter(|stage| stage.kind == asks);
        for stage in database {
            assert_eq!(stage.attributes["db.system.name"], "postgresql", "{}", stage.name);
        }
        let publish = &stages[5].attributes;
        assert_eq!(publish["messaging.operation.type"], "send");
        assert_eq!(publish["messaging.destination.name"], "settlement.events");
        for (name, attributes) in &batch.events {
            let counted = attributes.iter().filter(|(_, value)| value.parse::<usize>().is_ok());
            for (what, count) in counted {
                *judged.entry(format!("{name}: {what}")).or_default() += count.parse::<usize>().expect("a number");
            }
            assert!(attributes.contains_key("settlement.batch.id"), "{name}");
        }
    }
    let counted = |what: &str| judged.get(what).copied().unwrap_or_default();
    assert_eq!(counted("batch judged: settlement.settled"), 35, "{judged:?}");
    assert_eq!(counted("batch judged: settlement.rejected"), 1, "{judged:?}");
    assert_eq!(counted("published: settlement.events"), 36, "{judged:?}");
    assert_eq!(counted("published: settlement.dead_letters"), 1, "{judged:?}");

    // The collector's trace is linked to the same origin.
    let collected = receiver.batches("dead", 1).await;
    assert_eq!(collected[0].name, "process settlement.dead");
    assert_eq!(links(&collected), numbers([50]));
    let stages = receiver.under(&collected[0]);
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["load", "decide", "write"]);

    // Context travels on with events and the dead letter, and is in no body.
    let dead = place
        .dead
        .wait("the dead letter", |seen| seen.body == refused.body)
        .await;
    assert_eq!(
        (dead.text("traceparent"), dead.text("tracestate")),
        (Some(parent(50)), Some(state(50)))
    );
    place.rest().await;
    let told = told(&place);
    for (number, message) in (1..).zip(&good) {
        let headers = &told[&("allocation.cleared".to_owned(), nonce(message))];
        assert_eq!(*headers, Some(parent(number)));
    }
    let headers: Vec<_> = odd
        .iter()
        .map(|message| told[&("allocation.cleared".to_owned(), nonce(message))].clone())
        .collect();
    assert_eq!(headers, [None, None, Some(parent(99)), Some(parent(98)), None]);
    let of_refusal = &told[&("update.rejected".to_owned(), String::new())];
    assert_eq!(*of_refusal, Some(parent(50)));
    for seen in place.events.seen() {
        let body = String::from_utf8_lossy(&seen.body).into_owned();
        assert!(!body.contains("trace"), "{body}");
    }

    // What is said while a batch is in hand says in which trace.
    let lines = said(&worker, "batch judged");
    let traces: BTreeMap<&str, &str> = batches
        .iter()
        .map(|batch| (batch.trace.as_str(), batch.id.as_str()))
        .collect();
    let mut of_batches = 0;
    for line in lines.iter().filter(|line| line["from"] == "queue") {
        let (trace, span) = (line["trace_id"].as_str().expect("ids"), line["span_id"].as_str());
        assert_eq!(traces.get(trace).copied(), span, "{line}");
        of_batches += 1;
    }
    assert_eq!(of_batches, batches.len());
    for message in ["worker started", "ready", "traces are exported", "consumer attached"] {
        let lines = said(&worker, message);
        assert!(!lines.is_empty(), "{message}");
        for line in lines {
            assert!(
                line.get("trace_id").is_none() && line.get("span_id").is_none(),
                "{line}"
            );
        }
    }
    for head in receiver.headers() {
        assert_eq!(head.get("api-key").and_then(|key| key.to_str().ok()), Some(key));
    }
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_have_a_bound_and_say_what_is_beyond_it() {
    let (place, partner, reservations) = with_reservations("links", 60).await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    // Two of each trace: one link.
    let messages: Vec<Message> = (0..60_u32)
        .zip(&reservations)
        .map(|(number, reservation)| traced(partner.cleared(reservation), number / 2 + 1))
        .collect();
    place.publish(&messages).await;
    let settings = [
        (ENDPOINT, endpoint.as_str()),
        ("SETTLED_TRACES__LINKS_MAX", "4"),
        SOON,
        ONE_LANE,
    ];
    let worker = place.ready_worker(&settings).await;
    let batches = receiver.batches("queue", messages.len()).await;
    let mut most = 0;
    for batch in &batches {
        let messages = batch.number("messaging.batch.message_count");
        let dropped = usize::try_from(batch.links_dropped).expect("few");
        assert!(
            batch.links.len() <= 4 && batch.links.len() + dropped <= messages,
            "{batch:?}"
        );
        if dropped > 0 {
            assert_eq!(batch.links.len(), 4);
        }
        // One origin in two batches is linked twice, in one once.
        let origins = messages.div_ceil(2);
        assert!(batch.links.len() + dropped <= origins + 1, "{batch:?}");
        most = most.max(dropped);
    }
    assert!(most > 0, "a batch was larger: {batches:?}");
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_tracers_add_has_a_bound_for_each_batch() {
    let (place, partner, reservations) = with_reservations("states", 20).await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    let messages: Vec<Message> = (1..)
        .zip(&reservations)
        .map(|(number, reservation)| traced(partner.cleared(reservation), number))
        .collect();
    place.publish(&messages).await;
    // Room for two of them and a half.
    let room = state(10).len() * 5 / 2;
    let settings = [
        (ENDPOINT, endpoint.as_str()),
        ("SETTLED_TRACES__STATES_MAX", &room.to_string()),
        SOON,
        ONE_LANE,
    ];
    let worker = place.ready_worker(&settings).await;
    let batches = receiver.batches("queue", messages.len()).await;
    for batch in &batches {
        let states: Vec<usize> = batch.links.iter().map(|(_, state)| state.len()).collect();
        let with_state = states.iter().filter(|length| **length > 0).count();
        assert_eq!(with_state, batch.links.len().min(2), "{states:?}");
        assert!(states.iter().sum::<usize>() <= room, "{states:?}");
    }
    let most = batches.iter().map(|batch| batch.links.len()).max();
    assert!(most > Some(2), "a batch was larger: {batches:?}");
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waited_is_linked_to_where_it_came_from() {
    let place = Place::new("waited").await;
    let partner = Partner::new("acme");
    // Any other key: everything of the partner is there but the key it signs with.
    let mut keyless = partner.clone();
    keyless.key = crate::kit::partner::new_key();
    place.register(&keyless).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<_> = (0..4).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations[..3]).await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    let settings = [&COLLECTS[..], &[(ENDPOINT, endpoint.as_str()), SOON, ONE_LANE]].concat();
    let worker = place.ready_worker(&settings).await;
    let refused: Vec<Message> = (1..)
        .zip(&reservations[..3])
        .map(|(number, reservation)| traced(partner.cleared(reservation), number))
        .collect();
    place.publish(&refused).await;
    place.collected(3).await;
    place.add_key(&partner).await;
    let plan = place.json(&["dead-letters", "plan"]).await;
    let plan = plan["plan"].to_string();
    let replay = ["dead-letters", "replay", &plan, "--reason", "the key is there", "--yes"];
    let output = place.run(&replay).await;
    assert!(output.status.success(), "{}", crate::kit::support::said(&output));
    let replayed = receiver.batches("replayed", 3).await;
    assert_eq!(links(&replayed), numbers(1..=3));
    assert_eq!(replayed[0].name, "process settlement.updates");

    // The same of what was parked.
    let early = traced(partner.cleared(&reservations[3]), 7);
    place.publish(std::slice::from_ref(&early)).await;
    place
        .events
        .wait("it is parked", |seen| event(seen)["type"] == "update.parked")
        .await;
    place.reserve(&reservations[3..]).await;
    let parked = receiver.batches("parked", 1).await;
    assert_eq!(links(&parked), numbers([7]));
    place.rest().await;
    let told = told(&place);
    for kind in ["update.parked", "allocation.cleared"] {
        let headers = &told[&(kind.to_owned(), nonce(&early))];
        assert_eq!(*headers, Some(parent(7)), "{kind}");
    }
    for (number, message) in (1..).zip(&refused) {
        let headers = &told[&("allocation.cleared".to_owned(), nonce(message))];
        assert_eq!(*headers, Some(parent(number)));
    }
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_is_away_holds_up_nobody_and_is_told_once() {
    let (place, partner, reservations) = with_reservations("away", 60).await;
    let mut messages = reservations.iter().map(|reservation| partner.cleared(reservation));
    let mut some = || messages.by_ref().take(20).collect::<Vec<Message>>();
    // An address where nobody is.
    let address = Receiver::open(Manner::Takes).await.address;
    let endpoint = format!("http://{address}");
    let settings = [(ENDPOINT, endpoint.as_str()), SOON, ONE_LANE];
    let worker = place.ready_worker(&settings).await;
    let failed = "settled_spans_total{fate=\"failed\"}";
    let seen = async |beyond: u64| {
        until("exports fail", PATIENCE, async || {
            let now = metric(&worker, failed).await;
            (now > beyond).then_some(now)
        })
        .await
    };
    place.publish(&some()).await;
    place.rest().await;
    let before = seen(0).await;
    // One that refuses is away as well, and is not told again.
    let refusing = Receiver::at(address, Manner::Refuses(StatusCode::SERVICE_UNAVAILABLE)).await;
    place.publish(&some()).await;
    place.rest().await;
    seen(before).await;
    until("it was asked", PATIENCE, async || (refusing.asked() > 0).then_some(())).await;
    drop(refusing);
    const REFUSED: &str = "traces can not be exported; nothing else depends on it";
    let refusals = said(&worker, REFUSED);
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert_eq!(
        (&refusals[0]["level"], &refusals[0]["receiver"]),
        (&"WARN".into(), &address.to_string().into())
    );
    assert!(
        refusals[0]["error"]
            .as_str()
            .is_some_and(|error| error.contains("refused")),
        "{refusals:?}"
    );
    assert!(said(&worker, "traces are exported again").is_empty());

    let receiver = Receiver::at(address, Manner::Takes).await;
    place.publish(&some()).await;
    receiver.batches("queue", 20).await;
    until("it is said", PATIENCE, async || {
        (said(&worker, "traces are exported again").len() == 1).then_some(())
    })
    .await;
    assert!(metric(&worker, "settled_spans_total{fate=\"exported\"}").await > 0);
    assert_eq!(said(&worker, REFUSED).len(), 1);
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_hangs_costs_spans_and_nothing_else() {
    let (place, partner, reservations) = with_reservations("hangs", 120).await;
    let receiver = Receiver::open(Manner::Hangs).await;
    let endpoint = receiver.endpoint();
    let settings = [
        (ENDPOINT, endpoint.as_str()),
        ("SETTLED_TRACES__QUEUE_MAX", "4"),
        ("SETTLED_TRACES__EXPORT_MAX", "2"),
        ("SETTLED_TRACES__EXPORT_TIMEOUT", "1s"),
        ("SETTLED_TRACES__FLUSH_DEADLINE", "200ms"),
        // Many batches.
        ("SETTLED_WORKER__BATCH_MAX", "4"),
        SOON,
        ONE_LANE,
    ];
    let worker = place.ready_worker(&settings).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    place.rest().await;
    until("spans are dropped", PATIENCE, async || {
        let dropped = metric(&worker, "settled_spans_total{fate=\"dropped\"}").await;
        let failed = metric(&worker, "settled_spans_total{fate=\"failed\"}").await;
        (dropped > 0 && failed > 0).then_some(())
    })
    .await;
    assert!(receiver.asked() > 0);
    // It ends although an export is under way that never ends by itself.
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_exported_at_a_stop() {
    let (place, partner, reservations) = with_reservations("flush", 10).await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    let settings = [
        (ENDPOINT, endpoint.as_str()),
        ("SETTLED_TRACES__EXPORT_INTERVAL", "5m"),
        ONE_LANE,
    ];
    let worker = place.ready_worker(&settings).await;
    let messages: Vec<Message> = reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect();
    place.publish(&messages).await;
    place.rest().await;
    assert_eq!(receiver.asked(), 0, "it waits for more");
    assert_eq!(worker.terminate().await.code(), Some(0));
    let spans = receiver.spans();
    let batches: Vec<&Told> = spans.iter().filter(|span| span.is_batch()).collect();
    let count: usize = batches
        .iter()
        .map(|batch| batch.number("messaging.batch.message_count"))
        .sum();
    assert_eq!(count, 10);
    for batch in batches {
        assert_eq!(receiver.under(batch).len(), 6);
    }
    place.audit().await;
}

/// Off, sampled away, or asked for in a way that is not spoken: nothing is exported, no line has ids, and all settles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_traced_that_is_not_asked_for() {
    let (place, partner) = with_partner("untraced", "1000000").await;
    let receiver = Receiver::open(Manner::Takes).await;
    let endpoint = receiver.endpoint();
    let secret = "api-key=a-key-that-stays-here";
    secrets::password("a-key-that-stays-here");
    let here = (ENDPOINT, endpoint.as_str());
    for (variables, off) in [
        (&[][..], None),
        (&[here, ("OTEL_SDK_DISABLED", "true")], None),
        (
            &[
                here,
                ("OTEL_TRACES_SAMPLER", "traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", "0"),
            ],
            None,
        ),
        (
            &[here, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            Some("OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf"),
        ),
        (
            &[
                (ENDPOINT, "http://collector.invalid:4318"),
                ("OTEL_EXPORTER_OTLP_HEADERS", secret),
            ],
            Some("would leave in the clear"),
        ),
        (
            &[here, ("SETTLED_TRACES__CA_FILE", "/nowhere/ca.pem")],
            Some("/nowhere/ca.pem"),
        ),
    ] {
        let reservation = partner.allocation("BTC", "1");
        place.reserve(std::slice::from_ref(&reservation)).await;
        let worker = place.ready_worker(&[variables, &[SOON]].concat()).await;
        let message = traced(partner.cleared(&reservation), 1);
        place.publish(std::slice::from_ref(&message)).await;
        place.rest().await;
        assert_eq!(worker.terminate().await.code(), Some(0));
        let told = told(&place);
        let headers = &told[&("allocation.cleared".to_owned(), nonce(&message))];
        assert_eq!(*headers, Some(parent(1)), "{variables:?}");
        for line in worker.lines() {
            assert!(line.get("trace_id").is_none(), "{variables:?}: {line}");
        }
        let lines = said(&worker, "no traces are exported; nothing else depends on it");
        let why = lines.first().and_then(|line| line["why"].as_str());
        assert_eq!(lines.len(), usize::from(off.is_some()), "{variables:?}: {lines:?}");
        if let Some(off) = off {
            assert!(why.is_some_and(|why| why.contains(off)), "{variables:?}: {why:?}");
        }
    }
    assert_eq!(receiver.asked(), 0);
    place.audit().await;
}

/// Over TLS, to a receiver that an authority of one's own vouches for, and to no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_may_speak_tls() {
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => return skip("traces::a_receiver_may_speak_tls", &why),
    };
    let (place, partner) = with_partner("sealed_traces", "1000000").await;
    let receiver = Receiver::open(Manner::Takes).await;
    let (certificate, key) = (
        certificates.file("good-server.pem"),
        certificates.file("good-server.key"),
    );
    let front = Front::open(receiver.address.to_string(), &certificate, &key).await;
    let endpoint = format!("https://localhost:{}", front.address.port());
    for (authority, is_trusted) in [("good.pem", true), ("other.pem", false)] {
        let reservation = partner.allocation("BTC", "1");
        place.reserve(std::slice::from_ref(&reservation)).await;
        let asked = receiver.asked();
        let authority = certificates.name(authority);
        let settings = [
            (ENDPOINT, endpoint.as_str()),
            ("SETTLED_TRACES__CA_FILE", &authority),
            SOON,
        ];
        let worker = place.ready_worker(&settings).await;
        place.publish(&[partner.cleared(&reservation)]).await;
        place.rest().await;
        if is_trusted {
            receiver.batches("queue", 1).await;
        } else {
            until("it is said", PATIENCE, async || {
                let lines = said(&worker, "traces can not be exported; nothing else depends on it");
                let error = lines.first().and_then(|line| line["error"].as_str());
                error.is_some_and(|error| error.contains("no TLS")).then_some(())
            })
            .await;
            assert_eq!(receiver.asked(), asked);
        }
        assert_eq!(worker.terminate().await.code(), Some(0));
    }
    place.audit().await;
}
