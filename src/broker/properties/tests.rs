use std::collections::BTreeMap;

use super::*;
use crate::broker::intake::Intake;
use crate::broker::testing::{Vhost, event, publish, queue, quorum_queue, soon};
use crate::domain::delivery::{Delivery, Source};

/// The one message that there is.
async fn take(intake: &mut Intake) -> Delivery {
    let mut taken = soon(intake.next()).await.expect("a batch").deliveries;
    assert_eq!(taken.len(), 1);
    taken.remove(0)
}

fn every_kind() -> Headers {
    let scalars: Headers = [
        ("true", HeaderValue::Boolean(true)),
        ("false", HeaderValue::Boolean(false)),
        ("i8", HeaderValue::ShortShortInt(i8::MIN)),
        ("u8", HeaderValue::ShortShortUInt(u8::MAX)),
        ("i16", HeaderValue::ShortInt(i16::MIN)),
        ("u16", HeaderValue::ShortUInt(u16::MAX)),
        ("i32", HeaderValue::LongInt(i32::MIN)),
        ("u32", HeaderValue::LongUInt(u32::MAX)),
        ("i64", HeaderValue::LongLongInt(i64::MIN)),
        ("f32", HeaderValue::Float(0.1_f32.to_bits())),
        ("f64", HeaderValue::Double((-0.0_f64).to_bits())),
        (
            "decimal",
            HeaderValue::Decimal {
                scale: 2,
                value: 12_345,
            },
        ),
        ("text", HeaderValue::text("\u{e4}\u{1f600}")),
        ("no text", HeaderValue::LongString(Bytes(vec![0, 0xff, 0xfe]))),
        ("empty text", HeaderValue::text("")),
        ("time", HeaderValue::Timestamp(1_700_000_000)),
        ("bytes", HeaderValue::ByteArray(Bytes(vec![0, 1, 2, 255]))),
        ("void", HeaderValue::Void),
        ("empty table", HeaderValue::Table(Headers::new())),
        ("empty array", HeaderValue::Array(vec![])),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    let mut headers = scalars.clone();
    headers.insert(
        "array".to_owned(),
        HeaderValue::Array(scalars.values().cloned().collect()),
    );
    headers.insert("".to_owned(), HeaderValue::Table(scalars));
    headers.insert("x".repeat(255), nested(wire::DEPTH_MAX - 1));
    headers
}

/// A table this deep.
fn nested(depth: usize) -> HeaderValue {
    (0..depth).fold(HeaderValue::Void, |inner, level| {
        if level % 2 == 0 {
            HeaderValue::Table([("t".to_owned(), inner)].into())
        } else {
            HeaderValue::Array(vec![inner])
        }
    })
}

#[tokio::test]
async fn properties_come_as_they_were_sent() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    quorum_queue(&connection, "q", 50).await;
    let (_, rest) = vhost
        .settings()
        .url
        .expose()
        .split_once("://")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .expect("a URL");
    let user = rest.split(':').next().expect("a user").to_owned();
    let all = Properties {
        content_type: Some("application/json".to_owned()),
        content_encoding: Some("identity".to_owned()),
        headers: Some(every_kind()),
        delivery_mode: Some(2),
        priority: Some(255),
        correlation_id: Some("x".repeat(255)),
        reply_to: Some("settlement.reply.acme.1".to_owned()),
        expiration: Some("600000".to_owned()),
        message_id: Some("\u{e4}".to_owned()),
        timestamp: Some(u64::from(u32::MAX) + 1),
        kind: Some(String::new()),
        user_id: Some(user),
        app_id: Some("app".to_owned()),
        cluster_id: Some("cluster".to_owned()),
        undecodable: None,
    };
    let empty = Properties {
        headers: Some(Headers::new()),
        ..Properties::default()
    };
    let mut intake = Intake::attach(&connection, "q", 1, 1, 1 << 20).await.expect("attached");
    for properties in [all, empty, Properties::default()] {
        let mut sent = event("", "q", "body");
        sent.properties = properties.clone();
        publish(&connection, &sent).await;
        let got = take(&mut intake).await;
        assert_eq!(got.properties, properties);
        assert_eq!(
            (got.body, got.exchange, got.routing_key),
            (sent.body, String::new(), "q".to_owned())
        );
        intake
            .disposer()
            .acknowledge(Some(match got.source {
                Source::Queue { delivery_tag } => delivery_tag,
                Source::Parked { .. } | Source::Replayed { .. } | Source::Held { .. } | Source::Plain => 0,
            }))
            .await
            .expect("acknowledged");
    }
}

/// RabbitMQ 3.10 ends the connection of whoever publishes one, so it takes no part in the test above.
#[test]
fn not_a_number_keeps_its_bits() {
    for bits in [0x7fa0_0001, 0xffc0_0000, 0x7f80_0000] {
        let value = AMQPValue::Float(f32::from_bits(bits));
        assert_eq!(header_from(&value, 1), HeaderValue::Float(bits));
    }
    for bits in [0x7ff4_0000_0000_0001, 0xfff8_0000_0000_0000] {
        let value = AMQPValue::Double(f64::from_bits(bits));
        assert_eq!(header_from(&value, 1), HeaderValue::Double(bits));
    }
}

#[tokio::test]
async fn headers_too_deep_to_walk_make_a_message_too_large() {
    let vhost = Vhost::new();
    let connection = vhost.connect().await;
    queue(&connection, "q", &[]).await;
    let mut intake = Intake::attach(&connection, "q", 100, 10, 1 << 20)
        .await
        .expect("attached");
    for (depth, fits) in [
        (wire::DEPTH_MAX - 1, true),
        (wire::DEPTH_MAX, false),
        (2 * wire::DEPTH_MAX, false),
    ] {
        let mut sent = event("", "q", "body");
        sent.properties.headers = Some([("h".to_owned(), nested(depth))].into());
        publish(&connection, &sent).await;
        let got = take(&mut intake).await;
        assert_eq!(got.properties == sent.properties, fits, "{depth}");
        assert_eq!(got.properties.wire_len() > 16_384, !fits, "{depth}");
    }
}

/// Whatever depth comes out of the client library: no walk of ours goes deeper than the bound.
#[test]
fn a_table_is_cut_off_at_the_bound() {
    let deep = (0..4 * wire::DEPTH_MAX).fold(AMQPValue::Void, |inner, _| {
        AMQPValue::FieldTable(BTreeMap::from([(ShortString::from("t"), inner)]).into())
    });
    let mut value = &header_from(&deep, 1);
    let mut depth = 1;
    while let HeaderValue::Table(table) = value {
        value = table.get("t").expect("the next one");
        depth += 1;
    }
    assert_eq!(depth, wire::DEPTH_MAX);
    assert_eq!(value, &wire::too_deep());
}
