//! `settled deposit` and `settled withdraw`.

use clap::Args;
use uuid::Uuid;

use super::{Context, Exit, Failure, currency, currency::must_be_meant, external_id, quantity, registry::Note, uuid};
use crate::{
    desk::{FundsWay, FundsWish},
    domain::ledger::{Amount, Quantity},
    plain::plain,
};

#[derive(Args)]
pub(super) struct Funds {
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    client_id: Uuid,
    #[arg(long, value_parser = currency)]
    currency: String,
    /// Base units (satoshi, wei)
    #[arg(long, allow_hyphen_values = true, value_parser = quantity)]
    quantity: Quantity,
    /// What tells it from the client's others; the same reference again changes nothing
    #[arg(long, allow_hyphen_values = true, value_parser = external_id)]
    reference: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(super) struct Deposit {
    #[command(flatten)]
    funds: Funds,
    /// A currency that the books have never held is meant
    #[arg(long)]
    new_currency: bool,
}

/// Funds come in.
pub(super) async fn deposit(context: &Context, wish: Deposit) -> Result<Exit, Failure> {
    if !wish.new_currency {
        let held = context.desk()?.currencies().await?;
        must_be_meant(context, &wish.funds.currency, &held, "nothing was deposited")?;
    }
    move_funds(context, FundsWay::In, wish.funds).await
}

/// Funds go out.
pub(super) async fn withdraw(context: &Context, wish: Funds) -> Result<Exit, Failure> {
    move_funds(context, FundsWay::Out, wish).await
}

async fn move_funds(context: &Context, way: FundsWay, wish: Funds) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    let funds = FundsWish {
        client_id: wish.client_id,
        amount: Amount {
            currency: wish.currency,
            quantity: wish.quantity,
        },
        reference: wish.reference,
    };
    let told = context.desk()?.move_funds(way, funds, wish.note.by(&operator)).await?;
    let (what, word) = match way {
        FundsWay::In => ("deposit", "came in"),
        FundsWay::Out => ("withdrawal", "went out"),
    };
    let before = match told.result {
        "exists" => " before; nothing was changed",
        _ => "",
    };
    context.out.say(&told, |out| {
        out.line(format!(
            "{what} {}: {} {} of client {} {word}{before}",
            plain(&told.reference),
            told.amount.quantity,
            told.amount.currency,
            told.client_id
        ))
    })?;
    Ok(Exit::Done)
}
