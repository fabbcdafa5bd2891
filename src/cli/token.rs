//! `settled token`: who may ask over HTTP.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use super::{
    Context, Exit, Failure, enterprise_id,
    output::yes_no,
    registry::{Listing, Note, Told},
};
use crate::{
    config::parse_duration,
    desk::{Role, Token, TokenRecord, TokenWish, bounded},
    domain::{address::parse_uuid, calendar::rfc3339},
};

#[derive(Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token; it is shown this once
    Add(AddToken),
    /// Accept a token no more, from the next request on
    Revoke(RevokeToken),
    /// Every token, or those of one enterprise, without their secrets
    List(Listing),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleWord {
    /// Sends updates, and reads what became of them
    Partner,
    /// Reads the allocations of its clients
    Client,
}

#[derive(Args)]
pub(super) struct AddToken {
    /// The enterprise that asks with it
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// As what it asks
    #[arg(long, value_enum)]
    role: RoleWord,
    /// What people call it, such as the machine that has it
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, allow_hyphen_values = true, value_parser = name)]
    name: String,
    /// How long it counts: a number and its unit, such as 720h; as api.token_lifetime says if left out
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    valid_for: Option<Duration>,
    /// Requests a second; as api.rate_per_token says if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=1_000_000))]
    rate: Option<i32>,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(super) struct RevokeToken {
    /// Its id, as `settled token list` shows it; or the token itself
    // No value parser: clap would repeat a token in its complaint.
    #[arg(value_name = "TOKEN_ID")]
    token: String,
    #[command(flatten)]
    note: Note,
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    bounded(text, 255).map(|()| text.to_owned())
}

/// A token without end would be forgotten and go on counting.
const LIFETIME_MAX: Duration = Duration::from_secs(87_600 * 3_600);

fn lifetime(text: &str) -> Result<Duration, String> {
    let lasts = parse_duration(text).ok_or("write a number and its unit, such as 720h")?;
    if lasts < Duration::from_secs(1) || lasts > LIFETIME_MAX {
        return Err("must be from 1s to 87600h (10 years)".to_owned());
    }
    Ok(lasts)
}

pub(super) async fn run(context: &Context, command: TokenCommand) -> Result<Exit, Failure> {
    match command {
        TokenCommand::Add(wish) => add(context, wish).await,
        TokenCommand::Revoke(wish) => revoke(context, &wish).await,
        TokenCommand::List(listing) => list(context, listing).await,
    }
}

async fn add(context: &Context, wish: AddToken) -> Result<Exit, Failure> {
    let (note, operator) = (&wish.note, wish.note.operator());
    let typed = TokenWish {
        enterprise_id: wish.enterprise_id.clone(),
        role: match wish.role {
            RoleWord::Partner => Role::Partner,
            RoleWord::Client => Role::Client,
        },
        name: wish.name.clone(),
        rate: wish.rate,
        lasts: wish.valid_for,
    };
    let made = context.desk()?.add_token(&typed, note.by(&operator)).await?;
    context.out.say(&made, |out| {
        out.line(format!(
            "token {} of {} as {}, until {}; it is shown this once:",
            made.record.id,
            made.record.enterprise_id,
            made.record.role,
            rfc3339(made.record.expires_at)
        ))?;
        out.line(made.token.clone())
    })?;
    Ok(Exit::Done)
}

async fn revoke(context: &Context, wish: &RevokeToken) -> Result<Exit, Failure> {
    // What was typed is not repeated: it may be most of a token.
    let id: Uuid = parse_uuid(&wish.token)
        .or_else(|| Token::parse(&wish.token).map(|token| token.id))
        .ok_or_else(|| {
            Failure::usage("that is neither the id of a token nor a token").hint("`settled token list` shows the ids")
        })?;
    let operator = wish.note.operator();
    let (record, was_valid) = context.desk()?.revoke_token(id, wish.note.by(&operator)).await?;
    let (result, words) = match was_valid {
        true => ("revoked", "revoked; it is refused from the next request on"),
        false => ("exists", "revoked already"),
    };
    context.out.say(
        &Told {
            record: &record,
            result,
        },
        |out| out.line(format!("token {id} of {}: {words}", record.enterprise_id)),
    )?;
    Ok(Exit::Done)
}

async fn list(context: &Context, listing: Listing) -> Result<Exit, Failure> {
    let tokens = context.desk()?.tokens(listing.enterprise_id()).await?;
    context.out.say(&tokens, |out| {
        let header = [
            "token",
            "enterprise",
            "role",
            "name",
            "rate",
            "until",
            "revoked",
            "counts now",
        ];
        let row = |token: &TokenRecord| {
            vec![
                token.id.to_string(),
                token.enterprise_id.clone(),
                token.role.clone(),
                token.name.clone(),
                token.rate.map_or_else(|| "-".to_owned(), |rate| rate.to_string()),
                rfc3339(token.expires_at),
                token.revoked_at.map_or_else(|| "-".to_owned(), rfc3339),
                yes_no(token.valid),
            ]
        };
        out.table(&header, tokens.iter().map(row).collect(), "there is no such token")
    })?;
    Ok(Exit::Done)
}
