use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::broker::BrokerSettings;
use crate::broker::publisher::{BrokerAnswer, Publisher};
use crate::broker::testing::{self, Vhost, delete_queue, event, eventually, numbered, quorum_queue, ready, soon, tag};
use crate::config::Secret;
use crate::domain::delivery::{Bytes, HeaderValue};

fn body(delivery: &Delivery) -> String {
    String::from_utf8(delivery.body.clone()).expect("text")
}

async fn fill(connection: &Connection, queue: &str, bodies: impl IntoIterator<Item = String>) {
    let mut publisher = Publisher::open(connection).await.expect("a publisher");
    let sent: Vec<_> = bodies.into_iter().map(|body| event("", queue, &body)).collect();
    let fates = soon(publisher.publish(&sent)).await.expect("published");
    assert!(fates.iter().all(|fate| *fate == BrokerAnswer::Confirmed));
}

/// This many messages, however they come.
async fn take(intake: &mut Intake, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.extend(soon(intake.next()).await.expect("a batch").deliveries);
    }
    assert_eq!(taken.len(), count);
    taken
}

#[tokio::test]
async fn a_batch_has_what_is_there_within_its_bounds() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..40)).await;
    let mut intake = Intake::attach(&connection, "q", 100, 7, 1 << 20)
        .await
        .expect("attached");
    let mut sizes = Vec::new();
    let mut bodies = Vec::new();
    let first = soon(intake.next()).await.expect("a batch");
    bodies.extend(first.deliveries.iter().map(body));
    // Prefetch 100 now: the rest comes by itself.
    eventually("all handed out", async || {
        (ready(&connection, "q").await == 0).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    while bodies.len() < 40 {
        let batch = soon(intake.next()).await.expect("a batch");
        sizes.push(batch.deliveries.len());
        bodies.extend(batch.deliveries.iter().map(body));
    }
    assert_eq!(bodies, numbered(0..40).collect::<Vec<_>>());
    assert!(
        sizes.iter().all(|size| (1..=7).contains(size)) && sizes.contains(&7),
        "{sizes:?}"
    );
    // Empty now: it waits, and a dropped wait costs nothing.
    let waiting = tokio::time::timeout(Duration::from_millis(50), intake.next()).await;
    assert!(waiting.is_err());
    intake.release().await.expect("released");

    let mut intake = Intake::attach(&connection, "q", 100, 100, 1).await.expect("attached");
    let batch = soon(intake.next()).await.expect("a batch");
    assert_eq!(batch.deliveries.len(), 1, "larger than the bound, and still handed out");
    intake.release().await.expect("released");
    for (prefetch, batch_max) in [(0, 1), (1, 0)] {
        let refused = Intake::attach(&connection, "q", prefetch, batch_max, 1).await;
        assert!(matches!(refused, Err(BrokerError::Config(_))));
    }
    let missing = Intake::attach(&connection, "missing", 1, 1, 1).await.map(drop);
    assert_eq!(missing.map_err(|error| error.code()), Err(Some(404)));
}

/// The message that is in hand while the consumers change counts too.
#[tokio::test]
async fn no_more_is_out_than_the_prefetch() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    for prefetch in [1, 2, 5] {
        let queue = format!("q{prefetch}");
        quorum_queue(&connection, &queue, 50).await;
        fill(&connection, &queue, numbered(0..20)).await;
        let mut intake = Intake::attach(&connection, &queue, prefetch, 1, 1 << 20)
            .await
            .expect("attached");
        let taken = take(&mut intake, usize::from(prefetch)).await;
        // What comes now would have come before this confirm, were there room.
        fill(&connection, &queue, numbered(20..21)).await;
        assert_eq!(ready(&connection, &queue).await, 21 - u32::from(prefetch));
        let last = taken.iter().map(tag).max();
        intake.disposer().acknowledge(last).await.expect("acknowledged");
        take(&mut intake, 1).await;
        intake.release().await.expect("released");
    }
}

#[tokio::test]
async fn bytes_bound_a_batch_too() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", (0..30).map(|index| format!("{index:0>200}"))).await;
    let mut intake = Intake::attach(&connection, "q", 100, 100, 1_100)
        .await
        .expect("attached");
    let mut bodies = Vec::new();
    while bodies.len() < 30 {
        let batch = soon(intake.next()).await.expect("a batch");
        assert!(
            batch.deliveries.len() <= 2,
            "a body and its message id are 400 bytes and more: {}",
            batch.deliveries.len()
        );
        bodies.extend(batch.deliveries.iter().map(body));
    }
    assert!(bodies.is_sorted());
}

/// From prefetch 1 to the full one, while another task acknowledges: each message once.
#[tokio::test(flavor = "multi_thread")]
async fn redelivered_messages_come_one_by_one_until_a_fresh_one() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..50)).await;
    let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
        .await
        .expect("attached");
    take(&mut intake, 50).await;
    intake.release().await.expect("released");
    fill(&connection, "q", numbered(50..300)).await;

    let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
        .await
        .expect("attached");
    let disposer = intake.disposer();
    let (sender, mut batches) = tokio::sync::mpsc::channel::<Deliveries>(1);
    let settle = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(batch) = batches.recv().await {
            let last = batch.deliveries.iter().map(tag).max();
            disposer.acknowledge(last).await.expect("acknowledged");
            seen.extend(batch.deliveries.iter().map(body));
        }
        seen
    });
    let (mut redelivered, mut count) = (0, 0);
    while count < 300 {
        let batch = soon(intake.next()).await.expect("a batch");
        count += batch.deliveries.len();
        if batch.deliveries.iter().any(|delivery| delivery.redelivered) {
            assert_eq!(batch.deliveries.len(), 1);
            redelivered += 1;
        }
        sender.send(batch).await.expect("settling");
    }
    drop(sender);
    let mut seen = settle.await.expect("settled");
    assert_eq!(redelivered, 50);
    // Released ones come back in an order of the broker's choosing.
    seen.sort_unstable();
    assert_eq!(seen, numbered(0..300).collect::<Vec<_>>());
    intake.release().await.expect("released");
    assert_eq!(ready(&connection, "q").await, 0);
}

#[tokio::test]
async fn a_dropped_wait_loses_nothing() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..20)).await;
    // Long enough to get somewhere, too short to finish a step: the switch of prefetch above all.
    for patience in [0, 50, 200, 500, 1_000] {
        let mut intake = Intake::attach(&connection, "q", 5, 3, 1 << 20).await.expect("attached");
        let mut seen = Vec::new();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while seen.len() < 20 {
            let waiting = tokio::time::timeout(Duration::from_micros(patience), intake.next());
            if let Ok(batch) = waiting.await {
                let batch = batch.expect("a batch");
                intake
                    .disposer()
                    .acknowledge(batch.deliveries.iter().map(tag).max())
                    .await
                    .expect("acknowledged");
                seen.extend(batch.deliveries.iter().map(body));
            }
            tokio::task::yield_now().await;
            assert!(tokio::time::Instant::now() < deadline, "{seen:?}");
        }
        assert_eq!(seen, numbered(0..20).collect::<Vec<_>>());
        intake.release().await.expect("released");
        fill(&connection, "q", numbered(0..20)).await;
    }
}

#[tokio::test]
async fn what_is_acknowledged_goes_up_to_its_tag_and_no_further() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..6)).await;
    let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
        .await
        .expect("attached");
    let disposer = intake.disposer();
    let taken = take(&mut intake, 6).await;
    // The next batch is already here when this one is acknowledged.
    fill(&connection, "q", numbered(6..7)).await;
    take(&mut intake, 1).await;
    soon(disposer.acknowledge(None)).await.expect("nothing to do");
    soon(disposer.acknowledge(taken.iter().map(tag).max()))
        .await
        .expect("acknowledged");
    intake.release().await.expect("released");
    eventually("the rest is back", async || {
        (ready(&connection, "q").await == 1).then_some(())
    })
    .await;
    assert_eq!(ready(&connection, "q.dead").await, 0, "nothing is dead-lettered");
}

#[tokio::test]
async fn a_tag_settled_twice_is_an_error_not_a_silence() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..2)).await;
    let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
        .await
        .expect("attached");
    take(&mut intake, 2).await;
    let disposer = intake.disposer();
    soon(disposer.acknowledge(Some(2))).await.expect("acknowledged");
    // The broker answers this by closing the channel, which the intake learns.
    assert_eq!(soon(disposer.acknowledge(Some(2))).await, Ok(()));
    let end = soon(intake.next()).await.expect_err("ended");
    assert!(
        matches!(&end, IntakeEnd::Away(error) if error.code() == Some(406)),
        "{end}"
    );
    assert_eq!(soon(intake.next()).await.expect_err("still"), end);
    assert!(soon(disposer.acknowledge(Some(3))).await.is_err());
}

#[tokio::test]
async fn lingering_it_takes_what_comes_meanwhile_and_no_longer_than_until_the_batch_is_full() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    let attached = Intake::attach(&connection, "q", 50, 10, 1 << 20)
        .await
        .expect("attached");
    // Longer than `soon` waits: only a full batch ends it.
    let mut intake = attached.lingering(Duration::from_secs(3_600));
    let publishing = async {
        for number in 0..12 {
            fill(&connection, "q", numbered(number..number + 1)).await;
        }
    };
    let (full, ()) = tokio::join!(soon(intake.next()), publishing);
    let full = full.expect("a batch").deliveries;
    assert!(full.iter().map(body).eq(numbered(0..10)));
    intake = intake.lingering(Duration::from_millis(20));
    let mut rest = Vec::new();
    while rest.len() < 2 {
        rest.extend(
            soon(intake.next())
                .await
                .expect("what came, once it has lingered")
                .deliveries,
        );
    }
    assert!(rest.iter().map(body).eq(numbered(10..12)));
    intake.release().await.expect("released");
}

#[tokio::test]
async fn cancelled_it_hands_out_what_came_before() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..200)).await;
    let mut intake = Intake::attach(&connection, "q", 50, 8, 1 << 20)
        .await
        .expect("attached");
    let disposer = intake.disposer();
    let mut seen: Vec<Delivery> = soon(intake.next()).await.expect("a batch").deliveries;
    soon(intake.cancel()).await.expect("cancelled");
    while let Some(batch) = intake.drain() {
        assert!(batch.deliveries.len() <= 8);
        seen.extend(batch.deliveries);
    }
    assert!(intake.drain().is_none());
    assert_eq!(soon(intake.next()).await.expect_err("ended"), IntakeEnd::Cancelled);
    soon(intake.cancel()).await.expect("again");
    assert_eq!(
        seen.iter().map(body).collect::<Vec<_>>(),
        numbered(0..seen.len()).collect::<Vec<_>>()
    );
    soon(disposer.acknowledge(seen.iter().map(tag).max()))
        .await
        .expect("acknowledged");
    intake.release().await.expect("released");
    let left = u32::try_from(200 - seen.len()).expect("few");
    eventually("the rest is back", async || {
        (ready(&connection, "q").await == left).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_deleted_queue_cancels_and_a_cut_connection_is_away() {
    let vhost = Vhost::new();
    let other = vhost.connect().await;
    for careful in [true, false] {
        quorum_queue(&other, "q", 50).await;
        let (proxy, settings) = vhost.proxied();
        let connection = Connection::open(&settings, "test").await.expect("connected");
        let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
            .await
            .expect("attached");
        if !careful {
            fill(&other, "q", numbered(0..1)).await;
            take(&mut intake, 1).await;
        }
        delete_queue(&other, "q").await;
        assert_eq!(soon(intake.next()).await.expect_err("ended"), IntakeEnd::Cancelled);
        assert!(connection.is_connected());
        intake.release().await.expect("released");

        quorum_queue(&other, "q", 50).await;
        let mut intake = Intake::attach(&connection, "q", 10, 10, 1 << 20)
            .await
            .expect("attached");
        let disposer = intake.disposer();
        fill(&other, "q", numbered(0..1)).await;
        take(&mut intake, 1).await;
        proxy.cut();
        let end = soon(intake.next()).await.expect_err("ended");
        assert!(matches!(end, IntakeEnd::Away(BrokerError::Away(_))), "{end}");
        assert!(soon(disposer.acknowledge(Some(1))).await.is_err());
        soon(intake.release()).await.expect("nothing to release");
        delete_queue(&other, "q").await;
    }
}

#[tokio::test]
async fn released_messages_come_back_and_count_once() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    fill(&connection, "q", numbered(0..10)).await;
    let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
        .await
        .expect("attached");
    take(&mut intake, 10).await;
    intake.release().await.expect("released");
    eventually("back", async || (ready(&connection, "q").await == 10).then_some(())).await;
    let mut intake = Intake::attach(&connection, "q", 100, 100, 1 << 20)
        .await
        .expect("attached");
    for _ in 0..10 {
        let again = take(&mut intake, 1).await.remove(0);
        assert!(again.redelivered);
        let count = again
            .properties
            .headers
            .as_ref()
            .and_then(|headers| headers.get("x-delivery-count"));
        assert_eq!(count, Some(&HeaderValue::LongLongInt(1)));
        intake
            .disposer()
            .acknowledge(Some(tag(&again)))
            .await
            .expect("acknowledged");
    }
}

/// What ends the connection whenever it is delivered goes to its delivery limit alone.
#[tokio::test]
async fn a_poison_dies_alone() {
    let vhost = Vhost::new();
    let other = vhost.connect().await;
    let (proxy, settings) = vhost.proxied();
    proxy.strike(b"the poison");
    quorum_queue(&other, "q", 3).await;
    fill(&other, "q", numbered(0..10)).await;
    fill(&other, "q", ["the poison".to_owned()]).await;
    fill(&other, "q", numbered(10..20)).await;

    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut lives = 0;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    'dead: loop {
        lives += 1;
        assert!(lives < 8, "{seen:?}");
        let connection = Connection::open(&settings, "test").await.expect("connected");
        // It may strike before the broker has said that there is a consumer.
        let attached = Intake::attach(&connection, "q", 100, 5, 1 << 20).await;
        let Ok(mut intake) = attached else { continue };
        let disposer = intake.disposer();
        loop {
            match tokio::time::timeout(Duration::from_millis(200), intake.next()).await {
                Ok(Ok(batch)) => {
                    // Once the poison has struck an acknowledgement may be lost, and its message comes again.
                    drop(disposer.acknowledge(batch.deliveries.iter().map(tag).max()).await);
                    seen.extend(batch.deliveries.iter().map(body));
                }
                Ok(Err(end)) => {
                    assert!(matches!(end, IntakeEnd::Away(BrokerError::Away(_))), "{end}");
                    break;
                }
                Err(_) if seen.len() == 20 && ready(&other, "q.dead").await == 1 => break 'dead,
                Err(_) => assert!(tokio::time::Instant::now() < deadline, "{seen:?}"),
            }
        }
    }
    assert_eq!(
        seen.into_iter().collect::<Vec<_>>(),
        numbered(0..20).collect::<Vec<_>>()
    );
    assert_eq!(ready(&other, "q").await, 0);
}

/// Among innocents, one behind the other, plain and encrypted: each comes once, in order, with what it came with, and
/// costs no connection.
#[tokio::test]
async fn what_lapin_can_not_decode_comes_like_any_other() {
    let vhost = Vhost::new();
    let other = vhost.connect().await;
    let authority = std::env::temp_dir().join(format!("{}.pem", vhost.name));
    std::fs::write(&authority, testing::AUTHORITY).expect("written");
    let encrypted = {
        let url = vhost.settings().url.expose().replacen("amqp://", "amqps://", 1);
        let (before, _) = url.rsplit_once('@').expect("a user");
        BrokerSettings {
            url: Secret::new(format!(
                "{before}@localhost:{}/{}",
                testing::tls_front(&vhost),
                vhost.name
            )),
            files: testing::trusting(&authority),
            ..vhost.settings()
        }
    };
    for (queue, settings) in [("plain", vhost.settings()), ("encrypted", encrypted)] {
        quorum_queue(&other, queue, 50).await;
        let channel = other.channel().await.expect("a channel");
        let options = lapin::options::QueueBindOptions { nowait: false };
        channel
            .queue_bind(
                queue.into(),
                "amq.fanout".into(),
                "".into(),
                options,
                FieldTable::default(),
            )
            .await
            .expect("bound");
        let mut raw = vhost.raw();
        let mut wrong = Vec::new();
        testing::short(&mut wrong, testing::UNDECODABLE);
        fill(&other, queue, numbered(0..10)).await;
        // The property before all others, and one behind; and a routing key.
        raw.publish("", queue, 1 << 15, &wrong, b"before");
        raw.publish("", queue, 1 << 7, &wrong, b"behind");
        raw.publish("amq.fanout", b"acme\xff.allocation.update", 0, &[], b"key");
        fill(&other, queue, numbered(10..20)).await;

        let connection = Connection::open(&settings, "test").await.expect("connected");
        let mut intake = Intake::attach(&connection, queue, 100, 7, 1 << 20)
            .await
            .expect("attached");
        let taken = take(&mut intake, 23).await;
        let bodies: Vec<String> = taken.iter().map(body).collect();
        let poison = ["before", "behind", "key"].map(str::to_owned);
        let expected: Vec<String> = numbered(0..10).chain(poison).chain(numbered(10..20)).collect();
        assert_eq!(bodies, expected);
        assert!(taken.iter().all(|delivery| !delivery.redelivered));
        for (index, flags) in [(10, [0x80, 0]), (11, [0, 0x80])] {
            let list = Bytes([&flags[..], &wrong].concat());
            assert_eq!(taken[index].properties.undecodable, Some(list));
            assert_eq!(taken[index].routing_key, queue);
        }
        assert_eq!(taken[12].routing_key, "acme\\xff.allocation.update");
        assert_eq!(taken[12].exchange, "amq.fanout");
        let innocents = taken
            .iter()
            .filter(|delivery| delivery.properties.undecodable.is_none());
        assert_eq!(innocents.count(), 21);
        let highest = taken.iter().map(tag).max();
        intake.disposer().acknowledge(highest).await.expect("acknowledged");
        assert!(connection.is_connected());
        intake.release().await.expect("released");
        assert_eq!(ready(&other, queue).await, 0);
        delete_queue(&other, queue).await;
    }
    std::fs::remove_file(&authority).expect("removed");
}
