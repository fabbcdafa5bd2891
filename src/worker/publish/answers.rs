//! The line on which replies leave: their own. The names are a partner's, and there are names over which the broker ends the
//! connection; that must not be one on which anything else is told.

use std::time::{Duration, Instant};

use crate::{
    broker::{BrokerError, BrokerSettings, Connection, publisher::Publisher},
    config::Settings,
};

pub(super) struct Answers {
    pub(super) link: Option<(Connection, Publisher)>,
    /// When it broke, or could not be had.
    lost: Option<Instant>,
    connect: Duration,
    rest: Duration,
}

impl Answers {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            link: None,
            lost: None,
            connect: settings.broker.replies_connect,
            rest: settings.broker.replies_rest,
        }
    }

    /// Where a reply can leave at once.
    pub(super) async fn publisher(&mut self, broker: &BrokerSettings, name: &str) -> Option<&mut Publisher> {
        let is_lost = self
            .link
            .as_ref()
            .is_some_and(|(connection, _)| !connection.is_connected());
        if is_lost {
            self.link = None;
            self.lost = Some(Instant::now());
        }
        if self.link.is_none() {
            if self.lost.is_some_and(|lost| lost.elapsed() < self.rest) {
                return None;
            }
            let name = format!("{name} replies");
            let opening = async {
                let connection = Connection::open_without_consumer(broker, &name).await?;
                let publisher = Publisher::open(&connection).await?;
                Ok::<_, BrokerError>((connection, publisher))
            };
            match tokio::time::timeout(self.connect, opening).await {
                Ok(Ok(link)) => self.link = Some(link),
                Ok(Err(_)) | Err(_) => self.lost = Some(Instant::now()),
            }
        }
        self.link.as_mut().map(|(_, publisher)| publisher)
    }
}
