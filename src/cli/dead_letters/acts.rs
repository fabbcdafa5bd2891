//! `discard`, `restore` and `purge`; who acts, why, and how much is asked back.

use std::io::{BufRead, IsTerminal, stdin};

use clap::Args;

use super::filters::Acting;
use crate::{
    cli::{Context, Exit, Failure, output::complain},
    desk::{self, Consent, Desk, Moment, moment},
    plain::counted,
};

/// Who acts.
#[derive(Args, Debug, Default)]
pub(in crate::cli) struct Operator {
    /// Who acts, for the audit; the user of this machine if left out
    #[arg(long, value_name = "NAME", value_parser = desk::Author::operator)]
    operator: Option<String>,
}

/// Who acts, and why.
#[derive(Args, Debug)]
pub(in crate::cli) struct Author {
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = desk::Author::why)]
    reason: String,
    #[command(flatten)]
    operator: Operator,
}

impl Author {
    pub(in crate::cli) fn typed(&self) -> desk::Author {
        desk::Author {
            operator: self.operator.name(),
            why: self.reason.clone(),
        }
    }
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
    desk::Author::operator(user).is_ok()
}

/// The user that this process runs as: the owner of its entry in /proc.
fn uid() -> String {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").map_or_else(|_| "unknown".to_owned(), |about| about.uid().to_string())
}

/// Asks back before many messages are touched: `--yes`, or the number typed on a terminal.
pub(super) fn consent(desk: &Desk, messages: usize, yes: bool, what: &str) -> Result<Consent, Failure> {
    if yes {
        return Ok(Consent::Given);
    }
    if !desk.asks_back(messages) || !stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(Consent::NotAsked);
    }
    let many = counted(messages, "message");
    complain(&format!("{what} {many}. Type the number to go on:"));
    let mut typed = String::new();
    stdin()
        .lock()
        .read_line(&mut typed)
        .map_err(|error| Failure::usage(format!("the confirmation can not be read: {error}; nothing was done")))?;
    Ok(Consent::Typed(typed.trim().parse().ok()))
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

impl Change {
    pub(in crate::cli) fn typed(&self) -> (desk::Selection, desk::Author) {
        let selection = desk::Selection {
            plan: self.selection.plan,
            which: self.selection.filters.which(),
        };
        (selection, self.author.typed())
    }
}

impl Purge {
    pub(in crate::cli) fn typed(&self) -> desk::Purge {
        desk::Purge {
            discarded_before: self.discarded_before,
            settled: self.settled,
            author: self.author.typed(),
        }
    }
}

pub(super) async fn change(context: &Context, change: desk::StateChange, wish: &Change) -> Result<Exit, Failure> {
    let (done, why_not) = match change {
        desk::StateChange::Discard => ("discarded", "only open messages are discarded"),
        desk::StateChange::Restore => ("restored", "only discarded messages are restored"),
    };
    let desk = context.desk()?;
    let (selection, author) = wish.typed();
    let selected = desk.select(change, &selection).await?;
    let consent = consent(&desk, selected.messages(), wish.yes, change.doing())?;
    let told = desk.change(change, &selected, &author, consent).await?;
    context.out.say(&told, |out| {
        let many = counted(told.changed, "message");
        out.line(format!("{done} {many} (audit {})", told.audit_id))?;
        if told.unchanged > 0 {
            out.line(format!("left {} as they are: {why_not}", told.unchanged))?;
        }
        if told.more {
            out.line("there are more of them: the same command again takes the next")?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

pub(super) async fn purge(context: &Context, wish: &Purge) -> Result<Exit, Failure> {
    let desk = context.desk()?;
    let purge = wish.typed();
    let purgeable = desk.purgeable(&purge).await?;
    let consent = consent(&desk, purgeable.messages, wish.yes, "purging")?;
    let purged = desk.purge(&purge, purgeable, consent).await?;
    context.out.say(&purged, |out| {
        if purged.is_proposed() {
            return out.line(format!(
                "nothing is purged yet (audit {}): it takes two people, the second names the same time, as RFC 3339",
                purged.audit_id
            ));
        }
        out.line(format!(
            "purged {} and {} for ever (audit {})",
            counted(purged.purged, "message"),
            counted(purged.plans, "plan"),
            purged.audit_id
        ))
    })?;
    Ok(if purged.is_proposed() { Exit::Partly } else { Exit::Done })
}
