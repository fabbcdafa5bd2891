//! Messages whose properties strike below our own code: they must take nobody with them.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::json;

use crate::kit::{
    amqp::Message,
    auditor::{self, Expect, Observed, Reservation},
    partner::Partner,
    raw::{CONTENT_TYPE, DELIVERY_MODE, HEADERS, MESSAGE_ID, Raw, TOO_DEEP, UNDECODABLE, nested, short},
    support::{Ground, LEAVE_DEAD_LETTERS, PATIENCE, Place, Worker, until},
};

/// Low, so that a message that is in the wrong hands too often shows.
const DELIVERY_LIMIT: u32 = 3;

/// Properties that are hard on whoever reads them.
pub(crate) struct Poison {
    flags: u16,
    properties: Vec<u8>,
    /// What must be found of them in the dead letter.
    mark: Vec<u8>,
    /// Whether the dead letter holds the whole list as text.
    as_text: bool,
}

impl Poison {
    /// The client library can not decode the property behind the others: it says so with an error.
    pub(crate) fn undecodable_behind() -> Self {
        let mark = short(UNDECODABLE);
        Self {
            flags: DELIVERY_MODE | MESSAGE_ID,
            properties: [&[2], mark.as_slice()].concat(),
            mark,
            as_text: true,
        }
    }

    /// The same of the property before the others.
    pub(crate) fn undecodable_before() -> Self {
        let mark = short(UNDECODABLE);
        Self {
            flags: CONTENT_TYPE | DELIVERY_MODE,
            properties: [mark.as_slice(), &[2]].concat(),
            mark,
            as_text: true,
        }
    }

    /// Headers deeper than we walk, and no deeper than any reader can stand.
    pub(crate) fn nested_headers() -> Self {
        let table = nested(TOO_DEEP);
        Self {
            flags: HEADERS | DELIVERY_MODE,
            properties: [table.as_slice(), &[2]].concat(),
            // The broker adds its own headers to the table; the nested one in it stays.
            mark: table.get(4..).expect("a length stands before it").to_vec(),
            as_text: false,
        }
    }

    pub(crate) async fn publish(&self, raw: &mut Raw, exchange: &str, key: &str, body: &[u8]) {
        raw.publish(exchange, key, self.flags, &self.properties, body).await;
    }
}

/// A low delivery limit for the queues of this place whose names fit.
pub(crate) async fn limit_deliveries(ground: &Ground, queues: &str) {
    let policy = json!({
        "pattern": queues,
        "definition": {"delivery-limit": DELIVERY_LIMIT},
        "apply-to": "queues",
    });
    let path = format!("/api/policies/{}/limit", ground.name);
    let (status, answer) = ground.services.manage("PUT", &path, Some(policy)).await;
    assert_eq!(status, 201, "{answer}");
}

/// A place whose dead letters stay in their queue.
async fn place(test: &str) -> (Place, Partner, Vec<Reservation>) {
    let ground = Ground::new(test).await;
    limit_deliveries(&ground, "^settlement\\.updates$").await;
    let place = Place::on(ground).await;
    place.line().delete("test.dead").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..100).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    (place, partner, reservations)
}

/// Waits until the innocents are settled and the poison is among the dead letters; a worker that it killed is started
/// again, as a service manager would.
async fn outlive(place: &Place, mut worker: Worker, innocents: i64) -> (Worker, u32) {
    let db = place.db().await;
    let mut deaths = 0;
    let mut state = String::new();
    let began = std::time::Instant::now();
    loop {
        if let Some(status) = worker.ended() {
            deaths += 1;
            assert!(
                deaths <= 2 * DELIVERY_LIMIT,
                "it dies again and again ({status}): {}",
                worker.said()
            );
            worker = place.worker(&SETTINGS);
        }
        let sql = "SELECT count(*) FROM settled.allocations WHERE status <> 'reserved'";
        let settled: i64 = db.query_one(sql, &[]).await.expect("allocations").get(0);
        let (waiting, dead) = (
            place.line().depth("settlement.updates").await,
            place.line().depth("settlement.dead").await,
        );
        if settled == innocents && dead >= 1 && waiting == 0 {
            assert_eq!(dead, 1, "innocents among the dead letters");
            return (worker, deaths);
        }
        assert!(began.elapsed() < PATIENCE, "{state}");
        state = format!("{settled} of {innocents} innocents settled, {waiting} waiting, {dead} dead");
        tokio::task::yield_now().await;
    }
}

const SETTINGS: [(&str, &str); 4] = [
    LEAVE_DEAD_LETTERS,
    ("SETTLED_RETRY__INITIAL", "10ms"),
    ("SETTLED_RETRY__MAX", "100ms"),
    ("SETTLED_WORKER__PREFETCH", "100"),
];

/// Innocents before and behind the poison, in the queue before the worker comes and again while it works at full pace.
/// Returns how often the worker died.
async fn survives(test: &str, poison: &Poison, judged: Option<&str>) -> u32 {
    let (place, partner, reservations) = place(test).await;
    let body = b"the poison";
    let cleared = |reservations: &[Reservation]| -> Vec<Message> {
        reservations
            .iter()
            .map(|reservation| partner.cleared(reservation))
            .collect()
    };
    let mut raw = Raw::open(&place.broker_url).await;
    let mut publish = async || {
        poison
            .publish(&mut raw, "settlement.updates", "acme.allocation.update", body)
            .await;
    };
    place.publish(&cleared(&reservations[..20])).await;
    publish().await;
    place.publish(&cleared(&reservations[20..40])).await;
    let (worker, mut deaths) = outlive(&place, place.worker(&SETTINGS), 40).await;

    let (header, found) = Raw::open(&place.broker_url)
        .await
        .get("settlement.dead")
        .await
        .expect("the poison");
    assert_eq!(found, body, "byte for byte");
    let kept = if poison.as_text {
        let (_, rest) = String::from_utf8_lossy(&header)
            .split_once("settled-origin-propertiesS")
            .map(|(before, rest)| (before.to_owned(), rest.to_owned()))
            .expect("the list as text");
        let text: String = rest
            .chars()
            .skip(4)
            .take_while(|letter| letter.is_ascii_graphic())
            .collect();
        // The next header's name may begin like more of it.
        let whole = [&poison.flags.to_be_bytes()[..], &poison.properties].concat();
        text.starts_with(&BASE64_STANDARD.encode(&whole))
    } else {
        header.windows(poison.mark.len()).any(|window| window == poison.mark)
    };
    // Headers that are what is too large are left out.
    assert_eq!(
        kept,
        judged != Some("message_too_large"),
        "with the properties that it came with"
    );

    worker.ready().await;
    place.publish(&cleared(&reservations[40..70])).await;
    publish().await;
    place.publish(&cleared(&reservations[70..])).await;
    let (worker, more) = outlive(&place, worker, 100).await;
    deaths += more;
    until("its events are out", PATIENCE, async || {
        let row = place
            .db()
            .await
            .query_one("SELECT count(*) FROM settled.outbox", &[])
            .await;
        (row.expect("outbox").get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let lost = worker
        .said()
        .lines()
        .filter(|line| line.contains("consumer lost"))
        .count();
    assert_eq!(lost, 0, "connections lost to two poisons: {}", worker.said());
    assert_eq!(worker.terminate().await.code(), Some(0));

    // The innocents' books; the poison is no part of them but for what was told of it.
    place.events.catch_up(place.line()).await;
    let mut events = place.events.seen();
    let before = events.len();
    let id = judged.map(|reason| {
        let digest = hex::encode(auditor::sha256(body));
        auditor::event_id(&format!("update.rejected|acme.allocation.update|{digest}|{reason}"))
    });
    events.retain(|seen| seen.message_id() != id.as_deref());
    assert_eq!(before > events.len(), judged.is_some(), "whether the poison was judged");
    let story = place.story().clone();
    assert!(story.sent.iter().all(|sent| sent.expect == Expect::Settles));
    let observed = Observed {
        events,
        ..Observed::default()
    };
    let problems = auditor::audit(&place.db().await, &story, &observed).await;
    assert!(problems.is_empty(), "the auditor found:\n{}", problems.join("\n"));
    deaths
}

/// It is judged like any other message, and costs nobody a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_property_behind_the_others_that_can_not_be_decoded() {
    let deaths = survives(
        "poison_behind",
        &Poison::undecodable_behind(),
        Some("malformed_message"),
    )
    .await;
    assert_eq!(deaths, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_property_before_the_others_that_can_not_be_decoded() {
    let deaths = survives(
        "poison_before",
        &Poison::undecodable_before(),
        Some("malformed_message"),
    )
    .await;
    assert_eq!(deaths, 0);
}

/// They are read, and are too large by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_nested_deeper_than_we_walk() {
    let deaths = survives("poison_deep", &Poison::nested_headers(), Some("message_too_large")).await;
    assert_eq!(deaths, 0);
}

/// Only a process's start can size the threads of the client library: the worker starts itself again with room for any frame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_are_started_with_a_larger_stack() {
    let (place, _, _) = place("poison_stack").await;
    let worker = place.ready_worker(&SETTINGS).await;
    let id = worker.id().expect("it runs");
    let environment = std::fs::read(format!("/proc/{id}/environ")).expect("a process of ours");
    let mut variables = environment.split(|byte| *byte == 0);
    let stack = variables.find_map(|variable| variable.strip_prefix(b"RUST_MIN_STACK="));
    let stack: usize = std::str::from_utf8(stack.expect("the variable"))
        .expect("a number")
        .parse()
        .expect("a number");
    assert!(stack >= 128 << 20, "{stack}");
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// How long others wait under a poison a second, against a quiet queue: docs/evidence/poison.txt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement of a minute"]
async fn what_a_poison_a_second_costs_the_others() {
    const SAMPLES: usize = 400;
    let place = Place::new("poison_second").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..2 * SAMPLES + 20).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let settle = async |reservation: &Reservation| {
        let began = std::time::Instant::now();
        place.publish(&[partner.cleared(reservation)]).await;
        let subject = format!("\"subject\":\"{}\"", reservation.id).into_bytes();
        while !place.events.has(&subject) {
            assert!(began.elapsed() < PATIENCE);
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        began.elapsed()
    };
    let (warm, rest) = reservations.split_at(20);
    for reservation in warm {
        settle(reservation).await;
    }
    let (quiet, poisoned) = rest.split_at(SAMPLES);
    let mut worst = Vec::new();
    for (name, reservations, is_poisoned) in [("quiet", quiet, false), ("a poison a second", poisoned, true)] {
        let url = place.broker_url.clone();
        let poisoning = crate::kit::support::Beside::spawn(async move {
            let mut raw = Raw::open(&url).await;
            let mut ticks = tokio::time::interval(std::time::Duration::from_secs(1));
            for number in 0_u32.. {
                ticks.tick().await;
                if is_poisoned {
                    let body = format!("poison {number}");
                    let key = "evil.allocation.update";
                    let poison = Poison::undecodable_before();
                    poison
                        .publish(&mut raw, "settlement.updates", key, body.as_bytes())
                        .await;
                }
            }
        });
        let mut took = Vec::new();
        for reservation in reservations {
            took.push(settle(reservation).await);
            // Long enough for many poisons.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        drop(poisoning);
        took.sort_unstable();
        let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
        println!(
            "{name}: {} messages, p50 {:?}, p99 {:?}, worst {:?}",
            took.len(),
            at(50),
            at(99),
            at(100)
        );
        worst.push(at(99));
    }
    let poisons: i64 = place
        .db()
        .await
        .query_one(
            "SELECT count(*) FROM settled.dead_letters WHERE reason = 'malformed_message'",
            &[],
        )
        .await
        .expect("dead letters")
        .get(0);
    let lost = worker
        .said()
        .lines()
        .filter(|line| line.contains("consumer lost"))
        .count();
    println!(
        "{poisons} poisons, {lost} connections lost, p99 {:.2} times the quiet one",
        worst[1].as_secs_f64() / worst[0].as_secs_f64()
    );
    assert!(poisons >= 15, "{poisons}");
    assert_eq!(lost, 0);
    assert!(worst[1] < 5 * worst[0], "{worst:?}");
    assert_eq!(worker.terminate().await.code(), Some(0));
}
