//! An outbox row names its settlements: whoever publishes it makes their events again, of the record.

use std::time::Duration;

use settled::{
    domain::{
        delivery::{HeaderValue, Headers, Properties, PublicationKind},
        event::Format,
        message::Message as Read,
    },
    settle::{Answered, Batch, Clerk},
};
use tokio_postgres::Client;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    in_process::{self, read, settle},
    partner::Partner,
    support::Place,
};

const LEASE: Duration = Duration::from_secs(60);

const FORMATS: [Format; 3] = [
    Format::Single,
    Format::Batched { max_bytes: 1 << 20 },
    // Two or three events an array.
    Format::Batched { max_bytes: 2_500 },
];

/// A batch of outcomes, duplicates and refusals, some with a place in a trace.
async fn mixed(partner: &Partner, reservations: &[Reservation]) -> Batch {
    let mut messages: Vec<Message> = reservations
        .iter()
        .enumerate()
        .map(|(place, reservation)| match place % 3 {
            0 => partner.released(reservation),
            _ => partner.cleared(reservation),
        })
        .collect();
    // Once more, and one that is refused between them.
    messages.push(messages[0].clone());
    let unsaid = partner
        .draft(&partner.allocation("BTC", "1"), "cleared")
        .without("nonce");
    messages.insert(3, unsaid.message(Expect::Refused("invalid_field")));
    let traced = read(&messages).await.into_messages().into_iter().enumerate();
    let traced: Vec<Read> = traced
        .map(|(place, mut message)| {
            if place % 2 == 0 {
                let trace = format!("00-{:032x}-{:016x}-01", place + 1, place + 1);
                message.delivery.properties = Properties {
                    headers: Some(Headers::from([("traceparent".into(), HeaderValue::text(&trace))])),
                    ..Properties::default()
                };
            }
            message
        })
        .collect();
    traced.into()
}

async fn abandoned(clerk: &Clerk, db: &Client, settled: &Answered) {
    db.execute("UPDATE settled.outbox SET leased_until = '-infinity'", &[])
        .await
        .expect("abandoned");
    let taken = clerk
        .store
        .take_abandoned(LEASE, "/settled")
        .await
        .expect("read")
        .expect("a row");
    assert_eq!(taken.batch_id, settled.id);
    assert_eq!(taken.publications.len(), settled.publications.len());
    for (again, first) in taken.publications.iter().zip(&settled.publications) {
        assert_eq!(again, first);
    }
    clerk.store.delete_published(&[taken.row]).await.expect("done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_another_publishes_says_the_same_byte_for_byte() {
    let place = Place::new("named_outbox").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let db = place.db().await;
    for format in FORMATS {
        let reservations: Vec<Reservation> = (0..12).map(|_| partner.allocation("BTC", "1")).collect();
        place.reserve(&reservations).await;
        let clerk = Clerk {
            event_format: format,
            ..in_process::clerk(&place)
        };
        let batch = mixed(&partner, &reservations).await;
        let settled = settle(&clerk, &batch).await.expect("settled");
        let events = settled
            .publications
            .iter()
            .filter(|said| said.kind == PublicationKind::Event);
        assert!(events.count() > 1, "{format:?}");
        // The row holds none of the words of a settlement, and the refusal whole.
        let sql = "SELECT position('partnerExternalId'::bytea IN publications), position('invalid_field'::bytea IN publications)
                   FROM settled.outbox";
        let row = db.query_one(sql, &[]).await.expect("the row");
        assert_eq!(row.get::<_, i32>(0), 0, "{format:?}");
        assert!(row.get::<_, i32>(1) > 0, "{format:?}");
        // An operator sees what waits, as it will be published.
        let waiting = clerk.store.waiting_publications(100, "/settled").await.expect("asked");
        let ids = |ids: Vec<Option<&str>>| ids.into_iter().map(|id| id.map(str::to_owned)).collect::<Vec<_>>();
        let shown = ids(waiting.iter().map(|one| one.message_id.as_deref()).collect());
        let said = ids(settled
            .publications
            .iter()
            .map(|one| one.properties.message_id.as_deref())
            .collect());
        assert_eq!(shown, said, "{format:?}");
        assert_eq!(
            waiting.iter().map(|one| one.bytes).collect::<Vec<_>>(),
            settled
                .publications
                .iter()
                .map(|one| one.body.len() as u64)
                .collect::<Vec<_>>(),
        );
        // Another worker, with another name for the source of its events and another format, says what was to be said.
        let mut other = in_process::clerk(&place);
        other.rules.event_source = "/another".to_owned();
        abandoned(&other, &db, &settled).await;
    }
}

/// A row whose record is gone is not told in part: it stays, and whoever looks is told why.
#[tokio::test]
async fn a_row_whose_record_is_gone_stays() {
    let place = Place::new("named_outbox_gone").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "10").await;
    let reservation = partner.allocation("BTC", "1");
    place.reserve(std::slice::from_ref(&reservation)).await;
    let clerk = in_process::clerk(&place);
    settle(&clerk, &read(&[partner.cleared(&reservation)]).await)
        .await
        .expect("settled");
    place
        .tamper("UPDATE settled.outbox SET leased_until = '-infinity'; DELETE FROM settled.allocations")
        .await;
    let error = clerk
        .store
        .take_abandoned(LEASE, "/settled")
        .await
        .err()
        .expect("it can not be read");
    let said = error.to_string();
    assert!(
        said.contains("can not be read") && said.contains(&reservation.id.to_string()),
        "{said}"
    );
    let waiting = clerk.store.waiting_publications(10, "/settled").await.expect("asked");
    assert_eq!((waiting.len(), waiting[0].kind), (1, None));
}
