//! Exchanges and queues: what there must be, making it, and looking whether it is there.

use std::collections::BTreeMap;

use lapin::ExchangeKind;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeBindOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::{ANSWER_TIMEOUT, BrokerError, Connection, answer};

pub use crate::domain::names::{BROKER_MADE, DEAD, EVENTS, UNREADABLE, UPDATES, UPDATES_ALL};

/// Redeliveries before the broker dead-letters a message. Never negative: 3.10 drops such a message at its first requeue.
const DELIVERY_LIMIT: i32 = 50;
/// As good as none: what is dropped at the limit has no other place. RabbitMQ 4 has a limit of 20 where none is said.
const NO_DELIVERY_LIMIT: i32 = 1_000_000_000;

struct Exchange {
    name: &'static str,
    kind: ExchangeKind,
    alternate: Option<&'static str>,
    /// Everything that comes to this one comes here too.
    from: Option<&'static str>,
}

pub(super) struct Queue {
    pub(super) name: String,
    kind: QueueKind,
    pub(super) bindings: Vec<Binding>,
}

enum QueueKind {
    /// What can not be taken goes to this exchange.
    DeadLettering(&'static str),
    /// The last stop.
    Last,
    /// The last stop of what is taken again and again until it is stored.
    Patient,
}

pub(super) struct Binding {
    pub(super) exchange: &'static str,
    pub(super) key: String,
    /// The header that a message must have, whatever it says.
    header: Option<&'static str>,
}

impl Binding {
    fn new(exchange: &'static str, key: impl Into<String>) -> Self {
        Self {
            exchange,
            key: key.into(),
            header: None,
        }
    }

    fn arguments(&self) -> FieldTable {
        let present = self
            .header
            .map(|header| [("x-match", text("all-with-x")), (header, AMQPValue::Void)]);
        table(present.into_iter().flatten())
    }
}

/// In an order in which each can be declared: an exchange before what refers to it.
fn exchanges() -> [Exchange; 6] {
    [
        Exchange {
            name: UNREADABLE,
            kind: ExchangeKind::Fanout,
            alternate: None,
            from: None,
        },
        Exchange {
            name: DEAD,
            kind: ExchangeKind::Topic,
            alternate: None,
            from: None,
        },
        Exchange {
            name: BROKER_MADE,
            kind: ExchangeKind::Headers,
            alternate: None,
            from: Some(DEAD),
        },
        Exchange {
            name: UPDATES_ALL,
            kind: ExchangeKind::Fanout,
            alternate: None,
            from: None,
        },
        // An alternate exchange sees only what no binding took. So a partner's own queue, bound by its keys, takes its
        // messages away from the common queue without anything else being unbound.
        Exchange {
            name: UPDATES,
            kind: ExchangeKind::Topic,
            alternate: Some(UPDATES_ALL),
            from: None,
        },
        Exchange {
            name: EVENTS,
            kind: ExchangeKind::Topic,
            alternate: None,
            from: None,
        },
    ]
}

fn queues() -> [Queue; 4] {
    [
        Queue {
            name: UNREADABLE.to_owned(),
            kind: QueueKind::Last,
            bindings: vec![Binding::new(UNREADABLE, "")],
        },
        Queue {
            name: DEAD.to_owned(),
            kind: QueueKind::DeadLettering(UNREADABLE),
            bindings: vec![Binding::new(DEAD, "#")],
        },
        Queue {
            name: BROKER_MADE.to_owned(),
            kind: QueueKind::Patient,
            bindings: vec![Binding {
                // The broker writes one into whatever it dead-letters.
                header: Some("x-death"),
                ..Binding::new(BROKER_MADE, "")
            }],
        },
        Queue {
            name: UPDATES.to_owned(),
            kind: QueueKind::DeadLettering(DEAD),
            bindings: vec![Binding::new(UPDATES_ALL, "")],
        },
    ]
}

/// The name of a partner's own input queue.
pub fn own_queue(enterprise_id: &str) -> String {
    format!("{UPDATES}.{enterprise_id}")
}

pub(super) fn partner_queue(enterprise_id: &str) -> Queue {
    Queue {
        name: own_queue(enterprise_id),
        kind: QueueKind::DeadLettering(DEAD),
        bindings: ["allocation", "deallocation"]
            .map(|kind| Binding::new(UPDATES, format!("{enterprise_id}.{kind}.update")))
            .into(),
    }
}

impl Exchange {
    fn arguments(&self) -> FieldTable {
        table(self.alternate.map(|name| ("alternate-exchange", text(name))))
    }

    async fn declare(&self, channel: &lapin::Channel, passive: bool) -> Result<(), BrokerError> {
        let options = ExchangeDeclareOptions {
            passive,
            durable: true,
            auto_delete: false,
            internal: false,
            nowait: false,
        };
        let declared = channel.exchange_declare(self.name.into(), self.kind.clone(), options, self.arguments());
        answer("an exchange declaration", ANSWER_TIMEOUT, declared).await
    }

    async fn bind(&self, channel: &lapin::Channel) -> Result<(), BrokerError> {
        let Some(source) = self.from else {
            return Ok(());
        };
        let bound = channel.exchange_bind(
            self.name.into(),
            source.into(),
            "#".into(),
            ExchangeBindOptions { nowait: false },
            FieldTable::default(),
        );
        answer("a binding", ANSWER_TIMEOUT, bound).await
    }
}

impl Queue {
    fn arguments(&self) -> FieldTable {
        let mut arguments = vec![("x-queue-type", text("quorum"))];
        match self.kind {
            QueueKind::DeadLettering(exchange) => arguments.extend([
                ("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT)),
                // No x-dead-letter-routing-key: a dead letter keeps the key it came under.
                ("x-dead-letter-exchange", text(exchange)),
                // The default, at-most-once, silently drops when the exchange is missing or its queue is full.
                ("x-dead-letter-strategy", text("at-least-once")),
                // Which needs this one.
                ("x-overflow", text("reject-publish")),
            ]),
            QueueKind::Patient => arguments.push(("x-delivery-limit", AMQPValue::LongInt(NO_DELIVERY_LIMIT))),
            QueueKind::Last => {}
        }
        table(arguments)
    }

    pub(super) async fn declare(&self, channel: &lapin::Channel, passive: bool) -> Result<u32, BrokerError> {
        declare_queue(channel, &self.name, passive, self.arguments()).await
    }

    pub(super) async fn bind(&self, channel: &lapin::Channel) -> Result<(), BrokerError> {
        for binding in &self.bindings {
            let bound = channel.queue_bind(
                short(&self.name)?,
                binding.exchange.into(),
                short(&binding.key)?,
                QueueBindOptions { nowait: false },
                binding.arguments(),
            );
            answer("a binding", ANSWER_TIMEOUT, bound).await?;
        }
        Ok(())
    }
}

async fn declare_queue(
    channel: &lapin::Channel,
    name: &str,
    passive: bool,
    arguments: FieldTable,
) -> Result<u32, BrokerError> {
    let options = QueueDeclareOptions {
        passive,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(name)?, options, arguments);
    Ok(answer("a queue declaration", ANSWER_TIMEOUT, declared)
        .await?
        .message_count())
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table(entries: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> FieldTable {
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

/// Declares every exchange, queue and binding. Changes nothing that is there already; refused with 406 if something is
/// there with other arguments.
pub async fn declare(connection: &Connection) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    for exchange in exchanges() {
        exchange.declare(&channel, false).await?;
        exchange.bind(&channel).await?;
    }
    for queue in queues() {
        queue.declare(&channel, false).await?;
        queue.bind(&channel).await?;
    }
    close(&channel).await
}

pub(super) async fn close(channel: &lapin::Channel) -> Result<(), BrokerError> {
    answer("closing a channel", ANSWER_TIMEOUT, channel.close(200, "done".into())).await
}

/// Messages ready in each queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    pub updates: u32,
    pub dead: u32,
    pub unreadable: u32,
}

/// Counts what is ready (not what is being worked on). Refused with 404 if a queue is missing.
pub async fn depths(connection: &Connection) -> Result<Depths, BrokerError> {
    let channel = connection.channel().await?;
    let depths = Depths {
        updates: depth(&channel, UPDATES).await?,
        dead: depth(&channel, DEAD).await?,
        unreadable: depth(&channel, UNREADABLE).await?,
    };
    close(&channel).await?;
    Ok(depths)
}

/// Counts what is ready in one queue. Refused with 404 if it is missing.
pub async fn depth_of(connection: &Connection, queue: &str) -> Result<u32, BrokerError> {
    let channel = connection.channel().await?;
    let depth = depth(&channel, queue).await?;
    close(&channel).await?;
    Ok(depth)
}

/// Counts what is ready in one queue, and its consumers. Refused with 404 if it is missing.
pub async fn backlog(connection: &Connection, queue: &str) -> Result<(u32, u32), BrokerError> {
    let channel = connection.channel().await?;
    let declared = passive(&channel, queue).await?;
    close(&channel).await?;
    Ok((declared.message_count(), declared.consumer_count()))
}

/// Looks at a queue without declaring it.
pub(super) async fn passive(channel: &lapin::Channel, queue: &str) -> Result<lapin::Queue, BrokerError> {
    let options = QueueDeclareOptions {
        passive: true,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
    };
    let declared = channel.queue_declare(short(queue)?, options, FieldTable::default());
    answer("a queue declaration", ANSWER_TIMEOUT, declared).await
}

async fn depth(channel: &lapin::Channel, queue: &str) -> Result<u32, BrokerError> {
    declare_queue(channel, queue, true, FieldTable::default()).await
}

/// What [`inspect`] has to say about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologyFinding {
    /// What was looked at: `queue settlement.updates`.
    pub object: String,
    /// What is wrong with it; nothing if it is as it should be.
    pub problem: Option<String>,
    /// What to do about it, or what could not be looked at.
    pub hint: Option<String>,
}

/// Looks at every exchange and queue and at the permissions of this user, and changes nothing. Bindings cannot be seen
/// through AMQP. `own` names the partners that have a queue of their own. Use a connection made for this: each refusal costs a channel number that lapin never gives out again.
pub async fn inspect(connection: &Connection, own: &[String]) -> Result<Vec<TopologyFinding>, BrokerError> {
    let mut findings = Vec::new();
    for exchange in exchanges() {
        findings.push(look_at_exchange(connection, &exchange).await?);
    }
    let own_queues = own.iter().map(|enterprise_id| partner_queue(enterprise_id));
    for queue in queues().into_iter().chain(own_queues) {
        findings.push(look_at_queue(connection, &queue).await?);
    }
    for (exchange, key) in [(EVENTS, "allocation.cleared.probe"), (DEAD, "probe.allocation.update")] {
        let answer = refusal(connection, async |channel| probe_publish(channel, exchange, key).await).await?;
        findings.push(permission(
            format!("permission to publish to {exchange}"),
            "write",
            answer,
        ));
    }
    for queue in [UPDATES, DEAD, BROKER_MADE] {
        let answer = refusal(connection, async |channel| probe_consume(channel, queue).await).await?;
        findings.push(permission(format!("permission to consume {queue}"), "read", answer));
    }
    Ok(findings)
}

async fn look_at_exchange(connection: &Connection, exchange: &Exchange) -> Result<TopologyFinding, BrokerError> {
    let found = refusal(connection, async |channel| exchange.declare(channel, true).await).await?;
    // Only of what is there: it would be made otherwise.
    let same = match &found {
        None => refusal(connection, async |channel| exchange.declare(channel, false).await).await?,
        Some(_) => None,
    };
    Ok(finding(format!("exchange {}", exchange.name), found, same))
}

async fn look_at_queue(connection: &Connection, queue: &Queue) -> Result<TopologyFinding, BrokerError> {
    let found = refusal(connection, async |channel| queue.declare(channel, true).await.map(drop)).await?;
    let same = match &found {
        None => {
            refusal(connection, async |channel| {
                queue.declare(channel, false).await.map(drop)
            })
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
    let own = queue.strip_prefix(UPDATES).and_then(|rest| rest.strip_prefix('.'));
    let looked_at = match own {
        Some(enterprise_id) => Some(partner_queue(enterprise_id)),
        None => queues().into_iter().find(|ours| ours.name == queue),
    };
    let Some(looked_at) = looked_at else {
        return Ok(Fitness::default());
    };
    let mut findings = vec![look_at_queue(connection, &looked_at).await?];
    let mut around: Vec<&str> = looked_at.bindings.iter().map(|binding| binding.exchange).collect();
    if queue == UPDATES {
        around.push(UPDATES);
    }
    match looked_at.kind {
        QueueKind::DeadLettering(exchange) => around.push(exchange),
        QueueKind::Last | QueueKind::Patient => {}
    }
    for exchange in exchanges() {
        if around.contains(&exchange.name) {
            findings.push(look_at_exchange(connection, &exchange).await?);
        }
    }
    let mut fitness = Fitness::default();
    for finding in findings {
        match (finding.problem, finding.hint) {
            (Some(problem), hint) if fitness.problem.is_none() => {
                let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
                fitness.problem = Some(format!("{}: {problem}{hint}", finding.object));
            }
            (None, Some(_)) => fitness.unseen.push(finding.object),
            (Some(_) | None, _) => {}
        }
    }
    Ok(fitness)
}

/// Asks on a channel of its own, which a refusal closes.
async fn refusal(
    connection: &Connection,
    question: impl AsyncFnOnce(&lapin::Channel) -> Result<(), BrokerError>,
) -> Result<Option<(u16, String)>, BrokerError> {
    let channel = connection.channel().await?;
    match question(&channel).await {
        Ok(()) => close(&channel).await.map(|()| None),
        Err(BrokerError::Refused { code, text }) => Ok(Some((code, text))),
        Err(error @ (BrokerError::Away(_) | BrokerError::Config(_))) => Err(error),
    }
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

fn permission(object: String, word: &str, answer: Option<(u16, String)>) -> TopologyFinding {
    let (problem, hint) = match answer {
        // 406 is the refusal the probe asks for: the broker looked at the permission first.
        None | Some((406, _)) => (None, None),
        Some((403, text)) => (
            Some(text),
            Some(format!(
                "grant this user {word} permission with rabbitmqctl set_permissions"
            )),
        ),
        Some((404, _)) => (
            Some("there is nothing to check it on".to_owned()),
            Some("run `settled topology`".to_owned()),
        ),
        Some((code, text)) => (Some(format!("refused with {code}: {text}")), None),
    };
    TopologyFinding { object, problem, hint }
}

/// Publishes what the broker refuses after it looked at the permissions and before it routes anything: an expiration
/// that is no number.
async fn probe_publish(channel: &lapin::Channel, exchange: &str, key: &str) -> Result<(), BrokerError> {
    let publish = async {
        // The refusal comes out of the confirm.
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        let options = BasicPublishOptions {
            mandatory: false,
            immediate: false,
        };
        let properties = BasicProperties::default().with_expiration("probe".into());
        channel
            .basic_publish(exchange.into(), key.into(), options, &[], properties)
            .await?
            .await
    };
    answer("a permission check", ANSWER_TIMEOUT, publish).await.map(drop)
}

/// Asks to consume with an argument that the broker refuses after it looked at the permission.
async fn probe_consume(channel: &lapin::Channel, queue: &str) -> Result<(), BrokerError> {
    let consume = async {
        // Should a broker accept it after all, one message comes and goes back.
        channel.basic_qos(1, BasicQosOptions { global: false }).await?;
        channel
            .basic_consume(
                queue.into(),
                "settled-probe".into(),
                BasicConsumeOptions {
                    no_local: false,
                    no_ack: false,
                    exclusive: false,
                    nowait: false,
                },
                table([("x-priority", text("probe"))]),
            )
            .await
    };
    answer("a permission check", ANSWER_TIMEOUT, consume).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::intake::Intake;
    use crate::broker::publisher::{Fate, Publisher};
    use crate::broker::testing::{Vhost, event, eventually, queue, ready, soon, text};

    async fn receive(connection: &Connection, queue: &str) -> crate::domain::delivery::Delivery {
        let mut intake = Intake::attach(connection, queue, 10, 10, 1 << 20)
            .await
            .expect("attached");
        let mut batch = soon(intake.next()).await.expect("a message");
        assert_eq!(batch.deliveries.len(), 1);
        intake.disposer().dispose(&[], Some(1)).await.expect("acknowledged");
        intake.cancel().await.expect("cancelled");
        assert!(intake.drain().is_none());
        batch.deliveries.remove(0)
    }

    #[tokio::test]
    async fn declared_twice_it_is_the_same_and_in_order() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        declare(&connection).await.expect("declared");
        declare(&connection).await.expect("declared again");
        let findings = inspect(&connection, &[]).await.expect("inspected");
        assert_eq!(findings.len(), 15);
        assert!(
            findings
                .iter()
                .all(|finding| finding.problem.is_none() && finding.hint.is_none()),
            "{findings:?}"
        );
        assert_eq!(
            depths(&connection).await,
            Ok(Depths {
                updates: 0,
                dead: 0,
                unreadable: 0
            })
        );
    }

    #[tokio::test]
    async fn every_update_reaches_the_queue_and_its_dead_letter_keeps_the_key() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        declare(&connection).await.expect("declared");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let key = "acme.allocation.update";
        let sent = [event(UPDATES, key, "one"), event(UPDATES, "any.thing", "two")];
        assert_eq!(publisher.publish(&sent).await, Ok(vec![Fate::Confirmed; 2]));
        let mut intake = Intake::attach(&connection, UPDATES, 1, 1, 1).await.expect("attached");
        let batch = soon(intake.next()).await.expect("a message");
        assert_eq!(
            (
                batch.deliveries[0].exchange.as_str(),
                batch.deliveries[0].routing_key.as_str()
            ),
            (UPDATES, key)
        );
        intake.disposer().dispose(&[1], None).await.expect("rejected");
        let dead = receive(&connection, DEAD).await;
        assert_eq!(
            (dead.exchange.as_str(), dead.routing_key.as_str(), &*dead.body),
            (DEAD, key, &b"one"[..])
        );
        let x_death = dead
            .properties
            .headers
            .and_then(|headers| headers.get("x-death").cloned());
        let Some(crate::domain::delivery::HeaderValue::Array(x_death)) = x_death else {
            panic!("no x-death")
        };
        let Some(crate::domain::delivery::HeaderValue::Table(first)) = x_death.first() else {
            panic!("no entry")
        };
        assert_eq!(first.get("queue").and_then(|queue| queue.as_text()), Some(UPDATES));
        assert_eq!(
            first.get("reason").and_then(|reason| reason.as_text()),
            Some("rejected")
        );
    }

    #[tokio::test]
    async fn an_unreadable_dead_letter_is_kept_and_counted() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        declare(&connection).await.expect("declared");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let sent = [event(DEAD, "acme.allocation.update", "one")];
        assert_eq!(publisher.publish(&sent).await, Ok(vec![Fate::Confirmed]));
        let mut intake = Intake::attach(&connection, DEAD, 1, 1, 1).await.expect("attached");
        soon(intake.next()).await.expect("a message");
        intake.disposer().dispose(&[1], None).await.expect("rejected");
        eventually("unreadable", async || {
            (ready(&connection, UNREADABLE).await == 1).then_some(())
        })
        .await;
        assert_eq!(
            depths(&connection).await,
            Ok(Depths {
                updates: 0,
                dead: 0,
                unreadable: 1
            })
        );
    }

    #[tokio::test]
    async fn an_own_queue_takes_its_partners_messages_and_no_others() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        declare(&connection).await.expect("declared");
        super::super::own_queue::declare(&connection, "acme")
            .await
            .expect("declared");
        super::super::own_queue::declare(&connection, "acme")
            .await
            .expect("declared again");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let sent: Vec<_> = [
            "acme.allocation.update",
            "acme.deallocation.update",
            "acme.nonsense",
            "acme2.allocation.update",
            "x.acme.allocation.update",
        ]
        .into_iter()
        .map(|key| event(UPDATES, key, key))
        .collect();
        assert_eq!(publisher.publish(&sent).await, Ok(vec![Fate::Confirmed; 5]));
        assert_eq!(ready(&connection, &own_queue("acme")).await, 2);
        assert_eq!(ready(&connection, UPDATES).await, 3);
    }

    #[tokio::test]
    async fn what_is_missing_or_different_is_found_and_nothing_is_changed() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        for _ in 0..2 {
            let findings = inspect(&connection, &[]).await.expect("inspected");
            assert!(findings.iter().all(|finding| finding.problem.is_some()), "{findings:?}");
        }
        assert_eq!(depths(&connection).await.map_err(|error| error.code()), Err(Some(404)));
        queue(&connection, UPDATES, &[("x-queue-type", text("quorum"))]).await;
        let refused = declare(&connection).await.expect_err("another queue is in its place");
        assert_eq!(refused.code(), Some(406), "{refused}");
        let findings = inspect(&connection, &[]).await.expect("inspected");
        let found = findings
            .iter()
            .find(|finding| finding.object == "queue settlement.updates")
            .expect("a finding");
        assert!(
            found
                .problem
                .as_ref()
                .is_some_and(|problem| problem.contains("other properties")),
            "{found:?}"
        );
    }

    #[tokio::test]
    async fn missing_permissions_are_found_and_no_message_is_touched() {
        let vhost = Vhost::new();
        let connection = vhost.connect().await;
        declare(&connection).await.expect("declared");
        let mut publisher = Publisher::open(&connection).await.expect("a publisher");
        let sent = [
            event(UPDATES, "acme.allocation.update", "one"),
            event(DEAD, "acme.allocation.update", "two"),
        ];
        assert_eq!(publisher.publish(&sent).await, Ok(vec![Fate::Confirmed; 2]));
        for (write, read, expected) in [
            (".*", ".*", vec![]),
            (
                "",
                ".*",
                vec![
                    "permission to publish to settlement.events",
                    "permission to publish to settlement.dead",
                ],
            ),
            (
                ".*",
                "",
                vec![
                    "permission to consume settlement.updates",
                    "permission to consume settlement.dead",
                    "permission to consume settlement.dead.broker",
                ],
            ),
            (
                "settlement.dead",
                "settlement.dead",
                vec![
                    "permission to publish to settlement.events",
                    "permission to consume settlement.updates",
                ],
            ),
        ] {
            // Without configure permission, as a worker should be.
            let settings = vhost.as_user("", write, read);
            let restricted = Connection::open(&settings, "test").await.expect("connected");
            let findings = inspect(&restricted, &[]).await.expect("inspected");
            vhost.forget_user(&settings);
            let problems: Vec<_> = findings
                .iter()
                .filter(|finding| finding.problem.is_some())
                .map(|finding| finding.object.as_str())
                .collect();
            assert_eq!(problems, expected, "{findings:?}");
            let unchecked = findings
                .iter()
                .filter(|finding| finding.hint.as_ref().is_some_and(|hint| hint.contains("configure")));
            assert_eq!(unchecked.count(), 10, "{findings:?}");
        }
        assert_eq!(
            depths(&connection).await,
            Ok(Depths {
                updates: 1,
                dead: 1,
                unreadable: 0
            })
        );
        assert!(!receive(&connection, UPDATES).await.redelivered);
        assert!(!receive(&connection, DEAD).await.redelivered);
    }
}
