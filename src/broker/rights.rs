//! What the broker lets this user do, asked so that no message comes of it.

use lapin::options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::protocol::BasicProperties;

use super::channel::{TopologyFinding, refusal, short, table, text};
use super::{ANSWER_TIMEOUT, BrokerError, BrokerSettings, Connection, answer};
use crate::domain::names::{BROKER_MADE, DEAD, EPOCH, EVENTS, UNREADABLE, UPDATES, own_queue};

/// What a worker may publish to: events, dead letters, what can not be stored, and replies.
pub(super) const WRITE: &str = r"^(settlement\.(events|dead|unreadable|epoch)|amq\.default)$";
/// What a worker may read from.
pub(super) const READ: &str = r"^settlement\.(updates(\..*)?|dead|dead\.broker(\..*)?|epoch)$";

/// What the user may do who runs `settled topology`, the same for each of the three.
pub(super) const DECLARE: &str = r"^settlement\.";
/// What a partner may publish to, at the least.
const PARTNER: &str = r"^settlement\.updates$";

/// Something that a user may do or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// To this exchange, under a routing key.
    Publish(&'static str, &'static str),
    /// From this queue.
    Consume(String),
}

/// Without these no batch can be told.
const OF_A_LANE: [Right; 2] = [
    Right::Publish(EVENTS, "allocation.cleared.probe"),
    Right::Publish(DEAD, "probe.allocation.update"),
];

/// Everything that a worker does; `own` names the partners that have a queue of their own.
pub(super) fn of_a_worker(own: &[String]) -> Vec<Right> {
    let queues = [UPDATES, DEAD, BROKER_MADE, EPOCH].map(str::to_owned);
    let own = own.iter().map(|enterprise_id| own_queue(enterprise_id));
    OF_A_LANE
        .into_iter()
        .chain([
            Right::Publish(UNREADABLE, "probe.allocation.update"),
            Right::Publish(EPOCH, ""),
        ])
        .chain(queues.into_iter().chain(own).map(Right::Consume))
        .collect()
}

/// The commands that mend what the user of a URL may do. Only of a login that succeeded: the names of one that was written
/// wrong may be parts of its password.
#[derive(Clone, Debug)]
pub struct Mend {
    /// Virtual host and user, as a shell takes them.
    whose: String,
}

/// The command that gives what is missing, by the broker's own words of a login that succeeded. They say for whom, where and for
/// what; from version 4.0 on also which of the three rights.
pub(super) fn mending(text: &str) -> Option<String> {
    let named = |what: &str| {
        let (_, rest) = text.split_once(&format!("{what} '"))?;
        rest.split_once('\'').map(|(name, _)| name)
    };
    let (vhost, user) = (named("in vhost")?, named("for user")?);
    let mend = Mend::for_user(vhost, user);
    if text.contains("access to topic") {
        return Some(mend.topics());
    }
    // The broker before 4.0 does not say that it is about declaring, and `settled topology` does nothing else.
    if text.contains("configure access") {
        return Some(mend.declaring());
    }
    Some(match named("access to exchange") {
        Some(UPDATES) => mend.publishing(),
        Some(_) | None => mend.permissions(),
    })
}

impl Mend {
    fn for_user(vhost: &str, user: &str) -> Self {
        let quoted = |name: &str| format!("'{}'", name.replace('\'', r"'\''"));
        Self {
            whose: format!("-p {} {}", quoted(vhost), quoted(user)),
        }
    }

    /// Gives what `settled topology` needs.
    fn declaring(&self) -> String {
        format!(
            "this is for the user who runs `settled topology`, who needs (it replaces what this user may do now): rabbitmqctl \
             set_permissions {} '{DECLARE}' '{DECLARE}' '{DECLARE}'",
            self.whose
        )
    }

    /// Gives what a partner needs to publish.
    fn publishing(&self) -> String {
        format!(
            "give this user what a partner needs (it replaces what it may do now): rabbitmqctl set_permissions {} '' \
             '{PARTNER}' ''",
            self.whose
        )
    }

    pub fn of(settings: &BrokerSettings) -> Self {
        let (vhost, user) = match settings.uri() {
            Ok(uri) => (uri.vhost, uri.authority.userinfo.username),
            Err(_) => ("VHOST".to_owned(), "USER".to_owned()),
        };
        Self::for_user(&vhost, &user)
    }

    /// Gives what a worker needs.
    fn permissions(&self) -> String {
        format!(
            "give this user what a worker needs (it replaces what it may do now): rabbitmqctl set_permissions {} '' \
             '{WRITE}' '{READ}'",
            self.whose
        )
    }

    /// Takes away what keeps routing keys from a topic exchange.
    fn topics(&self) -> String {
        format!(
            "topic permissions of this user are in the way: rabbitmqctl clear_topic_permissions {}",
            self.whose
        )
    }
}

/// The first thing that keeps a lane from telling what it settles, as `settled doctor` says it. Use a connection made for
/// this: each answer costs it a channel number, and under an alarm the broker leaves it without one.
///
/// # Errors
/// The broker is away.
pub async fn missing_for_a_lane(connection: &Connection, mend: &Mend) -> Result<Option<String>, BrokerError> {
    let findings = look(connection, mend, &OF_A_LANE).await?;
    Ok(findings.into_iter().find_map(|finding| {
        let problem = finding.problem?;
        let hint = finding.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        Some(format!("{}: {problem}{hint}", finding.object))
    }))
}

/// Asks for each; `mend` is what to do where one is missing.
pub(super) async fn look(
    connection: &Connection,
    mend: &Mend,
    rights: &[Right],
) -> Result<Vec<TopologyFinding>, BrokerError> {
    let mut findings = Vec::new();
    for right in rights {
        let (object, answer) = match right {
            Right::Publish(exchange, key) => (
                format!("permission to publish to {exchange}"),
                refusal(connection, async |channel| probe_publish(channel, exchange, key).await).await?,
            ),
            Right::Consume(queue) => (
                format!("permission to consume {queue}"),
                refusal(connection, async |channel| probe_consume(channel, queue).await).await?,
            ),
        };
        findings.push(permission(object, mend, answer));
    }
    Ok(findings)
}

fn permission(object: String, mend: &Mend, answer: Option<(u16, String)>) -> TopologyFinding {
    let (problem, hint) = match answer {
        // 406 is the refusal the probe asks for: the broker looked at the permission first.
        None | Some((406, _)) => (None, None),
        Some((403, text)) if text.contains("access to topic") => (Some(text), Some(mend.topics())),
        Some((403, text)) => (Some(text), Some(mend.permissions())),
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
    let queue = short(queue)?;
    let consume = async {
        // Should a broker accept it after all, one message comes and goes back.
        channel.basic_qos(1, BasicQosOptions { global: false }).await?;
        channel
            .basic_consume(
                queue,
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

    #[test]
    fn the_page_for_operators_says_the_same_rights() {
        let page = include_str!("../../docs/operators.md");
        for pattern in [WRITE, READ] {
            assert!(page.contains(&format!("'{pattern}'")), "{pattern}");
        }
    }

    #[test]
    fn every_broker_says_whose_right_is_missing() {
        let table = [
            (
                "ACCESS_REFUSED - access to queue 'settlement.updates' in vhost 'v' refused for user 'w'",
                Some(format!("set_permissions -p 'v' 'w' '' '{WRITE}' '{READ}'")),
            ),
            (
                "ACCESS_REFUSED - read access to queue 'settlement.updates' in vhost '/' refused for user 'w'",
                Some(format!("set_permissions -p '/' 'w' '' '{WRITE}' '{READ}'")),
            ),
            (
                "ACCESS_REFUSED - configure access to queue 'settlement.dead' in vhost 'v' refused for user 'w'",
                Some(format!(
                    "set_permissions -p 'v' 'w' '{DECLARE}' '{DECLARE}' '{DECLARE}'"
                )),
            ),
            (
                "ACCESS_REFUSED - write access to exchange 'settlement.updates' in vhost 'v' refused for user 'p'",
                Some(format!("set_permissions -p 'v' 'p' '' '{PARTNER}' ''")),
            ),
            (
                "ACCESS_REFUSED - write access to topic 'k' in exchange 'settlement.events' in vhost 'v' refused for user 'w'",
                Some("clear_topic_permissions -p 'v' 'w'".to_owned()),
            ),
            (
                "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.",
                None,
            ),
        ];
        for (text, expected) in table {
            let mending = mending(text);
            assert_eq!(mending.is_some(), expected.is_some(), "{text}");
            let ends = |mending: &str| mending.ends_with(expected.as_deref().unwrap_or_default());
            assert!(mending.as_deref().is_none_or(ends), "{mending:?}");
        }
    }

    #[test]
    fn names_are_quoted_for_a_shell() {
        let mend = Mend {
            whose: "-p 'v' 'u'".to_owned(),
        };
        assert_eq!(
            mend.permissions(),
            format!(
                "give this user what a worker needs (it replaces what it may do now): rabbitmqctl set_permissions -p 'v' 'u' \
                 '' '{WRITE}' '{READ}'"
            )
        );
        assert!(
            mend.topics()
                .ends_with("rabbitmqctl clear_topic_permissions -p 'v' 'u'")
        );
    }
}
