//! `plan`: a frozen selection, judged again with the real code, without effect.

use std::io::IsTerminal;

use clap::{Args, Subcommand};

use super::{
    acts::{Author, Operator},
    filters::Looking,
    look::progress,
};
use crate::{
    cli::{Context, Exit, Failure, output::Output},
    desk::{self, ApprovalRecord, LEFT_OUT, PlanAct, PlanLine, PlanShown, Planned, Sum},
    domain::{calendar::rfc3339, verdict::VerdictKind},
    plain::counted,
};

/// A plan to make; or what is asked of one that was made.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
The selection is frozen: `replay` takes these messages and no others, whatever fails meanwhile. Each is judged as the worker
would judge it now, in order of arrival, and sees what those before it would have changed. Nothing is written but the plan.
What nobody known put into settlement.dead is left out, unless --made-by unknown asks for it."
)]
pub(in crate::cli) struct PlanQuestion {
    #[command(subcommand)]
    of_one: Option<OfPlan>,
    #[command(flatten)]
    wish: PlanWish,
}

#[derive(Subcommand)]
pub(in crate::cli) enum OfPlan {
    /// One plan: what it came to, how its messages stand now, who approved it
    Show(OnePlan),
    /// Approve a plan that somebody else made
    #[command(after_help = "\
What is larger than dead_letters.approve_above or dead_letters.approve_amounts takes two people. Who approves can be neither
who made the plan nor who acts on it: not by the operator's name, and not by the login of the database. It counts for
dead_letters.approval_lasts.")]
    Approve(Approve),
}

#[derive(Args)]
pub(in crate::cli) struct OnePlan {
    /// The plan's number
    plan: i64,
}

#[derive(Args)]
pub(in crate::cli) struct Approve {
    /// The plan's number
    plan: i64,
    /// What may be done with it: replay, discard or restore
    #[arg(long = "for", value_name = "ACT", default_value_t = PlanAct::Replay, value_parser = plan_act)]
    for_act: PlanAct,
    #[command(flatten)]
    author: Author,
}

fn plan_act(text: &str) -> Result<PlanAct, String> {
    PlanAct::parse(text).ok_or_else(|| "one of replay, discard, restore".to_owned())
}

impl Approve {
    pub(in crate::cli) fn typed(&self) -> desk::Approve {
        desk::Approve {
            plan: self.plan,
            for_act: self.for_act,
            author: self.author.typed(),
        }
    }
}

#[derive(Args)]
pub(in crate::cli) struct PlanWish {
    #[command(flatten)]
    filters: Looking,
    /// The oldest N only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    #[command(flatten)]
    operator: Operator,
}

impl PlanWish {
    pub(in crate::cli) fn typed(&self) -> desk::Plan {
        desk::Plan {
            which: self.filters.which(),
            limit: self.limit,
            seen: None,
            operator: self.operator.name(),
        }
    }
}

impl PlanQuestion {
    #[cfg(test)]
    pub(in crate::cli) fn typed(&self) -> Option<desk::Plan> {
        self.of_one.is_none().then(|| self.wish.typed())
    }

    #[cfg(test)]
    pub(in crate::cli) fn of_one(&self) -> Option<&OfPlan> {
        self.of_one.as_ref()
    }
}

pub(super) async fn run(context: &Context, question: &PlanQuestion) -> Result<Exit, Failure> {
    match &question.of_one {
        None => make(context, &question.wish).await,
        Some(OfPlan::Show(one)) => {
            let shown = context.desk()?.plan_shown(one.plan).await?;
            context.out.say(&shown, |out| print_shown(out, &shown))?;
            Ok(Exit::Done)
        }
        Some(OfPlan::Approve(wish)) => {
            let approved = context.desk()?.approve(&wish.typed()).await?;
            context.out.say(&approved, |out| {
                out.line(format!(
                    "{} of plan {} ({} messages) is approved until {} (audit {})",
                    approved.approval.act,
                    approved.plan,
                    approved.messages,
                    rfc3339(approved.approval.expires_at),
                    approved.audit_id
                ))?;
                money(out, &approved.would_move)
            })?;
            Ok(Exit::Done)
        }
    }
}

fn money(out: &Output, sums: &[Sum]) -> Result<(), Failure> {
    sums.iter()
        .try_for_each(|sum| out.line(format!("would move {} {}", sum.quantity, sum.currency)))
}

fn print_shown(out: &Output, shown: &PlanShown) -> Result<(), Failure> {
    let record = &shown.record;
    out.line(format!(
        "plan {}: {} messages, made by {} at {}",
        record.id,
        record.messages,
        record.operator,
        rfc3339(record.at)
    ))?;
    lines(out, &shown.verdicts)?;
    money(out, &shown.would_move)?;
    let now: Vec<String> = shown
        .now
        .iter()
        .map(|now| format!("{} {}", now.messages, now.state))
        .collect();
    out.line(format!("now: {}", now.join(", ")))?;
    match &shown.two_people {
        Some(why) => out.line(format!("a replay takes two people: {why}"))?,
        None => out.line("one person is enough for a replay")?,
    }
    let row = |approval: &ApprovalRecord| {
        vec![
            approval.act.clone(),
            approval.operator.clone(),
            approval.why.clone(),
            rfc3339(approval.at),
            if approval.valid { "until" } else { "over since" }.to_owned(),
            rfc3339(approval.expires_at),
        ]
    };
    let header = ["approved", "by", "why", "at", "", "time"];
    out.table(&header, shown.approvals.iter().map(row).collect(), "nobody approved it")
}

async fn make(context: &Context, wish: &PlanWish) -> Result<Exit, Failure> {
    let wanted = std::io::stderr().is_terminal() && !context.out.json;
    let bar = progress(wanted, "judging");
    let judged = |done: usize, of: usize| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    };
    let planned = context.desk()?.plan(&wish.typed(), judged).await;
    bar.finish_and_clear();
    let planned = planned?;
    context.out.say(&planned, |out| print(out, &planned))?;
    Ok(Exit::Done)
}

/// A verdict as what would be.
pub(super) fn would(verdict: &str) -> &'static str {
    match VerdictKind::parse(verdict) {
        Some(VerdictKind::Settled) => "would settle",
        Some(VerdictKind::Duplicate) => "duplicate: it has its effect",
        Some(VerdictKind::Parked) => "would park",
        Some(VerdictKind::Rejected) | None => "would be rejected",
    }
}

fn print(out: &Output, planned: &Planned) -> Result<(), Failure> {
    out.line(format!(
        "plan {}: {}, judged again as things stand now; nothing was changed",
        planned.plan,
        counted(planned.messages, "message")
    ))?;
    lines(out, &planned.verdicts)?;
    money(out, &planned.would_move)?;
    if let Some(why) = &planned.two_people {
        out.line(format!("a replay takes two people: {why}"))?;
    }
    if planned.more {
        out.line("there are more: a plan holds dead_letters.plan_max messages, the oldest; plan again after this one")?;
    }
    if planned.replayed_often > 0 {
        out.line(format!(
            "replayed dead_letters.max_replays times or more: {}; they may go in circles, and a replay takes them with \
             --yes-again only",
            planned.replayed_often
        ))?;
    }
    if planned.left_out > 0 {
        out.line(format!("left out: {}; {LEFT_OUT}", planned.left_out))?;
    }
    match &planned.replay {
        Some(replay) => out.line(format!("go on with: {replay}")),
        None => out.line("nothing of it would settle: there is nothing to replay"),
    }
}

/// How many would come to what.
fn lines(out: &Output, verdicts: &[PlanLine]) -> Result<(), Failure> {
    let row = |line: &PlanLine| {
        let reason = match (line.verdict, line.reason, line.is_final) {
            (VerdictKind::Rejected, Some(reason), Some(true)) => format!("{reason}, final"),
            (VerdictKind::Rejected, Some(reason), _) => reason.to_string(),
            _ => String::new(),
        };
        vec![
            would(line.verdict.as_str()).to_owned(),
            reason,
            line.messages.to_string(),
        ]
    };
    let header = ["verdict", "because", "messages"];
    out.numbers(&header, verdicts.iter().map(row).collect(), "")
}
