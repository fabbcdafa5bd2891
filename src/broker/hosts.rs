//! The hosts of a broker: in which order they are tried, and which of them did not answer lately.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::uri::AMQPUri;

use super::BrokerError;
use crate::{race, redact};

/// More than a broker has nodes.
const HOSTS_MAX: usize = 16;

/// Addresses that are tried at most.
const TARGETS_MAX: usize = 32;

/// So long an address that did not answer is tried after the others.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Each host as a URL of its own. Between commas there may be hosts, each with or without a port, or whole URLs.
pub(super) fn each(text: &str) -> Result<Vec<String>, BrokerError> {
    let wrong = |what: &str| Err(BrokerError::Config(format!("broker.url {what}")));
    let mut each = Vec::new();
    for url in redact::urls(text) {
        let Some((scheme, rest)) = url.split_once("://") else {
            // It is for who reads it as a URL to say so.
            each.push(url.to_owned());
            continue;
        };
        let authority = authority_of(rest);
        let tail = rest.get(authority.len()..).unwrap_or_default();
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (format!("{login}@"), hosts),
            None => (String::new(), authority),
        };
        let hosts: Vec<&str> = hosts.split(',').map(str::trim).collect();
        if hosts.len() > 1 && hosts.iter().any(|host| host.is_empty()) {
            return wrong("has a comma too many: a host without a name would be localhost");
        }
        each.extend(hosts.iter().map(|host| format!("{scheme}://{login}{host}{tail}")));
    }
    if each.len() > HOSTS_MAX {
        return wrong(&format!("names {} hosts, at most {HOSTS_MAX} are tried", each.len()));
    }
    Ok(each)
}

pub(super) fn authority_of(rest: &str) -> &str {
    rest.get(..rest.find(['/', '?', '#']).unwrap_or(rest.len()))
        .unwrap_or_default()
}

/// One address of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// Which of the URLs names it.
    pub(super) uri: usize,
    pub(super) address: SocketAddr,
}

/// The addresses of all hosts: behind one name there may be several, and one of them may be frozen.
pub(super) async fn resolve(uris: &[AMQPUri], limit: Duration) -> Result<Vec<Target>, BrokerError> {
    let each = uris.iter().enumerate().map(|(number, uri)| async move {
        let authority = &uri.authority;
        let found = tokio::time::timeout(
            limit,
            tokio::net::lookup_host((authority.host.as_str(), authority.port)),
        )
        .await;
        match found {
            Ok(Ok(addresses)) => Ok(addresses
                .map(|address| Target { uri: number, address })
                .collect::<Vec<_>>()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("its name was not found within {limit:?}")),
        }
    });
    let mut targets = Vec::new();
    let mut unknown = None;
    for found in join_all(each).await {
        match found {
            Ok(found) => targets.extend(found),
            Err(error) => unknown = Some(error),
        }
    }
    targets.truncate(TARGETS_MAX);
    match unknown {
        Some(error) if targets.is_empty() => Err(BrokerError::Away(redact::outside(&error))),
        Some(_) | None => Ok(targets),
    }
}

/// Which addresses did not answer lately. Whoever has a copy of it shares what is known.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<Target, Instant>>>);

impl Memory {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<Target, Instant>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|_, since| since.elapsed() < REMEMBERED);
        kept
    }

    fn silent(&self, target: &Target) {
        self.kept().insert(*target, Instant::now());
    }

    fn answered(&self, target: &Target) {
        self.kept().remove(target);
    }

    /// An address is tried now. One that takes longer than `patience` need not be waited for: another may be faster.
    pub(super) fn dialing(&self, target: Target, patience: Duration) -> Dialing<'_> {
        Dialing {
            memory: self,
            target,
            patience,
            since: Instant::now(),
            is_over: false,
        }
    }

    /// A random order, in which those that did not answer lately come last: each node of a cluster has its share of workers, and
    /// nobody waits for a frozen one twice.
    pub(super) fn order(&self, targets: &[Target]) -> Vec<Target> {
        let silent = self.kept();
        race::order(targets.iter().copied(), |target| silent.contains_key(target))
    }
}

/// An address that is being tried. Whoever stops waiting for it has a faster one: it is remembered as silent then, as one that
/// failed is, unless it had no time to answer.
pub(super) struct Dialing<'a> {
    memory: &'a Memory,
    target: Target,
    patience: Duration,
    since: Instant,
    is_over: bool,
}

impl Dialing<'_> {
    pub(super) fn ended<T, E>(mut self, outcome: &Result<T, E>) {
        self.is_over = true;
        match outcome {
            Ok(_) => self.memory.answered(&self.target),
            Err(_) => self.memory.silent(&self.target),
        }
    }
}

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        if !self.is_over && self.since.elapsed() >= self.patience {
            self.memory.silent(&self.target);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_may_name_several_hosts() {
        for (text, expected) in [
            ("amqp://u:p@h/v", vec!["amqp://u:p@h/v"]),
            (
                "amqp://u:p@h1:5672,h2/v?heartbeat=3",
                vec!["amqp://u:p@h1:5672/v?heartbeat=3", "amqp://u:p@h2/v?heartbeat=3"],
            ),
            (
                "amqps://u:p,q@[::1]:5, [2001:db8::1]/v",
                vec!["amqps://u:p,q@[::1]:5/v", "amqps://u:p,q@[2001:db8::1]/v"],
            ),
            (
                "amqp://u:p@h1/v,amqps://u:p@h2,h3/v",
                vec!["amqp://u:p@h1/v", "amqps://u:p@h2/v", "amqps://u:p@h3/v"],
            ),
            ("amqp://h1,h2", vec!["amqp://h1", "amqp://h2"]),
            ("nonsense", vec!["nonsense"]),
        ] {
            assert_eq!(
                each(text),
                Ok(expected.into_iter().map(str::to_owned).collect()),
                "{text}"
            );
        }
        let many = format!("amqp://u:hunter2@{}/v", vec!["h"; 17].join(","));
        for text in ["amqp://u:hunter2@h1,/v", "amqp://u:hunter2@h1,,h2/v", many.as_str()] {
            let error = each(text).expect_err(text).to_string();
            assert!(
                !error.contains("hunter2") && error.starts_with("broker.url "),
                "{error}"
            );
        }
    }

    #[test]
    fn the_order_is_random_and_the_silent_come_last() {
        let memory = Memory::default();
        let targets = [0, 1, 2].map(|uri| Target {
            uri,
            address: ([127, 0, 0, 1], 5672).into(),
        });
        let mut firsts = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let mut order = memory.order(&targets);
            firsts.insert(order.first().copied());
            order.sort_unstable();
            assert_eq!(order, targets);
        }
        assert_eq!(firsts.len(), 3);
        memory.silent(&targets[1]);
        assert!((0..50).all(|_| memory.clone().order(&targets).last() == Some(&targets[1])));
        memory.answered(&targets[1]);
        assert!((0..200).any(|_| memory.order(&targets).first() == Some(&targets[1])));
        // How each try ended: refused; let in; not waited for, after it had its time and before.
        let is_silent = |target: &Target| memory.kept().contains_key(target);
        let (soon, never) = (Duration::ZERO, Duration::from_secs(3_600));
        memory.dialing(targets[0], never).ended(&Err::<(), ()>(()));
        assert!(is_silent(&targets[0]));
        memory.dialing(targets[0], soon).ended(&Ok::<(), ()>(()));
        assert!(!is_silent(&targets[0]));
        drop(memory.dialing(targets[0], never));
        assert!(!is_silent(&targets[0]));
        drop(memory.dialing(targets[0], soon));
        assert!(is_silent(&targets[0]));
    }
}
