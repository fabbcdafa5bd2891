//! `settled migrate` and `settled topology`: what must be there before a worker starts. Both may be repeated.

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Context, Exit, Failure, enterprise_id, output::complain};
use crate::{
    broker::{
        BrokerError, Connection, own_exchange, own_queue, server_version,
        topology::{
            self, BROKER_MADE, BrokerExport, DEAD, EPOCH, EVENTS, HIDDEN, PartnerDoor, UNREADABLE, UPDATES,
            UPDATES_ALL, hidden,
        },
    },
    store::{self, Fate, Store, registry::PartnerRecord},
};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Topology {
    #[command(subcommand)]
    act: Option<TopologyAct>,
}

#[derive(Subcommand)]
enum TopologyAct {
    /// Users with the least rights, as lines for rabbitmqctl, and everything as definitions that the broker imports
    Export(Export),
}

#[derive(Args)]
#[command(after_help = "\
First the lines, which make the users (rabbitmqctl asks for each password) and say what each may do; what a user may do now is
replaced. Then `settled topology`, as the operator, and the definitions: rabbitmqctl import_definitions FILE.
A partner that is bound to a broker user publishes to an exchange of its own, settlement.updates.<enterprise id>, and reads
settlement.outcomes.<enterprise id>. Nothing is changed by this command.")]
struct Export {
    /// What this partner needs, and nothing else
    #[arg(long, value_name = "ENTERPRISE_ID", value_parser = enterprise_id)]
    partner: Option<String>,
    /// Print the definitions instead of the lines
    #[arg(long)]
    definitions: bool,
}

/// Applies the schema.
pub(super) async fn migrate(context: &Context) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Migrated {
        applied: Vec<String>,
        version: i32,
    }
    let database = context.store_to_migrate()?;
    if let Some(version) = database.schema_version().await?
        && version > store::schema_version()
    {
        let sentence = format!(
            "the database's schema is version {version}, newer than the {} that this program knows",
            store::schema_version()
        );
        return Err(Failure::refused(sentence).hint("use the newer program; nothing was changed"));
    }
    let applied = database.migrate().await.map_err(|error| match error.fate {
        _ if error.is_right() => Failure::right(format!("the schema could not be applied: {error}")),
        _ if error.sqlstate.as_deref() == Some("55P03") => {
            Failure::refused("the schema was left as it is: somebody reads or writes one of its tables for long")
                .hint("wait until the backup, `settled reconcile` or the open transaction is over, and run it again")
        }
        Fate::Away | Fate::Retry => error.into(),
        // What stands in the way is in the database, not a schema that was forgotten.
        Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken | Fate::Full => {
            Failure::ours(format!("the schema could not be applied: {error}"))
                .hint("the user must own the schema \"settled\", or be allowed to create it in this database")
        }
    })?;
    let migrated = Migrated {
        applied,
        version: store::schema_version(),
    };
    context.out.say(&migrated, |out| {
        if migrated.applied.is_empty() {
            return out.line(format!("schema {} is there already", migrated.version));
        }
        for name in &migrated.applied {
            out.line(format!("applied {name}"))?;
        }
        out.line(format!("the schema is version {} now", migrated.version))
    })?;
    Ok(Exit::Done)
}

pub(super) async fn topology(context: &Context, wish: &Topology) -> Result<Exit, Failure> {
    match &wish.act {
        None => declare(context).await,
        Some(TopologyAct::Export(wish)) => export(context, wish).await,
    }
}

/// Declares exchanges and queues; those of partners too, where a database says who has one.
async fn declare(context: &Context) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Declared {
        exchanges: Vec<String>,
        queues: Vec<String>,
        /// What was left out, and why.
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    }
    // The common queues serve everybody meanwhile: a database that is not there yet is worth a line and no more.
    let own = partners(context).await;
    let books = books(context).await;
    let note = match (&own, &books) {
        (Err(failure), _) => Some(("partners' own queues and ", "were", failure.message())),
        (Ok(_), Err(failure)) => Some(("", "was", failure.message())),
        (Ok(_), Ok(None)) => Some((
            "",
            "was",
            "its name is made of the books' id, and there is no database, or no schema in it",
        )),
        (Ok(_), Ok(Some(_))) => None,
    };
    let note = note.map(|(also, were, why)| {
        format!("{also}{HIDDEN} {were} left out ({why}): run this again when the database answers, as who may read it")
    });
    let hidden = books.ok().flatten().map(hidden);
    let own = own.unwrap_or_default();
    let (exchanges, queues) = context
        .declares(async |connection| all(connection, hidden.as_deref(), &own).await)
        .await?;
    let declared = Declared {
        exchanges,
        queues,
        note,
    };
    context.out.say(&declared, |out| {
        for name in &declared.exchanges {
            out.line(format!("exchange {name}"))?;
        }
        for name in &declared.queues {
            out.line(format!("queue    {name}"))?;
        }
        match &declared.note {
            Some(note) => out.line(note),
            None => Ok(()),
        }
    })?;
    Ok(Exit::Done)
}

/// The common ones, the hidden queue where its name is known, and what partners have of their own: exchanges and queues.
async fn all(
    connection: &Connection,
    hidden: Option<&str>,
    own: &[PartnerRecord],
) -> Result<(Vec<String>, Vec<String>), BrokerError> {
    topology::declare(connection).await?;
    let mut exchanges = [UPDATES, UPDATES_ALL, EVENTS, DEAD, BROKER_MADE, UNREADABLE, EPOCH]
        .map(str::to_owned)
        .to_vec();
    let mut queues = [UPDATES, DEAD, BROKER_MADE, UNREADABLE, EPOCH]
        .map(str::to_owned)
        .to_vec();
    if let Some(name) = hidden {
        topology::declare_hidden(connection, name).await?;
        queues.push(name.to_owned());
    }
    for partner in own {
        let enterprise_id = &partner.enterprise_id;
        if partner.broker_user.is_some() && own_exchange::declare(connection, enterprise_id).await? {
            exchanges.extend(own_exchange::own_exchange(enterprise_id));
        }
        if partner.own_queue {
            own_queue::declare(connection, enterprise_id).await?;
            queues.push(topology::own_queue(enterprise_id));
        }
    }
    Ok((exchanges, queues))
}

/// Which books these are; none where there is no database yet.
async fn books(context: &Context) -> Result<Option<Uuid>, Failure> {
    match prepared(context).await? {
        None => Ok(None),
        Some(store) => Ok(Some(store.books_epoch().await?.books)),
    }
}

/// Every partner, or why they are not known.
async fn partners(context: &Context) -> Result<Vec<PartnerRecord>, Failure> {
    match prepared(context).await? {
        None => Ok(Vec::new()),
        Some(store) => Ok(store.partners().await?),
    }
}

/// The database, where there is one with a schema of ours.
async fn prepared(context: &Context) -> Result<Option<Store>, Failure> {
    if context.settings.database.url.is_empty() {
        return Ok(None);
    }
    let store = context.store()?;
    Ok(store.schema_version().await?.map(|_| store))
}

/// Users and definitions for the broker's own tools.
async fn export(context: &Context, wish: &Export) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Exported {
        /// For a shell, in this order.
        lines: Vec<String>,
        /// What rabbitmqctl imports.
        definitions: Value,
        /// What is to be known.
        notes: Vec<String>,
    }
    let broker = context.broker()?;
    let known = context.store()?.partners().await?;
    let known: Vec<PartnerRecord> = match &wish.partner {
        None => known,
        Some(enterprise_id) => {
            let Some(one) = known.iter().find(|partner| partner.enterprise_id == *enterprise_id) else {
                return Err(Failure::refused(format!("no partner {enterprise_id} is registered"))
                    .hint("`settled partner list` shows every one"));
            };
            // With everybody who shares its user: the lines replace what that user may do.
            let user = one.login().to_owned();
            let shared = known.into_iter().filter(|partner| partner.login() == user);
            shared.collect()
        }
    };
    let mut notes = Vec::new();
    for partner in known.iter().filter(|partner| partner.broker_user.is_none()) {
        let enterprise_id = &partner.enterprise_id;
        notes.push(format!(
            "partner {enterprise_id} is bound to no broker user: its user is called so here; then `settled partner set \
             {enterprise_id} --broker-user {enterprise_id}`, or messages of other users under its key are judged as its own"
        ));
    }
    for (index, partner) in known.iter().enumerate() {
        let others = known.iter().skip(index + 1);
        for other in others.filter(|other| other.login() == partner.login()) {
            notes.push(format!(
                "partners {} and {} share the broker user {}: the broker does not keep them apart",
                partner.enterprise_id,
                other.enterprise_id,
                partner.login()
            ));
        }
        if broker.user().is_ok_and(|user| user == partner.login()) {
            notes.push(format!(
                "partner {} logs in as {}, as this program does now: the lines replace what that user may do",
                partner.enterprise_id,
                partner.login()
            ));
        }
        if own_exchange::own_exchange(&partner.enterprise_id).is_none() {
            notes.push(format!(
                "partner {}: no exchange can have its name, so it publishes to {UPDATES} and is not kept apart from others",
                partner.enterprise_id
            ));
        }
    }
    if let Ok(version) = server_version(&broker).await {
        notes.push(format!("{version}: {}", super::doctor::topic_permissions(&version)));
    }
    let doors = known
        .into_iter()
        .map(|partner| PartnerDoor {
            user: partner.login().to_owned(),
            enterprise_id: partner.enterprise_id,
            own_queue: partner.own_queue,
        })
        .collect();
    let export = BrokerExport::new(&broker.vhost(), doors, wish.partner.is_some());
    if let Some(partner) = export.in_our_place() {
        let PartnerDoor {
            enterprise_id, user, ..
        } = partner;
        return Err(Failure::refused(format!(
            "partner {enterprise_id} would log in as {user}, which is a user of our own: the one would have the rights of the other"
        ))
        .hint(format!(
            "`settled partner set {enterprise_id} --broker-user USER` gives it a user of another name"
        )));
    }
    let exported = Exported {
        lines: export.lines(),
        definitions: export.definitions(),
        notes,
    };
    if !context.out.json {
        for note in &exported.notes {
            complain(note);
        }
    }
    context.out.say(&exported, |out| {
        if wish.definitions {
            return out.document(&exported.definitions);
        }
        exported.lines.iter().try_for_each(|line| out.line(line))
    })?;
    Ok(Exit::Done)
}
