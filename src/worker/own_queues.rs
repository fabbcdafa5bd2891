//! Partners' own input queues: which of them are consumed, and until when.

use std::collections::{BTreeMap, BTreeSet};

use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
};

use super::{Worker, lane::lane};
use crate::{
    broker::{Connection, own_queue, topology},
    retry::{self, Waited},
    telemetry::Signal,
};

/// What is known of a partner's own queue.
enum State {
    /// A lane consumes it, until this says so.
    Served(watch::Sender<bool>),
    /// There are more than are consumed.
    Unserved,
    /// It is nobody's own any more, and no lane consumes it; something may have come back to it.
    Left,
}

impl Worker {
    /// A lane for each partner's own queue: consumer, publisher and their connections are its own, so that a partner whose
    /// messages break connections breaks nobody else's, and a backlog of one partner's is nobody else's wait. What the lanes
    /// share is the pool of database connections, the gate and the count of culprits: a batch that can not be settled closes
    /// intake for every lane, whoever sent it.
    ///
    /// A queue that is nobody's own any more is consumed until nothing is left in it, and then let go, so that it can be
    /// deleted.
    pub(super) async fn serve_own_queues(mut self) {
        let mut own = OwnQueues {
            worker: self.clone(),
            lanes: JoinSet::new(),
            states: BTreeMap::new(),
            // In logs these come after the lanes of the common queue, the second intake and the collector.
            number: self.settings.worker.lanes + 1,
        };
        let mut stop = self.stop.clone();
        loop {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                () = Box::pin(own.look()) => {}
            }
            tokio::select! {
                Some(ended) = own.lanes.join_next() => own.ended(ended),
                waited = retry::sleep(self.settings.worker.own_queue_poll, &mut self.stop) => match waited {
                    Waited::Over => {}
                    Waited::Stopping => break,
                },
            }
        }
        for state in own.states.values() {
            if let State::Served(stop) = state {
                stop.send_replace(true);
            }
        }
        while let Some(ended) = own.lanes.join_next().await {
            own.ended(ended);
        }
    }
}

/// The queues, and the lanes that consume them.
struct OwnQueues {
    worker: Worker,
    /// Each tells whose it was when it ends.
    lanes: JoinSet<String>,
    states: BTreeMap<String, State>,
    number: usize,
}

impl OwnQueues {
    /// Looks at the registry once. A database that is away is the lanes' to tell; the next look finds what this one missed.
    async fn look(&mut self) {
        let Ok(registered) = self.worker.clerk.store.own_queues().await else {
            return;
        };
        for enterprise_id in &registered {
            match self.states.get(enterprise_id) {
                Some(State::Served(_) | State::Unserved) => {}
                Some(State::Left) | None => {
                    if !self.begin(enterprise_id) {
                        let queue = topology::own_queue(enterprise_id);
                        let most = self.worker.settings.worker.own_queues_max;
                        Signal::OwnQueueUnserved { queue: &queue, most }.emit();
                        self.states.insert(enterprise_id.clone(), State::Unserved);
                    }
                }
            }
        }
        let registered: BTreeSet<&String> = registered.iter().collect();
        let gone: Vec<String> = self
            .states
            .keys()
            .filter(|name| !registered.contains(name))
            .cloned()
            .collect();
        if !gone.is_empty() {
            self.let_go(gone).await;
        }
    }

    /// Begins a lane that ends when it is told to. False if there are as many as there may be.
    fn begin(&mut self, enterprise_id: &str) -> bool {
        if self.lanes.len() >= self.worker.settings.worker.own_queues_max {
            return false;
        }
        self.number += 1;
        let (stop, stopped) = watch::channel(false);
        let worker = Worker {
            stop: stopped,
            ..self.worker.clone()
        };
        let (number, queue) = (self.number, topology::own_queue(enterprise_id));
        let whose = enterprise_id.to_owned();
        self.states.insert(whose.clone(), State::Served(stop));
        let lane = Box::pin(lane(worker, number, queue));
        self.lanes.spawn(async move {
            lane.await;
            whose
        });
        true
    }

    /// Better no worker than half a one.
    fn ended(&mut self, ended: Result<String, JoinError>) {
        match ended {
            Ok(enterprise_id) => {
                self.states.insert(enterprise_id, State::Left);
            }
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {}
        }
    }

    /// Looks at queues that are nobody's own any more. While something is in one its lane goes on, or begins again; then it
    /// ends in order, and settles what it holds.
    async fn let_go(&mut self, gone: Vec<String>) {
        let name = format!("{} own queues", self.worker.settings.worker.name);
        let Ok(connection) = Connection::open_without_consumer(&self.worker.broker, &name).await else {
            return;
        };
        for enterprise_id in gone {
            let is_empty = match own_queue::held(&connection, &enterprise_id).await {
                Ok(held) => held.is_none_or(|held| held.ready == 0),
                Err(_) => continue,
            };
            match (self.states.get(&enterprise_id), is_empty) {
                (Some(State::Served(stop)), true) => {
                    stop.send_replace(true);
                }
                (Some(State::Served(_)), false) => {}
                (Some(State::Unserved | State::Left) | None, true) => {
                    self.states.remove(&enterprise_id);
                }
                (Some(State::Unserved | State::Left) | None, false) => {
                    self.begin(&enterprise_id);
                }
            }
        }
        drop(connection.close().await);
    }
}
