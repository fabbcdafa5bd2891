//! The promise under faults: at every named step of the walk, on both wires, and at any moment at all. One run is a
//! database and a vhost of its own, some seventy messages, one fault, a restart of what died, and then the auditor.
//!
//! `make faults` runs the matrix, every fault with one seed after another; `make test` runs each fault once.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    io::IsTerminal,
    os::unix::process::ExitStatusExt,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitStatus,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use indicatif::{ProgressBar, ProgressStyle};
use settled::fail::{OnError, Point};
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::Reservation,
    proxy::{At, Proxy, Then, Trap, Way, looks},
    support::{Ground, PATIENCE, Place, Worker, address, until, with_address},
    traffic::{Dice, Funded, Mix, Traffic, fund, reserve_and_draft},
};

/// Small batches, so that every step is passed often; short leases and waits, so that what was left behind is soon taken
/// over; short deadlines, so that silence is soon noticed.
const SETTINGS: [(&str, &str); 18] = [
    ("SETTLED_WORKER__BATCH_MAX", "8"),
    ("SETTLED_WORKER__PREFETCH", "16"),
    ("SETTLED_RETRY__MAX", "200ms"),
    ("SETTLED_OUTBOX__LEASE", "1s"),
    ("SETTLED_OUTBOX__RELAY_INTERVAL", "50ms"),
    ("SETTLED_OUTBOX__IDLE_DELETE", "5ms"),
    ("SETTLED_PARK__FIRST_RETRY", "100ms"),
    ("SETTLED_PARK__MAX_INTERVAL", "1s"),
    ("SETTLED_PARK__POLL", "50ms"),
    ("SETTLED_PARK__LEASE", "1s"),
    ("SETTLED_DATABASE__CONNECT_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__STATEMENT_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__LOCK_TIMEOUT", "1s"),
    ("SETTLED_DATABASE__CLIENT_DEADLINE", "2s"),
    ("SETTLED_DATABASE__ACQUIRE_TIMEOUT", "2s"),
    ("SETTLED_BROKER__HEARTBEAT", "1s"),
    ("SETTLED_BROKER__CONNECT_TIMEOUT", "2s"),
    ("SETTLED_BROKER__PUBLISH_DEADLINE", "2s"),
];

/// Something of every sort, and little of each.
const MIX: Mix = Mix {
    valid: 40,
    rivals: true,
    invalid: true,
    parked: 3,
    late: 4,
};

/// What happens at a fail point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// kill -9.
    Kill,
    Panic,
    /// The connection that is in use there breaks.
    Error,
    /// Half a second passes.
    Delay,
    /// SIGTERM comes while it stands there, and it has time to end its work.
    Stop,
    /// SIGTERM comes, and it has no time: what it does is dropped wherever it stands.
    Abort,
}

impl Act {
    const ALL: [Act; 6] = [Act::Kill, Act::Panic, Act::Error, Act::Delay, Act::Stop, Act::Abort];

    fn name(self) -> &'static str {
        match self {
            Act::Kill => "kill",
            Act::Panic => "panic",
            Act::Error => "error",
            Act::Delay => "delay",
            Act::Stop => "stop",
            Act::Abort => "abort",
        }
    }

    /// In the words of `SETTLED_FAULT`.
    fn action(self) -> &'static str {
        match self {
            Act::Kill => "kill",
            Act::Panic => "panic",
            Act::Error => "error",
            Act::Delay | Act::Stop => "delay=500ms",
            Act::Abort => "delay=5s",
        }
    }

    /// How the worker ends of it, if it does.
    fn ends(self, status: ExitStatus) -> bool {
        match self {
            Act::Kill => status.signal() == Some(9),
            // Better no worker than half a one.
            Act::Panic => status.code() == Some(70),
            Act::Stop | Act::Abort => status.code() == Some(0),
            Act::Error | Act::Delay => false,
        }
    }
}

/// What the worker talks to through a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    Database,
    Broker,
}

/// What happens on a wire.
#[derive(Clone, Copy)]
enum Trouble {
    /// Every connection ends, and nobody listens for a while.
    Refused,
    /// Every connection ends; new ones may come.
    Cut,
    /// Connections stay, and for a while nothing goes through.
    Stalled,
    /// Everything comes later.
    Slow,
    /// Every byte comes alone.
    Bytewise,
    /// After some bytes the connection ends, or is open one way only.
    AtByte(Way, Then),
    /// At the nth frame, from 1 to so many, that looks so.
    AtFrame(Way, fn(&[u8]) -> bool, usize, Then),
}

use Then::{Cut, CutInside, Silence};
use Way::{ToClient, ToServer};

/// On either wire.
const TROUBLES: [(&str, Trouble); 11] = [
    ("refused", Trouble::Refused),
    ("cut", Trouble::Cut),
    ("stalled", Trouble::Stalled),
    ("slow", Trouble::Slow),
    ("bytewise", Trouble::Bytewise),
    ("cut_at_a_byte_there", Trouble::AtByte(ToServer, Cut)),
    ("cut_at_a_byte_back", Trouble::AtByte(ToClient, Cut)),
    (
        "cut_inside_a_frame_there",
        Trouble::AtFrame(ToServer, looks::any, 80, CutInside),
    ),
    (
        "cut_inside_a_frame_back",
        Trouble::AtFrame(ToClient, looks::any, 80, CutInside),
    ),
    ("half_open_there", Trouble::AtByte(ToServer, Silence)),
    ("half_open_back", Trouble::AtByte(ToClient, Silence)),
];

const DATABASE_TROUBLES: [(&str, Trouble); 4] = [
    ("commit_lost", Trouble::AtFrame(ToServer, looks::commit, 4, Cut)),
    (
        "commit_cut_inside",
        Trouble::AtFrame(ToServer, looks::commit, 4, CutInside),
    ),
    (
        "commit_answer_lost",
        Trouble::AtFrame(ToClient, looks::committed, 4, Cut),
    ),
    (
        "commit_answer_never",
        Trouble::AtFrame(ToClient, looks::committed, 4, Silence),
    ),
];

const BROKER_TROUBLES: [(&str, Trouble); 7] = [
    ("delivery_lost", Trouble::AtFrame(ToClient, looks::deliver, 40, Cut)),
    ("ack_lost", Trouble::AtFrame(ToServer, looks::ack, 4, Cut)),
    ("ack_never", Trouble::AtFrame(ToServer, looks::ack, 4, Silence)),
    ("publish_lost", Trouble::AtFrame(ToServer, looks::publish, 30, Cut)),
    (
        "publish_cut_inside",
        Trouble::AtFrame(ToServer, looks::body, 30, CutInside),
    ),
    ("confirm_lost", Trouble::AtFrame(ToClient, looks::ack, 3, Cut)),
    ("confirm_never", Trouble::AtFrame(ToClient, looks::ack, 3, Silence)),
];

/// One thing that goes wrong.
#[derive(Clone, Copy)]
enum Fault {
    At(Point, Act),
    On(Wire, &'static str, Trouble),
    /// kill -9 at whatever moment it comes.
    AtAnyMoment,
}

impl Fault {
    fn all() -> Vec<Self> {
        // Those of the desk have a run of their own, see `replays`.
        let walk = Point::ALL
            .iter()
            .filter(|point| !point.is_of_the_desk() && !point.is_of_the_side_room() && !point.is_of_a_move());
        let points = walk.flat_map(|point| {
            let acts = Act::ALL.into_iter().filter(|act| match point.on_error() {
                OnError::Nothing(_) => *act != Act::Error,
                OnError::Database | OnError::Broker => true,
            });
            acts.map(|act| Fault::At(*point, act))
        });
        let wire = |wire, troubles: &[(&'static str, Trouble)]| {
            let faults = TROUBLES.iter().chain(troubles);
            faults.map(|(name, trouble)| Fault::On(wire, name, *trouble)).collect()
        };
        let database: Vec<Self> = wire(Wire::Database, &DATABASE_TROUBLES);
        let broker: Vec<Self> = wire(Wire::Broker, &BROKER_TROUBLES);
        points
            .chain(database)
            .chain(broker)
            .chain([Fault::AtAnyMoment])
            .collect()
    }

    /// Where it happens, and what.
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Fault::At(point, act) => (point.name(), act.name()),
            Fault::On(Wire::Database, name, _) => ("database", name),
            Fault::On(Wire::Broker, name, _) => ("broker", name),
            Fault::AtAnyMoment => ("any_moment", "kill"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, what) = self.name();
        write!(f, "{place}:{what}")
    }
}

/// Passings of a point that are sure to come in a run, at least.
fn passings(point: Point) -> usize {
    let is_in_every_batch = matches!(
        point,
        Point::AfterReceive
            | Point::AfterFacts
            | Point::AfterBegin
            | Point::AfterLoad
            | Point::BatchInserted
            | Point::BeforeCommit
            | Point::CommitSent
            | Point::AfterCommit
            | Point::BeforeAck
            | Point::AfterAck
            | Point::BeforePublish
            | Point::PublishSent
            | Point::HalfPublished
            | Point::AfterConfirm
    );
    if is_in_every_batch { 4 } else { 1 }
}

/// The workers of a run, one after the other: who dies of its fault is followed by the next.
struct Shift<'a> {
    place: &'a Place,
    settings: Vec<(&'static str, String)>,
    /// The faults still to come, last first, and what each does.
    faults: RefCell<Vec<(String, Act)>>,
    /// The fault of the worker that is at work.
    now: RefCell<Option<(String, Act)>>,
    worker: RefCell<Worker>,
    /// Its fault has acted.
    has_fired: Cell<bool>,
    /// What acted, as the injector said.
    fired: RefCell<Vec<String>>,
}

impl<'a> Shift<'a> {
    fn begin(place: &'a Place, settings: Vec<(&'static str, String)>, mut faults: Vec<(String, Act)>) -> Self {
        faults.reverse();
        let now = faults.pop();
        Self {
            worker: RefCell::new(start(place, &settings, now.as_ref())),
            place,
            settings,
            faults: RefCell::new(faults),
            now: RefCell::new(now),
            has_fired: Cell::new(false),
            fired: RefCell::default(),
        }
    }

    /// Watches the worker for ever: notes what its injector says, and starts the next when it has ended as it should.
    async fn watch(&self) {
        loop {
            self.look();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn look(&self) {
        let ended = self.worker.borrow().ended();
        let now = self.now.borrow().clone();
        if let Some((fault, act)) = &now
            && !self.has_fired.get()
        {
            let worker = self.worker.borrow();
            if worker.said().contains(&format!("{{\"fault\":\"{fault}\"}}")) {
                self.has_fired.set(true);
                self.fired.borrow_mut().push(fault.clone());
                match act {
                    Act::Stop | Act::Abort => worker.signal("TERM"),
                    Act::Kill | Act::Panic | Act::Error | Act::Delay => {}
                }
            }
        }
        let Some(status) = ended else {
            return;
        };
        let as_it_should = self.has_fired.get() && now.is_some_and(|(_, act)| act.ends(status));
        let said = self.worker.borrow().said();
        assert!(as_it_should, "the worker ended with {status}: {}", tail(&said));
        self.next();
    }

    fn next(&self) {
        let next = self.faults.borrow_mut().pop();
        *self.worker.borrow_mut() = start(self.place, &self.settings, next.as_ref());
        *self.now.borrow_mut() = next;
        self.has_fired.set(false);
    }

    /// Whether the last fault has acted.
    fn has_acted(&self) -> bool {
        self.faults.borrow().is_empty() && (self.now.borrow().is_none() || self.has_fired.get())
    }

    /// Whether every fault has acted, and whoever ended of it has a successor.
    fn is_over(&self) -> bool {
        let is_over = match &*self.now.borrow() {
            None => true,
            Some((_, Act::Error | Act::Delay)) => self.has_fired.get(),
            Some((_, Act::Kill | Act::Panic | Act::Stop | Act::Abort)) => false,
        };
        is_over && self.faults.borrow().is_empty()
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(20)..)
        .unwrap_or_default()
        .join("\n")
}

fn start(place: &Place, settings: &[(&'static str, String)], fault: Option<&(String, Act)>) -> Worker {
    let mut all: Vec<(&str, &str)> = SETTINGS.to_vec();
    all.extend(settings.iter().map(|(name, value)| (*name, value.as_str())));
    if let Some((fault, act)) = fault {
        all.push(("SETTLED_FAULT", fault));
        if *act == Act::Abort {
            all.push(("SETTLED_WORKER__DRAIN_DEADLINE", "100ms"));
        }
    }
    place.worker(&all)
}

/// Partners with funds: made once, copied for each run.
struct Soil {
    place: Place,
    partners: Funded,
}

impl Soil {
    async fn prepare() -> Self {
        let place = Place::new("faults").await;
        let partners = fund(&place, &MIX).await;
        place.events.catch_up(place.line()).await;
        Self { place, partners }
    }
}

/// One run. What the injector says it did, and the ground, to be cleared; everything that is wrong is a panic.
async fn run(soil: &Soil, fault: Fault, seed: u64) -> (usize, Ground) {
    let place = soil.place.copy("fault").await;
    let mut dice = Dice::new(seed);
    let Traffic { messages, late } = reserve_and_draft(&place, &soil.partners, seed, &MIX).await;
    let (injected, worker) = match fault {
        Fault::At(point, act) => at_a_point(&place, point, act, &messages, &late, &mut dice).await,
        Fault::On(wire, _, trouble) => on_a_wire(&place, wire, trouble, &messages, &late, &mut dice).await,
        Fault::AtAnyMoment => at_any_moment(&place, &messages, &late, &mut dice).await,
    };
    place.settle_up(worker).await;
    (injected, place.leave())
}

/// Publishes in small lots, so that the worker is at work meanwhile.
async fn publish(place: &Place, messages: &[Message], dice: &mut Dice) {
    let mut rest = messages;
    while !rest.is_empty() {
        let (lot, more) = rest.split_at((4 + dice.below(12)).min(rest.len()));
        place.publish(lot).await;
        tokio::time::sleep(Duration::from_millis(dice.below(60) as u64)).await;
        rest = more;
    }
}

/// Reserves for the late messages once all of them are parked.
async fn reserve_late(place: &Place, late: &[Reservation]) {
    let db = place.db().await;
    let ids: Vec<Uuid> = late.iter().map(|reservation| reservation.id).collect();
    until("the late messages are parked", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.parked WHERE allocation_id = ANY ($1)";
        let count: i64 = db.query_one(sql, &[&ids]).await.expect("parked").get(0);
        (count == ids.len() as i64).then_some(())
    })
    .await;
    place.reserve(late).await;
}

async fn at_a_point(
    place: &Place,
    point: Point,
    act: Act,
    messages: &[Message],
    late: &[Reservation],
    dice: &mut Dice,
) -> (usize, Worker) {
    let passing = 1 + dice.below(passings(point));
    let fault = (format!("{}:{passing}:{}", point.name(), act.action()), act);
    let mut settings = Vec::new();
    let mut faults = vec![fault];
    match point {
        // The relay works only on what another left behind.
        Point::RelayTaken | Point::RelayPublished => {
            faults.insert(0, ("before_publish:2:kill".to_owned(), Act::Kill));
        }
        // Along with a batch, before a statement of their own can delete them.
        Point::OutboxDeleted => {
            settings.push(("SETTLED_OUTBOX__IDLE_DELETE", "20s".to_owned()));
            settings.push(("SETTLED_WORKER__LANES", "1".to_owned()));
        }
        _ => {}
    }
    // Every other run has a second worker from the fault on: it meets what the first left behind or still holds.
    let has_company = dice.below(2) == 1;
    let shift = Shift::begin(place, settings, faults);
    let story = async {
        let talk = async {
            publish(place, messages, dice).await;
            reserve_late(place, late).await;
        };
        let fault = async {
            until("the fault acts", PATIENCE, async || shift.has_acted().then_some(())).await;
            let company = has_company.then(|| start(place, &[], None));
            until("the next worker starts", PATIENCE, async || {
                shift.is_over().then_some(())
            })
            .await;
            company
        };
        let ((), company) = tokio::join!(talk, fault);
        place.rest().await;
        company
    };
    let company = tokio::select! {
        () = shift.watch() => None,
        company = story => company,
    };
    if let Some(worker) = company {
        end(&worker).await;
    }
    (shift.fired.into_inner().len(), shift.worker.into_inner())
}

/// An orderly end, of one that has begun.
async fn end(worker: &Worker) {
    worker.ready().await;
    let status = worker.terminate().await;
    assert_eq!(status.code(), Some(0), "SIGTERM ends the worker in order");
}

async fn on_a_wire(
    place: &Place,
    wire: Wire,
    trouble: Trouble,
    messages: &[Message],
    late: &[Reservation],
    dice: &mut Dice,
) -> (usize, Worker) {
    let (variable, url) = match wire {
        Wire::Database => ("SETTLED_DATABASE_URL", &place.database_url),
        Wire::Broker => ("SETTLED_BROKER_URL", &place.broker_url),
    };
    let proxy = Proxy::to(&address(url)).await;
    // What it waits for in vain, one worker keeps and another hands back.
    let patience = ["100ms", "60s"][dice.below(2)];
    let settings = [
        (variable, with_address(url, proxy.address)),
        ("SETTLED_WORKER__PAUSE_RELEASE", patience.to_owned()),
        ("SETTLED_WORKER__DRAIN_DEADLINE", "1s".to_owned()),
    ];
    let mut worker = start(place, &settings, None);
    worker.ready().await;
    match trouble {
        Trouble::Refused | Trouble::Cut | Trouble::Stalled => {}
        Trouble::Slow => proxy.slow(Duration::from_millis(1 + dice.below(20) as u64)),
        Trouble::Bytewise => proxy.bytewise(),
        Trouble::AtByte(way, then) => {
            let at = At::Byte(1 + dice.below(12_000));
            proxy.set_trap(Trap { way, at, then });
        }
        Trouble::AtFrame(way, looks_so, most, then) => {
            let at = At::Frame(looks_so, 1 + dice.below(most));
            proxy.set_trap(Trap { way, at, then });
        }
    }
    let (before, after) = messages.split_at(dice.below(messages.len()));
    publish(place, before, dice).await;
    let passing = Duration::from_millis(dice.below(400) as u64);
    match trouble {
        Trouble::Cut => proxy.cut(),
        Trouble::Refused | Trouble::Stalled => {
            if matches!(trouble, Trouble::Refused) {
                proxy.refuse();
            } else {
                proxy.stall();
            }
            until("something is in its way", PATIENCE, async || {
                (proxy.injected() > 0).then_some(())
            })
            .await;
            tokio::time::sleep(5 * passing).await;
            if dice.below(3) == 0 {
                // SIGTERM does not wait for those who do not answer.
                let status = worker.terminate().await;
                assert_eq!(status.code(), Some(0), "SIGTERM ends the worker in order");
                worker = start(place, &settings, None);
            }
            proxy.open();
        }
        Trouble::Slow | Trouble::Bytewise | Trouble::AtByte(..) | Trouble::AtFrame(..) => {}
    }
    publish(place, after, dice).await;
    reserve_late(place, late).await;
    until("the fault acts", PATIENCE, async || {
        (proxy.injected() > 0).then_some(())
    })
    .await;
    place.rest().await;
    proxy.open();
    end(&worker).await;
    // The broker may not have noticed yet that acknowledgements were lost. It tells the next worker then.
    (proxy.injected(), start(place, &[], None))
}

/// Two workers on the same queue, killed in any order.
async fn at_any_moment(place: &Place, messages: &[Message], late: &[Reservation], dice: &mut Dice) -> (usize, Worker) {
    let mut workers = [start(place, &[], None), start(place, &[], None)];
    let mut kills = 0;
    for lot in messages.chunks(messages.len().div_ceil(3)) {
        place.publish(lot).await;
        tokio::time::sleep(Duration::from_millis(dice.below(300) as u64)).await;
        if let Some(worker) = workers.get_mut(dice.below(2)) {
            worker.kill().await;
            *worker = start(place, &[], None);
            kills += 1;
        }
    }
    reserve_late(place, late).await;
    place.rest().await;
    let [one, other] = workers;
    end(&one).await;
    (kills, other)
}

/// What came of the runs of one fault.
#[derive(Default)]
struct Tally {
    runs: usize,
    fired: usize,
    injected: usize,
    failed: usize,
}

/// What a run was, and what was wrong.
struct Failure {
    fault: Fault,
    seed: u64,
    why: String,
}

/// Runs, several at a time, each on a thread and a runtime of its own.
struct Matrix<'a> {
    soil: &'a Soil,
    runs: Vec<(Fault, u64)>,
    next: AtomicUsize,
    /// Whether the first failure ends it.
    is_hasty: bool,
    tallies: Mutex<BTreeMap<(usize, &'static str, &'static str), Tally>>,
    failures: Mutex<Vec<Failure>>,
}

impl<'a> Matrix<'a> {
    /// Every fault with the first seed, then every fault with the next, until there are so many runs.
    fn new(soil: &'a Soil, faults: &[Fault], runs: usize, seed: u64, is_hasty: bool) -> Self {
        let rounds = (0_u64..).flat_map(|round| faults.iter().map(move |fault| (*fault, seed.wrapping_add(round))));
        Self {
            soil,
            runs: rounds.take(runs).collect(),
            next: AtomicUsize::new(0),
            is_hasty,
            tallies: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    fn go(&self, jobs: usize, told: &(impl Fn(usize, usize) + Sync)) {
        // To drop a database takes a checkpoint: nobody has to wait for it, and several that drop at once share one.
        let (used, to_clear) = mpsc::channel::<Ground>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while let Ok(first) = to_clear.recv() {
                    let lot: Vec<Ground> = std::iter::once(first).chain(to_clear.try_iter()).collect();
                    std::thread::scope(|scope| lot.into_iter().for_each(|ground| drop(scope.spawn(|| drop(ground)))));
                }
            });
            for _ in 0..jobs {
                let used = used.clone();
                scope.spawn(move || {
                    while let Some((fault, seed)) = self.runs.get(self.next.fetch_add(1, Ordering::SeqCst)) {
                        self.one(*fault, *seed, &used);
                        let failed = self.failures.lock().unwrap_or_else(PoisonError::into_inner).len();
                        told(self.done(), failed);
                        if self.is_hasty && failed > 0 {
                            break;
                        }
                    }
                });
            }
            drop(used);
        });
    }

    fn one(&self, fault: Fault, seed: u64, used: &mpsc::Sender<Ground>) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        let outcome = catch_unwind(AssertUnwindSafe(|| runtime.block_on(run(self.soil, fault, seed))));
        let order = self.runs.iter().position(|(other, _)| other.name() == fault.name());
        let (place, what) = fault.name();
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        let tally = tallies.entry((order.unwrap_or_default(), place, what)).or_default();
        tally.runs += 1;
        let why = match outcome {
            Ok((injected, ground)) => {
                used.send(ground).expect("somebody clears up");
                tally.fired += usize::from(injected > 0);
                tally.injected += injected;
                (injected == 0).then(|| "the fault never acted".to_owned())
            }
            Err(panic) => Some(match panic.downcast::<String>() {
                Ok(text) => *text,
                Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"a panic").to_string(),
            }),
        };
        if let Some(why) = why {
            tally.failed += 1;
            let failure = Failure { fault, seed, why };
            self.failures
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(failure);
        }
    }

    fn done(&self) -> usize {
        let tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.values().map(|tally| tally.runs).sum()
    }

    /// Every failure with the command that repeats it.
    fn failures(&self) -> Vec<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let told = failures.iter().map(|Failure { fault, seed, why }| {
            format!("FAILED {fault} with seed {seed}: {why}\n  again: make faults ONLY={fault} SEED={seed} RUNS=1\n")
        });
        told.collect()
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
        table.set_header(["where", "what", "runs", "acted in", "times", "failed"]);
        let tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        for ((_, place, what), tally) in tallies.iter() {
            let numbers = [tally.runs, tally.fired, tally.injected, tally.failed].map(|number| number.to_string());
            let mut row = vec![(*place).to_owned(), (*what).to_owned()];
            row.extend(numbers);
            table.add_row(row);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a whole number")))
}

/// Each of them once, in a test of the suite.
fn once(faults: &[Fault]) {
    let seed = number("SETTLED_TEST_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("SETTLED_TEST_SEED={seed}");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let soil = runtime.block_on(Soil::prepare());
    let matrix = Matrix::new(&soil, faults, faults.len(), seed, true);
    matrix.go(4, &|_, _| {});
    let failures = matrix.failures();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    runtime.block_on(async { drop(soil) });
}

#[test]
fn killed_at_every_point() {
    let faults = Fault::all();
    let kills: Vec<Fault> = faults
        .into_iter()
        .filter(|fault| matches!(fault, Fault::At(_, Act::Kill)))
        .collect();
    let walk = Point::ALL
        .iter()
        .filter(|point| !point.is_of_the_desk() && !point.is_of_the_side_room() && !point.is_of_a_move());
    assert_eq!(kills.len(), walk.count(), "every point");
    once(&kills);
}

#[test]
fn every_trouble_on_both_wires() {
    let faults = Fault::all();
    let troubles: Vec<Fault> = faults
        .into_iter()
        .filter(|fault| matches!(fault, Fault::On(..)))
        .collect();
    once(&troubles);
}

/// kill -9 again and again in one run, always two workers on the same queue.
#[test]
fn killed_at_random_moments() {
    once(&[Fault::AtAnyMoment; 4]);
}

/// `make faults`: every fault with one seed after another.
#[test]
#[ignore = "the whole matrix takes its time: run `make faults`"]
fn matrix() {
    let only = std::env::var("SETTLED_FAULTS_ONLY").unwrap_or_default();
    let faults: Vec<Fault> = Fault::all()
        .into_iter()
        .filter(|fault| {
            let (place, what) = fault.name();
            only.is_empty() || [place, what, &fault.to_string()].contains(&only.as_str())
        })
        .collect();
    assert!(!faults.is_empty(), "no fault is called {only}");
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("SETTLED_FAULTS_SEED").unwrap_or_else(|| since_1970.expect("a clock").as_secs());
    let runs = number("SETTLED_FAULTS_RUNS").map_or(faults.len(), |runs| runs as usize);
    let jobs = number("SETTLED_FAULTS_JOBS").map_or(4, |jobs| jobs as usize);
    println!(
        "{} faults, {runs} runs, {jobs} at a time, seeds from {seed}",
        faults.len()
    );

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let soil = runtime.block_on(Soil::prepare());
    let matrix = Matrix::new(&soil, &faults, runs, seed, false);
    let began = Instant::now();
    if std::io::stderr().is_terminal() {
        let bar = ProgressBar::new(runs as u64);
        let style =
            ProgressStyle::with_template("{bar:40} {pos}/{len} runs, {msg} failed, {elapsed} so far, {eta} to go");
        bar.set_style(style.expect("a template"));
        matrix.go(jobs, &|done, failed| {
            bar.set_message(failed.to_string());
            bar.set_position(done as u64);
        });
        bar.finish();
    } else {
        let lines = (runs / 20).max(1);
        matrix.go(jobs, &|done, failed| {
            if done % lines == 0 {
                println!("{done} of {runs} runs, {failed} failed, {:.0?}", began.elapsed());
            }
        });
    }
    let wall = began.elapsed();
    let failures = matrix.failures();
    println!("{}\n", matrix.table());
    for failure in &failures {
        println!("{failure}");
    }
    println!(
        "{} of {runs} runs in {wall:.1?}, seeds from {seed}: {} failed",
        matrix.done(),
        failures.len()
    );
    assert!(failures.is_empty(), "{} runs failed", failures.len());
    runtime.block_on(async { drop(soil) });
}
