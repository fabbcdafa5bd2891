//! What can be done to a line: to its workers, on its wires, to what it is sent, and to what it knows of its partners.

use std::time::{Duration, Instant};

use super::{Outcome, Round, Shape, Step, sent, try_connect};
use crate::kit::{
    amqp::{Line, Message},
    auditor::{Expect, Sent},
    partner::{Partner, new_key},
    proxy::{At, Proxy, Then, Trap, Way, looks},
    raw::{DELIVERY_MODE, MESSAGE_ID, Raw, UNDECODABLE, short},
    support::{each_host, until},
    traffic::Dice,
};

/// One bad thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Act {
    WorkerKilled,
    WorkerStopped,
    WorkerFrozen,
    DatabaseWireCut,
    DatabaseWireRefused,
    DatabaseWireStalled,
    DatabaseWireSlow,
    DatabaseWireBytewise,
    DatabaseWireTrap,
    BrokerWireCut,
    BrokerWireRefused,
    BrokerWireStalled,
    BrokerWireSlow,
    BrokerWireBytewise,
    BrokerWireTrap,
    BackendKilled,
    BackendsEnded,
    PostgresKilled,
    PostgresRestarted,
    PostgresFrozen,
    PostgresFull,
    BrokerKilled,
    BrokerRestarted,
    BrokerFrozen,
    BrokerConnectionsClosed,
    BrokerConnectionLimit,
    MemoryAlarm,
    DiskAlarm,
    TableLocked,
    RowsLocked,
    Duplicates,
    Poison,
    KeyRotated,
    KeyRevoked,
    PartnerSuspended,
    PartnerRenamed,
    LeaderKilled,
    NodeFrozen,
    RollingRestart,
    TwoOfThreeGone,
    NodePartitioned,
    StandbyKilled,
    StandbyFrozen,
    PrimaryKilledStandbyPromoted,
    PrimaryFrozenStandbyPromoted,
}

/// Where an act can be done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Any,
    OneNode,
    Nodes,
    Standby,
}

impl Act {
    /// Each with what it is called, how often it is drawn beside the others, and where.
    const ALL: [(Act, &'static str, usize, On); 45] = [
        (Act::WorkerKilled, "worker SIGKILL", 12, On::Any),
        (Act::WorkerStopped, "worker SIGTERM", 5, On::Any),
        (Act::WorkerFrozen, "worker SIGSTOP", 4, On::Any),
        (Act::DatabaseWireCut, "database wire: cut", 10, On::Any),
        (Act::DatabaseWireRefused, "database wire: refused", 5, On::Any),
        (Act::DatabaseWireStalled, "database wire: stalled", 4, On::Any),
        (Act::DatabaseWireSlow, "database wire: slow", 4, On::Any),
        (Act::DatabaseWireBytewise, "database wire: byte by byte", 3, On::Any),
        (Act::DatabaseWireTrap, "database wire: trap in a frame", 20, On::Any),
        (Act::BrokerWireCut, "broker wire: cut", 10, On::Any),
        (Act::BrokerWireRefused, "broker wire: refused", 5, On::Any),
        (Act::BrokerWireStalled, "broker wire: stalled", 4, On::Any),
        (Act::BrokerWireSlow, "broker wire: slow", 4, On::Any),
        (Act::BrokerWireBytewise, "broker wire: byte by byte", 3, On::Any),
        (Act::BrokerWireTrap, "broker wire: trap in a frame", 20, On::Any),
        (Act::BackendKilled, "PostgreSQL backend SIGKILL", 5, On::Any),
        (
            Act::BackendsEnded,
            "PostgreSQL connections ended by an operator",
            8,
            On::Any,
        ),
        (Act::PostgresKilled, "PostgreSQL SIGKILL", 3, On::Any),
        (Act::PostgresRestarted, "PostgreSQL restarted", 2, On::Any),
        (Act::PostgresFrozen, "PostgreSQL SIGSTOP", 3, On::Any),
        (Act::PostgresFull, "PostgreSQL out of connections", 1, On::Any),
        (Act::BrokerKilled, "RabbitMQ SIGKILL", 2, On::OneNode),
        (Act::BrokerRestarted, "RabbitMQ restarted", 1, On::OneNode),
        (Act::BrokerFrozen, "RabbitMQ SIGSTOP", 3, On::OneNode),
        (
            Act::BrokerConnectionsClosed,
            "RabbitMQ connections closed by an operator",
            8,
            On::Any,
        ),
        (Act::BrokerConnectionLimit, "RabbitMQ connection limit", 2, On::Any),
        (Act::MemoryAlarm, "RabbitMQ memory alarm", 2, On::Any),
        (Act::DiskAlarm, "RabbitMQ disk alarm", 2, On::Any),
        (Act::TableLocked, "table locked", 4, On::Any),
        (Act::RowsLocked, "rows locked", 4, On::Any),
        (Act::Duplicates, "duplicates, out of order", 8, On::Any),
        (Act::Poison, "poison", 5, On::Any),
        (Act::KeyRotated, "key rotated", 3, On::Any),
        (Act::KeyRevoked, "key revoked", 3, On::Any),
        (Act::PartnerSuspended, "partner suspended", 3, On::Any),
        (Act::PartnerRenamed, "partner renamed", 2, On::Any),
        (Act::LeaderKilled, "leader of the queue SIGKILL", 6, On::Nodes),
        (Act::NodeFrozen, "node SIGSTOP", 5, On::Nodes),
        (Act::RollingRestart, "rolling restart of the nodes", 1, On::Nodes),
        (Act::TwoOfThreeGone, "two of three nodes gone", 2, On::Nodes),
        (Act::NodePartitioned, "node partitioned", 2, On::Nodes),
        (Act::StandbyKilled, "standby SIGKILL", 4, On::Standby),
        (Act::StandbyFrozen, "standby SIGSTOP", 3, On::Standby),
        (
            Act::PrimaryKilledStandbyPromoted,
            "primary SIGKILL, standby promoted",
            4,
            On::Standby,
        ),
        (
            Act::PrimaryFrozenStandbyPromoted,
            "primary SIGSTOP, standby promoted",
            3,
            On::Standby,
        ),
    ];

    pub(crate) fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(act, ..)| *act == self);
        found.map_or("?", |(_, name, ..)| *name)
    }

    /// Those that can be done there, each as often as it is to be drawn.
    pub(crate) fn on(shape: Shape) -> Vec<Act> {
        let fits = |on: On| match on {
            On::Any => true,
            On::OneNode => !shape.is_cluster(),
            On::Nodes => shape.is_cluster(),
            On::Standby => shape.has_standby(),
        };
        let acts = Self::ALL.iter().filter(|(.., on)| fits(*on));
        acts.flat_map(|(act, _, weight, _)| std::iter::repeat_n(*act, *weight))
            .collect()
    }

    /// After those the next one waits until all is well.
    pub(super) fn is_heavy(self) -> bool {
        match self {
            Act::PostgresKilled
            | Act::PostgresRestarted
            | Act::PostgresFull
            | Act::BrokerKilled
            | Act::BrokerRestarted
            | Act::BrokerConnectionLimit
            | Act::MemoryAlarm
            | Act::DiskAlarm
            | Act::LeaderKilled
            | Act::NodeFrozen
            | Act::RollingRestart
            | Act::TwoOfThreeGone
            | Act::NodePartitioned
            | Act::StandbyKilled
            | Act::StandbyFrozen
            | Act::PrimaryKilledStandbyPromoted
            | Act::PrimaryFrozenStandbyPromoted => true,
            Act::WorkerKilled
            | Act::WorkerStopped
            | Act::WorkerFrozen
            | Act::DatabaseWireCut
            | Act::DatabaseWireRefused
            | Act::DatabaseWireStalled
            | Act::DatabaseWireSlow
            | Act::DatabaseWireBytewise
            | Act::DatabaseWireTrap
            | Act::BrokerWireCut
            | Act::BrokerWireRefused
            | Act::BrokerWireStalled
            | Act::BrokerWireSlow
            | Act::BrokerWireBytewise
            | Act::BrokerWireTrap
            | Act::BackendKilled
            | Act::BackendsEnded
            | Act::PostgresFrozen
            | Act::BrokerFrozen
            | Act::BrokerConnectionsClosed
            | Act::TableLocked
            | Act::RowsLocked
            | Act::Duplicates
            | Act::Poison
            | Act::KeyRotated
            | Act::KeyRevoked
            | Act::PartnerSuspended
            | Act::PartnerRenamed => false,
        }
    }
}

const DATABASE: &str = "PostgreSQL";
const BROKER: &str = "RabbitMQ";
const DATABASE_WIRE: &str = "database wire";
const BROKER_WIRE: &str = "broker wire";

impl Round<'_> {
    pub(super) async fn act(&self, step: Step) -> Outcome {
        match step.act {
            Act::WorkerKilled => self.worker_ends(step, true).await,
            Act::WorkerStopped => self.worker_ends(step, false).await,
            Act::WorkerFrozen => self.worker_freezes(step).await,
            Act::DatabaseWireCut => self.cut(&self.database, DATABASE_WIRE),
            Act::DatabaseWireRefused => self.hold(&self.database, DATABASE_WIRE, Proxy::refuse, step).await,
            Act::DatabaseWireStalled => self.hold(&self.database, DATABASE_WIRE, Proxy::stall, step).await,
            Act::DatabaseWireSlow => self.slow(&self.database, DATABASE_WIRE, step).await,
            Act::DatabaseWireBytewise => self.hold(&self.database, DATABASE_WIRE, Proxy::bytewise, step).await,
            Act::DatabaseWireTrap => self.trap(&self.database, DATABASE_WIRE, &DATABASE_TRAPS, step).await,
            Act::BrokerWireCut => self.cut(&self.broker, BROKER_WIRE),
            Act::BrokerWireRefused => self.hold(&self.broker, BROKER_WIRE, Proxy::refuse, step).await,
            Act::BrokerWireStalled => self.hold(&self.broker, BROKER_WIRE, Proxy::stall, step).await,
            Act::BrokerWireSlow => self.slow(&self.broker, BROKER_WIRE, step).await,
            Act::BrokerWireBytewise => self.hold(&self.broker, BROKER_WIRE, Proxy::bytewise, step).await,
            Act::BrokerWireTrap => self.trap(&self.broker, BROKER_WIRE, &BROKER_TRAPS, step).await,
            Act::BackendKilled => self.backend_killed(step).await,
            Act::BackendsEnded => self.backends_ended().await,
            Act::PostgresKilled => self.database_gone(DATABASE, self.primary.get(), "kill", step).await,
            Act::PostgresRestarted => self.database_gone(DATABASE, self.primary.get(), "", step).await,
            Act::PostgresFrozen => self.database_frozen(DATABASE, self.primary.get(), step).await,
            Act::PostgresFull => self.database_full(step).await,
            Act::BrokerKilled => self.broker_gone(BROKER, &["rabbitmq"], "kill", step).await,
            Act::BrokerRestarted => self.broker_gone(BROKER, &["rabbitmq"], "", step).await,
            Act::BrokerFrozen => self.broker_frozen(step).await,
            Act::BrokerConnectionsClosed => self.connections_closed(BROKER).await,
            Act::BrokerConnectionLimit => self.connection_limit(step).await,
            Act::MemoryAlarm => {
                let set = ["set_vm_memory_high_watermark", "0"];
                self.alarm(set, ["set_vm_memory_high_watermark", "0.4"], step).await
            }
            Act::DiskAlarm => {
                let set = ["set_disk_free_limit", "1000000000000000"];
                self.alarm(set, ["set_disk_free_limit", "64000000"], step).await
            }
            Act::TableLocked => self.locked("LOCK TABLE settled.batches", step).await,
            Act::RowsLocked => {
                let rows = "SELECT FROM settled.allocations WHERE status = 'reserved' ORDER BY id LIMIT 200 FOR UPDATE";
                self.locked(rows, step).await
            }
            Act::Duplicates => self.duplicates(step).await,
            Act::Poison => self.poison(step).await,
            Act::KeyRotated => self.key_rotated().await,
            Act::KeyRevoked => self.key_revoked().await,
            Act::PartnerSuspended => self.partner_suspended().await,
            Act::PartnerRenamed => self.partner_renamed(step).await,
            Act::LeaderKilled => self.leader_killed(step).await,
            Act::NodeFrozen => self.node_frozen(step).await,
            Act::RollingRestart => self.rolling_restart().await,
            Act::TwoOfThreeGone => self.two_of_three_gone(step).await,
            Act::NodePartitioned => self.node_partitioned(step).await,
            Act::StandbyKilled => self.database_gone("a standby", self.standby(), "kill", step).await,
            Act::StandbyFrozen => self.database_frozen("a standby", self.standby(), step).await,
            Act::PrimaryKilledStandbyPromoted => self.promoted("kill", step).await,
            Act::PrimaryFrozenStandbyPromoted => self.promoted("freeze", step).await,
        }
    }

    async fn worker_ends(&self, step: Step, is_killed: bool) -> Outcome {
        let worker = {
            let mut workers = self.workers.borrow_mut();
            let number = step.number(0, workers.len());
            workers.remove(number)
        };
        if is_killed {
            worker.kill().await;
        } else {
            let status = worker.terminate().await;
            assert_eq!(
                status.code(),
                Some(0),
                "SIGTERM ends the worker in order: {}",
                worker.said()
            );
        }
        drop(worker);
        let since = Instant::now();
        let next = self.start_worker();
        self.workers.borrow_mut().push(next);
        if step.number(1, 2) == 0 {
            return Outcome::hit(1);
        }
        self.all_ready().await;
        Outcome::took(1, "a worker anew, from its start until it is ready", since.elapsed())
    }

    async fn worker_freezes(&self, step: Step) -> Outcome {
        let number = step.number(0, self.workers.borrow().len());
        let tell = |name: &str| {
            let workers = self.workers.borrow();
            workers.get(number).expect("a worker").signal(name);
        };
        tell("STOP");
        tokio::time::sleep(step.time(1, 100, 6_000)).await;
        tell("CONT");
        let since = Instant::now();
        self.all_ready().await;
        Outcome::took(1, "a worker that was frozen, until it is ready", since.elapsed())
    }

    fn injected(proxies: &[Proxy]) -> usize {
        proxies.iter().map(Proxy::injected).sum()
    }

    fn cut(&self, proxies: &[Proxy], what: &'static str) -> Outcome {
        // Whoever counts them does so a moment later.
        proxies.iter().for_each(Proxy::cut);
        Outcome::recovers(1, what, Instant::now())
    }

    /// On every way at once, for a while.
    async fn hold(&self, proxies: &[Proxy], what: &'static str, how: fn(&Proxy), step: Step) -> Outcome {
        let before = Self::injected(proxies);
        proxies.iter().for_each(how);
        tokio::time::sleep(step.time(0, 50, 3_000)).await;
        proxies.iter().for_each(Proxy::open);
        Outcome::recovers(Self::injected(proxies) - before, what, Instant::now())
    }

    async fn slow(&self, proxies: &[Proxy], what: &'static str, step: Step) -> Outcome {
        let before = Self::injected(proxies);
        for proxy in proxies {
            proxy.slow(step.time(0, 1, 20));
        }
        tokio::time::sleep(step.time(1, 50, 1_500)).await;
        proxies.iter().for_each(Proxy::open);
        Outcome::recovers(Self::injected(proxies) - before, what, Instant::now())
    }

    /// Waits for the next frame that looks so, on one of the ways.
    async fn trap(&self, proxies: &[Proxy], what: &'static str, traps: &[(Way, Looks, Then)], step: Step) -> Outcome {
        const PATIENCE: Duration = Duration::from_secs(3);
        let before = Self::injected(proxies);
        let (way, looks_so, then) = traps.get(step.number(0, traps.len())).copied().expect("a trap");
        let at = match looks_so {
            Some(looks_so) => At::Frame(looks_so, 1 + step.number(1, 6)),
            None => At::Byte(1 + step.number(1, 12_000)),
        };
        for proxy in proxies {
            proxy.set_trap(Trap { way, at, then });
        }
        let began = Instant::now();
        while Self::injected(proxies) == before && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let hits = Self::injected(proxies) - before;
        match then {
            Then::Cut | Then::CutInside => Outcome::recovers(hits, what, Instant::now()),
            // Nobody is told: it is noticed by the silence.
            Then::Silence => Outcome::hit(hits),
        }
    }

    /// A transaction of an operator's that stays open.
    async fn locked(&self, statement: &str, step: Step) -> Outcome {
        let db = self.place.db().await;
        let sql = format!("BEGIN; SET LOCAL lock_timeout = '20s'; {statement}");
        let hits = usize::from(db.batch_execute(&sql).await.is_ok());
        tokio::time::sleep(step.time(0, 100, 3_000)).await;
        // Who had no lock has nothing to let go.
        drop(db.batch_execute("ROLLBACK").await);
        Outcome::recovers(hits, "a lock", Instant::now())
    }

    /// Says again what was said, in another order.
    async fn duplicates(&self, step: Step) -> Outcome {
        let mut again: Vec<Message> = {
            let story = self.place.story();
            let sent = story.sent.iter().filter(|sent| sent.expect == Expect::Settles);
            let sent: Vec<&Sent> = sent.collect();
            let first = step.number(0, sent.len());
            let some = sent.iter().cycle().skip(first).step_by(7).take(40.min(sent.len()));
            some.map(|sent| Message::new(&sent.routing_key, sent.body.clone(), sent.expect))
                .collect()
        };
        again.reverse();
        self.place.publish(&again).await;
        Outcome::hit(again.len())
    }

    async fn poison(&self, step: Step) -> Outcome {
        let body = format!("poison {}", uuid::Uuid::new_v4());
        let key = "acme.allocation.update";
        self.place.story().sent.push(Sent {
            routing_key: key.to_owned(),
            body: body.clone().into_bytes(),
            expect: Expect::Refused("malformed_message"),
        });
        let urls = each_host(&self.place.broker_url);
        let url = urls.get(step.number(0, urls.len())).expect("a host");
        let properties = [&[2], short(UNDECODABLE).as_slice()].concat();
        let mut raw = Raw::open(url).await;
        raw.publish(
            "settlement.updates",
            key,
            DELIVERY_MODE | MESSAGE_ID,
            &properties,
            body.as_bytes(),
        )
        .await;
        Outcome::hit(1)
    }

    /// Messages of the partner whose keys change: some may settle, some not.
    async fn moody_says(&self, partners: &[&Partner]) {
        let mut messages = Vec::new();
        for partner in partners {
            let reservations: Vec<_> = {
                let mut all = self.of_moody.borrow_mut();
                let left = all.len().saturating_sub(5);
                all.split_off(left)
            };
            let drafts = reservations
                .iter()
                .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any));
            messages.extend(drafts);
        }
        self.place.publish(&messages).await;
    }

    async fn key_rotated(&self) -> Outcome {
        let old = self.moody.borrow().clone();
        let new = Partner {
            key: new_key(),
            ..old.clone()
        };
        let key = new.public_key();
        self.place.story().keys.push((new.enterprise.clone(), key.clone()));
        self.moody_says(&[&old]).await;
        let rotate = [
            "key",
            "rotate",
            "--enterprise-id",
            &new.enterprise,
            "--public-key",
            &key,
        ];
        self.place.json(&[&rotate[..], &["--grace", "0s"]].concat()).await;
        self.moody_says(&[&old, &new]).await;
        *self.moody.borrow_mut() = new;
        Outcome::hit(1)
    }

    async fn key_revoked(&self) -> Outcome {
        let old = self.moody.borrow().clone();
        let new = Partner {
            key: new_key(),
            ..old.clone()
        };
        self.moody_says(&[&old]).await;
        let key = old.public_key();
        let revoke = [
            "key",
            "revoke",
            "--enterprise-id",
            &old.enterprise,
            "--public-key",
            &key,
        ];
        self.place.json(&revoke).await;
        self.moody_says(&[&old]).await;
        self.place.add_key(&new).await;
        self.moody_says(&[&new]).await;
        *self.moody.borrow_mut() = new;
        Outcome::hit(1)
    }

    async fn partner_suspended(&self) -> Outcome {
        let partner = self.moody.borrow().clone();
        let tell = async |act: &str| {
            self.place
                .json(&["partner", act, "--enterprise-id", &partner.enterprise])
                .await;
        };
        tell("suspend").await;
        self.moody_says(&[&partner]).await;
        tell("resume").await;
        self.moody_says(&[&partner]).await;
        Outcome::hit(1)
    }

    async fn partner_renamed(&self, step: Step) -> Outcome {
        let enterprise = self.moody.borrow().enterprise.clone();
        let name = format!("Moody {}", step.number(0, 1_000));
        self.place
            .json(&["partner", "set", "--enterprise-id", &enterprise, "--name", &name])
            .await;
        Outcome::hit(1)
    }

    /// Every connection that the database has to give is somebody else's.
    async fn database_full(&self, step: Step) -> Outcome {
        let db = self.place.db().await;
        let most = db.query_one("SHOW max_connections", &[]).await.expect("a number");
        let most: usize = most.get::<_, String>(0).parse().expect("a number");
        let url = &self.place.services.database;
        let mut taken = futures_util::future::join_all((0..most).map(|_| try_connect(url))).await;
        taken.retain(Option::is_some);
        self.end_backends(&db).await;
        tokio::time::sleep(step.time(0, 500, 2_500)).await;
        let hits = taken.len();
        drop(taken);
        let since = self.database_accepts().await;
        Outcome::recovers(hits, DATABASE, since)
    }

    /// A canary of the database's own.
    pub(super) async fn database_accepts(&self) -> Instant {
        let url = &self.place.services.database;
        until("the database takes a commit", super::RECOVERY, async || {
            let client = try_connect(url).await?;
            let write = client.batch_execute("SELECT pg_logical_emit_message(true, 'probe', '')");
            let written = tokio::time::timeout(Duration::from_secs(1), write).await;
            written.is_ok_and(|done| done.is_ok()).then(Instant::now)
        })
        .await
    }

    /// A message on its way to settle, once the broker takes one.
    pub(super) async fn broker_accepts(&self) -> Instant {
        let message = self.one_spare();
        self.place.story().sent.push(sent(&message));
        let line = Line::open(&self.place.broker_url).await;
        line.publish(&[message]).await;
        Instant::now()
    }

    pub(super) async fn end_backends(&self, db: &tokio_postgres::Client) -> usize {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = $1 AND application_name = 'settled'";
        let ended = db.query_one(sql, &[&self.place.name]).await;
        ended.map_or(0, |row| row.get::<_, i64>(0).unsigned_abs() as usize)
    }
}

type Looks = Option<fn(&[u8]) -> bool>;

const DATABASE_TRAPS: [(Way, Looks, Then); 9] = [
    (Way::ToServer, None, Then::Cut),
    (Way::ToClient, None, Then::Cut),
    (Way::ToServer, Some(looks::any), Then::CutInside),
    (Way::ToClient, Some(looks::any), Then::CutInside),
    (Way::ToServer, Some(looks::commit), Then::Cut),
    (Way::ToServer, Some(looks::commit), Then::CutInside),
    (Way::ToClient, Some(looks::committed), Then::Cut),
    (Way::ToClient, Some(looks::committed), Then::Silence),
    (Way::ToServer, None, Then::Silence),
];

const BROKER_TRAPS: [(Way, Looks, Then); 10] = [
    (Way::ToServer, None, Then::Cut),
    (Way::ToClient, None, Then::Cut),
    (Way::ToClient, Some(looks::deliver), Then::Cut),
    (Way::ToServer, Some(looks::ack), Then::Cut),
    (Way::ToServer, Some(looks::ack), Then::Silence),
    (Way::ToServer, Some(looks::publish), Then::Cut),
    (Way::ToServer, Some(looks::body), Then::CutInside),
    (Way::ToClient, Some(looks::ack), Then::Cut),
    (Way::ToClient, Some(looks::ack), Then::Silence),
    (Way::ToServer, None, Then::Silence),
];

/// So many steps of a kind that fits, drawn from a seed.
pub(crate) fn schedule(shape: Shape, seed: u64, only: Option<&str>) -> impl Iterator<Item = Step> + use<> {
    let mut acts = Act::on(shape);
    if let Some(only) = only {
        acts.retain(|act| act.name().contains(only));
    }
    assert!(!acts.is_empty(), "no act that can be done here is called so: {only:?}");
    let mut dice = Dice::new(seed);
    std::iter::repeat_with(move || {
        let act = acts.get(dice.below(acts.len())).copied().expect("an act");
        Step::draw(act, &mut dice)
    })
}
