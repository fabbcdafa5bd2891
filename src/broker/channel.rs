//! What is said on a channel whatever it is about, and what was found by asking.

use std::collections::BTreeMap;

use lapin::{
    ExchangeKind,
    options::ExchangeDeclareOptions,
    types::{AMQPValue, FieldTable, ShortString},
};

use super::{ANSWER_TIMEOUT, BrokerError, Connection, answer};

/// What is to be said about one thing of the topology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologyFinding {
    /// What was looked at: `queue settlement.updates`.
    pub object: String,
    /// What is wrong with it; nothing if it is as it should be.
    pub problem: Option<String>,
    /// What to do about it, or what could not be looked at.
    pub hint: Option<String>,
}

impl TopologyFinding {
    /// What is wrong, and what to do about it, in one sentence.
    pub fn sentence(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        let hint = self.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
        Some(format!("{}: {problem}{hint}", self.object))
    }
}

pub(super) async fn declare_exchange(
    channel: &lapin::Channel,
    name: ShortString,
    kind: ExchangeKind,
    passive: bool,
    arguments: FieldTable,
) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions {
        passive,
        durable: true,
        auto_delete: false,
        internal: false,
        nowait: false,
    };
    let declared = channel.exchange_declare(name, kind, options, arguments);
    answer("an exchange declaration", ANSWER_TIMEOUT, declared).await
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

pub(super) fn table(entries: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> FieldTable {
    entries
        .into_iter()
        .map(|(name, value)| (ShortString::from(name), value))
        .collect::<BTreeMap<_, _>>()
        .into()
}

/// lapin's conversion panics above 255 bytes.
pub(super) fn short(name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name)
        .map_err(|error| BrokerError::Config(format!("a name for the broker is too long: {error}")))
}

pub(super) async fn close(channel: &lapin::Channel) -> Result<(), BrokerError> {
    answer("closing a channel", ANSWER_TIMEOUT, channel.close(200, "done".into())).await
}

/// Asks on a channel of its own, which a refusal closes.
pub(super) async fn refusal(
    connection: &Connection,
    question: impl AsyncFnOnce(&lapin::Channel) -> Result<(), BrokerError>,
) -> Result<Option<(u16, String)>, BrokerError> {
    let channel = connection.channel().await?;
    let refused = refused(question(&channel).await)?;
    if refused.is_none() {
        close(&channel).await?;
    }
    Ok(refused)
}

/// What the broker answered, where it refused. That closed the channel.
pub(super) fn refused(answer: Result<(), BrokerError>) -> Result<Option<(u16, String)>, BrokerError> {
    match answer {
        Ok(()) => Ok(None),
        Err(BrokerError::Refused { code, text }) => Ok(Some((code, text))),
        Err(error @ (BrokerError::Away(_) | BrokerError::Config(_))) => Err(error),
    }
}
