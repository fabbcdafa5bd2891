//! `settled client`: whose clients may read over HTTP.

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{
    Context, Exit, Failure, enterprise_id,
    registry::{Listing, Note, Told},
    uuid,
};
use crate::{
    desk::{ClientAdded, ClientRecord},
    domain::calendar::rfc3339,
};

#[derive(Subcommand)]
pub(super) enum ClientCommand {
    /// Register a client's enterprise; with the same content again it is left as it is
    Add(AddClient),
    /// Every client, or those of one enterprise
    List(Listing),
}

#[derive(Args)]
pub(super) struct AddClient {
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    client_id: Uuid,
    /// The client's enterprise, as which it reads over HTTP
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[command(flatten)]
    note: Note,
}

pub(super) async fn run(context: &Context, command: ClientCommand) -> Result<Exit, Failure> {
    match command {
        ClientCommand::Add(wish) => add(context, wish).await,
        ClientCommand::List(listing) => list(context, listing).await,
    }
}

async fn add(context: &Context, wish: AddClient) -> Result<Exit, Failure> {
    let operator = wish.note.operator();
    let added = context
        .desk()?
        .add_client(wish.client_id, &wish.enterprise_id, wish.note.by(&operator))
        .await?;
    let (record, result, words) = match &added {
        ClientAdded::Added(record) => (record, "added", "registered"),
        ClientAdded::Exists(record) => (record, "exists", "registered already"),
    };
    context.out.say(&Told { record, result }, |out| {
        out.line(format!(
            "client {} of {}: {words}",
            record.client_id, record.enterprise_id
        ))
    })?;
    Ok(Exit::Done)
}

async fn list(context: &Context, listing: Listing) -> Result<Exit, Failure> {
    let clients = context.desk()?.clients(listing.enterprise_id()).await?;
    context.out.say(&clients, |out| {
        let row = |client: &ClientRecord| {
            vec![
                client.client_id.to_string(),
                client.enterprise_id.clone(),
                rfc3339(client.created_at),
            ]
        };
        out.table(
            &["client", "enterprise", "since"],
            clients.iter().map(row).collect(),
            "no such client is registered",
        )
    })?;
    Ok(Exit::Done)
}
