//! A property list as AMQP 0-9-1 writes it: whether every reader can read it, what can be read of one that is not so, and
//! header tables as bytes.
//!
//! RabbitMQ passes a property list on as it came. A client library that can not decode one ends its connection, whoever else
//! waits behind; so such a list is read here instead, as far as it can be.

use super::delivery::{Bytes, HeaderValue, Headers, PROPERTIES_MAX, Properties};

/// Tables and arrays inside each other that a list may have for [`is_plain`], and that [`read`] walks, the outermost included.
/// Every walk over a value needs stack for each level, and `serde_json` reads no more than 128 levels of JSON, two for each of
/// these.
pub const DEPTH_MAX: usize = 32;

/// What stands in for deeper ones: by itself above the limit for properties and headers together
/// ([`PROPERTIES_MAX`]), so that the message is judged too large.
const TOO_DEEP_BYTES: usize = 16_385;

/// Bytes of an undecodable list that are kept: more than a message may have, its flags and the broker's own count of deliveries
/// not counted, so that what is larger is judged too large.
const KEPT_MAX: usize = PROPERTIES_MAX + 64;

/// Of a list's flags, the properties that there are; the lowest two say nothing that anyone understands.
const FLAGS: u16 = 0xfffc;

/// What stands in for a header that is nested too deep.
pub fn too_deep() -> HeaderValue {
    HeaderValue::ByteArray(Bytes(vec![0; TOO_DEEP_BYTES]))
}

/// Bytes that are read from the front.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn bytes<const LEN: usize>(&mut self) -> Option<[u8; LEN]> {
        let (head, rest) = self.0.split_first_chunk::<LEN>()?;
        self.0 = rest;
        Some(*head)
    }

    fn short(&mut self) -> Option<&'a [u8]> {
        let [len] = self.bytes()?;
        self.take(usize::from(len))
    }

    fn long(&mut self) -> Option<&'a [u8]> {
        let len = u32::from_be_bytes(self.bytes()?);
        self.take(usize::try_from(len).ok()?)
    }
}

fn is_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok()
}

fn text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

/// Flags of a property, in the order in which they are written.
#[derive(Clone, Copy)]
enum Kind {
    Short(fn(&mut Properties) -> &mut Option<String>),
    Headers,
    Octet(fn(&mut Properties) -> &mut Option<u8>),
    Timestamp,
}

const ORDER: [Kind; 14] = [
    Kind::Short(|properties| &mut properties.content_type),
    Kind::Short(|properties| &mut properties.content_encoding),
    Kind::Headers,
    Kind::Octet(|properties| &mut properties.delivery_mode),
    Kind::Octet(|properties| &mut properties.priority),
    Kind::Short(|properties| &mut properties.correlation_id),
    Kind::Short(|properties| &mut properties.reply_to),
    Kind::Short(|properties| &mut properties.expiration),
    Kind::Short(|properties| &mut properties.message_id),
    Kind::Timestamp,
    Kind::Short(|properties| &mut properties.kind),
    Kind::Short(|properties| &mut properties.user_id),
    Kind::Short(|properties| &mut properties.app_id),
    Kind::Short(|properties| &mut properties.cluster_id),
];

/// The kinds that a list's flags name.
fn kinds(flags: u16) -> impl Iterator<Item = Kind> {
    let masks = std::iter::successors(Some(1_u16 << 15), |mask| Some(*mask >> 1));
    masks
        .zip(ORDER)
        .filter(move |(mask, _)| flags & mask != 0)
        .map(|(_, kind)| kind)
}

/// Whether every reader can read this list (flags first), and with little stack.
pub fn is_plain(list: &[u8]) -> bool {
    let mut reader = Reader(list);
    let plain = || {
        let flags = u16::from_be_bytes(reader.bytes()?);
        if flags & !FLAGS != 0 {
            return None;
        }
        for kind in kinds(flags) {
            match kind {
                Kind::Short(_) => is_text(reader.short()?).then_some(())?,
                Kind::Headers => is_plain_table(reader.long()?, 1).then_some(())?,
                Kind::Octet(_) => drop(reader.bytes::<1>()?),
                Kind::Timestamp => drop(reader.bytes::<8>()?),
            }
        }
        reader.0.is_empty().then_some(())
    };
    let mut plain = plain;
    plain().is_some()
}

fn is_plain_table(bytes: &[u8], depth: usize) -> bool {
    let mut reader = Reader(bytes);
    while !reader.0.is_empty() {
        if !reader.short().is_some_and(is_text) || !is_plain_value(&mut reader, depth) {
            return false;
        }
    }
    true
}

fn is_plain_array(bytes: &[u8], depth: usize) -> bool {
    let mut reader = Reader(bytes);
    while !reader.0.is_empty() {
        if !is_plain_value(&mut reader, depth) {
            return false;
        }
    }
    true
}

/// A value in a table or an array of this depth.
fn is_plain_value(reader: &mut Reader<'_>, depth: usize) -> bool {
    let inner = depth.saturating_add(1);
    let plain = match reader.bytes() {
        Some([b't' | b'b' | b'B']) => reader.take(1),
        Some([b's' | b'U' | b'u']) => reader.take(2),
        Some([b'I' | b'i' | b'f']) => reader.take(4),
        Some([b'L' | b'l' | b'd' | b'T']) => reader.take(8),
        Some([b'D']) => reader.take(5),
        Some([b'S' | b'x']) => reader.long(),
        Some([b'A']) => reader
            .long()
            .filter(|bytes| depth < DEPTH_MAX && is_plain_array(bytes, inner)),
        Some([b'F']) => reader
            .long()
            .filter(|bytes| depth < DEPTH_MAX && is_plain_table(bytes, inner)),
        Some([b'V']) => Some(&[][..]),
        Some(_) | None => None,
    };
    plain.is_some()
}

/// What can be read of a list (flags first), and the list itself where not everything can.
pub fn read(list: &[u8]) -> Properties {
    let mut properties = Properties::default();
    if read_into(&mut properties, &mut Reader(list)).is_none() {
        let kept = list.get(..KEPT_MAX).unwrap_or(list);
        properties.undecodable = Some(Bytes(kept.to_vec()));
    }
    properties
}

/// None where something was left out.
fn read_into(properties: &mut Properties, reader: &mut Reader<'_>) -> Option<()> {
    let flags = u16::from_be_bytes(reader.bytes()?);
    let mut whole = flags & !FLAGS == 0;
    for kind in kinds(flags) {
        match kind {
            Kind::Short(field) => {
                let value = text(reader.short()?);
                whole &= value.is_some();
                *field(properties) = value;
            }
            Kind::Headers => {
                let (headers, is_whole) = table(reader.long()?, 1);
                whole &= is_whole;
                properties.headers = Some(headers);
            }
            Kind::Octet(field) => {
                let [value] = reader.bytes()?;
                *field(properties) = Some(value);
            }
            Kind::Timestamp => properties.timestamp = Some(u64::from_be_bytes(reader.bytes()?)),
        }
    }
    (whole && reader.0.is_empty()).then_some(())
}

/// A header table from its bytes, without the length before them; nothing unless all of it can be read.
pub fn headers(bytes: &[u8]) -> Option<Headers> {
    let (headers, whole) = table(bytes, 1);
    whole.then_some(headers)
}

/// What can be read of a table, and whether that is all.
fn table(bytes: &[u8], depth: usize) -> (Headers, bool) {
    let mut reader = Reader(bytes);
    let mut headers = Headers::new();
    let mut whole = true;
    while !reader.0.is_empty() {
        let read = reader
            .short()
            .and_then(|name| Some((name, value(&mut reader, depth, &mut whole)?)));
        // Where the next one begins is not known.
        let Some((name, value)) = read else {
            return (headers, false);
        };
        match text(name) {
            Some(name) => drop(headers.insert(name, value)),
            None => whole = false,
        }
    }
    (headers, whole)
}

fn array(bytes: &[u8], depth: usize) -> (Vec<HeaderValue>, bool) {
    let mut reader = Reader(bytes);
    let mut values = Vec::new();
    let mut whole = true;
    while !reader.0.is_empty() {
        let Some(value) = value(&mut reader, depth, &mut whole) else {
            return (values, false);
        };
        values.push(value);
    }
    (values, whole)
}

/// A value in a table or an array of this depth; `whole` is what it was unless something of the value was left out.
fn value(reader: &mut Reader<'_>, depth: usize, whole: &mut bool) -> Option<HeaderValue> {
    let inner = depth.saturating_add(1);
    let [kind] = reader.bytes()?;
    Some(match kind {
        b't' => HeaderValue::Boolean(reader.bytes()? != [0]),
        b'b' => HeaderValue::ShortShortInt(i8::from_be_bytes(reader.bytes()?)),
        b'B' => HeaderValue::ShortShortUInt(u8::from_be_bytes(reader.bytes()?)),
        // As RabbitMQ has it: the specification's own letters are others.
        b's' | b'U' => HeaderValue::ShortInt(i16::from_be_bytes(reader.bytes()?)),
        b'u' => HeaderValue::ShortUInt(u16::from_be_bytes(reader.bytes()?)),
        b'I' => HeaderValue::LongInt(i32::from_be_bytes(reader.bytes()?)),
        b'i' => HeaderValue::LongUInt(u32::from_be_bytes(reader.bytes()?)),
        b'L' | b'l' => HeaderValue::LongLongInt(i64::from_be_bytes(reader.bytes()?)),
        b'f' => HeaderValue::Float(u32::from_be_bytes(reader.bytes()?)),
        b'd' => HeaderValue::Double(u64::from_be_bytes(reader.bytes()?)),
        b'T' => HeaderValue::Timestamp(u64::from_be_bytes(reader.bytes()?)),
        b'D' => {
            let [scale] = reader.bytes()?;
            let value = u32::from_be_bytes(reader.bytes()?);
            HeaderValue::Decimal { scale, value }
        }
        b'S' => HeaderValue::LongString(Bytes(reader.long()?.to_vec())),
        b'x' => HeaderValue::ByteArray(Bytes(reader.long()?.to_vec())),
        b'A' | b'F' if depth >= DEPTH_MAX => {
            reader.long()?;
            too_deep()
        }
        b'A' => {
            let (values, is_whole) = array(reader.long()?, inner);
            *whole &= is_whole;
            HeaderValue::Array(values)
        }
        b'F' => {
            let (headers, is_whole) = table(reader.long()?, inner);
            *whole &= is_whole;
            HeaderValue::Table(headers)
        }
        b'V' => HeaderValue::Void,
        _ => return None,
    })
}

/// A header table's bytes, without the length before them; None where a name or a value is longer than AMQP can say.
pub fn write_headers(headers: &Headers) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for (name, value) in headers {
        bytes.push(u8::try_from(name.len()).ok()?);
        bytes.extend(name.as_bytes());
        write_value(&mut bytes, value)?;
    }
    Some(bytes)
}

fn write_value(to: &mut Vec<u8>, value: &HeaderValue) -> Option<()> {
    fn write<const LEN: usize>(to: &mut Vec<u8>, kind: u8, value: [u8; LEN]) {
        to.push(kind);
        to.extend(value);
    }
    fn write_long(to: &mut Vec<u8>, kind: u8, value: &[u8]) -> Option<()> {
        write(to, kind, u32::try_from(value.len()).ok()?.to_be_bytes());
        to.extend(value);
        Some(())
    }
    match value {
        HeaderValue::Boolean(value) => write(to, b't', [u8::from(*value)]),
        HeaderValue::ShortShortInt(value) => write(to, b'b', value.to_be_bytes()),
        HeaderValue::ShortShortUInt(value) => write(to, b'B', value.to_be_bytes()),
        HeaderValue::ShortInt(value) => write(to, b's', value.to_be_bytes()),
        HeaderValue::ShortUInt(value) => write(to, b'u', value.to_be_bytes()),
        HeaderValue::LongInt(value) => write(to, b'I', value.to_be_bytes()),
        HeaderValue::LongUInt(value) => write(to, b'i', value.to_be_bytes()),
        HeaderValue::LongLongInt(value) => write(to, b'l', value.to_be_bytes()),
        HeaderValue::Float(bits) => write(to, b'f', bits.to_be_bytes()),
        HeaderValue::Double(bits) => write(to, b'd', bits.to_be_bytes()),
        HeaderValue::Timestamp(value) => write(to, b'T', value.to_be_bytes()),
        HeaderValue::Decimal { scale, value } => {
            write(to, b'D', [*scale]);
            to.extend(value.to_be_bytes());
        }
        HeaderValue::LongString(bytes) => write_long(to, b'S', &bytes.0)?,
        HeaderValue::ByteArray(bytes) => write_long(to, b'x', &bytes.0)?,
        HeaderValue::Array(values) => {
            let mut bytes = Vec::new();
            for value in values {
                write_value(&mut bytes, value)?;
            }
            write_long(to, b'A', &bytes)?;
        }
        HeaderValue::Table(headers) => write_long(to, b'F', &write_headers(headers)?)?,
        HeaderValue::Void => write(to, b'V', []),
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn short(bytes: &[u8]) -> Vec<u8> {
        [&[u8::try_from(bytes.len()).expect("short")], bytes].concat()
    }

    fn long(bytes: &[u8]) -> Vec<u8> {
        let len = u32::try_from(bytes.len()).expect("few").to_be_bytes();
        [&len, bytes].concat()
    }

    /// A list of these headers alone.
    fn list(table: &[u8]) -> Vec<u8> {
        [&[0x20, 0][..], &long(table)].concat()
    }

    #[test]
    fn what_can_be_read_is_read_and_the_rest_is_kept() {
        // Content type, headers, delivery mode, message id, user id.
        let flags = [0b1011_0000, 0b1001_0000];
        let wrong = b"\xff\xfe";
        let headers = [
            &short(b"good")[..],
            b"S",
            &long(b"text"),
            &short(wrong),
            b"t\x01",
            &short(b"more"),
            b"V",
        ]
        .concat();
        let parts = [
            &flags[..],
            &short(wrong),
            &long(&headers),
            &[2],
            &short(b"id"),
            &short(wrong),
        ];
        let all = parts.concat();
        assert!(!is_plain(&all));
        let properties = read(&all);
        let expected = Properties {
            headers: Some(Headers::from([
                ("good".into(), HeaderValue::text("text")),
                ("more".into(), HeaderValue::Void),
            ])),
            delivery_mode: Some(2),
            message_id: Some("id".into()),
            undecodable: Some(Bytes(all.clone())),
            ..Properties::default()
        };
        assert_eq!(properties, expected);
        // Cut short anywhere it is neither plain nor whole, and what stood before is read.
        for len in 0..all.len() {
            let cut = all.get(..len).expect("shorter");
            assert!(!is_plain(cut), "{len}");
            assert_eq!(read(cut).undecodable, Some(Bytes(cut.to_vec())), "{len}");
        }
    }

    #[test]
    fn a_value_of_an_unknown_kind_ends_its_table_and_no_more() {
        let headers = [&short(b"a")[..], b"V", &short(b"b"), b"?\x00", &short(b"c"), b"V"].concat();
        let all = [&[0x30, 0][..], &long(&headers), &[7]].concat();
        assert!(!is_plain(&all));
        let properties = read(&all);
        assert_eq!(
            properties.headers,
            Some(Headers::from([("a".into(), HeaderValue::Void)]))
        );
        assert_eq!(properties.delivery_mode, Some(7));
        assert_eq!(properties.undecodable, Some(Bytes(all)));
        // Flags that nobody knows.
        for flags in [[0x00, 1], [0x00, 2]] {
            assert!(!is_plain(&flags));
            assert!(read(&flags).undecodable.is_some());
        }
        assert!(is_plain(&[0, 0]) && read(&[0, 0]) == Properties::default());
    }

    #[test]
    fn depth_has_a_bound() {
        let nested = |depth: usize| {
            let table = (1..depth).fold(Vec::new(), |inner, _| [&short(b"t")[..], b"F", &long(&inner)].concat());
            list(&table)
        };
        assert!(is_plain(&nested(DEPTH_MAX)));
        assert!(read(&nested(DEPTH_MAX)).wire_len() < 1_000);
        assert!(!is_plain(&nested(DEPTH_MAX + 1)));
        let properties = read(&nested(DEPTH_MAX + 1));
        assert!(properties.wire_len() > super::PROPERTIES_MAX);
        assert_eq!(properties.undecodable, None);
    }

    #[test]
    fn of_a_very_long_list_the_head_is_kept() {
        let all = [&[0x80, 0][..], &short(b"\xff"), &[b'x'; 40_000]].concat();
        let properties = read(&all);
        assert!(properties.wire_len() > super::PROPERTIES_MAX);
        let kept = properties.undecodable.expect("kept");
        assert_eq!(kept.0.len(), KEPT_MAX);
        assert!(all.starts_with(&kept.0));
    }

    fn any_value() -> impl Strategy<Value = HeaderValue> {
        let scalar = prop_oneof![
            any::<bool>().prop_map(HeaderValue::Boolean),
            any::<i8>().prop_map(HeaderValue::ShortShortInt),
            any::<u8>().prop_map(HeaderValue::ShortShortUInt),
            any::<i16>().prop_map(HeaderValue::ShortInt),
            any::<u16>().prop_map(HeaderValue::ShortUInt),
            any::<i32>().prop_map(HeaderValue::LongInt),
            any::<u32>().prop_map(HeaderValue::LongUInt),
            any::<i64>().prop_map(HeaderValue::LongLongInt),
            any::<u32>().prop_map(HeaderValue::Float),
            any::<u64>().prop_map(HeaderValue::Double),
            any::<u64>().prop_map(HeaderValue::Timestamp),
            any::<(u8, u32)>().prop_map(|(scale, value)| HeaderValue::Decimal { scale, value }),
            any::<Vec<u8>>().prop_map(|bytes| HeaderValue::LongString(Bytes(bytes))),
            any::<Vec<u8>>().prop_map(|bytes| HeaderValue::ByteArray(Bytes(bytes))),
            Just(HeaderValue::Void),
        ];
        scalar.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(HeaderValue::Array),
                proptest::collection::btree_map(".{0,8}", inner, 0..4).prop_map(HeaderValue::Table),
            ]
        })
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were_written(headers in proptest::collection::btree_map(".{0,8}", any_value(), 0..6)) {
            let bytes = write_headers(&headers).expect("short names");
            prop_assert_eq!(super::headers(&bytes), Some(headers.clone()));
            let all = list(&bytes);
            prop_assert!(is_plain(&all));
            let expected = Properties { headers: Some(headers), ..Properties::default() };
            prop_assert_eq!(all.len().checked_sub(2), Some(expected.wire_len()));
            prop_assert_eq!(read(&all), expected);
        }

        /// Whatever comes: no panic, and what is plain is read whole.
        #[test]
        fn any_bytes_are_read(bytes in any::<Vec<u8>>()) {
            let properties = read(&bytes);
            prop_assert_eq!(properties.undecodable.is_none(), is_plain(&bytes));
        }
    }
}
