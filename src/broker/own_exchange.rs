//! A partner's own exchange: what is published there under the partner's own keys comes to the common topology, and nothing
//! else does. Who may write to this exchange alone speaks for nobody else, on every version of the broker: who publishes is
//! a right on the exchange, and which keys go on is said by its bindings.

use lapin::ExchangeKind;
use lapin::options::ExchangeBindOptions;
use lapin::types::FieldTable;

use super::channel::{close, declare_exchange, short};
use super::{ANSWER_TIMEOUT, BrokerError, Connection, answer};
use crate::domain::names::{UPDATES, UPDATES_ALL, own_queue, update_keys};

/// The name of a partner's own exchange. None where that is the name of another.
pub fn own_exchange(enterprise_id: &str) -> Option<String> {
    // As its own queue is called, if it has one.
    let name = own_queue(enterprise_id);
    (name != UPDATES_ALL).then_some(name)
}

/// Declares it and binds it into the common topology. Can be said again. Says whether there is such an exchange.
///
/// # Errors
/// The broker is away or refuses.
pub async fn declare(connection: &Connection, enterprise_id: &str) -> Result<bool, BrokerError> {
    let Some(name) = own_exchange(enterprise_id) else {
        return Ok(false);
    };
    let channel = connection.channel().await?;
    declare_on(&channel, &name, false).await?;
    for key in update_keys(enterprise_id) {
        let bound = channel.exchange_bind(
            UPDATES.into(),
            short(&name)?,
            short(&key)?,
            ExchangeBindOptions { nowait: false },
            FieldTable::default(),
        );
        answer("a binding", ANSWER_TIMEOUT, bound).await?;
    }
    close(&channel).await?;
    Ok(true)
}

/// Whether it is there. A refusal costs the connection a channel number.
///
/// # Errors
/// The broker is away, or refuses to say.
pub async fn is_there(connection: &Connection, enterprise_id: &str) -> Result<bool, BrokerError> {
    let Some(name) = own_exchange(enterprise_id) else {
        return Ok(false);
    };
    let channel = connection.channel().await?;
    match declare_on(&channel, &name, true).await {
        Ok(()) => {
            close(&channel).await?;
            Ok(true)
        }
        Err(BrokerError::Refused { code: 404, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn declare_on(channel: &lapin::Channel, name: &str, passive: bool) -> Result<(), BrokerError> {
    declare_exchange(
        channel,
        short(name)?,
        ExchangeKind::Topic,
        passive,
        FieldTable::default(),
    )
    .await
}
