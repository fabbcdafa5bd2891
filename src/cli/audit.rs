//! `settled audit`: who did what, why, and what came of it.

use clap::{Args, Subcommand};

use super::{Context, Exit, Failure};
use crate::{
    desk::{AuditQuestion, AuditRecord, Moment, moment},
    domain::calendar::rfc3339,
    plain::brief,
};

#[derive(Subcommand)]
pub(super) enum AuditCommand {
    /// Every act of an operator, the newest first; with --json one line each
    List(List),
}

#[derive(Args)]
pub(super) struct List {
    /// Only those of this operator
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// Only this act: partner add, partner set, partner suspend, partner quarantine, partner resume, partner move,
    /// partner move cancel, key add, key rotate, key challenge, key revoke, key reinstate, nonce void, connection add,
    /// currency map, currency unmap, client add, token add, token revoke, deposit, withdraw, reserve, plan, plan approve,
    /// replay, replay ended, resume, cancel, discard, restore, export, show body, purge, purge propose, outbox retry,
    /// recover, recover propose
    #[arg(long)]
    act: Option<String>,
    /// At this time or later: RFC 3339, or so long ago, such as 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Before this time: RFC 3339, or so long ago, such as 30m
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// So many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Go on after the act of this number
    #[arg(long, value_name = "CURSOR", value_parser = super::cursor)]
    after: Option<i64>,
}

pub(super) async fn run(context: &Context, command: AuditCommand) -> Result<Exit, Failure> {
    let AuditCommand::List(question) = command;
    let asked = AuditQuestion {
        operator: question.operator,
        act: question.act,
        since: question.since,
        until: question.until,
    };
    let page = context.desk()?.acts(&asked, question.after, question.limit).await?;
    let acts = &page.items;
    if context.out.json {
        for act in acts {
            context.out.document(act)?;
        }
        return Ok(Exit::Done);
    }
    print(context, acts)?;
    if let (true, Some(last)) = (page.more, acts.last()) {
        context.out.line(format!("there are more: --after {}", last.id))?;
    }
    Ok(Exit::Done)
}

fn print(context: &Context, acts: &[AuditRecord]) -> Result<(), Failure> {
    let row = |act: &AuditRecord| {
        vec![
            act.id.to_string(),
            rfc3339(act.at),
            act.operator.clone(),
            act.act.clone(),
            act.why.clone().unwrap_or_default(),
            brief(&act.filters),
            brief(&act.outcome),
            act.signed().unwrap_or_else(|| "-".to_owned()),
        ]
    };
    let header = [
        "audit",
        "at",
        "operator",
        "act",
        "why",
        "filters",
        "outcome",
        "database user",
    ];
    context.out.table(
        &header,
        acts.iter().map(row).collect(),
        "no such act stands in the audit",
    )
}
