//! Fail points: where a test may kill the process, make it panic, break a dependency or hold it up. Compiled to nothing
//! without the feature `faults`.
//!
//! `SETTLED_FAULT=NAME:N:ACTION` acts at the Nth passing of NAME, once; several are separated by commas. ACTION is `kill`
//! (SIGKILL, and so without the word as well), `panic`, `error` (what the room would meet if its connection broke there)
//! or `delay=500ms`. Each one that acts says so first, in a line of its own on stderr: `{"fault":"after_load:3:kill"}`.

#[cfg(feature = "faults")]
pub use armed::{Action, Fault, parse};

/// What `error` means at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The connection to the database breaks.
    Database,
    /// The connection to the broker breaks.
    Broker,
    /// Nothing can fail there, and why.
    Nothing(&'static str),
}

use OnError::{Broker, Database, Nothing};

/// One line a point, in the order of the walk: the tests take them from here.
macro_rules! points {
    ($($(#[$about:meta])+ $point:ident = $name:literal: $on_error:expr;)+) => {
        /// The named places of the walk.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$about])+ $point),+
        }

        impl Point {
            /// Every point, in the order of the walk.
            pub const ALL: &[Point] = &[$(Point::$point),+];

            /// Its name in `SETTLED_FAULT`.
            pub const fn name(self) -> &'static str {
                match self { $(Point::$point => $name),+ }
            }

            /// Whether it is passed only where dead letters are collected or replayed.
            pub const fn is_of_the_desk(self) -> bool {
                matches!(
                    self,
                    Point::CollectorReceived
                        | Point::DeadLettersFiled
                        | Point::CollectorCommitted
                        | Point::CollectorAcked
                        | Point::ReplayClaimed
                        | Point::ReplayJudged
                        | Point::ReplayCommitted
                )
            }

            /// Whether it is passed only where messages are held.
            pub const fn is_of_the_side_room(self) -> bool {
                matches!(self, Point::Held | Point::HeldClaimed | Point::HeldLeft)
            }

            /// Whether it is passed only where a partner moves to another cell.
            pub const fn is_of_a_move(self) -> bool {
                matches!(
                    self,
                    Point::MovePaused
                        | Point::MoveDrained
                        | Point::MoveCopied
                        | Point::MoveArrived
                        | Point::MoveLeft
                        | Point::MoveResumed
                        | Point::MoveHandedOver
                        | Point::MoveDone
                        | Point::MoveVoided
                )
            }

            /// What `error` means there.
            pub const fn on_error(self) -> OnError {
                match self { $(Point::$point => $on_error),+ }
            }
        }
    };
}

points! {
    /// A batch was taken from the consumer.
    AfterReceive = "after_receive": Nothing("the messages are in memory; a consumer that ends says so by itself");
    /// Its messages are decoded and their signers recovered.
    AfterFacts = "after_facts": Nothing("decoding asks nobody; what can not be decoded is a verdict");
    /// BEGIN is answered.
    AfterBegin = "after_begin": Database;
    /// The snapshot is loaded, under locks.
    AfterLoad = "after_load": Database;
    // A batch's statements are sent together, so a point in the writing is where this table's answer was read: before it
    // would say nothing, since a statement held back would be sent out of its order, which no fault does.
    /// The row in `batches` is written.
    BatchInserted = "batch_inserted": Database;
    /// New receipts are written.
    ReceiptsInserted = "receipts_inserted": Database;
    /// Receipts seen before are changed.
    ReceiptsUpdated = "receipts_updated": Database;
    /// Allocations have left `reserved`.
    AllocationsUpdated = "allocations_updated": Database;
    /// What authorised them is kept.
    /// Transfers and their entries are written.
    TransfersInserted = "transfers_inserted": Database;
    /// Messages whose waiting is over are gone from `parked`, and `parkings` says so.
    Unparked = "unparked": Database;
    /// Messages that begin to wait are in `parked` and `parkings`.
    Parked = "parked": Database;
    /// Messages that wait on have a new time.
    ParkedOn = "parked_on": Database;
    /// The outbox row is written.
    OutboxInserted = "outbox_inserted": Database;
    /// Published outbox rows are deleted along with the batch.
    OutboxDeleted = "outbox_deleted": Database;
    /// The accounts' balances are changed: the last write.
    BalancesUpdated = "balances_updated": Database;
    /// Everything is written.
    BeforeCommit = "before_commit": Database;
    /// COMMIT is on its way, and nobody has read an answer.
    CommitSent = "commit_sent": Database;
    /// COMMIT was answered; an error here loses the answer.
    AfterCommit = "after_commit": Database;
    /// The batch is committed and not yet acknowledged.
    BeforeAck = "before_ack": Broker;
    /// It is acknowledged.
    AfterAck = "after_ack": Nothing("an acknowledgement is not answered");
    /// A slice of the outbox row is about to be published.
    BeforePublish = "before_publish": Broker;
    /// It is published, and no confirm was read.
    PublishSent = "publish_sent": Broker;
    /// A slice is confirmed. Where this is armed, each publication is a slice.
    HalfPublished = "half_published": Broker;
    /// The whole row is confirmed.
    AfterConfirm = "after_confirm": Nothing("no one is asked anything between the last confirm and the delete");
    /// Published rows are about to be deleted by a statement of their own.
    BeforeOutboxDelete = "before_outbox_delete": Database;
    /// They are deleted; an error here loses the answer.
    AfterOutboxDelete = "after_outbox_delete": Database;
    /// Parked messages that are due were claimed; an error here loses the answer.
    DueClaimed = "due_claimed": Database;
    /// A message that waited was judged, and its waiting is over.
    Woken = "woken": Nothing("its verdict is committed and its event in memory");
    /// What a batch leaves to the side room is stored there, and not acknowledged.
    Held = "held": Database;
    /// Packs of the side room were claimed; an error here loses the answer.
    HeldClaimed = "held_claimed": Database;
    /// Packs have left the side room with the batch that judges them, and it is not committed.
    HeldLeft = "held_left": Database;
    /// The relay has taken an abandoned row; an error here loses the answer.
    RelayTaken = "relay_taken": Database;
    /// The relay has published it.
    RelayPublished = "relay_published": Database;
    /// The collector took dead letters from its consumer.
    CollectorReceived = "collector_received": Nothing("the dead letters are in memory; a consumer that ends says so by itself");
    /// Dead letters are written, and the transaction not committed.
    DeadLettersFiled = "dead_letters_filed": Database;
    /// They are committed and not yet acknowledged.
    CollectorCommitted = "collector_committed": Nothing("the answer to COMMIT was read");
    /// They are acknowledged.
    CollectorAcked = "collector_acked": Nothing("an acknowledgement is not answered");
    /// Dead letters to be replayed were claimed; an error here loses the answer.
    ReplayClaimed = "replay_claimed": Database;
    /// The batch has given them their verdicts, and is not committed.
    ReplayJudged = "replay_judged": Database;
    /// It is committed.
    ReplayCommitted = "replay_committed": Nothing("the answer to COMMIT was read");
    /// A partner that moves is paused in the source.
    MovePaused = "move_paused": Nothing("the answer to COMMIT was read");
    /// Nothing of it is under way there any more.
    MoveDrained = "move_drained": Nothing("a question was answered");
    /// Everything is in the target and found equal, and not committed.
    MoveCopied = "move_copied": Database;
    /// It is committed there.
    MoveArrived = "move_arrived": Nothing("the answer to COMMIT was read");
    /// Its money has left the source.
    MoveLeft = "move_left": Nothing("the answer to COMMIT was read");
    /// The target judges its messages.
    MoveResumed = "move_resumed": Nothing("the answer to COMMIT was read");
    /// Messages that were held in the source are held in the target too, and not gone from the source.
    MoveHandedOver = "move_handed_over": Database;
    /// The source says that it is over.
    MoveDone = "move_done": Nothing("the answer to COMMIT was read");
    /// A move that is taken back can not arrive any more, and the source is paused still.
    MoveVoided = "move_voided": Nothing("the answer to COMMIT was read");
}

/// Something was made to fail. What that means says the room in which it happens.
#[derive(Debug)]
pub struct Injected(());

/// Passes a point at which nothing can fail.
#[inline]
pub async fn point(point: Point) {
    // `error` is refused for these when it is read.
    drop(fallible(point).await);
}

/// Passes a point at which a connection may break.
///
/// # Errors
/// Only where a test asked for it.
#[inline]
pub async fn fallible(point: Point) -> Result<(), Injected> {
    #[cfg(feature = "faults")]
    armed::pass(point).await?;
    #[cfg(not(feature = "faults"))]
    let _: Point = point;
    Ok(())
}

/// Passes a point in the middle of a question: it was asked, and its answer is not read.
///
/// # Errors
/// Only where a test asked for it; the answer is then never read.
#[inline]
pub async fn underway<T>(point: Point, question: impl Future<Output = T>) -> Result<T, Injected> {
    #[cfg(feature = "faults")]
    if is_armed(point) {
        return armed::underway(point, question).await;
    }
    #[cfg(not(feature = "faults"))]
    let _: Point = point;
    Ok(question.await)
}

/// Whether a point is one that acts.
#[inline]
pub fn is_armed(point: Point) -> bool {
    #[cfg(feature = "faults")]
    return armed::is(point);
    #[cfg(not(feature = "faults"))]
    {
        let _: Point = point;
        false
    }
}

#[cfg(feature = "faults")]
mod armed {
    use std::{
        io::Write,
        pin::pin,
        sync::{
            LazyLock,
            atomic::{AtomicU64, Ordering},
        },
        task::Poll,
        time::Duration,
    };

    use jiff::SignedDuration;

    use super::{Injected, OnError, Point};

    /// What happens at a point.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Action {
        Kill,
        Panic,
        Error,
        Delay(Duration),
    }

    /// One fault of `SETTLED_FAULT`.
    #[derive(Debug)]
    pub struct Fault {
        pub point: Point,
        pub action: Action,
        text: String,
        /// Passings until it acts; it acts at the one that finds 1.
        left: AtomicU64,
    }

    /// Reads `SETTLED_FAULT`.
    ///
    /// # Errors
    /// A sentence about what can not be read, or can not happen.
    pub fn parse(text: &str) -> Result<Vec<Fault>, String> {
        text.split(',').map(parse_one).collect()
    }

    fn parse_one(text: &str) -> Result<Fault, String> {
        let mut parts = text.split(':');
        let (name, passing, action) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
        let point = *Point::ALL
            .iter()
            .find(|point| point.name() == name)
            .ok_or_else(|| format!("{text}: there is no point {name}"))?;
        let passing = passing
            .and_then(|passing| passing.parse().ok())
            .filter(|passing| *passing > 0)
            .ok_or_else(|| format!("{text}: after the point comes the number of its passing, from 1"))?;
        let action = match action.map(|action| action.split_once('=').unwrap_or((action, ""))) {
            None | Some(("kill", "")) => Action::Kill,
            Some(("panic", "")) => Action::Panic,
            Some(("error", "")) => match point.on_error() {
                OnError::Nothing(why) => return Err(format!("{text}: nothing can fail there: {why}")),
                OnError::Database | OnError::Broker => Action::Error,
            },
            Some(("delay", time)) => time
                .parse::<SignedDuration>()
                .ok()
                .and_then(|time| Duration::try_from(time).ok())
                .map(Action::Delay)
                .ok_or_else(|| format!("{text}: a delay is like delay=500ms"))?,
            Some((other, _)) => return Err(format!("{text}: {other} is none of kill, panic, error, delay=500ms")),
        };
        match parts.next() {
            Some(_) => Err(format!("{text}: nothing comes after the action")),
            None => Ok(Fault {
                point,
                action,
                text: text.to_owned(),
                left: AtomicU64::new(passing),
            }),
        }
    }

    static FAULTS: LazyLock<Vec<Fault>> = LazyLock::new(|| match std::env::var("SETTLED_FAULT") {
        Ok(text) => parse(&text).unwrap_or_else(|sentence| panic!("SETTLED_FAULT: {sentence}")),
        Err(_) => Vec::new(),
    });

    pub(super) fn is(point: Point) -> bool {
        FAULTS.iter().any(|fault| fault.point == point)
    }

    pub(super) async fn pass(point: Point) -> Result<(), Injected> {
        for fault in FAULTS.iter().filter(|fault| fault.point == point) {
            if fault.left.fetch_sub(1, Ordering::SeqCst) != 1 {
                continue;
            }
            // In one piece, so that no line of the log stands in the middle of it.
            let line = format!("{{\"fault\":\"{}\"}}\n", fault.text);
            let said = std::io::stderr().write_all(line.as_bytes());
            assert!(said.is_ok(), "a fault that nobody hears of is none");
            match fault.action {
                Action::Kill => kill(),
                Action::Panic => panic!("a fault was asked for: {}", fault.text),
                Action::Error => return Err(Injected(())),
                Action::Delay(time) => tokio::time::sleep(time).await,
            }
        }
        Ok(())
    }

    /// Nothing is flushed, closed or said: that is what SIGKILL means.
    fn kill() {
        let killed = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        assert!(killed.is_ok(), "a process may always kill itself");
    }

    /// Time for the connection's own task to write what it was handed.
    const WRITTEN: Duration = Duration::from_millis(1);

    pub(super) async fn underway<T>(point: Point, question: impl Future<Output = T>) -> Result<T, Injected> {
        let mut question = pin!(question);
        // The first look hands the question over; its answer is looked for only after the point.
        if let Poll::Ready(answer) = futures_util::poll!(question.as_mut()) {
            return Ok(answer);
        }
        tokio::time::sleep(WRITTEN).await;
        pass(point).await?;
        Ok(question.await)
    }
}

#[cfg(all(test, feature = "faults"))]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    #[test]
    fn a_fault_is_a_point_a_passing_and_an_action() {
        let read = |text| parse(text).map(|faults| faults.iter().map(|fault| (fault.point, fault.action)).collect());
        let delay = Action::Delay(Duration::from_millis(500));
        for (text, expected) in [
            ("after_load:3", vec![(Point::AfterLoad, Action::Kill)]),
            ("after_load:3:kill", vec![(Point::AfterLoad, Action::Kill)]),
            ("after_ack:1:panic", vec![(Point::AfterAck, Action::Panic)]),
            (
                "before_ack:1:error,relay_taken:2:delay=500ms",
                vec![(Point::BeforeAck, Action::Error), (Point::RelayTaken, delay)],
            ),
        ] {
            assert_eq!(read(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "after_load",
            "after_load:0",
            "after_load:x",
            "after_lod:1",
            "after_load:1:explode",
            "after_load:1:kill=3",
            "after_load:1:delay",
            "after_load:1:delay=-1s",
            "after_load:1:kill:2",
            "after_load:1,",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_is_refused_where_nothing_can_fail_and_the_reason_is_given() {
        let refused: Vec<&str> = Point::ALL
            .iter()
            .filter(|point| match point.on_error() {
                OnError::Database | OnError::Broker => {
                    assert!(parse(&format!("{}:1:error", point.name())).is_ok(), "{point:?}");
                    false
                }
                OnError::Nothing(why) => {
                    let sentence = parse(&format!("{}:1:error", point.name())).expect_err("refused");
                    assert!(sentence.ends_with(why), "{sentence}");
                    true
                }
            })
            .map(|point| point.name())
            .collect();
        assert_eq!(
            refused,
            [
                "after_receive",
                "after_facts",
                "after_ack",
                "after_confirm",
                "woken",
                "collector_received",
                "collector_committed",
                "collector_acked",
                "replay_committed",
                "move_paused",
                "move_drained",
                "move_arrived",
                "move_left",
                "move_resumed",
                "move_done",
                "move_voided"
            ]
        );
    }

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
    }
}
