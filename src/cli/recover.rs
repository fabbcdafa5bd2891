//! `settled recover`: books that are older than what workers told the broker of them.

use clap::Args;

use super::{Context, Exit, Failure, dead_letters::acts::Operator};
use crate::{desk::Author, domain::calendar::rfc3339, plain::plain};

#[derive(Args)]
#[command(after_help = "\
Without --accept-loss it looks and changes nothing: exit 0 if nothing is lost, 1 if something is. With it, it takes two people:
both say the same, with other operators' names and other logins of the database, within dead_letters.approval_lasts. The first
ends with 3, the second with 0; from then on workers start again, in a new epoch of the books.
What is lost stays lost: partners and subscribers were told of it. See the page for operators, before you accept anything.")]
pub(super) struct Recover {
    /// Go on with these books, without what they lack
    #[arg(long, requires = "reason")]
    accept_loss: bool,
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = Author::why, requires = "accept_loss")]
    reason: Option<String>,
    #[command(flatten)]
    operator: Operator,
}

pub(super) async fn run(context: &Context, wish: &Recover) -> Result<Exit, Failure> {
    let author = wish.reason.as_ref().map(|why| Author {
        operator: wish.operator.name(),
        why: why.clone(),
    });
    let recovery = context.desk()?.recover(&context.broker()?, author.as_ref()).await?;
    context.out.say(&recovery, |out| {
        let standing = &recovery.standing;
        match (&standing.loss, &standing.told_at) {
            (Some(loss), _) => out.line(plain(loss))?,
            (None, Some(told_at)) => out.line(format!(
                "nothing is lost: the database has everything that workers told the broker of, until {told_at}"
            ))?,
            (None, None) => out.line("no worker told this broker of any books")?,
        }
        for one in &recovery.accepted {
            out.line(format!(
                "{} accepts it (until {}): {}",
                plain(&one.operator),
                rfc3339(one.expires_at),
                plain(&one.why)
            ))?;
        }
        match recovery.result {
            "proposed" => out.line("nothing is changed yet: it takes a second person, who says the same"),
            "accepted" => out.line(format!("workers may start: the books are in epoch {}", standing.epoch)),
            "lost" => out.line("no worker starts on it: --accept-loss goes on without what is missing"),
            _ => Ok(()),
        }
    })?;
    Ok(match recovery.result {
        "lost" => Exit::Failed,
        "proposed" => Exit::Partly,
        _ => Exit::Done,
    })
}
