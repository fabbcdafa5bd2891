//! `settled dead-letters collect`: the worker's collector, run by itself.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    broker::{BrokerError, Connection, topology},
    cli::{Context, Exit, Failure, worker::start_again_with_stack},
    store, telemetry,
    worker::{
        Signals, Worker,
        collector::{self, Collected},
    },
};

/// How often the queue is looked at.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(in crate::cli) struct Collect {
    /// Go on until SIGTERM instead of ending with an empty queue
    #[arg(long)]
    follow: bool,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Done {
    /// Messages that had no row.
    new: u64,
    /// Further failures of messages that had one.
    again: u64,
    /// Copies of what was stored before.
    copies: u64,
    /// Set apart in settlement.unreadable.
    unreadable: u64,
    /// Still in the queue.
    left: u32,
}

pub(super) async fn run(context: &Context, wish: &Collect) -> Result<Exit, Failure> {
    // Whose dead letters these are may have sent headers that need it.
    start_again_with_stack()?;
    telemetry::init(&context.settings.log, telemetry::stderr_is_terminal());
    let (store, broker) = (context.store()?, context.broker()?);
    store::check_schema(store.schema_version().await?)
        .map_err(|sentence| Failure::refused(sentence).hint("`settled doctor` checks everything that it needs"))?;
    let connection = Connection::open(&broker, "settled collect")
        .await
        .map_err(Failure::no_broker)?;
    let hidden = topology::hidden(store.books_epoch().await?.books);
    waiting(&connection, &hidden).await?;
    let mut signals = Signals::new().map_err(|error| Failure::ours(format!("signals can not be caught: {error}")))?;

    let account = Arc::new(Collected::default());
    let (stopper, stop) = watch::channel(false);
    let worker = Worker::new(&context.settings, store, broker, stop);
    let mut tasks = JoinSet::new();
    let counts = Arc::clone(&account);
    tasks.spawn(async move { collector::collect(worker, &counts).await });
    let looked = tokio::select! {
        _ = signals.next() => Ok(()),
        looked = drained(&connection, &hidden, wish.follow, &account) => looked,
    };
    stopper.send_replace(true);
    // What is in hand when it stops is stored and told, unless a dependency is away for too long or a second signal comes.
    let ended = tokio::select! {
        ended = tokio::time::timeout(context.settings.worker.drain_deadline, tasks.join_next()) => ended.unwrap_or(None),
        _ = signals.next() => None,
    };
    // What is aborted is not lost: unacknowledged messages come again, outbox rows are a relay's.
    tasks.shutdown().await;
    if let Some(Err(error)) = &ended {
        return Err(Failure::ours(format!("the collector's own code failed: {error}")));
    }
    looked?;
    let left = waiting(&connection, &hidden).await?;
    drop(connection.close().await);
    let count = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
    let done = Done {
        new: count(&account.new),
        again: count(&account.again),
        copies: count(&account.copies),
        unreadable: count(&account.unreadable),
        left,
    };
    context.out.say(&done, |out| {
        out.line(format!(
            "collected: {} new, {} failed again, {} copies; {} unreadable; {} left in the queue",
            done.new, done.again, done.copies, done.unreadable, done.left
        ))
    })?;
    // Cut short, messages may be in hand that are not in the queue yet.
    Ok(if ended.is_some() && (left == 0 || wish.follow) {
        Exit::Done
    } else {
        Exit::Partly
    })
}

/// Resolves once nothing is in the queue. What is handed out and not acknowledged does not count: it is somebody's, perhaps
/// ours.
async fn drained(connection: &Connection, hidden: &str, follow: bool, account: &Collected) -> Result<(), BrokerError> {
    if follow {
        return std::future::pending().await;
    }
    // Where there is no room for more it ends as well, and says what is left.
    while !account.full.load(Ordering::Relaxed) && waiting(connection, hidden).await? > 0 {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// What is ready in the queues of dead letters.
async fn waiting(connection: &Connection, hidden: &str) -> Result<u32, BrokerError> {
    let mut all = 0_u32;
    for queue in [topology::DEAD, topology::BROKER_MADE, hidden] {
        match topology::depth_of(connection, queue).await {
            Ok(ready) => all = all.saturating_add(ready),
            // `settled topology` of an earlier version has not made it, and so nothing is in it.
            Err(BrokerError::Refused { code: 404, .. }) if queue == hidden => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}
