//! Taking a partner's own queue away: its messages go to the common queue again, what is in its own is settled, and only
//! then does it go. Each step leaves every message where a worker takes it, and can be done again.

use std::time::{Duration, Instant};

use crate::{
    broker::{
        Connection,
        own_queue::{self, QueueLoad},
        topology,
    },
    cli::{Context, Failure, output::complain},
};

/// How often the queue is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// What was on its way into the queue when it was unbound has come by then.
const SETTLED: Duration = Duration::from_secs(1);
/// A worker that attaches again takes less.
const NOBODY: Duration = Duration::from_secs(15);
/// How often it is said how much is left.
const PROGRESS: Duration = Duration::from_secs(2);

/// A partner's own queue that is to go.
pub(super) struct Removal<'a> {
    context: &'a Context,
    connection: &'a Connection,
    enterprise_id: &'a str,
    queue: String,
    until: Instant,
    wait: Duration,
}

impl<'a> Removal<'a> {
    pub(super) fn new(
        context: &'a Context,
        connection: &'a Connection,
        enterprise_id: &'a str,
        wait: Duration,
    ) -> Self {
        Self {
            context,
            connection,
            enterprise_id,
            queue: topology::own_queue(enterprise_id),
            until: Instant::now() + wait,
            wait,
        }
    }

    async fn look(&self) -> Result<Option<QueueLoad>, Failure> {
        Ok(own_queue::held(self.connection, self.enterprise_id).await?)
    }

    /// Sends the partner's messages to the common queue, and waits until nothing is left in its own. Where that is in vain
    /// everything is as before.
    pub(super) async fn drain(&self) -> Result<(), Failure> {
        let Some(held) = self.look().await? else {
            return Ok(());
        };
        if held.ready > 0 && held.consumers == 0 {
            return Err(self.nobody(held).hint(
                "start a worker (`settled worker`) and say it again. If one is running: worker.own_queues_max bounds how many \
                 it consumes, and one that is not registered as own is consumed after `settled partner set --own-queue on`",
            ));
        }
        // What the broker can not dead-letter stays in the queue, unseen, and would go with it.
        let fitness = topology::fitness(self.connection, &self.queue).await?;
        if let Some(problem) = fitness.problem {
            return Err(Failure::refused(format!(
                "{} stays: the broker may hold refused messages in it that it can not pass on ({problem}); nothing was changed",
                self.queue
            ))
            .hint("`settled doctor` says what to mend"));
        }
        own_queue::unbind(self.connection, self.enterprise_id).await?;
        match self.wait_for_ready().await {
            Ok(()) => Ok(()),
            Err(failure) => {
                own_queue::declare(self.connection, self.enterprise_id).await?;
                Err(failure)
            }
        }
    }

    fn nobody(&self, held: QueueLoad) -> Failure {
        Failure::refused(format!(
            "{} holds {} messages and nobody consumes it; nothing was changed",
            self.queue, held.ready
        ))
    }

    async fn wait_for_ready(&self) -> Result<(), Failure> {
        let mut progress = Progress::new(self.context.out.json);
        let mut empty_since = None;
        let mut alone_since = None;
        loop {
            let Some(held) = self.look().await? else {
                return Ok(());
            };
            if lasts(held.ready == 0, &mut empty_since) >= SETTLED {
                return Ok(());
            }
            if lasts(held.ready > 0 && held.consumers == 0, &mut alone_since) >= NOBODY {
                return Err(self
                    .nobody(held)
                    .hint("the worker went away: start one, and say it again"));
            }
            if Instant::now() >= self.until {
                return Err(Failure::refused(format!(
                    "{} still holds {} messages after {:?}; it takes the partner's messages again, and nothing was changed",
                    self.queue, held.ready, self.wait
                ))
                .hint("wait until the worker has caught up, or give it longer with --wait"));
            }
            progress.say(&self.queue, held);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Deletes the queue once no worker has anything of it. `Err` says why it is still there: nothing is lost by that.
    pub(super) async fn remove(&self) -> Result<Result<Option<&'static str>, String>, Failure> {
        if self.look().await?.is_none() {
            return Ok(Ok(None));
        }
        let mut progress = Progress::new(self.context.out.json);
        let mut nothing_since = None;
        loop {
            let Some(held) = self.look().await? else {
                return Ok(Ok(Some("gone")));
            };
            if lasts(held.is_nothing(), &mut nothing_since) >= SETTLED {
                break;
            }
            if Instant::now() >= self.until {
                let QueueLoad { ready, consumers } = held;
                return Ok(Err(format!(
                    "still there: {ready} messages are in it, and {consumers} consumers have not let go of it. Nothing is \
                     lost: its messages are settled as before, and no new ones come. Say it again to delete it (a worker of \
                     an older version lets go when it stops)"
                )));
            }
            progress.say(&self.queue, held);
            tokio::time::sleep(LOOK).await;
        }
        match own_queue::delete(self.connection, self.enterprise_id).await? {
            0 => Ok(Ok(Some("empty, and deleted"))),
            gone => Err(Failure::ours(format!(
                "{gone} messages came into {} while it was deleted, from outside of settlement.updates: they are gone",
                self.queue
            ))
            .hint("whoever publishes to that queue by its name must send them again")),
        }
    }
}

/// How long it has been so, look after look.
fn lasts(is_so: bool, since: &mut Option<Instant>) -> Duration {
    if !is_so {
        *since = None;
        return Duration::ZERO;
    }
    since.get_or_insert_with(Instant::now).elapsed()
}

/// Says on stderr how much is left, where people look.
struct Progress {
    silent: bool,
    said: Option<Instant>,
}

impl Progress {
    fn new(silent: bool) -> Self {
        Self { silent, said: None }
    }

    fn say(&mut self, queue: &str, held: QueueLoad) {
        let due = self.said.is_none_or(|said| said.elapsed() >= PROGRESS);
        if self.silent || !due {
            return;
        }
        self.said = Some(Instant::now());
        let QueueLoad { ready, consumers } = held;
        complain(&format!("{queue}: {ready} messages wait, {consumers} consumers"));
    }
}
