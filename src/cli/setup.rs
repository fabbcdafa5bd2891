//! `settled migrate` and `settled topology`: what must be there before a worker starts. Both may be repeated.

use serde::Serialize;

use super::{Context, Exit, Failure};
use crate::{
    broker::{
        Connection,
        topology::{self, DEAD, EVENTS, UNREADABLE, UPDATES, UPDATES_ALL},
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
    let database = context.store()?;
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
        Fate::Bisect | Fate::Ours | Fate::CommittedBefore => {
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

/// Declares exchanges and queues.
pub(super) async fn topology(context: &Context) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Declared {
        exchanges: [&'static str; 5],
        queues: [&'static str; 3],
    }
    let connection = Connection::open(&context.broker()?, "settled topology")
        .await
        .map_err(Failure::no_broker)?;
    topology::declare(&connection).await?;
    connection.close().await?;
    let declared = Declared {
        exchanges: [UPDATES, UPDATES_ALL, EVENTS, DEAD, UNREADABLE],
        queues: [UPDATES, DEAD, UNREADABLE],
    };
    context.out.say(&declared, |out| {
        for name in declared.exchanges {
            out.line(format!("exchange {name}"))?;
        }
        for name in declared.queues {
            out.line(format!("queue    {name}"))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}
