//! What is done to dead letters directly: discard, restore, purge. Who acts, why, and how much is asked back.

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{ActSize, Command, Desk, Moment, PlanAct, Refusal, Voice, Which, cut, which::said};
use crate::{
    domain::{calendar::rfc3339, dead_letter::State, reason::Reason},
    plain::counted,
    store::{audit::Act, letters::Filter},
};

/// Text that the database can hold, of a length.
///
/// # Errors
/// Why it does not fit.
pub fn bounded(text: &str, max: usize) -> Result<(), String> {
    if text.is_empty() || text.len() > max {
        return Err(format!("must be 1 to {max} bytes"));
    }
    if text.contains('\0') {
        return Err("must not hold the character U+0000".into());
    }
    Ok(())
}

/// Who acts, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    pub operator: String,
    pub why: String,
}

impl Author {
    /// An operator's name, for the audit.
    ///
    /// # Errors
    /// Why it is none.
    pub fn operator(text: &str) -> Result<String, String> {
        bounded(text, 128).map(|()| text.to_owned())
    }

    /// Why somebody acts, for the audit.
    ///
    /// # Errors
    /// Why it will not do.
    pub fn why(text: &str) -> Result<String, String> {
        if text.trim().is_empty() {
            return Err("say why".into());
        }
        // Elsewhere --reason selects. Taken for the why, it would act on far more than was meant.
        if Reason::parse(text.trim()).is_some() {
            return Err("this is the code of a reason, not why you act: --reason-code selects by it".into());
        }
        bounded(text, 1024).map(|()| text.to_owned())
    }

    pub(super) fn add_to(&self, command: &mut Command) {
        command.flag("--reason", Some(&self.why));
        command.flag("--operator", Some(&self.operator));
    }

    pub(super) fn act<'a>(&'a self, name: &'static str, filters: &'a Value) -> Act<'a> {
        Act {
            name,
            operator: &self.operator,
            why: Some(&self.why),
            filters,
            voucher: None,
        }
    }
}

/// Whether somebody said that so many messages are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    NotAsked,
    /// The number, as a person typed it back; none for what is no number.
    Typed(Option<usize>),
    /// However many there are.
    Given,
}

impl Desk {
    /// Whether an act on so many messages needs consent.
    pub fn asks_back(&self, messages: usize) -> bool {
        messages > self.settings.dead_letters.confirm_above
    }

    /// Refuses to touch many messages without consent.
    pub(super) fn need(&self, consent: Consent, messages: usize, doing: &str) -> Result<(), Refusal> {
        if !self.asks_back(messages) {
            return Ok(());
        }
        match consent {
            Consent::Given => Ok(()),
            Consent::Typed(typed) if typed == Some(messages) => Ok(()),
            Consent::Typed(_) => Err(Refusal::usage(format!("that is not {messages}; nothing was done"))),
            Consent::NotAsked => {
                let most = self.settings.dead_letters.confirm_above;
                Err(Refusal::usage(format!(
                    "{doing} {} is more than dead_letters.confirm_above ({most}); nothing was done",
                    counted(messages, "message")
                ))
                .hint("give --yes if that is what you mean"))
            }
        }
    }

    /// The ids of a filter, up to `dead_letters.plan_max`, and whether there are more.
    pub(super) async fn select_ids(&self, filter: &Filter, limit: Option<usize>) -> Result<(Vec<Uuid>, bool), Refusal> {
        let most = self.settings.dead_letters.plan_max;
        let limit = limit.unwrap_or(most).min(most);
        let ask = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let mut ids = self
            .patiently(async || self.store.select_dead_letters(filter, ask).await)
            .await?;
        let more = cut(&mut ids, limit);
        Ok((ids, more))
    }
}

/// As times are said.
fn cut_to_milliseconds(time: jiff::Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time)
}

pub(super) fn no_such_plan(plan: i64) -> Refusal {
    Refusal::refused(format!("there is no plan {plan}"))
        .hint("`settled dead-letters plan` makes one and says its number")
}

/// A filter as the audit keeps it.
pub(super) fn filters_of(filter: &Filter) -> Value {
    serde_json::to_value(filter).unwrap_or_default()
}

// Discard and restore ------------------------------------------------------------------------------------------------

/// A plan's messages, or those that are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    pub plan: Option<i64>,
    pub which: Which,
}

/// What is done to messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateChange {
    /// Be done with open ones.
    Discard,
    /// Open discarded ones again.
    Restore,
}

impl StateChange {
    pub fn as_str(self) -> &'static str {
        match self {
            StateChange::Discard => "discard",
            StateChange::Restore => "restore",
        }
    }

    /// As what is under way.
    pub fn doing(self) -> &'static str {
        match self {
            StateChange::Discard => "discarding",
            StateChange::Restore => "restoring",
        }
    }

    /// The same as what is done with a plan.
    pub fn act(self) -> PlanAct {
        match self {
            StateChange::Discard => PlanAct::Discard,
            StateChange::Restore => PlanAct::Restore,
        }
    }

    /// The messages that it changes.
    pub fn state(self) -> State {
        match self {
            StateChange::Discard => State::Open,
            StateChange::Restore => State::Discarded,
        }
    }

    /// The command line that does it.
    pub fn command(self, selection: &Selection, author: &Author) -> Command {
        let mut command = Command::new(&["dead-letters", self.as_str()]);
        if let Some(plan) = selection.plan {
            command.word(plan);
        }
        selection.which.add_to(&mut command, "--reason-code");
        author.add_to(&mut command);
        command
    }
}

/// Messages, frozen, and how they were selected.
#[derive(Clone, Debug)]
pub struct Selected {
    ids: Vec<Uuid>,
    filters: Value,
    plan: Option<i64>,
    /// There are more than one act may take.
    pub more: bool,
}

impl Selected {
    pub fn messages(&self) -> usize {
        self.ids.len()
    }
}

/// What an act came to.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Changed {
    pub act: &'static str,
    pub selected: usize,
    pub changed: usize,
    pub unchanged: usize,
    /// There are more of the same filter.
    pub more: bool,
    pub audit_id: i64,
    pub operator: String,
}

impl Desk {
    /// The messages of a selection, for an act on them.
    ///
    /// # Errors
    /// Nothing is selected, or by two ways at once; there is no such plan; the database is away.
    pub async fn select(&self, change: StateChange, selection: &Selection) -> Result<Selected, Refusal> {
        match selection.plan {
            Some(_) if selection.which.is_given() => {
                Err(Refusal::usage("a plan and filters can not be given together")
                    .hint("a plan is a selection that is frozen: make another one with other filters"))
            }
            Some(plan) => {
                self.plan_record(plan).await?;
                Ok(Selected {
                    ids: self.store.plan_messages(plan).await?,
                    filters: json!({ "plan": plan }),
                    plan: Some(plan),
                    more: false,
                })
            }
            None if !selection.which.is_given() => Err(Refusal::usage("no messages are selected")
                .hint("name a plan, or give a filter; --state open means every open one")),
            None => {
                let filter = self.filter(&selection.which, &[change.state()]).await?;
                let (ids, more) = self.select_ids(&filter, None).await?;
                Ok(Selected {
                    ids,
                    filters: filters_of(&filter),
                    plan: None,
                    more,
                })
            }
        }
    }

    /// Discards or restores what is selected, so far as it is in the state for it.
    ///
    /// # Errors
    /// There are many and nobody consented, or nobody else approved it; the database is away.
    pub async fn change(
        &self,
        change: StateChange,
        selected: &Selected,
        author: &Author,
        consent: Consent,
    ) -> Result<Changed, Refusal> {
        self.need(consent, selected.messages(), change.doing())?;
        let size = i64::try_from(selected.messages()).unwrap_or(i64::MAX);
        let size = ActSize {
            messages: size,
            ..ActSize::default()
        };
        self.second_person(selected.plan, change.act(), author, &size).await?;
        let act = Act {
            voucher: self.voucher.as_deref(),
            ..author.act(change.as_str(), &selected.filters)
        };
        let done = self
            .patiently(async || match change {
                StateChange::Discard => self.store.discard(act, &selected.ids).await,
                StateChange::Restore => self.store.restore(act, &selected.ids).await,
            })
            .await?;
        Ok(Changed {
            act: act.name,
            selected: selected.messages(),
            changed: done.changed,
            unchanged: selected.messages() - done.changed,
            more: selected.more,
            audit_id: done.audit_id,
            operator: author.operator.clone(),
        })
    }
}

// Purge --------------------------------------------------------------------------------------------------------------

/// Deleting for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purge {
    pub discarded_before: Moment,
    /// Also what was settled before that time.
    pub settled: bool,
    pub author: Author,
}

impl Purge {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "purge"]);
        command.flag("--discarded-before", Some(said(self.discarded_before)));
        command.switch("--settled", self.settled);
        self.author.add_to(&mut command);
        command
    }
}

/// What a purge would delete.
#[derive(Clone, Copy, Debug)]
pub struct Purgeable {
    before: jiff::Timestamp,
    pub messages: usize,
    /// Plans of before that time, of which there is no run.
    pub plans: usize,
}

/// What a purge came to.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Purged {
    pub act: &'static str,
    pub purged: usize,
    pub plans: usize,
    pub audit_id: i64,
    pub operator: String,
}

impl Purged {
    /// Whether it waits for a second person.
    pub fn is_proposed(&self) -> bool {
        self.act != "purge"
    }
}

/// A purge that one person wants, and that takes another.
#[derive(Clone, Debug)]
pub struct ProposedPurge {
    /// As it is said: RFC 3339.
    pub before: String,
    pub settled: bool,
    pub voice: Voice,
}

/// What exactly is purged, as two people say it.
fn subject_of(before: &str, settled: bool) -> String {
    format!("before {before} settled {settled}")
}

impl Desk {
    /// Purges that somebody wants, and that nobody else has done yet, as far as that counts still.
    ///
    /// # Errors
    /// The database is away.
    pub async fn proposed_purges(&self) -> Result<Vec<ProposedPurge>, Refusal> {
        const MOST: i64 = 20;
        let wanted = self.store.wanted("purge", MOST).await?;
        let read = |(subject, voice): (String, Voice)| {
            let (before, settled) = subject.strip_prefix("before ")?.split_once(" settled ")?;
            Some(ProposedPurge {
                before: before.to_owned(),
                settled: settled == "true",
                voice,
            })
        };
        Ok(wanted.into_iter().filter_map(read).collect())
    }

    /// How much a purge would delete.
    ///
    /// # Errors
    /// Its time is not over; the database is away.
    pub async fn purgeable(&self, wish: &Purge) -> Result<Purgeable, Refusal> {
        // To the millisecond, as it is said: what is deleted is what two people have said.
        let before = cut_to_milliseconds(self.when(wish.discarded_before).await?.timestamp());
        if before > self.store.clock().await? {
            return Err(
                Refusal::usage("--discarded-before lies in the future; nothing was purged")
                    .hint("what was discarded a moment ago would go for ever: name a time that is over"),
            );
        }
        let (messages, plans) = self.store.count_purgeable(before, wish.settled).await?;
        let number = |count: i64| usize::try_from(count).unwrap_or(usize::MAX);
        Ok(Purgeable {
            before,
            messages: number(messages),
            plans: number(plans),
        })
    }

    /// Deletes it. Where there is more than one person may purge, the first one's word is written down, and the second's, who
    /// says the same time, does it.
    ///
    /// # Errors
    /// There are many and nobody consented; they said so already; the database is away.
    pub async fn purge(&self, wish: &Purge, purgeable: Purgeable, consent: Consent) -> Result<Purged, Refusal> {
        let before = purgeable.before;
        self.need(consent, purgeable.messages, "purging")?;
        let mut filters = json!({"discardedBefore": rfc3339(before)});
        if wish.settled {
            filters["settledBefore"] = json!(rfc3339(before));
        }
        let size = i64::try_from(purgeable.messages).unwrap_or(i64::MAX);
        if self.two_people(size, &[]).await?.is_some() {
            let subject = subject_of(&rfc3339(before), wish.settled);
            let (_, is_second) = self.voices("purge", &subject, &wish.author).await?;
            if !is_second {
                let act = wish.author.act("purge propose", &filters);
                let outcome = json!({"messages": purgeable.messages});
                let (_, audit_id) = self
                    .store
                    .raise_voice(act, self.new_voice("purge", &subject), &outcome)
                    .await?;
                return Ok(Purged {
                    act: act.name,
                    purged: 0,
                    plans: 0,
                    audit_id,
                    operator: wish.author.operator.clone(),
                });
            }
        }
        let act = Act {
            voucher: self.voucher.as_deref(),
            ..wish.author.act("purge", &filters)
        };
        let done = self
            .patiently(async || self.store.purge(act, before, wish.settled).await)
            .await?;
        Ok(Purged {
            act: act.name,
            purged: done.changed,
            plans: done.plans,
            audit_id: done.audit_id,
            operator: wish.author.operator.clone(),
        })
    }
}
