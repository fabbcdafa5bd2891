//! `settled reconcile`: what the batches counted, against what they wrote.

use clap::Args;

use super::{
    Context, Exit, Failure,
    output::{Mood, plain},
};
use crate::{
    desk::{Moment, ReconcileLine, ReconcileQuestion, moment},
    domain::calendar::rfc3339,
};

#[derive(Args)]
pub(super) struct Reconcile {
    /// The first moment that counts: RFC 3339, or so long ago, such as 24h
    #[arg(long, value_name = "T", value_parser = moment)]
    since: Moment,
    /// The first moment that does not count any more; now, if it is left out
    #[arg(long, value_name = "T", value_parser = moment)]
    until: Option<Moment>,
}

pub(super) async fn run(context: &Context, wish: &Reconcile) -> Result<Exit, Failure> {
    let question = ReconcileQuestion::new(wish.since, wish.until)?;
    let told = context.desk()?.reconcile(question).await?;
    let found = &told.found;
    context.out.say(&told, |out| {
        out.line(format!("from {} until {}", rfc3339(found.since), rfc3339(found.until)))?;
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
