//! `settled ledger`.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    Context, Exit, Failure,
    output::{Mood, complain, plain},
};
use crate::{
    desk::{BalanceRecord, SignatureNews, SignaturePlace},
    worker::Signals,
};

/// Where there is no terminal, how often a line says how far verifying is.
const LINES: Duration = Duration::from_secs(10);

#[derive(Subcommand)]
pub(super) enum LedgerCommand {
    /// Every account's balance
    Balances,
    /// Prove the books: sums, balances against entries, states against transfers
    Check(Check),
}

#[derive(Args)]
#[command(after_help = "\
Ctrl-C ends the verifying of signatures between two pieces, and says where it goes on: --after. The books are proven each time,
in one moment.
Exit 0 if everything that was asked for is right, 1 if something is wrong, 3 if signatures were left out.")]
pub(super) struct Check {
    /// Also verify the signature of every settlement again, on all cores
    #[arg(long)]
    signatures: bool,
    /// Go on with the signatures where a check that was ended left off
    #[arg(long, value_name = "PLACE", requires = "signatures", value_parser = SignaturePlace::parse)]
    after: Option<SignaturePlace>,
}

pub(super) async fn run(context: &Context, command: LedgerCommand) -> Result<Exit, Failure> {
    match command {
        LedgerCommand::Balances => balances(context).await,
        LedgerCommand::Check(wish) => check(context, &wish).await,
    }
}

async fn balances(context: &Context) -> Result<Exit, Failure> {
    let balances = context.desk()?.balances().await?;
    context.out.say(&balances, |out| {
        let row = |balance: &BalanceRecord| {
            vec![
                balance.currency.clone(),
                balance.account.clone(),
                balance.owner.map_or_else(|| "-".to_owned(), |owner| owner.to_string()),
                balance.balance.clone(),
            ]
        };
        let header = ["currency", "account", "owner", "balance"];
        out.numbers(&header, balances.iter().map(row).collect(), "no account was opened yet")
    })?;
    Ok(Exit::Done)
}

async fn check(context: &Context, wish: &Check) -> Result<Exit, Failure> {
    let desk = context.desk()?;
    let mut checked = desk.check_books(|_, _| {}).await?;
    if wish.signatures {
        let mut signals =
            Signals::new().map_err(|error| Failure::ours(format!("signals can not be caught: {error}")))?;
        let mut watch = Watch::new(context.out.json);
        let stop = async {
            signals.next().await;
        };
        let found = desk.check_signatures(wish.after, stop, |news| watch.see(news)).await;
        watch.bar.finish_and_clear();
        checked = checked.with(found?);
    }
    let books = &checked.books;
    let next = checked.signatures.as_ref().and_then(|found| found.next);
    context.out.say(&checked, |out| {
        for problem in &books.problems {
            out.line(format!("{}  {}", out.coloured(Mood::Bad, "wrong"), plain(problem)))?;
        }
        let counted: Vec<String> = books
            .counted
            .iter()
            .map(|(table, count)| format!("{count} {table}"))
            .collect();
        let counted = counted.join(", ");
        if books.problems.is_empty() {
            out.line(format!(
                "{}  the books are right: {counted}",
                out.coloured(Mood::Good, "ok")
            ))?;
        } else {
            out.line(format!("the books are wrong: {counted}"))?;
        }
        let Some(found) = &checked.signatures else {
            return Ok(());
        };
        let verified = format!(
            "{} settlements verified, {} of them forged",
            found.verified, found.forged
        );
        match next {
            Some(next) => out.line(format!(
                "{verified}; the rest was left out: settled ledger check --signatures --after {next}"
            )),
            None if found.forged == 0 => out.line(format!("{}  {verified}", out.coloured(Mood::Good, "ok"))),
            None => out.line(verified),
        }
    })?;
    Ok(match next {
        _ if !books.problems.is_empty() => Exit::Failed,
        Some(_) => Exit::Partly,
        None => Exit::Done,
    })
}

/// What people see while signatures are verified: a bar on a terminal, a line now and then elsewhere.
struct Watch {
    bar: ProgressBar,
    told: Instant,
    /// A program that reads JSON is told nothing on the way, and who sees the bar no lines.
    silent: bool,
}

impl Watch {
    fn new(json: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal && !json {
            let bar = ProgressBar::with_draw_target(Some(1_000), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("verifying {wide_bar} {percent}% {msg} {eta}");
            style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style))
        } else {
            ProgressBar::hidden()
        };
        Self {
            bar,
            told: Instant::now(),
            silent: json || terminal,
        }
    }

    fn see(&mut self, news: SignatureNews) {
        self.bar.set_position(news.read);
        self.bar.set_message(news.verified.to_string());
        if !self.silent && self.told.elapsed() >= LINES {
            self.told = Instant::now();
            complain(&format!(
                "{} settlements verified, {} % of the table read; if it ends here: --after {}",
                news.verified,
                news.read / 10,
                news.place
            ));
        }
    }
}
