//! `settled currency`: what partners call the currencies.

use clap::{Args, Subcommand};

use super::{Listing, Note, Told, known_partner, times};
use crate::{
    cli::{Context, Exit, Failure, currency as code, currency::must_be_meant, enterprise_id},
    desk::{NewSymbol, SymbolMapped, SymbolRecord},
    domain::calendar::rfc3339,
};

#[derive(Subcommand)]
pub(in crate::cli) enum CurrencyCommand {
    /// Say which currency a partner means by a symbol of its own; several may mean the same
    Map(MapSymbol),
    /// Take a symbol away: from then on it means the currency of its own name
    Unmap(UnmapSymbol),
    /// Every symbol, or those of one partner
    List(ListSymbols),
}

#[derive(Args)]
pub(in crate::cli) struct MapSymbol {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// What the partner writes in amount.currency; compared exactly
    #[arg(long, allow_hyphen_values = true, value_parser = code)]
    symbol: String,
    /// The currency of the books that it means
    #[arg(long, allow_hyphen_values = true, value_parser = code)]
    currency: String,
    /// Also where it means another currency now; messages that wait are judged by what it means when they are judged
    #[arg(long)]
    replace: bool,
    /// The books have never held this currency, and it is meant
    #[arg(long)]
    new_currency: bool,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(in crate::cli) struct UnmapSymbol {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[arg(long, allow_hyphen_values = true, value_parser = code)]
    symbol: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(in crate::cli) struct ListSymbols {
    #[command(flatten)]
    listing: Listing,
    /// Also what they meant before, the oldest first
    #[arg(long)]
    history: bool,
}

pub(in crate::cli) async fn currency(context: &Context, command: CurrencyCommand) -> Result<Exit, Failure> {
    match command {
        CurrencyCommand::Map(wish) => map(context, wish).await,
        CurrencyCommand::Unmap(wish) => unmap(context, wish).await,
        CurrencyCommand::List(wish) => list(context, wish).await,
    }
}

async fn map(context: &Context, wish: MapSymbol) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    if !wish.new_currency {
        let known = context.store()?.currencies().await?;
        must_be_meant(context, &wish.currency, &known, "nothing was mapped")?;
    }
    let wanted = NewSymbol {
        enterprise_id: wish.enterprise_id,
        symbol: wish.symbol,
        currency: wish.currency,
        replace: wish.replace,
    };
    let mapped = context.desk()?.map_symbol(&wanted, wish.note.by(&operator)).await?;
    let (record, result, words) = match &mapped {
        SymbolMapped::Added(record) => (record, "added", "from the next batch on".to_owned()),
        SymbolMapped::Exists(record) => (record, "exists", "as it did before".to_owned()),
        SymbolMapped::Replaced(record, was) => {
            (record, "updated", format!("and no more {was}, from the next batch on"))
        }
    };
    context.out.say(&Told { record, result }, |out| {
        out.line(format!(
            "{} of {} means {}, {words}",
            record.symbol, record.enterprise_id, record.currency
        ))
    })?;
    Ok(Exit::Done)
}

async fn unmap(context: &Context, wish: UnmapSymbol) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    let record = context
        .desk()?
        .unmap_symbol(&wish.enterprise_id, &wish.symbol, wish.note.by(&operator))
        .await?;
    let told = Told {
        record: &record,
        result: "removed",
    };
    context.out.say(&told, |out| {
        out.line(format!(
            "{} of {} means {} no more, from the next batch on",
            record.symbol, record.enterprise_id, record.currency
        ))
    })?;
    Ok(Exit::Done)
}

async fn list(context: &Context, wish: ListSymbols) -> Result<Exit, Failure> {
    let symbols = context
        .desk()?
        .symbols(wish.listing.enterprise_id(), wish.history)
        .await?;
    known_partner(context, &wish.listing, symbols.is_empty()).await?;
    context.out.say(&symbols, |out| {
        let row = |record: &SymbolRecord| {
            vec![
                record.enterprise_id.clone(),
                record.symbol.clone(),
                record.currency.clone(),
                rfc3339(record.since),
                times(record.until),
            ]
        };
        out.table(
            &["enterprise", "symbol", "currency", "since", "until"],
            symbols.iter().map(row).collect(),
            "no symbol is mapped: each means the currency of its own name",
        )
    })?;
    Ok(Exit::Done)
}
