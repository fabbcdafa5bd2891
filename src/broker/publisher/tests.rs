use std::time::Instant;

use lapin::types::AMQPValue;

use super::*;
use crate::broker::testing::{Vhost, event, eventually, queue, ready, soon, text};
use crate::domain::delivery::HeaderValue;

/// lapin gives a return to the next confirm, whosever it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_return_finds_its_own_publication() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "there", &[("x-queue-type", text("quorum"))]).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let mut seed = 42_u64;
    for round in 0..40 {
        let mut sent = Vec::new();
        let mut expected = Vec::new();
        for index in 0..256 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let there = seed >> 62 != 0;
            let mut one = event("", if there { "there" } else { "nowhere" }, &format!("{round}/{index}"));
            match index % 4 {
                // A dead letter carries its sender's message id, often the same one, and maybe no body.
                0 => {
                    one.kind = PublicationKind::DeadLetter;
                    one.properties.message_id = Some("same".to_owned());
                }
                1 => {
                    one.kind = PublicationKind::DeadLetter;
                    one.properties.message_id = None;
                    one.body.clear();
                }
                // The same event twice in a batch.
                2 => {
                    sent.push(one.clone());
                    expected.push(if there {
                        BrokerAnswer::Confirmed
                    } else {
                        BrokerAnswer::Returned
                    });
                }
                _ => {}
            }
            sent.push(one);
            expected.push(if there {
                BrokerAnswer::Confirmed
            } else {
                BrokerAnswer::Returned
            });
        }
        assert_eq!(soon(publisher.publish(&sent)).await, Ok(expected), "round {round}");
    }
    assert_eq!(soon(publisher.publish(&[])).await, Ok(vec![]));
}

/// lapin gives a confirm to the wrong publication, some few of thousands, where several tasks publish on a channel.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_nack_finds_its_own_publication() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "there", &[]).await;
    let full = [
        ("x-max-length", AMQPValue::LongInt(1)),
        ("x-overflow", text("reject-publish")),
    ];
    queue(&connection, "full", &full).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let filling = [event("", "full", "the only one")];
    assert_eq!(
        soon(publisher.publish(&filling)).await,
        Ok(vec![BrokerAnswer::Confirmed])
    );
    for round in 0..16 {
        let sent: Vec<_> = (0..2_000)
            .map(|index| {
                event(
                    "",
                    if index % 2 == 0 { "there" } else { "full" },
                    &format!("{round}/{index}"),
                )
            })
            .collect();
        let expected: Vec<_> = (0..2_000)
            .map(|index| {
                if index % 2 == 0 {
                    BrokerAnswer::Confirmed
                } else {
                    BrokerAnswer::Nacked
                }
            })
            .collect();
        let fates = soon(publisher.publish(&sent)).await.expect("answered");
        let wrong = fates.iter().zip(&expected).filter(|(fate, expected)| fate != expected);
        assert_eq!(wrong.count(), 0, "round {round}");
    }
}

#[tokio::test]
async fn what_a_full_queue_does_not_take_is_nacked() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    let full = [
        ("x-max-length", AMQPValue::LongInt(3)),
        ("x-overflow", text("reject-publish")),
    ];
    queue(&connection, "full", &full).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let sent: Vec<_> = (0..10)
        .map(|index| event("", if index % 2 == 0 { "full" } else { "nowhere" }, &format!("{index}")))
        .collect();
    let fates = soon(publisher.publish(&sent)).await.expect("answered");
    let count = |fate| fates.iter().filter(|other| **other == fate).count();
    assert_eq!(
        (
            count(BrokerAnswer::Confirmed),
            count(BrokerAnswer::Nacked),
            count(BrokerAnswer::Returned)
        ),
        (3, 2, 5),
        "{fates:?}"
    );
    assert!(
        fates
            .iter()
            .skip(1)
            .step_by(2)
            .all(|fate| *fate == BrokerAnswer::Returned),
        "{fates:?}"
    );
    assert_eq!(
        soon(publisher.publish(&[event("", "full", "more")])).await,
        Ok(vec![BrokerAnswer::Nacked])
    );
}

#[tokio::test]
async fn the_one_that_is_refused_is_found_by_publishing_one_by_one() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "q", &[("x-queue-type", text("quorum"))]).await;
    let mut user = event("", "q", "user");
    user.properties.user_id = Some("somebody-else".to_owned());
    let mut expiration = event("", "q", "expiration");
    expiration.properties.expiration = Some("soon".to_owned());
    for (culprit, code) in [(event("no-exchange", "q", "404"), 404), (user, 406), (expiration, 406)] {
        let mut sent: Vec<_> = (0..400)
            .map(|index| event("", "q", &format!("{code}/{index}")))
            .collect();
        sent.insert(1, culprit);
        let connection = vhost.connect().await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let error = soon(publisher.publish(&sent)).await.expect_err("refused");
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(matches!(
            soon(publisher.publish(&sent)).await,
            Err(BrokerError::Away(_))
        ));
        let connection = vhost.connect().await;
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        assert_eq!(
            soon(publisher.publish(&sent[..1])).await,
            Ok(vec![BrokerAnswer::Confirmed])
        );
        let error = soon(publisher.publish(&sent[1..2])).await.expect_err("refused");
        assert_eq!(error.code(), Some(code), "{error}");
    }
}

#[tokio::test]
async fn what_no_frame_can_carry_is_refused_before_it_is_sent() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "q", &[]).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let with = |bytes| {
        let mut one = event("", "q", "one");
        one.properties.headers = Some([("h".to_owned(), HeaderValue::text("x".repeat(bytes)))].into());
        one
    };
    let room = 131_072 - with(0).properties.wire_len() - HEADER_FRAME_BYTES;
    assert_eq!(
        soon(publisher.publish(&[with(room)])).await,
        Ok(vec![BrokerAnswer::Confirmed])
    );
    let refused = soon(publisher.publish(&[event("", "q", "innocent"), with(room + 1)])).await;
    assert_eq!(refused.map_err(|error| error.code()), Err(Some(501)));
    let long = "x".repeat(256);
    let mut id = event("", "q", "id");
    id.properties.message_id = Some(long.clone());
    let mut header = event("", "q", "header");
    header.properties.headers = Some([(long.clone(), HeaderValue::Void)].into());
    for one in [event("", &long, "key"), event(&long, "", "exchange"), id, header] {
        assert_eq!(
            soon(publisher.publish(&[one])).await.map_err(|error| error.code()),
            Err(Some(502))
        );
    }
    assert_eq!(
        soon(publisher.publish(&[event("", "q", "x")])).await,
        Ok(vec![BrokerAnswer::Confirmed])
    );
    assert_eq!(ready(&connection, "q").await, 2);
}

#[tokio::test]
async fn a_large_body_is_cut_into_frames() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "q", &[]).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let sent: Vec<_> = [131_063, 131_064, 131_065, 262_144, 5_000_000]
        .into_iter()
        .map(|size| event("", if size % 2 == 0 { "q" } else { "nowhere" }, &"x".repeat(100)).with_body(size))
        .collect();
    let fates = soon(publisher.publish(&sent)).await.expect("published");
    let confirmed = |size: usize| {
        if size.is_multiple_of(2) {
            BrokerAnswer::Confirmed
        } else {
            BrokerAnswer::Returned
        }
    };
    assert_eq!(
        fates,
        sent.iter().map(|one| confirmed(one.body.len())).collect::<Vec<_>>()
    );
}

impl Publication {
    fn with_body(mut self, size: usize) -> Self {
        self.body = vec![7; size];
        self
    }
}

#[tokio::test]
async fn a_dead_or_frozen_broker_is_away_within_the_deadline() {
    let vhost = Vhost::new();
    let (proxy, mut settings) = vhost.proxied();
    settings.publish_deadline = Duration::from_secs(1);
    queue(&vhost.connect().await, "q", &[]).await;
    for frozen in [false, true] {
        let connection = Connection::open(&settings, "test").await.expect("connected");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        assert_eq!(
            soon(publisher.publish(&[event("", "q", "1")])).await,
            Ok(vec![BrokerAnswer::Confirmed])
        );
        if frozen {
            proxy.freeze()
        } else {
            proxy.cut()
        }
        let began = Instant::now();
        let error = publisher
            .publish(&[event("", "q", "2"), event("", "q", "3")])
            .await
            .expect_err("away");
        assert!(matches!(error, BrokerError::Away(_)), "{error}");
        assert!(began.elapsed() < Duration::from_secs(2));
        assert!(matches!(
            publisher.publish(&[event("", "q", "4")]).await,
            Err(BrokerError::Away(_))
        ));
        assert!(!publisher.reply(&event("", "q", "5")).await || frozen);
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}

#[tokio::test]
async fn replies_harm_nobody() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "answers", &[]).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    let reply = |exchange: &str, key: &str| {
        let mut reply = event(exchange, key, "reply");
        reply.kind = PublicationKind::Reply;
        reply
    };
    for name in [
        "amq.rabbitmq.reply-to.nonsense",
        "amq.rabbitmq.reply-to",
        "settlement.reply.nobody",
    ] {
        assert!(soon(publisher.reply(&reply("", name))).await);
        assert_eq!(
            soon(publisher.publish(&[event("", "answers", name)])).await,
            Ok(vec![BrokerAnswer::Confirmed])
        );
    }
    assert!(soon(publisher.reply(&reply("", "answers"))).await);
    let count = async || (ready(&connection, "answers").await == 4).then_some(());
    eventually("the reply", count).await;
}

/// One at a time on a channel that the broker closes, they would end the connection sooner or later.
#[tokio::test]
async fn refused_replies_stop_and_leave_the_connection_alone() {
    let vhost = Vhost::new();
    queue(&vhost.connect().await, "q", &[]).await;
    let mut refused = event("", "q", "reply");
    refused.kind = PublicationKind::Reply;
    // As long as nobody may publish to the default exchange, `amq.default` to permissions.
    vhost.put(
        &format!("exchanges/{}/events", vhost.name),
        &serde_json::json!({"type": "fanout", "durable": true}),
    );
    let settings = vhost.as_user("", "^events$", "");
    for _ in 0..20 {
        let connection = Connection::open(&settings, "test").await.expect("connected");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        for _ in 0..50 {
            assert!(!soon(publisher.reply(&refused)).await);
        }
        let sent = [event("events", "q", "event")];
        assert_eq!(soon(publisher.publish(&sent)).await, Ok(vec![BrokerAnswer::Returned]));
        assert!(connection.is_connected());
    }
    vhost.forget_user(&settings);
}
