//! `plan`: a frozen selection, judged again with the real code, without effect.

use std::io::IsTerminal;

use clap::Args;

use super::{acts::Operator, filters::Looking, look::progress};
use crate::{
    cli::{Context, Exit, Failure, output::Output},
    desk::{self, LEFT_OUT, PlanLine, Planned},
    domain::verdict::VerdictKind,
    plain::counted,
};

#[derive(Args)]
#[command(after_help = "\
The selection is frozen: `replay` takes these messages and no others, whatever fails meanwhile. Each is judged as the worker
would judge it now, in order of arrival, and sees what those before it would have changed. Nothing is written but the plan.
What nobody known put into settlement.dead is left out, unless --made-by unknown asks for it.")]
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
            operator: self.operator.name(),
        }
    }
}

pub(super) async fn run(context: &Context, wish: &PlanWish) -> Result<Exit, Failure> {
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
    out.numbers(&header, planned.verdicts.iter().map(row).collect(), "")?;
    for amount in &planned.would_move {
        out.line(format!("would move {} {}", amount.quantity, amount.currency))?;
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
