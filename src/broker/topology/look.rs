//! Looking at what is there, as far as AMQP and our rights let us, and changing nothing.

use super::{
    BROKER_MADE, Exchange, HIDDEN, Queue, QueueKind, TopologyFinding, UPDATES, exchanges, hidden_queue, partner_queue,
    queues, shown,
};
use crate::broker::{
    BrokerError, Connection,
    channel::{close, refused},
    rights,
};

/// Looks one after the other, on one channel for as long as nothing is refused: a refusal closes it, and the next look opens
/// another.
struct Looks<'c> {
    connection: &'c Connection,
    channel: Option<lapin::Channel>,
}

impl<'c> Looks<'c> {
    fn on(connection: &'c Connection) -> Self {
        let channel = None;
        Self { connection, channel }
    }

    async fn refusal(
        &mut self,
        question: impl AsyncFnOnce(&lapin::Channel) -> Result<(), BrokerError>,
    ) -> Result<Option<(u16, String)>, BrokerError> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => self.connection.channel().await?,
        };
        let refused = refused(question(&channel).await)?;
        if refused.is_none() {
            self.channel = Some(channel);
        }
        Ok(refused)
    }

    async fn end(self) -> Result<(), BrokerError> {
        match self.channel {
            Some(channel) => close(&channel).await,
            None => Ok(()),
        }
    }
}

/// Looks at every exchange and queue and at the permissions of this user, and changes nothing. Bindings cannot be seen
/// through AMQP. `own` names the partners that have a queue of their own, `hidden` is the queue of that name, where the books say it, `mend`
/// how this user gets its permissions. Use a connection made for this: each refusal costs a channel number that lapin never gives
/// out again.
pub async fn inspect(
    connection: &Connection,
    own: &[String],
    hidden: Option<&str>,
    mend: &rights::Mend,
) -> Result<Vec<TopologyFinding>, BrokerError> {
    let mut findings = Vec::new();
    let mut looks = Looks::on(connection);
    for exchange in exchanges() {
        findings.push(look_at_exchange(&mut looks, &exchange).await?);
    }
    let own_queues = own.iter().map(|enterprise_id| partner_queue(enterprise_id));
    for queue in queues().into_iter().chain(own_queues) {
        findings.push(look_at_queue(&mut looks, &queue).await?);
    }
    looks.end().await?;
    findings.extend(rights::look(connection, mend, &rights::of_a_worker(own)).await?);
    if let Some(name) = hidden {
        findings.extend(look_at_hidden(connection, name, mend).await?);
    }
    Ok(findings)
}

/// Queue and right under a name that may be shown to anybody.
async fn look_at_hidden(
    connection: &Connection,
    name: &str,
    mend: &rights::Mend,
) -> Result<Vec<TopologyFinding>, BrokerError> {
    let mut looks = Looks::on(connection);
    let mut findings = vec![look_at_queue(&mut looks, &hidden_queue(name)).await?];
    looks.end().await?;
    findings.extend(rights::look(connection, mend, &[rights::Right::Consume(name.to_owned())]).await?);
    Ok(findings
        .into_iter()
        .map(|finding| without_name(finding, name))
        .collect())
}

/// The queue's name is worth something as long as no sender knows it.
fn without_name(finding: TopologyFinding, name: &str) -> TopologyFinding {
    let shown = |text: &str| text.replace(name, HIDDEN);
    TopologyFinding {
        object: shown(&finding.object),
        problem: finding.problem.as_deref().map(shown),
        hint: finding.hint.as_deref().map(shown),
    }
}

async fn look_at_exchange(looks: &mut Looks<'_>, exchange: &Exchange) -> Result<TopologyFinding, BrokerError> {
    let found = looks
        .refusal(async |channel| exchange.declare(channel, true).await)
        .await?;
    // Only of what is there: it would be made otherwise.
    let same = match &found {
        None => {
            looks
                .refusal(async |channel| exchange.declare(channel, false).await)
                .await?
        }
        Some(_) => None,
    };
    Ok(finding(format!("exchange {}", exchange.name), found, same))
}

async fn look_at_queue(looks: &mut Looks<'_>, queue: &Queue) -> Result<TopologyFinding, BrokerError> {
    let found = looks
        .refusal(async |channel| queue.declare(channel, true).await.map(drop))
        .await?;
    let same = match &found {
        None => {
            looks
                .refusal(async |channel| queue.declare(channel, false).await.map(drop))
                .await?
        }
        Some(_) => None,
    };
    Ok(finding(format!("queue {}", queue.name), found, same))
}

/// What can be seen before a consumer is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fitness {
    /// What is wrong, as `settled doctor` says it; nothing must be taken then.
    pub problem: Option<String>,
    /// What this user may not look at.
    pub unseen: Vec<String>,
}

/// Looks at a queue that is about to be consumed, and at the exchanges that lead to it and away from it: with other
/// arguments than ours the broker may lose what it dead-letters, and says nothing. A passive declaration does not see
/// arguments; one that is the same as ours changes nothing, and is refused where something is different.
pub async fn fitness(connection: &Connection, queue: &str) -> Result<Fitness, BrokerError> {
    let Some((looked_at, around)) = around(queue) else {
        return Ok(Fitness::default());
    };
    let mut looks = Looks::on(connection);
    let mut findings = vec![look_at_queue(&mut looks, &looked_at).await?];
    for exchange in around {
        findings.push(look_at_exchange(&mut looks, &exchange).await?);
    }
    looks.end().await?;
    let mut fitness = Fitness::default();
    for finding in findings {
        let finding = if shown(queue) == queue {
            finding
        } else {
            without_name(finding, queue)
        };
        match (&finding.problem, &finding.hint) {
            (Some(_), _) if fitness.problem.is_none() => fitness.problem = finding.sentence(),
            (None, Some(_)) => fitness.unseen.push(finding.object),
            (Some(_) | None, _) => {}
        }
    }
    Ok(fitness)
}

/// A queue of ours by its name, and the exchanges that lead to it and away from it.
pub(super) fn around(queue: &str) -> Option<(Queue, Vec<Exchange>)> {
    let behind = |name: &str| queue.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
    let looked_at = match (behind(UPDATES), behind(BROKER_MADE)) {
        (Some(enterprise_id), _) => Some(partner_queue(enterprise_id)),
        (None, Some(_)) => Some(hidden_queue(queue)),
        (None, None) => queues().into_iter().find(|ours| ours.name == queue),
    }?;
    let mut around: Vec<&str> = looked_at.bindings.iter().map(|binding| binding.exchange).collect();
    if queue == UPDATES {
        around.push(UPDATES);
    }
    match looked_at.kind {
        QueueKind::DeadLettering(exchange) => around.push(exchange),
        QueueKind::Last | QueueKind::Patient | QueueKind::Words => {}
    }
    let exchanges = exchanges().into_iter();
    let exchanges = exchanges.filter(|exchange| around.contains(&exchange.name)).collect();
    Some((looked_at, exchanges))
}

fn finding(object: String, found: Option<(u16, String)>, same: Option<(u16, String)>) -> TopologyFinding {
    const DECLARE: &str = "run `settled topology`";
    let (problem, hint) = match (found, same) {
        (None, None) => (None, None),
        (Some((404, _)), _) => (Some("it is missing".to_owned()), Some(DECLARE.to_owned())),
        // Newer brokers (4.3) ask for a right even for this.
        (Some((403, _)), _) => (
            None,
            Some("it was not looked at: this user has no permission on it".to_owned()),
        ),
        (Some((code, text)), _) => (Some(format!("refused with {code}: {text}")), None),
        (None, Some((403, _))) => (
            None,
            Some("its arguments were not checked: this user has no configure permission on it".to_owned()),
        ),
        (None, Some((406, text))) => (
            Some(format!("it is there with other properties: {text}")),
            Some(format!("move its messages away, delete it, then {DECLARE}")),
        ),
        (None, Some((code, text))) => (Some(format!("refused with {code}: {text}")), None),
    };
    TopologyFinding { object, problem, hint }
}

#[cfg(test)]
mod tests {
    use lapin::{ExchangeKind, types::FieldTable};

    use super::*;
    use crate::broker::{
        channel::{declare_exchange, short},
        testing::Vhost,
    };

    /// One channel for all looks, and another only after a refusal, which closed it.
    #[tokio::test]
    async fn looks_share_a_channel_until_one_is_refused() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        let mut looks = Looks::on(&connection);
        let mut channels = Vec::new();
        for name in ["amq.topic", "amq.topic", "missing", "amq.topic", "amq.direct"] {
            let kind = if name == "amq.direct" {
                ExchangeKind::Direct
            } else {
                ExchangeKind::Topic
            };
            let refused = looks
                .refusal(async |channel| {
                    channels.push(channel.id());
                    declare_exchange(channel, short(name)?, kind, true, FieldTable::default()).await
                })
                .await
                .expect("an answer");
            assert_eq!(refused.map(|(code, _)| code), (name == "missing").then_some(404));
        }
        looks.end().await.expect("closed");
        let (before, after) = channels.split_at(3);
        assert!(before.iter().all(|id| *id == before[0]), "{channels:?}");
        assert!(
            after.iter().all(|id| *id == after[0] && *id != before[0]),
            "{channels:?}"
        );
    }
}
