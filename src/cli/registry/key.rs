//! `settled key`.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Listing, Note, known_partner, tell, times, unknown_partner, why};
use crate::{
    cli::{Context, Exit, Failure, dead_letters::acts::Operator, enterprise_id, output::yes_no, time},
    config::parse_duration,
    desk::{self, KeyRotation},
    domain::{
        calendar::{CalendarTime, rfc3339},
        signature::PublicKey,
    },
    plain::counted,
    store::registry::{By, KeyRecord, NewKey, REMEMBERED_MAX, Registered, Reinstated},
};

#[derive(Subcommand)]
pub(in crate::cli) enum KeyCommand {
    /// Register a key; again, it changes its validity
    Add(AddKey),
    /// Register a key that takes the place of the partner's others, which end when the grace is over
    Rotate(RotateKey),
    /// Print what the owner of a key is to sign, to prove that it has the private half
    Challenge(OneKey),
    /// Accept the key no more
    Revoke(OneKey),
    /// Accept a revoked key again; what it signed meanwhile and was refused stays refused
    Reinstate(ReinstateKey),
    /// Every key, or those of one partner
    List(Listing),
}

#[derive(Args)]
pub(in crate::cli) struct AddKey {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// An xpub or tpub (the key itself, nothing is derived), or 33 bytes in hexadecimal
    // No value parser: clap would repeat a private key in its complaint.
    #[arg(long, value_name = "XPUB_OR_HEX")]
    public_key: String,
    /// RFC 3339; from now on if left out
    #[arg(long, value_name = "TIME", value_parser = time)]
    valid_from: Option<CalendarTime>,
    /// RFC 3339; without end if left out
    #[arg(long, value_name = "TIME", value_parser = time)]
    valid_until: Option<CalendarTime>,
    /// The owner's signature over what `settled key challenge` printed
    #[arg(long, value_name = "SIGNATURE", allow_hyphen_values = true)]
    proof: Option<String>,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(in crate::cli) struct RotateKey {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// The new key: an xpub or tpub (the key itself, nothing is derived), or 33 bytes in hexadecimal
    #[arg(long, value_name = "XPUB_OR_HEX")]
    public_key: String,
    /// How long the partner's other keys go on counting at most: a number and its unit, such as 48h; 0s ends them at once
    #[arg(long, value_name = "DURATION", value_parser = grace)]
    grace: Duration,
    /// When the new key ends, RFC 3339; without end if left out
    #[arg(long, value_name = "TIME", value_parser = time)]
    valid_until: Option<CalendarTime>,
    /// The owner's signature over what `settled key challenge` printed
    #[arg(long, value_name = "SIGNATURE", allow_hyphen_values = true)]
    proof: Option<String>,
    #[command(flatten)]
    note: Note,
}

/// Keys that end so late hardly end.
const GRACE_MAX: Duration = Duration::from_secs(8_760 * 3_600);

fn grace(text: &str) -> Result<Duration, String> {
    let lasts = parse_duration(text).ok_or("write a number and its unit, such as 48h")?;
    if lasts > GRACE_MAX {
        return Err("must be at most 8760h (a year)".to_owned());
    }
    Ok(lasts)
}

#[derive(Args)]
pub(in crate::cli) struct OneKey {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// The key, in either form
    #[arg(long, value_name = "XPUB_OR_HEX")]
    public_key: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(in crate::cli) struct ReinstateKey {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// The key, in either form
    #[arg(long, value_name = "XPUB_OR_HEX")]
    public_key: String,
    /// Why it is to be trusted again, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = why)]
    reason: String,
    #[command(flatten)]
    operator: Operator,
}

pub(in crate::cli) async fn key(context: &Context, command: KeyCommand) -> Result<Exit, Failure> {
    match command {
        KeyCommand::Add(wish) => add_key(context, wish).await,
        KeyCommand::Rotate(wish) => rotate_key(context, wish).await,
        KeyCommand::Challenge(wish) => challenge_key(context, wish).await,
        KeyCommand::Revoke(wish) => revoke_key(context, wish).await,
        KeyCommand::Reinstate(wish) => reinstate_key(context, wish).await,
        KeyCommand::List(listing) => list_keys(context, listing).await,
    }
}

/// Reads a key. The complaint does not repeat it.
fn public_key(text: &str) -> Result<PublicKey, Failure> {
    PublicKey::from_xpub_or_hex(text).map_err(|error| {
        Failure::usage(format!("--public-key: {error}")).hint(
            "the partner's xpub, or the 33 bytes of its public key as 66 hexadecimal digits that begin with 02 or 03",
        )
    })
}

async fn add_key(context: &Context, wish: AddKey) -> Result<Exit, Failure> {
    let note = wish.note;
    let operator = note.operator();
    let key = public_key(&wish.public_key)?;
    let wish = NewKey {
        public_key: desk::keys::acceptable(key).map_err(|error| {
            Failure::usage(format!("--public-key: {error}")).hint("have the partner make a new key")
        })?,
        enterprise_id: wish.enterprise_id,
        valid_from: wish.valid_from,
        valid_until: wish.valid_until,
        proof: context.desk()?.proof(wish.proof),
    };
    let store = context.store()?;
    let registered = context
        .patiently(async || store.add_key(&wish, note.by(&operator)).await)
        .await?;
    let subject = format!("key {} of {}", wish.public_key, wish.enterprise_id);
    match &registered {
        Registered::NoPartner => Err(unknown_partner(&wish.enterprise_id)),
        Registered::Conflict(stored) => Err(desk::keys::anothers(stored).into()),
        Registered::Revoked(stored) => Err(desk::keys::revoked(stored).into()),
        Registered::Unproven(why) => Err(desk::keys::unproven(*why, &wish.enterprise_id, wish.public_key).into()),
        Registered::NeverValid => Err(Failure::usage(
            "--valid-until is not after the time from which the key would be valid",
        )
        .hint("name a later end, or leave it out")),
        Registered::Added(stored) | Registered::Exists(stored) | Registered::Updated(stored) => {
            let until = stored
                .valid_until
                .map_or_else(|| "without end".to_owned(), |until| format!("until {until}"));
            let subject = format!("{subject}, valid from {} {until}", stored.valid_from);
            let words = ["registered", "registered already", "its validity was changed"];
            tell(context, &subject, &registered, words)
        }
    }
}

async fn rotate_key(context: &Context, wish: RotateKey) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    let rotation = KeyRotation {
        enterprise_id: wish.enterprise_id,
        public_key: public_key(&wish.public_key)?,
        grace: wish.grace,
        valid_until: wish.valid_until,
        proof: wish.proof,
    };
    let told = context.desk()?.rotate_key(&rotation, wish.note.by(&operator)).await?;
    context.out.say(&told, |out| {
        let new = &told.key;
        let word = if told.result == "exists" {
            "is the partner's newest already; nothing was changed"
        } else {
            "takes the place of the others from the next batch on"
        };
        out.line(format!("key {} of {}: {word}", new.public_key, new.enterprise_id))?;
        for old in &told.ending {
            let until = old.valid_until.map(|until| until.to_string()).unwrap_or_default();
            out.line(format!(
                "key {} of {}: ends at {until}",
                old.public_key, old.enterprise_id
            ))?;
        }
        for next in &told.later {
            out.line(format!(
                "key {} of {}: begins at {} and was left as it is; `settled key revoke` takes it out",
                next.public_key, next.enterprise_id, next.valid_from
            ))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

async fn challenge_key(context: &Context, wish: OneKey) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    let key = public_key(&wish.public_key)?;
    let desk = context.desk()?;
    let told = desk
        .challenge_key(&wish.enterprise_id, key, wish.note.by(&operator))
        .await?;
    context.out.say(&told, |out| {
        out.line(format!(
            "until {} the owner of key {} signs this text, as it signs payloads:",
            rfc3339(told.expires_at),
            told.public_key
        ))?;
        out.line(told.challenge.clone())
    })?;
    Ok(Exit::Done)
}

fn unknown_key(enterprise_id: &str, key: PublicKey) -> Failure {
    Failure::refused(format!("partner {enterprise_id} has no key {key}")).hint("`settled key list` shows every key")
}

async fn revoke_key(context: &Context, wish: OneKey) -> Result<Exit, Failure> {
    let key = public_key(&wish.public_key)?;
    let (store, operator) = (context.store()?, wish.note.operator());
    let registered = context
        .patiently(async || {
            store
                .revoke_key(&wish.enterprise_id, key, wish.note.by(&operator))
                .await
        })
        .await?
        .ok_or_else(|| unknown_key(&wish.enterprise_id, key))?;
    let words = ["", "revoked already", "revoked; it is refused from the next batch on"];
    tell(
        context,
        &format!("key {key} of {}", wish.enterprise_id),
        &registered,
        words,
    )
}

async fn reinstate_key(context: &Context, wish: ReinstateKey) -> Result<Exit, Failure> {
    /// The record, and what stays refused.
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Told<'a> {
        #[serde(flatten)]
        record: &'a KeyRecord,
        result: &'static str,
        refused_for_ever: i64,
    }
    let key = public_key(&wish.public_key)?;
    let (store, operator) = (context.store()?, wish.operator.name());
    let by = By {
        operator: &operator,
        why: Some(&wish.reason),
    };
    let reinstated = context
        .patiently(async || store.reinstate_key(&wish.enterprise_id, key, by).await)
        .await?;
    let subject = format!("key {key} of {}", wish.enterprise_id);
    let new_key = "register a new key with `settled key add`, and have the partner sign with that";
    let (record, result, word, refused_for_ever) = match &reinstated {
        Reinstated::Unknown => return Err(unknown_key(&wish.enterprise_id, key)),
        Reinstated::TooMany(_) => {
            return Err(Failure::refused(format!(
                "while {subject} was revoked, more than {REMEMBERED_MAX} messages signed with it were refused, and no \
                 more are remembered; it stays revoked"
            ))
            .hint(new_key));
        }
        Reinstated::NotRevoked(record) => (record, "exists", "is not revoked".to_owned(), 0),
        Reinstated::Reinstated(record, refused) => {
            let until = if record.valid {
                ""
            } else {
                ", but its validity is over or not begun"
            };
            let word = format!(
                "reinstated, counts again from the next batch on{until}; {} that {} signed with it and refused \
                 meanwhile stay refused",
                counted(*refused, "message"),
                if *refused == 1 { "was" } else { "were" }
            );
            (record, "reinstated", word, *refused)
        }
    };
    let told = Told {
        record,
        result,
        refused_for_ever,
    };
    context.out.say(&told, |out| out.line(format!("{subject}: {word}")))?;
    Ok(Exit::Done)
}

async fn list_keys(context: &Context, listing: Listing) -> Result<Exit, Failure> {
    let keys = context.store()?.keys(listing.enterprise_id()).await?;
    known_partner(context, &listing, keys.is_empty()).await?;
    context.out.say(&keys, |out| {
        let header = [
            "enterprise",
            "public key",
            "valid now",
            "from",
            "until",
            "last used",
            "proven",
            "revoked",
        ];
        let row = |key: &KeyRecord| {
            vec![
                key.enterprise_id.clone(),
                key.public_key.clone(),
                yes_no(key.valid),
                key.valid_from.to_string(),
                key.valid_until
                    .map_or_else(|| "-".to_owned(), |until| until.to_string()),
                times(key.last_used_at),
                times(key.proven_at),
                times(key.revoked_at),
            ]
        };
        out.table(&header, keys.iter().map(row).collect(), "no such key is registered")
    })?;
    Ok(Exit::Done)
}
