//! `plan`: a frozen selection, judged again with the real code, without effect.

use std::{collections::BTreeMap, io::IsTerminal};

use clap::Args;
use num_bigint::BigInt;
use serde::Serialize;
use serde_json::Value;

use super::{
    acts::{Operator, filters_of, select},
    filters::Looking,
    look::progress,
};
use crate::{
    cli::{Context, Exit, Failure, output::Output},
    domain::{
        dead_letter::{MadeBy, State},
        decide::{Reason, VerdictKind},
    },
    settle::plan::{Ahead, SLICE, slice},
    store::{audit::Act, letters::Filter, plans::PlanItem},
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

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Planned {
    plan: i64,
    operator: String,
    filters: Value,
    messages: usize,
    /// More were selected than a plan may hold.
    more: bool,
    /// Messages that nobody known put into settlement.dead: the filters select them, and the plan does not.
    left_out: i64,
    verdicts: Vec<Line>,
    would_move: Vec<Sum>,
    /// How to go on; none where there is nothing to replay.
    replay: Option<String>,
}

/// Money of one currency.
#[derive(Serialize)]
struct Sum {
    currency: String,
    quantity: String,
}

/// How many would come to what.
#[derive(Serialize)]
struct Line {
    verdict: VerdictKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<Reason>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    is_final: Option<bool>,
    messages: usize,
}

pub(super) async fn run(context: &Context, wish: PlanWish) -> Result<Exit, Failure> {
    let store = context.store()?;
    let mut filter = wish.filters.filter(&store, &[State::Open]).await?;
    // Nobody vouches for what they say: they are planned if somebody asks for them, and never among others.
    filter.is_known = filter.made_by.is_none();
    let left_out = if filter.is_known {
        let unknown = Filter {
            made_by: Some(MadeBy::Unknown),
            is_known: false,
            ..filter.clone()
        };
        store.count_dead_letters(&unknown).await?
    } else {
        0
    };
    let limit = wish.limit.and_then(|limit| usize::try_from(limit).ok());
    let (ids, more) = select(context, &store, &filter, limit).await?;
    // Asking for the oldest N, one knows that there may be more.
    let more = more && limit.is_none_or(|limit| limit > ids.len());
    if ids.is_empty() {
        let refusal = Failure::refused("no dead letter is selected: there is nothing to plan");
        return Err(match left_out {
            0 => refusal.hint("`settled dead-letters stats` says what there is"),
            _ => refusal.hint(LEFT_OUT),
        });
    }
    let rules = context.rules();
    let bar = progress(
        std::io::stderr().is_terminal() && !context.out.json,
        "judging",
        ids.len(),
    );
    let mut ahead = Ahead::default();
    let mut items: Vec<PlanItem> = Vec::with_capacity(ids.len());
    for ids in ids.chunks(SLICE) {
        let judged = context
            .patiently(async || {
                let stored = store.dead_letter_deliveries(ids).await?;
                slice(&store, &rules, &mut ahead, stored).await
            })
            .await?;
        items.extend(judged);
        bar.set_position(items.len() as u64);
    }
    bar.finish_and_clear();
    let operator = wish.operator.name();
    let filters = filters_of(&filter);
    let act = Act {
        name: "plan",
        operator: &operator,
        why: None,
        filters: &filters,
    };
    let plan = context.patiently(async || store.save_plan(act, &items).await).await?;
    let verdicts = verdicts(&items);
    let would_settle = verdicts.iter().any(|line| line.verdict == VerdictKind::Settled);
    let planned = Planned {
        plan,
        operator: operator.clone(),
        filters: filters.clone(),
        messages: items.len(),
        more,
        left_out,
        would_move: moves(&items),
        replay: would_settle.then(|| format!("settled dead-letters replay {plan} --canary 10 --reason \"why\"")),
        verdicts,
    };
    context.out.say(&planned, |out| print(out, &planned))?;
    Ok(Exit::Done)
}

/// Of messages that a plan does not take by itself.
const LEFT_OUT: &str = "nobody known put these into settlement.dead: look at them, and plan them by themselves with \
                        --made-by unknown if you know whose they are";

fn verdicts(items: &[PlanItem]) -> Vec<Line> {
    let mut counts = BTreeMap::<(VerdictKind, Option<Reason>), usize>::new();
    for item in items {
        *counts.entry((item.verdict, item.reason)).or_default() += 1;
    }
    counts
        .into_iter()
        .map(|((verdict, reason), messages)| Line {
            verdict,
            reason,
            is_final: reason.map(Reason::is_final),
            messages,
        })
        .collect()
}

/// What would move, by currency.
fn moves(items: &[PlanItem]) -> Vec<Sum> {
    let mut sums = BTreeMap::<&str, BigInt>::new();
    for amount in items.iter().filter_map(|item| item.amount.as_ref()) {
        *sums.entry(&amount.currency).or_default() += amount.quantity.to_signed();
    }
    sums.into_iter()
        .map(|(currency, sum)| Sum {
            currency: currency.to_owned(),
            quantity: sum.to_string(),
        })
        .collect()
}

/// A verdict as what would be.
pub(super) fn would(verdict: &str) -> &'static str {
    match VerdictKind::parse(verdict) {
        Some(VerdictKind::Settled) => "would settle",
        Some(VerdictKind::Duplicate) => "already settled",
        Some(VerdictKind::Parked) => "would park",
        Some(VerdictKind::Rejected) | None => "would be rejected",
    }
}

fn print(out: &Output, planned: &Planned) -> Result<(), Failure> {
    out.line(format!(
        "plan {}: {} messages, judged again as things stand now; nothing was changed",
        planned.plan, planned.messages
    ))?;
    let row = |line: &Line| {
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
    if planned.left_out > 0 {
        out.line(format!("left out: {}; {LEFT_OUT}", planned.left_out))?;
    }
    match &planned.replay {
        Some(replay) => out.line(format!("go on with: {replay}")),
        None => out.line("nothing of it would settle: there is nothing to replay"),
    }
}
