//! `settled nonce`: what a partner may say no more.

use clap::{Args, Subcommand};

use super::{Context, Exit, Failure, dead_letters::acts::Author, enterprise_id};
use crate::plain::plain;

#[derive(Subcommand)]
pub(super) enum NonceCommand {
    /// Make a proven nonce that has not settled unusable, for ever
    #[command(after_help = "\
From the worker's next batch on every message with it is refused (nonce_voided): copies, replays, and other messages under
the same nonce. One that waits for its reservation is refused at once. A nonce that has settled can not be voided.")]
    Void(VoidNonce),
}

#[derive(Args)]
pub(super) struct VoidNonce {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// The nonce, as the partner wrote it
    #[arg(long, allow_hyphen_values = true)]
    nonce: String,
    #[command(flatten)]
    author: Author,
}

pub(super) async fn run(context: &Context, command: NonceCommand) -> Result<Exit, Failure> {
    let NonceCommand::Void(wish) = command;
    let desk = context.desk()?;
    let told = desk
        .void_nonce(&wish.enterprise_id, &wish.nonce, &wish.author.typed())
        .await?;
    let sentence = match (told.result, told.was_parked) {
        ("voided", true) => "voided; its message, which waits, is refused within a second".to_owned(),
        ("voided", false) => "voided; nothing settles with it any more".to_owned(),
        ("exists", _) => "is voided already".to_owned(),
        _ => {
            let reason = told.receipt.reason.as_deref().unwrap_or_default();
            format!("is refused for good already ({reason}); there is nothing to void")
        }
    };
    context.out.say(&told, |out| {
        let nonce = plain(&wish.nonce);
        out.line(format!("nonce {nonce} of {}: {sentence}", wish.enterprise_id))
    })?;
    Ok(Exit::Done)
}
