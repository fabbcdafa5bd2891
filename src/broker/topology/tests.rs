use super::*;
use crate::broker::intake::Intake;
use crate::broker::publisher::{BrokerAnswer, Publisher};
use crate::broker::rights::Mend;
use crate::broker::testing::{Vhost, event, eventually, queue, ready, soon, text};

async fn receive(connection: &Connection, queue: &str) -> crate::domain::delivery::Delivery {
    let mut intake = Intake::attach(connection, queue, 10, 10, 1 << 20)
        .await
        .expect("attached");
    let mut batch = soon(intake.next()).await.expect("a message");
    assert_eq!(batch.deliveries.len(), 1);
    intake.disposer().acknowledge(Some(1)).await.expect("acknowledged");
    intake.cancel().await.expect("cancelled");
    assert!(intake.drain().is_none());
    batch.deliveries.remove(0)
}

#[tokio::test]
async fn declared_twice_it_is_the_same_and_in_order() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    declare(&connection).await.expect("declared");
    declare(&connection).await.expect("declared again");
    let findings = inspect(&connection, &[], None, &Mend::of(&vhost.settings()))
        .await
        .expect("inspected");
    assert_eq!(findings.len(), 20);
    assert!(
        findings
            .iter()
            .all(|finding| finding.problem.is_none() && finding.hint.is_none()),
        "{findings:?}"
    );
    assert_eq!(
        depths(&connection).await,
        Ok(Depths {
            updates: 0,
            dead: 0,
            unreadable: 0
        })
    );
}

#[tokio::test]
async fn every_update_reaches_the_queue_and_its_dead_letter_keeps_the_key() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    declare(&connection).await.expect("declared");
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let key = "acme.allocation.update";
    let sent = [event(UPDATES, key, "one"), event(UPDATES, "any.thing", "two")];
    assert_eq!(publisher.publish(&sent).await, Ok(vec![BrokerAnswer::Confirmed; 2]));
    let mut intake = Intake::attach(&connection, UPDATES, 1, 1, 1).await.expect("attached");
    let batch = soon(intake.next()).await.expect("a message");
    assert_eq!(
        (
            batch.deliveries[0].exchange.as_str(),
            batch.deliveries[0].routing_key.as_str()
        ),
        (UPDATES, key)
    );
    intake.disposer().reject(1).await.expect("rejected");
    let dead = receive(&connection, DEAD).await;
    assert_eq!(
        (dead.exchange.as_str(), dead.routing_key.as_str(), &*dead.body),
        (DEAD, key, &b"one"[..])
    );
    let x_death = dead
        .properties
        .headers
        .and_then(|headers| headers.get("x-death").cloned());
    let Some(crate::domain::delivery::HeaderValue::Array(x_death)) = x_death else {
        panic!("no x-death")
    };
    let Some(crate::domain::delivery::HeaderValue::Table(first)) = x_death.first() else {
        panic!("no entry")
    };
    assert_eq!(first.get("queue").and_then(|queue| queue.as_text()), Some(UPDATES));
    assert_eq!(
        first.get("reason").and_then(|reason| reason.as_text()),
        Some("rejected")
    );
}

#[tokio::test]
async fn an_unreadable_dead_letter_is_kept_and_counted() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    declare(&connection).await.expect("declared");
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let sent = [event(DEAD, "acme.allocation.update", "one")];
    assert_eq!(publisher.publish(&sent).await, Ok(vec![BrokerAnswer::Confirmed]));
    let mut intake = Intake::attach(&connection, DEAD, 1, 1, 1).await.expect("attached");
    soon(intake.next()).await.expect("a message");
    intake.disposer().reject(1).await.expect("rejected");
    eventually("unreadable", async || {
        (ready(&connection, UNREADABLE).await == 1).then_some(())
    })
    .await;
    assert_eq!(
        depths(&connection).await,
        Ok(Depths {
            updates: 0,
            dead: 0,
            unreadable: 1
        })
    );
}

#[tokio::test]
async fn an_own_queue_takes_its_partners_messages_and_no_others() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    declare(&connection).await.expect("declared");
    crate::broker::own_queue::declare(&connection, "acme")
        .await
        .expect("declared");
    crate::broker::own_queue::declare(&connection, "acme")
        .await
        .expect("declared again");
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let sent: Vec<_> = [
        "acme.allocation.update",
        "acme.deallocation.update",
        "acme.nonsense",
        "acme2.allocation.update",
        "x.acme.allocation.update",
    ]
    .into_iter()
    .map(|key| event(UPDATES, key, key))
    .collect();
    assert_eq!(publisher.publish(&sent).await, Ok(vec![BrokerAnswer::Confirmed; 5]));
    assert_eq!(ready(&connection, &own_queue("acme")).await, 2);
    assert_eq!(ready(&connection, UPDATES).await, 3);
}

#[tokio::test]
async fn what_is_missing_or_different_is_found_and_nothing_is_changed() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    for _ in 0..2 {
        let findings = inspect(&connection, &[], None, &Mend::of(&vhost.settings()))
            .await
            .expect("inspected");
        assert!(findings.iter().all(|finding| finding.problem.is_some()), "{findings:?}");
    }
    assert_eq!(depths(&connection).await.map_err(|error| error.code()), Err(Some(404)));
    queue(&connection, UPDATES, &[("x-queue-type", text("quorum"))]).await;
    let refused = declare(&connection).await.expect_err("another queue is in its place");
    assert_eq!(refused.code(), Some(406), "{refused}");
    let findings = inspect(&connection, &[], None, &Mend::of(&vhost.settings()))
        .await
        .expect("inspected");
    let found = findings
        .iter()
        .find(|finding| finding.object == "queue settlement.updates")
        .expect("a finding");
    assert!(
        found
            .problem
            .as_ref()
            .is_some_and(|problem| problem.contains("other properties")),
        "{found:?}"
    );
}

#[tokio::test]
async fn missing_permissions_are_found_and_no_message_is_touched() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    declare(&connection).await.expect("declared");
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let sent = [
        event(UPDATES, "acme.allocation.update", "one"),
        event(DEAD, "acme.allocation.update", "two"),
    ];
    assert_eq!(publisher.publish(&sent).await, Ok(vec![BrokerAnswer::Confirmed; 2]));
    for (write, read, expected) in [
        (".*", ".*", vec![]),
        (
            "",
            ".*",
            vec![
                "permission to publish to settlement.events",
                "permission to publish to settlement.dead",
                "permission to publish to settlement.unreadable",
                "permission to publish to settlement.epoch",
            ],
        ),
        (
            ".*",
            "",
            vec![
                "permission to consume settlement.updates",
                "permission to consume settlement.dead",
                "permission to consume settlement.dead.broker",
                "permission to consume settlement.epoch",
            ],
        ),
        (
            "settlement.dead",
            "settlement.dead",
            vec![
                "permission to publish to settlement.events",
                "permission to publish to settlement.unreadable",
                "permission to publish to settlement.epoch",
                "permission to consume settlement.updates",
                "permission to consume settlement.epoch",
            ],
        ),
    ] {
        // Without configure permission, as a worker should be.
        let settings = vhost.as_user("", write, read);
        let restricted = Connection::open(&settings, "test").await.expect("connected");
        let findings = inspect(&restricted, &[], None, &Mend::of(&settings))
            .await
            .expect("inspected");
        vhost.forget_user(&settings);
        let problems: Vec<_> = findings
            .iter()
            .filter(|finding| finding.problem.is_some())
            .map(|finding| finding.object.as_str())
            .collect();
        assert_eq!(problems, expected, "{findings:?}");
        // Without a right on it at all, 4.2.6 and later do not even say that it is there.
        let unchecked = findings
            .iter()
            .filter(|finding| finding.problem.is_none())
            .filter(|finding| {
                finding
                    .hint
                    .as_ref()
                    .is_some_and(|hint| hint.contains("this user has no"))
            });
        assert_eq!(unchecked.count(), 12, "{findings:?}");
    }
    assert_eq!(
        depths(&connection).await,
        Ok(Depths {
            updates: 1,
            dead: 1,
            unreadable: 0
        })
    );
    assert!(!receive(&connection, UPDATES).await.redelivered);
    assert!(!receive(&connection, DEAD).await.redelivered);
}
