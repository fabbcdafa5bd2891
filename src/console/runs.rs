//! Runs: how far a replay is, its verdicts against the plan, stop and go on. A run that is begun here is driven here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{
    Site,
    acts::must_be_seen,
    again::{After, Typed, or_form},
    answer::{NotDone, Notice, page, see, status_under},
    aside,
    ask::Ask,
    fields::query_of,
    frame::Frame,
    routes::Screen,
    shared::Shared,
    shown::{At, Chip, Digits},
};
use crate::{
    desk::{Author, Begun, Cancel, Desk, Moment, Refusal, RefusalKind, Resume, RunOutcome, Which},
    retry::stopped,
};

/// Those who drive the runs that were begun here.
pub(super) struct Drivers {
    pub(super) places: Arc<Semaphore>,
    pub(super) stop: watch::Receiver<bool>,
}

impl Drivers {
    /// A place for one more.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, NotDone> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            NotDone::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "this console drives as many runs as it may (console.runs_max); nothing was done",
            )
            .hint("wait until one of them is over, or use the command line")
        })
    }

    /// Drives a run to its end, or until the program stops, which cancels it between two messages.
    pub(super) fn drive(&self, desk: &Desk, begun: Begun, place: OwnedSemaphorePermit) {
        let (desk, mut stop) = (desk.clone(), self.stop.clone());
        // Without a thread it is stalled at once, which its page says.
        let _driven = aside::lasting(move || async move {
            let stop = async {
                stopped(&mut stop).await;
                "the console was stopped".to_owned()
            };
            // What goes wrong is seen on the run's page: it is stalled then, and can be gone on with.
            drop(desk.drive(&begun, stop, |_, _| {}).await);
            drop(place);
        });
    }

    /// Waits until nothing is driven.
    pub(super) async fn empty(&self, most: usize) {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        drop(self.places.acquire_many(most).await);
    }
}

/// Messages a second, where a form says it.
pub(super) fn rate(ask: &Ask) -> Result<Option<f64>, NotDone> {
    let rate: Option<f64> = ask.fields.number("rate")?;
    match rate {
        Some(rate) if !(rate.is_finite() && (0.001..=1_000_000.0).contains(&rate)) => Err(NotDone::wrong(
            "rate: from 0.001 to 1000000 messages a second; nothing was done",
        )),
        rate => Ok(rate),
    }
}

#[derive(Template)]
#[template(path = "runs.html")]
struct RunsPage {
    frame: Frame,
    lines: Vec<RunLine>,
    next: Option<String>,
}

struct RunLine {
    id: i64,
    plan: i64,
    state: Chip,
    at: At,
    operator: String,
    why: String,
    differ: Digits,
    judged: Digits,
    messages: Digits,
}

pub(super) async fn runs(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let after = ask.fields.number("after")?;
    let found = ask.desk.runs(after, i64::from(site.settings.page)).await?;
    let next = found.items.last().filter(|_| found.more);
    let next = next.map(|last| query_of(&[("after", last.id.to_string())]));
    let lines = found.items.into_iter().map(|run| RunLine {
        id: run.id,
        plan: run.plan,
        state: Chip::of_run(run.state),
        at: At(run.started_at),
        operator: run.operator,
        why: run.why,
        differ: Digits::of(run.differ),
        judged: Digits::of(run.judged),
        messages: Digits::of(run.messages),
    });
    Ok(page(
        StatusCode::OK,
        &RunsPage {
            lines: lines.collect(),
            next,
            frame: ask.frame("runs", "Runs"),
        },
    ))
}

#[derive(Template)]
#[template(path = "run.html")]
struct RunPage {
    frame: Frame,
    id: i64,
    plan: i64,
    state: Chip,
    moves: bool,
    operator: String,
    why: String,
    at: At,
    note: Option<String>,
    messages: i64,
    over: i64,
    due: i64,
    waiting: i64,
    skipped: i64,
    canary: String,
    rate: String,
    differ: Digits,
    new_failures: Digits,
    came: Vec<CameLine>,
    money: Vec<(String, Digits, Digits)>,
    act_heading: &'static str,
    can_cancel: bool,
    cancel_barred: Option<String>,
    cancel_command: String,
    can_resume: bool,
    /// Messages that going on with it would replay: those that wait, and are open.
    goes_on: i64,
    typed: Typed,
    resume_barred: Option<String>,
    resume_command: String,
}

struct CameLine {
    planned: Chip,
    came: String,
    chip: Chip,
    messages: Digits,
}

/// A run, as everybody who watches it sees it.
pub(super) struct RunSeen {
    outcome: RunOutcome,
    new_failures: i64,
    goes_on: i64,
}

/// Where a run can be gone on with.
fn can_resume(state: &str) -> bool {
    matches!(state, "cancelled" | "stopped" | "stalled")
}

async fn look(desk: Desk, id: i64) -> Result<RunSeen, Refusal> {
    let outcome = desk.outcome(id).await?;
    let since = Which {
        since: Some(Moment::At(outcome.run.started_at.into())),
        ..Which::default()
    };
    let goes_on = async {
        match can_resume(outcome.run.state) {
            true => desk.goes_on(id).await,
            false => Ok(0),
        }
    };
    let (new_failures, goes_on) = tokio::try_join!(desk.count_letters(&since), goes_on)?;
    Ok(RunSeen {
        outcome,
        new_failures,
        goes_on,
    })
}

pub(super) async fn run(site: &Site, ask: &Ask, after: Option<After>) -> Result<Response, NotDone> {
    let id = ask.number("run")?;
    let not_done = |refusal: Refusal| NotDone {
        status: match refusal.kind {
            RefusalKind::Refused => StatusCode::NOT_FOUND,
            _ => NotDone::from(refusal.clone()).status,
        },
        ..NotDone::from(refusal)
    };
    let status = status_under(after.as_ref().map(|after| &after.notice));
    let typed = Typed::of(ask, after.as_ref());
    let seen = if ask.fields.is_on("again") {
        site.watched.look(ask, id).await
    } else {
        look(ask.desk.clone(), id).await.map(Arc::new)
    };
    let seen = seen.map_err(not_done)?;
    Ok(page(
        status,
        &page_of(ask, &seen, after.map(|after| after.notice), typed),
    ))
}

/// The runs that are watched: each is looked at once a second, however many watch it.
#[derive(Default)]
pub(super) struct WatchedRuns(Mutex<HashMap<WatchedBy, Arc<Shared<RunSeen>>>>);

/// A run, and the partners that who watches it is limited to.
type WatchedBy = (i64, Option<Arc<[String]>>);

impl WatchedRuns {
    async fn look(&self, ask: &Ask, id: i64) -> Result<Arc<RunSeen>, Refusal> {
        /// Runs that are kept at most.
        const KEPT_MAX: usize = 100;
        /// A page asks every second.
        const FRESH: Duration = Duration::from_millis(900);
        /// There is nothing else to show meanwhile.
        const LATE: Duration = Duration::from_secs(10);
        let shared = {
            let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (id, ask.viewer.partners.clone());
            if watched.len() >= KEPT_MAX && !watched.contains_key(&key) {
                watched.clear();
            }
            Arc::clone(watched.entry(key).or_default())
        };
        let told = shared.ask_within(FRESH, LATE, look(ask.desk.clone(), id)).await;
        match (told.answer, told.why_not) {
            (Some(seen), None) => Ok(seen),
            // What is late is as it was; what is older than that is not shown as if it were of now.
            (Some(seen), Some(why_not)) if why_not.kind == RefusalKind::Away && told.age < LATE => Ok(seen),
            (_, Some(why_not)) => Err(why_not),
            (None, None) => Err(Refusal::away("nothing was answered")),
        }
    }
}

fn page_of(ask: &Ask, seen: &RunSeen, notice: Option<Notice>, typed: Typed) -> RunPage {
    let outcome = &seen.outcome;
    let run = &outcome.run;
    let author = || Author {
        operator: ask.viewer.name.clone(),
        why: "why".to_owned(),
    };
    let came = outcome.came_to.iter().map(|line| {
        let came = match (&line.verdict, &line.reason, &line.note) {
            (Some(verdict), Some(reason), _) => format!("{verdict}, {reason}"),
            (Some(verdict), None, _) => verdict.clone(),
            (None, _, Some(note)) => format!("{}: {note}", line.state),
            (None, _, None) => line.state.clone(),
        };
        CameLine {
            planned: Chip::of_verdict(&line.planned),
            chip: match &line.verdict {
                Some(verdict) if *verdict == line.planned => Chip::good("yes"),
                Some(_) => Chip::bad("no"),
                None => Chip::calm("not judged"),
            },
            came,
            messages: Digits::of(line.messages),
        }
    });
    let can_resume = can_resume(run.state);
    let canary = match run.canary {
        None => "none".to_owned(),
        Some(canary) if run.judged >= i64::from(canary) && run.differ == 0 => {
            format!("{canary}: judged as planned")
        }
        Some(canary) => format!(
            "{canary}: {} judged, {} not as planned",
            run.judged.min(canary.into()),
            run.differ
        ),
    };
    RunPage {
        frame: ask.frame("runs", format!("Run {}", run.id)).with(notice),
        id: run.id,
        plan: run.plan,
        state: Chip::of_run(run.state),
        moves: run.state == "running",
        operator: run.operator.clone(),
        why: run.why.clone(),
        at: At(run.started_at),
        note: run.note.clone(),
        messages: run.messages,
        over: run.judged + run.skipped,
        due: run.due,
        waiting: run.waiting,
        skipped: run.skipped,
        canary,
        rate: run.rate.map_or_else(
            || "as fast as they are judged".to_owned(),
            |rate| format!("{rate} a second"),
        ),
        differ: Digits::of(run.differ),
        new_failures: Digits::of(seen.new_failures),
        came: came.collect(),
        money: outcome
            .money
            .iter()
            .map(|money| {
                (
                    money.currency.clone(),
                    Digits::of(&money.moved),
                    Digits::of(&money.planned),
                )
            })
            .collect(),
        act_heading: if can_resume { "Go on" } else { "Stop" },
        can_cancel: matches!(run.state, "running" | "stalled"),
        cancel_barred: ask.barred(Screen::Cancel),
        cancel_command: Cancel {
            run: run.id,
            author: author(),
        }
        .command()
        .to_string(),
        can_resume,
        goes_on: seen.goes_on,
        typed,
        resume_barred: ask.barred(Screen::Resume),
        resume_command: Resume {
            run: run.id,
            rate: None,
            yes_again: false,
            author: author(),
        }
        .command()
        .to_string(),
    }
}

pub(super) async fn cancel(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let id = ask.number("run")?;
    let done = async {
        let wish = Cancel {
            run: id,
            author: ask.fields.author(&ask.viewer.name)?,
        };
        Ok::<_, NotDone>(ask.desk.cancel(&wish).await?)
    };
    match done.await {
        Ok(_) => Ok(see(&format!("/runs/{id}"))),
        Err(not_done) => refused(site, ask, "cancel", not_done).await,
    }
}

/// The run's page again, with why one of its forms was refused.
async fn refused(site: &Site, ask: &Ask, form: &'static str, why: NotDone) -> Result<Response, NotDone> {
    let after = After::of(form, Err(why));
    let answered = run(site, ask, Some(after.clone())).await;
    or_form(ask, format!("/runs/{}/{form}", ask.part), &after, answered)
}

pub(super) async fn resume(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let id = ask.number("run")?;
    let begun = async {
        let wish = Resume {
            run: id,
            rate: rate(ask)?,
            yes_again: ask.fields.is_on("yes_again"),
            author: ask.fields.author(&ask.viewer.name)?,
        };
        let place = site.drivers.place()?;
        must_be_seen(ask, ask.desk.goes_on(id).await?)?;
        let begun = ask.desk.resume(&wish).await?;
        site.drivers.drive(&ask.desk, begun, place);
        Ok::<_, NotDone>(())
    };
    match begun.await {
        Ok(()) => Ok(see(&format!("/runs/{id}"))),
        Err(not_done) => refused(site, ask, "resume", not_done).await,
    }
}
