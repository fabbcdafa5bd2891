//! What stands between the socket and lapin: it reads the frames that go by, and takes out what lapin could not decode.
//!
//! lapin ends the connection over a property, a routing key or an exchange that it can not decode, and so it does at every
//! delivery again; everything that was handed out on that connection is then delivered again too. So such a message gets empty
//! properties and names here, and what it came with is kept until the [`super::intake::Intake`] asks for it by its delivery tag.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::io::{AsyncRead, AsyncWrite};
use futures_util::{Stream, ready};
use lapin::tcp::AsyncTcpStream;

use crate::domain::delivery::Properties;
use crate::domain::wire;

/// Bytes that are read at a time.
const CHUNK: usize = 65_536;

/// Frames that are looked at as a whole are at most this large: four times what the broker uses by default. A larger one goes
/// through as it is.
const HELD_MAX: usize = 524_288;

/// Messages on one connection that are kept for whoever takes them; as many as a quorum queue hands out, on two channels.
/// Each is as large as properties may be, and a little more.
const KEPT_MAX: usize = 4_000;

/// Before a frame's payload: kind, channel, length.
const HEAD: usize = 7;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const FRAME_END: u8 = 0xce;

/// `basic.deliver`.
const DELIVER: [u8; 4] = [0, 60, 0, 60];

/// What a message came with that lapin could not decode.
#[derive(Debug, PartialEq)]
pub(super) struct Undecoded {
    pub(super) properties: Properties,
    /// Exchange and routing key, where one of them can not be decoded.
    pub(super) names: Option<(String, String)>,
}

/// By channel and delivery tag.
#[derive(Debug, Default)]
pub(super) struct Apart {
    kept: Mutex<HashMap<(u16, u64), Undecoded>>,
    /// Nearly always 0: then nobody needs the lock.
    count: AtomicUsize,
}

impl Apart {
    /// What a message came with, if it was taken apart.
    pub(super) fn take(&self, channel: u16, delivery_tag: u64) -> Option<Undecoded> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = kept.remove(&(channel, delivery_tag));
        self.count.store(kept.len(), Ordering::Release);
        taken
    }

    /// A channel begins anew: whatever is kept of an earlier one of this number is nobody's.
    pub(super) fn forget(&self, channel: u16) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(of, _), _| *of != channel);
        self.count.store(kept.len(), Ordering::Release);
    }

    /// False where there is no room: the message must stay as it is.
    fn keep(&self, channel: u16, delivery_tag: u64, one: Undecoded) -> bool {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            return false;
        }
        kept.insert((channel, delivery_tag), one);
        self.count.store(kept.len(), Ordering::Release);
        true
    }
}

/// A message whose content header is still to come.
struct Delivered {
    tag: u64,
    names: Option<(String, String)>,
}

/// Frames as they come, whole ones first.
struct Frames {
    apart: Arc<Apart>,
    buffer: Vec<u8>,
    /// From here on it is still to be handed over ...
    start: usize,
    /// ... up to here, where the first frame begins that is not looked at yet ...
    judged: usize,
    /// ... and here is the end of what has arrived.
    end: usize,
    /// Bytes of the frame at `judged` that pass without a look.
    passing: usize,
    delivered: HashMap<u16, Delivered>,
}

impl Frames {
    fn new(apart: Arc<Apart>) -> Self {
        Self {
            apart,
            buffer: Vec::new(),
            start: 0,
            judged: 0,
            end: 0,
            passing: 0,
            delivered: HashMap::new(),
        }
    }

    /// Room for what comes next.
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.judged, self.end) = (0, 0, 0);
        } else if self.start > 0 && self.buffer.len() - self.end < CHUNK / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.judged -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
        if self.buffer.len() - self.end < CHUNK / 2 {
            self.buffer.resize(self.end + CHUNK, 0);
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// So much has arrived in the room.
    fn arrived(&mut self, count: usize) {
        self.end += count;
        while self.judge() {}
    }

    /// Hands over what was looked at.
    fn give(&mut self, to: &mut [u8]) -> usize {
        let given = to.len().min(self.judged - self.start);
        let from = self.buffer.get(self.start..self.start + given).unwrap_or_default();
        if let Some(to) = to.get_mut(..given) {
            to.copy_from_slice(from);
        }
        self.start += given;
        given
    }

    /// Looks at the next frame; false where that needs more of it.
    fn judge(&mut self) -> bool {
        if self.passing > 0 {
            let passes = self.passing.min(self.end - self.judged);
            self.judged += passes;
            self.passing -= passes;
            return passes > 0;
        }
        let arrived = self.buffer.get(self.judged..self.end).unwrap_or_default();
        let Some(([kind, channel @ .., a, b, c, d], _)) = arrived.split_first_chunk::<HEAD>() else {
            return false;
        };
        let channel = u16::from_be_bytes(*channel);
        let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX);
        let whole = length.saturating_add(HEAD + 1);
        let is_looked_at = whole <= HELD_MAX
            && match *kind {
                HEADER => true,
                METHOD if length < DELIVER.len() => false,
                METHOD => match arrived.get(HEAD..HEAD + DELIVER.len()) {
                    Some(method) => method == DELIVER,
                    None => return false,
                },
                BODY | HEARTBEAT => false,
                // Not AMQP 0-9-1: it is for lapin to say so.
                _ => {
                    self.passing = usize::MAX;
                    return true;
                }
            };
        if !is_looked_at {
            self.passing = whole;
            return true;
        }
        let Some(payload) = arrived.get(HEAD..whole - 1).filter(|_| arrived.len() >= whole) else {
            return false;
        };
        let replaced = match *kind {
            METHOD => delivered(payload).and_then(|(delivered, replaced)| {
                self.delivered.insert(channel, delivered);
                replaced
            }),
            _ => self.delivered.remove(&channel).and_then(|delivered| {
                let (replaced, kept) = header(payload, delivered.names)?;
                self.apart.keep(channel, delivered.tag, kept).then_some(replaced)
            }),
        };
        match replaced {
            None => self.judged += whole,
            Some(payload) => {
                let kind = *kind;
                let frame = frame(kind, channel, &payload);
                let length = frame.len();
                // Never longer than what stood here.
                self.buffer.splice(self.judged..self.judged + whole, frame);
                self.end = self.end + length - whole;
                self.judged += length;
            }
        }
        true
    }
}

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + HEAD + 1);
    frame.push(kind);
    frame.extend(channel.to_be_bytes());
    frame.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend(payload);
    frame.push(FRAME_END);
    frame
}

fn short(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

/// What a `basic.deliver` tells, and the method with empty names where one of its names can not be decoded.
fn delivered(payload: &[u8]) -> Option<(Delivered, Option<Vec<u8>>)> {
    let (consumer, rest) = short(payload.get(DELIVER.len()..)?)?;
    let (tag, rest) = rest.split_first_chunk::<8>()?;
    let tag = u64::from_be_bytes(*tag);
    let (redelivered, rest) = rest.split_first()?;
    let (exchange, rest) = short(rest)?;
    let (routing_key, _) = short(rest)?;
    if std::str::from_utf8(exchange).is_ok() && std::str::from_utf8(routing_key).is_ok() {
        return Some((Delivered { tag, names: None }, None));
    }
    let mut replaced = DELIVER.to_vec();
    replaced.push(u8::try_from(consumer.len()).ok()?);
    replaced.extend(consumer);
    replaced.extend(tag.to_be_bytes());
    replaced.push(*redelivered);
    replaced.extend([0, 0]);
    let names = Some((escaped(exchange), escaped(routing_key)));
    Some((Delivered { tag, names }, Some(replaced)))
}

/// A content header without properties, and what it came with; None where lapin can decode it, and its names too.
fn header(payload: &[u8], names: Option<(String, String)>) -> Option<(Vec<u8>, Undecoded)> {
    // Class, weight and the body's length.
    let (head, list) = payload.split_at_checked(12)?;
    if names.is_none() && wire::is_plain(list) {
        return None;
    }
    let properties = wire::read(list);
    Some(([head, &[0, 0]].concat(), Undecoded { properties, names }))
}

/// A name with `\xff` for each byte that is no text, and no longer than a name may be.
fn escaped(name: &[u8]) -> String {
    const NAME_MAX: usize = 255;
    let mut text = String::new();
    for chunk in name.utf8_chunks() {
        let invalid = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}"));
        let pieces = chunk.valid().chars().map(String::from).chain(invalid);
        for piece in pieces {
            if text.len() + piece.len() > NAME_MAX {
                return text;
            }
            text.push_str(&piece);
        }
    }
    text
}

/// A stream to the broker, through the sieve.
pub(super) struct Sieve<S> {
    inner: S,
    frames: Frames,
    heard: Arc<Heard>,
}

/// When the peer was heard last.
#[derive(Debug)]
pub(super) struct Heard {
    begun: Instant,
    /// Milliseconds after that.
    last: AtomicU64,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            last: AtomicU64::new(0),
        }
    }
}

impl Heard {
    fn now(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// For so long nothing has come.
    pub(super) fn silence(&self) -> Duration {
        self.begun
            .elapsed()
            .saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

impl<S> Sieve<S> {
    pub(super) fn new(inner: S, apart: Arc<Apart>) -> Self {
        Self {
            inner,
            frames: Frames::new(apart),
            heard: Arc::default(),
        }
    }

    /// Whatever comes is noted there.
    pub(super) fn heard_by(mut self, heard: Arc<Heard>) -> Self {
        self.heard = heard;
        self
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sieve<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { inner, frames, heard } = self.get_mut();
        loop {
            let given = frames.give(to);
            if given > 0 || to.is_empty() {
                return Poll::Ready(Ok(given));
            }
            // At the end of the stream a frame that is not whole is worth nothing.
            match ready!(Pin::new(&mut *inner).poll_read(context, frames.room()))? {
                0 => return Poll::Ready(Ok(0)),
                count => {
                    heard.now();
                    frames.arrived(count);
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sieve<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

type Tcp = <Tokio as Reactor>::TcpStream;

/// tokio, with streams that lapin reads through the sieve.
#[derive(Clone, Debug)]
pub(super) struct Sieving(Tokio);

impl Sieving {
    /// The runtime that this is called in.
    pub(super) fn runtime() -> Runtime<RuntimeParts<Tokio, Sieving>> {
        let tokio = Tokio::current();
        Runtime::new(RuntimeParts::new(tokio.clone(), Sieving(tokio)))
    }
}

impl Reactor for Sieving {
    /// With TLS inside.
    type TcpStream = Sieve<AsyncTcpStream<Tcp>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// lapin asks for no such thing.
    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = std::time::Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: std::net::SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move {
            let stream = AsyncTcpStream::Plain(connecting.await?);
            Ok(Sieve::new(stream, Arc::default()))
        }
    }
}

#[cfg(test)]
mod tests;
