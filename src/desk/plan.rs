//! A frozen selection, judged again with the real code, without effect.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use serde::Serialize;
use serde_json::Value;

use super::{Command, Desk, Refusal, Which, act::filters_of};
use crate::{
    domain::{dead_letter::State, reason::Reason, verdict::VerdictKind},
    settle::{
        self,
        plan::{Ahead, SLICE, slice},
    },
    store::{audit::Act, plans::PlanItem},
};

/// Of messages that a plan does not take by itself.
pub const LEFT_OUT: &str = "nobody known put these into settlement.dead: look at them, and plan them by themselves with \
                            --made-by unknown if you know whose they are";

/// A plan to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub which: Which,
    /// The oldest so many only.
    pub limit: Option<u32>,
    /// How many whoever asks has seen: of another number none is made. None: they saw none.
    pub seen: Option<usize>,
    pub operator: String,
}

impl Plan {
    /// The command line that makes it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "plan"]);
        self.which.add_to(&mut command, "--reason");
        command.flag("--limit", self.limit);
        command.flag("--operator", Some(&self.operator));
        command
    }
}

/// A plan that was made.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Planned {
    pub plan: i64,
    pub operator: String,
    pub filters: Value,
    pub messages: usize,
    /// More were selected than a plan may hold.
    pub more: bool,
    /// Messages that nobody known put into settlement.dead: the filters select them, and the plan does not.
    pub left_out: i64,
    /// Messages that were replayed `dead_letters.max_replays` times or more: a replay takes them with --yes-again only.
    pub replayed_often: i64,
    pub verdicts: Vec<PlanLine>,
    pub would_move: Vec<Sum>,
    /// Why a replay takes two people; none where one is enough.
    pub two_people: Option<String>,
    /// How to go on; none where there is nothing to replay.
    pub replay: Option<String>,
}

/// Money of one currency.
#[derive(Clone, Debug, Serialize)]
pub struct Sum {
    pub currency: String,
    pub quantity: String,
}

/// How many would come to what.
#[derive(Clone, Debug, Serialize)]
pub struct PlanLine {
    pub verdict: VerdictKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub is_final: Option<bool>,
    pub messages: usize,
}

impl Desk {
    /// Makes a plan. `judged` is told how many of how many are judged.
    ///
    /// # Errors
    /// Nothing is selected; the database is away.
    pub async fn plan(&self, wish: &Plan, mut judged: impl FnMut(usize, usize)) -> Result<Planned, Refusal> {
        let mut filter = self.filter(&wish.which, &[State::Open]).await?;
        let left_out = match filter.left_out() {
            Some(unknown) => self.store.count_dead_letters(&unknown).await?,
            None => 0,
        };
        filter.is_known = filter.made_by.is_none();
        let limit = wish.limit.and_then(|limit| usize::try_from(limit).ok());
        let (ids, more) = self.select_ids(&filter, limit).await?;
        // Asking for the oldest N, one knows that there may be more.
        let more = more && limit.is_none_or(|limit| limit > ids.len());
        if ids.is_empty() {
            let refusal = Refusal::refused("no dead letter is selected: there is nothing to plan");
            return Err(match left_out {
                0 => refusal.hint("`settled dead-letters stats` says what there is"),
                _ => refusal.hint(LEFT_OUT),
            });
        }
        if let Some(seen) = wish.seen.filter(|seen| *seen != ids.len()) {
            let now = ids.len();
            return Err(Refusal::refused(format!(
                "there are {now} messages now, and the page said {seen}; nothing was planned"
            ))
            .hint("look again, and decide again"));
        }
        let rules = settle::rules(&self.settings);
        // By them a message may be refused that would wait otherwise.
        self.patiently(async || self.store.count_parked_bytes().await).await?;
        judged(0, ids.len());
        let mut ahead = Ahead::default();
        let mut items: Vec<PlanItem> = Vec::with_capacity(ids.len());
        for part in ids.chunks(SLICE) {
            let some = self
                .patiently(async || {
                    let stored = self.store.dead_letter_deliveries(part).await?;
                    slice(&self.store, &rules, &mut ahead, stored).await
                })
                .await?;
            items.extend(some);
            judged(items.len(), ids.len());
        }
        let filters = filters_of(&filter);
        let act = Act {
            name: "plan",
            operator: &wish.operator,
            why: None,
            filters: &filters,
            voucher: self.voucher.as_deref(),
        };
        let verdicts = verdicts(&items);
        let would_settle = verdicts.iter().any(|line| line.verdict == VerdictKind::Settled);
        let would_move = moves(&items);
        let settles = items.iter().filter(|item| item.verdict == VerdictKind::Settled);
        let settles = i64::try_from(settles.count()).unwrap_or(i64::MAX);
        // Asked before there is a plan: what fails leaves none behind.
        let two_people = self.two_people(settles, &would_move).await?;
        let plan = self
            .patiently(async || self.store.save_plan(act, self.voucher.as_deref(), &items).await)
            .await?;
        let most = self.settings.dead_letters.max_replays;
        let replayed_often = self.store.count_replayed(plan, true, most).await?;
        Ok(Planned {
            two_people,
            plan,
            operator: wish.operator.clone(),
            messages: items.len(),
            more,
            left_out,
            replayed_often,
            would_move,
            replay: would_settle.then(|| format!("settled dead-letters replay {plan} --canary 10 --reason \"why\"")),
            verdicts,
            filters,
        })
    }
}

fn verdicts(items: &[PlanItem]) -> Vec<PlanLine> {
    let mut counts = BTreeMap::<(VerdictKind, Option<Reason>), usize>::new();
    for item in items {
        *counts.entry((item.verdict, item.reason)).or_default() += 1;
    }
    counts
        .into_iter()
        .map(|((verdict, reason), messages)| PlanLine {
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
