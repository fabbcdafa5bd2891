//! Users of the broker with the rights of `settled topology export`: what each is for works, and each forbidden act is refused,
//! on whatever version of the broker there is.

use std::collections::BTreeMap;

use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind, ExchangeKind,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions,
        ExchangeDeclareOptions, ExchangeDeleteOptions, ExchangeUnbindOptions, QueueBindOptions, QueueDeclareOptions,
        QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldArray, FieldTable},
};
use serde_json::{Value, json};

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    command::ask,
    partner::Partner,
    support::{PATIENCE, Place, address, until, userinfo, with_path},
};

/// The users of an export, made on this place's vhost.
pub(super) struct Users {
    names: Vec<String>,
    broker: String,
    vhost: String,
}

impl Users {
    /// Makes what was exported: users with a password, and the definitions.
    pub(super) async fn of(place: &Place, exported: &Value) -> Self {
        let mut names = Vec::new();
        for permission in exported["definitions"]["permissions"].as_array().expect("permissions") {
            let name = permission["user"].as_str().expect("a user").to_owned();
            let tags = if name == "settlement-monitoring" {
                "monitoring"
            } else {
                ""
            };
            let login = json!({"password": "secret", "tags": tags});
            let (status, answer) = place
                .services
                .manage("PUT", &format!("/api/users/{name}"), Some(login))
                .await;
            assert!(matches!(status, 201 | 204), "{status} {answer}");
            names.push(name);
        }
        let (status, answer) = place
            .services
            .manage("POST", "/api/definitions", Some(exported["definitions"].clone()))
            .await;
        assert!(matches!(status, 200 | 201 | 204), "{status} {answer}");
        Self {
            names,
            broker: place.broker_url.clone(),
            vhost: place.name.clone(),
        }
    }

    pub(super) fn url(&self, name: &str) -> String {
        assert!(self.names.iter().any(|known| known == name), "{name}: {:?}", self.names);
        with_path(&format!("amqp://{name}:secret@{}/", address(&self.broker)), &self.vhost)
    }

    pub(super) async fn forget(self, place: &Place) {
        for name in self.names {
            place
                .services
                .manage("DELETE", &format!("/api/users/{name}"), None)
                .await;
        }
    }
}

/// Something that somebody tries.
enum Act<'a> {
    Publish(&'a str, &'a str),
    PublishAs(&'a str, &'a str, &'a str),
    Consume(&'a str),
    Get(&'a str),
    DeclareQueue(&'a str),
    DeclareExchange(&'a str),
    DeleteQueue(&'a str),
    DeleteExchange(&'a str),
    Bind(&'a str, &'a str, &'a str),
    Unbind(&'a str, &'a str, &'a str),
    BindExchange(&'a str, &'a str, &'a str),
    UnbindExchange(&'a str, &'a str, &'a str),
    Purge(&'a str),
}

impl Act<'_> {
    /// The code with which the broker refuses; 0: it does not.
    async fn tried(&self, connection: &Connection) -> u16 {
        let channel = connection.create_channel().await.expect("a channel");
        match self.on(&channel).await {
            Ok(()) => {
                channel.close(200, "done".into()).await.expect("closed");
                0
            }
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(amqp) => amqp.get_id(),
                _ => panic!("{error}"),
            },
        }
    }

    async fn on(&self, channel: &Channel) -> lapin::Result<()> {
        let durable = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let nothing = FieldTable::default;
        match self {
            Act::Publish(exchange, key) => publish(channel, exchange, key, b"{}", BasicProperties::default())
                .await
                .map(drop),
            Act::PublishAs(user, exchange, key) => {
                let properties = BasicProperties::default().with_user_id((*user).into());
                publish(channel, exchange, key, b"{}", properties).await.map(drop)
            }
            Act::Consume(queue) => channel
                .basic_consume((*queue).into(), "x".into(), BasicConsumeOptions::default(), nothing())
                .await
                .map(drop),
            Act::Get(queue) => channel
                .basic_get((*queue).into(), BasicGetOptions::default())
                .await
                .map(drop),
            Act::DeclareQueue(queue) => {
                let quorum = BTreeMap::from([("x-queue-type".into(), AMQPValue::LongString("quorum".into()))]);
                channel
                    .queue_declare((*queue).into(), durable, quorum.into())
                    .await
                    .map(drop)
            }
            Act::DeclareExchange(exchange) => {
                let options = ExchangeDeclareOptions {
                    durable: true,
                    ..ExchangeDeclareOptions::default()
                };
                channel
                    .exchange_declare((*exchange).into(), ExchangeKind::Topic, options, nothing())
                    .await
            }
            Act::DeleteQueue(queue) => channel
                .queue_delete((*queue).into(), QueueDeleteOptions::default())
                .await
                .map(drop),
            Act::DeleteExchange(exchange) => {
                channel
                    .exchange_delete((*exchange).into(), ExchangeDeleteOptions::default())
                    .await
            }
            Act::Bind(queue, exchange, key) => {
                let options = QueueBindOptions::default();
                channel
                    .queue_bind((*queue).into(), (*exchange).into(), (*key).into(), options, nothing())
                    .await
            }
            Act::Unbind(queue, exchange, key) => {
                channel
                    .queue_unbind((*queue).into(), (*exchange).into(), (*key).into(), nothing())
                    .await
            }
            Act::BindExchange(to, from, key) => {
                let options = ExchangeBindOptions::default();
                channel
                    .exchange_bind((*to).into(), (*from).into(), (*key).into(), options, nothing())
                    .await
            }
            Act::UnbindExchange(to, from, key) => {
                let options = ExchangeUnbindOptions::default();
                channel
                    .exchange_unbind((*to).into(), (*from).into(), (*key).into(), options, nothing())
                    .await
            }
            Act::Purge(queue) => channel
                .queue_purge((*queue).into(), QueuePurgeOptions::default())
                .await
                .map(drop),
        }
    }
}

impl std::fmt::Display for Act<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Act::Publish(exchange, key) => write!(f, "publish to {exchange:?} under {key:?}"),
            Act::PublishAs(user, exchange, _) => write!(f, "publish to {exchange:?} as {user:?}"),
            Act::Consume(queue) => write!(f, "consume {queue}"),
            Act::Get(queue) => write!(f, "get from {queue}"),
            Act::DeclareQueue(queue) => write!(f, "declare queue {queue}"),
            Act::DeclareExchange(exchange) => write!(f, "declare exchange {exchange}"),
            Act::DeleteQueue(queue) => write!(f, "delete queue {queue}"),
            Act::DeleteExchange(exchange) => write!(f, "delete exchange {exchange}"),
            Act::Bind(queue, exchange, key) => write!(f, "bind {queue} to {exchange} by {key:?}"),
            Act::Unbind(queue, exchange, key) => write!(f, "unbind {queue} from {exchange} by {key:?}"),
            Act::BindExchange(to, from, key) => write!(f, "bind exchange {to} to {from} by {key:?}"),
            Act::UnbindExchange(to, from, key) => write!(f, "unbind exchange {to} from {from} by {key:?}"),
            Act::Purge(queue) => write!(f, "purge {queue}"),
        }
    }
}

/// Whether it found a queue.
async fn publish(
    channel: &Channel,
    exchange: &str,
    key: &str,
    body: &[u8],
    properties: BasicProperties,
) -> lapin::Result<bool> {
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicPublishOptions {
        mandatory: true,
        immediate: false,
    };
    let confirm = channel
        .basic_publish(exchange.into(), key.into(), options, body, properties)
        .await?
        .await?;
    match confirm {
        Confirmation::Ack(returned) => Ok(returned.is_none()),
        other => panic!("{other:?}"),
    }
}

async fn login(url: &str) -> Connection {
    Connection::connect(url, ConnectionProperties::default())
        .await
        .expect("logged in")
}

/// Two partners, each bound to a user of the broker of its own.
async fn two_partners(test: &str) -> (Place, [Partner; 2], [String; 2]) {
    let place = Place::new(test).await;
    let partners = [Partner::new("acme"), Partner::new("other")];
    let users = [format!("{}_acme", place.name), format!("{}_other", place.name)];
    for (partner, user) in partners.iter().zip(&users) {
        place.register_with(partner, &["--broker-user", user]).await;
        place.deposit(partner, "BTC", "100").await;
    }
    (place, partners, users)
}

fn sent(message: &Message, user: &str) -> BasicProperties {
    message.properties.clone().with_user_id(user.into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_user_does_what_it_is_for_and_nothing_else() {
    let (place, [acme, other], [acme_user, other_user]) = two_partners("apart").await;
    place.register_with(&Partner::new("owner"), &["--own-queue"]).await;
    let exported = ask(&place, &["topology", "export"]).await.document(0);
    let users = Users::of(&place, &exported).await;

    // The operator declares all that was imported, as it is.
    let declared = crate::kit::command::ask_in(
        &[
            ("SETTLED_DATABASE_URL", place.database_url.as_str()),
            ("SETTLED_BROKER_URL", users.url("settlement-operator").as_str()),
        ],
        &["topology"],
    )
    .await
    .document(0);
    let exchanges = declared["exchanges"].as_array().expect("exchanges");
    assert!(exchanges.contains(&json!("settlement.updates.acme")), "{declared}");

    // A partner: its own updates, its own outcomes.
    let reservations = [
        acme.allocation("BTC", "1"),
        other.allocation("BTC", "1"),
        acme.allocation("BTC", "1"),
    ];
    place.reserve(&reservations).await;
    let worker = place
        .ready_worker(&[("SETTLED_BROKER_URL", users.url("settlement-worker").as_str())])
        .await;
    let connection = login(&users.url(&acme_user)).await;
    let channel = connection.create_channel().await.expect("a channel");
    let message = acme.cleared(&reservations[0]);
    let properties = sent(&message, &acme_user);
    let own = "settlement.updates.acme";
    assert!(
        publish(&channel, own, &message.routing_key, &message.body, properties)
            .await
            .expect("confirmed"),
        "it reaches the input queue"
    );
    let db = place.db().await;
    let is_settled = async |id: uuid::Uuid| {
        let sql = "SELECT status <> 'reserved' FROM settled.allocations WHERE id = $1";
        db.query_one(sql, &[&id]).await.expect("a row").get::<_, bool>(0)
    };
    until("it is settled", PATIENCE, async || {
        is_settled(reservations[0].id).await.then_some(())
    })
    .await;
    until("its outcome waits for it", PATIENCE, async || {
        let got = channel
            .basic_get("settlement.outcomes.acme".into(), BasicGetOptions::default())
            .await;
        got.expect("allowed").map(|got| {
            assert!(got.routing_key.as_str().ends_with(".acme"), "{}", got.routing_key);
        })
    })
    .await;
    // The other's word through its own exchange goes nowhere, and as somebody else's not even that far.
    let theirs = other.cleared(&reservations[1]);
    let properties = sent(&theirs, &acme_user);
    assert!(
        !publish(&channel, own, &theirs.routing_key, &theirs.body, properties)
            .await
            .expect("confirmed"),
        "another's key is returned"
    );
    // A copy that a header sends past the keys is still the sender's.
    let mine = acme.cleared(&reservations[2]);
    let copies: FieldArray = vec![AMQPValue::LongString(theirs.routing_key.as_str().into())].into();
    let headers = BTreeMap::from([("CC".into(), AMQPValue::FieldArray(copies))]);
    let properties = sent(&mine, &acme_user).with_headers(headers.into());
    publish(&channel, own, &mine.routing_key, &mine.body, properties)
        .await
        .expect("confirmed");
    until("it is settled once", PATIENCE, async || {
        is_settled(reservations[2].id).await.then_some(())
    })
    .await;
    assert!(!is_settled(reservations[1].id).await, "nobody spoke for the other");

    let update = "acme.allocation.update";
    let forbidden = [
        Act::Publish("settlement.updates", update),
        Act::Publish("settlement.updates.other", "other.allocation.update"),
        Act::Publish("settlement.updates.all", update),
        Act::Publish("settlement.events", "allocation.cleared.acme"),
        Act::Publish("settlement.dead", update),
        Act::Publish("settlement.unreadable", ""),
        Act::Publish("settlement.epoch", ""),
        Act::Consume("settlement.epoch"),
        Act::Publish("", "settlement.updates"),
        Act::Publish("", "settlement.outcomes.other"),
        Act::Consume("settlement.updates"),
        Act::Consume("settlement.updates.owner"),
        Act::Consume("settlement.dead"),
        Act::Consume("settlement.outcomes.other"),
        Act::Get("settlement.outcomes.other"),
        Act::Purge("settlement.outcomes.other"),
        Act::Purge("settlement.updates"),
        Act::DeclareQueue("acme.mine"),
        Act::DeclareQueue("settlement.outcomes.mine"),
        Act::DeclareExchange("settlement.updates.mine"),
        Act::DeleteQueue("settlement.outcomes.acme"),
        Act::DeleteQueue("settlement.updates"),
        Act::DeleteExchange("settlement.updates.acme"),
        Act::Bind("settlement.outcomes.acme", "settlement.events", "#"),
        Act::Bind("settlement.outcomes.acme", "settlement.updates", "#"),
        Act::Bind("settlement.outcomes.acme", "settlement.dead", "#"),
    ];
    for act in &forbidden {
        assert_eq!(act.tried(&connection).await, 403, "partner: {act}");
    }
    let as_other = Act::PublishAs(&other_user, own, update);
    assert_eq!(as_other.tried(&connection).await, 406, "{as_other}");

    // The worker has no right to configure, and none to speak as a partner.
    let connection = login(&users.url("settlement-worker")).await;
    for act in [
        Act::DeclareQueue("settlement.more"),
        Act::DeclareExchange("settlement.more"),
        Act::DeleteQueue("settlement.updates"),
        Act::DeleteExchange("settlement.updates"),
        Act::Publish("settlement.updates", update),
        Act::Publish(own, update),
        Act::Bind("settlement.updates", "settlement.dead", "#"),
        Act::Bind("settlement.outcomes.acme", "settlement.events", "#"),
        Act::Bind("settlement.dead", "settlement.events", "#"),
        Act::BindExchange("settlement.updates", "settlement.dead", "#"),
        Act::BindExchange(own, "settlement.dead", "#"),
        Act::UnbindExchange("settlement.updates", own, update),
        Act::Get("settlement.outcomes.acme"),
        Act::Get("settlement.unreadable"),
    ] {
        assert_eq!(act.tried(&connection).await, 403, "worker: {act}");
    }
    // What it may beside its work, since exchanges and queues share names, and replies go through the default exchange: see
    // docs/threats.md. Each is taken back.
    for act in [
        Act::Bind("settlement.dead", "settlement.updates", "never"),
        Act::Unbind("settlement.dead", "settlement.updates", "never"),
        Act::Bind("settlement.unreadable", "settlement.dead", "never"),
        Act::Unbind("settlement.unreadable", "settlement.dead", "never"),
        Act::BindExchange("settlement.events", "settlement.updates", "never"),
        Act::UnbindExchange("settlement.events", "settlement.updates", "never"),
        Act::Publish("", "settlement.outcomes.acme"),
        Act::Publish("", "settlement.updates"),
    ] {
        assert_eq!(act.tried(&connection).await, 0, "worker: {act}");
    }

    // A subscriber hears in queues of its own.
    let connection = login(&users.url("settlement-subscriber")).await;
    for act in [
        Act::DeclareQueue("subscriber.books"),
        Act::Bind("subscriber.books", "settlement.events", "#"),
        Act::Get("subscriber.books"),
        Act::DeleteQueue("subscriber.books"),
    ] {
        assert_eq!(act.tried(&connection).await, 0, "subscriber: {act}");
    }
    for act in [
        Act::Publish("settlement.events", "allocation.cleared.acme"),
        Act::Publish("settlement.updates", update),
        Act::Publish("settlement.dead", update),
        Act::Get("settlement.updates"),
        Act::Get("settlement.dead"),
        Act::Get("settlement.outcomes.acme"),
        Act::Bind("subscriber.books", "settlement.updates", "#"),
        Act::Bind("subscriber.books", "settlement.dead", "#"),
        Act::DeclareQueue("settlement.more"),
        Act::DeleteQueue("settlement.updates"),
    ] {
        assert_eq!(act.tried(&connection).await, 403, "subscriber: {act}");
    }

    // Who looks takes nothing.
    let connection = login(&users.url("settlement-monitoring")).await;
    for act in [
        Act::Publish("settlement.updates", update),
        Act::Publish("settlement.events", "allocation.cleared.acme"),
        Act::Get("settlement.updates"),
        Act::Get("settlement.dead"),
        Act::DeclareQueue("settlement.more"),
        Act::DeleteQueue("settlement.updates"),
    ] {
        assert_eq!(act.tried(&connection).await, 403, "monitoring: {act}");
    }

    // Doctor says who is kept apart.
    let settings = ["doctor"];
    let found: Value = serde_json::from_str(&ask(&place, &settings).await.out).expect("JSON");
    let apart = found["checks"]
        .as_array()
        .expect("checks")
        .iter()
        .find(|check| check["name"] == "partners_apart");
    let apart = apart.unwrap_or_else(|| panic!("{found}"));
    assert!(
        apart["detail"]
            .as_str()
            .is_some_and(|detail| detail.starts_with("2 of 3 partners")),
        "{apart}"
    );
    assert!(
        apart["hint"]
            .as_str()
            .is_some_and(|hint| hint.contains("topology export")),
        "{apart}"
    );

    worker.terminate().await;
    users.forget(&place).await;
}

/// What one partner needs, and nothing else; the lines are what the definitions say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_partner_is_exported_by_itself() {
    let (place, _, [acme_user, other_user]) = two_partners("apart_one").await;
    let all = ask(&place, &["topology", "export"]).await.document(0);
    let one = ask(&place, &["topology", "export", "--partner", "acme"])
        .await
        .document(0);
    let text = one.to_string();
    assert!(text.contains(&acme_user) && !text.contains(&other_user), "{text}");
    let permissions = one["definitions"]["permissions"].as_array().expect("permissions");
    assert_eq!(permissions.len(), 1, "{one}");
    for exported in [&all, &one] {
        let lines: Vec<&str> = exported["lines"]
            .as_array()
            .expect("lines")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        for permission in exported["definitions"]["permissions"].as_array().expect("permissions") {
            let word = |name: &str| format!("'{}'", permission[name].as_str().expect("text"));
            let line = format!(
                "rabbitmqctl set_permissions -p {} {} {} {} {}",
                word("vhost"),
                word("user"),
                word("configure"),
                word("write"),
                word("read")
            );
            assert!(lines.contains(&line.as_str()), "{line} is not in {lines:?}");
        }
    }
    assert!(!all.to_string().contains("password"), "{all}");
    assert!(all["notes"].to_string().contains("CC header"), "{}", all["notes"]);
    ask(&place, &["topology", "export", "--partner", "nobody"])
        .await
        .refused(1, "nobody");
    // Who is bound to the user that this program logs in as would take its rights away, which is said; nobody has one of our own.
    let (mine, _) = userinfo(&place.broker_url);
    place
        .register_with(&Partner::new("mine"), &["--broker-user", mine])
        .await;
    let told = ask(&place, &["topology", "export"]).await.document(0);
    let note = format!("partner mine logs in as {mine}, as this program does now");
    assert!(told["notes"].to_string().contains(&note), "{}", told["notes"]);
    place.register(&Partner::new("settlement-operator")).await;
    for words in [
        &["topology", "export"][..],
        &["topology", "export", "--partner", "settlement-operator"],
    ] {
        let (message, hint) = ask(&place, words).await.refusal(1);
        assert!(message.contains("a user of our own"), "{message}");
        assert!(
            hint.contains("settled partner set settlement-operator --broker-user"),
            "{hint}"
        );
    }

    // What it publishes to is there since it was registered.
    let message = Message::new("acme.allocation.update", "{}", Expect::Any);
    let connection = login(&place.broker_url).await;
    let channel = connection.create_channel().await.expect("a channel");
    let found = publish(
        &channel,
        "settlement.updates.acme",
        &message.routing_key,
        &message.body,
        message.properties.clone(),
    );
    assert!(found.await.expect("confirmed"), "it reaches the input queue");
}
