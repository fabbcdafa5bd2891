//! Carries a plan out: registers, deposits, reserves, publishes at its pace, and listens.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinHandle};

use super::{
    account::Accounting,
    pace::Pace,
    plan::{Plan, WAVES_BETWEEN},
};
use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        intake::Intake,
        subscribe::{self, Lifetime},
        topology,
    },
    cli::Failure,
    config::RetrySettings,
    domain::delivery::Source,
    partner::{Post, Reservation, SigningPartner},
    retry::{self, Backoff, Waited},
    store::{
        Fate, Store, StoreError,
        funds::{FundsMoved, FundsWay},
        registry::{By, KeyProof, NewConnection, NewKey, NewPartner, Registered},
    },
};

/// How long a parked message waits before its allocation is reserved.
const LATE: Duration = Duration::from_secs(2);
/// Reservations in one transaction.
const RESERVE_MAX: usize = 500;
/// What the names of our partners begin with: nobody's else do.
pub(in crate::cli) const MADE_BY_US: &str = "Simulated partner";
/// Who acts, for the audit.
const BY: By<'static> = By {
    operator: "settled simulate",
    why: None,
};
/// Messages published together where there is no pace.
const TOGETHER: usize = 64;
const PREFETCH: u16 = 1_000;
const BATCH_BYTES: usize = 8_388_608;

/// Puts partners, keys, connections, funds and reservations where the commands put them.
pub(in crate::cli) struct Registrar {
    pub(in crate::cli) store: Store,
    pub(in crate::cli) retry: RetrySettings,
    /// How long the database may be away.
    pub(in crate::cli) patience: Duration,
}

impl Registrar {
    /// Does what may be done twice, again while the database is away or busy.
    async fn again<T>(&self, mut work: impl AsyncFnMut() -> Result<T, StoreError>) -> Result<T, Failure> {
        let mut wait = Wait::new(self);
        loop {
            match work().await {
                Ok(done) => return Ok(done),
                Err(error) => wait.after(error).await?,
            }
        }
    }

    /// `partner add`, `key add` and `connection add`.
    pub(in crate::cli) async fn register(&self, partner: &SigningPartner, name: &str) -> Result<(), Failure> {
        let wish = NewPartner {
            enterprise_id: partner.enterprise_id.clone(),
            name: name.to_owned(),
            async_allocations: true,
            async_deallocations: true,
            broker_user: partner.user_id.clone(),
            own_queue: false,
        };
        added(
            &self.again(async || self.store.add_partner(&wish, BY).await).await?,
            "partner",
            &wish.enterprise_id,
        )?;
        let wish = NewKey {
            proof: KeyProof::default(),
            enterprise_id: partner.enterprise_id.clone(),
            public_key: partner.key.public_key(),
            valid_from: None,
            valid_until: None,
        };
        added(
            &self.again(async || self.store.add_key(&wish, BY).await).await?,
            "key",
            &wish.enterprise_id,
        )?;
        let wish = NewConnection {
            connection_id: partner.connection_id,
            enterprise_id: partner.enterprise_id.clone(),
            client_id: partner.client_id,
            partners_client_id: partner.partners_client_id.clone(),
            partners_connection_id: partner.partners_connection_id.clone(),
        };
        added(
            &self.again(async || self.store.add_connection(&wish, BY).await).await?,
            "connection",
            &wish.enterprise_id,
        )
    }

    /// Everybody of a plan.
    pub(in crate::cli) async fn register_all(&self, plan: &Plan) -> Result<(), Failure> {
        for partner in &plan.partners {
            self.register(partner, &format!("{MADE_BY_US} {}", partner.enterprise_id))
                .await?;
        }
        self.register(&plan.bound, &format!("{MADE_BY_US} bound to a broker user"))
            .await?;
        self.register(&plan.suspended, &format!("{MADE_BY_US}, suspended"))
            .await?;
        let suspended = &plan.suspended.enterprise_id;
        self.again(async || self.store.suspend_partner(suspended, BY).await)
            .await?;
        Ok(())
    }

    /// `deposit`.
    pub(in crate::cli) async fn deposit_all(&self, plan: &Plan) -> Result<(), Failure> {
        for deposit in &plan.deposits {
            let put = self
                .again(async || {
                    self.store
                        .move_funds(FundsWay::In, deposit.client_id, &deposit.amount, &deposit.reference, BY)
                        .await
                })
                .await?;
            if let FundsMoved::Conflict(_) = put {
                return Err(Failure::refused(format!(
                    "the deposit {} is there with other content",
                    deposit.reference
                )));
            }
        }
        Ok(())
    }

    /// `allocation reserve`.
    pub(in crate::cli) async fn reserve(&self, reservations: &[Reservation]) -> Result<(), Failure> {
        for part in reservations.chunks(RESERVE_MAX) {
            let text = serde_json::to_string(part)
                .map_err(|error| Failure::ours(format!("a reservation is no JSON: {error}")))?;
            // Not by `again`: a future with an asynchronous closure cannot be spawned.
            let mut wait = Wait::new(self);
            let answers = loop {
                match self.store.reserve(&text, BY).await {
                    Ok(answers) => break answers,
                    Err(error) => wait.after(error).await?,
                }
            };
            for (reservation, answer) in part.iter().zip(answers) {
                // An attempt whose commit was not heard of may have been the first.
                if answer.result == "refused" {
                    let why = answer.reason.unwrap_or_default();
                    return Err(Failure::refused(format!(
                        "the reservation {} was refused: {why}",
                        reservation.id
                    )));
                }
            }
        }
        Ok(())
    }
}

/// The waits between tries of one thing.
struct Wait<'a> {
    desk: &'a Registrar,
    backoff: Backoff,
    began: Instant,
}

impl<'a> Wait<'a> {
    fn new(desk: &'a Registrar) -> Self {
        Self {
            desk,
            backoff: Backoff::new(&desk.retry),
            began: Instant::now(),
        }
    }

    /// A while, if it may pass and there is patience left; otherwise the error.
    async fn after(&mut self, error: StoreError) -> Result<(), Failure> {
        let patient = self.began.elapsed() < self.desk.patience;
        let again = match error.fate {
            Fate::Retry => patient || self.backoff.attempts() < self.desk.retry.transient_attempts,
            Fate::Away => patient,
            Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken | Fate::Full => false,
        };
        if !again {
            return Err(error.into());
        }
        tokio::time::sleep(self.backoff.next()).await;
        Ok(())
    }
}

fn added<T>(outcome: &Registered<T>, what: &str, enterprise_id: &str) -> Result<(), Failure> {
    match outcome {
        Registered::Added(_) | Registered::Exists(_) | Registered::Updated(_) => Ok(()),
        Registered::Conflict(_)
        | Registered::Revoked(_)
        | Registered::NoPartner
        | Registered::NeverValid
        | Registered::Unproven(_) => Err(Failure::refused(format!(
            "the {what} of {enterprise_id} could not be registered: the database has another"
        ))),
    }
}

/// A subscriber at work.
pub(in crate::cli) struct Subscriber {
    settings: BrokerSettings,
    queue: String,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Subscriber {
    /// Binds a queue of its own, and tells the account everything it receives. Returns when it is bound.
    pub(in crate::cli) async fn start(
        settings: &BrokerSettings,
        retry: &RetrySettings,
        queue: String,
        dead_letters: bool,
        account: Arc<Accounting>,
    ) -> Result<Self, Failure> {
        let (stop, stopping) = watch::channel(false);
        let mut listener = Listener {
            settings: settings.clone(),
            queue: queue.clone(),
            dead_letters,
            account,
            stopping,
        };
        let first = listener.attach().await?;
        let backoff = Backoff::new(retry);
        let task = tokio::spawn(async move { listener.listen(first, backoff).await });
        Ok(Self {
            settings: settings.clone(),
            queue,
            stop,
            task,
        })
    }

    /// Stops listening; the queue goes.
    pub(in crate::cli) async fn end(self) {
        self.stop.send_replace(true);
        // Its only ends are this one and a fault that the account knows of.
        drop(self.task.await);
        let deleted = async {
            let connection = Connection::open(&self.settings, "settled simulate clean up").await?;
            subscribe::delete(&connection, &self.queue).await?;
            connection.close().await
        };
        // What is left goes by itself when nobody has used it for a while.
        drop(deleted.await);
    }
}

struct Listener {
    settings: BrokerSettings,
    queue: String,
    dead_letters: bool,
    account: Arc<Accounting>,
    stopping: watch::Receiver<bool>,
}

impl Listener {
    async fn attach(&mut self) -> Result<(Connection, Intake), BrokerError> {
        let connection = Connection::open(&self.settings, "settled simulate subscriber").await?;
        let bindings = [(topology::EVENTS, "#"), (topology::DEAD, "#")];
        let bindings = if self.dead_letters {
            &bindings[..]
        } else {
            &bindings[..1]
        };
        subscribe::declare(&connection, &self.queue, Lifetime::Durable, bindings).await?;
        let intake = Intake::attach(&connection, &self.queue, PREFETCH, usize::from(PREFETCH), BATCH_BYTES).await?;
        Ok((connection, intake))
    }

    async fn listen(&mut self, first: (Connection, Intake), mut backoff: Backoff) {
        let mut link = Some(first);
        loop {
            match link.take() {
                Some((connection, intake)) => {
                    if !self.consume(intake).await {
                        drop(connection.close().await);
                        return;
                    }
                }
                None => {
                    if let Ok(again) = self.attach().await {
                        backoff.reset();
                        link = Some(again);
                        continue;
                    }
                }
            }
            if backoff.wait(&mut self.stopping).await == Waited::Stopping {
                return;
            }
        }
    }

    /// Takes events until it is told to stop (false) or the broker is lost: what was not acknowledged comes again.
    async fn consume(&mut self, mut intake: Intake) -> bool {
        let disposer = intake.disposer();
        loop {
            let batch = tokio::select! {
                biased;
                () = retry::stopped(&mut self.stopping) => return false,
                batch = intake.next() => match batch {
                    Ok(batch) => batch,
                    Err(_) => return true,
                },
            };
            let mut highest = None;
            for delivery in &batch.deliveries {
                self.account.hear(delivery);
                if let Source::Queue { delivery_tag } = delivery.source {
                    highest = Some(delivery_tag);
                }
            }
            if disposer.acknowledge(highest).await.is_err() {
                return true;
            }
        }
    }
}

/// Publishes a plan's waves.
pub(in crate::cli) struct Drive {
    pub(in crate::cli) plan: Arc<Plan>,
    pub(in crate::cli) account: Arc<Accounting>,
    pub(in crate::cli) desk: Arc<Registrar>,
    pub(in crate::cli) post: Post,
    /// Messages that go out at once whatever the pace, so that a fault hits traffic.
    pub(in crate::cli) hurry: Arc<AtomicUsize>,
    /// How long a wave that builds on answers waits for the next one.
    pub(in crate::cli) timeout: Duration,
}

impl Drive {
    /// Publishes these waves at so many messages a second; as fast as it goes if None. False: it gave up waiting for
    /// answers.
    pub(in crate::cli) async fn waves(
        &mut self,
        waves: std::ops::Range<usize>,
        rate: Option<f64>,
        mut told: impl FnMut(),
    ) -> Result<bool, Failure> {
        let plan = Arc::clone(&self.plan);
        let mut pace = Pace::new(rate, Instant::now());
        for number in waves {
            let Some(wave) = plan.waves.get(number) else { break };
            if !self.wait_for_base(number, &mut told).await {
                return Ok(false);
            }
            self.desk.reserve(&wave.reservations).await?;
            self.publish(wave.items.clone(), &mut pace, &mut told).await?;
        }
        Ok(true)
    }

    /// Publishes these waves one after another without a pause. They may not build on each other: there are at most
    /// [`WAVES_BETWEEN`].
    pub(in crate::cli) async fn burst(
        &mut self,
        waves: std::ops::Range<usize>,
        mut told: impl FnMut(),
    ) -> Result<bool, Failure> {
        let plan = Arc::clone(&self.plan);
        let waves: Vec<_> = waves
            .filter_map(|number| Some((number, plan.waves.get(number)?)))
            .collect();
        for (number, wave) in &waves {
            if !self.wait_for_base(*number, &mut told).await {
                return Ok(false);
            }
            self.desk.reserve(&wave.reservations).await?;
        }
        let mut pace = Pace::new(None, Instant::now());
        for (_, wave) in waves {
            self.publish(wave.items.clone(), &mut pace, &mut told).await?;
        }
        Ok(true)
    }

    /// Waits until everything is answered that a wave may build on. If that takes too long the account says so, and
    /// nothing more is published.
    async fn wait_for_base(&self, wave: usize, told: &mut impl FnMut()) -> bool {
        let base = wave
            .checked_sub(WAVES_BETWEEN)
            .and_then(|earlier| self.plan.waves.get(earlier));
        let needed = base.map_or(0, |base| base.items.end);
        let mut seen = (0, Instant::now());
        loop {
            let answered = self
                .account
                .until(Instant::now() + Duration::from_millis(250), |account| {
                    told();
                    account.answered_before(needed)
                });
            if answered.await {
                return true;
            }
            let progress = self.account.progress();
            if progress.answered != seen.0 {
                seen = (progress.answered, Instant::now());
            } else if seen.1.elapsed() >= self.timeout {
                self.account.problem(format!(
                    "{} of {} published messages were answered, and then none for {:?}: is a worker running, and ready?",
                    progress.answered, progress.published, self.timeout
                ));
                return false;
            }
        }
    }

    async fn publish(
        &mut self,
        items: std::ops::Range<usize>,
        pace: &mut Pace,
        told: &mut impl FnMut(),
    ) -> Result<(), Failure> {
        pace.begin(Instant::now());
        let mut next = items.start;
        while next < items.end {
            let left = items.end - next;
            // Beside the pace, which they do not count against.
            let hurry = self.hurry.swap(0, Ordering::Relaxed).min(left);
            let allowed = pace.allowed(Instant::now(), TOGETHER).min(left - hurry);
            let count = hurry + allowed;
            if count == 0 {
                told();
                tokio::time::sleep(Duration::from_millis(2)).await;
                continue;
            }
            pace.sent(allowed);
            let chosen = next..next + count;
            let publications: Vec<_> = self
                .plan
                .items
                .get(chosen.clone())
                .into_iter()
                .flatten()
                .map(|item| item.publication.clone())
                .collect();
            self.account.publishing(chosen);
            self.post
                .publish(&publications)
                .await
                .map_err(|error| match error.code() {
                    Some(312 | 404) => Failure::refused(error.to_string()).hint("run `settled topology`"),
                    _ => error.into(),
                })?;
            next += count;
            told();
        }
        Ok(())
    }

    /// Reserves, some time after they were parked, what messages wait for.
    pub(in crate::cli) fn reserve_late(&self) -> JoinHandle<Result<(), Failure>> {
        let (plan, account, desk) = (
            Arc::clone(&self.plan),
            Arc::clone(&self.account),
            Arc::clone(&self.desk),
        );
        let deadline = Instant::now() + self.timeout + Duration::from_secs(3_600);
        tokio::spawn(async move {
            let parked = |account: &Accounting| plan.late.iter().all(|(item, _)| account.is_answered(*item));
            if !account.until(deadline, parked).await {
                return Ok(());
            }
            tokio::time::sleep(LATE).await;
            let reservations: Vec<Reservation> = plan.late.iter().map(|(_, reservation)| reservation.clone()).collect();
            desk.reserve(&reservations).await
        })
    }
}
