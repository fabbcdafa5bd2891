//! Two people for what is large: what needs a second one, who may be it, and that they say so.

use std::{fmt, sync::Arc};

use num_bigint::BigInt;
use serde::Serialize;

use super::{ApprovalLimits, ApprovalRecord, Author, Command, Desk, PlanLine, Refusal, StateNow, Sum, Voice, quoted};
use crate::{
    config::DeadLetterSettings,
    domain::{calendar::rfc3339, dead_letter::State, person::Person},
    store::{approvals::NewApproval, plans::PlanRecord, voices::NewVoice},
};

/// What may be done with the messages of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanAct {
    Replay,
    Discard,
    Restore,
}

impl PlanAct {
    pub const ALL: [PlanAct; 3] = [PlanAct::Replay, PlanAct::Discard, PlanAct::Restore];

    pub fn as_str(self) -> &'static str {
        match self {
            PlanAct::Replay => "replay",
            PlanAct::Discard => "discard",
            PlanAct::Restore => "restore",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|act| act.as_str() == text)
    }
}

impl fmt::Display for PlanAct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How large an act is.
#[derive(Clone, Debug, Default)]
pub(super) struct ActSize {
    pub(super) messages: i64,
    /// What it moves.
    pub(super) money: Vec<Sum>,
    /// Messages of which that is not known.
    pub(super) unknown: i64,
}

impl ActSize {
    /// Why it is more than these limits, by what they are called; none: it is not.
    fn above(&self, limits: &ApprovalLimits, (messages, amounts): (&str, &str)) -> Option<String> {
        let most = limits.messages;
        if most > 0 && self.messages > most {
            return Some(format!("{} messages are more than {messages} ({most})", self.messages));
        }
        // What can not be compared takes two people.
        if self.unknown > 0 && !limits.amounts.is_empty() {
            return Some(format!(
                "{} of them name what is not reserved yet, and what they would move is not known",
                self.unknown
            ));
        }
        let is_more = |moved: &str, most: &str| match (moved.parse::<BigInt>(), most.parse::<BigInt>()) {
            (Ok(moved), Ok(most)) => moved > most,
            _ => true,
        };
        limits.amounts.iter().find_map(|(currency, most)| {
            let moved = self.money.iter().find(|sum| sum.currency == *currency)?;
            is_more(&moved.quantity, most)
                .then(|| format!("{} {currency} is more than {amounts} ({most})", moved.quantity))
        })
    }
}

/// Approving what somebody else planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approve {
    pub plan: i64,
    pub for_act: PlanAct,
    pub author: Author,
}

impl Approve {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "plan", "approve"]);
        command.word(self.plan);
        if self.for_act != PlanAct::Replay {
            command.flag("--for", Some(self.for_act));
        }
        self.author.add_to(&mut command);
        command
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Approved {
    pub plan: i64,
    #[serde(flatten)]
    pub approval: ApprovalRecord,
    pub messages: i32,
    pub would_move: Vec<Sum>,
    pub audit_id: i64,
}

/// A plan as it was made, and as it stands now.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanShown {
    #[serde(flatten)]
    pub record: PlanRecord,
    pub verdicts: Vec<PlanLine>,
    pub would_move: Vec<Sum>,
    /// How many of its messages are in which state now.
    pub now: Vec<StateNow>,
    /// The replays of it, the newest first.
    pub runs: Vec<i64>,
    /// Why a replay of it takes two people; none where one is enough.
    pub two_people: Option<String>,
    pub approvals: Vec<ApprovalRecord>,
}

impl PlanShown {
    /// Messages that a replay would judge now: what would settle, or all; and open still. It skips the others.
    pub fn replayed(&self, all_verdicts: bool) -> i64 {
        let open = self.now.iter().filter(|now| now.state == State::Open.as_str());
        let judged = open.map(|now| if all_verdicts { now.messages } else { now.would_settle });
        judged.sum()
    }

    /// Messages that are in a state now.
    pub fn in_state(&self, state: &str) -> i64 {
        self.now
            .iter()
            .find(|now| now.state == state)
            .map_or(0, |now| now.messages)
    }
}

impl Desk {
    /// The same desk for somebody whose name is vouched for: by a proxy that signed them in, and not by a command line.
    #[must_use]
    pub fn vouched_for(&self, name: &str) -> Self {
        Self {
            voucher: Some(Arc::from(name)),
            ..self.clone()
        }
    }

    /// Who acts here, as the database will write it down: a name that we may not vouch for is no more than typed.
    async fn person(&self, operator: &str) -> Result<Person, Refusal> {
        let (session, may_vouch) = self.store.session_user().await?;
        Ok(Person {
            operator: operator.to_owned(),
            voucher: self.voucher.as_deref().filter(|_| may_vouch).map(str::to_owned),
            session: Some(session),
        })
    }

    /// What of a refusal comes of who they are: who else could do it.
    fn who_else(&self, me: &Person) -> String {
        match (&self.voucher, &me.voucher, &me.session) {
            (Some(_), None, Some(session)) => format!(
                "the names that this console vouches for do not count, since its login of the database may not vouch: as the owner \
                 of the schema, `settled roles --apply` and GRANT settled_console TO {}",
                quoted(session)
            ),
            (Some(_), ..) => "somebody else who is signed in to the console".to_owned(),
            (None, ..) => {
                "somebody else, with another operator's name and another login of the database; for what was begun in \
                           a console that signs people in, somebody else there"
                    .to_owned()
            }
        }
    }

    /// What takes two people by the settings.
    pub fn limits_of(settings: &DeadLetterSettings) -> ApprovalLimits {
        ApprovalLimits {
            messages: i64::try_from(settings.approve_above).unwrap_or(i64::MAX),
            amounts: settings.approve_amounts.clone(),
        }
    }

    /// Why so much takes two people; none: one is enough.
    pub(super) async fn two_people(&self, messages: i64, money: &[Sum]) -> Result<Option<String>, Refusal> {
        self.two_people_for(&ActSize {
            messages,
            money: money.to_vec(),
            unknown: 0,
        })
        .await
    }

    /// By the settings, which are those of whoever acts, and by what the database says, which they can not change.
    async fn two_people_for(&self, size: &ActSize) -> Result<Option<String>, Refusal> {
        let by_setting = size.above(
            &Self::limits_of(&self.settings.dead_letters),
            ("dead_letters.approve_above", "dead_letters.approve_amounts has"),
        );
        if by_setting.is_some() {
            return Ok(by_setting);
        }
        let kept = self.store.approval_limits().await?;
        Ok(kept.and_then(|kept| size.above(&kept, ("the database's own limit", "the database's own limit"))))
    }

    /// Refuses what takes two people, unless somebody who is neither who made the plan nor who acts has approved it.
    pub(super) async fn second_person(
        &self,
        plan: Option<i64>,
        act: PlanAct,
        author: &Author,
        size: &ActSize,
    ) -> Result<(), Refusal> {
        let Some(why) = self.two_people_for(size).await? else {
            return Ok(());
        };
        let Some(plan) = plan else {
            return Err(
                Refusal::refused(format!("this takes two people, and a plan: {why}; nothing was done"))
                    .hint("`settled dead-letters plan` makes one; somebody else approves it with `settled dead-letters plan approve`"),
            );
        };
        let made = self.plan_record(plan).await?;
        let acting = self.person(&author.operator).await?;
        let approvals = self.store.approvals(plan).await?;
        let (mut over, mut same) = (None, None);
        for approval in approvals.iter().rev().filter(|approval| approval.act == act.as_str()) {
            if !approval.valid {
                over = over.or(Some(rfc3339(approval.expires_at)));
                continue;
            }
            match approval.by.one_with(&acting).or_else(|| approval.by.one_with(&made.by)) {
                None => return Ok(()),
                Some(one) => same = Some(one.to_string()),
            }
        }
        let found = match (same, over) {
            (Some(one), _) => one,
            (None, Some(when)) => format!("the approval was over at {when}"),
            (None, None) => format!("nobody else has approved the {act} of plan {plan} yet"),
        };
        let flag = match act {
            PlanAct::Replay => String::new(),
            PlanAct::Discard | PlanAct::Restore => format!(" --for {act}"),
        };
        Err(
            Refusal::refused(format!("this takes two people: {why}; {found}; nothing was done")).hint(format!(
                "it is looked at with `settled dead-letters plan show {plan}`, and approved with `settled dead-letters plan approve \
                 {plan}{flag} --reason ...`, by another: {}",
                self.who_else(&acting)
            )),
        )
    }

    /// Who said of an act without a plan that it shall be done, and whether one more who says so is the second person. What is
    /// done is said by its name and by what exactly.
    ///
    /// # Errors
    /// They said so already; the database is away.
    pub(super) async fn voices(
        &self,
        act: &'static str,
        subject: &str,
        author: &Author,
    ) -> Result<(Vec<Voice>, bool), Refusal> {
        let me = self.person(&author.operator).await?;
        let voices = self.store.voices(act, subject).await?;
        let is_second = voices.iter().any(|before| before.by.one_with(&me).is_none());
        if !is_second && let Some((mine, one)) = voices.last().and_then(|mine| Some((mine, mine.by.one_with(&me)?))) {
            return Err(Refusal::refused(format!(
                "this takes two people; {} said so already (that counts until {}), and {one}; nothing was done",
                mine.operator,
                rfc3339(mine.expires_at)
            ))
            .hint(format!("the same is said by another: {}", self.who_else(&me))));
        }
        Ok((voices, is_second))
    }

    /// One of them, to be written down.
    pub(super) fn new_voice<'a>(&'a self, act: &'static str, subject: &'a str) -> NewVoice<'a> {
        NewVoice {
            for_act: act,
            subject,
            lasts_ms: self.approval_lasts_ms(),
            voucher: self.voucher.as_deref(),
        }
    }

    /// `dead_letters.approval_lasts`, in milliseconds.
    fn approval_lasts_ms(&self) -> i64 {
        i64::try_from(self.settings.dead_letters.approval_lasts.as_millis()).unwrap_or(i64::MAX)
    }

    /// Approves a plan that somebody else made. It counts for `dead_letters.approval_lasts`.
    ///
    /// # Errors
    /// There is no such plan, or it is one's own; the database is away.
    pub async fn approve(&self, wish: &Approve) -> Result<Approved, Refusal> {
        let plan = wish.plan;
        let made = self.plan_record(plan).await?;
        let me = self.person(&wish.author.operator).await?;
        if let Some(one) = me.one_with(&made.by) {
            return Err(Refusal::refused(format!(
                "plan {plan} was made by {}, and {one}; nothing was approved",
                made.operator
            ))
            .hint(format!("it is approved by another: {}", self.who_else(&me))));
        }
        let (_, money) = self.store.plan_verdicts(plan).await?;
        let would_move = sums(money);
        let new = NewApproval {
            plan,
            for_act: wish.for_act.as_str(),
            lasts_ms: self.approval_lasts_ms(),
            voucher: self.voucher.as_deref(),
        };
        let filters = serde_json::json!({"plan": plan, "for": wish.for_act.as_str()});
        let act = wish.author.act("plan approve", &filters);
        let outcome = serde_json::json!({
            "messages": made.messages,
            "wouldMove": would_move,
            "lastsMs": new.lasts_ms,
        });
        let (approval, audit_id) = self.store.approve(act, new, &outcome).await?;
        Ok(Approved {
            plan,
            approval,
            messages: made.messages,
            would_move,
            audit_id,
        })
    }

    /// A plan as it was made, and as it stands now.
    ///
    /// # Errors
    /// There is no such plan; the database is away.
    pub async fn plan_shown(&self, plan: i64) -> Result<PlanShown, Refusal> {
        let record = self.plan_record(plan).await?;
        // Each walks through every message of the plan.
        let ((verdicts, money), now) = tokio::try_join!(self.store.plan_verdicts(plan), self.store.plan_now(plan))?;
        let mut verdicts: Vec<PlanLine> = verdicts
            .into_iter()
            .map(|line| PlanLine {
                verdict: line.verdict,
                reason: line.reason,
                is_final: line.reason.map(crate::domain::reason::Reason::is_final),
                messages: usize::try_from(line.messages).unwrap_or_default(),
            })
            .collect();
        verdicts.sort_by_key(|line| (line.verdict, line.reason));
        let would_move = sums(money);
        Ok(PlanShown {
            two_people: self.two_people(record.settled, &would_move).await?,
            now,
            runs: self.store.plan_runs(plan).await?,
            approvals: self.store.approvals(plan).await?,
            record,
            verdicts,
            would_move,
        })
    }

    /// Plans, the newest first, after one of them.
    ///
    /// # Errors
    /// The database is away.
    pub async fn plans(&self, after: Option<i64>, limit: i64) -> Result<super::Page<PlanRecord>, Refusal> {
        let plans = self
            .store
            .plans(after.unwrap_or(i64::MAX), self.limits(), limit + 1)
            .await?;
        Ok(super::Page::of(plans, limit))
    }

    /// How large a replay is. What would not settle by its plan may settle all the same, once it is judged: of a replay of
    /// everything all that it could move counts.
    pub(super) async fn size_of(&self, plan: i64, all_verdicts: bool, messages: usize) -> Result<ActSize, Refusal> {
        let (money, unknown) = if all_verdicts {
            self.store.plan_at_most(plan).await?
        } else {
            (self.store.plan_verdicts(plan).await?.1, 0)
        };
        Ok(ActSize {
            messages: i64::try_from(messages).unwrap_or(i64::MAX),
            money: sums(money),
            unknown,
        })
    }
}

fn sums(money: Vec<(String, String)>) -> Vec<Sum> {
    money
        .into_iter()
        .map(|(currency, quantity)| Sum { currency, quantity })
        .collect()
}
