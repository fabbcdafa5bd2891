//! `settled partner`, `settled key`, `settled connection`: who may speak, and for whom. What is said counts from the
//! worker's next batch on.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::{
    Context, Exit, Failure, bounded, dead_letters::acts::Operator, enterprise_id, external_id, output::yes_no, time,
    uuid,
};
use crate::{
    broker::topology,
    domain::{calendar::CalendarTime, event::rfc3339, signature::PublicKey},
    store::registry::{
        By, ConnectionRecord, KeyRecord, NewConnection, NewKey, NewPartner, PartnerRecord, REMEMBERED_MAX, Registered,
        Reinstated,
    },
};

/// Who acts and perhaps why, for the audit.
#[derive(Args)]
pub(super) struct Note {
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = why)]
    reason: Option<String>,
    #[command(flatten)]
    operator: Operator,
}

impl Note {
    /// Who acts.
    pub(super) fn operator(&self) -> String {
        self.operator.name()
    }

    /// The same with why.
    pub(super) fn by<'a>(&'a self, operator: &'a str) -> By<'a> {
        By {
            operator,
            why: self.reason.as_deref(),
        }
    }
}

fn why(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("say why".into());
    }
    bounded(text, 1024).map(|()| text.to_owned())
}

#[derive(Subcommand)]
pub(super) enum PartnerCommand {
    /// Register a partner; with the same content again it is left as it is
    Add(AddPartner),
    /// Refuse its updates from now on (`partner_inactive`)
    Suspend(OnePartner),
    /// Take its updates again
    Resume(OnePartner),
    /// Every partner
    List,
}

#[derive(Args)]
pub(super) struct AddPartner {
    /// The partner's enterprise, as it stands in its routing keys
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// What people call it
    #[arg(long, allow_hyphen_values = true, value_parser = name)]
    name: String,
    /// It does not settle allocations later
    #[arg(long)]
    no_async_allocations: bool,
    /// It does not settle deallocations later
    #[arg(long)]
    no_async_deallocations: bool,
    /// The AMQP user that its messages must carry in `user_id`
    #[arg(long, value_name = "USER", value_parser = broker_user)]
    broker_user: Option<String>,
    /// Give it an input queue of its own, settlement.updates.<enterprise id>
    #[arg(long)]
    own_queue: bool,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(super) struct OnePartner {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Subcommand)]
pub(super) enum KeyCommand {
    /// Register a key; again, it changes its validity
    Add(AddKey),
    /// Accept the key no more
    Revoke(OneKey),
    /// Accept a revoked key again; what it signed meanwhile and was refused stays refused
    Reinstate(ReinstateKey),
    /// Every key, or those of one partner
    List(Listing),
}

#[derive(Args)]
pub(super) struct AddKey {
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
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(super) struct OneKey {
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
pub(super) struct ReinstateKey {
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

#[derive(Args)]
pub(super) struct Listing {
    /// Only those of this partner
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: Option<String>,
}

#[derive(Subcommand)]
pub(super) enum ConnectionCommand {
    /// Register a connection; with the same content again it is left as it is
    Add(AddConnection),
    /// Every connection, or those of one partner
    List(Listing),
}

#[derive(Args)]
pub(super) struct AddConnection {
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    connection_id: Uuid,
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    client_id: Uuid,
    /// What the partner calls the client
    #[arg(long, value_name = "ID", allow_hyphen_values = true, value_parser = external_id)]
    partners_client_id: String,
    /// What the partner calls the connection
    #[arg(long, value_name = "ID", allow_hyphen_values = true, value_parser = external_id)]
    partners_connection_id: String,
    #[command(flatten)]
    note: Note,
}

fn name(text: &str) -> Result<String, String> {
    bounded(text, 1024).map(|()| text.to_owned())
}

/// An AMQP user's name is a short string.
fn broker_user(text: &str) -> Result<String, String> {
    bounded(text, 255).map(|()| text.to_owned())
}

/// A record, with what the command came to.
#[derive(Serialize)]
struct Told<'a, T> {
    #[serde(flatten)]
    record: &'a T,
    result: &'static str,
}

/// Says the record as stored; `subject` and the words for people.
fn tell<T: Serialize>(
    context: &Context,
    subject: &str,
    registered: &Registered<T>,
    words: [&'static str; 3],
) -> Result<Exit, Failure> {
    let [added, exists, updated] = words;
    let (record, result, word) = match registered {
        Registered::Added(record) => (record, "added", added),
        Registered::Exists(record) => (record, "exists", exists),
        Registered::Updated(record) => (record, "updated", updated),
        Registered::Conflict(_) | Registered::Revoked(_) | Registered::NoPartner | Registered::NeverValid => {
            return Err(Failure::ours("a refusal was taken for an answer"));
        }
    };
    context
        .out
        .say(&Told { record, result }, |out| out.line(format!("{subject}: {word}")))?;
    Ok(Exit::Done)
}

fn unknown_partner(enterprise_id: &str) -> Failure {
    Failure::refused(format!("no partner {enterprise_id} is registered"))
        .hint("`settled partner list` shows who is; `settled partner add` registers one")
}

fn times(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), rfc3339)
}

pub(super) async fn partner(context: &Context, command: PartnerCommand) -> Result<Exit, Failure> {
    match command {
        PartnerCommand::Add(wish) => add_partner(context, wish).await,
        PartnerCommand::Suspend(wish) => suspend(context, &wish, true).await,
        PartnerCommand::Resume(wish) => suspend(context, &wish, false).await,
        PartnerCommand::List => list_partners(context).await,
    }
}

async fn add_partner(context: &Context, wish: AddPartner) -> Result<Exit, Failure> {
    let note = wish.note;
    let operator = note.operator();
    let wish = NewPartner {
        enterprise_id: wish.enterprise_id,
        name: wish.name,
        async_allocations: !wish.no_async_allocations,
        async_deallocations: !wish.no_async_deallocations,
        broker_user: wish.broker_user,
        own_queue: wish.own_queue,
    };
    // Asked first: without the broker nothing is registered.
    let broker = match wish.own_queue {
        true => Some(context.connect("settled partner add").await?),
        false => None,
    };
    let store = context.store()?;
    let registered = context
        .patiently(async || store.add_partner(&wish, note.by(&operator)).await)
        .await?;
    // After the registry: once it is bound, the queue takes the partner's messages away from the common one.
    if let Some(connection) = broker {
        if !matches!(registered, Registered::Conflict(_)) {
            topology::declare_own_queue(&connection, &wish.enterprise_id).await?;
        }
        connection.close().await?;
    }
    let subject = format!("partner {}", wish.enterprise_id);
    match &registered {
        Registered::Conflict(stored) => Err(Failure::refused(format!(
            "{subject} is registered with other content ({}); nothing was changed",
            difference(&wish, stored)
        ))),
        Registered::Exists(stored) if stored.suspended_at.is_some() => tell(
            context,
            &subject,
            &registered,
            ["", "registered already, and suspended", ""],
        ),
        Registered::Added(_)
        | Registered::Exists(_)
        | Registered::Updated(_)
        | Registered::Revoked(_)
        | Registered::NoPartner
        | Registered::NeverValid => tell(context, &subject, &registered, ["registered", "registered already", ""]),
    }
}

/// What is stored differently.
fn difference(wish: &NewPartner, stored: &PartnerRecord) -> String {
    let mut differences = Vec::new();
    if wish.name != stored.name {
        differences.push(format!("its name is {:?}", stored.name));
    }
    for (what, wished, is) in [
        ("allocations", wish.async_allocations, stored.async_allocations),
        ("deallocations", wish.async_deallocations, stored.async_deallocations),
    ] {
        if wished != is {
            let word = if is { "enabled" } else { "not enabled" };
            differences.push(format!("asynchronous {what} are {word}"));
        }
    }
    if wish.broker_user != stored.broker_user {
        differences.push(match &stored.broker_user {
            Some(user) => format!("it is bound to the broker user {user:?}"),
            None => "it is bound to no broker user".to_owned(),
        });
    }
    if wish.own_queue != stored.own_queue {
        let word = if stored.own_queue { "a" } else { "no" };
        differences.push(format!("it has {word} queue of its own"));
    }
    differences.join(", ")
}

async fn suspend(context: &Context, wish: &OnePartner, suspend: bool) -> Result<Exit, Failure> {
    let (store, operator) = (context.store()?, wish.note.operator());
    let enterprise_id = wish.enterprise_id.as_str();
    let registered = context
        .patiently(async || {
            store
                .suspend_partner(enterprise_id, suspend, wish.note.by(&operator))
                .await
        })
        .await?
        .ok_or_else(|| unknown_partner(enterprise_id))?;
    let words = if suspend {
        [
            "",
            "suspended already",
            "suspended; its updates are refused from the next batch on",
        ]
    } else {
        [
            "",
            "not suspended",
            "its updates are taken again from the next batch on",
        ]
    };
    tell(context, &format!("partner {enterprise_id}"), &registered, words)
}

async fn list_partners(context: &Context) -> Result<Exit, Failure> {
    let partners = context.store()?.partners().await?;
    context.out.say(&partners, |out| {
        let header = [
            "enterprise",
            "name",
            "allocations",
            "deallocations",
            "broker user",
            "suspended",
            "since",
        ];
        let row = |partner: &PartnerRecord| {
            vec![
                partner.enterprise_id.clone(),
                partner.name.clone(),
                yes_no(partner.async_allocations),
                yes_no(partner.async_deallocations),
                partner.broker_user.clone().unwrap_or_else(|| "any".to_owned()),
                times(partner.suspended_at),
                rfc3339(partner.created_at),
            ]
        };
        out.table(&header, partners.iter().map(row).collect(), "no partner is registered")
    })?;
    Ok(Exit::Done)
}

pub(super) async fn key(context: &Context, command: KeyCommand) -> Result<Exit, Failure> {
    match command {
        KeyCommand::Add(wish) => add_key(context, wish).await,
        KeyCommand::Revoke(wish) => revoke_key(context, wish).await,
        KeyCommand::Reinstate(wish) => reinstate_key(context, wish).await,
        KeyCommand::List(listing) => list_keys(context, listing).await,
    }
}

/// Reads a key. The complaint does not repeat it.
fn public_key(text: &str) -> Result<PublicKey, Failure> {
    PublicKey::from_xpub_or_hex(text).map_err(|error| Failure::usage(format!("--public-key: {error}")))
}

async fn add_key(context: &Context, wish: AddKey) -> Result<Exit, Failure> {
    let note = wish.note;
    let operator = note.operator();
    let wish = NewKey {
        public_key: public_key(&wish.public_key)?,
        enterprise_id: wish.enterprise_id,
        valid_from: wish.valid_from,
        valid_until: wish.valid_until,
    };
    let store = context.store()?;
    let registered = context
        .patiently(async || store.add_key(&wish, note.by(&operator)).await)
        .await?;
    let subject = format!("key {} of {}", wish.public_key, wish.enterprise_id);
    match &registered {
        Registered::NoPartner => Err(unknown_partner(&wish.enterprise_id)),
        Registered::Conflict(stored) => Err(Failure::refused(format!(
            "the key belongs to partner {}; a key can not be of two partners",
            stored.enterprise_id
        ))),
        Registered::Revoked(stored) => {
            let reinstate = format!(
                "settled key reinstate --enterprise-id {} --public-key {} --reason \"...\"",
                wish.enterprise_id, wish.public_key
            );
            Err(Failure::refused(format!(
                "{subject} was revoked at {}, and `key add` does not undo that; `{reinstate}` does; nothing was changed",
                times(stored.revoked_at)
            ))
            .hint("if it may have been in wrong hands, register a new key instead"))
        }
        Registered::NeverValid => Err(Failure::usage(
            "--valid-until is not after the time from which the key would be valid",
        )),
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
        Reinstated::NotRemembered(_) => {
            return Err(Failure::refused(format!(
                "{subject} was revoked by an older version, which did not remember what was refused meanwhile; it stays \
                 revoked"
            ))
            .hint(new_key));
        }
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
                "reinstated, counts again from the next batch on{until}; {refused} messages that were signed with it and \
                 refused meanwhile stay refused"
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
    let keys = context.store()?.keys(listing.enterprise_id.as_deref()).await?;
    context.out.say(&keys, |out| {
        let header = ["enterprise", "public key", "valid now", "from", "until", "revoked"];
        let row = |key: &KeyRecord| {
            vec![
                key.enterprise_id.clone(),
                key.public_key.clone(),
                yes_no(key.valid),
                key.valid_from.to_string(),
                key.valid_until
                    .map_or_else(|| "-".to_owned(), |until| until.to_string()),
                times(key.revoked_at),
            ]
        };
        out.table(&header, keys.iter().map(row).collect(), "no key is registered")
    })?;
    Ok(Exit::Done)
}

pub(super) async fn connection(context: &Context, command: ConnectionCommand) -> Result<Exit, Failure> {
    match command {
        ConnectionCommand::Add(wish) => add_connection(context, wish).await,
        ConnectionCommand::List(listing) => list_connections(context, listing).await,
    }
}

async fn add_connection(context: &Context, wish: AddConnection) -> Result<Exit, Failure> {
    let note = wish.note;
    let operator = note.operator();
    let wish = NewConnection {
        connection_id: wish.connection_id,
        enterprise_id: wish.enterprise_id,
        client_id: wish.client_id,
        partners_client_id: wish.partners_client_id,
        partners_connection_id: wish.partners_connection_id,
    };
    let store = context.store()?;
    let registered = context
        .patiently(async || store.add_connection(&wish, note.by(&operator)).await)
        .await?;
    let subject = format!("connection {}", wish.connection_id);
    match &registered {
        Registered::NoPartner => Err(unknown_partner(&wish.enterprise_id)),
        Registered::Conflict(stored) => Err(Failure::refused(format!(
            "{subject} is registered with other content (partner {}, client {}, {:?}, {:?}); nothing was changed",
            stored.enterprise_id, stored.client_id, stored.partners_client_id, stored.partners_connection_id
        ))),
        Registered::Added(_)
        | Registered::Exists(_)
        | Registered::Updated(_)
        | Registered::Revoked(_)
        | Registered::NeverValid => tell(context, &subject, &registered, ["registered", "registered already", ""]),
    }
}

async fn list_connections(context: &Context, listing: Listing) -> Result<Exit, Failure> {
    let connections = context.store()?.connections(listing.enterprise_id.as_deref()).await?;
    context.out.say(&connections, |out| {
        let header = [
            "connection",
            "enterprise",
            "client",
            "partner's client",
            "partner's connection",
        ];
        let row = |connection: &ConnectionRecord| {
            vec![
                connection.connection_id.to_string(),
                connection.enterprise_id.clone(),
                connection.client_id.to_string(),
                connection.partners_client_id.clone(),
                connection.partners_connection_id.clone(),
            ]
        };
        out.table(
            &header,
            connections.iter().map(row).collect(),
            "no connection is registered",
        )
    })?;
    Ok(Exit::Done)
}
