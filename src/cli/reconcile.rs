//! `settled reconcile`: what the batches counted, against what they wrote.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    Context, Exit, Failure,
    output::{Mood, plain},
};
use crate::desk::{Moment, ReconcileLine, ReconcileQuestion, SentNonce, moment};

#[derive(Args)]
pub(super) struct Reconcile {
    /// The first moment that counts: RFC 3339, or so long ago, such as 24h
    #[arg(long, value_name = "T", value_parser = moment)]
    since: Moment,
    /// The first moment that does not count any more; now, if it is left out
    #[arg(long, value_name = "T", value_parser = moment)]
    until: Option<Moment>,
    /// Compare with the cell of SETTLED_TARGET_DATABASE_URL too: what both judged, and what left the one for the other
    #[arg(long)]
    across: bool,
    /// What was sent, a line of JSON each: {"enterpriseId": ..., "nonce": ...}; - reads stdin. What is in neither cell is found
    #[arg(long, value_name = "FILE", requires = "across")]
    sent: Option<PathBuf>,
}

/// What somebody sent, by their own list.
fn sent(path: &Path) -> Result<Vec<SentNonce>, Failure> {
    let read = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    };
    let text = read.map_err(|error| Failure::usage(format!("{} can not be read: {error}", path.display())))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let sent = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|_| {
            Failure::usage(format!(
                "{}, line {}: it is no message that was sent",
                path.display(),
                index + 1
            ))
            .hint("a line has {\"enterpriseId\": ..., \"nonce\": ...}")
        })
    });
    sent.collect()
}

pub(super) async fn run(context: &Context, wish: &Reconcile) -> Result<Exit, Failure> {
    let question = ReconcileQuestion::new(wish.since, wish.until)?;
    let sent = wish.sent.as_deref().map(sent).transpose()?;
    let desk = context.desk()?;
    let mut told = desk.reconcile(question).await?;
    if wish.across {
        told = desk.reconcile_across(told, sent).await?;
    }
    let found = &told.found;
    context.out.say(&told, |out| {
        out.line(format!("from {} until {}", found.since, found.until))?;
        for line in &found.lines {
            let (mood, word) = if line.ok {
                (Mood::Good, "ok   ")
            } else {
                (Mood::Bad, "wrong")
            };
            out.line(format!("{}  {}", out.coloured(mood, word), sentence(line)))?;
            if !line.ok {
                out.line(format!("       {}", out.coloured(Mood::Dim, line.advice)))?;
            }
        }
        for problem in &found.problems {
            out.line(plain(problem))?;
        }
        Ok(())
    })?;
    Ok(if told.ok { Exit::Done } else { Exit::Failed })
}

/// `settled 120 = settlements 120`; with the difference, where there is one.
fn sentence(line: &ReconcileLine) -> String {
    let both = format!(
        "{} {} {} {} {}",
        line.left.what,
        line.left.count,
        line.relation.as_str(),
        line.right.what,
        line.right.count
    );
    if line.ok {
        return both;
    }
    format!("{both}: differs by {}", line.differs_by)
}
