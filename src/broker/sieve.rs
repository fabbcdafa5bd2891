//! What stands between the socket and lapin: it reads the frames that go by, and takes out what lapin could not decode.
//!
//! lapin ends the connection over a property, a routing key or an exchange that it can not decode, and so it does at every
//! delivery again; everything that was handed out on that connection is then delivered again too. So such a message gets empty
//! properties and names here, and what it came with is kept until the [`super::intake::Intake`] asks for it by its delivery tag.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

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
pub(super) struct Kept {
    pub(super) properties: Properties,
    /// Exchange and routing key, where one of them can not be decoded.
    pub(super) names: Option<(String, String)>,
}

/// By channel and delivery tag.
#[derive(Debug, Default)]
pub(super) struct Apart {
    kept: Mutex<HashMap<(u16, u64), Kept>>,
    /// Nearly always 0: then nobody needs the lock.
    count: AtomicUsize,
}

impl Apart {
    /// What a message came with, if it was taken apart.
    pub(super) fn take(&self, channel: u16, delivery_tag: u64) -> Option<Kept> {
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
    fn keep(&self, channel: u16, delivery_tag: u64, one: Kept) -> bool {
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
fn header(payload: &[u8], names: Option<(String, String)>) -> Option<(Vec<u8>, Kept)> {
    // Class, weight and the body's length.
    let (head, list) = payload.split_at_checked(12)?;
    if names.is_none() && wire::is_plain(list) {
        return None;
    }
    let properties = wire::read(list);
    Some(([head, &[0, 0]].concat(), Kept { properties, names }))
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
}

impl<S> Sieve<S> {
    pub(super) fn new(inner: S, apart: Arc<Apart>) -> Self {
        Self {
            inner,
            frames: Frames::new(apart),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sieve<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { inner, frames } = self.get_mut();
        loop {
            let given = frames.give(to);
            if given > 0 || to.is_empty() {
                return Poll::Ready(Ok(given));
            }
            // At the end of the stream a frame that is not whole is worth nothing.
            match ready!(Pin::new(&mut *inner).poll_read(context, frames.room()))? {
                0 => return Poll::Ready(Ok(0)),
                count => frames.arrived(count),
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
mod tests {
    use futures_util::io::{AsyncReadExt, Cursor};
    use proptest::prelude::*;

    use super::*;
    use crate::broker::testing::UNDECODABLE;
    use crate::domain::delivery::{Bytes, HeaderValue, Headers};

    fn short(bytes: &[u8]) -> Vec<u8> {
        [&[u8::try_from(bytes.len()).expect("short")], bytes].concat()
    }

    fn deliver(channel: u16, tag: u64, exchange: &[u8], key: &[u8]) -> Vec<u8> {
        let payload = [
            &DELIVER[..],
            &short(b"ctag"),
            &tag.to_be_bytes(),
            &[1],
            &short(exchange),
            &short(key),
        ]
        .concat();
        frame(METHOD, channel, &payload)
    }

    fn content(channel: u16, list: &[u8], body: &[u8]) -> Vec<u8> {
        let size = u64::try_from(body.len()).expect("few").to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], list].concat();
        [frame(HEADER, channel, &header), frame(BODY, channel, body)].concat()
    }

    /// A message id that can not be decoded, and a delivery mode.
    fn wrong() -> Vec<u8> {
        [&[0b0001_0000, 0b1000_0000, 2][..], &short(UNDECODABLE)].concat()
    }

    /// The same as one that can.
    fn right() -> Vec<u8> {
        [&[0b0001_0000, 0b1000_0000, 2][..], &short(b"id")].concat()
    }

    /// What comes out, read in pieces of this size.
    async fn sieved(apart: &Arc<Apart>, bytes: &[u8], piece: usize) -> Vec<u8> {
        struct Pieces<'a>(Cursor<&'a [u8]>, usize);
        impl AsyncRead for Pieces<'_> {
            fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
                let most = self.1.min(to.len());
                Pin::new(&mut self.0).poll_read(cx, to.get_mut(..most).expect("shorter"))
            }
        }
        let mut sieve = Sieve::new(Pieces(Cursor::new(bytes), piece), Arc::clone(apart));
        let mut out = Vec::new();
        let mut some = vec![0; piece.clamp(3, 70_000)];
        loop {
            match sieve.read(&mut some).await.expect("read") {
                0 => return out,
                count => out.extend(some.get(..count).expect("so many")),
            }
        }
    }

    #[tokio::test]
    async fn what_can_not_be_decoded_is_taken_out_and_the_rest_stays_as_it_is() {
        let large = vec![b'x'; 200_000];
        let plain = [
            frame(HEARTBEAT, 0, &[]),
            // A method that is too short to be any, and one of another kind.
            frame(METHOD, 1, &[0, 60]),
            frame(METHOD, 1, &[0, 60, 0, 80, 1, 2, 3]),
            deliver(1, 1, b"e", b"k"),
            content(1, &right(), &large),
            // Not asked for by a delivery: nobody would take what it came with.
            content(3, &wrong(), b"returned"),
        ]
        .concat();
        let mixed = [
            deliver(1, 2, b"e", b"k"),
            deliver(2, 2, b"e", b"acme\xff.allocation.update"),
            content(2, &right(), b"two"),
            content(1, &wrong(), b"one"),
        ]
        .concat();
        let cleaned = [
            deliver(1, 2, b"e", b"k"),
            deliver(2, 2, b"", b""),
            content(2, &[0, 0], b"two"),
            content(1, &[0, 0], b"one"),
        ]
        .concat();
        let (all, expected) = (
            [&plain[..], &mixed, &plain].concat(),
            [&plain[..], &cleaned, &plain].concat(),
        );
        for piece in [1, 2, 7, 1_000, 65_536, 1 << 20] {
            let apart = Arc::default();
            assert!(sieved(&apart, &all, piece).await == expected, "{piece}");
            let one = apart.take(1, 2).expect("kept");
            assert_eq!(one.names, None);
            assert_eq!(one.properties.delivery_mode, Some(2));
            assert_eq!(one.properties.undecodable, Some(Bytes(wrong())));
            let two = apart.take(2, 2).expect("kept");
            assert_eq!(
                two.names,
                Some(("e".to_owned(), "acme\\xff.allocation.update".to_owned()))
            );
            assert_eq!(two.properties.message_id.as_deref(), Some("id"));
            assert_eq!(apart.take(1, 1), None);
            assert_eq!(apart.count.load(Ordering::SeqCst), 0);
        }
    }

    #[tokio::test]
    async fn whatever_comes_goes_through_in_the_end() {
        // No protocol of ours; and a frame that claims to be larger than any.
        let answer = b"HTTP/1.1 400 Bad Request".to_vec();
        let huge = [&[HEADER, 0, 1][..], &u32::MAX.to_be_bytes(), &[7; 1_000]].concat();
        for bytes in [answer, huge] {
            assert_eq!(sieved(&Arc::default(), &bytes, 100).await, bytes);
        }
        // Of a frame that never becomes whole nothing comes.
        let cut = content(1, &right(), b"body");
        let out = sieved(&Arc::default(), cut.get(..15).expect("longer"), 100).await;
        assert!(out.is_empty(), "{out:?}");
    }

    #[tokio::test]
    async fn what_is_kept_has_a_bound_and_goes_with_its_channel() {
        let apart = Arc::default();
        let many = KEPT_MAX + 2;
        let all: Vec<u8> = (0..many)
            .flat_map(|tag| [deliver(1, tag as u64, b"", b"k"), content(1, &wrong(), b"")].concat())
            .collect();
        let out = sieved(&apart, &all, 65_536).await;
        let whole = [deliver(1, 0, b"", b"k"), content(1, &wrong(), b"")].concat().len();
        assert!(
            out.ends_with(all.get(all.len() - 2 * whole..).expect("two")),
            "as they are"
        );
        assert!(apart.take(1, 7).is_some() && apart.take(1, 7).is_none());
        apart.forget(2);
        assert_eq!(apart.count.load(Ordering::SeqCst), KEPT_MAX - 1);
        apart.forget(1);
        assert_eq!(apart.count.load(Ordering::SeqCst), 0);
        assert_eq!(apart.take(1, 8), None);
    }

    #[test]
    fn a_name_is_text_and_no_longer_than_a_name() {
        assert_eq!(escaped("\u{e4}.b".as_bytes()), "\u{e4}.b");
        assert_eq!(escaped(b"\xfea\xff"), "\\xfea\\xff");
        let long = escaped(&[0xff; 255]);
        assert_eq!(long.len(), 252);
        assert!(long.chars().all(|letter| "\\xf".contains(letter)));
    }

    /// What lapin makes of a property list, without ending a connection.
    fn by_lapin(list: &[u8]) -> Option<Properties> {
        let (rest, properties) = lapin::protocol::basic::parse_properties(list).ok()?;
        rest.is_empty()
            .then(|| crate::broker::intake::properties_from(&properties))
    }

    fn lists() -> impl Strategy<Value = Vec<u8>> {
        let name = proptest::collection::vec(prop_oneof![Just(b'a'), any::<u8>()], 0..4);
        let value = prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<i32>().prop_map(|value| [&b"I"[..], &value.to_be_bytes()].concat()),
            proptest::collection::vec(any::<u8>(), 0..9).prop_map(|bytes| {
                let length = u32::try_from(bytes.len()).expect("few").to_be_bytes();
                [&b"S"[..], &length, &bytes].concat()
            }),
        ];
        let table = proptest::collection::vec((name.clone(), value), 0..4).prop_map(|entries| {
            let bytes: Vec<u8> = entries
                .iter()
                .flat_map(|(name, value)| [short(name), value.clone()].concat())
                .collect();
            [&u32::try_from(bytes.len()).expect("few").to_be_bytes()[..], &bytes].concat()
        });
        (name, table, any::<u8>())
            .prop_map(|(name, table, octet)| [&[0b1011_0000, 0][..], &short(&name), &table, &[octet]].concat())
    }

    proptest! {
        /// The sieve lets through exactly what lapin reads, and reads it as lapin does.
        #[test]
        fn the_sieve_and_lapin_agree(list in lists()) {
            let lapin = by_lapin(&list);
            prop_assert_eq!(wire::is_plain(&list), lapin.is_some());
            if let Some(properties) = lapin {
                prop_assert_eq!(wire::read(&list), properties);
            }
        }
    }

    #[test]
    fn every_kind_of_value_is_read_as_lapin_reads_it() {
        let headers = Headers::from([
            ("bytes".to_owned(), HeaderValue::ByteArray(Bytes(vec![0, 255]))),
            ("decimal".to_owned(), HeaderValue::Decimal { scale: 2, value: 7 }),
            ("float".to_owned(), HeaderValue::Float(0.1_f32.to_bits())),
            (
                "list".to_owned(),
                HeaderValue::Array(vec![HeaderValue::Void, HeaderValue::ShortInt(-2)]),
            ),
            (
                "table".to_owned(),
                HeaderValue::Table(Headers::from([("t".to_owned(), HeaderValue::Boolean(true))])),
            ),
            ("time".to_owned(), HeaderValue::Timestamp(1)),
            ("u".to_owned(), HeaderValue::ShortUInt(9)),
        ]);
        let table = wire::write_headers(&headers).expect("short names");
        let length = u32::try_from(table.len()).expect("few").to_be_bytes();
        let list = [&[0x20, 0][..], &length, &table].concat();
        assert!(wire::is_plain(&list));
        assert_eq!(by_lapin(&list), Some(wire::read(&list)));
        assert_eq!(by_lapin(&list).and_then(|properties| properties.headers), Some(headers));
    }
}
