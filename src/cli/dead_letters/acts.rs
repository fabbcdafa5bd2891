//! `discard`, `restore` and `purge`; who acts, why, and how much is asked back.

use std::io::{BufRead, IsTerminal, stdin};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::filters::Acting;
use crate::{
    cli::{Context, Exit, Failure, bounded, cut, output::complain, reconcile::moment, when},
    domain::{dead_letter::State, decide::Reason, event::rfc3339},
    store::{
        Store, StoreError,
        audit::Act,
        letters::{Filter, acts::Done},
        reconcile::Moment,
    },
};

/// Who acts.
#[derive(Args, Debug)]
pub(in crate::cli) struct Operator {
    /// Who acts, for the audit; the user of this machine if left out
    #[arg(long, value_name = "NAME", value_parser = name)]
    operator: Option<String>,
}

/// Who acts, and why.
#[derive(Args, Debug)]
pub(super) struct Author {
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = why)]
    pub(super) reason: String,
    #[command(flatten)]
    pub(super) operator: Operator,
}

fn name(text: &str) -> Result<String, String> {
    bounded(text, 128).map(|()| text.to_owned())
}

fn why(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("say why".into());
    }
    // Elsewhere --reason selects. Taken for the why, it would act on far more than was meant.
    if Reason::parse(text.trim()).is_some() {
        return Err("this is the code of a reason, not why you act: --reason-code selects by it".into());
    }
    bounded(text, 1024).map(|()| text.to_owned())
}

impl Operator {
    pub(in crate::cli) fn name(&self) -> String {
        let variable = |name| std::env::var(name).ok().filter(|user| name_fits(user));
        self.operator
            .clone()
            .or_else(|| variable("USER"))
            .or_else(|| variable("LOGNAME"))
            .unwrap_or_else(|| format!("uid {}", uid()))
    }
}

fn name_fits(user: &str) -> bool {
    name(user).is_ok()
}

/// The user that this process runs as: the owner of its entry in /proc.
fn uid() -> String {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").map_or_else(|_| "unknown".to_owned(), |about| about.uid().to_string())
}

/// Asks back before many messages are touched: `--yes`, or the number typed on a terminal.
pub(super) fn confirm(context: &Context, messages: usize, yes: bool, what: &str) -> Result<(), Failure> {
    let most = context.settings.dead_letters.confirm_above;
    if yes || messages <= most {
        return Ok(());
    }
    let sentence =
        format!("{what} {messages} messages is more than dead_letters.confirm_above ({most}); nothing was done");
    if !stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Failure::usage(sentence).hint("give --yes if that is what you mean"));
    }
    complain(&format!("{what} {messages} messages. Type the number to go on:"));
    let mut typed = String::new();
    stdin()
        .lock()
        .read_line(&mut typed)
        .map_err(|error| Failure::usage(format!("the confirmation can not be read: {error}; nothing was done")))?;
    if typed.trim().parse() == Ok(messages) {
        return Ok(());
    }
    Err(Failure::usage(format!("that is not {messages}; nothing was done")))
}

/// A change of state: of what, by whom and why.
#[derive(Args)]
pub(in crate::cli) struct Change {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    author: Author,
    /// Do not ask back, however many there are
    #[arg(long)]
    yes: bool,
}

/// A plan's messages, or those of a filter.
#[derive(Args, Debug)]
struct Selection {
    /// The messages of this plan, instead of filters
    #[arg(value_name = "PLAN")]
    plan: Option<i64>,
    #[command(flatten)]
    filters: Acting,
}

#[derive(Args)]
pub(in crate::cli) struct Purge {
    /// RFC 3339, or so long ago, such as 720h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    discarded_before: Moment,
    /// Also what was settled before that time
    #[arg(long)]
    settled: bool,
    #[command(flatten)]
    author: Author,
    /// Do not ask back, however many there are
    #[arg(long)]
    yes: bool,
}

/// Messages, frozen, and how they were selected.
struct Selected {
    ids: Vec<Uuid>,
    filters: Value,
    /// There are more than one act may take.
    more: bool,
}

/// The ids of a filter, up to `dead_letters.plan_max`, and whether there are more.
pub(super) async fn select(
    context: &Context,
    store: &Store,
    filter: &Filter,
    limit: Option<usize>,
) -> Result<(Vec<Uuid>, bool), Failure> {
    let most = context.settings.dead_letters.plan_max;
    let limit = limit.unwrap_or(most).min(most);
    let ask = i64::try_from(limit + 1).unwrap_or(i64::MAX);
    let mut ids = context
        .patiently(async || store.select_dead_letters(filter, ask).await)
        .await?;
    let more = cut(&mut ids, limit);
    Ok((ids, more))
}

impl Selection {
    async fn select(&self, context: &Context, store: &Store, states: &[State]) -> Result<Selected, Failure> {
        match self.plan {
            Some(_) if self.filters.is_given() => Err(Failure::usage("a plan and filters can not be given together")
                .hint("a plan is a selection that is frozen: make another one with other filters")),
            Some(plan) => {
                if store.plan(plan).await?.is_none() {
                    return Err(no_such_plan(plan));
                }
                Ok(Selected {
                    ids: store.plan_messages(plan).await?,
                    filters: json!({ "plan": plan }),
                    more: false,
                })
            }
            None if !self.filters.is_given() => Err(Failure::usage("no messages are selected")
                .hint("name a plan, or give a filter; --state open means every open one")),
            None => {
                let filter = self.filters.filter(store, states).await?;
                let (ids, more) = select(context, store, &filter, None).await?;
                Ok(Selected {
                    ids,
                    filters: filters_of(&filter),
                    more,
                })
            }
        }
    }
}

pub(super) fn no_such_plan(plan: i64) -> Failure {
    Failure::refused(format!("there is no plan {plan}"))
        .hint("`settled dead-letters plan` makes one and says its number")
}

/// A filter as the audit keeps it.
pub(super) fn filters_of(filter: &Filter) -> Value {
    serde_json::to_value(filter).unwrap_or_default()
}

/// What an act came to.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    act: &'static str,
    selected: usize,
    changed: usize,
    unchanged: usize,
    /// There are more of the same filter.
    more: bool,
    audit_id: i64,
    operator: String,
}

pub(super) async fn discard(context: &Context, wish: Change) -> Result<Exit, Failure> {
    let store = context.store()?;
    let words = Words {
        name: "discard",
        doing: "discarding",
        done: "discarded",
        why_not: "only open messages are discarded",
    };
    let change = async |act: Act<'_>, ids: &[Uuid]| store.discard(act, ids).await;
    change_all(context, &store, wish, State::Open, &words, change).await
}

pub(super) async fn restore(context: &Context, wish: Change) -> Result<Exit, Failure> {
    let store = context.store()?;
    let words = Words {
        name: "restore",
        doing: "restoring",
        done: "restored",
        why_not: "only discarded messages are restored",
    };
    let change = async |act: Act<'_>, ids: &[Uuid]| store.restore(act, ids).await;
    change_all(context, &store, wish, State::Discarded, &words, change).await
}

/// How an act is called, and why it may leave messages as they are.
struct Words {
    name: &'static str,
    doing: &'static str,
    done: &'static str,
    why_not: &'static str,
}

/// Changes what is selected, of which messages in `state` are the ones that can be.
async fn change_all(
    context: &Context,
    store: &Store,
    wish: Change,
    state: State,
    words: &Words,
    change: impl AsyncFn(Act<'_>, &[Uuid]) -> Result<Done, StoreError>,
) -> Result<Exit, Failure> {
    let selected = wish.selection.select(context, store, &[state]).await?;
    confirm(context, selected.ids.len(), wish.yes, words.doing)?;
    let operator = wish.author.operator.name();
    let act = Act {
        name: words.name,
        operator: &operator,
        why: Some(&wish.author.reason),
        filters: &selected.filters,
    };
    let done = context.patiently(async || change(act, &selected.ids).await).await?;
    let told = Told {
        act: words.name,
        selected: selected.ids.len(),
        changed: done.changed,
        unchanged: selected.ids.len() - done.changed,
        more: selected.more,
        audit_id: done.audit_id,
        operator: operator.clone(),
    };
    context.out.say(&told, |out| {
        out.line(format!(
            "{} {} messages (audit {})",
            words.done, told.changed, told.audit_id
        ))?;
        if told.unchanged > 0 {
            out.line(format!("left {} as they are: {}", told.unchanged, words.why_not))?;
        }
        if told.more {
            out.line("there are more of them: the same command again takes the next")?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

pub(super) async fn purge(context: &Context, wish: Purge) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Purged {
        act: &'static str,
        purged: usize,
        plans: usize,
        audit_id: i64,
        operator: String,
    }
    let store = context.store()?;
    let before = when(&store, wish.discarded_before).await?;
    if before > store.clock().await? {
        return Err(
            Failure::usage("--discarded-before lies in the future; nothing was purged")
                .hint("what was discarded a moment ago would go for ever: name a time that is over"),
        );
    }
    let messages = store.count_purgeable(before, wish.settled).await?;
    confirm(
        context,
        usize::try_from(messages).unwrap_or_default(),
        wish.yes,
        "purging",
    )?;
    let operator = wish.author.operator.name();
    let mut filters = json!({"discardedBefore": rfc3339(before)});
    if wish.settled {
        filters["settledBefore"] = json!(rfc3339(before));
    }
    let act = Act {
        name: "purge",
        operator: &operator,
        why: Some(&wish.author.reason),
        filters: &filters,
    };
    let done = context
        .patiently(async || store.purge(act, before, wish.settled).await)
        .await?;
    let purged = Purged {
        act: act.name,
        purged: done.changed,
        plans: done.plans,
        audit_id: done.audit_id,
        operator: operator.clone(),
    };
    context.out.say(&purged, |out| {
        out.line(format!(
            "purged {} messages and {} plans for ever (audit {})",
            purged.purged, purged.plans, purged.audit_id
        ))
    })?;
    Ok(Exit::Done)
}
