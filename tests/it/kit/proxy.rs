//! A TCP proxy between the worker and what it depends on. It refuses, cuts, stalls, slows down, and springs traps: at a byte,
//! or at a frame that looks like COMMIT or an acknowledgement. It counts what it did.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

use crate::kit::support::Beside;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// Nobody listens, and every connection is gone.
    Refuse,
    /// Connections stay, and not a byte goes through.
    Stall,
    /// Whatever comes goes on this much later.
    Slow(Duration),
    /// Every byte travels alone.
    Bytewise,
}

#[derive(Clone, Copy)]
struct State {
    mode: Mode,
    cuts: u64,
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToServer,
    ToClient,
}

/// What a trap waits for.
#[derive(Clone, Copy)]
pub(crate) enum At {
    /// This many bytes have gone this way.
    Byte(usize),
    /// The nth frame, from 1, that looks so.
    Frame(fn(&[u8]) -> bool, usize),
}

/// What a trap does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// The connection ends, both ways; the frame does not go through.
    Cut,
    /// Half of the frame goes through, and the connection ends.
    CutInside,
    /// From this frame on nothing goes through this way, while the connection stays and the other way is open.
    Silence,
}

/// Springs once.
#[derive(Clone, Copy)]
pub(crate) struct Trap {
    pub(crate) way: Way,
    pub(crate) at: At,
    pub(crate) then: Then,
}

/// Frames as the trap's eye sees them.
pub(crate) mod looks {
    pub(crate) fn any(_: &[u8]) -> bool {
        true
    }

    /// The simple query COMMIT.
    pub(crate) fn commit(frame: &[u8]) -> bool {
        frame.first() == Some(&b'Q') && frame.get(5..) == Some(b"COMMIT\0")
    }

    /// The server's answer that it is complete.
    pub(crate) fn committed(frame: &[u8]) -> bool {
        frame.first() == Some(&b'C') && frame.get(5..) == Some(b"COMMIT\0")
    }

    /// A method of AMQP's class `basic`.
    fn basic(frame: &[u8], method: u8) -> bool {
        frame.first() == Some(&1) && frame.get(7..11) == Some(&[0, 60, 0, method])
    }

    pub(crate) fn publish(frame: &[u8]) -> bool {
        basic(frame, 40)
    }

    pub(crate) fn deliver(frame: &[u8]) -> bool {
        basic(frame, 60)
    }

    /// A consumer's acknowledgement on the way there, a publisher's confirm on the way back.
    pub(crate) fn ack(frame: &[u8]) -> bool {
        basic(frame, 80)
    }

    /// A piece of a message's body.
    pub(crate) fn body(frame: &[u8]) -> bool {
        frame.first() == Some(&3)
    }
}

/// How many bytes travel alone: enough to cut up some hundreds of frames.
const ALONE: usize = 20_000;

/// Frames to the server that end the connection, each time.
pub(crate) type Strike = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

#[derive(Default)]
struct Shared {
    /// The host and port behind it.
    target: Mutex<String>,
    strike: Mutex<Option<Strike>>,
    /// What is set, and how far it is from springing.
    trap: Mutex<Option<(Trap, usize)>>,
    injected: AtomicUsize,
    /// Bytes that travelled alone since that was said last.
    alone: AtomicUsize,
}

/// What happens to a frame.
#[derive(Clone, Copy)]
enum Fate {
    Passes,
    /// This many of its bytes pass, and then that happens.
    Sprung(usize, Then),
}

impl Shared {
    fn count(&self, how_many: usize) {
        self.injected.fetch_add(how_many, Ordering::SeqCst);
    }

    fn judge(&self, way: Way, frame: &[u8]) -> Fate {
        let strike = self.strike.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if way == Way::ToServer && strike.is_some_and(|strikes| strikes(frame)) {
            self.count(1);
            return Fate::Sprung(0, Then::Cut);
        }
        let mut set = self.trap.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((trap, so_far)) = set.as_mut().filter(|(trap, _)| trap.way == way) else {
            return Fate::Passes;
        };
        let then = trap.then;
        let passes = match trap.at {
            At::Byte(byte) => {
                let before = *so_far;
                *so_far += frame.len();
                if *so_far < byte {
                    return Fate::Passes;
                }
                byte.saturating_sub(before)
            }
            At::Frame(looks_so, nth) => {
                *so_far += usize::from(looks_so(frame));
                if *so_far < nth {
                    return Fate::Passes;
                }
                match then {
                    Then::CutInside => frame.len() / 2,
                    Then::Cut | Then::Silence => 0,
                }
            }
        };
        *set = None;
        drop(set);
        self.count(1);
        Fate::Sprung(passes, then)
    }
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: watch::Sender<State>,
    shared: Arc<Shared>,
    _serving: Beside,
}

impl Proxy {
    /// A proxy to a host and port.
    pub(crate) async fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its port");
        let (state, watched) = watch::channel(State {
            mode: Mode::Open,
            cuts: 0,
        });
        let shared = Arc::new(Shared {
            target: Mutex::new(target.to_owned()),
            ..Shared::default()
        });
        let serving = Beside::spawn(serve(listener, address, watched, Arc::clone(&shared)));
        Self {
            address,
            state,
            shared,
            _serving: serving,
        }
    }

    fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }

    pub(crate) fn open(&self) {
        self.set(Mode::Open);
    }

    pub(crate) fn refuse(&self) {
        self.set(Mode::Refuse);
    }

    pub(crate) fn stall(&self) {
        self.set(Mode::Stall);
    }

    pub(crate) fn slow(&self, latency: Duration) {
        self.set(Mode::Slow(latency));
    }

    pub(crate) fn bytewise(&self) {
        self.shared.alone.store(0, Ordering::SeqCst);
        self.set(Mode::Bytewise);
    }

    /// New connections lead to another host and port, as when an address of a cluster moves; those there are end.
    pub(crate) fn lead_to(&self, target: &str) {
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = target.to_owned();
        self.cut();
    }

    /// Ends the connections there are; new ones may come.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// From now on frames that look so end their connection, until this is said again.
    pub(crate) fn strike(&self, strike: Option<Strike>) {
        *self.shared.strike.lock().unwrap_or_else(PoisonError::into_inner) = strike;
    }

    /// Sets a trap, in place of the one that is set.
    pub(crate) fn set_trap(&self, trap: Trap) {
        *self.shared.trap.lock().unwrap_or_else(PoisonError::into_inner) = Some((trap, 0));
    }

    /// What was done so far: connections ended, pieces held up or slowed down, bytes sent alone, traps sprung.
    pub(crate) fn injected(&self) -> usize {
        self.shared.injected.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, address: SocketAddr, mut state: watch::Receiver<State>, shared: Arc<Shared>) {
    let mut listener = Some(listener);
    loop {
        if state.wait_for(|state| state.mode != Mode::Refuse).await.is_err() {
            return;
        }
        let open = match listener.take() {
            Some(listener) => listener,
            None => loop {
                if let Ok(listener) = TcpListener::bind(address).await {
                    break listener;
                }
                tokio::task::yield_now().await;
            },
        };
        loop {
            let mut refusing = state.clone();
            tokio::select! {
                _ = refusing.wait_for(|state| state.mode == Mode::Refuse) => break,
                accepted = open.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(carry(stream, state.clone(), Arc::clone(&shared)));
                    }
                }
            }
        }
    }
}

async fn carry(near: TcpStream, mut state: watch::Receiver<State>, shared: Arc<Shared>) {
    let cuts = state.borrow().cuts;
    let (there, back) = (state.clone(), state.clone());
    let target = shared.target.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let carrying = async {
        let far = TcpStream::connect(target).await?;
        // Small frames must not wait for others here: they do not on a real way either.
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (near_read, near_write) = near.into_split();
        let (far_read, far_write) = far.into_split();
        let spoken = OnceLock::new();
        let pass = |way, from, to, state| {
            let passing = Passing {
                way,
                to,
                state,
                spoken: &spoken,
                shared: &shared,
            };
            passing.run(from)
        };
        tokio::select! {
            done = pass(Way::ToServer, near_read, far_write, there) => done,
            done = pass(Way::ToClient, far_read, near_write, back) => done,
        }
    };
    tokio::select! {
        ended = state.wait_for(|state| state.cuts > cuts || state.mode == Mode::Refuse) => {
            if ended.is_ok() {
                shared.count(1);
            }
        }
        done = carrying => drop(done),
    }
}

/// What is spoken on a connection, which tells where a frame ends.
#[derive(Clone, Copy)]
enum Protocol {
    Amqp,
    Postgres,
    /// Encrypted, say: whatever comes at once is a frame.
    Unknown,
}

impl Protocol {
    /// By the client's first bytes.
    fn of(first: &[u8]) -> Self {
        const VERSION_3: [u8; 4] = [0, 3, 0, 0];
        if first.starts_with(b"AMQP") {
            Self::Amqp
        } else if first.get(4..8) == Some(&VERSION_3) {
            Self::Postgres
        } else {
            Self::Unknown
        }
    }

    /// The length of the frame that these bytes begin with, once that can be told.
    fn frame(self, bytes: &[u8], is_greeting: bool) -> Option<usize> {
        let number = |at: usize| {
            let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_be_bytes(bytes) as usize)
        };
        match self {
            Self::Amqp if is_greeting => Some(8),
            Self::Amqp => Some(7 + number(3)? + 1),
            Self::Postgres if is_greeting => number(0),
            Self::Postgres => Some(1 + number(1)?),
            Self::Unknown => Some(bytes.len()),
        }
    }
}

/// One direction of one connection.
struct Passing<'a> {
    way: Way,
    to: tcp::OwnedWriteHalf,
    state: watch::Receiver<State>,
    spoken: &'a OnceLock<Protocol>,
    shared: &'a Shared,
}

impl Passing<'_> {
    /// Until an end closes, or a trap cuts.
    async fn run(mut self, mut from: tcp::OwnedReadHalf) -> std::io::Result<()> {
        let mut held = Vec::new();
        let mut is_greeting = self.way == Way::ToServer;
        let mut is_silent = false;
        let mut buffer = vec![0; 65_536];
        loop {
            let count = from.read(&mut buffer).await?;
            let arrived = buffer.get(..count).unwrap_or_default();
            if arrived.is_empty() || !self.let_through().await {
                return Ok(());
            }
            if is_silent {
                continue;
            }
            if self.way == Way::ToServer {
                self.spoken.get_or_init(|| Protocol::of(arrived));
            }
            held.extend_from_slice(arrived);
            // A server that speaks first is none of those known here.
            let protocol = self.spoken.get().copied().unwrap_or(Protocol::Unknown);
            while let Some(length) = protocol
                .frame(&held, is_greeting)
                .filter(|length| (1..=held.len()).contains(length))
            {
                let frame: Vec<u8> = held.drain(..length).collect();
                is_greeting = false;
                match self.shared.judge(self.way, &frame) {
                    Fate::Passes => self.write(&frame).await?,
                    Fate::Sprung(passes, then) => {
                        self.write(frame.get(..passes).unwrap_or(&frame)).await?;
                        match then {
                            Then::Cut | Then::CutInside => return Ok(()),
                            Then::Silence => {
                                is_silent = true;
                                break;
                            }
                        }
                    }
                }
            }
        }
    }

    /// Holds up what arrived for as long as the mode says. False when the proxy is gone.
    async fn let_through(&mut self) -> bool {
        let mode = self.state.borrow().mode;
        match mode {
            Mode::Slow(latency) => {
                self.shared.count(1);
                tokio::time::sleep(latency).await;
            }
            Mode::Stall => {
                self.shared.count(1);
            }
            Mode::Open | Mode::Refuse | Mode::Bytewise => {}
        }
        self.state.wait_for(|state| state.mode != Mode::Stall).await.is_ok()
    }

    async fn write(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let is_bytewise = self.state.borrow().mode == Mode::Bytewise;
        if is_bytewise && self.shared.alone.load(Ordering::SeqCst) < ALONE {
            self.shared.alone.fetch_add(frame.len(), Ordering::SeqCst);
            self.shared.count(frame.len());
            for byte in frame {
                self.to.write_all(&[*byte]).await?;
            }
            return Ok(());
        }
        self.to.write_all(frame).await
    }
}
