//! What only the management API shows: what waits at the broker to be dead-lettered, arguments whatever our rights are,
//! policies, and bindings.

use std::collections::BTreeMap;

use lapin::ExchangeKind;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Binding, DELIVERY_LIMIT, Exchange, NO_DELIVERY_LIMIT, Queue, QueueKind, TopologyFinding, WORDS_FILE, WORDS_MAX,
    exchanges, hidden_queue, look::around, partner_queue, queues, shown,
};
use crate::broker::management::{Management, ManagementError, escaped};

/// Queues that one answer may tell of: far more than a worker consumes.
const QUEUES_MAX: u16 = 500;

/// What waits at the broker to be dead-lettered from a queue: it leaves that queue once the dead-letter exchange confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLettering {
    pub queue: String,
    pub messages: u64,
}

#[derive(Deserialize)]
struct Page {
    items: Vec<SeenQueue>,
}

#[derive(Debug, Default, Deserialize)]
struct SeenQueue {
    name: String,
    #[serde(default)]
    arguments: BTreeMap<String, Value>,
    #[serde(default)]
    policy: Option<String>,
    #[serde(default)]
    operator_policy: Option<String>,
    // An empty one is an empty list in some versions.
    #[serde(default)]
    effective_policy_definition: Value,
    #[serde(default)]
    messages_dlx: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct SeenExchange {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    durable: bool,
    #[serde(default)]
    arguments: BTreeMap<String, Value>,
}

#[derive(Debug, Deserialize)]
struct SeenBinding {
    source: String,
    routing_key: String,
    #[serde(default)]
    arguments: BTreeMap<String, Value>,
}

async fn seen_queues(management: &Management) -> Result<Vec<SeenQueue>, ManagementError> {
    let columns = "name,arguments,policy,operator_policy,effective_policy_definition,messages_dlx";
    let names = escaped(r"^settlement\.(updates|dead|unreadable|epoch)");
    let path = format!(
        "queues/{}?page=1&page_size={QUEUES_MAX}&use_regex=true&name={names}&columns={columns}",
        management.vhost()
    );
    let page: Page = management.get(&path).await?;
    Ok(page.items)
}

/// What waits at the broker to be dead-lettered, by queue, of those queues that dead-letter.
///
/// # Errors
/// The management API does not answer.
pub async fn waiting(management: &Management) -> Result<Vec<DeadLettering>, ManagementError> {
    let queues = seen_queues(management).await?;
    let waiting = queues.into_iter().filter_map(|queue| {
        queue.arguments.contains_key("x-dead-letter-exchange").then_some(())?;
        Some(DeadLettering {
            queue: queue.name,
            messages: queue.messages_dlx?,
        })
    });
    Ok(waiting.collect())
}

/// Looks at arguments, policies and bindings of everything that there must be. `own` names the partners that have a queue of
/// their own, `hidden` is the queue of that name, where the books say it.
///
/// # Errors
/// The management API does not answer.
pub async fn seen(
    management: &Management,
    own: &[String],
    hidden: Option<&str>,
) -> Result<Vec<TopologyFinding>, ManagementError> {
    let mut findings = vec![look_at_exchanges(management, &exchanges()).await?];
    let there = seen_queues(management).await?;
    let own_queues = own.iter().map(|enterprise_id| partner_queue(enterprise_id));
    let hidden_queues = hidden.map(hidden_queue).into_iter();
    for queue in queues().into_iter().chain(own_queues).chain(hidden_queues) {
        let object = format!("management: queue {}", shown(&queue.name));
        let finding = match there.iter().find(|seen| seen.name == queue.name) {
            None => missing(object),
            Some(seen) => {
                let path = format!("queues/{}/{}/bindings", management.vhost(), escaped(&queue.name));
                let bindings: Vec<SeenBinding> = management.get(&path).await?;
                queue_finding(object, &queue, seen, &bindings)
            }
        };
        findings.push(finding);
    }
    Ok(findings)
}

const DECLARE: &str = "run `settled topology`";

/// What is wrong with a queue that is about to be consumed, and with the exchanges that lead to it and away from it, as
/// `settled doctor` says it: arguments and bindings, whatever our rights at the broker are. Policies are the doctor's to judge.
///
/// # Errors
/// The management API does not answer.
pub async fn wrong(management: &Management, queue: &str) -> Result<Option<String>, ManagementError> {
    let Some((mut looked_at, around)) = around(queue) else {
        return Ok(None);
    };
    // Who takes a partner's own queue back unbinds it first, and it is consumed until it is empty.
    if queue != super::UPDATES && queue.starts_with(super::UPDATES) {
        looked_at.bindings.clear();
    }
    let object = format!("management: queue {}", shown(queue));
    let path = format!("queues/{}/{}", management.vhost(), escaped(queue));
    let finding = match management
        .get::<SeenQueue>(&format!("{path}?columns=name,arguments"))
        .await
    {
        Ok(seen) => {
            let bindings: Vec<SeenBinding> = management.get(&format!("{path}/bindings")).await?;
            queue_finding(object, &looked_at, &seen, &bindings)
        }
        Err(ManagementError::Missing(_)) => missing(object),
        Err(error) => return Err(error),
    };
    if finding.problem.is_some() {
        return Ok(finding.sentence());
    }
    Ok(look_at_exchanges(management, &around).await?.sentence())
}

fn missing(object: String) -> TopologyFinding {
    TopologyFinding {
        object,
        problem: Some("it is missing".to_owned()),
        hint: Some(DECLARE.to_owned()),
    }
}

async fn look_at_exchanges(
    management: &Management,
    exchanges: &[Exchange],
) -> Result<TopologyFinding, ManagementError> {
    let mut problems = Vec::new();
    for exchange in exchanges {
        let path = format!("exchanges/{}/{}", management.vhost(), escaped(exchange.name));
        let seen: SeenExchange = match management.get(&path).await {
            Ok(seen) => seen,
            Err(ManagementError::Missing(_)) => {
                problems.push(format!("{} is missing", exchange.name));
                continue;
            }
            Err(error) => return Err(error),
        };
        problems.extend(exchange_problems(exchange, &seen));
        if let Some(source) = exchange.from {
            let bindings: Vec<SeenBinding> = management.get(&format!("{path}/bindings/destination")).await?;
            if !bindings
                .iter()
                .any(|seen| seen.source == source && seen.routing_key == "#")
            {
                problems.push(format!("{} is not bound to {source} under #", exchange.name));
            }
        }
    }
    Ok(TopologyFinding {
        object: "management: exchanges".to_owned(),
        hint: (!problems.is_empty()).then(|| DECLARE.to_owned()),
        problem: (!problems.is_empty()).then(|| problems.join("; ")),
    })
}

fn exchange_problems(exchange: &Exchange, seen: &SeenExchange) -> Vec<String> {
    let mut problems = Vec::new();
    let kind = match &exchange.kind {
        ExchangeKind::Fanout => "fanout",
        ExchangeKind::Topic => "topic",
        ExchangeKind::Headers => "headers",
        ExchangeKind::Direct => "direct",
        ExchangeKind::Custom(kind) => kind.as_str(),
    };
    if seen.kind != kind || !seen.durable {
        problems.push(format!("{} is not a durable {kind} exchange", exchange.name));
    }
    let alternate = seen.arguments.get("alternate-exchange").and_then(Value::as_str);
    if alternate != exchange.alternate {
        problems.push(match exchange.alternate {
            Some(expected) => format!("{} has not the alternate exchange {expected}", exchange.name),
            None => format!("{} has an alternate exchange", exchange.name),
        });
    }
    problems
}

impl Binding {
    fn is(&self, seen: &SeenBinding) -> bool {
        let has_header = match self.header {
            None => seen.arguments.is_empty(),
            Some(header) => {
                seen.arguments.contains_key(header) && seen.arguments.get("x-match") == Some(&json!("all-with-x"))
            }
        };
        seen.source == self.exchange && seen.routing_key == self.key && has_header
    }
}

impl Queue {
    /// Its arguments as JSON has them.
    fn arguments_seen(&self) -> BTreeMap<String, Value> {
        let mut arguments = BTreeMap::from([("x-queue-type".to_owned(), json!(self.kind.word()))]);
        match self.kind {
            QueueKind::DeadLettering(exchange) => arguments.extend([
                ("x-delivery-limit".to_owned(), json!(DELIVERY_LIMIT)),
                ("x-dead-letter-exchange".to_owned(), json!(exchange)),
                ("x-dead-letter-strategy".to_owned(), json!("at-least-once")),
                ("x-overflow".to_owned(), json!("reject-publish")),
            ]),
            QueueKind::Patient => drop(arguments.insert("x-delivery-limit".to_owned(), json!(NO_DELIVERY_LIMIT))),
            QueueKind::Words => arguments.extend([
                ("x-max-length-bytes".to_owned(), json!(WORDS_MAX)),
                ("x-stream-max-segment-size-bytes".to_owned(), json!(WORDS_FILE)),
            ]),
            QueueKind::Last => {}
        }
        arguments
    }
}

fn queue_finding(object: String, queue: &Queue, seen: &SeenQueue, bindings: &[SeenBinding]) -> TopologyFinding {
    let mut problems = Vec::new();
    let mut hints = Vec::new();
    let expected = queue.arguments_seen();
    let names: Vec<&String> = expected.keys().chain(seen.arguments.keys()).collect();
    let differs: std::collections::BTreeSet<&str> = names
        .into_iter()
        .filter(|name| expected.get(*name) != seen.arguments.get(*name))
        .map(String::as_str)
        .collect();
    if !differs.is_empty() {
        let differs: Vec<&str> = differs.into_iter().collect();
        problems.push(format!("it is there with other arguments: {}", differs.join(", ")));
        hints.push(format!("move its messages away, delete it, then {DECLARE}"));
    }
    for binding in &queue.bindings {
        if !bindings.iter().any(|seen| binding.is(seen)) {
            problems.push(format!(
                "its binding to {} under \"{}\" is missing",
                binding.exchange, binding.key
            ));
            hints.push(DECLARE.to_owned());
        }
    }
    // Each queue is bound to the default exchange, whose name is empty.
    let is_ours = |seen: &SeenBinding| seen.source.is_empty() || queue.bindings.iter().any(|binding| binding.is(seen));
    let more: Vec<&str> = bindings
        .iter()
        .filter(|seen| !is_ours(seen))
        .map(|seen| seen.source.as_str())
        .collect();
    if !more.is_empty() {
        hints.push(format!("it has further bindings, to {}", more.join(", ")));
    }
    let (wrong, noted) = policy_findings(queue, seen);
    if !wrong.is_empty() {
        let names = [&seen.policy, &seen.operator_policy].into_iter().flatten();
        let names: Vec<&str> = names.map(String::as_str).collect();
        problems.push(format!("policy {} {}", names.join(", "), wrong.join(", ")));
        hints.push("let the policy's pattern leave out queues that begin with `settlement.`".to_owned());
    }
    hints.extend(noted);
    hints.dedup();
    TopologyFinding {
        object,
        problem: (!problems.is_empty()).then(|| problems.join("; ")),
        hint: (!hints.is_empty()).then(|| hints.join("; ")),
    }
}

/// What policies do to a queue that they must not, and what is worth knowing. An argument of ours is stronger than a policy
/// of the same name, except limits, of which the lower one counts.
fn policy_findings(queue: &Queue, seen: &SeenQueue) -> (Vec<String>, Vec<String>) {
    let (mut wrong, mut noted) = (Vec::new(), Vec::new());
    let Some(policy) = seen.effective_policy_definition.as_object() else {
        return (wrong, noted);
    };
    let drops_when_full = match queue.kind {
        // A stream is meant to forget what is old.
        QueueKind::DeadLettering(_) | QueueKind::Words => false,
        QueueKind::Last | QueueKind::Patient => {
            policy.get("overflow").and_then(Value::as_str) != Some("reject-publish")
        }
    };
    for (key, value) in policy {
        match key.as_str() {
            "message-ttl" => wrong.push("lets its messages expire".to_owned()),
            "expires" => wrong.push("deletes it when nobody uses it".to_owned()),
            "max-length" | "max-length-bytes" if drops_when_full => {
                wrong.push("drops its oldest messages when it is full".to_owned());
            }
            "max-length" | "max-length-bytes" => {
                noted.push(format!(
                    "a policy bounds it ({key} {value}): above that it refuses what is published"
                ));
            }
            "delivery-limit" => {
                let limit = match queue.kind {
                    QueueKind::DeadLettering(_) => Some(DELIVERY_LIMIT),
                    QueueKind::Patient => Some(NO_DELIVERY_LIMIT),
                    QueueKind::Last | QueueKind::Words => None,
                };
                if limit.is_some_and(|limit| value.as_i64().is_some_and(|value| value < i64::from(limit))) {
                    wrong.push(format!("lowers its delivery limit to {value}"));
                }
            }
            _ => {}
        }
    }
    (wrong, noted)
}
