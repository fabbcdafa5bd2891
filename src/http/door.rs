//! Who is let in. Every connection has a bound in time, and together they have one in number. Whoever comes is let in: where
//! there is no room, another that asks for nothing goes, the one that waits longest first. So a full house keeps no probe
//! out.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};

use crate::{config::HttpSettings, telemetry::Signal};

/// Who reads nothing of its answer for so long goes before one that reads.
const STALLED: Duration = Duration::from_secs(1);

/// How often it is looked whether everybody has gone.
const LOOK: Duration = Duration::from_millis(20);

/// Connections that are closed when file descriptors run out.
const SHED_AT_ONCE: usize = 8;

/// The bounds of the connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionBounds {
    pub(crate) connections: usize,
    pub(crate) per_address: usize,
    pub(crate) head: Duration,
    pub(crate) idle: Duration,
    pub(crate) answer: Duration,
}

impl ConnectionBounds {
    pub(crate) fn of(settings: &HttpSettings) -> Self {
        Self {
            connections: settings.connections_max,
            per_address: settings.connections_per_address_max,
            head: settings.head_timeout,
            idle: settings.idle_timeout,
            answer: settings.answer_timeout,
        }
    }
}

/// The connections that are open.
#[derive(Debug)]
pub(crate) struct Connections {
    bounds: ConnectionBounds,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// In the order in which they came.
    connections: BTreeMap<u64, (IpAddr, Arc<Pulse>)>,
}

impl Connections {
    pub(crate) fn new(bounds: ConnectionBounds) -> Self {
        Self {
            bounds,
            open: Mutex::default(),
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one in, and another one go where there is no room.
    pub(crate) fn admit(self: &Arc<Self>, address: IpAddr) -> Visit {
        let address = network_of(address);
        let pulse = Arc::new(Pulse::new(address));
        let mut open = self.open();
        let here = open.connections.values().filter(|(from, _)| *from == address).count();
        let shed = if here >= self.bounds.per_address {
            open.shed(|from| from == address)
        } else if open.connections.len() >= self.bounds.connections {
            let crowd = open.crowd();
            open.shed(|from| Some(from) == crowd)
        } else {
            false
        };
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, (address, Arc::clone(&pulse)));
        drop(open);
        if shed {
            Signal::HttpConnectionShed.emit();
        }
        Visit {
            door: Arc::clone(self),
            number,
            pulse,
        }
    }

    /// The process has no file descriptor left: a few give back theirs, since the rest of the process needs some too. Says
    /// whether there were any.
    pub(crate) fn shed_some(&self) -> bool {
        let shed = (0..SHED_AT_ONCE).filter(|_| self.open().shed(|_| true)).count();
        (0..shed).for_each(|_| Signal::HttpConnectionShed.emit());
        shed > 0
    }

    /// Waits until nobody is there.
    pub(crate) async fn empty(&self) {
        while !self.open().connections.is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// One that has stopped reading its answer gives up its place.
    pub(crate) fn shed_stalled(&self) {
        let now = Instant::now();
        let mut open = self.open();
        let stalled = open
            .connections
            .iter()
            .filter(|(_, (_, pulse))| pulse.is_asked() && pulse.quiet(now) > STALLED)
            .max_by_key(|(_, (_, pulse))| pulse.quiet(now))
            .map(|(number, _)| *number);
        if let Some(number) = stalled {
            open.dismiss(number);
            drop(open);
            Signal::HttpConnectionShed.emit();
        }
    }
}

impl Open {
    /// The address with the most connections.
    fn crowd(&self) -> Option<IpAddr> {
        let mut counts = BTreeMap::<IpAddr, usize>::new();
        for (address, _) in self.connections.values() {
            *counts.entry(*address).or_default() += 1;
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(address, _)| address)
    }

    /// Those that ask for nothing go first, and the longest quiet of them; then those that read nothing.
    fn shed(&mut self, of: impl Fn(IpAddr) -> bool) -> bool {
        let now = Instant::now();
        let number = self
            .connections
            .iter()
            .filter(|(_, (address, _))| of(*address))
            // Of equals the first is taken, which came first.
            .min_by_key(|(_, (_, pulse))| (pulse.is_asked(), std::cmp::Reverse(pulse.quiet(now))))
            .map(|(number, _)| *number);
        number.is_some_and(|number| self.dismiss(number))
    }

    fn dismiss(&mut self, number: u64) -> bool {
        match self.connections.remove(&number) {
            Some((_, pulse)) => {
                pulse.dismissed.notify_one();
                true
            }
            None => false,
        }
    }
}

/// Whom a bound counts as one: of IPv6 a whole /64, which any host may have.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6([a, b, c, d, 0, 0, 0, 0].into())
        }
    }
}

/// One connection's place; it goes when this is dropped.
pub(crate) struct Visit {
    door: Arc<Connections>,
    number: u64,
    pub(crate) pulse: Arc<Pulse>,
}

impl Visit {
    /// Waits until this one has to go: another needs its place, or it was too slow.
    pub(crate) async fn over(&self) {
        let slow = async {
            while let Some(until) = self.pulse.until(&self.door.bounds) {
                tokio::time::sleep_until(until).await;
            }
        };
        tokio::select! {
            () = self.pulse.dismissed.notified() => (),
            () = slow => (),
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.door.open().connections.remove(&self.number);
    }
}

/// What a connection does, as far as its bounds ask. Times are milliseconds since it came.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// Whose it is, as a bound counts them.
    pub(crate) network: IpAddr,
    came: Instant,
    /// A request is in hand, and its answer is not handed over as a whole.
    asked: AtomicBool,
    /// When it asked.
    asked_at: AtomicU64,
    /// The first byte since the last request; 0 where there is none.
    heard_at: AtomicU64,
    /// The last time that it came, asked, or took some of an answer.
    moved_at: AtomicU64,
    dismissed: Notify,
}

impl Pulse {
    fn new(network: IpAddr) -> Self {
        Self {
            network,
            came: Instant::now(),
            asked: AtomicBool::new(false),
            asked_at: AtomicU64::new(0),
            // Who has just come has a request to send.
            heard_at: AtomicU64::new(1),
            moved_at: AtomicU64::new(0),
            dismissed: Notify::new(),
        }
    }

    fn now(&self) -> u64 {
        // Never 0, which stands for nothing.
        u64::try_from(self.came.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .saturating_add(1)
    }

    pub(crate) fn asks(&self) {
        let now = self.now();
        self.asked_at.store(now, Ordering::Release);
        self.moved_at.store(now, Ordering::Release);
        self.heard_at.store(0, Ordering::Release);
        self.asked.store(true, Ordering::Release);
    }

    /// All of the request is here, its body too: what comes now is another one.
    pub(crate) fn has_all(&self) {
        self.heard_at.store(0, Ordering::Release);
    }

    fn is_answered(&self) {
        self.moved_at.store(self.now(), Ordering::Release);
        self.asked.store(false, Ordering::Release);
    }

    fn hears(&self) {
        // Only the first byte counts, or one byte a second would keep a connection for ever. Nobody else writes it.
        if self.heard_at.load(Ordering::Acquire) == 0 {
            self.heard_at.store(self.now(), Ordering::Release);
        }
    }

    fn moves(&self) {
        self.moved_at.store(self.now(), Ordering::Release);
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// How long nothing has moved.
    fn quiet(&self, now: Instant) -> Duration {
        let moved = Duration::from_millis(self.moved_at.load(Ordering::Acquire));
        now.saturating_duration_since(self.came).saturating_sub(moved)
    }

    /// When this one has to be looked at again; None: it was too slow.
    fn until(&self, bounds: &ConnectionBounds) -> Option<Instant> {
        let at = |time: &AtomicU64| Duration::from_millis(time.load(Ordering::Acquire));
        let heard = at(&self.heard_at);
        let most = if self.is_asked() {
            at(&self.asked_at) + bounds.answer
        } else if heard.is_zero() {
            at(&self.moved_at) + bounds.idle
        } else {
            // What came while an answer was written counts from the end of that.
            heard.max(at(&self.moved_at)) + bounds.head
        };
        let until = self.came + most;
        (until > Instant::now()).then_some(until)
    }
}

/// A connection whose bytes are noticed.
pub(crate) struct Watched<S> {
    pub(crate) stream: S,
    pub(crate) pulse: Arc<Pulse>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, into);
        if into.filled().len() > before {
            self.pulse.hears();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        if matches!(polled, Poll::Ready(Ok(1..))) {
            self.pulse.moves();
        }
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        if matches!(polled, Poll::Ready(Ok(1..))) {
            self.pulse.moves();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// An answer whose end is noticed.
pub(crate) struct AnswerBody {
    body: Body,
    pulse: Arc<Pulse>,
}

impl AnswerBody {
    pub(crate) fn new(body: Body, pulse: Arc<Pulse>) -> Self {
        Self { body, pulse }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.pulse.is_answered();
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
