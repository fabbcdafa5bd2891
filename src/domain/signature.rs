//! The Bitcoin-signed-message digest, who signed, and [`Verified`], whose only door is [`Verified::verify`].

/// A compressed secp256k1 point, 33 bytes, first 02 or 03.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 33]);

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

impl PublicKey {
    /// The 33 bytes.
    pub fn as_bytes(&self) -> &[u8; 33] {
        &self.0
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
