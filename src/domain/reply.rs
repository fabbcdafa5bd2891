//! Whom a message asks to answer.

use serde::{Deserialize, Serialize};

use super::message::MessageRef;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplyTo {
    pub reply_to: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl ReplyTo {
    /// Of a message that asks for one, at a name that is answered to.
    pub fn of(message: MessageRef<'_>) -> Option<Self> {
        let properties = &message.delivery.properties;
        let (name, enterprise_id) = (properties.reply_to.as_deref()?, message.facts.enterprise_id.as_deref()?);
        is_reply_queue(name, enterprise_id).then(|| Self {
            reply_to: name.into(),
            correlation_id: properties.correlation_id.clone(),
        })
    }
}

/// Whether a proven partner's `reply_to` is one we answer to. Any other name would let partners write to any queue.
pub fn is_reply_queue(name: &str, enterprise_id: &str) -> bool {
    name.strip_prefix("amq.rabbitmq.reply-to.")
        .is_some_and(|rest| !rest.is_empty())
        || name
            .strip_prefix("settlement.reply.")
            .and_then(|rest| rest.strip_prefix(enterprise_id))
            .is_some_and(|rest| rest.starts_with('.'))
}
