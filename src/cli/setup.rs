//! `settled migrate` and `settled topology`: what must be there before a worker starts. Both may be repeated.

use serde::Serialize;

use super::{Context, Exit, Failure};
use crate::{
    broker::{
        own_queue,
        topology::{self, BROKER_MADE, DEAD, EVENTS, UNREADABLE, UPDATES, UPDATES_ALL},
    },
    store::{self, Fate},
};

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

/// Declares exchanges and queues; partners' own queues too, where a database says who has one.
pub(super) async fn topology(context: &Context) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Declared {
        exchanges: [&'static str; 6],
        queues: Vec<String>,
        /// What was left out, and why.
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    }
    let connection = context.connect("settled topology").await?;
    topology::declare(&connection).await?;
    let mut queues = [UPDATES, DEAD, BROKER_MADE, UNREADABLE].map(str::to_owned).to_vec();
    // The common queues serve everybody meanwhile: a database that is not there yet is worth a line and no more.
    let own = own_queues(context).await;
    let note = own.as_ref().err().map(|failure| {
        let why = failure.message();
        format!("partners' own queues were left out ({why}): run this again when the database answers")
    });
    for enterprise_id in own.unwrap_or_default() {
        own_queue::declare(&connection, &enterprise_id).await?;
        queues.push(topology::own_queue(&enterprise_id));
    }
    connection.close().await?;
    let declared = Declared {
        exchanges: [UPDATES, UPDATES_ALL, EVENTS, DEAD, BROKER_MADE, UNREADABLE],
        queues,
        note,
    };
    context.out.say(&declared, |out| {
        for name in declared.exchanges {
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

/// Partners with a queue of their own, or why they are not known.
async fn own_queues(context: &Context) -> Result<Vec<String>, Failure> {
    if context.settings.database.url.is_empty() {
        return Ok(Vec::new());
    }
    let store = context.store()?;
    match store.schema_version().await? {
        None => Ok(Vec::new()),
        Some(_) => Ok(store.own_queues().await?),
    }
}
