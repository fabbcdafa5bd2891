//! The Bitcoin-signed-message digest, who signed, and [`Verified`], whose only door is [`Verified::verify`].

use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use sha2::{Digest, Sha256};

pub use super::public_key::{KeyError, PublicKey, key_challenge};
use super::reason::Reason;

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
    signer_and_bytes(payload, signature).0
}

/// The same, and the signature's bytes where it is well-formed: the text is read once.
pub fn signer_and_bytes(payload: &str, signature: &str) -> (Signer, Option<[u8; 65]>) {
    let parts = match Parts::read(signature) {
        Ok(parts) => parts,
        Err(detail) => return (Signer::Malformed(detail.to_owned()), None),
    };
    let [_, scalars @ ..] = &parts.bytes;
    let signer = RecoverableSignature::from_compact(scalars, parts.recovery_id)
        .and_then(|signature| signature.recover(secp256k1::Message::from_digest(signed_digest(payload))))
        .map_or(Signer::Unrecoverable, |key| Signer::Key(PublicKey::of(&key)));
    (signer, Some(parts.bytes))
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
        PublicKey::of(&self.0.public_key())
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
            let (signer, bytes) = signer_and_bytes(&vector.payload, &vector.signature_hex);
            assert_eq!(Some(signer), key.map(Signer::Key), "{}", vector.note);
            assert_eq!(bytes, signature_bytes(&vector.signature_hex), "{}", vector.note);
            assert_eq!(bytes.map(hex::encode), Some(vector.signature_hex));
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
            assert_eq!(signer_and_bytes("{}", &text).1, None);
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
