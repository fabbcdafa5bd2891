//! The Bitcoin-signed-message digest, who signed, and [`Verified`], whose only door is [`Verified::verify`].

use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use sha2::{Digest, Sha256};

use super::decide::Reason;

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
        let bytes: [u8; 33] = bytes.try_into().ok()?;
        if !matches!(bytes, [0x02 | 0x03, ..]) {
            return None;
        }
        secp256k1::PublicKey::from_byte_array_compressed(bytes).ok()?;
        Some(Self(bytes))
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
        if text.len() != 130 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err("must be exactly 130 hexadecimal characters: header, r, s");
        }
        let mut bytes = [0; 65];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| "must be hexadecimal")?;
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
        .and_then(|signature| signature.recover(secp256k1::Message::from_digest(message_digest(payload))))
        .map_or(Signer::Unrecoverable, |key| Signer::Key(PublicKey(key.serialize())))
}

/// What is signed: SHA-256 twice over the magic text, the payload's length and the payload.
fn message_digest(payload: &str) -> [u8; 32] {
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
        let digest = secp256k1::Message::from_digest(message_digest(payload));
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
    /// `signature_mismatch`: made by a key that is not accepted.
    Stranger,
}

impl Unverified {
    /// The public code.
    pub fn reason(&self) -> Reason {
        match self {
            Unverified::Malformed(_) => Reason::MalformedSignature,
            Unverified::Unrecoverable | Unverified::Stranger => Reason::SignatureMismatch,
        }
    }

    /// A sentence for the partner.
    pub fn detail(&self) -> String {
        match self {
            Unverified::Malformed(detail) => format!("signature: {detail}"),
            Unverified::Unrecoverable => "no public key can be recovered from the signature and the payload".to_owned(),
            Unverified::Stranger => "the signature was made by no key of the partner that is valid now".to_owned(),
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
            Signer::Unrecoverable => Err(Unverified::Unrecoverable),
            Signer::Key(key) if accepted.contains(key) => Ok(Self { value, key: *key }),
            Signer::Key(_) => Err(Unverified::Stranger),
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
