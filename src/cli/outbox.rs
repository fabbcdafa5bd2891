//! `settled outbox ...`: what nobody was told yet, and having the broker's refusals published again.

use clap::{Args, Subcommand};

use super::{Context, Exit, Failure, dead_letters::acts::Author};
use crate::{
    desk::{self, Pending, PublicationStanding, Refused, RetriedOne},
    domain::calendar::rfc3339,
};

#[derive(Subcommand)]
pub(super) enum OutboxCommand {
    /// What the broker refused, and what waits to be published; with --json one line each
    List(List),
    /// Publish again what the broker refused
    #[command(after_help = "\
What is named goes back into the outbox, where the relay of a running worker takes it and publishes it as it does everything:
mandatory, and until it is confirmed. Then this says what became of each.
Exit 0 if all of it was published; 3 if some was refused again, still waits (is a worker running?), or was left as it was.")]
    Retry(Retry),
}

#[derive(Args)]
pub(super) struct List {
    /// So many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
}

#[derive(Args)]
pub(super) struct Retry {
    /// The numbers that `outbox list` shows
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<i64>,
    /// Everything that was refused, 1000 at a time
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    author: Author,
}

impl Retry {
    pub(super) fn typed(&self) -> desk::Retry {
        desk::Retry {
            which: if self.all {
                Refused::All
            } else {
                Refused::Ids(self.ids.clone())
            },
            author: self.author.typed(),
        }
    }
}

pub(super) async fn run(context: &Context, command: OutboxCommand) -> Result<Exit, Failure> {
    match command {
        OutboxCommand::List(question) => list(context, &question).await,
        OutboxCommand::Retry(wish) => retry(context, &wish).await,
    }
}

async fn list(context: &Context, question: &List) -> Result<Exit, Failure> {
    let page = context.desk()?.unpublished(question.limit).await?;
    if context.out.json {
        for pending in &page.items {
            context.out.document(pending)?;
        }
        return Ok(Exit::Done);
    }
    let row = |pending: &Pending| {
        let state = match pending.state {
            PublicationStanding::Refused => "refused",
            PublicationStanding::Waiting => "waiting",
        };
        vec![
            pending.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            state.to_owned(),
            rfc3339(pending.since),
            pending.batch_id.to_string(),
            pending.exchange.clone().unwrap_or_else(|| "-".to_owned()),
            pending.routing_key.clone().unwrap_or_else(|| "-".to_owned()),
            pending.why.clone().unwrap_or_default(),
            pending.bytes.to_string(),
        ]
    };
    let header = [
        "id",
        "state",
        "since",
        "batch",
        "exchange",
        "routing key",
        "why",
        "bytes",
    ];
    let rows = page.items.iter().map(row).collect();
    context
        .out
        .numbers(&header, rows, "nothing waits, and nothing was refused")?;
    if page.more {
        context.out.line("there are more: --limit")?;
    }
    Ok(Exit::Done)
}

async fn retry(context: &Context, wish: &Retry) -> Result<Exit, Failure> {
    let retried = context.desk()?.retry(&wish.typed(), |_, _| {}).await?;
    context.out.say(&retried, |out| {
        let row = |one: &RetriedOne| {
            let became = match (one.became, one.refused_id) {
                ("refused", Some(id)) => format!("refused again, as {id}"),
                ("waiting", _) => "waiting: the relay of a running worker publishes it".to_owned(),
                ("left", _) => "left as it was".to_owned(),
                (became, _) => became.to_owned(),
            };
            let publication = one.publication.as_ref();
            vec![
                one.id.to_string(),
                publication
                    .and_then(|publication| publication.routing_key.clone())
                    .unwrap_or_else(|| "-".to_owned()),
                became,
                one.why.clone().unwrap_or_default(),
            ]
        };
        let header = ["id", "routing key", "became", "why"];
        out.table(&header, retried.publications.iter().map(row).collect(), "")?;
        if let Some(audit_id) = retried.audit_id {
            out.line(format!("published {} again (audit {audit_id})", retried.published))?;
        }
        if retried.more {
            out.line("there are more of them: the same command again takes the next")?;
        }
        Ok(())
    })?;
    Ok(if retried.is_done() { Exit::Done } else { Exit::Partly })
}
