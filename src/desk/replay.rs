//! Replays: what was planned is judged by the worker, with effect. A run is begun (or taken up), driven, and reported on.

use std::future::Future;

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Author, Came, Command, Consent, Desk, Moved, Page, PlanAct, Refusal, Run,
    act::no_such_plan,
    drive::{self, Ended, RunNews},
};
use crate::{
    domain::calendar::rfc3339,
    store::runs::{Driver, NewRun, RunChange, RunState},
};

/// A replay of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    pub plan: i64,
    /// The first so many; the rest only if each of them comes to the verdict that was planned.
    pub canary: Option<i32>,
    /// Messages a second after the canary.
    pub rate: Option<f64>,
    /// Also those that would not settle.
    pub all_verdicts: bool,
    /// Also those that were replayed `dead_letters.max_replays` times.
    pub yes_again: bool,
    pub author: Author,
}

impl Replay {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "replay"]);
        command.word(self.plan);
        command.flag("--canary", self.canary);
        command.flag("--rate", self.rate);
        command.switch("--all-verdicts", self.all_verdicts);
        command.switch("--yes-again", self.yes_again);
        self.author.add_to(&mut command);
        command
    }
}

/// Going on with a run that was cancelled, stopped, or whose program is gone.
#[derive(Clone, Debug, PartialEq)]
pub struct Resume {
    pub run: i64,
    /// Messages a second from now on; as before if left out.
    pub rate: Option<f64>,
    /// Also those that were replayed `dead_letters.max_replays` times, by other runs meanwhile.
    pub yes_again: bool,
    pub author: Author,
}

impl Resume {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "runs", "resume"]);
        command.word(self.run);
        command.flag("--rate", self.rate);
        command.switch("--yes-again", self.yes_again);
        self.author.add_to(&mut command);
        command
    }
}

/// Stopping a run between two messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cancel {
    pub run: i64,
    pub author: Author,
}

impl Cancel {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "runs", "cancel"]);
        command.word(self.run);
        self.author.add_to(&mut command);
        command
    }
}

/// A run that is ours to drive, until its lease is over.
#[derive(Clone, Debug)]
pub struct Begun {
    pub run: i64,
    driver: Driver,
    canary: Option<i64>,
    /// Of the act that began it, which is also the one that ends it.
    author: Author,
    filters: Value,
}

/// What a run came to, or has come to so far.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RunOutcome {
    pub run: Run,
    /// Every message is judged, and as planned.
    pub as_planned: bool,
    pub came_to: Vec<Came>,
    pub money: Vec<Moved>,
}

impl Desk {
    /// How many messages a replay would take.
    ///
    /// # Errors
    /// There is no such plan, or nothing of it would settle; the database is away.
    pub async fn replay_size(&self, wish: &Replay) -> Result<usize, Refusal> {
        let plan = self.plan_record(wish.plan).await?;
        let messages = if wish.all_verdicts {
            i64::from(plan.messages)
        } else {
            plan.settled
        };
        if messages == 0 {
            return Err(Refusal::refused(format!(
                "nothing of plan {} would settle: there is nothing to replay",
                plan.id
            ))
            .hint("--all-verdicts replays what would not settle, too"));
        }
        Ok(usize::try_from(messages).unwrap_or(usize::MAX))
    }

    /// Refuses to replay what was replayed too often, unless somebody said that it is meant.
    ///
    /// # Errors
    /// There are such messages; the database is away.
    pub async fn mind_circles(&self, wish: &Replay) -> Result<(), Refusal> {
        if wish.yes_again {
            return Ok(());
        }
        let most = self.settings.dead_letters.max_replays;
        let worn = self.store.count_replayed(wish.plan, wish.all_verdicts, most).await?;
        self.not_worn(worn, &format!("plan {}", wish.plan))
    }

    fn not_worn(&self, worn: i64, of: &str) -> Result<(), Refusal> {
        if worn == 0 {
            return Ok(());
        }
        let most = self.settings.dead_letters.max_replays;
        Err(Refusal::usage(format!(
            "messages of {of} that were replayed dead_letters.max_replays ({most}) times or more, and are open again: {worn}; \
             they may go in circles, and nothing was done"
        ))
        .hint("`settled dead-letters show` says what each came to; give --yes-again if you mean it"))
    }

    /// Begins a run. Whoever does drives it.
    ///
    /// # Errors
    /// As [`Desk::replay_size`]; there are many and nobody consented, or nobody else approved it.
    pub async fn begin(&self, wish: &Replay, consent: Consent) -> Result<Begun, Refusal> {
        let messages = self.replay_size(wish).await?;
        self.mind_circles(wish).await?;
        self.need(consent, messages, "replaying")?;
        let size = self.size_of(wish.plan, wish.all_verdicts, messages).await?;
        self.second_person(Some(wish.plan), PlanAct::Replay, &wish.author, &size)
            .await?;
        let filters = json!({"plan": wish.plan, "canary": wish.canary, "rate": wish.rate, "allVerdicts": wish.all_verdicts,
                   "yesAgain": wish.yes_again});
        let act = wish.author.act("replay", &filters);
        let new = NewRun {
            plan: wish.plan,
            canary: wish.canary,
            rate: wish.rate,
            all_verdicts: wish.all_verdicts,
            voucher: self.voucher.clone(),
        };
        let driver = self.driver();
        let Some(run) = self
            .patiently(async || self.store.begin_run(act, &new, driver).await)
            .await?
        else {
            return Err(no_such_plan(wish.plan));
        };
        Ok(Begun {
            run,
            driver,
            canary: wish.canary.map(i64::from),
            author: wish.author.clone(),
            filters,
        })
    }

    /// Takes up a run.
    ///
    /// # Errors
    /// There is no such run, or it is not one to go on with; the database is away.
    pub async fn resume(&self, wish: &Resume) -> Result<Begun, Refusal> {
        self.run(wish.run).await?;
        if !wish.yes_again {
            // Other runs may have replayed them meanwhile.
            let most = self.settings.dead_letters.max_replays;
            let worn = self.store.count_waiting_worn(wish.run, most).await?;
            self.not_worn(worn, &format!("run {}", wish.run))?;
        }
        let filters = json!({"run": wish.run, "rate": wish.rate, "yesAgain": wish.yes_again});
        let act = wish.author.act("resume", &filters);
        let driver = self.driver();
        let was = match self
            .patiently(async || self.store.resume_run(act, wish.run, wish.rate, driver).await)
            .await?
        {
            RunChange::From(state) => state,
            RunChange::NoSuchRun => return Err(no_such_run(wish.run)),
            RunChange::Refused(RunState::Running, until) => {
                let until = until.map(rfc3339).unwrap_or_default();
                return Err(
                    Refusal::refused(format!("run {} is driven by another program", wish.run)).hint(format!(
                        "it gave a sign of life that holds until {until}; if it is gone, try again after that, or cancel the run"
                    )),
                );
            }
            RunChange::Refused(state, _) => {
                return Err(Refusal::refused(format!(
                    "run {} is {}: there is nothing to go on with",
                    wish.run,
                    state.as_str()
                )));
            }
        };
        let run = self.run(wish.run).await?;
        // Whoever goes on with a run that its canary stopped has seen what it came to.
        let is_judged = run.canary.is_some_and(|canary| run.judged >= i64::from(canary));
        let is_seen = is_judged && (was == RunState::Stopped || run.differ == 0);
        Ok(Begun {
            run: run.id,
            driver,
            canary: run.canary.filter(|_| !is_seen).map(i64::from),
            author: wish.author.clone(),
            filters,
        })
    }

    fn driver(&self) -> Driver {
        Driver {
            id: Uuid::new_v4(),
            lease: self.settings.dead_letters.driver_lease,
        }
    }

    /// Drives a run that is ours to its end, and says what came of it. Once `stop` says why, it is cancelled between two
    /// messages; `told` is told how far it is.
    ///
    /// # Errors
    /// The database is away: the run goes on where it stands, once somebody resumes it.
    pub async fn drive(
        &self,
        begun: &Begun,
        stop: impl Future<Output = String>,
        told: impl FnMut(&Run, RunNews),
    ) -> Result<RunOutcome, Refusal> {
        let Begun {
            run: id,
            driver,
            canary,
            ..
        } = *begun;
        let stalled = |refusal: Refusal| {
            refusal.hint(format!(
                "run {id} goes on where it stands: `settled dead-letters runs resume {id} --reason ...`, which is refused until \
                 the lease of this program, {:?}, is over",
                driver.lease
            ))
        };
        // Between two statements it may be dropped at any point: an open transaction is rolled back.
        let end = tokio::select! {
            ended = drive::drive(&self.store, &self.settings.dead_letters, id, driver, canary, told) => {
                match ended.map_err(|error| stalled(error.into()))? {
                    Ended::Over => Some((RunState::Done, None)),
                    Ended::Stop(why) => Some((RunState::Stopped, Some(why))),
                    Ended::Lost => None,
                }
            }
            why = stop => Some((RunState::Cancelled, Some(why))),
        };
        let Some((state, note)) = end else {
            return self.outcome(id).await;
        };
        let ending = begun.author.act("replay ended", &begun.filters);
        self.patiently(async || self.store.end_run(ending, id, driver.id, state, note.as_deref()).await)
            .await
            .map_err(|error| stalled(error.into()))?;
        self.outcome(id).await
    }

    /// Stops a run between two messages, wherever it is driven.
    ///
    /// # Errors
    /// There is no such run, or it is not running; the database is away.
    pub async fn cancel(&self, wish: &Cancel) -> Result<RunOutcome, Refusal> {
        self.run(wish.run).await?;
        let filters = json!({"run": wish.run});
        let act = wish.author.act("cancel", &filters);
        match self
            .patiently(async || self.store.cancel_run(act, wish.run).await)
            .await?
        {
            RunChange::From(_) => {}
            RunChange::NoSuchRun => return Err(no_such_run(wish.run)),
            RunChange::Refused(state, _) => {
                return Err(Refusal::refused(format!(
                    "run {} is {} already; nothing was changed",
                    wish.run,
                    state.as_str()
                )));
            }
        }
        self.outcome(wish.run).await
    }

    /// What a run came to so far.
    ///
    /// # Errors
    /// There is no such run; the database is away.
    pub async fn outcome(&self, id: i64) -> Result<RunOutcome, Refusal> {
        let (found, money) = tokio::try_join!(self.store.run_came(id), self.store.run_money(id))?;
        let (run, came_to) = found.ok_or_else(|| no_such_run(id))?;
        self.mind_limits(&run).await?;
        Ok(RunOutcome {
            as_planned: run.judged == run.messages && run.differ == 0,
            run,
            came_to,
            money,
        })
    }

    /// How many messages going on with a run would replay now. It skips what waits and is not open any more.
    ///
    /// # Errors
    /// There is no such run; the database is away.
    pub async fn goes_on(&self, id: i64) -> Result<i64, Refusal> {
        self.run(id).await?;
        Ok(self.store.count_going_on(id).await?)
    }

    async fn run(&self, id: i64) -> Result<Run, Refusal> {
        let run = self.store.run(id).await?.ok_or_else(|| no_such_run(id))?;
        self.mind_limits(&run).await?;
        Ok(run)
    }

    /// A run of what is somebody else's is not there.
    async fn mind_limits(&self, run: &Run) -> Result<(), Refusal> {
        if self.limits().is_some() && self.plan_record(run.plan).await.is_err() {
            return Err(no_such_run(run.id));
        }
        Ok(())
    }

    /// Runs, the newest first, after one of them.
    ///
    /// # Errors
    /// The database is away.
    pub async fn runs(&self, after: Option<i64>, limit: i64) -> Result<Page<Run>, Refusal> {
        let runs = self
            .store
            .runs(after.unwrap_or(i64::MAX), self.limits(), limit + 1)
            .await?;
        Ok(Page::of(runs, limit))
    }
}

fn no_such_run(id: i64) -> Refusal {
    Refusal::refused(format!("there is no run {id}")).hint("`settled dead-letters runs list` shows every run")
}
