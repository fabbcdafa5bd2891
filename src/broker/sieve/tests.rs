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
        .then(|| crate::broker::properties::properties_from(&properties))
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
