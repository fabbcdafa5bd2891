//! AMQP by hand: for messages that lapin neither writes nor reads.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::kit::support::{PATIENCE, address, userinfo};

/// The flags of properties in a content header.
pub(crate) const CONTENT_TYPE: u16 = 1 << 15;
pub(crate) const HEADERS: u16 = 1 << 13;
pub(crate) const DELIVERY_MODE: u16 = 1 << 12;
pub(crate) const EXPIRATION: u16 = 1 << 8;
pub(crate) const MESSAGE_ID: u16 = 1 << 7;

/// What the client library does not take for a short string: it answers with an error.
pub(crate) const UNDECODABLE: &[u8] = b"application/json\xff";

/// Twice as deep as headers may be nested.
pub(crate) const TOO_DEEP: usize = 64;

/// Below what the broker lets a frame hold.
const FRAME_MAX: usize = 100_000;

pub(crate) fn short(text: &[u8]) -> Vec<u8> {
    let length = u8::try_from(text.len()).expect("a short string");
    [&[length], text].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a long string");
    [length.to_be_bytes().as_slice(), bytes].concat()
}

/// A header table with tables inside each other, this deep.
pub(crate) fn nested(depth: usize) -> Vec<u8> {
    (1..depth).fold(long(&[]), |inner, _| {
        long(&[short(b"t").as_slice(), b"F", &inner].concat())
    })
}

/// A connection with one channel, confirms on.
pub(crate) struct Raw(TcpStream);

impl Raw {
    pub(crate) async fn open(url: &str) -> Self {
        let (user, password) = userinfo(url);
        let vhost = url.rsplit('/').next().expect("a vhost");
        let stream = TcpStream::connect(address(url)).await.expect("the broker answers");
        let mut raw = Self(stream);
        raw.0.write_all(b"AMQP\0\0\x09\x01").await.expect("a greeting");
        raw.answer(10, 10).await;
        let login = format!("\0{user}\0{password}");
        let start = [long(&[]), short(b"PLAIN"), long(login.as_bytes()), short(b"en_US")].concat();
        raw.method(0, 10, 11, &start).await;
        let tune = raw.answer(10, 30).await;
        // No heartbeat: this connection is short.
        let tune = [tune.get(..6).expect("channel and frame maximum"), &[0, 0]].concat();
        raw.method(0, 10, 31, &tune).await;
        raw.method(0, 10, 40, &[short(vhost.as_bytes()), short(b""), vec![0]].concat())
            .await;
        raw.answer(10, 41).await;
        raw.method(1, 20, 10, &short(b"")).await;
        raw.answer(20, 11).await;
        raw.method(1, 85, 10, &[0]).await;
        raw.answer(85, 11).await;
        raw
    }

    /// Publishes with a property list of any bytes, and waits for the confirm.
    pub(crate) async fn publish(&mut self, exchange: &str, key: &str, flags: u16, properties: &[u8], body: &[u8]) {
        let publish = [
            &[0, 0],
            short(exchange.as_bytes()).as_slice(),
            &short(key.as_bytes()),
            &[0],
        ]
        .concat();
        self.method(1, 60, 40, &publish).await;
        let mut header = [0, 60, 0, 0].to_vec();
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties);
        self.frame(2, 1, &header).await;
        for part in body.chunks(FRAME_MAX) {
            self.frame(3, 1, part).await;
        }
        self.answer(60, 80).await;
    }

    /// Takes a message out of a queue, if there is one: its content header and its body.
    pub(crate) async fn get(&mut self, queue: &str) -> Option<(Vec<u8>, Vec<u8>)> {
        self.method(1, 60, 70, &[&[0, 0], short(queue.as_bytes()).as_slice(), &[1]].concat())
            .await;
        let (_, answer) = self.read().await;
        if answer.starts_with(&[0, 60, 0, 72]) {
            return None;
        }
        assert!(answer.starts_with(&[0, 60, 0, 71]), "{answer:?}");
        let (_, header) = self.read().await;
        let size: [u8; 8] = header.get(4..12).and_then(|size| size.try_into().ok()).expect("a size");
        let mut body = Vec::new();
        while (body.len() as u64) < u64::from_be_bytes(size) {
            body.extend(self.read().await.1);
        }
        Some((header, body))
    }

    async fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let payload = [class.to_be_bytes().as_slice(), &method.to_be_bytes(), arguments].concat();
        self.frame(1, channel, &payload).await;
    }

    async fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let bytes = [&[kind], channel.to_be_bytes().as_slice(), &long(payload), &[0xce]].concat();
        self.0.write_all(&bytes).await.expect("written");
    }

    /// The next method, which must be this one: its arguments.
    async fn answer(&mut self, class: u16, method: u16) -> Vec<u8> {
        let (_, payload) = self.read().await;
        let expected = [class.to_be_bytes(), method.to_be_bytes()].concat();
        let arguments = payload.strip_prefix(expected.as_slice());
        arguments
            .unwrap_or_else(|| panic!("instead of {class}.{method}: {payload:?}"))
            .to_vec()
    }

    /// The next frame that is not a heartbeat.
    async fn read(&mut self) -> (u8, Vec<u8>) {
        let reading = async {
            loop {
                let mut head = [0; 7];
                self.0.read_exact(&mut head).await.expect("a frame");
                let [kind, _, _, length @ ..] = head;
                let mut payload = vec![0; u32::from_be_bytes(length) as usize + 1];
                self.0.read_exact(&mut payload).await.expect("a frame");
                assert_eq!(payload.pop(), Some(0xce));
                if kind != 8 {
                    return (kind, payload);
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("a frame in time")
    }
}
