//! What one partner's flood costs another: the time from publication to event of a partner that sends a hundred messages a
//! second, before and while another sends fifty thousand at once. Measurements, not tests of the suite, since a busy machine
//! proves nothing; each says what it measured.
//!
//! `cargo test --profile demo --features faults --test it -- --ignored --exact --nocapture cases::flood::of_malformed_messages` with
//! the services' URLs set. [docs/evidence/flood.txt](../../docs/evidence/flood.txt) is what they said.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions},
    types::FieldTable,
};
use serde_json::Value;

use crate::kit::{
    amqp::{Line, Message},
    auditor::Expect,
    partner::Partner,
    support::{Ground, Worker, said, until},
};

const FLOOD: usize = 50_000;
/// Messages a second of the one who keeps still.
const RATE: f64 = 100.0;
const WARM_UP: Duration = Duration::from_secs(3);
const QUIET: Duration = Duration::from_secs(10);
const FLOODED: Duration = Duration::from_secs(20);
/// Messages of the flood that are published and not confirmed, at most.
const UNCONFIRMED: usize = 2_000;

async fn succeed(ground: &Ground, arguments: &[&str], stdin: &str) {
    let output = ground.run_with(arguments, stdin).await;
    assert!(
        output.status.success(),
        "settled {}: {}",
        arguments.join(" "),
        said(&output)
    );
}

async fn register(ground: &Ground, partner: &Partner, flags: &[&str]) {
    let enterprise = partner.enterprise.as_str();
    let add = ["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"];
    succeed(ground, &[&add, flags].concat(), "").await;
    let key = partner.public_key();
    let add = ["key", "add", "--enterprise-id", enterprise, "--public-key", &key];
    succeed(ground, &add, "").await;
    let (connection, client) = (partner.connection.to_string(), partner.client.to_string());
    let names = (partner.partners_client.as_str(), partner.partners_connection.as_str());
    let add = [
        "connection",
        "add",
        "--connection-id",
        &connection,
        "--enterprise-id",
        enterprise,
    ];
    let add = [
        &add[..],
        &[
            "--client-id",
            &client,
            "--partners-client-id",
            names.0,
            "--partners-connection-id",
            names.1,
        ],
    ];
    succeed(ground, &add.concat(), "").await;
    let fund = [
        "deposit",
        "--client-id",
        &client,
        "--currency",
        "BTC",
        "--quantity",
        "1000000000000",
    ];
    succeed(ground, &[&fund[..], &["--reference", "first"]].concat(), "").await;
}

/// Reserved, and what the partner says of each: `cleared`.
async fn settling(ground: &Ground, partner: &Partner, count: usize) -> Vec<Message> {
    let reservations: Vec<_> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    for lot in reservations.chunks(5_000) {
        let lines: String = lot.iter().map(|reservation| reservation.line() + "\n").collect();
        succeed(ground, &["allocation", "reserve", "--json"], &lines).await;
    }
    reservations
        .iter()
        .map(|reservation| partner.cleared(reservation))
        .collect()
}

fn nonce(message: &[u8]) -> String {
    let body: Value = serde_json::from_slice(message).expect("JSON");
    let nonce = body.get("nonce").or_else(|| body["data"].get("nonce"));
    nonce.and_then(Value::as_str).expect("a nonce").to_owned()
}

/// Publishes everything as fast as the broker confirms.
async fn pour(url: &str, messages: Vec<Message>) {
    let connection = Connection::connect(url, ConnectionProperties::default())
        .await
        .expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    let confirms = channel.confirm_select(ConfirmSelectOptions { nowait: false });
    confirms.await.expect("confirms");
    let mut unconfirmed = VecDeque::new();
    for message in messages {
        if unconfirmed.len() >= UNCONFIRMED {
            let first: lapin::PublisherConfirm = unconfirmed.pop_front().expect("one");
            first.await.expect("confirmed");
        }
        let options = BasicPublishOptions {
            mandatory: true,
            immediate: false,
        };
        let (exchange, key) = (message.exchange.as_str().into(), message.routing_key.as_str().into());
        let published = channel
            .basic_publish(exchange, key, options, &message.body, message.properties)
            .await;
        unconfirmed.push_back(published.expect("published"));
    }
    for confirm in unconfirmed {
        confirm.await.expect("confirmed");
    }
    connection.close(200, "done".into()).await.expect("closed");
}

fn per_mille(sorted: &[f64], per_mille: usize) -> f64 {
    let place = (sorted.len() * per_mille).div_ceil(1_000).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

fn told(what: &str, mut milliseconds: Vec<f64>) -> f64 {
    milliseconds.sort_by(f64::total_cmp);
    let p99 = per_mille(&milliseconds, 990);
    println!(
        "{what}: {} messages, p50 {:.1} ms, p99 {p99:.1} ms, most {:.1} ms",
        milliseconds.len(),
        per_mille(&milliseconds, 500),
        per_mille(&milliseconds, 1_000),
    );
    p99
}

/// Who keeps still sends at its rate all the while; the flood comes after a while.
async fn measure(ground: &Ground, still: &Partner, flood: Vec<Message>, locking: Option<String>) {
    let seconds = (WARM_UP + QUIET + FLOODED).as_secs_f64();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive number"
    )]
    let count = (seconds * RATE) as usize;
    let messages = settling(ground, still, count).await;
    let numbers: HashMap<String, usize> = messages.iter().enumerate().map(|(n, m)| (nonce(&m.body), n)).collect();
    let line = Line::open(&ground.broker_url).await;
    line.bind("test.still", "settlement.events", &format!("*.*.{}", still.enterprise))
        .await;
    let worker = ground.ready_worker(&[("SETTLED_LOG__LEVEL", "info")]).await;
    // Every own queue has its consumer.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let begin = Instant::now() + Duration::from_millis(100);
    let due = move |number: usize| begin + Duration::from_secs_f64(number as f64 / RATE);
    let url = ground.broker_url.clone();
    let received = tokio::spawn(async move {
        let connection = Connection::connect(&url, ConnectionProperties::default())
            .await
            .expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        channel
            .basic_qos(1_000, BasicQosOptions { global: false })
            .await
            .expect("qos");
        let options = BasicConsumeOptions {
            no_local: false,
            no_ack: false,
            exclusive: false,
            nowait: false,
        };
        let consuming = channel.basic_consume("test.still".into(), "".into(), options, FieldTable::default());
        let mut consumer = consuming.await.expect("a consumer");
        let mut at: Vec<Option<Instant>> = vec![None; count];
        let mut left = count;
        while left > 0 {
            let next = tokio::time::timeout(Duration::from_secs(120), consumer.next()).await;
            let event = next.expect("in time").expect("an event").expect("a delivery");
            let now = Instant::now();
            event
                .acker
                .ack(BasicAckOptions { multiple: false })
                .await
                .expect("acknowledged");
            let number = numbers[&nonce(&event.data)];
            if at[number].replace(now).is_none() {
                left -= 1;
            }
        }
        at
    });
    let url = ground.broker_url.clone();
    let runtime = tokio::runtime::Handle::current();
    let sending = std::thread::spawn(move || {
        let connection = runtime.block_on(Connection::connect(&url, ConnectionProperties::default()));
        let connection = connection.expect("a connection");
        let channel = runtime.block_on(connection.create_channel()).expect("a channel");
        for (number, message) in messages.into_iter().enumerate() {
            std::thread::sleep(due(number).saturating_duration_since(Instant::now()));
            let options = BasicPublishOptions {
                mandatory: true,
                immediate: false,
            };
            let (exchange, key) = (message.exchange.as_str().into(), message.routing_key.as_str().into());
            let published = channel.basic_publish(exchange, key, options, &message.body, message.properties);
            runtime.block_on(published).expect("published");
        }
        (connection, channel)
    });

    let flood_at = begin + WARM_UP + QUIET;
    tokio::time::sleep_until(flood_at.into()).await;
    // What goes to a queue of the test's own is nothing to the worker.
    let total = flood.iter().filter(|message| !message.exchange.is_empty()).count();
    let size = flood.len();
    let custody = ground.db().await;
    if let Some(sql) = &locking {
        custody.batch_execute(&format!("BEGIN; {sql}")).await.expect("locked");
    }
    pour(&ground.broker_url, flood).await;
    let poured = flood_at.elapsed();
    if locking.is_some() {
        tokio::time::sleep_until((flood_at + FLOODED).into()).await;
        custody.batch_execute("ROLLBACK").await.expect("let go");
    }
    let db = ground.db().await;
    let judged = until("the flood is judged", Duration::from_secs(300), async || {
        let sql = "SELECT coalesce(sum(received), 0)::bigint FROM settled.batches";
        let row = db.query_one(sql, &[]).await.expect("batches");
        let judged = usize::try_from(row.get::<_, i64>(0)).expect("a count");
        let sent = flood_at.elapsed() + WARM_UP + QUIET;
        // Those of the other are a hundred a second, and hardly any of them waits.
        let others = (sent.as_secs_f64() * RATE - 50.0).min(count as f64 - 1.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small and positive"
        )]
        let others = others as usize;
        (judged >= total + others).then(|| flood_at.elapsed())
    })
    .await;
    let at = received.await.expect("every message has its event");
    drop(sending.join().expect("sent"));
    let between = |from: Duration, until: Duration| {
        at.iter()
            .enumerate()
            .filter(|(number, _)| (begin + from..begin + until).contains(&due(*number)))
            .map(|(number, at)| at.expect("received").duration_since(due(number)).as_secs_f64() * 1e3)
            .collect::<Vec<f64>>()
    };
    let start = WARM_UP + QUIET;
    println!("{size} messages poured in {poured:.2?}, judged after {judged:.2?}");
    let quiet = told("quiet               ", between(WARM_UP, start));
    told("while it was poured ", between(start, start + poured));
    let flooded = told("20 s from its start ", between(start, start + FLOODED));
    println!("p99 of 20 s against quiet: {:.1} times", flooded / quiet);
    stop(worker).await;
}

async fn stop(worker: Worker) {
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
}

async fn ground(test: &str) -> Ground {
    let ground = Ground::new(test).await;
    ground.copy_template().await;
    succeed(&ground, &["topology"], "").await;
    ground
}

fn malformed(enterprise: impl Fn(usize) -> String) -> Vec<Message> {
    (0..FLOOD)
        .map(|number| {
            let key = format!("{}.allocation.update", enterprise(number));
            Message::new(&key, format!("no JSON {number} {}", "x".repeat(200)), Expect::Any)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_malformed_messages() {
    let ground = ground("flood_malformed").await;
    let (still, loud) = (Partner::new("still"), Partner::new("loud"));
    register(&ground, &still, &[]).await;
    register(&ground, &loud, &[]).await;
    measure(&ground, &still, malformed(|_| "loud".to_owned()), None).await;
}

/// The control: the same flood goes to a queue that no worker reads. What it costs the one who keeps still is the price of
/// the broker and the machine, whatever the worker does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_messages_that_no_worker_reads() {
    let ground = ground("flood_unread").await;
    let still = Partner::new("still");
    register(&ground, &still, &[]).await;
    Line::open(&ground.broker_url).await.declare("test.unread").await;
    let mut flood = malformed(|_| "loud".to_owned());
    for message in &mut flood {
        message.exchange = String::new();
        message.routing_key = "test.unread".to_owned();
    }
    measure(&ground, &still, flood, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_malformed_messages_in_own_queues() {
    let ground = ground("flood_own").await;
    let (still, loud) = (Partner::new("still"), Partner::new("loud"));
    register(&ground, &still, &["--own-queue"]).await;
    register(&ground, &loud, &["--own-queue"]).await;
    measure(&ground, &still, malformed(|_| "loud".to_owned()), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_valid_messages() {
    let ground = ground("flood_valid").await;
    let (still, loud) = (Partner::new("still"), Partner::new("loud"));
    register(&ground, &still, &[]).await;
    register(&ground, &loud, &[]).await;
    let flood = settling(&ground, &loud, FLOOD).await;
    measure(&ground, &still, flood, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_strangers() {
    let ground = ground("flood_strangers").await;
    let still = Partner::new("still");
    register(&ground, &still, &[]).await;
    measure(&ground, &still, malformed(|number| format!("nobody-{number}")), None).await;
}

/// A custody transaction that stays open for twenty seconds after it reserved, while its partner's messages come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it by name, on a quiet machine"]
async fn of_messages_whose_accounts_are_locked() {
    let ground = ground("flood_locked").await;
    let (still, loud) = (Partner::new("still"), Partner::new("loud"));
    register(&ground, &still, &[]).await;
    register(&ground, &loud, &[]).await;
    let flood = settling(&ground, &loud, 1_000).await;
    let sql = format!(
        "SELECT * FROM settled.reserve('[{}]')",
        loud.allocation("BTC", "1").line()
    );
    measure(&ground, &still, flood, Some(sql)).await;
}
