//! `settled connection`.

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{Listing, Note, known_partner, tell, unknown_partner};
use crate::{
    cli::{Context, Exit, Failure, enterprise_id, external_id, uuid},
    domain::calendar::rfc3339,
    store::registry::{ConnectionRecord, NewConnection, Registered},
};

#[derive(Subcommand)]
pub(in crate::cli) enum ConnectionCommand {
    /// Register a connection; with the same content again it is left as it is
    Add(AddConnection),
    /// Every connection, or those of one partner
    List(Listing),
    /// One connection
    Show(ShowConnection),
}

#[derive(Args)]
pub(in crate::cli) struct AddConnection {
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

#[derive(Args)]
pub(in crate::cli) struct ShowConnection {
    #[arg(value_name = "CONNECTION_ID", value_parser = uuid)]
    id: Uuid,
}

pub(in crate::cli) async fn connection(context: &Context, command: ConnectionCommand) -> Result<Exit, Failure> {
    match command {
        ConnectionCommand::Add(wish) => add_connection(context, wish).await,
        ConnectionCommand::List(listing) => list_connections(context, listing).await,
        ConnectionCommand::Show(wish) => show_connection(context, wish.id).await,
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
        Registered::Conflict(stored) => Err(other_content(&subject, &wish, stored)),
        Registered::Added(_)
        | Registered::Exists(_)
        | Registered::Updated(_)
        | Registered::Revoked(_)
        | Registered::NeverValid
        | Registered::Unproven(_) => tell(context, &subject, &registered, ["registered", "registered already", ""]),
    }
}

/// What is registered and what was given, field by field.
fn other_content(subject: &str, wish: &NewConnection, stored: &ConnectionRecord) -> Failure {
    let fields = [
        (
            "its partner is",
            stored.enterprise_id.clone(),
            wish.enterprise_id.clone(),
        ),
        (
            "its client is",
            stored.client_id.to_string(),
            wish.client_id.to_string(),
        ),
        (
            "the partner's client is",
            format!("{:?}", stored.partners_client_id),
            format!("{:?}", wish.partners_client_id),
        ),
        (
            "the partner's connection is",
            format!("{:?}", stored.partners_connection_id),
            format!("{:?}", wish.partners_connection_id),
        ),
    ];
    let differences: Vec<String> = fields
        .into_iter()
        .filter(|(_, is, given)| is != given)
        .map(|(what, is, given)| format!("{what} {is}, and {given} was given"))
        .collect();
    Failure::refused(format!(
        "{subject} is registered with other content ({}); nothing was changed",
        differences.join("; ")
    ))
    .hint(
        "no command changes a connection, for allocations stand on it: register another under an id of its own with \
         `settled connection add`",
    )
}

async fn show_connection(context: &Context, id: Uuid) -> Result<Exit, Failure> {
    let Some(connection) = context.store()?.registered_connection(id).await? else {
        return Err(Failure::refused(format!("no connection {id} is registered"))
            .hint("`settled connection list` shows every one"));
    };
    context.out.say(&connection, |out| {
        let rows = [
            ("connection", connection.connection_id.to_string()),
            ("enterprise", connection.enterprise_id.clone()),
            ("client", connection.client_id.to_string()),
            ("partner's client", connection.partners_client_id.clone()),
            ("partner's connection", connection.partners_connection_id.clone()),
            ("since", rfc3339(connection.created_at)),
        ];
        let rows = rows.into_iter().map(|(field, value)| vec![field.to_owned(), value]);
        out.table(&["field", "value"], rows.collect(), "")
    })?;
    Ok(Exit::Done)
}

async fn list_connections(context: &Context, listing: Listing) -> Result<Exit, Failure> {
    let connections = context.store()?.connections(listing.enterprise_id()).await?;
    known_partner(context, &listing, connections.is_empty()).await?;
    context.out.say(&connections, |out| {
        let header = [
            "connection",
            "enterprise",
            "client",
            "partner's client",
            "partner's connection",
            "since",
        ];
        let row = |connection: &ConnectionRecord| {
            vec![
                connection.connection_id.to_string(),
                connection.enterprise_id.clone(),
                connection.client_id.to_string(),
                connection.partners_client_id.clone(),
                connection.partners_connection_id.clone(),
                rfc3339(connection.created_at),
            ]
        };
        out.table(
            &header,
            connections.iter().map(row).collect(),
            "no such connection is registered",
        )
    })?;
    Ok(Exit::Done)
}
