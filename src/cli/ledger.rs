//! `settled deposit` and `settled ledger`.

use clap::{Args, Subcommand};
use serde::Serialize;
use uuid::Uuid;

use super::{
    Context, Exit, Failure, currency,
    currency::must_be_meant,
    external_id,
    output::{Mood, plain},
    quantity,
    registry::Note,
    uuid,
};
use crate::{
    desk::BalanceRecord,
    domain::ledger::{Amount, Quantity},
    store::registry::Deposited,
};

#[derive(Args)]
pub(super) struct Deposit {
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    client_id: Uuid,
    #[arg(long, value_parser = currency)]
    currency: String,
    /// Base units (satoshi, wei)
    #[arg(long, value_parser = quantity)]
    quantity: Quantity,
    /// A currency that the books have never held is meant
    #[arg(long)]
    new_currency: bool,
    /// What tells it from the client's other deposits; the same reference again changes nothing
    #[arg(long, allow_hyphen_values = true, value_parser = external_id)]
    reference: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Subcommand)]
pub(super) enum LedgerCommand {
    /// Every account's balance
    Balances,
    /// Prove the books: sums, balances against entries, states against transfers
    Check,
}

/// Funds come in.
pub(super) async fn deposit(context: &Context, wish: Deposit) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Told<'a> {
        client_id: Uuid,
        currency: &'a str,
        quantity: &'a Quantity,
        reference: &'a str,
        result: &'static str,
    }
    let amount = Amount {
        currency: wish.currency,
        quantity: wish.quantity,
    };
    let (store, operator) = (context.store()?, wish.note.operator());
    if !wish.new_currency {
        must_be_meant(context, &amount.currency, &store.currencies().await?)?;
    }
    let deposited = context
        .patiently(async || {
            store
                .deposit(wish.client_id, &amount, &wish.reference, wish.note.by(&operator))
                .await
        })
        .await?;
    let (result, word) = match deposited {
        Deposited::Deposited => ("deposited", "came in"),
        Deposited::Exists => ("exists", "came in before; nothing was changed"),
        Deposited::Conflict(earlier) => {
            let Amount { currency, quantity } = &earlier;
            return Err(Failure::refused(format!(
                "client {} has another deposit under the reference {:?} ({}); nothing was changed",
                wish.client_id,
                wish.reference,
                [
                    ("currency", currency, &amount.currency),
                    ("quantity", &quantity.to_string(), &amount.quantity.to_string())
                ]
                .into_iter()
                .filter(|(_, is, given)| is != given)
                .map(|(what, is, given)| format!("its {what} is {is}, and {given} was given"))
                .collect::<Vec<_>>()
                .join("; ")
            ))
            .hint("a reference is used once per client: choose another if this is another deposit"));
        }
    };
    let told = Told {
        client_id: wish.client_id,
        currency: &amount.currency,
        quantity: &amount.quantity,
        reference: &wish.reference,
        result,
    };
    context.out.say(&told, |out| {
        out.line(format!(
            "deposit {}: {} {} of client {} {word}",
            plain(&wish.reference),
            amount.quantity,
            amount.currency,
            wish.client_id
        ))
    })?;
    Ok(Exit::Done)
}

pub(super) async fn run(context: &Context, command: LedgerCommand) -> Result<Exit, Failure> {
    match command {
        LedgerCommand::Balances => balances(context).await,
        LedgerCommand::Check => check(context).await,
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

async fn check(context: &Context) -> Result<Exit, Failure> {
    let checked = context.desk()?.check_books().await?;
    let books = &checked.books;
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
        if checked.ok {
            out.line(format!(
                "{}  the books are right: {counted}",
                out.coloured(Mood::Good, "ok")
            ))
        } else {
            out.line(format!("the books are wrong: {counted}"))
        }
    })?;
    Ok(if checked.ok { Exit::Done } else { Exit::Failed })
}
