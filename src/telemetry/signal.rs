//! What happened, as a type.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::labels::{ApiRoute, Dependency, Door, PauseCause, ReplyResult, SpanFate, Stage};
use super::tally::{HeldOf, Published, Tally};
use crate::domain::reason::Reason;

/// What happened.
#[derive(Debug)]
pub enum Signal<'a> {
    /// The worker's process is up; nothing is connected yet.
    Started {
        worker: &'a str,
        lanes: usize,
        version: &'a str,
    },
    /// HTTP answers here.
    HttpListening {
        address: SocketAddr,
    },
    /// The files of a listener's certificate changed, and are used from now on.
    CertificateRenewed,
    /// They changed, and can not be used: those before are.
    CertificateRefused {
        error: &'a str,
    },
    /// A connection that asked for nothing, or read nothing, was closed for another.
    HttpConnectionShed,
    /// The public API answers here.
    ApiListening {
        address: SocketAddr,
        encrypted: bool,
        version: &'a str,
    },
    /// A request to the public API was answered; with what went wrong, where that is ours.
    ApiAnswered {
        route: ApiRoute,
        status: u16,
        request: Uuid,
        elapsed: Duration,
        error: Option<&'a str>,
    },
    /// The operator's console answers here.
    ConsoleListening {
        address: SocketAddr,
        encrypted: bool,
        version: &'a str,
    },
    /// It has an address, and nobody opens it here.
    ConsoleNotOpened,
    /// Somebody has a session of the console.
    ConsoleSignedIn {
        name: &'a str,
        role: &'static str,
        entrance: &'static str,
    },
    /// A request to the console was answered.
    ConsoleAnswered {
        path: &'static str,
        status: u16,
        elapsed: Duration,
    },
    /// Consumers are attached and the database answers.
    Ready,
    /// It was ready, or never became so.
    NotReady {
        reasons: &'a [String],
    },

    /// A lane consumes a queue.
    ConsumerAttached {
        lane: usize,
        queue: &'a str,
    },
    /// The broker ended the consumer without an error (queue deleted, consumer timeout): an incident.
    ConsumerCancelled {
        lane: usize,
        queue: &'a str,
    },
    /// A queue, or what stands around it, is not what it must be: it is not consumed. An alarm.
    TopologyMisfit {
        lane: usize,
        queue: &'a str,
        problem: &'a str,
    },
    /// It was looked at, before a consumer is attached.
    TopologyLooked {
        queue: &'a str,
        fits: bool,
    },
    /// What this user has no right to look at.
    TopologyUnseen {
        queue: &'a str,
        unseen: &'a [String],
    },
    /// A queue whose depth this user may not see. Settling goes on.
    QueueUnseen {
        queue: &'a str,
        why: &'a str,
    },
    /// A partner's own queue is beyond the bound, and nobody here consumes it. An alarm.
    OwnQueueUnserved {
        queue: &'a str,
        most: usize,
    },
    /// Connection or channel broke under the consumer.
    ConsumerLost {
        lane: usize,
        queue: &'a str,
        error: &'a str,
    },
    /// Messages came whose properties can not be decoded: they are judged without them.
    Undecodable {
        lane: usize,
        queue: &'a str,
        messages: usize,
    },
    /// We ended the consumer ourselves: a pause or a stop.
    ConsumerDetached {
        lane: usize,
        queue: &'a str,
    },
    /// An acknowledgement did not reach the broker: the messages come again, and are duplicates then.
    AckLost {
        lane: usize,
        error: &'a str,
    },
    /// A dependency did not answer; it is tried again after `wait`.
    Retrying {
        dependency: Dependency,
        attempt: u32,
        wait: Duration,
        error: &'a str,
    },

    /// A batch committed.
    BatchJudged {
        batch: Uuid,
        lane: usize,
        from: Door,
        tally: &'a Tally,
    },
    /// A batch's transaction failed in a way that passes, and runs again.
    BatchRetried {
        batch: Uuid,
        lane: usize,
        attempt: u32,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },
    /// One step of a batch took this long.
    Stage {
        stage: Stage,
        began: Instant,
        ended: Instant,
    },
    /// What was asked of the database under this name waited for so many answers, those of statements sent together as one.
    RoundTrips {
        transaction: &'static str,
        count: u64,
    },
    /// From receipt at intake to the confirmed event, one for each message.
    EndToEnd {
        elapsed: &'a [Duration],
    },
    /// The one message that the database refuses; it becomes `internal`. An alarm.
    CulpritIsolated {
        batch: Uuid,
        digest: &'a str,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },

    /// Intake pauses: nothing is taken until the cause is gone.
    Paused {
        cause: PauseCause,
        why: &'a str,
    },
    /// It takes again.
    Resumed {
        cause: PauseCause,
        paused_for: Duration,
    },
    /// Messages were put into the side room instead of being judged at once.
    Held {
        why: &'static str,
        messages: u64,
    },
    /// Messages could not be put into the side room.
    HoldFailed {
        error: &'a str,
    },
    /// A pack of the side room is of a format that this version can not read.
    HeldUnreadable {
        id: Uuid,
    },
    /// Rows that a batch needs are locked by a transaction that stays open.
    LocksFound {
        locks: usize,
    },
    /// What is in the side room.
    HeldMeasured {
        held: &'a [HeldOf],
    },
    /// How much of what may be held is held, by the bound that is nearest.
    HeldFilled {
        filled: f64,
    },
    /// The side room is full: what would be held is judged in line, and others wait for it. An alarm.
    HeldFull {
        of: &'a str,
        messages: u64,
    },
    /// There is room again.
    HeldHasRoom,
    /// So many active partners have no valid key any more within `registry.key_warn_before`.
    KeysEnding {
        partners: usize,
    },
    /// One of them.
    LastKeyEnds {
        enterprise_id: &'a str,
        ends_at: &'a str,
    },
    /// A parked message is stored in a format that this version can not read: it waits for one that can. An alarm.
    ParkedUnreadable {
        key: Uuid,
    },
    /// The same of a dead letter that is to be replayed. An alarm.
    ReplayUnreadable {
        id: Uuid,
    },
    /// Dead letters were stored: messages that had no row, further failures of messages that had one, and copies of what
    /// was stored before; the last one failed this long ago.
    DeadLettersCollected {
        new: u64,
        again: u64,
        copies: u64,
        lag: Duration,
    },
    /// Nothing waits to be collected.
    CollectorIdle,
    /// Dead letters take all the room that they may: the collector takes none. An alarm.
    DeadLettersFull {
        why: &'a str,
    },
    /// There is room again.
    DeadLettersHaveRoom,
    /// What dead letters take, and how many partners have most of their share.
    DeadLetterSpace {
        rows: u64,
        bytes: u64,
        filled: f64,
        partners_near: usize,
    },
    /// Dead letters take most of the room that they may, in all or one partner's. An alarm.
    DeadLettersNearBound {
        of: &'a str,
        rows: u64,
        bytes: u64,
        filled: f64,
    },
    /// Open dead letters whose message has settled since.
    DeadLettersSettledSince {
        closed: u64,
    },
    /// What the broker dead-lettered did not come to settlement.dead: it is stored from its copy. An alarm.
    DeadLettersLeftOut {
        letters: u64,
    },
    /// A dead letter that the database refuses, or no database can hold, goes to settlement.unreadable. An alarm.
    DeadLetterSetApart {
        digest: &'a str,
        sqlstate: Option<&'a str>,
        error: &'a str,
    },
    /// There are more messages in settlement.unreadable than before: somebody has to look at them. An alarm.
    UnreadableGrew {
        messages: u64,
    },
    /// Unacknowledged messages went back to the broker.
    HandedBack {
        lane: usize,
        why: &'a str,
    },

    /// A batch's publications are confirmed.
    Published {
        batch: Uuid,
        published: &'a Published,
    },
    /// Publishing failed; the row stands in the outbox and goes out again as a whole.
    PublishFailed {
        batch: Uuid,
        error: &'a str,
    },
    /// The row went out again on a new connection.
    RowRepublished {
        batch: Uuid,
        attempt: u32,
    },
    /// A dead letter found no queue: it would be lost, so the lane stops. An alarm.
    DeadLetterReturned {
        batch: Uuid,
        routing_key: &'a str,
        message_id: Option<&'a str>,
    },
    /// The relay took a row whose lane is gone.
    RelayTook {
        batch: Uuid,
        age: Duration,
    },
    /// The broker refuses this publication even alone; it is set aside. An alarm.
    PublicationRefused {
        batch: Uuid,
        routing_key: &'a str,
        error: &'a str,
    },
    /// An answer to a partner's `reply_to`, or why there is none.
    Reply {
        result: ReplyResult,
    },

    /// The broker was not told what was committed last.
    BooksNotTold {
        error: &'a str,
    },

    /// Measured now and then.
    OutboxMeasured {
        pending: u64,
        oldest: Option<Duration>,
    },
    ParkedMeasured {
        parked: u64,
    },
    QueueMeasured {
        queue: &'a str,
        messages: u64,
    },
    /// What waits at the broker to be dead-lettered from a queue, as the management API says.
    BrokerDeadLettersMeasured {
        queue: &'a str,
        messages: u64,
    },
    /// The broker does not get rid of what it has to dead-letter. An alarm.
    BrokerDeadLettersStuck {
        queue: &'a str,
        messages: u64,
        since: Duration,
    },
    /// The management API, which is to be asked, does not answer, or answers again.
    ManagementAsked {
        error: Option<&'a str>,
    },
    /// Open dead letters by reason, the age of the oldest, replay runs by state.
    DeskMeasured {
        open: &'a [(Reason, u64)],
        oldest: Option<Duration>,
        runs: &'a [(String, u64)],
    },

    /// Traces are exported to this receiver.
    TracesExported {
        receiver: &'a str,
    },
    /// They were asked for and are off.
    TracesOff {
        why: &'a str,
    },
    /// The receiver of traces took nothing. Said once, until it does.
    TracesRefused {
        receiver: &'a str,
        error: &'a str,
    },
    /// It takes them again.
    TracesTaken {
        receiver: &'a str,
    },
    /// What became of spans.
    Spans {
        fate: SpanFate,
        spans: u64,
    },

    /// SIGTERM or an unrecoverable fault: intake ends.
    Stopping {
        why: &'a str,
    },
    /// What was delivered is settled, acknowledged and told.
    Drained {
        elapsed: Duration,
    },
    /// The time for that is over.
    NotDrained {
        elapsed: Duration,
        left: &'a str,
    },
    /// The last line.
    Stopped,
}

impl Signal<'_> {
    /// A step of a batch that began then is done now.
    pub fn stage(stage: Stage, began: Instant) -> Self {
        Signal::Stage {
            stage,
            began,
            ended: Instant::now(),
        }
    }
}
