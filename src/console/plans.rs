//! Plans: what would come of a selection, who else has to want it, and what is done with it.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    Site,
    acts::{must_be_seen, must_be_seen_as, must_say_seen, said},
    again::{After, Typed, or_form},
    answer::{NotDone, Notice, page, see, status_under},
    ask::Ask,
    fields::query_of,
    frame::Frame,
    letters::letters,
    routes::Screen,
    shown::{At, Chip, Digits},
};
use crate::{
    desk::{Approve, Author, Consent, Plan, PlanAct, PlanShown, Replay, Selection, StateChange},
    domain::verdict::VerdictKind,
    plain::brief,
};

/// The canary that a form begins with.
const CANARY: i64 = 10;

#[derive(Template)]
#[template(path = "plans.html")]
struct PlansPage {
    frame: Frame,
    lines: Vec<PlanListLine>,
    next: Option<String>,
}

struct PlanListLine {
    id: i64,
    at: At,
    operator: String,
    filters: String,
    settles: Digits,
    messages: Digits,
}

pub(super) async fn plans(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let after = ask.fields.number("after")?;
    let found = ask.desk.plans(after, i64::from(site.settings.page)).await?;
    let next = found.items.last().filter(|_| found.more);
    let next = next.map(|last| query_of(&[("after", last.id.to_string())]));
    let lines = found.items.into_iter().map(|plan| PlanListLine {
        id: plan.id,
        at: At(plan.at),
        operator: plan.operator,
        filters: brief(&plan.filters),
        settles: Digits::of(plan.settled),
        messages: Digits::of(plan.messages),
    });
    Ok(page(
        StatusCode::OK,
        &PlansPage {
            lines: lines.collect(),
            next,
            frame: ask.frame("plans", "Plans"),
        },
    ))
}

/// Freezes a selection, and shows what would come of it; or the list that it was made from, with why not.
pub(super) async fn make(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    match made(ask).await {
        Ok(place) => Ok(see(&place)),
        Err(not_done) => letters(site, ask, Some(not_done)).await,
    }
}

async fn made(ask: &Ask) -> Result<String, NotDone> {
    let wish = Plan {
        which: ask.fields.which()?,
        limit: None,
        seen: Some(must_say_seen(ask, "seen")?),
        operator: ask.viewer.name.clone(),
    };
    let planned = ask.desk.plan(&wish, |_, _| {}).await?;
    let mut place = format!("/plans/{}", planned.plan);
    if planned.left_out > 0 {
        place.push_str(&format!("?left_out={}", planned.left_out));
    }
    Ok(place)
}

#[derive(Template)]
#[template(path = "plan.html")]
struct PlanPage {
    frame: Frame,
    id: i64,
    at: At,
    operator: String,
    filters: String,
    messages: Digits,
    verdicts: Vec<VerdictLine>,
    money: Vec<(String, Digits)>,
    changed: i64,
    now: Vec<(Digits, String)>,
    runs: Vec<i64>,
    two_people: Option<String>,
    approvals: Vec<ApprovalLine>,
    approvable: [Approvable; 3],
    approve_barred: Option<String>,
    approve_command: String,
    replayed: i64,
    all: i64,
    canary: String,
    typed: Typed,
    replay_barred: Option<String>,
    replay_command: String,
    replay_all_command: String,
    changes: Vec<ChangeForm>,
}

struct VerdictLine {
    chip: Chip,
    because: String,
    messages: Digits,
}

struct ApprovalLine {
    act: String,
    operator: String,
    why: String,
    at: At,
    until: At,
    chip: Chip,
}

/// An act that somebody else's plan may be approved for, and what it would touch.
struct Approvable {
    act: &'static str,
    messages: i64,
    /// With what would not settle, where that is more.
    all: Option<i64>,
}

struct ChangeForm {
    act: &'static str,
    word: &'static str,
    mood: &'static str,
    messages: i64,
    barred: Option<String>,
    command: String,
}

pub(super) async fn plan(ask: &Ask, after: Option<After>) -> Result<Response, NotDone> {
    let id = ask.number("plan")?;
    let shown = ask.desk.plan_shown(id).await.map_err(|refusal| NotDone {
        status: match refusal.kind {
            crate::desk::RefusalKind::Refused => StatusCode::NOT_FOUND,
            _ => NotDone::from(refusal.clone()).status,
        },
        ..NotDone::from(refusal)
    })?;
    let status = status_under(after.as_ref().map(|after| &after.notice));
    let typed = Typed::of(ask, after.as_ref());
    let notice = after.map(|after| after.notice).or_else(|| made_without(ask));
    Ok(page(status, &page_of(ask, shown, notice, typed)))
}

/// The same after an act by one of its forms.
async fn after(ask: &Ask, form: &'static str, came: Result<Notice, NotDone>) -> Result<Response, NotDone> {
    let after = After::of(form, came);
    let answered = plan(ask, Some(after.clone())).await;
    or_form(ask, format!("/plans/{}/{form}", ask.part), &after, answered)
}

/// How many messages an act would touch now.
fn touched(shown: &PlanShown, act: PlanAct) -> i64 {
    let change = match act {
        PlanAct::Replay => return shown.replayed(false),
        PlanAct::Discard => StateChange::Discard,
        PlanAct::Restore => StateChange::Restore,
    };
    shown.in_state(change.state().as_str())
}

/// What is to be said of a plan that was made a moment ago, and left some out.
fn made_without(ask: &Ask) -> Option<Notice> {
    let left_out: Option<i64> = ask.fields.number("left_out").ok().flatten();
    left_out.map(|left_out| Notice::bad(format!("left out: {left_out}; {}", crate::desk::LEFT_OUT)))
}

fn page_of(ask: &Ask, shown: PlanShown, notice: Option<Notice>, typed: Typed) -> PlanPage {
    let record = &shown.record;
    let author = || Author {
        operator: ask.viewer.name.clone(),
        why: "why".to_owned(),
    };
    let replayed = shown.replayed(false);
    let canary = CANARY.min((replayed / 4).max(1));
    let replay = Replay {
        plan: record.id,
        canary: i32::try_from(canary).ok(),
        rate: None,
        all_verdicts: false,
        yes_again: false,
        author: author(),
    };
    let approve = Approve {
        plan: record.id,
        for_act: PlanAct::Replay,
        author: author(),
    };
    let selection = Selection {
        plan: Some(record.id),
        which: crate::desk::Which::default(),
    };
    let change = |change: StateChange, word, mood, screen| ChangeForm {
        act: change.as_str(),
        word,
        mood,
        messages: shown.in_state(change.state().as_str()),
        barred: ask.barred(screen),
        command: change.command(&selection, &author()).to_string(),
    };
    let because = |line: &crate::desk::PlanLine| match (line.verdict, line.reason, line.is_final) {
        (VerdictKind::Rejected, Some(reason), Some(true)) => format!("{reason}, final"),
        (VerdictKind::Rejected, Some(reason), _) => reason.to_string(),
        _ => String::new(),
    };
    let would = |verdict: VerdictKind| match verdict {
        VerdictKind::Settled => Chip::good("would settle"),
        VerdictKind::Duplicate => Chip::calm("already settled"),
        VerdictKind::Parked => Chip::busy("would park"),
        VerdictKind::Rejected => Chip::bad("would be rejected"),
    };
    PlanPage {
        frame: ask.frame("plans", format!("Plan {}", record.id)).with(notice),
        id: record.id,
        at: At(record.at),
        operator: record.operator.clone(),
        filters: brief(&record.filters),
        messages: Digits::of(record.messages),
        verdicts: shown
            .verdicts
            .iter()
            .map(|line| VerdictLine {
                chip: would(line.verdict),
                because: because(line),
                messages: Digits::of(line.messages),
            })
            .collect(),
        money: shown
            .would_move
            .iter()
            .map(|sum| (sum.currency.clone(), Digits::of(&sum.quantity)))
            .collect(),
        changed: i64::from(record.messages) - shown.in_state("open"),
        now: shown
            .now
            .iter()
            .map(|now| (Digits::of(now.messages), now.state.clone()))
            .collect(),
        runs: shown.runs.clone(),
        two_people: shown.two_people.clone(),
        approvals: shown
            .approvals
            .iter()
            .map(|approval| ApprovalLine {
                act: approval.act.clone(),
                operator: approval.operator.clone(),
                why: approval.why.clone(),
                at: At(approval.at),
                until: At(approval.expires_at),
                chip: if approval.valid {
                    Chip::good("counts")
                } else {
                    Chip::warn("is over")
                },
            })
            .collect(),
        approvable: PlanAct::ALL.map(|act| {
            let messages = touched(&shown, act);
            let all = Some(shown.replayed(true)).filter(|all| act == PlanAct::Replay && *all > messages);
            Approvable {
                act: act.as_str(),
                messages,
                all,
            }
        }),
        approve_barred: ask.barred(Screen::Approve).or_else(|| own_plan(ask, &shown)),
        approve_command: approve.command().to_string(),
        replayed,
        all: shown.replayed(true),
        canary: canary.to_string(),
        typed,
        replay_barred: ask.barred(Screen::Replay),
        replay_command: replay.command().to_string(),
        replay_all_command: Replay {
            all_verdicts: true,
            ..replay
        }
        .command()
        .to_string(),
        changes: vec![
            change(StateChange::Discard, "Discard", "danger", Screen::DiscardPlan),
            change(StateChange::Restore, "Restore", "", Screen::RestorePlan),
        ],
    }
}

/// One's own plan is for somebody else to approve; the desk says it too.
fn own_plan(ask: &Ask, shown: &PlanShown) -> Option<String> {
    let is_own = shown.record.operator.eq_ignore_ascii_case(&ask.viewer.name);
    is_own.then(|| "you made this plan: somebody else approves it".to_owned())
}

pub(super) async fn approve(ask: &Ask) -> Result<Response, NotDone> {
    let id = ask.number("plan")?;
    let done = async {
        let for_act = ask.fields.get("for").unwrap_or(PlanAct::Replay.as_str());
        let wish = Approve {
            plan: id,
            for_act: PlanAct::parse(for_act).ok_or_else(|| NotDone::wrong(format!("for: {for_act:?} is no act")))?,
            author: ask.fields.author(&ask.viewer.name)?,
        };
        let shown = ask.desk.plan_shown(id).await?;
        let field = format!("seen_{for_act}");
        let mut most = must_be_seen_as(ask, &field, touched(&shown, wish.for_act))?;
        if wish.for_act == PlanAct::Replay {
            // It counts for a replay of everything too. A button that says one number says that it is that of both.
            let of_all = format!("{field}_all");
            let field = if ask.fields.is_on(&of_all) { &of_all } else { &field };
            most = must_be_seen_as(ask, field, shown.replayed(true))?;
        }
        if most == 0 {
            return Err(NotDone::wrong(format!(
                "nothing of plan {id} is there to {for_act} any more"
            )));
        }
        let approved = ask.desk.approve(&wish).await?;
        Ok(Notice::good(format!(
            "you approved the {} of plan {id} (audit {})",
            approved.approval.act, approved.audit_id
        )))
    };
    let came = done.await;
    after(ask, "approve", came).await
}

/// Which of the two forms of a replay was sent.
fn replay_form(ask: &Ask) -> &'static str {
    if ask.fields.is_on("all_verdicts") {
        "replay-all"
    } else {
        "replay"
    }
}

pub(super) async fn replay(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let id = ask.number("plan")?;
    let begun = async {
        let wish = Replay {
            plan: id,
            canary: ask.fields.number("canary")?.filter(|canary| *canary > 0),
            rate: super::runs::rate(ask)?,
            all_verdicts: ask.fields.is_on("all_verdicts"),
            yes_again: ask.fields.is_on("yes_again"),
            author: ask.fields.author(&ask.viewer.name)?,
        };
        let place = site.drivers.place()?;
        let shown = ask.desk.plan_shown(id).await?;
        let messages = must_be_seen(ask, shown.replayed(wish.all_verdicts))?;
        if messages == 0 {
            return Err(NotDone::changed("no message of it is open still; nothing was done"));
        }
        // The desk is told of all that the run takes: it skips those that are not open any more.
        let taken = ask.desk.replay_size(&wish).await?;
        let begun = ask.desk.begin(&wish, Consent::Typed(Some(taken))).await?;
        let run = begun.run;
        site.drivers.drive(&ask.desk, begun, place);
        Ok::<_, NotDone>(run)
    };
    match begun.await {
        Ok(run) => Ok(see(&format!("/runs/{run}"))),
        Err(not_done) => {
            let after = After::of(replay_form(ask), Err(not_done));
            let answered = plan(ask, Some(after.clone())).await;
            or_form(ask, format!("/plans/{id}/replay"), &after, answered)
        }
    }
}

pub(super) async fn change(ask: &Ask, change: StateChange) -> Result<Response, NotDone> {
    let id = ask.number("plan")?;
    let selection = Selection {
        plan: Some(id),
        which: crate::desk::Which::default(),
    };
    let done = async {
        let author = ask.fields.author(&ask.viewer.name)?;
        // Of its messages those in the state for it: as many stand on the button.
        let touched = ask.desk.plan_shown(id).await?.in_state(change.state().as_str());
        if must_be_seen(ask, touched)? == 0 {
            return Err(NotDone::changed(
                "none of its messages is in the state for it; nothing was done",
            ));
        }
        let selected = ask.desk.select(change, &selection).await?;
        let all = Consent::Typed(Some(selected.messages()));
        Ok(said(change, &ask.desk.change(change, &selected, &author, all).await?))
    };
    let came = done.await;
    after(ask, change.as_str(), came).await
}
