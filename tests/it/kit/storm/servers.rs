//! What can be done to the servers: to PostgreSQL and its standby, to RabbitMQ and its nodes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Outcome, RECOVERY, Round, Step};
use crate::kit::support::until;

const NODES: [&str; 3] = ["rabbitmq", "rabbitmq2", "rabbitmq3"];
const QUEUE: &str = "settlement.updates";
/// An answer of the management API takes less.
const ANSWER: Duration = Duration::from_secs(10);

impl Round<'_> {
    pub(super) fn standby(&self) -> &'static str {
        match self.primary.get() {
            "postgres" => "standby",
            _ => "postgres",
        }
    }

    /// SIGKILL to one of our backends: the postmaster ends all the others, and recovers.
    pub(super) async fn backend_killed(&self, step: Step) -> Outcome {
        let db = self.place.db().await;
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name = 'settled' ORDER BY pid";
        let backends = db.query(sql, &[&self.place.name]).await.expect("backends");
        let Some(row) = backends.get(step.number(0, backends.len())) else {
            return Outcome::hit(0);
        };
        let kill = format!("kill -KILL {}", row.get::<_, i32>(0));
        let killed = std::process::Command::new("sh").args(["-c", &kill]).status();
        let hits = usize::from(killed.is_ok_and(|status| status.success()));
        // The postmaster notices within moments; until then the others answer as ever.
        until("the backends are gone", RECOVERY, async || {
            db.simple_query("").await.is_err().then_some(())
        })
        .await;
        let since = self.database_accepts().await;
        Outcome::recovers(hits, "PostgreSQL", since)
    }

    pub(super) async fn backends_ended(&self) -> Outcome {
        let db = self.place.db().await;
        let hits = self.end_backends(&db).await;
        Outcome::recovers(hits, "PostgreSQL", Instant::now())
    }

    /// One of the two PostgreSQL stops or is killed, and comes back.
    pub(super) async fn database_gone(&self, what: &'static str, name: &str, how: &str, step: Step) -> Outcome {
        if how == "kill" {
            self.private.kill(name).await;
            tokio::time::sleep(step.time(0, 0, 4_000)).await;
        }
        self.private.restart(name).await;
        let since = self.database_accepts().await;
        Outcome::recovers(1, what, since)
    }

    pub(super) async fn database_frozen(&self, what: &'static str, name: &str, step: Step) -> Outcome {
        self.private.act("freeze", &[name]).await;
        tokio::time::sleep(step.time(0, 100, 8_000)).await;
        self.private.act("thaw", &[name]).await;
        let since = self.database_accepts().await;
        Outcome::recovers(1, what, since)
    }

    /// The standby becomes the primary; who was it is made anew as its standby.
    pub(super) async fn promoted(&self, how: &str, step: Step) -> Outcome {
        let (old, new) = (self.primary.get(), self.standby());
        self.private.act(how, &[old]).await;
        // As long as somebody takes to notice and to decide.
        tokio::time::sleep(step.time(0, 0, 2_000)).await;
        self.private.act("promote", &[new]).await;
        self.primary.set(new);
        let since = self.database_accepts().await;
        self.settles_again(step.act).await;
        let took = since.elapsed();
        self.private.act("restart", &[old]).await;
        Outcome::took(1, "PostgreSQL's standby, promoted", took)
    }

    /// Nodes stop or are killed together, and come back together.
    pub(super) async fn broker_gone(&self, what: &'static str, names: &[&str], how: &str, step: Step) -> Outcome {
        if how == "kill" {
            self.private.act("kill", names).await;
            tokio::time::sleep(step.time(0, 0, 3_000)).await;
        }
        self.private.act("restart", names).await;
        let since = self.broker_accepts().await;
        Outcome::recovers(names.len(), what, since)
    }

    pub(super) async fn broker_frozen(&self, step: Step) -> Outcome {
        self.private.act("freeze", &["rabbitmq"]).await;
        tokio::time::sleep(step.time(0, 100, 8_000)).await;
        self.private.act("thaw", &["rabbitmq"]).await;
        let since = self.broker_accepts().await;
        Outcome::recovers(1, "RabbitMQ", since)
    }

    /// Asks the management API once it answers: a node that comes back takes its time with it.
    async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        until("the management API answers", RECOVERY, async || {
            let asked = self.place.services.try_manage(method, path, body.clone(), ANSWER);
            asked.await.ok().filter(|(status, _)| *status < 500)
        })
        .await
    }

    /// The connections of the workers that the broker's management knows, each by its name there.
    async fn connections(&self) -> Vec<String> {
        let path = format!("/api/vhosts/{}/connections", self.place.name);
        let (_, known) = self.ask("GET", &path, None).await;
        let known = known.as_array().cloned().unwrap_or_default();
        let is_ours = |connection: &&Value| {
            let name = connection["user_provided_name"].as_str();
            name.is_some_and(|name| name.starts_with('w'))
        };
        let ours = known.iter().filter(is_ours);
        ours.filter_map(|connection| connection["name"].as_str().map(str::to_owned))
            .collect()
    }

    /// An operator closes every connection of the workers.
    pub(super) async fn connections_closed(&self, what: &'static str) -> Outcome {
        // The management hears of them a moment later.
        let known = until("the management knows the workers' connections", RECOVERY, async || {
            let known = self.connections().await;
            (!known.is_empty()).then_some(known)
        })
        .await;
        let hits = self.close(&known).await;
        Outcome::recovers(hits, what, Instant::now())
    }

    async fn close(&self, connections: &[String]) -> usize {
        let mut closed = 0;
        for name in connections {
            let name = name.replace(' ', "%20").replace('>', "%3E").replace(':', "%3A");
            let (status, _) = self.ask("DELETE", &format!("/api/connections/{name}"), None).await;
            closed += usize::from(status == 204);
        }
        closed
    }

    /// The virtual host lets nobody in, and who is in must go.
    pub(super) async fn connection_limit(&self, step: Step) -> Outcome {
        let path = format!("/api/vhost-limits/{}/max-connections", self.place.name);
        let (status, answer) = self.ask("PUT", &path, Some(json!({"value": 0}))).await;
        assert_eq!(status, 204, "{answer}");
        let closed = self.close(&self.connections().await).await;
        tokio::time::sleep(step.time(0, 300, 3_000)).await;
        let (status, answer) = self.ask("DELETE", &path, None).await;
        assert_eq!(status, 204, "{answer}");
        let since = self.broker_accepts().await;
        Outcome::recovers(closed, "RabbitMQ", since)
    }

    pub(super) async fn alarm(&self, set: [&str; 2], clear: [&str; 2], step: Step) -> Outcome {
        self.private.rabbitmqctl(&set).await;
        tokio::time::sleep(step.time(0, 300, 2_500)).await;
        self.private.rabbitmqctl(&clear).await;
        let since = self.broker_accepts().await;
        Outcome::recovers(1, "RabbitMQ, after an alarm", since)
    }

    /// What the cluster's management says of the queue.
    async fn queue(&self) -> Value {
        let path = format!("/api/queues/{}/{QUEUE}", self.place.name);
        self.ask("GET", &path, None).await.1
    }

    /// The node that leads the queue.
    async fn leader(&self) -> &'static str {
        let leader = until("the queue has a leader", RECOVERY, async || {
            let queue = self.queue().await;
            queue["leader"].as_str().map(str::to_owned)
        })
        .await;
        let name = leader.split('@').next().unwrap_or_default();
        match name.rsplit('-').next() {
            Some("2") => NODES[1],
            Some("3") => NODES[2],
            Some(_) | None => NODES[0],
        }
    }

    /// All three are members of the queue again.
    async fn all_online(&self) {
        until("every node is a member of the queue", RECOVERY, async || {
            let queue = self.queue().await;
            let online = queue["online"].as_array().map_or(0, Vec::len);
            (online == NODES.len()).then_some(())
        })
        .await;
    }

    /// Settles again while it is still gone, then comes back. Timed from the fault: the others are there all the time.
    async fn without(&self, step: Step, since: Instant) -> Duration {
        self.settles_again(step.act).await;
        since.elapsed()
    }

    pub(super) async fn leader_killed(&self, step: Step) -> Outcome {
        let leader = self.leader().await;
        let since = Instant::now();
        self.private.kill(leader).await;
        let took = self.without(step, since).await;
        self.private.restart(leader).await;
        self.all_online().await;
        Outcome::took(1, "RabbitMQ's leader killed (from the kill)", took)
    }

    pub(super) async fn node_frozen(&self, step: Step) -> Outcome {
        let node = match step.number(1, 2) {
            0 => self.leader().await,
            _ => NODES[step.number(2, NODES.len())],
        };
        let since = Instant::now();
        self.private.act("freeze", &[node]).await;
        let took = self.without(step, since).await;
        tokio::time::sleep(step.time(0, 0, 20_000)).await;
        self.private.act("thaw", &[node]).await;
        self.all_online().await;
        Outcome::took(1, "RabbitMQ's node frozen (from then)", took)
    }

    pub(super) async fn rolling_restart(&self) -> Outcome {
        for node in NODES {
            self.private.restart(node).await;
            self.all_online().await;
        }
        Outcome::recovers(NODES.len(), "RabbitMQ, restarted node by node", Instant::now())
    }

    pub(super) async fn two_of_three_gone(&self, step: Step) -> Outcome {
        let left = NODES[step.number(1, NODES.len())];
        let gone: Vec<&str> = NODES.into_iter().filter(|node| *node != left).collect();
        let outcome = self
            .broker_gone("RabbitMQ, with its majority back", &gone, "kill", step)
            .await;
        self.all_online().await;
        outcome
    }

    /// The third node hears nothing of the others, and they nothing of it.
    pub(super) async fn node_partitioned(&self, step: Step) -> Outcome {
        let apart = NODES[1 + step.number(1, 2)];
        let others = self.others_of(apart).await;
        let since = Instant::now();
        let cut: String = others
            .iter()
            .map(|node| format!("erlang:set_cookie('{node}', apart), erlang:disconnect_node('{node}'), "))
            .collect();
        self.private.rabbitmqctl(&[apart, "eval", &format!("{cut} ok.")]).await;
        let took = self.without(step, since).await;
        tokio::time::sleep(step.time(0, 1_000, 8_000)).await;
        let heal: String = others
            .iter()
            .map(|node| format!("erlang:set_cookie('{node}', erlang:get_cookie()), net_adm:ping('{node}'), "))
            .collect();
        self.private.rabbitmqctl(&[apart, "eval", &format!("{heal} ok.")]).await;
        self.all_online().await;
        Outcome::took(1, "RabbitMQ's node partitioned (from then)", took)
    }

    /// The other nodes, as they call each other.
    async fn others_of(&self, name: &str) -> Vec<String> {
        let (_, nodes) = self.ask("GET", "/api/nodes", None).await;
        let nodes = nodes.as_array().cloned().unwrap_or_default();
        let names: Vec<String> = nodes
            .iter()
            .filter_map(|node| node["name"].as_str().map(str::to_owned))
            .collect();
        let number = name.trim_start_matches("rabbitmq");
        let is_it = |node: &&String| {
            let short = node.split('@').next().unwrap_or_default();
            short.ends_with(&format!("-{number}"))
        };
        names.iter().filter(|node| !is_it(node)).cloned().collect()
    }
}
