//! The Bitcoin-signed-message digest, who signed, and [`Verified`], whose only door is [`Verified::verify`].

use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use sha2::{Digest, Sha256};

use super::reason::Reason;

/// A compressed secp256k1 point, 33 bytes, first 02 or 03.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 33]);

/// Why a text is no partner's public key. The sentences go to an operator's terminal and never repeat what was typed:
/// it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("this is an extended private key: keep it secret, and give the public one (xpub or tpub)")]
    ExtendedPrivateKey,
    #[error("32 bytes are no public key and may be a private one: give 33 bytes in hexadecimal, or an xpub")]
    PerhapsPrivateKey,
    #[error("an uncompressed key will not do: give the compressed form, 33 bytes that begin with 02 or 03")]
    Uncompressed,
    #[error("a public key in hexadecimal is 33 bytes (66 characters) that begin with 02 or 03")]
    Hex,
    #[error("the bytes are no point of the curve secp256k1")]
    NotOnCurve,
    #[error("the checksum of the extended key is wrong: it was cut off or mistyped")]
    Checksum,
    #[error("this kind of extended key is not supported: give an xpub or a tpub")]
    Version,
    #[error("not a public key: give an xpub, a tpub, or 33 bytes in hexadecimal")]
    Unreadable,
}

/// Who signed a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signer {
    /// Not a well-formed signature; the detail says why.
    Malformed(String),
    /// Well-formed, but no point can be recovered from it.
    Unrecoverable,
    /// The key that made it.
    Key(PublicKey),
    /// Nobody asked: the message is only kept. It is accepted as little as one that is forged.
    Unread,
}

impl Signer {
    /// The key that made the signature, if one did.
    pub fn key(&self) -> Option<PublicKey> {
        match self {
            Signer::Key(key) => Some(*key),
            Signer::Malformed(_) | Signer::Unrecoverable | Signer::Unread => None,
        }
    }
}

/// Version bytes of the extended keys of BIP 32.
const XPUB: [u8; 4] = [0x04, 0x88, 0xb2, 0x1e];
const TPUB: [u8; 4] = [0x04, 0x35, 0x87, 0xcf];
const XPRV: [u8; 4] = [0x04, 0x88, 0xad, 0xe4];
const TPRV: [u8; 4] = [0x04, 0x35, 0x83, 0x94];

/// A 78-byte extended key with its checksum is 111 or 112 characters; base58 takes quadratic time, so much longer texts
/// are not even tried.
const EXTENDED_KEY_MAX_CHARS: usize = 128;

impl PublicKey {
    /// Reads 33 bytes, 02 or 03 first, of a point on the curve.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let key = Self::stored(bytes)?;
        secp256k1::PublicKey::from_byte_array_compressed(key.0).ok()?;
        Some(key)
    }

    /// Reads the bytes of a key that was on the curve when it was stored. To find that out again takes longer than a third
    /// of a signature, for keys that are only compared.
    pub fn stored(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 33] = bytes.try_into().ok()?;
        matches!(bytes, [0x02 | 0x03, ..]).then_some(Self(bytes))
    }

    /// Reads the same in hexadecimal, any letter case.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 33];
        hex::decode_to_slice(text, &mut bytes).ok()?;
        Self::from_bytes(&bytes)
    }

    /// Reads what an operator gives: an xpub or tpub with its checksum, or 33 bytes in hexadecimal. No derivation: the
    /// key is the one in the serialisation, whatever its depth.
    ///
    /// # Errors
    /// Why it is refused; never repeats the text.
    pub fn from_xpub_or_hex(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return match (text.len(), text.get(..2)) {
                (64, _) => Err(KeyError::PerhapsPrivateKey),
                (130, Some("04")) => Err(KeyError::Uncompressed),
                (66, Some("02" | "03")) => Self::from_hex(text).ok_or(KeyError::NotOnCurve),
                _ => Err(KeyError::Hex),
            };
        }
        // An extended private key of any flavour (xprv, tprv, yprv, ..) is named as such even if it is cut off.
        if text.get(1..4) == Some("prv") {
            return Err(KeyError::ExtendedPrivateKey);
        }
        if text.len() > EXTENDED_KEY_MAX_CHARS {
            return Err(KeyError::Unreadable);
        }
        let bytes = match bs58::decode(text).with_check(None).into_vec() {
            Ok(bytes) => bytes,
            Err(bs58::decode::Error::InvalidChecksum { .. }) => return Err(KeyError::Checksum),
            Err(_) => return Err(KeyError::Unreadable),
        };
        let bytes: [u8; 78] = bytes.try_into().map_err(|_| KeyError::Unreadable)?;
        let (Some(version), Some(key)) = (bytes.first_chunk::<4>(), bytes.last_chunk::<33>()) else {
            return Err(KeyError::Unreadable);
        };
        if [XPRV, TPRV].contains(version) {
            return Err(KeyError::ExtendedPrivateKey);
        }
        if ![XPUB, TPUB].contains(version) {
            return Err(KeyError::Version);
        }
        Self::from_bytes(key).ok_or(KeyError::NotOnCurve)
    }

    /// The 33 bytes.
    pub fn as_bytes(&self) -> &[u8; 33] {
        &self.0
    }

    /// The 33 bytes in lower-case hexadecimal.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl std::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_hex())
    }
}

/// The order of the group, big-endian.
const N: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0xba, 0xae, 0xdc,
    0xe6, 0xaf, 0x48, 0xa0, 0x3b, 0xbf, 0xd2, 0x5e, 0x8c, 0xd0, 0x36, 0x41, 0x41,
];
/// Half of it, rounded down: the largest s. Above it stands the high-S twin of another signature.
const HALF_N: [u8; 32] = [
    0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x5d, 0x57, 0x6e,
    0x73, 0x57, 0xa4, 0x50, 0x1d, 0xdf, 0xe9, 0x2f, 0x46, 0x68, 0x1b, 0x20, 0xa0,
];
const ZERO: [u8; 32] = [0; 32];

/// The header of a recovery id 0 for a compressed key: 27 + 4.
const HEADER_FIRST: u8 = 31;

/// A well-formed signature, cut in its parts.
struct Parts {
    bytes: [u8; 65],
    recovery_id: RecoveryId,
}

impl Parts {
    /// Well-formedness, from the text alone. The detail says which rule is broken.
    fn read(text: &str) -> Result<Self, &'static str> {
        if text.starts_with("0x") || text.starts_with("0X") {
            return Err("must be bare hexadecimal, without 0x");
        }
        let mut bytes = [0; 65];
        hex::decode_to_slice(text, &mut bytes)
            .map_err(|_| "must be exactly 130 hexadecimal characters: header, r, s")?;
        let [header, scalars @ ..] = bytes;
        let recovery_id = match header {
            31..=34 => RecoveryId::from_u8_masked(header.wrapping_sub(HEADER_FIRST)),
            27..=30 => return Err("the header must be 31 to 34: 27 to 30 are for uncompressed keys"),
            _ => return Err("the header must be 31 to 34: 27 + 4 + recovery id"),
        };
        let (Some(r), Some(s)) = (scalars.first_chunk::<32>(), scalars.last_chunk::<32>()) else {
            return Err("must be exactly 130 hexadecimal characters: header, r, s");
        };
        // Big-endian numbers of equal length compare as bytes do.
        if *r == ZERO || *r >= N {
            return Err("r must be at least 1 and less than the order of the group");
        }
        if *s == ZERO {
            return Err("s must be at least 1");
        }
        if *s > HALF_N {
            return Err("s must be at most half of the order of the group (low S)");
        }
        Ok(Self { bytes, recovery_id })
    }
}

/// The 65 bytes of a well-formed signature: header, r, s.
pub fn signature_bytes(text: &str) -> Option<[u8; 65]> {
    Parts::read(text).ok().map(|parts| parts.bytes)
}

/// Who signed a payload, as far as the text and the curve tell. Only recovery proves the header's recovery id.
pub fn signer(payload: &str, signature: &str) -> Signer {
    let parts = match Parts::read(signature) {
        Ok(parts) => parts,
        Err(detail) => return Signer::Malformed(detail.to_owned()),
    };
    let [_, scalars @ ..] = &parts.bytes;
    RecoverableSignature::from_compact(scalars, parts.recovery_id)
        .and_then(|signature| signature.recover(secp256k1::Message::from_digest(signed_digest(payload))))
        .map_or(Signer::Unrecoverable, |key| Signer::Key(PublicKey(key.serialize())))
}

/// What is signed: SHA-256 twice over the magic text, the payload's length and the payload.
pub fn signed_digest(payload: &str) -> [u8; 32] {
    let (varint, width) = varint(payload.len() as u64);
    let mut hash = Sha256::new();
    hash.update(b"\x18Bitcoin Signed Message:\n");
    hash.update(varint.get(..width).unwrap_or_default());
    hash.update(payload.as_bytes());
    Sha256::digest(hash.finalize()).into()
}

/// Bitcoin's variable-length integer: the bytes, and how many of them count.
fn varint(value: u64) -> ([u8; 9], usize) {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
    match value {
        0..=0xfc => ([b0, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        0xfd..=0xffff => ([0xfd, b0, b1, 0, 0, 0, 0, 0, 0], 3),
        0x1_0000..=0xffff_ffff => ([0xfe, b0, b1, b2, b3, 0, 0, 0, 0], 5),
        0x1_0000_0000.. => ([0xff, b0, b1, b2, b3, b4, b5, b6, b7], 9),
    }
}

/// A partner's secret key, for the partner's side: demo, simulation, tests.
#[derive(Clone)]
pub struct SigningKey(secp256k1::SecretKey);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

impl SigningKey {
    /// Any 32 bytes will do, except zero and numbers not below the order of the group.
    pub fn from_bytes(bytes: [u8; 32]) -> Option<Self> {
        secp256k1::SecretKey::from_secret_bytes(bytes).ok().map(Self)
    }

    /// The public key to register.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.0.public_key().serialize())
    }

    /// Signs a payload as BitGo's SDK does: header 31 or 32, low S, 130 hexadecimal characters. Deterministic.
    pub fn sign(&self, payload: &str) -> String {
        let digest = secp256k1::Message::from_digest(signed_digest(payload));
        let (recovery_id, scalars) = RecoverableSignature::sign_ecdsa_recoverable(digest, &self.0).serialize_compact();
        let header = HEADER_FIRST.wrapping_add(recovery_id.to_u8());
        format!("{header:02x}{}", hex::encode(scalars))
    }
}

/// Something whose signer is proven. There is no way to make one but [`Verified::verify`].
#[derive(Clone, Debug, PartialEq)]
pub struct Verified<T> {
    value: T,
    key: PublicKey,
}

/// Why a signature proves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unverified {
    /// `malformed_signature`; the detail says why.
    Malformed(String),
    /// `signature_mismatch`: no point can be recovered.
    Unrecoverable,
    /// `signature_mismatch`: made by this key, which is not accepted.
    Stranger(PublicKey),
}

impl Unverified {
    /// The public code.
    pub fn reason(&self) -> Reason {
        match self {
            Unverified::Malformed(_) => Reason::MalformedSignature,
            Unverified::Unrecoverable | Unverified::Stranger(_) => Reason::SignatureMismatch,
        }
    }

    /// A sentence for the partner.
    pub fn detail(&self) -> String {
        match self {
            Unverified::Malformed(detail) => format!("signature: {detail}"),
            Unverified::Unrecoverable => "no public key can be recovered from the signature and the payload".to_owned(),
            Unverified::Stranger(_) => "the signature was made by no key of the partner that is valid now".to_owned(),
        }
    }
}

impl<T> Verified<T> {
    /// Lets a value through if its signer is one of the accepted keys.
    ///
    /// # Errors
    /// Why not.
    pub fn verify(value: T, signer: &Signer, accepted: &[PublicKey]) -> Result<Self, Unverified> {
        match signer {
            Signer::Malformed(detail) => Err(Unverified::Malformed(detail.clone())),
            Signer::Unrecoverable | Signer::Unread => Err(Unverified::Unrecoverable),
            Signer::Key(key) if accepted.contains(key) => Ok(Self { value, key: *key }),
            Signer::Key(key) => Err(Unverified::Stranger(*key)),
        }
    }

    /// The value.
    pub fn get(&self) -> &T {
        &self.value
    }

    /// The key that signed it.
    pub fn key(&self) -> PublicKey {
        self.key
    }

    /// The value, without the proof.
    pub fn into_inner(self) -> T {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        valid: Vec<Vector>,
        invalid: Vec<Vector>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Vector {
        note: String,
        class: Option<String>,
        xpub: String,
        public_key_hex: String,
        payload: String,
        signature_hex: String,
    }

    fn vectors() -> Vectors {
        serde_json::from_str(include_str!("../../tests/data/signatures.json")).expect("the vectors are JSON")
    }

    fn key(byte: u8) -> SigningKey {
        SigningKey::from_bytes([byte; 32]).expect("a key")
    }

    #[test]
    fn valid_vectors_are_signed_by_their_key() {
        for vector in vectors().valid {
            let key = PublicKey::from_hex(&vector.public_key_hex);
            assert_eq!(PublicKey::from_xpub_or_hex(&vector.xpub).ok(), key, "{}", vector.note);
            assert_eq!(
                Some(signer(&vector.payload, &vector.signature_hex)),
                key.map(Signer::Key),
                "{}",
                vector.note
            );
            assert_eq!(
                signer(&vector.payload, &vector.signature_hex.to_uppercase()),
                Signer::Key(key.expect("a key"))
            );
            assert_eq!(
                signature_bytes(&vector.signature_hex).map(hex::encode),
                Some(vector.signature_hex)
            );
        }
    }

    #[test]
    fn invalid_vectors_are_refused_as_their_class_says() {
        for vector in vectors().invalid {
            let key = PublicKey::from_xpub_or_hex(&vector.xpub).expect("an xpub");
            assert_eq!(key.to_hex(), vector.public_key_hex, "{}", vector.note);
            let signer = signer(&vector.payload, &vector.signature_hex);
            let refusal = Verified::verify((), &signer, &[key]).map_err(|error| error.reason());
            let class = vector.class.as_deref().unwrap_or_default();
            let malformed = match class {
                "crypto" | "payload" | "key" | "digest" | "header" => false,
                "malleability" | "range" | "encoding" | "encoding-lenient" => true,
                _ => panic!("a class without a rule: {class}"),
            };
            let expected = if malformed {
                Reason::MalformedSignature
            } else {
                Reason::SignatureMismatch
            };
            assert_eq!(refusal, Err(expected), "{}: {}", class, vector.note);
            assert_eq!(
                signature_bytes(&vector.signature_hex).is_none(),
                malformed,
                "{}",
                vector.note
            );
        }
    }

    /// A signature's text from its parts.
    fn text(header: u8, r: [u8; 32], s: [u8; 32]) -> String {
        format!("{header:02x}{}{}", hex::encode(r), hex::encode(s))
    }

    fn with_last(mut scalar: [u8; 32], last: u8) -> [u8; 32] {
        if let Some(byte) = scalar.last_mut() {
            *byte = last;
        }
        scalar
    }

    #[test]
    fn well_formed_is_what_the_text_shows() {
        let one = with_last(ZERO, 1);
        for header in 0..=u8::MAX {
            let well_formed = (31..=34).contains(&header);
            assert_eq!(
                signature_bytes(&text(header, one, one)).is_some(),
                well_formed,
                "header {header}"
            );
        }
        let n_minus_1 = with_last(N, 0x40);
        let n_plus_1 = with_last(N, 0x42);
        let max = [0xff; 32];
        for (r, ok) in [
            (ZERO, false),
            (one, true),
            (HALF_N, true),
            (n_minus_1, true),
            (N, false),
            (n_plus_1, false),
            (max, false),
        ] {
            assert_eq!(signature_bytes(&text(31, r, one)).is_some(), ok, "r {}", hex::encode(r));
        }
        let half_plus_1 = with_last(HALF_N, 0xa1);
        for (s, ok) in [
            (ZERO, false),
            (one, true),
            (HALF_N, true),
            (half_plus_1, false),
            (n_minus_1, false),
            (N, false),
            (max, false),
        ] {
            assert_eq!(signature_bytes(&text(32, one, s)).is_some(), ok, "s {}", hex::encode(s));
        }
    }

    #[test]
    fn malformed_signatures_say_why() {
        let good = key(7).sign("{}");
        let length = "must be exactly 130 hexadecimal characters: header, r, s";
        for (text, detail) in [
            (String::new(), length),
            (format!("0x{good}"), "must be bare hexadecimal, without 0x"),
            (format!("0X{}", &good[2..]), "must be bare hexadecimal, without 0x"),
            (good[..128].to_owned(), length),
            (good[..129].to_owned(), length),
            (format!("{good}00"), length),
            (format!("{good}\n"), length),
            (format!("{good}\0"), length),
            (format!(" {good}"), length),
            (format!("{} ", &good[..129]), length),
            (format!("{}\n", &good[..129]), length),
            (format!("{}g", &good[..129]), length),
            // 130 bytes, but not 130 hexadecimal characters; full-width digits.
            (format!("{}é", &good[..128]), length),
            ("１".repeat(130), length),
            ("IBxwa7bFy4Xtw1e".to_owned(), length),
            (
                format!("1b{}", &good[2..]),
                "the header must be 31 to 34: 27 to 30 are for uncompressed keys",
            ),
            (
                format!("23{}", &good[2..]),
                "the header must be 31 to 34: 27 + 4 + recovery id",
            ),
            (
                text(31, ZERO, N),
                "r must be at least 1 and less than the order of the group",
            ),
            (
                text(31, N, N),
                "r must be at least 1 and less than the order of the group",
            ),
            (text(31, HALF_N, ZERO), "s must be at least 1"),
            (
                text(31, HALF_N, N),
                "s must be at most half of the order of the group (low S)",
            ),
        ] {
            assert_eq!(signer("{}", &text), Signer::Malformed(detail.to_owned()), "{text:?}");
            assert_eq!(signature_bytes(&text), None);
        }
    }

    #[test]
    fn recovery_proves_the_header() {
        let (key, payload) = (key(9), "{}");
        let good = key.sign(payload);
        assert_eq!(signer(payload, &good), Signer::Key(key.public_key()));
        for header in ["1f", "20", "21", "22"]
            .into_iter()
            .filter(|header| !good.starts_with(header))
        {
            let other = format!("{header}{}", &good[2..]);
            assert_ne!(signer(payload, &other), Signer::Key(key.public_key()));
        }
        // r stands for r + n only below p - n, about 2^128: above it, no point has that x.
        assert_eq!(signer(payload, &format!("21{}", &good[2..])), Signer::Unrecoverable);
        assert_eq!(signer(payload, &format!("22{}", &good[2..])), Signer::Unrecoverable);
        // No point has x = 5.
        let five = with_last(ZERO, 5);
        assert_eq!(signer(payload, &text(31, five, five)), Signer::Unrecoverable);
        // x = 2 + n is on the curve: an overflown r is recovered, not refused.
        let two = with_last(ZERO, 2);
        assert!(matches!(
            signer(payload, &text(33, two, two)),
            Signer::Key(_) | Signer::Unrecoverable
        ));
    }

    #[test]
    fn the_length_stands_before_the_payload() {
        for (value, bytes) in [
            (0_u64, "00"),
            (0xfc, "fc"),
            (0xfd, "fdfd00"),
            (0xff, "fdff00"),
            (0xffff, "fdffff"),
            (0x1_0000, "fe00000100"),
            (0xffff_ffff, "feffffffff"),
            (0x1_0000_0000, "ff0000000001000000"),
            (u64::MAX, "ffffffffffffffffff"),
        ] {
            let (varint, width) = varint(value);
            assert_eq!(varint.get(..width).map(hex::encode).as_deref(), Some(bytes), "{value}");
        }
        // Bitcoin Core's own digest of an empty message, and the length is of bytes, not characters.
        assert_eq!(
            hex::encode(signed_digest("")),
            "80e795d4a4caadd7047af389d9f7f220562feb6196032e2131e10563352c4bcc"
        );
        assert_ne!(signed_digest("é"), signed_digest("e"));
    }

    #[test]
    fn signing_is_as_the_sdk_does_it() {
        for byte in 1..=40 {
            let payload = format!("{{\"nonce\":\"{byte}\"}}");
            let signature = key(byte).sign(&payload);
            assert_eq!(signature.len(), 130);
            assert!(
                signature.starts_with("1f") || signature.starts_with("20"),
                "{signature}"
            );
            assert_eq!(signature, signature.to_lowercase());
            assert_eq!(signature, key(byte).sign(&payload), "deterministic");
            assert_eq!(signer(&payload, &signature), Signer::Key(key(byte).public_key()));
        }
        assert!(SigningKey::from_bytes(ZERO).is_none());
        assert!(SigningKey::from_bytes(N).is_none());
        assert_eq!(format!("{:?}", key(7)), "SigningKey(..)");
    }

    #[test]
    fn keys_are_read_from_bytes_and_hexadecimal() {
        let good = key(7).public_key();
        assert_eq!(PublicKey::from_bytes(good.as_bytes()), Some(good));
        assert_eq!(PublicKey::from_hex(&good.to_hex().to_uppercase()), Some(good));
        assert_eq!(format!("{good} {good:?}"), format!("{0} {0}", good.to_hex()));
        for (bytes, why) in [
            (good.as_bytes()[..32].to_vec(), "32 bytes"),
            ([good.as_bytes().as_slice(), &[0]].concat(), "34 bytes"),
            ([&[0x04], &good.as_bytes()[1..]].concat(), "begins with 04"),
            ([&[0x00], &good.as_bytes()[1..]].concat(), "begins with 00"),
            ([&[0x02], with_last(ZERO, 5).as_slice()].concat(), "no point has x = 5"),
            ([&[0x02], [0xff; 32].as_slice()].concat(), "x above the field"),
            (Vec::new(), "empty"),
        ] {
            assert_eq!(PublicKey::from_bytes(&bytes), None, "{why}");
        }
        assert_eq!(PublicKey::from_hex(&format!("0x{good}")), None);
    }

    /// An extended key with a checksum.
    fn extended(version: [u8; 4], middle: u8, key: &[u8]) -> String {
        let bytes = [version.as_slice(), &[middle; 41], key].concat();
        bs58::encode(bytes).with_check().into_string()
    }

    #[test]
    fn keys_are_read_as_operators_give_them() {
        let good = key(7).public_key();
        let bytes = good.as_bytes();
        for text in [
            good.to_hex(),
            good.to_hex().to_uppercase(),
            format!(" {good}\n"),
            extended(XPUB, 0, bytes),
            extended(TPUB, 0, bytes),
            // Depth, fingerprint, child number and chain code do not matter.
            extended(XPUB, 0xff, bytes),
        ] {
            assert_eq!(PublicKey::from_xpub_or_hex(&text), Ok(good), "{text}");
        }
        assert!(extended(XPUB, 0, bytes).starts_with("xpub"));
        assert!(extended(TPUB, 0, bytes).starts_with("tpub"));

        let private = [&[0], [7; 32].as_slice()].concat();
        let xprv = extended(XPRV, 0, &private);
        assert!(xprv.starts_with("xprv"));
        let xpub = extended(XPUB, 0, bytes);
        // The last character but one, so that the text stays base58.
        let mistyped = format!(
            "{}{}{}",
            &xpub[..109],
            if &xpub[109..110] == "2" { "3" } else { "2" },
            &xpub[110..]
        );
        let not_on_curve = [&[0x02], with_last(ZERO, 5).as_slice()].concat();
        for (text, error) in [
            (xprv.clone(), KeyError::ExtendedPrivateKey),
            (xprv[..50].to_owned(), KeyError::ExtendedPrivateKey),
            (format!("{xprv}x"), KeyError::ExtendedPrivateKey),
            (extended(TPRV, 0, &private), KeyError::ExtendedPrivateKey),
            ("07".repeat(32), KeyError::PerhapsPrivateKey),
            (format!("04{}", "07".repeat(64)), KeyError::Uncompressed),
            (format!("04{}", "07".repeat(32)), KeyError::Hex),
            ("02".to_owned(), KeyError::Hex),
            (hex::encode(&not_on_curve), KeyError::NotOnCurve),
            (extended(XPUB, 0, &not_on_curve), KeyError::NotOnCurve),
            (extended(XPUB, 0, &private), KeyError::NotOnCurve),
            (mistyped, KeyError::Checksum),
            (xpub[..110].to_owned(), KeyError::Checksum),
            (extended([0x04, 0x9d, 0x7c, 0xb2], 0, bytes), KeyError::Version),
            (bs58::encode([1; 77]).with_check().into_string(), KeyError::Unreadable),
            (String::new(), KeyError::Unreadable),
            (format!("0x{good}"), KeyError::Unreadable),
            ("x".repeat(100_000), KeyError::Unreadable),
            ("äöü".to_owned(), KeyError::Unreadable),
        ] {
            assert_eq!(PublicKey::from_xpub_or_hex(&text), Err(error), "{text}");
        }
    }

    #[test]
    fn only_accepted_keys_pass() {
        let (ours, other) = (key(1).public_key(), key(2).public_key());
        let verified = Verified::verify("update", &Signer::Key(ours), &[other, ours]).expect("accepted");
        assert_eq!((verified.get(), verified.key()), (&"update", ours));
        assert_eq!(verified.into_inner(), "update");
        for (signer, accepted, error) in [
            (Signer::Key(other), vec![ours], Unverified::Stranger(other)),
            (Signer::Key(ours), vec![], Unverified::Stranger(ours)),
            (Signer::Unrecoverable, vec![ours], Unverified::Unrecoverable),
            (Signer::Unread, vec![ours], Unverified::Unrecoverable),
            (
                Signer::Malformed("why".to_owned()),
                vec![ours],
                Unverified::Malformed("why".to_owned()),
            ),
        ] {
            assert_eq!(Verified::verify((), &signer, &accepted), Err(error));
        }
    }

    proptest! {
        #[test]
        fn what_is_signed_is_recovered(payload in any::<String>(), secret in any::<[u8; 32]>()) {
            let Some(key) = SigningKey::from_bytes(secret) else { return Ok(()) };
            let signature = key.sign(&payload);
            prop_assert_eq!(signer(&payload, &signature), Signer::Key(key.public_key()));
            prop_assert_ne!(signer(&format!("{payload} "), &signature), Signer::Key(key.public_key()));
        }

        #[test]
        fn no_text_panics(payload in any::<String>(), text in any::<String>(), hex_text in "(1f|2[0-2])[0-9a-fA-F]{128}") {
            prop_assert!(matches!(signer(&payload, &text), Signer::Malformed(_)));
            // Any outcome will do.
            drop(signer(&payload, &hex_text));
            prop_assert!(PublicKey::from_xpub_or_hex(&text).is_err());
        }
    }
}
