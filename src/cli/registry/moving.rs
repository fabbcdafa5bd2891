//! `settled partner move`.

use std::time::Duration;

use clap::Args;

use crate::{
    cli::{Context, Exit, Failure, dead_letters::acts::Operator, enterprise_id, output::Output},
    desk::{Author, MoveAct, PartnerMove, PartnerMoved},
    plain::plain,
};

#[derive(Args)]
#[command(after_help = "\
Without --apply it says what would move and changes nothing; exit 1 if something is in the way. The other cell's database is
that of SETTLED_TARGET_DATABASE_URL, or of the file that SETTLED_TARGET_DATABASE_URL_FILE names.
A move pauses the partner, waits until nothing of it is under way, copies all that was ever said of it, compares row by row,
lets its money leave the one cell's books and come into the other's, and has its messages judged there. Wherever it is broken
off, nothing is judged twice and nothing is lost: say it again to go on. Exit 3 if it still waits for something.
Said again when it is done, it hands over what came to the old cell since.")]
pub(in crate::cli) struct MovePartner {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// Move it, or go on with a move that was broken off
    #[arg(long, requires = "reason")]
    apply: bool,
    /// Take a move back that has not arrived yet
    #[arg(long, requires = "reason", conflicts_with = "apply")]
    cancel: bool,
    /// Why, for the audit of both cells
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = Author::why)]
    reason: Option<String>,
    #[command(flatten)]
    operator: Operator,
    /// How long to wait at most until nothing of the partner is under way: a number and ms, s or m
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = crate::cli::simulate::duration)]
    wait: Duration,
}

impl MovePartner {
    fn typed(&self) -> PartnerMove {
        let author = || Author {
            operator: self.operator.name(),
            why: self.reason.clone().unwrap_or_default(),
        };
        PartnerMove {
            enterprise_id: self.enterprise_id.clone(),
            act: match (self.apply, self.cancel) {
                (true, _) => MoveAct::Apply(author()),
                (false, true) => MoveAct::Cancel(author()),
                (false, false) => MoveAct::Plan,
            },
            wait: self.wait,
        }
    }
}

pub(in crate::cli) async fn move_partner(context: &Context, wish: &MovePartner) -> Result<Exit, Failure> {
    let moved = context.desk()?.move_partner(&wish.typed()).await?;
    say(&context.out, &moved)?;
    Ok(match moved.result {
        "waits" => Exit::Partly,
        "planned" if !moved.in_the_way.is_empty() => Exit::Failed,
        _ => Exit::Done,
    })
}

fn say(out: &Output, moved: &PartnerMoved) -> Result<(), Failure> {
    let whose = &moved.enterprise_id;
    out.say(moved, |out| {
        out.line(match moved.result {
            "planned" => format!("partner {whose}: from books {} to books {}", moved.source, moved.target),
            "moved" => format!("partner {whose}: it lives in the books {} now", moved.target),
            "cancelled" => format!("partner {whose}: its move is taken back; its messages are judged here again"),
            _ => format!("partner {whose}: it is paused, and its move waits"),
        })?;
        if let Some(waits_for) = &moved.waits_for {
            out.line(format!("  {waits_for}; say it again to go on"))?;
        }
        for (table, rows) in &moved.rows {
            out.line(format!("  {rows} {table}"))?;
        }
        for funds in &moved.funds {
            out.line(format!(
                "  {} {} on connection {}",
                funds.quantity,
                plain(&funds.currency),
                funds.connection_id
            ))?;
        }
        if moved.held > 0 {
            out.line(format!("  {} messages are held, and are handed over", moved.held))?;
        }
        if moved.open_dead_letters > 0 {
            out.line(format!("  {} open dead letters stay here", moved.open_dead_letters))?;
        }
        if moved.handed_over > 0 {
            out.line(format!(
                "  {} messages that were held here are handed over",
                moved.handed_over
            ))?;
        }
        for obstacle in &moved.in_the_way {
            out.line(format!("  in the way: {obstacle}"))?;
        }
        if moved.result == "planned" {
            out.line(format!(
                "how far the move is: {}; --apply begins it or goes on",
                moved.phase
            ))?;
        }
        Ok(())
    })
}
