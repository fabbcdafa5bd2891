//! A partner's public key, and what an operator may give for one.

use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use super::calendar::rfc3339;

/// A compressed secp256k1 point, 33 bytes, first 02 or 03.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 33]);

/// Why a text is no partner's public key. The sentences go to an operator's terminal and never repeat what was typed:
/// it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("this is an extended private key: keep it secret, and give the public one (xpub or tpub)")]
    ExtendedPrivateKey,
    #[error("this is a private key: keep it secret, and give the public one (33 bytes in hexadecimal, or an xpub)")]
    Private,
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
    #[error("everybody can make the private half of this key (a small number): whoever signs with it could be anybody")]
    Trivial,
    #[error("not a public key: give an xpub, a tpub, or 33 bytes in hexadecimal")]
    Unreadable,
}

/// Version bytes of the extended keys of BIP 32.
const XPUB: [u8; 4] = [0x04, 0x88, 0xb2, 0x1e];
const TPUB: [u8; 4] = [0x04, 0x35, 0x87, 0xcf];
const XPRV: [u8; 4] = [0x04, 0x88, 0xad, 0xe4];
const TPRV: [u8; 4] = [0x04, 0x35, 0x83, 0x94];

/// A 78-byte extended key with its checksum is 111 or 112 characters; base58 takes quadratic time, so much longer texts
/// are not even tried.
const EXTENDED_KEY_MAX_CHARS: usize = 128;

/// Small numbers that nobody draws as a secret.
const TRIVIAL_MAX: u16 = 1_024;
/// The x of the generator's half, a point with a famously short one.
const HALF_POINT: [u8; 32] = [
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x3b, 0x78, 0xce, 0x56, 0x3f, 0x89, 0xa0, 0xed,
    0x94, 0x14, 0xf5, 0xaa, 0x28, 0xad, 0x0d, 0x96, 0xd6, 0x79, 0x5f, 0x9c, 0x63,
];

/// Whether a text can be told to be a private key: in a wallet's form or most of it, or armoured. 64
/// hexadecimal digits alone are told apart by their length, see [`KeyError::PerhapsPrivateKey`].
fn is_private(text: &str) -> bool {
    // Wallet import format has 51 or 52 characters, an extended key more than a hundred.
    let is_wallet = (50..=53).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let bare = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let is_hex = bare.is_some_and(|bare| bare.len() == 64 && bare.bytes().all(|byte| byte.is_ascii_hexdigit()));
    is_wallet || is_hex || text.contains("PRIVATE KEY")
}

/// Whether a text may be a private key or most of one, so that it must not be repeated anywhere.
pub fn may_be_private(text: &str) -> bool {
    let text = text.trim();
    let bare = text
        .strip_prefix("0x")
        .or_else(|| text.strip_prefix("0X"))
        .unwrap_or(text);
    let is_hex = (60..=68).contains(&bare.len()) && bare.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_public = bare.len() == 66 && (bare.starts_with("02") || bare.starts_with("03"));
    text.contains("prv") || (is_hex && !is_public) || is_private(text)
}

/// What the owner of a key signs to prove to have its private half, as it signs payloads. It lacks what an update has, so
/// that the signature can never be one of an update.
pub fn key_challenge(enterprise_id: &str, public_key: PublicKey, salt: Uuid, expires_at: Timestamp) -> String {
    json!({
        "purpose": "settled: prove to have the private half of this key",
        "enterpriseId": enterprise_id,
        "publicKey": public_key.to_hex(),
        "challenge": salt.simple().to_string(),
        "expiresAt": rfc3339(expires_at),
    })
    .to_string()
}

impl PublicKey {
    pub(super) fn of(key: &secp256k1::PublicKey) -> Self {
        Self(key.serialize())
    }

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
        // An extended private key of any flavour (xprv, tprv, yprv, ..) is named as such even if it is cut off.
        if text.get(1..4) == Some("prv") {
            return Err(KeyError::ExtendedPrivateKey);
        }
        if is_private(text) {
            return Err(KeyError::Private);
        }
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return match (text.len(), text.get(..2)) {
                (64, _) => Err(KeyError::PerhapsPrivateKey),
                (130, Some("04")) => Err(KeyError::Uncompressed),
                (66, Some("02" | "03")) => Self::from_hex(text).ok_or(KeyError::NotOnCurve),
                _ => Err(KeyError::Hex),
            };
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

    /// Whether everybody can make its private half: a small number, or the order of the group less one, or a half, which
    /// have short points. The generator itself is the first of them.
    pub fn is_trivial(&self) -> bool {
        if self.0.get(1..) == Some(HALF_POINT.as_slice()) {
            return true;
        }
        (1..=TRIVIAL_MAX).any(|number| {
            let mut secret = [0; 32];
            if let Some(last) = secret.last_chunk_mut::<2>() {
                *last = number.to_be_bytes();
            }
            let point = secp256k1::SecretKey::from_secret_bytes(secret).map(|secret| secret.public_key().serialize());
            // Of a point and its negative only the first byte differs.
            point.is_ok_and(|point| point.get(1..) == self.0.get(1..))
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: [u8; 32] = [0; 32];

    fn key(byte: u8) -> PublicKey {
        let secret = secp256k1::SecretKey::from_secret_bytes([byte; 32]).expect("a key");
        PublicKey::of(&secret.public_key())
    }

    fn with_last(mut bytes: [u8; 32], last: u8) -> [u8; 32] {
        bytes[31] = last;
        bytes
    }

    #[test]
    fn keys_are_read_from_bytes_and_hexadecimal() {
        let good = key(7);
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
        let good = key(7);
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
    fn what_everybody_can_sign_with_is_trivial() {
        let of = |secret: [u8; 32]| {
            let secret = secp256k1::SecretKey::from_secret_bytes(secret).expect("a key");
            PublicKey::of(&secret.public_key())
        };
        let generator = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798";
        assert_eq!(of(with_last(ZERO, 1)).to_hex(), generator);
        for text in [
            generator,
            &generator.replacen("02", "03", 1),
            "0200000000000000000000003b78ce563f89a0ed9414f5aa28ad0d96d6795f9c63",
        ] {
            assert!(PublicKey::from_hex(text).expect("a point").is_trivial(), "{text}");
        }
        for number in [2, 3, 255] {
            assert!(of(with_last(ZERO, number)).is_trivial(), "{number}");
        }
        assert!(!key(7).is_trivial() && !key(1).is_trivial());
    }

    /// Whatever form a private key comes in, the complaint knows it for one, and what repeats words knows to leave it out.
    #[test]
    fn a_private_key_is_known_for_one() {
        let wallet = |version: u8, end: &[u8]| {
            let bytes = [&[version], [7; 32].as_slice(), end].concat();
            bs58::encode(bytes).with_check().into_string()
        };
        for (text, error) in [
            (wallet(0x80, &[1]), KeyError::Private),
            (wallet(0x80, &[]), KeyError::Private),
            (wallet(0xef, &[1]), KeyError::Private),
            (format!("0x{}", "07".repeat(32)), KeyError::Private),
            ("-----BEGIN EC PRIVATE KEY-----".to_owned(), KeyError::Private),
            ("07".repeat(32), KeyError::PerhapsPrivateKey),
            (
                extended(XPRV, 0, &[&[0], [7; 32].as_slice()].concat()),
                KeyError::ExtendedPrivateKey,
            ),
        ] {
            assert_eq!(PublicKey::from_xpub_or_hex(&text), Err(error));
            assert!(may_be_private(&text), "{error}");
        }
        let xpub = extended(XPUB, 0, key(7).as_bytes());
        for text in [
            key(7).to_hex(),
            xpub,
            "acme".to_owned(),
            "10764cd8-59b5-422a-93a6-681bae7e84bd".to_owned(),
        ] {
            assert!(!may_be_private(&text), "{text}");
        }
    }

    #[test]
    fn what_is_signed_as_a_proof_is_no_update() {
        let text = key_challenge("acme", key(7), Uuid::from_u128(1), Timestamp::UNIX_EPOCH);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["challenge"], "00000000000000000000000000000001");
        assert_eq!(value["publicKey"], key(7).to_hex());
        assert!(value.get("nonce").is_none() && value.get("status").is_none());
    }
}
