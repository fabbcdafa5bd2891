//! The topology and its users as the broker's own tools take them: definitions in JSON, and lines for rabbitmqctl.

use lapin::{ExchangeKind, types::AMQPValue};
use serde_json::{Map, Value, json};

use super::{EVENTS, Exchange, Queue, UPDATES, exchanges, partner_queue, queues, update_keys};
use crate::broker::{
    own_exchange::own_exchange,
    rights::{DECLARE, READ, WRITE},
};

/// Outcomes that a partner's queue keeps for it; the oldest go first. What went can be asked for over HTTP.
const OUTCOMES_MAX: i64 = 1_000_000;

/// Our own users: whoever sets permissions of a name replaces those that it has, so that none of them is a partner's too.
const OURS: [&str; 4] = [
    "settlement-worker",
    "settlement-operator",
    "settlement-subscriber",
    "settlement-monitoring",
];

/// A partner, as far as the broker knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartnerDoor {
    pub enterprise_id: String,
    /// Whom it logs in as.
    pub user: String,
    pub own_queue: bool,
}

/// A user of the broker, and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerUser {
    pub name: String,
    /// For whom it is.
    pub purpose: String,
    configure: String,
    write: String,
    read: String,
    tags: &'static str,
}

/// Where the events of a partner's own messages wait for it.
pub fn outcomes(enterprise_id: &str) -> String {
    format!("settlement.outcomes.{enterprise_id}")
}

impl BrokerUser {
    /// A user of this name is somebody else's too.
    fn may_also(&mut self, other: Self) {
        self.purpose = format!("{}; {}", self.purpose, other.purpose);
        for (mine, its) in [
            (&mut self.configure, other.configure),
            (&mut self.write, other.write),
            (&mut self.read, other.read),
        ] {
            if *mine != its {
                *mine = format!("{mine}|{its}");
            }
        }
        if self.tags.is_empty() {
            self.tags = other.tags;
        }
    }
}

/// Everything for a virtual host, or what one partner needs of it.
#[derive(Clone, Debug)]
pub struct BrokerExport {
    vhost: String,
    partners: Vec<PartnerDoor>,
    /// Of one partner alone.
    is_part: bool,
}

impl BrokerExport {
    pub fn new(vhost: &str, partners: Vec<PartnerDoor>, is_part: bool) -> Self {
        Self {
            vhost: vhost.to_owned(),
            partners,
            is_part,
        }
    }

    /// The first partner that would log in as one of our own users.
    pub fn in_our_place(&self) -> Option<&PartnerDoor> {
        self.partners
            .iter()
            .find(|partner| OURS.contains(&partner.user.as_str()))
    }

    /// Each with the least.
    pub fn users(&self) -> Vec<BrokerUser> {
        let user = |name: &str, purpose: &str, [configure, write, read]: [&str; 3], tags| BrokerUser {
            name: name.to_owned(),
            purpose: purpose.to_owned(),
            configure: configure.to_owned(),
            write: write.to_owned(),
            read: read.to_owned(),
            tags,
        };
        let [worker, operator, subscriber, monitoring] = OURS;
        let ours = [
            user(
                worker,
                "the worker: settles and publishes, and configures nothing",
                ["^$", WRITE, READ],
                "",
            ),
            user(
                operator,
                "who runs `settled topology`, and no program that runs all day",
                [DECLARE, DECLARE, DECLARE],
                "",
            ),
            user(
                subscriber,
                "a program that hears events, in queues of its own",
                [
                    r"^subscriber\.",
                    r"^subscriber\.",
                    r"^(subscriber\..*|settlement\.events)$",
                ],
                "",
            ),
            user(
                monitoring,
                "who looks at the management API (`broker.management_url`), and takes no message",
                ["^$", "^$", "^$"],
                "monitoring",
            ),
        ];
        let partners = self.partners.iter().map(|partner| {
            let enterprise_id = &partner.enterprise_id;
            let exchange = own_exchange(enterprise_id).unwrap_or_else(|| UPDATES.to_owned());
            BrokerUser {
                name: partner.user.clone(),
                purpose: format!("partner {enterprise_id}: publishes its own updates, and reads its own outcomes"),
                configure: "^$".to_owned(),
                write: exactly(&exchange),
                read: exactly(&outcomes(enterprise_id)),
                tags: "",
            }
        });
        let ours = ours.into_iter().filter(|_| !self.is_part);
        let mut users: Vec<BrokerUser> = Vec::new();
        for user in ours.chain(partners) {
            // Whoever sets a user's permissions replaces those that it has: one user is one line, whomever it serves.
            match users.iter_mut().find(|known| known.name == user.name) {
                Some(known) => known.may_also(user),
                None => users.push(user),
            }
        }
        users
    }

    /// Definitions that the broker imports, after `settled topology`: exchanges, queues, bindings and permissions. Users are made by the lines, since a
    /// definition of a user is its password too.
    pub fn definitions(&self) -> Value {
        let vhost = self.vhost.as_str();
        let (mut all_exchanges, mut all_queues, mut bindings) = (Vec::new(), Vec::new(), Vec::new());
        let binding = |source: &str, to: &str, kind: &str, key: &str, arguments: Value| {
            json!({
                "source": source, "vhost": vhost, "destination": to, "destination_type": kind, "routing_key": key,
                "arguments": arguments,
            })
        };
        if !self.is_part {
            for exchange in exchanges() {
                all_exchanges.push(self.exchange(&exchange));
                if let Some(source) = exchange.from {
                    bindings.push(binding(source, exchange.name, "exchange", "#", json!({})));
                }
            }
        }
        let own = self.partners.iter().filter(|partner| partner.own_queue);
        let own: Vec<Queue> = own.map(|partner| partner_queue(&partner.enterprise_id)).collect();
        let common = queues().into_iter().filter(|_| !self.is_part);
        for queue in common.chain(own) {
            all_queues.push(self.queue(&queue.name, plain(&queue.arguments())));
            // What asks for a header whatever it says can not be said in JSON: `settled topology` declares it.
            for bound in queue.bindings.iter().filter(|bound| bound.header.is_none()) {
                let arguments = plain(&bound.arguments());
                bindings.push(binding(bound.exchange, &queue.name, "queue", &bound.key, arguments));
            }
        }
        for partner in &self.partners {
            let enterprise_id = &partner.enterprise_id;
            if let Some(name) = own_exchange(enterprise_id) {
                all_exchanges.push(json!({
                    "name": name, "vhost": vhost, "type": "topic", "durable": true, "auto_delete": false,
                    "internal": false, "arguments": {},
                }));
                let keys = update_keys(enterprise_id);
                bindings.extend(
                    keys.iter()
                        .map(|key| binding(&name, UPDATES, "exchange", key, json!({}))),
                );
            }
            let arguments = json!({
                "x-queue-type": "quorum", "x-max-length": OUTCOMES_MAX, "x-overflow": "drop-head",
            });
            let name = outcomes(enterprise_id);
            all_queues.push(self.queue(&name, arguments));
            bindings.push(binding(
                EVENTS,
                &name,
                "queue",
                &format!("*.*.{enterprise_id}"),
                json!({}),
            ));
        }
        let permissions: Vec<Value> = self
            .users()
            .iter()
            .map(|user| {
                json!({
                    "user": user.name, "vhost": vhost, "configure": user.configure, "write": user.write,
                    "read": user.read,
                })
            })
            .collect();
        json!({
            "exchanges": all_exchanges, "queues": all_queues, "bindings": bindings, "permissions": permissions,
        })
    }

    fn exchange(&self, exchange: &Exchange) -> Value {
        json!({
            "name": exchange.name, "vhost": self.vhost, "type": word(&exchange.kind), "durable": true,
            "auto_delete": false, "internal": false, "arguments": plain(&exchange.arguments()),
        })
    }

    fn queue(&self, name: &str, arguments: Value) -> Value {
        json!({
            "name": name, "vhost": self.vhost, "durable": true, "auto_delete": false, "arguments": arguments,
        })
    }

    /// Lines for a shell: each user (its password is asked for), and what it may do. What a user may do now is replaced.
    pub fn lines(&self) -> Vec<String> {
        let vhost = quoted(&self.vhost);
        let mut lines = Vec::new();
        for user in self.users() {
            let name = quoted(&user.name);
            lines.push(format!("rabbitmqctl add_user {name}"));
            if !user.tags.is_empty() {
                lines.push(format!("rabbitmqctl set_user_tags {name} {}", user.tags));
            }
            lines.push(format!(
                "rabbitmqctl set_permissions -p {vhost} {name} {} {} {}",
                quoted(&user.configure),
                quoted(&user.write),
                quoted(&user.read)
            ));
            lines.push(format!("rabbitmqctl clear_topic_permissions -p {vhost} {name}"));
        }
        lines
    }
}

fn word(kind: &ExchangeKind) -> &str {
    match kind {
        ExchangeKind::Direct => "direct",
        ExchangeKind::Fanout => "fanout",
        ExchangeKind::Headers => "headers",
        ExchangeKind::Topic => "topic",
        ExchangeKind::Custom(name) => name,
    }
}

/// A pattern that one name fits. No name of ours has a letter that means something in a pattern but the dot.
fn exactly(name: &str) -> String {
    format!("^{}$", name.replace('.', r"\."))
}

/// As a shell takes it for one word.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Arguments as JSON.
fn plain(arguments: &lapin::types::FieldTable) -> Value {
    let entries = arguments.inner().iter().map(|(name, value)| {
        let value = match value {
            AMQPValue::LongString(text) => Value::String(String::from_utf8_lossy(text.as_bytes()).into_owned()),
            AMQPValue::LongInt(number) => json!(number),
            _ => Value::Null,
        };
        (name.as_str().to_owned(), value)
    });
    Value::Object(entries.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::{super::DEAD, *};

    fn export(is_part: bool) -> BrokerExport {
        let partner = |enterprise_id: &str, user: &str, own_queue| PartnerDoor {
            enterprise_id: enterprise_id.into(),
            user: user.into(),
            own_queue,
        };
        let partners = vec![partner("north-1", "north", true), partner("all", "o'hara", false)];
        BrokerExport::new("settlement", partners, is_part)
    }

    #[test]
    fn a_partner_may_write_to_one_exchange_and_read_one_queue() {
        let users = export(true).users();
        assert_eq!(users.len(), 2);
        assert_eq!(
            (
                users[0].configure.as_str(),
                users[0].write.as_str(),
                users[0].read.as_str()
            ),
            (
                "^$",
                r"^settlement\.updates\.north-1$",
                r"^settlement\.outcomes\.north-1$"
            )
        );
        // This name is the common topology's: no exchange of its own.
        assert_eq!(users[1].write, r"^settlement\.updates$");
        let definitions = export(true).definitions();
        let names: Vec<&str> = definitions["exchanges"]
            .as_array()
            .expect("exchanges")
            .iter()
            .filter_map(|exchange| exchange["name"].as_str())
            .collect();
        assert_eq!(names, ["settlement.updates.north-1"]);
        let lines = export(true).lines().join("\n");
        assert!(lines.contains(r"'o'\''hara'"), "{lines}");
        assert!(!lines.contains("settlement-worker"), "{lines}");
    }

    #[test]
    fn one_user_of_two_partners_may_do_for_both() {
        let partner = |enterprise_id: &str| PartnerDoor {
            enterprise_id: enterprise_id.into(),
            user: "shared".into(),
            own_queue: false,
        };
        let export = BrokerExport::new("settlement", vec![partner("east"), partner("west")], true);
        let users = export.users();
        assert_eq!(users.len(), 1);
        assert_eq!(users[0].configure, "^$");
        assert_eq!(
            users[0].write,
            r"^settlement\.updates\.east$|^settlement\.updates\.west$"
        );
        assert_eq!(
            users[0].read,
            r"^settlement\.outcomes\.east$|^settlement\.outcomes\.west$"
        );
        assert!(
            users[0].purpose.contains("east") && users[0].purpose.contains("west"),
            "{}",
            users[0].purpose
        );
        let lines = export.lines();
        assert_eq!(lines.iter().filter(|line| line.contains("set_permissions")).count(), 1);
    }

    #[test]
    fn no_partner_is_one_of_our_own_users() {
        assert_eq!(export(false).in_our_place(), None);
        let names: Vec<String> = export(false).users().into_iter().map(|user| user.name).collect();
        assert_eq!(names[..OURS.len()], OURS);
        for name in OURS {
            let partner = PartnerDoor {
                enterprise_id: "east".into(),
                user: name.into(),
                own_queue: false,
            };
            let export = BrokerExport::new("settlement", vec![partner.clone()], true);
            assert_eq!(export.in_our_place(), Some(&partner));
        }
    }

    #[test]
    fn the_whole_has_everything_that_is_declared() {
        let definitions = export(false).definitions();
        let names = |what: &str| -> Vec<&str> {
            let all = definitions[what].as_array().expect("an array").iter();
            all.filter_map(|one| one["name"].as_str()).collect()
        };
        for exchange in exchanges() {
            assert!(names("exchanges").contains(&exchange.name), "{}", exchange.name);
        }
        for queue in queues() {
            assert!(names("queues").contains(&queue.name.as_str()), "{}", queue.name);
        }
        assert!(names("queues").contains(&"settlement.updates.north-1"));
        assert!(names("queues").contains(&DEAD));
        let text = definitions.to_string();
        assert!(
            !text.contains("password") && text.contains("x-delivery-limit"),
            "{text}"
        );
        assert!(!text.contains("null"), "no broker imports it: {text}");
        let configures: Vec<&str> = definitions["permissions"]
            .as_array()
            .expect("permissions")
            .iter()
            .filter(|one| one["configure"] != "^$")
            .filter_map(|one| one["user"].as_str())
            .collect();
        assert_eq!(configures, ["settlement-operator", "settlement-subscriber"]);
    }
}
