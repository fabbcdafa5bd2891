//! Whether the database answers, asked often and cheaply: an idle worker would learn of it only from the next message.

use std::time::Duration;

use super::Worker;
use crate::{
    retry::{self, Waited},
    store::Fate,
};

/// How often it is asked. With what a frozen server costs (twice database.silence) it shows in /readyz within five seconds.
const INTERVAL: Duration = Duration::from_millis(500);

/// Goes on until the program stops.
pub(super) async fn run(mut worker: Worker) {
    loop {
        match worker.ask_books().await {
            Ok(()) => worker.health.set_database_ok(true),
            Err(error) => {
                worker.health.set_database_trouble(error.trouble().sentence());
                // Idle lanes would learn of it only from messages that another worker hands back.
                if error.fate == Fate::Away {
                    worker.gate.close();
                }
            }
        }
        if retry::sleep(INTERVAL, &mut worker.stop).await == Waited::Stopping {
            return;
        }
    }
}
