//! A batch settled in the test's own process, without a broker: for what only one batch by itself shows.

use settled::{
    config::{Settings, Sources},
    domain::delivery::{Delivery, Properties, Source},
    settle::{
        self, Answered, Attempt, Batch, Clerk,
        blocked::{KnownLocks, SideRoom},
    },
    store::{Store, StoreError},
};
use uuid::Uuid;

use super::{amqp::Message, support::Place};

/// Who settles in this process, at a place's database.
pub(crate) fn clerk(place: &Place) -> Clerk {
    clerk_at(&place.database_url)
}

/// The same, as whoever the URL names.
pub(crate) fn clerk_at(url: &str) -> Clerk {
    let environment = [
        ("SETTLED_DATABASE_URL", url),
        // What waits on is not looked at again before the test is over.
        ("SETTLED_PARK__FIRST_RETRY", "60s"),
        // What is settled here and published by nobody is soon the relay's.
        ("SETTLED_OUTBOX__LEASE", "1s"),
    ];
    let settings = Settings::load(Sources {
        file: None,
        environment: environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        flags: Vec::new(),
    });
    let settings = settings.expect("settings");
    let store = Store::new(&settings).expect("a store");
    Clerk::new(&settings, store)
}

pub(crate) async fn read(messages: &[Message]) -> Batch {
    let deliveries = messages.iter().zip(1..).map(|(message, delivery_tag)| Delivery {
        exchange: message.exchange.clone(),
        routing_key: message.routing_key.clone(),
        body: message.body.clone(),
        properties: Properties::default(),
        cut: None,
        redelivered: false,
        source: Source::Queue { delivery_tag },
    });
    Batch::read(deliveries.collect()).await
}

/// One attempt, as a worker makes it.
pub(crate) async fn settle(clerk: &Clerk, batch: &Batch) -> Result<Answered, StoreError> {
    settle_as(clerk, Uuid::now_v7(), batch, &mut None).await
}

/// The same under a given id, after an attempt that came to `earlier` if it committed.
pub(crate) async fn settle_as(
    clerk: &Clerk,
    id: Uuid,
    batch: &Batch,
    earlier: &mut Option<Answered>,
) -> Result<Answered, StoreError> {
    match settle::attempt(clerk, &KnownLocks::default(), SideRoom::Free, id, batch, &[], earlier).await? {
        Attempt::Answered(answered) => Ok(answered),
        Attempt::Blocked(places) => panic!("nothing is known to be locked, and {places:?} are blocked"),
    }
}
